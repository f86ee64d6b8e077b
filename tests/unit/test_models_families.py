"""Every family of the parity grid, without processes: names and shapes of its weights, how a fresh model starts."""

import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

from parity_models import SIZES, VARIANTS, config_class  # noqa: E402

from mcore_swift.models.catalog import FEATURES, SUPPORTED_ARCHITECTURES  # noqa: E402
from mcore_swift.models.family import family_of  # noqa: E402
from mcore_swift.models.initialization import draw  # noqa: E402
from mcore_swift.models.rules import Norm  # noqa: E402


def hf_config(variant: str):
    architecture, changes = VARIANTS[variant]
    config = config_class(architecture)(**(SIZES | changes))
    config.architectures = [f"{architecture}ForCausalLM"]
    return config


def layer_of(name: str) -> int:
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_table_names_exactly_the_tensors_of_transformers_model_and_starts_them_alike(variant, tmp_path):
    config = hf_config(variant)
    table = family_of(config).rules(config)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")  # a checkpoint may name them otherwise than the model
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    # transformers has no multi-token layers: what is behind the last layer is compared by the parity grid
    behind = {name for name in table.by_hf if layer_of(name) >= config.num_hidden_layers}
    assert set(table.by_hf) - behind == set(shapes)
    for rule in table.rules:
        if behind.intersection(rule.hf):
            continue
        assert rule.hf_shapes(rule.shape(shapes)) == {name: shapes[name] for name in rule.hf}
        for name in rule.hf:
            fresh = draw(rule, name, shapes[name], 0.02, 1)
            if variant == "nemotron" and isinstance(rule, Norm):
                assert not fresh.any()  # transformers starts them at 1, as if it did not add another 1
            elif tensors[name].std() == 0:  # norm weights and biases, which start at a constant
                assert torch.equal(fresh, tensors[name]), name
            elif not name.endswith(
                "router.bias"
            ):  # GPT-OSS's, which transformers draws: an even start is ours
                assert fresh.std() > 0, name


def test_every_family_says_what_it_has():
    assert set(SUPPORTED_ARCHITECTURES.values()) == set(FEATURES)
