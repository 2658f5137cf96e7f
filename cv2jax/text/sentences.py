"""Sentences for the embedded corpus: an English slot grammar (with its JSGF) and free text in four languages.

Every sentence is a template filled from lists of our own words, so a sentence is a pure function of its index. The held-out
set is a pure function of the text alone: no seed, voice or language can move a sentence from one split to the other.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from functools import cache

LANGUAGES = ("en", "cmn", "ja", "ko")
KINDS = ("grammar", "free")
SPLITS = ("train", "test")

# The slot grammar: "<verb> the <colour> <object> <place>". Short common words, chosen by ear of pocketsphinx: each of them was
# heard right in at least 93 % of the sentences of our five understood voices (it confuses find with hide, give with the, ...).
GRAMMAR_SLOTS: dict[str, tuple[str, ...]] = {
    "verb": ("take", "bring", "move", "wash", "find", "carry", "drop", "show"),
    "colour": ("red", "green", "blue", "yellow", "white", "brown", "orange", "golden"),
    "object": ("ball", "chair", "lamp", "bottle", "basket", "window", "box", "flower"),
    "place": (
        "under the table",
        "on the mountain",
        "beside the garden",
        "from the market",
        "at the station",
        "across the street",
        "inside the castle",
        "along the road",
    ),
}
_GRAMMAR_PATTERN = "{verb} the {colour} {object} {place}"

# A template is a sequence of parts; each part is one literal or a choice. Parts are joined by the language's separator.
Template = Sequence[str | tuple[str, ...]]

_EN_WHO = ("my brother", "her sister", "the teacher", "our doctor", "the farmer", "his friend", "the children", "they")
_EN_THING = (
    "a small boat",
    "an old clock",
    "the yellow bicycle",
    "two black horses",
    "a warm coat",
    "the little dog",
    "some fresh bread",
    "a letter",
    "three green apples",
    "the silver ring",
)
_EN_WHERE = (*GRAMMAR_SLOTS["place"][:4], "in the city", "by the lake", "on the farm", "at school")
_EN_PAST = ("yesterday", "last night", "this morning", "on sunday", "last summer", "after lunch")

_TEMPLATES: dict[str, tuple[Template, ...]] = {
    "en": (
        (_EN_PAST, _EN_WHO, ("bought", "found", "lost", "sold", "saw", "painted"), _EN_THING),
        (_EN_WHO, ("left", "kept", "forgot"), _EN_THING, _EN_WHERE),
        (("where did", "when did", "why did", "how did"), _EN_WHO, ("buy", "find", "lose", "sell"), _EN_THING),
        (
            ("i think", "i hope", "she said", "we know"),
            _EN_WHO,
            "will",
            ("come home", "write a letter", "call you", "drink some water", "play music", "go to school"),
            ("tomorrow", "tonight", "next week", "before lunch", "on sunday", "in the morning"),
        ),
        (
            "there are",
            ("two", "three", "four", "five", "six", "seven"),
            ("small", "old", "white", "black", "big"),
            ("horses", "birds", "children", "boats", "dogs", "apples"),
            _EN_WHERE,
        ),
        (
            "the",
            ("cold", "warm", "strong", "soft"),
            ("wind", "rain", "snow", "light"),
            ("came over", "moved across", "left"),
            ("the river", "the city", "the lake", "the mountain", "the farm", "the garden"),
            _EN_PAST,
        ),
    ),
    "cmn": (
        (
            ("我", "他", "她", "我们", "老师", "妈妈", "爸爸", "我的朋友"),
            ("今天", "每天", "早上", "晚上", "周末", "下午"),
            ("在家里", "在学校", "在公园", "在商店", "在火车上", "在北京"),
            ("看书", "吃饭", "喝茶", "听音乐", "学习中文", "打电话", "画画", "唱歌"),
        ),
        (
            ("妈妈说", "我觉得", "他告诉我", "大家知道"),
            ("这", "那"),
            ("只小猫", "只小狗", "本书", "个苹果", "朵花", "辆汽车"),
            ("很", "真", "非常", "不太"),
            ("大", "小", "好看", "有意思", "干净"),
        ),
        (
            ("请给我", "他买了", "我们要", "桌子上有"),
            ("一", "两", "三", "四", "五", "六", "七", "八"),
            ("杯茶", "本书", "个苹果", "张地图", "碗米饭", "瓶水"),
            ("和",),
            ("一个鸡蛋", "一张报纸", "一把椅子", "一条鱼"),
        ),
    ),
    "ja": (
        (
            ("わたしは", "せんせいは", "ともだちは", "おかあさんは", "おとうとは", "いもうとは"),
            ("けさ", "まいにち", "どようびに", "ゆうがた", "よるに"),
            ("うちで", "がっこうで", "こうえんで", "えきで", "まちで"),
            (
                "ほんを よみます",
                "おちゃを のみます",
                "うたを うたいます",
                "ごはんを たべます",
                "えを かきます",
                "おんがくを ききます",
                "てがみを かきます",
                "しゃしんを とります",
            ),
        ),
        (
            ("この", "その", "あの"),
            ("あかい", "しろい", "くろい", "あたらしい", "ふるい"),
            ("くるまは", "かばんは", "いえは", "ぼうしは", "はなは", "くつは"),
            ("とても", "すこし", "ほんとうに"),
            ("おおきいです", "ちいさいです", "たかいです", "きれいです"),
        ),
        (
            ("つくえの", "いすの", "きの", "いえの", "はこの", "やまの"),
            ("うえに", "したに", "よこに", "うしろに", "まえに"),
            ("ねこが", "いぬが", "とりが", "こどもが", "うさぎが"),
            ("います", "ねています", "あそんでいます"),
        ),
    ),
    "ko": (
        (
            ("나는", "선생님은", "친구는", "엄마는", "동생은", "우리는", "할머니는"),
            ("아침에", "저녁에", "주말에", "매일", "토요일에"),
            ("집에서", "학교에서", "공원에서", "시장에서", "바다에서"),
            (
                "책을 읽어요",
                "차를 마셔요",
                "노래를 불러요",
                "친구를 만나요",
                "밥을 먹어요",
                "그림을 그려요",
                "음악을 들어요",
                "사진을 찍어요",
            ),
        ),
        (
            ("이", "그", "저"),
            ("빨간", "하얀", "작은", "새로운", "오래된"),
            ("자동차는", "가방은", "모자는", "의자는", "신발은", "집은"),
            ("아주", "조금", "정말", "너무"),
            ("예뻐요", "비싸요", "무거워요", "깨끗해요", "좋아요"),
        ),
        (
            ("책상", "의자", "나무", "창문", "상자", "산"),
            ("위에", "아래에", "뒤에", "앞에", "옆에"),
            ("고양이가", "강아지가", "아이가", "토끼가", "새가"),
            ("있어요", "자고 있어요", "놀고 있어요"),
        ),
    ),
}
_SEPARATOR = {"en": " ", "cmn": "", "ja": " ", "ko": " "}

_GRAMMAR_REGEX = re.compile(
    _GRAMMAR_PATTERN.format(**{name: f"(?:{'|'.join(choices)})" for name, choices in GRAMMAR_SLOTS.items()})
)


def list_kinds(language: str) -> tuple[str, ...]:
    """List the kinds of sentence a language has: only English has a slot grammar besides free text."""
    return KINDS if language == "en" else ("free",)


def is_grammar_sentence(text: str) -> bool:
    """Tell whether the slot grammar can produce `text` (case and repeated spaces aside)."""
    return _GRAMMAR_REGEX.fullmatch(" ".join(text.lower().split())) is not None


@cache
def list_sentences(language: str, kind: str) -> tuple[str, ...]:
    """List every distinct sentence of a kind, in a fixed order; free text never contains a grammar sentence."""
    if kind not in list_kinds(language):
        raise ValueError(f"no {kind!r} sentences for language {language!r}")
    if kind == "grammar":
        fillings = itertools.product(*GRAMMAR_SLOTS.values())
        return tuple(_GRAMMAR_PATTERN.format(**dict(zip(GRAMMAR_SLOTS, words, strict=True))) for words in fillings)
    sentences: dict[str, None] = {}
    for template in _TEMPLATES[language]:
        choices = [(part,) if isinstance(part, str) else part for part in template]
        for words in itertools.product(*choices):
            sentences.setdefault(_SEPARATOR[language].join(words))
    return tuple(text for text in sentences if not is_grammar_sentence(text))


def is_held_out(text: str, held_out_share: float) -> bool:
    """Tell whether a sentence belongs to the test split: a hash of its letters alone falls below the share.

    Letters only, case folded: two spellings that normalise to the same transcript are always on the same side. A larger
    share only adds sentences, so a model trained with one share may be judged on any corpus made with a smaller one.
    """
    letters = "".join(character for character in text.casefold() if character.isalnum())
    digest = hashlib.sha256(letters.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < held_out_share * 2.0**64


def list_split(language: str, kind: str, split: str, held_out_share: float) -> tuple[str, ...]:
    """List a kind's sentences of one split ("train" or "test")."""
    wanted = split == "test"
    return tuple(text for text in list_sentences(language, kind) if is_held_out(text, held_out_share) == wanted)


def order_sentences(sentences: Sequence[str], seed: int, epoch: int) -> list[str]:
    """Shuffle sentences by hash: the same order on every machine, Python and numpy version."""
    return sorted(sentences, key=lambda text: hashlib.sha256(f"{seed}|{epoch}|{text}".encode()).digest())


def count_grammar_sentences() -> int:
    """Count what the slot grammar can say: the product of its slots' sizes."""
    return math.prod(len(choices) for choices in GRAMMAR_SLOTS.values())


def format_jsgf() -> str:
    """Write the slot grammar in the Java Speech Grammar Format that stock recognisers (pocketsphinx) read."""
    pattern = re.sub(r"\{(\w+)\}", r"<\1>", _GRAMMAR_PATTERN)
    rules = [f"<{name}> = {' | '.join(choices)};" for name, choices in GRAMMAR_SLOTS.items()]
    return "\n".join(["#JSGF V1.0;", "grammar sentences;", f"public <sentence> = {pattern};", *rules, ""])
