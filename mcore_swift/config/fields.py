"""Declaring a dataclass field as a flag: help, choices and bounds are kept in the field's metadata."""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Kind = Literal["str", "int", "float", "bool", "json"]
_KINDS: dict[Any, Kind] = {str: "str", int: "int", float: "float", bool: "bool", dict: "json"}


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of the command line, which is also a key of YAML files.

    kind: type of the value, or of each element if `is_list`.
    optional: whether `None` ("not given, decide for me") is allowed.
    default_text: what `--help` prints as the default, if the value itself is not informative.
    refused: choices of ms-swift that are not supported yet, with the reason.
    at_least, above, at_most, below: bounds of a number (closed, open, closed, open).
    nested: a list in a YAML file is the value too, as the JSON text of it.
    is_regex: the value is a regular expression.
    group: title under which `--help` lists it.
    """

    name: str
    kind: Kind
    is_list: bool
    optional: bool
    default: Any
    help: str
    group: str
    choices: tuple[str, ...] | None = None
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_text: str | None = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    nested: bool = False
    is_regex: bool = False


def arg(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    refused: Mapping[str, str] | None = None,
    default_text: str | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    nested: bool = False,
    is_regex: bool = False,
) -> Any:
    """Declare a dataclass field that is a flag; the arguments are those of `Flag`."""
    metadata = {
        "help": help,
        "choices": tuple(choices) if choices is not None else None,
        "refused": dict(refused or {}),
        "default_text": default_text,
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
        "below": below,
        "nested": nested,
        "is_regex": is_regex,
    }
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def with_default(cls: type, name: str, default: Any) -> Any:
    """The field `name` of `cls` declared again, with another default."""
    (field,) = (field for field in dataclasses.fields(cls) if field.name == name)
    return dataclasses.field(default=default, metadata=field.metadata)


def _shape_of(annotation: Any) -> tuple[Kind, bool, bool]:
    """(kind, is_list, optional) of a field's annotation."""
    optional = False
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        members = [member for member in typing.get_args(annotation) if member is not type(None)]
        assert len(members) == 1, f"a flag has one type beside None, not {annotation}"
        annotation, optional = members[0], True
    origin = typing.get_origin(annotation)
    if origin is list:
        return _KINDS[typing.get_args(annotation)[0]], True, optional
    return _KINDS[origin or annotation], False, optional


def _owner(cls: type, name: str) -> type:
    """The class that introduced the field: the most basic one that annotates it."""
    return [base for base in cls.__mro__ if name in base.__dict__.get("__annotations__", {})][-1]


@functools.cache
def flags_of(cls: type) -> dict[str, Flag]:
    """Flags of a composed arguments class by name, in the order of its mixins."""
    hints = typing.get_type_hints(cls)
    order = {base: index for index, base in enumerate(cls.__mro__)}
    flags: dict[str, tuple[int, Flag]] = {}
    for field in dataclasses.fields(cls):
        kind, is_list, optional = _shape_of(hints[field.name])
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        owner = _owner(cls, field.name)
        flag = Flag(
            name=field.name,
            kind=kind,
            is_list=is_list,
            optional=optional,
            default=default,
            group=owner.TITLE,
            **field.metadata,
        )
        flags[field.name] = (order[owner], flag)
    return {name: flag for name, (_, flag) in sorted(flags.items(), key=lambda item: item[1][0])}
