"""The network that teacher, student and fake score share: DDPM++ / NCSN++ behind EDM's D(x; sigma).

The U-Net is Song et al. 2021 (arXiv 2011.13456) as Karras et al. 2022 (EDM, arXiv 2206.00364)
arrange it; the parameter names are those of EDM's official CIFAR-10 checkpoints, so that their
weights load. The classifier of Di-Bregman (Algorithm 1, line 9) has no network of its own: its
logits are the channel mean of the encoder's last features (SiDA, arXiv 2410.14919).

    net = EDMPrecond(**CONFIGS["compact"])
    D_x = net(x, sigma, c)                                 # the denoised image; c: labels, or None
    D_x, logits = net(x, sigma, c, return_logits=True)     # one pass for both
    logits = net.encode(x, sigma, c)                       # the encoder alone
"""
import math

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
    """The scale of F's output in D, EDM Table 1. 1 / c_out^2 is the weight of EDM's loss.

    sigma, sigma_data: > 0, numbers or tensors. Returns a number or a tensor like sigma.
    """
    return sigma * sigma_data / (sigma ** 2 + sigma_data ** 2) ** 0.5


def per_image(sigma, x):
    """sigma, a number or (N,) or (N, 1, 1, 1) -> float32 (1 or N, 1, 1, 1) beside the images x."""
    return torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1, 1, 1, 1)


class Conv2d(nn.Conv2d):
    """A convolution with optional 2x resampling in front of it: "up", "down" or None."""

    def __init__(self, cin, cout, kernel, resample=None, taps=(1, 1), padding=None):
        super().__init__(cin, cout, kernel, padding=kernel // 2 if padding is None else padding)
        nn.init.xavier_uniform_(self.weight)                    # Song et al.: fan_avg, uniform
        nn.init.zeros_(self.bias)
        self.resample = resample
        if resample:
            taps = torch.tensor(taps, dtype=torch.float32)
            taps = taps.outer(taps) / taps.sum() ** 2
            self.register_buffer("resample_filter", taps[None, None])

    def filter(self, x, padding):
        """Depthwise filter with stride 2; up it is the transpose, times 4: 4 pixels for each."""
        if self.resample_filter.shape[-1] == 2:                 # [1, 1]: both are a plain box
            if self.resample == "down":
                return F.avg_pool2d(x, 2)
            return F.interpolate(x, scale_factor=2, mode="nearest")
        channels = x.shape[1]
        f = self.resample_filter.to(x.dtype).expand(channels, 1, -1, -1)
        if self.resample == "down":
            return F.conv2d(x, f, stride=2, padding=padding, groups=channels)
        return F.conv_transpose2d(x, 4 * f, stride=2, padding=padding, groups=channels)

    def forward(self, x, gain=1.0):
        """gain * (resample, then convolve): scaling the weight costs less than scaling x."""
        if self.resample:
            x = self.filter(x, padding=(self.resample_filter.shape[-1] - 1) // 2)
        if gain == 1.0:
            return self._conv_forward(x, self.weight, self.bias)
        return self._conv_forward(x, self.weight * gain, self.bias * gain)


class PyramidConv2d(Conv2d):
    """NCSN++'s image pyramid: the convolution first, then the filter without padding."""

    def forward(self, x):
        return self.filter(self._conv_forward(x, self.weight, self.bias), padding=0)


def group_norm(channels):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class Block(nn.Module):
    """Residual block with a noise embedding, optional resampling and self-attention."""

    def __init__(self, cin, cout, emb, dropout, attention=False, resample=None, taps=(1, 1)):
        super().__init__()
        self.norm0 = group_norm(cin)
        self.conv0 = Conv2d(cin, cout, 3, resample, taps)
        self.affine = nn.Linear(emb, cout)
        self.norm1 = group_norm(cout)
        self.dropout = dropout
        self.conv1 = Conv2d(cout, cout, 3)
        nn.init.zeros_(self.conv1.weight)                       # starts as the identity
        self.skip = Conv2d(cin, cout, 1, resample, taps) if resample or cin != cout else None
        self.attention = attention
        if attention:
            self.norm2 = group_norm(cout)
            self.qkv = Conv2d(cout, 3 * cout, 1)
            self.proj = Conv2d(cout, cout, 1)
            nn.init.zeros_(self.proj.weight)

    def forward(self, x, emb):                                  # x (N, cin, H, W), emb (N, emb)
        # (skip + x) * sqrt(1/2) is one pass over the features: conv1 carries its own gain, and
        # no backward reads what a convolution put out, so the sums may be made in place.
        h = self.conv0(F.silu(self.norm0(x)))
        h += self.affine(emb)[:, :, None, None].to(h.dtype)
        h = F.silu(self.norm1(h))
        h = self.conv1(F.dropout(h, self.dropout, self.training), gain=SQRT_HALF)
        if self.skip is None:
            h.add_(x, alpha=SQRT_HALF)
        else:
            h += self.skip(x, gain=SQRT_HALF)
        if self.attention:
            n, channels, height, width = h.shape
            qkv = self.qkv(self.norm2(h)).reshape(n, 1, channels, 3, height * width)
            q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous()   # each (N, 1 head, H W, channels)
            a = F.scaled_dot_product_attention(q, k, v).mT.reshape(h.shape)
            a = self.proj(a, gain=SQRT_HALF)
            h = a.add_(h, alpha=SQRT_HALF)
        return h                                                # (N, cout, H', W')


class UNet(nn.Module):
    """F(x, c_noise) of EDM's Eq. (7); see EDMPrecond for the arguments."""

    def __init__(self, label_dim, *, embedding_type, encoder_type, channel_mult_noise,
                 resample_filter, model_channels, channel_mult, dropout, augment_dim, num_blocks,
                 attn_resolutions):
        super().__init__()
        c_noise, emb = model_channels * channel_mult_noise, model_channels * 4
        taps = resample_filter
        widths = [model_channels * m for m in channel_mult]     # channels of each level
        sizes = [32 >> level for level in range(len(widths))]   # its pixels a side: 32, 16, 8

        if embedding_type == "fourier":
            self.map_noise = nn.Module()
            self.map_noise.register_buffer("freqs", 16 * torch.randn(c_noise // 2))
        self.map_label = nn.Linear(label_dim, c_noise) if label_dim else None
        if augment_dim:     # in EDM's checkpoints; it adds nothing to images that aren't augmented
            self.map_augment = nn.Linear(augment_dim, c_noise, bias=False)
        self.map_layer0 = nn.Linear(c_noise, emb)
        self.map_layer1 = nn.Linear(emb, emb)

        self.enc, cin, skips, pyramid = nn.ModuleDict(), model_channels, [model_channels], 3
        self.enc["32x32_conv"] = Conv2d(3, cin, 3)
        for size, width in zip(sizes, widths):
            name, attention = f"{size}x{size}", size in attn_resolutions
            if size < sizes[0]:
                self.enc[f"{name}_down"] = Block(cin, cin, emb, dropout, False, "down", taps)
                if encoder_type == "residual":
                    self.enc[f"{name}_aux_residual"] = PyramidConv2d(pyramid, cin, 3, "down", taps,
                                                                     padding=2)
                    pyramid = cin
                skips.append(cin)
            for i in range(num_blocks):
                self.enc[f"{name}_block{i}"] = Block(cin, width, emb, dropout, attention)
                cin = width
                skips.append(cin)

        self.dec = nn.ModuleDict()                  # a block takes a skip each, the last one first
        for size, width in zip(sizes[::-1], widths[::-1]):
            name, attention = f"{size}x{size}", size in attn_resolutions
            if size == sizes[-1]:
                self.dec[f"{name}_in0"] = Block(cin, cin, emb, dropout, True)
                self.dec[f"{name}_in1"] = Block(cin, cin, emb, dropout)
            else:
                self.dec[f"{name}_up"] = Block(cin, cin, emb, dropout, False, "up", taps)
            for i in range(num_blocks + 1):
                self.dec[f"{name}_block{i}"] = Block(cin + skips.pop(), width, emb, dropout,
                                                     attention and i == num_blocks)
                cin = width
        self.dec["32x32_aux_norm"] = group_norm(cin)
        self.dec["32x32_aux_conv"] = Conv2d(cin, 3, 3)
        nn.init.zeros_(self.dec["32x32_aux_conv"].weight)

    def embed(self, c_noise, c):
        """c_noise (N,), labels c (N, label_dim) or None -> (N, 4 model_channels)."""
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
        """-> the skips, a list of features; the last one is the encoder's output. run(block, x,
        emb) is a block's output."""
        skips, image = [], x
        for name, module in self.enc.items():
            if "aux" in name:
                image = x = (skips.pop() + module(image)) * SQRT_HALF
            else:
                x = run(module, x, emb) if isinstance(module, Block) else module(x)
            skips.append(x)
        return skips

    def decode(self, skips, emb, run):
        skips, x = list(skips), skips[-1]
        for name, module in self.dec.items():
            if "aux_norm" in name:
                x = F.silu(module(x))
            elif "aux_conv" in name:
                return module(x)
            else:
                x = torch.cat([x, skips.pop()], dim=1) if "block" in name else x
                x = run(module, x, emb)


class EDMPrecond(nn.Module):
    """The denoiser D(x; sigma) = c_skip x + c_out F(c_in x, c_noise), EDM Eq. (7) and Table 1.

    label_dim: number of classes, 0 for an unconditional network. The other keywords are one of
    CONFIGS: embedding_type "positional" or "fourier", encoder_type "standard" or "residual",
    channel_mult_noise, resample_filter (taps), model_channels, channel_mult (one per level),
    dropout, augment_dim, num_blocks, attn_resolutions.
    """
    sigma_data = 0.5
    gradient_checkpointing = False      # True: less memory in training, and a forward pass more

    def __init__(self, label_dim=0, **config):
        super().__init__()
        self.label_dim = label_dim
        self.model = UNet(label_dim, **config)

    @torch.no_grad()
    def add_labels(self, n):
        """label_dim grows by n, at first without effect: the weights of the n new labels are 0, and
        those of the old ones undo embed()'s factor, sqrt(label_dim)."""
        old, dim = self.model.map_label, self.label_dim + n
        new = nn.Linear(dim, self.model.map_layer0.in_features).to(self.model.map_layer0.weight)
        new.weight.zero_(), new.bias.zero_()
        if old is not None:
            new.weight[:, :self.label_dim] = old.weight * math.sqrt(self.label_dim / dim)
            new.bias.copy_(old.bias)
        self.model.map_label, self.label_dim = new, dim

    def _run(self, block, x, emb):
        """A block's output; with checkpointing, what its backward needs is computed again there."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, emb, use_reentrant=False)
        return block(x, emb)

    def _features(self, x, sigma, c):
        """-> the encoder's skips, and the embedding of noise level and label."""
        if self.label_dim and c is None:
            raise ValueError("a class-conditional network needs labels, one-hot (N, label_dim)")
        c_in = (self.sigma_data ** 2 + sigma ** 2).rsqrt()
        c_noise = (sigma.log() / 4).flatten().expand(x.shape[0])
        emb = self.model.embed(c_noise, c)
        return self.model.encode(c_in * x, emb, self._run), emb

    def forward(self, x, sigma, c=None, return_logits=False):
        """Denoise, and on request classify, in one pass.

        x: float (N, 3, 32, 32), clean images in [-1, 1] plus noise. sigma: standard deviation of
        the noise, > 0, a number, (N,) or (N, 1, 1, 1). c: one-hot labels (N, label_dim), which an
        unconditional network ignores. Raises ValueError where labels are needed and missing.
        Returns D_x float32 (N, 3, 32, 32), and the logits of encode() with return_logits.
        """
        x, sigma = x.float(), per_image(sigma, x)
        skips, emb = self._features(x, sigma, c)
        F_x = self.model.decode(skips, emb, self._run).float()
        c_skip = self.sigma_data ** 2 / (sigma ** 2 + self.sigma_data ** 2)
        D_x = c_skip * x + c_out(sigma, self.sigma_data) * F_x                      # Eq. (7)
        return (D_x, skips[-1].float().mean(1)) if return_logits else D_x

    def encode(self, x, sigma, c=None):
        """The classifier's logits l, sigmoid(l) = p / (p + q), so log r = -l: float32 (N, 8, 8),
        one per location, the channel mean of the encoder's last features. Arguments as forward."""
        skips, _ = self._features(x.float(), per_image(sigma, x), c)
        return skips[-1].float().mean(1)
