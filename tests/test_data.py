"""data.py: every kind of source, and every way in which one can be broken."""
import hashlib
import http.server
import io
import json
import os
import tarfile
import threading
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import download, load_images, save_grid, save_images

PIXELS = np.random.RandomState(0).randint(0, 256, (6, 8, 8, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
NAMES = [f"train/{c}/{i}.png" for c in ("cat", "dog") for i in range(2)] + \
        [f"test/{c}/0.png" for c in ("cat", "dog")]
LABELS = [3, 0, 3, 9, 999, 1]


def png(array, mode=None, kind="PNG"):
    blob = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(blob, kind)
    return blob.getvalue()


def images(*names):
    return {name: png(p) for name, p in zip(names, PIXELS)}


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
        path.mkdir(exist_ok=True)
        for name, blob in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(blob)
    return path


def refused(path, *words):
    """load_images raises one line that begins with the path and has each of the words."""
    with pytest.raises(ValueError) as e:
        load_images(path)
    message = str(e.value)
    assert message.startswith(str(path)) and "\n" not in message, message
    assert all(word in message for word in words), message


# --------------------------------------------------------------------------- sets that are whole

@pytest.mark.parametrize("name", ["folder", "a.zip", "a.tar", "a.tar.xz", "a.tar.gz"])
@pytest.mark.parametrize("around", ["", "set/", "./"])
def test_sets_of_image_files(tmp_path, name, around):
    files = images(*(around + n for n in NAMES)) | {around + "readme.txt": b"hello"}
    path = write(tmp_path / name, dict(reversed(files.items())))
    for split, wanted, classes in (("train", slice(0, 4), [0, 0, 1, 1]),
                                   ("test", slice(4, 6), [0, 1])):
        pixels, labels = load_images(path, split)
        assert torch.equal(pixels, EXPECTED[wanted]) and pixels.dtype == torch.uint8
        assert labels.tolist() == classes and labels.dtype == torch.int64
    assert os.listdir(tmp_path) == [name]                           # nothing else was written


@pytest.mark.parametrize("names, labels", [
    (["cat/0.png", "dog/0.png", "test/0.png", "train/0.png"], [0, 1, 2, 3]),
    (["set/cat/0.png", "set/test/0.png"], [0, 1]),
    (["a/test/0.png", "b/cat/0.png"], [1, 0]),                      # deeper than the top
    (["train/0.png", "val/0.png"], [0, 1]),
    (["00000/0.png", "00001/0.png"], None),                         # EDM's folders are no classes
    (["0.png", "cat/0.png", "dog/0.png"], None),
    (["cat/0.png", "cat/1.png"], None)])
def test_folders_are_classes(tmp_path, names, labels):
    for split in ("train", "test"):
        pixels, got = load_images(write(tmp_path / "set", images(*names)), split)
        assert torch.equal(pixels, EXPECTED[:len(names)])
        assert (got if labels is None else got.tolist()) == labels


def test_both_splits_number_the_classes_alike(tmp_path):
    path = write(tmp_path / "set", images("train/a/0.png", "train/b/0.png", "train/c/0.png",
                                          "test/c/0.png"))
    assert load_images(path, "test")[1].tolist() == [2]


@pytest.mark.parametrize("channels_last", [False, True])
def test_arrays(tmp_path, channels_last):
    array = PIXELS if channels_last else EXPECTED.numpy()
    np.save(tmp_path / "a.npy", array)
    np.savez_compressed(tmp_path / "a.npz", other=np.zeros(2), labels=np.uint8([0, 1, 2, 3, 4, 5]),
                        images=np.asfortranarray(array))
    np.savez(tmp_path / "b.npz", arr_0=array)
    for name, labels in (("a.npy", None), ("a.npz", list(range(6))), ("b.npz", None)):
        pixels, got = load_images(tmp_path / name)
        assert torch.equal(pixels, EXPECTED) and pixels.is_contiguous()
        assert (got if labels is None else got.tolist()) == labels


@pytest.mark.parametrize("name", ["a.npz", "a.zip"])
@pytest.mark.parametrize("labels", [None, LABELS])
def test_save_images_reads_back(tmp_path, name, labels):
    for folder in ("new folder", "again"):
        save_images(EXPECTED, tmp_path / folder / name, labels and torch.tensor(labels))
        pixels, got = load_images(tmp_path / folder / name)
        assert torch.equal(pixels, EXPECTED)
        assert (got if labels is None else got.tolist()) == labels
    assert (tmp_path / "new folder" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_save_images_refuses_what_it_cannot_read_back(tmp_path):
    with pytest.raises(ValueError, match="labels"):
        save_images(EXPECTED, tmp_path / "a.zip", torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="a.png"):
        save_images(EXPECTED, tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("around", ["", "set/"])
def test_labels_of_edms_format(tmp_path, around):
    names = [f"00000/img{i}.png" for i in range(6)]
    listed = {"labels": [[n, label] for n, label in zip(names, LABELS)] + [["elsewhere.png", 5]]}
    files = images(*(around + n for n in names))
    for value, labels in ((listed, LABELS), ({"labels": None}, None)):
        files[around + "dataset.json"] = json.dumps(value).encode()
        got = load_images(write(tmp_path / "b.tar.gz", files))[1]
        assert (got if labels is None else got.tolist()) == labels


def test_grey_and_palette_images_become_rgb(tmp_path):
    grey = png(PIXELS[0], "L")
    pixels, _ = load_images(write(tmp_path / "a", {"a.png": grey, "b.png": png(PIXELS[0], "P")}))
    assert pixels.shape == (2, 3, 8, 8) and (pixels[0, 0] == pixels[0, 1]).all()
    assert torch.equal(pixels[0, 0], torch.from_numpy(np.array(Image.open(io.BytesIO(grey)))))


def cifar10(path, records=4):
    """A small archive in the official format: a label byte, then 3072 bytes, channels first."""
    pixels = np.random.RandomState(1).randint(0, 256, (6, records, 3073), dtype=np.uint8)
    pixels[:, :, 0] %= 10
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    files = {f"cifar-10-batches-bin/{n}": b.tobytes() for n, b in zip(names, pixels)}
    write(path, files)
    return pixels, files


def test_grid(tmp_path):
    save_grid(EXPECTED, tmp_path / "grid.png", columns=4, scale=2)
    grid = np.array(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 17, 2 * 35, 3)                    # 2 rows of 4, a pixel between
    assert (grid[:16:2, :16:2] == PIXELS[0]).all() and (grid[18:34:2, 18:34:2] == PIXELS[5]).all()
    save_grid(EXPECTED, tmp_path / "grid.png", scale=1, classes=3)
    grid = np.array(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (3 * 9 - 1, 17, 3)                     # 3 classes, 2 images of each
    assert all((grid[9 * i:9 * i + 8, 9 * j:9 * j + 8] == PIXELS[3 * j + i]).all()
               for i in range(3) for j in range(2))


# ------------------------------------------------------------------------------------- downloads

@pytest.fixture
def serve(tmp_path, monkeypatch):
    """-> function that serves these bytes, status line and all, and returns their URL."""
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


def test_cifar10_is_downloaded_checked_and_read(tmp_path, monkeypatch, serve):
    pixels, _ = cifar10(tmp_path / "cifar-10-binary.tar.gz")
    blob = (tmp_path / "cifar-10-binary.tar.gz").read_bytes()
    url = serve(whole(blob), "cifar-10-binary.tar.gz")
    monkeypatch.setattr(data, "CIFAR10", (url, hashlib.sha256(blob).hexdigest()))
    got, labels = load_images("cifar10")
    assert labels.tolist() == pixels[:5, :, 0].flatten().tolist()
    assert torch.equal(got.flatten(), torch.from_numpy(pixels[:5, :, 1:].flatten()))
    assert got.shape == (20, 3, 32, 32) and got.is_contiguous()
    serve(b"", "cifar-10-binary.tar.gz")                            # from now on from the cache
    got, _ = load_images("cifar10", split="test")
    assert torch.equal(got.flatten(), torch.from_numpy(pixels[5, :, 1:].flatten()))


def test_download_with_the_wrong_sha256_keeps_nothing(tmp_path, serve):
    url = serve(whole(b"not what was published"))
    with pytest.raises(ValueError, match="sha256"):
        download(url, "0" * 64)
    assert os.listdir(tmp_path / "cache") == []
    (tmp_path / "cache/file").write_bytes(b"put there by hand")     # and this is the user's: kept
    with pytest.raises(ValueError, match="cache/file.*sha256.*delete"):
        download(url, "0" * 64)
    assert (tmp_path / "cache/file").exists()


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("answer, reason", [
    (whole(b"x" * 2000)[:-1000], "1,000 bytes came, of 2,000"),
    (CHUNKED + b"8\r\nabc", "IncompleteRead"),
    (b"HTTP/1.0 200 OK\r\n\r\n", "0 bytes"),
    (whole(b"\n <!DOCTYPE html>\n<p>Log in"), "a web page"),
    (whole(b"<HTML><p>Log in"), "a web page"),
    (b"SSH-2.0-OpenSSH\r\n", "SSH-2.0"),                            # BadStatusLine
    (b"", "without response"),
    (b"HTTP/1.0 302 Found\r\nLocation: file:///etc/hostname\r\n\r\n", "not allowed"),
    (b"HTTP/1.0 404 Not Found\r\n\r\n", "Not Found")])
def test_what_does_not_come_whole_is_not_kept(tmp_path, serve, answer, reason):
    url = serve(answer)
    with pytest.raises(OSError, match=f"{reason}.*put it at {tmp_path}/cache/file$"):
        download(url)
    assert os.listdir(tmp_path / "cache") == []


def test_what_comes_whole_is_kept(tmp_path, serve):
    body = bytes(range(256)) * 9000                                 # several reads
    for i, answer in enumerate([whole(body), b"HTTP/1.0 200 OK\r\n\r\n" + body,
                                CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)]):
        path = download(serve(answer, f"file{i}") + "?from=a/b")
        assert path == tmp_path / f"cache/file{i}" and path.read_bytes() == body
    kept = {download(serve(whole(body), f"{run}/teacher.pt"), apart=True) for run in "abba"}
    assert len(kept) == 2 and all(path.name.endswith("_teacher.pt") for path in kept)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/w.pth", "http://127.0.0.1:port/w.pth",
                                 "http://a b/w.pth", "http://[::1/w.pth", "http:///w.pth"])
def test_download_without_a_server_names_the_place(tmp_path, serve, url):
    with pytest.raises(OSError, match=f"put it at {tmp_path}/cache/w.pth"):
        download(url, "0" * 64)
    assert os.listdir(tmp_path / "cache") == []


def test_only_http_is_downloaded(tmp_path, serve):
    (tmp_path / "file").write_bytes(b"secret")
    for url in ((tmp_path / "file").as_uri(), "ftp://127.0.0.1/file", "data:,file/file", "http://",
                serve(whole(b"x"), ""), serve(whole(b"x"), "..")):
        with pytest.raises(ValueError, match="http"):
            download(url)
    assert not (tmp_path / "cache").exists()


def test_a_broken_download_is_named_to_be_deleted(tmp_path, monkeypatch, serve):
    cifar10(tmp_path / "cifar-10-binary.tar.gz")
    half = (tmp_path / "cifar-10-binary.tar.gz").read_bytes()[:9000]
    monkeypatch.setattr(data, "CIFAR10", (serve(whole(half), "cifar-10-binary.tar.gz"), None))
    with pytest.raises(ValueError, match=f"^{tmp_path}/cache/cifar-10-binary.tar.gz.*; delete it"):
        load_images("cifar10")
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(half)         # that one is the user's
    with pytest.raises(ValueError) as e:
        load_images(tmp_path / "cifar-10-binary.tar.gz")
    assert "delete" not in str(e.value)


# --------------------------------------------------------------------------- sets that are broken

@pytest.mark.parametrize("files, words", [
    ({}, ["no images"]), ({"notes.txt": b"hello"}, ["no images"]),
    ({"test/a.png": png(PIXELS[0])}, ["no images to train"]),
    ({"a.png": png(PIXELS[0]), "b.png": png(PIXELS[0])[:60]}, ["b.png"]),
    ({"a.png": png(PIXELS[0]), "b.png": b"hello"}, ["b.png", "PNG"]),
    ({"a.png": png(PIXELS[0], kind="GIF")}, ["a.png", "PNG"]),
    ({"a.png": png(PIXELS[0]), "b.png": png(PIXELS[0, :4])}, ["b.png", "(4, 8)", "(8, 8)"]),
    ({"a.png": png(PIXELS[0, :, :, 0].astype(np.uint16))}, ["a.png", "more than 8 bits"])])
def test_broken_sets(tmp_path, files, words):
    refused(write(tmp_path / "set", files), *words)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_in_a_zip(tmp_path):
    path = write(tmp_path / "a.zip", images("a.png", "folder.png/b.png") | {"folder.png/": b""})
    assert len(load_images(path)[0]) == 2
    with zipfile.ZipFile(path, "a") as z:
        z.writestr("a.png", png(PIXELS[3]))
    refused(path, "the same name")


def test_broken_files(tmp_path):
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "text.tar").write_text("hello")
    np.save(tmp_path / "float.npy", np.zeros((2, 3, 8, 8), np.float32))
    np.save(tmp_path / "int64.npy", np.zeros((2, 3, 8, 8), np.int64))
    np.save(tmp_path / "grey.npy", np.zeros((2, 8, 8), np.uint8))
    np.save(tmp_path / "empty.npy", np.zeros((0, 3, 8, 8), np.uint8))
    np.save(tmp_path / "code.npy", np.array([print], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "empty.npz")
    cifar10(tmp_path / "cifar-10-binary.tar.gz")
    half = (tmp_path / "cifar-10-binary.tar.gz").read_bytes()[:9000]
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(half)
    save_images(EXPECTED, tmp_path / "half.zip")
    (tmp_path / "half.zip").write_bytes((tmp_path / "half.zip").read_bytes()[:300])
    for path in list(tmp_path.iterdir()):
        refused(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_images(tmp_path / "nowhere")


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path / "set", images("a.png")))
    assert len(load_images(".")[0]) == 1
    with pytest.raises(ValueError, match="name"):
        load_images("")


@pytest.mark.parametrize("labels", [
    [-3, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1000], [0.5] * 6, [1.0] * 6, [np.nan] * 6, [1, 2],
    [[1, 0]] * 6, ["a"] * 6, [True] * 6, np.uint64([2 ** 63 + 1] * 6)])
def test_labels_of_arrays_are_checked(tmp_path, labels):
    np.savez(tmp_path / "a.npz", images=PIXELS, labels=np.array(labels))
    refused(tmp_path / "a.npz", "labels")


@pytest.mark.parametrize("listed", [
    [], {}, 7, {"labels": 7}, {"labels": {"a.png": 1, "b.png": 2}}, {"labels": ["a.png", "b.png"]},
    {"labels": []}, {"labels": [["a.png", 1]]}, {"labels": [["a.png", 1, 2], ["b.png", 1, 2]]},
    *({"labels": [["a.png", 1], ["b.png", label]]}
      for label in (-1, 1000, 10 ** 30, 1.5, 2.0, float("nan"), "1", None, [0, 1], True)),
    {"labels": [[["a.png"], 1], ["b.png", 1]]}, {"labels": [["a.png", 1], [None, 2]]}])
def test_labels_of_dataset_json_are_checked(tmp_path, listed):
    files = images("a.png", "b.png") | {"dataset.json": json.dumps(listed).encode()}
    refused(write(tmp_path / "a.zip", files), "label")


@pytest.mark.parametrize("blob", [b"", b"{", b"\xff", b"[" * 100000])
def test_a_broken_dataset_json_is_named(tmp_path, blob):
    refused(write(tmp_path / "a.zip", images("a.png") | {"dataset.json": blob}), "dataset.json")


@pytest.mark.parametrize("broken", [b"", b"x" * 3072, b"x" * 3074, None])
def test_records_of_cifar10_are_counted(tmp_path, broken):
    path = tmp_path / "cifar-10-binary.tar"
    files = cifar10(path)[1]
    files["cifar-10-batches-bin/data_batch_3.bin"] = broken
    refused(write(path, {n: b for n, b in files.items() if b is not None}), "data_batch_3.bin")


# --------------------------------------------------------------- small files that claim to be large

def claim(path, files, name, how=zipfile.ZIP_DEFLATED, **claims):
    """A .zip whose directory says these things of the file: file_size, CRC."""
    with zipfile.ZipFile(path, "w", how, compresslevel=1) as z:
        for n, blob in files.items():
            z.writestr(n, blob)
        for attribute, value in claims.items():
            setattr(z.getinfo(name), attribute, value)
    return path


def test_files_that_are_no_images_are_not_read(tmp_path):
    path = claim(tmp_path / "a.zip", images("a.png") | {"video.mp4": b"x"}, "video.mp4", CRC=0)
    with zipfile.ZipFile(path) as z, pytest.raises(zipfile.BadZipFile):
        z.read("video.mp4")                                             # who reads it knows
    assert len(load_images(path)[0]) == 1


@pytest.mark.parametrize("name", ["a.png", "dataset.json"])
def test_large_files_are_not_read(tmp_path, name):
    files = images("a.png") | {"dataset.json": b'{"labels": null}'}
    refused(claim(tmp_path / "a.zip", files, name, file_size=2 ** 26 + 1), name, "67,108,865 bytes")
    write(tmp_path / "set", files)
    os.truncate(tmp_path / "set" / name, 2 ** 26 + 1)                   # sparse
    refused(tmp_path / "set", name, "67,108,865 bytes")


def test_no_more_is_expanded_than_a_zip_claims(tmp_path):
    path = claim(tmp_path / "a.zip", {"a.png": bytes(2 ** 26)}, "a.png", file_size=1000)
    tracemalloc.start()
    try:
        refused(path, "a.png")
        assert tracemalloc.get_traced_memory()[1] < 2 ** 22
    finally:
        tracemalloc.stop()
    refused(claim(path, images("a.png"), "a.png", zipfile.ZIP_LZMA), "a.png", "deflate")


def tar_claims(path, kind, size, name="a.png"):
    """A .tar whose one header says that so much follows."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    return path


def test_what_a_tar_claims_is_not_read(tmp_path):
    """Large images, and the headers of long names, which tarfile reads at once."""
    refused(tar_claims(tmp_path / "a.tar", tarfile.REGTYPE, 2 ** 34 + 1), "17,179,869,184 bytes")
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        refused(tar_claims(tmp_path / "a.tar", kind, 2 ** 33), "claims 8,589,934,592 bytes")
        refused(tar_claims(tmp_path / "a.tar", kind, -512), "claims -512 bytes")
    with tarfile.open(tmp_path / "b.tar", "w") as t:
        info = tarfile.TarInfo("a.png")
        info.pax_headers = {"size": "-1536"}                        # back to this very header
        t.addfile(info)
    refused(tmp_path / "b.tar", "17,179,869,184 bytes")
    write(tmp_path / "c.tar", {"a.png": bytes(2 ** 26 + 1)})
    refused(tmp_path / "c.tar", "a.png", "67,108,865 bytes")


def test_links_of_a_tar_are_no_images(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as t:
        for name, kind in (("b.png", tarfile.SYMTYPE), ("c.png", tarfile.LNKTYPE),
                           ("d.png", tarfile.FIFOTYPE), ("e.png", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../a.png"
            t.addfile(info)
        info = tarfile.TarInfo("../a.png")
        info.size = len(png(PIXELS[0]))
        t.addfile(info, io.BytesIO(png(PIXELS[0])))
    assert torch.equal(load_images(tmp_path / "a.tar")[0], EXPECTED[:1])
    assert os.listdir(tmp_path) == ["a.tar"] and not (tmp_path.parent / "a.png").exists()


def claimed_png(width, height):
    """A whole PNG of 8 x 8 pixels, but for its header."""
    blob = bytearray(png(PIXELS[0]))
    blob[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    blob[29:33] = zlib.crc32(blob[12:29]).to_bytes(4, "big")
    return bytes(blob)


@pytest.mark.parametrize("width, height, words", [
    (8192, 8193, "8192 x 8193 pixels"),                     # just over the limit
    (10000, 10000, "10000 x 10000 pixels"),                 # Pillow warns
    (30000, 30000, "900000000 pixels")])                    # Pillow raises
def test_images_of_many_pixels_are_not_decoded(tmp_path, recwarn, width, height, words):
    refused(write(tmp_path / "set", {"a.png": claimed_png(width, height)}), "a.png", words)
    assert not recwarn.list


def test_sets_of_many_pixels_are_not_decoded(tmp_path):
    files = {f"{i}.png": claimed_png(8192, 8192) for i in range(86)}
    refused(write(tmp_path / "set", files), "86 of (8192, 8192)")
    del files["85.png"]
    refused(write(tmp_path / "a.zip", files), "0.png", "truncated")     # a size that is allowed


def npy(shape, dtype="|u1", version=1):
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return (b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(2 * version, "little")
            + header + bytes(600))


@pytest.mark.parametrize("blob, words", [
    (npy((10 ** 9, 3, 8, 8)), "192,000,000,000 bytes"), (npy((4, 3, 8, 8)), "768 bytes"),
    (npy((2, 3, 8, 8)), "384 bytes"), (npy((-2, 3, -8, 8)), "384 bytes"),
    (npy((2, 3, 8, 8), version=2), "version"), (npy((75,), "|O"), "object")])
def test_arrays_that_claim_another_size_are_not_read(tmp_path, blob, words):
    (tmp_path / "a.npy").write_bytes(blob)
    refused(tmp_path / "a.npy", "a.npy", words)
    refused(write(tmp_path / "a.zip", {"images.npy": blob}).rename(tmp_path / "a.npz"), words)


def test_large_arrays_are_not_read(tmp_path):
    blob = npy((2 ** 26 + 1, 2 ** 6, 1, 4))
    size = len(blob) - 600 + 2 ** 34 + 256
    path = claim(tmp_path / "a.zip", {"images.npy": blob}, "images.npy", file_size=size)
    refused(path.rename(tmp_path / "a.npz"), "at most 17,179,869,184")
