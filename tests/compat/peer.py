"""An agent in a process of its own, told by lines of JSON which of its methods to call: NIXL's agent, or the drop-in's.

Started by `another`, in any interpreter that has a `nixl_cu12`; NIXL_PYTHON names one with NIXL's wheel.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np

PATIENCE_SECONDS = 10.0


class Peer:
    """The other process: its agent's methods are called by `call`, and `until` asks one until it answers True."""

    def __init__(self, process):
        self.process = process
        hello = self.answer()
        self.address, self.nbytes = hello["address"], hello["nbytes"]

    def answer(self):
        line = self.process.stdout.readline()
        assert line, "the other process has ended"
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer

    def tell(self, **order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self.answer()["result"]

    def call(self, method, *arguments, **options):
        return self.tell(call=method, arguments=arguments, options=options)

    def until(self, method, *arguments, expected=True):
        return self.tell(until=method, arguments=arguments, expected=expected)

    def memory(self):
        return bytes.fromhex(self.tell(memory=True))

    def register(self, offset, nbytes):
        """Register a part of its memory that is not registered yet; return a number to call it by."""
        return self.tell(register=[offset, nbytes])


@contextmanager
def another(name, nbytes, fill, python=None):
    """Run one; with `python`, in that interpreter, and there without what PYTHONPATH names."""
    environment = {key: value for key, value in os.environ.items() if python is None or key != "PYTHONPATH"}
    command = [python or sys.executable, __file__, name, str(nbytes), str(fill)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            yield Peer(process)
        finally:
            process.kill()


def serve(name, nbytes, fill):
    # NIXL's log goes to standard output, which is for answers here.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import nixl_cu12._api as api

    memory = np.full(nbytes, fill, np.uint8)
    agent = api.nixl_agent(name, api.nixl_agent_config(backends=["UCX"]))
    lists = [agent.register_memory([(memory.ctypes.data, nbytes // 2, 0, "")], "DRAM")]

    def say(**answer):
        print(json.dumps(answer), file=answers, flush=True)

    def value_of(given):
        return lists[given["list"]] if isinstance(given, dict) else given

    def call(method, arguments, options):
        result = getattr(agent, method)(*map(value_of, arguments), **options)
        if isinstance(result, dict):
            return {key: [one.hex() for one in found] for key, found in result.items()}
        return result.hex() if isinstance(result, bytes) else result if isinstance(result, bool | int | str) else None

    def obey(order):
        if "call" in order:
            return call(order["call"], order["arguments"], order["options"])
        if "until" in order:
            end = time.monotonic() + PATIENCE_SECONDS
            while (result := call(order["until"], order["arguments"], {})) != order["expected"] and time.monotonic() < end:
                time.sleep(0.002)
            return result
        if "register" in order:
            offset, count = order["register"]
            lists.append(agent.register_memory([(memory.ctypes.data + offset, count, 0, "")], "DRAM"))
            return len(lists) - 1
        return memory.tobytes().hex()

    say(address=memory.ctypes.data, nbytes=nbytes)
    for line in sys.stdin:
        try:
            say(result=obey(json.loads(line)))
        except Exception as error:
            say(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
