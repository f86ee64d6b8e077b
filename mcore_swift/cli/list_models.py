"""`list-models`: the model families that can be trained, their features, and the tested kinds of parallelism."""

import json
from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from ..models.catalog import FEATURES, SUPPORTED_ARCHITECTURES, proven


def run(argv: Sequence[str]) -> int:
    """Print each family with the architectures in config.json that it covers; `--json` for programs."""
    rows = families()
    if list(argv) == ["--json"]:
        print(json.dumps(rows, indent=2))
        return 0
    if argv and argv[0] not in ("-h", "--help"):
        raise UserError(f"list-models takes no {argv[0]}", "its only flag is --json")
    table = [("architecture in config.json", "family", "proven in", "what it has")]
    for row in rows:
        for architecture in row["architectures"]:
            table.append((architecture, row["family"], " ".join(row["proven"]), ", ".join(row["features"])))
    widths = [max(len(line[column]) for line in table) for column in range(3)]
    for line in table:
        print(
            "  ".join(
                [f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False)] + [line[3]]
            ).rstrip()
        )
    print(
        "\nproven: logits, loss and every gradient equal transformers' in these kinds of parallelism, and combined;"
        " checkpoints come back bit for bit (docs/parity.md)"
    )
    return 0


def families() -> list[dict[str, Any]]:
    """For each family, its architectures, features, and the kinds of parallelism that tests cover."""
    found: dict[str, list[str]] = {}
    for architecture, family in SUPPORTED_ARCHITECTURES.items():
        found.setdefault(family, []).append(architecture)
    return [
        {
            "family": family,
            "architectures": architectures,
            "features": list(FEATURES.get(family, ())),
            "proven": list(proven(family)),
        }
        for family, architectures in sorted(found.items())
    ]
