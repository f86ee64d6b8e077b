"""Experts: the router's losses and loads, and both dispatchers, equal a plain computation in every layout."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from experts_reference import make_bias_reference, make_expert_reference  # noqa: E402
from jobs import assert_all_passed, run_job  # noqa: E402
from parity_models import make_reference  # noqa: E402


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    make_expert_reference("qwen3-moe", folder)
    (folder / "bias").mkdir()
    make_bias_reference(folder / "bias")
    for variant in ("qwen2-moe", "glm4-moe"):
        (folder / variant).mkdir()
        make_reference(variant, folder / variant)
    return folder


@pytest.mark.parametrize("world_size", [1, 2])
def test_losses_loads_and_dispatchers(reference, world_size):
    results = run_job(Path(__file__).with_name("experts_job.py"), world_size, reference)
    assert len(results) >= 4
    assert_all_passed(results)
