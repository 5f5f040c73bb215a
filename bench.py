"""How fast, on whatever device there is: one training step, sampling, the Fréchet distance.

    python bench.py                                     # compact network, a Markdown table
    python bench.py --net uncond-vp --batch 64 256 --amp no bf16        # the paper's, on a GPU

`bound` is the images/s that the passes of a step allow (cifar_distill.py's docstring), from the
network's own forward and backward times: two forward-and-backward, two forward, and the encoder's
forward and backward on real images. All times of a row are taken in turns, medians of rounds.
"""
import resource
import statistics
import sys
import time

import scipy.linalg
import torch
from torch.utils.flop_counter import FlopCounterMode

import fid
from cifar_distill import Config, Distiller, one_step
from data import Parser, device, positive, run_main, tune_cpu
from edm import sample
from ncsnpp import CONFIGS, EDMPrecond


def seconds(f, where):
    """Of one call, with the device's queue empty before and after."""
    wait = torch.cuda.synchronize if where.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    f()
    wait()
    return time.perf_counter() - start


def medians(tasks, where, rounds):
    """name -> f: the median seconds of each, in turns, after one warming call."""
    for f in tasks.values():
        f()
    times = [{name: seconds(f, where) for name, f in tasks.items()} for _ in range(rounds)]
    return {name: statistics.median(t[name] for t in times) for name in tasks}


def matmul_peak(where, dtype):
    """GFLOP/s of a large square product, the best of ten."""
    n = 8192 if where.startswith("cuda") else 2048
    a, b = torch.randn(2, n, n, device=where).to(dtype)
    a @ b
    return 2 * n ** 3 / min(seconds(lambda: a @ b, where) for _ in range(10)) / 1e9


def row(name, batch, amp, where, rounds):
    torch.manual_seed(0)
    teacher = EDMPrecond(**CONFIGS[name])
    images = torch.randint(0, 256, (1000, 3, 32, 32), dtype=torch.uint8)
    d = Distiller(Config(batch=batch, amp=amp, wait_kimg=0, device=where, cond=bool(
        teacher.label_dim)), teacher, images, torch.arange(1000) % 10)
    p, = d.draw()
    x = p.sigma[:, None, None, None] * p.noise

    def forward():
        with torch.no_grad(), d.autocast():
            d.teacher(x, p.sigma, p.c)

    def both():
        with d.autocast():
            d.G(x, p.sigma, p.c).square().mean().backward()

    def encoder():
        with d.autocast():
            d.fake.encode(x, p.sigma, p.c).square().mean().backward()

    t = medians(dict(forward=forward, both=both, encoder=encoder, step=d.step,
                     student=lambda: one_step(d.ema, batch, batch=batch),
                     teacher=lambda: sample(d.teacher, batch, steps=2, batch=batch)), where, rounds)
    t["teacher"] *= 35 / 3                              # 2 Heun steps are 3 of the 35 evaluations
    with FlopCounterMode(display=False) as flops:
        d.step()
    memory = (torch.cuda.max_memory_allocated() if where.startswith("cuda")
              else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    dtype = dict(no=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[amp]
    speed = flops.get_total_flops() / t["step"] / 1e9
    bound = batch / (2 * t["both"] + 2 * t["forward"] + t["encoder"])
    return [name, batch, dict(no="fp32").get(amp, amp), batch / t["forward"], batch / t["both"],
            batch / t["step"], bound, f"{batch / t['step'] / bound:.0%}", speed,
            f"{speed / matmul_peak(where, dtype):.0%}", batch / t["student"],
            t["teacher"] / t["student"], memory / 2 ** 30]


HEAD = ("network", "batch", "precision", "forward, img/s", "and backward", "step, img/s", "bound",
        "of bound", "GFLOP/s", "of matmul peak", "one-step samples/s", "times the teacher's",
        "peak GiB so far")


def frechet_line(d=2048):
    """Statistics of d features, once through SciPy's sqrtm and by fid.frechet."""
    g = torch.Generator().manual_seed(0)
    a, b = (fid.stats(torch.randn(2 * d, d, generator=g) * (1 + i)) for i in (0, 1))
    fast = statistics.median(seconds(lambda: fid.frechet(*a, *b), "cpu") for _ in range(3))
    slow = seconds(lambda: scipy.linalg.sqrtm((a[1] @ b[1]).numpy()), "cpu")
    return (f"frechet in {d} dimensions: {fast:.2f} s; scipy.linalg.sqrtm alone: {slow:.1f} s, "
            f"{slow / fast:.0f} times as long")


def main(argv):
    parser = Parser(prog="bench.py", description=__doc__.splitlines()[0])
    parser.add_argument("--net", nargs="+", choices=CONFIGS, default=["compact"])
    parser.add_argument("--batch", nargs="+", type=positive, default=[16, 32, 64])
    parser.add_argument("--amp", nargs="+", choices=("no", "bf16", "fp16"), default=["no"])
    parser.add_argument("--device", type=device, default=Config.device)
    parser.add_argument("--rounds", type=positive, default=10)
    parser.add_argument("--frechet", type=positive, default=2048, help="dimensions")
    args = parser.parse_args(argv)
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
                cells = row(net, batch, amp, args.device, args.rounds)
                text = [f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells]
                print("| " + " | ".join(text) + " |", flush=True)
    print("\n" + frechet_line(args.frechet))
    return 0


if __name__ == "__main__":
    run_main(main)
