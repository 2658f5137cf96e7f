"""A bundle of small models, exported once: the engine speaks from it as from the models, and what drifts is named."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.jobs.export_bundle import BundleOptions, export_bundle
from cv2jax.jobs.selftest import selftest
from cv2jax.synthesis import bundle_files as files
from cv2jax.synthesis import gate
from cv2jax.synthesis.bundle import MEL, SPEAKER, SPEECH, TOKENS, WAVE, load_bundle
from cv2jax.synthesis.request import Request
from cv2jax.synthesis.voice import save_voice
from cv2jax.tasks import bundle as writer
from cv2jax.tasks.bundle_parts import parts_of_bundle, served_config, served_params
from cv2jax.tasks.bundle_programs import make_sizes
from tests import small_bundle
from tests.only_packages import BUNDLE, run_only
from tests.synthesis import small_engine

pytestmark = pytest.mark.full  # test_bundle_writing.py has the small siblings


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("bundle")
    save_voice(root / "ann.safetensors", small_engine.voice())
    report = writer.write_bundle(
        small_bundle.make_parts(encoders=True),
        root / "bundle",
        sizes=small_bundle.SIZES,
        voices=[root / "ann.safetensors"],
    )
    return root / "bundle", report


@pytest.fixture(scope="module")
def bundle(exported):
    return load_bundle(exported[0])


def speak(engine, **changes):
    request = Request(
        **{"voice": small_engine.voice(), "text": small_engine.TEXT, "seed": 3, "max_length": 40} | changes
    )
    return engine.speak(request)


def test_the_gate_passed_and_is_written_down(exported):
    place, report = exported
    manifest = files.read_manifest(place)
    others = ("num_ids", "drawn", "parameters")
    assert [check.stage for check in report.checks if check.quantity not in others] == list(gate.ORDER[:-1])
    assert [check.stage for check in report.checks if check.quantity == "parameters"] == list(gate.ORDER[1:-1])
    assert all(check.passes for check in report.checks)
    assert manifest["gate"]["checks"] == [dataclasses.asdict(check) for check in report.checks]
    assert manifest["bounds"] == gate.BOUNDS["float32"]
    assert report.num_programs == len(manifest["programs"]) == len(list((place / files.PROGRAMS).iterdir()))
    assert set(manifest["stages"]) == {SPEECH, MEL, WAVE, TOKENS, SPEAKER}
    of_flow = [about["platforms"] for about in manifest["programs"] if about["stage"] == MEL]
    assert of_flow == [["cpu"], ["cuda", "tpu"]] * 2
    assert sorted(p.name for p in place.parent.iterdir()) == ["ann.safetensors", "bundle"]


@pytest.mark.parametrize("mode", ["zero_shot", "cross_lingual", "speaker"])
def test_the_engine_of_a_bundle_says_what_the_models_engine_says(bundle, mode):
    settings = {"num_slots": 1, "hop_sizes": ()} if mode == "speaker" else {}
    mine = small_engine.make_engine(stages=bundle.stages, tokenizer=bundle.tokenizer, **settings)
    theirs = small_engine.make_engine()
    (found, result), (wanted, reference) = speak(mine, mode=mode), speak(theirs, mode=mode)
    assert result.status == reference.status
    assert result.num_speech_tokens == reference.num_speech_tokens > 0
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_streams_side_by_side_from_a_bundle_say_what_each_says_alone(bundle):
    engine = small_engine.make_engine(stages=bundle.stages, tokenizer=bundle.tokenizer)
    sessions = [
        engine.open(Request(voice=small_engine.voice(), text=small_engine.TEXT, seed=seed, max_length=40))
        for seed in (3, 4)
    ]
    heard = [[] for _ in sessions]
    while engine.num_open:
        engine.advance()
        for session, frames in zip(sessions, heard, strict=True):
            frames += [frame.samples for frame in session.take()]
    for seed, frames in zip((3, 4), heard, strict=True):
        wanted, _ = speak(small_engine.make_engine(), seed=seed)
        np.testing.assert_allclose(np.concatenate(frames), wanted, atol=1e-4)


def test_a_bundle_hears_as_the_encoders_do(bundle):
    parts, rng = small_bundle.make_parts(encoders=True), np.random.default_rng(5)
    tokenizer, speaker = (writer.reference_stage(parts, name) for name in (TOKENS, SPEAKER))
    assert bundle.stages.tokenizer is not None
    assert bundle.stages.speaker is not None
    for num_samples in (1_000, 16_123, 48_000):
        wave = (0.1 * rng.normal(size=num_samples)).astype(np.float32)
        np.testing.assert_array_equal(bundle.stages.tokenizer.tokenize(wave), tokenizer.tokenize(wave))
        np.testing.assert_allclose(bundle.stages.speaker.embed(wave), speaker.embed(wave), atol=1e-4)
    with pytest.raises(UserError, match=r"a recording of 3\.1 s: this bundle reads 3 s at most"):
        bundle.stages.tokenizer.tokenize(np.zeros(49_600, np.float32))


def test_what_no_program_was_made_for_is_refused(bundle):
    with pytest.raises(UserError, match="3 requests at once: this model's programs serve 2"):
        small_engine.make_engine(stages=bundle.stages, num_slots=3)
    engine, long = small_engine.make_engine(stages=bundle.stages), small_engine.voice(112)
    with pytest.raises(UserError, match=r"the flow must hold \d+ tokens, recording included, and has room for 100"):
        engine.enroll(long)


_SPEAKS = """
import numpy as np
from cv2jax.synthesis.bundle_engine import EngineOptions, make_bundle_engine
from cv2jax.synthesis.bundle import load_bundle
from cv2jax.synthesis.request import Request
voice = load_bundle(sys.argv[1]).voices["ann"]
engine = make_bundle_engine(sys.argv[1], EngineOptions(num_slots=2, normalizer="none"))
waveform, result = engine.speak(Request(voice=voice, text=sys.argv[3], seed=3, max_length=40))
assert not [name for name in sys.modules if name.startswith(("cv2jax.models", "cv2jax.tasks", "flax"))
            and sys.modules[name]]
np.save(sys.argv[2], waveform)
"""


def test_a_bundle_speaks_where_only_what_is_named_can_be_imported(exported, tmp_path):
    place, _ = exported
    out = tmp_path / "waveform.npy"
    done = run_only(BUNDLE, _SPEAKS, place, out, small_engine.TEXT)
    assert done.returncode == 0, done.stderr
    wanted, _ = speak(small_engine.make_engine())
    np.testing.assert_allclose(np.load(out), wanted, atol=1e-4)


def disturb(place, stage, array, poison=False):
    """Changes one array of a stage, or one number of it to NaN, and all hashes with it."""
    file = place / files.PARAMETERS / f"{stage}.safetensors"
    arrays = {name: np.array(values) for name, values in files.read_arrays(file).items()}
    if poison:
        arrays[array].reshape(-1)[-1] = np.nan
    else:
        arrays[array] = np.asarray(1.3 * arrays[array] + 0.2, arrays[array].dtype)
    files.write_arrays(file, arrays.items())
    manifest = files.read_manifest(place)
    manifest["files"] = files.describe_files(place)
    files.write_manifest(place, manifest)


@pytest.mark.parametrize(
    ("stage", "array"),
    [
        (SPEECH, "backbone/blocks_1/mlp/up/kernel"),
        (MEL, ""),
        (WAVE, "generator/conv_in/kernel"),
        (TOKENS, ""),
        (SPEAKER, "encoder/dense/kernel"),
    ],
)
def test_the_stage_that_drifts_is_named(exported, tmp_path, stage, array):
    place = tmp_path / "bundle"
    shutil.copytree(exported[0], place)
    kernels = [n for n in files.read_arrays(place / files.PARAMETERS / f"{stage}.safetensors") if n.endswith("kernel")]
    disturb(place, stage, array or kernels[0])
    heard = []
    report = selftest(place, heard.append)
    assert heard == report.checks
    assert report.drift is not None
    assert report.drift.stage == stage
    assert next(check.stage for check in report.checks if not check.passes) == stage


@pytest.mark.parametrize("stage", [SPEECH, MEL, WAVE, SPEAKER])
def test_a_parameter_that_is_no_number_is_named(exported, tmp_path, stage):
    place = tmp_path / "bundle"
    shutil.copytree(exported[0], place)
    names = list(files.read_arrays(place / files.PARAMETERS / f"{stage}.safetensors"))
    disturb(place, stage, names[-1], poison=True)
    report = selftest(place)
    assert report.drift is not None
    assert (report.drift.stage, report.drift.quantity) == (stage, "parameters")
    assert 0 < report.drift.error < 1


def test_a_bundle_is_written_again_from_itself_in_bfloat16(exported, tmp_path):
    source, out = exported[0], tmp_path / "again"
    again = writer.write_bundle(
        parts_of_bundle(source), out, sizes=small_bundle.SIZES, dtype="bfloat16", platforms=["cpu"]
    )
    assert all(check.passes for check in again.checks)
    flow = files.read_arrays(out / files.PARAMETERS / f"{MEL}.safetensors")
    for name, array in flow.items():
        fixed = name.rpartition("/")[2] in ("scale", "bias")
        assert array.dtype == (np.float32 if fixed else jnp.bfloat16), name
    wave = files.read_arrays(out / files.PARAMETERS / f"{WAVE}.safetensors")
    assert {str(array.dtype) for array in wave.values()} == {"float32"}
    golden = f"{files.GOLDEN}/{SPEECH}.npz"
    assert files.hash_file(out / golden) == files.hash_file(source / golden)  # still the fp32 model's answers
    assert load_bundle(out).voices.keys() == {"ann"}
    with pytest.raises(UserError, match="has its parameters in bfloat16"):
        export_bundle(None, tmp_path / "third", BundleOptions(from_bundle=str(out), dtype="float32"))


def test_where_the_gate_does_not_pass_nothing_is_written(tmp_path, monkeypatch):
    def served(name, config, params, dtype):
        arrays = served_params(name, config, params, dtype)
        return {k: 1.5 * v for k, v in arrays.items()} if name == WAVE else arrays

    monkeypatch.setattr(writer, "served_params", served)
    with pytest.raises(UserError, match="not written: hift_vocoder drifts from the float32 model"):
        writer.write_bundle(
            small_bundle.make_parts(),
            tmp_path / "bundle",
            sizes=dataclasses.replace(small_bundle.SIZES, cache_lengths=(128,), slot_counts=(1,), rooms=(50,)),
            platforms=["cpu"],
        )
    assert list(tmp_path.iterdir()) == []
    assert json.dumps(dataclasses.asdict(make_sizes(small_bundle.make_parts().mask)))
    assert served_config(WAVE, small_engine.VOCODER, "bfloat16").dtype == "float32"
