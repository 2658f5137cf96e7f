"""`cv2jax export --to bundle`: a model directory, or a bundle whose programs have aged, as a bundle that serves by itself."""

import dataclasses
import os
from typing import Any

from cv2jax.config import UserError
from cv2jax.synthesis.bundle_programs import PLATFORMS
from cv2jax.tasks.bundle import BundleReport, sizes_for, write_bundle
from cv2jax.tasks.bundle_parts import Parts, parts_of_bundle, parts_of_model
from cv2jax.tasks.bundle_programs import Sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class BundleOptions:
    """How a bundle is written.

    Attributes:
      dtype: of parameters and products; None: float32, or as the bundle that it is made of. platforms: of its programs.
      slots: requests that the language model serves at once. seconds: of a piece at most, the voice's recording included; None:
        4 and 60, or as the bundle that it is made of.
      voices: files beside those of the model. from_bundle: what to write again, in place of a model directory.
    """

    dtype: str | None = None
    platforms: tuple[str, ...] = PLATFORMS
    slots: int | None = None
    seconds: float | None = None
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
    return write_bundle(
        parts,
        out,
        sizes=_find_sizes(parts, options),
        dtype=options.dtype or parts.dtype,
        platforms=options.platforms,
        voices=options.voices,
    )


def _find_sizes(parts: Parts, options: BundleOptions) -> Sizes:
    """What is asked for; where nothing is, what the bundle has that is written again."""
    asked = {name: value for name in ("slots", "seconds") if (value := getattr(options, name)) is not None}
    sizes = sizes_for(parts, **asked)
    if parts.sizes is None:
        return sizes
    kept: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in parts.sizes.items()}
    old = Sizes(**kept)
    slots = (sizes if "slots" in asked else old).slot_counts
    return dataclasses.replace(sizes if "seconds" in asked else old, slot_counts=slots)
