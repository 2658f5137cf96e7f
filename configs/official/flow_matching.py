"""The flow at the released size, trained for the four masks of the paper and one with a bounded left context.

    cv2jax train flow_matching_official --corpus prepared/ --workdir runs/flow_official --set data.speech_tokens=tokens.npz \\
        --set data.speaker_embeddings=embeddings.npz

112.5 million parameters, those of CosyVoice 2's `flow.pt`. Each utterance draws its mask: all, causal, chunks of 1 and of
2 seconds, and chunks of 1 second that see 4 seconds back and the first 3, as if those were a prompt, for streams of any
length at one cost. `model.mask_per=batch` with `model.loss=mse` and chunks 0 and 25 is the official code's choice. The rate
and the steps follow the public recipe of CosyVoice 1 and were not run to the end.
"""

from cv2jax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from cv2jax.models.flow_matching.config import FlowMatchingConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="flow_matching_official",
        task="flow_matching",
        model=FlowMatchingConfig(
            mask_chunks=(0, 1, 25, 50, 25),
            mask_lefts=(-1, -1, -1, -1, 100),
            mask_prompts=(0, 0, 0, 0, 75),
            token_init="official",
            remat="full",
        ),
        num_steps=800_000,
        data=DataConfig(batch_seconds=2_560.0, batch_multiple=80, num_buckets=8, num_workers=16),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=10_000, clip_norm=5.0, ema_decay=0.999),
        mesh=MeshConfig(data=-1, fsdp=1, tensor=1),
        log_every=50,
        evaluate_every=10_000,
        evaluate_utterances=256,
        save_every=2_000,
        keep_checkpoints=3,
    )
