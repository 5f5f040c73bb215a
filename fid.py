"""How far one set of images is from another: FID (Heusel et al. 2017, arXiv 1706.08500), Inception
Score (Salimans et al. 2016, arXiv 1606.03498), precision and recall.

    python fid.py samples.npz cifar10                           # offline: FD-compact, not FID
    python fid.py samples.npz cifar10 --features inception      # FID with Clean-FID's resize
    python fid.py samples.npz cifar10-32x32.npz --features inception --resize tf    # as EDM, SiD
    python fid.py train --data cifar10                          # the classifier behind FD-compact

    python fid.py pretrained/compact_teacher_samples.zip        # FD-compact 2.10, IS-compact 4.28

A set is a folder, .zip or .tar of images, an .npy or .npz of uint8 images, `cifar10`, or an .npz
of what was measured before: features (--save writes them), or statistics alone (mu, sigma; EDM's
fid-refs), which have no precision and recall. FD-compact is the same distance in the features of a
small CIFAR-10 classifier that comes with this project (pretrained/): it needs no download, and its
numbers are not FIDs nor comparable with any.
"""
from plumbing.run import run_main, tune_cpu

import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.linalg
import torch
from tqdm import tqdm

from data import load_images
from plumbing.features import (CLASSIFIER, REFERENCE, Classifier, load_net, read_net, resize,
                               train_classifier)
from plumbing.files import atomic, claim, reading, save_atomic
from plumbing.measured import in_words, read_measured
from plumbing.options import (Parser, count, ending, path, reader, text, torch_device,
                              torch_seed)

NAMES = {"compact": ("FD-compact", "IS-compact"), "inception": ("FID", "IS")}


# ----------------------------------------------------------------------------- images to features

def extract(images, net, how="clean", batch=64, progress=False):
    """-> features (N, d), logits (N, classes), float32 on the CPU.

    images: (N, 3, H, W), uint8, or float [0, 255], which is rounded and clipped first, as a saved
    file would be. Raises ValueError if a feature is not finite.
    """
    features, logits, device = [], [], next(net.parameters()).device
    for start in tqdm(range(0, len(images), batch), disable=None if progress else True):
        x = images[start:start + batch].to(device)
        if x.dtype != torch.uint8:
            x = x.round().clamp(0, 255)
        with torch.inference_mode():
            f, y = net(resize(x.float(), net.size, how))
        bad = ~f.isfinite().all(1)
        if bad.any():
            raise ValueError(f"the features of image {start + bad.nonzero()[0].item()} "
                             "are not finite")
        features.append(f.cpu())
        logits.append(y.cpu())
    return torch.cat(features), torch.cat(logits)


def shuffled(x):
    """The rows of x in a random order, always the same. Sets come sorted by class, or with the
    classes taking turns: neither neighbours nor every tenth image would be a fair part of them."""
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]


# -------------------------------------------------------------------------- features to a distance

def stats(features):
    """features (N, d) -> mu (d,), sigma (d, d) over N - 1, float64. Raises ValueError below 2."""
    n, parts = len(features), features.split(4096)      # in float64 a part at a time
    if n < 2:
        raise ValueError(f"{n} image(s): a covariance takes at least 2")
    mu = sum(f.double().sum(0) for f in parts) / n
    return mu, sum((f.double() - mu).T @ (f.double() - mu) for f in parts) / (n - 1)


def factor(sigma):
    """-> F with F F^T = sigma. Cholesky's where there is one, else by eigenvalues: a covariance of
    fewer images than dimensions is singular. Raises ValueError where one is negative."""
    F, failed = torch.linalg.cholesky_ex(sigma)
    if failed:
        values, vectors = torch.linalg.eigh(sigma)
        if values[0] < -1e-5 * values[-1].abs():        # rounding to float32 does less
            raise ValueError(f"no covariance: it has the eigenvalue {values[0].item():.3g}")
        F = vectors * values.clamp(min=0).sqrt()
    return F


def frechet(mu1, sigma1, mu2, sigma2):
    """Fréchet distance of two Gaussians, |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), a float.

    The trace of the root needs no root of a matrix: with S = F F^T and P = F1^T F2, it is the sum
    of the roots of the eigenvalues of P P^T, which are those of S1 S2. mu: (d,), sigma: (d, d),
    tensors or arrays. Raises ValueError for statistics of different widths, not finite, or of no
    covariance.
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
    else:                               # rounding, 1e-16, has a root that is not small
        root = torch.linalg.svdvals(P).sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root).item()


def inception_score(logits, splits=10):
    """exp E KL(p(y|x) ‖ p(y)) of logits (N, classes), between 1 and the number of classes: mean
    and standard deviation over random splits of equal size."""
    scores = []
    for part in shuffled(logits).tensor_split(min(splits, len(logits))):
        p = part.double().softmax(1)                                        # p(y|x)
        marginal = p.mean(0)                                                # p(y)
        kl = torch.xlogy(p, p).sum(1).mean() - torch.xlogy(marginal, marginal).sum()
        scores.append(kl.exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


# ------------------------------------------------------------------------------ precision, recall

CELLS = 2 ** 23                     # of a matrix of distances at a time: 64 MB


def distances(x, y):
    """Yield some rows i of x and their squared distances to y, (rows, len(y))."""
    for rows in torch.arange(len(x)).split(max(1, CELLS // len(y))):
        square = x[rows].square().sum(1, keepdim=True) + y.square().sum(1)
        yield rows, square.addmm_(x[rows], y.T, alpha=-2)


def neighbours(x, k):
    """-> each sample's squared distances to its k nearest others in x, rising (N, k). The margin is
    for rounding: a copy of the k-th neighbour is on the ball, and counts as in it."""
    nearest = []
    for rows, square in distances(x, x):
        square[torch.arange(len(rows)), rows] = torch.inf
        nearest.append(square.topk(k, largest=False).values)
    return torch.cat(nearest) + 1e-13 * x.square().sum(1, keepdim=True)


def precision_recall(real, generated, k=3, k_coverage=5):
    """Of features (N, d), (M, d): a dictionary of four numbers. A sample's ball reaches to its
    k-th neighbour in its own set.

    precision: the share of generated samples in any real ball; recall: of real samples in any
    generated ball (Kynkäänniemi et al. 2019, arXiv 1904.06991). density: the number of real balls
    that a generated sample is in, over k_coverage; coverage: the share of real balls with a
    generated sample in them (Naeem et al. 2020, arXiv 2002.09797). Take N = M to compare sets.
    Raises ValueError for too few samples, different widths, and features that are not finite.
    """
    if not 1 <= min(k, k_coverage) <= max(k, k_coverage) < min(len(real), len(generated)):
        raise ValueError(f"k = {k} and {k_coverage}: must be at least 1, and less than the "
                         f"{len(real)} real and the {len(generated)} generated samples")
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"{real.shape[1]} and {generated.shape[1]} features do not compare")
    if not (real.isfinite().all() and generated.isfinite().all()):
        raise ValueError("features are not finite")
    center = real.double().mean(0)      # a difference of squares: float32 loses tight clusters
    real, generated = real.double() - center, generated.double() - center
    near = neighbours(real, max(k, k_coverage))
    ball, ball_coverage = near[:, k - 1], near[:, k_coverage - 1]                       # (N,)
    ball_generated = neighbours(generated, k)[:, -1:]                                   # (M, 1)
    precise, pairs, recalled, covered = 0, 0, False, False
    for rows, square in distances(generated, real):             # (rows, N)
        precise += (square <= ball).any(1).sum().item()
        recalled |= (square <= ball_generated[rows]).any(0)                             # (N,)
        inside = square <= ball_coverage
        pairs += inside.sum().item()
        covered |= inside.any(0)                                                        # (N,)
    return {"precision": precise / len(generated), "recall": recalled.double().mean().item(),
            "density": pairs / (k_coverage * len(generated)),
            "coverage": covered.double().mean().item()}


# -------------------------------------------------------------------------------- sets of images

@dataclass
class Measured:
    """What is kept of a set of images. 50,000 images have 400 MB of Inception's features."""
    mu: torch.Tensor                        # (d,), float64
    sigma: torch.Tensor                     # (d, d), float64
    n: int | None = None                    # images behind mu and sigma, if known
    score: tuple | None = None              # Inception Score: mean and standard deviation
    features: torch.Tensor | None = None    # (n, d), float32, or fewer if they come from a file
    resize: str | None = None               # how its images came to the network's size, if known


def measure(images, net, how="clean", batch=64, splits=10, progress=False):
    """images (N, 3, H, W) -> Measured; see extract."""
    features, logits = extract(images, net, how, batch, progress)
    return Measured(*stats(features), len(images), inception_score(logits, splits), features, how)


def save(measured, path, most=5000):
    """Write an .npz with mu, sigma (EDM's names), and as far as known n, score, resize, and
    features: float16, of `most` images at most."""
    known = {k: v for k, v in vars(measured).items() if v is not None}
    if measured.features is not None:
        known["features"] = shuffled(measured.features)[:most].half()
    with atomic(path) as tmp, open(tmp, "wb") as f:
        np.savez(f, **known)


def load(path):
    """-> Measured, if `path` is an .npz that holds features or statistics (mu, sigma), else None.
    Raises ValueError, naming the file, for what they can't be."""
    with reading(path, "statistics or features"):
        known = read_measured(path)
        if known and "mu" not in known:
            mu, sigma = stats(known["features"])
            known |= {"mu": mu, "sigma": sigma, "n": len(known["features"])}
        if known:
            factor(known["sigma"])                              # raises where it is no covariance
        return Measured(**known) if known else None


def measure_source(source, net, n=None, how="clean", **options):
    """SOURCE or SOURCE:SPLIT -> Measured, of n of its images or of all; how, options: see measure.
    CIFAR-10's training set in the compact features is at hand."""
    if source == "cifar10" and isinstance(net, Classifier):
        source = REFERENCE
    if stored := load(source):
        if n:
            raise ValueError(f"-n takes some of a set's images: {source} has none")
        if len(stored.mu) != net.width:
            raise ValueError(f"{source}: {len(stored.mu)} features, this network has {net.width}")
        if stored.resize not in (None, how):
            raise ValueError(f"{source}: measured with --resize {stored.resize}")
        return stored
    name, _, split = str(source).rpartition(":")
    if split not in ("train", "test") or not name:
        name, split = source, "train"
    images = load_images(name, split)[0]
    if n and n < len(images):
        images = shuffled(images)[:n]
    try:
        return measure(images, net, how, **options)
    except ValueError as e:
        raise ValueError(f"{source}: {e}") from e


# --------------------------------------------------------------------------- one set to another

def bias(a, b):
    """How much the distance of two Measured is too high because `a` has so few images.

    The distance is linear in 1/N (Chong & Forsyth 2020, arXiv 1911.07023), so what halving the set
    adds is what doubling it, again and again, would take away. None where a half has no more
    images than there are features, since there the line does not hold, or for fewer than 50,000
    whose features are not at hand; 0 for other statistics.
    """
    if a.features is None or len(a.features) != a.n:
        return 0.0 if a.n is None or a.n >= 50_000 else None
    if a.n // 2 <= len(a.mu):
        return None
    halves = [frechet(*stats(half), b.mu, b.sigma) for half in shuffled(a.features).tensor_split(2)]
    return sum(halves) / 2 - frechet(a.mu, a.sigma, b.mu, b.sigma)


def variety(a, b):
    """-> precision_recall of Measured a against b on equally many images, and `images`, how many;
    None without the features of 6 images of each."""
    if a.features is None or b.features is None:
        return None
    n = min(len(a.features), len(b.features))
    if n < 6:
        return None
    return precision_recall(shuffled(b.features)[:n], shuffled(a.features)[:n]) | {"images": n}


def compare(a, b, features="compact", how="clean"):
    """-> the distance of two Measured and all that should be said with it, as a dictionary."""
    names = NAMES[features]
    excess = [bias(a, b), bias(b, a)]
    return {"distance": names[0], "value": frechet(a.mu, a.sigma, b.mu, b.sigma),
            "bias": None if None in excess else sum(excess), "score": names[1],
            "score_mean": a.score and a.score[0], "score_std": a.score and a.score[1],
            "variance": float(a.sigma.trace() / b.sigma.trace()),       # below 1: less variety
            "variety": variety(a, b), "n": [a.n, b.n], "features": features, "resize": how}


# ------------------------------------------------------------------------------------ command line

def train(argv, device):
    """Train FD-compact's classifier and measure its training set. Both files have the names that
    they have in pretrained/: copy them there to use them."""
    parser = Parser(prog="fid.py train", description="Train FD-compact's classifier.")
    parser.add("data", text, "cifar10", "the labelled images: what data.load_images takes")
    parser.add("out", path, "runs/classifier", "the folder for its weights and statistics")
    parser.add("epochs", count, 12, "times that it sees each image")
    parser.add("seed", torch_seed, 0, "of its weights and of the order of the images")
    parser.add("device", torch_device, device, "what computes")
    args = parser.parse_args(argv)
    tune_cpu()
    images, labels = load_images(args.data, "train")
    test_images, test_labels = load_images(args.data, "test")
    if labels is None or test_labels is None:
        raise ValueError(f"--data {args.data}: images without labels")
    with claim(args.out):
        weights = args.out / CLASSIFIER.name
        save_atomic(train_classifier(images, labels, args.epochs, seed=args.seed,
                                     device=args.device), weights)
        net = read_net("compact", weights).to(args.device)      # judge what was saved: float16
        save(measure(images, net), args.out / REFERENCE.name)
        right = extract(test_images, net)[1].argmax(1) == test_labels
        which = "training" if torch.equal(images, test_images) else "test"      # without a split
        print(f"{right.double().mean():.4f} of the {which} images right: {weights}")


def main(argv):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if argv[:1] == ["train"]:
        return train(argv[1:], device)
    what_a_set_is = __doc__.split("\n\n")[-1]
    parser = Parser(prog="fid.py", description=what_a_set_is)
    parser.add_argument("a", type=text, help="the set to judge; SOURCE:test takes its test split")
    parser.add_argument("b", type=text, nargs="?", default="cifar10",
                        help="the reference (cifar10)")
    parser.add_argument("-n", type=count, help="take so many of A's images, at random")
    parser.add("features", reader(Literal["compact", "inception"]), "compact",
               "the network: compact (FD-compact) or inception (FID)")
    parser.add("resize", reader(Literal["clean", "tf"]), "clean",
               "to the network's size: clean (Pillow's bicubic) or tf (TensorFlow 1's bilinear)")
    parser.add("splits", count, 10, "parts of A for the Inception Score, whose spread is printed")
    parser.add("batch", count, 64, "images a step")
    parser.add("device", torch_device, device, "what computes")
    parser.add("save", ending(".npz"), None,
               "an .npz for A's statistics, score, and features of 5000 images")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    tune_cpu()
    net = load_net(args.features).to(args.device)
    how = dict(how=args.resize, batch=args.batch, splits=args.splits, progress=True)
    b = measure_source(args.b, net, **how)
    a = measure_source(args.a, net, args.n, **how)
    result = compare(a, b, args.features, args.resize)
    print(json.dumps(result) if args.json else in_words(result))
    if args.save:
        save(a, args.save)


if __name__ == "__main__":
    run_main(main)
