"""Parsing command lines and configuration files into arguments; all mistakes are reported together."""

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..errors import UserError, raise_together
from .aliases import ALIASES, LAYERS_PER_STAGE, virtual_stages
from .arguments import COMMANDS
from .base import Arguments, read_args_file
from .fields import Flag, flags_of
from .files import SUFFIXES, apply_env, read_config
from .known import NotYet
from .not_yet import NOT_YET
from .not_yet_export import EXPORT_HARMLESS, MERGE_HARMLESS
from .not_yet_swift import SWIFT_NAMES
from .not_yet_trainer import NOT_YET_TRAINER
from .resumed import (
    checkpoint_of,
    contradictions,
    named_base,
    of_today,
    overruled,
    resumed_from,
    starts_of,
    taken_over,
)
from .tuner import without_effect
from .values import BadValue, at_home, convert, same_value

_FLAG = re.compile(r"--([A-Za-z0-9_]+)")
_DASHES = re.compile(
    r"[-\u2010-\u2015]+([A-Za-z]\w*)(=.*)?"
)  # a single dash, or dashes that word processors put in place of two

_NO_FLAG = ""
_PATHS = (
    *("model", "dataset", "val_dataset", "adapters", "mcore_model", "mcore_adapter", "resume"),
    *("resume_from_checkpoint", "output_dir", "cache_dir", "logging_dir"),
)

T = TypeVar("T", bound=Arguments)


@dataclasses.dataclass(frozen=True)
class Given:
    """One flag as the user wrote it.

    name: the flag's current name. label: the flag in messages. values: texts, or the single value from a file.
    """

    name: str
    label: str
    values: list[Any]

    def value(self) -> Any:
        """The value, without knowing the flag's type."""
        if not self.values:
            return True
        return self.values[0] if len(self.values) == 1 else self.values


@dataclasses.dataclass
class Reading(Generic[T]):
    """The result of reading a command line.

    args: the arguments; a flag named in `bad` has its default. errors: everything that is wrong.
    notices: lines the user should see even when nothing is wrong.
    """

    args: T
    errors: list[UserError]
    notices: list[str]
    bad: set[str]

    def concerns(self, error: UserError) -> bool:
        """Whether an error found later is new, and not about a flag that is already known to be wrong."""
        named = _FLAG.findall(error.message)
        return self.bad.isdisjoint(named) and not (named and named[0] in self.told())

    def add(self, errors: list[UserError]) -> None:
        """Add the errors of another check, without those that follow from known mistakes."""
        self.errors += [error for error in errors if self.concerns(error)]

    def told(self) -> set[str]:
        """The flags that the errors so far are about: the first one named by each."""
        return {match[1] for error in self.errors if (match := _FLAG.search(error.message))}


def parse(cls: type[T], argv: Sequence[str], *, notify: Callable[[str], None] | None = None) -> T:
    """The arguments of a command line.

    argv: flags, optionally after a .yaml, .yml or .json file (or with --config <file>); the command line wins
    over the file. notify: gets each notice; the default writes to stderr, on the first process only.
    Raises UserError, with all mistakes in one.
    """
    return _told(read(cls, argv), notify)


def _told(reading: "Reading[T]", notify: Callable[[str], None] | None) -> T:
    for notice in reading.notices:
        (notify or print_notice)(notice)
    raise_together(reading.errors)
    return reading.args


def from_values(cls: type[T], values: Mapping[str, Any], *, notify: Callable[[str], None] | None = None) -> T:
    """`parse` for flags given in Python: names without dashes, values of any equivalent type."""
    reader = _Reader(cls)
    reader.take_values(values)
    return _told(reader.reading(), notify)


def parse_command(command: str, argv: Sequence[str]) -> Arguments:
    """`parse` with the class of a command: sft, pt or export."""
    return parse(COMMANDS[command], argv)


def print_notice(text: str) -> None:
    """Write a notice to stderr, unless this is one of several processes and not the first."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)


def read(cls: type[T], argv: Sequence[str]) -> Reading[T]:
    """`parse` without raising. Sets the environment variables of a file's ENV section."""
    reader = _Reader(cls)
    reader.collect(argv)
    return reader.reading()


def named_flags(argv: Sequence[str]) -> set[str]:
    """Names of the flags on a command line or in its configuration file, whichever command they belong to."""
    reader = _Reader(Arguments)
    reader.collect(argv, with_env=False)
    return set(reader.given)


class _Reader:
    """Collects flags from all sources, then converts them to their types, then checks them together."""

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

    def collect(self, argv: Sequence[str], *, with_env: bool = True) -> None:
        """Fill `given` from the file and the command line, the latter winning.

        with_env: set the variables of the file's ENV section.
        """
        config, pairs = self._split(list(argv))
        if config is not None:
            try:
                values, env = read_config(config)
            except UserError as error:
                self.errors.append(error)
                self.bad |= set(self.cls.REQUIRED)  # they may be in the unreadable file
            else:
                self.notices += apply_env(env, config) if with_env else []
                self._take([(f"{config}: {name}", name, [value]) for name, value in values.items()])
        self._take([(f"--{name}", name, values) for name, values in pairs])

    def take_values(self, values: Mapping[str, Any]) -> None:
        """Fill `given` from Python's values."""
        self._take([(f"--{name}", name, [_plain_value(value)]) for name, value in values.items()])

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
            elif (flag := self._misspelt(token)) is not None:
                self.errors.append(
                    UserError(f"'{token}' is no flag", f"write --{flag}, with two plain dashes")
                )
                self.bad.add(flag)
                pairs.append((_NO_FLAG, []))  # takes the values that follow
            elif pairs:
                pairs[-1][1].append(token)
            else:
                self.errors.append(UserError(f"'{token}' belongs to no flag", "write it after a --flag"))
        for name, values in pairs:
            if name == "config":
                files += values or [""]
        if len(files) > 1:
            self.errors.append(UserError(f"several configuration files: {', '.join(files)}", "give one"))
        return (files[0] if files else None), [pair for pair in pairs if pair[0] not in ("config", _NO_FLAG)]

    def _misspelt(self, token: str) -> str | None:
        """The flag meant by a word with the wrong dashes; None if the word may be a value."""
        match = _DASHES.fullmatch(token)
        name = match[1].replace("-", "_") if match else None
        return name if name in self.flags or name in ALIASES else None

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
        """The flag under its current name; None if its old value is invalid."""
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
                value = convert(flag, one.values)
            except BadValue as error:
                self._fail(one.name, f"{one.label} {error}", error.remedy)
            else:
                typed[one.name] = at_home(value) if one.name in _PATHS else value
        if typed.get("ignore_args_error"):
            self.notices += [f"ignored: {error.message}" for error in self.unknown]
        else:
            self.errors += self.unknown
        self._load_args(typed)
        args = self.cls(**typed)
        asked = [name for name in self.given if name in typed and typed[name] != self.flags[name].default]
        if idle := without_effect(asked, getattr(args, "tuner_type", "lora")):
            self.notices.append(f"--{', --'.join(idle)}: no effect with --tuner_type {args.tuner_type}")
        reading = Reading(args, self.errors, self.notices, self.bad)
        reading.add(reading.args.problems())
        return reading

    def _not_a_flag(self, one: Given) -> None:
        """Classify a flag that this command does not have: harmless, refused, another command's, or unknown."""
        on_swift = self.cls.PROGRAM == "swift"
        of_export = MERGE_HARMLESS if on_swift else EXPORT_HARMLESS
        known = of_export.get(one.name) if self.cls.COMMAND == "export" else None
        known = known or (NOT_YET_TRAINER if on_swift else NOT_YET).get(one.name)
        if known is not None:
            self._judge(one, known)
            return
        others = [f"megatron {name}" for name, cls in COMMANDS.items() if one.name in flags_of(cls)]
        if others:
            own = SWIFT_NAMES.get(one.name)
            remedy = f"use --{own}" if on_swift and own in self.flags else f"use `{others[0]}`, or drop it"
            self._fail(one.name, f"{one.label} is a flag of `{others[0]}`, not of `{self.command}`", remedy)
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
        self.notices += overruled(typed) if self.cls.COMMAND != "export" else []
        path = checkpoint_of(self.cls, typed)
        if path is not None:
            self._take_saved(typed, path)
        if base := named_base(typed):
            typed["model"] = base
            self.notices.append(f"--model {base}: the base that the adapter names")
        resumed = typed.get("resume", typed.get("resume_from_checkpoint"))
        resumed = [] if resumed in (None, "none", "auto", "true") else [resumed]
        if any(not Path(folder).is_dir() for folder in (*resumed, *starts_of(typed))):
            self.bad.add("model")  # args.json might name it; the error for the missing folder suffices

    def _take_saved(self, typed: dict[str, Any], path: Path) -> None:
        try:
            saved = of_today(read_args_file(path))
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
                self._fail(name, f"{path}: {name} {error}", f"give --{name}, which then counts")
        told = [name for name in taken if typed.get(name) != self.flags[name].default]
        if told:
            self.notices.append(f"from {path}: {', '.join(told)}")

    def _translate_virtual_stages(self) -> None:
        """Replace v3's number of layers per virtual stage, if given, by the number of virtual stages."""
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


def _plain_value(value: Any) -> Any:
    """As a configuration file would hold it: lists for tuples, text for paths and for the types of torch."""
    if isinstance(value, list | tuple):
        return [_plain_value(item) for item in value]
    if value is None or isinstance(value, str | bool | int | float | dict):
        return value
    return str(value).removeprefix("torch.")


def nearest(name: str, flags: dict[str, Flag]) -> str | None:
    """The flag whose name is most similar to `name`: of this command, else of all that are known."""
    import difflib  # imported only after a typing mistake

    for known in (flags, ALIASES, NOT_YET):
        close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
        if close:
            return close[0]
    return None
