"""Special tokens, tags inside a text, and the prefixes that steer a voice."""

import pytest

from cv2jax.config import UserError
from cv2jax.text.tags import (
    END_OF_PROMPT,
    END_OF_TEXT,
    SOUND_TAGS,
    SPECIAL_TOKENS,
    TAGS,
    Prefix,
    Segment,
    TagState,
    build_instruct_prefix,
    build_speaker_prefix,
    check_more_tags,
    check_tags,
    check_tags_closed,
    split_prefix,
    split_tags,
)

# Appended behind the three tokens of the Qwen2 tokenizer; ids after spec official 2.3.
OFFICIAL_IDS = {
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|endofprompt|>": 151646,
    "[breath]": 151647,
    "<strong>": 151648,
    "</strong>": 151649,
    "[noise]": 151650,
    "[laughter]": 151651,
    "[cough]": 151652,
    "[clucking]": 151653,
    "[accent]": 151654,
    "[quick_breath]": 151655,
    "<laughter>": 151656,
    "</laughter>": 151657,
    "[hissing]": 151658,
    "[sigh]": 151659,
    "[vocalized-noise]": 151660,
    "[lipsmack]": 151661,
    "[mn]": 151662,
}


def test_special_tokens_stand_in_the_official_order():
    assert {token: 151644 + i for i, token in enumerate(SPECIAL_TOKENS)} == OFFICIAL_IDS
    assert END_OF_TEXT not in SPECIAL_TOKENS  # the Qwen2 tokenizer has it already
    assert set(TAGS) == {token for token in SPECIAL_TOKENS if "|" not in token}
    assert len(SOUND_TAGS) == 12


@pytest.mark.parametrize("tag", TAGS)
def test_every_tag_is_found(tag):
    assert split_tags(f"a{tag}") == [Segment("a", is_tag=False), Segment(tag, is_tag=True)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("plain", ["plain"]),
        ("[laughter]", ["[laughter]"]),
        ("Oh [laughter][breath] no", ["Oh ", "[laughter]", "[breath]", " no"]),
        ("很<strong>重</strong>要", ["很", "<strong>", "重", "</strong>", "要"]),
        ("[Laughter] [sic] <b>", ["[Laughter] [sic] <b>"]),
    ],
)
def test_segments_join_to_the_text(text, expected):
    segments = split_tags(text)
    assert [segment.text for segment in segments] == expected
    assert [segment.text for segment in segments if segment.is_tag] == [part for part in expected if part in TAGS]
    assert "".join(segment.text for segment in segments) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain [sic] <b>",
        "<strong>a</strong> and <strong>b</strong>",
        "<laughter>so <strong>funny</laughter> it</strong> was",
        "Speak softly.<|endofprompt|>Hello [breath]",
    ],
)
def test_sound_texts_pass_the_check(text):
    assert check_tags(text) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<strong>a", r"^text: <strong> is never closed by </strong>$"),
        ("a</laughter>", r"^text: </laughter> at character 1 was not opened before$"),
        ("<strong>a<strong>b</strong>", r"^text: <strong> at character 9 is opened inside another$"),
        ("<laughter></laughter></laughter>", r"</laughter> at character 21 was not opened"),
        ("a<|endofprmpt|>b", r"^text: <\|endofprmpt\|> does not belong in a text; only <\|endofprompt\|> does$"),
        ("a<|im_start|>b", r"<\|im_start\|> does not belong"),
        ("a<|endofprompt|>b<|endofprompt|>", r"^text: <\|endofprompt\|> stands 2 times"),
    ],
)
def test_the_check_names_the_fault(text, message):
    with pytest.raises(UserError, match=message):
        check_tags(text)


@pytest.mark.parametrize(
    "text",
    [
        "<strong>a",
        "a</laughter>",
        "so <strong>a<strong>b</strong>",
        "<laughter></laughter> </laughter>",
        "a<|endofprmpt|>b",
        "a <|endofprompt|>b<|endofprompt|> c",
        "<b> < <| <strong>x</strong> 1 < 2 <stronger [breath]",
        "Speak softly.<|endofprompt|>Hello <strong>you</strong>",
    ],
)
@pytest.mark.parametrize("size", [1, 3, 7])
def test_text_that_arrives_is_checked_as_if_it_were_whole(text, size):
    def check_all(*parts):
        try:
            state = TagState()
            for part in parts:
                state = check_more_tags(state, part)
            check_tags_closed(state)
        except UserError as error:
            return str(error)
        return None

    assert check_all(*[text[i : i + size] for i in range(0, len(text), size)]) == check_all(text)


def test_of_arriving_text_only_what_may_be_a_tag_is_held():
    state = check_more_tags(TagState(), "one <b> 2 < 3 <lau")
    assert (state.num_checked, state.held) == (14, "<lau")
    assert check_more_tags(state, "gh").held == "<laugh"
    assert check_more_tags(state, " x").held == ""
    with pytest.raises(UserError, match=r"<\|im_start\|> does not belong"):
        check_more_tags(check_more_tags(state, " <|im_st"), "art|>")


@pytest.mark.parametrize("instruction", ["用四川话说这句话", "Speak softly, like a speaker.", " as given. "])
def test_an_instruction_stays_as_given(instruction):
    prefix = build_instruct_prefix(instruction)
    assert prefix == f"{instruction}{END_OF_PROMPT}"
    assert build_instruct_prefix(prefix) == prefix
    assert split_prefix(prefix + "你好") == (Prefix("instruct", instruction), "你好")


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("", r"^instruction: it is empty"),
        (" \n", r"^instruction: it is empty"),
        (END_OF_PROMPT, r"^instruction: it is empty"),
        ("a<|endofprompt|>b", r"control tokens .* do not belong"),
        ("a<|endofprompt|><|endofprompt|>", r"control tokens .* do not belong"),
        ("unknown", r"^instruction 'unknown': it reads as a speaker prefix"),
        ("Speaker softly<|endofprompt|>", r"^instruction 'Speaker softly': it reads as a speaker prefix"),
    ],
)
def test_a_bad_instruction_is_refused(instruction, message):
    with pytest.raises(UserError, match=message):
        build_instruct_prefix(instruction)


@pytest.mark.parametrize(
    ("speaker", "prefix", "parsed"),
    [
        ("A", "Speaker A<|endofprompt|>", Prefix("speaker", "A")),
        ("p225", "Speaker p225<|endofprompt|>", Prefix("speaker", "p225")),
        ("小明", "Speaker 小明<|endofprompt|>", Prefix("speaker", "小明")),
        (None, "unknown<|endofprompt|>", Prefix("unknown_speaker", "")),
        ("unknown", "Speaker unknown<|endofprompt|>", Prefix("speaker", "unknown")),
    ],
)
def test_speaker_prefixes_round_trip(speaker, prefix, parsed):
    assert build_speaker_prefix(speaker) == prefix
    assert split_prefix(prefix) == (parsed, "")
    assert split_prefix(prefix + "Hello [breath].") == (parsed, "Hello [breath].")


@pytest.mark.parametrize("speaker", ["", " ", "A B", "A\n", "A<|endofprompt|>", "x|>"])
def test_a_bad_speaker_is_refused(speaker):
    with pytest.raises(UserError, match=r"^speaker .*: a name in a prefix is one word without control tokens$"):
        build_speaker_prefix(speaker)


def test_a_text_without_prefix_comes_back_whole():
    assert split_prefix("Speaker A said: unknown") == (None, "Speaker A said: unknown")
    assert split_prefix("") == (None, "")
    assert split_prefix("<|endofprompt|>skip me") == (Prefix("instruct", ""), "skip me")


def test_two_prefixes_are_refused():
    with pytest.raises(UserError, match=r"stands 2 times; a text has one prefix at most"):
        split_prefix("Speaker A<|endofprompt|>loud<|endofprompt|>Hi")
