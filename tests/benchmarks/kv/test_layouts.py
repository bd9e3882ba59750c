"""Parallelism and requests, and KVBench's configuration files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixl_async.benchmarks.kv.layouts import Layout, dtype_nbytes, read_layout, split_layers
from nixl_async.benchmarks.kv.models import find_model
from nixl_async.benchmarks.kv.planning import make_plan
from nixl_async.errors import ConfigurationError, DescriptorError
from tests.benchmarks.kv.files import spoiled, write_config


def test_a_configuration_file_is_read_unchanged(tmp_path: Path) -> None:
    found = read_layout(write_config(tmp_path, "block-tp8-pp4", kv_dtype="fp16"))
    assert found == Layout(
        tp=8, pp=4, kv_dtype="fp16", num_requests=10, isl=1000, osl=100, page_size=16, access="block", hardware="H100"
    )


def test_what_a_file_does_not_name_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("runtime:\n  isl: '77'\nstrategy: nothing\n")
    assert read_layout(path) == Layout(isl=77)
    assert read_layout(path, Layout(tp=4, isl=3)) == Layout(tp=4, isl=77)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("strategy:\n  tp_size: 0\n", "tp is 0"),
        ("strategy:\n  pp_size: two\n", "pp is 'two'"),
        ("runtime:\n  isl: 1.5\n", "isl is 1.5"),
        ("runtime:\n  num_requests: true\n", "num_requests is True"),
        ("system:\n  access_pattern: both\n", "access is 'both'"),
        ("a: 1\n", "none of the sections"),
    ],
)
def test_wrong_values_are_named_with_their_file(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=match) as caught:
        read_layout(path)
    assert str(path) in str(caught.value)


def test_changes_leave_out_what_is_none() -> None:
    assert Layout(tp=2).changed(tp=None, isl=5) == Layout(tp=2, isl=5)
    with pytest.raises(ConfigurationError, match="isl"):
        Layout().changed(isl=-1)


@pytest.mark.parametrize(
    ("layers", "pp", "expected"),
    [(61, 2, (31, 30)), (61, 8, (7, 7, 8, 8, 8, 8, 8, 7)), (80, 8, (10,) * 8), (94, 4, (23, 24, 24, 23)), (3, 3, (1, 1, 1))],
)
def test_layers_are_divided_as_by_vllm(layers: int, pp: int, expected: tuple[int, ...]) -> None:
    assert split_layers(layers, pp) == expected


@given(layers=st.integers(1, 200), pp=st.integers(1, 200))
def test_every_layer_has_a_stage(layers: int, pp: int) -> None:
    if pp > layers:
        with pytest.raises(ConfigurationError, match="each stage needs one"):
            split_layers(layers, pp)
        return
    stages = split_layers(layers, pp)
    assert (len(stages), sum(stages)) == (pp, layers)
    assert max(stages) - min(stages) <= 1


def test_dtypes() -> None:
    assert [dtype_nbytes(name) for name in ("fp8", "INT8", "bfloat16", "float32", "float8_e4m3fn")] == [1, 1, 2, 4, 1]
    with pytest.raises(ConfigurationError, match="'int4'; known are fp8"):
        dtype_nbytes("int4")


def test_any_spoiled_file_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    path, read, said = tmp_path / "config.json", 0, []
    for document in spoiled(Layout(isl=100, access="block", source="memory").as_kvbench()):
        path.write_text(json.dumps(document))
        try:
            make_plan(find_model("qwen3-8b"), read_layout(path)).as_dict()
            read += 1
        except (ConfigurationError, DescriptorError) as error:
            said.append(str(error))
    assert read
    assert not [text for text in said if "\n" in text]


def test_there_are_bounds() -> None:
    with pytest.raises(ConfigurationError, match="isl is 4294967297"):
        Layout(isl=(1 << 32) + 1)
    with pytest.raises(ConfigurationError, match="32768 ranks; at most 16384"):
        Layout(tp=256, pp=128)
