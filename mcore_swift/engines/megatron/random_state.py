"""The random number generators of a rank, including megatron-core's."""

from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from mcore_swift.engines import random_state as generators


def random_state() -> dict[str, Any]:
    """State of Python's, numpy's, torch's and megatron-core's generators."""
    state = generators.random_state()
    return state | {"device": torch.cuda.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the state that `random_state` returned."""
    generators.set_random_state(state)
    torch.cuda.set_rng_state(state["device"])
    get_cuda_rng_tracker().set_states(state["tracker"])
