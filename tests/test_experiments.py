"""experiments.py, plumbing/results.py and plots.py: every listed run is a command that exists; runs
are made, kept and found again; tables and pictures say what made-up runs said."""
import dataclasses
import importlib
import json
import shutil
import signal
import sys

import numpy as np
import pytest
import scipy.stats

import experiments
import plots
from experiments import FILES, GROUPS, PLANE, TOY
from plumbing.results import Group, find_run, make, missing_runs, name, rows_of, table, write


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder in the project's place, with what the pictures need beside runs."""
    (tmp_path / "results").mkdir()
    shutil.copy(experiments.HERE / "results/divergence.txt", tmp_path / "results")
    monkeypatch.setattr(experiments, "HERE", tmp_path)
    return tmp_path


def run_of(group, row, seed=0, log=(), **numbers):
    """A made-up run of a group's row."""
    return dict(script=GROUPS[group].script, options=GROUPS[group].options(row), seed=seed,
                numbers=numbers, log=list(log))


def by_name(*runs):
    return {name(run["script"], run["options"], run["seed"]): run for run in runs}


def put(folder, group, row, seed=0, log=(), **numbers):
    """Write a run's folder as its script does, its config as the options say."""
    place = folder / group / f"{row}_seed{seed}"
    place.mkdir(parents=True)
    words = f"{GROUPS[group].options(row)} --seed {seed}".split()
    config = {flag[2:].replace("-", "_"): value for flag, value in zip(words[::2], words[1::2])}
    (place / "result.json").write_text(json.dumps(dict(config=config, **numbers)))
    if log:
        rows = [",".join(str(value) for value in row.values()) for row in log]
        (place / "log.csv").write_text("\n".join(["# what is measured", ",".join(log[0]), *rows]))
    return place


@pytest.mark.parametrize("group", GROUPS)
def test_every_run_is_what_its_options_say(group):
    for row, own in GROUPS[group].rows.items():
        words = GROUPS[group].options(row).split()
        if not own.startswith("--"):                    # an edit of the code
            continue
        script = importlib.import_module(GROUPS[group].script.removesuffix(".py"))
        config = vars(script.parse(words)[0])
        for flag, value in zip(words, [*words[1:], "--"]):
            key = flag[2:].replace("-", "_")
            if flag.startswith("--") and key != "preset":
                value = True if value.startswith("--") else value
                assert config[key] == type(config[key])(value), (row, flag)


def test_a_name_is_script_options_and_seed():
    """In any order, without --kimg; and BE, KL and LS are SBA's."""
    for h, lam in (("be", -1), ("kl", 0), ("ls", 1)):           # Table 1
        assert name("a.py", f"--h {h}", 0) == name("a.py", f"--lam {lam} --h sba", 0)
    assert name("a.py", "--b x --gan 1 --kimg 6", 0) == name("a.py", "--kimg 16 --gan 1 --b x", 0)
    for group in GROUPS.values():
        names = {name(group.script, group.options(row), seed) for row in group.rows
                 for seed in (0, 1)}
        assert len(names) == 2 * len(group.rows)


def test_a_longer_run_holds_the_shorter():
    log = [dict(kimg=k, to_teacher=v) for k, v in ((0, 9), (4, 4), (6.016, 3), (16, 1))]
    runs = by_name(run_of("images", "kl", log=log, images=16000))
    short = find_run(runs, GROUPS["images_every_h"], "kl", 0)
    assert short["numbers"]["to_teacher"] == 3 and short["log"] == log[:3]
    assert find_run(runs, GROUPS["images"], "kl", 0)["numbers"] == log[3] | dict(images=16000)
    cut = by_name(run_of("images", "kl", log=log[:3]))
    assert find_run(cut, GROUPS["images"], "kl", 0) is None


# -------------------------------------------------------------------------------- kept and missing

def test_collect_keeps_what_finished_and_of_two_the_longer(here):
    x = np.ones((2, 5, 2), np.float16)
    place = put(here / "away", "plane_lam", "learned_256_5", on_mode=0.5)
    np.savez(place / "frames.npz", step=np.arange(2), x=x, log_r=x)
    np.save(place / "samples.npy", x[0])
    (place / "picture.png").write_bytes(b"picture")
    log = [dict(kimg=0, to_data=1), dict(kimg=16, to_data=3)]
    put(here / "away", "images", "sba_5", 1, log)
    (here / "away/images/kl_seed0").mkdir()                                 # not finished
    (here / "figures").mkdir()
    assert experiments.collect(here / "away") == 2
    rows = experiments.all_rows()
    for group, row in (("every_h", "sba_5"), ("page", "learned_sba_5")):
        run, = rows[group][row]
        assert run["numbers"]["on_mode"] == 0.5 and (run["samples"] == x[0]).all()
    film = experiments.film(experiments.arrays("page_frames.npz"), "learned_sba_5")
    assert (film["x"] == x).all()
    assert (here / "figures/toy2d_sba_5.png").read_bytes() == b"picture"
    put(here / "again", "images_every_h", "sba_5", 1, log[:1])
    experiments.collect(here / "again")
    run, = experiments.all_rows()["images"]["sba_5"]
    assert run["log"] == log


@pytest.mark.parametrize("change", [dict(lam=3), dict(seed=1), dict(data="b.zip")])
def test_a_run_of_other_options_is_refused(here, change):
    """One number or file has many spellings."""
    place = put(here, "paper_setting", "sba_5", log=[dict(kimg=50)])
    config = json.loads((place / "result.json").read_text())["config"]
    config |= dict(lr_g=0.00001, kimg=50.0, data="/elsewhere/runs/unguided.zip")
    (place / "result.json").write_text(json.dumps(dict(config=config)))
    assert experiments.collect(here) == 1
    (place / "result.json").write_text(json.dumps(dict(config=config | change)))
    with pytest.raises(ValueError, match=f"paper_setting/sba_5_seed0.*--{[*change][0]}"):
        experiments.collect(here)


def test_what_is_missing_is_made_once_and_goes_on(tmp_path):
    """BE is lambda = -1 of another group; an edit of the code is never run; the longer run is made
    for two groups; a checkpoint is gone on with."""
    runs = by_name(run_of("plane_lam", "learned_256_-1"))
    commands = missing_runs(runs, GROUPS, ["every_h", "exercises"], tmp_path)
    assert tmp_path / "every_h/be_seed1" in commands
    assert not {tmp_path / "every_h/be_seed0", tmp_path / "exercises/swap_seed0"} & {*commands}
    folder = tmp_path / "images/sba_5_seed2"
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").touch()
    commands = missing_runs({}, GROUPS, ["images_every_h", "images"], tmp_path)
    assert tmp_path / "images_every_h/sba_5_seed2" not in commands
    assert commands[folder][-5:] == ["--seed", "2", "--out", str(folder), "--resume"]
    assert "--resume" not in commands[tmp_path / "images/sba_5_seed1"]


def test_a_signal_is_handed_on_once_and_begins_nothing_more(tmp_path, capsys):
    saves = ("import os, signal, sys, time\n"
             "def save(*_): open('saved', 'a').write('x'); sys.exit(143)\n"
             "signal.signal(signal.SIGTERM, save)\n"
             "os.kill(os.getppid(), signal.SIGTERM)\n"
             "time.sleep(60)")
    commands = {tmp_path / "a": [sys.executable, "-c", saves],
                tmp_path / "b": [sys.executable, "-c", "open('begun', 'w')"]}
    assert make(commands, tmp_path, 1) == 128 + signal.SIGTERM
    assert (tmp_path / "saved").read_text() == "x" and not (tmp_path / "begun").exists()
    assert capsys.readouterr().err == "stopped; the same command goes on\n"


STUB = """import json, os, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if options["--h"] == "sba":
    sys.exit("toy2d.py: step 2: loss_score is inf")
config = {flag[2:]: value for flag, value in options.items()}
with open(options["--out"] + "/result.json", "w") as file:
    json.dump(dict(config=config, on_mode=int(os.environ["OMP_NUM_THREADS"])), file)"""


def test_run_makes_keeps_and_shows_and_makes_nothing_twice(here, monkeypatch, capsys):
    """Two runs of a toy2d.py that only reads its options: one ends well, and one diverges."""
    (here / "toy2d.py").write_text(STUB)
    rows = {"good": "--h kl", "bad": "--h sba --lam 5"}
    monkeypatch.setitem(GROUPS, "tiny", Group("tiny", TOY, rows, PLANE, "--steps 3", 1))
    assert experiments.main(["--run", "tiny", "--jobs", "2"]) == 1
    said = capsys.readouterr()
    assert "tiny/bad_seed0 failed: toy2d.py: step 2: loss_score is inf" in said.err
    assert "| `--h kl` | 1 | 1.000 |\n" in said.out and "lam 5" not in said.out
    (here / "toy2d.py").unlink()
    rows = {"again": "--h sba --lam 0"}                     # it is KL's run, whatever its name
    monkeypatch.setitem(GROUPS, "tiny", Group("tiny", TOY, rows, PLANE, "--steps 3", 1))
    assert experiments.main(["--run", "tiny"]) == 0


# ---------------------------------------------------------------------------- tables and pictures

def test_means_of_the_last_measurements_have_the_interval_of_a_paired_t_test():
    """Of the seeds that KL and BE share, which are 1, 2 and 3."""
    kl, be, runs = (2.25, 2.0, 2.5, 2.25), (2.5, 2.75, 3.5), []
    for row, seed, end in (*zip(["kl"] * 4, range(4), kl), *zip(["be"] * 3, range(1, 4), be)):
        log = [dict(kimg=k, to_data=end + d) for k, d in ((5, 9), (25, 3), (30, 1), (50, -1))]
        runs.append(run_of("settled", row, seed, log))
    group = dataclasses.replace(GROUPS["settled"], columns=("to_data", "interval_data", "range"),
                                last=2)
    _, _, of_kl, of_be = table(group, rows_of(by_name(*runs), group)).splitlines()
    low, high = scipy.stats.ttest_rel(be, kl[1:]).confidence_interval(0.95)
    assert of_kl.endswith("| 4 | 2.25 ± 0.20 | 0.00 to 0.00 | 4.00 ± 0.00 |")
    assert of_be.endswith(f"| 3 | 2.92 ± 0.52 | {low:.2f} to {high:.2f} | 4.00 ± 0.00 |")


def test_every_picture_is_drawn_of_few_runs(here):
    """One seed, one line, one part; runs without samples."""
    log = [dict(kimg=k, to_teacher=9, to_data=5, precision=0.5, tau=0.5) for k in (0, 100)]
    runs = [run_of(group, list(GROUPS[group].rows)[0], modes_covered=3, mode_tv=0.5,
                   log=() if GROUPS[group].script == TOY else log)
            for group, _ in experiments.PICTURES.values()]
    for script, file in FILES.items():
        write({k: v for k, v in by_name(*runs).items() if v["script"] == script}, here / file)
    experiments.draw(experiments.all_rows())
    assert {path.stem for path in (here / "figures").iterdir()} == {
        *experiments.PICTURES, "weights"}


def test_curves_show_the_mean_of_the_seeds_until_the_shortest_ends():
    logs = [[dict(kimg=k, recall=v) for k, v in enumerate(vs)] for vs in ((9, 1, 2, 3), (9, 3, 6))]
    fig = plots.curves({"kl": [dict(log=log, numbers=dict(tau=0.5)) for log in logs]}, since=1)
    line, = fig.axes[0].lines
    assert line.get_xdata().tolist() == [1, 2] and line.get_ydata().tolist() == [2, 4]
    band = fig.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(2 - 2 ** 0.5) and band.max() == pytest.approx(4 + 8 ** 0.5)
    assert line.get_label() == "KL, tempered"
