"""`cv2jax export --to bundle`: a model directory, or a bundle whose programs have aged, as a bundle that serves by itself."""

import dataclasses
import os

from cv2jax.config import UserError
from cv2jax.synthesis.bundle_programs import PLATFORMS
from cv2jax.tasks.bundle import BundleReport, sizes_for, write_bundle
from cv2jax.tasks.bundle_parts import parts_of_bundle, parts_of_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class BundleOptions:
    """How a bundle is written.

    Attributes:
      dtype: of parameters and products; None: float32, or as the bundle that it is made of. platforms: of its programs.
      slots: requests that the language model serves at once. seconds: of a piece at most, the voice's recording included.
      voices: files beside those of the model. from_bundle: what to write again, in place of a model directory.
    """

    dtype: str | None = None
    platforms: tuple[str, ...] = PLATFORMS
    slots: int = 4
    seconds: float = 60.0
    voices: tuple[str, ...] = ()
    from_bundle: str = ""


def export_bundle(
    model: str | os.PathLike[str] | None, out: str | os.PathLike[str], options: BundleOptions = BundleOptions()
) -> BundleReport:
    """Writes a bundle of a model directory, or of `options.from_bundle`, to the new directory `out`, or nothing.

    Raises UserError for a source, option, voice or place that will not do, and where the numeric gate does not pass.
    """
    if (model is None) == (not options.from_bundle):
        raise UserError("give one source: a model directory, or --from_bundle with a bundle")
    if os.path.lexists(out):
        raise UserError(f"--out {out}: exists already; give a new place")
    parts = parts_of_model(model) if model is not None else parts_of_bundle(options.from_bundle)
    sizes = sizes_for(parts, slots=options.slots, seconds=options.seconds)
    return write_bundle(
        parts,
        out,
        sizes=sizes,
        dtype=options.dtype or parts.dtype,
        platforms=options.platforms,
        voices=options.voices,
    )
