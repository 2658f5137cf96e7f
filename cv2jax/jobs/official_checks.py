"""Looks into the files of an official model directory that no run is made of, and that go out again as they are."""

import pathlib
import zipfile
from collections.abc import Sequence

from absl import logging

from cv2jax.config import UserError
from cv2jax.convert.extras import refuse_pointer
from cv2jax.convert.official_sizes import streaming_chunk
from cv2jax.convert.onnx_file import OnnxFile, UnknownGraph
from cv2jax.convert.qwen import INDEX, WEIGHTS, SafetensorsReader, check_backbone, check_safetensors, read_json
from cv2jax.convert.torch_file import TorchReader, load_values, may_be_pickled
from cv2jax.models.flow_matching.config import FlowMatchingConfig
from cv2jax.models.text_speech_lm.qwen2 import Qwen2Config

_TORCH_WEIGHTS = "pytorch_model.bin"
_TORCH = (".pt", ".pth", ".ckpt")
_GENERATION = "generation_config.json"
# spec/official.md 1.4
_ESTIMATOR_INPUTS = {"x", "mask", "mu", "t", "spks", "cond"}
# Written into upstream's code (spec/official.md 4.2, 4.3), whatever its YAML says.
_WIDTH, _UPSAMPLED_LAYERS, _STEPS = 512, 4, 10


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
    try:
        file = OnnxFile(path)
    except UnknownGraph as error:
        logging.warning("%s; it is carried through", error)
        return
    inputs = {value.name for value in file.model.graph.input}
    if not inputs >= _ESTIMATOR_INPUTS:
        said = ", ".join(sorted(_ESTIMATOR_INPUTS - inputs))
        logging.warning("%s: is not the flow's velocity network (has no input %s); it is carried through", path, said)


def check_carried(directory: pathlib.Path, names: Sequence[str]) -> None:
    """Looks into files of a directory that only go through, by their endings: no weights come to memory, nothing is run.

    Raises UserError for one that is cut short or damaged as far as its kind tells, for a pickle with code, and for git's
    pointer to a file. A `.zip` is what upstream's TorchScript comes in, code by its nature: whole is all that it must be.
    """
    for name in names:
        try:
            _check_kind(directory / name)
        except UnknownGraph:
            continue
        except UserError as error:
            raise UserError(f"{error}, or leave the file out: no stage is made of it") from None


def _check_kind(path: pathlib.Path) -> None:
    refuse_pointer(path)
    ending = path.suffix.lower()
    if ending == ".onnx":
        OnnxFile(path)
    elif ending == ".safetensors":
        check_safetensors(path)
    # Others than torch call their files .bin too: tensors of an ONNX graph may lie in one.
    elif ending in _TORCH or (ending == ".bin" and may_be_pickled(path)):
        load_values(path)
    elif ending == ".zip" and not zipfile.is_zipfile(path):
        raise UserError(f"{path}: is cut short; copy it again")


def still_sound(path: pathlib.Path) -> bool:
    """Whether a kept estimator can go out as it is; a line in the log where not."""
    try:
        check_estimator(path)
    except UserError as error:
        logging.warning("%s; a new one is written", error)
        return False
    return True


def warn_of_differences(lm_run: pathlib.Path, prefix: str, flow_run: pathlib.Path, flow: FlowMatchingConfig) -> None:
    """Says, a line each, what the official code does otherwise with a language model's corpus `prefix` and a flow."""
    encoder = flow.encoder
    if (encoder.width, encoder.num_upsampled_layers) != (_WIDTH, _UPSAMPLED_LAYERS):
        logging.warning(
            "%s: its encoder has width %d and %d upsampled layers; the official code, as released, builds %d and %d only, and"
            " will not load it",
            *(flow_run, encoder.width, encoder.num_upsampled_layers, _WIDTH, _UPSAMPLED_LAYERS),
        )
    if prefix == "speaker":
        logging.warning(
            "%s: learnt its voices from names in front of the text; no official mode puts one there", lm_run
        )
    if not streaming_chunk(flow):
        logging.warning("%s: was not trained for chunks; the official stream will see all at each hop", flow_run)
    if flow.temperature != 1:
        logging.warning("%s: speaks at temperature %g; the official code at 1", flow_run, flow.temperature)
    if flow.num_steps != _STEPS:
        logging.warning("%s: solves in %d steps; the official code in %d", flow_run, flow.num_steps, _STEPS)
