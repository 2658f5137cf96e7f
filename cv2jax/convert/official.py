"""The three `.pt` files of the official model directory: their tables, their spellings, and both ways (spec/official.md 8)."""

import pathlib
from collections.abc import Mapping
from typing import Any

from absl import logging
from jaxtyping import PyTree

from cv2jax.config import UserError
from cv2jax.convert.flow import flow_rules
from cv2jax.convert.hift import PREFIX, hift_rules, weight_norm_style
from cv2jax.convert.qwen import backbone_rules
from cv2jax.convert.rules import Rule, foreign_tensors, load_tree
from cv2jax.convert.torch_file import TorchReader, write_state_dict
from cv2jax.convert.weight_norm import NEW, OLD, FoldedReader, Pair, unfold_tensors
from cv2jax.models.hift_vocoder.config import HiftVocoderConfig

LLM_FILE, FLOW_FILE, HIFT_FILE = "llm.pt", "flow.pt", "hift.pt"
HIFT_NAMES: dict[str, Pair] = {"parametrised": NEW, "weight_g": OLD}  # how a weight-normalised kernel is spelt
_TEXT_HEAD, _TEXT_TABLE = "llm.model.lm_head.weight", "llm.model.model.embed_tokens.weight"
_DISCRIMINATORS = "discriminator."  # in a GAN training's file


def llm_rules() -> tuple[Rule, ...]:
    """Every tensor of `Qwen2LM` but its text head, which is its text table, and its place in `TextSpeechLm`."""
    return (
        Rule(foreign="llm_embedding.weight", ours="special_embedding"),
        *backbone_rules("llm.model.model."),
        Rule(foreign="llm_decoder.weight", ours="head_kernel", axes="v d -> d v"),
        Rule(foreign="llm_decoder.bias", ours="head_bias"),
        Rule(foreign="speech_embedding.weight", ours="speech_embedding"),
    )


def read_llm(reader: TorchReader, abstract: PyTree) -> PyTree:
    """The language model's parameters, host arrays as `abstract` describes them, of llm.pt with or without the tied text head.

    Raises UserError as `load_tree`, and for a text head that differs from the text table: the official loader would put it in
    the table's place (spec/official.md 8.1).
    """
    names = reader.names()
    if _TEXT_HEAD in names and _TEXT_TABLE in names and not reader.same_bytes(_TEXT_HEAD, _TEXT_TABLE):
        raise UserError(
            f"{reader.place}: {_TEXT_HEAD} differs from {_TEXT_TABLE}, and the two are one in the official model; give a model"
            " with tied embeddings"
        )
    return load_tree(llm_rules(), reader, abstract, ignored=[_TEXT_HEAD], on_host=True)


def write_llm(path: pathlib.Path, params: PyTree) -> None:
    """Writes llm.pt: fp32, the text head sharing the text table's storage."""
    write_state_dict(path, foreign_tensors(llm_rules(), params, str(path)), {_TEXT_HEAD: _TEXT_TABLE})


def read_flow(reader: TorchReader, abstract: PyTree) -> PyTree:
    """The flow's parameters of flow.pt, as `abstract` describes them; UserError as `load_tree`."""
    return load_tree(flow_rules(), reader, abstract, on_host=True)


def write_flow(path: pathlib.Path, params: PyTree) -> None:
    """Writes flow.pt, in fp32."""
    write_state_dict(path, foreign_tensors(flow_rules(), params, str(path)))


class HiftReader(FoldedReader):
    """hift.pt with folded kernels and plain names, whether spelt with parametrisations, weight_g or behind `generator.`.

    What a GAN training's file has of discriminators is left out, with a line in the log.
    """

    def __init__(self, path: pathlib.Path) -> None:
        generator = _Generator(TorchReader(path))
        super().__init__(generator)
        self.prefix = generator.prefix

    def spelling(self, name: str) -> Pair | None:
        """How the file itself calls the two halves of a folded kernel; None of a tensor that is no pair."""
        if name not in self.pairs:
            return None
        start = len(name) - len("weight")
        g, v = self.pairs[name]
        return g[start:], v[start:]


class _Generator:
    """The tensors behind `generator.`, by their names without, where a file has such; else all."""

    def __init__(self, reader: TorchReader) -> None:
        self.place, self._reader = reader.place, reader
        theirs = reader.names()
        prefix = self.prefix = PREFIX if any(name.startswith(PREFIX) for name in theirs) else ""
        judges = [name for name in theirs if prefix and name.startswith(_DISCRIMINATORS)]
        if judges:
            logging.warning("%s: the %d tensors of its discriminators are left out", self.place, len(judges))
        self._full = {name.removeprefix(prefix): name for name in theirs if name not in set(judges)}

    def names(self) -> Mapping[str, Any]:
        """Shape and dtype of every tensor."""
        theirs = self._reader.names()
        return {name: theirs[full] for name, full in self._full.items()}

    def read(self, name: str, index: Any) -> Any:
        """The block `index` of a tensor."""
        return self._reader.read(self._full[name], index)


def read_hift(reader: HiftReader, config: HiftVocoderConfig, abstract: PyTree) -> PyTree:
    """The vocoder's parameters of hift.pt, as `abstract` describes them; UserError as `load_tree`."""
    return load_tree(hift_rules(config), reader, abstract, on_host=True)


def write_hift(
    path: pathlib.Path,
    config: HiftVocoderConfig,
    params: PyTree,
    *,
    names: str = "",
    kept: HiftReader | None = None,
) -> None:
    """Writes hift.pt, in fp32, with weight-normalised kernels as pairs.

    Args:
      path: new file. config: with mel_origin 0. params: of the generator.
      names: a key of HIFT_NAMES; "": as `kept` spells them, its `generator.` too, else parametrised.
      kept: the file that the parameters came from. A kernel that its pair still folds to, bit for bit, keeps that pair.
    """

    def style(name: str) -> Pair | None:
        known = kept.spelling(name) if kept is not None and not names else None
        return (known or HIFT_NAMES[names or "parametrised"]) if weight_norm_style(name) else None

    prefix = kept.prefix if kept is not None and not names else ""
    tensors = unfold_tensors(foreign_tensors(hift_rules(config), params, str(path)), style, kept)
    write_state_dict(path, {prefix + name: tensor for name, tensor in tensors.items()})
