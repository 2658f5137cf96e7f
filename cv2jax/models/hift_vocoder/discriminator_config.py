"""Sizes of the two families of discriminators (spec/official.md 5.6)."""

import dataclasses

from cv2jax.config import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """One discriminator a period of the wave, and one a resolution of its magnitude spectrogram.

    The defaults are the official sizes (41 M parameters). Either family may be empty, not both.
    """

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)  # samples
    period_channels: tuple[int, ...] = (32, 128, 512, 1024, 1024)  # of each layer; all but the last stride by 3
    fft_sizes: tuple[int, ...] = (1024, 2048, 512)  # points; of one resolution with its hop and window
    hop_lengths: tuple[int, ...] = (120, 240, 50)  # samples
    window_lengths: tuple[int, ...] = (600, 1200, 240)  # samples
    spectral_channels: int = 32

    def validate(self) -> None:
        """Raises UserError for sizes that are not positive or do not fit together."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if any(size <= 0 for size in (value if isinstance(value, tuple) else (value,))):
                raise UserError(f"discriminators.{field.name}={value}: must be positive")
        if not self.periods and not self.fft_sizes:
            raise UserError(
                "discriminators.periods=() and discriminators.fft_sizes=(): give at least one discriminator"
            )
        if self.periods and not self.period_channels:
            raise UserError("discriminators.period_channels=(): give the channels of at least one layer")
        if not len(self.fft_sizes) == len(self.hop_lengths) == len(self.window_lengths):
            raise UserError(
                f"discriminators.fft_sizes={self.fft_sizes}: hop_lengths={self.hop_lengths} and "
                f"window_lengths={self.window_lengths} must be as many"
            )
        for points, window in zip(self.fft_sizes, self.window_lengths, strict=True):
            if window > points:
                raise UserError(
                    f"discriminators.window_lengths={self.window_lengths}: {window} exceeds fft size {points}"
                )
            if points % 2 or window % 2:
                raise UserError(f"discriminators: fft size {points} and window {window} must be even")
