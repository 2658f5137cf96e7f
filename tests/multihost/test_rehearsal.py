"""`launch/rehearse.py` with the real command: every stage trains; a kill ends all with its name; two processes go on."""

import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest

from tests.small_corpus import SMALL_RUN, make_small_corpus
from tests.small_flow_run import SMALL_FLOW, make_small_flow_corpus, tokens_of
from tests.small_speaker_run import SMALL_SPEAKER, make_speaker_corpus
from tests.small_token_corpus import SMALL_LM, make_small_token_corpus
from tests.small_vocoder_run import SMALL_VOCODER, make_small_vocoder_corpus

pytestmark = pytest.mark.multihost
ROOT = pathlib.Path(__file__).parents[2]
SAVED = 4  # the step of the checkpoint from which two processes go on
STEPS = (SAVED + 1, SAVED + 2, SAVED + 3)
STAGES: dict[str, tuple[Callable[[pathlib.Path], pathlib.Path], tuple[str, ...]]] = {
    "text_speech_lm_tiny": (make_small_token_corpus, SMALL_LM),
    "speech_tokenizer_tiny": (make_small_corpus, SMALL_RUN),
    "flow_matching_tiny": (make_small_flow_corpus, (*SMALL_FLOW, "data.num_buckets=1")),
    "hift_vocoder_tiny": (make_small_vocoder_corpus, SMALL_VOCODER),
    "speaker_encoder_tiny": (make_speaker_corpus, SMALL_SPEAKER),
}
LONG = ("num_steps=100000", "log_every=1", f"save_every={SAVED}", "evaluate_every=100000", "keep_checkpoints=100000")


def _rehearse(preset: str, corpus: pathlib.Path, workdir: pathlib.Path, processes: int) -> subprocess.Popen[str]:
    """The tiny stage over four devices of so many processes; the output goes to a file beside the workdir."""
    sets = [*STAGES[preset][1], *LONG]
    if preset.startswith("flow"):
        sets.append(f"data.speech_tokens={tokens_of(corpus)}")
    command = [sys.executable, "-m", "cv2jax.cli.main", "train", preset, f"--corpus={corpus}", f"--workdir={workdir}"]
    pod = [f"--processes={processes}", f"--devices={4 // processes}", "--grace_seconds=20"]
    output = open(f"{workdir}.{processes}.log", "w", encoding="utf-8")  # noqa: SIM115
    with output:
        return subprocess.Popen(
            [sys.executable, "launch/rehearse.py", *pod, "--", *command, *(f"--set={each}" for each in sets)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_DEFAULT_MATMUL_PRECISION": "highest"},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )


def _lines(workdir: pathlib.Path) -> dict[int, dict[str, float]]:
    """{step: its line of the metrics}."""
    path = workdir / "metrics.jsonl"
    whole = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return {line["step"]: line for line in map(json.loads, whole) if line["kind"] == "train"}


def _reach(pod: subprocess.Popen[str], workdir: pathlib.Path, processes: int) -> dict[int, dict[str, float]]:
    """Waits until the step SAVED is saved and the next three are logged; their lines."""
    while not (STEPS[-1] in _lines(workdir) and (workdir / "checkpoints" / str(SAVED)).is_dir()):
        assert pod.poll() is None, pathlib.Path(f"{workdir}.{processes}.log").read_text(encoding="utf-8")
        time.sleep(0.1)
    return {step: _lines(workdir)[step] for step in STEPS}


def _process(pod: subprocess.Popen[str], index: int) -> int:
    """The number of a process of the pod."""
    children = pathlib.Path(f"/proc/{pod.pid}/task/{pod.pid}/children").read_text(encoding="utf-8").split()
    ends = {pid: pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[-2] for pid in children}
    return next(int(pid) for pid, end in ends.items() if end == f"--process_id={index}".encode())


@pytest.mark.parametrize(
    ("preset", "victim"),
    [
        ("text_speech_lm_tiny", 2),
        pytest.param("text_speech_lm_tiny", 0, marks=pytest.mark.full),
        pytest.param("speech_tokenizer_tiny", 0, marks=pytest.mark.full),
        pytest.param("flow_matching_tiny", 3, marks=pytest.mark.full),
        pytest.param("hift_vocoder_tiny", 1, marks=pytest.mark.full),
        pytest.param("speaker_encoder_tiny", random.randrange(4), marks=pytest.mark.full),
    ],
)
def test_a_killed_rehearsal_ends_with_the_name_and_goes_on_with_two(
    tmp_path: pathlib.Path, preset: str, victim: int
) -> None:
    corpus, workdir, host = STAGES[preset][0](tmp_path / "corpus"), tmp_path / "run", socket.gethostname()
    pod = _rehearse(preset, corpus, workdir, 4)
    try:
        before = _reach(pod, workdir, 4)
        os.kill(_process(pod, victim), signal.SIGKILL)
        assert pod.wait(timeout=60) == 128 + signal.SIGKILL
    finally:
        pod.terminate()
        pod.wait(timeout=60)
    said = pathlib.Path(f"{workdir}.4.log").read_text(encoding="utf-8")
    assert f"rehearse: process {victim} (host {host}) died of SIGKILL: stopping the others" in said
    for other in {0, 1, 2, 3} - {victim}:
        assert f"[{other}] cv2jax: process {victim} (host {host}) died; all processes of the run end with it" in said
    for checkpoint in (workdir / "checkpoints").iterdir():
        if not checkpoint.name.isdecimal() or int(checkpoint.name) > SAVED:
            shutil.rmtree(checkpoint)
    metrics = workdir / "metrics.jsonl"
    metrics.write_text("".join(f"{json.dumps(line)}\n" for step, line in _lines(workdir).items() if step <= SAVED))
    pod = _rehearse(preset, corpus, workdir, 2)
    try:
        after = _reach(pod, workdir, 2)
    finally:
        pod.terminate()
        assert pod.wait(timeout=600) == 75  # it saves first
    assert [after[step]["batch_hash"] for step in STEPS] == [before[step]["batch_hash"] for step in STEPS]
    losses = [[lines[step]["loss"] for step in STEPS] for lines in (after, before)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
