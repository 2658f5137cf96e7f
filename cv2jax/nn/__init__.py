"""Layers with logical axes and no model knowledge.

Axis letters, used in einsums, shape types and comments throughout cv2jax:
B batch, T text or LM positions, S key/value positions, L speech tokens (25 Hz), F mel frames (50 or 100 Hz),
W waveform samples, M mel bins, D width, H query heads, K key/value heads, C head dim, V vocabulary, N layers.
"""
