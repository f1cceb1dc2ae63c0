"""Continual-learning methods for any nn.Module, one short class each, and their learning rates.

The methods of Roth et al. 2024, "A Practitioner's Guide to Continual Multimodal Pretraining" (arXiv
2408.14471, sec. 5), and its learning-rate meta-schedules (sec. 6.1). `Method` is plain finetuning,
and every other class is a diff against it. The classes know no CLIP: they choose parameters by name
patterns, which are class attributes that a user of another model overrides. (Joint training is
finetuning on all data at once; merging happens between tasks and belongs to merge.py.) This file
stands alone; copy it:

    from methods import METHODS, learning_rate  # model: any nn.Module; loss(model, batch) -> scalar
    method = METHODS["ewc"](ewc_lambda=10.0)
    method.prepare(model)
    for task, (batches, steps) in enumerate(stream):  # batches: a list of (batch, its samples)
        optimizer = method.optimizer(model)
        method.before_task(model, task)
        for step in range(steps):
            rate = learning_rate(step, steps, task)
            for group in optimizer.param_groups:
                group["lr"] = rate
            (loss(model, batches[step % len(batches)][0]) + method.penalty(model)).backward()
            torch.nn.utils.clip_grad_norm_(method.trained.values(), 1.0)
            method.after_backward(model, rate)
            optimizer.step()
            optimizer.zero_grad()
        method.after_task(model, batches, lambda model, batch: loss(model, batch).backward())
        weights = method.plain(model)  # name -> tensor, adapters merged in: evaluate, save these
"""

import math
from fnmatch import fnmatchcase
from functools import partial
from operator import attrgetter

import torch
from torch import nn
from torch.nn.utils import parametrize

OPTIONS = {  # method -> {option: default}
    "finetune": {},
    "locked-text": {},
    "locked-image": {},
    "lnfit": {},
    "bitfit": {},
    # rank r (in the paper 4 or 64), factor s on the adapter, seed of its random matrices
    "lora": {"rank": 4, "scale": 1.0, "seed": 0},
    "dora": {"rank": 4, "scale": 1.0, "seed": 0},
    "vera": {"rank": 4, "scale": 1.0, "seed": 0},
    # rank of the gradients, factor on the update, steps from one projection to the next
    "galore": {"rank": 16, "scale": 2.0, "gap": 200},
    # weight of the penalty, share of the old Fisher that a task leaves, most samples for a Fisher
    "ewc": {"ewc_lambda": 1.0, "ewc_gamma": 1.0, "fisher_samples": 50_000},
    # weight of the penalty, damping
    "si": {"si_c": 0.5, "si_xi": 1.0},
}
# the smallest value of an option, where that is not 0
SMALLEST = {"rank": 1, "gap": 1, "fisher_samples": 1, "si_xi": 1e-12}


class Method:
    """Plain finetuning: every parameter, no penalty. The example above calls every hook."""

    options = OPTIONS["finetune"]
    train = ("*",)  # name patterns of what is trained (fnmatch; * matches dots too),
    freeze = ()  # except what matches one of these
    adapter = None  # module that re-parametrises a weight
    adapt = None  # name pattern of such weights -> how many matrices are stacked in them
    state_names = ()  # attributes, each a dict from parameter name to tensor, that state() gives

    def __init__(self, **options):
        """An option that is not given has its default of OPTIONS. ValueError on an option that the
        method does not have, or on a value out of range."""
        for name, value in options.items():
            _check_option(name, value, self.options)
        vars(self).update(self.options | options)
        for name in self.state_names:
            setattr(self, name, {})

    def prepare(self, model):
        """Once per model, which is on its device already: adds the adapters and chooses what is
        trained. Sets .trained, name -> parameter. ValueError where the patterns match nothing."""
        self.names = list(model.state_dict())
        for patterns in (self.adapt or self.train, self.freeze):
            if patterns and not any(_match(name, patterns) for name in self.names):
                raise ValueError(f"no parameter matches {', '.join(patterns)}: override these")
        self.adapters = {}  # name of the weight -> its adapter
        shared = {}  # shape -> what adapters of that shape have in common: VeRA's random matrices
        for name in self.names:
            for pattern, pieces in (self.adapt or {}).items():
                if fnmatchcase(name, pattern):
                    self._adapt(model, name, pieces, shared)
                    break
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(_match(name, self.train) and not _match(name, self.freeze))
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._reset_adapters(model)

    def _adapt(self, model, name, pieces, shared):
        weight = attrgetter(name)(model)
        if weight.ndim != 2 or len(weight) % pieces:
            raise ValueError(f"{name} {list(weight.shape)} is not {pieces} stacked matrices")
        owner, _, leaf = name.rpartition(".")
        adapter = self.adapter(weight, pieces, self.rank, self.scale, self.seed, shared)
        self.adapters[name] = adapter
        parametrize.register_parametrization(model.get_submodule(owner), leaf, adapter)

    def load(self, model, weights):
        """Loads plain weights, named as before prepare. An adapter starts afresh, since what it
        learnt was learnt on other weights: the model computes exactly what `weights` do."""
        wrong = sorted(set(weights) ^ set(self.names))
        if wrong:
            raise ValueError(f"weights and model differ in {len(wrong)} names, such as {wrong[0]}")
        names = {name: _original_name(name) if name in self.adapters else name for name in weights}
        model.load_state_dict(model.state_dict() | {names[name]: weights[name] for name in weights})
        self._reset_adapters(model)

    @torch.no_grad()
    def _reset_adapters(self, model):
        generator = torch.Generator().manual_seed(self.seed) if self.adapters else None
        for name, adapter in self.adapters.items():
            adapter.reset(model.get_parameter(_original_name(name)), generator)

    @torch.no_grad()
    def plain(self, model):
        """-> the weights that the model computes with, names as before prepare, detached copies."""
        return {name: attrgetter(name)(model).detach().clone() for name in self.names}

    def optimizer(self, model, lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.2):
        """AdamW over what is trained; a new one for every task. In the middle of a task its
        state_dict(), state() and model.state_dict() are all that is needed to continue exactly."""
        fused = all(p.device.type in ("cpu", "cuda") for p in self.trained.values())
        return torch.optim.AdamW(self._groups(weight_decay), lr, betas, eps, fused=fused)

    def _groups(self, weight_decay):
        """Weights decay; gains, biases, vectors and logit_scale do not, as in CLIP (arXiv
        2103.00020, sec. 2.5). The authors' code decays all: that pulls LayerNorms and DoRA's
        magnitudes to 0, hence the model off its start."""
        matrices = [p for p in self.trained.values() if p.ndim >= 2]
        vectors = [p for p in self.trained.values() if p.ndim < 2]
        decayed = {"params": matrices, "weight_decay": weight_decay}
        others = {"params": vectors, "weight_decay": 0.0}
        return [group for group in (decayed, others) if group["params"]]

    def before_task(self, model, task):
        """The model holds the weights that the task starts from."""

    def penalty(self, model):
        """-> scalar to add to the task's loss, or 0. Its gradient is clipped with the loss's, as in
        the authors' code."""
        return 0

    def after_backward(self, model, lr):
        """The clipped gradients are in .grad, and the optimizer's step with rate lr comes next."""

    def after_task(self, model, batches, loss):
        """batches yields (batch, samples in it) of this task's own data; finetuning reads none.
        loss(model, batch) leaves the gradient of the task's loss, unscaled, in the parameters'
        .grad; what it returns is not used."""

    def state(self):
        """-> dict of dicts of tensors, not copies: all that the method has learnt, at any step."""
        return {name: getattr(self, name) for name in self.state_names}

    def load_state(self, state):
        """Takes what state() gave, from any device, after prepare."""
        for name in self.state_names:
            copies = {n: t.to(self.trained[n], copy=True) for n, t in state[name].items()}
            setattr(self, name, copies)


def _check_option(name, value, defaults):
    if name not in defaults:
        names = f"its options are {', '.join(defaults)}" if defaults else "it has no options"
        raise ValueError(f"the method has no option {name}: {names}")
    kinds = int if isinstance(defaults[name], int) else (int, float)
    least = SMALLEST.get(name, 0)
    good = isinstance(value, kinds) and not isinstance(value, bool)
    if not good or not least <= value < math.inf:
        number = "whole" if kinds is int else "finite"
        raise ValueError(f"option {name} is {value!r}: a {number} number from {least} on is needed")


def _match(name, patterns):
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _original_name(name):
    """a.weight -> a.parametrizations.weight.original, where parametrize moves the tensor."""
    owner, dot, leaf = name.rpartition(".")
    return f"{owner}{dot}parametrizations.{leaf}.original"


# -------------------------------------------------------------------------- methods that train less


class LockedText(Method):
    """Only the image tower. logit_scale belongs to the text side."""

    train = ("visual.*",)


class LockedImage(Method):
    """All but the image tower (LiT, arXiv 2111.07991)."""

    freeze = ("visual.*",)


class LNFit(Method):
    """LayerNorm gains and biases (arXiv 2308.09610)."""

    train = ("*ln_*",)


class BitFit(Method):
    """Every bias (arXiv 2106.10199)."""

    train = ("*bias",)


# ----------------------------------------------------------------------------------------- adapters
# parametrize computes the effective weight W' where the forward pass reads it: once a forward, and
# W' is freed with the graph. Autocast is off inside: a 16-bit product B @ A would round the update
# before it is added, and plain() would differ from what was trained.

# parametrize keeps W, frozen, as attn.parametrizations.in_proj_weight.original, and the tensors of
# the first and only adapter beside it as attn.parametrizations.in_proj_weight.0.A and so on: only
# these train
ADAPTERS = ("*parametrizations.*.0.*",)
# q, k and v, which are stacked in one matrix, and the mlp's second matrix
PROJECTIONS = {"*.attn.in_proj_weight": 3, "*.mlp.c_proj.weight": 1}


def _kaiming(parameter, fan_in, a, generator):
    """As nn.init.kaiming_uniform_, which reads a wrong fan_in off stacked matrices. The numbers are
    drawn on the CPU: they are the same on every device."""
    bound = math.sqrt(6 / ((1 + a * a) * fan_in))
    numbers = torch.empty(parameter.shape, device="cpu")
    parameter.copy_(numbers.uniform_(-bound, bound, generator=generator))


def _add_product(weight, scale, B, A):
    """W + s B A, of B [pieces, out / pieces, r] and A [pieces, r, in] -> [out, in]."""
    with torch.autocast(weight.device.type, enabled=False):
        return torch.add(weight, (B @ A).flatten(0, 1), alpha=scale)


class LoRAWeight(nn.Module):
    """W' = W + s B A (arXiv 2106.09685, eq. 3); A [pieces, r, in], B [pieces, out / pieces, r]."""

    def __init__(self, weight, pieces, rank, scale, seed, shared):
        super().__init__()
        self.scale = scale
        self.A = nn.Parameter(weight.new_empty(pieces, rank, weight.shape[1]))
        self.B = nn.Parameter(weight.new_empty(pieces, len(weight) // pieces, rank))

    def reset(self, weight, generator):
        _kaiming(self.A, weight.shape[1], math.sqrt(self.A.shape[1]), generator)
        self.B.zero_()

    def forward(self, weight):
        return _add_product(weight, self.scale, self.B, self.A)


class DoRAWeight(LoRAWeight):
    """W' = m V / |V| by rows, V = W + s B A (arXiv 2402.09353, eq. 5, norm detached as in its sec.
    4.3); m [out]."""

    def __init__(self, weight, *settings):
        super().__init__(weight, *settings)
        self.m = nn.Parameter(weight.new_empty(len(weight)))

    def reset(self, weight, generator):
        super().reset(weight, generator)
        self.m.copy_(_row_norms(weight))

    def forward(self, weight):
        v = super().forward(weight)  # [out, in]
        norm = _row_norms(v.detach())  # [out]
        norm = torch.where(norm > 0, norm, 1)  # a row of zeros stays zeros
        return (self.m / norm)[:, None] * v  # m / norm first: exactly 1 at the start


def _row_norms(v):
    """[out, in] -> [out]. Each row is divided by its largest entry first: of numbers below 1e-22,
    as dead rows hold, the squares would be 0 in float32, and above 1e19 infinite."""
    largest = v.abs().amax(dim=1).clamp_min(torch.finfo(v.dtype).tiny)
    return (v / largest[:, None]).norm(dim=1) * largest


class VeRAWeight(nn.Module):
    """W' = W + s diag(b) B diag(d) A (arXiv 2310.11454, eq. 2). Trained are the vectors d [pieces *
    r] and b [out]. A [r, in] and B [out / pieces, r] are random and frozen; all layers of a shape
    have the same (`shared` holds those drawn so far). The state dict holds them, so no run depends
    on drawing them again. They are kaiming uniform with a = 0, as the paper and peft draw them. The
    authors' code has a = sqrt(r): its W' moves 5 times less a step at rank 4, 65 times at 64."""

    def __init__(self, weight, pieces, rank, scale, seed, shared):
        super().__init__()
        self.scale = scale
        self.pieces = pieces
        shape = len(weight) // pieces, weight.shape[1]
        if shape not in shared:
            shared[shape] = self._draw(weight, *shape, rank, seed)
        A, B = shared[shape]
        self.register_buffer("A", A)
        self.register_buffer("B", B)
        self.d = nn.Parameter(weight.new_empty(pieces * rank))
        self.b = nn.Parameter(weight.new_empty(len(weight)))

    @staticmethod
    @torch.no_grad()
    def _draw(weight, rows, columns, rank, seed):
        generator = torch.Generator().manual_seed(seed)
        A = weight.new_empty(rank, columns)
        B = weight.new_empty(rows, rank)
        _kaiming(A, columns, 0, generator)
        _kaiming(B, rank, 0, generator)
        return A, B

    def reset(self, weight, generator):
        self.d.fill_(0.1)
        self.b.zero_()

    def forward(self, weight):
        d = self.d.view(self.pieces, -1, 1)
        b = self.b.view(self.pieces, -1, 1)
        return _add_product(weight, self.scale, b * self.B, d * self.A)


class LoRA(Method):
    """One adapter for the whole stream, on q, k, v and the mlp's output of every block. logit_scale
    is frozen."""

    options = OPTIONS["lora"]
    train = ADAPTERS
    adapter = LoRAWeight
    adapt = PROJECTIONS


class DoRA(LoRA):
    """LoRA that learns each row's magnitude apart from its direction."""

    options = OPTIONS["dora"]
    adapter = DoRAWeight


class VeRA(LoRA):
    """LoRA whose matrices are random: only two vectors train."""

    options = OPTIONS["vera"]
    adapter = VeRAWeight


# ------------------------------------------------------------------------------------------- galore


class GaLoreAdamW(torch.optim.Optimizer):
    """AdamW with a matrix's moments in the span of its gradient's top singular vectors (arXiv
    2403.03507, alg. 2).

    As the paper and its code: the moments stay as they are when the projection changes. As torch
    and unlike its code: eps is added after the bias correction and the decay precedes the update,
    so that a tensor which is no matrix gets exactly AdamW. A rank above the smaller side of a
    matrix means that side: a change of basis, which loses nothing."""

    def __init__(self, params, lr, betas, eps, weight_decay, rank, gap, scale):
        adamw = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**adamw, "rank": rank, "gap": gap, "scale": scale})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, self.state[p], group)

    def _step(self, p, state, group):
        t = state.get("step", 0) + 1
        state["step"] = t
        matrix = p.ndim == 2
        right = matrix and p.shape[0] >= p.shape[1]
        g = p.grad  # the paper's G
        if matrix:
            if (t - 1) % group["gap"] == 0:
                state["projector"] = _top_singular_vectors(g, group["rank"])
            projector = state["projector"]  # P
            g = g @ projector if right else projector.T @ g  # R: [rows, r] or [r, columns]
        if t == 1:
            state["exp_avg"] = torch.zeros_like(g)
            state["exp_avg_sq"] = torch.zeros_like(g)
        beta1, beta2 = group["betas"]
        m = state["exp_avg"].lerp_(g, 1 - beta1)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (m / (1 - beta1**t)).div_((v / (1 - beta2**t)).sqrt_().add_(group["eps"]))
        if matrix:
            update = group["scale"] * (update @ projector.T if right else projector @ update)
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])


def _top_singular_vectors(g, rank):
    """[rows, columns] -> [columns, r] right ones if rows >= columns, else [rows, r] left ones.

    Read off the smaller Gram matrix: a full SVD costs many times more, and the vectors differ only
    below rounding of the largest singular value. Signs are arbitrary, but the moments outlive a
    projection, so the largest entry of each vector is made positive."""
    if not g.isfinite().all():
        raise ValueError("a gradient is not finite and has no singular vectors: lower the rate")
    largest = g.abs().amax().clamp_min(torch.finfo(g.dtype).tiny)
    g = g / largest  # the square of a small gradient would underflow
    gram = g.T @ g if g.shape[0] >= g.shape[1] else g @ g.T
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)  # eigenvalues ascend
    return vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()


class GaLore(Method):
    """Every parameter, the matrices by GaLoreAdamW. rank, scale and gap are its options."""

    options = OPTIONS["galore"]

    def optimizer(self, model, lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.2):
        groups = self._groups(weight_decay)
        return GaLoreAdamW(groups, lr, betas, eps, weight_decay, self.rank, self.gap, self.scale)


# ------------------------------------------------------------------------------ quadratic penalties


def quadratic(importance, anchor, trained):
    """sum F (theta - anchor)^2, of three dicts from name to tensor -> scalar. mse_loss without a
    reduction is the square, and keeps no copy of the difference for the backward."""
    square = partial(nn.functional.mse_loss, reduction="none")
    return sum((importance[n] * square(p, anchor[n])).sum() for n, p in trained.items())


class EWC(Method):
    """Online elastic weight consolidation: L + lambda / 2 sum F (theta - theta*)^2 (arXiv
    1612.00796, eq. 3), with one Fisher for all tasks, F <- gamma F + F_task (arXiv 1805.06370).
    F_task is the mean over batches of the squared gradient of the batch's loss, as in the authors'
    code: a contrastive loss has no gradient per sample. F_task shrinks as batches grow. Our batches
    are full ones of the task's data; the authors' are the task's part of a mixed batch, 98 times
    175 of 512 samples."""

    options = OPTIONS["ewc"]
    state_names = ("fisher", "anchor")  # F and theta*

    def penalty(self, model):
        if not self.fisher:
            return 0
        return self.ewc_lambda / 2 * quadratic(self.fisher, self.anchor, self.trained)

    def after_task(self, model, batches, loss):
        """Leaves every .grad None. A batch whose gradient is not finite, as float16's may be, does
        not count."""
        squares = {name: torch.zeros_like(p) for name, p in self.trained.items()}
        samples = 0
        count = 0
        for batch, size in batches:
            if count and samples + size > self.fisher_samples:
                break
            model.zero_grad()
            loss(model, batch)
            if self._add_squared_gradients(squares):
                samples += size
                count += 1
        model.zero_grad()
        if not count:
            raise ValueError("EWC needs a batch of the task that leaves a finite gradient in .grad")
        for name, p in self.trained.items():
            old = self.fisher.get(name, torch.zeros_like(p))
            self.fisher[name] = self.ewc_gamma * old + squares[name] / count
            self.anchor[name] = p.detach().clone()

    def _add_squared_gradients(self, squares):
        """-> False, and nothing is added, where there is no gradient or one that is not finite."""
        gradients = {name: p.grad for name, p in self.trained.items() if p.grad is not None}
        if not gradients or not all(g.isfinite().all() for g in gradients.values()):
            return False
        for name, g in gradients.items():
            squares[name].addcmul_(g, g)
        return True


class SI(Method):
    """Synaptic intelligence: L + c sum Omega (theta - theta_start)^2 (arXiv 1703.04200, eq. 4).
    The variant of the authors' code: omega sums lr g^2, where g is what the optimizer sees
    (clipped, with the penalty's gradient). Under SGD this is the original -g * dtheta. Under AdamW
    it is not the loss won along the path, but it is never negative, so the penalty stays convex,
    and it needs no copy of the weights and gradients of the step before."""

    options = OPTIONS["si"]
    state_names = ("omega", "path", "anchor")  # Omega, omega, and the weights at the task's start

    def before_task(self, model, task):
        self.anchor = {name: p.detach().clone() for name, p in self.trained.items()}
        self.path = {name: torch.zeros_like(p) for name, p in self.trained.items()}

    def penalty(self, model):
        if not self.omega:
            return 0
        return self.si_c * quadratic(self.omega, self.anchor, self.trained)

    def after_backward(self, model, lr):
        for name, p in self.trained.items():
            if p.grad is not None:  # else the loss does not reach this parameter
                self.path[name].addcmul_(p.grad, p.grad, value=lr)

    @torch.no_grad()
    def after_task(self, model, batches, loss):
        for name, p in self.trained.items():
            importance = self.path[name] / ((p - self.anchor[name]) ** 2 + self.si_xi)  # eq. 5
            self.omega[name] = self.omega.get(name, torch.zeros_like(p)) + importance


METHODS = {
    "finetune": Method,
    "locked-text": LockedText,
    "locked-image": LockedImage,
    "lnfit": LNFit,
    "bitfit": BitFit,
    "lora": LoRA,
    "dora": DoRA,
    "vera": VeRA,
    "galore": GaLore,
    "ewc": EWC,
    "si": SI,
}


# ----------------------------------------------------------------------------------- learning rates

SCHEDULES = {  # schedule -> the meta-schedules that are defined on it
    "cosine": ("none", "autoregressive", "dynamic"),
    "rsqrt": ("none", "autoregressive", "continued", "recovered"),
}


def learning_rate(
    step, steps, task, lr=1e-5, schedule="cosine", meta="none", warmup=0.1, cooldown=0.1, floor=1e-3
):
    """-> rate of a step (0 to steps - 1) of a task (0, 1, ...); a pure function. lr is the peak;
    warmup and cooldown (rsqrt only) are shares of a task's steps; floor is the share of lr at which
    a decay ends. Paper, sec. 6.1. ValueError where an argument is out of range."""
    if meta not in SCHEDULES.get(schedule, ()):
        valid = "; ".join(f"{name} with {', '.join(metas)}" for name, metas in SCHEDULES.items())
        raise ValueError(f"no schedule {schedule!r} with meta-schedule {meta!r}; there are {valid}")
    if not (0 <= step < steps and task >= 0):
        place = f"step {step} of {steps} in task {task}"
        raise ValueError(f"{place}: steps count from 0 to steps - 1, tasks from 0")
    shares = {"warmup": warmup, "cooldown": cooldown, "floor": floor}
    if not (all(0 <= share <= 1 for share in shares.values()) and 0 <= lr < math.inf):
        limits = "warmup, cooldown and floor lie in 0..1 and lr is not negative"
        raise ValueError(f"{limits}, got {shares}, lr {lr}")
    warm = math.ceil(warmup * steps - 1e-9)  # W; .07 * 100 is a little above 7
    cool = math.ceil(cooldown * steps - 1e-9)  # C
    if steps == 1:  # a decay would end in this step, at the floor or at 0
        warm = 1
        cool = 0
    if schedule == "rsqrt":
        rate = _rsqrt(step, steps, task, lr, meta, warm, cool, floor * lr)
    elif meta == "dynamic" and step >= warm:  # the tail of one cosine over all tasks so far
        step += task * steps
        steps *= task + 1
        return learning_rate(step, steps, 0, lr, warmup=warmup, floor=floor)
    else:
        rate = _cosine(step, steps, task, lr, meta, warm, floor * lr)
    return min(rate, lr)  # low + (lr - low) may round to above lr


def _cosine(n, steps, t, lr, meta, warm, low):
    decay = steps - warm

    def fall(share, top):
        return low + (top - low) * (1 + math.cos(math.pi * share)) / 2

    # where one cosine over tasks 0..t is at the end of task t's warm-up, but never at its very end
    elapsed = (t * decay + 1) / ((t + 1) * decay) if decay > 1 else t / (t + 1)
    peak = lr if t == 0 or meta == "none" else fall(elapsed, lr)
    # 1. warm-up: linear to the peak
    if n < warm:
        return peak * (n + 1) / warm
    # 2. decay: half a cosine from the peak to low
    return fall((n - warm + 1) / decay, peak)


def _rsqrt(n, steps, t, lr, meta, warm, cool, low):
    warm = max(1, warm)  # 1 / sqrt(n) needs an origin: without warm-up the first step is the peak
    middle = max(0, steps - cool - warm)  # steps of a task between its warm-up and its cool-down

    def fall(share, top):
        return low + (top - low) * math.sqrt(share)

    if meta == "none":
        share = 1
    elif meta == "autoregressive":  # one decay over tasks 0..t, with all their warm-ups
        share = (t + 1) * warm / (t * steps + warm)
    else:  # "continued", "recovered": one decay over the middles of the tasks before
        share = warm / (warm + t * middle)
    peak = fall(share, lr)
    # 1. warm-up: linear to the peak. The authors' for "recovered" ends a quarter below the curve
    #    (.25075 of lr against .334 at t = 1) and jumps to it: they add the offset t * middle twice.
    #    Ours ends on it
    if n < warm:
        rate = peak * (n + 1) / warm
    # 2. middle: "recovered" stays on the long decay, the others start one anew from their peak
    elif meta == "recovered":
        rate = fall(warm / (n + t * middle), lr)
    else:
        rate = fall(warm / n, peak)
    # 3. cool-down: that value, times what goes linearly to 0 at the last step
    left = steps - 1 - n
    return rate * left / cool if left < cool else rate
