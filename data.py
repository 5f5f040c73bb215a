"""Files in: checked downloads, and any set of images as one uint8 tensor. Nothing is unpickled.

    images, labels = load_images("cifar10")             # the official binary archive, downloaded
    images, labels = load_images("photos.zip")          # or a folder, .tar(.gz, .xz), .npy, .npz

Downloads are kept in ~/.cache/di-bregman, or where $DI_BREGMAN_CACHE says; a file put there by
hand, under its own name, is used as if it had been downloaded.
"""
import argparse
import contextlib
import ctypes
import hashlib
import io
import json
import os
import re
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

CIFAR10 = ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
           "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path beside `path` and rename it to `path` when all went well, so that
    whoever looks sees the old file or the new one; on any error the old one stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, tmp = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(fd)
    try:
        os.chmod(tmp, 0o644)
        yield Path(tmp)
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())                # on disk before it takes the old file's name
        os.replace(tmp, path)
    finally:
        Path(tmp).unlink(missing_ok=True)


def save_atomic(obj, path):
    """torch.save through atomic(). Raises OSError where it can't be written: a full disk, say."""
    with atomic(path) as tmp:
        try:
            torch.save(obj, tmp)
        except RuntimeError as e:               # torch's zip writer reports a full disk this way
            raise OSError(f"could not write {path}: {str(e).splitlines()[0]}") from e


@contextlib.contextmanager
def reading(path, what):
    """Turn whatever a broken file makes its reader raise into a ValueError that names the file."""
    try:
        yield
    except Exception as e:
        if isinstance(e, OSError) and e.filename:       # says itself which file and why
            raise
        banned = re.search(r"GLOBAL (\S+)", str(e))     # torch's weights_only, in several lines
        reason = f"refused to load {banned[1]}" if banned else str(e) or repr(e)
        raise ValueError(f"{path}: not {what}: {reason}") from e


def download(url, sha256=None):
    """-> Path of the file at `url` in the cache, fetched once with a progress bar.

    sha256: hexadecimal, None where the publisher's is not known. Raises ValueError if the file
    has another sha256 (a fresh download is deleted), OSError without a network: both name
    the place to put the file by hand.
    """
    cache = Path(os.environ.get("DI_BREGMAN_CACHE") or "~/.cache/di-bregman").expanduser()
    path = cache / url.rsplit("/", 1)[1]
    if path.exists():
        with open(path, "rb") as f:
            got = hashlib.file_digest(f, "sha256").hexdigest()
        if sha256 and got != sha256:
            raise ValueError(f"{path}: sha256 is {got}, expected {sha256}; delete it to try again")
        return path
    with atomic(path) as tmp:
        digest = hashlib.sha256()
        try:
            with urllib.request.urlopen(url, timeout=60) as answer, open(tmp, "wb") as out:
                size = int(answer.headers.get("Content-Length") or 0) or None
                bar = tqdm(total=size, unit="B", unit_scale=True, desc=path.name)
                while chunk := answer.read(1 << 20):
                    out.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
                bar.close()
        except OSError as e:                    # URLError, a timeout and a full disk alike
            raise OSError(f"can't download {url} ({getattr(e, 'reason', e)}); "
                          f"fetch it elsewhere and put it at {path}") from e
        if sha256 and digest.hexdigest() != sha256:
            raise ValueError(f"{url}: sha256 is {digest.hexdigest()}, expected {sha256}; "
                             "nothing was kept")
    return path


def _cifar10(archive, split):
    """The official binary archive: records of 1 label byte and 3 x 32 x 32 image bytes."""
    names = ["test_batch.bin"] if split == "test" else [f"data_batch_{i}.bin" for i in range(1, 6)]
    with tarfile.open(archive) as tar:
        files = {Path(m.name).name: m for m in tar.getmembers()}
        records = [np.frombuffer(tar.extractfile(files[n]).read(), np.uint8) for n in names]
    records = np.concatenate(records).reshape(-1, 1 + 3 * 32 * 32)
    return (torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy()),
            torch.from_numpy(records[:, 0].astype(np.int64)))


def _files(path):
    """Yield (name, bytes) of every file in a folder, .zip or .tar."""
    if path.is_dir():
        for p in sorted(p for p in path.rglob("*") if p.is_file()):
            yield p.relative_to(path).as_posix(), p.read_bytes()
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as z:
            for name in z.namelist():
                yield name, z.read(name)
    else:
        with tarfile.open(path) as tar:         # streamed: .xz has no cheap random access
            for member in tar:
                if member.isfile():
                    yield member.name, tar.extractfile(member).read()


def _decode(path, split):
    """The images of a folder or archive, sorted by name.

    An image's label is dataset.json's (EDM's format), else its folder, where that is no number.
    Of a set with the folders train/ and test/, only `split` is taken."""
    images, listed = {}, {}
    other = {"train": "test", "test": "train"}[split]
    for name, blob in _files(path):
        if name.endswith("dataset.json"):
            listed = dict(json.loads(blob).get("labels") or {})
        if not name.lower().endswith(SUFFIXES) or other in Path(name).parts[:-1]:
            continue
        try:
            image = Image.open(io.BytesIO(blob))
            images[name] = np.asarray(image.convert("RGB"))
        except Exception as e:                      # Pillow raises many kinds for a broken file
            raise ValueError(f"{name} is no readable image: {e}") from e
        if image.mode[0] in "IF":                   # their conversion to RGB would clip
            raise ValueError(f"{name} has more than 8 bits a channel")
        first = next(iter(images))
        if images[name].shape != images[first].shape:
            raise ValueError(f"{name} is {images[name].shape[:2]}, but {first} is "
                             f"{images[first].shape[:2]}: one size only")
    if not images:
        raise ValueError(f"no images in it ({', '.join(SUFFIXES)})")
    names = sorted(images)
    folders = [Path(n).parent.name for n in names]
    classes = sorted({f for f in folders if f and not f.isdigit() and f not in ("train", "test")})
    known = listed or {n: classes.index(f) for n, f in zip(names, folders) if len(classes) > 1
                       and f in classes}
    labels = [known.get(n) for n in names]
    return (torch.from_numpy(np.stack([images[n] for n in names])).permute(0, 3, 1, 2).contiguous(),
            None if None in labels else torch.tensor(labels))


def _array(path):
    """An .npy or .npz, channels first or last."""
    stored = np.load(path, allow_pickle=False)
    if path.suffix == ".npy":
        stored = {"images": stored}
    array = stored["images" if "images" in stored else next(iter(stored))]
    if array.dtype != np.uint8 or array.ndim != 4 or 3 not in (array.shape[1], array.shape[3]):
        raise ValueError(f"{array.dtype} {array.shape}, not uint8 (N, 3, H, W)")
    if not len(array):
        raise ValueError("no images in it")
    if array.shape[1] != 3:
        array = array.transpose(0, 3, 1, 2).copy()
    labels = torch.from_numpy(stored["labels"].astype(np.int64)) if "labels" in stored else None
    return torch.from_numpy(array), labels


def load_images(source, split="train"):
    """-> images uint8 [0, 255] (N, 3, H, W), labels int64 (N,) or None.

    source: "cifar10" (downloaded), the official binary archive's path, a folder, a .zip or
    .tar(.gz, .xz) of images, or an .npy or .npz of uint8 (N, 3, H, W) or (N, H, W, 3), in an .npz
    under "images" (labels under "labels") or as its first array. split: "train" or "test", where
    the source has both. Grey and palette images become RGB. Raises ValueError for sets that are
    empty, broken or of mixed sizes, naming the file; OSError for files that can't be read.
    """
    path = download(*CIFAR10) if str(source) == "cifar10" else Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    with reading(path, "a set of images"):
        if path.name.startswith("cifar-10-binary"):
            return _cifar10(path, split)
        return _array(path) if path.suffix in (".npy", ".npz") else _decode(path, split)


def save_images(images, path):
    """Write uint8 (N, 3, H, W) as an .npz or, a quarter smaller, as a .zip of lossless WebP; both
    are read by load_images."""
    with atomic(path) as tmp:
        if tmp.suffix != ".zip":
            return np.savez_compressed(tmp, images=images.numpy())
        with zipfile.ZipFile(tmp, "w") as z:
            for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
                blob = io.BytesIO()
                Image.fromarray(image).save(blob, "WebP", lossless=True, quality=100, method=6)
                z.writestr(zipfile.ZipInfo(f"{i:06}.webp"), blob.getvalue())    # no time stamp


def save_grid(images, path, columns=8, scale=3):
    """Write uint8 (N, 3, H, W) as one PNG, `columns` wide, each pixel `scale` pixels."""
    n, _, height, width = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 255, np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        y, x = i // columns * (height + 1), i % columns * (width + 1)
        sheet[y:y + height, x:x + width] = image
    with atomic(path) as tmp:
        Image.fromarray(sheet).resize((sheet.shape[1] * scale, sheet.shape[0] * scale),
                                      Image.Resampling.NEAREST).save(tmp, format="PNG")


# ------------------------------------------------------------------- what every script's main needs

def tune_cpu():
    """Make the CPU as fast as it can be for these networks, in this process.

    Denormal numbers, 100 times slower than others, become 0; and glibc keeps the memory of freed
    tensors instead of giving it back to Linux, which would clear every page of every feature map
    anew (15-20 % of a training step).
    """
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):                            # musl has none
            libc.mallopt(-4, 0)                                 # M_MMAP_MAX: the heap for all sizes
            libc.mallopt(-1, 2 ** 31 - 1)                       # M_TRIM_THRESHOLD: never shrink it


class Parser(argparse.ArgumentParser):
    """argparse with one line per error."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text):
    """argparse type: an integer of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def device(name):
    """argparse type: a torch device that is there."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as e:
        raise argparse.ArgumentTypeError(f"no device {name!r}: {str(e).splitlines()[0]}") from e
    return name


def run_main(main):
    """Run a script's main(argv); what a user can cause is one line on stderr and status 2."""
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError, FloatingPointError) as e:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
