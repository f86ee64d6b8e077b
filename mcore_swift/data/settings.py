"""The arguments that data/ reads from the flat namespace of flags, with defaults for absent ones."""

import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import UserError


@dataclass(frozen=True)
class DataSettings:
    """The arguments that decide which samples are trained on, and in which order.

    Names and meanings are those of the flags. `from_args` accepts a namespace that lacks some of them.
    """

    dataset: tuple[str, ...] = ()
    val_dataset: tuple[str, ...] = ()
    split_dataset_ratio: float = 0.0
    columns: dict[str, str] = field(default_factory=dict)
    strict: bool | None = None  # None and True: a broken row is an error; False: dropped and counted
    dataset_shuffle: bool = True
    data_seed: int = 42
    dataset_num_proc: int = 1
    load_from_cache_file: bool = True
    cache_dir: str | None = None
    train_dataloader_shuffle: bool = True
    interleave_prob: tuple[float, ...] = ()  # a weight for each of `dataset`; empty: they are concatenated
    stopping_strategy: str = "first_exhausted"
    streaming: bool = False
    shuffle_buffer_size: int = 1000  # rows that are shuffled together in a stream
    dataloader_num_workers: int = 4

    model_name: tuple[str, ...] = ()
    model_author: tuple[str, ...] = ()
    system: str | None = None
    max_length: int | None = None
    truncation_strategy: str = "delete"
    loss_scale: str = "default"
    use_chat_template: bool = True
    enable_thinking: bool | None = None

    packing: bool = False
    packing_length: int | None = None
    packing_strategy: str = "binpack"
    padding_free: bool = True

    micro_batch_size: int = 1
    global_batch_size: int = 16
    num_train_epochs: float | None = None
    train_iters: int | None = None

    @classmethod
    def from_args(cls, args: Any) -> "DataSettings":
        """Read the namespace `args`; absent attributes get the defaults above.

        Raises UserError for values that are invalid whatever the data is.
        """
        values = {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}
        for name in ("dataset", "val_dataset"):
            given = values.get(name) or ()
            values[name] = (given,) if isinstance(given, str) else tuple(given)
        values["interleave_prob"] = tuple(values.get("interleave_prob") or ())
        for name in ("model_name", "model_author"):
            values[name] = tuple(values.get(name) or ())
        values["columns"] = _columns(values.get("columns"))
        values["system"] = _system(values.get("system"))
        values["split_dataset_ratio"] = float(values.get("split_dataset_ratio") or 0.0)
        if values.get("data_seed") is None:
            values["data_seed"] = getattr(args, "seed", None) or 42
        for name in (
            "dataset_num_proc",
            "dataset_shuffle",
            "load_from_cache_file",
            "train_dataloader_shuffle",
        ):
            if values.get(name) is None:
                values.pop(name, None)
        settings = cls(**values)
        settings._check()
        return settings

    def _check(self) -> None:
        if not 0 <= self.split_dataset_ratio < 1:
            raise UserError(
                f"--split_dataset_ratio {self.split_dataset_ratio} is not in [0, 1)",
                "0.01 holds back one row in a hundred",
            )
        if self.truncation_strategy == "split" and self.use_chat_template:
            raise UserError(
                "--truncation_strategy split is for pre-training only",
                "use delete, left or right, or `megatron pt`",
            )
        if self.loss_scale not in ("default", "last_round", "all"):
            raise UserError(f"--loss_scale {self.loss_scale} is unknown", "use default, last_round or all")

    @property
    def is_shuffled(self) -> bool:
        """Whether rows of a stream are shuffled."""
        return self.dataset_shuffle and self.train_dataloader_shuffle

    @property
    def is_stream(self) -> bool:
        """Whether rows are cut from documents laid end to end."""
        return self.packing and self.packing_strategy == "concat"

    @property
    def cache_root(self) -> Path:
        """Folder of the token cache: --cache_dir, $MCORE_SWIFT_CACHE/tokens or ~/.cache/mcore_swift/tokens."""
        if self.cache_dir:
            return Path(self.cache_dir).expanduser()
        return Path(os.environ.get("MCORE_SWIFT_CACHE") or "~/.cache/mcore_swift").expanduser() / "tokens"


def _columns(given: Any) -> dict[str, str]:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise UserError(
                f"--columns is not JSON: {error}",
                """write it as '{"question": "query", "answer": "response"}'""",
            ) from None
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(x, str) for pair in given.items() for x in pair):
        raise UserError(
            f"--columns {given!r} does not map column names to column names",
            """write it as '{"question": "query", "answer": "response"}'""",
        )
    return dict(given)


def _system(given: str | None) -> str | None:
    if given and given.endswith(".txt") and Path(given).is_file():
        return Path(given).read_text(encoding="utf-8").strip()
    return given
