"""torch's flex_attention on CUDA, for what no other kernel of torch can express: soft-capping, sinks, windows.

It skips fully masked blocks. Uncompiled, it would build whole score matrices, so it is used only where Triton is there.
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mcore_swift.models.attention.blockwise import Form
from mcore_swift.models.segments import Segments


@cache
def have_flex() -> bool:
    """Whether compiled flex_attention can run here: with CUDA and Triton."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def flex_pieces(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, form: Form, sinks: Tensor | None
) -> Tensor:
    """Each token of a rank attends to its segment: query `[b, heads, s / N, dk]` -> `[b, heads, s / N, dv]`.

    key `[b, groups, s, dk]`, value `[b, groups, s, dv]`: of the whole row. Does not support dropout.
    """
    attention, make_mask = _kernels()
    out, aux = attention(
        query,
        key,
        value,
        score_mod=_capped(form.softcap) if form.softcap is not None else None,
        block_mask=_block_mask(segments, form.window, make_mask),
        scale=form.scale,
        enable_gqa=query.size(1) != key.size(1),
        return_aux=_lse(),
    )
    if sinks is None:
        return out
    # A sink scales down the weights to the share of the softmax that it leaves.
    left = torch.sigmoid(aux.lse - sinks.float()[:, None])
    return out * left[..., None].to(out.dtype)


def _capped(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def _block_mask(segments: Segments, window: int | None, make_mask: Callable[..., Any]) -> Any:
    """Which blocks of the row's keys the rank's queries see; built once for all layers with the same window."""
    if window not in segments.masks:
        place, number = segments.held, segments.numbers
        reach = segments.longest if window is None else window

        def seen(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            behind = place[query] - key
            return (behind >= 0) & (behind < reach) & (number[place[query]] == number[key])

        segments.masks[window] = make_mask(
            seen, None, None, place.numel(), number.numel(), device=place.device
        )
    return segments.masks[window]


@cache
def _kernels() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # create_block_mask too: uncompiled, it builds the whole boolean matrix first.
    return torch.compile(flex_attention), torch.compile(create_block_mask)


def _lse() -> Any:
    from torch.nn.attention.flex_attention import AuxRequest

    return AuxRequest(lse=True)
