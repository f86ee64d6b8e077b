"""Next-token prediction: supervised fine-tuning and pre-training."""

from typing import TYPE_CHECKING, ClassVar

from mcore_swift.objectives.base import Loss

if TYPE_CHECKING:
    from torch import Tensor

    from mcore_swift.data.batch import Batch


class NextToken:
    """Sum of loss_mask * token_nll over the tokens to learn; the count is the number of such tokens.

    A mask weight other than 1 scales its token's term, and the token still counts as one, as with ms-swift's
    loss_scale.
    """

    metrics: ClassVar[tuple[str, ...]] = ()

    def count(self, batch: "Batch") -> "Tensor":
        return (batch.loss_mask > 0).sum()

    def __call__(self, token_nll: "Tensor", batch: "Batch") -> Loss:
        return Loss((token_nll * batch.loss_mask).sum(), self.count(batch))
