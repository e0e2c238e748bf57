"""Next-word pretraining: windows of tokens in, per-token losses out."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptdist.checkpoint.grow import load_grown
from gptdist.checkpoint.restore import read_config
from gptdist.config import Config
from gptdist.data.format import TokenDataset
from gptdist.data.loader import Batch, PretrainSource, eval_batches, windows_of
from gptdist.data.mixture import MixtureSource, Phase, counts_by_epochs, counts_by_weight, phases_identity
from gptdist.data.tokenizer import Tokenizer, parts_of_new
from gptdist.errors import UserError
from gptdist.generate import Sampling
from gptdist.model import Dropout
from gptdist.parallel.strategies import Strategy
from gptdist.parallel.world import World
from gptdist.tasks.task import SAME_MODEL, Task, check_equal, check_tokenizer, resolve_steps

SAMPLING = Sampling(max_new_tokens=100, temperature=0.8, seed=0)  # of eval.prompt: the same random numbers each time


class Pretrain(Task):
    """The next word of every word, over windows of a prepared dataset."""

    fixed = (*Task.fixed, "data.shuffle", "data.document_mask")

    def __init__(self, config: Config, world: World):
        super().__init__(config, world)
        data = config.data
        self._paths = list(dict.fromkeys(entry["path"] for entry in data.mixture)) or [data.path]
        opened = {path: open_data(path, "data.mixture" if data.mixture else "data.path") for path in self._paths}
        self.tokenizer = opened[self._paths[0]][2]
        self._check_tokenizers({path: tokenizer for path, (_, _, tokenizer) in opened.items()})
        self._sort_paths()
        opened = {path: opened[path] for path in self._paths}
        trains = [train for train, _, _ in opened.values()]
        self.config = resolve_vocab(config, self.tokenizer, trains)
        self.vals = self._open_validation({path: val for path, (_, val, _) in opened.items()})
        options = dict(
            context=config.model.context, sequences_per_step=config.sequences_per_step,
            micro_batch=config.train.micro_batch, rank=world.dp_rank, world=world.dp_size, seed=config.run.seed,
            shuffle=data.shuffle, document_mask=data.document_mask, eot=self.tokenizer.eot, skipped=data.skip)
        if data.mixture:
            self._phases = self._resolve_phases(trains)
            self.source = MixtureSource(trains, self._phases, **options)
        else:
            self._phases = [Phase(0, (1,))]
            self.source = PretrainSource(trains[0], **options)
        self.config = resolve_steps(self.config, self.source.n_samples)
        self.dataset_id = self.dataset_at(self._phases[-1].start + 1)

    def _sort_paths(self) -> None:
        """A mixture's samples are dealt out by the datasets' hashes: neither the order of its entries nor a dataset
        that joins at a later step changes them."""
        by_hash: dict[str, str] = {}
        for path in self._paths:
            other = by_hash.setdefault(_meta_hash(path), path)
            if other != path:
                raise UserError(f"data.mixture: {other} and {path} hold the same tokens: leave one of them out")
        self._hashes = sorted(by_hash)
        self._paths = [by_hash[name] for name in self._hashes]

    @property
    def data_name(self) -> str:
        return ", ".join(f"{path}/train" for path in self._paths)

    def dataset_at(self, next_sample: int) -> str:
        return phases_identity(self._phases, self._hashes, next_sample)

    def other_data(self, dataset: str, next_sample: int) -> str:
        if dataset == phases_identity(self._phases, self._hashes, next_sample, rule=None):
            return ("was trained on this mixture by an earlier version, which dealt its windows out in the order of "
                    "the entries, and cannot go on with the same ones")
        return super().other_data(dataset, next_sample)

    def _resolve_phases(self, trains: list[TokenDataset]) -> list[Phase]:
        """The mixtures in samples; train.steps is set where epochs are given."""
        config, phases = self.config, []
        for step, entries in config.data.phases():
            by_path = {entry["path"]: entry for entry in entries}
            if "epochs" in entries[0]:
                sizes = [windows_of(train, config.model.context) for train in trains]
                epochs = [by_path[path]["epochs"] for path in self._paths]
                total = sum(n * size for n, size in zip(epochs, sizes, strict=True))
                train = dataclasses.replace(config.train, epochs=0.0,
                                            steps=math.ceil(total / config.sequences_per_step))
                self.config = dataclasses.replace(config, train=train)
                counts = counts_by_epochs(epochs, sizes)
            else:
                counts = counts_by_weight([by_path.get(path, {"weight": 0})["weight"] for path in self._paths])
            phases.append(Phase(step * config.sequences_per_step, counts))
        return phases

    def _open_validation(self, own: dict[str, TokenDataset | None]) -> dict[str, TokenDataset]:
        """The validation sets by name; "" is that of a single dataset."""
        if self.config.data.validation:
            sets, tokenizers = {}, {}
            for entry in self.config.data.validation:
                path = entry["path"]
                _, sets[entry["name"]], tokenizers[path] = open_data(path, "data.validation")
                if sets[entry["name"]] is None:
                    raise UserError(f"data.validation: {entry['path']} has no val/: prepare it with --val-fraction")
            self._check_tokenizers({self._paths[0]: self.tokenizer} | tokenizers)
        elif len(own) == 1:
            [val] = own.values()
            sets = {"": val} if val is not None else {}
        else:
            names = [re.sub(r"[^\w.-]", "_", Path(path).name) for path in own]
            if len(set(names)) < len(names):
                names = [re.sub(r"[^\w.-]", "_", path) for path in own]
            sets = {name: val for name, val in zip(names, own.values(), strict=True) if val is not None}
        for val in sets.values():
            if len(val) < 2:
                raise UserError(f"{val.path} has {len(val)} tokens, expected at least 2 to evaluate on: prepare the "
                                f"data with a larger --val-fraction, or with 0 for none")
        return sets

    def _check_tokenizers(self, tokenizers: dict[str, Tokenizer]) -> None:
        (first, wanted), *others = tokenizers.items()
        for path, tokenizer in others:
            if tokenizer.hash != wanted.hash:
                raise UserError(f"{path} was prepared with tokenizer {tokenizer.hash[:12]}, {first} with "
                                f"{wanted.hash[:12]}: prepare one again with --tokenizer {first}")

    def check_base(self, checkpoint: Path) -> None:
        grown = bool(self._parts(checkpoint))
        if not grown:
            check_tokenizer(checkpoint, self.tokenizer, self.data_name)
        saved = read_config(checkpoint)
        for field in dataclasses.fields(saved.model):
            # Another rotary context is a new run's choice; a learned position table has its own shape check.
            if field.name not in ("dropout", "context", *(["vocab_size"] if grown else [])):
                check_equal(checkpoint, saved, self.config, f"model.{field.name}", SAME_MODEL)

    def load_base(self, checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
        """Words that `prepare --add-tokens` gave the vocabulary get rows of their own."""
        if parts := self._parts(checkpoint):
            trained = Tokenizer.load(checkpoint / "tokenizer").vocab_size
            load_grown(checkpoint, tensors, trained=trained, seed=self.config.run.seed, parts=parts)
        else:
            super().load_base(checkpoint, tensors)

    def _parts(self, checkpoint: Path) -> list[list[int]] | None:
        return parts_of_new(Tokenizer.load(checkpoint / "tokenizer"), self.tokenizer)

    def loss(self, strategy: Strategy, batch: Batch, key: Tensor | None) -> Tensor:
        return loss_sum(strategy, batch, self.world.device, self.dropout(batch, key))

    def evaluate(self, strategy: Strategy) -> dict[str, Any] | None:
        """Mean validation loss in nats per token over all ranks, of each set and, as val_loss, the sets' mean; the
        text that follows eval.prompt. None without held-out data."""
        if not self.vals:
            return None
        results = {}
        for name, val in self.vals.items():
            batches = validation_batches(val, self.config, self.tokenizer, rank=self.world.dp_rank,
                                         world=self.world.dp_size, max_tokens=self.config.eval.tokens or None)
            with strategy.evaluating():
                sums = held_out_sums(strategy, batches, self.world.device)
            losses, count = self.world.sum(sums).tolist()
            results[name] = losses / count if count else math.nan
        mean = sum(results.values()) / len(results)
        values = {"val_loss": mean} | {f"val_loss_{name}": loss for name, loss in results.items() if name}
        return values | ({"sample": self._sample(strategy)} if self.config.eval.prompt else {})

    def _sample(self, strategy: Strategy) -> str:
        prompt = self.config.eval.prompt
        with strategy.evaluating():
            [completion] = self.generator(strategy).generate([prompt], SAMPLING)
        return prompt + completion.text

    def started(self, strategy: Strategy) -> None:
        """Say how much of each source of a mixture the run will see."""
        if not isinstance(self.source, MixtureSource) or not self.world.is_main:
            return
        total = self.config.train.steps * self.config.sequences_per_step
        counts = self.source.order.counts(total).tolist()
        for path, count, size in zip(self._paths, counts, self.source.sizes, strict=True):
            print(f"{path}: {count:,} of {total:,} windows ({count / total:.1%}), {count / size:.2f} epochs",
                  flush=True)


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


def open_data(path: str, setting: str = "data.path") -> tuple[TokenDataset, TokenDataset | None, Tokenizer]:
    """(train, val or None, tokenizer) of a directory that `gptdist prepare` wrote. setting: what names it."""
    root = Path(path)
    if not path:
        raise UserError("data.path is empty: set it to a directory written by `gptdist prepare`")
    if not (root / "train").is_dir():
        what = "does not exist" if not root.exists() else "has no train/ inside"
        raise UserError(f"{setting}={path} {what}: expected a directory written by `gptdist prepare --output {path}`")
    val = TokenDataset.open(root / "val") if (root / "val").is_dir() else None
    return TokenDataset.open(root / "train"), val, Tokenizer.load(root / "tokenizer")


def _meta_hash(path: str) -> str:
    """What identifies a dataset's training split."""
    return hashlib.sha256((Path(path) / "train" / "meta.json").read_bytes()).hexdigest()


def resolve_vocab(config: Config, tokenizer: Tokenizer, datasets: list[TokenDataset]) -> Config:
    """The configuration with model.vocab_size known; refuses data that another tokenizer made."""
    for dataset in datasets:
        if dataset.meta.tokenizer_hash != tokenizer.hash:
            raise UserError(f"{dataset.path.parent}: train/ is of tokenizer {dataset.meta.tokenizer_hash[:12]}, "
                            f"tokenizer/ is {tokenizer.hash[:12]}: prepare the dataset again")
    wanted = config.model.vocab_size
    if wanted is not None and wanted < tokenizer.vocab_size:
        raise UserError(f"model.vocab_size={wanted} is below the tokenizer's {tokenizer.vocab_size} ids: "
                        f"leave it null to take the tokenizer's")
    model = dataclasses.replace(config.model, vocab_size=wanted or tokenizer.vocab_size)
    return dataclasses.replace(config, model=model)
