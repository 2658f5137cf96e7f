"""`cv2jax doctor`: each fault, planted in a made-up run, is named first; healthy runs have none; broken files are one line."""

import dataclasses
import fcntl
import json
import os
import time

import numpy as np
import pytest

from cv2jax.cli.main import run as run_cli
from cv2jax.config import load_config, override, preset_names, to_dict
from cv2jax.jobs.doctor import diagnose
from cv2jax.jobs.doctor_checks import _parse_expected
from cv2jax.train.audit import COLUMNS, FILE

PRESETS = {
    "speech_tokenizer": "speech_tokenizer_tiny",
    "text_speech_lm": "text_speech_lm_tiny",
    "flow_matching": "flow_matching_tiny",
    "hift_vocoder": "hift_vocoder_tiny",
    "speaker_encoder": "speaker_encoder_tiny",
}
STEPS, LOG, EVALUATE = 1000, 20, 100


@dataclasses.dataclass
class Made:
    """A run of 1,000 steps: change a line by its step, then write it."""

    task: str = "speech_tokenizer"
    sets: tuple = ()
    steps: int = STEPS
    planned: float | None = 0.06
    seed: int = 0

    def __post_init__(self):
        self.random = np.random.default_rng(self.seed)
        sets = [f"num_steps={STEPS}", f"log_every={LOG}", f"evaluate_every={EVALUATE}", "expected=()", *self.sets]
        self.config = override(load_config(PRESETS[self.task]), sets)
        self.train = [self.train_line(step) for step in range(LOG, self.steps + 1, LOG)]
        self.evaluations = [self.evaluation(step) for step in range(EVALUATE, self.steps + 1, EVALUATE)]
        self.skipped = []
        self.audit = {s: [s, s // 200, s % 3, 1000 + s, 16, 0] for s in range(1, self.steps + 1)}
        self.checkpoints = [self.steps - self.steps % 100 - 100, self.steps - self.steps % 100]
        self.end = {"step": self.steps, "reason": "finished", "code": 0, "time": 0}

    def noise(self, size=0.1):
        return max(0.2, 1 + size * self.random.standard_normal())

    def train_line(self, step):
        gone = np.exp(-step / 250)
        loss = (0.7 + 5 * gone) * self.noise()
        line = {"step": step, "kind": "train", "loss": loss, "grad_norm": (0.2 + 2 * gone) * self.noise(0.4)}
        line |= {"batch_hash": 1000 + step, "num_skipped": 0, "padding_share": 0.06 * self.noise()}
        line |= {"data_seconds": 0.01 * self.noise(), "compute_seconds": 0.35 * self.noise()}
        line |= {"save_seconds": 0.002, "evaluate_seconds": 0.01, "steps_per_second": 2.8 * self.noise()}
        line |= {"audio_seconds_per_second": 180 * self.noise()}
        if self.task == "text_speech_lm":
            nll = (4 + 4.6 * gone) * self.noise(0.03)
            line |= {"nll": nll, "accuracy": 0.3 * (1 - gone), "top10_accuracy": 0.6 * (1 - gone)}
        if self.task == "flow_matching":
            line |= {"velocity_loss": (0.3 + gone) * self.noise()}
        if self.task == "hift_vocoder":
            line |= {"mel_l1": (0.3 + 2 * gone) * self.noise(), "loss": (20 if step > 740 else 5) * self.noise()}
        if self.task == "speaker_encoder":
            line |= {"loss": (8 if step < 200 else 11) * self.noise(0.05)}  # the margin grows
        return line

    def evaluation(self, step):
        gone = np.exp(-step / 250)
        line = {"step": step, "kind": "evaluate", "seconds": 1.0}
        return (
            line
            | {
                "speech_tokenizer": {"cer": 0.01 + gone, "ctc_cer": 0.01 + gone / 2, "codes_used_share": 0.21},
                "text_speech_lm": {"nll": 4.1 + 4 * gone, "accuracy": 0.3},
                "flow_matching": {
                    "streamed_mel_l1": 0.7 + gone,
                    "streamed_ratio": 0.7 + gone / 4,
                    "offline_ratio": 0.7,
                },
                "hift_vocoder": {"mel_l1": 0.4 + gone, "log_spectral_distance": 10.0},
                "speaker_encoder": {"eer": 0.01 + gone / 4},
            }[self.task]
        )

    def write(self, workdir):
        workdir.mkdir(exist_ok=True)
        run = {"config": to_dict(self.config), "facts": {}, "planned_padding": self.planned}
        (workdir / "run.json").write_text(json.dumps(run))
        lines = sorted([*self.train, *self.evaluations, *self.skipped], key=lambda line: line["step"])
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        rows = [list(COLUMNS), *self.audit.values()]
        (workdir / FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
        for step in self.checkpoints:
            (workdir / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)
        if self.end:
            (workdir / "end.json").write_text(json.dumps(self.end))
        return workdir


def faults(workdir, **options):
    return [(finding.fault, finding.evidence) for finding in diagnose(workdir, **options)[1]]


@pytest.mark.parametrize("task", PRESETS)
@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_has_no_finding(tmp_path, task, seed):
    assert faults(Made(task, seed=seed).write(tmp_path)) == []


def test_a_young_run_has_no_finding(tmp_path):
    made = Made(steps=60)
    made.checkpoints = []
    with open(made.write(tmp_path) / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert faults(tmp_path) == []


def late(made, change, *, after=500):
    """Changes the training lines behind a step."""
    for line in made.train:
        if line["step"] > after:
            line.update(change(line))


def plant_data_bound(made):
    late(made, lambda line: {"data_seconds": 0.3})


def plant_slow_saves(made):
    late(made, lambda line: {"save_seconds": 0.1}, after=0)


def plant_padding(made):
    late(made, lambda line: {"padding_share": 0.3}, after=0)


def plant_padding_without_a_plan(made):
    made.planned = None
    late(made, lambda line: {"padding_share": 0.5}, after=0)


def plant_divergence(made):
    late(made, lambda line: {"loss": 0.7 + (line["step"] - 500) / 30})


def plant_rise(made):
    late(made, lambda line: {"loss": 2.5 * made.noise()}, after=700)


def plant_flat(made):
    late(made, lambda line: {"loss": 5.8 * made.noise(0.005)}, after=0)


def plant_explosion(made):
    late(made, lambda line: {"grad_norm": 60.0 * made.noise()}, after=800)


def plant_clipping(made):
    late(made, lambda line: {"grad_norm": 45.0 * made.noise()}, after=0)


def plant_non_finite(made):
    for step in (310, 420, 530):
        named = ["bad-one", f"other-{step}"]
        made.skipped.append({"step": step, "kind": "skipped", "skipped_utterances": named, "loss": None})


def plant_dead_codebook(made):
    for line in made.evaluations:
        line["codes_used_share"] = 0.21 if line["step"] < 500 else 0.08


def plant_overfit(made):
    for line in made.evaluations:
        line["cer"] = 0.2 + 0.001 * abs(line["step"] - 400)
    late(made, lambda line: {"loss": line["loss"] - (line["step"] - 500) / 1000})


def plant_slowness(made):
    late(made, lambda line: {"audio_seconds_per_second": 90 * made.noise()}, after=700)


def plant_missing_evaluations(made):
    made.evaluations = [line for line in made.evaluations if line["step"] < 600]


def plant_swapped_transcripts(made):
    for line in made.evaluations:
        line.update({"cer": 1.4, "ctc_cer": 0.97})


def plant_other_hash(made):
    made.audit[500][3] += 1


def plant_gap(made):
    del made.audit[501], made.audit[502]


def plant_band(made):
    made.config = override(made.config, ['expected=("train loss 600 0.2 0.4",)'])


def plant_death(made):
    made.end = {}
    made.train, made.evaluations = made.train[:33], made.evaluations[:6]  # to step 660
    made.audit = {s: row for s, row in made.audit.items() if s <= 670}
    made.checkpoints = [500, 600]


def plant_error(made):
    plant_death(made)
    made.end = {"step": 670, "reason": "MemoryError: ", "code": 1, "time": 0}


def plant_stop(made):
    plant_death(made)
    made.end = {"step": 670, "reason": "asked to stop", "code": 75, "time": 0}


PLANTED = [
    (plant_data_bound, "data-bound", "waits for data", "data.num_workers"),
    (plant_slow_saves, "slow saves", "every 100 steps", "save_every"),
    (plant_padding, "padding", "the plan promises 6%", "data.num_buckets"),
    (plant_padding_without_a_plan, "padding", "50% of what", "data.num_buckets"),
    (plant_divergence, "learning rate", "diverges", "lower optimizer.learning_rate"),
    (plant_rise, "learning rate", "rises again", "lower optimizer.learning_rate"),
    (plant_flat, "learning rate", "flat", "raise optimizer.learning_rate"),
    (plant_explosion, "learning rate", "explodes", "lower optimizer.learning_rate"),
    (plant_clipping, "learning rate", "are clipped", "optimizer.clip_norm"),
    (plant_non_finite, "non-finite steps", "bad-one (3 times)", "manifest"),
    (plant_dead_codebook, "stuck codebook", "8.0% of the codebook is used, 21.0% were", "balance_weight"),
    (plant_overfit, "overfit", "at step 400", "stop at step 400"),
    (plant_slowness, "slower than it was", "audio_seconds_per_second", "SIGUSR1"),
    (plant_missing_evaluations, "no evaluation", "5 of 10 evaluations are missing, the first at step 600", "log"),
    (plant_swapped_transcripts, "misaligned tokens", "held-out characters", "same utterances"),
    (plant_other_hash, "broken record", "other batches at step 500", "checkpoints"),
    (plant_gap, "broken record", "lacks steps before 503", "checkpoints"),
    (plant_band, "unexpected", "0.2 to 0.4", "run.json"),
    (plant_death, "stopped run", "70 steps since the newest checkpoint (600)", "same command"),
    (plant_error, "stopped run", "with code 1 (MemoryError: )", "same command"),
    (plant_stop, "stopped run", "asked to stop at step 670 of 1000", "same command"),
]


@pytest.mark.parametrize(
    ("plant", "fault", "evidence", "mend"), PLANTED, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_planted_fault_is_named_first_with_evidence_and_mend(tmp_path, capsys, plant, fault, evidence, mend):
    made = Made()
    plant(made)
    made.write(tmp_path)
    found = diagnose(tmp_path)[1]
    assert found[0].fault == fault
    assert evidence in found[0].evidence
    assert mend in found[0].mend
    assert {finding.fault for finding in found} == {fault}
    assert run_cli(["doctor", str(tmp_path)]) == 4
    assert capsys.readouterr().out.splitlines()[1] == f"1. {found[0]}"


@pytest.mark.parametrize("level", ["uniform", "unigram"])
def test_a_language_model_whose_tokens_are_not_its_texts(tmp_path, level):
    made = Made("text_speech_lm")
    nll, near = (8.75, 0.002) if level == "uniform" else (6.9, 0.05)
    late(made, lambda line: {"nll": nll, "accuracy": 0.008, "top10_accuracy": near}, after=0)
    assert faults(made.write(tmp_path))[0][0] == "misaligned tokens"


def test_a_flow_that_is_no_better_than_a_constant_mel(tmp_path):
    made = Made("flow_matching")
    for line in made.evaluations:
        line.update({"streamed_ratio": 1.02, "offline_ratio": 0.99})
    assert faults(made.write(tmp_path)) == [
        ("misaligned tokens", "the mel is 0.99 of the distance of a constant mel a token, which needs no flow")
    ]


def test_a_finetuned_run_may_be_flat(tmp_path):
    made = Made(sets=("init_from=elsewhere",))
    plant_flat(made)
    assert faults(made.write(tmp_path)) == []


def test_a_process_that_writes_nothing_is_stuck(tmp_path):
    made = Made()
    plant_death(made)
    made.write(tmp_path)
    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert faults(tmp_path) == []
        for name in ("metrics.jsonl", FILE):
            os.utime(tmp_path / name, (time.time() - 7200,) * 2)
        ((fault, evidence),) = faults(tmp_path)
    assert fault == "stuck run"
    assert "70 steps since the newest checkpoint (600)" in evidence


def test_stacks_of_the_watchdog_are_pointed_at(tmp_path):
    made = Made()
    plant_death(made)
    made.end = {"step": 670, "reason": "stuck in the data wait of step 671", "code": 79, "time": 0}
    (made.write(tmp_path) / "stuck-671-process-0.txt").write_text("")
    ((_, evidence),) = faults(tmp_path)
    assert "stuck in the data wait of step 671" in evidence
    assert "stacks in stuck-671-process-0.txt" in evidence


def test_damaged_checkpoints_are_told(tmp_path):
    Made().write(tmp_path)
    (tmp_path / "checkpoints-damaged" / "900").mkdir(parents=True)
    ((fault, evidence),) = faults(tmp_path)
    assert (fault, "900" in evidence) == ("damaged checkpoints", True)


def test_two_runs_are_compared_step_by_step(tmp_path, capsys):
    other = Made()
    other.audit[321][3] += 1
    ours, theirs = Made().write(tmp_path / "a"), other.write(tmp_path / "b")
    assert faults(ours, against=str(ours)) == []
    ((fault, evidence),) = faults(ours, against=str(theirs))
    assert fault == "another data order"
    assert "step 321: batch_hash 1321 → 1322" in evidence
    (theirs / FILE).unlink()
    assert run_cli(["doctor", str(ours), "--against", str(theirs)]) == 2
    assert "has no audit.jsonl to compare" in capsys.readouterr().err


def test_several_faults_come_by_their_weight(tmp_path, capsys):
    made = Made()
    plant_divergence(made)
    plant_padding(made)
    plant_data_bound(made)
    assert [fault for fault, _ in faults(made.write(tmp_path))] == ["learning rate", "data-bound", "padding"]
    assert run_cli(["doctor", str(tmp_path), "--out", str(tmp_path / "doctor.png")]) == 4
    assert capsys.readouterr().out.splitlines()[-1] == f"curves: {tmp_path / 'doctor.png'}"
    assert (tmp_path / "doctor.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_of_before_these_figures_is_read(tmp_path):
    made = Made()
    new = {"data_seconds", "compute_seconds", "save_seconds", "evaluate_seconds", "padding_share"}
    made.train = [{k: v for k, v in line.items() if k not in new} for line in made.train]
    made.write(tmp_path)
    for name in (FILE, "end.json"):
        (tmp_path / name).unlink()
    run = json.loads((tmp_path / "run.json").read_text())
    del run["planned_padding"], run["config"]["expected"], run["config"]["stuck_seconds"]
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert faults(tmp_path) == []
    assert run_cli(["doctor", str(tmp_path), "--out", str(tmp_path / "x.png")]) == 0


def test_mistakes_are_one_line(tmp_path, capsys):
    def refused(*words):
        assert run_cli(["doctor", *map(str, words)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "expected one RUN" in refused()
    assert "holds no run" in refused(tmp_path)
    workdir = Made().write(tmp_path / "run")
    assert "cannot write" in refused(workdir, "--out", workdir)
    (workdir / "metrics.jsonl").write_text('garbage\n{"step": 1, "kind": "train"}\n')
    assert "metrics.jsonl:1: not a metrics line" in refused(workdir)
    (workdir / "run.json").write_text("{")
    assert "not JSON" in refused(workdir)


def test_broken_files_beside_the_record_are_forgiven(tmp_path):
    workdir = Made().write(tmp_path)
    (workdir / FILE).write_bytes(b"\0" * 50)
    (workdir / "end.json").write_text("{")
    assert faults(workdir) == []
    (workdir / "metrics.jsonl").write_text("")
    assert [fault for fault, _ in faults(workdir)] == ["no evaluation"]


@pytest.mark.parametrize("text", ["loss 3", "train loss x 1 2", "train loss 1 2 y"])
def test_a_band_that_is_none_is_named(tmp_path, text, capsys):
    made = Made()
    made.config = override(made.config, [f"expected=({text!r},)"])
    assert run_cli(["doctor", str(made.write(tmp_path))]) == 2
    assert "write KIND NAME STEP LOW HIGH" in capsys.readouterr().err


def test_the_bands_of_all_configs_can_be_read():
    bands = [text for name in preset_names() for text in load_config(name).expected]
    assert len(bands) >= 8
    for text in bands:
        kind, _, step, low, high = _parse_expected(text)
        assert kind in ("train", "evaluate")
        assert step > 0
        assert low < high
