#!/bin/sh
# Print the path of a Python >= 3.12 that really runs; say on standard error which it is.
# Order: one on the PATH that has PyTorch (a container's), python3.12 and newer on the PATH, pyenv's versions, one that
# uv manages. 3.12 comes first: it is what is tested.
set -u

runs() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

take() {
    path=$("$1" -c 'import sys; print(sys.executable)')
    echo "using $path ($("$1" -c 'import platform; print(platform.python_version())'), $2)" >&2
    echo "$path"
    exit 0
}

has_torch() {
    "$1" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' >/dev/null 2>&1
}

on_path="python3.12 python3 python3.13 python3.14 python"
for name in $on_path; do
    runs "$name" && has_torch "$name" && take "$name" "on the PATH, has PyTorch"
done

for name in $on_path; do
    # A pyenv shim for a version that is not selected is found but does not run.
    runs "$name" && take "$name" "on the PATH"
done

for version in 3.12 3.13 3.14; do
    for candidate in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version"*/bin/python; do
        [ -x "$candidate" ] && runs "$candidate" && take "$candidate" "a pyenv version"
    done
done

if command -v uv >/dev/null 2>&1; then
    candidate=$(uv python find '>=3.12' 2>/dev/null || { uv python install 3.12 >&2 && uv python find '>=3.12'; })
    [ -n "$candidate" ] && runs "$candidate" && take "$candidate" "managed by uv"
fi

cat >&2 <<'MESSAGE'
No Python >= 3.12 found. Install one of:
  apt-get install python3.12 python3.12-venv   (Ubuntu 24.04, Debian 13 and newer)
  pyenv install 3.12                           (https://github.com/pyenv/pyenv)
  pip install uv && uv python install 3.12     (anywhere)
and run make again.
MESSAGE
exit 1
