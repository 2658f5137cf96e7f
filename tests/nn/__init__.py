"""Tests of cv2jax.nn."""
