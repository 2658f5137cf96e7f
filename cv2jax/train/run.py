"""A run's identity beside its checkpoints: `run.json` holds the config and what the data was, compared on resume."""

import contextlib
import json
import pathlib
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import cv2jax
from cv2jax.config import TrainConfig, UserError, differences, from_dict, to_dict
from cv2jax.remote import cloud_reported

# What may differ between a run and its resumption: none of it changes batches, draws or what is computed. Another mesh
# sums in another order (numbers differ by rounding); logging and evaluation change which lines there are and what an
# evaluation covers.
FREE_KEYS = (
    "name",
    "mesh.",
    "log_every",
    "evaluate_every",
    "evaluate_utterances",
    "save_every",
    "keep_checkpoints",
    "stuck_seconds",
    "profile_steps",
    "wandb",
    "expected",
    "compute_dtype",  # what it comes to on this machine is among the facts
    "model.remat",
    "model.backbone.remat",
    "model.attention",
    "model.loss_chunk",
    "data.speech_tokens:",
    "data.speaker_embeddings:",
    "data.corpus:",  # the corpus is compared by its hash, not by where it lies
    "data.speech_tokenizer",  # only evaluations read with it
    "init_from",  # a resumed run starts from its own checkpoint
    "data.num_workers",
    "data.num_threads",
    "data.prefetch",
)

END_FILE = "end.json"

# What facts were before they had a name, for runs of then.
FORMER_FACTS = {"speaker_embeddings": "stand-in"}


def save_or_compare(
    workdir: pathlib.Path,
    config: TrainConfig,
    facts: dict[str, Any],
    *,
    started: bool,
    write: bool,
    planned_padding: float | None = None,
) -> None:
    """Of a run that has a checkpoint (`started`), compares `run.json` with this call's config and facts; else writes it.

    It also keeps the padding share that the plan promises, for `cv2jax doctor`. Raises UserError on a difference. A first
    start that failed, for want of memory say, binds nobody to its config.
    """
    path = workdir / "run.json"
    mine = {"config": to_dict(config), "facts": json.loads(json.dumps(facts))}
    if started and path.is_file():
        theirs = load_run(workdir)
        # What a run of before does not name yet had the defaults.
        try:
            known = to_dict(from_dict(TrainConfig, theirs["config"], model=type(config.model)))
        except (TypeError, UserError):  # of another release, or not whole: every difference shows
            known = theirs["config"]
        lines = [line for line in differences(known, mine["config"]) if not line.startswith(FREE_KEYS)]
        former = {name: value for name, value in FORMER_FACTS.items() if name in mine["facts"]}
        lines += differences(former | theirs["facts"], mine["facts"], "data: ")
        if lines:
            shown = "; ".join(_short(line) for line in lines[:6]) + (
                f"; and {len(lines) - 6} more" if len(lines) > 6 else ""
            )
            raise UserError(
                f"{workdir} holds a run of another config ({shown}); use the same config or another --workdir "
                "(quickstart: --out)"
            )
    elif write:
        workdir.mkdir(parents=True, exist_ok=True)
        mine["planned_padding"] = planned_padding
        mine["cv2jax"] = cv2jax.__version__
        mine["revision"] = _revision()
        _write_json(path, mine)


@contextlib.contextmanager
def end_noted(workdir: pathlib.Path, step: Callable[[], int], *, enabled: bool) -> Iterator[None]:
    """Leaves `end.json` where an error ends the run, as `note_end` does; takes that of the run before away."""
    if enabled:
        (workdir / END_FILE).unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        if enabled:
            code = 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
            message = (str(error).splitlines() or [""])[0]
            with contextlib.suppress(OSError):  # the disk may be what is wrong
                note_end(workdir, step(), f"{type(error).__name__}: {message}"[:300], code)
        raise


def note_end(workdir: pathlib.Path, step: int, reason: str, code: int) -> None:
    """Says in `end.json` how a run ended: after which step, why, with which exit code, when. A kill leaves none."""
    _write_json(workdir / END_FILE, {"step": step, "reason": reason, "code": code, "time": round(time.time())})


def _write_json(path: pathlib.Path, value: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    temporary.replace(path)


def load_run(workdir: pathlib.Path) -> dict[str, Any]:
    """{"config", "facts", "cv2jax", "revision"} of the run in `workdir`; UserError if there is none."""
    path = workdir / "run.json"
    with cloud_reported(path):
        is_there = path.is_file()
    if not is_there:
        raise UserError(f"{workdir} holds no run (no run.json); give the --workdir of `cv2jax train`")
    mend = "restore it or start in another --workdir"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}); {mend}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; {mend}") from error
    if not isinstance(run, dict) or not all(isinstance(run.get(key), dict) for key in ("config", "facts")):
        raise UserError(f"{path}: does not hold the config and the facts of a run; {mend}")
    return run


def _short(line: str) -> str:
    return line if len(line) < 120 else line[:117] + "…"


def _revision() -> str:
    """The git revision of the code, 'unknown' when it does not lie in a checkout."""
    command = ["git", "-C", str(pathlib.Path(cv2jax.__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
