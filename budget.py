"""Memory-adjusted FLOPs, counted by hand from a CLIP's shape: what a step costs, and how many steps
a budget buys.

Roth et al. 2024, "A Practitioner's Guide to Continual Multimodal Pretraining" (arXiv 2408.14471),
sec. 3.2, app. C. Plain Python: no GPU, no profiler, no torch. `config` is any object with the
fields of FIELDS. It stands alone; copy it:

    import budget, types
    values = (512, 224, 16, 768, 12, 12, 3072, 77, 49408, 512, 12, 8, 2048, False)
    b16 = types.SimpleNamespace(**dict(zip(budget.FIELDS, values)))  # or clip.CONFIGS["ViT-B-16"]
    budget.step_flops(b16, 512, "lora", rank=4) / 1e9  # 54479.2515..., GFLOPs of one optimizer step
    budget.peak_memory(b16, 512, "lora") / 2**30  # GiB, bf16 autocast and AdamW
    budget.steps(b16, 512, "lora", tasks=20)  # steps a task that equal the paper's budget

    MAF(method) = GFLOPs of one step * peak memory(method) / peak memory(full finetuning)     (1)
    steps a task = round((total / T - MAF spent once a task) / MAF of a step)                 (2)

FLOPs. A multiply-add is 2. Matrix products, convolutions and attention count, nothing elementwise
does. Attention is full, not halved for the causal mask; its backward is 5 products against 2
forward, as flash attention does it, which recomputes q k^T. A backward counts only the gradients
that autograd forms: none towards pixels, none for a frozen weight, none behind the first trained
parameter. The contrastive logits count. GaLore's singular vectors of a p x q matrix, p >= q, count
2pq^2 for the Gram matrix and 9q^3 for its eigenvectors (Golub & Van Loan 2013, sec. 8.3), spread
over its gap.

EWC's Fisher pass, a forward and backward of every sampled batch, is spent once a task (task_flops).
The authors charge it to every step, hence their 14 steps; (2) takes it off the task's budget first
and leaves 1268 (at our memory, bf16).

Memory. Bytes of live tensors, as torch.cuda.max_memory_allocated counts them; no CUDA context, no
fragmentation. theta_0, merges and experts do not count: they live on the CPU.

Micro-batches. A batch may go through the towers in pieces (clip.backward): all features without a
graph, the loss and its gradient at the features, then the trained towers again, a piece at a time.
`micro_batch` is the size of a piece. It saves activations and costs a second forward, in step_flops
and peak_memory. Neither MAFs nor steps know it: what a method may spend is a property of the
method, and must not depend on the GPU that somebody has for it."""

import argparse
import json
import math
from dataclasses import dataclass

FIELDS = (
    "embed_dim", "image_size", "patch_size", "vision_width", "vision_layers", "vision_heads",
    "vision_mlp", "context_length", "vocab_size", "text_width", "text_layers", "text_heads",
    "text_mlp", "quick_gelu",
)  # fmt: skip
# bytes of what a matmul reads and writes; weights are always fp32
PRECISIONS = {"fp32": 4, "bf16": 2, "fp16": 2}
GAP = 200  # GaLore's steps between two projections
FISHER_SAMPLES = 50_000  # EWC's, a task (app. C)
TASKS = (20, 50, 100, 200)  # lengths of stream that the paper budgets
LOSS_TRANSIENT = 8  # bytes a logit that its backward needs at once beside what the forward kept


@dataclass(frozen=True)
class Recipe:
    vision: str = "all"  # what trains in the image tower: "all" "norms" "biases" "adapters" or ""
    text: str = "all"  # the same of the text tower
    scale: bool = True  # logit_scale trains
    rank: int = 0  # the paper's; 0: the method has none
    copies: int = 0  # tensors of the weights' size kept from task to task, as Fisher and anchor
    penalty: bool = False  # a quadratic penalty on the weights is part of the loss


METHODS = {
    "finetune": Recipe(),
    "locked-text": Recipe(text="", scale=False),
    "locked-image": Recipe(vision=""),
    "lnfit": Recipe("norms", "norms", scale=False),
    "bitfit": Recipe("biases", "biases", scale=False),
    "lora": Recipe("adapters", "adapters", scale=False, rank=4),
    "dora": Recipe("adapters", "adapters", scale=False, rank=4),
    "vera": Recipe("adapters", "adapters", scale=False, rank=4),
    "galore": Recipe(rank=16),
    "ewc": Recipe(copies=2, penalty=True),  # Fisher, anchor
    "si": Recipe(copies=3, penalty=True),  # running omega, Omega, anchor
    "merge": Recipe(),  # every run of fomo.py that finetunes between its merges
    "ema-merge": Recipe(),
    "ft-merge": Recipe(),
    "zs-merge": Recipe(),
    "offline-merge": Recipe(),
    "joint": Recipe(),
}

# Table 4, ViT-B/16, batch 512, 224 px, all 16 rows: (method, rank) -> GFLOPs of a step, peak GiB as
# nvidia-smi saw it, steps a task at T = 20. EWC's memory is about 47.2.
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
# Why our GFLOPs or steps are not theirs, where they are not. (LoRA's .2515 is our .2516: they
# average three counts that were rounded to four digits, 54479.251599999996 as floats, and cut.)
WHY = {
    "dora": "theirs forms B @ A twice",
    "vera": "theirs multiplies by diagonal matrices in full",
    "locked-image": "from theirs follow 12982.75 steps",
    "ewc": "theirs charges the Fisher pass, 98 batches, to every step; ours once to the task",
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
    name: str
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
        """The weights that carry an adapter, as (outputs, inputs): q, k and v of the fused in_proj,
        and c_proj."""
        return [(self.width, self.width)] * 3 + [(self.width, self.mlp)]

    def parameters(self):
        """kind -> number of parameters. The kinds are what methods tell apart."""
        w = self.width
        deep = self.layers
        image = bool(self.stem)
        block = sum(inputs * outputs for inputs, outputs in self.linears().values())
        norms = 2 * deep + 1 + image  # ln_1, ln_2; ln_pre and ln_post, or ln_final
        return {
            "norm weights": norms * w,
            "norm biases": norms * w,
            "linear biases": deep * (3 * w + w + self.mlp + w),
            "linear weights": deep * block + w * self.embed_dim,
            "patch weights": self.stem * w,
            # positions, words or class token
            "embeddings": (self.tokens + self.table + image) * w,
        }

    def matrices(self):
        """[(rows, columns, how many)]: the tower's two-dimensional parameters, which GaLore
        projects."""
        found = [(o, i, self.layers) for i, o in self.linears().values()]
        found += [(self.width, self.embed_dim, 1), (self.tokens, self.width, 1)]
        return found + ([(self.table, self.width, 1)] if self.table else [])


def towers(config, recipe=METHODS["finetune"]):
    """-> (image tower, text tower). ValueError if the config does not describe a transformer."""
    c = config
    for name in FIELDS[:-1]:
        _check_count(f"the config's {name}", getattr(c, name, None))
    if c.image_size < c.patch_size:
        raise ValueError(f"a patch of {c.patch_size} pixels and an image of {c.image_size}")
    tokens = (c.image_size // c.patch_size) ** 2 + 1
    vision = (c.vision_width, c.vision_layers, c.vision_heads, c.vision_mlp)
    text = (c.text_width, c.text_layers, c.text_heads, c.text_mlp)
    stem = 3 * c.patch_size**2
    return (
        Tower("vision", tokens, *vision, stem, 0, c.embed_dim, recipe.vision),
        Tower("text", c.context_length, *text, 0, c.vocab_size, c.embed_dim, recipe.text),
    )


def _check_count(what, n):
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"{what} must be a positive integer, not {n!r}")


def check(config, batch_size, method, rank=0):
    """-> (recipe, rank, image tower, text tower); rank 0 is the method's own. ValueError on what
    makes no sense."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known are {', '.join(METHODS)}")
    _check_count("the batch size", batch_size)
    if rank != 0:
        _check_count("the rank", rank)
    recipe = METHODS[method]
    vision, text = towers(config, recipe)
    width = min(vision.width, text.width)
    rank = (rank or recipe.rank) if recipe.rank else 0  # a rank means nothing to some methods
    if rank > width:
        limit = f"the model's smallest width, {width}"
        raise ValueError(f"rank {rank} is above {limit}: {method} would not be low-rank")
    return recipe, rank, vision, text


def pieces(batch_size, micro_batch):
    """-> (samples in the largest piece, number of pieces)."""
    if micro_batch is None:
        return batch_size, 1
    _check_count("a micro-batch", micro_batch)
    return min(micro_batch, batch_size), math.ceil(batch_size / micro_batch)


# -------------------------------------------------------------------------------------------- FLOPs


def flops(config, batch_size, method="finetune", rank=0, gap=GAP, micro_batch=None):
    """Where the FLOPs of one optimizer step go: a list of rows, a row a kind of matmul, as dicts of
    tower, blocks ("0" or "1-11" or ""), matmul, times, how many such there are, and of one of them
    forward; again, the second forward of micro-batches; to_weight, the gradient of the weight;
    to_input, the gradient of the input; update, projections and SVD. total is of all. Block 0
    stands apart: with adapters nothing trains before its in_proj, whose input then needs no
    gradient."""
    recipe, rank, vision, text = check(config, batch_size, method, rank)
    _check_count("the gap between two SVDs", gap)
    _, count = pieces(batch_size, micro_batch)
    rows = []
    for tower in (vision, text):
        rows += tower_flops(tower, batch_size, rank, count)
        if method == "galore":
            update = sum(n * galore_update(r, c, rank, gap) for r, c, n in tower.matrices())
            rows.append(row(tower.name, "", "galore", 1, 0, update=update))
    product = 2 * batch_size**2 * config.embed_dim
    needed = product * trained_towers(recipe)
    rows.append(row("loss", "", "logits", 1, product, to_input=needed))
    return [r for r in rows if r["times"]]


def trained_towers(recipe):
    return bool(recipe.vision) + bool(recipe.text)


def row(tower, blocks, matmul, times, forward, to_weight=0, to_input=0, update=0, again=0):
    return {
        "tower": tower, "blocks": blocks, "matmul": matmul, "times": times,
        "forward": forward, "again": again, "to_weight": to_weight, "to_input": to_input,
        "update": update, "total": times * (forward + again + to_weight + to_input + update),
    }  # fmt: skip


def tower_flops(tower, batch_size, rank, count):
    """The tower's rows; `count`: pieces that its batch goes through it in."""
    everything = tower.trains == "all"
    adapters = tower.trains == "adapters"
    anything = bool(tower.trains)
    second = anything and count > 1  # a frozen tower goes over its pieces once
    tokens = batch_size * tower.tokens
    rows = []

    def add(blocks, matmul, times, cost, to_weight=0, to_input=0):
        rows.append(
            row(tower.name, blocks, matmul, times, cost, to_weight, to_input, again=second * cost)
        )

    if tower.stem:
        cost = 2 * batch_size * (tower.tokens - 1) * tower.stem * tower.width
        add("", "conv1", 1, cost, everything * cost)  # pixels get no gradient
    others = tower.layers - 1
    for blocks, times in (("0", 1), (f"1-{others}" if others > 1 else "1", others)):
        for matmul, (inputs, outputs) in tower.linears().items():
            cost = 2 * tokens * inputs * outputs
            adapted = adapters and matmul in ("in_proj", "c_proj")
            behind = anything and not (adapters and matmul == "in_proj" and blocks == "0")
            add(blocks, matmul, times, cost, (everything or adapted) * cost, behind * cost)
        # q k^T; and as much for its product with v
        product = 2 * tokens * tower.tokens * tower.width
        add(blocks, "attention", times, 2 * product, 0, anything * 5 * product)
        if adapters:  # B A, formed once a forward, so once a piece; gradients of B and of A
            cost = count * sum(2 * rank * i * o for o, i in tower.adapted())
            add(blocks, "adapter B A", times, cost, 2 * cost)
    cost = 2 * batch_size * tower.width * tower.embed_dim
    add("", "projection", 1, cost, everything * cost, anything * cost)
    return rows


def galore_update(rows, columns, rank, gap):
    """FLOPs a step spends on one gradient: into the rank's space and back, and its share of new
    singular vectors."""
    p = max(rows, columns)
    q = min(rows, columns)
    return 4 * p * q * min(rank, q) + (2 * p * q * q + 9 * q**3) // gap


def step_flops(config, batch_size, method="finetune", rank=0, gap=GAP, micro_batch=None):
    """FLOPs of one optimizer step on `batch_size` pairs. ValueError on an unknown method, a batch
    or a rank that makes no sense."""
    return sum(r["total"] for r in flops(config, batch_size, method, rank, gap, micro_batch))


def task_flops(config, batch_size, method="finetune", fisher_samples=FISHER_SAMPLES):
    """FLOPs spent once a task beside its steps: EWC's Fisher pass, a forward and backward of each
    sampled batch."""
    check(config, batch_size, method)
    if fisher_samples < 0:
        raise ValueError(f"the Fisher pass cannot see {fisher_samples} samples")
    if method != "ewc":
        return 0
    return math.ceil(fisher_samples / batch_size) * step_flops(config, batch_size, method)


def forward_flops(config):
    """-> (FLOPs of one image through its tower, of one text through its own), projections
    included."""
    total = {"vision": 0, "text": 0, "loss": 0}
    for r in flops(config, 1):
        total[r["tower"]] += r["times"] * r["forward"]
    return total["vision"], total["text"]


# ------------------------------------------------------------------------------------------- memory


def parameters(config):
    """How many parameters the model has; the one over is logit_scale."""
    return sum(sum(tower.parameters().values()) for tower in towers(config)) + 1


def trained_parameters(config, method="finetune", rank=0):
    """How many parameters the optimizer holds."""
    recipe, rank, vision, text = check(config, 1, method, rank)
    return sum(tower_trained(tower, method, rank) for tower in (vision, text)) + recipe.scale


def tower_trained(tower, method, rank):
    """How many of them are the tower's."""
    if tower.trains == "adapters":
        # A [r, in] and B [out, r]; DoRA has a magnitude a row; VeRA trains d [r] and b [out] alone
        block = 0
        for rows, columns in tower.adapted():
            if method == "vera":
                block += rank + rows
            else:
                block += rank * (rows + columns) + rows * (method == "dora")
        return tower.layers * block
    counts = tower.parameters()
    kinds = {
        "": (),
        "all": counts,
        "norms": ("norm weights", "norm biases"),
        "biases": ("norm biases", "linear biases"),
    }[tower.trains]
    return sum(counts[kind] for kind in kinds)


def frozen_factors(config, method, rank):
    """Floats of VeRA's random A and B, one pair for all layers of a shape."""
    _, rank, vision, text = check(config, 1, method, rank)
    shapes = {*vision.adapted(), *text.adapted()} if method == "vera" else ()
    return sum(rank * (rows + columns) for rows, columns in shapes)


def kept(config, batch_size, method="finetune", precision="bf16", rank=0, micro_batch=None):
    """What autograd keeps between forward and backward beside parameters and inputs, as kind ->
    bytes; the towers' for one micro-batch, the loss's for all of the batch.

    A trained linear layer keeps its input, a frozen one none; attention keeps q, k, v, its output,
    and a log-sum-exp a row; GELU its input, QuickGELU x and sigmoid(1.702 x); LayerNorm its input,
    mean and deviation. Under autocast the residual stream and with it every LayerNorm stays in
    fp32, and matmuls keep 16-bit copies of their weights. The loss is in fp32."""
    recipe, rank, vision, text = check(config, batch_size, method, rank)
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; known are {', '.join(PRECISIONS)}")
    size = PRECISIONS[precision]
    piece, _ = pieces(batch_size, micro_batch)
    of_images = tower_kept(config, vision, piece, method, rank, size)
    of_texts = tower_kept(config, text, piece, method, rank, size)
    total = {kind: of_images[kind] + of_texts[kind] for kind in of_images}
    return total | {"loss": loss_bytes(recipe, batch_size, config.embed_dim)}


def tower_kept(config, tower, batch_size, method, rank, size):
    """The tower's share of it; `size` is the bytes of what a matmul reads."""
    everything = tower.trains == "all"
    adapters = tower.trains == "adapters"
    image = bool(tower.stem)
    t = batch_size * tower.tokens
    w = tower.width
    m = tower.mlp
    deep = tower.layers
    # ln_1 and ln_2, and of images ln_pre and ln_post, of texts ln_final. With adapters nothing
    # trains before the first in_proj, so ln_pre and the first ln_1 keep nothing. ln_post keeps all
    # tokens, but statistics of the class token
    norms = 2 * deep + (1 + image if not adapters else 0)
    linear = deep * t * (2 * w * everything + w * adapters + m * (everything or adapters))
    linear += batch_size * w * everything
    if image and everything and size == 2:  # in fp32 it is the input itself
        linear += batch_size * 3 * config.image_size**2
    # before normalising, and their norms; of texts, two indices of 8 bytes of where they are read
    features = batch_size * (size * config.embed_dim + (8 if image else 24))
    total = {
        "LayerNorm inputs": norms * t * (4 * w + 8) - 8 * (t - batch_size) * image,
        "linear inputs": size * linear,
        "attention": deep * t * (size * 4 * w + 4 * tower.heads),
        "GELU inputs": size * deep * t * m * (2 if config.quick_gelu else 1),
        "adapters": adapters * deep * adapter_bytes(tower, method, rank),
        "weight copies": copies_bytes(tower, size),
        "features": features,
    }
    return total if tower.trains else dict.fromkeys(total, 0)


def adapter_bytes(tower, method, rank):
    """What the adapters of one block keep beside their parameters; they compute in fp32, under
    autocast too."""
    if method == "dora":  # V = W + B A [out, in], its norm [out], and m / norm [out]
        return sum(4 * rows * columns + 8 * rows for rows, columns in tower.adapted())
    if method == "vera":  # diag(b) B [out, r] and diag(d) A [r, in]
        return sum(4 * rank * (rows + columns) for rows, columns in tower.adapted())
    return 0


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


def loss_bytes(recipe, batch_size, embed_dim):
    """A tower's features where the other one trains, the logits before their scale, both softmaxes,
    the targets."""
    per_sample = trained_towers(recipe) * embed_dim + (2 + recipe.scale) * batch_size  # numbers
    return batch_size * (4 * per_sample + 8) + 12


def moment_bytes(config, method, rank):
    """AdamW's two moments in fp32; GaLore's of a matrix live in its rank's space, beside the
    projection onto it."""
    trained = trained_parameters(config, method, rank)
    _, rank, vision, text = check(config, 1, method, rank)
    if method != "galore":
        return 8 * trained
    matrices = vision.matrices() + text.matrices()
    full = sum(r * c * n for r, c, n in matrices)
    low = sum(n * min(rank, r, c) * (2 * max(r, c) + min(r, c)) for r, c, n in matrices)
    return 8 * (trained - full) + 4 * low


def memory(config, batch_size, method="finetune", precision="bf16", rank=0, micro_batch=None):
    """Bytes on the device at the peak of one optimizer step, as part -> bytes.

    The peak is one of five moments: the loss and its gradient at the features; the start of the
    image tower's backward, with everything that the forward kept; the start of the text tower's,
    with the image tower's gradients in place of what that kept; its end, at the token table; the
    update, with all gradients, and a second set if a penalty adds its own. With micro-batches a
    tower's backward meets the gradients of the pieces before, and nothing that the other tower
    kept. The 16-bit copies of both towers' weights stay until the update. AdamW is fused: no
    temporaries."""
    recipe, rank, vision, text = check(config, batch_size, method, rank)
    everything = kept(config, batch_size, method, precision, rank, micro_batch)
    size = PRECISIONS[precision]
    piece, count = pieces(batch_size, micro_batch)
    total = parameters(config)
    trained = trained_parameters(config, method, rank)
    adapters = trained + frozen_factors(config, method, rank) if recipe.vision == "adapters" else 0
    always = {
        "weights": 4 * (total + adapters),
        "moments": moment_bytes(config, method, rank),
        "method state": 4 * trained * recipe.copies,
        "inputs": piece * (12 * config.image_size**2 + 8 * config.context_length),
    }
    of_images = tower_kept(config, vision, piece, method, rank, size)
    of_texts = tower_kept(config, text, piece, method, rank, size)
    features = 4 * batch_size * config.embed_dim * (2 + trained_towers(recipe))
    image_gradients = 4 * tower_trained(vision, method, rank)
    gradients = 4 * trained
    table = 4 * text.table * text.width  # the largest tensor
    anchor = table * recipe.penalty  # theta - anchor
    whole = count == 1
    again = 0 if whole else table * (text.trains == "all")  # a piece's gradient is added to .grad
    image_copies, text_copies = (
        copies_bytes(tower, size) * (tower.trains == "all") for tower in (vision, text)
    )
    moments = (  # kept by the towers, bytes of the loss, of gradients, and needed for this alone
        (everything if whole else {}, everything["loss"], 0,
         LOSS_TRANSIENT * batch_size**2 + (0 if whole else image_copies + text_copies)),
        (everything if whole else of_images, features, 0 if whole else image_gradients,
         transient(vision, piece, size) + (0 if whole else text_copies)),
        (of_texts, features, image_gradients if whole else gradients,
         transient(text, piece, size) + image_copies),
        ({}, features, gradients, image_copies + text_copies + again),
        ({}, 0, gradients * (1 + recipe.penalty), anchor),
    )  # fmt: skip
    nothing = dict.fromkeys(everything, 0)
    peaks = [
        nothing | graph | {"loss": loss, "gradients": held, "transient": brief}
        for graph, loss, held, brief in moments
    ]
    return always | max(peaks, key=lambda parts: sum(parts.values()))


def transient(tower, batch_size, size):
    """What the backward needs in the tower's last block. Where c_proj trains, its input has been
    freed for one of the two gradients around GELU by the time that both are there; the other one
    meets, under autocast, the 16-bit gradient of c_proj's output."""
    frozen = tower.trains in ("norms", "biases")
    entries = 2 * tower.mlp if frozen else tower.mlp + (size == 2) * tower.width
    return bool(tower.trains) * size * batch_size * tower.tokens * entries


def peak_memory(config, batch_size, method="finetune", precision="bf16", rank=0, micro_batch=None):
    """Bytes on the device at the peak of one optimizer step of AdamW; what
    torch.cuda.max_memory_allocated reports."""
    return sum(memory(config, batch_size, method, precision, rank, micro_batch).values())


# ------------------------------------------------------------------------------------------ budgets


def mafs(
    config, batch_size, method="finetune", rank=0, precision="bf16", memory_ratio=None, gap=GAP
):
    """GFLOPs of a step times the method's memory relative to full finetuning's (1); `memory_ratio`
    takes a measured or published ratio in place of ours."""
    ratio = memory_ratio
    if ratio is None:
        ratio = memory_multiplier(config, batch_size, method, rank, precision)
    if not ratio > 0:
        raise ValueError(f"a ratio of two memories is above 0, not {ratio!r}")
    return step_flops(config, batch_size, method, rank, gap) / 1e9 * ratio


def memory_multiplier(config, batch_size, method="finetune", rank=0, precision="bf16"):
    """Peak memory of the method over that of full finetuning."""
    mine = peak_memory(config, batch_size, method, precision, rank)
    return mine / peak_memory(config, batch_size, "finetune", precision, rank)


def steps_per_task(total_gflops, tasks, maf_gflops, task_maf_gflops=0.0):
    """(2): optimizer steps that each of `tasks` tasks may take; `task_maf_gflops` is spent once a
    task beside them, as EWC's Fisher pass. ValueError where the budget does not reach one step."""
    if not (0 < total_gflops < math.inf and tasks >= 1 and maf_gflops > 0 and task_maf_gflops >= 0):
        sentence = f"a budget of {total_gflops} GFLOPs over {tasks} tasks"
        raise ValueError(f"{sentence} at {maf_gflops} a step makes no sense")
    steps = round((total_gflops / tasks - task_maf_gflops) / maf_gflops)
    if steps < 1:
        raise ValueError(
            f"a budget of {total_gflops:g} GFLOPs does not reach one step in each of {tasks} tasks:"
            f" a task costs {task_maf_gflops + maf_gflops:g} and has {total_gflops / tasks:g};"
            " raise the budget or take fewer tasks"
        )
    return steps


def default_budget(config):
    """GFLOPs of a whole run: the paper's for B/16 and B/32; for any other model B/16's, in
    proportion to the forward FLOPs of a pair, so that full finetuning sees as many samples."""
    pair = sum(forward_flops(config))
    reference = next(iter(BUDGETS))
    return BUDGETS.get(pair, BUDGETS[reference] * pair / reference)


def steps(
    config, batch_size, method, tasks, total_gflops=None, rank=0, precision="bf16",
    memory_ratio=None
):  # fmt: skip
    """Steps a task of `method` within a budget, the config's default if not given."""
    maf = mafs(config, batch_size, method, rank, precision, memory_ratio)
    step = step_flops(config, batch_size, method, rank)
    once = maf * task_flops(config, batch_size, method) / step
    total = default_budget(config) if total_gflops is None else total_gflops
    return steps_per_task(total, tasks, maf, once)


def plan(config, options, tasks, samples):
    """What a run with these options does: steps of each of its `tasks` tasks, and {"gflops": of the
    budget or None, "gflops_spent", "maf_gflops_per_step"}. options: any object with the fields
    method, batch_size, rank, gap, fisher_samples, steps, tasks, budget; what is None is the
    paper's. samples: of all these tasks, of which EWC looks back on each task's own."""
    o = options
    method = "finetune" if o.method == "zero-shot" else o.method
    rank = o.rank or 0
    gap = o.gap or GAP
    step = step_flops(config, o.batch_size, method, rank, gap)
    step_mafs = mafs(config, o.batch_size, method, rank, gap=gap)
    at_most = max(1, (o.fisher_samples or FISHER_SAMPLES) // o.batch_size)
    looked_at = min(max(1, samples // max(1, tasks) // o.batch_size), at_most)  # batches
    once = task_flops(config, o.batch_size, method, looked_at * o.batch_size)
    task_mafs = step_mafs * once / step
    total = None if o.steps else o.budget or default_budget(config)
    if o.steps:
        each = o.steps * (o.tasks if method == "joint" else 1)
    else:
        each = steps_per_task(total, max(1, tasks), step_mafs, task_mafs)
    if each > 2**31:
        raise ValueError(f"{each:g} steps a task are more than anybody takes: lower --budget or"
                         " --steps")  # fmt: skip
    spent = tasks * (each * step_mafs + task_mafs)
    return each, {"gflops": total, "gflops_spent": spent, "maf_gflops_per_step": step_mafs}


def table(config, batch_size, rank=0, precision="bf16", total_gflops=None, tasks=TASKS):
    """A row a method, as dicts of method, with its rank where the paper has a second one; rank;
    gflops of a step; memory_gib; multiplier; mafs; steps a task and samples in all, by number of
    tasks, None where the budget does not reach one step; paper: see paper_row, None where the paper
    did not measure."""
    total = default_budget(config) if total_gflops is None else total_gflops
    if not (0 < total < math.inf and min(tasks) >= 1):
        limits = "a budget is above 0 GFLOPs and finite, for one task or more"
        raise ValueError(f"{limits}, not {total} for {[*tasks]}")
    published = sum(forward_flops(config)) == next(iter(BUDGETS)) and batch_size == PAPER_BATCH
    setups = [(name, name, check(config, batch_size, name, rank)[1]) for name in METHODS]
    if published and not rank:
        setups += [(f"{name} r{r}", name, r) for name, r in PAPER if r != METHODS[name].rank]
    rows = []
    for title, method, r in setups:
        gflops = step_flops(config, batch_size, method, r) / 1e9
        multiplier = memory_multiplier(config, batch_size, method, r, precision)
        steps_at = {t: reachable(config, batch_size, method, t, total, r, precision) for t in tasks}
        rows.append({
            "method": title,
            "rank": r,
            "gflops": gflops,
            "memory_gib": peak_memory(config, batch_size, method, precision, r) / 2**30,
            "multiplier": multiplier,
            "mafs": gflops * multiplier,
            "steps": steps_at,
            "samples": {t: n and n * t * batch_size for t, n in steps_at.items()},
            "paper": paper_row(config, method, r) if published and (method, r) in PAPER else None,
        })  # fmt: skip
    return rows


def reachable(config, batch_size, method, tasks, *budget):
    """steps(), or None where the budget does not reach one."""
    try:
        return steps(config, batch_size, method, tasks, *budget)
    except ValueError:
        return None


def paper_row(config, method, rank):
    """The published gflops, memory_gib and steps at T = 20; multiplier and mafs, which follow from
    them; steps_of_ours, from our FLOPs at their memory; and why these differ, or ""."""
    gflops, gib, at_20 = PAPER[method, rank]
    _, full_gib, _ = PAPER["finetune", 0]
    ratio = gib / full_gib
    ours = steps(config, PAPER_BATCH, method, 20, rank=rank, memory_ratio=ratio)
    return {
        "gflops": gflops, "memory_gib": gib, "multiplier": ratio, "mafs": gflops * ratio,
        "steps": at_20, "steps_of_ours": ours, "why": WHY.get(method, ""),
    }  # fmt: skip


# --------------------------------------------------------------------------------------- for people


def table_text(rows):
    """Two lines a method where the paper has it: ours, then the published row, "with our FLOPs"
    being at its memory."""
    tasks = list(rows[0]["steps"])
    head = f"{'':13}{'GFLOPs/step':>13}{'GiB':>8}{'memory':>8}{'MAFs/step':>12}"
    lines = [head + "".join(f"{f'T={t}':>8}" for t in tasks) + f"{'samples':>14}"]
    for r in rows:
        at = "".join(f"{r['steps'][t] or '-':>8}" for t in tasks)
        lines.append(f"{r['method']:13}{numbers(r)}{at}{r['samples'][tasks[0]] or 0:>14,}")
        paper = r["paper"]
        if paper:
            why = f"; {paper['why']}" if paper["why"] else ""
            ours = f"({paper['steps_of_ours']} with our FLOPs{why})"
            lines.append(f"{'  paper':13}{numbers(paper)}{paper['steps']:>8}   {ours}")
    lines.append("steps a task, for T tasks; samples in all at the first T; memory: of finetune's")
    return "\n".join(lines)


def numbers(r):
    return f"{r['gflops']:13.4f}{r['memory_gib']:8.2f}{r['multiplier']:8.3f}{r['mafs']:12.1f}"


def explain_text(rows, parts, once):
    """Where one step goes: rows of flops(), parts of memory(), and task_flops()."""
    total = sum(r["total"] for r in rows)
    names = ("forward", "again", "to weight", "to input")
    heads = [("times", 6), *((name, 13) for name in names), ("update", 11), ("share", 8)]
    lines = [f"{'GFLOPs of one':31}" + "".join(f"{head:>{width}}" for head, width in heads)]
    for r in rows:
        cells = "".join(f"{r[name.replace(' ', '_')] / 1e9:13.4f}" for name in names)
        name = f"{r['tower']:8}{r['blocks']:7}{r['matmul']:16}{r['times']:>6}"
        lines.append(f"{name}{cells}{r['update'] / 1e9:11.4f}{r['total'] / total:8.2%}")
    lines.append(f"{'one step':31}{'':58}{total / 1e9:11.4f} GFLOPs")
    if once:
        lines.append(f"{'once a task':31}{'':58}{once / 1e9:11.4f} GFLOPs")
    peak = sum(parts.values())
    lines += ["", f"{'MiB at the peak':31}"]
    for part, count in parts.items():
        if count:
            lines.append(f"{part:31}{count / 2**20:12.1f}{count / peak:8.2%}")
    return "\n".join([*lines, f"{'in all':31}{peak / 2**20:12.1f}"])


def main(argv, models, paper, own):
    """The command. models: {name: config}; paper: defaults of "batch_size", "budget", "tasks"; own:
    {name: defaults} of the models that have others."""
    p = argparse.ArgumentParser("fomo.py budget", description="What a step of each method costs and"
                                " how many steps a budget buys, beside the paper's Table 4.")
    p.add_argument("--model", default="ViT-B-16", choices=sorted(models),
                   help="(default ViT-B-16)")
    p.add_argument("--batch-size", type=int, help="pairs a step (default 512; tiny and small 64)")
    p.add_argument("--precision", default="bf16", choices=list(PRECISIONS), help="(default bf16)")
    p.add_argument("--rank", type=int, default=0,
                   help="of lora, dora, vera and galore; 0: the paper's")
    p.add_argument("--budget", type=float, help="GFLOPs of the whole stream, times memory (default"
                   " the paper's, in proportion to a pair's; tiny 3000, small 12170)")
    p.add_argument("--tasks", type=int, nargs="+",
                   help="lengths of stream (default 20 50 100 200; tiny and small 8)")
    p.add_argument("--explain", choices=METHODS, help="where one step's FLOPs and bytes go")
    p.add_argument("--json", action="store_true", help="the same numbers for programs")
    args = p.parse_args(argv)
    config = models[args.model]
    defaults = own.get(args.model, paper)
    size = defaults["batch_size"] if args.batch_size is None else args.batch_size
    if args.explain:
        rows = flops(config, size, args.explain, args.rank)
        parts = memory(config, size, args.explain, args.precision, args.rank)
        once = task_flops(config, size, args.explain)
        report = {"flops": rows, "bytes": parts, "once_a_task": once}
        print(json.dumps(report) if args.json else explain_text(rows, parts, once))
        return
    total = args.budget
    if total is None:
        total = defaults["budget"] or default_budget(config)
    lengths = args.tasks or ([defaults["tasks"]] if args.model in own else TASKS)
    rows = table(config, size, args.rank, args.precision, total, lengths)
    head = f"{args.model}, batch {size}, {args.precision}, {total:g} GFLOPs in all, memory-adjusted"
    print(json.dumps(rows) if args.json else f"{head}\n{table_text(rows)}")
