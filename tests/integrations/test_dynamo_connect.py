"""Dynamo's `nixl_connect` as this library has it: both sides of each operation, their ends, their failures, what they keep."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from nixl_async import (
    Aborted,
    Agent,
    AuthenticationError,
    ClosedError,
    NotFoundError,
    PeerLost,
    ProtocolError,
    RegistrationError,
)
from nixl_async.integrations import dynamo_connect as nixl_connect
from nixl_async.integrations.dynamo_connect import Connector, Descriptor, Device, DeviceKind, OperationKind, OperationStatus
from nixl_async.integrations.dynamo_connect.endpoint import read_metadata
from nixl_async.testing import pattern
from tests.agents import ROOT

NBYTES = 1 << 20
LARGE_NBYTES = 64 << 20
BACKENDS = ("memory", "samehost", "tcp")


@asynccontextmanager
async def workers(**options: Any) -> AsyncIterator[tuple[Connector, Connector]]:
    """Open two connectors in this process."""
    options = {"backends": BACKENDS, "host": "127.0.0.1", **options}
    async with Connector("near", **options) as near, Connector("far", **options) as far:
        yield near, far


def filled(seed: int = 1, nbytes: int = NBYTES) -> np.ndarray[Any, Any]:
    return np.frombuffer(pattern(nbytes, seed), np.uint8).copy()


def empty(nbytes: int = NBYTES) -> np.ndarray[Any, Any]:
    return np.zeros(nbytes, np.uint8)


def of(array: np.ndarray[Any, Any]) -> Descriptor:
    return Descriptor((array, "cpu"))


def endpoint(connector: Connector) -> Any:
    connection = connector._shared_connection
    assert connection is not None
    return connection._endpoint


def n_regions(connector: Connector) -> int:
    return int(endpoint(connector).agent.statistics().regions)


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_read_and_a_write_complete_on_both_sides() -> None:
    async with workers() as (near, far):
        theirs, ours = filled(), empty()
        async with await far.create_readable(of(theirs)) as readable:
            assert readable.status is OperationStatus.INITIALIZED
            metadata = readable.metadata()
            async with await near.begin_read(metadata, of(ours)) as read:
                await read.wait_for_completion()
                assert read.status is OperationStatus.COMPLETE
                assert [one.ptr for one in read.results()] == [ours.ctypes.data]
            async with asyncio.timeout(10):
                await readable.wait_for_completion()
            assert readable.status is OperationStatus.COMPLETE
        assert (ours == theirs).all()
        target = empty()
        async with await far.create_writable(of(target)) as writable:
            await (await near.begin_write(of(theirs), writable.metadata()))
            async with asyncio.timeout(10):
                assert [one.ptr for one in await writable] == [target.ctypes.data]
        assert (target == theirs).all()


async def test_bytes_move_when_an_operation_is_begun_and_nobody_waits_for_it() -> None:
    async with workers() as (near, far):
        theirs, ours = filled(), empty()
        readable = await far.create_readable(of(theirs))
        read = await near.begin_read(readable.metadata(), of(ours))
        async with asyncio.timeout(10):
            await readable
        assert (ours == theirs).all()
        assert read.status is OperationStatus.COMPLETE


async def test_many_descriptors_go_in_one_operation() -> None:
    async with workers() as (near, far):
        theirs, ours = [filled(i, 1000 + i) for i in range(5)], [empty(1000 + i) for i in range(5)]
        readable = await far.create_readable([of(one) for one in theirs])
        metadata = nixl_connect.RdmaMetadata.model_validate_json(readable.metadata().model_dump_json())
        assert len(metadata.descriptors) == 5
        read = await near.begin_read(metadata, [of(one) for one in ours])
        assert len(await read) == 5
        assert all((one == other).all() for one, other in zip(ours, theirs, strict=True))
        await readable


async def test_all_that_descriptors_are_made_of() -> None:
    async with workers() as (near, far):
        source, buffer, raw = b"seven bytes and more", bytearray(20), empty(20)
        for target, given in (
            (buffer, buffer),
            (raw, (raw.ctypes.data, 20, Device("host"), raw)),
            (raw, (raw.ctypes.data, 20)),
            (raw, (raw, Device((DeviceKind.HOST, 0)))),
        ):
            target[:] = bytes(20) if target is buffer else 0
            readable = await far.create_readable(Descriptor(source))
            await (await near.begin_read(readable.metadata(), Descriptor(given)))
            assert bytes(target) == source
            await readable


async def test_a_tensor_is_known_by_what_it_offers() -> None:
    class Tensor:
        """As much of a torch tensor as counts; torch itself is tried where it is installed (tests/upstream)."""

        def __init__(self, array: np.ndarray[Any, Any], contiguous: bool = True) -> None:
            self.array, self.contiguous_ = array, contiguous
            self.device = type("device", (), {"type": "cpu", "index": None})()

        def data_ptr(self) -> int:
            return int(self.array.ctypes.data)

        def numel(self) -> int:
            return self.array.size

        def element_size(self) -> int:
            return self.array.itemsize

        def is_contiguous(self) -> bool:
            return self.contiguous_

        def contiguous(self) -> Tensor:
            return Tensor(self.array.copy())

    async with workers() as (near, far):
        theirs, ours = filled(), empty()
        readable = await far.create_readable(Descriptor(Tensor(theirs, contiguous=False)))
        await (await near.begin_read(readable.metadata(), Descriptor(Tensor(ours))))
        assert (ours == theirs).all()
        await readable


async def test_a_passive_operation_that_is_late_fails_and_its_memory_is_withdrawn() -> None:
    async with workers(timeout=0.05) as (near, far):
        # Connected before, as well as not.
        first = await far.create_readable(of(filled()), timeout=10)
        await (await near.begin_read(first.metadata(), of(empty())))
        await first
        target = empty()
        writable = await far.create_writable(of(target))
        metadata = writable.metadata()
        with pytest.raises(TimeoutError, match="within 0.05 s") as raised:
            await writable.wait_for_completion()
        assert isinstance(raised.value, nixl_connect.OperationTimeout)
        assert writable.status is OperationStatus.ERRORED
        with pytest.raises(NotFoundError, match="withdrawn"):
            await near.begin_write(of(filled()), metadata)
        async with Connector("other", backends=BACKENDS, host="127.0.0.1") as other:
            with pytest.raises(NotFoundError, match="withdrawn"):
                await other.begin_write(of(filled()), metadata)
        assert not target.any()
        assert not endpoint(far).exposures


async def test_a_timeout_of_the_caller_leaves_a_passive_operation_as_it_is() -> None:
    async with workers() as (near, far):
        theirs, ours = filled(), empty()
        readable = await far.create_readable(of(theirs))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await readable.wait_for_completion()
        assert readable.status is OperationStatus.INITIALIZED
        await (await near.begin_read(readable.metadata(), of(ours)))
        await readable
        assert (ours == theirs).all()


async def test_leaving_the_block_withdraws_what_nobody_read() -> None:
    async with workers() as (near, far):
        descriptor = of(filled())
        async with await far.create_readable(descriptor) as readable:
            metadata = readable.metadata()
        assert readable.status is OperationStatus.CANCELLED
        assert n_regions(far) == 0
        with pytest.raises(NotFoundError):
            await near.begin_read(metadata, of(empty()))
        with pytest.raises(asyncio.CancelledError):
            await readable
        await readable.wait_for_completion()
        # The descriptor is as good as new.
        again = await far.create_readable(descriptor)
        ours = empty()
        await (await near.begin_read(again.metadata(), of(ours)))
        await again
        assert ours.any()


async def test_a_cancelled_read_is_quiet_and_the_passive_side_hears_of_it() -> None:
    async with workers() as (near, far):
        theirs, ours = empty(LARGE_NBYTES), empty(LARGE_NBYTES)
        theirs[:] = 1
        readable = await far.create_readable(of(theirs))
        read = await near.begin_read(readable.metadata(), of(ours))
        read.cancel()
        await read.wait_for_completion()
        assert read.status is OperationStatus.CANCELLED
        ours[:] = 2
        with pytest.raises(Aborted, match="it was cancelled"):
            async with asyncio.timeout(10):
                await readable
        assert readable.status is OperationStatus.ERRORED
        assert (ours == 2).all()
        with pytest.raises(nixl_connect.OperationError, match="CANCELLED"):
            read.results()


async def test_cancelling_who_waits_cancels_the_transfer() -> None:
    async with workers() as (near, far):
        theirs, ours = empty(LARGE_NBYTES), empty(LARGE_NBYTES)
        theirs[:] = 1
        readable = await far.create_readable(of(theirs))
        read = await near.begin_read(readable.metadata(), of(ours))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await read
        assert read.status is OperationStatus.CANCELLED
        ours[:] = 2
        with pytest.raises(Aborted):
            await readable
        assert (ours == 2).all()


CHILD = """
import asyncio, json, sys
from nixl_async import Agent
from nixl_async.integrations.dynamo_connect import Connector, Descriptor, RdmaMetadata
from nixl_async.integrations.dynamo_connect.endpoint import read_metadata

async def begin_and_never_end(metadata):
    known = read_metadata(metadata.nixl_metadata)
    async with Agent("child", backends=["memory", "samehost", "tcp"], token=known.blob.token) as agent:
        peer = await agent.add_peer(known.blob.raw)
        await agent.notify(peer, b"begin " + metadata.notification_key.encode())
        print("begun", flush=True)
        await asyncio.get_running_loop().create_future()

async def expose():
    memory = bytearray(1 << 20)
    connector = Connector("child", backends=["memory", "samehost", "tcp"], host="127.0.0.1")
    writable = await connector.create_writable(Descriptor(memory))
    print(writable.metadata().model_dump_json(), flush=True)
    await writable
    print(bytes(memory[:4]).hex(), flush=True)

asyncio.run(expose() if sys.argv[1] == "expose" else begin_and_never_end(RdmaMetadata.model_validate_json(sys.argv[2])))
"""


@asynccontextmanager
async def child(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=ROOT
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(60):
        return (await process.stdout.readline()).decode().strip()


async def test_the_death_of_who_began_it_fails_a_passive_operation() -> None:
    async with Connector("near", backends=BACKENDS, host="127.0.0.1") as near:
        readable = await near.create_readable(of(filled()))
        async with child("begin", readable.metadata().model_dump_json()) as process:
            assert await line(process) == "begun"
            await until(lambda: readable.status is OperationStatus.IN_PROGRESS)
            process.kill()
            with pytest.raises(PeerLost, match="'child' is gone"):
                async with asyncio.timeout(2):
                    await readable
        assert readable.status is OperationStatus.ERRORED
        assert n_regions(near) == 0


async def test_a_dead_worker_cannot_be_written_to_and_a_live_one_ends_without_closing() -> None:
    async with Connector("near", backends=BACKENDS, host="127.0.0.1") as near:
        async with child("expose") as process:
            metadata = nixl_connect.RdmaMetadata.model_validate_json(await line(process))
            await (await near.begin_write(of(filled()), metadata))
            assert await line(process) == filled()[:4].tobytes().hex()
            # It did not close its connector.
            _, complaints = await process.communicate()
            assert process.returncode == 0, complaints
            assert not complaints
        async with child("expose") as process:
            metadata = nixl_connect.RdmaMetadata.model_validate_json(await line(process))
            process.kill()
            await process.wait()
            with pytest.raises(PeerLost):
                async with asyncio.timeout(10):
                    await near.begin_write(of(filled()), metadata)


async def test_a_registration_lives_as_long_as_a_descriptor_of_its_bytes() -> None:
    async with workers() as (near, far):
        theirs, ours = filled(), empty()
        far_descriptor, near_descriptor = of(theirs), of(ours)
        names, strings = set(), set()
        for _ in range(3):
            readable = await far.create_readable(far_descriptor)
            strings.add(readable.metadata().nixl_metadata)
            await (await near.begin_read(readable.metadata(), near_descriptor))
            await readable
            names.add(*endpoint(far).agent._membership.regions)
        assert len(names) == len(strings) == 1
        twin = of(theirs)
        readable = await far.create_readable(twin)
        assert n_regions(far) == 1
        await (await near.begin_read(readable.metadata(), near_descriptor))
        await readable
        del far_descriptor, readable
        gc.collect()
        await asyncio.sleep(0)
        assert n_regions(far) == 1
        del twin
        gc.collect()
        await until(lambda: n_regions(far) == 0)
        near_descriptor.deregister_with_connector(near_descriptor._connection)
        assert not near_descriptor.is_registered
        await until(lambda: n_regions(near) == 0)


async def test_a_passive_operation_that_nobody_holds_is_given_up() -> None:
    async with workers() as (_, far):
        readable = await far.create_readable(of(filled()))
        assert len(endpoint(far).exposures) == 1
        del readable
        gc.collect()
        await until(lambda: not endpoint(far).exposures and n_regions(far) == 0)


async def test_two_operations_on_one_descriptor_end_on_their_own() -> None:
    async with workers() as (near, far):
        descriptor = of(filled())
        late = await far.create_readable(descriptor, timeout=0.02)
        other = await far.create_readable(descriptor)
        with pytest.raises(nixl_connect.OperationTimeout):
            await late
        ours = empty()
        await (await near.begin_read(other.metadata(), of(ours)))
        await other
        assert ours.any()


async def test_dynamos_own_pool_of_descriptors_made_outside_the_loop() -> None:
    """It makes the connection in a short-lived loop, registers without one, and later narrows what it registered."""
    far = Connector("far", backends=BACKENDS, host="127.0.0.1")
    pool = empty()
    descriptor = of(pool)

    def make() -> None:
        connection = asyncio.run(far._create_connection())
        descriptor.register_with_connector(connection)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert descriptor.is_registered
    async with Connector("near", backends=BACKENDS, host="127.0.0.1") as near:
        for nbytes in (1000, 10):
            theirs = filled(nbytes, nbytes)
            readable = await near.create_readable(of(theirs))
            full, descriptor._data_size = descriptor._data_size, nbytes
            await (await far.begin_read(readable.metadata(), descriptor)).wait_for_completion()
            descriptor._data_size = full
            assert (pool[:nbytes] == theirs).all()
            await readable
            assert n_regions(far) == 1
    await far.aclose()


async def test_a_connector_serves_one_loop_at_a_time() -> None:
    connector = Connector("mover", backends=BACKENDS, host="127.0.0.1")
    descriptor = of(filled())

    async def once() -> bytes:
        readable = await connector.create_readable(descriptor)
        readable.cancel()
        await readable._quiet()
        assert connector._shared_connection is not None
        return connector._shared_connection.metadata

    def elsewhere(answer: list[Any]) -> None:
        try:
            answer.append(asyncio.run(once()))
        except nixl_connect.OperationError as error:
            answer.append(error)
        except ValueError as error:
            answer.append(str(error))

    await once()
    answers: list[Any] = []
    await asyncio.to_thread(elsewhere, answers)
    assert "another event loop" in answers[0]
    await connector.aclose()


async def test_the_metadata_is_dynamos() -> None:
    async with workers() as (near, far):
        theirs, ours = filled(), empty()
        readable = await far.create_readable(of(theirs))
        metadata = readable.metadata()
        assert set(metadata.model_dump()) == {"descriptors", "nixl_metadata", "notification_key", "operation_kind"}
        assert metadata.descriptors[0].model_dump() == {"device": "cpu", "ptr": theirs.ctypes.data, "size": NBYTES}
        assert metadata.nixl_metadata.startswith("b64:")
        assert metadata.operation_kind == OperationKind.READ
        assert readable.metadata() is metadata
        old = readable.metadata(hex_encode=True)
        assert bytes.fromhex(old.nixl_metadata)
        assert read_metadata(old.nixl_metadata).name == "far-1"
        await (await near.begin_read(old, of(ours)))
        await readable
        assert (ours == theirs).all()
        remote = nixl_connect.Remote(read_of(near), metadata.nixl_metadata)
        assert (remote.name, str(remote)) == ("far-1", "far-1")
        with nixl_connect.Remote(read_of(near), read_of(far).metadata) as other:
            assert other.name == "far-1"
        assert read_of(near).release_remote_ref("far-1")
        assert not read_of(near).release_remote_ref("far-1")


def read_of(connector: Connector) -> Any:
    return connector._shared_connection


async def test_a_secret_that_both_sides_have_is_not_in_the_metadata() -> None:
    async with workers(token="a secret that both know") as (near, far):
        readable = await far.create_readable(of(filled()))
        assert read_metadata(readable.metadata().nixl_metadata).blob.token is None
        await (await near.begin_read(readable.metadata(), of(empty())))
        await readable
        again = await far.create_readable(of(filled()))
        async with Connector("stranger", token="a guess", backends=BACKENDS, host="127.0.0.1") as stranger:
            with pytest.raises(AuthenticationError):
                await stranger.begin_read(again.metadata(), of(empty()))


async def test_what_does_not_fit_is_refused_before_anything_moves() -> None:
    async with workers() as (near, far):
        readable = await far.create_readable(of(filled()))
        metadata = readable.metadata()
        with pytest.raises(ValueError, match="1000 bytes, its remote one 1048576"):
            await near.begin_read(metadata, of(empty(1000)))
        with pytest.raises(ValueError, match="2 local and 1 remote"):
            await near.begin_read(metadata, [of(empty()), of(empty())])
        with pytest.raises(RuntimeError, match="not of a writable operation"):
            await near.begin_write(of(empty()), metadata)
        with pytest.raises(TypeError, match="RdmaMetadata"):
            await near.begin_read(metadata.model_dump(), of(empty()))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="list of them"):
            await near.create_readable(filled())  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="empty list"):
            await near.create_readable([])
        with pytest.raises(ProtocolError, match="nixl_metadata"):
            await near.begin_read(metadata.model_copy(update={"nixl_metadata": "b64:AAAA"}), of(empty()))
        elsewhere = metadata.descriptors[0].model_copy(update={"ptr": 4096})
        with pytest.raises(ValueError, match="no region with the 1048576 bytes at 0x1000"):
            await near.begin_read(metadata.model_copy(update={"descriptors": [elsewhere]}), of(empty()))
        with pytest.raises(RuntimeError, match="read-only"):
            await near.create_writable(Descriptor(b"constant"))
        with pytest.raises(ValueError, match="read-only"):
            await near.begin_read(metadata, Descriptor(bytes(NBYTES)))
        with pytest.raises(RegistrationError, match="no bytes"):
            await near.create_readable(Descriptor(b""))
        with pytest.raises(ValueError, match="address 0"):
            await near.create_readable(Descriptor((0, 10)))
        with pytest.raises(ValueError, match="XPU"):
            await near.create_readable(Descriptor((4096, 10, "xpu:1")))
        bound = of(empty())
        bound.register_with_connector(read_of(near))
        with pytest.raises(RuntimeError, match="belongs to connection near-1"):
            await far.create_readable(bound)
        with pytest.raises(RuntimeError, match="not to far-1"):
            bound.deregister_with_connector(read_of(far))
        assert len(endpoint(far).exposures) == 1
        assert not endpoint(near).exposures
        await (await near.begin_read(metadata, bound))
        await readable


@pytest.mark.parametrize(
    ("name", "text", "kind", "number"),
    [
        ("cpu", "cpu", DeviceKind.HOST, 0),
        (" HOST", "cpu", DeviceKind.HOST, 0),
        ("gpu", "cuda:0", DeviceKind.CUDA, 0),
        ("cuda:3", "cuda:3", DeviceKind.CUDA, 3),
        ("xpu:1", "xpu:1", DeviceKind.XPU, 1),
        ((DeviceKind.CUDA, 2), "cuda:2", DeviceKind.CUDA, 2),
    ],
)
def test_devices_are_read(name: Any, text: str, kind: DeviceKind, number: int) -> None:
    device = Device(name)
    assert (str(device), device.kind, device.id) == (text, kind, number)
    assert device.kind.nixl_mem_type == ("DRAM" if kind is DeviceKind.HOST else "VRAM")
    assert Device(text) == device
    assert hash(Device(text)) == hash(device)


def test_what_is_no_device_or_data_is_refused() -> None:
    for wrong in ("tpu", "cuda:x", "cuda:-1", ""):
        with pytest.raises(ValueError, match="none of"):
            Device(wrong)
    for nothing in (Device, Descriptor):
        with pytest.raises(ValueError, match="None"):
            nothing(None)  # type: ignore[arg-type]
    for thing in (7, [1, 2], (1,), ("a", "b"), (1, 2, 3)):
        with pytest.raises(TypeError):
            Descriptor(thing)
    with pytest.raises(ValueError, match="contiguous"):
        of(empty().reshape(1024, 1024)[:, :10])
    for fields in ({"ptr": 0}, {"ptr": -5}, {"size": -1}, {"device": "tpu"}, {"extra": 1}):
        with pytest.raises(ValidationError):
            nixl_connect.SerializedDescriptor(**{"ptr": 1, "size": 1, **fields})
    for kind in (0, 3):
        with pytest.raises(ValidationError):
            nixl_connect.RdmaMetadata(operation_kind=kind)
    with pytest.raises(ValueError, match="no descriptors"):
        nixl_connect.RdmaMetadata(operation_kind=1).to_descriptors()
    for worker in ("", 7):
        with pytest.raises(TypeError):
            Connector(worker)  # type: ignore[arg-type]


async def test_closing_ends_what_is_under_way() -> None:
    async with workers() as (near, far):
        readable = await far.create_readable(of(filled()))
        await far.aclose()
        with pytest.raises(ClosedError):
            await readable
        again = await far.create_readable(of(filled()))
        ours = empty()
        await (await near.begin_read(again.metadata(), of(ours)))
        await again
        assert ours.any()


async def test_the_ordinary_with_block_gives_up_in_the_background() -> None:
    async with workers() as (near, far):
        with await far.create_readable(of(filled())) as readable:
            pass
        await readable._quiet()
        assert readable.status is OperationStatus.CANCELLED
        with (
            await far.create_readable(of(filled())) as readable,
            await near.begin_read(readable.metadata(), of(empty())) as read,
        ):
            await read.wait_for_completion()
            await readable.wait_for_completion()
        assert (read.status, readable.status) == (OperationStatus.COMPLETE,) * 2


def test_without_pydantic_the_module_says_what_is_missing() -> None:
    program = (
        "import sys; sys.modules['pydantic'] = None\n"
        "try:\n    import nixl_async.integrations.dynamo_connect\n"
        "except ImportError as error:\n    print(type(error).__name__, error)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.startswith("MissingDependency dynamo_connect needs pydantic")


def test_a_worker_that_never_closes_ends_quietly() -> None:
    program = (
        "import asyncio, json\n"
        "from nixl_async.integrations.dynamo_connect import Connector, Descriptor\n"
        "connector = Connector('lazy', host='127.0.0.1')\n"
        "async def main():\n"
        "    readable = await connector.create_readable(Descriptor(bytearray(100)))\n"
        "    print(json.dumps(readable.metadata().model_dump())[:14])\n"
        "asyncio.run(main())"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60)
    assert ran.stdout.strip() == json.dumps({"descriptors": []})[:14]
    assert not ran.stderr


async def test_an_agent_of_this_library_reads_the_same_metadata() -> None:
    async with Connector("far", backends=BACKENDS, host="127.0.0.1") as far:
        theirs, ours = filled(), empty()
        readable = await far.create_readable(of(theirs))
        known = read_metadata(readable.metadata().nixl_metadata)
        async with Agent("plain", backends=BACKENDS, token=known.blob.token) as agent:
            peer = await agent.add_peer(known.blob.raw)
            region = await agent.register(ours)
            one = readable.metadata().descriptors[0]
            await agent.transfer(peer.at(one.ptr, one.size), region[:], notify=readable.metadata().notification_key.encode())
            await readable
        assert (ours == theirs).all()
