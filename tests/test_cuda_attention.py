"""Fused attention on CUDA, run from its PTX: numbers against float64, masks, determinism, memory traffic, refusals.

An error is measured against the size of what it belongs to: norm(got - exact) / norm(exact). Rounding P, dS and the
results to 16 bits leaves about half a unit in the last place; the bound is three units. The machine checks at the
same time that no access leaves a tensor, that nothing uninitialised is read, and that no two threads race.
"""

import itertools
import math
import re
from typing import NamedTuple

import pytest
import torch

from gptdist import doctor, ops
from gptdist.ops import backends
from gptdist.ops.attention import head_misfit
from gptdist.ops.random import keep_mask

VM = torch.ops.gptdist_vm
BF16, FP16 = torch.bfloat16, torch.float16
ULP = {BF16: 2.0**-8, FP16: 2.0**-11}
KEY = ops.dropout_key(1, 2)
SITE, HEAD_OFFSET = 7, 3
LENGTHS = (1, 7, 64, 128, 131, 200, 256, 512)  # below, at and beside the tiles of 32, 64 and 128

pytestmark = pytest.mark.usefixtures("poisoned")


def random_documents(B: int, T: int, share: float) -> torch.Tensor:
    """doc_start (B, T) of documents that begin at a random `share` of the positions."""
    begins = torch.rand(B, T) < share
    begins[:, 0] = True
    return torch.where(begins, torch.arange(T), 0).cummax(1).values.int()


def exact(qkv, dout, causal, doc_start, Z):
    """out, lse, dqkv in float64, by the formulas of gptdist/ops/attention.py; Z: dropout's factors or 1."""
    B, T, _, _, D = qkv.shape
    heads_first = qkv.double().permute(0, 2, 3, 1, 4)  # (B, Hkv, G+2, T, D)
    q, k, v = heads_first[:, :, :-2], heads_first[:, :, -2:-1], heads_first[:, :, -1:]
    position = torch.arange(T)
    hidden = torch.zeros(B, 1, 1, T, T, dtype=torch.bool)
    if causal:
        hidden = hidden | (position > position[:, None])
    if doc_start is not None:
        hidden = hidden | (position < doc_start[:, :, None])[:, None, None]
    S = (q @ k.mT / math.sqrt(D)).masked_fill(hidden, -math.inf)
    L = S.logsumexp(-1)
    P = S.softmax(-1)
    out = (P * Z) @ v
    do = dout.double().permute(0, 2, 3, 1, 4)
    dv = ((P * Z).mT @ do).sum(2, keepdim=True)
    dS = P * ((do @ v.mT) * Z - (do * out).sum(-1, keepdim=True)) / math.sqrt(D)
    dk = (dS.mT @ q).sum(2, keepdim=True)
    dqkv = torch.cat([dS @ k, dk, dv], 2)
    return out.permute(0, 3, 1, 2, 4), L, dqkv.permute(0, 3, 1, 2, 4)


def factors(p: float, ids: torch.Tensor, H: int, G: int, T: int):
    """Dropout's factors (B, H, G, T, T)."""
    heads = HEAD_OFFSET + torch.arange(H * G)
    keep = keep_mask(KEY, p, ids.repeat_interleave(H * G), SITE, heads.repeat(len(ids)), torch.arange(T), T)
    return keep.view(len(ids), H, G, T, T).double() / (1 - p)


def relative(got, expected, scale=None) -> float:
    """NaN where anything is not a number; 0 where nothing is expected (all dropped) and nothing there."""
    return ((got.double() - expected).norm() / (expected if scale is None else scale).norm().clamp(min=1e-30)).item()


def run(device, qkv, dout, *, causal=True, doc_start=None, p=0.0, ids=None, seed=0, **options):
    """out, lse, dqkv and the launches."""
    random = (p, KEY, ids, SITE, HEAD_OFFSET) if p else (0.0, None, None, 0, 0)
    with device.run(**{"seed": seed, "global_races": True} | options) as log:
        out, lse = VM.attention_fwd(qkv, causal, doc_start, *random)
        dqkv = VM.attention_bwd(dout, qkv, out, lse, causal, doc_start, *random)
    return out, lse, dqkv, log.launches


class Problem(NamedTuple):
    """Random inputs of both passes, and in float64 what they are to give."""

    qkv: torch.Tensor
    dout: torch.Tensor
    options: dict  # of run
    expected: tuple


def problem(B, T, H, G, D, dtype, *, causal=True, doc_start=None, p=0.0) -> Problem:
    qkv, dout = torch.randn(B, T, H, G + 2, D).to(dtype), torch.randn(B, T, H, G, D).to(dtype)
    ids = torch.arange(B) * ((1 << 33) + 1) + 5
    expected = exact(qkv, dout, causal, doc_start, factors(p, ids, H, G, T) if p else 1.0)
    return Problem(qkv, dout, {"causal": causal, "doc_start": doc_start, "p": p, "ids": ids}, expected)


def check(device, *shape, **options):
    return check_problem(device, problem(*shape, **options))


def check_problem(device, given: Problem, **options):
    """The launches of both passes; their results are checked. options: of the device's run."""
    out, lse, dqkv, launches = run(device, given.qkv, given.dout, **given.options, **options)
    expected, G = given.expected, out.shape[3]
    bound = 3 * ULP[out.dtype]
    assert relative(out, expected[0]) < bound, "out"
    assert torch.allclose(lse.double(), expected[1], atol=2e-5, rtol=2e-6), "lse"
    size_of_dv = expected[2][:, :, :, G + 1].norm()
    for name, slots in (("dq", slice(0, G)), ("dk", slice(G, G + 1)), ("dv", slice(G + 1, G + 2))):
        part = expected[2][:, :, :, slots]
        nothing = part.norm() < size_of_dv / 100  # dP - delta is 0 where a query sees one key: dv is then the measure
        assert relative(dqkv[:, :, :, slots], part, size_of_dv if nothing else part) < bound, name
    return launches


def no_wasted_wavefronts(launches):
    for launch in launches:
        counters = launch.counters
        assert counters["shared_wavefronts"] == counters["shared_wavefronts_ideal"], f"wavefronts of {launch.name}"


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_lengths(device, D, causal):
    for T in LENGTHS:
        launches = check(device, 1, T, 1, 1, D, BF16 if T % 2 else FP16, causal=causal)
        no_wasted_wavefronts(launches)
    check(device, 2, 131, 1, 1, D, BF16, causal=causal)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(("H", "G"), [(2, 2), (1, 4), (3, 1)])
def test_grouped_queries(device, D, H, G):
    for T, dtype in ((7, BF16), (131, FP16), (256, BF16)):
        check(device, 2, T, H, G, D, dtype)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_documents(device, D, p):
    for T in (1, 7, 64, 131, 300, 512):
        documents = random_documents(2, T, 0.2 if T <= 64 else 0.015)
        no_wasted_wavefronts(check(device, 2, T, 1, 2, D, BF16 if T % 2 else FP16, doc_start=documents, p=p))
    check(device, 1, 200, 1, 1, D, BF16, doc_start=torch.arange(200, dtype=torch.int32)[None], p=p)  # of one token


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_dropout(device, D, causal):
    for T in (1, 7, 128, 131, 200):
        no_wasted_wavefronts(check(device, 2, T, 1, 2, D, FP16 if T % 2 else BF16, causal=causal, p=0.3))


SWEEP = {
    "T": LENGTHS, "D": (64, 128), "G": (1, 2, 4), "dtype": (BF16, FP16), "seen": ("causal", "documents", "all"),
    "p": (0.0, 0.2),
}


def pairwise() -> list[tuple]:
    """Combinations of SWEEP, such that every two values of two options meet in one."""
    def pairs(combination):
        return set(itertools.combinations(enumerate(combination), 2))

    everything = list(itertools.product(*SWEEP.values()))
    missing, chosen = set().union(*map(pairs, everything)), []
    while missing:
        chosen.append(max(everything, key=lambda combination: len(pairs(combination) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


@pytest.mark.parametrize("combinations", [pytest.param(pairwise, id="pairs"), pytest.param(
    lambda: itertools.product(*SWEEP.values()), id="product", marks=pytest.mark.long)])
def test_sweep(device, combinations):
    for T, D, G, dtype, seen, p in combinations():
        documents = random_documents(1, T, 0.02) if seen == "documents" else None
        launches = check(device, 1, T, 1, G, D, dtype, causal=seen != "all", doc_start=documents, p=p)
        no_wasted_wavefronts(launches)


def test_every_kept_element_is_the_reference_s(device):
    """With v the identity, out is P Z itself, and P is uniform where q is zero."""
    T, p = 64, 0.25
    qkv = torch.zeros(2, T, 1, 4, 64, dtype=FP16)
    qkv[:, :, 0, 3] = torch.eye(64)
    ids = torch.tensor([5, -1])
    random = (p, KEY, ids, SITE, HEAD_OFFSET)
    with device.run():
        out, _ = VM.attention_fwd(qkv, False, None, *random)
    kept = factors(p, ids, 1, 2, T) > 0  # (B, 1, G, T, T)
    assert torch.equal(out.permute(0, 2, 3, 1, 4) > 0, kept)


def test_a_probability_too_small_for_a_word_drops_nothing(device):
    qkv = torch.randn(1, 40, 1, 3, 64).to(BF16)
    with device.run() as log:
        dropped, _ = VM.attention_fwd(qkv, True, None, 1e-12, KEY, torch.zeros(1, dtype=torch.int64), 0, 0)
        plain, _ = VM.attention_fwd(qkv, True, None, 0.0, None, None, 0, 0)
    assert torch.equal(dropped, plain)
    assert log.launches[0].name == log.launches[1].name


def test_documents_are_as_if_alone(device):
    """The tiles before a document are not even read: they hold NaN here."""
    qkv, dout = torch.randn(1, 384, 1, 3, 64).to(BF16), torch.randn(1, 384, 1, 1, 64).to(BF16)
    starts = torch.zeros(1, 384, dtype=torch.int32)
    starts[:, 256:] = 256
    alone = run(device, qkv[:, 256:].contiguous(), dout[:, 256:].contiguous())[:3]
    qkv[:, :256] = float("nan")
    out, lse, dqkv, _ = run(device, qkv, dout, doc_start=starts)
    assert torch.equal(out[:, 256:], alone[0])
    assert torch.equal(lse[..., 256:], alone[1])
    assert torch.equal(dqkv[:, 256:], alone[2])


def run_wrong_documents(device):
    """doc_start that the op's contract excludes: after the query, decreasing, before the sequence, beyond it."""
    T = 300
    for D in (64, 128):
        qkv, dout = torch.randn(1, T, 2, 3, D).to(BF16), torch.randn(1, T, 2, 1, D).to(BF16)
        for starts in (torch.arange(T) + 1, torch.arange(T).flip(0), torch.full((T,), -(1 << 31)),
                       torch.full((T,), (1 << 31) - 1), torch.randint(-T, 2 * T, (T,)), torch.full((T,), T + 200)):
            for p in (0.0, 0.2):
                options = {"doc_start": starts[None].int(), "p": p, "ids": torch.zeros(1, dtype=torch.int64)}
                run(device, qkv, dout, **options, races=False, global_races=False, max_instructions=1 << 30)


def test_wrong_documents_touch_no_other_memory(device):
    """Nor do they keep a kernel from ending."""
    run_wrong_documents(device)


def test_large_scores(device):
    """Scores of hundreds: exponentials are taken of differences only."""
    qkv, dout = torch.randn(1, 200, 1, 3, 64) * 12, torch.randn(1, 200, 1, 1, 64)
    out, lse, dqkv, _ = run(device, qkv.to(BF16), dout.to(BF16))
    expected_out, expected_lse, _ = exact(qkv.to(BF16), dout.to(BF16), True, None, 1.0)
    assert relative(out, expected_out) < 3 * ULP[BF16]
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-6)
    assert dqkv.isfinite().all()


def one_query_at_a_time(qkv, dout):
    """out and dqkv in float64, causal; what a query does not see takes part in nothing."""
    T, D = qkv.shape[1], qkv.shape[-1]
    q, k, v = (x.double() for x in (qkv[:, :, :, :-2], qkv[:, :, :, -2:-1], qkv[:, :, :, -1:]))
    do, out, dqkv = dout.double(), torch.zeros(dout.shape).double(), torch.zeros(qkv.shape).double()
    for t in range(T):
        keys, values = k[:, :t + 1], v[:, :t + 1]
        P = ((q[:, t, None] * keys).sum(-1, keepdim=True) / math.sqrt(D)).softmax(1)  # (B, t + 1, H, G, 1)
        out[:, t] = (P * values).sum(1)
        delta = (do[:, t] * out[:, t]).sum(-1, keepdim=True)
        dS = P * ((do[:, t, None] * values).sum(-1, keepdim=True) - delta[:, None]) / math.sqrt(D)
        dqkv[:, t, :, :-2] = (dS * keys).sum(1)
        dqkv[:, :t + 1, :, -2] += (dS * q[:, t, None]).sum(3)
        dqkv[:, :t + 1, :, -1] += (P * do[:, t, None]).sum(3)
    return out, dqkv


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_what_is_not_finite_reaches_those_who_see_it(device, where, value):
    """In rows that see it always; in others at most where the whole matrix products spread it too (0 times NaN).

    Never beyond the kv head.
    """
    T, position, G = 200, 150, 2
    qkv, dout = torch.randn(2, T, 2, G + 2, 64).to(BF16), torch.randn(2, T, 2, G, 64).to(BF16)
    if where == "dout":
        dout[1, position, 1, 1, 5] = value
    else:
        qkv[1, position, 1, {"q": 1, "k": G, "v": G + 1}[where], 5] = value
    out, _, dqkv, _ = run(device, qkv, dout)
    least = one_query_at_a_time(qkv, dout)
    whole_out, _, whole_dqkv = exact(qkv, dout, True, None, 1.0)
    for got, must, may in ((out, least[0], whole_out), (dqkv, least[1], whole_dqkv)):
        got, must, may = (~x.isfinite() for x in (got, must, may))
        assert not (must & ~got).any()
        assert not (got & ~may).any()
        assert not got[0].any()
        assert not got[:, :, 0].any()
    assert (~dqkv.isfinite()).any()


def test_the_bits_do_not_depend_on_the_schedule(device):
    qkv, dout = torch.randn(2, 200, 1, 4, 64).to(BF16), torch.randn(2, 200, 1, 2, 64).to(BF16)
    ids, documents = torch.arange(2), random_documents(2, 200, 0.02)
    first, second = (
        run(device, qkv, dout, doc_start=documents, p=0.1, ids=ids, seed=seed, shuffle_blocks=seed == 2)[:3]
        for seed in (1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_traffic(device):
    """Plain causal, whole tiles: no sector beyond the least, and reads that follow from the tiles."""
    T, D, G = 512, 64, 2
    qkv, dout = torch.randn(1, T, 1, G + 2, D).to(BF16), torch.randn(1, T, 1, G, D).to(BF16)
    *_, launches = run(device, qkv, dout)
    for launch in launches:
        for kind in ("load", "store", "async"):
            assert launch.counters[f"{kind}_sectors"] == launch.counters[f"{kind}_sectors_ideal"], launch.name
    forward, statistics, dkv, dq = (launch.counters for launch in launches)
    row, n = D * 2, T // 128
    tiles = n * (n + 1) // 2  # 128 x 128
    assert forward["async_bytes"] == G * (T + 2 * 128 * tiles) * row
    assert forward["store_bytes"] == G * T * (row + 4)
    assert statistics["load_bytes"] == G * T * (2 * row + 4)
    assert dkv["async_bytes"] == 2 * T * row + G * tiles * 128 * (2 * row + 8)
    assert dkv["store_bytes"] == 2 * T * row
    assert dq["async_bytes"] == G * (2 * T + 2 * 128 * tiles) * row
    assert dq["store_bytes"] == G * T * row


def test_documents_skip_tiles(device):
    T = 1024
    qkv = torch.randn(1, T, 1, 3, 64).to(BF16)
    starts = (torch.arange(T, dtype=torch.int32) // 128 * 128)[None]
    with device.run() as log:
        VM.attention_fwd(qkv, True, None, 0.0, None, None, 0, 0)
        VM.attention_fwd(qkv, True, starts, 0.0, None, None, 0, 0)
    whole, divided = (launch.counters["mma"] for launch in log.launches)
    assert (whole // 36, whole % 36) == (divided // 8, 0)  # 36 tiles of the causal triangle, 8 on its diagonal


def test_more_operands_than_the_cache_holds(device):
    """Heads are then started in sections; every tile of every head must still be done once."""
    T = 70_000  # K and V of a head are 17 MiB
    qkv = torch.zeros(1, T, 2, 3, 64, dtype=BF16)
    qkv[:, :, 0, 2], qkv[:, :, 1, 2] = 1.0, 2.0
    starts = (torch.arange(T, dtype=torch.int32) // 64 * 64)[None]
    with device.run(races=False):
        out, lse = VM.attention_fwd(qkv, True, starts, 0.0, None, None, 0, 0)
    assert torch.equal(out, qkv[:, :, :, 2:])
    seen = torch.arange(T) - starts[0] + 1
    torch.testing.assert_close(lse, seen.log().expand(1, 2, 1, T), atol=1e-5, rtol=0)


KERNELS = ["attention_forward", "attention_statistics", "attention_dkv", "attention_dq"]  # as they are launched


@pytest.mark.parametrize("D", [64, 128])
def test_launches_are_those_of_the_plan(device, D):
    for B, T, H in ((1, 1, 1), (2, 129, 3)):
        qkv, dout = torch.randn(B, T, H, 3, D).to(BF16), torch.randn(B, T, H, 1, D).to(BF16)
        *_, launches = run(device, qkv, dout)
        assert len(launches) == len(KERNELS)
        for launch, kernel in zip(launches, KERNELS, strict=True):
            assert launch.follows(device.plan(kernel, BF16, T, D, batch=B * H)), kernel


# what the ops refuse, and what they hand to the reference

QKV = torch.randn(2, 5, 1, 3, 64).to(BF16)
IDS = torch.arange(2)
STARTS = torch.zeros(2, 5, dtype=torch.int32)
HEADS_FIRST = torch.randn(2, 3, 5, 3, 64).to(BF16).transpose(1, 2)  # (B, T, Hkv, G+2, D), heads not beside each other
MISALIGNED = torch.randn(QKV.numel() + 1).to(BF16)[1:].view(QKV.shape)
ELSEWHERE = "another kind of device, expected cpu"


def forward(qkv=QKV, causal=True, doc_start=None, p=0.0, key=KEY, ids=IDS, site=0, head_offset=0):
    return VM.attention_fwd(qkv, causal, doc_start, p, key, ids, site, head_offset)


OUT, LSE = QKV[:, :, :, :1].contiguous(), torch.ones(2, 1, 1, 5)


def backward(dout=OUT, out=OUT, lse=LSE):
    return VM.attention_bwd(dout, QKV, out, lse, True, None, 0.0, None, None, 0, 0)


REFUSED = [
    (forward, {"qkv": QKV[0]}, "attention: qkv has shape (5, 1, 3, 64), expected (B, T, Hkv, G+2, D)"),
    (forward, {"qkv": QKV.float()}, "attention: qkv is float32, expected bfloat16 or float16"),
    (forward, {"qkv": QKV[..., :32].contiguous()}, "attention: qkv has D=32, expected 64 or 128"),
    (forward, {"qkv": QKV[:, :, :, :2].contiguous()}, "attention: qkv has G+2=2, expected at least 3"),
    (forward, {"qkv": QKV.transpose(0, 1)}, "attention: qkv is not contiguous"),
    (forward, {"qkv": HEADS_FIRST}, "attention: qkv is not contiguous"),
    (forward, {"qkv": MISALIGNED}, "attention: qkv does not start at a multiple of 16 bytes"),
    (forward, {"qkv": QKV.to("meta")}, "attention: the first tensor is on another kind of device"),
    (forward, {"doc_start": STARTS.to("meta")}, f"attention: doc_start is on {ELSEWHERE}"),
    (forward, {"doc_start": STARTS.t().contiguous().t()}, "attention: doc_start is not contiguous"),
    (forward, {"p": 0.1, "key": KEY.to("meta")}, f"attention: key is on {ELSEWHERE}"),
    (forward, {"p": 0.1, "ids": IDS.int()}, "attention: sample_ids is int32, expected int64"),
    (forward, {"doc_start": torch.zeros(2, 4, dtype=torch.int32)}, "doc_start has 8 elements, expected B*T=10"),
    (forward, {"doc_start": torch.zeros(2, 5, dtype=torch.int64)}, "doc_start is int64, expected int32"),
    (forward, {"doc_start": torch.zeros(2, 5, dtype=torch.int32), "causal": False}, "but causal is false"),
    (forward, {"p": 1.0}, "attention: dropout probability is 1, expected 0 <= p < 1"),
    (forward, {"p": 0.1, "key": None}, "attention: dropout needs key and sample_ids"),
    (forward, {"p": 0.1, "ids": IDS[:1]}, "attention: sample_ids has 1 elements, expected B=2"),
    (forward, {"p": 0.1, "site": 1 << 16}, "attention: site is 65536"),
    (forward, {"p": 0.1, "head_offset": 1 << 16}, "attention: head_offset is 65536"),
    (backward, {"dout": OUT.transpose(0, 1).contiguous().transpose(0, 1)}, "attention: dout is not contiguous"),
    (backward, {"dout": MISALIGNED.flatten()[:OUT.numel()].view(OUT.shape)}, "attention: dout does not start at"),
    (backward, {"dout": OUT.to("meta")}, f"attention: dout is on {ELSEWHERE}"),
    (backward, {"out": OUT.to("meta")}, f"attention: out is on {ELSEWHERE}"),
    (backward, {"lse": LSE.to("meta")}, f"attention: lse is on {ELSEWHERE}"),
    (backward, {"dout": QKV}, "attention: dout has shape (2, 5, 1, 3, 64), expected (2, 5, 1, 1, 64) as out"),
    (backward, {"out": QKV}, "attention: out has 1920 elements, expected B*T*Hkv*G*D=640"),
    (backward, {"lse": torch.ones(3)}, "attention: lse has 3 elements, expected B*Hkv*G*T=10"),
    (backward, {"lse": torch.ones(10).double()}, "attention: lse is float64, expected float32"),
    (backward, {"dout": OUT.half()}, "attention: dout is float16, expected bfloat16 as qkv"),
]


@pytest.mark.parametrize(("op", "arguments", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_bad_arguments_are_named(device, op, arguments, message):
    with device.run() as log, pytest.raises(RuntimeError, match=re.escape(message)):
        op(**arguments)
    assert log.launches == []


def test_nothing_to_do_launches_nothing(device):
    with device.run() as log:
        for empty in (QKV[:0], QKV[:, :0], QKV[:, :, :0].contiguous()):
            out, lse = VM.attention_fwd(empty, True, None, 0.0, None, None, 0, 0)
            dqkv = VM.attention_bwd(out, empty, out, lse, True, None, 0.0, None, None, 0, 0)
            assert dqkv.shape == empty.shape
    assert log.launches == []


@pytest.mark.parametrize("options", [{}, {"doc_start": True}, {"dropout_p": 0.2}])
def test_the_op_equals_the_reference(device, options, monkeypatch):
    qkv = torch.randn(2, 70, 2, 4, 64).to(BF16)
    options = dict(options)
    if "doc_start" in options:
        options["doc_start"] = random_documents(2, 70, 0.1)
    if "dropout_p" in options:
        options |= {"key": KEY, "sample_ids": IDS, "site": 4, "head_offset": 2}

    def outputs():
        x = qkv.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()  # strided: the op copies it
        out = ops.attention(x, **options)
        (gradient,) = torch.autograd.grad((out.float() * out.float().sin()).sum(), x)
        return out.float(), gradient.float()

    with device.run() as log:
        got = outputs()
    assert [kernel for launch in log.launches for kernel in KERNELS if f"{kernel}_kernel" in launch.name] == KERNELS
    monkeypatch.setenv("GPTDIST_OPS", "reference")
    expected = outputs()
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) < 2e-2


@pytest.mark.parametrize("strange", [HEADS_FIRST, MISALIGNED, QKV[:, :1].expand(2, 5, 1, 3, 64)],
                         ids=["heads first", "misaligned", "expanded"])
def test_the_op_copies_what_the_kernels_refuse(device, strange):
    def outputs(qkv, dout):
        leaf = qkv.detach().requires_grad_()
        out = ops.attention(leaf)
        return out, *torch.autograd.grad(out, leaf, dout)

    with device.run():
        got = outputs(strange, torch.ones(1, dtype=BF16).expand(strange[:, :, :, :1].shape))
        whole = strange.clone(memory_format=torch.contiguous_format)
        expected = outputs(whole, torch.ones(whole[:, :, :, :1].shape, dtype=BF16))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_what_the_kernels_do_not_take_goes_to_the_reference(device):
    with device.run() as log:
        for qkv in (QKV.float(), QKV.double(), QKV[..., :32], torch.randn(2, 5, 1, 3, 80).to(BF16)):
            out = ops.attention(qkv.requires_grad_())
            out.sum().backward()
    assert log.launches == []


def test_reasons(device, monkeypatch):
    monkeypatch.delenv("GPTDIST_OPS", raising=False)
    assert backends.choose("attention", "cpu", BF16).backend != "cuda"  # outside of the device
    with device.run():
        assert backends.choose("attention", "cpu", BF16, head_misfit(128)).backend == "cuda"
        fp32 = backends.choose("attention", "cpu", torch.float32)
        assert fp32 == ("reference", "the cuda kernel does not take torch.float32")
        narrow = backends.choose("attention", "cpu", BF16, head_misfit(80))
        assert narrow == ("reference", "head dimension 80 is not 64 or 128")
        (shown,) = (row["cpu"] for row in doctor.collect()["ops"] if row["op"] == "attention")
        assert shown == {"backend": "cuda", "reason": "takes bfloat16, float16; head dimension 64 or 128"}


@pytest.mark.parametrize("name", ["attention_fwd", "attention_bwd"])
def test_opcheck(device, name):
    last = (torch.zeros(2, 5, dtype=torch.int32), 0.2, KEY, IDS, 1, 0)
    arguments = (QKV, *last) if name == "attention_fwd" else (OUT, QKV, OUT, LSE, *last)
    with device.run() as log:
        torch.library.opcheck(getattr(torch.ops.gptdist, name).default, arguments)
    assert log.launches
