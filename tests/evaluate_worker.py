"""A job of two processes (conftest.Workers): every kind of task under every strategy; rank 0 writes the results."""

import json
import os
from pathlib import Path

from gptdist.evaluate.perplexity import evaluate_checkpoint
from gptdist.evaluate.scorer import open_scorer
from gptdist.evaluate.suite import Options, open_tasks, run_task

STRATEGIES = ("ddp", "fsdp", "zero2", "zero3")
OPTIONS = Options(shots=1, max_new_tokens=8)


def main(checkpoint: Path, tasks: Path, out: Path) -> None:
    results = {strategy: run_all(checkpoint, tasks, strategy) for strategy in STRATEGIES}
    results["held-out"] = evaluate_checkpoint(checkpoint, None, strategy="fsdp", bigram=True)
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(results))


def run_all(checkpoint: Path, tasks: Path, strategy: str, **how) -> dict[str, dict[str, float]]:
    scorer = open_scorer(checkpoint, strategy=strategy, **how)
    found = open_tasks(f"{path.stem}={path}" for path in sorted(tasks.glob("*.jsonl")))
    return {task.name: run_task(scorer, task, OPTIONS)["metrics"] for task in found}
