"""JSON lines, read strictly: every complaint names file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn


class DataError(ValueError):
    """A data file is not what it should be; the message says where, what was found and what to do."""


def read_objects(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(Line number from 1, object) of every line; DataError at one that is not a JSON object in UTF-8."""
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, parse_object(line, f"{path}:{number}")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path") from error


def parse_object(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object of one line; ``where`` (file:line) begins the message of a DataError."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start} of the line): convert the file") from error
    if not text.strip():
        raise DataError(f"{where}: empty line: delete it")
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}): every line must be one JSON object") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON object is needed, found {kind_of(value)}: write {{...}} on every line")
    return value


def kind_of(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
