"""A script's process: one-line errors, signals, and the other processes of a run.

Import it before torch: from then on Ctrl-C ends a script quietly.
"""
import contextlib
import ctypes
import os
import re
import signal
import sys
from datetime import timedelta
from pathlib import Path


_script = getattr(sys.modules["__main__"], "__file__", None)     # None in an interactive session
if (_script and Path(_script).resolve().parent == Path(__file__).resolve().parents[1]
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
    # until run_main Ctrl-C ends a script at once: half loaded, numpy makes its own error of it
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch                        # noqa: E402
import torch.distributed as dist    # noqa: E402


def tune_cpu():
    """Make the CPU as fast as it can be for these networks, in this process.

    Denormal numbers, 100 times slower than others, become 0. glibc keeps the memory of freed
    tensors: given back to Linux, every page of every feature map would be cleared anew (15-20 % of
    a training step).
    """
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):                            # musl has none
            libc.mallopt(-4, 0)                                 # M_MMAP_MAX: the heap for all sizes
            libc.mallopt(-1, 2 ** 31 - 1)                       # M_TRIM_THRESHOLD: never shrink it


def run_main(main):
    """Run a script's main(argv); what a user can cause is one line on stderr and status 2."""
    name = Path(sys.argv[0]).name
    try:
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _check_environment()
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError, FloatingPointError, MemoryError, OverflowError) as e:
        named = isinstance(e, OSError) and e.filename and e.strerror        # without its number
        reason = f"{e.strerror}: {e.filename}" if named else " ".join(str(e).split())
        reason = reason or "not enough memory"
    except RuntimeError as e:
        reason = str(e).splitlines()[0]
        wanted = re.search(r"(\d+) bytes", reason)
        if dist.is_initialized() and re.search("peer|closed|gloo|NCCL", reason):
            reason = "another process of this run has ended"
        elif re.search("alloc|memory|overflow", reason):
            reason = "not enough memory for these settings" + (
                f": {int(wanted[1]):,} bytes more" if wanted else f": {reason}")
        else:
            raise
    except KeyboardInterrupt:
        os._exit(130)                                           # at once, whatever else runs
    where = f" (process {rank()})" if dist.is_initialized() else ""
    if where or rank() == 0:                        # before that all processes fail alike
        print(f"{name}: {reason}{where}", file=sys.stderr)
    sys.stderr.flush()
    if where:
        dist.destroy_process_group()
    sys.exit(2)


class Stop:
    """`with Stop() as stop:` SIGINT and SIGTERM no longer end the process, but set stop.number; a
    second one ends it. Work that changes nothing until its end goes into `with stop.at_once():`
    and is left where it is."""

    class Now(BaseException):
        """Leaves the block of at_once."""

    def __enter__(self):
        self.number, self.hurry = 0, False
        self.old = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for s, handler in self.old.items():
            signal.signal(s, handler)

    def _ask(self, number, frame):
        if self.number:
            if world() == 1:                    # torchrun hands on what the process has already,
                os._exit(128 + number)          # and ends by itself what does not stop in 30 s
            return
        self.number = number
        if self.hurry:
            raise Stop.Now

    @contextlib.contextmanager
    def at_once(self):
        if self.number:
            return (yield)
        try:
            self.hurry = True
            yield
        except Stop.Now:
            pass
        finally:
            self.hurry = False

    def agreed(self, device):
        """Whether any process was asked: all leave their loops at the same step."""
        if world() > 1:
            number = torch.tensor(self.number, device=device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            self.number = int(number)
        return bool(self.number)


def check_finite(when, sigma, **named):
    """Stop on the first sample of the named values (n, ...) that is not finite, or beyond any use,
    naming its noise level, of sigma (n, 1, ...)."""
    for name, values in named.items():
        size = values.detach().flatten(1).abs().mean(1) if values.ndim > 1 else values.detach()
        bad = ~(size.abs() < 1e8)
        if bad.any():
            i = bad.nonzero()[0].item()
            raise FloatingPointError(f"{when}: {name} is {size[i].item():g} at sigma = "
                                     f"{sigma.flatten()[i].item():.4g}")


def load_generator(generator, state, seed, name="the checkpoint"):
    """Take up a generator's state from the file `name`; that of another kind of device, which has
    another length, does not fit, and the noise goes on from `seed` instead. Raises ValueError for
    what is no state."""
    own = generator.get_state()
    if not torch.is_tensor(state) or state.dtype != own.dtype or state.ndim != 1:
        raise ValueError(f"{name}: generator is no generator's state")
    if len(state) != len(own):
        generator.manual_seed(seed)
        print(f"the noise goes on anew, from seed {seed}: the run was on another kind of device",
              file=sys.stderr)
        return
    try:
        generator.set_state(state.contiguous())
    except (RuntimeError, TypeError) as e:
        reason = str(e).splitlines()[0]
        raise ValueError(f"{name}: generator is no generator's state: {reason}") from e


# ------------------------------------------------------------------ one process among how many

def world():
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank():
    return int(os.environ.get("RANK") or 0)


def _check_environment():
    """Raises ValueError, naming the variables, if torchrun's are there in part or disagree."""
    names = ("RANK", "WORLD_SIZE")
    said = ", ".join(f"{n}={os.environ[n]}" for n in names if n in os.environ)
    try:
        r, w = (int(os.environ[n]) if n in os.environ else None for n in names)
        if r is None and w is None:
            return
        agree = r is not None and w is not None and 0 <= r < w
    except ValueError:
        agree = False
    missing = agree and w > 1 and [n for n in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")
                                   if n not in os.environ]
    if not agree or missing:
        for n in names:
            os.environ.pop(n, None)             # so that the error is printed, by this process
        raise ValueError(f"the environment's {said} " + (
            f"need {' '.join(missing)} beside them" if missing else "contradict each other")
            + ": start several processes with torchrun, or unset them")


@contextlib.contextmanager
def processes(device):
    """Join torchrun's other processes, if any. Check options before: here one waits for all."""
    if world() == 1:
        return (yield)
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(hours=2))
    yield
    dist.destroy_process_group()        # after an error run_main does, which asks if it is there


@contextlib.contextmanager
def first_process_first():
    """The others enter when process 0 has left, since it may download."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world() > 1:
        dist.barrier()


def gather(values):
    """Each process's share (n, ...) of a batch -> all of it (n world, ...), in the batch's order,
    of which process k has every world-th from the k-th on."""
    if world() == 1:
        return values
    shares = [torch.empty_like(values) for _ in range(world())]
    dist.all_gather(shares, values.contiguous())
    return torch.stack(shares, 1).flatten(0, 1)


def all_mean(tensors):
    """Replace each tensor by its mean over all processes, in place and in one message."""
    if world() == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    parts = (flat / world()).split([t.numel() for t in tensors])
    torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors)])
