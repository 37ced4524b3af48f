"""Chat templates as ``transformers`` applies them, tiktoken vocabularies, and when two tokenizers are one."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from megatron_tropd.config import TokenizerConfig
from megatron_tropd.data import read_prompts
from megatron_tropd.jsonl import DataError
from megatron_tropd.tokenizer import CharacterTokenizer, ChatOptions, HuggingFaceTokenizer, SentencePieceTokenizer
from megatron_tropd.tokenizer_agreement import TokenizerMismatchError, shared_vocab_size
from megatron_tropd.tokenizer_builder import build_tokenizer, build_tokenizers
from tests import tokenizers_made as made
from tests.ranks import run_ranks
from tests.test_run import _metrics, _train, config_file

MESSAGES = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "Where is the bridge?\n  <|im_end|> é 東京"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.save_byte_level_bpe(tmp_path_factory.mktemp("tokenizers") / "base")


@pytest.fixture
def prompt_file(tmp_path: Path) -> Any:
    def write(*lines: dict[str, Any]) -> Path:
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return write


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
def test_messages_become_the_ids_of_apply_chat_template(
    folder: Path, prompt_file: Any, add_generation_prompt: bool, kwargs: dict[str, Any]
) -> None:
    import transformers

    chat = ChatOptions(add_generation_prompt=add_generation_prompt, kwargs=kwargs)
    prompts, _ = read_prompts(
        prompt_file({"messages": MESSAGES, "answer": "left"}), HuggingFaceTokenizer(folder, chat), 200, "refuse"
    )
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    options = {"add_generation_prompt": add_generation_prompt, **kwargs}
    assert list(prompts[0].tokens) == theirs.apply_chat_template(MESSAGES, return_dict=False, **options)
    assert prompts[0].text == theirs.apply_chat_template(MESSAGES, tokenize=False, **options)
    assert prompts[0].answer == "left"


def test_a_template_file_and_tools_reach_the_template(folder: Path, tmp_path: Path, prompt_file: Any) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{{ tools[0].function.name if tools else 'none' }}:{{ messages[0].content }}{{ eos_token }}")
    tokenizer = HuggingFaceTokenizer(folder, ChatOptions(template=str(path)))
    tool = {"type": "function", "function": {"name": "clock", "parameters": {}}}
    prompts, _ = read_prompts(
        prompt_file({"messages": MESSAGES[1:], "tools": [tool]}, {"messages": MESSAGES[1:]}), tokenizer, 200, "refuse"
    )
    content = MESSAGES[1]["content"]
    assert [prompt.text for prompt in prompts] == [f"clock:{content}<|im_end|>", f"none:{content}<|im_end|>"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": []}, "must be a list of .* found an empty list"),
        ({"messages": "hello"}, "must be a list of .* found a string"),
        ({"messages": ["hello"]}, "message 0 must be an object"),
        ({"messages": [{"content": "hello"}]}, 'message 0 has no "role"'),
        ({"messages": [{"role": "user"}]}, 'message 0 has no "content"'),
        ({"messages": [{"role": "user", "content": 3}]}, 'message 0: "content" must be a string, found a number'),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "x"}]}, 'put its text under "answer"'),
        ({"messages": MESSAGES, "prompt": "x"}, 'both "prompt" and "messages"'),
        ({"messages": [{"role": "reject", "content": "x"}]}, r"template refuses these messages \(no such role\)"),
    ],
)
def test_bad_messages_are_named(folder: Path, prompt_file: Any, line: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"prompts\.jsonl:2: .*{message}"):
        read_prompts(prompt_file({"prompt": "fine"}, line), HuggingFaceTokenizer(folder), 200, "skip")


def test_messages_need_a_template(folder: Path, tmp_path: Path, prompt_file: Any) -> None:
    path = prompt_file({"messages": MESSAGES})
    bare = made.save_byte_level_bpe(tmp_path / "bare", chat_template=None)
    with pytest.raises(DataError, match="has no chat template: set tokenizer.chat_template to a Jinja file"):
        read_prompts(path, HuggingFaceTokenizer(bare), 200, "skip")
    with pytest.raises(DataError, match="prompts.jsonl:1: .*set tokenizer.kind=huggingface"):
        read_prompts(path, CharacterTokenizer("abc"), 200, "skip")
    with pytest.raises(ValueError, match="cannot read tokenizer.chat_template .*absent.jinja"):
        HuggingFaceTokenizer(folder, ChatOptions(template=str(tmp_path / "absent.jinja")))


def test_tiktoken_through_megatron(tmp_path: Path, prompt_file: Any) -> None:
    pytest.importorskip("tiktoken")
    path, options = made.save_tiktoken(tmp_path / "vocabulary.json"), {"num_special_tokens": 10}
    template = tmp_path / "template.jinja"
    template.write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    tokenizer = build_tokenizer("tiktoken", "", str(path), ChatOptions(template=str(template)), options)
    # Special tokens are 0 to 9, byte b is 10 + b, and " the" is the fourth merge after the 256 bytes.
    assert tokenizer.encode("A the") == [10 + 65, 10 + 256 + 3]
    assert tokenizer.encode("</s>") == [tokenizer.eos_id] == [2] and tokenizer.vocab_size == 10 + 256 + 5
    assert tokenizer.decode([*tokenizer.encode("the 東京"), tokenizer.eos_id, tokenizer.pad_id]) == "the 東京"
    prompts, _ = read_prompts(prompt_file({"messages": [{"role": "user", "content": "A"}]}), tokenizer, 9, "refuse")
    assert prompts[0].tokens == (1, 75, 2)
    other = build_tokenizer("tiktoken", "", str(path), None, {"num_special_tokens": 11})
    assert other.fingerprint != tokenizer.fingerprint
    with pytest.raises(TokenizerMismatchError, match="are different tokens"):
        shared_vocab_size(tokenizer, other)
    longer = made.save_tiktoken(tmp_path / "longer.json", words=("th", "the", " t", " the", "er", "zzz"))
    assert shared_vocab_size(tokenizer, build_tokenizer("tiktoken", "", str(longer), None, options)) == 271
    # Halves of characters that no probe has are no text of their own; and the same tokens behind another expression.
    halves = []
    for half in (b"\xf3\xa0", b"\xf3\xa1"):
        rows = json.loads(path.read_text())
        rows[-1] |= {"token_bytes": base64.b64encode(half).decode(), "token_str": "\ufffd"}
        (tmp_path / "halves.json").write_text(json.dumps(rows))
        halves.append(build_tokenizer("tiktoken", "", str(tmp_path / "halves.json"), None, options))
    with pytest.raises(TokenizerMismatchError, match="1 of the 271 ids .*: 270: "):
        shared_vocab_size(*halves)
    with pytest.raises(TokenizerMismatchError, match='cut text differently: pattern is "v2" and "v1"'):
        shared_vocab_size(tokenizer, build_tokenizer("tiktoken", "", str(path), None, {**options, "pattern": "v1"}))
    (tmp_path / "broken.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="broken.json with .* Megatron cannot read it as a tiktoken vocabulary"):
        build_tokenizer("tiktoken", "", str(tmp_path / "broken.json"))
    with pytest.raises(ValueError, match="cannot read tokenizer.model .*absent.json: No such file"):
        build_tokenizer("tiktoken", "", str(tmp_path / "absent.json"))


def test_ids_at_the_end_may_differ(folder: Path, tmp_path: Path) -> None:
    base, again = HuggingFaceTokenizer(folder), HuggingFaceTokenizer(folder)
    assert shared_vocab_size(base, again) == base.vocab_size
    longer = HuggingFaceTokenizer(made.save_byte_level_bpe(tmp_path / "longer", extra=("<tool>", "</tool>")))
    assert longer.vocab_size == base.vocab_size + 2
    assert shared_vocab_size(base, longer) == shared_vocab_size(longer, base) == base.vocab_size
    config = TokenizerConfig(kind="huggingface", model=str(folder), teacher=str(tmp_path / "longer"))
    student, teacher = build_tokenizers(config)
    assert (student.fingerprint, teacher.fingerprint) == (base.fingerprint, longer.fingerprint)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sentences": made.SENTENCES[:2]}, r"ids that student and teacher share are different tokens .*\d+: '"),
        ({"normalizer": "NFKC"}, 'cut text differently: normalizer, .type. is "NFC" and "NFKC"'),
        (
            {"eos": "<|endoftext|>"},
            r"ends a response with id 2 \('<\|im_end\|>'\), the teacher with 0 ",
        ),
    ],
)
def test_tokenizers_that_disagree(folder: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    import tokenizers

    if "normalizer" in settings:
        settings = {"normalizer": tokenizers.normalizers.NFKC()}
    other = HuggingFaceTokenizer(made.save_byte_level_bpe(tmp_path / "other", **settings))
    with pytest.raises(TokenizerMismatchError, match=message):
        shared_vocab_size(HuggingFaceTokenizer(folder), other)


def test_merges_that_differ(folder: Path, tmp_path: Path) -> None:
    made.save_byte_level_bpe(tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    merges = content["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]
    path.write_text(json.dumps(content))
    with pytest.raises(TokenizerMismatchError, match=r"model merges \(from number 3 of \d+ and \d+\)"):
        shared_vocab_size(HuggingFaceTokenizer(folder), HuggingFaceTokenizer(tmp_path / "other"))


def test_sentencepiece_models_agree_or_not(folder: Path, tmp_path: Path) -> None:
    first = SentencePieceTokenizer(made.save_sentencepiece(tmp_path / "first.model"))
    assert shared_vocab_size(first, first) == first.vocab_size
    longer = SentencePieceTokenizer(made.save_sentencepiece(tmp_path / "other.model", sentences=made.SENTENCES[:3]))
    with pytest.raises(TokenizerMismatchError, match="are different tokens"):
        shared_vocab_size(first, longer)
    # The same pieces, but nothing is normalised: only a text shows it.
    plain = SentencePieceTokenizer(
        made.save_sentencepiece(tmp_path / "plain.model", normalization_rule_name="identity")
    )
    with pytest.raises(TokenizerMismatchError, match="cut text differently: 'Hello  world"):
        shared_vocab_size(first, plain)
    # The same pieces, but one is likelier: some word is cut in another way, be it none of the texts compared.
    model = first.processor.serialized_model_proto()
    score = struct.pack("<f", first.processor.get_score(first.processor.piece_to_id("o")))
    assert model.count(score) == 1
    (tmp_path / "likelier.model").write_bytes(model.replace(score, struct.pack("<f", -0.5)))
    with pytest.raises(TokenizerMismatchError, match="cut text differently: scores, .* and -0.5"):
        shared_vocab_size(first, SentencePieceTokenizer(tmp_path / "likelier.model"))
    with pytest.raises(TokenizerMismatchError, match="SentencePieceTokenizer, the teacher's a HuggingFaceTokenizer"):
        shared_vocab_size(first, HuggingFaceTokenizer(folder))
    assert shared_vocab_size(CharacterTokenizer("ab"), CharacterTokenizer("abc")) == 4
    with pytest.raises(TokenizerMismatchError, match="2: 'a' and 'b'"):
        shared_vocab_size(CharacterTokenizer("ab"), CharacterTokenizer("ba"))


def test_a_run_whose_teacher_has_more_ids_or_fewer(tmp_path: Path, folder: Path) -> None:
    longer = made.save_byte_level_bpe(tmp_path / "longer", extra=("<tool>", "</tool>"))
    plain, special = tmp_path / "plain.jsonl", tmp_path / "special.jsonl"
    plain.write_text("".join(json.dumps({"messages": MESSAGES[:1], "id": str(index)}) + "\n" for index in range(8)))
    special.write_text(plain.read_text() + json.dumps({"prompt": "use a <tool>", "id": "8"}) + "\n")
    changes: dict[str, Any] = {
        "guidance": {"schedule": "none", "answers": None},
        "training": {"train_iters": 1, "eval_interval": 0},
    }
    for student, teacher, prompts in ((folder, longer, special), (longer, folder, plain), (longer, folder, special)):
        tokenizer = {"kind": "huggingface", "model": str(student), "teacher": str(teacher), "alphabet": ""}
        data = {"train": str(prompts), "validation": None, "max_prompt_length": 60}
        path = config_file(
            tmp_path / f"{student.name}_{prompts.stem}", tmp_path, tokenizer=tokenizer, data=data, **changes
        )
        if student == longer and prompts == special:
            with pytest.raises(AssertionError, match="prompt '8' has the id 400, the teacher's tokenizer only 400 ids"):
                run_ranks(1, _train, str(path), None, timeout=100, init_process_group=False)
            continue
        run_ranks(1, _train, str(path), None, timeout=100, init_process_group=False)
        assert _metrics(path.parent / "run")[0]["response_tokens"] > 0


def test_code_that_a_tokenizer_folder_brings_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "</s>": 1}')
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\nclass Own: pass\n")
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="transformers cannot read its tokenizer"):
        HuggingFaceTokenizer(tmp_path)
    assert not (tmp_path / "pwned").exists()
