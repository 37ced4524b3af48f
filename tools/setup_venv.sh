#!/bin/sh
# Make the virtual environment with what constraints.txt pins. Where the Python found already has PyTorch (an NGC
# container), the venv sees it and no other is installed: pip is held to the versions that are there.
set -eu

venv=${1:-.venv}
# Not from the venv itself, which may be activated.
PATH=$(printf %s "$PATH" | sed "s#$PWD/$venv/bin:##g")
python=$(sh tools/find_python.sh)
# A container's own pip constraints are about its own packages, which stay as they are in any case.
export PIP_CONSTRAINT='' PIP_DISABLE_PIP_VERSION_CHECK=1

pin() { # the pin of package $1: the version that is already there, else the tested one
    "$python" -c "from importlib.metadata import version; print('$1==' + version('$1'))" 2>/dev/null ||
        grep "^$1==" constraints.txt || true
}

install() { # pip, quiet unless it fails: its last lines say which versions conflict
    "$venv/bin/python" -m pip install "$@" >"$venv/setup.log" 2>&1 || {
        tail -n 20 "$venv/setup.log" >&2
        echo "set-up failed; the whole log is $venv/setup.log" >&2
        exit 1
    }
}

if "$python" -c 'import torch' 2>/dev/null; then
    echo "PyTorch is already here ($(pin torch)): the venv uses it" >&2
    rm -rf "$venv"
    "$python" -m venv --system-site-packages "$venv"
    # Where that Python lives in a venv itself (NeMo's container: /opt/venv), the system's packages are not yet its own.
    "$python" - "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" <<'PARENT'
import site, sys
if sys.prefix != sys.base_prefix:
    lines = [f"import site; site.addsitedir({folder!r})\n" for folder in site.getsitepackages([sys.prefix])]
    open(f"{sys.argv[1]}/parent_environment.pth", "w").writelines(lines)
PARENT
    held=$venv/constraints.txt
    grep -vE '^(torch|megatron-core|numpy)==' constraints.txt >"$held"
    for name in torch megatron-core numpy triton transformer-engine; do
        pin "$name" >>"$held"
    done
else
    held=constraints.txt
    installed=$("$venv/bin/python" -c 'import torch; from importlib.metadata import version as v; print("torch==" + v("torch"))' 2>/dev/null || true)
    if [ "$installed" != "$(pin torch)" ]; then
        rm -rf "$venv"
        "$python" -m venv "$venv"
        echo "installing PyTorch: about 5 GB with its CUDA libraries, some minutes" >&2
        install "$(pin torch)"
    fi
fi
echo "installing Megatron-Core and the package" >&2
install --constraint "$held" --editable '.[dev]'
"$venv/bin/python" -W ignore - <<'CHECK'
import megatron.core, torch
import megatron_tropd
print(f"ready: megatron-tropd {megatron_tropd.__version__}, megatron-core {megatron.core.__version__}, torch {torch.__version__}")
CHECK
