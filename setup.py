"""Packaging. Ranges stand here; the versions that were tested stand in constraints.txt, which `make setup` applies.

transformer-engine and NVIDIA's Apex are accelerators that the containers carry; the package uses them where they work
and never requires them. Apex is not even an extra: the registry's project of that name is an unrelated web toolkit
whose mere presence breaks Megatron.
"""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron-tropd",
    version="0.1.0",
    description="Trust Region On-Policy Distillation (TrOPD) on Megatron-Core",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_tropd", "megatron_tropd.*"]),
    package_data={"megatron_tropd": ["py.typed"]},
    python_requires=">=3.12",
    install_requires=[
        "torch>=2.11",
        "megatron-core>=0.19.1",
        "jsonargparse[signatures]>=4.53",
        "matplotlib>=3.8",
        "numpy>=2",
        "psutil>=5.9",  # Megatron's checkpoint writer imports it without declaring it
        "pyyaml>=6",
        "rich>=13",
        "tensorboard>=2.16",
        "tqdm>=4.66",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]>=2.0"],
        "data": ["datasets>=3", "nltk>=3.9", "pyarrow>=17", "sentencepiece>=0.2", "tiktoken>=0.8"],
        "hf": ["safetensors>=0.5", "tokenizers>=0.21", "transformers>=4.51"],
        "mlflow": ["mlflow-skinny>=3"],
        "wandb": ["wandb>=0.20"],
        # The verifier `math` (with the ANTLR runtime its parser is generated for).
        "eval": ["math-verify>=0.8", "antlr4-python3-runtime==4.13.2"],
        # Procedural tasks. Not in `dev`: one of its dependencies (pycosat) is compiled where it is installed.
        "tasks": ["reasoning-gym>=0.1.20"],
        # The intervals over seeds of examples/study.
        "study": ["scipy>=1.13"],
        # What tools/bench_loss.py measures beside ours. Give pip -c constraints.txt, so that nothing replaces torch.
        "bench": ["liger-kernel>=0.8", "nvidia-modelopt>=0.47", "requests", "trl>=1.16"],
        "dev": [
            "antlr4-python3-runtime==4.13.2",
            "datasets",
            "hypothesis",
            "math-verify",
            "mypy",
            "nltk",
            "peft",
            "pyarrow",
            "pytest",
            "pytest-timeout",
            "ruff",
            "safetensors",
            "scipy",
            "sentencepiece",
            "tiktoken",
            "tokenizers",
            "transformers",
            "types-psutil",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
)
