"""Finding checkpoints, the manifest, which of them are kept, and the link to the newest: files only, no model."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

from converters.manifest import FORMAT, Manifest, versions
from converters.ranks import Ranks
from converters.shard_files import write_contents, write_shards
from mcore_swift.errors import UserError
from mcore_swift.models.shards import LiveShard
from mcore_swift.training.checkpoint import Checkpoints, checkpoints_in, find_checkpoint, load_checkpoint
from mcore_swift.training.state import TrainState


def make(folder, step, **fields):
    """A complete checkpoint, as far as finding it goes."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    Manifest(step=step, **fields).write(path)
    return path


class TestManifest:
    def test_comes_back_as_it_was(self, tmp_path):
        state = TrainState(7, 56, 1.25, 4, 1, {"fingerprint": "abc", "step": 7})
        manifest = Manifest(
            holds=["weights", "rng"],
            step=7,
            consumed_samples=56,
            layout={"tp": 2},
            dtype="bfloat16",
            family="qwen3",
            versions=versions(),
            args="args.json",
            optimizer_step=7,
            train_state=state.to_dict(),
        )
        manifest.write(tmp_path)
        back = Manifest.read(tmp_path)
        assert back == manifest
        assert TrainState(**back.train_state) == state
        assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]

    def test_counts_the_checkpoints_since_the_best_one(self):
        state = TrainState()
        stalled = []
        for state.step, loss in enumerate((2.0, 3.0, 1.0, 1.5, 1.0), start=1):
            state.judge(loss)
            stalled.append((state.best_step, state.has_stalled(2), state.has_stalled(None)))
        expected = [(1, False), (1, False), (3, False), (3, False), (3, True)]
        assert stalled == [(best, stop, False) for best, stop in expected]

    def test_names_the_versions_that_wrote_it(self):
        import torch

        assert (
            versions()["torch"] == torch.__version__.split("+")[0] or versions()["torch"] == torch.__version__
        )
        assert "megatron-core" in versions()

    def test_fields_of_a_later_version_are_left_out(self, tmp_path):
        Manifest(step=3).write(tmp_path)
        path = tmp_path / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "blue"}))
        assert Manifest.read(tmp_path) == Manifest(step=3)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (None, "is no complete checkpoint"),
            ("{", "cannot be read"),
            ("[]", "cannot be read"),
            ('{"step": 3}', "cannot be read"),
            (json.dumps({"format": FORMAT + 1}), f"is of format {FORMAT + 1}"),
        ],
    )
    def test_what_cannot_be_read_is_a_users_mistake(self, tmp_path, content, said):
        if content is not None:
            (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=said) as caught:
            Manifest.read(tmp_path)
        assert str(tmp_path) in str(caught.value) and caught.value.remedy


class TestFinding:
    def test_steps_are_numbers_not_text(self, tmp_path):
        for step in (9, 100, 20):
            make(tmp_path, step)
        assert [step for step, _ in checkpoints_in(tmp_path)] == [9, 20, 100]
        assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-100"

    def test_only_complete_ones_count(self, tmp_path):
        make(tmp_path, 4)
        (tmp_path / "checkpoint-6").mkdir()
        make(tmp_path, 8).rename(tmp_path / ".checkpoint-8.writing")
        make(tmp_path, 9).rename(tmp_path / ".checkpoint-9.deleting")
        make(tmp_path, 10).rename(tmp_path / "checkpoint-10-of-mine")
        assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-4"

    def test_a_checkpoint_itself_a_run_and_an_output_folder(self, tmp_path):
        expected = make(tmp_path / "v1-20260101-000000", 5)
        for place in (expected, expected.parent, tmp_path):
            assert find_checkpoint(place) == expected

    def test_the_newest_run_that_has_one(self, tmp_path):
        make(tmp_path / "v2-20260102-000000", 50)
        expected = make(tmp_path / "v10-20260101-000000", 5)
        (tmp_path / "v11-20260103-000000").mkdir()
        assert find_checkpoint(tmp_path) == expected

    @pytest.mark.parametrize("content", [(), ("checkpoint-3",), ("v0-20260101-000000",)])
    def test_none_is_a_users_mistake(self, tmp_path, content):
        for name in content:
            (tmp_path / name).mkdir()
        with pytest.raises(UserError, match="holds no complete checkpoint") as caught:
            find_checkpoint(tmp_path)
        assert str(tmp_path) in caught.value.message


class TestRotation:
    """`_after_save` on folders that hold a manifest only."""

    def saved(self, run_dir, steps, limit, best=None):
        checkpoints = Checkpoints(
            run_dir,
            engine=None,
            args=SimpleNamespace(save_total_limit=limit, no_save_optim=False, no_save_rng=False),
            source_dir="",
            ranks=Ranks(),
        )
        for step in steps:
            make(run_dir, step)
            best_step = best if best is not None and best <= step else None
            checkpoints._after_save(TrainState(step=step, best_step=best_step))
            assert os.readlink(run_dir / "latest") == f"checkpoint-{step}"
            assert find_checkpoint(run_dir / "latest").samefile(run_dir / f"checkpoint-{step}")
        return [step for step, _ in checkpoints_in(run_dir)]

    @pytest.mark.parametrize(
        ("limit", "best", "kept"),
        [
            (None, 2, [2, 4, 6, 8]),
            (3, None, [4, 6, 8]),
            (1, None, [8]),
            (3, 2, [2, 6, 8]),
            (2, 4, [4, 8]),
            (2, 8, [6, 8]),  # the best is the newest
            (1, 8, [8]),
            (1, 2, [2, 8]),  # neither the best nor the newest may go
            (3, 5, [4, 6, 8]),  # the best was never saved
        ],
    )
    def test_the_newest_and_the_best_are_kept(self, tmp_path, limit, best, kept):
        assert self.saved(tmp_path, (2, 4, 6, 8), limit, best) == kept
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            ["latest", *(f"checkpoint-{step}" for step in kept)]
        )

    def test_merged_weights_go_with_the_checkpoint_they_are_of(self, tmp_path):
        for step in (2, 4):
            (tmp_path / f"checkpoint-{step}-merged").mkdir()
        assert self.saved(tmp_path, (2, 4), 1) == [4]
        assert {path.name for path in tmp_path.iterdir()} == {"latest", "checkpoint-4", "checkpoint-4-merged"}

    def test_the_newest_goes_even_where_a_later_step_lies_about(self, tmp_path):
        """A run resumed at an older checkpoint: what it has just saved is never what is removed."""
        make(tmp_path, 100)
        assert 4 in self.saved(tmp_path, (2, 4), 1)


class TestRefusals:
    class Engine:
        name = "megatron"

        def checkpoint_shards(self, parts, *, for_loading=False):
            raise AssertionError("nothing may be read before the manifest is known to fit")

    def test_a_part_that_was_not_saved(self, tmp_path):
        checkpoint = make(tmp_path, 4, holds=["weights", "data"])
        with pytest.raises(UserError) as caught:
            load_checkpoint(checkpoint, self.Engine(), parts=["weights", "optimizer", "rng"])
        message = str(caught.value)
        assert f"{checkpoint} holds weights and data, and no optimizer and no rng" in message
        assert "--no_load_optim true" in message and "--no_load_rng true" in message

    def test_a_checkpoint_of_another_engine(self, tmp_path):
        checkpoint = make(tmp_path, 4, engine="fsdp")
        with pytest.raises(UserError, match="written by the fsdp engine"):
            load_checkpoint(checkpoint, self.Engine(), parts=["weights"])

    def test_a_folder_that_is_no_checkpoint(self, tmp_path):
        with pytest.raises(UserError, match="no manifest.json"):
            load_checkpoint(tmp_path, self.Engine(), parts=["weights"])


class TestAnotherPrecision:
    """Training goes on from the exact weights, whichever precision the checkpoint was written in."""

    EXACT = torch.tensor([1.0, 1.001, -3.3333333])

    class Engine:
        name = "megatron"

        def __init__(self, dtype, keys):
            self.dtype, self.keys = dtype, keys

        def checkpoint_shards(self, parts, *, for_loading=False):
            self.shards = [
                LiveShard(key, torch.zeros(3, dtype=dtype), ((0, 3),), (3,)) for key, dtype in self.keys
            ]
            return self.shards

        def after_load(self, parts, *, optimizer_step):
            pass

    def written(self, folder, stored):
        make(folder, 4, holds=["weights", "optimizer"])
        checkpoint = folder / "checkpoint-4"
        (checkpoint / "mcore").mkdir()
        shards = [LiveShard(key, values, ((0, 3),), (3,)) for key, values in stored.items()]
        contents = [write_shards(checkpoint / "mcore", 0, shards)]
        write_contents(checkpoint / "mcore", contents, {})
        return checkpoint

    def test_from_bf16_to_fp32(self, tmp_path):
        stored = {
            "decoder.w": self.EXACT.bfloat16(),
            "optimizer.fp32_param.decoder.w": self.EXACT,
            "optimizer.exp_avg.decoder.w": self.EXACT * 2,
        }
        engine = self.Engine(
            torch.float32, [("decoder.w", torch.float32), ("optimizer.exp_avg.decoder.w", torch.float32)]
        )
        load_checkpoint(self.written(tmp_path, stored), engine, parts=["weights", "optimizer"])
        weight, moment = engine.shards
        assert weight.data.equal(self.EXACT) and moment.data.equal(self.EXACT * 2)

    def test_from_fp32_to_bf16(self, tmp_path):
        stored = {"decoder.w": self.EXACT}
        engine = self.Engine(
            torch.bfloat16,
            [("decoder.w", torch.bfloat16), ("optimizer.fp32_param.decoder.w", torch.float32)],
        )
        load_checkpoint(self.written(tmp_path, stored), engine, parts=["weights", "optimizer"])
        weight, main = engine.shards
        assert weight.data.equal(self.EXACT.bfloat16()) and main.data.equal(self.EXACT)


def test_the_newest_checkpoint_is_the_one_written_last(tmp_path):
    """A run that went back from step 20 to step 10 goes on from what it wrote since, not from the abandoned 20."""
    for step, written in ((10, 1.0), (20, 2.0), (15, 3.0)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        Manifest(holds=["weights"], step=step, written=written).write(folder)
    assert find_checkpoint(tmp_path).name == "checkpoint-15"
    assert [step for step, _ in checkpoints_in(tmp_path)] == [10, 20, 15]
