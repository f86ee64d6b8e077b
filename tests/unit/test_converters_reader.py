"""The sliced reader against the safetensors library, and what it says of broken checkpoints."""

import json
import random
import struct

import pytest
import torch
from safetensors.torch import save_file

from converters import stored
from converters.hf_reader import HFReader
from converters.safetensors_format import DTYPES
from mcore_swift.errors import UserError, UserErrors
from mcore_swift.models.rules import as_slices, region_shape

SHAPES = {
    "matrix": (37, 53),
    "vector": (101,),
    "cube": (5, 7, 11),
    "scalar": (),
    "wide": (3, 4000),
    "none": (0, 4),
}


def random_bits(shape, dtype):
    """A tensor of random bit patterns, NaNs included; bools are 0 or 1."""
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8)
    return bits.view(dtype).reshape(shape)


def same_bits(first, second):
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and torch.equal(
            first.reshape(-1).view(torch.uint8), second.contiguous().reshape(-1).view(torch.uint8)
        )
    )


def random_region(shape, rng):
    cuts = [sorted(rng.sample(range(size + 1), 2)) if size else [0, 0] for size in shape]
    # Full dimensions and single rows are cases of their own in the reader.
    choices = [
        [tuple(cut), (0, size), (cut[0], min(cut[0] + 1, size))]
        for cut, size in zip(cuts, shape, strict=True)
    ]
    return tuple(rng.choice(choice) for choice in choices)


@pytest.fixture
def tiny_buffers(monkeypatch):
    """Buffers so small that every path that cuts a copy into parts is taken."""
    monkeypatch.setattr(stored, "STAGING_BYTES", 512)
    monkeypatch.setattr(stored, "DIRECT_RUN_BYTES", 64)


@pytest.mark.parametrize("name", DTYPES)
def test_reads_what_was_written_for_every_dtype(tmp_path, name, tiny_buffers):
    tensors = {key: random_bits(shape, DTYPES[name]) for key, shape in SHAPES.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    rng = random.Random(name)
    with HFReader(tmp_path) as reader:
        assert {key: reader.shape(key) for key in reader.names} == SHAPES
        for key, whole in tensors.items():
            assert same_bits(reader.read(key), whole)
            for _ in range(20):
                region = random_region(SHAPES[key], rng)
                assert same_bits(reader.read(key, region), whole[as_slices(region)]), (key, region)


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float64])
def test_copy_into_converts_and_respects_strides(tmp_path, target, tiny_buffers):
    whole = torch.randn(64, 96, dtype=torch.bfloat16)
    save_file({"w": whole}, tmp_path / "model.safetensors")
    rng = random.Random(0)
    with HFReader(tmp_path) as reader:
        for _ in range(50):
            region = random_region((64, 96), rng)
            rows, columns = region_shape(region)
            for out in (
                torch.zeros(rows, columns, dtype=target),
                torch.zeros(columns, rows, dtype=target).t(),
                torch.zeros(rows, 2 * columns, dtype=target)[:, ::2],
            ):
                reader.copy_into("w", region, out)
                assert torch.equal(out, whole[as_slices(region)].to(target))


def test_reads_no_more_than_the_region(tmp_path):
    save_file({"w": torch.randn(1000, 4096), "wide": torch.randn(8, 40_000)}, tmp_path / "model.safetensors")
    with HFReader(tmp_path) as reader:
        reader.read("w", ((500, 510), (0, 4096)))
        assert reader.bytes_read == 10 * 4096 * 4
    with HFReader(
        tmp_path
    ) as reader:  # columns wide enough are read one row at a time, without their neighbours
        reader.read("wide", ((0, 8), (0, 20_000)))
        assert reader.bytes_read == 8 * 20_000 * 4


def test_several_files_with_an_index(tmp_path):
    first, second = torch.randn(4, 4), torch.randn(6)
    save_file({"a": first}, tmp_path / "x.safetensors")
    save_file({"b": second}, tmp_path / "y.safetensors")
    write_index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"})
    with HFReader(tmp_path) as reader:
        assert reader.nbytes == 4 * (16 + 6)
        assert torch.equal(reader.read("a"), first) and torch.equal(reader.read("b"), second)


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def test_everything_wrong_with_an_indexed_checkpoint_is_told_at_once(tmp_path):
    save_file({"a": torch.randn(100)}, tmp_path / "cut.safetensors")
    with (tmp_path / "cut.safetensors").open("rb+") as file:
        file.truncate(300)
    save_file({"b": torch.randn(4)}, tmp_path / "whole.safetensors")
    (tmp_path / "text.safetensors").write_bytes(struct.pack("<Q", 12) + b"{not json}  ")
    places = {"a": "cut", "b": "whole", "c": "whole", "d": "gone", "e": "text"}
    write_index(tmp_path, {name: f"{place}.safetensors" for name, place in places.items()})
    with pytest.raises(UserErrors) as caught:
        HFReader(tmp_path)
    message = str(caught.value)
    assert "cut.safetensors is truncated" in message and "has 300" in message
    assert "gone.safetensors, which is missing" in message
    assert "places c in whole.safetensors, which does not hold it" in message
    assert "text.safetensors has a broken safetensors header" in message
    assert len(caught.value.errors) == 4


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no valid header length"),
        (struct.pack("<Q", 1 << 60) + b"{}", "no valid header length"),
        (struct.pack("<Q", 1000) + b"{}", "truncated"),
        (struct.pack("<Q", 2) + b"[]", "broken safetensors header"),
        (struct.pack("<Q", 2) + b"{}xyz", "too long"),
    ],
)
def test_a_broken_file_is_named(tmp_path, content, says):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        HFReader(tmp_path)
    assert "model.safetensors" in caught.value.message and caught.value.remedy


def test_a_shape_that_does_not_fit_its_bytes_is_refused(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(UserError, match="does not fit data_offsets"):
        HFReader(tmp_path)


def test_a_file_cut_while_it_is_read_is_told(tmp_path):
    save_file({"w": torch.randn(1000)}, tmp_path / "model.safetensors")
    with HFReader(tmp_path) as reader:
        with (tmp_path / "model.safetensors").open("rb+") as file:
            file.truncate(2000)
        with pytest.raises(UserError, match="ends at byte 2000"):
            reader.read("w")


def test_folders_without_safetensors_are_told_what_to_do(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        HFReader(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither model.safetensors nor"):
        HFReader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="only safetensors are read") as caught:
        HFReader(tmp_path)
    assert "save_pretrained" in caught.value.remedy
