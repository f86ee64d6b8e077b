"""Initialization of A and B as in peft: drawn whole for each HF module, so that it is the same in every layout."""

import math
import zlib

import torch
from torch import Tensor

from mcore_swift.errors import UserError
from mcore_swift.tuners.parts import Part
from mcore_swift.tuners.settings import LoraSettings


def draw(part: Part, rank: int, settings: LoraSettings) -> tuple[Tensor, Tensor]:
    """This rank's columns of A `[rank, columns]` and rows of B `[rows of the layer, rank]`; B A is zero.

    'true': A as torch draws a Linear's weight, Kaiming uniform with a = sqrt(5), which is U(-1/sqrt(in), 1/sqrt(in)).
    'gaussian': normal with deviation 1 / rank. B is zero with both.
    'orthogonal': A and B are random combinations of the even and odd rows of an orthogonal matrix, divided by 10.
    Raises UserError for an odd rank with 'orthogonal'.
    """
    rows, columns = part.shape
    generator = torch.Generator().manual_seed(zlib.crc32(f"{settings.seed} {part.module}.lora_A".encode()))
    up = torch.zeros(part.num_rows, rank)
    if settings.init == "gaussian":
        down = torch.empty(rank, columns).normal_(0.0, 1 / rank, generator=generator)
    elif settings.init == "orthogonal":
        if rank % 2:
            raise UserError(
                f"--init_weights orthogonal needs an even rank; it is {rank} for {part.module}",
                "use an even --lora_rank",
            )
        turn, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator))
        down = (torch.randn(columns, rank // 2, generator=generator) @ turn[0::2]).t() / 10
        whole = torch.randn(rows, rank // 2, generator=generator) @ turn[1::2] / 10
        if part.rows:
            held = torch.cat([whole[start:stop] for start, stop in part.rows])
            up[: len(held)] = held
    else:
        bound = 1 / math.sqrt(columns)
        down = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
    return down[:, slice(*part.columns)].contiguous(), up
