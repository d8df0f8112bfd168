"""The plan of the house: who may import whom, and how much one has to read."""

import ast
import io
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STORY = {  # file: what it may import besides plumbing, at the top or anywhere inside
    "grpo": {"model"}, "rollout": {"model"}, "squish": {"model"}, "lora": {"model"}, "model": set(), "metrics": set(),
    "rewards": {"metrics"}, "config": {"grpo", "rewards", "squish"},
    "task": {"config", "rollout", "rewards", "metrics", "squish", "model"},
    "eval": {"task", "config", "rollout", "rewards", "metrics", "model", "squish"},
    "train": {"grpo", "task", "config", "rollout", "rewards", "metrics", "squish", "model", "lora", "eval", "mlx_grpo"},
    "mlx_model": {"rollout"}, "mlx_grpo": {"mlx_model", "grpo"},
}
PACKAGES = {"torch", "numpy", "tokenizers", "safetensors"}  # all that the story needs of other people's
TOUR = ("grpo", "train", "rollout", "task", "rewards", "model")


def imports(path: Path) -> set[str]:
    """First names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names)


def prose(path: Path) -> int:
    """Lines of comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    lines = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def size(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_every_file_has_a_room():
    assert {path.stem for path in ROOT.glob("*.py")} == set(STORY)


@pytest.mark.parametrize("name", sorted(STORY))
def test_the_story_imports_downwards(name):
    found = imports(ROOT / f"{name}.py")
    assert found - PACKAGES - {"plumbing"} <= STORY[name]


def test_there_is_no_circle():
    order, left = [], dict(STORY)
    while left:
        ready = [name for name, needs in left.items() if needs <= set(order)]
        assert ready, left
        order += ready
        left = {name: needs for name, needs in left.items() if name not in ready}


def test_mlx_is_met_in_one_place():
    """The rest runs where it is not installed, and one place says what to install."""
    files = [*ROOT.glob("*.py"), *(ROOT / "plumbing").glob("*.py")]
    assert [path.stem for path in files if "mlx" in imports(path)] == ["mlx_arrays"]




@pytest.mark.parametrize("path", sorted((ROOT / "plumbing").glob("*.py")), ids=lambda path: path.stem)
def test_plumbing_imports_no_story(path):
    assert not imports(path) & {*STORY, "studies", "tests"}


def test_nobody_imports_the_studies():
    for path in (*ROOT.glob("*.py"), *(ROOT / "plumbing").glob("*.py"), *(ROOT / "tiny").glob("*.py")):
        assert "studies" not in imports(path), path
    for path in (ROOT / "studies").glob("*.py"):
        own = [node.module for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
               if isinstance(node, ast.ImportFrom)]
        assert not [name for name in own if name.startswith("studies")], path


@pytest.mark.parametrize("name", sorted(STORY))
def test_a_file_of_the_story_is_readable(name):
    """A screen a function, a quarter of prose; about 350 lines, and 420 for the four families of a model."""
    path = ROOT / f"{name}.py"
    assert size(path) <= (420 if name.endswith("model") else 350), size(path)
    assert prose(path) >= size(path) / 4, (prose(path), size(path))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            described = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
            lines = node.end_lineno - node.lineno + 1 - described
            assert lines <= 50, f"{name}.{node.name} has {lines} lines"


def test_the_mlx_files_can_be_read_beside_torchs():
    assert size(ROOT / "mlx_model.py") + size(ROOT / "mlx_grpo.py") <= 650


def test_the_tour_is_an_evening():
    assert sum(size(ROOT / f"{name}.py") for name in TOUR) <= 1800
