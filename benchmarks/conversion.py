"""HF -> megatron-core -> HF of a multi-gigabyte random checkpoint, against `cp` of the same bytes.

    python benchmarks/conversion.py --gigabytes 3 --folder /tmp/conversion --repeats 3
    python benchmarks/conversion.py --gigabytes 4 --experts 128

For one and for two processes and each direction, this prints the seconds, the ratio to `cp -r` in the same run (median
of the repeats, which alternate so that a busy disk affects both), and the memory peak per process with the size of the
largest tensor. Aims: ratio <= 2, peak <= largest tensor + 1 GiB. The result is compared bit for bit.
The model is a dense Qwen3, or with --experts a Qwen3-MoE with the sizes of Qwen3-30B-A3B but fewer layers, whose
experts are separate tensors as in the published checkpoints.

The source is in the page cache unless --cold (root only) empties it before every timing. A conversion ends when the
result is on disk, so `cp` is timed with a `sync` of its result; `cp` alone is printed too. Before every timing, as much
page cache is written and freed as the output needs: on a virtual machine, memory that the guest has not used for a
while is slow to return (`cp` alone was seen to take 5 times as long), which would affect one side or the other by
chance. The times do not include imports, which are printed separately.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import end, machine

HIDDEN, INTERMEDIATE, EXPERT, VOCABULARY = 2048, 6144, 768, 151_936
SIZES = {
    "hidden_size": HIDDEN,
    "vocab_size": VOCABULARY,
    "head_dim": 128,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
GIB = 1 << 30
READY = "ready\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the checkpoint, in 10^9 bytes")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/conversion"), help="needs 5 times the size")
    parser.add_argument("--experts", type=int, default=0, help="of a layer; 0: a dense model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cold", action="store_true", help="empty the page cache before every timing (root)")
    parser.add_argument("--keep", action="store_true", help="leave the folder")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    try:
        run(options)
    finally:
        if not options.keep:
            shutil.rmtree(options.folder, ignore_errors=True)


def run(options: argparse.Namespace) -> None:
    source, copy = options.folder / "source", options.folder / "copy"
    largest = make_checkpoint(source, options.gigabytes, options.experts)
    nbytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    print(f"checkpoint: {nbytes / 1e9:.2f} GB bf16, largest tensor {largest / 1e9:.2f} GB")
    print(
        f"page cache: {'cold' if options.cold else 'warm'}; {options.repeats} rounds; {machine()}", flush=True
    )
    copies, steps = [], {}
    for number in range(1, options.repeats + 1):
        print(f"round {number} of {options.repeats}", file=sys.stderr, flush=True)
        plain = time_copy(source, copy, options.cold, synced=False)
        copies.append((plain, time_copy(source, copy, options.cold, synced=True)))
        for count in options.processes:
            mcore, back = options.folder / f"mcore-{count}", options.folder / f"back-{count}"
            for name, flags in (
                ("HF -> mcore", ["--to_mcore", "true", "--model", source, "--output_dir", mcore]),
                ("mcore -> HF", ["--to_hf", "true", "--mcore_model", mcore, "--output_dir", back]),
            ):
                origin = source if name.startswith("HF") else mcore
                result = convert(
                    count, [str(flag) for flag in flags], lambda o=origin: settle(o, options.cold)
                )
                steps.setdefault((name, count), []).append(result)
            compare(source, back)
            shutil.rmtree(mcore)
            shutil.rmtree(back)
    report(copies, steps, largest)
    print(machine())


def dense_config(parameters: float) -> Any:
    """A Qwen3 with about this number of parameters."""
    from transformers import Qwen3Config

    layer = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2 + 3 * HIDDEN * INTERMEDIATE
    return Qwen3Config(
        **SIZES,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_hidden_layers=max(1, round((parameters - 2 * VOCABULARY * HIDDEN) / layer)),
        architectures=["Qwen3ForCausalLM"],
    )


def moe_config(parameters: float, experts: int) -> Any:
    """A Qwen3-MoE with about this number of parameters, in layers like those of Qwen3-30B-A3B."""
    from transformers import Qwen3MoeConfig

    layer = 2 * HIDDEN * 4096 + 2 * HIDDEN * 512 + 3 * experts * HIDDEN * EXPERT
    return Qwen3MoeConfig(
        **SIZES,
        intermediate_size=INTERMEDIATE,
        moe_intermediate_size=EXPERT,
        num_experts=experts,
        num_experts_per_tok=min(8, experts),
        num_attention_heads=32,
        num_key_value_heads=4,
        num_hidden_layers=max(1, round((parameters - 2 * VOCABULARY * HIDDEN) / layer)),
        architectures=["Qwen3MoeForCausalLM"],
    )


def make_checkpoint(folder: Path, gigabytes: float, experts: int) -> int:
    """Write random bf16 weights to files of at most 1 GB; returns the bytes of the largest tensor."""
    import torch
    from transformers import AutoModelForCausalLM

    from converters.hf_writer import HFWriter, in_writing_order, plan_files, write_index
    from converters.safetensors_format import TensorSpec
    from mcore_swift.models.family import family_of

    parameters = gigabytes * 1e9 / 2
    config = moe_config(parameters, experts) if experts else dense_config(parameters)
    folder.mkdir()
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {
            name: tuple(parameter.shape)
            for name, parameter in AutoModelForCausalLM.from_config(config).named_parameters()
        }
    for layer in range(config.num_hidden_layers):  # transformers holds a layer's experts in one tensor
        for expert in range(experts):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            shapes |= dict.fromkeys(
                (f"{prefix}.{part}_proj.weight" for part in ("gate", "up")), (EXPERT, HIDDEN)
            )
            shapes[f"{prefix}.down_proj.weight"] = (HIDDEN, EXPERT)
    names = [name for rule in family_of(config).rules(config).rules for name in rule.hf]
    specs = in_writing_order(TensorSpec(name, shapes[name], torch.bfloat16) for name in names)
    files = plan_files([specs], 10**9)
    noise = torch.randint(-(2**15), 2**15, (1 << 25,), dtype=torch.int16).view(torch.bfloat16)
    with HFWriter(folder, files) as writer:
        for spec in (spec for file in files for spec in file.specs):
            left = spec.nbytes // 2
            while left:
                # Different bytes at every position, so that a misplaced piece is detected.
                first = hash((spec.name, left)) % (len(noise) // 2)
                part = noise[first : first + min(left, len(noise) // 2)]
                writer.write(spec.name, part)
                left -= len(part)
    write_index(folder, files)
    return max(spec.nbytes for spec in specs)


def settle(folder: Path, cold: bool) -> None:
    """Restore the same state before every timing: earlier writes are on disk, free memory is ready for use, and the
    source is cached, or not if `cold`."""
    os.sync()
    if cold:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    scratch, block = folder.parent / "scratch", bytes(16 << 20)
    with scratch.open("wb", buffering=0) as file:
        for _ in range(sum(path.stat().st_size for path in folder.rglob("*")) // len(block) + 1):
            file.write(block)
    scratch.unlink()
    if not cold:
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb", buffering=0) as file:
                    while file.read(len(block)):
                        pass


def time_copy(source: Path, target: Path, cold: bool, synced: bool) -> float:
    settle(source, cold)
    started = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    if synced:
        subprocess.run(["sync", *target.iterdir()], check=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def convert(processes: int, flags: list[str], prepare: Callable[[], None]) -> dict:
    """Run the command's own function in `processes` processes; returns the maxima of their results.

    prepare: called when all of them have finished their imports and wait to start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", *flags],
            env=os.environ
            | ({"RANK": str(rank), "WORLD_SIZE": str(processes)} if processes > 1 else {})
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        for process in started:
            if process.stdout.readline() != READY:
                raise RuntimeError("a process did not get ready")
        prepare()
        for process in started:
            process.stdin.write("go\n")
            process.stdin.flush()
        outputs = [process.communicate(timeout=1800)[0] for process in started]
    finally:
        for process in started:
            end(process)
    if any(process.returncode for process in started):
        raise RuntimeError(f"the conversion failed: {outputs}")
    results = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {key: max(result[key] for result in results) for key in results[0]}


def worker(flags: list[str]) -> None:
    """One process of a conversion: prints its seconds and memory as JSON."""
    started = time.perf_counter()
    from converters.main import export_main, hf_source
    from mcore_swift.config import COMMANDS, parse
    from mcore_swift.models.reading import read_model

    args = parse(COMMANDS["export"], flags, notify=lambda notice: None)
    read_model(args.model if args.to_mcore else hf_source(args))  # transformers imports lazily, on first use
    imports = time.perf_counter() - started
    print(READY, end="", flush=True)
    sys.stdin.readline()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = status("VmRSS")
    started = time.perf_counter()
    export_main(args)
    seconds = time.perf_counter() - started
    peak = status("VmHWM")
    print(json.dumps({"seconds": seconds, "imports": imports, "peak": peak, "grown": peak - before}))


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def compare(first: Path, second: Path) -> None:
    """Check that two checkpoints hold the same tensors, bit for bit."""
    import torch

    from converters.hf_reader import HFReader

    with HFReader(first) as a, HFReader(second) as b:
        if a.shapes != b.shapes:
            raise RuntimeError("the round trip changed names or shapes")
        for name in a.names:
            # Compared as integers, because random bits contain NaNs.
            x, y = (reader.read(name).view(-1).view(torch.int16) for reader in (a, b))
            if not x.equal(y):
                raise RuntimeError(f"the round trip changed {name}")


def report(copies: list[tuple[float, float]], steps: dict, largest: int) -> None:
    plain, copy = (statistics.median(seconds) for seconds in zip(*copies, strict=True))
    print(
        f"\n{'':24}{'seconds':>9}{'/ cp+sync':>11}{'/ cp':>8}{'imports':>9}{'peak RSS':>11}{'of it ours':>12}"
        f"{'limit':>9}"
    )
    for name, value, number in (("cp -r", plain, 0), ("cp -r, sync", copy, 1)):
        each = ", ".join(f"{seconds[number]:.2f}" for seconds in copies)
        print(f"{name:24}{value:9.2f}{value / copy:11.2f}{value / plain:8.2f}   (of {each})")
    for (name, count), runs in steps.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        imports = statistics.median(run["imports"] for run in runs)
        peak, grown = (max(run[key] for run in runs) / GIB for key in ("peak", "grown"))
        label = f"{name}, {count} process{'es' if count > 1 else ''}"
        limit = largest / GIB + 1
        print(
            f"{label:24}{seconds:9.2f}{seconds / copy:11.2f}{seconds / plain:8.2f}{imports:9.2f}{peak:7.2f} GiB"
            f"{grown:8.2f} GiB{limit:5.2f} GiB"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2:])
    else:
        main()
