"""Direct preference optimisation: to prefer the chosen of two answers, held near the model that training starts from.

    loss of a pair = -log sigmoid(margin),  margin = beta ((c - c_ref) - (r - r_ref))

with c and r the log-probabilities of the chosen and the rejected answer (all its tokens, given the prompt) and _ref
those of the model at the start. There is no second copy of it: with adapters (lora.rank above 0) the reference is the
frozen base, run beside each micro-batch with the adapters off; else its log-probabilities of the pairs that the run
will see are computed before the first step, two numbers a pair, and go with every checkpoint.

Source: Rafailov et al., "Direct preference optimization" (2023), equation 7. Shapes: B pairs, T tokens; the rows of a
batch are 2 B, in the order chosen, rejected, chosen ...
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from gptdist import lora
from gptdist.checkpoint import layout
from gptdist.checkpoint.template import TEMPLATE_FILE
from gptdist.config import Config
from gptdist.data.examples import ExampleSource, eval_batches, pad_multiple
from gptdist.data.loader import Batch
from gptdist.data.preference import (
    EncodedPairs,
    Preference,
    encode_preferences,
    python_preferences,
    read_preferences,
    split_preferences,
)
from gptdist.errors import UserError
from gptdist.model import Dropout
from gptdist.parallel.strategies import Strategy
from gptdist.parallel.world import World
from gptdist.tasks.finetune import FineTune
from gptdist.tasks.task import resolve_steps

REFERENCE_FILE = "dpo_reference.safetensors"
KEEPS_DATA = "a run keeps its data; for others start anew, in another run.dir, with checkpoint.init_from"


class Dpo(FineTune):
    unit = "pairs"
    fixed = (*FineTune.fixed, "dpo.beta", "task.val_data", "task.val_fraction")

    def __init__(self, config: Config, world: World):
        super().__init__(config, world)
        if config.task.test_data:
            raise UserError("task.test_data is not for task.name=dpo, which measures on task.val_data: use that")
        train, val = self._read()
        self.start(lambda: _texts(train))
        self.template = self.chosen_template()
        if missing := self.template.missing_from(self.tokenizer):
            raise UserError(f"the model's tokenizer has no {', '.join(missing)}, which the template "
                            f"{self.template.name} needs: fine-tune with it and task.name=instruct first, or use "
                            f"instruct.template=alpaca")
        self.train = self._encode(train, self.data_name)
        self.val = self._encode(val, config.task.val_data or self.data_name) if val else None
        self.config = resolve_steps(self.config, len(self.train))
        self.dataset_id = _identity(self.train)
        self.source = ExampleSource(
            self.train.rows, batch=config.train.batch, seed=config.run.seed, shuffle=config.data.shuffle,
            window=config.task.bucket, skipped=config.data.skip, mean_over="examples", unit=self.unit,
            **self._batching(self.train, config.train.micro_batch))
        self._reference: dict[str, Tensor] = {}  # "train", "val" -> (pairs, 2) fp64 log-probabilities; NaN: not needed
        self._measured = torch.zeros(3, dtype=torch.float64)  # of this step and rank: margins, right ones, pairs

    # Data

    def _read(self) -> tuple[list[Preference], list[Preference]]:
        task = self.config.task
        if not task.train_data:
            train, val = python_preferences()
            return train, self._read_file(task.val_data) if task.val_data else val
        train = self._read_file(task.train_data)
        return (train, self._read_file(task.val_data)) if task.val_data else split_preferences(train, task.val_fraction)

    def _read_file(self, path: str) -> list[Preference]:
        found = read_preferences(path)
        self.note(found.note())
        return found.items

    def _encode(self, pairs: list[Preference], where: str) -> EncodedPairs:
        encoded = encode_preferences(pairs, self.template, self.tokenizer, context=self.config.model.context,
                                     where=where)
        self.note(encoded.note())
        return encoded

    def _batching(self, pairs: EncodedPairs, micro_batch: int) -> dict[str, Any]:
        """What a source and the batches of an evaluation have in common."""
        lengths = np.array([len(row.tokens) for row in pairs.rows])
        return dict(lengths=lengths, micro_batch=micro_batch, context=self.config.model.context,
                    rank=self.world.dp_rank, world=self.world.dp_size, pad_multiple=pad_multiple(self.world.tensor),
                    rows_per_example=2)

    def _batches(self, pairs: EncodedPairs, chosen: Tensor) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """This rank's part of the chosen pairs (n,): (batch, its pairs' numbers (B,), which are no padding (B,))."""
        some = pairs.take(chosen.tolist())
        for batch in eval_batches(some.rows, **self._batching(some, self.config.eval.micro_batch)):
            position, real = _samples(batch)
            yield batch, chosen[position], real

    # The reference

    @property
    def _has_adapters(self) -> bool:
        return self.config.lora.rank > 0

    def started(self, strategy: Strategy) -> None:
        super().started(strategy)
        if self.val is None:
            self.console.print("no validation pairs: nothing is evaluated")
        else:
            measured = self._needed("val", 0, 0).tolist()
            self.console.print(f"to clear on the {len(measured)} validation pairs: accuracy "
                               f"{self.val.shorter_chosen(measured):.3f}, by preferring the shorter answer")
        if self._has_adapters or self._reference:
            return
        self._reference = {name: self._log_probs_of_all(strategy, pairs, self._needed(name, 0, 0))
                           for name, pairs in self._splits.items()}

    @property
    def _splits(self) -> dict[str, EncodedPairs]:
        return {"train": self.train} | ({} if self.val is None else {"val": self.val})

    def _needed(self, name: str, next_sample: int, step: int) -> Tensor:
        """Numbers of the pairs of a split whose reference a run needs from this step on: int64, ascending."""
        if name == "val":
            return torch.arange(min(len(self.val), self.config.eval.examples or len(self.val)))
        return torch.from_numpy(self.source.visited(next_sample, self.config.train.steps - step))

    def _log_probs_of_all(self, strategy: Strategy, pairs: EncodedPairs, needed: Tensor) -> Tensor:
        """(pairs, 2) fp64 on the CPU, on every rank; each rank computes its share of the needed ones."""
        found = torch.zeros(len(pairs), 2, dtype=torch.float64)
        with strategy.evaluating():
            for batch, numbers, real in self._batches(pairs, needed):
                found[numbers[real]] = log_probs(strategy, batch, self.world.device).cpu()[real]
        result = torch.full_like(found, torch.nan)
        result[needed] = self.world.sum(found)[needed]
        return result

    def files(self) -> dict[str, bytes]:
        files = {TEMPLATE_FILE: self.template.to_json()}
        return files | ({REFERENCE_FILE: safetensors.torch.save(self._reference)} if self._reference else {})

    def resumed(self, checkpoint: Path) -> None:
        if self._has_adapters:
            return
        self._reference = safetensors.torch.load(layout.read_file(checkpoint, REFERENCE_FILE))
        done = layout.read_train_state(checkpoint)
        for name, pairs in self._splits.items():
            found = self._reference.get(name, torch.empty(0, 2))
            if len(found) != len(pairs):
                raise UserError(f"{checkpoint} was trained with {len(found)} pairs for {name}, this run has "
                                f"{len(pairs)}: {KEEPS_DATA}")
            needed = self._needed(name, done["next_sample"], done["step"])
            if unknown := int(found[needed].isnan().any(1).sum()):
                what = "eval.examples" if name == "val" else "train.steps or data.skip"
                raise UserError(f"{what} of this run asks for {unknown} pairs that {checkpoint} has no reference of, "
                                f"which only the model at the start gives: {KEEPS_DATA}")

    def _reference_of(self, strategy: Strategy, batch: Batch, pairs: str, numbers: Tensor) -> Tensor:
        """(B, 2) fp64 on the device."""
        if not self._has_adapters:
            return self._reference[pairs][numbers].to(self.world.device)
        with strategy.evaluating(), lora.without_adapters(strategy.model):
            return log_probs(strategy, batch, self.world.device)

    # Steps

    def loss(self, strategy: Strategy, batch: Batch, key: Tensor | None) -> Tensor:
        samples, real = _samples(batch)
        numbers = torch.zeros_like(samples)
        numbers[real] = torch.from_numpy(self.source.index(samples[real].numpy()))
        reference = self._reference_of(strategy, batch, "train", numbers)
        margins = self._margins(log_probs(strategy, batch, self.world.device, self.dropout(batch, key)), reference)
        margins = margins[real.to(margins.device)]
        self._measured += _measures(margins)
        return -F.logsigmoid(margins).sum().float()

    def _margins(self, policy: Tensor, reference: Tensor) -> Tensor:
        """(B, 2) and (B, 2) -> (B,) fp64."""
        gain = policy - reference
        return self.config.dpo.beta * (gain[:, 0] - gain[:, 1])

    def measured(self) -> dict[str, float]:
        margins, right, count = self.world.sum(self._measured).tolist()
        self._measured.zero_()
        return {"margin": margins / count, "accuracy": right / count} if count else {}

    def evaluate(self, strategy: Strategy) -> dict[str, Any] | None:
        """Loss, mean margin, and the share of pairs whose chosen answer gained more than the rejected one."""
        if self.val is None:
            return None
        sums = torch.zeros(4, dtype=torch.float64)
        for batch, numbers, real in self._batches(self.val, self._needed("val", 0, 0)):
            reference = self._reference_of(strategy, batch, "val", numbers)
            with strategy.evaluating():
                policy = log_probs(strategy, batch, self.world.device)
            margins = self._margins(policy, reference)[real.to(self.world.device)]
            sums += torch.cat([_measures(margins), -F.logsigmoid(margins).sum().cpu()[None]])
        margin, right, count, loss = self.world.sum(sums).tolist()
        return {"val_loss": loss / count, "val_margin": margin / count, "val_accuracy": right / count}


def log_probs(strategy: Strategy, batch: Batch, device: torch.device, dropout: Dropout | None = None) -> Tensor:
    """Log-probabilities of a batch's answers: (B, 2) fp64, chosen and rejected, in nats."""
    losses = strategy(batch.tokens.to(device), batch.targets.to(device), dropout=dropout)  # (2B, T), 0 in the prompt
    return -losses.double().sum(1).view(-1, 2)


def _samples(batch: Batch) -> tuple[Tensor, Tensor]:
    """(sample id of each pair (B,), which of them are no padding) on the CPU."""
    numbers = batch.sample_ids[::2]
    return numbers, numbers >= 0


def _measures(margins: Tensor) -> Tensor:
    """[sum of the margins, how many are above 0, how many there are], fp64 on the CPU."""
    margins = margins.detach()
    return torch.stack([margins.sum(), (margins > 0).sum(), margins.new_tensor(len(margins))]).double().cpu()


def _texts(pairs: Iterable[Preference]) -> Iterator[str]:
    for pair in pairs:
        yield from (turn.text for turn in pair.question.turns)
        yield pair.chosen
        yield pair.rejected


def _identity(pairs: EncodedPairs) -> str:
    digest = hashlib.sha256()
    for row in pairs.rows:
        digest.update(len(row.tokens).to_bytes(8, "little") + row.tokens.tobytes() + row.targets.tobytes())
    return digest.hexdigest()
