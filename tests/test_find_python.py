"""tools/find_python.sh: the Python that `make` takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "tools" / "find_python.sh"


def find(tmp_path: Path, **programs: str) -> subprocess.CompletedProcess[str]:
    """Run the script with nothing on the PATH but ``programs`` (name: shell script) and an empty home."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name, script in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": str(folder), "HOME": str(tmp_path), "PYENV_ROOT": str(tmp_path / "pyenv")}
    return subprocess.run(["/bin/sh", SCRIPT], env=environment, capture_output=True, text=True, check=False)


def test_a_shim_that_does_not_run_and_an_old_python_are_passed_over(tmp_path: Path) -> None:
    real = f'exec {sys.executable} "$@"'
    shim = {"python3.12": "echo 'pyenv: python3.12: command not found' >&2; exit 127", "python3": "exit 1"}
    found = find(tmp_path, **shim, **{"python3.13": real})
    assert found.returncode == 0
    assert os.path.samefile(found.stdout.strip(), sys.executable)
    assert "using" in found.stderr and "on the PATH" in found.stderr


def test_a_python_that_has_torch_is_preferred(tmp_path: Path) -> None:
    bare = f'case "$2" in *find_spec*) exit 1;; esac; exec {sys.executable} "$@"'
    with_torch = f'case "$2" in *executable*) echo /container/python;; *) exec {sys.executable} "$@";; esac'
    found = find(tmp_path, **{"python3.12": bare, "python3": with_torch})
    assert found.stdout.strip() == "/container/python" and "has PyTorch" in found.stderr
    (tmp_path / "bin" / "python3").unlink()
    assert "on the PATH)" in find(tmp_path, **{"python3.12": bare}).stderr


def test_a_pyenv_version_is_taken_when_the_path_has_none(tmp_path: Path) -> None:
    version = tmp_path / "pyenv" / "versions" / "3.12.1" / "bin"
    version.mkdir(parents=True)
    (version / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (version / "python").chmod(0o755)
    found = find(tmp_path)
    assert found.returncode == 0 and "a pyenv version" in found.stderr


def test_without_any_it_says_what_to_install(tmp_path: Path) -> None:
    found = find(tmp_path, cat="exec /bin/cat")
    assert found.returncode == 1 and found.stdout == ""
    assert "No Python >= 3.12 found. Install one of" in found.stderr


def test_a_python_that_uv_manages_is_the_last_resort(tmp_path: Path) -> None:
    managed = tmp_path / "managed-python"
    managed.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    managed.chmod(0o755)
    found = find(tmp_path, uv=f'[ "$2" = find ] && echo {managed}')
    assert found.returncode == 0 and "managed by uv" in found.stderr
