"""Scores of a continually trained CLIP, what they say over time, and the report: tables, pictures.

Roth et al. 2024 (arXiv 2408.14471), sec. 3.4. Scores are percentages. Stands alone; copy it:

    import evaluate, torch
    encode_text = lambda prompts: torch.randn(len(prompts), 64)  # list[str] -> [n, D]: a CLIP's
    weights = evaluate.classifier(encode_text, ["a photo of a cat.", "a photo of a dog."])
    print(evaluate.accuracy(torch.randn(100, 64), weights, labels=[0, 1] * 50))  # about 50
    merge = [(70.4, 38.9), (70.6, 45.0), (70.1, 52.0)]  # (ZS, KA) over time, from theta_0 on
    evaluate.plot({"merge": merge, "joint": [merge[0], (65.4, 59.5)]}, "picture.png")

Chapters: scores from features; KA, ZS, GM; over time; runs and their results.json; tables and
words; the three pictures. Each can be read, and used, without those after it.
"""
import itertools
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

# -------------------------------------------------------------------------- scores from features

# Similarities nearer than this are equal. Rounding differs with the batch's size and the number of
# threads, so that without it equal captions, or classes of one name, would be ranked by chance.
TIE = {torch.float32: 1e-6, torch.float64: 1e-12}
TILE = 4096  # similarities are formed in squares of this side, 64 MiB in float32


def classifier(encode_text, prompts, templates=None):
    """The zero-shot classifier [C, D], L2-normalised. encode_text: list[str] -> [n, D].

    prompts: a string a class; or a list of strings a class, an ensemble, whose normalised features
    are averaged and normalised again (Radford et al. 2021, arXiv 2103.00020, sec. 3.1.4). With
    templates, prompts are class names, put where a template has {}."""
    if templates is not None:
        prompts = [[template.replace("{}", name) for template in templates] for name in prompts]
    if all(isinstance(prompt, str) for prompt in prompts):
        return _unit(encode_text(list(prompts)))
    if not all(len(several) for several in prompts):
        raise ValueError("a class has no prompt: give each class at least one")
    owner = [c for c, several in enumerate(prompts) for _ in several]
    features = _unit(encode_text([prompt for several in prompts for prompt in several]))  # [n, D]
    total = features.new_zeros(len(prompts), features.shape[1])
    total.index_add_(0, torch.tensor(owner, device=features.device), features)  # [C, D]
    return F.normalize(total, dim=-1)  # the mean's direction is the sum's


def read_templates(path):
    """Templates from a file, one a line, with {} where the class name goes."""
    with open(path, encoding="utf-8") as file:
        templates = [line.strip() for line in file if line.strip()]
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"{path}: {template!r} has no {{}} where the class name goes")
    if not templates:
        raise ValueError(f"{path} holds no template: write one a line, as in a photo of a {{}}.")
    return templates


class Classifiers:
    """Keeps the classifiers of an unchanged text tower, so that they are not computed again.

    version is anything that says which text tower encode_text is: when it changes, all go."""

    def __init__(self):
        self.version = None
        self.kept = {}

    def get(self, version, name, encode_text, prompts, templates=None):
        if version != self.version:
            self.kept.clear()
            self.version = version
        if name not in self.kept:
            self.kept[name] = classifier(encode_text, prompts, templates)
        return self.kept[name]


def accuracy(image, classifier, labels, k=1):
    """Top-k in percent. image [N, D] of any length, classifier [C, D] normalised, labels [N]."""
    better, equal = _class_ranks(image, classifier, labels)
    return _percent(_hit(k, better, equal))


def classification(image, classifier, labels):
    """All numbers of a classification set, in percent; arguments as of accuracy().

    -> {"metric", "score", "top1", "top5", "mean_per_class", "per_class": [C], "chance"}; a class
    without pictures is None in per_class and not in the mean. score is top1."""
    better, equal = _class_ranks(image, classifier, labels)
    hits = _hit(1, better, equal)
    per_class = _per_class(hits, labels, len(classifier))
    there = [score for score in per_class if score is not None]
    top1 = _percent(hits)
    return {
        "metric": "top-1",
        "score": top1,
        "top1": top1,
        "top5": _percent(_hit(5, better, equal)),
        "mean_per_class": math.fsum(there) / len(there),
        "per_class": per_class,
        "chance": 100 / len(classifier),
    }


def recall_at_k(image, text, owner, k=5):
    """(text-to-image, image-to-text) R@k in percent. image [N, D], text [M, D]; text j describes
    image owner[j].

    Text-to-image: the share of texts whose image is among the k nearest. Image-to-text: the share
    of images that have one of their texts among the k nearest."""
    texts, images = _retrieval_ranks(image, text, owner)
    return _percent(_hit(k, *texts)), _percent(_hit(k, *images))


def retrieval(image, text, owner, labels=None, classes=None):
    """All numbers of a retrieval set, in percent; image, text and owner as of recall_at_k().

    -> {"metric", "score", "t2i": {"R@1", "R@5", "R@10"}, "i2t": the same, "per_class", "chance"}.
    score is the mean of both R@5. per_class is there with labels [N] below classes: the same mean
    over a class's pictures, each weighing the same."""
    texts, images = _retrieval_ranks(image, text, owner)
    count = torch.bincount(torch.as_tensor(owner), minlength=len(image)).double()  # texts an image
    found = {k: (_hit(k, *texts).cpu(), _hit(k, *images).cpu()) for k in (1, 5, 10)}
    t2i = {f"R@{k}": _percent(found[k][0]) for k in found}
    i2t = {f"R@{k}": _percent(found[k][1]) for k in found}
    guess = _hit(5, torch.zeros_like(count), len(text) - count, count)
    numbers = {
        "metric": "R@5",
        "score": (t2i["R@5"] + i2t["R@5"]) / 2,
        "t2i": t2i,
        "i2t": i2t,
        "chance": (100 * min(1, 5 / len(image)) + _percent(guess)) / 2,
    }
    if labels is not None:
        text_hits, image_hits = found[5]
        own = torch.zeros(len(image), dtype=torch.float64)
        own.index_add_(0, torch.as_tensor(owner), text_hits)
        credit = (image_hits + own / count.clamp(min=1)) / 2
        numbers["per_class"] = _per_class(credit, labels, classes)
    return numbers


def _unit(features):
    """L2-normalised rows, in float32 or, if they are, float64."""
    if features.dtype != torch.float64:
        features = features.float()
    if not features.isfinite().all():
        raise ValueError("features are not finite: the model diverged, or overflows in fp16")
    return F.normalize(features, dim=-1)


def _tie(a, b):
    wider = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return wider, TIE[wider]


def _class_ranks(image, classifier, labels):
    """-> [N] wrong classes nearer than the right one, and [N] as near."""
    labels = torch.as_tensor(labels, device=image.device)
    classes = len(classifier)
    if len(labels) != len(image) or len(labels) == 0:
        raise ValueError(f"{len(image)} images with {len(labels)} labels: nothing to score")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels go from {labels.min()} to {labels.max()} over {classes} classes")
    dtype, tie = _tie(image, classifier)
    weights = classifier.to(image.device, dtype)
    better = []
    equal = []
    rows = max(1, TILE * TILE // classes)
    for part, right in zip(image.split(rows), labels.split(rows)):
        similarity = _unit(part).to(dtype) @ weights.T  # [n, C]
        own = similarity.gather(1, right[:, None])
        similarity.scatter_(1, right[:, None], -math.inf)
        above = (similarity > own + tie).sum(dim=1)
        better.append(above)
        equal.append((similarity >= own - tie).sum(dim=1) - above)
    return torch.cat(better), torch.cat(equal)


def _retrieval_ranks(image, text, owner):
    """-> ([M] wrong images nearer to a text than its own, [M] as near, 1) and ([N] other images'
    texts nearer to an image than the nearest of its own, [N] as near, [N] own texts that near)."""
    owner = torch.as_tensor(owner, device=image.device)
    if len(owner) != len(text) or len(owner) == 0:
        raise ValueError(f"{len(text)} texts with {len(owner)} owners: nothing to score")
    if owner.min() < 0 or owner.max() >= len(image):
        raise ValueError(f"texts of images {owner.min()} to {owner.max()}, of {len(image)} images")
    dtype, tie = _tie(image, text)
    own = torch.cat([
        (_unit(part).to(dtype) * _unit(image[mine]).to(dtype)).sum(dim=-1)
        for part, mine in zip(text.split(TILE), owner.split(TILE))
    ])  # [M]
    best = own.new_full([len(image)], -math.inf).scatter_reduce(0, owner, own, "amax")  # [N]
    as_best = torch.bincount(owner[own >= best[owner] - tie], minlength=len(image))
    text_counts = own.new_zeros(2, len(text), dtype=torch.int64)  # nearer; nearer or as near
    image_counts = own.new_zeros(2, len(image), dtype=torch.int64)
    for j in range(0, len(text), TILE):
        texts = slice(j, j + TILE)
        text_part = _unit(text[texts]).to(dtype)
        for i in range(0, len(image), TILE):
            images = slice(i, i + TILE)
            similarity = text_part @ _unit(image[images]).to(dtype).T  # [m, n]
            pairs = ((owner[texts] >= i) & (owner[texts] < i + TILE)).nonzero()[:, 0]
            similarity[pairs, owner[texts][pairs] - i] = -math.inf  # own pairs are in own and best
            is_larger = torch.empty_like(similarity)  # ones and zeros: floats add up fastest
            for c, limit in enumerate((own[texts] + tie, own[texts] - tie)):
                torch.gt(similarity, limit[:, None], out=is_larger)
                text_counts[c, texts] += is_larger.sum(dim=1).long()
            for c, limit in enumerate((best[images] + tie, best[images] - tie)):
                torch.gt(similarity, limit, out=is_larger)
                image_counts[c, images] += is_larger.sum(dim=0).long()
    one = torch.ones_like(owner)
    return ((text_counts[0], text_counts[1] - text_counts[0], one),
            (image_counts[0], image_counts[1] - image_counts[0], as_best))  # fmt: skip


def _hit(k, better, equal, own=1):
    """[n] float64: the chance that one of `own` candidates is among the k nearest, if `better` are
    nearer and the order of `equal` others as near is drawn. Features that are all the same score
    what guessing scores, not 100."""
    own = torch.as_tensor(own, device=better.device)
    places = (k - better).clamp(min=0)
    miss = torch.ones(better.shape, dtype=torch.float64, device=better.device)
    for i in range(k):
        others = (equal - i).clamp(min=0).double()
        missed = others / (equal + own - i).clamp(min=1)  # the i-th place goes to another
        miss = torch.where(i < places, miss * missed, miss)
    return torch.where(own > 0, 1 - miss, 0.0)  # an image without texts is never found


def _percent(hits):
    """fsum rounds once, whatever the order: the same bits for any order of the samples."""
    return 100 * math.fsum(hits.tolist()) / len(hits)


def _per_class(hits, labels, classes):
    """[C] percent, None where no sample is of the class."""
    mine = [[] for _ in range(classes)]
    for label, hit in zip(torch.as_tensor(labels).tolist(), hits.tolist()):
        mine[label].append(hit)
    return [100 * math.fsum(m) / len(m) if m else None for m in mine]


def balanced_subset(labels, seed):
    """Sorted indices of min(N, max(2C, 300, N / 10)) samples, classes as equal as they can be: what
    is scored between the first and the last task. A pure function of its arguments."""
    labels = np.asarray(labels)
    size = min(len(labels), max(2 * len(np.unique(labels)), 300, len(labels) // 10))
    rng = np.random.default_rng((seed, 6))
    shuffled = rng.permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]  # class after class
    _, first, count = np.unique(labels[order], return_index=True, return_counts=True)
    turn = np.empty(len(labels), int)  # this sample is the turn-th of its class
    turn[order] = np.arange(len(labels)) - np.repeat(first, count)
    return np.sort(shuffled[np.argsort(turn[shuffled], kind="stable")][:size])


# ------------------------------------------------------------------------------------ KA, ZS, GM


def knowledge_accumulation(per_dataset):
    """KA: the mean over all adaptation datasets, seen or not, each weighing the same; None of none.
    per_dataset: name -> percent."""
    return math.fsum(per_dataset.values()) / len(per_dataset) if per_dataset else None


def zero_shot_retention(per_dataset):
    """ZS: the mean over all held-out datasets, each weighing the same; None of none.
    per_dataset: name -> percent."""
    return math.fsum(per_dataset.values()) / len(per_dataset) if per_dataset else None


def geometric_mean(ka, zs):
    """GM = sqrt(KA ZS); None without one of them."""
    return None if ka is None or zs is None else math.sqrt(ka * zs)


def summary(scores, adaptation, heldout):
    """{"ka", "zs", "gm", "datasets"} of scores: name -> percent, and the names of both roles."""
    ka = knowledge_accumulation({name: scores[name] for name in adaptation})
    zs = zero_shot_retention({name: scores[name] for name in heldout})
    return {"ka": ka, "zs": zs, "gm": geometric_mean(ka, zs), "datasets": dict(scores)}


# ------------------------------------------------------------------------------------- over time


def forgetting(history):
    """Mean over datasets of (best score so far - last score), >= 0. history: list over time of
    {name: percent}. Chaudhry et al. 2018 (arXiv 1801.10112), eq. 3, on every dataset instead of
    every task."""
    lost = dataset_forgetting(history)
    return math.fsum(lost.values()) / len(lost)


def dataset_forgetting(history):
    """{name: best score so far - last score}; a dataset may be missing from early entries."""
    last = history[-1]
    return {n: max(scores[n] for scores in history if n in scores) - last[n] for n in last}


def by_concept(per_class, when, tasks, now):
    """What the scores of classes say about tasks: the part of a results.json row that it returns.

    per_class: {dataset: [C] percent or None}, as classification() and retrieval() give it.
    when: {dataset: [C] number of the first task that teaches the class, from 1; None or 0: never}.
    tasks: T; now: tasks finished so far, 0 for theta_0.
    -> {"seen", "unseen": percent or None, "by_task": {dataset: [T] percent or None}}. Within a
    dataset each concept weighs the same, so that a balanced subset and all data agree; then each
    dataset that has such concepts weighs the same. Datasets that are not in `when` are left out."""
    table = {}
    means = {"seen": [], "unseen": []}
    for name, numbers in when.items():
        groups = {"seen": [], "unseen": []}
        row = [[] for _ in range(tasks)]
        for score, task in zip(per_class[name], numbers, strict=True):
            if score is not None and task:
                row[task - 1].append(score)
                groups["seen" if task <= now else "unseen"].append(score)
        table[name] = [math.fsum(s) / len(s) if s else None for s in row]
        for group, scores in groups.items():
            if scores:
                means[group].append(math.fsum(scores) / len(scores))
    mean = {group: math.fsum(m) / len(m) if m else None for group, m in means.items()}
    return {"seen": mean["seen"], "unseen": mean["unseen"], "by_task": table}


def transfer(history):
    """Backward and forward transfer, Lopez-Paz & Ranzato 2017 (arXiv 1706.08840), eq. 3 and 4, each
    dataset on its own. history: "by_task" of theta_0 and after each task, [t][dataset][task].

    -> {dataset: {"backward", "forward"}}, points or None. With R[t][i] the score after task t on
    the concepts of task i: backward is the mean over i < T of R[T][i] - R[i][i]; forward the mean
    over i > 1 of R[i-1][i] - R[0][i], against theta_0 where the paper has random weights."""
    last = len(history) - 1
    moves = {}
    for name in history[-1]:
        scores = [row.get(name, []) for row in history]

        def change(after, before, task, scores=scores):
            old, new = ((scores[t] + [None] * task)[task - 1] for t in (before, after))
            return [] if old is None or new is None else [new - old]

        backward = [d for i in range(1, last) for d in change(last, i, i)]
        forward = [d for i in range(2, last + 1) for d in change(i - 1, 0, i)]
        moves[name] = {
            "backward": math.fsum(backward) / len(backward) if backward else None,
            "forward": math.fsum(forward) / len(forward) if forward else None,
        }
    return moves


def stability_gap(before, within):
    """What a task loses on its way: {"ka", "zs"}, each the score before the task minus the lowest
    within it or at its end, at least 0 (De Lange et al. 2023, arXiv 2205.13452, name such a drop so).
    before: scores of the row before; within: scores within the task, its end last."""
    gap = {}
    for metric in ("ka", "zs"):
        scores = [row[metric] for row in within if row.get(metric) is not None]
        known = before.get(metric) is not None and scores
        gap[metric] = max(0.0, before[metric] - min(scores)) if known else None
    return gap


def over_time(results):
    """Of a run's results: {"forgetting", "backward", "forward", "stability_gap": {"ka", "zs"},
    "datasets": {name: {"forgetting", "backward", "forward"}}}; means over datasets, the gap's over
    tasks; None where a run did not keep what is needed."""
    rows = [results["theta_0"], *results["tasks"]]
    lost = dataset_forgetting([row["datasets"] for row in rows])
    kept = all("by_task" in row for row in rows)
    moved = transfer([row["by_task"] for row in rows]) if kept else {}
    none = {"backward": None, "forward": None}
    each = {name: {"forgetting": lost[name], **moved.get(name, none)} for name in lost}
    means = {}
    for what in ("forgetting", "backward", "forward"):
        there = [scores[what] for scores in each.values() if scores[what] is not None]
        means[what] = math.fsum(there) / len(there) if there else None
    gaps = [
        stability_gap(before, [*row.get("within", []), row])
        for before, row in itertools.pairwise(rows)
    ]
    mean_gap = {}
    for metric in ("ka", "zs"):
        there = [gap[metric] for gap in gaps if gap[metric] is not None]
        mean_gap[metric] = math.fsum(there) / len(there) if there else None
    return {**means, "stability_gap": mean_gap, "datasets": each}


# ------------------------------------------------------------------------------------------------------- the picture

LINES = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22",
         "#000080", "#ffb6a3", "#00674f", "#ff00ff", "#a8c8f0", "#5c0a0a"]  # fmt: skip
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1400, 1000, 110, 320, 40, 90  # pixels


def _ticks(low, high, n=8):
    """Round numbers between low and high, about n."""
    step = 10 ** math.floor(math.log10((high - low) / n))
    step = next(s for s in (step, 2 * step, 5 * step, 10 * step) if (high - low) / s <= n)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _range(values):
    low, high = min(values), max(values)
    pad = max(0.08 * (high - low), 1.0)
    return low - pad, high + pad


def _star(draw, x, y, colour, radius=22):
    angles = [math.radians(36 * i - 90) for i in range(10)]
    radii = (radius, 0.42 * radius)
    draw.polygon([(x + radii[i % 2] * math.cos(a), y + radii[i % 2] * math.sin(a)) for i, a in enumerate(angles)],
                 colour, "black", 2)  # fmt: skip


def plot(runs, path):
    """PNG of trajectories, x = ZS, y = KA (fig. 2 of the paper). runs: name -> [(zs, ka), ...] over time, the first
    being theta_0: a black star. A run named "joint" is a golden star at its last point, and the dashed line from
    theta_0 to it is the linear trade-off: above it is better. "zero-shot" is theta_0's own."""
    finite = [p for points in runs.values() for p in points]
    if not finite or not all(math.isfinite(v) for p in finite for v in p):
        raise ValueError("nothing to draw: a run has no point, or one that is not a number")
    (x0, x1), (y0, y1) = (_range([p[axis] for p in finite]) for axis in (0, 1))
    canvas = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(26), ImageFont.load_default(22)

    def at(point):
        return (LEFT + (point[0] - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - (point[1] - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM))  # fmt: skip

    for v in _ticks(x0, x1):
        x = at((v, y0))[0]
        draw.line((x, TOP, x, HEIGHT - BOTTOM), "#e4e4e4", 2)
        draw.text((x, HEIGHT - BOTTOM + 10), f"{v:g}", "black", small, anchor="ma")
    for v in _ticks(y0, y1):
        y = at((x0, v))[1]
        draw.line((LEFT, y, WIDTH - RIGHT, y), "#e4e4e4", 2)
        draw.text((LEFT - 12, y), f"{v:g}", "black", small, anchor="rm")
    draw.rectangle((LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM), outline="black", width=2)
    draw.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12), "ZS, zero-shot retention (%)", "black", font, anchor="mb")
    side = Image.new("RGB", (500, 34), "white")
    ImageDraw.Draw(side).text((250, 17), "KA, knowledge accumulation (%)", "black", font, anchor="mm")
    canvas.paste(side.rotate(90, expand=True), (6, (TOP + HEIGHT - BOTTOM) // 2 - 250))

    start = next(iter(runs.values()))[0]
    if "joint" in runs:
        (ax, ay), (bx, by) = at(start), at(runs["joint"][-1])
        for i in range(0, 40, 2):  # dashes
            a, b = i / 40, (i + 1) / 40
            draw.line((ax + a * (bx - ax), ay + a * (by - ay), ax + b * (bx - ax), ay + b * (by - ay)), "grey", 3)
    legend = [("theta_0", "black", True)]
    for i, (name, points) in enumerate((n, p) for n, p in runs.items() if n not in ("joint", "zero-shot")):
        colour = LINES[i % len(LINES)]
        draw.line([at(p) for p in points], colour, 4, joint="curve")
        for x, y in map(at, points[1:]):
            draw.ellipse((x - 7, y - 7, x + 7, y + 7), colour)
        x, y = at(points[-1])  # a larger one ends the line
        draw.ellipse((x - 12, y - 12, x + 12, y + 12), colour, "black", 2)
        legend.append((name, colour, False))
    _star(draw, *at(start), "black")
    if "joint" in runs:
        _star(draw, *at(runs["joint"][-1]), "#f5b800")
        legend.append(("joint", "#f5b800", True))
    for i, (name, colour, star) in enumerate(legend):
        x, y = WIDTH - RIGHT + 40, TOP + 20 + 40 * i
        if star:
            _star(draw, x, y, colour, 15)
        else:
            draw.line((x - 16, y, x + 16, y), colour, 4)
            draw.ellipse((x - 7, y - 7, x + 7, y + 7), colour)
        draw.text((x + 30, y), name, "black", small, anchor="lm")
    aside = f"{path}.part"
    canvas.save(aside, "PNG")
    os.replace(aside, path)
