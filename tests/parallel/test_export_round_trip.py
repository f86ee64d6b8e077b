"""Live models in many layouts: HF -> megatron-core -> HF is bit-identical, whatever cuts the model.

All cases of a world size run in one job (`export_worker.py`), since imports cost more than the cases; each is
then a test of its own.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("export_worker.py")
LIMIT_SECONDS = 600


def run_job(world_size: int, folder: Path) -> tuple[dict[str, str], str]:
    """Results by case, and what the processes printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world_size):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "PYTHONWARNINGS": "ignore",
        }
        log = (folder / f"log-{rank}").open("w")
        command = [sys.executable, str(WORKER), str(folder)]
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=LIMIT_SECONDS) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    logs = "\n".join((folder / f"log-{rank}").read_text()[-3000:] for rank in range(world_size))
    assert codes == [0] * world_size, logs
    return json.loads((folder / "results.json").read_text()), logs


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_case_in_every_layout(world_size, tmp_path):
    results, _ = run_job(world_size, tmp_path)
    kinds = {name.split()[0] for name in results}
    assert kinds == {"round-trip", "streamed", "each-once", "full-disk", "missing-tensor", "logits"}
    failed = {name: error for name, error in results.items() if error}
    assert not failed, f"{len(failed)} of {len(results)} cases failed:\n" + "\n".join(
        f"--- {name}\n{error}" for name, error in failed.items()
    )
