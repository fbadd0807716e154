"""The README's examples run, and its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from inferpool.cli import main

ROOT = Path(__file__).parents[1]

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = "".join(code for language, code in BLOCKS if language in {"bash", "console"})

# A block whose first line names a file, such as `# mypkg/echo.py`, is that file.
FILE_NAME = re.compile(r"# ([\w/]+\.py)\b")
FILES = {match.group(1): code for code in PYTHON if (match := FILE_NAME.match(code))}
PROGRAMS = [code for code in PYTHON if not FILE_NAME.match(code)]


def _commands(program: str) -> list[str]:
    """The first argument of each call of a program in the shell blocks."""
    return re.findall(rf"^(?:\$ )?(?:\S*/)?{program} ([\w-]+)", SHELL, re.MULTILINE)


def test_readme_has_examples() -> None:
    assert PROGRAMS
    assert _commands("make")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("code", PROGRAMS, ids=map(str, range(len(PROGRAMS))))
def test_python_block_runs(code: str, tmp_path: Path) -> None:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    command = [sys.executable, "-W", "error", "-"]
    result = subprocess.run(
        command, input=code, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(_commands("make")) <= targets


def test_cli_commands_exist() -> None:
    commands = {name for name in _commands("inferpool") if not name.startswith("-")}
    assert commands <= set(main.commands)


def test_the_command_is_installed() -> None:
    program = Path(sys.executable).with_name("inferpool")
    result = subprocess.run([program, "--help"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("Usage: inferpool")
    assert result.stderr == ""
