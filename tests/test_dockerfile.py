"""What the Dockerfile says of itself, as far as it shows without building it; its last check, on libraries made up."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tools import check_image

REPOSITORY = Path(__file__).resolve().parent.parent
BASE_IMAGE_HAS = {"torch", "triton", "numpy", "transformer-engine", "megatron-core", "apex"}


def _instructions() -> list[tuple[str, str]]:
    """(Instruction, its arguments), lines joined, comments left out."""
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def test_every_base_image_has_a_tag_and_the_gpu_stage_is_the_default() -> None:
    instructions = _instructions()
    defaults = dict(rest.split("=", 1) for name, rest in instructions if name == "ARG")
    stages: dict[str, str] = {}
    for _, rest in (entry for entry in instructions if entry[0] == "FROM"):
        image, stage = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()  # type: ignore[union-attr]
        image = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], image)
        assert image in stages or re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", image), f"{image} has no pinned tag"
        stages[stage] = image
    assert list(stages) == ["cpu", "test", "gpu"] and stages["test"] == "cpu"
    assert ("FROM", "${BASE} AS gpu") in instructions and stages["gpu"] == defaults["BASE"]


def test_what_is_copied_and_run_is_there() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").split()
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for name, rest in _instructions():
        if name in ("COPY", "ADD"):
            *sources, _ = [word for word in rest.split() if not word.startswith("--")]
            assert sources and all((REPOSITORY / source).exists() for source in sources), rest
        if name == "RUN":
            for goals in re.findall(r"^make ([a-z ]+)$", rest):
                assert set(goals.split()) <= set(targets)
            for script in re.findall(r"python (\S+\.py)", rest):
                assert (REPOSITORY / script).exists() and script.split("/")[0] not in ignored


def test_nothing_that_the_base_image_has_is_installed() -> None:
    commands = " ".join(rest for name, rest in _instructions() if name == "RUN")
    assert "pip" not in commands, "`make setup` installs, and it alone"
    setup = (REPOSITORY / "tools" / "setup_venv.sh").read_text(encoding="utf-8")
    (held,) = re.findall(r"for name in ([\w -]+); do\n\s*pin", setup)
    assert set(held.split()) == BASE_IMAGE_HAS - {"apex"}, "pip is held to the image's versions"
    pins = re.findall(r"^([\w-]+)==", (REPOSITORY / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    dropped = re.findall(r"grep -vE '\^\(([\w|-]+)\)=='", setup)[0].split("|")
    assert set(pins) & BASE_IMAGE_HAS == set(dropped), "a tested pin would stand beside the image's version"
    requirements = (REPOSITORY / "setup.py").read_text(encoding="utf-8").split("extras_require")[0]
    assert "transformer-engine" not in requirements.split("install_requires")[1] and '"apex' not in requirements


def test_the_gpu_stage_ends_with_the_import_check() -> None:
    checks = [rest for name, rest in _instructions() if name == "RUN"][-1]
    assert checks.startswith("python tools/check_image.py && ")
    assert check_image.REQUIRED == ("torch", "megatron.core", "megatron_tropd")
    assert check_image.OPTIONAL == ("transformer_engine.pytorch", "apex")


def test_an_optional_library_may_be_absent_but_not_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    texts = {
        "made_up": "__version__ = '1.5'",
        "made_up_and_broken": "import ctypes\nctypes.CDLL('libnowhere.so.3')",
        "made_up_for_gpus": "raise ImportError('libcuda.so.1: cannot open shared object file')",
    }
    for package, text in texts.items():
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("__version__ = '1.5'")
        (tmp_path / package / "pytorch.py").write_text(text)
    assert check_image.state("made_up_and_absent.pytorch") == "not here"
    assert check_image.state("made_up.pytorch") == "1.5"
    with pytest.raises(OSError, match="libnowhere"):
        check_image.state("made_up_and_broken.pytorch")
    assert "needs the GPU's driver (libcuda" in check_image.state("made_up_for_gpus.pytorch")


def _check_here() -> list[str]:
    output = StringIO()
    with redirect_stdout(output):
        check_image.main([])
    return [line.split()[0] for line in output.getvalue().splitlines()]


def test_the_check_passes_here() -> None:
    (names,) = run_ranks(1, _check_here, init_process_group=False)
    assert names == [*check_image.REQUIRED, *check_image.OPTIONAL]
