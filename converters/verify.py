"""Comparing the logits of a live model with those of transformers on the same checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from converters.dequantize import DTYPE as DEQUANTIZED
from converters.ranks import Ranks
from mcore_swift.errors import UserError

ROW_LENGTH = 48
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest allowed difference of a logit, relative to the largest logit (or to 1, if that is larger).

fp32: the order of summation differs between layouts and implementations; this gives a few 1e-6 on small models and
grows with depth, while a wrong or swapped weight changes logits by their own magnitude. bf16 has 8 bits of mantissa
(4e-3), of which a deep model loses some.
"""


@dataclass(frozen=True)
class Comparison:
    """Difference between the logits of a live model and transformers'.

    max, mean: absolute differences. same_best: fraction of positions where both have the same most likely token.
    largest: the largest absolute logit of transformers. dtype: in which both were computed.
    """

    max: float
    mean: float
    largest: float
    same_best: float
    dtype: torch.dtype

    @property
    def allowed(self) -> float:
        return TOLERANCE[self.dtype] * max(1.0, self.largest)

    @property
    def passes(self) -> bool:
        return self.max <= self.allowed  # False for NaN

    def __str__(self) -> str:
        return (
            f"logits in {str(self.dtype).removeprefix('torch.')}: largest difference {self.max:.3g}"
            f" (allowed {self.allowed:.3g}), mean {self.mean:.3g}, largest logit {self.largest:.3g},"
            f" same most likely token at {100 * self.same_best:.1f} % of positions"
        )


def fixed_rows(vocab_size: int, rows: int, length: int = ROW_LENGTH, seed: int = 42) -> Tensor:
    """Random token ids `[rows, length]`, reproducible from the arguments."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (rows, length), generator=generator)


def mcore_logits(chunks: Sequence[Any], token_rows: Tensor, vocab_size: int) -> Tensor | None:
    """Logits `[rows, s, vocab_size]` fp32 on CPU, on the ranks of the last pipeline stage; None elsewhere.

    token_rows: `[rows, s]`, rows a multiple of the number of pipeline stages; every data-parallel rank computes
    all of them. Collective over the model's ranks.
    """
    from mcore_swift.accelerator import get_accelerator
    from mcore_swift.data.batch import Batch
    from mcore_swift.engines.megatron.forward_backward import run_logits, to_device

    microbatches = []
    for row in token_rows[:, None]:
        size = row.shape[1]
        batch = Batch(
            input_ids=row,
            labels=torch.zeros_like(row),
            loss_mask=torch.zeros(row.shape),
            position_ids=torch.arange(size)[None],
            cu_seqlens=None,
            max_seqlen=None,
            num_samples=1,
            num_tokens=size,
        )
        microbatches.append(to_device(batch, get_accelerator().device, thd=False))
    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    logits = run_logits(list(chunks), microbatches, vocab_size)
    for chunk, mode in zip(chunks, training, strict=True):
        chunk.train(mode)
    return torch.cat([part.float().cpu() for part in logits]) if logits else None


def hf_model(hf_dir: str, dtype: torch.dtype, stored: torch.dtype | None = None) -> Any:
    """The transformers model of a checkpoint in `dtype`, on CPU, in evaluation mode; dequantized if quantized.

    stored: dtype to which the weights were rounded when they were converted; None: each its own.
    Raises UserError if transformers needs a package that is missing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(hf_dir)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        # otherwise, on a machine with a GPU, transformers would keep it quantized for GPU kernels
        config.quantization_config = dict(quantization) | {"dequantize": True}
        stored = stored or DEQUANTIZED
    try:
        model = AutoModelForCausalLM.from_pretrained(hf_dir, config=config, dtype=stored or dtype)
        return model.to(dtype).eval()
    except ImportError as error:
        raise UserError(
            f"transformers cannot load {hf_dir} to compare with: {error}",
            remedy="install what it names, or leave out --test_convert_precision",
        ) from None


@torch.no_grad()
def hf_logits(
    hf_dir: str, token_rows: Tensor, dtype: torch.dtype, stored: torch.dtype | None = None
) -> Tensor:
    """transformers' logits `[rows, s, vocab_size]` fp32 of a checkpoint, as `hf_model` loads it."""
    model = hf_model(hf_dir, dtype, stored)
    return torch.cat([model(input_ids=row[None]).logits.float() for row in token_rows])


def compare_logits(
    chunks: Sequence[Any],
    vocab_size: int,
    hf_dir: str,
    token_rows: Tensor,
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype | None = None,
) -> Comparison:
    """Compare a live model, built in `dtype`, with transformers on `hf_dir`. Collective; the same on all ranks.

    stored: see `hf_model`.
    One rank loads the transformers model, whole and on the CPU.
    """
    from megatron.core import parallel_state

    ours = mcore_logits(chunks, token_rows, vocab_size)
    speaks = (
        ours is not None
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    )
    ranks = Ranks()

    def compare() -> Comparison:
        return _compare(ours, hf_logits(hf_dir, token_rows, dtype, stored), dtype)

    found = ranks.together(compare, where=speaks)
    return next(result for result in ranks.gather(found) if result is not None)


def require_equal(comparison: Comparison, what: str, where: str = "") -> None:
    """Raise UserError if the models differ by more than rounding explains. where: the first difference, if known."""
    if not comparison.passes:
        raise UserError(
            f"{what} does not compute what transformers computes: {comparison}{where and f'; {where}'}",
            remedy="do not use the converted checkpoint; please report this with the model's config.json",
        )


def _compare(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> Comparison:
    difference = (ours - theirs).abs()
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    return Comparison(
        difference.max().item(), difference.mean().item(), theirs.abs().max().item(), same.item(), dtype
    )
