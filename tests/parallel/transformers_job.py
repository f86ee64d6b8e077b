"""One process of a job that runs several `swift sft` command lines one after the other.

`main(folder)` reads `<folder>/plan.json`, a list of {"name", "do", "argv"}.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jobs import run_cases

from converters.ranks import Ranks
from mcore_swift.accelerator import get_accelerator
from mcore_swift.cli.backend import loop_arguments
from mcore_swift.config import MegatronSftArguments, SwiftSftArguments, parse
from mcore_swift.engines import processes
from mcore_swift.errors import UserError
from mcore_swift.plan.layout import Layout
from mcore_swift.training.loop import train
from mcore_swift.training.main import build_run


def on_transformers(argv: list[str]) -> None:
    args = loop_arguments(parse(SwiftSftArguments, argv, notify=lambda notice: None))
    processes.seed_libraries(args.seed + dist.get_rank())
    train(build_run(args, Layout.from_args(args, dist.get_world_size()), Ranks()))
    if "megatron" not in DONE:
        assert not any(name.startswith("megatron.core") for name in sys.modules), "it is not needed"


def on_megatron(argv: list[str]) -> None:
    get_accelerator().install()
    from megatron.core import parallel_state

    from mcore_swift.engines.megatron import process_groups

    DONE.add("megatron")
    args = parse(MegatronSftArguments, argv, notify=lambda notice: None)
    layout = Layout.from_args(args, dist.get_world_size())
    parallel_state.destroy_model_parallel()
    process_groups.start(layout, seed=args.seed)
    train(build_run(args, layout, Ranks()))


def merge_lora(argv: list[str]) -> None:
    from mcore_swift.cli.merge_lora import merge

    merge(argv)


def export(argv: list[str]) -> None:
    """Run `megatron export` in this job's processes."""
    from converters.main import export
    from mcore_swift.config import MegatronExportArguments

    export(parse(MegatronExportArguments, argv, notify=lambda notice: None), Ranks())


def refused(argv: list[str], said: list[str]) -> None:
    try:
        on_transformers(argv)
    except UserError as error:
        assert all(text in str(error) for text in said), str(error)
    else:
        raise AssertionError("it was not refused")


def called(argv: list[str]) -> dict[str, Any]:
    """What `sft_main` returns, or the mistake it raises. It joins and leaves the process group by itself."""
    from mcore_swift import TrainArguments, sft_main

    flags = {name.removeprefix("--"): value for name, value in zip(argv[::2], argv[1::2], strict=True)}
    try:
        return sft_main(TrainArguments(**flags))
    except UserError as error:
        return {"mistake": str(error)}


DONE: set[str] = set()
DOES = {
    "swift": on_transformers,
    "megatron": on_megatron,
    "merge": merge_lora,
    "export": export,
    "refused": refused,
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    processes.join(timeout_s=120)
    plan = json.loads((folder / "plan.json").read_text())
    cases = {}
    for case in plan:
        if case["do"] == "call":
            continue
        more = {"said": case["said"]} if case["said"] else {}
        cases[case["name"]] = partial(DOES[case["do"]], case["argv"], **more)
    run_cases(cases, folder)
    dist.destroy_process_group()
    results = {case["name"]: called(case["argv"]) for case in plan if case["do"] == "call"}
    (folder / f"called-{os.environ['RANK']}.json").write_text(json.dumps(results))
