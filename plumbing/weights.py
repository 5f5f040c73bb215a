"""What is in a file of weights: read as data, and never run.

EDM's pickles carry Python source for their classes, and a checkpoint of anybody's could name any
function. Here classes become dictionaries, torch rebuilds the tensors, and all else is refused.
"""
import io
import math
import pickle
import re
import zipfile
from collections import OrderedDict

import torch

from plumbing import loop


def read_file(path):
    """Return the state dict in a file of weights, and the record of what the file says of itself.
    Raises ValueError, which says what the file is instead and what to do."""
    with open(path, "rb") as f:
        head = f.read(200)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is git-lfs's pointer to a file: `git lfs pull`, where it came "
                         "from, fetches the file")
    if head.lstrip(b"\xef\xbb\xbf\r\n\t ").lower().startswith((b"<!doctype", b"<html")):
        raise ValueError(f"{path} is a web page: download the file itself, by its raw address")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
            return unwrap(load_file(path))
        except ImportError:
            raise ValueError(f"{path}: pip install safetensors, to read it") from None
        except Exception as e:                      # of the library's own kind
            raise ValueError(f"{path}: broken: {e}") from e
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                blob = archive.read(name) if name.endswith("/data.pkl") else b""
                if b"torch_utils.persistence" in blob:              # EDM's training-state-*.pt
                    folder = name.removesuffix("data.pkl")
                    return read_pickle(path, io.BytesIO(blob), archive, folder)
    if head.startswith((b"PK", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19")):  # torch's, new or old
        saved = loop.load(path)
        return unwrap(saved if isinstance(saved, dict) else {})
    with open(path, "rb") as f:
        return read_pickle(path, f)


def unwrap(saved):
    """Return the state dict in what torch.save wrote, under EDMPrecond's names, and the record of
    what lies beside it: a run's options, and what a trainer noted of the images and the network."""
    record = dict(sigma_data=0.5, dropout=0.0) if "seen" in saved else {}   # of our older files
    for key in ("config", "record"):
        record |= saved[key] if isinstance(saved.get(key), dict) else {}
    for key in ("ema", "state_dict", "model"):
        saved = saved[key] if isinstance(saved.get(key), dict) else saved
    state = {k.replace("_orig_mod.", "").removeprefix("module."): v for k, v in saved.items()
             if torch.is_tensor(v)}
    if not any(k.startswith("model.") for k in state):
        state = {f"model.{k}": v for k, v in state.items()}
    return state, record


def read_pickle(path, file, archive=None, folder=""):
    """Return the state dict of the network in EDM's pickle, and what it says of itself: sigma_data
    and dropout. Raises ValueError, naming `path`."""
    state, record = {}, {}
    try:
        saved = SafeUnpickler(file, archive, folder).load()
        net = saved["ema"] if "ema" in saved else saved["net"]      # a snapshot, a training state
        for prefix, module in modules(net):
            for kind in ("_parameters", "_buffers"):
                state |= {prefix + k: v for k, v in module[kind].items() if v is not None}
            record |= {k: module[k] for k in ("sigma_data", "dropout")
                       if isinstance(module.get(k), (int, float))}
    except Exception as e:                          # a pickle can fail in many ways
        file.seek(0)
        if re.search(rb"G_ema|dnnlib\.tflib", file.read()):
            raise ValueError(f"{path} is a StyleGAN, which knows no noise levels: take a diffusion "
                             "teacher, such as edm-ffhq-64x64-uncond-vp") from e
        raise ValueError(f"{path}: broken, or no file of weights: {e}") from e
    if net["class_name"] in ("VPPrecond", "VEPrecond", "iDDPMPrecond"):
        raise ValueError(f"{path} is a network behind {net['class_name']}, and here it would stand "
                         "behind EDMPrecond: take one that was trained with --precond=edm")
    return state, record


def modules(module, prefix=""):
    """Yield a pickled module and all that are in it, each after its prefix in a state dict."""
    yield prefix, module
    for name, part in module["_modules"].items():
        if part is not None:
            yield from modules(part, f"{prefix}{name}.")


class Record(dict):
    """What stands in for every object of a foreign pickle: data, never code."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __setstate__(self, state):
        self.update(state if isinstance(state, dict) else {})       # numpy's is a tuple


class Call:
    """A function that a pickle may call. It refuses new state, so that no pickle alters it."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)

    def __setstate__(self, state):
        raise pickle.UnpicklingError("refused to alter a function")


def _module(meta, *_):
    """Return the attributes of a pickled module; its "module_src", Python source, is left alone."""
    record = Record()
    record.update(meta["state"], class_name=meta["class_name"])
    return record


def _storage(blob):
    """Return the numbers of tensors, which are a file of torch.save within the pickle."""
    try:
        return torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise pickle.UnpicklingError("refused to load more than numbers") from None


def _tensor(storage, offset, size, stride, *_):
    """Return a tensor on its storage, if it lies within: beyond it torch would hand out whatever
    lies in memory."""
    stored = storage._untyped_storage.nbytes() // storage.dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min(offset, *size, *stride, 0) < 0 or max(last + 1, math.prod(size)) > stored:
        raise pickle.UnpicklingError(f"a tensor of {tuple(size)} on {stored} stored numbers")
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


class SafeUnpickler(pickle.Unpickler):
    """Reads EDM's pickles as data. They carry Python source for their classes, which is never run:
    a class becomes a Record, torch rebuilds the tensors, and any other name is refused.

    archive: the zip file in which torch.save put the pickle, where it did, and the numbers beside.
    """
    ADMITTED = {
        "collections.OrderedDict": OrderedDict, "__builtin__.set": set, "builtins.set": set,
        "dnnlib.util.EasyDict": Record,
        "numpy.dtype": Record,
        "numpy.core.multiarray.scalar": Record,
        "numpy._core.multiarray.scalar": Record,
        "torch.nn.modules.container.ModuleDict": Record,
        "torch._utils._rebuild_parameter": Call(lambda tensor, *_: tensor),
        "torch._utils._rebuild_tensor_v2": Call(_tensor),
        "torch.storage._load_from_bytes": Call(_storage),
        "torch_utils.persistence._reconstruct_persistent_obj": Call(_module),
        "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16,
        "torch.DoubleStorage": torch.float64, "torch.LongStorage": torch.int64,
    }

    def __init__(self, file, archive=None, folder=""):
        super().__init__(file)
        self.archive, self.folder = archive, folder

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.ADMITTED:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return self.ADMITTED[f"{module}.{name}"]

    def persistent_load(self, place):
        _, dtype, key, *_ = place                   # of a storage: ("storage", its type, key, ...)
        stored = bytearray(self.archive.read(f"{self.folder}data/{key}"))
        stored = torch.frombuffer(stored, dtype=torch.uint8).untyped_storage()
        return torch.storage.TypedStorage(wrap_storage=stored, dtype=dtype, _internal=True)
