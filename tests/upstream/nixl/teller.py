"""An agent that writes its telemetry: a registration, one transfer to itself, and a deregistration."""

import numpy as np
from nixl_cu12._api import nixl_agent

agent = nixl_agent("teller")
memory = np.zeros(8192, np.uint8)
registered = agent.register_memory([(memory.ctypes.data, 8192, 0, "")], "DRAM")
sides = [agent.get_xfer_descs([(memory.ctypes.data + half, 4096, 0)], "DRAM") for half in (0, 4096)]
handle = agent.initialize_xfer("WRITE", *sides, "teller")
state = agent.transfer(handle)
while state == "PROC":
    state = agent.check_xfer_state(handle)
agent.release_xfer_handle(handle)
agent.deregister_memory(registered)
