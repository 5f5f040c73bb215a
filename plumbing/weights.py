"""Weights in: NVIDIA's pickles read as data, and checkpoints checked before anything uses them."""
import io
import pickle
import warnings
import zipfile
from collections import OrderedDict

import torch

from plumbing.files import reading


class Call:
    """A function that a pickle may call but, as it takes no state, not alter."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)

    def __setstate__(self, state):
        raise pickle.UnpicklingError("refused to alter a function")


class Record(dict):
    """What stands in for every object of a foreign pickle: data, never code."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __setstate__(self, state):
        self.update(state if isinstance(state, dict) else {})


def _persistent(meta, *_):
    record = Record()
    record.update(meta["state"])        # its "module_src" is Python source: left alone
    return record


def _tensor(storage, offset, size, stride, *_):
    """A tensor on its storage. torch would lengthen a storage that is too short, with whatever
    lies in memory."""
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError("a tensor without a storage")
    stored = storage._untyped_storage.nbytes() // storage.dtype.itemsize
    last, count = offset, 1
    for n, step in zip(size, stride, strict=True):
        last, count = last + (n - 1) * step, count * n
    if min(offset, count, *size, *stride) < 0 or max(last + 1, count) > stored:
        raise pickle.UnpicklingError(f"a tensor of {tuple(size)} on {stored} stored numbers")
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


class SafeUnpickler(pickle.Unpickler):
    """Reads EDM's official pickles without running what they carry.

    They embed Python source for their classes. Here every class becomes a Record, tensors are
    rebuilt by torch, their bytes read with weights_only, and any other name is refused.
    """
    ADMITTED = {
        "collections.OrderedDict": OrderedDict,
        "dnnlib.util.EasyDict": Record,
        "numpy.dtype": Record,
        "numpy.core.multiarray.scalar": Record,
        "numpy._core.multiarray.scalar": Record,
        "torch.nn.modules.container.ModuleDict": Record,
        "torch._utils._rebuild_parameter": Call(lambda tensor, *_: tensor),
        "torch._utils._rebuild_tensor_v2": Call(_tensor),
        "torch.storage._load_from_bytes": Call(lambda blob: _load(io.BytesIO(blob))),
        "torch_utils.persistence._reconstruct_persistent_obj": Call(_persistent),
    }

    def find_class(self, module, name):
        try:
            return self.ADMITTED[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}") from None


def flatten(record, prefix=""):
    """The state dict of a pickled module: parameters and buffers, by walking its parts."""
    state = {}
    for kind in ("_parameters", "_buffers"):
        state |= {prefix + k: v for k, v in record.get(kind, {}).items() if v is not None}
    for name, part in record.get("_modules", {}).items():
        if part is not None:
            state |= flatten(part, f"{prefix}{name}.")
    return state


def _load(path):
    with warnings.catch_warnings():             # of a pickle's protocol, which is refused or not
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def read_weights(path):
    """-> state dict of an official EDM pickle, of our own checkpoint (its EMA), or of a bare state
    dict saved by torch. Raises ValueError, naming the file, if it is none of them."""
    with reading(path, "a checkpoint"):
        with open(path, "rb") as f:
            if f.read(2) == b"PK":                                  # torch.save's zip
                state = _load(path)
                return state.get("ema", state) if isinstance(state, dict) else state
            f.seek(0)
            return flatten(SafeUnpickler(f).load()["ema"])


def check_weights(state, name):
    """Raises ValueError, naming the file `name` and the tensor, unless `state` is a state dict of
    plain tensors of finite real numbers, of any precision."""
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{name}: it holds no weights")
    for key, v in state.items():
        if not isinstance(key, str):
            raise ValueError(f"{name}: the name of a tensor is {key!r}")
        if not _plain(v) or not v.is_floating_point():
            raise ValueError(f"{name}: {key} is {_form(v)}, not a plain tensor of real numbers")
        if not v.float().isfinite().all():
            raise ValueError(f"{name}: {key} holds a number that is not finite")


def read_config(path):
    """-> the options that a run saved beside its weights; {} for other files of weights."""
    if not zipfile.is_zipfile(path):
        return {}
    with reading(path, "a checkpoint"):
        config = _load(path).get("config")
        check_options(config)
    return config if isinstance(config, dict) else {}


def read_checkpoint(path, what):
    """-> the dictionary that a run saved, its options under "config". Raises ValueError, naming
    the file, if it is not `what`."""
    with reading(path, what):
        state = _load(path)
        if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
            raise ValueError("it holds no run")
        check_options(state["config"])
    return state


def check_options(config):
    """Raises ValueError for an option that is not called by a text."""
    for name in config if isinstance(config, dict) else ():
        if not isinstance(name, str):
            raise ValueError(f"the name of an option is {name!r}")


# ------------------------------------------------------------------ is it what was saved?

def _plain(v):
    """Whether v is a tensor whose numbers lie in memory, one by one."""
    return (torch.is_tensor(v) and not v.is_nested and v.layout is torch.strided
            and not v.is_quantized and v.device.type != "meta"
            and v.untyped_storage().nbytes() >= v.nbytes)       # one number may stand for billions


def _form(v):
    if _plain(v):
        return f"{str(v.dtype).removeprefix('torch.')} {tuple(v.shape)}"
    return "a tensor of another kind" if torch.is_tensor(v) else f"of type {type(v).__name__}"


def check_form(expected, got, name, exact=True):
    """Raises ValueError, naming the place, unless `got` has the types, keys, lengths, shapes and
    dtypes of `expected`, and finite tensors. Plain numbers and texts may have any value. Unless
    `exact`, dictionaries and lists may hold more."""
    if torch.is_tensor(expected):
        if not (_plain(got) and got.shape == expected.shape and got.dtype == expected.dtype):
            raise ValueError(f"{name} is {_form(got)}, not {_form(expected)}")
        if got.is_floating_point() and not got.isfinite().all():
            raise ValueError(f"{name} holds a number that is not finite")
    elif isinstance(expected, dict) and isinstance(got, dict):
        for k in [*expected, *got] if exact else expected:
            if k not in expected or k not in got:
                raise ValueError(f"{name} {'lacks' if k in expected else 'should not have'} {k}")
        for k in expected:
            check_form(expected[k], got[k], f"{name}.{k}", exact)
    elif type(got) is not type(expected):
        raise ValueError(f"{name} is {_form(got)}, not {_form(expected)}")
    elif isinstance(expected, (list, tuple)):
        if len(got) != len(expected) if exact else len(got) < len(expected):
            raise ValueError(f"{name} has length {len(got)}, not {len(expected)}")
        for i, (e, g) in enumerate(zip(expected, got)):
            check_form(e, g, f"{name}.{i}", exact)


def check_optimizer(opt, got, name):
    """Raises ValueError, naming the place, unless `got` is a state dict of `opt`, Adam or Muon,
    its rate aside. torch checks less, and then its fused kernel reads beyond a tensor's end."""
    expected = opt.state_dict()
    if not (isinstance(got, dict) and set(got) == set(expected) and isinstance(got["state"], dict)):
        raise ValueError(f"{name} is not an optimizer's state")
    check_form(expected["param_groups"], got["param_groups"], f"{name}.param_groups")
    for i, (e, g) in enumerate(zip(expected["param_groups"], got["param_groups"])):
        for k in e:
            if k != "lr" and e[k] != g[k]:
                raise ValueError(f"{name}.param_groups.{i}.{k} is {g[k]}, not {e[k]}")
    params = dict(enumerate(p for group in opt.param_groups for p in group["params"]))
    for i, moments in got["state"].items():
        if i not in params:
            raise ValueError(f"{name}.state.{i}: there are {len(params)} parameters")
        p = params[i]
        form = ({"momentum_buffer": p} if isinstance(opt, torch.optim.Muon) else
                {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p})
        check_form(form, moments, f"{name}.state.{i}")
