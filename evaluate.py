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
import os
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

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
    within it or at its end, at least 0 (De Lange et al. 2023, arXiv 2205.13452).
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


# ------------------------------------------------------------------- runs and their results.json

# Options in which runs may differ and still be the same experiment.
FREE = ("seed", "out", "cache", "workers")
METRICS = ("ka", "zs", "gm")


def read_results(folder):
    """The results.json of a finished run; ValueError where it is none, or only half of one."""
    path = Path(folder) / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        _check_results(results)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as e:
        raise ValueError(f"{path} is no run's results ({type(e).__name__}: {e})") from None
    return results


def _check_results(results):
    """What everything below relies on."""
    for row in (results["theta_0"], *results["tasks"], results["final"]):
        scores = list(row.setdefault("datasets", {}).values())
        scores += [row[metric] for metric in METRICS if row[metric] is not None]
        if not all(0 <= score <= 100 for score in scores):
            raise ValueError("a score is not between 0 and 100")
    if results["theta_0"]["ka"] is None or results["final"]["ka"] is None:
        raise ValueError("it has no KA")
    numbers = [results["seconds"], results["trained_parameters"]]
    numbers += [row[key] for row in results["tasks"] for key in ("task", "steps")]
    if not all(0 <= number < 1e15 for number in numbers):
        raise ValueError("numbers out of range")
    if not isinstance(results["config"]["method"], str) or not isinstance(results["tasks"], list):
        raise TypeError("its method is no name, or its tasks are no list")
    if not isinstance(results["theta_0_sha256"], str):
        raise TypeError("its theta_0 has no hash")


def read_runs(folders):
    """-> (folder, results) pairs of the finished runs, each once, and the folders that hold none.

    A run that continues another has the tasks of that one before its own, and so on back; those
    that are in such a lineage are not runs of their own."""
    runs = {}
    unfinished = []
    inside = set()
    for folder in map(Path, folders):
        if folder.name == "results.json":
            folder = folder.parent
        if not (folder / "results.json").exists():
            unfinished.append(folder)
            continue
        results, before = lineage(folder)
        runs.setdefault(folder.resolve(), (folder, results))
        inside.update(before)
    return [run for place, run in runs.items() if place not in inside], unfinished


def lineage(folder):
    """-> the results of a run with the tasks of those that it continues in front, and the resolved
    folders of these. A results.json says what it continues by "parent": {"run": folder}."""
    folder = Path(folder)
    results = read_results(folder)
    before = []
    parent = results.get("parent")
    while parent:
        named = Path(parent["run"])
        places = [named, folder.parent / named, folder.parent / named.name]
        place = next((p for p in places if (p / "results.json").exists()), None)
        if place is None:
            raise ValueError(f"{folder} continues {named}, which is gone: put it beside {folder}")
        folder = place
        if folder.resolve() in before:
            raise ValueError(f"{folder} continues itself: its results.json was changed")
        before.append(folder.resolve())
        older = read_results(folder)
        results = joined(older, results)
        parent = older.get("parent")
    return results, before


def joined(older, newer):
    """Results of `newer`, which continues `older`, as those of one run."""
    if older["theta_0_sha256"] != newer["theta_0_sha256"]:
        raise ValueError("a run continues one of another theta_0: its results.json was changed")
    first = min((row["task"] for row in newer["tasks"]), default=math.inf)
    tasks = [row for row in older["tasks"] if row["task"] < first] + newer["tasks"]
    both = {**newer, "theta_0": older["theta_0"], "tasks": tasks}
    if first > 1:  # else newer tells of all tasks itself
        for key in ("seconds", "gflops_spent"):
            if older.get(key) is not None and newer.get(key) is not None:
                both[key] = older[key] + newer[key]
    return both


def joint_beside(folder, identity):
    """The finished joint run of the same theta_0 in the folder that `folder` is in, as a list of at
    most one (folder, results) pair."""
    for path in sorted(Path(folder).parent.glob("*/results.json")):
        try:
            results = read_results(path.parent)
        except ValueError:  # somebody else's file must not stop a run
            continue
        if results["config"]["method"] == "joint" and results["theta_0_sha256"] == identity:
            return [(path.parent, results)]
    return []


@dataclass
class Line:
    """Runs that differ in their seed alone: a row of the table, a line of the pictures."""

    name: str
    folders: list
    runs: list

    @property
    def method(self):
        return self.runs[0]["config"]["method"]

    def rows(self, run):
        return [run["theta_0"], *run["tasks"]]

    def path(self, metric):
        """[seeds, 1 + T] scores over time, NaN where there is none."""
        rows = [[row[metric] for row in self.rows(run)] for run in self.runs]
        return np.array(rows, dtype=float)

    def ends(self, metric):
        return [run["final"][metric] for run in self.runs]

    def datasets(self):
        """-> names, [datasets, T] mean change against theta_0, NaN where there is none."""
        names = list(dict.fromkeys(n for run in self.runs for n in run["final"]["datasets"]))
        change = np.full((len(self.runs), len(names), len(self.runs[0]["tasks"])), math.nan)
        for s, run in enumerate(self.runs):
            for t, row in enumerate(run["tasks"]):
                for d, name in enumerate(names):
                    if name in row["datasets"] and name in run["theta_0"]["datasets"]:
                        before = run["theta_0"]["datasets"][name]
                        change[s, d, t] = row["datasets"][name] - before
        return names, change.mean(axis=0)


def compare(runs, free=FREE):
    """(folder, results) pairs -> list of Line, in the order of the runs. ValueError where runs do
    not compare. free: options in which the runs of one line may differ."""
    _check_comparable(runs)
    groups = {}
    for folder, results in runs:
        options = {key: v for key, v in results["config"].items() if key not in free}
        kind = json.dumps([options, len(results["tasks"])], sort_keys=True)
        seed = results["config"].get("seed")
        for repeat in itertools.count():  # a seed that is there twice begins a line of its own
            group = groups.setdefault((kind, repeat), {})
            if seed not in group:
                group[seed] = (folder, results)
                break
    groups = [sorted(group.items(), key=lambda item: str(item[0])) for group in groups.values()]
    groups = [[run for _, run in group] for group in groups]
    names = _names(groups, free)
    return [
        Line(name, [str(folder) for folder, _ in group], [results for _, results in group])
        for name, group in zip(names, groups)
    ]


def _check_comparable(runs):
    if not runs:
        raise ValueError("none of these folders holds a finished run")
    for what, of in (
        ("from different theta_0", lambda r: r["theta_0_sha256"]),
        ("over different datasets", lambda r: sorted(r["theta_0"]["datasets"])),
        ("on different data", lambda r: r.get("data_sha256")),
    ):
        kinds = {}
        for folder, results in runs:
            kinds.setdefault(json.dumps(of(results)), []).append(str(folder))
        if len(kinds) > 1:
            each = "; or ".join(" ".join(group) for group in kinds.values())
            raise ValueError(f"runs {what} do not compare, give those of one: {each}")
    first_folder, first = runs[0]
    for folder, results in runs[1:]:
        for name, score in results["theta_0"]["datasets"].items():
            if abs(score - first["theta_0"]["datasets"][name]) > 1:  # more than precision does
                raise ValueError(
                    f"theta_0 scores {first['theta_0']['datasets'][name]:.1f} on {name} in"
                    f" {first_folder} and {score:.1f} in {folder}: runs on different data do not"
                    " compare, give those of one"
                )


def _names(groups, free):
    """A name for each group, short and unlike all others. The first joint run's is "joint"."""
    configs = [group[0][1]["config"] for group in groups]
    options = [{k: v for k, v in config.items() if k not in free} for config in configs]
    taken = set()
    candidates = []
    for group, mine in zip(groups, options):
        method = group[0][1]["config"]["method"]
        folder = str(group[0][0])
        short = Path(folder).name if len(group) == 1 else _stem(group)
        if method in ("joint", "zero-shot") and method not in taken:
            short = method
            taken.add(method)
        elif short in ("joint", "zero-shot"):
            short = folder
        alike = [o for g, o in zip(groups, options) if g[0][1]["config"]["method"] == method]
        told = [f"{k}={v}" for k, v in mine.items() if any(o.get(k) != v for o in alike)]
        several = f" and {len(group) - 1} more" if len(group) > 1 else ""
        long = folder + several
        if len(group) > 1 and told:
            long = f"{short} ({', '.join(told)})"
        candidates.append([short, long, folder + several])
    names = [c[0] for c in candidates]
    for level in (1, 2):
        names = [c[level] if names.count(n) > 1 and n not in taken else n
                 for n, c in zip(names, candidates)]  # fmt: skip
    return [n if names.count(n) == 1 else f"{n} #{i + 1}" for i, n in enumerate(names)]


def _stem(group):
    """What the folders of a group are called without their seeds: merge of merge-0 and merge-1."""
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
    numbers = summarise(lines)
    files = draw_report(lines, path) if path else []
    return table(numbers, style), files


def summarise(lines):
    """-> {"theta_0": {"ka", "zs", "gm"}, "lines": [...], "words": [...]} for JSON. Each line has
    "name", "method", "folders", "seeds", "n", "tasks", "steps", "trained_parameters", and as
    {"mean", "std"} over its n seeds (std None of one; None where unknown) "ka", "zs", "gm", the
    changes against theta_0 "ka_change", "zs_change", "gm_change", "above_line" (KA above the line
    from theta_0 to joint), "forgetting", "backward", "forward", "gap_ka", "gap_zs", "gflops" (MAFs
    in units of 1e9) and "seconds"."""
    theta_0 = {metric: lines[0].runs[0]["theta_0"][metric] for metric in METRICS}
    joint = next((line for line in lines if line.name == "joint"), None)
    rows = [_summary_row(line, theta_0, joint) for line in lines]
    return {"theta_0": theta_0, "lines": rows, "words": _ranking(lines)}


def _summary_row(line, theta_0, joint):
    first = line.runs[0]
    over = [over_time(run) for run in line.runs]
    row = {
        "name": line.name,
        "method": line.method,
        "folders": line.folders,
        "seeds": [run["config"].get("seed") for run in line.runs],
        "n": len(line.runs),
        "tasks": len(first["tasks"]),
        "steps": sum(task["steps"] for task in first["tasks"]),
        "trained_parameters": first["trained_parameters"],
    }
    for metric in METRICS:
        row[metric] = _spread(line.ends(metric))
        row[f"{metric}_change"] = _spread([_minus(v, theta_0[metric]) for v in line.ends(metric)])
    row["above_line"] = None
    if joint and line is not joint:
        ends = [_spread(joint.ends(metric)) for metric in ("zs", "ka")]
        if None not in ends:
            end = [spread["mean"] for spread in ends]
            start = (theta_0["zs"], theta_0["ka"])
            points = zip(line.ends("zs"), line.ends("ka"))
            row["above_line"] = _spread([above_line(point, start, end) for point in points])
    for what in ("forgetting", "backward", "forward"):
        row[what] = _spread([scores[what] for scores in over])
    for metric in ("ka", "zs"):
        row[f"gap_{metric}"] = _spread([scores["stability_gap"][metric] for scores in over])
    row["gflops"] = _spread([run.get("gflops_spent") for run in line.runs])
    row["seconds"] = _spread([run["seconds"] for run in line.runs])
    return row


def above_line(point, theta_0, joint):
    """KA of a point (zs, ka) above the linear trade-off from theta_0 to joint, at the point's ZS;
    beyond the line's ends, above the nearer end. None without ZS."""
    if None in (*point, *theta_0, *joint):
        return None
    (left, left_ka), (right, right_ka) = sorted([tuple(theta_0), tuple(joint)])
    if point[0] >= right:
        return point[1] - right_ka
    share = max(0.0, (point[0] - left) / (right - left))
    return point[1] - (left_ka + share * (right_ka - left_ka))


def _minus(a, b):
    return None if a is None or b is None else a - b


def _spread(values):
    """{"mean", "std"} of numbers, the std that of a sample; None if one is missing."""
    values = list(values)
    if None in values:
        return None
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return {"mean": mean, "std": None}
    square = math.fsum((v - mean) ** 2 for v in values)
    return {"mean": mean, "std": math.sqrt(square / (len(values) - 1))}


def _ranking(lines):
    """Sentences: which line is best, and whether that is more than the spread of its seeds."""
    metric = "gm" if all(None not in line.ends("gm") for line in lines) else "ka"
    ranked = [line for line in lines if line.name not in ("joint", "zero-shot")]
    ranked.sort(key=lambda line: -_spread(line.ends(metric))["mean"])
    if len(ranked) < 2:
        return []
    best, next_best = ranked[:2]
    ends = [
        {run["config"].get("seed"): run["final"][metric] for run in line.runs}
        for line in (best, next_best)
    ]
    seeds = [seed for seed in ends[0] if seed in ends[1]]
    ahead = f"{best.name} has the best {metric.upper()}"
    if len(seeds) < 2:
        return [f"{ahead}; one seed says nothing about chance: run others (--seed)"]
    ahead += f", {next_best.name} the next best"
    leads = [ends[0][seed] - ends[1][seed] for seed in seeds]
    lead = _spread(leads)
    error = lead["std"] / math.sqrt(len(seeds))
    ahead += f": {lead['mean']:.1f} behind, standard error {error:.1f}, in"
    return [f"{ahead} {sum(d > 0 for d in leads)} of {len(seeds)} seeds"]


def table(numbers, style="text"):
    """summarise()'s numbers as text, markdown or JSON."""
    if style == "json":
        return json.dumps(numbers, indent=1)
    lines = numbers["lines"]
    columns = [
        ("KA", "ka", "{:.1f}"),
        ("ZS", "zs", "{:.1f}"),
        ("GM", "gm", "{:.1f}"),
        ("KA change", "ka_change", "{:+.1f}"),
        ("ZS change", "zs_change", "{:+.1f}"),
        ("above line", "above_line", "{:+.1f}"),
        ("forgetting", "forgetting", "{:.1f}"),
    ]
    columns = [c for c in columns if any(line[c[1]] is not None for line in lines)]
    head = ["run", "n", *(title for title, *_ in columns)]
    head += ["parameters", "steps", "MAFs (1e9)", "seconds"]
    start = [_number(numbers["theta_0"].get(key), "{:.1f}") for _, key, _ in columns]
    rows = [["theta_0", "", *start, "", "", "", ""]]
    for line in lines:
        cells = [_number(line[key], form) for _, key, form in columns]
        cells += [f"{line['trained_parameters']:,}", _steps(line)]
        cells += [_number(line["gflops"], "{:,.0f}", False)]
        cells += [_number(line["seconds"], "{:,.0f}", False)]
        rows.append([line["name"], str(line["n"]), *cells])
    return "\n".join([aligned([head, *rows], style), "", *numbers["words"]]).rstrip()


def _steps(line):
    tasks = line["tasks"]
    even = tasks and line["steps"] % tasks == 0
    return f"{tasks} x {line['steps'] // tasks:,}" if even else f"{line['steps']:,}"


def _number(value, form, with_std=True):
    """A number, or {"mean", "std"}, as text; "" of None."""
    if value is None:
        return ""
    if not isinstance(value, dict):
        return form.format(value)
    text = form.format(value["mean"])
    if with_std and value["std"] is not None:
        text += " +- " + form.replace("+", "").format(value["std"])
    return text


def aligned(rows, style="text"):
    """Rows of cells, the first their heads: the first column to the left, the others to the right.
    """
    rows = [[_printable(cell) for cell in row] for row in rows]
    if style == "markdown":
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        rule = ["---"] + ["--:"] * (len(rows[0]) - 1)
        return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )


def _printable(text):
    return "".join(c if c.isprintable() else "?" for c in str(text))


ROW = "{:>9} {:>7} {:>15} {:>15} {:>15}"


def run_head(results):
    """The lines above the rows that a run prints while it goes."""
    guess = [f"{m.upper()} {results['chance'][m]:.1f}" for m in ("ka", "zs")
             if results["chance"][m] is not None]  # fmt: skip
    head = ROW.format("task", "steps", "KA", "ZS", "GM")
    return f"guessing would score {', '.join(guess)}; all scores in percent\n{head.rstrip()}"


def run_row(task, steps, scores, before=None, whole=None):
    """One row of it. before: the scores of the row before, if these were on the same samples;
    whole: the scores on all samples, of which this row may have a subset."""
    cells = []
    for metric in METRICS:
        cell = "-" if scores[metric] is None else f"{scores[metric]:.1f}"
        change = _minus(scores[metric], before[metric]) if before else None
        same = before is None or before.get("samples") == scores.get("samples")
        cells.append(cell + (f" ({change:+.1f})" if change is not None and same else " " * 7))
    row = ROW.format(task, steps, *cells).rstrip()
    if whole and scores["samples"] < whole["samples"]:
        row += f"   on a class-balanced {scores['samples']:,} of {whole['samples']:,} test samples"
    return row


def words(results):
    """A run's last lines: what it did, in words."""
    start = results["theta_0"]
    end = results["final"]
    moves = [f"{m.upper()} {start[m]:.1f} -> {end[m]:.1f} ({end[m] - start[m]:+.1f})"
             for m in METRICS if start[m] is not None and end[m] is not None]  # fmt: skip
    said = [", ".join(moves)]
    change = {n: v - start["datasets"][n] for n, v in end["datasets"].items()
              if n in start["datasets"]}  # fmt: skip
    order = sorted(change, key=change.get)
    gained = [f"{_printable(n)} {change[n]:+.1f}" for n in order[::-1][:3] if change[n] > 0]
    lost = [f"{_printable(n)} {change[n]:+.1f}" for n in order[:3] if change[n] < 0]
    gains = f"gained most: {', '.join(gained) or 'none'}"
    return [*said, f"{gains}; lost most: {', '.join(lost) or 'none'}"]


def score_table(scores, roles, baseline=None):
    """A checkpoint's scores, a row a dataset. scores: {name: what classification() or retrieval()
    returned}; roles: {name: "KA" or "ZS" or ""}; baseline: scores of another checkpoint."""
    rows = [["dataset", "role", "metric", "score", "chance"]]
    rows[0] += ["before", "change"] if baseline else []
    rows[0] += ["top-5 | R@1, R@10"]
    for name, numbers in scores.items():
        row = [name, roles.get(name, ""), numbers["metric"]]
        row += [f"{numbers['score']:.1f}", f"{numbers['chance']:.1f}"]
        if baseline:
            before = baseline[name]["score"] if name in baseline else None
            row += [_number(before, "{:.1f}")]
            row += [_number(_minus(numbers["score"], before), "{:+.1f}")]
        more = [numbers.get("top5")]
        if "t2i" in numbers:
            more = [(numbers["t2i"][k] + numbers["i2t"][k]) / 2 for k in ("R@1", "R@10")]
        rows.append([*row, ", ".join(f"{v:.1f}" for v in more)])
    return aligned(rows)


def class_table(numbers, classes, baseline=None):
    """Scores per class, the worst first; classes: their names."""
    rows = [["class", "score", *(["before", "change"] if baseline else [])]]
    scores = [(s, c) for c, s in enumerate(numbers["per_class"]) if s is not None]
    for score, c in sorted(scores):
        row = [classes[c], f"{score:.1f}"]
        if baseline:
            before = baseline["per_class"][c]
            row += [_number(before, "{:.1f}"), _number(_minus(score, before), "{:+.1f}")]
        rows.append(row)
    return aligned(rows)


# ------------------------------------------------------------------------------------ a drawing kit

PAPER, INK, PALE, GREY, GOLD = "white", "black", "#e2e2e2", "#777777", "#f5b800"
# Told apart with any colour blindness (a test measures it); from the ninth line on, the marks and
# dashes change too.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#aa4499", "#56b4e9", "#882255", "#999933", "#332288"]
MARKS = ["circle", "square", "triangle", "diamond"]
DASHES = [None, (14, 5), (4, 4), (14, 4, 4, 4)]  # pixels drawn, left out, ...
ZOOM = 2  # pictures are drawn this much larger and reduced, for smooth edges


def _font(size):
    return ImageFont.load_default(size)


class Sheet:
    """A picture to draw on, in pixels of the reduced one."""

    def __init__(self, width, height):
        self.width = math.ceil(width)
        self.height = math.ceil(height)
        self.image = Image.new("RGB", (self.width * ZOOM, self.height * ZOOM), PAPER)
        self.pen = ImageDraw.Draw(self.image)

    def reduced(self):
        return self.image.reduce(ZOOM)

    def line(self, points, colour, width=2, dash=None):
        pieces = [points] if dash is None else _dashed(points, dash)
        for piece in pieces:
            scaled = [(x * ZOOM, y * ZOOM) for x, y in piece]
            self.pen.line(scaled, colour, round(width * ZOOM), joint="curve")

    def polygon(self, points, colour, outline=None, width=1):
        scaled = [(x * ZOOM, y * ZOOM) for x, y in points]
        self.pen.polygon(scaled, colour, outline, width * ZOOM)

    def box(self, left, top, right, bottom, colour=None, outline=None):
        corners = [round(v * ZOOM) for v in (left, top, right, bottom)]
        self.pen.rectangle(corners, colour, outline, ZOOM)

    def text(self, x, y, words, size=15, anchor="lm", colour=INK):
        self.pen.text((x * ZOOM, y * ZOOM), words, colour, _font(size * ZOOM), anchor=anchor)

    def text_up(self, x, y, words, size=15):
        """Text from bottom to top, its centre at x, y."""
        width = math.ceil(_font(size * ZOOM).getlength(words)) + 8
        strip = Image.new("RGB", (width, 2 * size * ZOOM), PAPER)
        pen = ImageDraw.Draw(strip)
        pen.text((width / 2, size * ZOOM), words, INK, _font(size * ZOOM), anchor="mm")
        strip = strip.rotate(90, expand=True)
        corner = (round(x * ZOOM - strip.width / 2), round(y * ZOOM - strip.height / 2))
        self.image.paste(strip, corner)

    def mark(self, shape, x, y, radius, colour, outline=PAPER):
        if shape == "circle":
            corners = [v * ZOOM for v in (x - radius, y - radius, x + radius, y + radius)]
            self.pen.ellipse(corners, colour, outline, ZOOM)
            return
        if shape == "star":
            turns = [(radius * (1, 0.42)[i % 2], 36 * i - 90) for i in range(10)]
        else:
            size, sides, turn = {
                "square": (1.15, 4, 45),
                "triangle": (1.3, 3, -90),
                "diamond": (1.3, 4, 0),
            }[shape]
            turns = [(size * radius, turn + 360 * i / sides) for i in range(sides)]
        corners = [
            (x + r * math.cos(math.radians(a)), y + r * math.sin(math.radians(a)))
            for r, a in turns
        ]
        self.polygon(corners, colour, outline)

    def shade(self, draw, colour, share=0.2):
        """Lays a transparent colour over what draw(pen) fills, once however often it is filled."""
        mask = Image.new("L", self.image.size)
        draw(ImageDraw.Draw(mask))
        self.image.paste(colour, mask=mask.point(lambda v: round(v * share)))


def _dashed(points, dash):
    """The pieces of a polyline that a pattern of lengths, drawn and left out in turn, leaves."""
    pieces = []
    piece = [points[0]]
    turn = 0
    left = dash[0]  # of this length
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        length = math.hypot(x1 - x0, y1 - y0)
        at = 0.0
        while length - at > left:
            at += left
            here = (x0 + (x1 - x0) * at / length, y0 + (y1 - y0) * at / length)
            if turn % 2 == 0:
                pieces.append([*piece, here])
            piece = [here]
            turn += 1
            left = dash[turn % len(dash)]
        left -= length - at
        piece.append((x1, y1))
    if turn % 2 == 0:
        pieces.append(piece)
    return pieces


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
        return (self.left + across * (self.right - self.left),
                self.bottom - up * (self.bottom - self.top))  # fmt: skip

    def grid(self, sheet, x_ticks, y_ticks, x_name, y_name):
        for value in x_ticks:
            x, _ = self.at(value, self.y[0])
            sheet.line([(x, self.top), (x, self.bottom)], PALE, 1)
            sheet.text(x, self.bottom + 16, f"{value:g}", 15, "mm")
        for value in y_ticks:
            _, y = self.at(self.x[0], value)
            sheet.line([(self.left, y), (self.right, y)], PALE, 1)
            sheet.text(self.left - 8, y, f"{value:g}", 15, "rm")
        sheet.box(self.left, self.top, self.right, self.bottom, outline=INK)
        sheet.text((self.left + self.right) / 2, self.bottom + 42, x_name, 17, "mm")
        sheet.text_up(self.left - 56, (self.top + self.bottom) / 2, y_name, 17)


def _step(span, most):
    """The distance of round numbers of which a span holds at most about `most`."""
    unit = 10 ** math.floor(math.log10(span / most))
    return next(unit * s for s in (1, 2, 5, 10) if span / (unit * s) <= most)


def _ticks(low, high, step):
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 9) for i in range(first, last + 1)]


class Legend:
    """Names beside their marks, long ones on several lines: nothing is cut, nothing overlaps."""

    def __init__(self, entries, foot=()):
        self.entries = [(self._wrap(name), *style) for name, *style in entries]
        self.foot = [line for words in foot for line in textwrap.wrap(words, 34)]
        texts = [text for entry in self.entries for text in entry[0]] + self.foot
        self.width = 48 + max(_font(16).getlength(text) for text in texts)
        lines = sum(len(entry[0]) for entry in self.entries)
        self.height = 21 * lines + 9 * len(self.entries) + 21 * len(self.foot) + 20

    @staticmethod
    def _wrap(name):
        return textwrap.wrap(_printable(name), 34) or ["?"]

    def draw(self, sheet, x, y):
        y += 14
        for texts, colour, mark, dash in self.entries:
            if mark != "star":
                sheet.line([(x, y), (x + 32, y)], colour, 3, dash)
            if mark:
                sheet.mark(mark, x + 16, y, 12 if mark == "star" else 6, colour, _rim(mark))
            for text in texts:
                sheet.text(x + 44, y, text, 16)
                y += 21
            y += 9
        for text in self.foot:
            sheet.text(x, y, text, 14, colour=GREY)
            y += 21


def _rim(mark):
    return INK if mark == "star" else PAPER


# ------------------------------------------------------------------------------------- the pictures

# A track is an array [seeds, 1 + T, 2] of (ZS, KA) over time, theta_0 first; ZS may be NaN.


def plot(runs, path):
    """PNG of the ZS-KA plane, fig. 2 of the paper. runs: name -> [(zs, ka), ...] over time, the
    first being theta_0: a black star. A run named "joint" is a golden star at its last point, and
    the dashed line from theta_0 to it is the linear trade-off: above it is better. "zero-shot" is
    theta_0's own. Without ZS (None) KA is drawn over time instead."""
    tracks = {n: np.array([points], dtype=float) for n, points in runs.items() if len(points)}
    sheet = draw_plane(tracks) if _has_zs(tracks) else draw_curves(tracks)
    _save(sheet.reduced(), path)


def _has_zs(tracks):
    return not any(np.isnan(track[..., 0]).any() for track in tracks.values())


def _check_tracks(tracks):
    if not tracks or not all(np.isfinite(track[..., 1]).all() for track in tracks.values()):
        raise ValueError("nothing to draw: a run has no point, or one that is not a number")


def _styles(names):
    """name -> (colour, mark, dash) of what is drawn as a line."""
    drawn = [name for name in names if name not in ("joint", "zero-shot")]
    styles = {}
    for i, name in enumerate(drawn):
        turn = i // len(COLOURS)
        mark = MARKS[turn % len(MARKS)]
        styles[name] = (COLOURS[i % len(COLOURS)], mark, DASHES[turn % len(DASHES)])
    return styles


def _deviation(track):
    """[1 + T, 2] standard deviation over seeds, 0 of one."""
    return track.std(axis=0, ddof=1) if len(track) > 1 else np.zeros(track.shape[1:])


def _legend(tracks, styles):
    entries = [("theta_0", INK, "star", None)]
    if "joint" in tracks:
        entries.append(("joint", GOLD, "star", None))
        entries.append(("linear trade-off", GREY, None, (8, 6)))
    for name, style in styles.items():
        seeds = len(tracks[name])
        entries.append((f"{name}, {seeds} seeds" if seeds > 1 else name, *style))
    several = any(len(track) > 1 for track in tracks.values())
    return Legend(entries, ["shaded: one standard deviation over the seeds"] if several else [])


def draw_plane(tracks):
    """ZS to the right and KA upwards, a point of one as long as a point of the other."""
    _check_tracks(tracks)
    styles = _styles(tracks)
    legend = _legend(tracks, styles)
    axes = _plane_axes(tracks)
    sheet = Sheet(axes.right + 24 + legend.width + 16, max(axes.bottom + 70, legend.height + 60))
    step = _step(max(axes.x[1] - axes.x[0], axes.y[1] - axes.y[0]), 9)
    ticks = [[v for v in _ticks(*side, step) if 0 <= v <= 100] for side in (axes.x, axes.y)]
    axes.grid(sheet, *ticks, "ZS, zero-shot retention (%)", "KA, knowledge accumulation (%)")
    _name_better_corner(sheet, axes)
    start = next(iter(tracks.values()))[:, 0].mean(axis=0)
    if "joint" in tracks:
        joint = tracks["joint"][:, -1].mean(axis=0)
        sheet.line([axes.at(*start), axes.at(*joint)], GREY, 2, (8, 6))
        _shade_track(sheet, axes, tracks["joint"][:, -1:], GOLD)
    for name, (colour, _, _) in styles.items():
        _shade_track(sheet, axes, tracks[name], colour)
    for name, (colour, _, dash) in styles.items():
        sheet.line([axes.at(*p) for p in tracks[name].mean(axis=0)], colour, 3, dash)
    taken = [(*axes.at(*start), 15)]
    if "joint" in tracks:
        taken.append((*axes.at(*joint), 15))
    for name, (colour, mark, _) in styles.items():
        _mark_track(sheet, axes, tracks[name].mean(axis=0), colour, mark, taken, len(styles) <= 3)
    sheet.mark("star", *axes.at(*start), 15, INK, PAPER)
    if "joint" in tracks:
        sheet.mark("star", *axes.at(*joint), 15, GOLD, INK)
    legend.draw(sheet, axes.right + 24, axes.top)
    return sheet


def _plane_axes(tracks):
    """Axes around all points and their deviations, of one scale: pixels a point of ZS or KA."""
    sides = []
    for axis in (0, 1):
        means = [t.mean(axis=0)[:, axis] for t in tracks.values()]
        spreads = [_deviation(t)[:, axis] for t in tracks.values()]
        low = min((m - s).min() for m, s in zip(means, spreads))
        high = max((m + s).max() for m, s in zip(means, spreads))
        pad = max(0.06 * (high - low), 1.0)
        sides.append((low - pad, high + pad))
    across, up = (high - low for low, high in sides)
    height = 760
    width = min(900, max(560, height * across / up))
    scale = min(width / across, height / up)
    (left, right), (low, high) = sides
    x = ((left + right - width / scale) / 2, (left + right + width / scale) / 2)
    y = ((low + high - height / scale) / 2, (low + high + height / scale) / 2)
    return Axes(90, 46, 90 + width, 46 + height, x, y)


def _name_better_corner(sheet, axes):
    x = axes.right - 4
    y = axes.top - 16
    sheet.text(x - 24, y, "better", 16, "rm", GREY)
    sheet.line([(x - 16, y + 7), (x - 2, y - 7)], GREY, 2)
    sheet.line([(x - 11, y - 7), (x - 2, y - 7), (x - 2, y + 2)], GREY, 2)


def _shade_track(sheet, axes, track, colour):
    """A band of one standard deviation in ZS and in KA around the mean."""
    if len(track) < 2:
        return
    scale = (axes.right - axes.left) / (axes.x[1] - axes.x[0]) * ZOOM
    stops = np.concatenate([track.mean(axis=0), _deviation(track)], axis=1)  # [1 + T, 4]

    def draw(pen):
        for i in range(max(1, len(stops) - 1)):
            now = stops[i]
            after = stops[min(i + 1, len(stops) - 1)]
            pieces = 2 + int(np.abs(after - now)[:2].max() * scale / 4)
            for share in np.linspace(0, 1, pieces):
                zs, ka, wide, high = now + share * (after - now)
                x, y = (v * ZOOM for v in axes.at(zs, ka))
                a, b = wide * scale, high * scale
                pen.ellipse((x - a, y - b, x + a, y + b), 255)

    sheet.shade(draw, colour)


def _mark_track(sheet, axes, points, colour, mark, taken, numbered):
    """A mark a task; the last is larger. With numbers, those marks that have room bear theirs."""
    places = [axes.at(*p) for p in points]
    for x, y in places[1:-1]:
        sheet.mark(mark, x, y, 5, colour)
    if len(places) > 1:
        sheet.mark(mark, *places[-1], 9, colour, INK)
    if not numbered:
        return
    for task in range(len(places) - 1, 0, -1):
        x, y = places[task]
        if all(math.hypot(x - a, y - b) >= 11 + r for a, b, r in taken):
            taken.append((x, y, 11))
            sheet.mark("circle", x, y, 11, colour, INK if task == len(places) - 1 else PAPER)
            sheet.text(x, y, str(task), 13, "mm", PAPER)


def draw_curves(tracks):
    """KA, ZS and GM over tasks, one below the other; without ZS, KA alone."""
    _check_tracks(tracks)
    styles = _styles(tracks)
    legend = _legend(tracks, styles)
    scores = {"KA": {n: t[..., 1] for n, t in tracks.items()}}
    if _has_zs(tracks):
        scores["ZS"] = {n: t[..., 0] for n, t in tracks.items()}
        scores["GM"] = {n: np.sqrt(t[..., 0] * t[..., 1]) for n, t in tracks.items()}
    each = 290 if len(scores) > 1 else 500
    bottom = each * len(scores)
    sheet = Sheet(90 + 620 + 24 + legend.width + 16, max(bottom + 60, legend.height + 60))
    last = max(1, *(t.shape[1] - 1 for n, t in tracks.items() if n in styles)) if styles else 1
    for i, (metric, values) in enumerate(scores.items()):
        ends = [side for v in values.values() for side in _band(v)]
        low = min(v.min() for v in ends)
        high = max(v.max() for v in ends)
        pad = max(0.06 * (high - low), 0.5)
        top = 16 + each * i
        axes = Axes(90, top, 710, top + each - 46, (0, last), (low - pad, high + pad))
        x_ticks = _ticks(0, last, max(1, _step(last, 12)))
        y_ticks = _ticks(*axes.y, _step(axes.y[1] - axes.y[0], 6))
        x_name = "finished tasks" if i == len(scores) - 1 else ""
        axes.grid(sheet, x_ticks, y_ticks, x_name, f"{metric} (%)")
        _draw_curve_lines(sheet, axes, values, styles)
    legend.draw(sheet, 734, 16)
    return sheet


def _band(values):
    """Mean minus and plus one standard deviation over seeds, [1 + T] each."""
    mean = values.mean(axis=0)
    spread = values.std(axis=0, ddof=1) if len(values) > 1 else 0 * mean
    return mean - spread, mean + spread


def _draw_curve_lines(sheet, axes, values, styles):
    if "joint" in values:
        level = values["joint"][:, -1].mean()
        sheet.line([axes.at(0, level), axes.at(axes.x[1], level)], GOLD, 3, (8, 6))
    for name, (colour, _, _) in styles.items():
        low, high = _band(values[name])
        if len(values[name]) > 1 and len(low) > 1:
            around = [axes.at(t, v) for t, v in enumerate(low)]
            around += [axes.at(t, v) for t, v in enumerate(high)][::-1]
            around = [(x * ZOOM, y * ZOOM) for x, y in around]
            sheet.shade(lambda pen, around=around: pen.polygon(around, 255), colour)
    for name, (colour, mark, dash) in styles.items():
        places = [axes.at(t, v) for t, v in enumerate(values[name].mean(axis=0))]
        sheet.line(places, colour, 3, dash)
        if len(places) <= 31:
            for x, y in places[1:]:
                sheet.mark(mark, x, y, 5, colour)
    start = next(iter(values.values()))[:, 0].mean()
    sheet.mark("star", *axes.at(0, start), 13, INK, PAPER)


def draw_heat(maps, heldout=()):
    """Change of every dataset's score against theta_0 after every task: blue gained, red lost.

    maps: list of (name, datasets, numbers of the tasks, change [D, T] in points, NaN where there
    is none). heldout: datasets that stand below a line, as those of ZS."""
    names = list(dict.fromkeys(name for _, datasets, _, _ in maps for name in datasets))
    names.sort(key=lambda name: name in heldout)  # stable: else in their order
    most = max((np.nanmax(np.abs(c)) for *_, c in maps if np.isfinite(c).any()), default=1)
    limit = min(40, 5 * math.ceil(max(most, 1) / 5))
    columns = max(len(tasks) for _, _, tasks, _ in maps)
    cell = max(3, min(40, 640 // columns))
    label = 20 + max(_font(14).getlength(_printable(name)) for name in names)
    panel_width = max(cell * columns, 90) + 26
    panel_height = 21 * len(names) + 70
    beside = max(1, min(len(maps), int((2200 - label) // panel_width)))
    deep = -(-len(maps) // beside)
    sheet = Sheet(max(label + beside * panel_width, 520), deep * panel_height + 76)
    for i, (name, datasets, tasks, change) in enumerate(maps):
        left = label + i % beside * panel_width
        top = i // beside * panel_height + 52
        shown = _shorten(name, panel_width - 10, 16)
        sheet.text(left, top - 36, shown, 16)
        if i % beside == 0:
            for row, dataset in enumerate(names):
                sheet.text(label - 10, top + 21 * row + 10, _printable(dataset), 14, "rm")
        order = [datasets.index(n) if n in datasets else None for n in names]
        _draw_cells(sheet, left, top, cell, change, order, limit)
        _number_columns(sheet, left, top - 10, cell, tasks)
        split = sum(n not in heldout for n in names)
        if 0 < split < len(names):
            y = top + 21 * split
            sheet.line([(left - 6, y), (left + cell * len(tasks), y)], INK, 2)
    _draw_scale(sheet, label, deep * panel_height + 40, limit)
    return sheet


def _shorten(text, width, size):
    """The text, its middle left out where it is too long: these names are in full in the legend."""
    text = _printable(text)
    keep = len(text)
    short = text
    while _font(size).getlength(short) > width and keep > 2:
        keep -= 1
        short = text[: keep // 2] + "..." + text[len(text) - (keep - keep // 2) :]
    return short


def _draw_cells(sheet, left, top, cell, change, order, limit):
    for row, index in enumerate(order):
        for column in range(change.shape[1]):
            value = math.nan if index is None else change[index, column]
            x = left + cell * column
            y = top + 21 * row
            colour = "#eeeeee" if math.isnan(value) else _blue_white_red(value / limit)
            sheet.box(x, y, x + cell, y + 21, colour)
            if cell >= 32 and not math.isnan(value):
                dark = abs(value / limit) > 0.6
                sheet.text(x + cell / 2, y + 10, f"{value:+.0f}", 13, "mm", PAPER if dark else INK)


def _number_columns(sheet, left, y, cell, tasks):
    """Numbers of the tasks above their columns, as many as there is room for."""
    room = max(_font(13).getlength(str(t)) for t in tasks) + 6
    every = max(1, math.ceil(room / cell))
    for column in range(0, len(tasks), every):
        sheet.text(left + cell * (column + 0.5), y, str(tasks[column]), 13, "mm", GREY)


def _blue_white_red(share):
    """1 is blue, 0 white, -1 red; lightness falls evenly to both sides."""
    end = (5, 80, 160) if share > 0 else (178, 24, 43)
    share = min(1.0, abs(share))
    return tuple(round(255 + share * (v - 255)) for v in end)


def _draw_scale(sheet, left, y, limit):
    for i in range(81):
        sheet.box(left + 2 * i, y - 8, left + 2 * i + 2, y + 8, _blue_white_red(i / 40 - 1))
    sheet.text(left, y + 18, f"-{limit}", 13, "lm")
    sheet.text(left + 81, y + 18, "0", 13, "mm")
    sheet.text(left + 162, y + 18, f"+{limit}", 13, "rm")
    sheet.text(left + 176, y, "points against theta_0, after each task", 14)


# ---------------------------------------------------------------------------- pictures of the runs


def draw_report(lines, path):
    """Writes the picture of lines at path, and beside it each of its parts alone: -> the files."""
    return _write_parts(_parts(lines), path, f"{sum(len(line.runs) for line in lines)} runs")


def page(results, path, beside=()):
    """Writes the picture of one run: plane, curves and heat map, a title over them.
    beside: (folder, results) pairs of other runs to draw in the plane, as the joint one."""
    config = results["config"]
    name = config["method"] if config["method"] in ("joint", "zero-shot") else "this run"
    line = Line(name, [str(config.get("out"))], [results])
    others = compare(list(beside)) if beside else []
    parts = _parts([line, *(other for other in others if other.name != name)], 1)
    _save(_together(parts, run_title(results)), path)


def run_title(results):
    """The experiment in a line: method, T, budget, seed."""
    config = results["config"]
    steps = sorted({row["steps"] for row in results["tasks"]})
    said = [config["method"], f"T = {len(results['tasks'])}"]
    if len(steps) == 1:
        said.append(f"{steps[0]:,} steps a task")
    if results.get("gflops"):
        said.append(f"budget {results['gflops']:,.0f} GFLOPs")
    said.append(f"seed {config.get('seed')}")
    return ", ".join(said)


def _parts(lines, maps=None):
    """{"plane", "curves", "heat": picture}, those that there is something for."""
    tracks = {}
    for line in lines:
        tracks[line.name] = np.stack([line.path("zs"), line.path("ka")], axis=-1)
    parts = {}
    if _has_zs(tracks):
        parts["plane"] = draw_plane(tracks).reduced()
    parts["curves"] = draw_curves(tracks).reduced()
    heat = []
    for line in lines[:maps]:
        datasets, change = line.datasets()
        tasks = [row["task"] for row in line.runs[0]["tasks"]]
        if tasks and np.isfinite(change).any():
            heat.append((line.name, datasets, tasks, change))
    heldout = {name for line in lines for name in line.runs[0].get("heldout", ())}
    if heat:
        parts["heat"] = draw_heat(heat, heldout).reduced()
    return parts


def _together(parts, title):
    """One picture: a title, plane and curves side by side, the heat map below."""
    upper = [parts[key] for key in ("plane", "curves") if key in parts]
    rows = [upper] + ([[parts["heat"]]] if "heat" in parts else [])
    width = max(sum(p.width for p in row) + 30 * (len(row) + 1) for row in rows)
    head = textwrap.wrap(_printable(title), max(20, width // 12))
    top = 30 + 30 * len(head)
    height = top + sum(max(p.height for p in row) + 30 for row in rows)
    whole = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(whole)
    for i, text in enumerate(head):
        pen.text((30, 20 + 30 * i), text, INK, _font(24))
    for row in rows:
        left = 30
        for part in row:
            whole.paste(part, (left, top))
            left += part.width + 30
        top += max(p.height for p in row) + 30
    return whole


def _write_parts(parts, path, title):
    path = Path(path)
    files = [path]
    _save(_together(parts, title), path)
    for name, part in parts.items():
        files.append(path.with_name(f"{path.stem}-{name}{path.suffix}"))
        _save(part, files[-1])
    return files


def _save(image, path):
    """Whole or not at all."""
    aside = f"{path}.part"
    try:
        image.save(aside, "PNG")
        os.replace(aside, path)
    finally:
        Path(aside).unlink(missing_ok=True)
