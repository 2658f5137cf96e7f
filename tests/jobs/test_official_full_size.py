"""An official directory of the released sizes goes in and out in little more memory than its largest file."""

import dataclasses
import os
import shutil
import subprocess
import sys
import time

import pytest

from cv2jax.models.flow_matching.config import FlowMatchingConfig
from cv2jax.models.hift_vocoder.config import HiftVocoderConfig
from cv2jax.models.speaker_encoder.config import SpeakerEncoderConfig
from cv2jax.models.speech_tokenizer.config import official
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig
from tests.official_directory import same_tensors, write_directory

MAKE = """
import pathlib, sys
from tests.jobs.test_official_full_size import make
make(pathlib.Path(sys.argv[1]))
"""


def make(directory):
    """The released sizes, with random numbers."""
    flow = FlowMatchingConfig(mask_chunks=(0, 25), mask_lefts=(-1, -1), mask_prompts=(0, 0))
    tokenizer = dataclasses.replace(official(), dtype="float32")
    write_directory(directory, TextSpeechLmConfig(), flow, HiftVocoderConfig(), tokenizer, SpeakerEncoderConfig())


def measure(*words):
    """(seconds, peak resident bytes) of a command in a process of its own."""
    # A shell's child would count too: the process is waited for alone.
    start, process = time.monotonic(), subprocess.Popen([sys.executable, *map(str, words)])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return time.monotonic() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.official
@pytest.mark.full
def test_the_released_sizes_make_the_trip_in_little_memory(tmp_path):
    torch = pytest.importorskip("torch")
    official_directory, model, out = tmp_path / "official", tmp_path / "model", tmp_path / "out"
    try:
        measure("-c", MAKE, official_directory)
        largest = max(path.stat().st_size for path in official_directory.iterdir())
        assert largest == (official_directory / "llm.pt").stat().st_size > 2.02e9
        limit = 1.3 * largest + 1.2e9
        cli = ("-m", "cv2jax.cli.main")
        for name, words in (
            ("import", ("import", official_directory, "--from=official", f"--to={model}")),
            ("export", ("export", model, "--to=official", f"--out={out}")),
        ):
            seconds, peak = measure(*cli, *words)
            print(f"{name}: {seconds:.0f} s, peak {peak / 1e9:.2f} GB of {limit / 1e9:.2f} GB")
            assert peak <= limit
        counts = {"llm.pt": 295, "flow.pt": 1121, "hift.pt": 328}
        for file, count in counts.items():
            one, other = (torch.load(d / file, weights_only=True, mmap=True) for d in (official_directory, out))
            assert len(one) == len(other) == count
            assert same_tensors(one, other) == []
        for file in ("campplus.onnx", "speech_tokenizer_v2.onnx", "cosyvoice2.yaml"):
            assert (official_directory / file).read_bytes() == (out / file).read_bytes()
    finally:  # ten gigabytes
        for place in (official_directory, model, out):
            shutil.rmtree(place, ignore_errors=True)
