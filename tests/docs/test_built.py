"""The site is built without a warning, each of its links leads somewhere, and it fetches nothing from other hosts."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.pages import SITE

pytestmark = pytest.mark.slow
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "object": "data", "use": "href"}


@dataclass
class _Page(HTMLParser):
    """What a built page has: the anchors, where its links lead, what a browser fetches for it."""

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := given.get(name))}
        if tag == "a" and (link := given.get("href")):
            self.links.append(link)
        if tag in FETCHED and (link := given.get(FETCHED[tag])):
            self.fetched.append(link)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site."""
    pytest.importorskip("sphinx", reason="Sphinx is not installed: pip install 'nixl-async[docs]'")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(SITE), str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert ran.returncode == 0, ran.stderr
    return out


def _read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text())
    return page


def test_links_lead_somewhere(built: Path) -> None:
    pages = {path.relative_to(built).as_posix(): _read(path) for path in built.rglob("*.html")}
    assert len(pages) > 30
    missing = []
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (Path(name).parent / unquote(parts.path)) if parts.path else Path(name)
            path = (built / target).resolve().relative_to(built.resolve()).as_posix()
            anchors = pages[path].anchors if path in pages else None
            if (anchors is None and not (built / path).exists()) or (
                parts.fragment and anchors is not None and unquote(parts.fragment) not in anchors
            ):
                missing.append(f"{name}: {link}")
    assert not missing


def test_nothing_is_fetched_from_other_hosts(built: Path) -> None:
    fetched = [link for path in built.rglob("*.html") for link in _read(path).fetched]
    assert any(link.endswith(".css") or ".css?" in link for link in fetched)
    assert [link for link in fetched if urlsplit(link).netloc] == []
    for path in built.rglob("*.css"):
        assert not re.findall(r"""(?:url\(|@import)\s*["']?(?:https?:)?//""", path.read_text()), path
