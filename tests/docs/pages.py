"""Pages of the documentation as blocks: what is run, what is written as a file, what is only read. Pure."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import yaml
from markdown_it import MarkdownIt

from tests.agents import ROOT

SITE = ROOT / "nixl_async/docs"
SERVERS = ("s3", "azure", "gcs", "etcd")
SHOWN_ONLY = ("text", "markdown")
"""Languages that promise nothing."""
_MARK = re.compile(r"% (not run: (?P<reason>\S.*)|meanwhile(?P<interrupted>, until Ctrl-C)?)")
_DIRECTIVE = re.compile(r"\{([\w:-]+)\}\s*(.*)")
_OPTION = re.compile(r":([\w-]+):[ \t]*(.*)")
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_CODE_DIRECTIVES = ("code-block", "code", "sourcecode")


class Kind(enum.Enum):
    """What is done with a block."""

    PYTHON = enum.auto()
    SHELL = enum.auto()
    TRANSCRIPT = enum.auto()
    PARSED = enum.auto()
    FILE = enum.auto()
    UNKNOWN = enum.auto()


_KINDS = {
    "python": Kind.PYTHON,
    "bash": Kind.SHELL,
    "console": Kind.TRANSCRIPT,
    **dict.fromkeys(("yaml", "json", "toml"), Kind.PARSED),
}


@dataclass(frozen=True)
class Block:
    """One fence: `line` is that of its first line of content in the page, counted from 1.

    `path` is the file that a block with a caption becomes; `output` is what must be printed, `None` where nothing is said.
    `excuse` is why it is not run. A block that runs `meanwhile` goes on beside those after it, until it ends or, `interrupted`,
    until the page does.
    """

    kind: Kind
    language: str
    text: str
    line: int
    path: str | None = None
    output: str | None = None
    excuse: str | None = None
    meanwhile: bool = False
    interrupted: bool = False


@dataclass(frozen=True)
class Page:
    """A page's blocks in order, and what it says that it needs."""

    blocks: tuple[Block, ...]
    servers: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


class PageError(ValueError):
    """A page breaks the rules of README.md of the documentation."""


def parse(text: str) -> Page:
    """Read a page.

    Raises:
        PageError: a block that is neither run, nor excused, nor of a language that is only shown; output of nothing.
    """
    front: dict[str, Any] = {}
    if found := _FRONT.match(text):
        front = yaml.safe_load(found[1]) or {}
    if unknown := set(front) - {"servers", "modules"} or set(front.get("servers", ())) - set(SERVERS):
        raise PageError(f"line 1: {sorted(unknown)} at the top of a page; it may have servers, of {SERVERS}, and modules")
    blocks: list[Block] = []
    for block in _blocks(text, 0):
        if block.language == "text output":
            if not blocks or blocks[-1].output is not None or blocks[-1].kind not in (Kind.PYTHON, Kind.SHELL):
                raise PageError(f"line {block.line}: output of no python or bash block")
            blocks[-1] = replace(blocks[-1], output=block.text)
        elif block.language not in SHOWN_ONLY or block.path or block.excuse:
            if block.kind is Kind.UNKNOWN and block.excuse is None:
                raise PageError(
                    f"line {block.line}: {block.language!r} is not run: say why with `% not run: …`, or call it text"
                )
            if block.meanwhile and block.kind not in (Kind.SHELL, Kind.TRANSCRIPT):
                raise PageError(f"line {block.line}: only bash and console blocks run meanwhile")
            blocks.append(block)
    return Page(tuple(blocks), tuple(front.get("servers", ())), tuple(front.get("modules", ())))


def _blocks(text: str, offset: int) -> Iterator[Block]:
    lines = text.splitlines()
    # A fence of colons is a paragraph to CommonMark, and the fences in it are its neighbours: as they should be.
    for token in MarkdownIt("commonmark").parse(_FRONT.sub(_blank, text)):
        if token.type != "fence" or token.map is None:
            continue
        info, content, first = token.info.strip(), token.content, token.map[0] + 1
        caption = None
        if directive := _DIRECTIVE.fullmatch(info):
            options, content, n_lines = _options(content)
            if directive[1] not in _CODE_DIRECTIVES:
                yield from _blocks(content, offset + first + n_lines)
                continue
            info, caption, first = directive[2], options.get("caption"), first + n_lines
        mark = _MARK.fullmatch(lines[token.map[0] - 1].strip(" >")) if token.map[0] else None
        yield Block(
            _kind(info, caption),
            info,
            content,
            offset + first + 1,
            caption,
            excuse=mark["reason"] if mark else None,
            meanwhile=mark is not None and mark["reason"] is None,
            interrupted=mark is not None and mark["interrupted"] is not None,
        )


def _blank(found: re.Match[str]) -> str:
    return "\n" * found[0].count("\n")


def _options(content: str) -> tuple[dict[str, str], str, int]:
    options, lines = {}, content.splitlines(keepends=True)
    n_lines = 0
    while n_lines < len(lines) and (found := _OPTION.fullmatch(lines[n_lines].strip())):
        options[found[1]] = found[2]
        n_lines += 1
    while n_lines < len(lines) and options and not lines[n_lines].strip():
        n_lines += 1
    return options, "".join(lines[n_lines:]), n_lines


def _kind(language: str, caption: str | None) -> Kind:
    return Kind.FILE if caption is not None else _KINDS.get(language, Kind.UNKNOWN)


def transcript(text: str) -> tuple[str, str]:
    """Split a transcript into its commands, as one script, and what they print."""
    commands, printed, inside = [], [], False
    for line in text.splitlines():
        if line.startswith("$ ") or (inside and line.startswith("> ")):
            commands.append(line[2:])
            inside = True
        else:
            printed.append(line)
            inside = False
    return "\n".join(commands), "\n".join(printed)


def matches(expected: str, printed: str, *, whole: bool = True) -> bool:
    """Whether `printed` is what was `expected`, in which `...` stands for anything; with not `whole`, whether it begins so.

    Blanks count as one, however many; those around lines, and empty lines, do not count.
    """
    pattern = ".*?".join(re.escape(part) for part in _plain(expected).split("..."))
    found = re.compile(pattern, re.DOTALL)
    return (found.fullmatch if whole else found.match)(_plain(printed)) is not None


def _plain(text: str) -> str:
    return "\n".join(plain for line in text.splitlines() if (plain := " ".join(line.split())))
