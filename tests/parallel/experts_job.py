"""One process of the expert tests: losses of the router, loads and dispatchers, equal in every layout."""

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from experts_reference import BALANCE, BIAS_RATE, CAPACITY, ExpertReference, Z
from jobs import run_cases
from megatron.core import parallel_state
from parity_job import ADAM_EPS, WEIGHT_ATOL, agrees_with_transformers, microbatches, start

from converters.export import hf_weights
from converters.hf_reader import HFReader
from converters.load import load_hf
from mcore_swift.config import MegatronSftArguments
from mcore_swift.data import Batch
from mcore_swift.engines.megatron.engine import MegatronEngine
from mcore_swift.models.reading import read_model
from mcore_swift.objectives.sft import NextToken
from mcore_swift.plan.layout import Layout

LAYOUTS = {
    1: [Layout()],
    2: [
        Layout(ep=2, dp=2),
        Layout(tp=2, ep=2, sequence_parallel=True),
        Layout(pp=2),
        Layout(cp=2, ep=2),
    ],
}


def with_padding_told(batches: list[Batch]) -> Iterator[Batch]:
    """Batches with their padding mask: samples in these tests contain no token 0."""
    for batch in batches:
        yield replace(batch, padding=batch.input_ids == 0)


def trained(
    folder: Path, layout: Layout, packed: bool, **flags
) -> tuple[MegatronEngine, ExpertReference, dict[str, float]]:
    """The model after one SGD step with learning rate 1, the reference, and the step's metrics."""
    reference: ExpertReference = torch.load(folder / "experts.pt", weights_only=False)
    start(layout)
    args = MegatronSftArguments(
        optimizer="adam",
        adam_beta1=0.0,
        adam_beta2=0.0,
        adam_eps=ADAM_EPS,
        clip_grad=1e9,
        weight_decay=0.0,
        **({"recompute_granularity": "none"} | flags),
    )
    engine = MegatronEngine(read_model(str(folder / "model")), layout, args, torch.float32)
    with HFReader(folder / "model") as reader:
        load_hf(engine.chunks, reader, engine.plan.table)
    engine.after_load(["weights"], optimizer_step=0)
    batches = list(with_padding_told(microbatches(reference.samples, packed, layout)))
    share = len(batches) // layout.dp
    first = parallel_state.get_data_parallel_rank() * share
    result = engine.train_step(batches[first : first + share], NextToken(), lr=ADAM_EPS, weight_decay=0.0)
    expected = reference.loss
    if flags.get("moe_expert_capacity_factor", 1.0) < 1.0:
        expected = reference.losses[flags["moe_token_drop_policy"]]
    assert abs(result.loss / expected - 1) < 1e-5, (result.loss, expected)
    return engine, reference, result.metrics


def assert_weights(engine: MegatronEngine, expected: dict[str, torch.Tensor]) -> None:
    for bucket in hf_weights(engine.chunks, engine.plan.table):
        for name, tensor in bucket.tensors.items():
            error = (tensor - expected[name]).abs().max().item()
            assert error < WEIGHT_ATOL, f"{name} is off by {error}"


def losses_weigh_what_they_should(folder: Path, layout: Layout, kind: str, packed: bool, **flags) -> None:
    """The router's losses: their gradients, their values and the logged loads."""
    per_token = kind != "means"
    engine, reference, metrics = trained(
        folder,
        layout,
        packed,
        moe_router_load_balancing_type=kind if per_token else "aux_loss",
        calculate_per_token_loss=per_token,
        moe_aux_loss_coeff=BALANCE,
        moe_z_loss_coeff=Z,
        moe_per_layer_logging=True,
        **flags,
    )
    if kind == "global_aux_loss" and layout.dp > 1:
        kind = f"{kind} {layout.dp}"
    assert_weights(engine, reference.weights[kind])
    for name, value in reference.metrics[kind].items():
        assert abs(metrics[name] / value - 1) < 1e-5, (name, metrics, value)
    for name in ("load_balancing_loss", "expert_load_max"):
        layers = [value for key, value in metrics.items() if key.startswith(f"{name}/layer_")]
        assert len(layers) == 3 and abs(sum(layers) / 3 / metrics[name] - 1) < 1e-9, (name, metrics)


def without_losses(folder: Path, layout: Layout, kind: str = "none", **flags) -> None:
    engine, reference, metrics = trained(folder, layout, packed=True, **flags)
    assert_weights(engine, reference.weights[kind])
    assert "load_balancing_loss" not in metrics and "router_z_loss" not in metrics


def bias_moves_against_the_load(folder: Path, layout: Layout) -> None:
    """The load is that of the whole batch, without padding; under full recomputation each token still counts once."""
    samples, expected = torch.load(folder / "bias.pt", weights_only=False)
    start(layout)
    args = MegatronSftArguments(moe_router_bias_update_rate=BIAS_RATE, recompute_granularity="full")
    engine = MegatronEngine(read_model(str(folder / "model")), layout, args, torch.float32)
    with HFReader(folder / "model") as reader:
        load_hf(engine.chunks, reader, engine.plan.table)
    engine.after_load(["weights"], optimizer_step=0)
    batches = list(with_padding_told(microbatches(samples, False, layout)))
    share = len(batches) // layout.dp
    first = parallel_state.get_data_parallel_rank() * share
    engine.train_step(batches[first : first + share], NextToken(), lr=0.0, weight_decay=0.0)
    for bucket in hf_weights(engine.chunks, engine.plan.table):
        for name, tensor in bucket.tensors.items():
            if name in expected:
                torch.testing.assert_close(tensor, expected[name])


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    cases = {}
    for number, layout in enumerate(LAYOUTS[int(os.environ["WORLD_SIZE"])]):
        for kind in ("aux_loss", "seq_aux_loss", "global_aux_loss"):
            # to the per-sequence loss, a packed row is one sequence
            packed = kind != "seq_aux_loss" and number % 2 == 0
            recompute = {"recompute_granularity": "full"} if number == 0 else {}
            cases[f"{kind} {layout}"] = partial(
                losses_weigh_what_they_should, folder, layout, kind, packed, **recompute
            )
        cases[f"mean of microbatches {layout}"] = partial(
            losses_weigh_what_they_should, folder, layout, "means", False
        )
        if layout.tp * layout.cp == 1:  # capacity is relative to a rank's tokens
            for policy in ("probs", "position"):
                little = {"moe_expert_capacity_factor": CAPACITY, "moe_token_drop_policy": policy}
                cases[f"drops by {policy} {layout}"] = partial(
                    without_losses,
                    folder,
                    layout,
                    policy,
                    moe_pad_expert_input_to_capacity=number == 1,
                    **little,
                )
        # With capacity for all tokens none is dropped, and each expert's tokens are padded up to it.
        room = {"moe_expert_capacity_factor": 2.0, "moe_pad_expert_input_to_capacity": True}
        cases[f"capacity {layout}"] = partial(without_losses, folder, layout, **room)
        cases[f"expert layers recomputed {layout}"] = partial(
            without_losses, folder, layout, moe_layer_recompute=True, recompute_granularity="selective"
        )
        cases[f"bias {layout}"] = partial(bias_moves_against_the_load, folder / "bias", layout)
        cases[f"allgather {layout}"] = partial(
            without_losses,
            folder,
            layout,
            moe_token_dispatcher_type="allgather",
            moe_router_dtype="fp64",
            moe_router_load_balancing_type="none",  # then the coefficient of such a loss has no effect
            moe_aux_loss_coeff=BALANCE,
        )
        # shared experts, with a gate and without
        cases[f"shared expert overlaps {layout}"] = partial(
            agrees_with_transformers,
            folder / ("qwen2-moe" if number % 2 else "glm4-moe"),
            layout,
            True,
            True,
            moe_shared_expert_overlap=True,
        )
    run_cases(cases, folder)
