"""Mel to a 24 kHz wave: pitch, harmonic source, inverse STFT, and the discriminators that train it."""
