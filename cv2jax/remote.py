"""Runs on Google Cloud Storage: `gs://bucket/…` as a path like a local one, and answers to what a bucket cannot do.

A bucket holds whole objects: nothing is appended, renamed or locked. So a run's small files lie in a local directory
(`mirrored`) that goes up before each checkpoint, its lock is an object that its holder renews, and checkpoints are written
there by Orbax itself. Needs gcsfs, of the extra [gcs].
"""

import atexit
import contextlib
import importlib.util
import itertools
import json
import os
import pathlib
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging
from etils.epath.gpath import PosixGPath

from cv2jax.config import UserError
from cv2jax.files import utf8_path

_PREFIX = "gs://"
_LARGE = ("checkpoints", "checkpoints-damaged")  # of a run: never copied here
_RENEW_SECONDS, _STALE_SECONDS = 30.0, 90.0  # of a lock
# As TensorStore words it.
_STATUS = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "ABORTED")
_LIBRARIES = ("google", "gcsfs", "aiohttp", "requests", "urllib3")  # whose errors are the cloud's


class BucketPath(PosixGPath, pathlib.PosixPath):
    """A path in a bucket: etils' own, which has the methods of a local one, and which counts as one."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether it is in a bucket."""
    return os.fspath(path).startswith(_PREFIX)


def as_path(text: str | os.PathLike[str]) -> pathlib.Path:
    """A local path, or one in a bucket, which has the methods of a local one; UserError without the package for it."""
    if not is_remote(text):
        return pathlib.Path(text)
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text}: needs the package gcsfs; pip install 'cv2jax[gcs]'")
    return BucketPath(text)


def absolute(path: pathlib.Path, library: str) -> str:
    """A path as the absolute text that `library` takes; UserError where it has bytes that are no UTF-8."""
    return utf8_path(path if is_remote(path) else path.resolve(), library)  # resolve() would put it below the local one


def move_directory(source: pathlib.Path, target: pathlib.Path) -> None:
    """Renames a directory; in a bucket each of its objects is copied, then removed, which a kill can cut in two."""
    if is_remote(source):
        _file_system().mv(os.fspath(source), os.fspath(target), recursive=True)
    else:
        source.rename(target)


def modified(path: pathlib.Path) -> float:
    """When a file was last written, in seconds since 1970."""
    facts: Any = path.stat()
    return facts.mtime if is_remote(path) else facts.st_mtime


def fetched(path: pathlib.Path) -> pathlib.Path:
    """A local directory with what the directory `path` holds, until the process ends; `path` itself where that is local."""
    if not is_remote(path):
        return path
    local = pathlib.Path(tempfile.mkdtemp(prefix="cv2jax-"))
    atexit.register(shutil.rmtree, local, ignore_errors=True)
    with cloud_reported(path):
        _fetch(path, local)
    return local


@contextlib.contextmanager
def cloud_reported(place: str | os.PathLike[str], *, os_errors: bool = True) -> Iterator[None]:
    """Makes one line of what goes wrong between here and a bucket: no such, no right, no connection. UserError, with `place`.

    Args:
      os_errors: whether any OSError is of the bucket; else only errors of its libraries.
    """
    try:
        yield
    except Exception as error:
        is_cloud = is_lost_connection(error) or (os_errors and isinstance(error, OSError))
        if not is_remote(place) or isinstance(error, UserError) or not is_cloud:
            raise
        reason = (str(error).splitlines() or [""])[0][:160] or type(error).__name__
        raise UserError(
            f"{place}: the bucket cannot be used ({reason}); see to its name, the credentials (gcloud auth "
            "application-default login) and the network, and give the same command"
        ) from error


def is_lost_connection(error: BaseException) -> bool:
    """Whether a bucket did not answer, or refused: nothing is known of what it holds."""
    chain = [error, *filter(None, (error.__cause__, error.__context__))]
    return any(type(e).__module__.partition(".")[0] in _LIBRARIES for e in chain) or any(
        s in str(error) for s in _STATUS
    )


class Mirror:
    """A run's directory `workdir` with its small files at `local`: the same directory, unless that is in a bucket."""

    def __init__(self, workdir: pathlib.Path, local: pathlib.Path) -> None:
        self.workdir, self.local = workdir, local
        self._known: dict[pathlib.Path, tuple[int, int]] = {}  # size and time of what the bucket has

    def fetch(self, *, all_files: bool) -> None:
        """Takes down what the bucket has, or only `run.json`; checkpoints stay there."""
        if is_remote(self.workdir):
            with cloud_reported(self.workdir):
                _fetch(self.workdir, self.local, None if all_files else ("run.json",))
            self._known = {path: _stamp(path) for path in _files(self.local)}

    def push(self) -> None:
        """Puts every file that changed into the bucket, whole, and takes away what is gone; blocks until that is done."""
        if is_remote(self.workdir):
            with cloud_reported(self.workdir):
                files = _files(self.local)
                for path in set(self._known) - set(files):
                    self._place(path).unlink(missing_ok=True)
                    del self._known[path]
                for path in files:
                    stamp = _stamp(path)
                    if self._known.get(path) != stamp:
                        self._place(path).write_bytes(path.read_bytes())
                        self._known[path] = stamp

    def _place(self, path: pathlib.Path) -> pathlib.Path:
        return self.workdir / path.relative_to(self.local).as_posix()

    def push_and_end(self, code: int, end: Callable[[int], object] = os._exit, *, seconds: float = 20.0) -> None:
        """Ends the process once all is up, or after `seconds`: the connection may be what is stuck."""
        thread = threading.Thread(target=self._push_quietly, daemon=True)
        thread.start()
        thread.join(seconds)
        end(code)

    def _push_quietly(self) -> None:
        try:
            self.push()
        except Exception as error:  # of the cloud: whatever it is, the process is at its end
            logging.warning("%s: not all of the record is there (%s)", self.workdir, str(error).partition("\n")[0])


@contextlib.contextmanager
def mirrored(workdir: pathlib.Path, *, first: bool) -> Iterator[Mirror]:
    """The run's directory to write in; what is new at the end goes up. Errors name the bucket, not the local copy.

    Args:
      first: whether this process keeps the record; the others see `run.json` alone.
    """
    if not is_remote(workdir):
        yield Mirror(workdir, workdir)
        return
    with tempfile.TemporaryDirectory(prefix="cv2jax-run-") as place, cloud_reported(workdir, os_errors=False):
        mirror = Mirror(workdir, pathlib.Path(place))
        mirror.fetch(all_files=first)
        try:
            yield mirror
        except BaseException as error:
            mirror._push_quietly()
            if isinstance(error, UserError) and place in str(error):
                raise UserError(str(error).replace(place, str(workdir))) from error
            raise
        mirror.push()


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Holds a bucket's directory by the object `lock`, which says who and is renewed every 30 s.

    One that another left counts as left behind once it stays the same for 90 s, at once if its process was on this machine
    and is gone: so a run that was killed and goes on elsewhere waits that long. Two that start in the same second may both
    get it. Raises UserError where it is renewed.
    """
    path, renewed = workdir / "lock", threading.Event()
    with cloud_reported(workdir):
        _wait_until_free(path)
        _renew(path)

    def renew() -> None:
        while not renewed.wait(_RENEW_SECONDS):
            with contextlib.suppress(Exception):  # a connection that is down: the training meets it too
                _renew(path)

    thread = threading.Thread(target=renew, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        renewed.set()
        thread.join()
        with contextlib.suppress(Exception):  # one that stays is found to be stale
            path.unlink()


def is_held(workdir: pathlib.Path) -> bool:
    """Whether a bucket's lock was renewed of late, by this machine's clock."""
    holder = _holder(workdir / "lock")
    return bool(holder) and time.time() - holder.get("time", 0) < _STALE_SECONDS


def _wait_until_free(path: pathlib.Path) -> None:
    before = _holder(path)
    if not before or _is_gone(before):
        return
    logging.warning("%s is of %s; waiting %.0f s for a sign of it", path, before.get("host"), _STALE_SECONDS)
    end = time.monotonic() + _STALE_SECONDS
    while time.monotonic() < end:
        time.sleep(min(1.0, _STALE_SECONDS))
        now = _holder(path)
        if not now:
            return
        if now != before:
            who = f"on host {now.get('host')}, process {now.get('process')}"
            raise UserError(f"{path.parent}: another `cv2jax train` is at work there ({who}); stop it or wait for it")


def _renew(path: pathlib.Path) -> None:
    path.write_text(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "time": time.time()}))


def _holder(path: pathlib.Path) -> dict[str, Any]:
    try:
        holder = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_gone(holder: dict[str, Any]) -> bool:
    process = holder.get("process")
    if holder.get("host") != socket.gethostname() or not isinstance(process, int):
        return False
    return process == os.getpid() or not pathlib.Path(f"/proc/{process}").exists()


def _fetch(remote: pathlib.Path, local: pathlib.Path, names: tuple[str, ...] | None = None) -> None:
    """Takes files down: those named, or all but what is large."""
    files = _file_system()
    files.invalidate_cache()
    root = os.fspath(remote).removeprefix(_PREFIX)
    found = [name.removeprefix(f"{root}/") for name in files.find(root)]
    small = [name for name in found if name.partition("/")[0] not in (*_LARGE, "lock", "tensorboard", "profile")]
    for name in small if names is None else [name for name in names if name in found]:
        target = local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(files.cat_file(f"{root}/{name}"))


def _file_system() -> Any:
    """The one that epath takes for gs://, with its connections."""
    import fsspec

    return fsspec.filesystem("gcs", finalize_on_close=True)


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
    found = itertools.chain.from_iterable(
        [pathlib.Path(at, name) for name in names] for at, _, names in os.walk(directory)
    )
    return sorted(path for path in found if path.suffix != ".tmp" and path.is_file())


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns
