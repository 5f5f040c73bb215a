"""README, results, exercises, solutions: links, quotation, commands, edits, numbers.

Nothing is run here but README's three lines, only parsed: .ci/commands.py runs every command.
"""
import ast
import importlib
import inspect
import json
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import torch

import experiments
from data import load_images
from plumbing import cli
from plumbing.results import table

HERE = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "results.md", "course/README.md", "course/exercises.md",
         "course/solutions.md", "pretrained/README.md")
TEXT = {name: (HERE / name).read_text() for name in PAGES}
SCRIPTS = ("toy2d", "cifar_distill", "edm", "train_teacher", "fid", "experiments", "bench")


# ----------------------------------------------------------- what a page says, read from its text

def blocks(page, language=""):
    """Return a page's fenced blocks in one language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT[page], re.S | re.M)
    return [text for name, text in found if name == language]


def commands(page):
    """Return a page's commands in their order, once each: "toy2d.py --h kl", without comments."""
    lines = [line.partition("  #")[0] for text in blocks(page) for line in text.splitlines()]
    ends = [line.rpartition("&&")[2].strip() for line in lines]
    starts = re.compile(r"(?:python|torchrun --\S+) ([\w/]+\.py.*)")
    return list(dict.fromkeys(m[1] for m in map(starts.fullmatch, ends) if m))


def edits():
    """Return (exercise, file, [(old, new), ...]) of each diff in the solutions; @@ parts hunks. A
    later diff of an exercise goes on from the earlier ones."""
    found = []
    for section in re.split(r"^## ", TEXT["course/solutions.md"], flags=re.M):
        for block in re.findall(r"^```diff\n--- (\S+)\n(.*?)^```$", section, re.S | re.M):
            hunks = [hunk.splitlines() for hunk in re.split(r"^@@\n", block[1], flags=re.M)]
            pairs = [["\n".join(line[1:] for line in hunk if line[:1] in (" ", sign))
                      for sign in "-+"] for hunk in hunks]
            exercise = section.partition(".")[0]
            if found and found[-1][:2] == (exercise, block[0]):
                pairs = found[-1][2] + pairs
            found.append((exercise, block[0], pairs))
    return found


def apply(pairs, text):
    """Make an edit's changes. Each old text must be there exactly once."""
    for old, new in pairs:
        assert old and old != new and text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def tables(page):
    """Return (source, text) of the tables below a comment: <!-- results/... -->, a file that a
    command wrote; <!-- experiments.py GROUP -->, what that prints."""
    marked = r"^<!-- ((?:results/|experiments.py )[^>]*) -->\n\n?((?:^\|.*\n)+)"
    return re.findall(marked, TEXT[page], re.M)


def rows(text):
    """Return the rows of a table in Markdown, but its head, their cells stripped."""
    return [[cell.strip() for cell in line.strip("|\n").split("|")]
            for line in text.splitlines()[2:]]


# ------------------------------------------------------------------ commands, links and names

class Parsed(Exception):
    """Ends a script's main after its command line."""


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_accepted(page, monkeypatch):
    read = cli.Parser.parse_args

    def stop(parser, words=None, namespace=None):
        read(parser, words, namespace)
        raise Parsed
    monkeypatch.setattr(cli.Parser, "parse_args", stop)
    assert page not in ("README.md", "course/exercises.md") or len(commands(page)) > 3
    for command in commands(page):
        script, _, rest = command.partition(".py")
        if script in SCRIPTS:                                   # the examples' have their own tests
            with pytest.raises(Parsed):
                importlib.import_module(script).main(shlex.split(rest))


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    def anchors(text):
        heads = re.findall(r"^#+ (.*)$", text, re.M)
        return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}
    text = re.sub(r"```.*?```", "", TEXT[page], flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = (HERE / page).parent / file if file else HERE / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), target


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page):
    """Of tests and of files, in code."""
    files = [path for path in HERE.rglob("*.py") if ".venv" not in path.parts]
    code = "".join(path.read_text() for path in files if path.name.startswith("test_"))
    for name in re.findall(r"`(test_\w+)`", TEXT[page]):
        assert f"def {name}(" in code, name
    folders = "figures|results|pretrained|fixtures|plumbing|tests|course|examples"
    for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", TEXT[page]):
        assert (HERE / name).exists(), name
    for name in re.findall(r"`(\w+\.py)`", TEXT[page]):
        assert name in {path.name for path in files}, name


def test_readme_quotes_the_code():
    """The quoted lines stand in Distiller.step of toy2d.py, one after the other."""
    quoted = blocks("README.md", "python")[0]
    step = inspect.getsource(importlib.import_module("toy2d").Distiller.step)
    assert len(quoted.splitlines()) > 8 and textwrap.indent(quoted, 8 * " ") in step


def test_readme_draws_what_the_command_draws(tmp_path, monkeypatch):
    monkeypatch.chdir(HERE)
    names, lines = {}, blocks("README.md", "python")[1]
    exec(lines, names)
    importlib.import_module("edm").main(["sample", "pretrained/compact_student.pt",
                                         "--out", str(tmp_path / "x.npz")])
    assert torch.equal(names["images"], load_images(tmp_path / "x.npz")[0])


def test_solutions_edits_apply():
    assert {exercise for exercise, _, _ in edits()} == {"1", "2", "3", "11"}
    for _, file, pairs in edits():
        ast.parse(apply(pairs, (HERE / file).read_text()))


# ---------------------------------------------------------------------------------------- numbers

TABLES = [(page, *found) for page in PAGES for found in tables(page)]
PRINTED = {group: table(experiments.GROUPS[group], some)
           for group, some in experiments.all_rows().items() if some}


@pytest.mark.parametrize("page, source, text", TABLES, ids=[f"{t[0]}: {t[1]}" for t in TABLES])
def test_tables_are_those_of_their_source(page, source, text):
    """README's may leave rows out."""
    if source.startswith("experiments.py "):
        whole = PRINTED[source.split()[1]]
        assert text == whole or page == "README.md"
        assert text.splitlines()[:2] == whole.splitlines()[:2]
        assert set(text.splitlines()) <= set(whole.splitlines())
        return
    lines = (HERE / source).read_text().splitlines()
    for row in rows(text):
        if source.endswith(".jsonl"):
            assert any(holds(json.loads(line), row) for line in lines), row
        elif "`" in row[0]:                                     # what a command printed
            number = r"\d+\.\d+|\d{3,}"
            given = set(re.findall(number, " ".join(row[1:])))
            assert any(given <= set(re.findall(number, line)) for line in lines), row
        else:
            assert "| " + " | ".join(row) + " |" in lines, row


def holds(record, row):
    """Return whether all numbers of a row, of which there are three or more, are a record's."""
    given = [cell for cell in row if re.fullmatch(r"[\d.]+", cell)]
    values = [value for value in record.values() if isinstance(value, float | int)]
    near = [any(abs(value - float(cell)) <= 0.5001 * 10 ** -len(cell.partition(".")[2])
                for value in values) for cell in given]
    return len(given) > 2 and all(near)


def test_every_table_of_runs_has_its_source():
    for page, text in TEXT.items():
        heads = re.findall(r"^\|.* seeds \|.*\n\|[-| ]+$", text, re.M)
        assert len(heads) == sum(" seeds |" in table for _, table in tables(page)), page


def test_the_bare_commands_number():
    """What README's first command should give is what it gave."""
    run, = [run for run in experiments.all_rows()["bare"]["kl"] if run["seed"] == 0]
    for row in (run["log"][0], run["log"][-1]):
        assert f"{row['to_teacher']:.2f}" in TEXT["README.md"]
