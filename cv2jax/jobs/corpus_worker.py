"""What a worker process of the corpus job does; imports little, because every spawned worker imports it again."""

from __future__ import annotations

import multiprocessing
import os
import threading
from dataclasses import dataclass
from multiprocessing.connection import wait

import soundfile

from cv2jax.jobs import espeak


@dataclass(frozen=True, kw_only=True)
class SpeakTask:
    """A text, how to speak it, and the FLAC file that shall hold it."""

    path: str
    text: str
    settings: espeak.VoiceSettings


def speak_to_file(task: SpeakTask) -> int:
    """Speak a task into its file unless it is there already; returns the number of samples.

    The file appears whole or not at all, so one left by a killed run can be trusted if it opens.
    """
    num_samples = _count_samples(task.path)
    if num_samples:
        return num_samples
    waveform = espeak.speak(task.text, task.settings)
    temporary = f"{task.path}.{os.getpid()}.tmp"
    soundfile.write(temporary, waveform, espeak.RATE_HZ, format="FLAC", subtype="PCM_16")
    os.replace(temporary, task.path)
    return len(waveform)


def _count_samples(path: str) -> int:
    """Samples of a FLAC file of our rate, 0 if it is missing or broken."""
    try:
        info = soundfile.info(path)
    except soundfile.LibsndfileError:
        return 0
    return info.frames if info.samplerate == espeak.RATE_HZ and info.channels == 1 else 0


def follow_parent() -> None:
    """End this worker when its parent dies, kill -9 included: a pool's workers would otherwise wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
