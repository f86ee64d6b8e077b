"""What a user gets wrong: exit code 2, one clear message a mistake, no traceback, and no output folder."""

import json
import shutil

import pytest
from commands import run
from safetensors.torch import load_file, save_file


@pytest.fixture
def refuse(sft, tmp_path):
    """refuse(texts, processes=1, **flags): run the command, look for the texts, see that it wrote nothing."""

    def check(*texts, processes=1, more=(), **changes):
        output = tmp_path / "out" / "of" / "it"
        argv = [*sft(output_dir=output, add_version=True, **changes), *more]
        run(argv, tmp_path / "command", processes=processes).refused(*texts)
        assert not (tmp_path / "out").exists(), sorted((tmp_path / "out").rglob("*"))

    return check


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of the model to damage."""
    return shutil.copytree(tiny.model, tmp_path / "model")


def bad_rows(tiny, folder):
    """Rows of `tiny`, of which line 3 is no JSON and line 5 has no assistant turn."""
    lines = tiny.train.read_text().splitlines()[:8]
    lines[2] = lines[2][:40]
    lines[4] = json.dumps({"messages": [{"role": "user", "content": "What is 1+1?"}]})
    path = folder / "bad.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


class TestFoundBeforeAnythingStarts:
    """In a fraction of a second, by the process that was typed."""

    def test_a_missing_file(self, refuse):
        refuse("error: --dataset no/such/file.jsonl", dataset="no/such/file.jsonl")

    def test_an_unknown_flag_with_the_nearest_known(self, refuse):
        refuse(
            "error: --lr_decay_stile: no such flag",
            "did you mean --lr_decay_style?",
            "error: --micro_batch_siz: no such flag",
            "did you mean --micro_batch_size?",
            more=["--lr_decay_stile", "cosine", "--micro_batch_siz", "2"],
        )

    def test_a_layout_that_does_not_divide(self, refuse):
        refuse(
            "--tensor_model_parallel_size 3 does not divide the model's num_attention_heads 4",
            "--pipeline_model_parallel_size 3 does not divide the model's 4 layers",
            processes=9,
            tensor_model_parallel_size=3,
            pipeline_model_parallel_size=3,
        )

    def test_processes_that_do_not_divide(self, refuse):
        refuse("3 processes cannot be divided into copies of 2", processes=3, tensor_model_parallel_size=2)

    def test_a_truncated_safetensors_file(self, refuse, model):
        path = model / "model.safetensors"
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.truncate(size - 1000)
        refuse(f"{path}: it is truncated: {size - 1000} of {size} bytes", model=model)

    def test_a_tensor_that_the_index_promises(self, refuse, model):
        tensors = load_file(model / "model.safetensors")
        (model / "model.safetensors").unlink()
        missing = "model.layers.2.mlp.up_proj.weight"
        weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        del tensors[missing]
        save_file(tensors, model / "model-00001-of-00001.safetensors")
        refuse(missing, model=model)

    def test_an_unsupported_architecture(self, refuse, model):
        config = json.loads((model / "config.json").read_text())
        config |= {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
        (model / "config.json").write_text(json.dumps(config))
        refuse("MambaForCausalLM", model=model)

    def test_a_folder_to_resume_that_is_not_there(self, refuse):
        refuse("error: --resume no/such/run: no such folder", resume="no/such/run")

    def test_all_of_it_at_once(self, refuse, model):
        path = model / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        refuse(
            "error: --lr_decay_stile: no such flag",
            "error: --dataset no/such/file.jsonl: no such file",
            "error: --tensor_model_parallel_size 3 does not divide",
            f"error: {path}: it is truncated",
            "error: --max_shard_size 'many' is no size",
            processes=3,
            dataset="no/such/file.jsonl",
            model=model,
            tensor_model_parallel_size=3,
            max_shard_size="many",
            more=["--lr_decay_stile", "cosine"],
        )


class TestFoundByTheRun:
    def test_bad_rows_are_told_once_for_all_processes(self, refuse, tiny, tmp_path):
        path = bad_rows(tiny, tmp_path)
        refuse(f"error: {path}:3: ", f"error: {path}:5: ", processes=2, dataset=path)

    def test_a_missing_tensor_without_an_index(self, refuse, model):
        tensors = load_file(model / "model.safetensors")
        missing = "model.layers.3.self_attn.q_norm.weight"
        del tensors[missing]
        save_file(tensors, model / "model.safetensors")
        refuse(missing, model=model, split_dataset_ratio=0.1)

    def test_a_checkpoint_without_an_optimizer(self, sft, tmp_path):
        """Refused in one line; the run that was to be continued stays as it was."""
        first = sft(output_dir=tmp_path / "run", train_iters=1, no_save_optim=True)
        run(first, tmp_path / "first").check()
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
        again = sft(output_dir=None, add_version=None, resume=tmp_path / "run", train_iters=2)
        run(again, tmp_path / "again").refused(
            "checkpoint-1 holds weights and rng and data, and no optimizer"
        )
        assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
