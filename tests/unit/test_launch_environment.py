"""What the environment means: alone, joined or to start; and which variables make no sense."""

import os
import signal
from pathlib import Path

import pytest

import launch
from launch import report, slurm
from launch.environment import read_place
from launch.run import name_of, threads_per_process
from mcore_swift.errors import UserError, UserErrors


def test_an_empty_environment_is_one_process() -> None:
    place = read_place({})
    assert (place.mode, place.world_size) == ("alone", 1)
    assert read_place({"NPROC_PER_NODE": "1"}).mode == "alone"
    assert place.as_environment()["WORLD_SIZE"] == "1"


def test_processes_to_start() -> None:
    place = read_place({"NPROC_PER_NODE": "4"})
    assert (place.mode, place.world_size, place.processes_here, place.master_port) == ("start", 4, 4, None)
    env = {"NPROC_PER_NODE": "4", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
    place = read_place(env)
    assert (place.world_size, place.node_rank, place.master_port) == (8, 1, 29500)
    assert launch.world_size_from_env(env) == 8


def test_joining_torchrun() -> None:
    env = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h"}
    place = read_place(env | {"MASTER_PORT": "1234", "NPROC_PER_NODE": "2"})
    assert (place.mode, place.rank, place.local_rank, place.processes_here) == ("joined", 3, 1, 2)
    assert place.as_environment() == env | {"MASTER_PORT": "1234"}


def test_a_scheduler_that_numbers_nodes_leaves_the_start_to_us() -> None:
    env = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "NNODES": "2", "NODE_RANK": "1"}
    place = read_place(env | {"NPROC_PER_NODE": "8"})
    assert (place.mode, place.world_size, place.node_rank) == ("start", 16, 1)


SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
}


def test_joining_srun() -> None:
    place = read_place(SLURM)
    assert (place.mode, place.rank, place.world_size) == ("joined", 5, 7)
    assert (place.local_rank, place.processes_here, place.master_addr) == (1, 3, "gpu003")
    others = [read_place(SLURM | {"SLURM_PROCID": str(rank)}) for rank in range(7)]
    assert len({(other.master_addr, other.master_port) for other in others}) == 1
    assert read_place(SLURM | {"MASTER_ADDR": "a", "MASTER_PORT": "99"}).master_port == 99


def test_srun_without_the_rest_of_slurm() -> None:
    place = read_place({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"})
    assert (place.mode, place.rank, place.processes_here, place.master_addr) == ("joined", 1, 2, "127.0.0.1")


def test_one_task_to_a_node_may_start_the_others() -> None:
    env = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
    assert read_place(env).mode == "joined"
    asked = {"NPROC_PER_NODE": "8", "NNODES": "2", "MASTER_ADDR": "gpu003"}
    place = read_place(env | asked)
    assert (place.mode, place.world_size, place.node_rank) == ("start", 16, 1)
    assert read_place(SLURM | asked).mode == "joined"  # several tasks to a node are the processes


def test_a_batch_script_is_no_task() -> None:
    script = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    assert read_place(script).mode == "alone"


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("n1", "n1"),
        ("gpu[003-005,9],x", "gpu003"),
        ("a[7,9]", "a7"),
        ("r[1-2]-ib,q", "r1-ib"),
        ("a-1,b", "a-1"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert slurm.first_host(nodes) == first


@pytest.mark.parametrize(
    "env, words",
    [
        ({"NPROC_PER_NODE": "abc"}, ["NPROC_PER_NODE=abc"]),
        ({"NPROC_PER_NODE": "0"}, ["NPROC_PER_NODE=0"]),
        ({"NPROC_PER_NODE": "-1"}, ["NPROC_PER_NODE=-1"]),
        ({"NNODES": "1:4"}, ["NNODES=1:4"]),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "h"}, ["NODE_RANK=2", "0 to 1"]),
        ({"NNODES": "2"}, ["needs NODE_RANK", "needs MASTER_ADDR"]),
        ({"NPROC_PER_NODE": "x", "MASTER_PORT": "99999999"}, ["NPROC_PER_NODE=x", "MASTER_PORT=99999999"]),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "LOCAL_RANK": "0"}, ["RANK=2", "0 to 1"]),
        ({"SLURM_PROCID": "x", "SLURM_NTASKS": "2"}, ["SLURM_"]),
    ],
)
def test_variables_that_make_no_sense(env: dict, words: list, monkeypatch, capsys) -> None:
    with pytest.raises(UserError) as caught:
        launch.world_size_from_env(env)
    for word in words:
        assert word in str(caught.value)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert launch.run("sft", [], "nowhere:nothing") == 2
    assert words[0] in capsys.readouterr().err


def quiet(argv: list[str]) -> int | None:
    return int(argv[0]) if argv else None


def mistaken(argv: list[str]) -> None:
    raise UserErrors([UserError("one", "mend"), UserError("two")])


def defective(argv: list[str]) -> None:
    raise RuntimeError(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}")


def test_one_process_runs_here(monkeypatch, capsys) -> None:
    for name in ("NPROC_PER_NODE", "NNODES", "RANK"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    assert launch.run("sft", [], quiet) == 0
    assert launch.run("sft", ["3"], f"{__name__}:quiet") == 3
    assert launch.run("sft", [], mistaken) == 2
    assert capsys.readouterr().err == "error: one\n  remedy: mend\nerror: two\n"
    assert launch.run("sft", [], defective) == 1
    assert "RuntimeError: rank 0 of 1" in capsys.readouterr().err
    assert dict(os.environ) == before


def test_targets_are_found_by_name() -> None:
    assert name_of(quiet) == f"{__name__}:quiet"
    with pytest.raises(ValueError, match="cannot be imported"):
        name_of(lambda argv: 0)


def test_cores_are_shared_out(monkeypatch) -> None:
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert threads_per_process(1) == cores
    assert threads_per_process(10 * cores) == 1


def ended(reports: list, exits: list, capsys) -> tuple[int, str]:
    code = report.print_failure(reports, exits)
    return code, capsys.readouterr().err


def test_one_message_for_all_ranks(capsys) -> None:
    same = [report.Report(rank, "user", ["bad row"], time=rank) for rank in (0, 1)]
    exits = [report.Exit(rank, 2, 10 + rank, 1) for rank in (0, 1)]
    assert ended(same, exits, capsys) == (2, "error: bad row\n")
    other = [same[0], report.Report(1, "user", ["full disk"], time=1)]
    assert ended(other, exits, capsys) == (2, "error (rank 0): bad row\nerror (rank 1): full disk\n")


def test_the_cause_and_not_the_consequence(capsys) -> None:
    lost = report.Report(0, "defect", trace="Traceback\nConnection closed by peer", time=100.5)
    killed = report.Exit(1, -signal.SIGKILL, 11, 100)
    code, text = ended([lost], [report.Exit(0, 1, 10, 100), killed], capsys)
    assert code == 137 and "rank 1 (pid 11) was killed by signal 9 (SIGKILL)" in text
    assert "closed by peer" not in text
    # what did not end in time is killed by the launcher itself, much later than the first failure
    defect = report.Report(0, "defect", trace="Traceback\nboom", time=100.5)
    code, text = ended([defect], [report.Exit(0, 1, 10, 100), report.Exit(1, -9, 11, 120)], capsys)
    assert code == 1 and "boom" in text and "killed" not in text
    # a crash may be the consequence of an exception elsewhere: both are told
    code, text = ended([defect], [report.Exit(0, 1, 10, 100), report.Exit(1, -6, 11, 100)], capsys)
    assert code == 134 and "boom" in text and "SIGABRT" in text


def test_an_end_without_a_word(capsys) -> None:
    code, text = ended([], [report.Exit(1, 7, 11, 100), report.Exit(0, -15, 10, 100)], capsys)
    assert code == 7 and "rank 1 (pid 11) left with exit code 7" in text
    code, text = ended([], [report.Exit(1, -15, 11, 100), report.Exit(0, -15, 10, 100)], capsys)
    assert code == 143 and "rank 1 (pid 11) was killed by signal 15" in text


def test_reports_survive_the_way(tmp_path: Path) -> None:
    error = UserErrors([UserError("one", "mend"), UserError("two")])
    made = report.report_of(error, rank=3)
    report.write(made, tmp_path)
    assert report.read_all(tmp_path) == [made]
    assert made.messages == ["one\n  remedy: mend", "two"]
