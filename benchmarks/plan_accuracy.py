"""The error of the planner's throughput estimates, compared with published figures.

    python benchmarks/plan_accuracy.py

One set of constants is used for all rows (mcore_swift/plan/timing.py). The published runs overlapped part of their
communication, and some used fp8 in linear layers. The estimate takes this into account, with the same overlap for all
rows, but no other optimizations (CUDA graphs, DeepEP, recomputation, offload), because the sources do not state them
row by row.
"""

from statistics import geometric_mean, median

from published import MODELS, ROWS, Published

from mcore_swift.plan import Layout, ModelShape
from mcore_swift.plan.flops import attention_flops, flops_per_token
from mcore_swift.plan.gpus import GPUS
from mcore_swift.plan.memory import GIB, Run, peak_memory, stages_of
from mcore_swift.plan.search import spread_layers
from mcore_swift.plan.timing import Cluster, Overlap, step_time

HIDDEN = Overlap(tp=0.8, cp=0.8, ep=0.0, dp=True)  # userbuffers and ring attention, for all rows


def estimate(row: Published) -> tuple[float, float, float]:
    """(published tokens/s per GPU, estimated tokens/s per GPU, estimated GiB of the fullest GPU) of a row."""
    config = MODELS[row.model] | ({"num_nextn_predict_layers": 1} if row.has_mtp else {})
    shape = ModelShape.from_config_dict(config)
    gpu = GPUS[row.gpu]
    layout = Layout(
        tp=row.tp, pp=row.pp, vpp=row.vpp, cp=row.cp, ep=row.ep, dp=row.gpus // (row.tp * row.pp * row.cp),
        sequence_parallel=row.tp > 1,
    )  # fmt: skip
    run = Run(
        micro_batch_size=row.micro_batch,
        num_microbatches=row.global_batch // (row.micro_batch * layout.dp),
        sequence_length=row.length,
    )
    stages = stages_of(shape, layout, spread_layers(shape.num_layers, layout))
    cluster = Cluster(gpu, gpu.gpus_per_node, HIDDEN, 2.0 if row.precision == "fp8" else 1.0)
    time = step_time(shape, layout, run, stages, cluster)
    memory = peak_memory(shape, layout, run, stages)
    return published_tokens(row, shape), time.tokens_per_s_per_gpu, memory.total / GIB


def published_tokens(row: Published, shape: ModelShape) -> float:
    """Tokens/s per GPU, computed from TFLOP/s if only those were published."""
    if row.tokens:
        return row.tokens
    causal_half = 3 * attention_flops(shape, row.length) / row.length / 2
    return row.tflops * 1e12 / (flops_per_token(shape, row.length) - causal_half)


def table() -> None:
    """Print a row for each published figure, and the overall error."""
    print(
        "| model | GPUs | | GBS/MBS | seq | TP PP CP VP EP | published tok/s/GPU | estimated | error | GiB | source |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    ratios = []
    for row in ROWS:
        said, got, gib = estimate(row)
        ratios.append(got / said)
        sizes = f"{row.tp} {row.pp} {row.cp} {row.vpp or '-'} {row.ep}"
        where = row.source + ("; weights sharded too (FSDP)" if row.has_fsdp else "")
        print(
            f"| {row.model} | {row.gpus} {row.gpu.upper()} | {row.precision} | {row.global_batch}/{row.micro_batch} | "
            f"{row.length} | {sizes} | {said:,.0f} | {got:,.0f} | {got / said - 1:+.0%} | {gib:.0f} | {where} |"
        )
    errors = [abs(ratio - 1) for ratio in ratios]
    print(
        f"\n{len(ratios)} rows: median |error| {median(errors):.0%}, largest {max(errors):.0%}, "
        f"mean ratio {geometric_mean(ratios):.2f}"
    )


if __name__ == "__main__":
    table()
