"""Held-out loss of a checkpoint, beside the bigram baseline on the same tokens."""

import math
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from gptdist.checkpoint.ranks import Ranks
from gptdist.data.loader import Batch
from gptdist.data.tokenizer import Tokenizer
from gptdist.errors import UserError
from gptdist.evaluate.bigram import bigram_loss, held_out_pairs
from gptdist.evaluate.scorer import open_strategy
from gptdist.tasks.pretrain import held_out_sums, open_data, validation_batches


def evaluate_checkpoint(checkpoint: Path, data: str | None, *, strategy: str = "auto", device: str = "cpu",
                        precision: str = "fp32", bigram: bool = False, verify: bool = True) -> dict:
    """Loss (nats per token), perplexity, bits per byte and number of targets on the held-out split; a collective call.

    data: a prepared directory; None: the one the checkpoint was trained on. bigram: the loss of a bigram model too.
    strategy, precision: as scorer.open_scorer. Raises UserError where the data has no held-out split or another
    tokenizer.
    """
    spread, tokenizer = open_strategy(checkpoint, strategy=strategy, device=device, precision=precision, verify=verify)
    world, config = spread.world, spread.config
    path = data or config.data.path
    if not path and config.data.mixture:
        raise UserError(f"{checkpoint} was trained on a mixture: name the dataset to evaluate on with --data")
    train, val = Ranks(None).on_all(lambda: _open(path, checkpoint, tokenizer))

    def batches(**share):
        return validation_batches(val, config, tokenizer, **share)

    n_batches = -(-(len(val) - 1) // (config.model.context * config.eval.micro_batch * world.dp_size))
    progress = Console(stderr=True)
    shown = track(batches(rank=world.dp_rank, world=world.dp_size), "evaluate", n_batches, console=progress,
                  disable=not (progress.is_terminal and world.is_main))
    n_bytes = ByteCounter(tokenizer)
    with spread.evaluating():
        sums = held_out_sums(spread, map(n_bytes.count, shown), world.device)
    losses, count, size = world.sum(torch.cat([sums, torch.tensor([n_bytes.total], dtype=torch.float64)])).tolist()
    loss = losses / count if count else math.nan  # a loss mask may leave no target
    result = {"checkpoint": str(checkpoint), "data": path, "loss": loss, "perplexity": math.exp(loss),
              "bits_per_byte": losses / math.log(2) / size if size else math.nan, "targets": int(count)}
    if bigram and world.is_main:
        best = bigram_loss(train.window(0, len(train)), *held_out_pairs(batches()), tokenizer.vocab_size)
        result |= {"bigram_loss": best.loss, "bigram_smoothing": best.smoothing, "margin": best.loss - loss}
    return result


def _open(path: str, checkpoint: Path, tokenizer: Tokenizer):
    """(train, val) of prepared data that this tokenizer made."""
    train, val, data_tokenizer = open_data(path)
    if data_tokenizer.hash != tokenizer.hash:
        raise UserError(f"{path} was prepared with tokenizer {data_tokenizer.hash[:12]}, {checkpoint} was trained with "
                        f"{tokenizer.hash[:12]}: prepare the data with --tokenizer {checkpoint / 'tokenizer'}")
    if val is None:
        raise UserError(f"{path} has no val/: prepare it with a held-out share above 0")
    return train, val


class ByteCounter:
    """Counts the bytes of text that batches' targets stand for: what losses of different tokenizers are measured by.

    A special token, such as the end of a document, is no text: its loss counts, its bytes do not.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.sizes = np.zeros(tokenizer.vocab_size, np.int64)
        for token, i in tokenizer.ranks.items():
            self.sizes[i] = len(token)
        self.total = 0

    def count(self, batch: Batch) -> Batch:
        targets = batch.targets.numpy()
        self.total += int(self.sizes[targets[targets >= 0]].sum())
        return batch
