"""The kinds of GPU that the planner knows: memory, bandwidths and links."""

from dataclasses import dataclass
from functools import cached_property

from ..errors import UserError
from .peaks import peak_tflops


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, in the server it is usually sold in.

    name: as the driver writes it, for `peak_tflops`. memory_gib: as the driver reports it. hbm_tbs: memory
    bandwidth, TB/s. node_gbs: to GPUs of the same node, GB/s in one direction (NVLink; PCIe where there is none).
    network_gbs: to other nodes, GB/s per GPU in one direction. gpus_per_node: GPUs that reach each other at node_gbs.
    """

    name: str
    memory_gib: float
    hbm_tbs: float
    node_gbs: float
    network_gbs: float
    gpus_per_node: int = 8

    @cached_property
    def peak_flops(self) -> float:
        """Dense bf16 FLOP/s."""
        return 1e12 * (peak_tflops(self.name) or 0)


# NVIDIA data sheets (H100, H200, H20, A100, L40S, A40, A10, L4, RTX), DGX and HGX reference designs (one 400 Gb/s
# adapter for each H100 and B200, 200 Gb/s for each A100, 800 Gb/s for each GB300), Blackwell architecture brief,
# AMD CDNA 3 white paper (seven xGMI links of 64 GB/s). Memory is a little below the data sheets: what nvidia-smi and
# rocm-smi report after ECC and page retirement. PCIe x16 in practice: 25 GB/s for 4.0, 50 GB/s for 5.0.
GPUS: dict[str, Gpu] = {
    "h100": Gpu("H100", 79.1, 3.35, 450, 50),
    "h100-pcie": Gpu("H100 PCIe", 79.1, 2.0, 50, 25),
    "h800": Gpu("H800", 79.1, 3.35, 200, 50),
    "h200": Gpu("H200", 139.8, 4.8, 450, 50),
    "h20": Gpu("H20", 95.0, 4.0, 450, 50),
    "gh200": Gpu("GH200", 94.5, 4.0, 450, 50, 1),
    "a100": Gpu("A100", 79.1, 2.04, 300, 25),
    "a100-40g": Gpu("A100", 39.4, 1.56, 300, 25),
    "a800": Gpu("A800", 79.1, 2.04, 200, 25),
    "b200": Gpu("B200", 178.4, 8.0, 900, 50),
    "gb200": Gpu("GB200", 184.0, 8.0, 900, 50, 72),
    "b300": Gpu("B300", 268.0, 8.0, 900, 100),
    "gb300": Gpu("GB300", 276.0, 8.0, 900, 100, 72),
    "l40s": Gpu("L40S", 44.5, 0.86, 25, 12.5),
    "l20": Gpu("L20", 44.5, 0.86, 25, 12.5),
    "l4": Gpu("L4", 22.0, 0.3, 25, 12.5),
    "a40": Gpu("A40", 44.4, 0.7, 25, 12.5),
    "a10": Gpu("A10", 22.0, 0.6, 25, 12.5),
    "rtx6000ada": Gpu("RTX 6000 Ada", 47.5, 0.96, 25, 12.5),
    "rtx5090": Gpu("RTX 5090", 31.4, 1.79, 50, 12.5),
    "rtx4090": Gpu("RTX 4090", 23.6, 1.01, 25, 12.5),
    "rtx3090": Gpu("RTX 3090", 23.6, 0.94, 25, 12.5),
    "mi300x": Gpu("MI300X", 191.5, 5.3, 448, 50),
    "mi325x": Gpu("MI325X", 255.5, 6.0, 448, 50),
}
"""By the name that `--gpu` takes."""


def gpu_of(name: str) -> Gpu:
    """The GPU kind of that name. Raises UserError for an unknown one."""
    key = name.lower().replace("_", "-").replace(" ", "-").removeprefix("nvidia-")
    if key in GPUS:
        return GPUS[key]
    raise UserError(f"--gpu {name}: no such kind is known", f"choose from: {', '.join(GPUS)}")
