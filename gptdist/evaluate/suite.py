"""Evaluation tasks on a scorer: questions in, figures out, the same ones for any batch and world size.

How each kind (items.py) is asked and measured:

    choice     log-likelihood of each choice after the context. accuracy: the likeliest one is right; accuracy_norm: the
               likeliest per byte. Calibration of the softmax over the choices' log-likelihoods
    cloze      accuracy: greedy decoding finds the word; perplexity: exp of the words' mean negative log-likelihood
    text       every token once, in windows of the context: loss per token, perplexity, and bits per byte, which alone
               compares models of different tokenizers
    classify   log-likelihood of each label after the text: accuracy, F1, calibration
    qa, translate, summarize   greedy answers: exact match, F1 of words; BLEU; ROUGE-L. The best of several references

With `shots` the first items of a set are answered examples before every question, and are not scored themselves.
Sources: Brown et al., "Language models are few-shot learners" (2020), section 2.4; Zellers et al., "HellaSwag" (2019);
Paperno et al., "LAMBADA" (2016).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gptdist.errors import UserError
from gptdist.evaluate import classification
from gptdist.evaluate.calibration import calibration
from gptdist.evaluate.embedded_sets import GROUP, SETS, embedded_set
from gptdist.evaluate.items import KINDS, Item, TaskSet, read_task
from gptdist.evaluate.scorer import Request, Score, Scorer
from gptdist.evaluate.text_metrics import bleu, exact_match, rouge_l, token_f1
from gptdist.generate import few_shot_prompt

# How a question and its answer are written. A generated answer ends where what follows {output} begins.
TEMPLATES = {
    "choice": "{input} {output}\n\n",
    "classify": "Text: {input}\nLabel: {output}\n\n",
    "qa": "Question: {input}\nAnswer: {output}\n",
    "translate": "Source: {input}\nTranslation: {output}\n",
    "summarize": "Text: {input}\nSummary: {output}\n\n",
}
UNPROMPTED = ("cloze", "text")  # these are texts as they are


@dataclass(frozen=True, kw_only=True)
class Options:
    """How tasks are asked. limit: of the items scored, 0: all. template: in place of that of TEMPLATES."""

    shots: int = 0
    limit: int = 0
    template: str | None = None
    max_new_tokens: int = 48
    skip_bad: bool = False

    def __post_init__(self) -> None:
        for name, least in (("shots", 0), ("limit", 0), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if self.template is not None and not ("{input}" in self.template and "{output}" in self.template):
            raise UserError(f"template {self.template!r} needs both {{input}} and {{output}}")


def open_tasks(names: Iterable[str], *, skip_bad: bool = False) -> list[TaskSet]:
    """The sets that the words of --tasks mean: stdlib (all embedded ones), stdlib-NAME, FILE or KIND=FILE."""
    tasks = []
    for name in names:
        kind, equals, path = name.partition("=")
        if name == GROUP:
            tasks += map(embedded_set, SETS)
        elif name in SETS:
            tasks.append(embedded_set(name))
        elif equals and kind.isidentifier():
            tasks.append(read_task(path, kind, skip_bad=skip_bad))
        elif name.startswith(f"{GROUP}-"):
            raise UserError(f"no embedded set is called {name}, expected {GROUP}, {', '.join(SETS)}")
        else:
            tasks.append(read_task(name, skip_bad=skip_bad))
    taken = [task.name for task in tasks]
    if twice := next((name for name in taken if taken.count(name) > 1), None):
        raise UserError(f"two tasks are called {twice}: give every file a name of its own")
    return tasks


def run_task(scorer: Scorer, task: TaskSet, options: Options) -> dict[str, Any]:
    """{"task", "kind", "n", "skipped", "truncated", "metrics": {name: value}, ...}; a collective call.

    skipped: lines that were no items, and items that do not fit (with options.skip_bad). truncated: contexts cut from
    the left to fit. Raises UserError as Asked does.
    """
    asked = Asked(scorer, task, options)
    measured = MEASURES[task.kind](asked)
    result = {"task": task.name, "kind": task.kind, "n": len(asked.items), "skipped": asked.skipped,
              "truncated": asked.truncated, "shots": len(asked.examples), **measured}
    return result | ({"first_skipped": asked.first_skipped} if asked.first_skipped else {})


class Asked:
    """A set's items in their prompts, in tokens.

    Raises UserError for a set that is too small, and for an item that the tokenizer cannot encode or one of whose
    answers is longer than the context, with its file and line; with options.skip_bad such items are counted, and one
    has to be left.
    """

    def __init__(self, scorer: Scorer, task: TaskSet, options: Options):
        shots = 0 if task.kind in UNPROMPTED else options.shots
        if len(task.items) <= shots:
            raise UserError(f"{task.name} has {len(task.items)} items, expected more than the {shots} of --shots")
        self.scorer, self.options, self.kind = scorer, options, task.kind
        self._encoded: dict[str, list[int]] = {}
        self.examples = [{"input": item.query, "output": item.answer} for item in task.items[:shots]]
        self.template = None if task.kind in UNPROMPTED else options.template or TEMPLATES[task.kind]
        self.skipped, self.first_skipped, self.truncated = task.skipped, task.first_skipped, 0
        items = task.items[shots:][:options.limit or None]
        self.labels = sorted({item.answer for item in task.items}) if task.kind == "classify" else []
        if len(self.labels) == 1:
            raise UserError(f"{task.name}: all texts have the label {self.labels[0]}, expected two labels or more")
        self.items = [item for item in items if self._fits(item)]
        if not self.items:
            raise UserError(f"{task.name}: no item is left to score: {self.first_skipped}")

    def _fits(self, item: Item) -> bool:
        fault = self._fault(item)
        if fault is None:
            return True
        if not self.options.skip_bad:
            raise UserError(f"{fault}; remove the item, or count such ones with --skip-bad")
        self.skipped, self.first_skipped = self.skipped + 1, self.first_skipped or fault
        return False

    def _fault(self, item: Item) -> str | None:
        """Why an item cannot be asked: a text that the tokenizer does not have, or an answer that is too long."""
        try:
            self.encode(self.prompt(item))
            longest = max((len(self.encode(self.after(item, text))) for text in self.choices(item)), default=0)
        except UserError as error:
            return f"{item.where}: {error}"
        context = self.scorer.model.context
        if longest > context:
            return f"{item.where}: an answer has {longest} tokens, the model's context {context}"
        return None

    def choices(self, item: Item) -> Sequence[str]:
        """The texts whose log-likelihoods are wanted after the prompt; none of a kind whose answers are generated."""
        return {"choice": item.choices, "cloze": item.answers[:1], "classify": self.labels}.get(self.kind, ())

    def after(self, item: Item, choice: str) -> str:
        """A choice as it stands after the prompt: with a space where none is yet."""
        return choice if self.prompt(item)[-1:].isspace() else f" {choice}"

    def encode(self, text: str) -> list[int]:
        if text not in self._encoded:
            self._encoded[text] = self.scorer.tokenizer.encode(text)
        return self._encoded[text]

    def prompt(self, item: Item) -> str:
        """Examples and the question, up to where the answer begins."""
        if self.template is None or (self.template == TEMPLATES["choice"] and not self.examples):
            return item.query
        return few_shot_prompt(self.examples, item.query, self.template)

    def scores(self, *, greedy: bool = False) -> list[list[Score]]:
        """The score of each choice of each item."""
        requests = []
        for item in self.items:
            context = self.encode(self.prompt(item))
            own = [Request(context, self.encode(self.after(item, choice))) for choice in self.choices(item)]
            self.truncated += any(map(self.scorer.is_cut, own))
            requests += own
        found = iter(self.scorer.score(requests, greedy=greedy))
        return [[next(found) for _ in self.choices(item)] for item in self.items]

    def likelihoods(self) -> list[list[float]]:
        """Log-likelihood of each choice of each item, in nats."""
        return [[score.logprob for score in row] for row in self.scores()]

    def generated(self) -> list[str]:
        """The answers that the model writes."""
        stop = self.template.partition("{output}")[2] or "\n"
        prompts = [self.encode(self.prompt(item)) for item in self.items]
        self.truncated = sum(len(prompt) > self.scorer.room(self.options.max_new_tokens) for prompt in prompts)
        texts = self.scorer.continue_greedily(prompts, max_new_tokens=self.options.max_new_tokens, stop=(stop,))
        return [text.strip() for text in texts]


# Measures


def _choice(asked: Asked) -> dict[str, Any]:
    scores = asked.likelihoods()
    per_byte = [[score / len(choice.encode()) for score, choice in zip(row, item.choices, strict=True)]
                for row, item in zip(scores, asked.items, strict=True)]
    answers = [item.choices.index(item.answer) for item in asked.items]
    calibrated = calibration([_softmax(row) for row in scores], answers)
    chance = sum(1 / len(item.choices) for item in asked.items) / len(asked.items)
    return {"metrics": {**_accuracy("accuracy", scores, answers), **_accuracy("accuracy_norm", per_byte, answers),
                        "chance": chance, "ece": calibrated["ece"], "brier": calibrated["brier"]},
            "reliability": calibrated["reliability"]}


def _accuracy(name: str, scores: Sequence[Sequence[float]], answers: Sequence[int]) -> dict[str, float]:
    hits = [_best(row) == answer for row, answer in zip(scores, answers, strict=True)]
    return {name: _mean(hits), f"{name}_stderr": _stderr(hits)}


def _cloze(asked: Asked) -> dict[str, Any]:
    scores = [score for (score,) in asked.scores(greedy=True)]
    hits = [score.greedy for score in scores]
    return {"metrics": {"accuracy": _mean(hits), "accuracy_stderr": _stderr(hits),
                        "perplexity": _exp(-_mean([score.logprob for score in scores]))}}


def _text(asked: Asked) -> dict[str, Any]:
    requests, n_bytes = [], 0
    for item in asked.items:
        requests += rolling(asked.encode(item.query), asked.scorer)
        n_bytes += len(item.query.encode())
    nats = -sum(score.logprob for score in asked.scorer.score(requests))
    tokens = sum(len(request.continuation) for request in requests)
    return {"metrics": {"loss": nats / tokens, "perplexity": _exp(nats / tokens),
                        "bits_per_byte": nats / math.log(2) / n_bytes}, "tokens": tokens, "bytes": n_bytes}


def rolling(tokens: Sequence[int], scorer: Scorer) -> list[Request]:
    """Requests that score every token once, in windows of the context; the first token comes after a text's end.

    The last window has what fits before it as context, as lm-evaluation-harness has it.
    """
    size = scorer.model.context
    before = [scorer.tokenizer.eot, *tokens]
    windows = [(i, min(i + size, len(tokens))) for i in range(0, len(tokens), size)]
    return [Request(before[max(0, stop - size):start + 1], tokens[start:stop]) for start, stop in windows]


def _classify(asked: Asked) -> dict[str, Any]:
    labels, scores = asked.labels, asked.likelihoods()
    return label_scores([_softmax(row) for row in scores], [labels.index(item.answer) for item in asked.items], labels)


def label_scores(probabilities: Sequence[Sequence[float]], answers: Sequence[int],
                 labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy, macro F1 and calibration of predicted labels, with the confusion matrix and the reliability table."""
    confusion = torch.zeros(len(labels), len(labels), dtype=torch.int64)
    for row, answer in zip(probabilities, answers, strict=True):
        confusion[answer, _best(row)] += 1
    found = classification.scores(confusion, labels)
    calibrated = calibration(probabilities, answers)
    hits = [_best(row) == answer for row, answer in zip(probabilities, answers, strict=True)]
    return {"metrics": {"accuracy": found["accuracy"], "accuracy_stderr": _stderr(hits), "macro_f1": found["macro_f1"],
                        "ece": calibrated["ece"], "brier": calibrated["brier"]},
            "classes": found["classes"], "confusion": found["confusion"], "reliability": calibrated["reliability"]}


def _qa(asked: Asked) -> dict[str, Any]:
    texts = asked.generated()
    return {"metrics": {"exact_match": _best_of(exact_match, texts, asked), "f1": _best_of(token_f1, texts, asked)},
            **_sample(texts, asked)}


def _translate(asked: Asked) -> dict[str, Any]:
    texts = asked.generated()
    return {"metrics": {"bleu": bleu(texts, [item.answers for item in asked.items]),
                        "exact_match": _best_of(exact_match, texts, asked)}, **_sample(texts, asked)}


def _summarize(asked: Asked) -> dict[str, Any]:
    texts = asked.generated()
    return {"metrics": {"rouge_l": _best_of(rouge_l, texts, asked)}, **_sample(texts, asked)}


MEASURES: dict[str, Callable[[Asked], dict[str, Any]]] = {
    "choice": _choice, "cloze": _cloze, "text": _text, "classify": _classify, "qa": _qa, "translate": _translate,
    "summarize": _summarize}
assert MEASURES.keys() == KINDS.keys()


def _best_of(metric: Callable[[str, str], float], texts: Sequence[str], asked: Asked) -> float:
    return _mean([max(metric(text, reference) for reference in item.answers)
                  for text, item in zip(texts, asked.items, strict=True)])


def _sample(texts: Sequence[str], asked: Asked) -> dict[str, Any]:
    """The first answer, to see what the figures mean."""
    item = asked.items[0]
    return {"sample": {"query": item.query, "answer": texts[0], "reference": item.answer}}


def _softmax(scores: Sequence[float]) -> list[float]:
    return torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _stderr(hits: Sequence[float]) -> float:
    """Standard error of a mean of zeros and ones; 0 for a single one."""
    p, n = _mean(hits), len(hits)
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else 0.0


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))


def main_metrics(result: dict[str, Any]) -> dict[str, float]:
    """The figures of a task by which a run is followed, named TASK/METRIC."""
    return {f"{result['task']}/{name}": float(value) for name, value in result["metrics"].items()
            if not name.endswith("_stderr") and name != "chance"}
