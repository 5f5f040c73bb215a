"""How fast, on whatever device there is: one training step, sampling, the Fréchet distance.

    python bench.py                                     # compact network, a Markdown table
    python bench.py --size 64 --channels 1              # grey images of 64 x 64
    python bench.py --net uncond-vp --batch 64 256 --amp no bf16        # the paper's, on a GPU
    python bench.py --net adm --size 64 --batch 2       # the network of examples/imagenet64, small

`bound` is the images/s that the passes of Distiller.step allow, from the network's own times: two
forward-and-backward (G, the fake network), two forward (the teacher, the fake network for score and
logits), and the encoder's forward and backward on real images. All times of a row are taken in
turns, medians of rounds.
"""
import resource
import statistics
import sys
import time
from pathlib import Path

import scipy.linalg
import torch
from torch.utils.flop_counter import FlopCounterMode

import fid
from cifar_distill import HALF, Config, Distiller
from edm import sample
from ncsnpp import CONFIGS, EDMPrecond
from plumbing.cli import count, parser, run_main, torch_device
from plumbing.loop import tune_cpu


def seconds(f, device):
    """Return the seconds of one call, with the device's queue empty before and after."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    f()
    wait()
    return time.perf_counter() - start


def medians(tasks, device, rounds):
    """Return the median seconds of each of `tasks`, name -> f, in turns, after one warming call."""
    for f in tasks.values():
        f()
    times = [{name: seconds(f, device) for name, f in tasks.items()} for _ in range(rounds)]
    return {name: statistics.median(t[name] for t in times) for name in tasks}


def matmul_peak(device, dtype):
    """Return the GFLOP/s of a large square product, the best of ten."""
    n = 8192 if device.startswith("cuda") else 2048
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    a @ b
    return 2 * n ** 3 / min(seconds(lambda: a @ b, device) for _ in range(10)) / 1e9


def network(name, size, channels):
    """Return a network of random weights: a name of ncsnpp.CONFIGS, or "adm"."""
    if name != "adm":
        return EDMPrecond(**CONFIGS[name] | dict(resolution=size, channels=channels))
    sys.path.append(str(Path(__file__).parent / "examples/imagenet64"))
    import adm
    config = adm.CONFIGS["compact-adm"] | dict(resolution=size, channels=channels)
    return adm.ADMPrecond(**config)


def row(name, size, channels, batch, amp, device, rounds):
    """Return the cells below HEAD of a network, numbers and texts."""
    torch.manual_seed(0)
    teacher = network(name, size, channels)
    images = torch.randint(0, 256, (1000, channels, size, size), dtype=torch.uint8)
    d = Distiller(Config(batch=batch, amp=amp, wait_kimg=1e-9, device=device), teacher, images,
                  torch.arange(1000) % max(1, teacher.label_dim))
    b = d.sample_batch()
    x = b.sigma * b.noise                               # (batch, channels, size, size)
    d.seen = 1                                          # past the time in which G waits

    def forward():
        with torch.no_grad(), d.autocast():
            d.teacher(x, b.sigma, b.c)

    def both():
        with d.autocast():
            d.G(x, b.sigma, b.c).square().mean().backward()

    def encoder():
        with d.autocast():
            d.fake.encode(x, b.sigma, b.c).square().mean().backward()

    def student():
        sample(d.ema, batch, sigma_init=2.5, batch=batch)

    def few_of_the_teacher():
        sample(d.teacher, batch, steps=2, batch=batch)

    t = medians(dict(forward=forward, both=both, encoder=encoder, step=d.step, student=student,
                     teacher=few_of_the_teacher), device, rounds)
    t["teacher"] *= 35 / 3                              # 2 Heun steps are 3 of the 35 evaluations
    with FlopCounterMode(display=False) as flops:
        d.step()
    memory = (torch.cuda.max_memory_allocated() if device.startswith("cuda")
              else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    speed = flops.get_total_flops() / t["step"] / 1e9
    bound = batch / (2 * t["both"] + 2 * t["forward"] + t["encoder"])
    return [f"{name} {size}", batch, "fp32" if amp == "no" else amp, batch / t["forward"],
            batch / t["both"], batch / t["step"], bound, f"{batch / t['step'] / bound:.0%}", speed,
            f"{speed / matmul_peak(device, HALF[amp]):.0%}", batch / t["student"],
            t["teacher"] / t["student"], memory / 2 ** 30]


HEAD = ("network", "batch", "precision", "forward, img/s", "and backward", "step, img/s", "bound",
        "of bound", "GFLOP/s", "of matmul peak", "one-step samples/s", "times the teacher's",
        "peak GiB so far")


def frechet_line(d=2048):
    """Return the line that compares fid.frechet with SciPy's sqrtm in d dimensions."""
    g = torch.Generator().manual_seed(0)
    a, b = (fid.stats(torch.randn(2 * d, d, generator=g) * (1 + i)) for i in (0, 1))
    fast = statistics.median(seconds(lambda: fid.frechet(*a, *b), "cpu") for _ in range(3))
    slow = seconds(lambda: scipy.linalg.sqrtm((a[1] @ b[1]).numpy()), "cpu")
    return (f"frechet in {d} dimensions: {fast:.2f} s; scipy.linalg.sqrtm alone: {slow:.1f} s, "
            f"{slow / fast:.0f} times as long")


def main(argv):
    p = parser("bench.py", __doc__)
    p.add_argument("--net", choices=[*CONFIGS, "adm"], nargs="+", default=["compact"])
    p.add_argument("--size", type=count, default=32, help="pixels a side (32)")
    p.add_argument("--channels", type=count, default=3, help="3, or 1 for grey (3)")
    p.add_argument("--batch", type=count, nargs="+", default=[16, 32, 64], help="images a step")
    p.add_argument("--amp", choices=["no", "bf16", "fp16"], nargs="+", default=["no"])
    p.add_argument("--device", type=torch_device, default=Config.device, help="cpu, cuda, cuda:1")
    p.add_argument("--rounds", type=count, default=10, help="of which the median is taken (10)")
    p.add_argument("--frechet", type=count, default=2048, help="dimensions of the distance (2048)")
    args = p.parse_args(argv)
    tune_cpu()
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else (
        f"CPU, {torch.get_num_threads()} threads")
    print(f"{name}, torch {torch.__version__}, {sys.platform}\n")
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for net in args.net:
        for amp in args.amp:
            for batch in args.batch:
                cells = row(net, args.size, args.channels, batch, amp, args.device,
                            args.rounds)
                text = [f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells]
                print("| " + " | ".join(text) + " |", flush=True)
    print("\n" + frechet_line(args.frechet))
    return 0


if __name__ == "__main__":
    run_main(main)
