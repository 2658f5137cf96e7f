"""Voices in files: back as they were, always the same bytes, no changed byte unnoticed, no voice of another model taken."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy

from cv2jax.audio.mel import FLOW_MEL, MelDefinition
from cv2jax.config import UserError
from cv2jax.synthesis.voice import FORMAT, Voice, _digest, load_voice, require_voice, save_voice, voices_in

HASHES = {"speech_tokenizer": "a" * 64, "speaker_encoder": "b" * 64}


def make_voice(num_tokens=5, seed=0, **fields):
    draw = np.random.default_rng(seed)
    return Voice(
        speaker_embedding=draw.normal(size=7).astype(np.float32),
        speech_tokens=draw.integers(0, 6561, num_tokens).astype(np.int32),
        mel=draw.normal(size=(2 * num_tokens, 80)).astype(np.float32),
        **{"text": "one two, „drei“ 四", "language": "en", "name": "ann", "seed": 3, "audio_sha256": "c" * 64}
        | HASHES
        | fields,
    )


def forge(path, voice, about=None, arrays=None):
    """A file with a right checksum over what no `save_voice` would write."""
    save_voice(path, voice)
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    told = json.loads(header["__metadata__"][FORMAT]) | (about or {})
    told.pop("sha256")
    tensors = safetensors.numpy.load(data) | (arrays or {})
    told["sha256"] = _digest(told, tensors)
    path.write_bytes(safetensors.numpy.save(tensors, {FORMAT: json.dumps(told)}))


@pytest.mark.parametrize("num_tokens", [0, 1, 88])
def test_a_voice_comes_back_as_it_was(tmp_path, num_tokens):
    definition = MelDefinition(mel_fmax_hz=7600.0)
    voice = make_voice(num_tokens, mel_definition=definition, warnings=("too loud", "too short"))
    save_voice(tmp_path / "new" / "v.safetensors", voice)
    back = load_voice(tmp_path / "new" / "v.safetensors")
    for field in dataclasses.fields(Voice):
        ours, theirs = getattr(voice, field.name), getattr(back, field.name)
        if isinstance(ours, np.ndarray):
            assert theirs.dtype == ours.dtype
            np.testing.assert_array_equal(theirs, ours)
        else:
            assert theirs == ours, field.name
    assert back.mel.flags.writeable
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["v.safetensors"]


def test_the_same_voice_gives_the_same_bytes_and_another_gives_others(tmp_path):
    files = []
    for number, voice in enumerate([make_voice(), make_voice(), make_voice(seed=1), make_voice(text="one two")]):
        save_voice(tmp_path / f"{number}.safetensors", voice)
        files.append((tmp_path / f"{number}.safetensors").read_bytes())
    assert files[0] == files[1]
    assert len(set(files)) == 3


def test_wide_types_are_narrowed_not_refused(tmp_path):
    voice = make_voice()
    wide = dataclasses.replace(
        voice, speech_tokens=voice.speech_tokens.astype(np.int64), mel=voice.mel.astype(np.float64)
    )
    save_voice(tmp_path / "v.safetensors", wide)
    assert load_voice(tmp_path / "v.safetensors").speech_tokens.dtype == np.int32


def test_no_changed_byte_and_no_cut_goes_unnoticed(tmp_path):
    path = tmp_path / "v.safetensors"
    save_voice(path, make_voice(1))
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    draw = np.random.default_rng(0)
    for place in [*range(8), *range(8, header, 4), *draw.integers(header, len(data), 40)]:
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << draw.integers(8))]) + data[place + 1 :])
        with pytest.raises(UserError, match=r"v\.safetensors: .*enroll|v\.safetensors: a voice of version"):
            load_voice(path)
    for length in [0, 3, 8, 100, header, header + 1, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"v\.safetensors: no whole file of a voice .*copy it again"):
            load_voice(path)
    path.write_bytes(data + b"0")
    with pytest.raises(UserError, match="no whole file of a voice"):
        load_voice(path)


def test_what_is_no_voice_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none\.safetensors: no such voice; give a file that `cv2jax enroll` wrote"):
        load_voice(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match=r"cannot read the voice \(Is a directory\)"):
        load_voice(tmp_path)
    other = tmp_path / "o.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(3)}, other)
    with pytest.raises(UserError, match=r"o\.safetensors: safetensors, but no voice"):
        load_voice(other)
    safetensors.numpy.save_file({"a": np.zeros(3)}, other, {FORMAT: "[]"})
    with pytest.raises(UserError, match="is no table"):
        load_voice(other)
    forge(other, make_voice(), {"version": 2, "mood": "glad"})
    with pytest.raises(UserError, match=r"a voice of version 2, newer than 1: update cv2jax or enroll"):
        load_voice(other)


@pytest.mark.parametrize(
    ("about", "arrays", "message"),
    [
        ({}, {"mel": np.zeros((9, 80), np.float32)}, r"the mel has shape \(9, 80\); its 5 tokens need \(10, 80\)"),
        ({}, {"mel": np.zeros((10, 40), np.float32)}, r"the mel has shape \(10, 40\)"),
        ({}, {"speaker_embedding": np.zeros((1, 7), np.float32)}, r"speaker_embedding is float32 of shape \(1, 7\)"),
        ({}, {"speech_tokens": np.zeros(5, np.float32)}, "speech_tokens is float32"),
        ({}, {"speaker_embedding": np.array([0, np.nan], np.float32)}, r"speaker embedding is not finite at \[1\]"),
        ({}, {"speaker_embedding": np.zeros(0, np.float32)}, "the speaker embedding is empty"),
        ({}, {"speech_tokens": np.array([1, -1, 0, 0, 0], np.int32)}, "speech token -1 at place 1 is negative"),
        ({"seed": "3"}, {}, "of other types"),
        ({"seed": -3}, {}, "seed -3: give a whole number from 0"),
        ({"text": None}, {}, "of other types"),
        ({"mood": "glad"}, {}, "mood"),
        ({"mel_definition": {"rate": 3}}, {}, "rate"),
    ],
)
def test_a_file_whose_parts_do_not_fit_is_refused(tmp_path, about, arrays, message):
    forge(tmp_path / "v.safetensors", make_voice(), about, arrays)
    with pytest.raises(UserError, match=message):
        load_voice(tmp_path / "v.safetensors")


def test_a_wrong_voice_is_never_written(tmp_path):
    path = tmp_path / "v.safetensors"
    voice = make_voice()
    bad = voice.mel.copy()
    bad[3, 4] = np.inf
    for fields, message in (
        ({"mel": bad}, r"ann: the mel is not finite at \[3, 4\]"),
        ({"mel": voice.mel[:-1]}, "cut both to the shorter one"),
        ({"text": "no\udc80"}, "text of the voice: no valid Unicode at character 2"),
    ):
        with pytest.raises(UserError, match=message):
            save_voice(path, dataclasses.replace(voice, **fields))
    for place, message in (
        ("v.npz", r"\.safetensors file"),
        (".", r"\.safetensors file"),
        ("d.safetensors", "a directory"),
    ):
        (tmp_path / "d.safetensors").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=message):
            save_voice(tmp_path / place, voice)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the voice"):
        save_voice(tmp_path / "file" / "v.safetensors", voice)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["d.safetensors", "file"]


def test_the_voices_of_a_directory(tmp_path):
    assert voices_in(tmp_path / "voices") == {}
    for name in ("zoe.safetensors", "ann.safetensors", ".bo.safetensors", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "dir.safetensors").mkdir()
    assert list(voices_in(tmp_path).items()) == [
        ("ann", tmp_path / "ann.safetensors"),
        ("zoe", tmp_path / "zoe.safetensors"),
    ]


def test_a_voice_of_another_model_is_refused_and_an_unknown_one_warned_of(caplog):
    voice, made_of = make_voice(), "a" * 12
    require_voice(voice, **HASHES)
    assert not caplog.records
    with pytest.raises(
        UserError, match=rf"ann: its speech tokens are of speech tokenizer {made_of}, the model's is d{{12}};"
    ):
        require_voice(voice, **HASHES | {"speech_tokenizer": "d" * 64})
    with pytest.raises(
        UserError, match=r"speaker embedding are of speaker encoder b{12}, the model's is e{12}; enroll"
    ):
        require_voice(voice, **HASHES | {"speaker_encoder": "e" * 64})
    other = dataclasses.replace(FLOW_MEL, mel_hop=256)
    with pytest.raises(UserError, match=r"its mel is another than the model's \(mel_hop: 480 → 256\)"):
        require_voice(voice, **HASHES, mel=other)
    require_voice(dataclasses.replace(voice, speaker_encoder=""), **HASHES)
    require_voice(voice, speech_tokenizer="", speaker_encoder="b" * 64)
    assert [record.getMessage() for record in caplog.records] == [
        "ann: the voice does not say which speaker encoder made its speaker embedding; not checked",
        "ann: the model does not say which speech tokenizer made its speech tokens; not checked",
    ]


def test_without_a_recording_only_the_embedding_has_to_fit(caplog):
    voice = make_voice(0, speech_tokenizer="", mel_definition=dataclasses.replace(FLOW_MEL, mel_hop=256))
    require_voice(voice, **HASHES)
    assert not caplog.records
    with pytest.raises(UserError, match=r"speaker encoder b{12}"):
        require_voice(voice, **HASHES | {"speaker_encoder": "e" * 64})
