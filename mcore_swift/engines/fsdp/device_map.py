"""`--device_map`: one process places the layers of a model on several devices, with accelerate.

The devices work one after the other, so this is only for models that do not fit on one.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from mcore_swift.engines.fsdp.model import give_memory
from mcore_swift.errors import UserError


def device_map_of(base: Any, args: Any) -> dict[str, Any] | None:
    """Module name -> device index, for a model that may be on the meta device; None if there is only one device.

    Raises UserError if accelerate is not installed, or if the devices together are too small.
    """
    if args.device_map is None:
        return None
    if find_spec("accelerate") is None:
        raise UserError("--device_map needs the package accelerate", "pip install accelerate")
    if torch.cuda.device_count() < 2:
        return None
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = list(getattr(base, "_no_split_modules", None) or ())
    limits = {_device(name): size for name, size in (args.max_memory or {}).items()} or None
    if args.device_map != "sequential":
        is_low = args.device_map == "balanced_low_0"
        limits = get_balanced_memory(base, limits, no_split_module_classes=whole, low_zero=is_low)
    found = infer_auto_device_map(base, limits, no_split_module_classes=whole)
    if outside := sorted(name for name, device in found.items() if device in ("cpu", "disk")):
        raise UserError(
            f"--device_map {args.device_map}: {len(outside)} modules, {outside[0]} the first, do not fit on the "
            f"{torch.cuda.device_count()} devices",
            "train adapters beside quantized weights, or use --backend fsdp with --fsdp_cpu_offload true",
        )
    return found


def _device(name: str) -> int | str:
    return int(name) if name.isdigit() else name


def place(base: nn.Module, device_map: Mapping[str, Any]) -> None:
    """Allocate the modules' parameters, uninitialized, on their devices, and hook the modules to move their inputs."""
    from accelerate import dispatch_model

    made: dict[nn.Parameter, nn.Parameter] = {}
    for name, device in device_map.items():
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        unit = base.get_submodule(name)
        give_memory(unit, device, made)
        for module in unit.modules():
            for key, buffer in module._buffers.items():
                module._buffers[key] = buffer.to(device) if buffer is not None else None
    dispatch_model(base, dict(device_map))
