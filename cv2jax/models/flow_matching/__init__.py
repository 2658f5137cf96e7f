"""Speech tokens to mel by chunk-aware flow matching: encoder, velocity network, solver; whole or streamed, the same numbers."""
