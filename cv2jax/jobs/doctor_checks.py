"""The faults that `cv2jax doctor` knows: one function each, from a run to findings.

Thresholds are such that the healthy runs of tests/jobs/test_doctor.py, and noise of their size, have no finding. Curves are
compared by medians of a tenth of their points, so that single lines decide nothing.
"""

import collections
import math
from collections.abc import Callable, Iterator

import numpy as np

from cv2jax.config import UserError
from cv2jax.jobs.doctor_run import Finding, Panel, Run

# The metric that falls as long as all is well. A vocoder's loss rises when the contest begins, a speaker encoder's with the
# margin.
TREND = {"text_speech_lm": "nll", "flow_matching": "velocity_loss", "hift_vocoder": "mel_l1", "speaker_encoder": ""}
HELD_OUT = (
    "nll",
    "loss",
    "eer",
    "cer",
    "streamed_mel_l1",
    "mel_l1",
)  # the first that an evaluation has; lower is better
BUSY = ("data_seconds", "compute_seconds")
ALL = (*BUSY, "save_seconds", "evaluate_seconds")
MIN_LINES = 10  # below that nothing is said about a curve
STALE_SECONDS = 900
MUCH_CLIPPED = 4  # norms in clip_norm: below that a clip that always acts is a choice, as the tiny vocoder's
NUM_STOPS = 3  # of the language model, behind the speech tokens
RATE = "lower optimizer.learning_rate, or lengthen optimizer.warmup_steps"


def check_end(run: Run) -> Iterator[Finding]:
    """A run that stopped before its end, or hangs."""
    last, total = run.last_step, run.config["num_steps"]
    saved = run.checkpoints[-1] if run.checkpoints else 0
    lost = (
        f"{last - saved} steps since the newest checkpoint ({saved})"
        if last > saved
        else f"all is saved (step {saved})"
    )
    stacks = sorted(path.name for path in run.workdir.glob("stuck-*.txt"))
    if run.is_running:
        per_line = run.config["log_every"] * _last(1 / np.maximum(run.series("steps_per_second")[1], 1e-9), 0.0)
        if run.age > max(STALE_SECONDS, 20 * per_line):
            evidence = f"a process holds the run, but wrote nothing for {run.age:.0f} s; last step {last}, {lost}"
            yield Finding(
                fault="stuck run", evidence=evidence, mend="kill it and give the same command", score=0.95, step=last
            )
        return
    if last >= total:
        return
    if run.end.get("reason") == "asked to stop":
        evidence, score = f"asked to stop at step {last} of {total}; {lost}", 0.3
    elif run.end:
        evidence, score = (
            f"ended after step {last} of {total} with code {run.end.get('code')} ({run.end.get('reason')})",
            0.97,
        )
        evidence += f"; {lost}"
    else:
        evidence, score = (
            f"no process and no word of its end at step {last} of {total}: killed, out of memory, or host lost",
            0.9,
        )
        evidence += f"; {lost}"
    if stacks:
        evidence += f"; stacks in {stacks[-1]}"
    yield Finding(fault="stopped run", evidence=evidence, mend="the same command goes on", score=score, step=last)


def check_finite(run: Run) -> Iterator[Finding]:
    """Steps that were skipped, or a loss that is not finite."""
    if not run.skipped:
        return
    named = collections.Counter(i for line in run.skipped for i in line.get("skipped_utterances", []))
    again = [f"{name} ({count} times)" for name, count in named.most_common(4) if count > 1]
    steps = [line["step"] for line in run.skipped]
    share = len(steps) / max(run.last_step, 1)
    repeat = f"; repeated: {', '.join(again)}" if again else ""
    mend = "listen to these, and leave them out of the manifest" if again else f"{RATE}, or set compute_dtype=float32"
    evidence = f"{len(steps)} steps skipped ({share:.2%}), the last at {steps[-1]}{repeat}"
    score = 0.9 if share > 0.01 else 0.6
    yield Finding(fault="non-finite steps", evidence=evidence, mend=mend, score=score, step=steps[0])


def check_alignment(run: Run) -> Iterator[Finding]:
    """Tokens, texts and audio that do not belong together: nothing is learnt but what needs no input."""
    mend = "check that tokens, texts and audio are of the same utterances (encode and tokenize the corpus again)"
    yield from (
        Finding(fault="misaligned tokens", evidence=evidence, mend=mend, score=0.92, panel=panel, step=run.last_step)
        for evidence, panel in _misaligned(run)
    )


def _misaligned(run: Run) -> Iterator[tuple[str, Panel]]:
    task, enough = run.config["task"], max(2 * run.config["optimizer.warmup_steps"], 200)
    if run.last_step < enough:
        return
    if task == "text_speech_lm" and len(run.train) >= MIN_LINES:
        uniform = math.log(run.config["model.num_speech_tokens"] + NUM_STOPS)
        nll, right, near = (_last(run.series(name)[1]) for name in ("nll", "accuracy", "top10_accuracy"))
        if nll > 0.9 * uniform or (right < 0.02 and near < 0.08):
            yield (
                f"the language model's nll is {nll:.2f} and its accuracy {right:.1%} after {run.last_step} steps, as of a"
                f" guess without context (uniform: {uniform:.2f})",
                "loss",
            )
    if task == "flow_matching" and run.evaluations:
        ratios = [run.evaluations[-1].get(name) for name in ("streamed_ratio", "offline_ratio")]
        known = [ratio for ratio in ratios if isinstance(ratio, float)]
        if known and min(known) > 0.97:
            yield (
                f"the mel is {min(known):.2f} of the distance of a constant mel a token, which needs no flow",
                "evaluation",
            )
    if task == "speech_tokenizer" and len(run.evaluations) >= 2:
        rates = [run.evaluations[-1].get(name, 1.0) for name in ("cer", "ctc_cer")]
        if min(rates) > 0.9:
            yield f"{min(rates):.0%} of held-out characters are wrong after {run.last_step} steps", "evaluation"


def check_rate(run: Run) -> Iterator[Finding]:
    """A learning rate that is too high or too low, by the loss and by the gradient."""
    name = TREND.get(run.config["task"], "loss")
    steps, values = run.series(name) if name else (np.zeros(0), np.zeros(0))
    if len(values) >= MIN_LINES:
        smooth = _smooth(values)
        first, low, last = smooth[0], smooth.min(), smooth[-1]
        noise = float(np.median(np.abs(values - smooth)))
        where = int(steps[int(smooth.argmin())])
        said = f"{name} {first:.4g} at first, {low:.4g} about step {where}, {last:.4g} now"
        if last > first + 0.05 * abs(first):
            yield Finding(
                fault="learning rate", evidence=f"the run diverges: {said}", mend=RATE, score=0.94, step=where
            )
        elif last - low > max(0.15 * (first - low), 3 * noise, 0.02 * abs(first)):
            yield Finding(
                fault="learning rate", evidence=f"the loss rises again: {said}", mend=RATE, score=0.85, step=where
            )
        elif abs(first - last) < 0.02 * abs(first) and not run.config["init_from"] and run.last_step >= 200:
            mend = "raise optimizer.learning_rate, or check that the data can be learnt from"
            yield Finding(
                fault="learning rate", evidence=f"the loss is flat: {said}", mend=mend, score=0.7, step=int(steps[-1])
            )
    yield from _check_gradient(run)


def _check_gradient(run: Run) -> Iterator[Finding]:
    steps, norms = run.series("grad_norm")
    warm = steps > run.config["optimizer.warmup_steps"]
    steps, norms, clip = steps[warm], norms[warm], run.config["optimizer.clip_norm"]
    if len(norms) < MIN_LINES:
        return
    smooth = _smooth(norms)
    usual = float(np.median(norms[: max(len(norms) // 2, 1)]))
    if smooth[-1] > 10 * usual:
        evidence = f"the gradient explodes: norm {smooth[-1]:.3g}, {usual:.3g} before"
        at = int(steps[int(np.argmax(smooth > 10 * usual))])
        yield Finding(fault="learning rate", evidence=evidence, mend=RATE, score=0.88, panel="gradient", step=at)
    clipped = float(np.mean(norms > clip))
    if clipped > 0.95 and np.median(norms) > MUCH_CLIPPED * clip:
        evidence = (
            f"{clipped:.0%} of the gradients are clipped (norm {np.median(norms):.3g}, optimizer.clip_norm {clip:g})"
        )
        mend = "the clip sets the step: raise optimizer.clip_norm, or lower optimizer.learning_rate"
        yield Finding(
            fault="learning rate", evidence=evidence, mend=mend, score=0.4, panel="gradient", step=int(steps[0])
        )


def check_data(run: Run) -> Iterator[Finding]:
    """Time that waits for data, and time that saves."""
    steps, waits = run.share("data_seconds", BUSY)
    if len(waits) >= 3 and _last(waits, tenths=5) > 0.15:
        workers, threads = run.config["data.num_workers"], run.config["data.num_threads"]
        mend = f"raise data.num_workers (now {workers}; with 0, {threads} data.num_threads read) and data.prefetch"
        evidence = f"{_last(waits, tenths=5):.0%} of the training time waits for data"
        score = 0.8 if _last(waits, tenths=5) > 0.4 else 0.65
        yield Finding(fault="data-bound", evidence=evidence, mend=mend, score=score, panel="time", step=int(steps[-1]))
    steps, saves = run.share("save_seconds", ALL)
    if len(saves) >= 3 and saves.mean() > 0.05:
        evidence = f"{saves.mean():.0%} of the time goes into saves, every {run.config['save_every']} steps"
        mend = "raise save_every, or give --workdir a faster disk"
        yield Finding(fault="slow saves", evidence=evidence, mend=mend, score=0.5, panel="time", step=int(steps[-1]))


def check_padding(run: Run) -> Iterator[Finding]:
    """More padding than the plan promises."""
    steps, shares = run.series("padding_share")
    promised = run.planned_padding
    limit = 0.3 if promised is None else promised + 0.05
    if len(shares) >= 3 and shares.mean() > limit:
        planned = "" if promised is None else f", the plan promises {promised:.0%}"
        evidence = f"{shares.mean():.0%} of what the devices compute is padding{planned}"
        mend = "raise data.num_buckets; the language model's: data.row_length or data.max_segments"
        yield Finding(fault="padding", evidence=evidence, mend=mend, score=0.55, panel="padding", step=int(steps[-1]))


def check_speed(run: Run) -> Iterator[Finding]:
    """A run that is slower than it was."""
    names = ("audio_seconds_per_second", "tokens_per_second", "steps_per_second")
    name = next((n for n in names if len(run.series(n)[1])), names[-1])
    steps, rates = run.series(name)
    if len(rates) < MIN_LINES:
        return
    smooth = _smooth(rates)
    if smooth[-1] < 0.7 * smooth.max():
        at = int(steps[int(np.argmax((smooth < 0.7 * smooth.max()) & (np.arange(len(smooth)) > smooth.argmax())))])
        evidence = f"{name} was {smooth.max():.4g} and is {smooth[-1]:.4g}, since about step {at}"
        mend = "look for other processes, a slower disk or a throttled device; trace some steps (SIGUSR1)"
        yield Finding(fault="slower than it was", evidence=evidence, mend=mend, score=0.6, panel="speed", step=at)


def check_evaluations(run: Run) -> Iterator[Finding]:
    """Evaluations that are missing, get worse while training gets better, or show a codebook that dies."""
    every = run.config["evaluate_every"]
    wanted = run.last_step // every
    seen = {line["step"] for line in run.evaluations}
    at_work = 0 if run.last_step >= run.config["num_steps"] else every // 2  # the last one may be under way, or next
    missing = [step for step in range(every, run.last_step - at_work + 1, every) if step not in seen]
    if missing:
        evidence = f"{len(missing)} of {wanted} evaluations are missing, the first at step {missing[0]}"
        mend = "evaluations that fail leave their error in the log"
        yield Finding(
            fault="no evaluation", evidence=evidence, mend=mend, score=0.5, panel="evaluation", step=missing[0]
        )
    yield from _check_overfit(run)
    steps, used = run.series("codes_used_share", "evaluate")
    if len(used) >= 3 and used[-1] < 0.7 * used.max():
        evidence = f"{used[-1]:.1%} of the codebook is used, {used.max():.1%} were at step {steps[int(used.argmax())]}"
        mend = "raise model.balance_weight, or lower optimizer.learning_rate"
        at = int(steps[int(used.argmax())])
        yield Finding(fault="stuck codebook", evidence=evidence, mend=mend, score=0.8, panel="evaluation", step=at)


def _check_overfit(run: Run) -> Iterator[Finding]:
    name = next((n for n in HELD_OUT if len(run.series(n, "evaluate")[1])), None)
    if name is None:
        return
    steps, values = run.series(name, "evaluate")
    if len(values) < 4 or values.argmin() > len(values) - 3:
        return
    low, at = float(values.min()), int(steps[int(values.argmin())])
    trend = TREND.get(run.config["task"], "loss")
    train_steps, train = run.series(trend) if trend else (np.zeros(0), np.zeros(0))
    before, after = train[train_steps <= at], train[train_steps > at]
    falls = len(before) >= 3 and len(after) >= 3 and np.median(after[-3:]) < np.median(before[-3:])
    if values[-2:].min() > 1.05 * low and values[-1] > 1.1 * low and falls:
        evidence = f"held-out {name} was {low:.4g} at step {at} and is {values[-1]:.4g}, while training's {trend} falls"
        mend = f"stop at step {at}, train on more speech, or raise optimizer.weight_decay and dropout"
        yield Finding(fault="overfit", evidence=evidence, mend=mend, score=0.75, panel="evaluation", step=at)


def check_expected(run: Run) -> Iterator[Finding]:
    """Values outside the bands that the config's own figures give."""
    for text in run.config.get("expected") or ():
        kind, name, at, low, high = _parse_expected(text)
        steps, values = run.series(name, "train" if kind == "train" else "evaluate")
        later = np.flatnonzero(steps >= at)
        if not len(later):
            continue
        index = int(later[0])
        value = float(np.median(values[max(index - 1, 0) : index + 2])) if kind == "train" else float(values[index])
        if not low <= value <= high:
            evidence = (
                f"{kind} {name} is {value:.4g} at step {steps[index]}; on the config's own corpus {low:g} to {high:g}"
            )
            mend = "unless the corpus is another: compare run.json with the config"
            panel: Panel = "loss" if kind == "train" else "evaluation"
            yield Finding(
                fault="unexpected", evidence=evidence, mend=mend, score=0.45, panel=panel, step=int(steps[index])
            )


def _parse_expected(text: str) -> tuple[str, str, int, float, float]:
    try:
        kind, name, step, low, high = text.split()
        return kind, name, int(step), float(low), float(high)
    except ValueError:
        raise UserError(f"expected={text!r}: write KIND NAME STEP LOW HIGH, such as train loss 100 2.0 3.5") from None


def check_record(run: Run) -> Iterator[Finding]:
    """An audit that is not of one run, and checkpoints that were damaged."""
    if run.audit:
        steps = np.array(sorted(run.audit))
        gaps = steps[1:][np.diff(steps) > 1]
        hashes = {line["step"]: line.get("batch_hash") for line in run.train}
        other = [s for s, found in hashes.items() if s in run.audit and found not in (None, run.audit[s]["batch_hash"])]
        if other or len(gaps):
            what = (
                f"audit and metrics name other batches at step {other[0]}"
                if other
                else f"the audit lacks steps before {gaps[0]}"
            )
            mend = "the files are of several runs, or were edited: trust the checkpoints alone"
            at = other[0] if other else int(gaps[0])
            yield Finding(fault="broken record", evidence=what, mend=mend, score=0.7, step=at)
    if run.damaged:
        evidence = f"checkpoints {', '.join(run.damaged)} were damaged and lie in checkpoints-damaged"
        yield Finding(
            fault="damaged checkpoints", evidence=evidence, mend="check the disk, then delete them", score=0.58
        )


def _smooth(values: np.ndarray) -> np.ndarray:
    """The running median of a tenth of the points, at least 3; as long as `values`."""
    size = max(3, len(values) // 10) | 1
    padded = np.pad(values, size // 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, size), axis=1)


def _last(values: np.ndarray, default: float = math.nan, tenths: int = 1) -> float:
    """The median of the last tenths of the points, at least 3; `default` of nothing."""
    return float(np.median(values[-max(3, tenths * len(values) // 10) :])) if len(values) else default


CHECKS: tuple[Callable[[Run], Iterator[Finding]], ...] = (
    check_end,
    check_finite,
    check_alignment,
    check_rate,
    check_data,
    check_padding,
    check_speed,
    check_evaluations,
    check_expected,
    check_record,
)
