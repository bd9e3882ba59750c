from __future__ import annotations

import asyncio
import inspect
import pickle

import pytest

from nixl_async import errors
from nixl_async.errors import NixlError, NoRoute, NotFoundError, PartsFailed, PeerLost, TransferError

ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]
COUSINS = {
    errors.ConfigurationError: ValueError,
    errors.MissingDependency: ImportError,
    errors.DescriptorError: ValueError,
    errors.AuthenticationError: PermissionError,
    errors.ProtocolError: ConnectionError,
    errors.NotFoundError: FileNotFoundError,
    errors.AccessError: PermissionError,
    errors.PeerLost: ConnectionError,
    errors.ConflictError: FileExistsError,
    errors.OutOfSpace: errors.BackendError,
    errors.IntegrityError: errors.BackendError,
}


@pytest.mark.parametrize("kind", ALL)
def test_every_error_has_the_one_root_and_can_be_made_from_a_sentence(kind: type[Exception]) -> None:
    error = kind("a sentence")
    assert isinstance(error, NixlError)
    assert str(error) == "a sentence"
    assert kind.__doc__


@pytest.mark.parametrize("kind", ALL)
def test_every_error_survives_pickling(kind: type[Exception]) -> None:
    error = kind("a sentence")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == "a sentence"


@pytest.mark.parametrize(("kind", "cousin"), COUSINS.items())
def test_cousins_from_the_standard_library_catch_ours(kind: type[NixlError], cousin: type[Exception]) -> None:
    with pytest.raises(cousin, match="a sentence"):
        raise kind("a sentence")


def test_the_docstring_draws_every_error() -> None:
    drawn = errors.__doc__ or ""
    assert [kind.__name__ for kind in ALL if kind.__name__ not in drawn] == []


def test_a_transfer_error_carries_its_facts() -> None:
    history = [(1.0, "QUEUED", "admit", "ACTIVE")]
    error = PeerLost("gone", transfer_id=7, backend="tcp", peer="decode-0", retryable=True, history=history)
    assert (error.transfer_id, error.backend, error.peer, error.retryable) == (7, "tcp", "decode-0", True)
    assert error.history == tuple(history)
    plain = TransferError("gone")
    assert (plain.transfer_id, plain.backend, plain.peer, plain.retryable, plain.history) == (None, None, None, False, ())


def test_facts_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(PeerLost("gone", transfer_id=7, backend="tcp", peer="p", retryable=True)))
    assert (str(error), error.transfer_id, error.backend, error.peer, error.retryable) == ("gone", 7, "tcp", "p", True)


def test_no_route_lists_who_refused() -> None:
    assert NoRoute("none", {"tcp": "not connected"}).refusals == {"tcp": "not connected"}
    assert NoRoute("none").refusals == {}


def test_a_timeout_or_cancellation_is_none_of_ours() -> None:
    assert not issubclass(asyncio.CancelledError, NixlError)
    assert [kind for kind in ALL if issubclass(kind, TimeoutError | asyncio.CancelledError)] == []


def test_failed_parts_survive_pickling() -> None:
    error = PartsFailed("2 objects failed", {3: NotFoundError("gone", backend="s3")}, backend="s3")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.backend, list(copy.parts), str(copy.parts[3])) == ("2 objects failed", "s3", [3], "gone")
    assert PartsFailed("none").parts == {}
