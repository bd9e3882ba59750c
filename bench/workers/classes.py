"""nixl_async with traffic classes: many requests of each at once, and small transfers beside a large one."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from bench import scheduler
from bench.worker import serve_made
from bench.workers.ours import Ours
from nixl_async import TrafficClass, Transfer


class Classes(Ours):
    """Commands of the suites `qos` and `scheduler`."""

    def _submit(self, place: int, nbytes: int, traffic_class: TrafficClass) -> Transfer:
        near, far = self.region[place : place + nbytes], self.remote[place : place + nbytes]
        return self.agent.submit(near, far, traffic_class=traffic_class)

    def _places(self, nbytes: int) -> range:
        return range(0, len(self.buffer) - nbytes + 1, nbytes)

    async def requests(self, count: int, nbytes: int, seconds: float) -> dict[str, list[int]]:
        """Keep `count` requests going, each writing `nbytes` bytes again and again; bytes of each, by class, within `seconds`.

        What moves in the first fifth of a second, before all of them wait, is not counted.
        """
        places = self._places(nbytes)
        moved = [0] * count
        going = True

        async def request(number: int) -> None:
            traffic_class = list(TrafficClass)[number % len(TrafficClass)]
            while going:
                await self._submit(places[number % len(places)], nbytes, traffic_class)
                moved[number] += nbytes

        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(request(number))
            await asyncio.sleep(0.2)
            before = list(moved)
            await asyncio.sleep(seconds)
            counted = [after - at for after, at in zip(moved, before, strict=True)]
            going = False
        n = len(TrafficClass)
        return {one.value: counted[index::n] for index, one in enumerate(TrafficClass)}

    async def urgent(self, count: int, nbytes: int, warm: int = 20) -> list[float]:
        """Write `nbytes` bytes `count` times in the latency class, one awaited after the other; seconds of each."""
        places = self._places(nbytes)
        seconds = []
        for turn in range(warm + count):
            start = time.perf_counter()
            await self._submit(places[turn % len(places)], nbytes, TrafficClass.LATENCY)
            seconds.append(time.perf_counter() - start)
        return seconds[warm:]

    async def urgent_beside_bulk(self, count: int, nbytes: int, times: int) -> dict[str, Any]:
        """Do the same while transfers of `times` times the whole buffer in the bulk class follow each other."""
        everything = slice(0, len(self.buffer))
        prepared = await self.agent.prepare([self.region[everything]] * times, [self.remote[everything]] * times)
        going, moved = True, 0

        async def bulk() -> None:
            nonlocal moved
            while going:
                moved += (await prepared.submit(traffic_class=TrafficClass.BULK)).nbytes

        start = time.perf_counter()
        task = asyncio.create_task(bulk())
        await asyncio.sleep(0.02)
        seconds = await self.urgent(count, nbytes)
        going = False
        await task
        return {"seconds": seconds, "bulk": moved / (time.perf_counter() - start)}

    async def submit_many(self, count: int, nbytes: int) -> float:
        """Submit `count` writes at once and await them all; return the CPU seconds of the loop's thread."""
        places = self._places(nbytes)
        start = time.thread_time()
        transfers = [self._submit(places[n % len(places)], nbytes, TrafficClass.NORMAL) for n in range(count)]
        for transfer in transfers:
            await transfer
        return time.thread_time() - start

    def scheduler_transfers(self, count: int, repeats: int) -> list[float]:
        """Time the scheduler alone, for each transfer."""
        return scheduler.transfers(count, repeats)

    def scheduler_pages(self, count: int, repeats: int) -> dict[str, list[float]]:
        """Time the scheduler alone, for each page."""
        return scheduler.pages(count, repeats)


if __name__ == "__main__":
    asyncio.run(serve_made(lambda: Classes(None)))
