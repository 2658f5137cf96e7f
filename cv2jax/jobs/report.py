"""The page of a training run: reads what the run left in its directory, writes `report.html` beside it."""

import json
import pathlib

from cv2jax.config import UserError, flatten_dict
from cv2jax.evaluation.report import training_page
from cv2jax.train.metrics import draw_curves, read_metrics
from cv2jax.train.run import load_run

_PERCENT = {
    "eer": "equal-error rate, held-out pairs",
    "offline_ratio": "mel distance offline, of that of a constant mel a token",
    "streamed_ratio": "mel distance streamed, of that of a constant mel a token",
    "seen_share": "held-out frames whose token training showed",
    "voicing_error": "frames whose voicing was predicted wrongly",
    "cer": "character error rate, held out",
    "word_accuracy": "word accuracy, held out",
    "ctc_cer": "character error rate of the CTC head",
    "codes_used_share": "share of the codebook used on held-out speech",
}
_PLAIN = {
    "same_cosine": "cosine of two utterances of one speaker, mean",
    "different_cosine": "cosine of two utterances of two speakers, mean",
    "num_lone_speakers": "speakers with one held-out utterance, which makes no pair",
    "mel_l1": "mel distance of copies (mean |difference| of log-mel up to 12 kHz)",
    "log_spectral_distance": "log-spectral distance of copies, dB",
    "f0_rmse_hz": "error of the predicted F0, Hz (root mean square)",
    "num_non_finite": "copies that were not finite",
    "offline_mel_l1": "mel distance offline (mean |difference| of log-mel)",
    "streamed_mel_l1": "mel distance streamed",
    "streamed_difference": "distance between streamed and offline mel",
    "loss": "loss, held out",
    "codes_used": "codes used",
    "perplexity": "perplexity of the codes",
    "num_utterances": "held-out utterances",
}


def write_report(workdir: str | pathlib.Path, notes: tuple[str, ...] = ()) -> pathlib.Path:
    """Writes the page of the run in `workdir` and returns its path; UserError when nothing was evaluated yet."""
    workdir = pathlib.Path(workdir)
    run = load_run(workdir)
    missing = [key for key in ("name", "num_steps", "evaluate_every") if key not in run["config"]]
    if missing:
        raise UserError(f"{workdir}/run.json: its config lacks {', '.join(missing)}; restore it")
    metrics = read_metrics(workdir / "metrics.jsonl")
    evaluations = [line for line in metrics if line["kind"] == "evaluate"]
    if not evaluations:
        raise UserError(
            f"{workdir}/metrics.jsonl holds no evaluation yet; train past step {run['config']['evaluate_every']}"
        )
    draw_curves(metrics, workdir / "curves.png", run["config"]["name"])
    page = training_page(
        title=f"{run['config']['name']}: step {evaluations[-1]['step']} of {run['config']['num_steps']}",
        summary=summarise(evaluations[-1]),
        curves_png=(workdir / "curves.png").read_bytes(),
        evaluations=evaluations,
        config_text="\n".join(f"{k} = {json.dumps(v)}" for k, v in flatten_dict(run["config"]).items()),
        notes=[*notes, f"cv2jax {run.get('cv2jax', 'unknown')}, revision {run.get('revision', 'unknown')}."],
    )
    path = workdir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def summarise(evaluation: dict) -> dict[str, str]:
    """Names and figures of one evaluation, for people."""
    rows = {label: f"{100 * evaluation[key]:.2f} %" for key, label in _PERCENT.items() if key in evaluation}
    return rows | {label: f"{evaluation[key]:.4g}" for key, label in _PLAIN.items() if key in evaluation}
