"""Train a stage from a config: a shipped preset or a Python file.

    cv2jax train speech_tokenizer_tiny --corpus prepared/ --workdir runs/tokenizer
    cv2jax train my_config.py --workdir runs/a --set model.width=256 --set optimizer.learning_rate=5e-4

--workdir gs://bucket/runs/lm works too (pip install 'cv2jax[gcs]').

The same command resumes by itself. SIGTERM finishes the step, saves and exits with code 75: run the same command again.
On several processes give each --coordinator, --num_processes and --process_id, or set CV2JAX_DISTRIBUTED=1 where JAX
recognises the launcher (TPU pods, Slurm). They meet at the coordinator's port first: who is missing is named. One that
dies ends all within a minute, with its name and exit code 69: run the same command again.
"""

from absl import flags, logging

from cv2jax.config import UserError, flatten, load_config, override, validate

USAGE = "CONFIG --workdir DIR [--corpus DIR] [--set key=value]..."


def define_flags(values: flags.FlagValues) -> None:
    """Declares this verb's flags."""
    flags.DEFINE_string(
        "workdir", None, "where checkpoints, metrics and curves go; a run in it is resumed", flag_values=values
    )
    flags.DEFINE_string("corpus", None, "prepared corpus; short for --set data.corpus=DIR", flag_values=values)
    flags.DEFINE_multi_string("set", [], "config override key=value; may be repeated", flag_values=values)
    several = {
        "coordinator": "host:port of process 0, for several processes; the port must be open between them",
        "num_processes": "number of processes, with --coordinator",
        "process_id": "this process, with --coordinator",
        "join_seconds": "how long to wait for the other processes (default 300)",
        "heartbeat_seconds": "a machine that shows no life for so long counts as gone (default 45)",
        "shutdown_seconds": "how long a process may go on after another has ended (default 60)",
    }
    for name, text in several.items():
        define = flags.DEFINE_string if name == "coordinator" else flags.DEFINE_integer
        define(name, None, f"{text}; or CV2JAX_{name.upper()} in the environment", flag_values=values)


def main(args: list[str], values: flags.FlagValues) -> int:
    """Trains; returns the exit code."""
    if len(args) != 1:
        raise UserError(f"expected one CONFIG, got {len(args)}; usage: cv2jax train {USAGE}")
    if values.workdir is None:
        raise UserError("--workdir is missing: give the directory where the run is to live")
    assignments = list(values.set)
    if values.corpus is not None:
        assignments.insert(0, f"data.corpus={values.corpus}")
    config = override(load_config(args[0]), assignments)
    validate(config)
    if config.data.corpus.startswith("gs://"):
        raise UserError(
            f"data.corpus={config.data.corpus}: a corpus is read from a disk; copy it there on every host "
            f"(gcloud storage cp -r {config.data.corpus} DIR) and give --corpus DIR"
        )

    from cv2jax.train.stop import StopSignal

    with StopSignal() as stop:  # before imports and plans that take seconds: a preemption may come in them too
        from cv2jax.parallel.distributed import joined
        from cv2jax.parallel.peers import join_options
        from cv2jax.remote import as_path, is_remote

        workdir = as_path(values.workdir)
        compiled = None if is_remote(workdir) else workdir / "compiled"
        with joined(join_options(values.flag_values_dict()), flatten(config), compiled, lambda: stop.asked) as peers:
            import jax

            if jax.process_index():
                logging.set_verbosity(logging.WARNING)  # config and metrics are told once, by the first process
            from cv2jax.tasks import make_task
            from cv2jax.train.loop import train

            peers.code = train(make_task(config), config, workdir, stop)
        return peers.code
