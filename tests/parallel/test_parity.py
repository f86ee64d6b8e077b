"""The parity grid: loss, logits and gradients equal transformers' in every family and layout, packed and unpacked.

The largest error of a logit in each row makes the table of docs/parity.md. `UPDATE_DOCS=1 make test
PYTEST_ARGS=tests/parallel/test_parity.py` writes it anew.
"""

import json
import os
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from jobs import assert_all_passed, run_job  # noqa: E402
from parity_models import SIX_LAYERS, VARIANTS, make_reference  # noqa: E402
from parity_table import missing_rows, render  # noqa: E402

from mcore_swift.models.catalog import SUPPORTED_ARCHITECTURES, proven  # noqa: E402

TABLE = Path(__file__).parents[2] / "docs" / "parity.md"
WORLD_SIZES = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    for variant in VARIANTS:
        (folder / variant).mkdir()
        make_reference(variant, folder / variant)
    for name, variant in SIX_LAYERS.items():
        (folder / name).mkdir()
        make_reference(variant, folder / name, num_hidden_layers=6)
    return folder


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, float]]:
    """Variant -> layout -> largest error of a logit, filled by the tests below as they run."""
    return {}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_model_does_not_depend_on_the_layout(references, measured, world_size):
    results = run_job(Path(__file__).with_name("parity_job.py"), world_size, references)
    assert_all_passed(results)
    for variant, errors in json.loads((references / "errors.json").read_text()).items():
        measured.setdefault(variant, {}).update(errors)
    assert world_size > 1 or set(measured) == set(VARIANTS)


def test_the_table_in_the_docs_has_every_row(measured):
    if any(len(measured.get(variant, {})) < 3 for variant in VARIANTS):
        pytest.skip("not all world sizes were run")
    if os.environ.get("UPDATE_DOCS"):
        TABLE.write_text(render(measured), encoding="utf-8")
    missing = missing_rows(TABLE.read_text(encoding="utf-8"), measured)
    assert not missing, f"docs/parity.md does not show {missing}; UPDATE_DOCS=1 writes it"


def test_list_models_claims_what_was_measured(measured):
    if any(len(measured.get(variant, {})) < 3 for variant in VARIANTS):
        pytest.skip("not all world sizes were run")
    axes: dict[str, set[str]] = {}
    for variant, row in measured.items():
        family = SUPPORTED_ARCHITECTURES[f"{VARIANTS[variant][0]}ForCausalLM"]
        found = (re.fullmatch("([A-Z]+?)([0-9]*)", part).groups() for name in row for part in name.split("·"))
        axes.setdefault(family, set()).update(axis for axis, size in found if size != "1")
    unproven = {family: set(proven(family)) - axes.get(family, set()) for family in axes}
    assert not any(unproven.values()), unproven


def test_every_architecture_has_a_row():
    rows = {f"{architecture}ForCausalLM" for architecture, _ in VARIANTS.values()}
    assert set(SUPPORTED_ARCHITECTURES) <= rows
