"""Reading rows from files, directories and Parquet, what a malformed row is answered with, and what
stays behind.
"""

import csv
import gzip
import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from conftest import REPOSITORY

from common.errors import BadInput
from common.tasks.rows import read_rows

COLUMNS = ("question", "answer")
ROW = {"question": "What is 1 + 1?", "answer": "It is 2.\n#### 2"}


def rows_of(count):
    return [
        {"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"}
        for n in range(count)
    ]


def write_jsonl(path, rows):
    """Write rows, each a dict or a line of text; returns the path as a string."""
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return str(path)


def refused(source):
    with pytest.raises(BadInput) as error:
        read_rows(str(source), "--eval-data", COLUMNS)
    assert str(error.value).startswith(f"--eval-data {source}") and str(error.value).endswith(".")
    return str(error.value)


def test_gsm8k_is_read_as_it_stands(gsm8k):
    for name in ("train", "test"):
        rows = [json.loads(line) for line in (gsm8k / f"{name}.jsonl").read_text().splitlines()]
        assert read_rows(str(gsm8k / f"{name}.jsonl"), "--data", COLUMNS) == (rows, [])


def test_all_kinds_of_files_give_the_same_rows(tmp_path):
    rows = rows_of(20)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    (tmp_path / "array.json").write_text(json.dumps(rows))
    sources = [
        write_jsonl(tmp_path / "data.jsonl", rows),
        write_jsonl(tmp_path / "data.txt", rows),
        write_jsonl(tmp_path / "data[1]*?.jsonl", [*rows, "", "  "]),
        str(tmp_path / "data.parquet"),
        str(tmp_path / "array.json"),
    ]
    with open(tmp_path / "data.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, COLUMNS)  # quotes the answers, which have two lines
        writer.writeheader()
        writer.writerows(rows)
    sources.append(str(tmp_path / "data.csv"))
    for path in [path for path in tmp_path.iterdir() if path.suffix != ".parquet"]:
        sources.append(f"{path}.gz")
        with gzip.open(sources[-1], "wb") as file:
            file.write(path.read_bytes())
    for source in sources:
        assert read_rows(source, "--data", COLUMNS) == (rows, [])


def test_numbers_of_a_csv_file_stay_as_they_are_written(tmp_path):
    (tmp_path / "data.csv").write_text('question,answer\nWhat?,1.50\nWhat?,"1,800"\nWhat?,007\n')
    rows, _ = read_rows(str(tmp_path / "data.csv"), "--data", COLUMNS)
    assert [row["answer"] for row in rows] == ["1.50", "1,800", "007"]


@pytest.mark.parametrize("bad_row", ["What?", "What?,", '"What?"," "', ",2"])
def test_malformed_row_of_a_csv_file_is_named_by_its_number(bad_row, tmp_path):
    (tmp_path / "data.csv").write_text(f"question,answer\nWhat?,1\n{bad_row}\nWhat?,3\n")
    assert "row 2 has no text" in refused(tmp_path / "data.csv")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_directory_may_have_a_training_and_a_test_split(kind, tmp_path):
    for name, rows in {"train": rows_of(12), "test": rows_of(5)}.items():
        if kind == "jsonl":
            write_jsonl(tmp_path / f"{name}.jsonl", rows)
        else:
            pyarrow.parquet.write_table(
                pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet"
            )
    assert read_rows(str(tmp_path), "--data", COLUMNS) == (rows_of(12), rows_of(5))


def test_a_configuration_is_named_after_a_colon(tmp_path):
    write_jsonl(tmp_path / "small.jsonl", rows_of(3))
    write_jsonl(tmp_path / "large.jsonl", rows_of(9))
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files: small.jsonl\n"
        "- config_name: large\n  data_files: large.jsonl\n---\n"
    )
    assert read_rows(f"{tmp_path}:small", "--data", COLUMNS) == (rows_of(3), [])
    assert read_rows(f"{tmp_path}:large", "--data", COLUMNS) == (rows_of(9), [])
    assert "small" in refused(tmp_path) and "large" in refused(tmp_path)  # says which there are


def test_text_of_all_languages_survives(tmp_path):
    row = {"question": "¿Cuánto es 1 + 1? 一加一\u2028等于几？ 🙂\x85", "answer": "二\n#### 2"}
    path = tmp_path / "data.jsonl"
    path.write_text(
        (json.dumps(row, ensure_ascii=False) + "\r\n") * 3, encoding="utf-8", newline=""
    )
    assert read_rows(str(path), "--data", COLUMNS) == ([row] * 3, [])


def test_other_columns_may_hold_anything(tmp_path):
    others = [1, "one", None, {"n": 1}, [1, "one"], {"m": [2]}]
    rows = [{**row, "other": other} for row, other in zip(rows_of(6), others, strict=True)]
    assert read_rows(write_jsonl(tmp_path / "data.jsonl", rows), "--data", COLUMNS) == (rows, [])


# Errors


@pytest.mark.parametrize(
    "bad_row",
    [
        "{'question': 1}", json.dumps(ROW)[:-1], "not JSON", "[" * 100_000,
        {"question": "What is 1 + 1?"}, ROW | {"answer": None}, ROW | {"answer": ["#### 2"]},
        ROW | {"question": ""}, ROW | {"answer": " \n"}, "null", "{}", "3", '"text"', "[]",
        '["What is 1 + 1?", "#### 2"]',
    ],
)  # fmt: skip
def test_malformed_row_is_named_by_its_number(bad_row, tmp_path):
    line = refused(write_jsonl(tmp_path / "bad.jsonl", [ROW, ROW, bad_row, ROW]))
    assert "row 3" in line and len(line) < 600


@pytest.mark.parametrize("row", ["3", '"text"', "{}", "[[]]", '["What is 1 + 1?", "#### 2"]'])
def test_rows_that_are_no_objects_are_refused(row, tmp_path):
    refused(write_jsonl(tmp_path / "bad.jsonl", [row] * 3))


@pytest.mark.parametrize(
    "number", [10, 30, 300, 1000, 4321]
)  # 30 kB to 13 MB: `datasets` reads it piece by piece
def test_rows_of_large_files_are_counted_from_their_beginning(number, tmp_path):
    rows = [json.dumps(ROW | {"question": "What? " * 500})] * number
    assert f"row {number} has no text" in refused(
        write_jsonl(tmp_path / "data.jsonl", [*rows[1:], {"question": "?"}, *rows])
    )
    assert f"row {number}: Expecting value" in refused(
        write_jsonl(tmp_path / "data.jsonl", [*rows[1:], "not JSON", *rows])
    )


def test_parquet_row_without_text_is_named_by_its_number(tmp_path):
    rows = rows_of(20)
    rows[6]["answer"] = None
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    assert "row 7" in refused(tmp_path / "data.parquet")


@pytest.mark.parametrize(
    "name", ["absent.jsonl", "absent.parquet", "absent.csv", "a.json.gz", "absent"]
)
def test_data_is_missing(name, tmp_path):
    refused(tmp_path / name)


def test_a_missing_file_is_refused_without_a_look_at_the_hub(tmp_path):
    script = (
        "import sys\nfrom common.tasks.rows import read_rows\n"
        "try:\n    read_rows('data/absent.jsonl', '--data', ('a',))\n"
        "except Exception as error:\n    print(error, 'datasets' in sys.modules)"
    )
    said = subprocess.check_output(
        [sys.executable, "-c", script], cwd=REPOSITORY, text=True, timeout=60
    )
    assert said.startswith("--data data/absent.jsonl: there is no such file") and said.endswith(
        " False\n"
    )


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet", "data.csv", "data.jsonl.gz"])
@pytest.mark.parametrize("content", ["", "\n", "\n\n \n", "PAR1 but nothing else"])
def test_data_has_no_rows(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    refused(tmp_path / name)


def test_data_has_no_training_split(tmp_path):
    (tmp_path / "data").mkdir()
    refused(tmp_path / "data")
    write_jsonl(tmp_path / "data" / "test.jsonl", rows_of(3))
    assert "train" in refused(tmp_path / "data")


# What stays behind


def test_reading_writes_nothing_and_says_nothing(tmp_path):
    write_jsonl(tmp_path / "data.jsonl", rows_of(9))
    write_jsonl(tmp_path / "bad.jsonl", ["not JSON"])
    (tmp_path / "directory").mkdir()
    write_jsonl(tmp_path / "directory" / "train.jsonl", rows_of(3))
    (tmp_path / "home").mkdir()
    (tmp_path / "temporary").mkdir()
    script = (
        "import sys\nfrom common.tasks.rows import read_rows\nfor source in sys.argv[1:]:\n"
        "    try:\n"
        "        print(len(read_rows(source, '--data', ('question', 'answer'))[0]))\n"
        "    except Exception as error:\n        print(type(error).__name__)"
    )
    before = sorted(tmp_path.rglob("*"))
    sources = [str(tmp_path / name) for name in ("data.jsonl", "directory", "bad.jsonl")]
    run = subprocess.run(
        [sys.executable, "-c", script, *sources],
        cwd=REPOSITORY,
        env={"HF_HUB_OFFLINE": "1", "HOME": f"{tmp_path}/home", "TMPDIR": f"{tmp_path}/temporary"},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert (run.stdout, run.stderr) == ("9\n3\nBadInput\n", "")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_edited_file_is_read_anew(tmp_path):
    # Even one of the same size and modification time, which a cache takes for the old one.
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "train.jsonl"
    for source in (path, path.parent):
        for answer in ("#### 1", "#### 2"):
            write_jsonl(path, [ROW | {"answer": answer}])
            os.utime(path, (1e9, 1e9))
            assert read_rows(str(source), "--data", COLUMNS)[0][0]["answer"] == answer
