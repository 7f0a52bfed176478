"""What a file is by its first bytes, whatever its name says: files that hold no text are named, not read as text."""

from __future__ import annotations

from fedllm_sec.errors import DataError
from fedllm_sec.recipe.modelfolder import POINTER

BEGIN = 512  # bytes of a file that are enough to tell
POINTS = (POINTER, b"/annex/objects/", b"../.git/annex/objects/")
SIGNS: tuple[tuple[bytes, str], ...] = (  # how a file begins, and what is said of it
    (b"PK\x03\x04", "is a zip archive, as workbooks (.xlsx) are. Save the sheet as CSV in UTF-8, or unpack it."),
    (b"\xd0\xcf\x11\xe0", "is a document of an older Office (.xls). Save the sheet as CSV in UTF-8."),
    (b"PAR1", "is a Parquet file. Rename it to .parquet."),
    (b"ARROW1", "is an Arrow file. Save it as Parquet (.parquet)."),
    (b"BZh", "is packed by bzip2. Unpack it; only gzip is read."),
    (b"\xfd7zXZ\0", "is packed by xz. Unpack it; only gzip is read."),
    (b"\x28\xb5\x2f\xfd", "is packed by zstd. Unpack it; only gzip is read."),
    (b"7z\xbc\xaf\x27\x1c", "is packed by 7-Zip. Unpack it."),
    (b"%PDF", "is a PDF. Save its text or its table."),
    (b"SQLite format 3\0", "is a SQLite database. Save the table as CSV."),
    (b"\x80\x04", "is a pickle, which is code and never read. Save the table as CSV or Parquet."),
    (b"\x80\x05", "is a pickle, which is code and never read. Save the table as CSV or Parquet."),
)
TAR, TAR_AT = b"ustar", 257
PAGES = (b"<!doctype html", b"<html")


def refuse_other_kinds(content: bytes, place: str, parquet: bool = False) -> None:
    """An error that says what a file is, where it begins as no table and no text does."""
    refuse_stand_ins(content, place)
    said = next((said for sign, said in SIGNS if content.startswith(sign)), None)
    if content[TAR_AT:].startswith(TAR):
        said = "is a tar archive. Unpack it and name the file in it."
    if said is not None and not (parquet and content.startswith(b"PAR1")):
        raise DataError(f"data: {place}: {said}")


def refuse_stand_ins(content: bytes, place: str) -> None:
    """An error where what was downloaded is not the file, but what stands for it."""
    if content.startswith(POINTS):
        raise DataError(
            f"data: {place}: is a pointer to the file, which Git has not fetched. Run `git lfs pull` (or `git annex "
            "get`) in its folder."
        )
    if content[:BEGIN].lstrip().lower().startswith(PAGES):
        raise DataError(f"data: {place}: is a web page, perhaps the one that shows the file. Download the file itself.")
