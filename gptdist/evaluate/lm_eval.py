"""EleutherAI's lm-evaluation-harness on a checkpoint, through the harness' model interface; needs its package.

The harness makes the requests and the figures; the scorer answers, under any strategy. Every process of a run gives the
harness all requests and gets all answers, the scorer divides the work: to the harness each is the only one.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptdist.errors import MissingError, UserError
from gptdist.evaluate.scorer import Request, Scorer
from gptdist.evaluate.suite import rolling

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate as harness
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise MissingError(f"--lm-eval needs the lm-evaluation-harness ({error}): pip install lm_eval") from error

DEFAULT_MAX_NEW_TOKENS = 256  # as the harness' own models have it
FEWSHOT_SEED = 1234  # the harness' own


class HarnessModel(LM):
    """A scorer as the harness sees a model."""

    def __init__(self, scorer: Scorer):
        super().__init__()
        self.scorer = scorer

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each (context, continuation)."""
        pairs = [self._pair(*request.args) for request in requests]
        return [(score.logprob, score.greedy) for score in self.scorer.score(pairs, greedy=True)]

    def _pair(self, context: str, continuation: str) -> Request:
        """As the harness' own models divide a text: spaces between the two belong to the continuation."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        encode = self.scorer.tokenizer.encode
        before = encode(context)
        after = encode(context + continuation)[len(before):] if context else encode(continuation)
        return Request(before, after[-self.scorer.model.context:])

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihood in nats of each whole text after the end of another one."""
        texts = [rolling(self.scorer.tokenizer.encode(request.args[0]), self.scorer) for request in requests]
        scores = iter(self.scorer.score([window for windows in texts for window in windows]))
        return [sum(next(scores).logprob for _ in windows) for windows in texts]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The greedy continuation of each context up to one of its stop strings."""
        groups: dict[tuple, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[_how(request.args[1])].append(i)
        texts: dict[int, str] = {}
        for (stop, max_new_tokens), numbers in groups.items():
            prompts = [self.scorer.tokenizer.encode(requests[i].args[0]) for i in numbers]
            texts |= zip(numbers, self.scorer.continue_greedily(
                prompts, max_new_tokens=min(max_new_tokens, self.scorer.model.context), stop=stop), strict=True)
        return [texts[i] for i in range(len(requests))]


def _how(options: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """(stop strings, most new tokens) of a request's generation options."""
    if options.get("do_sample") and options.get("temperature", 1.0) > 0:
        raise UserError("a harness task asks for sampled answers (do_sample), this model gives greedy ones: set "
                        "do_sample: false in the task's generation_kwargs")
    until = options.get("until") or ()
    return tuple([until] if isinstance(until, str) else until), options.get("max_gen_toks", DEFAULT_MAX_NEW_TOKENS)


def run_harness(scorer: Scorer, tasks: Sequence[str], *, include_path: str | None = None, shots: int | None = None,
                limit: int = 0) -> list[dict[str, Any]]:
    """A result as suite.run_task's for each task that the harness knows, or that include_path has as YAML.

    Empty in all processes of a node but the first. Raises UserError for a task that neither knows.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"--include-path {include_path} is no directory, expected one of task files (.yaml)")
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    if include_path is not None and not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include_path)  # reads thousands of files
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UserError(f"the harness knows no task {unknown[0]!r}: look at `lm_eval ls tasks`, or name the directory "
                        f"of its YAML with --include-path")
    loaded = manager.load(list(tasks))
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        own = task.get_config("num_fewshot")
        if own is None or (shots is not None and own != 0):  # 0: the task takes none
            task.set_config(key="num_fewshot", value=shots or 0)
    found = harness(HarnessModel(scorer), loaded, limit=limit or None, bootstrap_iters=0, log_samples=False)
    if found is None:  # it gives the figures to the first process of a node alone
        return []
    return [{"task": name, "kind": "lm_eval", "n": found["n-samples"][name]["effective"], "skipped": 0, "truncated": 0,
             "metrics": _metrics(values)} for name, values in found["results"].items() if name in found["n-samples"]]


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """{metric: value} of the harness' {"metric,filter": value}."""
    plain = {name.removesuffix(",none").replace(",", "/"): value for name, value in values.items() if "," in name}
    return {name: float(value) for name, value in plain.items()
            if isinstance(value, int | float) and "_stderr" not in name}
