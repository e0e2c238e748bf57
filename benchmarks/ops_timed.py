"""The ops that are timed: this project's beside what PyTorch offers, on CPU and GPU, for kernels.py and gpu_check.py.

To add an op: a function that makes it for one dtype and shape, and its line in FAMILIES.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.checks import decode_inputs, largest_error, optimizer_lists, reference, with_gradients
from gptdist import ops

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FORWARD, BACKWARD = "forward", "backward"
LARGEST_SCORES = 4 << 30  # bytes of fp32 scores up to which attention that stores them is run


@dataclass(frozen=True)
class Way:
    """One way to compute an op: a function of its tensors, all of them differentiated."""

    function: Callable
    tensors: tuple[torch.Tensor, ...]
    on_reference: bool = False  # with GPTDIST_OPS=reference

    def context(self):
        return reference() if self.on_reference else nullcontext()


@dataclass(frozen=True)
class Op:
    """One op at one dtype and shape. bytes and flops: what forward and backward must move and compute.

    Ops without a backward (a norm, decoding) say so; then only the first of each counts.
    """

    shape: str
    ours: Way
    peers: dict[str, Way]
    bytes: tuple[int, int]
    flops: tuple[int, int] = (0, 0)
    has_backward: bool = True


@dataclass(frozen=True)
class Timed:
    """One pass of an op, ready to be timed: `functions` by name, this project's first."""

    op: str
    direction: str
    dtype: str
    shape: str
    bytes: int
    flops: int
    functions: dict[str, Callable] = field(repr=False)


OURS = "gptdist"
PEERS = {"PyTorch", "compiled", "reference", "SDPA", "flash", "cuDNN", "math"}


def forward(way: Way) -> Callable:
    def run():
        with way.context(), torch.no_grad():
            way.function(*way.tensors)

    return run


def backward(way: Way) -> Callable:
    """The gradient of a forward that ran once, in the first call; its intermediate results are kept."""
    graph = []

    def run():
        with way.context(), torch._functorch.config.patch(donated_buffer=False):  # a compiled one is run again too
            if not graph:
                leaves = [tensor.detach().requires_grad_() for tensor in way.tensors]
                outputs = way.function(*leaves)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                graph.extend((outputs, leaves, [torch.randn_like(y) for y in outputs]))
            torch.autograd.grad(*graph, retain_graph=True)

    return run


def passes(name: str, op: Op, dtype: torch.dtype, *, peers: set[str] | None = None) -> Iterator[Timed]:
    """Forward and backward of an op. peers: names of those to time beside it; None: all."""
    ways = {OURS: op.ours} | {name: way for name, way in op.peers.items() if peers is None or name in peers}
    for number, (direction, make) in enumerate(((FORWARD, forward), (BACKWARD, backward))[: 1 + op.has_backward]):
        functions = {way_name: make(way) for way_name, way in ways.items()}
        yield Timed(name, direction, short(dtype), op.shape, op.bytes[number], op.flops[number], functions)


def errors(op: Op) -> dict[str, float]:
    """Largest error over largest value of this project's outputs and gradients, against the reference in float64."""
    way = op.ours
    if not op.has_backward:
        exact = [tensor.double() for tensor in way.tensors]  # before an op that works in place
        with torch.no_grad():
            got = way.function(*way.tensors)
            with reference():
                expected = way.function(*exact)
        return {FORWARD: largest_error([got], [expected])}
    got = with_gradients(way.function, way.tensors)
    with reference():
        expected = with_gradients(way.function, way.tensors, torch.float64)
    outputs = len(got) - len(way.tensors)
    return {
        FORWARD: largest_error(got[:outputs], expected[:outputs]),
        BACKWARD: largest_error(got[outputs:], expected[outputs:]),
    }


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def with_torch(function: Callable, tensors: tuple, ours: Way) -> dict[str, Way]:
    """PyTorch's function as it is and compiled, and this project's reference."""
    return {
        "PyTorch": Way(function, tensors),
        "compiled": Way(compiled(function), tensors),
        "reference": Way(ours.function, ours.tensors, on_reference=True),
    }


def compiled(function: Callable) -> Callable:
    """torch.compile of a function, at its first call."""
    made = functools.cache(lambda: torch.compile(function, dynamic=False))
    return lambda *tensors: made()(*tensors)


# the ops


def attention(device, dtype, B: int, T: int, H: int, D: int) -> Op:
    """Causal, a kv head a query head. FLOPs as in Dao, "FlashAttention-2" (2023), 4.1: half of the square counts."""
    qkv = torch.randn(B, T, H, 3, D, device=device).to(dtype)
    q, k, v = (qkv[:, :, :, i].contiguous().transpose(1, 2) for i in range(3))  # (B, H, T, D), heads inside in memory

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def on(backend):
        def function(q, k, v):
            with sdpa_kernel(backend):
                return sdpa(q, k, v)

        return function

    def stored_scores(function):
        def guarded(q, k, v):
            if 4 * B * H * T * T > LARGEST_SCORES:
                raise MemoryError(f"not run: {4 * B * H * T * T / 2**30:.0f} GiB of scores")
            return function(q, k, v)

        return guarded

    def formula(q, k, v):
        scores = (q @ k.mT) * D**-0.5
        hidden = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v

    ours = Way(ops.attention, (qkv,))
    if device.type == "cuda":
        peers = {
            "flash": on(SDPBackend.FLASH_ATTENTION),
            "cuDNN": on(SDPBackend.CUDNN_ATTENTION),
            "math": stored_scores(on(SDPBackend.MATH)),
        }
    else:
        peers = {"SDPA": sdpa, "math": stored_scores(on(SDPBackend.MATH))}
    peers["compiled"] = stored_scores(compiled(formula))
    ways = {name: Way(function, (q, k, v)) for name, function in peers.items()}
    ways["reference"] = Way(ops.attention, (qkv,), on_reference=True)
    n, statistics = q.nbytes, 4 * B * H * T
    square = 4 * B * H * D * T * T // 2
    return Op(
        f"B={B} T={T} H={H} D={D}", ours, ways, (4 * n + statistics, 8 * n + statistics), (square, square * 5 // 2)
    )


def layer_norm(device, dtype, rows: int, width: int) -> Op:
    x = torch.randn(rows, width, device=device).to(dtype)
    tensors = (x, *(torch.randn(width, device=device).to(dtype) for _ in range(2)))
    ours = Way(ops.layer_norm, tensors)
    peers = with_torch(lambda x, weight, bias: F.layer_norm(x, (width,), weight, bias), tensors, ours)
    return Op(f"[{rows}, {width}]", ours, peers, (2 * x.nbytes, 3 * x.nbytes))


def residual_layer_norm(device, dtype, rows: int, width: int) -> Op:
    x, residual = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
    tensors = (x, residual, *(torch.randn(width, device=device).to(dtype) for _ in range(2)))

    def function(x, residual, weight, bias):
        s = x + residual
        return F.layer_norm(s, (width,), weight, bias), s

    ours = Way(ops.residual_layer_norm, tensors)
    return Op(f"[{rows}, {width}]", ours, with_torch(function, tensors, ours), (4 * x.nbytes, 4 * x.nbytes))


def bias_gelu(device, dtype, rows: int, width: int) -> Op:
    x, bias = torch.randn(rows, width, device=device).to(dtype), torch.randn(width, device=device).to(dtype)
    ours = Way(ops.bias_gelu, (x, bias))
    peers = with_torch(lambda x, bias: F.gelu(x + bias, approximate="tanh"), (x, bias), ours)
    return Op(f"[{rows}, {width}]", ours, peers, (2 * x.nbytes, 3 * x.nbytes))


def cross_entropy(device, dtype, rows: int, vocabulary: int) -> Op:
    logits = torch.randn(rows, vocabulary, device=device).to(dtype)
    targets = torch.randint(vocabulary, (rows,), device=device)
    ours = Way(lambda z: ops.cross_entropy(z, targets), (logits,))
    peers = with_torch(lambda z: F.cross_entropy(z, targets, reduction="none"), (logits,), ours)
    return Op(f"[{rows}, {vocabulary}]", ours, peers, (logits.nbytes, 2 * logits.nbytes))


def linear_cross_entropy(device, dtype, rows: int, vocabulary: int, width: int = 768) -> Op:
    """Bound by matrix products: one forward, two backward."""
    hidden = torch.randn(rows, width, device=device).to(dtype)
    weight = (0.05 * torch.randn(vocabulary, width, device=device)).to(dtype)
    targets = torch.randint(vocabulary, (rows,), device=device)
    ours = Way(lambda h, w: ops.linear_cross_entropy(h, w, targets), (hidden, weight))

    def function(h, w):
        return F.cross_entropy(F.linear(h, w), targets, reduction="none").float()

    peers = with_torch(function, ours.tensors, ours)
    least, product = hidden.nbytes + weight.nbytes, 2 * rows * vocabulary * width
    return Op(f"[{rows}, {width}] x [{vocabulary}]", ours, peers, (least, 2 * least), (product, 2 * product))


def dropout(device, dtype, rows: int, width: int) -> Op:
    x = torch.randn(1, rows, width, device=device).to(dtype)
    key, ids = ops.dropout_key(1, 2, device), torch.zeros(1, dtype=torch.int64, device=device)
    ours = Way(lambda x: ops.dropout(x, 0.1, key=key, sample_ids=ids, site=0), (x,))
    peers = with_torch(lambda x: F.dropout(x, 0.1, training=True), (x,), ours)
    return Op(f"[1, {rows}, {width}]", ours, peers, (2 * x.nbytes, 2 * x.nbytes))


def decode_attention(device, dtype, B: int, context: int, H: int, D: int) -> Op:
    """One query for each head. PyTorch's keys and values lie in one piece."""
    q, k, v, table, lengths = decode_inputs(device, dtype, B, 1, H, 1, D, context - 1)
    lengths.fill_(context - 1)
    ours = Way(lambda q, k, v: ops.decode_attention(q, k, v, table, lengths), (q, k, v))
    whole = tuple(torch.randn(B, H, n, D, device=device).to(dtype) for n in (1, context, context))
    peers = {"PyTorch": Way(F.scaled_dot_product_attention, whole), "reference": replace(ours, on_reference=True)}
    least, products = whole[1].nbytes + whole[2].nbytes, 4 * B * H * D * context
    return Op(f"B={B} T={context} H={H} D={D}", ours, peers, (least, 0), (products, 0), has_backward=False)


def linear(device, dtype, rows: int, inputs: int, outputs: int) -> Op:
    """Generation's products: bound by reading the weight, until there are many rows."""
    x, weight = (torch.randn(n, inputs, device=device).to(dtype) for n in (rows, outputs))
    ours = Way(ops.linear, (x, weight))
    peers = {"PyTorch": Way(F.linear, (x, weight)), "reference": replace(ours, on_reference=True)}
    products = 2 * rows * inputs * outputs
    return Op(f"[{rows}, {inputs}] x {outputs}", ours, peers, (weight.nbytes, 0), (products, 0), has_backward=False)


def adamw(device, dtype, tensors: int, elements: int) -> Op:
    """A step of `tensors` tensors of `elements`, gradients in `dtype`, shadows in it where it has 16 bits."""
    lists = optimizer_lists(device, dtype, (elements,) * tensors)
    params, grads, _, _ = lists
    shadows = [x.to(dtype) for x in params] if dtype != FP32 else None
    step = dict(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=2)

    def function(*flat):
        ops.adamw_(*(flat[i : i + tensors] for i in range(0, 4 * tensors, tensors)), shadows=shadows, **step)
        return flat[0]

    leaves = [x.clone().requires_grad_() for x in params]
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = grad.float()
    optimizer = torch.optim.AdamW(leaves, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def peer():
        optimizer.step()
        if shadows is not None:
            torch._foreach_copy_(shadows, leaves)

    ours = Way(function, tuple(x for each in lists for x in each))
    count = tensors * elements
    least = count * (24 + grads[0].element_size() + (2 if shadows else 0))
    ways = {"PyTorch": Way(peer, ()), "reference": replace(ours, on_reference=True)}
    return Op(f"{tensors} x [{elements}]", ours, ways, (least, 0), has_backward=False)


def grad_norm(device, dtype, tensors: int, elements: int) -> Op:
    grads = optimizer_lists(device, dtype, (elements,) * tensors)[1]
    ours = Way(lambda *grads: ops.grad_norm(grads), tuple(grads))
    peers = {
        "PyTorch": Way(lambda *grads: torch.nn.utils.get_total_norm(grads), tuple(grads)),
        "reference": replace(ours, on_reference=True),
    }
    least = sum(grad.nbytes for grad in grads)
    return Op(f"{tensors} x [{elements}]", ours, peers, (least, 0), has_backward=False)


@dataclass(frozen=True)
class Family:
    """An op's maker, the shapes at which it is timed on each device, a small one to look at its error, its dtypes."""

    make: Callable[..., Op]
    cuda: tuple[tuple[int, ...], ...]
    cpu: tuple[tuple[int, ...], ...]
    small: tuple[int, ...]
    cuda_dtypes: tuple[torch.dtype, ...] = (BF16, FP32)
    cpu_dtypes: tuple[torch.dtype, ...] = (FP32, BF16)

    def shapes(self, device: torch.device) -> tuple[tuple[int, ...], ...]:
        return self.cuda if device.type == "cuda" else self.cpu

    def dtypes(self, device: torch.device) -> tuple[torch.dtype, ...]:
        return self.cuda_dtypes if device.type == "cuda" else self.cpu_dtypes


def tiny(family: Family) -> Family:
    """The family at its small shape alone, in bf16."""
    return replace(family, cuda=(family.small,), cpu=(family.small,), cuda_dtypes=(BF16,), cpu_dtypes=(BF16,))


# Attention: 16,384 tokens and 2,048 channels, as in the figures of Dao (2023) and Shah et al., "FlashAttention-3"
# (2024). Elsewhere tensors of 50 MB and more in bf16 on a GPU: they do not stay in the second-level cache of an H100.
FAMILIES = {
    "attention": Family(
        attention,
        tuple((16384 // T, T, 2048 // D, D) for D in (64, 128) for T in (1024, 4096, 16384)),
        ((4, 256, 12, 64), (1, 1024, 12, 64)),
        (2, 200, 2, 64),
        cuda_dtypes=(BF16,),
    ),
    "layer_norm": Family(layer_norm, ((32768, 768), (16384, 2048), (8192, 8192)), ((1024, 768),), (33, 768)),
    "residual_layer_norm": Family(
        residual_layer_norm, ((32768, 768), (16384, 2048), (8192, 8192)), ((1024, 768),), (33, 768)
    ),
    "bias_gelu": Family(bias_gelu, ((16384, 3072), (8192, 8192)), ((1024, 3072),), (33, 3072)),
    "cross_entropy": Family(cross_entropy, ((8192, 50257), (8192, 50304)), ((1024, 50304),), (33, 1000)),
    "linear_cross_entropy": Family(linear_cross_entropy, ((8192, 50257),), ((512, 50304),), (33, 1000)),
    "dropout": Family(dropout, ((32768, 1024),), ((1024, 768),), (33, 768)),
    "decode_attention": Family(
        decode_attention,
        ((16, 1024, 12, 64), (1, 32768, 12, 64), (64, 4096, 12, 64)),
        ((1, 1024, 12, 64), (8, 1024, 12, 64)),
        (2, 70, 2, 64),
        cuda_dtypes=(BF16,),
    ),
    "few_rows_linear": Family(
        linear,
        ((8, 4096, 16384),),
        ((1, 768, 50304), (8, 768, 50304), (8, 3072, 768)),
        (3, 65, 40),
    ),
    "adamw_": Family(adamw, ((148, 838860),), ((148, 838860),), (3, 1000)),
    "grad_norm": Family(grad_norm, ((148, 838860),), ((148, 838860),), (3, 1000)),
}
