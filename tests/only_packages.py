"""Python in a process that finds no third-party package but those that are named: as where nothing else is installed."""

import pathlib
import subprocess
import sys

# What a bundle needs, with what these need themselves.
BUNDLE = ("jax", "jaxlib", "ml_dtypes", "opt_einsum", "scipy", "flatbuffers", "numpy", "safetensors", "tokenizers")
COMMAND_LINE = (
    *BUNDLE,
    "absl",
    "soundfile",
    "_soundfile",
    "_soundfile_data",
    "cffi",
    "_cffi_backend",
    "pycparser",
    "typing_extensions",
)

_FINDERS = """
import sys
KNOWN = {"cv2jax", *PACKAGES, *sys.stdlib_module_names}
class Only:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        known = name.partition(".")[0] in KNOWN or name.startswith("_sysconfigdata_")  # the standard library's, too
        return self.finder.find_spec(name, path, target) if known else None
sys.meta_path[:] = map(Only, sys.meta_path)
"""


def run_only(packages: tuple[str, ...], code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the code where cv2jax, the standard library and these packages can be imported."""
    source = f"PACKAGES = {packages!r}\n{_FINDERS}\n{code}"
    command = [sys.executable, "-c", source, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[1], check=False)


def run_command(*words: object) -> subprocess.CompletedProcess[str]:
    """`cv2jax WORDS` where only what a bundle and the command line need can be imported."""
    return run_only(COMMAND_LINE, "from cv2jax.cli.main import run\nsys.exit(run(sys.argv[1:]))", *words)
