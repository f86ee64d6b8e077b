"""Counts of what happened to the rows, so that nothing is dropped silently."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class PartReport:
    """One data set (train or val): rows read, samples and tokens kept, rows dropped by reason with examples.

    learnt_tokens: tokens that count in the loss. seconds: the time that tokenizing took when the cache was built.
    """

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    learnt_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def sum(cls, reports: Iterable["PartReport"]) -> "PartReport":
        """Several reports added up."""
        total = cls()
        for one in reports:
            for name in ("rows", "samples", "tokens", "learnt_tokens", "truncated", "seconds"):
                setattr(total, name, getattr(total, name) + getattr(one, name))
            total.longest = max(total.longest, one.longest)
            for reason, count in one.dropped.items():
                total.dropped[reason] = total.dropped.get(reason, 0) + count
                total.examples.setdefault(reason, []).extend(one.examples[reason])
        return total

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self, name: str) -> list[str]:
        """The counts as text: one line, and one for each reason for dropping rows."""
        share = self.learnt_tokens / max(self.tokens, 1)
        mean = self.tokens / max(self.samples, 1)
        text = (
            f"{name}: {self.samples} samples of {self.rows} rows, {self.tokens} tokens ({share:.0%} learnt), "
            f"mean length {mean:.0f}, longest {self.longest}"
        )
        if self.truncated:
            text += f", {self.truncated} truncated"
        lines = [text]
        for reason, count in self.dropped.items():
            lines.append(f"{name}: dropped {count} rows: {reason}; e.g. {self.examples[reason][0]}")
        return lines


@dataclass
class DataReport:
    """Reports of the training and validation set, with the folders of their caches."""

    train: PartReport
    val: PartReport | None = None
    cache: dict[str, str] = field(default_factory=dict)  # part -> folder
    from_cache: dict[str, bool] = field(default_factory=dict)  # part -> found complete, not built now
    packs: dict[str, int] = field(default_factory=dict)  # part -> packed rows
    corpora: list[str] = field(default_factory=list)  # a line for each of several training corpora
    stream: str = ""  # describes data that is read and tokenized during training; then `train` is empty
    warnings: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The whole report as lines for a log."""
        lines = []
        for name, part in (("train", self.train), ("val", self.val)):
            if name == "train" and self.stream:
                lines.append(f"train: {self.stream}")
                continue
            if part is None:
                continue
            lines += part.lines(name)
            if name in self.packs:
                lines.append(f"{name}: packed into {self.packs[name]} rows")
            if name == "train":
                lines += [f"train: {line}" for line in self.corpora]
            how = (
                "read from the cache"
                if self.from_cache.get(name)
                else f"tokenized in {part.seconds:.1f} s into"
            )
            if name in self.cache:  # indexed datasets have none: they are used in place
                lines.append(f"{name}: {how} {self.cache[name]}")
        return lines + [f"warning: {warning}" for warning in self.warnings]
