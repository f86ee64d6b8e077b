"""The HF writer: what it writes is read by safetensors, and a failure leaves nothing behind."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from converters import hf_writer
from converters.hf_reader import HFReader
from converters.hf_writer import HFWriter, in_writing_order, plan_files, share_out, write_index
from converters.pending import check_free_space, pending_directory
from converters.ranks import Ranks
from converters.safetensors_format import DTYPES, TensorSpec
from converters.side_files import copy_side_files
from mcore_swift.errors import UserError


def spec_of(name, tensor):
    return TensorSpec(name, tuple(tensor.shape), tensor.dtype)


def write_all(folder, tensors, max_shard_bytes, ranks=1):
    specs = in_writing_order([spec_of(*item) for item in tensors.items()])
    files = plan_files(share_out(specs, ranks), max_shard_bytes)
    for rank in range(ranks):
        with HFWriter(folder, files, rank) as writer:
            for file in files:
                for spec in file.specs if file.rank == rank else ():
                    for part in tensors[spec.name].reshape(-1).split(70_000):
                        writer.write(spec.name, part)
    write_index(folder, files)
    return files


def test_a_single_file_is_what_safetensors_reads(tmp_path):
    tensors = {}
    for number, (name, dtype) in enumerate(DTYPES.items()):
        size = (3 + number) * dtype.itemsize
        bits = torch.randint(0, 2 if name == "BOOL" else 256, (size,), dtype=torch.uint8)
        tensors[f"t.{name}"] = bits.view(dtype)
    write_all(tmp_path, tensors, 10**9)
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name].view(torch.uint8), tensor.view(torch.uint8)), name
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for name, stored in HFReader(tmp_path).tensors.items():
        assert stored.offset % tensors[name].dtype.itemsize == 0, "readers that map the file need this"


def test_shard_size_is_respected_and_files_are_numbered_over_all_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_writer, "MIN_RANK_BYTES", 1)
    torch.manual_seed(0)
    tensors = {f"layer.{n}": torch.randn(10 + n) for n in range(20)} | {"large": torch.randn(500)}
    files = write_all(tmp_path, tensors, 400, ranks=3)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert {file.rank for file in files} == {0, 1, 2}
    for file in files:
        assert sum(spec.nbytes for spec in file.specs) <= 400 or [spec.name for spec in file.specs] == [
            "large"
        ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name, file_name in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file_name)[name], tensors[name])
    assert index["weight_map"].keys() == tensors.keys()


def test_a_small_model_comes_in_one_file_whatever_the_number_of_ranks():
    specs = [TensorSpec(str(n), (1000,), torch.float32) for n in range(10)]
    assert [len(share) for share in share_out(specs, 8)] == [10, 0, 0, 0, 0, 0, 0, 0]
    assert [file.name for file in plan_files(share_out(specs, 8), 10**9)] == ["model.safetensors"]


def test_parts_out_of_order_are_a_defect(tmp_path):
    files = plan_files([[TensorSpec("a", (4,), torch.float32), TensorSpec("b", (4,), torch.float32)]], 100)
    writer = HFWriter(tmp_path, files)
    with pytest.raises(ValueError, match="is due"):
        writer.write("b", torch.zeros(4))
    writer.write("a", torch.zeros(4))
    with pytest.raises(ValueError, match="never written"):
        writer.close()


def test_a_folder_appears_when_complete_and_not_when_something_fails(tmp_path):
    final = tmp_path / "out"
    with pytest.raises(RuntimeError), pending_directory(final, Ranks()) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with pending_directory(final, Ranks()) as folder:
        (folder / "whole").write_text("x")
        assert not final.exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert [entry.name for entry in final.iterdir()] == ["whole"]


def test_a_filled_folder_is_refused_or_its_weights_replaced(tmp_path):
    final = tmp_path / "out"
    final.mkdir()
    for name in (
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "notes.txt",
        "config.json",
    ):
        (final / name).write_text("old")
    with pytest.raises(UserError, match="not empty") as caught, pending_directory(final, Ranks()):
        pass
    assert "--exist_ok" in caught.value.remedy
    with pending_directory(final, Ranks(), exist_ok=True) as folder:
        (folder / "model.safetensors").write_text("new")
        (folder / "config.json").write_text("new")
    assert {entry.name: entry.read_text() for entry in final.iterdir()} == {
        "model.safetensors": "new",
        "config.json": "new",
        "notes.txt": "old",
    }
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_told_before_writing(tmp_path, monkeypatch):
    check_free_space(tmp_path, 1)
    with pytest.raises(UserError, match="GB free, the output needs 9000000000.0 GB"):
        check_free_space(tmp_path, 9 * 10**18)


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 1 MiB."""
    if os.geteuid() != 0 or sys.platform != "linux" or not shutil.which("mount"):
        pytest.skip("mounting a tmpfs needs root")
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True
    ).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_fills_up_is_told_and_left_clean(tiny_disk):
    """The check before writing is passed (as when another program fills the disk meanwhile)."""
    tensors = {f"t{n}": torch.zeros(100_000) for n in range(5)}
    caught = pytest.raises(UserError, match="no space left for .*model")
    with caught as info, pending_directory(tiny_disk / "out", Ranks()) as folder:
        write_all(folder, tensors, 10**9)
    assert "--output_dir" in info.value.remedy
    assert list(tiny_disk.iterdir()) == []


def test_a_write_that_fails_is_told_and_left_clean(tmp_path, monkeypatch):
    """The same without root: the second write finds the disk full."""
    real, calls = Path.open, []

    def failing_open(self, mode="r", *args, **kwargs):
        calls.append(mode)
        if "w" in mode and len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", failing_open)
    tensors = {f"t{n}": torch.zeros(100) for n in range(5)}
    caught = pytest.raises(UserError, match="no space left for .*model-00002")
    with caught, pending_directory(tmp_path / "out", Ranks()) as folder:
        write_all(folder, tensors, 400)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_nothing_under_the_final_name_and_the_next_run_cleans_up(tmp_path):
    script = f"""
import os, signal
from pathlib import Path
from converters.pending import pending_directory
from converters.ranks import Ranks
with pending_directory({str(tmp_path / "out")!r}, Ranks()) as folder:
    (folder / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with pending_directory(tmp_path / "out", Ranks()) as folder:
        (folder / "whole").write_text("x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["whole"]


def test_side_files_come_along_and_weights_do_not(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir(), target.mkdir()
    wanted = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt", "vocab.json")
    wanted += ("chat_template.jinja", "modeling_own.py", "special_tokens_map.json", "tokenizer.model")
    for name in (
        *wanted,
        "model.safetensors",
        "model.safetensors.index.json",
        "README.md",
        "pytorch_model.bin",
    ):
        (source / name).write_text(name)
    (source / "config.json").write_text(json.dumps({"torch_dtype": "float32", "hidden_size": 8}))
    assert set(copy_side_files(source, target, torch.bfloat16)) == {*wanted, "config.json"}
    assert {entry.name for entry in target.iterdir()} == {*wanted, "config.json"}
    assert json.loads((target / "config.json").read_text()) == {"torch_dtype": "bfloat16", "hidden_size": 8}
