"""Checksums of blocks: of the key and the bytes, in either kind."""

from __future__ import annotations

import zlib

import pytest

from nixl_async import MissingDependency
from nixl_async.tiers import checksums
from nixl_async.tiers.checksums import CRC32, CRC64NVME, best_kind, checksum_blocks

DATA = memoryview(bytes(range(256)) * 16)
KINDS = [CRC32, pytest.param(CRC64NVME, marks=pytest.mark.skipif(best_kind() != CRC64NVME, reason="awscrt is not installed"))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_checksum_covers_key_and_bytes_and_not_how_they_are_cut(kind: int) -> None:
    whole, cut, other, changed = checksum_blocks(
        kind,
        [b"key", b"key", b"kez", b"key"],
        [[DATA], [DATA[:100], DATA[100:]], [DATA], [memoryview(bytes(DATA)[:-1] + b"x")]],
    ).tolist()
    assert whole == cut
    assert len({whole, other, changed}) == 3


def test_crc32_is_zlibs() -> None:
    assert checksum_blocks(CRC32, [b"k"], [[DATA]]).tolist() == [zlib.crc32(b"k" + DATA)]


@pytest.mark.skipif(best_kind() != CRC64NVME, reason="awscrt is not installed")
def test_crc64nvme_is_the_one_of_the_standard() -> None:
    # The check value of CRC-64/NVME in the NVM Express NVM Command Set Specification: over "123456789".
    assert checksum_blocks(CRC64NVME, [b"1"], [[memoryview(b"23456789")]]).tolist() == [0xAE8B14860A799888]


def test_without_awscrt_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "awscrt.checksums", None)
    monkeypatch.setattr(checksums, "_functions", {})
    with pytest.raises(MissingDependency, match="awscrt"):
        checksum_blocks(CRC64NVME, [b"k"], [[DATA]])
