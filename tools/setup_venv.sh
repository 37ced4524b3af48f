#!/bin/sh
# Make the virtual environment with what constraints.txt pins. Where the Python found already has PyTorch (an NGC
# container), the venv sees it and no other is installed: pip is held to the versions that are there.
set -eu

venv=${1:-.venv}
python=$(sh tools/find_python.sh)
# A container's own pip constraints are about its own packages, which stay as they are in any case.
export PIP_CONSTRAINT= PIP_DISABLE_PIP_VERSION_CHECK=1

pin() { # the pin of package $1: the version that is already there, else the tested one
    "$python" -c "from importlib.metadata import version; print('$1==' + version('$1'))" 2>/dev/null ||
        grep "^$1==" constraints.txt || true
}

rm -rf "$venv"
if "$python" -c 'import torch' 2>/dev/null; then
    echo "PyTorch is already here ($(pin torch)): the venv uses it" >&2
    "$python" -m venv --system-site-packages "$venv"
    held=$venv/constraints.txt
    grep -vE '^(torch|megatron-core|numpy)==' constraints.txt >"$held"
    for name in torch megatron-core numpy triton transformer-engine; do
        pin "$name" >>"$held"
    done
else
    "$python" -m venv "$venv"
    held=constraints.txt
    echo "installing PyTorch: about 5 GB with its CUDA libraries, some minutes" >&2
    "$venv/bin/python" -m pip install --quiet "$(pin torch)"
fi
echo "installing Megatron-Core and the package" >&2
"$venv/bin/python" -m pip install --quiet --constraint "$held" --editable '.[dev]'
"$venv/bin/python" - <<'CHECK'
import megatron.core, torch
import megatron_tropd
print(f"ready: megatron-tropd {megatron_tropd.__version__}, megatron-core {megatron.core.__version__}, torch {torch.__version__}")
CHECK
