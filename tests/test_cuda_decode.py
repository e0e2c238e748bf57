"""decode_attention on CUDA, run from its PTX: numbers against float64, what it reads, determinism, memory traffic.

Each element is held to the bound in the header of csrc/cuda/decode_attention.cu. Slots that were never written and
pages that are in no table hold NaN; entries of a table beyond a row's context are no pages. The machine checks at the
same time that no access leaves a tensor, that nothing uninitialised is read, and that no two threads race.
"""

import math
from typing import NamedTuple

import pytest
import torch

from gptdist import ops
from gptdist.data.tokenizer import build_tokenizer
from gptdist.generate import Generator, Sampling
from gptdist.ops import backends
from gptdist.ops.decode_attention import misfit
from tests.test_model import small_model

VM = torch.ops.gptdist_vm
BF16, FP16 = torch.bfloat16, torch.float16
ROUNDING = {BF16: 2.0**-8, FP16: 2.0**-11}
KEYS = 64  # in a tile
NAN = float("nan")

pytestmark = pytest.mark.usefixtures("poisoned")


class Paged(NamedTuple):
    """What the op takes after q, and the keys and values (B, T, Hkv, D) that its pages hold."""

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor
    lengths: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @property
    def arguments(self):
        return self[:4]


def paged(lengths, Tq, H, D, dtype, page=16, table_pages=None) -> Paged:
    """Random keys and values of rows that hold lengths[b] + Tq positions, in shuffled pages."""
    B, T = len(lengths), max(lengths) + Tq
    used = [-(-(n + Tq) // page) for n in lengths]
    order = torch.randperm(sum(used) + 3).int()  # three pages are in no table
    table = torch.full((B, table_pages or max(used) + 1), -1, dtype=torch.int32)
    table[:, -1] = 1 << 30
    caches, tensors = [], [torch.randn(B, T, H, D).to(dtype) for _ in range(2)]
    for x in tensors:
        cache, first = torch.full((len(order), page, H, D), NAN, dtype=dtype), 0
        for b, n in enumerate(lengths):
            pages = order[first:first + used[b]]
            first += used[b]
            table[b, :used[b]] = pages
            slots = (pages.long()[:, None] * page + torch.arange(page)).flatten()[:n + Tq]
            cache.view(-1, H, D)[slots] = x[b, :n + Tq]
        caches.append(cache)
    return Paged(*caches, table, torch.tensor(lengths), *tensors)


def exact(q, cache: Paged):
    """out (B, Tq, Hkv, G, D) in float64, and the largest error that each element may have."""
    _, Tq, _, _, D = q.shape
    q, k, v = q.double(), cache.k.double(), cache.v.double()
    hidden = torch.arange(k.shape[1]) > (cache.lengths[:, None] + torch.arange(Tq))[..., None]  # (B, Tq, T)
    hidden = hidden[:, :, None, None]

    def scores(q, k):
        return torch.einsum("bthgd,bshd->bthgs", q, k).div(math.sqrt(D)).masked_fill(hidden, -math.inf)

    P = scores(q, k).softmax(-1)
    sizes = scores(q.abs(), k.abs()).amax(-1, keepdim=True)  # A
    out, size = (torch.einsum("bthgs,bshd->bthgd", P, x) for x in (v, v.abs()))
    return out, (2 * ROUNDING[cache.k.dtype] + 2.0**-19 * (4 + sizes)) * size


def within(got, expected, bound) -> bool:
    """False for NaN. Below 2^-14 an fp16 is rounded to a multiple of 2^-24."""
    return bool(((got.double() - expected).abs() <= bound + (2.0**-25 if got.dtype == FP16 else 0.0)).all())


def run(device, q, cache: Paged, **options):
    with device.run(global_races=True, **options) as log:
        out = VM.decode_attention(q, *cache.arguments)
    return out, log.launches


def check(device, lengths, Tq, H, G, D, dtype, **options):
    cache = paged(lengths, Tq, H, D, dtype, **options)
    q = torch.randn(len(lengths), Tq, H, G, D).to(dtype)
    out, launches = run(device, q, cache)
    assert within(out, *exact(q, cache)), (lengths, Tq, H, G, D)
    for launch in launches:
        assert launch.counters["shared_wavefronts"] == launch.counters["shared_wavefronts_ideal"], launch.name
        assert launch.counters["async_sectors"] == launch.counters["async_sectors_ideal"], launch.name
    return launches


CONTEXTS = ((0, 1, 15), (16, 17, 63), (64, 127, 128), (700, 300))  # at and beside the borders of pages and splits


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("G", [1, 2, 4, 7])
def test_one_query(device, D, G):
    for i, lengths in enumerate(CONTEXTS):
        check(device, lengths, 1, 1 + i % 2, G, D, BF16 if (i + G) % 2 else FP16)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(("Tq", "G"), [(2, 1), (2, 7), (7, 2), (7, 4), (64, 1), (130, 2)])
def test_many_queries(device, D, Tq, G):
    for lengths, dtype in (((0,), BF16), ((15, 0, 113), FP16), ((300, 1), BF16)):
        check(device, lengths, Tq, 1, G, D, dtype)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("Tq", [1, 20])
def test_splits_of_no_one_and_several_tiles(device, D, Tq):
    """One split of one tile, one of many, five of up to two, and some that the rows do not reach."""
    assert len(check(device, (40,), Tq, 1, 1, D, BF16, table_pages=4)) == 1
    assert [launch.grid[1] for launch in check(device, (300,), Tq, 133, 1, D, BF16)] == [1]
    assert check(device, (500, 20), Tq, 24, 1, D, FP16)[0].grid[1] == 5
    assert check(device, (70, 200), Tq, 1, 1, D, BF16, table_pages=500)[0].grid[1] == 125
    assert check(device, (0,), Tq, 1, 1, D, BF16, table_pages=10_000)[0].grid[1] == 128


@pytest.mark.parametrize("page", [1, 4, 128])
def test_pages(device, page):
    for D, Tq in ((64, 1), (128, 30)):
        check(device, (5, 150), Tq, 2, 2, D, BF16, page=page)


def test_large_scores(device):
    """Scores of hundreds: exponentials are taken of differences only."""
    cache = paged((200, 90), 3, 1, 64, BF16)
    cache.k_cache.mul_(12)
    q = 12 * torch.randn(2, 3, 1, 2, 64).to(BF16)
    out, _ = run(device, q, cache)
    assert within(out, *exact(q, cache._replace(k=cache.k * 12)))


def test_queries_in_a_packed_projection_are_read_where_they_lie(device, monkeypatch):
    qkv = torch.randn(2, 5, 3, 4, 64).to(BF16)  # (B, Tq, Hkv, G+2, D)
    q, cache = qkv[:, :, :, :2], paged((20, 70), 5, 3, 64, BF16)
    qkv[:, :, :, 2:] = NAN
    assert backends.aligned_rows(q) is q
    out, _ = run(device, q, cache)
    assert within(out, *exact(q, cache))
    assert torch.equal(out, run(device, q.contiguous(), cache)[0])


@pytest.mark.parametrize(("name", "q"), [
    ("rows at odd places", torch.randn(1, 2, 1, 2, 65).to(BF16)[..., :64]),
    ("begins at an odd place", torch.randn(1 + 256).to(BF16)[1:].view(1, 2, 1, 2, 64)),
    ("strided elements", torch.randn(1, 2, 1, 64, 2).to(BF16).mT),
    ("repeated", torch.randn(1, 1, 1, 1, 64).to(BF16).expand(1, 2, 1, 2, 64))])
def test_queries_that_lie_otherwise(device, name, q):
    cache = paged((30,), 2, 1, 64, BF16)
    assert (backends.aligned_rows(q) is q) == (name == "repeated")
    with device.run() as log:
        out = ops.decode_attention(q, *cache.arguments)
    assert log.launches
    assert within(out, *exact(q, cache))


# numbers that are none


def put(cache: Paged, which: str, b: int, position: int, value: float, column=slice(None)) -> None:
    page = cache.k_cache.shape[1]
    pages = cache.k_cache if which == "k" else cache.v_cache
    pages[cache.block_table[b, position // page], position % page, :, column] = value


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("Tq", [1, 20])
def test_what_is_no_number_spreads_as_in_pytorch(device, value, which, Tq, monkeypatch):
    """A key without a value in one of two rows, in the first, a middle or the last split."""
    q = torch.randn(2, Tq, 1, 2, 64).to(BF16)
    for position in (0, 70, 139):  # every query sees them
        cache = paged((140, 140), Tq, 1, 64, BF16)
        put(cache, which, 1, position, value, column=5 if which == "v" else slice(0, 1))
        out, _ = run(device, q, cache)
        with monkeypatch.context() as patch:
            patch.setenv("GPTDIST_OPS", "reference")
            expected = ops.decode_attention(q, *cache.arguments)
        assert not expected.isfinite().all() or which == "k"
        torch.testing.assert_close(out, expected, equal_nan=True, atol=2e-2, rtol=2e-2)


def test_a_key_that_no_query_of_a_row_sees_is_not_read(device):
    """It is in a page in use, of the same tile, and holds a finite value that would win the softmax."""
    cache, q = paged((70, 9), 2, 1, 64, BF16), torch.randn(2, 2, 1, 2, 64).to(BF16)
    before, _ = run(device, q, cache)
    for b, n in ((0, 72), (1, 11)):
        put(cache, "k", b, n, 1e4), put(cache, "v", b, n, 1e4)
    assert torch.equal(run(device, q, cache)[0], before)


def test_beyond_the_table(device):
    """Queries that stand beyond it are NaN, those before it are right; a negative length is beyond it too."""
    Tq, held = 40, 96
    cache = paged((held - Tq, 10, 10), Tq, 1, 64, BF16, table_pages=held // 16)
    q = torch.randn(3, Tq, 1, 2, 64).to(BF16)
    expected, bound = exact(q, cache)
    for length in (held - 10, held, held + 1, 1 << 40, -1, -(1 << 40)):
        moved = cache._replace(lengths=torch.tensor([held - Tq, length, 10]))
        out, _ = run(device, q, moved)
        assert within(out[[0, 2]], expected[[0, 2]], bound[[0, 2]])
        standing = max(0, held - length) if length >= 0 else 0
        assert out[1, standing:].isnan().all()
    assert out[1].isnan().all()
    full = cache._replace(lengths=torch.tensor([held - Tq] * 2 + [10]))
    moved = cache._replace(lengths=torch.tensor([held - Tq + 30] * 2 + [10]))
    moved.block_table[1], full.block_table[1] = cache.block_table[0], cache.block_table[0]
    assert run(device, q, moved)[0][0, :10].isfinite().all()


def test_entries_that_are_no_pages_count_as_the_nearest(device):
    cache = paged((100,), 1, 1, 64, BF16)
    cache.k_cache.nan_to_num_(0.5), cache.v_cache.nan_to_num_(0.5)
    q, wild, tame = torch.randn(1, 1, 1, 2, 64).to(BF16), cache.block_table.clone(), cache.block_table.clone()
    wild[0, 1], wild[0, 3] = -7, 1 << 30
    tame[0, 1], tame[0, 3] = 0, len(cache.k_cache) - 1
    assert torch.equal(*(run(device, q, cache._replace(block_table=table))[0] for table in (wild, tame)))


# determinism, traffic, launches


@pytest.mark.parametrize(("Tq", "D"), [(1, 64), (30, 128)])
def test_the_bits_do_not_depend_on_the_schedule(device, Tq, D):
    cache, q = paged((300, 40), Tq, 2, D, BF16), torch.randn(2, Tq, 2, 3, D).to(BF16)
    first, *others = (run(device, q, cache, seed=seed, shuffle_blocks=seed > 1)[0] for seed in (1, 1, 2, 3))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(("G", "D"), [(1, 64), (4, 64), (16, 128)])
def test_every_key_is_read_once_for_the_whole_group(device, G, D):
    H, lengths = 2, (299, 0, 127)
    *launches, = check(device, lengths, 1, H, G, D, BF16)
    attention, merge = (launch.counters for launch in launches)
    row, seen = 2 * D, [n + 1 for n in lengths]
    parts = sum(-(-n // KEYS) for n in seen)  # of a tile each
    assert attention["async_bytes"] == H * row * (2 * sum(seen) + parts * G)
    assert attention["store_bytes"] == H * G * parts * (4 * D + 8)
    assert merge["store_bytes"] == H * G * len(lengths) * row
    for launch in launches:
        for kind in ("load", "store"):
            assert launch.counters[f"{kind}_sectors"] == launch.counters[f"{kind}_sectors_ideal"], launch.name


def test_prefill_skips_what_its_queries_do_not_see(device):
    (launch,) = check(device, (0,), 256, 34, 1, 64, BF16)
    n, row = 256 // 64, 128
    assert launch.counters["async_bytes"] == 34 * row * (256 + 2 * 64 * n * (n + 1) // 2)


def test_launches_follow_from_shapes_alone(device):
    q = torch.randn(2, 1, 1, 2, 64).to(BF16)
    cache = paged((300, 20), 1, 1, 64, BF16)
    launches = [run(device, q, cache._replace(lengths=torch.tensor(lengths)))[1] for lengths in ((300, 20), (0, 0))]
    first, second = ([(x.name, x.grid, x.block, x.shared_bytes) for x in some] for some in launches)
    assert first == second


@pytest.mark.parametrize("D", [64, 128])
def test_launches_are_those_of_the_plan(device, D):
    for B, positions in ((1, 64), (3, 640)):
        launches = check(device, (7,) * B, 1, 1, 1, D, BF16, table_pages=positions // 16)
        kernels = ["decode_attention", "decode_merge"][:1 if positions == 64 else 2]
        assert len(launches) == len(kernels)
        for launch, kernel in zip(launches, kernels, strict=True):
            assert launch.follows(device.plan(kernel, BF16, positions, D, batch=B)), kernel


# gptdist.ops and generation


def test_what_the_kernel_does_not_take_goes_to_the_reference(device):
    q, cache = torch.randn(1, 1, 1, 2, 64).to(BF16), paged((5,), 1, 1, 64, BF16)
    odd = paged((5,), 1, 1, 64, BF16, page=3)
    with device.run() as log:
        ops.decode_attention(q, *odd.arguments)
        ops.decode_attention(q.half(), *cache.arguments)
        ops.decode_attention(q.float(), cache.k_cache.float(), cache.v_cache.float(), *cache.arguments[2:])
        ops.decode_attention(q[..., :32], cache.k_cache[..., :32], cache.v_cache[..., :32], *cache.arguments[2:])
        reasons = [misfit(q, odd.k_cache, odd.v_cache), misfit(q.half(), cache.k_cache, cache.v_cache),
                   misfit(q[..., :32], cache.k_cache, cache.v_cache), misfit(q, cache.k_cache, cache.v_cache)]
    assert log.launches == []
    assert reasons == ["pages of 3 positions, no power of two", "k_cache is torch.bfloat16, q torch.float16",
                       "head dimension 32 is not 64 or 128", ""]


def test_opcheck(device):
    q, cache = torch.randn(2, 3, 1, 2, 64).to(BF16), paged((5, 70), 3, 1, 64, BF16)
    with device.run() as log:
        torch.library.opcheck(torch.ops.gptdist.decode_attention.default, (q, *cache.arguments))
    assert log.launches


@pytest.mark.parametrize("options", [{"n_heads": 2}, {"n_heads": 2, "n_kv_heads": 1, "positions": "rope"}])
def test_a_model_generates_what_the_reference_does(device, options, monkeypatch):
    model = small_model(vocab_size=257, context=100, width=128, n_layers=2, **options).half().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    generator = Generator(model, build_tokenizer("bytes"))
    prompts, sampling = ["Every effort moves you", "so", "x" * 70], Sampling(max_new_tokens=5, temperature=0)
    with device.run() as log:
        got = generator.generate(prompts, sampling)
    assert sum("decode_attention_kernel" in launch.name for launch in log.launches) == 2 * 5
    monkeypatch.setenv("GPTDIST_OPS", "reference")
    assert got == generator.generate(prompts, sampling)
