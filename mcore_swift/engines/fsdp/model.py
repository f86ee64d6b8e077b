"""A transformers model, built on the meta device and then allocated and sharded block by block.

Besides its own shards, a rank never holds more than one block of the model: each block is allocated (and initialized,
if no checkpoint fills it) and immediately sharded.
"""

import importlib.util
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from mcore_swift.accelerator import get_accelerator
from mcore_swift.errors import UserError
from mcore_swift.models.without_memory import parameters_on_meta

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TransformersPlan:
    """The description of a model before it is built. hf: its transformers config. family: its model_type.

    config_changes: entries of config.json that differ from the file it was read from.
    """

    hf: Any
    family: str
    config_changes: dict[str, Any] = field(default_factory=dict)


def read_plan(model: str) -> TransformersPlan:
    """Read config.json. Raises UserError if transformers has no causal language model for it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(
            f"{model}/config.json: {first_line(error)}", "give a checkpoint that transformers reads"
        ) from None
    if type(config) not in AutoModelForCausalLM._model_mapping and not hasattr(config, "auto_map"):
        raise UserError(
            f"{model}/config.json: transformers has no causal language model of type {config.model_type}",
            "give a text-generating model",
        )
    return TransformersPlan(config, config.model_type)


def first_line(error: Exception) -> str:
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def attention_implementation(asked: str | None, *, end_to_end: bool) -> str | None:
    """The value of transformers' `attn_implementation`: the one asked for, or varlen flash attention for packed rows.

    None leaves the choice to transformers. Raises UserError if the one asked for is not installed.
    """
    installed = importlib.util.find_spec("flash_attn") is not None
    if asked == "flash_attn":
        if installed and get_accelerator().is_cuda:
            return "flash_attention_2"
        logger.info("flash-attn is not available: using sdpa, which computes the same")
        return "sdpa"
    if asked and asked.startswith("flash") and not (installed and get_accelerator().is_cuda):
        raise UserError(
            f"--attn_impl {asked} needs CUDA and the package flash-attn",
            "use --attn_impl sdpa: packing works with it too",
        )
    if asked is None and end_to_end and installed and get_accelerator().is_cuda:
        return "flash_attention_2"
    return asked


def build_on_meta(
    plan: TransformersPlan, attention: str | None, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The model with parameters on the meta device and its buffers real. dtype: of the parameters."""
    from transformers import AutoModelForCausalLM

    options = {"attn_implementation": attention} if attention else {}
    try:
        with parameters_on_meta():
            model = AutoModelForCausalLM.from_config(plan.hf, dtype=dtype, **options)
    except (ValueError, ImportError) as error:
        raise UserError(f"this model cannot be built: {first_line(error)}") from None
    model.config.use_cache = False
    return model


@dataclass(frozen=True)
class Spread:
    """How a model is sharded over processes, and in which precision it computes.

    compute: dtype of activations and of the weights in a matrix product; the stored weights keep their dtype.
    offload: keep weights and optimizer state in host memory. keep_gathered: keep the weights of a block gathered
    between forward and backward pass. only_trained: do not shard frozen weights, which are quantized.
    """

    mesh: DeviceMesh
    compute: torch.dtype
    offload: bool = False
    keep_gathered: bool = False
    only_trained: bool = False

    @property
    def is_trivial(self) -> bool:
        """One process that computes in the stored precision: there is nothing to gather, reduce or convert."""
        return self.mesh.size() == 1 and self.compute is torch.float32 and not self.offload


def make_real(model: nn.Module, spread: Spread, *, seed: int | None = None) -> nn.Module:
    """Allocate the parameters of a model on the meta device, sharded over the processes.

    seed: draw random weights as transformers initializes the model, the same for every number of processes; None leaves
    them uninitialized, to be filled from a checkpoint.
    """
    device = get_accelerator().device
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer.to(device) if buffer is not None else None
    made: dict[nn.Parameter, nn.Parameter] = {}
    units = [*reversed(untied(blocks_of(model), model)), model]
    for number, unit in enumerate(units):
        filled = give_memory(unit, device, made)
        if seed is not None:
            initialize_modules(model, filled, seed + number)
        if not spread.is_trivial:
            _shard(unit, spread, is_root=unit is model)
    for module in fsdp_modules(model):
        module.set_gradient_divide_factor(
            1.0
        )  # gradients are summed; the engine divides by the global token count
        module.set_force_sum_reduction_for_comms(True)
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules that transformers says must not be split over devices: decoder layers. Outer ones first."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def untied(blocks: list[nn.Module], model: nn.Module) -> list[nn.Module]:
    """Blocks that share no parameter with what is outside of them: one parameter is gathered in one place.

    Others, such as BERT's embeddings beside a tied output layer, are gathered with the rest of the model.
    """
    everywhere = Counter(map(id, _with_repeats(model)))
    return [
        block
        for block in blocks
        if all(everywhere[p] == count for p, count in Counter(map(id, _with_repeats(block))).items())
    ]


def _with_repeats(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters, as often as modules hold them."""
    return (parameter for _, parameter in module.named_parameters(remove_duplicate=False))


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Free the gathered weights after a forward pass without a backward pass."""
    for module in fsdp_modules(model):
        module.reshard()


def give_memory(
    unit: nn.Module, device: torch.device, made: dict[nn.Parameter, nn.Parameter] | None = None
) -> list[nn.Module]:
    """Move the parameters of `unit` to the device; those on the meta device become uninitialized ones.

    made: parameters already moved, so that tied modules keep sharing them. Returns the modules that were on the meta
    device.
    """
    made, filled = {} if made is None else made, []
    for module in unit.modules():
        own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
        if any(parameter.is_meta for parameter in own.values()):
            filled.append(module)
        for name, parameter in own.items():
            if parameter.device != device:
                if parameter not in made:
                    data = (
                        torch.empty_like(parameter, device=device)
                        if parameter.is_meta
                        else parameter.to(device)
                    )
                    made[parameter] = nn.Parameter(data.detach(), requires_grad=parameter.requires_grad)
                module._parameters[name] = made[parameter]
    return filled


@torch.no_grad()
def initialize_modules(model: Any, modules: list[nn.Module], seed: int) -> None:
    """Initialize the parameters of these modules as transformers does."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in modules:
            model._init_weights(module)


def _shard(unit: nn.Module, spread: Spread, *, is_root: bool) -> None:
    low = spread.compute is not torch.float32
    policy = MixedPrecisionPolicy(spread.compute, torch.float32) if low else MixedPrecisionPolicy()
    offload = {"offload_policy": CPUOffloadPolicy()} if spread.offload else {}
    kept = {p for p in unit.parameters() if spread.only_trained and not p.requires_grad}
    fully_shard(
        unit,
        mesh=spread.mesh,
        mp_policy=policy,
        reshard_after_forward=not (is_root or spread.keep_gathered),
        ignored_params=kept or None,
        **offload,
    )
