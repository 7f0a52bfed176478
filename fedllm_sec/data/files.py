"""Files of tables (CSV, JSON, JSON lines, Parquet): read as they are written, or refused with row and way out."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import re
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedllm_sec.data.jsonrows import read_json
from fedllm_sec.data.signs import BEGIN, refuse_other_kinds
from fedllm_sec.data.tables import Table, of_arrow, of_dataset, refuse_twice
from fedllm_sec.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PACKED = ".gz"
GZIP = b"\x1f\x8b"  # how its bytes begin
SEPARATORS = ",;\t|"
LOOKED_AT = 50  # records in which the separator must show
SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.parquet")
UTF7 = re.compile(r"\+A[MNOP][AEIMQUYcgkosw048](?![A-Za-z0-9+/])-?")  # one accented letter in UTF-7
LONGEST = 2**31 - 1  # characters of a cell
MARKS = {  # byte-order marks; those of UTF-32 begin with those of UTF-16
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def ending(path: Path) -> str | None:
    """The known ending of a file's name, without .gz; None where it is not one."""
    kinds = [suffix.lower() for suffix in path.suffixes]
    if kinds and kinds[-1] == PACKED:
        kinds.pop()
    return kinds[-1] if kinds and kinds[-1] in ENDINGS else None


def read_file(path: Path, encoding: str | None = None) -> Table:
    """The table of a file, or of a folder that `datasets` saved; text is UTF-8 unless a byte-order mark or `encoding`
    says otherwise.
    """
    if path.is_dir():
        return read_saved(path)
    kind, place = ending(path), str(path)
    if kind is None:
        raise DataError(
            f'data: {place} has the ending "{path.suffix}"; can read {", ".join(ENDINGS)}, text also with .gz behind '
            "it. Save it as one of these."
        )
    try:
        if kind == ".parquet":
            if encoding is not None:
                raise DataError(f"data.encoding: {encoding}: is for text files; {place} is Parquet. Remove it.")
            return read_parquet(path)
        text = decoded(path.read_bytes(), encoding, place)
    except OSError as error:
        raise DataError(f"data: {place} cannot be read ({error.strerror or error}).") from error
    if not text.strip():
        raise DataError(f"data: {place} is empty: zero rows.")
    if kind in (".csv", ".tsv"):
        table = read_csv(text, place, "\t" if kind == ".tsv" else None)
    else:
        table = read_json(text, place)
    if encoding is not None and table.size == 0:
        raise DataError(
            f"data.encoding: {encoding}: read as this, {place} has zero rows, and begins with {text[:20]!r}. It is not "
            "what the file was written in, or the file is empty. Set another, or remove it for UTF-8."
        )
    return table


def decoded(content: bytes, encoding: str | None, place: str) -> str:
    """The text of a file's bytes, unpacked where they are gzip's, without a byte-order mark."""
    if content.startswith(GZIP):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"data: {place} cannot be unpacked by gzip ({error}). Is it whole? Copy it again."
            ) from error
        if content.startswith(GZIP):
            raise DataError(f"data: {place} is packed by gzip, and what is in it once more. Unpack it once: gunzip.")
    refuse_other_kinds(content, place)
    found = encoding or next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(found).lstrip("\ufeff")  # some tools write a second mark behind the first
        if encoding is not None:
            _refuse_utf8(content, text, encoding, place)
        elif text.isascii() and (letters := UTF7.findall(text)):
            warnings.warn(
                f"data: {place}: holds {letters[0]!r}, as UTF-7 does. If it is that, set data.encoding: utf-7.",
                stacklevel=2,
            )
        return text
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        way_out = (
            ". Set data.encoding to what it was written in, e.g. cp1252 (Windows, western Europe), latin-1 or utf-16, "
            "or save it as UTF-8."
        )
        with contextlib.suppress(UnicodeDecodeError):
            if encoding is not None and content.decode():
                way_out = ", and the file is UTF-8. Remove data.encoding."
        said = f"data: {place}, line {line}: byte 0x{content[error.start]:02x} is not {found} text"
        raise DataError(said + way_out) from None
    except DataError:
        raise
    except (LookupError, ValueError):  # no such encoding, or one that does not lead to text
        raise DataError(
            f"data.encoding: {encoding!r}: there is no such text encoding. Known: utf-8, cp1252, ..."
        ) from None


def _refuse_utf8(content: bytes, text: str, encoding: str, place: str) -> None:
    """An error where bytes that are UTF-8 become other text by `encoding`; a warning where that may be meant."""
    try:
        plain = content.decode().lstrip("\ufeff")
    except UnicodeDecodeError:
        return
    if plain == text or "\0" in plain:
        return
    if "abc".encode(encoding) != b"abc":  # UTF-16, EBCDIC, ...: no byte of it is chosen by UTF-8's rules
        raise DataError(
            f"data.encoding: {encoding}: {place} is UTF-8 text and begins with {plain[:20]!r}; read as {encoding}, it "
            f"would begin with {text[:10]!r}. Remove data.encoding."
        )
    if not plain.isascii():
        at = next(i for i, mark in enumerate(plain) if not mark.isascii())
        warnings.warn(
            f"data.encoding: {encoding}: {place} is UTF-8 text too, in which {plain[at]!r} is read as "
            f"{text[at : at + 2]!r}. Remove data.encoding if that is not what was written.",
            stacklevel=2,
        )


def read_csv(text: str, place: str, separator: str | None = None) -> Table:
    """A table with a head. Every row has a cell for each column; blank lines are left out."""
    start = 0
    if separator is None and (said := re.match(r"sep=(.)\r?\n", text)):  # how spreadsheets say it
        separator, start = said[1], said.end()
    limit = csv.field_size_limit(LONGEST)
    try:
        found = separator or _separator(text[start:])
        head = next(_records(text[start:], found, place))[1]
        if "\0" in "".join(head):
            raise DataError(f"data: {place}: its head holds NUL characters. Is it UTF-16? Set data.encoding: utf-16.")
        # "text, response": the blank belongs to the separator
        spaced = len(head) > 1 and found != "\t" and all(name.startswith(" ") for name in head[1:])
        rows = list(_filled(text[start:], found, place, spaced))
    finally:
        csv.field_size_limit(limit)
    head = rows.pop(0)
    names = [name.strip() for name in head]
    notes = []
    if separator is None and found != "," and len(head) > 1:
        notes.append(f"columns are separated by {found!r}")
    if spaced:
        notes.append(f"blanks behind {found!r} are left out")
    if any(name != stripped for name, stripped in zip(head, names, strict=True)):
        notes.append("blanks around column names are left out")
    if notes:
        warnings.warn(f"data: {place}: {', '.join(notes)}.", stacklevel=2)
    known = [name for name in names if name]  # a column without a name is one of row numbers, or nothing
    refuse_twice(known, place)
    at = {name: names.index(name) for name in known}
    return Table(place, tuple(known), len(rows), lambda name: [row[at[name]] for row in rows])


def _records(text: str, separator: str, place: str, spaced: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each record; one whose cells are all blank counts as a blank line."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=spaced, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            reason = f'a quoted cell is not as CSV writes it ({error}). A quote inside one is doubled: ""'
            if "end of data" in str(error):
                reason = "a quote is opened and never closed"
            raise DataError(f"data: {place}, line {line}: {reason}.") from None
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield line, cells


def _filled(text: str, separator: str, place: str, spaced: bool) -> Iterator[list[str]]:
    """The records, of which each must be as long as the first."""
    width = 0
    for row, (line, cells) in enumerate(_records(text, separator, place, spaced)):
        width = width or len(cells)
        if len(cells) != width:
            raise DataError(
                f"data: {place}, row {row} (line {line}) has {len(cells)} cells, the head has {width}. Correct it: a "
                f"cell that holds {separator!r} stands in quotes."
            )
        if "\0" in "".join(cells):
            raise DataError(
                f"data: {place}, row {row} (line {line}) holds a NUL character, which no text has. Remove it, or set "
                "data.encoding to what the file was written in."
            )
        yield cells


def _separator(text: str) -> str:
    """Of those that cut the head at all, the one that most rows agree on, then the one that makes the most columns."""

    def agreement(separator: str) -> tuple[bool, int, int]:
        widths = []
        with contextlib.suppress(DataError):  # said when the table is read
            for (_, cells), _ in zip(_records(text, separator, ""), range(LOOKED_AT), strict=False):
                widths.append(len(cells))
        width = widths[0] if widths else 0
        return width > 1, widths.count(width), width

    return max(SEPARATORS, key=agreement)


def read_saved(folder: Path) -> Table:
    """A set that `Dataset.save_to_disk` wrote."""
    from datasets import load_from_disk

    try:
        return of_dataset(load_from_disk(str(folder)), str(folder))
    except DataError:
        raise
    except Exception as error:  # a folder that is damaged fails in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"data: {folder} cannot be read as saved by datasets ({reason}). Save it anew.") from error


def shards(path: Path) -> list[Path]:
    """The file, or all parts of the set where it is one of several: train-00000-of-00003.parquet."""
    found = SHARD.fullmatch(path.name)
    if found is None:
        return [path]
    parts = [path.with_name(f"{found[1]}-{k:05}-of-{found[2]}.parquet") for k in range(int(found[2]))]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise DataError(f"data: {path.parent}: {len(missing)} of {len(parts)} parts are missing, first {missing[0]}.")
    return parts


def _part(path: Path) -> pa.Table:
    """One Parquet file as it lies."""
    import pyarrow as pa
    from pyarrow import parquet

    with path.open("rb") as file:
        begin = file.read(BEGIN)
    refuse_other_kinds(begin, str(path), parquet=True)
    try:
        return parquet.ParquetFile(path).read()
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        way_out = "Copy it again."
        if begin.startswith(b"PARE") or "crypt" in reason:
            reason, way_out = "it is encrypted", "Decrypt it first."
        elif begin.startswith(GZIP):
            reason, way_out = "it is packed by gzip", "Unpack it: gunzip."
        elif not begin.startswith(b"PAR1"):
            reason, way_out = "it does not begin as one", "Save it as Parquet, or give it the ending of what it is."
        raise DataError(f"data: {path} cannot be read as parquet ({reason}). {way_out}") from error


def read_parquet(path: Path) -> Table:
    """A Parquet file, with its other parts; class labels that `datasets` has written keep their names."""
    import pyarrow as pa

    parts = {part: _part(part) for part in shards(path)}
    first, *_ = parts.values()
    for part, read in parts.items():
        if unlike := {field.name for field in {*first.schema} ^ {*read.schema}}:
            raise DataError(
                f"data: {part} has other columns than {path.name}, or columns of another type: "
                f"{', '.join(sorted(unlike))}. Write all parts with the same ones."
            )
    table = pa.concat_tables(read.select(first.column_names) for read in parts.values())
    try:
        features = json.loads((table.schema.metadata or {})[b"huggingface"])["info"]["features"]
        classes = {name: f["names"] for name, f in features.items() if f.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):
        classes = {}
    return of_arrow(table, classes, str(path))
