"""The least time that a step can take: the largest of what its arithmetic, its memory and its networks need."""

import dataclasses

from cv2jax.parallel.chips import Chip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds of a step on one chip at its published rates, were nothing else to be done.

    Attributes:
      compute, memory, ici, dcn: of its arithmetic (rematerialisation too), of its memory's bytes, of its transfers inside
        the slice and between slices. model_flops: of the step on one chip, rematerialisation left out.
    """

    compute: float
    memory: float
    ici: float
    dcn: float
    model_flops: float
    peak_flops: float

    @property
    def step_seconds(self) -> float:
        """Of a step in which all of them overlap perfectly."""
        return max(self.compute, self.memory, self.ici, self.dcn)

    @property
    def bound_by(self) -> str:
        """Which of them that is."""
        return max(("compute", "memory", "ici", "dcn"), key=lambda name: getattr(self, name))

    @property
    def utilisation(self) -> float:
        """Share of the chip's peak rate that the model's own arithmetic would then reach."""
        return self.model_flops / self.peak_flops / self.step_seconds if self.step_seconds else 0.0


def make_roofline(
    chip: Chip, *, flops: float, model_flops: float, hbm_bytes: float, ici_seconds: float, dcn_seconds: float
) -> Roofline:
    """The roofline of a step that does this much on each chip."""
    return Roofline(
        compute=flops / chip.peak_flops,
        memory=hbm_bytes / chip.hbm_bandwidth,
        ici=ici_seconds,
        dcn=dcn_seconds,
        model_flops=model_flops,
        peak_flops=chip.peak_flops,
    )
