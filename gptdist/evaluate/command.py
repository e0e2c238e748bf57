"""`gptdist evaluate`: one process of it, from its arguments to its exit code; and how results are shown."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gptdist.checkpoint.ranks import Ranks
from gptdist.checkpoint.restore import read_config
from gptdist.errors import EXIT_DONE, ActionableError, UserError
from gptdist.evaluate import classification
from gptdist.evaluate.calibration import print_reliability
from gptdist.evaluate.scorer import open_scorer, open_world
from gptdist.evaluate.suite import Options, open_tasks, run_task
from gptdist.parallel.world import end_process, env_rank, env_world_size

MAIN_RANK_FIRST_S = 2  # how long the other ranks stay after an error that rank 0 prints


def evaluate(args: argparse.Namespace, find: Callable[[], Path], device: str) -> int:
    """Evaluate the checkpoint that `find` names. Does not return where a launcher started several processes."""
    if env_world_size() == 1:
        return _evaluate(args, find, device)
    try:
        open_world(args.strategy, device)  # joins the process group, in which errors are agreed upon
        code = _evaluate(args, find, device)
    except ActionableError as error:
        code = error.exit_code
        if env_rank() == 0 or not error.agreed:
            print(f"gptdist evaluate: {error}", file=sys.stderr)
        else:
            time.sleep(MAIN_RANK_FIRST_S)
    return end_process(code)


def _evaluate(args: argparse.Namespace, find: Callable[[], Path], device: str) -> int:
    checkpoint = Ranks(None).on_coordinator(find)
    how = dict(strategy=args.strategy, device=device, precision=args.precision, verify=args.verify)
    is_classifier = Ranks(None).on_coordinator(lambda: read_config(checkpoint)).task.name == "classify"
    Ranks(None).on_all(lambda: _refuse_ignored(args, is_classifier))
    if is_classifier:
        from gptdist.evaluate.classifier import evaluate_classifier

        return _show(args, checkpoint, evaluate_classifier(checkpoint, args.tasks or (), **how))
    if args.lm_eval:
        return _show(args, checkpoint, _run_harness(args, checkpoint, how))
    if args.tasks:
        return _show(args, checkpoint, _run_tasks(args, checkpoint, how))
    from gptdist.evaluate.perplexity import evaluate_checkpoint

    result = evaluate_checkpoint(checkpoint, args.data, bigram=args.bigram, **how)
    if env_rank() == 0:
        _show_held_out(args, result)
    return EXIT_DONE


def _refuse_ignored(args: argparse.Namespace, is_classifier: bool) -> None:
    """Raise UserError for an option that this evaluation would not look at."""
    for name in ("limit", "shots"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} is {getattr(args, name)}, expected at least 0")
    given = {"--tasks": args.tasks, "--lm-eval": args.lm_eval, "--include-path": args.include_path,
             "--shots": args.shots, "--template": args.template, "--limit": args.limit,
             "--max-new-tokens": args.max_new_tokens != Options().max_new_tokens, "--skip-bad": args.skip_bad,
             "--data": args.data, "--bigram": args.bigram}
    what, used = "a classifier", {"--tasks"}
    if not is_classifier and args.lm_eval:
        what, used = "--lm-eval", {"--lm-eval", "--include-path", "--shots", "--limit"}
    elif not is_classifier and args.tasks:
        what, used = "--tasks", {"--tasks", "--shots", "--template", "--limit", "--max-new-tokens", "--skip-bad"}
    elif not is_classifier:
        what, used = "the held-out loss", {"--data", "--bigram"}
    if ignored := next((name for name, value in given.items() if value and name not in used), None):
        raise UserError(f"{ignored} has no effect on the evaluation of {what}: leave it out")


def _run_tasks(args: argparse.Namespace, checkpoint: Path, how: dict[str, Any]) -> list[dict[str, Any]]:
    ranks = Ranks(None)
    options, tasks = ranks.on_all(lambda: (_options(args), open_tasks(args.tasks, skip_bad=args.skip_bad)))
    scorer = open_scorer(checkpoint, **how, batch_tokens=args.batch_tokens)
    results = []
    for task in tasks:
        started = time.perf_counter()
        results.append(ranks.on_all(lambda task=task: run_task(scorer, task, options)))
        results[-1]["seconds"] = round(time.perf_counter() - started, 3)
    return results


def _options(args: argparse.Namespace) -> Options:
    return Options(shots=args.shots, limit=args.limit, template=args.template, max_new_tokens=args.max_new_tokens,
                   skip_bad=args.skip_bad)


def _run_harness(args: argparse.Namespace, checkpoint: Path, how: dict[str, Any]) -> list[dict[str, Any]]:
    from gptdist.evaluate.lm_eval import run_harness

    scorer = open_scorer(checkpoint, **how, batch_tokens=args.batch_tokens)
    return run_harness(scorer, args.lm_eval, include_path=args.include_path, shots=args.shots or None, limit=args.limit)


def _show(args: argparse.Namespace, checkpoint: Path, results: Sequence[dict[str, Any]]) -> int:
    if env_rank() != 0:
        return EXIT_DONE
    if args.json:
        print(json.dumps({"checkpoint": str(checkpoint), "tasks": list(results)}))
        return EXIT_DONE
    console = Console(highlight=False)
    print_results(console, results)
    for result in results:
        if result["kind"] == "classify":
            classification.print_scores(console, {"accuracy": result["metrics"]["accuracy"],
                                                  "macro_f1": result["metrics"]["macro_f1"], **result}, result["task"])
        if "reliability" in result:
            print_reliability(console, result["metrics"] | result, f"reliability on {result['task']}")
    return EXIT_DONE


def print_results(console: Console, results: Sequence[dict[str, Any]]) -> None:
    """A row a figure, with what was cut or left out."""
    table = Table()
    for column in ("task", "kind", "n", "metric", "value", "±"):
        table.add_column(column, justify="right" if column in ("n", "value", "±") else "left")
    for result in results:
        head = (result["task"], result["kind"], str(result["n"]))
        for name, value in result["metrics"].items():
            if not name.endswith("_stderr"):
                error = result["metrics"].get(f"{name}_stderr")
                table.add_row(*head, name, f"{value:.4f}", "" if error is None else f"{error:.4f}")
                head = ("", "", "")
    console.print(table)
    for result in results:
        if result["truncated"]:
            console.print(f"{result['task']}: {result['truncated']} prompts cut from the left to the model's context")
        if result["skipped"]:
            console.print(f"{result['task']}: {result['skipped']} bad items left out, the first: "
                          f"{result['first_skipped']}", soft_wrap=True)


def _show_held_out(args: argparse.Namespace, result: dict[str, Any]) -> None:
    if args.json:
        print(json.dumps(result))
        return
    print(f"checkpoint       {result['checkpoint']}")
    print(f"held-out loss    {result['loss']:.4f} nats per token (perplexity {result['perplexity']:.2f}, "
          f"{result['bits_per_byte']:.4f} bits per byte) over {result['targets']:,} tokens of {result['data']}")
    if args.bigram:
        print(f"bigram model     {result['bigram_loss']:.4f} nats per token ({result['bigram_smoothing']})")
        better = "better by" if result["margin"] >= 0 else "worse by "
        print(f"{better}        {abs(result['margin']):.4f} nats per token")
