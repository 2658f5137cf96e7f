"""Configuration of the HiFT vocoder; the defaults are the official sizes (spec/official.md 5)."""

import dataclasses
import math

from cv2jax.config import UserError
from cv2jax.models.hift_vocoder.discriminator_config import DiscriminatorConfig

F0_LAYERS = 5  # convolutions of the F0 predictor
LEAKY_SLOPE = 0.1
# Units that our parameters count in where the official ones count in 1: log-mel (about -11 to 2) at the first convolutions,
# and Hz behind the F0 predictor. A step of Adam moves a weight by the learning rate, whatever it is multiplied with: plain
# Hz would take thousands of steps. Powers of two, so that weights convert bit for bit.
MEL_UNIT = 4.0
F0_UNIT_HZ = 16.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiftVocoderConfig:
    """Sizes of the generator, its source and its F0 predictor, and the mel that it reads.

    Residual blocks have dilations `dilations` and, a stage of the upsampling, one kernel of `source_kernels` for the source
    and all of `block_kernels` for the sum.
    """

    num_mels: int = 80
    rate_hz: int = 24000
    mel_fft: int = 1920
    mel_hop: int = 480
    mel_fmax_hz: float = 8000.0
    width: int = 512  # channels of the first convolution, halved by each stage
    upsample_rates: tuple[int, ...] = (8, 5, 3)
    upsample_kernels: tuple[int, ...] = (16, 11, 7)
    block_kernels: tuple[int, ...] = (3, 7, 11)
    source_kernels: tuple[int, ...] = (7, 7, 11)
    dilations: tuple[int, ...] = (1, 3, 5)
    istft_points: int = 16
    istft_hop: int = 4
    num_harmonics: int = 8  # beside the fundamental
    sine_amplitude: float = 0.1
    noise_amplitude: float = 0.003  # of voiced sound; unvoiced: a third of the sine's
    voiced_above_hz: float = 10.0
    max_magnitude: float = 100.0
    max_amplitude: float = 0.99
    f0_width: int = 512
    # Of the five convolutions of the F0 predictor so many see a frame ahead, the others none: 5 is the official model,
    # fewer let a stream speak sooner. A model must be trained so.
    f0_look_ahead: int = F0_LAYERS
    # Log-mel that the first convolutions count from. Far from the mean, their inputs are mostly one constant, and are learnt
    # from several times as slowly. Official weights count from 0; those of another origin are the same function with other
    # biases: official bias = bias - origin / MEL_UNIT · the sum of our kernel.
    mel_origin: float = 0.0
    # The kernels of the upsampling are kept multiplied with this power of two, so that a step of Adam moves them by so much
    # less. What they learn quickly is a pattern stamped on each mel frame, a buzz of 50 Hz in place of the voice's pitch; the
    # pitch comes from the source, and that takes longer to learn.
    upsampling_unit: float = 1.0
    dtype: str = "float32"

    @property
    def frame_rate_hz(self) -> int:
        """Mel frames a second."""
        return self.rate_hz // self.mel_hop

    def validate(self) -> None:
        """Raises UserError for sizes that do not fit one another."""
        numbers = ("num_mels", "rate_hz", "mel_fft", "mel_hop", "width", "num_harmonics", "f0_width", "istft_hop")
        for name in (*numbers, "mel_fmax_hz", "sine_amplitude", "noise_amplitude", "max_magnitude", "max_amplitude"):
            if getattr(self, name) <= 0:
                raise UserError(f"model.generator.{name}={getattr(self, name)}: must be positive")
        stages = len(self.upsample_rates)
        if not stages == len(self.upsample_kernels) == len(self.source_kernels):
            raise UserError(
                f"model.generator.upsample_rates has {stages} stages, upsample_kernels {len(self.upsample_kernels)},"
                f" source_kernels {len(self.source_kernels)}: give as many of each"
            )
        if self.width % 2**stages:
            raise UserError(
                f"model.generator.width={self.width}: is halved {stages} times; give a multiple of {2**stages}"
            )
        if min((*self.upsample_rates, *self.upsample_kernels), default=0) < 1:
            raise UserError(
                f"model.generator.upsample_rates={self.upsample_rates}, upsample_kernels={self.upsample_kernels}: give some,"
                " all positive"
            )
        for rate, kernel in zip(self.upsample_rates, self.upsample_kernels, strict=True):
            if kernel < rate or (kernel - rate) % 2:
                raise UserError(
                    f"model.generator.upsample_kernels={self.upsample_kernels}: each must exceed its rate by an even number"
                )
        for kernel in (*self.block_kernels, *self.source_kernels):
            if kernel < 1 or kernel % 2 == 0:
                raise UserError(f"model.generator: kernel {kernel} of a residual block: must be odd")
        if not self.block_kernels or not self.dilations or min(self.dilations) < 1:
            raise UserError("model.generator.block_kernels, dilations: give some, all positive")
        if self.istft_points != 4 * self.istft_hop:
            raise UserError(f"model.generator.istft_points={self.istft_points}: must be 4 · istft_hop={self.istft_hop}")
        product = math.prod(self.upsample_rates) * self.istft_hop
        if product != self.mel_hop:
            raise UserError(
                f"model.generator.upsample_rates, istft_hop: make {product} samples of mel_hop={self.mel_hop}"
            )
        if self.rate_hz % self.mel_hop or self.mel_hop % (2 * self.istft_hop):
            raise UserError(
                f"model.generator.mel_hop={self.mel_hop}: must divide rate_hz={self.rate_hz} and be a multiple of"
                f" {2 * self.istft_hop}"
            )
        if self.mel_hop <= self.istft_points:
            raise UserError(
                f"model.generator.mel_hop={self.mel_hop}: must exceed istft_points={self.istft_points}: its"
                " ends are mirrored within one frame"
            )
        if math.frexp(self.upsampling_unit)[0] != 0.5:
            raise UserError(f"model.generator.upsampling_unit={self.upsampling_unit}: must be a power of two")
        if not 0 <= self.f0_look_ahead <= F0_LAYERS:
            raise UserError(f"model.generator.f0_look_ahead={self.f0_look_ahead}: must lie in 0 … {F0_LAYERS}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiftTrainingConfig:
    """The vocoder, its discriminators, and what its training weighs; the defaults are upstream's (spec/official.md 5.6)."""

    generator: HiftVocoderConfig = dataclasses.field(default_factory=HiftVocoderConfig)
    discriminators: DiscriminatorConfig = dataclasses.field(default_factory=DiscriminatorConfig)
    window_frames: int = 51  # of the mel, that a batch shows of an utterance: 24,480 samples
    windows_per_utterance: int = 1
    remat_discriminators: bool = False  # compute their activations anew for each gradient: slower, in less memory
    adversarial_from: int = 0  # steps that are spectral alone; the discriminators start then
    discriminator_learning_rate: float = 2e-4
    mel_weight: float = 45.0
    feature_weight: float = 2.0
    tpr_weight: float = 1.0
    f0_weight: float = 1.0  # of the error in Hz
    stft_weight: float = 0.0  # of a log-magnitude distance at three resolutions; not upstream's
    # Share of windows whose source has the recording's F0 and not the predicted one: until the predictor is any good the
    # generator learns nothing from its sines. Upstream: 0.
    target_f0_share: float = 0.0

    def validate(self) -> None:
        """Raises UserError for windows, weights and shares that cannot be meant."""
        for name in ("window_frames", "windows_per_utterance", "discriminator_learning_rate"):
            if getattr(self, name) <= 0:
                raise UserError(f"model.{name}={getattr(self, name)}: must be positive")
        for name in ("adversarial_from", "mel_weight", "feature_weight", "tpr_weight", "f0_weight", "stft_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"model.{name}={getattr(self, name)}: must not be negative")
        if not 0 <= self.target_f0_share <= 1:
            raise UserError(f"model.target_f0_share={self.target_f0_share}: must lie in [0, 1]")
