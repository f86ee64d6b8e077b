"""From the arguments and a tokenizer to the steps of a run."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, raise_together
from .build import build_part
from .cache import TokenStore, disk_error, new_folder, open_store
from .check import check_sources
from .fingerprint import digest, store_key, tokenizer_digest
from .locks import lock
from .packing import Units, pack, single
from .report import DataReport, PartReport
from .selection import Part, select_parts
from .settings import DataSettings
from .sources import parse_sources
from .steps import EvalSteps, Layout, Steps

logger = logging.getLogger(__name__)

_LOCK_LIMIT = 3600.0  # seconds to wait for another run that tokenizes the same data


@dataclass
class PreparedData:
    """The steps to train on, those to evaluate on (None: no validation data), and what became of the rows."""

    train: Steps
    val: EvalSteps | None
    report: DataReport


def prepare(
    args: Any,
    tokenizer: Any,
    *,
    is_builder: bool,
    barrier: Callable[[], Any],
    output_dir: str | Path | None = None,
    padding_multiple: int = 1,
    uniform_shapes: bool = True,
    model_max_length: int | None = None,
    lock_limit: float = _LOCK_LIMIT,
) -> PreparedData:
    """Tokenize what `args` names, or find it in the cache, and lay out the steps.

    Every process calls it. The builder (one for each file system) writes the cache, then all meet in
    `barrier`, which is called once in each process whatever happens, then all map the files.

    args: namespace with the flags' names, see `DataSettings`.
    output_dir: receives val_dataset.jsonl, the rows that --split_dataset_ratio held back.
    padding_multiple: sequence lengths are rounded up to it.
    uniform_shapes: one shape for all microbatches of a step, as pipelines need; else each its own, less padding.
    model_max_length: --max_length where that is not given.
    lock_limit: seconds to wait for another run that builds the same cache.
    Raises UserError(s).
    """
    settings = DataSettings.from_args(args)
    met = False
    try:
        raise_together(check_sources(args))
        max_length = _max_length(settings, tokenizer, model_max_length)
        parts, keys = _parts(settings, tokenizer, max_length)
        built = {}
        if is_builder:
            for part in parts:
                built[part.name] = _build(part, keys[part.name], tokenizer, settings, max_length, lock_limit)
        met = True
        barrier()
    except Exception:
        if not met:
            barrier()  # the others must not wait for a builder that has failed
        raise
    layouts = _Layouts(settings, tokenizer, max_length, padding_multiple, uniform_shapes)
    return layouts.open(parts, keys, built, output_dir, is_builder)


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


def _parts(
    settings: DataSettings, tokenizer: Any, max_length: int | None
) -> tuple[list[Part], dict[str, str]]:
    train, errors = parse_sources(settings.dataset)
    val, val_errors = parse_sources(settings.val_dataset, "--val_dataset")
    raise_together(errors + val_errors)
    parts = select_parts(train, val, settings)
    tokenizer_hash = tokenizer_digest(tokenizer)
    return parts, {part.name: store_key(part, tokenizer_hash, settings, max_length) for part in parts}


def _build(
    part: Part, key: str, tokenizer: Any, settings: DataSettings, max_length: int | None, lock_limit: float
) -> bool:
    """Make sure that the store of a part is there; True if it was already."""
    root = settings.cache_root
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
                build_part(part, folder, key, tokenizer, settings, max_length)
    except OSError as error:
        raise disk_error(error, root) from None
    return False


class _Layouts:
    """Opens the stores and lays them out as steps."""

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: Any,
        max_length: int | None,
        padding_multiple: int,
        uniform_shapes: bool,
    ) -> None:
        self._settings = settings
        self._packed_length = (settings.packing_length or max_length) if settings.packing else None
        pad = tokenizer.pad_token_id
        self._layout = Layout(
            padding_free=settings.padding_free or settings.packing,
            packed_length=self._packed_length,
            padding_multiple=padding_multiple,
            uniform=uniform_shapes,
            pad_id=pad if pad is not None else tokenizer.eos_token_id or 0,
        )

    def open(
        self,
        parts: list[Part],
        keys: dict[str, str],
        built: dict[str, bool],
        output_dir: Any,
        is_builder: bool,
    ) -> PreparedData:
        report = DataReport(PartReport())
        stores = {}
        for part in parts:
            path = self._settings.cache_root / keys[part.name]
            store = open_store(path)
            if store is None:
                raise UserError(
                    f"{path}: the token cache was not built; the process that builds it says why",
                    "if that process runs on another machine, give a --cache_dir that all of them see",
                )
            stores[part.name] = store
            report.cache[part.name] = str(path)
            report.from_cache[part.name] = built.get(part.name, True)
            details = PartReport(**store.meta["report"])
            details.longest = int(store.lengths.max())
            setattr(report, part.name, details)
        units = {name: self._units(store, name, is_builder) for name, store in stores.items()}
        if self._packed_length is not None:
            report.packs = {name: len(u) for name, u in units.items()}
        steps = Steps(
            stores["train"],
            units["train"],
            self._settings,
            self._layout,
            fingerprint=digest([keys["train"], self._pack_settings("train")]),
            warn=report.warnings.append,
        )
        val = None
        if "val" in stores:
            val = EvalSteps(stores["val"], units["val"], self._settings, self._layout)
            if is_builder and output_dir is not None and parts[-1].held_back:
                Path(output_dir).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(stores["val"].path / "rows.jsonl", Path(output_dir) / "val_dataset.jsonl")
        return PreparedData(steps, val, report)

    def _pack_settings(self, name: str) -> dict[str, Any] | None:
        if self._packed_length is None:
            return None
        in_order = name == "val" or not self._settings.train_dataloader_shuffle
        return {
            "capacity": self._packed_length,
            "strategy": "sequential" if name == "val" else self._settings.packing_strategy,
            "seed": None if in_order else self._settings.data_seed,
        }

    def _units(self, store: TokenStore, name: str, is_builder: bool) -> Units:
        how = self._pack_settings(name)
        if how is None:
            return single(store.lengths)
        plan = store.path / f"packs-{digest(how)}.npz"
        try:
            with np.load(plan) as saved:
                units = Units(saved["starts"], saved["members"], saved["tokens"])
            if units.tokens.sum() == store.lengths.sum():
                return units
        except (OSError, ValueError, KeyError):
            pass  # not there, or broken: the plan is a function of the lengths, any rank can make it
        units = pack(store.lengths, **how)
        if is_builder:
            _save(plan, units)
        return units


def _save(plan: Path, units: Units) -> None:
    temporary = plan.with_suffix(".tmp.npz")
    try:
        np.savez(temporary, starts=units.starts, members=units.members, tokens=units.tokens)
        temporary.replace(plan)
    except OSError as error:  # only saves time next run
        temporary.unlink(missing_ok=True)
        logger.warning("%s: the packing plan could not be saved: %s", plan, error)
