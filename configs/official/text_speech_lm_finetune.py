"""Fine-tune a trained language model on a corpus of your own: the constant 1e-5 of the official recipe.

    cv2jax train text_speech_lm_finetune_official --corpus token_corpus/ --workdir runs/mine --set init_from=runs/lm

Rate, warm-up and clip are those of the released cosyvoice2.yaml (spec/paper.md 1.9); about 16,000 packed positions a
step, and a moving average of the parameters is evaluated. Tokenise the corpus with the tokenizer of the run that it
starts from (`cv2jax tokenize --text_tokenizer runs_corpus/text_tokenizer`). Expect the held-out loss to fall for a few
hundred steps and then to rise: keep the checkpoint before.
"""

from cv2jax.config import DataConfig, OptimizerConfig, TrainConfig
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig
from cv2jax.models.text_speech_lm.qwen2 import Qwen2Config


def get_config() -> TrainConfig:
    return TrainConfig(
        name="text_speech_lm_finetune_official",
        task="text_speech_lm",
        model=TextSpeechLmConfig(backbone=Qwen2Config(remat="full"), loss_chunk=512),
        num_steps=5000,
        data=DataConfig(row_length=2048, batch_rows=8, max_segments=64),
        optimizer=OptimizerConfig(
            learning_rate=1e-5, schedule="constant", warmup_steps=2500, beta2=0.999, weight_decay=0.0, ema_decay=0.999
        ),
        evaluate_every=250,
        save_every=250,
    )
