"""Draw the four figures of the documentation: figures/group.svg, clip.svg, step.svg and prompt.svg.

    python -m studies.figures                # some seconds
    python -m studies.figures --out DIR      # elsewhere
    python -m studies.figures --measure      # seconds and memory of a group with one prompt and with copies of it

Nothing is drawn by hand. The group and its step are the first of `python train.py`, the curves of the clip are what
`grpo.policy_loss` and autograd say. The same code writes the same bytes: no date, no random names.

An SVG here is a card with a ground of its own, in light colours; `prefers-color-scheme: dark` turns them. So it can be
read on any page, also where the page's theme is not the browser's.

Shapes: G completions of one prompt, P prompt tokens, T completion tokens. Coordinates are points, y runs down.
"""

import argparse
import copy
import io
import re
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.textpath import text_to_path
from tokenizers import Tokenizer
from torch import Tensor

import grpo
import task
from config import Config, parse_stages
from model import Transformer, load, token_logprobs
from plumbing.folder import write_text
from plumbing.posts import TINY
from rollout import Group, sample
from train import choose_posts, learning_rate, load_policy, make_optimizer

OUT = Path(__file__).resolve().parents[1] / "figures"
WIDTH, MARGIN = 620.0, 18.0  # points: 827 pixels, about as wide as GitHub shows a page
# What is drawn in light, and what a browser that prefers dark puts in its place. Blue and orange are told apart by
# nearly everybody; what counts also has a sign or a number.
INK, SOFT, FAINT, PAPER, GROUND = "#1f2328", "#57606a", "#d0d7de", "#fcfcfd", "#f1f3f6"
BLUE, ORANGE = "#0a5fb4", "#b4500a"
RARER, LIKELIER = ("#fcead9", "#f8c796", "#ee9a4d"), ("#deecfa", "#aed3f7", "#70b3ef")  # little, more, most
DARK = {INK: "#e6edf3", SOFT: "#9da7b1", FAINT: "#3d444d", PAPER: "#12171e", GROUND: "#1e252e",
        BLUE: "#74b7f7", ORANGE: "#f29a54", **dict(zip(RARER, ("#3a2613", "#6b3d14", "#9c5413"))),
        **dict(zip(LIKELIER, ("#15293f", "#1b4470", "#2564a3")))}
STYLE = {"svg.fonttype": "path",  # letters are drawn, so nobody needs the font; the text stays as comments
         "svg.hashsalt": "crisp", "font.family": "DejaVu Sans", "text.color": INK, "axes.edgecolor": FAINT,
         "axes.labelcolor": SOFT, "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": SOFT,
         "ytick.labelcolor": SOFT, "axes.spines.top": False, "axes.spines.right": False, "font.size": 9.0,
         "axes.facecolor": "none", "text.parse_math": False}
SHORT = {"-": "s", "Mono-": "m", "-Bold-": "b"}  # of a letter's name in the file
SHOWN = 0.03  # a token whose probability has changed by less than this share is left as it is


# --- the first step of the default run --------------------------------------------------------------------------------


@dataclass
class Step:
    """A batch of a real run, and what one update on it did to the tokens of its first group."""

    tokenizer: Tokenizer
    post: task.Post
    groups: list[Group]  # B of them
    after: Tensor  # [G, T] log-probabilities after the update, 0 where the mask is False; group.logp: before it
    advantages: list[float]  # G

    @property
    def group(self) -> Group:
        return self.groups[0]

    def best_and_worst(self) -> tuple[int, int]:
        rewards = self.group.rewards
        return max(range(len(rewards)), key=rewards.__getitem__), min(range(len(rewards)), key=rewards.__getitem__)


def first_step(config: Config, model: Transformer, tokenizer: Tokenizer) -> Step:
    """What `python train.py` does in its first step, as far as its first post shows it. The weights are put back."""
    stages = parse_stages(config.stages)
    posts, _, _ = choose_posts(config, stages, model, tokenizer)
    tasks = task.tasks_of(posts, 0, config, tokenizer)
    groups = sample(model, [each.prompt for each in tasks], G=config.group, max_new_tokens=config.max_new_tokens,
                    temperature=config.temperature, seed=config.seed * 1_000_003, tokenizer=tokenizer)
    task.score(groups, tasks, stages[0].reward, config, tokenizer)
    optimizer = make_optimizer(config, model)
    for parameters in optimizer.param_groups:
        parameters["lr"] = learning_rate(0, stages[-1].end, config)
    weights, group = copy.deepcopy(model.state_dict()), groups[0]
    ref_model = copy.deepcopy(model).requires_grad_(False)
    try:
        grpo.update(model, ref_model, groups, optimizer, config)
        with torch.no_grad():
            after, _ = grpo.group_logprobs(model, [group.prompt], group.tokens[None], group.mask[None],
                                           config.temperature)  # [1, G, T]
    finally:
        model.load_state_dict(weights)  # bit for bit
    A = grpo.advantages(torch.tensor([group.rewards]))[0]  # [G]
    return Step(tokenizer, tasks[0].post, groups, after[0], A.tolist())


@dataclass
class Cell:
    """One token of a completion as it is drawn."""

    text: str
    before: float  # its probability
    after: float
    begins: bool  # a word of its own, and not the rest of one

    @property
    def times(self) -> float:
        return self.after / self.before

    @property
    def shown(self) -> bool:
        return abs(round(self.times, 2) - 1) >= SHOWN


def cells(step: Step, i: int) -> list[Cell]:
    """The tokens of completion i, with the probability of each before and after the step."""
    n = int(step.group.mask[i].sum())
    found = []
    for token, p, q in zip(step.group.tokens[i, :n].tolist(), step.group.logp[i, :n].exp().tolist(),
                           step.after[i, :n].exp().tolist()):
        text = step.tokenizer.decode([token], skip_special_tokens=False)
        begins = text.startswith((" ", "<|")) or not found
        found.append(Cell(text.strip() or "_", p, q, begins))
    return found


# --- a card -----------------------------------------------------------------------------------------------------------


class Card:
    """A figure with a ground of its own, and coordinates in points from its upper left corner."""

    def __init__(self, height: float, title: str, says: str):
        self.height, self.title = height, title
        self.figure = Figure(figsize=(WIDTH / 72, height / 72))
        self.figure.patch.set_alpha(0)  # outside the round corners one sees the page
        self.ax = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
        self.ax.axis("off")
        self.ax.add_patch(FancyBboxPatch((1, 1), WIDTH - 2, height - 2, boxstyle="round,pad=0,rounding_size=8",
                                         facecolor=PAPER, edgecolor=FAINT, linewidth=1))
        self.text(MARGIN, 28, title, size=13, weight="bold")
        for n, line in enumerate(says.splitlines()):
            self.text(MARGIN, 47 + 14 * n, line, color=SOFT)

    def text(self, x: float, y: float, text: str, size: float = 9.5, color: str = INK, **more) -> None:
        """Text whose line stands on y."""
        self.ax.text(x, y, text, fontsize=size, color=color, **({"va": "baseline"} | more))

    def box(self, x: float, y: float, width: float, height: float, color: str, **more) -> None:
        self.ax.add_patch(Rectangle((x, y), width, height, **({"facecolor": color, "linewidth": 0} | more)))

    def line(self, x: tuple, y: tuple, color: str = FAINT, width: float = 1, **more) -> None:
        self.ax.plot(x, y, color=color, linewidth=width, **more)

    def axes(self, x: float, y: float, width: float, height: float, **more):
        """Axes for a curve in this rectangle, with a faint grid."""
        ax = self.figure.add_axes((x / WIDTH, 1 - (y + height) / self.height, width / WIDTH, height / self.height))
        ax.set(**more)
        ax.grid(color=FAINT, linewidth=0.6, alpha=0.6)
        ax.set_axisbelow(True)
        ax.tick_params(length=0, labelsize=9)
        return ax

    def svg(self) -> str:
        """The file's text: matplotlib's with the dark colours beside the light ones, and a fifth shorter."""
        file = io.StringIO()
        self.figure.savefig(file, format="svg", metadata={"Title": self.title, "Date": None, "Creator": None})
        rules = [f'[style*="{what}: {light}"]{{{what}:{dark} !important}}'
                 for light, dark in DARK.items() for what in ("fill", "stroke")]
        text = file.getvalue().replace(
            "</style>", "\n@media (prefers-color-scheme: dark) {\n" + "\n".join(rules) + "\n}\n</style>", 1)
        text = re.sub(r"(?m)^ +| +$", "", text)
        text = re.sub(r"DejaVuSans(-|Mono-|-Bold-)([0-9a-f]+)\b", lambda found: SHORT[found[1]] + found[2], text)
        return re.sub(r"(?<=translate\()[^)]+", lambda found: " ".join(
            f"{float(x):.2f}".rstrip("0").rstrip(".") for x in found[0].split()), text)


def width_of(text: str, size: float, **font) -> float:
    """How many points wide a text is drawn."""
    properties = FontProperties(**({"family": "DejaVu Sans"} | font), size=size)
    return text_to_path.get_text_width_height_descent(text, properties, ismath=False)[0]


def fit(text: str, width: float, lines: int, size: float) -> list[str]:
    """A text in at most so many lines of at most this width; what does not fit becomes an ellipsis."""
    rows = [""]
    for word in text.split():
        longer = f"{rows[-1]} {word}".lstrip()
        if width_of(longer + " …" * (len(rows) == lines), size) <= width:
            rows[-1] = longer
        elif len(rows) == lines:
            return [*rows[:-1], rows[-1] + " …"]
        else:
            rows.append(word)
    return rows


def signed(x: float, digits: int = 2) -> str:
    """A number with a sign that is as wide as a plus.

    >>> signed(1.5), signed(-0.25), signed(0.0)
    ('+1.50', '−0.25', '0.00')
    """
    text = f"{x:+.{digits}f}".replace("-", "−")
    return text[1:] if float(f"{x:.{digits}f}") == 0 else text


# --- 1. the group -----------------------------------------------------------------------------------------------------


def draw_group(step: Step, config: Config) -> str:
    """One prompt and its G completions, best first: how far each is from the group's mean."""
    rewards = torch.tensor(step.group.rewards, dtype=torch.float64)  # [G]
    mean, std = rewards.mean().item(), rewards.std().item()
    top, row = 170.0, 31.0
    bottom = top + row * len(rewards)
    card = Card(bottom + 62, f"One prompt, {len(rewards)} answers: the group is its own baseline",
                f"The first group of the first step of python train.py. The reward is −|tokens − {config.target}| / "
                f"{config.target}.")
    card.box(MARGIN, 60, WIDTH - 2 * MARGIN, 52, GROUND)
    card.text(MARGIN + 8, 76, f"Summarise the post in about {config.target} tokens.", weight="bold", size=9)
    for n, line in enumerate(fit(step.post.document, WIDTH - 2 * MARGIN - 20, 2, 9)):
        card.text(MARGIN + 8, 90 + 13 * n, line, size=9)
    left, right, low, high = 388.0, 556.0, -0.7, 0.0  # where the bars are, in points and in rewards

    def at(reward: float) -> float:
        return round(left + (right - left) * (reward - low) / (high - low), 2)

    for x, name in ((MARGIN, "what the policy wrote"), (318, "tokens"), (370, "reward")):
        card.text(x, top - 16, name, size=9, color=SOFT, ha="left" if x == MARGIN else "right")
    card.text(at(mean), top - 30, "the group's mean", size=9, color=SOFT, ha="center")
    card.text(at(mean), top - 16, signed(mean, 3), size=9, weight="bold", ha="center")
    card.text(WIDTH - MARGIN, top - 30, "advantage", size=9, color=SOFT, ha="right")
    card.text(WIDTH - MARGIN, top - 16, "A", size=9, weight="bold", ha="right")
    for n, i in enumerate(sorted(range(len(rewards)), key=lambda i: -step.group.rewards[i])):
        y, reward, A = top + row * n, step.group.rewards[i], step.advantages[i]
        card.line((MARGIN, WIDTH - MARGIN), (y - 5, y - 5), width=0.6)
        color = BLUE if A > 0 else ORANGE
        lines = fit(step.group.texts[i], 258, 2, 8.5)
        for k, line in enumerate(lines):
            card.text(MARGIN, y + 14 + 6 * (1 - len(lines)) + 12 * k, line, size=8.5)
        card.text(318, y + 14, str(int(step.group.lengths[i])), ha="right")
        card.text(370, y + 14, signed(reward, 3), ha="right")
        card.box(min(at(mean), at(reward)), y + 3, abs(at(reward) - at(mean)), 15, color)
        card.text(WIDTH - MARGIN, y + 14, signed(A), ha="right", weight="bold", color=color if round(A, 2) else INK)
    card.line((at(mean), at(mean)), (top - 10, bottom - 4), color=INK, width=1.2)
    for reward in (-0.6, -0.4, -0.2, 0.0):
        card.line((at(reward), at(reward)), (bottom - 6, bottom - 2), color=SOFT, width=0.8)
        card.text(at(reward), bottom + 9, signed(reward, 1), size=8.5, color=SOFT, ha="center")
    card.text(at(high) + 14, bottom + 9, "reward", size=8.5, color=SOFT)
    up = sum(round(A, 2) > 0 for A in step.advantages)
    card.text(MARGIN, bottom + 29, f"A = (reward − mean) / std, where the std is {std:.3f}. No reward is above 0, and "
              f"yet {up} answers are pushed up:", size=9)
    card.text(MARGIN, bottom + 43, "those that did better than the others of their prompt. The advantages sum to 0.",
              size=9)
    return card.svg()


# --- 2. the clip ------------------------------------------------------------------------------------------------------


def objective(ratio: float, A: float) -> tuple[float, float]:
    """-> (min(ratio A, clip(ratio) A), its gradient by logp), as `policy_loss` and autograd compute them.

    >>> [round(x, 6) for x in objective(1.5, 1.0)], [round(x, 6) for x in objective(1.5, -1.0)]
    ([1.2, 0.0], [-1.5, -1.5])
    """
    logp = torch.tensor([[[ratio]]], dtype=torch.float64).log().requires_grad_()  # [B=1, G=1, T=1]
    old, mask = torch.zeros_like(logp), torch.ones_like(logp, dtype=torch.bool)  # [1, 1, 1] each
    loss, _ = grpo.policy_loss(logp, old, None, torch.tensor([[A]], dtype=torch.float64), mask)
    gradient, = torch.autograd.grad(loss, logp)  # [1, 1, 1]
    return -loss.item(), 0.0 - gradient.item()  # 0 - 0 is 0, and -0 would be written as such


# (rho, A) -> what grpo.py's table says of this case, and where it stands
CASES = {(1.5, 1.0): ("already much likelier:\nenough", 1.6, 0.78),
         (0.5, 1.0): ("good, but became rarer:\ntake it back", 0.52, 1.32),
         (1.5, -1.0): ("bad, but became likelier:\ntake it back", 1.53, -0.74),
         (0.5, -1.0): ("already much rarer:\nenough", 0.4, -1.28)}


def draw_clip(config: Config) -> str:
    """The objective and its gradient against the ratio, for A = 1 and A = -1, and the four cases of grpo.py."""
    card = Card(452, "The clip: where a token's gradient flows, and where it stops",
                "ρ says how many times likelier the policy makes a token now than when it sampled it. Thick: the "
                "gradient flows.\nDashed: it stops. Thin: ρA, which has no clip. Every point is computed by "
                "grpo.policy_loss and autograd.")
    low, high = 1 - config.clip_low, 1 + config.clip_high
    beside = {kink + side for kink in (low, high) for side in (-1e-6, 1e-6)}  # at the kink itself there are two slopes
    ratios = sorted({n / 50 for n in range(1, 101)} - {low, high} | beside)
    for column, A in enumerate((1.0, -1.0)):
        x, color = (54.0, 354.0)[column], (BLUE, ORANGE)[column]
        seen = {ratio: objective(ratio, A) for ratio in ratios}
        card.text(x, 92, ("A = +1: better than its group", "A = −1: worse than its group")[column], size=10.5,
                  weight="bold", color=color)
        for row, name in enumerate(("min(ρA, clip(ρ) A)", "its gradient by log π")):
            ax = card.axes(x, (106.0, 276.0)[row], 248, 134, xlim=(0, 2.02),
                           ylim=(-0.12, 2.1) if A > 0 else (-2.1, 0.12))
            ax.set_xticks([0, 0.5, low, 1, high, 1.5, 2], ["0", "0.5", f"{low:g}", "1", f"{high:g}", "1.5", "2"])
            ax.set_yticks([0, A, 2 * A], ["0", signed(A, 0), signed(2 * A, 0)])
            ax.axvspan(low, high, color=GROUND, linewidth=0, zorder=0)
            if column == 0:
                ax.set_ylabel(name, fontsize=9.5, color=INK)
            if row == 1:
                ax.set_xlabel("ρ = π / π_old", fontsize=9.5, color=INK)
            else:
                ax.plot([0, 2], [0, 2 * A], color=SOFT, linewidth=0.9)
            for flows, style, width in ((True, "-", 3.2), (False, (0, (2.2, 1.6)), 2.2)):
                part = [ratio for ratio in ratios if bool(seen[ratio][1]) == flows]
                ax.plot(part, [round(seen[ratio][row], 4) for ratio in part], color=color, linewidth=width,
                        linestyle=style, solid_capstyle="butt", dash_capstyle="butt")
            for (ratio, of), (words, *at) in CASES.items():
                if of == A:
                    y = objective(ratio, A)[row]
                    ax.plot([ratio], [y], "o", color=color, markersize=8, markeredgecolor=PAPER, markeredgewidth=1.5)
                    if row == 0:
                        ax.text(*at, words, fontsize=8.5, ha="center", va="center", linespacing=1.4)
                    else:
                        ax.text(ratio, y + (0.2 if A > 0 else -0.22), signed(y, 1) if y else "0", fontsize=9.5,
                                weight="bold", ha="center", va="center")
    return card.svg()


# --- 3. the step ------------------------------------------------------------------------------------------------------


def color_of(times: float) -> str:
    """The ground of a token that became so many times likelier."""
    factor, colors = max(times, 1 / times), LIKELIER if times > 1 else RARER
    return colors[(factor >= 1.1) + (factor >= 1.4)]


def percent(p: float) -> str:
    return f"{100 * p:.{int(p < 0.0995)}f}"


def lay_out(row: list[Cell], width: float, letter: float) -> list[list[tuple[Cell, float, float]]]:
    """Cells in lines that are no wider than this -> for each line its cells, each with its x and its width."""
    wide = [max(letter * len(cell.text) + 3, 37.0 if cell.shown else 0) for cell in row]  # room for the numbers
    lines, x = [[]], 0.0
    for n, cell in enumerate(row):
        if cell.begins and lines[-1]:
            x += 5
            end = next((k for k in range(n + 1, len(row)) if row[k].begins), len(row))
            if x + sum(wide[n:end]) + end - n > width:  # the word does not fit
                lines.append([])
                x = 0.0
        lines[-1].append((cell, x, wide[n]))
        x += wide[n] + 1
    return lines


def draw_step(step: Step, config: Config) -> str:
    """The best and the worst completion, token by token: how much likelier one update made each of them."""
    size, height = 9.5, 46.0
    letter = width_of("m", size, family="DejaVu Sans Mono")
    rows = {i: lay_out(cells(step, i), WIDTH - 2 * MARGIN, letter) for i in step.best_and_worst()}
    card = Card(118 + sum(28 + height * len(lines) for lines in rows.values()),
                "What one step does to the tokens of the best and the worst answer",
                "The first step of python train.py, its first post. Under a token: how many times likelier the step "
                "made it, and its\nprobability before and after, in per cent. Where no number stands, it changed by "
                "less than 3%.")
    y = 92.0
    for (i, lines), name in zip(rows.items(), ("Best", "Worst")):
        gain = ((step.after[i] - step.group.logp[i]) * step.group.mask[i]).sum().exp().item()
        head = f"{name} of {len(step.advantages)}: A = {signed(step.advantages[i])}"
        card.text(MARGIN, y, head, size=10.5, weight="bold", color=BLUE if step.advantages[i] > 0 else ORANGE)
        card.text(MARGIN + width_of(head, 10.5, weight="bold") + 14, y, f"{int(step.group.lengths[i])} tokens, where "
                  f"{config.target} are wanted. The whole answer became {gain:.2f} times as likely.", color=SOFT)
        y += 12
        for line in lines:
            for cell, x, wide in line:
                x += MARGIN
                card.box(x, y, wide, 17, color_of(cell.times) if cell.shown else GROUND)
                card.text(x + wide / 2, y + 12, cell.text, size=size, family="DejaVu Sans Mono", ha="center")
                if cell.shown:
                    card.text(x + wide / 2, y + 28, f"×{cell.times:.2f}", size=8.5, weight="bold", ha="center",
                              color=BLUE if cell.times > 1 else ORANGE)
                    card.text(x + wide / 2, y + 39, f"{percent(cell.before)}→{percent(cell.after)}", size=8, color=SOFT,
                              ha="center")
            y += height
        y += 16
    card.text(MARGIN, y + 6, "rarer", color=ORANGE, weight="bold")
    for n, color in enumerate((*reversed(RARER), GROUND, *LIKELIER)):
        card.box(MARGIN + 38 + 20 * n, y - 4, 18, 12, color)
    card.text(MARGIN + 184, y + 6, "likelier", color=BLUE, weight="bold")
    card.text(MARGIN + 250, y + 6, "A piece of a word touches the next one. <|im_end|> is the stop token.", size=9,
              color=SOFT)
    return card.svg()


# --- 4. the prompt ----------------------------------------------------------------------------------------------------

P, G, T = 384, 8, 64  # as in docs/speed.md
# G -> how many times the seconds of a processor, and the bytes kept for the backward pass, copies of the prompt take:
# python -m studies.figures --measure, one thread of a shared AMD EPYC. (Seconds vary by a tenth, bytes do not.)
MEASURED = {1: (0.95, 0.99), 2: (1.46, 1.54), 4: (2.32, 2.31), 8: (3.25, 3.22), 16: (4.07, 4.06), 32: (4.63, 4.69)}


def times_the_tokens(n: int) -> float:
    """How many times as many tokens copies of the prompt push through the model, with n completions."""
    return n * (P + T) / (P + n * T)


def copied_logprobs(model: Transformer, prompt: Tensor, tokens: Tensor) -> Tensor:
    """What `grpo.group_logprobs` computes, [G, T], from G copies of prompt [P] in front of tokens [G, T]."""
    text = torch.cat([prompt.expand(len(tokens), -1), tokens], 1)  # [G, P+T]
    states = model.hidden(text)[:, len(prompt) - 1:-1]  # [G, T, D]
    return token_logprobs(model, states, tokens)[0]


def kept(run) -> tuple[Tensor, int]:
    """-> (what run() returns, the bytes that autograd keeps for its backward pass, the weights not counted)."""
    storages: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if not isinstance(x, torch.nn.Parameter):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = run()
    return result, sum(storages.values())


def measure(sizes=tuple(MEASURED), rounds: int = 5) -> dict[int, tuple[float, float]]:
    """The embedded model, forward and backward, one prompt against copies -> {G: (times the seconds, the bytes)}."""
    model, _ = load(TINY, "cpu")
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 2000, (P,), generator=generator)  # [P]
    found = {}
    for n in sizes:
        tokens = torch.randint(3, 2000, (n, T), generator=generator)  # [G, T]
        mask = torch.ones_like(tokens, dtype=torch.bool)  # [G, T]
        ways = (lambda: grpo.group_logprobs(model, [prompt], tokens[None], mask[None])[0],  # noqa: B023
                lambda: copied_logprobs(model, prompt, tokens))  # noqa: B023
        memory = [kept(way)[1] for way in ways]
        seconds = [[], []]
        for _ in range(rounds):  # in turns: what else the machine does meets both
            for took, way in zip(seconds, ways):
                begun = time.process_time()
                way().sum().backward()
                took.append(time.process_time() - begun)
        one, copies = (min(took) for took in seconds)
        found[n] = (copies / one, memory[1] / memory[0])
        print(f"G = {n:2}: {P + n * T:6,} tokens, {one:.3f} s, {memory[0] / 2 ** 20:6.1f} MiB; copies "
              f"{n * (P + T):6,} tokens, {copies:.3f} s, {memory[1] / 2 ** 20:6.1f} MiB. Times: tokens "
              f"{times_the_tokens(n):.2f}, seconds {found[n][0]:.2f}, bytes {found[n][1]:.2f}", flush=True)
    return found


def draw_prompt() -> str:
    """The tokens of a group to scale, both ways, and how many times more copies cost as the group grows."""
    card = Card(318, "One prompt for its group, or a copy for each answer",
                f"Left, to scale: what an update pushes through the model, with a prompt of P = {P} tokens (grey) and "
                f"{G}\ncompletions of T = {T} (blue). Right: what copies cost, with the embedded model, forward and "
                "backward.")
    scale, thick, rows = 270 / (P + T), 7.0, [11.0 * n for n in range(G)]
    x = MARGIN + P * scale  # where completions begin
    for y, name, count, prompts in ((92, "shared, as here", f"P + G T = {P + G * T:,} tokens", rows[:1]),
                                    (206, "copies", f"G (P + T) = {G * (P + T):,} tokens", rows)):
        card.text(MARGIN, y, name, size=10, weight="bold")
        card.text(MARGIN + 270, y, count, ha="right")
        for row in rows:
            card.box(x, y + 8 + row, T * scale, thick, BLUE)
            if row in prompts:
                card.box(MARGIN, y + 8 + row, P * scale - 2, thick, SOFT)
            else:  # hangs on the one prompt
                card.line((x - 6, x - 6, x - 2), (y + 8 + thick, y + 8 + row + thick / 2, y + 8 + row + thick / 2),
                          color=SOFT, width=0.9)
    sizes = list(MEASURED)
    ax = card.axes(338, 106, 260, 152, xlim=(-0.25, len(sizes) - 0.75), ylim=(0, 6.6))
    ax.set_xticks(range(len(sizes)), [str(n) for n in sizes])
    ax.set_yticks(range(7), ["0", *(f"{n}×" for n in range(1, 7))])
    ax.set_xlabel("completions of a prompt, G", fontsize=9.5, color=INK)
    card.text(318, 92, "copies : shared", size=10, weight="bold")
    lines = [ax.plot([times_the_tokens(n) for n in sizes], color=INK, linewidth=1.4)]
    for of, marker, color, size in ((0, "o", BLUE, 9), (1, "s", ORANGE, 5)):
        lines.append(ax.plot([MEASURED[n][of] for n in sizes], marker, color=color, markersize=size, markeredgewidth=0))
    ax.legend([line for line, in lines], ["tokens", "seconds", "bytes kept for the backward pass"], fontsize=9,
              loc="upper left", frameon=False, borderaxespad=0.1, handlelength=1.5)
    return card.svg()


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m studies.figures", description=__doc__.partition("\nShapes")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where to (default: figures/)")
    parser.add_argument("--measure", action="store_true", help="print what the fourth figure shows, and draw nothing")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.measure:
        measure()
        return
    config = Config(device="cpu")
    step = first_step(config, *load_policy(config))
    with matplotlib.rc_context(STYLE):
        drawn = {"group": draw_group(step, config), "clip": draw_clip(config), "step": draw_step(step, config),
                 "prompt": draw_prompt()}
    args.out.mkdir(parents=True, exist_ok=True)
    for name, text in drawn.items():
        write_text(args.out / f"{name}.svg", text)
        print(f"{args.out / name}.svg: {len(text) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
