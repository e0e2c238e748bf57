"""How many blocks of a kernel a multiprocessor holds at once.

Limits: CUDA C++ Programming Guide, "Compute Capabilities" (threads, shared memory, registers of a multiprocessor);
cuda_occupancy.h of CUDA 13.0 for the most blocks and for how registers and shared memory are handed out.
"""

from dataclasses import dataclass

KIB = 1024
WARP = 32
REGISTERS = 65536  # of a multiprocessor, in four partitions
PARTITIONS = 4
REGISTER_UNIT = 256  # registers of a warp are rounded up to it
SHARED_UNIT, RESERVED_SHARED = 128, KIB  # bytes: rounding, and what the driver takes of every block


@dataclass(frozen=True)
class Multiprocessor:
    threads: int
    blocks: int
    shared: int  # bytes


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(2048, 32, 164 * KIB),
    "sm_86": Multiprocessor(1536, 16, 100 * KIB),
    "sm_89": Multiprocessor(1536, 24, 100 * KIB),
    "sm_90": Multiprocessor(2048, 32, 228 * KIB),
    "sm_100": Multiprocessor(2048, 32, 228 * KIB),
    "sm_120": Multiprocessor(1536, 24, 100 * KIB),
}


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def blocks_per_multiprocessor(arch: str, registers: int, threads: int, shared: int) -> int:
    """registers: of a thread. shared: bytes of a block, static and dynamic. Raises KeyError for an unknown arch."""
    limits = MULTIPROCESSORS[arch]
    warps = -(-threads // WARP)
    warps_of_partition = REGISTERS // PARTITIONS // round_up(registers * WARP, REGISTER_UNIT)
    by_registers = PARTITIONS * warps_of_partition // warps
    by_shared = limits.shared // round_up(shared + RESERVED_SHARED, SHARED_UNIT)
    return min(by_registers, by_shared, limits.threads // WARP // warps, limits.blocks)
