"""What may be told to the transfer benchmark, from the command line and from a file, and who then talks to whom."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nixl_async.benchmarks.options import Format
from nixl_async.benchmarks.transfer.command import transfer
from nixl_async.benchmarks.transfer.options import Location, Mode, Op, Options, Scheme, Segment, Versus, flows, make
from nixl_async.benchmarks.transfer.peers.plain import Flow, need
from nixl_async.errors import ConfigurationError


def test_every_option_is_on_the_command_line() -> None:
    assert {field.name for field in dataclasses.fields(Options)} == set(inspect.signature(transfer).parameters) - {
        "context",
        "config_file",
    }


def test_defaults_are_those_of_nixlbench() -> None:
    options = make({})
    assert (options.start_block_size, options.max_block_size) == (4096, 64 << 20)
    assert (options.num_iter, options.warmup_iter, options.large_blk_iter_ftr) == (1000, 100, 16)
    assert (options.scheme, options.op_type, options.check_consistency) == (Scheme.PAIRWISE, Op.WRITE, True)


def test_blocks_double_and_batches_do_within_them() -> None:
    options = make({"start_block_size": 1000, "max_block_size": 4100, "start_batch_size": 1, "max_batch_size": 3})
    assert [(point.block, point.batch) for point in options.points()] == [
        (1000, 1), (1000, 2), (2000, 1), (2000, 2), (4000, 1), (4000, 2),
    ]  # fmt: skip
    assert len({point.salt for point in options.points()}) == 6


def test_sizes_grow_by_another_factor_and_requests_stay_below_a_bound() -> None:
    options = make({
        "start_block_size": 1024, "max_block_size": 20000, "max_batch_size": 20, "size_factor": 4, "max_request_size": 16384,
    })  # fmt: skip
    assert [(point.block, point.batch) for point in options.points()] == [
        (1024, 1), (1024, 4), (1024, 16), (4096, 1), (4096, 4), (16384, 1),
    ]  # fmt: skip
    assert len({point.salt for point in options.points()}) == 6
    # Memory is needed for what is measured.
    make({"max_batch_size": 256, "max_request_size": 64 << 20, "total_buffer_size": 64 << 20})


def test_large_blocks_make_fewer_requests_and_all_are_multiples_of_the_slots() -> None:
    options = make({"num_iter": 1000, "warmup_iter": 100, "rounds": 5, "num_threads": 3, "pipeline_depth": 2})
    assert options.iterations(1 << 20) == (204, 102)
    assert options.iterations((1 << 20) + 1) == (18, 12)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"num_initiator_dev": 2}, "as many targets as initiators; it has 2 and 1"),
        ({"scheme": Scheme.MANY_TO_ONE, "num_target_dev": 2}, "--num-target-dev 1, not 2"),
        ({"scheme": Scheme.ONE_TO_MANY, "num_initiator_dev": 2}, "--num-initiator-dev 1, not 2"),
        ({"scheme": Scheme.TP, "num_initiator_dev": 2, "num_target_dev": 3}, "a multiple of the other; it has 2 and 3"),
        ({"scheme": Scheme.TP, "num_target_dev": 3}, "into 3 parts; a block of 4096 bytes has none"),
        ({"start_block_size": 0}, "--start-block-size is 0; it must be at least 1"),
        ({"start_block_size": 8192, "max_block_size": 4096}, "at most --max-block-size (4096)"),
        ({"num_iter": 0}, "--num-iter is 0; it must be at least 1"),
        ({"size_factor": 1}, "--size-factor is 1; it must be at least 2"),
        ({"max_request_size": -1}, "--max-request-size is -1; it must be at least 0"),
        ({"max_request_size": 4095}, "--max-request-size is 4095; it must be at least the first request's bytes, 4096"),
        ({"warmup_iter": -1}, "--warmup-iter is -1; it must be at least 0"),
        ({"reregister_mem": True, "prepared_xfer": True}, "leave one out"),
        ({"reregister_mem": True, "num_threads": 2}, "give 1 and 1"),
        ({"total_buffer_size": 1 << 20}, "--max-block-size 67108864 x --max-batch-size 1 x 1 at once needs 67108864"),
        ({"randomize_location_mode": Location.BYTE}, "bytealigned is for files"),
        ({"target_seg_type": Segment.FILE, "randomize_location_mode": Location.BYTE}, "--no-check-consistency"),
        ({"target_seg_type": Segment.FILE, "notify": True}, "FILE has none"),
        ({"target_seg_type": Segment.FILE, "scheme": Scheme.TP}, "pairwise where the target is FILE"),
        ({"target_seg_type": Segment.FILE, "mode": Mode.MG, "num_initiator_dev": 2}, "use --mode SG"),
        ({"target_seg_type": Segment.FILE, "filepath": "/nowhere"}, "a directory that exists"),
        ({"target_seg_type": Segment.FILE, "filenames": "a,b"}, "--num-files is 1; it must be the number of --filenames, 2"),
        ({"filepath": "/tmp"}, "add --target-seg-type FILE or leave it out"),
        ({"target_seg_type": Segment.OBJ}, "needs a store: --obj-bucket-name"),
        ({"backend": "POSIX", "target_seg_type": Segment.DRAM}, "--backend POSIX moves to and from FILE"),
        ({"initiator_seg_type": Segment.FILE}, "files and objects are the target's"),
        ({"versus": (Versus.MOONCAKE,), "target_seg_type": Segment.FILE}, "--versus mooncake can be measured with the target DRAM"),
        ({"versus": (Versus.NIXL,), "nixl_python": "/nowhere"}, "--nixl-python is /nowhere"),
        ({"format": Format.PARQUET}, "needs --output FILE"),
        ({"rank": 1}, "no --world-size"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make(given)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_backends_have_nixls_names_too() -> None:
    assert make({"backend": "UCX"}).backend == "ucx"
    posix = make({"backend": "POSIX"})
    assert (posix.backend, posix.target_seg_type, posix.n_targets) == ("", Segment.FILE, 0)
    assert make({"backend": "OBJ", "obj_bucket_name": "b"}).target_seg_type is Segment.OBJ


# Files.


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "bench.toml"
    path.write_text(text)
    return str(path)


def test_a_file_has_the_same_names_and_the_command_line_goes_before_it(tmp_path: Path) -> None:
    path = written(
        tmp_path, 'scheme = "tp"\nnum-target-dev = 2\nop_type = "read"\nversus = ["nixl"]\nnum_iter = 7\nnotify = true\n'
    )
    options = make({"num_iter": 9}, path)
    assert (options.scheme, options.num_target_dev, options.op_type) == (Scheme.TP, 2, Op.READ)
    assert (options.num_iter, options.notify, options.versus) == (9, True, (Versus.NIXL,))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num_iters = 3", "unknown key 'num_iters'; the closest that is allowed is 'num_iter'"),
        ("start_blok_size = 3", "the closest that is allowed is 'start_block_size'"),
        ('num_iter = "many"', "num_iter is 'many'; it must be of type int"),
        ("num_iter = true", "num_iter is True; it must be of type int"),
        ('scheme = "ring"', "scheme is 'ring'; allowed are pairwise, manytoone, onetomany, tp"),
        ("num_iter = ", "is not TOML"),
    ],
)
def test_a_wrong_file_says_where(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigurationError) as caught:
        make({}, path)
    assert said in str(caught.value)
    assert path in str(caught.value)


def test_a_file_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"--config-file /nowhere\.toml cannot be read: No such file"):
        make({}, "/nowhere.toml")


# Who talks to whom.

LAYOUTS = [
    (Scheme.PAIRWISE, 2, 2, [Flow(0, 0), Flow(1, 1)]),
    (Scheme.MANY_TO_ONE, 3, 1, [Flow(0, 0), Flow(1, 0, inbound=1), Flow(2, 0, inbound=2)]),
    (Scheme.ONE_TO_MANY, 1, 2, [Flow(0, 0, lanes=2), Flow(0, 1, lane=1, lanes=2)]),
    (Scheme.TP, 1, 2, [Flow(0, 0, pieces=2), Flow(0, 1, piece=1, pieces=2)]),
    (Scheme.TP, 4, 2, [Flow(0, 0), Flow(1, 0, inbound=1), Flow(2, 1), Flow(3, 1, inbound=1)]),
    (
        Scheme.TP, 2, 4,
        [Flow(0, 0, pieces=2), Flow(0, 1, piece=1, pieces=2), Flow(1, 2, pieces=2), Flow(1, 3, piece=1, pieces=2)],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "n", "m", "expected"), LAYOUTS)
def test_schemes(scheme: Scheme, n: int, m: int, expected: list[Flow]) -> None:
    assert flows(make({"scheme": scheme, "num_initiator_dev": n, "num_target_dev": m})) == expected


@pytest.mark.parametrize(("scheme", "n", "m", "expected"), LAYOUTS)
@pytest.mark.parametrize("location", [Location.NONE, Location.BLOCK])
def test_no_byte_of_either_side_is_moved_twice(
    scheme: Scheme, n: int, m: int, expected: list[Flow], location: Location
) -> None:
    given = {"scheme": scheme, "num_initiator_dev": n, "num_target_dev": m, "randomize_location_mode": location}
    options = make(
        given | {"num_threads": 2, "pipeline_depth": 2, "start_block_size": 64, "max_block_size": 64} | {"start_batch_size": 3}
    )
    _each_byte_once(options, expected, (n, m))


@pytest.mark.parametrize(("scheme", "n", "m", "expected"), LAYOUTS)
def test_with_all_devices_in_one_process_the_same_is_moved(scheme: Scheme, n: int, m: int, expected: list[Flow]) -> None:
    given = {"scheme": scheme, "num_initiator_dev": n, "num_target_dev": m, "mode": Mode.MG}
    options = make(given | {"num_threads": 2, "start_block_size": 64, "max_block_size": 64, "start_batch_size": 3})
    assert (options.world, options.role(0), options.role(1)) == (2, ("initiator", 0), ("target", 0))
    found = flows(options)
    _each_byte_once(options, found, (1, 1))
    # A device has an equal part of its side's memory, one after the other.
    (point,) = options.points()
    for role, count in (("initiator", n), ("target", m)):
        whole = need(point, found, role, 0)
        for one, apart in zip(found, expected, strict=True):
            where = point.near(one, 1) if role == "initiator" else point.far(one, 1)
            assert set((where // (whole // count)).tolist()) == {getattr(apart, role)}


def _each_byte_once(options: Options, found: list[Flow], counts: tuple[int, int]) -> None:
    (point,) = options.points()
    for role, count in zip(("initiator", "target"), counts, strict=True):
        for index in range(count):
            nbytes = need(point, found, role, index)
            touched = np.zeros(nbytes, np.int64)
            for flow in found:
                if getattr(flow, role) == index:
                    for slot in range(point.slots):
                        for place in (point.near if role == "initiator" else point.far)(flow, slot).tolist():
                            touched[place : place + point.nbytes(flow)] += 1
            assert (touched == 1).all(), (role, index)
