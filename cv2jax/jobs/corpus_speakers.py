"""The speakers of the embedded corpus: an espeak-ng voice variant with a rate, pitch and pitch range of its own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cv2jax.config import UserError
from cv2jax.jobs.espeak import VoiceSettings

# Names that SetVoiceByName knows (spec/frontends.md 5).
_BASE_VOICES = {"en": "en-us", "cmn": "cmn", "ja": "ja", "ko": "ko"}

# Variants that a stock recogniser (pocketsphinx) understands in English; always the first voices, at their own pitch.
UNDERSTOOD_VARIANTS = ("f2", "f3", "f5", "m2", "caleb")
# More of them, alternating in timbre. Left out: whispers, croaks, effects, and those that clip or race.
# fmt: off
_MORE_VARIANTS = (
    "m3", "f4", "m7", "f1", "klatt3", "Annie", "m1", "steph", "m8", "linda", "adam", "m4",
    "aunty", "klatt6", "boris", "shelby", "max", "m5", "belinda", "announcer", "grandpa", "Alicia", "m6", "grandma",
    "rob", "john", "klatt2", "michel", "marcelo", "quincy", "benjamin", "zac", "robert", "david",
)
# fmt: on
_VARIANTS = UNDERSTOOD_VARIANTS + _MORE_VARIANTS
MAX_VOICES = 8 * len(_VARIANTS)
_RATE, _RATE_JITTER = 140, 12  # words per minute by espeak-ng's count: 14 to 17 letters a second in English


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """A speaker's name in the manifest ("en-f3") and how espeak-ng is set for it."""

    name: str
    settings: VoiceSettings


def list_speakers(language: str, num_voices: int, seed: int) -> list[Speaker]:
    """List the first `num_voices` speakers of a language; raises UserError when there are too few or too many.

    The voices that a recogniser understands come first and are never jittered. After the last variant the list starts
    again with another jitter ("en-f2-2").
    """
    if not 1 <= num_voices <= MAX_VOICES:
        raise UserError(f"--voices {num_voices}: give 1 to {MAX_VOICES} voices for {language}")
    speakers = []
    for i in range(num_voices):
        lap, index = divmod(i, len(_VARIANTS))
        variant = _VARIANTS[index]
        name = f"{language}-{variant}" + (f"-{lap + 1}" if lap else "")
        voice = f"{_BASE_VOICES[language]}+{variant}"
        if lap == 0 and variant in UNDERSTOOD_VARIANTS:
            settings = VoiceSettings(name=voice, rate=_RATE)
        else:
            draws = hashlib.sha256(f"{seed}|{name}".encode()).digest()
            settings = VoiceSettings(
                name=voice,
                rate=_RATE - _RATE_JITTER + draws[0] % (2 * _RATE_JITTER + 1),
                pitch=35 + draws[1] % 31,
                pitch_range=35 + draws[2] % 36,
            )
        speakers.append(Speaker(name=name, settings=settings))
    return speakers
