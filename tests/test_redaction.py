"""What is a secret and what only looks like one."""

from __future__ import annotations

import pytest

from megatron_tropd.redaction import HIDDEN, is_secret_name, redact, redacted


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "apikey",
        "db.password",
        "AWS_SECRET_ACCESS_KEY",
        "client-secret",
        "PGPASSWORD",
        "KEY",
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["tokens_per_second", "tokenizer", "response_tokens", "monkey", "author"])
def test_names_that_hold_none(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cannot reach https://me:hunter2@host/path", f"cannot reach https://{HIDDEN}@host/path"),
        ("no checkpoint at https:/me:hunter2@host", f"no checkpoint at https:/{HIDDEN}@host"),
        ("s3://bucket/folder@2", "s3://bucket/folder@2"),
        ("?token=hunter2&step=3", f"?token={HIDDEN}&step=3"),
        ('{"api_key": "hunter2"}', f'{{"api_key": "{HIDDEN}"}}'),
        ("Authorization: Bearer hunter2hunter2", f"Authorization: Bearer {HIDDEN}"),
        ("normalization: tokens, tokenizer: characters", "normalization: tokens, tokenizer: characters"),
        ("tokens_per_second=12.5", "tokens_per_second=12.5"),
    ],
)
def test_secrets_in_a_text(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_secrets_of_the_environment_are_hidden_wherever_they_turn_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hunter2-hunter2")
    monkeypatch.setenv("OTHER_TOKEN", "hunter2-hunter2-and-more")
    monkeypatch.setenv("SHORT_KEY", "run")
    monkeypatch.setenv("SOME_PATH", "/data/train")
    tree = {"load": "/x/hunter2-hunter2-and-more", "nested": [{"password": "x"}, "a run of /data/train"], "lr": 0.5}
    assert redacted(tree) == {
        "load": f"/x/{HIDDEN}",
        "nested": [{"password": HIDDEN}, "a run of /data/train"],
        "lr": 0.5,
    }
