"""Images in, images out: any set of images as one uint8 tensor. Nothing is unpickled.

    images, labels = load_images("cifar10")             # the official binary archive, downloaded
    images, labels = load_images("photos.zip")          # or a folder, .tar(.gz, .xz), .npy, .npz
    save_images(images, "photos.npz", labels)           # or a .zip
"""
import io
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from plumbing.download import download
from plumbing.files import atomic, reading
from plumbing.imagesets import read_arrays, read_cifar10, read_image_files, whole_labels

CIFAR10 = ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
           "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")


def load_images(source, split="train"):
    """-> images uint8 [0, 255] (N, 3, H, W), labels int64 [0, 999] (N,) or None.

    source: "cifar10" (downloaded), the official binary archive's path, a folder, a .zip or
    .tar(.gz, .xz) of images, or an .npy or .npz of uint8 (N, 3, H, W) or (N, H, W, 3), in an .npz
    under "images" (labels under "labels") or as its first array. split: "train" or "test", where
    the source has both. Labels of image files are those of dataset.json (EDM's format), else each
    folder is a class. Grey and palette images become RGB. Raises ValueError for sets that are
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
            images, labels = read_cifar10(path, split)
        elif path.suffix.lower() in (".npy", ".npz"):
            images, labels = read_arrays(path)
        else:
            images, labels = read_image_files(path, split)
        return torch.from_numpy(images), whole_labels(labels, len(images))


def save_images(images, path, labels=None):
    """Write uint8 (N, 3, H, W), and labels (N,) if there are any, as an .npz or, a quarter smaller,
    as a .zip of lossless WebP with a dataset.json; load_images reads both."""
    path, images = Path(path), images.cpu().numpy()
    if path.suffix not in (".npz", ".zip"):
        raise ValueError(f"{path}: a set of images is written as .npz or .zip")
    if labels is not None:
        labels = whole_labels(torch.as_tensor(labels).cpu(), len(images)).numpy()
    with atomic(path) as tmp:
        if path.suffix == ".zip":
            write_zip(images, tmp, labels)
        elif labels is None:
            np.savez_compressed(tmp, images=images)
        else:
            np.savez_compressed(tmp, images=images, labels=labels)


def write_zip(images, path, labels):
    """Arrays as EDM's format has them. ZipInfo has no time: equal images make equal files."""
    names = [f"{i:06}.webp" for i in range(len(images))]
    with zipfile.ZipFile(path, "w") as z:
        for name, image in zip(names, images.transpose(0, 2, 3, 1)):
            blob = io.BytesIO()
            Image.fromarray(image).save(blob, "WebP", lossless=True, quality=100, method=4)
            z.writestr(zipfile.ZipInfo(name), blob.getvalue())
        if labels is not None:
            listed = {"labels": list(zip(names, labels.tolist()))}
            z.writestr(zipfile.ZipInfo("dataset.json"), json.dumps(listed))


def sheet(images, columns=8, classes=0):
    """uint8 (N, 3, H, W) -> one picture, uint8 (height, width, 3), with a line between. classes:
    theirs take turns, and each of them gets a row."""
    if 0 < classes <= len(images):
        columns = len(images) // classes
        images = images[:columns * classes].unflatten(0, (columns, classes)).transpose(0, 1)
        images = images.flatten(0, 1)
    n, _, height, width = images.shape
    rows = math.ceil(n / columns)
    picture = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 255, np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        y, x = i // columns * (height + 1), i % columns * (width + 1)
        picture[y:y + height, x:x + width] = image
    return picture


def save_grid(images, path, columns=8, scale=3, classes=0):
    """Write a sheet() as PNG. scale: the pixels that show one."""
    picture = Image.fromarray(sheet(images, columns, classes))
    size = picture.width * scale, picture.height * scale
    with atomic(path) as tmp:
        picture.resize(size, Image.Resampling.NEAREST).save(tmp, format="PNG")
