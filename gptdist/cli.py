"""The command line: `gptdist COMMAND ...`, or `python -m gptdist COMMAND ...` for launchers."""

import argparse
import dataclasses
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from gptdist import __version__
from gptdist.errors import EXIT_DONE, EXIT_INTERRUPTED, ActionableError, MissingError, UserError

TRAIN_HELP = """\
Train a GPT from scratch. The configuration is a YAML file; every value can be overridden as --section.key=value
(`gptdist config --show` lists them all). The same command runs on

  one process         gptdist train configs/quickstart.yaml
  one node, N ranks   torchrun --nproc-per-node N -m gptdist train configs/quickstart.yaml
  several nodes       torchrun --nnodes M --nproc-per-node N --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
                        -m gptdist train configs/quickstart.yaml
  DeepSpeed's launcher  deepspeed --num_gpus N --module gptdist train configs/quickstart.yaml

Ctrl-C saves a checkpoint after the step under way and ends the run; started again, it goes on from the run's newest
complete checkpoint (checkpoint.resume). A configuration of another task, such as fine-tuning, runs as well."""

FINETUNE_HELP = """\
Fine-tune a model on examples, usually from a pretrained one (checkpoint.init_from: a checkpoint, a run's directory or
an imported model), whose architecture and tokenizer are taken. The configuration's task.name says what is learned:

  classify   a label for each text       gptdist finetune configs/classify-debug.yaml
  instruct   answers to instructions
  dpo        preferred answers

Everything else is as in `gptdist train`, the launchers too:

  torchrun --nproc-per-node N -m gptdist finetune configs/classify-debug.yaml
  deepspeed --num_gpus N --module gptdist finetune configs/classify-debug.yaml --parallel.strategy=zero2"""

CLASSIFY_HELP = """\
Label texts with a classifier that `gptdist finetune` trained (task.name=classify).

  gptdist classify runs/classify-spam --text "You have won a prize, call now"
  gptdist classify runs/classify-spam --file messages.txt --json       (a text a line; .csv, .tsv, .jsonl by field)"""

PREPARE_HELP = """\
Turn raw text into a dataset directory: clean, tokenize, split off held-out documents, write shards. Killed, the same
command goes on from where it was.

  gptdist prepare --input embedded --output data/embedded --tokenizer bpe:512
  gptdist prepare --input 'corpus/*.txt' more.jsonl.zst web/ --output data/mine --tokenizer gpt2-files/ \\
    --rules gopher lines --languages en --near-dedup 0.8 --scrub email phone ip
  gptdist prepare --config configs/corpus-python.yaml"""

EVALUATE_HELP = """\
Score a checkpoint. Without --tasks: loss on the held-out split of its data, with --bigram beside a bigram model.
A classifier (task.name=classify) is scored on its test texts, or on the labelled texts of --tasks.

  gptdist evaluate runs/quickstart --bigram
  gptdist evaluate runs/quickstart --tasks stdlib                        (sets made from Python's documentation)
  gptdist evaluate runs/gpt2 --tasks hellaswag.jsonl cloze=lambada.jsonl text=book.txt --json
  gptdist evaluate runs/gpt2 --tasks qa=questions.jsonl --shots 3
  torchrun --nproc-per-node N -m gptdist evaluate runs/gpt2 --tasks hellaswag.jsonl --strategy fsdp

Files are JSON objects, one a line, of a kind that their keys tell (gptdist/evaluate/items.py lists them)."""

SWEEP_HELP = """\
Train models of several sizes, each on a budget of tokens, and fit L = a + b C^-alpha to their final validation losses
over training compute. With --next the curve predicts that size's loss before it is trained, and the error is reported.
Every value of the configuration can be overridden as --section.key=value. Started again, it goes on.

  gptdist sweep configs/debug.yaml --sizes 32x1 64x2 96x3 --next 128x4 --tokens-per-parameter 5 --output runs/sweep"""

GENERATE_HELP = """\
Continue prompts with a trained model.

  gptdist generate runs/quickstart --prompt "The function returns" --temperature 0.8 --top-k 50
  gptdist generate runs/quickstart --prompts-file prompts.txt --json
  gptdist generate runs/quickstart --examples shots.jsonl --prompt "query"     (few-shot)"""

CHAT_HELP = """\
Talk with a model that was fine-tuned for instructions. On a terminal: /help lists the commands, Ctrl-C stops an answer,
Ctrl-D leaves. Over a pipe every line is a message, and the answers go to stdout.

  gptdist chat runs/instruct
  echo "What does shutil.copyfile do?" | gptdist chat runs/instruct --temperature 0"""

SERVE_HELP = """\
Serve a trained model over HTTP, with OpenAI's interface and a page to talk to it. Base models continue text, those that
were fine-tuned for instructions chat, classifiers label.

  gptdist serve runs/instruct                       then open http://127.0.0.1:8000
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "What does shutil.copyfile do?"}]}'

Clients that speak to OpenAI take base_url=http://127.0.0.1:8000/v1. Without --host only this machine can ask. Set
GPTDIST_API_KEY, or --api-key-file, and every request has to bring that key. Ctrl-C finishes running answers first."""

IMPORT_HELP = """\
Turn another program's GPT-2 into a checkpoint: weights and tokenizer, no optimizer (train on with
checkpoint.init_from). Nothing is downloaded, and no code in a file is run.

  gptdist import gpt2/ --output models/gpt2                                        (Hugging Face)
  gptdist import out/ckpt.pt --output models/mine --tokenizer gpt2-files/           (nanoGPT)
  gptdist import run/zero --output models/mine --config run/config.yaml             (DeepSpeed ZeRO)"""

EXPORT_HELP = """\
Write a checkpoint in another program's format.

  gptdist export runs/quickstart --format hf --output exported/                     (transformers)
  gptdist export runs/quickstart --format gguf --dtype fp16 --output model.gguf     (llama.cpp)
  gptdist export runs/lora --format peft --output adapter/                          (peft)

Adapters (lora.rank above 0) are merged into the weights; peft's format has them alone."""

PLAN_HELP = """\
What a run needs, before anything is booked: memory of each rank by part and if it fits, communication, time of a step,
MFU, tokens per day, cost; and the cheapest strategy, micro-batch and recomputation that fit. Nothing is built or run.

  gptdist plan configs/gpt2-124m.yaml --world-size 8 --device h100-80gb --price 2.5 --model.vocab_size=50257
  gptdist plan configs/quickstart.yaml --world-size 2 --device cpu --memory 4 --model.vocab_size=512

Values of the configuration are overridden as in `gptdist train`. Times are estimates: benchmarks/results/plan.md has
what they are fitted to and how far they are off elsewhere. Memory was measured on a CPU alone; each plan says whether
a run of its kind was.

The exit code is 0 also for a run that does not fit: that is an answer, printed, and memory.fits of --json. It is 2 for
what cannot be planned: an unknown device, processes that do not divide, a value out of range."""


DOCTOR_HELP = """\
Show this machine, and which kernels will run on it and why. With --distributed, under the launcher that will train,
compare all ranks in seconds: versions, configuration, data, clocks, and the bandwidth between them.

  gptdist doctor
  torchrun --nnodes M --nproc-per-node N --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
    -m gptdist doctor --distributed configs/quickstart.yaml

Its exit code is 0 also where something is missing on one machine; with --distributed 2 where the ranks do not go
together, each fault named, 3 where a rank lacks the device that the configuration asks for."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gptdist", description="Train GPT models, on a laptop or a cluster.")
    parser.add_argument("--version", action="version", version=f"gptdist {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_prepare(commands)
    _add_train(commands)
    _add_finetune(commands)
    _add_generate(commands)
    _add_chat(commands)
    _add_serve(commands)
    _add_classify(commands)
    _add_evaluate(commands)
    _add_contamination(commands)
    _add_sweep(commands)
    _add_plot(commands)
    _add_inspect(commands)
    _add_verify(commands)
    _add_import(commands)
    _add_export(commands)
    _add_config(commands)
    _add_plan(commands)
    _add_doctor(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _command(commands, name: str, run: Callable, help: str, description: str | None = None) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=description or help, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(run=run)
    return parser


def _add_checkpoint(parser: argparse.ArgumentParser, more: str = "", *, to_run: bool = False) -> None:
    parser.add_argument("checkpoint", help=f"a checkpoint directory, or a run directory (its latest one){more}")
    parser.add_argument("--which", choices=("latest", "best"), default="latest", help="which of a run's checkpoints")
    if to_run:
        parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
        parser.add_argument("--no-verify", dest="verify", action="store_false", help="do not check the sha256 first")


def _add_train(commands) -> None:
    parser = _command(commands, "train", run_train, "train a GPT from scratch", TRAIN_HELP)
    parser.add_argument("config", help="YAML configuration")


def _add_finetune(commands) -> None:
    parser = _command(commands, "finetune", run_train, "fine-tune a model: labels, instructions, preferences",
                      FINETUNE_HELP)
    parser.add_argument("config", help="YAML configuration")


def _add_classify(commands) -> None:
    parser = _command(commands, "classify", run_classify, "label texts with a trained classifier", CLASSIFY_HELP)
    _add_checkpoint(parser, to_run=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", action="append", help="a text (repeatable)")
    source.add_argument("--file", help="texts, one a line; .csv, .tsv, .jsonl: those of --text-field")
    parser.add_argument("--text-field", default="text", help="column or JSON field of the text (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="texts at a time (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="a JSON object a text, with all probabilities")


def _add_config(commands) -> None:
    parser = _command(commands, "config", run_config, "show the configuration: every field, its default, its meaning")
    parser.add_argument("config", nargs="?", help="a YAML file to check and show resolved; default: all defaults")
    parser.add_argument("--show", action="store_true", help="print it (the default action)")
    parser.add_argument("--deepspeed", action="store_true", help="print the DeepSpeed JSON that it means (zero1-3)")
    parser.add_argument("--processes", type=int, default=1, help="with --deepspeed: for this many (default: 1)")


def _add_plan(commands) -> None:
    parser = _command(commands, "plan", run_plan, "what a run will need: memory, time, cost; the cheapest that fits",
                      PLAN_HELP)
    parser.add_argument("config", help="YAML configuration")
    parser.add_argument("--world-size", type=int, required=True, metavar="N", help="processes, one for each device")
    parser.add_argument("--device", required=True, help="a100-40gb, a100-80gb, h100-80gb, h200-141gb, b200-180gb, "
                                                        "l40s-48gb, or cpu")
    parser.add_argument("--per-node", type=int, default=8, metavar="N", help="devices of a node (default: 8)")
    parser.add_argument("--memory", type=float, metavar="GB", help="of a device, in place of the table's")
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="of a device, in place of the table's")
    parser.add_argument("--intra-gbs", type=float, metavar="X", help="GB/s from a device to others of its node")
    parser.add_argument("--inter-gbs", type=float, metavar="X", help="GB/s from a device to other nodes")
    parser.add_argument("--price", type=float, metavar="X", help="of a device and hour, in any currency")
    parser.add_argument("--json", action="store_true", help="machine-readable output: bytes, seconds, FLOPs")


def _add_doctor(commands) -> None:
    parser = _command(commands, "doctor", run_doctor, "show this machine, and which kernels will run on it and why",
                      DOCTOR_HELP)
    parser.add_argument("config", nargs="?", help="with --distributed: YAML configuration that is going to be trained")
    parser.add_argument("--distributed", action="store_true",
                        help="under a launcher: every rank's versions, clock and data beside the others', and the "
                             "rates between them; exit code 2 where they do not go together")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def _add_inspect(commands) -> None:
    parser = _command(commands, "inspect", run_inspect, "show what a checkpoint holds")
    _add_checkpoint(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--verify", action="store_true", help="check every sha256")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def _add_verify(commands) -> None:
    parser = _command(commands, "verify", run_verify,
                      "check a checkpoint's checksums, keys, shapes, dtypes and values, or a dataset's checksums")
    _add_checkpoint(parser, "; or a prepared dataset or one of its splits")


def _add_import(commands) -> None:
    parser = _command(commands, "import", run_import, "turn another program's GPT-2 into a checkpoint", IMPORT_HELP)
    parser.add_argument("source", help="a Hugging Face or DeepSpeed directory, or nanoGPT's ckpt.pt or its directory")
    parser.add_argument("--output", required=True, help="checkpoint directory to create")
    parser.add_argument("--tokenizer", metavar="PATH",
                        help="the model's tokenizer, where none is beside it: a directory with tokenizer.json, with "
                             "vocab.json and merges.txt, or anything that `gptdist prepare --tokenizer` takes")
    parser.add_argument("--format", choices=("auto", "hf", "nanogpt", "deepspeed"), default="auto")
    parser.add_argument("--config", metavar="YAML", help="DeepSpeed: the run's configuration (default: config.yaml in "
                                                         "the directory or above)")


def _add_export(commands) -> None:
    parser = _command(commands, "export", run_export, "write a checkpoint in another program's format", EXPORT_HELP)
    _add_checkpoint(parser)
    parser.add_argument("--format", choices=("hf", "gguf", "peft"), required=True,
                        help="hf, peft: a directory; gguf: a file")
    parser.add_argument("--output", required=True, help="directory or file to create")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the weights written")
    parser.add_argument("--shard-size", default="5GB", help="hf: largest file, such as 500MB (default: %(default)s)")
    parser.add_argument("--without-adapters", dest="merge", action="store_false",
                        help="hf, gguf: leave adapters out: the base that --format peft is for")


def _add_evaluate(commands) -> None:
    parser = _command(commands, "evaluate", run_evaluate, "score a checkpoint: held-out loss, or evaluation tasks",
                      EVALUATE_HELP)
    _add_checkpoint(parser, to_run=True)
    parser.add_argument("--tasks", nargs="+", metavar="TASK",
                        help="stdlib, one of its sets such as stdlib-choice, FILE or KIND=FILE; kinds: choice, cloze, "
                             "text, classify, qa, translate, summarize")
    parser.add_argument("--lm-eval", nargs="+", metavar="TASK",
                        help="tasks of the lm-evaluation-harness (the extra `evaluate`), instead of --tasks")
    parser.add_argument("--include-path", metavar="DIR", help="--lm-eval: directory of further tasks as YAML")
    parser.add_argument("--shots", type=int, default=0,
                        help="the first items of a set are examples before every question (default: %(default)s)")
    parser.add_argument("--template", help="how a question and its answer are written, with {input} and {output}; "
                                           "default: by kind, such as 'Question: {input}\\nAnswer: {output}\\n'")
    parser.add_argument("--limit", type=int, default=0, help="items of each set that are scored; 0: all")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="of a generated answer (default: %(default)s)")
    parser.add_argument("--skip-bad", action="store_true", help="count bad lines and items instead of failing")
    parser.add_argument("--data", help="without --tasks: prepared dataset (default: the one it was trained on)")
    parser.add_argument("--bigram", action="store_true",
                        help="without --tasks: also the loss of a bigram model with its best smoothing")
    parser.add_argument("--strategy", default="auto",
                        choices=("auto", "single", "ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3"),
                        help="how the model is spread over the processes (default: single, fsdp under torchrun)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "auto"), default="fp32", help="of the computation")
    parser.add_argument("--batch-tokens", type=int, default=8192,
                        help="positions of a forward pass, padding included (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def _add_contamination(commands) -> None:
    parser = _command(commands, "contamination", run_contamination,
                      "how much of evaluation sets the training data has: n-grams of words in common")
    parser.add_argument("data", help="prepared dataset (its train/ is read), or one of its splits")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="as `gptdist evaluate --tasks`")
    parser.add_argument("--ngram", type=int, default=13, help="words in a row (default: %(default)s)")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad lines of the tasks out")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def _add_sweep(commands) -> None:
    parser = _command(commands, "sweep", run_sweep, "train small models, fit a loss-compute curve, predict the next",
                      SWEEP_HELP)
    parser.add_argument("config", help="YAML configuration that all sizes share")
    parser.add_argument("--sizes", nargs="+", required=True, metavar="WIDTHxLAYERS", help="three or more models")
    parser.add_argument("--next", metavar="WIDTHxLAYERS", help="predict this one's loss, then train it and compare")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--tokens-per-parameter", type=float, default=20.0,
                        help="tokens that each size sees, in its parameters (default: %(default)s)")
    budget.add_argument("--tokens", type=int, default=0, help="the same number of tokens for every size")
    parser.add_argument("--output", required=True, help="directory of the runs, sweep.json and sweep.png")
    parser.add_argument("--processes", type=int, default=1, help="of each run, started by torchrun (default: 1)")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def _add_plot(commands) -> None:
    parser = _command(commands, "plot", run_plot, "plot a run's loss curve as a PNG")
    parser.add_argument("run_dir", help="the run's directory (run.dir)")
    parser.add_argument("--output", help="PNG to write (default: RUN_DIR/loss.png)")
    parser.add_argument("--baseline", type=float, help="draw a horizontal line at this loss")


def _add_prepare(commands) -> None:
    parser = _command(commands, "prepare", run_prepare, "turn raw text into a dataset of tokens", PREPARE_HELP)
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--config", metavar="YAML", help="the settings below, by their long names (`min_chars: 200`)")
    parser.add_argument("--input", nargs="+", dest="inputs", metavar="PATH",
                        help="text, .jsonl or .parquet files (the first two also .gz, .bz2, .xz, .zst), directories, "
                             "globs, or the word `embedded`: the English that comes with Python (its topics and "
                             "docstrings, 2.2 MB). Each is a source of its own in the report")
    parser.add_argument("--output", help="directory to create: train/, val/, tokenizer/, report.json, report.html")
    parser.add_argument("--tokenizer",
                        help="bytes; char (the input's characters); gpt2; bpe:VOCAB (trained on the input); or a path: "
                             "a directory with encoder.json and vocab.bpe, a .tiktoken file, a prepared dataset or a "
                             "checkpoint's tokenizer/")
    parser.add_argument("--add-tokens", nargs="+", metavar="WORD",
                        help="words that become tokens of their own; a model of the tokenizer without them can go on "
                             "with the data (checkpoint.init_from): their embeddings begin as the mean of their parts'")
    parser.add_argument("--compare-tokenizer", metavar="TOKENIZER", help="one more for the report: bytes per token")
    parser.add_argument("--text-field", help="JSONL, Parquet: the field with the text (default: text)")
    parser.add_argument("--document-separator", metavar="TEXT",
                        help="plain text: `blank-line`, or a text such as <|endoftext|>; default: a file is a document")
    parser.add_argument("--max-document-chars", type=int,
                        help="cut longer plain-text documents at the next paragraph")
    parser.add_argument("--skip-bad", action=switch, help="count records that cannot be read instead of failing")
    parser.add_argument("--val-fraction", type=float, help="share of documents held out (default: 0.05)")
    parser.add_argument("--split", choices=("documents", "tail"),
                        help="what is held out: documents; or tail: the end of the text, by characters, the input "
                             "being one text without <|endoftext|>, unfiltered (default: documents)")
    parser.add_argument("--min-chars", type=int, help="drop shorter documents (default: 1)")
    parser.add_argument("--max-chars", type=int, help="drop longer documents (default: 0, off)")
    parser.add_argument("--rules", nargs="+", metavar="RULE",
                        help="quality rules: the groups gopher, c4, lines; a rule, RULE=LIMIT or RULE=off "
                             "(gptdist/data/quality.py lists them)")
    parser.add_argument("--languages", nargs="+", metavar="CODE",
                        help="keep these only, such as en; needs the extra `data`")
    parser.add_argument("--language-min", type=float, help="least probability of the language (default: 0.5)")
    parser.add_argument("--scrub", nargs="+", metavar="KIND", help="replace email, phone, ip by placeholders")
    parser.add_argument("--dedup", action=switch, help="drop exact duplicates (default: yes)")
    parser.add_argument("--near-dedup", type=float, metavar="LIKENESS",
                        help="drop near-duplicates from this likeness on, such as 0.8 (default: 0, off)")
    parser.add_argument("--near-dedup-memory-mb", type=int, help="a larger table is kept in a file (default: 1024)")
    parser.add_argument("--normalize", action=switch, help="Unicode NFC (default: yes)")
    parser.add_argument("--samples", type=int, help="dropped documents that the report shows of a filter (default: 5)")
    parser.add_argument("--workers", type=int, help="threads that tokenize (default: the cores)")
    parser.add_argument("--shard-tokens", type=int, help="tokens of a shard file")
    parser.add_argument("--overwrite", action="store_true", default=None,
                        help="replace an existing output directory, and what a killed run of other settings left")
    parser.add_argument("--seed", type=int, help="key of the held-out split (default: 0)")


def _add_generate(commands) -> None:
    parser = _command(commands, "generate", run_generate, "continue prompts with a trained model", GENERATE_HELP)
    _add_checkpoint(parser, to_run=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="text to continue")
    source.add_argument("--prompts-file", help="a prompt a line; .jsonl: a JSON string or {\"prompt\": ...} a line")
    parser.add_argument("--examples", help="few-shot: JSONL with input and output; the prompt is the query")
    parser.add_argument("--template", default="{input} -> {output}\n", help="few-shot: how an example is written")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the k likeliest tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this mass")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: repeat less")
    parser.add_argument("--stop", action="append", default=[], help="end where this text appears (repeatable)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of weights and cache")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts at a time (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="a JSON object a prompt instead of streamed text")


def _add_chat(commands) -> None:
    parser = _command(commands, "chat", run_chat, "talk with a model fine-tuned for instructions", CHAT_HELP)
    _add_checkpoint(parser, to_run=True)
    parser.add_argument("--system", help="system prompt (default: the template's)")
    parser.add_argument("--template", help="instead of the one the model was fine-tuned with: alpaca, phi3, chatml, a "
                                           "YAML file, or a text with {prompt} and {answer}")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of one answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: greedy (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the k likeliest tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=0.95,
                        help="sample from the likeliest tokens of this mass (default: %(default)s)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: repeat less")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of weights and cache")


def _add_serve(commands) -> None:
    parser = _command(commands, "serve", run_serve, "serve a model over HTTP, with a page to talk to it", SERVE_HELP)
    _add_checkpoint(parser, to_run=True)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: every machine that reaches "
                                                            "this one can ask (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one (default: %(default)s)")
    parser.add_argument("--name", help="what clients call the model (default: that of its run)")
    parser.add_argument("--template", help="instead of the one the model was fine-tuned with: see `gptdist chat`")
    parser.add_argument("--api-key-file", metavar="FILE", help="its first line is the key that every request has to "
                                                               "bring (default: GPTDIST_API_KEY, or none)")
    parser.add_argument("--batch-size", type=int, default=32, help="answers computed together (default: %(default)s)")
    parser.add_argument("--cache-tokens", type=int, default=0, help="size of the key/value cache; default: 16 contexts")
    parser.add_argument("--queue", type=int, default=128, help="answers that may wait before clients are told to come "
                                                               "back later (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that one answer may take (default: "
                                                                     "%(default)s)")
    parser.add_argument("--send-timeout", type=float, default=60.0, help="seconds after which a client that reads "
                                                                         "nothing is cut off, on Linux (default: "
                                                                         "%(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of weights and cache")
    parser.add_argument("--open", dest="open_page", action="store_true", help="open the page in a browser")


def run_train(args: argparse.Namespace, overrides: list[str]) -> int:
    from gptdist.train_command import train

    return train(args.config, overrides, command=args.command, debug=args.debug)


def run_classify(args: argparse.Namespace) -> int:
    from gptdist.data.labelled import read_texts
    from gptdist.tasks.classify import Labeller

    texts = args.text or read_texts(args.file, text_field=args.text_field)
    labeller = Labeller(_checkpoint(args), device=_device(args.device), verify=args.verify)
    if truncated := labeller.truncated(texts):
        print(f"gptdist classify: {truncated} of {len(texts)} texts cut to the model's context of "
              f"{labeller.config.model.context} tokens", file=sys.stderr)
    for line in labeller.lines(texts, batch_size=args.batch_size):
        if args.json:
            print(json.dumps(line))
        else:
            print(f"{line['label']}\t{line['probability']:.4f}\t{' '.join(line['text'].split())}")
    return EXIT_DONE


def run_prepare(args: argparse.Namespace) -> int:
    from gptdist.data.prepare import prepare
    from gptdist.data.prepare_config import PrepareConfig, load_config
    from gptdist.data.progress import progress_bar

    names = [field.name for field in dataclasses.fields(PrepareConfig)]
    config = load_config(args.config, {name: value for name in names if (value := getattr(args, name)) is not None})
    with progress_bar() as progress:
        report = prepare(config, progress)
    for name, counts in report["filters"].items():
        print(f"{name}: {counts['documents_in']:,} -> {counts['documents_out']:,} documents, "
              f"{counts['characters_in']:,} -> {counts['characters_out']:,} characters")
    if bad := report["bad"]["count"]:
        print(f"bad: {bad:,} records left out, the first: {report['bad']['examples'][0]}")
    for source in report["sources"]:
        if source["documents"] == 0:
            print(f"{source['name']}: nothing is left of it")
    for split in ("train", "val"):
        if counts := report["split"].get(split):
            print(f"{split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens")
    print(f"{report['characters_per_token']:.2f} characters per token, "
          f"{report['speed']['tokens_per_s']:,.0f} tokens/s; report: {config.output}/report.html")
    return EXIT_DONE


def run_generate(args: argparse.Namespace) -> int:
    import torch

    from gptdist.checkpoint.restore import load_model
    from gptdist.generate import Generator, Sampling, few_shot_prompt, read_examples, read_prompts

    sampling = Sampling(max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
                        top_p=args.top_p, repetition_penalty=args.repetition_penalty, stop=tuple(args.stop),
                        seed=args.seed)
    prompts = [args.prompt] if args.prompts_file is None else read_prompts(args.prompts_file)
    if args.examples:
        examples = read_examples(args.examples)
        prompts = [few_shot_prompt(examples, prompt, args.template) for prompt in prompts]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model, tokenizer, _ = load_model(_checkpoint(args), device=_device(args.device), dtype=dtype, verify=args.verify)
    generator = Generator(model, tokenizer)
    _note_long_prompts(generator, prompts)
    if len(prompts) == 1 and not args.json:
        print(prompts[0], end="", flush=True)
        for text in generator.stream(prompts[0], sampling):
            print(text, end="", flush=True)
        print()
        return EXIT_DONE
    completions = generator.generate(prompts, sampling, batch_size=args.batch_size)
    for prompt, completion in zip(prompts, completions, strict=True):
        if args.json:
            print(json.dumps({"prompt": prompt, "completion": completion.text, "finish": completion.finish}))
        else:
            print(f"--- {prompt}\n{completion.text}\n")
    return EXIT_DONE


def run_chat(args: argparse.Namespace) -> int:
    import torch

    from gptdist.chat import Terminal, open_chat
    from gptdist.generate import Sampling

    sampling = Sampling(max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
                        top_p=args.top_p, repetition_penalty=args.repetition_penalty, seed=args.seed)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    Terminal(open_chat(_checkpoint(args), sampling, template=args.template, system=args.system,
                       device=_device(args.device), dtype=dtype, verify=args.verify)).run()
    return EXIT_DONE


def run_serve(args: argparse.Namespace) -> int:
    import torch

    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingError(f"the package {error.name} is not here: install the extra with `pip install "
                           f"'gptdist[serve]'`") from error
    from gptdist.serve.command import ServeOptions, serve
    from gptdist.serve.engine import Limits

    limits = Limits(rows=args.batch_size, cache_tokens=args.cache_tokens, queue=args.queue, timeout_s=args.timeout)
    serve(_checkpoint(args), ServeOptions(
        host=args.host, port=args.port, name=args.name, template=args.template, device=_device(args.device),
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype], verify=args.verify,
        open_page=args.open_page, api_key_file=args.api_key_file, send_timeout_s=args.send_timeout, limits=limits))
    return EXIT_DONE


def _note_long_prompts(generator, prompts: list[str]) -> None:
    context = generator.context
    lengths = [n for prompt in prompts if (n := len(generator.tokenizer.encode(prompt))) > context]
    if lengths:
        prompts_have = "a prompt has" if len(lengths) == 1 else f"{len(lengths)} prompts have up to"
        print(f"gptdist generate: {prompts_have} {max(lengths)} tokens, the context {context}: "
              f"only the last {max(1, context // 2)} are used", file=sys.stderr)


def _checkpoint(args: argparse.Namespace):
    """The checkpoint directory that the command's arguments mean; a note on stderr where one was passed over."""
    found, skipped = _choose(args)
    if skipped:
        print(f"gptdist {args.command}: using {found.name}, skipped {skipped}", file=sys.stderr)
    return found


def _choose(args: argparse.Namespace):
    """(checkpoint directory that the arguments mean, which one was passed over and why, or "").

    Incomplete directories matter after the latest one, and anywhere for the best one, which any of them might be.
    """
    from gptdist.checkpoint import layout

    found = layout.resolve(args.checkpoint, args.which)
    if found == Path(args.checkpoint):
        return found, ""
    skipped = [(path, why) for path, why in layout.scan(found.parent)[1]
               if args.which == "best" or layout.step_of(path) > layout.step_of(found)]
    if not skipped:
        return found, ""
    path, why = skipped[-1]
    others = f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""
    return found, f"{path.name}{others}: {why.removesuffix('; use another checkpoint')}"


def _device(name: str) -> str:
    import torch

    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]{0,3}))?", name):
        raise UserError(f"--device {name} is not supported: use cpu, cuda or cuda:N")
    if name == "cpu":
        return name
    if not torch.cuda.is_available():
        raise MissingError(f"--device {name}, but torch sees no GPU: see `gptdist doctor`, or use --device cpu")
    n_devices = torch.cuda.device_count()
    if int(name.partition(":")[2] or 0) >= n_devices:
        raise MissingError(f"--device {name}, but torch sees {n_devices} GPUs: use cuda:0 to cuda:{n_devices - 1}, "
                           f"or cpu")
    return name


def run_evaluate(args: argparse.Namespace) -> int:
    from gptdist.evaluate.command import evaluate

    if args.template is not None:
        args.template = args.template.replace("\\n", "\n")
    return evaluate(args, lambda: _checkpoint(args), _device(args.device))


def run_contamination(args: argparse.Namespace) -> int:
    from rich.console import Console

    from gptdist.evaluate.contamination import contamination, print_contamination
    from gptdist.evaluate.suite import open_tasks

    results = contamination(args.data, open_tasks(args.tasks, skip_bad=args.skip_bad), n=args.ngram)
    if args.json:
        print(json.dumps(results))
    else:
        print_contamination(Console(highlight=False), results, args.ngram)
    return EXIT_DONE


def run_sweep(args: argparse.Namespace, overrides: list[str]) -> int:
    from rich.console import Console

    from gptdist import sweep

    code, record = sweep.run_sweep(
        args.config, overrides, output=Path(args.output), sizes=args.sizes, next_size=args.next, tokens=args.tokens,
        tokens_per_parameter=args.tokens_per_parameter, processes=args.processes)
    if code == EXIT_DONE:
        if args.json:
            print(json.dumps(record))
        else:
            sweep.print_sweep(Console(highlight=False), record)
            print(f"{args.output}/sweep.json, {args.output}/sweep.png")
    return code


def run_plot(args: argparse.Namespace) -> int:
    from gptdist.metrics import plot_losses

    output = Path(args.output) if args.output else Path(args.run_dir) / "loss.png"
    plot_losses(Path(args.run_dir), output, args.baseline)
    print(output)
    return EXIT_DONE


def run_inspect(args: argparse.Namespace) -> int:
    from gptdist.checkpoint.inspect import describe, print_description

    description = describe(str(_checkpoint(args)), verify=args.verify)
    if args.json:
        print(json.dumps(description))
    else:
        print_description(description, tensors=args.tensors)
    return EXIT_DONE


def run_verify(args: argparse.Namespace) -> int:
    from gptdist.checkpoint.verify_values import verify_values
    from gptdist.data.format import find_splits, verify

    path = Path(args.checkpoint)
    splits = find_splits(path)
    if not splits:
        found, skipped = _choose(args)
        print(verify_values(found))
        if skipped:
            raise UserError(f"only {found.name} is all right, not {skipped}")
        return EXIT_DONE
    if path not in splits:  # a prepared dataset: its train/ has to be there, and a val/ has to be whole
        splits = [path / "train", *([path / "val"] if (path / "val").exists() else [])]
    for split in splits:
        verify(split)
        print(f"{split}: all right: every sha256, and all token ids are in the vocabulary")
    return EXIT_DONE


def run_import(args: argparse.Namespace) -> int:
    from gptdist.convert.importer import import_model

    done = import_model(args.source, args.output, tokenizer=args.tokenizer, format=args.format, config=args.config)
    print(f"{done.path}: {done.parameters:,} parameters from {done.format}, vocabulary {done.config.vocab_size}")
    if done.note:
        print(f"note: {done.note}")
    return EXIT_DONE


def run_export(args: argparse.Namespace) -> int:
    from gptdist.convert.exporter import export_model

    print(export_model(_checkpoint(args), args.output, format=args.format, dtype=args.dtype,
                       shard_size=args.shard_size, merge=args.merge))
    return EXIT_DONE


def run_config(args: argparse.Namespace, overrides: list[str]) -> int:
    from gptdist import config

    if args.deepspeed:
        import torch

        from gptdist.parallel.deepspeed_config import resolved_deepspeed_config
        from gptdist.parallel.host import has_bf16

        found = config.load(args.config, overrides)
        on_gpu = found.parallel.device != "cpu" and torch.cuda.is_available()
        train = found.train.resolved(has_bf16(torch.device("cuda" if on_gpu else "cpu")))
        found = dataclasses.replace(found, train=train)
        print(json.dumps(resolved_deepspeed_config(found, args.processes), indent=2))
    elif args.config is None and not overrides:
        print(config.show(), end="")
    else:
        print(config.to_yaml(config.load(args.config, overrides)), end="")
    return EXIT_DONE


def run_plan(args: argparse.Namespace, overrides: list[str]) -> int:
    from gptdist import config
    from gptdist.plan import make_plan, report
    from gptdist.plan.devices import find_device

    device = find_device(args.device, memory_gb=args.memory, peak_tflops=args.peak_tflops, intra_gbs=args.intra_gbs,
                         inter_gbs=args.inter_gbs)
    plan = make_plan(config.load(args.config, overrides), args.world_size, device, per_node=args.per_node,
                     price=args.price)
    print(report.run(plan, json=args.json))
    return EXIT_DONE


def run_doctor(args: argparse.Namespace, overrides: list[str]) -> int:
    if not args.distributed:
        from gptdist import doctor

        if args.config or overrides:
            raise UserError(f"{args.config or overrides[0]}: a configuration is for --distributed alone: add it, or "
                            f"leave the configuration out")
        return doctor.run(json=args.json)
    from gptdist import doctor_distributed
    from gptdist.parallel.world import end_process

    code = doctor_distributed.run(args.config, overrides, json=args.json)
    end_process(code)
    return code


TAKES_OVERRIDES = (run_train, run_config, run_plan, run_sweep, run_doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code. User errors are one line on stderr, without a traceback."""
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else list(argv)
    # DeepSpeed's launcher puts --local_rank=N before the command; the environment says the same.
    while argv and argv[0].startswith(("--local_rank=", "--local-rank=")):
        argv = argv[1:]
    args, rest = parser.parse_known_args(argv)
    if rest and args.run not in TAKES_OVERRIDES:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return args.run(args, rest) if args.run in TAKES_OVERRIDES else args.run(args)
    except ActionableError as error:
        if args.debug:
            traceback.print_exc()
        print(f"gptdist {args.command}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: not an error, and nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except KeyboardInterrupt:
        print(f"gptdist {args.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
