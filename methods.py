"""What a continual learner trains, how it is held back, and at which learning rate: one short class
per method.

The methods of Roth et al. 2024, "A Practitioner's Guide to Continual Multimodal Pretraining" (arXiv
2408.14471, sec. 5) and its learning-rate meta-schedules (sec. 6.1). They know no CLIP: they choose
parameters by name patterns, class attributes that a user of another model overrides. `Method` is
plain finetuning, and every other class is a diff against it. (Joint training is finetuning on all
data at once; merging happens between tasks and belongs to merge.py.) This file stands alone; copy
it:

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
        method.after_task(model, batches, loss)
        weights = method.plain(model)  # name -> tensor, adapters merged in: evaluate, save these
"""

import math
from fnmatch import fnmatchcase
from operator import attrgetter

import torch
from torch import nn
from torch.nn.utils import parametrize

OPTIONS = {  # name -> type, smallest value, what it is; the default stands in the method's class
    "rank": (int, 1, "of the adapters (in the paper 4 or 64), or of galore's gradients (16)"),
    "scale": (float, 0.0, "s, the factor on the adapters' product, or on galore's update"),
    "gap": (int, 1, "optimizer steps from one projection to the next"),
    "ewc_lambda": (float, 0.0, "weight of EWC's penalty"),
    "ewc_gamma": (float, 0.0, "what a new task leaves of the Fisher of those before"),
    "fisher_samples": (int, 1, "at most so many samples of a task enter its Fisher"),
    "si_c": (float, 0.0, "weight of SI's penalty"),
    "si_xi": (float, 1e-12, "SI's damping"),
    "seed": (int, 0, "of the adapters' random matrices"),
}


def used(method):
    """-> names of the options that METHODS[method] uses: those that its class has a default for."""
    return tuple(name for name in OPTIONS if hasattr(METHODS[method], name))


class Method:
    """Plain finetuning: every parameter, no penalty. Each hook is called where the example above
    calls it."""

    train = ("*",)  # name patterns (fnmatch, * crosses dots) of what is trained,
    freeze = ()  # save what fits one of these
    adapter = None  # module that re-parametrises a weight
    adapt = None  # name pattern of such weights -> how many matrices are stacked in them
    kept = ()  # attributes, dicts from parameter name to tensor, that outlive a step: see state()
    anew = ()  # those of them that before_task makes anew: after a task nobody needs them

    def __init__(self, **options):
        """Takes every option of OPTIONS, used or not. None stands for the default."""
        for name, value in options.items():
            if value is not None:
                _check_option(name, value)
                setattr(self, name, value)
        for name in self.kept:
            setattr(self, name, {})

    def prepare(self, model):
        """Once per model: re-parametrise what is adapted, choose what is trained. Sets .trained,
        name -> parameter. The model is on its device already. Raises ValueError where the patterns
        fit nothing."""
        self.names = list(model.state_dict())
        self.adapted = {}  # name -> its adapter
        shared = {}  # what adapters of one shape have in common: VeRA's random matrices, by shape
        for name in self.names:
            for pattern, pieces in (self.adapt or {}).items():
                if fnmatchcase(name, pattern):
                    self._adapt(model, name, pieces, shared)
                    break
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(_fits(name, self.train) and not _fits(name, self.freeze))
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.trained:
            patterns = ", ".join(self.adapt or self.train)
            raise ValueError(f"no parameter fits the name patterns {patterns}: nothing to train")
        self._reset_adapters(model)

    def _adapt(self, model, name, pieces, shared):
        weight = attrgetter(name)(model)
        if weight.ndim != 2 or len(weight) % pieces:
            raise ValueError(
                f"{name} {list(weight.shape)} is not {pieces} matrices stacked: nothing to adapt"
            )
        owner, _, leaf = name.rpartition(".")
        self.adapted[name] = self.adapter(weight, pieces, self.rank, self.scale, self.seed, shared)
        parametrize.register_parametrization(model.get_submodule(owner), leaf, self.adapted[name])

    def load(self, model, start):
        """Plain weights, named as before prepare, into the model. An adapter would add what it
        learnt to weights that it was not learnt on, so it starts afresh: the model computes exactly
        `start`."""
        wrong = sorted(set(start) ^ set(self.names))
        if wrong:
            raise ValueError(
                f"weights do not fit the model, first at {', '.join(wrong[:5])}"
                f" ({len(wrong)} in all)"
            )
        inside = {_inside(name) if name in self.adapted else name: t for name, t in start.items()}
        model.load_state_dict(model.state_dict() | inside)
        self._reset_adapters(model)

    @torch.no_grad()
    def _reset_adapters(self, model):
        generator = torch.Generator().manual_seed(self.seed) if self.adapted else None
        for name, adapter in self.adapted.items():
            adapter.reset(model.get_parameter(_inside(name)), generator)

    @torch.no_grad()
    def plain(self, model):
        """-> the weights that the model computes with, names as before prepare, detached copies."""
        return {name: attrgetter(name)(model).detach().clone() for name in self.names}

    def optimizer(self, model, lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.2):
        """AdamW over what is trained, and nothing else; a new one for every task. Its state_dict()
        in the middle of a task, with state() and model.state_dict(), is all that continues it
        exactly."""
        fused = all(p.device.type in ("cpu", "cuda") for p in self.trained.values())
        return torch.optim.AdamW(
            self._groups(weight_decay), lr=lr, betas=betas, eps=eps, fused=fused
        )

    def _groups(self, weight_decay):
        """Weights decay; gains, biases, vectors and logit_scale do not, as in CLIP (arXiv
        2103.00020, sec. 2.5). The authors' code decays all: that pulls LayerNorms and DoRA's
        magnitudes to 0, hence the model off its start."""
        matrices = [p for p in self.trained.values() if p.ndim >= 2]
        vectors = [p for p in self.trained.values() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def before_task(self, model, task):
        """The model holds the weights that the task starts from."""

    def penalty(self, model):
        """-> scalar to add to the task's loss, or 0. Clipping sees its gradient, as in the authors'
        code."""
        return 0

    def after_backward(self, model, lr):
        """Gradients are there and clipped, the step of rate lr is not yet done."""

    def after_task(self, model, batches, loss):
        """batches yields (batch, number of samples in it) of this task's own data and is read only
        if needed. loss(model, batch) -> the task's loss, a scalar; or one that needs no gradient,
        if the call has left its gradients, unscaled, in the parameters' grad."""

    def state(self):
        """-> nested dict of tensors, not copies: all that the method has learnt so far, within a
        task too."""
        return {key: getattr(self, key) for key in self.kept}

    def load_state(self, state):
        """What state() gave, after prepare; tensors may come from another device."""
        names = set(self.trained)
        fits = set(state) == set(self.kept)
        if not fits or any(set(tensors) not in (set(), names) for tensors in state.values()):
            kind = type(self).__name__
            raise ValueError(f"this is no state of {kind} on this model: it holds {sorted(state)}")
        for key, tensors in state.items():
            order = self.trained if tensors else ()
            own = {name: tensors[name].to(self.trained[name], copy=True) for name in order}
            setattr(self, key, own)


def _check_option(name, value):
    if name not in OPTIONS:
        raise TypeError(f"methods have no option {name!r}; they have {', '.join(OPTIONS)}")
    kind, least, _ = OPTIONS[name]
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        raise TypeError(f"option {name} must be {kind.__name__}, got {value!r}")
    if not least <= value < math.inf:
        raise ValueError(f"option {name} must be finite and at least {least}, got {value}")


def _fits(name, patterns):
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _inside(name):
    """Where parametrize moves the tensor called name: a.weight ->
    a.parametrizations.weight.original"""
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
    """LayerNorm gains and biases (arXiv 2308.12462)."""

    train = ("*ln_*",)


class BitFit(Method):
    """Every bias (arXiv 2106.10199)."""

    train = ("*bias",)


# ----------------------------------------------------------------------------------------- adapters
# The effective weight W' is computed where the forward pass reads it, by
# torch.nn.utils.parametrize: once per forward, freed with its graph. Autocast is off inside: a
# 16-bit product B @ A would round the update before it is added, and plain() would differ from what
# was trained.

# parametrize keeps W, frozen, as attn.parametrizations.in_proj_weight.original, and the tensors of
# the first and only adapter beside it as attn.parametrizations.in_proj_weight.0.A and so on: these
# train, and nothing else does
ADAPTERS = ("*parametrizations.*.0.*",)
# q, k and v, which are stacked in one matrix, and the mlp's second one
PROJECTIONS = {"*.attn.in_proj_weight": 3, "*.mlp.c_proj.weight": 1}


def _kaiming(parameter, fan_in, a, generator):
    """nn.init.kaiming_uniform_, which reads a wrong fan_in off stacked matrices, drawn on the CPU:
    equal anywhere."""
    bound = math.sqrt(6 / ((1 + a * a) * fan_in))
    drawn = torch.empty(parameter.shape, device="cpu").uniform_(-bound, bound, generator=generator)
    parameter.copy_(drawn)


def _added(weight, scale, B, A):
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
        return _added(weight, self.scale, self.B, self.A)


class DoRAWeight(LoRAWeight):
    """W' = m V / |V| by rows, V = W + s B A (arXiv 2402.09353, eq. 5, norm detached as in its sec.
    4.3); m [out]."""

    def __init__(self, weight, *same):
        super().__init__(weight, *same)
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
    r] and b [out]. A [r, in] and B [out / pieces, r] are random, frozen and one for all layers of a
    shape (`shared` holds those drawn so far); the state dict holds them, so no run depends on
    drawing them again. They are kaiming uniform with a = 0, as the paper and peft draw them. The
    authors' have a = sqrt(r): their W' moves 5 times less per step at rank 4, 65 times at rank
    64."""

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
        return _added(weight, self.scale, b * self.B, d * self.A)


class LoRA(Method):
    """One adapter for the whole stream, on q, k, v and the mlp's output of every block. logit_scale
    is frozen."""

    train = ADAPTERS
    adapter = LoRAWeight
    adapt = PROJECTIONS
    rank = 4
    scale = 1.0
    seed = 0


class DoRA(LoRA):
    adapter = DoRAWeight


class VeRA(LoRA):
    adapter = VeRAWeight


# ------------------------------------------------------------------------------------------- galore


class GaLoreAdamW(torch.optim.Optimizer):
    """AdamW with a matrix's moments in the span of its gradient's top singular vectors (arXiv
    2403.03507, alg. 2).

    As the paper and its code: the moments stay as they are when the projection changes. As torch
    and unlike its code: eps is added after the bias correction and the decay precedes the update,
    so that what is no matrix gets exactly AdamW. A rank above the smaller side of a matrix means
    that side: a change of basis, which loses nothing."""

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
    below rounding of the largest singular value. Signs are arbitrary but outlived by the moments,
    so the largest entry is positive."""
    if not g.isfinite().all():
        raise ValueError("a gradient is not finite and has no singular vectors: lower the rate")
    largest = g.abs().amax().clamp_min(torch.finfo(g.dtype).tiny)
    g = g / largest  # the square of a small gradient would underflow
    gram = g.T @ g if g.shape[0] >= g.shape[1] else g @ g.T
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)  # eigenvalues ascend
    return vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()


class GaLore(Method):
    rank = 16
    scale = 2.0
    gap = 200

    def optimizer(self, model, lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.2):
        groups = self._groups(weight_decay)
        return GaLoreAdamW(groups, lr, betas, eps, weight_decay, self.rank, self.gap, self.scale)


# ------------------------------------------------------------------------------ quadratic penalties


class Quadratic(torch.autograd.Function):
    """weight / 2 sum F (theta - anchor)^2 over lists of tensors, with its gradient, weight F (theta
    - anchor), computed at once: autograd would keep three tensors of the model's size and replay
    them."""

    @staticmethod
    def forward(ctx, weight, importance, anchor, *theta):
        total = 0.0
        ctx.gradient = []
        for F, a, t in zip(importance, anchor, theta):
            change = (t - a).flatten()
            pull = F.flatten() * change
            total = total + torch.dot(pull, change)
            ctx.gradient.append(pull.view_as(t))
        ctx.weight = weight
        return weight / 2 * total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        gradient = ctx.gradient
        ctx.gradient = None  # used up: a second pass through this graph is an error, as elsewhere
        torch._foreach_mul_(gradient, ctx.weight * upstream)
        return None, None, None, *gradient


def quadratic(weight, importance, anchor, trained):
    """weight / 2 sum F (theta - anchor)^2; three dicts from name to tensor, in one order ->
    scalar."""
    constants = list(importance.values()), list(anchor.values())
    return Quadratic.apply(weight, *constants, *trained.values())


class EWC(Method):
    """Online elastic weight consolidation: L + lambda / 2 sum F (theta - theta*)^2 (arXiv
    1612.00796, eq. 3), with one Fisher for all tasks, F <- gamma F + F_task (arXiv 1805.06370).
    F_task is the mean over batches of the squared gradient of the batch's loss, as in the authors'
    code: a contrastive loss has no gradient per sample. It shrinks as batches grow. Our batches are
    full ones of the task's data; the authors' are a mixed batch's part of it, 98 times 175 of
    512."""

    ewc_lambda = 1.0
    ewc_gamma = 1.0
    fisher_samples = 50_000
    kept = ("fisher", "anchor")  # F and theta*
    loss_scale = 2.0**14  # keeps float16 gradients from vanishing, and changes no bit of wider ones

    def penalty(self, model):
        if not self.fisher:
            return 0
        return quadratic(self.ewc_lambda, self.fisher, self.anchor, self.trained)

    def after_task(self, model, batches, loss):
        """Leaves every grad None. Batches whose gradient is not finite, as float16's may be, are
        left out."""
        squares = [torch.zeros_like(p) for p in self.trained.values()]
        samples = 0
        count = 0
        for batch, size in batches:
            if count and samples + size > self.fisher_samples:
                break
            gradients = self._gradients(model, batch, loss)
            if gradients and torch.stack(torch._foreach_norm(gradients)).isfinite().all():
                torch._foreach_addcmul_(squares, gradients, gradients)
                samples += size
                count += 1
            del gradients  # before the next batch's
        if not count:
            raise ValueError("EWC needs batches of the task: none has a finite gradient")
        for (name, p), square in zip(self.trained.items(), squares):
            before = self.fisher.get(name, torch.zeros_like(p))
            self.fisher[name] = self.ewc_gamma * before + square / count
            self.anchor[name] = p.detach().clone()

    def _gradients(self, model, batch, loss):
        """-> the batch's gradients in the order of .trained, whoever ran the backward; [] if nobody
        did."""
        parameters = list(self.trained.values())
        for p in parameters:
            p.grad = None
        value = loss(model, batch)
        scale = self.loss_scale if value.requires_grad else 1.0
        if value.requires_grad:
            (scale * value).backward()
        ran = any(p.grad is not None for p in parameters)
        gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad.div_(scale) for p in parameters
        ]
        for p in parameters:
            p.grad = None
        return gradients if ran else []


class SI(Method):
    """Synaptic intelligence: L + c sum Omega (theta - theta_start)^2 (arXiv 1703.04200, eq. 4).
    Variant lr * g^2, that of the authors' code: omega sums lr g^2, g as the optimizer sees it
    (clipped, with the penalty's). Under SGD this is the original -g * dtheta; under AdamW it is not
    the loss won along the path, but never negative, so the penalty stays convex, and it needs no
    copy of the weights and gradients of the step before."""

    si_c = 0.5
    si_xi = 1.0
    kept = ("omega", "path", "anchor")  # Omega, omega, and the weights at the task's start
    anew = ("path", "anchor")

    def before_task(self, model, task):
        self.anchor = {name: p.detach().clone() for name, p in self.trained.items()}
        self.path = {name: torch.zeros_like(p) for name, p in self.trained.items()}

    def penalty(self, model):
        if not self.omega:
            return 0
        return quadratic(2 * self.si_c, self.omega, self.anchor, self.trained)

    def after_backward(self, model, lr):
        reached = [name for name, p in self.trained.items() if p.grad is not None]
        path = [self.path[name] for name in reached]
        gradients = [self.trained[name].grad for name in reached]
        torch._foreach_addcmul_(path, gradients, gradients, value=lr)

    @torch.no_grad()
    def after_task(self, model, batches, loss):
        for name, p in self.trained.items():
            won = self.path[name] / ((p - self.anchor[name]) ** 2 + self.si_xi)  # eq. 5
            self.omega[name] = self.omega.get(name, torch.zeros_like(p)) + won


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
    """-> rate of step 0..steps-1 of task 0, 1, ..; a pure function. lr is the peak; warmup and
    cooldown (rsqrt only) are shares of a task's steps, floor is the share of lr that a decay ends
    at. Paper sec. 6.1."""
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
    passed = (t * decay + 1) / ((t + 1) * decay) if decay > 1 else t / (t + 1)
    peak = lr if t == 0 or meta == "none" else fall(passed, lr)
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
