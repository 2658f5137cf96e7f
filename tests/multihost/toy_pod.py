"""The toy task on several processes: they start in seconds, where a stage compiles for minutes on a busy machine."""

import json
import os
import pathlib
import subprocess
import sys
import time

from cv2jax.config import MeshConfig, UserError
from tests.multihost.pod import ROOT, free_port


def start(workdir, num_processes=2, *, blind=None, **changes):
    """Starts the toy run in `workdir` as joined processes of one device each; `changes` are of the toy's config.

    `blind`: (process, step) of a checkpoint whose part that process cannot read.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    about = {"address": f"127.0.0.1:{free_port()}", "num": num_processes, "blind": blind, "changes": changes}
    command = [sys.executable, "-m", "tests.multihost.toy_pod", str(workdir), json.dumps(about)]
    options = {"env": environment, "cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen([*command, str(number)], **options) for number in range(num_processes)]


def main(workdir: pathlib.Path, about: dict, number: int) -> int:
    """One of the processes."""
    from cv2jax.train.stop import StopSignal

    with StopSignal() as stop:
        from cv2jax.parallel.distributed import initialize

        initialize(about["address"], about["num"], number)
        from cv2jax.train import checkpoint
        from cv2jax.train.loop import train
        from tests.train.toy import ToyTask, toy_config

        load = checkpoint.ocp.load_checkpointables

        def half_blind(path, wanted):
            state = load(path, wanted)
            if about["blind"] and about["blind"][0] == number and str(path).endswith(f"/{about['blind'][1]}"):
                raise ValueError("its part is gone")
            return state

        checkpoint.ocp.load_checkpointables = half_blind
        config = toy_config(mesh=MeshConfig(fsdp=about["num"]), **about["changes"])
        return train(ToyTask(config, on_step=lambda step: time.sleep(0.02)), config, workdir, stop)


if __name__ == "__main__":
    try:
        sys.exit(main(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])))
    except UserError as error:
        sys.exit(print(error, flush=True) or 2)
