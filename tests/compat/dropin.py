"""What the drop-in does that is its own, or needs a second process; run like `behaviours.py`, with the drop-in on PYTHONPATH.

The other process is `tests/nixl_worker.py`: NIXL's own agent if NIXL_PYTHON names an interpreter with its wheel, else the drop-in.
"""

import gc
import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import behaviours as shared
import numpy as np
from behaviours import NBYTES, Pair, make, raises, until, wait

from nixl_async import NixlError

WORKER = Path(__file__).parents[1] / "nixl_worker.py"
BEHAVIOURS = shared.BEHAVIOURS
BEHAVIOURS.clear()


@shared.behaviour
def a_released_handle_raises():
    pair = Pair()
    handle = pair.handle()
    wait(pair.near, handle)
    pair.near.release_xfer_handle(handle)
    with raises(shared.bindings.nixlInvalidParamError):
        pair.near.transfer(handle)
    with raises(shared.bindings.nixlInvalidParamError):
        pair.near.check_xfer_state(handle)
    near, far = (
        pair.near.prep_xfer_dlist("", pair.descs((0,), 64)[0]),
        pair.near.prep_xfer_dlist(pair.name, pair.descs((0,), 64)[1]),
    )
    handle = pair.near.make_prepped_xfer("WRITE", near, [0], far, [0])
    near.release()
    far.release()
    wait(pair.near, handle)
    with raises(shared.bindings.nixlInvalidParamError):
        pair.near.make_prepped_xfer("WRITE", near, [0], far, [0])


@shared.behaviour
def an_error_says_what_is_wrong_in_a_note():
    pair = Pair()
    try:
        pair.near.initialize_xfer("READ", *pair.descs((0,), 64), "nobody")
    except NixlError as error:
        text, notes = str(error), error.__notes__
    assert text == "NIXL_ERR_NOT_FOUND"
    assert "'nobody'" in notes[0]
    assert pair.name in notes[0]
    kinds = [one for name, one in vars(shared.bindings).items() if name.startswith("nixl") and name.endswith("Error")]
    assert len(kinds) == 12
    assert all(issubclass(kind, NixlError) for kind in kinds)


@shared.behaviour
def an_index_out_of_range_is_an_error():
    descs = shared.bindings.nixlXferDList(shared.bindings.DRAM_SEG, [(1, 2, 3)])
    for wrong in (1, -1):
        with raises(IndexError):
            descs[wrong]
    with raises(IndexError):
        descs.remDesc(1)
    with raises(ValueError):
        shared.bindings.nixlXferDList(shared.bindings.DRAM_SEG, [(-1, 2, 3)])


@shared.behaviour
def serialised_bytes_run_nothing():
    class Evil:
        def __reduce__(self):
            return os._exit, (1,)

    agent = make("careful", backends=[])
    good = agent.get_serialized_descs(agent.get_xfer_descs([(1, 2, 3)], "DRAM"))
    for wrong in (
        pickle.dumps(Evil()),
        pickle.dumps([1]),
        b"",
        b"junk",
        good[:-3],
        good.replace(b"nixlXferDList", b"nixlBadList12"),
    ):
        with raises(shared.bindings.nixlMismatchError):
            agent.deserialize_descs(wrong)


@shared.behaviour
def a_transfer_that_is_released_moves_no_byte_any_more():
    agent = make("releasing")
    memory = np.ones(256 << 20, np.uint8)
    agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
    half = memory.nbytes // 2
    target = memory[half:]
    near = agent.get_xfer_descs([(memory.ctypes.data, half, 0)], "DRAM")
    far = agent.get_xfer_descs([(memory.ctypes.data + half, half, 0)], "DRAM")
    handle = agent.initialize_xfer("WRITE", near, far, agent.name)
    assert agent.transfer(handle) == "PROC"
    with raises(shared.bindings.nixlRepostActiveError):
        agent.transfer(handle)
    handle.release()
    target[:] = 7
    assert (target == 7).all()
    handle = agent.initialize_xfer("WRITE", near, far, agent.name)
    wait(agent, handle)
    assert (target == 1).all()


@shared.behaviour
def memory_is_deregistered_while_others_copy():
    pair = Pair()
    extra = np.zeros(65536, np.uint8)
    stop, rounds = threading.Event(), []
    handle = pair.handle("WRITE", (0,), 65536)

    def copy():
        while not stop.is_set():
            wait(pair.near, handle)
            rounds.append(1)

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        for _ in range(50):
            registered = pair.near.register_memory([(extra.ctypes.data, 65536, 0, "")], "DRAM")
            pair.near.deregister_memory(registered)
        until(lambda: len(rounds) > 3)
    finally:
        stop.set()
        thread.join()


@shared.behaviour
def memory_is_left_alone_from_when_its_owner_has_deregistered_it():
    for nbytes in (4096, 256 << 10):
        pair = Pair()
        handle = pair.handle("WRITE", (0,), nbytes)
        wait(pair.near, handle)
        refused, started = [], threading.Event()

        def post(pair=pair, handle=handle, refused=refused, started=started):
            try:
                while True:
                    wait(pair.near, handle)
                    started.set()
            except shared.bindings.nixlNotFoundError:
                refused.append(True)

        thread = threading.Thread(target=post)
        thread.start()
        assert started.wait(10)
        pair.far.deregister_memory(pair.other)
        pair.theirs[:] = 77
        thread.join(10)
        assert refused
        assert (pair.theirs == 77).all()
        with raises(shared.bindings.nixlNotFoundError):
            pair.near.transfer(handle)


@shared.behaviour
def a_transfer_that_another_thread_copies_is_released_when_it_is_done():
    pair = Pair()

    def post(handle):
        # It may come too late, and then is told so.
        with suppress(shared.bindings.nixlInvalidParamError):
            pair.near.agent.postXferReq(handle)

    for _ in range(50):
        handle = pair.handle("WRITE", (0,), NBYTES)
        wait(pair.near, handle)
        thread = threading.Thread(target=post, args=(handle._handle,))
        thread.start()
        handle.release()
        pair.theirs[:] = 5
        thread.join()
        assert (pair.theirs == 5).all(), "bytes moved after the release"


@shared.behaviour
def lists_that_were_prepared_serve_files_too():
    pair = Pair()
    pair.near.create_backend("POSIX")
    again = pair.near.register_memory(pair.places(pair.ours, [0], NBYTES, ""), "DRAM")
    places = pair.places(pair.ours, range(0, 65536, 4096), 4096)
    far = pair.near.prep_xfer_dlist(pair.name, pair.places(pair.theirs, range(0, 65536, 4096), 4096), "DRAM")
    order = list(range(16))
    with tempfile.TemporaryFile() as file:
        file.truncate(65536)
        pair.near.register_memory([(0, 65536, file.fileno(), "")], "FILE")
        for _ in range(3):
            near = pair.near.prep_xfer_dlist("", places, "DRAM")
            wait(pair.near, pair.near.make_prepped_xfer("WRITE", near, order, far, order))
            assert (pair.theirs[:65536] == pair.ours[:65536]).all()
            blocks = pair.near.prep_xfer_dlist(pair.near.name, [(i * 4096, 4096, file.fileno()) for i in order], "FILE")
            wait(pair.near, pair.near.make_prepped_xfer("WRITE", near, order, blocks, order))
            assert os.pread(file.fileno(), 65536, 0) == pair.ours[:65536].tobytes()
            pair.ours += 1
    pair.near.deregister_memory(again)


@shared.behaviour
def a_list_of_a_removed_agent_serves_nothing():
    pair = Pair()
    places = [pair.places(memory, [0], 1024) for memory in (pair.ours, pair.theirs)]
    for _ in range(2):
        near, far = pair.near.prep_xfer_dlist("", places[0], "DRAM"), pair.near.prep_xfer_dlist(pair.name, places[1], "DRAM")
        wait(pair.near, pair.near.make_prepped_xfer("WRITE", near, [0], far, [0]))
    late = pair.near.prep_xfer_dlist(pair.name, places[1], "DRAM")
    pair.near.remove_remote_agent(pair.name)
    with raises(shared.bindings.nixlNotFoundError):
        pair.near.prep_xfer_dlist(pair.name, places[1], "DRAM")
    pair.near.add_remote_agent(pair.far.get_agent_metadata())
    for old in (far, late):
        with raises(shared.bindings.nixlNotFoundError):
            wait(pair.near, pair.near.make_prepped_xfer("WRITE", near, [0], old, [0]))


def slow_calls(agent):
    """Return the list of what is not done natively from now on."""
    low, seen = agent.agent, []
    for name in ("_prepare", "_make", "_create", "_post", "_status", "_release"):
        real = getattr(low, name)

        def slowly(*arguments, name=name, real=real, **named):
            seen.append(name)
            return real(*arguments, **named)

        setattr(low, name, slowly)
    return seen


@shared.behaviour
def what_is_repeated_is_done_natively():
    order = np.arange(16)
    with another(fill=7) as peer:
        pair, far = Pair(), make("nativefar")
        memory = np.zeros(NBYTES, np.uint8)
        far.register_memory([(memory.ctypes.data, NBYTES, 0, "")], "DRAM")
        far.add_remote_agent(peer.metadata)
        beside = "NIXL_PYTHON" in os.environ
        cases = [(pair.near, pair.name, pair.ours, pair.theirs.ctypes.data), (pair.near, pair.near.name, pair.ours, None)]
        for agent, name, ours, address in cases if beside else [*cases, (far, "peer", memory, peer.address)]:
            places = [
                [(base + i * 1024, 1024, 0) for i in range(16)]
                for base in (ours.ctypes.data, ours.ctypes.data + 65536 if address is None else address)
            ]

            def move(agent=agent, name=name, places=places):
                near, there = agent.prep_xfer_dlist("", places[0], "DRAM"), agent.prep_xfer_dlist(name, places[1], "DRAM")
                handle = agent.make_prepped_xfer("WRITE", near, order, there, order)
                for _ in range(3):
                    wait(agent, handle)
                    assert agent.check_xfer_state(handle) == "DONE"
                agent.release_xfer_handle(handle)
                lists = [agent.get_xfer_descs(side, "DRAM") for side in places]
                wait(agent, agent.initialize_xfer("READ", *lists, name))

            move()
            seen = slow_calls(agent)
            move()
            assert seen == [], seen
            # Something changes: everything is looked at once more.
            agent.register_memory([(ours.ctypes.data, 4096, 0, "")], "DRAM")
            move()
            assert seen, "nobody looked again"
            seen.clear()
            move()
            assert seen == [], seen


@shared.behaviour
def nothing_is_left_of_what_is_released():
    pair = Pair()
    places = [pair.places(memory, range(0, 65536, 1024), 1024) for memory in (pair.ours, pair.theirs)]
    order = np.arange(64)
    core = pair.near.agent._core
    before = [len(one) for one in (core.requests, core.places, core.sides)]
    for _ in range(2000):
        near, far = pair.near.prep_xfer_dlist("", places[0], "DRAM"), pair.near.prep_xfer_dlist(pair.name, places[1], "DRAM")
        handle = pair.near.make_prepped_xfer("WRITE", near, order, far, order)
        wait(pair.near, handle)
        for one in (handle, near, far):
            one.release()
    assert [len(one) for one in (core.requests, core.places, core.sides)] == before


@shared.behaviour
def memory_is_taken_back_while_its_reader_forgets_its_owner():
    near, far = make("forgetful"), make("owner")
    ours, theirs = np.zeros(4096, np.uint8), np.full(4096, 8, np.uint8)
    near.register_memory([(ours.ctypes.data, 4096, 0, "")], "DRAM")
    sides = [near.get_xfer_descs([(one.ctypes.data, 4096, 0)], "DRAM") for one in (ours, theirs)]
    for _ in range(300):
        registered = far.register_memory([(theirs.ctypes.data, 4096, 0, "")], "DRAM")
        near.add_remote_agent(far.get_agent_metadata())
        wait(near, near.initialize_xfer("READ", *sides, "owner"))
        forgetting = threading.Thread(target=near.remove_remote_agent, args=("owner",))
        forgetting.start()
        began = time.monotonic()
        far.deregister_memory(registered)
        forgetting.join()
        assert time.monotonic() - began < 4, "the owner waits for who has forgotten it"
    assert (ours == 8).all()


@shared.behaviour
def the_thread_ends_with_the_last_agent():
    # Those of the behaviours before this one are to go first.
    until(lambda: gc.collect() >= 0 and not named("nixl-compat"))
    pair = Pair(both=True)
    assert len(named("nixl-compat")) == 1
    handle = pair.handle()
    wait(pair.near, handle)
    del pair
    gc.collect()
    assert named("nixl-compat"), "a handle keeps its agent"
    del handle
    until(lambda: gc.collect() >= 0 and not named("nixl-compat"))
    wait_again = Pair()
    wait(wait_again.near, wait_again.handle())


def named(name):
    return [thread for thread in threading.enumerate() if thread.name == name]


@shared.behaviour
def vram_is_host_memory_where_that_is_asked_for():
    os.environ["NIXL_ASYNC_VRAM_ON_HOST"] = "1"
    try:
        near, far = make("vramnear"), make("vramfar")
        ours, theirs = np.full(4096, 4, np.uint8), np.zeros(4096, np.uint8)
        near.register_memory([(ours.ctypes.data, 4096, 3, "")], "VRAM")
        registered = far.register_memory([(theirs.ctypes.data, 4096, 1, "")], "VRAM")
        near.add_remote_agent(far.get_agent_metadata())
        assert near.check_remote_metadata("vramfar", registered.trim())
        source = near.prep_xfer_dlist("", np.array([(ours.ctypes.data, 64, 3, 64, 64)], np.uint64), "VRAM")
        target = near.prep_xfer_dlist("vramfar", [(theirs.ctypes.data + i * 64, 64, 1) for i in range(64)], "VRAM")
        wait(near, near.make_prepped_xfer("WRITE", source, list(range(64)), target, list(range(64))))
        assert (theirs == 4).all()
        far.deregister_memory(registered)
    finally:
        del os.environ["NIXL_ASYNC_VRAM_ON_HOST"]


@shared.behaviour
def who_has_no_metadata_cannot_connect():
    from nixl_async.compat import blobs
    from nixl_async.metadata import decode, encode

    near, far = make("outside"), make("inside")
    metadata = decode(far.get_agent_metadata())
    metadata.connections[blobs.TOKEN_RECORD] = b"a guess"
    with raises(shared.bindings.nixlBackendError):
        near.add_remote_agent(encode(metadata))
    assert not near.check_remote_metadata("inside")
    assert near.add_remote_agent(far.get_agent_metadata()) == b"inside"


@shared.behaviour
def an_empty_token_in_the_environment_is_none():
    os.environ["NIXL_ASYNC_TOKEN"] = ""
    try:
        near, far = make("tokenless"), make("alike")
        assert near.add_remote_agent(far.get_agent_metadata()) == b"alike"
    finally:
        del os.environ["NIXL_ASYNC_TOKEN"]


@shared.behaviour
def a_tcpstore_that_does_not_answer_is_no_obstacle():
    os.environ["NIXL_TCPSTORE_ENDPOINT"] = f"127.0.0.1:{shared.free_port()}"
    try:
        pair = Pair()
        pair.near.send_local_metadata()
        pair.near.fetch_remote_metadata("nobody")
        pair.near.invalidate_local_metadata()
        wait(pair.near, pair.handle())
        assert not pair.near.check_remote_metadata("nobody")
    finally:
        del os.environ["NIXL_TCPSTORE_ENDPOINT"]


@shared.behaviour
def an_etcd_that_does_not_answer_is_no_obstacle():
    os.environ["NIXL_ETCD_ENDPOINTS"] = f"http://127.0.0.1:{shared.free_port()}"
    try:
        pair = Pair()
        pair.near.send_local_metadata()
        pair.near.fetch_remote_metadata("nobody")
        pair.near.invalidate_local_metadata()
        wait(pair.near, pair.handle())
        assert not pair.near.check_remote_metadata("nobody")
        os.environ["NIXL_ETCD_ENDPOINTS"] = "no://url"
        with raises(NixlError, "no://url"):
            make("misled")
    finally:
        del os.environ["NIXL_ETCD_ENDPOINTS"]


@shared.behaviour
def the_environment_decides_about_telemetry():
    os.environ["NIXL_TELEMETRY_ENABLE"] = "y"
    try:
        on = Pair()
        os.environ["NIXL_TELEMETRY_ENABLE"] = "no"
        off = Pair(capture_telemetry=True)
    finally:
        del os.environ["NIXL_TELEMETRY_ENABLE"]
    handles = [pair.handle() for pair in (on, off)]
    for pair, handle in zip((on, off), handles, strict=True):
        wait(pair.near, handle)
    assert on.near.get_xfer_telemetry(handles[0]).totalBytes == 4096
    with raises(shared.bindings.nixlNoTelemetryError):
        off.near.get_xfer_telemetry(handles[1])


@shared.behaviour
def a_ring_that_is_full_takes_no_more_and_settings_are_checked():
    with tempfile.TemporaryDirectory() as directory:
        on = {"NIXL_TELEMETRY_ENABLE": "y", "NIXL_TELEMETRY_DIR": directory}
        with shared.variables(**on, NIXL_TELEMETRY_BUFFER_SIZE="8", NIXL_TELEMETRY_RUN_INTERVAL="1"):
            pair = Pair()
        handle = pair.handle()
        for _ in range(20):
            wait(pair.near, handle)
        path = os.path.join(directory, pair.near.name)
        until(lambda: len(shared.ring(path)) == 7)
        wait(pair.near, handle)
        pair.near.deregister_memory(pair.mine)
        assert len(shared.ring(path)) == 7
        for wrong in (
            {"NIXL_TELEMETRY_BUFFER_SIZE": "7"},
            {"NIXL_TELEMETRY_BUFFER_SIZE": "0"},
            {"NIXL_TELEMETRY_RUN_INTERVAL": "often"},
            {"NIXL_TELEMETRY_DIR": directory + "/absent"},
            {"NIXL_TELEMETRY_ENABLE": "perhaps"},
        ):
            with shared.variables(**on | wrong), raises(NixlError):
                make("misled")
        with shared.variables(NIXL_TELEMETRY_ENABLE="y", NIXL_TELEMETRY_EXPORTER="doca"):
            pair = Pair()
        handle = pair.handle()
        wait(pair.near, handle)
        assert pair.near.get_xfer_telemetry(handle).totalBytes == 4096


@shared.behaviour
def what_there_is_no_room_for_is_counted():
    from nixl_async.compat.engine import ENGINE
    from nixl_async.compat.telemetry import DROPPED, TX_BYTES, Telemetry

    class Kept:
        def __init__(self):
            self.events = []

        async def open(self):
            pass

        def export(self, events):
            self.events += events

        async def aclose(self):
            pass

    agent = make("engine", backends=[])
    kept = Kept()
    with shared.variables(NIXL_TELEMETRY_BUFFER_SIZE="10", NIXL_TELEMETRY_RUN_INTERVAL="3600000"):
        telemetry = Telemetry(kept)
    for i in range(4):
        telemetry.add(*[(TX_BYTES, i)] * 4)
    ENGINE.run(telemetry.aclose())
    assert kept.events == [(TX_BYTES, 0)] * 4 + [(TX_BYTES, 1)] * 4 + [(DROPPED, 8)]
    del agent


@shared.behaviour
def telemetry_is_served_to_prometheus():
    port = shared.free_port()
    settings = {"EXPORTER": "prometheus", "PROMETHEUS_PORT": str(port), "PROMETHEUS_LOCAL": "yes", "RUN_INTERVAL": "1"}
    with shared.variables(NIXL_TELEMETRY_ENABLE="y", **{f"NIXL_TELEMETRY_{name}": value for name, value in settings.items()}):
        pair = Pair()
        handle = pair.handle("WRITE", (0,), 4096)
        for _ in range(3):
            wait(pair.near, handle)

        def page():
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                lines = answer.read().decode().splitlines()
            return {line.rpartition(" ")[0]: line.rpartition(" ")[2] for line in lines if not line.startswith("#")}

        labels = f'hostname="{socket.gethostname()}",agent_name="{pair.near.name}"'
        until(lambda: page()[f"agent_tx_bytes_total{{{labels}}}"] == "12288")
        found = page()
        assert found[f"agent_tx_requests_num_total{{{labels}}}"] == "3"
        assert found[f"agent_memory_registered_last_bytes{{{labels}}}"] == str(NBYTES)
        assert (
            found[f'agent_xfer_time_us_bucket{{{labels},le="+Inf"}}'] == found[f"agent_xfer_time_us_count{{{labels}}}"] == "3"
        )
        assert found[f'agent_errors_total{{{labels},status="not_found"}}'] == "0"
        assert sum(pair.far.name in name for name in found) == sum(pair.near.name in name for name in found)
        with raises(urllib.error.HTTPError, "404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5)
        del pair, handle
        gc.collect()
        with raises(urllib.error.URLError):
            page()
        # Where another one has the port, agents work all the same.
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(("127.0.0.1", port))
            taken.listen()
            pair = Pair()
            wait(pair.near, pair.handle())


# With another process.


class Peer:
    def __init__(self, process):
        self.process = process

    def order(self, do, **arguments):
        return self.send({"do": do, **arguments})

    def send(self, message):
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert "error" not in answer, answer
        return answer


@contextmanager
def another(fill=0):
    python = os.environ.get("NIXL_PYTHON")
    environment = {name: value for name, value in os.environ.items() if python is None or name != "PYTHONPATH"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([python or sys.executable, str(WORKER)], **pipes) as process:
        try:
            peer = Peer(process)
            hello = peer.send({"name": "peer", "nbytes": NBYTES, "fill": fill})
            peer.metadata, peer.address = bytes.fromhex(hello["metadata"]), hello["address"]
            yield peer
        finally:
            process.kill()


@shared.behaviour
def bytes_and_notifications_go_both_ways_between_processes():
    with another(fill=7) as peer:
        agent = make("ours")
        memory = np.zeros(NBYTES, np.uint8)
        agent.register_memory([(memory.ctypes.data, NBYTES, 0, "")], "DRAM")
        assert agent.add_remote_agent(peer.metadata) == b"peer"

        def lists(offset, nbytes):
            return [agent.get_xfer_descs([(base + offset, nbytes, 0)], "DRAM") for base in (memory.ctypes.data, peer.address)]

        wait(agent, agent.initialize_xfer("READ", *lists(0, NBYTES), "peer"))
        assert (memory == 7).all()
        memory[:] = np.random.default_rng(6).integers(0, 255, NBYTES, np.uint8)
        pages = NBYTES // 4096
        near = agent.prep_xfer_dlist("", np.array([(memory.ctypes.data, 4096, 0, 4096, pages)], np.uint64), "DRAM")
        far = agent.prep_xfer_dlist("peer", np.array([(peer.address, 4096, 0, 4096, pages)], np.uint64), "DRAM")
        mine, theirs = np.random.default_rng(7).permutation(pages), np.random.default_rng(8).permutation(pages)
        wait(agent, agent.make_prepped_xfer("WRITE", near, mine, far, theirs, b"written\0"))
        assert peer.order("listen")["notifications"] == {"ours": [b"written\0".hex()]}
        expected = np.zeros((pages, 4096), np.uint8)
        expected[theirs] = memory.reshape(pages, 4096)[mine]
        assert bytes.fromhex(peer.order("bytes", start=0, stop=NBYTES)["bytes"]) == expected.tobytes()
        agent.send_notif("peer", b"alone")
        assert peer.order("listen")["notifications"] == {"ours": [b"alone".hex()]}
        assert peer.order("load", metadata=agent.get_agent_metadata().hex())["name"] == "ours"
        there = {"peer": "ours", "local": 0, "remote": memory.ctypes.data, "nbytes": 65536}
        assert peer.order("WRITE", **there, notify="here")["state"] == "DONE"
        assert until(agent.get_new_notifs) == {"peer": [b"here"]}
        assert (memory[:65536] == expected.reshape(-1)[:65536]).all()
        memory[65536:131072] = 9
        assert peer.order("READ", **there | {"remote": memory.ctypes.data + 65536})["state"] == "DONE"
        assert bytes.fromhex(peer.order("bytes", start=0, stop=65536)["bytes"]) == b"\x09" * 65536
        peer.order("notify", peer="ours", payload=b"\xff".hex())
        assert until(agent.get_new_notifs) == {"peer": [b"\xff"]}


@shared.behaviour
def a_peer_that_dies_and_comes_back():
    agent = make("survivor")
    memory = np.zeros(NBYTES, np.uint8)
    agent.register_memory([(memory.ctypes.data, NBYTES, 0, "")], "DRAM")

    def handle(peer):
        sides = [[(memory.ctypes.data, 4096, 0)], [(peer.address, 4096, 0)]]
        return agent.initialize_xfer("READ", *(agent.get_xfer_descs(side, "DRAM") for side in sides), "peer")

    with another(fill=1) as peer:
        agent.add_remote_agent(peer.metadata)
        old = handle(peer)
        wait(agent, old)
        peer.process.kill()
        peer.process.wait()

        def lost():
            try:
                wait(agent, old)
            except shared.bindings.nixlRemoteDisconnectError:
                return True
            return False

        until(lost)
        with raises(shared.bindings.nixlRemoteDisconnectError):
            until(lambda: agent.send_notif("peer", b"x") and False)
        assert agent.check_remote_metadata("peer")
    with another(fill=2) as peer:
        with raises(shared.bindings.nixlNotAllowedError):
            agent.add_remote_agent(peer.metadata)
        agent.remove_remote_agent("peer")
        agent.add_remote_agent(peer.metadata)
        with raises(shared.bindings.nixlNotFoundError):
            agent.transfer(old)
        wait(agent, handle(peer))
        assert (memory[:4096] == 2).all()


@shared.behaviour
def serialised_lists_are_read_by_stock_nixl_and_the_other_way():
    python = os.environ.get("NIXL_PYTHON")
    if python is None:
        return
    agent = make("translator", backends=[])
    code = (
        "import pickle, sys, nixl_cu12._bindings; one = pickle.loads(bytes.fromhex(sys.argv[1]));"
        "one.addDesc((7, 8, 9, 'x')[: len(one[0])]); print(pickle.dumps(one).hex())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for descs, row in (
        (agent.get_xfer_descs([(1, 2, 3)] * 20, "DRAM"), (7, 8, 9)),
        (agent.get_reg_descs([(1, 2, 3, "some meta")], "OBJ"), (7, 8, 9, "x")),
    ):
        sent = agent.get_serialized_descs(descs).hex()
        ran = subprocess.run(
            [python, "-c", code, sent], env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert ran.returncode == 0, ran.stderr
        descs.addDesc(row)
        assert agent.deserialize_descs(bytes.fromhex(ran.stdout.split()[-1])) == descs


# Objects: COMPAT_STORE is a JSON list of NIXL's backend name and its parameters.


def objects():
    plugin, params = json.loads(os.environ["COMPAT_STORE"])
    agent = make(f"objects-{plugin}", backends=[])
    agent.create_backend(plugin, params)
    return agent, plugin


@shared.behaviour
def objects_are_written_read_and_asked_for():
    if "COMPAT_STORE" not in os.environ:
        return
    agent, plugin = objects()
    n, page = 20, 8192
    memory = np.random.default_rng(9).integers(0, 255, n * page, np.uint8)
    sent = memory.copy().reshape(n, page)
    agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
    prefix = f"compat-{os.getpid()}-{time.time_ns()}/"
    names = [f"{prefix}{i}" for i in range(n)]
    registered = agent.register_memory([(0, page, 100 + i, name) for i, name in enumerate(names)], "OBJ")
    asked = [(0, 0, 0, names[0]), (0, 0, 0, prefix + "absent")]
    assert agent.query_memory(asked, plugin, "OBJ") == [None, None]
    near = agent.prep_xfer_dlist("", [(memory.ctypes.data + i * page, page, 0) for i in range(n)], "DRAM")
    far = agent.prep_xfer_dlist(agent.name, [(0, page, 100 + i) for i in range(n)], mem_type="OBJ")
    order = list(range(n))
    wait(agent, agent.make_prepped_xfer("WRITE", near, order, far, order))
    found = agent.query_memory(asked, plugin, mem_type="OBJ")
    assert isinstance(found[0], dict)
    assert found[1] is None
    memory[:] = 0
    wait(agent, agent.make_prepped_xfer("READ", near, order, far, order[::-1]))
    assert (memory.reshape(n, page) == sent[::-1]).all()
    part = [agent.get_xfer_descs([(memory.ctypes.data, 100, 0)], "DRAM"), agent.get_xfer_descs([(50, 100, 103)], "OBJ")]
    wait(agent, agent.initialize_xfer("READ", *part, agent.name))
    assert (memory[:100] == sent[3][50:150]).all()
    with raises(shared.bindings.nixlBackendError):
        agent.initialize_xfer("WRITE", *part, agent.name)
    agent.deregister_memory(registered)
    with raises(shared.bindings.nixlNotFoundError):
        agent.prep_xfer_dlist(agent.name, [(0, page, 100)], mem_type="OBJ")
    agent.register_memory([(0, 0, 7, prefix + "absent")], "OBJ")
    absent = agent.get_xfer_descs([(0, 100, 7)], "OBJ")
    with raises(shared.bindings.nixlBackendError):
        wait(agent, agent.initialize_xfer("READ", part[0], absent, agent.name))


if __name__ == "__main__":
    shared.main(sys.argv[1:])
