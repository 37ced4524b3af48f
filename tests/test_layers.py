"""Modules import downward only, files stay small, and reading a config does not load torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "megatron_tropd"
LEVELS = [
    {
        "answer_index",
        "config_data",
        "config_lora",
        "config_parallel",
        "config_rollout",
        "config_tasks",
        "config_teacher",
        "config_watch",
        "prompt",
    },
    {
        "config",
        "console",
        "determinism",
        "draws",
        "estimators",
        "jsonl",
        "kernels",
        "loss_report",
        "messages",
        "profiler",
        "redaction",
        "report",
        "report_html",
        "sandbox",
        "tokenizer",
        "types",
    },
    {
        "answers",
        "config_parser",
        "config_require",
        "cpu",
        "decode_graphs",
        "guard",
        "hf_config",
        "hf_mapping",
        "indexed",
        "integrity",
        "journal",
        "objectives",
        "packing",
        "procedural",
        "race",
        "rollout_requests",
        "sampling",
        "selection",
        "sides",
        "special_tokens",
        "tiktoken_tokenizer",
        "trajectories",
        "trackers",
    },
    {
        "answer_shards",
        "batch",
        "config_context",
        "config_data_checks",
        "config_drift",
        "config_layout_checks",
        "config_lora_checks",
        "config_model_checks",
        "config_rollout_checks",
        "config_sides",
        "indexed_prompts",
        "relabel",
        "rollout_records",
        "tokenizer_agreement",
        "verify",
    },
    {"engine_choice"},
    {
        "bridge",
        "config_checks",
        "distributed",
        "prompt_lines",
        "tokenizer_builder",
        "guidance",
        "hf_files",
        "task_reward",
        "vocab_parallel",
    },
    {"attention", "experts", "lockstep", "paged_attention"},
    {"layer_spec"},
    {"data", "huggingface", "metrics", "models", "phases", "planner"},
    {"dynamic_engine", "lora", "static_engine"},
    {"pair"},
    {"teacher_pass"},
    {
        "ahead",
        "apart",
        "hf_export",
        "hf_peft",
        "mixture",
        "monitor",
        "optimization",
        "replicas",
        "rollout",
        "sample_scores",
        "token_log",
        "watchdog",
        "weight_gather",
        "writing",
    },
    {"checkpoint_pieces", "exports", "preprocessing", "prompt_sources", "refit", "teachers", "training_requests"},
    {"partial", "step"},
    {"checkpoint", "one_step_off", "rollout_source"},
    {"megatron_lm"},
    {"hf_import", "weights"},
    {"run"},
    {"building"},
    {"engines", "generator"},
    {"evaluate", "generate"},
    {"dry_run", "trainer"},
    {"__main__"},
]
"""Every module of the package; each imports only from the rows above its own."""
LEVEL_OF = {module: level for level, modules in enumerate(LEVELS) for module in modules}
MAX_LINES = 400


def imports_of(path: Path) -> set[str]:
    """Top-level modules of the package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "megatron_tropd" and len(parts) > 1 and parts[1] in LEVEL_OF:
                found.add(parts[1])
    return found


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_has_a_level() -> None:
    modules = {module_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert modules == set(LEVEL_OF)


def test_modules_import_only_from_lower_levels() -> None:
    upward = [
        f"{path.relative_to(PACKAGE)} imports {other}"
        for path in PACKAGE.rglob("*.py")
        if (module := module_of(path)) != "__init__"
        for other in imports_of(path) - {module}
        if LEVEL_OF[other] >= LEVEL_OF[module]
    ]
    assert not upward


def test_rollout_and_step_meet_only_through_types() -> None:
    assert "step" not in imports_of(PACKAGE / "rollout.py") | imports_of(PACKAGE / "static_engine.py")
    assert "rollout" not in imports_of(PACKAGE / "step.py")


def test_files_stay_small() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}


def test_help_does_not_load_torch() -> None:
    code = (
        "import sys; from megatron_tropd.__main__ import main; status = main(['train', '--help']);"
        "sys.exit(status or int('torch' in sys.modules))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False
    )
    assert finished.returncode == 0
    assert "--student.num_layers" in finished.stdout and "Number of transformer layers." in finished.stdout
