"""Audio files, resampling and spectral features; importing `io` or `resample` never imports jax."""
