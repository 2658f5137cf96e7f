"""The configuration of the speech tokenizer and its three sizes."""

import dataclasses
from typing import Literal

from cv2jax.config import UserError
from cv2jax.nn.stack import REMAT_POLICIES


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeechTokenizerConfig:
    """Sizes, quantizer and losses of the speech tokenizer; the sizes of the defaults are those of `tiny`."""

    width: int = 128
    num_heads: int = 2
    num_layers: int = 2  # blocks of Encoder1, before the quantizer
    encoder2_layers: int = 2
    decoder_layers: int = 2
    mlp_ratio: int = 4
    num_mels: int = 128
    fsmn_kernel: int = 31
    rope_theta: float = 1e4
    vocabulary_size: int = 64  # set by the task from the corpus; ids 0..3 are pad/blank, sos, eos, unknown
    max_text_tokens: int = 128  # longest transcript, sos and eos not counted
    quantizer: Literal["fsq", "vq", "none"] = "fsq"
    fsq_dim: int = 8  # digits of three levels: 3^8 = 6,561 codes
    codebook_size: int = 4096  # vq only
    vq_decay: float = 0.99
    vq_restart_below: float = 0.0  # replace codes whose average use falls below it; 0 is the paper's plain EMA
    commitment_weight: float = 0.25  # vq only
    label_smoothing: float = 0.1
    ctc_weight: float = 0.3  # 0 leaves the CTC head out
    pitch_weight: float = 0.0  # of the L1 in units of 100 Hz; 0.3 in the public code, which counts Hz; 0: no pitch head
    balance_weight: float = 0.0  # fsq only: keeps every digit's three levels in use (`fsq.digit_balance_loss`)
    dropout: float = 0.1
    num_freq_masks: int = 2
    max_freq_bins: int = 40
    num_time_masks: int = 2
    max_time_share: float = 0.12
    remat: str = "none"  # a policy of cv2jax/nn/stack.py
    scan_layers: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters stay fp32

    @property
    def num_codes(self) -> int:
        """How many different speech tokens there can be (1 without a quantizer)."""
        return {"fsq": 3**self.fsq_dim, "vq": self.codebook_size, "none": 1}[self.quantizer]

    def validate(self) -> None:
        """Raises UserError, naming the field, its value and the mend, for sizes that cannot work."""
        positive = (
            "width num_heads num_layers encoder2_layers decoder_layers mlp_ratio num_mels max_text_tokens fsq_dim"
        )
        for name in (*positive.split(), "codebook_size"):
            self._require(getattr(self, name) > 0, name, "must be positive")
        self._require(self.width % self.num_heads == 0, "width", f"must be a multiple of num_heads={self.num_heads}")
        even = self.width // self.num_heads % 2 == 0
        self._require(even, "width", f"width/num_heads={self.width / self.num_heads} must be even for rotary positions")
        self._require(self.fsmn_kernel % 2 == 1, "fsmn_kernel", "must be odd, so that the length is kept")
        self._require(self.rope_theta > 0, "rope_theta", "must be positive")
        self._require(self.vocabulary_size > 4, "vocabulary_size", "must exceed the 4 special ids")
        self._require(self.quantizer in ("fsq", "vq", "none"), "quantizer", "choose fsq, vq or none")
        self._require(self.fsq_dim <= 19, "fsq_dim", "must be at most 19: ids are int32")
        self._require(self.dtype in ("float32", "bfloat16"), "dtype", "choose float32 or bfloat16")
        self._require(self.remat in REMAT_POLICIES, "remat", f"choose one of {', '.join(sorted(REMAT_POLICIES))}")
        for name in ("vq_decay", "label_smoothing", "dropout", "max_time_share"):
            self._require(0 <= getattr(self, name) < 1, name, "must lie in [0, 1)")
        for name in ("vq_restart_below", "commitment_weight", "ctc_weight", "pitch_weight", "balance_weight"):
            self._require(getattr(self, name) >= 0, name, "must not be negative")
        for name in ("num_freq_masks", "num_time_masks", "max_freq_bins"):
            self._require(getattr(self, name) >= 0, name, "must not be negative")
        self._require(self.max_freq_bins <= self.num_mels, "max_freq_bins", f"must not exceed num_mels={self.num_mels}")

    def _require(self, condition: bool, name: str, mend: str) -> None:
        if not condition:
            raise UserError(f"model.{name}={getattr(self, name)!r}: {mend}")


def tiny() -> SpeechTokenizerConfig:
    """2 + 2 blocks of width 128 and a 2-layer decoder: trains in minutes on two CPU cores.

    Few steps leave no room for dropout and SpecAugment, and the CTC weight teaches the encoder before the attention
    decoder has found its alignment. The layers are unrolled: a CPU compiles and runs two of them faster than a scan.
    """
    return SpeechTokenizerConfig(
        ctc_weight=1.0, balance_weight=0.1, dropout=0.0, num_freq_masks=0, num_time_masks=0, scan_layers=False
    )


def base() -> SpeechTokenizerConfig:
    """6 + 6 blocks of width 512 and a 6-layer decoder: our choice for a few hundred hours on one accelerator."""
    return SpeechTokenizerConfig(
        width=512,
        num_heads=8,
        num_layers=6,
        encoder2_layers=6,
        decoder_layers=6,
        max_text_tokens=256,
        balance_weight=0.1,
        remat="full",
    )


def official() -> SpeechTokenizerConfig:
    """Encoder1 of the released tokenizer: 6 blocks of width 1280, 20 heads of 64, MLP 5120 (spec/frontends.md 1.2).

    The depth of Encoder2 and of the decoder is not public. Chosen here: 26 blocks, which with Encoder1 make the 32 of the
    SenseVoice-Large template, and 6 decoder layers (the template's 32 would double the cost of a part that is thrown away).
    The loss is the paper's, recognition alone, which started from a trained recogniser: from scratch, set
    model.ctc_weight=0.3 and model.balance_weight=0.1.
    """
    return SpeechTokenizerConfig(
        width=1280,
        num_heads=20,
        num_layers=6,
        encoder2_layers=26,
        decoder_layers=6,
        max_text_tokens=448,
        ctc_weight=0.0,
        dropout=0.0,
        remat="full",
        dtype="bfloat16",
    )
