"""Low-rank adaptation of a trained language model: a voice or a style on one small accelerator.

    cv2jax train text_speech_lm_lora_official --corpus token_corpus/ --workdir runs/voice --set init_from=runs/lm

Factors of rank 16 on the attention and MLP kernels are trained, 2 % of the parameters, and have the only optimizer
moments; all else is frozen bit for bit. A run that starts from this one (`--set init_from=runs/voice`) sees them merged.
Expect a file of factors of some 35 MB and a loss near that of full fine-tuning on an hour of one voice.
"""

from cv2jax.config import DataConfig, LoraConfig, OptimizerConfig, TrainConfig
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig
from cv2jax.models.text_speech_lm.qwen2 import Qwen2Config


def get_config() -> TrainConfig:
    return TrainConfig(
        name="text_speech_lm_lora_official",
        task="text_speech_lm",
        model=TextSpeechLmConfig(backbone=Qwen2Config(remat="full"), loss_chunk=512),
        num_steps=2000,
        data=DataConfig(row_length=2048, batch_rows=8, max_segments=64),
        lora=LoraConfig(rank=16, alpha=32.0, targets=("query", "key", "value", "out", "gate", "up", "down")),
        optimizer=OptimizerConfig(
            learning_rate=2e-4, schedule="constant", warmup_steps=100, weight_decay=0.0, clip_norm=1.0
        ),
        evaluate_every=250,
        save_every=250,
    )
