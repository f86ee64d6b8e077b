"""Uneven pipelines, for the job of `parity_job`: parity with transformers, and what was planned is what is built.

Each case of parity also loads the Hugging Face weights and exports the same bits: so they go from one uneven
pipeline to any other.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parity_models import SIX_LAYERS

from mcore_swift.config import MegatronSftArguments
from mcore_swift.engines.megatron.engine import MegatronEngine
from mcore_swift.models.reading import read_model
from mcore_swift.plan.layout import Layout
from mcore_swift.plan.preflight import read_shape
from mcore_swift.plan.stages import stage_layers

Start = Callable[[Layout], None]
Check = Callable[..., None]

LAYOUT = "pipeline_model_parallel_layout"
ENDS = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
# of six layers, in four processes
UNEVEN: dict[str, tuple[Layout, dict[str, Any]]] = {
    "first": (Layout(pp=2, dp=2), {"decoder_first_pipeline_num_layers": 2}),
    "ends, interleaved": (Layout(pp=2, vpp=2, dp=2), ENDS),
    "letters, interleaved": (Layout(tp=2, pp=2, vpp=2, sequence_parallel=True), {LAYOUT: "Et|(tt|)*2tL"}),
    "last, interleaved": (
        Layout(tp=2, pp=2, vpp=2),
        {"decoder_first_pipeline_num_layers": 2, "decoder_last_pipeline_num_layers": 4},
    ),
    "ends": (Layout(pp=4), ENDS),
    "ends on their own": (Layout(pp=4), {LAYOUT: "E|t*4|tt|L"}),
}

# layouts of a model with two multi-token layers, which may have a stage of their own
PREDICTING = [
    (Layout(pp=2, cp=2), "deepseek-v3-mtp", "Ettt|tmmL"),
    (Layout(pp=4), "deepseek-v3-mtp", "Ett|tt|mm|L"),
    (Layout(pp=4, vpp=2), "six-mtp", "E|(t|)*4tt|mm|L"),
]


def builds_what_is_planned(start: Start, folder: Path, layout: Layout, flags: dict[str, Any]) -> None:
    """Each chunk of each rank holds the layers that the plan says, by their numbers in the whole model."""
    start(layout)
    args = MegatronSftArguments(**flags)
    engine = MegatronEngine(read_model(str(folder / "model")), layout, args, torch.float32, train=False)
    stages = stage_layers(layout, read_shape(folder / "model"), args)
    held = [[layer.layer_number - 1 for layer in chunk.decoder.layers] for chunk in engine.chunks]
    assert held == stages[layout.coordinates(dist.get_rank())["pp"] :: layout.pp], (held, stages)


def stages_cases(folder: Path, start: Start, agrees: Check, equal: Check) -> dict[str, Callable[[], None]]:
    """Cases by name. start, agrees, equal: how `parity_job` starts a layout, compares with transformers, and
    compares equal microbatches."""
    cases: dict[str, Callable[[], None]] = {}
    for number, (name, (layout, flags)) in enumerate(UNEVEN.items()):
        # tied and untied, packed and unpacked in turn: each with every kind of split, without a grid of all
        place, packed = folder / list(SIX_LAYERS)[number % 2], number // 2 % 2 == 0
        cases[f"uneven {place.name} {name}"] = partial(agrees, place, layout, packed, packed, **flags)
        cases[f"built {name}"] = partial(builds_what_is_planned, start, place, layout, flags)
        if name == "letters, interleaved":
            cases[f"equal {name}"] = partial(equal, place, layout, **flags)
    for number, (layout, variant, letters) in enumerate(PREDICTING):
        flags = {LAYOUT: letters, "cp_comm_type": "a2a"}  # and no --mtp_num_layers
        cases[f"predicting {letters}"] = partial(
            agrees, folder / variant, layout, number % 2 == 0, True, **flags
        )
    cases[f"equal {letters}"] = partial(equal, folder / variant, layout, **flags)
    return cases
