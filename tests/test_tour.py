"""The pages that lead through the code: links open it at the right line, and what one is told to type works.

    python tests/test_tour.py      # after a change of the code: sets the links' line numbers right
"""

import ast
import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TOUR, README = ROOT / "docs" / "tour.md", ROOT / "README.md"
# [`name`](path.py#L12), [`module.name`](path.py#L12) and [`name`](path.py#L12-L15), the last for a function whole.
LINK = re.compile(r"\[`(?:\w+\.)?(\w+)`\]\(((?:\.\./)?[\w/]+\.py)#L(\d+)(-L\d+)?\)")


def places(path: Path) -> dict[str, tuple[int, int]]:
    """{name: its first and last line} of what stands at the top of a file."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node.lineno, node.end_lineno
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name):
                found.setdefault(target.id, (node.lineno, node.end_lineno))
    return found


def mended(page: Path) -> str:
    """The page's text with the line numbers that are right now."""
    def right(link: re.Match) -> str:
        first, last = places((page.parent / link[2]).resolve())[link[1]]
        lines = f"L{first}-L{last}" if link[4] else f"L{first}"
        return re.sub(r"#L[\d\-L]+\)$", f"#{lines})", link[0])

    return LINK.sub(right, page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_into_the_code_open_it_where_they_say(page):
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"\.py#L\d", text)) == len(LINK.findall(text)), "a link to a line that names nothing"
    assert text == mended(page), "python tests/test_tour.py sets the line numbers right"


def test_what_one_is_told_to_type_works(monkeypatch):
    """All blocks of the tour, one after the other, as in one `python` that was started in the project's folder."""
    monkeypatch.chdir(ROOT)
    text = "\n\n".join(re.findall(r"^```python\n(.*?)^```", TOUR.read_text(encoding="utf-8"), re.M | re.S))
    test = doctest.DocTestParser().get_doctest(text, {}, "tour", "docs/tour.md", 0)
    assert len(test.examples) > 30
    result = doctest.DocTestRunner().run(test)
    assert result.failed == 0


def test_the_tour_opens_every_file_of_the_story():
    text = TOUR.read_text(encoding="utf-8")
    for path in ROOT.glob("*.py"):
        assert re.search(rf"\(\.\./{path.name}(#L\d+)?\)", text) or f"`{path.name}`: " in text, path.name


def test_each_file_of_the_story_says_what_to_read_next():
    """Its last line names the next one, and whoever follows them meets all fourteen."""
    at, seen = "grpo.py", []
    while at.endswith(".py"):
        last = (ROOT / at).read_text(encoding="utf-8").rstrip().splitlines()[-1]
        found = re.fullmatch(r"# Next: ([\w/.]+), .+", last)
        assert found and (ROOT / found[1]).exists(), f"{at}: {last}"
        seen, at = [*seen, at], found[1]
        assert at not in seen, f"a circle at {at}"
    assert sorted(seen) == sorted(path.name for path in ROOT.glob("*.py"))


if __name__ == "__main__":
    for each in PAGES:
        each.write_text(mended(each), encoding="utf-8")

