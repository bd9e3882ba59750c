"""Pulls: layers are read when they are offered; each side may give up, be lost, come again."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nixl_async import Aborted, ClosedError, ConfigurationError, CPUStream, DescriptorError, LayerPlan, PeerLost, TransferError
from tests.agents import connect
from tests.layers.pairs import Request, request_between, turns, until


def offer(on: Request, request: str = "r"):  # type: ignore[no-untyped-def]
    return on.producer.offer("c", request, on.count)


async def test_layers_are_read_when_they_are_ready() -> None:
    async with request_between(push=False) as on:
        async with offer(on) as offered, on.consumer.pull(on.peer, on.plan(push=False)) as pull:
            layers = pull.layers()
            for layer in range(on.count):
                await turns()
                assert on.empty(layer)
                offered.ready(layer)
                assert await anext(layers) == layer
                on.check(layer)
            assert [one async for one in layers] == []
        assert pull.complete


async def test_the_short_form() -> None:
    async with request_between(push=False) as on:

        async def produce() -> None:
            async with offer(on) as offered:
                offered.ready(3, 4, 5)
                await turns()
                offered.ready(0, 1, 2)

        producer = asyncio.ensure_future(produce())
        assert [layer async for layer in on.consumer.pull(on.peer, on.plan(push=False))] == list(range(on.count))
        await producer
        on.check()


async def test_the_short_form_that_is_left_early_ends_when_it_is_dropped() -> None:
    async with request_between(push=False) as on, asyncio.timeout(10):
        with pytest.raises(Aborted, match="gave up"):
            async with offer(on) as offered:
                offered.ready(*range(on.count - 1))

                async def take_one() -> None:
                    async for layer in on.consumer.pull(on.peer, on.plan(push=False)):
                        assert layer == 0
                        break

                await take_one()
                gc.collect()
                offered.ready(on.count - 1)


async def test_a_layer_is_offered_only_after_the_stream_has_computed_it() -> None:
    async with request_between(2, push=False) as on:
        gate = threading.Event()
        with CPUStream() as compute, CPUStream() as use:
            async with offer(on) as offered, on.consumer.pull(on.peer, on.plan(push=False)) as pull:
                seen: list[bool] = []
                pull.wait_on(use, 1)
                use.launch(lambda: seen.append(not on.empty(1)))
                compute.launch(gate.wait)
                offered.ready(0)
                offered.ready(1, after=compute)
                layers = pull.layers()
                assert await anext(layers) == 0
                await turns()
                assert on.empty(1)
                gate.set()
                assert [one async for one in layers] == [1]
            use.synchronize()
            assert seen == [True]


async def test_no_more_is_read_than_the_window_allows() -> None:
    async with (
        request_between(push=False) as on,
        offer(on) as offered,
        on.consumer.pull(on.peer, on.plan(push=False), window=2) as pull,
    ):
        for layer in range(on.count):
            offered.ready(layer)
        layers = pull.layers()
        for layer in range(on.count):
            assert await anext(layers) == layer
            expected = min(layer + 2, on.count)
            await until(lambda: len(pull.arrived) >= expected)  # noqa: B023
            await turns()
            assert len(pull.arrived) == expected
        assert [one async for one in layers] == []


async def test_a_consumer_that_leaves_is_quiet_and_the_offer_hears_of_it() -> None:
    async with request_between(push=False) as on:
        with on.faulty.hang() as gate, pytest.raises(Aborted, match="gave up request 'r'"):
            async with offer(on) as offered:
                offered.ready(*range(on.count))
                with pytest.raises(ValueError, match="enough"):
                    async with on.consumer.pull(on.peer, on.plan(push=False)):
                        await gate.reached()
                        raise ValueError("enough")
                assert on.faulty.in_flight == 0
        await turns()
        assert on.empty(*range(on.count))


async def test_an_offer_that_ends_waits_until_nothing_is_read() -> None:
    async with request_between(push=False) as on:
        with on.faulty.hang(stubborn=True) as gate:

            async def produce() -> None:
                async with offer(on) as offered:
                    offered.ready(*range(on.count))
                    await gate.reached()
                    raise ZeroDivisionError("compute failed")

            producer = asyncio.ensure_future(produce())
            with pytest.raises(Aborted, match="ZeroDivisionError: compute failed"):
                async with on.consumer.pull(on.peer, on.plan(push=False)) as pull:
                    wait = asyncio.ensure_future(anext(pull.layers()))
                    await gate.reached()
                    await turns()
                    assert not producer.done(), "its memory is still being read"
                    gate.release()
                    with pytest.raises(ZeroDivisionError):
                        await producer
                    await wait


async def test_an_offer_waits_until_all_is_read() -> None:
    async with request_between(push=False) as on:
        with on.faulty.hang() as gate:

            async def produce() -> None:
                async with offer(on) as offered:
                    offered.ready(*range(on.count))

            producer = asyncio.ensure_future(produce())
            async with on.consumer.pull(on.peer, on.plan(push=False)) as pull:
                await gate.reached()
                await turns()
                assert not producer.done()
                gate.release()
                assert [one async for one in pull.layers()] == list(range(on.count))
            await producer


async def test_an_offer_must_be_complete() -> None:
    async with request_between(push=False) as on:
        with pytest.raises(ConfigurationError, match=r"layers \[1, 2, 3, 4, 5\] were never ready"):
            async with offer(on) as offered:
                offered.ready(0)
        with pytest.raises(Aborted, match="never ready"):
            async for _ in on.consumer.pull(on.peer, on.plan(push=False)):
                pass


async def test_a_point_that_fails_ends_the_offer() -> None:
    async with request_between(push=False) as on, asyncio.timeout(10):
        broken = asyncio.get_running_loop().create_future()
        with pytest.raises(Aborted, match="waited for failed: RuntimeError: kernel"):
            async with offer(on) as offered:
                offered.ready(*range(on.count), after=broken)
                broken.set_exception(RuntimeError("kernel"))
                with pytest.raises(Aborted, match="kernel"):
                    async for _ in on.consumer.pull(on.peer, on.plan(push=False)):
                        pass
        assert broken.done()


async def test_a_failed_read_ends_the_pull_for_both() -> None:
    async with request_between(push=False) as on:
        with on.faulty.fail_next(TransferError("no such luck"), times=9), pytest.raises(Aborted, match="no such luck"):
            async with offer(on) as offered:
                offered.ready(*range(on.count))
                with pytest.raises(TransferError, match="no such luck"):
                    async for _ in on.consumer.pull(on.peer, on.plan(push=False)):
                        pass


async def test_what_is_there_already_is_not_read_again() -> None:
    async with request_between(push=False) as on:
        plan = on.plan(push=False)
        with pytest.raises(PeerLost):
            async with offer(on) as offered:
                offered.ready(*range(on.count))
                async with on.consumer.pull(on.peer, plan, window=2) as lost:
                    layers = lost.layers()
                    assert [await anext(layers), await anext(layers)] == [0, 1]
                    await on.producer.disconnect("c")
                    with pytest.raises(PeerLost):
                        async for _ in layers:
                            pass
        assert len(lost.arrived) in (2, 3)
        on.peer = await connect(on.consumer, on.producer)
        moved = on.faulty.copies + on.faulty.inline
        async with offer(on) as offered:
            offered.ready(*range(on.count))
            pull = on.consumer.pull(on.peer, on.plan(push=False), have=lost.arrived)
            async with pull:
                assert [one async for one in pull.layers()] == [one for one in range(on.count) if one not in lost.arrived]
        assert on.faulty.copies + on.faulty.inline - moved <= on.count - len(lost.arrived)
        on.check()


@pytest.mark.parametrize("late", [False, True])
async def test_who_has_everything_reads_nothing(late: bool) -> None:
    async with request_between(push=False) as on, asyncio.timeout(10):

        async def consume() -> None:
            async with on.consumer.pull(on.peer, on.plan(push=False), have=range(on.count)) as pull:
                assert [one async for one in pull.layers()] == []

        if late:
            await consume()
        async with offer(on) as offered:
            offered.ready(*range(on.count))
            if not late:
                await consume()
        assert on.empty(*range(on.count))


async def test_a_lost_consumer_ends_the_offer() -> None:
    async with request_between(push=False) as on, asyncio.timeout(10):
        with pytest.raises(PeerLost):
            async with offer(on) as offered:
                offered.ready(*range(on.count))
                await on.producer.disconnect("c")
        with pytest.raises(PeerLost, match="no peer is called 'c'"):
            async with offer(on):
                pass


async def test_closing_an_agent_ends_its_offers() -> None:
    async with request_between(push=False) as on, asyncio.timeout(10):
        offered = offer(on)
        await offered.__aenter__()
        async with on.consumer.pull(on.peer, on.plan(push=False)) as pull:
            await turns()
            await on.producer.aclose()
            with pytest.raises((Aborted, PeerLost)):
                await anext(pull.layers())
        with pytest.raises((ClosedError, PeerLost)):
            await offered.__aexit__(None, None, None)


async def test_wrong_uses_are_refused() -> None:
    async with request_between(push=False) as on:
        for count in (0, -1, 2.5):
            with pytest.raises(ConfigurationError, match="n_layers"):
                on.producer.offer("c", "r", count)  # type: ignore[arg-type]
        with pytest.raises(DescriptorError, match="layers 0 to 5"):
            on.consumer.pull(on.peer, on.plan(push=False), have=[6])
        with pytest.raises(ClosedError, match="begins with"):
            offer(on).ready(0)
        async with offer(on) as offered:
            with pytest.raises(DescriptorError, match="layers 0 to 5"):
                offered.ready(-1)
            with pytest.raises(ClosedError, match="used once"):
                await offered.__aenter__()
            with pytest.raises(Aborted, match="the offer has 6 layers, and the pull 1"):
                near, far = on.near, on.peer.region("kv")
                async for _ in on.consumer.pull(on.peer, LayerPlan("r", [(far, near)])):
                    pass
            offered.ready(*range(on.count))
            async with on.consumer.pull(on.peer, on.plan(push=False)) as pull:
                with pytest.raises(ClosedError, match="used once"):
                    await pull.__aenter__()
                with pytest.raises(Aborted, match="pulled already"):
                    async for _ in on.consumer.pull(on.peer, on.plan(push=False)):
                        pass
                assert [one async for one in pull.layers()] == list(range(on.count))
        with pytest.raises(Aborted, match="the offer is over"):
            async for _ in on.consumer.pull(on.peer, on.plan(push=False)):
                pass


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 30), count=st.integers(1, 12), window=st.one_of(st.none(), st.integers(1, 5)))
def test_whatever_the_order_every_layer_comes_once(seed: int, count: int, window: int | None) -> None:
    chance = random.Random(seed)

    async def run() -> None:
        async with request_between(count, push=False) as on:
            left = list(range(count))
            if window is None:
                chance.shuffle(left)
            used: Counter[int] = Counter()

            async def consume() -> None:
                async with on.consumer.pull(on.peer, on.plan(push=False), window=window) as pull:
                    async for layer in pull.layers(ordered=window is None):
                        on.check(layer)
                        used[layer] += 1
                        await turns(chance.randrange(4))

            async def produce() -> None:
                async with offer(on) as offered:
                    while left:
                        n = chance.randint(1, 4)
                        offered.ready(*left[:n])
                        del left[:n]
                        await turns(chance.randrange(4))

            async with asyncio.timeout(10), asyncio.TaskGroup() as group:
                for work in chance.sample([consume, produce], 2):
                    group.create_task(work())
            assert used == Counter(range(count))

    asyncio.run(run())
