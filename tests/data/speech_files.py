"""Made-up audio files and manifests for the tests of data preparation."""

import json
import pathlib
from typing import Any

import numpy as np
import soundfile

from cv2jax.data.shards import Record


def make_waveform(seed: int, num_samples: int) -> np.ndarray:
    """A tone in noise, float32 [W], well below full scale."""
    generator = np.random.default_rng(seed)
    tone = np.sin(np.arange(num_samples) * generator.uniform(0.05, 0.4))
    return (0.3 * tone + 0.02 * generator.standard_normal(num_samples)).astype(np.float32)


def make_record(seed: int, num_samples: int = 500, text: str | None = "Hi, you!") -> Record:
    """A record whose every field depends on the seed."""
    return Record(
        id=f"u{seed}",
        text=text,
        speaker=f"s{seed % 3}",
        language="en",
        rate_hz=24000,
        waveform=(make_waveform(seed, num_samples) * 32767).astype(np.int16),
    )


def write_speech(
    path: pathlib.Path, seed: int, *, rate_hz: int = 16000, seconds: float = 0.2, channels: int = 1
) -> None:
    """Writes a WAV (or what the suffix says) of made-up sound."""
    path.parent.mkdir(parents=True, exist_ok=True)
    waveform = make_waveform(seed, round(seconds * rate_hz))
    soundfile.write(path, np.stack([waveform] * channels, axis=1), rate_hz)


def make_lines(root: pathlib.Path, count: int, **audio: Any) -> list[dict[str, Any]]:
    """Writes `count` files and returns their manifest lines: every fifth utterance is in the split "test"."""
    lines = []
    for i in range(count):
        write_speech(root / f"wav/{i}.wav", i, **audio)
        split, text = "test" if i % 5 == 0 else "train", f"Word {i % 7}." if i % 4 else None
        line = {"id": f"u{i}", "audio": f"wav/{i}.wav", "text": text, "speaker": f"s{i % 3}", "language": "en"}
        lines.append({**line, "split": split, "seconds": 0.2})
    return lines


def write_lines(path: pathlib.Path, lines: list[Any]) -> pathlib.Path:
    """Writes a manifest; a line that is a string goes in as it is."""
    text = "".join((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path
