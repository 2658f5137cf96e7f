"""What a bundle is made of: each stage's config, facts and parameters, from a model directory or from another bundle."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from cv2jax.audio.mel import FLOW_MEL, MelDefinition
from cv2jax.config import MeshConfig, UserError, from_dict
from cv2jax.models.flow_matching.config import FlowMatchingConfig
from cv2jax.models.flow_matching.generate import choose_mask
from cv2jax.models.hift_vocoder.config import HiftVocoderConfig
from cv2jax.models.speaker_encoder.config import SpeakerEncoderConfig
from cv2jax.models.speaker_encoder.model import inference_config
from cv2jax.models.speech_tokenizer.config import SpeechTokenizerConfig
from cv2jax.models.speech_tokenizer.model import ENCODING_PARTS
from cv2jax.models.text_speech_lm.decode import decoder_config, decoder_params
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig, init_params
from cv2jax.nn.chunks import ChunkMask
from cv2jax.parallel.mesh import make_mesh
from cv2jax.synthesis.bundle import MEL, SPEAKER, SPEECH, TOKENS, WAVE
from cv2jax.synthesis.bundle_files import PARAMETERS, TOKENIZER, VOICES, check_files, read_arrays, read_manifest
from cv2jax.synthesis.voice import voices_in
from cv2jax.tasks.encoders import load_speaker_encoder, load_tokenizer
from cv2jax.tasks.model_directory import (
    STAND_IN,
    has_stage,
    learnt_encoder,
    require_same_encoder,
    require_same_tokenizer,
    stage_run,
)
from cv2jax.tasks.model_directory import VOICES as MODEL_VOICES
from cv2jax.tasks.trained import find_text_tokenizer, load_flow, load_params, load_vocoder, text_speech_lm_config
from cv2jax.text.tokenizer import TextTokenizer, load_text_tokenizer
from cv2jax.train.run import load_run

CONFIGS: dict[str, type] = {
    SPEECH: TextSpeechLmConfig,
    MEL: FlowMatchingConfig,
    WAVE: HiftVocoderConfig,
    TOKENS: SpeechTokenizerConfig,
    SPEAKER: SpeakerEncoderConfig,
}
# Of an inference's parameters these are computed with in fp32, whatever the products' type.
_FLOAT32 = ("scale", "bias", "head_bias")
_CAST_STAGES = (SPEECH, MEL)  # ids of a tokenizer, an embedding to compare by, a phase: all these take fp32


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One stage.

    Attributes:
      config: of the model, computing in fp32. load: reads the parameters, a nested dict; nothing keeps them.
      facts: what the model itself does not know: hashes, the prefix of its training, a mel's definition.
    """

    config: Any
    load: Callable[[], Any]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """All stages by name, the text tokenizer, voices by name; of a bundle, where its golden answers lie, and its sizes."""

    stages: dict[str, Part]
    text_tokenizer: TextTokenizer
    normalizer: str
    mask: ChunkMask
    voices: dict[str, pathlib.Path]
    dtype: str = "float32"  # of the parameters
    golden: pathlib.Path | None = None
    sizes: dict[str, Any] | None = None
    stand_ins: bool = False  # whether the flow learnt from stand-ins for speaker embeddings


def parts_of_model(model: str | os.PathLike[str]) -> Parts:
    """The newest checkpoints of a model directory, their moving averages where a run keeps one.

    Raises UserError for a directory that lacks a language model, flow or vocoder, and for stages that do not fit.
    """
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    run = stage_run(model, SPEECH)
    described = load_run(run)
    config, facts = text_speech_lm_config(described, run), described["facts"]
    stages = {
        SPEECH: Part(
            config=config,
            load=lambda: _local(load_params(run, functools.partial(init_params, config), mesh, ema=True)[0]),
            facts={
                "prefix": facts.get("prefix", "none"),
                "text_tokenizer": facts["text_tokenizer"],
                "speech_tokenizer": facts.get("speech_tokenizer", ""),
            },
        )
    }
    encoders = _encoder_parts(model)
    stages |= {MEL: _mel_part(model, mesh, encoders), WAVE: _wave_part(model, mesh)} | encoders
    return Parts(
        stages=stages,
        text_tokenizer=find_text_tokenizer(described, run),
        normalizer=facts.get("normalizer", ""),
        mask=choose_mask(stages[MEL].config),
        voices=voices_in(pathlib.Path(model, MODEL_VOICES)),
        stand_ins=learnt_encoder(stage_run(model, MEL)) == STAND_IN,
    )


def _local(tree: Any) -> Any:
    """Arrays without a mesh."""
    device = jax.local_devices()[0]
    return jax.tree.map(lambda a: jax.device_put(a, device), nn.unbox(tree))


def _mel_part(model: str | os.PathLike[str], mesh: Any, encoders: dict[str, Part]) -> Part:
    run = stage_run(model, MEL)
    described = load_run(run)
    kept = {"dtype": "float32", "scan_layers": described["config"]["model"]["scan_layers"]}
    learnt = learnt_encoder(run)
    encoder = "" if learnt == STAND_IN else learnt
    if SPEAKER in encoders:
        encoder = encoders[SPEAKER].facts["hash"]
        require_same_encoder(model, encoder)
    facts = {
        "mel_definition": FLOW_MEL,
        "speech_tokenizer": described["facts"].get("speech_tokenizer", ""),
        "speaker_encoder": encoder,
    }
    config = from_dict(FlowMatchingConfig, described["facts"]["model"] | kept)
    return Part(config=config, load=lambda: _local(load_flow(run, mesh)[1]), facts=facts)


def _wave_part(model: str | os.PathLike[str], mesh: Any) -> Part:
    run = stage_run(model, WAVE)
    config, _ = load_vocoder(run, mesh)
    return Part(config=config, load=lambda: _local(load_vocoder(run, mesh)[1]), facts={"mel_definition": FLOW_MEL})


def _encoder_parts(model: str | os.PathLike[str]) -> dict[str, Part]:
    """Those of the encoders that the directory has; they are read for their hashes, and again by `load`: none stays."""
    parts = {}
    if has_stage(model, TOKENS):
        tokenizer = load_tokenizer(stage_run(model, TOKENS))
        require_same_tokenizer(model, tokenizer.hash)
        config = dataclasses.replace(tokenizer.config, dropout=0.0)
        load = functools.partial(_tokenizer_tree, stage_run(model, TOKENS))
        parts[TOKENS] = Part(config=config, load=load, facts={"hash": tokenizer.hash})
    if has_stage(model, SPEAKER):
        encoder = load_speaker_encoder(stage_run(model, SPEAKER))
        load = functools.partial(_encoder_tree, stage_run(model, SPEAKER))
        parts[SPEAKER] = Part(config=inference_config(encoder.config), load=load, facts={"hash": encoder.hash})
    return parts


def _tokenizer_tree(run: pathlib.Path) -> dict[str, Any]:
    tokenizer = load_tokenizer(run)
    tree = {"params": {part: tokenizer.params[part] for part in ENCODING_PARTS if part in tokenizer.params}}
    return tree | ({"codebook": tokenizer.model_state.codebook} if tokenizer.config.quantizer == "vq" else {})


def _encoder_tree(run: pathlib.Path) -> dict[str, Any]:
    encoder = load_speaker_encoder(run)
    return {"encoder": encoder.params["encoder"], "norms": encoder.model_state["norms"]}


def parts_of_bundle(path: str | os.PathLike[str]) -> Parts:
    """What a bundle was made of, from the bundle alone; its programs are not looked at, however old they are.

    Raises UserError as `read_manifest` and `check_files`.
    """
    place, manifest = pathlib.Path(path), read_manifest(path)
    check_files(place, manifest)
    stages = {}
    for name, about in manifest["source"]["stages"].items():
        facts = dict(about["facts"])
        if "mel_definition" in facts:
            facts["mel_definition"] = MelDefinition(**facts["mel_definition"])
        file = place / PARAMETERS / f"{name}.safetensors"
        stages[name] = Part(
            config=from_dict(CONFIGS[name], about["config"]),
            load=functools.partial(_load_tree, file),
            facts=facts,
        )
    return Parts(
        stages=stages,
        text_tokenizer=load_text_tokenizer(place / TOKENIZER),
        normalizer=manifest["normalizer"],
        mask=ChunkMask(**manifest["mask"]),
        voices=voices_in(place / VOICES),
        dtype=manifest["dtype"],
        golden=place,
        sizes=manifest["sizes"],
        stand_ins=manifest["stand_ins"],
    )


def _load_tree(file: pathlib.Path) -> Any:
    return unflatten({name: jax.device_put(np.asarray(array)) for name, array in read_arrays(file).items()})


def served_config(name: str, config: Any, dtype: str) -> Any:
    """The config that programs of a bundle of this type compute by."""
    if name == SPEECH:
        config = decoder_config(config)
        return dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, dtype=dtype))
    return dataclasses.replace(config, dtype=dtype if name in _CAST_STAGES else "float32")


def served_params(name: str, config: Any, params: Any, dtype: str) -> dict[str, Any]:
    """The parameters as a bundle's programs take them: path → array; `config` and `params` as a `Part` has them.

    Norms and what else is computed with in fp32 stays that; what would be cast at every call is cast now.
    """
    params = nn.unbox(params)
    if name == SPEECH:
        params = decoder_params(config, params)
    cast = lambda path, leaf: (  # noqa: E731
        leaf.astype(dtype)
        if name in _CAST_STAGES and path.rpartition("/")[2] not in _FLOAT32
        else leaf.astype("float32")
    )
    return {path: cast(path, leaf) for path, leaf in flatten(params).items()}


def flatten(tree: Any) -> dict[str, Any]:
    """Nested dicts as one: keys joined by slashes; other nodes of a pytree by their fields' names."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(flat: dict[str, Any]) -> Any:
    """Nested dicts whose `flatten` this is."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *above, last = path.split("/")
        place = tree
        for key in above:
            place = place.setdefault(key, {})
        place[last] = leaf
    return tree


def require_dtype(parts: Parts, dtype: str) -> None:
    """Raises UserError for a type that no bundle has, and for parameters that were rounded already and are asked whole."""
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {dtype}: choose float32 or bfloat16")
    if parts.dtype == "bfloat16" and dtype != "bfloat16":
        raise UserError(
            "--dtype float32: the bundle has its parameters in bfloat16; export the model directory instead"
        )
