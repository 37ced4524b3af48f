"""Reading, overriding, documenting and writing the configuration tree, on jsonargparse. Imports no torch."""

from __future__ import annotations

import difflib
import types
from argparse import SUPPRESS
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from megatron_tropd.config import Config, ConfigError, ModelConfig
from megatron_tropd.redaction import redacted

set_parsing_settings(docstring_parse_attribute_docstrings=True)
NO_TEACHER = "--teacher=null"


def build_parser(command: str, description: str, *, with_teacher: bool = True) -> ArgumentParser:
    """The parser of one command: an option for every field, documented by its docstring.

    The teacher's fields are required where there is a teacher, so a parser is made with or without them.
    """
    parser = ArgumentParser(
        prog=f"python -m megatron_tropd {command}",
        usage="%(prog)s CONFIG.yaml [--section.field=value ...]",
        description=description,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Config, skip={"teacher"})
    if with_teacher:
        parser.add_class_arguments(ModelConfig, "teacher")
    shown = {"help", *field_names()} - {name for name, section in _sections(Config).items() if section is not None}
    for action in parser._actions:  # jsonargparse's own options: the command line takes fields alone
        if action.dest not in shown:
            action.help = SUPPRESS
    return parser


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file with ``--section.field=value`` overrides; ``--teacher=null`` drops that section.

    Raises ConfigError for an unreadable file, an unknown field (naming the nearest valid one), a missing field or a
    value of the wrong type.
    """
    values = _read_yaml(path)
    _refuse_unknown(values, Config, prefix="", where=str(path))
    overrides = list(_join_values(overrides))
    if NO_TEACHER in overrides:
        values["teacher"] = None
        overrides = [override for override in overrides if override != NO_TEACHER]
    for override in overrides:
        _refuse_unknown_override(override)
    if values.get("teacher", {}) is None:
        del values["teacher"]
    with_teacher = "teacher" in values or any(override.startswith("--teacher.") for override in overrides)
    parser = _parser_of_files(with_teacher)
    # Every scalar quoted or tagged: what was a string in the file ("1e3") stays one.
    text = yaml.safe_dump(values, default_style='"')
    try:
        namespace = parser.parse_args([f"--config={text}", *overrides])
        sections = parser.instantiate(namespace)
    except (ArgumentError, OverflowError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    config = Config(**{field.name: sections[field.name] for field in fields(Config) if field.name in sections})
    _refuse_null(config, "", str(path))
    if config.lora.base_is_teacher and config.teacher is None:
        config = replace(config, teacher=config.student)
    return config


@cache
def _parser_of_files(with_teacher: bool) -> ArgumentParser:
    return build_parser("train", "", with_teacher=with_teacher)


def _refuse_null(section: Any, prefix: str, where: str) -> None:
    """A null where the field's type has none: jsonargparse lets it through."""
    hints = get_type_hints(type(section))
    for name, value in vars(section).items():
        if is_dataclass(value):
            _refuse_null(value, f"{prefix}{name}.", where)
        elif value is None and type(None) not in get_args(hints[name]):
            raise ConfigError(f"{where}: {prefix}{name} must have a value, found null: leave it out for its default")


def config_text(config: Config) -> str:
    """The whole tree, defaults included, as YAML that ``load_config`` reads back to an equal config.

    Equal but for secrets, such as a password in a URL: they are left out.
    """
    return yaml.safe_dump(redacted(asdict(config)), sort_keys=False, allow_unicode=True)


def field_names(cls: type = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields below ``cls``, sections included."""
    for name, section in _sections(cls).items():
        yield prefix + name
        if section is not None:
            yield from field_names(section, f"{prefix}{name}.")


@cache
def _sections(cls: type) -> dict[str, Any]:
    """Field name to its dataclass, or None for a plain value."""
    result: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        result[name] = next((option for option in options if is_dataclass(option)), None)
    return result


_MAX_LENGTH, _MAX_BRACKETS = 2**20, 1000
"""PyYAML's time grows with the square of the depth of brackets: a file of them would keep it busy for hours."""


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
        if len(text) > _MAX_LENGTH or text.count("[") + text.count("{") > _MAX_BRACKETS:
            raise ConfigError(
                f"{path} is no config: more than {_MAX_LENGTH:,} characters or {_MAX_BRACKETS:,} opening brackets"
            )
        values = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}; check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} must hold a mapping of sections (student:, data:, ...), found {type(values).__name__}"
        )
    return values


def _refuse_unknown(values: dict[Any, Any], cls: type, prefix: str, where: str) -> None:
    sections = _sections(cls)
    for name, value in values.items():
        if name not in sections:
            _raise_unknown(f"{prefix}{name}", where)
        section = sections[name]
        if section is None or (name == "teacher" and value is None):
            continue
        if not isinstance(value, dict):
            found = "nothing" if value is None else repr(value)
            raise ConfigError(f"{where}: {name} is a section of fields, found {found}: fill it in or take it out")
        _refuse_unknown(value, section, f"{prefix}{name}.", where)


def _join_values(overrides: Sequence[str]) -> Iterator[str]:
    """``--a.b value`` as ``--a.b=value``."""
    waiting = iter(overrides)
    for override in waiting:
        value = None if "=" in override or not override.startswith("--") else next(waiting, "--")
        if value is not None and value.startswith("--"):
            raise ConfigError(f"{override} needs a value: overrides are written --section.field=value")
        yield override if value is None else f"{override}={value}"


def _refuse_unknown_override(override: str) -> None:
    name = override.split("=", 1)[0]
    if not name.startswith("--"):
        raise ConfigError(f"unexpected argument {override!r}: overrides are written --section.field=value")
    if name[2:] not in set(field_names()):
        _raise_unknown(name[2:], "command line")
    if _sections(Config).get(name[2:]) is not None:
        raise ConfigError(f"{override}: {name[2:]} is a section; override its fields, {name}.FIELD=value")


def _raise_unknown(name: str, where: str) -> None:
    names = list(field_names())
    leaf = name.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    # A field in the wrong section is nearer by its own name than by the dotted one.
    near = [other for other in names if other.rsplit(".", 1)[-1] == leaf] or near
    hint = f"; did you mean {near[0]}?" if near else "; `--help` lists all fields"
    raise ConfigError(f"{where}: unknown config field {name}{hint}")
