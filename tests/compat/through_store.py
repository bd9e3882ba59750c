"""What callers of NIXL rely on when agents find each other through a store, whichever it is; `through_*.py` run it with one each.

Where NIXL_PYTHON names an interpreter with its wheel, the other process is an agent of NIXL's.
"""

import os
import time

import behaviours as shared
import numpy as np
from behaviours import make, raises, until, wait
from peer import another

NBYTES = 1 << 16
HALF = NBYTES // 2
BEHAVIOURS = shared.BEHAVIOURS
BEHAVIOURS.clear()
OTHERS = os.environ.get("NIXL_PYTHON")
names = iter(f"stored-{os.getpid()}-{time.time_ns()}-{i}" for i in range(1000))


class Near:
    """An agent with some memory."""

    def __init__(self, fill=0):
        self.agent = make(next(names))
        self.memory = np.full(NBYTES, fill, np.uint8)
        self.registered = self.agent.register_memory([(self.memory.ctypes.data, NBYTES, 0, "")], "DRAM")

    def read(self, name, address, nbytes=HALF):
        sides = [[(self.memory.ctypes.data, nbytes, 0)], [(address, nbytes, 0)]]
        return self.agent.initialize_xfer("READ", *(self.agent.get_xfer_descs(side, "DRAM") for side in sides), name)


@shared.behaviour
def an_agent_is_fetched_by_its_name():
    near, name = Near(), next(names)
    with another(name, NBYTES, 7, OTHERS) as far:
        far.call("send_local_metadata")
        near.agent.fetch_remote_metadata(name)
        until(lambda: near.agent.check_remote_metadata(name))
        wait(near.agent, near.read(name, far.address))
        assert (near.memory[:HALF] == 7).all()
        near.agent.send_local_metadata()
        far.call("fetch_remote_metadata", near.agent.name)
        assert far.until("check_remote_metadata", near.agent.name)
        far.call("send_notif", near.agent.name, "hello")
        assert until(near.agent.get_new_notifs) == {name: [b"hello"]}


@shared.behaviour
def metadata_that_is_not_there_yet_is_waited_for():
    near, name = Near(), next(names)
    with another(name, NBYTES, 7, OTHERS) as far:
        near.agent.fetch_remote_metadata(name)
        assert not near.agent.check_remote_metadata(name)
        far.call("send_local_metadata")
        until(lambda: near.agent.check_remote_metadata(name))


@shared.behaviour
def parts_go_under_labels():
    near, name = Near(), next(names)
    with another(name, NBYTES, 9, OTHERS) as far:
        far.call("send_partial_agent_metadata", {"list": 0}, True, ["UCX"], label="first")
        near.agent.fetch_remote_metadata(name, label="first")
        until(lambda: near.agent.check_remote_metadata(name))
        wait(near.agent, near.read(name, far.address))
        assert (near.memory[:HALF] == 9).all()
        number = far.register(HALF, HALF)
        with raises(shared.bindings.nixlNotFoundError):
            near.read(name, far.address + HALF)
        far.call("send_partial_agent_metadata", {"list": number}, True, label="second")
        near.agent.fetch_remote_metadata(name, label="second")
        descs = near.agent.get_xfer_descs([(far.address + HALF, HALF, 0)], "DRAM")
        until(lambda: near.agent.check_remote_metadata(name, descs))
        wait(near.agent, near.read(name, far.address + HALF))
    with raises(shared.bindings.nixlInvalidParamError):
        near.agent.send_partial_agent_metadata(near.registered, True)


@shared.behaviour
def an_address_goes_before_the_store():
    port = shared.free_port()
    listener = make(next(names), enable_listen_thread=True, listen_port=port)
    near = Near()
    near.agent.send_local_metadata("127.0.0.1", port)
    until(lambda: listener.check_remote_metadata(near.agent.name))
