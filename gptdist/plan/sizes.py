"""Bytes of the tensors of a run: weights, what a block saves for its backward, the head's chunks."""

from bisect import bisect_left, bisect_right
from dataclasses import replace
from functools import cached_property
from itertools import accumulate

from gptdist.config import Config
from gptdist.plan.devices import Device
from gptdist.plan.shapes import OUTSIDE, Layout, Step, Weight, strategy_of, weights_of

# As in ops/cross_entropy.py: elements of the buffer of logits on a GPU, bytes on a CPU, and the least rows.
LOGITS_ELEMENTS, CPU_LOGITS_BYTES, LEAST_ROWS = 1 << 24, 1 << 27, 64


class Sizes:
    """`a`: bytes of a value in the compute precision, `r`: in the residual stream."""

    def __init__(self, config: Config, layout: Layout, step: Step, device: Device):
        self.config, self.layout, self.step, self.on_cpu = config, layout, step, device.kind == "cpu"
        self.strategy = strategy_of(config, layout.size)
        self.shards = layout.shards
        self.bf16 = config.train.precision == "bf16"
        self.a = 2 if self.bf16 else 4
        # Autocast keeps the stream and the weights in fp32; FSDP and ZeRO cast every weight, the embedding's too.
        self.autocast = self.bf16 and self.strategy in ("single", "ddp")
        self.r = 4 if self.autocast else self.a
        self.weights = weights_of(config, layout.tensor)
        if not self.on_cpu and self.strategy in ("fsdp", "hsdp", "zero3"):
            self.weights = _joined(self.weights)
        self.vocabulary = next(w.size for w in self.weights if w.name in ("tied", "head"))

    @cached_property
    def units(self) -> dict[int, list[Weight]]:
        """The weights of each block, and OUTSIDE."""
        units: dict[int, list[Weight]] = {OUTSIDE: []}
        for w in self.weights:
            units.setdefault(w.unit, []).append(w)
        return units

    # Activations

    def saved(self, block: int) -> list[tuple[str, float]]:
        """What the backward of a block needs, if it is not recomputed; dropout's masks are computed again."""
        m, t, tokens = self.config.model, self.layout.tensor, self.step.tokens
        kv = 2 * m.kv_heads * m.head_dim
        values = {"stream": self.r * m.width / t, "normed": self.a * m.width, "qkv": self.a * (m.width + kv) / t,
                  "attended": self.a * m.width / t + 4 * m.n_heads / t, "sum": self.r * m.width / t + 16 / t,
                  "normed again": self.a * m.width, "hidden": self.a * m.hidden / t, "gelu": self.a * m.hidden / t}
        if not self.on_cpu:
            return [("all", tokens * sum(values.values()))]
        return [(name, tokens * size) for name, size in values.items()]

    def learns(self, block: int) -> bool:
        """Whether gradients go through a block: something in it or below it is trained."""
        return any(w.trained for w in self.weights if w.unit <= block and w.name not in ("head", "ln_f"))

    def recomputes(self, block: int) -> bool:
        every = self.config.train.checkpoint_every_block
        return every > 0 and block % every == 0

    @property
    def block_input(self) -> float:
        return self.step.tokens * self.r * self.config.model.width / self.layout.tensor

    @property
    def last_hidden(self) -> float:
        """The last norm's input and output."""
        return self.block_input + self.hidden

    def activations(self) -> float:
        """Saved by a whole forward."""
        blocks = range(self.config.model.n_layers)
        kept = (self.block_input if self.recomputes(i) else sum(size for _, size in self.saved(i)) for i in blocks)
        return sum(kept) + self.last_hidden

    def input_gradient(self, w: Weight) -> float:
        """Of a product's input."""
        m, t = self.config.model, self.layout.tensor
        values = {"attn.qkv": m.width, "attn.proj": m.width / t, "mlp.fc": m.width, "mlp.proj": m.hidden / t}
        return self.step.tokens * self.a * values.get(w.name, 0)

    # The head

    @property
    def hidden(self) -> float:
        return self.step.tokens * self.a * self.config.model.width

    @property
    def head_in_forward(self) -> bool:
        """Whether the forward makes the head's gradients: ops/cross_entropy.py."""
        return self.on_cpu and self.layout.tensor == 1

    @property
    def logits_rows(self) -> int:
        vocab = -(-self.config.model.vocab_size // self.layout.tensor)
        rows = CPU_LOGITS_BYTES // (vocab * self.a) if self.head_in_forward else LOGITS_ELEMENTS // vocab
        return min(self.step.tokens, max(LEAST_ROWS, rows))

    @property
    def chunk(self) -> float:
        elements = self.logits_rows * self.config.model.vocab_size / self.layout.tensor
        in_fp32 = 4 if self.bf16 and self.layout.tensor > 1 else 0  # ops/linear_logsumexp.py
        return (self.a + in_fp32) * elements

    @property
    def product(self) -> float:
        """The gradient of the head's weight, of one chunk."""
        return self.a * self.vocabulary

    @property
    def total(self) -> float:
        """Its sum over chunks, where that is kept apart."""
        several = self.bf16 and self.logits_rows < self.step.tokens
        return 4 * self.vocabulary if several or self.layout.tensor > 1 else 0.0

    @property
    def head_result(self) -> str:
        """Which of the two the gradient is; "fresh": another."""
        if self.layout.tensor > 1:
            return "total"
        return "product" if not self.head_in_forward and not self.total and not self.autocast else "fresh"

    # Weights

    def weight_gradient(self, w: Weight) -> int:
        """Bytes of an element of a weight's gradient, as the backward makes it."""
        return 4 if self.autocast and (w.unit == OUTSIDE or not w.product) else self.a

    def slots(self, w: Weight) -> int:
        """AdamW has two of each parameter, Muon a momentum alone of the blocks' matrices."""
        return 1 if self.config.optim.name == "muon" and w.unit != OUTSIDE and w.product else 2

    def parts(self, matrix: bool) -> list[list[tuple[int, float]]]:
        """For each of ZeRO's ranks: the sizes of a group's parameters in its part, and how much of each lies there."""
        starts = [0, *accumulate(w.size for w in self.weights if w.trained and w.matrix is matrix)]
        each = starts[-1] / self.shards
        found = []
        for i in range(self.shards):
            begin, end = i * each, (i + 1) * each
            inside = range(max(bisect_right(starts, begin) - 1, 0), min(bisect_left(starts, end), len(starts) - 1))
            found.append([(starts[k + 1] - starts[k], min(starts[k + 1], end) - max(starts[k], begin)) for k in inside])
        return found

    @cached_property
    def largest_part(self) -> float:
        """Elements of the parameters that lie in a rank's part in whole or in part, of the rank that has most."""
        ranks = zip(self.parts(True), self.parts(False), strict=True)
        return max(sum(whole for whole, _ in matrices + vectors) for matrices, vectors in ranks)

    @cached_property
    def largest_slice(self) -> float:
        """Elements of a rank's largest piece of one parameter."""
        return max(inside for part in self.parts(True) for _, inside in part)

    @property
    def largest_weight(self) -> int:
        return max(w.size for w in self.weights if w.trained)


def _joined(weights: list[Weight]) -> list[Weight]:
    """The matrices of a block as one where it makes no difference: a plan of many blocks takes a third of the time."""
    found: dict[tuple, Weight] = {}
    for w in weights:
        key = (w.unit, w.trained, w.matrix, w.product) if w.unit != OUTSIDE else (w.unit, w.name)
        found[key] = replace(w, size=found[key].size + w.size) if key in found else w
    return list(found.values())
