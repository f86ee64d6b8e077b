"""The parity grid: loss, logits and gradients equal transformers' in every family and layout, packed and unpacked."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from jobs import assert_all_passed, run_job  # noqa: E402
from parity_models import VARIANTS, make_reference  # noqa: E402


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    for variant in VARIANTS:
        (folder / variant).mkdir()
        make_reference(variant, folder / variant)
    return folder


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_model_does_not_depend_on_the_layout(references, world_size):
    results = run_job(Path(__file__).with_name("parity_job.py"), world_size, references)
    assert len(results) >= 2 * len(VARIANTS)
    assert_all_passed(results)
