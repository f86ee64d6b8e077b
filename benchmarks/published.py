"""Published training throughput: what was run, the stated speed, and the source."""

from dataclasses import dataclass
from typing import Any

_LLAMA = {"architectures": ["LlamaForCausalLM"], "num_key_value_heads": 8, "vocab_size": 128256}
_QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 128, "num_key_value_heads": 4, "vocab_size": 151936,
    "num_experts": 128, "num_experts_per_tok": 8,
}  # fmt: skip

MODELS: dict[str, dict[str, Any]] = {
    "Llama-3 8B": _LLAMA
    | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32
    },
    "Llama-3 70B": _LLAMA
    | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64
    },
    "Llama-3.1 405B": _LLAMA
    | {
        "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
    },
    "Mixtral 8x7B": {
        "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "Qwen3 30B-A3B": _QWEN
    | {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
        "moe_intermediate_size": 768,
    },
    "Qwen3 235B-A22B": _QWEN
    | {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94, "num_attention_heads": 64,
        "moe_intermediate_size": 1536,
    },
    "DeepSeek-V3": {
        "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168, "intermediate_size": 18432,
        "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280,
        "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "first_k_dense_replace": 3, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128,
    },
    "GPT-OSS 120B": {
        "architectures": ["GptOssForCausalLM"], "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "vocab_size": 201088, "num_local_experts": 128, "num_experts_per_tok": 4,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """One row. precision: bf16, or fp8 (linear layers). vpp None: not interleaved.

    tokens: per second and GPU; if a source states only TFLOP/s, they are divided by its own count of FLOPs per token
    (causal half of attention), see `tflops`. has_fsdp: weights were sharded too, which the estimate does not model.
    """

    model: str
    gpu: str
    gpus: int
    precision: str
    global_batch: int
    micro_batch: int
    length: int
    tp: int
    pp: int
    cp: int
    vpp: int | None
    ep: int
    tokens: float | None
    source: str
    tflops: float | None = None
    has_fsdp: bool = False
    has_mtp: bool = False


_BRIDGE = "Megatron-Bridge docs/performance-summary"
_2509, _2511, _2602 = (f"{_BRIDGE}-archive.md, {release}" for release in ("25.09", "25.11", "26.02"))
_2606 = f"{_BRIDGE}.md, 26.06"
_2604 = f"{_BRIDGE}.md, 26.04"
_NEMO = "NeMo docs/source/performance/performance_summary.md, 24.07"
_MOE = "Megatron-LM megatron/core/transformer/moe/README.md, core 0.8 layout, 468 TFLOP/s of core 0.9"
_TITAN = "torchtitan benchmarks/llama3_h100_202412_torchtitan.md, with compile"

ROWS = [
    Published("Llama-3 8B", "h100", 8, "bf16", 16, 2, 8192, 1, 1, 1, None, 1, 6667, _TITAN, has_fsdp=True),
    Published("Mixtral 8x7B", "h100", 64, "bf16", 256, 1, 4096, 1, 4, 1, 8, 8, None, _MOE, tflops=468),
    Published("GPT-OSS 120B", "h100", 64, "bf16", 1280, 1, 4096, 1, 4, 1, None, 8, 5993, _2602),
    Published("GPT-OSS 120B", "h100", 64, "bf16", 512, 4, 4096, 1, 4, 1, None, 8, 5630, _2511),
    Published("GPT-OSS 120B", "gb200", 64, "bf16", 1280, 4, 4096, 1, 1, 1, None, 64, 15784, _2602),
    Published("GPT-OSS 120B", "gb300", 64, "bf16", 1280, 2, 8192, 1, 1, 1, None, 64, 18347, _2511),
    Published("GPT-OSS 120B", "b200", 64, "bf16", 1280, 4, 4096, 1, 1, 1, None, 64, 8047, _2602),
    Published("Qwen3 235B-A22B", "gb200", 256, "bf16", 8192, 1, 4096, 1, 8, 1, 3, 32, 4916, _2511),
    Published("Qwen3 235B-A22B", "gb300", 256, "bf16", 8192, 2, 4096, 1, 4, 1, 12, 16, 6131, _2511),
    Published("DeepSeek-V3", "gb200", 256, "bf16", 4096, 1, 4096, 1, 4, 1, 4, 64, 3139, _2511),
    Published("DeepSeek-V3", "gb300", 256, "bf16", 4096, 1, 4096, 1, 2, 1, 4, 32, 3848, _2511),
    Published("Llama-3 8B", "h100", 8, "fp8", 128, 1, 8192, 1, 1, 1, None, 1, 14451, _2511, has_fsdp=True),
    Published("Llama-3 8B", "h100", 8, "fp8", 128, 1, 8192, 1, 1, 2, None, 1, 12036, _NEMO),
    Published("Llama-3 70B", "h100", 64, "fp8", 128, 1, 8192, 4, 4, 2, 5, 1, 1533, _NEMO),
    Published("Llama-3 70B", "h100", 64, "fp8", 256, 1, 8192, 4, 8, 1, 5, 1, 1664, _2604),
    Published("Llama-3.1 405B", "h100", 1024, "fp8", 512, 1, 8192, 8, 8, 2, 8, 1, 292, _2511),
    Published("Llama-3.1 405B", "h100", 1024, "fp8", 1536, 1, 8192, 8, 8, 2, 8, 1, 326, _2606),
    Published("Llama-3 8B", "gb200", 8, "fp8", 128, 2, 8192, 1, 1, 1, None, 1, 31508, _2511),
    Published("Llama-3.1 405B", "gb200", 256, "fp8", 1536, 1, 8192, 4, 16, 1, 4, 1, 813, _2511),
    Published("Qwen3 30B-A3B", "h100", 16, "fp8", 1024, 1, 4096, 1, 1, 1, None, 16, 8826, _2606),
    Published("Qwen3 30B-A3B", "h100", 16, "fp8", 1024, 1, 4096, 1, 2, 1, 12, 8, 5113, _2602),
    Published("Qwen3 235B-A22B", "h100", 256, "fp8", 8192, 1, 4096, 2, 8, 1, 4, 32, 1712, _2604),
    Published("DeepSeek-V3", "h100", 1024, "fp8", 8192, 1, 4096, 2, 8, 1, 4, 64, 1297, _2509, has_mtp=True),
]
