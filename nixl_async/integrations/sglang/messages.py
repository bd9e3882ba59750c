"""What prefill and decode ranks say to each other: through SGLang's control sockets, and as notifications of this library.

A decode rank registers once with each prefill rank it gets KV caches from, and sends one request for each of its rooms: frames on
the prefill rank's control socket. A prefill rank answers by notifications. Pure: bytes in, values out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

REGISTRATION = b"nixl_async.registration.1"
REQUEST = b"nixl_async.request.1"
PREFIX = b"sglang/"
"""With what the notifications begin."""

Indices = NDArray[np.int32]


class MalformedMessage(ValueError):
    """Refuse a message that cannot be read, and say what is wrong with it."""


def agent_name(role: str, host: str, port: int) -> str:
    """Return what the agent of the rank is called whose control socket is at `host`:`port`."""
    return f"sglang-{role}@{host}:{port}"


@dataclass(frozen=True)
class Geometry:
    """How a rank lays out its buffers: what `KVArgs` says of them, without addresses, which the agent's own metadata has.

    Lists of `kv_` have one entry for each KV buffer, those of `state_` one list for each component. Sizes are in bytes.
    """

    tp_size: int
    tp_rank: int
    dcp_size: int
    dcp_rank: int
    page_size: int
    kv_item_lens: list[int]
    kv_layer_ids: list[int]
    aux_item_lens: list[int]
    state_types: list[str]
    state_item_lens: list[list[int]]
    state_dims: list[list[int]]
    state_layer_ids: list[list[int]]


@dataclass(eq=False)
class Registration:
    """A decode rank as a prefill rank knows it: where its control socket is, how its agent is reached, and its geometry."""

    endpoint: str
    dst_port: int
    agent: str
    geometry: Geometry
    metadata: bytes
    token: bytes
    requires_dcp_relayout: bool = False
    """SGLang asks for it; a rank whose pages must be relaid is refused."""

    def encode(self) -> list[bytes]:
        """Return the message's frames."""
        fields = {"endpoint": self.endpoint, "port": self.dst_port, "agent": self.agent, "geometry": vars(self.geometry)}
        return [REGISTRATION, json.dumps(fields).encode(), self.metadata, self.token]

    @classmethod
    def decode(cls, frames: Sequence[bytes]) -> Registration:
        """Read the message's frames.

        Raises:
            MalformedMessage: they are none of this version of the library.
        """
        try:
            _, text, metadata, token = frames
            found = json.loads(text)
            geometry = Geometry(**found["geometry"])
            return cls(str(found["endpoint"]), int(found["port"]), str(found["agent"]), geometry, metadata, token)
        except (KeyError, TypeError, ValueError) as error:
            raise MalformedMessage(f"a registration of {len(frames)} frames cannot be read: {error!r}") from None


@dataclass(eq=False)
class TransferInfo:
    """Where one decode rank wants a room's KV cache; SGLang reads some of the attributes, by their names.

    `kv_indices` are pages of its KV buffers; `state_indices` has what SGLang gives for each state component, `None` for nothing.
    """

    room: int
    endpoint: str
    dst_port: int
    agent: str
    required_dst_info_num: int
    kv_indices: Indices
    aux_index: int | None = None
    state_indices: list[Indices | None] = field(default_factory=list)
    decode_prefix_len: int = 0
    is_dummy: bool = False

    def encode(self) -> list[bytes]:
        """Return the message's frames."""
        fields = {
            "room": self.room,
            "endpoint": self.endpoint,
            "port": self.dst_port,
            "agent": self.agent,
            "needed": self.required_dst_info_num,
            "aux": self.aux_index,
            "prefix": self.decode_prefix_len,
            "dummy": self.is_dummy,
            "state": [indices is not None for indices in self.state_indices],
        }
        there = [indices for indices in self.state_indices if indices is not None]
        return [REQUEST, json.dumps(fields).encode(), *(indices.tobytes() for indices in (self.kv_indices, *there))]

    @classmethod
    def decode(cls, frames: Sequence[bytes]) -> TransferInfo:
        """Read the message's frames.

        Raises:
            MalformedMessage: they are none of this version of the library.
        """
        try:
            found = json.loads(frames[1])
            kv, *rest = (np.frombuffer(frame, np.int32) for frame in frames[2:])
            states = iter(rest)
            return cls(
                int(found["room"]),
                str(found["endpoint"]),
                int(found["port"]),
                str(found["agent"]),
                int(found["needed"]),
                kv,
                None if found["aux"] is None else int(found["aux"]),
                [next(states) if there else None for there in found["state"]],
                int(found["prefix"]),
                bool(found["dummy"]),
            )
        except (KeyError, TypeError, ValueError, IndexError, StopIteration) as error:
            raise MalformedMessage(f"a request of {len(frames)} frames cannot be read: {error!r}") from None


def note(kind: str, **fields: Any) -> bytes:
    """Return a notification of a prefill rank.

    `hello` has `rank`; `status` has `room`, `status`, `rank`, `reason`; `ack` has `room`, `rank`, `generation`.
    """
    return PREFIX + json.dumps({"k": kind, **fields}).encode()


def read_note(payload: bytes) -> dict[str, Any]:
    """Read what `note` made.

    Raises:
        MalformedMessage: it is no such notification.
    """
    try:
        found = json.loads(payload.removeprefix(PREFIX))
        if not isinstance(found, dict) or not isinstance(found.get("k"), str):
            raise TypeError(found)
    except (TypeError, ValueError) as error:
        raise MalformedMessage(f"notification {payload[:64]!r} cannot be read: {error!r}") from None
    return found


def as_indices(values: Any) -> Indices:
    """Return what SGLang gives for page indices as a flat array of int32."""
    return np.ascontiguousarray(values, np.int32).ravel()
