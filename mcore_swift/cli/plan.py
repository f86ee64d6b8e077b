"""`mcore-swift plan`: which layouts of a model fit on a number of GPUs, and how fast they should be."""

import json
from collections.abc import Sequence

from ..config import parse
from ..config.help import help_text
from ..config.plan import PlanArguments
from .start import wants_help

EXAMPLES = """
mcore-swift plan --model ./Llama-3-70B --gpu h100 --num_gpus 64 --max_length 8192 --global_batch_size 512
mcore-swift plan --model config.json --gpu h200 --num_gpus 256 --expert_model_parallel_size 8 --top 3 --json
"""
NOTHING_FITS = 2


def run(argv: Sequence[str]) -> int:
    """Print the plan; returns 2 if no layout fits into memory, else 0."""
    argv = list(argv)
    if wants_help(argv):
        print(help_text(PlanArguments, "mcore-swift plan", EXAMPLES), end="")
        return 0
    from ..plan.planner import make_plan
    from ..plan.report import as_json, report

    args = parse(PlanArguments, argv)
    plan = make_plan(args)
    if args.json:
        print(json.dumps(as_json(plan, args), indent=2))
    else:
        print("\n".join(report(plan, args)))
    return 0 if plan.options else NOTHING_FITS
