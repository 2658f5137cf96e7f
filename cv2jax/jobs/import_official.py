"""`cv2jax import --from official`: the official model directory as a model directory of ours, one run a stage.

Nothing in it is run: YAML is read as data, `.pt` as tensors only. What has no counterpart is kept as it is, for the way back.
"""

import dataclasses
import difflib
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import logging

from cv2jax.audio.mel import FLOW_MEL
from cv2jax.config import TrainConfig, UserError
from cv2jax.convert.campplus import campplus_rules
from cv2jax.convert.official import FLOW_FILE, HIFT_FILE, LLM_FILE, HiftReader, read_flow, read_hift, read_llm
from cv2jax.convert.official_settings import require_parts, require_settings
from cv2jax.convert.official_sizes import read_flow_sizes, read_hift_sizes, read_lm_sizes
from cv2jax.convert.official_yaml import YamlSizes, read_yaml
from cv2jax.convert.onnx_graphs import UnknownGraph, read_campplus_onnx, read_speech_tokenizer_onnx
from cv2jax.convert.qwen import CARRIED, CONFIG, read_backbone_config
from cv2jax.convert.rules import load_tree
from cv2jax.convert.speech_tokenizer import speech_tokenizer_rules
from cv2jax.convert.staging import staged_directory
from cv2jax.convert.torch_file import TorchReader
from cv2jax.data.token_corpus import TEXT_TOKENIZER
from cv2jax.jobs.official_checks import check_backbone_files, check_carried, check_estimator
from cv2jax.jobs.official_files import (
    BACKBONE,
    ESTIMATOR,
    FACT,
    FILE_OF,
    REQUIRED,
    SPEAKER_ENCODER,
    SPEAKERS,
    TOKENIZER,
    YAML,
    derived_from,
    fingerprint,
    keep_files,
    list_files,
)
from cv2jax.jobs.official_voices import file_stem, read_voices
from cv2jax.models.flow_matching.config import FlowMatchingConfig
from cv2jax.models.flow_matching.model import init_params as init_flow
from cv2jax.models.hift_vocoder.config import HiftTrainingConfig, HiftVocoderConfig
from cv2jax.models.hift_vocoder.model import init_params as init_hift
from cv2jax.models.hift_vocoder.stream import require_mel
from cv2jax.models.speaker_encoder import model as speaker_model
from cv2jax.models.speech_tokenizer.tokenize import init_encoding_params, tokenizer_hash
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig
from cv2jax.models.text_speech_lm.model import init_params as init_lm
from cv2jax.synthesis.voice import SUFFIX, save_voice
from cv2jax.tasks.model_directory import EMBEDDINGS_FACT, VOICES
from cv2jax.text.tokenizer import TextTokenizer, load_text_tokenizer
from cv2jax.train.checkpoint import save_frugally
from cv2jax.train.gan_step import GENERATOR
from cv2jax.train.run import save_or_compare

_SHOWN = 8  # names in a message
# Upstream's own, which say nothing to a loader.
_PAPERS = ("config.json", "configuration.json", "README.md", "asset/")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportResult:
    """What an import made of a directory."""

    stages: tuple[str, ...]  # that are runs now
    voices: tuple[str, ...]  # ids
    kept: tuple[str, ...]  # files that were carried through unchanged
    num_parameters: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Official:
    """What a directory describes; no tensor is read yet."""

    directory: pathlib.Path
    files: list[str]
    lm: TextSpeechLmConfig
    flow: FlowMatchingConfig
    hift: HiftVocoderConfig
    tokenizer: TextTokenizer
    prints: dict[str, str]  # stage → fingerprint of its file


def import_official(directory: str | os.PathLike[str], workdir: str | os.PathLike[str]) -> ImportResult:
    """Reads the official model directory `directory` and writes the model directory `workdir`, whole or not at all.

    Peak memory is that of the largest file and little more: its tensors come one at a time. Raises UserError for a directory
    that lacks a file, has a damaged one or one with code in it, whose parts contradict one another, and for a `workdir` that
    holds something.
    """
    directory, workdir = pathlib.Path(directory), pathlib.Path(workdir)
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UserError(f"--to {workdir}: exists already; give a new place")
    source = _look(directory)
    with staged_directory(workdir) as place:
        counts, hashes = _import_encoders(source, place)
        counts |= _import_models(source, place, hashes)
        voices = _import_voices(source, place, hashes)
        kept = _keep(source, place, set(counts))
    return ImportResult(stages=tuple(counts), voices=voices, kept=kept, num_parameters=sum(counts.values()))


def _look(directory: pathlib.Path) -> _Official:
    """Reads descriptions and headers, and holds them against one another."""
    if not directory.is_dir():
        raise UserError(
            f"{directory}: there is no such directory; give an official model directory, such as CosyVoice2-0.5B"
        )
    files = list_files(directory)
    _require_files(directory, files)
    place = directory / YAML
    yaml, backbone = YamlSizes(read_yaml(place), place), directory / BACKBONE
    require_parts(yaml, str(place))
    qwen = read_backbone_config(backbone)
    lm_names = TorchReader(directory / LLM_FILE).names()
    lm = read_lm_sizes(yaml, str(place), qwen, str(backbone / CONFIG), lm_names)
    flow = read_flow_sizes(yaml, str(place), TorchReader(directory / FLOW_FILE).names())
    hift = read_hift_sizes(yaml, str(place), HiftReader(directory / HIFT_FILE).names())
    try:
        require_mel(hift, FLOW_MEL)
    except UserError as error:
        raise UserError(f"{place}: feat_extractor, hift: {error}") from None
    require_settings(yaml, str(place), lm, flow, hift)
    if lm.num_speech_tokens != flow.num_speech_tokens:
        raise UserError(
            f"{place}: llm.speech_token_size is {lm.num_speech_tokens}, and flow.vocab_size {flow.num_speech_tokens}; give"
            " files of one model"
        )
    tokenizer = load_text_tokenizer(backbone)
    if tokenizer.vocabulary_size > lm.backbone.vocabulary_size:
        raise UserError(
            f"{backbone}: its tokenizer has ids up to {tokenizer.vocabulary_size - 1}, and the text table of {LLM_FILE} has"
            f" {lm.backbone.vocabulary_size} rows; give files of one model"
        )
    if not check_backbone_files(backbone, lm.backbone):
        logging.warning("%s: has no weights; an export will write some, as upstream wants to see them", backbone)
    if ESTIMATOR in files:
        check_estimator(directory / ESTIMATOR)
    check_carried(directory, [name for name in files if name not in (*FILE_OF.values(), ESTIMATOR, SPEAKERS)])
    if SPEAKERS in files:  # soon, not when gigabytes are read
        read_voices(directory / SPEAKERS, tokenizer, flow, {"speech_tokenizer": "", "speaker_encoder": ""})
    prints = {stage: fingerprint(directory / file) for stage, file in FILE_OF.items()}
    return _Official(directory=directory, files=files, lm=lm, flow=flow, hift=hift, tokenizer=tokenizer, prints=prints)


def _require_files(directory: pathlib.Path, files: list[str]) -> None:
    missing = [name for name in REQUIRED if name not in files]
    if not missing:
        return
    others = [name for name in files if name not in REQUIRED and not name.startswith(f"{BACKBONE}/")]
    said = []
    for name in missing:
        close = difflib.get_close_matches(name, others, n=1, cutoff=0.6)
        said.append(name + (f" (there is {close[0]}: is that it?)" if close else ""))
    raise UserError(f"{directory}: lacks {', '.join(said)}; copy the whole official model directory")


def _import_models(source: _Official, place: pathlib.Path, hashes: dict[str, str]) -> dict[str, int]:
    """Writes the runs of the three `.pt` files, one after the other; the parameters of each."""
    lm, flow, hift = source.lm, source.flow, source.hift
    learnt = {"speech_tokenizer": hashes["speech_tokenizer"]}
    counts = {}
    reader = HiftReader(source.directory / HIFT_FILE)
    params = {GENERATOR: read_hift(reader, hift, _abstract(init_hift, hift))}
    facts: dict[str, Any] = {"mel": dataclasses.asdict(FLOW_MEL), "model": dataclasses.asdict(hift)}
    counts["hift_vocoder"] = _write_run(
        source, place, "hift_vocoder", HiftTrainingConfig(generator=hift), facts, params
    )
    params = read_flow(TorchReader(source.directory / FLOW_FILE), _abstract(init_flow, flow))
    embedded = {EMBEDDINGS_FACT: {"encoder": hashes["speaker_encoder"]}}
    facts = learnt | embedded | {"model": _without(dataclasses.asdict(flow), "remat", "scan_layers", "attention")}
    counts["flow_matching"] = _write_run(source, place, "flow_matching", flow, facts, params)
    del params
    params = read_llm(TorchReader(source.directory / LLM_FILE), _abstract(init_lm, lm))
    model = _without(dataclasses.asdict(lm), "attention", "loss_chunk")
    model["backbone"] = _without(model["backbone"], "remat", "scan_layers")
    facts = learnt | {"text_tokenizer": source.tokenizer.hash, "prefix": "none", "normalizer": "", "model": model}
    counts["text_speech_lm"] = _write_run(source, place, "text_speech_lm", lm, facts, params)
    source.tokenizer.save(place / "text_speech_lm" / TEXT_TOKENIZER)
    return counts


def _require_same(path: pathlib.Path, made: str, size: int, key: str, said: int) -> None:
    """Raises UserError where a graph and the YAML are of different sizes."""
    if size != said:
        raise UserError(f"{path}: {made}, and {YAML} says {key} {said}; give files of one model")


def _import_encoders(source: _Official, place: pathlib.Path) -> tuple[dict[str, int], dict[str, str]]:
    """(parameters of the runs made of the two graphs, hashes of both); an unknown graph makes no run."""
    counts: dict[str, int] = {}
    hashes = {stage: source.prints[stage] for stage in ("speech_tokenizer", "speaker_encoder")}
    try:
        path = source.directory / TOKENIZER
        config, reader = read_speech_tokenizer_onnx(path)
        made = f"makes {config.num_codes} different tokens"
        _require_same(path, made, config.num_codes, "llm.speech_token_size", source.lm.num_speech_tokens)
        params = load_tree(speech_tokenizer_rules(), reader, _abstract(init_encoding_params, config), on_host=True)
        hashes["speech_tokenizer"] = tokenizer_hash(config, params)
        facts = {"vocabulary": [], "model": _without(dataclasses.asdict(config), "remat")}
        counts["speech_tokenizer"] = _write_run(source, place, "speech_tokenizer", config, facts, params)
    except UnknownGraph as error:
        _warn_unknown(error)
    try:
        path = source.directory / SPEAKER_ENCODER
        speaker, reader = read_campplus_onnx(path)
        made = f"makes embeddings of {speaker.embedding_dim}"
        _require_same(path, made, speaker.embedding_dim, "flow.spk_embed_dim", source.flow.speaker_dim)
        state = nn.unbox(jax.eval_shape(lambda: speaker_model.init_model_state(speaker)))
        abstract = _abstract(speaker_model.init_params, speaker) | {"norms": state["norms"]}
        loaded = load_tree(campplus_rules(), reader, abstract, on_host=True)
        params, kept = {"encoder": loaded["encoder"]}, {"norms": loaded["norms"], "num_batches": np.zeros((), np.int32)}
        hashes["speaker_encoder"] = speaker_model.encoder_hash(speaker, params, kept)
        facts = {"num_speakers": 0, "model": _without(dataclasses.asdict(speaker), "remat")}
        counts["speaker_encoder"] = _write_run(source, place, "speaker_encoder", speaker, facts, params, kept)
    except UnknownGraph as error:
        _warn_unknown(error)
    return counts, hashes


def _warn_unknown(error: UnknownGraph) -> None:
    logging.warning("%s; it is carried through unchanged and makes no run", error)


def _write_run(
    source: _Official, place: pathlib.Path, task: str, model: Any, facts: dict[str, Any], params: Any, kept: Any = None
) -> int:
    """A workdir as `cv2jax train` leaves it at step 0, of parameters alone; how many there are."""
    config = TrainConfig(name=f"{task}_imported", task=task, model=model, num_steps=1)
    facts = {FACT: source.prints[task], **facts}
    save_or_compare(place / task, config, facts, started=False, write=True)
    zero = np.zeros((), np.int32)
    state = {"step": zero, "num_skipped": zero, "params": params} | ({} if kept is None else {"model_state": kept})
    save_frugally(place / task / "checkpoints", 0, jax.tree.map(np.asarray, state))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _import_voices(source: _Official, place: pathlib.Path, hashes: dict[str, str]) -> tuple[str, ...]:
    if SPEAKERS not in source.files:
        return ()
    voices = read_voices(source.directory / SPEAKERS, source.tokenizer, source.flow, hashes)
    for speaker, voice in voices.items():
        save_voice(place / VOICES / f"{file_stem(speaker)}{SUFFIX}", voice)
    return tuple(voices)


def _keep(source: _Official, place: pathlib.Path, stages: set[str]) -> tuple[str, ...]:
    """Copies what the runs do not say again: unknown files and graphs, and what was said in more than one way."""
    # Of hift.pt many (g, v) fold to one kernel.
    known = {YAML, HIFT_FILE, SPEAKERS, ESTIMATOR}
    converted = {file for stage, file in FILE_OF.items() if stage in stages} - known
    names = [name for name in source.files if name not in converted]
    unknown = [n for n in names if n not in (*known, *FILE_OF.values()) and not _is_known(n)]
    if unknown:
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        said = ", ".join(unknown[:_SHOWN]) + more
        logging.warning("%s: unknown files are carried through unchanged: %s", source.directory, said)
    keep_files(source.directory, names, place, source.prints)
    return tuple(names)


def _is_known(name: str) -> bool:
    """Whether a file is one that upstream has too: of the Qwen2 directory, beside the model, or made of its weights."""
    folder, _, file = name.partition("/")
    if folder == BACKBONE:
        return file in (CONFIG, *CARRIED) or file.startswith(("model", "pytorch_model"))
    return name.startswith(_PAPERS[-1]) or name in _PAPERS or derived_from(name) is not None


@functools.lru_cache(maxsize=8)  # tracing takes seconds
def _abstract(init: Callable[..., Any], config: Any) -> Any:
    return nn.unbox(jax.eval_shape(functools.partial(init, config), jax.random.key(0)))


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
