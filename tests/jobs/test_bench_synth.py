"""`cv2jax bench synth`: every figure of a small engine, waits of a player, memory that stays flat, mistakes in one line."""

import dataclasses

import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.jobs import bench_synth
from cv2jax.jobs.bench import bench
from cv2jax.jobs.bench_options import BenchOptions
from cv2jax.jobs.bench_synth import Heard, Workload, listen, measure_synth, soak
from cv2jax.synthesis.result import STAGES, Pcm
from tests.synthesis.small_engine import PER_TOKEN, TEXT, make_engine, voice


@pytest.fixture(scope="module")
def work() -> Workload:
    return Workload(name="small", engine=make_engine(), voice=voice(), text=TEXT + ".", num_tokens=31)


def of(figures: list, *words: str) -> list[list[float]]:
    return [values for case, unit, values in figures if all(word in f"{case} [{unit}]" for word in words)]


@pytest.mark.slow
def test_every_case_has_its_figures(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_synth, "make_workload", lambda options: work)
    monkeypatch.setattr(bench_synth, "_SOAK", 4)
    monkeypatch.setattr(bench_synth, "_SETTLED", 1)
    figures = measure_synth(BenchOptions(repeats=2, concurrent=2))
    for name in ("text in hand", "text arriving", "2 at once"):
        ((first, again),) = of(figures, name, "first audio")
        assert min(first, again) > 0
        stages = [f"{stage} [s]" for stage in STAGES]
        for what in ("real-time factor", "longest time between frames", "a player waits", *stages):
            ((one, other),) = of(figures, f"{name}, 31 tokens: ", what)
            assert np.isfinite([one, other]).all()
        ((wall, _),) = of(figures, name, "s of speech [s]")
        ((factor, _),) = of(figures, name, "real-time factor")
        assert factor == pytest.approx(wall / (31 * PER_TOKEN / 1200 * (2 if name == "2 at once" else 1)))
        assert first < wall
    assert len(of(figures, "soak of 4 mixed requests")) == 3


def test_a_request_that_ends_early_is_no_measurement(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    said = listen(work.engine, [work.request()])
    monkeypatch.setattr(bench_synth, "listen", lambda *_: said)
    with pytest.raises(RuntimeError, match=r"small, 7 tokens: .*num_speech_tokens=31"):
        bench_synth._case("small", dataclasses.replace(work, num_tokens=7), 1, 1, [])


def test_requests_at_once_are_heard_with_their_times(work: Workload) -> None:
    heard = listen(work.engine, [work.request(seed) for seed in range(3)])
    assert [one.session.result.num_samples for one in heard] == [31 * PER_TOKEN] * 3
    assert all(one.times == sorted(one.times) and len(one.times) == len(one.frames) for one in heard)


@pytest.mark.parametrize(
    ("times", "wait"),
    [([1.0, 1.5, 2.0], 0.0), ([1.0, 2.5, 3.0], 0.5), ([1.0, 2.5, 4.0], 0.5), ([1.0, 2.5, 4.7], 1.2)],
)
def test_a_player_waits_where_a_frame_is_late(work: Workload, times: list[float], wait: float) -> None:
    session = work.engine.open(work.request())
    session.cancel()
    second = Pcm(samples=np.zeros(1200, np.float32), first_sample=0)  # as long as its name
    assert Heard(session=session, times=times, frames=[second] * 3).longest_wait == pytest.approx(wait)


@pytest.mark.full
def test_memory_is_flat_over_two_hundred_mixed_requests(work: Workload) -> None:
    found = soak(work.engine, work.voice, work.text, num_requests=200)
    assert len(found.statuses) == 200
    assert 20 <= found.statuses.count("cancelled") <= 60
    assert set(found.statuses) <= {"cancelled", "hit_limit", "ok"}
    assert work.engine.num_open == 0
    assert found.num_arrays[-1] <= max(found.num_arrays[60:80])
    assert found.megabytes[-1] - found.megabytes[60] < 30


def test_a_soak_leaves_nothing_open(work: Workload) -> None:
    found = soak(work.engine, work.voice, work.text, num_requests=8, num_tokens=12)
    assert len(found.statuses) == len(found.megabytes) == len(found.num_arrays) == 8
    assert work.engine.num_open == 0


def test_a_soak_refuses_a_bad_end(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_synth, "_SOAKED", ("cancelled",))
    with pytest.raises(RuntimeError, match=r"^soak, requests 0 and 1: \[Result\(status='"):
        soak(work.engine, work.voice, work.text, num_requests=2, num_tokens=12)
    assert work.engine.num_open == 0


def test_words_are_pushed_one_by_one_and_then_the_end(work: Workload) -> None:
    session = work.engine.open(work.request(text="", arriving=True))
    words, pushed = {session: ["one", "two"]}, []
    while bench_synth._push_words(words):
        pushed.append(session.result.num_text_tokens)
    assert (words, len(pushed), session.result.num_text_tokens > 0) == ({}, 2, True)
    session.cancel()


def test_a_model_without_a_voice_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match=r"has no voice; `cv2jax enroll` one there"):
        bench_synth.make_workload(BenchOptions(run=str(tmp_path)))
    with pytest.raises(UserError, match="concurrent=-1: must not be negative"):
        bench("synth", BenchOptions(concurrent=-1))


@pytest.mark.full
def test_random_models_have_the_scenarios_numbers() -> None:
    work = bench_synth.make_workload(BenchOptions(size="tiny"))
    encode = work.engine.tokenizer.encode
    assert (len(encode(work.text)), len(encode(work.voice.text))) == (40, 20)
    assert (len(work.voice.speech_tokens), work.num_tokens) == (87, 250)
    work.engine.open(work.request()).cancel()
