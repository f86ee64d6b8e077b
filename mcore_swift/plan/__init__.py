"""Sizes and estimates in plain Python: nothing here imports torch or transformers.

A bad layout or a broken checkpoint folder is refused here, before any process is started.
"""

from .check import check_layout, nearest_layout, notices
from .count import active_parameters, parameters
from .flops import flops_per_token, forward_flops, training_flops
from .layout import Layout
from .peaks import peak_tflops
from .preflight import preflight, preflight_notices
from .shape import ModelShape, padded_vocab_size
from .stages import stage_layers

__all__ = [
    "Layout",
    "ModelShape",
    "active_parameters",
    "check_layout",
    "flops_per_token",
    "forward_flops",
    "nearest_layout",
    "notices",
    "padded_vocab_size",
    "parameters",
    "peak_tflops",
    "preflight",
    "preflight_notices",
    "stage_layers",
    "training_flops",
]
