"""Multi-token layers: what they look at, and whether a checkpoint has them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from mcore_swift.errors import UserError
from mcore_swift.models.reading import read_model
from mcore_swift.models.targets import look_ahead


def test_nothing_is_looked_at_beyond_the_end_of_a_sample():
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]])  # samples 1..4 and 5..7, one token of padding
    labels = torch.tensor([[2, 3, 4, 0, 6, 7, 0, 0]])
    mask = torch.tensor([[0.0, 1, 0.5, 0, 1, 1, 0, 0]])
    one, two = look_ahead(ids, labels, mask, torch.tensor([0, 4, 7, 8], dtype=torch.int32), depth=2)
    assert one.input_ids.tolist() == [[2, 3, 4, 0, 6, 7, 0, 0]]
    assert one.labels.tolist() == [[3, 4, 0, 0, 7, 0, 0, 0]]
    assert one.loss_mask.tolist() == [[1, 0.5, 0, 0, 1, 0, 0, 0]]
    assert one.positions.tolist() == [0, 1, 4]
    assert two.input_ids.tolist() == [[3, 4, 0, 0, 7, 0, 0, 0]]
    assert two.labels.tolist() == [[4, 0, 0, 0, 0, 0, 0, 0]]
    assert two.positions.tolist() == [0]


def test_rows_of_one_sample_each_do_not_see_one_another():
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    (one,) = look_ahead(ids, ids, torch.ones(2, 3), None, depth=1)
    assert one.input_ids.tolist() == [[2, 3, 0], [5, 6, 0]]
    assert one.positions.tolist() == [0, 1, 3, 4]


def checkpoint(folder, *names):
    """A folder with a DeepSeek-V3 config of two layers and one multi-token layer, and tensors of these names."""
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_hidden_layers": 2,
        "first_k_dense_replace": 3,
        "num_nextn_predict_layers": 1,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if names:
        save_file({name: torch.zeros(1) for name in names}, folder / "model.safetensors")
    return str(folder)


def test_multi_token_layers_are_left_out_where_the_checkpoint_lacks_them(tmp_path, caplog):
    plan = read_model(checkpoint(tmp_path / "lacks", "model.norm.weight"))
    assert plan.multi_token_layers == 0
    assert plan.table.config == {"num_nextn_predict_layers": 0}
    assert "lacks" in caplog.text
    assert not [key for key in plan.table.by_mcore if key.startswith("mtp.")]
    with pytest.raises(UserError, match="--mtp_num_layers 1: .*holds no weights of multi-token layers"):
        read_model(str(tmp_path / "lacks"), 1)


def test_multi_token_layers_can_be_left_out(tmp_path):
    folder = checkpoint(tmp_path / "has", "model.norm.weight", "model.layers.2.enorm.weight")
    assert read_model(folder).table.by_hf["model.layers.2.enorm.weight"].mcore == "mtp.layers.0.enorm.weight"
    without = read_model(folder, 0)
    assert without.multi_token_layers == 0
    assert without.table.unclaimed_hf(["model.layers.2.enorm.weight"]) == []
    with pytest.raises(UserError, match="--mtp_num_layers 2.*1 multi-token"):
        read_model(folder, 2)


def test_a_config_without_weights_is_taken_at_its_word(tmp_path):
    assert read_model(checkpoint(tmp_path / "bare")).multi_token_layers == 1
