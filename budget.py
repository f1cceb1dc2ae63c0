"""Memory-adjusted FLOPs, counted by hand from a CLIP's shape: what a step costs, and how many steps
a budget buys.

Roth et al. 2024, "A Practitioner's Guide to Continual Multimodal Pretraining" (arXiv 2408.14471),
sec. 3.2, app. C. Plain Python: no GPU, no profiler, no torch. `config` is any object with the
fields of clip.CLIPConfig. This file stands alone; copy it:

    import budget, types
    vision = dict(image_size=224, patch_size=16, vision_width=768, vision_layers=12,
                  vision_heads=12, vision_mlp=3072, quick_gelu=False, embed_dim=512)
    text = dict(context_length=77, vocab_size=49408, text_width=512, text_layers=12,
                text_heads=8, text_mlp=2048)
    b16 = types.SimpleNamespace(**vision, **text)  # as clip.CONFIGS["ViT-B-16"]
    budget.step_flops(b16, 512, "lora", rank=4) / 1e9  # 54479.2516 GFLOPs of one optimizer step
    budget.peak_memory(b16, 512, "lora") / 2**30  # 39.00 GiB, under bf16 autocast
    budget.steps(b16, 512, "lora", tasks=20)  # 1825 steps a task, for the paper's budget

    MAF(method) = GFLOPs of one step * peak memory(method) / peak memory(full finetuning)     (1)
    steps a task = round((total / T - MAF spent once a task) / MAF of a step)                 (2)

FLOPs. A multiply-add is 2. Matrix products, convolutions and attention count, nothing elementwise
does. Attention is full, not halved for the causal mask; its backward is 5 products against 2
forward, as flash attention does it, which recomputes q k^T. A backward counts only the gradients
that autograd forms: none towards pixels, none for a frozen weight, none behind the first trained
parameter. The contrastive logits count. GaLore's singular vectors of a p x q matrix, p >= q, count
2pq^2 for the Gram matrix and 9q^3 for its eigenvectors (Golub & Van Loan 2013, sec. 8.3), spread
over its gap. EWC's Fisher pass is spent once a task (task_flops).

Memory. Bytes of live tensors, as torch.cuda.max_memory_allocated counts them; no CUDA context, no
fragmentation. theta_0, merges and experts do not count: they live on the CPU.

Micro-batches. A batch may go through the towers in pieces of `micro_batch` samples (clip.backward):
all features without a graph, the loss and its gradient at the features, then the trained towers
again, a piece at a time. That saves activations and costs a second forward. MAFs and steps are
those of the whole batch: what a method may spend must not depend on the GPU that somebody has."""

import argparse
import math
from dataclasses import dataclass, replace

PRECISIONS = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes of a matmul's numbers; weights are fp32
GAP = 200  # GaLore's steps between two projections
FISHER_SAMPLES = 50_000  # EWC's, a task (app. C)
TASKS = (20, 50, 100, 200)  # lengths of stream that the paper budgets


@dataclass(frozen=True)
class Recipe:
    vision: str = "all"  # what trains in the image tower: "all" "norms" "biases" "adapters" or ""
    text: str = "all"  # the same of the text tower
    logit_scale: bool = True  # logit_scale trains
    rank: int = 0  # the paper's; 0: the method has none
    copies: int = 0  # tensors of the weights' size in the method's state, as Fisher and anchor
    penalty: bool = False  # a quadratic penalty on the weights is part of the loss


# these finetune, and merge between the tasks or not at all
AS_FINETUNE = ("merge", "ema-merge", "ft-merge", "zs-merge", "wise-ft", "offline-merge", "joint")
METHODS = {
    "finetune": Recipe(),
    "locked-text": Recipe(text="", logit_scale=False),
    "locked-image": Recipe(vision=""),
    "lnfit": Recipe("norms", "norms", logit_scale=False),
    "bitfit": Recipe("biases", "biases", logit_scale=False),
    "lora": Recipe("adapters", "adapters", logit_scale=False, rank=4),
    "dora": Recipe("adapters", "adapters", logit_scale=False, rank=4),
    "vera": Recipe("adapters", "adapters", logit_scale=False, rank=4),
    "galore": Recipe(rank=16),
    "ewc": Recipe(copies=2, penalty=True),  # Fisher, anchor
    "si": Recipe(copies=3, penalty=True),  # running omega, Omega, anchor
    **dict.fromkeys(AS_FINETUNE, Recipe()),
}

# Table 4, ViT-B/16, batch 512, 224 px, all 16 rows: (method, rank) -> GFLOPs of a step, peak GiB as
# nvidia-smi saw it, steps a task at T = 20. EWC's memory is about 47.2. Where we differ: DoRA's
# count there forms B @ A twice, VeRA's multiplies by diagonal matrices in full; from locked-image's
# own figures follow 12982.75 steps; EWC's row charges the Fisher pass, 98 batches, to every step.
PAPER = {
    ("finetune", 0): (63394.7585, 46.5917, 1420),
    ("ema-merge", 0): (63394.7585, 46.5917, 1420),
    ("ft-merge", 0): (63394.7585, 46.5917, 1420),
    ("zs-merge", 0): (63394.7585, 46.5917, 1420),
    ("locked-text", 0): (57254.6183, 37.5761, 1949),
    ("locked-image", 0): (27176.6698, 11.8847, 12982),
    ("lnfit", 0): (43165.5968, 30.5566, 3179),
    ("bitfit", 0): (43165.5968, 30.5546, 3179),
    ("lora", 4): (54479.2515, 40.5449, 1898),
    ("lora", 64): (54505.0151, 40.6757, 1891),
    ("dora", 4): (54479.8241, 40.6582, 1893),
    ("dora", 64): (54514.1754, 40.7871, 1886),
    ("vera", 4): (54479.3393, 40.5449, 1898),
    ("vera", 64): (54507.8336, 40.5742, 1896),
    ("si", 0): (63394.7585, 46.6523, 1418),
    ("ewc", 0): (6276081.094, 47.2, 14),
}
PAPER_BATCH = 512
# forward FLOPs of one image and one text -> GFLOPs in all: DataComp-Small's compute (sec. 3.2)
BUDGETS = {
    35_126_906_880 + 5_959_540_736: 1.8e9,  # ViT-B/16
    8_817_623_040 + 5_959_540_736: 5.7e8,  # ViT-B/32
}


# ------------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class Tower:
    tokens: int  # of one sample
    width: int
    layers: int
    heads: int
    mlp: int
    stem: int  # inputs of the patch convolution; 0 for text
    table: int  # rows of the token embedding; 0 for images
    embed_dim: int
    trains: str  # what trains in it, see Recipe

    def linears(self):
        """matmul of a block -> (inputs, outputs)."""
        w = self.width
        m = self.mlp
        return {"in_proj": (w, 3 * w), "out_proj": (w, w), "c_fc": (w, m), "c_proj": (m, w)}

    def adapted(self):
        """The weights of a block that carry an adapter, as (outputs, inputs): q, k and v of the
        fused in_proj, and c_proj."""
        return [(self.width, self.width)] * 3 + [(self.width, self.mlp)]

    def parameters(self):
        """What may train -> how many parameters that are."""
        w = self.width
        image = bool(self.stem)
        # gains of ln_1 and ln_2, of ln_pre and ln_post or ln_final; and as many biases
        gains = (2 * self.layers + 1 + image) * w
        biases = self.layers * (3 * w + w + self.mlp + w)
        block = sum(inputs * outputs for inputs, outputs in self.linears().values())
        weights = self.layers * block + w * (self.embed_dim + self.stem)
        embeddings = (self.tokens + self.table + image) * w  # positions, words or class token
        everything = 2 * gains + biases + weights + embeddings
        return {"all": everything, "norms": 2 * gains, "biases": gains + biases, "": 0}

    def matrices(self):
        """[(rows, columns, how many)] of the tower's two-dimensional parameters, which GaLore
        projects. An image tower's token table has no rows."""
        blocks = [(outputs, inputs, self.layers) for inputs, outputs in self.linears().values()]
        return blocks + [(n, self.width, 1) for n in (self.embed_dim, self.tokens, self.table)]


def setup(config, method="finetune", rank=0):
    """-> (recipe, rank, image tower, text tower); rank 0 stands for the method's own. ValueError on
    an unknown method and on a rank that would not be low."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known are {', '.join(METHODS)}")
    c = config
    recipe = METHODS[method]
    rank = (rank or recipe.rank) if recipe.rank else 0  # a rank means nothing to some methods
    width = min(c.vision_width, c.text_width)
    if not 0 <= rank <= width:
        raise ValueError(f"rank {rank} is not within 1 and {width}, the model's smallest width")
    tokens = (c.image_size // c.patch_size) ** 2 + 1
    vision = (c.vision_width, c.vision_layers, c.vision_heads, c.vision_mlp)
    text = (c.text_width, c.text_layers, c.text_heads, c.text_mlp)
    stem = 3 * c.patch_size**2
    vision_tower = Tower(tokens, *vision, stem, 0, c.embed_dim, recipe.vision)
    text_tower = Tower(c.context_length, *text, 0, c.vocab_size, c.embed_dim, recipe.text)
    return recipe, rank, vision_tower, text_tower


def pieces(batch_size, micro_batch):
    """-> (samples in the largest piece, number of pieces)."""
    piece = batch_size if micro_batch is None else micro_batch
    if min(batch_size, piece) < 1:
        raise ValueError(f"batch size {batch_size}, micro-batch {piece}: neither may be below 1")
    return min(piece, batch_size), math.ceil(batch_size / piece)


# -------------------------------------------------------------------------------------------- FLOPs


def step_flops(config, batch_size, method="finetune", rank=0, gap=GAP, micro_batch=None):
    """FLOPs of one optimizer step on `batch_size` pairs."""
    recipe, rank, *towers = setup(config, method, rank)
    _, count = pieces(batch_size, micro_batch)
    total = sum(tower_flops(tower, batch_size, rank, count) for tower in towers)
    if method == "galore":  # into the rank's space and back, and a share of new singular vectors
        for rows, columns, n in [matrix for tower in towers for matrix in tower.matrices()]:
            p = max(rows, columns)
            q = min(rows, columns)
            total += n * (4 * p * q * min(rank, q) + (2 * p * q * q + 9 * q**3) // gap)
    logits = 2 * batch_size**2 * config.embed_dim
    return total + logits * (1 + bool(recipe.vision) + bool(recipe.text))


def tower_flops(tower, batch_size, rank=0, pieces=1):
    """Of a step: forward, twice in pieces; the gradients of trained weights, and of inputs behind
    which something trains."""
    everything = tower.trains == "all"
    adapters = tower.trains == "adapters"
    anything = bool(tower.trains)
    forward = 2 if anything and pieces > 1 else 1
    tokens = batch_size * tower.tokens
    linears = {matmul: 2 * tokens * i * o for matmul, (i, o) in tower.linears().items()}
    product = 2 * tokens * tower.tokens * tower.width  # q k^T; and as much for its product with v
    block = sum(linears.values()) * (forward + everything + anything)
    block += product * (2 * forward + 5 * anything)
    if adapters:  # the gradients of the adapted weights; B A, once a forward, and its gradients
        block += linears["in_proj"] + linears["c_proj"]
        block += pieces * (forward + 2) * sum(2 * rank * o * i for o, i in tower.adapted())
    total = tower.layers * block - adapters * linears["in_proj"]  # before the first nothing trains
    patches = 2 * batch_size * (tower.tokens - 1) * tower.stem * tower.width
    total += patches * (forward + everything)  # pixels get no gradient
    projection = 2 * batch_size * tower.width * tower.embed_dim
    return total + projection * (forward + everything + anything)


def task_flops(config, batch_size, method="finetune", fisher_samples=FISHER_SAMPLES):
    """FLOPs spent once a task beside its steps: of EWC, a step on each batch for its Fisher. The
    authors charge them to every step, hence their 14 steps a task."""
    if method != "ewc":
        return 0
    return math.ceil(fisher_samples / batch_size) * step_flops(config, batch_size, method)


def forward_flops(config):
    """-> (FLOPs of one image through its tower, of one text through its own), projections
    included."""
    _, _, *towers = setup(config)
    return tuple(tower_flops(replace(tower, trains=""), 1) for tower in towers)


# ------------------------------------------------------------------------------------------- memory


def trained_parameters(config, method="finetune", rank=0):
    """How many parameters the optimizer holds; of finetune, all of the model's."""
    recipe, rank, *towers = setup(config, method, rank)
    return sum(tower_trained(tower, method, rank) for tower in towers) + recipe.logit_scale


def tower_trained(tower, method, rank):
    """How many of them are the tower's."""
    if tower.trains != "adapters":
        return tower.parameters()[tower.trains]
    block = 0
    for rows, columns in tower.adapted():
        if method == "vera":  # d [r] and b [out]
            block += rank + rows
        else:  # A [r, in] and B [out, r]; of DoRA a magnitude a row
            block += rank * (rows + columns) + rows * (method == "dora")
    return tower.layers * block


def saved_bytes(config, tower, batch_size, method, rank, size):
    """Bytes that autograd saves in a tower between forward and backward, beside parameters and
    inputs; `size` is the bytes of what a matmul reads.

    A trained linear layer saves its input, a frozen one none; attention saves q, k, v, its output,
    and a log-sum-exp a row; GELU its input, QuickGELU x and sigmoid(1.702 x); LayerNorm its input,
    mean and deviation. Under autocast the residual stream and with it every LayerNorm stays in
    fp32, and matmuls save 16-bit copies of their weights."""
    if not tower.trains:
        return 0
    everything = tower.trains == "all"
    adapters = tower.trains == "adapters"
    image = bool(tower.stem)
    tokens = batch_size * tower.tokens
    w = tower.width
    m = tower.mlp
    depth = tower.layers
    # ln_1 and ln_2, and of images ln_pre and ln_post, of texts ln_final. With adapters nothing
    # trains before the first in_proj, so ln_pre and the first ln_1 save nothing. ln_post saves all
    # tokens, but statistics of the class token
    norms = 2 * depth + (1 + image if not adapters else 0)
    inputs = depth * tokens * (2 * w * everything + w * adapters + m * (everything or adapters))
    inputs += batch_size * w * everything
    if image and everything and size == 2:  # in fp32 it is the batch itself
        inputs += batch_size * 3 * config.image_size**2
    total = norms * tokens * (4 * w + 8) - 8 * (tokens - batch_size) * image
    total += size * inputs
    total += depth * tokens * (size * 4 * w + 4 * tower.heads)  # attention
    total += size * depth * tokens * m * (2 if config.quick_gelu else 1)
    if method == "dora":  # in fp32: V = W + B A [out, in], its norm [out], and m / norm [out]
        total += depth * sum(4 * rows * columns + 8 * rows for rows, columns in tower.adapted())
    if method == "vera":  # in fp32: diag(b) B [out, r] and diag(d) A [r, in]
        total += depth * sum(4 * rank * (rows + columns) for rows, columns in tower.adapted())
    total += copies_bytes(tower, size)
    # features before normalising, and their norms; of texts, two indices of 8 bytes of their place
    return total + batch_size * (size * config.embed_dim + (8 if image else 24))


def copies_bytes(tower, size):
    """The weights as the backward's matmuls read them, where that is not the parameter itself:
    16-bit copies, and the adapted weights W' in any precision. The first adapted in_proj is not
    read: its input needs no gradient."""
    total = 0
    for matmul, (inputs, outputs) in tower.linears().items():
        adapted = tower.trains == "adapters" and matmul in ("in_proj", "c_proj")
        if adapted or size == 2:
            blocks = tower.layers - (adapted and matmul == "in_proj")
            total += size * inputs * outputs * blocks
    if size == 2:  # of the projection, and of the patch convolution
        total += size * tower.width * (tower.embed_dim + tower.stem * (tower.trains == "all"))
    return total


def permanent_bytes(config, method, rank):
    """What outlives a step, in fp32: weights, adapters, a method's copies, and AdamW's two moments.
    GaLore's moments of a matrix live in its rank's space, beside the projection onto it."""
    recipe, rank, vision, text = setup(config, method, rank)
    trained = trained_parameters(config, method, rank)
    total = 4 * trained_parameters(config) + (8 + 4 * recipe.copies) * trained
    if recipe.vision == "adapters":  # and VeRA's random A and B, one pair for all of a shape
        shapes = {*vision.adapted(), *text.adapted()} if method == "vera" else ()
        total += 4 * (trained + sum(rank * (rows + columns) for rows, columns in shapes))
    if method == "galore":
        for rows, columns, n in vision.matrices() + text.matrices():
            low = min(rank, rows, columns) * (2 * max(rows, columns) + min(rows, columns))
            total += n * (4 * low - 8 * rows * columns)
    return total


def peak_memory(config, batch_size, method="finetune", precision="bf16", rank=0, micro_batch=None):
    """Bytes on the device at the peak of one optimizer step of AdamW; what
    torch.cuda.max_memory_allocated reports.

    The peak is one of five moments: the loss and its gradient at the features; the start of the
    image tower's backward, with everything that the forward saved; the start of the text tower's,
    with the image tower's gradients in place of what that saved; its end, at the token table; the
    update, with all gradients, and at most a second set if a penalty adds its own. In pieces a
    tower's backward meets the gradients of the pieces before, and nothing that the other tower
    saved. The 16-bit copies of both towers' weights stay until the update. AdamW is fused: no
    temporaries."""
    recipe, rank, vision, text = setup(config, method, rank)
    piece, count = pieces(batch_size, micro_batch)
    size = PRECISIONS[precision]
    trained = trained_parameters(config, method, rank)
    permanent = permanent_bytes(config, method, rank)
    permanent += piece * (12 * config.image_size**2 + 8 * config.context_length)  # the inputs
    images = saved_bytes(config, vision, piece, method, rank, size)
    texts = saved_bytes(config, text, piece, method, rank, size)
    image_copies = copies_bytes(vision, size) * (vision.trains == "all")
    text_copies = copies_bytes(text, size) * (text.trains == "all")
    # a tower's features where the other one trains, logits, both softmaxes, the targets; and what
    # the loss's backward needs at once beside them
    towers = bool(recipe.vision) + bool(recipe.text)
    numbers = towers * config.embed_dim + (2 + recipe.logit_scale) * batch_size
    loss = batch_size * (4 * numbers + 8) + 12 + 8 * batch_size**2
    features = 4 * batch_size * config.embed_dim * (2 + towers)
    gradients = 4 * trained
    image_gradients = 4 * tower_trained(vision, method, rank)
    table = 4 * text.table * text.width  # the largest tensor
    if count == 1:
        at_loss = images + texts
        at_images = images + texts
        at_texts = texts + image_gradients
        at_end = gradients
    else:
        at_loss = image_copies + text_copies
        at_images = images + image_gradients + text_copies
        at_texts = texts + gradients
        at_end = gradients + table * (text.trains == "all")  # a piece's, to add to the sum so far
    return permanent + max(
        at_loss + loss,
        at_images + features + backward_bytes(vision, piece, size),
        at_texts + features + backward_bytes(text, piece, size) + image_copies,
        at_end + features + image_copies + text_copies,
        gradients * (1 + recipe.penalty) + table * recipe.penalty,
    )


def backward_bytes(tower, batch_size, size):
    """What the backward needs in the tower's last block. Where c_proj trains, its input has been
    freed for one of the two gradients around GELU by the time that both are there; the other one
    meets, under autocast, the 16-bit gradient of c_proj's output."""
    frozen = tower.trains in ("norms", "biases")
    entries = 2 * tower.mlp if frozen else tower.mlp + (size == 2) * tower.width
    return bool(tower.trains) * size * batch_size * tower.tokens * entries


# ------------------------------------------------------------------------------------------ budgets


def memory_multiplier(config, batch_size, method="finetune", rank=0, precision="bf16"):
    """Peak memory of the method over that of full finetuning."""
    full = peak_memory(config, batch_size, "finetune", precision)
    return peak_memory(config, batch_size, method, precision, rank) / full


def mafs(config, batch_size, method="finetune", rank=0, precision="bf16", memory_ratio=None,
         gap=GAP):  # fmt: skip
    """GFLOPs of a step times the method's memory relative to full finetuning's (1); `memory_ratio`
    takes a measured or published ratio in place of ours."""
    ratio = memory_ratio
    if ratio is None:
        ratio = memory_multiplier(config, batch_size, method, rank, precision)
    return step_flops(config, batch_size, method, rank, gap) / 1e9 * ratio


def steps_per_task(total_gflops, tasks, maf_gflops, task_maf_gflops=0.0):
    """(2): optimizer steps that each of `tasks` tasks may take; `task_maf_gflops` is spent once a
    task beside them, as EWC's Fisher pass. ValueError where the budget does not reach one step."""
    steps = round((total_gflops / tasks - task_maf_gflops) / maf_gflops)
    if steps < 1:
        raise ValueError(
            f"a budget of {total_gflops:g} GFLOPs does not reach one step in each of {tasks} tasks,"
            f" {task_maf_gflops + maf_gflops:g} each: raise the budget or take fewer tasks"
        )
    return steps


def default_budget(config):
    """GFLOPs of a whole run: the paper's for B/16 and B/32; for any other model B/16's, in
    proportion to the forward FLOPs of a pair, so that full finetuning sees as many samples."""
    pair = sum(forward_flops(config))
    reference = next(iter(BUDGETS))
    return BUDGETS.get(pair, BUDGETS[reference] * pair / reference)


def steps(config, batch_size, method, tasks, total_gflops=None, rank=0, precision="bf16",
          memory_ratio=None):  # fmt: skip
    """Steps a task of `method` within a budget, the config's default if not given."""
    maf = mafs(config, batch_size, method, rank, precision, memory_ratio)
    fisher = maf * task_flops(config, batch_size, method) / step_flops(config, batch_size, method)
    total = default_budget(config) if total_gflops is None else total_gflops
    return steps_per_task(total, tasks, maf, fisher)


def plan(config, options, tasks, samples):
    """What a run does: steps of each of its `tasks` tasks, and {"gflops": of the budget or None,
    "gflops_spent", "maf_gflops_per_step"}. options: any object with method, batch_size, steps,
    tasks, budget, perhaps rank, gap, fisher_samples; None is the paper's. samples: of all tasks."""
    o = options
    method = "finetune" if o.method == "zero-shot" else o.method
    maf = mafs(config, o.batch_size, method, getattr(o, "rank", 0) or 0,
               gap=getattr(o, "gap", None) or GAP)
    fisher = 0
    if method == "ewc":  # full batches, at least one
        most = getattr(o, "fisher_samples", None) or FISHER_SAMPLES
        most = min(samples // max(1, tasks), most)
        fisher = maf * max(1, most // o.batch_size)
    total = None
    if o.steps is None:
        total = default_budget(config) if o.budget is None else o.budget
        each = steps_per_task(total, max(1, tasks), maf, fisher)
    else:
        each = o.steps * (o.tasks if method == "joint" else 1)
    spent = tasks * (each * maf + fisher)
    return each, {"gflops": total, "gflops_spent": spent, "maf_gflops_per_step": maf}


# --------------------------------------------------------------------------------------- for people


def table(config, batch_size, rank=0, precision="bf16", total_gflops=None, tasks=TASKS):
    """Rows, as dicts: one a method, and below it the paper's where it measured the same. method;
    gflops of a step; memory_gib; multiplier, that memory over full finetuning's; mafs; steps, of
    each task by the number of tasks, None where the budget does not reach one."""
    total = default_budget(config) if total_gflops is None else total_gflops
    if not 0 < total < math.inf or min(tasks) < 1:
        raise ValueError(f"a budget of {total} GFLOPs for {tasks} tasks: neither may be 0 or less")
    published = sum(forward_flops(config)) == next(iter(BUDGETS)) and batch_size == PAPER_BATCH
    setups = [(method, setup(config, method, rank)[1]) for method in METHODS]
    setups += [key for key in PAPER if published and key not in setups]
    full = peak_memory(config, batch_size, "finetune", precision) / 2**30
    rows = []
    for method, r in setups:
        name = method if r == METHODS[method].rank else f"{method} r{r}"
        gflops = step_flops(config, batch_size, method, r) / 1e9
        gib = peak_memory(config, batch_size, method, precision, r) / 2**30
        counts = {}
        for t in tasks:
            try:
                counts[t] = steps(config, batch_size, method, t, total, r, precision)
            except ValueError:  # the budget does not reach one
                counts[t] = None
        rows.append((name, gflops, gib, gib / full, counts))
        if published and (method, r) in PAPER:
            gflops, gib, at_20 = PAPER[method, r]
            rows.append(("(paper)", gflops, gib, gib / PAPER["finetune", 0][1], {20: at_20}))
    return [
        {"method": name, "gflops": gflops, "memory_gib": gib, "multiplier": ratio,
         "mafs": gflops * ratio, "steps": counts}
        for name, gflops, gib, ratio, counts in rows
    ]  # fmt: skip


def main(argv, models, paper, own):
    """The command. models: {name: config}; paper: defaults of "batch_size", "budget", "tasks"; own:
    {name: defaults} of the models that have others."""
    p = argparse.ArgumentParser("fomo.py budget", description="What a step of each method costs and"
                                " how many steps a budget buys, beside the paper's Table 4.")
    p.add_argument("--model", default="ViT-B-16", choices=models, help="(default ViT-B-16)")
    p.add_argument("--batch-size", type=int, help="pairs a step (default as in a run)")
    p.add_argument("--precision", default="bf16", choices=PRECISIONS, help="(default bf16)")
    p.add_argument("--rank", type=int, default=0, help="of adapters and galore (default theirs)")
    p.add_argument("--budget", type=float, help="memory-adjusted GFLOPs (default as in a run)")
    p.add_argument("--tasks", type=int, nargs="+", help="lengths of stream (default the paper's)")
    args = p.parse_args(argv)
    config = models[args.model]
    defaults = own.get(args.model, paper)
    size = defaults["batch_size"] if args.batch_size is None else args.batch_size
    total = defaults["budget"] or default_budget(config) if args.budget is None else args.budget
    lengths = args.tasks or ([defaults["tasks"]] if args.model in own else TASKS)
    rows = table(config, size, args.rank, args.precision, total, lengths)
    print(f"{args.model}, batch {size}, {args.precision}, {total:g} GFLOPs in all, memory-adjusted")
    heads = "".join(f"{f'T={t}':>8}" for t in lengths)
    print(f"{'':13}{'GFLOPs/step':>13}{'GiB':>8}{'memory':>8}{'MAFs/step':>12}{heads}")
    for r in rows:
        counts = "".join(f"{r['steps'].get(t) or '-':>8}" for t in lengths)
        memory = f"{r['memory_gib']:8.4g}{r['multiplier']:8.3f}"
        print(f"{r['method']:13}{r['gflops']:13.4f}{memory}{r['mafs']:12.1f}{counts}")
    print("T: steps a task (ewc's beside a Fisher of 50,000 samples); memory: over finetune's\n")
    sizes = [m for m in (16, 32, 64, 128, 256, 512) if m < size] + [size]
    print("GiB, --micro-batch   " + "".join(f"{m:>8}" for m in sizes))
    for method in [m for m in METHODS if m not in AS_FINETUNE]:
        peaks = [peak_memory(config, size, method, args.precision, args.rank, m) for m in sizes]
        print(f"{method:21}" + "".join(f"{peak / 2**30:8.3g}" for peak in peaks))
    ratio = step_flops(config, size, micro_batch=1) / step_flops(config, size)
    print(f"finetune in micro-batches takes {ratio:.2f} times the FLOPs; budgets leave that out")
