"""The static report: loops in SASS, what ptxas says, occupancy, and gates on the attention kernels' machine code.

The gates are on figures of ptxas 13.0; another version gives other ones, which say nothing of the sources.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import ptx, sass, static, traffic
from benchmarks.occupancy import MULTIPROCESSORS, blocks_per_multiprocessor
from gptdist.ops import backends
from tests import cuda_vm

PTXAS = "13.0"
ARCHS = ("sm_80", "sm_90")

# Most instructions per HMMA of the plain causal kernels, bf16: (forward, dkv, dq) at D = 64, at D = 128.
MOST_PER_HMMA = {
    "sm_80": {64: (4.3, 2.9, 3.15), 128: (3.45, 2.65, 2.7)},
    "sm_90": {64: (4.25, 2.9, 3.2), 128: (3.9, 2.65, 2.7)},
}
# Most bytes spilled, of what FlashAttention-2 spills: half of it on sm_80.
SPILL_SHARE = {"sm_80": 0.5, "sm_90": 1.0}


def violations(arch: str, used: dict[str, ptx.Used], machine_code: str) -> list[str]:
    """What is worse than the gates allow, for the kernels that static.PLAIN_ATTENTION finds."""
    found = []
    for name, function in sass.functions(machine_code).items():
        match = static.PLAIN_ATTENTION.search(name)
        direction, D = match[1], int(match[2])
        most = MOST_PER_HMMA[arch][D][("forward", "dkv", "dq").index(direction)]
        loop = sass.steady_loop(function)
        if loop is None or loop.per_hmma > most:
            found.append(f"{arch} {ptx.readable(name)}: {loop and loop.per_hmma} instructions per HMMA, at most {most}")
        theirs = static.FLASH_ATTENTION_2["forward" if direction == "forward" else "backward", D][1][arch]
        if used[name].spills > theirs * SPILL_SHARE[arch]:
            found.append(f"{arch} {ptx.readable(name)}: {used[name].spills} bytes spilled, FlashAttention-2 {theirs}")
    return found


@pytest.fixture(scope="module")
def texts() -> list[str]:
    problem = backends.cuda_library_problem() or ptx.tools_problem()
    if not problem and cuda_vm.cuobjdump() is None:
        problem = "no cuobjdump (pip install nvidia-cuda-cuobjdump)"
    if not problem and ptx.ptxas_version() != PTXAS:
        problem = f"the figures are of ptxas {PTXAS}, here is {ptx.ptxas_version()}"
    if problem:
        pytest.skip(problem)
    return cuda_vm.extracted_ptx(backends.CUDA_LIBRARY)


@pytest.fixture(scope="module")
def plain_attention(texts):
    """(arch, ptxas's report, SASS) of the plain bf16 kernels."""
    wanted = [text for text in texts if any(static.PLAIN_ATTENTION.search(name) for name in ptx.kernels(text))]
    assembled = []
    for arch in ARCHS:
        for text in wanted:
            assembled.append((arch, *ptx.assemble(ptx.only(text, static.PLAIN_ATTENTION), arch)))
    return assembled


# gates


def test_attention_keeps_its_figures(plain_attention):
    names = [name for _, used, _ in plain_attention for name in used]
    assert len(names) == len(ARCHS) * 6  # forward, dkv and dq at two head dimensions
    assert [line for parts in plain_attention for line in violations(*parts)] == []


def test_the_gates_notice_more_instructions(plain_attention):
    """A move beside each HMMA: every gate speaks."""
    for arch, used, machine_code in plain_attention:
        doctored = re.sub(r"^(.*HMMA.*;)$", r"\1\n        /*0000*/ IMAD.MOV.U32 R1, RZ, RZ, R2 ;", machine_code,
                          flags=re.MULTILINE)
        found = violations(arch, used, doctored)
        assert len(found) == len(used)
        assert all("instructions per HMMA" in line for line in found)


def test_the_gates_notice_spills(plain_attention):
    for arch, used, machine_code in plain_attention:
        doctored = {name: ptx.Used(255, 300, 300, 0) for name in used}
        assert len(violations(arch, doctored, machine_code)) == len(used)


@pytest.mark.parametrize("arch", [ARCHS[0], pytest.param(ARCHS[1], marks=pytest.mark.long)])
def test_no_other_kernel_spills(texts, arch):
    spilled, count = [], 0
    for text in texts:
        if not any("attention_" in name for name in ptx.kernels(text)):
            used, _ = ptx.assemble(text, arch)
            count += len(used)
            spilled += [ptx.readable(name) for name, kernel in used.items() if kernel.spills]
    assert count > 100
    assert spilled == []


# SASS

SASS = """
	.section	.text._Z5outerv,"ax",@progbits
.text._Z5outerv:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   MOV R2, R3 ;
.L_x_1:
        /*0020*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0030*/              @!P3 HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0040*/                   MUFU.EX2 R9, R9 ;
        /*0050*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0060*/               @P0 BRA P1, `(.L_x_1) ;
.L_x_2:
        /*0070*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0080*/                   STL [R1], R8 ;
        /*0090*/             @!UP0 BRA.U `(.L_x_2) ;
        /*00a0*/               @P0 BRA `(.L_x_0) ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   BRA `(.L_x_3);
.L_x_4:

	.section	.text._Z4flatv,"ax",@progbits
.text._Z4flatv:
        /*0000*/               @P0 BRA `(.L_x_5) ;
        /*0010*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
.L_x_5:
        /*0020*/                   EXIT ;
.L_x_6:
        /*0030*/                   BRA `(.L_x_6);
"""


def test_innermost_loops_with_hmma():
    functions = sass.functions(SASS)
    assert list(functions) == ["_Z5outerv", "_Z4flatv"]
    first, second = sass.hmma_loops(functions["_Z5outerv"])
    assert [name.partition(".")[0] for name in first.opcodes] == ["LDSM", "HMMA", "MUFU", "HMMA", "BRA"]
    assert [name.partition(".")[0] for name in second.opcodes] == ["HMMA", "STL", "BRA"]
    assert (first.per_hmma, second.per_hmma) == (2.5, 3.0)
    assert (first.count("MUFU"), first.count("STL"), second.count("STL")) == (1, 0, 1)
    assert sass.steady_loop(functions["_Z5outerv"]) == first


def test_a_forward_branch_is_no_loop_and_a_loop_without_hmma_no_steady_one():
    assert sass.steady_loop(sass.functions(SASS)["_Z4flatv"]) is None


# PTX and ptxas

PTX = """.version 8.0
.visible .entry _ZN7gptdist4cuda14dropout_kernelI6__halfLi1EEEvNS0_7DropoutE(
)
.maxntid 32, 4, 2
{
{
.reg .pred %p1;
}
ret;

}
.shared .b8 between[4];
.entry second()
.maxntid 64, 1, 1
{
ret;
}
"""

SAID = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_80'
ptxas info    : Function properties for one
    24 bytes stack frame, 36 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size, 8192 bytes smem, 424 bytes cmem[0]
ptxas info    : Compile time = 231.865 ms
ptxas info    : Compiling entry function 'two' for 'sm_80'
ptxas info    : Function properties for two
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers, used 0 barriers, 424 bytes cmem[0]
"""


def test_kernels_of_a_ptx_text():
    first, second = ptx.kernels(PTX).values()
    assert first.endswith("ret;\n\n}")  # not at the brace inside
    assert (ptx.most_threads(first), ptx.most_threads(second)) == (256, 64)
    rest = ptx.only(PTX, re.compile("second"))
    assert list(ptx.kernels(rest)) == ["second"]
    assert "between" in rest


def test_what_ptxas_says():
    assert ptx.used(SAID) == {"one": ptx.Used(255, 36, 40, 8192), "two": ptx.Used(20, 0, 0, 0)}


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("_ZN7gptdist4cuda14dropout_kernelI6__halfLi1EEEvNS0_7DropoutE", "dropout<fp16, 1>"),
        ("_ZN7gptdist4cuda20fold_partials_kernelENS0_12FoldPartialsE", "fold_partials"),
        (
            "_ZN7gptdist4cuda25layer_norm_forward_kernelI13__nv_bfloat16fS2_Lb1ELi3EEEvNS0_16LayerNormForwardE",
            "layer_norm_forward<bf16, fp32, bf16, 1, 3>",
        ),
        ("main", "main"),
    ],
)
def test_readable_names(mangled, name):
    assert ptx.readable(mangled) == name


# occupancy

OCCUPANCY = r"""
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <cuda_occupancy.h>
int main(int, char** words) {  // major, minor, threads and shared memory of a multiprocessor
  cudaOccDeviceProp device;
  device.computeMajor = atoi(words[1]), device.computeMinor = atoi(words[2]), device.maxThreadsPerBlock = 1024;
  device.maxThreadsPerMultiprocessor = atoi(words[3]), device.regsPerBlock = device.regsPerMultiprocessor = 65536;
  device.warpSize = 32, device.sharedMemPerMultiprocessor = atoi(words[4]), device.numSms = 100;
  device.reservedSharedMemPerBlock = 1024, device.sharedMemPerBlock = 48 * 1024;
  device.sharedMemPerBlockOptin = device.sharedMemPerMultiprocessor - 1024;
  for (int registers : {16, 32, 40, 64, 100, 128, 168, 255})
    for (int threads : {32, 96, 128, 256, 480, 512, 1024})
      for (int shared : {0, 1, 2048, 8192, 49152, 65536, 66560, 99328}) {
        cudaOccFuncAttributes f;
        f.maxThreadsPerBlock = 1024, f.numRegs = registers, f.sharedSizeBytes = 0;
        f.partitionedGCConfig = PARTITIONED_GC_OFF;
        f.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, f.maxDynamicSharedSizeBytes = device.sharedMemPerBlockOptin;
        f.numBlockBarriers = 1;
        cudaOccDeviceState state;
        state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
        cudaOccResult result;
        if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &f, &state, threads, shared) != CUDA_OCC_SUCCESS)
          return 1;
        printf("%d %d %d %d\n", registers, threads, shared, result.activeBlocksPerMultiprocessor);
      }
}
"""


def occupancy_header() -> Path | None:
    nvcc = shutil.which("nvcc")
    candidates = [Path("/usr/local/cuda/include"), *([Path(nvcc).resolve().parent.parent / "include"] if nvcc else [])]
    candidates += sorted(Path("/usr/local").glob("cuda-*/include"))
    return next((folder for folder in candidates if (folder / "cuda_occupancy.h").exists()), None)


@pytest.fixture(scope="module")
def nvidia_says(tmp_path_factory):
    """A program around NVIDIA's own header."""
    include = occupancy_header()
    if include is None or shutil.which("c++") is None:
        pytest.skip("no cuda_occupancy.h (it comes with nvcc), or no C++ compiler")
    folder = tmp_path_factory.mktemp("occupancy")
    (folder / "o.cpp").write_text(OCCUPANCY)
    subprocess.run(["c++", "-I", str(include), str(folder / "o.cpp"), "-o", str(folder / "o")], check=True)
    return folder / "o"


@pytest.mark.parametrize("arch", MULTIPROCESSORS)
def test_occupancy_is_nvidia_s(nvidia_says, arch):
    limits, number = MULTIPROCESSORS[arch], arch.removeprefix("sm_")
    command = [nvidia_says, number[:-1], number[-1], str(limits.threads), str(limits.shared)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [tuple(map(int, line.split())) for line in said.splitlines()]
    assert len(rows) == 448
    for registers, threads, shared, blocks in rows:
        assert blocks_per_multiprocessor(arch, registers, threads, shared) == blocks, (registers, threads, shared)


def test_an_unknown_gpu_is_an_error():
    with pytest.raises(KeyError):
        blocks_per_multiprocessor("sm_75", 32, 128, 0)


# traffic and the report


def test_counted_traffic(device):
    """At a small shape: everything is read, and written once; attention's accesses waste nothing."""
    kernels = torch.ops.gptdist_vm
    with device.run(races=False):
        todo = [*traffic.norm_cases(kernels, 16, 768), *traffic.attention_cases(kernels, 128, 1, 64)]
        todo += [*traffic.gelu_cases(kernels, 16, 64), *traffic.entropy_cases(kernels, 2, 1000)]
        todo += traffic.dropout_cases(kernels, 2, 8, 64)
    found = []
    for case in todo:
        with device.run(races=False) as log:
            case.call()
        for (kernel, read, written), launch in zip(case.least, log.launches, strict=True):
            assert f"{kernel}_kernel" in launch.name
            found.append(traffic.of_launch(kernel, case.shape, read, written, launch.counters))
    for t in found:
        assert t.read >= t.least_read, t
        assert t.written == t.least_written, t
        if t.kernel.startswith("attention"):
            assert (t.sectors, t.wavefronts) == (t.least_sectors, t.least_wavefronts), t


def test_report():
    loop = sass.Loop(("LDSM.16", "HMMA.16816", "MUFU.EX2", "HMMA.16816", "BRA"))
    kernel = static.Kernel("attention_forward<bf16, 64, 0>", "sm_80", ptx.Used(255, 24, 24, 0), 128, 49152, 2, loop)
    other = static.Kernel("dropout<fp16, 1>", "sm_80", ptx.Used(40, 0, 0, 0), 256, None, 6, None)
    moved = traffic.Traffic("dropout", "[1]", 20, 10, 10, 10, 3, 2, 0, 0)
    text = static.markdown(["date"], ["sm_80"], [kernel, other], [moved])
    assert "| sm_80 | forward | 64 | none | 255 | 48 | 2 | 2.50 | 2 | 1 | 1 | 0 | 0 | 0 | 4.41 | 576 |" in text
    assert "| dropout | [1] | 20 | 10 | 10 | 10 | 1.500 | - |" in text
    assert "| dropout<fp16, 1> | 256 | 0 | ? | 40 | 0 | 6 |" in text
    assert "## All 2 kernels" in text
