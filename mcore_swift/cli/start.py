"""Starting a command: its help, all checks of the command line, then its processes."""

from collections.abc import Callable, Sequence

import launch
from launch.run import call

from ..config import COMMANDS, SWIFT_COMMANDS, Arguments, parse, print_notice, read
from ..config.help import help_text
from ..errors import raise_together
from .checks import notices_of, problems_of


def start(
    command: str,
    argv: Sequence[str],
    target: str,
    examples: str = "",
    instead: Callable[[Sequence[str]], int | None] | None = None,
) -> int:
    """Check the command line, then run the command in the processes that the environment asks for.

    target: 'module:function', called with argv in each of them. examples: for --help. instead: called before any
    process is started; if it returns an exit code, the command ends with it. Returns the exit code.
    Raises UserError with all mistakes that can be found without heavy imports or other processes.
    """
    argv = list(argv)
    if wants_help(argv):
        cls = class_of(command)
        print(help_text(cls, f"{cls.PROGRAM} {cls.COMMAND}", examples), end="")
        return 0
    if launch.read_place().mode != "joined":
        check(command, argv)
        if instead is not None and (code := instead(argv)) is not None:
            return code
        return launch.run(command, argv, target)

    def check_and_work(argv: list[str]) -> int:
        check(command, argv)
        return call(target, argv)

    # all processes get here and find the same mistakes, which `run` prints once
    return launch.run(command, argv, check_and_work)


def wants_help(argv: Sequence[str]) -> bool:
    """Whether a command line asks for help, whatever else it says."""
    return not argv or "--help" in argv or "-h" in argv or argv[0] == "help"


def class_of(command: str) -> type[Arguments]:
    """The arguments of a command: a name of `COMMANDS`, or of `SWIFT_COMMANDS` after 'swift-'."""
    name = command.removeprefix("swift-")
    return COMMANDS[name] if name == command else SWIFT_COMMANDS[name]


def arguments(command: str, argv: Sequence[str]) -> Arguments:
    """The arguments of a command line that `start` has checked, without printing its notices again."""
    return parse(class_of(command), argv, notify=lambda notice: None)


def check(command: str, argv: Sequence[str]) -> None:
    """Check a command line, the files that it names and the layout, and print its notices.

    Raises UserError with all mistakes.
    """
    reading = read(class_of(command), argv)
    world_size = launch.world_size_from_env()  # after `read`, because a file's ENV section may set it
    for problems in problems_of(reading.args, world_size):
        reading.add(problems)
    for notice in reading.notices:
        print_notice(notice)
    raise_together(reading.errors)
    for notice in notices_of(reading.args, world_size):
        print_notice(notice)
