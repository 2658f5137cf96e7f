"""PESQ and STOI where their packages are installed (extra [judges]): what a listener would say of synthesised speech."""

import contextlib
import importlib.util
import warnings

import numpy as np
from jaxtyping import Float

from cv2jax.audio.resample import resample

NAMES = ("pesq", "stoi")
_PACKAGES = {"pesq": "pesq", "stoi": "pystoi"}
_RATE_HZ = 16000  # of wideband PESQ


def available() -> tuple[str, ...]:
    """The measures whose packages are installed, of NAMES."""
    return tuple(name for name in NAMES if importlib.util.find_spec(_PACKAGES[name]) is not None)


def perceptual_scores(
    original: Float[np.ndarray, " W"], synthesised: Float[np.ndarray, " W"], rate_hz: int
) -> dict[str, float]:
    """`pesq` (wideband MOS-LQO, ITU-T P.862.2, at 16 kHz, up to 4.64) and `stoi` (Taal 2011, 0 to 1) of equal lengths.

    What is not installed, and what an algorithm cannot judge (silence, under a quarter of a second), is left out.
    """
    reference, degraded = (resample(x.astype(np.float64), rate_hz, _RATE_HZ) for x in (original, synthesised))
    if not (reference.any() and degraded.any()):
        return {}
    found = {}
    names = available()
    judges = {name: importlib.import_module(_PACKAGES[name]) for name in names}
    with warnings.catch_warnings():
        # Both divide by nothing, and return a number all the same, where they find no speech.
        warnings.simplefilter("error", RuntimeWarning)
        if "pesq" in names:
            with contextlib.suppress(judges["pesq"].PesqError, ValueError, RuntimeWarning):
                found["pesq"] = float(judges["pesq"].pesq(_RATE_HZ, reference, degraded, "wb"))
        if "stoi" in names:
            with contextlib.suppress(ValueError, RuntimeWarning):
                found["stoi"] = float(judges["stoi"].stoi(reference, degraded, _RATE_HZ))
    return {name: value for name, value in found.items() if np.isfinite(value)}
