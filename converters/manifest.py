"""manifest.json: what a checkpoint folder holds, readable without torch."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from mcore_swift.errors import UserError

FILE_NAME = "manifest.json"
FORMAT = 1
"""Raised when a reader of the old kind could not make sense of the new."""


@dataclass
class Manifest:
    """A checkpoint's account of itself.

    holds: any of 'weights', 'optimizer', 'rng', 'data'. step: optimizer steps done; consumed_samples: samples
    trained on so far. layout: sizes of the parallelism it was written under (any other can read it).
    dtype: of the weights, as 'bfloat16'. family: of the model. engine: whose names its tensors have.
    versions: of the packages that wrote it. args: file name of the arguments of the run, beside the manifest, or
    None. optimizer_step: steps as the optimizer counts them. train_state: the training loop's `TrainState`.
    written: Unix time in seconds at which it was complete; a run that went back to an earlier step has newer
    checkpoints with smaller numbers.
    """

    format: int = FORMAT
    holds: list[str] = field(default_factory=list)
    step: int = 0
    consumed_samples: int = 0
    layout: dict[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    family: str | None = None
    engine: str = "megatron"
    versions: dict[str, str] = field(default_factory=dict)
    args: str | None = None
    optimizer_step: int = 0
    train_state: dict[str, Any] = field(default_factory=dict)
    written: float = 0.0

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """The manifest of a checkpoint folder.

        Raises UserError if there is none, it is broken, or it is of a format newer than this code.
        """
        path = Path(folder) / FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = int(content["format"])
        except FileNotFoundError:
            raise UserError(
                f"{folder} is no complete checkpoint: it has no {FILE_NAME}",
                remedy="give the folder of a checkpoint, such as <run>/checkpoint-100",
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read: {error}", remedy="use another checkpoint") from None
        if version > FORMAT:
            raise UserError(
                f"{path} is of format {version}, this version of mcore-swift reads up to {FORMAT}",
                remedy="upgrade mcore-swift",
            )
        known = {entry.name for entry in fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in known})

    def write(self, folder: str | Path) -> None:
        """Write the manifest; it appears complete or not at all. Raises UserError if the disk refuses."""
        from converters.pending import disk_errors  # here, since it brings torch

        path = Path(folder) / FILE_NAME
        partial = path.with_suffix(".partial")
        with disk_errors(path):
            partial.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
            partial.replace(path)


def versions() -> dict[str, str]:
    """Versions of the packages that decide how a checkpoint reads."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("mcore-swift", "torch", "megatron-core", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from the source tree, not installed
            continue
    return found
