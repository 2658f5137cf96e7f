"""Looks into the files of an official model directory that no run is made of, and that go out again as they are."""

import pathlib

from absl import logging

from cv2jax.config import UserError
from cv2jax.convert.onnx_file import OnnxFile
from cv2jax.convert.qwen import INDEX, WEIGHTS, SafetensorsReader, check_backbone, read_json
from cv2jax.convert.torch_file import TorchReader
from cv2jax.models.text_speech_lm.qwen2 import Qwen2Config

_TORCH_WEIGHTS = "pytorch_model.bin"
_GENERATION = "generation_config.json"
# spec/official.md 1.4
_ESTIMATOR_INPUTS = {"x", "mask", "mu", "t", "spks", "cond"}


def check_backbone_files(directory: pathlib.Path, config: Qwen2Config) -> bool:
    """Whether a Qwen2 directory has weights: tensors are held against `config`, by their headers alone.

    Raises UserError, naming file or tensors, for what is damaged or of another size; upstream reads these files before
    llm.pt's tensors replace theirs.
    """
    if (directory / _GENERATION).is_file():
        read_json(directory / _GENERATION)
    if any((directory / name).is_file() for name in (WEIGHTS, INDEX)):
        with SafetensorsReader(directory) as reader:
            check_backbone(reader, config)
        return True
    if (directory / _TORCH_WEIGHTS).is_file():
        check_backbone(TorchReader(directory / _TORCH_WEIGHTS), config)
        return True
    return False


def check_estimator(path: pathlib.Path) -> None:
    """Reads the structure of a `flow.decoder.estimator.fp32.onnx`; UserError for a damaged one, a warning for another graph."""
    file = OnnxFile(path)
    inputs = {value.name for value in file.model.graph.input}
    if not inputs >= _ESTIMATOR_INPUTS:
        said = ", ".join(sorted(_ESTIMATOR_INPUTS - inputs))
        logging.warning("%s: is not the flow's velocity network (has no input %s); it is carried through", path, said)


def still_sound(path: pathlib.Path) -> bool:
    """Whether a kept estimator can go out as it is; a line in the log where not."""
    try:
        check_estimator(path)
    except UserError as error:
        logging.warning("%s; a new one is written", error)
        return False
    return True
