"""The FSQ speech tokenizer at the released size: Encoder1 of 6 blocks × 1280 and FSQ are those of CosyVoice 2.

    cv2jax train speech_tokenizer_official --corpus prepared/ --workdir runs/tokenizer_official --set mesh.fsdp=16

The depth of what is thrown away after training (Encoder2, decoder) is not published; ours is in
`cv2jax.models.speech_tokenizer.config.official`. The paper trained on about 200,000 hours (spec of the paper, 1.2); the
steps and the rate here follow the public recipe of its parent model and were not run to the end.
"""

from cv2jax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from cv2jax.models.speech_tokenizer.config import official


def get_config() -> TrainConfig:
    return TrainConfig(
        name="speech_tokenizer_official",
        task="speech_tokenizer",
        model=official(),
        num_steps=210_000,
        data=DataConfig(batch_seconds=7_680.0, batch_multiple=64, num_buckets=8, num_workers=16),
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=10_000),
        mesh=MeshConfig(data=-1, fsdp=1, tensor=1),
        log_every=50,
        evaluate_every=5_000,
        evaluate_utterances=2_000,
        save_every=2_000,
        keep_checkpoints=3,
    )
