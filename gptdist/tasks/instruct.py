"""Fine-tuning for instructions: the loss of answers, and answers that the model writes itself while it learns."""

import collections
import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptdist.checkpoint.grow import load_grown
from gptdist.config import Config
from gptdist.data.answers import Encoded, encode_conversations, pack, packed_row, row_of
from gptdist.data.examples import Example, ExampleSource, eval_batches, pad_multiple
from gptdist.data.instructions import Conversation, read_conversations, split_by_hash
from gptdist.data.loader import IGNORED, Batch
from gptdist.data.questions import python_questions
from gptdist.data.templates import encode
from gptdist.data.tokenizer import Tokenizer, extend
from gptdist.errors import UserError
from gptdist.evaluate.text_metrics import exact_match, rouge_l, score_texts
from gptdist.generate import Completion, Sampling
from gptdist.metrics import append_rows, drop_rows_after
from gptdist.parallel.strategies import Strategy
from gptdist.parallel.world import World
from gptdist.tasks.finetune import FineTune
from gptdist.tasks.task import resolve_steps

SAMPLES_FILE = "samples.jsonl"
CONSTANT_ANSWERS = 20  # the most frequent answers, tried as the answer to everything: the bar to clear


class Instruct(FineTune):
    """Conversations in a template; the targets are their answers, with instruct.mask_prompt alone."""

    fixed = (*FineTune.fixed, "instruct.questions", "instruct.template", "instruct.mask_prompt", "instruct.packing")

    def __init__(self, config: Config, world: World):
        super().__init__(config, world)
        if config.task.test_data:
            raise UserError("task.test_data is not for task.name=instruct, which measures on task.val_data: use that")
        self.template = self.chosen_template()
        train, val, notes = read_data(config)
        for text in notes:
            self.note(text)
        self.start(lambda: (turn.text for c in train for turn in c.turns))
        self._add_specials()
        encoded = self._encode(train, self.data_name)
        self.questions: list[Conversation] = []
        self.val: list[Example] = []
        if val:
            held_out = self._encode(val, "the validation data")
            self.questions = [val[i] for i in held_out.kept]
            self.val = [row_of(item) for item in held_out.items]
        counted = collections.Counter(c.answer for c in train)
        self._constant = [text for text, _ in counted.most_common(CONSTANT_ANSWERS)]
        rows = self._rows(encoded)
        self.dataset_id = identity(rows)
        self.source = ExampleSource(
            rows, lengths=lengths_of(rows), batch=config.train.batch, micro_batch=config.train.micro_batch,
            context=self.config.model.context, rank=world.dp_rank, world=world.dp_size, seed=config.run.seed,
            shuffle=config.data.shuffle, window=config.task.bucket, pad_multiple=pad_multiple(world.tensor),
            skipped=config.data.skip, unit=self.unit)
        self.config = resolve_steps(self.config, self.source.n_samples)

    # Data

    def _add_specials(self) -> None:
        """The template's special tokens get the ids after the tokenizer's last; the vocabulary grows with them."""
        self.trained_ids = self.tokenizer.vocab_size
        self.tokenizer = extend(self.tokenizer, self.template.specials)
        added = self.tokenizer.vocab_size - self.trained_ids
        model = self.config.model
        if added:
            size = max(model.vocab_size, self.tokenizer.vocab_size)
            self.config = dataclasses.replace(self.config, model=dataclasses.replace(model, vocab_size=size))
            self.note(f"{added} special tokens of the template {self.template.name} added to the vocabulary")
            self.note(self._frozen_note())

    def _frozen_note(self) -> str:
        """What the new tokens cannot learn; "" if nothing is in their way. A tied head is the embedding."""
        model, rank = self.build(), self.config.lora.rank
        if model.wte.weight.requires_grad:
            return ""
        freezer = f"lora.rank={rank}" if rank > 0 else f"task.freeze={self.config.task.freeze}"
        frozen = f"their embeddings are frozen with the others ({freezer}) and learn nothing"
        if model.head_weight.requires_grad:
            return f"{frozen}; their rows of the head are trained: instruct.template=alpaca needs neither"
        return f"{frozen}: instruct.template=alpaca needs none"

    def _encode(self, conversations: Sequence[Conversation], where: str) -> Encoded:
        encoded = encode_conversations(
            conversations, self.template, self.tokenizer, context=self.config.model.context,
            mask_prompt=self.config.instruct.mask_prompt, where=where)
        if text := encoded.note():
            self.note(f"{where}: {text}")
        return encoded

    def _rows(self, encoded: Encoded) -> list[Example]:
        if self.config.instruct.packing == "none":
            return [row_of(item) for item in encoded.items]
        self.unit = "packed rows"
        context = self.config.model.context
        rows = pack(encoded.items, context)
        share = sum(item.length for item in encoded.items) / (len(rows) * context)
        self.note(f"{len(encoded.items)} conversations packed in {len(rows)} rows of model.context={context}, "
                           f"{1 - share:.1%} of which is padding")
        return [packed_row([encoded.items[i] for i in row]) for row in rows]

    # Model

    def load_base(self, checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
        """A vocabulary that has grown gets new rows; the others are the checkpoint's."""
        trained = Tokenizer.load(checkpoint / "tokenizer").vocab_size
        if trained == self.tokenizer.vocab_size:
            super().load_base(checkpoint, tensors)
        else:
            load_grown(checkpoint, tensors, trained=trained, seed=self.config.run.seed,
                       allow_missing=self.may_be_fresh)

    def files(self) -> dict[str, bytes]:
        return {"template.json": self.template.to_json()}

    # Steps

    def loss(self, strategy: Strategy, batch: Batch, key: Tensor | None) -> Tensor:
        device = self.world.device
        packed = {}
        if batch.doc_start is not None:
            packed = dict(doc_start=batch.doc_start.to(device), restart_positions=True)
        return strategy(batch.tokens.to(device), batch.targets.to(device), dropout=self.dropout(batch, key),
                        **packed).sum()

    def rewound(self, step: int) -> None:
        if self.world.is_main:
            drop_rows_after(self._samples_path, step)

    def started(self, strategy: Strategy) -> None:
        super().started(strategy)
        console = self.console
        if self.world.is_main:
            drop_rows_after(self._samples_path, self.step)
        if not self.val:
            console.print("no validation data: nothing is evaluated, and no answers are sampled")
            return
        if self._n_samples and self.world.tensor > 1:
            console.print(f"no answers are sampled with parallel.tensor={self.world.tensor}: it divides the positions "
                          f"of a sequence, and cannot go on from a single one; `gptdist chat` can, from any checkpoint")
        elif self._n_samples:
            text, score = self._best_constant()
            console.print(f"to clear on the {self._n_samples} sampled questions: ROUGE-L {score:.3f}, by the training "
                          f"answer that fits best as the answer to all of them: {text!r}")
        if self.step == 0:
            console.print(f"before the first step: validation loss {self._val_loss(strategy):.4f}")

    def evaluate(self, strategy: Strategy) -> dict[str, Any] | None:
        """Loss and perplexity of the held-out targets; exact match and ROUGE-L of sampled answers (0 to 1)."""
        if not self.val:
            return None
        loss = self._val_loss(strategy)
        values = {"val_loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if self._n_samples and self.world.tensor == 1:
            questions = self.questions[:self._n_samples]
            answers = self._answers(strategy, questions)
            scores = score_texts([answer.text for answer in answers], [c.answer for c in questions])
            values |= {"exact_match": scores.exact_match, "rouge_l": scores.rouge_l}
            if self.world.is_main:
                append_rows(self._samples_path, list(self._sample_rows(questions, answers)))
        return values

    def _val_loss(self, strategy: Strategy) -> float:
        """Mean loss of the validation targets in nats; nan if there are none."""
        rows = self.val[:self.config.eval.examples or None]
        batches = eval_batches(rows, lengths=lengths_of(rows), micro_batch=self.config.eval.micro_batch,
                               context=self.config.model.context, rank=self.world.dp_rank, world=self.world.dp_size,
                               pad_multiple=pad_multiple(self.world.tensor))
        sums = torch.zeros(2, dtype=torch.float64)
        with strategy.evaluating():
            for batch in batches:
                sums[0] += self.loss(strategy, batch, None).double().cpu()
                sums[1] += int((batch.targets != IGNORED).sum())
        losses, count = self.world.sum(sums).tolist()
        return losses / count if count else math.nan

    # Sampled answers

    @property
    def _n_samples(self) -> int:
        return min(self.config.instruct.samples, len(self.questions))

    @property
    def _samples_path(self) -> Path:
        return Path(self.config.run.dir) / SAMPLES_FILE

    def _answers(self, strategy: Strategy, questions: Sequence[Conversation]) -> list[Completion]:
        """Greedy answers. Every rank generates all of them, as the weights may be spread over all ranks."""
        prompts = [encode(self.template.render(c.question()), self.tokenizer)[0] for c in questions]
        sampling = Sampling(max_new_tokens=self.config.instruct.max_new_tokens, temperature=0, stop=self.template.stops)
        with strategy.evaluating():
            return self.generator(strategy).generate(prompts, sampling, batch_size=self.config.eval.micro_batch)

    def _sample_rows(self, questions: Sequence[Conversation],
                     answers: Sequence[Completion]) -> Iterator[dict[str, Any]]:
        for c, answer in zip(questions, answers, strict=True):
            asked = c.question().turns[-1]
            given = {"input": asked.input} if asked.input else {}
            yield {"kind": "sample", "step": self.step, "question": asked.text, **given, "answer": answer.text,
                   "reference": c.answer, "finish": answer.finish, "exact_match": exact_match(answer.text, c.answer),
                   "rouge_l": round(rouge_l(answer.text, c.answer), 4)}

    def _best_constant(self) -> tuple[str, float]:
        references = [c.answer for c in self.questions[:self._n_samples]]
        scored = {text: score_texts([text] * len(references), references).rouge_l for text in self._constant}
        return max(scored.items(), key=lambda item: item[1])


def read_data(config: Config) -> tuple[list[Conversation], list[Conversation], list[str]]:
    """(training, validation conversations, notes about what was left out)."""
    task, format = config.task, config.instruct.format
    notes = []

    def read(path: str) -> list[Conversation]:
        found = read_conversations(path, format)
        notes.append(found.note())
        return found.items

    if not task.train_data:
        questions = python_questions(config.instruct.questions)
        train, val = questions.train, questions.held_out
    elif task.val_data:
        train, val = read(task.train_data), []
    else:
        train, val = split(read(task.train_data), task.val_fraction)
    if task.val_data:
        val = read(task.val_data)
    return train, val, [note for note in notes if note]


def split(conversations: Sequence[Conversation], val_fraction: float) -> tuple[list[Conversation], list[Conversation]]:
    """(training, validation) by a hash of each conversation: equal ones meet on one side, wherever they stand."""
    return split_by_hash(conversations, val_fraction, key=repr)


def lengths_of(rows: Sequence[Example]) -> np.ndarray:
    return np.array([len(row.tokens) for row in rows])


def identity(rows: Sequence[Example]) -> str:
    """sha256 of all rows: of data, template, tokenizer and packing together."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row.tokens).to_bytes(8, "little"))
        digest.update(row.tokens.astype("<i8").tobytes() + row.targets.astype("<i8").tobytes())
    return digest.hexdigest()
