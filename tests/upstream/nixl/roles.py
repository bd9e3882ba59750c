"""What NIXL's examples in examples/python show, as two processes that do it and check every byte: `roles.py SCENARIO ROLE PORT`.

The files themselves are in no wheel and no source distribution. Either role runs with the drop-in or with NIXL itself; only calls
that both have are used, in the manner of the examples: busy polls, descriptors in notifications, texts as notifications.
"""

import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from nixl_cu12._api import nixl_agent, nixl_agent_config

HOST = "127.0.0.1"
PATIENCE_SECONDS = 30.0
TARGET, INITIATOR = "target", "initiator"


def until(question):
    end = time.monotonic() + PATIENCE_SECONDS
    while not (found := question()):
        assert time.monotonic() < end, "patience is over"
    return found


def finish(agent, handles):
    left = [handle for handle in handles if agent.transfer(handle) != "DONE"]

    def look():
        left[:] = [handle for handle in left if agent.check_xfer_state(handle) != "DONE"]
        return not left

    until(look)


def ready():
    """Tell whoever started this that the other one may be started: it asks for what is registered by then."""
    fd = os.environ.get("READY_FD")
    if fd is not None:
        os.write(int(fd), b"!")


def make(role, port, **options):
    # The initiator lets the system choose its port.
    return nixl_agent(role, nixl_agent_config(True, True, port if role == TARGET else 0, **options))


def rows(agent, tensor):
    return agent.get_xfer_descs([tensor[i, :] for i in range(tensor.shape[0])])


def expect(agent, peer, messages):
    left = sorted(messages)

    def look():
        for message in agent.get_new_notifs().get(peer, []):
            left.remove(message)
        return not left

    until(look)


def meet(agent, port):
    """Exchange metadata with the target through its listener; return the first message that comes from there."""
    agent.fetch_remote_metadata(TARGET, HOST, port)
    agent.send_local_metadata(HOST, port)
    message = until(agent.get_new_notifs)[TARGET][0]
    until(lambda: agent.check_remote_metadata(TARGET))
    return message


def part(agent, port, registered, handles=()):
    agent.remove_remote_agent(TARGET)
    for handle in handles:
        agent.release_xfer_handle(handle)
    agent.invalidate_local_metadata(HOST, port)
    agent.deregister_memory(registered)


def basic_target(port):
    """basic_two_peers.py: a tensor's rows are read by whoever was sent their descriptors."""
    agent = make(TARGET, port)
    tensor = torch.arange(160, dtype=torch.float32).reshape(10, 16)
    registered = agent.register_memory(tensor)
    ready()
    until(lambda: agent.check_remote_metadata(INITIATOR))
    agent.send_notif(INITIATOR, agent.get_serialized_descs(rows(agent, tensor)))
    expect(agent, INITIATOR, [b"Done_reading"])
    # The other one invalidates itself at the end.
    until(lambda: not agent.check_remote_metadata(INITIATOR))
    agent.deregister_memory(registered)


def basic_initiator(port):
    agent = make(INITIATOR, port)
    tensor = torch.zeros((10, 16))
    registered = agent.register_memory(tensor)
    assert registered
    theirs = agent.deserialize_descs(meet(agent, port))
    handle = agent.initialize_xfer("READ", rows(agent, tensor), theirs, TARGET, "Done_reading")
    finish(agent, [handle])
    assert torch.equal(tensor, torch.arange(160, dtype=torch.float32).reshape(10, 16))
    part(agent, port, registered, [handle])


N_ROWS, WIDTH = 16, 32
GROUPS = [[start, start + 4, start + 8] for start in range(4)]
NAMES = [f"Read idx {','.join(map(str, group))}".encode() for group in GROUPS]


def expanded_target(port):
    """expanded_two_peers.py: prepared reads with the rows of each reversed, two writes, and the same reads again."""
    agent = make(TARGET, port)
    tensor = torch.arange(N_ROWS * WIDTH, dtype=torch.float32).reshape(N_ROWS, WIDTH)
    before = tensor.clone()
    registered = agent.register_memory(tensor)
    ready()
    until(lambda: agent.check_remote_metadata(INITIATOR))
    layout = f"{tensor.data_ptr()},{WIDTH * 4}|".encode()
    agent.send_notif(INITIATOR, layout + agent.get_serialized_descs(rows(agent, tensor)))
    expect(agent, INITIATOR, [*NAMES, b"Write 12,13", b"Write 14,15", *(name + b" again" for name in NAMES)])
    half = WIDTH // 2
    assert torch.equal(tensor[:12], before[:12])
    assert (tensor[12:14, :half] == -1).all()
    assert (tensor[14:, half:] == -1).all()
    assert torch.equal(tensor[12:14, half:], before[12:14, half:])
    assert torch.equal(tensor[14:, :half], before[14:, :half])
    agent.deregister_memory(registered)


def expanded_initiator(port):
    agent = make(INITIATOR, port)
    tensor = torch.full((N_ROWS, WIDTH), -1.0)
    registered = agent.register_memory(tensor)
    layout, _, serialised = meet(agent, port).partition(b"|")
    base, row_nbytes = map(int, layout.split(b","))
    near, far = (
        agent.prep_xfer_dlist("", rows(agent, tensor)),
        agent.prep_xfer_dlist(TARGET, agent.deserialize_descs(serialised)),
    )
    reads = [
        agent.make_prepped_xfer("READ", near, group, far, group[::-1], name) for group, name in zip(GROUPS, NAMES, strict=True)
    ]
    half = row_nbytes // 2
    addresses = [(tensor[row, :].data_ptr(), base + row * row_nbytes) for row in range(N_ROWS)]
    first = [agent.get_xfer_descs([(addresses[row][side], half, 0) for row in (12, 13)], mem_type="cpu") for side in (0, 1)]
    second = [
        agent.get_xfer_descs(np.array([(addresses[row][side] + half, half, 0) for row in (14, 15)], np.uint64), mem_type="cpu")
        for side in (0, 1)
    ]
    writes = [
        agent.initialize_xfer("WRITE", *first, TARGET, b"Write 12,13"),
        agent.initialize_xfer("WRITE", *second, TARGET, b"Write 14,15"),
    ]
    expected = torch.full((N_ROWS, WIDTH), -1.0)
    source = torch.arange(N_ROWS * WIDTH, dtype=torch.float32).reshape(N_ROWS, WIDTH)
    for group in GROUPS:
        expected[group] = source[group[::-1]]
    finish(agent, reads)
    assert torch.equal(tensor, expected)
    finish(agent, writes)
    tensor[:12] = 0
    left = [one for one, name in zip(reads, NAMES, strict=True) if agent.transfer(one, name + b" again") != "DONE"]
    until(lambda: all(agent.check_xfer_state(one) == "DONE" for one in left))
    assert torch.equal(tensor, expected)
    agent.release_dlist_handle(near)
    agent.release_dlist_handle(far)
    part(agent, port, registered, [*reads, *writes])


N_BLOCKS, BLOCK_NBYTES, TIMES = 32, 16384, 5


def storage_target(port):
    """remote_storage_example: a server that reads files into memory and writes them to its client, and the other way round."""
    agent = make(TARGET, port, backends=["UCX", "POSIX"])
    memory = np.zeros(N_BLOCKS * BLOCK_NBYTES, np.uint8)
    mine = agent.register_memory(
        [(memory.ctypes.data + i * BLOCK_NBYTES, BLOCK_NBYTES, 0, "") for i in range(N_BLOCKS)], "DRAM"
    )
    with tempfile.TemporaryFile() as file:
        file.truncate(memory.nbytes)
        blocks = [(i * BLOCK_NBYTES, BLOCK_NBYTES, file.fileno()) for i in range(N_BLOCKS)]
        files = agent.register_memory([(*block, "") for block in blocks], "FILE")
        ready()
        until(lambda: agent.check_remote_metadata(INITIATOR))
        agent.send_notif(INITIATOR, b"ready")

        def move(operation, remote, name):
            handle = agent.initialize_xfer(operation, mine.trim(), remote, name)
            finish(agent, [handle])
            agent.release_xfer_handle(handle)

        for _ in range(2):
            request = until(agent.get_new_notifs)[INITIATOR][0]
            operation, times, theirs = request[:4], int(request[4:8]), agent.deserialize_descs(request[8:])
            steps = {
                b"WRTE": [("READ", theirs, INITIATOR), ("WRITE", files.trim(), agent.name)],
                b"READ": [("READ", files.trim(), agent.name), ("WRITE", theirs, INITIATOR)],
            }[operation]
            move(*steps[0])
            # From then on both at once, on two threads, as the example does; the bytes stay the same.
            with ThreadPoolExecutor(2) as threads:
                for _ in range(times - 1):
                    for future in [threads.submit(move, *step) for step in steps]:
                        future.result()
            move(*steps[1])
            if operation == b"WRTE":
                memory[:] = 0
            agent.send_notif(INITIATOR, b"COMPLETE")
        until(lambda: not agent.check_remote_metadata(INITIATOR))
        agent.deregister_memory(files)
    agent.deregister_memory(mine)


def storage_initiator(port):
    agent = make(INITIATOR, port)
    memory = np.random.default_rng(1).integers(0, 255, N_BLOCKS * BLOCK_NBYTES, np.uint8)
    sent = memory.copy()
    blocks = [(memory.ctypes.data + i * BLOCK_NBYTES, BLOCK_NBYTES, 0, "") for i in range(N_BLOCKS)]
    registered = agent.register_memory(blocks, "DRAM")
    assert meet(agent, port) == b"ready"
    for operation in (b"WRTE", b"READ"):
        if operation == b"READ":
            memory[:] = 0
        request = operation + f"{TIMES:04d}".encode() + agent.get_serialized_descs(registered.trim())
        agent.send_notif(TARGET, request)
        until(lambda: agent.check_remote_xfer_done(TARGET, b"COMPLETE"))
    assert (memory == sent).all()
    part(agent, port, registered)


ROLES = {name: one for name, one in globals().items() if name.endswith((f"_{TARGET}", f"_{INITIATOR}"))}

if __name__ == "__main__":
    torch.set_num_threads(1)
    ROLES[f"{sys.argv[1]}_{sys.argv[2]}"](int(sys.argv[3]))
    print("passed", flush=True)
