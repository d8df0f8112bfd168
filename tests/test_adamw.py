"""AdamW by hand: torch's own in float32, and in bfloat16 without forgetting."""

import pytest
import torch

from plumbing import adamw
from plumbing.adamw import AdamW, round_at_random


def descend(optimizer_of, dtype=torch.float32, steps=20, seed=0):
    """Some steps on a bowl; the parameters, one of which has no gradient in every other step."""
    g = torch.Generator().manual_seed(seed)
    ps = [torch.nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in ((3, 4), (5,))]
    targets = [torch.randn(p.shape, generator=g) for p in ps]
    optimizer = optimizer_of(ps)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / steps)
        optimizer.zero_grad(set_to_none=True)
        sum(((p.float() - t) ** 2).sum() for p, t in list(zip(ps, targets))[:1 + step % 2]).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten().float() for p in ps])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_in_float32_it_is_torch_s(decay, monkeypatch):
    ours = descend(lambda ps: AdamW(ps, 0.1, (0.9, 0.99), 1e-8, decay))
    theirs = descend(lambda ps: torch.optim.AdamW(ps, 0.1, (0.9, 0.99), 1e-8, decay, fused=False))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    monkeypatch.setattr(adamw, "SLICE", 5)  # a parameter may be cut anywhere
    assert torch.equal(descend(lambda ps: AdamW(ps, 0.1, (0.9, 0.99), 1e-8, decay)), ours)


def test_random_rounding_is_right_on_average_and_never_off_by_more_than_one_step():
    """1 + 1/512 lies a quarter of the way from 1 to 1 + 1/128, bfloat16's next number."""
    n = 100_000
    bits = torch.randint(2 ** 16, (n,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    for value, low, high, up in ((1 + 1 / 512, 1.0, 1 + 1 / 128, 0.25), (-(1 + 1 / 256), -(1 + 1 / 128), -1.0, 0.5),
                                 (3.0, 3.0, 3.0, 1.0), (0.0, 0.0, 0.0, 1.0), (-0.0, 0.0, 0.0, 1.0)):
        kept = torch.empty(n, dtype=torch.bfloat16)
        round_at_random(kept, torch.full((n,), value), bits)
        assert set(kept.float().unique().tolist()) == {low, high}
        assert (kept.float() == high).float().mean().item() == pytest.approx(up, abs=0.01)
    kept = torch.empty(3, dtype=torch.bfloat16)
    round_at_random(kept, torch.tensor([torch.inf, -torch.inf, 1e-40]), bits[:3])
    assert kept[0] == torch.inf and kept[1] == -torch.inf and kept[2].isfinite()


def walk(p, optimizer, steps=400):
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
    return (p.detach().float() - 1).mean().item()


def test_small_updates_are_not_forgotten():
    """400 steps of 1e-4 from 1.0, where bfloat16's step is 1/128 below: rounding to the nearest never moves, random
    rounding arrives at 0.96."""
    def weights():
        return torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))

    p = weights()
    assert walk(p, torch.optim.AdamW([p], 1e-4, (0.9, 0.99), weight_decay=0.0)) == 0.0
    p = weights()
    assert walk(p, AdamW([p], 1e-4)) == pytest.approx(-0.04, rel=0.02)


def test_in_bfloat16_everything_kept_is_bfloat16_and_the_descent_is_that_of_float32():
    p = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = AdamW([p], 1e-3)
    walk(p, optimizer, 2)
    assert {x.dtype for x in optimizer.state[p].values() if torch.is_tensor(x)} == {torch.bfloat16}
    exact = descend(lambda ps: AdamW(ps, 0.1), steps=40)
    runs = torch.stack([descend(lambda ps, s=s: AdamW(ps, 0.1, seed=s), torch.bfloat16, 40) for s in range(30)])
    assert (runs.mean(0) - exact).abs().max() < 0.02  # one step of bfloat16 near 2 is 0.016


def test_a_resumed_run_rounds_as_the_undisturbed_one():
    def weights():
        return torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))

    whole = weights()
    walk(whole, AdamW([whole], 1e-3, seed=3), 20)
    first = weights()
    optimizer = AdamW([first], 1e-3, seed=3)
    walk(first, optimizer, 12)
    second = torch.nn.Parameter(first.detach().clone())
    again = AdamW([second], 1e-3, seed=3)
    again.load_state_dict(optimizer.state_dict())
    walk(second, again, 8)
    assert torch.equal(second, whole)
    other = weights()
    walk(other, AdamW([other], 1e-3, seed=4), 20)
    assert not torch.equal(other, whole)
