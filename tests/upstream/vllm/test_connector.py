"""NixlAsyncConnector between engine processes, see engine.py: the decode engine's passes compare what has arrived byte by byte."""

import time

import pytest

PREFILL = {"do_remote_decode": True}


def prompt(seed, length=100):
    return [(seed * 7919 + n * 31) % 30000 + 10 for n in range(length)]


def pair(start, mode="pull", source=(), target=(), **extra):
    extra = {"mode": mode, **extra}
    prefill = start("prefill", "kv_producer", extra=extra, **dict(source))
    return prefill, start("decode", "kv_consumer", extra=extra, **dict(target))


def prefilled(engine, name, tokens):
    engine.call("add", name, tokens, PREFILL)
    why, params = engine.finished(name)
    assert (why, params["remote_num_tokens"]) == ("length", len(tokens))
    return params


def empty(engine):
    """Wait until an engine holds no block and no request."""
    return engine.until(lambda state: not state["used"] and not state["requests"] and not any(map(sum, state["moving"])))


@pytest.mark.parametrize("mode", ["pull", "push"])
@pytest.mark.parametrize("load", ["async", "sync"])
def test_requests_arrive_in_whole(start, mode, load):
    prefill, decode = pair(start, mode, load=load)
    for n in range(8):
        # From one token to several passes of the prefill, whole blocks and not.
        params = prefilled(prefill, f"p{n}", prompt(n, (1, 16, 17, 63, 64, 65, 130, 300)[n]))
        decode.call("add", f"d{n}", prompt(n, (1, 16, 17, 63, 64, 65, 130, 300)[n]), params, 3)
    for n in range(8):
        assert decode.finished(f"d{n}")[0] == "length"
    empty(prefill), empty(decode)
    seconds = [value for stats in decode.call("take_stats") for value in stats["seconds"]]
    # Of one token nothing can be loaded by the pass that needs it.
    assert len(seconds) == (8 if load == "async" else 7)


def test_a_prefix_that_is_here_is_not_moved(start):
    prefill, decode = pair(start)
    tokens = prompt(1, 100)
    for n, length in enumerate((100, 150)):
        mine = tokens[:length] + prompt(9, length - 100)
        decode.call("add", f"d{n}", mine, prefilled(prefill, f"p{n}", mine), 2)
        assert decode.finished(f"d{n}")[0] == "length"
    first, second = (stats["nbytes"][0] for stats in decode.call("take_stats"))
    # 7 blocks of 100 tokens; of the 10 blocks of 150, 6 were here.
    assert second * 7 == first * 4
    # All of 96 tokens is here: nothing moves, and the prefill side hears of it.
    decode.call("add", "d2", tokens[:96], prefilled(prefill, "p2", tokens[:96]), 2)
    decode.finished("d2")
    prefill.sent("p2")
    empty(prefill), empty(decode)


@pytest.mark.parametrize("mode", ["pull", "push"])
@pytest.mark.parametrize(("tp", "to"), [(2, 1), (1, 2), (4, 2), (2, 2)])
def test_tensor_parallelism_may_differ(start, mode, tp, to):
    prefill, decode = pair(start, mode, {"tp": tp}, {"tp": to})
    for n in range(3):
        decode.call("add", f"d{n}", prompt(n, 90), prefilled(prefill, f"p{n}", prompt(n, 90)), 2)
        assert decode.finished(f"d{n}")[0] == "length"
    empty(prefill), empty(decode)


@pytest.mark.parametrize("mode", ["pull", "push"])
def test_models_of_sliding_windows(start, mode):
    prefill, decode = pair(start, mode, {"window": 32}, {"window": 32})
    for n in range(6):
        decode.call("add", f"d{n}", prompt(n, 20 + 40 * n), prefilled(prefill, f"p{n}", prompt(n, 20 + 40 * n)), 2)
        assert decode.finished(f"d{n}")[0] == "length"
    empty(prefill), empty(decode)
    # Of what has left the window nothing moves: at most three of its blocks do, of 14.
    *_, last = (stats["nbytes"][0] for stats in decode.call("take_stats"))
    assert last <= (14 + 3) * 2 * 4 * 16 * 16 * 2


@pytest.mark.parametrize("mode", ["pull", "push"])
def test_layers_arrive_while_the_prefill_computes(start, mode):
    prefill, decode = pair(start, mode, layerwise=True)
    tokens = prompt(3, 150)
    (address,) = prefill.call("state")["addresses"]
    host, port = address.split(":")
    there = {"do_remote_prefill": True, "transfer_id": "one", "remote_host": host, "remote_port": int(port), "tp_size": 1}
    decode.call("add", "d", tokens, there, 2)
    decode.until(lambda state: state["moving"] == [[0, 1]])
    prefill.call("hold_at", 2)
    prefill.call("add", "p", tokens, PREFILL | {"transfer_id": "one"})
    # The prefill's first pass, of 64 tokens, stands still before layer 2: the two before it arrive, and those only.
    until = time.monotonic() + 30
    while not all(decode.call("peek", tokens[:64], layer) for layer in (0, 1)):
        assert time.monotonic() < until
    assert not decode.call("peek", tokens[:64], 2)
    prefill.call("hold_at", None)
    prefill.finished("p")
    decode.received("d")
    assert decode.finished("d")[0] == "length"
    prefill.sent("p")
    empty(prefill), empty(decode)


def test_a_request_that_is_wanted_before_it_is_prefilled_waits(start):
    prefill, decode = pair(start)
    there = {"do_remote_prefill": True, "transfer_id": "one", "remote_addresses": prefill.call("state")["addresses"]}
    decode.call("add", "d", prompt(5), there, 2)
    decode.until(lambda state: state["moving"] == [[0, 1]])
    prefill.call("add", "p", prompt(5), PREFILL | {"transfer_id": "one"})
    assert decode.finished("d")[0] == "length"
    empty(prefill), empty(decode)


@pytest.mark.parametrize("mode", ["pull", "push"])
def test_a_prefill_that_is_preempted_goes_on(start, mode):
    # The pool has room for 16 blocks. Both prompts fit, of 7 and of 9 blocks; the answer to the first one needs an eighth before
    # the second is computed, which loses its blocks when some of them have gone already.
    prefill, decode = pair(start, mode, {"blocks": 17, "tokens_a_step": 17}, layerwise=True)
    there = {"do_remote_prefill": True, "transfer_id": "one", "remote_addresses": prefill.call("state")["addresses"]}
    decode.call("add", "d", prompt(5, 140), there, 2)
    decode.until(lambda state: state["moving"] == [[0, 1]])
    prefill.call("add", "long", prompt(6, 108), None, 30)
    prefill.call("add", "p", prompt(5, 140), PREFILL | {"transfer_id": "one"})
    assert prefill.finished("p")[0] == "length"
    assert prefill.call("preemptions") == ["p"]
    assert decode.finished("d")[0] == "length"
    empty(prefill), empty(decode)


@pytest.mark.parametrize("mode", ["pull", "push"])
def test_an_abort_while_it_arrives_ends_both_sides(start, mode):
    prefill, decode = pair(start, mode, layerwise=True)
    there = {"do_remote_prefill": True, "transfer_id": "one", "remote_addresses": prefill.call("state")["addresses"]}
    decode.call("add", "d", prompt(5), there, 2)
    decode.until(lambda state: state["moving"] == [[0, 1]])
    prefill.call("hold_at", 2)
    prefill.call("add", "p", prompt(5), PREFILL | {"transfer_id": "one"})
    decode.call("abort", "d")
    decode.received("d")
    empty(decode)
    prefill.call("hold_at", None)
    prefill.finished("p")
    prefill.sent("p")
    empty(prefill)


def test_an_abort_before_it_is_scheduled_frees_the_prefill_side(start):
    prefill, decode = pair(start)
    params = prefilled(prefill, "p", prompt(5))
    # More requests than fit: the last waits in the queue.
    decode.call("hold_at", 0)
    decode.call("add", "busy", prompt(6, 40), None, 2)
    decode.call("add", "d", prompt(5), params, 2)
    decode.call("abort", "d")
    decode.call("hold_at", None)
    prefill.sent("p")
    empty(prefill), empty(decode)


def test_an_aborted_prefill_fails_who_waits_for_it(start):
    prefill, decode = pair(start, layerwise=True)
    there = {"do_remote_prefill": True, "transfer_id": "one", "remote_addresses": prefill.call("state")["addresses"]}
    decode.call("add", "d", prompt(5), there, 2)
    decode.until(lambda state: state["moving"] == [[0, 1]])
    prefill.call("hold_at", 2)
    prefill.call("add", "p", prompt(5), PREFILL | {"transfer_id": "one"})
    prefill.call("abort", "p")
    prefill.call("hold_at", None)
    _, _, _, bad = decode.received("d")
    assert len(bad) == 7
    assert decode.finished("d")[0] == "error"
    empty(prefill), empty(decode)


@pytest.mark.parametrize("mode", ["pull", "push"])
@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_a_prefill_engine_that_is_killed_fails_blocks_by_number(start, mode, policy):
    prefill, decode = pair(start, mode, {}, {"policy": policy}, layerwise=True)
    tokens = prompt(5, 150)
    there = {"do_remote_prefill": True, "transfer_id": "one", "remote_addresses": prefill.call("state")["addresses"]}
    decode.call("add", "d", tokens, there, 2)
    decode.until(lambda state: state["moving"] == [[0, 1]])
    prefill.call("hold_at", 2)
    prefill.call("add", "p", tokens, PREFILL | {"transfer_id": "one"})
    until = time.monotonic() + 30
    while not decode.call("peek", tokens[:64], 1):
        assert time.monotonic() < until
    began = time.monotonic()
    prefill.kill()
    _, _, _, bad = decode.received("d")
    took = time.monotonic() - began
    # Ten blocks, of none of which all layers are there.
    assert len(bad) == 10
    assert took < 3
    assert decode.finished("d")[0] == {"fail": "error", "recompute": "length"}[policy]
    empty(decode)
    # A new engine, under the old name: the decode engine needs no restart.
    successor = start("prefill", "kv_producer", extra={"mode": mode, "layerwise": True})
    decode.call("add", "d2", prompt(8), prefilled(successor, "p2", prompt(8)), 2)
    assert decode.finished("d2")[0] == "length"
    empty(successor), empty(decode)


@pytest.mark.parametrize("mode", ["pull", "push"])
def test_blocks_that_a_killed_decode_engine_receives_come_free(start, mode):
    prefill, decode = pair(start, mode, layerwise=True, lease_seconds=300, orphan_seconds=0.2)
    there = {"do_remote_prefill": True, "transfer_id": "one", "remote_addresses": prefill.call("state")["addresses"]}
    decode.call("add", "d", prompt(5, 60), there, 2)
    decode.until(lambda state: state["moving"] == [[0, 1]])
    prefill.call("hold_at", 2)
    prefill.call("add", "p", prompt(5, 60), PREFILL | {"transfer_id": "one"})
    until = time.monotonic() + 30
    while not decode.call("peek", prompt(5, 60)[:48], 1):
        assert time.monotonic() < until
    decode.kill()
    prefill.call("hold_at", None)
    prefill.finished("p")
    began = time.monotonic()
    prefill.sent("p")
    assert time.monotonic() - began < 5
    empty(prefill)


def test_blocks_that_a_killed_decode_engine_claimed_come_free(start):
    # The decode engine has room for one request only: the other waits, and so do its blocks on the prefill side.
    prefill, decode = pair(start, "pull", {}, {"blocks": 9}, lease_seconds=300, orphan_seconds=0.2)
    decode.call("add", "busy", prompt(6, 90), None, 30)
    decode.call("hold_at", 0)
    params = prefilled(prefill, "p", prompt(5))
    decode.call("add", "d", prompt(5), params, 2)
    decode.call("hold_at", None)
    prefill.until(lambda state: state["claimed"])
    decode.kill()
    began = time.monotonic()
    prefill.sent("p")
    assert time.monotonic() - began < 5
    empty(prefill)


@pytest.mark.parametrize("mode", ["pull", "push"])
def test_engines_sleep_and_wake(start, mode):
    prefill, decode = pair(start, mode)
    for n in range(2):
        decode.call("add", f"d{n}", prompt(n), prefilled(prefill, f"p{n}", prompt(n)), 2)
        assert decode.finished(f"d{n}")[0] == "length"
        empty(prefill), empty(decode)
        for engine in (prefill, decode):
            engine.call("sleep")
            engine.call("sleep")
            engine.call("wake")


def test_a_lease_ends(start):
    prefill, decode = pair(start, lease_seconds=0.3)
    params = prefilled(prefill, "p", prompt(5))
    prefill.sent("p")
    empty(prefill)
    assert any(stats["expired"] for stats in prefill.call("take_stats"))
    # Who comes too late is told, and computes nothing out of blocks that are somebody else's.
    decode.call("add", "d", prompt(5), params, 2)
    assert len(decode.received("d")[3]) == 7
    assert decode.finished("d")[0] == "error"
    empty(decode)


def test_engines_that_do_not_fit_are_refused(start):
    prefill = start("prefill", "kv_producer", extra={"mode": "push"})
    decode = start("decode", "kv_consumer", extra={"mode": "pull"}, policy="recompute")
    decode.call("add", "d", prompt(5), prefilled(prefill, "p", prompt(5)), 2)
    assert len(decode.received("d")[3]) == 7
    assert decode.finished("d")[0] == "length"
    empty(decode)
    prefill.kill()
