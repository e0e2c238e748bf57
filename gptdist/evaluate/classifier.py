"""A trained classifier (task.name=classify) on labelled texts: scores of its labels, and their calibration."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptdist.checkpoint import layout
from gptdist.checkpoint.ranks import Ranks
from gptdist.checkpoint.restore import load_weights, read_config
from gptdist.config import TaskConfig
from gptdist.data.examples import eval_batches
from gptdist.data.labelled import LabelledText, read_labelled
from gptdist.data.tokenizer import Tokenizer
from gptdist.errors import UserError
from gptdist.evaluate.scorer import evaluation_config, open_world
from gptdist.evaluate.suite import label_scores
from gptdist.model import build
from gptdist.optim.adamw import build_adamw
from gptdist.parallel.strategies import make_strategy
from gptdist.tasks.classify import encode, load_splits


def evaluate_classifier(checkpoint: Path, tasks: Sequence[str], *, strategy: str = "auto", device: str = "cpu",
                        precision: str = "fp32", verify: bool = True) -> list[dict[str, Any]]:
    """A result as suite.run_task's for each file of texts and labels; none: the test texts of its training.

    A collective call. Raises UserError for a label that the classifier does not know.
    """
    world, ranks = open_world(strategy, device), Ranks(None)
    if verify:
        ranks.on_coordinator(lambda: layout.verify(checkpoint))
    saved = read_config(checkpoint)
    sets = ranks.on_all(lambda: _read(saved, tasks))
    tokenizer = Tokenizer.load(checkpoint / "tokenizer")
    config = evaluation_config(saved, world.strategy, precision)
    config = dataclasses.replace(config, task=TaskConfig(name="classify"))  # nothing is frozen
    spread = ranks.on_all(lambda: make_strategy(world, config))
    factory = (lambda parameters: build_adamw(parameters, config.optim)) if world.strategy.startswith("zero") else None
    spread.prepare(build(config).eval(), factory)
    load_weights(checkpoint, spread.model_state())
    spread.loaded()
    labels, results = config.classify.labels, []
    for name, rows in sets:
        encoded = encode(rows, config, tokenizer)
        probabilities = torch.zeros(len(rows), len(labels), dtype=torch.float64)
        batches = eval_batches(encoded.examples, lengths=encoded.lengths, micro_batch=config.eval.micro_batch,
                               context=config.model.context, rank=world.dp_rank, world=world.dp_size)
        with spread.evaluating():
            for batch in batches:
                logits = spread(batch.tokens.to(world.device), batch.lengths.to(world.device))
                real = batch.sample_ids >= 0
                probabilities[batch.sample_ids[real]] = logits.double().softmax(1).cpu()[real]
        measured = label_scores(world.sum(probabilities).tolist(), np.asarray(encoded.labels).tolist(), labels)
        results.append({"task": name, "kind": "classify", "n": len(rows), "skipped": 0,
                        "truncated": encoded.truncated, "shots": 0, **measured})
    return results


def _read(config, tasks: Sequence[str]) -> list[tuple[str, list[LabelledText]]]:
    """(name, texts) of each set; their labels are the classifier's."""
    if not tasks:
        test = load_splits(config).test
        if not test:
            raise UserError("this classifier's data has no test texts: name a file with --tasks")
        return [("test", test)]
    sets = []
    for task in tasks:
        path = task.removeprefix("classify=")
        rows = read_labelled(path, text_field=config.classify.text_field, label_field=config.classify.label_field)
        for number, row in enumerate(rows, 1):
            if row.label not in config.classify.labels:
                raise UserError(f"{path} row {number} has the label {row.label!r}, the classifier knows "
                                f"{', '.join(config.classify.labels)}")
        sets.append((Path(path).stem, rows))
    return sets
