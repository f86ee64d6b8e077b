"""Command line and configuration file to arguments; whatever is wrong with them is reported together."""

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..errors import UserError, raise_together
from .aliases import ALIASES, LAYERS_PER_STAGE, virtual_stages
from .arguments import COMMANDS
from .base import Arguments, read_args_file
from .fields import Flag, flags_of
from .files import SUFFIXES, apply_env, read_config
from .known import NotYet
from .not_yet import EXPORT_HARMLESS, NOT_YET
from .not_yet_trainer import NOT_YET_TRAINER
from .resumed import checkpoint_of, contradictions, named_base, resumed_from, taken_over
from .values import BadValue, convert, same_value

_FLAG = re.compile(r"--([A-Za-z0-9_]+)")

T = TypeVar("T", bound=Arguments)


@dataclasses.dataclass(frozen=True)
class Given:
    """One flag as somebody wrote it.

    name: the flag's name of today. label: how a message calls it. values: texts, or the one value of a file.
    """

    name: str
    label: str
    values: list[Any]

    def value(self) -> Any:
        """The value as far as it can be told without the flag's type."""
        if not self.values:
            return True
        return self.values[0] if len(self.values) == 1 else self.values


@dataclasses.dataclass
class Reading(Generic[T]):
    """What was understood of a command line.

    args: the arguments; a flag named in `bad` has its default. errors: all that is wrong.
    notices: lines the user should see even when nothing is wrong.
    """

    args: T
    errors: list[UserError]
    notices: list[str]
    bad: set[str]

    def concerns(self, error: UserError) -> bool:
        """Whether an error found later says something new: not when its flag was found wrong before."""
        named = _FLAG.findall(error.message)
        return self.bad.isdisjoint(named) and not (named and named[0] in self.told())

    def add(self, errors: list[UserError]) -> None:
        """Take in what another check found, less what follows from mistakes known already."""
        self.errors += [error for error in errors if self.concerns(error)]

    def told(self) -> set[str]:
        """The flags that the errors so far are about: the first that each names."""
        return {match[1] for error in self.errors if (match := _FLAG.search(error.message))}


def parse(cls: type[T], argv: Sequence[str], *, notify: Callable[[str], None] | None = None) -> T:
    """The arguments of a command line.

    argv: flags, optionally after a .yaml, .yml or .json file (or with --config <file>); the command line wins
    over the file. notify: gets each notice; the default writes to stderr, on the first process only.
    Raises UserError, with all mistakes in one.
    """
    reading = read(cls, argv)
    for notice in reading.notices:
        (notify or print_notice)(notice)
    raise_together(reading.errors)
    return reading.args


def parse_command(command: str, argv: Sequence[str]) -> Arguments:
    """`parse` with the class of a command: sft, pt or export."""
    return parse(COMMANDS[command], argv)


def print_notice(text: str) -> None:
    """Write a notice to stderr, unless this is one of several processes and not the first."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)


def read(cls: type[T], argv: Sequence[str]) -> Reading[T]:
    """What `parse` does, without raising: see `Reading`. Sets the variables of a file's ENV section."""
    reader = _Reader(cls)
    reader.collect(argv)
    return reader.reading()


class _Reader:
    """Gathers flags from all sources, then types them, then checks them together."""

    def __init__(self, cls: type[Arguments]) -> None:
        self.cls = cls
        self.command = f"{cls.PROGRAM} {cls.COMMAND}"
        self.flags = flags_of(cls)
        self.given: dict[str, Given] = {}
        self.unknown: list[UserError] = []
        self.errors: list[UserError] = []
        self.notices: list[str] = []
        self.bad: set[str] = set()

    # -- gathering

    def collect(self, argv: Sequence[str]) -> None:
        """Fill `given` from the file and the command line, the latter winning."""
        config, pairs = self._split(list(argv))
        if config is not None:
            try:
                values, env = read_config(config)
            except UserError as error:
                self.errors.append(error)
            else:
                self.notices += apply_env(env, config)
                self._take([(f"{config}: {name}", name, [value]) for name, value in values.items()])
        self._take([(f"--{name}", name, values) for name, values in pairs])

    def _split(self, argv: list[str]) -> tuple[str | None, list[tuple[str, list[str]]]]:
        """(configuration file, flags with the values that follow each)."""
        files: list[str] = []
        if argv and not argv[0].startswith("--") and argv[0].endswith(SUFFIXES):
            files.append(argv.pop(0))
        pairs: list[tuple[str, list[str]]] = []
        for token in argv:
            if token.startswith("--") and len(token) > 2:
                name, has_value, value = token[2:].partition("=")
                pairs.append((name.replace("-", "_"), [value] if has_value else []))
            elif pairs:
                pairs[-1][1].append(token)
            else:
                self.errors.append(UserError(f"'{token}' belongs to no flag", "write it after a --flag"))
        for name, values in pairs:
            if name == "config":
                files += values or [""]
        if len(files) > 1:
            self.errors.append(UserError(f"several configuration files: {', '.join(files)}", "give one"))
        return (files[0] if files else None), [pair for pair in pairs if pair[0] != "config"]

    def _take(self, entries: list[tuple[str, str, list[Any]]]) -> None:
        """Add the flags of one source; they win over those of earlier sources."""
        found: dict[str, Given] = {}
        for label, name, values in entries:
            one = self._renamed(label, name.replace("-", "_"), values)
            if one is None:
                continue
            before = found.get(one.name)
            if before is not None and not same_value(before.value(), one.value()):
                flag = self.flags.get(one.name)
                if flag is not None and flag.is_list:
                    self._fail(one.name, f"{one.label} is given twice", "give all values after one flag")
                else:
                    self.notices.append(f"--{one.name} is given twice; the last, {one.value()}, counts")
            found[one.name] = one
        self.given |= found

    def _renamed(self, label: str, name: str, values: list[Any]) -> Given | None:
        """The flag under its name of today; None when its old value makes no sense."""
        alias = ALIASES.get(name)
        if alias is None or name in self.flags:
            return Given(name, label, values)
        one = Given(name, label, values)
        if alias.convert is not None and len(values) <= 1:
            try:
                values = [alias.convert(one.value())]
            except BadValue as error:
                self._fail(alias.name, f"{label} {error}")
                return None
        how = f", {alias.how}: {values[0]}" if alias.how else ""
        self.notices.append(f"{label} is now --{alias.name}{how}")
        return Given(alias.name, f"{label} (now --{alias.name})", values)

    # -- typing

    def reading(self) -> Reading:
        """Type, complete and check what was gathered."""
        self._translate_virtual_stages()
        typed: dict[str, Any] = {}
        for one in self.given.values():
            flag = self.flags.get(one.name)
            if flag is None:
                self._not_a_flag(one)
                continue
            try:
                typed[one.name] = convert(flag, one.values)
            except BadValue as error:
                self._fail(one.name, f"{one.label} {error}", error.remedy)
        if typed.get("ignore_args_error"):
            self.notices += [f"ignored: {error.message}" for error in self.unknown]
        else:
            self.errors += self.unknown
        self._load_args(typed)
        reading = Reading(self.cls(**typed), self.errors, self.notices, self.bad)
        reading.add(reading.args.problems())
        return reading

    def _not_a_flag(self, one: Given) -> None:
        """Judge a flag this command does not have: harmless, refused, another command's, or unknown."""
        known = EXPORT_HARMLESS.get(one.name) if self.cls.COMMAND == "export" else None
        known = known or (NOT_YET_TRAINER if self.cls.PROGRAM == "swift" else NOT_YET).get(one.name)
        if known is not None:
            self._judge(one, known)
            return
        others = [f"megatron {name}" for name, cls in COMMANDS.items() if one.name in flags_of(cls)]
        if others:
            self._fail(one.name, f"{one.label} is a flag of `{others[0]}`, not of `{self.command}`")
            return
        near = nearest(one.name, self.flags)
        remedy = f"did you mean --{near}?" if near else f"see `{self.command} --help`"
        self.bad |= {one.name, near or ""}
        self.unknown.append(UserError(f"{one.label}: no such flag", remedy))

    def _judge(self, one: Given, known: NotYet) -> None:
        if not known.accepts(one.value()):
            self.bad.add(one.name)
            self.errors.append(known.refusal(one.label, one.value()))
        elif known.is_moot:
            self.notices.append(f"{one.label}: {known.reason}")

    def _fail(self, name: str, message: str, remedy: str = "") -> None:
        self.bad.add(name)
        self.errors.append(UserError(message, remedy))

    # -- values that other files hold

    def _load_args(self, typed: dict[str, Any]) -> None:
        """Complete `typed` from the args.json of the checkpoint that is resumed, started from or exported."""
        path = checkpoint_of(self.cls, typed)
        if path is not None:
            self._take_saved(typed, path)
        if base := named_base(self.cls, typed):
            typed["model"] = base
            self.notices.append(f"--model {base}: the base that the adapter names")

    def _take_saved(self, typed: dict[str, Any], path: Path) -> None:
        try:
            saved = read_args_file(path)
        except UserError as error:
            self.errors.append(error)
            return
        if resumed_from(self.cls, typed):
            for error in contradictions(self.cls, typed, saved, path):
                self._fail(error.message.split()[0].removeprefix("--"), error.message, error.remedy)
        taken = taken_over(self.cls, self.given, saved)
        for name in taken:
            try:
                typed[name] = convert(self.flags[name], [saved[name]])
            except BadValue as error:
                self._fail(name, f"{path}: {name} {error}", error.remedy)
        if taken:
            self.notices.append(f"from {path}: {', '.join(taken)}")

    def _translate_virtual_stages(self) -> None:
        """v3's layers of a virtual stage, where given, as today's number of virtual stages."""
        one = self.given.pop(LAYERS_PER_STAGE, None)
        if one is None or same_value(one.value(), None):
            return
        new = "virtual_pipeline_model_parallel_size"
        pipeline, model = (
            self.given[name].value() if name in self.given else default
            for name, default in (("pipeline_model_parallel_size", 1), ("model", ""))
        )
        try:
            stages = virtual_stages(one.value(), pipeline, model)
        except BadValue as error:
            self._fail(new, f"{one.label} {error}", f"give --{new}")
        else:
            self.given[new] = Given(new, f"{one.label} (now --{new})", [stages])
            self.notices.append(f"{one.label} is now --{new}: {stages}")


def nearest(name: str, flags: dict[str, Flag]) -> str | None:
    """The known flag whose name is most like `name`: one of this command, else one we know of."""
    import difflib  # only those who mistype wait for it

    for known in (flags, ALIASES, NOT_YET):
        close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
        if close:
            return close[0]
    return None
