"""Files of settings, good and bad."""

from __future__ import annotations

from pathlib import Path

import pytest

from nixl_async.benchmarks.kv.documents import read_document, read_text
from nixl_async.errors import ConfigurationError


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "section:\n  a: 1\n"),
        ("a.yml", '{"section": {"a": 1}}'),
        ("a.json", '{"section": {"a": 1}}'),
        ("a.toml", "[section]\na = 1\n"),
        ("a", "section: {a: 1}"),
    ],
)
def test_three_forms(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert read_document(tmp_path / name) == {"section": {"a": 1}}


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.yaml", b"a: [1", "does not parse as yaml"),
        ("a.yaml", b"a: !!python/object/apply:os.system ['true']", "does not parse as yaml"),
        ("a.json", b"{", "does not parse as json"),
        ("a.toml", b"a = ", "does not parse as toml"),
        ("a.yaml", b"", "NoneType"),
        ("a.json", b"[1]", "list"),
        ("a.yaml", b"\xff\xfe\x00", "no text file"),
        ("a.yaml", b"[" * 1_000, "does not parse"),
    ],
)
def test_what_does_not_parse_is_named(name: str, content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=match) as caught:
        read_document(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        read_text(tmp_path / "nothing")
    with pytest.raises(ConfigurationError, match="Is a directory"):
        read_text(tmp_path)
