"""Keeps the generated parts of the README true: `python tests/readme.py` rewrites them, `test_readme.py` checks them.

Two kinds: the printed diff of two scripts, and references to code, written as [file:line](link) `fragment`, whose line
number is that of the first line of the file that contains the fragment.
"""

import difflib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = re.compile(r"\[([\w/]+\.py):\d+\]\([^)]*\) `([^`]+)`")
DIFF = re.compile(r"<!-- generated: diff (\S+) (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def refresh(text):
    """The README's text with its generated parts made anew. Raises ValueError for a fragment that no line contains."""
    return DIFF.sub(_diff, REFERENCE.sub(_reference, text))


def _reference(match):
    name, fragment = match.groups()
    for number, line in enumerate((ROOT / name).read_text().splitlines(), start=1):
        if fragment in line:
            return f"[{name}:{number}]({name}#L{number}) `{fragment}`"
    raise ValueError(f"README.md refers to `{fragment}` in {name}, where no line contains it.")


def _diff(match):
    one, other = match.groups()
    lines = [(ROOT / name).read_text().splitlines(keepends=True) for name in (one, other)]
    # Changed lines only, as `diff` prints them, with - and + so that they are coloured.
    changes = [line for line in difflib.unified_diff(*lines, n=0) if not line.startswith(("---", "+++"))]
    changes = ["\n" if line.startswith("@@") else line for line in changes]
    body = "".join(changes).strip("\n")
    return f"<!-- generated: diff {one} {other} -->\n\n```diff\n{body}\n```\n\n<!-- end -->"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(refresh(readme.read_text()))
