"""Keys: each covers everything before it; names of objects are theirs alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixl_async import DescriptorError
from nixl_async.tiers import hash_tokens
from nixl_async.tiers.keys import check_keys, object_name, parse_object_name


def test_equal_beginnings_have_equal_keys_and_others_never() -> None:
    tokens = np.arange(64)
    other = tokens.copy()
    other[20] = 7
    a, b = hash_tokens(tokens, 8), hash_tokens(other, 8)
    assert len(a) == 8
    assert a[:2] == b[:2]
    assert not set(a[2:]) & set(b[2:])


def test_a_sequence_goes_on_from_its_parent() -> None:
    whole = hash_tokens(range(32), 4)
    assert hash_tokens(range(16, 32), 4, parent=whole[3]) == whole[4:]


def test_the_same_block_elsewhere_has_another_key() -> None:
    first, second = hash_tokens([1, 2, 3, 4] * 2, 4)
    assert first != second


def test_salt_keeps_apart() -> None:
    assert not set(hash_tokens(range(16), 4)) & set(hash_tokens(range(16), 4, salt=b"lora"))


def test_a_block_that_is_not_full_has_no_key() -> None:
    assert len(hash_tokens(range(11), 4)) == 2
    assert hash_tokens([], 4) == []


@pytest.mark.parametrize("tokens", [[-1], [1 << 32], [0.5]], ids=str)
def test_what_is_no_token_is_refused(tokens: list[float]) -> None:
    with pytest.raises(DescriptorError, match="token"):
        hash_tokens(tokens, 1)


def test_a_block_has_tokens() -> None:
    with pytest.raises(DescriptorError, match="block_tokens is 0"):
        hash_tokens([1], 0)


@given(st.binary(min_size=1, max_size=255))
def test_names_give_their_keys_back(key: bytes) -> None:
    name = object_name(key)
    assert parse_object_name(name) == key
    assert all(0 < len(part) < 255 for part in name.split("/"))


def test_the_name_of_a_key_is_never_the_directory_of_another() -> None:
    assert not object_name(b"a" * 97).startswith(object_name(b"a" * 96) + "/")


@pytest.mark.parametrize("name", ["", "xyz", "AB", "abc", "ab/cd"])
def test_other_names_are_not_ours(name: str) -> None:
    assert parse_object_name(name) is None


def test_what_is_no_key_is_refused() -> None:
    check_keys([b"a", b"b" * 255])
    for wrong in (b"", b"b" * 256):
        with pytest.raises(DescriptorError, match=f"{len(wrong)} bytes"):
            check_keys([wrong])
    with pytest.raises(TypeError, match="str"):
        check_keys(["a"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="a list of keys"):
        check_keys(b"abc")  # type: ignore[arg-type]
