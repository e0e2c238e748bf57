"""Is the assistant better than the base model that it was made from? Both answer questions in words that neither saw.

    python -m benchmarks.assistant runs/quickstart runs/instruct

The questions are the held-out ones of gptdist.data.questions: about names that the assistant was trained on, in other
words ("phrasings"), and about names that it never saw ("names"). The base model gets the question and a line break, and
its answer ends at the next; the assistant gets its template. Answers are greedy, scored by exact match and ROUGE-L.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from gptdist.checkpoint import layout
from gptdist.checkpoint.restore import load_model
from gptdist.checkpoint.template import stored_template
from gptdist.data.instructions import Conversation
from gptdist.data.questions import python_questions
from gptdist.data.templates import encode
from gptdist.evaluate.text_metrics import score_texts
from gptdist.generate import Generator, Sampling


def answers(checkpoint: Path, questions: list[Conversation], sampling: Sampling) -> list[str]:
    """What a base model, or one with a template, says to each question."""
    model, tokenizer, _ = load_model(checkpoint, verify=False)
    template = stored_template(checkpoint)
    if template is None:
        prompts = [f"{question.turns[0].text}\n" for question in questions]
        stops = ("\n",)
    else:
        prompts = [encode(template.render(question.question()), tokenizer)[0] for question in questions]
        stops = template.stops
    completions = Generator(model, tokenizer).generate(prompts, dataclasses.replace(sampling, stop=stops))
    return [completion.text for completion in completions]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="checkpoint or run of the base model")
    parser.add_argument("tuned", help="checkpoint or run of the assistant")
    parser.add_argument("--questions", type=int, default=100, help="of each kind (default: %(default)s)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    held_out = python_questions()[1]
    kinds = {"phrasings": held_out[1::2][:args.questions], "names": held_out[0::2][:args.questions]}
    checkpoints = {name: layout.resolve(path, "latest") for name, path in (("base", args.base), ("tuned", args.tuned))}
    sampling = Sampling(max_new_tokens=60, temperature=0)
    rows = []
    for kind, questions in kinds.items():
        for name, checkpoint in checkpoints.items():
            scores = score_texts(answers(checkpoint, questions, sampling), [c.answer for c in questions])
            rows.append({"held_out": kind, "model": name} | dataclasses.asdict(scores))
    if args.json:
        print(json.dumps(rows))
        return 0
    print(f"{'held-out':10} {'model':6} {'exact match':>11} {'ROUGE-L':>8}   of {len(kinds['names'])} questions each")
    for row in rows:
        print(f"{row['held_out']:10} {row['model']:6} {row['exact_match']:11.1%} {row['rouge_l']:8.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
