"""Rows of data from a JSONL file, a Parquet file, a directory of either, or a dataset of the Hugging Face hub."""

import json
import os
from pathlib import Path

from common.errors import BadInput


def read_rows(source, option, columns):
    """Read rows that have a non-empty string in each of `columns`.

    Args:
        source: path of a .jsonl or .parquet file; or a directory or hub name that `datasets.load_dataset` accepts, with
            a configuration after a colon where the dataset has several ("openai/gsm8k:main").
        option: the command-line option that named it, for error messages.

    Returns `(rows, test_rows)`, lists of dicts; `test_rows` is empty where the source has no split called "test".
    Raises `BadInput` for a source that is missing, empty or malformed, with the row's number.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".json", ".parquet") and not os.path.isfile(path):
        raise BadInput(f"{option} {source}: there is no such file; give an existing .jsonl or .parquet file.")
    if os.path.isfile(path) and path.suffix == ".parquet":
        splits = {"train": _read_parquet(path, option)}
    elif os.path.isfile(path):
        splits = {"train": _read_jsonl(path, option)}
    else:
        splits = _load_dataset(source, option)
    for name, rows in splits.items():
        if not rows:
            raise BadInput(f"{option} {source} has no rows ({name}): give a file with at least one.")
        for number, row in enumerate(rows, start=1):
            for column in columns:
                if not isinstance(row, dict) or not isinstance(row.get(column), str) or not row[column].strip():
                    raise BadInput(
                        f"{option} {source}, row {number}: there is no text in column {column!r}; every row needs "
                        f"{' and '.join(map(repr, columns))}."
                    )
    return splits["train"], splits.get("test", [])


def _read_jsonl(path, option):
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{option} {path} cannot be read as UTF-8 text ({error}): give a JSONL file.") from error
    while lines and not lines[-1].strip():
        lines.pop()  # a blank line at the end is no row
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:  # numbers may be too long, brackets too deep
            raise BadInput(
                f"{option} {path}, row {number} is not JSON ({error}): every line must be one JSON object."
            ) from error
    return rows


def _read_parquet(path, option):
    import pyarrow.parquet  # comes with `datasets`

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise BadInput(f"{option} {path} cannot be read as Parquet ({error}): give an intact file.") from error


def _load_dataset(source, option):
    import datasets  # takes over a second to import, and few runs need it

    name, _, configuration = source.partition(":")
    try:
        dataset = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # what `datasets` raises is as varied as the ways to fail: no network, no such name, …
        raise BadInput(
            f"{option} {source} is no file, nor a dataset that loads ({type(error).__name__}: {str(error)[:300]}): "
            "give a .jsonl or .parquet file, or the name of a hub dataset, as in openai/gsm8k:main."
        ) from error
    if "train" not in dataset:
        raise BadInput(f"{option} {source} has the splits {', '.join(dataset)}, and no split called train.")
    return {split: list(dataset[split]) for split in ("train", "test") if split in dataset}
