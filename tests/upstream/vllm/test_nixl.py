"""vLLM's own users of NIXL, unmodified, in two processes, where `import nixl` means this library."""

import multiprocessing
import socket
import time

import nixl
import numpy as np
import pytest
from test_connector import PREFILL, prompt


def test_nixl_is_this_library():
    assert "nixl_async" in nixl.__file__


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def side_channel():
    return {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": free_port()}


@pytest.mark.parametrize("connector", ["NixlConnector", "NixlPushConnector"])
def test_nixl_connector(start, connector):
    own = {"connector": connector, "module": None, "block": 32}
    prefill = start("prefill", "kv_producer", **own, environment=side_channel())
    decode = start("decode", "kv_consumer", **own, environment=side_channel())
    for n, length in enumerate((20, 64, 100, 300)):
        prefill.call("add", f"r{n}", prompt(n, length), PREFILL)
        _, params = prefill.finished(f"r{n}")
        # The push connector finds a request by its name, which is the same on both sides.
        decode.call("add", f"r{n}", prompt(n, length), params, 3)
        # The decode engine's passes compare every byte; the notification frees the blocks here.
        assert decode.finished(f"r{n}")[0] == "length"
        prefill.sent(f"r{n}")
    for engine in (prefill, decode):
        engine.until(lambda state: not state["used"] and not state["requests"])
    stats = [one for engine in (prefill, decode) for one in engine.call("take_stats")]
    seconds = [value for one in stats for value in one["transfer_duration"]]
    nbytes = [value for one in stats for value in one["bytes_transferred"]]
    assert len(seconds) == 4
    assert all(value > 0 for value in seconds)
    block = 32 * 4 * 16 * 2 * 4
    assert nbytes == [block * count for count in (1, 2, 4, 10)]
    print(f"{connector}: 4 requests, {sum(nbytes)} bytes, {1e3 * min(seconds):.2f} to {1e3 * max(seconds):.2f} ms each")


# The data planes of the peer-to-peer tier and of the connector for encoder outputs.

BLOCKS, NBYTES = 64, 4096


def pattern(seed):
    return np.random.default_rng(seed).integers(0, 256, (BLOCKS, NBYTES), np.uint8)


def tier_peer(connection):
    from vllm.v1.kv_offload.tiering.p2p.data.nixl import NixlTransport

    memory = np.zeros((BLOCKS, NBYTES), np.uint8)
    transport = NixlTransport("peer", memoryview(memory))
    connection.send((transport.get_agent_metadata(), transport.base_addr))
    while (wanted := connection.recv()) is not None:
        connection.send(memory[wanted].tobytes())
    transport.close()


def encoder_peer(connection):
    from vllm.distributed.ec_transfer.ec_connector.cpu.data.nixl import NixlDataTransport

    memory = pattern(2)
    transport = NixlDataTransport("encoder", memory.ctypes.data, BLOCKS, NBYTES, memory.nbytes)
    connection.send((transport.get_agent_metadata(), transport.get_mem_descriptor()))
    heard = []
    while not heard:
        heard = [text for texts in transport.get_new_notifs().values() for text in texts]
        connection.poll(0.001)
    connection.send(heard)
    connection.recv()
    transport.deregister()


@pytest.fixture
def peer():
    """Start a function in another process; return the process and the connection to it."""
    started = []

    def peer(function):
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        process = context.Process(target=function, args=(theirs,), daemon=True)
        process.start()
        started.append(process)
        return process, mine

    yield peer
    for process in started:
        process.kill()
        process.join()


def until(found, seconds=30):
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.001)
    return value


def test_peer_to_peer_tier(peer):
    from vllm.v1.kv_offload.tiering.p2p.data.nixl import NixlTransport

    process, connection = peer(tier_peer)
    metadata, address = connection.recv()
    memory = pattern(1)
    transport = NixlTransport("here", memoryview(memory))
    transport.add_remote_peer("peer", metadata, address, BLOCKS, NBYTES)
    rng = np.random.default_rng(3)
    for _ in range(8):
        mine, theirs = (rng.permutation(BLOCKS)[:16].tolist() for _ in range(2))
        transfer = transport.write_blocks("peer", mine, theirs)
        assert transfer is not None
        result = until(lambda: (found := transport.poll("peer")).done and found)
        assert list(result.done) == [transfer]
        connection.send(theirs)
        assert connection.recv() == memory[mine].tobytes()
    process.kill()
    process.join()
    # A write to a peer that is gone is refused, or fails; and the peer is known as faulty.
    transport.write_blocks("peer", [0], [0])
    fault = until(lambda: transport.poll("peer").peer_fault, 10)
    assert "NIXL_ERR" in fault or "nixl" in fault
    transport.close()


def test_encoder_outputs(peer):
    from vllm.distributed.ec_transfer.ec_connector.cpu.data.nixl import NixlDataTransport

    _, connection = peer(encoder_peer)
    metadata, descriptor = connection.recv()
    memory = np.zeros((BLOCKS, NBYTES), np.uint8)
    transport = NixlDataTransport("consumer", memory.ctypes.data, BLOCKS, NBYTES, memory.nbytes)
    name = transport.add_remote_peer(metadata, descriptor)
    mine, theirs = [5, 1, 9], [60, 2, 33]
    handle = transport.post_read(mine, name, theirs, b"read 3 blocks")
    until(lambda: transport.check_xfer_state(handle) == "DONE")
    transport.release_xfer_handle(handle)
    assert np.array_equal(memory[mine], pattern(2)[theirs])
    assert connection.recv() == [b"read 3 blocks"]
    connection.send(None)
    transport.remove_remote_peer(name)
    transport.deregister()
