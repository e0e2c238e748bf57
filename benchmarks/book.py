"""Every stage of Raschka's "Build a Large Language Model (From Scratch)" (2024) that runs here, beside its values.

    python -m benchmarks.book --data DIR [--weights DIR] [--only STAGE ...] [--again STAGE ...] [--long]
                              [--output FILE.md] [--work DIR]

--data (or GPTDIST_DATA) has the-verdict.txt, SMSSpamCollection, and gpt2/ with encoder.json and vocab.bpe; --weights is
a Hugging Face directory of GPT-2 124M. Training goes through `gptdist prepare`, `train` and `finetune`, with the book's
settings. A finished stage is kept in WORK/book.json and not run again (--again does), an interrupted one goes on from
its checkpoints; WORK needs 5 GB for each model of 124M. The table has every stage, also those that have not run. The
exit code is 1 where a value is outside its band or a stage failed.

Bands: counts exact; losses before training, and those that end below 0.05, within 0.05; other losses after it, or the
updates until a falling one is reached, within 15%; accuracies within 2 points, of the median of three seeds.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.tokenize import describe
from gptdist import config as config_module
from gptdist import lora, ops
from gptdist.checkpoint import layout
from gptdist.checkpoint.restore import load_model
from gptdist.checkpoint.shards import Part
from gptdist.checkpoint.stream import write_checkpoint
from gptdist.config import Config, ModelConfig
from gptdist.convert.gpt2 import to_checkpoint
from gptdist.convert.importer import checkpoint_files
from gptdist.data.answers import Answered, row_of
from gptdist.data.examples import ExampleSource
from gptdist.data.loader import IGNORED, PretrainSource
from gptdist.data.tokenizer import GPT2_PATTERN, Tokenizer, build_tokenizer, extend
from gptdist.files import replace_text
from gptdist.generate import Generator, Sampling, few_shot_prompt, filter_logits
from gptdist.metrics import read_rows
from gptdist.model import build, build_meta, parameter_count
from gptdist.ops.backends import choose
from gptdist.ops.random import keep_mask
from gptdist.parallel.init import fill_initial_values
from gptdist.tasks.classify import encode, load_splits
from gptdist.tasks.pretrain import held_out_sums, open_data, validation_batches

ROOT = Path(__file__).resolve().parent.parent
VERDICT, SPAM, GPT2 = "the-verdict.txt", "SMSSpamCollection", "gpt2"  # what --data has
INITIAL, FINAL, ACCURACY = 0.05, 0.15, 0.02  # bands: nats, share of the value, share of the texts
SAME = 1e-5  # losses in fp32 whose sums are in another order
SEEDS = (123, 124, 125)

# Verdicts. DIFFERS: a setting of the book that no configuration gives.
OK, OUTSIDE, DIFFERS = "ok", "outside the band", "cannot be set"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    expected: str
    got: str
    verdict: str


def exact(what: str, expected: Any, got: Any) -> Row:
    return Row(what, _shown(expected), _shown(got), OK if got == expected else OUTSIDE)


def holds(what: str, got: bool) -> Row:
    return Row(what, "yes", "yes" if got else "no", OK if got else OUTSIDE)


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def near(what: str, expected: float, got: float, *, absolute: float = 0.0, share: float = 0.0,
         form: str = ".3f") -> Row:
    """Within `absolute`, or within that share of the expected value; a nan is outside."""
    band = absolute + share * abs(expected)
    return Row(what, f"{expected:{form}} ± {band:.2g}", f"{got:{form}}", OK if abs(got - expected) <= band else OUTSIDE)


def at_most(what: str, bound: float, got: float) -> Row:
    return Row(what, f"at most {bound:.0e}", f"{got:.1e}", OK if got <= bound else OUTSIDE)


def accuracy(what: str, expected: float, got: Sequence[float]) -> Row:
    """The median of several seeds."""
    row = near(f"{what}, median of {len(got)} seeds", expected, statistics.median(got), absolute=ACCURACY, form=".2%")
    return dataclasses.replace(row, expected=f"{expected:.2%} ± 2 points", got=f"{row.got} ({_percents(got)})")


def _percents(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:.2%}" for share in shares)


def differs(*settings: str) -> Row:
    return Row("settings that differ from the book's", "none", "; ".join(settings), DIFFERS)


@dataclass(frozen=True)
class Book:
    """What the stages work with."""

    data: Path
    work: Path
    weights: Path | None = None

    @functools.cached_property
    def verdict(self) -> str:
        return (self.data / VERDICT).read_text(encoding="utf-8")

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return build_tokenizer(str(self.data / GPT2))

    @functools.cached_property
    def datasets(self) -> tuple[Path, Path]:
        """The-verdict, its last 10% of characters held out; and one whose held-out text is its training text.

        `prepare` holds out documents or tokens: the two parts are prepared apart and put together.
        """
        folder = self.work / "datasets"
        wanted = folder / "verdict", folder / "verdict-on-itself"
        if not all(path.exists() for path in wanted):
            folder.mkdir(parents=True, exist_ok=True)
            cut = int(0.9 * len(self.verdict))
            for name, text in (("train", self.verdict[:cut]), ("val", self.verdict[cut:])):
                (folder / f"{name}.txt").write_text(text, encoding="utf-8")
                gptdist(folder, "prepare", "--input", folder / f"{name}.txt", "--output", folder / f"part-{name}",
                        "--tokenizer", self.data / GPT2, "--val-fraction=0", "--no-normalize", "--overwrite")
            for path, val in zip(wanted, ("val", "train"), strict=True):
                _put_together(path, folder / "part-train", folder / f"part-{val}")
        return wanted

    def gpt2_checkpoint(self) -> Path:
        """GPT-2's weights, imported once."""
        path = self.work / "gpt2-124m"
        if not path.exists():
            gptdist(self.work, "import", self.weights, "--output", path, "--tokenizer", self.data / GPT2)
        return path


def _put_together(path: Path, train: Path, val: Path) -> None:
    partial = path.with_name(f"{path.name}.partial")
    for old in (path, partial):
        shutil.rmtree(old, ignore_errors=True)
    for source, name in ((train / "train", "train"), (val / "train", "val"), (train / "tokenizer", "tokenizer")):
        shutil.copytree(source, partial / name)
    partial.rename(path)


def gptdist(folder: Path, *words: object, processes: int = 1) -> str:
    """`gptdist WORDS`, started by torchrun where there are several processes; its stdout, which is also in
    folder/log.txt. Raises RuntimeError with the last lines of stderr where it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "gptdist", *map(str, words)]
    out, err = folder / "log.txt", folder / "errors.txt"
    with out.open("ab") as stdout, err.open("ab") as stderr:
        begin = out.stat().st_size, err.stat().st_size
        code = subprocess.run(command, stdout=stdout, stderr=stderr, cwd=ROOT).returncode
    shown, faults = (path.read_bytes()[at:].decode() for path, at in zip((out, err), begin, strict=True))
    if code:
        raise RuntimeError(f"gptdist {words[0]} ended with {code}: {' '.join(faults.split())[-300:] or shown[-300:]}")
    return shown


Run = Callable[[Book, Path], Iterator[Row]]


@dataclass(frozen=True)
class Stage:
    """One stage. `run` gets a folder of its own, in which an interrupted run's files are."""

    name: str
    what: str
    expected: str  # shown where it has not run
    run: Run
    files: tuple[str, ...] = ()  # what it reads of --data
    trains: bool = False  # in processes of its own
    weights: bool = False
    long: bool = False


STAGES: dict[str, Stage] = {}


def stage(name: str, expected: str, **options: Any) -> Callable[[Run], Run]:
    """Register a stage; the function's docstring is what the table says where it has not run."""

    def register(run: Run) -> Run:
        STAGES[name] = Stage(name, run.__doc__.strip().rstrip("."), expected, run, **options)
        return run

    return register


# Chapters 2 to 4: text, attention, the model


@stage("ch02-text", "20,479 characters; 5,145 tokens", files=(VERDICT, GPT2))
def ch02_text(book: Book, folder: Path) -> Iterator[Row]:
    """Tokens of the-verdict, sliding windows."""
    tokens = book.tokenizer.encode(book.verdict)
    yield exact("characters of the-verdict", 20_479, len(book.verdict))
    yield exact("GPT-2 tokens of the-verdict", 5_145, len(tokens))
    gptdist(folder, "prepare", "--input", book.data / VERDICT, "--output", folder / "whole", "--tokenizer",
            book.data / GPT2, "--val-fraction=0", "--no-normalize", "--overwrite")
    train, _, _ = open_data(str(folder / "whole"))
    source = PretrainSource(train, context=4, sequences_per_step=1, micro_batch=1, seed=123, shuffle=False)
    batches = [source.step(i, i).micro_batches[0] for i in range(source.n_samples)]
    inputs, targets = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens", "targets"))
    yield exact("first row, length 4", [40, 367, 2885, 1464], inputs[0].tolist())
    yield exact("its targets", [367, 2885, 1464, 1807], targets[0].tolist())
    yield exact("windows of stride 4", 1_286, source.n_samples)
    whole = torch.tensor(tokens)
    right = torch.equal(inputs.flatten(), whole[:5144]) and torch.equal(targets.flatten(), whole[1:5145])
    yield holds("they are the text, targets one token further", right)
    yield Row("windows of stride 1", "5,141 windows", "the loader's stride is the window's length", DIFFERS)


@stage("ch02-bpe", "round trip; tiktoken's ids", files=(VERDICT, SPAM, GPT2))
def ch02_bpe(book: Book, folder: Path) -> Iterator[Row]:
    """BPE from scratch, and GPT-2's."""
    texts = {VERDICT: book.verdict, SPAM: (book.data / SPAM).read_text(encoding="utf-8")}
    theirs = _tiktoken_gpt2(book.data / GPT2)
    for name, text in texts.items():
        ids = book.tokenizer.encode(text)
        yield holds(f"ids of {name} are tiktoken's", ids == theirs.encode_ordinary(text))
    yield exact("ids of 'Akwirw ier'", [33901, 86, 343, 86, 220, 959], book.tokenizer.encode("Akwirw ier"))
    trained = build_tokenizer("bpe:1000", [book.verdict])
    yield exact("ids of a BPE trained on the-verdict", 1_000, trained.vocab_size)
    texts |= {"other scripts": "Ein Weißbrötchen, 日本語, 🙂\t\r\n"}
    yield holds("its round trip, three texts",
                all(trained.decode(trained.encode(text)) == text for text in texts.values()))
    larger = extend(book.tokenizer, ["<|user|>", "<|assistant|>"])
    ids = larger.encode("Hi<|user|><|assistant|>", allow_special=True)
    yield exact("two special tokens added", [50257, 50258], ids[-2:])
    yield holds("the other ids stay", larger.encode(book.verdict) == book.tokenizer.encode(book.verdict))


def _tiktoken_gpt2(folder: Path) -> Any:
    """tiktoken's own reading of the files; its cache is off, which goes by path and outlives the files."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    try:
        ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    finally:
        os.environ.pop("TIKTOKEN_CACHE_DIR")
        if before is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = before
    return tiktoken.Encoding("reference", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 50256})


@stage("ch03-attention", "every backend equals the reference")
def ch03_attention(book: Book, folder: Path) -> Iterator[Row]:
    """Causal multi-head attention, outputs and gradients."""
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        backends = dict.fromkeys([choose("attention", device).backend, "reference"])
        for backend in backends:
            for dtype in (torch.float32, torch.float64):
                differences = {name: attention_difference(device, backend, dtype, name)
                               for name in ("plain", "documents", "dropout")}
                parts = ", ".join(f"{name} {value:.0e}" for name, value in differences.items())
                row = at_most(f"{backend} on {device}, {str(dtype).removeprefix('torch.')}", SAME,
                              max(differences.values()))
                yield dataclasses.replace(row, got=parts)


def attention_difference(device: str, backend: str, dtype: torch.dtype, case: str) -> float:
    """Largest difference of outputs and gradients from attention written out in fp64."""
    B, T, H, G, D, p, site = 2, 37, 2, 3, 16, 0.1, 4
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(B, T, H, G + 2, D, generator=generator).to(device)
    factor = torch.randn(B, T, H, G, D, generator=generator).to(device)
    options: dict[str, Any] = {}
    keep = torch.ones(B, H, G, T, T, device=device)
    start = torch.zeros(B, T, dtype=torch.int32, device=device)
    if case == "documents":
        start[:, 20:] = 20
        options = {"doc_start": start}
    if case == "dropout":
        key, samples = ops.dropout_key(123, 7, device), torch.tensor([5, 9], device=device)
        heads = torch.arange(H * G, device=device).repeat(B)
        keep = keep_mask(key, p, samples.repeat_interleave(H * G), site, heads, torch.arange(T, device=device), T)
        keep = keep.view(B, H, G, T, T) / (1 - p)
        options = {"dropout_p": p, "key": key, "sample_ids": samples, "site": site}
    ours, exactly = (qkv.to(kind, copy=True).requires_grad_() for kind in (dtype, torch.float64))
    before = os.environ.get("GPTDIST_OPS", "auto")
    os.environ["GPTDIST_OPS"] = "reference" if backend == "reference" else "auto"
    try:
        out = ops.attention(ours, **options)
        (out * factor).sum().backward()
    finally:
        os.environ["GPTDIST_OPS"] = before
    wanted = _written_out(exactly, start, keep.double())
    (wanted * factor).sum().backward()
    return max(float((a - b).detach().abs().max()) for a, b in ((out, wanted), (ours.grad, exactly.grad)))


def _written_out(qkv: Tensor, start: Tensor, keep: Tensor) -> Tensor:
    """softmax(mask(q k^T / sqrt(D))) keep v. qkv: (B, T, H, G+2, D); start (B, T); keep (B, H, G, T, T)."""
    q, k, v = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
    scores = torch.einsum("bthgd,bshd->bhgts", q, k) / math.sqrt(qkv.shape[-1])
    t = torch.arange(qkv.shape[1], device=qkv.device)
    seen = (t <= t[:, None]) & (t >= start[..., None])  # (B, T, T)
    weights = scores.masked_fill(~seen[:, None, None], -math.inf).softmax(-1) * keep
    return torch.einsum("bhgts,bshd->bthgd", weights, v)


def gpt2_124m(**changes: Any) -> ModelConfig:
    """The book's GPT-2 124M, as it is written in chapter 4: a head of its own, no bias in the qkv projection."""
    shape = dict(vocab_size=50257, vocab_multiple=1, context=1024, width=768, n_layers=12, n_heads=12, tied=False,
                 qkv_bias=False, dropout=0.1)
    return ModelConfig(**shape | changes)


@stage("ch04-parameters", "163,009,536; 124,412,160")
def ch04_parameters(book: Book, folder: Path) -> Iterator[Row]:
    """Parameters of GPT-2 124M."""
    whole = parameter_count(gpt2_124m())
    yield exact("with a head of its own", 163_009_536, whole)
    yield exact("without the head", 124_412_160, parameter_count(gpt2_124m(tied=True)))
    yield exact("MB in fp32 (of 2^20 bytes)", "621.83", f"{whole * 4 / 2**20:.2f}")


# Chapter 5 and appendix D: pretraining

# Over configs/gpt2-124m.yaml. The book's AdamW is torch's: beta2 0.999.
PRETRAIN = ("--model.vocab_multiple=1", "--model.tied=false", "--model.qkv_bias=false", "--model.dropout=0.1",
            "--model.context=256", "--data.workers=0", "--train.precision=fp32", "--train.tokens_per_step=512",
            "--train.micro_batch=2", "--optim.beta2=0.999", "--optim.weight_decay=0.1", "--run.seed=123",
            "--parallel.strategy=auto", "--eval.every=5", "--eval.tokens=512", "--eval.micro_batch=2",
            "--checkpoint.every=15", "--checkpoint.keep_last=4", "--checkpoint.keep_best=false",
            "--checkpoint.asynchronous=false", "--run.tensorboard=false", "--run.log_every=1")
PRETRAIN_DIFFERS = ("no weight decay of biases and norms",
                    "initial weights come by checkpoint.init_from: a run draws GPT-2's N(0, 0.02) itself",
                    "a split by characters is two calls of `prepare`, put together by hand")
CH05 = ("--train.epochs=10", "--optim.lr=4e-4", "--train.grad_clip=0", "--schedule.name=constant",
        "--schedule.warmup_steps=0")


@stage("ch05-train", "loss 10.98 -> 0.57 train, 6.4 val", files=(VERDICT, GPT2), trains=True)
def ch05_train(book: Book, folder: Path) -> Iterator[Row]:
    """124M from the book's random weights on the-verdict, 10 epochs."""
    first = book_weights(book, folder)
    for name, expected, data in zip(("validation", "training"), (10.981, 10.988), book.datasets, strict=True):
        yield near(f"{name} loss of the initial weights", expected, _loss(folder, first, data), absolute=INITIAL)
    yield from pretrain_124m(book, folder, *CH05, f"--checkpoint.init_from={first}", updates=86, initial=10.98,
                             train=0.57, val=6.4)
    yield differs(*PRETRAIN_DIFFERS)


@stage("ch05-own-weights", "as ch05-train", files=(VERDICT, GPT2), trains=True)
def ch05_own_weights(book: Book, folder: Path) -> Iterator[Row]:
    """The same run from the weights that gptdist draws, GPT-2's N(0, 0.02)."""
    yield from pretrain_124m(book, folder, *CH05, updates=86, initial=10.98, train=0.57, val=6.4)


@stage("appD-train", "loss 10.97 -> 0.041 train, 6.915 val", files=(VERDICT, GPT2), trains=True)
def app_d_train(book: Book, folder: Path) -> Iterator[Row]:
    """124M from the book's random weights on the-verdict, 15 epochs with warmup, cosine and clipping.

    The ends are those that the book prints with clipping from the first step; its first printing has 0.101 and 6.707.
    """
    yield from pretrain_124m(
        book, folder, "--train.epochs=15", "--optim.lr=1e-3", "--train.grad_clip=1", "--schedule.name=cosine",
        "--schedule.warmup_steps=27", "--schedule.min_ratio=0.01",
        f"--checkpoint.init_from={book_weights(book, folder)}", updates=131, initial=10.97, train=0.041, val=6.915)
    yield differs("warmup begins at 0, not at a learning rate of its own", *PRETRAIN_DIFFERS)


def pretrain_124m(book: Book, folder: Path, *overrides: str, updates: int, initial: float, train: float,
                  val: float) -> Iterator[Row]:
    """Rows of a run that stops after `updates`, where the book prints its last losses, and then goes on to the end."""
    data, on_itself = book.datasets
    run = folder / "run"
    command = ["train", "configs/gpt2-124m.yaml", f"--data.path={data}", f"--run.dir={run}", *PRETRAIN, *overrides]
    gptdist(folder, *command, f"--train.stop_at={updates}")
    gptdist(folder, *command)
    rows = read_rows(run / "metrics.jsonl")
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    held_out = {row["step"]: row["val_loss"] for row in rows if row["kind"] == "eval"}
    steps, epochs = len(losses), float(overrides[0].partition("=")[2])
    yield exact("batches of an epoch, training", "9", f"{steps / epochs:g}")
    yield exact("batches, validation (its last 22 tokens are left out)", 1, _validation_batches(data))
    yield near("training loss of the first step, with dropout", initial, losses[0], absolute=INITIAL)
    saved, _ = layout.scan(run / "checkpoints")
    curve = {layout.step_of(path): _loss(folder, path, on_itself) for path in saved}
    if train < INITIAL:  # the text is known by heart, and no update is one that passes so small a loss
        yield near(f"training loss without dropout after {updates} updates", train, curve[updates], absolute=INITIAL)
    else:
        yield near(f"updates until the training loss without dropout is {train}", updates, reached(train, curve),
                   share=FINAL, form=".0f")
    yield near(f"validation loss after {updates} updates", val, held_out[updates], share=FINAL)
    for step in (updates, steps):
        yield Row(f"training and validation loss after {step} updates", "", f"{curve[step]:.3f}; {held_out[step]:.3f}",
                  "no band")


def reached(target: float, curve: dict[int, float]) -> float:
    """The update at which a falling loss passes `target`, between known ones a straight line of its logarithm.

    At the end of these runs the loss falls by a tenth with every update, so that a band of losses would be one of two
    updates. nan where it is not passed within the curve.
    """
    points = sorted(curve.items())
    for (first, above), (last, below) in itertools.pairwise(points):
        if above >= target >= below:
            return first + (last - first) * math.log(above / target) / math.log(above / below)
    return math.nan


def _validation_batches(data: Path) -> int:
    """Batches of 2 whole windows of 256."""
    _, val, _ = open_data(str(data))
    return (len(val) - 1) // 256 // 2


def _loss(folder: Path, checkpoint: Path, data: Path) -> float:
    """`gptdist evaluate` on the held-out split of `data`."""
    return json.loads(gptdist(folder, "evaluate", checkpoint, "--data", data, "--json"))["loss"]


def book_weights(book: Book, folder: Path) -> Path:
    """A checkpoint of the initial weights of the book's GPTModel, to the bit: torch's own, in its order, seed 123."""
    path = folder / "initial"
    if not path.exists():
        model = gpt2_124m(context=256)
        torch.manual_seed(123)
        parts = {name: Part(name, torch.float32, tuple(value.shape), lambda value=value: value)
                 for name, value in _drawn_by_torch(model)}
        write_checkpoint(path, 0, to_checkpoint(parts, model), checkpoint_files(model, book.tokenizer))
    return path


def _drawn_by_torch(model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(name, initial value) in the plain layout of convert/gpt2.py, drawn as the book's modules are made."""
    C = model.width

    def values(name: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        yield from ((f"{name}.{kind}", p.detach()) for kind, p in module.named_parameters())

    yield from values("wte", nn.Embedding(model.vocab_size, C))
    yield from values("wpe", nn.Embedding(model.context, C))
    for block in (f"blocks.{i}" for i in range(model.n_layers)):
        qkv = torch.cat([nn.Linear(C, C, bias=False).weight.detach() for _ in range(3)])  # (3C, C)
        yield f"{block}.attn.qkv.weight", qkv
        yield from values(f"{block}.attn.proj", nn.Linear(C, C))
        yield from values(f"{block}.mlp.fc", nn.Linear(C, model.hidden))
        yield from values(f"{block}.mlp.proj", nn.Linear(model.hidden, C))
        yield from values(f"{block}.ln_1", nn.LayerNorm(C))  # draws nothing
        yield from values(f"{block}.ln_2", nn.LayerNorm(C))
    yield from values("ln_f", nn.LayerNorm(C))
    yield from values("head", nn.Linear(C, model.vocab_size, bias=False))


# Over configs/debug.yaml: a model of 3.3M parameters, most of them GPT-2's vocabulary.
SMALL = ("--model.dropout=0.1", "--train.steps=12", "--train.tokens_per_step=512", "--train.micro_batch=3",
         "--eval.every=0", "--eval.tokens=128", "--checkpoint.every=0", "--run.tensorboard=false", "--run.seed=123",
         "--parallel.threads=1")


def train_small(book: Book, folder: Path, name: str, *overrides: str, processes: int = 1) -> list[dict]:
    """Its training rows; the run is folder/name."""
    data, _ = book.datasets
    gptdist(folder, "train", "configs/debug.yaml", f"--data.path={data}", f"--run.dir={folder / name}", *SMALL,
            *overrides, processes=processes)
    return [row for row in read_rows(folder / name / "metrics.jsonl") if row["kind"] == "train"]


def largest_difference(rows: Sequence[dict], others: Sequence[dict]) -> float:
    """Of the losses; infinite where other tokens were seen."""
    if [(row["step"], row["data_hash"]) for row in rows] != [(row["step"], row["data_hash"]) for row in others]:
        return math.inf
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(rows, others, strict=True))


# Chapter 5: the scores of a vocabulary of 9 after "every effort moves you"
SCORES = (4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79)


@stage("ch05-sampling", "top-k, temperature, stop; resumed run equal", files=(VERDICT, GPT2), trains=True)
def ch05_sampling(book: Book, folder: Path) -> Iterator[Row]:
    """Temperature, top-k, stop at end-of-text; save and resume."""
    scores = torch.tensor(SCORES)
    kept = filter_logits(scores, [], Sampling(top_k=3)).softmax(-1)
    yield exact("top-k 3", "0.0615, 0.5775, 0.3610", ", ".join(f"{p:.4f}" for p in kept.tolist() if p > 0))
    for temperature in (0.1, 1.0, 5.0):
        got = filter_logits(scores, [], Sampling(temperature=temperature)).softmax(-1)
        yield at_most(f"temperature {temperature:g}: from softmax(scores / T)", 1e-6,
                      float((got - (scores / temperature).softmax(-1)).abs().max()))
    yield exact("stop at end-of-text", "end after 2 tokens", _stopped(book))
    whole = train_small(book, folder, "whole")
    train_small(book, folder, "halves", "--train.stop_at=6")
    resumed = train_small(book, folder, "halves")
    yield exact("save and resume: largest difference of the losses", 0.0, largest_difference(whole, resumed))
    words = ["generate", folder / "whole", "--prompt", "Every effort moves you", "--max-new-tokens=12", "--top-k=25",
             "--temperature=1.4", "--seed=123"]
    yield holds("`gptdist generate` twice with one seed: the same text",
                gptdist(folder, *words) == gptdist(folder, *words))


def _stopped(book: Book) -> str:
    """How a generation ends whose model says a word twice and then <|endoftext|>."""
    model = build_meta(gpt2_124m(width=16, n_heads=1, n_layers=1, context=32)).to_empty(device="cpu").eval()
    fill_initial_values(model, seed=123)
    said = iter((1000, 1000, book.tokenizer.eot))

    def call(tokens: Tensor, **options: Any) -> Tensor:
        logits = model(tokens, **options)
        logits[:, next(said)] = 1e9
        return logits

    [done] = Generator(model, book.tokenizer, call=call).generate(["Hello"], Sampling(max_new_tokens=20))
    return f"{done.finish} after {len(done.tokens)} tokens"


@stage("ch05-pretrained", "loss 3.75 train, 3.56 val", files=(VERDICT, GPT2), weights=True, trains=True)
def ch05_pretrained(book: Book, folder: Path) -> Iterator[Row]:
    """GPT-2 124M's weights on the-verdict."""
    model, tokenizer, config = load_model(book.gpt2_checkpoint())
    unpadded = dataclasses.replace(config.model, vocab_multiple=1)
    yield exact("parameters, without the padding of the vocabulary", 124_439_808, parameter_count(unpadded))
    # `gptdist evaluate` has windows of the model's whole context, the book's are of 256 tokens.
    windows = dataclasses.replace(config, model=dataclasses.replace(config.model, context=256))
    for name, expected, data in zip(("validation", "training"), (3.56, 3.75), book.datasets, strict=True):
        _, held_out, _ = open_data(str(data))
        targets = (len(held_out) - 1) // 512 * 512
        with torch.inference_mode():
            sums = held_out_sums(model, validation_batches(held_out, windows, tokenizer, max_tokens=targets),
                                 torch.device("cpu"))
        yield near(f"{name} loss", expected, float(sums[0] / sums[1]), absolute=INITIAL)


# Chapter 6: classification


def spam_config(book: Book, *overrides: str) -> Config:
    path = str(ROOT / "configs" / "classify-spam.yaml")
    return config_module.load(path, [f"--task.train_data={book.data / SPAM}", *overrides])


@stage("ch06-split", "1,045 / 149 / 300; longest 120", files=(SPAM, GPT2))
def ch06_split(book: Book, folder: Path) -> Iterator[Row]:
    """Balance and split of the SMS Spam Collection."""
    config = spam_config(book, "--classify.end_token=false", "--model.context=1024", "--classify.labels=[ham, spam]")
    splits = load_splits(config)
    everything = [*splits.train, *splits.val, *splits.test]
    yield exact("messages of each label", [747, 747],
                [sum(row.label == label for row in everything) for label in ("ham", "spam")])
    yield exact("training, validation, test", [1045, 149, 300], [len(splits.train), len(splits.val), len(splits.test)])
    yield exact("tokens of the longest training message", 120, encode(splits.train, config, book.tokenizer).longest)


def classify_spam(book: Book, folder: Path, config: str, *overrides: str) -> list[dict]:
    """results.json of a run with each seed."""
    results = []
    for seed in SEEDS:
        run = folder / f"seed-{seed}"
        if not (run / "results.json").exists():  # written at the end
            gptdist(folder, "finetune", config, f"--task.train_data={book.data / SPAM}", f"--run.dir={run}",
                    f"--run.seed={seed}", *overrides)
        results.append(json.loads((run / "results.json").read_text()))
        shutil.rmtree(run / "checkpoints", ignore_errors=True)  # 1.5 GB each for 124M, and not needed any more
    return results


@stage("ch06-small", "at least 93% of the test texts", files=(SPAM,), trains=True)
def ch06_small(book: Book, folder: Path) -> Iterator[Row]:
    """Spam from random weights with configs/classify-spam.yaml."""
    results = classify_spam(book, folder, "configs/classify-spam.yaml", "--run.tensorboard=false")
    got = [result["test"]["accuracy"] for result in results]
    median = statistics.median(got)
    yield Row(f"test accuracy, median of {len(got)} seeds", "at least 93%", f"{median:.2%} ({_percents(got)})",
              OK if median >= 0.93 else OUTSIDE)
    padding = [result["padding_share"] for result in results]
    yield Row("padding of the training tokens", "at most 10%", _percents(padding),
              OK if max(padding) <= 0.1 else OUTSIDE)


# Over configs/classify-spam.yaml: chapter 6's settings.
CLASSIFY = ("--classify.end_token=false", "--model.dropout=0", "--train.epochs=5", "--train.batch=8",
            "--train.micro_batch=8", "--optim.lr=5e-5", "--optim.beta2=0.999", "--optim.weight_decay=0.1",
            "--train.grad_clip=0", "--schedule.name=constant", "--schedule.warmup_steps=0", "--task.bucket=0",
            "--checkpoint.every=100", "--checkpoint.keep_last=1", "--checkpoint.keep_best=false",
            "--checkpoint.asynchronous=false", "--run.tensorboard=false")
CLASSIFY_DIFFERS = ("weight decay leaves out biases and norms", "an epoch's last batch is not dropped (654 steps, not "
                    "650)")
RANDOM_124M = ("--model.vocab_multiple=1", "--model.context=1024", "--model.width=768", "--model.n_layers=12",
               "--model.n_heads=12", "--model.qkv_bias=true")


@stage("ch06-random", "93.67% of the test texts", files=(SPAM, GPT2), trains=True, long=True)
def ch06_random(book: Book, folder: Path) -> Iterator[Row]:
    """Spam with the book's 124M from random weights, all layers trained."""
    results = classify_spam(book, folder, "configs/classify-spam.yaml", f"--task.tokenizer={book.data / GPT2}",
                            *RANDOM_124M, *CLASSIFY)
    yield accuracy("test accuracy", 0.9367, [result["test"]["accuracy"] for result in results])
    yield differs(*CLASSIFY_DIFFERS, "initial weights are GPT-2's N(0, 0.02), not torch's")


@stage("ch06-pretrained", "97.3% val, 95.7% test", files=(SPAM, GPT2), trains=True, weights=True)
def ch06_pretrained(book: Book, folder: Path) -> Iterator[Row]:
    """Spam from GPT-2 124M's weights; the last block, final norm and head trained."""
    config = _without_model(folder)
    results = classify_spam(book, folder, config, f"--checkpoint.init_from={book.gpt2_checkpoint()}",
                            "--task.freeze=last:1", *CLASSIFY)
    yield accuracy("test accuracy", 0.957, [result["test"]["accuracy"] for result in results])
    last = [[row for row in read_rows(folder / f"seed-{seed}" / "metrics.jsonl") if row["kind"] == "eval"][-1]
            for seed in SEEDS]
    yield accuracy("validation accuracy", 0.973, [row["accuracy"] for row in last])
    yield Row("training accuracy", "97.2%", "`gptdist finetune` does not measure it", DIFFERS)
    yield differs(*CLASSIFY_DIFFERS)


def _without_model(folder: Path) -> str:
    """A copy of configs/classify-spam.yaml whose model is that of the checkpoint it starts from."""
    import yaml

    values = yaml.safe_load((ROOT / "configs" / "classify-spam.yaml").read_text())
    values.pop("model")
    path = folder / "classify.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


# Chapter 7: instructions


@stage("ch07-data", "[6, 50256, -100, -100, -100]; 1.1269")
def ch07_data(book: Book, folder: Path) -> Iterator[Row]:
    """Padding, targets and ignored targets."""
    rows = [row_of(Answered(np.array([*ids, 50256]), np.ones(len(ids) + 1, bool)))
            for ids in ([0, 1, 2, 3, 4], [5, 6], [7, 8, 9])]
    source = ExampleSource(rows, lengths=np.array([5, 2, 3]), batch=3, micro_batch=3, context=5, seed=123,
                           shuffle=False)
    [batch] = source.step(0, 0).micro_batches
    yield exact("targets of [5, 6] beside a row of 5", [6, 50256, IGNORED, IGNORED, IGNORED], batch.targets[1].tolist())
    logits = [[-1.0, 1.0], [-0.5, 1.5], [-0.5, 1.5]]
    for what, expected, targets in (("two targets", 1.1269, [0, 1]), ("three", 0.7936, [0, 1, 1]),
                                    ("three, one ignored", 1.1269, [0, 1, IGNORED])):
        yield exact(f"toy loss of {what}", f"{expected:.4f}", f"{_toy_loss(logits, targets):.4f}")


def _toy_loss(logits: list[list[float]], targets: list[int]) -> float:
    losses = ops.linear_cross_entropy(torch.tensor(logits[:len(targets)]), torch.eye(2), torch.tensor(targets),
                                      ignore_index=IGNORED)
    return float(losses.sum()) / sum(target != IGNORED for target in targets)


@stage("ch07-dpo", "loss 0.6931, margin 0", trains=True)
def ch07_dpo(book: Book, folder: Path) -> Iterator[Row]:
    """The first step of DPO."""
    run = folder / "run"
    gptdist(folder, "finetune", "configs/dpo-debug.yaml", "--dpo.beta=0.1", "--optim.lr=5e-6", "--train.steps=2",
            "--schedule.warmup_steps=0", "--eval.every=0", "--checkpoint.every=0", "--run.tensorboard=false",
            f"--run.dir={run}")
    first = next(row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "train")
    yield exact("loss at the start", "0.6931", f"{first['loss']:.4f}")
    yield at_most("size of the margin at the start", 1e-6, abs(first["margin"]))


# Appendices A and E, few-shot


@stage("appA-processes", "the losses of one process", files=(VERDICT, GPT2), trains=True)
def app_a_processes(book: Book, folder: Path) -> Iterator[Row]:
    """Data-parallel training by torchrun."""
    alone = train_small(book, folder, "one")
    for strategy in ("ddp", "fsdp"):
        rows = train_small(book, folder, strategy, f"--parallel.strategy={strategy}", processes=2)
        yield at_most(f"torchrun, 2 processes, {strategy}: largest difference of the losses", SAME,
                      largest_difference(alone, rows))


EVERY_LINEAR = "attn.qkv|attn.proj|mlp.fc|mlp.proj|score"


def lora_config(model: ModelConfig, *, split_qkv: bool = False, rank: int = 16) -> Config:
    """A classifier of ham and spam with adapters on every linear layer, as appendix E has it."""
    plain = Config(model=model)
    return dataclasses.replace(
        plain, task=dataclasses.replace(plain.task, name="classify"),
        classify=dataclasses.replace(plain.classify, labels=["ham", "spam"]),
        lora=dataclasses.replace(plain.lora, rank=rank, alpha=16.0, targets=EVERY_LINEAR, split_qkv=split_qkv))


@stage("appE-lora", "124,441,346 -> 0 -> 2,666,528 (packed 2,371,616)")
def app_e_lora(book: Book, folder: Path) -> Iterator[Row]:
    """LoRA of rank 16 on every linear layer."""
    model = gpt2_124m(qkv_bias=True, tied=True, dropout=0.0)
    yield exact("trainable without adapters", 124_441_346, _trainable(build(lora_config(model, rank=0))))
    for split_qkv, expected in ((True, 2_666_528), (False, 2_371_616)):
        adapted = build(lora_config(model, split_qkv=split_qkv))
        added = sum(p.numel() for name, p in adapted.named_parameters() if lora.is_adapter(name))
        if split_qkv:
            yield exact("trainable, the model frozen", 0, _trainable(adapted) - added)
        kind = "q, k and v adapted apart" if split_qkv else "qkv adapted as one"
        yield exact(f"trainable with adapters, {kind}", expected, _trainable(adapted))
    for split_qkv in (True, False):
        yield exact(f"output before training, a small model, {'apart' if split_qkv else 'as one'}: difference", 0.0,
                    _adapters_change(split_qkv))


def _trainable(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def _adapters_change(split_qkv: bool) -> float:
    """Largest difference of the logits with new adapters from those without."""
    small = gpt2_124m(vocab_size=512, width=64, n_heads=4, n_layers=3, context=32, tied=True, dropout=0.0)
    model = build(lora_config(small, split_qkv=split_qkv)).to_empty(device="cpu")
    fill_initial_values(model, seed=123)
    tokens = torch.randint(0, 512, (4, 32), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([32, 20, 7, 1])
    adapted = model(tokens, lengths)
    with lora.without_adapters(model):
        return float((adapted - model(tokens, lengths)).abs().max())


@stage("few-shot", "works from the command line", files=(VERDICT, GPT2), trains=True)
def few_shot(book: Book, folder: Path) -> Iterator[Row]:
    """A prompt of examples, continued."""
    examples = [{"input": "sea", "output": "mer"}, {"input": "cheese", "output": "fromage"}]
    (folder / "shots.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    train_small(book, folder, "run")
    words = ["generate", folder / "run", "--examples", folder / "shots.jsonl", "--prompt", "bread",
             "--max-new-tokens=5", "--temperature=0"]
    prompt = few_shot_prompt(examples, "bread", "{input} -> {output}\n")
    shown = gptdist(folder, *words)
    yield exact("prompt that `gptdist generate --examples` continues", repr(prompt), repr(shown[:len(prompt)]))
    answer = json.loads(gptdist(folder, *words, "--json"))
    yield holds("it goes on for 5 tokens, twice the same",
                answer["finish"] == "length" and shown == f"{prompt}{answer['completion']}\n")


# Running and the report


class Results:
    """Finished stages in a JSON file: name -> rows, seconds, date. Several processes may fill it, each its stages."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def stages(self) -> dict[str, dict]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def rows(self, name: str) -> list[Row]:
        """Those of a stage; none where it has not finished."""
        return [Row(**row) for row in self.stages.get(name, {"rows": []})["rows"]]

    def add(self, name: str, rows: list[Row], seconds: float) -> None:
        done = {"rows": [dataclasses.asdict(row) for row in rows], "seconds": round(seconds, 1),
                "date": str(date.today())}
        self._write(self.stages | {name: done})

    def forget(self, name: str) -> None:
        self._write({other: done for other, done in self.stages.items() if other != name})

    def _write(self, stages: dict[str, dict]) -> None:
        replace_text(self.path, json.dumps(stages, indent=1) + "\n")


def reason_to_skip(todo: Stage, book: Book, options: argparse.Namespace) -> str | None:
    """The verdict of a stage that does not run now."""
    if todo.weights and book.weights is None:
        return "needs weights"
    if options.only and todo.name not in options.only:
        return "skipped: not in --only"
    if todo.long and not options.long:
        return "skipped: takes hours, --long runs it"
    missing = [name for name in todo.files if not (book.data / name).exists()]
    return f"skipped: --data has no {', '.join(missing)}" if missing else None


def run_stages(book: Book, results: Results, options: argparse.Namespace) -> dict[str, str]:
    """Run what has to run, into `results`; returns the verdicts of the stages without rows."""
    without: dict[str, str] = {}
    for name, todo in STAGES.items():
        if name in results.stages:
            continue
        if reason := reason_to_skip(todo, book, options):
            without[name] = reason
            continue
        print(f"{name}: {todo.what}", file=sys.stderr, flush=True)
        folder = book.work / name
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        try:
            results.add(name, list(todo.run(book, folder)), time.perf_counter() - started)
        except Exception as error:  # the other stages do not depend on this one
            without[name] = f"failed: {' '.join(str(error).split())[:300] or type(error).__name__}"
    return without


def table(results: Results, without: dict[str, str]) -> str:
    lines = ["| stage | what | expected | got | verdict |", "|---" * 5 + "|"]
    for name, todo in STAGES.items():
        for row in results.rows(name) or [Row(todo.what, todo.expected, "", without.get(name, "skipped"))]:
            cells = (name, row.what, row.expected, row.got, row.verdict)
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)


def summary(results: Results, without: dict[str, str]) -> str:
    """How many rows have which verdict, and how long the stages took."""
    verdicts = [row.verdict for name in STAGES for row in results.rows(name)]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys([OK, OUTSIDE, *verdicts]))
    took = "; ".join(f"{name} {done['seconds']:.0f} s, {done['date']}" for name, done in results.stages.items())
    return f"Rows: {counts}. Stages that did not run: {', '.join(without) or 'none'}.\n\nTaken: {took or 'nothing'}."


def report(results: Results, without: dict[str, str], options: argparse.Namespace) -> str:
    bands = __doc__.split("\n\n")[-1].strip()
    hardware = describe().partition(";")[0]
    words = [f"--{name} {' '.join(chosen)}" for name in ("only", "again") if (chosen := getattr(options, name))]
    command = " ".join(["python -m benchmarks.book --data DIR", *words, *["--long"] * options.long,
                        *["--weights DIR"] * bool(options.weights)])
    return (f"# The stages of the book, beside its values\n\n{bands}\n\n{hardware}; {date.today()}; the last of the "
            f"commands that filled it: `{command}`\n\n{table(results, without)}\n\n{summary(results, without)}\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("GPTDIST_DATA"),
                        help="directory of the book's files (default: $GPTDIST_DATA)")
    parser.add_argument("--weights", type=Path, help="Hugging Face directory of GPT-2 124M")
    parser.add_argument("--only", nargs="+", choices=list(STAGES), default=[], metavar="STAGE",
                        help=f"of {', '.join(STAGES)}")
    parser.add_argument("--again", nargs="+", choices=list(STAGES), default=[], metavar="STAGE",
                        help="run these anew, with no file of an earlier run")
    parser.add_argument("--long", action="store_true", help="also the stages that take hours on two cores")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "book.md")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "book")
    options = parser.parse_args(argv)
    if options.data is None:
        parser.error("give --data DIR, or set GPTDIST_DATA: a directory with the book's files")
    for name in ("data", "work", *["weights"] * (options.weights is not None)):
        setattr(options, name, Path(getattr(options, name)).resolve())
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    results = Results(options.work / "book.json")
    for name in options.again:
        results.forget(name)
        shutil.rmtree(options.work / name, ignore_errors=True)
    without = run_stages(Book(options.data, options.work, options.weights), results, options)
    text = report(results, without, options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    print(text)
    bad = any(row.verdict == OUTSIDE for name in STAGES for row in results.rows(name))
    return int(bad or any(reason.startswith("failed") for reason in without.values()))


if __name__ == "__main__":
    sys.exit(main())
