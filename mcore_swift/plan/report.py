"""The answer of `mcore-swift plan`, as text and as JSON."""

import shlex
from pathlib import Path
from typing import Any

from .axes import FLAGS
from .count import active_parameters, mtp_sizes, parameters
from .flops import flops_per_token
from .gpus import GPUS
from .memory import GIB, Memory
from .planner import HEADROOM, Plan, describe
from .search import Option
from .shape import ModelShape
from .stages import LAYOUT, render_stages, with_ends

_HEAD = (
    "layout", "mbs", "recompute", "GiB", "weights", "grads", "optim", "activ", "logits", "other", "bubble",
    "tok/s/GPU", "TFLOP/s", "MFU",
)  # fmt: skip
_ASSUMED = (
    "Estimates, not measurements: rows are full, experts evenly loaded, only data-parallel communication hidden. "
    "benchmarks/README.md says how far off such figures were. TFLOP/s and MFU count the full square of attention, as "
    "the log of a run does."
)


def report(plan: Plan, args: Any) -> list[str]:
    """Lines to print."""
    lines = [*_about(plan, args), ""]
    if not plan.options:
        return [*lines, *_nothing_fits(plan, args)]
    lines += [f"{plan.num_fitting} divisions of the GPUs fit; the fastest {len(plan.options)}:", ""]
    lines += _table([_HEAD, *(_row(plan, option) for option in plan.options)])
    for number, option in enumerate(plan.options, 1):
        lines += ["", f"{number}. {option.layout}:", f"   {command_line(plan, option, args)}"]
    return [*lines, "", _ASSUMED]


def as_json(plan: Plan, args: Any) -> dict[str, Any]:
    """The answer for programs, in bytes, seconds and FLOP/s; times are per step."""
    return {
        "model": args.model,
        "family": plan.shape.family,
        "parameters": parameters(plan.shape),
        "active_parameters": active_parameters(plan.shape),
        "training_flops_per_token": flops_per_token(
            plan.shape, args.max_length, trains=args.tuner_type == "full"
        ),
        "gpu": plan.cluster.gpu.name,
        "num_gpus": args.num_gpus,
        "capacity_bytes": plan.capacity_bytes,
        "num_fitting": plan.num_fitting,
        "enough_gpus": plan.enough_gpus,
        "layouts": [_option_json(plan, option, args) for option in plan.options],
        "closest": None if plan.options else _option_json(plan, plan.closest, args),
    }


def command_line(plan: Plan, option: Option, args: Any) -> str:
    """The command that runs an option, with a placeholder for the dataset."""
    host = 4 if plan.cluster.gpus_per_node == 72 else plan.cluster.gpus_per_node  # NVL72 is 18 hosts of 4
    per_host = min(host, args.num_gpus)
    nodes = -(-args.num_gpus // per_host)
    environment = f"NPROC_PER_NODE={per_host}" + (f" NNODES={nodes}" if nodes > 1 else "")
    flags = " ".join(f"--{name} {_quoted(value)}" for name, value in flags_of(plan.shape, option, args))
    model = shlex.quote(folder_of(args.model))
    return f"{environment} megatron {args.command} --model {model} --dataset <data> {flags}"


def _quoted(value: Any) -> str:
    return " ".join(map(shlex.quote, value)) if isinstance(value, list) else shlex.quote(str(value))


def folder_of(model: str) -> str:
    """The value for --model of a training command: the folder, if the plan was given its config.json."""
    path = Path(model)
    return str(path.parent) if path.suffix == ".json" else model


def flags_of(shape: ModelShape, option: Option, args: Any) -> list[tuple[str, Any]]:
    """Flags of a training command that select an option, without those that are at their defaults."""
    layout, run = option.layout, option.run
    flags: list[tuple[str, Any]] = [
        ("num_train_epochs", 1), ("packing", "true"), ("max_length", args.max_length),
        ("micro_batch_size", run.micro_batch_size), ("global_batch_size", args.global_batch_size),
    ]  # fmt: skip
    if args.tuner_type == "lora":
        flags += [("tuner_type", "lora"), ("lora_rank", args.lora_rank)]
    if args.quant_method:
        flags.append(("load_in_4bit", "true"))
    for axis, flag in FLAGS.items():
        if (getattr(layout, axis) or 1) > 1:
            flags.append((flag, getattr(layout, axis)))
    if not option.is_even:
        flags.append((LAYOUT, render_stages(with_ends(option.counts, mtp=shape.num_mtp_layers))))
    if shape.num_mtp_layers:
        flags.append(("mtp_num_layers", shape.num_mtp_layers))
    if layout.sequence_parallel:
        flags.append(("sequence_parallel", "true"))
    flags.append(("recompute_granularity", run.recompute.granularity))
    if run.recompute.granularity == "selective":
        flags.append(("recompute_modules", sorted(run.recompute.modules)))
    if args.torch_dtype != "bfloat16":
        flags.append(("torch_dtype", args.torch_dtype))
    if args.optimizer != "adam":
        flags.append(("optimizer", args.optimizer))
    if not args.accumulate_allreduce_grads_in_fp32:
        flags.append(("accumulate_allreduce_grads_in_fp32", "false"))
    if not args.use_distributed_optimizer:
        flags.append(("use_distributed_optimizer", "false"))
    elif layout.dp * layout.cp > 1:
        flags += [("overlap_grad_reduce", "true"), ("overlap_param_gather", "true")]
    return flags


def _about(plan: Plan, args: Any) -> list[str]:
    shape, gpu = plan.shape, plan.cluster.gpu
    total, active = parameters(shape) / 1e9, active_parameters(shape) / 1e9
    sizes = f"{total:.2f} billion parameters"
    if shape.is_moe:
        sizes += f", {active:.2f} of them active for a token"
    if shape.num_mtp_layers:
        sizes += f" (and {shape.num_mtp_layers * mtp_sizes(shape).total / 1e9:.2f} of multi-token prediction)"
    flops = flops_per_token(shape, args.max_length, trains=args.tuner_type == "full") / 1e9
    return [
        f"{args.model}: {shape.family}, {sizes}; {flops:.1f} GFLOP to train a token of {args.max_length}",
        f"{args.num_gpus} x {gpu.name}, {plan.capacity_bytes / GIB:.1f} GiB to plan with and "
        f"{gpu.peak_flops / 1e12:.0f} bf16 TFLOP/s each, {plan.cluster.gpus_per_node} to a node; "
        f"global batch {args.global_batch_size} x {args.max_length} tokens",
    ]


def _row(plan: Plan, option: Option) -> tuple[str, ...]:
    memory, time = option.memory, option.time
    return (
        str(option.layout),
        str(option.run.micro_batch_size),
        str(option.run.recompute),
        f"{memory.total / GIB:.1f}",
        *(f"{part / GIB:.1f}" for part in _parts(memory).values()),
        f"{time.bubble_share:.0%}",
        f"{time.tokens_per_s_per_gpu:,.0f}",
        f"{time.flops_per_s_per_gpu / 1e12:.0f}",
        f"{time.flops_per_s_per_gpu / plan.cluster.gpu.peak_flops:.0%}",
    )


def _parts(memory: Memory) -> dict[str, float]:
    names = ("weights", "gradients", "optimizer", "activations", "logits", "overhead")
    return {name: getattr(memory, name) for name in names}


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = {0, 2}
    return [
        "  ".join(
            f"{cell:<{width}}" if index in left else f"{cell:>{width}}"
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _nothing_fits(plan: Plan, args: Any) -> list[str]:
    closest, memory = plan.closest, plan.closest.memory
    needed = memory.total / GIB
    lines = [
        f"Nothing fits. The least memory takes {closest.layout} with micro batch {closest.run.micro_batch_size}, "
        f"recomputing {closest.run.recompute}: {needed:.1f} GiB on a GPU of {plan.capacity_bytes / GIB:.1f} (pipeline "
        f"stage {memory.stage}: {describe(memory)}).",
        "What would make it fit:",
    ]
    if plan.enough_gpus:
        lines.append(f"- {plan.enough_gpus} GPUs of this kind")
    larger = [name for name, gpu in GPUS.items() if HEADROOM * gpu.memory_gib >= needed]
    if larger:
        lines.append(f"- GPUs with {needed / HEADROOM:.0f} GiB, such as {', '.join(larger[:4])}")
    if memory.activations + memory.logits > memory.total - plan.capacity_bytes:
        over = memory.total - plan.capacity_bytes
        share = 1 - over / (memory.activations + memory.logits)
        lines.append(f"- rows of some {int(args.max_length * share) // 256 * 256} tokens (--max_length)")
    fixed = [flag for flag in FLAGS.values() if getattr(args, flag) is not None]
    if fixed:
        lines.append(f"- sizes that are not fixed: {', '.join('--' + flag for flag in fixed)}")
    return lines


def _option_json(plan: Plan, option: Option, args: Any) -> dict[str, Any]:
    layout, time = option.layout, option.time
    sizes = {axis: getattr(layout, axis) or 1 for axis in (*FLAGS, "dp")}
    names = ("work", "recompute", "tp", "cp", "ep", "pp", "bubble", "dp", "optimizer")
    return {
        "name": str(layout),
        **sizes,
        "sequence_parallel": layout.sequence_parallel,
        "micro_batch_size": option.run.micro_batch_size,
        "recompute": str(option.run.recompute),
        "layers_of_stages": option.counts,
        "memory_bytes": {**_parts(option.memory), "total": option.memory.total, "stage": option.memory.stage},
        "step_s": {**{name: getattr(time, name) for name in names}, "total": time.total},
        "bubble_share": time.bubble_share,
        "tokens_per_s_per_gpu": time.tokens_per_s_per_gpu,
        "flops_per_s_per_gpu": time.flops_per_s_per_gpu,
        "mfu": time.flops_per_s_per_gpu / plan.cluster.gpu.peak_flops,
        "command": command_line(plan, option, args),
    }
