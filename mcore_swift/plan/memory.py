"""Memory of each rank while training: weights, gradients, optimizer, activations, logits, and a stated overhead.

An estimate, computed from the layout alone. Bytes of each part:

* weights: w each (2 in bf16, 4 in fp32), divided by TP where tensor parallelism splits them, by EP x ETP for routed
  experts.
* gradients: megatron-core's contiguous buffer, 4 each (2 with accumulate_allreduce_grads_in_fp32 false).
* optimizer: Adam's two moments and, where weights are not fp32, their fp32 copy: 12 or 8 each, sharded over the
  DP x CP ranks for dense parameters and over the EDP ranks for experts (distributed optimizer = ZeRO stage 1,
  arXiv:1910.02054).
* activations (`layer_bytes`): what the backward pass needs, after Korthikanti et al., arXiv:2205.05198, section 4,
  adapted to grouped queries, SwiGLU, no dropout, attention kernels that keep queries, keys, values, output and one
  number per row (arXiv:2205.14135), latent attention and experts.
* adapters beside frozen weights: only the adapters have gradients and optimizer state; frozen 4-bit matrices take
  their packed bytes, plus one matrix at a time in full precision. Activations are assumed to be the same: A keeps the
  input that its frozen weight would keep.
* microbatches in flight: pp - p on stage p under 1F1B; if interleaved, 2 (pp - p - 1) + (vpp - 1) pp + 1 chunks of
  1 / vpp stage (same paper, section 4.2.3; Narayanan et al., arXiv:2104.04473, section 2.2).
* logits (`logit_bytes`): the peak of our fused output layer and loss.
* overhead: OVERHEAD_BYTES for CUDA context, communication buffers, kernel workspaces and fragmentation; a guess.

Experts are assumed to be evenly loaded. Early in training they are not, and the busiest rank needs more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .count import Sizes, layer_sizes, mtp_sizes
from .layout import Layout
from .low_rank import LowRank, matrices
from .shape import ModelShape, padded_vocab_size

GIB = 1024**3
OVERHEAD_BYTES = 3 * GIB
VOCABULARY_MULTIPLE = 128  # rows of the vocabulary are padded to a multiple of it


Cache = dict[Any, Any]
T = TypeVar("T")


def remembered(cache: Cache | None, key: Any, compute: Callable[[], T]) -> T:
    """The result of `compute`, from the cache if there is one and it has it."""
    if cache is None:
        return compute()
    if key not in cache:
        cache[key] = compute()
    return cache[key]


@dataclass(frozen=True)
class Recompute:
    """What the backward pass recomputes: granularity none, selective or full, as in the flags.

    modules: under selective, some of core_attn, layernorm, mlp, moe, moe_act, mla_up_proj. num_layers: under full,
    layers per recomputed chunk.
    """

    granularity: str = "selective"
    modules: frozenset[str] = frozenset({"core_attn"})
    num_layers: int = 1

    def drops(self, module: str) -> bool:
        return self.granularity == "selective" and module in self.modules

    def __str__(self) -> str:
        if self.granularity != "selective":
            return self.granularity
        return "+".join(sorted(self.modules))


@dataclass(frozen=True)
class Run:
    """What determines the memory and time of a training run, besides model and layout.

    sequence_length: tokens per row; num_microbatches: per data-parallel rank and step.
    weight_bytes: 2 (bf16) or 4 (fp32). optimizer_states: fp32 numbers that the optimizer keeps per parameter.
    adapters: trained beside frozen weights; None: all weights train.
    """

    micro_batch_size: int = 1
    num_microbatches: int = 1
    sequence_length: int = 4096
    weight_bytes: int = 2
    gradient_bytes: int = 4
    optimizer_states: int = 2
    distributed_optimizer: bool = True
    recompute: Recompute = field(default_factory=Recompute)
    overhead_bytes: int = OVERHEAD_BYTES
    fused: bool = True
    adapters: LowRank | None = None

    def tokens(self, layout: Layout) -> float:
        """Tokens of a microbatch on one rank; a context-parallel rank has its share of each row."""
        return self.micro_batch_size * self.sequence_length / layout.cp


@dataclass(frozen=True)
class Stage:
    """What the chunks of one pipeline rank hold: layers, and possibly the embedding and the loss.

    kinds: for each kind of layer (experts or not, window or not), (number of one such layer, how many there are).
    """

    rank: int
    kinds: tuple[tuple[int, int], ...]
    has_embedding: bool = False
    has_loss: bool = False


@dataclass(frozen=True)
class Memory:
    """Memory of one rank in bytes, by use."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    overhead: float

    @property
    def total(self) -> float:
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.logits, self.overhead)
        return sum(parts)


def stages_of(shape: ModelShape, layout: Layout, counts: Sequence[int]) -> list[Stage]:
    """One Stage per pipeline rank. counts: decoder layers of each of the pp * vpp chunks, in the model's order."""
    ends = [sum(counts[: index + 1]) for index in range(len(counts))]
    chunks = [range(end - count, end) for end, count in zip(ends, counts, strict=True)]
    alike: dict[tuple[bool, int | None], int] = {}
    kinds = [
        alike.setdefault((shape.is_moe_layer(index), shape.window(index)), index)
        for index in range(shape.num_layers)
    ]
    stages = []
    for rank in range(layout.pp):
        held = [kinds[layer] for chunk in chunks[rank :: layout.pp] for layer in chunk]
        counted = tuple((kind, held.count(kind)) for kind in sorted({*held}))
        stages.append(Stage(rank, counted, has_embedding=rank == 0, has_loss=rank == layout.pp - 1))
    return stages


def peak_memory(
    shape: ModelShape, layout: Layout, run: Run, stages: list[Stage], cache: Cache | None = None
) -> Memory:
    """Memory of the stage that needs most. cache: reuses what layouts share, for one model and sequence length."""
    # of stages with the same layers, the first keeps the most microbatches
    first = {(stage.kinds, stage.has_embedding, stage.has_loss): stage for stage in reversed(stages)}
    all_of_them = (stage_memory(shape, layout, run, stage, cache) for stage in first.values())
    return max(all_of_them, key=lambda memory: memory.total)


def stage_memory(
    shape: ModelShape, layout: Layout, run: Run, stage: Stage, cache: Cache | None = None
) -> Memory:
    """Memory of each rank of one pipeline stage."""
    dense, experts = trained_parameters(shape, layout, run, stage, cache)
    shards = (layout.dp * layout.cp, layout.edp) if run.distributed_optimizer else (1, 1)
    states = 4 * (run.optimizer_states + (run.weight_bytes < 4))
    return Memory(
        stage=stage.rank,
        weights=run.weight_bytes * (dense + experts) + frozen_bytes(shape, layout, run, stage, cache),
        gradients=run.gradient_bytes * (dense + experts),
        optimizer=states * (dense / shards[0] + experts / shards[1]),
        activations=activation_bytes(shape, layout, run, stage, cache),
        logits=logit_bytes(shape, layout, run) if stage.has_loss else 0,
        overhead=run.overhead_bytes,
    )


def trained_parameters(
    shape: ModelShape, layout: Layout, run: Run, stage: Stage, cache: Cache | None = None
) -> tuple[float, float]:
    """(dense, expert) trained parameters on a rank: all of them, or those of the adapters."""
    if run.adapters is None:
        return held_parameters(shape, layout, stage, cache)
    dense, experts = 0.0, 0.0
    for kind, count in _with_ahead(shape, stage):
        for matrix in matrices(shape, kind):
            held = count * matrix.adapters(layout, run.adapters.rank)
            dense, experts = (dense, experts + held) if matrix.expert else (dense + held, experts)
    return dense, experts


def frozen_bytes(
    shape: ModelShape, layout: Layout, run: Run, stage: Stage, cache: Cache | None = None
) -> float:
    """Bytes of the frozen weights on a rank beside adapters; 0 if all weights train."""
    if run.adapters is None:
        return 0
    total = run.weight_bytes * sum(held_parameters(shape, layout, stage, cache))
    if run.adapters.matrix_bytes is None:
        return total
    held = [(matrix, count) for kind, count in _with_ahead(shape, stage) for matrix in matrices(shape, kind)]
    saved = (run.weight_bytes - run.adapters.matrix_bytes) * sum(
        matrix.held(layout) * count for matrix, count in held
    )
    in_full = max((matrix.held(layout) / matrix.count for matrix, _ in held if not matrix.expert), default=0)
    return total - saved + run.weight_bytes * in_full


def _with_ahead(shape: ModelShape, stage: Stage) -> list[tuple[int, int]]:
    """A stage's layers by kind, multi-token-prediction layers included."""
    return [*stage.kinds, (shape.num_layers, shape.num_mtp_layers if stage.has_loss else 0)]


def held_parameters(
    shape: ModelShape, layout: Layout, stage: Stage, cache: Cache | None = None
) -> tuple[float, float]:
    """(dense, expert) parameters in a rank's memory: vocabulary padded, a tied embedding on first and last stage."""
    each = (
        remembered(cache, ("sizes", kind), lambda kind=kind: layer_sizes(shape, kind)) * count
        for kind, count in stage.kinds
    )
    sizes = sum(each, Sizes())
    rows = padded_vocab_size(shape.vocab_size, VOCABULARY_MULTIPLE, layout.tp)
    tables = stage.has_embedding + stage.has_loss
    if stage.has_loss:
        sizes += Sizes(whole=shape.hidden_size)
        for _ in range(shape.num_mtp_layers):
            sizes += mtp_sizes(shape)
        if shape.num_mtp_layers and not stage.has_embedding:
            tables += 1  # multi-token prediction needs the input embedding too
    if shape.tied and layout.pp == 1:
        tables = 1
    dense = sizes.split / layout.tp + sizes.whole + tables * rows * shape.hidden_size / layout.tp
    return dense, sizes.experts / (layout.ep * layout.etp)


def microbatches_in_flight(layout: Layout, rank: int, num_microbatches: int) -> float:
    """Microbatches whose activations pipeline rank `rank` keeps at its peak; a chunk counts as 1 / vpp of one."""
    if layout.pp == 1:
        return 1
    if layout.vpp is None:
        return min(layout.pp - rank, num_microbatches)
    chunks = 2 * (layout.pp - rank - 1) + (layout.vpp - 1) * layout.pp + 1
    return min(chunks / layout.vpp, num_microbatches)


def activation_bytes(
    shape: ModelShape, layout: Layout, run: Run, stage: Stage, cache: Cache | None = None
) -> float:
    """Bytes of activations on one rank of a stage: all microbatches in flight, and one layer's backward pass."""
    tokens = run.tokens(layout)
    kinds = {shape.is_moe_layer(kind): 0 for kind, _ in stage.kinds}
    for kind, count in stage.kinds:
        kinds[shape.is_moe_layer(kind)] += count
    if stage.has_loss and shape.num_mtp_layers:
        is_moe = shape.is_moe_layer(shape.num_layers)
        kinds[is_moe] = kinds.get(is_moe, 0) + shape.num_mtp_layers
    if not kinds:
        return 0
    split = (layout.tp, layout.ep, layout.etp, layout.sequence_parallel, run.recompute)
    each = {
        is_moe: remembered(
            cache, ("bytes", is_moe, *split), lambda is_moe=is_moe: layer_bytes(shape, layout, run, is_moe)
        )
        for is_moe in kinds
    }
    kept = sum(each[is_moe][0] * count for is_moe, count in kinds.items())
    working = max(bytes_at_once for _, bytes_at_once in each.values())
    flight = microbatches_in_flight(layout, stage.rank, run.num_microbatches)
    ends = (
        2 * run.weight_bytes * shape.hidden_size / _split(layout) if stage.has_loss else 0
    )  # the final norm
    return tokens * (flight * (kept + ends) + working)


def layer_bytes(shape: ModelShape, layout: Layout, run: Run, is_moe: bool) -> tuple[float, float]:
    """Bytes per token of one layer: (kept until its backward pass, needed at once while that runs)."""
    w, recompute = run.weight_bytes, run.recompute
    attention = _attention_bytes(shape, layout, run)
    inside = (_expert_bytes if is_moe else _mlp_bytes)(shape, layout, run)
    dropped = recompute.drops("moe" if is_moe else "mlp")
    norms = (
        shape.norms_per_layer * _norm_bytes(run) * shape.hidden_size / _split(layout)
    )  # the input of each norm
    norms += (
        2 * w * shape.hidden_size / _split(layout) * (not recompute.drops("layernorm"))
    )  # and of what follows
    kept = attention + norms + (0 if dropped else inside)
    gradients = inside + 2 * w * shape.hidden_size / _split(layout)  # of the MLP, the widest part
    if recompute.granularity == "full":
        chunk = recompute.num_layers
        return w * shape.hidden_size / _split(layout) / chunk, kept * chunk + gradients
    return kept, gradients + (inside if dropped else 0)


def logit_bytes(shape: ModelShape, layout: Layout, run: Run) -> float:
    """Bytes of the logits and of what the loss computes from them.

    Per logit 2 + 4 + 4 in bf16 (logits, their fp32 copy and its exponentials), 4 + 4 in fp32. Multi-token-prediction
    layers have their own losses, computed one after another.
    """
    rows = padded_vocab_size(shape.vocab_size, VOCABULARY_MULTIPLE, layout.tp) / layout.tp
    kept = 4 * shape.num_mtp_layers  # each loss keeps its fp32 logits until the backward pass
    return run.tokens(layout) * rows * ((10 if run.weight_bytes == 2 else 8) + kept)


def _split(layout: Layout) -> int:
    """Number of ranks that activations outside tensor-parallel regions are divided over."""
    return layout.tp if layout.sequence_parallel else 1


def _norm_bytes(run: Run) -> int:
    """Bytes that a norm keeps per input element; unfused, the element in fp32 and its normalized value."""
    return run.weight_bytes if run.fused else 4 + run.weight_bytes


def _attention_bytes(shape: ModelShape, layout: Layout, run: Run) -> float:
    """Bytes that attention keeps per token.

    The output of the projection to queries, keys and values, kept whole because the values are a view of it; rotated
    queries and keys; the output of attention; one number per row and head; in latent attention, the latents and their
    up projections.
    """
    w, recompute, heads = run.weight_bytes, run.recompute, shape.num_heads / layout.tp
    output = w * heads * shape.value_dim
    rows = 4 * heads * (not recompute.drops("core_attn"))
    if shape.is_mla:
        latents = 2 * shape.kv_lora_rank + shape.qk_rope_head_dim + 2 * (shape.q_lora_rank or 0)
        up = heads * (2 * shape.head_dim + shape.value_dim) * (not recompute.drops("mla_up_proj"))
        return w * (latents / _split(layout) + up) + output + rows
    turned = shape.query_size + shape.kv_size
    norms = shape.qk_norm * (_norm_bytes(run) - w) * turned  # their inputs are in the projection's output
    return (w * (turned + shape.query_size + 2 * shape.kv_size) + norms) / layout.tp + output + rows


def _mlp_bytes(shape: ModelShape, layout: Layout, run: Run) -> float:
    """Bytes that an MLP keeps per token.

    With a gate: gate, up projection and their product; unfused, also the gate's activation and its input.
    Without: the inputs of the activation and of the second matrix.
    """
    parts = (3 if run.fused else 5) if shape.gated else 2
    return run.weight_bytes * parts * shape.ffn_hidden_size / layout.tp


def _expert_bytes(shape: ModelShape, layout: Layout, run: Run) -> float:
    """Bytes that a layer of experts keeps per token.

    The router's fp32 logits, probabilities and mask; for each of the token's copies (one per expert it is sent to)
    the input, gate, up projection and product; the same for shared experts.

    Loads are assumed even: a rank receives as many copies as it sends. With expert tensor parallelism, each of the ETP
    ranks holds the tokens of all of them.
    """
    copies = shape.num_experts_per_token / _split(layout) * layout.etp
    parts = 3 if run.fused else 5
    width = shape.moe_ffn_hidden_size / layout.etp * (2 if run.recompute.drops("moe_act") else parts)
    router = 12 * shape.num_experts / _split(layout)
    shared = parts * shape.shared_ffn_hidden_size / layout.tp
    return router + run.weight_bytes * (copies * (shape.hidden_size + width) + shared)
