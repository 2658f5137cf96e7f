"""Eight fake CPU devices and full fp32 products for every test."""

import atexit
import gc
import importlib.metadata
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
# Tests compile much and compute little: LLVM's optimiser would take half of their time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Its older code generator compiles twice as fast; a flag that a version does not know would end the process.
os.environ["XLA_FLAGS"] += (
    " --xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else ""
)
# What one test compiled the others load, in other workers and in commands that tests start too.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="cv2jax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# Where a program comes from is not asked for: its trace is shorter.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import jax
import pytest
from absl import flags

MAX_MAPS = 20_000
# Tracing makes millions of objects that stay; looking through them for cycles took a tenth of the time.
gc.set_threshold(200_000, 20, 100)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session", autouse=True)
def _flags_are_parsed() -> None:
    """Grain's worker processes ask for parsed absl flags; a console entry point has them, pytest has not."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="module", autouse=True)
def _few_executables() -> Iterator[None]:
    """A process may map 65,530 pieces of memory, of which each compiled program takes some: many are let go between files."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAX_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def _own_temporary_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests share no data order with the user's runs."""
    with pytest.MonkeyPatch.context() as patch:
        directory = str(tmp_path_factory.mktemp("temporary"))
        patch.setenv("TMPDIR", directory)
        patch.setattr(tempfile, "tempdir", directory)
        yield
