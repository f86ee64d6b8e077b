"""megatron-core's process groups of a layout, made once per job: gloo is slow to connect dozens of them."""

from dataclasses import replace
from typing import Any

from megatron.core import parallel_state

from mcore_swift.engines.megatron import process_groups
from mcore_swift.plan.layout import Layout

_made: dict[tuple[Layout, int | None], dict[str, Any]] = {}


def use_layout(layout: Layout, *, seed: int = 1, prediction_rank: int | None = None) -> None:
    """Give this process its place in `layout`, and seed it. For the other arguments see `process_groups.start`."""
    key = replace(layout, sequence_parallel=False), prediction_rank
    parallel_state.destroy_model_parallel()
    if key not in _made:
        process_groups.start(key[0], seed=seed, timeout_s=120, prediction_rank=prediction_rank)
        _made[key] = {name: value for name, value in vars(parallel_state).items() if name.startswith("_")}
    vars(parallel_state).update(_made[key])
    process_groups.seed_everything(seed)
