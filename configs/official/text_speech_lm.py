"""CosyVoice 2's language model from a pretrained Qwen2.5-0.5B backbone: the stage that a TPU pod is rented for.

    cv2jax train text_speech_lm_official --corpus token_corpus/ --workdir runs/lm --set init_from=CosyVoice-BlankEN \\
        --set mesh.fsdp=16 --set data.speech_tokenizer=runs/tokenizer

24 layers of width 896; 256 packed rows of 2,048 positions a step. Batch, rate and steps of the released model are not
public: these follow the nearest recipes that are (spec/paper.md 1.9: 1e-4 with 10,000 warm-up steps in CosyVoice 1; 5e-5,
weight decay 0.01 and beta2 0.95 in icefall's re-training, 1.81 % CER on SEED test-zh). 50,000 steps are 26 G positions,
one and a half epochs of 166,800 hours. The text tokenizer must be the one in the backbone's directory:
`cv2jax tokenize … --text_tokenizer CosyVoice-BlankEN`.
"""

from cv2jax.config import DataConfig, OptimizerConfig, TrainConfig
from cv2jax.models.text_speech_lm.model import TextSpeechLmConfig
from cv2jax.models.text_speech_lm.qwen2 import Qwen2Config


def get_config() -> TrainConfig:
    return TrainConfig(
        name="text_speech_lm_official",
        task="text_speech_lm",
        model=TextSpeechLmConfig(backbone=Qwen2Config(remat="full"), loss_chunk=512),
        num_steps=50_000,
        data=DataConfig(row_length=2048, batch_rows=256, max_segments=64, num_workers=4),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, final_learning_rate=1e-5, warmup_steps=2000, beta2=0.95, weight_decay=0.01
        ),
        evaluate_every=2000,
        save_every=1000,
    )
