"""NixlAsyncConnector between whole vLLM engines, model and kernels included: a small random model on CPU, by vLLM's CPU build."""

import json
import multiprocessing
import os

import pytest

MODEL = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 4000, "intermediate_size": 256}
MODEL |= {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "hidden_size": 256}
MODEL |= {"max_position_embeddings": 2048, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2}
TOKENS = 12
ANSWER_SECONDS = 300
"""How long an engine may take to start, on cores that others use too, or to answer."""


def serve(connection, folder, role, extra):
    """Be an engine."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "NIXL_ASYNC_TOKEN": "a secret"}
    from vllm import LLM, SamplingParams

    transfer = {
        "kv_connector": "NixlAsyncConnector",
        "kv_connector_module_path": "nixl_async.integrations.vllm",
        "kv_role": role,
        "kv_connector_extra_config": {"host": "127.0.0.1", **extra},
    }
    engine = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=1024,
        max_num_batched_tokens=128,
        block_size=32,
        num_gpu_blocks_override=256,
        dtype="float32",
        seed=1,
        disable_log_stats=True,
        kv_transfer_config=transfer,
    )
    # Of random weights this small every token would be as likely; with these the answer depends on all of the prompt.
    engine.apply_model(spread)
    connection.send("up")
    while (asked := connection.recv()) is not None:
        prompts, params, tokens = asked
        sampling = [
            SamplingParams(
                max_tokens=tokens, temperature=0, detokenize=False, logprobs=1, extra_args={"kv_transfer_params": one}
            )
            for one in params
        ]
        answers = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        found = []
        for one in answers:
            (output,) = one.outputs
            logprobs = [position[token].logprob for position, token in zip(output.logprobs, output.token_ids, strict=True)]
            found.append((list(output.token_ids), logprobs, one.kv_transfer_params))
        connection.send((found, moved()))
    engine.llm_engine.engine_core.shutdown()


def moved():
    """Return how many bytes this engine's agent has copied."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return sum(get_kv_transfer_group().worker._node.agent.statistics().nbytes.values())


def spread(model):
    import torch

    generator = torch.Generator().manual_seed(7)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5 * 2)


@pytest.fixture
def start(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm.entrypoints.llm", "nixl_async.integrations.vllm"])
    started = []

    def start(role, **extra):
        mine, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, tmp_path, role, extra), daemon=True)
        process.start()
        theirs.close()
        started.append((process, mine))
        return mine

    yield start
    for process, connection in started:
        connection.send(None)
        process.join(60)
        assert process.exitcode == 0


def prompts(seed):
    return [
        [(seed * 77 + 13 * n + i * i * 7) % 3900 + 50 for i in range(length)] for n, length in enumerate((5, 64, 100, 300))
    ]


def answer(connection):
    assert connection.poll(ANSWER_SECONDS), f"no answer for {ANSWER_SECONDS} s"
    return connection.recv()


def check(here, there):
    """Compare answers with those of an engine that did everything itself: the tokens, and how likely each was."""
    for mine, theirs in zip(here, there, strict=True):
        assert mine[0] == theirs[0]
        assert mine[1] == pytest.approx(theirs[1], abs=1e-4)


def nbytes(asked):
    """Return how much KV cache prompts have, in whole blocks: all of it has to move."""
    block = 32 * 2 * MODEL["num_key_value_heads"] * MODEL["head_dim"] * 4 * MODEL["num_hidden_layers"]
    return sum(-(-len(prompt) // 32) * block for prompt in asked)


def test_decoding_elsewhere_gives_the_same_tokens(start):
    prefill, decode, eager = start("kv_producer"), start("kv_consumer"), start("kv_consumer", load="sync")
    for engine in (prefill, decode, eager):
        assert answer(engine) == "up"
    # Twice from one prefill: into requests that wait for it, and into passes that wait for each layer.
    for engine in (decode, eager):
        asked = prompts(engine is decode)
        prefill.send((asked, [None] * len(asked), TOKENS))
        expected, _ = answer(prefill)
        prefill.send((asked, [{"do_remote_decode": True}] * len(asked), 1))
        prefilled, _ = answer(prefill)
        engine.send((asked, [one[2] for one in prefilled], TOKENS))
        answers, copied = answer(engine)
        check(answers, expected)
        assert copied == nbytes(asked)


def test_layers_are_pushed_by_the_attention_layers(start):
    options = {"mode": "push", "layerwise": True}
    prefill, decode = start("kv_producer", **options), start("kv_consumer", **options)
    for engine in (prefill, decode):
        assert answer(engine) == "up"
    asked = prompts(9)
    prefill.send((asked, [None] * len(asked), TOKENS))
    expected, _ = answer(prefill)
    # Where the prefill engine is: it says so with what it has prefilled.
    prefill.send(([[5, 6, 7]], [{"do_remote_decode": True}], 1))
    addresses = answer(prefill)[0][0][2]["remote_addresses"]
    there = [{"do_remote_prefill": True, "transfer_id": f"t{n}", "remote_addresses": addresses} for n in range(len(asked))]
    decode.send((asked, there, TOKENS))
    prefill.send((asked, [{"do_remote_decode": True, "transfer_id": f"t{n}"} for n in range(len(asked))], 1))
    answer(prefill)
    check(answer(decode)[0], expected)
    prefill.send(([[5]], [None], 1))
    assert answer(prefill)[1] == nbytes(asked)
