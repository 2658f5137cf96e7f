"""The tokens of a language model's row, as training lays them out and synthesis feeds them: kinds, marks, lengths, checks.

Only numbers and numpy: the processes of a loader and the engine of a server read it too (spec/official.md 3.1 and 3.3).
P = T + L + 2 is the length of a row of T text and L speech tokens.
"""

import numpy as np

from cv2jax.config import UserError
from cv2jax.shapes import Int, Integer

Ratio = tuple[int, int]  # (N text tokens, M speech tokens) of one bistream group

SPECIAL, TEXT, SPEECH = 0, 1, 2  # kinds of an input token: which table embeds it
SOS, TASK = 0, 1  # tokens of kind SPECIAL
MIX_RATIO: Ratio = (5, 15)


def row_length(
    num_text: int | Integer[np.ndarray, "*B"], num_speech: int | Integer[np.ndarray, "*B"]
) -> Int[np.ndarray, "*B"]:
    """P = T + L + 2 of the row that `build_row` makes, for numbers or columns of them.

    The coin does not enter: a plan of packed rows made ahead holds whichever way each utterance is laid out.
    """
    return np.asarray(np.asarray(num_text, np.int64) + np.asarray(num_speech, np.int64) + 2)


def check_ratio(ratio: Ratio) -> Ratio:
    """The ratio; UserError for one that is not positive."""
    if min(ratio) < 1:
        raise UserError(f"ratio {ratio[0]}:{ratio[1]} of text to speech tokens: both must be positive")
    return ratio


def check_token_ids(what: str, tokens: Integer[np.ndarray, " T"], size: int) -> None:
    """Raises UserError that names the first of the tokens [T] outside 0 … `size` - 1; `what` is what it calls them."""
    outside = (tokens < 0) | (tokens >= size)
    if np.any(outside):
        at = int(np.argmax(outside))
        raise UserError(
            f"{what} {tokens[at]} at {at} lies outside the vocabulary of {size}; is this the model's own tokenizer?"
        )
