"""Random access to members of uncompressed tar files (webdatasets), through a small index kept per process."""

import collections
import os
import tarfile
import threading
from pathlib import Path

from cv2jax.config import UserError

_MAX_OPEN = 16  # archives whose index and descriptor a process keeps
_SEPARATOR = "::"


class TarIndex:
    """Where each member of one tar lies; reads are single `pread` calls, so threads share it without a lock."""

    def __init__(self, path: str):
        """Scan the headers of the tar at `path`; raises UserError if it is missing, compressed or damaged."""
        self.path = path
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            with open(self._descriptor, "rb", closefd=False) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                self.members = {member.name: (member.offset_data, member.size) for member in tar if member.isfile()}
        except FileNotFoundError:
            raise UserError(f"{path}: no such archive; check the path") from None
        except OSError as error:
            raise UserError(f"{path}: cannot read the archive ({error.strerror or error}); check the file") from None
        except tarfile.TarError as error:
            raise UserError(f"{path}: not an intact uncompressed tar ({error}); unpack it or copy it again") from None

    def read(self, member: str) -> bytes:
        """Return the contents of `member`; raises UserError if the archive has no such member or ends inside it."""
        if member not in self.members:
            raise UserError(f"{self.path}::{member}: the archive has no such member; check the manifest")
        offset, size = self.members[member]
        pieces = []
        while size > 0:  # one pread returns at most 2 GiB
            piece = os.pread(self._descriptor, size, offset)
            if not piece:
                raise UserError(f"{self.path}::{member}: the archive ends inside this member; copy it again")
            pieces.append(piece)
            offset, size = offset + len(piece), size - len(piece)
        return b"".join(pieces)

    def __del__(self) -> None:
        # Closed with the last reference, never on eviction: another thread may still be reading.
        if self._descriptor >= 0:
            os.close(self._descriptor)


class _Cache:
    """The archives used last, each indexed once per process and again if the file changes."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything; a forked child must, since its copy of a lock may be held by a thread it does not have."""
        self._lock = threading.Lock()
        self._indices: collections.OrderedDict[str, tuple[tuple[int, int], TarIndex]] = collections.OrderedDict()

    def get(self, path: str) -> TarIndex:
        """Return the index of the tar at `path`, scanning it if it is new or has changed."""
        try:
            status = os.stat(path)
        except OSError:
            return TarIndex(path)  # raises, and says what is wrong
        stamp = (status.st_mtime_ns, status.st_size)
        with self._lock:
            known = self._indices.get(path)
            if known is None or known[0] != stamp:
                known = (stamp, TarIndex(path))
                self._indices[path] = known
            self._indices.move_to_end(path)
            while len(self._indices) > _MAX_OPEN:
                self._indices.popitem(last=False)
            return known[1]


_CACHE = _Cache()
os.register_at_fork(after_in_child=_CACHE.reset)


def split_tar_source(source: str) -> tuple[str, str] | None:
    """Split `archive.tar::member` into its two parts; None if `source` is not written so."""
    archive, separator, member = source.partition(_SEPARATOR)
    return (archive, member) if separator and archive.endswith(".tar") else None


def read_tar_member(archive: str | Path, member: str) -> bytes:
    """Return the bytes of `member` of an uncompressed tar: one seek and read once the archive is indexed.

    Thread-safe; each process keeps the indices of the 16 archives used last. Raises UserError for an archive that is
    missing, compressed or cut short, and for a member that is not there.
    """
    return _CACHE.get(str(archive)).read(member)


def list_tar_members(archive: str | Path) -> list[str]:
    """Return the names of all regular files of an uncompressed tar, in its order; errors as `read_tar_member`."""
    return list(_CACHE.get(str(archive)).members)
