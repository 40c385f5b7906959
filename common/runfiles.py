"""A run's directory and its logs on disk: made in one step, locked, cut back when resumed."""

import fcntl
import json
import os
import secrets
import shlex
import shutil
import sys
from datetime import datetime
from pathlib import Path

from common.environment import describe_environment
from common.errors import BadInput, writing

COMPLETE = "complete"  # the file with the number of steps after which model/ was written
PER_START = ("started:", "command:", "to repeat it:")  # lines of environment.txt that may change


class RunFiles:
    """The directory `runs/<name>/` of a run, and the JSONL files that it appends to.

    `sources` are the run's `Sources`.
    """

    def __init__(self, directory, names, sources):
        self.dir = directory
        self.sources = sources
        self.offsets = dict.fromkeys(names, 0)  # bytes of each log up to the newest checkpoint
        self.files = {}
        self.lock = None

    def create(self, args_json):
        """Make the directory with args.json and the sources in one step, by renaming.

        A killed start leaves nothing, or a resumable run. Raises `BadInput`.
        """
        unfinished = self.dir.with_name(f"{self.dir.name}.{secrets.token_hex(4)}.unfinished")
        try:
            unfinished.mkdir(parents=True)
            (unfinished / "args.json").write_text(args_json)
            self.sources.keep(unfinished)
            os.rename(unfinished, self.dir)  # of two runs with one name, the second fails here
            self.take_lock()
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            what = f"--name {self.dir.name}: {self.dir} cannot be made ({error})"
            raise BadInput(f"{what}: see --output.") from error

    def take_lock(self):
        """Keep other processes out until `close`, or until this process ends, however it ends."""
        self.lock = open(self.dir / "lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            what = f"--resume {self.dir}: another process is at work on this run"
            raise BadInput(f"{what}; stop that one first.") from error
        except OSError:
            pass  # a file system without locks

    def open(self):
        """Open the logs. What came after the newest checkpoint goes, and will be written again."""
        for name, offset in self.offsets.items():
            file = open(self.dir / name, "a+b")  # noqa: SIM115
            file.seek(0)
            kept = file.read(offset).rfind(b"\n") + 1
            if kept < offset:
                what = f"{self.dir / name} is shorter than at the checkpoint"
                print(f"{what}; the rest is lost.", file=sys.stderr)
            file.truncate(kept)
            self.files[name] = file

    def append(self, name, *records):
        """Write records to a log, one line each. Raises `RunStopped` where that fails."""
        for record in records:
            with writing(self.dir / name):
                self.files[name].write(json.dumps(record, allow_nan=False).encode() + b"\n")
                self.files[name].flush()

    def flushed_offsets(self):
        """The length of each log in bytes, all of them on disk."""
        for file in self.files.values():
            os.fsync(file.fileno())
        return {name: file.tell() for name, file in self.files.items()}

    def write_environment(self, engine, command):
        """Append a section per start or resume; its last line is the command that repeats the run.

        Says where a resumed run's surroundings differ from before.
        """
        path = self.dir / "environment.txt"
        more = [f"engine: {engine}", *self.sources.checksums(), f"to repeat it: {command}"]
        described = describe_environment() + "\n".join(more) + "\n"
        sections = path.read_text().split("\n\n") if path.exists() else []
        with path.open("a") as file:
            file.write(f"started: {datetime.now():%Y-%m-%d %H:%M:%S}\n{described}\n")
        before = set(sections[-2].splitlines()) if len(sections) > 1 else set()
        changed = before ^ set(described.splitlines())
        changed = sorted(x for x in changed if not x.startswith(PER_START))
        if sections and changed:
            what = "Resumed under other conditions, so last bits may differ"
            print(f"{what}: {'; '.join(changed)}.", file=sys.stderr)

    def close(self):
        for file in self.files.values():
            file.close()

    def remove(self):
        """Delete the directory, after a start that was refused."""
        self.lock.close()  # first: NFS keeps open files
        shutil.rmtree(self.dir)


def mark_complete(run_dir, step):
    """Note that a run has made all of its steps, so many, and that its model is written."""
    write_atomically(run_dir / COMPLETE, f"{step}\n")


def is_complete(run_dir, num_steps):
    """Whether a run has made so many steps, and has written its model after them."""
    path = Path(run_dir) / COMPLETE
    return path.exists() and int(path.read_text()) >= num_steps


def free_directory(output, name):
    """The path `output/name`, if it is free. Raises `BadInput`.

    Creates nothing, so that a refused start leaves nothing behind.
    """
    path = Path(output) / name
    if os.path.lexists(path):
        how = f"give another, or --resume {shlex.quote(str(path))}"
        raise BadInput(f"--name {name} already exists; {how}.")
    above = next(directory for directory in path.parents if os.path.exists(directory))
    if not os.path.isdir(above) or not os.access(above, os.W_OK | os.X_OK):
        why = f"you may not create files in {above}"
        raise BadInput(f"--output {output} cannot be written to, since {why}.")
    return path


def write_atomically(path, text):
    """Write a file so that a crash leaves the old content or the new, never a part."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
