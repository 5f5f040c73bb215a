"""data.py: the inputs that people bring and what is right for each, large sets, downloads."""
import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import threading
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import download, load_images, open_image, save_grid, save_images

PIXELS = np.random.RandomState(0).randint(0, 256, (6, 8, 8, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)             # (6, 3, 8, 8)
GREY = EXPECTED[:, :1]


def png(array, mode=None, kind="PNG", **how):
    blob = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(blob, kind, **how)
    return blob.getvalue()


def images(*names):
    return {name: png(p) for name, p in zip(names, PIXELS)}


def write(path, files):
    """Write `files`, name to bytes, as a folder, .zip or .tar.*; return its path."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as z:
            for name, blob in files.items():
                z.writestr(name, blob)
    elif ".tar" in path.name:
        with tarfile.open(path, "w:gz") as t:
            for name, blob in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(blob)
                t.addfile(info, io.BytesIO(blob))
    else:
        for name, blob in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(blob)
    return path


def refused(path, *words, kind=ValueError, **how):
    """Check that load_images raises one line that names the path and has each of the words."""
    with pytest.raises(kind) as e:
        load_images(path, **how)
    message = str(e.value)
    assert str(path) in message and "\n" not in message, message
    assert all(word in message for word in words), message


def same(got, pixels, labels):
    assert torch.equal(got[0], pixels) and got[0].dtype == torch.uint8
    assert got[1] is None if labels is None else got[1].tolist() == labels
    assert labels is None or got[1].dtype == torch.int64


# --------------------------------------------------------------------- folders, classes, splits

SPLIT = [f"{s}/{c}/0.png" for s in ("train", "test", "val") for c in ("cat", "dog")]


@pytest.mark.parametrize("names, split, order, labels", [
    (["a.png", "b.png"], "train", [0, 1], None),
    (["0/a.png", "10/a.png", "2/a.png", "1/a.png"], "train", [0, 3, 2, 1], [0, 1, 2, 3]),
    (["cat/0.png", "cat-2/0.png", "cat/1.png"], "train", [0, 2, 1], [0, 0, 1]),
    (["cat/in/0.png", "dog/in/0.png", "cat/out/0.png"], "train", [0, 2, 1], [0, 0, 1]),
    (["a/test/0.png", "b/cat/0.png"], "train", [0, 1], [0, 1]),         # deeper than splits lie
    (["cat/0.png", "cat/1.png"], "train", [0, 1], None),
    (SPLIT, "train", [0, 1], [0, 1]), (SPLIT, "test", [2, 3], [0, 1]),
    (SPLIT[:2] + SPLIT[4:], "test", [2, 3], [0, 1]),                    # val where there is no test
    (["Training/a.png", "Testing/a.png"], "test", [1], None),
    (["valid/a.png", "train/a.png"], "train", [1], None),
    (["train/a/0.png", "train/b/0.png", "test/b/0.png"], "test", [2], [1]),
    (["train/x/a/0.png", "train/x/b/0.png", "test/x/b/0.png"], "train", [0, 1], [0, 1]),
    (["train/a/0.png", "train/b/0.png", "test/0.png"], "test", [2], None)])
@pytest.mark.parametrize("around, kind", [("", "set"), ("", "a.zip"), ("set/", "set"),
                                          ("./one/two/", "a.zip")])
def test_folders_are_splits_and_classes(tmp_path, names, split, order, labels, around, kind):
    files = images(*(around + n for n in names)) | {around + "readme.txt": b"hello"}
    path = write(tmp_path / kind, files)
    same(load_images(path, split), EXPECTED[order], labels)
    assert os.listdir(tmp_path) == [kind]                           # nothing else was written


@pytest.mark.parametrize("names, split, word", [
    (["cat/0.png", "dog/0.png", "preview.png"], "train", "preview.png"),
    (["train/0.png", "test/0.png", "bus/0.png"], "train", "bus/0.png"),     # a split, or a class?
    (["train/0.png", "test/0.png", "preview.png"], "train", "preview.png"),
    (["cat/train/0.png", "dog/test/0.png"], "train", "cat/train/0.png"),
    (["cat/0.png", "dog/0.png"], "test", "no test images"),
    (["train/0.png"], "test", "only train"), (["test/0.png"], "train", "only test"),
    (["notes.txt"], "train", "no images"), (["cat.gif"], "train", "1 .gif files are not read")])
def test_what_can_mean_two_things_is_refused(tmp_path, names, split, word):
    refused(write(tmp_path / "set", images(*names)), word, split=split)


def test_what_is_no_image_and_what_is_linked(tmp_path, capsys):
    junk = {"__MACOSX/set/a.png": b"junk", "set/.DS_Store": b"junk", "set/._b.png": b"junk",
            "set/Thumbs.db": b"junk", "set/c.gif": b"GIF", "set/d.GIF": b"GIF", "set/e.tif": b"II"}
    path = write(tmp_path / "a.zip", images("set/a.png") | junk)
    same(load_images(path), EXPECTED[:1], None)
    assert capsys.readouterr().err == (f"{path}: 1 image of 8 x 8, RGB; no labels; 1 .tif files "
                                       "are not read; 2 .gif files are not read\n")
    write(tmp_path / "real", images("0.png", "1.png"))
    (tmp_path / "set/cat").mkdir(parents=True)
    (tmp_path / "set/cat/linked.png").symlink_to(tmp_path / "real/1.png")
    (tmp_path / "set/dog").symlink_to(tmp_path / "real")
    (tmp_path / "real/round").symlink_to(tmp_path / "set")              # would never end
    same(load_images(tmp_path / "set"), EXPECTED[[1, 0, 1]], [0, 1, 1])


@pytest.mark.parametrize("where", ["", "set/", "train/"])
def test_dataset_json_decides(tmp_path, where):
    names = [f"{i // 2}\\img{i}.png" for i in range(6)]                 # as Windows writes them
    files = images(*(where + n for n in names))
    labels = [3, 0, 3, 9, 1234, 1]
    listed = [*zip(names, labels), ["elsewhere.png", 5]]
    for value, wanted in ((listed, labels), (None, None)):
        files[where + "dataset.json"] = json.dumps({"labels": value}).encode()
        same(load_images(write(tmp_path / "a.zip", files)), EXPECTED, wanted)
        files["dataset.json" if where else "other/dataset.json"] = b"another's"
        unpacked = {name.replace("\\", "/"): blob for name, blob in files.items()}
        same(load_images(write(tmp_path / "b", unpacked)), EXPECTED, wanted)


@pytest.mark.parametrize("blob, word", [
    (b"{", "EDM"), (b"[]", "EDM"), (b'{"images": []}', "EDM"), (b'{"labels": [7]}', "EDM"),
    (b'{"labels": [["a.png", 1]]}', "label of b.png"), (b'{"labels": [["a.png", 1.5]]}', "a.png"),
    (b'{"labels": [["a.png", 1], ["b.png", -1]]}', "whole numbers")])
def test_a_broken_dataset_json_is_named(tmp_path, blob, word):
    path = write(tmp_path / "a.zip", images("a.png", "b.png") | {"dataset.json": blob})
    refused(path, "dataset.json", word)


# ------------------------------------------------------------------------------------ one image

@pytest.mark.parametrize("orientation, turn", [
    (1, lambda x: x), (2, lambda x: x[:, ::-1]), (3, lambda x: x[::-1, ::-1]),
    (4, lambda x: x[::-1]), (5, lambda x: x.transpose(1, 0, 2)), (6, lambda x: np.rot90(x, -1)),
    (7, lambda x: np.rot90(x, 2).transpose(1, 0, 2)), (8, np.rot90)])
def test_exif_turns_upright(tmp_path, orientation, turn, capsys):
    exif = Image.Exif()
    exif[274] = orientation
    path = write(tmp_path / "phone", {"a.webp": png(PIXELS[0, :, :6], kind="WebP", lossless=True,
                                                    exif=exif.tobytes())})
    assert np.array_equal(load_images(path)[0][0].permute(1, 2, 0), turn(PIXELS[0, :, :6]))
    assert ("turned upright" in capsys.readouterr().err) == (orientation > 1)


def test_a_broken_exif_is_no_orientation():
    assert open_image(io.BytesIO(png(PIXELS[0], kind="JPEG", exif=b"Exif\0\0junk"))).size == (8, 8)


def test_transparency_is_laid_on_white(tmp_path, capsys):
    alpha = np.random.RandomState(1).randint(0, 256, (8, 8, 1), dtype=np.uint8)
    share = alpha.astype(float) / 255
    for colours, channels in ((PIXELS[0], 3), (PIXELS[0, :, :, :1], 1)):
        path = write(tmp_path / "set", {"a.png": png(np.concatenate([colours, alpha], 2))})
        wanted = share * colours + (1 - share) * 255
        got = load_images(path)[0][0].permute(1, 2, 0).numpy()
        assert got.shape == (8, 8, channels) and np.abs(got - wanted).max() <= 1    # rounding
        assert capsys.readouterr().err.count("transparency laid on white") == 1
    opaque = np.concatenate([PIXELS[0], np.full_like(alpha, 255)], 2)
    assert np.array_equal(open_image(io.BytesIO(png(opaque))), PIXELS[0])
    palette = Image.fromarray(PIXELS[0, :, :, 0] // 64).convert("P")    # colours 0 to 3
    palette.putpalette([9, 9, 9, 90, 0, 0, 0, 90, 0, 0, 0, 90])
    palette.save(tmp_path / "p.png", transparency=0)
    got, index = np.array(open_image(tmp_path / "p.png")), PIXELS[0, :, :, 0] // 64
    assert (got[index == 0] == 255).all() and (got[index == 1] == [90, 0, 0]).all()


def png16(values, colour):
    """A PNG of 16 bits a channel, (H, W, C), as its standard says. colour: the type, 0 or 2 or 4"""
    def chunk(name, blob):
        check = zlib.crc32(name + blob)
        return struct.pack(">I", len(blob)) + name + blob + struct.pack(">I", check)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b""))


@pytest.mark.parametrize("colour, channels", [(0, 1), (2, 3), (4, 1)])
def test_16_bits_give_their_high_byte(tmp_path, colour, channels, capsys):
    values = np.random.RandomState(2).randint(0, 65536, (8, 6, channels))
    stored = np.concatenate([values, np.full((8, 6, 1), 65535)], 2) if colour == 4 else values
    path = tmp_path / "a.png"
    path.write_bytes(png16(stored, colour))                             # one image is a set, too
    assert np.array_equal(load_images(path)[0][0].permute(1, 2, 0), values // 256)
    assert capsys.readouterr().err.count("16 bits cut to their high byte") == 1


def test_grey_sets_have_one_channel_mixed_ones_three(tmp_path, capsys):
    grey = {f"{i}.png": png(PIXELS[i, :, :, 0]) for i in range(2)}
    same(load_images(write(tmp_path / "grey", grey)), GREY[:2], None)
    assert "8 x 8, grey;" in capsys.readouterr().err
    for name in ("9.png", "-.png"):                                     # as the last, as the first
        got = load_images(write(tmp_path / name[0], grey | {name: png(PIXELS[2])}))[0]
        order = [0, 1, 2] if name == "9.png" else [2, 0, 1]
        assert torch.equal(got, torch.cat([GREY[:2].expand(-1, 3, 8, 8), EXPECTED[2:3]])[order])
        assert "grey made RGB" in capsys.readouterr().err


def test_middle_squares(tmp_path, capsys):
    big = np.random.RandomState(3).randint(0, 256, (40, 65, 3), dtype=np.uint8)
    files = {"a.png": png(big), "b.png": png(big[:33, :20]), "c.png": png(PIXELS[0])}
    path = write(tmp_path / "set", files)
    refused(path, "a.png is 65 x 40", "b.png 20 x 33", "--size")
    got = load_images(path, size=8)[0].permute(0, 2, 3, 1).numpy()
    for image, square in zip(got, (big[:, 12:52], big[6:26, :20])):
        assert np.array_equal(image, Image.fromarray(square).resize((8, 8), Image.LANCZOS))
    assert np.array_equal(got[2], PIXELS[0])                            # has the size: untouched
    assert "resized to 8 x 8" in capsys.readouterr().err
    np.save(tmp_path / "a.npy", big[None])
    assert np.array_equal(load_images(tmp_path / "a.npy", size=8)[0][0].permute(1, 2, 0), got[0])
    np.save(tmp_path / "a.npy", big[None, :, :, 0])
    assert load_images(tmp_path / "a.npy", size=16)[0].shape == (1, 1, 16, 16)


@pytest.mark.parametrize("blob, word", [(png(PIXELS[0])[:90], "truncated"), (b"", "not a PNG"),
                                        (png(PIXELS[0], kind="GIF"), "not a PNG")])
def test_a_broken_image_is_named_and_the_others_counted(tmp_path, blob, word):
    files = images("a.png", "b.png", "c.png") | {"b.png": blob}
    refused(write(tmp_path / "set", files), "b.png", word, "1 of 3", "other 2 are fine")
    with pytest.raises(ValueError, match=f"^{tmp_path}/set/b.png: .*{word}"):
        open_image(tmp_path / "set/b.png")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_image(tmp_path / "nowhere.png")


# --------------------------------------------------------------------------------------- arrays

@pytest.mark.parametrize("array, wanted", [
    (PIXELS, EXPECTED), (EXPECTED.numpy(), EXPECTED), (np.asfortranarray(PIXELS), EXPECTED),
    (PIXELS[..., 0], GREY), (PIXELS[..., :1], GREY), (GREY.numpy(), GREY)])
@pytest.mark.parametrize("names", [("images", "labels"), ("arr_0", "arr_1"), ("x_train", "y_train"),
                                   ("train_images", "train_labels")])
def test_arrays(tmp_path, array, wanted, names):
    np.save(tmp_path / "a.npy", array)
    pixels, labels = load_images(tmp_path / "a.npy")
    assert torch.equal(pixels, wanted) and pixels.is_contiguous() and labels is None
    digits = np.uint8([3, 1, 4, 1, 5, 9])
    for labels in (digits, digits[:, None]):
        np.savez(tmp_path / "a.npz", **{names[1]: labels, names[0]: array})
        same(load_images(tmp_path / "a.npz"), wanted, digits.tolist())


def test_arrays_have_splits(tmp_path):
    path = tmp_path / "mnist.npz"
    x, y = PIXELS[..., 0], np.arange(6)
    np.savez(path, x_test=x[4:], y_test=y[4:], x_train=x[:4], y_train=y[:4])
    same(load_images(path), GREY[:4], [0, 1, 2, 3])
    same(load_images(path, "test"), GREY[4:], [4, 5])
    np.savez(path, val_images=x[4:], val_labels=y[4:], train_images=x[:4])
    same(load_images(path), GREY[:4], None)
    same(load_images(path, "test"), GREY[4:], [4, 5])
    np.savez(path, arr_0=x, mu=np.zeros(2), sigma=np.eye(2))            # ADM's reference batches
    same(load_images(path), GREY, None)
    refused(path, "no test images", split="test")


@pytest.mark.parametrize("arrays, word", [
    ({"images": PIXELS, "targets": [1] * 6}, "images, targets"), ({"a": PIXELS}, "called a"),
    ({"arr_0": PIXELS, "labels": [1] * 6}, "arr_0, labels"), ({}, "called nothing"),
    ({"labels": [1]}, "no train images"), ({"images": PIXELS / 255}, "float64"),
    ({"images": PIXELS.astype(int)}, "int64"), ({"images": PIXELS[0]}, "(8, 8, 3)"),
    ({"images": PIXELS[..., :2]}, "(6, 8, 8, 2)"), ({"images": PIXELS[:0]}, "no images"),
    *(({"images": PIXELS, "labels": np.array(labels)}, "labels") for labels in (
        [-3, 0, 0, 0, 0, 0], [0.5] * 6, [1.0] * 6, [1, 2], [[1, 0]] * 6, ["a"] * 6, [True] * 6))])
def test_other_arrays_are_refused(tmp_path, arrays, word):
    np.savez(tmp_path / "a.npz", **arrays)
    refused(tmp_path / "a.npz", word)


def test_broken_files(tmp_path):
    for name in ("text.npy", "text.npz", "text.tar", "text.zip", "text"):
        (tmp_path / name).write_text("hello")
    np.save(tmp_path / "code.npy", np.array([print], dtype=object), allow_pickle=True)
    save_images(EXPECTED, tmp_path / "whole.zip")
    (tmp_path / "half.zip").write_bytes((tmp_path / "whole.zip").read_bytes()[:300])
    (tmp_path / "whole.zip").unlink()
    write(tmp_path / "photos.tar.gz", images("a.png"))
    for path in list(tmp_path.iterdir()):
        refused(path)
    refused(tmp_path / "nowhere", "no such", kind=FileNotFoundError)
    for source, split in (("", "train"), ("cifar10", "val")):           # "" is not the folder "."
        with pytest.raises(ValueError, match="name"):
            load_images(source, split)


# ------------------------------------------------------------------------------------- CIFAR-10

def records():
    """Four images a batch in the official format: a label byte, then 3072 bytes, channels first."""
    pixels = np.random.RandomState(1).randint(0, 256, (6, 4, 3073), dtype=np.uint8)
    pixels[:, :, 0] %= 10
    return dict(zip([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"], pixels))


class Python2(pickle._Pickler):
    """Pickles as Python 2 did, in which torchvision's files were written: bytes are its texts."""
    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, blob):
        self.write(pickle.BINSTRING + struct.pack("<i", len(blob)) + blob)

    def save_str(self, text):
        self.save_bytes(text.encode())

    dispatch[bytes], dispatch[str] = save_bytes, save_str


def batches(kind):
    files = {}
    for name, pixels in records().items():
        blob = io.BytesIO(pixels.tobytes())
        if kind == "py":
            blob = io.BytesIO()
            Python2(blob, 2).dump({"batch_label": "of 5", "labels": pixels[:, 0].tolist(),
                                   "data": pixels[:, 1:], "filenames": ["a.png"] * 4})
        files[f"cifar-10-batches-{kind}/{name}{'.bin' * (kind == 'bin')}"] = blob.getvalue()
    return files


@pytest.mark.parametrize("kind, name", [("bin", "cifar-10-binary.tar.gz"), ("bin", "folder"),
                                        ("py", "cifar-10-python.tar.gz"), ("py", "folder")])
def test_cifar10(tmp_path, kind, name):
    path = write(tmp_path / name, dict(reversed(batches(kind).items())))
    *train, test = records().values()
    for split, pixels in (("train", np.concatenate(train)), ("test", test)):
        same(load_images(path, split), torch.from_numpy(pixels[:, 1:]).view(-1, 3, 32, 32),
             pixels[:, 0].tolist())
    if name == "folder":
        same(load_images(path / f"cifar-10-batches-{kind}", "test"), torch.from_numpy(
            test[:, 1:]).reshape(-1, 3, 32, 32), test[:, 0].tolist())


def test_pickles_of_cifar10_run_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    files = batches("py") | {"cifar-10-batches-py/test_batch": pickle.dumps({"data": Evil()})}
    refused(write(tmp_path / "set", files), "mkdir", split="test")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("broken", [b"", b"x" * 3072, b"x" * 3074, None])
def test_records_of_cifar10_are_counted(tmp_path, broken):
    files = batches("bin") | {"cifar-10-batches-bin/data_batch_3.bin": broken}
    files = {name: blob for name, blob in files.items() if blob is not None}
    refused(write(tmp_path / "a.tar.gz", files), "data_batch_3.bin")


# ---------------------------------------------------------------- speed, memory and large sets

def peak(path):
    """Return the images, and the most bytes that Python and numpy had while loading them."""
    tracemalloc.start()
    try:
        return load_images(path)[0], tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_set_is_read_once_and_is_in_memory_once(tmp_path, monkeypatch):
    blob = png(PIXELS[0].repeat(4, 0).repeat(4, 1))                 # 32 x 32
    path = write(tmp_path / "set", {f"{i % 10}/{i}.png": blob for i in range(1000)})
    read, seen = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda file: seen.append(str(file)) or read(file))
    pixels, most = peak(path)
    assert most < 1.5 * pixels.nbytes                               # 3 MB, and the names
    assert len(seen) == len(set(seen)) == 1000
    for array in (pixels.numpy(), pixels.permute(0, 2, 3, 1).numpy()):
        np.save(tmp_path / "a.npy", np.ascontiguousarray(array))
        monkeypatch.setattr(data, "MAPPED", pixels.nbytes)          # large: mapped as it is
        mapped, most = peak(tmp_path / "a.npy")
        assert torch.equal(mapped, pixels) and most < pixels.nbytes / 10


@pytest.fixture
def large(tmp_path, monkeypatch):
    """Return a .zip of six images, with labels, that counts as large; and what was decoded of it,
    by thread."""
    decoded = []
    monkeypatch.setenv("DI_BREGMAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "MAPPED", PIXELS.nbytes)
    monkeypatch.setattr(data, "open_image", lambda *a: decoded.append(threading.get_ident())
                        or open_image(*a))
    save_images(EXPECTED, tmp_path / "set/photos.zip", torch.arange(6))
    return tmp_path / "set/photos.zip", decoded


def test_large_sets_are_decoded_once_and_mapped(large, capsys):
    path, decoded = large
    assert load_images(path, size=16)[0].shape == (6, 3, 16, 16)
    for times in (12, 13):                                          # the first one, for its size
        pixels, labels = load_images(path)
        same((pixels, labels), EXPECTED, [0, 1, 2, 3, 4, 5])
        assert len(decoded) == times
        pixels.zero_()                                              # in memory, not in the file
    file = Path(capsys.readouterr().err.rsplit("memory-mapped from ")[-1].strip())
    assert file.parent == path.parent and np.array_equal(np.load(file), EXPECTED)
    save_images(EXPECTED.flip(0), path)                             # another set of this name
    same(load_images(path), EXPECTED.flip(0), None)
    assert len(list(path.parent.glob("photos.zip.*.npy"))) == 3


@pytest.mark.parametrize("full", [True, False])
def test_large_sets_where_one_cannot_write(large, tmp_path, monkeypatch, full):
    path, access, free = large[0], os.access, PIXELS.nbytes if full else 10 ** 9
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(0, 0, free))
    if not full:
        monkeypatch.setattr(os, "access",
                            lambda p, mode: Path(p) != path.parent and access(p, mode))
    same(load_images(path), EXPECTED, [0, 1, 2, 3, 4, 5])
    assert len(list((tmp_path / "cache").glob("photos.zip.*.npy"))) == 1
    assert len(list(path.parent.iterdir())) == 1
    monkeypatch.setattr(os, "access", lambda p, mode: False)
    save_images(EXPECTED.flip(0), path)
    refused(path, "cache", "set DI_BREGMAN_CACHE")


def test_large_folders(large, tmp_path):
    path, decoded = tmp_path / "set", large[1]
    large[0].unlink()
    grey = {f"{i}.png": png(PIXELS[i, :, :, 0]) for i in range(5)}
    wanted = torch.cat([GREY[:5].expand(-1, 3, 8, 8), EXPECTED[5:]])
    write(path, grey | {"5.png": b"hello"})
    data.MAPPED = 6 * 64
    refused(path, "5.png")
    assert not list(tmp_path.glob("*.npy"))                         # nothing half made is left
    write(path, {"5.png": png(PIXELS[5])})
    for _ in range(2):
        before = len(decoded)
        same(load_images(path), wanted, None)                       # grey at first, then in colour
    assert len(decoded) == before + 1
    write(path, {"0.png": png(255 - PIXELS[0, :, :, 0])})           # other pixels, the same name
    os.utime(path / "0.png", (1, 1))
    assert torch.equal(load_images(path)[0][0, 0], 255 - wanted[0, 0])


def test_two_that_start_together_decode_a_set_once(large):
    path, decoded = large
    threads = [threading.Thread(target=load_images, args=(path,)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(decoded) - len(threads) <= 5                 # each its first one, one all the others
    same(load_images(path), EXPECTED, [0, 1, 2, 3, 4, 5])


def test_the_first_process_says_what_it_found(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "set", images(*SPLIT))
    load_images(path)
    assert capsys.readouterr().err == (f"{path}: 2 images of 8 x 8, RGB; 2 classes from folders; "
                                       "the split train (of test, train, val)\n")
    monkeypatch.setenv("RANK", "1")
    load_images(path)
    assert not capsys.readouterr().err


# ------------------------------------------------------------------------------------- downloads

@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Return a function that serves these bytes, status line and all, and returns their URL."""
    answers = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.wfile.write(answers[self.path.split("?")[0]])

        def log_message(self, *_):
            pass

    def serve(answer, name="file"):
        answers["/" + name] = answer
        return f"http://127.0.0.1:{server.server_port}/{name}"

    monkeypatch.setenv("DI_BREGMAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield serve
    server.shutdown()
    server.server_close()


def whole(body):
    return b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def test_cifar10_is_downloaded_once_and_checked(tmp_path, monkeypatch, serve):
    blob = write(tmp_path / "cifar-10-binary.tar.gz", batches("bin")).read_bytes()
    url = serve(whole(blob), "cifar-10-binary.tar.gz")
    monkeypatch.setattr(data, "CIFAR10", (url, hashlib.sha256(blob).hexdigest()))
    assert load_images("cifar10")[0].shape == (20, 3, 32, 32)
    serve(b"", "cifar-10-binary.tar.gz")                            # from now on from the cache
    assert load_images("cifar10", "test", size=16)[0].shape == (4, 3, 16, 16)
    kept = tmp_path / "cache/cifar-10-binary.tar.gz"
    kept.write_bytes(blob[:9000])
    refused("cifar10", str(kept), "sha256", "delete it")
    monkeypatch.setattr(data, "CIFAR10", (url, ""))
    refused("cifar10", str(kept), "delete it")


def test_what_is_not_the_file_is_not_kept(tmp_path, serve):
    for answer, sha256, reason in (
            (whole(b"another file"), "0" * 64, "sha256"), (whole(b""), "", "empty"),
            (whole(b"\n <!DOCTYPE html>\n<p>Log in"), "", "a web page"),
            (whole(b"<HTML><p>Log in"), "0" * 64, "a web page"),
            (whole(b"x" * 2000)[:-1000], hashlib.sha256(b"x" * 2000).hexdigest(), "sha256"),
            (b"HTTP/1.0 404 Not Found\r\n\r\n", "", "Not Found"), (b"SSH-2.0\r\n", "", "SSH-2.0")):
        with pytest.raises(OSError, match=f"{reason}.*put it at {tmp_path}/cache/file$"):
            download(serve(answer), sha256)
        assert os.listdir(tmp_path / "cache") == []
    with pytest.raises(OSError, match=f"refused.*put it at {tmp_path}/cache/w.pth$"):
        download("http://127.0.0.1:9/w.pth")


def test_a_file_put_there_by_hand_will_do(tmp_path, serve):
    url = serve(b"")
    assert download(serve(whole(b"body"), "other") + "?from=a/b").read_bytes() == b"body"
    (tmp_path / "cache/file").write_bytes(b"by hand")
    for sha256 in ("", hashlib.sha256(b"by hand").hexdigest()):
        assert download(url, sha256) == tmp_path / "cache/file"
    for blob, sha256 in ((b"by hand", "0" * 64), (b"<html>", "")):
        (tmp_path / "cache/file").write_bytes(blob)
        with pytest.raises(ValueError, match=f"^{tmp_path}/cache/file: .*delete it"):
            download(url, sha256)
        assert (tmp_path / "cache/file").exists()                   # the user's


def test_where_downloads_cannot_be_kept(tmp_path, monkeypatch, serve):
    url = serve(whole(b"body"))
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("DI_BREGMAN_CACHE", str(tmp_path / "a file/cache"))
    with pytest.raises(OSError, match="a file.*set DI_BREGMAN_CACHE"):
        download(url)
    monkeypatch.delenv("DI_BREGMAN_CACHE")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)   # as where there is no home
    with pytest.raises(OSError, match="home.*set DI_BREGMAN_CACHE"):
        download(url)


# ------------------------------------------------------------------------------------ images out

@pytest.mark.parametrize("pixels", [EXPECTED, GREY])
@pytest.mark.parametrize("name", ["a.npz", "a.zip"])
@pytest.mark.parametrize("labels", [None, [3, 0, 3, 9, 999, 1]])
def test_save_images_reads_back(tmp_path, pixels, name, labels):
    for folder in ("new folder", "again"):
        save_images(pixels, tmp_path / folder / name, labels and torch.tensor(labels))
        same(load_images(tmp_path / folder / name), pixels, labels)
    assert (tmp_path / "new folder" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_save_images_refuses_what_it_cannot_read_back(tmp_path):
    with pytest.raises(ValueError, match="labels"):
        save_images(EXPECTED, tmp_path / "a.zip", torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="a.png"):
        save_images(EXPECTED, tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("pixels", [EXPECTED, GREY])
def test_grid(tmp_path, pixels):
    wanted = pixels.expand(-1, 3, 8, 8).permute(0, 2, 3, 1).numpy()
    save_grid(pixels, tmp_path / "grid.png", columns=4, scale=2)
    grid = np.array(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 17, 2 * 35, 3)                    # 2 rows of 4, a pixel between
    assert (grid[:16:2, :16:2] == wanted[0]).all() and (grid[18:34:2, 18:34:2] == wanted[5]).all()
    save_grid(pixels, tmp_path / "grid.png", scale=1, classes=3)
    grid = np.array(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (3 * 9 - 1, 17, 3)                     # 3 classes, 2 images of each
    assert all((grid[9 * i:9 * i + 8, 9 * j:9 * j + 8] == wanted[3 * j + i]).all()
               for i in range(3) for j in range(2))
