"""Next-word pretraining: windows of tokens in, per-token losses out."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from gptdist.checkpoint.restore import read_config
from gptdist.config import Config
from gptdist.data.format import TokenDataset
from gptdist.data.loader import Batch, PretrainSource, eval_batches
from gptdist.data.tokenizer import Tokenizer
from gptdist.errors import UserError
from gptdist.model import Dropout
from gptdist.parallel.strategies import Strategy
from gptdist.parallel.world import World
from gptdist.tasks.task import SAME_MODEL, Task, check_equal, check_tokenizer, resolve_steps


class Pretrain(Task):
    """The next word of every word, over windows of a prepared dataset."""

    fixed = (*Task.fixed, "data.shuffle", "data.document_mask")

    def __init__(self, config: Config, world: World):
        super().__init__(config, world)
        train, val, self.tokenizer = open_data(config.data.path)
        self.config = resolve_vocab(config, self.tokenizer, train)
        if val is not None and len(val) < 2:
            raise UserError(f"{config.data.path}/val has {len(val)} tokens, expected at least 2 to evaluate on: "
                            f"prepare the data with a larger --val-fraction, or with 0 for none")
        self.val = val
        self.dataset_id = hashlib.sha256((Path(config.data.path) / "train" / "meta.json").read_bytes()).hexdigest()
        self.source = PretrainSource(
            train, context=config.model.context, sequences_per_step=config.sequences_per_step,
            micro_batch=config.train.micro_batch, rank=world.dp_rank, world=world.dp_size, seed=config.run.seed,
            shuffle=config.data.shuffle, document_mask=config.data.document_mask, eot=self.tokenizer.eot,
            skipped=config.data.skip)
        self.config = resolve_steps(self.config, self.source.n_samples)

    @property
    def data_name(self) -> str:
        return f"{self.config.data.path}/train"

    def check_base(self, checkpoint: Path) -> None:
        check_tokenizer(checkpoint, self.tokenizer, self.data_name)
        saved = read_config(checkpoint)
        for field in dataclasses.fields(saved.model):
            # Another rotary context is a new run's choice; a learned position table has its own shape check.
            if field.name not in ("dropout", "context"):
                check_equal(checkpoint, saved, self.config, f"model.{field.name}", SAME_MODEL)

    def loss(self, strategy: Strategy, batch: Batch, key: Tensor | None) -> Tensor:
        return loss_sum(strategy, batch, self.world.device, self.dropout(batch, key))

    def evaluate(self, strategy: Strategy) -> dict[str, float] | None:
        """Mean validation loss in nats per token over all ranks; None without held-out data."""
        if self.val is None:
            return None
        batches = validation_batches(self.val, self.config, self.tokenizer, rank=self.world.dp_rank,
                                     world=self.world.dp_size, max_tokens=self.config.eval.tokens or None)
        with strategy.evaluating():
            sums = held_out_sums(strategy, batches, self.world.device)
        losses, count = self.world.sum(sums).tolist()
        return {"val_loss": losses / count if count else math.nan}


def loss_sum(model: Callable[..., Tensor], batch: Batch, device: torch.device,
             dropout: Dropout | None = None) -> Tensor:
    """Sum of a batch's token losses in nats, () fp32."""
    doc_start = None if batch.doc_start is None else batch.doc_start.to(device)
    return model(batch.tokens.to(device), batch.targets.to(device), dropout=dropout, doc_start=doc_start).sum()


def held_out_sums(model: Callable[..., Tensor], batches: Iterable[Batch], device: torch.device) -> Tensor:
    """(sum of the token losses in nats, number of targets) over batches: (2,) fp64 on the CPU."""
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        sums[0] += loss_sum(model, batch, device).double().cpu()
        sums[1] += int((batch.targets >= 0).sum())
    return sums


def validation_batches(val: TokenDataset, config: Config, tokenizer: Tokenizer, *, rank: int = 0, world: int = 1,
                       max_tokens: int | None = None) -> Iterator[Batch]:
    """The held-out windows as a run with this configuration scores them."""
    return eval_batches(val, context=config.model.context, micro_batch=config.eval.micro_batch, rank=rank, world=world,
                        max_tokens=max_tokens, document_mask=config.data.document_mask, eot=tokenizer.eot)


def open_data(path: str) -> tuple[TokenDataset, TokenDataset | None, Tokenizer]:
    """(train, val or None, tokenizer) of a directory that `gptdist prepare` wrote."""
    root = Path(path)
    if not path:
        raise UserError("data.path is empty: set it to a directory written by `gptdist prepare`")
    if not (root / "train").is_dir():
        what = "does not exist" if not root.exists() else "has no train/ inside"
        raise UserError(f"data.path={path} {what}: expected a directory written by `gptdist prepare --output {path}`")
    val = TokenDataset.open(root / "val") if (root / "val").is_dir() else None
    return TokenDataset.open(root / "train"), val, Tokenizer.load(root / "tokenizer")


def resolve_vocab(config: Config, tokenizer: Tokenizer, dataset: TokenDataset) -> Config:
    """The configuration with model.vocab_size known; refuses data that another tokenizer made."""
    if dataset.meta.tokenizer_hash != tokenizer.hash:
        raise UserError(f"{config.data.path}: train/ was made with tokenizer {dataset.meta.tokenizer_hash[:12]}, "
                        f"tokenizer/ is {tokenizer.hash[:12]}: prepare the dataset again")
    wanted = config.model.vocab_size
    if wanted is not None and wanted < tokenizer.vocab_size:
        raise UserError(f"model.vocab_size={wanted} is below the tokenizer's {tokenizer.vocab_size} ids: "
                        f"leave it null to take the tokenizer's")
    model = dataclasses.replace(config.model, vocab_size=wanted or tokenizer.vocab_size)
    return dataclasses.replace(config, model=model)
