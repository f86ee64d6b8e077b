"""What `--backend auto` becomes: megatron-core's layers or transformers' model."""

from typing import Any

from ..errors import UserError
from .count import parameters
from .preflight import model_folder, read_shape

_REPLICATED, _SHARDED = 2 + 4, 12
"""Bytes a parameter that every process keeps, bf16 weights and fp32 gradients, and those that data-parallel processes
share out: fp32 weights and Adam's two moments (megatron-core's distributed optimizer)."""
_ROOM = 0.6
"""Share of a device that these may take; the rest is for activations."""


def choose_backend(args: Any, world_size: int, memory_bytes: float | None) -> tuple[str, str]:
    """(megatron, fsdp or ddp; why). memory_bytes: of one process's device, None where it is not known.

    The same on every process of a run on equal machines.
    """
    if args.backend != "auto":
        return args.backend, "as --backend says"
    if args.tuner_type != "full":
        return _spread(world_size), f"{args.tuner_type} adapters go with transformers' model"
    if args.whole_parameters:
        return _spread(world_size), f"--optim {args.optim} needs whole parameters on each process"
    if args.attn_impl:
        return _spread(world_size), "--attn_impl chooses the attention of transformers' model"
    if world_size == 1:
        return "fsdp", "one process has nothing to lay out"
    try:
        shape = read_shape(model_folder(args.model))
    except UserError:
        return "fsdp", "the Megatron engine does not know this architecture"
    needed = parameters(shape) * (_REPLICATED + _SHARDED / world_size)
    if memory_bytes is None or needed > _ROOM * memory_bytes:
        return (
            "fsdp",
            f"each process would need {needed / 1e9:.1f} GB beside activations with whole copies of the model",
        )
    if float(args.num_train_epochs) != int(args.num_train_epochs) and args.max_steps < 0:
        return "fsdp", "the Megatron engine takes whole epochs"
    return (
        "megatron",
        f"the architecture is known, and {needed / 1e9:.1f} GB a process hold a copy of the model",
    )


def _spread(world_size: int) -> str:
    return "fsdp" if world_size == 1 else "ddp"
