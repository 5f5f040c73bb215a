"""figures.py: every listed run is a command that exists; tables and pictures from made-up results."""
import json
from pathlib import Path

import pytest
from PIL import Image

import cifar_distill
import figures
import toy2d


def test_every_job_is_a_command_that_exists(tmp_path):
    jobs = figures.jobs("compact", 3, tmp_path)
    assert len({folder for folder, _ in jobs}) == len(jobs) > 100
    for folder, (script, *options) in jobs:
        if script == "cifar_distill.py":
            cfg, out, resume = cifar_distill.parse(options)
            assert out == folder and not resume and cfg.seed == int(folder.name[-1])
        else:
            assert script == "toy2d.py" and options[-1] == str(folder)
    assert {c.split()[1] for c in figures.EVERY_H.values()} == {"kl", "sba", "lr"}


def test_run_skips_what_is_there_and_reports_what_fails(tmp_path, capsys):
    tiny = "--steps 4 --batch 32 --width 16 --init-steps 2".split()
    good = tmp_path / "good", ["toy2d.py", *tiny, "--out", str(tmp_path / "good"),
                               "--figures", str(tmp_path / "good")]
    assert figures.run(good)
    written = (tmp_path / "good/result.json").stat().st_mtime_ns
    assert figures.run(good) and (tmp_path / "good/result.json").stat().st_mtime_ns == written
    bad = tmp_path / "bad", ["toy2d.py", "--h", "nonsense"]
    assert not figures.run(bad) and "nonsense" in capsys.readouterr().err


@pytest.fixture
def made_up(tmp_path):
    """Two seeds of every h whose distances are known, and one run in the plane."""
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
    folder = tmp_path / "plane/sba_5_seed0"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(
        dict(modes_covered=3, mode_tv=0.5, on_mode=0.75, log_r_error=0.25, ess=0.125)))
    return tmp_path


def test_tables_and_pictures(made_up, capsys):
    assert figures.main(["--results", str(made_up), "--figures", str(made_up / "fig")]) == 0
    text = capsys.readouterr().out
    # seeds 1 + i and 2 + i, where KL, i = 0, has 1 and 2: mean ± std, and the paired difference
    assert ("| `--h sba --lam 5` | 2 | 2.50 ± 0.50 | 5.00 ± 0.00 | 3.00 ± 0.00 | 1.00 ± 0.00 | "
            "0.90 ± 0.00 | 0.50 ± 0.00 | 1.00 ± 0.00 |") in text
    assert "after 16,000 images:" in text and "| `--h kl` | 2 | 1.00 ± 0.50 |" in text
    assert ("| `--h sba --lam 5` | 1 | 3.0 ± 0.0 | 0.500 ± 0.000 | 0.750 ± 0.000 | 0.25 ± 0.00 | "
            "0.12 ± 0.00 |") in text
    for name in ("compact_curves", "compact_every_h", "compact_power", "exercises"):
        assert min(Image.open(made_up / f"fig/{name}.png").size) > 400


def test_without_results_it_says_what_makes_them(tmp_path, capsys, monkeypatch):
    with pytest.raises(FileNotFoundError, match="--run"):
        figures.main(["--results", str(tmp_path), "--figures", str(tmp_path)])
