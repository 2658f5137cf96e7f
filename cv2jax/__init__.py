"""cv2jax: CosyVoice 2 in JAX/Flax, trained on a mesh and served as a stream."""

__version__ = "0.1.0"
