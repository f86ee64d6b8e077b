"""mcore-swift: Hugging Face checkpoints in, distributed training, Hugging Face checkpoints out."""

from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "TrainArguments": "train_arguments",
    "PretrainArguments": "pretrain_arguments",
    "sft_main": "sft_main",
    "pt_main": "pt_main",
}


def __getattr__(name: str) -> Any:
    """`from mcore_swift import sft_main, TrainArguments`, without loading anything for those who do not ask."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import api

    return getattr(api, _LAZY[name])
