"""Conversions that are killed go on where they stopped; memory is bounded; a dry run tells what would be done."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from converter_cases import make_checkpoint, rule_table

from converters import main, progress, stored, stream
from converters.budget import DECODING, HELD, Budget
from converters.dry_run import dry_run
from converters.hf_reader import HFReader
from converters.journal import Checksum, Entry, Journal
from converters.ranks import Ranks
from converters.stored import Buffers
from converters.torch_dist_reader import MCoreReader
from converters.views import HFView
from mcore_swift.config import COMMANDS, parse
from mcore_swift.errors import UserError, UserErrors

SMALL = "8KB"  # the least that the tiny models' rows need is 40 * 8 * 5 = 1600 bytes


def arguments(**flags):
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return parse(COMMANDS["export"], argv, notify=lambda notice: None)


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "hf"
    make_checkpoint("qwen3", folder, torch.bfloat16)
    return folder


def tree(folder):
    """All of a checkpoint but what tells when and to where it was written."""
    told = ("args.json", "manifest.json", ".metadata")
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name not in told]
    content = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    if (Path(folder) / "mcore").is_dir():
        for key, chunks in MCoreReader(folder)._chunks.items():
            content[key] = {(chunk.region, chunk.path.name, chunk.offset, chunk.length) for chunk in chunks}
    return content


def killed_conversion(args, after: int) -> Path:
    """Run the command in a process that is killed with -9 once it has written `after` pieces; its hidden folder."""
    hidden = Path(args.output_dir).with_name(f".{Path(args.output_dir).name}.writing")
    child = os.fork()
    if child == 0:
        try:
            add = Journal.add
            Journal.add = lambda self, entry: (add(self, entry), time.sleep(0.003))  # slow enough to be hit
            main.convert(args, Ranks())
        finally:
            os._exit(1)  # was not killed
    deadline = time.monotonic() + 60
    while sum(path.read_bytes().count(b"\n") for path in hidden.rglob(".journal-0")) < after:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not Path(args.output_dir).exists() and hidden.is_dir()
    return hidden


@pytest.mark.parametrize("direction", ["to_mcore", "to_hf"])
def test_a_conversion_killed_in_the_middle_goes_on_and_ends_bit_identical(direction, hf, tmp_path, capsys):
    mcore, flags = tmp_path / "mcore", {"memory_budget": SMALL}
    if direction == "to_hf":
        main.convert(arguments(model=hf, to_mcore=True, output_dir=mcore), Ranks())
        source = {"model": hf, "mcore_model": mcore, "to_hf": True, "max_shard_size": "20KB"}
    else:
        source = {"model": hf, "to_mcore": True}
    whole, cut = (arguments(**source, **flags, output_dir=tmp_path / name) for name in ("whole", "cut"))
    main.convert(whole, Ranks())
    assert "kept" not in capsys.readouterr().out

    hidden = killed_conversion(cut, after=25)
    journal = next(hidden.rglob(".journal-0"))
    entries = [Entry(*json.loads(line)) for line in journal.read_text().splitlines()]
    # Half-written data behind the last piece, a line that was cut short, and a page that never reached the disk.
    damaged = entries[20]
    data = journal.parent / damaged.file
    with data.open("r+b") as file:
        file.seek(damaged.start + 8)
        file.write(b"\0" * 8 if file.read(8) != b"\0" * 8 else b"\1" * 8)
        file.seek(0, os.SEEK_END)
        file.write(b"half")
    with journal.open("a") as file:
        file.write('["model')
    written = []
    add = Journal.add
    try:
        Journal.add = lambda self, entry: (written.append(entry), add(self, entry))
        main.convert(cut, Ranks())
    finally:
        Journal.add = add
    kept = sum(entry.stop - entry.start for entry in entries[:20])
    assert f"{progress.size(kept)} that an earlier attempt wrote are kept" in capsys.readouterr().out
    assert written[0].start == damaged.start and written[0].file == damaged.file
    assert tree(cut.output_dir) == tree(whole.output_dir)
    assert not hidden.exists()


def test_what_another_source_or_other_flags_left_is_not_used(hf, tmp_path, capsys):
    source, out = tmp_path / "hf", tmp_path / "out"
    make_checkpoint("qwen3", source, torch.bfloat16, seed=1)
    args = arguments(model=source, to_mcore=True, output_dir=out, memory_budget=SMALL)
    killed_conversion(args, after=10)
    make_checkpoint("qwen3", source, torch.bfloat16, seed=2)  # the same sizes, other weights
    main.convert(args, Ranks())
    assert "kept" not in capsys.readouterr().out
    expected = arguments(model=source, to_mcore=True, output_dir=tmp_path / "expected", memory_budget=SMALL)
    main.convert(expected, Ranks())
    assert tree(out) == tree(expected.output_dir)

    other = arguments(model=source, to_mcore=True, output_dir=tmp_path / "other", memory_budget=SMALL)
    killed_conversion(other, after=10)
    other.torch_dtype = "float32"
    main.convert(other, Ranks())
    assert "kept" not in capsys.readouterr().out
    with MCoreReader(other.output_dir) as reader:
        assert {spec.dtype for spec in reader.specs.values()} == {torch.float32}


def test_two_at_once_are_refused(hf, tmp_path):
    args = arguments(model=hf, to_mcore=True, output_dir=tmp_path / "out")
    with main.open_source(args) as source:
        plan = main.plan_of(args, source, 1)
        with (
            main._unfinished(args, Ranks(), plan, source),
            pytest.raises(UserError, match="being written by another process"),
        ):
            main.convert(args, Ranks())


def test_checksum_does_not_depend_on_how_bytes_come():
    data = os.urandom(1001)
    values = set()
    for size in (1, 3, 8, 13, 1001):
        checksum = Checksum()
        for start in range(0, len(data), size):
            checksum.update(memoryview(data)[start : start + size])
        values.add(checksum.value)
    shorter = Checksum()
    shorter.update(data[:-1] + b"")
    assert len(values) == 1 and shorter.value not in values


def test_a_small_budget_bounds_the_pieces(hf, tmp_path, monkeypatch):
    """Everything that grows with a piece is asked for through these, and together they stay below the budget."""
    sizes = {"buffers": 0, "staging": 0, "written": 0}
    real_tensor, real_staging = Buffers.tensor, stored.RegionReader._staging

    def tensor(self, shape, dtype):
        out = real_tensor(self, shape, dtype)
        sizes["buffers"] = max(sizes["buffers"], self._memory.size)
        return out

    def staging(self, size):
        out = real_staging(self, size)
        sizes["staging"] = max(sizes["staging"], self._buffer.numel())
        return out

    monkeypatch.setattr(Buffers, "tensor", tensor)
    monkeypatch.setattr(stored.RegionReader, "_staging", staging)
    table = rule_table("qwen3")
    for nbytes, budget in ((2000, Budget(2000)), (None, Budget())):
        sizes.update(buffers=0, staging=0)
        mcore, back = tmp_path / f"mcore-{nbytes}", tmp_path / f"back-{nbytes}"
        mcore.mkdir(), back.mkdir()
        with HFReader(hf, budget.staging) as reader:  # another dtype, so that nothing is read in place
            view = HFView(reader, table)
            stream.write_mcore(view, stream.plan_mcore(view, table, torch.float32, 1, budget), mcore)
        with MCoreReader(mcore, staging_bytes=budget.staging) as reader:
            plan = stream.plan_hf(reader, table, 10**9, torch.bfloat16, 1, budget)
            stream.write_hf(reader, plan, hf, back)
        if nbytes:
            assert 0 < 2 * sizes["buffers"] + sizes["staging"] <= nbytes
        else:
            assert sizes["buffers"] > 2000
    first, second = (tree(tmp_path / f"back-{nbytes}") for nbytes in (2000, None))
    assert first == second


def test_a_budget_in_which_no_row_fits_is_refused(hf, tmp_path):
    least = 40 * DECODING * HELD
    table = rule_table("qwen3")
    with HFReader(hf) as reader:
        stream.plan_mcore(HFView(reader, table), table, budget=Budget(least))
        with pytest.raises(UserError, match="one row of .* takes up to 320 bytes") as caught:
            stream.plan_mcore(HFView(reader, table), table, budget=Budget(least - 1))
    assert "at least --memory_budget 2KB" in caught.value.remedy
    with pytest.raises((UserError, UserErrors), match="--memory_budget 'much' is no size"):
        arguments(model=hf, to_mcore=True, memory_budget="much")


def test_a_dry_run_tells_what_the_conversion_then_does(hf, tmp_path, capsys, monkeypatch):
    out = tmp_path / "mcore"
    args = arguments(model=hf, to_mcore=True, output_dir=out)
    assert dry_run(args, processes=2) == 0
    told = capsys.readouterr().out
    weights = sum(tensor.nbytes for tensor in HFReader(hf).tensors.values())
    assert f"reads {hf} ({progress.size(weights)} of weights)" in told
    for rank in range(2):
        assert f"process {rank}: reads " in told and f"mcore/__{rank}_0.distcp" in told
    assert "dry run: nothing was written" in told and list(tmp_path.iterdir()) == []

    main.convert(args, Ranks())
    back = arguments(model=hf, mcore_model=out, to_hf=True, output_dir=tmp_path / "b", max_shard_size="20KB")
    capsys.readouterr()
    dry_run(back, processes=1)
    told = capsys.readouterr().out
    assert not (tmp_path / "b").exists()
    main.convert(back, Ranks())
    for path in (tmp_path / "b").glob("*.safetensors"):
        nbytes = sum(
            tensor.nbytes for tensor in HFReader(tmp_path / "b").tensors.values() if tensor.path == path
        )
        assert f"    {path.name}  {progress.size(nbytes)}  " in told

    from collections import namedtuple

    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Usage", "free")(10))
    with pytest.raises(UserError, match="0.0 kB free, the output needs"):
        dry_run(args, processes=1)


def test_progress_in_lines_counts_only_what_this_attempt_writes(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Shown("a -> b", Ranks()) as shown:
        shown.begin(total=4_000_000_000, share=2_000_000_000, done=500_000_000)
        for _ in range(3):
            now[0] += 5
            shown.advance(250_000_000)
        now[0] += 5
        shown.advance(750_000_000)
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "2.50 GB of 4.00 GB (62%) · 100.00 MB/s · 15s left"
    assert second == "a -> b: 3.00 GB written in 20.0 s, 150.00 MB/s"
