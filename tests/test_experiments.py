"""experiments.py: every listed run is a command that exists; results are found again, runs made,
tables and pictures drawn from made-up results."""
import json
import os
import signal
import statistics
import sys

import numpy as np
import pytest
from PIL import Image

import experiments
from experiments import GROUPS, PLANE, TOY, Group
from plumbing.jobs import run_all
from plumbing.results import Results, identity, runs_of


def the(group, row, seed=0):
    """The run of that name."""
    run, = (r for r in runs_of(GROUPS, [group]) if (r.row, r.seed) == (row, seed))
    return run


def make(root, run, log=(), config=(), **numbers):
    """Write a result for the run, its config with some options changed."""
    folder = root / run.folder
    folder.mkdir(parents=True)
    config = run.config() | dict(config) if run.options else dict(target="ring8", h="lecam")
    (folder / "result.json").write_text(json.dumps(dict(config=config, **numbers)))
    if log:
        keys = list(dict.fromkeys(k for row in log for k in row))
        lines = [",".join(str(row.get(k, "")) for k in keys) for row in log]
        (folder / "log.csv").write_text("\n".join([",".join(keys), *lines]))
    return folder


# ------------------------------------------------------------------------------------- the groups

def test_every_run_is_what_its_options_say():
    runs = runs_of(GROUPS)
    assert len({run.folder for run in runs}) == len(runs) > 200
    for run in runs:
        config = run.config() if run.options else {}
        words = run.options.split()
        for flag, value in zip(words, [*words[1:], "--"]):
            name = flag[2:].replace("-", "_")
            if flag.startswith("--") and name != "preset":
                said = True if value.startswith("--") else value
                assert config[name] == (type(config[name])(said)), (run, flag)
    assert runs_of(GROUPS, ["paper"])[0].config()["kimg"] == 15_000


def test_runs_of_one_group_differ():
    for name in GROUPS:
        runs = [run for run in runs_of(GROUPS, [name]) if run.options]
        assert len({run.identity() for run in runs}) == len(runs), name


def test_two_names_of_a_row_are_one_run():
    """BE is SBA -1, KL SBA 0, LS SBA 1; LR is no SBA."""
    for row, other in (("be", "-1"), ("kl", "0"), ("ls", "1"), ("sba_3", "3")):
        assert the("every_h", row).identity() == the("plane_lam", f"learned_256_{other}").identity()
    others = {run.identity() for run in runs_of(GROUPS, ["plane_lam"])}
    own = {run.row for run in runs_of(GROUPS, ["every_h"], 1) if run.identity() not in others}
    assert own == {"sba_-0.5", "lr", "sba_10", "srkl"}
    assert the("every_h", "kl", 0).identity() != the("every_h", "kl", 1).identity()


# ------------------------------------------------------------------------------- found, or missing

def test_a_result_serves_every_group(tmp_path):
    make(tmp_path, the("plane_lam", "learned_256_-1"), config=dict(device="cuda"), ess=0.5)
    results = Results(tmp_path, GROUPS)
    assert results.of(the("every_h", "be")).result["ess"] == 0.5
    assert results.of(the("every_h", "be", 1)) is None
    assert not results.missing([the("plane_lam", "learned_256_-1"), the("every_h", "be")])
    rows = results.rows("every_h")
    assert list(rows) == ["be"] and list(rows["be"]) == [0]


def test_a_result_of_other_options_is_none(tmp_path):
    run = the("every_h", "lr")
    folder = make(tmp_path, run, config=dict(steps=50))
    assert list(Results(tmp_path, GROUPS).missing([run])) == [folder]


def test_an_option_younger_than_a_result_had_its_default():
    run = the("every_h", "lr")
    older = {k: v for k, v in run.config().items() if k != "part"}
    assert identity(TOY, older) == run.identity()
    assert identity(TOY, older | dict(gone=1)) != run.identity()


def test_a_longer_run_on_images_holds_the_shorter(tmp_path):
    short, long = the("images_every_h", "kl"), the("images", "kl")
    assert list(Results(tmp_path, GROUPS).missing([short, long])) == [tmp_path / long.folder]
    make(tmp_path, long, [dict(kimg=k, to_teacher=v) for k, v in (
        (0, 9), (2.016, 5), (4, 4), (6.016, 3), (8, 2), (16, 1))])
    results = Results(tmp_path, GROUPS)
    assert results.of(short).numbers()["to_teacher"] == 3
    assert results.of(long).numbers()["to_teacher"] == 1
    cut = results.of(long)
    assert cut.until(7) is None and cut.until(17) is None


def test_an_interrupted_run_goes_on(tmp_path):
    run = the("images", "sba_5", 2)
    (tmp_path / run.folder).mkdir(parents=True)
    command = Results(tmp_path, GROUPS).missing([run])[tmp_path / run.folder]
    options = "--h sba --lam 5 --kimg 16 --eval-every 2 --seed 2"
    assert command == [sys.executable, "cifar_distill.py", *options.split(),
                       "--out", str(tmp_path / run.folder)]
    (tmp_path / run.folder / "checkpoint.pt").touch()
    assert Results(tmp_path, GROUPS).missing([run])[tmp_path / run.folder] == [*command, "--resume"]


def test_an_edit_of_the_code_is_made_by_hand(tmp_path):
    """It is never run, and its result, however like another's, is its own row's alone."""
    edit = the("exercises", "swap")
    make(tmp_path, edit, ess=0.25)
    (tmp_path / edit.folder / "result.json").write_text(
        json.dumps(dict(config=the("every_h", "be").config(), ess=0.25)))
    results = Results(tmp_path, GROUPS)
    assert results.of(edit).result["ess"] == 0.25 and results.of(the("every_h", "be")) is None
    assert not results.missing([the("exercises", "lecam")])


@pytest.mark.parametrize("file, text", [("result.json", "{"), ("result.json", "[]"),
                                        ("result.json", '{"config": {}}'), ("log.csv", "kimg\nx"),
                                        ("log.csv", "")])
def test_a_broken_result_is_named(tmp_path, file, text):
    folder = make(tmp_path, the("images", "kl"), [dict(kimg=16)])
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match="images/kl_seed0"):
        Results(tmp_path, GROUPS)


# ------------------------------------------------------------------------------------------- runs

def python(code):
    return [sys.executable, "-c", code]


def test_jobs_run_apart_and_one_that_fails_is_told_in_a_line(tmp_path, capsys):
    code = "import os; open({!r}, 'w').write(os.environ['OMP_NUM_THREADS'])"
    commands = {tmp_path / str(i): python(code.format(str(tmp_path / f"{i}.txt"))) for i in (1, 2)}
    commands[tmp_path / "bad"] = python("import sys; print('first'); sys.exit('the reason')")
    assert run_all(commands, tmp_path, 2) == 1
    assert [(tmp_path / f"{i}.txt").read_text() for i in (1, 2)] == ["1", "1"]
    told = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert told == [f"{tmp_path}/bad failed: the reason"]


def test_a_signal_is_handed_on_once_and_begins_nothing_more(tmp_path, capsys):
    saves = ("import os, signal, sys, time\n"
             "def save(*_): open('saved', 'a').write('x'); sys.exit(143)\n"
             "signal.signal(signal.SIGTERM, save)\n"
             "os.kill(os.getppid(), signal.SIGTERM)\n"
             "time.sleep(60)")
    commands = {tmp_path / "a": python(saves), tmp_path / "b": python("open('begun', 'w')")}
    assert run_all(commands, tmp_path, 1) == 128 + signal.SIGTERM
    assert (tmp_path / "saved").read_text() == "x" and not (tmp_path / "begun").exists()
    assert capsys.readouterr().err == "stopped; the same command goes on\n"


def test_run_draws_tells_and_makes_nothing_twice(tmp_path, monkeypatch, capsys):
    """Two real runs: one that ends well, and one that diverges."""
    short = "--steps 3 --batch 16 --width 8 --init-steps 1"
    monkeypatch.setitem(GROUPS, "tiny", Group("tiny", TOY, {
        "good": "--h kl", "bad": "--h sba --lam 5 --lr-f 1e12"}, PLANE, short, 1))
    argv = ["--run", "tiny", "--results", str(tmp_path / "r"), "--figures", str(tmp_path / "f"),
            "--jobs", "2"]
    assert experiments.main(argv) == 1
    said = capsys.readouterr()
    told, = (line for line in said.err.splitlines() if "failed" in line)
    assert "tiny/bad_seed0 failed: toy2d.py: step 2: " in told
    assert f"tiny: tiny, by toy2d.py {short}\n\n| options | seeds |" in said.out
    assert "| `--h kl` | 1 |" in said.out and "lam 5" not in said.out
    folder = tmp_path / "r/tiny/good_seed0"
    assert {"result.json", "samples.npy", "frames.npz"} <= set(os.listdir(folder))
    written = (folder / "result.json").stat().st_mtime_ns
    monkeypatch.setitem(GROUPS, "tiny", Group("tiny", TOY, {"good": "--h sba --lam 0"}, PLANE,
                                              short, 1))
    assert experiments.main(argv) == 0                      # KL's result, whatever its name
    assert (folder / "result.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("argv, said", [
    (["--run", "nonsense"], "nonsense"), (["--seeds", "0"], "--seeds"),
    (["--jobs", "x"], "--jobs")])
def test_bad_options_are_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        experiments.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and err.count("\n") == 1


def test_without_results_it_says_what_makes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="--run makes them"):
        experiments.main(["--results", str(tmp_path), "--figures", str(tmp_path / "figures")])
    assert not (tmp_path / "figures").exists()


# ------------------------------------------------------------------------------ tables, pictures

def in_the_plane(root, run, modes=3, error=0.25):
    folder = make(root, run, modes_covered=modes, mode_tv=0.5, on_mode=0.75, log_r_error=error,
                  ess=0.125)
    np.save(folder / "samples.npy", np.zeros((5, 2), np.float16))
    np.savez(folder / "frames.npz", step=np.array([1, 9]), x=np.zeros((2, 5, 2), np.float16))


def on_images(root, run, last, tau=1):
    """Distances that fall to `last` at 6,000 images, and on to half of it."""
    names = ("to_data", "precision", "recall", "score", "ess", "log_r_std")
    rows = [dict(kimg=0, to_teacher=10, to_data=20, score=1)]
    rows += [dict(kimg=k, to_teacher=last if k == 6 else last / 2) | {
        name: i + 1 for i, name in enumerate(names)} | dict(tau=tau)
        for k in (6, 16) if k <= run.kimg()]
    make(root, run, rows)


def test_plane_table(tmp_path):
    for seed, modes in enumerate((8, 5, 6)):
        in_the_plane(tmp_path, the("plane_lam", "exact_256_5", seed), modes, None)
    in_the_plane(tmp_path, the("plane_lam", "learned_256_5"))
    in_the_plane(tmp_path, the("exercises", "lecam"))
    tables = dict(experiments.tables(Results(tmp_path, GROUPS)))
    assert set(tables) == {"plane_lam", "page", "every_h", "plane_help", "exercises"}   # with SBA 5
    mean, std = statistics.mean((8, 5, 6)), statistics.stdev((8, 5, 6))
    assert tables["plane_lam"] == (
        "| options | seeds | modes | mode TV | on a mode | log r error | ESS |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| `--h sba --lam 5` | 1 | 3.0 | 0.500 | 0.750 | 0.25 | 0.12 |\n"
        f"| `--h sba --lam 5 --ratio exact` | 3 | {mean:.1f} ± {std:.1f} | 0.500 ± 0.000 "
        "| 0.750 ± 0.000 |  | 0.12 ± 0.00 |\n")
    assert "| 1: h of Le Cam | 1 | 3.0 |" in tables["exercises"]


def test_images_table_compares_with_kl_of_the_same_seed(tmp_path):
    for seed, kl in enumerate((1, 2, 4)):
        on_images(tmp_path, the("images", "kl", seed), 2 * kl)
        if seed:
            on_images(tmp_path, the("images_every_h", "sba_5", seed), 2 * kl + seed, tau=0.5)
    tables = dict(experiments.tables(Results(tmp_path, GROUPS)))
    mean, std = statistics.mean((5, 10)), statistics.stdev((5, 10))
    assert f"| held, `--h sba --lam 5` | 2 | {mean:.2f} ± {std:.2f} | 1.50 ± 0.71 | 1.00" in (
        tables["images_every_h"])
    assert "| `--h kl` | 3 | 2.33 ± 1.53 | 0.00 ± 0.00 |" in tables["images"]
    assert "| `--h kl` | 3 | 4.67 ± 3.06 | 0.00 ± 0.00 |" in tables["images_every_h"]
    assert tables["images"].splitlines()[0].endswith("| score | tau |")


def test_without_the_teachers_samples_the_data_is_the_measure(tmp_path):
    for row, to_data in (("kl", 5), ("sba_5", 7)):
        make(tmp_path, the("paper", row), [dict(kimg=15_000, to_data=to_data)])
    head, _, kl, sba = dict(experiments.tables(Results(tmp_path, GROUPS)))["paper"].splitlines()
    assert head == "| options | seeds | minus KL's, same seed | to the data |"
    assert sba == "| `--h sba --lam 5` | 1 | 2.00 | 7.00 |"


def test_every_group_with_results_has_its_picture(tmp_path):
    for name, most in (("plane_lam", 2), ("every_h", 1), ("exercises", 1)):
        for run in runs_of(GROUPS, [name], most):
            in_the_plane(tmp_path, run)
    for name, most in (("images", 2), ("images_every_h", 1)):
        for run in runs_of(GROUPS, [name], most):
            on_images(tmp_path, run, 1 + run.seed)
    learns = dict(seen=9, fd_compact=2.0, is_compact=3.0, decayed=True)
    guided = dict(tag="final", weak="none", w=1, fd=2.0, precision=0.5, recall=0.5)
    (tmp_path / "teacher").mkdir()
    for name, record in (("curve_compact.jsonl", learns), ("guidance.jsonl", guided)):
        (tmp_path / "teacher" / name).write_text(json.dumps(record) + "\n")
    samples = tmp_path / the("images", "kl").folder / "samples.png"
    Image.new("RGB", (7, 5)).save(samples)
    figures = tmp_path / "figures"
    assert experiments.main(["--results", str(tmp_path), "--figures", str(figures), "--gif"]) == 0
    sizes = {path.name: Image.open(path).size for path in figures.iterdir()}
    assert sizes.pop("cifar_kl.png") == (7, 5)
    assert sizes.pop("toy2d.gif") == (810, 450)
    assert set(sizes) == {f"{name}.png" for name in (
        "strip", "weights", "plane_lam", "toy2d_modes", "exercises", "images", "images_every_h",
        "plane_parts", "teachers")}
    assert all(width >= 900 for width, _ in sizes.values())


def test_a_picture_of_few_results(tmp_path):
    """What is missing is left out: one seed, one line, one part; runs without samples."""
    for row in ("exact_256_3", "level_5"):
        make(tmp_path, the("plane_lam", row, 3), modes_covered=3, mode_tv=0.5)
    make(tmp_path, the("exercises", "fine"), modes_covered=3)
    on_images(tmp_path, the("images_every_h", "lr"), 1)
    figures = tmp_path / "figures"
    experiments.draw(Results(tmp_path, GROUPS), figures)
    assert {"plane_lam.png", "exercises.png", "images_every_h.png"} < set(os.listdir(figures))
    with pytest.raises(FileNotFoundError, match="--run every_h"):
        experiments.draw_gif(Results(tmp_path, GROUPS), figures)


def test_lambda_picture_shows_means_and_spreads(tmp_path):
    for seed, modes in enumerate((8, 5, 6)):
        in_the_plane(tmp_path, the("plane_lam", "exact_256_5", seed), modes, None)
        in_the_plane(tmp_path, the("plane_lam", "level_-1", seed), modes)
    rows = Results(tmp_path, GROUPS).rows("plane_lam")
    line, = experiments.lambda_picture(rows).axes[0].containers
    *_, bar = experiments.parts_picture(rows).axes[0].containers
    assert line.get_label() == "exact r, batch 256 (seeds: 3)"
    assert line[0].get_ydata() == pytest.approx([19 / 3])
    cost, even = experiments.lambda_picture(rows).axes[1].lines
    assert cost.get_ydata()[-2] == pytest.approx(4300 / 3) and even.get_ydata()[0] == 1
    low, high = line[2][0].get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(statistics.stdev((8, 5, 6)))
    assert bar[0].get_height() == pytest.approx(19 / 3)
