"""Is the assistant better than the base model that it was made from? Both answer questions in words that neither saw.

    python -m benchmarks.assistant runs/quickstart runs/assistant

The questions are the held-out ones of gptdist.data.questions, of the set that the assistant was trained on: about names
that it knows, in other words ("phrasings"), and about names that it never saw ("names"). The base model gets the
question and a line break, and its answer is the first line that has something on it; the assistant gets its template.
Answers are greedy, scored by exact match and ROUGE-L.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from gptdist.checkpoint import layout
from gptdist.checkpoint.restore import load_model, read_config
from gptdist.checkpoint.template import stored_template
from gptdist.data.instructions import Conversation
from gptdist.data.questions import python_questions
from gptdist.data.templates import encode
from gptdist.evaluate.text_metrics import score_texts
from gptdist.generate import Generator, Sampling


def answers(checkpoint: Path, questions: list[Conversation], sampling: Sampling) -> list[str]:
    """What a base model, or one with a template, says to each question."""
    model, tokenizer, _ = load_model(checkpoint, verify=False)
    template, generator = stored_template(checkpoint), Generator(model, tokenizer)
    if template is None:
        texts = [f"{question.turns[0].text}\n" for question in questions]
        return [done.text.strip().partition("\n")[0] for done in generator.generate(texts, sampling, batch_size=32)]
    prompts = [encode(template.render(question.question()), tokenizer)[0] for question in questions]
    sampling = dataclasses.replace(sampling, stop=template.stops)
    return [done.text for done in generator.generate(prompts, sampling, batch_size=32)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="checkpoint or run of the base model")
    parser.add_argument("tuned", help="checkpoint or run of the assistant")
    parser.add_argument("--questions", type=int, default=100, help="of each kind, at most (default: %(default)s)")
    parser.add_argument("--show", type=int, default=4, help="known names whose answers are printed (default: "
                                                            "%(default)s)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    checkpoints = {name: layout.resolve(path, "latest") for name, path in (("base", args.base), ("tuned", args.tuned))}
    asked = python_questions(read_config(checkpoints["tuned"]).instruct.questions)
    kinds = {"phrasings": asked.phrasings[:args.questions], "names": asked.names[:args.questions]}
    sampling = Sampling(max_new_tokens=60, temperature=0)
    rows, said = [], {}
    for kind, questions in kinds.items():
        for name, checkpoint in checkpoints.items():
            said[kind, name] = answers(checkpoint, questions, sampling)
            scores = score_texts(said[kind, name], [c.answer for c in questions])
            rows.append({"held_out": kind, "model": name} | dataclasses.asdict(scores))
    if args.json:
        print(json.dumps(rows))
        return 0
    for i, question in enumerate(kinds["phrasings"][:args.show]):
        print(f"> {question.turns[0].text}")
        for name in checkpoints:
            print(f"  {name:6} {said['phrasings', name][i]}")
    print(f"\n{'held-out':10} {'model':6} {'questions':>9} {'exact match':>11} {'ROUGE-L':>8}")
    for row in rows:
        print(f"{row['held_out']:10} {row['model']:6} {row['n']:9} {row['exact_match']:11.1%} "
              f"{row['rouge_l']:8.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
