"""Configs: overrides with name and type errors, round trips, comparison, presets."""

import dataclasses
from typing import Literal

import pytest

from cv2jax import config as c


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    width: int = 8
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"
    deep: bool = False
    sizes: tuple[int, ...] = (1, 2)
    path: str | None = None

    def validate(self) -> None:
        if self.width % 2:
            raise c.UserError(f"model.width={self.width}: must be even")


def make() -> c.TrainConfig:
    return c.TrainConfig(name="n", task="t", model=Model(), num_steps=10)


@pytest.mark.parametrize(
    ("assignment", "read", "value"),
    [
        ("model.width=256", lambda x: x.model.width, 256),
        ("model.rate=1", lambda x: x.model.rate, 1.0),
        ("model.rate=1e-3", lambda x: x.model.rate, 1e-3),
        ("model.kind=b", lambda x: x.model.kind, "b"),
        ("model.deep=true", lambda x: x.model.deep, True),
        ("model.sizes=(3,4,5)", lambda x: x.model.sizes, (3, 4, 5)),
        ("model.path=/a=b", lambda x: x.model.path, "/a=b"),
        ("model.path=none", lambda x: x.model.path, None),
        ("name='x y'", lambda x: x.name, "x y"),
        ("optimizer.schedule=constant", lambda x: x.optimizer.schedule, "constant"),
    ],
)
def test_override_sets_the_value_in_its_type(assignment, read, value):
    got = read(c.override(make(), [assignment]))
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model.widht=3", "'model.widht' is unknown; did you mean 'width'"),
        ("modle.width=3", "'modle.width' is unknown; did you mean 'model'"),
        ("model.width=big", "model.width=big: expected int, got str"),
        ("model.width=1.5", "model.width=1.5: expected int, got float"),
        ("model.width=True", "expected int, got bool"),
        ("model.rate=fast", "expected float"),
        ("model.kind=c", "choose one of a, b"),
        ("model.sizes=(1,'x')", "model.sizes='x': expected int"),
        ("model=3", "'model' is a group"),
        ("num_steps.x=3", "'num_steps' is a single value"),
        ("num_steps", "write key=value"),
    ],
)
def test_a_wrong_override_names_key_and_mend(assignment, message):
    with pytest.raises(c.UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
        c.override(make(), [assignment])


def test_overrides_apply_in_order_and_leave_the_original():
    first = make()
    assert c.override(first, ["seed=1", "seed=2"]).seed == 2
    assert first.seed == 0


def test_round_trip_through_json_values_and_hashable():
    config = c.override(make(), ["model.sizes=(7,)", "mesh.fsdp=4"])
    again = c.from_dict(c.TrainConfig, c.to_dict(config), model=Model)
    assert again == config
    assert hash(again) == hash(config)


def test_from_dict_refuses_an_unknown_key():
    values = c.to_dict(make())
    values["data"]["corpsu"] = "x"
    with pytest.raises(c.UserError, match="'corpsu' is unknown to DataConfig; did you mean 'corpus'"):
        c.from_dict(c.TrainConfig, values, model=Model)


def test_differences_name_both_sides():
    a, b = c.to_dict(make()), c.to_dict(c.override(make(), ["model.width=10", "seed=3"]))
    del b["name"]
    assert c.differences(a, b) == ["model.width: 8 → 10", "name: 'n' → 'absent'", "seed: 0 → 3"]


def test_format_prints_every_leaf():
    text = c.format_config(make())
    assert len(text.splitlines()) == len(c.flatten(make()))
    assert "model.width" in text


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model.width=7", "model.width=7"),
        ("mesh.fsdp=0", "mesh.fsdp=0"),
        ("mesh.data=-2", "mesh.data=-2"),
        ("data.batch_seconds=0", "data.batch_seconds=0"),
        ("data.min_seconds=40", "data.min_seconds=40"),
        ("data.num_workers=-1", "data.num_workers=-1"),
        (
            "data.embedding_of=speaker",
            "data.embedding_of=speaker: there are no embeddings; give data.speaker_embeddings",
        ),
        ("optimizer.learning_rate=0", "optimizer.learning_rate=0"),
        ("optimizer.warmup_steps=-1", "optimizer.warmup_steps=-1"),
        ("optimizer.beta1=1", r"optimizer.beta1=1.0: must lie in \[0, 1\)"),
        ("optimizer.beta2=-0.1", "optimizer.beta2=-0.1"),
        ("optimizer.final_learning_rate=1", "final_learning_rate=1.0: must not exceed optimizer.learning_rate"),
        ("optimizer.weight_decay=1e400", "optimizer.weight_decay=inf: must be a finite number"),
        ("data.batch_seconds=1e400", "data.batch_seconds=inf: must be a finite number"),
        ("model.rate=-1e400", "model.rate=-inf: must be a finite number"),
        ("num_steps=0", "num_steps=0"),
        ("evaluate_utterances=-1", "evaluate_utterances=-1"),
        ("data.max_characters_per_second=0", "data.max_characters_per_second=0.0: must be positive"),
        ("seed=-1", "seed=-1: must lie in 0"),
        ("seed=99999999999999999999999", "seed=9+: must lie in 0"),
    ],
)
def test_validate_reaches_every_level(assignment, message):
    c.validate(make())
    with pytest.raises(c.UserError, match=message):
        c.validate(c.override(make(), [assignment]))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_steps", "5", "num_steps='5': expected int, got str"),
        ("num_steps", True, "num_steps=True: expected int, got bool"),
        ("seed", 1.5, "seed=1.5: expected int, got float"),
        ("mesh", None, "mesh=None: expected MeshConfig, got NoneType"),
        ("compute_dtype", "float64", "compute_dtype='float64': expected .*bfloat16.*, got str"),
        ("optimizer.learning_rate", "high", "optimizer.learning_rate='high': expected float"),
        ("model.sizes", (1, "x"), r"model.sizes=\(1, 'x'\): expected tuple\[int, ...\], got tuple"),
        ("model.path", 3, r"model.path=3: expected str \| None, got int"),
    ],
)
def test_values_of_a_wrong_type_in_a_file_are_named(key, value, message):
    config = make()
    *groups, name = key.split(".")
    place = dataclasses.replace(getattr(config, groups[0])) if groups else config
    object.__setattr__(place, name, value)  # past beartype, which watches the constructor in tests alone
    if groups:
        config = dataclasses.replace(config, **{groups[0]: place})
    with pytest.raises(c.UserError, match=message):
        c.validate(config)


def test_an_int_will_do_for_a_float():
    config = dataclasses.replace(make(), model=Model(rate=1))
    assert c.validate(config) is None


def test_load_config_names_what_is_missing(tmp_path):
    with pytest.raises(c.UserError, match="not a shipped preset"):
        c.load_config("no_such_preset")
    with pytest.raises(c.UserError, match="does not exist"):
        c.load_config(str(tmp_path / "x.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(c.UserError, match="has no get_config"):
        c.load_config(str(tmp_path / "empty.py"))
    (tmp_path / "broken.py").write_text("def get_config(:")
    with pytest.raises(c.UserError, match=r"broken\.py:1"):
        c.load_config(str(tmp_path / "broken.py"))


def test_a_file_may_start_from_a_preset(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import dataclasses\nfrom cv2jax.config import load_config\n"
        "def get_config():\n"
        "    return dataclasses.replace(load_config('speech_tokenizer_tiny'), name='mine', num_steps=3)\n"
    )
    got = c.load_config(str(path))
    assert (got.name, got.num_steps, got.model) == ("mine", 3, c.load_config("speech_tokenizer_tiny").model)


def test_load_config_from_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from cv2jax.config import TrainConfig, MeshConfig\n"
        "def get_config():\n    return TrainConfig(name='mine', task='t', model=MeshConfig(), num_steps=3)\n"
    )
    assert c.load_config(str(path)).name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config():\n    return nothing", "NameError: name 'nothing' is not defined"),
        ("def get_config():\n    assert 1 == 2, 'one is\\nnot two'", "AssertionError: one is$"),
        ("def get_config():\n    return {}", "returns a dict, not a TrainConfig"),
        ("def get_config(x):\n    return x", "TypeError"),
        ("get_config = 3", "TypeError"),
    ],
)
def test_a_config_file_that_fails_is_one_line(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(c.UserError, match=rf"config file .*mine\.py: .*{message}"):
        c.load_config(str(tmp_path / "mine.py"))
