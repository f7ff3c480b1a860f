"""Settings from several sources (files, the environment, a command line) into one frozen struct. Knows no setting."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import msgspec

from pdx.errors import ConfigError

DEFAULT = "default"

T = TypeVar("T", bound=msgspec.Struct)


class Source(NamedTuple):
    """What one place says. Values may be text, as an environment has it; None says nothing."""

    name: str
    values: Mapping[str, Any]


def resolve(kind: type[T], sources: Iterable[Source], *, secrets: Collection[str] = ()) -> tuple[T, dict[str, str]]:
    """The settings, later sources before earlier ones, and the name of the source that each value came from.

    Raises ConfigError naming source and key: of an unknown key, or a value that does not fit. It shows that value,
    unless the key is one of `secrets`.
    """
    values: dict[str, Any] = {}
    origins = dict.fromkeys(kind.__struct_fields__, DEFAULT)
    types = types_of(kind)
    for source in sources:
        said = {key: value for key, value in source.values.items() if value is not None}
        for key, value in checked(kind, said, source=source.name).items():
            try:
                values[key] = converted(value, types[key])
            except ValueError as error:
                shown = "its value" if key in secrets else repr(value)
                raise ConfigError(f"{source.name}: {key}: {shown}: {error}") from None
            origins[key] = source.name
    return kind(**values), origins


def types_of(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The annotations of a struct's fields, with what `Meta` says of them."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field: hints[field] for field in kind.__struct_fields__}


def converted(value: Any, wanted: Any) -> Any:
    """`value`, or the text for it, as this type. Raises ValueError in one line, which does not show the value."""
    if is_list(wanted) and isinstance(value, str):
        value = [item.strip() for item in value.split(",") if item.strip()]
    try:
        return msgspec.convert(value, wanted, strict=False)
    except msgspec.ValidationError as error:
        said = str(error).partition(" - at")[0]
        raise ValueError(f"{said[0].lower()}{said[1:]}") from error


def is_list(wanted: Any) -> bool:
    return get_origin(bare(wanted)) is list


def bare(wanted: Any) -> Any:
    """A type without its `Meta`, and without the None that an unset value may be."""
    while hasattr(wanted, "__metadata__"):
        wanted = wanted.__origin__
    options = [each for each in get_args(wanted) if each is not type(None)]
    return bare(options[0]) if type(None) in get_args(wanted) and len(options) == 1 else wanted


def checked(kind: type[msgspec.Struct], values: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """The values, if the struct has all of these fields and what they name is among their choices."""
    types = types_of(kind)
    for key, value in values.items():
        if key not in types:
            raise ConfigError(f"{source}: unknown key {key!r}{nearest(str(key), types, known='keys')}")
        wanted = bare(types[key])
        if get_origin(wanted) is Literal and value not in get_args(wanted):
            hint = ": YAML reads on and off as true and false, so write it in quotes" if isinstance(value, bool) else ""
            raise ConfigError(f"{source}: {key} is one of {', '.join(get_args(wanted))}, not {value!r}{hint}")
    return dict(values)


def nearest(name: str, names: Iterable[str], *, known: str) -> str:
    """How an error about a name that is none goes on."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f", did you mean {near[0]!r}?" if near else f"; known {known}: {', '.join(names)}"


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in this file. Raises ConfigError."""
    try:
        import yaml

        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.MarkedYAMLError as error:  # without the line itself, which may have a key in it
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{path}: {where}{error.problem or error.context}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected a mapping of settings")
    return loaded
