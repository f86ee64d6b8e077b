"""What `--backend auto` selects and why: megatron-core's layers, or transformers' model, replicated or sharded."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UserError
from .count import parameters
from .preflight import model_folder, read_config, read_shape

_REPLICATED, _SHARDED = 2 + 4, 12
"""Bytes a parameter that every process keeps, bf16 weights and fp32 gradients, and those that data-parallel processes
share out: fp32 weights and Adam's two moments (megatron-core's distributed optimizer)."""
_TRAINED = 16
"""Bytes a trained parameter of transformers' model: weight, gradient and Adam's two moments in fp32."""
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_ROOM = 0.6
"""Share of a device that these may take; the rest is for activations."""


def choose_backend(args: Any, world_size: int, memory_bytes: float | None) -> tuple[str, str]:
    """('megatron', 'fsdp' or 'ddp'; the reason). memory_bytes: memory of one process's device; None if unknown.

    On identical machines, every process of a run gets the same answer.
    """
    if args.backend != "auto":
        return args.backend, "as --backend says"
    if getattr(args, "quant_method", None):
        return _whole(world_size), "quantized weights are not sharded"
    if args.whole_parameters:
        return _whole(world_size), f"--optim {args.optim} needs whole parameters on each process"
    if args.fsdp_cpu_offload:
        return "fsdp", "--fsdp_cpu_offload is a way of keeping shards"
    why = _why_transformers(args)
    if why is None and world_size > 1:
        return _megatron(args, world_size, memory_bytes)
    if world_size == 1:
        return "fsdp", why or "one process has nothing to lay out"
    needed = _bytes_of_a_copy(args)
    if needed is None:
        return "fsdp", f"{why}; how large it is cannot be told"
    size = f"a copy of the model on each process takes {needed / 1e9:.3g} GB beside activations"
    if memory_bytes is None:
        return "fsdp", f"{why}; {size}, and how much memory a device has is not known"
    if needed > _ROOM * memory_bytes:
        return "fsdp", f"{why}; {size}, which does not fit into {memory_bytes / 1e9:.3g} GB"
    return "ddp", f"{why}; {size}, which fits"


def _why_transformers(args: Any) -> str | None:
    """Why the Megatron engine cannot be used; None if it can."""
    if args.tuner_type != "full":
        return f"{args.tuner_type} goes with transformers' model"
    if args.device_map:
        return "--device_map spreads transformers' model"
    if args.attn_impl:
        return "--attn_impl chooses the attention of transformers' model"
    if flags := args.compute_flags():
        return f"{flags[0]} is for transformers' model"
    if find_spec("megatron") is None or find_spec("megatron.core") is None:
        return "megatron-core is not installed"
    try:
        read_shape(model_folder(args.model))
    except UserError:
        return "the Megatron engine does not know this architecture"
    return None


def _megatron(args: Any, world_size: int, memory_bytes: float | None) -> tuple[str, str]:
    """Megatron if a process has memory for a full copy of the model: the default layout has no model parallelism."""
    shape = read_shape(model_folder(args.model))
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


def _bytes_of_a_copy(args: Any) -> float | None:
    """Bytes of weights, gradients and optimizer on a process with a full copy of the model; None if unknown.

    Adapters are neglected: they are small compared with the frozen weights.
    """
    values = _values(args)
    if values is None:
        return None
    if args.tuner_type in ("full", "llamapro"):
        return _TRAINED * values
    return _BYTES.get(args.torch_dtype or "bfloat16", 2) * values


def _values(args: Any) -> float | None:
    """Number of parameters: from the model's shape if the family is known, else from the size of its files."""
    try:
        folder = model_folder(args.model)
        try:
            return parameters(read_shape(folder))
        except UserError:
            stored = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
            config = read_config(folder)
            dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
            return stored / _BYTES.get(dtype, 2) or None
    except (UserError, OSError):
        return None


def _whole(world_size: int) -> str:
    return "fsdp" if world_size == 1 else "ddp"
