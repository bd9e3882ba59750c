"""When which requests come: formulas by hand, traces as Mooncake publishes them, lines that are none."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path

import pytest

from nixl_async.benchmarks.serve.arrivals import poisson, read_trace, with_batch
from nixl_async.errors import ConfigurationError

# The first lines of kvcache-ai/Mooncake's toolagent trace.
LINES = [
    {"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [*range(14)]},
    {"timestamp": 3000, "input_length": 7322, "output_length": 490, "hash_ids": [0, *range(14, 28)]},
    {"timestamp": 1500, "input_length": 2290, "output_length": 316, "hash_ids": [0, 42, 43, 44, 45]},
]
GIVEN = {"isl": 1000, "osl": 10, "spread": 0.5, "block_tokens": 64, "prefix_share": 0.5, "prefixes": 2}


def write(path: Path, *lines: object) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_a_trace_is_read_in_the_order_of_its_time(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.jsonl", LINES[0], "", *LINES[1:])
    found = read_trace(path, 10)
    assert [(one.number, one.seconds, one.prompt, one.answer) for one in found] == [
        (0, 0.0, 6758, 500),
        (1, 1.5, 2290, 316),
        (2, 3.0, 7322, 490),
    ]
    assert found[0].blocks == tuple(range(14))
    assert [one.blocks[0] for one in found] == [0, 0, 0]
    assert [one.seconds for one in read_trace(path, 10, speed=0.5)] == [0.0, 3.0, 6.0]
    assert len(read_trace(path, 2)) == 2


def test_a_trace_that_begins_later_begins_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.jsonl", *LINES[1:])
    assert [one.seconds for one in read_trace(path, 10)] == [0.0, 1.5]


def test_shrunk_prompts_have_as_many_blocks(tmp_path: Path) -> None:
    (one,) = read_trace(write(tmp_path / "trace.jsonl", LINES[0]), 1, shrink=16)
    # 6758 / 16 = 422.4, 500 / 16 = 31.25; 423 tokens in blocks of 32 are 14.
    assert (one.prompt, one.answer, len(one.blocks)) == (423, 32, 14)
    assert -(-one.prompt // (512 // 16)) == 14


def test_blocks_without_an_id_are_shared_with_nobody(tmp_path: Path) -> None:
    line = {"timestamp": 0, "input_length": 1025, "output_length": 1, "hash_ids": [7]}
    found = read_trace(write(tmp_path / "trace.jsonl", line, line), 2)
    assert [len(one.blocks) for one in found] == [3, 3]
    assert set(found[0].blocks) & set(found[1].blocks) == {7}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "it is not JSON"),
        ("[1]", r"it is \[1\]; it must be an object"),
        ({"timestamp": 0, "input_length": 1, "output_length": 1}, "hash_ids is missing"),
        (LINES[0] | {"timestamp": -1}, "timestamp is -1; it must be milliseconds"),
        (LINES[0] | {"timestamp": "0"}, "timestamp is '0'"),
        (LINES[0] | {"input_length": 0}, "input_length is 0; it must be a number of tokens, 1 to"),
        (LINES[0] | {"output_length": 1.5}, "output_length is 1.5"),
        (LINES[0] | {"input_length": True}, "input_length is True"),
        (LINES[0] | {"hash_ids": ["a"]}, r"hash_ids is \['a'\]; it must be a list of whole numbers"),
        (LINES[0] | {"hash_ids": [-1]}, "hash_ids is"),
        (LINES[0] | {"input_length": 512}, "hash_ids has 14 ids; 512 tokens have 1 blocks of 512"),
    ],
)
def test_a_line_that_is_no_request_is_named(line: object, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "trace.jsonl", LINES[0], line)
    with pytest.raises(ConfigurationError, match=rf"trace.jsonl, line 2: .*{said}"):
        read_trace(path, 10)
    # What comes after the requests that are asked for is nobody's.
    assert len(read_trace(path, 1)) == 1


def test_files_that_are_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        read_trace(str(tmp_path / "none"), 1)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="is no text"):
        read_trace(str(tmp_path / "bytes"), 1)
    with pytest.raises(ConfigurationError, match="has no request"):
        read_trace(write(tmp_path / "empty", "", ""), 1)


def test_poisson_arrivals_have_their_rate_and_spread() -> None:
    found = poisson(4000, 8.0, **GIVEN, seed=1)
    gaps = [b.seconds - a.seconds for a, b in itertools.pairwise(found)]
    # Of an exponential distribution mean and standard deviation are the same, 1/8 here; the mean of 4000 is within 5 %.
    assert statistics.fmean(gaps) == pytest.approx(1 / 8, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 8, rel=0.08)
    prompts = [one.prompt for one in found]
    assert min(prompts) >= 500
    assert max(prompts) <= 1500
    assert statistics.fmean(prompts) == pytest.approx(1000, rel=0.02)
    assert found == poisson(4000, 8.0, **GIVEN, seed=1)
    assert found != poisson(4000, 8.0, **GIVEN, seed=2)


def test_prompts_share_the_blocks_that_they_should() -> None:
    found = poisson(50, 8.0, **GIVEN, seed=1)
    for one in found:
        assert len(one.blocks) == -(-one.prompt // 64)
        shared = int(one.prompt * 0.5) // 64
        others = [other for other in found if other is not one and other.blocks[0] == one.blocks[0]]
        for other in others:
            common = min(shared, int(other.prompt * 0.5) // 64)
            assert one.blocks[:common] == other.blocks[:common]
            assert not set(one.blocks[shared:]) & set(other.blocks)
    assert len({one.blocks[0] for one in found}) == 2
    alone = poisson(50, 8.0, **{**GIVEN, "prefix_share": 0.0}, seed=1)
    assert len({block for one in alone for block in one.blocks}) == sum(len(one.blocks) for one in alone)


def test_a_share_of_requests_is_batch() -> None:
    found = poisson(1000, 8.0, **GIVEN, seed=1)
    assert sum(one.batch for one in with_batch(found, 0.3, 5)) == pytest.approx(300, abs=60)
    assert with_batch(found, 0.3, 5) == with_batch(found, 0.3, 5)
    assert with_batch(found, 0.0, 5) == found
