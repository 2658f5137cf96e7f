"""cosyvoice2.yaml is data: its tags build, run and include nothing, and sizes are found through them."""

import pathlib

import pytest

from cv2jax.config import UserError
from cv2jax.convert.official_yaml import Tagged, YamlSizes, read_yaml

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "official_model_tiny" / "cosyvoice2.yaml"


def read(path, text):
    path.write_text(text, encoding="utf-8")
    return read_yaml(path)


def sizes(path, text):
    return YamlSizes(read(path, text), path)


def test_the_golden():
    values = read_yaml(GOLDEN)
    assert values["llm"].tag == "!new:cosyvoice.llm.llm.Qwen2LM"
    assert values["llm"].value["llm"].value["pretrain_path"] == Tagged("!ref", "<qwen_pretrain_path>")
    found = YamlSizes(values, GOLDEN)
    assert found.integer("llm.speech_token_size") == 61
    assert found.integer("hift.sampling_rate") == 24000  # behind a reference
    assert found.number("flow.decoder.cfm_params.content.sigma_min") == 1e-6  # which YAML takes for a text
    assert found.integers("hift.upsample_rates") == (8, 5, 3)
    assert found.rows("hift.resblock_dilation_sizes") == ((1, 3, 5),) * 3


EVIL = """
__seed: !apply:os.system ['touch {marker}']
__run: !apply:subprocess.check_call [['touch', '{marker}']]
a: !!python/object/apply:os.system ['touch {marker}']
b: !!python/object/new:os.system ['touch {marker}']
c: !!python/name:os.system ''
d: !new:pathlib.Path.touch
    self: '{marker}'
e: !include:{marker}
f: !copy <a>
g: !<tag:example.org,2020:thing> {{x: 1}}
h: !strange
    - 1
    - !new:os.system ['touch {marker}']
flow: !unknown.Class
    vocab_size: 12
"""


def test_nothing_is_built_run_or_included(tmp_path):
    marker = tmp_path / "ran"
    found = sizes(tmp_path / "a.yaml", EVIL.format(marker=marker))
    assert not marker.exists()
    assert found.integer("flow.vocab_size") == 12
    values = read_yaml(tmp_path / "a.yaml")
    assert values["a"] == Tagged("!os.system", [f"touch {marker}"])
    assert values["__run"] == Tagged("!apply:subprocess.check_call", [["touch", str(marker)]])
    assert values["h"].value[1].tag == "!new:os.system"
    assert values["g"].value == {"x": 1}
    assert isinstance(values["e"], Tagged)
    assert not marker.exists()


def test_references_and_their_products(tmp_path):
    text = """
chunk: 25
ratio: 2
inner: {deep: {size: 7}}
one: !ref <chunk>
two: !ref <chunk> * <ratio>
three: !ref <inner.deep.size>
four: !ref <one>
five: !ref <chunk> + <ratio>
six: !ref <nowhere>
"""
    found = sizes(tmp_path / "a.yaml", text)
    assert [found.integer(key) for key in ("one", "two", "three", "four")] == [25, 50, 7, 25]
    assert found.has("five")
    assert not found.has("six")
    assert found.integer("six", 3) == 3
    with pytest.raises(UserError, match=r"a\.yaml: five is !ref <chunk> \+ <ratio>; it must be a number"):
        found.integer("five")
    with pytest.raises(UserError, match=r"round in a circle"):
        sizes(tmp_path / "b.yaml", "a: !ref <b>\nb: !ref <a>\n").integer("a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("llm: [1, 2", "is no YAML"),
        ("- 1\n- 2\n", "holds no table of keys"),
        ("", "holds no table of keys"),
        ("? [1, 2]\n: 3\n? {a: 1}\n: 4\n", "is no YAML"),
        ("a: &a [*a2]\n", "is no YAML"),
        ("a: \x00\n", "is no YAML"),
    ],
)
def test_what_is_no_yaml_is_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=rf"a\.yaml: {message}") as caught:
        read(tmp_path / "a.yaml", text)
    assert "\n" not in str(caught.value)


def test_what_grows_without_end_is_one_line_and_quick(tmp_path):
    lists = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    found = sizes(tmp_path / "a.yaml", lists + "tagged: !x [*a59, !y [*a59], *a59]\nmany: [" + "1," * 300 + "]\n")
    for key, message in (
        ("a59", r"a59 is \[\[\[\.\.\.\].*; it must be a number"),
        ("tagged", "tagged is"),
        ("many", "many is"),
    ):
        with pytest.raises(UserError, match=message):
            found.number(key)
        with pytest.raises(UserError, match="it must be a list of"):
            found.integers(key)
    with pytest.raises(UserError, match="tagged is"):
        sizes(tmp_path / "b.yaml", lists + "tagged: !ref [*a59, !y [*a59]]\n").integer("tagged")
    chain = "".join(f"b{i}: !ref <b{i - 1}> * <b{i - 1}>\n" for i in range(1, 60))
    found = sizes(tmp_path / "c.yaml", "b0: 1\n" + chain)
    assert found.integer("b59") == 1
    found = sizes(tmp_path / "d.yaml", "b0: 10\n" + chain)
    assert found.integer("b3") == 10**8
    with pytest.raises(UserError, match=r"b59 is !ref <b58> \* <b58>; it must be a number"):
        found.integer("b59")
    merged = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60))
    with pytest.raises(UserError, match=r"is no YAML \(merge keys are not read here"):
        read(tmp_path / "e.yaml", merged)


@pytest.mark.parametrize("digits", ["9" * 400, "99999999999999999999"])
def test_numbers_that_no_model_has(tmp_path, digits):
    found = sizes(tmp_path / "a.yaml", f"width: {digits}\nrates: [1, {digits}]\n")
    with pytest.raises(UserError, match=r"width is 999.*; it must be a smaller number"):
        found.integer("width")
    with pytest.raises(UserError, match=r"rates is .*; it must be a list of whole numbers"):
        found.integers("rates")


def test_odd_files(tmp_path):
    with pytest.raises(UserError, match=r"gone\.yaml: there is no such file"):
        read_yaml(tmp_path / "gone.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(UserError, match=r"latin\.yaml: is no YAML"):
        read_yaml(tmp_path / "latin.yaml")
    (tmp_path / "huge.yaml").write_bytes(b"#" * (1 << 20) + b"\na: 1\n")
    with pytest.raises(UserError, match="larger than a megabyte"):
        read_yaml(tmp_path / "huge.yaml")
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 5000)
    with pytest.raises(UserError, match=r"deep\.yaml: is no YAML"):
        read_yaml(tmp_path / "deep.yaml")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.integer("gone"), "gone is missing; it must be a number"),
        (lambda s: s.integer("half"), r"half is 0\.5; it must be a whole number"),
        (lambda s: s.number("switch"), "switch is True; it must be a number"),
        (lambda s: s.number("nan"), "nan is nan; it must be a number"),
        (lambda s: s.number("word"), "word is 'abc'; it must be a number"),
        (lambda s: s.number("built"), r"built is \{'a': 1\}; it must be a number"),
        (lambda s: s.integers("half"), r"half is 0\.5; it must be a list of whole numbers"),
        (lambda s: s.integers("mixed"), r"mixed is \[1, 'a'\]; it must be a list of whole numbers"),
        (lambda s: s.rows("mixed"), "mixed is 1; it must be a list of whole numbers"),
        (lambda s: s.rows("half"), r"half is 0\.5; it must be a list of lists"),
    ],
)
def test_sizes_of_a_wrong_kind_name_file_and_key(tmp_path, call, message):
    text = "half: 0.5\nswitch: true\nnan: .nan\nword: abc\nmixed: [1, a]\nbuilt: !new:os.system {a: 1}\n"
    with pytest.raises(UserError, match=rf"a\.yaml: {message}"):
        call(sizes(tmp_path / "a.yaml", text))
