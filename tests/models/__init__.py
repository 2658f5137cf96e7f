"""Tests of cv2jax.models."""
