"""Azure's own SDK for Python, asynchronous, several blobs at once."""

from __future__ import annotations

import asyncio
from typing import Any

from bench.worker import serve_made
from bench.workers.stored import Stored


class Into:
    """A stream over memory, for the SDK to write to."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._at = view, 0

    def write(self, data: bytes) -> int:
        """Copy to the current position."""
        self._view[self._at : self._at + len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to an absolute position."""
        self._at = offset
        return offset

    def seekable(self) -> bool:
        """Say that ranges may come in any order."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._at


class AzureSdk(Stored):
    """One container client."""

    async def open(self, role: str, nbytes: int, options: dict[str, Any]) -> None:
        """Make the client."""
        from azure.storage.blob.aio import ContainerClient

        self.allocate(nbytes)
        self.at_once = options["at_once"]
        self.client = ContainerClient.from_connection_string(options["connection_string"], options["container"])

    async def move(self) -> dict[str, float]:
        """Move every blob once."""
        work = iter(enumerate(self.order.tolist()))
        keys, nbytes, view = self.where["keys"], self.page_nbytes, self.buffer.data

        async def some() -> None:
            for place, number in work:
                mine = view[place * nbytes : (place + 1) * nbytes]
                if self.write:
                    await self.client.upload_blob(keys[number], bytes(mine), overwrite=True)
                else:
                    await (await self.client.download_blob(keys[number])).readinto(Into(mine))

        with self.timed():
            await asyncio.gather(*(some() for _ in range(self.at_once)))
        return self.measured

    async def aclose(self) -> None:
        """Leave in order."""
        if hasattr(self, "client"):
            await self.client.close()


if __name__ == "__main__":
    asyncio.run(serve_made(AzureSdk))
