"""Rows of data from a JSONL or Parquet file, a directory of either, or a dataset of the Hugging Face hub."""

import glob
import os
import re
import tempfile

from common.commandline import BadInput


def read_rows(source, option, columns):
    """Read rows that have a non-empty string in each of `columns`.

    Args:
        source: path of a JSONL or Parquet file; or a directory or hub name that `datasets.load_dataset` accepts, with
            a configuration after a colon where the dataset has several ("openai/gsm8k:main").
        option: the command-line option that named it, for error messages.

    Returns `(rows, test_rows)`, lists of dicts; `test_rows` is empty where the source has no split called "test".
    Raises `BadInput` for a source that is missing, empty or malformed, with the row's number.
    """
    if source.endswith((".jsonl", ".json", ".parquet")) and not os.path.exists(source):
        raise BadInput(f"{option} {source}: there is no such file; give an existing .jsonl or .parquet file.")
    try:
        splits = _load(source)
    except Exception as error:  # what `datasets` raises is as varied as the ways to fail: no network, no such name, …
        reason = " ".join(str(e) for e in (error, error.__cause__) if e) or "the file is empty"
        reason = re.sub(r"(?<=in row )\d+", lambda match: str(int(match[0]) + 1), reason)  # pyarrow counts from 0
        raise BadInput(
            f"{option} {source} cannot be loaded ({reason[:300]}): give a .jsonl or .parquet file, or the name of a "
            "hub dataset, as in openai/gsm8k:main."
        ) from error
    rows, test_rows = (splits[name].to_list() if name in splits else [] for name in ("train", "test"))
    if not rows:
        raise BadInput(f"{option} {source} has no rows in a split called train; its splits: {', '.join(splits)}.")
    for number, row in [*enumerate(rows, start=1), *enumerate(test_rows, start=1)]:
        for column in columns:
            if not isinstance(row.get(column), str) or not row[column].strip():
                raise BadInput(
                    f"{option} {source}, row {number}: there is no text in column {column!r}; every row needs "
                    f"{' and '.join(map(repr, columns))}."
                )
    return rows, test_rows


def _load(source):
    import datasets  # takes over a second, and few runs need it
    import pyarrow.json

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the exceptions say it all
    # What is local is read afresh, in memory: a cache takes an edited file for the old one if size and time agree.
    with tempfile.TemporaryDirectory() as cache:
        local = {"cache_dir": cache, "keep_in_memory": True}
        # Not load_dataset("json", …), which sends a request to the hub even for local files.
        if os.path.isfile(source) and source.endswith(".parquet"):
            return {"train": datasets.Dataset.from_parquet(glob.escape(source), **local)}
        if os.path.isfile(source):
            try:
                return {"train": datasets.Dataset.from_json(glob.escape(source), **local)}
            except datasets.exceptions.DatasetGenerationError:
                # `datasets` may count rows from any block of the file. pyarrow reads one block, and names the row.
                pyarrow.json.read_json(source, pyarrow.json.ReadOptions(block_size=os.path.getsize(source)))
                raise
        name, _, configuration = source.partition(":")
        return datasets.load_dataset(name, configuration or None, **(local if os.path.isdir(name) else {}))
