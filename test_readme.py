"""README, exercises, solutions: links, line numbers, names and tables hold, commands run.

    python test_readme.py               # puts the README's line numbers right
"""
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import data
import figures

HERE = Path(__file__).parent
PAGES = ("README.md", "exercises.md", "solutions.md")
TEXT = {name: (HERE / name).read_text() for name in PAGES}
SOURCES = [p for p in HERE.glob("*.py") if not p.name.startswith("test_")]


def prose(text):
    return re.sub(r"```.*?```", "", text, flags=re.S)


# ------------------------------------------------------------------------------------- references

# a row of the README's maps: "| Eq. (4) | [toy2d.py:12](toy2d.py#L12), ... |"
ROW = re.compile(r"^\| ((?:EDM |f-distill )?(?:Eq\.|Table|line) [^|]*?) \|(.*)$", re.M)
REF = re.compile(r"\[([a-z0-9_]+\.py):(\d+)\]\(([a-z0-9_]+\.py)#L(\d+)\)")


def says(line, tag):
    """Whether a line of code has the tag: `Eq. (4)`, or `line 4` as in "lines 3 to 5"."""
    if not tag.startswith("line"):
        return tag in line
    number = int(tag.split()[1])
    for found in re.findall(r"[Ll]ines? (\d+(?:(?:, | to )\d+)*)", line):
        ends = [int(n) for n in re.findall(r"\d+", found)]
        if number in ends or (" to " in found and ends[0] <= number <= ends[-1]):
            return True
    return False


def references(text):
    for row in ROW.finditer(text):
        for ref in REF.finditer(row[2]):
            yield row[1], ref


def test_map_has_rows():
    tags = [tag for tag, _ in references(TEXT["README.md"])]
    assert len(set(tags)) > 15 and "Eq. (4)" in tags and "line 10" in tags


@pytest.mark.parametrize("tag, ref", [
    pytest.param(tag, ref, id=f"{tag} {ref[1]}") for tag, ref in references(TEXT["README.md"])])
def test_line_numbers(tag, ref):
    assert ref[1] == ref[3] and ref[2] == ref[4], "the text and its link differ"
    line = (HERE / ref[1]).read_text().splitlines()[int(ref[2]) - 1]
    assert says(line, tag), f"{ref[0]} is {line.strip()!r}; python test_readme.py mends it"


def test_every_equation_in_the_code_is_on_the_map():
    mapped = {tag for tag, _ in references(TEXT["README.md"])}
    known = {n for tag in mapped for n in re.findall(r"Eq\. \((\d+)\)|, \((\d+)\)", tag)
             for n in n if n}
    for path in SOURCES:
        for n in re.findall(r"# (?:.*)Eq\. \((\d+)\)", path.read_text()):
            assert n in known, f"{path.name} has Eq. ({n}), which the README's map has not"


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    text = prose(TEXT[page])
    anchors = {name: {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-")
                      for h in re.findall(r"^#+ (.*)$", TEXT[name], re.M)} for name in PAGES}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        assert (HERE / (file or page)).exists(), target
        if anchor and (file or page) in PAGES:
            assert anchor in anchors[file or page], target


@pytest.mark.parametrize("page", PAGES)
def test_names_of_tests_and_files_exist(page):
    code = "".join(p.read_text() for p in HERE.glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", TEXT[page]):
        assert f"def {name}(" in code, name
    for name in re.findall(r"`((?:figures|results|pretrained|fixtures)/[\w./-]+)`", TEXT[page]):
        assert (HERE / name).exists(), name


def test_results_are_complete():
    """A run of every setting, so that figures.py --run trains nothing with --seeds 1."""
    missing = [str(folder) for folder, _, kimg in figures.jobs("compact", 1, HERE / "results")
               if not figures.finished(folder, kimg)]
    assert not missing


def test_tables_are_those_of_the_results():
    """What figures.py prints from results/ is in the README, or in the solutions, as a whole."""
    runs = {name: figures.read(HERE / "results/compact", name) for name in figures.IMAGES}
    tables = list(figures.tables(runs, HERE / "results", "to_teacher"))
    assert len(tables) > 5
    for title, table in tables:
        assert table in TEXT["README.md"] + TEXT["solutions.md"], f"{title}:\n{table}"


# --------------------------------------------------------------------------------------- commands

TINY = {        # what makes a command short, by the words it starts with; the first match counts
    "cifar_distill.py sample": "",
    "cifar_distill.py": "--kimg 0.032 --batch 8 --wait-kimg 0.016 --eval-every 0.016 --eval-n 16 "
                        "--preview 1 --save-every 0.016",
    "toy2d.py --all": "--steps 4 --batch 32 --width 16 --init-steps 2 --seeds 1",
    "toy2d.py": "--steps 4 --batch 32 --width 16 --init-steps 2",
    "edm.py train": "--batch 16 --data pretrained/compact_teacher_samples.zip",
    "edm.py sample": "-n 4 --steps 4",
    "figures.py": "--seeds 1",              # whose results are there: see below
    "bench.py": "--batch 2 --rounds 1 --frechet 64",
    "fid.py": "", "bregman.py": "", "test_readme.py": "",
}
NETWORK = ("--preset paper", "--features inception")        # downloads: here they end in one line


def commands(page):
    """A page's commands in their order, once each, without comments."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT[page], re.S | re.M)
    blocks = [text for language, text in blocks if not language]
    lines = [line.partition("  #")[0].strip() for b in blocks for line in b.splitlines()]
    return list(dict.fromkeys(line for line in lines if line.startswith("python ")))


def shorter(command):
    for start, options in TINY.items():
        if command.startswith("python " + start):
            thousands = lambda m: "--kimg " + ("0.032" if float(m[1]) < 1000 else "0.064")
            return re.sub(r"--kimg (\S+)", thousands, command) + " " + options
    raise AssertionError(f"test_readme.py has no short form of {command}")


def test_commands_run(tmp_path, monkeypatch):
    """All of them in a copy of the project, without a network: those of a page one after the
    other, as a reader would, the pages side by side."""
    for path in HERE.iterdir():
        if path.suffix in (".py", ".md") or path.name in ("pretrained", "results", "fixtures"):
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, tmp_path / path.name)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("DI_BREGMAN_CACHE", str(tmp_path / "cache"))
    images, _ = data.load_images(HERE / "pretrained/compact_teacher_samples.zip")
    data.save_images(images[:300], tmp_path / "samples.npz")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    test_results_are_complete()                     # or the next lines would train for hours

    def run_page(page):
        for command in commands(page):
            words = [sys.executable, *shlex.split(shorter(command))[1:]]
            done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
            if any(flag in command for flag in NETWORK):
                assert done.returncode == 2, command
                assert len(done.stderr.splitlines()) == 1, (command, done.stderr)
            else:
                assert done.returncode == 0, (command, done.stderr[-2000:])
        return len(commands(page))

    with ThreadPoolExecutor() as pool:
        assert sum(pool.map(run_page, PAGES)) > 20


def solutions():
    """-> (file, its old lines, its new lines) of every edit in solutions.md."""
    for block in re.findall(r"^```diff\n(.*?)^```$", TEXT["solutions.md"], re.S | re.M):
        file, *lines = block.splitlines()
        yield (file.removeprefix("--- "), *("\n".join(x[1:] for x in lines if x[:1] in (" ", sign))
                                           for sign in "-+"))


def test_solutions_run(tmp_path):
    """Each edit, made in a copy: the code around it is there once, and what it gives runs."""
    assert len(list(solutions())) == 3
    for i, (file, old, new) in enumerate(solutions()):
        folder = tmp_path / str(i)
        folder.mkdir()
        for name in ("bregman.py", "toy2d.py"):
            shutil.copy(HERE / name, folder)
        text = (folder / file).read_text()
        assert old and text.count(old) == 1 and old != new
        (folder / file).write_text(text.replace(old, new))
        h = "lecam" if file == "bregman.py" else "be"
        done = subprocess.run([sys.executable, "toy2d.py", "--h", h, *TINY["toy2d.py"].split()],
                              cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def mend():
    text = TEXT["README.md"]

    def nearest(ref, tag):
        lines = (HERE / ref[1]).read_text().splitlines()
        at = [n for n, line in enumerate(lines, 1) if says(line, tag)]
        n = min(at, key=lambda n: abs(n - int(ref[2])), default=int(ref[2]))
        return f"[{ref[1]}:{n}]({ref[1]}#L{n})"

    def row(m):
        return f"| {m[1]} |" + REF.sub(lambda ref: nearest(ref, m[1]), m[2])
    (HERE / "README.md").write_text(ROW.sub(row, text))


if __name__ == "__main__":
    mend()
