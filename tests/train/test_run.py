"""`run.json`: what is no run is one line that names the file."""

import pytest

from cv2jax.config import UserError
from cv2jax.train.run import load_run


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
