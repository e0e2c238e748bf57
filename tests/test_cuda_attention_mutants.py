"""Every wrong version of the attention kernels is caught, and by what: a fault of the PTX machine, or wrong values."""

import functools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tests import mutants, test_cuda_attention
from tests.mutants import Family

BF16 = torch.bfloat16

# Kinds and rules as mutants.RULES.
RULES = {
    "swizzle": [
        (r"\^ \(row & 7\)", ""), (r"row & 7\b", "row & 3"), (r"\bj \^ lane\.g", "j"),
        (r"\^ \(k << 5\)", "+ (k << 5)"), (r"\^ \(j << 4\)", "+ (j << 4)"), (r"__align__\(256\)", ""),
    ],
    "place": [
        (r"lane & 15", "lane & 7"), (r"15, lane >> 4", "15, lane >> 3"), (r"\(lane >> 4\)", "(lane >> 3)"),
        (r"lane & 7\b", "lane & 3"), (r"lane >> 3 & 1", "lane >> 4 & 1"), (r"lane % 4 \* 2", "lane % 4"),
        (r"\+ i \* 16 \* kRowBytes", "+ i * 8 * kRowBytes"), (r"\+ j \* 8 \* kRowBytes", "+ j * 4 * kRowBytes"),
        (r"\+ k \* 16 \* kRowBytes", "+ k * 8 * kRowBytes"), (r"half \* 8\b", "half * 4"),
        (r"kWarpSize \* 16 \* kM", "kWarpSize * 8 * kM"), (r"\^= kKeyTileBytes", "^= 0"),
        (r"buffer \^ (1|kKeyTileBytes)", "buffer"), (r"right\[([01])\], right\[([13])\]", r"right[\2], right[\1]"),
    ],
    "guard": [
        (r"< left\b", "<= left"), (r">= left\b", "> left"), (r"< positions\b(?! - )", "<= positions"),
        (r"rows_left - row\b", "rows_left"), (r"positions - (first_query|first_key|query|n \* kKeys)\b", "positions"),
        (r"positions - done\.first_(query|key)\b", "positions"), (r"last < count", "last <= count"),
        (r"< kQueries\b", "<= kQueries"), (r"n > tiles\.begin", "n >= tiles.begin"), (r"inside \? 16", "true ? 16"),
        (r"inside \? kBytes", "true ? kBytes"), (r"min\(query \+ queries, positions\)", "query + queries"),
        (r"min\(row, positions - 1\)", "row"), (r"max\(doc_start\[query\], 0\)", "doc_start[query]"),
        (r"share == 0", "share == 1"), (r"t2 == 0", "t2 == 2"), (r"next_head < args\.group", "true"),
        (r"min\(heads_at_once, uint32_t\(heads\) - first\)", "heads_at_once"),
    ],
    "mask": [
        (r"> last\b", ">= last"), (r"> last\b", "> last + 1"), (r"< first\b(?! \?)", "<= first"),
        (r"< first\b", "< first - 1"), (r"row > column", "row >= column"), (r"row > column", "row > column + 1"),
        (r"row < \(e & 1", "row <= (e & 1"), (r"row < \(e & 1", "row + 1 < (e & 1"),
        (r"starts\.y : starts\.x", "starts.x : starts.y"), (r"max\(row, horizon\)", "row"),
        (r"args\.causal \? 0 : positions - 1", "args.causal ? 0 : positions - 2"),
        (r"== -INFINITY \? 0\.0f", "== -INFINITY ? subtrahend"), (r"make_float2\(INFINITY", "make_float2(0.0f"),
    ],
    "tiles": [
        (r"\(causal \? query : positions\)", "(causal ? query + keys : positions)"), (r"\+ keys - 1", ""),
        (r"\+ k(Queries|Keys) - 1", ""), (r"tiles\.end - 1", "tiles.end - 2"),
        (r"tiles\.begin =", "tiles.begin = 1 +"), (r"\(key \+ kKeys\) / kQueries", "key / kQueries"),
        (r"\bkey \+ 1\b", "key + 2"), (r"\bkey \+ kKeys\)(?! /)", "key)"),
        (r"seeing_first / kQueries", "seeing_first / kQueries + 1"), (r" && n >= tiles\.full_begin", ""),
        (r"n < tiles\.full_end && ", ""), (r"m < tiles\.full_begin \|\| ", ""), (r" \|\| m >= tiles\.full_end", ""),
        (r"next >= tiles\.end", "next > tiles.end"), (r"next >= tiles\.end", "next >= tiles.end - 1"),
        (r"tiles - 1 - work\.rank", "work.rank"), (r"\* step - 1;", "* step;"),
        (r"first \+ step - 1\)", "first + step - 2)"), (r"< limit", "<= limit"),
    ],
    "scale": [
        (r"\* kLog2e", "* (kLog2e * 1.02f)"), (r"\* kLn2", "* (kLn2 * 1.02f)"),
        (r"(return|=) args\.softmax_scale", r"\1 1.02f * args.softmax_scale"), (r"\* shrink", "* 1.0f"),
        (r"\*= shrink", "*= 1.0f"), (r"args\.dropout\.scale", "1.0f"), (r"- subtrahend", "- 0.99f * subtrahend"),
        (r"reciprocal_approx\(sum\)", "1.02f * reciprocal_approx(sum)"), (r"\+ log2_approx\(sum\)", ""),
        (r"- lse\[i\]\[half\]", "- 1.01f * lse[i][half]"), (r"sum \+= p0 \+ p1", "sum += p0"),
        (r"(maximum|sum) = fmaxf\(maximum, __shfl_xor_sync\(.*?\)\)", r"\1 = maximum"),
        (r"sum \+= __shfl_xor_sync\(~0u, sum, (\d)\);", ";"), (r"2 \* half \+ 1\] \* f", "2 * half + 1]"),
    ],
    "delta": [
        (r"- \(e & 1 \? two\.w : two\.y\)", ""), (r"two\.w : two\.y", "two.y : two.w"),
        (r"two\.z : two\.x", "two.x : two.z"), (r"- delta\[i\]\[e % 4 / 2\]", ""), (r"e % 4 / 2", "0"),
        (r"delta \+= a\[i\] \* b\[i\]", "delta = a[i] * b[i]"), (r"distance < 8", "distance < 4"),
        (r"make_float2\(args\.lse\[at\] \* kLog2e, delta\)", "make_float2(args.lse[at] * kLog2e, 0.0f)"),
        (r"column < kHeadDim", "column < 64"), (r"= two\.x;", "= two.y;"),
    ],
    "dropout": [
        (r"uint32_t\(key_of\(f\)\) / 4, uint32_t\(query_of\(f\)\)", "uint32_t(query_of(f)) / 4, uint32_t(key_of(f))"),
        (r"odd \? 8 : 0", "0"), (r"key_position \+ 8 \* f", "key_position + 4 * f"),
        (r"0x3276 : 0x5410", "0x5410 : 0x5410"), (r"__shfl_xor_sync\(~0u, own, 1\)", "own"),
        (r"mine >> 1\) \* 8", "mine >> 1) * 4"), (r"\(mine & 1\)", "(mine >> 1)"), (r"f / kN \* 16", "f / kN * 8"),
        (r"f % kN \* 8", "f % kN * 4"), (r"lane\.g & 3", "lane.g & 1"), (r"\(4 \+ mine\)", "mine"),
        (r"lane\.lane & ~12", "0"), (r"<< \(8 - kFragments\)", "<< (7 - kFragments)"),
        (r"8 \* e \+ 7 - f", "8 * e + f"), (r"0xbbaa : 0x9988", "0x9988 : 0xbbaa"),
        (r"f \+ i / 2, i % 2", "f + i % 2, i / 2"), (r"args\.dropout\.head_offset \+", ""),
        (r"head_offset \+ head", "head_offset"), (r"sample_ids\[batch\]", "sample_ids[0]"),
        (r"dropout\.site\) << 16", "dropout.site) << 15"),
        (r"0 - args\.dropout\.threshold", "1 - (args.dropout.threshold >> 1)"), (r"i \* kN \+ (2 \* k|j)\b", r"\1"),
        (r"2 \* k % 8", "0"), (r"kept\[i\]\[k / 4\]", "kept[i][0]"),
        (r"keep_fragment\(a, kept", "keep_fragment(a, ~kept"),
        (r"= is_kept", "= !is_kept"), (r"64 \* j \+ lane\.t2", "lane.t2"),
        (r"n \* kKeys \+ lane\.t2\)", "n * kKeys)"),
        (r"keep_of\(args, batch, (kv_head \* args\.group \+ )?head\)", "keep_of(args, batch, 0)"),
    ],
    "heads": [
        (r"head / args\.group", "head % args.kv_heads"), (r"\(head \+ 2 \* kv_head\)", "(head + kv_head)"),
        (r"\(kv_head \+ 1\) \* args\.group", "(kv_head + 1) * (args.group - 1)"),
        (r"kv_head \* args\.group \+ head", "kv_head + head"), (r"2 \* kv_head \* kHeadDim", "kv_head * kHeadDim"),
        (r"work\.head - batch \* (heads|args\.kv_heads)", "work.head % 1"), (r"batch_head - batch \* heads", "0"),
        (r"batch \* heads \+", ""), (r"rows \+ kHeadDim\b", "rows"), (r"k_from \+ kHeadDim\b", "k_from"),
        (r"work\.head / (heads|args\.kv_heads)", "0"), (r"batch_head / heads", "0"),
        (r"batch_head \* positions", "batch_head"), (r"int64_t\(batch\) \* positions", "0"),
        (r"rank \* section_heads", "rank"), (r"within / section_heads", "within / heads_at_once"),
        (r"section \* heads_at_once", "section"), (r"first \* tiles", "first"),
    ],
    "stride": [
        (r"\* (args\.)?(qkv_|out_)?stride\b", r"* (\1\2stride + 8)"),
        (r"(?<=, )(args\.)?(qkv_|out_)?stride\b(?=,|\))", r"\1\2stride + 8"),
        (r"(int64_t\(kKeys\)) \* stride", r"\1"), (r"-= tile_stride", "-= 0"), (r"chunk \* 8", "chunk * 4"),
        (r"share \* 8", "0"),
    ],
}


@functools.cache
def problem(*shape: int, **options) -> test_cuda_attention.Problem:
    torch.manual_seed(0)
    return test_cuda_attention.problem(*shape, BF16, **options)


def attention_case(run: Callable, *, shape: tuple[int, ...], **options) -> None:
    """Of shape B, T, Hkv, G, D."""
    launches = test_cuda_attention.check_problem(SimpleNamespace(run=lambda **_: run()), problem(*shape, **options))
    test_cuda_attention.no_wasted_wavefronts(launches)


def sections_case(run: Callable) -> None:
    """K and V of two of the three heads fill the share of the cache: the blocks come in sections, the last one smaller.

    The documents are of 64 positions, so that the reference takes them for batch rows. The probability picks the
    kernels with dropout, which the mutants are made of, and drops nothing.
    """
    T, H, D = 1 << 15, 3, 64
    torch.manual_seed(0)
    qkv, dout = torch.randn(1, T, H, 3, D).to(BF16), torch.randn(1, T, H, 1, D).to(BF16)
    starts = (torch.arange(T, dtype=torch.int32) // 64 * 64)[None]
    device = SimpleNamespace(run=lambda **_: run(races=False, global_races=False))
    options = {"doc_start": starts, "p": 1e-9, "ids": torch.arange(1)}
    out, _, dqkv, _ = test_cuda_attention.run(device, qkv, dout, **options)
    rows = (T // 64, 64, H)
    expected = test_cuda_attention.exact(qkv.view(*rows, 3, D), dout.view(*rows, 1, D), True, None, 1.0)
    assert test_cuda_attention.relative(out.view(*rows, 1, D), expected[0]) < 0.01, "out"
    assert test_cuda_attention.relative(dqkv.view(*rows, 3, D), expected[2]) < 0.01, "dqkv"


def wrong_documents_case(run: Callable) -> None:
    test_cuda_attention.run_wrong_documents(SimpleNamespace(run=lambda **options: run(**options)))


def documents(B: int, T: int) -> torch.Tensor:
    """doc_start of documents, short and long; some begin one position after a tile: its last query to see a key."""
    starts = []
    for row in range(B):
        begins = torch.tensor([0, 42, 257] if row else [0, 40, 41, 129, 449])
        starts.append(begins[torch.searchsorted(begins, torch.arange(T), right=True) - 1])
    return torch.stack(starts).int()


# The lengths leave ragged ends and reach every loop more than twice; groups and kv heads differ in number.
CASES_64 = (
    partial(attention_case, shape=(2, 131, 2, 3, 64)),
    partial(attention_case, shape=(2, 300, 2, 3, 64), doc_start=documents(2, 300), p=0.3),
    partial(attention_case, shape=(1, 200, 1, 2, 64), causal=False),
    partial(attention_case, shape=(1, 200, 1, 2, 64), causal=False, p=0.3),
    partial(attention_case, shape=(1, 600, 1, 1, 64)),
    partial(attention_case, shape=(1, 600, 1, 2, 64), doc_start=documents(1, 600), p=0.3),
    partial(attention_case, shape=(1, 600, 1, 1, 64), doc_start=documents(1, 600)),
)
CASES_128 = (
    partial(attention_case, shape=(1, 600, 1, 1, 128)),
    partial(attention_case, shape=(1, 600, 1, 1, 128), doc_start=documents(1, 600)),
    partial(attention_case, shape=(1, 600, 1, 1, 128), doc_start=documents(1, 600), p=0.3),
    partial(attention_case, shape=(1, 200, 1, 1, 128), causal=False, p=0.3),
)
CASES = (*CASES_64, *CASES_128, wrong_documents_case)
FORWARD, DKV, DQ = (f"attention_{name}_kernel<Bf16, 64, kAttentionDropout>" for name in ("forward", "dkv", "dq"))
STATISTICS = ("attention_statistics_kernel<Bf16, 64>", "attention_statistics_kernel<Bf16, 128>")
MASKS = {"mask": RULES["mask"]}
OTHERS = {kind: rules for kind, rules in RULES.items() if kind not in MASKS}
LOOPS = {"tiles": [(r"n >= tiles\.full_end", "n > tiles.full_end"), (r"n >= 0;", "n > 0;")]}  # the plain kernels' own


def plain(kernel: str) -> str:
    return kernel.replace("Dropout", "Plain")


# The kernels with dropout have all the options; the plain ones differ from them in their loops. Rows that see nothing
# of their first tile are there at D = 128 alone.
FAMILIES = {
    "forward masks": Family(
        "attention_forward", ("attention_forward.cu",), (FORWARD.replace("64", "128"),), CASES_128, MASKS),
    "backward masks": Family("attention_backward", ("attention_backward.cu",), (DKV, DQ), CASES, MASKS),
    "forward loops": Family("attention_forward", ("attention_forward.cu",), (plain(FORWARD),), CASES, LOOPS),
    "backward loops": Family("attention_backward", ("attention_backward.cu",), (plain(DQ),), CASES, LOOPS),
    "forward": Family("attention_forward", ("attention_forward.cu",), (FORWARD,), CASES, OTHERS),
    "backward": Family("attention_backward", ("attention_backward.cu",), (*STATISTICS, DKV, DQ), CASES, OTHERS),
    "headers": Family(
        "attention_backward", ("attention.cuh", "mma.cuh"), (DKV, DQ), (*CASES, sections_case), OTHERS),
}
QUICK = "forward masks"  # the others take a minute or more to compile

DROPOUT_64 = "bfloat16Li64ELi2E"  # mangled

# (kernel, instruction) of which one is not needed, and why. dq needs the same one, of stage().
UNNEEDED = {
    ("attention_forward_kernel", "bar.warp.sync"): "the last barrier of the loop comes after the products with Q",
    ("attention_dkv_kernel", "bar.warp.sync"): "dk's orders the products with V too",
}

# Changed lines that compute the same, and why.
EQUIVALENT = {
    "const float2 two = row < positions ? statistics[row] : make_float2(0.0f, 0.0f);":
        "gradients of queries beyond the sequence are not stored",
    "if (place.t2 == 2 && row < positions) lse[row] = (state.maximum[i][half] * scale_log2 + log2_approx(sum)) * kLn2;":
        "the four threads of a row know the same",
    "if (share == 1 && position < positions) {": "the eight threads of a row know the same",
    "if (seeing_first <= positions) tiles.full_end = seeing_first / kQueries;":
        "compares where there is nothing to hide, in the last tile",
    "const int32_t first_query = (work.rank) * kQueries;":
        "the same tiles in another order: the last queries see the most keys",
    "if (next > tiles.end) next = tiles.begin, ++next_head;":
        "zeros of one tile more, which test_memory_traffic counts",
}


@pytest.mark.parametrize("cases", [CASES, pytest.param((sections_case,), marks=pytest.mark.long)])
def test_the_cases_pass_unchanged(device, cases):
    mutants.check_unchanged(device, cases)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name == QUICK else pytest.mark.long) for name in FAMILIES])
def test_every_source_mutant_is_caught(device, name, tmp_path):
    mutants.check_source(device, FAMILIES[name], EQUIVALENT, tmp_path)


def test_rows_side_by_side_waste_wavefronts(device, tmp_path):
    """Without the exclusive-or, everywhere, the numbers are the same."""
    first = FAMILIES["headers"].mutants()[0]
    source = first.original.replace(" ^ (row & 7)", "").replace("j ^ lane.g", "j")
    (ptx,) = mutants.compile_mutants([replace(first, source=source, kernels=first.kernels[-1:])], tmp_path)
    assert mutants.caught_by(device, ptx, CASES).startswith("wavefronts")


def test_no_exception_is_stale():
    mutants.check_exceptions(FAMILIES.values(), EQUIVALENT)


@pytest.mark.parametrize("kernels", [DROPOUT_64, pytest.param("", marks=pytest.mark.long)], ids=["dropout", "all"])
def test_every_barrier_and_wait_is_needed(device, kernels):
    families = [FAMILIES["forward"], FAMILIES["backward"]]
    mutants.check_synchronisation(device, families, UNNEEDED, kernels)
