"""`cv2jax say`: speech tokens of a trained language model for texts, how each ended, and what is heard in them."""

import dataclasses
import functools
import json
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from cv2jax.config import MeshConfig, UserError
from cv2jax.files import whole_file
from cv2jax.models.text_speech_lm.model import init_params
from cv2jax.parallel.mesh import make_mesh
from cv2jax.remote import as_path
from cv2jax.synthesis.sampling import SamplingOptions, make_request_sampler
from cv2jax.synthesis.speech_stream import SpeechRequest, SpeechResult, generate
from cv2jax.tasks.stages import make_speech_stage
from cv2jax.tasks.trained import TokenReader, find_text_tokenizer, load_params, text_speech_lm_config
from cv2jax.text.normalize import normalize_text
from cv2jax.text.tags import END_OF_PROMPT, build_instruct_prefix, build_speaker_prefix, split_prefix_tokens
from cv2jax.train.run import load_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class SayOptions:
    """How texts are read and tokens drawn."""

    stream: bool = False  # laid out as if the text arrived piece by piece
    instruct: str = ""  # an instruction in front of every text
    speaker: str = ""  # a speaker's name in front of every text, of a model trained so
    normalizer: str | None = None  # none, wetext or auto; "": texts stay as they are; None: as the corpus's were read
    seed: int = 0
    sampling: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)
    min_length: int | None = None  # speech tokens; None: 2 a text token
    max_length: int | None = None  # None: 20 a text token
    text_tokenizer: str = ""  # directory; "": in the run
    speech_tokenizer: str = ""  # workdir of the run that made the corpus's speech tokens: say what it hears
    step: int | None = None  # of the checkpoint; None: the newest
    lora: str = ""  # side file of an adaptation that was trained on this checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spoken:
    """A text, its speech tokens, how it ended (ok, hit_limit, non_finite), and what a recogniser heard, if one was asked."""

    text: str
    result: SpeechResult
    heard: str | None


def say(run: str | os.PathLike[str], texts: Sequence[str], options: SayOptions = SayOptions()) -> list[Spoken]:
    """Speaks each text with the newest (or given) checkpoint of a run of the language model; EMA where it keeps one.

    Text i draws with fold_in(key(seed), i). Raises UserError for a run, option or text that is unfit, before decoding.
    """
    if options.instruct and options.speaker:
        raise UserError("--instruct and --speaker both: a text has one prefix; give one of them")
    described = load_run(as_path(run))
    config = text_speech_lm_config(described, run)
    tokenizer = find_text_tokenizer(described, run, options.text_tokenizer)
    sampler = make_request_sampler(options.sampling, options.sampling.top_k or config.num_outputs)
    reader = None
    if options.speech_tokenizer:
        reader = TokenReader(options.speech_tokenizer, described["facts"]["speech_tokenizer"])
    prefix = _make_prefix(options, described["facts"].get("prefix", "none"))
    normalizer = described["facts"].get("normalizer", "") if options.normalizer is None else options.normalizer
    requests = []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise UserError(f"text {number}: is empty; give it some words")
        read = normalize_text(text, normalizer=normalizer) if normalizer else text
        tokens = np.array(tokenizer.encode(prefix + read), np.int32)
        prompt, tokens = split_prefix_tokens(tokens, tokenizer.special_ids[END_OF_PROMPT])
        lengths = {"min_length": options.min_length, "max_length": options.max_length}
        requests.append(SpeechRequest(text_tokens=tokens, prompt_text_tokens=prompt, name=f"text {number}", **lengths))
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    init, step = functools.partial(init_params, config), options.step
    params, _ = load_params(run, init, mesh, step=step, ema=True, lora_file=options.lora)
    results = generate(
        make_speech_stage(config, params, sampler),
        requests,
        options=sampler.options(options.sampling),
        seed=options.seed,
        stream=options.stream,
    )
    heard: list[Any] = reader.read([r.speech_tokens for r in results]) if reader else [None] * len(results)
    return [Spoken(text=t, result=r, heard=h) for t, r, h in zip(texts, results, heard, strict=True)]


def _make_prefix(options: SayOptions, trained: str) -> str:
    """What stands in front of every text; a model that always had a speaker there gets the unknown one."""
    if options.speaker and trained != "speaker":
        logging.warning("--speaker %s: the model's corpus had no speakers in front of its texts", options.speaker)
    if options.instruct:
        return build_instruct_prefix(options.instruct)
    return build_speaker_prefix(options.speaker or None) if options.speaker or trained == "speaker" else ""


def check_out(path: str | os.PathLike[str]) -> pathlib.Path:
    """`path`, if tokens can be written there as JSON lines; else UserError."""
    path = pathlib.Path(path)
    if path.suffix != ".jsonl" or path.is_dir():
        raise UserError(f"--out {path}: give a file that ends in .jsonl")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror}); give another file") from None
    return path


def write_spoken(path: str | os.PathLike[str], run: str | os.PathLike[str], spoken: Sequence[Spoken]) -> None:
    """What a run said, one JSON object a line as `cv2jax encode` writes them, with `text` and `status`; whole or not at all."""
    path, tokenizer = check_out(path), load_run(as_path(run))["facts"]["speech_tokenizer"]
    lines = [
        {
            "id": f"said-{number}",
            "text": one.text,
            "speech_tokens": one.result.speech_tokens.tolist(),
            "status": one.result.status,
            "tokenizer": tokenizer,
        }
        for number, one in enumerate(spoken, 1)
    ]
    with whole_file(path, f"--out {path}: cannot be written ({{reason}}); give another file") as file:
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
