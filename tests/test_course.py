"""The course's notebook: its cells run on the code as it is, and it comes with its outputs."""
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt

import bregman

HERE = Path(__file__).resolve().parents[1]
FILE = HERE / "course/companion.ipynb"
CELLS = [cell for cell in json.loads(FILE.read_text())["cells"] if cell["cell_type"] == "code"]


def test_cells_run_and_the_step_by_hand_is_the_step(monkeypatch, capsys):
    """With runs of four steps, and without IPython, which is no requirement of the project."""
    source = "\n".join("".join(cell["source"]) for cell in CELLS)
    for long, short in (("STEPS = 1500", "STEPS = 4"), ("range(200)", "range(2)"),
                        ("range(201)", "range(3)"), (", sigma, 300)", ", sigma, 10)")):
        assert source.count(long) == 1, long
        source = source.replace(long, short)
    source = source.replace("steps=STEPS)", "steps=STEPS, init_steps=2)")
    shown, display = [], ModuleType("IPython.display")
    display.display = lambda fig, **more: SimpleNamespace(update=shown.append)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(bregman, "TABLE_1", dict(bregman.TABLE_1))      # it gets a row
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    monkeypatch.chdir(HERE / "course")
    with matplotlib.rc_context():
        exec(compile(source, FILE.name, "exec"), {})
        plt.close("all")
    said = capsys.readouterr().out
    assert "the largest difference from Distiller.step in any weight: 0.0e+00\n" in said
    assert said.count("[8.0, 2.0, 0.5]") == 2           # the new row's weight, twice
    assert len(shown) == 7


def test_outputs_are_those_of_one_run_from_top_to_bottom():
    assert 10 <= len(CELLS) <= 14 and FILE.stat().st_size < 1e6
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert all(output.get("name") != "stderr" for output in outputs)
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 7
