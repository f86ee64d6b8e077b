"""The model's name and author, for {{NAME}} and {{AUTHOR}} in ms-swift's self-cognition data."""

from collections.abc import Sequence
from typing import Any

NAME, AUTHOR = "{{NAME}}", "{{AUTHOR}}"


def with_names(row: dict[str, Any], names: Sequence[str], authors: Sequence[str]) -> dict[str, Any]:
    """The row with both placeholders replaced wherever they occur.

    names, authors: the Chinese and the English one, or one for both; rows with `tag` 'en' get the English one.
    Empty: the placeholder is kept.
    """
    number = 1 if row.get("tag") == "en" else 0
    given = {
        placeholder: choice[min(number, len(choice) - 1)]
        for placeholder, choice in ((NAME, names), (AUTHOR, authors))
        if choice
    }
    return _filled(row, given) if given else row


def _filled(value: Any, given: dict[str, str]) -> Any:
    if isinstance(value, str):
        for placeholder, text in given.items():
            value = value.replace(placeholder, text)
        return value
    if isinstance(value, dict):
        return {name: _filled(item, given) for name, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, given) for item in value]
    return value
