"""Reading, overriding, documenting and writing the configuration tree, on jsonargparse. Imports no torch."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from megatron_tropd.config import Config, ConfigError

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def build_parser(command: str, description: str) -> ArgumentParser:
    """The parser of one command: ``--config FILE`` and an option for every field, documented by its docstring."""
    parser = ArgumentParser(
        prog=f"python -m megatron_tropd {command}",
        usage="%(prog)s CONFIG.yaml [--section.field=value ...]",
        description=description,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; the first positional argument says the same")
    parser.add_class_arguments(Config)
    return parser


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file with ``--section.field=value`` overrides.

    Raises ConfigError for an unreadable file, an unknown field (naming the nearest valid one), a missing field or a
    value of the wrong type.
    """
    values = _read_yaml(path)
    _refuse_unknown(values, Config, prefix="", where=str(path))
    overrides = list(_join_values(overrides))
    for override in overrides:
        _refuse_unknown_override(override)
    parser = build_parser("train", "")
    try:
        namespace = parser.parse_args([f"--config={path}", *overrides])
        return Config(**{field.name: parser.instantiate(namespace)[field.name] for field in fields(Config)})
    except ArgumentError as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error


def save_config(config: Config, path: Path) -> None:
    """Write the whole tree, defaults included, as YAML that ``load_config`` reads back to an equal config."""
    path.write_text(yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def field_names(cls: type = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields below ``cls``, sections included."""
    for name, section in _sections(cls).items():
        yield prefix + name
        if section is not None:
            yield from field_names(section, f"{prefix}{name}.")


def _sections(cls: type) -> dict[str, Any]:
    """Field name to its dataclass, or None for a plain value."""
    result: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        result[name] = next((option for option in options if is_dataclass(option)), None)
    return result


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
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
        if section is not None and isinstance(value, dict):
            _refuse_unknown(value, section, f"{prefix}{name}.", where)


def _join_values(overrides: Sequence[str]) -> Iterator[str]:
    """``--a.b value`` as ``--a.b=value``."""
    waiting = iter(overrides)
    for override in waiting:
        yield override if "=" in override else f"{override}={next(waiting, '')}"


def _refuse_unknown_override(override: str) -> None:
    name = override.split("=", 1)[0]
    if not name.startswith("--"):
        raise ConfigError(f"unexpected argument {override!r}: overrides are written --section.field=value")
    if name[2:] not in set(field_names()):
        _raise_unknown(name[2:], "command line")


def _raise_unknown(name: str, where: str) -> None:
    names = list(field_names())
    leaf = name.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    # A field in the wrong section is nearer by its own name than by the dotted one.
    near = [other for other in names if other.rsplit(".", 1)[-1] == leaf] or near
    hint = f"; did you mean {near[0]}?" if near else "; `--help` lists all fields"
    raise ConfigError(f"{where}: unknown config field {name}{hint}")
