"""The vocoder at its smallest: learns to speak a small corpus in minutes on two CPU cores.

    cv2jax f0 prepared/ --method dio
    cv2jax train hift_vocoder_tiny --corpus prepared/ --workdir runs/vocoder

The first 740 of its 820 steps are spectral alone, and half of the windows have the recording's F0. Not upstream's: 31
harmonics (a network this small cannot make the high ones itself), log-mel counted from -6, upsampling kernels that move a
sixteenth as fast (else a buzz at the rate of the frames takes the place of the source), and a distance of STFTs at three
resolutions; each teaches it faster.

On the embedded corpus of `cv2jax quickstart` (8 voices, an hour) it took 10 min 20 s on two cores of an Intel Xeon:
log-spectral distance 9.97 dB and F0 18.2 Hz off on held-out speech, and of its copies of 40 sentences of voice f3 that it
never heard pocketsphinx reads one of 280 words wrong.
"""

from cv2jax.config import DataConfig, OptimizerConfig, TrainConfig
from cv2jax.models.hift_vocoder.config import HiftTrainingConfig, HiftVocoderConfig
from cv2jax.models.hift_vocoder.discriminator_config import DiscriminatorConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="hift_vocoder_tiny",
        task="hift_vocoder",
        model=HiftTrainingConfig(
            generator=HiftVocoderConfig(
                width=128,
                block_kernels=(3, 7),
                source_kernels=(3, 3, 3),
                dilations=(1, 3),
                num_harmonics=31,
                f0_width=128,
                mel_origin=-6.0,
                upsampling_unit=16.0,
            ),
            discriminators=DiscriminatorConfig(
                periods=(2, 3, 5),
                period_channels=(8, 16, 32, 32),
                fft_sizes=(512,),
                hop_lengths=(240,),
                window_lengths=(512,),
                spectral_channels=8,
            ),
            adversarial_from=740,
            discriminator_learning_rate=1e-3,
            f0_weight=0.05,
            stft_weight=20.0,
            target_f0_share=0.5,
        ),
        num_steps=820,
        data=DataConfig(batch_seconds=32.0, num_buckets=1, min_seconds=0.5),
        optimizer=OptimizerConfig(
            learning_rate=2e-3,
            final_learning_rate=1e-4,
            warmup_steps=30,
            beta1=0.8,
            beta2=0.99,
            clip_norm=50.0,
            ema_decay=0.99,
        ),
        log_every=20,
        evaluate_every=410,
        evaluate_utterances=0,
        save_every=410,
        # On the embedded corpus of `cv2jax quickstart`.
        expected=(
            "train mel_l1 100 0.75 1.2",
            "train mel_l1 400 0.55 0.85",
            "evaluate log_spectral_distance 410 9 13",
            "evaluate log_spectral_distance 820 8 12",
        ),
    )
