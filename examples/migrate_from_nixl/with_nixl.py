"""The program with NIXL's API: it tells its metadata; then the sender writes blocks and reads them back, and both check them.

    python with_nixl.py sender|receiver             # `python examples/migrate_from_nixl` starts both and carries the metadata

NIXL's own wheel runs it, and so does the drop-in `nixl_async.compat`. The numbered steps are those of with_nixl_async.py.
"""

import argparse
import os
import sys
import time

import numpy as np

try:
    from nixl._api import nixl_agent, nixl_agent_config
except ModuleNotFoundError:
    from nixl_cu12._api import nixl_agent, nixl_agent_config

BLOCKS, PAGE = 64, 16_384
MINE, THEIRS = np.random.default_rng(1).permutation(BLOCKS), np.random.default_rng(2).permutation(BLOCKS)


def sender(agent, peer, pool, address):
    # 5. What goes where: a list of (address, bytes, device) for each side.
    local = agent.get_xfer_descs([(pool.ctypes.data + int(block) * PAGE, PAGE, 0) for block in MINE], "DRAM")
    remote = agent.get_xfer_descs([(address + int(block) * PAGE, PAGE, 0) for block in THEIRS], "DRAM")
    sent = np.random.default_rng(3).integers(0, 256, (BLOCKS, PAGE), np.uint8)
    pool[:] = sent
    # 6. Write, and tell the peer when it is there.
    move(agent, agent.initialize_xfer("WRITE", local, remote, peer, b"written"))
    # 7. Wait for an answer.
    assert wait_for_notification(agent, peer) == b"checked"
    # 8. Read.
    pool[:] = 0
    move(agent, agent.initialize_xfer("READ", local, remote, peer))
    assert (pool == sent).all()


def receiver(agent, peer, pool):
    assert wait_for_notification(agent, peer) == b"written"
    expected = np.random.default_rng(3).integers(0, 256, (BLOCKS, PAGE), np.uint8)
    assert (pool[THEIRS] == expected[MINE]).all()
    agent.send_notif(peer, b"checked")
    # The memory must stay until the sender has read it: it says so by ending, which ends our standard input.
    sys.stdin.read()


def move(agent, handle):
    state = agent.transfer(handle)
    while state == "PROC":
        time.sleep(0)
        state = agent.check_xfer_state(handle)
    agent.release_xfer_handle(handle)


def wait_for_notification(agent, peer):
    while not (found := agent.get_new_notifs().get(peer)):
        time.sleep(0.001)
    return found[0]


def main(role):
    # 1. An agent.
    agent = nixl_agent(role, nixl_agent_config(backends=["UCX"]))
    # 2. Memory.
    pool = np.zeros((BLOCKS, PAGE), np.uint8)
    registered = agent.register_memory([(pool.ctypes.data, pool.nbytes, 0, "kv")], "DRAM")
    # 3. Metadata, which travels by the program's own means.
    print("metadata", agent.get_agent_metadata().hex(), pool.ctypes.data, flush=True)
    metadata, address = sys.stdin.readline().split()
    # 4. The peer.
    name = agent.add_remote_agent(bytes.fromhex(metadata)).decode()
    if role == "sender":
        sender(agent, name, pool, int(address))
    else:
        receiver(agent, name, pool)
    # 9. The end.
    agent.remove_remote_agent(name)
    agent.deregister_memory(registered)
    print(f"{role} with NIXL's API: every byte checked", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("role", choices=["sender", "receiver"])
    main(parser.parse_args().role)
    # With NIXL's wheel 1.5.1 on a machine without a GPU, the interpreter's own exit is a segmentation fault.
    os._exit(0)
