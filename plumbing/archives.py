"""Files in folders, archives and .npz, read within bounds.

A small file may expand to any number of bytes. What it claims is looked at before it is expanded,
and no more than that is expanded. Nothing is written, nothing is unpickled.
"""
import contextlib
import functools
import io
import math
import tarfile
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Callable

import numpy as np
from PIL import Image, UnidentifiedImageError

FILE_LIMIT = 2 ** 26                # bytes of an image file, or of a list of labels
MAX_PIXELS = 2 ** 26                # of one image
SET_LIMIT = 2 ** 34                 # bytes of a set's pixels, or of all that a .tar holds
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")    # Pillow reads more, EPS by running a program


@dataclass
class Member:
    name: str                       # its path in the set, with /
    size: int                       # bytes that it claims to have
    open: Callable                  # -> a binary file

    def read(self):
        """Its bytes. Raises ValueError if they are more than FILE_LIMIT."""
        if self.size > FILE_LIMIT:
            raise ValueError(f"{self.size:,} bytes, more than {FILE_LIMIT:,}")
        with self.open() as f:
            return f.read(self.size)

    def open_image(self):
        """-> Pillow's image, of which only the header has been decoded. Raises ValueError if it has
        more than MAX_PIXELS pixels, or more than 8 bits a channel."""
        try:
            with warnings.catch_warnings():             # of large images, which are refused below
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(io.BytesIO(self.read()), formats=FORMATS)
        except UnidentifiedImageError as e:             # its message is an address in memory
            raise ValueError(f"none of {', '.join(FORMATS)}") from e
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
        if image.mode[0] in "IF":                       # their conversion to RGB would clip
            raise ValueError("more than 8 bits a channel")
        return image

    def read_array(self, limit):
        """An .npy's array of integers. Raises ValueError if it has more than `limit` bytes, or if
        the file has another number of bytes than its header claims."""
        with self.open() as f:
            if np.lib.format.read_magic(f) != (1, 0):
                raise ValueError(f"{self.name} is no .npy of version 1.0")
            try:
                shape, _, dtype = np.lib.format.read_array_header_1_0(f)
            except (ValueError, SyntaxError) as e:      # its message is an address in memory
                raise ValueError(f"{self.name} has no header of an .npy") from e
            claimed, held = math.prod(shape) * dtype.itemsize, self.size - f.tell()
            if dtype.kind not in "iu":
                raise ValueError(f"{self.name} is {dtype} {shape}, not integers")
            if claimed != held or claimed > limit:
                raise ValueError(f"{self.name} claims {claimed:,} bytes and has {held:,}, "
                                 f"of at most {limit:,}")
            f.seek(0)
            return np.lib.format.read_array(f, allow_pickle=False)


@contextlib.contextmanager
def members(path):
    """Yield the list of the files in a folder, .zip, .npz or .tar; an .npy is one itself."""
    if path.is_dir():
        yield [_member(p.relative_to(path).as_posix(), p.stat().st_size, open, p, "rb")
               for p in sorted(path.rglob("*")) if p.is_file()]
    elif path.suffix.lower() == ".npy":
        yield [_member(path.name, path.stat().st_size, open, path, "rb")]
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as z:
            yield [_member(m.filename, m.file_size, _open_zipped, z, m)
                   for m in z.infolist() if not m.is_dir()]
    else:
        try:
            tar = tarfile.open(path, tarinfo=_Header)
        except tarfile.ReadError as e:          # its own message has a line for each compression
            raise ValueError("no folder, .zip, .tar, .npy or .npz") from e
        with tar:
            yield [_member(m.name, m.size, tar.extractfile, m) for m in _all(tar) if m.isfile()]


def _member(name, size, function, *args):
    return Member(PurePosixPath(name).as_posix(), size, functools.partial(function, *args))


def _open_zipped(z, m):
    """Other methods than these two expand all that they are given at once, whatever m claims."""
    if m.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{m.filename} is compressed by another method than deflate")
    return z.open(m)


class _Header(tarfile.TarInfo):
    """A header of a .tar. tarfile reads what follows the special ones (long names) at once."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or header.size > FILE_LIMIT and not header.isfile():
            raise ValueError(f"a header claims {header.size:,} bytes")
        return header


def _all(tar):
    """The members, while all together may be expanded: whoever skips one expands it."""
    total = 0
    for m in tar:
        total += m.size
        if m.size < 0 or total > SET_LIMIT:
            raise ValueError(f"it claims to hold more than {SET_LIMIT:,} bytes")
        yield m
