"""Held-out loss of a checkpoint, beside the bigram baseline on the same tokens."""

import math
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from gptdist.checkpoint.restore import load_model
from gptdist.errors import UserError
from gptdist.evaluate.bigram import bigram_loss, held_out_pairs
from gptdist.tasks.pretrain import held_out_sums, open_data, validation_batches


@torch.inference_mode()
def evaluate_checkpoint(checkpoint: Path, data: str | None, *, device: str = "cpu", bigram: bool = False,
                        verify: bool = True) -> dict:
    """Loss (nats per token), perplexity and number of targets on the held-out split; with `bigram` its loss too.

    data: a prepared directory; None: the one the checkpoint was trained on.
    Raises UserError where the data has no held-out split or another tokenizer.
    """
    model, tokenizer, config = load_model(checkpoint, device=device, verify=verify)
    path = data or config.data.path
    train, val, data_tokenizer = open_data(path)
    if data_tokenizer.hash != tokenizer.hash:
        raise UserError(f"{path} was prepared with tokenizer {data_tokenizer.hash[:12]}, {checkpoint} was trained with "
                        f"{tokenizer.hash[:12]}: prepare the data with --tokenizer {checkpoint / 'tokenizer'}")
    if val is None:
        raise UserError(f"{path} has no val/: prepare it with a held-out share above 0")

    def batches():
        return validation_batches(val, config, tokenizer)

    n_batches = -(-(len(val) - 1) // (config.model.context * config.eval.micro_batch))
    progress = Console(stderr=True)
    shown = track(batches(), "evaluate", n_batches, console=progress, disable=not progress.is_terminal)
    losses, count = held_out_sums(model, shown, torch.device(device)).tolist()
    loss = losses / count if count else math.nan  # a loss mask may leave no target
    result = {"checkpoint": str(checkpoint), "data": path, "loss": loss, "perplexity": math.exp(loss),
              "targets": int(count)}
    if bigram:
        best = bigram_loss(train.window(0, len(train)), *held_out_pairs(batches()), tokenizer.vocab_size)
        result |= {"bigram_loss": best.loss, "bigram_smoothing": best.smoothing, "margin": best.loss - loss}
    return result
