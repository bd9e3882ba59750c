"""obstore, the Rust object_store in Python: awaitable calls, a request's objects at once, and a copy to where bytes belong."""

from __future__ import annotations

import asyncio
import time
from typing import Any
from urllib.parse import urlsplit

from plain import Array, Measured, Stored, allocate, serve


class Obstore(Stored):
    def opened(self) -> Any:
        import obstore
        from obstore.store import S3Store

        given, url = self.options["store_options"], urlsplit(self.options["store_url"])
        if url.scheme != "s3":
            raise RuntimeError(f"obstore is measured with S3, not {url.scheme}://")
        settings = {
            "endpoint": given.get("endpoint_url"),
            "access_key_id": given.get("access_key"),
            "secret_access_key": given.get("secret_key"),
            "session_token": given.get("session_token"),
            "region": given.get("region"),
        }
        settings = {name: value for name, value in settings.items() if value}
        virtual = given.get("addressing") == "virtual"
        self.api = obstore
        self.store = S3Store(url.netloc, virtual_hosted_style_request=virtual, client_options={"allow_http": True}, **settings)
        self.runner = asyncio.Runner()
        self.keys: set[str] = set()

    def _key(self, number: int) -> str:
        key = f"nixl-async-bench-{self.options['run']}/obstore/{self.index}/{self.point.block}/{number}"
        self.keys.add(key)
        return key

    def put(self, content: Array) -> None:
        self.runner.run(self._move(True, memoryview(content), range(self.n_blocks), range(0, len(content), self.point.block)))

    def fetch(self) -> Array:
        content = allocate(self.n_blocks * self.point.block)
        self.runner.run(self._move(False, memoryview(content), range(self.n_blocks), range(0, len(content), self.point.block)))
        return content

    async def _move(self, write: bool, view: memoryview, numbers: Any, offsets: Any) -> None:
        nbytes = self.point.block

        async def one(number: int, offset: int) -> None:
            mine = view[offset : offset + nbytes]
            if write:
                await self.api.put_async(self.store, self._key(number), mine)
            else:
                mine[:] = memoryview(await self.api.get_range_async(self.store, self._key(number), start=0, length=nbytes))

        await asyncio.gather(*(one(number, offset) for number, offset in zip(numbers, offsets)))

    def aimed(self) -> None:
        flow = self.flows[0]
        slots = range(self.point.slots)
        self.requests = [(self.numbers(slot).tolist(), self.point.near(flow, slot).tolist()) for slot in slots]

    def run(self, iterations: int) -> Any:
        """Have every slot make its share of the requests."""
        return self.runner.run(self._run(iterations))

    async def _run(self, iterations: int) -> Any:
        measured = Measured()
        view, write = memoryview(self.buffer), self.point.op == "WRITE"
        share = iterations // len(self.requests)

        async def work(request: tuple[list[int], list[int]]) -> None:
            for _ in range(share):
                called = time.perf_counter()
                await self._move(write, view, *request)
                measured.add(0.0, 0.0, time.perf_counter() - called)
                measured.nbytes += self.point.block * self.point.batch
                self.meter.tell(measured.nbytes)  # type: ignore[attr-defined]

        measured.begin()
        await asyncio.gather(*(work(request) for request in self.requests))
        measured.end()
        return measured.as_dict(route="s3")

    def close(self) -> None:
        if getattr(self, "keys", None):
            self.api.delete(self.store, sorted(self.keys))


if __name__ == "__main__":
    serve(Obstore())
