"""Where a live model and transformers part: the hidden states after each layer, side by side."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from converters.ranks import Ranks
from converters.verify import TOLERANCE, hf_model, mcore_logits
from mcore_swift.models.shards import unwrap


@dataclass(frozen=True)
class LayerError:
    """After layer `number` (0: what the embedding gives): the largest difference, and the largest value."""

    number: int
    max: float
    largest: float

    def differs(self, dtype: torch.dtype) -> bool:
        return not self.max <= TOLERANCE[dtype] * max(1.0, self.largest)  # NaN differs


@dataclass(frozen=True)
class LayerComparison:
    """The error after each layer, in order."""

    layers: tuple[LayerError, ...]
    dtype: torch.dtype

    @property
    def first(self) -> int | None:
        """Number of the first layer after which the models differ, from 1; 0 for the embedding; None if none does."""
        return next((layer.number for layer in self.layers if layer.differs(self.dtype)), None)

    @property
    def verdict(self) -> str:
        if self.first is None:
            return "all layers agree, so it is the final norm or the output layer that differs"
        if self.first == 0:
            return "the embedding differs already"
        return f"layer {self.first} of {self.layers[-1].number} is the first that differs"

    def lines(self) -> Iterator[str]:
        """A line for each layer."""
        for layer in self.layers:
            name = f"layer {layer.number}" if layer.number else "embedding"
            mark = "  <- first that differs" if layer.number == self.first else ""
            yield f"{name:10} largest difference {layer.max:9.3g}, largest value {layer.largest:9.3g}{mark}"


def compare_layers(
    chunks: Sequence[Any],
    vocab_size: int,
    hf_dir: str,
    token_rows: Tensor,
    dtype: torch.dtype,
    stored: torch.dtype | None = None,
) -> LayerComparison:
    """Compare the hidden states of the first row, layer by layer. Arguments as for `verify.compare_logits`.

    Collective; the same on all ranks. The first rank loads the transformers model.
    """
    ranks = Ranks()
    held = ranks.collect(_our_states(chunks, token_rows, vocab_size))

    def compare() -> LayerComparison:
        ours = {number: state for part in held for number, state in part.items()}
        theirs = _their_states(hf_dir, token_rows[0], dtype, stored)
        numbers = sorted(ours.keys() & theirs.keys())
        return LayerComparison(tuple(_error(n, ours[n], theirs[n]) for n in numbers), dtype)

    return ranks.gather(ranks.together(compare, where=ranks.is_first))[0]


def _error(number: int, ours: Tensor, theirs: Tensor) -> LayerError:
    return LayerError(number, (ours - theirs).abs().max().item(), theirs.abs().max().item())


def _our_states(chunks: Sequence[Any], token_rows: Tensor, vocab_size: int) -> dict[int, Tensor]:
    """Hidden states `[s, h]` fp32 of the first row after this stage's layers, on one rank of each stage.

    Collective over the model's ranks.
    """
    from megatron.core import parallel_state

    found: dict[int, Tensor] = {}
    layers = {layer.layer_number: layer for chunk in chunks for layer in unwrap(chunk).decoder.layers}
    parallel = unwrap(chunks[0]).config.sequence_parallel
    with _watched(layers, lambda number, state: found.setdefault(number, _whole_row(state, parallel))):
        mcore_logits(chunks, token_rows, vocab_size)
    speaks = (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    )
    return found if speaks else {}


def _whole_row(state: Tensor, sequence_parallel: bool) -> Tensor:
    """`[s / (tp cp), 1, h]` of this rank -> `[s, h]` on the CPU. Collective over tensor-parallel ranks."""
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    if sequence_parallel:
        state = gather_from_sequence_parallel_region(state, tensor_parallel_output_grad=False)
    return state[:, 0].float().cpu()


@torch.no_grad()
def _their_states(
    hf_dir: str, row: Tensor, dtype: torch.dtype, stored: torch.dtype | None
) -> dict[int, Tensor]:
    """transformers' hidden states `[s, h]` fp32 of one row `[s]`, after each layer."""
    model = hf_model(hf_dir, dtype, stored)
    found: dict[int, Tensor] = {}
    layers = dict(enumerate(model.base_model.layers, start=1))
    with _watched(layers, lambda number, state: found.setdefault(number, state[0].float())):
        model(input_ids=row[None])
    return found


@contextmanager
def _watched(layers: dict[int, nn.Module], record: Callable[[int, Tensor], Any]) -> Iterator[None]:
    """While inside, tell what each layer gives, and what the first one takes, under its number and 0."""

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        record(0, args[0] if args else kwargs["hidden_states"])

    def after(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            record(number, output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [layer.register_forward_hook(after(number)) for number, layer in layers.items()]
    if 1 in layers:
        handles.append(layers[1].register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
