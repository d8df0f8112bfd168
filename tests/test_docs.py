"""What the documentation says exists: files, functions, flags, links, rewards, and the numbers that a run logs."""

import argparse
import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import OUR_REWARDS

import config
import grpo
import rewards

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tiny" / "README.md",
         *sorted((ROOT / "docs").glob("*.md"))]
READ_YOUR_RUN = ROOT / "docs" / "read-your-run.md"
ROOMS = ("", "plumbing", "studies")  # where modules lie
# Files that only a run, a download or a model folder makes.
MADE = {"config.json", "metrics.jsonl", "eval.jsonl", "samples.jsonl", "groups.jsonl", "failed.jsonl", "curves.png",
        "checkpoint/", "model/", "adapter/", "runs/NAME/", "runs/squish.sqlite", "runs/judge.sqlite", "runs/eval/",
        "compare.md", "studies/results/"}
# Programs of others: their flags are theirs.
FOREIGN = ("pip", "vllm", "uv", "apt", "git", "ruff", "bash", "brew", "cd", "export")
PROGRAMS = {"train.py": "train", "eval.py": "eval", "studies.rollouts_check": "studies.rollouts_check",
            "studies.fleet": "studies.fleet",
            "studies.rewards_grid": "studies.rewards_grid", "studies.distill": "studies.distill",
            "studies.squish_benchmark": "studies.squish_benchmark", "studies.judge_check": "studies.judge_check",
            "studies.be_the_policy": "studies.be_the_policy", "studies.break_it": "studies.break_it",
            "studies.lengths": "studies.lengths",
            "studies.rebuild": "studies.rebuild", "studies.figures": "studies.figures",
            "studies.hundred_lines": "", "tiny/make.py": "", "studies.speed": "", "studies.mac": "", "studies.plan": "",
            "studies.speed_mlx": "", "tests/test_tour.py": "",
            "pytest": "", "-c": ""}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# --- reading a page ---------------------------------------------------------------------------------------------------


def blocks(page: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a page: (language, text)."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```\n", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def spans(page: Path) -> list[str]:
    """What stands between backticks, on one line or broken over two."""
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose(page))]


def commands(page: Path) -> list[list[str]]:
    """Every command of the page, cut into words: those of bash blocks, and spans that begin with a program."""
    texts = [text for language, text in blocks(page) if language == "bash"]
    texts += [text for text in spans(page) if text.split()[0] in ("python", *FOREIGN)]
    found = []
    for text in texts:
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"\$\w\b", "0", line), comments=True)
            command: list[str] = []
            for word in [*words, ";"]:
                if word in ("&&", ";", "do") or word.endswith(";"):
                    command += [word[:-1]] if len(word) > 1 and word.endswith(";") else []
                    if command and command[0] in ("python", *FOREIGN):
                        found.append(command)
                    command = []
                else:
                    command.append(word)
    return found


class Captured(Exception):
    pass


def parser_of(module: str) -> argparse.ArgumentParser:
    """The real parser of a program: its main() is run up to where it would read its arguments."""
    held = []

    def catch(self, *args, **kwargs):
        held.append(self)
        raise Captured

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        with contextlib.suppress(Captured):
            importlib.import_module(module).main(["--help"])
    assert held, f"{module}.main() reads no arguments"
    return held[0]


@pytest.fixture(scope="module")
def parsers() -> dict[str, argparse.ArgumentParser]:
    return {program: parser_of(module) for program, module in PROGRAMS.items() if module}


def settings_of(parser: argparse.ArgumentParser, arguments: list[str]) -> config.Config:
    """What train.py makes of its arguments, refusals included."""
    given = vars(parser.parse_args(arguments))
    given.pop("resume")
    if "stages" in given:
        given["stages"] = tuple(given["stages"])
    settings = config.Config(**given)
    config.check(settings)
    config.parse_stages(settings.stages)
    return settings


@pytest.fixture(scope="module")
def modules() -> dict[str, dict]:
    """{module: {name: names inside it}}, of everything that stands at the top of the project's files or in a class."""
    found = {}
    for room in ROOMS:
        for path in (ROOT / room).glob("*.py"):
            names: dict[str, set[str]] = {}
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef):
                    names[node.name] = set()
                elif isinstance(node, ast.ClassDef):
                    names[node.name] = {n.name for n in node.body if isinstance(n, ast.FunctionDef)} | {
                        n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
                elif isinstance(node, ast.Import | ast.ImportFrom):
                    names |= {(a.asname or a.name): set() for a in node.names}
                elif isinstance(node, ast.Assign | ast.AnnAssign):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    names |= {n.id: set() for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            found[".".join(filter(None, (room, path.stem)))] = found[path.stem] = names
    return found


# --- what a page names ------------------------------------------------------------------------------------------------


def test_readme_is_for_a_newcomer():
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


@each_page
def test_every_file_that_is_named_exists(page):
    file = re.compile(r"[\w./-]+(\.(py|md|png|jsonl?|txt|safetensors|sqlite)|/)")
    named = {text for text in spans(page) if file.fullmatch(text)} - MADE
    assert not [name for name in named if not (ROOT / name).exists() and not (page.parent / name).exists()]


@each_page
def test_every_function_that_is_named_exists(page, modules):
    missing = []
    functions = {name for names in modules.values() for name in names}
    for text in spans(page):
        if called := re.fullmatch(r"(\w+)\(\)", text):
            missing += [text] if called[1] not in functions and called[1] != "eval" else []  # Python's own
        elif dotted := re.fullmatch(r"(?:(plumbing|studies)\.)?([a-z_]\w*)\.([A-Za-z_]\w*)(?:\.(\w+))?(\(\))?", text):
            room, module, name, inside = dotted.group(1, 2, 3, 4)
            module = f"{room}.{module}" if room else module
            if name in ("py", "md", "json", "jsonl", "png", "txt", "html", "csv", "sqlite", "safetensors", "diff"):
                continue  # a file, see above
            there = module in modules and name in modules[module]
            missing += [] if there and (not inside or inside in modules[module][name]) else [text]
    assert not missing


@each_page
def test_every_flag_that_is_named_exists(page, parsers):
    known = {flag for parser in parsers.values() for flag in parser._option_string_actions}
    foreign = {word for command in commands(page) if command[0] in FOREIGN for word in command}
    texts = spans(page) + [text for language, text in blocks(page) if language != "bash"]
    named = {flag for text in texts for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)}
    assert not named - known - foreign


@each_page
def test_every_command_is_one_that_its_program_takes(page, parsers):
    """Real parsers, real checks: a flag that is gone, a value that is refused, a reward that is misspelt."""
    for command in commands(page):
        if command[0] in FOREIGN:
            continue
        program, *arguments = command[2:] if command[1] == "-m" else command[1:]
        assert program in PROGRAMS, command
        if not PROGRAMS[program]:
            continue
        error = io.StringIO()
        with contextlib.redirect_stderr(error):
            try:
                if program == "train.py":
                    settings_of(parsers[program], arguments)
                else:
                    parsers[program].parse_args(arguments)
            except SystemExit:
                pytest.fail(f"{' '.join(command)}: {error.getvalue()}")


def test_every_recipe_is_one_that_a_run_takes(parsers):
    """The table paper -> flags: each row is read by the real parser, and decides on what is its own."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[[^|]*arxiv[^|]* \| `([^`]+)` \|", text, re.M)
    settings = [settings_of(parsers["train.py"], row.split()) for row in rows]
    assert [c.loss for c in settings] == ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "grpo"]
    assert settings[-1].advantage == "gdpo"


@each_page
def test_every_link_leads_somewhere(page):
    text = prose(page)
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        line = path.suffix == ".py" and re.fullmatch(r"L\d+", anchor)  # the right one: tests/test_tour.py
        if not path.exists() or anchor and not line and anchor not in anchors(path):
            wrong.append(target)
    assert not wrong
    assert not re.findall(r"\]\([^)]*\s[^)]*\)", text), "a link that is broken over two lines"


def anchors(page: Path) -> set[str]:
    """As GitHub makes them: lower case, no punctuation, hyphens for spaces."""
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", prose(page), re.M)}


@each_page
def test_every_row_of_a_table_has_its_cells(page):
    """A "|" that is not written "\\|" begins a new cell, between backticks too."""
    for table in re.findall(r"(?:^\|.*\n)+", prose(page), re.M):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


def test_every_reward_is_explained():
    text = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    known = set(rewards.REWARDS) | set(rewards.GROUP_REWARDS)
    table = text[text.index("| name |"):text.index("\n\n", text.index("| name |"))]
    explained = set(re.findall(r"^\| `(\w+)` \|", table, re.M))
    assert set(OUR_REWARDS) <= explained <= known  # a reward of your own may stay without a line there


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"docs/{page.name}" in text for page in (ROOT / "docs").glob("*.md"))


# --- what a page shows ------------------------------------------------------------------------------------------------


def test_the_snippets_of_fork_it_are_code_that_runs(monkeypatch):
    """A reward, a prompt and a loss are entries of three tables."""
    text = next(text for language, text in blocks(ROOT / "README.md") if language == "python")
    reward, prompt, loss = [line for line in text.splitlines() if line.strip()]
    spaces = {"REWARDS": {}, "TEMPLATES": {}, "KINDS": {}}  # empty: whoever tried them has these names in the real ones
    exec(f"{reward}\n{prompt}\n{loss}", spaces)
    name, = spaces["REWARDS"]
    summary = rewards.Summary(text="Why?", n_tokens=2, reference="Why?", target=2, document="Why not?")
    assert isinstance(float(spaces["REWARDS"][name](summary)), float) and f"*{name}:" in reward
    name, = spaces["TEMPLATES"]
    assert "{document}" in spaces["TEMPLATES"][name] and f"--template {name}" in prompt
    name, = spaces["KINDS"]
    monkeypatch.setitem(grpo.KINDS, name, spaces["KINDS"][name])
    x = torch.zeros(1, 2, 3, requires_grad=True)  # [B, G, T]
    value, _ = grpo.policy_loss(x, None, None, torch.tensor([[1.0, -1.0]]), torch.ones(1, 2, 3).bool(), kind=name)
    value.backward()
    assert value.isfinite() and x.grad.abs().sum() > 0 and f"--loss {name}" in loss


def test_the_marked_places_of_fork_it_are_marked():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    mark = "your experiment starts here"
    assert mark in text
    for name in re.findall(r"# (\w+\.py)", next(text for language, text in blocks(ROOT / "README.md")
                                                if language == "python")):
        assert mark in (ROOT / name).read_text(encoding="utf-8"), name


# --- what a run logs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> dict[str, set[str]]:
    """{file: the names of all numbers in it} of two runs of one step: with a wanted length; with budgets, taught."""
    folder = tmp_path_factory.mktemp("runs")
    few = ["--prompts", "2", "--group", "2", "--eval-posts", "2"]
    for name, own in (("length", ["--stages", "rouge_l+length:1"]),
                      ("squish", ["--stages", "squish:1", "--lora", "2", "--max-new-tokens", "60", "--teacher",
                                  "tiny"])):
        subprocess.run([sys.executable, ROOT / "train.py", *few, *own, "--run", name], cwd=folder, check=True,
                       capture_output=True, timeout=300)
    found: dict[str, set[str]] = {}
    for name in ("metrics.jsonl", "eval.jsonl"):
        text = "".join(path.read_text(encoding="utf-8") for path in folder.glob(f"runs/*/{name}"))
        keys = {key.partition("@")[0] for line in text.splitlines() for key in json.loads(line)}
        found[name] = {re.sub("^reward/.*", "reward/NAME", key) for key in keys}
    return found


def explained(file: str) -> set[str]:
    """The names in the first column of the tables that read-your-run.md has about a file."""
    sections = re.split(r"^## ", READ_YOUR_RUN.read_text(encoding="utf-8"), flags=re.M)
    section = next(part for part in sections if part.startswith(f"{file}\n"))
    return {name for first in re.findall(r"^\| ([^|]*) \|", section, re.M) for name in re.findall("`([^`]+)`", first)}


@pytest.mark.parametrize("file", ["metrics.jsonl", "eval.jsonl"])
def test_every_logged_number_is_explained_and_no_other(logged, file):
    assert explained(file) - {"NAME@BUDGET"} == logged[file]
