"""Layers with the names, calls and results of Transformer Engine's, made of plain ones, since it runs on GPUs only.

What they stand for is megatron-core's contract with it (`megatron.core.extensions.transformer_engine`): a norm that is
part of the layer behind it and is given on request, no attribute `is_expert`, and experts' matrices in one layer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from mcore_swift.engines.megatron import engine as engine_module
from mcore_swift.models import build


class _Plain(nn.Module):
    """Has the parameters of a plain layer, and nothing else of it."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "plain", plain)
        self.config = plain.config
        self.weight, self.bias = plain.weight, plain.bias

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.plain(x)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.plain.sharded_state_dict(*args, **kwargs)


class TERowParallelLinear(_Plain):
    pass


class TEColumnParallelLinear(_Plain):
    pass


class TELayerNormColumnParallelLinear(_Plain):
    def __init__(self, plain: nn.Module, norm: nn.Module) -> None:
        super().__init__(plain)
        object.__setattr__(self, "norm", norm)
        self.layer_norm_weight = norm.weight
        self.te_return_bias = plain.skip_bias_add and plain.bias is not None
        self.return_layernorm_output = False

    def forward(self, x: Tensor) -> tuple:
        normalized = self.norm(x)
        output, bias = self.plain(normalized)
        extra = (normalized,) if self.return_layernorm_output else ()
        if self.te_return_bias:
            return output, bias, *extra
        return ((output, *extra) if extra else output), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        norm = {"layer_norm_weight": self.layer_norm_weight}
        groups = {"tp_group": self.plain.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        norm = make_sharded_tensors_for_checkpoint(norm, prefix, {}, sharded_offsets, **groups)
        return super().sharded_state_dict(prefix, sharded_offsets, metadata) | norm


class _Grouped(nn.Module):
    axis: int

    def __init__(self, num_gemms: int, input_size: int, output_size: int, *, config: Any, **_: Any) -> None:
        super().__init__()
        self.num_gemms, self.config = num_gemms, config
        sizes = [output_size, input_size]
        sizes[self.axis] //= parallel_state.get_expert_tensor_parallel_world_size()
        for number in range(num_gemms):
            weight = nn.Parameter(torch.empty(sizes, dtype=config.params_dtype))
            weight.allreduce = config.expert_model_parallel_size == 1
            setattr(self, f"weight{number}", weight)

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, None]:
        assert isinstance(m_splits, list)
        pieces = [x_i @ getattr(self, f"weight{i}").t() for i, x_i in enumerate(x.split(m_splits))]
        return torch.cat(pieces), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        first = parallel_state.get_expert_model_parallel_rank() * self.num_gemms
        total = parallel_state.get_expert_model_parallel_world_size() * self.num_gemms
        found = {}
        for number in range(self.num_gemms):
            weight = {"weight": getattr(self, f"weight{number}")}
            place = (*sharded_offsets, (len(sharded_offsets), first + number, total))
            group = parallel_state.get_expert_tensor_parallel_group()
            groups = {"tp_group": group, "dp_cp_group": metadata["dp_cp_group"]}
            made = make_sharded_tensors_for_checkpoint(weight, prefix, {"weight": self.axis}, place, **groups)
            shard = made[f"{prefix}weight"]
            copy = parallel_state.get_expert_data_parallel_rank()
            shard.replica_id = (*shard.replica_id[:2], copy)
            found[f"{prefix}weight{number}"] = shard
        return found


class TEColumnParallelGroupedLinear(_Grouped):
    axis = 0


class TERowParallelGroupedLinear(_Grouped):
    axis = 1


def use_te_layers(chunk: nn.Module) -> None:
    """Put the stand-ins where Transformer Engine's spec has the originals."""
    for layer in [module for module in chunk.modules() if isinstance(module, TransformerLayer)]:
        attention, mlp = layer.self_attention, layer.mlp
        attention.linear_qkv = TELayerNormColumnParallelLinear(attention.linear_qkv, layer.input_layernorm)
        layer.input_layernorm = IdentityOp()
        attention.linear_proj = TERowParallelLinear(attention.linear_proj)
        if isinstance(getattr(mlp, "experts", None), SequentialMLP):
            mlp.experts = TEGroupedMLP(
                mlp.experts.num_local_experts,
                layer.config,
                SimpleNamespace(
                    linear_fc1=TEColumnParallelGroupedLinear,
                    linear_fc2=TERowParallelGroupedLinear,
                    activation_func=None,
                ),
                pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
            )
        elif not hasattr(mlp, "experts"):
            mlp.linear_fc1 = TELayerNormColumnParallelLinear(mlp.linear_fc1, layer.pre_mlp_layernorm)
            layer.pre_mlp_layernorm = IdentityOp()
            mlp.linear_fc2 = TERowParallelLinear(mlp.linear_fc2)
    build._mark_experts(chunk, chunk.config)


@contextmanager
def te_layers() -> Iterator[None]:
    """Engines that are built inside have models of the stand-ins."""
    original: Callable = engine_module.build_model

    def built(*args: Any, **kwargs: Any) -> list:
        chunks = original(*args, **kwargs)
        for chunk in chunks:
            use_te_layers(chunk)
        return chunks

    engine_module.build_model = built
    try:
        yield
    finally:
        engine_module.build_model = original
