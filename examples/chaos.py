"""Transfers go on while decode processes are killed, stopped and cut off; every byte is checked.

    python examples/chaos.py [--seconds 8] [--seed 1]

One prefill process writes random pages to three decode processes over TCP, reads them back and compares. Meanwhile something is
broken twice a second. A transfer may then end well though a connection of it was reset, as its pieces are sent again; it may wait
while its peer is stopped; or fail with `PeerLost`, whereupon the program connects again and repeats it. That a byte is wrong, or
anything hangs, must not happen. The means are those of `nixl_async.testing`: break your own program with them.
"""

import argparse
import asyncio
import itertools
import json
import logging
import random
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process, create_subprocess_exec
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass

import numpy as np

from nixl_async import Agent, TransferError, load_backend
from nixl_async.testing.faults import reset_connections
from nixl_async.testing.network import Network, network

PAGE, N = 16_384, 512
PAUSE_SECONDS, STOP_SECONDS, PATIENCE_SECONDS = 0.5, 0.3, 10


async def decode(name: str) -> None:
    """Be a decode process: it has memory and serves, and does nothing."""
    tcp = load_backend("tcp")
    async with Agent(name, token="secret", backends=[tcp]) as agent:
        await agent.register(np.zeros(N * PAGE, np.uint8), name="kv")
        _, port = await agent.serve("127.0.0.1", 0)
        print(json.dumps([port, json.loads(tcp.describe())["at"][0][1]]), flush=True)
        await asyncio.to_thread(sys.stdin.read)


@dataclass(eq=False)
class Victim:
    """A decode process, and the piece of network through which the prefill process has its control connection to it."""

    name: str
    control: Network
    process: Process | None = None
    data_port: int = 0
    done: int = 0
    enough: float = float("inf")


async def start(victim: Victim) -> None:
    victim.process = await create_subprocess_exec(sys.executable, __file__, "--decode", victim.name, stdin=PIPE, stdout=PIPE)
    victim.control.to_port, victim.data_port = json.loads(await victim.process.stdout.readline())


async def kill(victim: Victim) -> None:
    if victim.process.returncode is None:
        victim.process.kill()
    await victim.process.wait()


async def kill_and_start_again(victim: Victim) -> None:
    await kill(victim)
    await start(victim)


async def stop_for_a_moment(victim: Victim) -> None:
    victim.process.send_signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(STOP_SECONDS)
    finally:
        victim.process.send_signal(signal.SIGCONT)


async def reset_data_connections(victim: Victim) -> None:
    reset_connections(victim.data_port)


async def cut_control_connection(victim: Victim) -> None:
    victim.control.hold()
    victim.control.reset_clients()
    await victim.control.release()


async def keep_moving(agent: Agent, victim: Victim, errors: Counter[str]) -> None:
    """Write pages, read them back and compare, until it is enough."""
    sent, back, dice = np.zeros(N * PAGE, np.uint8), np.zeros(N * PAGE, np.uint8), np.random.default_rng()
    ours, mirror = await agent.register(sent), await agent.register(back)
    while victim.done < victim.enough:
        sent[:], pages = dice.integers(0, 256, N * PAGE, np.uint8), dice.permutation(N)
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                theirs = (await agent.connect(("127.0.0.1", victim.control.port))).region("kv")
                await agent.transfer(ours[:], theirs.pages(pages, PAGE))
                await agent.transfer(theirs.pages(pages, PAGE), mirror[:])
        except TransferError as error:
            errors[type(error).__name__] += 1
            await asyncio.sleep(0.02)
        else:
            assert np.array_equal(sent, back), f"{victim.name}: {np.count_nonzero(sent != back)} bytes are wrong"
            victim.done += 1


async def main(seconds: float, seed: int) -> None:
    deeds = [kill_and_start_again, stop_for_a_moment, reset_data_connections, cut_control_connection]
    chance, errors = random.Random(seed), Counter[str]()
    async with AsyncExitStack() as stack:
        agent = await stack.enter_async_context(Agent("prefill", token="secret", backends=["tcp"]))
        victims = [Victim(f"decode-{i}", await stack.enter_async_context(network(0))) for i in range(3)]
        for victim in victims:
            await start(victim)
            stack.push_async_callback(kill, victim)
        begun = time.monotonic()
        async with asyncio.timeout(seconds + 3 * PATIENCE_SECONDS), asyncio.TaskGroup() as group:
            for victim in victims:
                group.create_task(keep_moving(agent, victim, errors))
            for deed in itertools.cycle(chance.sample(deeds, len(deeds))):
                await asyncio.sleep(PAUSE_SECONDS)
                if (at := time.monotonic() - begun) > seconds:
                    break
                victim = chance.choice(victims)
                print(f"{at:5.1f} s  {victim.name}: {deed.__name__.replace('_', ' ')}; {victim.done} rounds done", flush=True)
                await deed(victim)
            # Whatever happened, each of them works again.
            for victim in victims:
                victim.enough = victim.done + 2
        counts = agent.statistics()
    rounds = sum(victim.done for victim in victims)
    print(f"{rounds} rounds of {2 * N} pages, every byte checked; {counts.routes_lost} routes lost")
    print(f"failed and repeated by the program: {dict(errors)}; by the library: {counts.retries + counts.failovers}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=8, help="how long to break things")
    parser.add_argument("--seed", type=int, default=1, help="what is broken, and when")
    parser.add_argument("--decode", help=argparse.SUPPRESS)
    given = parser.parse_args()
    logging.getLogger("nixl_async").setLevel(logging.ERROR)  # lost peers are no news here
    try:
        asyncio.run(decode(given.decode) if given.decode else main(given.seconds, given.seed))
    except KeyboardInterrupt:
        sys.exit(130)
