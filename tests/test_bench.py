"""bench.py: its table has a number in each column. No test says how large one is."""
import math

import pytest

import bench
from ncsnpp import CONFIGS, EDMPrecond
from test_cifar_distill import TINY


@pytest.mark.parametrize("more, size", [([], 32), (["--size", "16", "--channels", "1"], 16)])
def test_the_table(monkeypatch, capsys, more, size):
    """For grey images of another size, too."""
    monkeypatch.setattr(bench, "tune_cpu", lambda: None)
    monkeypatch.setattr(bench, "matmul_peak", lambda device, dtype: 1.0)     # takes seconds
    made = []
    monkeypatch.setattr(bench, "EDMPrecond",
                        lambda **how: made.append(EDMPrecond(**how)) or made[-1])
    nets = {"tiny": TINY, "tiny-cond": TINY | dict(label_dim=10)}
    for name, kwargs in nets.items():
        monkeypatch.setitem(CONFIGS, name, kwargs)
    assert bench.main(["--net", *nets, "--batch", "2", "--amp", "no", "bf16", "--device", "cpu",
                       "--rounds", "1", "--frechet", "8", *more]) == 0
    out = capsys.readouterr().out
    head, rule, *rows = [line.strip("|").split("|") for line in out.splitlines() if "|" in line]
    assert len(rows) == 4 and [cell.strip() for cell in head] == list(bench.HEAD)
    assert {len(r) for r in (head, rule, *rows)} == {len(bench.HEAD)}
    for row in rows:
        name, batch, precision, *numbers = (cell.strip() for cell in row)
        assert name in [f"{net} {size}" for net in nets] and batch == "2"
        assert precision in ("fp32", "bf16")
        numbers = [float(cell.rstrip("%")) for cell in numbers]
        assert all(math.isfinite(v) and v >= 0 for v in numbers) and max(numbers) > 0
    assert {(net.resolution, net.channels) for net in made} == {(size, 1 if more else 3)}
    assert "frechet in 8 dimensions" in out


def test_medians_take_turns():
    """Each round runs every task once, after one call that warms it up."""
    calls = []
    tasks = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = bench.medians(tasks, "cpu", 3)
    assert "".join(calls) == "ab" * 4 and set(times) == {"a", "b"}
