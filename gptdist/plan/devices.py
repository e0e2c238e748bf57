"""What can be booked: memory, peak rates and links of a device, from the vendors' data sheets.

    a100     NVIDIA A100 data sheet (2021); DGX A100: NVLink 600 GB/s both ways, 8 x 200 Gbit/s InfiniBand a node
    h100     NVIDIA H100 data sheet, SXM; DGX H100: NVLink 900 GB/s, 8 x 400 Gbit/s
    h200     NVIDIA H200 data sheet, SXM; DGX H200: as H100
    b200     NVIDIA DGX B200 data sheet and user guide: 1,440 GB, 72 PFLOP/s of sparse fp8, 64 TB/s and 14.4 TB/s NVLink
             for 8; 8 x 400 Gbit/s. Sources differ on fp32 outside the tensor cores, so it is left out
    l40s     NVIDIA L40S data sheet; no NVLink: PCIe 4.0 x 16, 64 GB/s both ways

Assumed, from no data sheet: an L40S has half a 200 Gbit/s card, host_link, and the links of a CPU.
Memory is the data sheet's, in 10^9 bytes. Drivers show some 5% more; it is left to CUDA's context and NCCL.
"""

from dataclasses import dataclass, replace

from gptdist.errors import UserError
from gptdist.metrics import PEAK_BF16_FLOPS


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device, and the links that it has for itself. Rates per second; None where they are not known."""

    name: str
    kind: str  # cuda or cpu
    memory: float  # bytes
    peak_bf16: float | None  # dense FLOP/s
    peak_fp32: float | None  # FLOP/s outside the tensor cores: torch's default for fp32
    bandwidth: float | None  # bytes/s of its memory
    intra: float  # bytes/s in each direction to the devices of its node
    inter: float  # bytes/s in each direction to other nodes
    host_link: float = 25e9  # bytes/s in each direction to host memory

    def peak(self, precision: str) -> float | None:
        return self.peak_bf16 if precision == "bf16" else self.peak_fp32


def _gpu(name: str, sheet: str, memory: float, fp32: float | None, bandwidth: float, intra: float,
         inter: float) -> Device:
    return Device(name=name, kind="cuda", memory=memory * 1e9, peak_bf16=PEAK_BF16_FLOPS[sheet],
                  peak_fp32=fp32 and fp32 * 1e12, bandwidth=bandwidth * 1e9, intra=intra * 1e9, inter=inter * 1e9)


DEVICES = {device.name: device for device in (
    _gpu("a100-40gb", "A100", memory=40, fp32=19.5, bandwidth=1555, intra=300, inter=25),
    _gpu("a100-80gb", "A100", memory=80, fp32=19.5, bandwidth=2039, intra=300, inter=25),
    _gpu("h100-80gb", "H100", memory=80, fp32=67, bandwidth=3350, intra=450, inter=50),
    _gpu("h200-141gb", "H200", memory=141, fp32=67, bandwidth=4800, intra=450, inter=50),
    _gpu("b200-180gb", "B200", memory=180, fp32=None, bandwidth=8000, intra=900, inter=50),
    _gpu("l40s-48gb", "L40S", memory=48, fp32=91.6, bandwidth=864, intra=32, inter=12.5),
    # A process on a CPU: what it may use and what it computes in a second is for the user to say.
    Device(name="cpu", kind="cpu", memory=0, peak_bf16=None, peak_fp32=None, bandwidth=None, intra=5e9, inter=1.25e9),
)}


def find_device(name: str, *, memory_gb: float | None = None, peak_tflops: float | None = None,
                intra_gbs: float | None = None, inter_gbs: float | None = None) -> Device:
    """A device of the table with what the user knows better. Rates in GB/s and TFLOP/s, memory in GB.

    Raises UserError for an unknown name, a rate that is not positive, or a CPU without --memory.
    """
    if name not in DEVICES:
        raise UserError(f"--device {name} is not known: use one of {', '.join(DEVICES)}; --memory, --peak-tflops, "
                        f"--intra-gbs and --inter-gbs change what the table says of it")
    device = DEVICES[name]
    for option, value in (("memory", memory_gb), ("peak-tflops", peak_tflops), ("intra-gbs", intra_gbs),
                          ("inter-gbs", inter_gbs)):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{option} is {value:g}, expected more than 0")
    if name == "cpu" and memory_gb is None:
        raise UserError("--device cpu needs --memory GB: what each process may use")
    given = {"memory": memory_gb and memory_gb * 1e9, "intra": intra_gbs and intra_gbs * 1e9,
             "inter": inter_gbs and inter_gbs * 1e9, "peak_bf16": peak_tflops and peak_tflops * 1e12,
             "peak_fp32": peak_tflops and peak_tflops * 1e12}
    return replace(device, **{field: value for field, value in given.items() if value is not None})
