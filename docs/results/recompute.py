#!/usr/bin/env python3
"""Recomputes the statistics that docs/RESULTS.md and docs/results/early-studies.md print. Python 3 alone, no packages.

    python3 docs/results/recompute.py                 # RESULTS.md from its rows, the early studies a, b and c from their printed values
    python3 docs/results/recompute.py results.csv     # the tables of one study, from the rows that `train compare` wrote (results.csv.gz, too)

The rows of a, b and c were not kept; early-studies.md lists what therefore cannot be recomputed.
"""

import csv
import gzip
import itertools
import math
import random
import sys
from collections import defaultdict
from pathlib import Path


# Student's t and exact tests ------------------------------------------------------------------------------------------

def beta_fraction(a, b, x):
    """Continued fraction of the incomplete beta function (modified Lentz)."""
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    h = d
    for m in range(1, 1000):
        for numerator in (m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
                          -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))):
            d = 1.0 + numerator * d
            c = 1.0 + numerator / c
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = c if abs(c) > tiny else tiny
            h *= d * c
        if abs(d * c - 1.0) < 1e-15:
            return h
    raise ArithmeticError("the continued fraction did not converge")


def t_two_sided(t, df):
    """P(|T| > |t|) of Student's t."""
    a, b, x = df / 2, 0.5, df / (df + t * t)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) if t else 0.0
    if t == 0:
        return 1.0
    if x < (a + 1) / (a + b + 2):
        return front * beta_fraction(a, b, x) / a
    return 1.0 - front * beta_fraction(b, a, 1 - x) / b


def t_quantile(p, df):
    """t with P(T < t) = p, p above one half."""
    low, high = 0.0, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        if 1 - t_two_sided(middle, df) / 2 < p:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def estimate(values):
    """(mean, standard deviation, half of the 95 % interval)."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, math.nan, math.nan
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, deviation, t_quantile(0.975, n - 1) * deviation / math.sqrt(n)


def p_of_interval(mean, half, n):
    """Two-sided p of a paired t test, from the printed mean and half-width."""
    return t_two_sided(mean / half * t_quantile(0.975, n - 1), n - 1)


def rank_sum(a, b):
    """Exact two-sided p of the rank-sum test; a run that never got there has the largest value (math.inf)."""
    both = sorted(a + b)
    rank = {v: sum(i + 1 for i, u in enumerate(both) if u == v) / both.count(v) for v in both}
    ranks, observed = [rank[v] for v in a + b], sum(rank[v] for v in a)
    centre = sum(ranks) * len(a) / len(ranks)
    sums = [sum(s) for s in itertools.combinations(ranks, len(a))]
    return sum(abs(s - centre) >= abs(observed - centre) - 1e-9 for s in sums) / len(sums)


def sign_flip(differences):
    """Exact two-sided p of the sign-flip test of a mean of zero, and the smallest that so many pairs can give."""
    n, observed = len(differences), abs(sum(differences))
    flips = itertools.product((-1, 1), repeat=n)
    p = sum(abs(sum(s * d for s, d in zip(f, differences))) >= observed - 1e-12 for f in flips) / 2 ** n
    # a difference of zero can be flipped without a change
    return p, min(1.0, 2 ** (1 + sum(d == 0 for d in differences)) / 2 ** n)


def holm(ps):
    """Holm's adjusted p, in the order given."""
    order, out, running = sorted(range(len(ps)), key=lambda i: ps[i]), [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(ps) - rank) * ps[i]))
        out[i] = running
    return out


def welch(a, b):
    """Two-sided p of Welch's test from two (mean, half of the 95 % interval, n)."""
    (ma, ha, na), (mb, hb, nb) = a, b
    va, vb = ((h / t_quantile(0.975, n - 1)) ** 2 for _, h, n in (a, b))
    df = (va + vb) ** 2 / (va ** 2 / (na - 1) + vb ** 2 / (nb - 1))
    return t_two_sided((ma - mb) / math.sqrt(va + vb), df)


def detectable(deviation, n):
    """The true difference that n pairs find four times of five."""
    return (t_quantile(0.975, n - 1) + t_quantile(0.8, n - 1)) * deviation / math.sqrt(n)


# Time to solve --------------------------------------------------------------------------------------------------------

def rows_of(path):
    """The rows of a results.csv, which may be compressed."""
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", newline="") as file:
        yield from csv.DictReader(file)


def subset_means(differences):
    """Means of all non-empty subsets, ascending: what the sign-flip test, its interval and equivalence follow from (Hartigan 1969)."""
    sums, sizes = [0.0], [0]
    for d in differences:
        sums += [x + d for x in sums]
        sizes += [n + 1 for n in sizes]
    return sorted(x / n for x, n in zip(sums[1:], sizes[1:]))


def flip_interval(differences, level=0.95):
    """(low, high, level) of the mean: the narrowest of at least this level that so many pairs give."""
    means, all_sets = subset_means(differences), 2 ** len(differences)
    k = max(1, math.floor((1 - level) * all_sets / 2 + 1e-9))
    return means[k - 1], means[-k], 1 - 2 * k / all_sets


def flip_equivalent(differences, margin):
    """p of "not equivalent": the larger of the one-sided p against -margin and margin."""
    means, all_sets, tiny = subset_means(differences), 2 ** len(differences), 1e-9
    above = 1 + sum(m <= -margin + tiny for m in means)
    below = 1 + sum(m >= margin - tiny for m in means)
    return max(above, below) / all_sets


def hazards(times):
    """For every run its part of observed - expected events in a log-rank test; times are (update, whether solved)."""
    events = sorted({at for at, solved in times if solved})
    rate = {u: sum(at == u and solved for at, solved in times) / sum(at >= u for at, _ in times) for u in events}
    return [solved - sum(r for u, r in rate.items() if u <= at) for at, solved in times]


def log_rank(a, b):
    """(observed, expected) events of a, and the exact two-sided p over all divisions of the runs."""
    scores = hazards(a + b)
    seen = sum(scores[: len(a)])
    # the scores by how often each occurs: sums of divisions with their numbers
    ways = {0: {0: 1}}
    for s in scores:
        key = round(s * 1e9)
        for size in sorted(ways, reverse=True):
            if size < len(a):
                into = ways.setdefault(size + 1, {})
                for total, n in ways[size].items():
                    into[total + key] = into.get(total + key, 0) + n
    sums = ways[len(a)]
    far = sum(n for total, n in sums.items() if abs(total) >= abs(seen) * 1e9 - 100)
    observed = sum(solved for _, solved in a)
    return observed, observed - seen, far / sum(sums.values())


def median(times):
    """The first update at which at most half of the runs have not solved it (Kaplan-Meier); None if more than half never do."""
    share = 1.0
    for u in sorted({at for at, solved in times if solved}):
        share *= 1 - sum(at == u and solved for at, solved in times) / sum(at >= u for at, _ in times)
        if share <= 0.5 + 1e-12:
            return u
    return None


def solved_times(path, solved=0.9, checks=2, tuned=False):
    """{arm: {seed: (update, True)}} of the last of `checks` validations in a row with `solved`; (last planned update, False) where there is none."""
    accuracy, ends, ended, length = defaultdict(list), {}, set(), None
    for row in rows_of(path):
        run = row["arm"], int(row["seed"])
        if ("@" in row["arm"]) != tuned:
            continue
        if row["split"] == "run" and row["metric"] == "steps":
            ends[run] = int(float(row["value"]))
        if row["split"] == "run" and row["metric"] in ("finished", "failed") and float(row["value"]) == 1.0:
            ended.add(run)
        if row["split"] == "val" and row["metric"] == "accuracy" and " " not in row["at"]:
            length = length or row["at"]
            if row["at"] == length:
                accuracy[run].append((int(row["step"]), float(row["value"])))
    out = defaultdict(dict)
    for run in sorted(ended):
        streak, time = 0, (ends[run], False)
        for step, value in sorted(accuracy[run]):
            streak = streak + 1 if value >= solved else 0
            if streak == checks:
                time = (step, True)
                break
        out[run[0]][run[1]] = time
    return out


def last_values(path, baseline):
    """What a run's last validation or logged update says of accuracy, budget and router: mean over seeds, least and largest. And clipping."""
    wanted, last, clipped, logged = ("accuracy", "gamma", "tokens_asked", "attended_tokens", "answer_recall", "answer_chance", "router_missed", "reader_missed", "shortcut"), {}, defaultdict(int), defaultdict(int)
    first = {}
    for row in rows_of(path):
        run = row["arm"], int(row["seed"])
        if "@" in row["arm"]:
            continue
        if row["split"] == "train" and row["metric"] == "gamma" and not row["at"]:
            first[run] = min(first.get(run, (math.inf, 0.0)), (int(row["step"]), float(row["value"])))
        if row["split"] == "train" and row["metric"] == "grad_norm":
            logged[run[0]] += 1
            clipped[run[0]] += float(row["value"]) > 1.0
        if row["split"] in ("train", "val") and row["metric"] in wanted and "distance" not in row["at"] and not (row["metric"] != "accuracy" and "question" in row["at"]):
            last[(row["split"], row["metric"], row["at"]), run] = float(row["value"])
    for key in sorted({key for key, _ in last}):
        by = defaultdict(dict)
        for (k, (arm, seed)), value in last.items():
            if k == key:
                by[arm][seed] = value
        told = "; ".join(f"{arm} {sum(v.values()) / len(v):.3f} ({min(v.values()):.3f} to {max(v.values()):.3f})" for arm, v in by.items())
        print(f"    {' '.join(filter(None, key))}: {told}")
        for arm in by if key[1] == "accuracy" and " " not in key[2] else ():
            differences = [v - by[baseline][s] for s, v in sorted(by[arm].items()) if s in by[baseline]]
            if arm != baseline and len(differences) > 1:
                low, high, _ = flip_interval(differences)
                print(f"      {arm} - {baseline}: {sum(differences) / len(differences):.3f} ({low:.3f} to {high:.3f}), sign-flip p = {sign_flip(differences)[0]:.4f}")
    gammas = [gamma for _, gamma in first.values()]
    print(f"  gamma at the first logged update ({min(at for at, _ in first.values())}): mean {sum(gammas) / len(gammas):.2f} ({min(gammas):.2f} to {max(gammas):.2f}) over the runs that have one")
    print("  Logged updates with a gradient norm above 1: " + "; ".join(f"{arm} {clipped[arm] / n:.3f} of {n}" for arm, n in logged.items()))


def of_times(path, baseline, margin):
    """Times to solve by seed, and every arm against the baseline."""
    times = solved_times(path)
    tell = lambda t: f"{t[0]}" if t[1] else f"not by {t[0]}"
    for arm, own in times.items():
        values = list(own.values())
        mean = sum(at for at, _ in values) / len(values)
        print(f"  {arm}: {sum(s for _, s in values)} of {len(values)} solved it; median {median(values)}, restricted mean {mean:.0f}; by seed "
              + ", ".join(f"{seed}: {tell(t)}" for seed, t in own.items()))
    explored = [arm for arm in times if arm not in (baseline, "dash")]
    ps = [sign_flip([at - times[baseline][seed][0] for seed, (at, _) in times[arm].items()])[0] for arm in explored]
    adjusted = dict(zip(explored, holm(ps)))
    for arm, own in times.items():
        pairs = [seed for seed in own if seed in times[baseline]]
        if arm == baseline or len(pairs) < 2:
            continue
        differences = [own[s][0] - times[baseline][s][0] for s in pairs]
        (p, least), (low, high, level) = sign_flip(differences), flip_interval(differences)
        observed, expected, rank = log_rank([own[s] for s in pairs], [times[baseline][s] for s in pairs])
        print(f"  {arm} - {baseline}, {len(pairs)} pairs: mean {sum(differences) / len(pairs):.1f} updates ({low:.1f} to {high:.1f} at {100 * level:.1f} %), sign-flip "
              f"p = {p:.5f} (smallest possible {least:.5f}{f'; after Holm {adjusted[arm]:.4f}' if arm in adjusted else '; declared'}), not equivalent within {margin:.0f}: p = {flip_equivalent(differences, margin):.5f}; "
              f"log-rank observed {observed}, expected {expected:.2f}, p = {rank:.2g}; earlier in {sum(d < 0 for d in differences)}, later in {sum(d > 0 for d in differences)}")


def near_misses(path):
    """The best and the last accuracy of every run that did not solve the task: how far it stayed below the line."""
    times, accuracy = solved_times(path), defaultdict(list)
    for row in rows_of(path):
        if row["split"] == "val" and row["metric"] == "accuracy" and " " not in row["at"]:
            accuracy[row["arm"], int(row["seed"])].append((int(row["step"]), float(row["value"])))
    for arm, own in times.items():
        told = [(seed, [a for _, a in sorted(accuracy[arm, seed])]) for seed, (_, solved) in own.items() if not solved]
        if told:
            print(f"  {arm} where it did not solve it, best and last accuracy: " + ", ".join(f"{seed}: {max(a):.3f} and {a[-1]:.3f}" for seed, a in told))


def other_lines(path, baseline, arm="dash"):
    """The declared contrast with other lines in the place of 0.9 (not declared)."""
    for line in (0.7, 0.8, 0.85):
        times = solved_times(path, line)
        a, b = ([times[name][seed] for seed in sorted(times[name])] for name in (arm, baseline))
        differences = [x[0] - y[0] for x, y in zip(a, b)]
        (low, high, _), (p, _) = flip_interval(differences), sign_flip(differences)
        print(f"  with the line at {line}: {arm} {sum(s for _, s in a)} of {len(a)}, {baseline} {sum(s for _, s in b)} of {len(b)}, mean {sum(differences) / len(a):.0f} ({low:.0f} to {high:.0f}), sign-flip p = {p:.5f}")


def two_arms(times, arm, against):
    """Paired difference of two arms, neither of which is the baseline; no such pair was declared."""
    differences = [at - times[against][seed][0] for seed, (at, _) in times[arm].items()]
    low, high, _ = flip_interval(differences)
    print(f"  {arm} - {against} (not declared): mean {sum(differences) / len(differences):.1f} updates ({low:.1f} to {high:.1f}), sign-flip p = {sign_flip(differences)[0]:.5f}; "
          f"earlier in {sum(d < 0 for d in differences)}, later in {sum(d > 0 for d in differences)} of {len(differences)}")


def tuning(path):
    """Mean time to solve of every learning rate that was tried, over the tuning seeds; the least is the one that ran."""
    tried = defaultdict(dict)
    for label, own in solved_times(path, tuned=True).items():
        arm, rate = label.split("@")
        tried[arm][float(rate)] = sum(at for at, _ in own.values()) / len(own)
    for arm, means in tried.items():
        print(f"  rates of {arm}: " + ", ".join(f"{rate:g}: {mean:.1f}" for rate, mean in sorted(means.items())) + f"; best {min(means, key=means.get):g}")


def card_times(path, baseline):
    """P0's twelve arms on a card, of which only the times were kept."""
    times = defaultdict(dict)
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            times[row["arm"]][int(row["seed"])] = int(row["time_to_solve"]), row["solved"] == "1"
    ps = {}
    for arm, own in times.items():
        if arm != baseline:
            ps[arm], _ = sign_flip([at - times[baseline][seed][0] for seed, (at, _) in own.items()])
    explored = [arm for arm in ps if arm != "dash"]
    adjusted = dict(zip(explored, holm([ps[arm] for arm in explored])))
    for arm, own in times.items():
        told = "" if arm == baseline else f"; against {baseline} p = {ps[arm]:.5f}" + (f", after Holm {adjusted[arm]:.4f}" if arm in adjusted else "")
        earlier = "" if arm == baseline else f", sooner in {sum(at < times[baseline][seed][0] for seed, (at, _) in own.items())} of {len(own)}"
        print(f"  {arm}: {sum(s for _, s in own.values())} of {len(own)} solved it, median {median(list(own.values()))}, mean {sum(at for at, _ in own.values()) / len(own) + 1e-9:.0f}{earlier}{told}")
    for arm, against in (("dash", "topk"), ("topk-bias", "dash"), ("topk-bias", "topk-bias-stopped"), ("topk-bias-stopped", "topk")):
        two_arms(times, arm, against)


# The recall task -----------------------------------------------------------------------------------------------------

def shortcut(pairs, queries, values, sequences=100_000, seed=1):
    """What a model reaches that never matches a key: it counts the values of the records and crosses off the ones that
    the questions have shown already. Accuracy by question, and of the best fixed guess."""
    rng = random.Random(seed)
    right, fixed = [0] * queries, 0
    for _ in range(sequences):
        records = [rng.randrange(values) for _ in range(pairs)]
        left = [0] * values
        for v in records:
            left[v] += 1
        common = max(range(values), key=lambda v: (left[v], v))
        for i, answer in enumerate(rng.sample(records, queries)):
            top = max(left)
            right[i] += rng.choice([v for v in range(values) if left[v] == top]) == answer
            fixed += common == answer
            left[answer] -= 1
    return [r / sequences for r in right], fixed / sequences / queries


# Studies whose rows are here: folder, title, margin of equivalence in updates, and pairs of arms that RESULTS.md compares beside the baseline.
STUDIES = (
    ("p0", "Study P0", 100, ()),
    ("needle", "Study needle", 200, (("dash", "topk"),)),
    ("paths", "Study paths", 100, (("dash", "topk"), ("dash", "dash-frozen"), ("dash", "dash-summaries-only"), ("dash-summaries-only", "dash-q-only"), ("topk-bias", "topk-bias-stopped"), ("topk-bias-stopped", "topk"), ("topk-bias", "dash"))),
)

# The printed values ---------------------------------------------------------------------------------------------------

NEVER = math.inf
# Study a, first validation with accuracy of at least 0.5; seeds 1 to 5, sorted (their pairing was not kept).
REACHED = {
    "dash": [250, 375, 375, 375, 375],
    "dash-stopped": [625, 625, 750, NEVER, NEVER],
    "topk": [500, 625, 875, 875, NEVER],
    "infllmv2": [500, 500, 625, 1250, 1375],
    "dense": [625, 875, NEVER, NEVER, NEVER],
    "nsa": [250] * 5,
}
# Study a, paired differences to dash-stopped: (mean, half-width) of the final accuracy and of the mean over the run.
STUDY_A = {
    "dash": ((0.345, 0.4035), (0.386, 0.2505)),
    "dash-ste": ((0.327, 0.3775), (0.344, 0.209)),
    "topk": ((0.187, 0.3245), (0.111, 0.198)),
    "infllmv2": ((0.190, 0.1865), (0.136, 0.1085)),
    "nsa": ((0.343, 0.4035), (0.373, 0.2585)),
    "dash-released": ((-0.231, 0.3625), (-0.140, 0.243)),
    "dense": ((-0.073, 0.6215), (-0.006, 0.405)),
}
# Study b, full - stopped, three seeds.
STUDY_B = {"0.5": (0.686, 0.304), "1": (0.323, 0.806), "2": (0.304, 0.754), "10": (-0.364, 0.334), "100": (0.150, 0.6485), "1e6": (-0.005, 0.039)}
SIGMA_10 = [(0.32, 0.53), (0.53, 0.94), (0.45, 0.92)]
# Study c, dash - dash-stopped, nats a token, three seeds.
TEXT = [-0.008, -0.031, -0.016]


def printed():
    print("Time to 0.5 on recall, exact rank-sum, two-sided")
    for arm in ("dash-stopped", "topk", "infllmv2", "dense", "nsa"):
        print(f"  dash against {arm}, five seeds each: p = {rank_sum(REACHED['dash'], REACHED[arm]):.4f}")
    # of the ten seeds only the ranges were kept; the earliest stopped seed is later than the latest dash seed, so every filling gives this
    ten = rank_sum([375] * 10, [625] * 6 + [NEVER] * 4)
    print(f"  dash (all by 375) against dash-stopped (6 from 625 to 1125, 4 never), ten each: p = {ten:.2g}")
    print(f"  the same, paired sign test: p = {2 / 2 ** 10:.4f}")

    print("\nStudy a, paired t against dash-stopped: p, after Holm in its column")
    for column, name in enumerate(("final accuracy", "mean over the run")):
        ps = {arm: p_of_interval(*v[column], 5) for arm, v in STUDY_A.items()}
        adjusted = dict(zip(ps, holm(list(ps.values()))))
        print(f"  {name}: " + "; ".join(f"{a} {p:.3f}, {adjusted[a]:.3f}" for a, p in ps.items()))
    print(f"  dash - topk 0.157 +- 0.318: p = {p_of_interval(0.157, 0.318, 5):.2f}")
    print(f"  dash - infllmv2 0.155 +- 0.273: p = {p_of_interval(0.155, 0.273, 5):.2f}")
    print(f"  topk 0.843 +- 0.318 against dash-released 0.425 +- 0.062, unpaired: p = {welch((0.843, 0.318, 5), (0.425, 0.062, 5)):.3f}")
    print(f"  new seeds 6 to 10, 0.371 +- 0.339: p = {p_of_interval(0.371, 0.339, 5):.4f}; the smallest p of a sign-flip test with five pairs is {2 / 2 ** 5:.4f}")
    halves = [(0.345, 0.4035), (0.371, 0.339)]
    squares = sum(4 * (h / t_quantile(0.975, 4)) ** 2 * 5 + 5 * (m - 0.358) ** 2 for m, h in halves)
    print(f"  both halves together: 0.358 +- {t_quantile(0.975, 9) * math.sqrt(squares / 9 / 10):.3f}")
    print(f"  one seed of ten at 0.87, the others at 1: {'%.3f +- %.3f' % estimate([1.0] * 9 + [0.87])[::2]} (printed: 0.987 +- 0.030)")
    print(f"  five pairs could show {detectable(0.4035 / t_quantile(0.975, 4) * math.sqrt(5), 5):.2f}")

    print("\nThe task's shortcut: accuracy without matching a key (simulated, 100 000 sequences)")
    for pairs, queries, values in ((8, 8, 10), (8, 4, 10), (16, 4, 100), (32, 8, 2000)):
        by_question, fixed = shortcut(pairs, queries, values, 100_000 if values == 10 else 10_000)
        mean = sum(by_question) / queries
        print(f"  {pairs} records, {queries} asked, {values} values: {mean:.3f}; by question {' '.join(f'{v:.2f}' for v in by_question)}; the best fixed guess {fixed:.2f}")
        if (queries, values) == (8, 10):
            print(f"    0.5 is {(0.5 - mean) / math.sqrt(mean * (1 - mean) / 512):.1f} standard errors of 512 questions above it")
    at = range(48, 64, 2)
    print(f"  routed tokens of top 5 chunks of 4 at the asked positions 48 to 62: {sum(4 * 4 + p % 4 + 1 for p in at) / len(at):.1f} (mean over all positions: 16.0)")

    # own chunk and 4 of the other visible ones in each of 2 layers x 2 kv heads; the evidence lies in one of the other ones
    chance = sum(1 - (1 - 4 / (p // 4)) ** 4 for p in at) / len(at)
    print(f"  four lists of 5 chunks drawn at random hold the evidence of a question in {chance:.2f} of the cases (own chunk always chosen)")

    print("\nStudy b, full - stopped, three pairs: p, after Holm")
    ps = [p_of_interval(m, h, 3) for m, h in STUDY_B.values()]
    print("  " + "; ".join(f"sigma {s}: {p:.3f}, {q:.3f}" for s, p, q in zip(STUDY_B, ps, holm(ps))))
    ten = [full - stopped for full, stopped in SIGMA_10]
    print("  sigma 10 by seed: mean %.3f, half-width %.3f" % estimate(ten)[::2] + "; sign-flip p = %.2f, smallest possible %.2f" % sign_flip(ten))
    print("  sigma 1, stopped, from 0.31, 0.92, 0.80: %.3f +- %.3f (printed: 0.677 +- 0.806)" % estimate([0.31, 0.92, 0.80])[::2])

    print("\nStudy c, dash - dash-stopped, nats a token")
    mean, deviation, half = estimate(TEXT)
    low, high = (deviation * math.sqrt(2 / (-2 * math.log(1 - q))) for q in (0.975, 0.025))
    print(f"  mean {mean:.3f}, 95 % interval {mean - half:.3f} to {mean + half:.3f}; deviation between pairs {deviation:.3f} (95 % interval {low:.3f} to {high:.3f})")
    print(f"  three pairs find a true difference of {detectable(deviation, 3):.3f} four times of five; 1 % of the loss is {0.01 * 4.079:.3f}")


# Rows of a study ------------------------------------------------------------------------------------------------------

def of_rows(path, solved=0.5):
    """Per-seed values, times and paired differences to dash-stopped from a results.csv."""
    finals, times, metrics = defaultdict(dict), defaultdict(dict), set()
    for row in rows_of(path):
        if row["split"] != "val" or row["metric"] not in ("accuracy", "loss"):
            continue
        arm, seed, step, value = row["arm"], int(row["seed"]), int(row["step"]), float(row["value"])
        key = (row["metric"], row["at"])
        metrics.add(key)
        last = finals[key, arm].get(seed, (-1, 0.0))
        finals[key, arm][seed] = max(last, (step, value))
        if key[0] == "accuracy" and value >= solved:
            times[key, arm][seed] = min(times[key, arm].get(seed, NEVER), step)
    for key in sorted(metrics):
        arms = sorted(arm for k, arm in finals if k == key)
        print(" ".join(key))
        for arm in arms:
            values = {seed: v for seed, (_, v) in sorted(finals[key, arm].items())}
            print("  %-16s %.3f +- %.3f" % (arm, *estimate(list(values.values()))[::2]), " ".join(f"{s}:{v:.3f}" for s, v in values.items()))
            if key[0] == "accuracy":
                print("    first at %.2f:" % solved, " ".join(f"{s}:{times[key, arm].get(s, 'never')}" for s in values))
            base = finals.get((key, "dash-stopped"), {})
            pairs = [v - base[s][1] for s, v in values.items() if s in base]
            if arm != "dash-stopped" and len(pairs) > 1 and any(pairs):
                mean, _, half = estimate(pairs)
                p = p_of_interval(mean, half, len(pairs)) if half > 0 else math.nan
                print("    - dash-stopped: %.3f (%.3f to %.3f), t p = %.3f; sign-flip p = %.4f, smallest possible %.4f" % (mean, mean - half, mean + half, p, *sign_flip(pairs)))


def self_check():
    """Against tables: t(0.975, 4) = 2.776445, t(0.975, 2) = 4.302653, t(0.8, 4) = 0.940965; Holm by hand; 3 against 3 separated: 2 / 20."""
    for p, df, value in ((0.975, 4, 2.776445), (0.975, 2, 4.302653), (0.8, 4, 0.940965)):
        assert abs(t_quantile(p, df) - value) < 1e-6, (p, df)
    assert all(abs(x - y) < 1e-12 for x, y in zip(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06]))
    assert abs(rank_sum([1, 2, 3], [4, 5, 6]) - 0.1) < 1e-12
    assert sign_flip([1.0, 2.0, 3.0]) == (0.25, 0.25)
    # Darwin's maize (Fisher 1935): 863 of 32768 arrangements
    maize = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    assert 1 + sum(m <= 1e-9 for m in subset_means(maize)) == 863
    # Freireich's leukaemia: 9 events of the drug where equal rates would give 19.25; medians 23 and 8 weeks
    drug = [6, 6, 6, 6, 7, 9, 10, 10, 11, 13, 16, 17, 19, 20, 22, 23, 25, 32, 32, 34, 35]
    drug = [(at, i not in (3, 5, 7, 8, 11, 12, 13, 16, 17, 18, 19, 20)) for i, at in enumerate(drug)]
    placebo = [(at, True) for at in (1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23)]
    assert abs(sum(hazards(drug + placebo)[: len(drug)]) - (9 - 19.25)) < 0.005 and (median(drug), median(placebo)) == (23, 8)
    observed, _, p = log_rank([(1, True), (2, True), (3, True)], [(4, True), (5, True), (6, False)])
    assert observed == 3 and abs(p - 0.1) < 1e-12


if __name__ == "__main__":
    self_check()
    if len(sys.argv) > 1:
        for name in sys.argv[1:]:
            of_rows(name)
    else:
        printed()
        print("\nP0's arms on a card, censored at 3000")
        card_times(Path(__file__).parent / "p0" / "card-times.csv", "dash-stopped")
        for name, title, margin, others in STUDIES:
            rows = Path(__file__).parent / name / "results.csv.gz"
            print(f"\n{title}, time to solve (0.9 in two validations running)")
            of_times(rows, "dash-stopped", margin)
            near_misses(rows)
            other_lines(rows, "dash-stopped")
            for arm, against in others:
                two_arms(solved_times(rows), arm, against)
            tuning(rows)
            print("  Last values, mean over seeds (least to largest):")
            last_values(rows, "dash-stopped")
