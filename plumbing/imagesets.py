"""What data.load_images reads: CIFAR-10's archive, arrays, folders and archives of image files."""
import json
import math
from pathlib import PurePosixPath

import numpy as np
import torch

from plumbing.archives import FILE_LIMIT, SET_LIMIT, members
from plumbing.files import reading

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SPLITS = {("train",), ("test",)}
MAX_LABEL = 999


def read_cifar10(path, split):
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


def read_arrays(path):
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


def read_image_files(path, split):
    """The images of a folder or archive, sorted by name. Their labels are those of dataset.json
    (EDM's format), else their folders."""
    with members(path) as files:
        images = [f for f in files if f.name.lower().endswith(SUFFIXES)]
        names, labels = arrange([f.name for f in images], split)
        if not names:
            raise ValueError(f"no images to {split} with ({', '.join(SUFFIXES)})")
        place = {name: i for i, name in enumerate(names)}
        if len(place) < len(names):
            raise ValueError("two images have the same name")
        lists = [f for f in files if PurePosixPath(f.name).name == "dataset.json"]
        if lists:                           # of several, the one nearest to the top
            labels = read_list(min(lists, key=lambda f: len(f.name)), names) or labels
        pixels = None
        for f in images:                    # in the archive's order, in which a .tar.xz expands
            if f.name in place:
                with reading(f.name, "a usable image"):
                    image = f.open_image()
                    pixels = room(pixels, len(names), image)                # (N, 3, H, W)
                    pixels[place[f.name]] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    return pixels, labels


def arrange(names, split):
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


def read_list(file, names):
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


def room(pixels, n, image):
    """The array for n images, made for the first of them, before its pixels are decoded."""
    shape = (n, 3, image.height, image.width)
    if pixels is None:
        if math.prod(shape) > SET_LIMIT:
            raise ValueError(f"{n} of {shape[2:]} pixels have more than {SET_LIMIT:,} bytes")
        return np.empty(shape, np.uint8)
    if pixels.shape != shape:
        raise ValueError(f"{shape[2:]} pixels, but the first is {pixels.shape[2:]}: one size only")
    return pixels


def whole_labels(labels, n):
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
