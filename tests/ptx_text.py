"""Small PTX kernels for the tests of the PTX machine: a body of instructions, run over numpy arrays."""

import struct

import numpy as np
import pytest

_ptxvm = pytest.importorskip("gptdist._ptxvm", reason="gptdist._ptxvm is not built (no C++ compiler?)")

HEADER = ".version 8.0\n.target sm_90\n.address_size 64\n"
REGISTERS = """
.reg .pred %p<16>; .reg .b16 %h<16>; .reg .b32 %r<32>; .reg .b64 %d<16>; .reg .f32 %f<32>; .reg .f64 %g<8>;
.reg .b64 %ptr<16>; .reg .b32 %tid; .reg .b64 %lane8, %lane4;
"""


def text(body: str, pointers: int, declarations: str = "", module: str = "") -> str:
    """A module with one kernel `k` of `pointers` u64 parameters, already in %ptr0, %ptr1, ...

    %tid is the thread's number, %lane4 and %lane8 that times 4 and 8. Registers: %p %h %r %d %f %g.
    """
    parameters = ", ".join(f".param .u64 p{i}" for i in range(pointers))
    loads = "".join(f"ld.param.u64 %ptr{i}, [p{i}];\n" for i in range(pointers))
    prologue = "mov.u32 %tid, %tid.x;\nmul.wide.u32 %lane4, %tid, 4;\nmul.wide.u32 %lane8, %tid, 8;\n"
    inside = f"{REGISTERS}{declarations}\n{loads}{prologue}{body}\nret;\n"
    return f"{HEADER}{module}\n.visible .entry k({parameters})\n{{\n{inside}}}\n"


def buffer(array, label: str, writable: bool = True) -> tuple:
    return array.ctypes.data, array.nbytes, writable, label


def launch(body, *arrays, block=32, grid=1, declarations="", module="", readonly=(), **options) -> dict:
    """Run `body` with the arrays as %ptr0, ...; returns the counters."""
    machine = _ptxvm.Module(text(body, len(arrays), declarations, module))
    return machine.launch(
        "k",
        (grid, 1, 1),
        (block, 1, 1),
        struct.pack(f"{len(arrays)}Q", *(a.ctypes.data for a in arrays)),
        buffers=[buffer(a, f"b{i}", i not in readonly) for i, a in enumerate(arrays)],
        **options,
    )


def fault(kind: str, body, *arrays, **options):
    """The Fault of the given kind that `body` runs into."""
    with pytest.raises(_ptxvm.Fault) as caught:
        launch(body, *arrays, **options)
    assert caught.value.kind == kind, str(caught.value)
    return caught.value


def evaluate(cases: list[tuple[str, type]], **inputs: np.ndarray) -> list[np.ndarray]:
    """What instructions compute, lane by lane: one kernel of one warp.

    A case is ("add.s32 $, %a, %b", dtype of $); `inputs` are 32 values each, in registers %a, ... A bool result is a
    predicate. `$` may stand in several instructions of one case; a scratch predicate is %p0.
    """
    declarations, body = "", ""
    pointers = list(inputs.values())
    for i, (name, values) in enumerate(inputs.items()):
        size = values.dtype.itemsize
        assert values.shape == (32,)
        declarations += f".reg .b{8 * size} %{name};\n"
        body += f"mad.wide.u32 %d0, %tid, {size}, %ptr{i};\nld.global.b{8 * size} %{name}, [%d0];\n"
    results = []
    for case, (instruction, dtype) in enumerate(cases):
        dtype = np.dtype(dtype)
        size = max(dtype.itemsize, 2)
        result = np.zeros(32, np.uint16 if dtype.kind == "b" else dtype)
        results.append(result)
        kind = "pred" if dtype.kind == "b" else f"b{8 * size}"
        declarations += f".reg .{kind} %o{case};\n"
        body += instruction.replace("$", f"%o{case}") + ";\n"
        value = f"%o{case}"
        if dtype.kind == "b":
            body += f"selp.b16 %h1, 1, 0, %o{case};\n"
            value = "%h1"
        body += f"mad.wide.u32 %d0, %tid, {result.itemsize}, %ptr{len(inputs)};\n"
        body += f"st.global.b{8 * result.itemsize} [%d0+{32 * 8 * case}], {value};\n"
    room = np.zeros(32 * 8 * len(cases), np.uint8)
    launch(body, *pointers, room, declarations=declarations)
    for case, result in enumerate(results):
        result[:] = room[32 * 8 * case :][: result.nbytes].view(result.dtype)
    return [r.astype(bool) if np.dtype(d).kind == "b" else r for r, (_, d) in zip(results, cases, strict=True)]
