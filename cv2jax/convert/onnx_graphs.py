"""The ONNX graphs of an official model directory, in and out (spec/official.md 1.4)."""

from cv2jax.convert.onnx_campplus import write_campplus_onnx
from cv2jax.convert.onnx_estimator import write_estimator_onnx
from cv2jax.convert.onnx_file import UnknownGraph
from cv2jax.convert.onnx_read import read_campplus_onnx, read_speech_tokenizer_onnx
from cv2jax.convert.onnx_tokenizer import write_speech_tokenizer_onnx

__all__ = [
    "UnknownGraph",
    "read_campplus_onnx",
    "read_speech_tokenizer_onnx",
    "write_campplus_onnx",
    "write_estimator_onnx",
    "write_speech_tokenizer_onnx",
]
