"""plumbing/health.py: what a run's rows say of it."""
import csv
from pathlib import Path

import pytest

from plumbing.health import warning

HERE = Path(__file__).parent.parent
WELL = dict(ess=0.9, log_r=0.4, variance=0.9, to_data=3.0, loss_score=0.2)


@pytest.mark.parametrize("sick, words", [
    ({}, ""), (dict(log_r=-0.5), "upside down"), (dict(ess=0.04), "4% of the batch"),
    (dict(ess=0.4), ""), (dict(ess=0.4, log_r=2.5), "40% of the batch"),
    (dict(log_r=2.5), "tells the student's samples"), (dict(variance=0.5), "from 0.90 to 0.50"),
    (dict(to_data=4.5), "the distance rises, from 3 to 4.5"), (dict(to_data=21), "to 21 from 20"),
    (dict(loss_score=0.7, log_r=-0.5), "does not follow the student")])
def test_a_sick_run_is_told_in_one_sentence(sick, words):
    """And only while it is sick, and once the generator moves."""
    start = dict(variance=0.2, to_data=20.0)
    said = warning([start, WELL, WELL | sick])
    assert words in said and bool(said) == bool(words) and "\n" not in said
    assert not warning([start]) and not warning([start, WELL | sick, WELL])


@pytest.mark.parametrize("run, words", [
    ("stale", "--lr-f"), ("upside_down", "upside down"), ("through", "detach"), ("fine", "--t-max"),
    ("untempered", "--lam"), ("fast", "a lower --lr-g"), ("kl", ""), ("sba_5", ""), ("other", "")])
def test_the_recorded_runs_are_told_right(run, words):
    """Each sick run of results/health in its last row; the healthy ones, and all others of one
    evaluation, are told nothing in any row. Those of more do go astray (results.md)."""
    folders = [HERE / f"results/health/{run}_seed0"]
    if run == "other":
        folders = [folder for name in ("images", "images_every_h", "f_distill")
                   for folder in (HERE / "results" / name).iterdir() if "nfe" not in folder.name]
    assert folders
    for folder in folders:
        with open(folder / "log.csv") as f:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]
        said = [warning(rows[:i]) for i in range(1, len(rows) + 1)]
        assert words in said[-1] if words else not any(said), (folder, said)
