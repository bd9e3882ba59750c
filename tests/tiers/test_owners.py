"""Who uses a directory: the living hold a lock, the dead do not."""

from __future__ import annotations

import os
from pathlib import Path

from nixl_async.tiers.owners import Owners


def test_who_lives_and_who_is_dead(tmp_path: Path) -> None:
    one, other = Owners(tmp_path), Owners(tmp_path)
    one.make()
    assert not one.joined
    one.leave()
    one.join(7)
    assert one.joined
    assert other.living() == [7]
    assert not other.is_dead(7)
    assert other.is_dead(8)
    (tmp_path / "owners" / "9").touch()
    assert other.is_dead(9)
    assert other.living() == [7]
    other.forget(9)
    assert sorted(os.listdir(tmp_path / "owners")) == ["7"]
    one.leave()
    assert other.living() == os.listdir(tmp_path / "owners") == []


def test_a_process_that_ends_is_dead(tmp_path: Path) -> None:
    owners = Owners(tmp_path)
    owners.make()
    child = os.fork()
    if child == 0:
        owners.join(3)
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / "owners" / "3").exists()
    assert owners.is_dead(3)
