"""What the makers publish about each accelerator: peak rate, memory, interconnect. The rooflines of `cv2jax plan`."""

import dataclasses

_GIB, _GB, _TERA = 2**30, 1e9, 1e12
_GBIT = 1e9 / 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator; rates are bytes or operations a second.

    Attributes:
      name: as in presets and topologies. kinds: jax's `device_kind`s of it.
      peak_flops: dense bf16. hbm_bytes, hbm_bandwidth: of its memory.
      link_bandwidth: of one link to a neighbour (GPU: to the switch), one way.
      torus_axes: of the interconnect, each with a link either way; 0: a switch, or PCIe.
      wraps_at: a torus axis of so many chips, or a multiple of it, is a ring; else a line.
      dcn_bandwidth: of one host, one way. chips_per_host: that share it.
    """

    name: str
    kinds: tuple[str, ...]
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    torus_axes: int
    wraps_at: int = 0
    dcn_bandwidth: float
    chips_per_host: int

    @property
    def dcn_bandwidth_per_chip(self) -> float:
        """A chip's share of its host's network."""
        return self.dcn_bandwidth / self.chips_per_host


# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, read 2026-11. The interconnect is published a chip and in both
# directions: over its ports (4 in two dimensions, 6 in three) and one way it is what a link carries.
CHIPS = (
    Chip(  # 275 TFLOPs; 32 GiB at 1200 GB/s; 3D; 2400 Gbps a chip one way over 6 links (the older notation, as v5p's 4800)
        name="v4",
        kinds=("TPU v4",),
        peak_flops=275 * _TERA,
        hbm_bytes=32 * _GIB,
        hbm_bandwidth=1200 * _GB,
        link_bandwidth=2400 * _GBIT / 6,
        torus_axes=3,
        wraps_at=4,
        dcn_bandwidth=200 * _GBIT,  # none is published for v4: that of v5p, whose hosts have 4 chips too
        chips_per_host=4,
    ),
    Chip(  # 197 TFLOPs; 16 GB at 819 GB/s; 2D, 400 GB/s both ways over 4 ports; 2 × 100 Gbps a host of 8 chips
        name="v5e",
        kinds=("TPU v5 lite", "TPU v5e"),
        peak_flops=197 * _TERA,
        hbm_bytes=16 * _GIB,
        hbm_bandwidth=819 * _GB,
        link_bandwidth=400 * _GB / 2 / 4,
        torus_axes=2,
        wraps_at=16,
        dcn_bandwidth=200 * _GBIT,
        chips_per_host=8,
    ),
    Chip(  # 459 TFLOPs; 95 GiB at 2765 GB/s; 3D, 1200 GB/s both ways over 6 links; 50 Gbps a chip
        name="v5p",
        kinds=("TPU v5", "TPU v5p"),
        peak_flops=459 * _TERA,
        hbm_bytes=95 * _GIB,
        hbm_bandwidth=2765 * _GB,
        link_bandwidth=1200 * _GB / 2 / 6,
        torus_axes=3,
        wraps_at=4,
        dcn_bandwidth=200 * _GBIT,
        chips_per_host=4,
    ),
    Chip(  # 918 TFLOPs; 32 GB at 1638 GB/s; 2D, 800 GB/s both ways over 4 ports; 4 × 200 Gbps a host of 8 chips
        name="v6e",
        kinds=("TPU v6 lite", "TPU v6e"),
        peak_flops=918 * _TERA,
        hbm_bytes=32 * _GIB,
        hbm_bandwidth=1638 * _GB,
        link_bandwidth=800 * _GB / 2 / 4,
        torus_axes=2,
        wraps_at=16,
        dcn_bandwidth=800 * _GBIT,
        chips_per_host=8,
    ),
    # GPUs: NVIDIA's data sheets (dense rates: half of the sheets' "with sparsity"), SXM forms in a DGX or HGX host.
    Chip(  # nvidia.com/h100: 989 TFLOPS, 80 GB at 3.35 TB/s, NVLink 900 GB/s both ways; DGX H100: 8 × 400 Gbps
        name="H100",
        kinds=("NVIDIA H100 80GB HBM3",),
        peak_flops=989 * _TERA,
        hbm_bytes=80 * 10**9,
        hbm_bandwidth=3350 * _GB,
        link_bandwidth=450 * _GB,
        torus_axes=0,
        dcn_bandwidth=3200 * _GBIT,
        chips_per_host=8,
    ),
    Chip(  # nvidia.com/h200: as H100, 141 GB at 4.8 TB/s; DGX H200: 8 × 400 Gbps
        name="H200",
        kinds=("NVIDIA H200",),
        peak_flops=989 * _TERA,
        hbm_bytes=141 * 10**9,
        hbm_bandwidth=4800 * _GB,
        link_bandwidth=450 * _GB,
        torus_axes=0,
        dcn_bandwidth=3200 * _GBIT,
        chips_per_host=8,
    ),
    Chip(  # nvidia.com/a100: 312 TFLOPS, 80 GB at 2039 GB/s, NVLink 600 GB/s both ways; DGX A100: 8 × 200 Gbps
        name="A100",
        kinds=("NVIDIA A100-SXM4-80GB",),
        peak_flops=312 * _TERA,
        hbm_bytes=80 * 10**9,
        hbm_bandwidth=2039 * _GB,
        link_bandwidth=300 * _GB,
        torus_axes=0,
        dcn_bandwidth=1600 * _GBIT,
        chips_per_host=8,
    ),
    Chip(  # the same sheet's first edition: 40 GB at 1555 GB/s
        name="A100-40GB",
        kinds=("NVIDIA A100-SXM4-40GB",),
        peak_flops=312 * _TERA,
        hbm_bytes=40 * 10**9,
        hbm_bandwidth=1555 * _GB,
        link_bandwidth=300 * _GB,
        torus_axes=0,
        dcn_bandwidth=1600 * _GBIT,
        chips_per_host=8,
    ),
    Chip(  # nvidia.com/l4: 121 TFLOPS (242 with sparsity), 24 GB at 300 GB/s, PCIe 4 × 16; GCP g2-standard-96: 100 Gbps
        name="L4",
        kinds=("NVIDIA L4",),
        peak_flops=121 * _TERA,
        hbm_bytes=24 * 10**9,
        hbm_bandwidth=300 * _GB,
        link_bandwidth=32 * _GB,
        torus_axes=0,
        dcn_bandwidth=100 * _GBIT,
        chips_per_host=8,
    ),
)


def find_chip(device_kind: str) -> Chip | None:
    """The chip with jax's `device_kind`, or our name of it; None for one that is not in CHIPS, such as a CPU."""
    return next((chip for chip in CHIPS if device_kind in (chip.name, *chip.kinds)), None)
