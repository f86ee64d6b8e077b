"""Multi-token layers in a few plain torch lines around transformers' decoder layer, which itself leaves them out."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

FACTOR = 0.1
"""Weight of their mean loss beside that of the next token: the default of --mtp_loss_scaling_factor."""


class Depth(nn.Module):
    """arXiv:2412.19437, equations 21 to 23, with the names of DeepSeek-V3's checkpoint."""

    def __init__(self, model: Any, number: int) -> None:
        super().__init__()
        config, last = model.config, model.model.layers[-1]
        norm = type(last.input_layernorm)
        self.enorm, self.hnorm = (
            norm(config.hidden_size, config.rms_norm_eps),
            norm(config.hidden_size, config.rms_norm_eps),
        )
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layer = type(last)(config, number)
        self.norm = norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, model: Any, hidden: Tensor, ids: Tensor) -> Tensor:
        """hidden `[1, s, h]` of the depth before and the ids of the tokens one further on -> hidden."""
        embedded = model.model.embed_tokens(ids)
        x = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))
        s = ids.size(1)
        mask = torch.full((s, s), float("-inf")).triu(1)[None, None]
        position_embeddings = model.model.rotary_emb(x, torch.arange(s)[None])
        x = self.layer(x, attention_mask=mask, position_embeddings=position_embeddings)
        return self.norm(x[0] if isinstance(x, tuple) else x)

    def named(self, prefix: str) -> dict[str, Tensor]:
        """Views of the weights under the names of a checkpoint."""
        found = {}
        for name, tensor in self.state_dict().items():
            if name.startswith("norm."):
                name = f"shared_head.{name}"
            name = f"{prefix}.{name.removeprefix('layer.')}"
            if name.endswith(".experts.gate_up_proj"):
                for e, both in enumerate(tensor):
                    for part, matrix in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True):
                        found[f"{name.removesuffix('gate_up_proj')}{e}.{part}.weight"] = matrix
            elif name.endswith(".experts.down_proj"):
                for e, matrix in enumerate(tensor):
                    found[f"{name.removesuffix('down_proj')}{e}.down_proj.weight"] = matrix
            else:
                found[name] = tensor
        return found


def multi_token_layers(model: Any) -> nn.ModuleList:
    config = model.config
    depths = getattr(config, "num_nextn_predict_layers", 0) or 0
    return nn.ModuleList([Depth(model, config.num_hidden_layers + k) for k in range(depths)])


def names_of(model: Any, depths: nn.ModuleList) -> dict[str, Tensor]:
    first = model.config.num_hidden_layers
    named: dict[str, Tensor] = {}
    for k, depth in enumerate(depths):
        named |= depth.named(f"model.layers.{first + k}")
    return named


def add_to_checkpoint(folder: Path, model: Any, depths: nn.ModuleList) -> None:
    """As DeepSeek-V3's checkpoint has them: with the embedding and the output layer once more in every layer."""
    if not depths:
        return
    file = folder / "model.safetensors"
    added = names_of(model, depths) | copies_of(model, depths)
    tensors = load_file(file) | {name: tensor.detach().clone() for name, tensor in added.items()}
    save_file(tensors, file, metadata={"format": "pt"})


def copies_of(model: Any, depths: nn.ModuleList) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for k in range(len(depths)):
        prefix = f"model.layers.{model.config.num_hidden_layers + k}"
        named[f"{prefix}.embed_tokens.weight"] = model.model.embed_tokens.weight
        named[f"{prefix}.shared_head.head.weight"] = model.lm_head.weight
    return named


def further_loss(model: Any, depths: nn.ModuleList, sample: Tensor, hidden: Tensor, prompt: int) -> Tensor:
    """Sum over the learnt tokens of a sample of what all depths lose, `[depths]`. hidden: `[1, s, h]`, normed."""
    sums = []
    for k, depth in enumerate(depths, start=1):
        ids = functional.pad(sample[k:], (0, k))[None]
        hidden = depth(model, hidden, ids)
        logits = model.lm_head(hidden)[0]
        first = max(prompt - 1 - k, 0)  # position t predicts token t + 1 + k
        sums.append(
            functional.cross_entropy(
                logits[first : len(sample) - 1 - k], sample[first + 1 + k :], reduction="sum"
            )
        )
    return torch.stack(sums)
