"""Agents whose etcd is killed and started again: what is written and deleted afterwards is noticed as before."""

import os
import sys

import behaviours as shared
import numpy as np
from behaviours import make, until

BEHAVIOURS = shared.BEHAVIOURS
BEHAVIOURS.clear()


@shared.behaviour
def what_happens_after_a_restart_is_noticed():
    ask, answer = map(int, os.environ["COMPAT_PIPE"].split(","))
    near, far = make("restart-near"), make("restart-far")
    memory = np.zeros(4096, np.uint8)
    far.register_memory([(memory.ctypes.data, 4096, 0, "")], "DRAM")
    far.send_local_metadata()
    near.fetch_remote_metadata("restart-far")
    until(lambda: near.check_remote_metadata("restart-far"))
    os.write(ask, b"?")
    assert os.read(answer, 1) == b"!"
    assert near.check_remote_metadata("restart-far")
    far.invalidate_local_metadata()
    until(lambda: not near.check_remote_metadata("restart-far"))
    far.send_local_metadata()
    near.fetch_remote_metadata("restart-far")
    until(lambda: near.check_remote_metadata("restart-far"))


if __name__ == "__main__":
    shared.main(sys.argv[1:])
