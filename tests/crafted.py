"""Hostile files for attack.py: each function yields (name, path, expected): "refuse", or "either"
where chance may leave the file as good as it was. `rng` is Python's random.Random."""
import copy
import io
import json
import pickle
import struct
import sys
import tarfile
import types
import warnings
import zipfile
import zlib
from collections import OrderedDict

import numpy as np
import torch

IMAGES = np.random.RandomState(0).randint(0, 256, (64, 3, 32, 32), np.uint8)


# ------------------------------------------------------------------------------ our checkpoints

def places(node, here=()):
    """The path of every value in nested dictionaries and lists."""
    children = (node.items() if isinstance(node, dict) else
                enumerate(node) if isinstance(node, list) else ())
    for key, child in children:
        yield (*here, key)
        yield from places(child, (*here, key))


def put(state, place, value):
    """Replace what lies at a place, or remove it where value is `put` itself."""
    *way, last = place
    for key in way:
        state = state[key]
    if value is put:
        del state[last]
    else:
        state[last] = value


def other_tensors(t):
    """What a tensor must not be instead: name -> tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                         # soon torch has them no more
        quantised = torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)
    odd = {"longer": torch.cat([t.flatten(), t.new_zeros(3)]), "empty": t.new_zeros(0),
           "one more axis": t[None], "bool": t.bool(), "complex": t.float() + 0j,
           "sparse": t.float().reshape(-1).to_sparse(), "meta": t.to("meta"),
           "huge by stride 0": t.new_zeros(1).expand(10 ** 9),
           "quantised": quantised,
           "other precision": t.long() if t.is_floating_point() else t.double()}
    if t.is_floating_point():
        odd |= {"NaN": torch.full_like(t, torch.nan), "infinite": torch.full_like(t, torch.inf)}
    return odd


def other_values(value):
    """What a value of a checkpoint must not be instead: name -> value."""
    if torch.is_tensor(value):
        odd = other_tensors(value)
    elif isinstance(value, dict):
        odd = {"a list": [value], "with an integer key": value | {7: 1},
               "with another key": value | {"evil": torch.zeros(1)}}
    elif isinstance(value, (list, tuple)):
        odd = {"longer": [*value, 1], "a dictionary": {"a": 1}}
    else:
        odd = {"a number in a list": [1], "a tensor": torch.zeros(2), "10^400": 10 ** 400}
    return odd | {"a text": "evil", "None": None, "removed": put}


def checkpoints(state, folder, rng, n, free=()):
    """n variants of a run's state, each with one thing changed, evenly over what it holds, but for
    the options `free`, which may be anything."""
    every = {}
    for place in places(state):
        if not (place[0] == "config" and place[-1] in free):
            every.setdefault(place[0], []).append(place)
    for i in range(n):
        place = rng.choice(every[rng.choice(list(every))])
        value = state
        for key in place:
            value = value[key]
        kind = rng.choice([k for k, v in other_values(value).items() if value is not v])
        if kind == "with another key" and place == ("config",):     # an option that is gone
            kind = "a text"
        new = copy.deepcopy(state)
        put(new, place, other_values(value)[kind])
        path = folder / f"{i:03}" / "checkpoint.pt"
        path.parent.mkdir(parents=True)
        torch.save(new, path)
        yield f"{'.'.join(map(str, place))}: {kind}", path, "refuse"


def damaged(blob, suffix, folder, rng, n):
    """A good file, cut off or with some bytes changed."""
    for i in range(n):
        new = bytearray(blob)
        if cut := i % 3 == 0:
            del new[rng.randrange(len(new)):]
        else:
            for _ in range(rng.choice((1, 8, 64))):
                new[rng.randrange(len(new))] = rng.randrange(256)
        path = folder / f"damaged_{i:02}{suffix}"
        path.write_bytes(new)
        yield f"{suffix} {'cut off' if cut else 'with other bytes'} {i}", path, "either"


# ---------------------------------------------------------------------------------- EDM's pickles

class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Persistent(Calls):
    """Pickles as EDM's modules do; `state` is its __dict__."""

    def __init__(self, state):
        module = sys.modules["torch_utils.persistence"]
        super().__init__(module._reconstruct_persistent_obj, dict(
            type="class", version=6, module_src="raise SystemExit(1)", class_name="Net",
            state=state))


def with_stubs(make):
    """make()'s pickle, made while the modules that EDM's files name can be imported."""
    def rebuild(meta):
        raise AssertionError
    rebuild.__module__, rebuild.__qualname__ = "torch_utils.persistence", \
        "_reconstruct_persistent_obj"
    stubs = {name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence")}
    stubs["torch_utils.persistence"]._reconstruct_persistent_obj = rebuild
    sys.modules |= stubs
    try:
        return pickle.dumps(make())
    finally:
        for name in stubs:
            del sys.modules[name]


def tree(state):
    """A state dict -> nested modules as EDM pickles them; what is no tensor is put in as it is."""
    own = {"_parameters": OrderedDict(), "_buffers": OrderedDict(), "_modules": OrderedDict()}
    below = {}
    for key, value in state.items():
        first, _, rest = key.partition(".")
        if rest:
            below.setdefault(first, {})[rest] = value
        else:
            own["_parameters"][key] = value
    own["_modules"] |= {name: tree(part) for name, part in below.items()}
    return Persistent(own)


def claiming(offset, size, stride):
    """A tensor of 8 stored numbers that claims others."""
    return Calls(torch._utils._rebuild_tensor_v2, torch.zeros(8)._typed_storage(), offset, size,
                 stride, False, OrderedDict())


def deep(depth):
    """Modules within modules."""
    state = {}
    for _ in range(depth):
        state = {"_modules": {"a": state}}
    return state


def pickles(weights, touch, folder, rng):
    """EDM's format with something in it that it must not have; `touch` is a file that code of
    theirs would make. weights: a state dict of names and tensors that would be taken."""
    import builtins
    import os
    import shutil
    import subprocess
    t = str(touch)
    code = f"open({t!r}, 'w')"
    evil = {
        "os.system": Calls(os.system, f"touch {t}"), "exec": Calls(builtins.exec, code),
        "eval": Calls(builtins.eval, code), "open": Calls(builtins.open, t, "w"),
        "subprocess": Calls(subprocess.check_call, ["touch", t]),
        "shutil": Calls(shutil.copyfile, __file__, t),
        "getattr": Calls(builtins.getattr, Calls(builtins.__import__, "os"), "system"),
        "torch.load": Calls(torch.load, t), "a tensor hook": Calls(
            torch._utils._rebuild_parameter, claiming(0, (2, 2), (1,)), True, OrderedDict()),
        "beyond the storage": claiming(0, (1000, 1000, 1000), (1000000, 1000, 1)),
        "beyond by offset": claiming(7, (2,), (1,)), "beyond by stride": claiming(0, (2,), (8,)),
        "all from one number": claiming(0, (10 ** 9,), (0,)), "negative": claiming(-1, (1,), (1,)),
        "a negative size": claiming(0, (-1,), (1,)), "size of text": claiming(0, ("a",), (1,)),
        "a size beyond 64 bits": claiming(0, (2 ** 70,), (1,)),
        "no tensor": {"evil": 1}, "a module in its place": deep(3), "None's list": [None],
        "NaN": torch.full((2, 2), torch.nan), "sparse": torch.eye(3).to_sparse(),
        "meta": torch.zeros(2, device="meta"),
        "a nested file": Calls(torch.storage._load_from_bytes, pickle.dumps(
            Calls(os.system, f"touch {t}"))),
        "a nested file of garbage": Calls(torch.storage._load_from_bytes, b"PK\3\4evil"),
    }
    good = with_stubs(lambda: {"ema": tree(weights), "loss_fn": None})
    blobs = {name: with_stubs(lambda: {"ema": tree(weights | {rng.choice(list(weights)): thing})})
             for name, thing in evil.items()}
    blobs |= {
        "no ema": pickle.dumps({"G": 1}), "a list": pickle.dumps([1]), "empty": b"",
        "ema is a text": pickle.dumps({"ema": "evil"}),
        "100,000 modules deep": _deep_pickle(),
        "a memo of 2^31": b"\x80\x04K\x01r\xff\xff\xff\x7f.",
        "2^40 bytes claimed": b"\x80\x04\x8e" + struct.pack("<Q", 2 ** 40) + b".",
        "a frame of 2^60": b"\x80\x04\x95" + struct.pack("<Q", 2 ** 60) + b"N.",
        "a loop": b"\x80\x04}q\x00X\x03\x00\x00\x00emah\x00s.",
        "no end": good[:-1],
    }
    for name, blob in blobs.items():
        path = folder / f"{name.replace(' ', '_').replace('/', '_')}.pkl"
        path.write_bytes(blob)
        yield f"pickle: {name}", path, "refuse"
    yield from damaged(good, ".pkl", folder, rng, 9)


def _deep_pickle():
    """{"ema": {"_modules": {"a": {"_modules": ...}}}}, too deep for recursion, by opcodes."""
    key = lambda text: b"X" + struct.pack("<I", len(text)) + text           # noqa: E731
    inner = (b"}" + key(b"_modules") + b"}" + key(b"a")) * 100_000
    return b"\x80\x02}" + key(b"ema") + inner + b"N" + b"ss" * 100_000 + b"s."


# --------------------------------------------------------------------------------- sets of images

def png(width, height, data=None, mode=2, depth=8, text=b""):
    """A PNG whose header may claim anything. data: its pixels, compressed. text: in a comment."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(
            ">I", zlib.crc32(kind + body))
    data = zlib.compress(bytes((3 * width + 1) * height)) if data is None else data
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(
        ">IIBBBBB", width, height, depth, mode, 0, 0, 0))
        + (chunk(b"zTXt", b"a\0\0" + zlib.compress(text)) if text else b"")
        + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def zipped(path, files, how=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", how) as z:
        for name, blob in files.items():
            z.writestr(name, blob)
    return path


def zeros(n):
    """n zero bytes, deflated as in a .zip: one piece, which needs no other, again and again."""
    packer = zlib.compressobj(9, wbits=-15)
    piece = packer.compress(bytes(2 ** 24)) + packer.flush(zlib.Z_FULL_FLUSH)
    return piece * (n // 2 ** 24) + packer.flush()


def npy(array=None, header=None, version=b"\x01\x00", body=b""):
    """An .npy, or one whose header says what it likes."""
    if header is None:
        out = io.BytesIO()
        np.save(out, array, allow_pickle=True)
        return out.getvalue()
    text = header.encode() + b"\n"
    size = struct.pack("<H" if version == b"\x01\x00" else "<I", len(text))
    return b"\x93NUMPY" + version + size + text + body


def claims(shape, dtype="|u1", order=False):
    return f"{{'descr': {dtype!r}, 'fortran_order': {order}, 'shape': {shape}, }}"


def arrays():
    """name -> the bytes of an .npy that is no set of images."""
    images = IMAGES[:4]
    return {
        "floats": npy(images.astype(np.float32)), "int16": npy(images.astype(np.int16)),
        "three axes": npy(images[:, 0]), "four channels": npy(np.zeros((2, 4, 8, 8), np.uint8)),
        "no images": npy(images[:0]), "objects": npy(np.array([{}, 1], object)),
        "no width": npy(np.zeros((2, 3, 8, 0), np.uint8)),
        "records": npy(np.zeros(3, [("a", "u1"), ("b", "O")])), "texts": npy(np.array(["a"])),
        "claims 10^12": npy(header=claims((10 ** 6, 3, 10 ** 3, 10 ** 3))),
        "claims 2^64": npy(header=claims((2 ** 32, 3, 2 ** 32, 4))),
        "claims -1": npy(header=claims((-1, 3, 32, 32)), body=bytes(3072)),
        "claims less": npy(header=claims((1, 3, 8, 8)), body=bytes(500)),
        "a header of code": npy(header="__import__('os').system('true')"),
        "a header of 10^5 brackets": npy(header="(" * 10 ** 5, version=b"\x02\x00"),
        "version 9": npy(header=claims((1, 3, 8, 8)), version=b"\x09\x00", body=bytes(192)),
        "nothing": b"", "magic alone": b"\x93NUMPY",
        "bool shape": npy(header=claims((True, 3, 8, 8)), body=bytes(192)),
    }


def bad_labels():
    """name -> labels for 64 images that are none."""
    n = len(IMAGES)
    return {
        "-3": np.full(n, -3), "fractions": np.arange(n) + 0.5, "fewer": np.zeros(n - 1, int),
        "NaN": np.full(n, np.nan), "two axes": np.zeros((n, 1), int), "10^6": np.full(n, 10 ** 6),
        "texts": np.array(["a"] * n), "bools": np.ones(n, bool), "none": np.zeros(0, int),
        "one for all": np.int64(1), "2^63": np.full(n, 2 ** 63, np.uint64),
    }


def image_files():
    """name -> the bytes of an image file that must not be taken."""
    good = png(32, 32)
    return {
        "60000 x 60000": png(60000, 60000, zlib.compress(b"")), "no pixels": png(32, 32, b""),
        "2^31 wide": png(2 ** 31 - 1, 1, zlib.compress(b"")), "0 wide": png(0, 32),
        "16 bits": png(32, 32, zlib.compress(bytes(65 * 32)), mode=0, depth=16),
        "an unknown mode": png(32, 32, mode=9), "a text": b"not an image", "empty": b"",
        "a GIF": b"GIF89a" + bytes(100), "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 "
        b"0 9 9\n", "cut off": good[:60], "64 MB of text": png(32, 32, text=bytes(2 ** 26)),
        "BMP of 2^30": b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 2 ** 15, 2 ** 15, 1,
                                            24, 0, 0, 0, 0, 0, 0),
        "WebP header alone": b"RIFF\x10\0\0\0WEBPVP8L" + bytes(8), "JPEG of FF": b"\xff\xd8" * 99,
    }


def lists(n):
    """name -> the bytes of a dataset.json for the images 0.png ... that is none."""
    names = [f"{i}.png" for i in range(n)]
    return {
        "cut off": b'{"labels": [["0.png"', "deep": b"[" * 10 ** 5, "no labels": b"{}",
        "a list": b"[1, 2]", "not UTF-8": b"\xff\xfe\xfd", "texts": json.dumps(
            {"labels": [[k, "a"] for k in names]}).encode(),
        "fractions": json.dumps({"labels": [[k, 0.5] for k in names]}).encode(),
        "NaN": json.dumps({"labels": [[k, float("nan")] for k in names]}).encode(),
        "negative": json.dumps({"labels": [[k, -1] for k in names]}).encode(),
        "bools": json.dumps({"labels": [[k, True] for k in names]}).encode(),
        "a 5000-digit label": ('{"labels": [["0.png", 1' + "0" * 5000 + "]]}").encode(),
        "one image": json.dumps({"labels": [["0.png", 1]]}).encode(),
        "numbers for names": json.dumps({"labels": [[1, 1]]}).encode(),
        "10^30": json.dumps({"labels": [[k, 10 ** 30] for k in names]}).encode(),
        "triples": json.dumps({"labels": [[k, 1, 1] for k in names]}).encode(),
    }


def sets(folder, rng):
    """Sets of images: arrays, archives, image files, lists of labels."""
    good = {f"{i}.png": png(32, 32) for i in range(4)}
    for name, blob in arrays().items():
        path = folder / f"array_{len(list(folder.iterdir()))}.npy"
        path.write_bytes(blob)
        yield f"npy: {name}", path, "refuse"
        yield f"npz: {name}", zipped(path.with_suffix(".npz"), {"images.npy": blob}), "refuse"
    for name, labels in bad_labels().items():
        path = folder / f"labels_{len(list(folder.iterdir()))}.npz"
        np.savez(path, images=IMAGES, labels=labels)
        yield f"labels: {name}", path, "refuse"
    for name, blob in image_files().items():
        path = folder / f"image_{len(list(folder.iterdir()))}.zip"
        yield f"image: {name}", zipped(path, good | {"9.png": blob}), "refuse"
    for name, blob in lists(4).items():
        path = folder / f"list_{len(list(folder.iterdir()))}.zip"
        yield f"dataset.json: {name}", zipped(path, good | {"dataset.json": blob}), "refuse"
    yield from archives(good, folder)
    out = io.BytesIO()
    np.savez(out, images=IMAGES)
    yield from damaged(out.getvalue(), ".npz", folder, rng, 6)
    path = zipped(folder / "good.zip", good)
    yield from damaged(path.read_bytes(), ".zip", folder, rng, 6)


def archives(good, folder):
    """Archives that lie about what they hold, or expand without end."""
    gigabyte = zeros(2 ** 30)
    for name, member, claimed in (("a member of 1 GB", "0.png", 2 ** 30),
                                  ("that claims 100 bytes", "0.png", 100),
                                  ("whose array has 1 GB more", "images.npy", 2 ** 30)):
        path = folder / f"{name.replace(' ', '_')}.{'npz' if 'npy' in member else 'zip'}"
        lying_zip(path, member, gigabyte, claimed)
        yield f"zip: {name}", path, "refuse"
    for how in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        yield f"zip: method {how}", zipped(folder / f"method_{how}.zip", good, how), "refuse"
    yield "zip: no images", zipped(folder / "none.zip", {"a.txt": b"a"}), "refuse"
    yield "zip: two sizes", zipped(folder / "sizes.zip", good | {"x.png": png(16, 16)}), "refuse"
    for kind, mode in (("gz", "w:gz"), ("xz", "w:xz")):
        path = folder / f"bomb.tar.{kind}"
        with tarfile.open(path, mode) as tar:
            for name, size in (("a.txt", 2 ** 26), ("0.png", 2 ** 27)):
                header = tarfile.TarInfo(name)
                header.size = size
                tar.addfile(header, Zeros(size))
        yield f"tar.{kind}: an image of 128 MB", path, "refuse"
    for name, header in headers().items():
        path = folder / f"{name.replace(' ', '_')}.tar"
        path.write_bytes(header + bytes(1024))
        yield f"tar: {name}", path, "refuse"
    for name in ("text.tar", "text.zip", "text.npz", "cifar-10-binary.tar.gz"):
        (folder / name).write_bytes(b"this is no archive " * 100)
        yield f"a text called {name}", folder / name, "refuse"


class Zeros:
    """A file of n zero bytes."""

    def __init__(self, n):
        self.n = n

    def read(self, size):
        size = min(size, self.n)
        self.n -= size
        return bytes(size)


def headers():
    """name -> a .tar's header that claims much, or what is no image."""
    def header(**fields):
        info = tarfile.TarInfo("0.png")
        for key, value in fields.items():
            setattr(info, key, value)
        return info.tobuf(tarfile.GNU_FORMAT)
    return {"2^60 bytes": header(size=2 ** 60), "a link": header(type=tarfile.SYMTYPE,
            linkname="/etc/passwd"), "a device": header(type=tarfile.CHRTYPE),
            "a name of 2^40 bytes": header(type=tarfile.GNUTYPE_LONGNAME, size=2 ** 40),
            "a pax header of 2^40": header(type=tarfile.XHDTYPE, size=2 ** 40)}


def lying_zip(path, name, packed, claimed):
    """A .zip of one deflated member, whose size it claims to be `claimed`."""
    raw, n = name.encode(), len(name)
    common = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0, 0, len(packed), claimed, n, 0)
    local = b"PK\3\4" + common + raw + packed
    entry = b"PK\1\2" + struct.pack("<H", 20) + common + struct.pack("<HHHII", 0, 0, 0, 0, 0) + raw
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(entry), len(local), 0)
    path.write_bytes(local + entry + end)


# ------------------------------------------------------------------------------------- statistics

def statistics(folder, rng, d=128):
    """What fid.py takes for measured features and is none."""
    eye = np.eye(d)
    lopsided = eye + np.triu(np.ones((d, d)), 1)
    wrong = {
        "mu NaN": dict(mu=np.full(d, np.nan), sigma=eye), "mu alone": dict(mu=np.zeros(d)),
        "sigma alone": dict(sigma=eye, features=np.zeros((9, d), np.float32)),
        "another width": dict(mu=np.zeros(7), sigma=np.eye(7)), "scalars": dict(mu=1.0, sigma=1.0),
        "sigma of vectors": dict(mu=np.zeros(d), sigma=np.ones(d)),
        "negative variance": dict(mu=np.zeros(d), sigma=-eye),
        "one negative eigenvalue": dict(mu=np.zeros(d), sigma=np.diag([-1.0] + [1.0] * (d - 1))),
        "not symmetric": dict(mu=np.zeros(d), sigma=lopsided),
        "infinite": dict(mu=np.zeros(d), sigma=np.full((d, d), np.inf)),
        "complex": dict(mu=np.zeros(d), sigma=eye + 1j), "texts": dict(mu=np.array(["a"] * d),
                                                                         sigma=eye),
        "objects": dict(mu=np.array([{}] * d, object), sigma=eye),
        "n of 0": dict(mu=np.zeros(d), sigma=eye, n=0),
        "n of 2.5": dict(mu=np.zeros(d), sigma=eye, n=2.5),
        "n of many": dict(mu=np.zeros(d), sigma=eye, n=[1, 2]),
        "score of three": dict(mu=np.zeros(d), sigma=eye, score=[1.0, 2.0, 3.0]),
        "score NaN": dict(mu=np.zeros(d), sigma=eye, score=[np.nan, 0]),
        "no features": dict(features=np.zeros((0, d), np.float32)),
        "one feature": dict(features=np.zeros((1, d), np.float32)),
        "features NaN": dict(features=np.full((9, d), np.nan, np.float32)),
        "features with three axes": dict(features=np.zeros((9, d, 1), np.float32)),
    }
    for i, (name, what) in enumerate(wrong.items()):
        np.savez(folder / f"stats_{i:02}.npz", **what)
        yield f"statistics: {name}", folder / f"stats_{i:02}.npz", "refuse"
    for name in ("features", "mu"):
        path = folder / f"claims_{name}.npz"
        header = npy(header=claims((10 ** 10,), "<f8"))
        yield f"statistics: {name} claims 80 GB", zipped(path, {f"{name}.npy": header,
                                                                "sigma.npy": header}), "refuse"
    path = folder / "bomb.npz"
    lying_zip(path, "mu.npy", zeros(2 ** 31 + 2 ** 24), 2 ** 31 + 2 ** 24)
    yield "statistics: a bomb of 2 GB", path, "refuse"
    good = io.BytesIO()
    np.savez(good, mu=np.zeros(d), sigma=eye)
    yield from damaged(good.getvalue(), ".npz", folder, rng, 4)


# ------------------------------------------------------------------------------- finished results

def results(folder, rng):
    """results/ folders for experiments.py with one broken run."""
    good = {"h": "kl", "lam": 5.0, "seed": 0, "config": {"h": "kl", "lam": 5.0, "batch": 32}}
    broken = {
        "empty": "", "cut off": '{"h": "kl"', "a list": "[]", "no config": "{}",
        "deep": "[" * 10 ** 5, "config null": '{"config": null}', "a number": "7",
        "binary": "\x00\x01",
    }
    for i, (name, text) in enumerate(broken.items()):
        run = folder / f"results_{i}" / "every_h" / "kl_seed0"
        run.mkdir(parents=True)
        (run / "result.json").write_text(text)
        yield f"result.json: {name}", folder / f"results_{i}", "refuse"
    csvs = {"empty": "", "a head alone": "kimg,seconds\n", "texts": "kimg,seconds\nevil,1\n",
            "no kimg": "seconds\n1\n", "ragged": "kimg,seconds\n1,2,3,4\n", "NUL": "kimg\n\0\n"}
    for i, (name, text) in enumerate(csvs.items()):
        run = folder / f"logs_{i}" / "images" / "kl_seed0"
        run.mkdir(parents=True)
        (run / "result.json").write_text(json.dumps(good))
        (run / "log.csv").write_text(text)
        yield f"log.csv: {name}", folder / f"logs_{i}", "refuse"
