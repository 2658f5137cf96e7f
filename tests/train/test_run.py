"""`run.json`: what is no run is one line that names the file."""

import json

import pytest

from cv2jax.config import UserError, load_config, override
from cv2jax.train.run import load_run, save_or_compare


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{}", "does not hold the config"),
        (b"[]", "does not hold the config"),
        (b'{"config": {}, "facts": 3}', "does not hold the config"),
        (b"\xff\xfe", "not UTF-8"),
        (b"{\n]", r"run\.json:2: not JSON"),
    ],
)
def test_what_is_no_run_is_named(tmp_path, text, message):
    (tmp_path / "run.json").write_bytes(text)
    with pytest.raises(UserError, match=message + r".*; restore it or start in another --workdir"):
        load_run(tmp_path)


def test_a_run_is_read(tmp_path):
    (tmp_path / "run.json").write_text('{"config": {"name": "n"}, "facts": {}}')
    assert load_run(tmp_path)["config"] == {"name": "n"}


def test_a_run_of_before_an_option_existed_had_its_default(tmp_path):
    config = load_config("speech_tokenizer_tiny")
    save_or_compare(tmp_path, config, {"a": 1}, started=False, write=True)
    run = json.loads((tmp_path / "run.json").read_text())
    del run["config"]["lora"], run["config"]["optimizer"]["ema_decay"], run["config"]["model"]["balance_weight"]
    (tmp_path / "run.json").write_text(json.dumps(run))
    before = (tmp_path / "run.json").read_bytes()
    default = override(config, ["model.balance_weight=0.0"])
    save_or_compare(tmp_path, default, {"a": 1}, started=True, write=True)
    for changed, named in (("lora.rank=4", "lora.rank: 0 → 4"), ("optimizer.ema_decay=0.9", "ema_decay: 0.0 → 0.9")):
        with pytest.raises(UserError, match=named):
            save_or_compare(tmp_path, override(default, [changed]), {"a": 1}, started=True, write=True)
    assert (tmp_path / "run.json").read_bytes() == before
