"""`cv2jax export --to official`: a model directory in the form that the official PyTorch, vLLM and TensorRT servers load.

The checklist is spec/official.md 1.5. What an import kept is written again where the stage that it belongs to is unchanged.
"""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from cv2jax.config import MeshConfig, UserError
from cv2jax.convert.official import (
    FLOW_FILE,
    HIFT_FILE,
    HIFT_NAMES,
    LLM_FILE,
    HiftReader,
    write_flow,
    write_hift,
    write_llm,
)
from cv2jax.convert.official_sizes import describe_sizes, differing_sizes
from cv2jax.convert.official_template import make_yaml
from cv2jax.convert.official_yaml import YamlSizes, read_yaml
from cv2jax.convert.onnx_graphs import write_campplus_onnx, write_estimator_onnx, write_speech_tokenizer_onnx
from cv2jax.convert.qwen import CONFIG, read_backbone_config, save_backbone
from cv2jax.convert.speakers import read_speakers, write_speakers
from cv2jax.convert.staging import staged_directory
from cv2jax.jobs.official_checks import check_backbone_files, still_sound, warn_of_differences
from cv2jax.jobs.official_files import (
    BACKBONE,
    ESTIMATOR,
    FILE_OF,
    SPEAKER_ENCODER,
    SPEAKERS,
    TOKENIZER,
    YAML,
    KeptFiles,
    derived_from,
    load_kept,
)
from cv2jax.jobs.official_voices import entry_of, same_voice, speaker_of, voice_of
from cv2jax.models.flow_matching.config import FlowMatchingConfig
from cv2jax.models.hift_vocoder.config import HiftVocoderConfig
from cv2jax.models.hift_vocoder.model import count_from_zero
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig, init_params
from cv2jax.parallel.mesh import make_mesh
from cv2jax.synthesis.voice import load_voice, require_voice, voices_in
from cv2jax.tasks.encoders import load_speaker_encoder, load_tokenizer
from cv2jax.tasks.model_directory import STAGES, STAND_IN, VOICES, has_stage, learnt_encoder, stage_run
from cv2jax.tasks.trained import (
    find_text_tokenizer,
    flow_matching_config,
    hift_vocoder_config,
    load_flow,
    load_params,
    load_vocoder,
    text_speech_lm_config,
)
from cv2jax.text.tokenizer import TextTokenizer, load_text_tokenizer
from cv2jax.train.run import load_run

_LEARN_TOKENS = ("text_speech_lm", "flow_matching")
_SHOWN = 12  # digits of a hash
_ENCODERS = {"speech_tokenizer": TOKENIZER, "speaker_encoder": SPEAKER_ENCODER}
# Written anew; the kept ones are looked at one by one.
_WRITTEN = (YAML, SPEAKERS, *FILE_OF.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfficialOptions:
    """Which runs to take, and how to spell them."""

    runs: Mapping[str, str] = dataclasses.field(default_factory=dict)  # stage → workdir, in place of the directory's
    lora: str = ""  # side file that was trained on the language model's run
    hift_names: str = ""  # a key of HIFT_NAMES; "": as the imported file had them, else parametrised


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfficialResult:
    """What was written."""

    files: tuple[str, ...]
    voices: tuple[str, ...]
    num_parameters: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Model:
    """The stages and what they say of themselves; no parameter is read yet."""

    place: str  # what errors call it
    runs: dict[str, pathlib.Path]
    kept: KeptFiles
    voices: dict[str, pathlib.Path]
    lm: TextSpeechLmConfig
    flow: FlowMatchingConfig
    hift: HiftVocoderConfig  # with log-mel counted from 0
    tokenizer: TextTokenizer
    hashes: dict[str, str]  # of the two encoders; "": not known
    lora: str  # side file that is merged into the language model

    def is_unchanged(self, stage: str) -> bool:
        """Whether a stage goes out as it was imported."""
        if stage == "text_speech_lm" and self.lora:  # the run is the import's, what is made of it is not
            return False
        return self.kept.is_unchanged(stage, self.runs.get(stage))


def export_official(
    model: str | os.PathLike[str] | None, out: str | os.PathLike[str], options: OfficialOptions = OfficialOptions()
) -> OfficialResult:
    """Writes the official form of a model directory, or of the runs in `options`, to `out`: whole or not at all.

    Of each run the newest checkpoint, its moving average where it keeps one, low-rank factors merged. Peak memory is that of
    the largest file and little more. Raises UserError for stages that are missing or do not fit one another, for a model that
    the official code cannot build, for values that are not finite, and for a place that holds something.
    """
    out = pathlib.Path(out)
    if options.hift_names not in ("", *HIFT_NAMES):
        raise UserError(f"--hift_names {options.hift_names}: choose {' or '.join(HIFT_NAMES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists already; give a new place")
    found = _look(model, options)
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    with staged_directory(out) as place:
        _write_yaml(found, place)
        # The largest first: what stays of the others in memory would come on top.
        count = _write_lm(found, place, mesh)
        count += _write_flow(found, place, mesh) + _write_vocoder(found, place, mesh, options.hift_names)
        _write_encoders(found, place)
        voices = _write_voices(found, place)
        _write_kept(found, place)
        files = tuple(sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()))
    return OfficialResult(files=files, voices=voices, num_parameters=count)


def _look(model: str | os.PathLike[str] | None, options: OfficialOptions) -> _Model:
    """Finds every stage, and holds what they say of one another together."""
    place = pathlib.Path(model) if model is not None else None
    kept = load_kept(place) if place is not None else KeptFiles(pathlib.Path(), {})
    runs = {}
    for stage in STAGES:
        given = options.runs.get(stage)
        is_kept = kept.find(FILE_OF[stage]) is not None
        if given:
            run = pathlib.Path(given)
            task = load_run(run)["config"].get("task")
            if task != stage:
                raise UserError(f"--{stage} {run}: is a run of {task or 'no known stage'}; give one of {stage}")
            runs[stage] = run
        elif place is None:
            raise UserError(f"--{stage} is missing; give its run, or the model directory that has it")
        elif not (stage in _ENCODERS and is_kept and not has_stage(place, stage)):
            runs[stage] = stage_run(place, stage)
    run, flow_run, hift_run = (runs[stage] for stage in ("text_speech_lm", "flow_matching", "hift_vocoder"))
    described = load_run(run)
    hift = hift_vocoder_config(load_run(hift_run), hift_run)
    found = _Model(
        place=str(place if place is not None else run),
        runs=runs,
        kept=kept,
        voices=voices_in(place / VOICES) if place is not None else {},
        lm=text_speech_lm_config(described, run),
        flow=flow_matching_config(load_run(flow_run), flow_run),
        hift=dataclasses.replace(hift, mel_origin=0.0),
        tokenizer=find_text_tokenizer(described, run),
        hashes={stage: "" if stage in runs else kept.fingerprints[stage] for stage in _ENCODERS},
        lora=options.lora,
    )
    _require_fit(found)
    return found


def _require_fit(found: _Model) -> None:
    """Raises UserError for stages that do not go together, and for what the official code cannot build."""
    run, flow_run = found.runs["text_speech_lm"], found.runs["flow_matching"]
    if found.tokenizer.vocabulary_size > found.lm.backbone.vocabulary_size:
        raise UserError(f"{run}: has fewer text embeddings than its tokenizer has tokens; train it again")
    if found.flow.num_speech_tokens != found.lm.num_speech_tokens:
        raise UserError(
            f"{flow_run}: reads {found.flow.num_speech_tokens} speech tokens, and {run} makes {found.lm.num_speech_tokens};"
            " give runs on one speech tokenizer"
        )
    describe_sizes(found.lm, found.flow, found.hift)
    learnt = {stage: load_run(found.runs[stage])["facts"].get("speech_tokenizer", "") for stage in _LEARN_TOKENS}
    if len({value for value in learnt.values() if value}) > 1:
        said = " and ".join(f"{found.runs[stage]} of {value[:_SHOWN]}" for stage, value in learnt.items())
        raise UserError(f"{said} learnt from tokens of different speech tokenizers; give runs on one")
    warn_of_differences(run, load_run(run)["facts"].get("prefix", "none"), flow_run, found.flow)


def _write_encoders(found: _Model, place: pathlib.Path) -> None:
    """The two graphs, of runs or as they were; notes the hashes of what made tokens and embeddings."""
    for stage, file in _ENCODERS.items():
        kept = found.kept.find(file)
        if stage not in found.runs:
            assert kept is not None
            shutil.copyfile(kept, place / file)
        elif stage == "speech_tokenizer":
            tokenizer = load_tokenizer(found.runs[stage])
            if tokenizer.config.num_codes != found.lm.num_speech_tokens:
                raise UserError(
                    f"{found.runs[stage]}: has {tokenizer.config.num_codes} codes, and the language model"
                    f" {found.lm.num_speech_tokens} speech tokens; give the run that made its tokens"
                )
            found.hashes[stage] = tokenizer.hash
            write_speech_tokenizer_onnx(place / file, tokenizer.config, tokenizer.params)
        else:
            encoder = load_speaker_encoder(found.runs[stage])
            found.hashes[stage] = encoder.hash
            arrays = {"encoder": encoder.params["encoder"], "norms": encoder.model_state["norms"]}
            write_campplus_onnx(place / file, encoder.config, arrays)
    for stage in _LEARN_TOKENS:
        learnt, ours = (
            load_run(found.runs[stage])["facts"].get("speech_tokenizer", ""),
            found.hashes["speech_tokenizer"],
        )
        if learnt and ours and learnt != ours:
            raise UserError(
                f"{found.runs[stage]}: learnt from tokens of {learnt[:_SHOWN]}, but the speech tokenizer is"
                f" {ours[:_SHOWN]}; give the run that made its tokens"
            )
    flow, ours = found.runs["flow_matching"], found.hashes["speaker_encoder"]
    learnt = learnt_encoder(flow)
    if learnt == STAND_IN:
        logging.warning("%s: was trained on stand-ins made of names and knows no embeddings of speaker encoders", flow)
    elif learnt and ours and learnt != ours:
        raise UserError(
            f"{flow}: learnt from embeddings of speaker encoder {learnt[:_SHOWN]}, but the directory's is {ours[:_SHOWN]};"
            " give the run that made its embeddings"
        )


def _write_vocoder(found: _Model, place: pathlib.Path, mesh: Mesh, names: str) -> int:
    config, params = load_vocoder(found.runs["hift_vocoder"], mesh)
    config, params = count_from_zero(config, params) if config.mel_origin else (config, params)
    source = found.kept.find(HIFT_FILE)
    write_hift(place / HIFT_FILE, config, params, names=names, kept=HiftReader(source) if source else None)
    return _count(params)


def _write_flow(found: _Model, place: pathlib.Path, mesh: Mesh) -> int:
    """flow.pt, and its velocity network as a graph: the kept one if it still is of these weights."""
    config, params = load_flow(found.runs["flow_matching"], mesh)
    write_flow(place / FLOW_FILE, params)
    kept = found.kept.find(ESTIMATOR)
    if kept is not None and found.is_unchanged("flow_matching") and still_sound(kept):
        shutil.copyfile(kept, place / ESTIMATOR)
    else:
        write_estimator_onnx(place / ESTIMATOR, config, params)
    return _count(params)


def _write_lm(found: _Model, place: pathlib.Path, mesh: Mesh) -> int:
    """llm.pt and the Qwen2 directory, of which upstream reads sizes and tokenizer."""
    run = found.runs["text_speech_lm"]
    params, _ = load_params(run, functools.partial(init_params, found.lm), mesh, ema=True, lora_file=found.lora)
    write_llm(place / LLM_FILE, params)
    kept = found.kept.find(BACKBONE)
    if kept is not None and _still_fits(kept, found):
        shutil.copytree(kept, place / BACKBONE, ignore=shutil.ignore_patterns(".*"))
    else:
        finish = functools.partial(_finish_backbone, found.tokenizer)
        save_backbone(params, found.lm.backbone, place / BACKBONE, dtype="bfloat16", finish=finish)
    return _count(params)


def _finish_backbone(tokenizer: TextTokenizer, place: pathlib.Path) -> None:
    """Adds the tokenizer, and has the model built in fp32: its weights, short as upstream's, all give way to llm.pt's."""
    tokenizer.save(place)
    config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
    config |= dict.fromkeys(("torch_dtype", "dtype"), "float32")
    (place / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _still_fits(kept: pathlib.Path, found: _Model) -> bool:
    """Whether a Qwen2 directory has the sizes and the tokenizer of the language model, and weights at all."""
    theirs = read_backbone_config(kept)
    ours = dataclasses.replace(
        found.lm.backbone, remat=theirs.remat, scan_layers=theirs.scan_layers, dtype=theirs.dtype
    )
    if theirs != ours or load_text_tokenizer(kept).hash != found.tokenizer.hash:
        return False
    try:
        return check_backbone_files(kept, theirs)
    except UserError as error:
        logging.warning("%s; a new one is written", error)
        return False


def _write_yaml(found: _Model, place: pathlib.Path) -> None:
    """cosyvoice2.yaml: the kept one while what it says still holds, else a new one."""
    kept, sizes = found.kept.find(YAML), describe_sizes(found.lm, found.flow, found.hift)
    if kept is not None:
        lines = differing_sizes(YamlSizes(read_yaml(kept), kept), sizes)
        if not lines:
            shutil.copyfile(kept, place / YAML)
            return
        logging.warning("%s: no longer holds (%s); a new one is written", kept, "; ".join(lines))
    (place / YAML).write_text(make_yaml(sizes), encoding="utf-8")


def _write_voices(found: _Model, place: pathlib.Path) -> tuple[str, ...]:
    """spk2info.pt of the directory's voices; an entry that a voice was made of, and still is the same, as it was."""
    source = found.kept.find(SPEAKERS)
    known = read_speakers(source) if source is not None else {}
    entries = {}
    for stem, path in found.voices.items():
        voice, speaker = load_voice(path), speaker_of(stem)
        require_voice(
            voice, speech_tokenizer=found.hashes["speech_tokenizer"], speaker_encoder=found.hashes["speaker_encoder"]
        )
        if len(voice.speaker_embedding) != found.flow.speaker_dim:
            raise UserError(
                f"{path}: has an embedding of {len(voice.speaker_embedding)}, and the flow takes"
                f" {found.flow.speaker_dim}; enroll it again with this model"
            )
        entries[speaker] = entry_of(voice, found.tokenizer)
        if speaker in known and same_voice(voice, voice_of(speaker, known[speaker], found.tokenizer, found.hashes)):
            entries[speaker] = known[speaker]
    if entries or source is not None:
        order = [name for name in known if name in entries]  # as it was
        names = [*order, *(name for name in entries if name not in order)]
        write_speakers(place / SPEAKERS, {name: entries[name] for name in names})
        return tuple(names)
    return ()


def _write_kept(found: _Model, place: pathlib.Path) -> None:
    """What else the import kept; what was made of weights only while these are the same."""
    stale = []
    for name in found.kept.names:
        if name in _WRITTEN or name == ESTIMATOR or name.startswith(f"{BACKBONE}/"):
            continue
        stage, source = derived_from(name), found.kept.place / name
        if stage is not None and not found.is_unchanged(stage):
            stale.append(name)
            continue
        target = place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    if stale:
        logging.warning("%s: left out, since they were made of other weights: %s", found.kept.place, ", ".join(stale))


def _count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
