"""figures.py: every listed run is a command that exists; tables, pictures from made-up results."""
import json

import numpy as np
import pytest
from PIL import Image

import cifar_distill
import figures
import toy2d


@pytest.mark.parametrize("preset", ["compact", "paper"])
def test_every_job_is_a_command_that_exists(preset, tmp_path):
    jobs = figures.jobs(preset, 3, tmp_path)
    assert len({folder for folder, *_ in jobs}) == len(jobs) > 20
    configs = []
    for folder, (script, *options), kimg in jobs:
        if script == "cifar_distill.py":
            cfg, out, resume = cifar_distill.parse(options)
            assert out == folder and not resume and kimg in (0, cfg.kimg)
        else:
            args, chosen = toy2d.parse(options)
            cfg = toy2d.Config(**chosen)
            assert script == "toy2d.py" and args.out == args.figures == folder
        assert cfg.seed == int(folder.name[-1])
        configs.append(cfg)
    # one setting has two names in the plane: --head linear is the default
    assert sum(configs.count(c) > 1 for c in configs) <= 2 * 3


def test_run_skips_what_is_done_and_reports_what_fails(tmp_path, capsys):
    tiny = "--kimg 0.016 --batch 8 --wait-kimg 0.008 --eval-every 1 --eval-n 16 --preview 1".split()
    folder = tmp_path / "good"
    command = ["cifar_distill.py", *tiny, "--save-every", "0.008", "--out", str(folder)]
    assert figures.run((folder, command, 0.016))
    result = folder / "result.json"
    written = result.stat().st_mtime_ns
    assert figures.run((folder, command, 0.016)) and result.stat().st_mtime_ns == written
    command[2] = "0.024"                                        # a longer run goes on from there
    assert figures.run((folder, command, 0.024)) and json.loads(result.read_text())["images"] == 24
    assert "24/24" in (folder / "log.txt").read_text()
    bad = tmp_path / "bad", ["toy2d.py", "--h", "nonsense"], 0
    assert not figures.run(bad) and "nonsense" in capsys.readouterr().err


@pytest.fixture
def made_up(tmp_path):
    """Two seeds of every h whose distances are known, and a few runs in the plane."""
    for i, (name, options) in enumerate(figures.EVERY_H.items()):
        for seed in (0, 1):
            folder = tmp_path / "compact" / f"{name}_seed{seed}"
            folder.mkdir(parents=True)
            lam = float(options.split()[3]) if "lam" in options else 5.0
            rows = ["kimg,to_data,to_teacher,score,ess,tau,log_r_std", "0,20,10,1.3,,,"]
            rows += [f"{k},{4 + i},{1 + i + seed},3,0.9,0.5,1" for k in (3, 6)]
            if name in figures.LONG:
                rows.append(f"16,4,{0.5 + seed},3,0.9,0.5,1")
            (folder / "log.csv").write_text("\n".join(rows))
            (folder / "result.json").write_text(json.dumps(
                dict(distance="FD-compact", config=dict(lam=lam), after=dict(to_teacher=1))))
    for name in ("sba_5", *figures.EXERCISES):
        folder = tmp_path / "plane" / f"{name}_seed0"
        folder.mkdir(parents=True)
        np.save(folder / "samples.npy", np.zeros((5, 2), np.float16))
        (folder / "result.json").write_text(json.dumps(
            dict(modes_covered=3, mode_tv=0.5, on_mode=0.75, log_r_error=0.25, ess=0.125,
                 config=dict(target="ring8"))))
    return tmp_path


def test_tables_and_pictures(made_up, capsys):
    assert figures.main(["--results", str(made_up), "--figures", str(made_up / "fig")]) == 0
    text = capsys.readouterr().out
    # seeds 1 + i and 2 + i, where KL, i = 0, has 1 and 2: mean ± std, and the paired difference
    assert ("| `--h sba --lam 5` | 2 | 2.50 ± 0.50 | 5.00 ± 0.00 | 3.00 ± 0.00 | 1.00 ± 0.00 | "
            "0.90 ± 0.00 | 0.50 ± 0.00 | 1.00 ± 0.00 |") in text
    assert "after 16,000 images:" in text and "| `--h kl` | 2 | 1.00 ± 0.50 |" in text
    assert "| `--h sba --lam 5` | 1 | 3.0 | 0.500 | 0.750 | 0.25 | 0.12 |" in text
    for name in ("compact_curves", "compact_every_h", "compact_power", "exercises"):
        assert min(Image.open(made_up / f"fig/{name}.png").size) > 400


def test_without_the_teachers_samples_the_data_is_the_measure(made_up, capsys):
    """As in the paper preset."""
    (made_up / "compact").rename(made_up / "paper")
    for path in made_up.glob("paper/*/log.csv"):
        lines = [line.split(",") for line in path.read_text().splitlines()]
        path.write_text("\n".join(",".join(v[:2] + v[3:]) for v in lines))
        path = path.with_name("result.json")
        path.write_text(path.read_text().replace("to_teacher", "to_data"))
    assert figures.main(["--preset", "paper", "--results", str(made_up),
                         "--figures", str(made_up / "fig")]) == 0
    assert "to data, less KL's" in capsys.readouterr().out
    assert (made_up / "fig/paper_curves.png").exists()


def test_without_results_it_says_what_makes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="--run"):
        figures.main(["--results", str(tmp_path), "--figures", str(tmp_path)])
