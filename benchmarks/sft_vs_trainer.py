"""`megatron sft` with packing vs. transformers' Trainer and TRL's SFTTrainer: tokens/s on the same model and samples.

    python benchmarks/sft_vs_trainer.py --rounds 3
    python benchmarks/sft_vs_trainer.py --rounds 3 --lora --sides ours "ours, transformers" Trainer TRL

Trains all parameters, or with --lora adapters of rank 8 on all linear layers, which are peft's for Trainer and TRL. TRL
is not a dependency of this project: `pip install trl`.

A random Qwen3 of 17 million parameters in fp32, conversations of log-normal length with half of the tokens learnt (or
--dataset), AdamW, clipping, one process. Every optimizer step uses the same samples on all sides: ours as packed rows,
Trainer's in --accumulation batches of whole samples, each padded to its longest. Trainer gets tokenized samples, and
sums its loss over the step's tokens as we do.

Sides, each in its own process, in turns:
  ours              megatron sft --packing true, nothing recomputed
  ours, default     the same with the default, selective recomputation of attention
  ours, transformers  swift sft --backend fsdp --packing true on transformers' own layers
  Trainer           the samples of a step in random order
  Trainer, sorted   the samples of a step sorted by length before they are cut into batches: less padding than its
                    own group_by_length leaves
  TRL               SFTTrainer with the batches of "Trainer", without checkpointing of activations

Tokens/s are real tokens, without padding, divided by the time between the terminal's lines for the last warm-up step
and for the last step. Memory is the peak resident size of the process, which includes the imported libraries and so
differs between sides. The output has medians over the rounds and ratios within each round. The losses of the first step
must agree to 1e-4; otherwise the work is not the same, and the benchmark fails.
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import peers
from measuring import ROOT, environment, flags, on_this_machine, program, spread, stamped_lines
from workload import SIZES, Workload, make_workload

SIDES = ("ours", "ours, default", "ours, transformers", "Trainer", "Trainer, sorted", "TRL")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="steps that count in each run")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before them")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a packed row")
    parser.add_argument("--rows", type=int, default=2, help="packed rows of a step")
    parser.add_argument("--accumulation", type=int, default=4, help="batches of Trainer in a step")
    parser.add_argument("--sides", nargs="+", default=list(SIDES[:-1]), choices=SIDES)
    parser.add_argument("--lora", action="store_true", help="adapters in place of all parameters")
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--dataset", type=Path, help="a file of your own in place of generated rows")
    parser.add_argument("--columns", help="its columns, JSON as in megatron sft --columns")
    parser.add_argument("--threads", type=int, help="by default all cores")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/sft_vs_trainer"))
    parser.add_argument("--limit", type=float, default=900, help="seconds one run may take")
    options = parser.parse_args()
    with on_this_machine("torch", "megatron-core", "transformers", folder=options.folder):
        run(options)


def run(options: argparse.Namespace) -> None:
    workload = make_workload(options.folder, options.size, train=options.dataset)
    arguments = sft_arguments(options, workload)
    steps = write_samples(options, arguments)
    describe(steps, options)
    tokens = sum(len(ids) for step in steps[options.warm_up :] for ids, _ in step)
    results: dict[str, list[tuple[float, float, float]]] = {side: [] for side in options.sides}
    for _ in range(options.rounds):
        for side in options.sides:
            seconds, first_loss, memory = time_side(side, options, workload, arguments)
            results[side].append((tokens / seconds, first_loss, memory))
    report(results)


def common_arguments(options: argparse.Namespace, workload: Workload, output: str) -> list[str]:
    """Flags that `megatron sft` and `swift sft` have in common."""
    arguments = flags(
        model=workload.model,
        dataset=workload.train,
        cache_dir=options.folder / "tokens",
        output_dir=options.folder / output,
        packing="true",
        max_length=options.length,
        torch_dtype="float32",
        logging_steps=1,
        report_to="none",
    )
    return arguments + (flags(columns=options.columns) if options.columns else [])


def sft_arguments(options: argparse.Namespace, workload: Workload) -> list[str]:
    """Arguments of `megatron sft`."""
    return common_arguments(options, workload, "ours") + flags(
        micro_batch_size=1,
        global_batch_size=options.rows,
        train_iters=options.warm_up + options.steps,
        lr=1e-4,
        lr_decay_style="constant",
        save_safetensors="false",
        no_save_optim="true",
    )


def transformers_arguments(options: argparse.Namespace, workload: Workload) -> list[str]:
    """The same run as arguments of `swift sft`."""
    return common_arguments(options, workload, "transformers") + flags(
        backend="fsdp",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=options.rows,
        max_steps=options.warm_up + options.steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        gradient_checkpointing="false",
        save_only_model="true",
    )


def write_samples(options: argparse.Namespace, arguments: list[str]) -> list[list[Any]]:
    """The samples of each step, from our data pipeline in its own process; [step][sample] -> (ids, labels)."""
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--samples",
        str(samples_file(options)),
        *arguments,
    ]
    subprocess.run(command, env=environment(), check=True, timeout=options.limit)
    return json.loads(samples_file(options).read_text())


def samples_file(options: argparse.Namespace) -> Path:
    return options.folder / "samples.json"


def time_side(
    side: str, options: argparse.Namespace, workload: Workload, arguments: list[str]
) -> tuple[float, float, float]:
    """(seconds of the steps after warm-up, loss of the first step, peak of resident memory in GiB)."""
    adapters = flags(tuner_type="lora", lora_rank=8, lora_alpha=32, lora_dropout=0.0) if options.lora else []
    if side == "ours, transformers":
        command = program("swift", "sft", *transformers_arguments(options, workload), *adapters)
    elif side.startswith("ours"):
        recompute = "selective" if "default" in side else "none"
        command = program("megatron", "sft", *arguments, *adapters, *flags(recompute_granularity=recompute))
    else:
        facts = {
            "peer": "TRL" if side == "TRL" else "Trainer",
            "model": str(workload.model),
            "samples": str(samples_file(options)),
            "output": str(options.folder / "trainer"),
            "accumulation": options.accumulation,
            "sorted": "sorted" in side,
            "lora": options.lora,
        }
        command = [sys.executable, str(Path(__file__).resolve()), "--trainer", json.dumps(facts)]
    env = {"OMP_NUM_THREADS": str(options.threads)} if options.threads else {}
    at: dict[int, float] = {}
    losses: dict[int, float] = {}
    peaks: list[int] = []
    for seconds, line in stamped_lines(command, limit_s=options.limit, peaks=peaks, **env):
        found = re.match(r"step (\d+)/\d+ .*?loss ([\d.]+)", line)
        if found:
            at[int(found[1])], losses[int(found[1])] = seconds, float(found[2])
    seconds = at[options.warm_up + options.steps] - at[options.warm_up]
    return seconds, losses[1], peaks[0] / 2**30


def describe(steps: list[list[Any]], options: argparse.Namespace) -> None:
    samples = [sample for step in steps for sample in step]
    lengths = sorted(len(ids) for ids, _ in samples)
    learnt = sum(label != -100 for _, labels in samples for label in labels)
    print(
        f"{len(samples) / len(steps):.1f} samples and {sum(lengths) / len(steps):,.0f} tokens a step; "
        f"a sample has {lengths[len(lengths) // 2]} tokens (median), {lengths[-1]} (longest); "
        f"{learnt / sum(lengths):.0%} of the tokens are learnt"
    )
    rows = len(steps) * options.rows * options.length
    shares = [f"ours {1 - sum(lengths) / rows:.1%}"]
    for name, order in (("Trainer", None), ("Trainer, sorted", len)):
        padded = sum(
            len(batch) * max(map(len, batch))
            for step in steps
            for batch in peers.cut([ids for ids, _ in step], options.accumulation, order)
        )
        shares.append(f"{name} {1 - sum(lengths) / padded:.1%}")
    print(f"padding: {'; '.join(shares)}\n", flush=True)


def report(results: dict[str, list[tuple[float, float, float]]]) -> None:
    losses = {side: runs[0][1] for side, runs in results.items()}
    reference = "Trainer" if "Trainer" in results else next(iter(results))
    print(f"{'':18}{'loss of step 1':>15}{'peak':>11}{'tokens/s':>10}     / {reference} (rounds)")
    for side, runs in results.items():
        rates = [rate for rate, _, _ in runs]
        peak = statistics.median(memory for _, _, memory in runs)
        ratios = [rate / other for rate, (other, _, _) in zip(rates, results[reference], strict=True)]
        print(
            f"{side:18}{losses[side]:15.4f}{peak:7.2f} GiB{statistics.median(rates):10,.0f}     "
            f"{spread(ratios, '.2f')}",
            flush=True,
        )
    if max(losses.values()) - min(losses.values()) > 1.5e-4:  # both sides print four decimals
        raise SystemExit("the losses of the first step differ: the sides do not do the same work")


def export_samples(path: Path, argv: list[str]) -> None:
    """Write the samples of every step as JSON, with labels as in transformers (not shifted, -100: no loss).

    Samples are shuffled within the step, because packing orders them by length, which would benefit padded batches.
    """
    sys.path.insert(0, str(ROOT))
    from transformers import AutoTokenizer

    from mcore_swift.config import MegatronSftArguments, parse
    from mcore_swift.data import prepare

    args = parse(MegatronSftArguments, argv, notify=lambda notice: None)
    data = prepare(
        args,
        AutoTokenizer.from_pretrained(args.model),
        is_builder=True,
        barrier=lambda: None,
        output_dir=path.parent,
        model_max_length=args.max_length,
    )
    steps = [
        [sample for batch in data.train.step(step) for sample in samples_of(batch)]
        for step in range(data.train.total_steps)
    ]
    draw = random.Random(0)
    path.write_text(json.dumps([draw.sample(step, len(step)) for step in steps]))


def samples_of(batch: Any) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each sample of a packed row."""
    edges = batch.cu_seqlens.tolist()[: batch.num_samples + 1]
    targets = batch.labels.masked_fill(batch.loss_mask == 0, -100)
    return [
        (batch.input_ids[0, a:b].tolist(), [-100, *targets[0, a : b - 1].tolist()])
        for a, b in zip(edges, edges[1:], strict=False)
    ]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--samples"]:
        export_samples(Path(sys.argv[2]), sys.argv[3:])
    elif sys.argv[1:2] == ["--trainer"]:
        peers.train(json.loads(sys.argv[2]))
    else:
        main()
