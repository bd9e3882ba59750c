"""The contract's own tools: waiting until it is quiet, mapping errors, loading by name."""

from __future__ import annotations

import asyncio

import pytest

from nixl_async import AccessError, BackendError, ConfigurationError, MissingDependency, PeerLost, StorageBackend, load_backend
from nixl_async.backend import BUILT_IN, Backend, Op, StoreAddress, map_errors, quiesce
from nixl_async.cuda import device_count
from nixl_async.descriptors import Side


class Idle(Backend):
    name = "idle"

    def refusal(self, src: Side, dst: Side) -> str | None:
        return "it copies nothing"

    async def copy(self, op: Op) -> None:
        raise BackendError("it copies nothing")


async def test_quiesce_waits_through_any_number_of_cancellations() -> None:
    work: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    stops: list[int] = []
    task = asyncio.create_task(quiesce(work, lambda: stops.append(1)))
    for _ in range(3):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    assert stops == [1]
    work.set_result(5)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_quiesce_returns_or_raises_what_the_work_did() -> None:
    loop = asyncio.get_running_loop()
    done, failed, cancelled = loop.create_future(), loop.create_future(), loop.create_future()
    done.set_result(5)
    failed.set_exception(BackendError("on purpose"))
    cancelled.cancel()
    assert await quiesce(done) == 5
    with pytest.raises(BackendError):
        await quiesce(failed)
    with pytest.raises(asyncio.CancelledError):
        await quiesce(cancelled)


async def test_a_cancelled_wait_for_work_that_fails_is_a_cancellation() -> None:
    work: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(quiesce(work, lambda: work.set_exception(BackendError("stopped"))))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_errors_are_mapped_at_the_boundary() -> None:
    mapping: dict[type[BaseException], type[BackendError] | type[AccessError]] = {PermissionError: AccessError}
    with pytest.raises(AccessError, match="no"), map_errors("x", mapping, peer="p"):  # type: ignore[arg-type]
        raise PermissionError("no")
    with pytest.raises(BackendError, match="KeyError") as caught, map_errors("x", peer="p"):
        raise KeyError("k")
    assert isinstance(caught.value.__cause__, KeyError)
    assert (caught.value.backend, caught.value.peer) == ("x", "p")
    with pytest.raises(PeerLost), map_errors("x"):
        raise PeerLost("as it was")
    with pytest.raises(asyncio.CancelledError), map_errors("x"):
        raise asyncio.CancelledError


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_ours_are_loaded_by_name(name: str) -> None:
    if name == "ucx":
        pytest.importorskip("ucxx")
    if name in ("cuda", "cuda_ipc", "gds"):
        # They say why they cannot be there; where they can, the tests in tests/gpu load them.
        if device_count() == 0:
            with pytest.raises(MissingDependency, match="libcuda"):
                load_backend(name)
        return
    assert load_backend(name).name == name


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(
        ConfigurationError, match=r"warp.*azure, cuda, cuda_ipc, directory.*memory.*samehost, staging, tcp, ucx"
    ):
        load_backend("warp")


async def test_what_most_backends_need_not_say_has_a_default() -> None:
    idle = Idle()
    assert (idle.describe(), idle.copy_now(Op(0, None, None, False))) == (b"", False)  # type: ignore[arg-type]
    await idle.listen("127.0.0.1")
    await idle.disconnect("p")
    with pytest.raises(BackendError, match="no notifications"):
        await idle.send_notification("p", b"")
    await idle.aclose()


async def test_a_storage_backend_need_not_answer_questions() -> None:
    class Silent(StorageBackend):
        name = "silent"

        def refusal(self, src: Side, dst: Side) -> str | None:
            return None

        async def copy(self, op: Op) -> None:
            pass

    silent, address = Silent(), StoreAddress("quiet", "b", "p/", (("secret", "s"),))
    assert (str(address), "'s'" in repr(address)) == ("quiet://b/p/", False)
    await silent.open_store(address)
    for call in (silent.stat(address, ["k"]), silent.delete(address, ["k"]), silent.upload(address, "k", 1)):
        with pytest.raises(BackendError, match="silent"):
            await call
    with pytest.raises(BackendError, match="silent"):
        silent.list(address, "")
