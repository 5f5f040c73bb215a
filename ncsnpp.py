"""The network that teacher, student and fake score share: DDPM++ / NCSN++ behind EDM's D(x; sigma).

The U-Net is Song et al. 2021 (arXiv 2011.13456) as Karras et al. 2022 (EDM, arXiv 2206.00364)
arrange it, for square images of any size and any number of channels; the parameter names are those
of EDM's official checkpoints, so that their weights load. The classifier of Di-Bregman
(Algorithm 1, line 9) has no network of its own: its logits are the channel mean of the encoder's
last features (SiDA, arXiv 2410.14919).

    net = EDMPrecond(**CONFIGS["compact"])
    D_x = net(x, sigma, c)                                 # the denoised image; c: labels, or None
    D_x, logits = net(x, sigma, c, return_logits=True)     # one pass for both
    logits = net.encode(x, sigma, c)                       # the encoder alone
    net = EDMPrecond(**configuration(state))               # the network that has these tensors
"""
import math
import re
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

SQRT_HALF = math.sqrt(0.5)

_DDPMPP = dict(embedding_type="positional", encoder_type="standard",
               channel_mult_noise=1, resample_filter=[1, 1])
_NCSNPP = dict(embedding_type="fourier", encoder_type="residual",
               channel_mult_noise=2, resample_filter=[1, 3, 3, 1])
_CIFAR10 = dict(model_channels=128, channel_mult=[2, 2, 2], dropout=0.13, augment_dim=9,
                num_blocks=4, attn_resolutions=[16])
_COMPACT = dict(model_channels=16, channel_mult=[1, 2, 4], dropout=0.0, augment_dim=0,
                num_blocks=1, attn_resolutions=[8])

CONFIGS = {         # FID as EDM's Table 2 has it, by Heun with 35 evaluations; FLOP of one forward
    "compact": _DDPMPP | _COMPACT,                              # 0.74 M parameters, 0.23 GFLOP
    "compact-ve": _NCSNPP | _COMPACT,                           # 0.75 M
    "compact-cond": _DDPMPP | _COMPACT | dict(label_dim=10),    # 0.74 M
    "uncond-vp": _DDPMPP | _CIFAR10,                            # 55.7 M, 42 GFLOP, FID 1.97
    "uncond-ve": _NCSNPP | _CIFAR10,                            # 56.4 M
    "cond-vp": _DDPMPP | _CIFAR10 | dict(label_dim=10),         # 55.7 M, FID 1.79
}


def c_out(sigma, sigma_data):
    """Return the scale of F's output in D, EDM Table 1. 1 / c_out^2 is the weight of EDM's loss.

    sigma, sigma_data: > 0, numbers or tensors. What is returned is a number or a tensor like sigma.
    """
    return sigma * sigma_data / (sigma ** 2 + sigma_data ** 2) ** 0.5


def per_image(sigma, x):
    """Return sigma, a number or (N,) or (N, 1, 1, 1), as float32 (1 or N, 1, 1, 1), where x is."""
    return torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1, 1, 1, 1)


# ---------------------------------------------------------------------------------- its parts

def resample(x, direction, f, padding=None):                    # x (N, C, H, W)
    """Return features of half ("down") or twice ("up") the size.

    Each channel is filtered by f, (1, 1, taps, taps), with stride 2; "up" is the transpose of that,
    times 4, since a pixel becomes four. padding: on each side, (taps - 1) // 2 where it is None.
    """
    taps, channels = f.shape[-1], x.shape[1]
    if taps == 2:                                       # [1, 1]: a plain box, without a padding
        if direction == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2, mode="nearest")
    f = f.to(x.dtype).expand(channels, 1, -1, -1)
    padding = (taps - 1) // 2 if padding is None else padding
    if direction == "down":
        return F.conv2d(x, f, stride=2, padding=padding, groups=channels)
    return F.conv_transpose2d(x, 4 * f, stride=2, padding=padding, groups=channels)


class Conv2d(nn.Conv2d):
    """A convolution with optional 2x resampling in front of it: "up", "down" or None."""

    def __init__(self, cin, cout, kernel, direction=None, taps=(1, 1), padding=None):
        super().__init__(cin, cout, kernel, padding=kernel // 2 if padding is None else padding)
        nn.init.xavier_uniform_(self.weight)                    # Song et al.: fan_avg, uniform
        nn.init.zeros_(self.bias)
        self.direction = direction
        if direction:
            taps = torch.tensor(taps, dtype=torch.float32)
            taps = taps.outer(taps) / taps.sum() ** 2
            self.register_buffer("resample_filter", taps[None, None])

    def forward(self, x, gain=1.0):                             # x (N, cin, H, W)
        """Return gain times the convolution of x, resampled. Scaling the weight costs less than
        scaling the features."""
        if self.direction:
            x = resample(x, self.direction, self.resample_filter)
        if gain == 1.0:
            return self._conv_forward(x, self.weight, self.bias)
        return self._conv_forward(x, self.weight * gain, self.bias * gain)


class PyramidConv2d(Conv2d):
    """NCSN++'s image pyramid: the convolution first, then the filter without padding."""

    def forward(self, x):                                       # (N, cin, H, W)
        x = self._conv_forward(x, self.weight, self.bias)       # of H + 2 by W + 2
        return resample(x, self.direction, self.resample_filter, padding=0)


def group_norm(channels, eps=1e-6):
    """Return the normalisation in groups of at least 4 channels, at most 32 groups."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


def attention(qkv, heads=1):
    """Return softmax(q k^T / sqrt(d)) v over all places of an image, (N, C, H, W).

    qkv: (N, 3 C, H, W), whose channels are ordered as (head, channel, one of q, k, v).
    """
    n, channels, height, width = qkv.shape
    qkv = qkv.reshape(n, heads, channels // (3 * heads), 3, height * width)
    q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous()           # each (N, heads, H W, d)
    a = F.scaled_dot_product_attention(q, k, v)
    return a.mT.reshape(n, channels // 3, height, width)


class Block(nn.Module):
    """A residual block with a noise embedding, optional resampling and self-attention:

        h = conv1(dropout(silu(norm1(conv0(silu(norm0(x))) + affine(emb)))))
        y = (skip(x) + h) / sqrt(2)
        y = (y + proj(attention(qkv(norm2(y))))) / sqrt(2)      where there is attention

    The square roots keep the variance of a sum of two that of each.
    """

    def __init__(self, cin, cout, emb_width, dropout, attend=False, direction=None, taps=(1, 1)):
        super().__init__()
        self.norm0 = group_norm(cin)
        self.conv0 = Conv2d(cin, cout, 3, direction, taps)
        self.affine = nn.Linear(emb_width, cout)
        self.norm1 = group_norm(cout)
        self.dropout = dropout
        self.conv1 = Conv2d(cout, cout, 3)
        nn.init.zeros_(self.conv1.weight)                       # starts as the skip alone
        self.skip = Conv2d(cin, cout, 1, direction, taps) if direction or cin != cout else None
        self.attend = attend
        if attend:
            self.norm2 = group_norm(cout)
            self.qkv = Conv2d(cout, 3 * cout, 1)
            self.proj = Conv2d(cout, cout, 1)
            nn.init.zeros_(self.proj.weight)

    def forward(self, x, emb):                              # x (N, cin, H, W), emb (N, emb_width)
        h = self.conv0(F.silu(self.norm0(x)))                   # (N, cout, H', W')
        h += self.affine(emb)[:, :, None, None].to(h.dtype)
        h = F.silu(self.norm1(h))
        # Each sum takes one pass over the features: the convolution carries the 1/sqrt(2) as its
        # gain, and the sum overwrites its output, which its backward does not need.
        y = self.conv1(F.dropout(h, self.dropout, self.training), gain=SQRT_HALF)
        if self.skip is None:
            y.add_(x, alpha=SQRT_HALF)
        else:
            y += self.skip(x, gain=SQRT_HALF)
        if self.attend:
            a = self.proj(attention(self.qkv(self.norm2(y))), gain=SQRT_HALF)
            y = a.add_(y, alpha=SQRT_HALF)
        return y                                                # (N, cout, H', W')


# ---------------------------------------------------------------------------------- the network

def levels_of(resolution, model_channels, channel_mult):
    """Return each level's pixels a side, half those of the level before, and its channels.

    Raises ValueError for a resolution that can't be halved so often.
    """
    step = 2 ** (len(channel_mult) - 1)
    if resolution < 1 or resolution % step:
        low = max(1, resolution // step) * step
        raise ValueError(f"a network of {len(channel_mult)} levels takes images whose sides are "
                         f"multiples of {step}, such as {low} or {low + step}, not {resolution}")
    return [(resolution >> i, model_channels * m) for i, m in enumerate(channel_mult)]


def encoder(levels, channels, cin, num_blocks, attn_resolutions, block, pyramid_taps=None):
    """Return the encoder, a ModuleDict with EDM's names, and the channels of each of its skips.

    levels: as levels_of has them. channels: of the images. cin: those of the first features.
    block(cin, cout, attend, direction) makes a block. pyramid_taps: the filter of NCSN++'s image
    pyramid, if there is one.
    """
    size = levels[0][0]         # UNet.encode runs what follows in this order, and reads its names
    enc = nn.ModuleDict({f"{size}x{size}_conv": Conv2d(channels, cin, 3)})
    skips, pyramid = [cin], channels
    for level, (size, width) in enumerate(levels):
        name = f"{size}x{size}"
        if level > 0:
            enc[f"{name}_down"] = block(cin, cin, direction="down")
            if pyramid_taps:
                enc[f"{name}_aux_residual"] = PyramidConv2d(pyramid, cin, 3, "down", pyramid_taps,
                                                            padding=2)
                pyramid = cin
            skips.append(cin)
        for i in range(num_blocks):
            enc[f"{name}_block{i}"] = block(cin, width, attend=size in attn_resolutions)
            cin = width
            skips.append(cin)
    return enc, skips


def decoder(levels, skips, num_blocks, attn_resolutions, block, attend_in_each=False):
    """Return the decoder, whose blocks take a skip each, the last one first.

    attend_in_each: whether every block of a level in attn_resolutions has attention, or only the
    last of them.
    """
    dec, cin = nn.ModuleDict(), skips[-1]
    for level, (size, width) in reversed(list(enumerate(levels))):
        name = f"{size}x{size}"
        if level == len(levels) - 1:
            dec[f"{name}_in0"] = block(cin, cin, attend=True)
            dec[f"{name}_in1"] = block(cin, cin)
        else:
            dec[f"{name}_up"] = block(cin, cin, direction="up")
        for i in range(num_blocks + 1):
            attend = size in attn_resolutions and (attend_in_each or i == num_blocks)
            dec[f"{name}_block{i}"] = block(cin + skips.pop(), width, attend=attend)
            cin = width
    return dec


class UNet(nn.Module):
    """F(x, c_noise) of EDM's Eq. (7).

    embedding_type: "positional" or "fourier". encoder_type: "standard" or "residual".
    resample_filter: its taps. channel_mult: one for each level. num_blocks: per level.
    attn_resolutions: pixels a side. augment_dim: 0 for no layer for augmentations.
    """

    def __init__(self, resolution, channels, label_dim, *, embedding_type, encoder_type,
                 channel_mult_noise, resample_filter, model_channels, channel_mult, num_blocks,
                 attn_resolutions, dropout=0.13, augment_dim=0):
        super().__init__()
        levels = levels_of(resolution, model_channels, channel_mult)
        noise_width, emb_width = model_channels * channel_mult_noise, model_channels * 4
        if embedding_type == "fourier":
            self.map_noise = nn.Module()
            self.map_noise.register_buffer("freqs", 16 * torch.randn(noise_width // 2))
        self.map_label = nn.Linear(label_dim, noise_width) if label_dim else None
        if augment_dim:     # in EDM's checkpoints; it adds nothing to images that aren't augmented
            self.map_augment = nn.Linear(augment_dim, noise_width, bias=False)
        self.map_layer0 = nn.Linear(noise_width, emb_width)
        self.map_layer1 = nn.Linear(emb_width, emb_width)

        block = partial(Block, emb_width=emb_width, dropout=dropout, taps=resample_filter)
        taps = resample_filter if encoder_type == "residual" else None
        self.enc, skips = encoder(levels, channels, model_channels, num_blocks, attn_resolutions,
                                  block, taps)
        self.dec = decoder(levels, skips, num_blocks, attn_resolutions, block)
        size, width = levels[0]
        self.dec[f"{size}x{size}_aux_norm"] = group_norm(width)
        self.dec[f"{size}x{size}_aux_conv"] = Conv2d(width, channels, 3)
        nn.init.zeros_(self.dec[f"{size}x{size}_aux_conv"].weight)

    def embed(self, c_noise, c):
        """Return the embedding (N, 4 model_channels) of the noise level, c_noise (N,), and of the
        labels c (N, label_dim), or None."""
        if hasattr(self, "map_noise"):
            freqs = 2 * math.pi * self.map_noise.freqs
        else:
            freqs = torch.logspace(0, -4, self.map_layer0.in_features // 2, device=c_noise.device)
        angles = c_noise[:, None] * freqs                       # (N, width / 2)
        emb = torch.cat([angles.sin(), angles.cos()], dim=1)
        if self.map_label is not None:
            emb = emb + self.map_label(c * math.sqrt(c.shape[1]))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def encode(self, x, emb, run):
        """Return the skips, a list of features; the last one is the encoder's output.

        run(block, x, emb) returns a block's output.
        """
        skips, image = [], x                                    # x (N, channels, H, W)
        for name, module in self.enc.items():
            if "aux" in name:       # the image, halved, joins what _down gave, in its place
                image = x = (skips.pop() + module(image)) * SQRT_HALF
            else:
                x = run(module, x, emb) if isinstance(module, Block) else module(x)
            skips.append(x)
        return skips

    def decode(self, skips, emb, run):
        """Return F, (N, channels, H, W), from what encode() returned."""
        skips, x = list(skips), skips[-1]
        for name, module in self.dec.items():
            if "aux_norm" in name:
                x = F.silu(module(x))
            elif "aux_conv" in name:
                return module(x)
            else:
                x = torch.cat([x, skips.pop()], dim=1) if "block" in name else x
                x = run(module, x, emb)


class Denoiser(nn.Module):
    """The denoiser D(x; sigma) = c_skip x + c_out F(c_in x, c_noise), EDM Eq. (7) and Table 1.

    resolution: pixels a side, which the levels must halve to a whole number (ValueError). channels:
    1 for grey images, 3 for RGB. label_dim: number of classes, 0 for an unconditional network.
    sigma_data: the standard deviation of the pixels. config: the other keywords of the U-Net.
    """
    unet = None         # the class of F: it has embed, encode and decode, as UNet above
    gradient_checkpointing = False      # True: less memory in training, and a forward pass more

    def __init__(self, resolution=32, channels=3, label_dim=0, sigma_data=0.5, **config):
        super().__init__()
        self.model = self.unet(resolution, channels, label_dim, **config)
        self.resolution, self.channels = resolution, channels
        self.label_dim, self.sigma_data = label_dim, sigma_data

    def _run(self, block, x, emb):
        """Return a block's output; checkpointing computes it again for the backward."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, emb, use_reentrant=False)
        return block(x, emb)

    def _features(self, x, sigma, c):
        """Return the encoder's skips, and the embedding of noise level and label."""
        if self.label_dim and c is None:
            raise ValueError("a class-conditional network needs labels, one-hot (N, label_dim)")
        c_in = (self.sigma_data ** 2 + sigma ** 2).rsqrt()
        c_noise = (sigma.log() / 4).flatten().expand(x.shape[0])
        emb = self.model.embed(c_noise, c)
        return self.model.encode(c_in * x, emb, self._run), emb

    def forward(self, x, sigma, c=None, return_logits=False):
        """Denoise, and on request classify, in one pass.

        x: float (N, channels, resolution, resolution), clean images in [-1, 1] plus noise. sigma:
        standard deviation of the noise, > 0, a number, (N,) or (N, 1, 1, 1). c: one-hot labels
        (N, label_dim), which an unconditional network ignores. Raises ValueError where labels are
        needed and missing. Returns D_x, float32 like x, and the logits of encode() with
        return_logits.
        """
        x, sigma = x.float(), per_image(sigma, x)
        skips, emb = self._features(x, sigma, c)
        F_x = self.model.decode(skips, emb, self._run).float()
        c_skip = self.sigma_data ** 2 / (sigma ** 2 + self.sigma_data ** 2)
        D_x = c_skip * x + c_out(sigma, self.sigma_data) * F_x                      # Eq. (7)
        return (D_x, skips[-1].float().mean(1)) if return_logits else D_x

    def encode(self, x, sigma, c=None):
        """Classify: return the logits l, sigmoid(l) = p / (p + q), so log r = -l, float32
        (N, H, W). There is one at each place of the encoder's last features (8 x 8 of CIFAR-10's),
        their channel mean. Arguments as forward."""
        skips, _ = self._features(x.float(), per_image(sigma, x), c)
        return skips[-1].float().mean(1)


class EDMPrecond(Denoiser):
    """DDPM++ or NCSN++ as a denoiser. The keywords beside Denoiser's are one of CONFIGS."""
    unet = UNet


# ---------------------------------------------------------------- which network has these tensors?

def outline(state):
    """Return what the encoder's tensors say of a U-Net with EDM's names, DDPM++, NCSN++ or ADM: a
    dictionary of keywords. Raises ValueError, with its name, for a tensor that is missing."""
    shape = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found = [re.match(r"model\.enc\.(\d+)x\1_(block\d+)?", name) for name in shape]
    sizes = sorted({int(m[1]) for m in found if m}, reverse=True) or [32]       # 32, 16, 8
    try:
        width, channels, _, _ = shape[f"model.enc.{sizes[0]}x{sizes[0]}_conv.weight"]
        widths = [shape[f"model.enc.{size}x{size}_block0.conv0.weight"][0] for size in sizes]
    except KeyError as e:
        raise ValueError(f"not DDPM++, NCSN++ or ADM: no tensor is named {e.args[0]}") from None
    return dict(
        resolution=sizes[0], channels=channels, model_channels=width,
        label_dim=shape.get("model.map_label.weight", (0, 0))[1],
        augment_dim=shape.get("model.map_augment.weight", (0, 0))[1],
        channel_mult=[w // width for w in widths],
        num_blocks=len({m[2] for m in found if m and int(m[1]) == sizes[0]} - {None}),
        attn_resolutions=[s for s in sizes if f"model.enc.{s}x{s}_block0.qkv.weight" in shape])


def check_tensors(network, config, state):
    """Raise ValueError, naming the first tensor that does not belong, unless network(**config) has
    the names and shapes of `state`."""
    with torch.device("meta"):                                  # shapes alone, no memory
        expected = network(**config).state_dict()
    for name in [*state, *expected]:
        if name not in expected:
            raise ValueError(f"{name} does not belong to this network")
        if name not in state:
            raise ValueError(f"{name} is missing")
        if state[name].shape != expected[name].shape:
            raise ValueError(f"{name} is {tuple(state[name].shape)}, not "
                             f"{tuple(expected[name].shape)}")


def configuration(state):
    """Return the keywords of the EDMPrecond that has these tensors.

    state: a state dict, of which names and shapes are read; they don't say dropout and sigma_data.
    Raises ValueError, which says what is wrong, if there is no such network.
    """
    if "model.out_conv.weight" in state:
        raise ValueError("it looks like ADM, as EDM's imagenet-64x64: see examples/imagenet64")
    config = outline(state)
    taps = {state[name].shape[-1] for name in state if name.endswith("resample_filter")}
    config |= dict(
        embedding_type="fourier" if "model.map_noise.freqs" in state else "positional",
        encoder_type="residual" if any("aux_residual" in name for name in state) else "standard",
        channel_mult_noise=2 if "model.map_noise.freqs" in state else 1,
        resample_filter=[1, 3, 3, 1] if 4 in taps else [1, 1])
    check_tensors(EDMPrecond, config, state)
    return config
