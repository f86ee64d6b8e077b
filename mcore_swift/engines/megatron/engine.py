"""The Megatron engine: one model in any layout, and its optimizer."""

import logging
import math
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from converters.budget import Budget
from converters.export import check_budget, write_hf, write_shards_as_hf
from converters.hf_reader import HFReader
from converters.load import load_hf
from converters.peft_config import module_of
from converters.peft_files import PeftAdapter, read_adapter, write_adapter, write_config
from converters.ranks import Ranks
from mcore_swift.accelerator import get_accelerator
from mcore_swift.data.batch import Batch
from mcore_swift.engines.base import StepResult
from mcore_swift.engines.megatron.forward_backward import (
    Microbatch,
    reduce_over_ranks,
    run_logits,
    run_microbatches,
    to_device,
)
from mcore_swift.engines.megatron.moe import Routers, moe_options
from mcore_swift.engines.megatron.optimizer import build_optimizer, set_hyperparameters, wrap_for_gradients
from mcore_swift.engines.megatron.optimizer_state import optimizer_shards, optimizer_step, set_optimizer_step
from mcore_swift.engines.megatron.options import model_options
from mcore_swift.engines.megatron.random_state import random_state, set_random_state
from mcore_swift.models.build import build_model, pipeline_options, transformer_config
from mcore_swift.models.initialization import initialize
from mcore_swift.models.reading import ModelPlan
from mcore_swift.models.shards import LiveShard, is_expert, live_shards
from mcore_swift.models.specs import choose_cp_comm_type, choose_implementation
from mcore_swift.objectives.base import Objective
from mcore_swift.observability.phases import PhaseTimer
from mcore_swift.plan.flops import training_flops_of_sums
from mcore_swift.plan.layout import Layout
from mcore_swift.plan.preflight import read_shape
from mcore_swift.plan.shape import ModelShape
from mcore_swift.plan.stages import is_uneven, render_stages, stage_letters
from mcore_swift.tuners.attach import adapter_names, attach, merged_shards, trained_shards
from mcore_swift.tuners.beside import settled
from mcore_swift.tuners.freezing import freezes
from mcore_swift.tuners.quantized import FourBit, quantized_layers
from mcore_swift.tuners.settings import LoraSettings
from mcore_swift.tuners.targets import adaptable_modules
from mcore_swift.tuners.whole import freeze

logger = logging.getLogger(__name__)


class MegatronEngine:
    """A megatron-core GPT model laid out over the processes of the run; implements `engines.base.Engine`.

    chunks: the bare GPTModels of this rank, one for each virtual pipeline stage.
    """

    name = "megatron"

    def __init__(
        self,
        plan: ModelPlan,
        layout: Layout,
        args: Any,
        dtype: torch.dtype,
        *,
        train: bool = True,
        adapter: LoraSettings | None = None,
    ) -> None:
        """train: False builds no optimizer. adapter: train a LoRA adapter and freeze the model's own weights."""
        self.plan = plan
        self.layout = layout
        self.args = args
        self.dtype = dtype
        four_bit = FourBit.from_args(args) if adapter else None
        wanted = args.transformer_impl if four_bit is None else "local"  # config refuses transformer_engine
        self.implementation = choose_implementation(wanted, plan)
        options = model_options(args, self.implementation, experts=plan.is_moe) | pipeline_options(
            plan, layout, args
        )
        if plan.is_moe:
            options |= moe_options(args)
            if adapter:
                # the load-balancing bias, which needs no gradient, is frozen like the router
                options["moe_router_bias_update_rate"] = 0.0
        if layout.cp > 1:
            options["cp_comm_type"] = choose_cp_comm_type(args.cp_comm_type, self.implementation)
        config = transformer_config(plan, layout, dtype, options)
        self.chunks = build_model(plan, config, self.implementation, linears_on_meta=four_bit is not None)
        self.adapter = settled(plan.table, adapter) if adapter else None
        self.saves_adapter = adapter is not None
        self.adapted = attach(self.chunks, plan.table, self.adapter, four_bit) if adapter else []
        self.trained_share = 0.0 if adapter else 1.0
        if not adapter and freezes(args):
            self.trained_share = freeze(self.chunks, plan.table, args)
        self.model: list[Any] = wrap_for_gradients(self.chunks, args) if train else self.chunks
        self.optimizer = build_optimizer(self.model, args) if train else None
        per_layer = getattr(args, "moe_per_layer_logging", False)
        self.routers = Routers(self.chunks, config, per_layer=per_layer) if plan.is_moe else None

    def begin(self, total_steps: int) -> None:
        """Nothing to do: this engine has no schedule of its own."""

    def train_step(
        self, microbatches: Sequence[Batch], objective: Objective, *, lr: float, weight_decay: float
    ) -> StepResult:
        """One optimizer step. Raises FloatingPointError if the loss or the gradient is not finite."""
        timer = (
            PhaseTimer()
        )  # each phase ends with a number that the host reads, which synchronizes the device
        with timer("forward_backward"):
            for chunk in self.model:
                chunk.train()
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            if self.routers is not None:
                self.routers.begin_step(microbatches, objective)
            result = self._run(microbatches, objective, forward_only=False)
        if not math.isfinite(result.loss):
            raise FloatingPointError(f"the loss is {result.loss}; the weights are as they were")
        set_hyperparameters(self.optimizer, lr=lr, weight_decay=weight_decay)
        with timer("optimizer"):
            _, grad_norm, _ = self.optimizer.step()
            result.grad_norm = float(grad_norm) if grad_norm is not None else None
        result.phases_s = timer.take()
        if not math.isfinite(result.grad_norm or 0.0):
            raise FloatingPointError(
                f"the gradient norm is {result.grad_norm}; the weights of this run are spoiled"
            )
        return result

    @torch.no_grad()
    def evaluate_step(self, microbatches: Sequence[Batch], objective: Objective) -> StepResult:
        """Mean loss of the microbatches of all ranks, without dropout."""
        for chunk in self.model:
            chunk.eval()
        return self._run(microbatches, objective, forward_only=True)

    def logits(self, microbatches: Sequence[Batch]) -> list[Tensor]:
        """Logits `[b, s, vocabulary]` of each microbatch on the last pipeline stage; an empty list on other stages."""
        for chunk in self.model:
            chunk.eval()
        prepared = [self._prepare(batch) for batch in microbatches]
        return run_logits(self.model, prepared, self.plan.hf.vocab_size)

    @torch.no_grad()
    def checkpoint_shards(self, holds: Sequence[str], *, for_loading: bool = False) -> list[LiveShard]:
        """Views of this rank's part of a checkpoint that holds 'weights' and / or 'optimizer'.

        Collective: with `--overlap_param_gather`, updated weights stay on the ranks that updated them until the next
        forward pass gathers them, so they are gathered here.
        """
        if self.optimizer is not None and self.args.overlap_param_gather and not for_loading:
            for chunk in self.model:
                chunk.start_param_sync(force_sync=True)
        shards = self._trained_shards() if "weights" in holds else []
        if "optimizer" in holds:
            shards += optimizer_shards(self.optimizer, self.chunks, for_loading=for_loading)
        return shards

    def _trained_shards(self) -> list[LiveShard]:
        return trained_shards(self.chunks) if self.adapter else live_shards(self.chunks)

    def writes(self, shard: LiveShard) -> bool:
        """Whether this rank, among those with a replica of the shard, is the one to save it."""
        stage_copy, tensor_copy, data_copy = shard.replica
        if (stage_copy, tensor_copy) != (0, 0):
            return False
        if shard.key.startswith("optimizer.") and self.args.use_distributed_optimizer:
            return True  # every data-parallel rank has a different part
        copies = self.layout.edp if is_expert(shard.key) else self.layout.dp * self.layout.cp
        return data_copy == zlib.crc32(shard.key.encode()) % copies  # spread the writing over the replicas

    def optimizer_step(self) -> int:
        """Number of steps taken, by the optimizer's own counter. Collective: a rank may have nothing that trains."""
        taken = torch.tensor(optimizer_step(self.optimizer), device=get_accelerator().device)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        return int(taken)

    def after_load(self, parts: Sequence[str], *, optimizer_step: int) -> None:
        """Update the optimizer after `parts` have been filled: its main weights, or its step counter."""
        if self.optimizer is None:
            return
        if "optimizer" in parts:
            set_optimizer_step(self.optimizer, optimizer_step)
        else:
            self.optimizer.reload_model_params()

    def load_hf(self, model_dir: str, ranks: Ranks, budget: Budget) -> str:
        """Fill the model from a Hugging Face folder; returns a line for the log. Collective.

        Frozen weights beside an adapter are already loaded; the adapter is filled from `--adapters`, if it is given.
        """
        if self.adapter is None:
            return self._read(model_dir, ranks, budget)
        if not self.args.adapters:
            return "a new adapter, which initially changes nothing"
        table = self.plan.table
        source = PeftAdapter(self.args.adapters[0], table.matrices)
        names = adapter_names(table, self.adapter)
        read_adapter(source, self._trained_shards(), names, table, self.adapter)
        return f"adapter from {source.folder}"

    def load_frozen(self, ranks: Ranks, budget: Budget) -> None:
        """Load, or draw, the frozen weights beside an adapter. Collective."""
        if self.args.perform_initialization:
            self._draw()
        else:
            logger.info(self._read(self.args.model, ranks, budget))
        for adapter in self.adapted:
            adapter.begin()

    def _read(self, model_dir: str, ranks: Ranks, budget: Budget) -> str:
        with HFReader(model_dir, budget.staging) as reader:
            stats = load_hf(self.chunks, reader, self.plan.table, ranks)
        return f"read {stats.bytes_read / 1e6:.0f} MB of weights in {stats.seconds:.1f} s"

    def initialize(self) -> None:
        """Fill the trained weights with random values that do not depend on the layout."""
        if self.adapter is None:  # an adapter was initialized when it was attached
            self._draw()

    def _draw(self) -> None:
        std = self.plan.hf.initializer_range
        initialize(self.chunks, self.plan.table, std=std, seed=self.args.seed)

    def export_hf(self, folder: Path, max_shard_bytes: int, ranks: Ranks, budget: Budget) -> None:
        """Write a Hugging Face checkpoint, or the adapter as a PEFT folder, into an existing folder. Collective."""
        if self.adapter is not None:
            shards, table = self._trained_shards(), self.plan.table
            write_adapter(folder, shards, self.adapter, self.args.model, table, ranks, self.dtype)
            return
        write_hf(
            self.chunks, self.plan.table, self.args.model, folder, max_shard_bytes, self.dtype, ranks, budget
        )

    @torch.no_grad()
    def export_merged(self, folder: Path, max_shard_bytes: int, ranks: Ranks, budget: Budget) -> None:
        """Write the model with the adapter merged as a Hugging Face checkpoint. Collective.

        The frozen weights do not change: the merged weight of a layer is computed when it is written.
        """
        shards = merged_shards(self.chunks)
        source, table = self.args.model, self.plan.table
        write_shards_as_hf(shards, table, source, folder, max_shard_bytes, self.dtype, ranks, budget)

    def describe_adapter(self, folder: Path) -> None:
        """Write adapter_config.json, which describes the adapter in a checkpoint. On one rank."""
        linear = adaptable_modules(self.plan.table)
        modules = dict.fromkeys(map(module_of, adapter_names(self.plan.table, self.adapter)))
        write_config(folder, self.adapter, modules, linear, self.args.model)

    def check_budget(self, budget: Budget, ranks: Ranks) -> None:
        """Raise UserError, on every rank, if `export_hf` could not keep to the budget. Collective."""
        if self.adapter is None or self.args.merge_lora:  # adapters alone are small and are gathered whole
            check_budget(self.chunks, self.plan.table, budget, ranks)

    def training_flops(self, tokens: float, squares: float) -> float:
        """FLOPs of forward and backward pass, from the model's shape. squares: sum of squared sample lengths.

        The gradients of weights are a third of the work, and frozen weights have none.
        """
        return (2 + self.trained_share) / 3 * training_flops_of_sums(self._shape, tokens, squares)

    @cached_property
    def _shape(self) -> ModelShape:
        return replace(read_shape(Path(self.args.model)), num_mtp_layers=self.plan.multi_token_layers)

    @property
    def family(self) -> str:
        return self.plan.family.name

    @property
    def description(self) -> str:
        told = f"layers: {self.implementation}"
        if self.adapter is not None:
            told += f", LoRA of rank {self.adapter.rank}"
            if quantized_layers(self.chunks):
                told += " beside weights in 4 bits"
            told += ", merged at each save" if self.args.merge_lora else ""
        elif self.trained_share < 1:
            told += f", {self.trained_share:.0%} of the weights train"
        if self.layout.pp == 1 or not is_uneven(self.args):
            return told
        letters = stage_letters(
            self.layout, self._shape.num_layers, self.args, mtp=self.plan.multi_token_layers
        )
        return f"{told}, stages: {render_stages(letters)}"

    @property
    def dp_rank(self) -> int:
        return parallel_state.get_data_parallel_rank()

    @property
    def generators_name(self) -> str:
        """File name of this rank's random state."""
        ranks = {
            "tp": parallel_state.get_tensor_model_parallel_rank(),
            "pp": parallel_state.get_pipeline_model_parallel_rank(),
            "cp": parallel_state.get_context_parallel_rank(),
            "dp": parallel_state.get_data_parallel_rank(),
        }
        return "-".join(f"{axis}{rank}of{getattr(self.layout, axis)}" for axis, rank in ranks.items()) + ".pt"

    def random_state(self) -> dict[str, Any]:
        return random_state()

    def set_random_state(self, state: dict[str, Any]) -> None:
        set_random_state(state)

    def _run(self, microbatches: Sequence[Batch], objective: Objective, *, forward_only: bool) -> StepResult:
        prepared = [self._prepare(batch) for batch in microbatches]
        sums = run_microbatches(
            self.model,
            prepared,
            objective,
            forward_only=forward_only,
            ahead_weight=self.args.mtp_loss_scaling_factor,
        )
        tallies = None if self.routers is None or forward_only else self.routers.tallies()
        (loss, count, *metrics), tallies = reduce_over_ranks(sums, tallies)
        divisor = max(count, 1)
        named = {name: value / divisor for name, value in zip(objective.metrics, metrics, strict=False)}
        ahead, counts = metrics[len(objective.metrics) :], {}
        for depth, (total, terms) in enumerate(zip(ahead[::2], ahead[1::2], strict=True), start=1):
            named[f"mtp_{depth}_loss"] = total / max(terms, 1)
            counts[f"mtp_{depth}_loss"] = int(terms)
        if tallies is not None:
            named |= self.routers.metrics(tallies, len(microbatches) * self.layout.dp)
        return StepResult(loss / divisor, int(count), metrics=named, counts=counts)

    def _prepare(self, batch: Batch) -> Microbatch:
        return to_device(
            batch,
            get_accelerator().device,
            thd=self.implementation == "transformer_engine",
            depth=self.plan.multi_token_layers,
        )
