"""Initial values, shard by shard: no rank ever holds a whole parameter it does not own."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from gptdist.model import initial_values

BUFFER_VALUES = 1 << 22  # values drawn at a time: 16 MB


@torch.no_grad()
def fill_initial_values(model: nn.Module, *, seed: int) -> None:
    """Fill every parameter, plain or DTensor, with the values of model.initial_values, in bounded memory."""
    n_layers = len(model.blocks)
    for name, parameter in model.named_parameters():
        local, offset = local_box(parameter)
        if local.numel() == 0:
            continue
        rows_at_once = max(1, BUFFER_VALUES // max(1, math.prod(parameter.shape[1:])))
        for row in range(0, local.shape[0], rows_at_once):
            block = local[row:row + rows_at_once]
            where = (offset[0] + row, *offset[1:])
            block.copy_(_initial_block(name, parameter.shape, block.shape, where, n_layers, seed))


def local_box(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's part of a parameter and where it starts in the logical tensor."""
    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.dim()
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), tuple(offset)


def _initial_block(name: str, shape: torch.Size, box: torch.Size, offset: tuple[int, ...], n_layers: int,
                   seed: int) -> Tensor:
    """The initial values of a box of whole or partial rows: the rows are drawn whole, then cut."""
    row_size = math.prod(shape[1:])
    rows = initial_values(name, tuple(shape), offset[0] * row_size, box[0] * row_size, n_layers=n_layers, seed=seed)
    rows = rows.view(box[0], *shape[1:])
    return rows[(slice(None), *(slice(o, o + n) for o, n in zip(offset[1:], box[1:], strict=True)))]
