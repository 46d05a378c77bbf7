"""List files: the path of a picture and, where known, the name of its class on each line.

A list is plain text (`PATH`, `PATH LABEL`, or with a tab, comma or semicolon between them) or a
table (CSV or TSV) whose first line names its columns. Paths are relative to the list's folder.
"""

import codecs
import csv
import re
from pathlib import Path

from clsa.pictures.listing import SUFFIXES
from clsa.system.errors import ClsaError, Exit

LISTS = (".txt", ".csv", ".tsv", ".lst")
PATH_COLUMNS = (
    *("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path"),
    *("image_file", "img", "img_path", "picture", "name"),
)
LABEL_COLUMNS = ("label", "class", "class_name", "category", "target", "labels", "y")

_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_ENDINGS = "|".join(re.escape(suffix) for suffix in SUFFIXES)
_BOTH = re.compile(rf"(.*?(?:{_ENDINGS}))(?:\s*[,;\t]\s*|\s+)(.*)", re.IGNORECASE)


def read_list(path: Path) -> tuple[list[str], list[str]]:
    """The paths of the pictures in a list file, and the label of each (empty if it has none).

    Raises:
        ClsaError: 66 if it cannot be read, 2 if it is no text or has columns of unknown meaning.
    """
    text = read_text(path)
    if "\0" in text:
        raise ClsaError(str(path), "holds a zero byte, so it is not text", "give one path per line")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    separator = next((mark for mark in "\t,;" if lines and mark in lines[0]), ",")
    head = [name.strip(' "').lower() for name in lines[0].split(separator)] if lines else []
    if any(name in PATH_COLUMNS for name in head):
        return _table(path, lines, head, separator)
    columns = len(next(csv.reader(lines[:1]), ()))
    if path.suffix.lower() == ".csv" and columns > 2:
        why = f"has {columns} columns and no first line that names them"
        raise ClsaError(str(path), why, "put a line such as path,label first")
    pairs = [_pair(line) for line in lines]
    return [name for name, _ in pairs], [label for _, label in pairs]


def class_order(names: set[str]) -> list[str]:
    """The classes among `names` in the order of their numbers.

    By value if all are whole numbers (then by text: `01`, `1`; negative numbers mean unknown and
    are left out), else by bytes.
    """
    if all(name.removeprefix("-").isdecimal() for name in names):
        return sorted((n for n in names if int(n) >= 0), key=lambda name: (int(name), name))
    return sorted(names, key=lambda name: name.encode(errors="surrogateescape"))


def read_text(path: Path) -> str:
    """The text of a file: UTF-8, or as its byte order mark says; the mark is left out.

    Raises:
        ClsaError: 66 if it cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        why = error.strerror or str(error)
        raise ClsaError(str(path), why, "check the path", Exit.NO_INPUT) from None
    for mark, encoding in _MARKS.items():
        if content.startswith(mark):
            text = content[len(mark) :].decode(encoding, errors="replace")
            break
    else:
        text = content.decode(errors="surrogateescape")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _pair(line: str) -> tuple[str, str]:
    """A line as path and label.

    A line that ends like a picture is a path; else the first picture ending before a separator
    ends the path, so that labels may have spaces; else the last tab or space separates.
    """
    if line.startswith('"'):
        name, label = [*next(csv.reader([line])), ""][:2]
    elif line.count("\t") == 1:
        name, label = line.split("\t")
    elif line.lower().endswith(SUFFIXES):
        name, label = line, ""
    elif both := _BOTH.fullmatch(line):
        name, label = both.groups()
    else:
        name, _, label = line.rpartition("\t" if "\t" in line else " ")
        name, label = (name, label) if name else (label, "")
    return name.strip(), label.strip()


def _table(
    path: Path, lines: list[str], head: list[str], separator: str
) -> tuple[list[str], list[str]]:
    """The columns of paths and labels below a line of column names."""
    at = next(k for k, name in enumerate(head) if name in PATH_COLUMNS)
    labelled = next((k for k, name in enumerate(head) if name in LABEL_COLUMNS), None)
    rows = list(csv.reader(lines[1:], delimiter=separator))
    short = next((k for k, row in enumerate(rows) if len(row) != len(head)), None)
    if short is not None:
        why = f"has {len(rows[short])} columns, the first line names {len(head)}"
        raise ClsaError(f"{path}: line {short + 2}", why, "put text with commas in double quotes")
    labels = ["" if labelled is None else row[labelled].strip() for row in rows]
    return [row[at].strip() for row in rows], labels
