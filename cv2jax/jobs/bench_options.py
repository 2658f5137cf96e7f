"""What `cv2jax bench` is asked and what it answers: shared by the process that asks and those that measure."""

import dataclasses
import pathlib
import statistics

from cv2jax.config import UserError

SIZES = ("tiny", "official")
SIDES = ("", "torch")  # what `against` may be


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure; 0 and "" mean what each part chooses by its size."""

    size: str = ""  # tiny or official; "" is both for encode, official for lm-…, tiny for the others
    seconds: float = 0.0  # of speech in a measurement
    repeats: int = 3
    utterances: int = 0  # rows of the synthetic index that `loader` also plans
    manifest: str = ""  # prepare this instead of made-up speech
    corpus: str = ""  # train on and load this prepared corpus instead of a made-up one
    against: str = "torch"  # whom lm-train, lm-decode, flow-offline and synth race on a CPU; "": nobody
    batch: int = 0  # rows that the vocoder speaks at once; 0: 1, elsewhere than on a CPU 1 and 16
    concurrent: int = 0  # requests that synth also speaks at once
    run: str = ""  # workdir of the vocoder, or model directory of synth, instead of random parameters
    audio: str = ""  # recording for it to copy, instead of made-up speech

    def validate(self) -> None:
        """Raises UserError for what cannot be measured."""
        if self.size and self.size not in SIZES:
            raise UserError(f"size={self.size}: choose {' or '.join(SIZES)}")
        if self.against not in SIDES:
            raise UserError(f"against={self.against}: choose torch, or '' for nobody")
        for name in ("seconds", "utterances", "batch", "concurrent"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: must not be negative")
        if self.repeats < 1:
            raise UserError(f"repeats={self.repeats}: must be at least 1")
        if self.run and self.size:
            raise UserError(f"size={self.size}: the run {self.run} has its own; leave one of them out")
        for name in ("manifest", "corpus", "run", "audio"):
            if getattr(self, name) and not pathlib.Path(getattr(self, name)).exists():
                raise UserError(f"{name}={getattr(self, name)}: does not exist")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One figure: the values of its repeats, and the memory of the process that made them."""

    bench: str
    case: str
    unit: str
    values: tuple[float, ...]
    peak_memory_mb: float | None = None  # of the process; of its largest worker where the case says so
    device_memory_mb: float | None = None  # peak on the first device, where the platform tells

    @property
    def median(self) -> float:
        """The median of the repeats."""
        return statistics.median(self.values)
