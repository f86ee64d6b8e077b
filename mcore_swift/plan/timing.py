"""Time of a training step, estimated from sizes: arithmetic, memory traffic, communication, pipeline bubble.

A first-order model for ranking layouts. Its assumptions are the constants below, which are the same for every model,
layout and GPU; benchmarks/README.md compares it with published figures and states its errors.

* Linear layers run at GEMM_EFFICIENCY of the bf16 peak, less for narrow ones: a dimension d takes the time of
  d + GEMM_EDGE (partly filled tiles and waves). Weights are read once per pass, gradients are accumulated in fp32.
* Attention runs at ATTENTION_EFFICIENCY of the peak on the causal half. Its backward pass has 2.5 times the arithmetic
  of the forward pass, since scores are recomputed (arXiv:2205.14135, arXiv:2307.08691).
* Norms, residuals, activations and the copies of tokens sent to experts cost memory traffic.
* A layer of experts makes the host wait for token counts: DISPATCH_S each in forward and backward pass.
* Tensor parallelism moves the same amount with and without sequence parallelism (arXiv:2205.05198, section 4.2.2):
  a gather and a scatter of [tokens, h] in each of attention and MLP, forward and backward. Sequence parallelism adds
  a gather in the backward pass. None of it is hidden unless `Overlap` says so.
* Context parallelism gathers keys and values and scatters their gradients, or exchanges heads by all-to-all.
* Expert parallelism exchanges every copy of a token twice forward and twice backward, by all-to-all.
* Gradients (fp32) are reduce-scattered and weights gathered once per step, hidden behind the arithmetic of one
  microbatch (overlap_grad_reduce, overlap_param_gather).
* With adapters, no weight gradients are computed for frozen weights, and the adapters themselves are neglected; 4-bit
  weights cost the memory traffic of dequantizing them, forward and backward.
* The pipeline fills and drains in (pp - 1) / vpp microbatches (Narayanan et al., arXiv:2104.04473, section 2.2);
  stages wait for the slowest one.
* Transfers reach LINK_EFFICIENCY of a link. A group that spans nodes uses the network adapters of its members in each
  node.
"""

from dataclasses import dataclass, field, replace

from .count import layer_matmuls, layer_sizes
from .flops import attention_flops_of_layer, flops_per_token
from .gpus import Gpu
from .layout import Layout
from .low_rank import matrices
from .memory import Cache, Run, Stage, remembered, trained_parameters
from .shape import ModelShape, padded_vocab_size

GEMM_EFFICIENCY = 0.65
GEMM_EDGE = 128
ATTENTION_EFFICIENCY = 0.45
MEMORY_EFFICIENCY = 0.75
LINK_EFFICIENCY = 0.75
DISPATCH_S = 0.0005


@dataclass(frozen=True)
class Overlap:
    """Shares of communication that are hidden behind arithmetic. The defaults are our engine's: only data parallelism's
    communication and most messages between interleaved stages are hidden."""

    tp: float = 0.0
    cp: float = 0.0
    ep: float = 0.0
    dp: bool = True
    interleaved: float = 0.8


@dataclass(frozen=True)
class Cluster:
    """GPUs and their links. linear_speed: of linear layers relative to bf16 (2 for fp8, used in comparisons)."""

    gpu: Gpu
    gpus_per_node: int
    overlap: Overlap = field(default_factory=Overlap)
    linear_speed: float = 1.0

    def gather_s(self, size: float, group: int, stride: int) -> float:
        """Seconds to gather (or reduce-scatter) `size` bytes over a group whose ranks are `stride` apart."""
        if group == 1:
            return 0.0
        members = self._members(group, stride)
        speed = (
            self.gpu.node_gbs if members == group else min(self.gpu.node_gbs, members * self.gpu.network_gbs)
        )
        return size * (group - 1) / group / (1e9 * LINK_EFFICIENCY * speed)

    def exchange_s(self, size: float, group: int, stride: int) -> float:
        """Seconds of an all-to-all in which each rank of a group sends `size` bytes, spread evenly."""
        members = self._members(group, stride)
        inside, outside = (members - 1) / group, (group - members) / group
        seconds = inside / self.gpu.node_gbs + outside / self.gpu.network_gbs
        return size * seconds / (1e9 * LINK_EFFICIENCY)

    def send_s(self, size: float, stride: int) -> float:
        """Seconds to send `size` bytes to the rank at distance `stride`."""
        inside = stride < self.gpus_per_node
        speed = self.gpu.node_gbs if inside else self.gpu.network_gbs
        return size / (1e9 * LINK_EFFICIENCY * speed)

    def traffic_s(self, size: float) -> float:
        """Seconds to read or write `size` bytes of the GPU's own memory."""
        return size / (1e12 * MEMORY_EFFICIENCY * self.gpu.hbm_tbs)

    def gemm_s(self, m: float, n: float, k: float) -> float:
        """Seconds of a matrix product [m, k] x [k, n]."""
        padded = (m + GEMM_EDGE) * (n + GEMM_EDGE) * (k + GEMM_EDGE)
        return 2 * padded / (GEMM_EFFICIENCY * self.gpu.peak_flops * self.linear_speed)

    def _members(self, group: int, stride: int) -> int:
        """Number of a group's ranks in one node."""
        return max(1, min(group, self.gpus_per_node // stride))


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one microbatch in one layer. work: forward and backward arithmetic and memory traffic."""

    work: float = 0.0
    recompute: float = 0.0
    tp: float = 0.0
    cp: float = 0.0
    ep: float = 0.0

    def __add__(self, other: "LayerTime") -> "LayerTime":
        return LayerTime(*(mine + others for mine, others in zip(self.parts(), other.parts(), strict=True)))

    def __mul__(self, times: float) -> "LayerTime":
        return LayerTime(*(times * part for part in self.parts()))

    def parts(self) -> tuple[float, ...]:
        return (self.work, self.recompute, self.tp, self.cp, self.ep)

    @property
    def total(self) -> float:
        return sum(self.parts())


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by use; the parts add up to `total`.

    bubble: waiting for the pipeline to fill and drain, and for its slowest stage. bubble_share: the share of the step
    spent on filling and draining, (pp - 1) / vpp out of m + (pp - 1) / vpp for m microbatches.
    """

    work: float
    recompute: float
    tp: float
    cp: float
    ep: float
    pp: float
    bubble: float
    dp: float
    optimizer: float
    bubble_share: float
    tokens_per_s_per_gpu: float
    flops_per_s_per_gpu: float

    @property
    def total(self) -> float:
        parts = (
            self.work,
            self.recompute,
            self.tp,
            self.cp,
            self.ep,
            self.pp,
            self.bubble,
            self.dp,
            self.optimizer,
        )
        return sum(parts)


def step_time(
    shape: ModelShape,
    layout: Layout,
    run: Run,
    stages: list[Stage],
    cluster: Cluster,
    cache: Cache | None = None,
) -> StepTime:
    """Estimated time of one step. stages: from `memory.stages_of`; cache: see `memory.peak_memory`."""
    sizes = (layout.tp, layout.cp, layout.ep, layout.etp, layout.sequence_parallel)
    common = (*sizes, run.micro_batch_size, run.recompute)

    def layer(index: int) -> LayerTime:
        key = ("time", index, *common)
        return remembered(cache, key, lambda: layer_time(shape, layout, run, index, cluster))

    held = {stage.kinds: LayerTime() for stage in stages}
    for kinds in held:
        held[kinds] = sum((layer(kind) * count for kind, count in kinds), LayerTime())
    each = [held[stage.kinds] for stage in stages]
    last = sum((layer(shape.num_layers) for _ in range(shape.num_mtp_layers)), LayerTime())
    each[-1] += last + LayerTime(work=_loss_s(shape, layout, run, cluster))
    count, slowest = run.num_microbatches, max(each, key=lambda time: time.total)
    mean = sum(each, LayerTime()) * (count / layout.pp)
    fill = (layout.pp - 1) / (layout.vpp or 1)
    bubble = (count + fill) * slowest.total - mean.total
    sends = 2 * count * (1 if layout.vpp is None else layout.vpp * (1 - cluster.overlap.interleaved))
    sends = sends if layout.pp > 1 else 0
    split = layout.tp if layout.sequence_parallel else 1
    message = run.tokens(layout) * shape.hidden_size * run.weight_bytes / split
    pp = sends * cluster.send_s(message, layout.tp * layout.cp * layout.dp)
    dp, optimizer = _data_parallel(shape, layout, run, stages, cluster, slowest.total, cache)
    total = mean.total + pp + bubble + dp + optimizer
    tokens = run.micro_batch_size * count * layout.dp * run.sequence_length / total / layout.world_size
    flops = remembered(
        cache, "flops", lambda: flops_per_token(shape, run.sequence_length, trains=not run.adapters)
    )
    share = fill / (count + fill)
    return StepTime(*mean.parts(), pp, bubble, dp, optimizer, share, tokens, tokens * flops)


def layer_time(shape: ModelShape, layout: Layout, run: Run, index: int, cluster: Cluster) -> LayerTime:
    """One microbatch, forward and backward, in layer `index`."""
    h, w, tokens = shape.hidden_size, run.weight_bytes, run.tokens(layout)
    split = layout.tp if layout.sequence_parallel else 1
    is_moe, granularity = shape.is_moe_layer(index), run.recompute.granularity
    attention = _linear_attention_s(shape, layout, tokens, cluster)
    scores = _scores_s(shape, layout, run, index, cluster)
    mlp, copies = _mlp_s(shape, layout, tokens, is_moe, cluster)
    matrices = 2 + shape.gated
    width = shape.query_size + 2 * shape.kv_size + (0 if is_moe else matrices * shape.ffn_hidden_size)
    around = cluster.traffic_s(tokens * w * (10 * h / split + 2 * width / layout.tp) + copies * w * 8 * h)
    dispatch = DISPATCH_S if is_moe else 0.0
    forward = attention + scores + mlp + around + dispatch
    linear = (1 if run.adapters else 2) * (attention + mlp)
    weights = _weights_s(shape, layout, run, index, cluster)
    backward = linear + 2 * around + 2.5 * scores + dispatch + weights
    gathers = tokens * h * w
    tp_once = cluster.gather_s(gathers, layout.tp, 1) * (1 - cluster.overlap.tp)
    cp = _context_s(shape, layout, run, cluster)
    ep_once = 0.0
    if is_moe:
        ep_once = cluster.exchange_s(copies / layout.etp * h * w, layout.ep, layout.etp) * 2
        ep_once += cluster.gather_s(copies * h * w, layout.etp, 1) * 2
        ep_once *= 1 - cluster.overlap.ep
    again = LayerTime()
    if granularity == "full":
        again = LayerTime(recompute=forward, tp=4 * tp_once, cp=cp / 3, ep=ep_once)
    elif granularity == "selective":
        again = LayerTime(recompute=_again_s(run, scores, mlp + dispatch, is_moe, attention, shape))
        if run.recompute.drops("moe" if is_moe else "mlp"):
            again += LayerTime(tp=2 * tp_once * (not is_moe), ep=ep_once)
    parts = 2 if is_moe else 4  # TP gathers and scatters for attention only: experts are divided by ETP
    more = parts // 2 if layout.sequence_parallel else 0
    times = LayerTime(work=forward + backward, tp=(2 * parts + more) * tp_once, cp=cp, ep=2 * ep_once)
    return times + again


def _linear_attention_s(shape: ModelShape, layout: Layout, tokens: float, cluster: Cluster) -> float:
    """Forward seconds of attention's projections, as one product of their combined width."""
    matmuls = layer_matmuls(replace(shape, num_experts=0, ffn_hidden_size=0, moe_layers=()), 0)
    return cluster.gemm_s(tokens, matmuls / shape.hidden_size / layout.tp / 2, shape.hidden_size) * 2


def _scores_s(shape: ModelShape, layout: Layout, run: Run, index: int, cluster: Cluster) -> float:
    flops = attention_flops_of_layer(shape, index, run.sequence_length) / 2 * run.micro_batch_size
    return flops / layout.tp / layout.cp / (ATTENTION_EFFICIENCY * cluster.gpu.peak_flops)


def _mlp_s(
    shape: ModelShape, layout: Layout, tokens: float, is_moe: bool, cluster: Cluster
) -> tuple[float, float]:
    """(forward seconds, copies of tokens that this rank's experts receive)."""
    h = shape.hidden_size
    if not is_moe:
        return (2 + shape.gated) * cluster.gemm_s(tokens, shape.ffn_hidden_size / layout.tp, h), 0.0
    split = layout.tp if layout.sequence_parallel else 1
    copies = tokens / split * shape.num_experts_per_token * layout.etp
    local = shape.num_experts / layout.ep
    seconds = 3 * local * cluster.gemm_s(copies / local, shape.moe_ffn_hidden_size / layout.etp, h)
    if shape.shared_ffn_hidden_size:
        seconds += 3 * cluster.gemm_s(tokens, shape.shared_ffn_hidden_size / layout.tp, h)
    return seconds, copies


def _weights_s(shape: ModelShape, layout: Layout, run: Run, index: int, cluster: Cluster) -> float:
    """Seconds to accumulate a layer's fp32 gradients, or to dequantize its frozen 4-bit weights twice."""
    if run.adapters:
        stored = run.adapters.matrix_bytes
        held = 0 if stored is None else sum(matrix.held(layout) for matrix in matrices(shape, index))
        return 2 * cluster.traffic_s(((stored or 0) + 2 * run.weight_bytes) * held)
    sizes = layer_sizes(shape, index)
    held = sizes.split / layout.tp + sizes.whole + sizes.experts / (layout.ep * layout.etp)
    return cluster.traffic_s(8 * held)


def _again_s(run: Run, scores: float, mlp: float, is_moe: bool, attention: float, shape: ModelShape) -> float:
    """Seconds of selective recomputation; norms and activations are cheap and not counted."""
    seconds = scores if run.recompute.drops("core_attn") else 0.0
    if run.recompute.drops("moe" if is_moe else "mlp"):
        seconds += mlp
    if shape.is_mla and run.recompute.drops("mla_up_proj"):
        seconds += attention / 2
    return seconds


def _context_s(shape: ModelShape, layout: Layout, run: Run, cluster: Cluster) -> float:
    """Seconds to gather keys and values forward and backward, and to scatter their gradients."""
    if layout.cp == 1:
        return 0.0
    size = run.micro_batch_size * run.sequence_length * 2 * shape.kv_size / layout.tp * run.weight_bytes
    return 3 * cluster.gather_s(size, layout.cp, layout.tp) * (1 - cluster.overlap.cp)


def _loss_s(shape: ModelShape, layout: Layout, run: Run, cluster: Cluster) -> float:
    """Seconds of output layer and loss, forward and backward, those of multi-token prediction included."""
    rows = padded_vocab_size(shape.vocab_size, 1, layout.tp) / layout.tp
    tokens = run.tokens(layout)
    passes = 2 if run.adapters else 3
    once = passes * cluster.gemm_s(tokens, rows, shape.hidden_size) + cluster.traffic_s(tokens * rows * 30)
    return once * (1 + shape.num_mtp_layers)


def _data_parallel(
    shape: ModelShape,
    layout: Layout,
    run: Run,
    stages: list[Stage],
    cluster: Cluster,
    microbatch_s: float,
    cache: Cache | None,
) -> tuple[float, float]:
    """(exposed communication of gradients and weights, optimizer's memory traffic) in seconds per step, worst stage."""
    worst = (0.0, 0.0)
    per_rank = run.gradient_bytes + run.weight_bytes
    for stage in {stages[0], stages[-1]}:
        dense, experts = trained_parameters(shape, layout, run, stage, cache)
        seconds = cluster.gather_s(dense * per_rank, layout.dp * layout.cp, layout.tp)
        seconds += cluster.gather_s(experts * per_rank, layout.edp, layout.etp * layout.ep)
        exposed = max(0.0, seconds - microbatch_s) if cluster.overlap.dp else seconds
        shard = dense / (layout.dp * layout.cp) + experts / layout.edp
        worst = max(worst, (exposed, cluster.traffic_s(30 * shard)), key=sum)
    return worst
