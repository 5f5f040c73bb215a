"""course/page.py and page.html: the page that ships holds what the runs recorded, says what their
results say, and plays in a browser. Where there is no Chromium, the browser's tests are skipped."""
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
import toy2d
from course.page import SIGMAS, page
from experiments import HERE
from plane import TARGETS, mode_statistics

BROWSERS = "chromium", "chromium-browser", "google-chrome"
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
TEXT = (HERE / "course/play.html").read_text(encoding="utf-8")
DATA = json.loads(re.search(r"const DATA = (.*);", TEXT)[1])
FRAMES = experiments.arrays("page_frames.npz")
NAMES = {-1: "be", 0: "kl", 1: "ls", None: "lr"}          # of a lambda; None is the button LR
ROWS = {row: runs[0] for row, runs in experiments.all_rows()["page"].items()}


def test_the_page_is_what_the_command_writes_and_stands_alone():
    runs = [(run, experiments.film(FRAMES, row)) for row, run in ROWS.items()]
    assert page(runs, TARGETS) == TEXT
    assert len(runs) == 27 and SIGMAS == toy2d.FRAME_SIGMAS
    assert "http" not in TEXT and "src=" not in TEXT and "@import" not in TEXT


@pytest.mark.parametrize("row, run", list(zip(ROWS, DATA["runs"])), ids=ROWS)
def test_the_page_holds_the_runs(row, run):
    frames = experiments.film(FRAMES, row)
    assert DATA["step"] == frames["step"].tolist()
    assert (run["target"] == "uneven8", run["exact"]) == ("uneven" in row, "exact" in row)
    x = np.frombuffer(base64.b64decode(run["x16"]), "<u2").reshape(24, 200, 2)
    assert np.abs(x / 65535 * 8 - 4 - frames["x"].clip(-4, 4)).max() < 1e-4
    low, high = (np.reshape(run[key], (24, 3, 1)) for key in ("low", "high"))
    fraction = np.frombuffer(base64.b64decode(run["log_r8"]), "u1").reshape(24, 3, 200) / 255
    error = low + fraction * (high - low) - frames["log_r"].astype(float).clip(-5, 5)
    assert np.abs(error).max() < 10 / 255 / 2 + 1e-4
    target = TARGETS[run["target"]]
    for counts, points in zip(run["counts"], frames["x"]):
        said = mode_statistics(torch.tensor(points).float(), target)
        weights = torch.tensor(counts) / 200
        assert int((weights > target.weights / 4).sum()) == said["modes_covered"]
        tv = float((weights - target.weights).abs().sum() / 2)
        assert tv == pytest.approx(said["mode_tv"])
    assert [run["history"][i]["step"] for i in (0, -1)] == [90, 9000]
    assert all(kept.items() <= ROWS[row]["log"][kept["step"] // 90 - 1].items()
               for kept in run["history"])
    assert run["result"].items() <= ROWS[row]["numbers"].items()


# --------------------------------------------------------------------------------- in a browser

# Virtual time, which saves the seconds of playing, has timers but no animation frames.
BEFORE = """<script>const failures = [];
addEventListener("error", event => failures.push(event.message));
requestAnimationFrame = act => setTimeout(() => act(performance.now()), 40);</script>"""
AFTER = """<pre id="checked"></pre><script>
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
const seen = {
  curves: [...LAMBDAS, null].map(lam => [lam, grid.map(v => logWeight(lam, v))]),
  batch: weights(5, grid), x: run.x, logR: run.logR,
  by_slider: changed(() => set(slider, 0)), by_lr: changed(() => lr.click()),
  by_setting: changed(() => set(setting, 1)), by_level: changed(() => set($("level"), 0)),
  by_time: changed(() => set($("time"), 7)), step: $("step").value};
set($("time"), LAST);
seen.results = SETTINGS.flatMap((_, k) => [...LAMBDAS, null].map((lam, i) => {
  set(setting, k);
  if (lam === null) lr.click(); else set(slider, i);
  return [lam, SETTINGS[k], sides[1].section.querySelector(".numbers").textContent];
}));
fire(document.body, "keydown", " ");
seen.space = [$("play").textContent, view.t];
setTimeout(() => {
  seen.end = [$("play").textContent, view.t, $("step").value];
  $("checked").textContent = JSON.stringify({...seen, failures});
}, 15000);
</script>"""


def opened(text, folder, size):
    """Return what a page's script leaves in its element `checked`, from headless Chromium, whose
    console stays silent."""
    if not BROWSER:
        pytest.skip("no Chromium")
    (folder / "checked.html").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={folder}/profile", f"--window-size={size}", "--dump-dom",
         "--virtual-time-budget=20000", (folder / "checked.html").as_uri()],
        capture_output=True, text=True, timeout=300)
    assert [line for line in done.stderr.splitlines() if ":CONSOLE" in line] == []
    return json.loads(html.unescape(re.search(r'<pre id="checked">(.+?)</pre>', done.stdout)[1]))


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    text = TEXT.replace("<head>", "<head>" + BEFORE).replace("</body>", AFTER + "</body>")
    found = opened(text, tmp_path_factory.mktemp("page"), "1280,800")
    assert found["failures"] == []
    return found


def test_the_page_fits_a_phone(tmp_path):
    """In a frame, since no window is so narrow: no wider than it, the controls always in sight."""
    wide, right, bottom = opened(f"""<iframe srcdoc="{html.escape(TEXT)}" width="390" height="844">
</iframe><pre id="checked"></pre><script>onload = () => {{
const page = frames[0].document, bar = page.getElementById("bar").getBoundingClientRect();
document.getElementById("checked").textContent = JSON.stringify([
  page.documentElement.scrollWidth - page.documentElement.clientWidth, bar.right, bar.bottom]);
}}</script>""", tmp_path, "1280,1000")
    assert wide == 0 and right <= 390 and bottom <= 844


def said(row):
    numbers = ROWS[row]["numbers"]
    return (f"{numbers['modes_covered']} of 8 modes, TV {numbers['mode_tv']:.3f}, "
            f"on a mode {numbers['on_mode']:.3f}, mean ESS {numbers['ess']:.3f} (the result)")


def test_formulas_are_table_1s(seen):
    grid = torch.linspace(-5, 5, 201, dtype=torch.float64)
    assert [lam for lam, _ in seen["curves"]] == [-1, -0.5, 0, 0.5, 1, 3, 5, 10, None]
    for lam, curve in seen["curves"]:
        row = bregman.get(NAMES.get(lam, "sba"), lam or 0)
        torch.testing.assert_close(torch.tensor(curve, dtype=torch.float64), row.log_weight(grid))
    batch = bregman.batch_weights(bregman.get("sba", 5).log_weight(grid))[0]
    torch.testing.assert_close(torch.tensor(seen["batch"], dtype=torch.float64), batch)


def test_controls_change_what_is_drawn(seen):
    """The panels: samples, weight, modes, curves."""
    assert seen["by_slider"] == seen["by_lr"] == seen["by_setting"] == [True] * 4
    assert seen["by_level"] == [True, True, False, False] and seen["by_time"] == [True] * 4
    frames = experiments.film(FRAMES, "exact_sba_5")
    assert seen["step"] == str(frames["step"][7])
    assert np.abs(np.reshape(seen["x"], (24, 200, 2)) - frames["x"].clip(-4, 4)).max() < 1e-4
    log_r = np.reshape(seen["logR"], (24, 3, 200))
    assert np.abs(log_r - frames["log_r"].astype(float).clip(-5, 5)).max() < 0.02


def test_the_last_step_says_what_the_results_say(seen):
    assert len(seen["results"]) == 27
    for lam, setting, words in seen["results"]:
        way = "uneven" if setting.startswith("uneven8") else setting.split()[1]
        assert words == said(f"{way}_{NAMES.get(lam) or f'sba_{lam:g}'}"), (lam, setting)


def test_play_begins_again_and_ends(seen):
    assert seen["space"] == ["Pause", 0]
    assert seen["end"] == ["Play", 23, "9000"]
