"""The report: one file that fetches nothing and shows everything, whatever the names in it are."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nixl_async.benchmarks.plot import make_report, write_report
from nixl_async.benchmarks.results import Results, ResultsError, Span, Timeline
from tests.benchmarks.made import made, rates

EVIL = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Reader(HTMLParser):
    """Collects what a page is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._script = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._script = False

    def handle_data(self, data: str) -> None:
        if not self._script and data.strip():
            self.texts.append(data.strip())


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


def evil() -> Results:
    rows = tuple(replace(row, contender=EVIL + str(place), op=EVIL) for place, row in enumerate(made().rows))
    timeline = Timeline(EVIL, (Span(EVIL, EVIL, 0.0, 1.0),))
    return replace(made(), rows=rows, timelines=(timeline,), command=(EVIL,), system={**made().system, EVIL: EVIL})


def test_the_report_fetches_nothing() -> None:
    reader = read(make_report({"a.json": made()}))
    for tag, attributes in reader.tags:
        assert tag not in ("link", "iframe", "img"), (tag, attributes)
        assert not attributes.get("src"), (tag, attributes)


def test_every_part_is_there() -> None:
    texts = read(make_report({"dir/a.json": made()})).texts
    assert "Benchmark of a.json" in texts
    for title in (
        "Throughput",
        "Latency",
        "Distribution of latencies",
        "Below the raw limit",
        "CPU",
        "Loop stall",
        "Timelines",
    ):
        assert title in texts
    assert "90%" in texts
    assert "9" in texts
    assert "write, pairwise, samehost, DRAM → DRAM, 64 KiB of 64 MiB, threads=1, warm=True" in texts


def test_what_was_not_measured_has_no_part() -> None:
    texts = read(make_report({"a.json": replace(made(), rows=made().rows[1:], timelines=())})).texts
    assert "Throughput" in texts
    for title in ("Latency", "Distribution of latencies", "Below the raw limit", "CPU", "Loop stall", "Timelines"):
        assert title not in texts


def test_several_results_are_drawn_together() -> None:
    texts = read(make_report({"a.json": rates(), "b.json": rates(0.9, seed=2)})).texts
    assert "nixl_async (a.json)" in texts
    assert "nixl_async (b.json)" in texts


def test_names_are_text_and_nothing_else() -> None:
    reader = read(make_report({"a.json": evil()}))
    assert not [tag for tag, _ in reader.tags if tag == "img"]
    harmless = read(make_report({"a.json": made()}))
    assert [tag for tag, _ in reader.tags].count("script") == [tag for tag, _ in harmless.tags].count("script")
    assert any(EVIL in text for text in reader.texts)


def test_a_browser_draws_it(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is here")
    path = tmp_path / "report.html"
    write_report({"a.json": evil()}, path)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--virtual-time-budget=10000", "--dump-dom", path.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "<title>Benchmark of a.json</title>" in ran.stdout
    # A figure has three drawings in it; seven kinds of them are here, throughput and its roof among them.
    assert ran.stdout.count('class="main-svg"') >= 14
    assert ran.stdout.count('class="scatterlayer mlayer"') >= 6


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="cannot be written: No such file"):
        write_report({"a.json": made()}, tmp_path / "none" / "report.html")
