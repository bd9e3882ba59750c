"""Pushes: layers arrive as they are ready, in groups, behind a window; each side may give up, be lost, come again."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from contextlib import AsyncExitStack

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nixl_async import (
    Aborted,
    Agent,
    ClosedError,
    ConfigurationError,
    CPUEvent,
    CPUStream,
    DescriptorError,
    Incoming,
    IntegrityError,
    LayerPlan,
    PeerLost,
    TransferError,
)
from nixl_async.backend import Op
from nixl_async.testing import assert_same, pattern
from tests.agents import TOKEN, AgentProcess, agent_process, connect
from tests.layers.pairs import LAYER_NBYTES, Request, request_between, turns, until


async def taken(incoming: Incoming, n: int | None = None) -> list[int]:
    """Take `n` layers, or all."""
    found: list[int] = []
    async with asyncio.timeout(10):
        async for layer in incoming.layers():
            found.append(layer)
            if len(found) == n:
                break
    return found


async def test_layers_arrive_one_by_one_and_are_used_in_order() -> None:
    async with request_between() as on:
        async with on.consumer.incoming("r", peer="p") as incoming, on.producer.push(on.peer, on.plan()) as push:
            layers = incoming.layers()
            for layer in range(on.count):
                assert on.empty(layer)
                push.ready(layer)
                assert await anext(layers) == layer
                on.check(layer)
            assert [one async for one in layers] == []
        on.check()
        assert push.landed == frozenset(range(on.count))
        assert incoming.complete


async def test_any_number_of_layers_goes_in_one_message() -> None:
    async with request_between() as on:
        async with on.consumer.incoming("r") as incoming, on.producer.push(on.peer, on.plan()) as push:
            await push.wanted()
            push.ready(4, 5)
            push.ready(0, 1, 2, 3)
            assert await taken(incoming) == [0, 1, 2, 3, 4, 5]
        on.check()
        assert on.faulty.copies + on.faulty.inline <= 2


async def test_who_wants_them_as_they_come_gets_them_so() -> None:
    async with request_between() as on, on.consumer.incoming("r") as incoming, on.producer.push(on.peer, on.plan()) as push:
        layers = incoming.layers(ordered=False)
        for layer in (3, 0, 5, 1, 4, 2):
            push.ready(layer)
            assert await anext(layers) == layer
        assert [one async for one in layers] == []


async def test_the_producer_may_come_first() -> None:
    async with request_between() as on, on.producer.push(on.peer, on.plan()) as push:
        push.ready(*range(on.count))
        await turns()
        assert on.empty(*range(on.count)), "nothing is written before the consumer takes part"
        async with on.consumer.incoming("r") as incoming:
            assert incoming.n_layers == on.count
            assert await taken(incoming) == list(range(on.count))


async def test_a_layer_goes_only_after_the_stream_has_computed_it() -> None:
    async with request_between(2) as on:
        gate = threading.Event()
        with CPUStream() as compute, CPUStream() as use:
            async with on.consumer.incoming("r") as incoming, on.producer.push(on.peer, on.plan()) as push:
                await push.wanted()
                seen: list[bool] = []
                incoming.wait_on(use, 1)
                use.launch(lambda: seen.append(not on.empty(1)))
                compute.launch(gate.wait)
                push.ready(1, after=compute)
                push.ready(0)
                assert await taken(incoming, 1) == [0]
                await turns()
                assert on.empty(1)
                gate.set()
                assert await taken(incoming) == [0, 1]
            use.synchronize()
            assert seen == [True]


async def test_what_a_stream_is_given_later_does_not_hold_a_layer_back() -> None:
    async with request_between(2) as on:
        gate = threading.Event()
        with CPUStream() as compute, CPUStream() as other:
            async with on.consumer.incoming("r") as incoming, on.producer.push(on.peer, on.plan()) as push:
                push.ready(0, after=[compute, other])
                compute.launch(gate.wait)
                push.ready(1, after=compute)
                try:
                    assert await taken(incoming, 1) == [0]
                    assert on.empty(1)
                finally:
                    gate.set()
                assert await taken(incoming) == [0, 1]


async def test_a_stream_goes_on_when_the_block_is_left() -> None:
    async with request_between(2) as on:
        with CPUStream() as use:
            async with on.consumer.incoming("r") as incoming:
                incoming.wait_on(use, 0)
            use.synchronize()


async def test_the_window_holds_the_producer_back() -> None:
    async with request_between(6) as on:
        async with on.consumer.incoming("r") as incoming, on.producer.push(on.peer, on.plan(), window=2) as push:
            push.ready(0)
            push.ready(1)
            push.ready(2)
            push.ready(3, 4, 5)
            layers = incoming.layers()
            assert await anext(layers) == 0
            await until(lambda: len(incoming.arrived) >= 2)
            await turns()
            assert set(incoming.arrived) == {0, 1}
            assert await anext(layers) == 1  # 0 has been used
            await until(lambda: len(incoming.arrived) >= 3)
            await turns()
            assert set(incoming.arrived) == {0, 1, 2}
            assert on.empty(3, 4, 5)
            # A group larger than the window goes alone.
            assert [one async for one in layers] == [2, 3, 4, 5]
        assert push.confirmed >= frozenset(range(3))


async def test_a_ring_of_buffers_is_never_overwritten_early() -> None:
    async with request_between(12) as on:
        ring = 3
        cut = on.near[0:LAYER_NBYTES]
        assert cut.nbytes == LAYER_NBYTES
        theirs = on.peer.region("kv")
        places = [
            (
                on.near[layer * LAYER_NBYTES : (layer + 1) * LAYER_NBYTES],
                theirs[layer % ring * LAYER_NBYTES : (layer % ring + 1) * LAYER_NBYTES],
            )
            for layer in range(12)
        ]
        async with (
            on.consumer.incoming("r") as incoming,
            on.producer.push(on.peer, LayerPlan("r", places), window=ring) as push,
        ):
            for layer in range(12):
                push.ready(layer)
            async for layer in incoming.layers():
                await turns()
                at = layer % ring * LAYER_NBYTES
                assert bytes(on.target[at : at + LAYER_NBYTES]) == bytes(
                    on.source[layer * LAYER_NBYTES : (layer + 1) * LAYER_NBYTES]
                )


async def test_the_producer_hears_what_is_in_place() -> None:
    async with request_between() as on, on.consumer.incoming("r"), on.producer.push(on.peer, on.plan()) as push:
        sent = push.sent()
        for layer in (1, 0, 5):
            push.ready(layer)
            assert await anext(sent) == layer
            on.check(layer)
        push.ready(2, 3, 4)
        assert [one async for one in sent] == [2, 3, 4]


async def test_who_waits_to_hear_what_is_in_place_hears_of_failure() -> None:
    async with request_between() as on, on.consumer.incoming("r"):
        with on.faulty.fail_next(TransferError("no such luck"), times=9):
            push = on.producer.push(on.peer, on.plan())
            await push.__aenter__()
            push.ready(0)
            with pytest.raises(TransferError, match="no such luck"):
                async for _ in push.sent():
                    pass
        with pytest.raises(TransferError, match="no such luck"):
            await push.__aexit__(None, None, None)


async def test_a_layer_that_was_never_ready_is_an_error_on_both_sides() -> None:
    async with request_between() as on, on.consumer.incoming("r") as incoming:
        with pytest.raises(ConfigurationError, match=r"layers \[2, 3, 4, 5\] were never ready"):
            async with on.producer.push(on.peer, on.plan()) as push:
                push.ready(0, 1)
                assert await taken(incoming, 1) == [0]
        with pytest.raises(Aborted, match="never ready"):
            await taken(incoming)


async def test_what_the_block_raises_is_raised_and_told() -> None:
    async with request_between() as on, on.consumer.incoming("r") as incoming:
        with pytest.raises(ZeroDivisionError):
            async with on.producer.push(on.peer, on.plan()):
                raise ZeroDivisionError("compute failed")
        with pytest.raises(Aborted, match="ZeroDivisionError: compute failed"):
            await taken(incoming)


async def test_a_failed_transfer_ends_the_push_for_both() -> None:
    async with request_between() as on, on.consumer.incoming("r") as incoming:
        with on.faulty.fail_next(TransferError("no such luck"), times=9):
            with pytest.raises(TransferError, match="no such luck"):
                async with on.producer.push(on.peer, on.plan()) as push:
                    push.ready(*range(on.count))
            with pytest.raises(TransferError, match="no such luck"):
                push.ready(0)
            with pytest.raises(Aborted, match="no such luck"):
                await taken(incoming)


async def test_a_layer_is_compared_before_the_other_side_hears_of_it() -> None:
    async with request_between() as on, on.consumer.incoming("r") as incoming:

        async def tear(op: Op) -> None:
            on.target[-1] ^= 1

        push = on.producer.push(on.peer, on.plan(), verify="crc32c")
        await push.__aenter__()
        push.ready(*range(on.count - 1))
        assert await taken(incoming, on.count - 1) == list(range(on.count - 1))
        with on.faulty.afterwards(tear):
            push.ready(on.count - 1)
            with pytest.raises(IntegrityError, match="1 of 1 pages differ"):
                await push.__aexit__(None, None, None)
        with pytest.raises(Aborted, match="IntegrityError"):
            await taken(incoming)


async def test_a_point_that_fails_ends_the_push() -> None:
    async with request_between() as on, on.consumer.incoming("r"):
        with pytest.raises(TransferError, match="waited for failed"):
            async with on.producer.push(on.peer, on.plan()) as push:
                broken = asyncio.get_running_loop().create_future()
                broken.set_exception(RuntimeError("kernel"))
                push.ready(*range(on.count), after=broken)


async def test_one_request_among_many_is_cancelled() -> None:
    async with request_between(4) as on:
        names = [f"r{i}" for i in range(8)]

        async def produce(name: str, hold: asyncio.Event) -> None:
            async with on.producer.push(on.peer, on.plan(name)) as push:
                for layer in range(on.count):
                    push.ready(layer)
                    await hold.wait()

        async def consume(name: str) -> list[int]:
            async with on.consumer.incoming(name) as incoming:
                return await taken(incoming)

        hold = asyncio.Event()
        producers = {name: asyncio.ensure_future(produce(name, hold)) for name in names}
        consumers = {name: asyncio.ensure_future(consume(name)) for name in names}
        await turns(50)
        consumers["r3"].cancel()
        with pytest.raises(asyncio.CancelledError):
            await consumers["r3"]
        hold.set()
        with pytest.raises(Aborted, match="gave up request 'r3'"):
            await producers["r3"]
        for name in names:
            if name != "r3":
                assert await consumers[name] == [0, 1, 2, 3]
                await producers[name]
        on.check()


async def test_a_consumer_that_leaves_waits_until_the_producer_is_quiet() -> None:
    async with request_between() as on:
        with on.faulty.hang(stubborn=True) as gate:
            consumer = asyncio.ensure_future(_enter_and_leave(on))
            push = on.producer.push(on.peer, on.plan())
            await push.__aenter__()
            push.ready(*range(on.count))
            await gate.reached()
            await turns()
            assert not consumer.done(), "bytes may still come: the consumer's memory is not free"
            gate.release()
            await consumer
        with pytest.raises(Aborted, match="its block was left"):
            await push.__aexit__(None, None, None)


async def _enter_and_leave(on: Request) -> None:
    async with on.consumer.incoming("r") as incoming:
        while incoming.n_layers is None:
            await asyncio.sleep(0)
        # Long enough for the copy to have begun.
        while not on.faulty.in_flight:
            await asyncio.sleep(0)


async def test_a_cancelled_push_is_quiet_when_its_block_is_left() -> None:
    async with request_between() as on, on.consumer.incoming("r") as incoming:
        with on.faulty.hang() as gate:

            async def produce() -> None:
                async with on.producer.push(on.peer, on.plan()) as push:
                    push.ready(*range(on.count))

            task = asyncio.ensure_future(produce())
            await gate.reached()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert on.faulty.in_flight == 0
        await turns()
        assert on.empty(*range(on.count))
        with pytest.raises(Aborted):
            await taken(incoming)


async def test_who_comes_after_the_consumer_gave_up_is_told() -> None:
    async with request_between() as on:
        with pytest.raises(KeyError):
            async with on.consumer.incoming("r"):
                raise KeyError("gone")
        with pytest.raises(Aborted, match="KeyError"):
            async with on.producer.push(on.peer, on.plan()) as push:
                push.ready(*range(on.count))


async def test_who_comes_after_all_has_arrived_need_not_send() -> None:
    async with request_between() as on:
        async with on.consumer.incoming("r") as incoming, on.producer.push(on.peer, on.plan()) as push:
            push.ready(*range(on.count))
            await taken(incoming)
        copies = on.faulty.copies + on.faulty.inline
        async with on.producer.push(on.peer, on.plan()) as again:
            assert await again.wanted() == frozenset()
            again.ready(0)
        assert on.faulty.copies + on.faulty.inline == copies


async def test_a_second_push_of_a_request_is_refused_while_the_first_runs() -> None:
    async with request_between() as on, on.consumer.incoming("r"):
        with pytest.raises(Aborted, match="received from 'p' already"):
            async with on.producer.push(on.peer, on.plan()) as first:
                await first.wanted()
                async with on.producer.push(on.peer, on.plan()) as second:
                    second.ready(*range(on.count))


async def test_a_lost_consumer_ends_the_push_and_its_successor_gets_all() -> None:
    async with request_between() as on:
        plan = on.plan()
        with on.faulty.hang() as gate, pytest.raises(PeerLost):
            async with on.producer.push(on.peer, plan) as push, on.consumer.incoming("r"):
                push.ready(*range(on.count))
                await gate.reached()
                await on.producer.disconnect("c")
        with pytest.raises(PeerLost, match="no peer is called 'c'"):
            async with on.producer.push("c", plan):
                pass
        on.peer = await connect(on.producer, on.consumer)
        async with on.consumer.incoming("r") as incoming, on.producer.push(on.peer, on.plan()) as push:
            push.ready(*range(on.count))
            assert await taken(incoming) == list(range(on.count))
        on.check()


async def test_a_request_goes_on_from_what_has_arrived_when_the_producer_comes_again() -> None:
    async with request_between() as on, on.consumer.incoming("r", peer="p") as incoming:
        with pytest.raises(PeerLost):
            async with on.producer.push(on.peer, on.plan()) as push:
                push.ready(0, 1, 2)
                assert await taken(incoming, 2) == [0, 1]
                await on.consumer.disconnect("p")
                with pytest.raises(PeerLost):
                    while True:
                        await taken(incoming)
                await push.wanted()
                push.ready(3)
                await asyncio.sleep(0)
        on.peer = await connect(on.producer, on.consumer)
        moved = on.faulty.copies + on.faulty.inline
        async with on.producer.push(on.peer, on.plan()) as push:
            assert await push.wanted() == {3, 4, 5}
            for layer in range(on.count):
                push.ready(layer)
            # What was used is not yielded again.
            assert await taken(incoming) == [3, 4, 5]
        assert on.faulty.copies + on.faulty.inline - moved <= 3
        on.check()


async def test_closing_an_agent_ends_its_pushes() -> None:
    async with request_between() as on, on.consumer.incoming("r") as incoming:
        push = on.producer.push(on.peer, on.plan())
        await push.__aenter__()
        await push.wanted()
        await on.producer.aclose()
        with pytest.raises((ClosedError, PeerLost)):
            await push.__aexit__(None, None, None)
        with pytest.raises((Aborted, PeerLost)):
            await taken(incoming)


async def test_closing_the_consumer_ends_its_iteration() -> None:
    async with (
        request_between() as on,
        on.consumer.incoming("r", peer="p") as incoming,
        on.consumer.incoming("other") as other,
    ):
        push = on.producer.push(on.peer, on.plan())
        await push.__aenter__()
        await push.wanted()
        waits = [asyncio.ensure_future(taken(one)) for one in (incoming, other)]
        await turns()
        await on.consumer.aclose()
        for wait in waits:
            with pytest.raises(ClosedError):
                await wait
        with pytest.raises((Aborted, PeerLost)):
            await push.__aexit__(None, None, None)


async def test_wrong_uses_are_refused() -> None:
    async with request_between() as on, on.consumer.incoming("r") as incoming:
        async with on.producer.push(on.peer, on.plan()) as push:
            with pytest.raises(DescriptorError, match="layers 0 to 5"):
                push.ready(6)
            await push.wanted()
            with pytest.raises(DescriptorError, match="layers 0 to 5"):
                incoming.wait_on(CPUEvent(), 6)
            with pytest.raises(TypeError, match="is not a stream"):
                incoming.wait_on(CPUEvent(), 5)
            with pytest.raises(ClosedError, match="used once"):
                await push.__aenter__()
            push.ready(*range(on.count))
        with pytest.raises(ClosedError, match="used once"):
            await incoming.__aenter__()
        with pytest.raises(ClosedError, match="begins with"):
            on.producer.push(on.peer, on.plan()).ready(0)
        for window in (0, -1, 1.5):
            with pytest.raises(ConfigurationError, match="window"):
                on.producer.push(on.peer, on.plan(), window=window)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="1 to 1024 bytes"):
            on.consumer.incoming("")
    with pytest.raises(ClosedError):
        on.producer.push(on.peer, on.plan())


async def test_layers_must_go_to_the_peer_of_the_push() -> None:
    async with request_between(2) as on:
        near = on.near
        plan = LayerPlan("wrong", [(near[0:8], near[8:16])])
        with pytest.raises(DescriptorError, match="dst of layer 0 of request 'wrong' is this agent's own memory"):
            async with on.consumer.incoming("wrong"), on.producer.push(on.peer, plan) as push:
                push.ready(0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 30), count=st.integers(1, 12), window=st.one_of(st.none(), st.integers(1, 5)))
def test_whatever_the_order_every_layer_comes_once(seed: int, count: int, window: int | None) -> None:
    chance = random.Random(seed)

    async def run() -> None:
        async with request_between(count) as on:
            left = list(range(count))
            if window is None:
                chance.shuffle(left)
            used: Counter[int] = Counter()

            async def consume() -> None:
                async with on.consumer.incoming("r") as incoming:
                    async for layer in incoming.layers(ordered=window is None):
                        on.check(layer)
                        used[layer] += 1
                        await turns(chance.randrange(4))

            async def produce() -> None:
                async with on.producer.push(on.peer, on.plan(), window=window) as push:
                    while left:
                        n = chance.randint(1, 4)
                        push.ready(*left[:n])
                        del left[:n]
                        await turns(chance.randrange(4))

            async with asyncio.timeout(10), asyncio.TaskGroup() as group:
                for work in chance.sample([consume, produce], 2):
                    group.create_task(work())
            assert used == Counter(range(count))

    asyncio.run(run())


# Between processes.


async def push_from(process: AgentProcess, agent: Agent, layers: list[int], count: int) -> list[int]:
    """Let a process push some layers of request "r" and hold it open; return what was wanted of it."""
    host, port = agent.address or ("", 0)
    assert (await process.order("connect", host=host, port=port))["peer"] == agent.name
    order = {"peer": agent.name, "request": "r", "count": count, "nbytes": LAYER_NBYTES, "region": "kv", "ready": layers}
    wanted: list[int] = (await process.order("push", **order))["wanted"]
    return wanted


async def test_a_killed_producer_is_lost_and_the_next_one_goes_on() -> None:
    count = 8
    target = np.zeros(count * LAYER_NBYTES, np.uint8)
    async with Agent("c", token=TOKEN) as consumer, AsyncExitStack() as stack:
        await consumer.register(target, name="kv")
        await consumer.serve("127.0.0.1", 0)
        async with consumer.incoming("r") as incoming:
            first = await stack.enter_async_context(agent_process("p1", nbytes=target.nbytes, seed=3))
            assert await push_from(first, consumer, [0, 1, 2], count) == list(range(count))
            assert await taken(incoming, 3) == [0, 1, 2]
            first.kill()
            with pytest.raises(PeerLost):
                async for layer in incoming.layers():
                    assert layer == 2
            second = await stack.enter_async_context(agent_process("p2", nbytes=target.nbytes, seed=3))
            assert await push_from(second, consumer, list(range(3, count)), count) == list(range(3, count))
            assert await taken(incoming) == list(range(3, count))
            assert_same(target, pattern(target.nbytes, 3))
