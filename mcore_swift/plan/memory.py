"""Memory of each rank while training: weights, gradients, optimizer, activations, logits, and a stated overhead.

An estimate, computed from the layout alone. What each part counts, in bytes:

* weights: w each (2 in bf16, 4 in fp32), what tensor parallelism splits / TP, routed experts / (EP x ETP).
* gradients: megatron-core's contiguous buffer, 4 each (2 with accumulate_allreduce_grads_in_fp32 false).
* optimizer: Adam's two moments and, where weights are not fp32, their fp32 copy: 12 or 8 each, shared by
  DP x CP ranks for dense parameters and by EDP ranks for experts (distributed optimizer = ZeRO stage 1,
  arXiv:1910.02054).
* activations: what the backward pass needs, after Korthikanti et al., arXiv:2205.05198, section 4, adapted to
  grouped queries, SwiGLU, no dropout, attention kernels that keep queries, keys, values, output and one number a
  row (arXiv:2205.14135), latent attention and experts: `layer_bytes`.
* adapters beside frozen weights: gradients and optimizer are of the adapters alone; frozen matrices in 4 bits take
  their packed bytes, and one of them at a time is there in full precision. Activations are taken to be as many: A keeps
  what the weight it is beside would keep.
* microbatches in flight: pp - p under 1F1B on stage p, and interleaved 2 (pp - p - 1) + (vpp - 1) pp + 1 chunks of
  1 / vpp stage (same paper, section 4.2.3; Narayanan et al., arXiv:2104.04473, section 2.2).
* logits: of our fused output layer and loss at their widest, `logit_bytes`.
* overhead: CUDA context, communication buffers, kernel workspaces, fragmentation: OVERHEAD_BYTES, a plain guess.

Experts are taken to be evenly loaded; early in training they are not, and the busiest rank needs more.
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
    """What `compute` gives, from the cache where there is one and it has been asked before."""
    if cache is None:
        return compute()
    if key not in cache:
        cache[key] = compute()
    return cache[key]


@dataclass(frozen=True)
class Recompute:
    """What the backward pass computes again: granularity none, selective or full, as the flags name it.

    modules: of core_attn, layernorm, mlp, moe, moe_act, mla_up_proj. num_layers: layers a chunk under full.
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
    """What a training run asks of memory and time beside model and layout.

    sequence_length: tokens of a row; num_microbatches: of each data-parallel rank in a step.
    weight_bytes: 2 (bf16) or 4 (fp32). optimizer_states: fp32 numbers that the optimizer keeps for a parameter.
    adapters: what trains beside frozen weights; None: all weights train.
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
        """Tokens of a microbatch on one rank: a context-parallel rank has its share of each row."""
        return self.micro_batch_size * self.sequence_length / layout.cp


@dataclass(frozen=True)
class Stage:
    """What the chunks of one pipeline rank hold: layers and the model's ends.

    kinds: (number of a layer, how many such layers) for each kind of layer (experts or not, window or not).
    """

    rank: int
    kinds: tuple[tuple[int, int], ...]
    has_embedding: bool = False
    has_loss: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by what they hold."""

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
    """Pipeline ranks of a layout. counts: decoder layers of each of the pp * vpp chunks, in the model's order."""
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
    """Memory of the stage that needs most. cache: keeps what layouts have in common, for one model and length."""
    # of stages that hold the same, the first keeps most microbatches
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
    """(dense, expert) parameters of a rank that train: all of them, or those of adapters."""
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
    """Bytes of the weights of a rank that stay as they are beside adapters; 0 where all train."""
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
    """A stage's layers by kind, with those that predict tokens further ahead."""
    return [*stage.kinds, (shape.num_layers, shape.num_mtp_layers if stage.has_loss else 0)]


def held_parameters(
    shape: ModelShape, layout: Layout, stage: Stage, cache: Cache | None = None
) -> tuple[float, float]:
    """(dense, expert) parameters in the memory of a rank; the vocabulary padded, a tied embedding on both ends."""
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
            tables += 1  # predicted tokens are embedded here
    if shape.tied and layout.pp == 1:
        tables = 1
    dense = sizes.split / layout.tp + sizes.whole + tables * rows * shape.hidden_size / layout.tp
    return dense, sizes.experts / (layout.ep * layout.etp)


def microbatches_in_flight(layout: Layout, rank: int, num_microbatches: int) -> float:
    """Microbatches whose activations pipeline rank `rank` keeps at its peak, in units of the whole stage."""
    if layout.pp == 1:
        return 1
    if layout.vpp is None:
        return min(layout.pp - rank, num_microbatches)
    chunks = 2 * (layout.pp - rank - 1) + (layout.vpp - 1) * layout.pp + 1
    return min(chunks / layout.vpp, num_microbatches)


def activation_bytes(
    shape: ModelShape, layout: Layout, run: Run, stage: Stage, cache: Cache | None = None
) -> float:
    """Activations of all microbatches in flight on one rank of a stage, and what one layer's backward pass adds."""
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
    """(kept until the backward pass, needed at once while it runs) by one layer, in bytes for each token."""
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
    """Logits and what the loss makes of them: in bf16 the logits, their fp32 copy and its exponentials (2 + 4 + 4),
    in fp32 the last two. One for each multi-token-prediction layer too, which are done one after the other."""
    rows = padded_vocab_size(shape.vocab_size, VOCABULARY_MULTIPLE, layout.tp) / layout.tp
    kept = 4 * shape.num_mtp_layers  # of each loss the fp32 logits stay until the backward pass
    return run.tokens(layout) * rows * ((10 if run.weight_bytes == 2 else 8) + kept)


def _split(layout: Layout) -> int:
    """Ranks among which activations outside of tensor-parallel regions are spread."""
    return layout.tp if layout.sequence_parallel else 1


def _norm_bytes(run: Run) -> int:
    """What a norm keeps of each number that goes in; unfused the number in fp32 and the normalised one."""
    return run.weight_bytes if run.fused else 4 + run.weight_bytes


def _attention_bytes(shape: ModelShape, layout: Layout, run: Run) -> float:
    """Output of the projection to queries, keys and values, which the values as a view of it keep whole; queries and
    keys turned by rotary positions; the attention's output; a number for each row and head; the latents of latent
    attention and what is made of them."""
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
    """Gate, up projection and their product; unfused the gate's own activation and its input again.

    Without a gate the input of the activation and of the second matrix."""
    parts = (3 if run.fused else 5) if shape.gated else 2
    return run.weight_bytes * parts * shape.ffn_hidden_size / layout.tp


def _expert_bytes(shape: ModelShape, layout: Layout, run: Run) -> float:
    """For each token the router's scores in fp32 (logits, probabilities, mask), and of each of its copies, one for
    every expert that sees it, the input, gate, up projection and product; the same of shared experts.

    Copies are spread evenly: a rank sends those of its tokens, and receives as many; with expert tensor parallelism
    every one of ETP ranks holds the tokens of all."""
    copies = shape.num_experts_per_token / _split(layout) * layout.etp
    parts = 3 if run.fused else 5
    width = shape.moe_ffn_hidden_size / layout.etp * (2 if run.recompute.drops("moe_act") else parts)
    router = 12 * shape.num_experts / _split(layout)
    shared = parts * shape.shared_ffn_hidden_size / layout.tp
    return router + run.weight_bytes * (copies * (shape.hidden_size + width) + shared)
