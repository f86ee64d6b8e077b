"""The small model and data that the commands run on."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

from commands import flags  # noqa: E402
from tiny import Tiny, make_tiny  # noqa: E402


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def sft(tiny, tmp_path_factory):
    """sft(output_dir=..., ...) -> the arguments of a short `megatron sft`; None leaves a flag out."""
    cache = tmp_path_factory.mktemp("cache")

    def make(**changes: object) -> list[str]:
        defaults = {
            "model": tiny.model,
            "dataset": tiny.train,
            "max_length": 192,
            "packing": True,
            "global_batch_size": 4,
            "train_iters": 4,
            "lr": 2e-3,
            "logging_steps": 1,
            "add_version": False,
            "report_to": "none",
            "save_safetensors": False,
            "cache_dir": cache,
        }
        return ["sft", *flags(**(defaults | changes))]

    return make
