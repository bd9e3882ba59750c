"""Opens files for transfers, syncs them, and gives them their name when they are whole. Blocking work is done on threads.

A file that is to be published has no name before that where its file system can do it (O_TMPFILE), so that a process that is killed
leaves nothing. Elsewhere, and for the moment in which it replaces another file, it is called `.<name>.<number>.part` in the same
directory. Whoever writes a part holds its lock (flock) until it has its name or is gone; whoever opens the same path to publish it
removes the parts that nobody holds. File systems without flock keep them.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import itertools
import os
import resource
import stat
from contextlib import suppress
from dataclasses import dataclass

from nixl_async.backend import quiesce
from nixl_async.errors import (
    AccessError,
    BackendError,
    ConfigurationError,
    ConflictError,
    NotFoundError,
    OutOfSpace,
    TransferError,
)
from nixl_async.storage import FileRegion

MODES = {"r": os.O_RDONLY, "r+": os.O_RDWR, "w": os.O_RDWR | os.O_CREAT | os.O_TRUNC, "x": os.O_RDWR | os.O_CREAT | os.O_EXCL}


SWEPT = 16
"""Parts with numbers below this are looked for; higher ones are only ever made while as many are being written."""


def os_error(error: OSError, what: str, *, backend: str = "posix") -> TransferError:
    """Turn an operating system's error into ours; `what` says what was being done."""
    text = f"{what}: {error.strerror or error}"
    if error.errno == errno.EMFILE:
        text += f"; RLIMIT_NOFILE allows {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} descriptors: raise it (ulimit -n)"
    kinds: dict[int | None, type[TransferError]] = {
        errno.ENOENT: NotFoundError,
        errno.EACCES: AccessError,
        errno.EPERM: AccessError,
        errno.EROFS: AccessError,
        errno.EEXIST: ConflictError,
        errno.ENOSPC: OutOfSpace,
        errno.EDQUOT: OutOfSpace,
        errno.EFBIG: OutOfSpace,
    }
    made = kinds.get(error.errno, BackendError)(text, backend=backend)
    made.__cause__ = error
    return made


@dataclass(frozen=True, slots=True)
class FileOptions:
    """How a file is opened; see `Agent.file`."""

    mode: str = "r"
    nbytes: int | None = None
    direct: bool | None = None
    publish: bool = False
    fsync: bool = False

    def check(self) -> None:
        """Refuse combinations that make no sense."""
        if self.mode not in MODES:
            raise ConfigurationError(f"mode is {self.mode!r}; it must be one of {', '.join(MODES)}")
        if self.publish and self.mode not in ("w", "x"):
            raise ConfigurationError(f"publish=True needs mode 'w' or 'x', not {self.mode!r}: a file that exists has its name")
        if self.nbytes is not None and self.mode == "r":
            raise ConfigurationError("nbytes is for the modes that write; with 'r' the file's own size counts")
        if self.nbytes is not None and self.nbytes < 0:
            raise ConfigurationError(f"nbytes is {self.nbytes}; it must not be negative")


@dataclass(slots=True)
class _Opened:
    """An open file. `temporary` is the name that is to be removed; with `unnamed` it has none and is not published yet."""

    path: str
    temporary: str | None
    unnamed: bool
    options: FileOptions
    fd: int
    direct_fd: int
    nbytes: int | None

    def close(self, publish: bool) -> None:
        """Sync, publish or drop, and close."""
        durable = publish and self.options.fsync and self.options.mode != "r"
        try:
            if durable:
                os.fdatasync(self.fd)
            if publish and (self.unnamed or self.temporary is not None):
                self._publish()
            if durable and self.options.mode in ("w", "x"):
                _sync_directory(os.path.dirname(self.path) or ".")
        finally:
            self.drop()

    def _publish(self) -> None:
        if self.unnamed:
            try:
                return _link(self.fd, self.path)
            except FileExistsError:
                if self.options.mode == "x":
                    raise
            self.temporary = _link_part(self.fd, self.path)
        assert self.temporary is not None
        if self.options.mode == "x":
            # A link is refused if the name is taken; a rename would replace what has it.
            os.link(self.temporary, self.path)
        else:
            os.replace(self.temporary, self.path)
            self.temporary = None

    def drop(self) -> None:
        """Close, and remove what has a temporary name."""
        os.close(self.fd)
        if self.direct_fd >= 0:
            os.close(self.direct_fd)
        if self.temporary is not None:
            with suppress(FileNotFoundError):
                os.unlink(self.temporary)

    def undo(self) -> None:
        """Close a file that nobody wants any more, and remove it if it was made by opening it."""
        self.drop()
        if self.options.mode == "x" and not self.options.publish:
            with suppress(OSError):
                os.unlink(self.path)


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _part(path: str, number: int) -> str:
    directory, base = os.path.split(path)
    # A name has 255 bytes at most.
    return os.path.join(directory, f".{os.fsdecode(os.fsencode(base)[:200])}.{number}.part")


def _sweep(path: str) -> None:
    """Remove the parts of a path that nobody writes any more."""
    for number in range(SWEPT):
        name = _part(path, number)
        try:
            fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # It may have got its name since it was opened here.
            if os.path.samestat(os.fstat(fd), os.lstat(name)):
                os.unlink(name)
        except OSError:
            pass
        finally:
            os.close(fd)


def _hold(fd: int) -> bool:
    """Lock a part against being swept; False if it has been swept already."""
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX)
    return os.fstat(fd).st_nlink > 0


def _open_unnamed(directory: str) -> int | None:
    """Open a file that has no name, or return `None` if the file system has no such files."""
    try:
        fd = os.open(directory or ".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except OSError as error:
        # EISDIR, ENOENT: kernels and file systems that do not know the flag see the directory only.
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
            return None
        raise
    if not os.path.exists(f"/proc/self/fd/{fd}"):
        os.close(fd)
        return None
    _hold(fd)
    return fd


def _open_part(path: str, flags: int) -> tuple[int, str]:
    for number in itertools.count():
        name = _part(path, number)
        with suppress(FileExistsError):
            fd = os.open(name, flags | os.O_EXCL, 0o666)
            if _hold(fd):
                return fd, name
            os.close(fd)
    raise AssertionError


def _link(fd: int, path: str) -> None:
    # With src_dir_fd, which an absolute path leaves unused, Python calls linkat, which follows /proc's link; link(2) does not.
    os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)


def _link_part(fd: int, path: str) -> str:
    for number in itertools.count():
        name = _part(path, number)
        with suppress(FileExistsError):
            _link(fd, name)
            return name
    raise AssertionError


def _open_name(path: str, options: FileOptions) -> tuple[int, str | None, bool]:
    """Open a file; return its descriptor, the name that is to be removed in the end, and whether it has none yet."""
    flags = MODES[options.mode] | os.O_CLOEXEC
    if not options.publish:
        # Without O_NONBLOCK, opening a pipe waits for somebody at its other end.
        return os.open(path, flags | os.O_NONBLOCK, 0o666), None, False
    if options.mode == "x" and os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    _sweep(path)
    unnamed = _open_unnamed(os.path.dirname(path))
    if unnamed is not None:
        return unnamed, None, True
    fd, name = _open_part(path, flags)
    return fd, name, False


def _open(path: str, options: FileOptions) -> _Opened:
    fd, temporary, unnamed = _open_name(path, options)
    direct_fd = -1
    try:
        kind = os.fstat(fd).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
            raise ConfigurationError(f"{path!r} is neither a file nor a block device; transfers need places at offsets")
        os.set_blocking(fd, True)
        if options.direct:
            try:
                name = f"/proc/self/fd/{fd}" if unnamed else temporary or path
                direct_fd = os.open(name, (MODES[options.mode] & os.O_ACCMODE) | os.O_CLOEXEC | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                raise ConfigurationError(
                    f"direct=True, but the file system of {path!r} has no O_DIRECT; leave direct out to use the page cache"
                ) from error
        nbytes = options.nbytes
        if options.mode in ("w", "x"):
            if nbytes:
                _preallocate(fd, nbytes)
        elif options.mode == "r":
            nbytes = _size(fd)
        else:
            size = _size(fd)
            if nbytes is not None and nbytes > size:
                _preallocate(fd, nbytes)
            nbytes = max(size, nbytes or 0)
    except BaseException:
        os.close(fd)
        if direct_fd >= 0:
            os.close(direct_fd)
        made = path if options.mode == "x" and not options.publish else temporary
        if made is not None:
            with suppress(OSError):
                os.unlink(made)
        raise
    return _Opened(path, temporary, unnamed, options, fd, direct_fd, nbytes)


def _size(fd: int) -> int:
    # Of a block device, stat tells no size.
    return os.lseek(fd, 0, os.SEEK_END)


def _preallocate(fd: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
    os.ftruncate(fd, nbytes)


async def open_file(path: str | os.PathLike[str], options: FileOptions) -> FileRegion:
    """Open a file as a region, on a thread.

    Raises:
        NotFoundError, AccessError, ConflictError, OutOfSpace: the operating system says so.
        ConfigurationError: the options make no sense.
    """
    options.check()
    name = os.fspath(path)
    loop = asyncio.get_running_loop()
    work = loop.run_in_executor(None, _open, name, options)
    try:
        opened = await quiesce(work)
    except asyncio.CancelledError:
        if work.done() and not work.cancelled() and work.exception() is None:
            await quiesce(loop.run_in_executor(None, work.result().undo))
        raise
    except OSError as error:
        raise os_error(error, f"opening {name!r}") from error

    async def close(publish: bool) -> None:
        try:
            await loop.run_in_executor(None, opened.close, publish)
        except OSError as error:
            raise os_error(error, f"closing {name!r}") from error

    return FileRegion(name, opened.fd, opened.direct_fd, opened.nbytes, options.mode == "r", close)
