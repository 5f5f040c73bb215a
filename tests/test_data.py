"""data.py: the inputs that people bring and what is right for each, large sets, downloads."""
import hashlib
import io
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import download, load_images, open_image, save_grid, save_images

PIXELS = np.random.RandomState(0).randint(0, 256, (6, 8, 8, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)             # (6, 3, 8, 8)
GREY = EXPECTED[:, :1]
RECORDS = np.random.RandomState(1).randint(0, 10, (6, 4, 3073), dtype=np.uint8)     # label, pixels
NAMES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
BATCHES = {f"cifar-10-batches-bin/{name}": r.tobytes() for name, r in zip(NAMES, RECORDS)}


def png(array, kind="PNG", **how):
    blob = io.BytesIO()
    Image.fromarray(array).save(blob, kind, **how)
    return blob.getvalue()


def images(*names):
    return {name: png(p) for name, p in zip(names, PIXELS)}


def write(path, files):
    """Write `files`, name to bytes, as a folder, .zip or .tar.gz, or arrays, by name, as an .npz,
    or bytes as they are; return its path."""
    if isinstance(files, bytes):
        path.write_bytes(files)
        return path
    if path.suffix == ".npz":
        np.savez(path, **files)
        return path
    name, _, ending = path.name.partition(".")
    folder = path.with_name(f"in {name}") if ending else path
    for file, blob in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(blob)
    if ending:
        shutil.make_archive(path.with_name(name), "zip" if ending == "zip" else "gztar", folder)
    return path


def refused(path, *words, **how):
    """Check that load_images raises one line that names the path and has each of the words."""
    with pytest.raises(ValueError) as e:
        load_images(path, **how)
    message = str(e.value)
    assert str(path) in message and "\n" not in message, message
    assert all(word in message for word in words), message


def same(got, pixels, labels=None):
    assert torch.equal(got[0], pixels) and got[0].dtype == torch.uint8
    assert got[1] is None if labels is None else got[1].tolist() == labels
    assert labels is None or got[1].dtype == torch.int64


# --------------------------------------------------------------------- folders, classes, splits

SPLIT = [f"{s}/{c}/0.png" for s in ("train", "test", "val") for c in ("cat", "dog")]


@pytest.mark.parametrize("names, split, order, labels", [
    (["a.png", "b.png"], "train", [0, 1], None),
    (["a.png/0.png", "b.png/0.png"], "train", [0, 1], [0, 1]),          # folders of such names
    (["0/a.png", "10/a.png", "2/a.png", "1/a.png"], "train", [0, 3, 2, 1], [0, 1, 2, 3]),
    (["cat/in/0.png", "dog/in/0.png", "cat/out/0.png"], "train", [0, 2, 1], [0, 0, 1]),
    (["a/test/0.png", "b/cat/0.png"], "train", [0, 1], [0, 1]),         # deeper than splits lie
    (SPLIT, "train", [0, 1], [0, 1]), (SPLIT, "test", [2, 3], [0, 1]),
    (SPLIT[:2] + SPLIT[4:], "test", [2, 3], [0, 1]),                    # val where there is no test
    (["Train/a/0.png", "Train/b/0.png", "test/b/0.png"], "test", [2], [1]),
    (["train/x/a/0.png", "train/x/b/0.png", "test/x/b/0.png"], "train", [0, 1], [0, 1])])
@pytest.mark.parametrize("around, kind", [("", "set"), ("one/two/", "a.zip")])
def test_folders_are_splits_and_classes(tmp_path, names, split, order, labels, around, kind):
    files = images(*(around + n for n in names)) | {around + "readme.txt": b"hello"}
    same(load_images(write(tmp_path / kind, files), split), EXPECTED[order], labels)


def test_what_is_no_image_is_left_out_and_counted(tmp_path, capsys):
    junk = {"__MACOSX/set/a.png": b"junk", "set/.DS_Store": b"junk", "set/._b.png": b"junk",
            "set/c.gif": b"GIF", "set/d.GIF": b"GIF", "set/e.tif": b"II"}
    same(load_images(write(tmp_path / "a.zip", images("set/a.png") | junk)), EXPECTED[:1])
    said = capsys.readouterr().err
    assert "1 image" in said and "1 .tif" in said and "2 .gif" in said


def test_links_are_followed(tmp_path):
    write(tmp_path / "real", images("0.png", "1.png"))
    (tmp_path / "set/cat").mkdir(parents=True)
    (tmp_path / "set/cat/linked.png").symlink_to(tmp_path / "real/1.png")
    (tmp_path / "set/dog").symlink_to(tmp_path / "real")
    same(load_images(tmp_path / "set"), EXPECTED[[1, 0, 1]], [0, 1, 1])


@pytest.mark.parametrize("where, other", [("", "other/"), ("train/", "")])
@pytest.mark.parametrize("labels", [None, [3, 0, 3, 9, 1234, 1]])
def test_dataset_json_decides(tmp_path, where, other, labels):
    """The one nearest to the images; its names may be Windows', and those of other files, too."""
    names = [f"{i // 2}\\img{i}.png" for i in range(6)]
    listed = json.dumps({"labels": labels and [*zip(names, labels), ["elsewhere.png", 5]]})
    files = images(*(where + n for n in names)) | {
        where + "dataset.json": listed.encode(), other + "dataset.json": b"another's"}
    same(load_images(write(tmp_path / "a.zip", files)), EXPECTED, labels)
    files = {name.replace("\\", "/"): blob for name, blob in files.items()}
    same(load_images(write(tmp_path / "b", files)), EXPECTED, labels)


@pytest.mark.parametrize("name, files, split, words", [
    # what can mean two things
    ("set", images("cat/0.png", "dog/0.png", "preview.png"), "train", ["preview.png", "cat"]),
    ("set", images("train/0.png", "test/0.png", "bus/0.png"), "train", ["bus/0.png"]),
    ("set", images("cat/train/0.png", "dog/test/0.png"), "train", ["cat/train/0.png"]),
    ("set", images("cat/0.png", "dog/0.png"), "test", ["no test images"]),
    # no images, broken ones, and a format that is not read, whatever its name
    ("set", {"a.txt": b"", "cat.gif": b""}, "train", ["no images", "1 .gif"]),
    ("a.npz", {"images": PIXELS[:0]}, "train", ["no images"]),
    ("set", images("a.png", "c.png") | {"b.png": png(PIXELS[0])[:90]}, "train", ["b.png", "1 of"]),
    ("set", {"b.png": png(PIXELS[0], kind="GIF")}, "train", ["b.png: not a PNG"]),
    ("text.zip", b"hello", "train", []), ("text.npy", b"hello", "train", []),
    # labels that do not fit the images
    ("a.zip", images("a.png", "b.png") | {"dataset.json": b'{"labels": [["a.png", 1]]}'}, "train",
     ["dataset.json", "b.png"]),
    ("a.npz", {"images": PIXELS, "labels": [-3, 0, 0, 0, 0, 0]}, "train", ["labels"]),
    ("a.npz", {"images": PIXELS, "labels": [1, 2]}, "train", ["labels"]),
    # CIFAR-10 in part and as torchvision's pickle, and arrays of another kind
    ("set", {name: blob for name, blob in BATCHES.items() if "3" not in name}, "train",
     ["no data_batch_3.bin"]),
    ("a.tar.gz", {"cifar-10-batches-py/data_batch_1": b"pickle"}, "train", ["no data_batch_1.bin"]),
    ("a.npz", {"images": PIXELS, "targets": [1] * 6}, "train", ["images, targets"]),
    ("a.npz", {"images": PIXELS / 255}, "train", ["float64"]),
    ("a.npz", {"images": PIXELS[0]}, "train", ["(8, 8, 3)"])])              # one image, not a set
def test_what_is_no_set_is_refused_in_a_line(tmp_path, name, files, split, words):
    refused(write(tmp_path / name, files), *words, split=split)


# ------------------------------------------------------------------------------------ one image

def test_exif_turns_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    photo = png(PIXELS[0, :, :6], kind="WebP", lossless=True, exif=exif.tobytes())
    got = load_images(write(tmp_path / "phone", {"a.webp": photo}))[0][0]
    assert np.array_equal(got.permute(1, 2, 0), np.rot90(PIXELS[0, :, :6], -1))


def test_transparency_is_laid_on_white(tmp_path):
    alpha = np.random.RandomState(1).randint(0, 256, (8, 8, 1), dtype=np.uint8)
    share = alpha.astype(float) / 255
    for colours, channels in ((PIXELS[0], 3), (PIXELS[0, :, :, :1], 1)):
        path = write(tmp_path / "set", {"a.png": png(np.concatenate([colours, alpha], 2))})
        wanted = share * colours + (1 - share) * 255
        got = load_images(path)[0][0].permute(1, 2, 0).numpy()
        assert got.shape == (8, 8, channels) and np.abs(got - wanted).max() <= 1    # rounding


def test_16_bits_give_their_high_byte(tmp_path):
    values = np.random.RandomState(2).randint(0, 65536, (8, 6), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    same(load_images(tmp_path / "a.png"), torch.from_numpy(values // 256)[None, None].byte())


def test_grey_sets_have_one_channel_mixed_ones_three(tmp_path):
    grey = {f"{i}.png": png(PIXELS[i, :, :, 0]) for i in range(2)}
    same(load_images(write(tmp_path / "grey", grey)), GREY[:2])
    for name, order in (("9.png", [0, 1, 2]), ("-.png", [2, 0, 1])):    # as the last, as the first
        got = load_images(write(tmp_path / name[0], grey | {name: png(PIXELS[2])}))[0]
        assert torch.equal(got, torch.cat([GREY[:2].expand(-1, 3, 8, 8), EXPECTED[2:3]])[order])


def test_middle_squares(tmp_path):
    big = np.random.RandomState(3).randint(0, 256, (40, 65, 3), dtype=np.uint8)
    files = {"a.png": png(big), "b.png": png(big[:33, :20]), "c.png": png(PIXELS[0])}
    path = write(tmp_path / "set", files)
    refused(path, "a.png is 65 x 40", "b.png 20 x 33", "--size")
    got = load_images(path, size=8)[0].permute(0, 2, 3, 1).numpy()
    for image, square in zip(got, (big[:, 12:52], big[6:26, :20])):
        assert np.array_equal(image, Image.fromarray(square).resize((8, 8), Image.LANCZOS))
    assert np.array_equal(got[2], PIXELS[0])                            # has the size: untouched
    np.savez(tmp_path / "a.npz", images=big[None])
    resized = load_images(tmp_path / "a.npz", size=8)[0]
    assert np.array_equal(resized[0].permute(1, 2, 0), got[0])


# ------------------------------------------------------------------------- arrays and CIFAR-10

@pytest.mark.parametrize("array, wanted", [
    (PIXELS, EXPECTED), (EXPECTED.numpy(), EXPECTED), (np.asfortranarray(PIXELS), EXPECTED),
    (PIXELS[..., 0], GREY), (PIXELS[..., :1], GREY), (GREY.numpy(), GREY)])
def test_arrays(tmp_path, array, wanted):
    np.save(tmp_path / "a.npy", array)
    pixels, labels = load_images(tmp_path / "a.npy")
    assert torch.equal(pixels, wanted) and pixels.is_contiguous() and labels is None
    digits = np.uint8([3, 1, 4, 1, 5, 9])
    for name, label in (("images", "labels"), ("arr_0", "arr_1"), ("x_train", "y_train")):
        for labels in (digits, digits[:, None]):
            np.savez(tmp_path / "a.npz", **{label: labels, name: array})
            same(load_images(tmp_path / "a.npz"), wanted, digits.tolist())


def test_arrays_have_splits(tmp_path):
    x, y = PIXELS[..., 0], np.arange(6)
    np.savez(tmp_path / "a.npz", x_test=x[4:], y_test=y[4:], x_train=x[:4], y_train=y[:4])
    same(load_images(tmp_path / "a.npz"), GREY[:4], [0, 1, 2, 3])
    same(load_images(tmp_path / "a.npz", "test"), GREY[4:], [4, 5])


@pytest.mark.parametrize("name", ["cifar-10-binary.tar.gz", "folder"])
def test_cifar10(tmp_path, name):
    path = write(tmp_path / name, dict(reversed(BATCHES.items())))
    for split, records in (("train", RECORDS[:5].reshape(20, -1)), ("test", RECORDS[5])):
        same(load_images(path, split), torch.from_numpy(records[:, 1:]).view(-1, 3, 32, 32),
             records[:, 0].tolist())


# ---------------------------------------------------------------------- large sets and downloads

@pytest.mark.parametrize("writable", [True, False])
def test_large_sets_are_decoded_once_and_mapped(tmp_path, monkeypatch, writable):
    """From a file beside the set or, where one can't write there, in the cache."""
    path = write(tmp_path / "set", images(*(f"{i}/photo.png" for i in range(6))))
    decoded = []
    monkeypatch.setattr(data, "MAPPED", PIXELS.nbytes)              # six images count as large
    monkeypatch.setattr(data, "open_image", lambda *a: decoded.append(a) or open_image(*a))
    monkeypatch.setattr(os, "access", lambda folder, mode: writable)
    monkeypatch.setenv("DI_BREGMAN_CACHE", str(tmp_path / "cache"))
    for times in (7, 9):                        # a set's first image says its size and its mode
        pixels, labels = load_images(path)
        same((pixels, labels), EXPECTED, [0, 1, 2, 3, 4, 5])
        assert len(decoded) == times
        pixels.zero_()                                              # in memory, not in the file
    kept = tmp_path if writable else tmp_path / "cache"
    assert [*tmp_path.rglob("*.npy")] == [*kept.glob("set.*.npy")] != []
    assert load_images(path, size=16)[0].shape == (6, 3, 16, 16)
    write(path, {"5/photo.png": png(PIXELS[0])})                    # other pixels, the same name
    os.utime(path / "5/photo.png", (2e9, 2e9))
    assert torch.equal(load_images(path)[0], EXPECTED[[0, 1, 2, 3, 4, 0]])


@pytest.mark.parametrize("name, write", [("a.npy", np.save), ("a.npz", np.savez)])
def test_large_arrays_are_mapped_and_stay_as_they_are(tmp_path, monkeypatch, name, write):
    """An .npz can't be mapped, so it is laid out as every smaller array."""
    monkeypatch.setattr(data, "MAPPED", PIXELS.nbytes)
    write(tmp_path / name, PIXELS)
    for _ in range(2):
        pixels = load_images(tmp_path / name)[0]
        assert torch.equal(pixels, EXPECTED) and pixels.is_contiguous() == (name == "a.npz")
        pixels.zero_()
    assert [*tmp_path.iterdir()] == [tmp_path / name]


def test_cifar10_is_downloaded_once(tmp_path, monkeypatch):
    web, cache = write(tmp_path / "cifar.tar.gz", BATCHES), tmp_path / "cache"
    archive = web.read_bytes()
    monkeypatch.setattr(data, "CIFAR10", (web.as_uri(), hashlib.sha256(archive).hexdigest()))
    monkeypatch.setenv("DI_BREGMAN_CACHE", str(cache))
    with pytest.raises(OSError, match=f"refused.*put it at {cache}/w.pth"):
        download("http://127.0.0.1:9/w.pth")
    web.write_bytes(b"another file")
    with pytest.raises(OSError, match=f"hash.*put it at {cache}/cifar.tar.gz"):
        load_images("cifar10")
    assert os.listdir(cache) == []                                  # what is not the file is no use
    web.write_bytes(archive)
    assert load_images("cifar10")[0].shape == (20, 3, 32, 32)
    web.unlink()                                                    # from now on from the cache
    assert load_images("cifar10", "test")[0].shape == (4, 3, 32, 32)


# ------------------------------------------------------------------------------------ images out

@pytest.mark.parametrize("pixels", [EXPECTED, GREY])
@pytest.mark.parametrize("name", ["a.npz", "a.zip"])
@pytest.mark.parametrize("labels", [None, [3, 0, 3, 9, 999, 1]])
def test_save_images_reads_back(tmp_path, pixels, name, labels):
    for folder in ("new folder", "again"):
        save_images(pixels, tmp_path / folder / name, labels and torch.tensor(labels))
        same(load_images(tmp_path / folder / name), pixels, labels)
    assert (tmp_path / "new folder" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    with pytest.raises(ValueError, match="a.png"):
        save_images(EXPECTED, tmp_path / "a.png")


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
