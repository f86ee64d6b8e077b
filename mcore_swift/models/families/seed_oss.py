"""Seed-OSS: Llama's layers with a bias on query, key and value (https://github.com/ByteDance-Seed/seed-oss)."""

from typing import Any

from mcore_swift.models.families.llama import Llama
from mcore_swift.models.family import HFConfig


class SeedOss(Llama):
    name = "seed_oss"

    def config(self, hf: HFConfig) -> dict[str, Any]:
        return super().config(hf) | {"hidden_dropout": hf.residual_dropout}

    def output_bias(self, hf: HFConfig) -> bool:
        return hf.attention_out_bias


FAMILY = SeedOss()
