"""report.html: what a run keeps for it, what it says, and how it behaves in a browser."""

import json
import random
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from browser import Browser
from helpers import byte_bpe, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import grpo
import train
from config import Config
from plumbing import groups as kept
from plumbing.groups import keeping_groups, pieces, steps_to_keep
from plumbing.log import read_lines
from plumbing.report import read_notes, reporting, thin, write_report
from rollout import sample

CLOSES = "</script><script>document.title = 1</script><img src=x onerror='document.title = 1'> & <!-- \u2028"


def data_of(page: Path) -> dict:
    """What the page was given."""
    text = page.read_text(encoding="utf-8")
    return json.loads(text.partition('<script type="application/json" id="data">')[2].partition("</script>")[0])


def write(path: Path, rows: list) -> None:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def config(**more) -> Config:
    return Config(**{"group": 4, "prompts": 2, "max_new_tokens": 12, "lr": 0.05, "beta": 0.1, "run": "r"} | more)


def one_step(folder: Path, c: Config, step: int = 1, weight: float = 1.0):
    """A batch of a random model, scored by hand, and the update on it, as step 1 of 99 -> (model, groups)."""
    model, ref_model, tokenizer = tiny_model(vocab_size=400), tiny_model(vocab_size=400, seed=1), byte_bpe()
    groups = sample(model, [[5, 6, 7], [8, 9]], G=c.group, max_new_tokens=c.max_new_tokens,
                    tokenizer=tokenizer)
    optimizer = torch.optim.SGD(model.parameters(), c.lr)
    stage = SimpleNamespace(number=1, end=99)
    log = SimpleNamespace(folder=folder, config=c, total=99, stages=[stage], keeping=lambda *_: nullcontext())
    with keeping_groups(log, step, groups, model=model, ref_model=ref_model, tokenizer=tokenizer, grpo=grpo):
        for i, group in enumerate(groups):
            group.rewards = [float(j + i) for j in range(c.group)]
            group.parts, group.weights = {"length": group.rewards}, {"length": weight}
        grpo.update(model, ref_model, groups, optimizer, c)
    return model, groups


# --- groups.jsonl -----------------------------------------------------------------------------------------------------


def test_a_dozen_steps_are_kept_the_first_and_the_last_among_them():
    for total in (1, 2, 11, 12, 13, 220, 99_999):
        steps = steps_to_keep(total)
        assert len(steps) == min(total, 12) and {1, total} <= steps <= set(range(1, total + 1))


def test_watching_a_step_changes_no_bit_of_it(tmp_path):
    torch.manual_seed(0)
    watched, _ = one_step(tmp_path, config())
    state = torch.get_rng_state()
    torch.manual_seed(0)
    alone, _ = one_step(tmp_path, config(), step=2)  # which is not kept
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), alone.parameters()))
    assert len(read_lines(tmp_path / "groups.jsonl")) == 1


def test_what_is_kept_is_what_the_models_say(tmp_path):
    """Before, after and reference log-probabilities, each by a full forward over prompt and completion."""
    before, ref_model = tiny_model(vocab_size=400), tiny_model(vocab_size=400, seed=1)
    after, groups = one_step(tmp_path, config())
    row, = read_lines(tmp_path / "groups.jsonl")
    for group, found in zip(groups, row["groups"]):
        assert [one["number"] for one in found["completions"]] == [4, 3, 2, 1]  # the best first
        for one in found["completions"]:
            g = one["number"] - 1
            ids = group.tokens[g][group.mask[g]]  # [T]
            whole = torch.cat([group.prompt, ids])[None]  # [1, P + T]
            for name, model in (("before", before), ("after", after), ("ref", ref_model)):
                with torch.no_grad():
                    logp = model(whole)[0].log_softmax(-1)[len(group.prompt) - 1:-1]  # [T, V]
                said = logp.gather(1, ids[:, None])[:, 0]  # [T]
                torch.testing.assert_close(torch.tensor(one[name]), said, rtol=1e-3, atol=1e-4)
            assert one["reward"] == group.rewards[g] and one["all"] == len(ids) == len(one["tokens"])
            assert sum(one["kl"][0]) > 0


def test_before_the_update_the_losses_differ_in_their_divisors_only(tmp_path):
    """On policy: dapo's weight is the advantage itself, and grpo's the same times mean length / own length."""
    _, groups = one_step(tmp_path, config())
    row, = read_lines(tmp_path / "groups.jsonl")
    mean = sum(int(group.mask.sum()) for group in groups) / sum(len(group.mask) for group in groups)
    for one in (one for group in row["groups"] for one in group["completions"]):
        for name, weight in (("dapo", one["advantage"]), ("bnpo", one["advantage"]), ("cispo", one["advantage"]),
                             ("dr_grpo", one["advantage"] * mean / 12), ("grpo", one["advantage"] * mean / one["all"]),
                             ("gspo", one["advantage"] * mean / one["all"])):
            assert one["weights"][name][0] == pytest.approx([weight] * one["all"], rel=6e-3), name


def test_the_advantages_are_those_of_the_update(tmp_path):
    """gdpo reads the parts: with a weight of -1 the best reward is the worst."""
    _, groups = one_step(tmp_path, config(advantage="gdpo"), weight=-1.0)
    parts = torch.tensor([[[-value] for value in group.rewards] for group in groups])  # [B, G, 1]
    A = grpo.advantages(parts, "gdpo")  # [B, G]
    row, = read_lines(tmp_path / "groups.jsonl")
    for group, a in zip(row["groups"], A):
        for one in group["completions"]:
            assert one["advantage"] == pytest.approx(a[one["number"] - 1].item(), abs=1e-3)
            assert (one["advantage"] > 0) == (one["number"] <= 2)


def test_after_the_update_two_losses_disagree_on_a_weight_being_zero(tmp_path):
    """A step that is far too long: where a good token became likelier than 1.2 times, grpo leaves it alone; cispo caps
    its weight at 1.2 A, and gspo, which looks at the whole completion, may still push it."""
    one_step(tmp_path, config(lr=0.5))
    row, = read_lines(tmp_path / "groups.jsonl")
    clipped = [(one, i) for group in row["groups"] for one in group["completions"] for i in range(len(one["tokens"]))
               if one["weights"]["grpo"][1][i] == 0 and one["advantage"] > 0]
    assert clipped
    for one, i in clipped:
        assert one["after"][i] - one["before"][i] > 0.18  # log 1.2
        assert one["weights"]["cispo"][1][i] == pytest.approx(1.2 * one["advantage"], rel=6e-3)
        assert one["weights"]["grpo"][0][i] > 0
    every = [(one["weights"]["grpo"][1][i], one["weights"]["gspo"][1][i]) for group in row["groups"]
             for one in group["completions"] for i in range(len(one["tokens"]))]
    assert any((a == 0) != (b == 0) for a, b in every)
    assert set(row["groups"][0]["completions"][0]["weights"]) == {*grpo.KINDS, "with KL"}


def test_weights_are_those_of_policy_loss_on_the_kept_numbers(tmp_path):
    """One group that is kept whole: the loss of its kept log-probabilities has the gradients that stand in the file."""
    c = config(prompts=1, lr=0.3, loss="dr_grpo")
    _, groups = one_step(tmp_path, c)
    row, = read_lines(tmp_path / "groups.jsonl")
    n_tokens = sum(int(group.mask.sum()) for group in groups)
    for group in row["groups"]:
        for one in group["completions"]:
            new, old, ref = (torch.tensor([[one[name]]]) for name in ("after", "before", "ref"))  # [1, 1, T]
            new.requires_grad_()
            loss, _ = grpo.policy_loss(new, old, ref, torch.tensor([[one["advantage"]]]), torch.ones_like(new).bool(),
                                       "dr_grpo", beta=c.beta, kl=c.kl, max_length=12, n_completions=8)
            weights = -torch.autograd.grad(loss, new)[0][0, 0] * n_tokens
            assert one["weights"]["with KL"][1] == pytest.approx(weights.tolist(), rel=0.02, abs=2e-3)


def test_large_groups_are_kept_in_part(tmp_path, monkeypatch):
    """Eight of twelve completions, the best and the worst among them, and fifty tokens of each: a bound on the disk."""
    monkeypatch.setattr(kept, "TOKENS", 16)
    _, groups = one_step(tmp_path, config(group=12))
    row, = read_lines(tmp_path / "groups.jsonl")
    for group in row["groups"]:
        numbers = [one["number"] for one in group["completions"]]
        assert len(set(numbers)) == 8 and numbers[0] == 12 and numbers[-1] == 1
        assert all(len(one["tokens"]) == min(2, one["all"]) for one in group["completions"])
    assert [len(group) for group in row["rewards"]] == [12, 12]


@pytest.mark.parametrize("cause", ["disk", "loss"])
def test_a_group_that_cannot_be_kept_does_not_end_the_run(tmp_path, capsys, monkeypatch, cause):
    if cause == "disk":
        (tmp_path / "groups.jsonl").mkdir()
    else:
        monkeypatch.setitem(grpo.KINDS, "mine", ("token", "clip", "nothing that there is"))
    one_step(tmp_path, config())
    assert "A group could not be kept for report.html (" in capsys.readouterr().out


def test_an_error_inside_the_step_is_not_swallowed(tmp_path):
    with pytest.raises(FloatingPointError):
        one_step(tmp_path, config(lr=float("inf")))
    assert not (tmp_path / "groups.jsonl").exists()


def test_pieces_of_a_text_add_up_to_it():
    tokenizer = Tokenizer(models.BPE())  # a token a byte
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.model = models.BPE({letter: i for i, letter in enumerate(alphabet)}, [])
    for text in ("naïve 🦆!", "</script>", "\n\n a"):
        ids = tokenizer.encode(text).ids
        assert "".join(pieces(tokenizer, ids)) == text and len(pieces(tokenizer, ids)) == len(ids)


# --- the page, from files of any kind ---------------------------------------------------------------------------------


def fake_run(folder: Path, steps: int = 60, total: int = 60) -> Path:
    """A run's files without a run: two stages, two evaluations and hostile text everywhere."""
    dice = random.Random(0)
    folder.mkdir(parents=True)
    write(folder / "config.json", [{"model": "tiny", "prompts": 2, "group": 3, "target": 30, "loss": "grpo",
                                    "stages": [f"length:{total // 2}", f"rouge_l+length:{total - total // 2}"]}])
    numbers = ("reward", "reward_std", "reward/length", "reward/<b>mine", "length", "within_2", "within_10pct", "kl",
               "entropy", "clip_frac", "logp_gap", "grad_norm", "flat_groups", "tokens_per_s", "seconds", "my_number")
    write(folder / "metrics.jsonl", [{"step": s, "stage": 1 + (s > total // 2)} | {n: dice.random() for n in numbers}
                                     for s in range(1, steps + 1)])
    write(folder / "eval.jsonl", [
        {"step": s, "stage": stage, "n": 3, "reward": .2 + stage, "reward/length": .1, "length": 30.5,
         "length_std": 2.0, "within_2": .5, "within_10pct": .75, "distinct": .4, "rouge_l": .5, "meteor": .5,
         "bleu": .5, "lengths": [20, 30 + stage, 41]} for s, stage in ((0, 0), (steps, 2))])
    write(folder / "samples.jsonl", [
        {"step": s, "stage": stage, "document": f"Post. {CLOSES}", "reference": CLOSES, "id": "1", "length": 9,
         "summary": f"{stage} {CLOSES}", "reward": .5} for s, stage in ((0, 0), (steps, 2))])
    return folder


def fake_groups(folder: Path, steps=(1, 30, 60), tokens=("A", " cat", "\n", CLOSES, "<|im_end|>")) -> None:
    """Lines of groups.jsonl whose third token grpo leaves alone after the update, and cispo does not."""
    T = len(tokens)

    def completion(number: int, advantage: float) -> dict:
        weights = {name: [[advantage] * T, [advantage] * 2 + [0.0] + [advantage] * (T - 3)] for name in grpo.KINDS}
        weights["cispo"] = [[advantage] * T, [1.2 * advantage] * T]
        return {"number": number, "reward": advantage, "advantage": advantage, "parts": {"length": -.1, "rouge_l": .5},
                "all": T, "stopped": True, "tokens": list(tokens), "before": [-.5] * T, "after": [-.4] * T,
                "ref": [-.5] * T, "kl": [[0.0] * T, [.005] * T], "weights": weights}

    group = {"prompt": f"Summarise. {CLOSES}", "completions": [completion(2, 1.0), completion(1, -1.0)]}
    write(folder / "groups.jsonl", [
        {"step": s, "stage": 1, "loss": "grpo", "beta": .05, "updates": 1, "rewards": [[-1.0, 1.0], [0.0, 0.0]],
         "kinds": {name: list(parts) for name, parts in grpo.KINDS.items()}, "groups": [group, group]} for s in steps])


def test_no_text_is_ever_html(tmp_path):
    run = fake_run(tmp_path / "r")
    fake_groups(run)
    page = write_report(run).read_text(encoding="utf-8")
    template = (Path(train.__file__).parent / "plumbing" / "report.html").read_text(encoding="utf-8")
    for sign in ("<", "</script", "<img", "<!--"):
        assert page.count(sign) == template.count(sign), sign
    data = data_of(run / "report.html")
    assert data["samples"][0]["summaries"][1]["summary"] == f"2 {CLOSES}"
    assert CLOSES in data["groups"][0]["groups"][0]["completions"][0]["tokens"]


def test_every_curve_is_drawn_and_says_what_read_your_run_says(tmp_path):
    """One truth: the page's notes are cells of docs/read-your-run.md, and a forker's number has a curve as well."""
    data = data_of(write_report(fake_run(tmp_path / "r")))
    drawn = [name for names in data["sections"].values() for name in names]
    assert sorted(drawn) == sorted(data["curves"]) and "my_number" in drawn and "seconds" not in drawn
    assert {"reward", "reward/length", "length", "kl", "entropy", "clip_frac", "logp_gap"} <= set(drawn)
    text = (Path(train.__file__).parent / "docs" / "read-your-run.md").read_text(encoding="utf-8")
    for name in drawn:
        if name not in ("my_number", "reward/<b>mine", "tokens_per_s"):
            note = data["notes"]["reward/NAME" if "/" in name else name]
            assert note["what"] and note["do"] and note["what"] in text and note["do"][:20] in text, name
    assert len(data["healthy"]) >= 4 and all(item for item in data["healthy"])


def test_a_page_without_docs_has_no_notes_and_is_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr("plumbing.report.READ_YOUR_RUN", tmp_path / "nowhere.md")
    assert read_notes() == ({}, {})
    data = data_of(write_report(fake_run(tmp_path / "r")))
    assert [len(names) for names in data["sections"].values()] == [len(data["curves"])]


def test_thousands_of_steps_are_thinned_to_their_means(tmp_path):
    every, steps, curves = thin([{"step": s, "stage": 1, "reward": float(s), "logp_gap": float(s), "kl": None}
                                 for s in range(1, 2501)])
    assert every == 3 and len(steps) == 834 and steps[:2] == [3, 6] and steps[-1] == 2500
    assert curves == {"reward": [*(float(s) for s in range(2, 2500, 3)), 2500.0], "logp_gap": [float(s) for s in steps]}


def test_the_largest_page_has_two_megabytes(tmp_path):
    """5,000 steps, documents of 20,000 characters, and groups at their bound."""
    run = fake_run(tmp_path / "r", 5000, 5000)
    write(run / "samples.jsonl", [{"step": 0, "stage": stage, "document": "d" * 20_000, "id": str(i), "length": 400,
                                   "summary": "s" * 2000} for stage in range(9) for i in range(5)])
    _, _ = one_step(run, config())
    line, = read_lines(run / "groups.jsonl")
    one = line["groups"][0]["completions"][0]
    n = kept.TOKENS // kept.COMPLETIONS

    def longer(value):
        if isinstance(value, list):
            return [longer(value[0])] * 2 if isinstance(value[0], list) else [-0.1234 if isinstance(
                value[0], float) else " summary"] * n
        return {name: longer(inner) for name, inner in value.items()} if isinstance(value, dict) else value

    group = {"prompt": "p" * kept.CHARS, "completions": [longer(one)] * kept.COMPLETIONS}
    write(run / "groups.jsonl", [json.dumps(line | {"step": s, "groups": [group] * kept.GROUPS}) + "\n"
                                 for s in range(kept.STEPS)])
    assert 1e6 < write_report(run).stat().st_size < 2.2e6


@pytest.mark.parametrize("missing", [("groups.jsonl", "samples.jsonl", "config.json"), ("eval.jsonl",),
                                     ("metrics.jsonl", "groups.jsonl")])
def test_a_run_that_lacks_files_has_a_page(tmp_path, missing):
    run = fake_run(tmp_path / "r")
    fake_groups(run)
    for name in missing:
        (run / name).unlink()
    assert data_of(write_report(run))["name"] == "r"


def test_damaged_lines_are_counted_and_left_out(tmp_path):
    run = fake_run(tmp_path / "r")
    rows = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    again = '{"step": 7, "stage": 1, "reward": NaN, "kl": "much", "length": [1], "entropy": null}\n'  # logged twice
    write(run / "metrics.jsonl", [*rows[:10], "{broken\n", again, *rows[10:], '{"step": 9'])
    (run / "config.json").write_text("[]", encoding="utf-8")
    data = data_of(write_report(run))
    assert data["damage"] == ["metrics.jsonl: line 11 could not be read"]
    assert len(data["steps"]) == 60 and data["curves"]["reward"][6] is None and data["curves"]["kl"][6] is None


def test_a_page_that_cannot_be_written_ends_nothing(tmp_path, capsys):
    run = fake_run(tmp_path / "r")
    (run / "report.html").mkdir()
    assert write_report(run) is None
    assert "report.html could not be written (" in capsys.readouterr().out


def test_there_is_no_page_where_there_is_nothing_to_tell(tmp_path):
    assert write_report(tmp_path) is None and not list(tmp_path.iterdir())


def test_a_run_that_dies_leaves_a_page_that_says_so_and_a_refused_one_leaves_none(tmp_path):
    run = fake_run(tmp_path / "r")
    with pytest.raises(ValueError), reporting(run):
        raise ValueError("the posts are others")  # before anything was written
    assert not (run / "report.html").exists()
    with pytest.raises(SystemExit), reporting(run):
        with open(run / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write('{"step": 61, "stage": 2, "reward": 0.5}\n')
        raise SystemExit("Stopped at once.")
    assert data_of(run / "report.html")["end"] == "SystemExit: Stopped at once."


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


def text(browser, selector: str) -> str:
    return browser.run(f"document.querySelector({json.dumps(selector)}).textContent")


def test_the_page_works_in_a_browser(tmp_path, browser):
    """Pointed at, clicked through and by keyboard, without a complaint and without a request."""
    run = fake_run(tmp_path / "r")
    fake_groups(run)
    browser.open(write_report(run))
    curve = '[data-curve="kl"]'
    assert browser.run("document.querySelectorAll('[data-curve]').length") == 15
    assert browser.run("document.title") == "r · crisp" and not browser.run("document.images.length")
    browser.click(f"{curve} .plot")  # the middle of its width is near the middle of the run
    middle = int(text(browser, f"{curve} .reading").split()[1].strip(":"))
    assert 25 <= middle <= 35
    browser.run(f"document.querySelector('{curve} .plot').focus()")
    browser.press("End", "ArrowLeft")
    assert text(browser, f"{curve} .reading").startswith("step 59: ")
    assert text(browser, '[data-curve="reward"] .reading').startswith("step 59: ")  # all curves show the same step
    assert browser.run(f"document.querySelector('{curve} .plot').getAttribute('aria-valuetext')").startswith("step 59")
    # The loss: after the update grpo leaves the third token alone, cispo does not; before it, neither does.
    third = '[data-row="0"] [data-token="2"]'
    assert browser.run(f"document.querySelector('{third}').className") == "none"
    browser.click(third)
    assert text(browser, ".panel [data-loss=grpo]") == "grpo+1.00 ▲0 ·".replace("1.00", "1")
    browser.click("input[name=loss][value=cispo]")
    assert browser.run(f"document.querySelector('{third}').className") == "plus now"
    browser.click("input[name=loss][value=grpo]")
    browser.click('input[name=moment][value="0"]')
    assert browser.run(f"document.querySelector('{third}').className") == "plus now"
    browser.run(f"document.querySelector('{third}').focus()")
    browser.press("ArrowDown", "ArrowRight")
    assert browser.run("document.activeElement.dataset.token") == "3" and "completion 1" in text(browser, ".panel")
    assert CLOSES.replace("\u2028", "\\u2028")[:20] in text(browser, ".panel")
    for colour in ("advantage", "ratio", "kl", "p"):
        browser.click(f"input[name=colour][value={colour}]")
    browser.run("document.querySelector('#step').focus()")
    browser.press("End")
    assert text(browser, "output").strip() == "60 of 60, stage 1"
    browser.click('input[name=group][value="1"]')
    for box in ("#histogram", "#spread"):
        browser.run(f"document.querySelector('{box} .plot').focus()")
        browser.press("Home", "ArrowRight")
    assert text(browser, "#histogram .reading").startswith("21 tokens: before training 0 of 3")
    assert browser.run("document.title") == "r · crisp"  # no text has become code
    assert not browser.complaints


@pytest.mark.parametrize("width, dark", [(390, True), (820, False), (1400, True)])
def test_nothing_is_wider_than_the_screen_and_text_has_contrast(tmp_path, browser, width, dark):
    run = fake_run(tmp_path / "r")
    fake_groups(run)
    browser.open(write_report(run), width, 800, dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    ink, page = (tuple(map(int, browser.run(f"getComputedStyle(document.body).{name}")[4:-1].split(",")))
                 for name in ("color", "backgroundColor"))
    assert (sum(page) < sum(ink)) == dark
    for selector in ("body", ".soft", "a", ".tokens .plus", ".tokens .minus", ".tokens .none", ".reading", "svg text"):
        assert contrast(browser, selector) >= 4.5, selector
    assert not browser.complaints


def contrast(browser, selector: str) -> float:
    """WCAG's ratio of an element's text to what lies behind it, half transparent colours laid over each other."""
    return browser.run("""(selector => {
      const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return [...n.slice(0, 3), n[3] ?? 1]; };
      const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
      const light = c => [.2126, .7152, .0722].reduce((sum, part, i) => sum + part * linear(c[i] / 255), 0);
      const node = document.querySelector(selector), style = getComputedStyle(node), layers = [];
      for (let at = node; at; at = at.parentElement) layers.unshift(parse(getComputedStyle(at).backgroundColor));
      const over = (under, c) => [0, 1, 2].map(i => c[i] * c[3] + under[i] * (1 - c[3]));
      const front = parse(node instanceof SVGElement ? style.fill : style.color);
      const [a, b] = [light(front), light(layers.reduce(over, [255, 255, 255]))].sort((x, y) => y - x);
      return (a + .05) / (b + .05);
    })(""" + json.dumps(selector) + ")")


@pytest.mark.parametrize("kind", ["no steps", "one step", "no groups, no lengths", "thousands", "dead"])
def test_any_run_gives_a_page_without_an_error(tmp_path, browser, kind):
    steps, total = {"one step": (1, 60), "thousands": (3000, 4000)}.get(kind, (60, 60))
    run = fake_run(tmp_path / "r", steps, total)
    fake_groups(run, steps=(1,))
    if kind == "no steps":
        (run / "metrics.jsonl").unlink()
        (run / "groups.jsonl").unlink()
    if kind == "no groups, no lengths":
        (run / "groups.jsonl").unlink()
        write(run / "eval.jsonl", [{"step": 0, "stage": 0, "reward": .5, "reward@0.1": .4}])
    page = write_report(run, "FloatingPointError: <b>The loss is nan</b>" if kind == "dead" else "")
    browser.open(page)
    assert browser.run("document.querySelectorAll('section').length") >= 4
    if kind == "dead":
        assert "<b>The loss is nan</b>" in text(browser, "[role=alert]")
    assert not browser.complaints


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_writes_its_page_and_one_that_is_gone_on_with_too(tmp_path, monkeypatch, capsys):
    """Three steps of the default model; then the last two of them again, from a checkpoint, without doubled lines."""
    monkeypatch.chdir(tmp_path)
    few = ["--prompts", "2", "--group", "2", "--eval-posts", "3", "--run", "r"]
    assert train.main([*few, "--stages", "length:1", "rouge_l:2"]) == 0
    run = tmp_path / "runs" / "r"
    before, data = (run / "groups.jsonl").read_text(encoding="utf-8"), data_of(run / "report.html")
    assert [row["step"] for row in data["groups"]] == [1, 2, 3] and data["last"] == data["total"] == 3
    assert [len(row["lengths"]) for row in data["evaluations"]] == [3, 3, 3] and not data["end"]
    (run / "report.html").unlink()
    (run / "checkpoint" / "state.pt").unlink()
    assert train.main(["--resume", "--run", "r"]) == 0
    assert (run / "groups.jsonl").read_text(encoding="utf-8") == before
    assert data_of(run / "report.html")["curves"]["reward"] == data["curves"]["reward"]
    shutil.rmtree(run / "checkpoint")
    (run / "report.html").unlink()
    assert train.main(["--resume", "--run", "r"]) == 1
    assert not (run / "report.html").exists()  # a refusal writes nothing
    capsys.readouterr()
