"""Distances between sets of images: FID (Heusel et al. 2017) and Inception Score (Salimans 2016).

    python fid.py samples.npz cifar10                           # offline: FD-compact, not FID
    python fid.py samples.npz cifar10 --features inception      # FID with Clean-FID's resize
    python fid.py samples.npz cifar10-32x32.npz --features inception --resize tf    # as EDM, SiD
    python fid.py train --data cifar10                          # the classifier behind FD-compact

A set is a folder, .zip or .tar of images, an .npy or .npz of uint8 images, `cifar10`, or an .npz
of statistics (mu, sigma; EDM's fid-refs). FD-compact is the same distance in the features of a
small CIFAR-10 classifier that comes with this project (pretrained/): it needs no download, and
its numbers are not FIDs nor comparable with any.
"""
import json
import math
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from data import (Parser, atomic, device, download, load_images, positive, reading, run_main,
                  save_atomic, tune_cpu)

HERE = Path(__file__).parent
CLASSIFIER = HERE / "pretrained/compact_classifier.pt"
REFERENCE = HERE / "pretrained/compact_classifier_cifar10.npz"      # its training set's statistics
INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth",
             "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")


# --------------------------------------------------------------------------------- Inception-v3

class ConvBN(nn.Module):
    """Convolution, batch norm, ReLU. Keeps the size, except where it strides or is `valid`."""

    def __init__(self, cin, cout, kernel, stride=1, valid=False, eps=0.001):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (0, 0) if valid or stride == 2 else tuple(k // 2 for k in kernel)
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=eps)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def average_pool(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def max_pool(x):
    return F.max_pool2d(x, 3, 1, 1)


def halving_pool(x):
    return F.max_pool2d(x, 3, 2)


class Mixed(nn.Module):
    """Inception's block: chains of convolutions side by side, one of them behind a pool.

    branches: name -> steps (width, kernel[, stride]); a list as last step is a fork. The
    parameters are named as in the weights file: branch_1, branch_2, forks branch_3a, branch_3b.
    """

    def __init__(self, cin, pool, branches):
        super().__init__()
        self.pool, self.chains, self.width = pool, [], 0
        for branch, steps in branches.items():
            names, width = [], cin
            for i, step in enumerate(steps, 1):
                name = branch if len(steps) == 1 else f"{branch}_{i}"
                fork = isinstance(step, list)
                names.append([name + "ab"[j] for j in range(len(step))] if fork else [name])
                for n, (cout, *kernel) in zip(names[-1], step if fork else [step]):
                    self.add_module(n, ConvBN(width, cout, *kernel))
                width = sum(s[0] for s in step) if fork else step[0]
            self.chains.append((branch, names))
            self.width += width

    def forward(self, x):
        out = []
        for branch, names in self.chains:
            ys = [self.pool(x) if branch == "branch_pool" else x]
            for step in names:
                ys = [getattr(self, name)(ys[0]) for name in step]
            out += ys
        return torch.cat(out, 1)


def block_35(cin, pool):            # named by the resolution at which they stand in the 2015 graph
    return Mixed(cin, average_pool, {
        "branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)], "branch_pool": [(pool, 1)]})


def block_35_to_17(cin):
    return Mixed(cin, halving_pool, {
        "branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)],
        "branch_pool": []})


def block_17(cin, c):
    row, column = (1, 7), (7, 1)
    return Mixed(cin, average_pool, {
        "branch1x1": [(192, 1)], "branch7x7": [(c, 1), (c, row), (192, column)],
        "branch7x7dbl": [(c, 1), (c, column), (c, row), (c, column), (192, row)],
        "branch_pool": [(192, 1)]})


def block_17_to_8(cin):
    return Mixed(cin, halving_pool, {
        "branch3x3": [(192, 1), (320, 3, 2)],
        "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)], "branch_pool": []})


def block_8(cin, pool):
    fork = [(384, (1, 3)), (384, (3, 1))]
    return Mixed(cin, pool, {
        "branch1x1": [(320, 1)], "branch3x3": [(384, 1), fork],
        "branch3x3dbl": [(448, 1), (384, 3), fork], "branch_pool": [(192, 1)]})


class Inception(nn.Module):
    """Inception-v3 of the 2015 TensorFlow graph, with the names of pt_inception-2015-12-05.

    Average pools do not count the padding, and the last block pools by maximum. Input: float
    [0, 255] (N, 3, 299, 299). Returns features (N, 2048) and logits without bias (N, 1008), from
    which the Inception Score is taken.
    """
    size = 299

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, valid=True)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, valid=True)
        self.Mixed_5b = block_35(192, 32)
        self.Mixed_5c = block_35(256, 64)
        self.Mixed_5d = block_35(288, 64)
        self.Mixed_6a = block_35_to_17(288)
        self.Mixed_6b = block_17(768, 128)
        self.Mixed_6c = block_17(768, 160)
        self.Mixed_6d = block_17(768, 160)
        self.Mixed_6e = block_17(768, 192)
        self.Mixed_7a = block_17_to_8(768)
        self.Mixed_7b = block_8(1280, average_pool)
        self.Mixed_7c = block_8(2048, max_pool)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halving_pool(x)))
        x = halving_pool(x)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T


class Classifier(nn.Module):
    """A small CIFAR-10 classifier, whose pooled last feature map is FD-compact's feature vector.

    Three times: convolution, maximum over 2 x 2, a residual pair; widths 32, 64, 128. Input: float
    [0, 255] (N, 3, 32, 32). Returns features (N, 128) and logits (N, 10).
    """
    size = 32

    def __init__(self, widths=(16, 32, 64, 128)):
        super().__init__()
        conv = lambda cin, cout: ConvBN(cin, cout, 3, eps=1e-5)     # noqa: E731
        self.stem = conv(3, widths[0])
        self.down = nn.ModuleList(conv(a, b) for a, b in zip(widths, widths[1:]))
        self.pair = nn.ModuleList(nn.Sequential(conv(b, b), conv(b, b)) for b in widths[1:])
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x):
        x = self.stem(x / 64 - 2)
        for down, pair in zip(self.down, self.pair):
            x = F.max_pool2d(down(x), 2)
            x = x + pair(x)
        features = x.mean((2, 3))
        return features, self.head(features)


def fuse(net):
    """Batch norm in evaluation is one more scale and shift: put it into the convolutions."""
    for block in [m for m in net.modules() if isinstance(m, ConvBN)]:
        block.conv, block.bn = fuse_conv_bn_eval(block.conv.eval(), block.bn.eval()), nn.Identity()
    return net.eval().requires_grad_(False)


def load_net(features="compact"):
    """-> the network behind a distance, in eval mode: "compact", from pretrained/, or "inception",
    downloaded once and checked. Raises ValueError or OSError, naming the file."""
    path = CLASSIFIER if features == "compact" else download(*INCEPTION)
    net = Classifier() if features == "compact" else Inception()
    with reading(path, f"weights of the {features} network"):
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return fuse(net)


# ----------------------------------------------------------------------------- images to features

def resize_matrix(size, target, how):
    """The resize of one axis as a matrix (target, size): both resizes are linear and separable.

    clean: Pillow's bicubic (with its low-pass when shrinking), read off from Pillow itself;
    tf: TensorFlow 1's bilinear, whose source coordinate is target * size / 299, no half pixel.
    """
    if how == "clean":
        eye = Image.fromarray(np.eye(size, dtype=np.float32))
        return torch.from_numpy(np.array(eye.resize((size, target), Image.Resampling.BICUBIC)))
    at = torch.arange(target) * (size / target)
    low = at.floor().long()
    A, rows = torch.zeros(target, size), torch.arange(target)
    A[rows, low] = 1 - (at - low)
    A[rows, (low + 1).clamp(max=size - 1)] += at - low
    return A


def resize(images, target, how="clean"):
    """float [0, 255] (N, 3, H, W) -> (N, 3, target, target), clipped, not rounded."""
    height, width = images.shape[2:]
    if (height, width) == (target, target):
        return images
    rows = resize_matrix(height, target, how).to(images.device)
    columns = resize_matrix(width, target, how).to(images.device)
    return (rows @ (images @ columns.T)).clamp(0, 255)      # columns first, as Pillow does


def extract(images, net, how="clean", batch=64, progress=False):
    """Yield (features, logits) of each batch, float32 on the CPU.

    images: (N, 3, H, W), uint8, or float [0, 255], which is rounded and clipped first, as a saved
    file would be. Raises ValueError if a feature is not finite.
    """
    where = next(net.parameters())
    for start in tqdm(range(0, len(images), batch), disable=not progress, unit="batch"):
        x = images[start:start + batch].to(where.device)
        if x.dtype != torch.uint8:
            x = x.round().clamp(0, 255)
        with torch.inference_mode():
            features, logits = net(resize(x.float(), net.size, how))
        bad = ~features.isfinite().all(1)
        if bad.any():
            raise ValueError(f"the features of image {start + bad.nonzero()[0].item()} "
                             "are not finite")
        yield features.cpu(), logits.cpu()


def features(images, net, how="clean", batch=64):
    """-> features, float32 (N, d); see extract."""
    return torch.cat([f for f, _ in extract(images, net, how, batch)])


# -------------------------------------------------------------------------- features to a distance

class Sums:
    """Count, sum and sum of outer products: all that a Fréchet distance needs of a set, so that
    memory does not grow with it. float64, on the CPU."""

    def __init__(self, n=0, total=0, outer=0):
        self.n, self.total, self.outer = n, total, outer

    def add(self, features):
        features = features.double()
        self.n += len(features)
        self.total = self.total + features.sum(0)
        self.outer = self.outer + features.T @ features

    def __add__(self, other):
        return Sums(self.n + other.n, self.total + other.total, self.outer + other.outer)

    def stats(self):
        """-> mu (d,), sigma (d, d), float64, sigma over n - 1. Raises ValueError below 2 images."""
        if self.n < 2:
            raise ValueError(f"{self.n} image(s): a covariance takes at least 2")
        mu = self.total / self.n
        return mu, (self.outer - self.n * mu.outer(mu)) / (self.n - 1)


def stats(features):
    """features (N, d) -> mu (d,), sigma (d, d), float64."""
    sums = Sums()
    sums.add(features)
    return sums.stats()


def factor(sigma):
    """-> F with F F^T = sigma. Cholesky's where there is one, else by eigenvalues: a covariance of
    fewer images than dimensions is singular."""
    F, failed = torch.linalg.cholesky_ex(sigma)
    if failed:
        values, vectors = torch.linalg.eigh(sigma)
        F = vectors * values.clamp(min=0).sqrt()
    return F


def frechet(mu1, sigma1, mu2, sigma2):
    """Fréchet distance of two Gaussians, |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), a float.

    The trace of the root needs no root of a matrix: with S = F F^T and P = F1^T F2, it is the sum
    of the roots of the eigenvalues of P P^T, which are those of S1 S2. mu: (d,), sigma: (d, d),
    tensors or arrays. Raises ValueError for statistics of different widths or not finite.
    """
    args = [torch.as_tensor(a, dtype=torch.float64).cpu() for a in (mu1, sigma1, mu2, sigma2)]
    mu1, sigma1, mu2, sigma2 = args
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise ValueError(f"statistics of {len(mu1)} and of {len(mu2)} features do not compare")
    if not all(a.isfinite().all() for a in args):
        raise ValueError("statistics are not finite")
    P = factor(sigma1).T @ factor(sigma2)
    values = torch.from_numpy(scipy.linalg.eigvalsh((P @ P.T).numpy(), driver="evd"))
    if values[0] > 1e-12 * values[-1]:
        root = values.sqrt().sum()
    else:                               # the root of an eigenvalue's rounding would be too much
        root = torch.linalg.svdvals(P).sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root).item()


class Scores:
    """Running sums for the Inception Score, in splits of every so manieth image: a folder sorted
    by class would make consecutive ones, the original's, splits of one class each."""

    def __init__(self, splits=10):
        self.splits, self.n = splits, 0
        self.count = self.marginal = self.negentropy = 0

    def add(self, logits):
        log_p = logits.double().log_softmax(1)                              # log p(y|x)
        split = torch.arange(self.n, self.n + len(log_p)) % self.splits
        member = F.one_hot(split, self.splits).double().T                   # (splits, n)
        self.n += len(log_p)
        self.count = self.count + member.sum(1)
        self.marginal = self.marginal + member @ log_p.exp()                # (splits, classes)
        self.negentropy = self.negentropy + member @ torch.xlogy(log_p.exp(), log_p.exp()).sum(1)

    def score(self):
        """-> mean and standard deviation over the splits."""
        some = self.count > 0
        marginal = self.marginal[some] / self.count[some, None]             # p(y)
        kl = self.negentropy[some] / self.count[some] - torch.xlogy(marginal, marginal).sum(1)
        return kl.exp().mean().item(), kl.exp().std(correction=0).item()


def inception_score(logits, splits=10):
    """exp E KL(p(y|x) ‖ p(y)) of logits (N, classes), between 1 and the number of classes: mean
    and standard deviation over splits (image i is in split i mod splits)."""
    scores = Scores(splits)
    scores.add(logits)
    return scores.score()


@dataclass
class Measured:
    """What is kept of a set of images; its size is that of the features, not of the set."""
    mu: torch.Tensor                    # (d,)
    sigma: torch.Tensor                 # (d, d)
    n: int | None = None                # images, if known
    halves: tuple = ()                  # Sums of every other image, for bias()
    score: tuple | None = None          # Inception Score, mean and standard deviation


def measure(images, net, how="clean", batch=64, progress=False):
    """images (N, 3, H, W) -> Measured, in one pass; see extract."""
    halves, scores = (Sums(), Sums()), Scores()
    for i, (f, logits) in enumerate(extract(images, net, how, batch, progress)):
        halves[i * batch % 2].add(f[::2])
        halves[(i * batch + 1) % 2].add(f[1::2])
        scores.add(logits)
    return Measured(*(halves[0] + halves[1]).stats(), len(images), halves, scores.score())


def bias(a, b):
    """How much the distance of two Measured is too high because `a` has so few images.

    The distance is linear in 1/N (Chong & Forsyth 2020), so what halving the set adds is what
    doubling it, again and again, would take away. None where a half has no more images than
    there are features, since there the line does not hold; 0 without the images.
    """
    if not a.halves:
        return 0.0
    if min(half.n for half in a.halves) <= len(a.mu):
        return None
    halves = [frechet(*half.stats(), b.mu, b.sigma) for half in a.halves]
    return sum(halves) / 2 - frechet(a.mu, a.sigma, b.mu, b.sigma)


# ------------------------------------------------------------------------- the compact classifier

def train_classifier(data, out, epochs=12, batch=128, lr=0.1, seed=0, device="cpu"):
    """Train Classifier on CIFAR-10 and write its weights (float16) and, beside them, its training
    set's statistics. Random crops and flips, Nesterov momentum, one cycle of the learning rate."""
    images, labels = load_images(data, "train")
    test_images, test_labels = load_images(data, "test")
    if labels is None or test_labels is None:
        raise ValueError(f"{data} has no labels")
    torch.manual_seed(seed)
    net = Classifier().to(device)
    padded = F.pad(images.float(), (4, 4, 4, 4), mode="reflect").byte()
    opt = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = len(images) // batch
    cycle = torch.optim.lr_scheduler.OneCycleLR(opt, lr, epochs * steps, pct_start=0.2)
    span, start = torch.arange(32), time.time()
    for epoch in range(epochs):
        order, correct = torch.randperm(len(images)), 0
        for index in tqdm(order[:steps * batch].view(steps, batch), leave=False):
            y, x = torch.randint(9, (2, batch, 1)) + span           # the crop's rows, columns
            x = torch.where(torch.rand(batch, 1) < 0.5, x, x.flip(1))
            crop = padded[index[:, None, None], :, y[:, :, None], x[:, None, :]]    # (N, 32, 32, 3)
            logits = net(crop.permute(0, 3, 1, 2).float().to(device))[1]
            target = labels[index].to(device)
            opt.zero_grad()
            F.cross_entropy(logits, target).backward()
            opt.step()
            cycle.step()
            correct += (logits.argmax(1) == target).sum().item()
        print(f"epoch {epoch + 1}: {correct / (steps * batch):.4f} of the training crops right, "
              f"{time.time() - start:.0f} s", flush=True)
    out = Path(out)
    state = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    save_atomic({k: v.cpu() for k, v in state.items()}, out)
    net.load_state_dict(state)                          # measure with what was saved
    net = fuse(net)
    logits = torch.cat([l for _, l in extract(test_images, net)])
    save_stats(measure(images, net), out.with_name(out.stem + "_cifar10.npz"))
    print(f"{(logits.argmax(1) == test_labels).double().mean():.4f} of the test images right, "
          f"{time.time() - start:.0f} s: {out}")


# ------------------------------------------------------------------------------------ command line

def save_stats(measured, path):
    """Write mu, sigma (EDM's names) and n."""
    n = {} if measured.n is None else {"n": measured.n}
    with atomic(path) as tmp, open(tmp, "wb") as f:
        np.savez(f, mu=measured.mu, sigma=measured.sigma, **n)


def load_stats(path):
    """-> Measured, if `path` is an .npz of statistics (mu, sigma), else None."""
    if not (Path(path).suffix == ".npz" and zipfile.is_zipfile(path)):
        return None
    with reading(path, "statistics"), np.load(path, allow_pickle=False) as stored:
        if "mu" not in stored:
            return None
        mu, sigma = (torch.from_numpy(stored[k]).double() for k in ("mu", "sigma"))
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise ValueError(f"mu of {tuple(mu.shape)} with sigma of {tuple(sigma.shape)}")
        return Measured(mu, sigma, int(stored["n"]) if "n" in stored else None)


def measure_source(source, net, how="clean", batch=64, progress=False, n=None):
    """SOURCE or SOURCE:SPLIT -> Measured, of n of its images, evenly spread, or of all. CIFAR-10's
    own for the compact features are at hand."""
    if source == "cifar10" and isinstance(net, Classifier):
        source = REFERENCE
    if stored := load_stats(source):
        return stored
    path, _, split = str(source).rpartition(":")
    if split not in ("train", "test"):
        path, split = source, "train"
    images = load_images(path, split)[0]
    if n and n < len(images):
        images = images[torch.arange(n) * len(images) // n]
    try:
        return measure(images, net, how, batch, progress)
    except ValueError as e:
        raise ValueError(f"{source}: {e}") from e


def compare(a, b, features="compact", how="clean"):
    """-> the distance of two Measured and all that should be said with it, as a dictionary."""
    names = {"compact": ("FD-compact", "IS-compact"), "inception": ("FID", "IS")}[features]
    excess = [bias(a, b), bias(b, a)]
    return {"distance": names[0], "value": frechet(a.mu, a.sigma, b.mu, b.sigma),
            "bias": None if None in excess else sum(excess), "score": names[1],
            "score_mean": a.score and a.score[0], "score_std": a.score and a.score[1],
            "variance": float(a.sigma.trace() / b.sigma.trace()),       # below 1: less variety
            "n": [a.n, b.n], "features": features, "resize": how}


def one_line(result):
    """compare()'s dictionary for people."""
    line = f"{result['distance']} {result['value']:.4g}"
    n = [f"{k} images" if k else "statistics" for k in result["n"]]
    if any(k and k < 50_000 for k in result["n"]):
        bias = result["bias"]
        much = "too few to say how much" if bias is None else f"about {bias:.2g}"
        line += f" (biased upward by fewer than 50000 images: {much})"
    if result["score_mean"]:
        line += f"  {result['score']} {result['score_mean']:.3f} ± {result['score_std']:.3f}"
    line += f"  variance {result['variance']:.3f} of the reference's"
    return f"{line}  {n[0]} against {n[1]}  {result['features']}, resize {result['resize']}"


def main(argv):
    if argv[:1] == ["train"]:
        parser = Parser(prog="fid.py train", description="Train FD-compact's classifier.")
        parser.add_argument("--data", default="cifar10", help="what data.load_images takes")
        parser.add_argument("--out", default=CLASSIFIER)
        parser.add_argument("--epochs", type=positive, default=12)
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--device", type=device, default="cpu")
        args = parser.parse_args(argv[1:])
        tune_cpu()
        return train_classifier(**vars(args))

    parser = Parser(prog="fid.py", description=__doc__.split("\n\n")[2])
    parser.add_argument("a", help="the set to judge; SOURCE:test takes its test split")
    parser.add_argument("b", nargs="?", default="cifar10", help="the reference (cifar10)")
    parser.add_argument("-n", type=positive, help="take so many of A's images, evenly spread")
    parser.add_argument("--features", choices=("compact", "inception"), default="compact")
    parser.add_argument("--resize", choices=("clean", "tf"), default="clean")
    parser.add_argument("--batch", type=positive, default=64)
    parser.add_argument("--device", type=device,
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save-stats", metavar="NPZ", help="keep the statistics of A")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    tune_cpu()
    net = load_net(args.features).to(args.device)
    a, b = (measure_source(s, net, args.resize, args.batch, True, n)
            for s, n in ((args.a, args.n), (args.b, None)))
    if args.save_stats:
        save_stats(a, args.save_stats)
    result = compare(a, b, args.features, args.resize)
    print(json.dumps(result) if args.json else one_line(result))
    return 0


if __name__ == "__main__":
    run_main(main)
