"""The base class of all arguments: derived values, checks, and saving to and loading from args.json."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

from .. import __version__
from ..errors import UserError
from .fields import flags_of
from .values import BadValue, convert

ARGS_FILE = "args.json"


@dataclasses.dataclass(kw_only=True)
class Arguments:
    """Base of the groups of flags, and of the commands composed of them: one flat namespace of attributes.

    A group may define `fill(self)`, which replaces values that were not given by what follows from others, and
    `check(self)`, which yields a UserError for each inconsistency. Both run for every group. Neither reads files, and
    `fill` is idempotent, so that args.json is read back unchanged.
    """

    TITLE: ClassVar[str] = "General"
    COMMAND: ClassVar[str] = ""
    PROGRAM: ClassVar[str] = "megatron"
    REQUIRED: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for fill in self._own("fill"):
            fill(self)

    def problems(self) -> list[UserError]:
        """All inconsistencies in the values."""
        missing = [
            UserError(f"--{name} is missing", f"add --{name} {_EXAMPLES.get(name, '<value>')}")
            for name in self.REQUIRED
            if not getattr(self, name)
        ]
        return missing + [problem for check in self._own("check") for problem in check(self)]

    def to_dict(self) -> dict[str, Any]:
        """All values as JSON, with the command and the version that wrote them."""
        about = {"command": self.COMMAND, "mcore_swift_version": __version__}
        return about | dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. Keys that this class has no flag for are ignored.

        Raises UserError for a value that does not fit its flag.
        """
        known = {}
        for name, flag in flags_of(cls).items():
            if name not in values:
                continue
            try:
                known[name] = [] if values[name] == [] else convert(flag, [values[name]])
            except BadValue as error:
                raise UserError(f"{ARGS_FILE}: {name} {error}", error.remedy) from None
        return cls(**known)

    def save(self, folder: str | Path) -> Path:
        """Write `folder`/args.json; returns its path. The model's folder is made absolute."""
        path = Path(folder) / ARGS_FILE
        values = self.to_dict()
        if values.get("model"):
            values["model"] = found_from_anywhere(values["model"])
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read `folder`/args.json. Raises UserError if it is missing or not valid JSON."""
        return cls.from_dict(read_args_file(Path(folder) / ARGS_FILE))

    def _own(self, method: str) -> Iterator[Any]:
        """The method as defined by each class in the inheritance order, groups first."""
        for cls in reversed(type(self).__mro__):
            if method in cls.__dict__:
                yield cls.__dict__[method]


_EXAMPLES = {
    "model": "<folder of a Hugging Face checkpoint>",
    "dataset": "<file.jsonl> [more files]",
    "gpu": "h100",
}


def found_from_anywhere(model: str) -> str:
    """The absolute path if `model` is a folder; otherwise `model` unchanged."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_dir() else model


def read_args_file(path: str | Path) -> dict[str, Any]:
    """An args.json as a dict. Raises UserError if it is missing or not valid JSON."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", "give a checkpoint folder that holds args.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, not an object of arguments")
    return values


def find_args_file(folder: str | Path) -> Path | None:
    """args.json of a checkpoint or run folder, else of the newest run or checkpoint in it; None if there is none."""
    folder = Path(folder)
    own = folder / ARGS_FILE
    if own.is_file():
        return own
    return max(folder.glob(f"*/{ARGS_FILE}"), key=lambda path: path.stat().st_mtime, default=None)
