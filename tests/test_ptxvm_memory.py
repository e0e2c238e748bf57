"""The PTX machine's memory: loads and stores, state spaces, atomics, cp.async."""

import numpy as np
import pytest
import torch

from tests.ptx_text import launch

TYPES = {
    "u8": np.uint8,
    "s8": np.int8,
    "b8": np.uint8,
    "u16": np.uint16,
    "s16": np.int16,
    "u32": np.uint32,
    "s32": np.int32,
    "u64": np.uint64,
    "b64": np.uint64,
}


BITS = {"%h1": 16, "%r1": 32, "%d1": 64}


@pytest.mark.parametrize(
    ("name", "register"), [(t, r) for t in TYPES for r in BITS if 8 * np.dtype(TYPES[t]).itemsize <= BITS[r]]
)
def test_loads_extend_to_the_register(name, register):
    dtype, bits = np.dtype(TYPES[name]), BITS[register]
    data = np.random.default_rng(0).integers(0, 2**63, 32, np.uint64).astype(dtype)
    out = np.zeros(32, f"{'int' if dtype.kind == 'i' else 'uint'}{bits}")
    body = (
        f"mad.wide.u32 %d2, %tid, {dtype.itemsize}, %ptr0; ld.global.{name} {register}, [%d2]; "
        f"mad.wide.u32 %d3, %tid, {bits // 8}, %ptr1; st.global.b{bits} [%d3], {register};"
    )
    launch(body, data, out, readonly={0})
    np.testing.assert_array_equal(out, data)


def test_vectors_qualifiers_and_narrow_stores():
    source, out = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    body = """
    mul.wide.u32 %d1, %tid, 16; add.u64 %d2, %ptr0, %d1; add.u64 %d3, %ptr1, %d1;
    ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {%r1, %r2, _, %r4}, [%d2];
    ld.relaxed.gpu.global.v2.u32 {%r5, %r6}, [%d2+8];
    st.global.cs.v2.b32 [%d3+8], {%r1, 7}; st.volatile.global.u32 [%d3], %r4; st.release.sys.global.u8 [%d3+4], %r5;
    """
    launch(body, source, out)
    want = np.stack(
        [source.reshape(-1, 4)[:, 3], source.reshape(-1, 4)[:, 2] & 255, source.reshape(-1, 4)[:, 0], np.full(32, 7)], 1
    )
    np.testing.assert_array_equal(out.reshape(-1, 4), want)


def test_every_space_through_generic_addresses():
    out = np.zeros((4, 32), np.uint32)
    body = """
    mov.u64 %d1, depot; cvta.local.u64 %d1, %d1; mov.u64 %d2, box; cvta.shared.u64 %d2, %d2;
    add.u64 %d2, %d2, %lane4; cvta.global.u64 %d3, %ptr0; add.u64 %d3, %d3, %lane4;
    st.u32 [%d1+4], %tid; add.u32 %r1, %tid, 100; st.u32 [%d2], %r1; mov.u64 %d4, constants;
    ld.const.u32 %r5, [constants+4]; cvta.const.u64 %d4, %d4;
    ld.u32 %r2, [%d1+4]; ld.u32 %r3, [%d2]; ld.u32 %r4, [%d4+8]; add.u32 %r5, %r5, %r4;
    setp.lt.u32 %p1, %tid, 16; selp.b64 %d5, %d1, %d2, %p1; setp.lt.u32 %p1, %tid, 16;
    @!%p1 sub.u64 %d5, %d5, 4; ld.u32 %r6, [%d5+4];
    cvta.to.shared.u64 %d6, %d2; cvt.u32.u64 %r7, %d6; ld.shared.u32 %r7, [%r7]; isspacep.shared %p2, %d2;
    @!%p2 trap; isspacep.global %p2, %d3; @!%p2 trap;
    st.u32 [%d3], %r2; st.u32 [%d3+128], %r3; st.u32 [%d3+256], %r5; st.u32 [%d3+384], %r6;
    sub.u32 %r7, %r7, %r3; setp.ne.u32 %p3, %r7, 0; @%p3 trap;
    """
    launch(
        body,
        out,
        declarations=".local .align 8 .b8 depot[16]; .shared .b32 box[32];",
        module=".const .u32 constants[3] = {1, 20, 300};",
    )
    tid = np.arange(32)
    np.testing.assert_array_equal(out, [tid, tid + 100, np.full(32, 320), np.where(tid < 16, tid, tid + 100)])


def test_dynamic_shared_memory_lies_behind_the_static():
    out = np.zeros(2, np.uint32)
    body = (
        "mov.u32 %r1, dynamic; mov.u32 %r2, fixed; sub.u32 %r3, %r1, %r2; st.shared.u32 [dynamic+12], 5; "
        "ld.shared.u32 %r4, [dynamic+12]; st.global.v2.u32 [%ptr0], {%r3, %r4};"
    )
    launch(
        body,
        out,
        block=1,
        declarations=".shared .align 4 .b8 fixed[20];",
        module=".extern .shared .align 16 .b8 dynamic[];",
        shared_bytes=16,
    )
    assert out.tolist() == [32, 5]


ATOMICS = {
    "add.u32": (np.uint32, lambda old, v: old + v),
    "min.s32": (np.int32, min),
    "max.s32": (np.int32, max),
    "and.b32": (np.uint32, lambda old, v: old & v),
    "or.b32": (np.uint32, lambda old, v: old | v),
    "xor.b32": (np.uint32, lambda old, v: old ^ v),
    "exch.b32": (np.uint32, lambda old, v: v),
    "inc.u32": (np.uint32, lambda old, v: 0 if old >= v else old + 1),
    "dec.u32": (np.uint32, lambda old, v: v if old == 0 or old > v else old - 1),
    "add.u64": (np.uint64, lambda old, v: old + v),
    "min.u64": (np.uint64, min),
    "add.f32": (np.float32, lambda old, v: old + v),
    "add.f64": (np.float64, lambda old, v: old + v),
}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("name", ATOMICS)
def test_atomics(name, space):
    """All lanes on one address: each sees what the lanes before left."""
    dtype, model = ATOMICS[name]
    size = np.dtype(dtype).itemsize
    values = np.random.default_rng(3).integers(0, 9, 32).astype(dtype)
    cell, old = np.array([5], dtype), np.zeros(32, dtype)
    kind, register, current = f"b{8 * size}", "%r1" if size == 4 else "%d4", "%r2" if size == 4 else "%d5"
    place = "%ptr0" if space == "global" else "cell"
    body = f"""
    mad.wide.u32 %d1, %tid, {size}, %ptr1; mad.wide.u32 %d2, %tid, {size}, %ptr2;
    ld.global.{kind} {register}, [%d1]; setp.eq.u32 %p1, %tid, 0;
    @%p1 ld.global.{kind} {current}, [%ptr0]; @%p1 st.shared.{kind} [cell], {current}; bar.sync 0;
    atom.{space}.{name} {current}, [{place}], {register}; st.global.{kind} [%d2], {current}; bar.sync 0;
    @%p1 ld.{space}.{kind} {current}, [{place}]; @%p1 st.global.{kind} [%ptr0], {current};
    """
    launch(body, cell, values, old, module=".shared .align 8 .b8 cell[8];", global_races=True)
    expected, state = [], 5
    for value in values.tolist():
        expected.append(state)
        state = model(state, value)
    np.testing.assert_array_equal(old, np.array(expected, dtype))
    assert cell[0] == state


def test_compare_and_swap_red_and_pairs():
    cells = np.zeros(4, np.uint32)
    body = """
    atom.global.cas.b32 %r1, [%ptr0], %tid, 77; add.u64 %d1, %ptr0, 4; red.global.add.u32 [%d1], 2;
    mov.b32 %r2, 0x3F803F80; atom.global.add.noftz.bf16x2 %r3, [%d1+4], %r2;
    mov.b32 %r2, 0x3C003C00; red.global.add.noftz.f16x2 [%d1+8], %r2;
    """
    launch(body, cells, global_races=True)
    assert cells[:2].tolist() == [77, 64]
    assert torch.from_numpy(cells[2:3].view(np.int16)).view(torch.bfloat16).tolist() == [32, 32]
    assert cells[3:].view(np.float16).tolist() == [32, 32]


def test_async_copies_land_at_their_wait():
    """Two groups in flight; sizes, zero fill, an ignored source; the source may change after the copy."""
    source, out = np.arange(1, 65, dtype=np.uint32), np.zeros((2, 32, 4), np.uint32)
    body = """
    mov.u32 %r1, box; shl.b32 %r2, %tid, 4; add.u32 %r1, %r1, %r2; mul.wide.u32 %d9, %tid, 16; add.u64 %d2, %ptr1, %d9;
    and.b32 %r3, %tid, 3; setp.eq.u32 %p1, %r3, 3; shl.b32 %r4, %r3, 2;
    and.b32 %r9, %tid, 15; mad.wide.u32 %d1, %r9, 16, %ptr0;
    cp.async.cg.shared.global.L2::128B [%r1], [%d1], 16, %r4; cp.async.commit_group;
    cp.async.ca.shared.global [%r1+512], [%d1], 8; cp.async.ca.shared.global [%r1+520], [%d1+8], 4, %p1;
    cp.async.ca.shared.global [%r1+524], [%d1+12], 4; cp.async.commit_group;
    cp.async.wait_group 1; ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r1]; st.global.v4.u32 [%d2], {%r5, %r6, %r7, %r8};
    cp.async.wait_all; ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r1+512];
    st.global.v4.u32 [%d2+512], {%r5, %r6, %r7, %r8};
    """
    counters = launch(body, source, out, module=".shared .align 16 .b8 box[1024];", readonly={0})
    first, second = np.tile(source.reshape(16, 4), (2, 1)), np.tile(source.reshape(16, 4), (2, 1))
    first[np.arange(32)[:, None] % 4 <= np.arange(4)] = 0
    second[3::4, 2] = 0
    np.testing.assert_array_equal(out, [first, second])
    assert counters["async_bytes"] > 0


def test_async_copies_of_nothing_do_not_touch_the_source():
    out = np.full(4, 9, np.uint32)
    body = (
        "mov.u64 %d1, 0; cp.async.cg.shared.global [box], [%d1], 16, 0; cp.async.wait_all; "
        "ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [box]; st.global.v4.u32 [%ptr0], {%r5, %r6, %r7, %r8};"
    )
    launch(body, out, block=1, module=".shared .align 16 .b8 box[16];")
    assert out.tolist() == [0] * 4
