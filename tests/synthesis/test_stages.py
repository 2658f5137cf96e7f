"""The engine and all that it imports stand without flax: a bundle's runtime has none."""

import subprocess
import sys


def test_the_engine_needs_no_flax():
    names = ("flax", "optax", "orbax", "librosa", "cv2jax.models", "cv2jax.parallel")
    code = f"import sys, cv2jax.synthesis.engine; print([name for name in {names} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == "[]"
