"""Checkpoints of a run: saved atomically, so that a kill leaves the last complete one, and loaded in any layout.

A run's folder holds `checkpoint-N/` for each saved step and `latest`, a link to the newest. A checkpoint holds
`manifest.json` (its contents), `args.json`, `mcore/` (weights and optimizer state in torch_dist format), `rng/`, and
the files of a Hugging Face checkpoint: config, tokenizer and, on request, weights. For an adapter these are a PEFT
folder, and on request `checkpoint-N-merged/` holds the whole model with the adapter merged.
"""

import contextlib
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from converters.manifest import Manifest, versions
from converters.pending import check_free_space, disk_errors, pending_directory
from converters.ranks import Ranks
from converters.shard_files import Contents, read_shards, write_contents, write_shards
from converters.side_files import copy_side_files
from mcore_swift.errors import UserError
from mcore_swift.models.shards import MAIN_WEIGHT, LiveShard
from mcore_swift.observability import Limit
from mcore_swift.training.state import TrainState

MCORE = "mcore"
GENERATORS = "rng"
LATEST = "latest"
LAST, BEST = "last", "best"  # ms-swift's names, on request
_MAIN_WEIGHT = f"optimizer.{MAIN_WEIGHT}."
MERGED = "-merged"
_NAME = re.compile(r"checkpoint-(\d+)")
_LEFTOVERS = tuple(f".checkpoint-*.{what}" for what in ("writing", "replaced", "deleting"))


def checkpoints_in(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the complete checkpoints of a run, those with a manifest, in the order they were written."""
    found = []
    for path in run_dir.glob("checkpoint-*"):
        match = _NAME.fullmatch(path.name)
        if match and (path / "manifest.json").is_file():
            found.append((Manifest.read(path).written, int(match.group(1)), path))
    return [(step, path) for _, step, path in sorted(found)]


def find_checkpoint(place: Path) -> Path:
    """`place` if it is a checkpoint, else the newest complete checkpoint in that run folder or output folder.

    Raises UserError if there is none.
    """
    if (place / "manifest.json").is_file():
        return place
    runs = [place, *sorted(place.glob("v*-*"), key=version_of)]
    newest = [found[-1] for run in runs if (found := checkpoints_in(run))]
    if not newest:
        raise UserError(
            f"{place} holds no complete checkpoint",
            remedy="give a checkpoint-N folder, or a run folder that has one",
        )
    return newest[-1][1]


def version_of(run: Path) -> int:
    """N of a run folder vN-<time>; -1 for a folder of another name."""
    digits = re.match(r"v(\d+)-", run.name)
    return int(digits.group(1)) if digits else -1


class Checkpoints:
    """Writes and reads the checkpoints of one run.

    source_dir: the Hugging Face folder whose config and tokenizer are copied. export_hf: writes the weights as Hugging
    Face files into a folder (collective), or None. export_merged: the same for the model with its adapter merged, into
    a separate folder. timeout_s: longest time a save may take.
    """

    def __init__(
        self,
        run_dir: Path,
        engine: Any,
        args: Any,
        *,
        source_dir: str,
        ranks: Ranks,
        export_hf: Callable[[Path], None] | None = None,
        export_merged: Callable[[Path], None] | None = None,
        timeout_s: float = 3600.0,
    ) -> None:
        self.run_dir = run_dir
        self.engine = engine
        self.args = args
        self.source_dir = source_dir
        self.ranks = ranks
        self.timeout_s = timeout_s
        self._export_hf = export_hf
        self._export_merged = export_merged
        self._pending: _BackgroundSave | None = None

    @property
    def holds(self) -> list[str]:
        left_out = {"optimizer": self.args.no_save_optim, "rng": self.args.no_save_rng}
        return [part for part in ("weights", "optimizer", "rng", "data") if not left_out.get(part)]

    def save(self, state: TrainState) -> None:
        """Write checkpoint-<step>. Collective; with `--async_save`, later calls of `poll` finish it.

        Raises UserError on every rank if the disk is full or not writable; this checkpoint is then removed, and earlier
        ones are not changed.
        """
        self.poll(wait=True)
        final = self.run_dir / f"checkpoint-{state.step}"
        self.ranks.together(self._sweep, where=self.ranks.is_first)
        with Limit(f"save of {final.name}", self.timeout_s), contextlib.ExitStack() as stack:
            folder = stack.enter_context(pending_directory(final, self.ranks, exist_ok=True))
            shards = self._prepare(folder)
            self.ranks.together(lambda: self._write_description(folder, state))
            if self._export_hf is not None:
                self._export_hf(folder)
            if self._export_merged is not None:
                beside = final.with_name(final.name + MERGED)
                merged = stack.enter_context(pending_directory(beside, self.ranks, exist_ok=True))
                self._export_merged(merged)
                self.ranks.together(lambda: self._write_args(merged), where=self.ranks.is_first)
            self.ranks.together(lambda: self._write_generators(folder))
            writing = _BackgroundSave(
                folder,
                state,
                self.engine.optimizer_step(),
                lambda: write_shards(folder / MCORE, self.ranks.rank, shards),
            )
            if self.args.async_save:
                # training goes on and changes the model: write a copy
                shards[:] = [_copied(shard) for shard in shards]
                writing.start()
                writing.stack = stack.pop_all()
                self._pending = writing
                return
            writing.run()
            self._finish(writing)
        self._after_save(state)

    def poll(self, *, wait: bool = False) -> None:
        """Finish a background save if every rank has written its part, or wait for it. Collective."""
        writing = self._pending
        if writing is None:
            return
        if not wait and not all(self.ranks.gather(writing.done)):
            return
        self._pending = None
        with Limit(f"save of checkpoint-{writing.state.step}", self.timeout_s), writing.stack:
            writing.join()
            self._finish(writing)
        self._after_save(writing.state)

    def _sweep(self) -> None:
        """Remove leftovers of runs that were killed while they saved or deleted a checkpoint."""
        for path in self.run_dir.glob(".checkpoint-*.replaced"):
            final = path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))
            if not final.exists():  # killed between moving the old checkpoint away and the new one in
                path.rename(final)
        for leftover in _LEFTOVERS:
            for path in self.run_dir.glob(leftover):
                shutil.rmtree(path, ignore_errors=True)

    def _prepare(self, folder: Path) -> list[LiveShard]:
        """The shards that this rank writes, after a check that those of all ranks fit on the disk. Collective."""
        shards = [shard for shard in self.engine.checkpoint_shards(self.holds) if self.engine.writes(shard)]
        needed = sum(self.ranks.gather(sum(shard.data.nbytes for shard in shards)))

        def make() -> None:
            check_free_space(folder, needed)
            (folder / MCORE).mkdir()
            if "rng" in self.holds:
                (folder / GENERATORS).mkdir()

        self.ranks.together(make, where=self.ranks.is_first)
        return shards

    def _write_description(self, folder: Path, state: TrainState) -> None:
        if not self.ranks.is_first:
            return
        if not self.engine.saves_adapter:
            plan = self.engine.plan
            changes = plan.table.config if hasattr(plan, "table") else plan.config_changes
            copy_side_files(self.source_dir, folder, self.engine.dtype, changes)
        self._write_args(folder)
        if self.engine.saves_adapter:
            self.engine.describe_adapter(folder)

    def _write_args(self, folder: Path) -> None:
        with disk_errors(folder):
            self.args.save(folder)

    def _write_generators(self, folder: Path) -> None:
        if "rng" in self.holds:
            path = folder / GENERATORS / self.engine.generators_name
            with disk_errors(path):
                torch.save(self.engine.random_state(), path)

    def _finish(self, writing: "_BackgroundSave") -> None:
        """Write the metadata of all ranks' files, which completes the folder. Collective."""
        self.ranks.agree(writing.error)
        contents = self.ranks.collect(writing.contents)

        def describe() -> None:
            write_contents(writing.folder / MCORE, contents, {"step": writing.state.step})
            Manifest(
                holds=self.holds,
                step=writing.state.step,
                consumed_samples=writing.state.consumed_samples,
                layout=asdict(self.engine.layout),
                dtype=str(self.engine.dtype).removeprefix("torch."),
                family=self.engine.family,
                engine=self.engine.name,
                versions=versions(),
                args="args.json",
                optimizer_step=writing.optimizer_step,
                train_state=writing.state.to_dict(),
                written=time.time(),
            ).write(writing.folder)

        self.ranks.together(describe, where=self.ranks.is_first)

    def _after_save(self, state: TrainState) -> None:
        def tidy() -> None:
            with disk_errors(self.run_dir):
                for link, step in self._links(state).items():
                    _point_to(self.run_dir / link, f"checkpoint-{step}")
                self._rotate(state)

        self.ranks.together(tidy, where=self.ranks.is_first)

    def _links(self, state: TrainState) -> dict[str, int]:
        """Links in the run's folder -> the step of the checkpoint that each leads to."""
        links = {LATEST: state.step}
        if getattr(self.args, "create_checkpoint_symlink", False):
            links[LAST] = state.step
            if state.best_step is not None:
                links[BEST] = state.best_step
        return links

    def _rotate(self, state: TrainState) -> None:
        limit = self.args.save_total_limit
        if not limit:
            return
        found = checkpoints_in(self.run_dir)
        others = [path for step, path in found if step not in (state.step, state.best_step)]
        for path in others[: max(0, len(found) - limit)]:
            for place in (path, path.with_name(path.name + MERGED)):
                if place.is_dir():
                    # renamed first, so that it never exists half-deleted under its own name
                    doomed = place.with_name(f".{place.name}.deleting")
                    place.rename(doomed)
                    shutil.rmtree(doomed, ignore_errors=True)


class _BackgroundSave:
    """This rank's part of a save, run in this thread or in the background, with the training state of its step."""

    def __init__(
        self, folder: Path, state: TrainState, optimizer_step: int, write: Callable[[], Contents]
    ) -> None:
        self.folder = folder
        self.state = TrainState(**state.to_dict())
        self.optimizer_step = optimizer_step
        self.contents: Contents | None = None
        self.error: Exception | None = None
        self.stack = contextlib.ExitStack()
        self._write = write
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        try:
            self.contents = self._write()
        except Exception as raised:
            self.error = raised

    def start(self) -> None:
        self._thread = threading.Thread(target=self.run, name=f"save of step {self.state.step}", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()


def _copied(shard: LiveShard) -> LiveShard:
    return LiveShard(
        shard.key, shard.data.detach().to("cpu", copy=True), shard.region, shard.global_shape, shard.replica
    )


def _point_to(link: Path, target: str) -> None:
    """Atomically make `link` a symbolic link to `target` in the same folder."""
    partial = link.with_name(f".{link.name}.new")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    partial.replace(link)


def _sources(parts: Sequence[str], dtype: torch.dtype) -> Callable[[str], Sequence[str]]:
    """The keys under which a resumed run looks for a tensor, best first.

    A bf16 run keeps its exact weights in the optimizer (fp32 main weights); an fp32 run has only the weights. A run
    resumed in the other precision takes the exact ones.
    """

    def names(key: str) -> Sequence[str]:
        if key.startswith(_MAIN_WEIGHT):
            return key, key.removeprefix(_MAIN_WEIGHT)
        if dtype is torch.float32 and "optimizer" in parts and not key.startswith("optimizer."):
            return _MAIN_WEIGHT + key, key
        return (key,)

    return names


def _without(absent: Sequence[str], engine: Any) -> str:
    """How to go on without parts that a checkpoint does not hold, by the flags of the command that the engine is of."""
    if engine.name == "fsdp":
        return "add --resume_only_model true, or start from its weights with --model, or --adapters"
    flags = {"optimizer": "--no_load_optim true", "rng": "--no_load_rng true"}
    return (
        f"start from its weights alone with --mcore_model, or add {' '.join(flags[part] for part in absent)} (`swift "
        "sft`: --resume_only_model true)"
    )


def load_checkpoint(
    folder: Path, engine: Any, *, parts: Sequence[str], notify: Callable[[str], None] = lambda _: None
) -> Manifest:
    """Fill the engine with `parts` ('weights', 'optimizer', 'rng') of a checkpoint written in any layout.

    Raises UserError if a part, or some of its tensors, is missing, or another engine wrote the checkpoint.
    """
    manifest = Manifest.read(folder)
    if manifest.engine != engine.name:
        raise UserError(
            f"{folder} was written by the {manifest.engine} engine; the {engine.name} engine cannot continue it",
            remedy=f"start from its weights with --model {folder}, if --save_safetensors was on, or continue with "
            f"{'`megatron sft`' if manifest.engine == 'megatron' else '`swift sft --backend fsdp`'}",
        )
    absent = [part for part in parts if part not in manifest.holds]
    if absent:
        raise UserError(
            f"{folder} holds {' and '.join(manifest.holds)}, and no {' and no '.join(absent)}",
            remedy=_without(absent, engine),
        )
    shards = engine.checkpoint_shards(parts, for_loading=True)
    missing = read_shards(folder / MCORE, shards, _sources(parts, engine.dtype))
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise UserError(
            f"{folder} does not hold {shown}", remedy="it is a checkpoint of another model or optimizer"
        )
    engine.after_load(parts, optimizer_step=manifest.optimizer_step)
    if "rng" in parts:
        generators = folder / GENERATORS / engine.generators_name
        if generators.is_file():
            engine.set_random_state(torch.load(generators, weights_only=True))
        else:
            notify(
                "the layout differs from the checkpoint's: random generators (dropout) start from the seed"
            )
    return manifest
