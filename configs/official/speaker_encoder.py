"""CAM++ at the released size, 192 numbers a voice, for corpora of thousands of speakers.

    cv2jax train speaker_encoder_official --corpus prepared/ --workdir runs/speaker_official

6.85 million parameters, those of CosyVoice 2's `campplus.onnx`. Crops of 3 s, 256 a batch (more where no utterance lasts 15 s;
longer ones are left out), each speed of 0.9, 1 and 1.1 with speakers of its own, a margin that grows from a quarter to two
fifths of the steps: the public recipe of 3D-Speaker, but with AdamW for its SGD and white noise for its recorded noise and
reverberation. It was not run to the end. `num_steps` are 60 epochs of a million utterances.
"""

from cv2jax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from cv2jax.models.speaker_encoder.config import SpeakerEncoderConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="speaker_encoder_official",
        task="speaker_encoder",
        model=SpeakerEncoderConfig(
            speeds=(0.9, 1.0, 1.1),
            noise_share=0.2,
            max_gain_db=6.0,
            margin_start=60_000,
            margin_end=100_000,
            remat="full",
        ),
        num_steps=240_000,
        data=DataConfig(
            batch_seconds=3_840.0, batch_multiple=64, num_buckets=1, min_seconds=1.0, max_seconds=15.0, num_workers=16
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, final_learning_rate=1e-5, warmup_steps=20_000, weight_decay=0.05, clip_norm=5.0
        ),
        mesh=MeshConfig(data=-1, fsdp=1, tensor=1),
        log_every=50,
        evaluate_every=10_000,
        evaluate_utterances=2_000,
        save_every=2_000,
        keep_checkpoints=3,
    )
