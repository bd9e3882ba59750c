"""A stock NIXL agent, run by the interpreter of NIXL's own environment and told by lines of JSON on standard input."""

import importlib
import json
import os
import sys
import time

import numpy as np

PATIENCE_SECONDS = 5.0


def load():
    for name in ("nixl_cu12._api", "nixl_cu13._api", "nixl._api"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise SystemExit("no NIXL wheel in this interpreter")


def main():
    # NIXL's log goes to standard output, which is for answers here.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    setup = json.loads(sys.stdin.readline())
    api = load()
    memory = np.full(setup["nbytes"], setup["fill"], np.uint8)
    agent = api.nixl_agent(setup["name"], api.nixl_agent_config(backends=[]))
    agent.create_backend("UCX", {})
    agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "memory")], "DRAM")

    def say(**answer):
        print(json.dumps(answer), file=answers, flush=True)

    def move(operation, order):
        near = agent.get_xfer_descs([(memory.ctypes.data + order["local"], order["nbytes"], 0)], "DRAM")
        far = agent.get_xfer_descs([(order["remote"], order["nbytes"], 0)], "DRAM")
        handle = agent.initialize_xfer(operation, near, far, order["peer"], order.get("notify", "").encode())
        state = agent.transfer(handle)
        end = time.monotonic() + PATIENCE_SECONDS
        while state == "PROC" and time.monotonic() < end:
            state = agent.check_xfer_state(handle)
        agent.release_xfer_handle(handle)
        return state

    say(metadata=agent.get_agent_metadata().hex(), address=memory.ctypes.data)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if order["do"] == "load":
                name = agent.add_remote_agent(bytes.fromhex(order["metadata"]))
                say(name=name.decode() if isinstance(name, bytes) else name)
            elif order["do"] in ("READ", "WRITE"):
                say(state=move(order["do"], order))
            elif order["do"] == "fill":
                memory[:] = np.frombuffer(np.random.Generator(np.random.SFC64(order["seed"])).bytes(memory.nbytes), np.uint8)
                say(done=True)
            elif order["do"] == "bytes":
                say(bytes=memory[order["start"] : order["stop"]].tobytes().hex())
            elif order["do"] in ("call", "until"):
                method, end = getattr(agent, order["method"]), time.monotonic() + PATIENCE_SECONDS
                result = method(*order["arguments"])
                while order["do"] == "until" and result != order["expected"] and time.monotonic() < end:
                    time.sleep(0.002)
                    result = method(*order["arguments"])
                say(result=result)
            elif order["do"] == "notify":
                agent.send_notif(order["peer"], bytes.fromhex(order["payload"]))
                say(done=True)
            elif order["do"] == "listen":
                found, end = {}, time.monotonic() + PATIENCE_SECONDS
                while not found and time.monotonic() < end:
                    found = agent.get_new_notifs()
                    time.sleep(0.001)
                say(notifications={k: [m.hex() for m in v] for k, v in found.items()})
        except Exception as error:
            say(error=f"{type(error).__name__}: {error}")


main()
