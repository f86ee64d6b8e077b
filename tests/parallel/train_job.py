"""One process of a job that runs several training command lines one after the other, each in its own layout.

`main(folder)` reads `<folder>/plan.json`, a list of {"name", "do", "argv"}; see `DOES`.
"""

import json
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from jobs import run_cases

from mcore_swift.accelerator import get_accelerator

get_accelerator().install()

from groups import use_layout  # noqa: E402

from converters.ranks import Ranks  # noqa: E402
from mcore_swift.config import MegatronSftArguments, parse  # noqa: E402
from mcore_swift.models.shards import METADATA, live_shards  # noqa: E402
from mcore_swift.plan.layout import Layout  # noqa: E402
from mcore_swift.training.loop import Run, train  # noqa: E402
from mcore_swift.training.main import build_run  # noqa: E402


def build(argv: list[str]) -> Run:
    args = parse(MegatronSftArguments, argv, notify=lambda notice: None)
    layout = Layout.from_args(args, dist.get_world_size())
    use_layout(layout, seed=args.seed)
    return build_run(args, layout, Ranks())


def run_training(argv: list[str]) -> None:
    train(build(argv))


def save_again(argv: list[str]) -> None:
    """Load a checkpoint into this layout and save it again without a step in between."""
    run = build(argv)
    run.log.close()
    run.state.data = run.data.state_dict(run.state.step)
    run.checkpoints.save(run.state)


def read_by_megatron(argv: list[str]) -> None:
    """megatron-core's own loader gives this layout's model the same weights as ours."""
    from megatron.core import dist_checkpointing

    run = build(argv)
    run.log.close()
    shards = live_shards(run.engine.chunks)
    expected = [shard.data.clone() for shard in shards]
    for shard in shards:
        shard.data.fill_(7)
    state_dict = {
        f"model{number}": {
            key: value
            for key, value in chunk.sharded_state_dict(metadata=dict(METADATA)).items()
            if not key.endswith("_extra_state")
        }
        for number, chunk in enumerate(run.engine.chunks)
    }
    dist_checkpointing.load(state_dict, str(Path(run.args.resume) / "mcore"))
    assert shards
    for shard, values in zip(shards, expected, strict=True):
        assert torch.equal(shard.data, values), shard.key


def refused(argv: list[str], *, said: list[str]) -> None:
    """Every rank raises a UserError whose message contains each of `said`."""
    from mcore_swift.errors import UserError

    try:
        build(argv)
    except UserError as error:
        assert all(text in str(error) for text in said), str(error)
    else:
        raise AssertionError("it was not refused")


def write_logits(argv: list[str], *, rows: int, file: str) -> None:
    """Write logits `[rows, s, vocabulary]` of fixed tokens, from the model as a run would start with it."""
    from megatron.core import parallel_state

    from converters.verify import fixed_rows, mcore_logits

    run = build(argv)
    run.log.close()
    vocab_size = run.engine.plan.hf.vocab_size
    logits = mcore_logits(run.engine.model, fixed_rows(vocab_size, rows), vocab_size)
    copies = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    if logits is not None and copies == (0, 0):
        torch.save(logits, file)


def export(argv: list[str]) -> None:
    """Run `megatron export` in this job's processes."""
    from converters.main import export
    from mcore_swift.config import MegatronExportArguments

    export(parse(MegatronExportArguments, argv, notify=lambda notice: None), Ranks())


def swift_export(argv: list[str]) -> None:
    """Run `swift export` on an adapter that peft cannot read."""
    from mcore_swift.cli.merge_lora import merge

    merge(argv)


DOES = {
    "train": run_training,
    "logits": write_logits,
    "export": export,
    "swift-export": swift_export,
    "save": save_again,
    "megatron-load": read_by_megatron,
    "refused": refused,
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    plan = json.loads((folder / "plan.json").read_text())
    cases = {
        case["name"]: partial(DOES[case["do"]], case["argv"], **case.get("options", {})) for case in plan
    }
    run_cases(cases, folder)
    dist.destroy_process_group()
