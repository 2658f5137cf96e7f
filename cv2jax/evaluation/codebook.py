"""How much of a codebook is used: share of codes, perplexity, histogram of each FSQ digit."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodebookUse:
    """Use of a codebook over some speech."""

    codebook_size: int
    num_tokens: int
    num_codes_used: int
    perplexity: float  # exp of the entropy of the empirical code distribution
    digit_histogram: (
        np.ndarray | None
    )  # [8, 3] share of each level of each FSQ digit; None for a codebook without digits

    @property
    def share_used(self) -> float:
        """Codes seen at least once, as a share of the codebook."""
        return self.num_codes_used / self.codebook_size


def codebook_use(speech_tokens: np.ndarray, codebook_size: int, *, levels: int | None = 3) -> CodebookUse:
    """Measures ids in [0, codebook_size); `levels` is the base of the FSQ digits, None when ids have none.

    Few tokens cannot use many codes: at most `num_tokens` of them, which is reported beside the share.
    """
    ids = np.asarray(speech_tokens).reshape(-1)
    counts = np.bincount(ids, minlength=codebook_size)
    shares = counts[counts > 0] / max(ids.size, 1)
    histogram = None
    if levels is not None:
        num_digits = round(np.log(codebook_size) / np.log(levels))
        digits = ids[:, None] // levels ** np.arange(num_digits) % levels
        histogram = np.stack([np.bincount(digits[:, i], minlength=levels) for i in range(num_digits)]) / max(
            ids.size, 1
        )
    return CodebookUse(
        codebook_size=codebook_size,
        num_tokens=int(ids.size),
        num_codes_used=int((counts > 0).sum()),
        perplexity=float(np.exp(-(shares * np.log(shares)).sum())),
        digit_histogram=histogram,
    )
