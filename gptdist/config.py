"""The configuration schema: frozen dataclasses, filled from YAML and `--section.key=value`.

These dataclasses are the only schema. Every field carries its meaning, which `gptdist config --show` prints. An unknown
key is an error that names the nearest known one; an impossible value is an error that says what would be possible.
The resolved configuration is stored in every checkpoint.

YAML and the command line are read with packages that are imported where they are used: a model needs torch alone.
"""

import contextlib
import dataclasses
import difflib
import functools
import io
import os
import re
import typing
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from gptdist.errors import UserError

YAML_VALUES = 100_000
SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)  # of a variable's name


def _option(default: Any, doc: str) -> Any:
    """A dataclass field with its meaning attached."""
    return dataclasses.field(default=default, metadata={"doc": doc})


def expand_variables(path: str) -> str:
    """`path` with the variables of the environment that it names. Raises UserError for one that looks like a secret:
    configurations are saved and shown."""
    if secret := next((name for name in re.findall(r"\$\{?(\w+)", path) if SECRET.search(name)), None):
        raise UserError(f"{path} names the variable {secret}, which looks like a secret: it would be saved with the "
                        f"configuration; name another variable")
    return os.path.expandvars(path)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of the GPT: pre-LN blocks with tanh GELU, as GPT-2."""

    vocab_size: int | None = _option(None, "number of token ids; null: taken from the dataset's tokenizer")
    vocab_multiple: int = _option(128, "vocab_size is rounded up to this multiple (padded logits are -inf)")
    context: int = _option(256, "longest sequence in tokens; the training window")
    width: int = _option(256, "channels of the residual stream")
    n_layers: int = _option(4, "transformer blocks")
    n_heads: int = _option(4, "query heads; must divide width")
    n_kv_heads: int | None = _option(None, "key/value heads (grouped-query attention); null: as many as n_heads")
    mlp_ratio: float = _option(4.0, "hidden width of the MLP over width")
    positions: Literal["learned", "rope"] = _option("learned", "learned position table (GPT-2) or rotary embedding")
    rope_theta: float = _option(10000.0, "base of the rotary frequencies")
    tied: bool = _option(True, "output head shares the token embedding's weight")
    bias: bool = _option(True, "biases in linear layers and layer norms")
    qkv_bias: bool | None = _option(None, "bias in the qkv projection; null: as `bias`")
    norm_eps: float = _option(1e-5, "epsilon inside the layer norm's square root")
    dropout: float = _option(0.0, "dropout probability: embeddings, attention weights, both residual branches")

    def __post_init__(self) -> None:
        for name in ("context", "width", "n_layers", "n_heads", "vocab_multiple"):
            _require(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}, expected at least 1")
        _require(self.width % self.n_heads == 0,
                 f"model.n_heads={self.n_heads} does not divide model.width={self.width}: "
                 f"choose a width that is a multiple of {self.n_heads}")
        _require(self.kv_heads > 0 and self.n_heads % self.kv_heads == 0,
                 f"model.n_kv_heads={self.n_kv_heads} does not divide model.n_heads={self.n_heads}")
        _require(self.vocab_size is None or self.vocab_size > 0, f"model.vocab_size is {self.vocab_size}, expected > 0")
        _require(0.0 <= self.dropout < 1.0, f"model.dropout is {self.dropout}, expected 0 <= dropout < 1")
        _require(self.rope_theta > 0, f"model.rope_theta is {self.rope_theta}, expected > 0")
        _require(self.norm_eps > 0, f"model.norm_eps is {self.norm_eps}, expected > 0")
        _require(self.hidden > 0, f"model.mlp_ratio={self.mlp_ratio} leaves no hidden units")
        _require(self.positions == "learned" or self.head_dim % 2 == 0,
                 f"model.positions=rope needs an even head dimension, got width/n_heads = {self.head_dim}")

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_dim(self) -> int:
        return self.width // self.n_heads

    @property
    def hidden(self) -> int:
        return int(self.mlp_ratio * self.width)

    @property
    def has_qkv_bias(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: vocab_size rounded up to vocab_multiple."""
        assert self.vocab_size is not None, "vocab_size is resolved from the tokenizer before a model is built"
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens come from."""

    path: str = _option("", "dataset directory written by `gptdist prepare` (holds train/, val/ and tokenizer/)")
    input: str = _option("", "text file that data.path is made of, where that is not there yet: as `gptdist prepare "
                             "--split tail` does it; may name variables of the environment")
    tokenizer: str = _option("char", "of data.input: char, bytes, gpt2, bpe:VOCAB or a path")
    val_fraction: float = _option(0.1, "share of data.input's characters, its last ones, that are for validation")
    mixture: list[dict[str, Any]] = _option(
        (), "in place of path, several datasets of one tokenizer: [{path: DIR, weight: 0.7}, ...], the weight being a "
            "share of the windows; or epochs: N in place of every weight, passes over it in the whole run, which sets "
            "train.steps. from_step: N of an entry: it belongs to the mixture that takes over after N steps")
    validation: list[dict[str, Any]] = _option(
        (), "validation sets, each reported as val_loss_NAME beside their mean: [{name: web, path: DIR}, ...]; empty: "
            "the val/ of path, or of each dataset of the mixture")
    shuffle: bool = _option(True, "visit the windows in a keyed random order, another one each epoch")
    document_mask: bool = _option(False, "attention does not look across document borders inside a window")
    workers: int = _option(1, "threads that read batches ahead; 0 reads in line. Never changes which tokens are seen")
    skip: list[list[int]] = _option((), "sample ranges [start, stop) to leave out, e.g. after a loss spike")

    def __post_init__(self) -> None:
        _require(not (self.input and self.mixture), f"data.input={self.input} is what data.path is made of, but "
                                                    f"data.mixture is given: use one")
        _require(not self.input or bool(self.path),
                 f"data.input={self.input}, but data.path is empty: set it to the directory to prepare it in")
        _require(0 <= self.val_fraction < 1, f"data.val_fraction is {self.val_fraction}, expected 0 <= share < 1")
        _require(self.workers >= 0, f"data.workers is {self.workers}, expected 0 or more")
        object.__setattr__(self, "skip", [list(pair) for pair in self.skip])
        object.__setattr__(self, "mixture", [dict(entry) for entry in self.mixture])
        object.__setattr__(self, "validation", [dict(entry) for entry in self.validation])
        _require(not (self.path and self.mixture), f"data.path={self.path} and data.mixture are both given: use one")
        self._check_mixture()
        self._check_validation()
        for pair in self.skip:
            _require(len(pair) == 2 and 0 <= pair[0] <= pair[1],
                     f"data.skip has {pair}, expected [start, stop) with 0 <= start <= stop")

    def _check_mixture(self) -> None:
        for entry in self.mixture:
            _require(set(entry) <= {"path", "weight", "epochs", "from_step"} and isinstance(entry.get("path"), str)
                     and ("weight" in entry) != ("epochs" in entry),
                     f"data.mixture has {entry}, expected path, weight or epochs, and perhaps from_step")
            amount, step = entry.get("weight", entry.get("epochs")), entry.get("from_step", 0)
            _require(_is_number(amount) and 0 <= amount < float("inf"),
                     f"data.mixture: weight or epochs of {entry['path']} is {amount!r}, expected at least 0")
            _require(isinstance(step, int) and not isinstance(step, bool) and step >= 0,
                     f"data.mixture: from_step of {entry['path']} is {step!r}, expected a step of at least 0")
        phases = self.phases()
        for step, entries in phases:
            kind = "epochs" if "epochs" in entries[0] else "weight"
            paths = [entry["path"] for entry in entries]
            _require(len(set(paths)) == len(paths), f"data.mixture has {paths} from step {step} on: one of them twice")
            _require(all(kind in entry for entry in entries), "data.mixture has weights and epochs: use one of the two")
            _require(sum(entry[kind] for entry in entries) > 0,
                     f"data.mixture: the {kind}s of {', '.join(paths)} from step {step} on sum to zero, expected more")
            _require(kind == "weight" or len(phases) == 1,
                     "data.mixture has epochs and from_step: use weights in a mixture that changes")
        _require(not phases or phases[0][0] == 0,
                 "data.mixture begins at a later step: one of its entries needs no from_step")

    def phases(self) -> list[tuple[int, list[dict[str, Any]]]]:
        """(first step, entries) of each mixture, in order."""
        steps = sorted({entry.get("from_step", 0) for entry in self.mixture})
        return [(step, [one for one in self.mixture if one.get("from_step", 0) == step]) for step in steps]

    def _check_validation(self) -> None:
        for entry in self.validation:
            _require(set(entry) == {"name", "path"} and all(isinstance(one, str) and one for one in entry.values())
                     and re.fullmatch(r"[\w.-]+", entry["name"]) is not None,
                     f"data.validation has {entry}, expected a name of letters, digits, _, . and -, and a path")
        names = [entry["name"] for entry in self.validation]
        _require(len(set(names)) == len(names), f"data.validation has a name twice: {names}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The step: how many tokens, in which precision, how long."""

    steps: int = _option(1000, "optimizer steps in the whole run")
    epochs: float = _option(0.0, "passes over the training data in the whole run, in place of `steps`; 0: off")
    stop_at: int = _option(0, "save and end after this step, to go on later; schedules still span `steps`. 0: off")
    tokens_per_step: int = _option(16384, "pretrain: tokens of an optimizer step over all ranks; a multiple of "
                                          "model.context")
    batch: int = _option(8, "fine-tuning: examples of an optimizer step over all ranks")
    micro_batch: int = _option(8, "sequences per rank and forward pass; the rest is gradient accumulation")
    precision: Literal["auto", "fp32", "bf16"] = _option(
        "auto", "bf16: bf16 compute; master weights and gradient reduction in fp32. auto: bf16 where all ranks' "
                "processors multiply it (GPUs from compute capability 8.0, CPUs with AVX-512 BF16), else fp32")
    grad_clip: float = _option(1.0, "clip the global gradient norm to this; 0: off")
    activation_checkpointing: Literal["none", "full"] | int = _option(
        "none", "recompute in backward: none, full (every block), or n: every n-th block")
    compile: bool = _option(False, "torch.compile each block")
    on_nonfinite: Literal["skip", "rewind", "stop"] = _option(
        "skip", "a step whose loss or gradient is not finite: skip leaves its update out; rewind goes back to the "
                "newest checkpoint and on with the samples after this step's; stop ends the run")
    on_spike: Literal["skip", "rewind", "stop"] = _option("skip", "the same for a step that is a spike")
    spike_loss: float = _option(0.0, "a spike: a loss of more nats than this above the median of the last spike_window "
                                     "steps that were taken; 0: off")
    spike_norm: float = _option(0.0, "a spike: a gradient norm of more than this times their median; 0: off")
    spike_window: int = _option(100, "steps that a spike is compared with; the first ones are not judged")
    max_bad_steps: int = _option(10, "stop after this many steps in a row that were skipped, or as many rewinds to one "
                                     "checkpoint")
    replica_check_every: int = _option(
        0, "steps between checks, and one before each checkpoint, that what several ranks hold alike is alike: all of "
           "ddp, the copies of hsdp, working weights of zero1 and zero2, weights that parallel.tensor does not divide. "
           "0: off")

    def __post_init__(self) -> None:
        for name in ("steps", "tokens_per_step", "batch", "micro_batch", "max_bad_steps", "spike_window"):
            _require(getattr(self, name) > 0, f"train.{name} is {getattr(self, name)}, expected at least 1")
        for name in ("spike_loss", "spike_norm", "replica_check_every"):
            _require(0 <= getattr(self, name) < float("inf"),
                     f"train.{name} is {getattr(self, name)}, expected 0 (off) or more")
        _require(self.spike_norm == 0 or self.spike_norm > 1,
                 f"train.spike_norm is {self.spike_norm}, expected 0 (off) or more than 1, times the median")
        _require(0 <= self.epochs < float("inf"), f"train.epochs is {self.epochs}, expected 0 (off) or more")
        _require(self.stop_at >= 0, f"train.stop_at is {self.stop_at}, expected 0 (off) or a step")
        _require(self.grad_clip >= 0, f"train.grad_clip is {self.grad_clip}, expected 0 (off) or more")
        _require(not isinstance(self.activation_checkpointing, int) or self.activation_checkpointing > 0,
                 f"train.activation_checkpointing is {self.activation_checkpointing}, expected none, full or n >= 1")

    def resolved(self, all_have_bf16: bool) -> "TrainConfig":
        """This, with a precision that is decided."""
        if self.precision != "auto":
            return self
        return dataclasses.replace(self, precision="bf16" if all_have_bf16 else "fp32")

    @property
    def looks_for_spikes(self) -> bool:
        return self.spike_loss > 0 or self.spike_norm > 0

    @property
    def may_rewind(self) -> bool:
        return self.on_nonfinite == "rewind" or (self.looks_for_spikes and self.on_spike == "rewind")

    @property
    def last_step(self) -> int:
        """Steps done when this process ends."""
        return min(self.steps, self.stop_at or self.steps)

    @property
    def checkpoint_every_block(self) -> int:
        """0: keep all activations; n: recompute every n-th block."""
        named = {"none": 0, "full": 1}
        return named.get(self.activation_checkpointing, self.activation_checkpointing)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter, 2019); decay on matrices only. Or Muon (Jordan et al., 2024) beside it."""

    name: Literal["adamw", "muon"] = _option(
        "adamw", "muon: Muon for the matrices of the blocks, AdamW for embeddings, head, norms and biases; with "
                 "parallel.strategy=single, ddp, fsdp or hsdp")
    lr: float = _option(6e-4, "peak learning rate")
    beta1: float = _option(0.9, "decay of the first moment")
    beta2: float = _option(0.95, "decay of the second moment")
    eps: float = _option(1e-8, "added to the root of the second moment")
    weight_decay: float = _option(0.1, "decoupled weight decay on tensors with two or more dimensions")
    muon_lr: float = _option(0.02, "muon: peak learning rate of the blocks' matrices")
    momentum: float = _option(0.95, "muon: decay of the momentum")
    nesterov: bool = _option(True, "muon: Nesterov's momentum")
    newton_schulz_steps: int = _option(5, "muon: iterations that orthogonalise a matrix, in train.precision")

    def __post_init__(self) -> None:
        for name in ("lr", "muon_lr"):
            value = getattr(self, name)
            _require(0 < value < float("inf"), f"optim.{name} is {value}, expected > 0 and finite")
        _require(0 <= self.momentum < 1, f"optim.momentum is {self.momentum}, expected 0 <= momentum < 1")
        _require(self.newton_schulz_steps > 0,
                 f"optim.newton_schulz_steps is {self.newton_schulz_steps}, expected at least 1")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"optim.{name} is {getattr(self, name)}, expected 0 <= beta < 1")
        _require(self.eps > 0, f"optim.eps is {self.eps}, expected > 0")
        _require(self.weight_decay >= 0, f"optim.weight_decay is {self.weight_decay}, expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the steps, as a factor of optim.lr."""

    name: Literal["cosine", "linear", "wsd", "constant"] = _option(
        "cosine", "shape after warmup; wsd: warmup, stable, then decay")
    warmup_steps: int = _option(0, "linear warmup from 0 over this many steps")
    min_ratio: float = _option(0.1, "final learning rate over optim.lr")
    decay_fraction: float = _option(0.2, "wsd only: share of the steps spent in the final linear decay")

    def __post_init__(self) -> None:
        _require(self.warmup_steps >= 0, f"schedule.warmup_steps is {self.warmup_steps}, expected 0 or more")
        _require(0 <= self.min_ratio <= 1, f"schedule.min_ratio is {self.min_ratio}, expected 0 <= min_ratio <= 1")
        _require(0 < self.decay_fraction <= 1, f"schedule.decay_fraction is {self.decay_fraction}, expected in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over the processes."""

    strategy: Literal["auto", "single", "ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3"] = _option(
        "auto", "single: one process; ddp: a replica per rank; fsdp: sharded (FSDP2); hsdp: sharded inside each of "
                "`replicas` groups; zero1, zero2, zero3: DeepSpeed, needs that package; auto: single or fsdp")
    replicas: int = _option(0, "hsdp: copies of the model, each sharded over ranks / replicas; 0: one per node")
    offload_optimizer: bool = _option(False, "zero1-3: optimizer state and its step in host memory")
    offload_parameters: bool = _option(False, "zero3: parameter shards in host memory")
    offload_adam: Literal["torch", "deepspeed"] = _option(
        "torch", "AdamW of an offloaded optimizer; deepspeed: its C++ CPUAdam, compiled at first use")
    deepspeed_config: str | None = _option(
        None, "zero1-3: DeepSpeed JSON laid over the derived one (`gptdist config CONFIG --deepspeed` prints it)")
    tensor: int = _option(1, "fsdp, hsdp: processes that divide each layer among them (tensor parallelism); the others "
                             "are data-parallel")
    device: Literal["auto", "cpu", "cuda"] = _option("auto", "auto: cuda where a GPU is visible")
    reshard_after_forward: bool = _option(True, "fsdp: free the gathered weights of a block after its forward (ZeRO-3)")
    threads: int = _option(0, "CPU threads per process; 0: cores of this host / processes on it")
    timeout_s: int = _option(1800, "seconds after which a collective that does not finish ends the run")

    def __post_init__(self) -> None:
        self._check_sharding()
        _require(self.tensor > 0, f"parallel.tensor is {self.tensor}, expected at least 1")
        _require(self.tensor == 1 or self.strategy in ("auto", "fsdp", "hsdp"),
                 f"parallel.tensor={self.tensor} needs parallel.strategy=fsdp or hsdp, got {self.strategy}")
        _require(self.threads >= 0, f"parallel.threads is {self.threads}, expected 0 or more")
        _require(self.timeout_s > 0, f"parallel.timeout_s is {self.timeout_s}, expected > 0")

    def _check_sharding(self) -> None:
        zero = self.strategy.startswith("zero")
        _require(self.replicas >= 0, f"parallel.replicas is {self.replicas}, expected 0 (one per node) or more")
        _require(self.replicas == 0 or self.strategy == "hsdp",
                 f"parallel.replicas={self.replicas} belongs to parallel.strategy=hsdp, got {self.strategy}")
        _require(zero or not self.offload_optimizer,
                 f"parallel.offload_optimizer needs parallel.strategy=zero1, zero2 or zero3, got {self.strategy}")
        _require(self.strategy == "zero3" or not self.offload_parameters,
                 f"parallel.offload_parameters needs parallel.strategy=zero3, got {self.strategy}")
        _require(self.offload_optimizer or self.offload_adam == "torch",
                 "parallel.offload_adam=deepspeed is for parallel.offload_optimizer=true")
        _require(zero or self.deepspeed_config is None,
                 f"parallel.deepspeed_config needs parallel.strategy=zero1, zero2 or zero3, got {self.strategy}")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Validation during the run."""

    every: int = _option(100, "steps between evaluations (one more at the end); 0: only at the end")
    tokens: int = _option(0, "pretrain: validation tokens per evaluation; 0: the whole held-out split")
    examples: int = _option(0, "fine-tuning: validation examples per evaluation; 0: all")
    micro_batch: int = _option(16, "sequences per rank and forward pass")
    prompt: str = _option("", "pretrain: a text that the model goes on from at each evaluation, for 100 tokens, in "
                              "metrics.jsonl and TensorBoard; empty: none")
    tasks: list[str] = _option((), "evaluation tasks beside it, as `gptdist evaluate --tasks` names them: stdlib, "
                                   "stdlib-choice, FILE, KIND=FILE ...; they change nothing that the run computes. "
                                   "Items whose answers are longer than the context are left out")
    tasks_every: int = _option(0, "steps between runs of the tasks (one more at the end); 0: only at the end")
    tasks_limit: int = _option(100, "items of each task that are scored; 0: all")
    tasks_shots: int = _option(0, "the first items of a task are examples before every question")

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", list(self.tasks))
        for name in ("every", "tokens", "examples", "tasks_every", "tasks_limit", "tasks_shots"):
            _require(getattr(self, name) >= 0, f"eval.{name} is {getattr(self, name)}, expected 0 or more")
        _require(self.micro_batch > 0, f"eval.micro_batch is {self.micro_batch}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved when, and what the run starts from."""

    every: int = _option(500, "steps between checkpoints (one more at the end); 0: only at the end")
    keep_last: int = _option(2, "how many of the newest checkpoints are kept")
    keep_best: bool = _option(True, "also keep the checkpoint with the lowest validation loss")
    resume: str = _option("auto", "auto: the run's newest complete checkpoint, if any; never; or a checkpoint's path")
    init_from: str | None = _option(None, "start from this checkpoint's weights only: fresh optimizer, step 0")
    verify: bool = _option(True, "check every sha256 before loading")
    asynchronous: bool = _option(
        True, "training waits only while its state is copied to host memory (a second copy of each rank's share stays "
              "there); writing goes on beside it. The run's last save is never in the background")

    def __post_init__(self) -> None:
        _require(self.every >= 0, f"checkpoint.every is {self.every}, expected 0 or more")
        _require(self.keep_last >= 1, f"checkpoint.keep_last is {self.keep_last}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives and what it reports."""

    dir: str = _option("runs/default", "the run's directory: checkpoints/, metrics.jsonl, exit.json, tensorboard/, "
                                        "profile/")
    seed: int = _option(1337, "seeds initialisation, sample order and dropout")
    log_every: int = _option(10, "steps between printed lines (metrics.jsonl has every step)")
    tensorboard: bool = _option(True, "write TensorBoard scalars to RUN_DIR/tensorboard")
    wandb: str | None = _option(None, "Weights & Biases project to log to (the extra `wandb`); its key comes from "
                                      "the environment (WANDB_API_KEY) or `wandb login`, and is saved nowhere")
    hang_timeout_s: float = _option(
        600.0, "seconds without progress of any rank after which the run writes RUN_DIR/hang-report-*.txt and ends "
               "with exit code 75; parallel.timeout_s before the first step. 0: off")

    def __post_init__(self) -> None:
        _require(bool(self.dir), "run.dir is empty, expected the run's directory")
        _require(self.log_every > 0, f"run.log_every is {self.log_every}, expected at least 1")
        _require(0 <= self.hang_timeout_s < float("inf"),
                 f"run.hang_timeout_s is {self.hang_timeout_s}, expected 0 (off) or more seconds")
        _require(0 <= self.seed < 2**63, f"run.seed is {self.seed}, expected 0 <= seed < 2^63")


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """A trace of chosen steps, and what holds memory in them, in RUN_DIR/profile. It changes no result."""

    steps: list[int] = _option((), "[first, last] step to trace with torch.profiler (Chrome's trace format), such as "
                                   "[10, 12]; the first step is 1. Empty: off. Traced steps are slower")
    ranks: list[int] = _option((0,), "which ranks write a trace each")
    memory: bool = _option(False, "in those steps also: CUDA: a snapshot of all allocations, for "
                                  "pytorch.org/memory_viz; CPU: what each operation allocates")

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", list(self.steps))
        object.__setattr__(self, "ranks", list(self.ranks))
        _require(not self.steps or (len(self.steps) == 2 and 1 <= self.steps[0] <= self.steps[1]),
                 f"profile.steps is {self.steps}, expected [first, last] with 1 <= first <= last, or [] for none")
        _require(all(rank >= 0 for rank in self.ranks), f"profile.ranks is {self.ranks}, expected ranks from 0 on")
        _require(bool(self.steps) or not self.memory, "profile.memory=true needs profile.steps=[first, last]")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is learned: next words of raw text, or fine-tuning on examples (usually with checkpoint.init_from)."""

    name: Literal["pretrain", "classify", "instruct", "dpo"] = _option(
        "pretrain", "pretrain: next words of data.path; classify: labels of texts; instruct: answers to instructions; "
                    "dpo: preferred answers")
    train_data: str = _option("", "fine-tuning: file of training examples; empty: examples that come with Python. This "
                                  "and the next two may name variables of the environment, as $GPTDIST_DATA/FILE")
    val_data: str = _option("", "file of validation examples; empty: a part of train_data")
    test_data: str = _option("", "file of test examples, used once at the end; empty: as the task says")
    val_fraction: float = _option(0.1, "instruct, dpo: share of train_data held out where val_data is empty")
    freeze: str = _option("none", "none: everything is trained; head: the head alone; last:N: the last N blocks, the "
                                  "final norm and the head")
    tokenizer: str = _option("bytes", "without checkpoint.init_from: bytes, gpt2, bpe:VOCAB (trained on the texts) or "
                                      "a path, as `gptdist prepare --tokenizer` takes")
    bucket: int = _option(64, "batches' worth of examples that are sorted by length together, so that rows of a batch "
                              "need little padding; 0: off")

    def __post_init__(self) -> None:
        for name in ("train_data", "val_data", "test_data"):
            object.__setattr__(self, name, expand_variables(getattr(self, name)))
        _require(re.fullmatch(r"none|head|last:[1-9][0-9]*", self.freeze) is not None,
                 f"task.freeze is {self.freeze!r}, expected none, head, or last:N such as last:1")
        _require(0 <= self.val_fraction < 1, f"task.val_fraction is {self.val_fraction}, expected 0 <= share < 1")
        _require(self.bucket >= 0, f"task.bucket is {self.bucket}, expected 0 (off) or batches")
        _require(self.name != "pretrain" or not (self.train_data or self.val_data or self.test_data),
                 "task.train_data, val_data and test_data are for fine-tuning, but task.name=pretrain, which reads "
                 "data.path: set task.name to classify, instruct or dpo")
        _require(self.name != "pretrain" or self.freeze == "none",
                 f"task.freeze={self.freeze} is for fine-tuning, but task.name=pretrain")

    @property
    def trained_blocks(self) -> int | None:
        """How many of the last blocks are trained, by `freeze`; None: everything is."""
        return None if self.freeze == "none" else int(self.freeze.partition(":")[2] or 0)


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """task.name=classify: a label for each text. Files: .csv, .tsv, .jsonl, or .txt with label<TAB>text."""

    text_field: str = _option("text", "column or JSON field of the text, where the file names its columns")
    label_field: str = _option("label", "column or JSON field of the label")
    labels: list[str] = _option((), "the labels; empty: those of the training data, sorted")
    split: list[float] = _option((0.7, 0.1, 0.2), "without val_data: shares of train_data that are for training, "
                                                  "validation and test; with test_data the first two in proportion")
    split_seed: int = _option(123, "seeds undersampling and the split")
    balance: Literal["none", "undersample", "weights"] = _option(
        "none", "undersample: as many texts of each label as the rarest has; weights: rarer labels count more")
    pool: Literal["last", "first", "mean"] = _option(
        "last", "what the head sees: hidden state of the last real token, of the first, or the mean over real tokens")
    end_token: bool = _option(True, "append <|endoftext|> to each text")
    baselines: bool = _option(True, "at the end, also test a majority vote and logistic regression on bags of words")

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", list(self.labels))
        object.__setattr__(self, "split", list(self.split))
        _require(len(set(self.labels)) == len(self.labels), f"classify.labels has a label twice: {self.labels}")
        _require(len(self.labels) != 1, f"classify.labels is {self.labels}, expected two or more labels")
        shares = self.split
        _require(len(shares) == 3 and min(shares) >= 0 and shares[0] > 0 and abs(sum(shares) - 1) < 1e-6,
                 f"classify.split is {shares}, expected [train, validation, test] with sum 1 and train above 0")
        _require(0 <= self.split_seed < 2**32, f"classify.split_seed is {self.split_seed}, expected 0 <= seed < 2^32")


@dataclass(frozen=True, kw_only=True)
class InstructConfig:
    """task.name=instruct: answers to instructions."""

    questions: Literal["library", "common"] = _option(
        "library", "without task.train_data, what the questions are about: library: everything in Python's library; "
                   "common: its most used names, asked in more ways")
    format: Literal["auto", "alpaca", "messages", "sharegpt"] = _option("auto", "layout of the records; auto: by keys")
    template: str = _option("alpaca", "how a conversation is written: alpaca, phi3, chatml, a YAML file (see "
                                      "gptdist/data/templates.py), or a text with {prompt} and {answer}")
    mask_prompt: bool = _option(False, "only the answer's tokens count in the loss")
    packing: Literal["none", "pack"] = _option(
        "none", "none: a row an example, padded, rows of like length together; pack: several examples a row, which do "
                "not see each other")
    samples: int = _option(16, "validation questions answered at each evaluation, greedily: they are written to "
                               "RUN_DIR/samples.jsonl, and exact match and ROUGE-L are theirs; 0: none")
    max_new_tokens: int = _option(64, "longest sampled answer in tokens")

    def __post_init__(self) -> None:
        _require(self.samples >= 0, f"instruct.samples is {self.samples}, expected 0 (none) or more")
        _require(self.max_new_tokens > 0, f"instruct.max_new_tokens is {self.max_new_tokens}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """task.name=dpo: direct preference optimisation (Rafailov et al. 2023) on pairs of answers in instruct.template."""

    beta: float = _option(0.1, "how strongly the model is held near the one it starts from")

    def __post_init__(self) -> None:
        _require(0 < self.beta < float("inf"), f"dpo.beta is {self.beta}, expected > 0")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters (Hu et al. 2021): fine-tuning trains them, and the weights that they adapt stay."""

    rank: int = _option(0, "rank of the adapters; 0: off")
    alpha: float = _option(16.0, "adapters are scaled by alpha / rank")
    dropout: float = _option(0.0, "dropout probability of the adapters' input")
    targets: str = _option("attn.qkv|attn.proj|mlp.fc|mlp.proj", "regular expression: linear layers whose name it "
                                                                 "matches get an adapter")
    split_qkv: bool = _option(False, "adapters of their own for queries, keys and values, not one for all three")
    save: Literal["all", "adapters"] = _option(
        "all", "what checkpoints hold: all: the base's weights too; adapters: what is trained, and the path and sha256 "
               "of the base, which is checkpoint.init_from and has to stay there")

    def __post_init__(self) -> None:
        _require(self.rank >= 0, f"lora.rank is {self.rank}, expected 0 (off) or more")
        _require(0 < self.alpha < float("inf"), f"lora.alpha is {self.alpha}, expected > 0")
        _require(0.0 <= self.dropout < 1.0, f"lora.dropout is {self.dropout}, expected 0 <= dropout < 1")
        try:
            re.compile(self.targets)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"lora.targets is {self.targets!r}, expected a regular expression: {error}") from error

    @property
    def target_pattern(self) -> re.Pattern:
        """Of the whole names of the layers that are adapted."""
        return re.compile(rf"(?:.*\.)?(?:{self.targets})")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training run."""

    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()
    profile: ProfileConfig = ProfileConfig()
    classify: ClassifyConfig = ClassifyConfig()
    instruct: InstructConfig = InstructConfig()
    dpo: DPOConfig = DPOConfig()
    lora: LoRAConfig = LoRAConfig()

    given: ClassVar[frozenset[str]] = frozenset()  # the section.key that the file and the command line set

    def __post_init__(self) -> None:
        context, tokens = self.model.context, self.train.tokens_per_step
        _require(self.is_finetuning or tokens % context == 0,
                 f"train.tokens_per_step={tokens} is not a multiple of model.context={context}: "
                 f"use {max(1, round(tokens / context)) * context}")
        _require(not (self.is_finetuning and self.data.input),
                 f"data.input={self.data.input} is for pretraining, but task.name={self.task.name}: use "
                 f"task.train_data")
        _require(self.instruct.questions == "library" or not self.task.train_data,
                 f"instruct.questions={self.instruct.questions} is about examples that come with Python, but "
                 f"task.train_data={self.task.train_data} is given: leave one of them out")
        _require(self.train.epochs > 0 or self.schedule.warmup_steps <= self.train.steps,
                 f"schedule.warmup_steps={self.schedule.warmup_steps} exceeds train.steps={self.train.steps}")
        _require(self.lora.rank == 0 or self.lora.save == "all" or self.checkpoint.init_from is not None,
                 "lora.save=adapters needs checkpoint.init_from, the checkpoint that has the rest of the weights")
        _require(self.lora.rank == 0 or self.task.freeze == "none",
                 f"task.freeze={self.task.freeze} with lora.rank={self.lora.rank}: adapters keep all other weights as "
                 f"they are; use task.freeze=none, or lora.rank=0")
        _require(not (self.train.compile and self.parallel.strategy == "zero3"),
                 "train.compile=true with parallel.strategy=zero3: DeepSpeed's hooks around every module leave nothing "
                 "to compile; use fsdp, or train.compile=false")
        _require(not self.eval.tasks or self.task.name != "classify",
                 "eval.tasks is for models that write text, but task.name=classify: leave it out")
        for name in ("tasks", "prompt"):
            _require(not getattr(self.eval, name) or self.parallel.tensor == 1,
                     f"eval.{name} with parallel.tensor={self.parallel.tensor}: it divides the positions of a "
                     f"sequence, and cannot go on from a single one; use `gptdist evaluate` or `generate` on the "
                     f"checkpoints")
        _require(not self.eval.prompt or not self.is_finetuning,
                 f"eval.prompt is for pretraining, but task.name={self.task.name}: leave it out")
        _require(not self.train.may_rewind or self.checkpoint.every > 0,
                 "train.on_nonfinite or train.on_spike is rewind, but checkpoint.every=0 leaves nothing to go back to: "
                 "set checkpoint.every")
        _require(not self.train.may_rewind or self.task.name != "dpo" or self.lora.rank > 0,
                 "train.on_nonfinite or train.on_spike is rewind with task.name=dpo: the samples that take the place "
                 "of others may have no reference of the model at the start; use skip or stop, or lora.rank")
        self._check_muon()
        self._check_tensor_parallel()
        # An input that is divided by channels has no mask that is the same however many processes divide it.
        _require(self.lora.rank == 0 or self.lora.dropout == 0 or self.parallel.tensor == 1,
                 f"lora.dropout={self.lora.dropout} with parallel.tensor={self.parallel.tensor}: adapters have no "
                 f"dropout where processes divide their input; use lora.dropout=0, or parallel.tensor=1")

    def _check_muon(self) -> None:
        """Muon orthogonalises whole matrices."""
        strategy, tensor = self.parallel.strategy, self.parallel.tensor
        _require(self.optim.name == "adamw" or not strategy.startswith("zero"),
                 f"optim.name=muon with parallel.strategy={strategy}: Muon needs whole matrices, and DeepSpeed steps "
                 "flat partitions that cut them anywhere; use fsdp, or optim.name=adamw")
        _require(self.optim.name == "adamw" or tensor == 1,
                 f"optim.name=muon with parallel.tensor={tensor}: Muon needs whole matrices, and each process steps "
                 f"its part of them; use parallel.tensor=1, or optim.name=adamw")

    def _check_tensor_parallel(self) -> None:
        """Whatever parallel.tensor processes divide among them has equal parts."""
        model, tensor = self.model, self.parallel.tensor
        divided = {"model.context": model.context, "model.n_kv_heads (null: model.n_heads)": model.kv_heads,
                   "the hidden width model.mlp_ratio x model.width": model.hidden}
        if model.vocab_size is not None:
            divided["model.vocab_size, rounded up to model.vocab_multiple,"] = model.padded_vocab
        for name, size in divided.items():
            _require(size % tensor == 0,
                     f"parallel.tensor={tensor} does not divide {name} = {size}: change one of them")

    @property
    def is_finetuning(self) -> bool:
        return self.task.name != "pretrain"

    @property
    def sequences_per_step(self) -> int:
        """Samples of an optimizer step over all ranks."""
        return self.train.batch if self.is_finetuning else self.train.tokens_per_step // self.model.context


COMMAND_LINE = "command line"  # where a bad override comes from
SECTIONS: dict[str, type] = {f.name: f.type for f in dataclasses.fields(Config)}


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False)


def from_dict(values: dict[str, dict[str, Any]], where: str, overrides: Collection[str] = ()) -> Config:
    """The Config of nested dicts, such as a checkpoint's resolved configuration. Raises UserError as `load` does."""
    import yaml

    _check_keys(values, where)
    return _parse(["--config", yaml.safe_dump(values)], _checked_overrides(overrides), where, _names(values))


def load(path: str | None, overrides: Collection[str] = ()) -> Config:
    """Read a YAML file (None: all defaults), apply `--section.key=value` overrides.

    Raises UserError for a missing or malformed file, an unknown key (names the nearest) or an impossible value.
    """
    file, values = [], {}
    if path is not None:
        values = _read_yaml(path)
        _check_keys(values, path)
        file = ["--config", path] if values else []
    return _parse(file, _checked_overrides(overrides), path or COMMAND_LINE, _names(values))


def _names(values: dict[str, dict[str, Any]]) -> set[str]:
    """The section.key of nested values that are not null."""
    return {f"{section}.{key}" for section, fields in values.items() for key, value in fields.items()
            if value is not None}


@functools.cache
def _yaml_loader() -> type:
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
            node, marks = super().compose_mapping_node(anchor), {}
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    first = marks.setdefault(key.value, key.start_mark)
                    if first is not key.start_mark:
                        raise yaml.MarkedYAMLError(
                            problem=f"{key.value!r} is given twice, first in line {first.line + 1}: keep one",
                            problem_mark=key.start_mark)
            return node

    return Loader


def parse_yaml(text: str | bytes, where: str) -> Any:
    """The plain values of a YAML text; no tag makes an object.

    Raises UserError for what is no YAML, such as a mapping that has a key twice (of which PyYAML takes the last), and
    for more than YAML_VALUES values: aliases (`*name`) inside each other stand for any number of them.
    """
    import yaml

    try:
        values = yaml.load(text, Loader=_yaml_loader())
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or a number that is none
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())[:300]}") from error
    rest, count = [values], 0
    while rest:
        value = rest.pop()
        count += 1
        if count > YAML_VALUES:
            raise UserError(f"{where} stands for more than {YAML_VALUES:,} values: expected a few hundred; write out "
                            f"what its aliases (*name) repeat")
        rest += value if isinstance(value, list) else [*value, *value.values()] if isinstance(value, dict) else []
    return values


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); expected a YAML configuration") from error
    values = parse_yaml(text, path)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, expected sections such as `model:` and `train:`")
    return values


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _check_keys(values: dict[str, Any], where: str) -> None:
    for section, fields in values.items():
        if section not in SECTIONS:
            raise UserError(f"{where}: unknown section {section!r}; {_nearest(str(section), list(SECTIONS))}")
        known = [f.name for f in dataclasses.fields(SECTIONS[section])]
        if not isinstance(fields, dict):
            raise UserError(f"{where}: section {section!r} is {fields!r}, expected keys such as {known[0]!r}")
        for key in fields:
            if key not in known:
                raise UserError(f"{where}: unknown key {section}.{key}; {_nearest(str(key), known)}")


def _checked_overrides(overrides: Collection[str]) -> list[str]:
    """Overrides in the form --section.key=value; `--section.key value` is joined."""
    result: list[str] = []
    rest = iter(overrides)
    for word in rest:
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}; overrides are written --section.key=value")
        name, equals, value = word[2:].partition("=")
        section, _, key = name.partition(".")
        if not key:
            raise UserError(f"unknown option {word!r}; overrides are written --section.key=value, "
                            f"sections: {', '.join(SECTIONS)}")
        _check_keys({section: {key: None}}, COMMAND_LINE)
        if not equals:
            value = next(rest, None)
            if value is None:
                raise UserError(f"--{name} has no value; write --{name}=value")
        result.append(f"--{name}={value}")
    return result


@functools.cache
def _parser() -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name)
    return parser


def _parse(file: list[str], overrides: list[str], where: str, in_file: Collection[str]) -> Config:
    """The Config of the arguments that stand for a file called `where`, which sets `in_file`, and checked overrides.

    A message begins with `where`, or with "command line" where an override is at fault.
    """
    overridden = {word[2:].partition("=")[0] for word in overrides}
    values = _typed_values([], file, where)
    values = _typed_values(file, overrides, COMMAND_LINE) if overrides else values
    try:
        for name, section in SECTIONS.items():
            _check_nulls(name, section, values[name])
        config = Config(**{name: section(**values[name]) for name, section in SECTIONS.items()})
    except UserError as error:
        named = set(re.findall(r"[a-z]+\.[a-z_0-9]+", str(error)))
        raise UserError(f"{COMMAND_LINE if named & overridden else where}: {error}") from error
    object.__setattr__(config, "given", frozenset(overridden.union(in_file)))
    return config


def _typed_values(before: list[str], arguments: list[str], where: str) -> dict[str, dict[str, Any]]:
    """All values after `before`, which is known to be good, and `arguments`, which `where` is to be blamed for."""
    from jsonargparse import ArgumentError

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return _parser().parse_args([*before, *arguments]).as_dict()
    except ArgumentError as error:
        raise UserError(f"{where}: {_plain_error(error)}") from error


def _check_nulls(name: str, section: type, values: dict[str, Any]) -> None:
    """jsonargparse lets null through for any type."""
    for key, hint in typing.get_type_hints(section).items():
        if values[key] is None and type(None) not in typing.get_args(hint):
            raise UserError(f"{name}.{key} is null, expected {_type_name(hint)}")


def _plain_error(error: Exception) -> str:
    """jsonargparse's words in one line: `train.precision is 'fp8', expected 'auto' | 'fp32' | 'bf16'`."""
    text = " ".join(str(error).split())
    match = re.match(r'Parser key "(.+?)":.*?Expected an? (.+?)\. Got value: (.*)', text)
    if not match:
        return text[:400]
    key, expected, got = match.groups()
    expected = re.sub(r"<class '(\w+)'>", r"\1", expected).replace("typing.", "")
    expected = re.sub(r"Literal\[(.*?)\]", lambda m: m.group(1).replace(", ", " | "), expected)
    return f"{key} is {got[:80]!r}, expected {expected}"


def show() -> str:
    """All defaults as a YAML file with every field's meaning: itself a valid configuration."""
    import yaml

    lines = ["# gptdist configuration: every field, its default, its meaning."]
    for name, section in SECTIONS.items():
        lines += ["", f"# {section.__doc__}", f"{name}:"]
        hints = typing.get_type_hints(section)
        for field in dataclasses.fields(section):
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            value = yaml.safe_dump(default, default_flow_style=True).splitlines()[0]
            lines.append(f"  {field.name}: {value}  # {field.metadata['doc']} [{_type_name(hints[field.name])}]")
    return "\n".join(lines) + "\n"


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is None:
        return hint.__name__.replace("NoneType", "null")
    if typing.get_origin(hint) is list:
        return str(hint)
    return " | ".join(_type_name(part) for part in typing.get_args(hint))
