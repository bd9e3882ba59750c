"""What an agent's callers hold of storage: a `Store` of many keys, files, and questions about what is there."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from nixl_async.backend import Stat, StorageBackend, StoreAddress
from nixl_async.errors import ClosedError, ConfigurationError, DescriptorError, NotFoundError
from nixl_async.files import FileOptions, open_file
from nixl_async.storage import FileRegion, ObjectRegion, parse_store

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class Store:
    """A bucket, container or directory, and the prefix that all keys get; made by `agent.store(url)`.

    `objects` are places for `agent.transfer`; the rest asks and deletes. Keys are strings without the prefix.
    """

    def __init__(self, address: StoreAddress, backend: StorageBackend) -> None:
        self.address = address
        self._backend = backend

    def __repr__(self) -> str:
        return f"<Store {self.address} by {self._backend.name}>"

    def object(self, key: str, nbytes: int | None = None, *, if_none_match: bool = False) -> ObjectRegion:
        """Name one object; `if_none_match` makes writing it fail with `ConflictError` if it exists."""
        return self.objects([key], nbytes, if_none_match=if_none_match)

    def objects(self, keys: Sequence[str], nbytes: ArrayLike | None = None, *, if_none_match: bool = False) -> ObjectRegion:
        """Name many objects of `nbytes` bytes each (one number, or a list); no request is made.

        Raises:
            DescriptorError: the store cannot have such a key, or a size is none.
        """
        full = self._full(keys)
        self._backend.check_keys(self.address, full)
        return ObjectRegion(self.address, full, nbytes, if_none_match=if_none_match)

    async def exists(self, keys: Sequence[str]) -> Sequence[bool]:
        """Tell of each key whether there is an object."""
        return [found is not None for found in await self.stats(keys)]

    async def stat(self, key: str) -> Stat:
        """Look up one object.

        Raises:
            NotFoundError: there is none.
        """
        (found,) = await self.stats([key])
        if found is None:
            raise NotFoundError(f"{self.address}{key} does not exist", backend=self._backend.name)
        return found

    async def stats(self, keys: Sequence[str]) -> Sequence[Stat | None]:
        """Look up objects, many at once; `None` for those that do not exist."""
        return [self._short(found) for found in await self._backend.stat(self.address, self._full(keys))] if keys else []

    async def list(self, prefix: str = "") -> AsyncIterator[Stat]:
        """Iterate over the objects whose key begins with `prefix`, a page of the listing at a time."""
        async for found in self._backend.list(self.address, self.address.prefix + prefix):
            short = self._short(found)
            assert short is not None
            yield short

    async def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; those that do not exist are no error."""
        full = self._full(keys)
        if full:
            await self._backend.delete(self.address, full)

    def _full(self, keys: Sequence[str]) -> Sequence[str]:
        if isinstance(keys, str):
            raise TypeError(f"keys is the string {keys!r}; give a list of keys")
        for key in keys:
            if not isinstance(key, str):
                raise TypeError(f"key {key!r} is of type {type(key).__name__}; keys are strings")
        full = [self.address.prefix + key for key in keys]
        if "" in full:
            raise DescriptorError("a key is empty; an object needs a name")
        return full

    def _short(self, found: Stat | None) -> Stat | None:
        return found if found is None else replace(found, key=found.key[len(self.address.prefix) :])


class Stores:
    """Opens stores for an agent.

    `schemes` tells by which of its backends each URL scheme is served; `backend` finds the storage backend of that name, or loads
    and opens it.
    """

    def __init__(self, schemes: Callable[[], Mapping[str, str]], backend: Callable[[str], Awaitable[StorageBackend]]) -> None:
        self._schemes, self._backend = schemes, backend

    async def store(self, url: str, options: dict[str, Any]) -> Store:
        """Open the store at a URL."""
        schemes = self._schemes()
        address = parse_store(url, options, schemes)
        backend = await self._backend(schemes[address.scheme])
        await backend.open_store(address)
        return Store(address, backend)

    async def split(self, url: str | os.PathLike[str], options: dict[str, Any]) -> tuple[Store, str]:
        """Open the store that a single object's URL is in; return it and the key."""
        url = _url(url)
        address = parse_store(url, options, self._schemes())
        if address.scheme == "file":
            # In the root: asking about a file must not make its directory.
            return await self.store("file:///", options), _path(url, address)
        if not address.prefix:
            raise ConfigurationError(f"{url!r} names no object; write {address.scheme}://{address.bucket}/key")
        store = await self.store(f"{address.scheme}://{address.bucket}/", options)
        return store, address.prefix

    async def stats(self, urls: Sequence[str | os.PathLike[str]], options: dict[str, Any]) -> list[Stat | None]:
        """Look up objects and files by their URLs or paths, batched by store."""
        _check_list(urls)
        grouped: dict[StoreAddress, tuple[Store, list[tuple[int, str]]]] = {}
        for position, url in enumerate(urls):
            store, key = await self.split(url, options)
            grouped.setdefault(store.address, (store, []))[1].append((position, key))
        found: list[Stat | None] = [None] * len(urls)
        for store, wanted in grouped.values():
            stats = await store.stats([key for _, key in wanted])
            for (position, _), stat in zip(wanted, stats, strict=True):
                found[position] = None if stat is None else replace(stat, key=os.fspath(urls[position]))
        return found

    async def delete(self, urls: Sequence[str | os.PathLike[str]], options: dict[str, Any]) -> None:
        """Delete objects and files by their URLs or paths, batched by store."""
        _check_list(urls)
        grouped: dict[StoreAddress, tuple[Store, list[str]]] = {}
        for url in urls:
            store, key = await self.split(url, options)
            grouped.setdefault(store.address, (store, []))[1].append(key)
        for store, keys in grouped.values():
            await store.delete(keys)

    async def list(self, url: str | os.PathLike[str], options: dict[str, Any]) -> AsyncIterator[Stat]:
        """List what a store holds under a URL; a directory that is not there holds nothing, and is not made."""
        url = _url(url)
        address = parse_store(url, options, self._schemes())
        if address.scheme == "file" and not await asyncio.to_thread(os.path.isdir, address.bucket):
            return
        async for found in (await self.store(url, options)).list():
            yield found


def _url(url: str | os.PathLike[str]) -> str:
    """Turn a path into a URL; leave URLs as they are."""
    if isinstance(url, os.PathLike) or (isinstance(url, str) and "://" not in url):
        return f"file://{os.path.join(os.getcwd(), os.fspath(url))}"
    return url


def _path(url: str, address: StoreAddress) -> str:
    """Return the path of a single file's URL, from the root on."""
    path = os.path.normpath(address.bucket).strip("/")
    if not path or url.endswith("/"):
        raise ConfigurationError(f"{url!r} names no file; write file:///directory/name")
    return path


def _check_list(urls: Sequence[object]) -> None:
    if isinstance(urls, str | bytes | os.PathLike):
        raise TypeError(f"urls is {urls!r}; give a list of URLs or paths")


T = TypeVar("T")


class Opening(Generic[T]):
    """What is being opened: await it, or use it as `async with`, which also closes it."""

    def __init__(self, opening: Coroutine[Any, Any, T]) -> None:
        self._opening = opening
        self._opened: Any = None

    def __await__(self) -> Generator[Any, None, T]:
        return self._opening.__await__()

    async def __aenter__(self) -> T:
        self._opened = await self._opening
        await self._opened.__aenter__()
        return self._opened  # type: ignore[no-any-return]

    async def __aexit__(self, *exc: object) -> None:
        await self._opened.__aexit__(*exc)


class StorageCalls:
    """What an agent offers for files and objects."""

    _stores: Stores
    _files: set[FileRegion]

    async def _storage(self, name: str) -> StorageBackend:
        raise NotImplementedError

    def _check_open(self) -> None:
        raise NotImplementedError

    def file(
        self,
        path: str | os.PathLike[str],
        mode: str = "r",
        *,
        nbytes: int | None = None,
        direct: bool | None = None,
        publish: bool = False,
        fsync: bool = False,
    ) -> Opening[FileRegion]:
        """Open a file as one side of transfers: `async with agent.file(path) as file`, or `file = await agent.file(path)`.

        `mode`: "r" reads; "r+" also writes; "w" makes the file empty first; "x" fails if it exists. `nbytes` allocates that many
        bytes; without it a written file grows. `direct` goes past the page cache, whatever the alignment. `publish` writes under a
        temporary name in the same directory; the file gets its own at the end of the block, or never if it raised. `fsync` makes
        the bytes durable (and a published name) before the file is closed.

        Raises:
            NotFoundError, AccessError, ConflictError, OutOfSpace: the operating system says so.
            ConfigurationError: the options make no sense, or the file system has no direct I/O.
        """
        options = FileOptions(mode, nbytes, direct, publish, fsync)

        async def opening() -> FileRegion:
            await self._storage("posix")
            region = await open_file(path, options)
            try:
                self._check_open()
            except ClosedError:
                await region.aclose(publish=False)
                raise
            self._files.add(region)
            region.forget = self._files.discard
            return region

        return Opening(opening())

    async def store(self, url: str, **options: Any) -> Store:
        """Open a store of many objects: `s3://bucket/prefix`, `az://container/prefix`, `gs://bucket/prefix`, `file:///directory`.

        A storage backend that was given to the agent serves its own `schemes`, as `scheme://bucket/prefix`, and goes before ours;
        of several for one scheme it is the one that the agent prefers. `options` are the backend's: see `S3Backend`,
        `AzureBackend`, `GCSBackend`; those given here go before its own.

        Raises:
            ConfigurationError: the URL or an option is wrong, or this agent has no backend for it.
            MissingDependency: the backend's package is not installed.
        """
        return await self._stores.store(url, options)

    async def object(
        self, url: str | os.PathLike[str], nbytes: int | None = None, *, if_none_match: bool = False, **options: Any
    ) -> ObjectRegion:
        """Name one object of a store by its URL, as one side of transfers; no request is made for it.

        `nbytes` is needed to slice it; without it the object takes the other side's size. `if_none_match` makes writing it fail
        with `ConflictError` if it exists.
        """
        store, key = await self._stores.split(url, options)
        return store.object(key, nbytes, if_none_match=if_none_match)

    async def exists(self, urls: Sequence[str | os.PathLike[str]], **options: Any) -> Sequence[bool]:
        """Tell of each URL or path whether there is an object or file; requests to one store go out together."""
        return [found is not None for found in await self._stores.stats(urls, options)]

    async def stat(self, url: str | os.PathLike[str], **options: Any) -> Stat:
        """Look up one object or file.

        Raises:
            NotFoundError: there is none.
        """
        (found,) = await self._stores.stats([url], options)
        if found is None:
            raise NotFoundError(f"{os.fspath(url)} does not exist")
        return found

    async def list(self, url: str | os.PathLike[str], **options: Any) -> AsyncIterator[Stat]:
        """Iterate over what a store holds under a URL; long listings come page by page.

        The keys are what follows the URL.
        """
        async for found in self._stores.list(url, options):
            yield found

    async def delete(self, urls: Sequence[str | os.PathLike[str]], **options: Any) -> None:
        """Delete objects and files; those that do not exist are no error."""
        await self._stores.delete(urls, options)
