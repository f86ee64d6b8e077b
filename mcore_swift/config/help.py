"""`--help` of a command, written from its fields."""

import shutil
import textwrap

from .arguments import Arguments
from .fields import Flag, flags_of

_INDENT = " " * 6
_WIDEST = 100
_KINDS = {"str": "TEXT", "int": "INTEGER", "float": "NUMBER", "json": "JSON"}

_FOOTER = (
    "Flags are written --name value or --name=value; --switch alone means true; a list takes several values.",
    "A first argument that ends in .yaml, .yml or .json (or --config FILE) gives flags as names and "
    "values; those on the command line win. Its ENV section sets environment variables that are not set "
    "yet.",
    "Names of ms-swift 3 are accepted with a note. A flag of ms-swift that is not listed here is accepted "
    "when it asks for nothing (--context_parallel_size 1) and refused with the reason when it does.",
)


def help_text(cls: type[Arguments], command: str, examples: str = "") -> str:
    """What `command --help` prints: usage, all flags by group with their defaults, examples."""
    width = min(_WIDEST, shutil.get_terminal_size().columns)
    parts = [f"usage: {command} [config.yaml] [--flag value ...]", "", _first_line(cls)]
    if examples:
        parts += ["", "examples:", textwrap.indent(examples.strip(), "  ")]
    groups: dict[str, list[Flag]] = {}
    for flag in flags_of(cls).values():
        groups.setdefault(flag.group, []).append(flag)
    for title, flags in groups.items():
        parts += ["", title]
        for flag in flags:
            parts += flag_lines(flag, width, is_required=flag.name in cls.REQUIRED)
    parts += ["", *(textwrap.fill(paragraph, width) for paragraph in _FOOTER)]
    return "\n".join(parts) + "\n"


def flag_lines(flag: Flag, width: int, *, is_required: bool = False) -> list[str]:
    """One flag: a line with its name, values and default, and its help below."""
    default = "required" if is_required else f"default: {default_of(flag)}"
    text = textwrap.wrap(flag.help, width, initial_indent=_INDENT, subsequent_indent=_INDENT)
    return [f"  --{flag.name} {takes(flag)}  ({default})", *text]


def takes(flag: Flag) -> str:
    """What follows the flag: the kind of value, or the choices."""
    if flag.kind == "bool":
        return "true|false"
    word = "|".join(flag.choices) if flag.choices else _KINDS[flag.kind]
    return f"{word} ..." if flag.is_list else word


def default_of(flag: Flag) -> str:
    """The default as a user would write it, or the text that explains it."""
    if flag.default_text:
        return flag.default_text
    if flag.default is None or flag.default == []:
        return "none"
    if isinstance(flag.default, bool):
        return str(flag.default).lower()
    if isinstance(flag.default, list):
        return " ".join(flag.default)
    return f"{flag.default:g}" if isinstance(flag.default, float) else str(flag.default)


def _first_line(cls: type[Arguments]) -> str:
    return (cls.__doc__ or "").strip().split("\n")[0]
