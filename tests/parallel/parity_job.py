"""One process of the parity grid: every family in this world size's layouts, packed and unpacked."""

import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from jobs import run_cases
from parity_models import LEARNING_RATE, PROMPT, THOROUGH, VARIANTS, Reference

from converters.export import hf_weights
from converters.hf_reader import HFReader
from converters.load import load_hf
from mcore_swift.accelerator import get_accelerator

get_accelerator().install()

from groups import use_layout  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from stages_cases import stages_cases  # noqa: E402

from mcore_swift.config import MegatronSftArguments  # noqa: E402
from mcore_swift.data import Batch  # noqa: E402
from mcore_swift.data.batch import padded_length  # noqa: E402
from mcore_swift.engines.megatron.engine import MegatronEngine  # noqa: E402
from mcore_swift.models.attention import CP_COMM_TYPES  # noqa: E402
from mcore_swift.models.reading import read_model  # noqa: E402
from mcore_swift.objectives.sft import NextToken  # noqa: E402
from mcore_swift.plan import Layout, ModelShape, check_layout  # noqa: E402
from mcore_swift.plan.axes import length_multiple  # noqa: E402
from mcore_swift.plan.stages import prediction_rank  # noqa: E402

ALL_LAYOUTS = {
    1: [Layout()],
    2: [
        Layout(tp=2),
        Layout(tp=2, sequence_parallel=True),
        Layout(pp=2),
        Layout(pp=2, vpp=2),
        Layout(dp=2),
        Layout(ep=2, dp=2),
        Layout(tp=2, etp=2, sequence_parallel=True),
        Layout(etp=2, dp=2),
        Layout(cp=2),
    ],
    4: [
        Layout(tp=2, pp=2, sequence_parallel=True),
        Layout(tp=2, pp=2, vpp=2),
        Layout(tp=2, dp=2, sequence_parallel=True),
        Layout(pp=2, dp=2, vpp=2),
        Layout(pp=4),
        Layout(dp=4),
        Layout(cp=4),
        Layout(tp=2, cp=2, sequence_parallel=True),
        Layout(pp=2, cp=2),
        Layout(tp=2, ep=2, dp=2, sequence_parallel=True),
        Layout(tp=2, ep=2, etp=2, dp=2, sequence_parallel=True),
        Layout(pp=2, ep=2, dp=2),
        Layout(ep=4, dp=4),
        Layout(ep=2, etp=2, dp=4),
    ],
    8: [
        Layout(tp=2, pp=2, cp=2, sequence_parallel=True),
        Layout(tp=2, pp=2, dp=2, ep=2, sequence_parallel=True),
        Layout(cp=2, pp=2, dp=2, ep=4),
    ],
}
SOME_LAYOUTS = {
    1: [Layout()],
    2: [
        Layout(tp=2, sequence_parallel=True),
        Layout(pp=2, vpp=2),
        Layout(ep=2, dp=2),
        Layout(cp=2),
    ],
    4: [
        Layout(tp=2, pp=2, sequence_parallel=True),
        Layout(tp=2, cp=2, sequence_parallel=True),
        Layout(tp=2, ep=2, etp=2, dp=2, sequence_parallel=True),
        Layout(ep=2, etp=2, dp=4),
    ],
    8: [],
}
MORE = {"gpt-oss": [Layout(etp=2, dp=2), Layout(tp=2, etp=2, sequence_parallel=True)]}
"""Layouts in addition to SOME_LAYOUTS, for variants with a special case there: splitting experts with biases."""
LENGTH = 24
ADAM_EPS = 1e6
LOGITS_ATOL = 1e-4  # fp32 sums of up to 40 terms in another order, through four layers; the required bound
LOSS_RTOL = 1e-5  # a mean of 113 such terms
GRADIENT_RTOL = 1e-4  # the required bound on the norm
WEIGHT_ATOL = 2e-5  # after one SGD step of rate 1: the error of each gradient entry; these are up to about 1


def start(layout: Layout, letters: str | None = None) -> None:
    """Take this process's place in a layout. letters: `--pipeline_model_parallel_layout`."""
    flags = {"pipeline_model_parallel_size": layout.pp, "pipeline_model_parallel_layout": letters}
    use_layout(layout, prediction_rank=prediction_rank(SimpleNamespace(**flags)))


def microbatches(samples: list[torch.Tensor], packed: bool, layout: Layout, count: int = 2) -> list[Batch]:
    """`count` samples per microbatch: concatenated and padded, or as right-padded rows."""
    batches, each = [], layout.segment_multiple
    for first in range(0, len(samples), count):
        rows = samples[first : first + count]
        shape = (1, padded_length(count * LENGTH + 2, length_multiple(layout))) if packed else (count, LENGTH)
        ids, labels = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        mask, positions = torch.zeros(shape), torch.arange(shape[1]).repeat(shape[0], 1)
        padding = torch.ones(shape, dtype=torch.bool)
        ends = [0]
        for index, sample in enumerate(rows):
            row, start = (0, ends[-1]) if packed else (index, 0)
            stop = start + len(sample)
            ids[row, start:stop] = sample
            labels[row, start : stop - 1] = sample[1:]
            mask[row, start + PROMPT - 1 : stop - 1] = 1
            positions[row, start:stop] = torch.arange(len(sample))
            padding[row, start:stop] = False
            ends.append(padded_length(stop, each))
        cu_seqlens = torch.tensor([*ends, shape[1]], dtype=torch.int32) if packed else None
        longest = max(map(len, rows)) if packed else None
        batches.append(
            Batch(ids, labels, mask, positions, cu_seqlens, longest, len(rows), sum(map(len, rows)), padding)
        )
    return batches


def own_batches(samples: list[torch.Tensor], packed: bool, layout: Layout) -> tuple[list[Batch], int]:
    """This data-parallel rank's microbatches, and the number of their first sample.

    Only as many as fill the stages, and two if no other rank's gradients are added, since each takes time.
    """
    count = len(samples) // (layout.dp * max(layout.pp, 2 // layout.dp, 1))
    batches = microbatches(samples, packed, layout, count)
    share = len(batches) // layout.dp
    first = parallel_state.get_data_parallel_rank() * share
    return batches[first : first + share], first * count


def compare_logits(engine: MegatronEngine, batches: list[Batch], reference: Reference, first: int) -> float:
    """first: number of the first sample. Returns the largest difference between logits over all ranks."""
    error = 0.0
    for rows, batch in zip(engine.logits(batches), batches, strict=False):
        last = first + batch.num_samples
        for place, expected in enumerate(reference.logits[first:last]):
            if batch.cu_seqlens is None:
                actual = rows[place, : len(expected)]
            else:
                start = int(batch.cu_seqlens[place])
                actual = rows[0, start : start + len(expected)]
            torch.testing.assert_close(actual, expected, atol=LOGITS_ATOL, rtol=0)
            error = max(error, (actual - expected).abs().max().item())
        first = last
    largest = torch.tensor(error)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def exports_what_it_loaded(engine: MegatronEngine, reader: HFReader) -> None:
    exported = {
        name: tensor
        for bucket in hf_weights(engine.chunks, engine.plan.table)
        for name, tensor in bucket.tensors.items()
    }
    names: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(names, set(exported))
    assert set().union(*names) == set(reader.names)
    for name, tensor in exported.items():
        assert torch.equal(tensor, reader.read(name)), f"{name} changed on its way in and out"


def possible(layout: Layout, folder: Path) -> bool:
    """Whether the plan accepts this layout for the model: without experts, for instance, there is no EP."""
    shape = ModelShape.from_config_dict(json.loads((folder / "model/config.json").read_text()))
    return not check_layout(layout, shape, MegatronSftArguments(global_batch_size=8, micro_batch_size=1))


errors: dict[str, dict[str, float]] = {}
"""Variant -> layout -> largest error of a logit."""


def agrees_with_transformers(
    folder: Path, layout: Layout, packed: bool, distributed_optimizer: bool, **flags: Any
) -> None:
    """Weights in and out, logits, loss, gradient norm, and every weight after one SGD step.

    flags: further arguments of the run.
    """
    reference: Reference = torch.load(folder / "reference.pt", weights_only=False)
    start(layout, flags.get("pipeline_model_parallel_layout"))
    # Adam with this epsilon and zero betas is plain SGD, and the distributed optimizer supports only Adam.
    rule = {"optimizer": "adam", "adam_beta1": 0.0, "adam_beta2": 0.0, "adam_eps": ADAM_EPS}
    args = MegatronSftArguments(
        **(rule if distributed_optimizer else {"optimizer": "sgd", "sgd_momentum": 0.0}),
        clip_grad=1e9,  # clips nothing, but makes the norm known
        weight_decay=0.0,
        use_distributed_optimizer=distributed_optimizer,
        moe_router_bias_update_rate=0.0,  # transformers does not update the router's bias
        recompute_granularity="none" if packed else "selective",
        **flags,
    )
    engine = MegatronEngine(read_model(str(folder / "model")), layout, args, torch.float32)
    with HFReader(folder / "model") as reader:
        load_hf(engine.chunks, reader, engine.plan.table)
        exports_what_it_loaded(engine, reader)
    engine.after_load(["weights"], optimizer_step=0)
    batches, first = own_batches(reference.samples, packed, layout)
    error = compare_logits(engine, batches, reference, first)
    of_variant = errors.setdefault(folder.name, {})
    of_variant[str(layout)] = max(error, of_variant.get(str(layout), 0.0))
    lr = LEARNING_RATE * (ADAM_EPS if distributed_optimizer else 1)
    steps = [engine.evaluate_step(batches, NextToken())] if reference.further else []
    steps.append(result := engine.train_step(batches, NextToken(), lr=lr, weight_decay=0.0))
    for step in steps:
        assert abs(step.loss / reference.loss - 1) < LOSS_RTOL, (step.loss, reference.loss)
        for depth, expected in enumerate(reference.further, start=1):
            assert abs(step.metrics[f"mtp_{depth}_loss"] / expected - 1) < LOSS_RTOL, (depth, expected)
    assert abs(result.grad_norm / reference.grad_norm - 1) < GRADIENT_RTOL, (
        result.grad_norm,
        reference.grad_norm,
    )
    for bucket in hf_weights(engine.chunks, engine.plan.table):
        for name, tensor in bucket.tensors.items():
            torch.testing.assert_close(
                tensor,
                reference.weights[name],
                atol=WEIGHT_ATOL,
                rtol=0,
                msg=lambda text, n=name: f"{n}: {text}",
            )


def equal_microbatches_have_equal_losses(folder: Path, layout: Layout, **flags: Any) -> None:
    """In every pipeline schedule: one that mixes up messages gives different losses for the same batch."""
    reference: Reference = torch.load(folder / "reference.pt", weights_only=False)
    start(layout, flags.get("pipeline_model_parallel_layout"))
    args = MegatronSftArguments(**flags)
    engine = MegatronEngine(read_model(str(folder / "model")), layout, args, torch.float32)
    with HFReader(folder / "model") as reader:
        load_hf(engine.chunks, reader, engine.plan.table)
    engine.after_load(["weights"], optimizer_step=0)
    seen = []

    class Watched(NextToken):
        def __call__(self, token_nll: torch.Tensor, batch: Batch):
            loss = super().__call__(token_nll, batch)
            seen.append(loss.sum.item())
            return loss

    batch = microbatches(reference.samples, packed=True, layout=layout)[0]
    count = min(8, 2 * layout.pp * (layout.vpp or 1))
    for _ in range(2):  # more than one step, since a message of one step might arrive in the next
        seen.clear()
        engine.train_step([batch] * count, Watched(), lr=0.0, weight_decay=0.0)
        assert len(set(seen)) <= 1, seen


def main(folder: Path) -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    cases = {}
    for place, layout in enumerate(ALL_LAYOUTS[world_size]):
        for number, variant in enumerate(VARIANTS):
            thorough = variant in THOROUGH
            some = SOME_LAYOUTS[world_size]
            if world_size == 4:  # four processes only add combinations of axes: one half per family
                some = some[number % 2 :: 2]
            some = [*some, *MORE.get(variant, [])]
            if (not thorough and layout not in some) or not possible(layout, folder / variant):
                continue
            # one process: both; else alternate among the cases of a layout, and from layout to layout
            for packed in (False, True) if world_size == 1 else [(place + len(cases)) % 2 == 0]:
                name = f"{variant} {layout} {'packed' if packed else 'unpacked'}"
                # Both optimizers and both exchanges are covered without doubling the grid.
                flags = {"cp_comm_type": CP_COMM_TYPES[(number + packed) % len(CP_COMM_TYPES)]}
                cases[name] = partial(
                    agrees_with_transformers, folder / variant, layout, packed, packed, **flags
                )
        if layout.pp > 1:
            cases[f"equal microbatches {layout}"] = partial(
                equal_microbatches_have_equal_losses,
                folder / ("qwen3-moe" if layout.ep > 1 else "qwen3"),
                layout,
            )
    if world_size == 2:
        cases["split experts, allgather"] = partial(
            agrees_with_transformers,
            folder / "gpt-oss",
            Layout(etp=2, dp=2),
            True,
            True,
            moe_token_dispatcher_type="allgather",
        )
    if world_size == 4:
        cases |= stages_cases(folder, start, agrees_with_transformers, equal_microbatches_have_equal_losses)
    run_cases(cases, folder)
    if dist.get_rank() == 0:
        shown = {variant: row for variant, row in errors.items() if variant in VARIANTS}
        (folder / "errors.json").write_text(json.dumps(shown))
