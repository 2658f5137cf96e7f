"""Kill −9 of the real command at random moments: the resumed run is the unbroken one, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from cv2jax.config import load_config, override
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state
from cv2jax.tasks import make_task
from cv2jax.train.checkpoint import Checkpoints
from tests.run_record import record
from tests.small_corpus import SMALL_RUN, make_small_corpus
from tests.small_flow_run import SMALL_FLOW, make_small_flow_corpus, tokens_of
from tests.small_token_corpus import SMALL_LM, make_small_token_corpus
from tests.small_vocoder_run import SMALL_VOCODER, make_small_vocoder_corpus

pytestmark = pytest.mark.full
COMMON = ["data.num_workers=1", "num_steps=300", "log_every=7", "evaluate_every=50", "save_every=10"]
# preset → its corpus, and what makes it small with everything on that draws or remembers
STAGES = {
    "speech_tokenizer_tiny": (make_small_corpus, [*SMALL_RUN, *COMMON]),
    "text_speech_lm_tiny": (
        make_small_token_corpus,
        [*SMALL_LM, *COMMON, "model.speech_noise=0.2", "optimizer.ema_decay=0.9"],
    ),
    "hift_vocoder_tiny": (
        make_small_vocoder_corpus,
        [*SMALL_VOCODER, *COMMON, "optimizer.ema_decay=0.9", "model.adversarial_from=100"],
    ),
    "flow_matching_tiny": (make_small_flow_corpus, [*SMALL_FLOW, *COMMON, "optimizer.ema_decay=0.9"]),
}


def sets_of(preset, corpus):
    """What makes the preset small, on this corpus."""
    return [*STAGES[preset][1], *([f"data.speech_tokens={tokens_of(corpus)}"] if preset.startswith("flow") else [])]


def command(preset, corpus, workdir):
    flags = [f"--set={s}" for s in sets_of(preset, corpus)]
    return [
        sys.executable,
        "-m",
        "cv2jax.cli.main",
        "train",
        preset,
        f"--corpus={corpus}",
        f"--workdir={workdir}",
        *flags,
    ]


def environment():
    # One device and XLA's usual optimisation: what a user runs.
    return {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}


def final_state(preset, corpus, workdir):
    config = override(load_config(preset), [f"data.corpus={corpus}", *sets_of(preset, corpus)])
    abstract, _ = abstract_state(make_task(config).init_state, make_mesh(config.mesh, jax.devices()[:1]))
    with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
        return checkpoints.load(abstract)


def last_step(workdir):
    lines = record(workdir) if (workdir / "metrics.jsonl").exists() else []
    return lines[-1]["step"] if lines else 0


@pytest.mark.parametrize(("preset", "seed"), [(preset, seed) for preset in STAGES for seed in (0, 1)])
def test_two_kills_change_nothing(tmp_path, preset, seed):
    corpus = STAGES[preset][0](tmp_path / "c")
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    subprocess.run(command(preset, corpus, unbroken), check=True, env=environment(), capture_output=True)
    choose = random.Random(seed)
    for low, high in ((20, 130), (140, 270)):
        process = subprocess.Popen(
            command(preset, corpus, killed), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        at, deadline = choose.randint(low, high), time.monotonic() + 300
        while last_step(killed) < at and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(choose.random() * 0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert last_step(killed) < 300
    subprocess.run(command(preset, corpus, killed), check=True, env=environment(), capture_output=True)
    assert record(killed) == record(unbroken)
    ours, theirs = final_state(preset, corpus, killed), final_state(preset, corpus, unbroken)
    assert int(ours.step) == 300
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_sigterm_while_the_run_is_set_up_is_answered_with_75(tmp_path):
    corpus = make_small_corpus(tmp_path / "c")
    process = subprocess.Popen(
        command("speech_tokenizer_tiny", corpus, tmp_path / "w"),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if "training batches of" in line:
            process.send_signal(signal.SIGTERM)
            break
    _, rest = process.communicate(timeout=300)
    assert process.returncode == 75, rest
    assert "asked to stop" in rest
