"""What the curves of a run say about it, in one to three lines: what is seen, where that comes from, what to change.

`RULES` is read from the top, the surest rule first. Each one stands under a heading of docs/symptoms.md, which says how
to tell the causes apart. The bounds lie far outside of what healthy runs do. A run that no rule names may be sick all
the same: read its summaries.
"""

from collections.abc import Sequence
from statistics import fmean

FEW = 10  # steps at the beginning and at the end, over which a number is a mean


def symptoms(rows: Sequence[dict], config) -> list[str]:
    """The lines of metrics.jsonl -> at most three sentences; none for a run of under 20 steps, or a healthy one.

    config: any object with the fields target, beta, lean and max_new_tokens.
    """
    if len(rows) < 2 * FEW:
        return []
    said = ((heading, rule(rows, means(rows[:FEW]), means(rows[-FEW:]), config)) for heading, rule in RULES)
    return [f"{line} See docs/symptoms.md, \"{heading}\"." for heading, line in said if line][:3]


def means(rows: Sequence[dict]) -> dict[str, float]:
    """The mean of each number that is there in all rows. (A log of older lines lacks some of them.)"""
    names = [name for name in rows[0] if all(isinstance(row.get(name), int | float) for row in rows)]
    return {name: fmean(row[name] for row in rows) for name in names}


def has_learnt(rows: Sequence[dict]) -> bool:
    """Whether the reward has risen by a quarter of what a group's rewards differ by at first.

    Rewards of two stages are not to be compared: what a stage gained is added to what the others gained or lost.
    """
    gained = 0.0
    for stage in {row["stage"] for row in rows}:
        own = [row for row in rows if row["stage"] == stage]
        begin, end = means(own[:FEW]), means(own[-FEW:])
        gained += (end["reward"] - begin["reward"]) / (begin["reward_std"] or 1.0)
    return gained >= 0.25


# --- rules: all rows, the means of the first ten and of the last, the settings -> a sentence, or "" -------------------


def two_policies(rows: Sequence[dict], first: dict, last: dict, config) -> str:
    gap = last["logp_gap"]
    if gap < (1.0 if config.lean else 0.02) or last.get("age"):  # older weights wrote, and the run knows it
        return ""
    return (f"logp_gap is {gap:.2g}, and 0.00002 in a healthy float32 run: the policy that is trained is not the one "
            f"that wrote. Look for another temperature, a top_k, or tokens that are not the sampled ones.")


def nothing_to_compare(rows: Sequence[dict], first: dict, last: dict, config) -> str:
    if min(first["flat_groups"], last["flat_groups"]) < 0.9 or "teacher_kl" in last:  # which teaches, whatever is paid
        return ""
    seen = (f"In {last['flat_groups']:.0%} of the groups all rewards are equal, from the first step on, so they teach "
            f"nothing: ")
    longest = max(row["length"] for row in rows)  # of the steps' means: at first a few may end before the cut
    if longest > 0 and all(row["length"] == longest for row in rows[-FEW:]):
        return seen + f"every completion has {last['length']:.0f} tokens, where it is cut. Raise --max-new-tokens."
    if abs(last["reward"]) > 1e9:
        return seen + f"beside a reward of {last['reward']:.0e} a difference is lost. Take the constant off it."
    return seen + (f"the reward is {last['reward']:.3g} for all. Print those of one group: a weight of 0, an answer "
                   f"that is not found, a reference that is missing.")


def rounding_is_paid(rows: Sequence[dict], first: dict, last: dict, config) -> str:
    if last["flat_groups"] > 0.5 or max(row["reward_std"] for row in rows) > 1e-6:
        return ""
    return ("reward_std is 0, and yet groups have advantages: the rounding of a mean, divided by a tiny eps. A group "
            "of equal rewards must get exactly 0.")


def gradient_of_zero(rows: Sequence[dict], first: dict, last: dict, config) -> str:
    if last["flat_groups"] > 0.9 or any(row["grad_norm"] for row in rows):
        return ""
    return ("grad_norm is exactly 0 in every step, though rewards differ: nothing is trained. Look for a "
            "log-probability that is detached, or divided by itself.")


def tiny_rewards(rows: Sequence[dict], first: dict, last: dict, config) -> str:
    if last["flat_groups"] > 0.5 or not 1e-9 < last["reward_std"] < 1e-3:
        return ""
    return (f"reward_std is {last['reward_std']:.0e}: beside the 1e-4 that is added to it advantages are small, and "
            f"the KL wins. Multiply the reward, so that completions differ by about 1.")


def collapsed(rows: Sequence[dict], first: dict, last: dict, config) -> str:
    if last["entropy"] > min(0.02, 0.1 * first["entropy"]) or has_learnt(rows):
        return ""  # not sure of anything, or of what is paid: a short task may be solved
    return (f"The entropy is {last['entropy']:.1g} nats a token: one completion has won, and nothing is left to "
            f"compare. Start again, or go on from an earlier checkpoint, with a lower --lr.")


def games(rows: Sequence[dict], first: dict, last: dict, config) -> str:
    if collapsed(rows, first, last, config):
        return ""  # which says it better
    there = [name for name in ("distinct", "templated", "repetition", "entropy", "invented", "flat_groups")
             if name in first and name in last]
    sick = {"templated": lambda a, b: b > a + 0.2, "repetition": lambda a, b: b > a + 0.1,
            "entropy": lambda a, b: b > 2 * a, "invented": lambda a, b: b > a + 0.15}
    if not has_learnt(rows):  # a policy that is sure of what is paid writes alike: for a short task, nearly one text
        sick |= {"distinct": lambda a, b: b < 0.4 * a, "flat_groups": lambda a, b: b > a + 0.5,
                 "entropy": lambda a, b: not 0.2 * a < b < 2 * a}
    wrong = {name for name in there if name in sick and sick[name](first[name], last[name])}
    # Two weak signs are a strong one. What is paid makes a policy surer, so healthy runs end with less entropy than
    # they began with, or with a tenth more where they hardly moved; and what they invent wanders by three points.
    if {"entropy", "invented"} <= {*there} and (last["entropy"] > 1.25 * first["entropy"]
                                                and last["invented"] > first["invented"] + 0.05):
        wrong |= {"entropy", "invented"}
    said = [f"{name} {first[name]:.2f} -> {last[name]:.2f}" for name in there if name in wrong]
    return "" if not said else (", ".join(said) + ": the policy games its reward, or forgets its language. Read "
                                 "some summaries; then raise --beta, lower --lr, or pay for quality as well.")


def runs_away(rows: Sequence[dict], first: dict, last: dict, config) -> str:
    kl = last.get("kl", 0.0)
    # What the KL costs, where an advantage of 1 brings 1. A KL that holds gets dearer with beta and so stays smaller:
    # of the 235 trained runs in studies/results/ that are not of the gallery, none pays more than 0.036.
    if kl < 1 and config.beta * kl < 0.06:
        return ""
    return (f"The KL is {kl:.2g} nats a token under --beta {config.beta:g}: the policy has left its reference model. "
            f"Raise --beta or lower --lr; where --beta is large, look at the estimator (--kl k3_ratio).")


def cut_off(rows: Sequence[dict], first: dict, last: dict, config) -> str:
    cut = config.max_new_tokens
    said = any(rule(rows, first, last, config) for rule in (nothing_to_compare, collapsed))
    if not cut or last["length"] < 0.95 * cut or said:
        return ""
    return (f"The mean length is {last['length']:.0f}, and completions are cut at {cut}: they do not end. Look at "
            f"the end tokens in generation_config.json, or raise --max-new-tokens.")


def wrong_length(rows: Sequence[dict], first: dict, last: dict, config) -> str:
    n = last["length"]
    if any(rule(rows, first, last, config) for rule in (nothing_to_compare, rounding_is_paid, collapsed, cut_off)):
        return ""
    paid = [name for name in ("char_length", "length", "length_binary", "length_saturating", "length_exp")
            if f"reward/{name}" in last]
    if "within_10pct" not in last or not paid or abs(n - config.target) < 0.25 * config.target:
        return ""  # there is no wanted length, nobody pays for it, or it is not far
    return f"The mean length is {n:.0f} tokens and --target is {config.target}: " + (
        "char_length counts characters. Take length." if paid[0] == "char_length" else
        "give length more weight, and see whether the stop token is trained.")


def kl_holds(rows: Sequence[dict], first: dict, last: dict, config) -> str:
    kl = last.get("kl", 1.0)
    if config.beta < 0.5 or not 0.002 < kl < 0.02:
        return ""
    return f"The KL stays at {kl:.1g} nats a token under --beta {config.beta:g}: it holds the policy. Lower --beta."


def nothing_happened(rows: Sequence[dict], first: dict, last: dict, config) -> str:
    kl = last.get("kl", 1.0)
    if kl > (0.002 if has_learnt(rows) else 0.01) or len(rows) < 4 * FEW:
        return ""
    if last["flat_groups"] > 0.9 or last["grad_norm"] == 0 or kl_holds(rows, first, last, config):
        return ""  # of which another rule says more
    return f"The KL is {kl:.0e} nats a token after {len(rows)} steps: the policy has hardly moved. Raise --lr."


RULES = (("Sampler and trainer do not agree", two_policies), ("All rewards are equal", nothing_to_compare),
         ("All rewards are equal", rounding_is_paid), ("Did anything train?", gradient_of_zero),
         ("The reward is flat", tiny_rewards), ("Suddenly it writes !!!!", collapsed),
         ("A perfect reward, and nonsense", games), ("The KL is NaN, or in the billions", runs_away),
         ("Every completion is cut off", cut_off), ("The length is wrong", wrong_length),
         ("The reward is flat", kl_holds), ("Did anything train?", nothing_happened))
