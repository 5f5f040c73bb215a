"""experiments.py, plumbing/results.py and plots.py: every listed run is a command that exists; runs
are made, kept and found again; tables and pictures say what made-up runs said."""
import dataclasses
import importlib
import json
import os
import shutil
import signal
import statistics
import sys

import matplotlib
import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

import experiments
import plots
from experiments import FILES, GROUPS, PLANE, TOY
from plumbing.results import Group, found, make, missing, name, rows_of, table, write


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


def kept(*runs):
    return {name(run["script"], run["options"], run["seed"]): run for run in runs}


def put(folder, group, row, seed=0, log=(), **numbers):
    """Write a run's folder as its script does, its config as the options say."""
    place = folder / group / f"{row}_seed{seed}"
    place.mkdir(parents=True)
    options = GROUPS[group].options(row).split(" --")
    pairs = [part.strip("-").partition(" ") for part in options]
    config = {key.replace("-", "_"): value or True for key, _, value in pairs} | dict(seed=seed)
    (place / "result.json").write_text(json.dumps(dict(config=config, **numbers)))
    if log:
        rows = [",".join(str(value) for value in row.values()) for row in log]
        (place / "log.csv").write_text("\n".join(["# what is measured", ",".join(log[0]), *rows]))
    return place


# ------------------------------------------------------------------------------- groups and names

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
    assert name("a.py", "--h sba --lam -1", 2) == "a.py --h sba --lam -1 --seed 2"
    for h, lam in (("be", -1), ("kl", 0), ("ls", 1)):           # Table 1
        assert name("a.py", f"--h {h}", 0) == name("a.py", f"--lam {lam} --h sba", 0)
    assert name("a.py", "--b x --gan 1 --kimg 6", 0) == name("a.py", "--kimg 16 --gan 1 --b x", 0)
    assert len({name("a.py", "--h kl", 0), name("b.py", "--h kl", 0), name("a.py", "--h kl", 1),
                name("a.py", "--h lr", 0), name("a.py", "swap", 0)}) == 5
    for group in GROUPS.values():
        names = {name(group.script, group.options(row), 0) for row in group.rows}
        assert len(names) == len(group.rows)


def test_a_longer_run_holds_the_shorter():
    log = [dict(kimg=k, to_teacher=v) for k, v in ((0, 9), (4, 4), (6.016, 3), (16, 1))]
    runs = kept(run_of("images", "kl", log=log, images=16000))
    short = found(runs, GROUPS["images_every_h"], "kl", 0)
    assert short["numbers"]["to_teacher"] == 3 and short["log"] == log[:3]
    assert found(runs, GROUPS["images"], "kl", 0)["numbers"] == log[3] | dict(images=16000)
    cut = kept(run_of("images", "kl", log=log[:3]))
    assert found(cut, GROUPS["images"], "kl", 0) is None
    assert found(runs, GROUPS["images"], "kl", 1) is None


# -------------------------------------------------------------------------------- kept and missing

def test_collect_keeps_what_finished(here):
    """Numbers and log of each run, frames, samples and pictures of some; the longer run stays."""
    x = np.ones((2, 5, 2), np.float16)
    history = [dict(step=90, on_mode=0.123456)]
    for group, row in (("plane_lam", "learned_256_5"), ("exercises", "swap")):
        place = put(here / "away", group, row, history=history, on_mode=0.5)
        np.savez(place / "frames.npz", step=np.arange(2), x=x, log_r=x)
        np.save(place / "samples.npy", x[0])
    Image.new("RGB", (7, 5)).save(here / "away/plane_lam/learned_256_5_seed0/picture.png")
    put(here / "away", "images", "sba_5", 1, [{"kimg": 0, "is": 1}, {"kimg": 16, "is": 3}])
    (here / "away/images/kl_seed0").mkdir()                                 # not finished
    (here / "figures").mkdir()
    assert experiments.collect(here / "away") == 3
    rows = experiments.all_rows()
    for group, row in (("every_h", "sba_5"), ("page", "learned_sba_5"), ("exercises", "swap")):
        run, = rows[group][row]
        assert run["numbers"]["on_mode"] == 0.5 and run["log"] == [dict(step=90, on_mode=0.1235)]
        assert (run["samples"] == x[0]).all()
    film = experiments.film(experiments.arrays("page_frames.npz"), "learned_sba_5")
    assert (film["x"] == x).all() and len(experiments.arrays("page_frames.npz")) == 3
    assert Image.open(here / "figures/toy2d_sba_5.png").size == (7, 5)
    run, = rows["images"]["sba_5"]
    assert run["numbers"]["is"] == 3 and len(run["log"]) == 2
    put(here / "again", "images_every_h", "sba_5", 1, [{"kimg": 6, "is": 9}])
    experiments.collect(here / "again")
    assert experiments.all_rows()["images"]["sba_5"] == [run]


@pytest.mark.parametrize("change, said", [
    (dict(lam=3), "--lam 3, and not with 5"), (dict(seed=1), "--seed 1, and not with 0"),
    (dict(h="kl"), "--h kl"), (dict(kimg=None), "--kimg None"),
    (dict(data="b.zip"), "--data b.zip, and not with runs/unguided.zip")])
def test_a_run_of_other_options_is_refused(here, change, said):
    """One number or file has many spellings."""
    place = put(here, "paper_setting", "sba_5", log=[dict(kimg=50)])
    config = json.loads((place / "result.json").read_text())["config"]
    config |= dict(lr_g=0.00001, kimg=50.0, data="/elsewhere/runs/unguided.zip")
    (place / "result.json").write_text(json.dumps(dict(config=config)))
    assert experiments.collect(here) == 1
    (place / "result.json").write_text(json.dumps(dict(config=config | change)))
    with pytest.raises(ValueError, match=f"paper_setting/sba_5_seed0 was run with {said}"):
        experiments.collect(here)


def test_what_is_missing_is_made_once_and_goes_on(tmp_path):
    """BE is lambda = -1 of another group; an edit of the code is never run; the longer run is made
    for two groups; a checkpoint is gone on with."""
    runs = kept(run_of("plane_lam", "learned_256_-1"))
    places = missing(runs, GROUPS, ["every_h", "exercises"], tmp_path)
    assert not {"every_h/be_seed0", "exercises/swap_seed0"} & {
        str(place.relative_to(tmp_path)) for place in places}
    assert len(places) == 5 * 10 - 1 + 9        # without a BE, and three edits
    folder = tmp_path / "images/sba_5_seed2"
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").touch()
    commands = missing({}, GROUPS, ["images_every_h", "images"], tmp_path)
    assert tmp_path / "images_every_h/sba_5_seed2" not in commands
    assert commands[folder] == [
        sys.executable, "cifar_distill.py", *GROUPS["images"].options("sba_5").split(),
        "--seed", "2", "--out", str(folder), "--resume"]
    assert "--resume" not in commands[tmp_path / "images/sba_5_seed1"]


# ------------------------------------------------------------------------------------------- made

def python(code):
    return [sys.executable, "-c", code]


def test_jobs_run_apart_and_one_that_fails_says_why(tmp_path, capsys):
    code = "import os; open({!r}, 'w').write(os.environ['OMP_NUM_THREADS'])"
    commands = {tmp_path / str(i): python(code.format(str(tmp_path / f"{i}.txt"))) for i in (1, 2)}
    commands[tmp_path / "bad"] = python("import sys; print('first'); sys.exit('the reason')")
    assert make(commands, tmp_path, 2) == 1
    assert [(tmp_path / f"{i}.txt").read_text() for i in (1, 2)] == ["1", "1"]
    said = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert said == [f"{tmp_path}/bad failed: the reason"]


def test_a_signal_is_handed_on_once_and_begins_nothing_more(tmp_path, capsys):
    saves = ("import os, signal, sys, time\n"
             "def save(*_): open('saved', 'a').write('x'); sys.exit(143)\n"
             "signal.signal(signal.SIGTERM, save)\n"
             "os.kill(os.getppid(), signal.SIGTERM)\n"
             "time.sleep(60)")
    commands = {tmp_path / "a": python(saves), tmp_path / "b": python("open('begun', 'w')")}
    assert make(commands, tmp_path, 1) == 128 + signal.SIGTERM
    assert (tmp_path / "saved").read_text() == "x" and not (tmp_path / "begun").exists()
    assert capsys.readouterr().err == "stopped; the same command goes on\n"


STUB = """import json, sys
from dataclasses import asdict
sys.path.insert(0, {root!r})
import toy2d
cfg, out = toy2d.parse(sys.argv[1:])
if cfg.lr_f > 1:
    sys.exit("toy2d.py: step 2: loss_score is inf")
(out / "result.json").write_text(json.dumps(dict(config=asdict(cfg), on_mode=0.5)))"""


def test_run_makes_keeps_and_shows_and_makes_nothing_twice(here, monkeypatch, capsys):
    """Two runs of a toy2d.py that only reads its options: one ends well, and one diverges."""
    root = experiments.__file__.rpartition("/")[0]
    (here / "toy2d.py").write_text(STUB.format(root=root))
    monkeypatch.setitem(GROUPS, "tiny", Group("tiny", TOY, {
        "good": "--h kl", "bad": "--h sba --lam 5 --lr-f 1e12"}, PLANE, "--steps 3", 1))
    assert experiments.main(["--run", "tiny", "--jobs", "2"]) == 1
    said = capsys.readouterr()
    assert "tiny/bad_seed0 failed: toy2d.py: step 2: loss_score is inf" in said.err
    assert ("tiny: tiny, by toy2d.py --steps 3\n\n| options | seeds | on a mode |\n"
            "| --- | --- | --- |\n| `--h kl` | 1 | 0.500 |\n") in said.out
    assert "lam 5" not in said.out and os.listdir(here / "figures") == ["weights.png"]
    shutil.rmtree(here / "runs")
    monkeypatch.setitem(GROUPS, "tiny", Group("tiny", TOY, {"good": "--h sba --lam 0"}, PLANE,
                                              "--steps 3", 1))
    monkeypatch.setattr(experiments, "make", lambda commands, *_: len(commands))
    assert experiments.main(["--run", "tiny"]) == 0         # it is KL's run, whatever its name


# ---------------------------------------------------------------------------------------- tables

def test_plane_table():
    runs = [run_of("plane_lam", "exact_256_5", seed, modes_covered=modes, mode_tv=0.5,
                   log_r_error=None) for seed, modes in enumerate((8, 5, 6))]
    low = {"0.02": 3.25, "2": 0.5}
    runs += [run_of("plane_lam", "learned_256_5", modes_covered=3, mode_tv=0.25, log_r_error=0.75,
                    log_r_error_by_sigma=low), run_of("exercises", "lecam", modes_covered=4)]
    mean, std = statistics.mean((8, 5, 6)), statistics.stdev((8, 5, 6))
    assert table(GROUPS["plane_lam"], rows_of(kept(*runs), GROUPS["plane_lam"])) == (
        "| options | seeds | modes | mode TV | log r error | at the lowest sigma |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| `--h sba --lam 5` | 1 | 3.0 | 0.250 | 0.75 | 3.2 |\n"
        "| `--h sba --lam 5 --ratio exact` | 3 "
        f"| {mean:.1f} ± {std:.1f} | 0.500 ± 0.000 |  |  |\n")
    exercises = table(GROUPS["exercises"], rows_of(kept(*runs), GROUPS["exercises"]))
    assert exercises.splitlines()[2] == "| 1: h of Le Cam | 1 | 4.0 |"


def test_images_table_compares_with_kl_of_the_same_seed():
    runs = []
    for seed, kl in enumerate((1, 2, 4)):
        runs.append(run_of("images", "kl", seed, [dict(kimg=16, to_teacher=kl, tau=1)]))
        if seed:
            last = dict(kimg=16, to_teacher=kl + seed, tau=0.5)
            runs.append(run_of("images", "sba_5", seed, [last]))
    group = GROUPS["images"]
    head, _, of_kl, of_sba = table(group, rows_of(kept(*runs), group)).splitlines()
    assert head == "| options | seeds | to the teacher's samples | minus KL's, same seed | tau |"
    assert of_kl == "| `--h kl` | 3 | 2.33 ± 1.53 | 0.00 ± 0.00 | 1.00 ± 0.00 |"
    assert of_sba.startswith("| tempered, `--h sba --lam 5` | 2 | 4.50 ± 2.12 | 1.50 ± 0.71 |")


def test_means_of_the_last_measurements_have_the_interval_of_a_paired_t_test():
    runs, ends = [], {"kl": (2.0, 2.5, 2.25), "be": (2.5, 2.75, 3.5)}
    for row, seeds in ends.items():
        for seed, end in enumerate(seeds):
            log = [dict(kimg=k, to_data=end + d) for k, d in ((5, 9), (15, 3), (18, 1), (30, -1))]
            runs.append(run_of("settled", row, seed, log))
    group = dataclasses.replace(GROUPS["settled"], columns=("to_data", "interval_data", "range"),
                                last=2)
    _, _, of_kl, of_be = table(group, rows_of(kept(*runs), group)).splitlines()
    low, high = scipy.stats.ttest_rel(ends["be"], ends["kl"]).confidence_interval(0.95)
    assert of_kl.endswith("| 3 | 2.25 ± 0.25 | 0.00 to 0.00 | 4.00 ± 0.00 |")
    assert of_be.endswith(f"| 3 | 2.92 ± 0.52 | {low:.2f} to {high:.2f} | 4.00 ± 0.00 |")


def test_costs_are_of_eight_modes_over_those_of_one():
    """Of results/divergence.txt: far below 1 where h is KL's, and far above for lambda = 5."""
    assert experiments.costs()[0] < 0.1 and experiments.costs()[5] > 1e5


# -------------------------------------------------------------------------------------- pictures

def test_every_picture_is_drawn_of_few_runs(here):
    """One seed, one line, one part; runs without samples. The host's settings stay, and pyplot,
    which keeps figures, knows of none."""
    log = [dict(kimg=k, to_teacher=9, to_data=5, precision=0.5, tau=0.5) for k in (0, 100)]
    runs = [run_of(group, list(GROUPS[group].rows)[0], modes_covered=3, mode_tv=0.5,
                   log=() if GROUPS[group].script == TOY else log)
            for group, _ in experiments.PICTURES.values()]
    for script, file in FILES.items():
        write({k: v for k, v in kept(*runs).items() if v["script"] == script}, here / file)
    before = dict(matplotlib.rcParams)
    experiments.draw(experiments.all_rows())
    assert {p.name for p in (here / "figures").iterdir()} == {
        f"{picture}.png" for picture in (*experiments.PICTURES, "weights")}
    assert all(Image.open(path).width == 1200 for path in (here / "figures").iterdir())
    assert {k: v for k, v in before.items() if k != "backend"} == {
        k: v for k, v in matplotlib.rcParams.items() if k != "backend"}
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_the_picture_of_lambda_shows_means_and_spreads():
    runs = [dict(numbers=dict(modes_covered=modes)) for modes in (8, 5, 6)]
    fig = plots.plane_lam({"exact_256_3": runs, "level_3": runs}, {-1: 0.25, 3: 4300 / 3})
    line, = fig.axes[0].containers
    assert line.get_label() == "exact r, batch 256"
    assert line[0].get_ydata() == pytest.approx([19 / 3])
    low, high = line[2][0].get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(statistics.stdev((8, 5, 6)))
    assert fig.axes[1].lines[0].get_ydata() == pytest.approx([0.25, 4300 / 3])


def test_curves_show_the_mean_of_the_seeds_until_the_shortest_ends():
    """A divergence has its colour, and the commonest of the other options an unbroken line."""
    logs = [[dict(kimg=k, recall=v) for k, v in enumerate(vs)] for vs in ((9, 1, 2, 3), (9, 3, 6))]
    runs = [dict(log=log, numbers=dict(tau=0.5)) for log in logs]
    rows = {"kl_x1": runs, "kl_x10": runs[:1], "sba_5_x10": runs[:1]}
    fig = plots.curves(rows, since=1)
    assert len(fig.axes) == 2 and fig.axes[0].get_title() == "recall"
    lines = fig.axes[0].lines
    assert lines[0].get_xdata().tolist() == [1, 2] and lines[0].get_ydata().tolist() == [2, 4]
    band = fig.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(2 - 2 ** 0.5) and band.max() == pytest.approx(4 + 8 ** 0.5)
    assert [line.get_linestyle() for line in lines] == ["--", "-", "-"]
    assert [line.get_color() for line in lines] == [plots.COLOUR[h] for h in ("kl", "kl", "sba_5")]
    words = [text.get_text() for text in fig.legends[0].get_texts()]
    assert words[2] == "SBA 5, fake score's rate × 10, tempered"


def test_a_fault_is_marked_in_the_panel_of_its_column_alone():
    rows = {row: [dict(log=[{"kimg": 1} | {key: i for key in plots.HEALTH}])]
            for i, row in enumerate(experiments.HEALTH)}
    for ax, (key, (_, faulty, _)) in zip(plots.health(rows).axes, plots.HEALTH.items()):
        marked = [line.get_ydata()[0] for line in ax.lines if line.get_marker() == "s"]
        assert marked == [list(rows).index(faulty)], key


def test_rows_of_classes_have_their_names_beside_them(tmp_path, monkeypatch):
    """Each name stands at the middle of its row, whose images are the class's."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda fig, *a, **k: figures.append(fig))
    images = torch.arange(6).mul(40).byte()[:, None, None, None].expand(6, 3, 4, 4)
    plots.side_by_side({"teacher": images, "student": images}, "x.png", 2, ["cat", "dog"])
    ax, other = figures[0].axes
    assert [text.get_text() for text in ax.get_yticklabels()] == ["cat", "dog"]
    picture = ax.images[0].get_array()                          # two rows of 4, a line between
    at = [round(y) for y in ax.get_yticks()]
    assert [picture[y, ::5, 0].tolist() for y in at] == [[0, 80, 160], [40, 120, 200]]
    assert picture.shape[:2] == (9, 14) and len(other.get_yticks()) == 0
