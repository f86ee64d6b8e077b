"""Converting texts, YAML and JSON values to the type of a flag."""

import json
import math
import os
import re
from typing import Any

from .fields import Flag

_TRUE = {"true", "t", "yes", "y", "on", "1"}
_FALSE = {"false", "f", "no", "n", "off", "0"}
_NONE = {"none", "null", ""}
_NOTHING = _NONE | {"[]", "{}"}


class BadValue(ValueError):
    """A value does not fit its flag. The text says why, `remedy` what to write instead."""

    def __init__(self, why: str, remedy: str = "") -> None:
        super().__init__(why)
        self.remedy = remedy


def convert(flag: Flag, given: list[Any]) -> Any:
    """The typed value of a flag.

    given: the texts that followed the flag on the command line, or the single value from YAML or JSON.
    Raises BadValue.
    """
    if flag.is_list:
        return _list(flag, given)
    if not given:
        if flag.kind == "bool":
            return True
        raise BadValue("needs a value")
    if len(given) > 1:
        raise BadValue(f"takes one value, got {len(given)}: {' '.join(map(str, given))}")
    value = given[0]
    if value is None or _means_none(flag, value):
        if not flag.optional:
            raise BadValue("cannot be none")
        return None
    return _checked(flag, _scalar(flag, value))


def at_home(value: Any) -> Any:
    """A path, or a list of them, with a leading ~ replaced: the shell leaves it in --model=~/x, and so does YAML."""
    if isinstance(value, list):
        return [at_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def as_bool(value: Any) -> bool:
    """True or false from any usual spelling. Raises BadValue."""
    text = str(value).strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise BadValue(f"takes true or false, not '{value}'")


def same_value(left: Any, right: Any) -> bool:
    """Whether two values, typed or as text, mean the same: 1 and '1.0', True and 'true', None and []."""
    return _plain(left) == _plain(right)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple) and value:
        return [_plain(item) for item in value]
    text = str(value).strip().lower()
    if text in _NOTHING:
        return None
    if text in ("true", "false"):
        return text
    try:
        return float(text)
    except ValueError:
        return text


def _means_none(flag: Flag, value: Any) -> bool:
    is_choice = flag.choices is not None and value in flag.choices
    # for a text flag an empty text is a value: `--system ''` means no system prompt
    words = _NONE - {""} if flag.kind == "str" else _NONE
    return flag.optional and isinstance(value, str) and value.strip().lower() in words and not is_choice


def _list(flag: Flag, given: list[Any]) -> list[Any] | None:
    if len(given) == 1 and isinstance(given[0], str) and given[0].lstrip().startswith("["):
        given = [_json(given[0])]
    is_empty = given == [[]]  # an explicit empty list `[]`, not a missing value
    if len(given) == 1 and isinstance(given[0], list):
        given = given[0]
    if not given:
        if is_empty:
            return []
        raise BadValue("needs at least one value")
    if len(given) == 1 and (given[0] is None or str(given[0]).lower() in _NONE):
        return None if flag.optional else []
    return [_checked(flag, _scalar(flag, item)) for item in given]


def _scalar(flag: Flag, value: Any) -> Any:
    if flag.kind == "json":
        parsed = _json(value) if isinstance(value, str) else value
        if not isinstance(parsed, dict):
            raise BadValue(f"takes a JSON object, not {value!r}", """write it as '{"key": "value"}'""")
        return parsed
    if flag.nested and isinstance(value, list):
        return json.dumps(value)
    if isinstance(value, list | dict):
        raise BadValue(f"takes one value, not {value!r}")
    if flag.kind == "bool":
        return as_bool(value)
    if flag.kind in ("int", "float"):
        return _number(flag, value)
    return str(value)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadValue(f"is not valid JSON ({error}): {text}", "quote it for the shell with '...'") from None


def _number(flag: Flag, value: Any) -> int | float:
    wanted = "an integer" if flag.kind == "int" else "a number"
    try:
        number = float("nan" if isinstance(value, bool) else value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or (flag.kind == "int" and number != int(number)):
        raise BadValue(f"takes {wanted}, not '{value}'")
    if flag.kind == "float":
        return number
    try:
        return int(value)  # exact where a float is not: seeds above 2**53
    except ValueError:
        return int(number)  # 1e3


def _checked(flag: Flag, value: Any) -> Any:
    if flag.is_regex:
        try:
            re.compile(value)
        except re.error as error:
            raise BadValue(f"is no regular expression ({error}): {value}") from None
    if flag.choices is not None and value not in flag.choices:
        options = ", ".join(flag.choices)
        if value in flag.refused:
            raise BadValue(f"{value} is not supported: {flag.refused[value]}", f"choose from: {options}")
        raise BadValue(f"cannot be '{value}'", f"choose from: {options}")
    if flag.kind in ("int", "float"):
        for bound, word, is_fine in (
            (flag.at_least, "at least", lambda low: value >= low),
            (flag.above, "above", lambda low: value > low),
            (flag.at_most, "at most", lambda high: value <= high),
            (flag.below, "below", lambda high: value < high),
        ):
            if bound is not None and not is_fine(bound):
                raise BadValue(f"must be {word} {bound:g}, not {value:g}")
    return value
