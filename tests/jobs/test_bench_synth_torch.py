"""The official stream's work in PyTorch: which lengths it solves, and that both parts run."""

import pathlib

import pytest

from cv2jax.jobs.bench_lm import make_workload
from cv2jax.models.flow_matching.config import EstimatorConfig, FlowEncoderConfig, FlowMatchingConfig
from cv2jax.models.text_speech_lm.sequence import SPEECH, TEXT

pytest.importorskip("torch")

from cv2jax.jobs import bench_synth_torch

pytestmark = pytest.mark.official


@pytest.mark.parametrize(
    ("num_prompt", "num_tokens", "lengths"),
    [
        (87, 250, [125, 175, 275, 337]),  # the packets of spec/official.md D
        (100, 250, [125, 175, 275, 350]),
        (87, 38, [125]),
        (0, 30, [25, 30]),
    ],
)
def test_each_packet_is_solved_from_the_start(num_prompt: int, num_tokens: int, lengths: list[int]) -> None:
    assert list(bench_synth_torch.solved_lengths(num_prompt, num_tokens)) == lengths


def test_the_language_model_draws_every_token(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, decode = [], bench_synth_torch.OfficialLm.decode

    def listed(lm, token, kind, num_tokens):
        seconds, logits = decode(lm, token, kind, num_tokens)
        asked.append((kind.tolist(), num_tokens, seconds, logits.shape))
        return seconds, logits

    monkeypatch.setattr(bench_synth_torch.OfficialLm, "decode", listed)
    config = make_workload("tiny", True).config
    seconds = bench_synth_torch.time_language_model(config, tmp_path, num_text=4, num_prompt=3, num_tokens=9)
    kinds = [TEXT] * 4 + [SPEECH] * 3
    shape = (config.num_outputs,)
    # A short one first, which is not counted.
    assert [each[:2] for each in asked] == [(kinds, 2), (kinds, 9)]
    assert [each[3] for each in asked] == [shape, shape]
    assert seconds == asked[1][2] > 0


def test_the_velocity_network_solves_all_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Network:
        def __init__(self, *_: object) -> None:
            pass

        def __call__(self, x, *_: object) -> None:
            calls.append(x.shape)

    monkeypatch.setattr(bench_synth_torch, "OfficialEstimator", Network)
    small = EstimatorConfig(width=16, num_blocks=1, num_mid_stages=1, num_heads=2, head_dim=8, mlp_ratio=2)
    encoder = FlowEncoderConfig(width=16, num_heads=2, mlp_dim=32, num_layers=1, num_upsampled_layers=1)
    config = FlowMatchingConfig(estimator=small, encoder=encoder, num_mels=8, num_speech_tokens=81, num_steps=3)
    assert bench_synth_torch.time_velocity(config, num_prompt=3, num_tokens=60) > 0
    assert calls == [(2, 2 * length, 8) for length in (50, 63) for _ in range(1 + 3)]
