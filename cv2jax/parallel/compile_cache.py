"""JAX's compile cache: on for every command, in a directory of the user, bounded; one for all processes of a run.

`use_compile_cache` sets JAX's own environment variables, before JAX is imported, so that worker processes have them too.
JAX's bound (`jax_compilation_cache_max_size`) is not used: it locks the directory and looks at every entry before it writes
one, which took 0.06 s a program among 300 entries and 0.4 s among 2,000. Each command tidies up as it starts instead.
"""

import contextlib
import hashlib
import importlib
import os
import pathlib
import platform
import sys
import zlib
from collections.abc import MutableMapping

from absl import logging

from cv2jax.config import UserError

MAX_BYTES = 4 << 30
_PLACE = "JAX_COMPILATION_CACHE_DIR"
_ours = False  # whether the cache in use is the one set here, not the user's own


def use_compile_cache(environment: MutableMapping[str, str] = os.environ) -> None:
    """Has JAX keep what it compiles under $XDG_CACHE_HOME/cv2jax (default ~/.cache/cv2jax), a directory for each kind of CPU.

    A place that the user gave JAX stays; CV2JAX_COMPILE_CACHE=0 leaves the cache off, and any other word but 1 is a UserError.
    """
    global _ours
    wish = environment.get("CV2JAX_COMPILE_CACHE", "")
    if wish not in ("", "0", "1"):
        raise UserError(f"CV2JAX_COMPILE_CACHE={wish}: 0 turns the compile cache off; {_PLACE} names another directory")
    if wish == "0" or _PLACE in environment:
        return
    base = pathlib.Path(environment.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        base = pathlib.Path("~/.cache").expanduser()
    directory = base / "cv2jax" / "compiled" / machine()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        tidy(directory)
    except (OSError, RuntimeError) as error:  # no home, or none to write to
        logging.warning("%s: no compile cache there (%s); CV2JAX_COMPILE_CACHE=0 spares this line", directory, error)
        return
    _ours = True
    environment[_PLACE] = str(directory)
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def share_compiled(directory: pathlib.Path, *, first: bool) -> None:
    """Has the processes of a run keep compiled programs in a directory that all see, unless the user chose another place.

    JAX has only the first process write. The others load what it compiled where their keys are the same; on CPUs they are
    not, since a key there holds the process's own devices. So `jax_share_binary_between_hosts` stays off: with it a process
    waits for what the first never sends, as it compiles under another key or finds the program in its cache.
    """
    import jax

    if not _ours:
        return
    directory = directory / machine()
    if first:
        directory.mkdir(parents=True, exist_ok=True)
        tidy(directory)
    jax.config.update("jax_compilation_cache_dir", str(directory))


def machine() -> str:
    """A name for this kind of CPU: a home may be shared by machines on which another's programs would be illegal."""
    facts = [platform.processor()]
    with contextlib.suppress(OSError):
        first_core = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        told = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU part")
        facts += sorted(line for line in first_core.splitlines() if line.partition(":")[0].strip() in told)
    return f"{platform.machine()}-{hashlib.sha256(' '.join(facts).encode()).hexdigest()[:12]}"


def tidy(directory: pathlib.Path, max_bytes: int = MAX_BYTES) -> None:
    """Removes entries that a killed process left half written, and those used longest ago beyond `max_bytes`.

    JAX never replaces an entry. Those written since the last call are read for it, each once. Safe beside other processes:
    one that loses an entry, or writes to it just now, compiles again some time. Raises OSError where it may not write.
    """
    stamp = directory / ".tidied"
    since = stamp.stat().st_mtime if stamp.exists() else 0.0
    stamp.touch()
    kept: list[tuple[float, int, pathlib.Path]] = []
    for path in directory.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):
            facts = path.stat()
            if facts.st_mtime >= since - 2 and not _is_whole(path):
                path.unlink()
            else:
                kept.append((max(facts.st_atime, facts.st_mtime), facts.st_size, path))
    total = sum(size for _, size, _ in kept)
    for _, size, path in sorted(kept):
        if total <= max_bytes:
            return
        path.unlink(missing_ok=True)
        total -= size


def _is_whole(path: pathlib.Path) -> bool:
    """Whether an entry can be unpacked, as JAX packed it; the packings hold checksums or lengths."""
    data, unpack = path.read_bytes(), zlib.decompress
    try:
        if data.startswith(b"\x28\xb5\x2f\xfd"):
            unpack = importlib.import_module(
                "compression.zstd" if sys.version_info >= (3, 14) else "zstandard"
            ).decompress
        unpack(data)
    except Exception:  # of whichever library
        return False
    return True
