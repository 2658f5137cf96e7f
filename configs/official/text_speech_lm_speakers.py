"""Multi-speaker fine-tuning (paper 2.7): every text begins with its speaker, `Speaker A<|endofprompt|>`.

    cv2jax train text_speech_lm_speakers_official --corpus token_corpus/ --workdir runs/speakers --set init_from=runs/lm

The corpus must carry the prefixes: `cv2jax tokenize --prefix speaker`, where speakers named "unknown" become
`unknown<|endofprompt|>`. The constant rate of 1e-5 is the paper's, and so is the figure of about 400 recordings a speaker.
Expect a speaker to be kept from the first checkpoints on; then a request needs the prefix and no prompt.
"""

from cv2jax.config import DataConfig, OptimizerConfig, TrainConfig
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig
from cv2jax.models.text_speech_lm.qwen2 import Qwen2Config


def get_config() -> TrainConfig:
    return TrainConfig(
        name="text_speech_lm_speakers_official",
        task="text_speech_lm",
        model=TextSpeechLmConfig(backbone=Qwen2Config(remat="full"), loss_chunk=512),
        num_steps=5000,
        data=DataConfig(prefix="speaker", row_length=2048, batch_rows=16, max_segments=64),
        optimizer=OptimizerConfig(
            learning_rate=1e-5, schedule="constant", warmup_steps=500, beta2=0.999, weight_decay=0.0
        ),
        evaluate_every=250,
        save_every=250,
    )
