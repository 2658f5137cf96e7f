"""HiFT, the neural-source-filter vocoder with an inverse Fourier transform at its end: mel → waveform."""

import dataclasses
import functools
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from cv2jax.models.hift_vocoder.config import MEL_UNIT, HiftVocoderConfig
from cv2jax.models.hift_vocoder.f0 import F0Predictor
from cv2jax.models.hift_vocoder.generator import HiftGenerator
from cv2jax.models.hift_vocoder.source import HarmonicSource
from cv2jax.nn.signal import Chunk, Extent, Signal, Whole


@flax.struct.dataclass
class HiftOutput:
    """What the vocoder makes of a mel."""

    waveform: Float[Array, "B W"]  # samples in [-0.99, 0.99], as many a frame as the mel's hop
    f0: Float[Array, "B F"]  # predicted, Hz


@flax.struct.dataclass
class HiftState:
    """What a stream carries from chunk to chunk; the same size however long it gets."""

    num_frames: Int[Array, " B"]  # of the mel, so far
    tails: list[Any]


class HiftVocoder(nn.Module):
    """F0 predictor, harmonic source and generator. F0 reaches the source without a gradient, as upstream."""

    config: HiftVocoderConfig

    def setup(self) -> None:
        self.f0_predictor = F0Predictor(self.config)
        self.source = HarmonicSource(self.config)
        self.generator = HiftGenerator(self.config)

    def __call__(
        self,
        mel: Float[Array, "B F M"],
        keys: Key[Array, " B"],
        num_frames: Int[Array, " B"] | None = None,
        f0: Float[Array, "B F"] | None = None,
        uses_f0: Bool[Array, " B"] | None = None,
    ) -> HiftOutput:
        """Whole utterances.

        Args:
          mel: natural log-mel. keys: of each row's noise. num_frames: of each row, which then is as if alone; None: all.
          f0: Hz to use in place of the predicted ones, for training; `uses_f0`: in these rows, None: in all.
        """
        extent = Whole(num_frames)
        signal = extent.mask(Signal(mel, 1))
        predicted = self.f0_predictor(extent, signal)
        used = predicted.values
        if f0 is not None:
            used = f0[..., None] if uses_f0 is None else jnp.where(uses_f0[:, None, None], f0[..., None], used)
        waveform = self._waveform(extent, signal, extent.mask(predicted.holding(used)), keys)
        return HiftOutput(waveform.values[..., 0], predicted.values[..., 0])

    def step(
        self,
        mel: Float[Array, "B F M"],
        keys: Key[Array, " B"],
        state: HiftState | None,
        num_valid: Int[Array, " B"],
        total: Int[Array, " B"],
    ) -> tuple[HiftOutput, HiftState]:
        """The next frames of streams: as `__call__` over all chunks so far, `delay` samples late.

        Args:
          mel: of which the first `num_valid` [B] frames are the next. state: what the step before returned; None: the start.
          total: frames [B] of the utterance, ENDLESS while its end is not known; frames behind it flush.
        Returns:
          as many samples as frames have, from `delay(config)` before the first sample of these frames on; what lies before
          the start of the utterance is none. And the state.
        """
        rows = mel.shape[0]
        seen = jnp.zeros(rows, jnp.int32) if state is None else state.num_frames
        extent = Chunk(None if state is None else state.tails, seen, num_valid, total)
        signal = extent.mask(Signal(mel, 1))
        f0 = self.f0_predictor(extent, signal)
        waveform = self._waveform(extent, signal, f0, keys)
        output = HiftOutput(waveform.values[..., 0], f0.values[..., 0])
        return output, HiftState(num_frames=seen + num_valid, tails=extent.tails)

    def decode(self, mel: Float[Array, "B F M"], source: Float[Array, "B W"]) -> Float[Array, "B W"]:
        """The waveform for a given source."""
        return self.generator(Whole(), Signal(mel, 1), Signal(source[..., None], self.config.mel_hop)).values[..., 0]

    def make_source(
        self, f0: Float[Array, "B F"], keys: Key[Array, " B"], noise: Float[Array, "B W H"] | None = None
    ) -> Float[Array, "B W"]:
        """The source of an F0 track in Hz."""
        return self.source(Whole(), Signal(f0[..., None], 1), keys, noise).values[..., 0]

    def _waveform(self, extent: Extent, mel: Signal, f0: Signal, keys: Key[Array, " B"]) -> Signal:
        held = f0.holding(jax.lax.stop_gradient(f0.values))
        wave = self.generator(extent, mel, self.source(extent, held, keys))
        return extent.mask(wave)


def init_params(config: HiftVocoderConfig, key: Key[Array, ""]) -> Any:
    """Fresh parameters, boxed with logical axes."""
    mel = jnp.zeros((1, 4, config.num_mels))
    return HiftVocoder(config).init(key, mel, jax.random.split(key, 1))["params"]


def count_from_zero(config: HiftVocoderConfig, params: Any) -> tuple[HiftVocoderConfig, Any]:
    """The same function with `mel_origin` 0, as official weights have it: the origin goes into two biases."""
    return recount(config, params, mel_origin=0.0, upsampling_unit=config.upsampling_unit)


def recount(
    config: HiftVocoderConfig, params: Any, *, mel_origin: float, upsampling_unit: float
) -> tuple[HiftVocoderConfig, Any]:
    """The same function in another origin of its log-mel, which goes into two biases, and another unit of its upsampling."""

    def moved(layer: dict[str, Array]) -> dict[str, Array]:
        if mel_origin == config.mel_origin:
            return layer
        by = (mel_origin - config.mel_origin) / MEL_UNIT * jnp.sum(layer["kernel"], axis=(0, 1))
        return layer | {"bias": layer["bias"] + by}

    factor = upsampling_unit / config.upsampling_unit  # powers of two: nothing rounds
    generator = params["generator"] | {"conv_in": moved(params["generator"]["conv_in"])}
    if factor != 1:
        stages = [name for name in generator if name.startswith("upsample_")]
        generator |= {name: generator[name] | {"kernel": factor * generator[name]["kernel"]} for name in stages}
    predictor = params["f0_predictor"] | {"conv_0": moved(params["f0_predictor"]["conv_0"])}
    recounted = dataclasses.replace(config, mel_origin=mel_origin, upsampling_unit=upsampling_unit)
    return recounted, params | {"generator": generator, "f0_predictor": predictor}


@functools.lru_cache(maxsize=16)  # it traces the model
def hold_back(config: HiftVocoderConfig) -> int:
    """How many samples before the end of what was fed a stream's output ends: its right receptive field, in samples."""
    delays: list[int] = []

    def measure(params: Any, mel: Array, keys: Array) -> Array:
        def run(vocoder: HiftVocoder) -> Array:
            n = jnp.full(1, mel.shape[1], jnp.int32)
            extent = Chunk(None, jnp.zeros(1, jnp.int32), n, n)
            signal = Signal(mel, 1)
            wave = vocoder._waveform(extent, signal, vocoder.f0_predictor(extent, signal), keys)
            delays.append(wave.delay)
            return wave.values

        return nn.apply(run, HiftVocoder(config))({"params": params})

    params = jax.eval_shape(lambda key: nn.unbox(init_params(config, key)), jax.random.key(0))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    jax.eval_shape(measure, params, jax.ShapeDtypeStruct((1, 2, config.num_mels), jnp.float32), keys)
    return delays[0]
