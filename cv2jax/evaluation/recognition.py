"""Held-out metrics of a recogniser inside which speech is quantised: error rates of its heads, use of the codebook."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cv2jax.evaluation.codebook import codebook_use
from cv2jax.evaluation.error_rate import error_rate
from cv2jax.text.characters import CharacterVocabulary

NUM_EXAMPLES = 8  # transcripts shown in the metrics


@dataclasses.dataclass
class RecognitionScore:
    """Collects batches, then scores them all; `num_codes` 0 means no codebook, `levels` None one without digits."""

    vocabulary: CharacterVocabulary
    num_codes: int
    levels: int | None

    def __post_init__(self) -> None:
        self._references: list[str] = []
        self._heard: dict[str, list[str]] = {"text": [], "ctc": []}
        self._speech_tokens: list[np.ndarray] = []

    def add(self, batch: Mapping[str, np.ndarray]) -> None:
        """Takes a batch: `row_mask` [B], and ids with their counts: `reference_tokens` [B T] / `num_reference_tokens` [B],
        `text_tokens`, optional `ctc_tokens`, and `speech_tokens` alike.

        A reference character that the vocabulary lacks counts as an error: what was heard never shows that sign.
        """
        for row in np.flatnonzero(batch["row_mask"]).tolist():
            self._references.append(self._text(batch, "reference", row))
            for head, texts in self._heard.items():
                if f"{head}_tokens" in batch:
                    texts.append(self._text(batch, head, row).replace("\N{REPLACEMENT CHARACTER}", "?"))
            self._speech_tokens.append(batch["speech_tokens"][row, : batch["num_speech_tokens"][row]])

    def _text(self, batch: Mapping[str, np.ndarray], name: str, row: int) -> str:
        return self.vocabulary.decode(batch[f"{name}_tokens"][row, : batch[f"num_{name}_tokens"][row]])

    def metrics(self) -> dict[str, Any]:
        """`cer`, `wer` and `word_accuracy` of the attention decoder, `ctc_…` of the CTC head, use of the codebook, examples."""
        heard = self._heard["text"]
        metrics: dict[str, Any] = dict(_rates("", self._references, heard))
        metrics["num_utterances"] = len(heard)
        if self._heard["ctc"]:
            metrics |= _rates("ctc_", self._references, self._heard["ctc"])
        if self.num_codes:
            use = codebook_use(np.concatenate(self._speech_tokens), self.num_codes, levels=self.levels)
            metrics |= {
                "codes_used": use.num_codes_used,
                "codes_used_share": use.share_used,
                "perplexity": use.perplexity,
                "num_speech_tokens": use.num_tokens,
            }
            if use.digit_histogram is not None:
                metrics["digit_histogram"] = use.digit_histogram.round(4).tolist()
        shown = range(0, len(heard), max(1, len(heard) // NUM_EXAMPLES))
        metrics["examples"] = [[self._references[i], heard[i]] for i in shown][:NUM_EXAMPLES]
        return metrics


def _rates(prefix: str, references: list[str], heard: list[str]) -> Iterator[tuple[str, float]]:
    scored = error_rate(references, heard)
    yield f"{prefix}cer", scored.character_error_rate
    yield f"{prefix}wer", scored.word_error_rate
    yield f"{prefix}word_accuracy", scored.word_accuracy
