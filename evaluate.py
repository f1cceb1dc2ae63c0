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
import json
import math
import operator
import os
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

# -------------------------------------------------------------------------- scores from features

# Similarities nearer than this are equal. Rounding differs with the batch's size and the number of
# threads, so that without it equal captions, or classes of one name, would be ranked by chance.
TIE = {torch.float32: 1e-6, torch.float64: 1e-12}
TILE = 2048  # similarities are formed in squares of this side, 16 MiB in float32


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


def accuracy(image, classifier, labels, k=1):
    """Top-k in percent. image [N, D] of any length, classifier [C, D] normalised, labels [N]."""
    better, equal = _class_ranks(image, classifier, labels)
    return _percent(_hit(k, better, equal))


def classification(image, classifier, labels):
    """All numbers of a classification set, in percent; arguments as of accuracy().

    -> {"metric", "samples": N, "score", "top1", "top5", "mean_per_class", "per_class": [C],
    "chance"}; a class without pictures is None in per_class and not in the mean. score is top1."""
    better, equal = _class_ranks(image, classifier, labels)
    hits = _hit(1, better, equal)
    per_class = _per_class(hits, labels, len(classifier))
    top1 = _percent(hits)
    return {
        "metric": "top-1",
        "samples": len(hits),
        "score": top1,
        "top1": top1,
        "top5": _percent(_hit(5, better, equal)),
        "mean_per_class": _mean(per_class),
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

    -> {"metric", "samples": N, "score", "t2i": {"R@1", "R@5", "R@10"}, "i2t": the same,
    "per_class", "chance"}. score is the mean of both R@5. per_class is there with labels [N] below
    classes: the same mean over a class's pictures, each weighing the same."""
    texts, images = _retrieval_ranks(image, text, owner)
    count = torch.bincount(torch.as_tensor(owner), minlength=len(image)).double()  # texts an image
    found = {k: (_hit(k, *texts).cpu(), _hit(k, *images).cpu()) for k in (1, 5, 10)}
    t2i = {f"R@{k}": _percent(found[k][0]) for k in found}
    i2t = {f"R@{k}": _percent(found[k][1]) for k in found}
    guess = _hit(5, torch.zeros_like(count), len(text) - count, count)
    numbers = {
        "metric": "R@5",
        "samples": len(image),
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


def selected(image, text, owner, ids):
    """Features of some of N pictures, `ids` [n], ascending -> (image [n, D], text, owner), the
    texts being those of these. A classifier, whose owner is None, stays as it is."""
    ids = torch.as_tensor(ids)
    if owner is None:
        return image[ids], text, None
    owner = torch.as_tensor(owner)
    kept = torch.isin(owner, ids)
    return image[ids], text[kept], torch.searchsorted(ids, owner[kept])


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
    return _mean(per_dataset.values())


def zero_shot_retention(per_dataset):
    """ZS: the mean over all held-out datasets, each weighing the same; None of none.
    per_dataset: name -> percent."""
    return _mean(per_dataset.values())


def geometric_mean(ka, zs):
    """GM = sqrt(KA ZS); None without one of them."""
    return None if ka is None or zs is None else math.sqrt(ka * zs)


def _mean(values):
    """The mean of those that are not None; None where all are. fsum rounds once, in any order."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _minus(a, b):
    return None if a is None or b is None else a - b


def summary(scores, adaptation, heldout):
    """{"ka", "zs", "gm", "datasets"} of scores: name -> percent, and the names of both roles."""
    ka = knowledge_accumulation({name: scores[name] for name in adaptation})
    zs = zero_shot_retention({name: scores[name] for name in heldout})
    return {"ka": ka, "zs": zs, "gm": geometric_mean(ka, zs), "datasets": dict(scores)}


def chance(adaptation, heldout):
    """The summary of guessing: 1 / C, and about 5 / N for R@5. Datasets with name, kind, classes
    and test."""
    guess = {}
    for d in [*adaptation, *heldout]:
        share = 1 / len(d.classes) if d.kind == "classification" else min(1, 5 / len(d.test))
        guess[d.name] = 100 * share
    return summary(guess, [d.name for d in adaptation], [d.name for d in heldout])


# ------------------------------------------------------------------------------------- over time


def forgetting(history):
    """Mean over datasets of (best score so far - last score), >= 0. history: list over time of
    {name: percent}. Chaudhry et al. 2018 (arXiv 1801.10112), eq. 3, on every dataset instead of
    every task."""
    return _mean(dataset_forgetting(history).values())


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
        taught = [[] for _ in range(tasks)]
        for score, task in zip(per_class[name], numbers, strict=True):
            if task:
                taught[task - 1].append(score)
        table[name] = [_mean(scores) for scores in taught]
        means["seen"].append(_mean(itertools.chain(*taught[:now])))
        means["unseen"].append(_mean(itertools.chain(*taught[now:])))
    return {group: _mean(of_sets) for group, of_sets in means.items()} | {"by_task": table}


def transfer(history):
    """Backward and forward transfer, Lopez-Paz & Ranzato 2017 (arXiv 1706.08840), eq. 3 and 4, each
    dataset on its own. history: "by_task" of theta_0 and after each task, [t][dataset][task].

    -> {dataset: {"backward", "forward"}}, points or None. With R[t][i] the score after task t on
    the concepts of task i: backward is the mean over i < T of R[T][i] - R[i][i]; forward the mean
    over i > 1 of R[i-1][i] - R[0][i], against theta_0 where the paper has random weights."""
    last = len(history) - 1
    moves = {}
    for name in history[-1]:
        R = [[*row.get(name, ()), *[None] * last] for row in history]  # a row may know fewer tasks
        backward = [_minus(R[last][i - 1], R[i][i - 1]) for i in range(1, last)]
        forward = [_minus(R[i - 1][i - 1], R[0][i - 1]) for i in range(2, last + 1)]
        moves[name] = {"backward": _mean(backward), "forward": _mean(forward)}
    return moves


def stability_gap(before, within):
    """What a task loses on its way: {"ka", "zs"}, each the score before the task minus the lowest
    within it or at its end, at least 0 (De Lange et al. 2023, arXiv 2205.13452).
    before: scores of the row before; within: scores within the task, its end last."""
    gap = {}
    for metric in ("ka", "zs"):
        scores = [row[metric] for row in within if row.get(metric) is not None]
        known = before.get(metric) is not None and scores
        gap[metric] = max(0.0, before[metric] - min(scores)) if known else None
    return gap


def rows_before(results):
    """For each row of results["tasks"] the row before it: theta_0's, the one above, or in the first
    task of an update "before", which are the same weights on the test data of the update."""
    above = [results["theta_0"], *results["tasks"]]
    rows = [row.get("before") or old for old, row in zip(above, results["tasks"])]
    first = results["parent"]["task"] if results.get("before") else len(rows)
    return [results["before"] if t == first else row for t, row in enumerate(rows)]


def rows_alike(results):
    """theta_0's row and each task's, all on the test data of the last: for the weights before an
    update on other test data its "before"; None where their scores are of other data alone."""
    rows = [results["theta_0"], *results["tasks"]]
    again = [*rows_before(results), rows[-1]]
    data = rows[-1].get("replaced")
    return [next((r for r in pair if r.get("replaced") == data), None) for pair in zip(rows, again)]


def alike(row, other):
    """Whether the means of two rows are over the same datasets, these scored on the same data."""
    return all(row.get(key) == other.get(key) for key in ("samples", "replaced")) and (
        row.get("by_task", {}).keys() == other.get("by_task", {}).keys()
    )


def task_gap(before, row):
    """stability_gap() of a task from its row and the row before; None where they are on different
    samples. row["within"] are scores of the weights in training, on the samples of the row or of
    its "subset"; a step 0 among them stands for the row before, since the task began elsewhere."""
    start = before.get("subset", before)
    end = row.get("subset", row)
    if not alike(start, end):
        return {"ka": None, "zs": None}
    within = row.get("within", [])
    if within and within[0]["step"] == 0:
        start = within[0]
    return stability_gap(start, [*within, end])


def scores_on(row, other, what="datasets"):
    """{dataset: row[what][dataset]} as far as the row, or its "subset", has it on the same test
    data and as many samples as `other`: R@5 falls with the number of candidates, accuracy with that
    of classes. A row on all samples has in "subset" its scores on those of the rows between first
    and last."""

    def samples(part, name):
        data = part.get("replaced", {}).get(name)
        return data, part.get("samples_of", {}).get(name, part.get("samples"))

    found = {}
    for part in (row, row.get("subset", {})):
        for name, value in part.get(what, {}).items():
            if samples(part, name) == samples(other, name):
                found[name] = value
    return found


def over_time(results):
    """Of a run's results: {"forgetting", "backward", "forward", "stability_gap": {"ka", "zs"},
    "datasets": {name: {"forgetting", "backward", "forward"}}}; means over datasets, the gap's over
    tasks; None where a run did not keep what is needed. Rows are compared on the same samples:
    where those between the first and the last are on a subset, all are."""
    before = rows_before(results)
    rows = [*before, *results["tasks"][-1:]] or [results["theta_0"]]
    last = rows[-1].get("subset", rows[-1])
    lost = dataset_forgetting([scores_on(row, last) for row in rows])
    kept = all("by_task" in row for row in rows)
    moved = {}
    if kept:
        moved = transfer([scores_on(row, last, "by_task") for row in rows])
    none = {"backward": None, "forward": None}
    each = {name: {"forgetting": lost[name], **moved.get(name, none)} for name in lost}
    means = {what: _mean([d[what] for d in each.values()])
             for what in ("forgetting", "backward", "forward")}  # fmt: skip
    gaps = [task_gap(old, row) for old, row in zip(before, results["tasks"])]
    mean_gap = {metric: _mean([gap[metric] for gap in gaps]) for metric in ("ka", "zs")}
    return {**means, "stability_gap": mean_gap, "datasets": each}


def conditions(gate):
    """What has to hold for an update to be shipped, as "zs >= -1, DIGITS >= -3" in points against
    the weights before it, or None -> [(name, "<" or ">" or "<=" or ">=", points)]."""
    found = []
    rest = gate or ""
    while rest.strip():  # a name may hold a comma, so that they are read one after the other
        match = re.match(r"\s*([^\s<>=][^<>=]*?)\s*([<>]=?)\s*([-+]?[\d.]+)\s*(?:,|$)", rest)
        try:
            found.append((match[1], match[2], float(match[3])))
        except (TypeError, ValueError):
            raise ValueError(f"--gate takes conditions as in \"zs >= -1, DIGITS >= -3\", got"
                             f" {rest!r}") from None
        rest = rest[match.end() :]
    return found


def check_gate(gate, datasets, heldout):
    """ValueError where it asks for what is not scored. datasets, heldout: names."""
    means = ["ka", *(["zs", "gm"] if heldout else [])]
    for name, _, _ in conditions(gate):
        if name not in datasets and name.lower() not in means:
            raise ValueError(f"--gate asks for {name}, which is not scored here: there are"
                             f" {', '.join([*means, *datasets])}")  # fmt: skip


def failures(gate, before, after):
    """What of a gate does not hold, in words. before, after: scores {"ka", "zs", "gm", "datasets"}
    on the same test data."""
    holds = {"<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge}
    failed = []
    for name, sign, points in conditions(gate):
        old, new = (row["datasets"].get(name, row.get(name.lower())) for row in (before, after))
        change = round(new - old, 9)  # 8.2 - 7.2 is a little less than 1
        if not holds[sign](change, points):
            failed.append(f"{name} {change:+.1f}, not {sign} {points:g}")
    return failed


# ------------------------------------------------------------------- runs and their results.json

FREE = ("seed", "out", "cache", "workers")  # options in which runs of one experiment may differ
METRICS = ("ka", "zs", "gm")
SCORE = "{:.1f}"
CHANGE = "{:+z.1f}"  # z: no minus before 0.0


def read_results(folder):
    """The results.json of a finished run; ValueError where it is none, or only half of one."""
    path = Path(folder) / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        for row in (results["theta_0"], *results["tasks"], results["final"]):
            row.setdefault("datasets", {})
            for part in (row, row.get("subset", row), *row.get("within", ())):
                percent = [part["ka"], *part.get("datasets", {}).values()]
                percent += [part[metric] for metric in ("zs", "gm") if part[metric] is not None]
                if not all(0 <= v <= 100 for v in percent):
                    raise ValueError("a score is no percentage")
        numbers = [results["seconds"], results["trained_parameters"]]
        numbers += [row[key] for row in results["tasks"] for key in ("task", "steps")]
        if not all(0 <= v < 1e15 for v in numbers):
            raise ValueError("a count is out of range")
        for text in (results["config"]["method"], results["theta_0_sha256"]):
            if not isinstance(text, str):
                raise TypeError("its method or theta_0 is no name")
        for line in compare([(folder, results)]):  # what a report will make of it
            table(summarise([line]))
            line.within()
        run_title(results)
        set(results.get("heldout", ()))
        Path((results.get("parent") or {"run": ""})["run"])
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError,
            OSError) as e:  # fmt: skip
        raise ValueError(f"{path} is no run's results ({type(e).__name__}: {e})") from None
    return results


def _no_number(name):
    raise ValueError(f"{name} is in it")  # NaN and infinities are not JSON


def read_numbers(path):
    """What `evaluate` wrote of another checkpoint."""
    try:
        numbers = json.loads(Path(path).read_text(encoding="utf-8"))["numbers"]
        return {name: {**n, "score": float(n["score"])} for name, n in numbers.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        fault = type(e).__name__
        raise ValueError(f"{path} is no scores.json of fomo.py evaluate ({fault})") from e


def read_runs(folders):
    """-> (folder, results) pairs of the finished runs, each once, and the folders that hold none.
    A run that another of them continues is left out, for its tasks are among that one's."""
    runs = {}
    unfinished = []
    for folder in map(Path, folders):
        if not (folder / "results.json").exists():
            unfinished.append(folder)
            continue
        runs.setdefault(folder.resolve(), (folder, read_results(folder)))
    earlier = {weights for _, run in runs.values() for weights in run.get("lineage", ())}
    last = [run for run in runs.values()
            if run[1].get("version", {}).get("weights") not in earlier]  # fmt: skip
    return last, unfinished


def joint_beside(folder, own):
    """At most one (folder, results): a finished joint run beside `folder`, of the theta_0 and the
    data of the results `own`."""
    for path in sorted(Path(folder).parent.glob("*/results.json")):
        try:
            results = read_results(path.parent)
        except ValueError:  # somebody else's file must not stop a run
            continue
        if results["config"]["method"] != "joint":
            continue
        if all(results.get(key) == own.get(key) for key in ("theta_0_sha256", "data_sha256")):
            return [(path.parent, results)]
    return []


@dataclass
class Line:
    """Runs that differ in their seed alone: a row of the table, a line of the pictures."""

    name: str
    folders: list
    runs: list

    def track(self):
        """[seeds, 1 + T, 2] (ZS, KA) over time, theta_0 first; NaN where the scores are of other
        test data than the last. No ZS unless each other row has one: an update may hold out what
        the tasks before did not, or no longer."""
        unknown = {"zs": math.nan, "ka": math.nan}
        over_time = [[row or unknown for row in rows_alike(run)] for run in self.runs]
        track = np.array([[(r["zs"], r["ka"]) for r in rows] for rows in over_time], dtype=float)
        if (np.isnan(track[..., 0]) & ~np.isnan(track[..., 1])).any():
            track[..., 0] = np.nan
        return track

    def within(self):
        """[T lists] of (finished tasks, ZS, KA), means over the seeds: the weights in training, as
        far as they were scored within a task. Empty lists where they were not."""
        tasks = []
        alike = [rows_alike(run)[1:] for run in self.runs]
        for t, rows in enumerate(zip(*(run["tasks"] for run in self.runs))):
            seeds = [[(t + w["step"] / row["steps"], w["zs"], w["ka"]) for w in row["within"]]
                     for row in rows if row.get("within")]  # fmt: skip
            comparable = all(known[t] is row for known, row in zip(alike, rows))
            every_seed = len(seeds) == len(rows) and len({len(path) for path in seeds}) == 1
            draw = comparable and every_seed
            tasks.append(np.mean(np.array(seeds, dtype=float), axis=0) if draw else [])
        return tasks

    def changes(self):
        """-> names, and [datasets, T] the mean change against theta_0 on the same samples, NaN
        where there is none."""
        names = list(dict.fromkeys(name for run in self.runs for name in run["final"]["datasets"]))
        changes = []
        for run in self.runs:
            changes.append([])
            for row in run["tasks"]:
                start = scores_on(run["theta_0"], row)
                after = row["datasets"]
                change = [after.get(n, math.nan) - start.get(n, math.nan) for n in names]
                changes[-1].append(change)
        return names, np.mean(changes, axis=0).reshape(-1, len(names)).T


def compare(runs, free=FREE):
    """(folder, results) pairs -> list of Line, in the order of the runs. ValueError where runs do
    not compare. free: options in which the runs of one line may differ."""
    _check_comparable(runs)
    known = next((r["training_sha256"] for _, r in runs if "training_sha256" in r), None)
    groups = {}
    for folder, results in runs:
        options = {key: v for key, v in results["config"].items() if key not in free}
        trained_on = results.get("training_sha256", known)  # files change under the same options
        kind = json.dumps([options, len(results["tasks"]), trained_on], sort_keys=True)
        seed = results["config"].get("seed")
        repeat = 0
        while seed in groups.get((kind, repeat), {}):  # twice the same seed: a line of its own
            repeat += 1
        groups.setdefault((kind, repeat), {})[seed] = (folder, results)
    groups = [list(group.values()) for group in groups.values()]
    folders = [[str(folder) for folder, _ in group] for group in groups]
    members = [[results for _, results in group] for group in groups]
    return [Line(*line) for line in zip(_names(groups), folders, members)]


def _check_comparable(runs):
    if not runs:
        raise ValueError("none of these folders holds a finished run")
    for what, key in (
        ("from different theta_0", lambda results: results["theta_0_sha256"]),
        ("over different datasets", lambda results: sorted(results["theta_0"]["datasets"])),
        ("on different test data (copies must keep their files' times: cp -a)",
         lambda results: results.get("data_sha256")),
    ):  # fmt: skip
        kinds = {}
        for folder, results in runs:
            if key(results) is not None:  # older runs do not say
                kinds.setdefault(json.dumps(key(results)), []).append(str(folder))
        if len(kinds) > 1:
            each = "; or ".join(" ".join(group) for group in kinds.values())
            raise ValueError(f"runs {what} do not compare, give those of one: {each}")
    known = runs[0][1]["theta_0"]["datasets"]
    for folder, results in runs:
        for name, score in results["theta_0"]["datasets"].items():
            if abs(score - known[name]) > 1:  # more than another precision or machine does
                told = f"theta_0 scores {known[name]:.1f} on {name} there and {score:.1f} here"
                raise ValueError(f"{runs[0][0]} and {folder} are not on the same data: {told}")


def _names(groups):
    """A name for each group, short and unlike all others. The first joint run's is "joint"."""
    own = ("joint", "zero-shot")  # the pictures draw these two in their own way
    short = []
    for group in groups:
        method = group[0][1]["config"]["method"]
        stem = _stem(group)
        if method in own and method not in short:
            short.append(method)
        elif stem in own:
            short.append("")
        else:
            short.append(stem)
    names = []
    for name, group in zip(short, groups):
        several = f" and {len(group) - 1} more" if len(group) > 1 else ""
        taken = not name or short.count(name) > 1
        names.append(f"{group[0][0]}{several}" if taken else name)
    return [n if names.count(n) == 1 else f"{n} #{i + 1}" for i, n in enumerate(names)]


def _stem(group):
    """What the folders of a group are called without their seeds: merge of merge-0 and merge-1."""
    if len(group) == 1:
        return Path(group[0][0]).name
    stems = set()
    for folder, results in group:
        seed = re.escape(str(results["config"].get("seed")))
        stem = re.sub(rf"[-_. ]*(seed|s)?[-_. =]*{seed}$", "", Path(folder).name)
        stems.add(stem or Path(folder).absolute().parent.name)
    return stems.pop() if len(stems) == 1 else group[0][1]["config"]["method"]


# ---------------------------------------------------------------------------- tables and words


def report(runs, path=None, style="text", free=FREE):
    """The comparison of (folder, results) pairs: -> its table as text, markdown or JSON, and the
    files that were written: path, and beside it each of its pictures alone."""
    lines = compare(runs, free)
    return table(summarise(lines), style), draw_report(lines, path) if path else []


def summarise(lines):
    """-> {"theta_0": {"ka", "zs", "gm"}, "lines": [...], "words": [sentences]} for JSON. Each line
    has "name", "method", "folders", "seeds", "tasks", "steps", "trained_parameters", and over its
    seeds, as {"mean", "std", "n"} (std None of one; None where unknown), "ka", "zs", "gm", their
    changes against theta_0 "ka_change" and so on, "above_line" (see above_line), "forgetting",
    "backward", "forward", "gap_ka", "gap_zs" (see over_time), "gflops" (MAFs / 1e9), "seconds"."""
    theta_0 = {metric: lines[0].runs[0]["theta_0"][metric] for metric in METRICS}
    joint = [run["final"] for line in lines if line.name == "joint" for run in line.runs]
    rows = []
    for line in lines:
        values = [_run_numbers(run, [] if line.name == "joint" else joint) for run in line.runs]
        rows.append({
            "name": line.name,
            "method": line.runs[0]["config"]["method"],
            "folders": line.folders,
            "seeds": [run["config"].get("seed") for run in line.runs],
            "tasks": len(line.runs[0]["tasks"]),
            "steps": sum(task["steps"] for task in line.runs[0]["tasks"]),
            "trained_parameters": line.runs[0]["trained_parameters"],
            **{key: _spread([value[key] for value in values]) for key in values[0]},
        })
    return {"theta_0": theta_0, "lines": rows, "words": _ranking(lines) + _since(lines)}


def _since(lines):
    """Sentences on datasets whose test data are not those of a run's first tasks, and on runs that
    do not ship what they scored last."""
    said = []
    for line in lines:
        for name, task in line.runs[0].get("scored_since", {}).items():
            said.append(f"{line.name}: {name} is scored as it is now from task {task} on")
        for run in line.runs:
            if run.get("deployed") == "before":
                failed = "; ".join(run["gate_failed"])
                said.append(f"{line.name}: its gate failed ({failed}), so it shipped the weights"
                            " before its last update, not those scored here")  # fmt: skip
    return said


def _run_numbers(run, joint):
    """What a run's seed changes: {name: number or None}. joint: the final scores of joint runs."""
    start = run["theta_0"]
    end = run["final"]
    numbers = {metric: end[metric] for metric in METRICS}
    numbers |= {f"{metric}_change": _minus(end[metric], start[metric]) for metric in METRICS}
    numbers["above_line"] = None
    if joint and None not in [scores["zs"] for scores in (start, end, *joint)]:
        goal = [_spread([scores[metric] for scores in joint])["mean"] for metric in ("zs", "ka")]
        line = (start["zs"], start["ka"]), goal
        numbers["above_line"] = above_line((end["zs"], end["ka"]), *line)
    over = over_time(run)
    numbers |= {what: over[what] for what in ("forgetting", "backward", "forward")}
    numbers |= {f"gap_{metric}": gap for metric, gap in over["stability_gap"].items()}
    return {**numbers, "gflops": run.get("gflops_spent"), "seconds": run["seconds"]}


def above_line(point, theta_0, joint):
    """KA of a point (zs, ka) above the linear trade-off from theta_0 to joint, at the point's ZS;
    beyond the line's ends, above the nearer end."""
    (left, left_ka), (right, right_ka) = sorted([tuple(theta_0), tuple(joint)])
    if point[0] >= right:
        return point[1] - right_ka
    share = (point[0] - left) / (right - left) if point[0] > left else 0.0
    return point[1] - (left_ka + share * (right_ka - left_ka))


def _spread(values):
    """{"mean", "std", "n"} of numbers, the std that of a sample; None if one is missing."""
    if None in values:
        return None
    mean = math.fsum(values) / len(values)
    square = math.fsum((value - mean) ** 2 for value in values)
    std = math.sqrt(square / (len(values) - 1)) if len(values) > 1 else None
    return {"mean": mean, "std": std, "n": len(values)}


def _ranking(lines):
    """A sentence: which line is best, and by how much more than its seeds differ."""
    ranked = [line for line in lines if line.name not in ("joint", "zero-shot")]
    if len(ranked) < 2:
        return []
    without_zs = any(run["final"]["gm"] is None for line in ranked for run in line.runs)
    metric = "ka" if without_zs else "gm"
    finals = {line.name: {run["config"].get("seed"): run["final"][metric] for run in line.runs}
              for line in ranked}  # fmt: skip
    best, behind = sorted(finals, key=lambda name: -_spread([*finals[name].values()])["mean"])[:2]
    said = f"{best} has the best {metric.upper()}"
    leads = [finals[best][seed] - finals[behind][seed] for seed in finals[best]
             if seed in finals[behind]]  # fmt: skip
    if len(leads) < 2:
        return [f"{said}; one seed says nothing about chance, run others (--seed)"]
    lead = _spread(leads)
    error = lead["std"] / math.sqrt(len(leads))
    seeds = f"in {sum(d > 0 for d in leads)} of {len(leads)} seeds"
    lead = f"{lead['mean']:+z.1f}, standard error {error:.1f}, ahead {seeds}"
    return [f"{said}, {behind} the next ({lead})"]


def table(numbers, style="text"):
    """summarise()'s numbers as text, markdown or JSON."""
    if style == "json":
        return json.dumps(numbers, indent=1)
    lines = numbers["lines"]
    columns = [
        ("KA", "ka", SCORE),
        ("ZS", "zs", SCORE),
        ("GM", "gm", SCORE),
        ("KA change", "ka_change", CHANGE),
        ("ZS change", "zs_change", CHANGE),
        ("above line", "above_line", CHANGE),
        ("forgetting", "forgetting", SCORE),
    ]
    columns = [column for column in columns if any(line[column[1]] for line in lines)]
    head = ["run", "seeds", *(title for title, _, _ in columns)]
    rows = [["theta_0", "", *(_number(numbers["theta_0"].get(k), form) for _, k, form in columns)]]
    head += ["parameters", "steps", "MAFs (1e9)", "seconds"]
    rows[0] += ["", "", "", ""]
    for line in lines:
        row = [line["name"], str(len(line["seeds"]))]
        row += [_number(line[key], form) for _, key, form in columns]
        tasks = line["tasks"]
        even = tasks and line["steps"] % tasks == 0
        steps = f"{tasks} x {line['steps'] // tasks:,}" if even else f"{line['steps']:,}"
        row += [f"{line['trained_parameters']:,}", steps]
        rows.append(row + [_number(line[k], "{:,.0f}", False) for k in ("gflops", "seconds")])
    return "\n".join([aligned([head, *rows], style), "", *numbers["words"]]).rstrip()


def _number(value, form, with_std=True):
    """A number, or {"mean", "std"}, as text; "" of None."""
    if value is None:
        return ""
    if not isinstance(value, dict):
        return form.format(value)
    text = form.format(value["mean"])
    std = value["std"] if with_std else None
    return text if std is None else f"{text} +- {form.replace('+', '').format(std)}"


def aligned(rows, style="text"):
    """Rows of cells as a table, the first their heads; all columns but the first to the right."""
    rows = [[_printable(cell) for cell in row] for row in rows]
    if style == "markdown":
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        rule = ["---"] + ["--:"] * (len(rows[0]) - 1)
        return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])
    first, *others = [max(map(len, column)) for column in zip(*rows)]
    rows = [[row[0].ljust(first), *map(str.rjust, row[1:], others)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in rows)


def _printable(text):
    return "".join(c if c.isprintable() else "?" for c in str(text))


ROW = "{:>9} {:>7}  {:>5} {:7}  {:>5} {:7}  {:>5} {:7}"


def run_head(results):
    """The lines above the rows that a run prints while it goes."""
    chance = results["chance"]
    guess = [f"{m.upper()} {chance[m]:.1f}" for m in ("ka", "zs") if chance[m] is not None]
    head = ROW.format("task", "steps", "KA", "", "ZS", "", "GM", "").rstrip()
    return f"guessing would score {', '.join(guess)}; all scores in percent\n{head}"


def run_row(task, steps, scores, before=None, whole=None):
    """One of these rows. before: the row before it, to show what changed on the same samples;
    whole: the scores on all samples, of which this row may have a subset."""
    old = before
    new = scores
    if before and before["samples"] != scores["samples"]:
        old = before.get("subset", before)
        new = scores.get("subset", scores)
    cells = []
    for metric in METRICS:
        change = _minus(new[metric], old[metric]) if before and alike(old, new) else None
        cells.append(_number(scores[metric], SCORE))
        cells.append("" if change is None else f"({CHANGE.format(change)})")
    row = ROW.format(task, steps, *cells).rstrip()
    if whole and scores.get("replaced") != whole.get("replaced"):
        row += "   on the test data of then"
    elif whole and scores["samples"] < whole["samples"]:
        row += f"   on a class-balanced {scores['samples']:,} of {whole['samples']:,} test samples"
    return row


def words(results):
    """A run's last lines: what it did, in words."""
    start = results["theta_0"]
    end = results["final"]
    moves = [(metric.upper(), _minus(end[metric], start[metric])) for metric in METRICS]
    known = [name for name in end["datasets"] if name in start["datasets"]]
    after, before = (row["datasets"] for row in (end, start))
    changes = [(_printable(name), after[name] - before[name]) for name in known]
    changes.sort(key=lambda change: change[1])

    def listed(pairs):
        return ", ".join(f"{n} {CHANGE.format(v)}" for n, v in pairs if v is not None) or "none"

    gained = [change for change in changes[::-1][:3] if change[1] > 0]
    lost = [change for change in changes[:3] if change[1] < 0]
    return [
        f"against theta_0: {listed(moves)}",
        f"gained most: {listed(gained)}; lost most: {listed(lost)}",
    ]


def score_table(scores, roles, baseline=None):
    """A checkpoint's scores, a row a dataset. scores: {name: what classification() or retrieval()
    returned}; roles: {name: "KA", "ZS" or ""}; baseline: scores of another checkpoint."""
    head = ["dataset", "role", "metric", "score", "chance", "top-5", "class mean", "R@1", "R@10"]
    rows = [head + (["before", "change"] if baseline else [])]
    for name, numbers in scores.items():
        cells = [numbers["score"], numbers["chance"]]
        cells += [numbers.get("top5"), numbers.get("mean_per_class")]
        for k in ("R@1", "R@10"):
            both = [numbers[way][k] for way in ("t2i", "i2t") if way in numbers]
            cells.append(sum(both) / 2 if both else None)
        row = [name, roles.get(name, ""), numbers["metric"]]
        row += [_number(cell, SCORE) for cell in cells]
        if baseline:
            row += _beside(numbers["score"], baseline.get(name, {}).get("score"))
        rows.append(row)
    told = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    return aligned([[row[i] for i in told] for row in rows])


def class_table(numbers, classes, baseline=None):
    """Scores per class, the worst first. classes: their names; the rest as in score_table()."""
    before = (baseline or {}).get("per_class") or ()
    with_before = len(before) == len(classes)
    rows = [["class", "score"] + (["before", "change"] if with_before else [])]
    scores = [(score, c) for c, score in enumerate(numbers["per_class"]) if score is not None]
    for score, c in sorted(scores):
        row = [classes[c], f"{score:.1f}"]
        rows.append(row + (_beside(score, before[c]) if with_before else []))
    return aligned(rows)


def _beside(score, before):
    return [_number(before, SCORE), _number(_minus(score, before), CHANGE)]


# ------------------------------------------------------------------------------------ a drawing kit

PAPER = "white"
INK = "black"
PALE = "#e2e2e2"
GREY = "#777777"
GOLD = "#f5b800"
# Colours that any colour-blind person tells apart (a test measures it); from the ninth line on the
# mark changes too.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#48bfef", "#882255", "#a6b25f", "#222255"]
# Shape: corners, the angle of the first, and the share of the radius at which every other lies.
SHAPES = {
    "circle": (48, 0, 1),
    "square": (4, 45, 1),
    "triangle": (3, -90, 1),
    "diamond": (4, 0, 1),
    "star": (10, -90, 0.42),
}
FEW = 6  # lines, of which each task has its mark and each band its full colour
ZOOM = 2  # pictures are drawn this much larger and reduced, for smooth edges


class Sheet:
    """A picture to draw on; lengths in pixels of the reduced picture."""

    def __init__(self, width, height):
        size = (math.ceil(width) * ZOOM, math.ceil(height) * ZOOM)
        self.image = Image.new("RGB", size, PAPER)
        self.pen = ImageDraw.Draw(self.image)

    def line(self, points, colour, width=2):
        self.pen.line(_zoomed(points), colour, round(width * ZOOM), joint="curve")

    def dashes(self, start, end, colour):
        for share in np.arange(0, 1, 14 / max(14, math.dist(start, end))):
            stop = min(1, share + 8 / max(14, math.dist(start, end)))
            pair = [np.add(start, s * np.subtract(end, start)) for s in (share, stop)]
            self.line(pair, colour)

    def box(self, left, top, right, bottom, colour=None, outline=None):
        corners = [round(v * ZOOM) for v in (left, top, right, bottom)]
        self.pen.rectangle(corners, colour, outline, ZOOM)

    def text(self, x, y, words, size=15, anchor="lm", colour=INK):
        font = ImageFont.load_default(size * ZOOM)
        self.pen.text((x * ZOOM, y * ZOOM), words, colour, font, anchor=anchor)

    def mark(self, shape, place, radius, colour, outline=PAPER):
        corners, first, inner = SHAPES[shape]
        radii = radius * np.where(np.arange(corners) % 2, inner, 1)
        angles = np.radians(first + 360 * np.arange(corners) / corners)
        around = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=-1)
        self.pen.polygon(_zoomed(place + around), colour, outline, ZOOM)

    def shade(self, shapes, colour, opacity):
        """Lays a transparent colour over all polygons together, once where they overlap."""
        mask = Image.new("L", self.image.size)
        pen = ImageDraw.Draw(mask)
        for points in shapes:
            pen.polygon(_zoomed(points), round(255 * opacity))
        self.image.paste(colour, mask=mask)

    def reduced(self):
        return self.image.reduce(ZOOM)


def _zoomed(points):
    return [(float(x) * ZOOM, float(y) * ZOOM) for x, y in points]


def _text_width(text, size):
    return ImageFont.load_default(size).getlength(text)


@dataclass
class Axes:
    """A rectangle of a sheet, in pixels, and the numbers at its sides."""

    left: float
    top: float
    right: float
    bottom: float
    x: tuple
    y: tuple

    def at(self, x, y):
        """Where the numbers x, y lie, in pixels of the sheet."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        height = self.bottom - self.top
        return self.left + across * (self.right - self.left), self.bottom - up * height

    def grid(self, sheet, x_ticks, y_ticks, x_name, y_name):
        for value in x_ticks:
            x, _ = self.at(value, self.y[0])
            sheet.line([(x, self.top), (x, self.bottom)], PALE, 1)
            sheet.text(x, self.bottom + 16, f"{value:g}", anchor="mm")
        for value in y_ticks:
            _, y = self.at(self.x[0], value)
            sheet.line([(self.left, y), (self.right, y)], PALE, 1)
            sheet.text(self.left - 16, y, f"{value:g}", anchor="rm")
        sheet.box(self.left, self.top, self.right, self.bottom, outline=INK)
        sheet.text((self.left + self.right) / 2, self.bottom + 42, x_name, 16, "mm")
        sheet.text(self.left, self.top - 15, y_name, 16)


def _step(span, most):
    """The distance of round numbers of which a span holds about `most` or fewer."""
    unit = 10 ** math.floor(math.log10(span / most))
    return next(unit * s for s in (1, 2, 5, 10) if span / (unit * s) <= most)


def _ticks(low, high, step):
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 9) for i in range(first, last + 1)]


class Legend:
    """Names beside their marks, long ones on several lines: nothing is cut, nothing overlaps."""

    def __init__(self, tracks, styles, over_tasks=False, within=()):
        self.entries = [("theta_0", INK, "star")]
        if "joint" in tracks and over_tasks:
            self.entries += [("joint", GOLD, None)]
        elif "joint" in tracks:
            self.entries += [("joint", GOLD, "star"), ("linear trade-off", GREY, None)]
        for name, style in styles.items():
            seeds = f", {len(tracks[name])} seeds" if len(tracks[name]) > 1 else ""
            self.entries.append((_printable(name) + seeds, *style))
        if any(len(track) > 1 for track in tracks.values()):
            self.entries.append(("shaded: a standard deviation over the seeds", None, None))
        if within:
            self.entries.append(("thin: within a task, the weights in training", None, None))
        self.entries = [(textwrap.wrap(n, 34) or ["?"], *style) for n, *style in self.entries]
        texts = [text for wrapped, *_ in self.entries for text in wrapped]
        self.width = 44 + max(_text_width(text, 16) for text in texts)
        self.height = 21 * len(texts) + 9 * len(self.entries) + 14

    def draw(self, sheet, x, y):
        y += 14
        for wrapped, colour, mark in self.entries:
            if mark == "star":
                sheet.mark(mark, (x + 16, y), 12, colour, INK)
            elif mark:
                sheet.line([(x, y), (x + 32, y)], colour, 3)
                sheet.mark(mark, (x + 16, y), 6, colour)
            elif colour:
                sheet.dashes((x, y), (x + 32, y), colour)
            for text in wrapped:
                sheet.text(x + 44, y, text, 16)
                y += 21
            y += 9


# ------------------------------------------------------------------------------------- the pictures

# A track is an array [seeds, 1 + T, 2] of (ZS, KA) over time, theta_0 first; ZS may be NaN, and
# both between first and last, where nothing is known that compares.


def plot(runs, path):
    """PNG of the ZS-KA plane, fig. 2 of the paper. runs: name -> [(zs, ka), ...] over time, the
    first being theta_0: a black star. A run named "joint" is a golden star at its last point, and
    the dashed line from theta_0 to it is the linear trade-off: above it is better. "zero-shot" is
    theta_0's own. Without ZS (None) KA is drawn over time instead."""
    tracks = {n: np.array([points], dtype=float) for n, points in runs.items() if len(points)}
    sheet = draw_plane(tracks) if _has_zs(tracks) else draw_curves(tracks)
    save_picture(sheet.reduced(), path)


def _has_zs(tracks):
    return not any(np.isnan(track[..., 0]).all() for track in tracks.values())


def _styles(tracks):
    """name -> (colour, mark) of what is drawn as a line."""
    if not tracks or not all(np.isfinite(t[:, [0, -1], 1]).all() for t in tracks.values()):
        raise ValueError("nothing to draw: a run has no point, or one that is not a number")
    drawn = [name for name in tracks if name not in ("joint", "zero-shot")]
    marks = list(SHAPES)[:-1]
    return {
        name: (COLOURS[i % len(COLOURS)], marks[i // len(COLOURS) % len(marks)])
        for i, name in enumerate(drawn)
    }


def _known(values):
    """Of [seeds, 1 + T, ...] the tasks, 0 for theta_0, that have a score."""
    return np.flatnonzero(np.isfinite(values.reshape(*values.shape[:2], -1)).all(axis=(0, 2)))


def _deviation(track):
    """Standard deviation over the first axis, the seeds; 0 of one seed."""
    return track.std(axis=0, ddof=1) if len(track) > 1 else np.zeros(track.shape[1:])


def _band(track):
    """The mean over the seeds, less and plus a standard deviation."""
    return track.mean(axis=0) - _deviation(track), track.mean(axis=0) + _deviation(track)


def _opacity(styles):
    return 0.2 if len(styles) <= FEW else 0.08


def draw_plane(tracks):
    """ZS to the right and KA upwards, a point of one as long as a point of the other."""
    styles = _styles(tracks)
    if not all(np.isfinite(track[:, [0, -1]]).all() for track in tracks.values()):
        raise ValueError("nothing to draw: a run has a ZS that is not a number")
    numbers = {name: _known(track) for name, track in tracks.items()}
    tracks = {name: track[:, numbers[name]] for name, track in tracks.items()}
    legend = Legend(tracks, styles)
    axes = _plane_axes(tracks)
    height = max(axes.bottom + 70, axes.top + legend.height)
    sheet = Sheet(axes.right + 24 + legend.width + 10, height)
    step = _step(max(axes.x[1] - axes.x[0], axes.y[1] - axes.y[0]), 9)
    ticks = [[v for v in _ticks(*side, step) if 0 <= v <= 100] for side in (axes.x, axes.y)]
    axes.grid(sheet, *ticks, "ZS, zero-shot retention (%)", "KA, knowledge accumulation (%)")
    _name_better_corner(sheet, axes)
    stars = {INK: axes.at(*next(iter(tracks.values()))[:, 0].mean(axis=0))}
    if "joint" in tracks:
        stars[GOLD] = axes.at(*tracks["joint"][:, -1].mean(axis=0))
        sheet.dashes(*stars.values(), GREY)
        _shade_track(sheet, axes, tracks["joint"][:, -1:], GOLD, 0.2)
    for name, (colour, _) in styles.items():
        _shade_track(sheet, axes, tracks[name], colour, _opacity(styles))
    for name, (colour, _) in styles.items():
        sheet.line([axes.at(*p) for p in tracks[name].mean(axis=0)], colour, 3)
    taken = [(*place, 15) for place in stars.values()]  # x, y, radius of what must stay readable
    for name, (colour, mark) in styles.items():
        places = [axes.at(*p) for p in tracks[name].mean(axis=0)]
        for place in places[1:-1] if len(styles) <= FEW else ():
            sheet.mark(mark, place, 5, colour)
        for place in places[1:][-1:]:
            sheet.mark(mark, place, 9, colour, INK)
        if len(styles) <= 3:
            _number_track(sheet, dict(zip(numbers[name], places)), colour, taken)
    for colour, place in stars.items():
        sheet.mark("star", place, 15, colour, INK)
    legend.draw(sheet, axes.right + 24, axes.top)
    return sheet


def _plane_axes(tracks):
    """Axes around all points and their deviations, of one scale: pixels a point of ZS or KA."""
    sides = []
    for axis in (0, 1):
        bands = [_band(track[..., axis]) for track in tracks.values()]
        low = min(low.min() for low, _ in bands)
        high = max(high.max() for _, high in bands)
        pad = max(0.06 * (high - low), 1.0)
        sides.append((low - pad, high + pad))
    across, up = (high - low for low, high in sides)
    height = 760
    width = min(900, max(560, height * across / up))
    scale = min(width / across, height / up)
    x, y = (
        ((low + high - pixels / scale) / 2, (low + high + pixels / scale) / 2)
        for pixels, (low, high) in zip((width, height), sides)
    )
    return Axes(60, 46, 60 + width, 46 + height, x, y)


def _name_better_corner(sheet, axes):
    x = axes.right - 2
    y = axes.top - 22
    sheet.text(x - 22, y + 7, "better", 16, "rm", GREY)
    sheet.line([(x - 14, y + 14), (x, y)], GREY)
    sheet.line([(x - 9, y), (x, y), (x, y + 9)], GREY)


def _shade_track(sheet, axes, track, colour, opacity):
    """A band of one standard deviation in ZS and in KA around the mean: ellipses along it."""
    if len(track) < 2:
        return
    scale = (axes.right - axes.left) / (axes.x[1] - axes.x[0])
    stops = np.concatenate([track.mean(axis=0), _deviation(track)], axis=1)  # [1 + T, 4]
    angles = np.linspace(0, 2 * math.pi, 48)
    ellipses = []
    for now, after in itertools.pairwise([*stops, stops[-1]]):
        pieces = 2 + int(np.abs(after - now)[:2].max() * scale / 2)
        for share in np.linspace(0, 1, pieces):
            zs, ka, wide, high = now + share * (after - now)
            edge = axes.at(zs + wide * np.cos(angles), ka + high * np.sin(angles))
            ellipses.append(np.stack(edge, axis=-1))
    sheet.shade(ellipses, colour, opacity)


def _number_track(sheet, places, colour, taken):
    """Tasks' numbers in their marks, from the last to the first, wherever there is room."""
    last = max(places)
    for task, place in sorted(places.items(), reverse=True)[:-1]:  # theta_0 is a star
        if all(math.dist(place, (x, y)) >= 11 + radius for x, y, radius in taken):
            taken.append((*place, 11))
            sheet.mark("circle", place, 11, colour, INK if task == last else PAPER)
            sheet.text(*place, str(task), 13, "mm", PAPER)


def draw_curves(tracks, within=None):
    """KA, ZS and GM over tasks, one below the other; without ZS, KA alone. within: name -> for each
    task [(finished tasks, ZS, KA), ...], of the weights in training: thin lines."""
    styles = _styles(tracks)
    within = {name: tasks for name, tasks in (within or {}).items() if any(map(len, tasks))}
    legend = Legend(tracks, styles, True, within)
    metrics = {"KA (%)": lambda points: points[..., -1]}
    if _has_zs(tracks):
        metrics["ZS (%)"] = lambda points: points[..., -2]
        metrics["GM (%)"] = lambda points: np.sqrt(points[..., -2:].prod(axis=-1))
    each = 290 if len(metrics) > 1 else 500
    sheet = Sheet(704 + legend.width + 10, max(each * len(metrics) + 60, legend.height + 46))
    last = max([1, *(tracks[name].shape[1] - 1 for name in styles)])
    for i, (metric, score) in enumerate(metrics.items()):
        values = {name: score(track) for name, track in tracks.items()}
        thin = [(styles[name][0], [(x, score(np.array([zs, ka]))) for x, zs, ka in task])
                for name, tasks in within.items() for task in tasks]  # fmt: skip
        known = [y for _, points in thin for _, y in points]
        for track in values.values():
            known += [y for edge in _band(track[:, _known(track)]) for y in edge]
        pad = max(0.06 * (max(known) - min(known)), 0.5)
        top = 46 + each * i
        y = min(known) - pad, max(known) + pad
        axes = Axes(60, top, 680, top + each - 76, (0, last), y)
        y_ticks = _ticks(*axes.y, _step(axes.y[1] - axes.y[0], 6))
        x_name = "finished tasks" if i == len(metrics) - 1 else ""
        axes.grid(sheet, _ticks(0, last, max(1, _step(last, 12))), y_ticks, x_name, metric)
        for colour, points in thin:
            places = [axes.at(*point) for point in points]
            sheet.line(places, colour, 1)
            for place in places:
                sheet.mark("circle", place, 3, colour)
        _draw_curve_lines(sheet, axes, values, styles)
    legend.draw(sheet, 704, 46)
    return sheet


def _draw_curve_lines(sheet, axes, values, styles):
    if "joint" in values:
        level = values["joint"][:, -1].mean()
        sheet.dashes(axes.at(0, level), axes.at(axes.x[1], level), GOLD)
    tasks = {name: _known(values[name]) for name in styles}
    for name, (colour, _) in styles.items():
        if len(values[name]) > 1 and len(tasks[name]) > 1:
            below, above = _band(values[name][:, tasks[name]])
            around = [*zip(tasks[name], below), *reversed([*zip(tasks[name], above)])]
            sheet.shade([[axes.at(t, v) for t, v in around]], colour, _opacity(styles))
    for name, (colour, mark) in styles.items():
        mean = values[name].mean(axis=0)
        places = [axes.at(t, mean[t]) for t in tasks[name]]
        sheet.line(places, colour, 3)
        many = len(styles) > FEW or len(places) > 31
        for place in places[-1:] if many else places[1:]:
            sheet.mark(mark, place, 6, colour)
    start = next(iter(values.values()))[:, 0].mean()
    sheet.mark("star", axes.at(0, start), 13, INK)


def draw_heat(maps, heldout=()):
    """Change of every dataset's score against theta_0 after every task: blue gained, red lost.

    maps: list of (name, datasets, numbers of the tasks, change [D, T] in points, NaN where there
    is none). heldout: datasets to draw below a line, those of ZS."""
    names = list(dict.fromkeys(name for _, datasets, _, _ in maps for name in datasets))
    names.sort(key=lambda name: name in heldout)  # stable: else in their order
    most = np.nanmax(np.abs(np.concatenate([change.ravel() for *_, change in maps])))
    limit = min(40, 5 * math.ceil(max(most, 1) / 5))
    columns = max(len(tasks) for _, _, tasks, _ in maps)
    cell = max(3, min(40, (640 if len(maps) <= FEW else 220) // columns))
    panel = max(cell * columns, 130) + 26
    titles = [textwrap.wrap(_printable(name), panel // 9) for name, *_ in maps]
    head = 21 * max(map(len, titles)) + 30
    label = 20 + max(_text_width(_printable(name), 14) for name in names)
    beside = max(1, min(len(maps), int((2200 - label) // panel)))
    down = head + 21 * len(names) + 26
    height = math.ceil(len(maps) / beside) * down
    sheet = Sheet(max(label + beside * panel, label + 470), height + 40)
    for i, (title, (_, datasets, tasks, change)) in enumerate(zip(titles, maps)):
        left = label + i % beside * panel
        top = i // beside * down + head
        for row, text in enumerate(title):
            sheet.text(left, top - head + 12 + 21 * row, text, 16)
        for row, name in enumerate(names):
            y = top + 21 * row
            if i % beside == 0:
                sheet.text(label - 10, y + 10, _printable(name), 14, "rm")
            values = change[datasets.index(name)] if name in datasets else [math.nan] * len(tasks)
            _draw_cells(sheet, left, y, cell, values, limit)
        _number_columns(sheet, left, top - 10, cell, tasks)
        split = top + 21 * sum(name not in heldout for name in names)
        if top < split < top + 21 * len(names):
            sheet.line([(left - 6, split), (left + cell * len(tasks), split)], INK, 2)
    _draw_scale(sheet, label, height + 8, limit)
    return sheet


def _draw_cells(sheet, left, y, cell, values, limit):
    for column, value in enumerate(values):
        x = left + cell * column
        share = value / limit
        sheet.box(x, y, x + cell, y + 21, PALE if math.isnan(value) else _blue_white_red(share))
        if cell >= 32 and not math.isnan(value):
            colour = PAPER if abs(share) > 0.6 else INK
            number = f"{value:+.0f}" if abs(value) >= 0.5 else "0"
            sheet.text(x + cell / 2, y + 10, number, 13, "mm", colour)


def _number_columns(sheet, left, y, cell, tasks):
    """Numbers of the tasks above their columns, as many as there is room for."""
    room = max(_text_width(str(task), 13) for task in tasks) + 6
    for column in range(0, len(tasks), math.ceil(room / cell)):
        sheet.text(left + cell * (column + 0.5), y, str(tasks[column]), 13, "mm", GREY)


def _blue_white_red(share):
    """1 is blue, 0 white, -1 red."""
    end = (5, 80, 160) if share > 0 else (178, 24, 43)
    return tuple(round(255 + min(1, abs(share)) * (v - 255)) for v in end)


def _draw_scale(sheet, left, y, limit):
    for i in range(81):
        sheet.box(left + 2 * i, y - 8, left + 2 * i + 2, y + 8, _blue_white_red(i / 40 - 1))
    for x, text in ((0, f"-{limit}"), (81, "0"), (162, f"+{limit}")):
        sheet.text(left + x, y + 18, text, 13, "mm")
    sheet.text(left + 190, y, "points against theta_0, after each task", 14)


# --------------------------------------------------------------------------- pictures of whole runs


PARTS = ("plane", "curves", "heat")


def report_files(path):
    """-> {part: file}: where draw_report() writes the picture, "", and each of its parts alone."""
    path = Path(path)
    parts = {part: path.with_name(f"{path.stem}-{part}{path.suffix}") for part in PARTS}
    return {"": path} | parts


def draw_report(lines, path):
    """Writes the picture of lines at path, and beside it each of its parts alone: -> the files."""
    seeds = [len(line.runs) for line in lines]
    parts = _parts(lines, lines)
    counts = {"experiment": len(lines), "run": sum(seeds)}
    title = ", ".join(f"{n} {what}{'s' * (n != 1)}" for what, n in counts.items())
    whole = _together(parts, title)
    files = report_files(path)
    for part, picture in {"": whole, **parts}.items():
        save_picture(picture, files[part])
    return [files[part] for part in ("", *parts)]


def page(results, path, beside=()):
    """Writes the picture of one run: plane, curves and heat map, a title over them. beside:
    (folder, results) pairs of other runs to draw too, such as the joint one."""
    line = Line(results["config"]["method"], [], [results])
    others = [other for other in compare(beside) if other.name != line.name] if beside else []
    save_picture(_together(_parts([line, *others], [line]), run_title(results)), path)


def run_title(results):
    """The experiment in a line: method, T, budget, seed."""
    config = results["config"]
    said = [config["method"], f"T = {len(results['tasks'])}"]
    if results.get("gflops"):
        said.append(f"budget {results['gflops']:,.0f} GFLOPs")
    elif results["tasks"]:
        said.append(f"{results['tasks'][-1]['steps']:,} steps a task")
    return ", ".join([*said, f"seed {config.get('seed')}"])


def _parts(lines, mapped):
    """{"plane", "curves", "heat": picture}, those that there is something for."""
    tracks = {line.name: line.track() for line in lines}
    parts = {"plane": draw_plane(tracks).reduced()} if _has_zs(tracks) else {}
    within = {line.name: line.within() for line in lines if line.name != "joint"}
    parts["curves"] = draw_curves(tracks, within).reduced()
    maps = [(line, *line.changes()) for line in mapped]
    maps = [
        (line.name, datasets, [row["task"] for row in line.runs[0]["tasks"]], change)
        for line, datasets, change in maps
        if np.isfinite(change).any()
    ]
    if maps:
        heldout = {name for line in mapped for name in line.runs[0].get("heldout", ())}
        parts["heat"] = draw_heat(maps, heldout).reduced()
    return parts


def _together(parts, title):
    """One picture: a title, plane and curves side by side, the heat map below."""
    upper = [parts[name] for name in ("plane", "curves") if name in parts]
    rows = [upper] + ([[parts["heat"]]] if "heat" in parts else [])
    width = max(sum(part.width + 30 for part in row) + 30 for row in rows)
    height = 66 + sum(max(part.height for part in row) + 30 for row in rows)
    whole = Image.new("RGB", (width, height), PAPER)
    ImageDraw.Draw(whole).text((30, 20), _printable(title), INK, ImageFont.load_default(24))
    top = 66
    for row in rows:
        left = 30
        for part in row:
            whole.paste(part, (left, top))
            left += part.width + 30
        top += max(part.height for part in row) + 30
    return whole


def save_picture(image, path):
    """Whole or not at all. It says what drew it, so that it may be drawn anew but no other file."""
    aside = Path(f"{path}.part")
    maker = PngInfo()
    maker.add_text("Software", "fomo")
    try:
        image.save(aside, "PNG", pnginfo=maker)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
