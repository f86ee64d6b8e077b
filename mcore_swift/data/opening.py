"""From stores on disk to the steps of a run: joining or blending stores, packing samples, drawing orders."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from .blend import Blended
from .cache import TokenStore, open_store
from .corpora import IndexedStore, JoinedStore, Store, StreamStore
from .fingerprint import digest
from .packing import Units, joined_units, pack, single
from .report import DataReport, PartReport
from .selection import Part
from .settings import DataSettings
from .steps import EvalSteps, Layout, Steps

if TYPE_CHECKING:
    from .streaming.steps import StreamedSteps

logger = logging.getLogger(__name__)


@dataclass
class PreparedData:
    """Steps for training and evaluation (None: no validation data), and a report of what happened to the rows."""

    train: "Steps | StreamedSteps"
    val: EvalSteps | None
    report: DataReport


@dataclass(frozen=True)
class Corpus:
    """Rows that share a store, or one indexed dataset.

    key: hash of everything that its samples depend on, and name of its cache folder. max_length: tokens at which
    samples are cut. vocab_size: token ids must be below it.
    """

    part: Part
    key: str
    max_length: int | None
    vocab_size: int

    @property
    def name(self) -> str:
        return ", ".join(source.spec for source in self.part.sources)

    def indexed(self, settings: DataSettings) -> IndexedStore:
        """The store of an indexed dataset. Raises UserError if its files are broken or no sample is left."""
        (source,), (rows,) = self.part.sources, self.part.rows
        idx, how = source.files[0], settings.truncation_strategy
        store = IndexedStore(idx, rows, self.max_length, how, self.vocab_size)
        if not len(store.lengths):
            raise UserError(
                f"{source.spec}: no document has two tokens or more", "give a corpus that has text"
            )
        return store


class Opener:
    """Opens the stores of a run and lays them out as steps."""

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: Any,
        max_length: int | None,
        padding_multiple: int,
        segment_multiple: int,
        uniform_shapes: bool,
    ) -> None:
        self._settings = settings
        self._packed_length = (settings.packing_length or max_length) if settings.packing else None
        pad = tokenizer.pad_token_id
        self.layout = Layout(
            padding_free=settings.padding_free or settings.packing,
            packed_length=self._packed_length,
            padding_multiple=padding_multiple,
            segment_multiple=segment_multiple,
            uniform=uniform_shapes,
            pad_id=pad if pad is not None else tokenizer.eos_token_id or 0,
        )

    def open(
        self, corpora: Sequence[Corpus], built: Mapping[str, bool], output_dir: Any, is_builder: bool
    ) -> PreparedData:
        """The steps of all corpora.

        built: key -> whether the store was already cached. output_dir: receives the rows that were held back, unless
        None. Raises UserError for a missing store.
        """
        report = DataReport(PartReport())
        train = [corpus for corpus in corpora if corpus.part.name == "train"]
        store, units, tokens = self._part("train", train, built, report, is_builder)
        blend = self._blend(units) if self._settings.interleave_prob else None
        if len(train) > 1:
            report.corpora = _shares(train, tokens, blend)
        steps = Steps(
            store,
            joined_units(units),
            self._settings,
            self.layout,
            fingerprint=self._fingerprint(train),
            warn=report.warnings.append,
            order=blend,
        )
        val = self.open_validation(corpora, built, report, is_builder)
        if val is not None and output_dir is not None:
            self._write_held_back([corpus for corpus in corpora if corpus.part.held_back], Path(output_dir))
        return PreparedData(steps, val, report)

    def open_validation(
        self, corpora: Sequence[Corpus], built: Mapping[str, bool], report: DataReport, is_builder: bool
    ) -> EvalSteps | None:
        """The steps of the validation corpora among these; None if there are none. Adds them to `report`."""
        own = [corpus for corpus in corpora if corpus.part.name == "val"]
        if not own:
            return None
        store, units, _ = self._part("val", own, built, report, is_builder)
        return EvalSteps(store, joined_units(units), self._settings, self.layout)

    def _part(
        self,
        name: str,
        corpora: Sequence[Corpus],
        built: Mapping[str, bool],
        report: DataReport,
        is_builder: bool,
    ) -> tuple[Store, list[Units], list[int]]:
        """(store, units, tokens of each corpus) of train or val; in a blend, the units of each corpus separately."""
        stores = [self._store(corpus) for corpus in corpora]
        setattr(report, name, PartReport.sum(store.report for store in stores))
        folders = [str(store.path) for store in stores if isinstance(store, TokenStore)]
        if folders:
            report.cache[name] = ", ".join(folders)
            report.from_cache[name] = all(built.get(corpus.key, True) for corpus in corpora)
        groups: list[Store] = list(stores)
        keys = [[corpus.key] for corpus in corpora]
        if len(stores) > 1 and not (name == "train" and self._settings.interleave_prob):
            groups, keys = [JoinedStore(stores)], [[corpus.key for corpus in corpora]]
        how = self._pack_settings(name)
        if how is not None and how["strategy"] == "concat":
            groups = [StreamStore(group, how["capacity"], how["seed"]) for group in groups]
            how = None
        units = [self._units(group, key, how, is_builder) for group, key in zip(groups, keys, strict=True)]
        if self._packed_length is not None:
            report.packs[name] = sum(map(len, units))
        store = groups[0] if len(groups) == 1 else JoinedStore(groups)
        return store, units, [one.report.tokens for one in stores]

    def _store(self, corpus: Corpus) -> TokenStore | IndexedStore:
        if corpus.part.is_indexed:
            return corpus.indexed(self._settings)
        path = self._settings.cache_root / corpus.key
        store = open_store(path)
        if store is None:
            raise UserError(
                f"{path}: the token cache was not built; the process that builds it says why",
                "if that process runs on another machine, give a --cache_dir that all of them see",
            )
        return store

    def _blend(self, units: Sequence[Units]) -> Blended:
        s = self._settings
        return Blended(
            [len(of_one) for of_one in units],
            s.interleave_prob,
            s.stopping_strategy,
            s.data_seed,
            s.train_dataloader_shuffle,
        )

    def _fingerprint(self, train: Sequence[Corpus]) -> str:
        parts: list[Any] = [*(corpus.key for corpus in train), self._pack_settings("train")]
        if self._settings.interleave_prob:
            parts += [self._settings.interleave_prob, self._settings.stopping_strategy]
        return digest(parts)

    def _pack_settings(self, name: str) -> dict[str, Any] | None:
        if self._packed_length is None:
            return None
        in_order = name == "val" or not self._settings.train_dataloader_shuffle
        strategy = self._settings.packing_strategy
        if name == "val" and strategy == "binpack":
            strategy = "sequential"
        return {
            "capacity": self._packed_length,
            "strategy": strategy,
            "seed": None if in_order else self._settings.data_seed,
        }

    def _units(
        self, store: Store, keys: Sequence[str], how: dict[str, Any] | None, is_builder: bool
    ) -> Units:
        """Units of a store; its packing plan is kept in the cache, since every rank needs it."""
        if how is None:
            return single(store.lengths)
        folder = store.path if isinstance(store, TokenStore) else self._settings.cache_root
        plan = folder / f"packs-{digest(how if isinstance(store, TokenStore) else [*keys, how])}.npz"
        try:
            with np.load(plan) as saved:
                units = Units(saved["starts"], saved["members"], saved["tokens"])
            if units.tokens.sum() == store.lengths.sum():
                return units
        except (OSError, ValueError, KeyError):
            pass  # missing or broken: the plan depends only on the lengths, so any rank can make it
        units = pack(store.lengths, **how)
        if is_builder:
            _save(plan, units)
        return units

    def _write_held_back(self, corpora: Sequence[Corpus], output_dir: Path) -> None:
        """Write val_dataset.jsonl: the validation rows that were split off. Documents of token ids have no rows."""
        paths = [
            self._settings.cache_root / corpus.key / "rows.jsonl"
            for corpus in corpora
            if not corpus.part.is_indexed
        ]
        if not paths:
            return
        output_dir.mkdir(parents=True, exist_ok=True)
        with (output_dir / "val_dataset.jsonl").open("wb") as target:
            for path in paths:
                with path.open("rb") as rows:
                    shutil.copyfileobj(rows, target)


def _shares(corpora: Sequence[Corpus], tokens: Sequence[int], blend: Blended | None) -> list[str]:
    """A line for each of several corpora: its share of an epoch's tokens, and how often it is repeated in one."""
    times = [1.0] * len(tokens) if blend is None else list(blend.counts / blend.sizes)
    taken = [count * often for count, often in zip(tokens, times, strict=True)]
    weights = [""] * len(tokens) if blend is None else [f"weight {weight:.4g}, " for weight in blend.weights]
    return [
        f"{corpus.name}: {weight}{mine / sum(taken):.2%} of the tokens, {often:.3g} times in an epoch"
        for corpus, weight, mine, often in zip(corpora, weights, taken, times, strict=True)
    ]


def _save(plan: Path, units: Units) -> None:
    temporary = plan.with_suffix(".tmp.npz")
    try:
        plan.parent.mkdir(parents=True, exist_ok=True)
        np.savez(temporary, starts=units.starts, members=units.members, tokens=units.tokens)
        temporary.replace(plan)
    except OSError as error:  # the file would only save time in the next run
        temporary.unlink(missing_ok=True)
        logger.warning("%s: the packing plan could not be saved: %s", plan, error)
