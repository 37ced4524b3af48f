"""Write the study's second task, chains of sums worked out on a scratchpad, as training and validation prompts.

A line is {"prompt": "38+47-25+61=", "answer": "121", "solution": "38+47=85;85-25=60;60+61=121"}. The verifier `number`
takes the last number of a response, so intermediate results may be wrong where the last is right. Validation holds no
chain of the training file.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from examples.addition.make_data import write_sums


def make_chains(num_terms: int, digits: int, count: int, seed: int) -> list[dict[str, str]]:
    """``count`` different chains of ``num_terms`` numbers of at most ``digits`` digits, as {"prompt", ...}.

    Raises ValueError where there are not that many.
    """
    num_numbers = 10**digits
    num_chains = num_numbers**num_terms * 2 ** (num_terms - 1)
    if count > num_chains:
        raise ValueError(f"{count} chains asked for, but there are only {num_chains}: more --terms or --digits")
    generator = random.Random(seed)
    chains: dict[str, dict[str, str]] = {}
    while len(chains) < count:
        total, *terms = (generator.randrange(num_numbers) for _ in range(num_terms))
        prompt, steps = str(total), []
        for term in terms:
            sign = generator.choice("+-")
            result = total + term if sign == "+" else total - term
            prompt += f"{sign}{term}"
            steps.append(f"{total}{sign}{term}={result}")
            total = result
        chains[prompt] = {"prompt": f"{prompt}=", "answer": str(total), "solution": ";".join(steps)}
    return list(chains.values())


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and write OUT/train.jsonl and OUT/validation.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--terms", type=int, default=4, help="numbers in a chain (default: 4)")
    parser.add_argument("--digits", type=int, default=2, help="most digits of a number (default: 2)")
    parser.add_argument("--num-train", type=int, default=50_000, help="training chains (default: 50000)")
    parser.add_argument("--num-validation", type=int, default=1_000, help="held-out chains (default: 1000)")
    parser.add_argument("--seed", type=int, default=1234, help="which chains are drawn (default: 1234)")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and validation.jsonl")
    options = parser.parse_args(arguments)
    if options.terms < 2 or min(options.digits, options.num_train, options.num_validation) < 1:
        parser.error("--terms must be at least 2; --digits, --num-train and --num-validation at least 1")
    try:
        chains = make_chains(options.terms, options.digits, options.num_train + options.num_validation, options.seed)
    except ValueError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    # The held-out chains come first, so that they stay the same when more training chains are asked for.
    write_sums(options.out / "validation.jsonl", chains[: options.num_validation])
    write_sums(options.out / "train.jsonl", chains[options.num_validation :])
    print(f"wrote {options.num_train} training and {options.num_validation} held-out chains to {options.out}")


if __name__ == "__main__":
    main()
