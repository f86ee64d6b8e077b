"""One process of the job that `test_export_round_trip.py` starts: every case in one job saves the imports."""

import json
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from converter_cases import FAMILIES, make_checkpoint  # noqa: E402
from jobs import run_cases  # noqa: E402

from mcore_swift.accelerator import get_accelerator  # noqa: E402

get_accelerator().install()

from groups import use_layout  # noqa: E402
from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from converters import export, export_plan, hf_writer, stored, stream, torch_dist_writer  # noqa: E402
from converters.export import export_hf, hf_weights  # noqa: E402
from converters.hf_reader import HFReader  # noqa: E402
from converters.layers import compare_layers  # noqa: E402
from converters.load import load_hf  # noqa: E402
from converters.ranks import Ranks  # noqa: E402
from converters.torch_dist_reader import MCoreReader  # noqa: E402
from converters.verify import compare_logits, fixed_rows, require_equal  # noqa: E402
from converters.views import HFView  # noqa: E402
from mcore_swift.errors import UserError  # noqa: E402
from mcore_swift.models.build import build_model, transformer_config  # noqa: E402
from mcore_swift.models.reading import read_model  # noqa: E402
from mcore_swift.models.shards import METADATA, live_shards  # noqa: E402
from mcore_swift.plan.layout import Layout  # noqa: E402

LAYOUTS = {
    2: {"TP2": Layout(tp=2), "PP2": Layout(pp=2), "PP2-VPP2": Layout(pp=2, vpp=2), "DP2": Layout(dp=2)},
    4: {
        "TP2-PP2": Layout(tp=2, pp=2),
        "TP2-PP2-VPP2": Layout(tp=2, pp=2, vpp=2),
        "TP2-DP2": Layout(tp=2, dp=2),
        "PP2-DP2": Layout(pp=2, dp=2),
    },
}
EXPERT_LAYOUTS = {
    2: {"EP2": Layout(dp=2, ep=2), "TP2-EP2": Layout(tp=2, ep=2), "TP2-ETP2": Layout(tp=2, etp=2)},
    4: {"TP2-DP2-EP2-ETP2": Layout(tp=2, dp=2, ep=2, etp=2), "PP2-EP2": Layout(pp=2, dp=2, ep=2)},
}
"""For models with experts only."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def layouts_of(family: str) -> dict[str, Layout]:
    world = dist.get_world_size()
    return LAYOUTS[world] | (EXPERT_LAYOUTS[world] if family.endswith("moe") else {})


def model_in(folder: Path, layout: str, dtype: torch.dtype):
    """The model of a checkpoint folder with other weights than the checkpoint's."""
    sizes = layouts_of("qwen3moe")[layout]
    use_layout(sizes)
    plan = read_model(str(folder))
    chunks = build_model(plan, transformer_config(plan, sizes, dtype))
    with torch.no_grad():
        for shard in live_shards(chunks):
            shard.data.fill_(7)
    return plan, chunks


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


def round_trip(family: str, dtype: str, folder: Path) -> None:
    """HF -> first layout -> HF -> second layout -> HF and so on, through all layouts."""
    original = source = folder / "source"
    if dist.get_rank() == 0:
        make_checkpoint(family, source, DTYPES[dtype], max_shard_size="20KB")
    dist.barrier()
    for layout in layouts_of(family):
        plan, chunks = model_in(source, layout, DTYPES[dtype])
        with HFReader(source) as reader:
            stats = load_hf(chunks, reader, plan.table)
        held = sum(shard.data.nbytes for shard in live_shards(chunks))
        assert 0 < stats.bytes_read <= held, "a rank reads its own slices and nothing else"
        source = folder / layout
        export_hf(chunks, plan.table, original, source, max_shard_bytes=30_000)
        assert len(list(source.glob("*.safetensors"))) > 1
        assert_same(weights(original), weights(source))
        assert json.loads((source / "config.json").read_text())["dtype"] == str(DTYPES[dtype])[6:]


def streamed(family: str, dtype: str, layout: str, folder: Path) -> None:
    """The streamed checkpoint is what this layout's model asks for, and loads to what `load_hf` loads."""
    source, target = folder / "source", folder / "mcore"
    if dist.get_rank() == 0:
        make_checkpoint(family, source, DTYPES[dtype])
        target.mkdir()
    dist.barrier()
    plan, chunks = model_in(source, layout, DTYPES[dtype])
    with HFReader(source) as reader:
        view = HFView(reader, plan.table)
        stream.write_mcore(view, stream.plan_mcore(view, plan.table, None, Ranks().size), target)
        load_hf(chunks, reader, plan.table)
    expected = [shard.data.clone() for shard in live_shards(chunks)]
    dist.barrier()
    asked = {}
    for shapes in Ranks().gather({shard.key: shard.global_shape for shard in live_shards(chunks)}):
        asked.update(shapes)
    rows = dict.fromkeys(("embedding.word_embeddings.weight", "output_layer.weight"), plan.hf.vocab_size)
    assert MCoreReader(target).shapes == {
        key: (rows.get(key, shape[0]), *shape[1:]) for key, shape in asked.items()
    }
    for shard in live_shards(chunks):
        shard.data.fill_(7)
    dist_checkpointing.load(
        {
            f"model{n}": weights_only(chunk.sharded_state_dict(metadata=dict(METADATA)))
            for n, chunk in enumerate(chunks)
        },
        str(target),
    )
    for shard, data in zip(live_shards(chunks), expected, strict=True):
        assert torch.equal(shard.data, data), shard.key


def weights_only(state_dict: dict) -> dict:
    """Without extra state, which no Hugging Face checkpoint gives."""
    kept = {key: value for key, value in state_dict.items() if not key.endswith("_extra_state")}
    assert all(isinstance(value, ShardedBase) for value in kept.values())
    assert any(isinstance(value, ShardedTensor) for value in nested_values(kept))
    return kept


def each_tensor_once(family: str, layout: str, folder: Path) -> None:
    """`hf_weights` gives every tensor on exactly one rank, in buckets of the asked size."""
    source = folder / "source"
    if dist.get_rank() == 0:
        make_checkpoint(family, source)
    dist.barrier()
    plan, chunks = model_in(source, layout, torch.float32)
    with HFReader(source) as reader:
        load_hf(chunks, reader, plan.table)
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in weights(source).items()}
    for bucket_bytes in (1, 3000, 10**9):
        mine = {}
        for bucket in hf_weights(chunks, plan.table, bucket_bytes, dtype=torch.bfloat16):
            assert bucket.nbytes <= bucket_bytes or len(bucket.tensors) == 1
            mine.update({name: tensor.clone() for name, tensor in bucket.tensors.items()})
        gathered = Ranks().gather(mine)
        names = [name for part in gathered for name in part]
        assert len(names) == len(set(names))
        assert all(gathered), "every rank has a share"
        assert_same(expected, {name: tensor for part in gathered for name, tensor in part.items()})


def full_disk_on_one_rank(layout: str, folder: Path) -> None:
    """The rank whose disk is full tells all; none hangs, nothing is left."""
    source, target = folder / "source", folder / "out"
    if dist.get_rank() == 0:
        make_checkpoint("qwen3", source)
    dist.barrier()
    plan, chunks = model_in(source, layout, torch.float32)
    real = hf_writer.HFWriter.write

    def write(self, name, part):
        if dist.get_rank() == 1 and self._position == 3:
            raise UserError("no space left for model-00002")
        real(self, name, part)

    hf_writer.HFWriter.write = write
    try:
        export_hf(chunks, plan.table, source, target)
    except UserError as error:
        assert "no space left" in error.message
    else:
        raise AssertionError("no rank was told")
    finally:
        hf_writer.HFWriter.write = real
    dist.barrier()
    assert [entry.name for entry in folder.iterdir()] == ["source"]


def missing_tensor(layout: str, folder: Path) -> None:
    """Every rank is told of a tensor that is not there, and no parameter has changed."""
    from safetensors.torch import save_file

    source = folder / "source"
    if dist.get_rank() == 0:
        make_checkpoint("qwen2", source)
        tensors = weights(source)
        del tensors["model.layers.3.self_attn.q_proj.bias"]
        save_file(tensors, source / "model.safetensors")
    dist.barrier()
    plan, chunks = model_in(source, layout, torch.float32)
    try:
        with HFReader(source) as reader:
            load_hf(chunks, reader, plan.table)
    except UserError as error:
        assert "lacks model.layers.3.self_attn.q_proj.bias" in error.message
    else:
        raise AssertionError("the missing tensor was not told")
    assert all((shard.data == 7).all() for shard in live_shards(chunks))


def logits(layout: str, folder: Path) -> None:
    """The comparison with transformers passes on a sound model and fails on one with a single wrong tensor."""
    source = folder / "source"
    if dist.get_rank() == 0:
        make_checkpoint("qwen3", source)
    dist.barrier()
    plan, chunks = model_in(source, layout, torch.float32)
    with HFReader(source) as reader:
        load_hf(chunks, reader, plan.table)
    tokens = fixed_rows(plan.hf.vocab_size, rows=4)
    sound = compare_logits(chunks, plan.hf.vocab_size, str(source), tokens)
    assert sound.max < 1e-5 and sound.same_best == 1.0, sound  # fp32 of a model with logits near 1
    require_equal(sound, "it")
    for shard in live_shards(chunks):
        if shard.key == "decoder.layers.2.self_attention.k_layernorm.weight":
            shard.data.mul_(1.01)
    wrong = compare_logits(chunks, plan.hf.vocab_size, str(source), tokens)
    try:
        require_equal(wrong, "it")
    except UserError as error:
        assert "it does not compute what transformers computes" in error.message
    else:
        raise AssertionError(f"one norm is off by a hundredth, and nobody saw it: {wrong}")
    layers = compare_layers(chunks, plan.hf.vocab_size, str(source), tokens, torch.float32)
    assert [layer.number for layer in layers.layers] == [0, 1, 2, 3, 4], layers
    assert layers.first == 3 and "layer 3 of 4 is the first" in layers.verdict, layers
    assert max(layer.max for layer in layers.layers[:3]) < 1e-5  # as for the logits of the sound model


def cases():
    """Case name -> function of a folder."""
    layouts = list(LAYOUTS[dist.get_world_size()])
    for family in FAMILIES:
        for dtype in DTYPES:
            yield f"round-trip {family} {dtype}", partial(round_trip, family, dtype)
        for layout in layouts_of(family):
            yield f"streamed {family} {layout}", partial(streamed, family, "bf16", layout)
    for layout in layouts:
        for family in ("llama", "qwen3-tied"):
            yield f"each-once {family} {layout}", partial(each_tensor_once, family, layout)
    # Who is told of what does not depend on the layout, and logits in each are the parity grid's.
    layout = layouts[0]
    yield f"full-disk {layout}", partial(full_disk_on_one_rank, layout)
    yield f"missing-tensor {layout}", partial(missing_tensor, layout)
    yield f"logits {layout}", partial(logits, layout)


def in_a_folder(case, place: Path) -> None:
    if dist.get_rank() == 0:
        place.mkdir()
    dist.barrier()
    case(place)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    # So small that even tiny tensors are cut, and every rank has a share.
    torch_dist_writer.CHUNK_BYTES = stream.PART_BYTES = 700
    export_plan.plan_export.__defaults__ = (None, 1, None)
    hf_writer.MIN_RANK_BYTES = 1
    export.BUCKET_BYTES = 5000
    stored.DIRECT_RUN_BYTES = 1
    named = enumerate(cases())
    run_cases({name: partial(in_a_folder, case, folder / f"case-{n}") for n, (name, case) in named}, folder)
