"""One file -> its plain text: text files of any kind, HTML, EPUB, PDF, tables with a column of texts; plain or packed.

The suffix says what a file is; whatever has no suffix of its own kind is plain text, if it decodes.
"""

from __future__ import annotations

import importlib.util
import io
import posixpath
import re
import zipfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pyarrow as pa

from spinfast.data.conversations import RowError
from spinfast.data.readers import FOREIGN, one_line, unpacked
from spinfast.data.sources import open_table
from spinfast.errors import UserError
from spinfast.names import FILE_SUFFIXES, PACKED_SUFFIXES, suffix_of

DICTZIP = ".dz"  # gzip with a table of its pieces
PARAGRAPHS = {"p", "pre", "blockquote", "ul", "ol", "dl", "table", "section", "article", "h1", "h2", "h3", "h4", "h5"}
LINES = {"div", "li", "tr", "br", "dt", "dd", "h6", "hr", "figcaption", "header", "footer", "aside", "nav"}
UNSEEN = {"script", "style", "title", "template", "svg"}


def read_document(path: Path, column: str = "text") -> str:
    """The file's text; of a table the texts of `column`, a blank line between them.

    Raises UserError, in one line, for a file that cannot be read, is binary or not UTF-8, or has no such column.
    """
    if suffix_of(path) in FILE_SUFFIXES:
        return "\n\n".join(_column(path, column))
    packed = path.suffix.lower() in (*PACKED_SUFFIXES, DICTZIP)
    suffix = Path(path.stem if packed else path.name).suffix.lower()
    try:
        with unpacked(path)() as file:
            data = file.read()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"text {path}: cannot be read: {one_line(error)}") from None
    return KINDS.get(suffix, plain)(data, str(path))


def plain(data: bytes, where: str) -> str:
    """UTF-8 bytes as text, lines ended by a line feed."""
    for beginning, what in FOREIGN:
        if re.match(beginning, data[:4096]):
            raise UserError(f"text {where}: this file is {what}")
    if b"\0" in data:
        raise UserError(f"text {where}: binary, it has a null byte at {data.index(0)}; expected text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"text {where}, line {line}: neither UTF-8 nor text (byte {data[error.start]:#04x}); if it is a text, "
            "convert it: iconv -f latin1 -t utf-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


# -- HTML -----------------------------------------------------------------------------------------------------------


class _Html(HTMLParser):
    """What a page shows: block elements on lines of their own, white space as a browser has it."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts = ["\n"]
        self.unseen: str | None = None  # the element open now whose text is not shown
        self.preformatted = 0

    def handle_starttag(self, tag, attrs):
        if self.unseen is None and tag in UNSEEN:
            self.unseen = tag
        self.preformatted += tag == "pre"
        self._break(tag)

    def handle_endtag(self, tag):
        if tag == self.unseen:
            self.unseen = None
        self.preformatted -= tag == "pre" and self.preformatted > 0
        self._break(tag)

    def handle_data(self, data):
        if self.unseen is None:
            shown = data if self.preformatted else re.sub(r"[ \t\r\n\f]+", " ", data)
            behind = not self.preformatted and self.parts[-1][-1] in "\n "
            if shown := shown.lstrip(" ") if behind else shown:
                self.parts.append(shown)

    def _break(self, tag: str) -> None:
        if tag in PARAGRAPHS or tag in LINES:
            self.parts.append("\n\n" if tag in PARAGRAPHS else "\n")
        elif tag in ("td", "th") and self.parts[-1][-1] not in "\n ":
            self.parts.append(" ")


def html(data: bytes, where: str) -> str:
    """A page's text. Its charset is UTF-8 or what its head names."""
    named = re.search(rb"""(?:charset|encoding)\s*=\s*["']?([\w-]+)""", data[:2048])
    charset = named[1].decode() if named else "utf-8"
    try:
        page = data.decode("utf-8-sig" if charset.lower() in ("utf-8", "utf8") else charset)
    except (UnicodeDecodeError, LookupError) as error:
        raise UserError(f"text {where}: cannot be read as {charset}: {one_line(error)}") from None
    parser = _Html()
    parser.feed(page)
    parser.close()
    lines = "\n".join(line.rstrip() for line in "".join(parser.parts).replace("\xa0", " ").split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip("\n")


# -- EPUB and PDF ---------------------------------------------------------------------------------------------------


def epub(data: bytes, where: str) -> str:
    """The chapters in the order of the book's spine (EPUB 3.3), those beside the main line left out."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as book:
            return "\n\n".join([html(book.read(name), f"{where}, {name}") for name in _spine(book)])
    except (zipfile.BadZipFile, KeyError, IndexError, ElementTree.ParseError, RuntimeError) as error:
        raise UserError(f"text {where}: not an EPUB that can be read: {one_line(error)}") from None


def _spine(book: zipfile.ZipFile) -> Iterator[str]:
    container = ElementTree.fromstring(book.read("META-INF/container.xml"))
    package = container.findall(".//{*}rootfile")[0].attrib["full-path"]
    tree = ElementTree.fromstring(book.read(package))
    paths = {item.attrib["id"]: item.attrib["href"] for item in tree.iterfind(".//{*}manifest/{*}item")}
    for item in tree.iterfind(".//{*}spine/{*}itemref"):
        if item.get("linear") != "no":
            yield posixpath.normpath(posixpath.join(posixpath.dirname(package), unquote(paths[item.attrib["idref"]])))


def pdf(data: bytes, where: str) -> str:
    """The pages' texts, by pypdf."""
    if importlib.util.find_spec("pypdf") is None:
        raise UserError(f"text {where}: reading a PDF needs the package: pip install pypdf")
    import pypdf

    try:
        return "\n\n".join(page.extract_text() for page in pypdf.PdfReader(io.BytesIO(data)).pages)
    except Exception as error:  # the parser raises whatever it meets in a damaged file
        raise UserError(f"text {where}: cannot be read as PDF: {one_line(error)}") from None


KINDS = {".html": html, ".htm": html, ".xhtml": html, ".epub": epub, ".pdf": pdf}


# -- tables ---------------------------------------------------------------------------------------------------------


def _column(path: Path, column: str) -> Iterator[str]:
    table = open_table(str(path))
    if column not in table.columns:
        raise UserError(f"text {path}: no column {column!r}; columns are {', '.join(table.columns)}")
    for i in range(table.length):
        try:
            value = table.row(i).get(column)
        except RowError as error:
            raise UserError(f"{table.where(i)}: {error}") from None
        if not isinstance(value, str):
            raise UserError(f"{table.where(i)}: {column}: expected a text, got {value!r:.60}")
        yield value
