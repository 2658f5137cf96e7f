"""The HiFT vocoder at the released size, against all its discriminators.

    cv2jax f0 prepared/
    cv2jax train hift_vocoder_official --corpus prepared/ --workdir runs/vocoder_official

20.8 million parameters, those of CosyVoice 2's `hift.pt`, and 41.4 million of discriminators. A step sees one window of 51
frames (1.02 s) of each of 160 utterances (more where none lasts 15 s; longer ones are left out), the first 10,000 steps by
spectral losses alone. Weights and rates of the losses are upstream's; batch and steps of the released model are not public,
and this was not run to the end. Compiled ahead of time for sixteen v5e chips (`mesh.fsdp=16`, bf16), its step takes 15.66 GiB
a chip of 15.75 with `model.remat_discriminators`, and does not fit without: XLA pads the ten rows of a chip to the 128 lanes
of a register in the spectral discriminators, so a smaller batch takes no less. Compiling takes over half an hour of one core.
"""

from cv2jax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from cv2jax.models.hift_vocoder.config import HiftTrainingConfig, HiftVocoderConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="hift_vocoder_official",
        task="hift_vocoder",
        model=HiftTrainingConfig(
            generator=HiftVocoderConfig(mel_origin=-6.0), adversarial_from=10_000, remat_discriminators=True
        ),
        num_steps=500_000,
        data=DataConfig(
            batch_seconds=2_400.0, batch_multiple=16, num_buckets=1, min_seconds=1.0, max_seconds=15.0, num_workers=16
        ),
        optimizer=OptimizerConfig(learning_rate=2e-4, beta1=0.8, beta2=0.99, clip_norm=20.0, ema_decay=0.999),
        mesh=MeshConfig(data=-1, fsdp=1, tensor=1),
        log_every=50,
        evaluate_every=10_000,
        evaluate_utterances=256,
        save_every=2_000,
        keep_checkpoints=3,
    )
