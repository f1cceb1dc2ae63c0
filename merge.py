"""Weight merging, at once or over time: many experts of one base model become one model, without training.

Continual pretraining (Roth et al. 2024, arXiv 2408.14471) and TIME (Dziadzio et al. 2024, arXiv 2412.06712); the
techniques' own papers stand at their functions. This file needs torch only; copy it:

    import merge, torch
    base = {"w": torch.zeros(4)}
    experts = [{"w": torch.tensor([1.0, 2.0, 0.1, 3.0])}, {"w": torch.tensor([2.0, -1.0, 0.2, 1.0])}]
    merge.merge("ties", base, experts, density=0.5)["w"]  # tensor([2., 2., 0., 3.])

    timeline = merge.Timeline(base, **merge.TIMELINES["ema-merge"], weight=0.9)
    for expert in experts:  # in life: model.load_state_dict(timeline.start()), train, timeline.add(model.state_dict())
        timeline.add(expert)
    timeline.deploy()["w"]  # 0.9 * (0.9 * base + 0.1 * experts[0]) + 0.1 * experts[1]

Base and experts are mappings from name to tensor, dicts or lazily read files; none is written or aliased. theta_0 is
the base, theta_i an expert, tau_i = theta_i - theta_0 its task vector.

Memory: the result and, of one tensor, the base, one expert and a few sums. Experts are streamed, as twenty token
embeddings outweigh a ViT-B-16; the largest tensors go first, while the result is empty; pieces fit the cache.
"""

import hashlib
import inspect
import math
import re

import torch

PIECE = 2**18  # entries worked on at a time: 1 MB in float32
ONCE = 2**16  # entries read at a time, where every entry is used once


# --------------------------------------------------------------------------------------------------------- merging


@torch.no_grad()
def merge(technique, base, experts, weights=None, **options):
    """-> dict of new tensors with the base's names, shapes, dtypes and devices.

    weights: a number per expert. linear, slerp and random average: theirs sum to one, default 1/k each. For
    task-arithmetic, ties, dare and breadcrumbs they multiply the task vectors, default 1 each. The others take none.
    options: the technique's own and, for all but linear and slerp, scale, the factor on the merged task vector, and
    lines = (alpha, beta, "linear" | "quadratic" | "sqrt"), LiNeS' factor per layer on top of it.
    Computed in float32 (float64 for a float64 base). Tensors of one entry, such as logit_scale, have no direction: they
    are averaged, whatever the technique. Integer tensors are the base's.
    Raises ValueError where names, shapes, weights or options do not fit."""
    if hasattr(experts, "keys"):
        raise ValueError("experts is a list of mappings, even of one; got a mapping")
    experts, options = list(experts), dict(options)
    check_options(technique, options)
    weights = _check_weights(technique, weights, len(experts))
    for i, expert in enumerate(experts):
        _check_names(base, expert, f"expert {i}")
    tensors = {name: Vectors(name, base, experts) for name in base}
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].n))  # the largest first
    scale, lines = options.pop("scale", 1.0), options.pop("lines", None)
    layers = layer_scales(base, *lines) if lines else {}
    if options.get("whole"):
        vectors = [v for v in tensors.values() if v.n > 1 and v.stored.is_floating_point]
        options["whole"] = _cuts_over_all(vectors, options.get("density", 0.2), len(experts))
    merged = {}
    for name, v in tensors.items():
        if v.n == 0 or not v.stored.is_floating_point:
            for i in range(len(experts)):
                v.theta(i)  # checks its shape
            out = base[name].detach().clone()
        elif v.n == 1:
            shares = weights if sum(weights) > 0 and min(weights) >= 0 else [1.0] * len(weights)
            out = linear(v, [w / sum(shares) for w in shares])
        else:
            out = TECHNIQUES[technique](v, weights, **options)  # [n]: theta of linear and slerp, tau of the others
            if technique not in THETA:
                for part, theta_0 in v.base():
                    out[part].mul_(scale * layers.get(name, 1.0)).add_(theta_0)  # theta_0 + s tau
        merged[name] = out.to(v.stored).reshape(v.shape)
        v.close()
    return {name: merged[name] for name in base}


class Vectors:
    """One tensor of the base and of every expert, flattened to [n]. Reads the base and, one at a time, the experts when
    they are asked for; going over the expert at hand again costs no reading. close() forgets what was read."""

    def __init__(self, name, base, experts):
        tensor = base[name]
        self.shape, self.n, self.stored, self.device = tensor.shape, tensor.numel(), tensor.dtype, tensor.device
        self.dtype = _wide(tensor.dtype)
        self.name, self.source, self.experts = name, base, experts
        self.close()

    def close(self):
        self.theta_0 = self.theta_i = self.i = None

    def zeros(self, dtype=None):
        return torch.zeros(self.n, dtype=dtype or self.dtype, device=self.device)

    def base(self):
        """Yields (slice, theta_0[slice])."""
        if self.theta_0 is None:
            self.theta_0 = self.source[self.name].detach().reshape(-1)
        return self._pieces(self.theta_0)

    def theta(self, i):
        """Yields (slice, theta_i[slice]); may be a view of the expert: not to be written."""
        if self.i != i:
            self.theta_i = None  # let go of one expert before the next is read
            tensor = self.experts[i][self.name].detach()
            self._check(tensor, i)
            self.theta_i, self.i = tensor.reshape(-1), i
        return self._pieces(self.theta_i)

    def theta_once(self, i):
        """theta(i) for who goes over it but once: a mapping whose stored(name).pieces(n) can, reads it piece by piece
        into the same memory, which takes half the time."""
        stored = self.experts[i].stored(self.name) if hasattr(self.experts[i], "stored") else None
        if stored is None:
            yield from self.theta(i)
            return
        self._check(stored, i)
        for k, piece in enumerate(stored.pieces(ONCE)):
            yield slice(k * ONCE, (k + 1) * ONCE), piece.to(self.device, self.dtype)

    def _check(self, tensor, i):
        if (*tensor.shape,) != (*self.shape,) or tensor.dtype.is_floating_point != self.stored.is_floating_point:
            here, there = f"{tensor.dtype} {[*tensor.shape]}", f"{self.stored} {[*self.shape]}"
            raise ValueError(f"tensor {self.name} is {here} in expert {i}, but {there} in the base")

    def tau(self, i):
        """Yields (slice, tau_i[slice]), fresh tensors."""
        for (part, theta), (_, theta_0) in zip(self.theta(i), self.base()):
            yield part, theta - theta_0

    def _pieces(self, flat):
        for start in range(0, self.n, PIECE):
            part = slice(start, start + PIECE)
            yield part, flat[part].to(self.device, self.dtype)


# ------------------------------------------------------------------------------------------------------ techniques
# each is f(v: Vectors, weights, its options) -> [n]


def linear(v, weights):
    """sum_i w_i theta_i. Model soups, Wortsman et al. 2022, arXiv 2203.05482."""
    return _total(v, weights, v.theta_once)


def slerp(v, weights):
    """Along the great circle (Shoemake 1985), on the unnormalised tensors: with a the angle between the two,
    sin((1-t) a)/sin a theta_1 + sin(t a)/sin a theta_2, t the second one's weight; linear where |cos a| > .9995.
    More than two are folded from the left, t_i = w_i / (w_1 + ... + w_i), so their order matters."""
    merged, so_far = v.zeros(), 0.0
    for i, weight in enumerate(weights):
        so_far += weight
        t = weight / so_far if so_far else 0.0
        dot = norm = norm_i = 0.0
        for part, theta in v.theta(i):
            m = merged[part]
            dot, norm, norm_i = dot + float(m @ theta), norm + float(m @ m), norm_i + float(theta @ theta)
        length = math.sqrt(norm) * math.sqrt(norm_i)
        cosine = dot / length if length else 1.0  # the first one, and zero tensors, are met linearly
        old, new = 1 - t, t
        if abs(cosine) <= 0.9995:
            angle = math.acos(cosine)
            old, new = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
        for part, theta in v.theta(i):
            merged[part].mul_(old).add_(theta, alpha=new)
    return merged


def task_arithmetic(v, weights):
    """sum_i w_i tau_i. Ilharco et al. 2022, arXiv 2212.04089."""
    return _total(v, weights, v.tau)


def ties(v, weights, *, density=0.2, whole=False, function="mean"):
    """Trim, elect, merge. Yadav et al. 2023, arXiv 2306.01708.

    Trims every tau to its `density` share of largest magnitude, within each tensor (default; mergekit, peft) or over
    all tensors together (whole; the paper, its code). Exactly k = round(density n), at least 1, survive: of equal
    magnitudes at the threshold the first ones, largest tensor first. (The official code keeps k + 1 and all equals.)"""

    def trimmed(i):
        cut = whole[i] if whole else _cut(v, i, max(1, round(density * v.n)))
        for part, tau in v.tau(i):
            yield part, cut.trim(tau)

    return _elect(v, weights, trimmed, function)


def dare(v, weights, *, drop=0.9, elect=False, function="mean", seed=0):
    """Drops each entry of tau with probability `drop` and divides the rest by 1 - drop, so its mean stays; then the
    sum, or (elect) TIES' election with `function`. Yu et al. 2023, arXiv 2311.03099. The masks are a function of seed,
    tensor name and the expert's place, not of device, dtype or the other tensors."""
    generator = _generator(seed, v.name)

    def thinned(i):
        for part, tau in v.tau(i):
            keep = torch.rand(len(tau), generator=generator, device="cpu") >= drop
            yield part, tau.mul_(keep.to(tau.device)).div_(1 - drop)

    return _elect(v, weights, thinned, function) if elect else _total(v, weights, thinned)


def breadcrumbs(v, weights, *, top=0.01, bottom=0.85):
    """Sum of the taus without their outliers, in each tensor the `top` share of largest magnitude, and without their
    noise, the `bottom` share of smallest. Davari and Belilovsky 2023, arXiv 2312.06795 (gamma, beta)."""

    def masked(i):
        few = round(top * v.n)
        loud, outliers = _cut(v, i, max(1, few, v.n - round(bottom * v.n))), _cut(v, i, few) if few else None
        for part, tau in v.tau(i):
            yield part, loud.trim(tau) - (outliers.trim(tau) if few else 0)

    return _total(v, weights, masked)


def magmax(v, weights):
    """Of each entry the tau of largest magnitude, of equal ones the later. Marczak et al. 2024, arXiv 2407.06322."""
    best = v.zeros()
    for i in range(len(weights)):
        for part, tau in v.tau(i):
            best[part] = torch.where(tau.abs() >= best[part].abs(), tau, best[part])
    return best


def model_stock(v, weights):
    """t mean_i tau_i, t = k c / (1 + (k-1) c), c the mean cosine between two taus of this tensor, at least 0 (a zero
    tau counts as orthogonal). Jang et al. 2024, arXiv 2403.19522, for k >= 2."""
    k, moved, mean, directions = len(weights), 0, v.zeros(), v.zeros()
    for i in range(k):
        norm = math.sqrt(sum(float(tau @ tau) for _, tau in v.tau(i)))
        if norm > 0:
            moved += 1
            for part, tau in v.tau(i):
                mean[part].add_(tau, alpha=1 / k)
                directions[part].add_(tau, alpha=1 / norm)
    # |sum_i tau_i / |tau_i||^2 = k + the cosines of all ordered pairs: no two experts need be in memory together
    squared = sum(float(piece @ piece) for piece in directions.split(PIECE))
    c = max(0.0, (squared - moved) / (k * (k - 1)))
    return mean.mul_(k * c / (1 + (k - 1) * c))


def random(v, weights, *, seed=0):
    """Each entry of one expert's tau, expert i's with probability w_i: TIME's baseline. Draws as dare does."""
    generator, chosen, so_far = _generator(seed, v.name), v.zeros(), 0.0
    for i, weight in enumerate(weights):  # a reservoir: the i-th takes the place with chance w_i / (w_1 + ... + w_i)
        so_far += weight
        p = weight / so_far if so_far else 0.0
        for part, tau in v.tau(i):
            take = torch.rand(len(tau), generator=generator, device="cpu") < p
            chosen[part] = torch.where(take.to(tau.device), tau, chosen[part])
    return chosen


def tall_mask(v, weights, *, strictness=0.4, agree=2):
    """The summed tau, kept where at least `agree` experts (all, if fewer) need the entry: |tau_i| >
    strictness |sum tau - tau_i|. TALL masks and consensus merging, Wang et al. 2024, arXiv 2405.07813; strictness is
    their lambda, which they tune per task on validation data. Reads every expert twice."""
    total, votes = _total(v, weights, v.tau), v.zeros(torch.int16)
    for i in range(len(weights)):
        for part, tau in v.tau(i):
            votes[part] += tau.abs() > strictness * (total[part] - tau).abs_()
    return total.masked_fill_(votes < min(agree, len(weights)), 0.0)


TECHNIQUES = {
    "linear": linear, "slerp": slerp, "task-arithmetic": task_arithmetic, "ties": ties, "dare": dare,
    "breadcrumbs": breadcrumbs, "magmax": magmax, "model-stock": model_stock, "random": random, "tall-mask": tall_mask,
}  # fmt: skip
THETA = ("linear", "slerp")  # these return weights, the others a task vector
AVERAGES = ("linear", "slerp", "random")  # weights sum to one
UNWEIGHTED = ("magmax", "model-stock", "tall-mask")


def _total(v, weights, pieces):
    """sum_i w_i x_i over pieces(i), which yields (slice, x_i[slice])."""
    total = v.zeros()
    for i, weight in enumerate(weights):
        for part, x in pieces(i):
            total[part].add_(x, alpha=weight)
    return total


def _elect(v, weights, pieces, function):
    """TIES' steps 2 and 3: an entry's sign is that of its sum over the experts (plus for a sum of 0, as in mergekit and
    peft); then the mean, sum or largest magnitude of the non-zero entries of that sign. What agrees with either sign is
    gathered side by side, so that every expert is read once."""
    plus, minus = v.zeros(), v.zeros()  # sums of the entries above and below zero
    plus_most, minus_most = (v.zeros(), v.zeros()) if function != "sum" else (plus, minus)  # their numbers or extremes
    for i, weight in enumerate(weights):
        for part, tau in pieces(i):
            above, below = tau.mul_(weight).clamp(min=0), tau.clamp_(max=0)
            plus[part].add_(above)
            minus[part].add_(below)
            if function == "mean":
                plus_most[part].add_(above.sign_())
                minus_most[part].add_(below.sign_())
            elif function == "max":
                torch.maximum(plus_most[part], above, out=plus_most[part])
                torch.minimum(minus_most[part], below, out=minus_most[part])
    for part, _ in v.base():
        positive = plus[part] + minus[part] >= 0
        if function == "mean":  # minus_most counts downwards
            plus[part] /= plus_most[part].clamp_(min=1)
            minus[part] /= minus_most[part].clamp_(max=-1).neg_()
            plus[part] = torch.where(positive, plus[part], minus[part])
        else:
            plus[part] = torch.where(positive, plus_most[part], minus_most[part])
    return plus


class Cut:
    """The k entries of largest magnitude of a vector that is seen only piece by piece: exact, in bounded memory.

    A radix select. The bit patterns of non-negative floats order as their values do, so a pass over the vector counts
    16 more bits of |tau| (float32: 2 passes, float64: 4) among the entries that share the bits found so far, and the
    last ends at the k-th largest magnitude itself; `room` entries of just that magnitude belong to the k."""

    def __init__(self, k, dtype):
        self.integer = {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
        self.dtype, self.room, self.bits, self.counts = dtype, k, 0, 0
        self.shift = self.top = 8 * dtype.itemsize - 16

    def count(self, tau):
        bits = tau.abs().to(self.dtype).view(self.integer)
        if self.shift < self.top:
            bits = bits[bits >> self.shift + 16 == self.bits] & (1 << self.shift + 16) - 1
        self.counts += torch.bincount(bits >> self.shift, minlength=2**16)

    def narrow(self):
        """To be called when every piece was counted. Returns whether another pass is needed."""
        up_to = self.counts.cumsum(0)  # [2^16]
        larger = up_to[-1] - up_to  # entries with a larger digit than this one
        digit = int((larger >= self.room).sum())
        self.room -= int(larger[digit])
        self.bits, self.counts, self.shift = self.bits << 16 | digit, 0, self.shift - 16
        self.threshold = float(torch.tensor(self.bits, dtype=self.integer).view(self.dtype)) if self.shift < 0 else None
        return self.shift >= 0

    def trim(self, tau):
        """tau with all but the k entries set to 0, as a new tensor. To be called once for each piece, in order."""
        tau = tau.to(self.dtype)
        kept = torch.nn.functional.hardshrink(tau, self.threshold)  # |tau| > threshold
        if self.room > 0:
            equal = (tau.abs() == self.threshold).nonzero().squeeze(1)[: self.room]
            kept[equal] = tau[equal]
            self.room -= len(equal)
        return kept


def _cut(v, i, k):
    cut, more = Cut(k, v.dtype), True
    while more:
        for _, tau in v.tau(i):
            cut.count(tau)
        more = cut.narrow()
    return cut


def _cuts_over_all(vectors, density, experts):
    wide = torch.float64 if any(v.dtype == torch.float64 for v in vectors) else torch.float32
    k = max(1, round(density * sum(v.n for v in vectors)))
    cuts, more = [Cut(k, wide) for _ in range(experts)], bool(vectors)
    while more:
        for v in vectors:
            for i, cut in enumerate(cuts):
                for _, tau in v.tau(i):
                    cut.count(tau)
            v.close()
        for cut in cuts:
            more = cut.narrow()  # all need as many passes
    return cuts


def _wide(dtype):
    """What to compute in."""
    return dtype if dtype == torch.float64 or not dtype.is_floating_point else torch.float32


def _generator(seed, name):
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))  # on the CPU, wherever the weights are


CURVES = {"linear": lambda x: x, "quadratic": lambda x: x * x, "sqrt": math.sqrt}


def layer_scales(names, alpha=0.5, beta=0.5, how="linear"):
    """LiNeS (Wang et al. 2024, arXiv 2410.17146): alpha + beta f(l / (L-1)) for the tensors of block l of L, alpha for
    all others. A block is the first number in a name; L is counted for each tower, i.e. what precedes the number, on
    its own. -> dict from name to factor."""
    if how not in CURVES:
        raise ValueError(f"lines must end in one of {', '.join(CURVES)}, got {how!r}")
    blocks = {name: re.match(r"(?:(.*?)\.)?(\d+)\.", name) for name in names}
    last = {}
    for m in filter(None, blocks.values()):
        last[m[1]] = max(last.get(m[1], 1), int(m[2]))  # L - 1, or 1: a single block has the position 0
    return {n: alpha + beta * CURVES[how](int(m[2]) / last[m[1]]) if m else alpha for n, m in blocks.items()}


# ---------------------------------------------------------------------------------------------------------- checks

SHARE = (lambda x: 0 <= x < 1, "in [0, 1)")
RANGES = {
    "density": (lambda x: 0 < x <= 1, "in (0, 1]"), "drop": SHARE, "top": SHARE, "bottom": SHARE,
    "function": (lambda x: x in ("mean", "sum", "max"), "mean, sum or max"),
    "strictness": (lambda x: 0 <= x < math.inf, "0 or more"), "scale": (lambda x: abs(x) < math.inf, "a finite number"),
    "agree": (lambda x: x >= 1 and x == int(x), "a whole number from 1"),
    "lines": (lambda x: x is None or len(x) == 3 and all(map(math.isfinite, x[:2])) and x[2] in CURVES,
              "(alpha, beta, linear | quadratic | sqrt)"),
    "whole": (lambda x: isinstance(x, bool), "true or false"),
    "elect": (lambda x: isinstance(x, bool), "true or false"),
    "seed": (lambda x: isinstance(x, (int, str)), "a whole number or a text"),
}  # fmt: skip


def check_options(technique, options):
    """ValueError unless merge(technique, ..., **options) accepts them."""
    if technique not in TECHNIQUES:
        raise ValueError(f"technique must be one of {', '.join(TECHNIQUES)}, got {technique!r}")
    own = inspect.signature(TECHNIQUES[technique]).parameters.values()
    known = [p.name for p in own if p.kind == p.KEYWORD_ONLY] + ([] if technique in THETA else ["scale", "lines"])
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"{technique} has no option {name!r}; it takes {', '.join(known) or 'none'}")
        try:
            fits = RANGES[name][0](value) if name in RANGES else True
        except TypeError:
            fits = False
        if not fits:
            raise ValueError(f"{name} must be {RANGES[name][1]}, got {value!r}")
    if technique == "breadcrumbs" and options.get("top", 0.01) + options.get("bottom", 0.85) >= 1:
        raise ValueError("top and bottom must leave something: their sum must be below 1")


def _check_weights(technique, weights, k):
    if k < (2 if technique == "model-stock" else 1):
        raise ValueError(f"{technique} needs {'two experts, got one' if k else 'an expert, got none'}")
    if weights is None:
        return [1 / k if technique in AVERAGES else 1.0] * k
    if technique in UNWEIGHTED:
        raise ValueError(f"{technique} takes no weights")
    weights = [float(w) for w in weights]
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights must be finite, got {weights}")
    if len(weights) != k:
        raise ValueError(f"weights must be one per expert: got {len(weights)} for {k} experts")
    if technique in AVERAGES and abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"weights must sum to one for {technique}, got {weights} with sum {sum(weights):.6g}")
    if technique in ("slerp", "random") and min(weights) < 0:
        raise ValueError(f"weights must not be negative for {technique}, got {weights}")
    return weights


def _check_names(base, other, what):
    different = sorted(set(base) ^ set(other))
    if different:
        where = "base" if different[0] in base else what
        raise ValueError(f"tensor {different[0]} is only in the {where} ({len(different)} names differ from the base)")


# ------------------------------------------------------------------------------------------------ merging over time

GROWTHS = {
    "uniform": lambda i: 1, "linear": lambda i: i, "sqrt": math.sqrt, "quadratic": lambda i: i**2,
    "cubic": lambda i: i**3, "fifth": lambda i: i**5, "tenth": lambda i: i**10, "exponential": lambda i: 2**i,
    "logarithmic": lambda i: math.log(i + 1),
}  # fmt: skip


def expert_weights(tasks, how="uniform", reverse=False, include_base=False):
    """Weights of the experts of `tasks` tasks, oldest first, that sum to one: they grow as GROWTHS[how](1, 2, ...), or
    with reverse shrink so. With include_base theta_0 comes before the first and has the first weight. (TIME.)"""
    if how not in GROWTHS:
        raise ValueError(f"expert weights must be one of {', '.join(GROWTHS)}, got {how!r}")
    raw = [GROWTHS[how](i) for i in range(1, tasks + include_base + 1)]
    return [w / sum(raw) for w in (reversed(raw) if reverse else raw)]


TIMELINES = {
    "finetune": {"init": "latest", "deploy": "latest"},
    "ema-merge": {"init": "ema", "deploy": "ema"},
    "zs-merge": {"init": "zero-shot", "deploy": "ema"},
    "ft-merge": {"init": "ema", "deploy": "ema", "anchored": True},
    "offline-merge": {"init": "zero-shot", "deploy": "all"},
}
SOURCES = ("zero-shot", "latest", "ema", "all")


class Timeline:
    """Which weights start a task and which are deployed after it (TIME, sec. 3). theta_t is what training task t makes
    of start(), m_t the running merge, M_t one merge of theta_1 ... theta_t; before the first task all are theta_0.

    init / deploy | latest: theta_t             | ema: m_t                          | all: M_t
    zero-shot     | the last task's specialist  | zs-merge: average of specialists  | offline-merge
    latest        | finetune                    | finetune, its running average     | finetune, its snapshots merged
    ema           | one task away from m_{t-1}  | ema-merge, the best in TIME       | trained from m, all experts merged
    all           | one task away from M_{t-1}  | trained from M, running average   | all experts merged at every step

    m_t = w m_{t-1} + (1-w) theta_t for linear: w weighs the old weights. anchored (ft-merge) puts theta_0 in the place
    of m_{t-1}. slerp and random do the same in their way. The other techniques have no such weight: m_t is their merge,
    against theta_0, of the two experts m_{t-1} and theta_t, as in the authors' code; the first m, and every anchored
    one, is of theta_t alone, as theta_0 has no task vector. task-arithmetic overshoots then, m_{t-1} being within both,
    unless scale is small (.1). model-stock of a single expert is that expert, here.

    M_t weighs its experts by expert_weights(t, ...); techniques that add task vectors get as many times these as there
    are experts, so that uniform is 1 each. dare and random draw new masks for every t.

    base: theta_0, is copied. options: the technique's, see merge().
    store: keeps the experts if init or deploy is "all": has append(state dict), [i] -> mapping, len, pop(), and belongs
    to this timeline alone. By default a list in memory. A run killed after add() and before state() was saved leaves an
    expert too many in a store on disk; the next add() drops it."""

    def __init__(self, base, init="ema", deploy="ema", technique="linear", weight=0.9, store=None,
                 expert_weights="uniform", reverse=False, include_base=False, anchored=False, **options):  # fmt: skip
        check_options(technique, options)
        limits = ("init", init, SOURCES), ("deploy", deploy, SOURCES[1:]), ("expert_weights", expert_weights, GROWTHS)
        for option, value, allowed in limits:
            if value not in allowed:
                raise ValueError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must be in [0, 1], got {weight!r}")
        if technique in UNWEIGHTED and expert_weights != "uniform":
            raise ValueError(f"{technique} takes no weights: expert_weights must be uniform, got {expert_weights!r}")
        self.init, self.deployed, self.technique, self.options = init, deploy, technique, options
        self.weight, self.anchored, self.store = weight, anchored, [] if store is None else store
        self.growth = {"how": expert_weights, "reverse": reverse, "include_base": include_base}
        self.keeps = {init, deploy} - {"zero-shot"}  # what has to be remembered
        self.task, self.base, self.latest = 0, _copy(base), {}
        self.running = _copy(self._widened(self.base)) if "ema" in self.keeps else {}  # m_t, never in 16 bits

    def start(self):
        """State dict to train the next task from, in the base's dtypes and on its devices; the caller's own."""
        return self._weights(self.init)

    def deploy(self):
        """State dict to evaluate and ship after the tasks added so far; the caller's own."""
        return self._weights(self.deployed)

    @torch.no_grad()
    def add(self, theta):
        """theta: state dict at the end of a task; copied as far as needed."""
        _check_names(self.base, theta, "new expert")
        for name, like in self.base.items():
            if (shape := theta[name].shape) != like.shape:
                raise ValueError(f"tensor {name} is {list(shape)} in the new expert, not {list(like.shape)}")
        if "ema" in self.keeps:
            self._update(theta)
        if "latest" in self.keeps:
            self.latest = _copy(theta)
        if "all" in self.keeps:
            if len(self.store) < self.task:
                raise ValueError(f"the store holds {len(self.store)} experts of the {self.task} tasks added so far")
            while len(self.store) > self.task:
                self.store.pop()
            self.store.append(_copy(theta) if isinstance(self.store, list) else theta)
        self.task += 1

    def state(self):
        """Copies of all that changes, for torch.save; experts in a store of the caller's are not among it."""
        experts = [_copy(e) for e in self.store[: self.task]] if isinstance(self.store, list) else []
        return {"task": self.task, "keeps": sorted(self.keeps), "experts": experts,
                "running": _copy(self.running), "latest": _copy(self.latest)}  # fmt: skip

    def load_state(self, state):
        if state["keeps"] != sorted(self.keeps):
            raise ValueError(f"the state is of a timeline that keeps {state['keeps']}, this one {sorted(self.keeps)}")
        self.task = state["task"]
        self.running, self.latest = (
            {name: t.to(self.base[name].device, copy=True) for name, t in state[key].items()}
            for key in ("running", "latest")
        )
        if isinstance(self.store, list):
            self.store[:] = map(_copy, state["experts"])

    def _weights(self, source):
        kept = {"zero-shot": self.base, "latest": self.latest, "ema": self.running}
        weights = self.base if self.task == 0 else kept[source] if source in kept else self._merge_all()
        return {n: weights[n].detach().to(like.device, like.dtype, copy=True) for n, like in self.base.items()}

    def _update(self, theta):
        """m_{t-1} -> m_t."""
        weights = [self.weight, 1 - self.weight] if self.technique in AVERAGES else None
        if self.technique == "linear":  # in place
            names = [n for n, m in self.running.items() if m.is_floating_point()]
            running = [self.running[n] for n in names]
            if self.anchored:
                torch._foreach_copy_(running, [self.base[n] for n in names])
            torch._foreach_lerp_(running, [theta[n].detach().to(self.running[n]) for n in names], weights[1])
        elif weights or self.task > 0 and not self.anchored:
            self.running = self._merge([self.base if self.anchored else self.running, theta], weights)
        else:
            self.running = self._merge([theta], None)

    def _merge_all(self):
        experts = [self.base] * self.growth["include_base"] + [self.store[i] for i in range(self.task)]
        weights = expert_weights(self.task, **self.growth)
        if self.technique not in AVERAGES:
            weights = None if self.growth["how"] == "uniform" else [len(weights) * w for w in weights]
        return self._merge(experts, weights)

    def _merge(self, experts, weights):
        if self.technique == "model-stock" and len(experts) == 1:
            return _copy(self._widened(experts[0]))
        options = dict(self.options)
        if self.technique in ("dare", "random"):
            options["seed"] = f"{options.get('seed', 0)} {self.task}"
        return merge(self.technique, self._widened(self.base), experts, weights, **options)

    def _widened(self, weights):
        return {n: weights[n].detach().to(like.device, _wide(like.dtype)) for n, like in self.base.items()}


def _copy(weights):
    return {name: weights[name].detach().clone() for name in weights}
