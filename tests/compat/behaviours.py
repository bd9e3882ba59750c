"""What programs written against NIXL's Python API rely on, each as a function; run by an interpreter that has a `nixl_cu12`.

The same file runs with NIXL's own wheel and with the drop-in: `python behaviours.py` prints, by name, what went wrong.
Run with NIXL it shows that what is asked of the drop-in is what NIXL does.
"""

import gc
import json
import os
import pickle
import random
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from contextlib import contextmanager, suppress

import numpy as np

PATIENCE_SECONDS = 10.0
NBYTES = 1 << 20
BEHAVIOURS = {}
api = bindings = buffers = None


def behaviour(function):
    BEHAVIOURS[function.__name__] = function
    return function


def load():
    global api, bindings, buffers
    import nixl_cu12._api
    import nixl_cu12._bindings
    import nixl_cu12._utils

    api, bindings, buffers = nixl_cu12._api, nixl_cu12._bindings, nixl_cu12._utils


@contextmanager
def raises(kind, text=None):
    found = None
    try:
        yield
    except kind as error:
        found = error
    assert found is not None, f"{kind.__name__} is not raised"
    assert text is None or text in str(found), str(found)


def until(question):
    end = time.monotonic() + PATIENCE_SECONDS
    while not (found := question()):
        assert time.monotonic() < end, "patience is over"
    return found


def wait(agent, handle, notify=b""):
    state = agent.transfer(handle, notify)
    end = time.monotonic() + PATIENCE_SECONDS
    while state == "PROC":
        assert time.monotonic() < end, "the transfer does not end"
        state = agent.check_xfer_state(handle)
    assert state == "DONE"


def make(name, **options):
    return api.nixl_agent(name, api.nixl_agent_config(**options))


class Pair:
    """Two agents with a mebibyte each; the first has the metadata of the second."""

    count = 0

    def __init__(self, both=False, **options):
        Pair.count += 1
        self.near, self.far = make(f"near{Pair.count}", **options), make(f"far{Pair.count}", **options)
        self.ours = np.random.default_rng(1).integers(0, 255, NBYTES, np.uint8)
        self.theirs = np.random.default_rng(2).integers(0, 255, NBYTES, np.uint8)
        self.mine = self.near.register_memory(self.places(self.ours, [0], NBYTES, ""), "DRAM")
        self.other = self.far.register_memory(self.places(self.theirs, [0], NBYTES, ""), "DRAM")
        self.name = self.near.add_remote_agent(self.far.get_agent_metadata()).decode()
        if both:
            self.far.add_remote_agent(self.near.get_agent_metadata())

    @staticmethod
    def places(memory, offsets, nbytes, *meta):
        return [(memory.ctypes.data + offset, nbytes, 0, *meta) for offset in offsets]

    def descs(self, offsets, nbytes):
        return [self.near.get_xfer_descs(self.places(memory, offsets, nbytes), "DRAM") for memory in (self.ours, self.theirs)]

    def handle(self, operation="WRITE", offsets=(0,), nbytes=4096, notify=b""):
        return self.near.initialize_xfer(operation, *self.descs(offsets, nbytes), self.name, notify)


# Descriptor lists.


@behaviour
def a_list_is_made_of_tuples_and_changed():
    descs = bindings.nixlXferDList(bindings.DRAM_SEG, [(4096, 16, 0), (8192, 32, 1)])
    assert (descs.descCount(), descs.getType(), descs[1], descs.isEmpty()) == (2, bindings.DRAM_SEG, (8192, 32, 1), False)
    descs.addDesc((1, 2, 3))
    assert descs.index((1, 2, 3)) == 2
    descs[0] = (7, 8, 9)
    descs.remDesc(1)
    assert [descs[i] for i in range(2)] == [(7, 8, 9), (1, 2, 3)]
    descs.clear()
    assert descs.isEmpty()
    assert bool(descs)
    with raises(TypeError):
        len(descs)


@behaviour
def a_registration_list_has_meta_as_bytes():
    descs = bindings.nixlRegDList(bindings.OBJ_SEG, [(0, 1, 2, "a key"), (0, 1, 3, b"\0\xff")])
    assert [descs[i] for i in range(2)] == [(0, 1, 2, b"a key"), (0, 1, 3, b"\0\xff")]
    assert descs.trim() == bindings.nixlXferDList(bindings.OBJ_SEG, [(0, 1, 2), (0, 1, 3)])
    assert descs != bindings.nixlRegDList(bindings.OBJ_SEG, [(0, 1, 2, "a key"), (0, 1, 3, "")])


@behaviour
def lists_are_pickled():
    for descs in (
        bindings.nixlXferDList(bindings.VRAM_SEG, [(1, 2, 3), (4, 5, 6)]),
        bindings.nixlXferDList(bindings.DRAM_SEG),
        bindings.nixlRegDList(bindings.FILE_SEG, [(1, 2, 3, "x"), (4, 5, 6, b"|nixlSerDes|")]),
    ):
        assert pickle.loads(pickle.dumps(descs)) == descs


@behaviour
def a_bad_list_is_refused():
    for kind, descs in (
        (ValueError, [(1, 2)]),
        (TypeError, [[1, 2, 3]]),
        (ValueError, np.zeros((2, 3), np.int32)),
        (ValueError, np.zeros((2, 4), np.uint64)),
        (ValueError, np.zeros((2, 6), np.uint64)[:, ::2]),
    ):
        with raises(kind):
            bindings.nixlXferDList(bindings.DRAM_SEG, descs)
    with raises(bindings.nixlNotFoundError, "NIXL_ERR_NOT_FOUND"):
        bindings.nixlXferDList(bindings.DRAM_SEG, [(1, 2, 3)]).index((4, 5, 6))


@behaviour
def get_descs_takes_many_forms():
    agent = make("forms")
    expected = bindings.nixlXferDList(bindings.DRAM_SEG, [(4096, 16, 0), (8192, 16, 0)])
    assert agent.get_xfer_descs([(4096, 16, 0), (8192, 16, 0)], "DRAM") == expected
    assert agent.get_xfer_descs([(4096, 16, 0), (8192, 16, 0)], mem_type="cpu") == expected
    for dtype in (np.uint64, np.int64):
        assert agent.get_xfer_descs(np.array([(4096, 16, 0), (8192, 16, 0)], dtype), "DRAM") == expected
        assert agent.get_reg_descs(np.array([(4096, 16, 0), (8192, 16, 0)], dtype), "DRAM").trim() == expected
    assert agent.get_xfer_descs(expected) is expected
    registered = agent.get_reg_descs([(4096, 16, 0, "m"), (8192, 16, 0, "")], "DRAM")
    assert agent.get_reg_descs(registered) is registered
    assert registered.trim() == expected


@behaviour
def get_descs_returns_none_for_what_it_does_not_take():
    agent = make("none")
    registered = bindings.nixlRegDList(bindings.DRAM_SEG, [(1, 2, 3, "")])
    for wrong in ([(1, 2, 3, 4)], registered, np.zeros((2, 4), np.uint64), [[1, 2, 3]], [1, 2]):
        assert agent.get_xfer_descs(wrong, "DRAM") is None
    for wrong in ([(1, 2, 3)], registered.trim(), np.zeros((2, 4), np.uint64)):
        assert agent.get_reg_descs(wrong, "DRAM") is None
    assert agent.get_xfer_descs([(1, 2, 3)]) is None
    assert agent.get_reg_descs([(1, 2, 3, "")]) is None
    for wrong in ("V-RAM", "dram"):
        with raises(KeyError):
            agent.get_xfer_descs([(1, 2, 3)], wrong)
    with raises(IndexError):
        agent.get_xfer_descs([], "DRAM")


@behaviour
def tensors_are_taken():
    try:
        import torch
    except ImportError:
        return
    pair = Pair()
    source, target = torch.arange(4096, dtype=torch.float32), torch.zeros(4096)
    assert pair.near.register_memory(source)
    pair.far.register_memory([target])
    assert pair.near.get_xfer_descs(source)[0] == (source.data_ptr(), 16384, 0)
    assert pair.near.get_xfer_descs([source[:8], source[8:16]]).descCount() == 2
    strided = torch.zeros(8, 8)[:, ::2]
    assert pair.near.get_xfer_descs(strided) is None
    assert pair.near.get_reg_descs(strided) is None
    pair.near.add_remote_agent(pair.far.get_agent_metadata())
    handle = pair.near.initialize_xfer(
        "WRITE", pair.near.get_xfer_descs(source), pair.near.get_xfer_descs(target), pair.name, b"done"
    )
    wait(pair.near, handle)
    assert torch.equal(source, target)


@behaviour
def serialised_lists_come_back():
    agent = make("serial")
    for descs in (
        agent.get_xfer_descs([(4096, 16, 0)] * 300, "VRAM"),
        agent.get_reg_descs([(4096, 16, 0, "m" * 300)], "DRAM"),
        agent.get_xfer_descs([(1, 2, 3)], "OBJ"),
    ):
        assert agent.deserialize_descs(agent.get_serialized_descs(descs)) == descs


# Agents and backends.


@behaviour
def an_agent_needs_a_name():
    with raises(ValueError):
        api.nixl_agent("")


@behaviour
def an_agent_has_what_programs_touch():
    agent = make("attributes")
    assert (agent.name, agent.notifs, list(agent.backends)) == ("attributes", {}, ["UCX"])
    assert set(agent.nixl_mems) == {"DRAM", "VRAM", "FILE", "BLOCK", "OBJ", "cpu", "cuda"}
    assert set(agent.nixl_ops) == {"READ", "WRITE"}
    assert {"UCX", "POSIX", "OBJ", "GDS", "GDS_MT", "AZURE_BLOB"} <= set(agent.get_plugin_list())
    assert sorted(agent.get_backend_mem_types("UCX")) == ["DRAM_SEG", "VRAM_SEG"]
    assert sorted(agent.get_plugin_mem_types("POSIX")) == ["DRAM_SEG", "FILE_SEG"]
    assert agent.get_plugin_params("POSIX")["ios_pool_size"] == "65536"


@behaviour
def unknown_plugins_have_nothing():
    agent = make("unknown")
    assert (agent.get_plugin_mem_types("UVX"), agent.get_backend_mem_types("UVX")) == ([], [])
    assert (agent.get_plugin_params("UVX"), agent.get_backend_params("UVX")) == ({}, {})
    with raises(bindings.nixlNotFoundError):
        agent.create_backend("UVX")
    assert make("skipped", backends=["UVX"]).backends == {}


@behaviour
def a_backend_is_made_once():
    agent = make("twice")
    with raises(bindings.nixlInvalidParamError):
        agent.create_backend("UCX")
    with raises(KeyError):
        agent.register_memory([(4096, 16, 0, "")], "DRAM", ["POSIX"])


@behaviour
def sync_modes_reach_the_low_layer():
    seen = []
    real = bindings.nixlAgent

    def spy(name, config):
        seen.append(config.syncMode)
        return real(name, config)

    bindings.nixlAgent = spy
    try:
        make("sync0", backends=[])
        make("sync1", backends=[], sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_RW)
        make("sync2", backends=[], enable_listen_thread=True, listen_port=free_port())
    finally:
        bindings.nixlAgent = real
    assert seen == [bindings.NIXL_THREAD_SYNC_NONE, bindings.NIXL_THREAD_SYNC_RW, bindings.NIXL_THREAD_SYNC_STRICT]
    with raises(TypeError, "sync_mode must be a nixl_thread_sync_t"):
        api.nixl_agent_config(sync_mode=1)
    assert len(list(api.nixl_thread_sync_t)) == 3


@behaviour
def the_low_layer_can_be_replaced():
    agent = make("high", backends=[])
    agent.agent = bindings.nixlAgent("low", bindings.nixlAgentConfig())
    agent.plugin_list = agent.agent.getAvailPlugins()
    agent.create_backend("UCX", {})
    memory = np.arange(256, dtype=np.uint8)
    agent.register_memory([(memory.ctypes.data, 256, 0, "")], "DRAM")
    other = make("other")
    assert other.add_remote_agent(agent.get_agent_metadata()) == b"low"


@behaviour
def the_low_layer_alone_moves_bytes():
    config = bindings.nixlAgentConfig()
    config.useProgThread = False
    near, far = bindings.nixlAgent("lownear", config), bindings.nixlAgent("lowfar", config)
    for agent in (near, far):
        agent.createBackend("UCX", {})
    ours, theirs = buffers.malloc_passthru(4096), buffers.malloc_passthru(4096)
    assert ours % 4096 == 0
    buffers.ba_buf(ours, 4096)
    mine = bindings.nixlRegDList(bindings.DRAM_SEG, [(ours, 4096, 0, "")])
    other = bindings.nixlRegDList(bindings.DRAM_SEG, [(theirs, 4096, 0, "")])
    near.registerMem(mine, [])
    far.registerMem(other, [])
    assert near.loadRemoteMD(far.getLocalMD()) == b"lowfar"
    message = "a text with a nul \0 in it"
    handle = near.createXferReq(bindings.NIXL_WRITE, mine.trim(), other.trim(), "lowfar", message)
    assert isinstance(handle, int)
    state, found = near.postXferReq(handle), {}
    end = time.monotonic() + PATIENCE_SECONDS
    while state != bindings.NIXL_SUCCESS or not found:
        if state != bindings.NIXL_SUCCESS:
            state = near.getXferStatus(handle)
        found = far.getNotifs(found)
        assert time.monotonic() < end
    assert found == {"lownear": [message.encode()]}
    buffers.verify_transfer(ours, theirs, 4096)
    near.releaseXferReq(handle)
    near.deregisterMem(mine, [])
    far.deregisterMem(other, [])
    assert near.invalidateRemoteMD("lowfar") == bindings.NIXL_SUCCESS
    for address in (ours, theirs):
        buffers.free_passthru(address)


# Memory.


@behaviour
def registrations_are_counted():
    agent = make("counted")
    memory = np.zeros(4096, np.uint8)
    first = agent.register_memory([(memory.ctypes.data, 4096, 0, "a")], "DRAM")
    agent.register_memory([(memory.ctypes.data, 4096, 0, "b")], "DRAM")
    again = agent.get_reg_descs([(memory.ctypes.data, 4096, 0, "")], "DRAM")
    agent.deregister_memory(again)
    assert agent.prep_xfer_dlist("", first.trim())
    agent.deregister_memory(first)
    with raises(bindings.nixlNotFoundError):
        agent.deregister_memory(first)
    with raises(bindings.nixlNotFoundError):
        agent.prep_xfer_dlist("", first.trim())


@behaviour
def memory_that_no_backend_takes_is_not_found():
    agent = make("nofiles")
    with raises(bindings.nixlNotFoundError):
        agent.register_memory([(0, 10, 3, "")], "FILE")


@behaviour
def host_memory_is_no_vram():
    agent = make("novram")
    memory = np.zeros(4096, np.uint8)
    with raises(bindings.nixlBackendError, "NIXL_ERR_BACKEND"):
        agent.register_memory([(memory.ctypes.data, 4096, 0, "")], "VRAM")


@behaviour
def a_place_lies_in_one_registration():
    pair = Pair()
    memory = np.zeros(8192, np.uint8)
    for half in (0, 4096):
        pair.near.register_memory([(memory.ctypes.data + half, 4096, 0, "")], "DRAM")
    assert pair.near.prep_xfer_dlist("", [(memory.ctypes.data + 4096, 4096, 0)], "DRAM")
    with raises(bindings.nixlNotFoundError):
        pair.near.prep_xfer_dlist("", [(memory.ctypes.data + 2048, 4096, 0)], "DRAM")


# Transfers.


@behaviour
def a_write_and_its_notification():
    pair = Pair()
    handle = pair.handle("WRITE", (0, 8192, 65536), 4096, b"\0written\xff")
    with raises(bindings.nixlNotPostedError):
        pair.near.check_xfer_state(handle)
    wait(pair.near, handle)
    for offset in (0, 8192, 65536):
        assert (pair.theirs[offset : offset + 4096] == pair.ours[offset : offset + 4096]).all()
    assert until(pair.far.get_new_notifs) == {pair.near.name: [b"\0written\xff"]}
    assert pair.far.get_new_notifs() == {}
    assert pair.near.query_xfer_backend(handle) == "UCX"
    pair.near.release_xfer_handle(handle)
    pair.near.release_xfer_handle(handle)


@behaviour
def a_read_of_everything():
    pair = Pair()
    wait(pair.near, pair.handle("READ", (0,), NBYTES))
    assert (pair.ours == pair.theirs).all()


@behaviour
def a_transfer_is_posted_again():
    pair = Pair()
    handle = pair.handle(notify=b"one")
    wait(pair.near, handle)
    pair.ours[:4096] = 9
    wait(pair.near, handle, b"two")
    assert (pair.theirs[:4096] == 9).all()
    got = []
    until(lambda: got.extend(pair.far.get_new_notifs().get(pair.near.name, [])) or len(got) == 2)
    assert got == [b"one", b"two"]


@behaviour
def chosen_places_are_moved():
    pair = Pair()
    n = NBYTES // 1024
    places = [pair.places(memory, range(0, NBYTES, 1024), 1024) for memory in (pair.ours, pair.theirs)]
    near, far = (
        pair.near.prep_xfer_dlist("NIXL_INIT_AGENT", places[0], "DRAM"),
        pair.near.prep_xfer_dlist(pair.name, places[1], "DRAM"),
    )
    mine, theirs = np.random.default_rng(3).permutation(n), np.random.default_rng(4).permutation(n)
    before = pair.ours.copy().reshape(n, 1024)
    for kind in (lambda a: a.astype(np.int32), lambda a: a, lambda a: a.tolist()):
        pair.theirs[:] = 0
        handle = pair.near.make_prepped_xfer("WRITE", near, kind(mine), far, kind(theirs), b"chosen")
        wait(pair.near, handle)
        assert (pair.theirs.reshape(n, 1024)[theirs] == before[mine]).all()
    pair.near.release_dlist_handle(near)


@behaviour
def runs_are_places_without_being_listed():
    pair = Pair()
    runs = [(0, 512, 0, 1024, 256), (512 * 1024, 512, 0, 2048, 128)]
    arrays = [
        np.array([(memory.ctypes.data + start, *rest) for start, *rest in runs], np.uint64)
        for memory in (pair.ours, pair.theirs)
    ]
    with raises(ValueError, "Please specify a mem type for strided descriptors"):
        pair.near.prep_xfer_dlist("", arrays[0])
    near, far = pair.near.prep_xfer_dlist("", arrays[0], "DRAM"), pair.near.prep_xfer_dlist(pair.name, arrays[1], "DRAM")
    starts = np.concatenate([np.arange(256) * 1024, 512 * 1024 + np.arange(128) * 2048])
    chosen = np.array([0, 255, 256, 383, 7], np.int32)
    expected = pair.theirs.copy()
    for mine, theirs in zip(starts[chosen], starts[chosen[::-1]], strict=True):
        expected[theirs : theirs + 512] = pair.ours[mine : mine + 512]
    wait(pair.near, pair.near.make_prepped_xfer("WRITE", near, chosen, far, chosen[::-1].copy()))
    assert (pair.theirs == expected).all()
    with raises(bindings.nixlInvalidParamError):
        pair.near.make_prepped_xfer("WRITE", near, [384], far, [0])
    for wrong in ((0, 512, 0, 1024, 1025), (0, 512, 0, 256, 4), (0, 512, 0, 512, 0)):
        with raises(bindings.nixlNotFoundError):
            pair.near.prep_xfer_dlist("", np.array([(pair.ours.ctypes.data, *wrong[1:])], np.uint64), "DRAM")
    for dtype in (np.int32, np.float64):
        with raises(ValueError):
            pair.near.prep_xfer_dlist("", np.array([(1, 2, 3, 4, 5)], dtype), "DRAM")


@behaviour
def millions_of_places_cost_nothing():
    pair = Pair()
    arrays = [np.array([(memory.ctypes.data, 1, 0, 1, NBYTES)] * 64, np.uint64) for memory in (pair.ours, pair.theirs)]
    near, far = pair.near.prep_xfer_dlist("", arrays[0], "DRAM"), pair.near.prep_xfer_dlist(pair.name, arrays[1], "DRAM")
    last = [64 * NBYTES - 1]
    wait(pair.near, pair.near.make_prepped_xfer("WRITE", near, last, far, last))
    assert pair.theirs[-1] == pair.ours[-1]


@behaviour
def an_agent_is_its_own_remote():
    pair = Pair()
    agent = pair.near
    places = pair.places(pair.ours, range(0, 8192, 1024), 1024)
    near, far = agent.prep_xfer_dlist("", places[:4], "DRAM"), agent.prep_xfer_dlist(agent.name, places[4:], "DRAM")
    handle = agent.make_prepped_xfer("WRITE", near, [0, 1, 2, 3], far, [3, 2, 1, 0], b"to myself")
    wait(agent, handle)
    assert (pair.ours[4096:8192].reshape(4, 1024) == pair.ours[:4096].reshape(4, 1024)[::-1]).all()
    assert until(agent.get_new_notifs) == {agent.name: [b"to myself"]}


@behaviour
def wrong_transfers_are_refused():
    pair = Pair()
    near, far = pair.descs((0,), 64)
    short, two = pair.descs((0,), 32)[1], pair.descs((0, 64), 64)[1]
    outside = pair.near.get_xfer_descs([(pair.theirs.ctypes.data + NBYTES, 64, 0)], "DRAM")
    for kind, arguments in (
        (KeyError, ("RD", near, far, pair.name)),
        (bindings.nixlNotFoundError, ("READ", near, far, "nobody")),
        (bindings.nixlNotFoundError, ("READ", near, outside, pair.name)),
        (bindings.nixlNotFoundError, ("READ", outside, far, pair.name)),
        (bindings.nixlInvalidParamError, ("READ", near, short, pair.name)),
        (bindings.nixlInvalidParamError, ("READ", near, two, pair.name)),
        (TypeError, ("READ", None, far, pair.name)),
    ):
        with raises(kind):
            pair.near.initialize_xfer(*arguments)
    mine, theirs = pair.near.prep_xfer_dlist("", near), pair.near.prep_xfer_dlist(pair.name, far)
    for kind, arguments in (
        (KeyError, ("WR", 0, [], 0, [])),
        (bindings.nixlInvalidParamError, ("WRITE", mine, [1], theirs, [0])),
        (bindings.nixlInvalidParamError, ("WRITE", mine, [-1], theirs, [0])),
        (bindings.nixlInvalidParamError, ("WRITE", mine, [0, 0], theirs, [0])),
        (bindings.nixlInvalidParamError, ("WRITE", mine, [], theirs, [])),
        (bindings.nixlInvalidParamError, ("WRITE", theirs, [0], mine, [0])),
        (bindings.nixlInvalidParamError, ("WRITE", mine, [0], mine, [0])),
    ):
        with raises(kind):
            pair.near.make_prepped_xfer(*arguments)
    with raises(bindings.nixlNotFoundError):
        pair.near.prep_xfer_dlist("nobody", far)


@behaviour
def what_was_right_once_is_still_checked():
    pair = Pair()
    places = [pair.places(memory, range(0, 8192, 1024), 1024) for memory in (pair.ours, pair.theirs)]
    odd = pair.near.prep_xfer_dlist(pair.name, pair.places(pair.theirs, [0], 512), "DRAM")
    for _ in range(3):
        near, far = pair.near.prep_xfer_dlist("", places[0], "DRAM"), pair.near.prep_xfer_dlist(pair.name, places[1], "DRAM")
        for order in ([7, 0, 3], np.array([7, 0, 3]), np.array([7, 0, 3], np.int32)):
            pair.theirs[:] = 0
            wait(pair.near, pair.near.make_prepped_xfer("WRITE", near, order, far, order))
            for i in range(8):
                expected = pair.ours[i * 1024 : i * 1024 + 1024] if i in (0, 3, 7) else np.zeros(1024, np.uint8)
                assert (pair.theirs[i * 1024 : i * 1024 + 1024] == expected).all()
        for arguments in (
            ("WRITE", near, [8], far, [0]),
            ("WRITE", near, [0], far, [-1]),
            ("WRITE", near, [0], far, [0, 1]),
            ("WRITE", near, np.array([], np.int64), far, np.array([], np.int64)),
            ("WRITE", near, [0], odd, [0]),
            ("WRITE", far, [0], near, [0]),
        ):
            with raises(bindings.nixlInvalidParamError):
                pair.near.make_prepped_xfer(*arguments)
        for wrong in ((pair.ours.ctypes.data + NBYTES - 512, 1024, 0), (16, 1024, 0)):
            with raises(bindings.nixlNotFoundError):
                pair.near.prep_xfer_dlist("", [*places[0], wrong], "DRAM")
        with raises(bindings.nixlNotFoundError):
            pair.near.prep_xfer_dlist(
                "", np.array([(pair.ours.ctypes.data, 1024, 0, 1024, NBYTES // 1024 + 1)], np.uint64), "DRAM"
            )


@behaviour
def places_in_many_registrations():
    near, far = make("manynear"), make("manyfar")
    sides = []
    for agent in (near, far):
        memories = [np.random.default_rng(i).integers(0, 255, 65536, np.uint8) for i in range(20)]
        agent.register_memory([(memory.ctypes.data, 65536, 0, "") for memory in memories], "DRAM")
        sides.append(memories)
    near.add_remote_agent(far.get_agent_metadata())
    for _ in range(3):
        lists = [
            [(memory.ctypes.data + offset, 8192, 0) for memory in memories for offset in range(0, 65536, 8192)]
            for memories in sides
        ]
        here, there = near.prep_xfer_dlist("", lists[0], "DRAM"), near.prep_xfer_dlist("manyfar", lists[1], "DRAM")
        mine, theirs = np.random.default_rng(1).permutation(160)[:100], np.random.default_rng(2).permutation(160)[:100]
        expected = np.concatenate(sides[1]).reshape(160, 8192)
        expected[theirs] = np.concatenate(sides[0]).reshape(160, 8192)[mine]
        wait(near, near.make_prepped_xfer("WRITE", here, mine, there, theirs))
        assert (np.concatenate(sides[1]).reshape(160, 8192) == expected).all()
        for memory in sides[0]:
            memory += 1


@behaviour
def handles_that_nobody_holds_are_released():
    pair = Pair()
    for _ in range(100):
        pair.near.transfer(pair.handle())
    gc.collect()
    pair.near.deregister_memory(pair.mine)
    with raises(bindings.nixlNotFoundError):
        pair.handle()


@behaviour
def names_may_be_bytes():
    pair = Pair()
    handle = pair.near.initialize_xfer("WRITE", *pair.descs((0,), 64), pair.name.encode(), "text")
    wait(pair.near, handle)
    pair.near.send_notif(pair.name.encode(), "more")
    got = []
    until(lambda: got.extend(pair.far.get_new_notifs().get(pair.near.name, [])) or len(got) == 2)
    assert sorted(got) == [b"more", b"text"]
    assert pair.near.check_remote_metadata(pair.name.encode())
    assert pair.near.prep_xfer_dlist(pair.name.encode(), pair.descs((0,), 64)[1])
    pair.near.remove_remote_agent(pair.name.encode())
    assert not pair.near.check_remote_metadata(pair.name)


@behaviour
def many_threads_use_one_agent():
    pair = Pair(sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT)
    failed = []

    def work(number):
        try:
            offset = number * 65536
            for round_ in range(20):
                pair.ours[offset : offset + 65536] = number + round_
                handle = pair.handle("WRITE", range(offset, offset + 65536, 4096), 4096, f"{number}".encode())
                wait(pair.near, handle)
                assert (pair.theirs[offset : offset + 65536] == number + round_).all()
                pair.near.release_xfer_handle(handle)
        except BaseException:
            failed.append(traceback.format_exc())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]
    got = []
    until(lambda: got.extend(pair.far.get_new_notifs().get(pair.near.name, [])) or len(got) == 80)
    assert sorted(got) == sorted([b"0", b"1", b"2", b"3"] * 20)


@behaviour
def a_running_event_loop_is_no_obstacle():
    import asyncio

    pair = Pair()

    async def server():
        for nbytes in (4096, NBYTES):
            handle = pair.handle("READ", (0,), nbytes)
            state = pair.near.transfer(handle)
            while state == "PROC":
                await asyncio.sleep(0.001)
                state = pair.near.check_xfer_state(handle)
        return make("inside").get_agent_metadata()

    assert asyncio.run(server())
    assert (pair.ours == pair.theirs).all()


@behaviour
def telemetry_tells_what_was_moved():
    pair = Pair(capture_telemetry=True)
    handle = pair.handle("WRITE", (0, 8192), 64, b"telemetry")
    wait(pair.near, handle)
    found = pair.near.get_xfer_telemetry(handle)
    assert (found.descCount, found.totalBytes) == (2, 128)
    assert found.startTime > 0
    assert found.xferDuration >= found.postDuration > 0
    near = pair.near.prep_xfer_dlist("", pair.places(pair.ours, range(0, 1024, 64), 64), "DRAM")
    far = pair.near.prep_xfer_dlist(pair.name, pair.places(pair.theirs, range(0, 1024, 64), 64), "DRAM")
    for options, n in (({}, 1), ({"skip_desc_merge": True}, 16)):
        handle = pair.near.make_prepped_xfer("WRITE", near, list(range(16)), far, list(range(16)), **options)
        wait(pair.near, handle)
        assert pair.near.get_xfer_telemetry(handle).descCount == n


@behaviour
def telemetry_is_off_by_default():
    pair = Pair()
    handle = pair.handle()
    wait(pair.near, handle)
    with raises(bindings.nixlNoTelemetryError, "NIXL_ERR_NO_TELEMETRY"):
        pair.near.get_xfer_telemetry(handle)


@contextmanager
def variables(**given):
    os.environ.update(given)
    try:
        yield
    finally:
        for name in given:
            del os.environ[name]


def ring(path):
    """Return the events in a telemetry file, as (number, value)."""
    with open(path, "rb") as file:
        raw = file.read()
    written, read, version, again, capacity, mask = struct.unpack_from("@QQiiQQ", raw)
    assert (version, again, mask) == (4, 4, capacity - 1)
    assert len(raw) >= 40 + 16 * capacity
    return [struct.unpack_from("@I4xQ", raw, 40 + 16 * (at & mask)) for at in range(read, written)]


@behaviour
def telemetry_goes_to_a_file():
    with tempfile.TemporaryDirectory() as directory:
        with variables(NIXL_TELEMETRY_ENABLE="y", NIXL_TELEMETRY_DIR=directory, NIXL_TELEMETRY_BUFFER_SIZE="256"):
            pair = Pair()
        wait(pair.near, pair.handle("WRITE", (0, 8192), 64))
        wait(pair.near, pair.handle("READ", (0,), 4096))
        again = pair.handle("WRITE", (0,), 512)
        for _ in range(3):
            wait(pair.near, again)
        with raises(bindings.nixlNotFoundError):
            pair.near.initialize_xfer("READ", *pair.descs((0,), 64), "nobody")
        pair.near.deregister_memory(pair.mine)
        path = os.path.join(directory, pair.near.name)
        until(lambda: any(kind == 5 for kind, _ in ring(path)))
        events = ring(path)
        moved = sorted((kind, value) for kind, value in events if kind < 6)
        sent, received = [(0, 128), *[(0, 512)] * 3], [(1, 4096)]
        assert moved == sorted([*sent, *received, *[(2, 1)] * 4, (3, 1), (4, NBYTES), (5, NBYTES)]), moved
        times = {kind: [value for event, value in events if event == kind] for kind in (6, 7)}
        assert [len(found) for found in times.values()] == [5, 5]
        assert (11, 1) in events


@behaviour
def only_some_telemetry_is_wanted():
    with tempfile.TemporaryDirectory() as directory:
        wanted = "agent_tx_*, agent_memory_deregistered"
        with variables(NIXL_TELEMETRY_ENABLE="y", NIXL_TELEMETRY_DIR=directory, NIXL_TELEMETRY_ENABLED_METRICS=wanted):
            pair = Pair()
            wait(pair.near, pair.handle("WRITE", (0,), 64))
            wait(pair.near, pair.handle("READ", (0,), 64))
            pair.near.deregister_memory(pair.mine)
            path = os.path.join(directory, pair.near.name)
            until(lambda: any(kind == 5 for kind, _ in ring(path)))
        assert sorted(ring(path)) == [(0, 64), (2, 1), (5, NBYTES)]


@behaviour
def a_cost_is_estimated():
    pair = Pair()
    duration, margin, method = pair.near.estimate_xfer_cost(pair.handle())
    assert duration >= 0
    assert margin >= 0
    assert method in ("UNKNOWN", "ANALYTICAL_BACKEND")


# Notifications.


@behaviour
def notifications_are_taken_or_kept():
    pair = Pair()
    for message in (b"x", "text", b"", b"big" * 100_000):
        pair.near.send_notif(pair.name, message)
    sent = sorted([b"x", b"text", b"", b"big" * 100_000])
    until(lambda: sorted(pair.far.update_notifs().get(pair.near.name, [])) == sent)
    assert pair.far.get_new_notifs() == {}
    assert sorted(pair.far.update_notifs()[pair.near.name]) == sent
    pair.far.send_notif(pair.far.name, b"to myself")
    assert until(pair.far.get_new_notifs) == {pair.far.name: [b"to myself"]}
    with raises(bindings.nixlNotFoundError):
        pair.far.send_notif(pair.near.name, b"its metadata was not loaded")


@behaviour
def agents_that_load_each_other_at_once_lose_nothing():
    # An agent of NIXL's own takes a second of CPU time to begin and to end.
    for round_ in range(10 if "nixl_async" in sys.modules else 3):
        agents = [make(f"{side}-{round_}") for side in ("left", "right")]
        blobs = [agent.get_agent_metadata() for agent in agents]
        barrier, failed = threading.Barrier(2), []

        def meet(mine, agents=agents, blobs=blobs, barrier=barrier, failed=failed):
            try:
                barrier.wait()
                name = agents[mine].add_remote_agent(blobs[1 - mine])
                for i in range(5):
                    agents[mine].send_notif(name, f"{i}")
            except BaseException:
                failed.append(traceback.format_exc())

        threads = [threading.Thread(target=meet, args=(mine,)) for mine in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed, failed[0]
        for mine in (0, 1):
            got = []
            until(
                lambda mine=mine, got=got, agents=agents: (
                    got.extend(agents[mine].get_new_notifs().get(agents[1 - mine].name, [])) or len(got) == 5
                )
            )
            assert got == [b"0", b"1", b"2", b"3", b"4"], got


@behaviour
def a_notification_is_looked_for_by_its_tag():
    pair = Pair()
    assert not pair.far.check_remote_xfer_done(pair.near.name, b"")
    pair.near.send_notif(pair.name, b"tag: one")
    until(lambda: pair.far.check_remote_xfer_done(pair.near.name, b""))
    pair.near.send_notif(pair.name, b"tag: two")
    until(lambda: pair.far.check_remote_xfer_done(pair.near.name, b"tag: t"))
    assert not pair.far.check_remote_xfer_done(pair.near.name, b"tag: t")
    pair.near.send_notif(pair.name, b"tag: three")
    assert not pair.far.check_remote_xfer_done(pair.near.name, b"hree")
    until(lambda: pair.far.check_remote_xfer_done(pair.near.name, b"hree", tag_is_prefix=False))


# Metadata.


@behaviour
def metadata_names_its_agent():
    pair = Pair()
    blob = pair.far.get_agent_metadata()
    assert pair.near.add_remote_agent(blob) == pair.name.encode()
    assert pair.near.add_remote_agent(blob) == pair.name.encode()
    for kind, wrong in (
        (bindings.nixlMismatchError, b"junk"),
        (bindings.nixlMismatchError, b""),
        (bindings.nixlInvalidParamError, pair.near.get_agent_metadata()),
    ):
        with raises(kind):
            pair.near.add_remote_agent(wrong)
    with raises(bindings.nixlInvalidParamError):
        make("storage", backends=["POSIX"]).get_agent_metadata()


@behaviour
def what_was_registered_later_is_not_found_until_it_is_loaded():
    pair = Pair()
    late = np.full(4096, 3, np.uint8)
    registered = pair.far.register_memory([(late.ctypes.data, 4096, 0, "")], "DRAM")
    near, far = pair.descs((0,), 4096)[0], pair.near.get_xfer_descs([(late.ctypes.data, 4096, 0)], "DRAM")
    assert not pair.near.check_remote_metadata(pair.name, far)
    with raises(bindings.nixlNotFoundError):
        pair.near.initialize_xfer("READ", near, far, pair.name)
    assert pair.near.add_remote_agent(pair.far.get_partial_agent_metadata(registered)) == pair.name.encode()
    assert pair.near.check_remote_metadata(pair.name, far)
    wait(pair.near, pair.near.initialize_xfer("READ", near, far, pair.name))
    assert (pair.ours[:4096] == 3).all()


@behaviour
def metadata_comes_in_parts():
    near, far = make("partnear"), make("partfar")
    memory = [np.zeros(4096, np.uint8) for _ in range(3)]
    lists = [far.register_memory([(one.ctypes.data, 4096, 0, "")], "DRAM") for one in memory]
    with raises(bindings.nixlNotFoundError):
        near.add_remote_agent(far.get_partial_agent_metadata(lists[0]))
    near.add_remote_agent(far.get_partial_agent_metadata(bindings.nixlRegDList(bindings.DRAM_SEG)))
    assert near.check_remote_metadata("partfar")
    assert not near.check_remote_metadata("partfar", lists[0].trim())
    near.add_remote_agent(far.get_partial_agent_metadata(lists[0]))
    near.add_remote_agent(far.get_partial_agent_metadata(lists[1], inc_conn_info=True))
    assert [near.check_remote_metadata("partfar", one.trim()) for one in lists] == [True, True, False]
    with raises(bindings.nixlNotFoundError):
        far.get_partial_agent_metadata(bindings.nixlRegDList(bindings.DRAM_SEG, [(1, 2, 3, "")]))


@behaviour
def a_removed_agent_is_unknown():
    pair = Pair()
    handle = pair.handle()
    wait(pair.near, handle)
    pair.near.make_connection(pair.name)
    pair.near.remove_remote_agent(pair.name)
    pair.near.remove_remote_agent(pair.name)
    assert not pair.near.check_remote_metadata(pair.name)
    for question in (
        lambda: pair.near.transfer(handle),
        lambda: pair.near.send_notif(pair.name, b"x"),
        lambda: pair.near.make_connection(pair.name),
    ):
        with raises(bindings.nixlNotFoundError):
            question()
    pair.near.add_remote_agent(pair.far.get_agent_metadata())
    with raises(bindings.nixlNotFoundError):
        pair.near.transfer(handle)
    pair.near.release_xfer_handle(handle)
    wait(pair.near, pair.handle())


def free_port():
    # Below those that the kernel gives to connections: what runs beside might get it meanwhile.
    while True:
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("", random.randrange(15000, 32000)))
            return sock.getsockname()[1]


@behaviour
def listeners_exchange_metadata():
    ports = [free_port(), free_port()]
    near, far = (api.nixl_agent(f"listener{i}", api.nixl_agent_config(True, True, port)) for i, port in enumerate(ports))
    memory = np.zeros(4096, np.uint8)
    registered = far.register_memory([(memory.ctypes.data, 4096, 0, "")], "DRAM")
    near.fetch_remote_metadata("listener1", "127.0.0.1", ports[1])
    until(lambda: near.check_remote_metadata("listener1", registered.trim()))
    assert not far.check_remote_metadata("listener0")
    near.send_local_metadata("127.0.0.1", ports[1])
    until(lambda: far.check_remote_metadata("listener0"))
    late = np.zeros(4096, np.uint8)
    more = far.register_memory([(late.ctypes.data, 4096, 0, "")], "DRAM")
    far.send_partial_agent_metadata(more, True, ip_addr="127.0.0.1", port=ports[0])
    until(lambda: near.check_remote_metadata("listener1", more.trim()))
    near.invalidate_local_metadata("127.0.0.1", ports[1])
    until(lambda: not far.check_remote_metadata("listener0"))
    near.fetch_remote_metadata("nobody", "127.0.0.1", free_port())
    for question in (near.send_local_metadata, near.invalidate_local_metadata, lambda: near.fetch_remote_metadata("x")):
        with raises(bindings.nixlInvalidParamError):
            question()


@behaviour
def a_port_that_is_taken_is_refused():
    with socket.socket() as sock:
        sock.bind(("0.0.0.0", 0))
        sock.listen()
        with raises(RuntimeError, "Failed to bind metadata listener socket"):
            make("bound", enable_listen_thread=True, listen_port=sock.getsockname()[1])


# Files.


class Storage:
    def __init__(self, path, nbytes=65536):
        self.agent = make(f"files{path.rpartition('/')[2]}", backends=["POSIX"])
        self.path = path
        self.bytes = np.random.default_rng(5).integers(0, 255, nbytes, np.uint8)
        with open(path, "wb") as file:
            file.write(self.bytes.tobytes())
        self.memory = np.zeros(nbytes, np.uint8)
        self.agent.register_memory([(self.memory.ctypes.data, nbytes, 0, "")], "DRAM")

    def move(self, operation, offset, fd, nbytes=4096, at=0, notify=b""):
        near = self.agent.get_xfer_descs([(self.memory.ctypes.data + at, nbytes, 0)], "DRAM")
        far = self.agent.get_xfer_descs([(offset, nbytes, fd)], "FILE")
        handle = self.agent.initialize_xfer(operation, near, far, self.agent.name, notify)
        wait(self.agent, handle)
        return handle


@contextmanager
def storage():
    with tempfile.TemporaryDirectory() as directory:
        yield Storage(os.path.join(directory, "file"))


@behaviour
def files_are_read_and_written_by_descriptor():
    with storage() as one:
        fd = os.open(one.path, os.O_RDWR)
        one.agent.register_memory([(0, 65536, fd, "")], "FILE")
        one.move("READ", 4096, fd, 8192)
        assert (one.memory[:8192] == one.bytes[4096:12288]).all()
        one.memory[:] = 7
        one.move("WRITE", 100, fd, 1000)
        with open(one.path, "rb") as file:
            now = np.frombuffer(file.read(), np.uint8)
        assert (now[100:1100] == 7).all()
        assert (now[:100] == one.bytes[:100]).all()
        assert (now[1100:] == one.bytes[1100:]).all()
        with raises(bindings.nixlNotFoundError):
            one.move("READ", 65000, fd)
        with raises(bindings.nixlBackendError):
            one.move("READ", 0, fd, notify=b"files take no notifications")
        os.close(fd)


@behaviour
def many_files_in_one_transfer():
    with tempfile.TemporaryDirectory() as directory:
        one = Storage(os.path.join(directory, "many"))
        fds = []
        for i in range(16):
            path = os.path.join(directory, str(i))
            with open(path, "wb") as file:
                file.write(bytes([i]) * 4096)
            fds.append(os.open(path, os.O_RDWR))
        one.agent.register_memory([(0, 4096, fd, "") for fd in fds], mem_type="FILE")
        near = one.agent.prep_xfer_dlist("", [(one.memory.ctypes.data + i * 4096, 4096, 0) for i in range(16)], "DRAM")
        far = one.agent.prep_xfer_dlist(one.agent.name, [(0, 4096, fd) for fd in fds], mem_type="FILE")
        order = list(range(16))
        wait(one.agent, one.agent.make_prepped_xfer("READ", near, order, far, order[::-1]))
        assert [int(page[0]) for page in one.memory.reshape(16, 4096)] == order[::-1]
        assert (one.memory.reshape(16, 4096) == one.memory.reshape(16, 4096)[:, :1]).all()
        one.memory[:] = np.repeat(np.arange(16, dtype=np.uint8) + 100, 4096)
        wait(one.agent, one.agent.make_prepped_xfer("WRITE", near, order, far, order))
        for i, fd in enumerate(fds):
            assert os.pread(fd, 4096, 0) == bytes([100 + i]) * 4096
            os.close(fd)


@behaviour
def files_are_opened_by_name():
    with storage() as one:
        one.agent.register_memory([(0, 65536, 1001, f"ro:{one.path}")], "FILE")
        one.move("READ", 0, 1001)
        assert (one.memory[:4096] == one.bytes[:4096]).all()
        fresh = one.path + ".new"
        created = one.agent.register_memory([(0, 65536, 1002, f"rw,create:{fresh}")], "FILE")
        one.move("WRITE", 0, 1002, 65536)
        one.agent.deregister_memory(created)
        with open(fresh, "rb") as file:
            assert file.read() == one.memory.tobytes()
        with raises(bindings.nixlBackendError):
            one.agent.register_memory([(0, 4096, 1003, f"ro:{one.path}.absent")], "FILE")


@behaviour
def a_length_of_zero_is_no_limit():
    with storage() as one:
        fd = os.open(one.path, os.O_RDWR)
        one.agent.register_memory([(0, 0, fd, "")], "FILE")
        one.move("WRITE", 1 << 20, fd)
        assert os.fstat(fd).st_size == (1 << 20) + 4096
        os.close(fd)


@behaviour
def a_short_file_is_an_error_and_stays_one():
    with storage() as one:
        fd = os.open(one.path, os.O_RDWR)
        one.agent.register_memory([(0, 1 << 20, fd, "")], "FILE")
        near = one.agent.get_xfer_descs([(one.memory.ctypes.data, 4096, 0)], "DRAM")
        handle = one.agent.initialize_xfer("READ", near, one.agent.get_xfer_descs([(65000, 4096, fd)], "FILE"), one.agent.name)
        with raises(bindings.nixlBackendError, "NIXL_ERR_BACKEND"):
            wait(one.agent, handle)
        with raises(bindings.nixlBackendError):
            one.agent.check_xfer_state(handle)
        one.agent.release_xfer_handle(handle)
        with raises(bindings.nixlNotSupportedError):
            one.agent.estimate_xfer_cost(one.move("READ", 0, fd))
        os.close(fd)


@behaviour
def files_are_asked_for():
    with storage() as one:
        found = one.agent.query_memory([(0, 0, 0, one.path), (0, 0, 0, one.path + ".no"), (0, 0, 0, "")], "POSIX", "FILE")
        assert found[0]["size"] == "65536"
        assert set(found[0]) == {"size", "mode", "mtime"}
        assert found[1:] == [None, None]
        assert one.agent.agent.queryMem(bindings.nixlRegDList(bindings.FILE_SEG), one.agent.backends["POSIX"]) == []
        with raises(ValueError):
            one.agent.query_memory([(0, 0, 0, one.path)], "OBJ", "FILE")
        with raises(bindings.nixlBackendError):
            one.agent.get_new_notifs()


def main(names):
    # NIXL's log goes to standard output, which is for the answers here.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    load()
    results = {}
    for name in names or BEHAVIOURS:
        started = time.monotonic()
        try:
            BEHAVIOURS[name]()
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
        print(f"{name}: {time.monotonic() - started:.2f} s {'ok' if not results[name] else results[name]}", file=sys.stderr)
    print(json.dumps(results), file=answers, flush=True)
    answers.close()
    if "nixl_async" not in sys.modules:
        # NIXL's wheel may crash when the interpreter takes it apart.
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
