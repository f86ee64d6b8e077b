"""Modules whose parameters have a shape but no memory yet."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


def _all(module: nn.Module, name: str) -> bool:
    return True


@contextmanager
def parameters_on_meta(which: Callable[[nn.Module, str], bool] = _all) -> Iterator[None]:
    """Modules made in this context get parameters on the meta device. Buffers are computed: no checkpoint holds them.

    which: whether this applies to (module, name of the parameter); the module may be only partly built.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta and which(module, name):
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def emptied(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of the same shape, dtype and attributes, without memory."""
    return _with_marks(parameter, nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad))


def given_memory(parameter: nn.Parameter, device: object) -> nn.Parameter:
    """A parameter like one on the meta device, with uninitialised memory."""
    data = parameter.detach().new_empty(parameter.shape, device=device)
    return _with_marks(parameter, nn.Parameter(data, parameter.requires_grad))


def _with_marks(parameter: nn.Parameter, new: nn.Parameter) -> nn.Parameter:
    new.__dict__.update(parameter.__dict__)  # attributes that megatron-core sets on parameters
    return new
