"""Write the demo's task, sums of two numbers character by character, as training and validation prompts.

A line is {"prompt": "0047+9985=", "answer": "23001"}: both numbers have the same number of digits, padded
with zeros; the answer, one digit longer, is written least significant digit first, the order in which a sum
is worked out (47 + 9985 = 10032). Pairs are drawn without replacement and without regard to order, so
validation holds neither a sum of the training file nor one with its numbers exchanged.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path


def make_sums(digits: int, count: int, seed: int) -> list[dict[str, str]]:
    """``count`` different sums of ``digits``-digit numbers, as {"prompt", "answer"}.

    Raises ValueError where there are not that many.
    """
    num_numbers = 10**digits
    num_pairs = num_numbers * (num_numbers + 1) // 2
    if count > num_pairs:
        raise ValueError(
            f"{count} sums asked for, but {digits} digits give only {num_pairs}: ask for fewer or more digits"
        )
    generator = random.Random(seed)
    sums: list[dict[str, str]] = []
    drawn: set[tuple[int, int]] = set()
    while len(sums) < count:
        a, b = generator.randrange(num_numbers), generator.randrange(num_numbers)
        if (min(a, b), max(a, b)) not in drawn:
            drawn.add((min(a, b), max(a, b)))
            sums.append({"prompt": f"{a:0{digits}}+{b:0{digits}}=", "answer": f"{a + b:0{digits + 1}}"[::-1]})
    return sums


def write_sums(path: Path, sums: Sequence[dict[str, str]]) -> None:
    """One JSON object a line (of the study's chains too)."""
    path.write_text("".join(json.dumps(line) + "\n" for line in sums), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and write OUT/train.jsonl and OUT/validation.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=int, default=4, help="digits of each number (default: 4)")
    parser.add_argument("--num-train", type=int, default=50_000, help="training sums (default: 50000)")
    parser.add_argument("--num-validation", type=int, default=1_000, help="held-out sums (default: 1000)")
    parser.add_argument("--seed", type=int, default=1234, help="which sums are drawn (default: 1234)")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and validation.jsonl")
    options = parser.parse_args(arguments)
    if min(options.digits, options.num_train, options.num_validation) < 1:
        parser.error("--digits, --num-train and --num-validation must be at least 1")
    try:
        sums = make_sums(options.digits, options.num_train + options.num_validation, options.seed)
    except ValueError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    # The held-out sums come first, so that they stay the same when more training sums are asked for.
    write_sums(options.out / "validation.jsonl", sums[: options.num_validation])
    write_sums(options.out / "train.jsonl", sums[options.num_validation :])
    print(f"wrote {options.num_train} training and {options.num_validation} held-out sums to {options.out}")


if __name__ == "__main__":
    main()
