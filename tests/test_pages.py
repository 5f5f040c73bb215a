"""README, results, exercises, solutions: links, quotation, commands, options, edits, numbers.

Nothing is run here, only parsed: .ci/commands.py runs every command.
"""
import argparse
import ast
import importlib
import inspect
import json
import re
import shlex
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import edm
import experiments
import sd_distill
from data import load_images
from plumbing.options import Parser, flag
from plumbing.results import Results, tables as tables_of

HERE = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "results.md", "exercises.md", "solutions.md", "pretrained/README.md",
         "CHANGELOG.md")
TEXT = {name: (HERE / name).read_text() for name in PAGES}
SCRIPTS = ("bregman", "plane", "toy2d", "cifar_distill", "edm", "fid", "experiments", "bench")


# ----------------------------------------------------------- what a page says, read from its text

def blocks(page, language=""):
    """A page's fenced blocks in one language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT[page], re.S | re.M)
    return [text for name, text in found if name == language]


def commands(page):
    """A page's commands in their order, once each: "toy2d.py --h kl", without comments."""
    lines = [line.partition("  #")[0] for text in blocks(page) for line in text.splitlines()]
    ends = [line.rpartition("&&")[2].strip() for line in lines]
    starts = re.compile(r"(?:python|torchrun --\S+) (\w+\.py.*)")
    return list(dict.fromkeys(m[1] for m in map(starts.fullmatch, ends) if m))


def edits():
    """-> (exercise, file, [(old, new), ...]) of every diff in solutions.md; @@ parts its hunks."""
    found = []
    for section in re.split(r"^## ", TEXT["solutions.md"], flags=re.M):
        for block in re.findall(r"^```diff\n--- (\S+)\n(.*?)^```$", section, re.S | re.M):
            hunks = [hunk.splitlines() for hunk in re.split(r"^@@\n", block[1], flags=re.M)]
            pairs = [["\n".join(line[1:] for line in hunk if line[:1] in (" ", sign))
                      for sign in "-+"] for hunk in hunks]
            found.append((section.partition(".")[0], block[0], pairs))
    return found


def apply(pairs, text):
    """Make an edit's changes. Each old text must be there exactly once."""
    for old, new in pairs:
        assert old and old != new and text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def rows(table):
    """Lines of a Markdown table -> its head and its rows, cells stripped."""
    cells = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
    return cells[0], cells[2:]


def tables(page):
    """-> (source, text) of the tables below a comment: <!-- results/... -->, a file that a
    command wrote; <!-- experiments.py GROUP -->, what that prints."""
    marked = r"^<!-- ((?:results/|experiments.py )[^>]*) -->\n\n?((?:^\|.*\n)+)"
    return re.findall(marked, TEXT[page], re.M)


# ------------------------------------------------------------------------- the options of scripts

class Parsed(Exception):
    """Ends a script's main after its command line."""


def parse(script, argv):
    """Read a command line as the script does. -> its parser; ends there."""
    read = Parser.parse_args

    def stop(parser, words=None, namespace=None):
        read(parser, words, namespace)
        raise Parsed(parser)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed) as found:
        patch.setattr(Parser, "parse_args", stop)
        importlib.import_module(script).main(argv)
    return found.value.args[0]


def flags(script):
    """Every --option that a script takes, in any of its commands."""
    smallest = dict(toy2d=[[]], cifar_distill=[[], ["sample", "x"]], fid=[["x"], ["train"]],
                    edm=[["sample", "x"]])
    found, todo = set(), [parse(script, argv) for argv in smallest.get(script, [[]])]
    for parser in todo:
        for action in parser._actions:
            found |= set(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                todo.extend(action.choices.values())
    return found


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_accepted(page):
    for command in commands(page):
        script, _, rest = command.partition(".py")
        if script in SCRIPTS:                               # sd_distill's is held by its own tests
            parse(script, shlex.split(rest))


def test_there_are_commands():
    assert len(commands("README.md")) > 4 and len(commands("exercises.md")) > 10


def test_options_exist():
    """Every --option that a page names in code belongs to a script; the CHANGELOG's old ones to
    none, since its tables say what became of them."""
    known = {script: flags(script) for script in SCRIPTS}
    known["sd_distill"] = {flag(f.name) for f in fields(sd_distill.Config)}
    for page in PAGES[:-1]:
        prose = re.sub(r"```.*?```|torchrun --\S+", "", TEXT[page], flags=re.S)
        for code in re.findall(r"`((?!pip )[^`]*)`", prose):
            for option in re.findall(r"(?<!\S)--[a-z][\w-]*", code):
                assert any(option in each for each in known.values()), f"{page}: {option}"
    gone = re.findall(r"^\| `(\w+)\.py` \| (.*?) \|", TEXT["CHANGELOG.md"], re.M)
    assert len(gone) > 5
    for script, cell in gone:
        for option in re.findall(r"`(--[\w-]+)`", cell):
            assert option not in known.get(script, ()), f"{script}.py still has {option}"


# ------------------------------------------------------------------------------- links and names

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
    code = "".join(p.read_text() for p in [*HERE.glob("test_*.py"), *HERE.glob("tests/test_*.py")])
    for name in re.findall(r"`(test_\w+)`", TEXT[page]):
        assert f"def {name}(" in code, name
    if page != "CHANGELOG.md":
        folders = "figures|results|pretrained|fixtures|plumbing|tests"
        for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", TEXT[page]):
            assert (HERE / name).exists() or name.endswith("checkpoint.pt"), name
        for name in re.findall(r"`(\w+\.py)`", TEXT[page]):
            assert (HERE / name).exists() or (HERE / "tests" / name).exists(), name


def test_readme_is_short():
    assert len(TEXT["README.md"].splitlines()) <= 200
    assert len(TEXT["README.md"].encode()) <= 16 * 1024


def test_readme_quotes_the_code():
    """The twelve lines stand in Distiller.step of toy2d.py, one after the other."""
    quoted, _ = blocks("README.md", "python")
    assert len(quoted.splitlines()) == 12
    step = inspect.getsource(importlib.import_module("toy2d").Distiller.step)
    assert textwrap.indent(quoted, 8 * " ") in step


def test_readme_draws_what_the_command_draws(tmp_path, monkeypatch):
    monkeypatch.chdir(HERE)
    names, (_, lines) = {}, blocks("README.md", "python")
    exec(lines, names)
    edm.main(["sample", "pretrained/compact_student.pt", "--out", str(tmp_path / "x.npz")])
    drawn, _ = load_images(tmp_path / "x.npz")
    assert len(lines.splitlines()) == 3 and torch.equal(names["images"], drawn)


@pytest.mark.parametrize("exercise, file, pairs", [pytest.param(*e, id=f"{e[0]} {e[1]}")
                                                   for e in edits()])
def test_solutions_edits_apply(exercise, file, pairs):
    ast.parse(apply(pairs, (HERE / file).read_text()))


def test_there_are_edits():
    assert {exercise for exercise, _, _ in edits()} == {"1", "2", "3"}


# ---------------------------------------------------------------------------------------- numbers

@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_output(page):
    """A row of a table made of a .txt or .md in results/ is a line of it, or has numbers that a
    command printed there: the one named in the row's first cell."""
    for source, text in tables(page):
        if not source.endswith((".txt", ".md")):
            continue
        lines = (HERE / source).read_text().splitlines()
        for row in rows(text)[1]:
            named = re.search(r"`([^`]+)`", row[0])
            if not named:
                assert "| " + " | ".join(row) + " |" in lines, row
                continue
            at, = [i for i, line in enumerate(lines) if line.startswith("$")
                   and re.search(re.escape(named[1]) + r"(\s|/|$)", line)]
            for number in re.findall(r"\d+\.\d+|\d{3,}", " ".join(row[1:])):
                assert re.search(rf"\b{re.escape(number)}\b", lines[at + 1]), (source, row, number)


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_records(page):
    """A row of a table made of a .jsonl in results/ has the numbers of one of its lines."""
    for source, text in tables(page):
        if source.endswith(".jsonl"):
            records = [json.loads(line) for line in (HERE / source).read_text().splitlines()]
            for row in rows(text)[1]:
                given = [cell for cell in row if re.fullmatch(r"[\d.]+", cell)]
                digits = [len(cell.partition(".")[2]) for cell in given]
                assert len(given) > 2 and any(
                    all(any(abs(value - float(cell)) <= 0.5001 * 10 ** -n for value in
                            record.values() if isinstance(value, float | int))
                        for cell, n in zip(given, digits)) for record in records), row


def test_tables_are_those_of_experiments():
    printed = dict(tables_of(Results(HERE / "results", experiments.GROUPS)))
    for page in PAGES:
        for source, text in tables(page):
            if source.startswith("experiments.py"):
                whole = printed[source.split()[1]]
                some = page == "README.md" and set(text.splitlines()) <= set(whole.splitlines())
                assert text == whole or some, f"{page}: {source}"


def test_every_table_of_numbers_has_its_source():
    """A comment above it, of a kind that the tests above know."""
    for page in PAGES:
        heads = re.findall(r"^\|.* seeds \|.*\n\|[-| ]+$", TEXT[page], re.M)
        assert len(heads) == sum(" seeds |" in text for _, text in tables(page)), page
        for source, _ in tables(page):
            group = source.partition(" ")[2]
            assert (HERE / source).exists() or group in experiments.GROUPS, source
    assert sum(len(tables(page)) for page in PAGES) > 10


def test_the_bare_commands_number():
    """What README's first command should give is what it gave."""
    result = json.loads((HERE / "results/bare/result.json").read_text())
    for row in (result["before"], result["after"]):
        assert f"{row['to_teacher']:.2f}" in TEXT["README.md"]
