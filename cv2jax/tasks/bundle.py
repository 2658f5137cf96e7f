"""Writing a bundle: parameters, programs, golden answers and the manifest, in a temporary place that the gate must let pass."""

import contextlib
import dataclasses
import datetime
import os
import pathlib
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import cv2jax
from cv2jax.audio.fbank import FBANK_RATE_HZ
from cv2jax.audio.mel import FLOW_MEL, MEL_RATE_HZ, WHISPER_RATE_HZ, mel_spectrogram
from cv2jax.config import UserError, to_dict
from cv2jax.convert.staging import staged_directory
from cv2jax.files import utf8_path
from cv2jax.models.hift_vocoder.model import hold_back
from cv2jax.models.speaker_encoder.batching import WaveformEmbedder
from cv2jax.models.speaker_encoder.model import MIN_SAMPLES
from cv2jax.models.speech_tokenizer.tokenize import make_encoder
from cv2jax.nn.signal import ENDLESS
from cv2jax.synthesis import bundle_files as files
from cv2jax.synthesis import gate
from cv2jax.synthesis.bundle import MEL, PROMPT_MEL, SPEAKER, SPEECH, TOKENS, WAVE, PromptMel, load_bundle
from cv2jax.synthesis.bundle_programs import PLATFORMS
from cv2jax.synthesis.plan import HopPlan
from cv2jax.synthesis.prompt import NonFinite
from cv2jax.synthesis.sampling import RequestSampler
from cv2jax.synthesis.stages import SpeakerStage, TokenizerStage
from cv2jax.synthesis.voice import load_voice, require_voice
from cv2jax.tasks import bundle_programs
from cv2jax.tasks.bundle_parts import Parts, require_dtype, served_config, served_params
from cv2jax.tasks.bundle_programs import Made, Program, Sizes, make_table
from cv2jax.tasks.stages import make_mel_stage, make_speech_stage, make_wave_stage

SAMPLER = RequestSampler(num_candidates=100)  # so many candidates a request may ask for


@dataclasses.dataclass(frozen=True, kw_only=True)
class BundleReport:
    """What was written: programs, bytes of all files, seconds of the export and of the gate, and what the gate found."""

    num_programs: int
    num_bytes: int
    export_seconds: float
    gate_seconds: float
    checks: list[gate.Check]


def write_bundle(
    parts: Parts,
    out: str | os.PathLike[str],
    *,
    sizes: Sizes,
    dtype: str = "float32",
    platforms: Sequence[str] = PLATFORMS,
    voices: Sequence[str | os.PathLike[str]] = (),
) -> BundleReport:
    """Writes a new directory `out`, whole, after the gate has passed on this machine; else nothing.

    Args:
      voices: files, beside those of the parts.

    Raises UserError for a type, platform, voice or place that will not do, for answers of the fp32 model that are not finite,
    and, naming the first stage that drifts, where the gate does not pass.
    """
    require_dtype(parts, dtype)
    _require_platforms(platforms)
    out = pathlib.Path(out)
    if os.path.lexists(out):
        raise UserError(f"--out {out}: exists already; give a new place")
    start = time.perf_counter()
    with staged_directory(out) as place:
        for name in (files.PARAMETERS, files.PROGRAMS, files.VOICES, files.GOLDEN):
            (place / name).mkdir()
        parts.text_tokenizer.save(place / files.TOKENIZER)
        _copy_voices(parts, voices, place)
        manifest = _manifest(parts, sizes, dtype, platforms)
        _write_stages(parts, sizes, dtype, platforms, place, manifest)
        manifest["files"] = files.describe_files(place)
        files.write_manifest(place, manifest)
        export_seconds = time.perf_counter() - start
        checks = list(gate.run_gate(place, load_bundle(place)))
        gate_seconds = time.perf_counter() - start - export_seconds
        drift = gate.first_drift(checks)
        if drift is not None:
            bound = f"more than {drift.bound:g}" if drift.bound is not None else "not finite"
            raise UserError(
                f"{out}: not written: {drift.stage} drifts from the float32 model ({drift.quantity}: relative error"
                f" {drift.error:.2e}, {bound})" + ("; export in float32" if dtype != "float32" else "")
            )
        manifest["gate"] = {
            "device": str(jax.local_devices()[0].device_kind),
            "checks": [dataclasses.asdict(check) for check in checks],
        }
        files.write_manifest(place, manifest)
    num_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return BundleReport(
        num_programs=len(manifest["programs"]),
        num_bytes=num_bytes,
        export_seconds=export_seconds,
        gate_seconds=gate_seconds,
        checks=checks,
    )


def sizes_for(parts: Parts, *, slots: int = 4, seconds: float = 60.0) -> Sizes:
    """`make_sizes` for the mask and the vocoder of these parts."""
    flush = bundle_programs.flush_frames(parts.stages[WAVE].config)
    return bundle_programs.make_sizes(parts.mask, slots=slots, seconds=seconds, flush_frames=flush)


def _require_platforms(platforms: Sequence[str]) -> None:
    unknown = [name for name in platforms if name not in PLATFORMS]
    if unknown or not platforms:
        raise UserError(f"--platforms {','.join(platforms)}: choose among {', '.join(PLATFORMS)}")
    here = export.default_export_platform()
    if here not in platforms:
        raise UserError(
            f"--platforms {','.join(platforms)}: add {here}, this machine's: the programs are tried here before they are"
            " written"
        )


def _copy_voices(parts: Parts, more: Sequence[str | os.PathLike[str]], place: pathlib.Path) -> None:
    facts = parts.stages[MEL].facts
    found = dict(parts.voices)
    for path in map(pathlib.Path, more):
        if path.stem in found:
            raise UserError(f"--voice {path}: there is a voice '{path.stem}' already; give it another file name")
        found[path.stem] = path
    for name, path in found.items():
        utf8_path(path.name, "a bundle")
        hashes = {key: facts.get(key, "") for key in ("speech_tokenizer", "speaker_encoder")}
        require_voice(load_voice(path), mel=facts["mel_definition"], **hashes)
        shutil.copyfile(path, place / files.VOICES / f"{name}.safetensors")


def _manifest(parts: Parts, sizes: Sizes, dtype: str, platforms: Sequence[str]) -> dict[str, Any]:
    source = {
        name: {"config": to_dict(_source_config(name, part.config)), "facts": _plain(part.facts)}
        for name, part in parts.stages.items()
    }
    return {
        "versions": {"cv2jax": cv2jax.__version__, "jax": jax.__version__},
        "calling_convention": jax.config.jax_export_calling_convention_version,  # pyrefly: ignore[missing-attribute]
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "dtype": dtype,
        "platforms": list(platforms),
        "mask": dataclasses.asdict(parts.mask),
        "plan": dataclasses.asdict(HopPlan()),
        "normalizer": parts.normalizer,
        "text_tokenizer": parts.text_tokenizer.hash,
        "stand_ins": parts.stand_ins,
        "sizes": _plain(dataclasses.asdict(sizes)),
        "bounds": gate.BOUNDS[dtype],
        "stages": _stage_facts(parts, sizes),
        "source": {"stages": source, "export_again": f"{files.EXPORT_AGAIN} THIS --out NEW"},
        "programs": [],
        "states": {},
    }


def _source_config(name: str, config: Any) -> Any:
    """The config that the parameters in the bundle are of."""
    return served_config(name, config, "float32")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _stage_facts(parts: Parts, sizes: Sizes) -> dict[str, Any]:
    """What `load_bundle` makes of the stages' dataclasses beside functions."""
    speech, mel, wave = (parts.stages[name] for name in (SPEECH, MEL, WAVE))
    facts: dict[str, Any] = {
        SPEECH: speech.facts
        | {
            "sampler": SAMPLER,
            "text_vocabulary_size": speech.config.backbone.vocabulary_size,
            "num_speech_tokens": speech.config.num_speech_tokens,
            "cache_lengths": sizes.cache_lengths,
            "max_positions": sizes.cache_lengths[-1],
            "num_steps": sizes.num_steps,
            "prefill_sizes": sizes.prefill_sizes,
            "slot_counts": sizes.slot_counts,
            "ratio": speech.config.ratio,
        },
        MEL: mel.facts
        | {
            "num_speech_tokens": mel.config.num_speech_tokens,
            "num_mels": mel.config.num_mels,
            "speaker_dim": mel.config.speaker_dim,
            "trained": list(mel.config.masks),
            "hop_sizes": sizes.hop_sizes,
            "rooms": sizes.rooms,
        },
        WAVE: wave.facts | {"hold_back": hold_back(wave.config), "endless": ENDLESS, "sizes": sizes.wave_sizes},
    }
    longest = {"seconds": sizes.recordings}
    if TOKENS in parts.stages:
        rate = {"rate_hz": WHISPER_RATE_HZ, "max_seconds": float(sizes.recordings[-1])}
        facts[TOKENS] = parts.stages[TOKENS].facts | rate | longest
    if _has_prompt_mel(parts):
        facts[PROMPT_MEL] = {"rate_hz": MEL_RATE_HZ} | longest
    if SPEAKER in parts.stages:
        facts[SPEAKER] = parts.stages[SPEAKER].facts | {"rate_hz": FBANK_RATE_HZ, "min_samples": MIN_SAMPLES} | longest
    return _plain(facts)


def _has_prompt_mel(parts: Parts) -> bool:
    """Whether recordings can be enrolled: the front end makes mel of one definition."""
    return TOKENS in parts.stages and parts.stages[MEL].facts["mel_definition"] == FLOW_MEL


def _write_stages(
    parts: Parts, sizes: Sizes, dtype: str, platforms: Sequence[str], place: pathlib.Path, manifest: dict[str, Any]
) -> None:
    """Parameters, golden answers and programs, one stage after the other: no two have their parameters in memory."""
    if parts.golden is not None:
        shutil.copytree(parts.golden / files.GOLDEN, place / files.GOLDEN, dirs_exist_ok=True)
    else:
        with _products(whole=True):
            _write_golden(parts, place)
    for name, part in parts.stages.items():
        arrays = served_params(name, part.config, part.load(), dtype)
        files.write_arrays(place / files.PARAMETERS / f"{name}.safetensors", sorted(arrays.items()))
        shapes = {path: jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in arrays.items()}
        del arrays
        made = _programs(name, served_config(name, part.config, dtype), sizes)
        _export_all(made, shapes, platforms, place, manifest, whole=dtype == "float32" or name not in (SPEECH, MEL))
    noise = bundle_programs.noise_programs(parts.stages[MEL].config, sizes)
    _export_all(noise, {}, platforms, place, manifest, whole=True)
    if _has_prompt_mel(parts):
        _export_all(bundle_programs.prompt_mel_programs(sizes), {}, platforms, place, manifest, whole=True)


def _programs(name: str, config: Any, sizes: Sizes) -> Made:
    if name == SPEECH:
        return bundle_programs.speech_programs(config, SAMPLER, sizes)
    makers = {
        MEL: bundle_programs.mel_programs,
        WAVE: bundle_programs.wave_programs,
        TOKENS: bundle_programs.tokenizer_programs,
        SPEAKER: bundle_programs.speaker_programs,
    }
    return makers[name](config, sizes)


def _write_golden(parts: Parts, place: pathlib.Path) -> None:
    """Questions of all stages, and what the fp32 model answers to each; no two stages are in memory at once."""
    for name in gate.ORDER:
        if name == gate.TEXT_STAGE or name in parts.stages or (name == PROMPT_MEL and _has_prompt_mel(parts)):
            gate.write_golden(place, name, *_ask_reference(parts, name))


def _ask_reference(parts: Parts, name: str) -> tuple[gate.Answer, gate.Answer]:
    stage = reference_stage(parts, name)
    question = gate.make_question(name, stage, parts.text_tokenizer, parts.mask)
    try:
        return question, gate.answer(name, stage, parts.mask, question)
    except NonFinite as error:
        raise UserError(f"{name}: the model itself, in float32, does not pass: {error}") from None


def reference_stage(parts: Parts, name: str) -> Any:
    """The stage of the model itself, in fp32; its parameters are read here."""
    if name == gate.TEXT_STAGE:
        return parts.text_tokenizer
    if name == PROMPT_MEL:
        return PromptMel(make=lambda waveform: np.asarray(mel_spectrogram(waveform[None])[0][0].T), rate_hz=MEL_RATE_HZ)
    part = parts.stages[name]
    config, params, facts = part.config, part.load(), part.facts
    if name == SPEECH:
        return make_speech_stage(config, params, SAMPLER, **facts)
    if name == MEL:
        return make_mel_stage(config, params, **facts)
    if name == WAVE:
        return make_wave_stage(config, params, facts["mel_definition"])
    if name == TOKENS:
        state = bundle_programs.tokenizer_state(config, params)
        encoder = make_encoder(config, params["params"], state, batch_seconds=1.0)
        return TokenizerStage(tokenize=lambda waveform: encoder([waveform])[0], hash=facts["hash"])
    embedder = WaveformEmbedder(config, {"encoder": params["encoder"]}, {"norms": params["norms"]}, batch_seconds=1.0)
    return SpeakerStage(embed=lambda waveform: dict(embedder([(0, waveform)]))[0], hash=facts["hash"])


def _export_all(
    made: Made,
    parameters: dict[str, Any],
    platforms: Sequence[str],
    place: pathlib.Path,
    manifest: dict[str, Any],
    *,
    whole: bool,
) -> None:
    """Writes the programs of a stage; `whole`: its products of fp32 are not rounded on accelerators."""
    programs, states = made
    shapes = {bucket: {leaf.name: leaf for leaf in make_table(state)} for bucket, state in states.items()}
    for program in programs:
        state = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in shapes.get(program.state, {}).items()
        }
        manifest["states"].setdefault(program.stage, {})
        for group in _groups(platforms) if program.by_platform else [list(platforms)]:
            full = f"{program.stage}.{program.name}"
            file = f"{full}.{'any' if not program.by_platform else '-'.join(group)}.stablehlo"
            with _lowering_for(group[0] if program.by_platform else ""), _products(whole=whole):
                # A function of its own: what jax has traced for one platform must not serve another.
                exported = export.export(jax.jit(lambda *a, f=program.function: f(*a)), platforms=group)(
                    parameters, state, program.inputs
                )
            files.write_bytes(place / files.PROGRAMS / file, bytes(exported.serialize()))
            manifest["programs"].append(_describe(program, full, file, group, exported))
    for stage in {program.stage for program in programs}:
        manifest["states"][stage] = {
            bucket: [leaf._asdict() for leaf in leaves.values()] for bucket, leaves in shapes.items()
        }


def _describe(program: Program, full: str, file: str, group: list[str], exported: export.Exported) -> dict[str, Any]:
    _, outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    shape = lambda arrays: {name: [str(a.dtype), *a.shape] for name, a in arrays.items()}  # noqa: E731
    return {
        "name": full,
        "file": file,
        "stage": program.stage,
        "state": program.state,
        "platforms": group,
        "uses_up_state": program.uses_up_state,
        "inputs": shape(program.inputs),
        "outputs": shape(outputs),
    }


def _groups(platforms: Sequence[str]) -> list[list[str]]:
    """CPUs apart from accelerators: they have other loops, caches and products."""
    groups = [[name for name in platforms if name == "cpu"], [name for name in platforms if name != "cpu"]]
    return [group for group in groups if group]


@contextlib.contextmanager
def _lowering_for(platform: str) -> Iterator[None]:
    """`cv2jax.parallel.sharding.platform` says that of this platform: a mesh that is only described, of one device."""
    kind = "gpu" if platform == "cuda" else platform
    if kind in ("", jax.default_backend()):
        yield
        return
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=kind)
    mesh = AbstractMesh((1,), ("one",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def _products(*, whole: bool) -> Any:
    return jax.default_matmul_precision("highest") if whole else contextlib.nullcontext()
