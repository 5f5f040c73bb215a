"""The course: the notebook's cells run on the code as it is, and the solutions' code does what the
solutions say."""
import importlib.util
import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

import bregman
import toy2d
from test_pages import apply, blocks, edits

HERE = Path(__file__).resolve().parents[1]


def test_cells_run_and_the_step_by_hand_is_the_step(monkeypatch, capsys):
    """With runs of four steps, and without IPython, which is no requirement of the project."""
    cells = json.loads((HERE / "course/companion.ipynb").read_text())["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for long, short in (("STEPS = 1500", "STEPS = 4"), ("range(200)", "range(2)"),
                        ("range(201)", "range(3)"), (", sigma, 300)", ", sigma, 10)")):
        assert source.count(long) == 1, long
        source = source.replace(long, short)
    source = source.replace("steps=STEPS)", "steps=STEPS, init_steps=2)")
    monkeypatch.setitem(sys.modules, "IPython.display", MagicMock())
    monkeypatch.setattr(bregman, "TABLE_1", dict(bregman.TABLE_1))      # it gets a row
    monkeypatch.setattr(plt, "show", lambda: None)
    monkeypatch.chdir(HERE / "course")
    with matplotlib.rc_context():
        exec(source, {})
        plt.close("all")
    said = capsys.readouterr().out
    assert "the largest difference from Distiller.step in any weight: 0.0e+00\n" in said
    assert said.count("[8.0, 2.0, 0.5]") == 2           # the new row's weight, twice


# ------------------------------------------------------------------------------------ the solutions

@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Return toy2d.py with the edits of exercise 11, b and c."""
    modules = []
    for exercise, file, pairs in edits():
        if exercise == "11":
            path = tmp_path_factory.mktemp("edited") / f"toy2d_{len(modules)}.py"
            path.write_text(apply(pairs, (HERE / file).read_text()))
            spec = importlib.util.spec_from_file_location(path.stem, path)
            modules.append(importlib.util.module_from_spec(spec))
            sys.modules[path.stem] = modules[-1]                # dataclasses look it up
            spec.loader.exec_module(modules[-1])
    return modules


def test_gradient_of_the_kernel_estimate_is_the_mean_shift(kernels):
    """By autograd; and a sample that is left out might as well not be there."""
    g = torch.Generator().manual_seed(0)
    x, sigma = torch.randn(9, 2, generator=g), 0.3 + torch.rand(9, 1, generator=g)
    y = (x + sigma * torch.randn(9, 2, generator=g)).requires_grad_()
    for own in (False, True):
        log_density, mean = kernels[0].kernel_estimate(y, x, sigma, own)
        score, = torch.autograd.grad(log_density.sum(), y)
        torch.testing.assert_close(score, (mean - y) / sigma ** 2)
    alone = torch.stack([kernels[0].kernel_estimate(y[i:i + 1], x[torch.arange(9) != i],
                                                    sigma[i:i + 1])[0][0] for i in range(9)])
    torch.testing.assert_close(log_density, alone)


def test_kernel_estimates_are_near_the_truth_where_there_are_many_samples(kernels):
    """q is the ring, p the ring with other weights, at sigma = 0.5."""
    g = torch.Generator().manual_seed(0)
    q, p, sigma = toy2d.TARGETS["ring8"], toy2d.TARGETS["uneven8"], torch.full((50, 1), 0.5)
    x_t = q.sample(50, g) + sigma * torch.randn(50, 2, generator=g)
    exact = q.log_p(x_t, sigma) - p.log_p(x_t, sigma)
    of_q, of_p = (kernels[0].kernel_estimate(x_t, each.sample(100000, g), sigma)[0]
                  for each in (q, p))
    assert exact.std() > 0.3
    torch.testing.assert_close((of_q - of_p)[:, 0], exact, atol=0.05, rtol=0)


def test_what_the_edits_change(kernels):
    """Log r from kernels leaves KL as it is, and moves SBA; scores from kernels move KL."""
    def weights(module, h):
        d = module.Distiller(module.Config(h=h, batch=16, width=8, init_steps=2, steps=4))
        for _ in range(3):
            d.step()
        return torch.cat([p.detach().flatten() for p in d.G.parameters()])
    ratio, scores = kernels
    assert torch.equal(weights(ratio, "kl"), weights(toy2d, "kl"))
    assert not torch.equal(weights(ratio, "sba"), weights(toy2d, "sba"))
    assert not torch.equal(weights(scores, "kl"), weights(toy2d, "kl"))


def test_program_of_exercise_13(capsys):
    program, = blocks("course/solutions.md", "python")
    for long, short in (("9000, 1000", "3, 2"), ("steps=STEPS", "steps=STEPS, init_steps=2")):
        assert program.count(long) == 1
        program = program.replace(long, short)
    exec(program, {})
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[3:]]
    measured = [float(row[1]) for row in rows]
    assert len(rows) == 6 and measured == sorted(measured, reverse=True) and measured[0] <= 1
