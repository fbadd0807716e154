"""The wheel works by itself: installed in a clean environment, away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Holds the time of a build from scratch.
pytestmark = pytest.mark.timeout(900)

ROLE = """
class Session:
    def close(self):
        pass


def make_session(role_config, abort):
    return Session()


def echo(reply, payload, state):
    reply.send("echo", payload)


HANDLERS = {"echo": echo}
"""

HOST = """
import sys
from pathlib import Path

import inferpool
import numpy as np
from inferpool import Pool, Role

assert Path(inferpool.__file__).is_relative_to(sys.prefix), inferpool.__file__

array = np.arange(6, dtype=np.float32).reshape(2, 3)
role = Role(session="echo_role:make_session", handlers="echo_role:HANDLERS")
with Pool(echo=role) as pool:
    answer = pool.call("echo", "echo", {"array": array, "raw": b"bytes"}, timeout=60)
assert answer["raw"] == b"bytes"
assert answer["array"].dtype == np.float32
assert np.array_equal(answer["array"], array)
print("ok")
"""


def _run(*command: str | Path, cwd: Path = ROOT) -> str:
    # A checkout or a coverage run must not reach into the clean environment.
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != "PYTHONPATH" and not name.startswith("COVERAGE")
    }
    result = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    maturin = Path(sys.executable).with_name("maturin")
    _run(maturin, "build", "--release", "--interpreter", sys.executable, "--out", out)
    (wheel,) = out.glob("*.whl")
    return wheel


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "inferpool/_transport.abi3.so" in names
    assert "inferpool/_transport.pyi" in names
    assert "inferpool/py.typed" in names
    roots = {name.split("/")[0] for name in names}
    assert roots == {"inferpool", wheel.name.partition("-cp")[0] + ".dist-info"}


def test_custom_role_works_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    clean = tmp_path / "clean"
    _run(sys.executable, "-m", "venv", "--without-pip", clean)
    python = clean / "bin" / "python"
    _run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel)
    # The dependencies come from the environment of the tests. A path that a .pth file adds is
    # searched last, and the .pth files in it (the editable install of the checkout) are ignored.
    where = _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(where, "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")

    work = tmp_path / "work"
    work.mkdir()
    (work / "echo_role.py").write_text(ROLE)
    (work / "host.py").write_text(HOST)
    assert _run(python, "host.py", cwd=work) == "ok\n"
