"""A teacher, as a lesson: which gradient its advantages have, whose words it knows, and what a run with it is.

The oracles: a policy so small that every text it may write is made, autograd's gradient of the exact KL, and numbers
done by hand.
"""

import itertools
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import OUR_LOSSES, byte_bpe, raw_config, tiny_model, tokens
from torch import tensor
from torch.nn.utils import parameters_to_vector
from torch.testing import assert_close

import grpo
import train
from config import Config, check
from grpo import KINDS, group_logprobs, micro_batches, policy_loss, update
from model import Transformer, load, read_config, save
from plumbing.groups import keeping_groups
from plumbing.rehearsal import rehearse_largest_step
from plumbing.symptoms import symptoms
from plumbing.teacher import load_teacher, refuse_other_words
from rollout import Group

V = 3  # words of the policy that is small enough to make all its texts
NAN = float("nan")


def close(a, b, atol=1e-12):
    assert_close(a, b, rtol=0, atol=atol, check_dtype=False)


# ------------------------------------------------------------------------------------- whose gradient it is, exactly


def tables(seed):
    """A policy over texts of two words: logits of the first one [V], and of the second after each first one [V, V]."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, dtype=torch.float64, generator=g, requires_grad=True) for shape in ((V,), (V, V))]


def logp_of(policy, text):
    first, second = policy
    return torch.stack([first.log_softmax(0)[text[0]], second[text[0]].log_softmax(0)[text[1]]])  # [2]


def expected_gradient(policy, advantages_of):
    """The mean of policy_loss's gradient over all texts, each by its probability; the loss is a sum over tokens."""
    total = 0.0
    for text in itertools.product(range(V), repeat=2):
        logp = logp_of(policy, text)[None, None]  # [B=1, G=1, T=2]
        A = advantages_of(text, logp.detach())  # [1, 1, 2]
        loss, _ = policy_loss(logp, None, None, A, torch.ones(1, 1, 2) > 0, "dr_grpo", max_length=1)
        total = total + logp.sum().exp().detach() * loss
    return torch.autograd.grad(total, policy)


def divergence(p, q):
    """KL between the words of two rows of logits, exactly."""
    return (p.softmax(0) * (p.log_softmax(0) - q.log_softmax(0))).sum()


def test_the_expected_gradient_is_that_of_the_reverse_kl():
    """Every text is made, so there is no luck in it. The KL is KL(pi || teacher) of each token, whose prefix is the
    policy's own and taken as given. It is not the other one, KL(teacher || pi), which imitation has."""
    policy, teacher = tables(0), tables(1)
    found = expected_gradient(policy, lambda text, logp: logp_of(teacher, text).detach() - logp)

    def by_token(kl):
        prefix = policy[0].softmax(0).detach()  # [V]: how often the policy begins with each word
        return kl(policy[0], teacher[0]) + sum(p * kl(policy[1][i], teacher[1][i]) for i, p in enumerate(prefix))

    for mine, exact in zip(found, torch.autograd.grad(by_token(divergence), policy), strict=True):
        close(mine, exact)
    other = torch.autograd.grad(by_token(lambda p, q: divergence(q, p)), policy)
    assert max((a - b).abs().max() for a, b in zip(found, other)) > 0.1


def test_what_a_token_brings_on_later_is_left_out():
    """The KL of whole texts also depends on which first word leads where. With advantages that are sums over the
    tokens that follow, the gradient is that KL's; with a token's own it is not. A last token has none that follow."""
    policy, teacher = tables(0), tables(1)
    texts = list(itertools.product(range(V), repeat=2))
    whole = sum(logp_of(policy, t).sum().exp() * (logp_of(policy, t) - logp_of(teacher, t)).sum() for t in texts)
    exact = torch.autograd.grad(whole, policy)

    def gain(text, logp):
        return logp_of(teacher, text).detach() - logp  # [1, 1, 2]

    sums = expected_gradient(policy, lambda text, logp: gain(text, logp).flip(-1).cumsum(-1).flip(-1))
    own = expected_gradient(policy, gain)
    close(sums[0], exact[0])
    close(sums[1], exact[1])
    close(own[1], exact[1])
    assert (own[0] - exact[0]).abs().max() > 0.01


def test_a_constant_in_the_advantage_cancels():
    """log pi - log teacher + 1 is the derivative of the KL: the 1 has no expected gradient, as no baseline has."""
    policy, teacher = tables(0), tables(1)
    one, other = (expected_gradient(policy, lambda text, logp, c=c: logp_of(teacher, text).detach() - logp - c)
                  for c in (0, 1))
    close(one[0], other[0])
    close(one[1], other[1])


# ------------------------------------------------------------------------------------ advantages of tokens in the loss


def batch(seed=0, B=2, G=3, T=4):
    """Policies apart, completions of 1 to T tokens, NaN on all padding -> logp, old_logp, ref_logp, mask."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, G, 1), generator=g)  # [B, G, T]
    mask[0, 0] = True
    logp = -3 * torch.rand(B, G, T, dtype=torch.float64, generator=g)
    old, ref = (logp + 0.8 * torch.randn(B, G, T, dtype=torch.float64, generator=g) for _ in range(2))
    return *(x.masked_fill(~mask, NAN) for x in (logp, old, ref)), mask


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("kind", list(KINDS))
def test_equal_advantages_of_tokens_are_that_of_the_completion(kind, beta):
    """[B, G, T] that is constant over T says what [B, G] says: the loss, its gradient and the metrics, in every kind
    and off policy. NaN on the padding of any of them changes nothing."""
    logp, old, ref, mask = batch()
    logp.requires_grad_()
    A = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    by_token = A[..., None].expand_as(logp).masked_fill(~mask, NAN)
    settings = {"kind": kind, "beta": beta, "kl": "k2", "max_length": 9, "clip_high": 0.28}
    (one, seen), (other, seen_too) = (policy_loss(logp, old, ref, a, mask, **settings) for a in (A, by_token))
    close(one, other)
    close(torch.autograd.grad(one, logp)[0], torch.autograd.grad(other, logp)[0])
    assert seen == seen_too and 0 < seen["clip_frac"] < 1


@pytest.mark.parametrize("kind", OUR_LOSSES)
def test_a_token_is_paid_by_its_own_advantage(kind):
    """On policy, two completions of 1 and 3 tokens: minus A over the divisor. In gspo, too, where a sequence has one
    ratio: were the ratio's own gradient taken, all three tokens would get the mean of 1, -2 and 4."""
    A = tensor([[[3.0, 7.0, 7.0], [1.0, -2.0, 4.0]]], dtype=torch.float64)
    mask = tensor([[[True, False, False], [True, True, True]]])
    logp = torch.full((1, 2, 3), -1.0, dtype=torch.float64, requires_grad=True)
    loss, _ = policy_loss(logp, None, None, A, mask, kind, max_length=5)
    divisor = {"completions": tensor([2.0, 6, 6, 6]), "constant": 10.0, "tokens": 4.0}[KINDS[kind][2]]
    close(torch.autograd.grad(loss, logp)[0][mask], -tensor([3.0, 1, -2, 4]).double() / divisor)


def test_gspo_clips_by_the_sequence_and_pays_by_the_token():
    """Three tokens whose log-ratios are 0.9, 0 and 0: the sequence's ratio is e^0.3 = 1.35, above 1.2. A token of
    A > 0 has followed far enough; the others keep 1.35 A / 3. (Zheng et al. 2025, GSPO-token.)"""
    logp = tensor([[[-1.0, -2.0, -3.0]]], dtype=torch.float64, requires_grad=True)
    old = logp.detach() - tensor([0.9, 0.0, 0.0], dtype=torch.float64)
    A = tensor([[[2.0, -1.0, -4.0]]], dtype=torch.float64)
    loss, seen = policy_loss(logp, old, None, A, torch.ones(1, 1, 3) > 0, "gspo")
    rho = tensor(0.3, dtype=torch.float64).exp()
    close(loss, -(1.2 * 2 - rho * 5) / 3)
    close(torch.autograd.grad(loss, logp)[0], tensor([[[0.0, 1, 4]]]).double() * rho / 3)
    assert seen["clip_frac"] == pytest.approx(1 / 3) and seen["ratio"] == pytest.approx(rho.item())


# -------------------------------------------------------------------------------------------------------- one update


def groups_of(lengths=((3, 5, 2, 4), (6, 1, 1, 3)), vocab=40):
    found = []
    for b, row in enumerate(lengths):
        mask = torch.arange(max(row)) < tensor(row)[:, None]  # [G, T]
        found.append(Group(tokens(1, 4 + b, seed=b)[0], tokens(4, max(row), seed=9 + b, vocab=vocab) * mask, mask,
                           torch.zeros(mask.shape), mask[:, 0], [""] * 4, tensor([1.0, 0.0, 2.0, -1.0])))
    return found


def student():
    return tiny_model(dtype=torch.float64)


def other_model():
    return tiny_model(seed=1, dtype=torch.float64).requires_grad_(False)


def step(config, teacher, groups=None, lr=0.5):
    """One update with plain gradient descent -> (how the weights moved, the metrics)."""
    model = student()
    before = parameters_to_vector(model.parameters()).detach().clone()
    seen = update(model, None, groups or groups_of(), torch.optim.SGD(model.parameters(), lr), config, teacher)
    return parameters_to_vector(model.parameters()).detach() - before, seen


def settings(**more):
    return Config(**{"beta": 0.0, "grad_clip": 1e9, "max_new_tokens": 9, "temperature": 0.7} | more)


def test_an_update_by_the_book():
    """Full copies, one completion at a time and no cache: minus the mean over completions, and in each over tokens,
    of (log teacher - log pi) log pi, of which only the last factor is differentiated."""
    model, teacher, total, gaps = student(), other_model(), 0.0, []
    for group in groups_of():
        for row, n in zip(group.tokens, group.mask.sum(1)):
            text = torch.cat([group.prompt, row[:n]])[None]  # [1, P + n]
            mine, its = ((m(text[:, :-1])[0, -n:] / 0.7).log_softmax(-1).gather(1, row[:n, None])[:, 0]
                         for m in (model, teacher))  # [n] each
            gaps += (mine - its).tolist()
            total = total - ((its - mine).detach() * mine).mean() / 8
    slopes = torch.autograd.grad(total, list(model.parameters()))
    moved, seen = step(settings(), teacher)
    close(moved, -0.5 * parameters_to_vector(slopes), 1e-7)  # advantages of rewards are float32, and times 0 here
    assert seen["teacher_kl"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_policy_as_its_own_teacher_has_nothing_to_teach(temperature):
    """All advantages are exactly 0, at any temperature, since both are divided by it: no gradient, no step. The
    rewards are measured all the same."""
    moved, seen = step(settings(temperature=temperature), student())
    assert seen["teacher_kl"] == 0 and seen["grad_norm"] == 0 and (moved == 0).all() and seen["flat_groups"] == 0


@pytest.mark.parametrize("kind", ["grpo", "gspo", "cispo"])
def test_half_a_teacher_is_half_of_both(kind):
    """On policy the gradient is linear in the advantages, so a weight of 0.5 moves by the mean of the two steps."""
    alone, half, off = (step(settings(loss=kind, teacher_weight=w), other_model())[0] for w in (1.0, 0.5, 0.0))
    close(half, (alone + off) / 2)
    close(off, step(settings(loss=kind), None)[0])
    assert (alone - off).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["grpo", "gspo", "dapo"])
def test_a_teacher_is_asked_once_a_batch_and_whatever_the_memory(kind):
    """Three updates on a batch: the advantages stay those of the policy that wrote. Cut in pieces, all is the same."""
    asked = []
    teacher = other_model()
    teacher.hidden = lambda *args, real=teacher.hidden: asked.append(1) or real(*args)
    results = [step(settings(loss=kind, updates=3, micro_tokens=m, teacher_weight=0.7), teacher, lr=0.1)
               for m in (10 ** 6, 20, 1)]
    pieces = [len(micro_batches(groups_of(), torch.zeros(2, 4), m)) for m in (10 ** 6, 20, 1)]
    assert pieces[0] == 1 < pieces[1] < pieces[2] == 8
    assert len(asked) == 2 * sum(pieces)  # the prompts, then their completions
    for moved, seen in results[1:]:
        close(moved, results[0][0], 1e-10)
        assert seen == pytest.approx(results[0][1], abs=1e-7)


def test_flat_groups_learn_from_a_teacher_and_not_from_one_without_weight():
    """AdamW is warm: were a step taken without a gradient, momentum and weight decay would move the weights."""
    for weight in (1.0, 0.5, 0.0):
        model = student()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        update(model, None, groups_of(), optimizer, settings())
        flat = groups_of()
        for group in flat:
            group.rewards = torch.zeros(4)
        before = parameters_to_vector(model.parameters()).clone()
        seen = update(model, None, flat, optimizer, settings(teacher_weight=weight), other_model())
        assert seen["flat_groups"] == 1 and seen["teacher_kl"] != 0
        assert (not parameters_to_vector(model.parameters()).equal(before)) == (seen["grad_norm"] > 0) == (weight > 0)


def test_an_update_makes_the_policy_more_like_its_teacher():
    """Sampled from the policy itself, so that the gradient is the KL's: the exact KL after these prompts falls."""
    from rollout import sample
    model, teacher = tiny_model(), tiny_model(seed=3).requires_grad_(False)
    prompts = [tokens(1, 5, seed=b)[0] for b in range(4)]

    def exact():
        with torch.no_grad():
            logits = [[m(p[None])[0, -1] for m in (model, teacher)] for p in prompts]
        return sum(divergence(p, q).item() for p, q in logits) / 4

    before = exact()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for s in range(20):
        groups = sample(model, prompts, G=16, max_new_tokens=1, stop_ids=[], seed=s)
        for group in groups:
            group.rewards = torch.zeros(16)
        update(model, None, groups, optimizer, Config(beta=0.0), teacher)
    assert exact() < before / 2


# ------------------------------------------------------------------------------------------------------------- words


def with_vocab(n, seed=0):
    return tiny_model(vocab_size=n, seed=seed)


def test_a_teacher_must_know_the_policy_s_words():
    """The tokenizers' tables are compared, not their sizes: a table of the same length may number other words."""
    tokenizer = byte_bpe()
    n = tokenizer.get_vocab_size()
    same = ("t", (with_vocab(n), byte_bpe()), "p", (with_vocab(n), tokenizer))
    refuse_other_words(*same)
    refuse_other_words("t", (with_vocab(n + 8), byte_bpe()), "p", (with_vocab(n), tokenizer))  # rows that pad
    with pytest.raises(ValueError, match=f"--teacher t predicts {n} words, and p {n + 8}"):
        refuse_other_words("t", (with_vocab(n), byte_bpe()), "p", (with_vocab(n + 8), tokenizer))
    more = byte_bpe()
    more.add_tokens(["brandnew"])
    with pytest.raises(ValueError, match=f"token {n} means 'brandnew' and nothing, and 1 tokens in all differ"):
        refuse_other_words("t", (with_vocab(n + 8), more), "p", (with_vocab(n), tokenizer))
    swapped = json.loads(byte_bpe().to_str())
    vocab = swapped["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    other = type(tokenizer).from_str(json.dumps(swapped))
    assert other.get_vocab_size() == n
    with pytest.raises(ValueError, match="means '[ab]' and '[ab]', and 2 tokens in all differ. Take a teacher of"):
        refuse_other_words("t", (with_vocab(n), other), "p", (with_vocab(n), tokenizer))


@pytest.mark.parametrize("more, says", [
    ({"teacher": "tiny", "backend": "mlx"}, "--teacher needs --backend torch"),
    ({"teacher": "tiny", "teacher_weight": 1.5}, r"--teacher-weight 1.5: a share lies in \[0, 1\]"),
    ({"teacher": "tiny", "teacher_weight": -0.1}, r"--teacher-weight -0.1: a share lies in \[0, 1\]"),
    ({"teacher": "tiny", "teacher_weight": NAN}, "--teacher-weight nan: a share lies"),
    ({"teacher_weight": 0.5}, "name one with --teacher"),
])
def test_settings_that_cannot_work_are_refused(more, says):
    with pytest.raises(ValueError, match=says):
        check(Config(**more))
    check(Config(teacher="tiny", teacher_weight=0.5))


def test_no_teacher_loads_nothing():
    assert load_teacher(Config(), None, None, load=None) is None


# ----------------------------------------------------------------------------------------------------- memory, report


def test_a_teacher_takes_part_in_the_rehearsal(monkeypatch):
    seen, real = [], grpo.group_logprobs
    monkeypatch.setattr(grpo, "group_logprobs", lambda model, *args: seen.append(model) or real(model, *args))
    policy, ref_model, teacher = (tiny_model() for _ in range(3))
    few = SimpleNamespace(group=4, max_new_tokens=6, micro_tokens=100, checkpointing=False)
    rehearse_largest_step(policy, ref_model, [[1, 2, 3]], few, free=0, grpo=grpo, teacher=teacher)
    assert seen == [ref_model, teacher, policy]


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_report_shows_what_the_teacher_paid_each_token(tmp_path, weight):
    """In dapo, before the update, a token's weight is its advantage. A completion's is the mean over its tokens."""
    model, teacher = tiny_model(vocab_size=400), tiny_model(vocab_size=400, seed=1)
    group = groups_of(((3, 5, 2, 4),))[0]
    group.parts, group.weights = {"length": group.rewards.tolist()}, {"length": 1.0}
    c = Config(group=4, prompts=1, max_new_tokens=5, beta=0.0, loss="dapo", teacher_weight=weight)
    stage = SimpleNamespace(number=1, end=99)
    log = SimpleNamespace(folder=tmp_path, config=c, total=99, stages=[stage], keeping=lambda *_: nullcontext())
    mine, its = (group_logprobs(m, [group.prompt], group.tokens[None], group.mask[None])[0][0].detach()
                 for m in (model, teacher))  # [G, T] each
    want = weight * (its - mine) + (1 - weight) * grpo.advantages(group.rewards[None])[0][:, None]  # [G, T]
    with keeping_groups(log, 1, [group], model=model, ref_model=None, tokenizer=byte_bpe(), grpo=grpo,
                        teacher=teacher):
        update(model, None, [group], torch.optim.SGD(model.parameters(), 0.1), c, teacher)
    row = json.loads((tmp_path / "groups.jsonl").read_text(encoding="utf-8"))
    for g, one in enumerate(sorted(row["groups"][0]["completions"], key=lambda one: one["number"])):
        n = int(group.mask[g].sum())
        assert one["weights"]["dapo"][0] == pytest.approx(want[g, :n].tolist(), abs=0.01, rel=0.01)
        assert one["advantage"] == pytest.approx(want[g, :n].mean().item(), abs=1e-3)


def test_equal_rewards_are_no_symptom_where_a_teacher_pays():
    row = {"flat_groups": 1.0, "length": 40.0, "reward": 0.0, "reward_std": 0.0, "entropy": 0.3, "kl": 0.1,
           "grad_norm": 0.3, "logp_gap": 1e-6, "stage": 1}
    assert "teach nothing" in symptoms([row] * 30, Config())[0]
    assert symptoms([row | {"teacher_kl": 0.2}] * 30, Config()) == []


# ----------------------------------------------------------------------------------------------------------- a run

SMALL = ["--prompts", "2", "--group", "4", "--target", "6", "--eval-posts", "4", "--lr", "1e-2", "--save-every", "2",
         "--model", "m", "--stages", "length:4", "--run", "r"]


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    """Two random models of one narrow layer with the embedded one's words: m, and t, which is to teach it."""
    monkeypatch.chdir(tmp_path)
    tokenizer = load(train.TINY)[1]
    raw = json.loads((train.TINY / "config.json").read_text(encoding="utf-8")) | {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1}
    for seed, name in enumerate("mt"):
        torch.manual_seed(seed)
        model = Transformer(read_config(raw, "test"))
        for p in model.parameters():
            if p.ndim == 2:
                torch.nn.init.normal_(p.data, std=0.5)
        model.head.data[tokenizer.token_to_id("<|im_end|>")] *= 8  # now and then it ends, or lengths would be equal
        model.raw_config = raw
        save(model, tokenizer, name)
    return tmp_path


def lines(run):
    rows = [json.loads(line) for line in Path("runs", run, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name not in ("seconds", "tokens_per_s")} for row in rows]


def test_a_run_with_a_teacher_resumes_bit_for_bit_and_with_no_other(cwd, capsys):
    assert train.main([*SMALL, "--teacher", "t", "--teacher-weight", "0.5", "--updates", "2"]) == 0
    assert " kl teacher entropy " in capsys.readouterr().out  # a column of its own
    assert all(row["teacher_kl"] != 0 for row in lines("r"))
    assert "teacher" in json.loads(Path("runs/r/config.json").read_text(encoding="utf-8"))["made_of"]
    whole = lines("r"), Path("runs/r/model/model.safetensors").read_bytes()
    Path("runs/r/checkpoint/state.pt").unlink()  # the one before it is of step 2
    shutil.copytree("t", "its")
    save(load("m")[0], None, "t")
    assert train.main(["--resume", "--run", "r"]) == 1
    assert "was begun with other teacher than there are now" in capsys.readouterr().err
    shutil.rmtree("t")
    shutil.move("its", "t")
    assert train.main(["--resume", "--run", "r"]) == 0
    assert (lines("r"), Path("runs/r/model/model.safetensors").read_bytes()) == whole


def test_a_run_may_teach_and_a_lean_one_too(cwd, capsys):
    """--teacher takes a run, as `load` does, and under --lean it is read in bfloat16, like all models of a run."""
    assert train.main(SMALL) == 0
    flags = [*SMALL[:-1], "s", "--teacher", "runs/r", "--beta", "0"]
    assert train.main(flags) == 0
    assert [row["kl"] for row in lines("s")] == [None] * 4 and lines("s")[0]["teacher_kl"] > 0
    assert train.main([*flags[:-1], "0.1", "--run", "lean", "--lean", "--lora", "2"]) == 0
    assert lines("lean")[0]["teacher_kl"] == pytest.approx(lines("s")[0]["teacher_kl"], abs=0.3)


def test_another_vocabulary_ends_a_run_before_it_begins(cwd, capsys):
    model = tiny_model(vocab_size=400)
    model.raw_config = raw_config(vocab_size=400)
    save(model, byte_bpe(), "foreign")
    assert train.main([*SMALL, "--teacher", "foreign"]) == 1
    assert "--teacher foreign has another vocabulary than m: token " in capsys.readouterr().err
    assert not Path("runs").exists()
