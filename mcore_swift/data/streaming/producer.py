"""The process that writes the chunks of a stream, a few in advance.

    python -m mcore_swift.data.streaming.producer FOLDER PARENT

It reads `FOLDER/made.pickle`, waits for `FOLDER/start.json` (number and position of the first chunk), and keeps writing
chunks up to `AHEAD` beyond the number in `FOLDER/wanted`. On an error it writes `FOLDER/error.json` and ends. It also
ends when its parent has ended, and then removes the folder.
"""

import json
import os
import pickle
import shutil
import sys
import time
import traceback
from pathlib import Path

from ...errors import UserError, UserErrors
from ..cache import disk_error
from .chunks import ChunkWriter

AHEAD = 2
"""Number of chunks to prepare beyond the last one that was requested."""
_POLL_SECONDS = 0.02


def main(folder: Path, parent: int) -> int:
    """Returns the exit code."""
    try:
        _produce(folder, parent)
    except Exception as error:
        tell_error(folder, error)
        return 1
    finally:
        if os.getppid() != parent:  # the parent, which would remove the folder, is gone
            shutil.rmtree(folder, ignore_errors=True)
    return 0


def _produce(folder: Path, parent: int) -> None:
    made = pickle.loads((folder / "made.pickle").read_bytes())
    while not (folder / "start.json").exists():
        if os.getppid() != parent:
            return
        time.sleep(_POLL_SECONDS)
    start = json.loads((folder / "start.json").read_text())
    with ChunkWriter(made, folder, start["number"], start["place"]) as writer:
        while os.getppid() == parent:
            if writer.number > wanted(folder) + AHEAD:
                time.sleep(_POLL_SECONDS)
                continue
            try:
                writer.write()
            except OSError as error:
                raise disk_error(error, folder) from None


def wanted(folder: Path) -> int:
    """The number of the last requested chunk; -1 if there is none."""
    try:
        return int((folder / "wanted").read_text())
    except (FileNotFoundError, ValueError):
        return -1


def want(folder: Path, number: int) -> None:
    """Request the chunks up to `number`."""
    write_whole(folder / "wanted", str(number))


def tell_error(folder: Path, error: Exception) -> None:
    """Record why there will be no more chunks."""
    errors = error.errors if isinstance(error, UserErrors) else [error]
    if all(isinstance(one, UserError) for one in errors):
        told: dict = {"mistakes": [[one.message, one.remedy] for one in errors]}
    else:
        told = {"defect": "".join(traceback.format_exception(error))}
    write_whole(folder / "error.json", json.dumps(told))


def raise_told(folder: Path) -> None:
    """Raise the error that `tell_error` recorded, if any."""
    try:
        told = json.loads((folder / "error.json").read_text())
    except FileNotFoundError:
        return
    if "defect" in told:
        raise RuntimeError(f"the process that tokenizes failed:\n{told['defect']}")
    errors = [UserError(*one) for one in told["mistakes"]]
    raise UserErrors(errors) if len(errors) > 1 else errors[0]


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = os.environ.get("TOKENIZERS_PARALLELISM", "true")
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
