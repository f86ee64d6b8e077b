"""A disk that fills up during a save: one message, exit code 2, nothing half-written, older checkpoints untouched."""

import os
import shutil
import subprocess

import pytest
from commands import run
from tiny import curve, stored

MEGABYTE = 1 << 20


@pytest.fixture
def disk(tmp_path):
    """A file system of 16 MB that is mounted for the test."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    if (
        os.geteuid() != 0
        or not shutil.which("mount")
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("mounting a file system needs root and the right to mount")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def leave(disk, free):
    """Fill the disk up to `free` bytes."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    with ballast.open("wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - free))


def listing(folder):
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def begun(sft, tmp_path_factory):
    """A run of two steps and its checkpoint, which each test goes on with on a disk of its own."""
    folder = tmp_path_factory.mktemp("begun")
    run(
        sft(output_dir=folder / "run", train_iters=2, save_steps=2, save_safetensors=True), folder / "first"
    ).check()
    return folder / "run"


def test_a_full_disk_while_saving(disk, begun, sft, tmp_path):
    output = shutil.copytree(begun, disk / "run", symlinks=True)
    common = {"output_dir": output, "save_steps": 2, "resume": "auto", "save_safetensors": True}
    kept = output / "checkpoint-2"
    weights = (kept / "model.safetensors").stat().st_size
    state = sum(path.stat().st_size for path in (kept / "mcore").iterdir())
    before, tensors = listing(kept), stored(kept)

    # Neither part alone is too large, which would be seen beforehand: the disk fills up in the middle of writing.
    leave(disk, state + weights // 2)
    ended = run(sft(train_iters=4, **common), tmp_path / "in-the-middle", processes=2)
    assert ended.err.count("error:") == 1 and ended.err.count("no space left for ") == 1, ended.err
    assert ended.err.count("remedy: free space") == 1, ended.err
    # With less room than the state needs, nothing is begun.
    leave(disk, state // 2)
    refused = run(sft(train_iters=4, **common), tmp_path / "beforehand")
    assert refused.err.count("error:") == 1 and "GB free, the output needs" in refused.err, refused.err
    for failed in (ended, refused):
        assert failed.code == 2, failed.err
        assert "Traceback" not in failed.err, failed.err
    assert listing(kept) == before
    after = stored(kept)
    assert tensors.keys() == after.keys() and all(tensors[key].equal(after[key]) for key in after)
    assert [path.name for path in output.glob("*checkpoint*")] == ["checkpoint-2"]
    assert [path.name for path in output.glob(".*")] == []
    assert os.readlink(output / "latest") == "checkpoint-2"

    (disk / "ballast").unlink()
    run(sft(train_iters=4, **common), tmp_path / "room-again").check()
    assert sorted(curve(output)) == [1, 2, 3, 4]
    assert os.readlink(output / "latest") == "checkpoint-4"


def test_a_disk_that_fills_up_behind_the_training(disk, begun, sft, tmp_path):
    """--async_save writes in a thread; the mistake found there ends the run as one found at once does."""
    output = shutil.copytree(begun, disk / "run", symlinks=True)
    common = {"output_dir": output, "save_steps": 2, "resume": "auto", "async_save": True}
    kept = output / "checkpoint-2"
    before, tensors = listing(kept), stored(kept)
    # Room for the tensors and nothing else, so that the disk is full only when the last of them are written.
    leave(disk, sum(tensor.nbytes for tensor in tensors.values()) + 20_000)
    ended = run(sft(train_iters=4, **common), tmp_path / "in-the-background")
    assert ended.code == 2 and "Traceback" not in ended.err, ended.err
    assert ended.err.count("error:") == 1 and ended.err.count("no space left for ") == 1, ended.err
    assert "__0_0.distcp" in ended.err, ended.err
    assert listing(kept) == before
    assert [path.name for path in output.glob("*checkpoint*")] == ["checkpoint-2"]
    assert [path.name for path in output.glob(".*")] == []
    assert os.readlink(output / "latest") == "checkpoint-2"
