"""What all benchmarks' options have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import pytest

from nixl_async.benchmarks.options import Format, Word, flag, given, plain, read_file, refusal
from nixl_async.errors import ConfigurationError


class Colour(Word):
    """A choice."""

    RED = "red"
    BLUE = "Blue"


@dataclass(frozen=True)
class Options:
    """One field of each kind."""

    size: int = 1
    rate: float = 1.0
    name: str = ""
    fast: bool = False
    colour: Colour = Colour.RED
    colours: tuple[Colour, ...] = field(default=(), metadata={"of": Colour})


def read(path: Path, text: str) -> dict[str, Any]:
    path.write_text(text)
    return read_file(str(path), Options, {"hue": "colour"})


def test_choices_are_read_whatever_their_case() -> None:
    assert (Colour("RED"), Colour("blue"), Format("Json")) == (Colour.RED, Colour.BLUE, Format.JSON)
    with pytest.raises(ValueError, match="green"):
        Colour("green")


def test_what_was_said_are_choices_whether_or_not_the_parser_made_them_that() -> None:
    parameters = [click.Option(["--colour"]), click.Option(["--colours"], multiple=True), click.Option(["--size"], type=int)]
    command = click.Command("paint", params=[*parameters, click.Option(["--config-file"])])
    with command.make_context("paint", ["--colour", "BLUE", "--colours", "red", "--config-file", "x"]) as context:
        assert given(context, Options) == {"colour": Colour.BLUE, "colours": (Colour.RED,)}


def test_values_as_text() -> None:
    assert plain((Colour.RED, Colour.BLUE)) == "red,Blue"
    assert (plain(Colour.RED), plain(3), plain(True)) == ("red", 3, True)
    assert (flag("max_size"), flag("max_size", no=True)) == ("--max-size", "--no-max-size")
    assert str(refusal(Options(), "size", "at least 2")) == "--size is 1; it must be at least 2"


def test_a_file_has_every_kind(tmp_path: Path) -> None:
    text = 'size = 3\nrate = 2\nname = ["a", "b"]\nfast = true\nhue = "BLUE"\ncolours = "red,blue"\n'
    assert read(tmp_path / "o.toml", text) == {
        "size": 3,
        "rate": 2.0,
        "name": "a,b",
        "fast": True,
        "colour": Colour.BLUE,
        "colours": (Colour.RED, Colour.BLUE),
    }
    assert read(tmp_path / "o.toml", 'colours = ["red"]') == {"colours": (Colour.RED,)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sise = 3", "unknown key 'sise'; the closest that is allowed is 'size'"),
        ('size = "3"', "size is '3'; it must be of type int"),
        ("size = true", "size is True; it must be of type int"),
        ("rate = true", "rate is True; it must be of type float"),
        ('colour = "green"', "colour is 'green'; allowed are red, Blue"),
        ('colours = ["green"]', "colours is 'green'; allowed are red, Blue"),
        ("size =", "is not TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=said):
        read(tmp_path / "o.toml", text)
    with pytest.raises(ConfigurationError, match="none.toml cannot be read"):
        read_file(str(tmp_path / "none.toml"), Options, {})
