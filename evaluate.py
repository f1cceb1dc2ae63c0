"""Scores of a continually trained CLIP: zero-shot classification, retrieval, KA / ZS / GM, and the KA-ZS picture.

Roth et al. 2024 (arXiv 2408.14471), sec. 3.4. All scores are percentages. This file stands alone; copy it:

    import evaluate, torch
    encode_text = lambda prompts: torch.randn(len(prompts), 64)  # list[str] -> [C, D]: a CLIP's, in life
    weights = evaluate.classifier(encode_text, ["a photo of a cat.", "a photo of a dog."])  # [2, 64]
    print(evaluate.accuracy(torch.randn(100, 64), weights, labels=[0, 1] * 50))  # about 50
    evaluate.plot({"merge": [(70.4, 38.9), (70.6, 45.0), (70.1, 52.0)], "joint": [(65.4, 59.5)]}, "picture.png")
"""

import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont


def classifier(encode_text, prompts):
    """encode_text: list[str] -> [C, D]. Returns [C, D], L2-normalised: the zero-shot classifier, one prompt a class."""
    return F.normalize(encode_text(prompts).float(), dim=-1)


def accuracy(image, classifier, labels):
    """Top-1 in percent. image [N, D] (its length does not matter), classifier [C, D] normalised, labels [N]."""
    labels = torch.as_tensor(labels, device=image.device)
    hits = torch.cat([(x.float() @ classifier.T).argmax(dim=-1) for x in image.split(8192)]) == labels  # [N]
    return 100 * hits.double().mean().item()


def recall_at_k(image, text, owner, k=5):
    """(text-to-image, image-to-text) R@k in percent. image [N, D], text [M, D], text j describes image owner[j].

    Text-to-image: the share of texts whose image is among the k nearest. Image-to-text: the share of images that have
    one of their texts among the k nearest."""
    image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
    owner = torch.as_tensor(owner, device=image.device)
    found = []
    for part, mine in zip(text.split(1024), owner.split(1024)):
        nearest = (part @ image.T).topk(min(k, len(image)), dim=-1).indices  # [m, k] images
        found.append((nearest == mine[:, None]).any(dim=-1))
    t2i, found = torch.cat(found), []
    for part, mine in zip(image.split(1024), torch.arange(len(image), device=image.device).split(1024)):
        nearest = (part @ text.T).topk(min(k, len(text)), dim=-1).indices  # [n, k] texts
        found.append((owner[nearest] == mine[:, None]).any(dim=-1))
    return tuple(100 * hits.double().mean().item() for hits in (t2i, torch.cat(found)))


def balanced_subset(labels, seed):
    """Sorted indices of min(N, max(2C, 300, N / 10)) samples, classes as equal as they can be: what is scored between
    the first and the last task. A pure function of its arguments."""
    labels = np.asarray(labels)
    size = min(len(labels), max(2 * len(np.unique(labels)), 300, len(labels) // 10))
    rng = np.random.default_rng((seed, 6))
    shuffled = rng.permutation(len(labels))
    turn = np.empty(len(labels), int)  # this sample is the turn-th of its class
    for c in np.unique(labels):
        mine = shuffled[labels[shuffled] == c]
        turn[mine] = np.arange(len(mine))
    return np.sort(shuffled[np.argsort(turn[shuffled], kind="stable")][:size])


def knowledge_accumulation(per_dataset):
    """KA: the mean over all adaptation datasets, seen or not, each weighing the same. per_dataset: name -> percent."""
    return sum(per_dataset.values()) / len(per_dataset)


def zero_shot_retention(per_dataset):
    """ZS: the mean over all held-out datasets, each weighing the same. per_dataset: name -> percent."""
    return sum(per_dataset.values()) / len(per_dataset)


def geometric_mean(ka, zs):
    return math.sqrt(ka * zs)


def forgetting(history):
    """Mean over datasets of (best score so far - last score), >= 0. history: list over time of {name: percent}.
    Chaudhry et al. 2018 (arXiv 1801.10112), eq. 3, on every dataset instead of every task."""
    last = history[-1]
    return sum(max(scores[name] for scores in history) - last[name] for name in last) / len(last)


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
