"""plumbing/page.py and page.html: the page holds what the runs recorded, says what their results
say, and plays in a browser. Where there is no Chromium, the browser's tests are skipped."""
import base64
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

import bregman
import experiments
from experiments import GROUPS, PAGE
from plane import TARGETS, mode_statistics
from plumbing.page import packed
from plumbing.results import Results, runs_of

BROWSERS = "chromium", "chromium-browser", "google-chrome"
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
STEPS = np.unique(np.geomspace(9, 9000, 24).round().astype(int))


def make(root, run, folder):
    """Write a run's result and frames of the size that toy2d.py writes, all of them made up."""
    rng = np.random.default_rng(len(list(root.rglob("result.json"))))
    keys = ("modes_covered", "mode_tv", "on_mode", "ess")
    history = [dict(zip(keys, (i % 9, *rng.random(3))), step=step)
               for i, step in enumerate(range(90, 9001, 90))]
    (root / folder).mkdir(parents=True)
    np.savez_compressed(root / folder / "frames.npz", step=STEPS,
                        x=rng.normal(size=(24, 200, 2)).astype(np.float16),
                        log_r=rng.normal(0, 3, (24, 3, 200)).astype(np.float16))
    numbers = dict(zip(keys, (int(rng.integers(9)), *rng.random(3))), modes=8)
    result = dict(config=run.config(), history=history, **numbers)
    (root / folder / "result.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of the page's runs, one of them in another group's folder, and the page of them."""
    root = tmp_path_factory.mktemp("page")
    for run in runs_of(GROUPS, ["page"]):
        other = {"page/learned_5_seed0": "plane_lam/learned_256_5_seed0"}
        make(root / "results", run, other.get(run.folder, run.folder))
    experiments.draw_page(Results(root / "results", GROUPS), root)
    return root


def test_the_page_stands_alone(folder):
    text = (folder / "play.html").read_text()
    assert 1e6 < len(text.encode()) < 1.5e6
    assert "http" not in text and "src=" not in text and "@import" not in text
    assert "/*DATA*/" not in text


def test_the_page_holds_the_runs(folder):
    data = json.loads(re.search(r"const DATA = (.*);", (folder / "play.html").read_text())[1])
    assert data["step"] == STEPS.tolist() and len(data["runs"]) == len(PAGE) == 27
    rows = Results(folder / "results", GROUPS).rows("page")
    for run, row in zip(data["runs"], PAGE):
        done = rows[row][0]
        frames = np.load(done.folder / "frames.npz")
        assert (run["target"] == "uneven8", run["exact"]) == ("uneven" in row, "exact" in row)
        x = np.frombuffer(base64.b64decode(run["x16"]), "<u2").reshape(24, 200, 2)
        assert np.abs(x / 65535 * 8 - 4 - frames["x"].clip(-4, 4)).max() < 1e-4
        low, high = (np.reshape(run[key], (24, 3, 1)) for key in ("low", "high"))
        share = np.frombuffer(base64.b64decode(run["log_r8"]), "u1").reshape(24, 3, 200) / 255
        error = low + share * (high - low) - frames["log_r"].astype(float).clip(-5, 5)
        assert np.abs(error).max() < 10 / 255 / 2 + 1e-4
        target = TARGETS[run["target"]]
        for counts, points in zip(run["counts"], frames["x"]):
            said = mode_statistics(torch.tensor(points).float(), target)
            shares = torch.tensor(counts) / 200
            assert int((shares > target.weights / 4).sum()) == said["modes_covered"]
            tv = float((shares - target.weights).abs().sum() / 2)
            assert tv == pytest.approx(said["mode_tv"])
        assert len(run["history"]) < 60
        assert [run["history"][i]["step"] for i in (0, -1)] == [90, 9000]
        for kept in run["history"]:
            recorded = done.result["history"][kept["step"] // 90 - 1]
            assert kept == {key: round(recorded[key], 4) for key in kept}
        assert run["result"] == {key: done.result[key] for key in run["result"]}


def test_what_is_missing_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "draw", lambda *args: None)
    shutil.copytree(folder / "results", tmp_path / "results")
    command = ["--results", str(tmp_path / "results"), "--figures", str(tmp_path), "--page"]
    assert experiments.main(command) == 0
    assert (tmp_path / "play.html").read_text() == (folder / "play.html").read_text()
    (tmp_path / "results/page/exact_lr_seed0/frames.npz").unlink()
    with pytest.raises(FileNotFoundError, match="--page: no frames of exact_lr: --run page makes"):
        experiments.main(command)
    done = Results(folder / "results", GROUPS).rows("page")["learned_0"][0]
    done.folder = tmp_path
    (tmp_path / "frames.npz").write_text("broken")
    with pytest.raises(ValueError, match="frames.npz: not frames of toy2d.py"):
        packed(done, TARGETS)


# --------------------------------------------------------------------------------- in a browser

# Virtual time, which saves the seconds of playing, has timers but no animation frames.
BEFORE = """<script>const failures = [];
addEventListener("error", event => failures.push(event.message));
requestAnimationFrame = act => setTimeout(() => act(performance.now()), 40);</script>"""
AFTER = """<pre id="checked"></pre><script>
const seen = {opened: sides.map(s => [...s.section.querySelectorAll(".name, .numbers")]
  .map(e => e.textContent))};
const pixels = () => sides[1].panels.map(canvas => canvas.toDataURL());
const [slider, lr, setting] = ["input", "button", "select"].map(t =>
  sides[1].section.querySelector(t));
const fire = (e, name, key) => e.dispatchEvent(new KeyboardEvent(name, {key, bubbles: true}));
const set = (e, value) => { e.value = value; fire(e, "input"); fire(e, "change"); };
function changed(act) {
  const old = pixels();
  act();
  return pixels().map((p, i) => p !== old[i]);
}
const grid = Array.from({length: 201}, (_, i) => i / 20 - 5);
const run = find(5, SETTINGS[1]);
Object.assign(seen, {
  bottom: $("runs").getBoundingClientRect().bottom - innerHeight,
  wide: document.documentElement.scrollWidth - innerWidth,
  curves: [...LAMBDAS, null].map(lam => [lam, grid.map(v => logWeight(lam, v))]),
  batch: weights(5, grid), x: run.x, logR: run.logR,
  by_slider: changed(() => set(slider, 0)), by_lr: changed(() => lr.click()),
  by_setting: changed(() => set(setting, 1)), by_level: changed(() => set($("level"), 0)),
  by_time: changed(() => set($("time"), 7)), step: $("step").value, at_7: sides[1].section
    .querySelector(".numbers").textContent});
set($("time"), LAST);
seen.results = SETTINGS.flatMap((_, k) => [...LAMBDAS, null].map((lam, i) => {
  set(setting, k);
  if (lam === null) lr.click(); else set(slider, i);
  return [lam, SETTINGS[k], sides[1].section.querySelector(".numbers").textContent];
}));
fire(document.body, "keydown", "ArrowLeft");
seen.arrow = $("step").value;
fire(document.body, "keydown", "ArrowRight");
fire(document.body, "keydown", " ");
seen.space = [$("play").textContent, view.t];
setTimeout(() => {
  seen.second = view.t;
  $("play").click();
  seen.paused = $("play").textContent;
}, 1000);
setTimeout(() => { seen.still = view.t; $("play").click(); }, 1500);
setTimeout(() => {
  seen.end = [$("play").textContent, view.t, $("step").value];
  $("checked").textContent = JSON.stringify({...seen, failures});
}, 15000);
</script>"""


@pytest.fixture(scope="module")
def seen(folder):
    """What a script sees that uses the page in headless Chromium."""
    text = (folder / "play.html").read_text()
    text = text.replace("<head>", "<head>" + BEFORE).replace("</body>", AFTER + "</body>")
    (folder / "checked.html").write_text(text)
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={folder}/profile", "--window-size=1280,800", "--dump-dom",
         "--virtual-time-budget=20000", (folder / "checked.html").as_uri()],
        capture_output=True, text=True, timeout=300)
    assert [line for line in done.stderr.splitlines() if ":CONSOLE" in line] == []
    found = re.search(r'<pre id="checked">(.+?)</pre>', done.stdout)
    return json.loads(html.unescape(found[1]))


browser = pytest.mark.skipif(not BROWSER, reason="no Chromium")


def said(result, at="(the result)"):
    kind = "mean ESS" if "result" in at else "ESS"
    return (f"{result['modes_covered']} of 8 modes, TV {result['mode_tv']:.3f}, "
            f"on a mode {result['on_mode']:.3f}, {kind} {result['ess']:.3f} {at}")


@browser
def test_the_page_opens(folder, seen):
    rows = Results(folder / "results", GROUPS).rows("page")
    assert seen["failures"] == []
    assert seen["opened"] == [["KL, λ = 0", said(rows["learned_0"][0].result)],
                              ["SBA, λ = 5", said(rows["learned_5"][0].result)]]
    assert seen["bottom"] <= 0 and seen["wide"] <= 0        # all panels without scrolling


@browser
def test_formulas_are_table_1s(seen):
    grid = torch.linspace(-5, 5, 201, dtype=torch.float64)
    assert [lam for lam, _ in seen["curves"]] == [-1, -0.5, 0, 0.5, 1, 3, 5, 10, None]
    names = {-1: "be", 0: "kl", 1: "ls", None: "lr"}
    for lam, curve in seen["curves"]:
        row = bregman.get(names.get(lam, "sba"), lam or 0)
        torch.testing.assert_close(torch.tensor(curve, dtype=torch.float64), row.log_weight(grid))
    batch = bregman.batch_weights(bregman.get("sba", 5).log_weight(grid))[0]
    torch.testing.assert_close(torch.tensor(seen["batch"], dtype=torch.float64), batch)


@browser
def test_controls_change_what_is_drawn(folder, seen):
    """The panels: samples, weight, modes, curves."""
    assert seen["by_slider"] == seen["by_lr"] == seen["by_setting"] == [True] * 4
    assert seen["by_level"] == [True, True, False, False] and seen["by_time"] == [True] * 4
    assert seen["step"] == str(STEPS[7])
    done = Results(folder / "results", GROUPS).rows("page")["exact_lr"][0]
    assert seen["at_7"] == said(done.result["history"][0], "(step 90)")
    frames = np.load(folder / "results/page/exact_5_seed0/frames.npz")
    assert np.abs(np.reshape(seen["x"], (24, 200, 2)) - frames["x"].clip(-4, 4)).max() < 1e-4
    log_r = np.reshape(seen["logR"], (24, 3, 200))
    assert np.abs(log_r - frames["log_r"].astype(float).clip(-5, 5)).max() < 0.02


@browser
def test_the_last_step_says_what_the_results_say(folder, seen):
    rows = Results(folder / "results", GROUPS).rows("page")
    assert len(seen["results"]) == 27
    for lam, setting, words in seen["results"]:
        way = "uneven" if setting.startswith("uneven8") else setting.split()[1]
        row = f"{way}_{'lr' if lam is None else format(lam, 'g')}"
        assert words == said(rows[row][0].result), row


@browser
def test_play_advances_pauses_and_ends(seen):
    assert seen["arrow"] == str(STEPS[-2])
    assert seen["space"] == ["Pause", 0]
    assert 0 < seen["second"] < 23 and seen["still"] == seen["second"]
    assert seen["paused"] == "Play" and seen["end"] == ["Play", 23, "9000"]
