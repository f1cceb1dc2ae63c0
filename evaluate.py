"""Scores of a continually trained CLIP, the gate of an update, the table over runs, one picture.

Roth et al. 2024 (arXiv 2408.14471), sec. 3.4. Scores are percentages. Stands alone; copy it:

    import evaluate, torch
    encode_text = lambda prompts: torch.randn(len(prompts), 64)  # list[str] -> [n, D]: a CLIP's
    weights = evaluate.classifier(encode_text, ["a photo of a cat.", "a photo of a dog."])
    print(evaluate.accuracy(torch.randn(100, 64), weights, labels=[0, 1] * 50))  # about 50
    merge = [(70.4, 38.9), (70.6, 45.0), (70.1, 52.0)]  # (ZS, KA) over time, from theta_0 on
    evaluate.plot({"merge": merge, "joint": [merge[0], (65.4, 59.5)]}, "picture.png")
"""

import itertools
import json
import math
import operator
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

# -------------------------------------------------------------------------- scores from features

# Similarities nearer than this are equal; else rounding would rank equal captions or classes.
TIE = {torch.float32: 1e-6, torch.float64: 1e-12}
PART = 2**24  # similarities at a time, 64 MiB in float32


def classifier(encode_text, prompts, templates=None):
    """The zero-shot classifier [C, D], L2-normalised. encode_text: list[str] -> [n, D]. prompts: a
    string a class. With templates they are class names, put where a template has {}; normalised
    features of a class's prompts are averaged (Radford et al. 2021, arXiv 2103.00020, 3.1.4)."""
    texts = [t.replace("{}", name) for name in prompts for t in templates or ["{}"]]
    features = _unit(encode_text(texts))  # [C * templates, D]
    return F.normalize(features.unflatten(0, (len(prompts), -1)).mean(dim=1), dim=-1)


def read_templates(path):
    """Templates with {} where the class name goes: a JSON list, or one a line, which may be quoted
    and end with a comma as in a Python list. ValueError for a line without {}."""
    text = Path(path).read_text("utf-8-sig").strip()
    lines = map(str, json.loads(text) if text.startswith("[") else text.splitlines())
    quoted = r"""^(["'])(.*)\1,?$"""
    templates = [re.sub(quoted, r"\2", line.strip()) for line in lines if line.strip()]
    unusable = [template for template in templates or [text] if "{}" not in template]
    if unusable:
        raise ValueError(f"{path}: {unusable[0]!r} has no {{}} where the class name goes")
    return templates


def accuracy(image, classifier, labels, k=1):
    """Top-k in percent. image [N, D] and classifier [C, D] of any length, labels [N]."""
    return _percent(_hit(k, *_ranks(image, classifier, range(len(image)), labels)))


def classification(image, classifier, labels):
    """All numbers of a classification set, in percent; arguments as of accuracy(). score is top1.
    A class without pictures is None in per_class [C], and not in the mean."""
    ranks = _ranks(image, classifier, range(len(image)), labels)
    hits = _hit(1, *ranks)
    per_class = _per_class(hits, labels, len(classifier))
    return {"metric": "top-1", "samples": len(hits), "score": _percent(hits),
            "top1": _percent(hits), "top5": _percent(_hit(5, *ranks)),
            "mean_per_class": _mean(per_class), "per_class": per_class,
            "chance": 100 / len(classifier)}  # fmt: skip


def recall_at_k(image, text, owner, k=5):
    """R@k in percent, of images [N, D] and texts [M, D]; text j describes image owner[j].
    -> (text-to-image: the share of texts whose image is among the k nearest, image-to-text: the
    share of images that have one of their texts among the k nearest)."""
    return (_percent(_hit(k, *_ranks(text, image, range(len(text)), owner))),
            _percent(_hit(k, *_ranks(image, text, owner, range(len(text))))))  # fmt: skip


def retrieval(image, text, owner, labels=None, classes=None):
    """All numbers of a retrieval set, in percent; image, text and owner as of recall_at_k(). score
    is the mean of both R@5. per_class: with labels [N] below classes the score of a class's
    pictures and their texts among all, [C]; else None."""
    ranks = {"t2i": _ranks(text, image, range(len(text)), owner),
             "i2t": _ranks(image, text, owner, range(len(text)))}  # fmt: skip
    recall = {way: {f"R@{k}": _percent(_hit(k, *ranks[way])) for k in (1, 5, 10)} for way in ranks}
    owner = torch.as_tensor(owner, device=image.device)
    count = torch.bincount(owner, minlength=len(image))  # texts an image
    guess = _percent(_hit(5, torch.zeros_like(count), len(text) - count, count))
    per_class = None
    if labels is not None:
        labels = torch.as_tensor(labels, device=image.device)
        both = zip(_per_class(_hit(5, *ranks["t2i"]), labels[owner], classes),
                   _per_class(_hit(5, *ranks["i2t"]), labels, classes))  # fmt: skip
        per_class = [_mean(pair) for pair in both]
    return {"metric": "R@5", "samples": len(image), **recall, "per_class": per_class,
            "score": (recall["t2i"]["R@5"] + recall["i2t"]["R@5"]) / 2,
            "chance": (100 * min(1, 5 / len(image)) + guess) / 2}  # fmt: skip


def _unit(features):
    """L2-normalised rows, in float32 or, if they are, float64."""
    if not features.isfinite().all():
        raise ValueError("features are not finite: the model diverged, or overflows in fp16")
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def _ranks(queries, candidates, query, candidate):
    """queries [Q, D], candidates [C, D]; for each p, candidate[p] is right for query[p]. -> [3, Q]:
    wrong candidates nearer to a query than the nearest right one, wrong ones as near, right ones
    that near."""
    query = torch.as_tensor(query, device=queries.device)
    candidate = torch.as_tensor(candidate, device=queries.device)
    if not 0 < len(query) == len(candidate):
        raise ValueError(f"{len(query)} samples with {len(candidate)} labels: nothing to score")
    if candidate.min() < 0 or candidate.max() >= len(candidates):
        raise ValueError(f"labels {candidate.min()} to {candidate.max()} over {len(candidates)}")
    candidates = _unit(candidates)
    counts = []
    size = max(1, PART // len(candidates))
    for i in range(0, len(queries), size):
        part = _unit(queries[i : i + size])
        dtype = torch.promote_types(part.dtype, candidates.dtype)
        similarity = part.to(dtype) @ candidates.to(dtype).T  # [n, C]
        pairs = (query >= i) & (query < i + size)
        row = query[pairs] - i
        own = similarity[row, candidate[pairs]]
        best = own.new_full([len(part)], -math.inf).scatter_reduce(0, row, own, "amax")
        similarity[row, candidate[pairs]] = -math.inf
        right = torch.bincount(row[own >= best[row] - TIE[dtype]], minlength=len(part))
        nearer = (similarity > best[:, None] + TIE[dtype]).sum(dim=1)
        near = (similarity >= best[:, None] - TIE[dtype]).sum(dim=1)
        counts.append(torch.stack([nearer, near - nearer, right]))
    return torch.cat(counts, dim=1)


def _hit(k, better, equal, own):
    """[n] float64: the chance that one of `own` candidates is among the k nearest, if `better` are
    nearer and the order of `equal` others as near is drawn. Features that are all the same score
    what guessing scores, not 100."""
    places = (k - better).clamp(min=0)
    miss = torch.ones(better.shape, dtype=torch.float64, device=better.device)
    for i in range(k):
        missed = (equal - i).clamp(min=0).double() / (equal + own - i).clamp(min=1)
        miss = torch.where(i < places, miss * missed, miss)  # the i-th place goes to another
    return torch.where(own > 0, 1 - miss, 0.0)  # an image without texts is never found


def _percent(hits):
    """fsum rounds once, whatever the order: the same bits for any order of the samples."""
    return 100 * math.fsum(hits.tolist()) / len(hits) if len(hits) else None


def _per_class(hits, labels, classes):
    labels = torch.as_tensor(labels, device=hits.device)
    return [_percent(hits[labels == c]) for c in range(classes)]


def balanced_subset(labels, seed):
    """Sorted indices of min(N, max(2C, 300, N / 10)) samples, classes as equal as they can be: what
    the paper scores between the first and the last task. A pure function of its arguments."""
    labels = np.asarray(labels)
    size = min(len(labels), max(2 * len(np.unique(labels)), 300, len(labels) // 10))
    shuffled = np.random.default_rng((seed, 6)).permutation(len(labels))
    turn = np.empty(len(labels), int)  # a sample is the turn-th of its class
    for c in np.unique(labels):
        turn[shuffled[labels[shuffled] == c]] = np.arange((labels == c).sum())
    return np.sort(shuffled[np.argsort(turn[shuffled], kind="stable")][:size])


# ---------------------------------------------------------------------- KA, ZS, GM and the gate

METRICS = ("ka", "zs", "gm")
TAUGHT = ("earlier", "new")  # scores over the classes of the tasks before a task, and of this task
HOLDS = {"<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge}  # in a gate
SCORE = "{:.1f}"
CHANGE = "{:+z.1f}"  # z: no minus before 0.0


def knowledge_accumulation(per_dataset):
    """KA, the mean over datasets to adapt to, weighing the same. per_dataset: name -> percent."""
    return _mean(per_dataset.values())


zero_shot_retention = knowledge_accumulation  # ZS: the same over the datasets held out


def geometric_mean(ka, zs):
    """GM = sqrt(KA ZS); None without one of them."""
    return None if ka is None or zs is None else math.sqrt(ka * zs)


def summary(scores, adaptation, heldout):
    """{"ka", "zs", "gm", "datasets"} of scores: name -> percent, and the names of both roles."""
    ka = knowledge_accumulation({name: scores[name] for name in adaptation})
    zs = zero_shot_retention({name: scores[name] for name in heldout})
    return {"ka": ka, "zs": zs, "gm": geometric_mean(ka, zs), "datasets": dict(scores)}


def chance(adaptation, heldout):
    """The summary of guessing, 1 / C and about 5 / N for R@5, on the datasets of both roles."""
    guess = {d.name: 100 / len(d.classes) if d.kind == "classification" else
             100 * min(1, 5 / len(d.test)) for d in [*adaptation, *heldout]}  # fmt: skip
    return summary(guess, [d.name for d in adaptation], [d.name for d in heldout])


def over_concepts(per_class, concepts):
    """`earlier` or `new`: the mean over datasets of the mean over their classes among the concepts,
    (dataset, class) each; None where none is scored. per_class: {dataset: {class: percent}}."""
    scores = {}
    for dataset, name in dict.fromkeys(map(tuple, concepts)):  # taught twice, a class counts once
        scores.setdefault(dataset, []).append(per_class.get(dataset, {}).get(name))
    return _mean([_mean(of_classes) for of_classes in scores.values()])


def forgetting(history):
    """Mean over datasets of best score so far - last score. history: list over time of {name:
    percent}. Chaudhry et al. 2018 (arXiv 1801.10112), eq. 3, on datasets instead of tasks."""
    last = history[-1]
    return _mean([max(scores[n] for scores in history) - last[n] for n in last])


def above_line(point, theta_0, joint):
    """KA of a point (zs, ka) above the linear trade-off from theta_0 to joint, at the point's ZS;
    beyond the line's ends, above the nearer end. None where a ZS or the joint run is missing."""
    if None in (*point, *theta_0, *joint):
        return None
    (left, left_ka), (right, right_ka) = sorted([tuple(theta_0), tuple(joint)])
    if point[0] >= right:
        return point[1] - right_ka
    share = (point[0] - left) / (right - left) if point[0] > left else 0.0
    return point[1] - (left_ka + share * (right_ka - left_ka))


def _mean(values):
    """The mean of those that are not None; None where all are. fsum rounds once, in any order."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _minus(a, b):
    return None if a is None or b is None else a - b


def conditions(gate):
    """What has to hold for an update to be shipped, as "zs >= -1, photos >= -3" in points against
    the weights before it, or None -> [(name, "<" or ">" or "<=" or ">=", points)]."""
    form = r"\s*([^<>=]+?)\s*([<>]=?)\s*([-+]?\d*\.?\d+)\s*"
    matches = [re.fullmatch(form, condition) for condition in gate.split(",")] if gate else []
    if not all(matches):
        raise ValueError(f'--gate is like "zs >= -1, earlier >= -2, photos >= -3", not {gate!r}')
    return [(match[1], match[2], float(match[3])) for match in matches]


def check_gate(gate, datasets, heldout, taught=True):
    """ValueError for what is not scored. datasets, heldout: names; taught: by earlier tasks?"""
    names = [*(METRICS if heldout else ["ka"]), *(TAUGHT if taught else ())]
    for name, _, _ in conditions(gate):
        if name not in datasets and name.lower() not in names:
            raise ValueError(f"--gate: {name} is not scored, only {', '.join([*names, *datasets])}")


def gate_failures(gate, before, after, per_class_before, per_class_after, about=None):
    """A sentence for each condition that does not hold, with the three classes that lost most.
    before, after: rows of results.json; per_class: {dataset: {class: percent or None}}. about: the
    classes of a mean, {"ka" or "earlier" or ...: list of (dataset, class)}; all where not given."""
    old = before | {key: after[f"{key}_before"] for key in TAUGHT} | before["datasets"]
    new = after | after["datasets"]
    of_sets = {name: [(name, c) for c in classes] for name, classes in per_class_after.items()}
    failures = []
    for name, sign, points in conditions(gate):
        key = name if name in new else name.lower()
        change = _minus(new.get(key), old.get(key))
        if change is None:
            failures.append(f"{name} is not scored: {name} {sign} {points:g} cannot hold")
        elif not HOLDS[sign](round(change, 9), points):  # 8.2 - 7.2 is a little less than 1
            classes = of_sets.get(key, (about or {}).get(key))
            lost = _most(_flat(per_class_before), _flat(per_class_after, classes), -1)
            failures.append(f"{name} {change:+.1f}, not {sign} {points:g}; lost most: {lost}")
    return failures


def _flat(per_class, classes=None):
    """{"mug of photos": percent or None}, of a list of (dataset, class), or of all."""
    if classes is None:
        classes = [(dataset, name) for dataset, names in per_class.items() for name in names]
    return {f"{name} of {d}": per_class.get(d, {}).get(name) for d, name in classes}


def _most(old, new, sign):
    """The three of {name: percent or None} that gained most, or with sign -1 lost most."""
    sizes = [(sign * (new[name] - old[name]), f"{name} {old[name]:.1f} -> {new[name]:.1f}")
             for name in new if None not in (new[name], old.get(name))]  # fmt: skip
    return ", ".join(text for size, text in sorted(sizes)[:-4:-1] if size > 0) or "none"


# --------------------------------------------------------------------------- runs and their table

REFERENCES = ("joint", "zero-shot")  # methods whose lines the picture draws in their own way
FREE = ("seed", "out", "continue_", "gate", "plan", "eval_every", "cache", "workers")  # no score
COLUMNS = [("KA", "ka", SCORE), ("ZS", "zs", SCORE), ("GM", "gm", SCORE),
           ("KA change", "ka_change", CHANGE), ("ZS change", "zs_change", CHANGE),
           ("above line", "above_line", CHANGE), ("earlier", "earlier", SCORE),
           ("new", "new", SCORE), ("forgetting", "forgetting", SCORE),
           ("MAFs (1e9)", "gflops", "{:,.0f}"), ("seconds", "seconds", "{:,.0f}")]  # fmt: skip
ROW = "{:>9} {:>7}  {:>5} {:7}  {:>5} {:7}  {:>5} {:7}  {}"


def rows(results):
    """All rows of a results.json, "task" being the number of finished tasks: of theta_0, of the
    weights that an update began from, where the tasks before are not there, and of each task."""
    before = [results["before"]] if results.get("before") else []
    return [{**results["theta_0"], "task": 0}, *before, *results["tasks"]]


def read_results(folder):
    """The results.json of a finished run; "within" are its scores within tasks, from its log."""
    path = Path(folder) / "results.json"
    try:
        results = json.loads(path.read_text("utf-8"))
        steps = {row["task"]: row["steps"] for row in results["tasks"]}
        log = path.with_name("log.jsonl")
        events = map(json.loads, log.read_text("utf-8").splitlines() if log.exists() else ())
        results["within"] = [{**row, "task": row["task"] - 1 + row["step"] / steps[row["task"]]}
                             for row in events if row["event"] == "within"]  # fmt: skip
        report([(folder, results)])  # all that a report needs is there
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as e:
        raise ValueError(f"{path} is no finished run's ({type(e).__name__}: {e})") from None
    return results


@dataclass
class Line:
    """Runs that differ in their seed alone: a row of the table, a line of the picture."""

    name: str
    folders: list
    runs: list

    def track(self, x="zs", y="ka"):
        """[seeds, rows, 2] over time, theta_0 first: (ZS, KA), or other entries of the rows, as
        "task", the number of finished tasks. NaN where something is not scored."""
        return np.array([[(r.get(x), r.get(y)) for r in rows(run)] for run in self.runs], float)


def compare(runs, free=FREE):
    """(folder, results) pairs -> list of Line, in their order: a folder once, no run that another
    continues. ValueError where runs do not compare. free: options that differ within a Line."""
    runs = {Path(folder).resolve(): (str(folder), run) for folder, run in runs}.values()
    continued = [run["parent"]["weights_sha256"] for _, run in runs if run["parent"]]
    runs = [(folder, run) for folder, run in runs if run["weights_sha256"] not in continued]
    kinds = {}
    for folder, run in runs:
        kind = [run["theta_0_sha256"], run["test_sha256"], sorted(run["heldout"])]
        kinds.setdefault(json.dumps([*kind, run["config"].get("score_subset")]), folder)
    if len(kinds) != 1:
        raise ValueError("give runs of one theta_0, on the same test data, held-out datasets and"
                         f" --score-subset, not {', '.join(kinds.values()) or 'none'}")  # fmt: skip
    groups = {}
    for folder, run in runs:
        options = {name: value for name, value in run["config"].items() if name not in free}
        tasks = [row["task"] for row in rows(run)]
        kind = json.dumps([options, tasks, run["train_sha256"]], sort_keys=True)
        while run["config"]["seed"] in groups.get(kind, {}):
            kind += ", again"  # a seed that was run twice is no second seed
        groups.setdefault(kind, {})[run["config"]["seed"]] = (folder, run)
    lines = []
    for group in groups.values():
        folders, members = map(list, zip(*group.values()))
        lines.append(Line(_name(folders, members[0], lines), folders, members))
    return lines


def _name(folders, run, others):
    """What the names of a line's folders begin with, or where that is taken its first folder."""
    method = run["config"]["method"]
    name = os.path.commonprefix([Path(folder).name for folder in folders]).rstrip("-_. =")
    name = method if not name or {name, method} & {*REFERENCES} else name  # only joint is "joint"
    return folders[0] if name in [line.name for line in others] else name


def report(runs, path=None, style="text", free=FREE):
    """The table of (folder, results) pairs, as text, markdown or JSON; their picture at path."""
    lines = compare(runs, free)
    if path:
        plot(lines, path, lines[0].name if len(lines) == 1 else f"{len(lines)} experiments")
    return table(summarise(lines), style)


def summarise(lines):
    """-> {"theta_0": {"ka", "zs", "gm"}, "lines": [...], "words": [sentences]} for JSON. Numbers of
    a line are {"mean", "std", "n"} over its seeds; std is None of one, all is None if unknown."""
    joint = [run["final"] for line in lines if line.name == "joint" for run in line.runs]
    goal = [_mean([row[metric] for row in joint]) for metric in ("zs", "ka")]
    summaries = []
    sentences = _ranking(lines)
    for line in lines:
        runs = line.runs
        ends = [(run["final"], run["theta_0"]) for run in runs]
        numbers = {key: [end[key] for end, _ in ends] for key in (*METRICS, *TAUGHT)}
        numbers |= {f"{m}_change": [_minus(e[m], start[m]) for e, start in ends] for m in METRICS}
        numbers["above_line"] = [above_line(*((row["zs"], row["ka"]) for row in pair), goal)
                                 for pair in ends if line.name != "joint"] or [None]  # fmt: skip
        numbers["forgetting"] = [forgetting([r["datasets"] for r in rows(run)]) for run in runs]
        numbers["gflops"] = [run["gflops_spent"] for run in runs]
        numbers["seconds"] = [run["seconds"] for run in runs]
        summaries.append({
            "name": line.name, "method": runs[0]["config"]["method"], "folders": line.folders,
            "seeds": [run["config"]["seed"] for run in runs], "tasks": len(runs[0]["tasks"]),
            "steps": sum(task["steps"] for task in runs[0]["tasks"]),
            "trained_parameters": runs[0]["trained_parameters"],
            **{key: _spread(values) for key, values in numbers.items()},
        })  # fmt: skip
        for folder, run in zip(line.folders, runs):
            if run["gate_failed"]:
                sentences.append(f"{folder} ships its old weights: {'; '.join(run['gate_failed'])}")
            if run["before"]:
                first = run["before"]["task"]
                sentences.append(f"{folder}: rows up to task {first} are on other test data")
    theta_0 = {metric: lines[0].runs[0]["theta_0"][metric] for metric in METRICS}
    return {"theta_0": theta_0, "lines": summaries, "words": sentences}


def _spread(values):
    """{"mean", "std", "n"} of numbers, the std that of a sample; None if one is missing."""
    if None in values:
        return None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": _mean(values), "std": std, "n": len(values)}


def _ranking(lines):
    """A sentence: which line is best, and by how much more than its seeds differ."""
    metric = "ka" if lines[0].runs[0]["final"]["gm"] is None else "gm"
    finals = {line.name: {run["config"]["seed"]: run["final"][metric] for run in line.runs}
              for line in lines if line.name not in REFERENCES}  # fmt: skip
    if len(finals) < 2:
        return []
    best, second = sorted(finals, key=lambda name: -_mean(finals[name].values()))[:2]
    leads = [finals[best][seed] - finals[second][seed] for seed in finals[best]
             if seed in finals[second]]  # fmt: skip
    sentence = f"{best} has the best {metric.upper()}"
    if len(leads) < 2:
        return [f"{sentence}; one seed says nothing about chance, run others (--seed)"]
    error = np.std(leads, ddof=1) / math.sqrt(len(leads))
    ahead = f"ahead in {sum(lead > 0 for lead in leads)} of {len(leads)} seeds"
    lead = f"{CHANGE.format(_mean(leads))}, standard error {error:.1f}, {ahead}"
    return [f"{sentence}, {second} the next ({lead})"]


def table(numbers, style="text"):
    """summarise()'s numbers as text, markdown or JSON."""
    if style == "json":
        return json.dumps(numbers, indent=1)
    columns = [column for column in COLUMNS if any(line[column[1]] for line in numbers["lines"])]
    heads = ["run", "seeds", "tasks", "steps", "parameters", *(title for title, _, _ in columns)]
    start = [_number(numbers["theta_0"].get(key), form) for _, key, form in columns]
    cells = [heads, ["theta_0", "", "", "", "", *start]]
    for line in numbers["lines"]:
        counts = (len(line["seeds"]), line["tasks"], line["steps"], line["trained_parameters"])
        scores = [_number(line[key], form) for _, key, form in columns]
        cells.append([line["name"], *map("{:,}".format, counts), *scores])
    return "\n".join([aligned(cells, style), "", *numbers["words"]]).rstrip()


def _number(value, form=SCORE):
    """A number, or {"mean", "std"}, as text; "" of None."""
    if value is None:
        return ""
    mean, std = (value["mean"], value["std"]) if isinstance(value, dict) else (value, None)
    return form.format(mean) + ("" if std is None else f" +- {form.replace('+', '').format(std)}")


def aligned(cells, style="text"):
    """Rows of cells as a table, the first their heads; all columns but the first to the right."""
    if style == "markdown":
        rule = ["---"] + ["--:"] * (len(cells[0]) - 1)
        return "\n".join("| " + " | ".join(row) + " |" for row in [cells[0], rule, *cells[1:]])
    first, *others = [max(map(len, column)) for column in zip(*cells)]
    cells = [[row[0].ljust(first), *map(str.rjust, row[1:], others)] for row in cells]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def run_head(results):
    """The head of the table that a run prints while it goes, and the rows that are there."""
    guess = [f"{metric.upper()} {results['chance'][metric]:.1f}" for metric in ("ka", "zs")
             if results["chance"][metric] is not None]  # fmt: skip
    head = ROW.format("task", "steps", "KA", "", "ZS", "", "GM", "", "").rstrip()
    table = rows(results) if results["theta_0"] else []
    names = ["theta_0" if not row["task"] else row["task"] if "steps" in row else "before"
             for row in table]
    lines = map(run_row, names, [row.get("steps", "") for row in table], table, [None, *table])
    return "\n".join([f"guessing would score {', '.join(guess)}, in percent", head, *lines])


def run_row(label, steps, row, before=None):
    """One of these rows, with the changes against the row before it, on the same classes."""
    cells = []
    for metric in METRICS:
        change = _number(_minus(row[metric], before and before[metric]), CHANGE)
        cells += [_number(row[metric]), change and f"({change})"]
    taught = [f"{key} {_number(row[f'{key}_before'])} -> {_number(row[key])}" for key in TAUGHT
              if row[key] is not None]  # fmt: skip
    return ROW.format(label, steps, *cells, ", ".join(taught)).rstrip()


def words(results):
    """A run's last lines: what it did, in words, down to the classes that it cost."""
    start = results["theta_0"]
    end = results["final"]
    moves = [f"{m.upper()} {end[m] - start[m]:+z.1f}" for m in METRICS if start[m] is not None]
    sentences = [f"against theta_0: {', '.join(moves)}"]
    base = "before" if results["before"] else "theta_0"
    classes = [_flat(results["per_class"][of]) for of in (base, "final")]
    datasets = [results[of]["datasets"] for of in (base, "final")]
    for what, both in (("datasets", datasets), ("classes", classes)):
        sentences.append(f"{what} gained most: {_most(*both, 1)}; lost most: {_most(*both, -1)}")
    for metric in ("ka", "zs"):
        guess = results["chance"][metric]
        if guess and start[metric] > 4 * guess and end[metric] < 2 * guess:
            sentences.append(f"{metric.upper()} fell to guessing: the model is broken, lower --lr")
    return sentences


def score_table(scores, roles, baseline=None):
    """A checkpoint's scores, a row a dataset. scores: {name: what classification() or retrieval()
    returned}; roles: {name: "KA" or "ZS"}; baseline: scores of another checkpoint."""
    cells = [["dataset", "role", "metric", "score", "chance", "top-5", "mean", "old", "change"]]
    for name, n in scores.items():
        old = (baseline or {}).get(name, {}).get("score")
        numbers = [n["score"], n["chance"], n.get("top5"), n.get("mean_per_class"), old]
        cells.append([name, roles[name], n["metric"], *map(_number, numbers),
                      _number(_minus(n["score"], old), CHANGE)])  # fmt: skip
    kept = [i for i in range(len(cells[0])) if any(row[i] for row in cells[1:])]
    return aligned([[row[i] for i in kept] for row in cells])


def class_table(numbers, classes, baseline=None):
    """Scores per class, the worst first. numbers: what classification() or retrieval() returned;
    classes: their names; baseline: numbers of another checkpoint on the same classes."""
    before = (baseline or {}).get("per_class") or [None] * len(classes)
    both = zip(numbers["per_class"], classes, before, strict=True)
    cells = [["class", "score", "old", "change"]]
    for score, name, old in sorted((b for b in both if b[0] is not None), key=lambda b: b[0]):
        cells.append([name, _number(score), _number(old), _number(_minus(score, old), CHANGE)])
    return aligned(cells if baseline else [row[:2] for row in cells])


# ------------------------------------------------------------------------------------ the picture

INK, GREY, PALE, GOLD = "#000000", "#777777", "#e2e2e2", "#f5b800"
# Colours that any colour-blind person tells apart; from the ninth line on the mark changes too.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#48bfef", "#882255", "#a6b25f", "#222255"]
SIDES = (36, 4, 3, 5)  # of the marks: circle, diamond, triangle, pentagon
FONT = ImageFont.load_default(26)
STAR = 10  # sides, of every second of which the corner lies inwards
AXES = {"zs": "ZS (%)", "ka": "KA (%)", "earlier": "classes of earlier tasks (%)",
        "new": "classes of this task (%)", "task": "finished tasks"}  # fmt: skip
SIDE = 1240  # of the plane, in pixels of a picture that is drawn twice as large and reduced


def plot(runs, path, title=""):
    """PNG of the ZS-KA plane (fig. 2 of the paper), scores over tasks and what each dataset gained.

    runs: list of Line; or name -> [(zs, ka), ...] over time, the first being theta_0, or an array
    [seeds, 1 + T, 2] of them. Lines are means over the seeds, bars at their ends a standard
    deviation. theta_0 is a black star, a run named "joint" a golden star; above the line from one
    to the other is better than the linear trade-off. Without ZS there is no plane."""
    lines = [*runs] if isinstance(runs, list) else []
    for name, points in () if isinstance(runs, list) else runs.items():
        tracks = [[{"task": t, "zs": zs, "ka": ka, "datasets": {}} for t, (zs, ka) in enumerate(p)]
                  for p in np.array(points, dtype=float, ndmin=3)]  # fmt: skip
        lines.append(Line(name, [], [{"theta_0": t[0], "tasks": t[1:]} for t in tracks]))
    if not lines or not all(np.isfinite(line.track("task")).all() for line in lines):
        raise ValueError("nothing to draw: there is no run, or a KA that is not a number")
    curves = [("task", y) for y in ("ka", "zs", *TAUGHT)
              if any((line.track("task", y)[..., 1] >= 0).any() for line in lines)]  # fmt: skip
    plane = [("zs", "ka")] if all(np.isfinite(line.track()).all() for line in lines) else []
    datasets = lines[0].runs[0]["theta_0"]["datasets"]
    names = [line.name for line in lines if line.name not in REFERENCES]
    styles = {name: (COLOURS[i % 8], SIDES[i // 8 % 4]) for i, name in enumerate(names)}
    styles |= {line.name: (GOLD, STAR) for line in lines if line.name == "joint"}
    side = max(SIDE, 36 * len(datasets))
    image = Image.new("RGB", (side + 3500, side + 250), "white")
    pen = ImageDraw.Draw(image, "RGBA")
    pen.text((60, 46), title, INK, FONT, anchor="lm")
    right = 0
    for column in filter(None, (plane, curves[:2], curves[2:])):
        width = side if column is plane else 660
        right += 130 + width
        height = (side + 150) // len(column)
        for i, (x, y) in enumerate(column):
            box = (right - width, 140 + i * height, right, (i + 1) * height - 10)
            _draw_scores(pen, box, lines, styles, x, y, (x, y) == (plane or curves)[0])
    if datasets:
        right += 780 + int(max(FONT.getlength(_short(name)) for name in datasets))
        _draw_changes(pen, (right - 600, 140, right, 140 + side), lines, styles, [*datasets][::-1])
    image.crop((0, 0, right + 60, side + 250)).reduce(2).save(f"{path}.part", "PNG")
    os.replace(f"{path}.part", path)  # whole or not at all


def _draw_scores(pen, box, lines, styles, x, y, labelled):
    """A score over the finished tasks, or KA over ZS; thin lines: the weights in training."""
    tracks = {line.name: line.track(x, y) for line in lines}
    within = [(line.name, np.array([(row[x], row[y]) for row in run["within"]])) for line in lines
              for run in line.runs if x == "task" and y in METRICS and run.get("within")]
    starts = {line.name: line.track(x, f"{y}_before") - (1, 0) for line in lines}
    points = [track.reshape(-1, 2) for track in [*tracks.values(), *starts.values()]]
    points = np.concatenate(points + [path for _, path in within])
    panel = Panel(pen, box, points[np.isfinite(points).all(1)], AXES[x], AXES[y], equal=x == "zs")
    for name, path in within:
        panel.line(path, styles[name][0], 2)
    start = tracks[lines[0].name][:, 0].mean(axis=0)
    ends = {"theta_0": (start, INK)}
    for name, (colour, sides) in styles.items():
        scored = np.isfinite(tracks[name]).all(axis=(0, 2))
        values = tracks[name][:, scored]
        if not scored.any():  # `earlier` and `new` of a run with one task
            continue
        mean = values.mean(axis=0)
        end = mean[-1]
        ends[name] = (end, colour)
        if name == "joint" and x == "task":
            panel.line([(panel.low[0], end[1]), (panel.high[0], end[1])], colour, 4)
        elif name == "joint":
            panel.line([start, end], GREY, 3)
            panel.marks([end], colour, sides, 30)
        else:
            for step in np.diag(values[:, -1].std(axis=0, ddof=1)) if len(values) > 1 else ():
                panel.line([end - step, end + step], colour, 3)
            before = starts[name][:, scored].mean(axis=0)  # on the same classes
            for path in zip(before, mean) if y in TAUGHT else [mean]:
                panel.line(path, colour, 6)
            panel.marks(mean, colour, sides, 10)
            panel.marks([end], colour, sides, 18)
    if y not in TAUGHT:
        panel.marks([start], INK, STAR, 30)
    for name, (point, colour) in ends.items() if labelled else ():
        panel.write(_short(name), point, colour, 2000)
    for line in lines if x == "zs" else ():
        for row, point in zip(rows(line.runs[0])[1:-1], tracks[line.name].mean(axis=0)[1:]):
            panel.write(str(row["task"]), point, styles[line.name][0], 40)


def _draw_changes(pen, box, lines, styles, datasets):
    """What each dataset, from below, gained or lost from theta_0 to the end."""
    heldout = lines[0].runs[0]["heldout"]
    names = {i + 0.5: _short(n) + " (ZS)" * (n in heldout) for i, n in enumerate(datasets)}
    points = {}
    for i, line in enumerate(line for line in lines if line.name in styles):
        change = np.mean([[run["final"]["datasets"][name] - run["theta_0"]["datasets"][name]
                           for name in datasets] for run in line.runs], axis=0)  # fmt: skip
        y = np.arange(len(datasets)) + 0.85 - 0.7 * (i + 0.5) / len(styles)
        points[line.name] = [*zip(change, y)]
    zero = [(0, 0), (0, len(datasets))]
    panel = Panel(pen, box, sum(points.values(), zero), "points since theta_0", "", names)
    panel.line(zero, GREY, 3)
    for name, ends in points.items():
        for end in ends:
            panel.line([(0, end[1]), end], styles[name][0], 2)
        panel.marks(ends, *styles[name], 9)


class Panel:
    """Axes in a box, (left, top, right, bottom), around points [n, 2]. names: {y: text}."""

    def __init__(self, pen, box, points, x_name, y_name, names=None, equal=False):
        self.pen = pen
        self.box = box
        self.taken = []  # boxes of marks and words
        low = np.min(points, axis=0)
        high = np.maximum(np.max(points, axis=0), low + 1)
        span = np.where(equal, (high - low).max(), high - low) * 1.15
        self.low = (low + high - span) / 2
        self.high = (low + high + span) / 2
        left, top, right, bottom = box
        pen.rectangle(box, outline=INK, width=3)
        for value, text in _ticks(self.low[0], self.high[0]).items():
            x, _ = self.at((value, 0))
            pen.line([(x, top), (x, bottom)], PALE, 2)
            pen.text((x, bottom + 30), text, INK, FONT, anchor="mm")
        for value, text in (names or _ticks(self.low[1], self.high[1])).items():
            _, y = self.at((0, value))
            pen.line([(left, y), (right, y)], PALE, 2)
            pen.text((left - 14, y), text, INK, FONT, anchor="rm")
        pen.text(((left + right) / 2, bottom + 72), x_name, INK, FONT, anchor="mm")
        pen.text((left, top - 28), y_name, INK, FONT, anchor="lm")

    def at(self, point):
        left, top, right, bottom = self.box
        x, y = (np.asarray(point) - self.low) / (self.high - self.low)
        return float(left + x * (right - left)), float(bottom - y * (bottom - top))

    def line(self, points, colour, width):
        self.pen.line([self.at(point) for point in points], colour, width, joint="curve")

    def marks(self, points, colour, sides, radius):
        turns = np.arange(sides)
        angles = 2 * np.pi * turns / sides - np.pi / 2
        radii = radius * np.where(turns % 2 * (sides == STAR), 0.42, 1)
        for x, y in map(self.at, points):
            corners = np.stack([x + radii * np.cos(angles), y + radii * np.sin(angles)], axis=-1)
            self.pen.polygon(corners.ravel().tolist(), colour, INK if sides == STAR else "white", 2)
            self.taken.append((x - radius, y - radius, x + radius, y + radius))

    def write(self, text, point, colour, reach):
        """Writes near a point where nothing is yet, at most `reach` pixels away."""
        x, y = self.at(point)
        left, top, right, bottom = self.box
        for far, angle in itertools.product(range(26, reach, 16), np.arange(-0.5, 5.7, np.pi / 6)):
            place = (x + far * math.cos(angle), y + far * math.sin(angle))
            anchor = "lmr"[1 - round(math.cos(angle))] + "m"
            a, b, c, d = self.pen.textbbox(place, text, FONT, anchor=anchor)
            free = all(c < l or r < a or d < t or o < b for l, t, r, o in self.taken)
            if free and left < a and c < right and top < b and d < bottom:
                if far > 60:
                    self.pen.line([(x, y), place], colour, 2)
                self.pen.text(place, text, colour, FONT, anchor, stroke_width=4, stroke_fill="#fff")
                return self.taken.append((a, b, c, d))


def _short(name):
    return name if len(name) <= 26 else f"{name[:11]}...{name[-12:]}"


def _ticks(low, high):
    """{number: text} of at most eight round numbers between two."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500) if (high - low) / s <= 8)
    return {v: str(v) for v in range(math.ceil(low / step) * step, math.floor(high) + 1, step)}
