"""The project's main job on a corpus it makes itself: corpus → prepare → train the speech tokenizer → report.

Each part is resumable, so a second call goes on where a killed one stopped. It composes the other jobs' functions.
"""

import dataclasses
import pathlib
import time
from typing import Any

from absl import logging

from cv2jax.config import UserError, load_config, override, validate
from cv2jax.jobs.corpus import make_corpus
from cv2jax.jobs.corpus_plan import CorpusConfig
from cv2jax.jobs.prepare import prepare
from cv2jax.jobs.report import summarise, write_report
from cv2jax.tasks import make_task
from cv2jax.train.loop import train
from cv2jax.train.metrics import read_metrics

PRESET = "speech_tokenizer_tiny"
# The embedded corpus is easier than recordings, and its utterances are all of 2 to 4 seconds.
PRESET_CHANGES = ("num_steps=900", "data.num_buckets=2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickstartResult:
    """What came of it; `exit_code` is train's (75: stopped by SIGTERM, call again)."""

    exit_code: int
    evaluation: dict[str, Any]
    page: pathlib.Path | None


def quickstart(
    out: str | pathlib.Path, corpus: CorpusConfig, assignments: tuple[str, ...] = (), *, workers: int = 0
) -> QuickstartResult:
    """Runs every stage into `out`; `assignments` override the tiny preset's config, but for the corpus it makes itself."""
    started = time.monotonic()
    out = pathlib.Path(out)
    for assignment in assignments:
        if assignment.split("=")[0].strip() == "data.corpus":
            raise UserError(f"--set {assignment}: quickstart makes its own corpus; for yours use `cv2jax train`")
    config = override(load_config(PRESET), [f"data.corpus={out / 'prepared'}", *PRESET_CHANGES, *assignments])
    validate(config)
    logging.info("1 of 4: speaking %.2f hours of synthetic speech into %s", corpus.hours, out / "corpus")
    spoken = make_corpus(out / "corpus", corpus, num_workers=workers)
    logging.info("2 of 4: preparing shards in %s", out / "prepared")
    prepared = prepare(out / "corpus" / "manifest.jsonl", out / "prepared", workers=workers)
    logging.info("3 of 4: training %s for %d steps in %s", config.name, config.num_steps, out / "tokenizer")
    code = train(make_task(config), config, out / "tokenizer")
    if code:
        return QuickstartResult(exit_code=code, evaluation={}, page=None)
    notes = (
        f"Trained on {spoken.seconds / 3600:.2f} hours of synthetic speech ({prepared.num_utterances} utterances, "
        f"{corpus.num_voices} voices, seed {corpus.seed}); held-out sentences never occur in training.",
    )
    page = write_report(out / "tokenizer", notes)
    evaluation = [x for x in read_metrics(out / "tokenizer" / "metrics.jsonl") if x["kind"] == "evaluate"][-1]
    for name, value in summarise(evaluation).items():
        logging.info("%s: %s", name, value)
    logging.info("4 of 4: the page is %s (%.1f minutes in all)", page, (time.monotonic() - started) / 60)
    return QuickstartResult(exit_code=0, evaluation=evaluation, page=page)
