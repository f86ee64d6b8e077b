"""Runs that several test modules look at are made once."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import training_plan  # noqa: E402
from jobs import run_job  # noqa: E402
from tiny import make_tiny  # noqa: E402


@dataclass
class Trained:
    """folder: one output folder for each run of `training_plan`. results: run -> "" or why it failed."""

    folder: Path
    results: dict[str, str]

    def __getitem__(self, name: str) -> Path:
        """The output folder of a run. Fails the test if the run failed."""
        assert self.results[name] == "", f"{name}: {self.results[name]}"
        return self.folder / name


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    tiny = make_tiny(folder)
    results: dict[str, str] = {}
    for world_size in training_plan.WORLD_SIZES:
        job = folder / f"job-{world_size}"
        job.mkdir()
        (job / "plan.json").write_text(json.dumps(training_plan.plan(world_size, tiny, folder)))
        started = time.monotonic()
        results |= run_job(Path(__file__).with_name("train_job.py"), world_size, job)
        print(f"job of {world_size}: {time.monotonic() - started:.0f} s")
    return Trained(folder, results)
