"""The engine for transformers models: any causal language model, on one process, with DDP or with FSDP2.

All three call `fully_shard`, each with its own device mesh: weights are sharded over all processes (fsdp) or replicated
(ddp). Main weights and gradients are fp32; with bfloat16, forward and backward pass use rounded copies of the weights.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from converters.budget import Budget
from converters.ranks import Ranks
from mcore_swift.accelerator import get_accelerator
from mcore_swift.data.batch import Batch
from mcore_swift.engines.base import StepResult
from mcore_swift.engines.fsdp import processes, sequence_parallel, weights
from mcore_swift.engines.fsdp.block_expansion import Expansion
from mcore_swift.engines.fsdp.device_map import device_map_of, place
from mcore_swift.engines.fsdp.flops import TrainingFlops
from mcore_swift.engines.fsdp.forward import Forward, on_device
from mcore_swift.engines.fsdp.model import (
    Spread,
    TransformersPlan,
    attention_implementation,
    build_on_meta,
    fsdp_modules,
    give_memory,
    initialize_modules,
    make_real,
    reshard,
)
from mcore_swift.engines.fsdp.optimizer import build_optimizer, scale_and_clip, set_hyperparameters
from mcore_swift.engines.fsdp.quantized import check_trainable, is_quantized, load_quantized, number_of_values
from mcore_swift.engines.fsdp.rank_allocation import RankAllocation
from mcore_swift.engines.fsdp.rope_lengths import length_limit
from mcore_swift.engines.fsdp.sequence_parallel import SequenceParallel
from mcore_swift.engines.fsdp.shards import (
    optimizer_shards,
    optimizer_step,
    persistent_buffers,
    set_optimizer_step,
    weight_shards,
)
from mcore_swift.engines.fsdp.switches import add_noise, compile_layers, recompute_layers, use_liger
from mcore_swift.engines.random_state import random_state, set_random_state
from mcore_swift.errors import UserError
from mcore_swift.models.shards import LiveShard
from mcore_swift.objectives.base import Loss, Objective
from mcore_swift.observability.phases import PhaseTimer
from mcore_swift.plan.layout import Layout
from mcore_swift.tuners.residuals import TakenStarts, takes_start
from mcore_swift.tuners.transformers_adapters import (
    ADAPTER,
    base_names,
    choose_parameters,
    config_of,
    learning_rate_factors,
    needs_weights,
    save_config,
)

WHOLE = ("full", "llamapro")
"""Values of --tuner_type whose checkpoints are whole models; those of all others are adapters."""


class TransformersEngine:
    """A transformers model spread over the processes of the run; implements `engines.base.Engine`."""

    name = "fsdp"

    def __init__(
        self, plan: TransformersPlan, layout: Layout, args: Any, dtype: torch.dtype, *, random: bool = False
    ) -> None:
        """random: draw random weights; otherwise they are undefined until they are loaded.

        Collective. Raises UserError for flags that this model, or the installed packages, cannot do.
        """
        self.plan = plan
        self.layout = layout
        self.args = args
        self.dtype = dtype
        self.is_sharded = args.backend == "fsdp" and layout.world_size > 1
        self.saves_adapter = args.tuner_type not in WHOLE
        attention = attention_implementation(args.attn_impl, end_to_end=args.packing or args.padding_free)
        parallel = self._share_rows(attention)
        self._told = ""  # how the frozen weights beside adapters were read, once they are
        self._expansion: Expansion | None = None
        self._starts: TakenStarts | None = None
        self.is_quantized = is_quantized(plan, args)
        self.base = self._build_base(attention if parallel is None else sequence_parallel.NAME)
        self.attention: str = self.base.config._attn_implementation
        self.model = self._choose_parameters(random=random)
        if args.neftune_noise_alpha:
            add_noise(self.model, args.neftune_noise_alpha)
        self._place(random=random)
        if self.saves_adapter and not random:
            self._load_base()
        if args.torch_compile:
            compile_layers(self.base, args.torch_compile_backend or "inductor")
        self._flops = TrainingFlops(
            self.base, args.model if self._expansion is None else None, base_is_frozen=self.saves_adapter
        )
        limit = length_limit(plan.hf.get_text_config(), args.max_length)
        self.forward = Forward(self.model, self.attention, parallel, limit)
        factors = learning_rate_factors(self.model, args)
        self.optimizer = build_optimizer(self.model, args, factors, is_sharded=self.is_sharded)
        self._ranks: RankAllocation | None = None
        if args.tuner_type == "adalora":
            self._ranks = RankAllocation(self.model, self.optimizer, self.model.peft_config[ADAPTER])

    def _share_rows(self, attention: str | None) -> SequenceParallel | None:
        """Sequence parallelism over the processes of a row, if --sequence_parallel_size is above 1. Collective."""
        if self.layout.cp == 1:
            return None
        if attention == "eager":
            raise UserError(
                "--attn_impl eager: --sequence_parallel_size works with sdpa or flash attention",
                "drop --attn_impl",
            )
        sequence_parallel.check_kinds(self.plan.hf.get_text_config())
        sequence_parallel.register()
        return SequenceParallel(processes.row_group(self.layout.cp), attention or "sdpa")

    def _build_base(self, attention: str | None) -> Any:
        """The transformers model: on the meta device, or quantized and with its values."""
        args = self.args
        if self.is_quantized:
            check_trainable(args, is_sharded=self.is_sharded, has_adapters=self.saves_adapter)
            base, self._told = load_quantized(self.plan, args, attention, self.dtype)
        else:
            # Frozen weights are kept in the precision they are used in.
            base = build_on_meta(self.plan, attention, self.dtype if self.saves_adapter else torch.float32)
        if args.gradient_checkpointing and base.supports_gradient_checkpointing:
            settings = args.gradient_checkpointing_kwargs or {}
            recompute_layers(base, settings, adapters=self.saves_adapter, processes=self.layout.world_size)
        if args.use_liger_kernel:
            use_liger(base)
        return base

    def _place(self, *, random: bool) -> None:
        """Give the model its memory, on the devices of --device_map or spread over the processes."""
        device_map = device_map_of(self.base, self.args)
        self._autocasts = device_map is not None and self.dtype is not torch.float32
        if device_map is not None:
            place(self.base, device_map)
            return
        spread = Spread(
            processes.mesh(sharded=self.is_sharded),
            compute=self.dtype,
            offload=self.args.fsdp_cpu_offload and get_accelerator().is_cuda,
            keep_gathered=not self.is_sharded,
            only_trained=self.is_quantized,
        )
        make_real(self.model, spread, seed=self.args.seed if random else None)

    def _choose_parameters(self, *, random: bool) -> nn.Module:
        """Attach adapters or freeze parameters. Adapters initialized from the weights get those loaded first."""
        if self.saves_adapter and not self.is_quantized:
            # Memory that was never written takes no physical pages; spreading the model frees it block by block.
            filled = give_memory(self.base, torch.device("cpu"))
            if random:
                initialize_modules(self.base, filled, self.args.seed)
        config = config_of(self.args, self.base) if self.saves_adapter else None
        if needs_weights(config) and not random and not self.is_quantized:
            with torch.no_grad():
                shards = weight_shards(self.base, dist.get_rank())
                self._told = weights.load(self.args.model, self.base, shards, Ranks())
        if self.args.tuner_type == "llamapro":
            new, groups = self.args.llamapro_num_new_blocks, self.args.llamapro_num_groups
            self._expansion = Expansion(self.base, new, groups)
            self._expansion.freeze(self.base)
            return self.base
        tensors = (*self.base.named_parameters(), *self.base.named_buffers())
        base = {name for name, _ in tensors}
        model = choose_parameters(self.base, self.args, config)
        if takes_start(getattr(config, "init_lora_weights", None)):
            self._starts = TakenStarts(model)
        self._base_names = base_names(base, model) if self.saves_adapter else {}
        return model

    @torch.no_grad()
    def _load_base(self) -> None:
        """Load the frozen weights beside adapters, unless they had to be loaded before the adapters."""
        if self._told:
            return
        shards = [
            replace(shard, key=self._base_names[shard.key])
            for shard in weight_shards(self.model, dist.get_rank())
            if shard.key in self._base_names
        ]
        self._told = weights.load(self.args.model, self.base, shards, Ranks())

    @torch.no_grad()
    def _saved_weights(self) -> list[LiveShard]:
        return weight_shards(self.model, dist.get_rank(), only_trained=self.saves_adapter)

    @property
    def family(self) -> str:
        return self.plan.family

    @property
    def description(self) -> str:
        how = "FSDP2" if self.is_sharded else "DDP" if self.layout.world_size > 1 else "one process"
        parameters = list(self.model.parameters())
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        share = trained / max(1, sum(number_of_values(parameter) for parameter in parameters))
        what = "" if share == 1 else f", {self.args.tuner_type}: {trained:,} parameters train ({share:.2%})"
        return f"transformers, {how}, attention: {self.attention}{what}"

    @property
    def dp_rank(self) -> int:
        return dist.get_rank() // self.layout.cp

    def begin(self, total_steps: int) -> None:
        """Called before the first step. Raises UserError if AdaLoRA's phases do not fit into the run."""
        if self._ranks is not None:
            self._ranks.set_total_steps(total_steps)

    def train_step(
        self, microbatches: Sequence[Batch], objective: Objective, *, lr: float, weight_decay: float
    ) -> StepResult:
        """One optimizer step.

        Raises FloatingPointError, before any weight changes, if the loss or the gradient is not finite.
        """
        self._settle(microbatches)
        timer = (
            PhaseTimer()
        )  # each phase ends with a number that the host reads, which synchronizes the device
        with timer("forward_backward"):
            self.model.train()
            self.optimizer.zero_grad(set_to_none=True)
            result = self._run(microbatches, objective, backward=True)
        if not math.isfinite(result.loss):
            raise FloatingPointError(f"the loss is {result.loss}; the weights are as they were")
        with timer("optimizer"):
            parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            if self._ranks is not None:
                result.metrics["orthogonality"] = self._ranks.add_orthogonality(max(result.count, 1))
            result.grad_norm = scale_and_clip(parameters, max(result.count, 1), self.args.clip_grad)
            if not math.isfinite(result.grad_norm):
                raise FloatingPointError(
                    f"the gradient norm is {result.grad_norm}; the weights are as they were"
                )
            set_hyperparameters(self.optimizer, lr=lr, weight_decay=weight_decay)
            self.optimizer.step()
            if self._ranks is not None:
                self._ranks.after_step(self.optimizer_step())
        result.phases_s = timer.take()
        return result

    @torch.no_grad()
    def evaluate_step(self, microbatches: Sequence[Batch], objective: Objective) -> StepResult:
        """Mean loss of the microbatches of all ranks, without dropout."""
        self._settle(microbatches)
        self.model.eval()
        result = self._run(microbatches, objective, backward=False)
        reshard(self.model)
        return result

    @torch.no_grad()
    def checkpoint_shards(self, holds: Sequence[str], *, for_loading: bool = False) -> list[LiveShard]:
        """Views of this rank's part of a checkpoint that holds 'weights' and / or 'optimizer'."""
        shards = self._saved_weights() if "weights" in holds else []
        if "optimizer" in holds:
            if for_loading and self._ranks is not None:
                self._ranks.make_states()
            shards += optimizer_shards(self.model, self.optimizer, for_loading=for_loading)
        return shards

    def writes(self, shard: LiveShard) -> bool:
        """Whether this rank, among those with a replica of the shard, is the one to save it."""
        everywhere = not self.is_sharded or shard.key in persistent_buffers(self.model)
        copies = self.layout.world_size if everywhere else 1
        return shard.replica[-1] == zlib.crc32(shard.key.encode()) % copies

    def optimizer_step(self) -> int:
        """Number of steps taken, by the optimizer's own counter."""
        return optimizer_step(self.optimizer)

    def after_load(self, parts: Sequence[str], *, optimizer_step: int) -> None:
        """The optimizer uses the weights themselves; only its step counter has to follow."""
        if "optimizer" in parts:
            set_optimizer_step(self.optimizer, optimizer_step)

    def load_hf(self, model_dir: str, ranks: Ranks, budget: Budget) -> str:
        """Fill the model from a Hugging Face folder; returns a line for the log. Collective.

        Frozen weights beside adapters are already loaded; adapters are filled from `--adapters`, if it is given.
        """
        if self._expansion is not None:
            shards = self._saved_weights()
            told = weights.load(model_dir, self.model, self._expansion.sources(shards), ranks, budget)
            self._expansion.silence(shards)
            return told
        if not self.saves_adapter:
            return weights.load(model_dir, self.model, self._saved_weights(), ranks, budget)
        if self.args.adapters:
            with torch.no_grad():
                weights.load_adapter(self.args.adapters[0], self.model, self._saved_weights(), ranks)
        return self._told

    def export_hf(self, folder: Path, max_shard_bytes: int, ranks: Ranks, budget: Budget) -> None:
        """Write a Hugging Face checkpoint, or the adapters as a PEFT folder. Collective."""
        shards = self._saved_weights()
        if self.saves_adapter:
            weights.export_adapter(folder, self.model, shards, ranks, self._starts)
        else:
            source = self.args.model
            changes = self.plan.config_changes
            weights.export(
                folder, self.model, shards, source, max_shard_bytes, self.dtype, ranks, budget, changes
            )

    def describe_adapter(self, folder: Path) -> None:
        """Write adapter_config.json, which describes the adapter in a checkpoint. On one rank."""
        save_config(self.model.peft_config[ADAPTER], folder)

    def check_budget(self, budget: Budget, ranks: Ranks) -> None:
        """Raise UserError, on every rank, if `export_hf` could not keep to the budget. Collective."""
        if not self.saves_adapter:  # adapters are small and are gathered whole
            weights.check_budget(self.model, self._saved_weights(), budget, ranks)

    def initialize(self) -> None:
        """Nothing to do: with `random`, the weights were drawn block by block while the model was built."""

    def training_flops(self, tokens: float, squares: float) -> float:
        """See `TrainingFlops.of_step`."""
        return self._flops.of_step(tokens, squares)

    @property
    def generators_name(self) -> str:
        """File name of this rank's random state."""
        return f"rank{dist.get_rank()}of{dist.get_world_size()}.pt"

    def random_state(self) -> dict[str, Any]:
        return random_state()

    def set_random_state(self, state: dict[str, Any]) -> None:
        set_random_state(state)

    def _settle(self, microbatches: Sequence[Batch]) -> None:
        if self.forward.is_unsettled(microbatches):
            self.forward.settle(microbatches)
            reshard(self.model)

    def _run(self, microbatches: Sequence[Batch], objective: Objective, *, backward: bool) -> StepResult:
        device = get_accelerator().device
        sums = torch.zeros(2 + len(objective.metrics), dtype=torch.float64, device=device)
        for number, batch in enumerate(microbatches, start=1):
            self._reduce_gradients(last=number == len(microbatches))
            batch = self.forward.own_part(batch)
            with torch.autocast(device.type, self.dtype, enabled=self._autocasts):
                nll = self.forward.token_nll(batch)
            loss = objective(nll, on_device(batch, device))
            if backward:
                loss.sum.backward()
            sums += _report(loss, objective)
        dist.all_reduce(sums)
        total, count, *metrics = sums.tolist()
        divisor = max(count, 1)
        named = {name: value / divisor for name, value in zip(objective.metrics, metrics, strict=True)}
        return StepResult(total / divisor, int(count), metrics=named)

    def _reduce_gradients(self, *, last: bool) -> None:
        """With replicas, all-reduce gradients once per step, after the last microbatch."""
        for module in fsdp_modules(self.model):
            module.set_requires_all_reduce(last, recurse=False)


def _report(loss: Loss, objective: Objective) -> Tensor:
    values = [loss.sum, loss.count, *(loss.metrics[name] for name in objective.metrics)]
    return torch.stack([value.detach().double() for value in values])
