"""What a GPU has: memory, arithmetic, bandwidth; and what lies between GPUs."""

import difflib
from typing import NamedTuple

from mm.errors import UserError

MIB = 1024**2


class Gpu(NamedTuple):
    """A GPU's figures, from its data sheet; the memory as nvidia-smi tells it."""

    memory: float
    """Bytes."""
    tflops: float
    """Dense bfloat16 tensor operations, 10^12 a second (V100: float16)."""
    fp32_tflops: float
    """The same in fp32 without tensor cores, as PyTorch computes matrix products by default."""
    bandwidth: float
    """Of its memory, bytes a second."""
    link: float
    """To another GPU of its node in one direction, bytes a second: NVLink, else PCIe."""


GPUS = {
    "a100-40": Gpu(40_536 * MIB, 312, 19.5, 1.555e12, 300e9),  # NVIDIA A100 data sheet, SXM
    "a100-80": Gpu(81_251 * MIB, 312, 19.5, 2.039e12, 300e9),
    "h100": Gpu(81_559 * MIB, 989, 67, 3.35e12, 450e9),  # NVIDIA H100 data sheet, SXM
    "h200": Gpu(143_771 * MIB, 989, 67, 4.8e12, 450e9),  # NVIDIA H200 data sheet, SXM
    "b200": Gpu(183_359 * MIB, 2_250, 75, 8e12, 900e9),  # NVIDIA DGX B200 data sheet, a GPU of it
    "v100": Gpu(32_510 * MIB, 125, 15.7, 0.9e12, 150e9),  # NVIDIA V100 data sheet, SXM2 32 GB
    "l40s": Gpu(46_068 * MIB, 362, 91.6, 0.864e12, 32e9),  # NVIDIA L40S data sheet
    "a10g": Gpu(23_028 * MIB, 70, 31.5, 0.6e12, 32e9),  # NVIDIA A10G data sheet (AWS G5)
    "4090": Gpu(24_564 * MIB, 165.2, 82.6, 1.008e12, 32e9),  # NVIDIA Ada whitepaper, FP32 accumulation
}
"""By the name that `gpu=` takes."""
ALIASES = {"a100": "a100-80", "h100-80": "h100", "v100-32": "v100", "rtx4090": "4090"}


def gpu_of(
    name: str, memory_gb: float | None = None, tflops: float | None = None, bandwidth: float | None = None
) -> Gpu:
    """The GPU of that name with what is given in place of its own figures; of any name where all three are given.

    memory_gb in 10^9 bytes, tflops in 10^12 a second, bandwidth in 10^9 bytes a second.
    Raises UserError for a name that is not known.
    """
    key = name.lower().replace("_", "-").replace(" ", "-")
    known = GPUS.get(ALIASES.get(key, key))
    if known is None:
        if memory_gb is None or tflops is None or bandwidth is None:
            close = difflib.get_close_matches(key, [*GPUS, *ALIASES], n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(
                f"gpu={name} is not known; {hint}known: {', '.join(GPUS)}; describe another one by all of gpu_memory= "
                "(GB), gpu_tflops= (dense bf16) and gpu_bandwidth= (GB/s)"
            )
        known = Gpu(0, 0, tflops / 8, 0, 32e9)
    return known._replace(
        memory=known.memory if memory_gb is None else memory_gb * 1e9,
        tflops=known.tflops if tflops is None else tflops,
        bandwidth=known.bandwidth if bandwidth is None else bandwidth * 1e9,
    )
