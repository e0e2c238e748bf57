"""Classification: a label for a whole text, from one hidden state of a GPT. Source: Raschka 2024, chapter 6."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gptdist.checkpoint.files import user_errors
from gptdist.checkpoint.restore import load_classifier, read_config
from gptdist.config import Config
from gptdist.data.examples import Example, ExampleSource, eval_batches, pad_multiple
from gptdist.data.labelled import (
    LabelledText,
    Splits,
    check_labels,
    embedded_labelled,
    find_labels,
    read_labelled,
    several_lines_note,
    split,
    undersample,
)
from gptdist.data.loader import IGNORED, Batch
from gptdist.data.tokenizer import Tokenizer
from gptdist.errors import UserError
from gptdist.evaluate.baselines import bag_of_words_accuracy, majority_accuracy
from gptdist.evaluate.classification import print_scores, scores
from gptdist.parallel.strategies import Strategy
from gptdist.parallel.world import World
from gptdist.tasks.finetune import FineTune
from gptdist.tasks.task import check_equal, resolve_steps


class Classify(FineTune):
    """The label of every text."""

    unit = "texts"
    fixed = (*FineTune.fixed, "classify.labels", "classify.balance", "classify.pool", "classify.end_token")

    def __init__(self, config: Config, world: World):
        super().__init__(config, world)
        splits = load_splits(config)
        for text in splits.notes:
            self.note(text)
        self.start(lambda: (row.text for row in splits.train))
        labels = self._labels(splits.train)
        for rows in (splits.val, splits.test):
            check_labels(rows, labels)
        self.config = dataclasses.replace(self.config, classify=dataclasses.replace(config.classify, labels=labels))
        self.texts = splits
        self.train, self.val, self.test = (self._encode(rows) for rows in (splits.train, splits.val, splits.test))
        self.dataset_id = self.train.digest()
        self.source = ExampleSource(
            self.train.examples, lengths=self.train.lengths, batch=config.train.batch,
            micro_batch=config.train.micro_batch, context=self.config.model.context, rank=world.dp_rank,
            world=world.dp_size, seed=config.run.seed, shuffle=config.data.shuffle, window=config.task.bucket,
            pad_multiple=pad_multiple(world.tensor), skipped=config.data.skip, unit=self.unit)
        self.config = resolve_steps(self.config, self.source.n_samples)
        self.weights = self._weights()

    def _labels(self, train: Sequence[LabelledText]) -> list[str]:
        """The labels by number. A classifier to go on from has its own, which have to be those of the texts."""
        known = self._origin_labels()
        labels = find_labels(train, self.config.classify.labels)
        if known is None or labels == known:
            return labels
        if set(labels) == set(known) and not self.config.classify.labels:
            return known
        raise UserError(f"{self.origin} classifies {', '.join(known)}, but the labels of this run are "
                        f"{', '.join(labels)}: use texts with its labels, or start from a model without a classifier's "
                        f"head")

    def _origin_labels(self) -> list[str] | None:
        if self.origin is None:
            return None
        config = read_config(self.origin)
        return config.classify.labels if config.task.name == "classify" else None

    def _encode(self, rows: Sequence[LabelledText]) -> "Encoded":
        return encode(rows, self.config, self.tokenizer)

    def _weights(self) -> Tensor | None:
        """Factor of each label's losses, (K,) fp32: the same sum for every label, 1 on average over the texts."""
        if self.config.classify.balance != "weights":
            return None
        labels = self.config.classify.labels
        counts = torch.tensor(np.bincount(self.train.labels, minlength=len(labels)), dtype=torch.float32)
        return (counts.sum() / (len(labels) * counts)).to(self.world.device)

    # Model and steps

    def check_base(self, checkpoint: Path) -> None:
        """A classifier's head goes on with what it was trained to see."""
        saved = read_config(checkpoint)
        if saved.task.name == "classify":
            for name in ("classify.pool", "classify.end_token"):
                check_equal(checkpoint, saved, self.config, name, "its head is kept; give the same")

    def may_be_fresh(self, key: str) -> bool:
        return super().may_be_fresh(key) or (key.startswith("model.score.") and self._origin_labels() is None)

    def loss(self, strategy: Strategy, batch: Batch, key: Tensor | None) -> Tensor:
        return self._losses(strategy, batch, key)[0].sum()

    def _losses(self, strategy: Strategy, batch: Batch, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(loss of each row, weighted, (B,) fp32; logits (B, K))."""
        device = self.world.device
        logits = strategy(batch.tokens.to(device), batch.lengths.to(device), dropout=self.dropout(batch, key))
        targets = batch.targets.to(device)
        return F.cross_entropy(logits, targets, self.weights, ignore_index=IGNORED, reduction="none"), logits

    # Evaluation

    def evaluate(self, strategy: Strategy) -> dict[str, Any] | None:
        if not len(self.val.labels):
            return None
        return self._measure(strategy, self.val.spread(self.config.eval.examples or len(self.val.labels)))

    def _measure(self, strategy: Strategy, encoded: "Encoded") -> dict[str, Any]:
        """{"val_loss", and all of `scores`} over the texts."""
        k, world = len(self.config.classify.labels), self.world
        confusion, total = torch.zeros(k, k, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        batches = eval_batches(
            encoded.examples, lengths=encoded.lengths, micro_batch=self.config.eval.micro_batch,
            context=self.config.model.context, rank=world.dp_rank, world=world.dp_size,
            pad_multiple=pad_multiple(world.tensor))
        weights = torch.ones(k) if self.weights is None else self.weights.cpu()
        with strategy.evaluating():
            for batch in batches:
                losses, logits = self._losses(strategy, batch)
                real = batch.targets != IGNORED
                targets, predicted = batch.targets[real], logits.argmax(1).cpu()[real]
                total += torch.stack([losses.sum().double().cpu(), weights[targets].sum().double()])
                confusion += torch.bincount(targets * k + predicted, minlength=k * k).view(k, k)
        loss, count = world.sum(total).tolist()
        return {"val_loss": loss / count, **scores(world.sum(confusion), self.config.classify.labels)}

    # The end

    def started(self, strategy: Strategy) -> None:
        super().started(strategy)
        parts = [f"{len(part.labels)} {name}" for name, part in
                 (("training", self.train), ("validation", self.val), ("test", self.test))]
        every = [self.train, self.val, self.test]
        truncated = sum(part.truncated for part in every)
        self.console.print(
            f"labels {', '.join(self.config.classify.labels)}; texts: {', '.join(parts)}; longest "
            f"{max(part.longest for part in every)} tokens, {truncated} cut to model.context="
            f"{self.config.model.context}; padding {self.source.padding_share():.1%} of the positions")

    def finished(self, strategy: Strategy) -> None:
        """Scores on the test texts and beside them those of the baselines: printed, and in RUN_DIR/results.json."""
        if not len(self.test.labels):
            return
        result = self._measure(strategy, self.test)
        result["test_loss"] = result.pop("val_loss")
        if not self.world.is_main:
            return
        record = {"labels": self.config.classify.labels, "steps": self.config.train.steps,
                  "texts": {name: len(part.labels) for name, part in
                            (("train", self.train), ("val", self.val), ("test", self.test))},
                  "padding_share": self.source.padding_share(), "test": result, "baselines": self._baselines()}
        path = Path(self.config.run.dir) / "results.json"
        with user_errors("write to"):
            path.write_text(json.dumps(record, indent=1) + "\n")
        console = self.console
        print_scores(console, result, f"{len(self.test.labels)} test texts")
        for name, value in record["baselines"].items():
            console.print(f"test accuracy of {name.replace('_', ' ')}: {value:.2%}")
        console.print(f"written to {path}")

    def _baselines(self) -> dict[str, float]:
        if not self.config.classify.baselines:
            return {}
        train, test = self.train.labels.tolist(), self.test.labels.tolist()
        train_texts, test_texts = ([row.text for row in rows] for rows in (self.texts.train, self.texts.test))
        return {"the_commonest_label": majority_accuracy(train, test),
                "logistic_regression_on_words": bag_of_words_accuracy(train_texts, train, test_texts, test)}


@dataclass(frozen=True)
class Encoded:
    """Labelled texts as rows of tokens."""

    examples: list[Example]
    labels: np.ndarray  # (n,) int64
    lengths: np.ndarray  # (n,) int64: tokens of each row
    longest: int  # tokens of the longest text before it was cut
    truncated: int  # texts that were cut

    def spread(self, count: int) -> "Encoded":
        """At most `count` of the texts, from all parts of the file, which may be sorted."""
        chosen = np.arange(min(count, len(self.labels))) * len(self.labels) // min(count, len(self.labels))
        return dataclasses.replace(self, examples=[self.examples[i] for i in chosen], labels=self.labels[chosen],
                                   lengths=self.lengths[chosen])

    def digest(self) -> str:
        digest = hashlib.sha256(self.labels.tobytes() + self.lengths.tobytes())
        for example in self.examples:
            digest.update(example.tokens.astype(np.uint32).tobytes())
        return digest.hexdigest()


def load_splits(config: Config) -> Splits:
    """The texts of a run: of the files that `task` names, or embedded ones; split and balanced as `classify` says."""
    task, options = config.task, config.classify
    notes = []

    def read(path: str) -> list[LabelledText]:
        if not path:
            return []
        rows = read_labelled(path, text_field=options.text_field, label_field=options.label_field)
        if note := several_lines_note(path, rows):
            notes.append(note)
        return rows

    train = read(task.train_data) or embedded_labelled()
    balanced = options.balance == "undersample"
    if balanced:
        train = undersample(train, options.split_seed)
    if task.val_data:
        splits = Splits(train, read(task.val_data), read(task.test_data))
    elif task.test_data:
        whole = sum(options.split[:2])
        shares = [options.split[0] / whole, options.split[1] / whole, 0.0]
        splits = dataclasses.replace(split(train, shares, options.split_seed), test=read(task.test_data))
    else:
        splits = split(train, options.split, options.split_seed)
    return dataclasses.replace(splits, notes=tuple(notes))


def encode(rows: Iterable[LabelledText], config: Config, tokenizer: Tokenizer) -> Encoded:
    """Tokens of each text, cut to the context; an end token is kept."""
    numbers = {label: i for i, label in enumerate(config.classify.labels)}
    examples, lengths = [], []
    for row in rows:
        tokens, length = text_tokens(row.text, config, tokenizer)
        examples.append(Example(tokens, numbers[row.label]))
        lengths.append(length)
    labels = np.array([example.targets for example in examples], np.int64)
    kept = np.array([len(example.tokens) for example in examples], np.int64)
    return Encoded(examples, labels, kept, longest=max(lengths, default=0),
                   truncated=int((kept < np.array(lengths, np.int64)).sum()))


def text_tokens(text: str, config: Config, tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """(tokens (n,) with n <= context, how many they would be uncut)."""
    tokens = tokenizer.encode_array(text).astype(np.int64)
    end = [tokenizer.eot] if config.classify.end_token else []
    kept = tokens[:config.model.context - len(end)]
    return np.append(kept, np.array(end, np.int64)), len(tokens) + len(end)


# Using a classifier


class Labeller:
    """A trained classifier: texts in, probabilities out."""

    def __init__(self, checkpoint: Path, *, device: str = "cpu", verify: bool = True):
        self.model, self.tokenizer, self.config = load_classifier(checkpoint, device=device, verify=verify)
        self.device = device
        self.labels = self.config.classify.labels

    @torch.inference_mode()
    def probabilities(self, texts: Sequence[str], *, batch_size: int = 16) -> Tensor:
        """(texts, labels) fp32, rows sum to 1; texts are cut as in training. Raises UserError for an empty text."""
        if batch_size < 1:
            raise UserError(f"batch size is {batch_size}, expected at least 1")
        for number, text in enumerate(texts, 1):
            if not text.strip():
                raise UserError(f"text {number} is empty, expected a text to classify")
        examples = [Example(text_tokens(text, self.config, self.tokenizer)[0], 0) for text in texts]
        lengths = np.array([len(example.tokens) for example in examples], np.int64)
        result = torch.empty(len(texts), len(self.labels))
        for batch in eval_batches(examples, lengths=lengths, micro_batch=batch_size,
                                  context=self.config.model.context):
            logits = self.model(batch.tokens.to(self.device), batch.lengths.to(self.device))
            result[batch.sample_ids] = logits.softmax(1).cpu()
        return result

    def truncated(self, texts: Iterable[str]) -> int:
        """How many of the texts are longer than the context."""
        return sum(text_tokens(text, self.config, self.tokenizer)[1] > self.config.model.context for text in texts)

    def lines(self, texts: Sequence[str], *, batch_size: int = 16) -> Iterator[dict[str, Any]]:
        """{"text", "label", "probability", "probabilities"} of each text."""
        for text, row in zip(texts, self.probabilities(texts, batch_size=batch_size).tolist(), strict=True):
            best = max(range(len(row)), key=row.__getitem__)
            yield {"text": text, "label": self.labels[best], "probability": row[best],
                   "probabilities": dict(zip(self.labels, row, strict=True))}
