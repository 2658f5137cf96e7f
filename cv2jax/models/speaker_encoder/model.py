"""The speaker encoder as it is trained and used: parameters, statistics, embeddings, its hash."""

import dataclasses
import hashlib
import json
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from cv2jax.audio.fbank import FBANK_FRAME, FBANK_HOP
from cv2jax.models.speaker_encoder.campplus import CamPlus
from cv2jax.models.speaker_encoder.config import SpeakerEncoderConfig
from cv2jax.nn.layers import partitioned

# Three frames are the least of which a deviation can be taken; four are the least that upstream's runtime is built for.
MIN_FRAMES = 4
MIN_SAMPLES = FBANK_FRAME + (MIN_FRAMES - 1) * FBANK_HOP  # at 16 kHz: 55 ms
_HASHED_FIELDS = (
    "num_mels head_channels init_channels growth bn_size block_layers dilations embedding_dim segment_frames"
    " partial_segment"
)


def init_params(config: SpeakerEncoderConfig, key: Key[Array, ""], num_speakers: int = 0) -> PyTree:
    """fp32 parameters boxed with logical axes: `encoder` and, of so many speakers, `classes` [E, V]."""
    encoder_key, classes_key = jax.random.split(key)
    features, num_frames = jnp.zeros((1, MIN_FRAMES, config.num_mels)), jnp.full((1,), MIN_FRAMES, jnp.int32)
    variables = CamPlus(config).init(encoder_key, features, num_frames, None, training=False)
    params = {"encoder": variables["params"]}
    if num_speakers:
        init = partitioned(nn.initializers.xavier_uniform(), ("embed", "vocab"))
        params["classes"] = init(classes_key, (config.embedding_dim, num_speakers))
    return params


def init_model_state(config: SpeakerEncoderConfig) -> PyTree:
    """What training carries beside the parameters: `norms`, the batch norms' statistics, and `num_batches` seen.

    `norms` mirrors the modules, with "mean" [D] 0 and "variance" [D] 1 at each batch norm.
    """

    def trace(key: Key[Array, ""]) -> PyTree:
        features, num_frames = jnp.zeros((1, MIN_FRAMES, config.num_mels)), jnp.full((1,), MIN_FRAMES, jnp.int32)
        (_, norms), _ = CamPlus(config).init_with_output(key, features, num_frames, None, training=False)
        return norms

    shapes = jax.eval_shape(trace, jax.random.key(0))
    first = lambda path, a: jnp.full(a.shape, path[-1].key == "variance", jnp.float32)  # noqa: E731
    return {"norms": jax.tree_util.tree_map_with_path(first, shapes), "num_batches": jnp.zeros((), jnp.int32)}


def embed(
    config: SpeakerEncoderConfig,
    params: PyTree,
    model_state: PyTree,
    features: Float[Array, "B F M"],
    num_frames: Int[Array, " B"],
) -> Float[Array, "B E"]:
    """Embeddings of rows of any lengths, each as alone; raw, as upstream stores them: L2-normalise to compare.

    Rows of fewer than MIN_FRAMES frames have none: what comes for them means nothing.
    """
    variables = {"params": params["encoder"]}
    applied = CamPlus(config).apply(variables, features, num_frames, model_state["norms"], training=False)
    return typing.cast(tuple, applied)[0]


def embed_in_training(
    config: SpeakerEncoderConfig,
    params: PyTree,
    model_state: PyTree,
    features: Float[Array, "B F M"],
    num_frames: Int[Array, " B"],
) -> tuple[Float[Array, "B E"], PyTree]:
    """(embeddings normalised by the batch's statistics, the state after it); rows of 0 frames count nowhere."""
    variables = {"params": params["encoder"]}
    applied = CamPlus(config).apply(variables, features, num_frames, model_state["norms"], training=True)
    embedding, norms = typing.cast(tuple, applied)
    return embedding, {"norms": norms, "num_batches": model_state["num_batches"] + 1}


def inference_config(config: SpeakerEncoderConfig, dtype: str = "float32") -> SpeakerEncoderConfig:
    """The config without what only training needs."""
    return dataclasses.replace(config, dtype=dtype, remat="none")


def encoder_hash(config: SpeakerEncoderConfig, params: PyTree, model_state: PyTree) -> str:
    """SHA-256 over the sizes, parameters and statistics that decide an embedding."""
    fields = {name: getattr(config, name) for name in _HASHED_FIELDS.split()}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path((params["encoder"], model_state["norms"])):
        values = np.ascontiguousarray(np.asarray(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {values.dtype} {values.shape}".encode())
        digest.update(values.data)
    return digest.hexdigest()
