"""Which image files lie below a folder."""

import os
from collections.abc import Iterator

from clsa.errors import ClsaError, Exit

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def walk(root: str) -> Iterator[str]:
    """Relative paths of the image files below `root`, in the byte order of their names.

    Hidden names, links to folders (loops, ways out) and anything but regular files are passed over.
    """
    pending = [("", True)]
    while pending:
        relative, is_folder = pending.pop()
        if not is_folder:
            yield relative
            continue
        try:
            with os.scandir(os.path.join(root, relative)) as entries:
                found = sorted(entries, key=lambda entry: os.fsencode(entry.name), reverse=True)
        except OSError as error:
            path, why = os.path.join(root, relative), error.strerror or str(error)
            raise ClsaError(path, why, "make it readable or move it out", Exit.NO_INPUT) from None
        for entry in found:
            is_folder = entry.is_dir(follow_symlinks=False)
            is_image = entry.name.lower().endswith(SUFFIXES) and _is_file(entry)
            if not entry.name.startswith(".") and (is_folder or is_image):
                pending.append((os.path.join(relative, entry.name), is_folder))


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself
        return False
