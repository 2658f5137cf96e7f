"""`cv2jax copysynth`: recordings through mel and vocoder and back, measured, listened to by a recogniser, and drawn.

The vocoder is a function that the caller gives, mel → waveform: the job knows no model. `load_synthesiser` makes it of a run.
"""

import dataclasses
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32
from tqdm import tqdm

from cv2jax.audio.f0 import METHODS, fundamental_frequency
from cv2jax.audio.io import load_waveform, write_wav
from cv2jax.audio.mel import MEL_HOP, MEL_RATE_HZ, mel_spectrogram
from cv2jax.config import MeshConfig, UserError
from cv2jax.data.corpus_index import write_bytes, write_json
from cv2jax.evaluation.grammar import GrammarRecogniser
from cv2jax.evaluation.perceptual import NAMES, available
from cv2jax.evaluation.vocoder import VocoderScore, draw_pairs
from cv2jax.jobs.copysynth_inputs import Recording, list_recordings
from cv2jax.parallel.mesh import make_mesh

Synthesise = Callable[[Float32[np.ndarray, "F M"]], Float[np.ndarray, " W"]]  # log-mel of 24 kHz → its 480·F samples
_KINDS = ("original", "synthesised")
# The columns of table.md, and how they are written.
_COLUMNS = {
    "stft_distance": "{:.3f}",
    "log_spectral_distance": "{:.2f} dB",
    "mel_l1": "{:.3f}",
    "f0_rmse_hz": "{:.1f} Hz",
    "f0_rmse_cents": "{:.0f} cents",
    "f0_gross_error": "{:.1%}",
    "voicing_error": "{:.1%}",
    "pesq": "{:.2f}",
    "stoi": "{:.3f}",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyOptions:
    """What is taken of the inputs, and who judges."""

    split: str = ""  # of manifests; "": all
    speakers: tuple[str, ...] = ()  # of manifests; (): all
    limit: int = 0  # recordings, spread evenly; 0: all
    grammar: str = ""  # JSGF file of a synthetic corpus: what is heard in its sentences
    method: str = "harvest"  # of F0
    perceptual: bool = True  # PESQ and STOI, where installed


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyResult:
    """What was found; `metrics` as in metrics.json, `heard` of the original and the synthesised, if a recogniser was asked."""

    metrics: dict[str, Any]
    heard: dict[str, Any]
    num_refused: int
    left_out: tuple[str, ...]  # measures whose packages are not installed
    seconds: float  # of audio
    synthesis_seconds: float


def copy_synthesis(
    synthesise: Synthesise,
    inputs: Sequence[str],
    out: str | os.PathLike[str],
    options: CopyOptions = CopyOptions(),
    *,
    describe: dict[str, Any] | None = None,
) -> CopyResult:
    """Writes OUT: metrics.json, table.md, pairs.png, and audio/ with both waveforms of every recording.

    `synthesise` turns the log-mel `[F 80]` (24 kHz, fmax 8000) of each recording into its waveform; `describe` goes into
    metrics.json. What cannot be read or lasts under a mel frame is named on stderr, counted and left out; silence and what
    has no pitch is kept without F0 figures; a waveform that is not finite is reported, not written, and in no mean.
    Raises UserError where nothing is left, for an OUT of something else, and for a waveform of another length.
    """
    if options.method not in METHODS:
        raise UserError(f"method={options.method}: choose {' or '.join(METHODS)}")
    fundamental_frequency(np.zeros(MEL_HOP, np.float32), MEL_RATE_HZ, MEL_HOP)  # is there a tracker at all?
    recordings = list_recordings(inputs, split=options.split, speakers=options.speakers, limit=options.limit)
    recogniser = _open_recogniser(options.grammar, recordings)
    root = _claim(pathlib.Path(out))
    score = VocoderScore(method=options.method, perceptual=options.perceptual)
    rows: list[dict[str, Any]] = []
    refused: list[dict[str, str]] = []
    seconds = wall = 0.0
    for number, recording in enumerate(tqdm(recordings, desc="copysynth", unit="utt", disable=not sys.stderr.isatty())):
        try:
            original = _load(recording)
        except UserError as error:
            refused.append({"id": recording.id, "reason": str(error)})
            tqdm.write(f"copysynth: refused {recording.id or recording.path}: {error}", file=sys.stderr)
            continue
        mel, _ = mel_spectrogram(original[None], fmax=8000.0)
        start = time.monotonic()
        synthesised = np.asarray(synthesise(np.ascontiguousarray(mel[0].T, np.float32)))
        wall, seconds = wall + time.monotonic() - start, seconds + len(original) / MEL_RATE_HZ
        row = score.add(recording.id, original, synthesised)
        row["text"] = recording.text
        for kind, waveform in zip(_KINDS, (original, synthesised), strict=True):
            if np.isfinite(waveform).all():
                write_wav(root / "audio" / f"{_file_name(number, recording.id)}.{kind}.wav", waveform, MEL_RATE_HZ)
            if recogniser is not None and recogniser.covers(recording.text or ""):
                row[f"heard_{kind}"] = recogniser.read(waveform, MEL_RATE_HZ)
        rows.append(row)
    if not rows:
        raise UserError(f"none of the {len(refused)} recordings can be used; first: {refused[0]['reason']}")
    result = CopyResult(
        metrics=score.metrics(),
        heard=_judge(recogniser, rows),
        num_refused=len(refused),
        left_out=tuple(name for name in NAMES if options.perceptual and name not in available()),
        seconds=seconds,
        synthesis_seconds=wall,
    )
    _write(root, result, rows, refused, score, (describe or {}) | {"options": dataclasses.asdict(options)})
    return result


def _load(recording: Recording) -> Float32[np.ndarray, " W"]:
    if recording.reason is not None:
        raise UserError(recording.reason)
    waveform = load_waveform(recording.path, MEL_RATE_HZ)
    if len(waveform) < MEL_HOP:
        raise UserError(f"{recording.path}: lasts under 20 ms, which gives no mel frame; leave it out")
    return waveform


def _open_recogniser(grammar: str, recordings: list[Recording]) -> GrammarRecogniser | None:
    if not grammar:
        return None
    recogniser = GrammarRecogniser(grammar)
    if not any(recogniser.covers(recording.text or "") for recording in recordings):
        raise UserError(f"--grammar {grammar}: no recording says one of its sentences; give the corpus's manifest")
    return recogniser


def _claim(root: pathlib.Path) -> pathlib.Path:
    """Makes OUT, or empties what an earlier run left there; UserError where it holds anything else."""
    audio, is_ours = root / "audio", (root / "metrics.json").is_file()
    if root.exists() and (not root.is_dir() or (any(root.iterdir()) and not is_ours)):
        raise UserError(f"{root}: holds something that is not from `cv2jax copysynth`; give a new directory")
    try:
        audio.mkdir(parents=True, exist_ok=True)
        for kind in _KINDS:
            for path in audio.glob(f"*.{kind}.wav"):
                path.unlink()
        # The mark that it is ours; until the end it says that this is not all.
        write_json(root / "metrics.json", {"finished": False})
    except OSError as error:
        raise UserError(f"{root}: cannot write there ({error.strerror})") from None
    return root


def _file_name(number: int, identity: str) -> str:
    return f"{number:04d}-{re.sub(r'[^A-Za-z0-9_.-]', '_', identity)[:80]}"


def _judge(recogniser: GrammarRecogniser | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    heard = [row for row in rows if "heard_original" in row]
    if recogniser is None or not heard:
        return {}
    texts = [row["text"] for row in heard]
    return {kind: recogniser.judge(texts, [row[f"heard_{kind}"] for row in heard]).metrics() for kind in _KINDS}


def _write(
    root: pathlib.Path,
    result: CopyResult,
    rows: list[dict[str, Any]],
    refused: list[dict[str, str]],
    score: VocoderScore,
    describe: dict[str, Any],
) -> None:
    try:
        if score.pictures:
            write_bytes(root / "pairs.png", draw_pairs(score.pictures))
        write_bytes(root / "table.md", format_table(result, rows).encode())
        described = describe | dataclasses.asdict(result) | {"utterances": rows, "refused": refused}
        write_json(root / "metrics.json", {"finished": True} | described)
    except OSError as error:
        raise UserError(f"{root}: cannot write there ({error.strerror})") from None


def format_table(result: CopyResult, rows: Sequence[dict[str, Any]]) -> str:
    """The figures as Markdown: a line an utterance, one of them all, and what was heard."""
    names = [name for name in _COLUMNS if name in result.metrics]
    cells = lambda row: [_COLUMNS[n].format(row[n]) if n in row else "–" for n in names]  # noqa: E731
    lines = [["utterance", "status", *names], ["---"] * (2 + len(names))]
    lines += [[str(row["id"]).replace("|", "\\|"), row["status"], *cells(row)] for row in rows]
    lines += [["**all**", "", *cells(result.metrics)]]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    for kind, found in result.heard.items():
        text += (
            f"\nHeard in the {kind} ({found['num_heard']} sentences): {found['word_error_rate']:.1%} of the words wrong, "
            f"{found['slot_word_error_rate']:.1%} of the slot words (a guess: {found['chance_slot_word_error_rate']:.1%}).\n"
        )
    if result.left_out:
        text += f"\nNot installed and left out: {', '.join(result.left_out)} (extra [judges]).\n"
    return text


def load_synthesiser(
    run: str | os.PathLike[str], *, step: int | None = None, seed: int = 0
) -> tuple[Synthesise, dict[str, Any]]:
    """(the vocoder of a run's newest, or given, checkpoint as a function; what to say of it); UserError as `load_vocoder`."""
    import jax

    from cv2jax.synthesis.wave_stream import synthesise_unchecked
    from cv2jax.tasks.stages import make_wave_stage
    from cv2jax.tasks.trained import find_step, load_vocoder

    step = find_step(run, step)
    config, params = load_vocoder(run, make_mesh(MeshConfig(), jax.local_devices()[:1]), step=step)
    stage, key = make_wave_stage(config, params), jax.random.key(seed)
    return lambda mel: np.asarray(synthesise_unchecked(stage, mel, key)), {
        "run": str(run),
        "step": step,
        "seed": seed,
    }
