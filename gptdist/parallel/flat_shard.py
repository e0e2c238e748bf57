"""A contiguous piece of a flattened tensor, as torch.distributed.checkpoint (DCP) sees it: boxes of the whole tensor.

ZeRO cuts parameters anywhere in their row-major order. Such a piece [start, stop) of an n-dimensional tensor is at most
2n - 1 boxes, each of them contiguous in the piece, so that saving and loading are views and no rank gathers anything:

    5 x 4 tensor, [6, 17):   . . . .      box 1: row 1, columns 2-3
                             . . 1 1
                             2 2 2 2      box 2: rows 2-3
                             2 2 2 2
                             3 . . .      box 3: row 4, column 0
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


@dataclass(frozen=True)
class Box:
    """`sizes` elements at `offsets` of the whole tensor; its first element has row-major index `first`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    first: int

    def metadata(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offsets), torch.Size(self.sizes))


def boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The row-major elements [start, stop) of a tensor as boxes, in order; each is contiguous in that order."""
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [Box((start,) * len(shape), (stop - start,) * len(shape), start)]
    row_size = math.prod(shape[1:])
    row, column = divmod(start, row_size)
    last_row, last_column = divmod(stop, row_size)
    if row == last_row:
        return _in_row(shape, row, column, last_column)
    found = []
    if column:
        found += _in_row(shape, row, column, row_size)
        row += 1
    if last_row > row:
        zeros = (0,) * (len(shape) - 1)
        found.append(Box((row, *zeros), (last_row - row, *shape[1:]), row * row_size))
    return found + _in_row(shape, last_row, 0, last_column)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> list[Box]:
    first = row * math.prod(shape[1:])
    return [Box((row, *box.offsets), (1, *box.sizes), first + box.first) for box in boxes(shape[1:], start, stop)]


class FlatShard(Tensor):
    """Elements [start, start + flat.numel()) of a row-major tensor of `shape`, held in `flat`, a view of what trains.

    DCP asks its three dunder methods what to write, and where to read into. It computes nothing.
    """

    flat: Tensor
    start: int
    boxes: list[Box]

    @staticmethod
    def __new__(cls, flat: Tensor, start: int, shape: tuple[int, ...]) -> "FlatShard":
        assert flat.dim() == 1, f"flat has shape {tuple(flat.shape)}, expected one dimension"
        shard = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=flat.dtype, device=flat.device)
        shard.flat, shard.start = flat, start
        shard.boxes = boxes(tuple(shape), start, start + flat.numel())
        return shard

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> "FlatShard":
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"FlatShard has no {func}: it is only for checkpoints")

    def __repr__(self, **kwargs: Any) -> str:
        return f"FlatShard({tuple(self.shape)}, [{self.start}, {self.start + self.flat.numel()}))"

    def __create_write_items__(self, fqn: str, obj: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.flat)
        return [WriteItem(index=MetadataIndex(fqn, torch.Size(box.offsets)), type=WriteItemType.SHARD,
                          tensor_data=TensorWriteData(chunk=box.metadata(), properties=properties, size=self.size()))
                for box in self.boxes]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [box.metadata() for box in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for box in self.boxes:
            if torch.Size(box.offsets) == index.offset:
                first = box.first - self.start
                return self.flat[first:first + math.prod(box.sizes)].view(box.sizes)
        raise ValueError(f"{self!r} has no box at {tuple(index.offset)}")
