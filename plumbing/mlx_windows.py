"""A run's torch models, computed with in MLX: one copy of the weights, and both libraries look at it.

What reads and writes runs (checkpoints, model folders, adapters, SQUISH) knows of torch only. So train.py begins a run
with torch's models and optimizer, whatever the backend. MLX takes them over, and from then on their tensors are windows
on its memory.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from plumbing import device
from plumbing.mlx_adamw import AdamW, set_weights, trained
from plumbing.mlx_arrays import check_family, mx, nn, to_mlx, to_torch


class TakenOver:
    """`sample` and `update` as train.py calls them, with torch's models and optimizer, computed in MLX."""

    def __init__(self, policy: torch.nn.Module, optimizer: torch.optim.Optimizer, model_class: type, sample: Callable,
                 update: Callable):
        """The last three are those of mlx_model.py and mlx_grpo.py."""
        self.model_class, self.sample_of, self.update_of = model_class, sample, update
        self.in_mlx: WeakKeyDictionary = WeakKeyDictionary()  # torch model -> the same weights in MLX
        self.policy, self.theirs = policy, optimizer
        self.names: dict[Tensor, str] = {p: name for name, p in policy.named_parameters() if p.requires_grad}
        self.mine = AdamW(optimizer, self.names)
        self.open_windows()

    def of(self, model: torch.nn.Module) -> nn.Module:
        if model not in self.in_mlx:
            self.in_mlx[model] = from_torch(model, self.model_class)
        return self.in_mlx[model]

    def sample(self, model: torch.nn.Module, prompts: Sequence, **settings) -> list:
        return self.sample_of(self.of(model), prompts, **settings)

    def update(self, model: torch.nn.Module, ref_model: torch.nn.Module | None, groups: Sequence,
               optimizer: torch.optim.Optimizer, config) -> dict[str, float]:
        for mine, theirs in zip(self.mine.param_groups, optimizer.param_groups):
            mine["lr"] = theirs["lr"]
        policy, frozen = self.of(model), None if ref_model is None else self.of(ref_model)
        self.close_windows()
        policy.checkpointing = model.checkpointing  # while learning: MLX does not know when no gradient is wanted
        try:
            return self.update_of(policy, frozen, groups, self.mine, config)
        finally:
            policy.checkpointing = False
            self.open_windows()

    def close_windows(self) -> None:
        """MLX writes new weights and moments where the old ones lay, if nobody looks at those."""
        self.theirs.state.clear()
        for p in self.names:
            p.data = torch.empty(0, dtype=p.dtype)

    def open_windows(self) -> None:
        weights, t = trained(self.of(self.policy)), self.mine.t
        for p, name in self.names.items():
            p.data = window(weights[name])
            if name in self.mine.moments:
                step = torch.tensor(float(t)) if isinstance(self.theirs, torch.optim.AdamW) else t  # as either counts
                self.theirs.state[p] = {"step": step, **dict(zip(self.mine.keys, map(window, self.mine.moments[name])))}


def from_torch(model, model_class: type) -> nn.Module:
    """A torch model -> `model_class(config)` with its weights and adapters, and with the same of them trained. The
    tensors become windows on it."""
    check_family(model.config)
    mine = model_class(model.config)
    modules, theirs = dict(mine.named_modules()), dict(model.named_modules())
    for name, p in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        setattr(modules[module], leaf, to_mlx(p.detach().cpu()))
        if leaf == "lora_A":
            modules[module].lora_scale = theirs[module].lora_scale
        if not p.requires_grad:
            modules[module].freeze(keys=[leaf], recurse=False)
        p.data = window(modules[module][leaf])
    return mine


def window(x: mx.array) -> Tensor:
    """The array's own memory as a tensor: for reading, since other arrays may lie in it too."""
    mx.eval(x)
    if x.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(x.view(mx.int16), copy=False)).view(torch.bfloat16)
    return torch.from_numpy(np.array(x, copy=False))


def check_mlx(policy: torch.nn.Module, prompt: Sequence[int], model_class: type, sample: Callable,
              group_logprobs: Callable, of_torch: Callable) -> None:
    """Does MLX compute here what torch computes on the CPU? `device.check_device` says why one asks; raises `Lies`.

    The functions are those of mlx_model.py and mlx_grpo.py; `of_torch`: grpo.py's `group_logprobs`.
    """
    small = copy.deepcopy(device.first_layers(policy)).to("cpu")
    kinds = ["conv" if hasattr(layer.operator, "conv") else "full_attention" for layer in small.layers]
    small.config = replace(small.config, layer_types=tuple(kinds))
    mine = from_torch(small, model_class)

    def learn(_, prompts, tokens, mask, __) -> tuple[Tensor, Tensor]:
        def total(arrays):
            set_weights(mine, arrays)
            logp, _ = group_logprobs(mine, prompts, to_mlx(tokens), to_mlx(mask))  # [2, 2, T]
            return logp.sum(), logp

        (_, logp), gradient = mx.value_and_grad(total)(trained(mine))
        names = [name for name, p in small.named_parameters() if p.requires_grad]
        return to_torch(logp), torch.cat([to_torch(gradient[name]).flatten().float() for name in names])  # [n]

    device.compare(small, prompt, lambda _, *args, **more: sample(mine, *args, **more), of_torch, there=learn,
                   name=f"{mx.default_device()}, with MLX {mx.__version__}", instead="--backend torch")
