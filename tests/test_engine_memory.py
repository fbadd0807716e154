"""What a file says of its model before it is loaded, and whether memory will do."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferpool import ChatConfig, ModelLoadError, Pool
from inferpool.engine import backend, memory
from inferpool.engine.gguf import Gguf
from inferpool.engine.memory import available_memory, mapped_bytes, require_memory
from inferpool.models import resolve
from inferpool.roles.load import load_model

TINY = Path(__file__).parent / "data" / "tiny-reranker.gguf"
HEAD = TINY.read_bytes()[:4096]
MIB = 1 << 20


@pytest.mark.parametrize("model", ["smollm2", "minilm", str(TINY)])
def test_metadata_is_what_another_reader_finds(model: str) -> None:
    ours = Gguf(resolve(model))
    theirs = gguf.GGUFReader(ours.path)
    fields = {name: field for name, field in theirs.fields.items() if name[:5] != "GGUF."}
    assert ours.metadata.keys() == fields.keys()
    for name, field in fields.items():
        expected = field.contents()
        if isinstance(expected, list) and (len(expected) > 1024 or isinstance(expected[0], str)):
            expected = len(expected)
        assert ours.metadata[name] == expected, name


def test_what_a_token_takes_is_what_llama_cpp_allocates() -> None:
    # llama.cpp logs "KV buffer size = 180.00 MiB" for 8192 tokens.
    assert Gguf(resolve("smollm2")).bytes_per_token * 8192 == 180 * MIB
    assert Gguf(resolve("minilm")).bytes_per_token == 0


def write(path: Path, **values: object) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {"context_length": 512, "embedding_length": 64, **values}.items():
        key = f"llama.{name.replace('__', '.')}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, str(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"attention__head_count": 4}, 2 * 3 * 4 * (16 + 16)),
        ({"attention__head_count": 4, "attention__head_count_kv": 2}, 2 * 3 * 2 * (16 + 16)),
        ({"attention__head_count": [4, 8, 8]}, 2 * 20 * (8 + 8)),
        (
            {"attention__head_count": 4, "attention__key_length": 32},
            2 * 3 * 4 * (32 + 16),
        ),
        ({"attention__head_count": 4, "attention__sliding_window": 128}, 2 * 3 * 4 * (16 + 16)),
        ({"attention__head_count": 4, "nextn_predict_layers": 1}, 2 * 2 * 4 * (16 + 16)),
        ({"attention__head_count": [4, 4, 4], "nextn_predict_layers": 1}, 2 * 8 * (16 + 16)),
        ({"attention__head_count": 4, "attention__kv_lora_rank": 64}, 0),
        ({"attention__head_count": 4, "attention__causal": False}, 0),
        ({"attention__head_count": "four"}, 0),
        ({}, 0),
    ],
)
def test_what_a_token_takes_follows_the_layers(
    tmp_path: Path, values: dict[str, object], expected: int
) -> None:
    path = write(tmp_path / "model.gguf", block_count=3, **values)
    assert Gguf(path).bytes_per_token == expected


def test_a_context_has_room_for_all_tokens_of_layers_with_a_sliding_window() -> None:
    assert backend.lib.llama_context_default_params().swa_full


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("context_length", 0),
        ("context_length", 2**31),
        ("embedding_length", 0),
        ("embedding_length", 1 << 30),
        ("block_count", 0),
        ("block_count", 100_000),
        ("block_count", "three"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(tmp_path: Path, name: str, value: object) -> None:
    path = write(tmp_path / "absurd.gguf", **{"block_count": 1, name: value})
    problem = f"a {name.replace('_', ' ')} of {value} makes no sense"
    with pytest.raises(ModelLoadError, match=problem):
        Gguf(path)


def test_a_pooling_that_llama_cpp_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no pooling of type 77"):
        Gguf(write(tmp_path / "odd.gguf", block_count=1, pooling_type=77))


def test_a_file_that_ends_anywhere_is_a_load_error(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    whole = write(tmp_path / "whole.gguf", block_count=3, attention__head_count=[1, 2, 3])
    data = whole.read_bytes().rstrip(b"\0")
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ModelLoadError, match=r"can't load .*cut\.gguf: "):
            Gguf(path)


@settings(max_examples=300)
@given(at=st.integers(0, len(HEAD) - 8), data=st.binary(min_size=1, max_size=8))
def test_a_damaged_file_is_read_or_is_a_load_error(
    tmp_path_factory: pytest.TempPathFactory, at: int, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(HEAD[:at] + data + HEAD[at + len(data) :] + b"\0" * 4096)
    with contextlib.suppress(ModelLoadError):
        assert isinstance(Gguf(path).bytes_per_token, int)


def test_a_version_that_is_not_known_is_said(tmp_path: Path) -> None:
    path = tmp_path / "new.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 9, 0, 0))
    with pytest.raises(ModelLoadError, match="version 9"):
        Gguf(path)


def test_what_cannot_fit_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: (272 * MIB, "the machine"))
    model = Gguf(resolve("smollm2"))
    require_memory(model, n_bytes=92 * MIB, n_ctx=8192)
    with pytest.raises(ModelLoadError) as caught:
        require_memory(model, n_bytes=93 * MIB, n_ctx=8192)
    assert str(caught.value) == (
        "SmolLM2-135M-Instruct.Q4_1.gguf needs at least 273 MiB of memory (93 MiB for the weights, "
        "180 MiB for a context of 8192 tokens), and the machine leaves 272 MiB"
    )


@pytest.mark.parametrize("n_parallel", [1, 4])
def test_what_a_worker_takes_is_enough_for_it(
    monkeypatch: pytest.MonkeyPatch, n_parallel: int
) -> None:
    config = ChatConfig("smollm2", n_ctx=1024, n_parallel=n_parallel, n_batch=1024, n_threads=1)
    with Pool(chat=config) as pool:
        pool.chat("bee " * 900, max_tokens=2)
        resident = pool.status()["chat"].memory
    monkeypatch.setattr(memory, "available_memory", lambda: (resident, "the machine"))
    load_model(config, None).close()


def test_a_context_for_more_than_the_machine_is_refused_before_it_is_tried() -> None:
    with Pool(chat=ChatConfig("smollm2", n_ctx=1 << 24, n_parallel=1)) as pool:
        with pytest.raises(ModelLoadError, match=r"368,640 MiB for a context of 16777216 tokens"):
            pool.chat("Hello")


def files(monkeypatch: pytest.MonkeyPatch, contents: dict[str, str]) -> None:
    monkeypatch.setattr(memory, "_read", lambda path: contents.get(str(path), ""))


def test_the_narrowest_control_group_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    files(
        monkeypatch,
        {
            "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    8000 kB\n",
            "/proc/self/cgroup": "0::/outer/inner\n",
            "/sys/fs/cgroup/outer/inner/memory.max": "max\n",
            "/sys/fs/cgroup/outer/inner/memory.current": "1000\n",
            "/sys/fs/cgroup/outer/memory.max": "5000\n",
            "/sys/fs/cgroup/outer/memory.current": "4000\n",
            "/sys/fs/cgroup/outer/memory.stat": "anon 1500\nfile 2500\nshmem 300\n",
        },
    )
    assert available_memory() == (3200, "the control group")


def test_control_groups_of_version_1_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    files(
        monkeypatch,
        {
            "/proc/self/cgroup": "5:cpu:/a\n4:hugetlb,memory:/a\n",
            "/sys/fs/cgroup/memory/a/memory.limit_in_bytes": "700\n",
            "/sys/fs/cgroup/memory/a/memory.usage_in_bytes": "300\n",
            "/sys/fs/cgroup/memory/a/memory.stat": "total_cache 90\ntotal_shmem 20\n",
        },
    )
    assert available_memory() == (470, "the control group")


@pytest.mark.parametrize(("kind", "expected"), [("ext4", 9), ("tmpfs", 0)])
def test_files_that_lie_in_memory_take_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, expected: int
) -> None:
    parts = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    for path, text in zip(parts, ("four", "files"), strict=True):
        path.write_text(text)
    device = parts[0].stat().st_dev
    mount = f"31 23 {os.major(device)}:{os.minor(device)} / /models rw shared:1 - {kind} x rw\n"
    files(monkeypatch, {"/proc/self/mountinfo": mount})
    assert mapped_bytes(parts) == expected


def test_without_any_bound_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    files(monkeypatch, {})
    assert available_memory() is None
    require_memory(Gguf(TINY), n_bytes=1 << 60, n_ctx=1)


def test_a_limit_of_the_process_counts() -> None:
    script = (
        "import resource\n"
        "from inferpool.engine.memory import available_memory\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "print(*available_memory())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=30
    )
    count, where = done.stdout.split()
    assert where == "RLIMIT_AS"
    assert 0 < int(count) < 1 << 30
