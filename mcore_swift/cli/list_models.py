"""`list-models`: the families that can be trained."""

import json
from collections.abc import Sequence

from ..errors import UserError
from ..models.catalog import SUPPORTED_ARCHITECTURES


def run(argv: Sequence[str]) -> int:
    """Print each family with the architectures of config.json it covers; `--json` for programs."""
    families: dict[str, list[str]] = {}
    for architecture, family in SUPPORTED_ARCHITECTURES.items():
        families.setdefault(family, []).append(architecture)
    if list(argv) == ["--json"]:
        print(json.dumps(families, indent=2))
        return 0
    if argv and argv[0] not in ("-h", "--help"):
        raise UserError(f"list-models takes no {argv[0]}", "its only flag is --json")
    width = max(map(len, families))
    print(f"{'model_type':<{max(width, 10)}}  architectures in config.json")
    for family, architectures in sorted(families.items()):
        print(f"{family:<{max(width, 10)}}  {', '.join(architectures)}")
    return 0
