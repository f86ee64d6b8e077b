"""Lets megatron-core run without CUDA: its calls to torch.cuda are redirected to the CPU.

Installed by a call, never by an import, and only on a machine without CUDA. Three things are needed:

* functions of torch.cuda that megatron-core calls unconditionally (current device, RNG state, streams, events)
  return the CPU's values or do nothing;
* about eighty places in megatron-core name the device "cuda" literally: a TorchFunctionMode turns that into "cpu",
  and makes `Tensor.type()` return the CUDA type names that the optimizers compare with;
* megatron-core compiles small functions with torch.compile on import; importing the compiler takes seconds and
  compiling gains nothing here, so they are left uncompiled.
"""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_installed: "_CudaMeansCpu | None" = None


class _CudaMeansCpu(TorchFunctionMode):
    """Reads the device "cuda" as "cpu" in every torch call."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if kwargs:
            device = kwargs.get("device")
            if device is not None and _is_cuda(device):
                kwargs["device"] = _CPU
        elif func is torch.Tensor.type and len(args) == 1:
            # The mixed-precision optimizers sort parameters by these names.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **(kwargs or {}))


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


class _Stream:
    """A stream or an event on a device that runs everything in order: there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = _CPU

    def wait_stream(self, stream: Any) -> None:
        """Earlier work is done already."""

    wait_event = record = wait = wait_stream

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def synchronize(self) -> None:
        """Earlier work is done already."""

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *exc: Any) -> None:
        return None


@contextlib.contextmanager
def _in_order(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def _answer(value: Any) -> Callable:
    """A function that returns `value` for any arguments; a new one each time, since torch uses it as a dict key."""

    def answer(*args: Any, **kwargs: Any) -> Any:
        return value

    return answer


def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    torch.default_generator.set_state(new_state)


def _manual_seed(seed: int) -> None:
    # torch.manual_seed would call torch.cuda.manual_seed_all, which is this function.
    torch.default_generator.manual_seed(int(seed))


_CUDA_ANSWERS: dict[str, Any] = {
    "current_device": _answer(_CPU),
    "set_device": _answer(None),
    "device": _in_order,
    "Stream": _Stream,
    "Event": _Stream,
    "stream": _in_order,
    "current_stream": _Stream,
    "default_stream": _Stream,
    "synchronize": _answer(None),
    "empty_cache": _answer(None),
    "manual_seed": _manual_seed,
    "manual_seed_all": _answer(None),
    "get_rng_state": _get_rng_state,
    "set_rng_state": _set_rng_state,
    "memory_allocated": _answer(0),
    "max_memory_allocated": _answer(0),
    "memory_reserved": _answer(0),
    "max_memory_reserved": _answer(0),
    "reset_peak_memory_stats": _answer(None),
}


_NOT_FOR_USERS = (
    # megatron-core itself reads `.grad` of a tensor that cannot have one.
    r"The \.grad attribute of a Tensor that is not a leaf",
    r"full scope is deprecated",
    r"`torch\.distributed\.\w+` is deprecated",
    r"`?torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)",
)
"""Warnings about megatron-core's use of torch, which users can do nothing about."""


def install_cpu_seam() -> None:
    """Redirect megatron-core's CUDA calls to the CPU for the rest of this process. Calling it twice is harmless.

    Raises RuntimeError on a machine that has CUDA, where the real thing must be used.
    """
    global _installed
    if _installed is not None:
        return
    if torch.cuda.is_available():
        raise RuntimeError("the CPU seam is for machines without CUDA")
    _import_megatron_uncompiled()
    for name, answer in _CUDA_ANSWERS.items():
        setattr(torch.cuda, name, answer)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        setattr(torch.cuda.random, name, _CUDA_ANSWERS[name])
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _answer(None))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    _patch_megatron_random()
    _patch_megatron_experts()
    for text in _NOT_FOR_USERS:
        warnings.filterwarnings("ignore", message=text)
    _installed = _CudaMeansCpu()
    _installed.__enter__()


def _import_megatron_uncompiled() -> None:
    compiler, torch.compile = torch.compile, _leave_as_is
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # five times: Apex and Transformer Engine are missing
            import megatron.core
            import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401  what it brings would be compiled
            import megatron.core.optimizer  # noqa: F401
        megatron.core.jit.disable_jit_fuser()
    finally:
        torch.compile = compiler


def _leave_as_is(function: Callable | None = None, **_: Any) -> Callable:
    return function if function is not None else _leave_as_is


def _patch_megatron_random() -> None:
    """Make the RNG tracker use the CPU generator instead of torch's lazily initialised CUDA runtime."""
    import megatron.core.tensor_parallel.random as megatron_random

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.default_generator.get_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.default_generator.set_state(new_state)

    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
    for module in list(sys.modules.values()):
        # Modules that imported the functions by name before the seam was installed.
        if getattr(module, "__name__", "").startswith("megatron.core"):
            for name, function in (("_get_cuda_rng_state", get_state), ("_set_cuda_rng_state", set_state)):
                if hasattr(module, name):
                    setattr(module, name, function)


def _patch_megatron_experts() -> None:
    """Replace what the expert layers use that expects Transformer Engine or tensors on a GPU."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # the code reads it, but older versions leave it undefined

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    # Sizes of messages between experts; gloo takes them as numbers, not as a tensor.
    for module in (moe_utils, token_dispatcher):
        module.maybe_move_tensor_to_cpu = to_host
    _patch_uneven_collectives()


def _patch_uneven_collectives() -> None:
    """gloo can gather and reduce-scatter only parts of equal size; use all-to-all for unequal ones."""
    from megatron.core.tensor_parallel import mappings

    gather_evenly, reduce_evenly = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(
        input_: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather_evenly(input_, group, None, use_global_buffer)
        sizes, copies = list(output_split_sizes), [input_.size(0)] * group.size()
        return _all_to_all(torch.cat([input_] * group.size()), copies, sizes, group)

    def reduce_scatter(
        input_: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return reduce_evenly(input_, group, None, use_global_buffer)
        sizes = list(input_split_sizes)
        own = [sizes[group.rank()]] * group.size()
        parts = _all_to_all(input_.contiguous(), sizes, own, group)
        return parts.view(group.size(), own[0], *input_.shape[1:]).sum(dim=0)

    mappings._gather_along_first_dim = gather
    mappings._reduce_scatter_along_first_dim = reduce_scatter


def _all_to_all(rows: torch.Tensor, sent: list[int], received: list[int], group: Any) -> torch.Tensor:
    out = rows.new_empty((sum(received), *rows.shape[1:]))
    torch.distributed.all_to_all_single(out, rows, received, sent, group=group)
    return out
