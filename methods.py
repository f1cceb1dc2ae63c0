"""What a continual learner trains, how it is held back, and at which learning rate: one short class per method.

The methods of Roth et al. 2024, "A Practitioner's Guide to Continual Multimodal Pretraining" (arXiv 2408.14471, sec. 5)
and its learning-rate meta-schedules (sec. 6.1). They know no CLIP: they choose parameters by name patterns, class
attributes that a user of another model overrides. `Method` is plain finetuning, and every other class is a diff against
it. (Joint training is finetuning on all data at once; merging happens between tasks and belongs to merge.py.)
This file stands alone; copy it:

    from methods import METHODS, learning_rate  # model: any nn.Module; loss(model, batch) -> scalar
    method = METHODS["ewc"](ewc_lambda=10.0)
    method.prepare(model)
    for task, (batches, steps) in enumerate(stream):  # batches: a list of (batch, number of samples in it)
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
        method.after_task(model, batches, loss)
        weights = method.plain(model)  # name -> tensor, adapters merged in: evaluate, average, save these
"""

import math
from fnmatch import fnmatchcase
from operator import attrgetter

import torch
from torch import nn
from torch.nn.utils import parametrize

LEAST = {  # every option of every method, and its smallest value; the defaults are the classes' attributes
    "rank": 1, "scale": 0.0, "gap": 1, "ewc_lambda": 0.0, "ewc_gamma": 0.0, "fisher_samples": 1, "si_c": 0.0,
    "si_xi": 1e-12, "seed": 0,
}  # fmt: skip


class Method:
    """Plain finetuning: every parameter, no penalty. Each hook is called where the example above calls it."""

    train, freeze = ("*",), ()  # name patterns (fnmatch, * crosses dots): the first are trained, save the second
    adapter, adapt = None, {}  # re-parametrisation, and name pattern -> matrices fused in the weight, each has its own
    kept = ()  # dicts from parameter name to tensor that outlive a task: what state() saves

    rank = 4  # lora, dora, vera: of the adapters (paper: 4 or 64); galore: of the projected gradients
    scale = 1.0  # the paper's s: factor on the adapter's product, or on galore's update
    gap = 200  # galore: optimizer steps from one projection to the next
    ewc_lambda, ewc_gamma = 1.0, 1.0  # weight of EWC's penalty; what a task leaves of the Fisher of those before
    fisher_samples = 50_000  # ewc: at most so many samples of a task enter its Fisher
    si_c, si_xi = 0.5, 1.0  # weight of SI's penalty; its damping
    seed = 0  # of the adapters' random matrices

    def __init__(self, **options):
        """Options are those of LEAST, for all methods alike; None stands for the method's own default."""
        for name, value in options.items():
            if name not in LEAST:
                raise TypeError(f"methods have no option {name!r}; they have {', '.join(LEAST)}")
            if value is None:
                continue
            kind = type(LEAST[name])
            if isinstance(value, bool) or not isinstance(value, (int, kind)):
                raise TypeError(f"option {name} must be {kind.__name__}, got {value!r}")
            if not LEAST[name] <= value < math.inf:
                raise ValueError(f"option {name} must be finite and at least {LEAST[name]}, got {value}")
            setattr(self, name, value)
        for name in self.kept:
            setattr(self, name, {})

    def prepare(self, model):
        """Once per model: re-parametrise what is adapted, choose what is trained. Sets .trained, name -> parameter.
        The model is on its device already. Raises ValueError where the patterns fit nothing."""
        self.names = list(model.state_dict())
        self.adapted, shared = {}, {}
        for name in self.names:
            pieces = next((n for pattern, n in self.adapt.items() if fnmatchcase(name, pattern)), 0)
            if pieces:
                owner, _, leaf = name.rpartition(".")
                owner, weight = model.get_submodule(owner), attrgetter(name)(model)
                if weight.ndim != 2 or len(weight) % pieces:
                    raise ValueError(f"{name} {list(weight.shape)} is not {pieces} matrices stacked: nothing to adapt")
                self.adapted[name] = self.adapter(weight, pieces, self.rank, self.scale, self.seed, shared)
                parametrize.register_parametrization(owner, leaf, self.adapted[name])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(_fits(name, self.train) and not _fits(name, self.freeze))
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError(f"no parameter fits the name patterns {[*(self.adapt or self.train)]}: nothing to train")
        self._reset_adapters(model)

    def load(self, model, start):
        """Plain weights, named as before prepare, into the model. An adapter would add what it learnt to weights that
        it was not learnt on, so it starts afresh: the model computes exactly `start`."""
        if set(start) != set(self.names):
            wrong = sorted(set(start) ^ set(self.names))
            raise ValueError(f"weights do not fit the model, first at {', '.join(wrong[:5])} ({len(wrong)} in all)")
        inside = {_inside(n) if n in self.adapted else n: t for n, t in start.items()}
        model.load_state_dict(model.state_dict() | inside)
        self._reset_adapters(model)

    def _reset_adapters(self, model):
        generator = torch.Generator().manual_seed(self.seed)
        for name, adapter in self.adapted.items():
            with torch.no_grad():
                adapter.reset(model.get_parameter(_inside(name)), generator)

    @torch.no_grad()
    def plain(self, model):
        """-> the weights that the model computes with, names as before prepare, detached copies."""
        return {name: attrgetter(name)(model).detach().clone() for name in self.names}

    def optimizer(self, model, lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.2):
        """AdamW over what is trained, and nothing else; a new one for every task."""
        fused = all(p.device.type in ("cpu", "cuda") for p in self.trained.values())
        return torch.optim.AdamW(self._groups(weight_decay), lr=lr, betas=betas, eps=eps, fused=fused)

    def _groups(self, weight_decay):
        """Weights decay; gains, biases, vectors and logit_scale do not, as in CLIP (arXiv 2103.00020, sec. 2.5). The
        authors' code decays all: that pulls LayerNorms and DoRA's magnitudes to 0, hence the model off its start."""
        trained = list(self.trained.values())
        groups = ([p for p in trained if p.ndim >= 2], weight_decay), ([p for p in trained if p.ndim < 2], 0.0)
        return [{"params": params, "weight_decay": decay} for params, decay in groups if params]

    def before_task(self, model, task):
        """The model holds the weights that the task starts from."""

    def penalty(self, model):
        """-> scalar to add to the task's loss, or 0. Clipping sees its gradient, as in the authors' code."""
        return 0

    def after_backward(self, model, lr):
        """Gradients are there and clipped, the step of rate lr is not yet done."""

    def after_task(self, model, batches, loss):
        """batches yields (batch, number of samples in it) of this task's own data and is read only if needed;
        loss(model, batch) -> the task's loss, a scalar."""

    def state(self):
        """-> nested dict of tensors, not copies. With model.state_dict() it continues a run after a task, exactly."""
        return {key: getattr(self, key) for key in self.kept}

    def load_state(self, state):
        """What state() gave, after prepare; tensors may come from another device."""
        if set(state) != set(self.kept) or any(set(d) - set(self.trained) for d in state.values()):
            raise ValueError(f"this is no state of {type(self).__name__} on this model: it holds {sorted(state)}")
        for key, tensors in state.items():
            setattr(self, key, {name: t.to(self.trained[name], copy=True) for name, t in tensors.items()})


def _fits(name, patterns):
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _inside(name):
    """Where parametrize moves the tensor called name: a.weight -> a.parametrizations.weight.original"""
    owner, dot, leaf = name.rpartition(".")
    return f"{owner}{dot}parametrizations.{leaf}.original"


# ------------------------------------------------------------------------------------- methods that train less


class LockedText(Method):
    """Only the image tower. logit_scale belongs to the text side."""

    train = ("visual.*",)


class LockedImage(Method):
    """All but the image tower (LiT, arXiv 2111.07991)."""

    freeze = ("visual.*",)


class LNFit(Method):
    """LayerNorm gains and biases (arXiv 2308.12462)."""

    train = ("*ln_*",)


class BitFit(Method):
    """Every bias (arXiv 2106.10199)."""

    train = ("*bias",)


# ----------------------------------------------------------------------------------------------------- adapters
# The effective weight W' is computed where the forward pass reads it, by torch.nn.utils.parametrize: once per forward,
# freed with its graph. `original` is W, frozen. Autocast is off inside: a 16-bit product B@A would round the update
# before it is added, and plain() would differ from what was trained.

ADAPTERS = ("*parametrizations.*.0.*",)  # parametrize's names for an adapter's own tensors
PROJECTIONS = {"*.attn.in_proj_weight": 3, "*.mlp.c_proj.weight": 1}  # q, k, v stacked in one matrix; the mlp's last


def _kaiming(parameter, fan_in, a, generator):
    """nn.init.kaiming_uniform_, which reads a wrong fan_in off stacked matrices, drawn on the CPU: equal anywhere."""
    bound = math.sqrt(6 / ((1 + a * a) * fan_in))
    parameter.copy_(torch.empty(parameter.shape, device="cpu").uniform_(-bound, bound, generator=generator))


class LoRAWeight(nn.Module):
    """W' = W + s B A (arXiv 2106.09685, eq. 3); A [pieces, r, in], B [pieces, out / pieces, r]."""

    def __init__(self, weight, pieces, rank, scale, seed, shared):
        super().__init__()
        self.scale = scale
        self.A = nn.Parameter(weight.new_empty(pieces, rank, weight.shape[1]))
        self.B = nn.Parameter(weight.new_zeros(pieces, len(weight) // pieces, rank))

    def reset(self, weight, generator):
        _kaiming(self.A, weight.shape[1], math.sqrt(self.A.shape[1]), generator)
        self.B.zero_()

    def forward(self, weight):
        with torch.autocast(weight.device.type, enabled=False):
            return torch.add(weight, (self.B @ self.A).flatten(0, 1), alpha=self.scale)  # [out, in]


class DoRAWeight(nn.Module):
    """W' = m V / |V| by rows, V = W + s B A (arXiv 2402.09353, eq. 5, norm detached as in its sec. 4.3); m [out]."""

    def __init__(self, weight, pieces, rank, scale, seed, shared):
        super().__init__()
        self.scale = scale
        self.A = nn.Parameter(weight.new_empty(pieces, rank, weight.shape[1]))
        self.B = nn.Parameter(weight.new_zeros(pieces, len(weight) // pieces, rank))
        self.m = nn.Parameter(weight.new_empty(len(weight)))

    def reset(self, weight, generator):
        _kaiming(self.A, weight.shape[1], math.sqrt(self.A.shape[1]), generator)
        self.B.zero_()
        self.m.copy_(weight.norm(dim=1))

    def forward(self, weight):
        with torch.autocast(weight.device.type, enabled=False):
            v = torch.add(weight, (self.B @ self.A).flatten(0, 1), alpha=self.scale)  # [out, in]
            norm = v.detach().norm(dim=1).clamp_min(torch.finfo(v.dtype).tiny)  # [out]; a row of zeros stays zeros
            return (self.m / norm)[:, None] * v  # m / norm first: exactly 1 at the start


class VeRAWeight(nn.Module):
    """W' = W + s diag(b) B diag(d) A (arXiv 2310.11454, eq. 2). A [r, in] and B [out / pieces, r] are random, frozen
    and one for all layers of a shape; the state dict holds them, so no run depends on drawing them again. Trained are
    the vectors d [pieces * r] and b [out]."""

    def __init__(self, weight, pieces, rank, scale, seed, shared):
        super().__init__()
        self.scale, self.pieces = scale, pieces
        shape = rank, weight.shape[1], len(weight) // pieces
        if shape not in shared:
            generator = torch.Generator().manual_seed(seed)
            shared[shape] = weight.new_empty(rank, shape[1]), weight.new_empty(shape[2], rank)
            with torch.no_grad():
                _kaiming(shared[shape][0], shape[1], 0, generator)
                _kaiming(shared[shape][1], rank, 0, generator)
        for name, matrix in zip("AB", shared[shape]):
            self.register_buffer(name, matrix)
        self.d = nn.Parameter(weight.new_empty(pieces * rank))
        self.b = nn.Parameter(weight.new_empty(len(weight)))

    def reset(self, weight, generator):
        self.d.fill_(0.1)
        self.b.zero_()

    def forward(self, weight):
        with torch.autocast(weight.device.type, enabled=False):
            d, b = self.d.view(self.pieces, -1, 1), self.b.view(self.pieces, -1, 1)
            return torch.add(weight, ((b * self.B) @ (d * self.A)).flatten(0, 1), alpha=self.scale)  # [out, in]


class LoRA(Method):
    """One adapter for the whole stream, on q, k, v and the mlp's output of every block. logit_scale is frozen."""

    train, adapter, adapt = ADAPTERS, LoRAWeight, PROJECTIONS


class DoRA(Method):
    train, adapter, adapt = ADAPTERS, DoRAWeight, PROJECTIONS


class VeRA(Method):
    train, adapter, adapt = ADAPTERS, VeRAWeight, PROJECTIONS


# ------------------------------------------------------------------------------------------------------- galore


class GaLoreAdamW(torch.optim.Optimizer):
    """AdamW with a matrix's moments in the span of its gradient's top singular vectors (arXiv 2403.03507, alg. 2).

    As the paper and its code: the moments stay as they are when the projection changes. As torch and unlike its code:
    eps is added after the bias correction and the decay precedes the update, so that what is no matrix gets exactly
    AdamW. A rank above the smaller side of a matrix means that side: a change of basis, which loses nothing."""

    def __init__(self, params, lr, betas, eps, weight_decay, rank, gap, scale):
        galore = {"rank": rank, "gap": gap, "scale": scale}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **galore})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, self.state[p], group)

    def _step(self, p, state, group):
        (beta1, beta2), g = group["betas"], p.grad  # the paper's G
        t = state["step"] = state.get("step", 0) + 1
        if p.ndim == 2:
            if (t - 1) % group["gap"] == 0:
                state["projector"] = _top_singular_vectors(g, group["rank"])
            projector, right = state["projector"], p.shape[0] >= p.shape[1]
            g = g @ projector if right else projector.T @ g  # R: [rows, r] or [r, columns]
        if t == 1:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(g), torch.zeros_like(g)
        m, v = state["exp_avg"].lerp_(g, 1 - beta1), state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (m / (1 - beta1**t)).div_((v / (1 - beta2**t)).sqrt_().add_(group["eps"]))
        if p.ndim == 2:
            update = group["scale"] * (update @ projector.T if right else projector @ update)
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])


def _top_singular_vectors(g, rank):
    """[rows, columns] -> [columns, r] right ones if rows >= columns, else [rows, r] left ones.

    Read off the smaller Gram matrix: a full SVD costs many times more, and the vectors differ only below rounding of
    the largest singular value. Signs are arbitrary but outlived by the moments, so the largest entry is positive."""
    if not g.isfinite().all():
        raise ValueError("a gradient is not finite and has no singular vectors: lower the learning rate")
    g = g / g.abs().amax().clamp_min(torch.finfo(g.dtype).tiny)  # a square of a small gradient would underflow
    gram = g.T @ g if g.shape[0] >= g.shape[1] else g @ g.T
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)  # eigenvalues ascend
    return vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()


class GaLore(Method):
    rank, scale = 16, 2.0

    def optimizer(self, model, lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.2):
        return GaLoreAdamW(self._groups(weight_decay), lr, betas, eps, weight_decay, self.rank, self.gap, self.scale)


# --------------------------------------------------------------------------------------------- quadratic penalties


class Quadratic(torch.autograd.Function):
    """weight / 2 |root * (theta - anchor)|^2 over lists of tensors, and its gradient in closed form: a few fused passes
    over the parameters, one temporary, where autograd would record and replay each tensor's."""

    @staticmethod
    def forward(ctx, weight, root, anchor, *theta):
        scaled = torch._foreach_sub(theta, anchor)
        torch._foreach_mul_(scaled, root)
        ctx.weight, ctx.root, ctx.scaled = weight, root, scaled
        return weight / 2 * torch.stack(torch._foreach_norm(scaled)).square().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        gradient, ctx.scaled = ctx.scaled, None  # used up: a second pass through this graph is an error, as elsewhere
        torch._foreach_mul_(gradient, ctx.root)
        torch._foreach_mul_(gradient, ctx.weight * upstream)
        return None, None, None, *gradient


def quadratic(weight, root, anchor, trained):
    """Penalty weight / 2 sum root^2 (theta - anchor)^2 of three dicts from name to tensor, in one order -> scalar.
    The importances are kept as square roots since the penalty then is a norm, which is one fused kernel."""
    return Quadratic.apply(weight, list(root.values()), list(anchor.values()), *trained.values())


class EWC(Method):
    """Online elastic weight consolidation: L + lambda / 2 sum F (theta - theta*)^2 (arXiv 1612.00796, eq. 3), with one
    Fisher, F <- gamma F + F_task (arXiv 1805.06370). F_task is the mean over batches of the squared gradient of the
    batch's loss, as in the authors' code: a contrastive loss has no gradient per sample. It shrinks as batches grow."""

    kept = ("root_fisher", "anchor")  # sqrt(F) and theta*
    loss_scale = 2.0**14  # keeps float16 gradients from vanishing, and changes no bit of wider ones

    def penalty(self, model):
        return quadratic(self.ewc_lambda, self.root_fisher, self.anchor, self.trained) if self.root_fisher else 0

    def after_task(self, model, batches, loss):
        parameters = list(self.trained.values())
        fisher, samples, count = [torch.zeros_like(p) for p in parameters], 0, 0
        for batch, size in batches:
            if count and samples + size > self.fisher_samples:
                break
            scaled = self.loss_scale * loss(model, batch)
            gradients = torch.autograd.grad(scaled, parameters, allow_unused=True, materialize_grads=True)
            if torch.stack(torch._foreach_norm(gradients)).isfinite().all():
                gradients = torch._foreach_div(gradients, self.loss_scale)
                torch._foreach_addcmul_(fisher, gradients, gradients)
                samples, count = samples + size, count + 1
        if not count:
            raise ValueError("EWC measures its Fisher on the task's batches: there is none with a finite gradient")
        torch._foreach_div_(fisher, count)
        if self.root_fisher:
            root = list(self.root_fisher.values())
            torch._foreach_addcmul_(fisher, root, root, value=self.ewc_gamma)
        torch._foreach_sqrt_(fisher)
        self.root_fisher = dict(zip(self.trained, fisher))
        self.anchor = {name: p.detach().clone() for name, p in self.trained.items()}


class SI(Method):
    """Synaptic intelligence: L + c sum Omega (theta - theta_start)^2 (arXiv 1703.04200, eq. 4). Variant lr * g^2, that
    of the authors' code: omega sums lr g^2, g as the optimizer sees it (clipped, with the penalty's). Under SGD this is
    the original -g * dtheta; under AdamW it is not the loss won along the path, but never negative, so the penalty
    stays convex, and it needs no copy of the weights and gradients of the step before."""

    kept = ("root_omega", "path", "anchor")  # sqrt(Omega), omega and the weights at the task's start

    def before_task(self, model, task):
        self.anchor = {name: p.detach().clone() for name, p in self.trained.items()}
        self.path = {name: torch.zeros_like(p) for name, p in self.trained.items()}

    def penalty(self, model):
        return quadratic(2 * self.si_c, self.root_omega, self.anchor, self.trained) if self.root_omega else 0

    def after_backward(self, model, lr):
        path, gradients = zip(*((self.path[n], p.grad) for n, p in self.trained.items() if p.grad is not None))
        torch._foreach_addcmul_(path, gradients, gradients, value=lr)

    @torch.no_grad()
    def after_task(self, model, batches, loss):
        for name, p in self.trained.items():
            omega = self.path[name] / ((p - self.anchor[name]) ** 2 + self.si_xi)  # eq. 5
            self.root_omega[name] = (self.root_omega.get(name, torch.zeros_like(p)) ** 2 + omega).sqrt()


METHODS = {
    "finetune": Method, "locked-text": LockedText, "locked-image": LockedImage, "lnfit": LNFit, "bitfit": BitFit,
    "lora": LoRA, "dora": DoRA, "vera": VeRA, "galore": GaLore, "ewc": EWC, "si": SI,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ learning rates

SCHEDULES = {  # schedule -> the meta-schedules that are defined on it
    "cosine": ("none", "autoregressive", "dynamic"),
    "rsqrt": ("none", "autoregressive", "continued", "recovered"),
}


def learning_rate(
    step, steps, task, lr=1e-5, schedule="cosine", meta="none", warmup=0.1, cooldown=0.1, floor=1e-3
):
    """-> rate of step 0..steps-1 of task 0, 1, ..; a pure function. lr is the peak; warmup and cooldown (rsqrt only)
    are shares of a task's steps, floor is the share of lr that a decay ends at. Paper sec. 6.1."""
    if meta not in SCHEDULES.get(schedule, ()):
        valid = "; ".join(f"{name} with {', '.join(metas)}" for name, metas in SCHEDULES.items())
        raise ValueError(f"no schedule {schedule!r} with meta-schedule {meta!r}; there are {valid}")
    if not (0 <= step < steps and task >= 0):
        raise ValueError(f"step {step} of {steps} in task {task}: steps count from 0 to steps - 1, tasks from 0")
    shares = {"warmup": warmup, "cooldown": cooldown, "floor": floor}
    if not (all(0 <= share <= 1 for share in shares.values()) and 0 <= lr < math.inf):
        raise ValueError(f"warmup, cooldown and floor lie in 0..1 and lr is not negative, got {shares}, lr {lr}")
    curve = {"cosine": _cosine, "rsqrt": _rsqrt}[schedule]
    warm, cool = (math.ceil(share * steps - 1e-9) for share in (warmup, cooldown))  # .07 * 100 is a little above 7
    value = curve(step, steps, task, lr, meta, warm, cool, floor * lr)
    if schedule == "cosine" and meta == "dynamic" and step >= warm:  # the tail of one cosine over all tasks so far
        value = learning_rate(task * steps + step, (task + 1) * steps, 0, lr, warmup=warmup, floor=floor)
    return min(value, lr)  # low + (lr - low) may round to above lr


def _cosine(n, steps, t, lr, meta, warm, cool, low):
    decay = steps - warm

    def fall(share, top):
        return low + (top - low) * (1 + math.cos(math.pi * share)) / 2

    peak = lr
    if t and meta != "none":  # where one cosine over tasks 0..t is at the end of task t's warm-up
        peak = fall((t * decay + 1) / ((t + 1) * decay) if decay else t / (t + 1), lr)
    return peak * (n + 1) / warm if n < warm else fall((n - warm + 1) / decay, peak)


def _rsqrt(n, steps, t, lr, meta, warm, cool, low):
    warm = max(1, warm)  # 1 / sqrt(n) needs an origin: without warm-up its first step is at the peak
    middle = max(0, steps - cool - warm)
    start = {  # what the peak of task t is a root of: shares of one long rsqrt decay
        "none": 1,
        "autoregressive": (t + 1) * warm / (t * steps + warm),  # one schedule over tasks 0..t, each with its warm-up
        "continued": warm / (warm + t * middle),  # only the middles of the tasks before count
        "recovered": warm / (warm + t * middle),
    }[meta]
    peak = low + math.sqrt(start) * (lr - low)
    if n < warm:
        value = peak * (n + 1) / warm
    elif meta == "recovered":  # stays on the long curve, where "continued" restarts the decay from its lower peak.
        value = low + math.sqrt(warm / (n + t * middle)) * (lr - low)  # the authors' warm-up ends a little above it
    else:
        value = low + math.sqrt(warm / n) * (peak - low)
    left = steps - 1 - n  # steps after this one: the last cool of them go linearly to 0
    return value * left / cool if left < cool else value
