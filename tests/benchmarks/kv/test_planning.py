"""What ranks move: held against the geometry, the planner, and KVBench where it is right."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixl_async.benchmarks.kv import kvbench
from nixl_async.benchmarks.kv.layouts import Layout
from nixl_async.benchmarks.kv.models import TABLE, Model, find_model
from nixl_async.benchmarks.kv.planning import make_plan
from nixl_async.errors import ConfigurationError, DescriptorError
from nixl_async.planner import plan_pairs

HEADS = st.sampled_from([1, 2, 4, 8])
RANKS = st.sampled_from([1, 2, 4, 8, 16])


@st.composite
def models(draw: st.DrawFn) -> Model:
    kv = draw(st.sampled_from([1, 2]))
    heads = 1 if kv == 1 else draw(HEADS)
    return Model("m", "test", draw(st.integers(1, 12)), heads, draw(st.sampled_from([3, 64, 576])), kv, "bfloat16")


@st.composite
def layouts(draw: st.DrawFn, layers: int) -> Layout:
    return Layout(
        tp=draw(RANKS),
        pp=draw(st.integers(1, layers)),
        kv_dtype=draw(st.sampled_from(["fp8", "fp16", "float32"])),
        num_requests=draw(st.integers(1, 5)),
        isl=draw(st.integers(1, 200)),
        page_size=draw(st.integers(1, 40)),
        access=draw(st.sampled_from(["block", "layer", None])),
    )


@given(st.data())
def test_all_ranks_together_have_every_byte_as_often_as_there_are_copies(data: st.DataObject) -> None:
    model = data.draw(models())
    layout = data.draw(layouts(model.layers))
    plan = make_plan(model, layout)
    assert plan.nbytes == plan.pages_nbytes * plan.copies
    assert plan.pages_nbytes >= plan.tokens_nbytes
    assert plan.pages_nbytes - plan.tokens_nbytes < plan.geometry.token_nbytes * layout.page_size * layout.num_requests
    # Each layer and head is on as many ranks as there are copies.
    counts: dict[tuple[int, int], int] = {}
    for rank in plan.ranks:
        for layer in rank.shard.layers:
            for head in rank.shard.heads:
                counts[layer, head] = counts.get((layer, head), 0) + 1
    assert counts == {(layer, head): plan.copies for layer in range(model.layers) for head in range(model.heads)}


@given(st.data())
def test_a_rank_moves_what_the_planner_sends_to_it(data: st.DataObject) -> None:
    model = data.draw(models())
    layout = data.draw(layouts(model.layers))
    source = Layout(kv_dtype=layout.kv_dtype, page_size=layout.page_size)
    plan = make_plan(model, layout)
    tokens = layout.pages * layout.page_size * layout.num_requests
    received = [0] * len(plan.ranks)
    for pair in plan_pairs(plan.geometry, source.sharding(plan.geometry), layout.sharding(plan.geometry)):
        received[pair.dst.rank] += pair.nbytes(tokens)
    assert received == [rank.nbytes for rank in plan.ranks]


@pytest.mark.parametrize("model", TABLE)
@pytest.mark.parametrize("access", ["block", "layer"])
def test_kvbench_agrees_where_nothing_is_special(model: str, access: str) -> None:
    """One rank, full pages: the only layouts in which KVBench is right for every model."""
    layout = Layout(isl=1024, page_size=16, num_requests=3, access=access)
    plan, theirs = make_plan(find_model(model), layout), kvbench.Figures.of(find_model(model), layout)
    assert plan.differences() == []
    (rank,) = plan.ranks
    assert (rank.io_nbytes, rank.batch_size, rank.nbytes) == (theirs.io_size, theirs.batch_size, theirs.total_buffer_size)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("pp", [1, 2, 4, 8])
def test_kvbenchs_access_is_right_where_heads_and_layers_divide(tp: int, pp: int) -> None:
    layout = Layout(tp=tp, pp=pp, isl=1024, page_size=16, access="block")
    plan, theirs = make_plan(find_model("llama-3.1-8b"), layout), kvbench.Figures.of(find_model("llama-3.1-8b"), layout)
    assert {rank.io_nbytes for rank in plan.ranks} == {theirs.io_size}
    assert sum(rank.batch_size for rank in plan.ranks) == theirs.batch_size


def test_mla_is_whole_on_every_rank() -> None:
    plan = make_plan(find_model("deepseek-r1"), Layout(tp=8, isl=16, page_size=16, access="block"))
    assert {rank.io_nbytes for rank in plan.ranks} == {35136 * 16}
    assert (plan.copies, plan.nbytes) == (8, 8 * 35136 * 16)
    (latent, _) = plan.differences()
    assert "latent vector (MLA)" in latent


def test_heads_are_not_torn() -> None:
    plan = make_plan(find_model("qwen3-235b"), Layout(tp=16, isl=16, page_size=16, access="layer"))
    assert {rank.io_nbytes for rank in plan.ranks} == {2 * 128 * 16}
    assert [rank.shard.heads.start for rank in plan.ranks] == [n // 4 for n in range(16)]
    assert "4 ranks have the same head" in plan.differences()[0]


def test_stages_have_whole_layers() -> None:
    plan = make_plan(find_model("llama-3.1-70b"), Layout(pp=32, isl=16, page_size=16, access="block"))
    assert sorted({rank.io_nbytes for rank in plan.ranks}) == [2 * 2048 * 16, 3 * 2048 * 16]
    assert plan.nbytes == plan.pages_nbytes
    assert "2.5 layers, which no stage has" in plan.differences()[0]
    uneven = make_plan(find_model("llama-3.1-8b"), Layout(pp=2, stages=(20, 12)))
    assert [len(rank.shard.layers) for rank in uneven.ranks] == [20, 12]


def test_the_caches_dtype_counts() -> None:
    plan = make_plan(find_model("qwen3-8b"), Layout(model_dtype="fp8", kv_dtype="fp16"))
    assert plan.geometry.token_nbytes == 147456
    assert "KVBench says 73728" in plan.differences()[0]
    other = make_plan(find_model("qwen3-8b"), Layout(kv_dtype="float32"))
    assert other.differences() == ["KVBench knows no dtype 'float32' or 'fp8': it has fp8, int8, fp16, bfloat16"]
    assert other.as_dict()["kvbench"] is None


def test_the_last_page_is_whole() -> None:
    plan = make_plan(find_model("llama-3.1-8b"), Layout(isl=1000, page_size=16, num_requests=10, access="block"))
    assert (plan.layout.pages, plan.ranks[0].batch_size) == (63, 630)
    assert "last of them moved whole" in plan.differences()[0]
    assert kvbench.Figures.of(plan.model, plan.layout).batch_size == 625


@pytest.mark.parametrize(("isl", "page", "share"), [(1000, 16, "57%"), (256, 16, "75%"), (1000, 1, "56%")])
def test_windows_are_noted(isl: int, page: int, share: str) -> None:
    plan = make_plan(find_model("gpt-oss-20b"), Layout(isl=isl, page_size=page, kv_dtype="bfloat16"))
    (note,) = plan.notes()
    assert "12 of 24 layers have a sliding window of 128 tokens" in note
    assert share in note
    assert make_plan(find_model("gpt-oss-20b"), Layout(isl=128, kv_dtype="bfloat16")).notes() == []


@pytest.mark.parametrize(
    ("values", "kind", "text"),
    [
        ({"tp": 3}, DescriptorError, "tp is 3"),
        ({"pp": 33}, ConfigurationError, "33, but the model has 32 layers"),
        ({"pp": 2, "stages": (16, 17)}, DescriptorError, "33 layers"),
        ({"kv_dtype": "fp4"}, ConfigurationError, "'fp4'"),
    ],
)
def test_what_cannot_be_divided_is_refused(values: dict[str, object], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        make_plan(find_model("llama-3.1-8b"), Layout().changed(**values))
