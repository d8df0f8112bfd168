"""The figures of the documentation: what they show is what the code computes, and anybody can read them."""

import doctest
import re
from xml.etree import ElementTree

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

import grpo
from config import Config
from model import load, token_logprobs
from plumbing.posts import TINY
from studies import figures

NAMES = ("clip", "group", "prompt", "step")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The command's four files, and the step that it drew: (folder, step, the model after it)."""
    folder = tmp_path_factory.mktemp("figures")
    figures.main(["--out", str(folder)])
    config = Config(device="cpu")
    model, tokenizer = load(TINY, "cpu")
    return folder, figures.first_step(config, model, tokenizer), model


def texts(path) -> list[str]:
    """What a figure says: letters are drawn, and matplotlib leaves each text beside them as a comment."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"), re.S)


def test_worked_examples_in_the_docstrings_hold():
    results = doctest.testmod(figures)
    assert results.attempted >= 2 and results.failed == 0


def test_the_same_code_writes_the_same_bytes(made, tmp_path):
    folder, _, _ = made
    figures.main(["--out", str(tmp_path)])
    assert sorted(path.stem for path in tmp_path.iterdir()) == list(NAMES)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


@pytest.mark.parametrize("name", NAMES)
def test_the_files_that_are_kept_say_what_the_script_says(made, name):
    """Word by word, and numbers as another machine may round them. Another matplotlib may draw letters otherwise."""
    number = r"[\d.]*\d"
    ours, kept = ("\n".join(texts(folder / f"{name}.svg")) for folder in (made[0], figures.OUT))
    assert re.sub(number, "0", ours) == re.sub(number, "0", kept), "run python -m studies.figures"
    now, then = ([*map(float, re.findall(number, text))] for text in (ours, kept))
    assert now == pytest.approx(then, abs=0.011, rel=0.06)


# --- what they show ---------------------------------------------------------------------------------------------------


def test_the_clip_is_that_of_the_table_in_grpo(made):
    table = re.findall(r"^ +([\d.]+) +([+-]1) +(-?[\d.]+) +([+-]?[\d.]+) +(\S.*)$", grpo.__doc__, re.M)
    assert {(float(rho), float(A)) for rho, A, *_ in table} == set(figures.CASES) and len(table) == 4
    said = texts(made[0] / "clip.svg")
    for rho, A, value, gradient, words in table:
        assert figures.objective(float(rho), float(A)) == pytest.approx((float(value), float(gradient)))
        assert figures.CASES[float(rho), float(A)][0].split()[-1] == words.split()[-1]  # enough, or take it back
        assert gradient.replace("-", "−") in said


@pytest.mark.parametrize("A", [1.0, -1.0])
def test_the_curves_of_the_clip_by_hand(A):
    for rho in (0.02, 0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0):
        stops = rho > 1.2 if A > 0 else rho < 0.8
        value = min(rho * A, min(max(rho, 0.8), 1.2) * A)
        assert figures.objective(rho, A) == pytest.approx((value, 0.0 if stops else rho * A))


def test_the_group_is_drawn_with_its_own_mean(made):
    folder, step, _ = made
    rewards = [-abs(int(n) - 40) / 40 for n in step.group.lengths]
    mean = sum(rewards) / 8
    std = (sum((r - mean) ** 2 for r in rewards) / 7) ** 0.5
    said = texts(folder / "group.svg")
    for r in rewards:
        assert figures.signed(r, 3) in said and figures.signed((r - mean) / (std + 1e-4)) in said
    assert figures.signed(mean, 3) in said and any(f"std is {std:.3f}" in text for text in said)


def test_the_step_is_the_real_one_and_the_weights_are_put_back(made):
    """The same step again by brute force: each completion behind a prompt of its own, no grpo.update, plain AdamW."""
    _, step, model = made
    fresh, tokenizer = load(TINY, "cpu")
    for name, weight in fresh.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert all(p.grad is None for p in model.parameters())

    def logprobs(group, i):  # [T_i]
        tokens = group.tokens[i][group.mask[i]]  # [T_i]
        hidden = fresh.hidden(torch.cat([group.prompt, tokens])[None])[0, -len(tokens) - 1:-1]  # [T_i, D]
        return token_logprobs(fresh, hidden, tokens)[0]

    pairs = [(group, i) for group in step.groups for i in range(8)]
    before = [logprobs(step.group, i).detach() for i in range(8)]
    for group, i in pairs:  # at the first step rho is 1 and the KL has no gradient: minus A times the token mean
        r = torch.tensor(group.rewards)  # [G]
        (-(r[i] - r.mean()) / (r.std() + 1e-4) * logprobs(group, i).mean() / len(pairs)).backward()
    clip_grad_norm_(fresh.parameters(), 1.0)
    torch.optim.AdamW(fresh.parameters(), 6e-4 / 5, (0.9, 0.99), 1e-8, 0.0).step()
    with torch.no_grad():
        after = [logprobs(step.group, i) for i in range(8)]
    largest = 0.0
    for i in step.best_and_worst():
        for cell, p, q in zip(figures.cells(step, i), before[i].exp(), after[i].exp(), strict=True):
            assert (cell.before, cell.after) == pytest.approx((p.item(), q.item()), abs=2e-3), cell
            assert cell.times == pytest.approx((q / p).item(), rel=0.01), cell
            largest = max(largest, abs(cell.times - 1))
    assert largest > 0.5


def test_what_the_page_says_of_the_step(made):
    folder, step, _ = made
    best, worst = (figures.cells(step, i) for i in step.best_and_worst())
    said = texts(folder / "step.svg")
    assert [cell.text for cell in best if cell.times > 1.2] == ["brother", "She"]
    assert worst[-1].text == "<|im_end|>" and f"×{worst[-1].times:.2f}" in said
    page = (figures.OUT.parent / "docs" / "doing.md").read_text(encoding="utf-8")
    assert f"fell from {worst[-1].before:.1%} to {worst[-1].after:.1%}" in page
    assert all(f"{cell.times:.2f}" in page for cell in (*best, worst[-1]) if not 0.7 < cell.times < 1.2)
    stops = [next(cell for cell in row if cell.text == ".") for row in (best, worst)]
    assert stops[0].times == pytest.approx(stops[1].times, abs=1e-4) and stops[0].times < 0.95


def test_the_prompt_and_its_copies(made):
    """The two ways compute the same. The bytes that they keep are counted and do not vary; seconds are not tested."""
    model, _ = load(TINY, "cpu")
    prompt, tokens = torch.arange(10, 30), torch.arange(40, 55).view(3, 5)  # [P], [G, T]
    one, _ = grpo.group_logprobs(model, [prompt], tokens[None], torch.ones(1, 3, 5, dtype=torch.bool))
    torch.testing.assert_close(figures.copied_logprobs(model, prompt, tokens), one[0], rtol=0, atol=1e-4)
    found = figures.measure(sizes=(4,), rounds=1)
    assert found[4][1] == pytest.approx(figures.MEASURED[4][1], abs=0.05)
    assert figures.times_the_tokens(8) == 3584 / 896
    said = " ".join(texts(made[0] / "prompt.svg"))
    assert "P + G T = 896 tokens" in said and "G (P + T) = 3,584 tokens" in said


# --- who can read them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_is_one_small_file_with_a_dark_half(made, name):
    text = (made[0] / f"{name}.svg").read_text(encoding="utf-8")
    assert len(text.encode()) < 150_000 and ElementTree.fromstring(text).tag.endswith("svg")
    assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', text))  # it needs no other file
    rules, drawn = text[:text.index("</style>")], text[text.index("</style>"):]
    assert "prefers-color-scheme: dark" in rules
    colors = set(re.findall(r"(fill|stroke): (#[0-9a-f]{6})", drawn))
    assert len(colors) > 5
    for what, color in colors:
        assert f'[style*="{what}: {color}"]{{{what}:{figures.DARK[color]} ' in rules


def contrast(a: str, b: str) -> float:
    """The contrast of two colours as WCAG 2 defines it: 1 to 21."""
    bright = []
    for color in (a, b):
        channels = [int(color[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        bright.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(bright) / min(bright)


def test_all_text_has_the_contrast_that_wcag_asks_for():
    f = figures
    on = [(text, f.PAPER) for text in (f.INK, f.SOFT, f.BLUE, f.ORANGE)]
    on += [(f.INK, ground) for ground in (f.GROUND, *f.RARER, *f.LIKELIER)]
    for text, ground in on:
        assert contrast(text, ground) >= 4.5, (text, ground)
        assert contrast(f.DARK[text], f.DARK[ground]) >= 4.5, (f.DARK[text], f.DARK[ground])
