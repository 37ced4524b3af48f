"""Convert between Hugging Face folders and the Megatron checkpoints of this package, both ways, on the CPU.

    python tools/convert_checkpoint.py hf-to-megatron --hf DIR --out DIR [--tp N --pp N --ep N]
    python tools/convert_checkpoint.py megatron-to-hf --megatron DIR --out DIR --hf DIR [--tp N --pp N --ep N]

The ranks that share the work are started by the script itself (tp x pp x ep of them, each with its part of the model).
A Megatron checkpoint loads in any other layout, so the sizes here are a matter of speed alone: a model goes through
layer by layer, and no rank holds more than its part of one or the shard that it writes. Started again after a kill,
with the same sizes, an import continues with the layers that it has written, an export with the shards.

`--backend bridge` hands the work to Megatron-Bridge, where it is installed, for families this package does not carry.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(arguments: list[str]) -> int:
    """Convert; returns the exit status (2 for what a user has to correct)."""
    from megatron_tropd.console import tell_once

    options = _parse(arguments)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    try:
        if options.backend == "bridge":
            _convert_with_bridge(options)
            return 0
        # Nothing is computed, and a checkpoint has the same names wherever it is written: GPUs are not needed.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        _check(options)
        if "RANK" in os.environ or _num_ranks(options) == 1:
            options.convert(options)
            return 0
    except ValueError as error:
        if not type(error).__module__.startswith("megatron_tropd") and type(error) is not ValueError:
            raise
        tell_once(f"error: {error}")
        return 2
    return _start_ranks(_num_ranks(options), arguments)


def _start_ranks(num_ranks: int, arguments: list[str]) -> int:
    """This script on ``num_ranks`` ranks of torchrun; returns the exit status of the first that failed, else 0."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.disable()  # torchrun's report on a rank that has already said what is wrong
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(["--standalone", f"--nproc-per-node={num_ranks}", __file__, *arguments])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


def hf_to_megatron(options: argparse.Namespace) -> None:
    """Read a Hugging Face folder and write a checkpoint that ``student.load`` and ``teacher.load`` accept."""
    from megatron_tropd.checkpoint import Description
    from megatron_tropd.config import architecture
    from megatron_tropd.hf_config import HuggingFaceError, model_config, read_config
    from megatron_tropd.hf_files import TensorFiles
    from megatron_tropd.tokenizer import HuggingFaceTokenizer

    started = time.perf_counter()
    config = model_config(read_config(options.hf))
    tokenizer = HuggingFaceTokenizer(options.hf)
    assert config.vocab_size is not None  # model_config gives every size
    if tokenizer.vocab_size > config.vocab_size:
        raise HuggingFaceError(
            f"{options.hf}: the tokenizer has {tokenizer.vocab_size} ids, the embedding only {config.vocab_size} rows: "
            "the tokenizer is of another model"
        )
    description = Description(0, 0, config.vocab_size, tokenizer.fingerprint, architecture(config))

    def convert(layout: Any) -> Any:
        from megatron_tropd.hf_import import import_huggingface

        return import_huggingface(options.hf, options.out, layout, config, description, progress=True)

    _on_ranks(options, config, TensorFiles(options.hf).dtype(), convert, started)


def megatron_to_hf(options: argparse.Namespace) -> None:
    """Read a checkpoint of a run, or a converted one, and write a folder that ``transformers`` loads.

    LoRA adapters are added to their base, which is read from where it was.
    """
    from megatron_tropd.checkpoint import read_description, resolve, weights_dtype, weights_reader
    from megatron_tropd.config import ModelConfig
    from megatron_tropd.hf_config import config_values, read_config

    started = time.perf_counter()
    path = resolve(options.megatron)
    description = read_description(path)
    config = ModelConfig(**description.architecture)
    # What the reference cannot express is told now, not after gigabytes have been read.
    config_values(config, read_config(options.hf), vocab_size=description.vocab_size, dtype="float32")

    dtype = weights_dtype(path)

    def convert(layout: Any) -> Any:
        from megatron_tropd.hf_export import export_huggingface
        from megatron_tropd.integrity import digest
        from megatron_tropd.models import build_model, build_without_weights
        from megatron_tropd.weights import load_weights_of

        sizes: dict[str, Any] = {"vocab_size": description.vocab_size}
        if description.adapter:
            load = None
            model = build_model(config, layout, **sizes, max_sequence_length=1, dtype=dtype, seed=None)
            load_weights_of(path, model, layout, config, **sizes, tokenizer=description.tokenizer)
        else:
            model = build_without_weights(config, layout, **sizes, dtype=dtype)
            load = weights_reader(path, model, config, **sizes, tokenizer=description.tokenizer)
        return export_huggingface(
            model, layout, config, options.out, options.hf, **sizes, progress=True, source=digest(path), load=load
        )

    _on_ranks(options, config, dtype, convert, started)


def _on_ranks(
    options: argparse.Namespace,
    config: Any,
    dtype: Any,
    convert: Callable[[Any], Any],
    started: float,
) -> None:
    """Start the process groups, convert, and report."""
    from megatron_tropd import distributed
    from megatron_tropd.config_parallel import ParallelConfig

    _check_layout(options, config, distributed.world_size())
    layout = distributed.initialize(
        tensor_model_parallel_size=options.tp,
        pipeline_model_parallel_size=options.pp,
        expert_model_parallel_size=options.ep,
        seed=0,
        timeout_minutes=ParallelConfig().distributed_timeout_minutes,
    )
    try:
        transfer = convert(layout)
        if layout.is_main:
            seconds = time.perf_counter() - started
            print(
                f"{transfer.num_tensors} tensors, {transfer.num_bytes / 1e6:,.1f} MB of {str(dtype)[6:]} in "
                f"{seconds:.1f} s, none left over: {options.out}"
            )
    finally:
        distributed.finish(layout)


def _convert_with_bridge(options: argparse.Namespace) -> None:
    from megatron_tropd.bridge import export_checkpoint, import_checkpoint

    if _num_ranks(options) != 1:
        raise ValueError("--backend bridge converts in one process: leave out --tp, --pp and --ep")
    _refuse_existing(options.out)
    if options.convert is hf_to_megatron:
        import_checkpoint(options.hf, options.out)
    else:
        export_checkpoint(options.megatron, options.hf, options.out)


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise ValueError(f"the output folder {out} exists: remove it or give another")


def _num_ranks(options: argparse.Namespace) -> int:
    sizes = {"--tp": options.tp, "--pp": options.pp, "--ep": options.ep}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, found {size}")
    return math.prod(sizes.values())


def _check(options: argparse.Namespace) -> None:
    """What needs neither ranks nor the checkpoint: refused before any rank starts."""
    from megatron_tropd.hf_config import is_huggingface, model_config, read_config

    _refuse_existing(options.out)
    config = model_config(read_config(options.hf))
    if options.convert is hf_to_megatron:
        _check_layout(options, config, _num_ranks(options))
    elif is_huggingface(options.megatron):
        raise ValueError(f"--megatron {options.megatron} is a Hugging Face folder: give a checkpoint of this package")


def _check_layout(options: argparse.Namespace, config: Any, world_size: int) -> None:
    from megatron_tropd.config import Config, DataConfig
    from megatron_tropd.config_checks import validate
    from megatron_tropd.config_parallel import ParallelConfig

    # The checks of a model against a layout are those of a run that only reads it.
    data, parallel = DataConfig(train="", validation=""), ParallelConfig(options.tp, options.pp)
    validate(Config(student=config, data=data, output_dir="", parallel=parallel), world_size, "evaluate")
    experts = config.num_moe_experts
    if options.ep > 1 and (experts is None or experts % options.ep):
        raise ValueError(
            f"--ep {options.ep} does not divide the {experts} experts of a layer: choose a size that does"
            if experts
            else f"--ep {options.ep} is for models with experts, and this one is dense: leave it out"
        )


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="hf-to-megatron | megatron-to-hf")
    reading = commands.add_parser("hf-to-megatron", help=hf_to_megatron.__doc__)
    reading.set_defaults(convert=hf_to_megatron)
    folder: dict[str, Any] = {"type": Path, "required": True, "metavar": "DIR"}
    reading.add_argument("--hf", **folder, help="folder with config.json, safetensors and tokenizer")
    writing = commands.add_parser("megatron-to-hf", help=megatron_to_hf.__doc__)
    writing.set_defaults(convert=megatron_to_hf)
    writing.add_argument("--megatron", **folder, help="a checkpoint, or a folder that holds some: the newest")
    writing.add_argument(
        "--hf", **folder, help="a folder of the same family, for config.json, generation config and tokenizer"
    )
    number: dict[str, Any] = {"type": int, "default": 1, "metavar": "N"}
    for command in (reading, writing):
        command.add_argument("--out", **folder, help="the folder to write; must not exist")
        command.add_argument("--tp", **number, help="tensor-parallel ranks that share the work (default: 1)")
        command.add_argument("--pp", **number, help="pipeline stages that share the work (default: 1)")
        command.add_argument("--ep", **number, help="ranks that share the experts (default: 1)")
        command.add_argument("--backend", choices=["native", "bridge"], default="native", help="default: native")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
