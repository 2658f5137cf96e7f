"""The flow at its smallest: learns to turn the speech tokens of a small corpus into mel in minutes on two CPU cores.

    cv2jax train flow_matching_tiny --corpus prepared/ --workdir runs/flow --set data.speech_tokens=tokens.jsonl

With `data.speaker_embeddings=embeddings.npz`, the file of `cv2jax embed`, it learns to speak as a voice of `cv2jax enroll`; set
`model.speaker_dim` to the encoder's `model.embedding_dim`, if that is not 192. Without it a speaker is no more than a name.

    cv2jax train flow_matching_tiny --corpus prepared/ --workdir runs/flow --set data.speech_tokens=tokens.jsonl \\
        --set data.speaker_embeddings=embeddings.npz

On the embedded corpus of `cv2jax quickstart` (8 voices, an hour; tokens of its tokenizer) it brought the distance of the
held-out mel from the speaker's to 0.70 of that of a constant mel a token, streamed and offline alike, in 3.4 minutes on two
cores of an AMD EPYC and 6.3 of an Intel Xeon. With a learning rate of 2e-3 it was 0.74, with 3e-3 0.83.

It trains for the four masks of the paper, with a prior loss and codes that start out alike by their digits; without these
two, 1,000 steps of twice the batch came as far as 700 with them. The solver starts from a quarter of the noise
(`model.temperature`): with all of it the distance is half as large again, because a sample adds to the mean of what could be
said, and a model this small knows little more than that mean.
"""

from cv2jax.config import DataConfig, OptimizerConfig, TrainConfig
from cv2jax.models.flow_matching.config import EstimatorConfig, FlowEncoderConfig, FlowMatchingConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="flow_matching_tiny",
        task="flow_matching",
        model=FlowMatchingConfig(
            encoder=FlowEncoderConfig(
                width=128, num_heads=4, mlp_dim=256, num_layers=2, num_upsampled_layers=2, dropout=0.0
            ),
            estimator=EstimatorConfig(width=96, num_blocks=2, num_mid_stages=2, num_heads=4, head_dim=32),
            prior_weight=1.0,
            temperature=0.25,
            scan_layers=False,
        ),
        num_steps=750,
        data=DataConfig(batch_seconds=32.0, num_buckets=2),
        optimizer=OptimizerConfig(
            learning_rate=1.4e-3, final_learning_rate=1e-4, warmup_steps=30, clip_norm=5.0, ema_decay=0.98
        ),
        log_every=20,
        evaluate_every=750,
        evaluate_utterances=0,
        save_every=375,
        # On the embedded corpus of `cv2jax quickstart`.
        expected=("evaluate streamed_ratio 750 0.6 0.85", "evaluate offline_ratio 750 0.6 0.85"),
    )
