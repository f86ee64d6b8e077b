"""`mcore-swift doctor`: what is installed, what is missing, what conflicts, and what can run here."""

import importlib.util
import json
import sys
from collections.abc import Sequence

from ..errors import UserError

HELP = """usage: mcore-swift doctor [--json]

Says what is installed and in the supported range, which optional parts are missing and what each would
give, which versions clash, and what this machine can run. Exit code 1 when a required package is missing
or clashes."""


def run(argv: Sequence[str]) -> int:
    """Print the diagnosis; returns 1 if something required is missing or conflicts, else 0."""
    if any(word in ("-h", "--help") for word in argv):
        print(HELP)
        return 0
    unknown = [word for word in argv if word != "--json"]
    if unknown:
        raise UserError(f"doctor takes no {unknown[0]}", "its only flag is --json")
    if importlib.util.find_spec("packaging") is None:  # the doctor itself needs it
        print(
            "packaging is missing, without which no version can be judged: pip install packaging",
            file=sys.stderr,
        )
        return 1
    from .diagnosis import diagnose, report

    diagnosis = diagnose()
    if argv:
        print(json.dumps(diagnosis.as_json(), indent=2))
    else:
        print("\n".join(report(diagnosis)))
    return 0 if diagnosis.is_healthy else 1
