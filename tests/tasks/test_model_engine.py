"""The flow of a model directory beside its speaker encoder: another encoder's is refused, its hash is the stage's."""

import jax
import pytest

from cv2jax.config import MeshConfig, UserError
from cv2jax.models.flow_matching.config import FlowMatchingConfig
from cv2jax.parallel.mesh import make_mesh
from cv2jax.tasks import model_engine
from cv2jax.tasks.encoders import load_speaker_encoder
from tests.small_model_directory import add_flow, make_model_directory


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return make_model_directory(tmp_path_factory.mktemp("models") / "encoders")


@pytest.fixture
def load_mel(monkeypatch):
    """The stage of a directory's flow, whose parameters nobody reads."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    monkeypatch.setattr(model_engine, "load_flow", lambda run, mesh: (FlowMatchingConfig(), {}))
    return lambda model: model_engine._load_mel(model, mesh)[0]


def test_a_flow_speaks_with_the_encoder_that_it_learnt_from(encoders, load_mel, tmp_path):
    ours = load_speaker_encoder(encoders / "speaker_encoder").hash
    for name, learnt in (
        ("same", {"encoder": ours, "of": "speaker"}),
        ("names", "stand-in"),
        ("other", {"encoder": "d" * 64}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "speaker_encoder").symlink_to(encoders / "speaker_encoder")
        add_flow(tmp_path / name, "t" * 64, speaker_embeddings=learnt)
    assert load_mel(tmp_path / "same").speaker_encoder == load_mel(tmp_path / "names").speaker_encoder == ours
    with pytest.raises(
        UserError,
        match=rf"learnt from embeddings of speaker encoder d{{12}}, but .*other/speaker_encoder is {ours[:12]}; put the run",
    ):
        load_mel(tmp_path / "other")
    (tmp_path / "other" / "speaker_encoder").unlink()
    assert load_mel(tmp_path / "other").speaker_encoder == "d" * 64  # voices are compared with what it learnt
    (tmp_path / "names" / "speaker_encoder").unlink()
    assert load_mel(tmp_path / "names").speaker_encoder == ""
