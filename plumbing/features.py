"""The networks whose features fid.py compares: Inception-v3, and a small CIFAR-10 classifier.

Both take float images in [0, 255] (N, 3, size, size) and return features (N, width) and logits.
"""
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from plumbing.loop import load


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


# --------------------------------------------------------------------------------- Inception-v3

def average_pool(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def max_pool(x):
    return F.max_pool2d(x, 3, 1, 1)


def halving_pool(x):
    return F.max_pool2d(x, 3, 2)


class Mixed(nn.Module):
    """Inception's block: chains of convolutions side by side, one of them behind a pool.

    branches: the steps (width, kernel[, stride]) of each chain, by its name; a list as last step is
    a fork. The parameters are named as in the weights file: branch_1, branch_2, and of a fork
    branch_3a, branch_3b.
    """

    def __init__(self, cin, pool, branches):
        super().__init__()
        self.pool, self.chains = pool, []
        for branch, steps in branches.items():
            names, width = [], cin
            for i, step in enumerate(steps, 1):
                name = branch if len(steps) == 1 else f"{branch}_{i}"
                fork = isinstance(step, list)
                names.append([name + "ab"[j] for j in range(len(step))] if fork else [name])
                for n, (cout, *kernel) in zip(names[-1], step if fork else [step]):
                    self.add_module(n, ConvBN(width, cout, *kernel))
                width = step[0]                     # unused after a fork, which ends its chain
            self.chains.append((branch, names))

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

    Average pools do not count the padding, and the last block pools by maximum. The 1008 logits
    have no bias: the Inception Score is taken from them so.
    """
    size, width = 299, 2048

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


# ------------------------------------------------------------------------ the compact classifier

class Classifier(nn.Module):
    """A small CIFAR-10 classifier, whose pooled last feature map is FD-compact's feature vector.

    Three times: convolution, maximum over 2 x 2, a residual pair; widths 32, 64, 128.
    """
    size, width = 32, 128

    def __init__(self):
        super().__init__()
        widths = (16, 32, 64, 128)
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


def train_classifier(images, labels, epochs=12, batch=128, lr=0.1, seed=0, device="cpu"):
    """Train a Classifier and return its state dict, float16 on the CPU. Random crops and flips,
    Nesterov momentum, one cycle of the learning rate.

    images: uint8 (N, 3, 32, 32), labels: int64 (N,), 0 to 9. Raises ValueError for others.
    """
    right = images.shape[1:] == (3, 32, 32) and len(images) >= batch
    if not right or labels is None or labels.max() > 9:
        raise ValueError(f"needs {batch} images or more of 32 x 32, RGB, with labels from 0 to 9")
    torch.manual_seed(seed)
    net = Classifier().to(device)
    opt = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = len(images) // batch
    cycle = torch.optim.lr_scheduler.OneCycleLR(opt, lr, epochs * steps, pct_start=0.2)
    start = time.time()
    for epoch in range(epochs):
        order, correct = torch.randperm(len(images)), 0
        for index in tqdm(order[:steps * batch].view(steps, batch), leave=False, disable=None):
            logits = net(random_crops(images, index).to(device))[1]
            target = labels[index].to(device)
            opt.zero_grad()
            F.cross_entropy(logits, target).backward()
            opt.step()
            cycle.step()
            correct += (logits.argmax(1) == target).sum().item()
        print(f"epoch {epoch + 1}: {correct / (steps * batch):.4f} of the training crops right, "
              f"{time.time() - start:.0f} s", flush=True)
    return {k: (v.half() if v.is_floating_point() else v).cpu()
            for k, v in net.state_dict().items()}


def random_crops(images, index):
    """Return images[index] as floats, shifted by up to 4 pixels, mirrored at the border, half of
    them flipped."""
    y, x = torch.randint(-4, 5, (2, len(index), 1)) + torch.arange(32)      # rows, columns
    x = torch.where(torch.rand(len(index), 1) < 0.5, x, x.flip(1))
    y, x = (31 - (31 - at.abs()).abs() for at in (y, x))                    # mirrored: -1 is 1
    crops = images[index[:, None, None], :, y[:, :, None], x[:, None, :]]   # (n, 32, 32, 3)
    return crops.permute(0, 3, 1, 2).float()


# ---------------------------------------------------------------------------- to a network's size

def resize_matrix(size, target, how):
    """Return the resize of one axis as a matrix (target, size). Both resizes are linear and
    separable.

    clean: Pillow's bicubic (with its low-pass when shrinking), read off from Pillow itself;
    tf: TensorFlow 1's bilinear, whose source coordinate is i * size / target, no half pixel.
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
    """Return float images in [0, 255] (N, C, H, W) as (N, C, target, target), clipped to that range
    and not rounded. how: see resize_matrix."""
    height, width = images.shape[2:]
    if (height, width) == (target, target):
        return images
    rows = resize_matrix(height, target, how).to(images.device)
    columns = resize_matrix(width, target, how).to(images.device)
    return (rows @ (images @ columns.T)).clamp(0, 255)      # columns first, as Pillow does


# --------------------------------------------------------------------------------- with weights

NETS = {"compact": Classifier, "inception": Inception}


def fuse(net):
    """Put batch norm, which in evaluation is one more scale and shift, into the convolutions."""
    for block in [m for m in net.modules() if isinstance(m, ConvBN)]:
        block.conv, block.bn = fuse_conv_bn_eval(block.conv.eval(), block.bn.eval()), nn.Identity()
    return net.eval().requires_grad_(False)


def read_net(kind, path):
    """Return the network `kind` of NETS with the weights at `path`, fused, in eval mode. Raises
    ValueError or OSError, which names the file."""
    with torch.random.fork_rng(devices=[]):         # its first weights are drawn, for nothing
        net = NETS[kind]()
    try:
        net.load_state_dict(load(path))
    except (RuntimeError, TypeError) as e:
        raise ValueError(f"{path}: not weights of the {kind} network") from e
    return fuse(net)
