"""Plans and patterns moved for real, in processes, every byte checked."""

from __future__ import annotations

import itertools

import pytest

from nixl_async.benchmarks.kv.layouts import Layout
from nixl_async.benchmarks.kv.matrices import Pattern, Traffic
from nixl_async.benchmarks.kv.models import Model
from nixl_async.benchmarks.kv.planning import make_plan
from nixl_async.benchmarks.kv.running import check_backend, profile, traffic
from nixl_async.benchmarks.kv.traffic import Buffers, receive_offset, send_offset
from nixl_async.errors import ConfigurationError, DescriptorError

SMALL = Model("small", "test", 3, 4, 16, 2)
LATENT = Model("latent", "test", 3, 1, 36, 1)
LAYOUT = Layout(tp=2, kv_dtype="fp8", isl=50, page_size=4, num_requests=2, access="block")
BOTH, MODES = ["write", "read"], ["prepared", "one-shot"]


@pytest.mark.parametrize("backend", ["samehost", "tcp", "ucx"])
async def test_a_plan_is_moved_both_ways(backend: str) -> None:
    result = await profile(
        make_plan(SMALL, LAYOUT),
        LAYOUT,
        rank=1,
        ops=BOTH,
        modes=MODES,
        repeats=2,
        warmup=1,
        backends=check_backend(backend.upper()),
        memory=None,
    )
    assert [(case["op"], case["mode"], case["route"], case["n"]) for case in result["cases"]] == [
        (op, mode, backend, 2) for op in BOTH for mode in MODES
    ]
    assert (result["rank"], result["decode_rank"], result["verified"]) == (1, 1, True)
    assert result["nbytes"] == make_plan(SMALL, LAYOUT).ranks[1].nbytes
    assert result["ios"] == 26
    for case in result["cases"]:
        assert 0 < case["min_seconds"] <= case["q1_seconds"] <= case["median_seconds"] <= case["max_seconds"]
        assert case["gb_per_second"] == result["nbytes"] / case["median_seconds"] / 1e9


@pytest.mark.parametrize(
    ("model", "access", "decode", "rank", "heads", "layers", "decode_rank"),
    [
        (SMALL, "layer", Layout(tp=4), 1, 1, 3, 2),
        (SMALL, "block", Layout(tp=1), 1, 2, 3, 0),
        (SMALL, "layer", Layout(tp=2, pp=3), 0, 2, 1, 0),
        (LATENT, "block", Layout(tp=4), 1, 1, 3, 2),
        (LATENT, "layer", Layout(tp=1), 0, 1, 3, 0),
    ],
)
async def test_sides_that_share_differently(
    model: Model, access: str, decode: Layout, rank: int, heads: int, layers: int, decode_rank: int
) -> None:
    layout = LAYOUT.changed(access=access)
    result = await profile(
        make_plan(model, layout),
        layout.changed(tp=decode.tp, pp=decode.pp),
        rank=rank,
        ops=["read"],
        modes=["one-shot"],
        repeats=1,
        warmup=0,
        backends=["samehost"],
        memory="dram",
    )
    assert result["nbytes"] == 2 * 13 * 4 * heads * layers * model.kv * model.head_dim
    assert result["decode_rank"] == decode_rank
    assert result["ios"] == 2 * 13 * (1 if access == "block" else layers)


async def test_wrong_profiles_are_refused_before_anything_runs() -> None:
    common = {"ops": BOTH, "modes": MODES, "repeats": 1, "warmup": 0, "backends": None, "memory": None}
    with pytest.raises(DescriptorError, match="rank is 2"):
        await profile(make_plan(SMALL, LAYOUT), LAYOUT, rank=2, **common)  # type: ignore[arg-type]
    with pytest.raises(DescriptorError, match="tp is 3"):
        await profile(make_plan(SMALL, LAYOUT), LAYOUT.changed(tp=3), rank=0, **common)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"rank 1 sends nothing: .*these send: \[0\]"):
        await profile(make_plan(LATENT, LAYOUT), LAYOUT.changed(tp=1), rank=1, **common)  # type: ignore[arg-type]
    huge = LAYOUT.changed(isl=10**9)
    with pytest.raises(ConfigurationError, match="GiB are available: give fewer --num-requests"):
        await profile(make_plan(SMALL, huge), huge, rank=0, **common)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="does not reach other processes"):
        check_backend("memory")
    with pytest.raises(ConfigurationError, match="warp"):
        check_backend("warp")


MATRIX = ((3, 0, 70000, 1), (0, 0, 4096, 4097), (0, 0, 0, 5), (0, 0, 9, 0))


def test_buffers_have_room_for_every_message_once() -> None:
    patterns = [Pattern(MATRIX, "a"), Pattern(((0, 1, 0, 0), *((0,) * 4,) * 3), "b")]
    for rank in range(4):
        apart, shared = Buffers.of(patterns, rank, apart=True), Buffers.of(patterns, rank, apart=False)
        assert apart.send_nbytes == shared.send_nbytes
        spans = []
        for number, pattern in enumerate(patterns):
            for src in range(4):
                if nbytes := pattern.matrix[src][rank]:
                    first = apart.receive_starts[number] + receive_offset(pattern.matrix, src, rank)
                    spans.append((first, first + nbytes))
                    assert first % 64 == 0
                    assert send_offset(pattern.matrix, src, rank) + nbytes <= Buffers.of(patterns, src, apart=True).send_nbytes
        spans.sort()
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert not spans or spans[-1][1] <= apart.receive_nbytes
        assert shared.receive_starts == (0, 0)


@pytest.mark.parametrize("backend", ["samehost", "tcp", "ucx"])
async def test_one_pattern_between_four_ranks(backend: str) -> None:
    work = Traffic((Pattern(MATRIX, "a.txt", "dram"),), sequential=False, iters=3, warmup=1)
    result = await traffic(work, backends=[backend])
    assert (result["kind"], result["ranks"], result["iters"], result["verified"]) == ("single", 4, 3, True)
    # What rank 0 sends to itself does not leave its process.
    assert result["route"] == "+".join(sorted(["memory", backend]))
    assert result["size_gb"] == sum(map(sum, MATRIX)) / 1e9
    assert [(one["rank"], one["nbytes"]) for one in result["senders"]] == [(n, sum(MATRIX[n])) for n in range(4)]
    assert result["mean_bw"] == pytest.approx(sum(one["gb_per_second"] for one in result["senders"]) / 4)
    assert result["seconds_per_iter"] == result["total_seconds"] / 3
    assert max(one["seconds"] for one in result["senders"]) <= result["seconds_per_iter"]


async def test_a_sequence_of_patterns_with_sleeps() -> None:
    none = (0, 0, 0, 0)
    patterns = (
        Pattern(MATRIX, "a.txt", "dram", sleep_before=0.2),
        Pattern((none, none, (8192, 0, 0, 0), none), "b.txt", "dram", op="READ", sleep_after=0.1),
        Pattern((none,) * 4, "nothing.txt", "dram"),
        Pattern(((0, 100000, 0, 0), none, none, (0, 0, 5, 0)), "c.txt"),
    )
    result = await traffic(Traffic(patterns, sequential=True), iters=2, isolated_iters=2, warmup=1, backends=["samehost"])
    assert (result["kind"], len(result["iterations_results"]), result["verified"]) == ("sequential", 2, True)
    for iteration in result["iterations_results"]:
        first, second, nothing, third = iteration
        assert [row["size"] for row in iteration] == [pattern.nbytes / 1e9 for pattern in patterns]
        assert [row["num_senders"] for row in iteration] == [4, 1, 0, 2]
        assert nothing["latency"] is nothing["isolated_latency"] is nothing["min_start_ts"] is None
        for row in (first, second, third):
            assert 0 < row["latency"] <= (row["max_end_ts"] - row["min_start_ts"]) * 1e3 + 1
            assert row["isolated_latency"] > 0
            assert row["mean_bw"] == pytest.approx(sum(o["gb_per_second"] for o in row["senders"]) / len(row["senders"]))
        # Each pattern has its own mean; the receiver of a READ is who starts it.
        assert [(one["rank"], one["nbytes"]) for one in second["senders"]] == [(0, 8192)]
        assert [(one["rank"], one["nbytes"]) for one in third["senders"]] == [(0, 100000), (3, 5)]
        # Rank 0 sleeps after the second and before it begins the third.
        assert third["max_end_ts"] - second["max_end_ts"] > 0.09
    starts = [one["start_ts"] for one in result["metadata"]["iters"]]
    assert result["iterations_results"][0][0]["min_start_ts"] - starts[0] > 0.19
    assert set(result["metadata"]) == {"ts", "iters", "sol_calculation_ts", "prepare_tp_time", "finished_ts"}


async def test_bytes_may_go_unchecked_and_take_less_memory() -> None:
    patterns = (Pattern(MATRIX, "a.txt", "dram"),) * 2
    result = await traffic(Traffic(patterns, sequential=True), iters=1, isolated_iters=1, warmup=0, verify=False)
    assert result["verified"] is False
    assert result["iterations_results"][0][1]["latency"] > 0


async def test_wrong_traffic_is_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigurationError, match="no rank sends anything"):
        await traffic(Traffic((Pattern(((0, 0), (0, 0)), "a"),), sequential=False))
    wide = Pattern(((1,) * 128,) * 128, "a", "dram")
    with pytest.raises(ConfigurationError, match="1064960 cells, 1048576 at most"):
        await traffic(Traffic((wide,) * 65, sequential=True))
    large = Pattern(((0, 1 << 50), (0, 0)), "a", "dram")
    with pytest.raises(ConfigurationError, match="GiB are available: smaller matrices are needed$"):
        await traffic(Traffic((large,), sequential=False))
    with pytest.raises(ConfigurationError, match="--no-verify takes less"):
        await traffic(Traffic((large, large), sequential=True))
    mixed = (Pattern(MATRIX, "a", "dram"), Pattern(MATRIX, "b", "vram"))
    with pytest.raises(ConfigurationError, match="--memory dram or vram"):
        await traffic(Traffic(mixed, sequential=True))
