"""The FSQ speech tokenizer for some hundred hours on one accelerator: 6 + 6 blocks of width 512.

    cv2jax train speech_tokenizer_base --corpus prepared/ --workdir runs/tokenizer_base

bfloat16 on accelerators; a batch fits a chip of 16 GB (compiled ahead of time for one). Not yet trained to the end here:
watch held-out `cer` and `codes_used_share` in curves.png.
"""

from cv2jax.config import DataConfig, OptimizerConfig, TrainConfig
from cv2jax.models.speech_tokenizer.config import base


def get_config() -> TrainConfig:
    return TrainConfig(
        name="speech_tokenizer_base",
        task="speech_tokenizer",
        model=base(),
        num_steps=100_000,
        data=DataConfig(batch_seconds=960.0, batch_multiple=16, num_buckets=6, num_workers=8),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=5_000),
        log_every=50,
        evaluate_every=2_000,
        evaluate_utterances=1_000,
        save_every=1_000,
        keep_checkpoints=3,
    )
