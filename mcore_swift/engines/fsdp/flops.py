"""FLOPs of a training step of a transformers model, for TFLOP/s and MFU in the log."""

from pathlib import Path
from typing import Any

from mcore_swift.engines.fsdp.quantized import number_of_values
from mcore_swift.errors import UserError
from mcore_swift.plan.flops import training_flops_of_sums
from mcore_swift.plan.preflight import read_shape
from mcore_swift.plan.shape import ModelShape


class TrainingFlops:
    """Counts by the model's shape where the planner knows its family, else by the number of its parameters."""

    def __init__(self, base: Any, model_dir: str | None, *, base_is_frozen: bool) -> None:
        """base: the transformers model. model_dir: the folder with its config.json; None if it has another depth."""
        self._shape = None if model_dir is None else _shape_of(model_dir)
        self._share = 2 / 3 if base_is_frozen else 1.0  # frozen weights have no gradients
        self._multiplied = _multiplied_parameters(base)
        config = base.config.get_text_config()
        self._per_pair = 12.0 * config.num_hidden_layers * config.hidden_size

    def of_step(self, tokens: float, squares: float) -> float:
        """FLOPs of forward and backward pass. squares: the sum of the squared sample lengths.

        For an unknown family 6 per parameter and token, and 12 * layers * hidden size for each pair of positions
        (arXiv:2204.02311, appendix B).
        """
        if self._shape is not None:
            return self._share * training_flops_of_sums(self._shape, tokens, squares)
        return self._share * (6.0 * self._multiplied * tokens + self._per_pair * squares)


def _shape_of(model_dir: str) -> ModelShape | None:
    try:
        return read_shape(Path(model_dir))
    except UserError:
        return None


def _multiplied_parameters(base: Any) -> int:
    """Parameters that take part in matrix products: all but an embedding table that is not the output layer too."""
    total = sum(number_of_values(parameter) for parameter in base.parameters())
    table, head = base.get_input_embeddings(), base.get_output_embeddings()
    is_tied = head is not None and head.weight is table.weight
    return total if is_tied else total - table.weight.numel()
