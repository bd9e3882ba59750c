"""A directory as a store of objects: each key a file, written under a temporary name and renamed when it is whole.

Many small files are opened, read or written, and renamed by one thread in one go; their bytes move through the same engine as the
posix backend's.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import resource
import secrets
import stat as stat_module
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from nixl_async.backend import Host, Limits, Op, Stat, StorageBackend, StoreAddress, Upload
from nixl_async.descriptors import MemoryKind, Plan, Side
from nixl_async.errors import (
    BackendError,
    ConfigurationError,
    DescriptorError,
    IntegrityError,
    TransferError,
)
from nixl_async.fileio import FileEngine, FileError, FileSegments, strictest
from nixl_async.files import os_error
from nixl_async.storage import ObjectRegion, object_parts, raise_failed

if TYPE_CHECKING:
    from nixl_async.descriptors import Array

T = TypeVar("T")
BATCH_FILES = 64
"""How many files one thread has open at most. All of them together take half of what the process may have: `RLIMIT_NOFILE`."""
BATCH_NBYTES = 16 << 20
PIECE_NBYTES = 8 << 20
LISTED_AT_ONCE = 1000
_PART = re.compile(r"\.[0-9a-f]{24}\.part")
"""The names of files that are being written."""
OPTIONS = {"direct": bool, "fsync": bool}


@dataclass(slots=True, eq=False)
class _File:
    """One object of an op: its segments, and what its transfer needs."""

    region: ObjectRegion
    number: int
    start: int
    stop: int
    offset: int
    first: int
    nbytes: int
    fd: int = -1
    direct_fd: int = -1
    temporary: str = ""
    error: TransferError | None = None

    @property
    def key(self) -> str:
        return self.region.objects[self.number]


@dataclass(slots=True, eq=False)
class _Batch:
    files: list[_File] = field(default_factory=list)
    nbytes: int = 0


class DirectoryBackend(StorageBackend):
    """Serves `file://` stores. `direct` goes past the page cache, `fsync` makes each object durable before it gets its name."""

    name = "directory"
    kinds = frozenset()
    schemes = ("file",)
    reports = True
    rank = 61
    limits = Limits(max_ops=16, max_nbytes=1 << 62, max_op_nbytes=1 << 62, max_op_segments=1 << 62, batch=False)

    def __init__(
        self, *, engine: str = "auto", n_threads: int | None = None, direct: bool = False, fsync: bool = False
    ) -> None:
        self._n_threads = n_threads or max(2, min(8, os.cpu_count() or 1))
        self._wanted_engine = engine
        self._defaults = {"direct": direct, "fsync": fsync}
        self._engine: FileEngine | None = None
        self._room: asyncio.Semaphore | None = None

    async def open(self, host: Host) -> None:
        """Find out whether there is io_uring."""
        self._engine = FileEngine(f"nixl-directory-{host.agent_name}", self._n_threads, self._wanted_engine)
        self._room = asyncio.Semaphore(self._n_threads)

    async def aclose(self) -> None:
        """End the threads."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def refusal(self, src: Side, dst: Side) -> str | None:
        """Refuse anything but local DRAM on one side and files of a directory on the other."""
        if {src.kind, dst.kind} != {MemoryKind.DRAM, MemoryKind.OBJECT}:
            return f"it copies between DRAM and objects, not {src.kind.value} to {dst.kind.value}"
        if (peer := src.peer or dst.peer) is not None:
            return f"the memory is peer {peer!r}'s"
        side = src if src.kind is MemoryKind.OBJECT else dst
        scheme = side.regions[0].store.scheme  # type: ignore[attr-defined]
        return None if scheme == "file" else f"it serves file://, not {scheme}://"

    def how(self, src: Side, dst: Side) -> str:
        """Tell the engine."""
        return self._engine.how if self._engine is not None else "closed"

    async def open_store(self, address: StoreAddress) -> None:
        """Check the options, and that the directory is one; make it if there is nothing there."""
        for name, value in address.options:
            if name not in OPTIONS or not isinstance(value, OPTIONS[name]):
                raise ConfigurationError(f"option {name}={value!r} of {address}: known are direct=bool and fsync=bool")

        def make() -> None:
            try:
                os.makedirs(address.bucket, exist_ok=True)
            except OSError as error:
                raise ConfigurationError(f"{address.bucket!r} is no directory and cannot be made: {error}") from error

        await self._on_thread(make)

    async def copy(self, op: Op) -> None:
        """Read or write every object; those that fail do not keep the others from their places."""
        engine, room = self._engine, self._room
        if engine is None or room is None:
            raise BackendError("the directory backend is closed", backend=self.name)
        put = op.plan.dst.kind is MemoryKind.OBJECT
        failed: list[_File] = []
        batches = self._batches(op.plan, put)

        async def lane() -> None:
            for batch in batches:
                async with room:
                    await engine.submit(partial(self._run, engine, put, op.plan, batch.files))
                for file in batch.files:
                    op.report(file.first, file.nbytes, file.error)
                    if file.error is not None:
                        failed.append(file)

        async with asyncio.TaskGroup() as group:
            for _ in range(self._n_threads):
                group.create_task(lane())
        raise_failed([(file.first, file.error) for file in failed if file.error], op)

    def _batches(self, plan: Plan, put: bool) -> Iterator[_Batch]:
        batch, first, most = _Batch(), 0, self._files_at_once()
        for region, key, start, stop, offset in object_parts(plan.dst if put else plan.src, plan.lengths):
            nbytes = int(plan.lengths[start:stop].sum())
            if batch.files and (len(batch.files) == most or batch.nbytes + nbytes > BATCH_NBYTES):
                yield batch
                batch = _Batch()
            batch.files.append(_File(region, key, start, stop, offset, first, nbytes))
            batch.nbytes += nbytes
            first += nbytes
        if batch.files:
            yield batch

    def _files_at_once(self) -> int:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY:
            return BATCH_FILES
        # Each may be open twice, the second time past the page cache.
        return max(1, min(BATCH_FILES, soft // 2 // (2 * self._n_threads)))

    # On threads.

    def _option(self, address: StoreAddress, name: str) -> bool:
        return bool(dict(address.options).get(name, self._defaults[name]))

    def _run(self, engine: FileEngine, put: bool, plan: Plan, files: list[_File], stop: Any) -> None:
        at = 0
        while at < len(files):
            n = self._open_some(files[at:], put)
            self._move(engine, put, plan, files[at : at + n], stop)
            at += n

    def _open_some(self, files: list[_File], put: bool) -> int:
        """Open files, as many as there are descriptors for; return how many were seen to: some cannot be opened."""
        n_open = 0
        for n, file in enumerate(files):
            try:
                self._open(file, put)
                n_open += 1
            except OSError as error:
                _close(file)
                if error.errno in (errno.EMFILE, errno.ENFILE) and n_open:
                    return n
                file.error = os_error(error, f"opening {file.key!r}", backend=self.name)
            except TransferError as error:
                file.error = error
        return len(files)

    def _move(self, engine: FileEngine, put: bool, plan: Plan, files: list[_File], stop: Any) -> None:
        try:
            opened = [file for file in files if file.error is None]
            try:
                if opened:
                    engine.run(put, _segments(opened, plan, put), stop)
            except FileError:
                for file in opened:
                    # Which of them it was, and the others without it.
                    try:
                        engine.run(put, _segments([file], plan, put), stop)
                    except FileError as error:
                        file.error = _explain(error, file, put)
            if put:
                for file in files:
                    if file.error is None:
                        try:
                            self._publish(file)
                        except OSError as error:
                            file.error = os_error(error, f"publishing {file.key!r}", backend=self.name)
        finally:
            for file in files:
                _close(file)

    def _open(self, file: _File, put: bool) -> None:
        path = path_of(file.region.store, file.key)
        direct = self._option(file.region.store, "direct")
        if put:
            file.temporary = os.path.join(os.path.dirname(path), f".{secrets.token_hex(12)}.part")
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            try:
                file.fd = os.open(file.temporary, flags, 0o666)
            except FileNotFoundError:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                file.fd = os.open(file.temporary, flags, 0o666)
            name = file.temporary
        else:
            file.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            size = os.fstat(file.fd).st_size
            if file.region.exact and size != (wanted := int(file.region.sizes[file.number])):
                raise IntegrityError(f"{path!r} has {size} bytes, not {wanted}", backend=self.name)
            name = path
        if direct:
            with suppress(OSError):
                file.direct_fd = os.open(name, (os.O_RDWR if put else os.O_RDONLY) | os.O_DIRECT | os.O_CLOEXEC)

    def _publish(self, file: _File) -> None:
        path = path_of(file.region.store, file.key)
        durable = self._option(file.region.store, "fsync")
        if durable:
            os.fdatasync(file.fd)
        publish(file.temporary, path, file.region.if_none_match)
        file.temporary = ""
        if durable:
            _sync_directory(os.path.dirname(path))

    async def _on_thread(self, work: Callable[[], T]) -> T:
        if self._engine is None:
            raise BackendError("the directory backend is closed", backend=self.name)
        return await self._engine.submit(lambda stop: work())

    # Questions.

    def check_keys(self, address: StoreAddress, keys: Sequence[str]) -> None:
        """Refuse keys that would leave the directory."""
        for key in keys:
            path_of(address, key)

    async def stat(self, address: StoreAddress, keys: Sequence[str]) -> list[Stat | None]:
        """Look up files."""

        def look() -> list[Stat | None]:
            return [_stat(path_of(address, key), key) for key in keys]

        try:
            return await self._on_thread(look)
        except OSError as error:
            raise os_error(error, f"looking into {address}", backend=self.name) from error

    async def list(self, address: StoreAddress, prefix: str) -> AsyncIterator[Stat]:
        """Walk the directory, in order of keys, a thousand files at a time."""
        walk = _walk(address.bucket, prefix)

        def more() -> list[Stat]:
            return [found for found, _ in zip(walk, range(LISTED_AT_ONCE), strict=False)]

        try:
            while page := await self._on_thread(more):
                for found in page:
                    yield found
        except OSError as error:
            raise os_error(error, f"listing {address}", backend=self.name) from error

    async def delete(self, address: StoreAddress, keys: Sequence[str]) -> None:
        """Unlink files."""

        def unlink() -> None:
            for key in keys:
                with suppress(FileNotFoundError):
                    os.unlink(path_of(address, key))

        try:
            await self._on_thread(unlink)
        except OSError as error:
            raise os_error(error, f"deleting from {address}", backend=self.name) from error

    async def upload(
        self, address: StoreAddress, key: str, nbytes: int, *, if_none_match: bool = False, max_piece_nbytes: int | None = None
    ) -> Upload:
        """Begin a file under a temporary name."""
        if self._engine is None:
            raise BackendError("the directory backend is closed", backend=self.name)
        file = _File(ObjectRegion(address, [key], nbytes, if_none_match=if_none_match), 0, 0, 0, 0, 0, nbytes)
        try:
            await self._on_thread(lambda: self._open(file, True))
        except BaseException as error:
            _close(file)
            if isinstance(error, OSError) and not isinstance(error, TransferError):
                raise os_error(error, f"opening {key!r}", backend=self.name) from error
            raise
        return _FileUpload(self, self._engine, file, min(PIECE_NBYTES, max_piece_nbytes or PIECE_NBYTES))


class _FileUpload(Upload):
    def __init__(self, backend: DirectoryBackend, engine: FileEngine, file: _File, piece_nbytes: int) -> None:
        self._backend, self._engine, self._file = backend, engine, file
        self.piece_nbytes = piece_nbytes

    async def put(self, number: int, source: Side, lengths: Array) -> None:
        """Write a piece in its place."""
        file = self._file
        nbytes = int(lengths.sum())
        plan = Plan(source, source, lengths, nbytes, ())
        at = number * self.piece_nbytes
        piece = _File(file.region, 0, 0, len(lengths), at, 0, nbytes, file.fd, file.direct_fd)
        try:
            await self._engine.submit(lambda stop: self._engine.run(True, _segments([piece], plan, True), stop))
        except FileError as error:
            raise _explain(error, file, True) from error

    async def finish(self) -> None:
        """Give the file its name."""
        try:
            await self._engine.submit(lambda stop: self._backend._publish(self._file))
        except OSError as error:
            raise os_error(error, f"publishing {self._file.key!r}", backend="directory") from error
        finally:
            _close(self._file)

    async def abort(self) -> None:
        """Remove the temporary file."""
        _close(self._file)


def path_of(address: StoreAddress, key: str) -> str:
    """Return the file of a key.

    Raises:
        DescriptorError: the key would leave the directory.
    """
    parts = key.split("/")
    if not key or key.startswith("/") or "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise DescriptorError(f"key {key!r} is no file of {address}: no empty, '.' or '..' parts")
    return os.path.join(address.bucket, key)


def publish(temporary: str, path: str, only_new: bool) -> None:
    """Give a file its name; with `only_new`, raise `FileExistsError` if another has it."""
    if not only_new:
        os.replace(temporary, path)
        return
    os.link(temporary, path)
    os.unlink(temporary)


def _segments(files: list[_File], plan: Plan, put: bool) -> FileSegments:
    memory = plan.src if put else plan.dst
    which = np.concatenate([np.arange(file.start, file.stop) for file in files])
    lengths = plan.lengths[which]
    counts = [file.stop - file.start for file in files]
    ends = np.cumsum(lengths)
    lasts = np.cumsum(counts) - 1
    begins = np.concatenate((np.zeros(1, np.int64), ends[lasts][:-1]))
    offsets = ends - lengths - np.repeat(begins, counts) + np.repeat([file.offset for file in files], counts)
    direct = [file.direct_fd for file in files]
    aligned = strictest(direct)
    return FileSegments(
        np.repeat(np.array([file.fd for file in files], np.int32), counts),
        np.repeat(np.array(direct, np.int32), counts),
        np.ascontiguousarray(offsets, np.int64),
        np.ascontiguousarray(memory.addresses[which]),
        np.ascontiguousarray(lengths),
        aligned,
    )


def _explain(error: FileError, file: _File, put: bool) -> TransferError:
    if error.errno == errno.ENODATA:
        return BackendError(f"directory: {file.key!r} is shorter than {file.offset + file.nbytes} bytes", backend="directory")
    return os_error(error, f"{'writing' if put else 'reading'} {file.key!r}", backend="directory")


def _close(file: _File) -> None:
    for fd in (file.fd, file.direct_fd):
        if fd >= 0:
            os.close(fd)
    file.fd = file.direct_fd = -1
    if file.temporary:
        with suppress(OSError):
            os.unlink(file.temporary)
        file.temporary = ""


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _stat(path: str, key: str) -> Stat | None:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat_module.S_ISREG(found.st_mode):
        return None
    return Stat(key, found.st_size, f"{found.st_mtime_ns:x}-{found.st_size:x}", found.st_mtime)


def _walk(directory: str, prefix: str, below: str = "") -> Iterator[Stat]:
    try:
        with os.scandir(os.path.join(directory, below)) as entries:
            found = {f"{below}{entry.name}{'/' * entry.is_dir(follow_symlinks=False)}": entry for entry in entries}
    except FileNotFoundError:
        if below:
            return
        raise
    # With its slash, a directory stands among the files where its keys do.
    for key in sorted(found):
        if key.endswith("/"):
            if prefix.startswith(key) or key.startswith(prefix):
                yield from _walk(directory, prefix, key)
        elif (
            key.startswith(prefix)
            and not _PART.fullmatch(found[key].name)
            and (one := _stat(found[key].path, key)) is not None
        ):
            yield one
