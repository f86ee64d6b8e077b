"""Entry points of the console commands `mcore-swift`, `megatron` and `swift`.

A subcommand is a module with `run(argv) -> exit code`, imported on demand.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

from .. import __version__
from ..errors import UserError
from .routes import MCORE_SWIFT, MEGATRON, SWIFT, Program

INTERRUPTED = 130  # 128 + SIGINT, as shells count
BROKEN_PIPE = 141  # 128 + SIGPIPE: the reader of our output has closed the pipe


def main(argv: Sequence[str] | None = None) -> int:
    """`mcore-swift <command> ...`; returns the exit code."""
    return _guarded(MCORE_SWIFT, argv)


def megatron_main(argv: Sequence[str] | None = None) -> int:
    """`megatron <command> ...`, as users of ms-swift type it; returns the exit code."""
    return _guarded(MEGATRON, argv)


def swift_main(argv: Sequence[str] | None = None) -> int:
    """`swift <command> ...`, as users of ms-swift type it; returns the exit code."""
    return _guarded(SWIFT, argv)


def _guarded(program: Program, argv: Sequence[str] | None) -> int:
    """Run a program; a user's mistake is printed and gives exit code 2, without a traceback."""
    try:
        code = _dispatch(program, list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # here, where a broken pipe can be caught
        return code
    except UserError as error:
        from launch.report import print_user_error

        return print_user_error(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at exit
        return BROKEN_PIPE


def _dispatch(program: Program, argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview(program))
        return 0
    if argv[0] in ("-v", "--version", "version"):
        print(f"mcore-swift {__version__}")
        return 0
    name, rest = argv[0].replace("_", "-"), argv[1:]
    route = program.commands.get(name)
    if isinstance(route, Program):
        return _dispatch(route, rest)
    if route is not None:
        return import_module(route.module).run(rest)
    if name in program.refused:
        raise UserError(
            f"{program.name} {name}: {program.refused[name].reason}", program.refused[name].instead
        )
    raise UserError(f"{program.name} {argv[0]}: no such command", _near(name, program))


def _near(name: str, program: Program) -> str:
    import difflib

    near = difflib.get_close_matches(name, [*program.commands, *program.refused], n=1)
    if near:
        return f"did you mean {program.name} {near[0]}?"
    return f"the commands are: {', '.join(program.commands)}"


def _overview(program: Program) -> str:
    lines = [
        f"usage: {program.name} <command> [config.yaml] [--flag value ...]",
        "",
        program.about,
        "",
        "commands:",
    ]
    lines += _table({name: route.about for name, route in program.commands.items()})
    if program.refused:
        lines += ["", "not there yet, with what to use instead:"]
        lines += _table({name: refusal.instead for name, refusal in program.refused.items()})
    return "\n".join([*lines, "", f"`{program.name} <command> --help` lists its flags."])


def _table(rows: Mapping[str, str]) -> list[str]:
    width = max(map(len, rows)) + 2
    return [f"  {name:<{width}}{text}" for name, text in rows.items()]


if __name__ == "__main__":
    sys.exit(main())
