"""The run's largest step, once, before the first one: what does not fit into memory is refused now, not after an hour.

Shapes: B prompts, G completions of each, P prompt tokens, T completion tokens.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import torch

from plumbing import memory


def rehearse_largest_step(model, ref_model, longest_prompts: Sequence[Sequence[int]], config, free: int, grpo,
                          teacher=None) -> None:
    """Do the largest step and throw it away.

    `longest_prompts`: those of the largest batch that may come, B x [P_b] token ids. `free`: bytes that may be taken.
    `grpo`: the module. No weight and no random number is changed. Raises memory.Full.
    """
    device = next(model.parameters()).device
    B, G, T = len(longest_prompts), config.group, config.max_new_tokens
    prompts = [torch.tensor(prompt, device=device) for prompt in longest_prompts]  # B x [P_b]
    tokens = torch.ones(G, T, dtype=torch.long, device=device)  # [G, T]
    groups = [SimpleNamespace(prompt=prompt, tokens=tokens, mask=tokens.bool(), logp=tokens.float())
              for prompt in prompts]

    @torch.no_grad()
    def prefill():  # sampling begins with all prompts at once, beside its own copies of the weights
        padded, mask = grpo.pad(prompts)  # [B, P], [B, P]
        with model.packed(B * G, T):
            model.hidden(padded, grpo.Cache(), mask)

    def learn(micro_tokens):
        batch = grpo.micro_batches(groups, torch.zeros(B, G, device=device), micro_tokens)[0]  # the largest
        for frozen in (ref_model, teacher):
            if frozen is not None:
                with torch.no_grad(), frozen.adapters_off():
                    grpo.group_logprobs(frozen, batch.prompts, batch.tokens, batch.mask)
        grpo.group_logprobs(model, batch.prompts, batch.tokens, batch.mask)[0].sum().backward()

    memory.rehearse(model, sample=prefill, learn=learn, prompts=B, prompt_tokens=max(map(len, longest_prompts)),
                    new_tokens=T, micro_tokens=config.micro_tokens, checkpointing=config.checkpointing, free=free)
