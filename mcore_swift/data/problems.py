"""Problems of single rows, and how they are collected into a report."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..errors import UserError

SHOWN = 20  # problems listed individually; the rest are only counted


class RowError(Exception):
    """A row that cannot be used. kind: groups equal mistakes in the report; message: says what is wrong here."""

    def __init__(self, kind: str, message: str = "") -> None:
        super().__init__(kind, message)
        self.kind = kind
        self.message = message or kind


@dataclass(frozen=True)
class Problem:
    """A row that cannot be used: its place (`file:line`), the kind of mistake, and the mistake."""

    where: str
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass
class Tally:
    """Counts problems by kind; keeps the first few overall and the first three of each kind."""

    first: list[Problem] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def add(self, problems: Iterable[Problem]) -> None:
        for problem in problems:
            self.counts[problem.kind] += 1
            if len(self.first) < SHOWN:
                self.first.append(problem)
            examples = self.examples.setdefault(problem.kind, [])
            if len(examples) < 3:
                examples.append(str(problem))

    def errors(self, remedy: str) -> list[UserError]:
        """The first problems as errors, the last of which says how many more there are and gives the remedy."""
        errors = [UserError(str(problem)) for problem in self.first]
        more = self.total - len(self.first)
        if more > 0:
            errors.append(UserError(f"... and {more} more rows that cannot be used"))
        if errors:
            errors[-1] = UserError(errors[-1].message, remedy)
        return errors
