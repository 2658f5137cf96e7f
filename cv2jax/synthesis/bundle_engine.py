"""The engine of a bundle, and how an engine is wanted, whatever its model lies in."""

import dataclasses
import os

import jax

from cv2jax.config import UserError
from cv2jax.nn.chunks import choose_mask
from cv2jax.synthesis.bundle import load_bundle
from cv2jax.synthesis.engine import Engine
from cv2jax.synthesis.plan import HopPlan
from cv2jax.synthesis.sampling import SamplingOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a model speaks, whatever it is loaded from."""

    sampling: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)
    plan: HopPlan = dataclasses.field(default_factory=HopPlan)
    num_slots: int = 1
    max_voices: int = 1
    chunk: int | None = None  # tokens, of the flow's mask; None: the smallest that it was trained for
    left: int | None = None  # tokens of left context, -1: without an end; None: as it was trained with that chunk
    normalizer: str | None = None  # none, wetext or auto; "": texts stay as they are; None: as the corpus's were read

    def validate(self) -> None:
        """Raises UserError for a mask that cannot be."""
        if self.chunk is not None and self.chunk < 1:
            raise UserError(f"chunk={self.chunk}: give the tokens of a chunk, 1 or more, or leave it out")
        if self.left is not None and self.left < -1:
            raise UserError(f"left={self.left}: give tokens of left context, 0 or more, or -1 for no bound")


def make_bundle_engine(
    path: str | os.PathLike[str], options: EngineOptions = EngineOptions(), device: jax.Device | None = None
) -> Engine:
    """The engine of a bundle, on this process's first device or the one given.

    Raises UserError as `load_bundle`, for options that cannot be, and for those that its programs were not made for.
    """
    options.validate()
    stages, tokenizer, _, facts, _ = load_bundle(path, device)
    is_asked = options.chunk is not None or options.left is not None
    mask = choose_mask(stages.mel.trained, chunk=options.chunk, left=options.left) if is_asked else facts.mask
    return Engine(
        stages,
        tokenizer,
        mask=mask,
        plan=options.plan,
        sampling=options.sampling,
        num_slots=options.num_slots,
        max_voices=options.max_voices,
        normalizer=facts.normalizer if options.normalizer is None else options.normalizer,
    )
