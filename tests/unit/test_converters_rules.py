"""The algebra of weight rules: however a tensor is cut, each HF value is covered exactly once."""

import itertools
import random

import pytest
import torch
from converter_cases import FAMILIES, OTHER_KINDS, hf_config, rule_table

from converters.regions import clip, numel, relative, slabs
from mcore_swift.models.rules import as_slices, full_region, region_shape


def hf_shapes_of(name):
    """Shapes of the HF tensors, by transformers' own model."""
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf_config(name))
    buffers = [key for key, _ in model.named_buffers() if key in model.state_dict()]
    held = dict(model.named_parameters()) | {key: model.get_buffer(key) for key in buffers}
    return {key: tuple(tensor.shape) for key, tensor in held.items()}


def shapes_on_disk(name):
    """The same with one tensor for each expert, as checkpoints are written."""
    table, fused = rule_table(name), hf_shapes_of(name)
    return {
        key: shape
        for rule, held in zip(table.rules, table.as_held(fused).rules, strict=True)
        for key, shape in rule.hf_shapes(held.shape(fused)).items()
    }


def stored(tensors, block):
    """Where a block lies in the HF tensors: a view."""
    whole = tensors[block.name]
    return block.stored.view(whole, full_region(tuple(whole.shape)), block.hf)


def random_partition(shape, rng):
    """Boxes that tile a tensor: random cuts along every dimension."""
    axes = []
    for size in shape:
        cuts = sorted({0, size, *(rng.randrange(size + 1) for _ in range(rng.randrange(4)))})
        axes.append(list(itertools.pairwise(cuts)))
    return list(itertools.product(*axes))


@pytest.mark.parametrize("name", (*FAMILIES, *OTHER_KINDS))
def test_the_table_names_exactly_the_tensors_of_transformers_model(name):
    shapes = hf_shapes_of(name)
    table = rule_table(name).as_held(shapes)  # in memory, transformers fuses the experts of a layer
    assert set(table.by_hf) == set(shapes)
    for rule in table.rules:
        assert rule.hf_shapes(rule.shape(shapes)) == {key: shapes[key] for key in rule.hf}


@pytest.mark.parametrize("name", (*FAMILIES, *OTHER_KINDS))
@pytest.mark.parametrize("seed", range(3))
def test_load_then_export_is_identity_for_any_partition(name, seed):
    rng, shapes = random.Random(seed), shapes_on_disk(name)
    table = rule_table(name)
    for rule in table.rules[:9] + table.rules[-2:]:  # one layer, and what is outside of layers
        hf = {key: torch.randn(shapes[key]) for key in rule.hf}
        back = {key: torch.full(shapes[key], torch.nan) for key in rule.hf}
        written = {key: torch.zeros(shapes[key], dtype=torch.int64) for key in rule.hf}
        for region in random_partition(rule.shape(shapes), rng):
            part = torch.full(region_shape(region), torch.nan)
            for block in rule.blocks(region, shapes):
                block.of(part).copy_(stored(hf, block))
            assert not part.isnan().any(), "a value of the shard is filled by no block"
            for block in rule.blocks(region, shapes):
                stored(back, block).copy_(block.of(part))
                stored(written, block).add_(1)
        for key in rule.hf:
            assert torch.equal(back[key], hf[key]), key
            assert (written[key] == 1).all(), key


def test_qkv_is_interleaved_by_group_as_megatron_core_reads_it():
    """Against the reshape in megatron-core's attention: `[groups, (heads + 2) * head_dim, hidden]`."""
    table, shapes = rule_table("qwen2"), hf_shapes_of("qwen2")
    rule = table.by_mcore["decoder.layers.0.self_attention.linear_qkv.weight"]
    q, k, v = (torch.randn(shapes[key]) for key in rule.hf)
    groups, hidden = 2, 24
    expected = torch.cat([tensor.view(groups, -1, hidden) for tensor in (q, k, v)], dim=1).view(-1, hidden)
    whole = torch.empty(rule.shape(shapes))
    tensors = dict(zip(rule.hf, (q, k, v), strict=True))
    for block in rule.blocks(full_region(tuple(whole.shape)), shapes):
        whole[as_slices(block.mcore)] = tensors[block.name][as_slices(block.hf)]
    assert torch.equal(whole, expected)


def test_vocabulary_padding_is_covered_by_no_block():
    rule, shapes = rule_table("llama").by_mcore["output_layer.weight"], hf_shapes_of("llama")
    assert rule.hf_shapes((128, 24)) == {"lm_head.weight": (101, 24)}
    (block,) = rule.blocks(((64, 128), (0, 24)), shapes)
    assert block.hf == ((64, 101), (0, 24)) and block.mcore == ((0, 37), (0, 24))
    assert list(rule.blocks(((101, 128), (0, 24)), shapes)) == []


@pytest.mark.parametrize("shape", [(), (7,), (5, 6), (3, 4, 5), (1, 9), (9, 1), (0, 3)])
@pytest.mark.parametrize("max_bytes", [4, 8, 12, 40, 1000])
def test_slabs_tile_a_tensor_in_row_major_order(shape, max_bytes):
    values = torch.arange(torch.Size(shape).numel()).reshape(shape)
    parts = [values[as_slices(region)] for region in slabs(shape, 4, max_bytes)]
    joined = torch.cat([part.reshape(-1) for part in parts]) if parts else values.reshape(-1)
    assert torch.equal(joined, values.reshape(-1))
    assert all(part.numel() * 4 <= max(max_bytes, 4) for part in parts)


def test_clipped_blocks_add_up_to_the_whole():
    rule, shapes = (
        rule_table("llama").by_mcore["decoder.layers.1.mlp.linear_fc1.weight"],
        hf_shapes_of("llama"),
    )
    rng = random.Random(5)
    mcore = torch.randn(rule.shape(shapes))
    for name in rule.hf:
        for region in random_partition(shapes[name], rng):
            part = torch.full(region_shape(region), torch.nan)
            blocks = [
                block for block in rule.blocks(full_region(tuple(mcore.shape)), shapes) if block.name == name
            ]
            pieces = [piece for block in blocks if (piece := clip(block, region))]
            for piece in pieces:
                part[as_slices(relative(piece.hf, region))] = mcore[as_slices(piece.mcore)]
            first = list(rule.hf).index(name) * shapes[name][0]
            assert sum(numel(piece.hf) for piece in pieces) == part.numel()
            assert torch.equal(part, mcore[first : first + shapes[name][0]][as_slices(region)])
