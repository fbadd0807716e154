"""Rules of the source tree that no linter checks, or that must hold without one."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "inferpool"

PUBLIC_MODULES = [
    "inferpool",
    "inferpool.chat_messages",
    "inferpool.config",
    "inferpool.errors",
    "inferpool.messages",
    "inferpool.testing",
    "inferpool.worker",
]

# Decoders that run code, or that crash on foreign bytes.
FORBIDDEN_IMPORT = r"^\s*(?:import|from)\s+(?:_?pickle|cloudpickle|dill|marshal|shelve)\b"
FORBIDDEN_CALL = r"(?<![\w.])(?:eval|exec)\(|allow_pickle\s*=\s*True"
FORBIDDEN_CRATE = r"\bserde_pickle\b|\.import\(\s*\"(?:_?pickle|marshal)\""


def _sources(*patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def _modules() -> list[Path]:
    return _sources("python/inferpool/**/*.py")


@pytest.mark.parametrize(
    ("pattern", "globs"),
    [
        (FORBIDDEN_IMPORT, ["python/**/*.py"]),
        (FORBIDDEN_CALL, ["python/**/*.py"]),
        (FORBIDDEN_CRATE, ["rust/*/Cargo.toml", "rust/*/src/**/*.rs"]),
    ],
    ids=["imports", "calls", "crates"],
)
def test_nothing_decodes_by_running_code(pattern: str, globs: list[str]) -> None:
    sources = _sources(*globs)
    assert sources
    found = [
        f"{path.relative_to(ROOT)}: {match.group().strip()}"
        for path in sources
        for match in re.finditer(pattern, path.read_text(), re.MULTILINE)
    ]
    assert found == []


def test_import_contracts_hold() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    command = [lint, "--no-cache", "--no-logo"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_no_module_imports_the_root_package() -> None:
    """The root package pulls in the host, so a worker that imports from it would too."""
    submodules = {path.stem for path in PACKAGE.iterdir() if path.suffix in {"", ".py", ".pyi"}}
    found = []
    for path in _modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name == "inferpool"]
            elif isinstance(node, ast.ImportFrom) and node.module == "inferpool":
                names = [alias.name for alias in node.names if alias.name not in submodules]
            else:
                continue
            found += [f"{path.relative_to(ROOT)}:{node.lineno}: {name}" for name in names]
    assert found == []


def test_import_is_light_and_free_of_worker_code() -> None:
    heavy = ["click", "gguf", "jinja2", "llama_cpp", "rich", "safetensors"]
    worker_side = ["inferpool.engine", "inferpool.roles", "inferpool.worker"]
    script = (
        f"import sys, inferpool; print(*[m for m in {heavy + worker_side} if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_dunder_all_is_true(name: str) -> None:
    module = importlib.import_module(name)
    listed = module.__all__
    assert [entry for entry in listed if not hasattr(module, entry)] == []
    assert sorted(set(listed)) == sorted(listed), "a name is listed twice"
    assert _own_public_names(module) - set(listed) == set()


@pytest.mark.parametrize("name", ["inferpool", "inferpool.worker"])
def test_a_name_that_is_not_there_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=f"{name!r} has no attribute 'nothing'"):
        _ = importlib.import_module(name).nothing


def _own_public_names(module: ModuleType) -> set[str]:
    """What a module defines or, for a package, also gathers from its own submodules."""
    prefix = module.__name__ + "." if hasattr(module, "__path__") else None

    def own(value: object) -> bool:
        origin = getattr(value, "__module__", None) or ""
        return origin == module.__name__ or bool(prefix and origin.startswith(prefix))

    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and own(value)
    }
