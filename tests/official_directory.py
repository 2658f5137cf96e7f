"""Random official model directories of any size, written by torch itself; needs the extra [official]."""

import collections
import json
import math
import pathlib
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cv2jax.convert.flow import flow_rules
from cv2jax.convert.hift import hift_rules, weight_norm_style
from cv2jax.convert.official import llm_rules
from cv2jax.convert.official_sizes import describe_sizes
from cv2jax.convert.official_template import make_yaml
from cv2jax.convert.onnx_graphs import write_campplus_onnx, write_speech_tokenizer_onnx
from cv2jax.convert.qwen import backbone_rules
from cv2jax.convert.rules import foreign_tensors
from cv2jax.convert.weight_norm import unfold_tensors
from cv2jax.models.flow_matching.model import init_params as init_flow
from cv2jax.models.hift_vocoder.model import init_params as init_hift
from cv2jax.models.speaker_encoder import model as speaker_model
from cv2jax.models.speech_tokenizer.tokenize import init_encoding_params
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig
from cv2jax.models.text_speech_lm.model import init_params as init_lm
from cv2jax.models.text_speech_lm.qwen2 import HF_FIELDS
from cv2jax.text.tokenizer import train_text_tokenizer

TABLE, HEAD = "llm.model.model.embed_tokens.weight", "llm.model.lm_head.weight"


def shapes_of(lm, flow, hift):
    """{file: {official name: shape}} of three models."""
    abstract = lambda init, config: nn.unbox(jax.eval_shape(lambda key: init(config, key), jax.random.key(0)))  # noqa: E731
    folded = foreign_tensors(hift_rules(hift), abstract(init_hift, hift), "hift")
    files = {
        "llm.pt": foreign_tensors(llm_rules(), abstract(init_lm, lm), "llm"),
        "flow.pt": foreign_tensors(flow_rules(), abstract(init_flow, flow), "flow"),
        "hift.pt": unfold_tensors(folded, weight_norm_style),
    }
    return {file: {name: tuple(t.shape) for name, t in tensors.items()} for file, tensors in files.items()}


def random_state_dict(shapes, seed):
    """Tensors that no two of are alike; weight norms' g positive."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors = collections.OrderedDict()
    for name, shape in shapes.items():
        tensors[name] = torch.randn(shape, generator=generator)
        if name.endswith(("original0", "weight_g", "alpha")):
            tensors[name].abs_().add_(0.1)
        if name == TABLE:
            tensors[HEAD] = tensors[name]
    return tensors


def write_directory(directory, lm, flow, hift, tokenizer, speaker, *, seed=0, text_tokenizer=None):
    """An official directory of these configs with random tensors; returns its path.

    `text_tokenizer`: a directory to take it from; None: a small one, and no weights of the backbone.
    """
    import torch

    directory.mkdir(parents=True)
    for number, (file, shapes) in enumerate(shapes_of(lm, flow, hift).items()):
        torch.save(random_state_dict(shapes, seed + number), directory / file)
    (directory / "cosyvoice2.yaml").write_text(make_yaml(describe_sizes(lm, flow, hift)))
    write_backbone(directory / "CosyVoice-BlankEN", lm.backbone, text_tokenizer)
    rng = np.random.default_rng(seed)
    params = random_tree(jax.eval_shape(lambda key: init_encoding_params(tokenizer, key), jax.random.key(0)), rng)
    write_speech_tokenizer_onnx(directory / "speech_tokenizer_v2.onnx", tokenizer, params)
    encoder = random_tree(jax.eval_shape(lambda key: speaker_model.init_params(speaker, key), jax.random.key(0)), rng)
    norms = random_tree(jax.eval_shape(lambda: speaker_model.init_model_state(speaker)), rng)["norms"]
    norms = jax.tree.map(lambda a: np.abs(a) + np.float32(0.5), norms)
    write_campplus_onnx(directory / "campplus.onnx", speaker, {"encoder": encoder["encoder"], "norms": norms})
    return directory


def write_backbone(place: pathlib.Path, backbone, text_tokenizer=None):
    """A CosyVoice-BlankEN of that size."""
    sizes = {theirs: getattr(backbone, ours) for theirs, ours in HF_FIELDS.items()}
    fixed = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True}
    if text_tokenizer is None:
        train_text_tokenizer(["one two"], 300, single_chinese=False).save(place)
    else:
        shutil.copytree(text_tokenizer, place)
        write_backbone_weights(place / "model.safetensors", backbone)
    (place / "config.json").write_text(json.dumps(sizes | fixed))


def write_backbone_weights(path: pathlib.Path, backbone):
    """Zeros in bf16, as many as official: upstream's llm.pt replaces all of them. A sparse file at any size."""
    init = lambda key: init_lm(TextSpeechLmConfig(backbone=backbone), key)  # noqa: E731
    params = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
    parts = {part: params[part] for part in ("text_embedding", "backbone")}
    header, end = {}, 0
    for name, tensor in foreign_tensors(backbone_rules(), parts, str(path)).items():
        start, end = end, end + 2 * math.prod(tensor.shape)
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    data = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + end)


def random_tree(abstract, rng):
    """Normal fp32 arrays in the shapes of a tree; integers 0."""

    def draw(a):
        return rng.normal(size=a.shape).astype(np.float32) if a.dtype == jnp.float32 else np.zeros(a.shape, a.dtype)

    return jax.tree.map(draw, nn.unbox(abstract))


def same_tensors(one, other):
    """What differs between two state dicts, bit for bit; sorted; [] if nothing."""
    import torch

    different = sorted(set(one) ^ set(other))
    for name in set(one) & set(other):
        a, b = one[name], other[name]
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(_bits(a), _bits(b)):
            different.append(name)
    return sorted(different)


def _bits(tensor):
    import torch

    return tensor.contiguous().view(torch.int32) if tensor.dtype == torch.float32 else tensor
