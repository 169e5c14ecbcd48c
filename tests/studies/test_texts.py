"""Texts to be rated, from whatever they stand in; and the worked solutions that are right or wrong."""

from __future__ import annotations

import gzip
import importlib.util
import json
import logging
import zipfile
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinfast.data.sources import open_table
from spinfast.errors import UserError
from spinfast.studies import texts
from spinfast.studies.texts import falsified, read_text, read_texts, sentence_shuffled

PAGE = """<!DOCTYPE html><html><head><title>not this</title><style>p {}</style></head><body>
<h1>Call me</h1><p>Some   <b>years</b>
ago &mdash; never&nbsp;mind.<br>How long</p><script>var x = "not this"</script><ul><li>one<li>two</ul>
<pre>a
  b</pre><table><tr><td>1</td><td>2</td></tr></table></body></html>"""
PAGE_TEXT = "Call me\n\nSome years ago — never mind.\nHow long\n\none\ntwo\n\na\n  b\n\n1 2"
CONTAINER = '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>{}</rootfiles></container>'
OPF = """<package xmlns="http://www.idpf.org/2007/opf"><manifest>
<item id="a" href="text/first%20one.xhtml"/><item id="b" href="text/second.xhtml"/><item id="n" href="notes.xhtml"/>
</manifest><spine><itemref idref="b"/><itemref idref="n" linear="no"/><itemref idref="a"/></spine></package>"""


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def book(path: Path, **changes) -> Path:
    """An EPUB whose spine is not in the order of its files; `changes` by file, None leaves one out."""
    parts = {
        "META-INF/container.xml": CONTAINER.format('<rootfile full-path="OPS/book.opf"/>'),
        "OPS/book.opf": OPF,
        "OPS/text/first one.xhtml": "<html><body><p>It ends.</p></body></html>",
        "OPS/text/second.xhtml": '<?xml version="1.0" encoding="utf-8"?><html><body><p>It begins é.</p></body></html>',
        "OPS/notes.xhtml": "<p>beside it</p>",
    }
    with zipfile.ZipFile(path, "w") as file:
        for name, content in (parts | changes).items():
            if content is not None:
                file.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree", "one\ntwo\nthree"),
        ("a.md", "# é\n", "# é\n"),
        ("GPL-3.0", "a licence", "a licence"),
        ("ORCHARDS.txt", "ORCHARDS", "ORCHARDS"),
        ("a.rst.gz", gzip.compress(b"packed", mtime=0), "packed"),
        ("a.dict.dz", gzip.compress(b"packed", mtime=0), "packed"),
        ("a.html", PAGE, PAGE_TEXT),
        ("b.htm", '<meta charset="latin-1"><p>é</p>'.encode("latin-1"), "é"),
        ("a.jsonl", '{"text": "one"}\n{"text": "two"}\n', "one\n\ntwo"),
        ("a.csv", "id,text\n1,one\n2,two\n", "one\n\ntwo"),
    ],
)
def test_a_file_is_read_as_what_its_name_says(tmp_path, name, content, text):
    found = read_text(str(write(tmp_path / name, content)))
    assert found.text == text
    assert found.name == name.split(".")[0]
    assert found.sha256 == read_text(str(write(tmp_path / "other.txt", text))).sha256


def test_a_parquet_column_by_name(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"body": ["one", "two"]}), path)
    assert read_text(str(path), column="body").text == "one\n\ntwo"
    with pytest.raises(UserError, match=r"no column 'text'; columns are body$"):
        read_text(str(path))


def test_a_book_is_read_in_the_order_of_its_spine(tmp_path):
    assert read_text(str(book(tmp_path / "b.epub"))).text == "It begins é.\n\nIt ends."


@pytest.mark.parametrize(
    "changes",
    [
        {"META-INF/container.xml": None},
        {"META-INF/container.xml": CONTAINER.format("")},
        {"OPS/book.opf": "<package"},
        {"OPS/book.opf": OPF.replace('idref="a"', 'idref="z"')},
        {"OPS/text/second.xhtml": None},
    ],
)
def test_a_book_that_lacks_a_part_is_refused(tmp_path, changes):
    with pytest.raises(UserError, match=r"\Atext .*b\.epub: not an EPUB that can be read: [^\n]+\Z"):
        read_text(str(book(tmp_path / "b.epub", **changes)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " \n\t\n", "empty"),
        ("a.html", "<script>only code</script>", "empty"),
        ("a.txt", b"\x00\x01", "binary, it has a null byte at 0"),
        ("a.bin", bytes(range(128, 200)), "line 1: neither UTF-8 nor text"),
        ("a.txt", "first\nna\u00efve".encode("latin-1"), r"line 2: neither UTF-8 .*byte 0xef.*iconv"),
        ("a.txt", PAGE, "a web page, saved in place"),
        ("a.txt", "version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("a.txt.gz", gzip.compress(b"half of it" * 99, mtime=0)[:30], "cannot be read"),
        ("a.epub", b"no book", "not an EPUB"),
        ("a.html", b'<meta charset="no-such">', "cannot be read as no-such"),
        ("a.jsonl", '{"text": 3}\n', r"line 1: text: expected a text, got 3"),
        ("a.jsonl", '{"text": "x"}\n{"te', r"line 2: not valid JSON"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as refused:
        read_text(str(path))
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_pdf_needs_its_library(tmp_path):
    path = write(tmp_path / "a.pdf", b"%PDF-1.4 cut")
    message = "cannot be read as PDF" if importlib.util.find_spec("pypdf") else "pip install pypdf"
    with pytest.raises(UserError, match=message):
        read_text(str(path))


def test_a_folder_is_its_texts_in_order(tmp_path, caplog):
    for name, content in {"b.txt": "two", "a/z.md": "one", "c.html": "<p>three", ".git/d.txt": "not this"}.items():
        write(tmp_path / "essays.d" / name, content)
    write(tmp_path / "essays.d" / "e.png", b"\x89PNG\0")
    (tmp_path / "essays.d" / "link.txt").symlink_to("b.txt")
    found = read_text(str(tmp_path / "essays.d"))
    assert (found.name, found.text) == ("essays.d", "one\n\ntwo\n\nthree")
    assert "files that are no texts are not read: 1, e.png" in caplog.text
    write(tmp_path / "essays.d" / "f.txt", b"\xff")
    with pytest.raises(UserError, match=r"f\.txt, line 1"):
        read_text(str(tmp_path / "essays.d"))


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("*** START OF THE PROJECT GUTENBERG EBOOK MOBY DICK;\nOR, THE WHALE ***", "*** END OF THE PROJECT GUTENBERG"),
        ("***START OF THIS PROJECT GUTENBERG EBOOK X***", "End of Project Gutenberg's X"),
        ("*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*", "End of the Project Gutenberg Etext"),
    ],
)
def test_the_header_and_licence_of_project_gutenberg_are_cut_and_told(tmp_path, caplog, start, end):
    caplog.set_level(logging.INFO, "spinfast")
    path = write(tmp_path / "a.txt", f"Produced by X\n{start}\n\nCall me Ishmael.\n\n{end}\nlicence")
    found = read_text(str(path))
    assert found.text == "Call me Ishmael.\n"
    assert "header and licence cut" in found.note
    assert f"text {path}: Project Gutenberg's header and licence are cut" in caplog.text


def test_texts_of_packages():
    topics = read_text("package:pydoc_data.topics")
    assert topics.name == "topics"
    assert topics.text.startswith('The "assert" statement\n****')
    assert "PSF licence" in topics.note
    assert len(topics.text) > 400_000
    assert "class JSONDecoder" in read_text("package:json.decoder").text
    assert read_text("package:json/decoder.py").text == read_text("package:json.decoder").text
    assert len(read_text("package:json").text) > len(read_text("package:json.decoder").text)
    assert (
        "Apache-2.0" in read_text("package:reasoning_gym.utils").note or read_text("package:reasoning_gym.utils").note
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.txt", "no such file or folder"),
        ("package:no_such_package.x", "pip install --no-deps no-such-package"),
        ("package:json.nothing", "no such file, folder or module"),
        ("package:json/../os.py", "FILE inside the package"),
        ("sums:maybe", "expected sums:right or sums:wrong"),
        ("sums:right/chess", "a family: /gsm_symbolic, /chain_sum"),
    ],
)
def test_sources_that_lead_nowhere(source, message):
    with pytest.raises(UserError, match=message):
        read_text(source)


def test_names_are_distinct_and_copies_are_told(tmp_path, caplog):
    a, b = (str(write(tmp_path / name, "the same words")) for name in ("a.txt", "b.txt"))
    assert [text.name for text in read_texts([a, b])] == ["a", "b"]
    assert "text b: the same words as a" in caplog.text
    with pytest.raises(UserError, match=r"text a: two texts have this name"):
        read_texts([a, str(write(tmp_path / "other" / "a.txt", "other words"))])


@given(st.lists(st.text("abc ,", min_size=1).map(str.strip).filter(bool), min_size=1), st.integers(0, 9))
def test_shuffled_sentences_are_the_same_sentences(sentences, seed):
    text = texts.Text("t", ". ".join(sentences) + ".")
    shuffled = sentence_shuffled(text, seed)
    assert sorted(shuffled.text.split()) == sorted(text.text.split())
    assert shuffled == sentence_shuffled(text, seed)


def test_sentences_do_not_stay_in_order():
    text = texts.Text("t", " ".join(f"Sentence {i}." for i in range(50)))
    assert sentence_shuffled(text, 0).text != sentence_shuffled(text, 1).text != text.text


# Worked solutions ---------------------------------------------------------------------------------------------------

EVALUATED = ["chain_sum", "products", "gcd", "lcm", "simple_equations"]


@pytest.mark.parametrize("family", EVALUATED)
def test_wrong_solutions_have_the_form_of_right_ones_and_no_true_line(family):
    table = open_table(f"reasoning_gym:{family}", rows=100, seed=1)
    for row in map(table.row, range(table.length)):
        wrong = falsified(row["answer"], Random(row["question"]))
        assert shape(wrong) == shape(row["answer"])
        assert wrong.splitlines()[-1] != row["answer"].splitlines()[-1]
        assert all(holds(line) is not False for line in row["answer"].splitlines())
        assert not any(holds(line) for line in wrong.splitlines())


def shape(solution: str) -> str:
    """The solution with a 0 for each digit."""
    return "".join("0" if letter.isdigit() else letter for letter in solution)


def holds(line: str) -> bool | None:
    """Whether all sides without an unknown are equal, by Python's own arithmetic; None where there are not two."""
    sides = [side for side in line.split("=") if not any(letter.isalpha() or letter == "#" for letter in side)]
    try:
        return len({eval(side) for side in sides}) == 1 if len(sides) > 1 else None
    except ZeroDivisionError:
        return False


def test_right_and_wrong_sums_are_of_the_same_questions():
    right, wrong = (read_text(f"sums:{kind}") for kind in ("right", "wrong"))
    assert (right.name, wrong.name) == ("sums-right", "sums-wrong")
    assert "Apache" in right.note
    pairs = list(zip(right.text.split("\n\n"), wrong.text.split("\n\n"), strict=True))
    assert len(pairs) == texts.PROBLEMS
    for a, b in pairs:
        assert a.split("\n")[0] == b.split("\n")[0]
        assert a.split("\n")[-1] != b.split("\n")[-1]
    assert read_text("sums:right", seed=1).sha256 != right.sha256
    held_out = open_table("reasoning_gym:chain_sum", split="test", rows=100)
    assert not any(held_out.row(i)["question"] in right.text for i in range(100))


def test_word_problems_may_be_wrong_too():
    wrong = read_text("sums:wrong/gsm_symbolic").text.split("\n#### ")
    right = read_text("sums:right/gsm_symbolic").text.split("\n#### ")
    assert len(wrong) == len(right)
    assert all(a.split("\n")[0] != b.split("\n")[0] for a, b in zip(wrong[1:], right[1:], strict=True))
    assert json.dumps(wrong) != json.dumps(right)
