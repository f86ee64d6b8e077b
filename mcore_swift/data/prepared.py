"""From the arguments and a tokenizer to the steps of a run."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError, raise_together
from .build import build_part
from .cache import disk_error, new_folder, open_store
from .check import check_sources
from .fingerprint import indexed_key, store_key, tokenizer_digest
from .locks import lock
from .opening import Corpus, Opener, PreparedData
from .report import DataReport, PartReport
from .selection import select_parts
from .settings import DataSettings
from .sources import parse_sources
from .streaming.opening import Stream

__all__ = ["PreparedData", "prepare"]

logger = logging.getLogger(__name__)

_LOCK_LIMIT = 3600.0  # seconds to wait for another run that tokenizes the same data


def prepare(
    args: Any,
    tokenizer: Any,
    *,
    is_builder: bool,
    barrier: Callable[[], Any],
    output_dir: str | Path | None = None,
    padding_multiple: int = 1,
    segment_multiple: int = 1,
    uniform_shapes: bool = True,
    model_max_length: int | None = None,
    vocab_size: int | None = None,
    lock_limit: float = _LOCK_LIMIT,
    wait_limit: float = 600.0,
    gather: Callable[[Any], list[Any]] | None = None,
) -> PreparedData:
    """Tokenize the data that `args` names, or find it in the cache, and lay out the steps.

    Every process calls this. The builder (one per file system) writes the cache, then all processes meet in
    `barrier`, which each of them calls exactly once, even after an error. Then all map the files.

    args: namespace with the flags' names, see `DataSettings`.
    output_dir: receives val_dataset.jsonl, the rows that --split_dataset_ratio held back.
    padding_multiple: row lengths are rounded up to a multiple of it. segment_multiple: the same for each sample in a
    row of several; it divides padding_multiple.
    uniform_shapes: all microbatches of a step have one shape, as pipelines need; if False, each has its own, with less
    padding.
    model_max_length: used if --max_length is not given.
    vocab_size: size of the model's vocabulary, to check data that is already tokenized; None: the tokenizer's.
    lock_limit: seconds to wait for another run that builds the same cache.
    wait_limit: seconds to wait for rows of streamed data. gather: all-gathers a value from all processes; called once,
    after the barrier, if data is streamed. None: there is only one process.
    Raises UserError(s).
    """
    settings = DataSettings.from_args(args)
    gather = gather or (lambda value: [value])
    stream: Stream | None = None
    met = False
    try:
        raise_together(check_sources(args))
        max_length = _max_length(settings, tokenizer, model_max_length)
        corpora = _corpora(settings, tokenizer, max_length, vocab_size or len(tokenizer))
        opener = Opener(settings, tokenizer, max_length, padding_multiple, segment_multiple, uniform_shapes)
        built = {}
        if settings.streaming:
            stream = Stream(settings, tokenizer, max_length, opener.layout, is_builder, wait_limit)
        if is_builder:
            for corpus in corpora:
                built[corpus.key] = _build(corpus, tokenizer, settings, lock_limit)
        met = True
        barrier()
    except Exception:
        if not met:
            barrier()  # the others must not hang because the builder has failed
        raise
    if stream is not None:
        report = DataReport(PartReport())
        val = opener.open_validation(corpora, built, report, is_builder)
        return PreparedData(stream.open(gather, report), val, report)
    return opener.open(corpora, built, output_dir if is_builder else None, is_builder)


def _max_length(settings: DataSettings, tokenizer: Any, model_max_length: int | None) -> int | None:
    own = getattr(tokenizer, "model_max_length", None)
    own = own if own is not None and own < 10**9 else None  # transformers' "unknown" is 1e30
    limit = settings.max_length or model_max_length or own
    if settings.packing:
        row = settings.packing_length or limit
        if row is None:
            raise UserError(
                "--packing true: the length of a packed row is not known",
                "add --max_length or --packing_length",
            )
        if limit is not None and row < limit:
            if settings.max_length is not None:
                raise UserError(
                    f"--packing_length {row} is below --max_length {limit}: a longest sample fits into no row",
                    f"use --packing_length {limit} or more",
                )
            return row
        return limit or row
    return limit


def _corpora(settings: DataSettings, tokenizer: Any, max_length: int | None, vocab_size: int) -> list[Corpus]:
    """The corpora to keep in stores of their own: each one that has a weight, or all rows that are joined."""
    train, errors = parse_sources(settings.dataset)
    val, val_errors = parse_sources(settings.val_dataset, "--val_dataset")
    raise_together(errors + val_errors)
    tokenizer_hash = tokenizer_digest(tokenizer)
    cut_to = None if settings.is_stream else max_length  # a stream is cut later, where rows end
    corpora = []
    for part in select_parts([] if settings.streaming else train, val, settings):
        if not part.sources:
            continue
        for piece in part.pieces(each_alone=bool(settings.interleave_prob) and part.name == "train"):
            if piece.is_indexed:
                key = indexed_key(piece, settings, cut_to)
            else:
                key = store_key(piece, tokenizer_hash, settings, cut_to)
            corpora.append(Corpus(piece, key, cut_to, vocab_size))
    return corpora


def _build(corpus: Corpus, tokenizer: Any, settings: DataSettings, lock_limit: float) -> bool:
    """Make sure that a corpus can be opened; returns True if nothing had to be tokenized."""
    root, key = settings.cache_root, corpus.key
    if corpus.part.is_indexed:
        corpus.indexed(settings).check()
        return True
    try:
        root.mkdir(parents=True, exist_ok=True)
        with lock(root / f"{key}.lock", lock_limit, "it tokenizes the same data"):
            if settings.load_from_cache_file:
                if open_store(root / key, check=True):
                    return True
                if (root / key).exists():
                    logger.warning(
                        "%s: the token cache is broken or incomplete, it is built again", root / key
                    )
            with new_folder(root / key) as folder:
                build_part(corpus.part, folder, key, tokenizer, settings, corpus.max_length)
    except OSError as error:
        raise disk_error(error, root) from None
    return False
