"""Speech from espeak-ng by ctypes: the library ships in the optional `espeakng-loader` wheel (GPL, hence an extra).

espeak-ng keeps its state in process globals: flutter phase, gain control, resonators, even formants of the voice before. What
it says therefore depends on what it said before (seen on 13 of 14 voices, through `espeak_Terminate` too). So the library is
unloaded after every utterance and loaded afresh for the next (about 1 ms), and both its noise sources are seeded. The same text
and settings then give the same samples in any order and any process. It also makes one process unsafe for threads:
use processes.
"""

from __future__ import annotations

import _ctypes
import ctypes
import os
import sys
import zlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Int16

from cv2jax.config import UserError

RATE_HZ = 22_050  # espeak-ng's only output rate (spec/frontends.md 5)

# Constants of espeak-ng's speak_lib.h.
_OUTPUT_RETRIEVAL = 1
_INITIALIZE_DONT_EXIT = 0x8000
_POSITION_CHARACTER = 1
_CHARACTERS_UTF8 = 1
_PARAMETER_RATE, _PARAMETER_VOLUME, _PARAMETER_PITCH, _PARAMETER_RANGE = 1, 2, 3, 4
_VOLUME = 80  # of 100: keeps the loudest voices off espeak-ng's limiter

_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True, kw_only=True)
class VoiceSettings:
    """How espeak-ng speaks: voice name ("en-us+f3"), words per minute, pitch and pitch range (0..99, 50 is the voice's own)."""

    name: str
    rate: int = 140
    pitch: int = 50
    pitch_range: int = 50


def load_loader() -> ModuleType:
    """Import `espeakng_loader`; raises UserError that names the extra to install when it is missing."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise UserError(
            "the corpus is spoken by espeak-ng, which is not installed here: pip install 'cv2jax[corpus]'"
        ) from error
    return espeakng_loader


def read_version() -> str:
    """Read espeak-ng's version: another version speaks other samples, so a corpus records it."""
    library = ctypes.CDLL(load_loader().get_library_path())
    try:
        library.espeak_Info.restype = ctypes.c_char_p
        return library.espeak_Info(None).decode()
    finally:
        _unload(library)


def speak(text: str, settings: VoiceSettings) -> Int16[np.ndarray, " W"]:
    """Speak a text: mono samples [W] at `RATE_HZ`, a pure function of text, settings and the library's version.

    Raises ValueError for a voice that espeak-ng does not know, RuntimeError when it fails.
    """
    loader = load_loader()
    library = ctypes.CDLL(loader.get_library_path())
    try:
        return _speak_once(library, str(loader.get_data_path()), text, settings)
    finally:
        library.espeak_Terminate()
        _unload(library)


def _speak_once(library: Any, data_path: str, text: str, settings: VoiceSettings) -> Int16[np.ndarray, " W"]:
    pieces: list[bytes] = []

    def collect(samples: Any, num_samples: int, _events: Any) -> int:
        if samples and num_samples > 0:
            pieces.append(ctypes.string_at(samples, 2 * num_samples))
        return 0  # go on

    callback = _CALLBACK(collect)  # held here until the library is done with it
    options = (_OUTPUT_RETRIEVAL, 0, data_path.encode(), _INITIALIZE_DONT_EXIT)
    if library.espeak_Initialize(*options) != RATE_HZ:
        raise RuntimeError(f"espeak-ng did not start from {data_path}")
    # espeak_Initialize seeds by the clock; breath noise draws from C's rand. The seed differs from one utterance to the next.
    seed = zlib.crc32(f"{settings}|{text}".encode()) >> 1 | 1
    library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
    _c_library().srand(ctypes.c_uint(seed))
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(settings.name.encode()) != 0:
        raise ValueError(f"espeak-ng has no voice {settings.name!r}")
    for parameter, value in (
        (_PARAMETER_RATE, settings.rate),
        (_PARAMETER_VOLUME, _VOLUME),
        (_PARAMETER_PITCH, settings.pitch),
        (_PARAMETER_RANGE, settings.pitch_range),
    ):
        library.espeak_SetParameter(parameter, value, 0)
    encoded = text.encode("utf-8") + b"\0"
    synth = library.espeak_Synth
    synth.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint]
    synth.argtypes += [ctypes.c_void_p, ctypes.c_void_p]
    status = synth(encoded, len(encoded), 0, _POSITION_CHARACTER, 0, _CHARACTERS_UTF8, None, None)
    if status != 0 or library.espeak_Synchronize() != 0 or not pieces:
        raise RuntimeError(f"espeak-ng (status {status}) did not speak {text!r} as {settings.name}")
    return np.frombuffer(b"".join(pieces), np.int16)


def _c_library() -> Any:
    return ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)


def _unload(library: Any) -> None:
    """Unload a library, and make sure that it is gone: a copy that stays would carry its state into the next utterance."""
    if sys.platform == "win32":
        _ctypes.FreeLibrary(library._handle)
        return
    _ctypes.dlclose(library._handle)
    try:
        ctypes.CDLL(library._name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return
    raise RuntimeError(
        f"something else in this process holds {library._name}: its speech would depend on what it said before"
    )
