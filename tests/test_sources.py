"""Sources: every kind of file, folder and mixture gives the rows that were written, or is told what it is."""

import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from fixtures import tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spinfast.config import parse_config
from spinfast.data import load_data, sources
from spinfast.data.conversations import RowError
from spinfast.data.examples import load_examples
from spinfast.data.readers import SAMPLE
from spinfast.data.renderer import Renderer
from spinfast.data.sources import open_table
from spinfast.errors import UserError
from spinfast.names import FILE_SUFFIXES, PACKED_SUFFIXES

CUT_GZIP = gzip.compress(b'{"question": "q", "answer": "a"}\n' * 9, mtime=0)[:-6]

CASES = Path(__file__).parent / "cases"
RENDERER = Renderer(tiny_tokenizer())


def qa(count, start=0):
    return [{"question": f"q{i}", "answer": f"{i}"} for i in range(start, start + count)]


def write(path, rows):
    """Rows in the format and the compression that the name says; returns the path."""
    plain = path.with_suffix("") if path.suffix in PACKED_SUFFIXES else path
    table = pa.Table.from_pylist(rows)
    if plain.suffix == ".parquet":
        pq.write_table(table, plain)
    elif plain.suffix in (".arrow", ".feather"):
        kind = pa.ipc.new_stream if plain.suffix == ".arrow" else pa.ipc.new_file
        with kind(str(plain), table.schema) as writer:
            writer.write_table(table)
    elif plain.suffix in (".csv", ".tsv"):
        with plain.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if plain.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif plain.suffix == ".json":
        plain.write_text(json.dumps(rows, indent=1))
    else:
        plain.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    if plain != path:
        codec = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}[path.suffix]
        with pa.CompressedOutputStream(str(path), codec) as out:
            out.write(plain.read_bytes())
        plain.unlink()
    return path


def read(source, **kwargs):
    table = open_table(str(source), **kwargs)
    return [table.row(i) for i in range(table.length)]


def refusal(call, *args, **kwargs):
    """The one line of a UserError."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def load(source, **kwargs):
    return load_examples(str(source), renderer=RENDERER, max_prompt_tokens=200, max_answer_tokens=200, **kwargs)


def load_config(data, **sections):
    config = parse_config({"model": {"name": "x"}, "data": data, **sections})
    return load_data(config, RENDERER)


# -- one file -----------------------------------------------------------------------------------------------------

ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "question": st.text(st.characters(exclude_categories=["Cs"]), max_size=20).map("q{}".format),
            "answer": st.sampled_from(["42", "007", "1.50", "null", "NA", "true", "1e5", '"', "a,b;c\td", "x\r\ny\n"]),
        }
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("packed", ["", *PACKED_SUFFIXES])
@pytest.mark.parametrize("suffix", FILE_SUFFIXES)
@given(ROWS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_rows_read_back_as_they_were_written(tmp_path, suffix, packed, rows):
    assert read(write(tmp_path / f"data{suffix}{packed}", rows)) == rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of 30 rows in every format and compression."""
    folder = tmp_path_factory.mktemp("whole")
    names = [f"data{suffix}{packed}" for suffix in FILE_SUFFIXES for packed in ("", *PACKED_SUFFIXES)]
    return {name: write(folder / name, qa(30)).read_bytes() for name in names}


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=400)
def test_damaged_bytes_are_told_in_one_line(tmp_path, whole, data):
    name = data.draw(st.sampled_from(sorted(whole)))
    content = bytearray(whole[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    path = tmp_path / name
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    told = []
    try:
        table = open_table(str(path))
        for i in range(table.length):
            try:
                assert isinstance(table.row(i), dict)
            except RowError as error:
                told.append(f"{table.where(i)}: {error}")
    except UserError as error:
        told.append(str(error))
    assert all(str(path) in line and "\n" not in line for line in told)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('{"question": "q0", "answer": "0"}', qa(1)),
        (json.dumps(qa(1)[0], indent=2), qa(1)),
        ("\n\n".join(json.dumps(row, indent=2) for row in qa(3)), qa(3)),
        ("".join(json.dumps(row) for row in qa(3)), qa(3)),
        (json.dumps({"version": 1, "data": qa(2)}), qa(2)),
        (json.dumps({"data": qa(2)}, indent=2), qa(2)),
        ('{"data": [\n' + json.dumps(qa(1)[0]) + "\n]}", qa(1)),
        ("[\n" + ",\n".join(json.dumps(row) for row in qa(3)) + "\n]\n", qa(3)),
        ("\ufeff" + json.dumps(qa(2)), qa(2)),
        ("\r\n".join(json.dumps(row) for row in qa(2)), qa(2)),
        ("\r".join(json.dumps(row) for row in qa(2)), qa(2)),
        ('{"messages": [{"role": "user", "content": "a"}]}', [{"messages": [{"role": "user", "content": "a"}]}]),
        ('{"answer": NaN, "score": NaN}\n{"answer": "b"}', [{"answer": None, "score": None}, {"answer": "b"}]),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_json_is_read_however_it_is_laid_out(tmp_path, suffix, text, rows):
    (tmp_path / f"data{suffix}").write_text(text, newline="")
    assert read(tmp_path / f"data{suffix}") == rows


def test_lists_by_split_in_one_json_file(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"train": qa(3), "test_hard": qa(2, 5)}))
    assert (read(path), read(path, split="test_hard"), read(path, split="train[1:2]+test_hard[:1]")) == (
        qa(3),
        qa(2, 5),
        [qa(3)[1], qa(2, 5)[0]],
    )
    assert open_table(str(path), split="test_hard").where(1) == f"{path}, test_hard row 2"
    assert "it has train, test_hard" in refusal(read, path, split="validation")


def test_columns_are_those_of_all_rows_in_the_sample(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"a": 1}, {"b": 2}, *[{"a": 1}] * SAMPLE, {"late": 1}]
    path.write_text('{"cut": \n' + "".join(json.dumps(row) + "\n" for row in rows))
    table = open_table(str(path))
    assert (table.columns, table.length, table.where(1)) == (("a", "b"), len(rows) + 1, f"{path}, line 2")
    with pytest.raises(RowError, match="not valid JSON"):
        table.row(0)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("question;answer\nq,0;0\n", [{"question": "q,0", "answer": "0"}]),
        ('\ufeffquestion,answer\r\nq,"0\r\n1"\r\n', [{"question": "q", "answer": "0\r\n1"}]),
        (",question,answer\n0,q,\n\n,,\n1,r,null\n", [
            {"": "0", "question": "q", "answer": None},
            {"": "1", "question": "r", "answer": "null"},
        ]),
        ('text\n"say ""hi"""\n', [{"text": 'say "hi"'}]),
        ("question , answer\nq, 0\n", [{"question": "q", "answer": " 0"}]),
    ],
    ids=["semicolons", "bom-and-line-break", "index-blank-and-null", "one-column", "spaces"],
)  # fmt: skip
def test_csv_as_spreadsheets_write_it(tmp_path, text, rows):
    (tmp_path / "data.csv").write_text(text, newline="")
    assert read(tmp_path / "data.csv") == rows


def test_labels_in_csv_are_text(tmp_path):
    (tmp_path / "data.csv").write_text("prompt,completion,label\na,x,True\nb,y,0\nc,z,maybe\n")
    data = load(tmp_path / "data.csv", bad_rows="skip")
    assert {(e.answer, e.desirable) for e in data.examples} == {("x", True), ("y", False)}
    assert data.rejected == {"no label": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'question,answer\n"a\nb",1\nhow, many?,3\n', "line 4: expected 2 cells (question, answer), got 3; quote"),
        (b'question,answer\nq,0\n"say" hi,1\nr,2\n', "line 3: not valid CSV: ',' expected after '\"'"),
        (b'question,answer\nq,0\n"never closed,1\nr,2\n', "line 3: not valid CSV: unexpected end of data"),
        (b"question,answer\nq,0\nq,caf\xe9\n", "line 3: invalid UTF-8 at byte 5; save the file as UTF-8"),
        (b"question,question\na,b\n", "line 1: two columns are called 'question'"),
        (b"question,answer\n", "no rows; expected at least one example"),
        (b"How many?,3\nHow much?,4\n", "columns 3, How many? are no known format"),
    ],
)
def test_faults_of_csv_are_told_by_line(tmp_path, content, message):
    (tmp_path / "data.csv").write_bytes(content)
    assert message in refusal(load, tmp_path / "data.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            "a Git LFS pointer; the data is not h",
        ),
        (b"/annex/objects/MD5E-s12--00.jsonl\n", "a git-annex pointer"),
        (b"<!DOCTYPE html>\n<html>", "a web page"),
        (b"\n <html><body>404</body></html>", "a web page"),
        (b"<?xml version='1.0'?><rows/>", "XML"),
        ('{"question": "a"}'.encode("utf-16"), "no UTF-8 text"),
        ('{"question": "a"}'.encode("utf-16-le"), "no UTF-8 text"),
        (b"PK\x03\x04\x14\x00", "a ZIP archive or an Excel workbook"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel workbook"),
        (b"\x80\x04\x95\x0b\x00", "a pickle"),
        (b"\xfd7zXZ\x00\x00", "an archive of a kind that is not read; unpack it"),
        (b"data.jsonl".ljust(257, b"\0") + b"ustar\x0000", "a tar archive"),
        (b"SQLite format 3\x00", "no table of rows"),
    ],
)
@pytest.mark.parametrize("name", ["data.jsonl", "data.csv", "data.parquet", "data.json.gz"])
def test_a_file_of_another_kind_is_told_what_it_is(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert f"data {path}: this file is {message}" in refusal(read, path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", b'{"question": "q", "answer": Infinity}\n' * 2, "line 1: not valid JSON: Infinity is no JSON"),
        ("data.json", b'[{"question": "q",}]', "line 1: not valid JSON"),
        ("data.json", b'[{"question": "q"},\n{"question": "r"}\n', "line 3: not valid JSON"),
        ("data.jsonl", b"question: what\nanswer: this\n", "line 1: not valid JSON: Expecting value, found 'question: "),
        ("data.jsonl", b'{"question": "q", "answer": "a"}\n' + b"\0" * 99, "line 2: not valid JSON"),
        ("data.parquet", b"", "cannot be read as parquet"),
        ("data.arrow", b"", "cannot be read as arrow"),
        ("data.jsonl.gz", CUT_GZIP, "cannot be read as jsonl"),
        ("data.pkl", b"\x80\x04", "expected a file ending in .jsonl"),
        ("data.xlsx", b"PK\x03\x04", "expected a file ending in .jsonl"),
    ],
)
def test_a_file_that_is_broken_is_told_where(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in refusal(load, tmp_path / name)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_file_that_changes_while_it_is_read(tmp_path, suffix):
    path = write(tmp_path / f"data{suffix}", qa(9))
    table = open_table(str(path))
    path.write_bytes(path.read_bytes()[:-5])
    assert table.row(7) == qa(9)[7]
    with pytest.raises(RowError):
        table.row(8)
    path.unlink()
    assert f"data {path}: cannot be read any more" in refusal(table.row, 0)


def test_what_a_file_is_its_bytes_say(tmp_path):
    for kind in (".parquet", ".feather", ".jsonl.gz", ".jsonl.zst"):
        write(tmp_path / f"data{kind}", qa(3)).rename(tmp_path / "data.jsonl")
        assert read(tmp_path / "data.jsonl") == qa(3)
    write(tmp_path / "data.jsonl", qa(3)).rename(tmp_path / "unpacked.jsonl.gz")
    assert read(tmp_path / "unpacked.jsonl.gz") == qa(3)


def test_members_of_a_gzip_file_are_all_read(tmp_path):
    packed = [gzip.compress(json.dumps(row).encode() + b"\n") for row in qa(3)]
    (tmp_path / "data.jsonl.gz").write_bytes(b"".join(packed))
    assert read(tmp_path / "data.jsonl.gz") == qa(3)


def test_a_parquet_file_with_categories_and_row_groups(tmp_path):
    column = pa.chunked_array([pa.array(["a", "b"]).dictionary_encode(), pa.array(["c"]).dictionary_encode()])
    pq.write_table(pa.table({"question": column}), tmp_path / "data.parquet", row_group_size=1)
    assert read(tmp_path / "data.parquet") == [{"question": letter} for letter in "abc"]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow.zst"])
def test_rows_of_a_large_file_stay_on_the_disk(tmp_path, suffix):
    rows = [{"question": f"{i:5}" * 200} for i in range(20_000)]
    path = write(tmp_path / f"data{suffix}", rows)
    del rows
    before = pa.total_allocated_bytes()
    table = open_table(str(path))
    assert table.row(19_999) == {"question": "19999" * 200}
    assert pa.total_allocated_bytes() - before < 1 << 20  # of 20 MiB


# -- splits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train", range(20)), ("train[:25%]", range(5)), ("train[-2:]", (18, 19)), ("train[:1]+train[5:7]", (0, 5, 6))],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_slices_of_a_local_file(tmp_path, suffix, split, expected):
    path = write(tmp_path / f"all{suffix}", qa(20))
    table = open_table(str(path), split=split)
    assert [table.row(i) for i in range(table.length)] == [qa(20)[i] for i in expected]
    whole = open_table(str(path))
    assert [table.where(i) for i in range(table.length)] == [whole.where(i) for i in expected]


def test_a_file_is_the_split_that_its_name_says(tmp_path):
    path = write(tmp_path / "test.jsonl", qa(4))
    assert read(path) == read(path, split="test") == qa(4)
    assert read(path, split="test[:50%]") == qa(2)
    assert 'Unknown split "validation"' in refusal(read, path, split="validation")
    assert "it has train, and slices such as train[:25%]" in refusal(read, path, split="train[:25")
    assert "no rows" in refusal(read, path, split="train[3:1]")


@pytest.mark.parametrize("name", ["one", "dict/train"])
def test_a_saved_data_set(name):  # case 07
    rows = read(CASES / "07-save-to-disk" / name)
    assert [sorted(row) for row in rows] == [["answer", "question"]] * len(rows)
    assert load(CASES / "07-save-to-disk" / name).examples


def test_saved_data_sets_by_split(tmp_path):
    saved = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(qa(9)), "test": datasets.Dataset.from_list(qa(3))}
    )
    saved["train"] = saved["train"].shuffle(seed=1).with_format("numpy")
    saved.save_to_disk(tmp_path / "[saved] set")
    expected = saved["train"].with_format(None).to_list()
    assert read(tmp_path / "[saved] set") == expected != qa(9)
    assert read(tmp_path / "[saved] set", split="test+train[:1]") == [*qa(3), expected[0]]
    assert "it has train, test" in refusal(read, tmp_path / "[saved] set", split="validation")
    for path in (tmp_path / "[saved] set" / "test").glob("*.arrow"):
        path.write_bytes(path.read_bytes()[:200])
    assert "saved data set that cannot be read" in refusal(read, tmp_path / "[saved] set", split="test")


def test_what_local_sources_have_not_is_refused():  # case 30
    path = CASES / "30-settings-a-local-file-ignores" / "all.jsonl"
    assert len(read(path, split="train[:25%]")) == round(len(read(path)) / 4)
    assert f"data {path}: subset main: a local source has no subsets; leave it out" == refusal(
        read, path, subset="main"
    )
    assert "revision abc: a local source has no revisions" in refusal(read, path, revision="abc")
    assert "no subsets" in refusal(read, path.parent, subset="main")
    assert "no subsets" in refusal(read, CASES / "07-save-to-disk" / "one", subset="main")
    problems = "reasoning_gym:gsm_symbolic"
    assert "no subsets" in refusal(read, problems, subset="main", rows=3)
    assert "no revisions" in refusal(read, problems, revision="abc", rows=3)
    assert "no slices; use data.size" in refusal(read, problems, split="train[:10%]", rows=3)


# -- folders and patterns -----------------------------------------------------------------------------------------

SHARDS = ("part-00000.jsonl", "part-00001.csv", "part-00002.parquet", "part-00003.json.gz", "deep/part-00004.arrow.zst")


def shards(folder):
    (folder / "deep").mkdir(parents=True)
    for number, name in enumerate(SHARDS):
        write(folder / name, qa(3, 3 * number))
    (folder / "_SUCCESS").touch()
    (folder / ".part-00000.jsonl.crc").write_bytes(b"crc")
    return folder


@pytest.mark.parametrize("name", ["data", "[draft] 1", "a b", "*", "~x", "\u00fc{}?", "part.jsonl"])
def test_shards_in_a_folder_of_any_name(tmp_path, name):
    folder = shards(tmp_path / name)
    in_order = [3 * SHARDS.index(name) + i for name in sorted(SHARDS) for i in range(3)]
    assert read(folder) == [qa(15)[i] for i in in_order]
    assert read(folder / SHARDS[0]) == qa(3)
    table = open_table(str(folder), split="train[-3:]")
    assert table.where(0) == f"{folder}/part-00003.json.gz, row 1"


def test_shards_by_pattern(tmp_path, monkeypatch):
    folder = shards(tmp_path / "data")
    assert read(folder / "part-0000[01].*") == qa(6)
    assert read(f"{folder}/**/*.arrow.zst") == qa(3, 12)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("data/*.csv") == read("~/data/*.csv") == read("~/data/part-00001.csv") == qa(3, 3)
    assert "no file matches it" in refusal(read, "data/*.tsv")
    assert "data/_SUCCESS: expected a file ending in" in refusal(read, "data/*")


def test_a_link_to_a_file_that_is_not_here(tmp_path):
    (tmp_path / "data.jsonl").symlink_to(".git/annex/objects/gone")
    assert "a link to a file that is not here; fetch it (git annex get" in refusal(read, tmp_path / "data.jsonl")


def test_splits_by_the_names_of_files(tmp_path, caplog):
    for name, start in (("train-1", 0), ("train-2", 3), ("a_dev", 6), ("test/x", 9), ("notes", 12)):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        write(path, qa(3, start))
    assert (read(tmp_path), read(tmp_path, split="validation"), read(tmp_path, split="test")) == (
        qa(6),
        qa(3, 6),
        qa(3, 9),
    )
    assert f"not read, their names say no split and others' do: {tmp_path}/notes.jsonl" in caplog.text
    (tmp_path / "test" / "x.jsonl").write_text("version https://git-lfs.github.com/spec/v1")
    assert read(tmp_path) == qa(6)  # other splits are not looked at
    assert "test/x.jsonl: this file is a Git LFS pointer" in refusal(read, tmp_path, split="train+test")
    write(tmp_path / "test" / "x.jsonl", qa(1))
    assert "it has validation, test, train, and slices" in refusal(read, tmp_path, split="heldout")


CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/a-*
  - split: extra
    path: [main/b.jsonl, main/c.jsonl]
- config_name: other
  data_dir: other
{}---
# A card
"""


@pytest.mark.parametrize("default", [True, False])
def test_subsets_of_a_copy_of_a_hub_data_set(tmp_path, default):
    (tmp_path / "README.md").write_text(CARD.format("  default: true\n" if default else ""))
    for number, name in enumerate(("main/a-1", "main/b", "main/c", "other/train")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{name}.jsonl", qa(2, 2 * number))
    assert read(tmp_path, subset="main") == qa(2)
    assert read(tmp_path, subset="main", split="extra") == qa(4, 2)
    assert read(tmp_path, subset="other") == qa(2, 6)
    assert "subset third: it has main, other" in refusal(read, tmp_path, subset="third")
    if default:
        assert read(tmp_path) == qa(2, 6)
    else:
        assert "name one of its subsets in data.subset: main, other" in refusal(read, tmp_path)


def test_a_card_that_is_no_card(tmp_path):
    write(tmp_path / "data.jsonl", qa(2))
    for text in ("# Read me", "---\nlicense: mit\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert read(tmp_path) == qa(2)
    for configs in ("7", "[7]", "[{data_files: x}]", "[{config_name: a, data_files: [{path: 3}]}]"):
        (tmp_path / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
        assert "README.md's configs cannot be read" in refusal(read, tmp_path)


def test_files_of_other_kinds_in_a_folder_are_named(tmp_path, caplog):
    caplog.set_level("INFO")
    write(tmp_path / "data.jsonl", qa(2))
    for name in ("rows.xlsx", "more.zip", ".hidden"):
        (tmp_path / name).write_bytes(b"x")
    assert read(tmp_path) == qa(2)
    assert "2 files of other kinds are not read: more.zip, rows.xlsx" in caplog.text


def test_a_folder_without_data(tmp_path):
    (tmp_path / "train.pkl").write_bytes(b"\x80\x04")
    assert "no data files in this folder; expected .jsonl" in refusal(read, tmp_path)


def test_shards_that_differ(tmp_path, caplog):  # case 09
    case = CASES / "09-shards-that-differ"
    assert sorted(e.index for e in load(case / "fine").examples) == [0, 1]
    assert not caplog.text
    broken = refusal(load, case / "broken-line")
    assert f"{case}/broken-line/part-00001.jsonl, line 1: not valid JSON" in broken
    assert load(case / "broken-line" / "*.jsonl", bad_rows="skip").rejected == {"not valid JSON": 1}
    assert len(load(case / "other-column").examples) == 2
    assert f"1 of 2 files have other columns than part-00000.jsonl: {case}/other-column/part-00001" in caplog.text
    assert "lacks none, has task_type; what a row lacks is null" in caplog.text


def test_a_shard_without_a_column_that_is_wanted(tmp_path, caplog):
    write(tmp_path / "a.parquet", qa(2))
    write(tmp_path / "b.parquet", [{"question": "q"}])
    assert f"{tmp_path}/b.parquet, row 1: no answer: it is null" in refusal(load, tmp_path)
    assert load(tmp_path, bad_rows="skip").rejected == {"empty text": 1}
    assert f"{tmp_path}/b.parquet lacks answer, has no others" in caplog.text


# -- the shared cases ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one-object.json", "train.csv", "train.jsonl.gz", "wrapped.json"])
def test_files_whose_meaning_is_plain(name):  # case 10
    rows = read(CASES / "10-json-that-is-no-json-lines" / name)
    assert rows == [{"question": f"q{i}", "answer": "a"} for i in range(1, len(rows) + 1)]
    assert len(rows) == (2 if name in ("wrapped.json", "train.jsonl.gz") else 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "commas.jsonl",
            "line 1: a comma after the row; expected one JSON object per line without commas, or all rows",
        ),
        ("lfs.jsonl", "this file is a Git LFS pointer; the data is not here: run git lfs pull"),
        ("lfs.parquet", "this file is a Git LFS pointer; the data is not here: run git lfs pull"),
    ],
)
def test_files_that_are_something_else(name, message):  # case 10
    assert message in refusal(read, CASES / "10-json-that-is-no-json-lines" / name)


def test_a_line_that_is_cut_is_a_row_at_fault():  # case 12
    path = CASES / "12-bad-rows-skip-and-templates" / "cut-line.jsonl"
    lines = path.read_bytes().splitlines()
    assert "not valid JSON" in refusal(load, path)
    data = load(path, bad_rows="skip")
    assert data.rejected == {"not valid JSON": 1}
    assert len(data.examples) == len(lines) - 1


def test_errors_of_the_library_are_unwrapped(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(datasets.exceptions.DatasetGenerationError) as caught:
        datasets.load_dataset("json", data_files=str(tmp_path / "a.json"), cache_dir=str(tmp_path / "cache"))
    assert "JSON parse error" in sources.cause(caught.value)


# -- mixtures -----------------------------------------------------------------------------------------------------


def mixture(tmp_path, sizes, suffixes=(".jsonl", ".csv", ".parquet")):
    paths = [tmp_path / f"{number}{suffix}" for number, suffix in zip(range(len(sizes)), suffixes, strict=False)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [str(write(path, qa(size, start))) for path, size, start in zip(paths, sizes, starts, strict=True)]


@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.2, 5)), min_size=2, max_size=3),
    st.booleans(),
    st.none() | st.integers(3, 40),
    st.integers(0, 99),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_a_mixture_has_the_weights_and_no_row_twice(tmp_path, parts, weighted, size, seed):
    lengths, weights = zip(*parts, strict=True)
    paths = mixture(tmp_path, lengths)
    named = [{"source": path, "weight": w if weighted else None} for path, w in zip(paths, weights, strict=True)]
    data = {"source": named, "size": size, "seed": seed}
    try:
        examples = load_config(data)["data"].examples
    except UserError:
        assert "leave none for source" in refusal(load_config, data)
        return
    assert [e.messages[0]["content"] for e in examples] == [f"q{e.index}" for e in examples]  # numbered over all
    assert len({e.index for e in examples}) == len(examples)
    assert load_config(data)["data"].examples == examples
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    counts = [sum(s <= e.index < s + n for e in examples) for s, n in zip(starts, lengths, strict=True)]
    weights = weights if weighted else lengths
    wanted = size or min(n * sum(weights) / w for n, w in zip(lengths, weights, strict=True))
    for count, length, weight in zip(counts, lengths, weights, strict=True):
        assert abs(count - min(length, wanted * weight / sum(weights))) <= 1


def test_sources_of_a_mixture_are_read_with_their_own_settings(tmp_path, caplog):
    caplog.set_level("INFO")
    turns = [
        {"messages": [{"role": "user", "content": f"m{i}"}, {"role": "assistant", "content": "yes"}]} for i in range(4)
    ]
    renamed = [{"problem": f"p{i}", "answer": f"{i}"} for i in range(8)]
    data = {
        "source": [
            str(write(tmp_path / "a.jsonl", [*turns, *turns[:1]])),
            {
                "source": str(write(tmp_path / "b.csv", renamed)),
                "columns": {"question": "problem"},
                "split": "train[:50%]",
            },
            str(write(tmp_path / "c.jsonl", turns[:1])),
            "reasoning_gym:gsm_symbolic",
        ],
        "size": 13,
    }
    loaded = load_config(data, prompt={"max_prompt_tokens": 999, "max_answer_tokens": 999})["data"]
    first = [e.messages[0]["content"] for e in loaded.examples if e.index < 10]
    assert {text[0] for text in first} == {"m", "p"}
    assert not {"p4", "p5", "p6", "p7"} & {*first}
    assert len(first) == len({*first})
    assert "examples in the mixture of 4 sources" in caplog.text
    assert loaded.rejected["duplicate"] >= 1


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (["grpo"], []),
        (["sft", "grpo"], ["data: sft leaves out 3 of 7 rows: they are prompts alone"]),
        (["sft", "spin", "grpo"], ["data: sft and spin leave out 3 of 7 rows: they are prompts alone"]),
        (["sft"], None),
    ],
)
def test_a_mixture_of_answers_and_prompts_alone(tmp_path, caplog, method, told):
    prompts = [{"prompt": f"p{i}", "ground_truth": str(i), "level": i} for i in range(3)]
    data = {"source": [str(write(tmp_path / "a.jsonl", qa(4))), str(write(tmp_path / "b.jsonl", prompts))]}
    if told is None:
        assert "b.jsonl: columns ground_truth, level, prompt are no known format" in refusal(
            load_config, data, method=method
        )
        return
    examples = load_config(data, method=method)["data"].examples
    assert {(bool(e.real_ids), bool(e.columns), e.reference is not None) for e in examples} == {
        (True, True, True),
        (False, True, True),
    }
    assert [record.message for record in caplog.records if "leave" in record.message] == told
    assert {e.columns["level"] for e in examples if not e.real_ids} == {0, 1, 2}


def test_a_mixture_is_saved_and_read_again(tmp_path):
    paths = mixture(tmp_path, (6, 4))
    config = parse_config({"model": {"name": "x"}, "data": {"source": [paths[0], {"source": paths[1]}]}})
    again = parse_config(yaml.safe_load(config.dump()))
    assert again.hash() == config.hash()
    assert [part.source for _, part in again.data.parts()] == paths
    assert load_data(again, RENDERER)["data"] == load_data(config, RENDERER)["data"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "data.source: tuple should have at least 1 item"),
        ("", "data.source: string should have at least 1 character"),
        (7, "data.source: input should be a valid string"),
        ([7], "data.source.0: input should be a valid dictionary"),
        ([{"source": "a", "weigth": 1}], "unknown key 'data.source.0.weigth'; did you mean 'weight'?"),
        ([{"source": "a", "weight": 0}], "data.source.0.weight: input should be greater than 0"),
        ([{"source": "a", "weight": 1}, "b"], "data.source: expected a weight for each source, or for none"),
        ([{"weight": 1}], "data.source.0.source: this key is required"),
    ],
)
def test_mixtures_that_are_none(source, message):
    assert message in refusal(parse_config, {"model": {"name": "x"}, "data": {"source": source}})


def test_a_source_that_the_weights_leave_out_is_told(tmp_path):
    paths = mixture(tmp_path, (6, 4))
    data = {"source": [{"source": paths[0], "weight": 1}, {"source": paths[1], "weight": 0.001}], "size": 5}
    assert "5 rows by weight leave none for source 2; raise its weight or data.size" in refusal(load_config, data)
