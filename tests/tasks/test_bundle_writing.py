"""What of a bundle can be told without a program: sizes, types of parameters, states, refusals."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.jobs.export_bundle import BundleOptions, export_bundle
from cv2jax.nn.chunks import ChunkMask
from cv2jax.nn.signal import ENDLESS
from cv2jax.parallel.sharding import platform
from cv2jax.synthesis import bundle_files as files
from cv2jax.synthesis.bundle import MEL, SPEECH, WAVE, load_bundle
from cv2jax.synthesis.voice import save_voice
from cv2jax.tasks import bundle as writer
from cv2jax.tasks.bundle_parts import flatten, parts_of_bundle, served_config, served_params, unflatten
from cv2jax.tasks.bundle_programs import make_sizes, make_table
from tests import small_bundle
from tests.synthesis import small_engine

PLATFORMS = ("cpu", "cuda", "tpu")


@pytest.fixture(scope="module")
def parts():
    return small_bundle.make_parts()


@pytest.fixture
def skeleton(tmp_path, parts, monkeypatch):
    """A bundle without programs: what is refused before one is called."""
    monkeypatch.setattr(writer, "hold_back", lambda config: 77)  # it traces the model, which takes seconds
    for name in (files.PARAMETERS, files.PROGRAMS, files.VOICES, files.GOLDEN):
        (tmp_path / name).mkdir()
    parts.text_tokenizer.save(tmp_path / files.TOKENIZER)
    files.write_arrays(tmp_path / files.PARAMETERS / f"{WAVE}.safetensors", [("x", np.zeros(64, np.float32))])
    save_voice(tmp_path / files.VOICES / "ann.safetensors", small_engine.voice())
    write_again(tmp_path, writer._manifest(parts, small_bundle.SIZES, "float32", PLATFORMS))
    return tmp_path


def write_again(place, manifest, **changes):
    files.write_manifest(place, manifest | {"files": files.describe_files(place)} | changes)


def test_the_stages_of_a_bundle_are_described_as_the_models_are(skeleton, parts):
    stages, tokenizer, voices, facts, _ = load_bundle(skeleton)
    assert tokenizer.hash == small_engine.tokenizer().hash
    np.testing.assert_array_equal(voices["ann"].mel, small_engine.voice().mel)
    assert (facts.mask, facts.normalizer, facts.dtype) == (ChunkMask(chunk=5), "none", "float32")
    assert stages.tokenizer is None
    assert stages.speech is not None
    assert stages.mel.solve is None
    flow, config = small_engine.FLOW, parts.stages[SPEECH].config
    for name in ("num_speech_tokens", "num_mels", "speaker_dim"):
        assert getattr(stages.mel, name) == getattr(flow, name)
    assert (stages.mel.trained, stages.mel.mel_definition) == (flow.masks, small_engine.MEL)
    assert (stages.mel.speech_tokenizer, stages.mel.speaker_encoder) == ("tok", "spk")
    assert (stages.mel.hop_sizes, stages.mel.rooms) == (small_bundle.SIZES.hop_sizes, small_bundle.SIZES.rooms)
    assert (stages.wave.hold_back, stages.wave.endless, stages.wave.mel_definition) == (77, ENDLESS, small_engine.MEL)
    assert stages.speech.text_vocabulary_size == config.backbone.vocabulary_size
    assert (stages.speech.num_speech_tokens, stages.speech.ratio) == (config.num_speech_tokens, config.ratio)
    assert stages.speech.sampler == writer.SAMPLER


@pytest.mark.parametrize(
    "text", ["", " ", "cafe\u0301 \U0001f600", "\u0e01\u0e33 <|en|>x[laughter]", "a\r\n\n b\t1234"]
)
def test_the_tokenizer_of_a_bundle_gives_the_same_ids(skeleton, text):
    assert load_bundle(skeleton).tokenizer.encode(text) == small_engine.tokenizer().encode(text)


def test_what_is_wrong_with_a_bundle_is_said_in_one_line(skeleton):
    manifest = files.read_manifest(skeleton)
    for changes, line in (
        ({"calling_convention": 99}, r"too new for jax .*--from_bundle"),
        ({"platforms": ["tpu"]}, r"has programs for tpu, this device is a cpu"),
        ({"text_tokenizer": "0" * 64}, r"gives other ids than the bundle's"),
    ):
        write_again(skeleton, manifest, **changes)
        with pytest.raises(UserError, match=line) as error:
            load_bundle(skeleton)
        assert "\n" not in str(error.value)
    write_again(skeleton, manifest)
    voice = skeleton / files.VOICES / "ann.safetensors"
    data = bytearray(voice.read_bytes())
    data[len(data) // 2] ^= 1
    voice.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"voices/ann\.safetensors: is damaged"):
        load_bundle(skeleton)


def test_a_size_that_is_not_there_is_told_when_it_is_needed(skeleton):
    write_again(skeleton, files.read_manifest(skeleton), states={MEL: {}, WAVE: {}, SPEECH: {"b1.s128": []}})
    stages = load_bundle(skeleton).stages
    assert stages.speech is not None
    with pytest.raises(UserError, match=r"text_speech_lm has no programs of size b2\.s128, only b1\.s128"):
        stages.speech.init_state(2, 128)


def test_sizes_reach_as_far_as_is_asked():
    sizes = make_sizes(ChunkMask(chunk=25), slots=4, seconds=60.0)
    assert sizes.slot_counts == (1, 4)
    assert (sizes.rooms, sizes.hop_sizes) == ((200, 400, 800, 1600), (25, 50, 100))
    assert sizes.cache_lengths == (512, 1024, 2048)
    assert sizes.wave_sizes == (20, 50, 100)
    assert make_sizes(ChunkMask(chunk=10), slots=1, seconds=8.0).hop_sizes == (30, 60, 120)
    assert make_sizes(ChunkMask(chunk=10), slots=1, seconds=8.0).rooms == (200,)
    for wrong in ({"slots": 0}, {"seconds": 0.5}, {"seconds": float("nan")}):
        with pytest.raises(UserError, match=r"--slots|--seconds"):
            make_sizes(ChunkMask(chunk=25), **wrong)


def test_parameters_are_cast_where_a_call_would_cast_them(parts):
    flow = parts.stages[MEL]
    arrays = served_params(MEL, flow.config, flow.load(), "bfloat16")
    kinds = {str(a.dtype) for n, a in arrays.items() if n.rpartition("/")[2] in ("scale", "bias")}
    assert kinds == {"float32"}
    assert {str(a.dtype) for n, a in arrays.items() if n.endswith("kernel")} == {"bfloat16"}
    assert served_config(MEL, flow.config, "bfloat16").dtype == "bfloat16"
    wave = parts.stages[WAVE]
    whole = served_params(WAVE, wave.config, wave.load(), "bfloat16")
    assert {str(a.dtype) for a in whole.values()} == {"float32"}


def test_trees_are_dicts_of_paths_and_back():
    tree = {"a": {"b": np.ones(2), "c": {"d": np.zeros(1)}}, "e": np.ones(3)}
    flat = flatten(tree)
    assert list(flat) == ["a/b", "a/c/d", "e"]
    assert jax.tree.structure(unflatten(flat)) == jax.tree.structure(tree)


def test_the_table_of_a_state_starts_as_the_state_does():
    state = {"cache": {"keys": jnp.zeros((1, 4)), "positions": jnp.full((1, 4), -1)}, "status": jnp.zeros(2, int)}
    leaves = {leaf.name: leaf for leaf in make_table(state)}
    assert [leaves[name].fill for name in ("cache/keys", "cache/positions", "status")] == [0, -1, 0]
    assert leaves["cache/keys"].may_stay
    assert not leaves["cache/positions"].may_stay
    assert leaves["status"].resets


def test_programs_for_accelerators_are_traced_as_on_one():
    assert platform() == "cpu"
    for name, wanted in (("cuda", "gpu"), ("tpu", "tpu"), ("cpu", "cpu")):
        with writer._lowering_for(name):
            assert platform() == wanted
    assert writer._groups(PLATFORMS) == [["cpu"], ["cuda", "tpu"]]


def test_what_cannot_be_exported_is_refused_before_any_work(tmp_path, parts):
    (tmp_path / "there").mkdir()
    sizes = small_bundle.SIZES
    for changes, line in (
        ({"dtype": "float16"}, "--dtype float16: choose float32 or bfloat16"),
        ({"platforms": ["cpu", "npu"]}, "--platforms cpu,npu: choose among cpu, cuda, tpu"),
        ({"platforms": ["tpu"]}, "add cpu, this machine's"),
    ):
        with pytest.raises(UserError, match=line):
            writer.write_bundle(parts, tmp_path / "new", sizes=sizes, **changes)
    with pytest.raises(UserError, match="exists already"):
        writer.write_bundle(parts, tmp_path / "there", sizes=sizes)
    with pytest.raises(UserError, match="has its parameters in bfloat16"):
        writer.write_bundle(dataclasses.replace(parts, dtype="bfloat16"), tmp_path / "new", sizes=sizes)
    for model, options in ((None, BundleOptions()), ("model", BundleOptions(from_bundle="old"))):
        with pytest.raises(UserError, match="give one source"):
            export_bundle(model, tmp_path / "new", options)
    with pytest.raises(UserError, match="no bundle"):
        parts_of_bundle(tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_voices_of_another_model_or_of_one_name_are_refused(tmp_path, parts):
    other = dataclasses.replace(small_engine.voice(), speech_tokenizer="another")
    save_voice(tmp_path / "eve.safetensors", other)
    with pytest.raises(UserError, match="its speech tokens are of speech tokenizer another"):
        writer.write_bundle(parts, tmp_path / "new", sizes=small_bundle.SIZES, voices=[tmp_path / "eve.safetensors"])
    twice = [tmp_path / "eve.safetensors"] * 2
    with pytest.raises(UserError, match="there is a voice 'eve' already"):
        writer.write_bundle(parts, tmp_path / "new", sizes=small_bundle.SIZES, voices=twice)
    with pytest.raises(UserError, match="a bundle takes no path with bytes that are not UTF-8; rename it"):
        writer.write_bundle(
            parts, tmp_path / "new", sizes=small_bundle.SIZES, voices=[os.fsdecode(b"ev\xff.safetensors")]
        )
    assert [path.name for path in tmp_path.iterdir()] == ["eve.safetensors"]


def test_a_file_that_cannot_be_written_is_told_at_the_place_that_was_asked_for(tmp_path, parts, monkeypatch):
    def fail(parts, voices, place):
        (place / files.VOICES / "ann.safetensors").write_bytes(b"")
        files.write_bytes(place / files.VOICES / "ann.safetensors" / "x", b"")  # in a file

    monkeypatch.setattr(writer, "_copy_voices", fail)
    out = tmp_path / "new"
    with pytest.raises(UserError) as error:
        writer.write_bundle(parts, out, sizes=small_bundle.SIZES)
    assert str(error.value).startswith(f"{out}/{files.VOICES}/ann.safetensors/x: cannot be written (")
    assert list(tmp_path.iterdir()) == []
