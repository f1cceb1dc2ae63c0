"""Weight merging, at once or over time: many experts of one base become one, without training.

Continual pretraining (Roth et al. 2024, arXiv 2408.14471) and TIME (Dziadzio et al. 2024, arXiv
2412.06712); the techniques' own papers stand at their functions. This file needs torch only; copy
it:

    import merge, torch
    base = {"w": torch.zeros(4)}
    one = {"w": torch.tensor([1.0, 2.0, 0.1, 3.0])}
    two = {"w": torch.tensor([2.0, -1.0, 0.2, 1.0])}
    merge.merge("ties", base, [one, two], density=0.5)["w"]  # tensor([2., 2., 0., 3.])

    timeline = merge.Timeline(base, **merge.TIMELINES["ema-merge"], weight=0.9)
    for expert in (one, two):  # in life: load timeline.start(), train, add(model.state_dict())
        timeline.add(expert)
    timeline.deploy()["w"]  # 0.9 * (0.9 * base + 0.1 * one) + 0.1 * two

Base and experts are mappings from name to tensor, dicts or lazily read files; none is written or
aliased. theta_0 is the base, theta_i an expert, tau_i = theta_i - theta_0 its task vector.

A technique's name stands for several versions of it. These options give

             the paper's               the authors' of TIME                  mergekit's
ties         density=.2 whole          density=.2 whole scale=.3             (default)
dare         (default)                 drop=.7 elect                         elect (dare_ties)
breadcrumbs  (default)                 bottom=.7 elect whole                 elect (.._ties)
lines        scale=1                   lines in place of scale               -
model-stock  (default)                 no clamp of negative cosines          (default)
tall-mask    strictness tuned a task   agree=2                               -

TIME's yaml *prunes* .8, which is our density .2; the defaults of its code prune .2 offline and .7
over time. Its scalars (logit_scale) go with the vector; ours: see merge().

Memory: the result and, of one tensor, the base, one expert and a few sums, if the mappings read (or
map) a tensor when it is asked for. Twenty token embeddings outweigh a ViT-B-16, so experts follow
one another; the largest tensors go first, while the result is empty; pieces fit the cache.
"""

import hashlib
import inspect
import math
import re
from typing import NamedTuple

import torch

PIECE = 2**18  # entries worked on at a time: 1 MB in float32


# ----------------------------------------------------------------------------------------- merging


@torch.no_grad()
def merge(technique, base, experts, weights=None, **options):
    """-> dict of new tensors with the base's names, shapes, dtypes and devices.

    weights: a number per expert. linear, slerp and random average: theirs sum to one, default 1/k
    each. For task-arithmetic, ties, dare and breadcrumbs they multiply the task vectors, default 1
    each. The others take none.
    options: see OPTIONS and used(technique).
    Computed in float32 (float64 for a float64 base). A tensor of one entry, such as logit_scale,
    has no direction: but for linear and task-arithmetic, its task vector is the weighted mean of
    the experts'. Integer tensors are the base's.
    Raises ValueError where names, shapes, weights or options do not fit, and where an input or the
    result is not finite."""
    if hasattr(experts, "keys"):
        raise ValueError("experts is a list of mappings, even of one; got a mapping")
    experts = list(experts)
    check_options(technique, options)
    options = {name: OPTIONS[name].default for name in used(technique)} | options
    weights = _check_weights(technique, weights, len(experts))
    for i, expert in enumerate(experts):
        _check_names(base, expert, f"expert {i}")
    tensors = [Vectors(name, base, experts) for name in base]
    tensors.sort(key=lambda v: -v.n)  # the largest first
    scale = options.pop("scale", 1.0)
    lines = options.pop("lines", None)
    layers = layer_scales(base, *lines) if lines else {}
    if options.get("whole"):
        vectors = [v for v in tensors if v.n > 1 and v.stored.is_floating_point]
        sizes = SIZES[technique](sum(v.n for v in vectors), **options)
        options["whole"] = _cuts(vectors, sizes, range(len(experts)))
    merged = {}
    for v in tensors:
        if v.n == 0 or not v.stored.is_floating_point:
            v.check()
            out = base[v.name].detach().clone()
        else:
            scalar = v.n == 1 and technique not in LINEAR
            if scalar:
                out = mean_change(v, weights)  # tau
            else:
                out = TECHNIQUES[technique](v, weights, **options)  # [n]: theta or tau
            if technique not in THETA:
                out.mul_(scale * layers.get(v.name, 1.0))
            if scalar or technique not in THETA:
                for part, theta_0 in v.base():
                    out[part].add_(theta_0)
        merged[v.name] = out.to(v.stored).reshape(v.shape)
        _check_finite(merged[v.name], v.name, "the result: take a smaller scale or weights")
        v.close()
    return {name: merged[name] for name in base}


class Option(NamedTuple):
    kind: type
    default: object
    fits: object  # value -> bool
    limits: str  # the same in words
    help: str


def _share(x):
    return 0 <= x < 1


def _flag(x):
    return isinstance(x, bool)


def _line(x):
    return x is None or len(x) == 3 and all(map(math.isfinite, x[:2])) and x[2] in CURVES


OPTIONS = {  # every option of every technique
    "scale": Option(float, 1.0, lambda x: abs(x) < math.inf, "a finite number",
                    "factor on the merged task vector"),
    "lines": Option(tuple, None, _line, "(alpha, beta, linear | quadratic | sqrt)",
                    "LiNeS, a second factor, for each layer: alpha + beta f(its depth)"),
    "density": Option(float, 0.2, lambda x: 0 < x <= 1, "in (0, 1]",
                      "share of each task vector that is kept"),
    "whole": Option(bool, False, _flag, "true or false",
                    "the shares are of all tensors together, not of each"),
    "elect": Option(bool, False, _flag, "true or false", "elect signs as ties does"),
    "function": Option(str, "mean", lambda x: x in ("mean", "sum", "max"), "mean, sum or max",
                       "of the entries of the elected sign"),
    "drop": Option(float, 0.9, _share, "in [0, 1)", "probability of dropping an entry"),
    "top": Option(float, 0.01, _share, "in [0, 1)", "share of largest entries that is dropped"),
    "bottom": Option(float, 0.85, _share, "in [0, 1)", "share of smallest entries that is dropped"),
    "strictness": Option(float, 0.4, lambda x: 0 <= x < math.inf, "0 or more",
                         "lambda, how much of the sum an expert must make up"),
    "agree": Option(int, 2, lambda x: x >= 1 and x == int(x), "a whole number from 1",
                    "experts that must need an entry"),
    "seed": Option(int, 0, lambda x: isinstance(x, (int, str)), "a whole number or a text",
                   "of the random masks"),
}  # fmt: skip


def used(technique):
    """-> names of the options that the technique uses."""
    parameters = inspect.signature(TECHNIQUES[technique]).parameters.values()
    own = tuple(p.name for p in parameters if p.kind == p.KEYWORD_ONLY)
    return own if technique in THETA else ("scale", "lines", *own)


# -------------------------------------------------------------------------------------- techniques
# Each is f(v: Vectors, weights, its options) -> [n]: theta of linear and slerp, of the others tau,
# of which merge() makes theta_0 + scale tau. The indented lines define it, everything at once: of
# base [n], experts [k, n], tau = experts - base, and weights [k, 1].


def linear(v, weights):
    """sum_i w_i theta_i. Model soups, Wortsman et al. 2022, arXiv 2203.05482.

        theta = (weights * experts).sum(0)
    """
    return _total(v, weights, v.theta)


def slerp(v, weights):
    """sin((1-t) a) / sin a theta_1 + sin(t a) / sin a theta_2: along the great circle (Shoemake
    1985), on the unnormalised tensors, a the angle between the two, t the second one's weight.

        one, two = experts
        angle = torch.arccos(one @ two / (one.norm() * two.norm()))
        t = weights[1]
        theta = (torch.sin((1 - t) * angle) * one + torch.sin(t * angle) * two) / torch.sin(angle)

    Linear where |cos a| > .9995. More than two are folded from the left, t_i = w_i / (w_1 + ... +
    w_i), so their order matters."""
    merged = v.zeros()
    so_far = 0.0
    for i, weight in enumerate(weights):
        so_far += weight
        t = weight / so_far if so_far else 0.0
        dot = norm = norm_i = 0.0
        for part, theta in v.theta(i):
            dot += float(merged[part] @ theta)
            norm += float(merged[part] @ merged[part])
            norm_i += float(theta @ theta)
        length = math.sqrt(norm) * math.sqrt(norm_i)
        cosine = dot / length if length else 1.0  # the first, and zero tensors: linear
        if abs(cosine) > 0.9995:
            old = 1 - t
            new = t
        else:
            angle = math.acos(cosine)
            old = math.sin((1 - t) * angle) / math.sin(angle)
            new = math.sin(t * angle) / math.sin(angle)
        for part, theta in v.theta(i):
            merged[part].mul_(old).add_(theta, alpha=new)
    return merged


def task_arithmetic(v, weights):
    """sum_i w_i tau_i. Ilharco et al. 2022, arXiv 2212.04089.

        tau = (weights * tau).sum(0)
    """
    return _total(v, weights, v.tau)


def ties(v, weights, *, density, whole, function):
    """Trim, elect, merge. Yadav et al. 2023, arXiv 2306.01708.

        keep = max(1, round(density * n))
        threshold = tau.abs().sort(dim=1, descending=True).values[:, keep - 1 : keep]
        tau = weights * tau * (tau.abs() >= threshold)  # trim
        sign = torch.where(tau.sum(0) >= 0, 1, -1)  # elect
        agrees = tau * sign > 0
        tau = (tau * agrees).sum(0) / agrees.sum(0).clamp(min=1)  # merge, here with function mean

    The shares are of each tensor (default; mergekit, peft) or of all tensors together (whole; the
    paper, its code). Exactly round(density n), at least 1, survive: of equal magnitudes at the
    threshold the first ones, largest tensor first. (The official code keeps one more and all
    equals.)"""

    def trimmed(i):
        (cut,) = whole[i] if whole else _cuts([v], _kept(v.n, density), [i])[0]
        for part, tau in v.tau(i):
            yield part, cut.trim(tau)

    return _elect(v, weights, trimmed, function)


def dare(v, weights, *, drop, elect, function, seed):
    """Drop, rescale, so that the mean stays, and add. Yu et al. 2023, arXiv 2311.03099.

        keep = torch.rand(tau.shape, generator=generator) >= drop
        tau = (weights * tau * keep / (1 - drop)).sum(0)

    elect: TIES' election with `function` in place of the sum (TIME's version; the norm of twenty
    merged experts is then less than half as large). The masks are a function of seed, tensor name
    and the expert's place, not of device, dtype or the other tensors."""
    generator = _generator(seed, v.name)

    def thinned(i):
        for part, tau in v.tau(i):
            keep = torch.rand(len(tau), generator=generator, device="cpu") >= drop
            yield part, tau.mul_(keep.to(tau.device)).div_(1 - drop)

    return _elect(v, weights, thinned, function) if elect else _total(v, weights, thinned)


def breadcrumbs(v, weights, *, top, bottom, elect, whole, function):
    """The sum without outliers and noise. Davari and Belilovsky 2023, arXiv 2312.06795.

        rank = tau.abs().argsort(dim=1, descending=True).argsort(dim=1)  # 0: the largest
        tau = tau * (rank >= round(top * n)) * (rank < n - round(bottom * n))
        tau = (weights * tau).sum(0)

    top and bottom are their gamma and beta; the shares are of each tensor or, with whole, of all
    together. elect: TIES' election with `function` in place of the sum (whole, elect: TIME's)."""

    def masked(i):
        loud, outliers = whole[i] if whole else _cuts([v], _crumbs(v.n, top, bottom), [i])[0]
        for part, tau in v.tau(i):
            yield part, loud.trim(tau) - (outliers.trim(tau) if outliers else 0)

    return _elect(v, weights, masked, function) if elect else _total(v, weights, masked)


def magmax(v, weights):
    """Of each entry the tau of largest magnitude. Marczak et al. 2024, arXiv 2407.06322.

        tau = tau.gather(0, tau.abs().argmax(0, keepdim=True))[0]

    Of equal ones the later."""
    best = v.zeros()
    for i in range(len(weights)):
        for part, tau in v.tau(i):
            best[part] = torch.where(tau.abs() >= best[part].abs(), tau, best[part])
    return best


def model_stock(v, weights):
    """t mean_i tau_i, t = k c / (1 + (k-1) c). Jang et al. 2024, arXiv 2403.19522, for k >= 2.

        unit = tau / tau.norm(dim=1, keepdim=True)
        c = ((unit @ unit.T).sum() - k) / (k * (k - 1))  # mean cosine of two different taus
        c = c.clamp(min=0)
        tau = k * c / (1 + (k - 1) * c) * tau.mean(0)

    Tensor by tensor; a zero tau counts as orthogonal. TIME's does not clamp."""
    k = len(weights)
    moved = 0
    mean = v.zeros()
    directions = v.zeros()
    for i in range(k):
        norm = math.sqrt(sum(float(tau @ tau) for _, tau in v.tau(i)))
        if norm > 0:
            moved += 1
            for part, tau in v.tau(i):
                mean[part].add_(tau, alpha=1 / k)
                directions[part].add_(tau, alpha=1 / norm)
    # |sum_i tau_i / |tau_i||^2 = k + the cosines of all ordered pairs, so that no two experts need
    # be in memory together
    squared = sum(float(piece @ piece) for piece in directions.split(PIECE))
    c = max(0.0, (squared - moved) / (k * (k - 1)))
    return mean.mul_(k * c / (1 + (k - 1) * c))


def random(v, weights, *, seed):
    """Each entry of one expert's tau, expert i's with probability w_i: TIME's baseline.

        tau_i = torch.zeros(n)
        for i in range(k):  # a reservoir: i takes the place with chance w_i / (w_1 + .. + w_i)
            take = torch.rand(n, generator=generator) < weights[i] / weights[: i + 1].sum()
            tau_i = torch.where(take, tau[i], tau_i)
        tau = tau_i

    Draws as dare does."""
    generator = _generator(seed, v.name)
    chosen = v.zeros()
    so_far = 0.0
    for i, weight in enumerate(weights):
        so_far += weight
        p = weight / so_far if so_far else 0.0
        for part, tau in v.tau(i):
            take = torch.rand(len(tau), generator=generator, device="cpu") < p
            chosen[part] = torch.where(take.to(tau.device), tau, chosen[part])
    return chosen


def tall_mask(v, weights, *, strictness, agree):
    """The sum, where enough experts need it. TALL masks, Wang et al. 2024, arXiv 2405.07813.

        total = tau.sum(0)
        votes = (tau.abs() > strictness * (total - tau).abs()).sum(0)
        tau = total * (votes >= min(agree, k))

    strictness is their lambda, which they tune per task on validation data. Reads every expert
    twice."""
    total = _total(v, weights, v.tau)
    votes = v.zeros(torch.int16)
    for i in range(len(weights)):
        for part, tau in v.tau(i):
            votes[part] += tau.abs() > strictness * (total[part] - tau).abs_()
    return total.masked_fill_(votes < min(agree, len(weights)), 0.0)


def mean_change(v, weights):
    """sum_i w_i tau_i / sum_i |w_i|: of one entry, whose direction means nothing."""
    size = sum(map(abs, weights)) or 1.0
    return _total(v, [w / size for w in weights], v.tau)


CURVES = {"linear": lambda x: x, "quadratic": lambda x: x * x, "sqrt": math.sqrt}


def layer_scales(names, alpha=0.5, beta=0.5, how="linear"):
    """LiNeS (Wang et al. 2024, arXiv 2410.17146): alpha + beta f(l / (L-1)) for the tensors of
    block l of L, alpha for all others. A block is the first number in a name; L is counted for each
    tower, i.e. what precedes the number, on its own. -> dict from name to factor. (TIME's takes the
    place of scale; ours is a factor beside it.)"""
    places = {}  # name -> tower, block
    last = {}  # tower -> L - 1, or 1: a single block has the position 0
    for name in names:
        found = re.match(r"(?:(.*?)\.)?(\d+)\.", name)
        if found:
            tower, block = found.groups()
            places[name] = tower, int(block)
            last[tower] = max(last.get(tower, 1), int(block))
    scales = dict.fromkeys(names, alpha)
    for name, (tower, block) in places.items():
        scales[name] += beta * CURVES[how](block / last[tower])
    return scales


TECHNIQUES = {
    "linear": linear, "slerp": slerp, "task-arithmetic": task_arithmetic, "ties": ties,
    "dare": dare, "breadcrumbs": breadcrumbs, "magmax": magmax, "model-stock": model_stock,
    "random": random, "tall-mask": tall_mask,
}  # fmt: skip
THETA = ("linear", "slerp")  # these return weights, the others a task vector
LINEAR = ("linear", "task-arithmetic")  # every entry is merged on its own, a scalar too
AVERAGES = ("linear", "slerp", "random")  # weights sum to one
UNWEIGHTED = ("magmax", "model-stock", "tall-mask")


# --------------------------------------------------------------- what the techniques are made of


class Vectors:
    """One tensor of the base and of every expert, flattened to [n]. Reads the base and, one at a
    time, the experts when they are asked for; going over the expert at hand again costs no reading.
    close() forgets what was read. ValueError where numbers are not finite, or shapes differ."""

    def __init__(self, name, base, experts):
        tensor = base[name].detach()
        self.name = name
        self.source = base
        self.experts = experts
        self.shape = tensor.shape
        self.n = tensor.numel()
        self.stored = tensor.dtype
        self.dtype = _wide(tensor.dtype)
        self.device = tensor.device
        _check_finite(tensor, name, "the base")
        self.close()

    def close(self):
        self.theta_0 = self.theta_i = self.i = None

    def check(self):
        """For tensors that nobody goes over."""
        for i in range(len(self.experts)):
            self._read(i)

    def zeros(self, dtype=None):
        return torch.zeros(self.n, dtype=dtype or self.dtype, device=self.device)

    def base(self):
        """Yields (slice, theta_0[slice])."""
        if self.theta_0 is None:
            self.theta_0 = self.source[self.name].detach().reshape(-1)
        return self._pieces(self.theta_0)

    def theta(self, i):
        """Yields (slice, theta_i[slice]); may be a view of the expert: not to be written."""
        fresh = self.i != i
        if fresh:
            self._read(i)
        for part, theta in self._pieces(self.theta_i):
            if fresh:
                _check_finite(theta, self.name, self._who(i))
            yield part, theta

    def tau(self, i):
        """Yields (slice, tau_i[slice]), fresh tensors."""
        for (part, theta), (_, theta_0) in zip(self.theta(i), self.base()):
            yield part, theta - theta_0

    def _read(self, i):
        self.theta_i = None  # let go of one expert before the next is read
        tensor = self.experts[i][self.name].detach()
        floats = tensor.dtype.is_floating_point == self.stored.is_floating_point
        if tensor.shape != self.shape or not floats:
            here = f"{tensor.dtype} {[*tensor.shape]}"
            there = f"{self.stored} {[*self.shape]}"
            who = self._who(i)
            raise ValueError(f"tensor {self.name} is {here} in {who}, but {there} in the base")
        self.theta_i = tensor.reshape(-1)
        self.i = i

    def _pieces(self, flat):
        for start in range(0, self.n, PIECE):
            part = slice(start, start + PIECE)
            yield part, flat[part].to(self.device, self.dtype)

    def _who(self, i):
        path = getattr(self.experts[i], "path", None)
        return f"expert {i}" if path is None else f"expert {i}, {path}"


def _check_finite(tensor, name, who):
    """ValueError if a NaN or an infinity is in it: magmax and others would hide it in the
    result."""
    if not tensor.is_floating_point():
        return
    for piece in tensor.reshape(-1).split(PIECE):
        if not math.isfinite(piece.sum()) and not piece.isfinite().all():  # a sum can overflow
            raise ValueError(f"tensor {name} holds numbers that are not finite in {who}")


def _total(v, weights, pieces):
    """sum_i w_i x_i over pieces(i), which yields (slice, x_i[slice])."""
    total = v.zeros()
    for i, weight in enumerate(weights):
        for part, x in pieces(i):
            total[part].add_(x, alpha=weight)
    return total


def _elect(v, weights, pieces, function):
    """TIES' steps 2 and 3: an entry's sign is that of its sum over the experts (plus for a sum of
    0, as in mergekit and peft); then the mean, sum or largest magnitude of the non-zero entries of
    that sign. What agrees with either sign is gathered side by side, so that every expert is read
    once."""
    plus = v.zeros()  # sums of the entries above zero
    minus = v.zeros()  # and below
    plus_seen = plus  # for mean how many there are, for max the extremes
    minus_seen = minus
    if function != "sum":
        plus_seen = v.zeros()
        minus_seen = v.zeros()
    for i, weight in enumerate(weights):
        for part, tau in pieces(i):
            above = tau.mul_(weight).clamp(min=0)
            below = tau.clamp_(max=0)
            plus[part].add_(above)
            minus[part].add_(below)
            if function == "mean":  # minus_seen counts downwards
                plus_seen[part].add_(above.sign_())
                minus_seen[part].add_(below.sign_())
            elif function == "max":
                torch.maximum(plus_seen[part], above, out=plus_seen[part])
                torch.minimum(minus_seen[part], below, out=minus_seen[part])
    for part, _ in v.base():
        positive = plus[part] + minus[part] >= 0
        if function == "mean":
            plus[part] /= plus_seen[part].clamp_(min=1)
            minus[part] /= minus_seen[part].clamp_(max=-1).neg_()
            plus[part] = torch.where(positive, plus[part], minus[part])
        else:
            plus[part] = torch.where(positive, plus_seen[part], minus_seen[part])
    return plus


class Cut:
    """The k entries of largest magnitude of a vector that is seen only piece by piece: exact, in
    bounded memory.

    A radix select. The bit patterns of non-negative floats order as their values do, so a pass over
    the vector counts 16 more bits of |tau| (float32: 2 passes, float64: 4) among the entries that
    share the bits found so far, and the last ends at the k-th largest magnitude itself; `room`
    entries of just that magnitude belong to the k."""

    def __init__(self, k, dtype):
        self.integer = {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
        self.dtype = dtype
        self.room = k
        self.bits = 0
        self.counts = 0
        self.top = 8 * dtype.itemsize - 16
        self.shift = self.top

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
        self.bits = self.bits << 16 | digit
        self.counts = 0
        self.shift -= 16
        if self.shift >= 0:
            return True
        self.threshold = float(torch.tensor(self.bits, dtype=self.integer).view(self.dtype))
        return False

    def trim(self, tau):
        """tau with all but the k entries set to 0, as a new tensor. To be called once for each
        piece, in order."""
        tau = tau.to(self.dtype)
        trimmed = torch.nn.functional.hardshrink(tau, self.threshold)  # |tau| > threshold
        if self.room > 0:
            equal = (tau.abs() == self.threshold).nonzero().squeeze(1)[: self.room]
            trimmed[equal] = tau[equal]
            self.room -= len(equal)
        return trimmed


def _cuts(vectors, sizes, experts):
    """-> for each expert a list of Cuts, of all vectors together to each of `sizes` entries; None
    for no entries."""
    dtype = torch.float64 if any(v.dtype == torch.float64 for v in vectors) else torch.float32
    cuts = [[Cut(k, dtype) if k else None for k in sizes] for _ in experts]
    running = [(i, cut) for i, row in zip(experts, cuts) for cut in row if cut]
    more = bool(vectors and running)
    while more:
        for v in vectors:
            for i, cut in running:
                for _, tau in v.tau(i):
                    cut.count(tau)
            if len(vectors) > 1:
                v.close()
        for _, cut in running:
            more = cut.narrow()  # all need as many passes
    return cuts


def _kept(n, density, **others):
    """-> [how many of n entries ties keeps]."""
    return [max(1, round(density * n))]


def _crumbs(n, top, bottom, **others):
    """-> [how many of n entries are no noise, how many of these are outliers]."""
    few = round(top * n)
    return [max(1, few, n - round(bottom * n)), few]


SIZES = {"ties": _kept, "breadcrumbs": _crumbs}


def _wide(dtype):
    """What to compute in."""
    return dtype if dtype == torch.float64 or not dtype.is_floating_point else torch.float32


def _generator(seed, name):
    """On the CPU, wherever the weights are."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


# ------------------------------------------------------------------------------------------ checks


def check_options(technique, options):
    """ValueError unless merge(technique, ..., **options) accepts them."""
    if technique not in TECHNIQUES:
        raise ValueError(f"technique must be one of {', '.join(TECHNIQUES)}, got {technique!r}")
    known = used(technique)
    for name, value in options.items():
        if name not in known:
            takes = ", ".join(known) or "none"
            raise ValueError(f"{technique} has no option {name!r}; it takes {takes}")
        try:
            fits = OPTIONS[name].fits(value)
        except TypeError:
            fits = False
        if not fits:
            raise ValueError(f"{name} must be {OPTIONS[name].limits}, got {value!r}")
    if technique == "breadcrumbs":
        top = options.get("top", OPTIONS["top"].default)
        bottom = options.get("bottom", OPTIONS["bottom"].default)
        if top + bottom >= 1:
            raise ValueError("top and bottom must leave something: their sum must be below 1")


def _check_weights(technique, weights, k):
    if k == 0:
        raise ValueError(f"{technique} needs an expert, got none")
    if k == 1 and technique == "model-stock":
        raise ValueError("model-stock needs two experts, got one")
    if weights is None:
        return [1 / k if technique in AVERAGES else 1.0] * k
    if technique in UNWEIGHTED:
        raise ValueError(f"{technique} takes no weights")
    weights = [float(w) for w in weights]
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights must be finite, got {weights}")
    if len(weights) != k:
        raise ValueError(f"weights must be one per expert: got {len(weights)} for {k} experts")
    total = sum(weights)
    if technique in AVERAGES and abs(total - 1) > 1e-6:
        raise ValueError(f"weights must sum to one for {technique}, not to {total:.6g}: {weights}")
    if technique in ("slerp", "random") and min(weights) < 0:
        raise ValueError(f"weights must not be negative for {technique}, got {weights}")
    return weights


def _check_names(base, other, what):
    different = sorted(set(base) ^ set(other))
    if different:
        where = "base" if different[0] in base else what
        count = f"{len(different)} names differ from the base"
        raise ValueError(f"tensor {different[0]} is only in the {where} ({count})")


# ------------------------------------------------------------------------------- merging over time

GROWTHS = {
    "uniform": lambda i: 1, "linear": lambda i: i, "sqrt": math.sqrt, "quadratic": lambda i: i**2,
    "cubic": lambda i: i**3, "fifth": lambda i: i**5, "tenth": lambda i: i**10,
    "exponential": lambda i: 2**i, "logarithmic": lambda i: math.log(i + 1),
}  # fmt: skip


def expert_weights(tasks, how="uniform", reverse=False, include_base=False):
    """Weights of the experts of `tasks` tasks, oldest first, that sum to one: they grow as
    GROWTHS[how](1, 2, ...), or with reverse shrink so. With include_base theta_0 comes before the
    first and has the first weight. (TIME.)"""
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


def timeline_used(init, deploy, technique="linear"):
    """-> names of the arguments that a Timeline of these uses, its technique's options included."""
    merged = {init, deploy} & {"ema", "all"}
    names = ["technique", *used(technique)] if merged else []
    if "ema" in merged:
        names += ["anchored", "weight"] if technique in AVERAGES else ["anchored"]
    if "all" in merged:
        names.append("include_base")
        if technique not in UNWEIGHTED:
            names += ["expert_weights", "reverse"]
    return tuple(names)


class Timeline:
    """Which weights start a task and which are deployed after it (TIME, sec. 3). theta_t is what
    training task t makes of start(), m_t the running merge, M_t one merge of theta_1 ... theta_t;
    before the first task all are theta_0.

    init / deploy | latest: theta_t             | ema: m_t             | all: M_t
    zero-shot     | the last task's specialist  | zs-merge             | offline-merge
    latest        | finetune                    | its running average  | its snapshots merged
    ema           | one task away from m_{t-1}  | ema-merge, the best  | all experts, trained from m
    all           | one task away from M_{t-1}  | average, from M      | all experts, at every step

    m_t = w m_{t-1} + (1-w) theta_t for linear: w weighs the old weights. anchored (ft-merge) puts
    theta_0 in the place of m_{t-1}. slerp and random do the same in their way. The other techniques
    have no such weight: m_t is their merge, against theta_0, of the two experts m_{t-1} and
    theta_t, as in the authors' code; the first m, and every anchored one, is of theta_t alone, as
    theta_0 has no task vector. task-arithmetic overshoots then, m_{t-1} being within both, unless
    scale is small (.1). model-stock of a single expert is that expert, here.

    M_t weighs its experts by expert_weights(t, ...); techniques that add task vectors get as many
    times these as there are experts, so that uniform is 1 each. dare and random draw new masks for
    every t.

    The authors' differ: zero-shot/ema and its like start their average at theta_1 with .5/.5, ours
    at theta_0 with w; their random over time is 50/50; their first offline task arithmetic and
    MagMax are theta_1 unscaled; their model stock never leaves theta_0 over time, nor do TALL masks
    of threshold 2; their zs- and ft-merges with task vectors write into theta_0.

    base: theta_0, is copied. options: the technique's, see merge(). store: keeps the experts if
    init or deploy is "all": has append(state dict), [i] -> mapping, len, pop(), and belongs to this
    timeline alone. By default a list in memory. A run killed after add() and before state() was
    saved leaves an expert too many in a store on disk; the next add() drops it."""

    def __init__(
        self, base, init="ema", deploy="ema", technique="linear", weight=0.9, store=None,
        expert_weights="uniform", reverse=False, include_base=False, anchored=False, **options
    ):  # fmt: skip
        check_options(technique, options)
        _check_choice("init", init, SOURCES)
        _check_choice("deploy", deploy, SOURCES[1:])
        _check_choice("expert_weights", expert_weights, GROWTHS)
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must be in [0, 1], got {weight!r}")
        if technique in UNWEIGHTED and expert_weights != "uniform":
            sentence = f"{technique} takes no weights: expert_weights must be uniform"
            raise ValueError(f"{sentence}, got {expert_weights!r}")
        self.init = init
        self.deployed = deploy
        self.technique = technique
        self.options = options
        self.weight = weight
        self.anchored = anchored
        self.store = [] if store is None else store
        self.growth = {"how": expert_weights, "reverse": reverse, "include_base": include_base}
        self.keeps = {init, deploy} - {"zero-shot"}  # what has to be remembered
        self.task = 0
        self.base = _copy(base)
        self.latest = {}
        self.running = {}
        if "ema" in self.keeps:
            self.running = _copy(self._widened(self.base))  # m_t, never in 16 bits

    def start(self):
        """State dict to train the next task from, in the base's dtypes and on its devices; the
        caller's own."""
        return self._weights(self.init)

    def deploy(self):
        """State dict to evaluate and ship after the tasks added so far; the caller's own."""
        return self._weights(self.deployed)

    @torch.no_grad()
    def add(self, theta):
        """theta: state dict at the end of a task; copied as far as needed."""
        _check_names(self.base, theta, "new expert")
        for name, like in self.base.items():
            shape = theta[name].shape
            if shape != like.shape:
                here = f"{list(shape)} in the new expert"
                raise ValueError(f"tensor {name} is {here}, not {list(like.shape)}")
            _check_finite(theta[name], name, "the new expert")
        if "ema" in self.keeps:
            self._update(theta)
        if "latest" in self.keeps:
            self.latest = _copy(theta)
        if "all" in self.keeps:
            self._check_store()
            while len(self.store) > self.task:
                self.store.pop()
            self.store.append(_copy(theta) if isinstance(self.store, list) else theta)
        self.task += 1

    def state(self):
        """Copies of all that changes, for torch.save; experts in a store of the caller's are not
        among it. A timeline of the same base, init and deploy goes on from it, in this run or, with
        more tasks, in another; a store must then hold the experts so far."""
        in_memory = isinstance(self.store, list)
        return {
            "task": self.task,
            "keeps": sorted(self.keeps),
            "experts": [_copy(e) for e in self.store[: self.task]] if in_memory else [],
            "running": _copy(self.running),
            "latest": _copy(self.latest),
        }

    def load_state(self, state):
        """What state() gave. ValueError if it is of another timeline, or the store lacks
        experts."""
        keeps = sorted(self.keeps)
        if state["keeps"] != keeps:
            there = f"the state is of a timeline that keeps {state['keeps']}"
            raise ValueError(f"{there}, this one {keeps}")
        weights = state["running"], state["latest"], *state["experts"]
        for kept in filter(None, weights):
            _check_names(self.base, kept, "state")
        self.task = state["task"]
        self.running = self._moved(state["running"])
        self.latest = self._moved(state["latest"])
        if "all" in self.keeps:
            if isinstance(self.store, list):
                self.store[:] = [_copy(expert) for expert in state["experts"]]
            self._check_store()

    def _check_store(self):
        here = len(self.store)
        if here < self.task:
            raise ValueError(f"the store holds {here} experts of the {self.task} tasks so far")

    def _moved(self, weights):
        return {n: t.to(self.base[n].device, copy=True) for n, t in weights.items()}

    def _weights(self, source):
        if self.task == 0 or source == "zero-shot":
            weights = self.base
        elif source == "all":
            weights = self._merge_all()
        else:
            weights = self.latest if source == "latest" else self.running
        return {
            n: weights[n].detach().to(like.device, like.dtype, copy=True)
            for n, like in self.base.items()
        }

    def _update(self, theta):
        """m_{t-1} -> m_t."""
        weights = [self.weight, 1 - self.weight] if self.technique in AVERAGES else None
        if self.technique == "linear":
            self._average(theta)
        elif weights or self.task > 0 and not self.anchored:
            before = self.base if self.anchored else self.running
            self.running = self._merge([before, theta], weights)
        else:
            self.running = self._merge([theta], None)

    def _average(self, theta):
        """m_t = w m_{t-1} + (1-w) theta_t, in place."""
        names = [n for n, m in self.running.items() if m.is_floating_point()]
        running = [self.running[n] for n in names]
        if self.anchored:
            torch._foreach_copy_(running, [self.base[n] for n in names])
        new = [theta[n].detach().to(self.running[n]) for n in names]
        torch._foreach_lerp_(running, new, 1 - self.weight)

    def _merge_all(self):
        experts = [self.base] * self.growth["include_base"]
        experts += [self.store[i] for i in range(self.task)]
        weights = expert_weights(self.task, **self.growth)
        if self.technique not in AVERAGES:
            uniform = self.growth["how"] == "uniform"
            weights = None if uniform else [len(weights) * w for w in weights]
        return self._merge(experts, weights)

    def _merge(self, experts, weights):
        if self.technique == "model-stock" and len(experts) == 1:
            return _copy(self._widened(experts[0]))
        options = dict(self.options)
        if self.technique in ("dare", "random"):
            options["seed"] = f"{options.get('seed', 0)} {self.task}"
        return merge(self.technique, self._widened(self.base), experts, weights, **options)

    def _widened(self, weights):
        return {
            n: weights[n].detach().to(like.device, _wide(like.dtype))
            for n, like in self.base.items()
        }


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _copy(weights):
    return {name: weights[name].detach().clone() for name in weights}
