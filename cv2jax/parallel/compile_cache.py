"""JAX's compile cache: on for every command, in a directory of the user, bounded; one for all processes of a run.

`use_compile_cache` sets JAX's own environment variables, before JAX is imported, so that worker processes have them too.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
from collections.abc import MutableMapping

from absl import logging

from cv2jax.config import UserError

MAX_BYTES = 4 << 30
_PLACE = "JAX_COMPILATION_CACHE_DIR"
_ENTRY, _LAST_USE = "-cache", "-atime"  # JAX writes the first file of an entry, then the second
_LOCK_SECONDS = 5.0
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
        if not os.access(directory, os.W_OK):
            raise PermissionError("not ours to write to")
        mend(directory)
    except (OSError, RuntimeError) as error:  # no home, or none to write to
        logging.warning("%s: no compile cache there (%s); CV2JAX_COMPILE_CACHE=0 spares this line", directory, error)
        return
    _ours = True
    environment[_PLACE] = str(directory)
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    environment.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MAX_BYTES))


def machine() -> str:
    """A name for this kind of CPU: a home may be shared by machines on which another's programs would be illegal."""
    facts = [platform.processor()]
    with contextlib.suppress(OSError):
        first_core = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        told = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU part")
        facts += sorted(line for line in first_core.splitlines() if line.partition(":")[0].strip() in told)
    return f"{platform.machine()}-{hashlib.sha256(' '.join(facts).encode()).hexdigest()[:12]}"


def mend(directory: pathlib.Path) -> None:
    """Takes away what a killed process left half written: JAX would never replace it, nor write beside it."""
    if not _torn(directory):
        return
    import filelock  # JAX locks its cache with it

    with contextlib.suppress(filelock.Timeout), filelock.FileLock(directory / ".lockfile", timeout=_LOCK_SECONDS):
        for path in _torn(directory):  # asked again: another process may have been just writing
            path.unlink(missing_ok=True)


def _torn(directory: pathlib.Path) -> list[pathlib.Path]:
    """Files of entries of which one of the two is missing."""
    names = {path.name for path in directory.glob("*-*")}
    keys = [{name.removesuffix(end) for name in names if name.endswith(end)} for end in (_ENTRY, _LAST_USE)]
    torn = [f"{key}{_ENTRY}" for key in keys[0] - keys[1]] + [f"{key}{_LAST_USE}" for key in keys[1] - keys[0]]
    return [directory / name for name in torn]


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
        mend(directory)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    if not first:  # they take no lock, which on a file system of many hosts may fail, and write no times of use
        jax.config.update("jax_compilation_cache_max_size", -1)
