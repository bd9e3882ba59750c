"""A vLLM engine without a model, in a process of its own: vLLM's scheduler, its connector in both roles, its output aggregator, and
passes that write a KV cache which anyone can recompute. `Engine` is that process, `Remote` what a test holds of it.
"""

import contextlib
import json
import multiprocessing
import os
import pickle
import time
import traceback
from pathlib import Path
from unittest import mock

import numpy as np

LAYERS, HEADS, HEAD_DIM = 4, 4, 8
NAMES = [f"model.layers.{n}.self_attn.attn" for n in range(LAYERS)]


def content(tokens, start, layer, heads):
    """What a pass puts into the cache for tokens from position `start` on: [heads, tokens, 2 * HEAD_DIM] numbers."""
    tokens = np.asarray(tokens, np.int64)
    at = np.arange(start, start + len(tokens))
    by_token = tokens * 31 + at * 7 + layer * 1009
    found = by_token[None, :, None] + np.asarray(heads)[:, None, None] * 101 + np.arange(2 * HEAD_DIM)[None, None, :] * 13
    return (found % 32749).astype(np.int16)


def configuration(folder, options):
    """Return a VllmConfig whose model is a folder with nothing but its configuration."""
    from vllm.config import (
        CacheConfig,
        DeviceConfig,
        KVTransferConfig,
        ModelConfig,
        ParallelConfig,
        SchedulerConfig,
        VllmConfig,
    )

    model = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "intermediate_size": 128}
    model |= {"num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": HEADS, "head_dim": HEAD_DIM}
    model |= {"hidden_size": 64, "max_position_embeddings": 8192, "torch_dtype": "float16"}
    path = Path(folder) / "model"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(model | options.get("model", {})))
    model_config = ModelConfig(model=str(path), skip_tokenizer_init=True, dtype="float16", seed=1)
    cache = CacheConfig(block_size=options.get("block", 16), enable_prefix_caching=options.get("prefix_caching", True))
    cache.kv_cache_layout = "LBHNC"
    cache.num_gpu_blocks = options.get("blocks", 64)
    return VllmConfig(
        model_config=model_config,
        cache_config=cache,
        scheduler_config=SchedulerConfig(
            max_num_seqs=16,
            max_num_batched_tokens=options.get("tokens_a_step", 64),
            max_model_len=8192,
            is_encoder_decoder=False,
            enable_chunked_prefill=True,
            async_scheduling=False,
        ),
        parallel_config=ParallelConfig(tensor_parallel_size=options.get("tp", 1), distributed_executor_backend="mp"),
        device_config=DeviceConfig("cpu"),
        kv_transfer_config=KVTransferConfig(
            kv_connector=options.get("connector", "NixlAsyncConnector"),
            kv_connector_module_path=options.get("module", "nixl_async.integrations.vllm"),
            kv_role=options["role"],
            engine_id=options["engine"],
            kv_connector_extra_config=options.get("extra", {}),
            kv_load_failure_policy=options.get("policy", "fail"),
        ),
    )


def join_alone(config, folder):
    """Begin vLLM's process groups, of one process."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel

    store = Path(folder) / f"group-{os.getpid()}"
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        with mock.patch.object(config.parallel_config, "tensor_parallel_size", 1):
            initialize_model_parallel(1, 1)


@contextlib.contextmanager
def as_rank(rank):
    """Let the connector that is made be rank `rank`: each is a process to vLLM, which asks the process for its rank."""
    with mock.patch("nixl_async.integrations.vllm.worker.get_tensor_model_parallel_rank", return_value=rank):
        yield


class Engine:
    def __init__(self, folder, options, connection):
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
        from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
        from vllm.v1.structured_output import StructuredOutputManager

        self.connection, self.block = connection, options.get("block", 16)
        self.config = configuration(folder, options)
        join_alone(self.config, folder)
        self.tp = options.get("tp", 1)
        self.held = HEADS // self.tp
        blocks = self.config.cache_config.num_gpu_blocks
        sizes = {"block_size": self.block, "num_kv_heads": self.held, "head_size": HEAD_DIM, "dtype": torch.float16}
        self.window = options.get("window")
        groups = [KVCacheGroupSpec(NAMES, FullAttentionSpec(**sizes))]
        if self.window:
            # Every other layer sees a window of tokens only, and has blocks of its own.
            sliding = SlidingWindowSpec(**sizes, sliding_window=self.window)
            groups = [KVCacheGroupSpec(NAMES[::2], FullAttentionSpec(**sizes)), KVCacheGroupSpec(NAMES[1::2], sliding)]
        self.caches = KVCacheConfig(blocks, [], groups)
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(self.block, sha256)
        self.scheduler = Scheduler(
            vllm_config=self.config,
            kv_cache_config=self.caches,
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=self.block,
            log_stats=True,
        )
        self.workers, self.memory, addresses = [], [], {}
        for rank in range(self.tp):
            # Each is a process to vLLM, which asks the process for its rank.
            with as_rank(rank), set_current_vllm_config(self.config):
                worker = KVConnectorFactory.create_connector(self.config, KVConnectorRole.WORKER, self.caches)
                memory = np.zeros((LAYERS, blocks, self.held, self.block, 2 * HEAD_DIM), np.int16)
                pool = torch.from_numpy(memory).view(torch.float16)
                worker.register_kv_caches({name: pool[n] for n, name in enumerate(NAMES)})
            self.workers.append(worker)
            self.memory.append(memory)
            addresses[0, rank] = worker.get_handshake_metadata()
        self.scheduler.connector.set_xfer_handshake_metadata_pp_aware(pickle.loads(pickle.dumps(addresses)))
        self.aggregator = KVOutputAggregator(self.tp)
        self.tables, self.requests, self.checked = {}, {}, {}
        self.stats, self.preempted = [], []
        self.hold = None

    # What a test may ask.

    def add(self, name, tokens, params=None, max_tokens=1):
        from vllm import SamplingParams
        from vllm.v1.request import Request

        sampling = SamplingParams(max_tokens=max_tokens, extra_args={"kv_transfer_params": params} if params else None)
        sampling.update_from_generation_config({}, 2)
        request = Request(name, list(tokens), sampling, None, block_hasher=self.hasher)
        self.requests[name] = request
        self.scheduler.add_request(request)

    def abort(self, name):
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def state(self):
        pool = self.scheduler.kv_cache_manager.block_pool
        found = {"used": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(), "requests": sorted(self.scheduler.requests)}
        if not hasattr(self.workers[0], "worker"):
            # It is one of vLLM's own.
            return found
        workers = [(len(w.worker._prefill), len(w.worker._decode)) for w in self.workers]
        return found | {
            "moving": [list(one) for one in workers],
            "claimed": sum(len(one.claimed_by) for w in self.workers for one in w.worker._prefill._by_request.values()),
            "addresses": [w.worker.address for w in self.workers],
        }

    def peek(self, tokens, layer):
        """Tell whether the KV of a request with these tokens is in some blocks of a layer, whose request is the only one."""
        (name,) = self.scheduler.requests
        return self.compare(tokens, self.blocks_of(name, layer), layer)

    def take_stats(self):
        taken, self.stats = self.stats, []
        return taken

    def preemptions(self):
        return self.preempted

    def hold_at(self, layer):
        """Let passes stop before a layer until `hold_at(None)`."""
        self.hold = layer

    def sleep(self):
        for worker in self.workers:
            worker.unregister_kv_caches()

    def wake(self):
        for worker in self.workers:
            worker.restore_kv_caches()

    def shutdown(self):
        for worker in self.workers:
            worker.shutdown()

    # Running.

    def blocks_of(self, name, layer):
        groups = self.scheduler.kv_cache_manager.get_block_ids(name)
        return groups[layer % len(groups)]

    def compare(self, tokens, blocks, layer, first=0):
        for rank, memory in enumerate(self.memory):
            heads = range(rank * self.held, (rank + 1) * self.held)
            there = memory[layer, blocks].transpose(1, 0, 2, 3).reshape(self.held, -1, 2 * HEAD_DIM)[:, first : len(tokens)]
            if not np.array_equal(there, content(tokens[first:], first, layer, heads)):
                return False
        return True

    def step(self):
        from vllm.v1.outputs import ModelRunnerOutput

        output = self.scheduler.schedule()
        self.preempted += sorted(output.preempted_req_ids or ())
        meta = output.kv_connector_metadata
        news = [pickle.loads(pickle.dumps(meta)) for _ in self.workers]
        for worker, one in zip(self.workers, news, strict=True):
            worker.handle_preemptions(one)
            worker.bind_connector_metadata(one)
            if output.has_sync_kv_loads:
                worker.start_load_kv(None)
        self.forward(output)
        results = []
        names = list(output.num_scheduled_tokens)
        sampled = [[7] if self.done_with_prompt(name, output) else [] for name in names]
        for worker in self.workers:
            if not output.has_sync_kv_loads:
                worker.start_load_kv(None)
            worker.wait_for_save()
            results.append(
                ModelRunnerOutput(
                    req_ids=names,
                    req_id_to_index={name: n for n, name in enumerate(names)},
                    sampled_token_ids=sampled,
                    kv_connector_output=self.report(worker, output.finished_req_ids),
                )
            )
            worker.clear_connector_metadata()
        merged = self.aggregator.aggregate(results) if self.tp > 1 else results[0]
        for outputs in self.scheduler.update_from_output(output, merged).values():
            for one in outputs.outputs:
                if one.finish_reason is not None:
                    self.tell("finished", one.request_id, str(one.finish_reason), one.kv_transfer_params)

    def report(self, worker, finished):
        from vllm.v1.outputs import KVConnectorOutput

        results = worker.get_transfer_results(finished)
        stats = worker.get_kv_connector_stats()
        if stats is not None:
            self.stats.append(stats.data)
        bad = worker.get_block_ids_with_load_errors()
        if bad or results.finished_recving or results.finished_sending:
            self.tell("report", sorted(results.finished_sending), sorted(results.finished_recving), sorted(bad))
        return KVConnectorOutput(
            finished_sending=results.finished_sending or None,
            finished_recving=results.finished_recving or None,
            failed_recving=results.failed_recving,
            invalid_block_ids=bad,
            kv_connector_stats=stats,
        )

    def done_with_prompt(self, name, output):
        request = self.requests[name]
        return request.num_computed_tokens >= request.num_prompt_tokens

    def forward(self, output):
        for layer, name in enumerate(NAMES):
            for worker in self.workers:
                worker.wait_for_layer_load(name)
            while self.hold == layer and output.num_scheduled_tokens:
                self.obey(None)
            for request, count in output.num_scheduled_tokens.items():
                self.attend(request, count, layer)
            if output.num_scheduled_tokens:
                for worker in self.workers:
                    worker.save_kv_layer(name, None, None)

    def attend(self, name, count, layer):
        """Do to one layer what a pass does: read what is there of the request, write what is new."""
        request = self.requests[name]
        stop = request.num_computed_tokens
        start = stop - count
        blocks = self.blocks_of(name, layer)
        tokens = list(request.all_token_ids)[:stop]
        first = max(0, start - self.window + 1) if self.window and layer % 2 else 0
        if start and not self.compare(tokens[:start], blocks, layer, first):
            raise AssertionError(f"the KV of {name} before token {start} is wrong in layer {layer}")
        self.checked[name] = max(self.checked.get(name, 0), start)
        for rank, memory in enumerate(self.memory):
            heads = range(rank * self.held, (rank + 1) * self.held)
            new = content(tokens[start:], start, layer, heads)
            at = np.arange(start, stop)
            memory[layer, np.asarray(blocks)[at // self.block], :, at % self.block] = new.transpose(1, 0, 2)

    def tell(self, *event):
        self.connection.send(("event", *event))

    def obey(self, seconds):
        """Carry out what the test asks, after at most `seconds` without a question (None: wait for one)."""
        if self.connection.poll(seconds):
            name, arguments = self.connection.recv()
            if name == "exit":
                self.shutdown()
                self.connection.send(("answer", None))
                raise SystemExit
            self.connection.send(("answer", getattr(self, name)(*arguments)))

    def run(self):
        while True:
            if self.scheduler.has_requests():
                self.step()
                self.obey(0.001)
            else:
                self.obey(None)


def main(folder, options, connection):
    os.environ |= options.get("environment", {})
    try:
        engine = Engine(folder, options, connection)
        connection.send(("answer", "up"))
        engine.run()
    except (SystemExit, EOFError, BrokenPipeError):
        raise SystemExit from None
    except BaseException:
        with contextlib.suppress(OSError):
            connection.send(("failed", traceback.format_exc()))
        raise


class Remote:
    """An engine process: `call` asks it, `wait` waits for what it tells."""

    context = multiprocessing.get_context("forkserver")

    def __init__(self, folder, engine, role, **options):
        self.name, self.events = engine, []
        self.connection, theirs = self.context.Pipe()
        options |= {"engine": engine, "role": role}
        options["extra"] = {"host": "127.0.0.1", **options.get("extra", {})}
        self.process = self.context.Process(target=main, args=(str(folder), options, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.up = False

    def call(self, name, *arguments):
        if not self.up:
            self.up = True
            assert self._answer() == "up"
        self.connection.send((name, arguments))
        return self._answer()

    def _answer(self):
        while True:
            self._take(60)
            if self.answer is not None:
                return self.answer[0]

    def _take(self, seconds):
        """Receive one message; in `seconds`, a bound on what takes milliseconds."""
        self.answer = None
        assert self.connection.poll(seconds), f"{self.name} says nothing for {seconds} s; it has said {self.events}"
        kind, *rest = self.connection.recv()
        if kind == "failed":
            raise AssertionError(f"engine {self.name} failed:\n{rest[0]}")
        if kind == "answer":
            self.answer = rest
        else:
            self.events.append(tuple(rest))

    def wait(self, wanted, seconds=30):
        """Return the first event, of those not returned yet, that `wanted` accepts."""
        until = time.monotonic() + seconds
        while True:
            for event in self.events:
                if wanted(event):
                    self.events.remove(event)
                    return event
            self._take(max(0, until - time.monotonic()))

    def finished(self, name, seconds=30):
        """Wait until a request has ended; return why, and what the other side is to be told."""
        return self.wait(lambda event: event[:2] == ("finished", name), seconds)[2:]

    def sent(self, name, seconds=30):
        return self.wait(lambda event: event[0] == "report" and name in event[1], seconds)

    def received(self, name, seconds=30):
        return self.wait(lambda event: event[0] == "report" and name in event[2], seconds)

    def until(self, condition, seconds=30):
        """Ask for the state until it is as wanted: there is no event for what blocks are free."""
        until = time.monotonic() + seconds
        while not condition(state := self.call("state")):
            assert time.monotonic() < until, f"{self.name}: {state}"
        return state

    def kill(self):
        self.process.kill()
        self.process.join()
        self.connection.close()

    def close(self):
        if self.process.is_alive():
            self.call("exit")
            self.process.join(30)
            assert self.process.exitcode == 0, f"{self.name} ended with {self.process.exitcode}"
