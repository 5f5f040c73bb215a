"""data.py: every kind of source, and every way in which one can be broken."""
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import download, load_images, save_atomic, save_grid, save_images

PIXELS = np.random.RandomState(0).randint(0, 256, (6, 8, 8, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
NAMES = [f"train/{c}/{i}.png" for c in ("cat", "dog") for i in range(2)] + \
        [f"test/{c}/0.png" for c in ("cat", "dog")]


def png(array, mode=None):
    blob = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(blob, "PNG")
    return blob.getvalue()


def write(path, files):
    """`files`, name to bytes, as a folder, .zip or .tar.*"""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as z:
            for name, blob in files.items():
                z.writestr(name, blob)
    elif ".tar" in path.name:
        with tarfile.open(path, "w:" + path.suffix.strip(".").replace("tar", "")) as t:
            for name, blob in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(blob)
                t.addfile(info, io.BytesIO(blob))
    else:
        for name, blob in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(blob)
    return path


@pytest.mark.parametrize("name", ["folder", "a.zip", "a.tar", "a.tar.xz", "a.tar.gz"])
def test_sets_of_image_files(tmp_path, name):
    path = write(tmp_path / name, {n: png(p) for n, p in zip(NAMES, PIXELS)})
    images, labels = load_images(path)
    assert torch.equal(images, EXPECTED[:4]) and images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 1, 1]
    images, labels = load_images(path, split="test")
    assert torch.equal(images, EXPECTED[4:]) and labels.tolist() == [0, 1]


@pytest.mark.parametrize("channels_last", [False, True])
def test_arrays(tmp_path, channels_last):
    array = PIXELS if channels_last else EXPECTED.numpy()
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", images=array, labels=np.arange(6))
    np.savez(tmp_path / "b.npz", arr_0=array)
    assert torch.equal(load_images(tmp_path / "a.npy")[0], EXPECTED)
    assert load_images(tmp_path / "a.npz")[1].tolist() == list(range(6))
    images, labels = load_images(tmp_path / "b.npz")
    assert torch.equal(images, EXPECTED) and labels is None


@pytest.mark.parametrize("name", ["a.npz", "a.zip"])
def test_save_images_reads_back(tmp_path, name):
    for folder in ("new folder", "again"):
        save_images(EXPECTED, tmp_path / folder / name)
        assert torch.equal(load_images(tmp_path / folder / name)[0], EXPECTED)
    assert (tmp_path / "new folder" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_labels_of_edms_format(tmp_path):
    """Numbered folders are no classes; dataset.json tells."""
    files = {f"00000/img{i}.png": png(p) for i, p in enumerate(PIXELS)}
    assert load_images(write(tmp_path / "a.zip", files))[1] is None
    listed = {"labels": [[name, i % 3] for i, name in enumerate(files)]}
    files["dataset.json"] = json.dumps(listed).encode()
    assert load_images(write(tmp_path / "b.zip", files))[1].tolist() == [0, 1, 2, 0, 1, 2]


def test_grey_and_palette_images_become_rgb(tmp_path):
    grey = png(PIXELS[0], "L")
    images, _ = load_images(write(tmp_path / "a", {"a.png": grey, "b.png": png(PIXELS[0], "P")}))
    assert images.shape == (2, 3, 8, 8) and (images[0, 0] == images[0, 1]).all()
    assert torch.equal(images[0, 0], torch.from_numpy(np.array(Image.open(io.BytesIO(grey)))))


def cifar10(path, records=4):
    """A small archive in the official format: a label byte, then 3072 bytes, channels first."""
    pixels = np.random.RandomState(1).randint(0, 256, (6, records, 3073), dtype=np.uint8)
    pixels[:, :, 0] %= 10
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    write(path, {f"cifar-10-batches-bin/{n}": b.tobytes() for n, b in zip(names, pixels)})
    return pixels


def test_cifar10_is_downloaded_checked_and_read(tmp_path, monkeypatch):
    pixels = cifar10(tmp_path / "cifar-10-binary.tar.gz")
    url = (tmp_path / "cifar-10-binary.tar.gz").as_uri()
    sha256 = hashlib.sha256((tmp_path / "cifar-10-binary.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(data, "CIFAR10", (url, sha256))
    monkeypatch.setenv("DI_BREGMAN_CACHE", str(tmp_path / "cache"))
    images, labels = load_images("cifar10")
    assert labels.tolist() == pixels[:5, :, 0].flatten().tolist()
    assert torch.equal(images.flatten(), torch.from_numpy(pixels[:5, :, 1:].flatten()))
    assert images.shape == (20, 3, 32, 32)
    (tmp_path / "cifar-10-binary.tar.gz").unlink()                  # from now on from the cache
    images, _ = load_images("cifar10", split="test")
    assert torch.equal(images.flatten(), torch.from_numpy(pixels[5, :, 1:].flatten()))


def test_download_with_the_wrong_sha256_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("DI_BREGMAN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").write_bytes(b"not what was published")
    with pytest.raises(ValueError, match="sha256"):
        download((tmp_path / "file").as_uri(), "0" * 64)
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "cache/file").write_bytes(b"put there by hand")     # and this is the user's: kept
    with pytest.raises(ValueError, match="cache/file.*sha256"):
        download((tmp_path / "file").as_uri(), "0" * 64)
    assert (tmp_path / "cache/file").exists()


def test_download_without_a_network_names_the_place(tmp_path, monkeypatch):
    monkeypatch.setenv("DI_BREGMAN_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=f"put it at {tmp_path}/weights.pth"):
        download("http://127.0.0.1:9/weights.pth", "0" * 64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("files, message", [
    ({}, "no images"), ({"notes.txt": b"hello"}, "no images"),
    ({"a.png": png(PIXELS[0]), "b.png": png(PIXELS[0])[:60]}, "b.png"),
    ({"a.png": png(PIXELS[0]), "b.png": png(PIXELS[0, :4])}, r"b.png is \(4, 8\)"),
    ({"a.png": png(PIXELS[0, :, :, 0].astype(np.uint16))}, "a.png has more than 8 bits")])
def test_broken_sets(tmp_path, files, message):
    (tmp_path / "set").mkdir()
    with pytest.raises(ValueError, match=message):
        load_images(write(tmp_path / "set", files))


def test_broken_files(tmp_path):
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "text.tar").write_text("hello")
    np.save(tmp_path / "float.npy", np.zeros((2, 3, 8, 8), np.float32))
    np.save(tmp_path / "empty.npy", np.zeros((0, 3, 8, 8), np.uint8))
    np.save(tmp_path / "code.npy", np.array([print], dtype=object), allow_pickle=True)
    cifar10(tmp_path / "cifar-10-binary.tar.gz")
    half = (tmp_path / "cifar-10-binary.tar.gz").read_bytes()[:9000]
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(half)
    for name in ("text.npy", "text.tar", "float.npy", "empty.npy", "code.npy",
                 "cifar-10-binary.tar.gz"):
        with pytest.raises(ValueError, match=name):
            load_images(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_images(tmp_path / "nowhere")


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """A limit on the size of files stands in for the disk: a write past it fails the same way."""
    path = tmp_path / "checkpoint.pt"
    save_atomic({"x": torch.arange(3)}, path)
    code = ("import resource, signal, sys, torch; from data import save_atomic\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))\n"
            "try: save_atomic({'x': torch.zeros(1000000)}, sys.argv[1])\n"
            "except OSError as e: print('OSError', e)")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True,
                          cwd=Path(data.__file__).parent)
    assert done.stdout.startswith("OSError") and str(path) in done.stdout, done.stderr
    assert torch.equal(torch.load(path)["x"], torch.arange(3))
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_grid(tmp_path):
    save_grid(EXPECTED, tmp_path / "grid.png", columns=4, scale=2)
    grid = np.array(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 17, 2 * 35, 3)                    # 2 rows of 4, a pixel between
    assert (grid[:16:2, :16:2] == PIXELS[0]).all() and (grid[18:34:2, 18:34:2] == PIXELS[5]).all()
