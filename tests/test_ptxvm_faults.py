"""Every mistake that the PTX machine reports: what it is called, and that correct neighbours pass."""

import numpy as np
import pytest

from tests.ptx_text import _ptxvm, fault, launch

BOX = ".shared .align 16 .b8 box[2048];"
SLOT = "mov.u32 %r1, box; shl.b32 %r2, %tid, 2; add.u32 %r3, %r1, %r2;"  # %r3: the thread's word of box
NEIGHBOUR = "xor.b32 %r4, %r2, 4; add.u32 %r4, %r4, %r1;"  # %r4: the word of the thread beside it
OTHER_WARP = "xor.b32 %r4, %r2, 128; add.u32 %r4, %r4, %r1;"  # %r4: the same lane's word in the other warp


def test_the_report_names_everything():
    data = np.zeros(40, np.uint32)
    body = (
        "mov.u32 %r1, %ctaid.x; mad.lo.u32 %r1, %r1, 32, %tid; "
        "mad.wide.u32 %d1, %r1, 4, %ptr0;\n  st.global.u32 [%d1+4], %r1;"
    )
    error = fault("bounds", body, data, grid=2)
    assert isinstance(error, RuntimeError)
    assert (error.kernel, error.block, error.thread) == ("k", (1, 0, 0), (7, 0, 0))
    assert error.instruction == "st.global.u32 [%d1+4], %r1"
    assert error.line > 4  # the header has three lines
    for part in (
        "4 bytes at address 0x",
        "'b0', 160 bytes",
        "offset 160",
        "kernel k, block (1, 0, 0), thread (7, 0, 0) (warp 0, lane 7)",
        f"PTX line {error.line}",
    ):
        assert part in str(error)


@pytest.mark.parametrize(
    ("body", "options"),
    [
        ("ld.global.u32 %r1, [%ptr0+128];", {}),
        ("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%ptr0+116];", {}),
        ("mov.u64 %d1, 0; ld.global.u32 %r1, [%d1];", {}),
        ("mov.u64 %d1, -4; ld.u32 %r1, [%d1];", {}),
        ("red.global.add.u32 [%ptr0+256], 1;", {}),
        ("mov.u32 %r1, 1; st.shared.u32 [box+2048], %r1;", {}),
        ("mov.u32 %r1, 0; ld.shared.u32 %r2, [%r1];", {}),
        ("mov.u32 %r1, box; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1+2048];", {}),
        ("cp.async.cg.shared.global [box], [%ptr0+128], 16;", {}),
        ("cp.async.cg.shared.global [box], [%ptr0+112], 16, 32;", {}),
        ("cp.async.cg.shared.global [box+2048], [%ptr0], 16;", {}),
        ("ld.local.u32 %r1, [depot+16];", {"declarations": ".local .b8 depot[16];"}),
        ("cvta.to.shared.u64 %d1, %ptr0;", {}),
        ("bar.sync 16;", {}),
    ],
)
def test_bounds(body, options):
    data = np.zeros(32, np.uint32)
    if "116" in body:
        data = np.zeros(31, np.uint32)
        body = body.replace("116", "112")
    fault("bounds", body, data, module=BOX, **options)


@pytest.mark.parametrize(
    "body",
    [
        "ld.global.u32 %r1, [%ptr0+2];",
        "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%ptr0+8];",
        "st.shared.u64 [box+4], %d1;",
        "cp.async.cg.shared.global [box+8], [%ptr0], 16;",
        "cp.async.cg.shared.global [box], [%ptr0+8], 16;",
        "mov.u32 %r1, box; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1+8];",
        "st.local.u32 [depot+2], %tid;",
    ],
)
def test_misaligned(body):
    data = np.zeros(64, np.uint32)
    data = data[-data.ctypes.data % 16 // 4 :][:32]
    fault("misaligned", "mov.u64 %d1, 0;" + body, data, block=32, module=BOX, declarations=".local .b8 depot[16];")


def test_readonly():
    data = np.zeros(32, np.uint32)
    fault("readonly", "st.global.u32 [%ptr0], 1;", data, readonly={0}, block=1)
    fault("readonly", "red.global.add.u32 [%ptr0], 1;", data, readonly={0}, block=1)
    fault("readonly", "mov.u64 %d1, table; st.u32 [%d1], 1;", module=".const .u32 table[2] = {1, 2};", block=1)
    launch("ld.global.u32 %r1, [%ptr0];", data, readonly={0})


@pytest.mark.parametrize(
    "body",
    [
        "add.u32 %r1, %r2, 1;",
        "setp.eq.u32 %p1, %tid, 0; @%p1 mov.u32 %r2, 1; add.u32 %r1, %r2, 1;",
        "@%p1 mov.u32 %r1, 1;",
        "st.shared.u32 [box], %r1;",
        "ld.shared.u32 %r1, [box];",
        "mov.u16 %h1, 1; st.shared.u16 [box], %h1; ld.shared.u32 %r1, [box];",
        "ld.local.u32 %r1, [depot];",
        "mov.u32 %r1, box; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1];",
        "atom.shared.add.u32 %r1, [box], 1;",
        "addc.u32 %r1, %tid, 1;",
    ],
)
def test_poison(body):
    block = 1 if "h1" in body else 32
    error = fault("poison", body, block=block, module=BOX, declarations=".local .b8 depot[16];")
    if body == "add.u32 %r1, %r2, 1;":
        assert "register %r2 is read before it is written" in str(error)


def test_shared_memory_of_the_last_block_is_forgotten():
    body = "mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0; @%p1 st.shared.u32 [box], 1; ld.shared.u32 %r2, [box];"
    assert fault("poison", body, block=1, grid=2, module=BOX).block == (1, 0, 0)


# ---- races in shared memory ----


@pytest.mark.parametrize(
    "body",
    [
        SLOT + NEIGHBOUR + "st.shared.u32 [%r3], %tid; ld.shared.u32 %r5, [%r4];",
        SLOT
        + NEIGHBOUR
        + "st.shared.u32 [%r3], %tid; shfl.sync.bfly.b32 %r6, %tid, 1, 31, -1; ld.shared.u32 %r5, [%r4];",
        SLOT
        + NEIGHBOUR
        + "st.shared.u32 [%r3], %tid; bar.warp.sync -1; ld.shared.u32 %r5, [%r4]; st.shared.u32 [%r3], %tid;",
        SLOT
        + NEIGHBOUR
        + "st.shared.u32 [%r3], %tid; bar.warp.sync -1; st.shared.u32 [%r4], %tid; ld.shared.u32 %r5, [%r3];",
        "st.shared.u32 [box], %tid;",
        "red.shared.add.u32 [box], 1;",
        "mov.u32 %r5, 1; mov.u32 %r6, box; st.shared.u32 [box], %r5; bar.sync 0; "
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r7}, [%r6]; st.shared.u32 [box], %r5;",
        SLOT + "shl.b32 %r5, %tid, 1; add.u32 %r5, %r5, %r1; "
        "st.shared.u8 [%r5], %tid; st.shared.u8 [%r5+1], %tid; st.shared.u8 [%r5+2], %tid;",
    ],
    ids=[
        "no sync",
        "a shuffle does not order",
        "write after read",
        "write after write",
        "one word",
        "atomics and poison",
        "ldmatrix",
        "bytes",
    ],
)
def test_races_within_a_warp(body):
    if "red.shared" in body:
        body = "setp.eq.u32 %p1, %tid, 0; @%p1 st.shared.u32 [box], 0;" + body
    options = {"poison": "value"} if "ldmatrix" in body else {}
    fault("race", body, module=BOX, **options)
    launch(body, module=BOX, races=False, poison="value")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "body",
    [
        SLOT + OTHER_WARP + "st.shared.u32 [%r3], %tid; bar.warp.sync -1; ld.shared.u32 %r5, [%r4];",
        SLOT
        + OTHER_WARP
        + "st.shared.u32 [%r3], %tid; bar.sync 0; ld.shared.u32 %r5, [%r4]; st.shared.u32 [%r3], %tid;",
        "setp.eq.u32 %p1, %tid, 32; mov.u32 %r5, 3; @%p1 st.shared.u32 [box], %r5; setp.eq.u32 %p2, %tid, 0; "
        "@%p2 st.shared.u32 [box], %r5;",
        "setp.eq.u32 %p1, %tid, 32; setp.eq.u32 %p2, %tid, 0; @%p2 st.shared.u32 [box], 1; "
        "@%p1 atom.shared.exch.b32 %r5, [box], 2;",
    ],
    ids=["bar.warp.sync is of one warp", "write after read", "same value", "atomic against a store"],
)
def test_races_between_warps(body, seed):
    fault("race", body, module=BOX, block=64, seed=seed, poison="value")


@pytest.mark.parametrize(
    "body",
    [
        SLOT + NEIGHBOUR + "st.shared.u32 [%r3], %tid; bar.warp.sync -1; ld.shared.u32 %r5, [%r4]; "
        "bar.warp.sync -1; st.shared.u32 [%r4], %tid;",
        SLOT
        + OTHER_WARP
        + "st.shared.u32 [%r3], %tid; bar.sync 0; ld.shared.u32 %r5, [%r4]; bar.sync 0; st.shared.u32 [%r3], %r5;",
        SLOT + OTHER_WARP + "st.shared.u32 [%r3], %tid; bar.sync 1, 64; ld.shared.u32 %r5, [%r4];",
        "mov.u32 %r5, 3; and.b32 %r6, %tid, 32; mov.u32 %r1, box; add.u32 %r6, %r6, %r1; st.shared.u32 [%r6], %r5;",
        "mov.u32 %r1, box; add.u32 %r2, %r1, %tid; st.shared.u8 [%r2], %tid; ld.shared.u8 %r3, [%r2];",
        "mov.u32 %r1, box; mad.lo.u32 %r2, %tid, 2, %r1; cvt.u16.u32 %h1, %tid; st.shared.u16 [%r2], %h1; "
        "bar.sync 0; xor.b32 %r2, %r2, 2; ld.shared.u16 %h2, [%r2];",
        "setp.eq.u32 %p1, %tid, 0; @%p1 st.shared.u32 [box], 0; bar.sync 0; red.shared.add.u32 [box], 1; "
        "bar.sync 0; ld.shared.u32 %r1, [box];",
        SLOT + NEIGHBOUR + "and.b32 %r6, %tid, 30; mov.u32 %r7, 3; shl.b32 %r7, %r7, %r6; "
        "and.b32 %r8, %tid, 32; setp.ne.u32 %p1, %r8, 0; @%p1 ret;"
        " st.shared.u32 [%r3], %tid; bar.warp.sync %r7; ld.shared.u32 %r5, [%r4];",
    ],
    ids=[
        "bar.warp.sync",
        "bar.sync",
        "counted barrier",
        "same value in one instruction",
        "own byte",
        "halves",
        "atomics",
        "partial bar.warp.sync",
    ],
)
def test_no_race(body):
    for seed in range(3):
        launch(body, module=BOX, block=64, seed=seed)


def test_a_partial_sync_orders_its_lanes_only():
    body = (
        SLOT + "xor.b32 %r4, %r2, 8; add.u32 %r4, %r4, %r1; and.b32 %r6, %tid, 30; mov.u32 %r7, 3; "
        "shl.b32 %r7, %r7, %r6; st.shared.u32 [%r3], %tid; bar.warp.sync %r7; ld.shared.u32 %r5, [%r4];"
    )
    fault("race", body, module=BOX)


def test_races_need_a_barrier_of_both_warps():
    """Warps 0 and 1 meet, warp 2 does not."""
    body = (
        SLOT
        + """
    setp.ge.u32 %p1, %tid, 64; st.shared.u32 [%r3], %tid; @%p1 bra LAST; bar.sync 1, 64; bra END;
    LAST: ld.shared.u32 %r5, [%r3+-256];
    END:
    """
    )
    for seed in range(3):
        fault("race", body, module=BOX, block=96, seed=seed, poison="value")


# ---- cp.async ----

COPY = (
    "mov.u32 %r1, box; shl.b32 %r2, %tid, 4; add.u32 %r3, %r1, %r2; and.b32 %r9, %r2, 127; "
    "cvt.u64.u32 %d1, %r9; add.u64 %d1, %d1, %ptr0; cp.async.cg.shared.global [%r3], [%d1], 16;"
)


@pytest.mark.parametrize(
    ("kind", "rest"),
    [
        ("async", "ld.shared.u32 %r5, [%r3];"),
        ("async", "cp.async.commit_group; ld.shared.u32 %r5, [%r3];"),
        ("async", "cp.async.wait_group 0; ld.shared.u32 %r5, [%r3];"),  # never committed
        ("async", "cp.async.commit_group; cp.async.wait_group 1; ld.shared.u32 %r5, [%r3];"),
        ("async", "st.shared.u32 [%r3], %tid;"),
        ("async", "bar.sync 0; xor.b32 %r4, %r3, 16; ld.shared.u32 %r5, [%r4];"),
        ("race", "cp.async.wait_all; xor.b32 %r4, %r3, 16; ld.shared.u32 %r5, [%r4];"),
        ("race", "bar.sync 0; cp.async.wait_all; xor.b32 %r4, %r3, 16; ld.shared.u32 %r5, [%r4];"),
    ],
)
def test_async(kind, rest):
    fault(kind, COPY + rest, np.zeros(32, np.uint32), module=BOX, block=64)


def test_async_in_order():
    for wait in (
        "cp.async.wait_all;",
        "cp.async.commit_group; cp.async.wait_group 0;",
        "cp.async.commit_group; cp.async.commit_group; cp.async.wait_group 1;",
    ):
        launch(
            COPY + wait + "bar.sync 0; xor.b32 %r4, %r3, 16; ld.shared.u32 %r5, [%r4];",
            np.zeros(32, np.uint32),
            module=BOX,
            block=64,
        )


# ---- races in global memory ----


@pytest.mark.parametrize(
    ("body", "grid"),
    [
        ("st.global.u32 [%ptr0], %tid;", 1),
        ("mov.u32 %r1, %ctaid.x; st.global.u32 [%ptr0], %r1;", 2),
        ("mov.u32 %r1, %ctaid.x; add.u64 %d1, %ptr0, %lane4; st.global.u32 [%d1], %r1;", 2),
        (
            "mov.u32 %r1, %ctaid.x; add.u64 %d1, %ptr0, %lane4; setp.eq.u32 %p1, %r1, 0; "
            "@%p1 st.global.u32 [%d1], %r1; @!%p1 ld.global.u32 %r2, [%d1];",
            2,
        ),
        (
            "mov.u32 %r1, %ctaid.x; add.u64 %d1, %ptr0, %lane4; setp.eq.u32 %p1, %r1, 1; "
            "@%p1 st.global.u32 [%d1], %r1; @!%p1 ld.global.u32 %r2, [%d1];",
            2,
        ),
        ("setp.eq.u32 %p1, %tid, 0; @%p1 st.global.u32 [%ptr0], 1; ld.global.u32 %r1, [%ptr0];", 1),
        (
            "mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0; @%p1 bra A; red.global.add.u32 [%ptr0], 1; "
            "bra B; A: setp.eq.u32 %p2, %tid, 0; @%p2 st.global.u32 [%ptr0], 1; B:",
            2,
        ),
    ],
)
def test_global_races(body, grid):
    data = np.zeros(32, np.uint32)
    fault("global-race", body, data, grid=grid, global_races=True)
    launch(body, data, grid=grid)


@pytest.mark.parametrize(
    "body",
    [
        "red.global.add.u32 [%ptr0], 1;",
        "ld.global.u32 %r1, [%ptr0];",
        "mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r1, 0; @%p1 ret; add.u64 %d1, %ptr0, %lane4; "
        "st.global.u32 [%d1], %tid; bar.sync 0; xor.b32 %r2, %tid, 1; mad.wide.u32 %d2, %r2, 4, %ptr0; "
        "ld.global.u32 %r3, [%d2];",
        "mov.u32 %r1, %ctaid.x; mad.lo.u32 %r1, %r1, 64, %tid; mad.wide.u32 %d1, %r1, 1, %ptr0; "
        "st.global.u8 [%d1], %tid; ld.global.u8 %r2, [%d1];",
    ],
    ids=["atomics", "reads", "barrier", "bytes of one word"],
)
def test_no_global_race(body):
    launch(body, np.zeros(64, np.uint32), block=64, grid=3, global_races=True)


# ---- barriers, limits, traps ----


@pytest.mark.parametrize(
    "body",
    [
        "setp.lt.u32 %p1, %tid, 32; @%p1 bra A; bar.sync 1; bra B; A: bar.sync 0; B:",
        "setp.lt.u32 %p1, %tid, 32; @%p1 ret; bar.sync 0, 64;",
        "bar.sync 1, 128;",
    ],
    ids=["different barriers", "a count that an exited warp is missing from", "a count of more threads than there are"],
)
def test_deadlock(body):
    error = fault("deadlock", body, block=64)
    assert "bar.sync" in str(error)
    assert "warp" in str(error)


@pytest.mark.parametrize(
    "body",
    [
        "setp.lt.u32 %p1, %tid, 7; @%p1 bar.sync 0;",
        "setp.lt.u32 %p1, %tid, 7; @%p1 bra A; bar.sync 0; bra B; A: bar.sync 0; B:",
        "setp.lt.u32 %p1, %tid, 7; @%p1 shfl.sync.idx.b32 %r1, %tid, 0, 31, -1; bar.warp.sync -1;",
        "setp.lt.u32 %p1, %tid, 7; @%p1 bra A; vote.sync.any.pred %p2, %p1, -1; bra B; "
        "A: vote.sync.any.pred %p2, %p1, -1; B:",
        "bar.warp.sync 1;",
        "setp.lt.u32 %p1, %tid, 7; mov.u32 %r1, box; @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1];",
        "setp.lt.u32 %p1, %tid, 32; @%p1 bra A; bar.sync 1, 96; bra B; A: bar.sync 1, 64; B:",
        "bar.sync 0, 33;",
        "shfl.sync.idx.b32 %r1, %tid, 20, 31, 0xff; ",
    ],
)
def test_divergent_barriers(body):
    if body.startswith("shfl"):
        body = "setp.lt.u32 %p1, %tid, 8; @%p1 " + body
    seeds = range(3) if "96" in body else [0]
    for seed in seeds:
        fault("divergent-barrier", body, block=64, module=BOX, seed=seed)


def test_limit():
    error = fault("limit", "LOOP: bra LOOP;", max_instructions=10_000)
    assert "10000" in str(error)


def test_spinning_on_a_lane_of_the_same_warp_never_ends():
    """Min-PC lockstep gives no forward progress to a lane behind a spin loop: an error, not a hang."""
    cell = np.zeros(1, np.uint32)
    body = (
        "setp.eq.u32 %p1, %tid, 0; @%p1 bra SET; SPIN: ld.volatile.global.u32 %r1, [%ptr0]; "
        "setp.eq.u32 %p2, %r1, 0; @%p2 bra SPIN; bra END; SET: st.volatile.global.u32 [%ptr0], 1; END:"
    )
    fault("limit", body, cell, max_instructions=10_000)


def test_trap_and_unsupported():
    assert fault("trap", "setp.eq.u32 %p1, %tid, 9; @%p1 trap;").thread == (9, 0, 0)
    module = ".extern .func (.param .b32 r) vprintf(.param .b64 a, .param .b64 b);"
    body = (
        "{ .param .b64 x; .param .b64 y; .param .b32 r; st.param.b64 [x], 0; st.param.b64 [y], 0; "
        "call.uni (r), vprintf, (x, y); }"
    )
    fault("unsupported", body, module=module)
    with pytest.raises(ValueError, match="not defined"):
        launch("call.uni elsewhere;", module=".extern .func elsewhere();")


def test_a_fault_leaves_the_machine_usable():
    module = _ptxvm.Module(
        ".version 8.0\n.target sm_80\n.address_size 64\n.entry k(.param .u32 n) { .reg .b32 %r<2>; "
        ".reg .pred %p<2>; ld.param.u32 %r1, [n]; setp.eq.u32 %p1, %r1, 0; @%p1 trap; ret; }"
    )
    for n in (0, 1, 0, 1):
        if n:
            module.launch("k", (1, 1, 1), (32, 1, 1), n.to_bytes(4, "little"))
        else:
            with pytest.raises(_ptxvm.Fault):
                module.launch("k", (1, 1, 1), (32, 1, 1), n.to_bytes(4, "little"))
