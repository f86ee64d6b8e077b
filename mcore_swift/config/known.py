"""Handling of known flags that we do not support yet; the tables are in `not_yet` and `not_yet_swift`."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from ..errors import UserError
from .values import same_value

ANY = object()  # every value is accepted, with a notice that it has no effect


@dataclasses.dataclass(frozen=True)
class NotYet:
    """One flag of the table.

    harmless: values that request nothing, or ANY. reason: why any other is refused, or why the flag has no effect.
    remedy: what to do instead.
    """

    harmless: tuple[Any, ...] | object
    reason: str
    remedy: str = ""

    @property
    def is_moot(self) -> bool:
        """Whether any value is accepted, with a notice that the flag has no effect here."""
        return self.harmless is ANY

    def accepts(self, value: Any) -> bool:
        return self.is_moot or any(same_value(value, fine) for fine in self.harmless)

    def refusal(self, label: str, value: Any) -> UserError:
        """The error for a value that is not harmless. label: the flag as the user wrote it."""
        shown = "" if value is True else f" {' '.join(map(str, value)) if isinstance(value, list) else value}"
        return UserError(f"{label}{shown}: {self.reason}", self.remedy or f"drop {label}")


def settings(reason: str, remedy: str = "", **defaults: Any) -> Iterator[tuple[str, NotYet]]:
    """An entry for each keyword: a flag and its harmless value (a tuple: several values)."""
    for name, harmless in defaults.items():
        values = harmless if isinstance(harmless, tuple) or harmless is ANY else (harmless,)
        yield name, NotYet(values, reason, remedy)


def refused(reason: str, remedy: str = "", *, flags: str) -> Iterator[tuple[str, NotYet]]:
    """Flags for which only "not given" is harmless."""
    return settings(reason, remedy, **dict.fromkeys(flags.split(), None))


def table(*parts: Iterator[tuple[str, NotYet]]) -> dict[str, NotYet]:
    return dict(entry for part in parts for entry in part)
