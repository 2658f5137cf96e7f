"""What a batch holds: where in the data order it stands, and how much of it is no padding."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchContent:
    """Attributes:
    epoch, bucket, num_utterances: of the global batch, by the plan alone; an utterance shown twice counts twice.
    used, slots: of this process's rows, without and with padding, in `unit`.
    """

    epoch: int
    bucket: int
    num_utterances: int
    used: float
    slots: float
    unit: Literal["audio_seconds", "tokens"]
