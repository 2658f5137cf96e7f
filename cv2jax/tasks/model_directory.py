"""A model directory: the runs that speak together, one a stage, and voices.

    MODEL/text_speech_lm/  flow_matching/  hift_vocoder/  speech_tokenizer/  speaker_encoder/
    MODEL/voices/NAME.safetensors

Each stage is the --workdir of `cv2jax train`, or a link to one; what is not needed may be left out.
"""

import os
import pathlib
from typing import Any

from cv2jax.config import UserError
from cv2jax.synthesis.voice import SUFFIX, voices_in
from cv2jax.train.run import load_run

STAGES = ("speech_tokenizer", "speaker_encoder", "text_speech_lm", "flow_matching", "hift_vocoder")
VOICES = "voices"
# Stages that learn from speech tokens name what made these in their facts.
_LEARN_TOKENS = ("text_speech_lm", "flow_matching")
# The flow names what made its speaker embeddings: {"encoder": hash, "of": utterance or speaker}, or STAND_IN.
EMBEDDINGS_FACT, STAND_IN = "speaker_embeddings", "stand-in"
_SHOWN = 12  # digits of a hash


def stage_run(model: str | os.PathLike[str], task: str) -> pathlib.Path:
    """The workdir of a stage's run in a model directory.

    Raises UserError for a place that is no model directory, and where the stage is not there, is a dead link or a run of
    another task; each says how to mend it.
    """
    if task not in STAGES:
        raise ValueError(f"{task} is no stage; they are {', '.join(STAGES)}")
    model = pathlib.Path(model)
    run = model / task
    if not model.is_dir():
        raise UserError(
            f"{model}: no such model directory; make one that holds a run for each stage: {', '.join(STAGES)}"
        )
    if not run.exists():
        if (model / "run.json").is_file():
            kind = load_run(model)["config"].get("task") or "one stage"
            raise UserError(
                f"{model}: is a run of {kind}, not a model directory; make a directory with a link to it:"
                f" ln -s {model.resolve()} MODEL/{kind}"
            )
        mend = f"train it there (cv2jax train {task}_tiny --workdir {run}) or link a run: ln -s RUN {run}"
        if run.is_symlink():
            raise UserError(f"{run}: links to {os.readlink(run)}, which is not there; {mend}")
        raise UserError(f"{model}: has no {task}; {mend}")
    found = load_run(run)["config"].get("task")
    if found and found != task:
        raise UserError(f"{run}: is a run of {found}; put a run of {task} there")
    return run


def has_stage(model: str | os.PathLike[str], task: str) -> bool:
    """Whether a model directory has anything at the place of a stage; `stage_run` then says if it will do."""
    return os.path.lexists(pathlib.Path(model, task))


def find_voice(model: str | os.PathLike[str], voice: str) -> pathlib.Path:
    """The file of a voice: a path that ends in .safetensors, or the name of one in MODEL/voices.

    Raises UserError for a name that is not there, with those that are, for another file and for no model directory.
    """
    if voice.endswith(SUFFIX):
        return pathlib.Path(voice)
    if not pathlib.Path(model).is_dir():
        raise UserError(f"{model}: no such model directory; give one, with voices in {pathlib.Path(model, VOICES)}")
    place = pathlib.Path(model, VOICES)
    found = voices_in(place)
    if voice not in found and pathlib.Path(voice).is_file():
        raise UserError(f"{voice}: is no voice ({SUFFIX}); make one of a recording: cv2jax enroll {voice}")
    if voice not in found:
        known = f"it has {', '.join(found)}" if found else "it has none"
        raise UserError(f"{place}: no voice '{voice}'; {known}; give a {SUFFIX} file or `cv2jax enroll` one there")
    return found[voice]


def require_same_tokenizer(model: str | os.PathLike[str], speech_tokenizer: str) -> None:
    """Raises UserError where a stage of a model directory learnt from speech tokens of another tokenizer than this hash."""
    for task in _LEARN_TOKENS:
        if not has_stage(model, task):
            continue
        run = stage_run(model, task)
        facts: dict[str, Any] = load_run(run)["facts"]
        theirs = facts.get("speech_tokenizer", "")
        if theirs and theirs != speech_tokenizer:
            raise UserError(
                f"{run}: learnt from tokens of {theirs[:_SHOWN]}, but the speech tokenizer is {speech_tokenizer[:_SHOWN]};"
                f" put the run that made its tokens at {pathlib.Path(model, 'speech_tokenizer')}"
            )


def learnt_encoder(run: str | os.PathLike[str]) -> str:
    """Hash of the speaker encoder on whose embeddings a flow's run was trained, STAND_IN for none, "" where it is not known."""
    facts: dict[str, Any] = load_run(pathlib.Path(run))["facts"]
    # A run of before there was a choice has a corpus and no such fact; an imported one has neither.
    learnt = facts.get(EMBEDDINGS_FACT, STAND_IN if "corpus_hash" in facts else "")
    return str(learnt.get("encoder", "")) if isinstance(learnt, dict) else str(learnt)


def require_same_encoder(model: str | os.PathLike[str], speaker_encoder: str) -> None:
    """Raises UserError where the flow of a model directory learnt from embeddings of another speaker encoder than this hash.

    A flow that learnt from stand-ins, one that does not say, and none at all are fine.
    """
    if not has_stage(model, "flow_matching"):
        return
    run = stage_run(model, "flow_matching")
    theirs = learnt_encoder(run)
    if theirs not in ("", STAND_IN, speaker_encoder):
        place = pathlib.Path(model, "speaker_encoder")
        raise UserError(
            f"{run}: learnt from embeddings of speaker encoder {theirs[:_SHOWN]}, but {place} is {speaker_encoder[:_SHOWN]};"
            " put the run that made its embeddings there, or train a flow on those that `cv2jax embed` makes with this one"
        )
