"""The text-speech language model at its smallest: learns to speak a small corpus in minutes on two CPU cores.

    cv2jax train text_speech_lm_tiny --corpus token_corpus/ --workdir runs/lm --set data.speech_tokenizer=runs/tokenizer

Four layers of width 128 on packed rows of 512 positions. With an hour of speech a code is seen a dozen times, so codes that
share FSQ digits start out alike (`model.speech_init=digits`) and a share of the speech inputs is noise
(`model.speech_noise`), without which it learns sentences by heart; a moving average of the parameters speaks. The run that
made the tokens reads what it says. On two CPU cores the 450 steps take about 8 minutes; on the embedded corpus expect a
character error rate of 3 to 5 % for whole held-out texts and of 5 to 8 % for texts that arrive (slot sentences: under
0.5 %), and no limit hit.
"""

from cv2jax.config import DataConfig, OptimizerConfig, TrainConfig
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig
from cv2jax.models.text_speech_lm.qwen2 import Qwen2Config


def get_config() -> TrainConfig:
    return TrainConfig(
        name="text_speech_lm_tiny",
        task="text_speech_lm",
        model=TextSpeechLmConfig(
            backbone=Qwen2Config(
                vocabulary_size=0, width=128, mlp_dim=384, num_layers=4, num_heads=4, num_kv_heads=2, scan_layers=False
            ),
            speech_init="digits",
            text_init_scale=1.0,
            speech_noise=0.45,
        ),
        num_steps=450,
        data=DataConfig(row_length=512, batch_rows=8, max_segments=16),
        optimizer=OptimizerConfig(
            learning_rate=4e-3,
            final_learning_rate=2e-4,
            warmup_steps=50,
            weight_decay=0.1,
            clip_norm=1.0,
            ema_decay=0.98,
        ),
        log_every=15,
        evaluate_every=225,
        evaluate_utterances=0,
        save_every=75,
        # On the embedded corpus of `cv2jax quickstart`.
        expected=(
            "train nll 105 3.0 4.8",
            "train nll 225 2.0 3.2",
            "evaluate cer 225 0.08 0.4",
            "evaluate cer 450 0 0.12",
        ),
    )
