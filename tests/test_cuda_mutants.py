"""Every wrong version of the CUDA kernels is caught, and by what: a fault of the PTX machine, or wrong values."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from gptdist import ops
from tests import adamw_cases, mutants, test_cuda_attention_mutants
from tests.mutants import Family
from tests.test_cuda_decode import exact, paged, within

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def close(got: torch.Tensor, wanted: torch.Tensor, what: str, scale: float = 1.0) -> None:
    """Within one rounding of got's dtype and a little of fp32's, for values of about `scale`; NaN where wanted."""
    relative = 2.0 ** (-8 if got.dtype == BF16 else -14)
    absolute = scale * (2e-4 if got.dtype == BF16 else 2e-5)
    assert torch.isclose(got.double(), wanted, rtol=relative, atol=absolute, equal_nan=True).all(), f"values of {what}"


def numbers(*shape: int, seed: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm_case(run: Callable, rows: int, width: int, dtype: torch.dtype, residual: bool, backward: bool) -> None:
    x, dy, ds = (numbers(rows, width, seed=i, dtype=dtype if i < 2 else FP32) for i in range(3))
    x[0] *= 2e-3  # a variance beside which eps counts
    r = numbers(rows, width, seed=3) if residual else None
    if residual:
        r[0] *= 2e-3
    weight, bias = numbers(width, seed=4), numbers(width, seed=5)
    leaves = [t for t in (x, r, weight, bias) if t is not None]
    exact = [t.double().requires_grad_() for t in leaves]
    function = ops.residual_layer_norm if residual else ops.layer_norm
    wanted = function(*exact)
    leaves = [t.requires_grad_(backward) for t in leaves]
    with run():
        got = function(*leaves)
        outputs, gradients = (got, (dy, ds)) if residual else ((got,), (dy,))
        found = torch.autograd.grad(outputs, leaves, gradients) if backward else ()
    wanted = wanted if residual else (wanted,)
    for i, (a, b) in enumerate(zip(outputs, wanted, strict=True)):
        close(a.detach(), b.detach(), f"output {i}")
    if backward:
        expected = torch.autograd.grad(wanted, exact, [g.double() for g in gradients])
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            close(a, b, f"gradient {i}", scale=b.abs().max())


def gelu_case(run: Callable, rows: int, width: int, backward: bool, dtype: torch.dtype = BF16) -> None:
    x, dy = (numbers(rows, width, seed=i, dtype=dtype) for i in range(2))
    bias = numbers(width, seed=2)
    leaves = [x.requires_grad_(backward), bias.requires_grad_(backward)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    with run():
        y = ops.bias_gelu(*leaves)
        found = torch.autograd.grad(y, leaves, dy) if backward else ()
    wanted = ops.bias_gelu(*exact)
    close(y.detach(), wanted.detach(), "y")
    if backward:
        dx, dbias = torch.autograd.grad(wanted, exact, dy.double())
        close(found[0], dx, "dx")
        close(found[1], dbias, "dbias", scale=rows**0.5)


def entropy_case(run: Callable, vocabulary: int, backward: bool) -> None:
    targets = torch.tensor([vocabulary - 1, -100, 0, vocabulary, 5, vocabulary // 2, -7])
    logits = (3 * numbers(len(targets), vocabulary, seed=0)).to(BF16)
    logits[:, 7] = -torch.inf
    dloss = numbers(len(targets), seed=1).abs() + 0.5
    known = (targets < vocabulary) & (targets != -7)
    exact = logits.double().requires_grad_()
    wanted = torch.full((len(targets),), torch.nan, dtype=torch.float64)
    wanted[known] = torch.nn.functional.cross_entropy(exact[known], targets[known], reduction="none")
    with run():
        loss, lse = torch.ops.gptdist_vm.cross_entropy_fwd(logits, targets, -100)
        if backward:
            gradient = torch.ops.gptdist_vm.cross_entropy_bwd(dloss, logits, targets, lse, -100)
    close(loss, wanted.detach(), "loss")
    close(lse, torch.logsumexp(logits.double(), 1), "lse")
    if backward:
        expected = torch.autograd.grad(wanted[known], exact, dloss.double()[known])[0].clone()
        expected[~known] = torch.nan
        close(gradient, expected, "dlogits", scale=0.01)


def dropout_case(run: Callable, batch: int, positions: int, channels: int, dtype: torch.dtype) -> None:
    x = numbers(batch, positions, channels, seed=0, dtype=dtype)
    key, ids = ops.dropout_key(5, 9), torch.arange(batch) * 77 + 2**33 + 5
    options = dict(key=key, sample_ids=ids, site=3, row_offset=11)
    with run():
        y = ops.dropout(x, 0.37, **options)
    close(y, ops.dropout(x.double(), 0.37, **options), "y")


def adamw_case(run: Callable, shapes: list, grads: tuple, shadows: tuple, offset: int = 0) -> None:
    case = adamw_cases.make(shapes, grads, shadows, offset=offset, eps=1e-2)  # an eps that counts
    after = case.clone()
    with run():
        after.run()
    adamw_cases.check(case, after)


def misaligned_case(run: Callable, name: str) -> None:
    """One list of adamw_ is not aligned to its vectors."""
    case = adamw_cases.make([(70,)], (FP32,), (BF16,))
    getattr(case, name)[0] = getattr(adamw_cases.make([(70,)], (FP32,), (BF16,), offset=1), name)[0]
    after = case.clone()
    with run():
        after.run()
    adamw_cases.check(case, after)


def grad_norm_case(run: Callable, shapes: list, dtypes: tuple = (FP32,), offset: int = 0) -> None:
    tensors = [adamw_cases.placed(shape, dtypes[i % len(dtypes)], offset).copy_(numbers(*shape, seed=i))
               for i, shape in enumerate(shapes)]
    with run():
        norm = ops.grad_norm(tensors)
    wanted = sum(x.double().square().sum() for x in tensors).sqrt()
    assert abs(norm.double() / wanted - 1) < 2e-7, "values of norm"


def decode_case(run: Callable, lengths: tuple[int, ...], Tq: int, H: int, G: int, D: int = 64,
                held: int | None = None, nowhere: int = 0) -> None:
    """held: positions that the tables hold, fewer than the rows reach; the last row is then said to be `nowhere`."""
    torch.manual_seed(0)
    cache, q = paged(lengths, Tq, H, D, FP16), numbers(len(lengths), Tq, H, G + 2, D, seed=1, dtype=FP16)[:, :, :, :G]
    wanted, bound = exact(q, cache)
    beyond = cache.lengths[:, None] + torch.arange(Tq) >= (held or 1 << 30)  # (B, Tq)
    lengths, table, last = cache.lengths.clone(), cache.block_table[:, : held and held // 16], len(cache.k_cache) - 1
    if held:
        lengths[-1], beyond[-1] = nowhere, True
    table = torch.where(table == last, 1 << 30, torch.where(table == 0, -9, table)).int()  # the nearest pages are these
    with run():
        got = torch.ops.gptdist_vm.decode_attention(q, cache.k_cache, cache.v_cache, table, lengths)
    right = got[beyond].isnan().all() and within(got[~beyond], wanted[~beyond], bound[~beyond])
    assert right, "values of out"


# The sizes leave tails in every direction and reach every loop twice: 18 partials a fold, two tiles, sweeps of a row.
FAMILIES = {
    "layer_norm": Family(
        "layer_norm", ("layer_norm.cu", "fold_partials.cuh", "reduce.cuh"),
        ("layer_norm_forward_kernel<Bf16, float, float, true, kWarp16>",
         "layer_norm_forward_kernel<float, float, float, false, kBlock>",
         "layer_norm_backward_kernel<Bf16, float, float, kWarp16>",
         "layer_norm_backward_kernel<float, float, float, kWideBlock>", "fold_partials_kernel"),
        (partial(norm_case, rows=7, width=72, dtype=BF16, residual=True, backward=False),
         partial(norm_case, rows=3, width=1032, dtype=FP32, residual=False, backward=False),
         partial(norm_case, rows=139, width=72, dtype=BF16, residual=True, backward=True),
         partial(norm_case, rows=5, width=1032, dtype=FP32, residual=False, backward=True),
         partial(norm_case, rows=5, width=8200, dtype=FP32, residual=True, backward=True))),
    "bias_gelu": Family(
        "bias_gelu", ("bias_gelu.cu",),
        ("bias_gelu_forward_kernel<Bf16, float>", "bias_gelu_backward_kernel<Bf16, float>",
         "bias_gelu_backward_kernel<float, float>"),
        (partial(gelu_case, rows=35, width=264, backward=False), partial(gelu_case, rows=299, width=264, backward=True),
         partial(gelu_case, rows=35, width=264, backward=True, dtype=FP32),
         partial(gelu_case, rows=4200, width=256, backward=True))),
    "cross_entropy": Family(
        "cross_entropy", ("cross_entropy.cu", "reduce.cuh"),
        ("cross_entropy_forward_kernel<Bf16>", "cross_entropy_backward_kernel<Bf16>"),
        (partial(entropy_case, vocabulary=17, backward=False), partial(entropy_case, vocabulary=17, backward=True),
         partial(entropy_case, vocabulary=4099, backward=True), partial(entropy_case, vocabulary=12801, backward=True),
         partial(entropy_case, vocabulary=50257, backward=True))),
    "dropout": Family(
        "dropout", ("dropout.cu", "philox.cuh"),
        ("dropout_kernel<Bf16, kDropoutVectors>", "dropout_kernel<float, kDropoutElements>"),
        (partial(dropout_case, batch=2, positions=63, channels=264, dtype=BF16),
         partial(dropout_case, batch=2, positions=63, channels=133, dtype=FP32))),
    "adamw": Family(
        "adamw", ("adamw.cu", "tensor_list.cuh"),
        ("adamw_kernel",),
        (partial(adamw_case, shapes=[(1030,), (3,)], grads=(BF16, FP32), shadows=(FP16, BF16)),
         partial(adamw_case, shapes=[(257,), (7,)], grads=(BF16, FP32), shadows=(), offset=1),
         partial(adamw_case, shapes=[(1030,), (8201,)], grads=(FP16, BF16), shadows=(BF16, FP16)),
         *(partial(misaligned_case, name=name) for name in ("params", "grads", "exp_avg", "exp_avg_sq", "shadows")),
         partial(adamw_case, shapes=[(i % 3 + 1,) for i in range(520)], grads=(FP32,), shadows=(BF16,)))),
    "grad_norm": Family(
        "grad_norm", ("grad_norm.cu", "tensor_list.cuh"),
        ("grad_norm_kernel", "grad_norm_fold_kernel"),
        (partial(grad_norm_case, shapes=[(4099,), (3,), (1203,)]),
         partial(grad_norm_case, shapes=[(9, 131), (16401,), (5,)], dtypes=(FP16, BF16, FP32), offset=1),
         partial(grad_norm_case, shapes=[(16401,), (8197,), (300,)], dtypes=(BF16, FP16)),
         partial(grad_norm_case, shapes=[(i % 3 + 1,) for i in range(1100)]))),
    "decode_attention": Family(
        "decode_attention", ("decode_attention.cu",),
        ("decode_attention_kernel<Fp16, 64, 16>", "decode_attention_kernel<Fp16, 64, 64>",
         "decode_merge_kernel<Fp16, 64, 64>"),
        (partial(decode_case, lengths=(70, 9), Tq=1, H=2, G=3),
         partial(decode_case, lengths=(100, 62), Tq=30, H=2, G=3),
         partial(decode_case, lengths=(50, 60, 5), Tq=20, H=1, G=3, held=64, nowhere=-1),
         partial(decode_case, lengths=(89, 60, 5), Tq=40, H=1, G=2, held=128, nowhere=1 << 40),
         partial(decode_case, lengths=(0,), Tq=150, H=1, G=1),
         partial(decode_case, lengths=(400, *[0] * 66), Tq=1, H=2, G=1),
         partial(decode_case, lengths=(380, *[0] * 44), Tq=20, H=3, G=1),
         partial(decode_case, lengths=(400, *[0] * 66), Tq=1, H=2, G=1, D=128),
         partial(decode_case, lengths=(380, *[0] * 44), Tq=20, H=3, G=1, D=128),
         partial(decode_case, lengths=(70, 9), Tq=1, H=2, G=3, D=128),
         partial(decode_case, lengths=(100, 20), Tq=30, H=2, G=3, D=128)),
        mutants.DECODE_RULES),
}

# Changed lines that compute the same, and why: such a mutant is not counted, and fails if it is caught after all.
EQUIVALENT = {
    "if (share.thread <= 1) {": "two threads write the same values",
    "if (lane <= 1) {": "two threads write the same values",
    "if (lane <= 1) scratch[warp] = x;": "two threads write the same value",
    "if (kReadTwice && column > width) continue;": "only saves work: what is loaded there is zero",
    "const float picked = thread <= 1 && in_range ? to_float(logits[target]) : NAN;": "thread 1 does not use it",
    "for (; v + (kEntropyVectors - 1) * (threads + 1) < split.vectors; v += kEntropyVectors * threads) {":
        "the loop after it does the rest",
    "for (int32_t first = thread; first <= split.vectors; first += kEntropyVectors * threads) {":
        "its body is guarded again",
    "for (int64_t row = first_row; inside && row <= args.rows; row += kRows * row_step, offset += kRows * step) {":
        "its body is guarded again",
    "for (int32_t first = 0; first <= count; first += blockDim.x) {": "its body is guarded again",
    "begun += __syncthreads_count(i <= count && first_chunks[i] <= chunk);":
        "a pointer follows in the table, more than any chunk's number",
    "for (int32_t i = threadIdx.x; i <= vectors; i += kNormVectors * kNormThreads) {": "its body is guarded again",
    "const int32_t first = keys.before + first_row / (args.group + 1);": "masks tiles that need none",
    "if ((tile + 1) * (kDecodeKeys + 1) > keys.common) hide(s, tile * kDecodeKeys + warp_key + lane.t2);":
        "masks tiles that need none",
    "if (first_tile > end_tile) return;": "such a split finds nothing, and what it writes is not read",
    "if (warp_row <= rows_left) {": "only saves work",
    "constexpr int kPartBytes = kHeadDim * 4 + 32, kParts = kKeyWarps * (kRows + 1);": "a gap between parts and states",
    "const uint32_t states = stages + kParts * (kPartBytes + 1);": "a gap between parts and states",
}

SLOW = ("adamw", "decode_attention", "layer_norm")  # a minute or more each


@pytest.mark.parametrize("name", FAMILIES)
def test_the_cases_pass_unchanged(device, name):
    mutants.check_unchanged(device, FAMILIES[name].cases)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.long if name in SLOW else []) for name in FAMILIES])
def test_every_source_mutant_is_caught(device, name, tmp_path):
    mutants.check_source(device, FAMILIES[name], EQUIVALENT, tmp_path)


def test_no_exception_is_stale():
    mutants.check_exceptions(FAMILIES.values(), EQUIVALENT)


def test_every_barrier_and_wait_is_needed(device):
    mutants.check_synchronisation(device, FAMILIES.values(), {})


def test_every_kernel_has_mutants():
    families = [*FAMILIES.values(), *test_cuda_attention_mutants.FAMILIES.values()]
    assert {path.stem for path in mutants.CUDA.glob("*.cu")} == {family.source for family in families}
