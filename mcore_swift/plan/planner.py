"""Computing the answer of `mcore-swift plan`, and the memory of a run that is about to start."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ..errors import UserError
from .axes import FLAGS
from .gpus import GPUS, Gpu, gpu_of
from .layout import Layout
from .low_rank import LowRank, four_bit_bytes
from .memory import GIB, Memory, Recompute, Run, peak_memory, stages_of
from .peaks import peak_tflops
from .preflight import as_held, model_folder, read_config
from .search import Option, Wish, search, spread_layers
from .shape import ModelShape
from .stages import stage_layers
from .timing import Cluster

HEADROOM = 0.95  # share of a GPU's memory that a plan may fill: it is an estimate, and allocators fragment
_MOST_GPUS = 16384  # limit of the search for a sufficient number of GPUs


@dataclasses.dataclass(frozen=True)
class Plan:
    """Answer of `mcore-swift plan`.

    options: the best few that fit, fastest first; empty if nothing fits. closest: the one that needs least memory.
    enough_gpus: if nothing fits, a sufficient number of GPUs of this kind; None if none was found.
    """

    shape: ModelShape
    cluster: Cluster
    capacity_bytes: float
    num_fitting: int
    options: list[Option]
    closest: Option
    enough_gpus: int | None = None


def make_plan(args: Any) -> Plan:
    """Plan what `args` (config.plan.PlanArguments) ask for. Raises UserError if no layout could run at all."""
    shape = read_any_shape(args.model)
    gpu = gpu_of(args.gpu)
    cluster = Cluster(gpu, args.gpus_per_node or gpu.gpus_per_node)
    capacity = GIB * (args.memory_gib or HEADROOM * gpu.memory_gib)
    wish = wish_of(args)
    found = search(shape, wish, cluster, capacity)
    enough = None if found.options else _enough_gpus(shape, wish, cluster, capacity)
    return Plan(
        shape, cluster, capacity, len(found.options), found.options[: args.top], found.smallest, enough
    )


def read_any_shape(model: str) -> ModelShape:
    """Sizes of a model, by its folder or config.json. Also accepts models that we can plan but not train yet.

    Raises UserError if it cannot be read or its architecture is not known.
    """
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".json":
        return ModelShape.from_config_dict(_config_file(path), str(path))
    folder = model_folder(model)
    return as_held(ModelShape.from_config_dict(read_config(folder), str(folder / "config.json")), folder)


def wish_of(args: Any) -> Wish:
    """The arguments of `mcore-swift plan` as a Wish."""
    granularity = args.recompute_granularity
    return Wish(
        num_gpus=args.num_gpus,
        global_batch_size=args.global_batch_size,
        run=run_of(args, args.max_length),
        fixed={axis: size for axis, flag in FLAGS.items() if (size := getattr(args, flag)) is not None},
        micro_batch_size=args.micro_batch_size,
        recompute=None if granularity is None else recompute_of(args),
        sequence_parallel=args.sequence_parallel,
    )


def recompute_of(args: Any) -> Recompute:
    """The recomputation that the flags ask for."""
    selective = args.recompute_granularity == "selective"
    return Recompute(args.recompute_granularity, frozenset(args.recompute_modules if selective else ()))


def run_of(args: Any, sequence_length: int, dtype: str | None = None) -> Run:
    """A run with the precision and optimizer of the flags. dtype: the precision if the flags give none."""
    weight_bytes = 4 if (args.torch_dtype or dtype) == "float32" else 2
    wide = weight_bytes == 4 or args.accumulate_allreduce_grads_in_fp32
    return Run(
        sequence_length=sequence_length,
        weight_bytes=weight_bytes,
        gradient_bytes=4 if wide else 2,
        optimizer_states=2 if args.optimizer == "adam" else 1,
        distributed_optimizer=args.use_distributed_optimizer,
        adapters=adapters_of(args),
    )


def adapters_of(args: Any) -> LowRank | None:
    """The adapters that the flags ask for; None if all weights train."""
    if args.tuner_type != "lora":
        return None
    return LowRank(
        args.lora_rank, four_bit_bytes(args.bnb_4bit_use_double_quant) if args.quant_method else None
    )


def memory_notice(
    args: Any, shape: ModelShape, world_size: int, gpu: Gpu, dtype: str | None = None
) -> str | None:
    """A warning if a training run's estimated memory clearly exceeds the GPU's, else None.

    An estimate is no reason to refuse a run, so this only warns and suggests the nearest settings estimated to fit.
    args: of a training command, already checked. dtype: the checkpoint's precision, used if the flags give none.
    """
    length = getattr(args, "packing_length", None) or getattr(args, "max_length", None)
    if not length or not getattr(args, "global_batch_size", None):
        return None
    layout = Layout.from_args(args, world_size)
    run = dataclasses.replace(
        run_of(args, length, dtype),
        micro_batch_size=args.micro_batch_size,
        num_microbatches=max(1, args.global_batch_size // (args.micro_batch_size * layout.dp)),
        recompute=recompute_of(args),
    )
    counts = [len(layers) for layers in stage_layers(layout, shape, args)]
    memory = peak_memory(shape, layout, run, stages_of(shape, layout, counts))
    if memory.total <= 1.1 * gpu.memory_gib * GIB:
        return None
    instead = nearest_fitting(shape, layout, run, args.global_batch_size, gpu)
    remedy = f"estimated to fit: {instead}" if instead else "nothing on as many GPUs is estimated to fit"
    return (
        f"{layout} is estimated to need {memory.total / GIB:.0f} GiB of each GPU, which has {gpu.memory_gib:.0f} "
        f"({describe(memory)}); {remedy}. `mcore-swift plan` shows more"
    )


def of_driver(line: str) -> Gpu:
    """The GPU in a line of nvidia-smi, such as 'NVIDIA H100 80GB HBM3, 81559 MiB'.

    For an unknown kind, only the memory is right; the rest is a guess that only serves to rank layouts.
    """
    name, _, memory = line.rpartition(",")
    peak = peak_tflops(name)
    alike = [gpu for gpu in GPUS.values() if peak is not None and peak_tflops(gpu.name) == peak]
    mib = "".join(letter for letter in memory if letter.isdigit())
    known = alike[0] if alike else GPUS["a100"]
    return dataclasses.replace(known, memory_gib=int(mib) / 1024 if mib else known.memory_gib)


def nearest_fitting(shape: ModelShape, layout: Layout, run: Run, batch: int, gpu: Gpu) -> str | None:
    """The same layout with full recomputation if that fits, else the fastest one that does; None if nothing does."""
    again = dataclasses.replace(run, recompute=Recompute("full", frozenset()))
    stages = stages_of(shape, layout, spread_layers(shape.num_layers, layout))
    if peak_memory(shape, layout, again, stages).total <= HEADROOM * gpu.memory_gib * GIB:
        return "the same with --recompute_granularity full"
    wish = Wish(layout.world_size, batch, run)
    try:
        found = search(shape, wish, Cluster(gpu, gpu.gpus_per_node), HEADROOM * gpu.memory_gib * GIB)
    except UserError:
        return None
    if not found.options:
        return None
    best = found.options[0]
    return f"{best.layout} with micro batch {best.run.micro_batch_size}, recomputing {best.run.recompute}"


def describe(memory: Memory) -> str:
    """The parts of `memory`, in GiB."""
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "overhead")
    return ", ".join(f"{name} {getattr(memory, name) / GIB:.1f}" for name in parts)


def _enough_gpus(shape: ModelShape, wish: Wish, cluster: Cluster, capacity: float) -> int | None:
    """The smallest number of GPUs, doubling from the given one, with which something fits; None if none does.

    The global batch grows with it where it would be too small.
    """
    count = wish.num_gpus
    while 2 * count <= _MOST_GPUS:
        count *= 2
        batch = wish.global_batch_size if wish.global_batch_size >= count else count
        try:
            found = search(
                shape,
                dataclasses.replace(wish, num_gpus=count, global_batch_size=batch),
                cluster,
                capacity,
                first_only=True,
            )
        except UserError:
            continue
        if found.options:
            return count
    return None


def _config_file(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model {path}: cannot be read as JSON ({error})", "give a config.json or its folder"
        ) from None
    if not isinstance(config, dict):
        raise UserError(f"--model {path}: is no JSON object", "give a config.json or its folder")
    return config
