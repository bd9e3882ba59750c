"""The scheduler's half of the connector: which requests are received and sent, and whose blocks have to wait. No networking."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.utils import yield_req_data
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.request import Request, RequestStatus

from nixl_async import ConfigurationError
from nixl_async.integrations.vllm.decode import Receive
from nixl_async.integrations.vllm.layout import first_spec
from nixl_async.integrations.vllm.options import Advance, Finish, NixlAsyncHandshake, NixlAsyncMetadata, Options, Release

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput

logger = logging.getLogger("nixl_async.integrations.vllm")

CLAIMS_A_LEASE = 5
"""How often a waiting request renews its lease within one."""
SENT_STATUSES = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)


@dataclass(frozen=True)
class _Origin:
    """Where a request was prefilled."""

    transfer: str
    addresses: tuple[str, ...]
    tokens: int | None
    """How many of its tokens are there; None while the prefill may not have ended."""


class SchedulerSide:
    """What `NixlAsyncConnector` does in the scheduler's process."""

    def __init__(self, config: VllmConfig, options: Options, caches: KVCacheConfig, engine: str) -> None:
        self._options, self._caches, self._engine = options, caches, engine
        self._tp = config.parallel_config.tensor_parallel_size
        self._addresses: list[str] = []
        self._news = NixlAsyncMetadata()
        # Decode: what is waited for, from when a request is known to when it is here or over.
        self._claims: dict[str, _Origin] = {}
        self._claimed_at = float("-inf")
        self._receiving: set[str] = set()
        # Prefill: what is being computed for somebody else, its blocks so far, and its length.
        self._prefilling: dict[str, str] = {}
        self._blocks: dict[str, list[list[int]]] = {}
        self._prompts: dict[str, int] = {}
        self._sizes = [group.kv_cache_spec.block_size for group in caches.transfer_groups]
        self._windowed = tuple(
            not isinstance(first_spec(group.kv_cache_spec), FullAttentionSpec) for group in caches.transfer_groups
        )

    def set_addresses(self, metadata: Mapping[int, KVConnectorHandshakeMetadata]) -> None:
        """Take note of where this engine's workers are served."""
        found = [metadata[rank] for rank in sorted(metadata)]
        if len(found) != self._tp or not all(isinstance(one, NixlAsyncHandshake) for one in found):
            raise ConfigurationError(
                f"{self._tp} workers of NixlAsyncConnector are expected, and {found!r} say where they are"
            )
        self._addresses = [one.address for one in found if isinstance(one, NixlAsyncHandshake)]

    # Decode.

    def on_new_request(self, request: Request) -> None:
        """Claim what a request will want as soon as it is known."""
        origin = self._origin(request)
        if origin is not None:
            self._claims[request.request_id] = origin
            self._news.claim.setdefault(origin.addresses, []).append(origin.transfer)

    def matched_tokens(self, request: Request, computed: int) -> tuple[int, bool]:
        """Return how many tokens after the first `computed` come from elsewhere, and whether the request waits for them."""
        origin = self._origin(request)
        if origin is None:
            return 0, False
        count = max(0, self._there(request, origin) - computed)
        return count, count > 0 and not self._in_step(origin)

    def allocated(self, request: Request, blocks: KVCacheBlocks, external: int) -> None:
        """Take note of the blocks of a request that is scheduled."""
        params = request.kv_transfer_params or {}
        name = request.request_id
        if params.get("do_remote_decode"):
            if name not in self._prefilling:
                self._prefilling[name] = str(params.get("transfer_id") or name)
                self._prompts[name] = request.num_prompt_tokens
                self._news.begin[name] = self._prefilling[name]
            return
        origin = self._origin(request)
        if origin is None:
            return
        # One transfer a request: scheduled again, after a preemption, it computes what it lost.
        params["do_remote_prefill"] = False
        if external <= 0:
            self._claims.pop(name, None)
            self._news.release.append(Release(name, origin.transfer, origin.addresses))
            return
        there = self._there(request, origin)
        index, taken = [], []
        for group, size in zip(self._caches.transfer_group_ids, self._sizes, strict=True):
            # What is here already, `there - external` tokens, ends where a block does.
            places = range((there - external) // size, min(-(-there // size), len(blocks.blocks[group])))
            mine = [(at, blocks.blocks[group][at].block_id) for at in places if not blocks.blocks[group][at].is_null]
            index.append(tuple(at for at, _ in mine))
            taken.append(tuple(block for _, block in mine))
        sync = self._in_step(origin)
        where = tuple(index), tuple(taken), self._windowed
        self._news.receive.append(
            Receive(name, origin.transfer, origin.addresses, *where, early=origin.tokens is None, sync=sync)
        )
        if sync:
            self._claims.pop(name, None)
        else:
            self._receiving.add(name)

    def output(self, output: KVConnectorOutput) -> None:
        """Take note of what the workers report."""
        for name in output.finished_recving or ():
            self._receiving.discard(name)
            self._claims.pop(name, None)

    # Both.

    def finished(self, request: Request, blocks: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        """Tell whether a finished request's blocks must wait, and what the other side has to know of them."""
        params, name = request.kv_transfer_params, request.request_id
        origin = self._origin(request)
        self._claims.pop(name, None)
        if name in self._receiving:
            # It was aborted while its KV cache is on its way: the scheduler waits until it is reported.
            self._news.cancel.add(name)
        elif origin is not None:
            # It was aborted before it was scheduled.
            self._news.release.append(Release(name, origin.transfer, origin.addresses))
        transfer = self._prefilling.pop(name, None)
        self._blocks.pop(name, None)
        self._prompts.pop(name, None)
        if transfer is None:
            if params and params.get("do_remote_decode") and params.get("transfer_id"):
                # It never began; who asked for it early need not wait.
                self._news.begin[name] = str(params["transfer_id"])
                self._news.abort[name] = False
            return False, None
        mine = [list(one) for one in self._caches.select_transfer_block_ids(blocks)]
        if request.status not in SENT_STATUSES or not any(mine):
            # What is on its way is read from its blocks until the workers say that it is not.
            self._news.abort[name] = True
            return True, None
        tokens = request.num_computed_tokens
        self._news.finish.append(Finish(name, transfer, mine, tokens, self._options.lease_seconds))
        return True, {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": transfer,
            "transfer_mode": self._options.mode,
            "remote_engine_id": self._engine,
            "remote_request_id": name,
            # For routers that look at them; the prefill side says itself what is where.
            "remote_block_ids": mine,
            "remote_addresses": list(self._addresses),
            "remote_num_tokens": tokens,
            "tp_size": self._tp,
        }

    def step(self, output: SchedulerOutput) -> NixlAsyncMetadata:
        """Return the news for the workers, and begin to collect the next."""
        if self._claims and time.monotonic() - self._claimed_at >= self._options.lease_seconds / CLAIMS_A_LEASE:
            self._claimed_at = time.monotonic()
            claims: dict[tuple[str, ...], list[str]] = {}
            for origin in self._claims.values():
                claims.setdefault(origin.addresses, []).append(origin.transfer)
            self._news.claim = claims
        news, self._news = self._news, NixlAsyncMetadata()
        if self._prefilling and not any(self._windowed):
            news.preempted = {name for name in output.preempted_req_ids or () if name in self._prefilling}
            for name in news.preempted:
                self._blocks.pop(name, None)
            self._advance(output, news)
        return news

    def _advance(self, output: SchedulerOutput, news: NixlAsyncMetadata) -> None:
        before = {one.req_id: one.num_computed_tokens for one in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        before.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for name, groups, whole in yield_req_data(output):
            if name not in self._prefilling:
                continue
            if whole or name not in self._blocks:
                self._blocks[name] = [[] for _ in self._caches.transfer_group_ids]
            if groups is not None:
                for mine, added in zip(self._blocks[name], self._caches.select_transfer_block_ids(groups), strict=True):
                    mine.extend(added)
            tokens = before[name] + output.num_scheduled_tokens[name]
            final = tokens >= self._prompts[name]
            blocks = [list(one) for one in self._blocks[name]]
            news.advance.append(Advance(name, blocks, min(tokens, self._prompts[name]), final))

    def _there(self, request: Request, origin: _Origin) -> int:
        """Return how many of a request's first tokens come from elsewhere, those that are here already included."""
        there = request.num_prompt_tokens if origin.tokens is None else min(origin.tokens, request.num_prompt_tokens)
        # A request that is scheduled has to compute something.
        return int(min(there, request.num_tokens - 1) if self._in_step(origin) else there)

    def _in_step(self, origin: _Origin) -> bool:
        """Tell whether a request is loaded by the step that schedules it: never where the prefill may take its time."""
        return self._options.load == "sync" and origin.tokens is not None

    def _origin(self, request: Request) -> _Origin | None:
        """Return where a request's KV cache is to come from, if from anywhere."""
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_prefill"):
            return None
        transfer = params.get("transfer_id") or params.get("remote_request_id")
        addresses = tuple(params.get("remote_addresses") or ())
        if not addresses and params.get("remote_host") and params.get("remote_port"):
            host, port = params["remote_host"], int(params["remote_port"])
            host = f"[{host}]" if ":" in host else host
            addresses = tuple(f"{host}:{port + rank}" for rank in range(int(params.get("tp_size") or 1)))
        if not transfer or not addresses:
            logger.warning(
                "request %s is computed here: its kv_transfer_params %r lack transfer_id, or both remote_addresses and"
                " remote_host with remote_port",
                request.request_id,
                params,
            )
            params["do_remote_prefill"] = False
            return None
        tokens = params.get("remote_num_tokens")
        return _Origin(str(transfer), addresses, None if tokens is None else int(tokens))
