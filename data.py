"""Images in, images out: any set of images as one uint8 tensor. Also the project's download().

    images, labels = load_images("cifar10")             # the official binary archive, downloaded
    images, labels = load_images("photos", size=32)     # a folder or .zip: middle squares, resized
    images, labels = load_images("mnist.npz", "test")   # or an .npy
    save_images(images, "photos.npz", labels)           # or a .zip
"""
import contextlib
import glob
import hashlib
import io
import itertools
import json
import math
import os
import sys
import tarfile
import textwrap
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from plumbing.loop import atomic, rank

CIFAR10 = ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
           "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")
MAPPED = 2 * 10 ** 9                # bytes of pixels from which on a set is kept on the disk
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")        # Pillow reads more, EPS by running a program
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp")
NOT_READ = (".gif", ".tif", ".tiff", ".heic", ".avif", ".jp2", ".ppm", ".pgm", ".tga", ".dcm")
SPLITS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}
ARRAYS = {"images": ("train", "labels"), "arr_0": ("train", "arr_1"),       # images: split, labels
          "x_train": ("train", "y_train"), "x_test": ("test", "y_test")}


# ---------------------------------------------------------------------------------------- images in

def load_images(source, split="train", size=None):
    """Return the images, uint8 [0, 255] (N, C, H, W), and their labels, int64 (N,), or None.

    source: "cifar10" (downloaded), CIFAR-10's binary archive or its folder, a folder or .zip of
    images, or an .npy or .npz of uint8 arrays. C is 1 where all images are grey, else 3. Labels are
    those of dataset.json (EDM's format) where there is one, else the outermost folders are classes.
    split: "train" or "test"; folders train, val and test are splits, and a set without them is
    "train". size: take the middle square of each image and resize it, by Lanczos.

    Of MAPPED bytes or more, an .npy is memory-mapped as it is, and decoded or resized images from
    an .npy that is made once, beside the set or in cache(); an .npz is read into memory. One line
    on standard error says what was found. Raises ValueError or OSError, naming the file, for what
    is not such a set or has images of several sizes.
    """
    path = download(*CIFAR10) if str(source) == "cifar10" else Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    done = set()
    try:
        images, labels, where = read_set(path, split, size, done)
    except (ValueError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as e:
        raise ValueError(f"{path}: {e}") from e
    if rank() == 0:
        n, channels, height, width = images.shape
        found = [f"{source}: {n} {'image' if n == 1 else 'images'} of {width} x {height}, "
                 f"{'grey' if channels == 1 else 'RGB'}",
                 "no labels" if labels is None else f"{labels.max() + 1} classes from {where}"]
        said = "; ".join(found + sorted(done))
        print(textwrap.fill(said, 80, break_long_words=False, break_on_hyphens=False),
              file=sys.stderr)
    return torch.from_numpy(images), labels


def read_set(path, split, size, done):
    """Return the images, the labels or None, and where these are from, of a set of any kind."""
    if path.suffix.lower() in (".npy", ".npz"):
        images, labels, where = read_arrays(path, split, done)
    else:
        images, labels, where = read_files(path, split, size, done)
    if not len(images):
        raise ValueError("no images in it")
    if size and images.shape[2:] != (size, size):
        squares = (from_pillow(middle_square(to_pillow(image), size, done)) for image in images)
        images = stack(squares, len(images), path, [path], (size, split), done)
    if labels is not None:
        labels, n = np.asarray(labels), len(images)
        if labels.shape not in ((n,), (n, 1)) or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise ValueError(f"{where}: {labels.dtype} {labels.shape}, but {n} images need as many "
                             "labels, whole numbers from 0 on")
        labels = torch.from_numpy(labels.reshape(n).astype(np.int64))
    return images, labels, where


# --------------------------------------------------------------------------------------- images out

def save_images(images, path, labels=None):
    """Write uint8 (N, C, H, W), and labels (N,) if there are any, as an .npz or, a quarter smaller,
    as a .zip of lossless WebP (PNG where grey) with a dataset.json; load_images reads both."""
    path, images = Path(path), images.cpu().numpy()
    if path.suffix not in (".npz", ".zip"):
        raise ValueError(f"{path}: a set of images is written as .npz or .zip")
    labels = {} if labels is None else {"labels": labels.cpu().numpy()}
    with atomic(path) as tmp:
        if path.suffix == ".zip":
            write_zip(images, tmp, **labels)
        else:
            np.savez_compressed(tmp, images=images, **labels)


def write_zip(images, path, labels=None):
    """Write arrays in EDM's format. ZipInfo has no time: equal images make equal files."""
    webp = images.shape[1] == 3
    how = dict(lossless=True, quality=100, method=4) if webp else {}
    names = [f"{i:06}.{'webp' if webp else 'png'}" for i in range(len(images))]
    with zipfile.ZipFile(path, "w") as z:
        for name, image in zip(names, images):
            blob = io.BytesIO()
            to_pillow(image).save(blob, "WebP" if webp else "PNG", **how)
            z.writestr(zipfile.ZipInfo(name), blob.getvalue())
        if labels is not None:
            listed = {"labels": list(zip(names, labels.tolist()))}
            z.writestr(zipfile.ZipInfo("dataset.json"), json.dumps(listed))


def sheet(images, columns=8, classes=0):
    """Return one picture, uint8 (height, width, 3), of images uint8 (N, C, H, W), with a line
    between. classes: if given, image i is of class i % classes, and each class gets a row. With
    fewer images than classes it is ignored."""
    if 0 < classes <= len(images):
        columns = len(images) // classes
        images = images[:columns * classes].unflatten(0, (columns, classes)).transpose(0, 1)
        images = images.flatten(0, 1)
    n, _, height, width = images.shape
    rows = math.ceil(n / columns)
    picture = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 255, np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        y, x = i // columns * (height + 1), i % columns * (width + 1)
        picture[y:y + height, x:x + width] = image              # grey goes into all three channels
    return picture


def save_grid(images, path, columns=8, scale=3, classes=0):
    """Write a sheet() as PNG. scale: the pixels that show one."""
    picture = Image.fromarray(sheet(images, columns, classes))
    size = picture.width * scale, picture.height * scale
    with atomic(path) as tmp:
        picture.resize(size, Image.Resampling.NEAREST).save(tmp, format="PNG")


# ---------------------------------------------------------------------------------------- downloads

def cache():
    """Return the folder of downloads: $DI_BREGMAN_CACHE, else ~/.cache/di-bregman. Raises OSError,
    which names the variable, where there is no home or one can't make the folder."""
    try:
        folder = Path(os.environ.get("DI_BREGMAN_CACHE") or "~/.cache/di-bregman").expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, OSError) as e:                        # RuntimeError: no home
        raise OSError(f"no folder for downloads ({e}): set DI_BREGMAN_CACHE to one that can be "
                      "written") from e
    return folder


def download(url, sha256=""):
    """Return the path of the file at `url` in cache(), fetched once; one put there by hand will do.
    sha256: "" where the publisher's is not known. Raises OSError, which says what to do."""
    path = cache() / url.rsplit("/", 1)[-1]
    if not path.exists():
        with atomic(path) as tmp:
            try:
                torch.hub.download_url_to_file(url, tmp, sha256)
            except (OSError, RuntimeError) as e:                # RuntimeError: of another sha256
                raise OSError(f"can't download {url} ({e}); fetch it elsewhere and put it at "
                              f"{path}, or set DI_BREGMAN_CACHE to another folder") from e
    return path


# ------------------------------------------------------------------------------ arrays and CIFAR-10

def read_arrays(path, split, done):
    """Return the images (N, C, H, W) of an .npy or .npz, the labels or None, and their name."""
    large = path.suffix.lower() == ".npy" and path.stat().st_size >= MAPPED
    stored = np.load(path, mmap_mode="c" if large else None, allow_pickle=False)
    if isinstance(stored, np.ndarray):
        stored = {"images": stored}
    found = {ARRAYS[name][0]: name for name in stored if name in ARRAYS}
    labels = {name: ARRAYS[name][1] for name in found.values()}
    if not found or set(stored) - {*labels.keys(), *labels.values()}:
        raise ValueError(f"its arrays are called {', '.join(stored) or 'nothing'}: call them "
                         "images and labels, or x_train, y_train, x_test and y_test")
    name = found[choose_split(split, found, done)]
    array = images = stored[name]
    if array.ndim == 3 and array.shape[2] > 4:                  # else it is one image (H, W, C)
        images = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in (1, 3):
        images = array.transpose(0, 3, 1, 2)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"{name} is {array.dtype} {array.shape}, not uint8 from 0 to 255 as "
                         "(N, H, W), (N, C, H, W) or (N, H, W, C), where C is 1 or 3")
    images = images if large else np.ascontiguousarray(images)
    return images, stored[labels[name]] if labels[name] in stored else None, labels[name]


def choose_split(split, found, done):
    """Return which of the splits that were found is meant: val is the test where there is none."""
    name = "val" if split == "test" and "test" not in found else split
    if name not in found:
        raise ValueError(f"no {split} images in it, only {' and '.join(sorted(found))}")
    if len(found) > 1:
        done.add(f"the split {name} (of {', '.join(sorted(found))})")
    return name


def read_cifar10(files, read, split):
    """Return the images and labels of CIFAR-10's batches, which are records of 1 label byte and
    3 x 32 x 32 image bytes. files: {a batch's name: what read() takes}."""
    names = ["test_batch.bin"] if split == "test" else [f"data_batch_{i}.bin" for i in range(1, 6)]
    for name in names:
        if name not in files:
            raise ValueError(f"no {name} in it: take {CIFAR10[0]}, and give that file")
    records = np.frombuffer(b"".join(read(files[name]) for name in names), np.uint8)
    records = records.reshape(-1, 3073)
    return records[:, 1:].copy().reshape(-1, 3, 32, 32), records[:, 0]


# -------------------------------------------------------------------------------------- image files

def read_files(path, split, size, done):
    """Return the images of a folder or archive, their labels or None, and where these are from."""
    with open_files(path) as (files, read):
        batches = {name.split("/")[-1]: file for name, file in files.items()}
        if batches.keys() & {"data_batch_1", "data_batch_1.bin"}:
            return *read_cifar10(batches, read, split), "its records"
        names = [name for name in files if name.lower().endswith(SUFFIXES)]
        others = Counter(os.path.splitext(name)[1].lower() for name in files)
        done.update(f"{others[s]} {s} files are not read" for s in NOT_READ if others[s])
        if not names:
            reasons = ["no images in it: a set is a folder or .zip of " + ", ".join(SUFFIXES),
                       "an .npy or .npz, or CIFAR-10's archive", *sorted(done)]
            raise ValueError("; ".join(reasons))
        folders, names = in_split(names, split, done)
        lists = [name for name in files if name.split("/")[-1] == "dataset.json"
                 and all(image.startswith(name[:-len("dataset.json")]) for image in names)]
        if lists:
            where = max(lists, key=len)                         # the nearest to the images
            labels = listed_labels(where, read(files[where]), names)
        else:
            where = "folders"
            names, labels = folder_labels(folders, names)
        parts = [files[name] for name in names] if path.is_dir() else [path]
        # Decode as grey first. A coloured image raises Coloured, and the second pass is in RGB.
        for grey in (True, False):
            with contextlib.suppress(Coloured):
                images = decode(files, read, names, size, done, grey)
                return stack(images, len(names), path, parts, (size, names), done), labels, where


@contextlib.contextmanager
def open_files(path):
    """Yield {name: file} of a folder, an archive or one image, with / in the names and without
    hidden files and a Mac's __MACOSX; and read(file), which returns its bytes."""
    with contextlib.ExitStack() as opened:
        found, read = {}, Path.read_bytes
        if path.is_dir():
            names = glob.iglob("**", root_dir=path, recursive=True)     # through links, too
            found = {name: path / name for name in names if not (path / name).is_dir()}
        elif path.suffix.lower() in SUFFIXES:
            found = {path.name: path}
        elif path.suffix.lower() == ".zip":
            z = opened.enter_context(zipfile.ZipFile(path))
            found, read = {m.filename: m for m in z.infolist() if not m.is_dir()}, z.read
        elif tarfile.is_tarfile(path):                                  # CIFAR-10's alone
            tar = opened.enter_context(tarfile.open(path))
            found = {m.name: m for m in tar if "_batch" in m.name}
            read = lambda m: tar.extractfile(m).read()                  # noqa: E731
        files = {}
        for name, file in found.items():
            parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
            if not any(part.startswith(".") or part == "__MACOSX" for part in parts):
                files["/".join(parts)] = file
        yield files, read


def in_split(names, split, done):
    """Return {name: the folders that the image lies in, without those around all} of all images,
    and the sorted names of the split, which are all where there are no folders of splits."""
    folders = {name: name.split("/")[:-1] for name in names}
    around = os.path.commonprefix(list(folders.values()))
    depth = next((i for i, f in enumerate(around) if f.lower() in SPLITS), len(around))
    folders = {name: f[depth:] for name, f in folders.items()}
    splits = {name: SPLITS.get(f[0].lower()) if f else None for name, f in folders.items()}
    if not any(splits.values()):
        choose_split(split, ["train"], done)
        return folders, sorted(names)
    for name in names:
        if not splits[name]:
            raise ValueError(f"{name} lies beside folders of splits: move it into one, or away")
    chosen = choose_split(split, set(splits.values()), done)
    around = os.path.commonprefix([f[1:] for f in folders.values()])
    folders = {name: f[1 + len(around):] for name, f in folders.items()}
    return folders, sorted(name for name in names if splits[name] == chosen)


def folder_labels(folders, names):
    """Return the names sorted by class, and their labels; None where all are in one folder. The
    outermost folder of an image is its class, and all splits number the classes alike."""
    tops = {f[0] for f in folders.values() if f}
    classes = sorted(tops, key=lambda c: (0, int(c), c) if c.isdecimal() else (1, 0, c))
    if len(classes) < 2 or not any(folders[name] for name in names):
        return names, None
    for name in names:
        if not folders[name]:
            raise ValueError(f"{name} lies beside folders of classes, as {classes[0]} is one: move "
                             "it into one, or away")
    if all(f[1:] and f[1].lower() in SPLITS for f in folders.values()):
        raise ValueError(f"{names[0]}: train and test must lie around the classes, not inside")
    label = {c: i for i, c in enumerate(classes)}
    names = sorted(names, key=lambda name: (label[folders[name][0]], name))
    return names, [label[folders[name][0]] for name in names]


def listed_labels(name, blob, names):
    """Return the labels of images in a dataset.json, or None where it has null. name: its own."""
    folder = name.removesuffix("dataset.json")
    try:
        pairs = json.loads(blob)["labels"]
        if pairs is None:
            return None
        labels = {folder + image.replace("\\", "/"): label for image, label in pairs}
        return [labels[image] for image in names]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f'{name} is not EDM\'s {{"labels": [[image, integer], ...]}}, or lacks an '
                         f"image ({e!r}): correct it, or take it away") from e


def decode(files, read, names, size, done, grey):
    """Yield the images, uint8 (C, H, W), where C = 1 if grey. Raises Coloured if that is wrong, and
    ValueError for an image of another size and, at the end, for the first broken one."""
    broken, first = [], None
    for name in tqdm(names, "decoding", unit="img", delay=2, disable=rank() > 0, leave=False):
        try:
            image = open_image(io.BytesIO(read(files[name])), done)
        except Exception as e:
            broken.append(f"{name}: {e}")
            continue
        image = middle_square(image, size, done) if size else image
        first = first or (name, image.width, image.height)
        if image.size != first[1:]:
            raise ValueError("{} is {} x {} pixels, ".format(*first) + f"{name} {image.width} x "
                             f"{image.height}: --size N takes the middle square of each")
        if grey and image.mode != "L":
            raise Coloured
        if not grey and image.mode == "L":
            done.add("grey made RGB")
            image = image.convert("RGB")
        yield from_pillow(image)
    if broken:
        raise ValueError(f"{broken[0]} ({len(broken)} of {len(names)} images can't be read, the "
                         f"other {len(names) - len(broken)} are fine)")


class Coloured(Exception):
    """An image of the set is in colour, so that all have three channels."""


# ---------------------------------------------------------------------------------------- one image

def open_image(file, done=None):
    """Return an image file as an upright Pillow image, of mode L where it is grey and else RGB.

    Transparency is laid on white, and 16 bits a channel give their high byte. file: a path or an
    open binary file. done: a set, to which what was done is added, in words. Raises ValueError or
    OSError, naming the path.
    """
    done = set() if done is None else done
    try:
        with Image.open(file, formats=FORMATS) as image:
            mode = "L" if image.mode[0] in "1LI" else "RGB"
            if ";16B" in str(image.tile):                   # which Pillow's mode of RGB hides
                done.add("16 bits cut to their high byte")
            if image.getexif().get(ExifTags.Base.Orientation) in range(2, 9):
                done.add("turned upright by EXIF")
                image = ImageOps.exif_transpose(image)
            if image.mode[0] == "I":                        # Pillow's conversion to L would clip
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                if image.getextrema()[3][0] < 255:
                    done.add("transparency laid on white")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert(mode)
    except Exception as e:                      # each decoder raises its own for a broken file
        unknown = isinstance(e, UnidentifiedImageError)     # whose message is an address in memory
        reason = "not a PNG, JPEG, WebP or BMP" if unknown else str(e) or type(e).__name__
        raise ValueError(reason if hasattr(file, "read") else f"{file}: {reason}") from e


def middle_square(image, size, done):
    """Return the middle square of a Pillow image, resized to size x size by Lanczos."""
    if image.size == (size, size):
        return image
    done.add(f"middle squares resized to {size} x {size}")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.LANCZOS)


def to_pillow(image):
    """Return a Pillow image of uint8 (C, H, W)."""
    return Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))


def from_pillow(image):
    """Return uint8 (C, H, W) of a Pillow image of mode L or RGB."""
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


# --------------------------------------------------------------------------------------- large sets

def stack(images, n, path, parts, key, done):
    """Return n images (C, H, W) of an iterator as one array (n, C, H, W).

    From MAPPED bytes on they are written to a file once, beside the set at `path` or, where one
    can't write there, in cache(); the array is memory-mapped from it, copied on write. The file's
    name has a hash of `key` and of when the files `parts` changed last: another set, another file.
    """
    first = next(images)
    shape, images = (n, *first.shape), itertools.chain([first], images)
    if math.prod(shape) < MAPPED:
        pixels = np.empty(shape, np.uint8)
        for i, image in enumerate(images):
            pixels[i] = image
        return pixels
    newest = max(part.stat().st_mtime_ns for part in parts)
    digest = hashlib.sha256(repr((*key, newest)).encode()).hexdigest()[:12]
    file = path.resolve().with_name(f"{path.resolve().name}.{digest}.npy")
    if not file.exists() and not os.access(file.parent, os.W_OK):
        file = cache() / file.name
    if not file.exists():
        with atomic(file) as tmp, open(tmp, "wb") as f:     # a full disk kills who writes a memmap
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(f, header)
            for image in images:
                f.write(image.tobytes())
    done.add(f"memory-mapped from {file}")
    return np.load(file, mmap_mode="c")
