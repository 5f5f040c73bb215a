"""Teachers and students from files, NVIDIA's and ours, and what lies beside them."""
from pathlib import Path

import torch

from ncsnpp import CONFIGS, EDMPrecond
from plumbing.download import download
from plumbing.options import evaluations, positive
from plumbing.weights import check_weights, read_config, read_weights

HERE = Path(__file__).parent.parent

OFFICIAL = {        # name: sha256 of https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/NAME.pkl
    "edm-cifar10-32x32-uncond-vp":
        "4d5dcc1f1d0d41c8934ad21626eeddbdc0460182becf9fc059a0631b1eedb4da",
    "edm-cifar10-32x32-uncond-ve": None,
    "edm-cifar10-32x32-cond-vp": None,
}


def build(state, name="the checkpoint"):
    """The network whose names and shapes are those of `state`, with its weights, in eval mode.
    Raises ValueError, naming the file `name`, if its tensors are none of finite numbers, and the
    first difference to the nearest configuration, if none fits."""
    check_weights(state, name)
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    nearest = None
    for config, kwargs in CONFIGS.items():
        with torch.device("meta"):
            expected = {k: tuple(v.shape) for k, v in EDMPrecond(**kwargs).state_dict().items()}
        wrong = [k for k in sorted(expected | shapes) if expected.get(k) != shapes.get(k)]
        if not wrong:
            net = EDMPrecond(**kwargs)
            net.load_state_dict(state)
            return net.eval().requires_grad_(False)
        if nearest is None or len(wrong) < nearest[0]:
            k = wrong[0]
            nearest = len(wrong), (f"{config}, in which {k} is {expected.get(k)}, "
                                   f"not {shapes.get(k)}")
    raise ValueError(f"{name}: no known configuration has these tensors; nearest is {nearest[1]}")


def found(source):
    """-> the file of weights that `source` names: a path, a URL, or a name of OFFICIAL. Raises
    ValueError or OSError."""
    source = shipped(str(source))
    if source in OFFICIAL:
        source = f"https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/{source}.pkl"
    if "://" in source:
        name = source.rsplit("/", 1)[1].removesuffix(".pkl")
        return download(source, OFFICIAL.get(name), apart=name not in OFFICIAL)
    if not Path(source).is_file():
        raise FileNotFoundError(f"no such checkpoint: {source} (or one of {', '.join(OFFICIAL)})")
    return Path(source)


def load_teacher(source):
    """-> EDMPrecond in eval mode, without gradients, float32 on the CPU.

    source: see found; NVIDIA's pickles and our checkpoints alike. The configuration is recognised
    by names and shapes. Raises ValueError or OSError.
    """
    path = found(source)
    return build(read_weights(path), str(path))


def check_labels(labels, n, label_dim, source):
    """Raises ValueError, naming `source`, unless labels are int64 (n,) in [0, label_dim)."""
    if labels is None or not label_dim:
        raise ValueError(f"{source} has no labels, which the network needs" if label_dim else
                         f"{source} has labels, which an unconditional network does not take")
    if labels.dtype != torch.int64 or labels.shape != (n,):
        raise ValueError(f"{source}: labels are {labels.dtype} {tuple(labels.shape)}, not whole "
                         f"numbers, one for each of {n} images")
    if labels.min() < 0 or labels.max() >= label_dim:
        raise ValueError(f"{source}: labels from {labels.min()} to {labels.max()}; the network "
                         f"knows 0 to {label_dim - 1}")


def student_options(path):
    """-> the sigma_init and nfe that a student was trained with; None for a teacher."""
    config = read_config(path)
    if "sigma_init" not in config:
        return None
    try:
        return positive(config["sigma_init"]), evaluations(config.get("nfe", 1))
    except ValueError as e:
        raise ValueError(f"{path}: not a student: sigma_init or nfe {e}") from e


def shipped(name):
    """A path of the user's or, where there is none, of this project's: pretrained/..."""
    return str(HERE / name) if not Path(name).exists() and (HERE / name).exists() else name


def beside(teacher, name, ending, needed=False):
    """The path `name`, or "" for "none". "own" is TEACHER + ending, beside the weights TEACHER.pt:
    "" where there is none, unless it is needed: then FileNotFoundError."""
    if name != "own":
        return "" if name == "none" else shipped(name)
    own = shipped(str(teacher)).removesuffix(".pt") + ending
    if needed and not Path(own).exists():
        raise FileNotFoundError(f"no {own}: draw it by edm.py sample {teacher} -n 5000 --seed 1 "
                                f"--out {own}")
    return own if Path(own).exists() else ""
