"""Import the heavy libraries that are here, and say which they are; the last step of the Dockerfile.

python tools/check_image.py

PyTorch, Megatron-Core and this package have to be here. Transformer Engine and Apex may be absent, but not broken: one
that does not import ends this with its traceback. An image is built without a GPU, whose driver comes into the
container with it: a library that asks for the driver's as it is imported is named and passed over.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Sequence

REQUIRED = ("torch", "megatron.core", "megatron_tropd")
OPTIONAL = ("transformer_engine.pytorch", "apex")
DRIVER = "libcuda.so"


def state(module: str) -> str:
    """What there is of an optional module: its version, or why there is none. Raises what its import does."""
    package = module.split(".")[0]
    if importlib.util.find_spec(package) is None:
        return "not here"
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        if DRIVER not in str(error):
            raise
        return f"here, not imported: it needs the GPU's driver ({error})"
    return _version(package)


def _version(module: str) -> str:
    return getattr(importlib.import_module(module), "__version__", "imported, version unknown")


def main(arguments: Sequence[str] | None = None) -> None:
    """One line for each library."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    for module in REQUIRED:
        print(f"{module:<28}{_version(module)}")
    for module in OPTIONAL:
        print(f"{module:<28}{state(module)}")


if __name__ == "__main__":
    main()
