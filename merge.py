"""Weight merging, at once or over time: many experts of one base become one, without training.

Continual pretraining (Roth et al. 2024, arXiv 2408.14471) and TIME (Dziadzio et al. 2024, arXiv
2412.06712); the techniques' own papers stand at their functions. This file needs torch and numpy
only; copy it:

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
ties         density=.2 whole          density=.2 whole scale=.3             density set, weights 1
dare         (default)                 drop=.7 elect                         elect, if it normalizes
breadcrumbs  (default)                 bottom=.7 elect whole                 elect, if it normalizes
lines        scale=1                   lines in place of scale               -
model-stock  (default)                 no clamp of negative cosines          no clamp either
tall-mask    strictness tuned a task   agree=2                               -

TIME's yaml *prunes* .8, which is our density .2; the defaults of its code prune .2 offline and .7
over time. Its scalars (logit_scale) go with the vector; ours: see merge().

Memory: the result and, of one tensor, the base, one expert and a few sums, if the mappings read a
tensor when it is asked for. The largest tensors go first, while the result is empty.
"""

import hashlib
import math
import re
from functools import partial

import numpy
import torch

# ----------------------------------------------------------------------------------------- merging


@torch.no_grad()
def merge(technique, base, experts, weights=None, **options):
    """-> dict of new tensors with the base's names, shapes, dtypes and devices.

    experts: a list of mappings. linear and slerp (MEMBERS) average these alone: the base gives
    names, dtypes, devices and integer tensors, and has a share only if it is listed again, as in
    merge("linear", old, [old, new]). The others add to the base what the experts changed.
    weights: a number per expert. linear, slerp and random average: theirs sum to one, default 1/k
    each. For the other techniques they multiply the task vectors, default 1 each; magmax and
    model-stock take none.
    options: those that OPTIONS has for the technique.
    Computed in float32 (float64 for a float64 base). A tensor of one entry, such as logit_scale,
    has no direction: but for linear and task-arithmetic, its task vector is the weighted mean of
    the experts'.
    Raises ValueError where names, shapes, weights or options do not fit, and where an input or the
    result is not finite."""
    if hasattr(experts, "keys"):
        raise ValueError("experts is a list of mappings, even of one; got a mapping")
    experts = list(experts)
    check_options(technique, options)
    options = OPTIONS[technique] | options
    weights = _check_weights(technique, weights, len(experts))
    for i, expert in enumerate(experts):
        _check_names(base, expert, f"expert {i}")
    scale = options.pop("scale", 1.0)
    lines = options.pop("lines", None)
    layers = layer_scales(base, *lines) if lines else {}
    if options.get("whole"):
        options["whole"] = _whole_cuts(base, experts, options)
    merged = {}
    for name in sorted(base, key=lambda n: -base[n].numel()):  # the largest first
        v = Vectors(name, base, experts)
        if v.n == 0 or not v.like.is_floating_point():
            for i in range(len(experts)):
                v.theta(i)  # for its checks
            theta = v.like.clone()
        elif v.n == 1 and technique not in LINEAR:
            theta = v.theta_0 + scale * layers.get(name, 1.0) * mean_change(v, weights)
        elif technique in MEMBERS:
            theta = TECHNIQUES[technique](v, weights)
        else:
            tau = TECHNIQUES[technique](v, weights, **options)
            theta = tau.mul_(scale * layers.get(name, 1.0)).add_(v.theta_0)  # [n]
        merged[name] = theta.to(v.like.dtype).reshape(v.like.shape)
        _check_tensor(name, merged[name], v.like, "the result: take a smaller scale or weights")
    return {name: merged[name] for name in base}


MEMBERS = ("linear", "slerp")  # averages of the experts: a command averages all files it is given
LINEAR = ("linear", "task-arithmetic")  # every entry is merged on its own, a scalar too
AVERAGES = ("linear", "slerp", "random")  # weights sum to one
UNWEIGHTED = ("magmax", "model-stock")

OPTIONS = {  # technique -> its options, with their defaults
    "linear": {},
    "slerp": {},
    "task-arithmetic": {"scale": 1.0, "lines": None},
    "ties": {"scale": 1.0, "lines": None, "density": 0.2, "whole": False},
    "dare": {"scale": 1.0, "lines": None, "drop": 0.9, "elect": False, "seed": 0},
    "breadcrumbs": {"scale": 1.0, "lines": None, "top": 0.01, "bottom": 0.85, "elect": False,
                    "whole": False},
    "magmax": {"scale": 1.0, "lines": None},
    "model-stock": {"scale": 1.0, "lines": None},
    "random": {"scale": 1.0, "lines": None, "seed": 0},
    "tall-mask": {"scale": 1.0, "lines": None, "strictness": 0.4, "agree": 2},
}  # fmt: skip
SHARE = (lambda x: 0 <= x < 1, "in [0, 1)")
FLAG = (lambda x: isinstance(x, bool), "True or False")
LIMITS = {  # option -> whether a value fits, and the same in words; all others are a FLAG
    "scale": (math.isfinite, "a finite number"),  # factor on the merged task vector
    "lines": (lambda x: x is None or len(x) == 2 and math.isfinite(sum(x)), "(alpha, beta)"),
    "density": (lambda x: 0 < x <= 1, "in (0, 1]"),  # share of each task vector that is kept
    "drop": SHARE,  # probability of dropping an entry
    "top": SHARE,  # share of largest entries that is dropped
    "bottom": SHARE,  # share of smallest entries that is dropped
    "strictness": (lambda x: 0 <= x < math.inf, "0 or more"),  # lambda of the TALL masks
    "agree": (lambda x: x >= 1 and x == int(x), "a whole number from 1"),  # experts that must
    "seed": (lambda x: isinstance(x, (int, str)), "a whole number or a text"),  # of the masks
    "weight": (lambda x: 0 <= x <= 1, "in [0, 1]"),  # w of a Timeline
}


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
    total_weight = 0.0
    for i, weight in enumerate(weights):
        theta = v.theta(i)
        total_weight += weight
        t = weight / (total_weight or 1.0)
        length = math.sqrt(_dot(merged, merged)) * math.sqrt(_dot(theta, theta))
        cosine = _dot(merged, theta) / length if length else 1.0  # the first, and zeros: linear
        angle = math.acos(cosine) if abs(cosine) <= 0.9995 else 0.0
        old = math.sin((1 - t) * angle) / math.sin(angle) if angle else 1 - t
        new = math.sin(t * angle) / math.sin(angle) if angle else t
        merged.mul_(old).add_(theta, alpha=new)
    return merged


def task_arithmetic(v, weights):
    """sum_i w_i tau_i. Ilharco et al. 2022, arXiv 2212.04089.

        tau = (weights * tau).sum(0)
    """
    return _total(v, weights, v.tau)


def ties(v, weights, *, density, whole):
    """Trim, elect, merge. Yadav et al. 2023, arXiv 2306.01708.

        keep = max(1, round(density * n))
        threshold = tau.abs().sort(dim=1, descending=True).values[:, keep - 1 : keep]
        tau = weights * tau * (tau.abs() >= threshold)  # trim
        sign = torch.where(tau.sum(0) >= 0, 1, -1)  # elect
        agrees = tau * sign > 0
        tau = (tau * agrees).sum(0) / agrees.sum(0).clamp(min=1)  # merge

    The shares are of each tensor (default; mergekit, peft) or of all tensors together (whole; the
    paper, its code). Exactly round(density n), at least 1, survive: of equal magnitudes at the
    threshold the first ones, largest tensor first. (The official code keeps one more and all
    equals.)"""
    return _elect(v, weights, partial(_trimmed, v, {"density": density}, whole))


def dare(v, weights, *, drop, elect, seed):
    """Drop, rescale, so that the mean stays, and add. Yu et al. 2023, arXiv 2311.03099.

        keep = torch.rand(tau.shape, generator=generator) >= drop
        tau = (weights * tau * keep / (1 - drop)).sum(0)

    elect: TIES' election and mean in place of the sum (TIME's version); the mean is over what is
    not dropped, so it is (1 - drop^k) / (1 - drop) times the mean of all. The masks are a function
    of seed, tensor name and the expert's place, not of device, dtype or the other tensors."""
    generator = _generator(seed, v.name)

    def thinned(i):
        keep = torch.rand(v.n, generator=generator, device="cpu") >= drop
        return v.tau(i).mul_(keep.to(v.device)).div_(1 - drop)

    return _elect(v, weights, thinned) if elect else _total(v, weights, thinned)


def breadcrumbs(v, weights, *, top, bottom, elect, whole):
    """The sum without outliers and noise. Davari and Belilovsky 2023, arXiv 2312.06795.

        rank = tau.abs().argsort(dim=1, descending=True).argsort(dim=1)  # 0: the largest
        tau = tau * (rank >= round(top * n)) * (rank < n - round(bottom * n))
        tau = (weights * tau).sum(0)

    top and bottom are their gamma and beta; the shares are of each tensor or, with whole, of all
    together. elect: TIES' election and mean in place of the sum (whole, elect: TIME's)."""
    trimmed = partial(_trimmed, v, {"top": top, "bottom": bottom}, whole)
    return _elect(v, weights, trimmed) if elect else _total(v, weights, trimmed)


def magmax(v, weights):
    """Of each entry the tau of largest magnitude. Marczak et al. 2024, arXiv 2407.06322.

        tau = tau.gather(0, tau.abs().argmax(0, keepdim=True))[0]

    Of equal ones the later."""
    largest = v.zeros()
    for i in range(len(weights)):
        tau = v.tau(i)
        largest = torch.where(tau.abs() >= largest.abs(), tau, largest)
    return largest


def model_stock(v, weights):
    """t mean_i tau_i, t = k c / (1 + (k-1) c). Jang et al. 2024, arXiv 2403.19522, for k >= 2.

        unit = tau / tau.norm(dim=1, keepdim=True)
        c = ((unit @ unit.T).sum() - k) / (k * (k - 1))  # mean cosine of two different taus
        c = c.clamp(min=0)
        tau = k * c / (1 + (k - 1) * c) * tau.mean(0)

    Tensor by tensor; a zero tau counts as orthogonal. TIME's does not clamp."""
    k = len(weights)
    moved = 0  # experts whose tau is not zero
    mean = v.zeros()
    directions = v.zeros()
    for i in range(k):
        tau = v.tau(i)
        norm = math.sqrt(_dot(tau, tau))
        if norm > 0:
            moved += 1
            mean.add_(tau, alpha=1 / k)
            directions.add_(tau, alpha=1 / norm)
    # |sum_i tau_i / |tau_i||^2 = k + the cosines of all ordered pairs: no two experts are in memory
    c = max(0.0, (_dot(directions, directions) - moved) / (k * (k - 1)))
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
    total_weight = 0.0
    for i, weight in enumerate(weights):
        total_weight += weight
        p = weight / (total_weight or 1.0)
        take = torch.rand(v.n, generator=generator, device="cpu") < p
        chosen = torch.where(take.to(v.device), v.tau(i), chosen)
    return chosen


def tall_mask(v, weights, *, strictness, agree):
    """The sum, where enough experts need it. TALL masks, Wang et al. 2024, arXiv 2405.07813.

        total = tau.sum(0)
        votes = (tau.abs() > strictness * (total - tau).abs()).sum(0)
        tau = (weights * tau).sum(0) * (votes >= min(agree, k))

    strictness is their lambda, which they tune per task on validation data. The paper's sum has no
    weights. Reads every expert twice."""
    total = _total(v, [1.0] * len(weights), v.tau)
    weighted = v.zeros()
    votes = v.zeros(dtype=torch.int16)
    for i, weight in enumerate(weights):
        tau = v.tau(i)
        votes += tau.abs() > strictness * (total - tau).abs_()
        weighted.add_(tau, alpha=weight)
    return weighted.masked_fill_(votes < min(agree, len(weights)), 0.0)


def mean_change(v, weights):
    """sum_i w_i tau_i / sum_i |w_i|: of one entry, whose direction means nothing."""
    size = sum(map(abs, weights)) or 1.0
    return _total(v, [w / size for w in weights], v.tau)


def layer_scales(names, alpha=0.5, beta=0.5):
    """LiNeS (Wang et al. 2024, arXiv 2410.17146): alpha + beta l / (L-1) for the tensors of block l
    of L, alpha for all others. A block is the first number in a name; L is counted for each tower,
    i.e. what precedes the number, on its own. -> dict from name to factor. (TIME's takes the place
    of scale; ours is a factor beside it.)"""
    blocks = {}  # name -> its tower and block
    last = {}  # tower -> L - 1, or 1: a single block has the depth 0
    for name in names:
        match = re.match(r"(?:(.*?)\.)?(\d+)\.", name)
        if match:
            tower, block = match.groups()
            blocks[name] = tower, int(block)
            last[tower] = max(last.get(tower, 1), int(block))
    scales = dict.fromkeys(names, alpha)
    for name, (tower, block) in blocks.items():
        scales[name] += beta * block / last[tower]
    return scales


TECHNIQUES = {
    "linear": linear, "slerp": slerp, "task-arithmetic": task_arithmetic, "ties": ties,
    "dare": dare, "breadcrumbs": breadcrumbs, "magmax": magmax, "model-stock": model_stock,
    "random": random, "tall-mask": tall_mask,
}  # fmt: skip


# --------------------------------------------------------------- what the techniques are made of


class Vectors:
    """One tensor of the base and every expert, flattened to [n] and widened to float32. An expert
    is read when it is asked for. ValueError where numbers are not finite, or shapes differ."""

    def __init__(self, name, base, experts):
        self.name = name
        self.experts = experts
        self.like = base[name].detach()
        self.n = self.like.numel()
        self.dtype = _wide(self.like.dtype)
        self.device = self.like.device
        self.theta_0 = self._flat(self.like)  # not to be written
        _check_tensor(name, self.like, self.like, "the base")

    def zeros(self, *shape, dtype=None):
        return torch.zeros(*shape, self.n, dtype=dtype or self.dtype, device=self.device)

    def theta(self, i):
        """-> theta_i, not to be written: it may be the expert's own."""
        tensor = self.experts[i][self.name]
        path = getattr(self.experts[i], "path", None)
        who = f"expert {i}" if path is None else f"expert {i}, {path}"
        _check_tensor(self.name, tensor, self.like, who)
        return self._flat(tensor)

    def tau(self, i):
        """-> theta_i - theta_0, the caller's own."""
        return self.theta(i) - self.theta_0

    def _flat(self, tensor):
        return tensor.detach().reshape(-1).to(self.device, self.dtype)


def _check_tensor(name, tensor, like, who):
    """ValueError unless it can be merged with `like`, the base's, and is finite: magmax and others
    would hide a NaN in their result."""
    floats = tensor.is_floating_point() == like.is_floating_point()
    if tensor.shape != like.shape or not floats:
        here = f"{tensor.dtype} {[*tensor.shape]}"
        there = f"{like.dtype} {[*like.shape]}"
        raise ValueError(f"tensor {name} is {here} in {who}, but {there} in the base")
    if not math.isfinite(tensor.sum()) and not tensor.isfinite().all():  # a sum can overflow
        raise ValueError(f"tensor {name} holds numbers that are not finite in {who}")


def _dot(a, b):
    """a @ b of two vectors, in pieces: one float32 sum over 25 million entries, a token embedding,
    is wrong in its third digit, which is more than the angle between two finetuned models."""
    return sum(float(x @ y) for x, y in zip(a.split(2**18), b.split(2**18)))


def _total(v, weights, change):
    """sum_i w_i x_i of x_i = change(i)."""
    total = v.zeros()
    for i, weight in enumerate(weights):
        total.add_(change(i), alpha=weight)
    return total


def _elect(v, weights, change):
    """TIES' steps 2 and 3: an entry's sign is that of its sum over the experts (plus for a sum of
    0, as in mergekit and peft); then the mean of the entries of that sign. Both signs are gathered,
    so that every expert is read once: row 0 above zero, row 1 below, as magnitudes."""
    sums = v.zeros(2)  # [2, n]
    counts = v.zeros(2)
    for i, weight in enumerate(weights):
        tau = change(i) * weight
        for row, side in enumerate((tau.clamp(min=0), tau.neg_().clamp_(min=0))):
            sums[row] += side
            counts[row] += side.sign_()
    plus = sums[0] >= sums[1]
    sums /= counts.clamp_(min=1)
    return torch.where(plus, sums[0], -sums[1])


def _trimmed(v, shares, whole, i):
    """-> tau_i, 0 where an entry is too small or too large. whole: see _whole_cuts()."""
    tau = v.tau(i)
    size = tau.abs()
    kept, outliers = whole[i, v.name] if whole else [_cut(size, k) for k in _counts(v.n, **shares)]
    return tau * (_largest(size, kept) & ~_largest(size, outliers))


def _counts(n, density=1, top=0, bottom=0, **others):
    """-> how many of n entries are no noise, at least 1, and how many of these are outliers."""
    few = round(top * n)
    keep = round(density * n) - round(bottom * n)  # a technique has but one of the two
    return max(1, few, keep), few


def _cut(size, k):
    """Of magnitudes [n] -> (the k-th largest, how many of just that magnitude are among the k)."""
    if k == 0:
        return math.inf, 0
    place = len(size) - k
    threshold = float(numpy.partition(size.cpu().numpy(), place)[place])
    return threshold, k - int((size > threshold).count_nonzero())


def _largest(size, cut):
    """-> mask of the k entries of largest magnitude, of equal ones the first. cut: of k."""
    threshold, room = cut
    mask = size > threshold
    if room:
        equal = (size == threshold).nonzero()[:, 0]
        mask[equal[:room]] = True
    return mask


def _whole_cuts(base, experts, shares):
    """-> {(expert, name): its cuts}, for shares of all tensors together. Holds two task vectors."""
    names = [n for n in base if base[n].numel() > 1 and base[n].is_floating_point()]
    names.sort(key=lambda n: -base[n].numel())  # of equal entries the largest tensor's stay
    lengths = [base[n].numel() for n in names]
    wide = any(base[n].dtype == torch.float64 for n in names)
    sizes = torch.empty(sum(lengths), dtype=torch.float64 if wide else torch.float32)
    parts = sizes.split(lengths)
    cuts = {}
    for i in range(len(experts) if names else 0):
        for name, part in zip(names, parts):
            part.copy_(Vectors(name, base, experts).tau(i).abs_())
        for k in _counts(len(sizes), **shares):
            threshold, room = _cut(sizes, k)
            for name, part in zip(names, parts):
                equal = min(room, int((part == threshold).count_nonzero()))
                cuts.setdefault((i, name), []).append((threshold, equal))
                room -= equal
    return cuts


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
    _check_choice("technique", technique, TECHNIQUES)
    own = OPTIONS[technique]
    for name, value in options.items():
        if name not in own:
            raise ValueError(f"{technique} has no option {name}, only {', '.join(own) or 'none'}")
        _check_limits(name, value)
    if technique == "breadcrumbs":
        shares = own | options
        if shares["top"] + shares["bottom"] >= 1:
            raise ValueError("top and bottom must leave something: their sum must be below 1")


def _check_limits(name, value):
    fits, limits = LIMITS.get(name, FLAG)
    try:
        good = fits(value)
    except TypeError:
        good = False
    if not good:
        raise ValueError(f"{name} must be {limits}; got {value!r}")


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


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
    if len(weights) != k:
        raise ValueError(f"weights must be one per expert: got {len(weights)} for {k} experts")
    total = sum(weights)
    if technique in AVERAGES and not abs(total - 1) < 1e-6:
        raise ValueError(f"weights must sum to one for {technique}, not to {total:.6g}: {weights}")
    if technique in ("slerp", "random") and min(weights) < 0:
        raise ValueError(f"weights must not be negative for {technique}, got {weights}")
    return weights


def _check_names(base, other, what):
    different = sorted(set(base) ^ set(other))
    if different:
        where = "base" if different[0] in base else what
        raise ValueError(f"tensor {different[0]} is only in the {where} ({len(different)} differ)")


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
    "wise-ft": {"init": "latest", "deploy": "ema", "anchored": True},
    "offline-merge": {"init": "zero-shot", "deploy": "all"},
}
SOURCES = ("zero-shot", "latest", "ema", "all")
TIME_OPTIONS = {  # of a Timeline, beside those of its technique
    "anchored": False, "expert_weights": "uniform", "reverse": False, "include_base": False,
}  # fmt: skip
RUNNING_AVERAGES = ("linear", "task-arithmetic", "dare", "breadcrumbs")


def timeline_used(init, deploy, technique="linear"):
    """-> names of the arguments that a Timeline of these uses, its technique's options included."""
    merged = {init, deploy} & {"ema", "all"}
    names = ["technique", *OPTIONS[technique]] if merged else []
    if "ema" in merged:
        names.append("anchored")
        if technique in RUNNING_AVERAGES or technique in AVERAGES:
            names.append("weight")
    if "all" in merged:
        names.append("include_base")
        if technique not in UNWEIGHTED:
            names += ["expert_weights", "reverse"]
    elif "elect" in names:
        names.remove("elect")
    return tuple(names)


class Timeline:
    """Which weights start a task and which are deployed after it (TIME, sec. 3). theta_t: what task
    t trained; m_t: the running merge; M_t: one merge of theta_1 ... theta_t; theta_0 before all.

    init       deploy
    zero-shot  latest   theta_t = train(theta_0)      deployed = theta_t    specialists
    zero-shot  ema      theta_t = train(theta_0)      deployed = m_t        zs-merge
    zero-shot  all      theta_t = train(theta_0)      deployed = M_t        offline-merge
    latest     latest   theta_t = train(theta_{t-1})  deployed = theta_t    finetune
    latest     ema      theta_t = train(theta_{t-1})  deployed = m_t        wise-ft, if anchored
    latest     all      theta_t = train(theta_{t-1})  deployed = M_t        snapshots merged
    ema        latest   theta_t = train(m_{t-1})      deployed = theta_t
    ema        ema      theta_t = train(m_{t-1})      deployed = m_t        ema-merge, ft-merge
    ema        all      theta_t = train(m_{t-1})      deployed = M_t
    all        latest   theta_t = train(M_{t-1})      deployed = theta_t
    all        ema      theta_t = train(M_{t-1})      deployed = m_t
    all        all      theta_t = train(M_{t-1})      deployed = M_t

    The best GM in study/README.md (f) is that of latest / ema, which TIME puts behind ema / ema.

    m_t = w m_{t-1} + (1-w) theta_t for linear: w, the weight, is that of the old weights. anchored
    puts theta_0 in the place of m_{t-1}: ft-merge trains on from m_t then, wise-ft (Wortsman et al.
    2022, arXiv 2109.01903, over time) from theta_t, so that w does not enter its training. For
    task-arithmetic, dare and breadcrumbs, theta_0 merged with tau_t alone stands in the place of
    theta_t: a task vector is masked once, and elect has no part. slerp and random merge m_{t-1} and
    theta_t by w and 1-w. The others have no w and merge the experts m_{t-1} and theta_t (tall-mask
    with .5 and .5), or theta_t alone where theta_0, which has no task vector, would be the other:
    at first and if anchored. model-stock of a single expert is that expert.

    M_t weighs its experts by expert_weights(t, ...), in an election t times so, since its mean
    divides again, and with dare by what dare() says. dare and random draw anew for every t.

    So the weights of the task vectors sum to one over time, as linear's do, and scale multiplies
    that. The authors add task vectors up, as merge() does, and overshoot unless scale is about .1;
    zero-shot/ema and its like start their average at theta_1 with .5/.5, ours at theta_0 with w;
    random is 50/50; dare and breadcrumbs mask m_{t-1} again; the first offline task arithmetic and
    MagMax are theta_1 unscaled; model stock never leaves theta_0 over time, nor do TALL masks of
    threshold 2; zs- and ft-merges with task vectors write into theta_0.

    base: theta_0, is copied. options: see merge(). Where init or deploy is "all", experts are kept
    in memory, unless write(i, state dict) and read(i) -> mapping keep expert i, from 0, elsewhere.
    An expert may be written again, after a stop before state() was saved."""

    def __init__(
        self, base, init="ema", deploy="ema", technique="linear", weight=0.9, write=None, read=None,
        expert_weights="uniform", reverse=False, include_base=False, anchored=False, **options
    ):  # fmt: skip
        check_options(technique, options)
        _check_choice("init", init, SOURCES)
        _check_choice("deploy", deploy, SOURCES[1:])
        _check_choice("expert_weights", expert_weights, GROWTHS)
        growth = {"reverse": reverse, "include_base": include_base}
        for name, value in {"weight": weight, "anchored": anchored, **growth}.items():
            _check_limits(name, value)
        if technique in UNWEIGHTED and expert_weights != "uniform":
            raise ValueError(f"{technique} takes no weights: expert_weights must be uniform")
        self.init = init
        self.deployed = deploy
        self.technique = technique
        self.options = options
        self.weight = weight
        self.anchored = anchored
        self.write = write
        self.read = read
        self.experts = []  # unless write() keeps them
        self.growth = {"how": expert_weights, **growth}
        self.keeps = {init, deploy} - {"zero-shot"}  # what has to be remembered
        self.task = 0
        self.base = _copy(base)
        self.latest = {}
        self.running = {}
        if "ema" in self.keeps:
            self.running = _copy(self._widened(self.base))  # m_t, never in 16 bits

    def start(self):
        """State dict to train the next task from, with the base's dtypes and devices; a copy."""
        return self._weights(self.init)

    def deploy(self):
        """State dict to evaluate and ship after the tasks added so far; a copy, too."""
        return self._weights(self.deployed)

    @torch.no_grad()
    def add(self, theta):
        """theta: state dict at the end of a task; copied as far as needed."""
        _check_names(self.base, theta, "new expert")
        for name, like in self.base.items():
            _check_tensor(name, theta[name], like, "the new expert")
        if "ema" in self.keeps:
            self._update(theta)
        if "latest" in self.keeps:
            self.latest = _copy(theta)
        if "all" in self.keeps:
            if self.write:
                self.write(self.task, theta)
            else:
                self.experts.append(_copy(theta))
        self.task += 1

    def state(self):
        """Copies of all that changes, for torch.save, but for experts that write() keeps. Another
        timeline of the same base, init and deploy goes on from it."""
        return {
            "task": self.task,
            "keeps": sorted(self.keeps),
            "experts": [_copy(expert) for expert in self.experts],
            "running": _copy(self.running),
            "latest": _copy(self.latest),
        }

    def load_state(self, state):
        """What state() gave. ValueError if it is another timeline's."""
        keeps = sorted(self.keeps)
        if state["keeps"] != keeps:
            raise ValueError(f"the state is of a timeline with {state['keeps']}, not {keeps}")
        self.task = state["task"]
        self.running = _copy(state["running"], self.base)
        self.latest = _copy(state["latest"], self.base)
        self.experts = [_copy(expert) for expert in state["experts"]]

    def _weights(self, source):
        if self.task == 0 or source == "zero-shot":
            weights = self.base
        elif source == "all":
            weights = self._merge_all()
        else:
            weights = self.latest if source == "latest" else self.running
        return {n: weights[n].detach().to(like, copy=True) for n, like in self.base.items()}

    def _update(self, theta):
        """m_{t-1} -> m_t."""
        if self.technique == "linear":
            self._average(theta)
        elif self.technique in RUNNING_AVERAGES:
            self._average(self._merge([theta]))
        elif self.technique in AVERAGES:
            before = self.base if self.anchored else self.running
            self.running = self._merge([before, theta], [self.weight, 1 - self.weight])
        else:
            alone = self.anchored or self.task == 0
            experts = [theta] if alone else [self.running, theta]
            halves = [1 / len(experts)] * len(experts) if self.technique == "tall-mask" else None
            self.running = self._merge(experts, halves)

    def _average(self, theta):
        """m_t = w m_{t-1} + (1-w) theta_t, in place."""
        for name, running in self.running.items():
            if running.is_floating_point():
                if self.anchored:
                    running.copy_(self.base[name])
                running.lerp_(theta[name].detach().to(running), 1 - self.weight)

    def _merge_all(self):
        experts = [self.base] * self.growth["include_base"]
        experts += [self.read(i) for i in range(self.task)] if self.read else self.experts
        weights = expert_weights(self.task, **self.growth)
        if self.technique in UNWEIGHTED:
            weights = None
        elif self.technique == "ties" or self.options.get("elect"):
            drop = (OPTIONS[self.technique] | self.options).get("drop", 0.0)
            excess = (1 - drop ** len(weights)) / (1 - drop)  # see dare()
            weights = [len(weights) / excess * w for w in weights]
        return self._merge(experts, weights)

    def _merge(self, experts, weights=None):
        if self.technique == "model-stock" and len(experts) == 1:
            return _copy(self._widened(experts[0]))
        options = dict(self.options)
        if self.technique in ("dare", "random"):
            options["seed"] = f"{options.get('seed', 0)} {self.task}"
        return merge(self.technique, self._widened(self.base), experts, weights, **options)

    def _widened(self, weights):
        return {n: weights[n].to(t.device, _wide(t.dtype)) for n, t in self.base.items()}


def _copy(weights, like=None):
    """like: the tensors on whose devices the copies are to be; by default where they are."""
    like = weights if like is None else like
    return {n: weights[n].detach().to(like[n].device, copy=True) for n in weights}
