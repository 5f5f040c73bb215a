"""f-distill's experiment on ImageNet at 64 x 64 pixels (arXiv 2502.15681): EDM's class-conditional
ADM distilled into one step by Algorithm 1, with the Jensen-Shannon divergence. Not run here.

    python examples/imagenet64/distill.py --data imagenet-64x64.zip --batch 256 \\
        --gradient-checkpointing
    torchrun --standalone --nproc_per_node=8 examples/imagenet64/distill.py \\
        --data imagenet-64x64.zip
    python edm.py sample runs/imagenet64_lr/student.pt

It is cifar_distill.py with the settings below, and takes its options. README.md says what to
download, how much memory it takes and what others measured.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cifar_distill                                                    # noqa: E402
from plumbing.cli import run_main                                       # noqa: E402

REFERENCE = "imagenet-64x64.npz"
SETTING = dict(
    # What FastGen's public configuration of f-distill for ImageNet-64 says (NVIDIA, 2026).
    h="lr",                                 # Jensen-Shannon
    teacher="edm-imagenet-64x64-cond-adm", guide="none",
    batch=512,
    kimg=61_440,                            # 600,000 iterations, of which one in five
    fake_updates=4,                         # updates the generator, the other four the fake score
    lr_g=2e-6, lr_f=2e-6, decay_kimg=0, wait_kimg=0,
    gan=3e-3,                               # the adversarial loss of line 13
    norm="two-stage", clip=10, ess=0.0,     # 1/r of mean one in 10 bins of the noise level
    t_min=0.0, t_max=1.0,                   # EDM's grid, from 0.002 to 80
    ema_kimg=710,                           # 0.9999 an iteration
    # What DMD2 does there (arXiv 2405.14867), on which f-distill builds.
    sigma_init=80.0, w_t="dmd", amp="bf16",
    # Ours: ln sigma on the generator's grid has mean 0.4 and standard deviation 2.9, and the
    # classifier should know the levels at which it is asked.
    p_mean=0.4, p_std=2.0,
    # EDM's FID: its statistics of the training set, and the resize with which they were made.
    reference=REFERENCE, resize="tf", features="inception", eval_n=50_000, eval_every=1000,
    save_every=250)


def main(argv):
    cifar_distill.PRESETS["imagenet64"] = SETTING
    cfg, out, resume = cifar_distill.parse(["--preset", "imagenet64", *argv])
    if cfg.reference == REFERENCE and not Path(REFERENCE).exists():
        raise FileNotFoundError(f"no {REFERENCE}: fetch it from https://nvlabs-fi-cdn.nvidia.com/"
                                f"edm/fid-refs/{REFERENCE}, or name other images by --reference")
    cifar_distill.tune_cpu()
    return cifar_distill.run(cfg, out, resume)


if __name__ == "__main__":
    run_main(main)
