"""Every shipped experiment: explained, buildable, valid, traceable, and of the size that it says."""

import ast
import functools
import importlib
import math
import pathlib
import re
from typing import Any

import jax
import pytest

from cv2jax.config import TrainConfig, format_config, from_dict, load_config, preset_names, to_dict, validate

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
FILES = {f"{path.stem}_{path.parent.name}": path for path in CONFIGS.glob("*/*.py")}
NAMES = sorted(FILES)

# Parameters in millions, at least and at most; a new config adds its line.
MILLIONS = {
    "speech_tokenizer_tiny": (1, 4),
    "speech_tokenizer_base": (50, 120),
    "speech_tokenizer_official": (700, 1100),
    "speaker_encoder_tiny": (0.05, 0.15),
    "speaker_encoder_official": (6.8, 6.9),
    "flow_matching_tiny": (3, 4),
    "flow_matching_official": (112, 113),
    "hift_vocoder_tiny": (0.5, 2),  # of the generator
    "hift_vocoder_official": (20.8, 20.9),
    "text_speech_lm_tiny": (2, 3),
    "text_speech_lm_official": (500, 520),
    "text_speech_lm_scratch_official": (365, 380),  # without a text table, whose size is the corpus's
    "text_speech_lm_finetune_official": (500, 520),
    "text_speech_lm_speakers_official": (500, 520),
    "text_speech_lm_lora_official": (500, 520),
}
OFFICIAL_ENCODING_PARAMETERS = (
    123_714_568  # Encoder1 and FSQ projection of the released tokenizer (spec/frontends.md 1.2)
)
OFFICIAL_FLOW_PARAMETERS = 112_549_360  # of the released flow.pt (spec/official.md 8.2)


@functools.cache
def _shapes(name: str) -> dict[str, Any]:
    """Parameter shapes of the config's model, traced and not made."""
    config = load_config(name)
    model = importlib.import_module(f"cv2jax.models.{config.task}.model")
    sizes = getattr(config.model, "generator", config.model)  # a vocoder's config holds that of its training too
    return jax.eval_shape(lambda key: model.init_params(sizes, key), jax.random.key(0))


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_presets_are_the_files_in_configs() -> None:
    assert preset_names() == NAMES
    assert set(MILLIONS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_docstring_gives_launch_line_and_what_to_expect(name: str) -> None:
    docstring = ast.get_docstring(ast.parse(FILES[name].read_text(encoding="utf-8"))) or ""
    launch = re.search(rf"^ +cv2jax train {name} .*--workdir", docstring, flags=re.MULTILINE)
    assert launch, f"no line `cv2jax train {name} … --workdir …`"
    assert len(docstring[launch.end() :].split()) >= 10, "nothing after the launch line says what to expect"


@pytest.mark.parametrize("name", NAMES)
def test_builds_validates_and_survives_json(name: str) -> None:
    config = load_config(name)
    validate(config)
    assert isinstance(config, TrainConfig)
    assert config.name == name
    assert hash(config) == hash(load_config(name))
    assert from_dict(TrainConfig, to_dict(config), model=type(config.model)) == config
    assert "optimizer.learning_rate" in format_config(config)


@pytest.mark.parametrize("name", NAMES)
def test_model_traces_at_the_size_it_says(name: str) -> None:
    least, most = MILLIONS[name]
    assert least <= _count(_shapes(name)) / 1e6 <= most


def test_official_encoder_and_quantizer_have_the_released_size() -> None:
    shapes = _shapes("speech_tokenizer_official")
    assert _count(shapes["encoder"]) + _count(shapes["quantizer"]) == OFFICIAL_ENCODING_PARAMETERS


def test_official_flow_has_the_released_size() -> None:
    assert _count(_shapes("flow_matching_official")) == OFFICIAL_FLOW_PARAMETERS
