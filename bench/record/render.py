"""The document of a complete run, made of its files alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from bench.commands import COMMANDS
from bench.record.files import MACHINE, VERSIONS, Part
from bench.record.losses import Cell, cells, judged, losses, lost, misses, peers, shown, time_text, value_text
from bench.record.plan import SWEEPS, TITLES
from bench.record.ratios import SLOWER, geometric_mean
from bench.report import Figure, Row, number, size, times

COMMAND = "python -m bench results"
GEOMETRIC_MEAN = 2.0
"""What the sweep is to reach over all points."""
_MARKS = ((SLOWER, "🟥"), (1 / SLOWER, "⬜"), (2.0, "🟩"), (float("inf"), "🟦"))
_LEGEND = (
    "🟥 slower by more than 5 %, ⬜ within 5 %, 🟩 faster, 🟦 at least twice as fast;"
    " ? the rounds leave open on which side of the 5 % it is"
)


def document(parts: Sequence[Part]) -> str:
    """Return the document as Markdown."""
    sections = [
        _head(parts),
        _summary(parts),
        _losing(parts),
        _sweep(parts),
        *map(_suite, parts),
        _measured(parts),
        _missing(parts),
    ]
    return "\n\n".join(text for text in sections if text) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], right: int = 99) -> str:
    """Write a table; columns from `right` on are numbers."""
    lines = [head, ["---:" if n >= right else "---" for n in range(len(head))], *rows]
    return "\n".join("| " + " | ".join(one.replace("|", "\\|").replace("\n", " ") for one in line) + " |" for line in lines)


# What it ran on.


def _head(parts: Sequence[Part]) -> str:
    one = parts[0]
    text = (
        f"# Results\nMade by `{COMMAND}`, and by `{COMMAND} --render` of the files that it writes; the method is in\n"
        "[bench/README.md](README.md). A ratio is how many times as good as the other we are. Medians; every byte is checked."
    )
    if any(part.about.quick for part in parts):
        text += "\n\n**Tiny sizes (`--quick`): this shows that everything works, and not how fast anything is.**"
    lines = [[key, str(one.system.get(key, ""))] for key in (*MACHINE, *VERSIONS) if one.system.get(key)]
    begun = min(part.about.started for part in parts)
    whole = sum(part.about.seconds for part in parts)
    lines += [["measured", f"{_moment(begun)}, {whole / 60:.1f} minutes of measuring"], ["sources", one.about.sources]]
    busy, stolen = (max(part.about.load.get(key, 0.0) for part in parts) for key in ("others_cpu", "stolen_cpu"))
    lines.append(
        ["CPU taken meanwhile, at most", f"by other programs {busy:.1%}, by the hypervisor {stolen:.1%} of all cores"]
    )
    lines.append(["command", f"`{' '.join(one.about.command)}`"])
    return "\n\n".join([text, _table(["machine", ""], lines), *_differing(parts)])


def _moment(text: str) -> str:
    return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M} UTC"


def _differing(parts: Sequence[Part]) -> Iterator[str]:
    """Say where the files are not of one run on one machine."""
    runs = {part.about.invocation for part in parts}
    if len(runs) > 1:
        first, last = _moment(min(runs)), _moment(max(runs))
        yield f"**Put together from {len(runs)} invocations of the command**, the first at {first}, the last at {last}."
    for what, of in (
        ("machines", lambda part: tuple(str(part.system.get(key)) for key in MACHINE)),
        ("versions of libraries", lambda part: tuple(str(part.system.get(key)) for key in VERSIONS)),
        ("states of the code", lambda part: part.about.sources),
    ):
        kinds: dict[Any, list[str]] = {}
        for part in parts:
            kinds.setdefault(of(part), []).append(part.about.part)
        if len(kinds) > 1:
            yield f"**The parts are of different {what}:** " + "; ".join(", ".join(names) for names in kinds.values()) + "."


# What came of it.


def _summary(parts: Sequence[Part]) -> str:
    lines = summary(parts)
    return "## Summary\n" + _table(["what", "found", "target"], lines) if lines else ""


def summary(parts: Sequence[Part]) -> list[list[str]]:
    """Return what came of a run in a few lines: what, what was found, and the target with whether it is met."""
    found = [cell for part in parts for cell in cells(part)]
    ratios = [cell.ratio for cell in found if cell.ratio is not None]
    lines = [["sweep, points measured beside NIXL", "none", _met(False, "all")]] if found and not ratios else []
    if ratios:
        least = min((cell for cell in found if cell.ratio), key=lambda cell: cell.ratio.median)  # type: ignore[union-attr]
        slower, doubtful = sum(one.slower for one in ratios), sum(one.doubtful for one in ratios)
        mean = geometric_mean(ratios)
        share = 1 - slower / len(ratios)
        lines += [
            ["sweep, points measured beside NIXL", str(len(ratios)), ""],
            ["sweep, geometric mean of the ratios", f"{mean:.2f}", _met(mean >= GEOMETRIC_MEAN, f"≥ {GEOMETRIC_MEAN:g}")],
            ["sweep, points not slower by more than 5 %", f"{share:.1%}", _met(not slower, "all")],
            ["sweep, least ratio", f"{least.ratio.median:.2f}: {TITLES[least.part]}, {least.case}", ""],  # type: ignore[union-attr]
            ["sweep, points that the rounds leave open", str(doubtful), ""],
            ["sweep, points where NIXL's median request is shorter by more than 5 %", str(sum(map(_p50_lost, found))), ""],
        ]
    count = judged(parts)
    if sum(count.values()):
        beside = f"{count['better']} / {count['equal']} / {count['worse']}"
        lines.append(["suites, figures beside a peer: better / within 5 % / worse", beside, ""])
        was_judged = count["met"] + count["missed"] > 0
        target = _met(not count["missed"], "all") if was_judged else "not judged"
        lines.append(["suites, targets met / missed", f"{count['met']} / {count['missed']}", target])
    broken = [part.about.part for part in parts if not part.about.complete]
    if broken:
        lines.append(["parts that did not come to their end", ", ".join(broken), _met(False, "none")])
    return lines


def _p50_lost(cell: Cell) -> bool:
    return cell.p50_ratio is not None and cell.p50_ratio < SLOWER


def _met(is_met: bool, target: str) -> str:
    return f"{'✅' if is_met else '❌'} {target}"


def _losing(parts: Sequence[Part]) -> str:
    found, missed = losses(parts), misses(parts)
    text = "## Where we lose\n"
    if not any(cell.ratio for part in parts for cell in cells(part)) and not sum(judged(parts).values()):
        return text + "Nothing was measured beside a peer, and no target was judged."
    if not found and not missed:
        return text + "In no row that was measured is a peer better by more than 5 %, and no target is missed."
    blocks = ["In no row that was measured is a peer better by more than 5 %."]
    if found:
        head = ["part", "row", "ours", "peer", "its", "ratio", "also", "in doubt"]
        rows = [
            [_title(one.part), one.case, one.ours, one.peer, one.theirs, f"{one.ratio:.2f}", one.also or "-", one.doubt or "-"]
            for one in found
        ]
        counts = ", ".join(f"{_title(name)} {count}" for name, count in Counter(one.part for one in found).items())
        blocks = [f"A peer is better by more than 5 %, in {len(found)} rows: {counts}.\n\n" + _table(head, rows)]
    if missed:
        rows = [[_title(one.part), one.case, one.target, one.found] for one in missed]
        blocks.append(f"A target is missed, {len(missed)} times:\n\n" + _table(["part", "row", "target", "found"], rows))
    return text + "\n\n".join(blocks)


def _title(name: str) -> str:
    return TITLES[name] if name in SWEEPS else name


# The sweep.


def _sweep(parts: Sequence[Part]) -> str:
    texts = [
        _grids(part, [cell for cell in cells(part) if cell.op == op], op)
        for part in parts
        for op in dict.fromkeys(cell.op for cell in cells(part))
    ]
    if not texts:
        return ""
    settings = next(part.about.settings for part in parts if part.sweep is not None)
    how = (
        "Requests of some blocks (columns) of some bytes (rows), one after the other, each prepared once and sent again and\n"
        "again. A number is nixl_async's speed over that of NIXL as installed: the median of rounds in which they took turns.\n"
        f"Requests of more than {size(settings['most_nbytes'])} are not measured (-). {_LEGEND}."
    )
    return "\n\n".join(["## The sweep", how, *texts])


def _grids(part: Part, found: Sequence[Cell], op: str) -> str:
    ratios = [cell.ratio for cell in found if cell.ratio is not None]
    title = f"### {TITLES[part.about.part]}, {op}"
    if not ratios:
        return f"{title}\nNIXL was not there; GB/s of nixl_async.\n\n" + _grid(found, lambda cell: number(cell.ours))
    said = f"Geometric mean {geometric_mean(ratios):.2f}, least {min(one.median for one in ratios):.2f}."
    both = _grid(found, lambda cell: f"{number(cell.ours)} / {_or_dash(cell.nixl, number)}")
    p50 = _grid(found, lambda cell: " / ".join(_or_dash(one, time_text) for one in cell.p50))
    return "\n\n".join([
        f"{title}\n{said}",
        _grid(found, _ratio_cell),
        f"<details><summary>GB/s, ours / NIXL</summary>\n\n{both}\n\n</details>",
        f"<details><summary>median time of a request, ours / NIXL</summary>\n\n{p50}\n\n</details>",
    ])  # fmt: skip


def _or_dash(value: float | None, write: Callable[[float], str]) -> str:
    return "-" if value is None else write(value)


def _ratio_cell(cell: Cell) -> str:
    if cell.ratio is None:
        return "-"
    value = cell.ratio.median
    mark = next(mark for bound, mark in _MARKS if value < bound)
    text = f"**{value:.2f}**" if cell.ratio.slower else f"{value:.2f}"
    return f"{mark} {text}{'?' if cell.ratio.doubtful else ''}"


def _grid(found: Sequence[Cell], write: Callable[[Cell], str]) -> str:
    """Write a table of blocks by batches."""
    known = {(cell.block, cell.batch): cell for cell in found}
    blocks, batches = (sorted({pair[at] for pair in known}) for at in (0, 1))
    rows = [
        [size(block), *(write(known[block, batch]) if (block, batch) in known else "-" for batch in batches)]
        for block in blocks
    ]
    return _table(["block \\ batch", *map(str, batches)], rows, right=1)


# The suites.


def _suite(part: Part) -> str:
    if part.sweep is not None or not part.rows:
        return ""
    rows, name = part.rows, part.about.part
    keys = list(dict.fromkeys(key for row in rows for key in row.case))
    labels = list(dict.fromkeys(figure.label for row in rows for figure in row.others))
    raw = any(row.raw for row in rows)
    head = [*keys, "unit", "nixl_async", *labels, *(["limit"] if raw else []), "target"]
    lines = [
        [
            *(value_text(key, row.case.get(key, "")) for key in keys),
            row.unit,
            f"{number(row.ours.median)}{_spread(row.ours)}{_note(row.ours)}",
            *(_beside(row, row.other(label)) for label in labels),
            *([_limit(row)] if raw else []),
            "<br>".join(_judged(check.target, shown(check.shown, check.value), check.met) for check in row.checks) or "-",
        ]
        for row in rows
    ]
    title = COMMANDS[name].title if name in COMMANDS else name
    return f"## {title}\n`python -m bench {name}`; {_settings(part.about.settings)}.\n\n" + _table(head, lines)


def _settings(settings: Mapping[str, Any]) -> str:
    return f"rounds {settings['rounds']}, {settings['mib']} MiB" if "mib" in settings else ""


def _beside(row: Row, figure: Figure | None) -> str:
    if figure is None:
        return "-"
    ratio = times(row.ratio(figure))
    worse = figure in peers(row) and lost(row, figure)
    return f"{number(figure.median)} ({f'🟥 **{ratio}**' if worse else ratio}){_note(figure)}"


def _limit(row: Row) -> str:
    return "-" if row.raw is None else f"{row.raw.label} {number(row.raw.median)} ({row.ratio(row.raw):.0%})"


def _judged(target: str, found: str, met: bool | None) -> str:
    return f"{'' if met is None else '✅ ' if met else '❌ '}{target}: {found}"


def _spread(figure: Figure) -> str:
    return f" ±{figure.spread:.0%}" if len(figure.samples) > 1 else ""


def _note(figure: Figure) -> str:
    return f"<br>{figure.note}" if figure.note else ""


# How it went.


def _measured(parts: Sequence[Part]) -> str:
    rows = [
        [
            part.about.part,
            f"{_moment(part.about.started)}",
            f"{part.about.seconds:.0f}",
            str(len(cells(part)) if part.sweep is not None else len(part.rows)),
            f"{part.about.load.get('load_before', 0):.1f} → {part.about.load.get('load_after', 0):.1f}",
            f"{part.about.load.get('others_cpu', 0):.1%}",
            f"{part.about.load.get('stolen_cpu', 0):.1%}",
            part.about.state,
        ]
        for part in parts
    ]
    head = ["part", "begun", "seconds", "rows", "load before → after", "CPU of others", "stolen", "state"]
    return "## How it was measured\n" + _table(head, rows)


def _missing(parts: Sequence[Part]) -> str:
    absent = dict.fromkeys(f"- {name}: {why}" for part in parts for name, why in part.system.get("absent", {}).items())
    lines = [
        *absent,
        *(f"- {part.about.part}: {text}" for part in parts for text in (*part.about.failures, *part.about.warnings)),
    ]
    return "## Absent and failed\n" + "\n".join(line.replace("\n", "\n  ") for line in lines) if lines else ""
