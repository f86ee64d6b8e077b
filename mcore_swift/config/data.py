"""Where samples come from, how they are cached and packed, and in which order they are read."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

from ..errors import UserError
from .base import Arguments
from .fields import arg


@dataclasses.dataclass(kw_only=True)
class DataArguments(Arguments):
    TITLE: ClassVar[str] = "Data"

    dataset: list[str] = arg(
        [],
        "training files or folders (json, jsonl, csv, parquet, txt); several are concatenated; path#N takes N rows. "
        "`megatron pt` also takes token ids written by Megatron (.bin with .idx, or their common prefix), whose "
        "documents are cut into pieces of --max_length",
    )
    interleave_prob: list[float] | None = arg(
        None,
        "one weight per --dataset (they need not sum to 1): the share of samples that come from it; with packing, "
        "the share of rows, and thus of tokens",
        above=0,
    )
    stopping_strategy: str = arg(
        "first_exhausted",
        "with --interleave_prob, where an epoch ends: at the end of the first dataset, or when all have been used up",
        choices=("first_exhausted", "all_exhausted"),
    )
    streaming: bool = arg(
        False,
        "read and tokenize rows during training, for data that is too large to be tokenized beforehand; path#N "
        "then takes the first N rows, and rows that cannot be used are dropped and counted unless --strict is true",
    )
    shuffle_buffer_size: int = arg(
        1000, "with --streaming: rows that are shuffled together (fewer if they exceed 64 MB)", at_least=1
    )
    val_dataset: list[str] = arg([], "validation files, in the format of --dataset")
    split_dataset_ratio: float = arg(
        0.0,
        "fraction of the training rows held back for validation if there is no --val_dataset",
        at_least=0,
        below=1,
    )
    columns: dict[str, Any] | None = arg(
        None, 'rename columns, JSON: {"question": "query", "answer": "response"}'
    )
    model_name: list[str] = arg(
        [],
        "name that replaces {{NAME}} in rows; two values: for Chinese and for English rows",
    )
    model_author: list[str] = arg([], "name that replaces {{AUTHOR}} in rows, likewise")
    strict: bool | None = arg(
        None,
        "true: rows that cannot be used stop the run and are listed; false: they are dropped, counted and reported",
        default_text="true; false with --streaming",
    )
    dataset_shuffle: bool = arg(True, "shuffle rows when datasets are concatenated, split or sampled")
    data_seed: int = arg(42, "seed of row sampling, splitting and order", at_least=0)
    dataset_num_proc: int = arg(1, "number of processes that tokenize", at_least=1)
    load_from_cache_file: bool = arg(
        True,
        "reuse the token ids of an earlier run on the same rows, tokenizer and settings; false: tokenize again",
    )
    cache_dir: str | None = arg(
        None, "folder of the token cache", default_text="$MCORE_SWIFT_CACHE or ~/.cache/mcore_swift"
    )
    train_dataloader_shuffle: bool = arg(
        True, "shuffle anew in every epoch; false: read in the order of the files"
    )
    dataloader_num_workers: int = arg(
        4,
        "above 0: a thread prepares batches in advance (one is enough, because token ids are memory-mapped), and a "
        "separate process tokenizes streamed rows; 0: both happen within the step",
        at_least=0,
    )
    dataloader_prefetch_factor: int = arg(
        2, "number of steps whose batches are prepared in advance", at_least=1
    )

    def check(self) -> Iterator[UserError]:
        yield from self._check_streaming()
        for name in ("model_name", "model_author"):
            if len(getattr(self, name)) > 2:
                yield UserError(
                    f"--{name} has more than two values", "give one, or the Chinese and the English"
                )
        if self.val_dataset and self.split_dataset_ratio > 0:
            yield UserError(
                "--val_dataset and --split_dataset_ratio both define the validation data", "give one of them"
            )
        if self.interleave_prob and len(self.interleave_prob) != len(self.dataset):
            yield UserError(
                f"--interleave_prob has {len(self.interleave_prob)} weights, and --dataset {len(self.dataset)} values",
                "give one weight for each",
            )

    def _check_streaming(self) -> Iterator[UserError]:
        if not self.streaming:
            return
        flag = "max_steps" if hasattr(self, "max_steps") else "train_iters"
        if (getattr(self, flag) or -1) <= 0:
            yield UserError(
                f"--streaming true needs --{flag}: how many rows there are is not known before they are read",
                f"say when to stop with --{flag}",
            )
        if self.split_dataset_ratio > 0:
            yield UserError(
                f"--split_dataset_ratio {self.split_dataset_ratio:g} holds back a share of the rows, and of a stream "
                "their number is not known",
                "give --val_dataset",
            )


@dataclasses.dataclass(kw_only=True)
class PackingArguments(Arguments):
    TITLE: ClassVar[str] = "Packing"

    packing: bool = arg(
        False, "fill rows of --packing_length with whole samples; attention does not cross sample boundaries"
    )
    packing_length: int | None = arg(
        None, "length of a packed row in tokens", above=1, default_text="--max_length"
    )
    packing_strategy: str = arg(
        "binpack",
        "which samples share a row: those that fill it best (binpack), or consecutive ones (sequential). For "
        "pre-training also concat: documents end to end, cut wherever a row is full, with attention to everything "
        "before in the row, as in Megatron's GPT datasets",
        choices=("binpack", "sequential", "concat"),
    )
    padding_free: bool = arg(
        True, "concatenate the samples of a microbatch in one row; false: pad them to the longest"
    )

    def check(self) -> Iterator[UserError]:
        if self.packing and not self.padding_free:
            yield UserError(
                "--packing true concatenates samples, and --padding_free false gives each a padded row",
                "drop one of the two",
            )
        if self.packing_length is not None and not self.packing:
            yield UserError("--packing_length has no effect without packing", "add --packing true")
        if self.packing_strategy == "concat" and getattr(self, "use_chat_template", False):
            yield UserError(
                "--packing_strategy concat lets conversations attend to each other, and cuts them anywhere",
                "use binpack, or `megatron pt`",
            )
        limit = getattr(self, "max_length", None)
        if self.packing_length is not None and limit is not None and self.packing_length < limit:
            yield UserError(
                f"--packing_length {self.packing_length} is below --max_length {limit}: a sample of full "
                "length does not fit into a row",
                f"use --packing_length {limit} or more",
            )
