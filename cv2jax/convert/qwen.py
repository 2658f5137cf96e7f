"""Hugging Face Qwen2 and Qwen2.5 directories to the text embedding and backbone of the language model, and back."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from absl import logging
from jaxtyping import PyTree, Shaped

from cv2jax.config import UserError
from cv2jax.convert.extras import refuse_pointer
from cv2jax.convert.rules import (
    ForeignTensor,
    Index,
    Reader,
    Rule,
    Shape,
    check_tensors,
    fold_names,
    foreign_tensors,
    load_tree,
)
from cv2jax.convert.staging import staged_directory
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig, init_params
from cv2jax.models.text_speech_lm.qwen2 import HF_FIELDS, Qwen2Config, config_from_hf

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TEXT_HEAD = "lm_head.weight"
_PARTS = ("text_embedding", "backbone")  # what of the model's parameters is Qwen2's
# How the backbone is run, not what it is.
_NOT_IN_FILES = ("remat", "scan_layers", "dtype")
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def backbone_rules(prefix: str = "model.") -> tuple[Rule, ...]:
    """The table for a Qwen2 whose names start with `prefix` (spec/official.md 8.1 has them behind `llm.model.model.`)."""
    layer, block = prefix + "layers.{layer}.", "backbone/blocks[{layer}]/"

    def projection(theirs: str, ours: str) -> tuple[Rule, Rule]:
        at = f"{layer}self_attn.{theirs}_proj."
        kernel = Rule(foreign=at + "weight", ours=f"{block}attention/{ours}/kernel", axes="(h c) d -> d h c")
        return kernel, Rule(foreign=at + "bias", ours=f"{block}attention/{ours}/bias", axes="(h c) -> h c")

    out = f"{layer}self_attn.o_proj.weight"
    return (
        Rule(foreign=prefix + "embed_tokens.weight", ours="text_embedding"),
        *projection("q", "query"),
        *projection("k", "key"),
        *projection("v", "value"),
        Rule(foreign=out, ours=f"{block}attention/out/kernel", axes="d (h c) -> h c d"),
        Rule(foreign=layer + "mlp.{name}_proj.weight", ours=block + "mlp/{name}/kernel", axes="o i -> i o"),
        Rule(foreign=f"{layer}input_layernorm.weight", ours=f"{block}attention_norm/scale"),
        Rule(foreign=f"{layer}post_attention_layernorm.weight", ours=f"{block}mlp_norm/scale"),
        Rule(foreign=prefix + "norm.weight", ours="backbone/final_norm/scale"),
    )


class SafetensorsReader:
    """The tensors of a directory with `model.safetensors`, or with an index and its shards; use it in a `with`.

    Raises UserError, naming the file, for a directory without weights, a damaged file, an index that does not fit its shards.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self.place = str(directory)
        self._stack = contextlib.ExitStack()
        self._files: dict[str, Any] = {}  # tensor → the open file that has it
        with contextlib.ExitStack() as opened:
            single = directory / WEIGHTS
            names = None if single.is_file() else _read_index(directory)
            for path in [single] if names is None else sorted({directory / file for file in names.values()}):
                file = opened.enter_context(_open(path))
                self._files |= dict.fromkeys(file.keys(), file)
            if names is not None and set(names) != set(self._files):
                apart = ", ".join(fold_names(sorted(set(names) ^ set(self._files))))
                raise UserError(f"{directory / INDEX}: does not fit its shards (only on one side: {apart}); copy again")
            self._stack = opened.pop_all()

    def __enter__(self) -> "SafetensorsReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names(self) -> Mapping[str, tuple[Shape, np.dtype]]:
        """Shape and dtype of every tensor; UserError for a dtype that is neither a float of 16 to 64 bits nor an integer."""
        return {name: self._describe(name) for name in self._files}

    def _describe(self, name: str) -> tuple[Shape, np.dtype]:
        found = self._files[name].get_slice(name)
        dtype = _DTYPES.get(found.get_dtype())
        if dtype is None:
            raise UserError(f"{self.place}: {name} is {found.get_dtype()}; give weights in fp32, bf16 or fp16")
        return tuple(found.get_shape()), dtype

    def read(self, name: str, index: Index) -> Shaped[np.ndarray, "..."]:
        """The block `index` (one slice an axis) of a tensor, in its own dtype."""
        return self._files[name].get_slice(name)[index] if index else self._files[name].get_tensor(name)


def _read_index(directory: pathlib.Path) -> dict[str, str]:
    """Tensor → file, as the index of a sharded directory has it."""
    if not (directory / INDEX).is_file():
        raise UserError(
            f"{directory}: no weights ({WEIGHTS}, or {INDEX} with its shards); give a directory that has them"
        )
    names = read_json(directory / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise UserError(f"{directory / INDEX}: is damaged (no weight_map); copy it again")
    # An index must not make us open what is not beside it; a shard may be a link, as in the caches of the hub.
    outside = sorted({file for file in names.values() if pathlib.PurePath(file).name != file})
    if outside:
        raise UserError(f"{directory / INDEX}: names {outside[0]!r}, which is no file beside it; copy it again")
    lacking = sorted({file for file in names.values() if not (directory / file).is_file()})
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise UserError(
            f"{directory / INDEX}: names files that are not there ({', '.join(lacking[:3])}{more}); copy them"
        )
    return names


def check_safetensors(path: pathlib.Path) -> None:
    """Reads the header of a safetensors file and holds the file's length against it; UserError for a damaged one."""
    with _open(path):
        pass


def _open(path: pathlib.Path) -> Any:
    refuse_pointer(path)
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: is damaged or unreadable ({_first_line(error)}); copy it again") from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object of a JSON file; UserError, naming it, where it cannot be read or holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({_first_line(error)}); copy it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: is damaged (no object of names and values); copy it again")
    return values


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _read_hf_config(directory: pathlib.Path) -> tuple[dict[str, Any], Qwen2Config]:
    """(config.json as it is, our config)."""
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(f"{directory}: no {CONFIG}; give the directory of a Qwen2 or Qwen2.5 model")
    values = read_json(path)
    try:
        return values, config_from_hf(values, str(path))
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path}: a value is of another kind than it must be ({_first_line(error)})") from error


def read_backbone_config(directory: str | os.PathLike[str]) -> Qwen2Config:
    """The sizes of a Qwen2 directory; UserError without a config.json, for a damaged one, and for another architecture."""
    return _read_hf_config(pathlib.Path(directory))[1]


def _check_sizes(theirs: Qwen2Config, ours: Qwen2Config, place: pathlib.Path) -> None:
    names = {ours: key for key, ours in HF_FIELDS.items()}
    different = [
        f"{names[f.name]} is {getattr(theirs, f.name)}, the model's {f.name} {getattr(ours, f.name)}"
        for f in dataclasses.fields(ours)
        if f.name not in _NOT_IN_FILES and getattr(theirs, f.name) != getattr(ours, f.name)
    ]
    if different:
        raise UserError(f"{place / CONFIG}: {'; '.join(different)}; set the model's sizes to the directory's")


def load_backbone(
    directory: str | os.PathLike[str], config: Qwen2Config | None = None, abstract: PyTree = None
) -> dict[str, Any]:
    """The parameters `text_embedding` and `backbone` of a Qwen2 or Qwen2.5 directory (bf16, fp16 or fp32, tied or not).

    Each process reads only its own shards (`load_tree`). The text head of an untied model is never loaded.

    Args:
      directory: config.json and safetensors. config: sizes that the directory must have; default: those that it has.
      abstract: the model's parameters as ShapeDtypeStructs with shardings (`abstract_state`), of which the others are
        passed over; default: fp32 on the default device.

    Raises: UserError for a directory without config or weights, of another architecture or other sizes, with damaged
    files, or with tensors that are missing, too many or of another shape.
    """
    directory = pathlib.Path(directory)
    theirs = read_backbone_config(directory)
    config = config or theirs
    _check_sizes(theirs, config, directory)
    abstract = _abstract(config) if abstract is None else abstract
    with SafetensorsReader(directory) as reader:
        wanted = {part: abstract[part] for part in _PARTS}
        return load_tree(_rules_of(reader), reader, wanted, ignored=[re.escape(TEXT_HEAD)])


def check_backbone(reader: Reader, config: Qwen2Config) -> None:
    """Holds the headers of a backbone's weights against its config; UserError as `load_backbone`, of which none is read."""
    abstract = _abstract(config)
    wanted = {part: abstract[part] for part in _PARTS}
    check_tensors(_rules_of(reader), reader, wanted, ignored=[re.escape(TEXT_HEAD)])


def _rules_of(reader: Reader) -> tuple[Rule, ...]:
    # A bare Qwen2Model is saved without the prefix.
    return backbone_rules("model." if any(name.startswith("model.") for name in reader.names()) else "")


def _abstract(config: Qwen2Config) -> PyTree:
    init = lambda key: init_params(TextSpeechLmConfig(backbone=config), key)  # noqa: E731
    return nn.unbox(jax.eval_shape(init, jax.random.key(0)))


def save_backbone(
    params: Mapping[str, Any],
    config: Qwen2Config,
    directory: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    carry_from: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    finish: Callable[[pathlib.Path], None] | None = None,
) -> None:
    """Writes `text_embedding` and `backbone` of the model's parameters as a Hugging Face directory, whole or not at all.

    Args:
      params: arrays that this process can read whole; other entries are passed over. config: their sizes.
      directory: new or empty. dtype: of the tensors: float32, bfloat16 or float16.
      carry_from: the directory that the backbone came from. Its tokenizer, the rest of its config.json, and of an untied
        model its text head, which we neither have nor train, are carried through unchanged. Without it the model is
        written as tied.
      max_shard_bytes: above, the weights are several files with an index.
      finish: writes more into the directory, of which it gets the hidden place, before it appears.

    Raises: UserError for a directory that holds something or cannot be written, a `carry_from` that is unfit, and values
    that are not finite in `dtype`.
    """
    directory = pathlib.Path(directory)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype {dtype!r} of {directory}: choose float32, bfloat16 or float16")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: exists already; give a new directory")
    tensors = foreign_tensors(backbone_rules(), {part: params[part] for part in _PARTS}, str(directory))
    to_write = {name: _cast(name, tensor, np.dtype(dtype)) for name, tensor in tensors.items()}
    with contextlib.ExitStack() as stack:
        values: dict[str, Any] = {}
        source = None if carry_from is None else pathlib.Path(carry_from)
        if source is None:
            logging.warning("%s: written with tied embeddings; an untied text head needs carry_from", directory)
        else:
            values, theirs = _read_hf_config(source)
            _check_sizes(theirs, config, source)
            if not values.get("tie_word_embeddings", False):
                reader = stack.enter_context(SafetensorsReader(source))
                to_write[TEXT_HEAD] = _carried_head(reader, (config.vocabulary_size, config.width))
        with staged_directory(directory) as place:
            text = json.dumps(_hf_config(config, values, dtype), indent=2, sort_keys=True)
            (place / CONFIG).write_text(text + "\n", encoding="utf-8")
            _write_weights(place, to_write, max_shard_bytes)
            for name in CARRIED:
                if source is not None and (source / name).is_file():
                    shutil.copyfile(source / name, place / name)
            if finish is not None:
                finish(place)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Output:
    """A tensor to write."""

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def _cast(name: str, tensor: ForeignTensor, dtype: np.dtype) -> _Output:
    def read() -> np.ndarray:
        with np.errstate(over="ignore"):
            values = tensor.read().astype(dtype)
        if not np.isfinite(values).all():
            raise UserError(f"{name}: has values that are not finite in {dtype}; nothing was written")
        return values

    return _Output(shape=tensor.shape, dtype=dtype, read=read)


def _carried_head(reader: SafetensorsReader, shape: Shape) -> _Output:
    theirs, dtype = reader.names().get(TEXT_HEAD, ((), np.dtype(np.float32)))
    if theirs != shape:
        raise UserError(
            f"{reader.place}: {TEXT_HEAD} is {list(theirs) or 'missing'}, an untied model has {list(shape)}"
        )
    return _Output(
        shape=shape, dtype=dtype, read=lambda: reader.read(TEXT_HEAD, (slice(0, shape[0]), slice(0, shape[1])))
    )


def _hf_config(config: Qwen2Config, carried: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json, with the keys of the carried one; a new one spells what transformers 4 and 5 call differently twice."""
    sizes = {theirs: getattr(config, ours) for theirs, ours in HF_FIELDS.items()}
    rope = {"rope_theta": sizes["rope_theta"], "rope_type": "default"}
    if carried:
        both = [key for key in ("torch_dtype", "dtype") if key in carried] or ["torch_dtype"]
        if "rope_parameters" in carried and "rope_theta" not in carried:
            del sizes["rope_theta"]
        return {**carried, **sizes, **dict.fromkeys(both, dtype)}
    fixed = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"}
    names = {"max_position_embeddings": 32768, "tie_word_embeddings": True, "rope_parameters": rope}
    return {**fixed, **sizes, **names, "torch_dtype": dtype, "dtype": dtype}


def _write_weights(place: pathlib.Path, tensors: Mapping[str, _Output], max_shard_bytes: int) -> None:
    shards: list[dict[str, _Output]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.num_bytes
    if len(shards) == 1:
        _write_safetensors(place / WEIGHTS, shards[0])
        return
    files = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(place / file, shard)
        files |= dict.fromkeys(shard, file)
    total = sum(tensor.num_bytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    (place / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_safetensors(path: pathlib.Path, tensors: Mapping[str, _Output]) -> None:
    """One tensor at a time; the package's own writer wants all of them in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.num_bytes
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of eight
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.read().tobytes())
        file.flush()
        os.fsync(file.fileno())
