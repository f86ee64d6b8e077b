"""DoRA (arXiv:2402.09353): each row of a weight has a trained magnitude, and a direction that the adapter changes.

W' = m / |W + s B A| * (W + s B A), row by row; the norm is a constant in the backward pass (section 4.3 of the paper).
"""

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def row_norms(weight: Tensor, down: Tensor, up: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """|W + B A| of each row, `[rows]`, in the dtype of W; 1 for rows of zeros, which occur only as padding.

    weight: W, or its columns on this rank, `[rows, columns]`. down: A `[rank, columns]`. up: B, scaled, `[rows, rank]`.
    group: the ranks with the other columns, if there are any; collective over them.
    W + B A is not materialized: |w + b A|^2 = |w|^2 + 2 b . (A w) + b (A A^T) b^T.
    """
    wide_up, wide_down = up.float(), down.float()
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
    crossed = (weight @ down.to(weight.dtype).t()).float()
    squares += ((2 * crossed + wide_up @ (wide_down @ wide_down.t())) * wide_up).sum(dim=1)
    if group is not None and group.size() > 1:
        dist.all_reduce(squares, group=group)
    norms = squares.clamp_(min=0).sqrt_()
    return norms.masked_fill_(norms == 0, 1).to(weight.dtype)
