"""What cosyvoice2.yaml must have, and what it may not say otherwise than we compute it."""

import contextlib
import dataclasses

import pytest

from cv2jax.config import UserError
from cv2jax.convert.official_settings import require_parts, require_settings
from cv2jax.convert.official_sizes import describe_sizes, differing_sizes
from cv2jax.convert.official_template import make_yaml
from tests.convert.test_official_sizes import FLOW, GOLDEN, LM, names, other_models, read, yaml_of
from tests.models.golden_hift import GOLDEN_CONFIG

TEXT = (GOLDEN / "cosyvoice2.yaml").read_text()


def check(text, tmp_path):
    yaml = yaml_of(text, tmp_path)
    require_parts(yaml, "the yaml")
    models = (read(file, yaml, names(file)) for file in ("llm", "flow", "hift"))
    require_settings(yaml, "the yaml", *models)


def test_the_golden_and_our_own_files_pass(tmp_path):
    check(TEXT, tmp_path)
    models = other_models()
    yaml = yaml_of(make_yaml(describe_sizes(*models)), tmp_path)
    require_parts(yaml, "the yaml")
    require_settings(yaml, "the yaml", *models)


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path):
    """Behind every line; whole is the last alone, whose `center: False` is upstream's default."""
    lines = TEXT.splitlines(keepends=True)
    passed = []
    for end in range(len(lines) + 1):
        with contextlib.suppress(UserError):
            check("".join(lines[:end]), tmp_path)
            passed.append(end)
    assert passed == [len(lines) - 1, len(lines)]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("get_tokenizer: ", "other: ", "has no get_tokenizer; is it cut short"),
        ("allowed_special: 'all'\n", "", "has no allowed_special"),
        ("    f0_predictor: ", "    other: ", r"has no hift\.f0_predictor"),
        ("    win_size: 1920\n    fmin: 0\n", "", r"has no feat_extractor\.win_size, feat_extractor\.fmin"),
        ("llm: !new:cosyvoice.llm.llm.Qwen2LM\n", "llm: hello\nx:\n", "llm is 'hello'; it must be a table of keys"),
        ("fmin: 0", "fmin: 50", r"feat_extractor\.fmin is 50; only 0 is supported"),
        ("center: False", "center: True", r"feat_extractor\.center is True; only False is supported"),
        ("win_size: 1920", "win_size: 1024", r"feat_extractor\.win_size is 1024, and .* only 1920 is supported"),
        ("sample_rate: 24000", "sample_rate: 24000\nr: 22050", None),
        ("    sampling_rate: !ref <sample_rate>\n    hop", "    sampling_rate: 16000\n    hop",
         r"feat_extractor\.sampling_rate is 16000"),
        ("normalize_before: True", "normalize_before: False", r"flow\.encoder\.normalize_before is False; only True"),
        ("macaron_style: False", "macaron_style: True", r"flow\.encoder\.macaron_style is True; only False"),
        ("use_cnn_module: False", "use_cnn_module: 'no'", r"flow\.encoder\.use_cnn_module is 'no'; only False"),
        ("input_layer: 'linear'", "input_layer: conv2d", r"flow\.encoder\.input_layer is 'conv2d'; only 'linear'"),
        ("act_fn: 'gelu'", "act_fn: 'snakebeta'", r"estimator\.act_fn is 'snakebeta'; only 'gelu' is supported"),
        ("left_chunks: -1", "left_chunks: 2", r"num_decoding_left_chunks is 2; only -1 is supported"),
        ("t_scheduler: 'cosine'", "t_scheduler: 'linear'", r"content\.t_scheduler is 'linear'; only 'cosine'"),
        ("input_frame_rate: 25", "input_frame_rate: 50", r"flow\.input_frame_rate is 50; only 25 is supported"),
        ("token_mel_ratio: 2", "token_mel_ratio: 4", r"flow\.token_mel_ratio is 4; only 2 is supported"),
        ("lrelu_slope: 0.1", "lrelu_slope: 0.2", r"hift\.lrelu_slope is 0\.2; only 0\.1 is supported"),
        ("static_chunk_size: 10", "static_chunk_size: 50", r"estimator\.static_chunk_size is 50, and .* only 10"),
        ("        dropout_rate: 0.1", "        dropout_rate: 0.0", None),  # of upstream's training alone
        ("            act_fn: 'gelu'\n", "", None),  # upstream's default
    ],
)  # fmt: skip
def test_parts_and_settings(old, new, message, tmp_path):
    assert TEXT.count(old) == 1
    text = TEXT.replace(old, new)
    if message is None:
        check(text, tmp_path)
        return
    with pytest.raises(UserError, match=f"the yaml: .*{message}") as caught:
        check(text, tmp_path)
    assert "\n" not in str(caught.value)


def test_any_way_to_say_no_chunks_is_one(tmp_path):
    text = TEXT.replace("static_chunk_size: 5", "static_chunk_size: -1").replace(
        "static_chunk_size: 10", "static_chunk_size: 0"
    )
    check(text, tmp_path)
    whole = dataclasses.replace(FLOW, mask_chunks=(0,), mask_lefts=(-1,), mask_prompts=(0,))
    assert differing_sizes(yaml_of(text, tmp_path), describe_sizes(LM, whole, GOLDEN_CONFIG)) == []
