"""A run's own code, the script and the task's file: kept in its directory, and held to on resuming.

Not that of `common/`, whose commit is in environment.txt, nor what a task's file imports.
"""

import hashlib
import shlex
from itertools import zip_longest
from pathlib import Path

from common.errors import BadInput


class Sources:
    """The files that decide what a run computes, by the name of their copy in its directory."""

    def __init__(self, script, task):
        """`script` is a path, `task` a value of `--task`: "path/to/file.py:ClassName", perhaps."""
        paths = {"script": Path(script)}
        file = Path(task.rpartition(":")[0])
        if file.suffix == ".py" and file.is_file():  # else `load_task` says what is wrong
            paths["task"] = file
        self.paths = {f"{kind}/{path.name}": path for kind, path in paths.items()}
        self.contents = {name: path.read_bytes() for name, path in self.paths.items()}

    def keep(self, directory):
        """Write the copies into a run's new directory."""
        for name, content in self.contents.items():
            copy = directory / name
            copy.parent.mkdir()
            copy.write_bytes(content)

    def check_unchanged(self, directory):
        """Raise `BadInput` where a file differs from the copy that the run has of it."""
        for name, content in self.contents.items():
            copy = directory / name
            before = copy.read_bytes() if copy.exists() else content
            if content != before:
                line = first_difference(before, content)
                what = f"--resume {directory}: {self.paths[name]} differs from {copy}"
                old, new = shlex.quote(str(copy)), shlex.quote(str(self.paths[name]))
                raise BadInput(
                    f"{what}, with which the run began, first in line {line}: restore it "
                    f"(cp {old} {new}) or, to go on with the change, accept it (cp {new} {old})."
                )

    def checksums(self):
        """A line for each file, as `sha256sum` prints it, after its name."""
        return [
            f"sha256 of {name}: {hashlib.sha256(content).hexdigest()}"
            for name, content in self.contents.items()
        ]


def kept(run_dir):
    """The copies that a run has, their content by name."""
    paths = [path for kind in ("script", "task") for path in Path(run_dir).glob(f"{kind}/*")]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in paths}


def first_difference(one, other):
    """The number of the first line in which two texts differ, counted from 1."""
    lines = zip_longest(one.splitlines(keepends=True), other.splitlines(keepends=True))
    return next(number for number, (a, b) in enumerate(lines, start=1) if a != b)
