"""`cv2jax copysynth` with made-up vocoders: what it writes, refuses and says."""

import json
import pathlib

import numpy as np
import pytest
import soundfile

from cv2jax.audio.io import load_waveform
from cv2jax.cli import copysynth as verb
from cv2jax.cli.main import run as run_cli
from cv2jax.config import UserError
from cv2jax.jobs import espeak
from cv2jax.jobs.copysynth import CopyOptions, Synthesise, copy_synthesis
from cv2jax.jobs.copysynth_inputs import list_recordings
from cv2jax.jobs.corpus_speakers import list_speakers
from cv2jax.text.sentences import format_jsgf
from tests.data.speech_files import write_lines

RATE_HZ = 24000
FAST = CopyOptions(method="dio", perceptual=False)
TEXT = "take the white basket along the road"


def voice(hz: float = 150.0, seconds: float = 0.4) -> np.ndarray:
    time = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    return sum(np.sin(2 * np.pi * k * hz * time) / k for k in range(1, 9)) * 0.1


def hum(mel: np.ndarray) -> np.ndarray:
    """A vocoder that hums at 160 Hz as loud as the mel says."""
    assert (mel.dtype, mel.shape[1]) == (np.float32, 80)
    loud = np.repeat(np.exp(mel).mean(axis=1), 480)
    return (loud * voice(160, len(mel) * 480 / RATE_HZ)).astype(np.float32)


def copies(*paths: pathlib.Path) -> Synthesise:
    """A perfect vocoder of these files, in this order."""
    waveforms = iter([load_waveform(path, RATE_HZ) for path in paths])
    return lambda mel: next(waveforms)[: 480 * len(mel)]


@pytest.fixture
def files(tmp_path: pathlib.Path) -> pathlib.Path:
    """A directory of odd recordings."""
    root = tmp_path / "in"
    (root / "deep").mkdir(parents=True)
    soundfile.write(root / "a voice.wav", voice(), RATE_HZ)
    soundfile.write(root / "deep" / "high.FLAC", voice(200)[::1], 48000, format="FLAC")
    soundfile.write(root / "silent.wav", np.zeros(9600), RATE_HZ)
    soundfile.write(root / "t50.wav", voice(seconds=0.05), RATE_HZ)
    soundfile.write(root / "t5.wav", voice(seconds=0.005), RATE_HZ)
    (root / "broken.wav").write_bytes(b"RIFF and no more")
    (root / "notes.txt").write_text("not audio")
    return root


def test_everything_is_measured_and_written(
    files: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    result = copy_synthesis(hum, [str(files)], out, FAST, describe={"run": "runs/x"})
    assert result.metrics["num_utterances"] == 4
    assert result.metrics["num_without_f0"] >= 2
    assert result.num_refused == 2
    assert result.seconds == pytest.approx(0.4 + 0.2 + 0.4 + 0.05)
    err = capsys.readouterr().err
    assert "copysynth: refused broken: " in err
    assert "copysynth: refused t5: " in err
    assert "t5.wav: lasts under 20 ms, which gives no mel frame" in err
    described = json.loads((out / "metrics.json").read_text())
    assert (described["finished"], described["run"], described["num_refused"]) == (True, "runs/x", 2)
    assert [row["id"] for row in described["refused"]] == ["broken", "t5"]
    rows = {row["id"]: row for row in described["utterances"]}
    assert list(rows) == ["a voice", "high", "silent", "t50"]
    assert rows["a voice"]["status"] == "ok"
    assert rows["a voice"]["f0_rmse_hz"] == pytest.approx(10, abs=2)
    assert rows["silent"]["status"] == rows["t50"]["status"] == "no_f0"
    assert "f0_rmse_hz" not in rows["silent"]
    table = (out / "table.md").read_text()
    assert "| a voice | ok | " in table
    assert "| silent | no_f0 | " in table
    assert "| **all** |  | " in table
    assert (out / "pairs.png").read_bytes().startswith(b"\x89PNG")
    original, synthesised = (soundfile.read(out / f"audio/0000-a_voice.{k}.wav") for k in ("original", "synthesised"))
    assert original[1] == synthesised[1] == RATE_HZ
    np.testing.assert_allclose(original[0], voice(), atol=1e-4)
    assert len(synthesised[0]) == 9600
    assert len(list((out / "audio").iterdir())) == 8


def test_a_perfect_vocoder_has_no_distance(files: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = files / "a voice.wav"
    result = copy_synthesis(copies(path), [str(path)], tmp_path / "out", FAST)
    assert result.metrics["stft_distance"] == result.metrics["f0_rmse_hz"] == result.metrics["voicing_error"] == 0
    assert result.left_out == ()  # nobody asked for them


def test_what_is_not_finite_is_said_and_not_written(files: pathlib.Path, tmp_path: pathlib.Path) -> None:
    paths = [str(files / name) for name in ("a voice.wav", "silent.wav")]
    broken = lambda mel: np.full(480 * len(mel), np.nan if mel.max() > -5 else 0.0)  # noqa: E731
    result = copy_synthesis(broken, paths, tmp_path / "out", FAST)
    assert (result.metrics["num_non_finite"], result.metrics["num_utterances"]) == (1, 1)
    names = {path.name for path in (tmp_path / "out/audio").iterdir()}
    assert names == {"0000-a_voice.original.wav", "0001-silent.original.wav", "0001-silent.synthesised.wav"}
    assert "| a voice | non_finite | " in (tmp_path / "out/table.md").read_text()


def test_the_recogniser_hears_both_sides(tmp_path: pathlib.Path) -> None:
    [speaker] = [s for s in list_speakers("en", 16, 0) if s.name == "en-f3"]
    path, grammar = tmp_path / "take.wav", tmp_path / "grammar.jsgf"
    soundfile.write(path, espeak.speak(TEXT, speaker.settings), espeak.RATE_HZ)
    grammar.write_text(format_jsgf())
    line = {"id": "take", "audio": "take.wav", "text": TEXT, "speaker": "f3", "language": "en", "split": "test"}
    manifest = write_lines(tmp_path / "m.jsonl", [line, line | {"id": "other", "text": "Hello."}])
    options = CopyOptions(method="dio", perceptual=False, grammar=str(grammar), split="test", speakers=("f3",))
    result = copy_synthesis(copies(path, path), [str(manifest)], tmp_path / "out", options)
    for kind in ("original", "synthesised"):
        assert result.heard[kind]["word_error_rate"] == 0
        assert result.heard[kind]["num_heard"] == 1
    assert "Heard in the original (1 sentences): 0.0% of the words wrong" in (tmp_path / "out/table.md").read_text()
    mute = copy_synthesis(lambda mel: np.zeros(480 * len(mel)), [str(manifest)], tmp_path / "out", options)
    assert mute.heard["original"]["word_error_rate"] == 0
    assert mute.heard["synthesised"]["word_error_rate"] == 1
    with pytest.raises(UserError, match=r"grammar\.jsgf: no recording says one of its sentences"):
        copy_synthesis(hum, [str(path)], tmp_path / "out", options)


def test_manifests_are_narrowed(tmp_path: pathlib.Path) -> None:
    fields = {"text": None, "language": "en"}
    rows = [("a", "x", "train"), ("b", "y", "test"), ("c", "x", "test"), ("d", "x", "test")]
    lines = [{"id": i, "audio": f"{i}.wav", "speaker": s, "split": t, **fields} for i, s, t in rows]
    manifest = str(write_lines(tmp_path / "m.jsonl", [*lines, "{"]))
    named = lambda **options: [r.id for r in list_recordings([manifest], **options)]  # noqa: E731
    assert named() == ["", "a", "b", "c", "d"]  # the bad line first, refused already
    assert list_recordings([manifest])[0].reason
    assert named(split="test", speakers=("x",)) == ["", "c", "d"]
    assert named(limit=2) == ["", "b"]
    good = str(write_lines(tmp_path / "g.jsonl", lines))
    with pytest.raises(UserError, match=r"g\.jsonl: no recording of split 'test' and speakers z; give other inputs"):
        list_recordings([good], split="test", speakers=("z",))
    with pytest.raises(UserError, match=r"has no split 'dev'; it has train, test"):
        list_recordings([good], split="dev")


def test_mistakes_are_one_line(files: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path, out = str(files / "a voice.wav"), tmp_path / "out"
    with pytest.raises(UserError, match="in: holds something that is not from `cv2jax copysynth`"):
        copy_synthesis(hum, [path], files, FAST)
    with pytest.raises(UserError, match=r"a voice: 4800 samples were synthesised from 9600"):
        copy_synthesis(lambda mel: np.zeros(4800), [path], out, FAST)
    assert json.loads((out / "metrics.json").read_text()) == {"finished": False}
    copy_synthesis(hum, [path], out, FAST)  # again, into its own
    with pytest.raises(UserError, match=r"none of the 2 recordings can be used; first: .*broken\.wav"):
        copy_synthesis(hum, [str(files / "broken.wav"), str(files / "t5.wav")], out, FAST)
    (tmp_path / "empty").mkdir()
    for inputs, options, match in (
        ([str(tmp_path / "empty")], FAST, "empty: no recording; give other inputs"),
        ([], FAST, "no inputs"),
        ([path], CopyOptions(method="yin"), "method=yin: choose harvest or dio"),
        ([path], CopyOptions(limit=-1), "limit=-1"),
    ):
        with pytest.raises(UserError, match=match):
            copy_synthesis(hum, inputs, out, options)


def test_the_verb_prints_what_it_found(
    files: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {}

    def load(run: str, **options: object) -> tuple[Synthesise, dict]:
        asked.update(options, run=run)
        return (lambda mel: hum(mel) * (np.nan if options["seed"] else 1)), {"step": 7}

    monkeypatch.setattr("cv2jax.jobs.copysynth.load_synthesiser", load)
    command = ["copysynth", "runs/v", str(files / "a voice.wav"), f"--out={tmp_path / 'o'}", "--noperceptual"]
    assert run_cli([*command, "--method=dio"]) == 0
    assert asked == {"run": "runs/v", "step": None, "seed": 0}
    out = capsys.readouterr().out
    assert "o: 1 recordings, 0.4 s; 0 refused, 0 without F0, 0 not finite; stft_distance " in out
    assert "f0_rmse_hz" in out
    assert json.loads((tmp_path / "o/metrics.json").read_text())["step"] == 7
    assert run_cli([*command, "--seed=1"]) == verb.EXIT_NOT_FINITE == 3
    assert run_cli(command[:3]) == run_cli(["copysynth", "runs/v"]) == 2
