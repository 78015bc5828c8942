"""Every kind of file gives the same rows; what cannot be read is named with file, line and column."""

from __future__ import annotations

import csv
import io
import json
import pickle

import pyarrow as pa
import pyarrow.parquet
import pytest

from luthier.core.errors import DataError
from luthier.core.hubs import Access
from luthier.data.files import open_source
from luthier.data.source import Source

ROWS = [{"a": f"row {n}", "b": "x\ny \u00e9"} for n in range(7)]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def as_csv(path):
    out = io.StringIO()
    writer = csv.DictWriter(out, ["a", "b"])
    writer.writeheader()
    writer.writerows(ROWS)
    path.write_bytes(out.getvalue().encode())


def as_arrow_stream(path):
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def as_arrow_file(path):
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS = {
    "rows.json": lambda path: write(path, json.dumps(ROWS, indent=2)),
    "lines.json": lambda path: write(path, "\n".join(map(json.dumps, ROWS))),
    "rows.jsonl": lambda path: write(path, "\n".join(map(json.dumps, ROWS)) + "\n"),
    "bom.jsonl": lambda path: write(path, "\ufeff" + "\r\n".join(map(json.dumps, ROWS)) + "\r\n"),
    "rows.csv": as_csv,
    "rows.parquet": lambda path: pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=3),
    "stream.arrow": as_arrow_stream,
    "file.arrow": as_arrow_file,
}


def opened(path, **changes):
    return open_source(Source(name="it", place="dataset", path=path, **changes))


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file(tmp_path, name):
    WRITERS[name](tmp_path / name)
    (file,) = opened(tmp_path / name)
    assert len(file) == 7
    assert [dict(row) for row in file.take(range(7))] == ROWS
    assert [row["a"] for row in file.take([5, 1, 1, 6])] == ["row 5", "row 1", "row 1", "row 6"]
    assert file.number(6) == 7
    again = pickle.loads(pickle.dumps(file))
    assert again.take([6]) == [ROWS[6]]


@pytest.mark.parametrize("name", ["rows.parquet", "stream.arrow", "file.arrow"])
def test_a_table_is_not_parsed_anew_for_every_group(tmp_path, monkeypatch, name):
    """What lists the groups grows with their number, so that reading it for each takes time by its square."""
    WRITERS[name](tmp_path / name)
    (file,) = opened(tmp_path / name)
    for module, reader in ((pa.ipc, "open_stream"), (pa.ipc, "open_file"), (pyarrow.parquet, "read_metadata")):
        monkeypatch.setattr(module, reader, None)
    assert [dict(row) for row in file.take(range(7))] == ROWS


def test_lines_of_text(tmp_path):
    (file,) = opened(write(tmp_path / "a.txt", "one\r\n\n   \ntwo \nthree"))
    assert file.take(range(3)) == [{"text": "one"}, {"text": "two "}, {"text": "three"}]
    assert [file.number(i) for i in range(3)] == [1, 4, 5]


def test_long_lines_are_found_across_blocks(tmp_path):
    lines = ["x" * 20_000_000, "y", "z" * 100]
    (file,) = opened(write(tmp_path / "a.txt", "\n".join(lines)))
    assert [row["text"] for row in file.take(range(3))] == lines


def test_rows_may_differ_in_shape_and_type(tmp_path):
    rows = [{"a": 1}, {"a": "one"}, {"a": [1, {"b": None}]}, {"c": True}]
    (file,) = opened(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert file.take(range(4)) == rows


def test_a_folder_of_one_kind(tmp_path):
    for name in ("b", "a"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"n": name}))
    write(tmp_path / "README.md", "no data")
    files = opened(tmp_path)
    assert [file.path.name for file in files] == ["a.jsonl", "b.jsonl"]
    write(tmp_path / "c.csv", "n\n1")
    with pytest.raises(DataError, match=r"several kinds \(.csv, .jsonl\)"):
        opened(tmp_path)


def test_a_folder_that_datasets_wrote(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (file,) = opened(tmp_path / "saved")
    assert [dict(row) for row in file.take(range(7))] == ROWS


def test_a_sub_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "a.jsonl", "{}")
    assert len(opened(tmp_path, folder="sub")) == 1
    with pytest.raises(DataError, match="holds no data files"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.json", '[{"a": 1},\n {"a" 2}]', ["a.json, line 2, column 7", 'near: [{"a": 1},  {"a" 2}]']),
        ("a.json", '{"data": []}\n', []),
        ("a.json", '{\n "data": [],\n "more": 1}', ["expected a JSON list", "'data', 'more'"]),
        ("a.json", '[{"a": 1}, "two"]', ["row 2", "expected a JSON object", "'two' (str)"]),
        ("a.json", "", ["is empty"]),
        ("a.json", "[]", ["is empty"]),
        ("a.jsonl", "\n\n", ["is empty"]),
        ("a.csv", "a,b\n", ["is empty"]),
        ("a.csv", "a,b\n1,2\n1,2,3\n", ["row 2 (line 3)", "1 more fields"]),
        ("a.parquet", "no parquet", ["not a parquet file"]),
        ("a.arrow", "no arrow", ["not an arrow file"]),
        ("a.xml", "<a/>", ["unknown kind of file '.xml'", ".jsonl"]),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, text, expected):
    path = write(tmp_path / name, text)
    if not expected:
        assert len(opened(path)[0]) == 1  # one object on one line is a JSON line
        return
    with pytest.raises(DataError) as caught:
        opened(path)
    for part in [*expected, str(path)]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"a": tru}', [", line 4, column 7", 'near: {"a": tru}']),
        (b"[1]", [", line 4", "expected a JSON object", "[1] (list)"]),
        (b'{"a": "\xff"}', [", line 4", "not UTF-8", "0xff"]),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, expected):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": 2}\n' + line + b"\n")
    (file,) = opened(path)
    assert len(file.take([0, 1])) == 2
    with pytest.raises(DataError) as caught:
        file.take([2])
    for part in [*expected, str(path)]:
        assert part in str(caught.value)


def test_a_hub_id_without_the_hub():
    with pytest.raises(DataError, match="'org/none' is no local file or folder, and loading it from the hub failed"):
        open_source(Source(name="org/none", place="dataset", hub="org/none"))


def test_a_split_of_the_hub(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source(name="o/n", place="dataset", hub="o/n", subset="en", split="test", folder="sub", revision="v2")
    (file,) = open_source(source, access=Access(tokens={"hf": "hf_mine"}, cache_dir="there"))
    chosen = {"name": "en", "split": "test", "data_dir": "sub", "revision": "v2"}
    assert asked == [(("o/n",), chosen | {"streaming": False, "token": "hf_mine", "cache_dir": "there"})]
    assert len(file) == 7
    assert file.take([2, 0, 2]) == [ROWS[2], ROWS[0], ROWS[2]]
    assert file.take([]) == []


def test_lines_of_nothing_but_blanks_are_no_rows_however_long(tmp_path):
    (tmp_path / "a.txt").write_bytes(b" " * 200 + b"\n" + b"\t" * 70 + b"word" + b"\n" + b" \r\n" + b"\t" * 300)
    (file,) = open_source(Source(name="a", place="dataset", path=tmp_path / "a.txt"))
    assert [file.number(i) for i in range(len(file))] == [2]


def test_two_columns_of_one_name(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,output,output\nq,a,b\n")
    with pytest.raises(DataError, match="two columns are called 'output'"):
        open_source(Source(name="a", place="dataset", path=tmp_path / "a.csv"))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    "text, words", [("[" * 5000 + "]" * 5000, "nested too deep"), ("[" + "9" * 5000 + "]", "cannot be")]
)
def test_json_that_no_parser_takes(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        open_source(Source(name="a", place="dataset", path=tmp_path / name))[0].take([0])
