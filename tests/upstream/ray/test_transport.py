"""This library's tensor transport without a cluster: two of it in one process, as Ray would call them."""

import gc
import time

import pytest
import torch
from ray.exceptions import RayDirectTransportError

from nixl_async.integrations.ray import NixlAsyncTensorTransport, _Agent

LARGE_NBYTES = 256 << 20


@pytest.fixture(name="ends")
def two_ends(monkeypatch):
    monkeypatch.setattr("nixl_async.agent.DEFAULT_BACKENDS", ("memory", "samehost", "tcp"))
    made = []
    for name in ("source", "sink"):
        end = NixlAsyncTensorTransport()
        end._agent = _Agent(name, "127.0.0.1")
        made.append(end)
    yield made
    for end in made:
        end._agent.run(end._agent._aclose())


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def fetch(sink, obj_id, metadata, targets=None):
    return sink.fetch_multiple_tensors(obj_id, metadata, sink.get_communicator_metadata(None, None), targets)


def test_tensors_of_all_kinds_arrive(ends):
    source, sink = ends
    base = torch.arange(1000, dtype=torch.float32)
    tensors = [
        base,
        base[10:20],
        torch.zeros(0, 3),
        torch.tensor(7, dtype=torch.int64),
        torch.ones(3, 5, dtype=torch.bfloat16),
    ]
    metadata = source.extract_tensor_transport_metadata("object", tensors)
    assert len(source.agent()._storages) == 3
    for targets in (None, [torch.zeros_like(tensor) for tensor in tensors]):
        found = sink.recv_multiple_tensors("object", metadata, sink.get_communicator_metadata(None, None), targets)
        assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(found, tensors, strict=True))
    assert all(
        torch.equal(*pair) for pair in zip(source.recv_multiple_tensors("object", metadata, None), tensors, strict=True)
    )
    until(lambda: not sink.agent()._storages)
    source.garbage_collect("object", metadata, tensors)
    assert not source.agent()._storages
    assert sink.recv_multiple_tensors("nothing", source.extract_tensor_transport_metadata("nothing", []), None) == []


def test_an_object_that_is_gone_is_an_error(ends):
    source, sink = ends
    metadata = source.extract_tensor_transport_metadata("object", [torch.ones(1000)])
    sink.recv_multiple_tensors("object", metadata, None)
    source.garbage_collect("object", metadata, [])
    source.garbage_collect("object", metadata, [])
    for reader in (sink, source):
        with pytest.raises(RayDirectTransportError, match="NotFoundError"):
            reader.recv_multiple_tensors("object", metadata, None)
    source.agent().run(source.agent()._aclose())
    with pytest.raises(RayDirectTransportError, match="PeerLost"):
        sink.recv_multiple_tensors("object", metadata, None)


def test_a_retried_task_and_memory_that_is_kept(ends):
    source, sink = ends
    weights = torch.ones(1000)
    source.register_memory(weights)
    name = next(iter(source.agent()._storages.values())).region.name
    for _ in range(2):
        metadata = source.extract_tensor_transport_metadata("object", [weights[:10]])
        assert metadata.places == [(name, 0, 40)]
    assert sink.recv_multiple_tensors("object", metadata, None)[0].sum() == 10
    source.garbage_collect("object", metadata, [])
    assert [held.users for held in source.agent()._storages.values()] == [1]
    source.deregister_memory(weights)
    source.deregister_memory(weights)
    assert not source.agent()._storages


def test_a_late_fetch_is_quiet_when_it_says_so(ends):
    source, sink = ends
    metadata = source.extract_tensor_transport_metadata("object", [torch.ones(LARGE_NBYTES, dtype=torch.uint8)])
    target = torch.zeros(LARGE_NBYTES, dtype=torch.uint8)
    request = fetch(sink, "object", metadata, [target])
    with pytest.raises(TimeoutError):
        sink.wait_fetch_complete(request, 0)
    with pytest.raises(TimeoutError):
        sink.wait_fetch_complete(request, 1e-6)
    target.fill_(2)
    with pytest.raises(RayDirectTransportError, match="aborted"):
        sink.wait_fetch_complete(request)
    assert (target == 2).all()
    assert not sink.agent()._fetches
    until(lambda: not sink.agent()._storages)


def test_an_aborted_fetch_is_quiet_before_or_after_it_began(ends):
    source, sink = ends
    metadata = source.extract_tensor_transport_metadata("object", [torch.ones(LARGE_NBYTES, dtype=torch.uint8)])
    target = torch.zeros(LARGE_NBYTES, dtype=torch.uint8)
    request = fetch(sink, "object", metadata, [target])
    sink.abort_transport("object", None)
    target.fill_(2)
    with pytest.raises(RayDirectTransportError, match="aborted"):
        sink.wait_fetch_complete(request)
    sink.abort_transport("object", None)
    with pytest.raises(RayDirectTransportError, match="aborted"):
        sink.recv_multiple_tensors("object", metadata, None, [target])
    assert (target == 2).all()
    assert sink.recv_multiple_tensors("object", metadata, None)[0].float().mean() == 1


def test_a_fetch_that_nobody_holds_is_cancelled(ends):
    source, sink = ends
    metadata = source.extract_tensor_transport_metadata("object", [torch.ones(LARGE_NBYTES, dtype=torch.uint8)])
    request = fetch(sink, "object", metadata)
    del request
    gc.collect()
    until(lambda: not sink.agent()._fetches and not sink.agent()._storages)


def test_what_cannot_be_sent_is_refused(ends):
    source, _ = ends
    with pytest.raises(ValueError, match="not contiguous"):
        source.extract_tensor_transport_metadata("object", [torch.ones(10, 10).t()])
    with pytest.raises(ValueError, match="one type"):
        source.extract_tensor_transport_metadata("object", [torch.ones(1), torch.ones(1, device="meta")])
    with pytest.raises(NotImplementedError):
        source.send_multiple_tensors([], None, None)
    assert source.is_one_sided()
    assert source.can_abort_transport()
    assert source.tensor_transport_backend() == "NIXL_ASYNC"
