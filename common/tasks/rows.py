"""Rows of data from a JSON, JSONL, CSV or Parquet file, a directory, or the Hugging Face hub."""

import csv
import glob
import gzip
import io
import json
import os
import tempfile

from common.errors import BadInput
from common.hub import reach_hub

FILES = (".jsonl", ".json", ".csv", ".parquet", ".gz")


def read_rows(source, option, columns):
    """Read rows that have a non-empty string in each of `columns`; numbers are turned into strings.

    `source` is a JSONL, JSON (one array), CSV (with a header) or Parquet file, all but the last
    also as `.gz`, or a directory or hub name that `load_dataset` accepts, with a configuration
    after a colon ("openai/gsm8k:main"). Returns `(rows, test_rows)`, lists of dicts; the latter are
    of the split called "test", if there is one.
    Raises `BadInput`, which names `option` and a malformed row.
    """
    if source.endswith(FILES) and not os.path.exists(source):
        how = "give an existing .jsonl, .csv or .parquet file"
        raise BadInput(f"{option} {source}: there is no such file; {how}.")
    try:
        splits = _load(source)
    except Exception as error:
        # What `datasets` raises is as varied as the ways to fail: no network, no such name, …
        reason = " ".join(str(e) for e in (error, error.__cause__) if e) or "the file is empty"
        raise BadInput(
            f"{option} {source} cannot be loaded ({reason[:300]}): give a .jsonl, .csv or "
            ".parquet file, or a hub dataset, as in openai/gsm8k:main."
        ) from error

    rows = list(splits.get("train", []))
    test_rows = list(splits.get("test", []))
    if not rows:
        raise BadInput(
            f"{option} {source} has no rows in a split called train; "
            f"its splits: {', '.join(splits)}."
        )
    for number, row in [*enumerate(rows, start=1), *enumerate(test_rows, start=1)]:
        for column in columns:
            value = row.get(column) if isinstance(row, dict) else None
            if type(value) in (int, float):
                value = str(value)
                row[column] = value
            if not isinstance(value, str) or not value.strip():
                raise BadInput(
                    f"{option} {source}, row {number} has no text in {column!r}: "
                    "every row needs some."
                )
    return rows, test_rows


def _load(source):
    """The rows of each split."""
    if os.path.isfile(source) and not source.endswith(".parquet"):
        # By hand: pyarrow turns dates into timestamps, reports no row numbers, and crashes on null
        # lines; pandas turns 1.50 into 1.5.
        open_text = gzip.open if source.endswith(".gz") else open
        with open_text(source, "rt", encoding="utf-8-sig") as file:
            text = file.read()
        is_csv = source.removesuffix(".gz").endswith(".csv")
        return {"train": list(csv.DictReader(io.StringIO(text))) if is_csv else _json_rows(text)}

    import datasets  # takes over a second, and few runs need it

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the exceptions say it all
    # Local data is read afresh, in memory: a cache mistakes an edited file for the old one if size
    # and time agree.
    with tempfile.TemporaryDirectory() as cache:
        local = {"cache_dir": cache, "keep_in_memory": True}
        if os.path.isfile(source):
            return {"train": datasets.Dataset.from_parquet(glob.escape(source), **local)}
        name, _, configuration = source.partition(":")
        options = local if os.path.isdir(name) else {}
        if not options:
            reach_hub(name, "README.md", "dataset")
        return datasets.load_dataset(name, configuration or None, **options)


def _json_rows(text):
    """The rows of JSONL, or of one JSON array."""
    if text.lstrip().startswith("["):
        return json.loads(text)
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"row {number}: {error}") from error
    return rows
