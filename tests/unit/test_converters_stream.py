"""File to file: HF -> torch_dist -> HF bit for bit, bounded memory, and what is said of unfit checkpoints."""

import json

import pytest
import torch
from converter_cases import FAMILIES, OTHER_KINDS, make_checkpoint, rule_table
from safetensors.torch import load_file, save_file

from converters import stream, torch_dist_writer
from converters.hf_reader import HFReader
from converters.ranks import Ranks
from converters.torch_dist_reader import MCoreReader
from converters.views import HFView
from mcore_swift.errors import UserError, UserErrors


@pytest.fixture
def small_parts(monkeypatch):
    """Chunks and parts of a few hundred bytes, so that even tiny tensors are cut."""
    monkeypatch.setattr(torch_dist_writer, "CHUNK_BYTES", 700)
    monkeypatch.setattr(stream, "PART_BYTES", 500)


def to_mcore(source, target, table, dtype=None, ranks=None):
    target.mkdir(exist_ok=True)
    with HFReader(source) as reader:
        view = HFView(reader, table)
        plan = stream.plan_mcore(view, table, dtype, ranks.size if ranks else 1)
        stream.write_mcore(view, plan, target, ranks)


def to_hf(source, target, table, config_dir, max_shard_bytes=10**9, dtype=None, ranks=None):
    target.mkdir(exist_ok=True)
    with MCoreReader(source) as reader:
        plan = stream.plan_hf(reader, table, max_shard_bytes, dtype, ranks.size if ranks else 1)
        stream.write_hf(reader, plan, config_dir, target, ranks)


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", (*FAMILIES, *OTHER_KINDS))
def test_round_trip_is_bit_identical(name, dtype, tmp_path, small_parts):
    import transformers

    hf, mcore, back = tmp_path / "hf", tmp_path / "mcore", tmp_path / "back"
    model = make_checkpoint(name, hf, dtype, max_shard_size="20KB")
    assert len(list(hf.glob("*.safetensors"))) > 1
    table = rule_table(name)
    to_mcore(hf, mcore, table)
    to_hf(mcore, back, table, hf, max_shard_bytes=30_000)
    before, after = weights(hf), weights(back)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype == dtype and torch.equal(tensor, after[key]), key
    assert len(list(back.glob("*.safetensors"))) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(back, dtype="auto")
    assert again.dtype == dtype
    for (key, first), (_, second) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(first, second), key


def test_several_ranks_write_what_one_writes(tmp_path, small_parts, monkeypatch):
    """Three ranks, one after the other in this process: their shares add up to the single process's."""
    from converters import hf_writer

    monkeypatch.setattr(hf_writer, "MIN_RANK_BYTES", 1)
    table, hf, mcore, back = rule_table("qwen2"), tmp_path / "hf", tmp_path / "mcore", tmp_path / "back"
    make_checkpoint("qwen2", hf)
    told = {}
    for rank in (1, 2, 0):
        to_mcore(hf, mcore, table, ranks=FakeRanks(rank, 3, told))
    assert len(list(mcore.glob("*.distcp"))) == 3
    for rank in range(3):
        to_hf(mcore, back, table, hf, ranks=FakeRanks(rank, 3, {}))
    assert len(list(back.glob("*.safetensors"))) == 3
    before, after = weights(hf), weights(back)
    assert all(torch.equal(before[key], after[key]) for key in before.keys() | after.keys())


class FakeRanks(Ranks):
    """One of several ranks that run in turn, the first rank last; remembers what the others told."""

    def __init__(self, rank, size, told):
        super().__init__()
        self.rank, self.size, self._told, self._count = rank, size, told, 0

    def gather(self, value):
        self._count += 1
        said = self._told.setdefault(self._count, {})
        said[self.rank] = value
        return list(said.values())

    def collect(self, value):
        return self.gather(value)

    def agree(self, error):
        if error is not None:
            raise error


def test_dtype_is_converted_on_the_way_and_told_in_config(tmp_path, small_parts):
    table, hf, mcore, back = rule_table("qwen3"), tmp_path / "hf", tmp_path / "mcore", tmp_path / "back"
    make_checkpoint("qwen3", hf, torch.float32)
    to_mcore(hf, mcore, table)
    to_hf(mcore, back, table, hf, dtype=torch.bfloat16)
    for key, tensor in weights(hf).items():
        assert torch.equal(weights(back)[key], tensor.to(torch.bfloat16)), key
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"


def test_parts_of_different_dtype_meet_without_loss(tmp_path):
    table, hf, mcore, back = rule_table("llama"), tmp_path / "hf", tmp_path / "mcore", tmp_path / "back"
    make_checkpoint("llama", hf, torch.bfloat16)
    tensors = weights(hf)
    key = "model.layers.0.self_attn.k_proj.weight"
    tensors[key] = torch.randn_like(tensors[key], dtype=torch.float32)
    save_file(tensors, hf / "model.safetensors")
    to_mcore(hf, mcore, table)
    to_hf(mcore, back, table, hf)
    after = weights(back)
    assert all(torch.equal(after[name].float(), tensor.float()) for name, tensor in tensors.items())


def test_padded_vocabulary_of_a_training_checkpoint_is_trimmed(tmp_path):
    """A run with TP=2 stores 256 rows for a vocabulary of 101."""
    from torch.nn.functional import pad

    from converters.hf_writer import TensorSpec
    from converters.torch_dist_writer import MCoreWriter, share_chunks

    table, hf, mcore, back = rule_table("llama-tied"), tmp_path / "hf", tmp_path / "mcore", tmp_path / "back"
    make_checkpoint("llama-tied", hf)
    to_mcore(hf, mcore, table)
    key, padded = "embedding.word_embeddings.weight", tmp_path / "padded"
    padded.mkdir()
    with MCoreReader(mcore) as reader:
        specs = [
            TensorSpec(name, (256, 24) if name == key else spec.shape, spec.dtype)
            for name, spec in reader.specs.items()
        ]

        def fill(spec, region, out):
            if spec.name != key:
                reader.copy_into(spec.name, region, out)
                return
            rows = torch.empty(101, 24)
            reader.copy_into(key, ((0, 101), (0, 24)), rows)
            out.copy_(pad(rows, (0, 0, 0, 155), value=7.0))

        writer = MCoreWriter(padded, share_chunks(specs, 1)[0], Ranks())
        writer.write(fill)
        writer.finish()
    to_hf(padded, back, table, hf)
    before, after = weights(hf), weights(back)
    assert all(torch.equal(before[name], after[name]) for name in before.keys() | after.keys())


def test_a_transposed_tensor_in_a_checkpoint_is_read_too(tmp_path):
    """A chunk that was saved with strides of its own cannot be read in place."""
    from torch.distributed.checkpoint import save

    values = torch.randn(6, 9)
    save({"decoder.a": values.t(), "decoder.b": values}, checkpoint_id=tmp_path / "x", no_dist=True)
    with MCoreReader(tmp_path / "x") as reader:
        for key, whole in (("decoder.a", values.t()), ("decoder.b", values)):
            out = torch.empty(2, 3)
            reader.copy_into(key, ((3, 5), (1, 4)), out)
            assert torch.equal(out, whole[3:5, 1:4]), key


def test_every_mismatch_is_told_at_once(tmp_path):
    table, hf = rule_table("qwen3"), tmp_path / "hf"
    make_checkpoint("qwen3", hf)
    tensors = weights(hf)
    del tensors["model.layers.1.self_attn.q_norm.weight"], tensors["model.norm.weight"]
    tensors["model.layers.4.mlp.gate_proj.weight"] = torch.zeros(2)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(39, 24)
    tensors["lm_head.weight"] = torch.zeros(100, 24)
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(UserErrors) as caught:
        to_mcore(hf, tmp_path / "mcore", table)
    message = str(caught.value)
    assert "lacks model.layers.1.self_attn.q_norm.weight, model.norm.weight" in message
    assert "holds model.layers.4.mlp.gate_proj.weight, which the model" in message
    assert "should have one shape, not [(39, 24), (40, 24)]" in message
    assert "lm_head.weight has 100 rows, but vocab_size in config.json is 101" in message
    assert list((tmp_path / "mcore").iterdir()) == []


def test_optional_tensors_of_old_exports_are_left_out(tmp_path):
    table, hf = rule_table("llama-tied"), tmp_path / "hf"
    make_checkpoint("llama-tied", hf)
    tensors = weights(hf)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, hf / "model.safetensors")
    to_mcore(hf, tmp_path / "mcore", table)
    assert set(MCoreReader(tmp_path / "mcore").specs) == set(table.by_mcore)


def test_a_checkpoint_of_another_model_is_told(tmp_path):
    make_checkpoint("qwen3", tmp_path / "hf")
    to_mcore(tmp_path / "hf", tmp_path / "mcore", rule_table("qwen3"))
    with pytest.raises(UserErrors) as caught:
        to_hf(tmp_path / "mcore", tmp_path / "back", rule_table("qwen2"), tmp_path / "hf")
    message = str(caught.value)
    assert "lacks decoder.layers.0.self_attention.linear_qkv.bias" in message
    assert "holds decoder.layers.0.self_attention.q_layernorm.weight" in message
    assert "does not divide into" in message  # head_dim differs


def test_broken_torch_dist_folders_are_told(tmp_path):
    with pytest.raises(UserError, match="no megatron-core checkpoint"):
        MCoreReader(tmp_path)
    make_checkpoint("llama", tmp_path / "hf")
    to_mcore(tmp_path / "hf", tmp_path / "mcore", rule_table("llama"))
    data = tmp_path / "mcore" / "__0_0.distcp"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1000])
    with pytest.raises(UserError, match="__0_0.distcp is truncated"):
        MCoreReader(tmp_path / "mcore")
    data.unlink()
    with pytest.raises(UserError, match="__0_0.distcp is missing"):
        MCoreReader(tmp_path / "mcore")
    (tmp_path / "mcore" / ".metadata").write_bytes(b"junk")
    with pytest.raises(UserError, match="metadata cannot be read"):
        MCoreReader(tmp_path / "mcore")


def test_a_disk_that_fills_up_is_told(tmp_path, monkeypatch):
    """torch.save hides what the file said; the user must still read it."""
    import errno
    import os

    from converters.tensor_file import TensorFile

    with TensorFile(tmp_path / "x") as file:

        class Full:
            def write(self, data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            def close(self):
                pass

        monkeypatch.setattr(file, "_raw", Full())
        with pytest.raises(UserError, match="no space left for .*x"):
            file.save(torch.zeros(10_000))
