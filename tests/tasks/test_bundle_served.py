"""A bundle from its export to speech, for this platform alone: what serves it imports only the packages that are named."""

import dataclasses
import shutil

import numpy as np
import pytest
import soundfile

from cv2jax.cli.main import run as run_cli
from cv2jax.synthesis import bundle_files as files
from cv2jax.synthesis.bundle import MEL, SPEECH, WAVE
from cv2jax.synthesis.request import Request
from cv2jax.synthesis.voice import save_voice
from cv2jax.tasks.bundle import write_bundle
from tests import small_bundle
from tests.only_packages import BUNDLE, COMMAND_LINE, run_command, run_only
from tests.synthesis import small_engine

SIZES = dataclasses.replace(small_bundle.SIZES, slot_counts=(1,), cache_lengths=(128,), rooms=(100,))
_TRIES = """
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
print(sorted(name for name in sys.modules if name.partition(".")[0] in ("jaxtyping", "flax") or "models" in name))
"""


@pytest.mark.parametrize(
    ("packages", "names"),
    [
        (BUNDLE, ["synthesis.bundle_engine"]),
        (
            COMMAND_LINE,
            ["cli.main", *(f"{of}.{v}" for v in ("synthesize", "selftest", "enroll") for of in ("cli", "jobs"))],
        ),
    ],
)
def test_what_serves_a_bundle_imports_what_is_named(packages, names):
    done = run_only(packages, _TRIES, *(f"cv2jax.{name}" for name in names))
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_what_is_not_named_cannot_be_imported():
    done = run_only(("numpy",), _TRIES, "numpy", "jaxtyping")
    assert "No module named 'jaxtyping'" in done.stderr


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    save_voice(root / "ann.safetensors", small_engine.voice())
    parts, voices = small_bundle.make_parts(), [root / "ann.safetensors"]
    write_bundle(parts, root / "bundle", sizes=SIZES, platforms=["cpu"], voices=voices)
    return root / "bundle"


@pytest.mark.slow
def test_a_bundle_is_tried_and_speaks_from_the_command_line(bundle, tmp_path):
    done = run_command("selftest", bundle)
    assert (done.returncode, done.stderr) == (0, "")
    assert "passes in" in done.stdout
    out = tmp_path / "said.wav"
    words = ["--voice=ann", "--max_length=40", "--seed=3", "--stream", f"--out={out}"]
    done = run_command("synthesize", small_engine.TEXT, f"--model={bundle}", *words)
    assert done.returncode in (0, 3), done.stderr
    request = Request(voice=small_engine.voice(), text=small_engine.TEXT, seed=3, max_length=40)
    wanted, result = small_engine.make_engine(num_slots=1).speak(request)
    assert done.stdout.startswith(f"{result.status}: ")
    found, rate_hz = soundfile.read(out)
    assert rate_hz == result.rate_hz
    np.testing.assert_allclose(found, wanted, atol=2e-4)  # 16 bits


@pytest.mark.slow
def test_a_byte_that_has_changed_in_any_file_is_told_with_the_file(bundle, tmp_path, capsys):
    place = tmp_path / "bundle"
    shutil.copytree(bundle, place)
    every = sorted(path for path in place.rglob("*") if path.is_file())
    names = {path.relative_to(place).as_posix() for path in every}
    stages = {f"{files.PARAMETERS}/{stage}.safetensors" for stage in (SPEECH, MEL, WAVE)}
    assert stages | {files.MANIFEST, f"{files.VOICES}/ann.safetensors"} < names
    for path in every:
        data = path.read_bytes()
        for at in (0, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            assert run_cli(["selftest", str(place)]) == 2
            printed = capsys.readouterr().err
            assert (printed.count("\n"), f"{path}: is damaged" in printed) == (1, True), printed
        path.write_bytes(data)
