"""Tensors go between two Ray actors and the driver by a tensor transport; the argument names it: NIXL or NIXL_ASYNC.

NIXL is Ray's own transport, on whatever `import nixl` means here; NIXL_ASYNC is this library's.
"""

import hashlib
import os
import sys
import time

import ray
import torch
from ray.experimental import set_target_for_ref

TRANSPORT = sys.argv[1]
if TRANSPORT == "NIXL_ASYNC":
    from nixl_async.integrations.ray import register

    register()
SHAPES = [((1,), "uint8"), ((1000, 3), "float32"), ((64, 1024), "bfloat16"), ((4, 4 << 20), "uint8")]
ROUNDS = 20
DEATH_SECONDS = 10.0


def made(seed):
    """Return tensors of several shapes and types, of which two share a storage."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for shape, dtype in SHAPES:
        raw = torch.randint(0, 255, shape, dtype=torch.uint8, generator=generator)
        tensors.append(raw.to(getattr(torch, dtype)))
    return [*tensors, tensors[3][1:3]]


def digests(tensors):
    return [hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest() for tensor in tensors]


def registered():
    """Return how many registrations the transport has in this process."""
    from ray.experimental.rdt.util import get_tensor_transport_manager

    manager = get_tensor_transport_manager(TRANSPORT)
    return len(manager._tensor_desc_cache) if TRANSPORT == "NIXL" else len(manager.agent()._storages)


@ray.remote(num_cpus=0, enable_tensor_transport=True)
class Actor:
    def pid(self):
        return os.getpid()

    @ray.method(tensor_transport=TRANSPORT)
    def make(self, seed):
        return made(seed)

    @ray.method(tensor_transport=TRANSPORT)
    def one(self, nbytes):
        return torch.full((nbytes,), 5, dtype=torch.uint8)

    def put(self, seed):
        return [ray.put(made(seed), _tensor_transport=TRANSPORT)]

    def put_many(self, nbytes, n):
        return [ray.put(torch.full((nbytes,), 5, dtype=torch.uint8), _tensor_transport=TRANSPORT) for _ in range(n)]

    def digest(self, tensors):
        return digests(tensors)

    def total(self, tensor):
        return int(tensor.sum(dtype=torch.int64))

    def get_into(self, refs):
        targets = [torch.zeros_like(tensor) for tensor in made(0)]
        set_target_for_ref(refs[0], targets)
        found = ray.get(refs[0])
        assert all(one.data_ptr() == other.data_ptr() for one, other in zip(found, targets, strict=True))
        return digests(targets)

    def read_times(self, refs):
        times = []
        for ref in refs:
            began = time.perf_counter()
            ray.get(ref)
            times.append(time.perf_counter() - began)
        return times

    def registered(self):
        return registered()


def say(text):
    print(f"ray: {TRANSPORT}: {text}", flush=True)


def passing(source, sink):
    from ray.experimental.rdt.util import get_tensor_transport_manager

    assert get_tensor_transport_manager(TRANSPORT).actor_has_tensor_transport(source)
    assert len({ray.get(source.pid.remote()), ray.get(sink.pid.remote()), os.getpid()}) == 3
    for seed in (1, 2):
        assert ray.get(sink.digest.remote(source.make.remote(seed))) == digests(made(seed))
    assert ray.get(source.digest.remote(sink.make.remote(3))) == digests(made(3))
    say(f"{len(SHAPES) + 1} tensors from actor to actor, both ways: bytes equal")
    assert digests(ray.get(source.make.remote(4))) == digests(made(4))
    say("the driver gets an actor's tensors: bytes equal")
    (ref,) = ray.get(source.put.remote(5))
    assert digests(ray.get(ref)) == digests(made(5))
    assert ray.get(sink.get_into.remote(ray.get(source.put.remote(6)))) == digests(made(6))
    say("ray.put, and a get into buffers that were given: bytes equal")
    assert ray.get(sink.digest.remote(ray.put(made(7), _tensor_transport=TRANSPORT))) == digests(made(7))
    say("an actor gets the driver's tensors: bytes equal")


def speed(source, sink):
    refs = ray.get(source.put_many.remote(1 << 20, ROUNDS))
    times = sorted(ray.get(sink.read_times.remote(refs)))
    say(f"ray.get of a 1 MiB tensor p50 {times[len(times) // 2] * 1e3:.2f} ms")


def release(source):
    deadline = time.monotonic() + 30
    while (left := ray.get(source.registered.remote())) and time.monotonic() < deadline:
        # Ray frees objects in its own time; each question is a round trip.
        continue
    assert left == 0, f"{left} registrations are left though no reference is"
    say("when no reference is left, nothing is registered")


def death(sink):
    source = Actor.remote()
    assert ray.get(sink.total.remote(source.one.remote(1000))) == 5000
    ref = source.one.remote(64 << 20)
    ray.wait([ref], timeout=30)
    inner = ray.get(source.put.remote(8))
    began = time.monotonic()
    os.kill(ray.get(source.pid.remote()), 9)
    for how, get in (
        ("as an argument", lambda: ray.get(sink.total.remote(ref), timeout=60)),
        ("by ray.get", lambda: ray.get(inner[0], timeout=60)),
    ):
        try:
            get()
        except Exception as error:
            took = time.monotonic() - began
            assert took < DEATH_SECONDS, f"it took {took:.1f} s"
            say(f"a killed actor's tensor {how}: {type(error).__name__} after {took:.1f} s")
        else:
            raise AssertionError("a killed actor's tensor was got")
    assert ray.get(sink.pid.remote())


def main():
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False, logging_level="error")
    try:
        source, sink = Actor.remote(), Actor.remote()
        passing(source, sink)
        speed(source, sink)
        release(source)
        death(sink)
    finally:
        ray.shutdown()


main()
