"""New tokens for a trained model: its vocabulary's tensors get more rows than their checkpoint has.

A token that is a word starts as the mean of the rows of the tokens it was written with before. For one that stands for
no text:
A new row is the mean of the trained rows plus the initial values that the model gives that row: its logit starts near
the average one, so that it takes no probability from the words that are there, and no two new tokens are the same.
Rows of padding, trained by nothing, count as new. Works for any sharding: every rank fills its own part.
Source: Hewitt, "Initializing new word embeddings for pretrained language models" (2021).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from gptdist.checkpoint.ranks import Ranks
from gptdist.checkpoint.restore import MergedReader, load_weights
from gptdist.model import initial_values
from gptdist.parallel.flat_shard import FlatShard
from gptdist.parallel.init import local_box

VOCABULARY_KEYS = ("model.wte.weight", "model.head.weight")  # a row a token


def load_grown(path: Path, tensors: Mapping[str, Tensor], *, trained: int, seed: int,
               parts: Sequence[Sequence[int]] = (), process_group: dist.ProcessGroup | None = None,
               **options) -> list[str]:
    """restore.load_weights for a model with more tokens than the checkpoint, which has `trained` ids.

    A collective call. parts: ids that the first new tokens are made of, one list each. tensors: plain, DTensor or
    FlatShard. Options go to store.load.
    """
    missing = load_weights(path, tensors, process_group, grow=VOCABULARY_KEYS, **options)
    for key in VOCABULARY_KEYS:
        if key in tensors and key not in missing:
            means = Ranks(process_group).on_coordinator(lambda key=key: mean_rows(path, key, trained, parts))
            rows = _new_rows(key, tensors[key].shape, trained, means[0], seed)
            rows[: len(parts)] = means[1:]
            fill_rows(tensors[key], trained, rows)
    return missing


def mean_rows(path: Path, key: str, rows: int, parts: Sequence[Sequence[int]]) -> Tensor:
    """Means of rows of a (V, C) tensor, of the first `rows` and of each of `parts`: (1 + parts, C) fp32."""
    table = MergedReader(path).read(key)[:rows]
    groups = [table, *(table[list(ids)] for ids in parts)]
    return torch.stack([group.mean(0, dtype=torch.float32) for group in groups])


def _new_rows(key: str, shape: torch.Size, first: int, mean: Tensor, seed: int) -> Tensor:
    """Rows first, first + 1, ... of a (V, C) tensor: (V - first, C) fp32."""
    n, width = shape[0] - first, shape[1]
    # No depth scales the rows of a vocabulary.
    noise = initial_values(key.removeprefix("model."), tuple(shape), first * width, n * width, n_layers=1, seed=seed)
    return mean + noise.view(n, width)


@torch.no_grad()
def fill_rows(tensor: Tensor, first: int, rows: Tensor) -> None:
    """Write rows (n, C) to tensor[first:first + n], of which this process may have any part."""
    if isinstance(tensor, FlatShard):
        width = rows.shape[1]
        start, stop = max(tensor.start, first * width), tensor.start + tensor.flat.numel()
        if start < stop:
            values = rows.flatten()[start - first * width:stop - first * width]
            tensor.flat[start - tensor.start:start - tensor.start + len(values)].copy_(values)
        return
    local, (row, column) = local_box(tensor)
    skip = max(0, first - row)  # rows of this process that are before the new ones
    part = rows[max(0, row - first):, column:column + local.shape[1]][:max(0, local.shape[0] - skip)]
    local[skip:skip + len(part)].copy_(part)
