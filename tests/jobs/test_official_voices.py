"""Official speakers and our voices say the same of each other."""

import numpy as np
import pytest

from cv2jax.config import UserError
from cv2jax.convert.speakers import read_speakers, write_speakers
from cv2jax.jobs.official_voices import entry_of, file_stem, read_voices, same_voice, speaker_of, voice_of
from cv2jax.models.flow_matching.config import FlowMatchingConfig
from cv2jax.synthesis.voice import Voice
from cv2jax.text.tokenizer import train_text_tokenizer

HASHES = {"speech_tokenizer": "abc", "speaker_encoder": "def"}
# spec/official.md 1.3: what upstream saves of a zero-shot speaker
ZERO_SHOT = {
    "prompt_text": np.int32,
    "prompt_text_len": np.int32,
    "llm_prompt_speech_token": np.int32,
    "llm_prompt_speech_token_len": np.int32,
    "flow_prompt_speech_token": np.int32,
    "flow_prompt_speech_token_len": np.int32,
    "prompt_speech_feat": np.float32,
    "prompt_speech_feat_len": np.int32,
    "llm_embedding": np.float32,
    "flow_embedding": np.float32,
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_text_tokenizer(["one two three"], 300, single_chinese=False)


def make_voice(num_tokens=5, seed=0, text="one tŵo"):
    rng = np.random.default_rng(seed)
    return Voice(
        speaker_embedding=rng.normal(size=24).astype(np.float32),
        speech_tokens=rng.integers(0, 60, num_tokens).astype(np.int32),
        mel=rng.normal(size=(2 * num_tokens, 80)).astype(np.float32),
        text=text if num_tokens else "",
        name="ann",
    )


def test_a_voice_with_a_recording_is_all_that_zero_shot_takes(tokenizer):
    voice = make_voice(7)
    entry = entry_of(voice, tokenizer)
    assert {name: entry[name].dtype for name in ZERO_SHOT} == ZERO_SHOT
    assert set(entry) == {*ZERO_SHOT, "embedding"}
    num_text = len(tokenizer.encode(voice.text))
    shapes = {name: entry[name].shape for name in entry if not name.endswith("_len")}
    assert shapes == {
        "prompt_text": (1, num_text),
        "llm_prompt_speech_token": (1, 7),
        "flow_prompt_speech_token": (1, 7),
        "prompt_speech_feat": (1, 14, 80),
        "llm_embedding": (1, 24),
        "flow_embedding": (1, 24),
        "embedding": (1, 24),
    }
    lengths = [
        int(entry[f"{name}_len"][0]) for name in ("prompt_text", "flow_prompt_speech_token", "prompt_speech_feat")
    ]
    assert lengths == [num_text, 7, 14]
    back = voice_of("ann", entry, tokenizer, HASHES)
    assert same_voice(back, voice)
    assert (back.name, back.speech_tokenizer, back.speaker_encoder) == ("ann", "abc", "def")
    back.check()


def test_a_speaker_alone(tokenizer):
    voice = make_voice(0)
    entry = entry_of(voice, tokenizer)
    assert list(entry) == ["embedding"]
    assert same_voice(voice_of("ann", entry, tokenizer, HASHES), voice)


def test_an_upstream_entry_of_uneven_lengths_is_cut_to_whole_tokens(tokenizer):
    entry = entry_of(make_voice(6), tokenizer)
    entry["prompt_speech_feat"] = entry["prompt_speech_feat"][:, :-3]
    del entry["embedding"]
    voice = voice_of("ann", entry, tokenizer, HASHES)
    assert (len(voice.speech_tokens), voice.mel.shape) == (4, (8, 80))
    np.testing.assert_array_equal(voice.mel, entry["prompt_speech_feat"][0, :8])
    voice.check()


def test_what_differs_makes_another_voice(tokenizer):
    voice = make_voice()
    for other in (make_voice(seed=1), make_voice(4), make_voice(text="one two")):
        assert not same_voice(voice, other)


def test_two_sides_that_differ_are_told(tokenizer, caplog):
    entry = entry_of(make_voice(), tokenizer)
    entry["llm_embedding"] = entry["llm_embedding"] + 1
    np.testing.assert_array_equal(
        voice_of("ann", entry, tokenizer, HASHES).speaker_embedding, entry["flow_embedding"][0]
    )
    assert "speaker 'ann': llm_embedding differs from flow_embedding" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flow_embedding": None, "embedding": None}, "has no embedding and no flow_embedding"),
        ({"flow_embedding": np.zeros(24, np.float32)}, r"flow_embedding has shape \[24\], and must be one row"),
        ({"flow_embedding": np.zeros((2, 24), np.float32)}, r"flow_embedding has shape \[2, 24\]"),
        ({"flow_embedding": np.zeros((1, 24), np.int32)}, "flow_embedding is of another kind"),
        ({"flow_embedding": "text"}, "flow_embedding is of another kind"),
        ({"prompt_speech_feat": None}, "prompt_speech_feat is missing"),
        ({"flow_prompt_speech_token": np.zeros((1, 5), np.float32)}, "flow_prompt_speech_token is of another kind"),
    ],
)
def test_an_entry_that_is_none_names_the_speaker(tokenizer, change, message):
    entry = entry_of(make_voice(), tokenizer) | change
    entry = {name: value for name, value in entry.items() if value is not None}
    with pytest.raises(UserError, match=rf"spk2info\.pt: speaker 'ann': {message}"):
        voice_of("ann", entry, tokenizer, HASHES)


@pytest.mark.parametrize("speaker", ["ann", "中文女", "a/b", "..", ".hidden", "50%", "a b\\c\n", "%2F"])
def test_any_id_is_a_file_name_and_back(speaker):
    stem = file_stem(speaker)
    assert speaker_of(stem) == speaker
    assert not set(stem) & set("/\\\n")
    assert not stem.startswith(".")


FLOW = FlowMatchingConfig(speaker_dim=24, num_speech_tokens=61)


def entry(key, **changes):
    tokenizer = train_text_tokenizer(["one two three"], 300, single_chinese=False)
    return {key: entry_of(make_voice(), tokenizer) | changes}


@pytest.mark.official
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (entry("ann", flow_prompt_speech_token=np.full((1, 5), 61, np.int32)), "speaker 'ann': has speech token 61, .* 0 … 60"),
        (entry("ann", flow_prompt_speech_token=np.full((1, 5), -1, np.int32)), "speaker 'ann': speech token -1 at place 0"),
        (entry("ann", prompt_text=np.full((1, 3), 999, np.int32)), "speaker 'ann': text token 999: the tokenizer's ids"),
        (entry("ann", embedding=np.ones((1, 9), np.float32), flow_embedding=np.ones((1, 9), np.float32)),
         "speaker 'ann': has an embedding of 9"),
        (entry("ann", flow_embedding=np.full((1, 24), np.nan, np.float32)), "speaker 'ann': the speaker embedding is"),
        (entry(""), "speaker '': its id is empty; give it another"),
        (entry("女" * 90), "speaker '女+': its id makes a name of 282 bytes, and a file's has 255 at most"),
        (entry("Ann") | entry("ann"), "speakers 'Ann' and 'ann': their files have one name where case"),
        (entry("e\u0301") | entry("\u00e9"), "speakers .*: their files have one name where case or accents"),
    ],
)  # fmt: skip
def test_speakers_of_another_model_or_without_a_file_name_are_one_line(tokenizer, entries, message, tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "spk2info.pt"
    write_speakers(path, entries)
    with pytest.raises(UserError, match=f"{path}: {message}") as caught:
        read_voices(path, tokenizer, FLOW, HASHES)
    assert "\n" not in str(caught.value)
    assert "ann: " not in str(caught.value)


@pytest.mark.official
def test_a_short_embedding_is_a_speaker_and_goes_back_as_it_was(tokenizer, tmp_path):
    torch = pytest.importorskip("torch")
    theirs = {"ann": {"embedding": torch.linspace(-1, 1, 24).bfloat16()[None]}}
    torch.save(theirs, tmp_path / "spk2info.pt")
    voice = read_voices(tmp_path / "spk2info.pt", tokenizer, FLOW, HASHES)["ann"]
    np.testing.assert_array_equal(voice.speaker_embedding, theirs["ann"]["embedding"].float()[0].numpy())
    write_speakers(tmp_path / "again.pt", read_speakers(tmp_path / "spk2info.pt"))
    back = torch.load(tmp_path / "again.pt", weights_only=True)["ann"]["embedding"]
    assert back.dtype == torch.bfloat16
    assert torch.equal(back, theirs["ann"]["embedding"])
