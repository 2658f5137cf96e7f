"""The engine of a bundle, and how an engine is wanted, whatever its model lies in."""

import dataclasses
import os

import jax

from cv2jax.nn.chunks import ChunkMask
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
    normalizer: str | None = None  # none, wetext or auto; "": texts stay as they are; None: as the corpus's were read


def make_bundle_engine(
    path: str | os.PathLike[str], options: EngineOptions = EngineOptions(), device: jax.Device | None = None
) -> Engine:
    """The engine of a bundle, on this process's first device or the one given.

    Raises UserError as `load_bundle`, and for options that its programs were not made for.
    """
    stages, tokenizer, _, facts, _ = load_bundle(path, device)
    mask = ChunkMask(chunk=options.chunk) if options.chunk else facts.mask
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
