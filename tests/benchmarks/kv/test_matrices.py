"""Traffic patterns and their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixl_async.benchmarks.kv.matrices import MAX_NBYTES, Pattern, parse_size, read_matrix, read_traffic, write_size
from nixl_async.errors import ConfigurationError
from tests.benchmarks.kv.files import spoiled

MATRIX = "0 0 1M 1M\n0 0 1M 1M\n0 0 0 5K\n0 0 0 5K\n"


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("0", 0), ("7", 7), ("5K", 5120), ("1m", 1 << 20), ("1.5G", 3 << 29), ("12b", 12), ("0.001K", 1), ("2.66G", 2856153251)],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "K", "-1", "nan", "inf", "infK", "1T", "1KB", "x", "1e40", "0x10"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises((ValueError, OverflowError)):
        parse_size(text)


@given(st.integers(0, MAX_NBYTES))
def test_what_is_written_is_read_back(nbytes: int) -> None:
    assert parse_size(write_size(nbytes)) == nbytes


def test_a_matrix(tmp_path: Path) -> None:
    path = tmp_path / "matrix.txt"
    path.write_text("\n" + MATRIX + "\n\n")
    pattern = Pattern(read_matrix(path), "matrix.txt")
    assert pattern.world == 4
    assert pattern.nbytes == (4 << 20) + 10240
    assert pattern.senders == [0, 1, 2, 3]
    assert [pattern.sent(rank) for rank in range(4)] == [2 << 20, 2 << 20, 5120, 5120]
    assert [pattern.received(rank) for rank in range(4)] == [0, 0, 2 << 20, (2 << 20) + 10240]
    assert pattern.initiators == [0, 1, 2, 3]
    assert Pattern(pattern.matrix, "", op="READ").initiators == [2, 3]
    assert Pattern.read(json.loads(json.dumps(pattern.as_dict()))) == pattern


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("1 2\n3\n", "line 2: 1 cells; the first line has 2"),
        ("1 2\n3 x\n", "line 2, cell 2: 'x' is no size"),
        ("1 -2\n3 4\n", "line 1, cell 2: '-2'"),
        ("1 nan\n3 4\n", "'nan' is no size"),
        ("1 2 3\n4 5 6\n", "2 rows of 3 cells"),
        ("", "0 rows of 0 cells"),
        ("1 9999999999G\n3 4\n", "is no size"),
    ],
)
def test_malformed_matrices_are_named_with_the_line(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "matrix.txt"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=match) as caught:
        read_matrix(path)
    assert str(path) in str(caught.value)


def test_a_single_pattern(tmp_path: Path) -> None:
    """As KVBench's documentation has it."""
    (tmp_path / "matrix.txt").write_text(MATRIX)
    path = tmp_path / "config.yaml"
    path.write_text(
        f"iters: 50\nwarmup_iters: 10\ntraffic_pattern:\n  matrix_file: '{tmp_path}/matrix.txt'\n  shards: 1\n"
        '  mem_type: "cuda"\n  xfer_op: "WRITE"\n'
    )
    found = read_traffic(path)
    assert (found.sequential, found.iters, found.warmup, found.world) == (False, 50, 10, 4)
    (pattern,) = found.patterns
    assert (pattern.memory, pattern.op, pattern.sleep_before, pattern.sleep_after) == ("vram", "WRITE", 0.0, 0.0)


def test_a_sequence(tmp_path: Path) -> None:
    """Both names of the sleep, which KVBench's documentation has, and matrices beside the file that names them."""
    (tmp_path / "matrix_0.txt").write_text(MATRIX)
    path = tmp_path / "metadata.yaml"
    path.write_text(
        "traffic_patterns:\n- matrix_file: matrix_0.txt\n  metadata:\n    isl: 38328\n  sleep_before_launch_sec: 16.5\n"
        "- matrix_file: matrix_0.txt\n  mem_type: CPU\n  xfer_op: read\n  sleep_after_launch_sec: 2\n"
    )
    found = read_traffic(path)
    assert found.sequential
    first, second = found.patterns
    assert (first.memory, first.op, first.sleep_before, first.sleep_after) == (None, "WRITE", 16.5, 0.0)
    assert (second.memory, second.op, second.sleep_before, second.sleep_after) == ("dram", "READ", 0.0, 2.0)
    assert [one.sleep_before for one in found.slept(0.1).patterns] == pytest.approx([1.65, 0.0])


def test_a_matrix_alone_is_a_pattern(tmp_path: Path) -> None:
    path = tmp_path / "matrix.txt"
    path.write_text("0 1\n2 0\n")
    found = read_traffic(path)
    assert (found.sequential, found.iters, found.patterns[0].matrix) == (False, 1, ((0, 1), (2, 0)))


@pytest.mark.parametrize(
    ("document", "match"),
    [
        ({}, "neither 'traffic_pattern' nor 'traffic_patterns'"),
        ({"traffic_patterns": []}, "not empty"),
        ({"traffic_patterns": {"matrix_file": "a.txt"}}, "must be a list"),
        ({"traffic_pattern": {"shards": 1}}, "'matrix_file'"),
        ({"traffic_pattern": "a.txt"}, "'matrix_file'"),
        ({"traffic_pattern": {"matrix_file": "gone.txt"}}, "gone.txt.*No such file"),
        ({"traffic_pattern": {"matrix_file": "a.txt", "shards": 2}}, "'shards' is 2"),
        ({"traffic_pattern": {"matrix_file": "a.txt", "mem_type": "tape"}}, "'mem_type' is 'tape'"),
        ({"traffic_pattern": {"matrix_file": "a.txt", "xfer_op": "COPY"}}, "'xfer_op' is 'COPY'"),
        ({"traffic_pattern": {"matrix_file": "a.txt", "sleep_before_launch_sec": -1}}, "'sleep_before_launch_sec' is -1"),
        ({"traffic_pattern": {"matrix_file": "a.txt", "sleep_after_launch_sec": "1s"}}, "'sleep_after_launch_sec' is '1s'"),
        ({"traffic_pattern": {"matrix_file": "a.txt"}, "iters": 0}, "'iters' is 0"),
        ({"traffic_pattern": {"matrix_file": "a.txt"}, "warmup_iters": "x"}, "'warmup_iters' is 'x'"),
        (
            {"traffic_patterns": [{"matrix_file": "a.txt"}, {"matrix_file": "b.txt"}]},
            "equally many ranks; .*a.txt: 2, b.txt: 3",
        ),
    ],
)
def test_wrong_files_of_patterns(document: object, match: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0 1\n1 0\n")
    (tmp_path / "b.txt").write_text("0 1 0\n1 0 0\n0 0 0\n")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigurationError, match=match):
        read_traffic(path)


def test_any_spoiled_file_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0 1\n1 0\n")
    one = {"matrix_file": "a.txt", "shards": 1, "mem_type": "cpu", "xfer_op": "READ", "sleep_before_launch_sec": 1}
    path, read, said = tmp_path / "config.json", 0, []
    for document in ({"traffic_patterns": [one, one]}, {"iters": 1, "warmup_iters": 0, "traffic_pattern": one}):
        for spoilt in spoiled(document):
            path.write_text(json.dumps(spoilt))
            try:
                read_traffic(path)
                read += 1
            except ConfigurationError as error:
                said.append(str(error))
    assert read
    assert not [text for text in said if "\n" in text]
