"""ADM, the network of f-distill's ImageNet-64 teacher, as a denoiser like EDMPrecond of ncsnpp.py.

The U-Net is Dhariwal and Nichol 2021 (arXiv 2105.05233) as Karras et al. 2022 (EDM, arXiv
2206.00364) arrange it; the names of its parameters are those of EDM's imagenet-64x64-cond-adm. What
differs from DDPM++ is here: the blocks, where they attend, the embedding of noise level and label.

    net = ADMPrecond(**CONFIGS["imagenet64-adm"])       # or **configuration(a file's tensors)
    D_x, logits = net(x, sigma, c, return_logits=True)
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ncsnpp import (Conv2d, Denoiser, attention, check_tensors, decoder, encoder, group_norm,
                    levels_of, outline, resample)

norm = partial(group_norm, eps=1e-5)

CONFIGS = {
    "imagenet64-adm": dict(     # EDM's imagenet-64x64-cond-adm: 295.9 M parameters, 219 GFLOP
        resolution=64, label_dim=1000, model_channels=192, channel_mult=[1, 2, 3, 4], num_blocks=3,
        attn_resolutions=[32, 16, 8], dropout=0.1),
    "compact-adm": dict(resolution=64, label_dim=10, model_channels=32, channel_mult=[1, 2, 3],
                        num_blocks=1, attn_resolutions=[16], dropout=0.0),      # for trials
}


class Resample(nn.Module):
    """Twice or half the size without a convolution; EDM's checkpoints hold its filter, a box."""

    def __init__(self, direction):
        super().__init__()
        self.direction = direction
        self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 1 / 4))

    def forward(self, x):                                       # (N, C, H, W)
        return resample(x, self.direction, self.resample_filter)


class ADMBlock(nn.Module):
    """A residual block that the embedding modulates:

        scale, shift = affine(emb)
        h = silu(norm1(conv0(silu(norm0(x)))) * (1 + scale) + shift)
        y = skip(x) + conv1(dropout(h))
        y = y + proj(attention(qkv(norm2(y))))                  where there is attention
    """

    def __init__(self, cin, cout, emb_width, dropout, attend=False, direction=None):
        super().__init__()
        self.norm0 = norm(cin)
        self.conv0 = Conv2d(cin, cout, 3, direction)
        self.affine = nn.Linear(emb_width, 2 * cout)
        self.norm1 = norm(cout)
        self.dropout = dropout
        self.conv1 = Conv2d(cout, cout, 3)
        nn.init.zeros_(self.conv1.weight)                       # starts as the identity
        self.skip = nn.Identity()
        if direction:                                           # such blocks keep their width
            self.skip = Resample(direction)
        elif cin != cout:
            self.skip = Conv2d(cin, cout, 1)
        self.heads = max(1, cout // 64) if attend else 0        # of 64 channels each
        if attend:
            self.norm2 = norm(cout)
            self.qkv = Conv2d(cout, 3 * cout, 1)
            self.proj = Conv2d(cout, cout, 1)
            nn.init.zeros_(self.proj.weight)

    def forward(self, x, emb):                              # x (N, cin, H, W), emb (N, emb_width)
        h = self.norm1(self.conv0(F.silu(self.norm0(x))))       # (N, cout, H', W')
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, dim=1)   # (N, cout, 1, 1)
        h = F.silu(torch.addcmul(shift, h, 1 + scale))
        y = self.conv1(F.dropout(h, self.dropout, self.training))
        y += self.skip(x)
        if self.heads:
            y = self.proj(attention(self.qkv(self.norm2(y)), self.heads)).add_(y)
        return y                                                # (N, cout, H', W')


class ADM(nn.Module):
    """F(x, c_noise) of EDM's Eq. (7); see ADMPrecond for the arguments."""

    def __init__(self, resolution, channels, label_dim, *, model_channels, channel_mult, num_blocks,
                 attn_resolutions, dropout=0.1, augment_dim=0):
        super().__init__()
        levels, width = levels_of(resolution, model_channels, channel_mult), 4 * model_channels
        if augment_dim:     # in EDM's checkpoints; it adds nothing to images that aren't augmented
            self.map_augment = nn.Linear(augment_dim, model_channels, bias=False)
        self.map_layer0 = nn.Linear(model_channels, width)
        self.map_layer1 = nn.Linear(width, width)
        self.map_label = nn.Linear(label_dim, width, bias=False) if label_dim else None
        block = partial(ADMBlock, emb_width=width, dropout=dropout)
        self.enc, skips = encoder(levels, channels, model_channels, num_blocks, attn_resolutions,
                                  block)
        self.dec = decoder(levels, skips, num_blocks, attn_resolutions, block, attend_in_each=True)
        self.out_norm = norm(levels[0][1])
        self.out_conv = Conv2d(levels[0][1], channels, 3)
        nn.init.zeros_(self.out_conv.weight)

    def embed(self, c_noise, c):
        """Return the embedding (N, 4 model_channels) of noise levels (N,) and labels, or None."""
        half = self.map_layer0.in_features // 2
        freqs = torch.exp(-math.log(1e4) / half * torch.arange(half, device=c_noise.device))
        angles = c_noise[:, None] * freqs                       # (N, model_channels / 2)
        emb = torch.cat([angles.cos(), angles.sin()], dim=1)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(c)
        return F.silu(emb)

    def encode(self, x, emb, run):
        """Return the skips, a list of features, as ncsnpp.UNet does."""
        skips = []                                              # x (N, channels, H, W)
        for module in self.enc.values():
            x = run(module, x, emb) if isinstance(module, ADMBlock) else module(x)
            skips.append(x)
        return skips

    def decode(self, skips, emb, run):
        """Return F, (N, channels, H, W), from what encode() returned."""
        skips, x = list(skips), skips[-1]
        for name, block in self.dec.items():
            x = torch.cat([x, skips.pop()], dim=1) if "block" in name else x
            x = run(block, x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))


class ADMPrecond(Denoiser):
    """ADM as a denoiser. The keywords beside Denoiser's are one of CONFIGS, or augment_dim (0: no
    layer for augmentations)."""
    unet = ADM


def configuration(state):
    """Return the keywords of the ADMPrecond that has these tensors, all but dropout and sigma_data,
    which tensors don't say. Raises ValueError, which says what is wrong, if there is none."""
    config = outline(state)
    check_tensors(ADMPrecond, config, state)
    return config
