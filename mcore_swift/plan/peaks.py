"""Peak arithmetic throughput of devices, the denominator of MFU."""

# Dense (no 2:4 sparsity) TFLOP/s of the tensor cores in bf16 with fp32 accumulation, as each vendor's data
# sheet or architecture paper states: NVIDIA H100, H200, H20, A100, A40, A10, L4, L40, L40S data sheets
# (sparse figures halved), Blackwell architecture brief (B200, GB200, B300), Ampere GA102 and Ada whitepapers
# and the RTX Blackwell whitepaper for GeForce and RTX cards; AMD CDNA 2 and CDNA 3 papers.
# The first entry that occurs in the driver's name for the device is taken, so specific names come before general ones.
BF16_TFLOPS: tuple[tuple[str, float], ...] = (
    ("GB300", 2500.0),
    ("GB200", 2500.0),
    ("B300", 2250.0),
    ("B200", 2250.0),
    ("B100", 1750.0),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("GH200", 989.4),
    ("H100 PCIe", 756.5),
    ("H100 NVL", 835.5),
    ("H100", 989.4),
    ("H800 PCIe", 756.5),
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A30", 165.0),
    ("A40", 149.7),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.1),
    ("L40", 181.1),
    ("L20", 119.5),
    ("L4", 121.0),
    ("RTX 6000 Ada", 364.2),
    ("RTX A6000", 154.8),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.2),
    ("MI325X", 1307.4),
    ("MI300X", 1307.4),
    ("MI250X", 191.5),  # one of the two dies, which is one device to torch
)


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak in TFLOP/s of a device, by the driver's name for it; None if it is not known.

    CPUs have no entry, since their peak depends on clock and instruction set: for MFU, the user must give it.
    """
    name = " ".join(device_name.replace("-", " ").split()).lower()
    padded = f" {name} "
    for known, tflops in BF16_TFLOPS:
        if f" {known.lower()} " in padded:
            return tflops
    return None
