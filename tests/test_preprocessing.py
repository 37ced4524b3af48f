"""tools/preprocess_data.py on every kind of input, every filter, and what it refuses."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_tropd.data import read_prompts
from megatron_tropd.indexed import IndexedCorpus
from megatron_tropd.preprocessing.filters import Contamination
from megatron_tropd.preprocessing.sentences import SentenceTruncation, load_punkt, train_punkt
from megatron_tropd.tokenizer import CharacterTokenizer, HuggingFaceTokenizer
from tests import tokenizers_made as made
from tools import preprocess_data

ROOT = Path(__file__).parent.parent
RECORDS = [{"prompt": f"What is {a} plus {b}?", "answer": str(a + b)} for a in range(30) for b in range(30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.save_byte_level_bpe(tmp_path_factory.mktemp("tokenizer") / "base")


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(*arguments: object, workers: int = 1) -> int:
    return preprocess_data.main([*map(str, arguments), "--quiet", f"--workers={workers}"])


def test_lines_become_a_prompt_file(tmp_path: Path, folder: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", RECORDS + RECORDS[:10])
    assert run("--input", path, "--out", tmp_path / "out", "--tokenizer", folder, "--validation=0.1") == 0
    train, validation = (read_jsonl(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "validation"))
    assert 50 < len(validation) < 130 and len(train) + len(validation) == 900
    written = {(line["prompt"], line["answer"]) for line in train + validation}
    assert written == {(record["prompt"], record["answer"]) for record in RECORDS}
    order = [record["prompt"] for record in RECORDS]
    assert sorted(train, key=lambda line: order.index(line["prompt"])) == train, "the order of the input"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "train.jsonl",
        "validation.jsonl",
        "statistics.json",
    }
    tokenizer = HuggingFaceTokenizer(folder)
    prompts, _ = read_prompts(tmp_path / "out" / "train.jsonl", tokenizer, 40, "refuse", max_answer_length=5)
    statistics = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert statistics["read"] == 910 and statistics["dropped"] == {"duplicate": 10}
    assert statistics["train"] == len(prompts)
    all_tokens = sum(len(tokenizer.encode(record["prompt"])) for record in RECORDS)
    assert statistics["prompt_tokens"]["tokens"] == all_tokens
    assert sum(statistics["prompt_tokens"]["histogram"].values()) == statistics["prompt_tokens"]["count"] == 900


def test_the_number_of_workers_changes_nothing(tmp_path: Path, folder: Path) -> None:
    records = [{"prompt": f"{index % 4000} and {index % 7} are numbers", "answer": "x"} for index in range(9000)]
    path = write_jsonl(tmp_path / "in.jsonl", records)
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        assert run("--input", path, "--out", out, "--tokenizer", folder, "--validation=0.2", workers=workers) == 0
    for name in ("train.jsonl", "validation.jsonl", "statistics.json"):
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()


def test_tables_and_lines_give_the_same(tmp_path: Path, folder: Path) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    datasets = pytest.importorskip("datasets")
    records = [
        {"messages": [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": word}], "id": word}
        for word in ("one", "two", "three")
    ]
    path = write_jsonl(tmp_path / "in.jsonl", records)
    with_nulls = [{**record, "prompt": None} for record in records]
    parquet.write_table(arrow.Table.from_pylist(with_nulls), tmp_path / "in.parquet")
    # With a fingerprint of our own, datasets need not make one by pickling its modules.
    dataset = datasets.Dataset(arrow.Table.from_pylist(records), fingerprint="f" * 16)
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"a": dataset}).save_to_disk(tmp_path / "splits")
    sources = (path, tmp_path / "in.parquet", tmp_path / "saved", tmp_path / "splits" / "a")
    for index, source in enumerate(sources):
        assert run("--input", source, "--out", tmp_path / f"out{index}", "--tokenizer", folder) == 0
    written = [(tmp_path / f"out{index}" / "train.jsonl").read_bytes() for index in range(4)]
    assert len(set(written)) == 1
    assert read_jsonl(tmp_path / "out0" / "train.jsonl")[0] == {
        "id": "one",
        "messages": [{"role": "user", "content": "Say one."}],
        "answer": "one",
    }


def test_other_names_of_columns(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "in.jsonl",
        [{"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}], "id": 7}],
    )
    assert run("--input", path, "--out", tmp_path / "chat") == 0
    expected = {"id": "7", "messages": [{"role": "user", "content": "Hello?"}], "answer": "Yes."}
    assert read_jsonl(tmp_path / "chat" / "train.jsonl") == [expected]
    path = write_jsonl(tmp_path / "in.jsonl", [{"question": "1+1=", "solution": "2", "prompt": "x", "messages": 3}])
    arguments = ("--field=prompt", "--prompt-key=question", "--answer-key=solution")
    assert run("--input", path, "--out", tmp_path / "out", *arguments) == 0
    (line,) = read_jsonl(tmp_path / "out" / "train.jsonl")
    assert (line["prompt"], line["answer"]) == ("1+1=", "2")


def test_what_verifiers_need_is_carried_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        {"prompt": "Which?", "choices": ["a", "b"], "answer": "B", "verifier": "choice", "id": "1"},
        {"prompt": "Which?", "choices": ["c", "b"], "answer": "B", "verifier": "choice", "id": "2"},
        {"prompt": "1+1?", "answer": 2, "verifier": "number", "solution": "1+1 is 2", "id": "3"},
        {"prompt": "Write f.", "tests": "assert f()", "verifier": "python", "id": "4"},
    ]
    path = write_jsonl(tmp_path / "in.jsonl", records)
    characters = ("--tokenizer", "".join(sorted(set("Which?\n ABab)cd1+Write f.is2"))), "--tokenizer-kind=characters")
    assert run("--input", path, "--out", tmp_path / "out", *characters) == 0
    found = read_jsonl(tmp_path / "out" / "train.jsonl")
    assert found == [*records[:2], {**records[2], "answer": "2"}, records[3]]
    prompts, _ = read_prompts(tmp_path / "out" / "train.jsonl", CharacterTokenizer(characters[1]), 99, "refuse")
    statistics = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert statistics["prompt_tokens"]["tokens"] == sum(len(prompt.tokens) for prompt in prompts)
    assert statistics["answer_tokens"]["max"] == len(prompts[2].solution) + 1
    chat = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "1+1 is 2"}]
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": chat, "answer": "2", "verifier": "number"}])
    assert run("--input", path, "--out", tmp_path / "chat") == 0
    (line,) = read_jsonl(tmp_path / "chat" / "train.jsonl")
    assert (line["messages"], line["answer"], line["solution"]) == (chat[:1], "2", "1+1 is 2")
    strange = write_jsonl(tmp_path / "strange.jsonl", [{"prompt": "Which?", "choices": {"text": ["a"]}}])
    assert run("--input", strange, "--out", tmp_path / "refused") == 2
    assert 'strange.jsonl:1: "choices" must be a list of 2 to 26 strings' in capsys.readouterr().err
    assert run("--input", strange, "--out", tmp_path / "fewer", "--task-keys", "verifier") == 0
    assert set(read_jsonl(tmp_path / "fewer" / "train.jsonl")[0]) == {"id", "prompt"}


def test_filters_and_their_counts(tmp_path: Path, folder: Path) -> None:
    copied = "The miller counts his sacks at the old mill every morning, and writes the number down."
    records = [
        {"prompt": f"Complete: {copied}"},
        {"prompt": "Nobody asked the teacher, who would have known at once, or so they say."},
        {"prompt": "Hi", "answer": "a"},
        {"prompt": "word " * 200},
        {"prompt": "A long answer?", "answer": "word " * 200},
        {"prompt": "Only this stays.", "answer": "Yes."},
        {"prompt": "Only this stays.", "answer": "Another."},
    ]
    path = write_jsonl(tmp_path / "in.jsonl", records)
    evaluation = write_jsonl(tmp_path / "eval.jsonl", [{"prompt": f"Q: {copied.upper()}"}, {"prompt": "nobody asked"}])
    lengths = ("--min-prompt-length=3", "--max-prompt-length=60", "--max-answer-length=60")
    arguments = ("--input", path, "--tokenizer", folder, *lengths, "--decontaminate", evaluation, "--ngram=8")
    assert run(*arguments, "--out", tmp_path / "out") == 0
    statistics = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert statistics["dropped"] == {
        "in an evaluation file": 1,
        "prompt too short": 1,
        "prompt too long": 1,
        "answer too long": 1,
        "duplicate": 1,
    }
    kept = [
        (line["prompt"], line["answer"]) for line in read_jsonl(tmp_path / "out" / "train.jsonl") if "answer" in line
    ]
    assert statistics["train"] == 2 and kept == [("Only this stays.", "Yes.")]
    assert run(*arguments, "--out", tmp_path / "examples", "--dedup=example") == 0
    assert len({line["id"] for line in read_jsonl(tmp_path / "examples" / "train.jsonl")}) == 3


def test_contamination_by_hand() -> None:
    contamination = Contamination(["a b c d e", "Short one"], n=3)
    assert contamination.meets("x B, c; D y") and contamination.meets("c d e")
    assert not contamination.meets("a b x c d")
    assert contamination.meets("short ONE!") and not contamination.meets("a short one")


def test_documents_are_cut_after_a_sentence(tmp_path: Path, folder: Path) -> None:
    pytest.importorskip("nltk")
    tokenizer = CharacterTokenizer("".join(sorted(set("Dr. Who came. He left at 3 p.m. Then it rained!"))))
    text = "Dr. Who came. He left. Then it rained!"
    names, deeds = ("Who", "Lee", "Moss", "Hart", "Finch"), ("came home", "left early", "read a book", "slept well")
    stories = [f"Yesterday Dr. {name} {deed}. Nobody knew why they {deed}." for name in names for deed in deeds]
    parameters = train_punkt(stories * 6)
    cut = SentenceTruncation(parameters, 25)
    assert cut(text, tokenizer) == "Dr. Who came. He left."
    assert SentenceTruncation(parameters, 13)(text, tokenizer) == "Dr. Who came."
    assert SentenceTruncation(parameters, 12)(text, tokenizer) == ""
    assert SentenceTruncation(parameters, 38)(text, tokenizer) == text
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": " ".join(made.SENTENCES * 5)}, {"text": "word " * 50}])
    arguments = ("--input", path, "--tokenizer", folder, "--max-text-length=30")
    assert run(*arguments, "--out", tmp_path / "out") == 0
    (line,) = read_jsonl(tmp_path / "out" / "train.jsonl")
    assert line["prompt"].endswith(".") and " ".join(made.SENTENCES).startswith(line["prompt"])
    assert 0 < len(HuggingFaceTokenizer(folder).encode(line["prompt"])) <= 30
    statistics = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert statistics["dropped"] == {"first sentence too long": 1}


def test_punkt_from_a_folder(tmp_path: Path) -> None:
    punkt = pytest.importorskip("nltk.tokenize.punkt")
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (tmp_path / name).write_text("")
    (tmp_path / "abbrev_types.txt").write_text("approx\n")
    tokenizer = CharacterTokenizer("abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.0123456789")
    text = "It took approx. Three days. We left."
    assert SentenceTruncation(load_punkt(tmp_path), 30)(text, tokenizer) == "It took approx. Three days."
    assert SentenceTruncation(punkt.PunktParameters(), 20)(text, tokenizer) == "It took approx."
    with pytest.raises(ValueError, match="is not a language's folder of punkt_tab"):
        load_punkt(tmp_path / "absent")


def test_indexed_datasets_round_trip(tmp_path: Path, folder: Path) -> None:
    tokenizer = HuggingFaceTokenizer(folder)
    path = write_jsonl(tmp_path / "in.jsonl", RECORDS[:50])
    assert run("--input", path, "--out", tmp_path / "sft", "--tokenizer", folder, "--format=indexed") == 0
    corpus = IndexedCorpus(tmp_path / "sft" / "train.idx")
    assert len(corpus) == 50
    for index in (0, 17, 49):
        prompt, answer = (part.tolist() for part in corpus[index])
        assert prompt == tokenizer.encode(RECORDS[index]["prompt"])
        assert answer == [*tokenizer.encode(RECORDS[index]["answer"]), tokenizer.eos_id]
    path = write_jsonl(tmp_path / "texts.jsonl", [{"text": sentence} for sentence in made.SENTENCES])
    assert run("--input", path, "--out", tmp_path / "corpus", "--tokenizer", folder, "--format=indexed") == 0
    (document,) = IndexedCorpus(tmp_path / "corpus" / "train.idx")[2]
    assert document.tolist() == [*tokenizer.encode(made.SENTENCES[2]), tokenizer.eos_id]
    for name, key in (("sft", "prompt"), ("corpus", "prompt")):
        source = tmp_path / name / "train.idx"
        assert run("--input", source, "--out", tmp_path / f"{name}_back", "--tokenizer", folder) == 0
        assert key in read_jsonl(tmp_path / f"{name}_back" / "train.jsonl")[0]
    lines = read_jsonl(tmp_path / "sft_back" / "train.jsonl")
    assert [(line["prompt"], line["answer"]) for line in lines] == [(r["prompt"], r["answer"]) for r in RECORDS[:50]]
    assert [line["prompt"] for line in read_jsonl(tmp_path / "corpus_back" / "train.jsonl")] == made.SENTENCES


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_leaves_nothing_behind(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [{"prompt": f"fine {index}"} for index in range(4500)])
    with path.open("a") as file:
        file.write('{"prompt": 3}\n')
    assert run("--input", path, "--out", tmp_path / "out", "--tokenizer", folder, workers=workers) == 2
    assert 'in.jsonl:4501: "prompt" must be a string, found a number' in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a", "text": "b"}', 'in.jsonl:1: one of .* found "prompt" and "text": choose with --field'),
        ('{"question": "a"}', r"in.jsonl:1: one of .* found only \['question'\]"),
        ('{"prompt": " "}', 'in.jsonl:1: "prompt" is empty'),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "in.jsonl:1: .* only an answer, no question"),
        ('{"messages": [3]}', "in.jsonl:1: message 0 must be an object"),
        ('{"prompt": "a", "id": 1.5}', 'in.jsonl:1: "id" must be a string or a whole number'),
        ('{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}', "in.jsonl:2: id 'x' is taken by an earlier line"),
        ('{"prompt": "a"\n', "in.jsonl:1: not valid JSON"),
        ("", "nothing is left: no records"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        from_main(tmp_path, capsys)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.jsonl"]


def from_main(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--input", tmp_path / "in.jsonl", "--out", tmp_path / "out") == 2
    raise ValueError(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "absent.jsonl"], "cannot read .*absent.jsonl: No such file"),
        (["--input", "absent.idx"], "cannot read absent.idx: No such file"),
        (["--max-prompt-length=5"], "give --tokenizer"),
        (["--format=indexed"], "give --tokenizer"),
        (["--validation=1"], r"--validation must be in \[0, 1\)"),
        (["--punkt=x"], "give --max-text-length too"),
        (["--out", "in.jsonl"], "in.jsonl exists: choose another --out"),
        (["--input", "broken.parquet"], "broken.parquet:1: not a readable Parquet file"),
        (["--input", "folder"], "folder is not a folder that datasets' save_to_disk wrote"),
    ],
)
def test_options_that_cannot_be_met(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", RECORDS[:2])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 broken")
    (tmp_path / "folder").mkdir()
    assert run("--input", "in.jsonl", "--out", "out", *arguments) == 2

    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["jsonl", "indexed"])
def test_a_full_disk_is_one_error_and_leaves_nothing(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [{"prompt": f"What is {number} plus 1?"} for number in range(2000)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        assert run("--input", path, "--out", tmp_path / "out", "--tokenizer", folder, f"--format={form}") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search(r"out could not be written \(.*File too large.*\); nothing is left", capsys.readouterr().err)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_truncated_indexed_dataset_is_refused(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", RECORDS[:5])
    assert run("--input", path, "--out", tmp_path / "sft", "--tokenizer", folder, "--format=indexed") == 0
    data = tmp_path / "sft" / "train.bin"
    data.write_bytes(data.read_bytes()[:-2])
    assert run("--input", tmp_path / "sft" / "train.idx", "--out", tmp_path / "out", "--tokenizer", folder) == 2
    assert "its index speaks of" in capsys.readouterr().err
    (tmp_path / "sft" / "train.idx").write_bytes(b"nothing")
    assert run("--input", tmp_path / "sft" / "train.idx", "--out", tmp_path / "out", "--tokenizer", folder) == 2
    assert "is not the index of a Megatron dataset" in capsys.readouterr().err


def test_the_command(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", RECORDS[:20])
    command = [sys.executable, "tools/preprocess_data.py", "--input", path, "--out", tmp_path / "out", "--workers=2"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "train" in finished.stdout and len(read_jsonl(tmp_path / "out" / "train.jsonl")) == 20
