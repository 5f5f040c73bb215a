"""Images in, images out: any set of images as one uint8 tensor. Nothing is unpickled.

    images, labels = load_images("cifar10")             # the official binary archive, downloaded
    images, labels = load_images("photos.zip")          # or a folder, .tar(.gz, .xz), .npy, .npz
    save_images(images, "photos.npz", labels)           # or a .zip
"""
import io
import json
import math
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image

from plumbing.archives import FILE_LIMIT, SET_LIMIT, members
from plumbing.download import download
from plumbing.files import atomic, reading

CIFAR10 = ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
           "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SPLITS = {("train",), ("test",)}
MAX_LABEL = 999


def load_images(source, split="train"):
    """-> images uint8 [0, 255] (N, 3, H, W), labels int64 [0, 999] (N,) or None.

    source: "cifar10" (downloaded), the official binary archive's path, a folder, a .zip or
    .tar(.gz, .xz) of images, or an .npy or .npz of uint8 (N, 3, H, W) or (N, H, W, 3), in an .npz
    under "images" (labels under "labels") or as its first array. split: "train" or "test", where
    the source has both. Grey and palette images become RGB. Raises ValueError for sets that are
    empty, broken, too large or of mixed sizes, and for labels that are not one integer an image,
    naming the file; OSError for files that can't be read.
    """
    if not str(source):
        raise ValueError("a set of images must have a name: a path, or cifar10")
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, not {split!r}")
    path = download(*CIFAR10) if str(source) == "cifar10" else Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    with reading(path, "a set of images"):
        if path.name.startswith("cifar-10-binary"):
            images, labels = _cifar10(path, split)
        elif path.suffix.lower() in (".npy", ".npz"):
            images, labels = _arrays(path)
        else:
            images, labels = _image_files(path, split)
        return torch.from_numpy(images), _checked(labels, len(images))


def _checked(labels, n):
    """Labels of any source -> int64 (n,), or None."""
    if labels is None:
        return None
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.shape != (n,):
        raise ValueError(f"its labels are {labels.dtype} {labels.shape}, not integers ({n},)")
    if labels.min() < 0 or labels.max() > MAX_LABEL:
        raise ValueError(f"its labels go from {labels.min()} to {labels.max()}, "
                         f"not from 0 to at most {MAX_LABEL}")
    return torch.from_numpy(labels.astype(np.int64))


def _cifar10(path, split):
    """The official binary archive: records of 1 label byte and 3 x 32 x 32 image bytes."""
    names = ["test_batch.bin"] if split == "test" else [f"data_batch_{i}.bin" for i in range(1, 6)]
    batches = []
    with members(path) as files:
        found = {PurePosixPath(f.name).name: f for f in files}
        for name in names:
            if name not in found:
                raise ValueError(f"no {name} in it")
            with reading(name, "a batch of CIFAR-10"):
                batches.append(found[name].read())
                if not batches[-1] or len(batches[-1]) % 3073:
                    raise ValueError(f"{len(batches[-1]):,} bytes, not records of 3,073")
    records = np.frombuffer(b"".join(batches), np.uint8).reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32).copy(), records[:, 0]  # (N, 3, 32, 32), (N,)


def _arrays(path):
    """An .npy or .npz, channels first or last."""
    with members(path) as files:
        stored = {f.name.removesuffix(".npy"): f for f in files if f.name.endswith(".npy")}
        if not stored:
            raise ValueError("no arrays in it")
        array = stored.get("images", next(iter(stored.values()))).read_array(SET_LIMIT)
        labels = stored["labels"].read_array(FILE_LIMIT) if "labels" in stored else None
    if array.dtype != np.uint8 or array.ndim != 4 or 3 not in (array.shape[1], array.shape[3]):
        raise ValueError(f"{array.dtype} {array.shape}, not uint8 (N, 3, H, W)")
    if not array.size:
        raise ValueError("no images in it")
    if array.shape[1] != 3:
        array = array.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(array), labels


def _image_files(path, split):
    """The images of a folder or archive, sorted by name. Their labels are those of dataset.json
    (EDM's format), else their folders."""
    with members(path) as files:
        images = [f for f in files if f.name.lower().endswith(SUFFIXES)]
        names, labels = _arrange([f.name for f in images], split)
        if not names:
            raise ValueError(f"no images to {split} with ({', '.join(SUFFIXES)})")
        place = {name: i for i, name in enumerate(names)}
        if len(place) < len(names):
            raise ValueError("two images have the same name")
        lists = [f for f in files if PurePosixPath(f.name).name == "dataset.json"]
        if lists:                           # of several, the one nearest to the top
            labels = _listed(min(lists, key=lambda f: len(f.name)), names) or labels
        pixels = None
        for f in images:                    # in the archive's order, in which a .tar.xz expands
            if f.name in place:
                with reading(f.name, "a usable image"):
                    image = f.open_image()
                    pixels = _room(pixels, len(names), image)               # (N, 3, H, W)
                    pixels[place[f.name]] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    return pixels, labels


def _arrange(names, split):
    """Names of images -> those of the split, sorted, and their labels or None.

    A set is split where every image is in train/ or test/, at the top or in one folder around both.
    A class is a folder that holds images, unless its name is a number; both splits number the
    classes alike.
    """
    folders = {name: PurePosixPath(name).parts[:-1] for name in names}
    tops = {f[:1] for f in folders.values()}
    if len(tops) == 1 and not tops <= SPLITS:               # one folder around all
        folders = {name: f[1:] for name, f in folders.items()}
        tops = {f[:1] for f in folders.values()}
    chosen = sorted(names)
    if tops <= SPLITS:
        chosen = [name for name in chosen if folders[name][0] == split]
        folders = {name: f[1:] for name, f in folders.items()}
    own = {name: f[-1] if f and not f[-1].isdigit() else "" for name, f in folders.items()}
    classes = {c: i for i, c in enumerate(sorted(set(own.values()) - {""}))}
    if len(classes) < 2 or not all(own[name] for name in chosen):
        return chosen, None
    return chosen, [classes[own[name]] for name in chosen]


def _listed(file, names):
    """dataset.json -> the labels of these images, or None where it says null."""
    with reading(file.name, 'EDM\'s {"labels": [[image, integer], ...]}'):
        pairs = json.loads(file.read())["labels"]
        if pairs is None:
            return None
        folder = PurePosixPath(file.name).parent
        labels = {(folder / image).as_posix(): label for image, label in pairs}
        if any(type(label) is not int for label in labels.values()):
            raise ValueError("a label is no integer")
    unlisted = [name for name in names if name not in labels]
    if unlisted:
        raise ValueError(f"{file.name} has no label for {unlisted[0]}")
    return [labels[name] for name in names]


def _room(pixels, n, image):
    """The array for n images, made for the first of them, before its pixels are decoded."""
    shape = (n, 3, image.height, image.width)
    if pixels is None:
        if math.prod(shape) > SET_LIMIT:
            raise ValueError(f"{n} of {shape[2:]} pixels have more than {SET_LIMIT:,} bytes")
        return np.empty(shape, np.uint8)
    if pixels.shape != shape:
        raise ValueError(f"{shape[2:]} pixels, but the first is {pixels.shape[2:]}: one size only")
    return pixels


def save_images(images, path, labels=None):
    """Write uint8 (N, 3, H, W), and labels (N,) if there are any, as an .npz or, a quarter smaller,
    as a .zip of lossless WebP with a dataset.json; load_images reads both."""
    path, images = Path(path), images.cpu().numpy()
    if path.suffix not in (".npz", ".zip"):
        raise ValueError(f"{path}: a set of images is written as .npz or .zip")
    if labels is not None:
        labels = _checked(torch.as_tensor(labels).cpu(), len(images)).numpy()
    with atomic(path) as tmp:
        if path.suffix == ".npz":
            listed = {} if labels is None else {"labels": labels}
            return np.savez_compressed(tmp, images=images, **listed)
        names = [f"{i:06}.webp" for i in range(len(images))]
        with zipfile.ZipFile(tmp, "w") as z:
            for name, image in zip(names, images.transpose(0, 2, 3, 1)):
                blob = io.BytesIO()
                Image.fromarray(image).save(blob, "WebP", lossless=True, quality=100, method=6)
                z.writestr(zipfile.ZipInfo(name), blob.getvalue())              # no time stamp
            if labels is not None:
                listed = {"labels": list(zip(names, labels.tolist()))}
                z.writestr(zipfile.ZipInfo("dataset.json"), json.dumps(listed))


def save_grid(images, path, columns=8, scale=3):
    """Write uint8 (N, 3, H, W) as one PNG, `columns` wide, each pixel `scale` pixels."""
    n, _, height, width = images.shape
    rows = math.ceil(n / columns)
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 255, np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        y, x = i // columns * (height + 1), i % columns * (width + 1)
        sheet[y:y + height, x:x + width] = image
    with atomic(path) as tmp:
        Image.fromarray(sheet).resize((sheet.shape[1] * scale, sheet.shape[0] * scale),
                                      Image.Resampling.NEAREST).save(tmp, format="PNG")
