"""The pieces of a request: stretches of text that the language model and the flow take one after the other."""

import functools
from collections import deque
from collections.abc import Iterable, Iterator


class Piece:
    """A stretch of text, its speech tokens so far, and how much of them is heard.

    Attributes:
      ids: text tokens that the language model has not got yet, of `num_text`. closed: no more of them come; flushed: it knows.
      slot: that it has there. is_drawn: no more speech tokens come; is_idle: none comes before there is more text.
      ends_utterance: nothing is held back behind it, and what follows is vocoded anew.
    """

    def __init__(self, number: int, ids: list[int], closed: bool) -> None:
        self.number, self.ids, self.closed = number, ids, closed
        self.num_text, self.num_used = len(ids), 0
        self.slot: int | None = None
        self.is_drawn = self.is_idle = self.flushed = self.ends_utterance = False
        self.tokens: list[int] = []

    def add(self, ids: list[int]) -> None:
        """Appends text tokens."""
        self.ids += ids
        self.num_text += len(ids)
        self.is_idle = False

    def take_ids(self) -> list[int]:
        """The text tokens that the language model is to get now."""
        ids, self.ids = self.ids, []
        return ids


class Pieces:
    """Those that are not heard to their end, in order; of the others only counts are kept, however long a request goes on.

    Attributes:
      num: pieces ever, of which `num_heard` are heard. newest: the last of them, heard or not.
    """

    def __init__(self, texts: Iterable[list[int]] = ()) -> None:
        self._left: deque[Piece] = deque()
        self._gone = (0, 0, 0)  # counts of the pieces that are heard, but for the newest: more text may come for it
        self.num = self.num_heard = 0
        self.newest: Piece | None = None
        for ids in texts:
            self.append(ids, closed=True)

    def __iter__(self) -> Iterator[Piece]:
        """Those that are not heard to their end."""
        return iter(self._left)

    @property
    def heard(self) -> Piece | None:
        """The one that is heard: the first that is not heard to its end."""
        return self._left[0] if self._left else None

    @property
    def counts(self) -> tuple[int, int, int]:
        """(text tokens, speech tokens, pieces that have any) of all pieces ever."""
        last = [self.newest] if self.newest is not None and not self._left else []
        return functools.reduce(_add, [*self._left, *last], self._gone)

    def append(self, ids: list[int], *, closed: bool) -> Piece:
        """One more piece, of these text tokens to begin with."""
        if self.newest is not None and not self._left:
            self._gone = _add(self._gone, self.newest)
        self.newest = piece = Piece(self.num, ids, closed)
        self._left.append(piece)
        self.num += 1
        return piece

    def leave(self) -> None:
        """Says that the first is heard to its end."""
        piece = self._left.popleft()
        self.num_heard += 1
        if self._left:
            self._gone = _add(self._gone, piece)


def _add(counts: tuple[int, int, int], piece: Piece) -> tuple[int, int, int]:
    num_text, num_speech, num_pieces = counts
    has_any = bool(piece.num_text or piece.tokens)
    return num_text + piece.num_text, num_speech + len(piece.tokens), num_pieces + has_any
