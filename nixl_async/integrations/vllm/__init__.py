"""vLLM's KV connector on this library: `NixlAsyncConnector`, between prefill and decode engines of vLLM.

Choose it with `--kv-transfer-config`:

    {"kv_connector": "NixlAsyncConnector", "kv_connector_module_path": "nixl_async.integrations.vllm", "kv_role": "kv_producer",
     "kv_connector_extra_config": {"mode": "push"}}

Installed, the library also registers the name with vLLM (entry point `vllm.general_plugins`), and `kv_connector_module_path` may
be left out. `Options` of `options.py` are the keys of `kv_connector_extra_config`; all have defaults, but both engines need
the same NIXL_ASYNC_TOKEN. Routers for vLLM's NixlConnector work unchanged: what the prefill engine returns as `kv_transfer_params`
goes to the decode engine. One that sends a request to both at once gives both a `transfer_id`, and the decode engine
`remote_addresses`, or `remote_host`, `remote_port` and `tp_size`; with `layerwise` the layers then travel while the prefill
computes the next.

The scheduler's half (`scheduler.py`) tells the workers' half (`worker.py`) once a step; that runs an agent on a thread of
its own (`node.py`), the prefill's part in `prefill.py` and `outgoing.py`, the decode's in `decode.py`. Tensor
parallelism may differ between the engines; pipeline and context parallelism are refused, and so are states that are no pages
(Mamba).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, MambaSpec
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from nixl_async import ConfigurationError
from nixl_async.integrations.vllm.layout import first_spec
from nixl_async.integrations.vllm.options import NixlAsyncHandshake, NixlAsyncMetadata, Options
from nixl_async.integrations.vllm.reports import NixlAsyncPromMetrics, NixlAsyncStats
from nixl_async.integrations.vllm.scheduler import SchedulerSide
from nixl_async.integrations.vllm.worker import WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.config.kv_transfer import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


def register() -> None:
    """Make `NixlAsyncConnector` known to vLLM by name; vLLM calls this in each of its processes. Idempotent."""
    if "NixlAsyncConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector("NixlAsyncConnector", __name__, "NixlAsyncConnector")


class NixlAsyncConnector(KVConnectorBase_V1, SupportsHMA):
    """Moves KV blocks between engines through a `nixl_async.Agent` in each worker.

    See vLLM's base class for what each method promises.

    Raises:
        ConfigurationError: an option is unknown or wrong, or the engine is set up in a way that is not supported.
    """

    _cache_hit_source = CacheHitSource.P2P

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        options = Options.read(self._kv_transfer_config.kv_connector_extra_config)
        _check(vllm_config, options, kv_cache_config)
        engine = str(self._kv_transfer_config.engine_id)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(vllm_config, options, kv_cache_config, engine)
        else:
            self._worker = WorkerSide(vllm_config, options, kv_cache_config, engine)

    @property
    def scheduler(self) -> SchedulerSide:
        """The scheduler's half, in the scheduler's process."""
        assert self._scheduler is not None, "this is a worker's connector"
        return self._scheduler

    @property
    def worker(self) -> WorkerSide:
        """The workers' half, in a worker."""
        assert self._worker is not None, "this is the scheduler's connector"
        return self._worker

    # What vLLM asks the class.

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Ask for pages whose heads are outermost, so that the sides' tensor parallelism may differ; MLA has no heads."""
        model = vllm_config.model_config
        return None if model is None or model.use_mla else "LBHNC"

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Ask for Python between the layers where layers are moved one by one."""
        options = Options.read(extra_config)
        return options.layerwise or options.load == "sync"

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: KVTransferConfig) -> bool:
        """Memory is let go before sleep and registered again after it."""
        return True

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """Read the statistics that a worker has sent."""
        return NixlAsyncStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> NixlAsyncPromMetrics:
        """Make the metrics that Prometheus reads."""
        return NixlAsyncPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # The scheduler's half.

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        """Take note of where the workers are served."""
        self.scheduler.set_addresses(metadata)

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:
        """All groups that take part in transfers are loaded: the blocks are the request's own."""
        return tuple(self._kv_cache_config.transfer_group_ids)

    def on_new_request(self, request: Request) -> None:
        """Claim what a request will want."""
        self.scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Return how many tokens a prefill engine has beyond the first `num_computed_tokens`."""
        return self.scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Take note of a request's blocks."""
        self.scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Return the step's news for the workers."""
        return self.scheduler.step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take note of what the workers report."""
        self.scheduler.output(connector_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Tell whether a request's blocks must be kept, and what the decode engine has to know."""
        return self.scheduler.finished(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Do the same where there are several KV cache groups."""
        return self.scheduler.finished(request, block_ids)

    # The workers' half.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Open the agent with the KV cache registered."""
        self.worker.register(kv_caches)

    def unregister_kv_caches(self) -> None:
        """Let go of the KV cache before sleep."""
        self.worker.unregister()

    def restore_kv_caches(self) -> None:
        """Register it again."""
        self.worker.restore()

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """Tell the scheduler where this worker is served."""
        return NixlAsyncHandshake(self.worker.address)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Wait until nothing reads the blocks that preempted requests have lost."""
        self.worker.quiesce(_news(kv_connector_metadata).preempted)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Begin a step."""
        super().bind_connector_metadata(connector_metadata)
        self.worker.begin_step(_news(connector_metadata))

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Begin to receive."""
        self.worker.load(_news(self._get_connector_metadata()))

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Wait until a layer is here, of requests that were scheduled without waiting."""
        self.worker.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Let a layer go to those who wait for it."""
        self.worker.layer_done(layer_name)

    def wait_for_save(self) -> None:
        """End a step; nothing is waited for that is sent: its blocks are kept until it has been."""
        self.worker.end_step()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Return what has been sent, what has been received, and what of that has failed."""
        sent, received, failed = self.worker.reports.take()
        return KVConnectorTransferResults(finished_sending=sent, finished_recving=received, failed_recving=failed)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Return the same without the failures."""
        results = self.get_transfer_results(finished_req_ids)
        return results.finished_sending, results.finished_recving

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks that did not arrive."""
        return self.worker.reports.take_bad_blocks()

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Return what has been counted since the last time."""
        return None if self._worker is None else self._worker.reports.take_stats()

    def shutdown(self) -> None:
        """Stop; when this returns, nothing reads or writes the KV cache."""
        if self._worker is not None:
            self._worker.shutdown()


def _news(metadata: KVConnectorMetadata) -> NixlAsyncMetadata:
    assert isinstance(metadata, NixlAsyncMetadata), f"this is the metadata of another connector: {metadata!r}"
    return metadata


def _check(config: VllmConfig, options: Options, caches: KVCacheConfig) -> None:
    parallel = config.parallel_config
    for name in ("pipeline_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ConfigurationError(
                f"{name} is {getattr(parallel, name)}; NixlAsyncConnector supports tensor and data parallelism"
            )
    if config.num_prefill_lookahead_tokens > 1:
        raise ConfigurationError(
            "speculative decoding with several MTP modules needs a shorter prefill, which NixlAsyncConnector does not do;"
            " use one module"
        )
    transfer = config.kv_transfer_config
    device = config.device_config.device_type
    if transfer is not None and transfer.kv_buffer_device not in (device, None):
        raise ConfigurationError(
            f"kv_buffer_device is {transfer.kv_buffer_device!r}: NixlAsyncConnector moves the KV cache where it is, on {device!r};"
            " leave it out"
        )
    groups = caches.transfer_groups
    if any(isinstance(first_spec(group.kv_cache_spec), MambaSpec) for group in groups):
        raise ConfigurationError("the model keeps Mamba states; NixlAsyncConnector moves paged KV caches only")
    whole = all(isinstance(first_spec(group.kv_cache_spec), FullAttentionSpec) for group in groups)
    if options.layerwise and not whole:
        raise ConfigurationError(
            "layerwise needs a model of full attention: a prefill frees what leaves a window while it is sent"
        )
    if options.load == "sync" and len(groups) > 1:
        raise ConfigurationError(
            'load="sync" needs one KV cache group: vLLM cannot tell which requests failed in a model of several'
        )
