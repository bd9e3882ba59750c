"""Pages say where they belong: anything else is noticed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nixl_async.benchmarks.kv.contents import WrongBytes
from nixl_async.benchmarks.serve.contents import Pages, page_count
from nixl_async.geometry import KVGeometry

GEOMETRY = KVGeometry(layers=3, heads=2, head_dim=8)
BLOCKS = (5, 9, 1 << 47)
TABLE = np.array([7, 2, 9, 0, 4], np.int32)


@pytest.fixture
def pages() -> Pages:
    """Ten pages of 4 tokens; two of them are a block."""
    made = Pages(GEOMETRY, 10, 4, 8)
    made.fill(TABLE, BLOCKS, 0)
    return made


def test_what_is_filled_is_right(pages: Pages) -> None:
    assert pages.page_nbytes == 2 * 2 * 8 * 2 * 4
    pages.check(TABLE, BLOCKS)
    other = Pages(GEOMETRY, 10, 4, 8)
    other.fill(TABLE, BLOCKS, 0)
    view = pages.buffer.reshape(3, 10, -1)
    assert (view[:, TABLE] == other.buffer.reshape(3, 10, -1)[:, TABLE]).all()
    # No two pages are alike, neither in a layer nor between layers; others are as they were.
    assert len({view[layer, page].tobytes() for layer in range(3) for page in TABLE}) == 15
    assert (view[:, [1, 3, 5, 6, 8]] == 0x5A).all()


@pytest.mark.parametrize("place", [0, 1, 7, 8, 200, 255])
def test_a_byte_that_is_wrong_is_noticed(place: int, pages: Pages) -> None:
    pages.buffer.reshape(3, 10, -1)[2, 4, place] ^= 1
    with pytest.raises(WrongBytes, match="1 of 5 pages of layer 2 hold wrong bytes"):
        pages.check(TABLE, BLOCKS)


def change_order(pages: Any) -> Any:
    return TABLE[[1, 0, 2, 3, 4]], BLOCKS


def change_block(pages: Any) -> Any:
    return TABLE, (5, 8, 1 << 47)


def swap_layers(pages: Any) -> Any:
    view = pages.buffer.reshape(3, -1)
    view[[0, 1]] = view[[1, 0]]
    return TABLE, BLOCKS


@pytest.mark.parametrize("change", [change_order, change_block, swap_layers])
def test_pages_in_each_others_places_are_noticed(change: Any, pages: Pages) -> None:
    table, blocks = change(pages)
    with pytest.raises(WrongBytes, match="of layer 0"):
        pages.check(table, blocks)


def test_blank_pages_do_not_pass_for_what_they_held(pages: Pages) -> None:
    pages.blank(TABLE[2:])
    with pytest.raises(WrongBytes, match="3 of 5"):
        pages.check(TABLE, BLOCKS)
    pages.fill(TABLE, BLOCKS, 2)
    pages.check(TABLE, BLOCKS)


def test_a_blocks_pages_in_all_layers(pages: Pages) -> None:
    # Layers lie behind each other, ten pages each; block 1 has the request's pages 2 and 3.
    assert pages.in_blocks(TABLE, 1, 2).tolist() == [9, 0, 19, 10, 29, 20]
    assert pages.in_blocks(TABLE, 0, 2).tolist() == [7, 2, 17, 12, 27, 22, 9, 0, 19, 10, 29, 20]


def test_pages_are_whole() -> None:
    assert [page_count(tokens, 16) for tokens in (1, 16, 17, 1000)] == [1, 1, 2, 63]
