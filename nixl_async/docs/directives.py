"""Directives that write tables and figures from the code, so that they cannot differ from it.

`command` (the options of a command of `nixl-async`), `metrics` (its table), `frames` (of the control connection), `errors` (by
whose fault), `backends` (in the order in which routes are tried), `transfer-states` (a figure), `module-docstring`,
`fields` (of a dataclass).
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective
from states import picture

if TYPE_CHECKING:
    from sphinx.application import Sphinx


_BOUNDLESS = 1 << 40
_INDENT = "&nbsp;" * 4


class Written(SphinxDirective):
    """A directive that stands for Markdown."""

    optional_arguments: ClassVar[int] = 1
    final_argument_whitespace: ClassVar[bool] = True

    def lines(self) -> Iterator[str]:
        """Write the Markdown."""
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        """Have the page's own parser read it."""
        node = nodes.container()
        self.state.nested_parse(StringList(list(self.lines()), self.get_source_info()[0]), self.content_offset, node)
        return node.children


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Write a table in Markdown."""
    head = list(head)
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
    yield ""


def command(words: list[str]) -> tuple[Any, Any]:
    """Return a command of `nixl-async` and the context of its help."""
    import typer

    from nixl_async.benchmarks.cli import app as benchmarks
    from nixl_async.cli import app

    # `nixl-async bench` hands its arguments on.
    found = typer.main.get_command(benchmarks if words[:1] == ["bench"] else app)
    for word in words[1:] if words[:1] == ["bench"] else words:
        found = found.commands[word]
    return found, type(found).context_class(found, info_name=" ".join(["nixl-async", *words]))


class Command(Written):
    """`{command} demo`: what a command does, and its options."""

    required_arguments: ClassVar[int] = 1
    optional_arguments: ClassVar[int] = 0

    def lines(self) -> Iterator[str]:
        """Write the help's text, its usage, and a table for each group of options."""
        found, context = command(self.arguments[0].split())
        yield from inspect.cleandoc(found.help).splitlines()
        yield from ("", "```text", found.get_usage(context).removeprefix("Usage: "), "```", "")
        panels: dict[str, list[list[str]]] = {}
        for parameter in found.params:
            if (record := parameter.get_help_record(context)) is not None and "--help" not in parameter.opts:
                help_text, _, extra = record[1].rstrip("]").partition("  [")
                help_text = re.sub(r"(?<![\w`-])--?[a-z][\w-]*", r"`\g<0>`", help_text)
                row = [f"`{record[0]}`", help_text, f"`{extra}`" if extra else ""]
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or "", []).append(row)
        for panel, rows in panels.items():
            if panel:
                yield from (f"**{panel}**", "")
            yield from table(("option", "what it says", "default, range"), rows)


class Metrics(Written):
    """`{metrics}`: every metric."""

    def lines(self) -> Iterator[str]:
        """Write them in the order of the families."""
        from nixl_async.metrics.families import COMMON, COUNTER, FAMILIES

        rows = (
            (
                f"`{family.name}{'_total' if family.kind == COUNTER else ''}`",
                f"{family.kind}{', by ' if family.labels else ''}{', '.join(f'`{label}`' for label in family.labels)}",
                family.help,
            )
            for family in FAMILIES.values()
        )
        yield from table(("name", "kind, labels", "what it says"), rows)
        yield f"Each has the labels {' and '.join(f'`{label}`' for label in COMMON)} besides."


class Frames(Written):
    """`{frames}`: the frames of the control connection."""

    def lines(self) -> Iterator[str]:
        """Write them by their numbers."""
        from nixl_async import wire

        said = ModuleAnalyzer.for_module(wire.__name__).find_attr_docs()
        rows = (
            (
                str(kind.value),
                f"`{kind.name}`",
                " ".join(said["FrameType", kind.name]),
                f"{wire._MAX_NBYTES.get(kind, wire.MAX_SMALL_NBYTES):,}",
            )
            for kind in wire.FrameType
        )
        yield from table(("type", "frame", "payload and meaning", "most bytes"), rows)


class Errors(Written):
    """`{errors}`: every exception, what else it is, and what it says."""

    def lines(self) -> Iterator[str]:
        """Write them by their place below the root."""
        from nixl_async import errors

        def below(kind: type, depth: int) -> Iterator[tuple[str, str, str]]:
            others = [base.__name__ for base in kind.__mro__[1:] if base.__module__ == "builtins"]
            cousins = [name for name in others if name not in ("Exception", "BaseException", "object", "OSError")]
            name = f"{_INDENT * depth}{{py:exc}}`{kind.__name__} <nixl_async.{kind.__name__}>`"
            yield name, ", ".join(f"`{cousin}`" for cousin in cousins), (kind.__doc__ or "").splitlines()[0]
            for one in kind.__subclasses__():
                if one.__module__ == errors.__name__ and one.__bases__[0] is kind:
                    yield from below(one, depth + 1)

        yield from table(("exception", "also a", "what it is raised to do"), below(errors.NixlError, 0))


class Backends(Written):
    """`{backends}`: those of this library that can be loaded here, in the order in which routes are tried."""

    def lines(self) -> Iterator[str]:
        """Read their classes, which needs none of the packages that they load when they open."""
        from nixl_async.backend import BUILT_IN

        found = []
        for target in BUILT_IN.values():
            module, _, name = target.partition(":")
            found.append(getattr(importlib.import_module(module), name))
        rows = (
            (
                f"`{kind.name}`",
                str(kind.rank),
                ", ".join(sorted(one.name for one in kind.kinds)),
                "peers" if kind.remote else "local",
                kind.revocation.name.lower() if kind.remote else "",
                str(kind.limits.max_ops),
                f"{kind.limits.max_nbytes >> 20:,}" if kind.limits.max_nbytes < _BOUNDLESS else "",
                "yes" if kind.limits.inline_nbytes else "",
            )
            for kind in sorted(found, key=lambda kind: kind.rank)
        )
        head = ("backend", "rank", "memory", "reaches", "leases end", "ops in flight", "MiB in flight", "copies at once")
        yield from table(head, rows)


class ModuleText(Written):
    """`{module-docstring} nixl_async.discovery`: a module's docstring, of which what is in it need not be installed."""

    required_arguments: ClassVar[int] = 1
    optional_arguments: ClassVar[int] = 0

    def lines(self) -> Iterator[str]:
        """Write it as it stands: docstrings are Markdown there."""
        yield from (ast.get_docstring(ast.parse(source(self.arguments[0]).read_text())) or "").splitlines()


class Fields(Written):
    """`{fields} nixl_async.integrations.vllm.options Options`: the fields of a dataclass that cannot be imported here."""

    required_arguments: ClassVar[int] = 2
    optional_arguments: ClassVar[int] = 0
    final_argument_whitespace: ClassVar[bool] = False

    def lines(self) -> Iterator[str]:
        """Write their names, what they are if they are not given, and what is said of them."""
        module, name = self.arguments
        said = ModuleAnalyzer.for_file(str(source(module)), module).find_attr_docs()
        (found,) = [
            node for node in ast.parse(source(module).read_text()).body if isinstance(node, ast.ClassDef) and node.name == name
        ]
        rows = (
            (
                f"`{node.target.id}`",
                f"`{ast.unparse(node.annotation)}`",
                f"`{ast.unparse(node.value)}`" if node.value else "",
                " ".join(said[name, node.target.id]),
            )
            for node in found.body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        )
        yield from table(("key", "type", "default", "what it says"), rows)


def source(module: str) -> Path:
    """Return the file of a module of this library."""
    path = Path(__file__).resolve().parents[2].joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


class TransferStates(SphinxDirective):
    """`{transfer-states}`: the table of transitions as a figure."""

    def run(self) -> list[nodes.Node]:
        """Draw it."""
        from nixl_async.transfer import TRANSITIONS

        return [nodes.raw("", picture(TRANSITIONS), format="html")]


# Callers get these from calls, and do not make them.
MADE_BY_CALLS = {
    f"nixl_async.{name}"
    for name in (
        *("Transfer", "PreparedTransfer", "Explanation", "MemoryRegion", "RemoteRegion", "FileRegion"),
        *("ObjectRegion", "Store", "Peer", "Push", "Incoming", "Offer", "Pull", "Lease", "LeasedRegion", "Pair", "Slices"),
        *("peers.MembershipEvents", "notifications.Subscription", "stores.Opening", "geometry.Shard"),
        *("metrics.Endpoint", "metrics.multiprocess.Publication", "tracing.Instrumentation", "tracing.Traced"),
        *("nvtx_ranges.NVTXRanges", "timeline.Recording", "timeline.Timeline", "inspection.Inspection", "logs.TransferLog"),
        *("testing.pair.Pair", "testing.ProcessPeer"),
    )
}
_COLON = "\ue000"
_ALIAS = re.compile(r"TypeAliasForwardRef\('(\w+)'\)")


_whole: set[str] = set()


def _know_types(app: object, obj: Any, bound: bool) -> None:
    """Give a module the names that it imports for types alone, once all that they come from is loaded: links need them."""
    _complete(getattr(obj, "__module__", None) or "")


def _complete(name: str) -> None:
    if not name.startswith("nixl_async") or name in _whole:
        return
    _whole.add(name)
    module = importlib.import_module(name)
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for one in ast.walk(node):
                if isinstance(one, ast.ImportFrom):
                    _complete(one.module or "")
            exec(compile(ast.Module(node.body, []), name, "exec"), module.__dict__)


def _signature(
    app: object, what: str, name: str, obj: object, options: object, signature: str | None, returned: str | None
) -> tuple[str, str] | None:
    """Leave out constructors that are not for callers; write aliases by their names, within unions too."""
    if what == "class" and name in MADE_BY_CALLS:
        return "", ""
    if signature is None or "TypeAliasForwardRef" not in f"{signature}{returned}":
        return None
    return _ALIAS.sub(r"\1", signature), _ALIAS.sub(r"\1", returned or "")


def _skip(app: object, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Leave out a named tuple's fields: its class says what they are."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def _before_napoleon(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keep an attribute's sentence whole: what is before a colon is no type. And let code that is indented be code."""
    if what in ("attribute", "data", "property"):
        lines[:] = [line.replace(":", _COLON) for line in lines]
    number = 1
    while number < len(lines):
        if re.match(r" {4}\S", lines[number]) and not lines[number - 1].strip() and not _inside(lines[:number]):
            lines[number:number] = ["::", ""]
        number += 1


def _inside(before: list[str]) -> bool:
    last = next((line for line in reversed(before) if line.strip()), "")
    return last.startswith((" ", ":", "..")) or last.endswith(":")


def _after_napoleon(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = [line.replace(_COLON, ":") for line in lines]


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the directives."""
    kinds = {
        "command": Command,
        "metrics": Metrics,
        "frames": Frames,
        "errors": Errors,
        "backends": Backends,
        "module-docstring": ModuleText,
        "fields": Fields,
        "transfer-states": TransferStates,
    }
    for name, kind in kinds.items():
        app.add_directive(name, kind)
    app.connect("autodoc-before-process-signature", _know_types)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-process-docstring", _before_napoleon, priority=100)
    app.connect("autodoc-process-docstring", _after_napoleon, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
