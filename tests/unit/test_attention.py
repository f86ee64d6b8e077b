"""Core attention against softmax(q k^T) v written out in fp64, and how much memory it takes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mcore_swift.models.attention import blockwise, kernels
from mcore_swift.models.attention.blockwise import Form
from mcore_swift.models.attention.kernels import attend

FEATURES = {
    "plain": {},
    "window": {"window": 5},
    "window of one": {"window": 1},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "all": {"window": 9, "softcap": 3.0, "sinks": True},
}
SHAPES = {  # heads, groups, queries, keys, dk, dv
    "square": (4, 4, 37, 37, 8, 8),
    "grouped": (6, 2, 33, 33, 8, 8),
    "last queries": (4, 2, 14, 40, 8, 8),  # a context-parallel chunk
    "narrow values": (4, 4, 21, 30, 12, 8),  # multi-latent attention
    "wide values": (4, 2, 21, 30, 8, 12),
    "one query": (4, 2, 1, 30, 8, 8),
}


def dense(query, key, value, form: Form, sinks=None):
    """The definition, with every matrix there is."""
    repeat, n, m = query.size(1) // key.size(1), query.size(2), key.size(2)
    key, value = (tensor.repeat_interleave(repeat, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) * form.scale
    if form.softcap is not None:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    behind = torch.arange(m - n, m)[:, None] - torch.arange(m)[None, :]
    seen = (behind >= 0) & (behind < (form.window or m))
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), dim=-1)
    return scores.softmax(-1)[..., :m] @ value


def tensors(shape, sinks: bool, dtype=torch.float64, batch=2):
    heads, groups, n, m, dk, dv = shape
    torch.manual_seed(n * m)
    sizes = [(batch, heads, n, dk), (batch, groups, m, dk), (batch, groups, m, dv)] + [(heads,)] * sinks
    return [torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes]


def with_gradients(attention, inputs, form):
    out = attention(*inputs[:3], form, *inputs[3:])
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad((out * weight).sum(), inputs)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("features", FEATURES)
def test_output_and_gradients_are_the_definitions(features, shape, monkeypatch):
    # Blocks small enough that there are several, and that do not divide the lengths.
    for module, name, size in (
        (blockwise, "QUERY_BLOCK", 8),
        (blockwise, "KEY_BLOCK", 12),
        (kernels, "BLOCK", 8),
    ):
        monkeypatch.setattr(module, name, size)
    traits = dict(FEATURES[features])
    inputs = tensors(SHAPES[shape], traits.pop("sinks", False))
    form = Form(scale=0.4, **traits)
    expected = with_gradients(dense, inputs, form)
    for attention in (attend, blockwise.blockwise_attention):
        for actual, right in zip(with_gradients(attention, inputs, form), expected, strict=True):
            torch.testing.assert_close(actual, right, atol=1e-12, rtol=1e-10)  # fp64 sums of 40 terms


def test_in_bfloat16_it_errs_by_the_rounding_of_its_result():
    shape = (4, 2, 64, 64, 16, 16)
    inputs = [tensor.detach().bfloat16() for tensor in tensors(shape, sinks=True)]
    form = Form(scale=0.25, softcap=5.0, window=40)
    actual = blockwise.blockwise_attention(*inputs[:3], form, inputs[3])
    expected = dense(*(tensor.double() for tensor in inputs[:3]), form, inputs[3].double())
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), expected, atol=0, rtol=2**-8)  # half a unit in the last place


def test_dropout_drops_its_share_and_the_same_weights_in_the_backward_pass():
    """With values that are the identity, the output is the weights themselves."""
    query, key, _ = (t.detach() for t in tensors((2, 2, 64, 64, 8, 8), False, batch=16))
    value = torch.eye(64, dtype=torch.float64).expand(16, 2, 64, 64).clone().requires_grad_()
    form = Form(scale=0.3, dropout=0.25)
    torch.manual_seed(0)
    out = attend(query, key, value, form)
    plain = attend(query, key, value, Form(scale=0.3))
    seen = plain > 0
    dropped = (out == 0) & seen
    # 66560 draws: four standard deviations of their mean are 0.007
    assert abs(dropped.sum() / seen.sum() - 0.25) < 0.007
    torch.testing.assert_close(out[~dropped], plain[~dropped] / 0.75)
    torch.manual_seed(0)
    assert torch.equal(attend(query, key, value, form), out)
    assert not torch.equal(attend(query, key, value, form), out)
    # d out[i, j] / d value[j, j] is the dropped weight
    (gradient,) = torch.autograd.grad(out.sum(), value)
    torch.testing.assert_close(gradient[..., 0], out.sum(2))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize(
    "features",
    [
        {},
        {"window": 200},
        {"softcap": 3.0},
        {"sinks": True},
        {"dropout": 0.1},
        {"window": 200, "softcap": 3.0, "sinks": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk", [1, 4])
def test_memory_does_not_grow_with_the_square_of_the_length(features, chunk, monkeypatch):
    """Twice the length, some twice the largest tensor, forward and backward; also for the last chunk of a row."""
    for module, name in ((blockwise, "QUERY_BLOCK"), (blockwise, "KEY_BLOCK"), (kernels, "BLOCK")):
        monkeypatch.setattr(module, name, 64)
    features = dict(features)
    sinks = features.pop("sinks", False)
    largest = []
    for length in (768, 1536):
        inputs = tensors((2, 1, length // chunk, length, 8, 4), sinks, torch.float32, batch=1)
        with Largest() as watched:
            out = attend(*inputs[:3], Form(scale=0.3, **features), *inputs[3:])
            out.sum().backward()
        largest.append(watched.elements)
    assert largest[1] <= 2.5 * largest[0]  # four times would be the square
    assert largest[1] < 1536**2 / chunk / 2, "and nothing that is the matrix or its mask"
