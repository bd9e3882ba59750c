"""Traffic made up from a model: exact bytes by the planner, and KVBench's generator reproduced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nixl_async.benchmarks.kv import workloads
from nixl_async.benchmarks.kv.layouts import Layout
from nixl_async.benchmarks.kv.matrices import read_traffic
from nixl_async.benchmarks.kv.models import Model, find_model
from nixl_async.benchmarks.kv.workloads import Fleet, Requests
from nixl_async.errors import ConfigurationError, DescriptorError

LLAMA_405B = find_model("llama-3.1-405b")


def fleet(prefill_tp: int, decode_tp: int, workers: int = 1, page_size: int = 16) -> Fleet:
    common = {"kv_dtype": "bfloat16", "page_size": page_size, "access": "block"}
    return Fleet(Layout().changed(tp=prefill_tp, **common), Layout().changed(tp=decode_tp, **common), workers)


def test_kvbenchs_generator() -> None:
    """What inference_workload_matgen.py of ai-dynamo/nixl (8770b655) wrote for llama-405b after np.random.seed(7)."""
    requests = Requests(count=6, batch_size=2, seed=7)
    found = workloads.generate_as_kvbench(LLAMA_405B, fleet(4, 8, 2), requests)
    assert [isl for _, isl, _ in found] == [44245, 36403, 24130]
    assert [seconds for _, _, seconds in found] == [557.06947444736, 425.594026704896, 248.14361083904]
    text = [[[workloads.kvbench_size(cell) for cell in row] for row in cells] for cells, _, _ in found]
    assert text[0][0] == ["0"] * 8 + ["2.66G"] * 2 + ["0"] * 14
    assert text[0][3] == ["0"] * 14 + ["2.66G"] * 2 + ["0"] * 8
    assert text[1][4] == ["0"] * 16 + ["2.19G"] * 2 + ["0"] * 6
    assert text[2][1] == ["0"] * 10 + ["1.45G"] * 2 + ["0"] * 12
    assert [sum(cell != "0" for row in one for cell in row) for one in text] == [8, 8, 8]


@pytest.mark.parametrize(("prefill_tp", "decode_tp"), [(4, 8), (2, 2), (4, 2), (8, 16)])
def test_every_decode_rank_gets_its_part_whole(prefill_tp: int, decode_tp: int) -> None:
    (batch,) = workloads.generate(LLAMA_405B, fleet(prefill_tp, decode_tp), Requests(count=1))
    geometry = LLAMA_405B.geometry(2)
    pages = -(-batch.isl // 16)
    received = np.array(batch.cells).sum(axis=0)[prefill_tp:]
    heads = max(1, geometry.heads // decode_tp)
    assert received.tolist() == [pages * 16 * geometry.token_nbytes * heads // geometry.heads] * decode_tp
    assert np.array(batch.cells)[:, :prefill_tp].sum() == 0


def test_mla_goes_whole_to_every_decode_rank() -> None:
    model = find_model("deepseek-r1")
    (batch,) = workloads.generate(model, fleet(2, 4, page_size=1), Requests(count=1, isl_min=10, isl_max=10))
    cells = np.array(batch.cells)
    assert cells.sum(axis=0).tolist() == [0, 0] + [10 * 70272] * 4
    assert (cells[:2, 2:] > 0).sum(axis=0).tolist() == [1] * 4


def test_stages_send_their_layers() -> None:
    layout = Layout(pp=2, kv_dtype="fp8")
    (batch,) = workloads.generate(find_model("llama-3.1-8b"), Fleet(layout, Layout(kv_dtype="fp8")), Requests(1, isl_max=1000))
    assert batch.cells[0][2] == batch.cells[1][2] == 1000 * 65536 // 2


def test_batches() -> None:
    lengths = Requests(count=50, isl_mean=100, isl_scale=50, isl_min=80, isl_max=120, batch_size=4).batches(1)
    assert [len(batch) for batch in lengths] == [4] * 12 + [2]
    assert all(80 <= isl <= 120 for batch in lengths for isl in batch)
    assert lengths == Requests(count=50, isl_mean=100, isl_scale=50, isl_min=80, isl_max=120, batch_size=4).batches(1)
    # A batch is closed by what is more than fits.
    assert [len(batch) for batch in Requests(5, 4, 100, 0, 1, 100, max_batch_nbytes=150.0).batches(1)] == [2, 2, 1]


def test_what_is_written_is_what_traffic_reads(tmp_path: Path) -> None:
    made = workloads.generate(LLAMA_405B, fleet(1, 2, 2), Requests(count=3, isl_mean=2000))
    listed = [(workloads.as_text(one.cells), one.isl, one.compute_seconds) for one in made]
    found = read_traffic(workloads.write_workload(tmp_path / "new", listed))
    assert found.sequential
    assert [one.matrix for one in found.patterns] == [one.cells for one in made]
    assert [one.sleep_before for one in found.patterns] == pytest.approx([one.compute_seconds for one in made])
    # The workers take turns.
    assert [one.senders for one in found.patterns] == [[0], [1], [0]]


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="hidden_size"):
        workloads.compute_seconds(Model("m", "here", 1, 1, 1, 2), [1], 1)
    with pytest.raises(ConfigurationError, match="stages"):
        workloads.generate_as_kvbench(LLAMA_405B, Fleet(Layout(pp=2), Layout()), Requests(1))
    with pytest.raises(ConfigurationError, match="to divide"):
        workloads.generate_as_kvbench(LLAMA_405B, fleet(4, 2), Requests(1))
    with pytest.raises(DescriptorError, match="tp is 3"):
        workloads.generate(LLAMA_405B, fleet(3, 3), Requests(1))
    with pytest.raises(ConfigurationError, match="1 <= the least"):
        Requests(isl_min=5, isl_max=4)
    with pytest.raises(ConfigurationError, match="must be positive"):
        Requests(count=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written to"):
        workloads.write_workload(tmp_path / "file", [])
