"""The Triton kernels compiled ahead of time for sm_90, without a GPU: the machine code that a large shard runs.

The budgets follow from the machine: an H200 executes about 27 instructions in the time that it reads one bf16 element
of each model, so a loop with fewer waits for memory. Triton brings the assembler and the disassembler.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_tropd.kernels import gradient, mixture, statistics
from megatron_tropd.kernels.tiles import tile_options

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {"rows": "*i64", "student_rows": "*i64", "teacher_rows": "*i64", "positions": "*i64", "ids": "*i64",
            "starts": "*i64", "logits": "*logits", "student": "*logits", "teacher": "*logits",
            "gradient": "*logits"}  # fmt: skip
NUMBERS = {"log_odds": "fp32", "log_rest": "fp32", "first_id": "i32"}
INTEGERS = ("stride", "student_stride", "teacher_stride", "gradient_stride", "num_valid", "num_columns")
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


class Machine:
    """One kernel's machine code, for shards whose addresses, sizes and row strides are multiples of 16, or not."""

    def __init__(
        self, kernel: Any, dtype: torch.dtype, *, num_warps: int = 4, aligned: bool = True, **constants: Any
    ) -> None:
        signature, attributes = {}, {}
        for place, name in enumerate(kernel.arg_names):
            signature[name] = _argument_type(name, constants, DTYPES[dtype])
            # What a launch finds out by itself.
            if aligned and name not in constants and name not in NUMBERS:
                attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
        self.cubin: bytes = compiled.asm["cubin"]
        self.elements_per_load = 16 // torch.empty(0, dtype=dtype).element_size()

    def inspect(self, folder: Path) -> None:
        """Disassemble."""
        file = folder / "kernel.cubin"
        file.write_bytes(self.cubin)
        self.usage = _output(TOOLS / "cuobjdump", "-res-usage", file)
        self.instructions, self.labels = _parse(_output(TOOLS / "nvdisasm", "-c", file))

    def resource(self, name: str) -> int:
        """Registers (REG), bytes of stack (STACK) or of local memory (LOCAL) per thread."""
        found = re.search(rf"{name}:(\d+)", self.usage)
        assert found is not None, self.usage
        return int(found[1])

    def streaming_loops(self) -> list[list[str]]:
        """Bodies of the loops that load 16 bytes at a time: from a label to the branch back to it."""
        bodies = []
        for end, instruction in enumerate(self.instructions):
            target = re.search(r"BRA.*`\((\.L\w+)\)", instruction)
            start = self.labels.get(target[1], end + 1) if target else end + 1
            if start <= end and any("LDG.E.128" in line for line in self.instructions[start:end]):
                bodies.append(self.instructions[start : end + 1])
        return bodies

    def cost(self, body: list[str], models: int) -> float:
        """Instructions per element of each model."""
        loads = sum("LDG.E.128" in line for line in body)
        return len(body) / (loads * self.elements_per_load / models)


def _argument_type(name: str, constants: dict[str, Any], logits: str) -> str:
    if name in constants:
        return "constexpr"
    if name in INTEGERS:
        return "i32"
    return NUMBERS.get(name) or POINTERS.get(name, "*fp32").replace("logits", logits)


def _output(*command: Any) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def _parse(disassembly: str) -> tuple[list[str], dict[str, int]]:
    instructions: list[str] = []
    labels = {}
    for line in disassembly.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        if instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    return instructions, labels


def tile(dtype: torch.dtype, steps: int) -> dict[str, int]:
    return tile_options(torch.empty(0, dtype=dtype), steps)


def dense(dtype: torch.dtype, *, teacher: bool, mixed: bool = False) -> dict[str, Any]:
    block = gradient.block_size(torch.empty(0, dtype=dtype))
    return {"TEACHER": teacher, "BY_POSITION": False, "MIXTURE": mixed, "BLOCK": block}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "models", "budget", "max_registers"),
    [
        # K1 reads its two models in two launches of one kernel: 18 for a pair.
        # The mixture's logarithm makes its two kernels wait for arithmetic, not memory: held to what they take.
        ("shard statistics", 1, 9, 64),
        ("pair statistics", 2, 26, 96),
        ("mixture statistics", 2, 64, 64),
        ("gradient", 1, 9, 40),
        ("gradient, teacher", 2, 22, 48),
        ("gradient, mixture", 2, 56, 48),
    ],
)
def test_streaming_kernels(
    tmp_path: Path, name: str, models: int, budget: float, max_registers: int, dtype: torch.dtype
) -> None:
    machine = {
        "shard statistics": lambda: Machine(statistics._shard_statistics, dtype, **tile(dtype, statistics.SHARD_STEPS)),
        "pair statistics": lambda: Machine(statistics._pair_statistics, dtype, **tile(dtype, statistics.PAIR_STEPS)),
        "mixture statistics": lambda: Machine(mixture._mixture_statistics, dtype, **tile(dtype, mixture.STEPS)),
        "gradient": lambda: Machine(gradient._dense, dtype, **dense(dtype, teacher=False)),
        "gradient, teacher": lambda: Machine(gradient._dense, dtype, **dense(dtype, teacher=True)),
        "gradient, mixture": lambda: Machine(gradient._dense, dtype, **dense(dtype, teacher=True, mixed=True)),
    }[name]()
    machine.inspect(tmp_path)
    assert machine.resource("STACK") == 0 and machine.resource("LOCAL") == 0
    assert machine.resource("REG") <= max_registers
    # The first streaming loop is the common path; a loop that also rereads for infinities comes later.
    body = machine.streaming_loops()[0]
    assert sum("LDG" in line for line in body) == sum("LDG.E.128" in line for line in body), "narrow loads"
    assert machine.cost(body, models) <= budget
    stores = [line for line in machine.instructions if "STG" in line]
    if name.startswith("gradient"):
        assert all("STG.E.128" in line for line in stores)
        # Two elements at once, rounded to nearest: F2FP without .RZ.
        packs = [line for line in body if "F2FP" in line]
        assert bool(packs) == (dtype == torch.bfloat16) and not any(".RZ" in line for line in packs)


def test_kernels_of_single_ids_do_not_spill(tmp_path: Path) -> None:
    constants = {"TEACHER": True, "BY_POSITION": True, "MIXTURE": True, "BLOCK": gradient.ENTRY_BLOCK}
    for machine in (
        Machine(gradient._entry_values, torch.bfloat16, num_warps=1, **constants),
        Machine(gradient._store_entries, torch.bfloat16, num_warps=1, BLOCK=gradient.ENTRY_BLOCK),
    ):
        machine.inspect(tmp_path)
        assert machine.resource("STACK") == 0 and machine.resource("LOCAL") == 0


def test_pieces_of_one_column_compile() -> None:
    """A launch replaces sizes and strides of 1 by constants; boundaries that differ by one id make such pieces."""
    dtype = torch.bfloat16
    one = {"num_valid": 1, "teacher_stride": 1}
    assert Machine(statistics._pair_statistics, dtype, **one, **tile(dtype, statistics.PAIR_STEPS)).cubin
    assert Machine(mixture._mixture_statistics, dtype, **one, **tile(dtype, mixture.STEPS)).cubin
    assert Machine(gradient._dense, dtype, **one, num_columns=1, **dense(dtype, teacher=True)).cubin


def test_the_search_for_wide_loads_can_fail(tmp_path: Path) -> None:
    dtype = torch.bfloat16
    machine = Machine(statistics._shard_statistics, dtype, aligned=False, **tile(dtype, statistics.SHARD_STEPS))
    machine.inspect(tmp_path)
    assert machine.streaming_loops() == []
