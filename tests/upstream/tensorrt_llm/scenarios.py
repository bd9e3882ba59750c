"""Two TensorRT-LLM transfer agents in processes of their own move blocks of a KV cache, on whatever NIXL means here.

The argument is a folder with TensorRT-LLM's source; without one, the port of its agent runs.
"""

import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import ported
import source

BLOCK, N_BLOCKS = 16 << 10, 512
NBYTES = BLOCK * N_BLOCKS
PATIENCE_SECONDS = 60
DEATH_SECONDS = 10


def classes(tree):
    if tree is None:
        return ported, ported.NixlTransferAgent
    base, agent = source.load(tree)
    return base, agent.NixlTransferAgent


def serve(pipe, tree):
    """The generation side: it registers, tells of itself, and shows its bytes."""
    base, make = classes(tree)
    agent = make("generation", use_prog_thread=True, num_threads=2)
    memory = np.zeros(NBYTES, np.uint8)
    registered = base.RegMemoryDescs(type="DRAM", descs=[(memory.ctypes.data, NBYTES, 0, "kv")])
    agent.register_memory(registered)
    pipe.send((agent.get_local_agent_desc(), memory.ctypes.data))
    while True:
        match pipe.recv():
            case "bytes":
                pipe.send(memory.tobytes())
            case "fill", value:
                memory[:] = value
                pipe.send(None)
            case "messages":
                deadline = time.monotonic() + PATIENCE_SECONDS
                while not (found := agent.agent.get_new_notifs()) and time.monotonic() < deadline:
                    time.sleep(0.001)
                pipe.send(found)
            case "again":
                # As the agent does it: from a list made anew.
                agent.deregister_memory(base.RegMemoryDescs(type="DRAM", descs=[(memory.ctypes.data, NBYTES, 0, "kv")]))
                agent.register_memory(registered)
                pipe.send(agent.get_local_agent_desc())


def ask(pipe, question):
    pipe.send(question)
    assert pipe.poll(PATIENCE_SECONDS), f"no answer to {question}"
    return pipe.recv()


def main():
    tree = sys.argv[1] if len(sys.argv) > 1 else None
    what = "a port of its calls" if tree is None else "its own _agent_py.py"
    pipe, other = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(other, tree))
    process.start()
    try:
        base, make = classes(tree)
        with_agent(base, make("context", use_prog_thread=True, num_threads=1), pipe, process, what)
    finally:
        process.kill()
        process.join()


def with_agent(base, agent, pipe, process, what):
    memory = np.random.default_rng(3).integers(0, 255, NBYTES, np.uint8)
    own = base.RegMemoryDescs(type="DRAM", descs=[(memory.ctypes.data, NBYTES, 0, "kv")])
    agent.register_memory(own)
    assert pipe.poll(PATIENCE_SECONDS)
    desc, there = pipe.recv()
    agent.load_remote_agent("generation", desc)

    def request(op, mine, theirs, message):
        sides = [
            base.MemoryDescs(type="DRAM", descs=[(start + int(i) * BLOCK, BLOCK, 0) for i in blocks])
            for start, blocks in ((memory.ctypes.data, mine), (there, theirs))
        ]
        return base.TransferRequest(
            op=op, src_descs=sides[0], dst_descs=sides[1], remote_name="generation", sync_message=message
        )

    random = np.random.default_rng(4)
    mine, theirs = random.permutation(N_BLOCKS)[:300], random.permutation(N_BLOCKS)[:300]
    status = agent.submit_transfer_requests(request("WRITE", mine, theirs, "request 7 is there"))
    assert status.wait(timeout_ms=PATIENCE_SECONDS * 1000)
    assert status.is_completed()
    expected = np.zeros((N_BLOCKS, BLOCK), np.uint8)
    expected[theirs] = memory.reshape(N_BLOCKS, BLOCK)[mine]
    assert ask(pipe, "bytes") == expected.tobytes()
    assert ask(pipe, "messages") == {"context": [b"request 7 is there"]}
    print(f"tensorrt_llm: {what}: 300 blocks of 16 KiB written to another process, with a message: bytes equal", flush=True)

    ask(pipe, ("fill", 9))
    assert agent.submit_transfer_requests(request("READ", mine, theirs, None)).wait()
    assert (memory.reshape(N_BLOCKS, BLOCK)[mine] == 9).all()
    print(f"tensorrt_llm: {what}: 300 blocks read: bytes equal", flush=True)

    agent.invalidate_remote_agent("generation")
    try:
        agent.submit_transfer_requests(request("READ", mine, theirs, None))
    except Exception as error:
        print(f"tensorrt_llm: {what}: after invalidate_remote_agent: {type(error).__name__}: {error}", flush=True)
    else:
        raise AssertionError("a transfer with an invalidated agent began")
    agent.load_remote_agent("generation", ask(pipe, "again"))
    ask(pipe, ("fill", 3))
    assert agent.submit_transfer_requests(request("READ", mine, theirs, None)).wait()
    assert (memory.reshape(N_BLOCKS, BLOCK)[mine] == 3).all()
    print(f"tensorrt_llm: {what}: memory deregistered by an equal list, registered and loaded again: bytes equal", flush=True)

    process.kill()
    process.join()
    began = time.monotonic()
    try:
        while agent.submit_transfer_requests(request("WRITE", mine, theirs, None)).wait(timeout_ms=DEATH_SECONDS * 1000):
            assert time.monotonic() - began < DEATH_SECONDS
        raise AssertionError("a transfer with a killed process was given up after its timeout only")
    except AssertionError:
        raise
    except Exception as error:
        took = time.monotonic() - began
        print(f"tensorrt_llm: {what}: the other process killed: {type(error).__name__} after {took:.1f} s", flush=True)
    agent.deregister_memory(own)
    agent.shutdown()


if __name__ == "__main__":
    main()
