"""The rules of the documentation's pages hold: what is not so is found."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.docs.pages import Kind, PageError, matches, parse, transcript
from tests.docs.programs import environment, run

GOOD = {
    "a namespace, await, and what is printed": """
```python
import asyncio
async def double(x):
    await asyncio.sleep(0)
    return 2 * x
```
Words.
```python
print(await double(21))
async with asyncio.timeout(1):
    print("two  lines")
```
```text output
42
two ...
```
""",
    "a file, a transcript, what is exported, and where it went": """
```{code-block} python
:caption: room/hello.py

import os
print("hello", os.environ["WHOM"])
```
```bash
export WHOM=reader
cd room
```
```console
$ python hello.py
hello reader
$ echo a \\
> b
a b
```
```python
import os
print(os.environ["WHOM"], os.getcwd().rpartition("/")[2])
```
```text output
reader room
```
""",
    "something meanwhile, and something until the end": """
% meanwhile
```console
$ echo ready; until [ -e go ]; do sleep 0.01; done; echo gone
ready
```
% meanwhile, until Ctrl-C
```console
$ exec sleep 1000
```
:::{note}
```bash
touch go
```
:::
""",
    "what is excused, parsed and shown": """
% not run: for a reason
```python
1 / 0
```
```yaml
apiVersion: v1
kind: Pod
metadata: {name: a}
spec: {containers: [{name: b, image: c}]}
```
```text
anything
```
% not run: no program reads it
```dockerfile
FROM scratch
```
""",
}
BAD = {
    "an exception": ("```python\n1 / 0\n```", "ZeroDivisionError"),
    "another output": ("```python\nprint(1)\n```\n```text output\n2\n```", "and not"),
    "a status": ("```bash\nfalse\n```", "ended with status 1"),
    "a failure within a script": ("```bash\nfalse | true\n```", "ended with status 1"),
    "another transcript": ("```console\n$ echo a\nb\n```", "and not"),
    "what never gets so far": ("% meanwhile\n```console\n$ echo a\nb\n```", "ended before"),
    "what fails meanwhile": ("% meanwhile\n```bash\nfalse\n```", "ended with status 1"),
    "a task that is left": ("```python\nimport asyncio\nt = asyncio.ensure_future(asyncio.sleep(9))\n```", "leaves tasks"),
    "no YAML": ("```yaml\na: [\n```", "yaml"),
    "no JSON": ("```json\n{,}\n```", "JSON"),
    "no TOML": ("```toml\n=\n```", "TOML"),
    "a file that is no Python": ("```{code-block} python\n:caption: a.py\n\nif\n```", "SyntaxError"),
    "an object without a name": ("```yaml\napiVersion: v1\nkind: Pod\n```", "metadata.name"),
    "a container without an image": (
        "```yaml\napiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: b}]}\n```",
        "an image",
    ),
    "a block in a note": (":::{note}\n```python\n1 / 0\n```\n:::", "ZeroDivisionError"),
    "a block in a directive": ("````{note}\n```python\n1 / 0\n```\n````", "ZeroDivisionError"),
}


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD.keys())
def test_what_is_so_passes(text: str, tmp_path: Path) -> None:
    status, printed = _run(text, tmp_path)
    assert status == 0, printed


@pytest.mark.parametrize(("text", "why"), BAD.values(), ids=BAD.keys())
def test_what_is_not_so_fails(text: str, why: str, tmp_path: Path) -> None:
    status, printed = _run(text, tmp_path)
    assert status == 1
    assert why in printed


def _run(text: str, tmp_path: Path) -> tuple[int, str]:
    (page := tmp_path / "page.md").write_text(text)
    (room := tmp_path / "place").mkdir()
    return run([sys.executable, "-m", "tests.docs.running", str(page), str(page)], room, environment())


@pytest.mark.parametrize(
    "text",
    [
        "```rust\nfn\n```",
        "```\nnothing\n```",
        "```text output\na\n```",
        "% meanwhile\n```python\npass\n```",
        "---\nservers: [ftp]\n---\n",
        "---\nserver: [s3]\n---\n",
    ],
    ids=[
        "a language that nobody runs",
        "no language",
        "output of nothing",
        "Python meanwhile",
        "no such server",
        "no such need",
    ],
)
def test_pages_that_break_the_rules_are_refused(text: str) -> None:
    with pytest.raises(PageError, match="line"):
        parse(text)


def test_lines_are_those_of_the_page() -> None:
    front = "---\nservers: [s3]\n---\n# A\n\n"
    nested = "````{note}\n:class: b\n\n```{code-block} bash\n:x: y\n\nc\n```\n````\n"
    page = parse(f"{front}```python\na\n```\n{nested}")
    assert [(block.kind, block.line, block.text) for block in page.blocks] == [
        (Kind.PYTHON, 7, "a\n"),
        (Kind.SHELL, 15, "c\n"),
    ]
    assert page.servers == ("s3",)


def test_a_transcript_is_commands_and_what_they_print() -> None:
    assert transcript("$ a \\\n> b\n> c\nd\n> e\n") == ("a \\\nb\nc", "d\n> e")


@pytest.mark.parametrize(
    ("expected", "printed", "whole", "result"),
    [
        ("a ... c", "a  b\nb c\n", True, True),
        ("a", "ab", True, False),
        ("a", "ab", False, True),
        ("b", "ab", False, False),
        ("1.5", "125", True, False),
    ],
    ids=str,
)
def test_output_is_compared_loosely(expected: str, printed: str, whole: bool, result: bool) -> None:
    assert matches(expected, printed, whole=whole) is result
