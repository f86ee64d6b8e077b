"""Live models in many layouts: HF -> megatron-core -> HF is bit-identical, whatever cuts the model.

All cases of a world size run in one job (`export_worker.py`).
"""

from pathlib import Path

import pytest
from jobs import assert_all_passed, run_job

WORKER = Path(__file__).with_name("export_worker.py")


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_case_in_every_layout(world_size, tmp_path):
    results = run_job(WORKER, world_size, tmp_path)
    kinds = {name.split()[0] for name in results}
    assert kinds == {"round-trip", "streamed", "each-once", "full-disk", "missing-tensor", "logits"}
    assert_all_passed(results)
