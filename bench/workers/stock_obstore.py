"""obstore, the Rust object_store in Python: its awaitable calls, many at once, and the copy to where bytes belong."""

from __future__ import annotations

import asyncio
from typing import Any

from bench.worker import serve_async
from bench.workers.stored import Stored


class Obstore(Stored):
    """One store."""

    async def open(self, role: str, nbytes: int, options: dict[str, Any]) -> None:
        """Make the store."""
        import obstore
        from obstore.store import S3Store

        self.allocate(nbytes)
        self.api = obstore
        self.at_once = options["at_once"]
        self.store = S3Store(
            options["bucket"],
            endpoint=options["endpoint"],
            access_key_id=options["access_key"],
            secret_access_key=options["secret_key"],
            region=options["region"],
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )

    async def move(self) -> dict[str, float]:
        """Move every object once."""
        work = iter(enumerate(self.order.tolist()))
        keys, nbytes, view = self.where["keys"], self.page_nbytes, self.buffer.data

        async def some() -> None:
            for place, number in work:
                mine = view[place * nbytes : (place + 1) * nbytes]
                if self.write:
                    await self.api.put_async(self.store, keys[number], mine)
                else:
                    mine[:] = memoryview(await self.api.get_range_async(self.store, keys[number], start=0, length=nbytes))

        with self.timed():
            await asyncio.gather(*(some() for _ in range(self.at_once)))
        return self.measured


if __name__ == "__main__":
    asyncio.run(serve_async(Obstore()))
