"""The PTX machine: parsing, control flow, reconvergence, warp instructions, tensor instructions, counters."""

import struct
import threading

import numpy as np
import pytest
import torch

from tests.ptx_text import HEADER, _ptxvm, buffer, evaluate, launch, text


def per_thread(body: str, threads: int = 32, dtype=np.uint32, **options) -> np.ndarray:
    """%r31 of every thread after `body`."""
    out = np.zeros(threads, dtype)
    launch(f"{body}\nadd.u64 %d15, %ptr0, %lane4;\nst.global.u32 [%d15], %r31;", out, block=threads, **options)
    return out


# ---- text ----


@pytest.mark.parametrize("bad", ["", "hello", "int main() {}", ".version 8.0\n.target sm_80\nfoo bar"])
def test_refuses_what_is_not_ptx(bad):
    with pytest.raises(ValueError, match=r"PTX"):
        _ptxvm.Module(bad)


def test_kernels_are_decoded_when_asked_for():
    module = _ptxvm.Module(
        HEADER
        + ".visible .entry good(.param .u32 a, .param .align 8 .b8 s[24], .param .u16 h) .maxntid 64, 2, 1 { ret; }\n"
        + ".entry bad() { .reg .b32 %r<3>;\n mov.u32 %r1, 1;\n wgmma.fence.sync.aligned;\n ret; }"
    )
    assert module.kernels == ["good", "bad"]
    good = module.kernel("good")
    assert good.params == [("a", 0, 4, 4), ("s", 8, 24, 8), ("h", 32, 2, 2)]
    assert (good.param_bytes, good.shared_bytes, good.max_threads, good.n_instructions) == (34, 0, 128, 1)
    assert good.opcodes == {"ret": 1}
    with pytest.raises(
        ValueError, match=r"kernel bad, PTX line 7: instruction 'wgmma.fence.sync.aligned' is unsupported"
    ):
        module.kernel("bad")
    with pytest.raises(ValueError, match="no kernel 'other'"):
        module.kernel("other")


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("add.s32 %r1, %d1, %r2;", "64 bits, expected 32"),
        ("add.s32 %r1, %r2;", "too few operands"),
        ("add.s32 %r1, %nothing, %r2;", "not declared"),
        ("add.frobnicate.s32 %r1, %r2, %r3;", "unsupported"),
        ("mov.u32 %r1, %clock;", "no clock"),
        ("bra nowhere;", "label 'nowhere' does not exist"),
        ("ld.global.v4.f64 {%g1, %g2, %g3, %g4}, [%d1];", "unsupported"),
    ],
)
def test_errors_name_the_instruction(statement, message):
    with pytest.raises(ValueError, match=message):
        _ptxvm.Module(text(statement, 0)).kernel("k")


def test_syntax_that_compilers_emit():
    body = """
    .loc 1 2 3
    .pragma "nounroll";
    { .reg .b32 %r1; .reg .pred q; // inner registers hide outer ones
      mov.u32 %r1, 40; setp.eq.u32 q, %r1, 40;
      @!q bra SKIP;
      mov.u32 %r30, %r1;
    SKIP: }
    { .reg .pred q; setp.ne.u32 q, %r30, 40; @q bra SKIP; add.u32 %r30, %r30, 1; SKIP: }
    mov.u64 %d1, table+4; /* a constant
    expression */ ld.global.u32 %r2, [%d1+4]; ld.global.u32 %r3, [table];
    add.s32 %r31, %r30, -1; add.s32 %r31, %r31, 0xFFFFFFFF; mad.lo.s32 %r31, %r2, 1000, %r31;
    mad.lo.s32 %r31, %r3, 1000000, %r31;
    mov.f32 %f1, 0f40400000; cvt.rzi.s32.f32 %r4, %f1; mad.lo.s32 %r31, %r4, 10000000, %r31;
    """
    module = '.file 1 "a.cu"\n.global .align 4 .u32 table[4] = {5, 6, 7};\n.global .u64 pointer = generic(table)+8;'
    assert (per_thread(body, module=module) == 35007039).all()


def test_module_variables_persist():
    module = _ptxvm.Module(
        text(
            "mov.u64 %d1, counter; atom.global.add.u32 %r1, [%d1], 1; st.global.u32 [%ptr0], %r1;",
            1,
            module=".global .u32 counter = 10;",
        )
    )
    out = np.zeros(1, np.uint32)
    for expected in (10, 11):
        module.launch("k", (1, 1, 1), (1, 1, 1), struct.pack("Q", out.ctypes.data), buffers=[buffer(out, "out")])
        assert out[0] == expected


def test_launch_checks_its_arguments():
    module = _ptxvm.Module(text("", 1))
    with pytest.raises(ValueError, match="params has 3 bytes, expected 8"):
        module.launch("k", (1, 1, 1), (1, 1, 1), b"abc")
    with pytest.raises(ValueError, match="expected 1 to 1024"):
        module.launch("k", (1, 1, 1), (2048, 1, 1), bytes(8))
    with pytest.raises(ValueError, match="poison"):
        module.launch("k", (1, 1, 1), (1, 1, 1), bytes(8), poison="no")


def test_supported_forms():
    forms = _ptxvm.supported()
    assert forms == sorted(forms)
    assert {
        "add.s32",
        "fma.rn.f32",
        "setp.geu.f32",
        "shfl.sync.bfly.b32",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    } <= set(forms)


# ---- registers and threads ----


def test_special_registers_in_three_dimensions():
    names = [
        "%tid.x",
        "%tid.y",
        "%tid.z",
        "%ctaid.x",
        "%ctaid.y",
        "%ctaid.z",
        "%ntid.y",
        "%nctaid.z",
        "%laneid",
        "%warpid",
        "%lanemask_lt",
        "%lanemask_ge",
    ]
    block, grid = (4, 3, 5), (2, 3, 2)
    threads, blocks = 60, 12
    out = np.zeros((blocks, threads, len(names)), np.uint32)
    body = (
        """
    mov.u32 %r1, %tid.z; mad.lo.u32 %r1, %r1, 3, 0; mov.u32 %r2, %tid.y; add.u32 %r1, %r1, %r2;
    mov.u32 %r2, %tid.x; mad.lo.u32 %r1, %r1, 4, %r2;
    mov.u32 %r3, %ctaid.z; mov.u32 %r4, %ctaid.y; mad.lo.u32 %r3, %r3, 3, %r4; mov.u32 %r4, %ctaid.x;
    mad.lo.u32 %r3, %r3, 2, %r4;
    mad.lo.u32 %r1, %r3, 60, %r1;
    """
        + f"mad.wide.u32 %d1, %r1, {4 * len(names)}, %ptr0;"
        + "".join(f"mov.u32 %r5, {n}; st.global.u32 [%d1+{4 * i}], %r5;" for i, n in enumerate(names))
    )
    module = _ptxvm.Module(text(body, 1))
    counters = module.launch(
        "k", grid, block, struct.pack("Q", out.ctypes.data), buffers=[buffer(out, "out")], global_races=True
    )
    assert counters["blocks"] == blocks
    for b in range(blocks):
        for t in range(threads):
            lane = t % 32
            expected = [
                t % 4,
                t // 4 % 3,
                t // 12,
                b % 2,
                b // 2 % 3,
                b // 6,
                3,
                2,
                lane,
                t // 32,
                (1 << lane) - 1,
                2**32 - (1 << lane),
            ]
            assert out[b, t].tolist() == expected


def test_a_range_of_blocks():
    out = np.zeros(8, np.uint32)
    body = "mov.u32 %r1, %ctaid.x; mad.wide.u32 %d1, %r1, 4, %ptr0; st.global.u32 [%d1], 1;"
    launch(body, out, block=1, grid=8, blocks=(2, 5))
    assert out.tolist() == [0, 0, 1, 1, 1, 0, 0, 0]


def test_poison_as_a_value():
    assert (per_thread("mov.b32 %r31, %r7;", poison="value") == 0xCBCBCBCB).all()


# ---- control flow ----


def test_divergent_branches_and_loops():
    """Collatz lengths: every lane loops for its own number of rounds, with a branch inside."""
    body = """
    add.u32 %r1, %tid, 1; mov.u32 %r31, 0;
    LOOP: setp.eq.u32 %p1, %r1, 1; @%p1 bra DONE;
      and.b32 %r2, %r1, 1; setp.eq.u32 %p2, %r2, 0; @%p2 bra EVEN;
      mad.lo.u32 %r1, %r1, 3, 1; bra.uni NEXT;
    EVEN: shr.u32 %r1, %r1, 1;
    NEXT: add.u32 %r31, %r31, 1; bra LOOP;
    DONE: activemask.b32 %r3; popc.b32 %r3, %r3; mad.lo.u32 %r31, %r3, 1000, %r31;
    """

    def length(n):
        return 0 if n == 1 else 1 + length(n // 2 if n % 2 == 0 else 3 * n + 1)

    assert per_thread(body).tolist() == [32000 + length(n) for n in range(1, 33)]  # all lanes are back together


def test_branch_table():
    body = """
    and.b32 %r1, %tid, 3;
    targets: .branchtargets A, B, C, A;
    brx.idx %r1, targets;
    A: mov.u32 %r31, 1; bra END;
    B: mov.u32 %r31, 2; bra END;
    C: mov.u32 %r31, 3;
    END:
    """
    assert per_thread(body).tolist() == [1, 2, 3, 1] * 8


def test_early_exit_and_partial_warps():
    out = np.zeros(50, np.uint32)
    body = "setp.lt.u32 %p1, %tid, 10; @%p1 ret; bar.sync 0; add.u64 %d1, %ptr0, %lane4; st.global.u32 [%d1], %tid;"
    launch(body, out, block=50)
    assert out.tolist() == [0] * 10 + list(range(10, 50))


def test_function_calls():
    module = """
    .func (.param .b32 result) fold(.param .b32 x, .param .b32 n)
    { .reg .b32 %r<4>; .reg .pred %p<2>;
      ld.param.u32 %r1, [x]; ld.param.u32 %r2, [n];
    L: setp.eq.u32 %p1, %r2, 0; @%p1 bra E; mad.lo.u32 %r1, %r1, 2, 1; sub.u32 %r2, %r2, 1; bra L;
    E: st.param.b32 [result], %r1; ret; }
    .func nothing() { ret; }
    """
    body = """
    and.b32 %r1, %tid, 7; setp.gt.u32 %p1, %tid, 15; mov.u32 %r31, 0; @%p1 bra SKIP;
    { .param .b32 a; .param .b32 b; .param .b32 r; st.param.b32 [a], %tid; st.param.b32 [b+0], %r1;
      call.uni (r), fold, (a, b); ld.param.b32 %r31, [r]; }
    SKIP: call nothing;
    """
    expected = [0 if t > 15 else (t + 1) * 2 ** (t & 7) - 1 for t in range(32)]
    assert per_thread(body, module=module).tolist() == expected
    recursive = ".func f() { call.uni f; ret; }"
    with pytest.raises(ValueError, match="recursion"):
        _ptxvm.Module(text("call.uni f;", 0, module=recursive)).kernel("k")


def test_seeds_change_the_schedule_and_nothing_else():
    """Warps take tickets: their order depends on the seed, each seed always gives the same."""

    def order(seed):
        out = np.zeros(8, np.uint32)
        body = """
        and.b32 %r1, %tid, 31; setp.ne.u32 %p1, %r1, 0; mov.u64 %d1, ticket; mov.u32 %r2, 0;
        WORK: add.u32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, 50; @%p2 bra WORK;
        @%p1 ret; atom.global.add.u32 %r3, [%d1], 1; shr.u32 %r4, %tid, 5; mad.wide.u32 %d2, %r4, 4, %ptr0;
        st.global.u32 [%d2], %r3;
        """
        launch(body, out, block=256, seed=seed, module=".global .u32 ticket;")
        assert sorted(out) == list(range(8))
        return tuple(out)

    assert order(1) == order(1)
    assert len({order(seed) for seed in range(6)}) > 1


# ---- between lanes ----


@pytest.mark.parametrize("segment", [32, 16, 8])
def test_shuffles(segment):
    """d and p of every mode; c as __shfl_sync makes it for a segment width."""
    data = np.arange(100, 132, dtype=np.uint32)
    mask = (32 - segment) << 8
    lane = np.arange(32)
    start, texts, expected = lane // segment * segment, [], []
    for n in (0, 1, 3, 7):
        sources = {
            "up": (mask, lane - n, lane - n >= start),
            "down": (mask | 31, lane + n, lane + n < start + segment),
            "bfly": (mask | 31, lane ^ n, (lane ^ n) < start + segment),
            "idx": (mask | 31, start + n % segment, np.full(32, True)),
        }
        for mode, (c, source, valid) in sources.items():
            texts += [
                (f"shfl.sync.{mode}.b32 $|%p1, %a, {n}, {c}, -1", np.uint32),
                (f"shfl.sync.{mode}.b32 %r1|$, %a, {n}, {c}, 0xffffffff", bool),
            ]
            expected += [data[np.where(valid, source, lane)], valid]
    for (instruction, _), result, want in zip(texts, evaluate(texts, a=data), expected, strict=True):
        np.testing.assert_array_equal(result, want, err_msg=instruction)


def test_votes_matches_and_reductions():
    a = (np.arange(32) * 7 % 5).astype(np.uint32)
    signed = np.arange(-5, 27, dtype=np.int32)
    ballot = sum(1 << i for i in range(32) if a[i] > 2)
    setp = "setp.gt.u32 %p0, %a, 2; "
    cases = {
        setp + "vote.sync.ballot.b32 $, %p0, -1": (np.uint32, ballot),
        setp + "vote.sync.ballot.b32 $, !%p0, -1": (np.uint32, ballot ^ 0xFFFFFFFF),
        setp + "vote.sync.any.pred $, %p0, -1": (bool, True),
        setp + "vote.sync.all.pred $, %p0, -1": (bool, False),
        setp + "vote.sync.uni.pred $, %p0, -1": (bool, False),
        "match.any.sync.b32 $, %a, -1": (np.uint32, [sum(1 << j for j in range(32) if a[j] == v) for v in a]),
        "match.all.sync.b32 $|%p1, %a, -1": (np.uint32, 0),
        "redux.sync.add.s32 $, %s, -1": (np.int32, signed.sum()),
        "redux.sync.min.s32 $, %s, -1": (np.int32, -5),
        "redux.sync.max.u32 $, %s, -1": (np.uint32, 0xFFFFFFFF),
        "redux.sync.xor.b32 $, %a, -1": (np.uint32, np.bitwise_xor.reduce(a)),
    }
    results = evaluate([(instruction, dtype) for instruction, (dtype, _) in cases.items()], a=a, s=signed)
    for (instruction, (dtype, want)), result in zip(cases.items(), results, strict=True):
        np.testing.assert_array_equal(result, np.broadcast_to(np.array(want, dtype), 32), err_msg=instruction)


def test_warp_instructions_of_part_of_a_warp():
    """Two halves of a warp reduce with masks of their own, in one instruction and in two branches."""
    together = """
    setp.lt.u32 %p1, %tid, 16; selp.b32 %r1, 0xffff, 0xffff0000, %p1; redux.sync.add.u32 %r31, %tid, %r1;
    """
    apart = """
    setp.lt.u32 %p1, %tid, 16; @%p1 bra LOW; redux.sync.add.u32 %r31, %tid, 0xffff0000; bra END;
    LOW: redux.sync.add.u32 %r31, %tid, 0xffff; END:
    """
    for body in (together, apart):
        assert per_thread(body).tolist() == [sum(range(16))] * 16 + [sum(range(16, 32))] * 16


def test_lanes_wait_for_their_member_mask():
    """Lanes reach one shuffle at different times; at a bar.warp.sync they may come from different places."""
    late = """
    mov.u32 %r2, 0; setp.lt.u32 %p1, %tid, 8; @%p1 bra MEET;
    SLOW: add.u32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, 20; @%p2 bra SLOW; bra MEET;
    MEET: shfl.sync.bfly.b32 %r31, %tid, 31, 31, -1;
    """
    assert per_thread(late).tolist() == list(range(31, -1, -1))
    back = """
    mov.u32 %r2, 0; setp.lt.u32 %p1, %tid, 8; bra START;
    MEET: shfl.sync.bfly.b32 %r31, %tid, 31, 31, -1; bra END;
    START: @%p1 bra MEET; add.u32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, 20; @%p2 bra START; bra MEET;
    END:
    """
    assert per_thread(back).tolist() == list(range(31, -1, -1))
    places = """
    mov.u32 %r1, buf; mad.lo.u32 %r2, %tid, 4, %r1; st.shared.u32 [%r2], %tid; setp.lt.u32 %p1, %tid, 16; @%p1 bra LOW;
    bar.warp.sync -1; bra READ;
    LOW: bar.warp.sync 0xffffffff;
    READ: xor.b32 %r3, %r2, 64; xor.b32 %r3, %r3, 0; ld.shared.u32 %r31, [%r3];
    """
    assert per_thread(places, module=".shared .align 128 .b32 buf[32];").tolist() == [t ^ 16 for t in range(32)]


def test_exited_lanes_are_not_waited_for():
    body = "setp.lt.u32 %p1, %tid, 4; mov.u32 %r31, 7; @%p1 ret; redux.sync.add.u32 %r31, %tid, -1;"
    out = per_thread(body)
    assert out[4:].tolist() == [sum(range(4, 32))] * 28


def test_elect():
    assert per_thread("elect.sync %r1|%p1, -1; selp.b32 %r31, 1, 0, %p1;").tolist() == [1] + [0] * 31


# ---- barriers ----


def test_shared_reduction_over_barriers():
    body = """
    mov.u32 %r1, sums; mad.lo.u32 %r2, %tid, 4, %r1; st.shared.u32 [%r2], %tid; mov.u32 %r3, 128;
    LOOP: bar.sync 0; setp.ge.u32 %p1, %tid, %r3; @%p1 bra SKIP;
      mad.lo.u32 %r4, %r3, 4, %r2; ld.shared.u32 %r5, [%r4]; ld.shared.u32 %r6, [%r2]; add.u32 %r6, %r6, %r5;
      st.shared.u32 [%r2], %r6;
    SKIP: shr.u32 %r3, %r3, 1; setp.ne.u32 %p2, %r3, 0; @%p2 bra LOOP;
    bar.sync 0; ld.shared.u32 %r31, [sums];
    """
    for seed in range(3):
        out = per_thread(body, 256, module=".shared .align 4 .b32 sums[256];", seed=seed)
        assert (out == 255 * 128).all()


def test_named_barriers_order_producers_and_consumers():
    """Warp 0 produces and arrives, warp 1 consumes: bar.arrive and bar.sync of 64 threads."""
    body = """
    mov.u32 %r1, box; and.b32 %r2, %tid, 31; mad.lo.u32 %r3, %r2, 4, %r1; setp.ge.u32 %p1, %tid, 32;
    mov.u32 %r31, 0; @%p1 bra CONSUME;
    mul.lo.u32 %r4, %r2, 3; st.shared.u32 [%r3], %r4; bar.arrive 1, 64; bra END;
    CONSUME: bar.sync 1, 64; ld.shared.u32 %r31, [%r3];
    END:
    """
    for seed in range(4):
        out = per_thread(body, 64, module=".shared .b32 box[32];", seed=seed)
        assert out[32:].tolist() == [3 * i for i in range(32)]


def test_barrier_reductions():
    body = """
    setp.lt.u32 %p1, %tid, 40; bar.red.popc.u32 %r1, 0, %p1; bar.red.and.pred %p2, 1, %p1;
    bar.red.or.pred %p3, 2, 96, !%p1;
    selp.u32 %r2, 1000, 0, %p2; selp.u32 %r3, 100, 0, %p3; add.u32 %r31, %r1, %r2; add.u32 %r31, %r31, %r3;
    """
    assert per_thread(body, 96).tolist() == [140] * 96


def test_barriers_without_aligned_collect_a_divergent_warp():
    body = """
    mov.u32 %r1, box; mad.lo.u32 %r2, %tid, 4, %r1; st.shared.u32 [%r2], %tid; setp.lt.u32 %p1, %tid, 5; @%p1 bra A;
    barrier.sync 0; bra B;
    A: barrier.sync 0;
    B: mov.u32 %r3, 252; sub.u32 %r3, %r3, 0; mul.lo.u32 %r4, %tid, 4; sub.u32 %r4, %r3, %r4;
    add.u32 %r4, %r4, %r1; ld.shared.u32 %r31, [%r4];
    """
    assert per_thread(body, 64, module=".shared .b32 box[64];").tolist() == list(range(63, -1, -1))


# ---- tensor instructions ----


def fragments(matrix: np.ndarray, place, registers: int, per_register: int) -> np.ndarray:
    """[registers, 32] words of a matrix; place(register, lane, i) is the element's index."""
    dtype = {1: np.uint32, 2: np.uint16}[per_register]
    words = np.zeros((registers, 32, per_register), dtype)
    for r in range(registers):
        for lane in range(32):
            for i in range(per_register):
                words[r, lane, i] = matrix[place(r, lane, i)]
    return words.view(np.uint32)[..., 0] if per_register == 2 else words[..., 0]


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    return (
        tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)
        .numpy()
        .view(f"uint{8 * tensor.element_size()}")
    )


SHAPES = {
    "m16n8k16.row.col.f32.bf16.bf16.f32": (16, torch.bfloat16, torch.float32),
    "m16n8k16.row.col.f32.f16.f16.f32": (16, torch.float16, torch.float32),
    "m16n8k16.row.col.f16.f16.f16.f16": (16, torch.float16, torch.float16),
    "m16n8k8.row.col.f32.bf16.bf16.f32": (8, torch.bfloat16, torch.float32),
    "m16n8k8.row.col.f32.f16.f16.f32": (8, torch.float16, torch.float32),
    "m16n8k8.row.col.f16.f16.f16.f16": (8, torch.float16, torch.float16),
    "m16n8k8.row.col.f32.tf32.tf32.f32": (8, torch.float32, torch.float32),
    "m16n8k4.row.col.f32.tf32.tf32.f32": (4, torch.float32, torch.float32),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_mma_layouts(shape):
    depth, dtype, sum_dtype = SHAPES[shape]
    generator = torch.Generator().manual_seed(depth)
    # Small integers: every sum is exact, so the layout alone decides.
    a, b, c = (
        torch.randint(-8, 9, s, generator=generator).to(t)
        for s, t in (((16, depth), dtype), ((depth, 8), dtype), ((16, 8), sum_dtype))
    )
    per = 1 if dtype == torch.float32 else 2
    step = 4 * per
    b_registers = depth // step
    a_words = fragments(
        bits_of(a),
        lambda r, lane, i: (lane // 4 + 8 * (r & 1), per * (lane % 4) + i + step * (r >> 1)),
        2 * b_registers,
        per,
    )
    b_words = fragments(bits_of(b), lambda r, lane, i: (per * (lane % 4) + i + step * r, lane // 4), b_registers, per)
    if sum_dtype == torch.float32:
        place = lambda v, lane, i: (lane // 4 + 8 * (v >> 1), 2 * (lane % 4) + (v & 1))  # noqa: E731
        c_words = fragments(bits_of(c), place, 4, 1)
    else:
        place = lambda r, lane, i: (lane // 4 + 8 * r, 2 * (lane % 4) + i)  # noqa: E731
        c_words = fragments(bits_of(c), place, 2, 2)
    inputs = np.concatenate([a_words, b_words, c_words])
    out = np.zeros_like(c_words)
    names, body = [f"%r{i}" for i in range(len(inputs))], "add.u64 %d1, %ptr0, %lane4; add.u64 %d2, %ptr1, %lane4;"
    body += "".join(f"ld.global.b32 {n}, [%d1+{128 * i}];" for i, n in enumerate(names))
    groups = [names[: len(a_words)], names[len(a_words) : len(a_words) + len(b_words)], names[-len(c_words) :]]
    ra, rb, rc = ("{" + ",".join(g) + "}" for g in groups)
    body += f"mma.sync.aligned.{shape} {rc}, {ra}, {rb}, {rc};"
    body += "".join(f"st.global.b32 [%d2+{128 * i}], {n};" for i, n in enumerate(groups[2]))
    counters = launch(body, inputs, out)
    assert counters["mma"] == 1
    want = (a.double() @ b.double() + c.double()).to(sum_dtype)
    np.testing.assert_array_equal(
        out, fragments(bits_of(want), place, len(c_words), 1 if sum_dtype == torch.float32 else 2)
    )


def test_mma_adds_exact_products_in_ascending_k():
    """1 + 2^-24 + 2^-24 in fp32, one rounding each: the small terms are lost when they come second."""
    a = torch.zeros(16, 16, dtype=torch.bfloat16)
    a[0, 0], a[0, 1], a[0, 2] = 1, 2.0**-24, 2.0**-24
    a[1, 0], a[1, 1], a[1, 2] = 2.0**-24, 2.0**-24, 1
    a_words = fragments(
        bits_of(a), lambda r, lane, i: (lane // 4 + 8 * (r & 1), 2 * (lane % 4) + i + 8 * (r >> 1)), 4, 2
    )
    one = 0x3F803F80
    out = np.zeros(32, np.float32)
    body = "add.u64 %d1, %ptr0, %lane4; add.u64 %d2, %ptr1, %lane4;" + "".join(
        f"ld.global.b32 %r{i}, [%d1+{128 * i}];" for i in range(4)
    )
    body += f"mov.b32 %r4, {one}; mov.f32 %f0, 0f00000000;"
    body += (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f0,%f1,%f2,%f3}, {%r0,%r1,%r2,%r3}, "
        "{%r4,%r4}, {%f0,%f0,%f0,%f0}; st.global.f32 [%d2], %f0;"
    )
    launch(body, a_words, out)
    assert out[0] == 1
    assert out[4] == np.float32(1 + 2.0**-23)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_loads_and_stores(count, transposed):
    """ldmatrix gives lane l elements (l / 4, 2 (l % 4) + {0, 1}) of each matrix; stmatrix is its inverse."""
    rows = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8)
    registers = ", ".join(f"%r{i}" for i in range(10, 10 + count))
    suffix = ".trans" if transposed else ""
    out, copy = np.zeros((count, 32), np.uint32), np.zeros_like(rows)
    body = f"""
    mov.u32 %r1, tile; and.b32 %r2, %tid, {8 * count - 1}; mad.lo.u32 %r3, %r2, 16, %r1;
    mad.wide.u32 %d1, %r2, 16, %ptr0;
    setp.lt.u32 %p1, %tid, {8 * count};
    @%p1 ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%d1]; @%p1 st.shared.v4.u32 [%r3], {{%r4, %r5, %r6, %r7}};
    bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 {{{registers}}}, [%r3];
    stmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 [%r3+512], {{{registers}}}; bar.warp.sync -1;
    add.u64 %d2, %ptr1, %lane4;
    """ + "".join(f"st.global.u32 [%d2+{128 * i}], %r{10 + i};" for i in range(count))
    body += (
        "mad.wide.u32 %d3, %r2, 16, %ptr2; @%p1 ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r3+512]; "
        "@%p1 st.global.v4.u32 [%d3], {%r4, %r5, %r6, %r7};"
    )
    counters = launch(body, rows, out, copy, module=".shared .align 16 .b8 tile[1024];")
    source = rows.transpose(0, 2, 1) if transposed else rows
    np.testing.assert_array_equal(out, np.ascontiguousarray(source.reshape(count, 32, 2)).view(np.uint32)[..., 0])
    np.testing.assert_array_equal(copy, rows)
    assert counters["shared_wavefronts"] == counters["shared_wavefronts_ideal"]


# ---- counters ----


def test_counts_of_instructions():
    counters = launch("mov.u32 %r1, 0; LOOP: add.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 10; @%p1 bra LOOP;", block=48)
    assert counters["by_opcode"] == {
        "mov.u32": 4,
        "mul.wide.u32": 4,
        "add.u32": 20,
        "setp.lt.u32": 20,
        "bra": 20,
        "ret": 2,
    }
    assert counters["by_class"] == {"move": 4, "integer": 24, "predicate": 20, "control": 22}
    assert counters["instructions"] == 70
    assert counters["lane_instructions"] == 48 * (4 + 20 + 9 + 1)  # the last round's branch has no lane


@pytest.mark.parametrize(("stride", "sectors"), [(4, 4), (8, 8), (32, 32), (0, 1), (128, 32)])
def test_sectors(stride, sectors):
    data = np.zeros(8192, np.uint8)
    data = data[-data.ctypes.data % 32 :][:4096]
    counters = launch(f"mad.wide.u32 %d1, %tid, {stride}, %ptr0; ld.global.u32 %r1, [%d1];", data)
    distinct = 32 if stride else 1
    assert (counters["load_sectors"], counters["load_sectors_ideal"], counters["load_bytes"]) == (
        sectors,
        -(-4 * distinct // 32),
        4 * distinct,
    )


def test_misaligned_rows_cost_a_sector_more():
    data = np.zeros(1024, np.uint8)
    data = data[-data.ctypes.data % 32 :][:512]
    counters = launch("add.u64 %d1, %ptr0, %lane4; st.global.u32 [%d1+4], %tid;", data)
    assert (counters["store_sectors"], counters["store_sectors_ideal"]) == (5, 4)


@pytest.mark.parametrize(
    ("access", "scale", "wavefronts", "ideal"),
    [
        ("ld.shared.u32 %r1, [%r3]", 4, 1, 1),
        ("ld.shared.u32 %r1, [%r3]", 8, 2, 1),
        ("ld.shared.u32 %r1, [%r3]", 128, 32, 1),
        ("ld.shared.u32 %r1, [%r3]", 0, 1, 1),
        ("ld.shared.u32 %r1, [%r3]", 132, 1, 1),
        ("ld.shared.u16 %h1, [%r3]", 2, 1, 1),
        ("ld.shared.v2.u32 {%r1, %r4}, [%r3]", 8, 2, 2),
        ("ld.shared.v4.u32 {%r1, %r4, %r5, %r6}, [%r3]", 16, 4, 4),
        ("ld.shared.v4.u32 {%r1, %r4, %r5, %r6}, [%r3]", 128, 32, 4),
        ("ld.shared.v2.u32 {%r1, %r4}, [%r3]", 128, 32, 2),
    ],
)
def test_bank_wavefronts(access, scale, wavefronts, ideal):
    body = f"mov.u32 %r2, buf; mad.lo.u32 %r3, %tid, {scale}, %r2; {access};"
    counters = launch(body, module=".shared .align 128 .b8 buf[4224];", poison="value")
    assert (counters["shared_wavefronts"], counters["shared_wavefronts_ideal"]) == (wavefronts, ideal)


def test_other_python_threads_run_meanwhile():
    ticks = []
    done = threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(0)
            done.wait(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    launch("mov.u32 %r1, 0; LOOP: add.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 3000000; @%p1 bra LOOP;")
    done.set()
    thread.join()
    assert len(ticks) > 2
