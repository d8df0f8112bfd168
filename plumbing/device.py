"""Does this device compute what the CPU computes? A check of a second or two at the beginning of a run.

Young back ends have been wrong without a word: attention on strided tensors, masks, sorts. A sampler and a trainer that
are wrong alike agree with each other, so no number of a run would show it. The CPU's float32 would.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

TOKENS = 6  # of each of the two completions


class Lies(Exception):
    """The device computes something else; the message says what, and how to go on."""


def check_device(model: nn.Module, prompt: Sequence[int], sample: Callable, group_logprobs: Callable) -> None:
    """Compare the model's device with the CPU, on its first layers: the log-probabilities of the sampler and of the
    trainer, and the gradient of their sum. Nothing happens where the model is on the CPU anyway.

    `prompt`: token ids; it and its first half are answered together, so that padding and masks are seen too. `sample`
    and `group_logprobs` are those of rollout.py and grpo.py. Raises Lies where a difference is larger than rounding.
    """
    device = next(model.parameters()).device
    if device.type != "cpu":
        compare(first_layers(model), prompt, sample, group_logprobs)


def compare(small: nn.Module, prompt: Sequence[int], sample: Callable, group_logprobs: Callable,
            there: Callable | None = None, name: str = "", instead: str = "--device cpu") -> None:
    """`check_device` of a model that is small already, whatever its device. What computes with it is `there` (None:
    `learn` below), of that name; the advice is to take something `instead`."""
    p = next(small.parameters())
    prompts = [torch.as_tensor(ids, device=p.device) for ids in (prompt, prompt[:max(1, len(prompt) // 2)])]
    groups = sample(small, prompts, G=2, max_new_tokens=TOKENS, stop_ids=[])
    tokens, mask = (torch.stack([getattr(g, name) for g in groups]) for name in ("tokens", "mask"))  # [2, 2, T] each
    sampled = torch.stack([g.logp for g in groups]).cpu()  # [2, 2, T]
    logp, gradient = (there or learn)(small, prompts, tokens, mask, group_logprobs)  # [2, 2, T], [n]

    exact = on_cpu(small)
    wanted, wanted_gradient = learn(exact, [ids.cpu() for ids in prompts], tokens.cpu(), mask.cpu(), group_logprobs)
    rounding = 32 * torch.finfo(p.dtype).eps  # a few roundings a layer, in units of the largest numbers involved
    for what, off, bound in (
            ("the sampler's log-probabilities differ", (sampled - wanted).abs().max().item(), max(1e-3, rounding)),
            ("the trainer's log-probabilities differ", (logp - wanted).abs().max().item(), max(1e-3, rounding)),
            ("the gradient differs", ((gradient - wanted_gradient).norm() / wanted_gradient.norm()).item(),
             max(1e-2, rounding))):
        if not off <= bound:  # NaN is not
            name = name or f"{p.device}, with torch {torch.__version__}"
            raise Lies(f"On {name}, {what} from the CPU's by {off:.2g}, where rounding makes {bound:.2g} at most: a "
                       f"run would learn something else without a word. Take {instead}, or another release of the "
                       f"library.")


def first_layers(model):
    """The model with two of its layers, one of each kind where there are two kinds. It shares their weights."""
    kinds = list(model.config.layer_types)
    chosen = sorted({kinds.index(kind) for kind in kinds})[:2]
    chosen += [i for i in range(len(kinds)) if i not in chosen][:2 - len(chosen)]
    small = copy.copy(model)
    small._modules = {**model._modules, "layers": nn.ModuleList(model.layers[i] for i in sorted(chosen))}
    return small


def on_cpu(small: nn.Module) -> nn.Module:
    """The same weights on the CPU, in float32."""
    return copy.deepcopy(small).to("cpu", torch.float32)


def learn(model: nn.Module, prompts: list[Tensor], tokens: Tensor, mask: Tensor,
          group_logprobs: Callable) -> tuple[Tensor, Tensor]:
    """-> (log-probabilities [b, g, T], the gradient of their sum by all that is trained [n]), on the CPU, float32."""
    trained = [p for p in model.parameters() if p.requires_grad]
    logp, _ = group_logprobs(model, prompts, tokens, mask)  # [b, g, T]
    logp.sum().backward()
    flat = []
    for p in trained:
        flat.append(torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().cpu().float())  # [numel]
        p.grad = None
    return logp.detach().cpu().float(), torch.cat(flat)
