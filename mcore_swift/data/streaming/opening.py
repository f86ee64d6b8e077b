"""From the arguments of a run to its streamed steps."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import UserError, raise_together
from ..fingerprint import digest, tokenizer_digest
from ..report import DataReport
from ..settings import DataSettings
from ..sources import Source, parse_sources
from ..steps import Layout
from .chunks import Made
from .source import ChunkSource, new_folder
from .steps import StreamedSteps


class Stream:
    """The streamed training data of a run, before it is opened. The builder of each machine reads for its machine."""

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: Any,
        max_length: int | None,
        layout: Layout,
        is_builder: bool,
        limit: float,
    ) -> None:
        """limit: seconds to wait for rows. Raises UserError(s) for missing sources and an unusable cache folder."""
        self._settings, self._layout, self._limit = settings, layout, limit
        if settings.train_iters is None:
            raise UserError(
                "--streaming true: how many rows there are is not known",
                "say when to stop with --train_iters",
            )
        sources, errors = parse_sources(settings.dataset)
        raise_together(errors)
        cut_to = (
            None if settings.is_stream else max_length
        )  # laid end to end, they are cut wherever a row ends
        made = Made(sources, tokenizer, settings, cut_to, layout.packed_length)
        self._fingerprint = _fingerprint(made)
        self._about = _about(sources, settings)
        self._made, self._folder = None, None
        if is_builder:
            self._made, self._folder = made, new_folder(settings.cache_root)

    def open(self, gather: Callable[[Any], list[Any]], report: DataReport) -> StreamedSteps:
        """The steps. Collective. gather: collects a value from all processes."""
        report.stream = self._about
        host = socket.gethostname()
        found = [
            folder for name, folder in gather((host, self._folder)) if folder is not None and name == host
        ]
        if not found:
            raise UserError(
                f"no process on {host} reads the training data",
                "start one process with LOCAL_RANK 0 on each machine",
            )
        folder: Path = found[0]
        made = self._made if folder == self._folder else None
        in_step = self._settings.dataloader_num_workers == 0
        source = ChunkSource(folder, made, in_step=in_step, limit=self._limit)
        packing = self._settings.packing_strategy if self._settings.packing else None
        return StreamedSteps(source, self._settings, self._layout, packing, self._fingerprint)


def _fingerprint(made: Made) -> str:
    """Hash of everything that order and tokens depend on; of files, which may be large, only names and sizes."""
    s = made.settings
    return digest(
        {
            "files": [
                [source.take, [[file.name, file.stat().st_size] for file in source.files]]
                for source in made.sources
            ],
            "tokenizer": tokenizer_digest(made.tokenizer),
            "rows": [
                s.columns,
                s.system,
                s.truncation_strategy,
                s.loss_scale,
                s.use_chat_template,
                s.enable_thinking,
            ],
            "names": [s.model_name, s.model_author],
            "length": made.max_length,
            "packing": [made.packed_length, s.packing_strategy],
            "order": [s.interleave_prob, s.shuffle_buffer_size, s.is_shuffled],
        }
    )


def _about(sources: list[Source], settings: DataSettings) -> str:
    files = [file for source in sources for file in source.files]
    size = sum(file.stat().st_size for file in files)
    how = f"shuffled {settings.shuffle_buffer_size} rows at a time" if settings.is_shuffled else "in order"
    text = f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
    return f"{len(files)} files of {text} are read while training goes on, {how}"
