"""The chunks of a stream in a process of the run: requesting, awaiting, mapping and deleting them."""

import json
import logging
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
import uuid
import weakref
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..cache import disk_error
from ..report import PartReport
from .chunks import Chunk, ChunkWriter, Made, chunk_path, read_chunk
from .producer import raise_told, tell_error, want, write_whole

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.01


class ChunkSource:
    """Gives access to chunks by number, in a folder that one process per machine owns.

    The owner starts the producer, requests chunks and deletes those that are no longer needed. in_step: the owner
    writes chunks itself when they are requested. limit: seconds to wait for a chunk.
    """

    def __init__(self, folder: Path, made: Made | None, *, in_step: bool, limit: float) -> None:
        """made: what the owner makes chunks from; None in other processes."""
        self.folder, self.limit = folder, limit
        self._made, self._in_step = made, in_step
        self._writer: ChunkWriter | None = None
        self._process: subprocess.Popen | None = None
        self._wanted = self._first = -1
        self._is_closed = False
        self._dropped = PartReport()
        if made is not None:
            self._finalizer = weakref.finalize(self, _remove, folder)
            if not in_step:
                self._start_process(made)

    @property
    def is_owner(self) -> bool:
        return self._made is not None

    def start(self, number: int, place: dict[str, Any] | None) -> None:
        """Begin with chunk `number` at position `place` of the stream (None: its beginning)."""
        if self._first >= 0:
            return
        self._first = number
        if not self.is_owner:
            return
        if self._in_step:
            self._writer = ChunkWriter(self._made, self.folder, number, place)
            self._writer.__enter__()
        else:
            write_whole(self.folder / "start.json", json.dumps({"number": number, "place": place}))

    def chunk(self, number: int) -> Chunk:
        """Wait for chunk `number`. Raises the error that prevented it, or TimeoutError after `limit` seconds."""
        if self.is_owner and number > self._wanted:
            self._wanted = number
            self._ask(number)
        started = time.monotonic()
        while (found := read_chunk(self.folder, number)) is None:
            raise_told(self.folder)
            if self._process is not None and self._process.poll() is not None:
                raise_told(self.folder)
                tell_error(self.folder, _died(self._process))
                continue
            if self._is_closed:
                raise RuntimeError("the run ended while it waited for rows")
            if time.monotonic() - started > self.limit:
                raise TimeoutError(
                    f"rows of the training data were not read and tokenized within {self.limit:.0f} s "
                    f"(chunk {number} in {self.folder}): its storage hangs, or --dataset_num_proc is too low"
                )
            time.sleep(_POLL_SECONDS)
        if self.is_owner:
            self._tell_dropped(found)
        return found

    def done_with(self, chunk: Chunk) -> None:
        """Delete a chunk that no process needs any more."""
        if self.is_owner:
            shutil.rmtree(chunk_path(self.folder, chunk.number), ignore_errors=True)

    def close(self) -> None:
        """End the producer and remove the folder. Threads that still wait for a chunk raise RuntimeError."""
        self._is_closed = True
        if self._writer is not None:
            self._writer.__exit__(None, None, None)
            self._writer = None
        if self._process is not None:
            _stop(self._process)
            self._process = None
        if self.is_owner:
            self._finalizer()

    def _ask(self, number: int) -> None:
        if self._writer is None:
            want(self.folder, number)
            return
        try:
            while self._writer.number <= number:
                self._writer.write()
        except Exception as error:
            if isinstance(error, OSError):
                error = disk_error(error, self.folder)
            tell_error(self.folder, error)

    def _start_process(self, made: Made) -> None:
        (self.folder / "made.pickle").write_bytes(pickle.dumps(made))
        command = [sys.executable, "-m", f"{__package__}.producer", str(self.folder), str(os.getpid())]
        # it must import the same package as this process
        root = str(Path(__file__).resolve().parents[3])
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths})
        weakref.finalize(self, _stop, self._process)

    def _tell_dropped(self, chunk: Chunk) -> None:
        """Log how many rows were dropped, the first time and whenever the number has doubled."""
        report = PartReport(**chunk.store.meta["report"])
        if not report.dropped:
            return
        before = sum(self._dropped.dropped.values())
        self._dropped = PartReport.sum([self._dropped, report])
        total = sum(self._dropped.dropped.values())
        if total.bit_length() > before.bit_length():
            reasons = "; ".join(
                f"{count} rows: {reason}, e.g. {self._dropped.examples[reason][0]}"
                for reason, count in self._dropped.dropped.items()
            )
            logger.warning("train: of the rows read so far %d were dropped: %s", total, reasons)
            for examples in self._dropped.examples.values():
                del examples[3:]


def new_folder(root: Path) -> Path:
    """Create a folder for the chunks of this run, and remove those of killed runs on this machine.

    Raises UserError if it cannot be created.
    """
    host = socket.gethostname()
    try:
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(f"stream-{host}-*"):
            process = left.name.removeprefix(f"stream-{host}-").split("-")[0]
            if process.isdigit() and not Path(f"/proc/{process}").exists():
                shutil.rmtree(left, ignore_errors=True)
        folder = root / f"stream-{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        folder.mkdir()
    except OSError as error:
        raise disk_error(error, root) from None
    return folder


def _died(process: subprocess.Popen) -> UserError:
    return UserError(
        f"the process that tokenizes was killed (exit code {process.returncode}), most likely because memory ran out",
        "lower --dataset_num_proc or --shuffle_buffer_size",
    )


def _stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
