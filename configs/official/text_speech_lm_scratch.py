"""CosyVoice 2's language model from scratch: no pretrained text backbone, a tokenizer of your own.

    cv2jax train text_speech_lm_scratch_official --corpus token_corpus/ --workdir runs/lm --set mesh.fsdp=16

The same sizes as text_speech_lm_official but for the text vocabulary, which is the corpus's. A higher rate, longer
warm-up and twice the steps; codes that share FSQ digits start alike. Expect it to need more hours of speech than a
pretrained backbone does for the same error rate; how many was not measured.
"""

from cv2jax.config import DataConfig, OptimizerConfig, TrainConfig
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig
from cv2jax.models.text_speech_lm.qwen2 import Qwen2Config


def get_config() -> TrainConfig:
    return TrainConfig(
        name="text_speech_lm_scratch_official",
        task="text_speech_lm",
        model=TextSpeechLmConfig(
            backbone=Qwen2Config(vocabulary_size=0, remat="full"),
            loss_chunk=512,
            speech_init="digits",
            text_init_scale=1.0,
            z_loss=1e-4,
        ),
        num_steps=100_000,
        data=DataConfig(row_length=2048, batch_rows=256, max_segments=64, num_workers=4),
        optimizer=OptimizerConfig(
            learning_rate=4e-4, final_learning_rate=4e-5, warmup_steps=5000, beta2=0.95, weight_decay=0.1, clip_norm=1.0
        ),
        evaluate_every=2000,
        save_every=1000,
    )
