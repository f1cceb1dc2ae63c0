"""Continual pretraining of CLIP: one model, many small updates, a compute budget.

    python fomo.py --method merge                 all of it on a drawn world: no files, no network
    python fomo.py --method finetune              any other method; runs/ keeps them apart
    python fomo.py --method joint                 the upper bound: all data at once
    python fomo.py report runs/*                  their table, and one picture of them all
    python fomo.py --method merge --weights W --data D --stream S.json --heldout NAME --pool NAME
    torchrun --nproc-per-node 2 fomo.py --method merge     the same on two GPUs or CPU processes
    python fomo.py --continue runs/merge-0 --data D NEW    the next update of a finished run
    python fomo.py evaluate --weights W --data D  scores of one checkpoint
    python fomo.py inspect --data D               what the data are, and what is broken in them
    python fomo.py stream --data D --order time   an order of concepts, as a file
    python fomo.py convert IN OUT --layout hf     a checkpoint in another layout
    python fomo.py budget --model ViT-B-16        the compute of every method, counted
    python fomo.py merge BASE EXPERT... --technique ties -o OUT       merge files of weights

Roth et al. 2024, "A Practitioner's Guide to Continual Multimodal Pretraining" (arXiv 2408.14471).
"""

import argparse
import contextlib
import copy
import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import signal
import sys
import threading
import time
import unicodedata
import warnings
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which take seconds
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"fomo: interrupted\n") and 130))

# Threads that wait for each other spin for a moment, then sleep. Spinning alone is 20 times slower
# than one thread beside other work, sleeping at once a third slower when idle. Torch reads it.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import numpy
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

import budget
import clip
import data
import evaluate
import merge
import methods

try:
    import fcntl
except ImportError:  # not POSIX: nobody is locked out
    fcntl = None

TIMELINES = {"merge": merge.TIMELINES["ema-merge"], **merge.TIMELINES}
RUNS = [*methods.METHODS, *(t for t in TIMELINES if t not in methods.METHODS), "joint", "zero-shot"]

ACTIVATIONS = {"auto": None, "gelu": False, "quick_gelu": True}  # what clip.load calls quick_gelu
ORDERS = data.ORDERS  # these three since Config has a field called data
CAPTIONS = data.CAPTIONS
TEMPLATE = data.TEMPLATE

# What the paper uses (sec. 3 and 4), and what makes the same picture in minutes, from nothing.
PAPER = {
    "batch_size": 512, "lr": 1e-5, "tasks": 20, "merge_weight": 0.9, "replay": 0, "budget": None,
}  # fmt: skip
TINY = {
    "batch_size": 64, "lr": 3e-4, "tasks": 8, "merge_weight": 0.77, "replay": 0, "budget": 3000.0,
}  # fmt: skip
OWN = {"tiny": TINY, "small": TINY | {"budget": 12170.0}}


def option(group, default, text, choices=None, least=None, above=None):
    """A field of Config. least, above: the smallest value, or the one that all are larger than."""
    metadata = {"group": group, "help": text, "choices": choices, "least": least, "above": above}
    return field(default=default, metadata=metadata)


def of_method(name):
    """The option of some methods that methods.py calls so."""
    _, least, text = methods.OPTIONS[name]
    users = [m for m in methods.METHODS if name in methods.used(m)]
    defaults = ", ".join(f"{m} {getattr(methods.METHODS[m], name)}" for m in users)
    return option("method", None, f"{text} (default {defaults})", least=least)


def of_technique(name):
    """The option of some merging techniques that merge.py calls so."""
    kind = merge.OPTIONS[name]
    uses = ", ".join(t for t in merge.TECHNIQUES if name in merge.used(t))
    text = f"{uses}: {kind.help}; {kind.limits} (default {kind.default})"
    return option("merging", None, text)


@dataclass
class Config:
    """One run. What is None here is filled in by resolve()."""

    method: str = option("run", "merge", "merge is ema-merge, joint the upper bound; zero-shot only"
                         " evaluates", RUNS)
    tasks: int = option("run", None, "T, updates in the stream (sec. 4)", least=1)
    budget: float = option("run", None, "GFLOPs of the whole stream, memory-adjusted (sec. 3.2);"
                           " default the paper's, in proportion to the model", above=0)
    steps: int = option("run", None, "steps a task, whatever they cost; replaces --budget", least=1)
    batch_size: int = option("run", None, "image-text pairs a step", least=1)
    seed: int = option("run", 0, "of the order of concepts and samples; theta_0 and the drawn world"
                       " stay the same", least=0)
    score_all: bool = option("run", False, "score all test data after every task; the paper,"
                             " between the first and the last, a class-balanced subset")
    eval_every: int = option("run", None, "steps from one scoring within a task to the next, of the"
                             " weights in training as they stand, on the same subsets: what is"
                             " deployed is known only after the task", least=1)
    out: str = option("run", None, "folder of the run; default runs/<method>-<seed>, or RUN-t<task>"
                      " where it continues RUN")
    continue_: str = option("run", None, "folder of a finished run, whose next update this is: all"
                            " is as it was there unless given, and what its tasks have not held of"
                            " the data makes the next --tasks (default 1)")
    gate: str = option("run", None, "what has to hold for the new weights to be shipped, in points"
                       " against those before, as in \"zs >= -1, DIGITS >= -3\"; if it does not,"
                       " model.safetensors has the old ones and the exit status is 3")
    plan: bool = option("run", False, "say what the run would do, time two steps, and stop")
    accept_changes: bool = option("run", False, "go on with an unfinished run although its input"
                                  " has changed; results.json records what")

    model: str = option("theta_0", None, "architecture; tiny without --weights, else what the"
                        " weights are", clip.CONFIGS)
    weights: str = option("theta_0", None, "a file or folder in any CLIP layout, hf:ORG/REPO,"
                          " openai:ViT-B-32, or a URL; without, it is trained on the pool first")
    activation: str = option("theta_0", "auto", "of --weights that do not say it", ACTIVATIONS)
    bpe: str = option("theta_0", None, "bpe_simple_vocab_16e6.txt.gz, merges.txt, tokenizer.json or"
                      " openai:bpe; default beside the weights, else an installed open_clip's")
    pretrain_steps: int = option("theta_0", 1800, "of training it on the pool", least=1)
    pretrain_lr: float = option("theta_0", 1.5e-3, "peak learning rate of that", above=0)

    data: tuple[str, ...] = option("data", (), "a folder in FoMo-in-Flux's layout, class folders, a"
                                   " .csv or .tsv, torchvision:NAME,...; without, the drawn world")
    heldout: tuple[str, ...] = option("data", None, "datasets never trained on: ZS; default"
                                      " those of the paper's 22 that are there")
    pool: tuple[str, ...] = option("data", (), "the pretraining data P: datasets whose training"
                                   " split stands for it, or shards ('{000..331}.tar')")
    stream: str = option("data", None, "JSON list of DATASET+++class, in place of --order")
    order: str = option("data", "random", "of the concepts (sec. 3.3)", ORDERS)
    reverse: bool = option("data", False, "that order backwards")
    captions: str = option("data", "default", "which kind to train on where FoMo-in-Flux has"
                           " several; default is its rule: default captions, else merged ones",
                           CAPTIONS)
    prompts_too: bool = option("data", False, "a training picture's class prompt is one of its"
                               " captions, where these name none")
    template: str = option("data", TEMPLATE, "of the prompts of classes that have none")
    validation: float = option("data", 0.0, "score on this share of each training split, which is"
                               " then not trained on", least=0)
    download: bool = option("data", False, "what torchvision: names and is not there")
    max_broken: int = option("data", 100, "pictures that cannot be read: so many are replaced by"
                             " others and named in log.jsonl; one more ends the run", least=0)
    mixture: str = option("data", "0.33/0.34/0.33", "P/D/B, shares of pool, update and buffer in a"
                          " batch (sec. 3.1)")
    replay: int = option("data", None, "samples of the pool at hand for P, 0 for all; the paper"
                         " replays 2 M of 2 B", least=0)

    lr: float = option("schedule", None, "peak learning rate (sec. 4)", above=0)
    schedule: str = option("schedule", "cosine", "within a task (sec. 6.1)", methods.SCHEDULES)
    meta: str = option("schedule", "none", "meta-schedule over tasks (sec. 6.1)",
                       sorted(set().union(*methods.SCHEDULES.values())))
    warmup: float = option("schedule", 0.1, "share of a task's steps (sec. 4)")
    cooldown: float = option("schedule", 0.1, "share of a task's steps, rsqrt only")
    floor: float = option("schedule", 1e-3, "share of the peak that a decay ends at")
    weight_decay: float = option("schedule", 0.2, "of AdamW, betas .9 and .999", least=0)
    clip_norm: float = option("schedule", 1.0, "gradient norm", above=0)

    rank: int = of_method("rank")
    scale: float = of_method("scale")
    gap: int = of_method("gap")
    ewc_lambda: float = of_method("ewc_lambda")
    ewc_gamma: float = of_method("ewc_gamma")
    fisher_samples: int = of_method("fisher_samples")
    si_c: float = of_method("si_c")
    si_xi: float = of_method("si_xi")

    merge_weight: float = option("merging", None, "w of m_t = w m_(t-1) + (1-w) theta_t: it weighs"
                                 " the old weights")
    merge_init: str = option("merging", None, "what a task starts from if not as the method says"
                             " (TIME, 3)", merge.SOURCES)
    merge_deploy: str = option("merging", None, "what is evaluated and shipped, likewise",
                               merge.SOURCES[1:])
    merge_technique: str = option("merging", "linear", "how weights are merged", merge.TECHNIQUES)
    density: float = of_technique("density")
    whole: bool = of_technique("whole")
    elect: bool = of_technique("elect")
    function: str = of_technique("function")
    drop: float = of_technique("drop")
    top: float = of_technique("top")
    bottom: float = of_technique("bottom")
    strictness: float = of_technique("strictness")
    agree: int = of_technique("agree")
    lines: tuple[str, ...] = of_technique("lines")
    merge_scale: float = of_technique("scale")
    merge_growth: str = option("merging", "uniform", "how the experts' weights grow with time, for"
                               " 'all'", merge.GROWTHS)
    merge_reverse: bool = option("merging", False, "they shrink instead")
    merge_base: bool = option("merging", False, "theta_0 counts as the first expert, for 'all'")

    device: str = option("machine", "auto", "auto is cuda where there is one, else cpu")
    precision: str = option("machine", "auto", "of the forward pass; auto is bf16 on a GPU that has"
                            " it, else fp32", ["auto", "fp32", "bf16", "fp16"])
    micro_batch: int = option("machine", None, "pairs in memory at a time; the gradient is still"
                              " the whole batch's, for a second forward pass", least=1)
    compile: bool = option("machine", False, "torch.compile of the blocks: the steps of a large"
                           " model are faster, after a minute")
    any_order: bool = option("machine", False, "faster sums on a GPU, whose order is its own: the"
                             " same command no longer gives the same bits")
    threads: int = option("machine", None, "of a CPU process; default torch's", least=1)
    workers: int = option("machine", -1, "processes that prepare batches; -1: what the cores"
                          " leave", least=-1)
    cache: str = option("machine", "~/.cache/fomo", "folder for theta_0 and downloads")
    save_every: float = option("machine", 300.0, "seconds from one saving of the state to the next,"
                               " or 50 times what a saving takes", above=0)


# ---------------------------------------------------------------------------------------- the loop


@dataclass
class Stage:
    """A stretch of training and how far it is: theta_0's on the pool, then that on the stream."""

    name: str  # "theta_0" or "stream"
    learner: "Learner"
    method: methods.Method
    timeline: merge.Timeline
    mixture: data.Mixture
    tasks: int
    steps: int  # of each task
    rate: "callable"  # (step, steps, task) -> learning rate
    betas: tuple[float, float]  # AdamW's
    results: dict
    shown: "Learner" = None  # holds what is deployed, to score it; None: nothing is scored
    chunks: list = None  # the concepts that each task teaches
    task: int = 0
    step: int = 0  # steps that the task has done; steps + 1: it is merged too, and not yet scored
    optimizer: torch.optim.Optimizer = None
    scaler: torch.amp.GradScaler = None
    saved: dict = None  # state of the optimizer and the scaler, after a stop within a task


def train(stage, folder):
    """The loop: each task starts from what the timeline says, trains, is merged and scored."""
    learner = stage.learner
    method = stage.method
    timeline = stage.timeline
    model = learner.model
    c = learner.c
    for task in range(stage.task, stage.tasks):
        if stage.step == 0:
            if task == 0 or timeline.init != "latest":  # else the model is where it was left
                method.load(model, timeline.start())
            method.before_task(model, task)
        model.train()
        start_optimizer(stage)
        optimizer = stage.optimizer
        scaler = stage.scaler
        batches = learner.batches(stage.mixture, task, stage.steps, stage.step)
        for batch in Lines(batches, title(stage), stage.steps, stage.step, learner):
            score_within(stage, folder)  # --eval-every
            rate = stage.rate(step=stage.step, steps=stage.steps, task=task)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = learner.backward(batch, scaler)
            penalty = method.penalty(model)
            if torch.is_tensor(penalty):  # once, whatever the number of pieces and processes
                scaler.scale(penalty).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(method.trained.values(), c.clip_norm)
            if c.precision != "fp16" or norm.isfinite():  # else the scaler leaves this step out
                method.after_backward(model, rate)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if model.logit_scale.requires_grad:
                model.logit_scale.data.clamp_(max=clip.MAX_LOGIT_SCALE)
            folder.log_step(stage, rate, loss, norm, model.logit_scale)
            stage.step += 1
            folder.pause(stage)  # saves the state if it is time to, and stops if somebody asks
        stage.optimizer = stage.scaler = optimizer = scaler = None  # its memory is free from here
        if stage.step <= stage.steps:
            method.after_task(model, look_back(stage, folder), learner.gradient)
            timeline.add(on_cpu(method.plain(model)))
            stage.step = stage.steps + 1
        score_task(stage, folder)
        stage.task = task + 1
        stage.step = 0
        folder.save(stage)


def run(config):
    """The main job. Returns the results, as in results.json; None with --plan."""
    c, crew = resolve(config)
    with Signals() as signals, Folder(c, crew, signals) as folder:
        past = read_past(c)
        world = load_world(c, crew, past)
        learner = load_learner(c, crew, world)
        stream = load_stream(learner, past["held"])
        new = data.tasks(stream, 1 if c.method == "joint" else c.tasks)
        mixture = data.Mixture(world, new, c.batch_size, ratios(c), c.replay, c.seed, past["held"])
        chunks = past["chunks"] + new
        first = len(past["chunks"])
        tasks = 0 if c.method == "zero-shot" else len(new)
        samples = mixture.ends[-1] - mixture.ends[first]
        steps, costs = budget.plan(learner.model.config, c, tasks, samples)
        announce(learner, mixture, tasks, steps, costs)
        names = [d.name for d in world.adaptation + world.heldout]
        evaluate.check_gate(c.gate, names, world.heldout)
        if c.plan:
            return time_two_steps(learner, mixture, first, tasks * steps) if tasks else None
        found = inputs(learner, stream, steps, past)
        folder.begin(found, past)
        obtain_theta_0(learner, folder, past)

        method = make_method(c)
        theta_0 = on_cpu(learner.model.state_dict())
        experts = ExpertFiles(folder.path / "experts", crew)
        timeline = merge.Timeline(theta_0, store=experts, **merge_options(c))
        shown = Learner(copy.deepcopy(learner.model).cpu(), learner.tokenizer, c, crew, world)
        learner.prepare(method)
        results = costs | {
            "theta_0": None, "before": None, "tasks": [], "steps_per_task": steps,
            "chance": evaluate.chance(world.adaptation, world.heldout),
            "heldout": [d.name for d in world.heldout], "scored_on": {
                name: digest([found[f"{name}: {what}"] for what in SCORED])[:12] for name in names
            },
            "theta_0_sha256": fingerprint(theta_0), "trained_parameters": 0,
        }  # fmt: skip
        if tasks:
            results["trained_parameters"] = sum(p.numel() for p in method.trained.values())
        stage = Stage("stream", learner, method, timeline, mixture, first + tasks, steps, rates(c),
                      (0.9, 0.999), results, shown, chunks)  # fmt: skip
        go_on(stage, past)
        folder.restore(stage)
        learner.broken = shown.broken = folder.name_broken
        score_before(stage, folder)
        crew.say(told_so_far(stage.results))
        train(stage, folder)
        return folder.finish(stage)


# --------------------------------------------------------- what a run reads before it does anything

PATHS = ("data", "pool", "stream", "bpe", "out", "cache", "weights", "continue_")  # ~ is home there
FREE = ("out", "cache", "workers", "save_every", "plan", "accept_changes", "gate")  # no score
# these change its last digits
MACHINE = ("device", "precision", "micro_batch", "compile", "any_order", "threads")


def parse(argv, program="fomo.py", description=__doc__, names=None, parents=()):
    """Config from arguments: one option a field, its type the field's. names: only these fields;
    parents: parsers of further options, for --help."""
    parser = argparse.ArgumentParser(
        program, usage=f"{program} [options]", allow_abbrev=False, description=description,
        parents=parents, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    groups = {}
    for f in fields(Config):
        if names is None or f.name in names:
            heading = f.metadata["group"]
            if heading not in groups:
                groups[heading] = parser.add_argument_group(heading)
            add_option(groups[heading], f.name, f.type, f)
    given = vars(parser.parse_args(argv))
    given = {f.name: given[f.name] for f in fields(Config) if f.name in given}
    config = continued(given) if "continue_" in given else Config(**given)
    refuse_unused(config, given)
    config.cache = os.path.expanduser(config.cache)  # the default's ~, too
    return config


def flag(name):
    return "--" + name.rstrip("_").replace("_", "-")


def add_option(group, name, kind, described):
    """Gives a parser the option of that name and type, which option() has described."""
    text = described.metadata["help"]
    if name in PAPER:
        paper = "" if PAPER[name] is None else f"{PAPER[name]}; "
        values = dict.fromkeys(defaults[name] for defaults in OWN.values())
        users = [" and ".join(m for m, d in OWN.items() if d[name] == value) for value in values]
        own = ", ".join(f"{user} {value}" for user, value in zip(users, values))
        text += f" (default {paper}{own})"
    elif described.default not in (None, ()) and kind is not bool:
        text += f" (default {described.default})"
    choices = described.metadata["choices"]
    how = {"metavar": None if choices else name.upper().rstrip("_"), "type": kind}
    if kind is bool:
        how = {"action": "store_true"}
    elif kind in (tuple, tuple[str, ...]):
        how |= {"nargs": "*", "type": str}
    if name in PATHS:
        how["type"] = os.path.expanduser
    if choices:
        how["choices"] = choices
    flags = [flag(name), *(["-o"] if name == "out" else [])]
    group.add_argument(*flags, dest=name, help=text.replace("%", "%%"), **how)


def refuse_unused(c, given):
    """ValueError where an option was given that this run has no use for: it would be ignored."""
    place = merge_options(c)
    merges = merge.timeline_used(place["init"], place["deploy"], c.merge_technique)
    trains = c.method if c.method in methods.METHODS else "finetune"
    of_training = [f.name for f in fields(c)
                   if f.metadata["group"] in ("schedule", "method", "merging")]  # fmt: skip
    idle = (  # options, whether they do nothing here, and why
        ([*of_training, "eval_every", "gate", "compile"], c.method == "zero-shot",
         "--method zero-shot trains nothing"),
        ([name for name in methods.OPTIONS if name not in ("seed", *methods.used(trains))], True,
         f"--method {c.method} has no such option"),
        ([name for name in MERGING if MERGING[name] not in ("init", "deploy", *merges)], True,
         "no merge here uses it"),
        (["budget"], c.steps, "--steps says how many steps there are"),
        (["pretrain_steps", "pretrain_lr"], c.weights, "--weights is theta_0"),
        (["activation", "bpe"], not c.weights, "it belongs to --weights"),
        (["heldout", "pool"], not c.data,
         "it names datasets of --data; the drawn world has its own"),
        (["captions", "prompts_too", "template", "validation", "download"], not c.data,
         "it belongs to --data"),
        (["order", "reverse"], c.stream, "--stream says the order"),
        (["cooldown"], c.schedule != "rsqrt", "it belongs to --schedule rsqrt"),
        (["compile"], issubclass(methods.METHODS[trains], methods.LoRA),
         "torch would compile the adapters of each block anew"),
    )  # fmt: skip
    for names, unused, why in idle:
        for name in names:
            if unused and name in given:
                raise ValueError(f"{flag(name)} does nothing here: {why}")


def resolve(config, trains=True):
    """-> (Config with nothing left open, Crew). ValueError where options do not go together."""
    c = dataclasses.replace(config)
    if c.weights is None:
        if not trains or c.model is None and not c.data:
            c.model = "tiny"
        if c.model is None:
            raise ValueError("data of your own needs a model: --weights CHECKPOINT, or --model tiny"
                             " or small to train one on --pool")
        if c.model not in OWN:
            raise ValueError(f"{c.model} is not trained from nothing: name its --weights")
        if trains and c.data and not c.pool and not c.continue_:
            raise ValueError("without --weights, --pool names the datasets to train theta_0 on")
    for name, value in OWN.get(c.model, PAPER).items():
        if getattr(c, name) is None:
            setattr(c, name, value)
    for f in fields(c):
        check_range(f, getattr(c, f.name))
    if c.meta not in methods.SCHEDULES[c.schedule]:
        metas = ", ".join(methods.SCHEDULES[c.schedule])
        raise ValueError(f"--schedule {c.schedule} has --meta {metas}, not {c.meta}")
    rates(c)(step=0, steps=1, task=0)  # says what is wrong with --warmup, --cooldown and --floor
    merge.Timeline({}, **merge_options(c))  # and of merging and the method
    make_method(c)
    evaluate.conditions(c.gate)
    c.out = c.out or f"runs/{c.method}-{c.seed}"
    crew = Crew(c)
    if c.batch_size < crew.count:
        raise ValueError(f"a batch of {c.batch_size} is too small for {crew.count} processes")
    return c, crew


def check_range(f, value):
    """ValueError unless the field's value lies where its option says."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    least = f.metadata["least"]
    above = f.metadata["above"]
    if not abs(value) < (2**31 if f.type is int else math.inf):
        raise ValueError(f"{flag(f.name)} must be finite and below 2^31, got {value}")
    if least is not None and value < least:
        raise ValueError(f"{flag(f.name)} must be at least {least}, got {value}")
    if above is not None and value <= above:
        raise ValueError(f"{flag(f.name)} must be above {above}, got {value}")


MERGING = {  # option -> what merge.Timeline calls it
    "merge_init": "init", "merge_deploy": "deploy", "merge_technique": "technique",
    "merge_weight": "weight", "merge_growth": "expert_weights", "merge_reverse": "reverse",
    "merge_base": "include_base", "merge_scale": "scale",
    **{name: name for name in merge.OPTIONS if name not in ("scale", "seed")},
}  # fmt: skip


def merge_options(c):
    """Timeline's arguments: as the method says, and the command line otherwise."""
    options = dict(TIMELINES.get(c.method, TIMELINES["finetune"]))
    for field_name, name in MERGING.items():
        value = getattr(c, field_name)
        if value is not None and value is not False:
            options[name] = lines_of(value) if name == "lines" else value
    return options


def lines_of(words):
    """("0.5", "0.5", "linear") -> LiNeS' (alpha, beta, how)."""
    try:
        alpha, beta, how = words
        return float(alpha), float(beta), how
    except ValueError:
        raise ValueError(f"--lines takes two numbers and a word, as in .5 .5 linear, got"
                         f" {' '.join(words)}") from None


def make_method(c):
    """What trains: merges and joint runs finetune."""
    options = {name: getattr(c, name) for name in methods.OPTIONS}
    return methods.METHODS.get(c.method, methods.Method)(**options)


def rates(c):
    """-> (step, steps, task) -> learning rate."""
    return partial(methods.learning_rate, lr=c.lr, schedule=c.schedule, meta=c.meta,
                   warmup=c.warmup, cooldown=c.cooldown, floor=c.floor)  # fmt: skip


def ratios(c):
    try:
        p, d, b = map(float, c.mixture.split("/"))
    except ValueError:
        raise ValueError(f"--mixture is P/D/B, as in 0.33/0.34/0.33, got {c.mixture!r}") from None
    return (p, 1 - p, 0) if c.method == "joint" else (p, d, b)  # joint: everything is in D


class Crew:
    """The processes that torchrun started, or this one alone: what they share and agree on. Sets
    the run's device, precision, threads and workers, which depend on how many there are."""

    def __init__(self, c):
        self.rank = int(os.environ.get("RANK", "0"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.leads = self.rank == 0  # writes and prints
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of this machine
        if c.device == "auto":
            c.device = "cuda" if torch.cuda.is_available() else "cpu"
        device = c.device
        if c.device == "cuda" and self.count > 1:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            if beside > torch.cuda.device_count():
                raise ValueError(f"torchrun started {beside} processes where there are"
                                 f" {torch.cuda.device_count()} GPUs: take fewer, or --device cpu")
        try:
            torch.empty(1, device=device).item()
        except (RuntimeError, AssertionError, NotImplementedError, ImportError) as e:
            reason = str(e).splitlines()[0]
            raise ValueError(f"--device {device} cannot be used here ({reason}); --device auto"
                             " takes what there is") from None
        self.device = torch.device(device)
        if c.precision == "auto":
            good = self.device.type == "cuda" and torch.cuda.is_bf16_supported(False)
            c.precision = "bf16" if good else "fp32"
        if c.any_order and self.device.type == "cpu":
            raise ValueError("--any-order does nothing here: it belongs to a GPU")
        torch.use_deterministic_algorithms(not c.any_order)
        if c.threads is not None:
            torch.set_num_threads(c.threads)
        c.threads = torch.get_num_threads()
        if c.workers < 0:
            spare = (os.cpu_count() or 1) // beside - (c.threads if c.device == "cpu" else 1)
            c.workers = min(16, max(0, spare))
        if self.count > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if c.device != "cpu" else "gloo")

    def say(self, *lines):
        for line in lines if self.leads else ():
            tqdm.write(line)

    def share(self, n):
        """-> (first, end) of this process's part of n things."""
        return n * self.rank // self.count, n * (self.rank + 1) // self.count

    def agree(self, *numbers):
        """-> the largest of each number over all processes."""
        if self.count == 1:
            return numbers
        together = torch.tensor(numbers)
        dist.all_reduce(together, dist.ReduceOp.MAX)
        return together.tolist()

    def gathered(self, value):
        """-> every process's value, once all have come here."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def told(self, value=None):
        """-> the first process's value, once all have come here."""
        return self.gathered(value)[0]


class Signals:
    """SIGINT, SIGTERM and SIGHUP. While `held`, the first is remembered until the loop can save the
    state; else, and the second time, it stops the run where it is."""

    def __init__(self):
        self.number = 0
        self.held = False
        self.before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, signal.SIGINT)  # some systems have no SIGHUP
                self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self.number or not self.held:
            raise Stopped(number)
        self.number = number


class Stopped(KeyboardInterrupt):
    """A signal ended the run; args: its number and, in words, where."""


# -------------------------------------------------------------------------------- model and batches


@dataclass
class Learner:
    """A model with all that turns pictures and captions into features and gradients."""

    model: clip.CLIP
    tokenizer: clip.Tokenizer
    c: Config
    crew: Crew
    world: data.World
    merges: str = None  # path of the tokenizer's file
    broken: "callable" = None  # takes sentences about pictures that cannot be read; None: an error
    others: torch.Tensor = None  # features of pool pictures, for --order performance
    texts: dict = field(default_factory=dict)  # features of texts, as long as
    text_tower: str = None  # the hash of what made them is this

    def prepare(self, method):
        """Puts the model on the device as the method trains it."""
        model = self.model.to(self.crew.device)
        method.prepare(model)
        if self.c.compile:
            # a method may need ten kernels of each; beyond 8 torch would leave blocks uncompiled
            torch._dynamo.config.cache_size_limit = 64
            # texts differ in length: a kernel for all, so that none depends on which came first
            for tower, dynamic in ((model.visual.transformer, False), (model.transformer, True)):
                for block in tower.resblocks:
                    block.compile(dynamic=dynamic)

    def autocast(self):
        low = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.c.precision]
        return torch.autocast(self.crew.device.type, dtype=low, enabled=low is not None)

    def scaler(self, **options):
        device = self.crew.device.type
        return torch.amp.GradScaler(device, enabled=self.c.precision == "fp16", **options)

    def loading(self):
        """How pictures are read, whatever they are for."""
        pixels = self.model.preprocess
        return {"image_size": self.model.config.image_size, "resize": pixels.resize,
                "interpolation": pixels.interpolation, "broken": self.broken}  # fmt: skip

    def encode_image(self, images):
        """uint8 [b, 3, S, S] -> [b, D], normalised, in float32 whatever the tower runs in."""
        images = images.to(self.crew.device, non_blocking=True)
        with self.autocast():
            pixels = clip.normalise(images, self.model.preprocess.mean, self.model.preprocess.std)
            features = self.model.encode_image(pixels)
        return F.normalize(features.float(), dim=-1)

    def encode_text(self, captions):
        """list of b texts -> [b, D], likewise. A text that repeats is encoded once."""
        texts = list(dict.fromkeys(captions))
        tokens = self.tokenizer(texts, self.model.config.context_length)
        longest = int(tokens.argmax(dim=1).max()) + 1  # what follows the end token changes nothing
        tokens = tokens[:, :longest].to(self.crew.device, non_blocking=True)
        with self.autocast():
            features = self.model.encode_text(tokens)
        features = F.normalize(features.float(), dim=-1)
        if len(texts) == len(captions):
            return features
        place = {text: i for i, text in enumerate(texts)}
        return features[[place[text] for text in captions]]

    def backward(self, batch, scaler):
        """Leaves the gradient of the global batch's loss, times the scaler's factor for float16, in
        .grad. Returns the loss, detached."""
        images, captions = batch
        factor = scaler.scale(torch.ones((), device=self.crew.device))
        first, _ = self.crew.share(self.c.batch_size)
        rows = (first, self.c.batch_size) if self.crew.count > 1 else None
        with self.autocast():  # around all pieces, for which the weights are cast once
            loss = clip.backward(self.encode_image, self.encode_text, images, captions,
                                 self.model.logit_scale.exp(), self.c.micro_batch, rows, factor)
        if self.crew.count > 1:
            clip.sum_gradients(p for p in self.model.parameters() if p.requires_grad)
        return loss

    def gradient(self, model, batch):
        """What a method measures after a task: the loss of a batch, detached, and its gradient in
        .grad. In float16 small entries would vanish, were it not scaled on the way."""
        scaler = self.scaler(init_scale=2.0**14)
        loss = self.backward(batch, scaler)
        for p in model.parameters():
            if p.grad is not None:
                p.grad /= scaler.get_scale()
        return loss

    def batches(self, mixture, task, steps, start=0):
        """This process's part of the batches of a task: (images, captions)."""
        part = (self.crew.rank, self.crew.count)
        return data.loader(self.world, mixture, task, steps, workers=self.c.workers, start=start,
                           part=part, **self.loading())  # fmt: skip

    @torch.no_grad()
    def image_features(self, split, ids):
        """The pictures `ids` -> [N, D]. The processes share them out."""
        first, end = self.crew.share(len(ids))
        workers = self.c.workers if end - first > 2048 else 0
        batches = data.test_loader(split, ids[first:end], workers=workers, **self.loading())
        return self._gather([self.encode_image(batch) for batch in batches], first, len(ids))

    @torch.no_grad()
    def text_features(self, texts):
        """list of N texts -> [N, D], likewise."""
        first, end = self.crew.share(len(texts))
        mine = [self.encode_text(texts[i : min(i + 512, end)]) for i in range(first, end, 512)]
        return self._gather(mine, first, len(texts))

    def _gather(self, mine, first, total):
        nothing = torch.zeros(0, self.model.config.embed_dim, device=self.crew.device)
        return clip.gather_rows(torch.cat([nothing, *mine]), first, total)


def load_world(c, crew, past=None):
    """past: what read_past() gave, where this run continues another."""
    if not c.data:
        return data.toy()
    held = past and past["held"]
    before = past["results"]["config"]["data"] if held else ()
    world = data.open_world(c.data, c.heldout, c.pool, c.captions, c.prompts_too, c.template,
                            c.validation, c.download, c.cache, held, before)  # fmt: skip
    c.data = tuple(map(str, world.sources))
    origin, _ = data.located(held, world.heldout)
    learnt = [d.name for k, d in enumerate(world.heldout) if (origin == k).any()]
    if learnt:
        raise ValueError(f"{', '.join(learnt)} cannot be held out: {c.continue_} trained on it")
    crew.say(*world.notes)
    if not world.heldout:
        crew.say("nothing is held out (--heldout), so that KA alone is scored")
    return world


def load_stream(learner, held=None):
    """-> the concepts in order: --stream's, less those that nobody trains on, or all in --order.
    held: only of those that have samples which no earlier task held."""
    c = learner.c
    world = learner.world
    if c.stream is not None:
        kept, notes = data.trainable(data.read_stream(c.stream), world)
        learner.crew.say(*notes)
        return kept
    found = data.concepts(world.adaptation, held)
    if held is not None and not found:
        more = "add some, with --data" if c.data else "the drawn world has no more"
        raise ValueError(f"there is nothing new for {c.continue_}: its tasks held every sample that"
                         f" is there; {more}")
    return data.order(found, c.order, c.seed, order_key(learner, found), c.reverse)


def order_key(learner, found):
    """What --order sorts the concepts by (sec. 3.3), None where it needs no key."""
    c = learner.c
    world = learner.world
    if c.order == "frequency":
        if world.pool is None:
            raise ValueError("--order frequency counts names in the captions of a --pool: name one")
        return data.occurrences(found, world.pool.captions)
    if c.order == "time":
        return data.times(found)
    if c.order not in ("performance", "similarity"):
        return None
    if c.weights is None and not c.continue_:
        raise ValueError(f"--order {c.order} needs a model: name its --weights, or a --stream"
                         " that fomo.py stream wrote with them")
    learner.model.to(learner.crew.device).eval()
    prompt = {(d.name, name): prompt for d in world.adaptation
              for name, prompt in zip(d.classes, d.prompts)}  # fmt: skip
    if c.order == "similarity":
        return learner.text_features([prompt[concept] for concept in found]).cpu().numpy()
    return [concept_loss(learner, concept, prompt[concept]) for concept in found]


def concept_loss(learner, concept, prompt, most=32):
    """Mean contrastive loss of a concept's first samples under theta_0, among pool pictures."""
    d = next(d for d in learner.world.adaptation if d.name == concept[0])
    own = (d.train.labels == d.classes.index(concept[1])).nonzero()[0][:most]
    image = learner.image_features(d.train, own)
    text = learner.text_features([prompt])
    others = learner.world.pool if learner.world.pool is not None else d.train
    among = numpy.random.default_rng((learner.c.seed, 9)).permutation(len(others))[:256]
    if learner.others is None:
        learner.others = learner.image_features(others, among)
    with torch.no_grad():
        scale = learner.model.logit_scale.exp()
        wrong = (learner.others @ text.T).T.expand(len(image), -1)  # [n, 256]
        logits = scale * torch.cat([image @ text.T, wrong], dim=1)  # [n, 257], the first is right
        target = torch.zeros(len(image), dtype=int, device=image.device)
        return float(F.cross_entropy(logits, target))


def load_learner(c, crew, world):
    """The checkpoint --weights, what the run that is continued has shipped, or a model as it is
    before any training. On the CPU."""
    weights = os.path.join(c.continue_, "model.safetensors") if c.continue_ else c.weights
    if weights is None:
        torch.manual_seed(0)
        return Learner(clip.CLIP(clip.CONFIGS[c.model]), clip.Tokenizer(), c, crew, world)
    model = load_clip(weights, "auto" if c.continue_ else c.activation, c.cache)
    plain = dataclasses.replace(model.config, quick_gelu=False)
    if c.model and clip.CONFIGS[c.model] != plain:
        raise ValueError(f"{weights} is no {c.model}: without --model it is what the weights are")
    c.model = next((name for name, known in clip.CONFIGS.items() if known == plain), None)
    merges = None
    if model.config.vocab_size != clip.CONFIGS["tiny"].vocab_size:  # whose tokens are bytes
        named = c.bpe and not c.continue_
        merges = clip.fetch(c.bpe, c.cache) if named else clip.find_bpe(weights, c.cache)
    tokenizer = clip.Tokenizer(merges)
    clip.check_tokenizer(model, tokenizer, weights)
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise ValueError(f"{weights} holds numbers that are not finite: take other weights")
    return Learner(model, tokenizer, c, crew, world, merges)


def load_clip(path, activation, cache=None):
    try:
        return clip.load(path, None, ACTIVATIONS[activation], cache=cache)
    except ValueError as e:
        hint = "; on the command line: --activation" if "quick_gelu=" in str(e) else ""
        raise ValueError(f"{e}{hint}") from None


# ------------------------------------------------------------------- what is going to happen, first


def announce(learner, mixture, tasks, steps, costs):
    """The first lines of a run: what it will do, how often it sees a sample, what that costs."""
    c = learner.c
    crew = learner.crew
    if not tasks:
        return
    if c.eval_every and c.eval_every >= steps:
        idle = f"--eval-every {c.eval_every} does nothing here: a task has {steps} steps"
        if not c.continue_:
            raise ValueError(idle)
        crew.say(idle)  # it may be of RUN, whose tasks were longer
    samples = mixture.ends[-1]
    passes = tasks * steps * c.batch_size / samples
    those = "samples of the stream"
    if c.continue_:
        first = len(mixture.ends) - 1 - tasks
        before = mixture.ends[first]
        gone = ", ".join(f"{name} {n:,}" for name, n in mixture.gone.items())
        samples -= before
        passes = steps * sum(mixture.counts(first + t)[1] for t in range(tasks)) / samples
        those = "new samples"  # their share of each batch
        crew.say(f"{c.continue_} goes on with {samples:,} new samples; its tasks held {before:,} of"
                 f" those that are there{gone and f', and what has gone: {gone}'}")
        if not before and ratios(c)[2]:
            crew.say("the buffer is empty: the update takes its share of each batch")
    peak = budget.peak_memory(learner.model.config, -(-c.batch_size // crew.count), c.method,
                              c.precision, c.rank or 0, c.micro_batch)  # fmt: skip
    processes = f" on {crew.count} processes" if crew.count > 1 else ""
    crew.say(f"{c.method}: {tasks} x {steps:,} steps of {c.batch_size} pairs{processes},"
             f" {passes:,.1f} times the {samples:,} {those};"
             f" {costs['gflops_spent']:,.0f} memory-adjusted GFLOPs, {peak / 2**20:,.0f} MiB a"
             " step")
    if passes > 50:
        crew.say(f"warning: {passes:,.0f} passes over the same samples: lower --budget or --steps")


def time_two_steps(learner, mixture, task, steps):
    """--plan: two steps of a task, on weights that nobody keeps; the first warms up."""
    method = make_method(learner.c)
    learner.prepare(method)
    for batch in learner.batches(mixture, task, 2):
        began = time.perf_counter()
        loss = float(learner.backward(batch, torch.amp.GradScaler(enabled=False)))
        seconds = time.perf_counter() - began
    learner.crew.say(f"a step takes {seconds:.2f} s (loss {loss:.3f}), {steps:,} of them"
                     f" {seconds * steps / 60:.1f} min; to that come the loading of pictures where"
                     " it is slower, the scoring, and theta_0 if it is to be trained")  # fmt: skip


SCORED = ("class names and prompts", "test pictures and captions")  # what a dataset's scores are of
TRAINED = ("training pictures and captions", "pool")


def inputs(learner, stream, steps, past):
    """What decides what is trained and scored, as hashes or in words, by name."""
    c = learner.c
    world = learner.world
    found = {"stream": digest(stream), "steps a task": str(steps)}
    for d in world.adaptation + world.heldout:
        found[f"{d.name}: {SCORED[0]}"] = digest([d.kind, d.classes, d.prompts])
        found[f"{d.name}: {SCORED[1]}"] = d.test.fingerprint()
        found[f"{d.name}: {TRAINED[0]}"] = d.train.fingerprint()
    if world.pool is not None:
        found["pool"] = world.pool.fingerprint()
    if c.continue_:
        found["the run that is continued"] = digest(past["version"])
    elif c.weights is not None:
        model = learner.model
        says = [dataclasses.asdict(model.config), dataclasses.asdict(model.preprocess)]
        found["weights"] = digest([fingerprint(model.state_dict()), *says])
    if learner.merges:
        found["tokenizer"] = file_hash(learner.merges)
    found["python"] = sys.version.split()[0]
    packages = {"torch": torch, "torchvision": torchvision, "pillow": PIL, "numpy": numpy}
    found |= {name: str(package.__version__) for name, package in packages.items()}
    found |= {flag(name): str(getattr(c, name)) for name in MACHINE}
    device = learner.crew.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return found | {"processes": str(learner.crew.count), "device": kind}


def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def file_hash(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fingerprint(weights):
    """SHA-256 of names and bytes of a state dict."""
    found = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        found.update(name.encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


# ------------------------------------------------------------------------------------- theta_0


def obtain_theta_0(learner, folder, past):
    """learner.model becomes theta_0: as the run's folder or --weights or the cache has it, or
    trained on the pool now. The run's folder keeps it, so that a cleared cache costs nothing."""
    c = learner.c
    crew = learner.crew
    model = learner.model
    if c.continue_:
        if fingerprint(model.state_dict()) != past["version"]["weights"]:
            raise ValueError(f"{c.continue_}/model.safetensors is not what it wrote: put it back")
        model.load_state_dict(past["theta_0"])
        return
    own = folder.path / "theta_0.safetensors"
    if crew.told(own.exists()):
        load_theta_0(model, own)
        return
    if c.weights is None:
        key = digest([dataclasses.asdict(model.config), c.pretrain_steps, c.pretrain_lr,
                      c.batch_size, c.warmup, c.floor, c.weight_decay, c.clip_norm, c.precision,
                      c.micro_batch, c.any_order, c.threads, crew.count,
                      learner.crew.device.type, learner.world.pool.content(),
                      torch.__version__])  # fmt: skip
        path = Path(c.cache) / f"theta_0-{key[:16]}.safetensors"
        with alone(path, crew):
            if crew.told(path.exists()):
                load_theta_0(model, path)
            else:
                if crew.leads:  # tells now, not after the training, if the disk is full
                    save_theta_0(model, path.with_suffix(".probe.safetensors"))
                    path.with_suffix(".probe.safetensors").unlink()
                crew.say(f"training theta_0 on the pool, once: {c.pretrain_steps} steps, kept as"
                         f" {path}")
                pretrain(learner, folder)
                if crew.leads:
                    save_theta_0(model, path)
    if crew.leads:
        save_theta_0(model, own)


def pretrain(learner, folder):
    """theta_0 by the loop above: one task, all of it pool, finetuning."""
    c = learner.c
    model = learner.model.to(learner.crew.device)
    method = methods.METHODS["finetune"]()
    method.prepare(model)
    mixture = data.Mixture(learner.world, [[]], c.batch_size, ratios=(1, 0, 0))
    rate = partial(methods.learning_rate, lr=c.pretrain_lr, warmup=c.warmup, floor=c.floor)
    timeline = merge.Timeline(on_cpu(model.state_dict()), **TIMELINES["finetune"])
    stage = Stage("theta_0", learner, method, timeline, mixture, 1, c.pretrain_steps, rate,
                  betas=(0.9, 0.98), results={})  # CLIP's for a ViT (arXiv 2103.00020, tab. 19)
    folder.restore(stage)
    train(stage, folder)


def save_theta_0(model, path):
    """With a hash that tells when it is altered."""
    clip.save(model, path, sha256=fingerprint(model.state_dict()))


def load_theta_0(model, path):
    try:
        found = clip.load(path)
        if clip.read_tensors(path).metadata.get("sha256") != fingerprint(found.state_dict()):
            raise ValueError("its hash is another")
        model.load_state_dict(found.state_dict())
    except (ValueError, RuntimeError) as e:
        raise ValueError(f"{path} is no theta_0 of this run ({e}): delete it, and it is trained"
                         " again") from None


@contextlib.contextmanager
def alone(path, crew):
    """One run at a time makes the file at `path`; those that want it meanwhile wait."""
    if not crew.leads:
        yield
        return
    check_folder(path.parent, "--cache")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as file:
        if not lock(file):
            crew.say(f"another run trains theta_0: waiting for {path}")
            lock(file, wait=True)
        for torn in path.parent.glob(f"{path.name}.*.part"):  # of a process that was killed
            torn.unlink()
        yield


def lock(file, wait=False):
    """Locks an open file until it is closed. -> whether it could: another process may have it."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def on_cpu(weights):
    return {name: tensor.detach().cpu() for name, tensor in weights.items()}


# --------------------------------------------------------------------------- what the loop calls


class Lines(tqdm):
    """A bar on a terminal; elsewhere, as in a log file, a line every 30 seconds."""

    def __init__(self, iterable, name, total, start, learner):
        self.bar = sys.stderr.isatty()
        super().__init__(
            iterable, name, total, leave=False, initial=start, disable=not learner.crew.leads,
            mininterval=0.1 if self.bar else 30, maxinterval=10 if self.bar else 60,
            bar_format=None if self.bar else "{desc}: {n_fmt} of {total_fmt}, {rate_fmt},"
                                             " {remaining} left")  # fmt: skip

    def clear(self, nolock=False):
        if self.bar:
            super().clear(nolock)

    def display(self, msg=None, pos=None):
        if self.bar:
            return super().display(msg, pos)
        if msg is None and self.n > self.initial:  # else nothing is known yet, or all is said
            print(self, file=sys.stderr, flush=True)
        return True

    def close(self):
        if not self.bar:
            self.fp = io.StringIO()  # takes the carriage return that tqdm writes at the end
        super().close()


def start_optimizer(stage):
    """A new optimizer for a task, or that of a task that was stopped in its midst."""
    c = stage.learner.c
    stage.optimizer = stage.method.optimizer(stage.learner.model, lr=c.lr, betas=stage.betas,
                                             weight_decay=c.weight_decay)  # fmt: skip
    stage.scaler = stage.learner.scaler()
    if stage.saved:
        stage.optimizer.load_state_dict(stage.saved["optimizer"])
        stage.scaler.load_state_dict(stage.saved["scaler"])
        stage.saved = None


def look_back(stage, folder):
    """Yields (batch, samples in it) of D_t alone, each sample at most once in full batches (if
    there are enough for one), for what a method measures after a task."""
    alone = copy.copy(stage.mixture)
    alone.ratios = (0, 1, 0)
    samples = alone.ends[stage.task + 1] - alone.ends[stage.task]
    steps = max(1, samples // alone.batch_size)
    for batch in stage.learner.batches(alone, stage.task, steps):
        folder.pause(stage)
        yield batch, alone.batch_size


@dataclass
class ExpertFiles:
    """The store of a merge.Timeline that merges all experts so far: a file each, written by the
    first process. `hashes` travel with the state, so that an altered file is noticed."""

    folder: Path
    crew: Crew
    hashes: list = field(default_factory=list)

    def path(self, i):
        return self.folder / f"expert-{i + 1:03}.safetensors"

    def __len__(self):
        return len(self.hashes)

    def __getitem__(self, i):
        tensors = clip.read_tensors(self.path(i), mapped=True)
        tensors.path = str(self.path(i))  # merge names it where a tensor is not what it should be
        return tensors

    def append(self, weights):
        if self.crew.leads:
            self.folder.mkdir(exist_ok=True)
            clip.write_tensors(weights, self.path(len(self)))
        self.hashes.append(fingerprint(weights))
        self.crew.told()  # all wait for the file

    def pop(self):
        self.hashes.pop()

    def adopt(self, folder, hashes):
        """The experts of the run that is continued: linked where the disk can, else copied."""
        theirs = ExpertFiles(folder, self.crew)
        theirs.restore(hashes)
        if self.crew.leads and hashes:
            self.folder.mkdir(exist_ok=True)
            for i in range(len(hashes)):
                part = self.path(i).with_suffix(".part")
                try:
                    os.link(theirs.path(i), part)
                except OSError:
                    shutil.copyfile(theirs.path(i), part)
                os.replace(part, self.path(i))
        self.crew.told()
        self.hashes = list(hashes)

    def restore(self, hashes):
        """ValueError unless the files are those that the state knows."""
        self.hashes = list(hashes)
        for i, known in enumerate(hashes):
            file = self.path(i)
            if not file.exists():
                raise ValueError(f"{file} is missing: put it back, or delete the run's folder")
            if fingerprint(self[i]) != known:
                raise ValueError(f"{file} has changed: put it back, or delete the run's folder")


def score_before(stage, folder):
    """theta_0, and in a run that continues another what that one shipped; if not known already."""
    results = stage.results
    rows = {"theta_0": 0}  # -> tasks that the weights have learnt
    if "parent" in results:
        rows["before"] = stage.task
    for name, finished in rows.items():
        if results[name] is None:
            if name == "before":
                stage.shown.model.load_state_dict(stage.timeline.deploy())
            row = score_all(stage, folder, True, f"scoring {name}", finished)
            results[name] = row
            folder.log("evaluation", task=finished, **row)
            folder.save(stage)


def score_task(stage, folder):
    """After a task: what is deployed is on the device just as long as it is scored."""
    if not stage.shown:
        return
    stage.shown.model.load_state_dict(stage.timeline.deploy())
    number = stage.task + 1
    everything = stage.learner.c.score_all or number == stage.tasks
    scores = score_all(stage, folder, everything, f"scoring {title(stage)}", number)
    concepts = len(stage.chunks[stage.task])
    row = {"task": number, "steps": stage.steps, "concepts": concepts, **scores}
    results = stage.results
    if "within" in results:
        row["within"] = results.pop("within")
    results["tasks"].append(row)
    folder.log("evaluation", **row, seconds=folder.seconds())
    before = evaluate.rows_before(results)[-1]
    folder.crew.say(evaluate.run_row(number, stage.steps, scores, before, results["theta_0"]))


def score_within(stage, folder):
    """--eval-every: what is trained, as it stands, into results["within"], which the task's row
    takes over. Where a task does not start from what was deployed, and hence scored, its step 0 is
    scored too. A state is saved before a step is scored or after the next, never in between."""
    c = stage.learner.c
    if not stage.shown or not c.eval_every:
        return
    within = stage.results.setdefault("within", [])
    elsewhere = stage.timeline.init != stage.timeline.deployed
    if stage.step % c.eval_every or not (stage.step or elsewhere):
        return
    stage.shown.model.load_state_dict(stage.method.plain(stage.learner.model))
    name = f"scoring {title(stage)}, step {stage.step}"
    scores = score_all(stage, folder, c.score_all, name, stage.task + 1)
    row = {"step": stage.step, **{metric: scores[metric] for metric in ("ka", "zs", "gm")}}
    within.append(row)
    folder.log("evaluation within", task=stage.task + 1, **row)


def score_all(stage, folder, everything, name, finished):
    """-> a row of results.json, of the weights in stage.shown; see row_of. Between the first and
    the last row there may be subsets alone: then these two have theirs in "subset", to compare
    with."""
    shown = stage.shown
    known = known_texts(shown)
    everywhere = {}
    on_subset = {}
    shown.model.to(shown.crew.device).eval()
    datasets = shown.world.adaptation + shown.world.heldout
    for d in Lines(datasets, name, len(datasets), 0, shown):
        subset = evaluate.balanced_subset(d.test.labels, shown.c.seed)
        ids = numpy.arange(len(d.test.labels)) if everything else subset
        features = encode(shown, d, ids, known=known)
        everywhere[d.name] = on_subset[d.name] = measure(d, ids, *features)
        if len(subset) < len(ids) and not shown.c.score_all:
            on_subset[d.name] = measure(d, subset, *evaluate.selected(*features, subset))
        folder.pause(stage)
    shown.model.cpu()
    row = row_of(stage, everywhere, finished)
    part = row_of(stage, on_subset, finished)
    return row | ({"subset": part} if part["samples"] < row["samples"] else {})


def row_of(stage, numbers, finished):
    """{"ka", "zs", "gm", "datasets": {name: percent}, "samples": in all, "samples_of": {name: how
    many}} and what evaluate.by_concept says. numbers: what measure() gives, of every dataset;
    finished: tasks so far, this one too."""
    world = stage.learner.world
    scores = summary(world, {name: n["score"] for name, n in numbers.items()})
    samples = {name: n["samples"] for name, n in numbers.items()}
    per_class = {name: n.get("per_class") for name, n in numbers.items()}
    when = {name: tasks for name, tasks in first_tasks(world, stage.chunks).items()
            if per_class[name] is not None}  # fmt: skip
    seen = evaluate.by_concept(per_class, when, len(stage.chunks), finished)
    return {**scores, "samples": sum(samples.values()), "samples_of": samples, **seen}


def score(learner, dataset, ids, templates=None):
    """The numbers of the test samples `ids`, as evaluate.py has them."""
    return measure(dataset, ids, *encode(learner, dataset, ids, templates))


def measure(dataset, ids, image, text, owner):
    """What encode() gave -> the numbers, as evaluate.py has them."""
    labels = dataset.test.labels[ids]
    if owner is None:
        return evaluate.classification(image, text, labels)
    classes = len(dataset.classes)
    return evaluate.retrieval(image, text, owner, labels if classes else None, classes or None)


def encode(learner, dataset, ids, templates=None, known=None):
    """Features of the test samples `ids` -> (image [N, D], zero-shot classifier [C, D], None), or
    of a retrieval set (image, text [M, D], owner [M]). known: texts that need no encoding, to which
    those of now are added."""
    known = {} if known is None else known

    def text_features(texts):
        key = digest(texts)
        if key not in known:
            known[key] = learner.text_features(texts)
        return known[key]

    test = dataset.test
    image = learner.image_features(test, ids)
    if dataset.kind == "classification":
        texts = dataset.classes if templates else dataset.prompts
        return image, evaluate.classifier(text_features, texts, templates), None
    captions = [[c] if isinstance(c, str) else c for c in (test.captions[i] for i in ids)]
    owner = [i for i, several in enumerate(captions) for _ in several]
    return image, text_features([c for several in captions for c in several]), owner


def known_texts(learner):
    """Features of texts by their digest, empty whenever the text tower is not the one of before, to
    the bit: a locked tower, or theta_0's, encodes each prompt once."""
    weights = learner.model.state_dict()
    tower = fingerprint({n: t for n, t in weights.items() if not n.startswith("visual.")})
    if learner.text_tower != tower:
        learner.text_tower = tower
        learner.texts = {}
    return learner.texts


def summary(world, scores):
    return evaluate.summary(scores, [d.name for d in world.adaptation],
                            [d.name for d in world.heldout])  # fmt: skip


def first_tasks(world, chunks):
    """Dataset -> for each of its classes the task that teaches it, from 1; None where none does."""
    form = partial(unicodedata.normalize, "NFC")  # a stream may spell names as another system does
    task = {}
    for t, chunk in enumerate(chunks):
        for name, concept in chunk:
            task.setdefault((form(name), form(concept)), t + 1)
    return {d.name: [task.get((form(d.name), form(name))) for name in d.classes]
            for d in world.adaptation}  # fmt: skip


def title(stage):
    return "theta_0" if stage.name == "theta_0" else f"task {stage.task + 1}/{stage.tasks}"


# ---------------------------------------------------------------- the next update of a finished run

NOT_AGAIN = ("out", "stream", "plan", "accept_changes", "save_every", "workers", "compile",
             "any_order")  # not as in RUN
SETTLED = ("method", "merge_init", "merge_deploy")  # and the options of theta_0 and of the method


def finished(folder):
    """The results of a finished run, which can be continued."""
    if not os.path.exists(os.path.join(folder, "results.json")):
        if os.path.exists(os.path.join(folder, "config.json")):
            raise ValueError(f"{folder} is not finished: start its own command again, first")
        raise ValueError(f"{folder} is no finished run: --continue takes the folder of one")
    results = evaluate.read_results(folder)
    method = results["config"]["method"]
    if method in ("joint", "zero-shot"):
        raise ValueError(f"{folder} is a run of {method}, which has no next update")
    if results.get("deployed") == "before":
        before = results["config"]["continue_"]
        instead = f"continue {before}" if before else "start anew"
        raise ValueError(f"{folder} failed its gate ({results['config']['gate']}) and shipped the"
                         f" weights before it: {instead}")
    return results


def continued(given):
    """Config of the next update of the run given["continue_"]: its own, but for what is given."""
    if not given["continue_"]:
        raise ValueError("--continue takes the folder of a finished run, got ''")
    folder = Path(given["continue_"])
    results = finished(folder)
    known = {f.name: f for f in fields(Config)}
    # an older run lacks the options that came later
    before = {name: f.default for name, f in known.items()} | results["config"]
    if set(before) != set(known) or "version" not in results:
        raise ValueError(f"{folder} is a run of another version of fomo.py: it cannot be continued")
    for name, value in given.items():
        fixed = name in SETTLED or known[name].metadata["group"] in ("theta_0", "method")
        if fixed and what_holds(name, value, before) != what_holds(name, before[name], before):
            raise ValueError(f"{flag(name)} is {before[name]} in {folder}, and its next update"
                             f" cannot have {value}: leave it out, or start a new run")
    if "data" in given and not before["data"]:
        raise ValueError(f"{folder} is a run on the drawn world: its next update takes no --data")
    options = before | {name: known[name].default for name in NOT_AGAIN}
    by_budget = {"steps", "budget"} & set(given)
    options |= {"tasks": 1, "steps": None if by_budget else results["steps_per_task"]}
    options |= {"budget": None} | given | {"continue_": str(folder)}
    last = results["tasks"][-1]["task"] + options["tasks"]
    there = folder.resolve()
    name = re.sub(r"-t\d+$", "", there.name) + f"-t{last}"
    beside = folder.with_name(name) if folder.name not in ("", "..") else there.with_name(name)
    options["out"] = options["out"] or str(beside)
    if there in Path(options["out"]).resolve().parents:
        raise ValueError(f"--out {options['out']} lies within {folder}, which is never written")
    return Config(**options)


def what_holds(name, value, options):
    """What an option of a run with these options means: None its default, a path its place."""
    if value is not None:
        return os.path.realpath(value) if name in PATHS else value
    place = TIMELINES.get(options["method"], TIMELINES["finetune"])
    defaults = {"merge_init": place["init"], "merge_deploy": place["deploy"]}
    return defaults.get(name, getattr(methods.METHODS.get(options["method"]), name, None))


def read_past(c):
    """What the finished run that --continue names has kept for this one, as finish() wrote it."""
    if not c.continue_:
        return {"version": None, "held": None, "chunks": []}
    path = Path(c.continue_) / "continue.pt"
    results = finished(c.continue_)
    if not path.exists():
        raise ValueError(f"{path} is not there, which the next update starts from: it was deleted,"
                         " so start a new run from model.safetensors")
    if file_hash(path) != results.get("continue_sha256"):
        raise ValueError(f"{path} is not what {c.continue_} wrote: put it back, or start a new run"
                         " from model.safetensors")
    past = torch.load(path, map_location="cpu", weights_only=True)
    return past | {"version": results["version"], "results": results}


def go_on(stage, past):
    """A stage that continues a finished run stands where that one ended."""
    if not past["chunks"]:
        return
    old = past["results"]
    results = stage.results
    stage.task = len(past["chunks"])
    now = results["scored_on"]
    new = {name: stage.task + 1 for name in now if old["scored_on"].get(name) != now[name]}
    if old["before"]:  # it is the row before the first of that run, which has it from now on
        old["tasks"][old["parent"]["task"]]["before"] = old["before"]
    if new:
        for row in old["tasks"]:
            mark_replaced(row, new)
        stage.learner.crew.say("new classes or test pictures, scored as they are now from task"
                               f" {stage.task + 1} on: {', '.join(new)}")
    parent = Path(stage.learner.c.continue_).absolute()
    since = old.get("scored_since", {}) | new
    stage.results = results | {
        "tasks": old["tasks"], "parent": {"run": str(parent), **past["version"]},
        "lineage": [*old.get("lineage", []), past["version"]["weights"]],
        "seconds": old["seconds"], "gflops_spent": results["gflops_spent"] + old["gflops_spent"],
        "scored_since": {name: task for name, task in since.items() if name in now},
    }  # fmt: skip
    stage.timeline.store.adopt(parent / "experts", past["experts"])
    stage.timeline.load_state(past["timeline"])
    stage.method.load_state(past["method"])
    if past["model"]:
        stage.learner.model.load_state_dict(past["model"])


def mark_replaced(row, new):
    """Writes into a row, and those in it, whose test data are others from which task on: scores of
    these datasets compare with none that has another mark."""
    row["replaced"] = new | row.get("replaced", {})
    for part in ("subset", "before"):
        if part in row:
            mark_replaced(row[part], new)


def kept_for_the_next(stage):
    """What read_past() reads: all that the next update needs, and no tensor twice."""
    model = stage.learner.model.state_dict() if stage.timeline.init == "latest" else None
    method = stage.method.state() | {name: {} for name in stage.method.anew}
    return once({
        "chunks": stage.chunks, "held": stage.mixture.held(), "theta_0": stage.timeline.base,
        "model": model, "method": method, "timeline": stage.timeline.state(),
        "experts": stage.timeline.store.hashes,
    }, {})  # fmt: skip


def once(value, known):
    """A nested value with equal tensors as one, which torch.save writes once."""
    if isinstance(value, dict):
        return {k: once(v, known) for k, v in value.items()}
    if torch.is_tensor(value):
        value = value.detach().cpu()
        key = str(value.dtype), tuple(value.shape), fingerprint({"": value})
        return known.setdefault(key, value)
    return value


# -------------------------------------------------------------------------------- a run's folder


class Folder:
    """Where a run writes: config.json, log.jsonl, state.pt, theta_0; at its end model, picture,
    results.json. Of several processes, which have to see the same folder, only the first writes."""

    def __init__(self, c, crew, signals):
        self.path = Path(c.out)
        self.c = c
        self.crew = crew
        self.signals = signals
        self.asked = json.loads(json.dumps(dataclasses.asdict(c)))  # c: what becomes of it, too
        self.log_file = None  # locked as long as the run lives
        self.state = None
        self.run = None  # {"id", "inputs", "accepted_changes"}, beside the options in config.json
        self.broken = set()  # sentences about pictures
        self.pending = []  # log rows whose numbers are still on the device: asking would stall it
        self.began = time.monotonic()  # less the seconds of the processes before this one
        self.due = self.began + c.save_every
        self.new = False  # whether the folder was made here

    def __enter__(self):
        try:
            if self.crew.leads:
                self._lock()
            self.crew.told()  # the others read when it is locked
            self._read()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind, error, _):
        if isinstance(error, Stopped):
            kept = "nothing was kept, for nothing was trained yet"
            if self.state:
                kept = f"all that was trained is kept in {self.path}: the same command goes on"
            error.args = (error.args[0], kept)
        self._close()

    # -------- at the start: lock, then read

    def _lock(self):
        check_folder(self.path, "--out")
        names = set(os.listdir(self.path)) if self.path.exists() else set()
        beginning = {"config.json.part"}  # of a run that was killed as it began
        if "log.jsonl" in names:
            with open(self.path / "log.jsonl", "rb") as f:
                ours = b'{"event": '.startswith(f.read(10))  # or empty
            beginning |= {"log.jsonl"} if ours else set()
        if names - beginning and recorded(self.path) is None:
            raise ValueError(f"{self.path} is there and is no run of fomo.py: name another --out")
        self.new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        log_file = (self.path / "log.jsonl").open("a", encoding="utf-8")
        if not lock(log_file):
            log_file.close()
            raise ValueError(f"another process is running in {self.path}: name another --out")
        self.log_file = log_file
        for torn in self.path.rglob("*.part*"):  # of processes that were killed: ours is the lock
            torn.unlink()

    def _read(self):
        """What an earlier process left: the run's options, which have to be the same, its state."""
        if (self.path / "results.json").exists():
            raise ValueError(f"{self.path} holds a finished run: name another --out,"
                             f" delete it, or go on with new data by --continue {self.path}")
        self.run = recorded(self.path)
        if self.run is None:
            return
        before = self.run["asked"]
        other = [f"{flag(k)} was {before.get(k)}, is {value}" for k, value in self.asked.items()
                 if k not in FREE + MACHINE and before.get(k) != value]  # fmt: skip
        if other:
            raise ValueError(f"{self.path} holds an unfinished run of other options"
                             f" ({', '.join(other)}): name another --out")
        self.state = self._read_state()

    def _read_state(self):
        """The newest state that is whole. None where there is none yet."""
        names = (self.path / "state.pt", self.path / "state-before.pt")
        there = [path for path in names if path.exists()]
        for path in there:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                sound = state["id"] == self.run["id"]
                sound = sound and min(state["log_bytes"], state["step"]) >= 0
            except Exception:  # noqa: BLE001 -- whatever a torn file makes of torch
                sound = False
            if sound:
                return state
            if path != there[-1]:
                self.crew.say(f"{path} is no state of this run: going on from the one before")
        if there:
            raise ValueError(f"{there[0]} is no state of this run: delete {self.path}")
        return None

    # -------- then: is the input the same, and where was the run

    def begin(self, found, past):
        """Called when all input has proved good, with its hashes; before, nothing was written."""
        if self.run is None:
            self.run = {"id": self.crew.told(secrets.token_hex(8)), "continues": past["version"],
                        "inputs": found, "accepted_changes": [], "asked": self.asked}  # fmt: skip
        before = self.run["inputs"]
        changes = [in_words(name, before.get(name), found.get(name))
                   for name in sorted(before.keys() | found.keys())
                   if before.get(name) != found.get(name)]  # fmt: skip
        if changes and not self.c.accept_changes:
            raise ValueError(f"{self.path} was begun with other input ({', '.join(changes)}): put"
                             " it back, name another --out, or go on all the same with"
                             " --accept-changes")
        self.run["accepted_changes"] += changes
        self.run["inputs"] = found
        if self.crew.leads:
            write_json(self.path / "config.json", {**dataclasses.asdict(self.c), "run": self.run})

    def restore(self, stage):
        """The stage as it was saved, if it was; from here on a signal waits for the next pause."""
        self.signals.held = True
        state = self.state
        if state is None and self.crew.leads:
            self.log_file.truncate(0)
        if state is None or state["stage"] != stage.name:
            return
        try:
            known = stage.results.get("theta_0_sha256")
            if known != state["results"].get("theta_0_sha256"):
                raise ValueError("it began from another theta_0")
            if stage.name == "stream":
                stage.timeline.store.restore(state["experts"])
            stage.learner.model.load_state_dict(state["model"])
            stage.method.load_state(state["method"])
            stage.timeline.load_state(state["timeline"])
            stage.results = state["results"]
            stage.task = state["task"]
            stage.step = state["step"]
            stage.saved = state["inside"]
            self.began = time.monotonic() - state["seconds"]
            self.broken = set(state.get("broken", ()))
        except (KeyError, TypeError, RuntimeError, IndexError, AttributeError, ValueError) as e:
            raise ValueError(f"{self.path}/state.pt is no state of this run ({type(e).__name__}:"
                             f" {e}): delete {self.path}") from e
        self.crew.say(f"{self.path}: going on with {title(stage)}, after {stage.step} steps of it")
        if self.crew.leads:  # rows that were written after the state go
            size = os.path.getsize(self.path / "log.jsonl")
            self.log_file.truncate(min(size, state["log_bytes"]))
        self.state = {"stage": stage.name}

    # -------- while it runs

    def seconds(self):
        return time.monotonic() - self.began

    def log(self, event, **row):
        if self.crew.leads:
            self.log_file.write(json.dumps({"event": event, **row}) + "\n")
            self.log_file.flush()

    def name_broken(self, faults):
        """Pictures that could not be read, and were replaced: logged once; too many end the run."""
        for fault in dict.fromkeys(faults):
            if fault not in self.broken:
                self.log("broken picture", fault=fault)
        self.broken.update(faults)
        if len(self.broken) > self.c.max_broken:
            raise ValueError(f"more than {self.c.max_broken} pictures cannot be read"
                             f" (--max-broken), the last: {faults[-1]}")

    def log_step(self, stage, rate, loss, norm, logit_scale):
        event = "step" if stage.name == "stream" else "theta_0 step"
        row = {"event": event, "task": stage.task + 1, "step": stage.step, "lr": rate, "loss": loss,
               "grad_norm": norm, "logit_scale": logit_scale.detach().clone()}  # fmt: skip
        self.pending.append(row)
        if len(self.pending) == 20:
            self.write_steps()

    def write_steps(self):
        """ValueError where a loss or a gradient is not finite: the weights after it are lost."""
        rows = self.pending
        self.pending = []
        finite = {"loss": "loss", "grad_norm": "gradient's norm"}
        if self.c.precision == "fp16":  # whose scaler leaves out steps of other gradients
            del finite["grad_norm"]
        for row in rows:
            row |= {k: float(v) for k, v in row.items() if torch.is_tensor(v)}
            for key, what in finite.items():
                if not math.isfinite(row[key]):
                    raise ValueError(f"the {what} is {row[key]} at step {row['step']} of task"
                                     f" {row['task']}: lower --lr, or --precision fp32")
            self.log(**row)

    def pause(self, stage):
        """Called where nothing is half done: saves if it is time to, and stops if a signal came."""
        number, due = self.crew.agree(self.signals.number, int(time.monotonic() >= self.due))
        if due or number:
            self.save(stage)
        if number:
            raise Stopped(number)

    def save(self, stage):
        """The whole state, of which the one before is kept."""
        began = time.monotonic()
        self.write_steps()
        model = stage.learner.model.state_dict()
        hashes = self.crew.gathered(self.crew.count > 1 and fingerprint(model))
        if len(set(hashes)) > 1:
            raise ValueError(f"the processes do not hold the same weights: {hashes}")
        inside = stage.saved
        if stage.optimizer and stage.step <= stage.steps:
            inside = {"optimizer": stage.optimizer.state_dict(),
                      "scaler": stage.scaler.state_dict()}  # fmt: skip
        if self.crew.leads:
            state = {
                "id": self.run["id"], "stage": stage.name, "task": stage.task, "step": stage.step,
                "model": model, "method": stage.method.state(), "inside": inside,
                "timeline": stage.timeline.state(), "results": stage.results,
                "experts": getattr(stage.timeline.store, "hashes", []), "seconds": self.seconds(),
                "log_bytes": os.path.getsize(self.path / "log.jsonl"), "broken": [*self.broken],
            }  # fmt: skip
            with whole(self.path / "state.pt", self.path / "state-before.pt") as f:
                torch.save(state, f)
        self.state = {"stage": stage.name}
        cost = time.monotonic() - began
        self.due = time.monotonic() + max(self.c.save_every, 50 * cost)  # at most 2 % of the time

    # -------- at the end

    def finish(self, stage):
        """What was deployed last becomes the run's model; results.json, the last, ends the run."""
        results = stage.results
        last = (results["tasks"] or [results["theta_0"]])[-1]
        results["final"] = {k: last[k] for k in ("ka", "zs", "gm", "datasets", "samples")}
        results["accepted_changes"] = self.run["accepted_changes"]
        found = self.run["inputs"].items()  # a report tells runs on other data apart
        results["data_sha256"] = digest({k: v for k, v in found if k.endswith(SCORED)})
        results["training_sha256"] = digest({k: v for k, v in found if k.endswith(TRAINED)})
        results["seconds"] = results.get("seconds", 0) + self.seconds()  # and of what it continues
        results["config"] = dataclasses.asdict(self.c)
        results["over_time"] = evaluate.over_time(results)
        if results["tasks"]:  # which this process need not have trained
            stage.shown.model.load_state_dict(stage.timeline.deploy())
        if not self.crew.leads:
            return results
        failed = evaluate.failures(self.c.gate, results["before"] or results["theta_0"], last)
        results |= {"deployed": "before" if failed else "after", "gate_failed": failed}
        self._ship(stage, failed)
        joint = self.c.method == "joint"
        beside = [] if joint else evaluate.joint_beside(self.path, results)
        evaluate.page(results, self.path / "picture.png", beside)
        if self.c.method not in ("joint", "zero-shot") and not failed:
            kept = kept_for_the_next(stage)
            with whole(self.path / "continue.pt") as f:
                torch.save(kept, f)
            results["continue_sha256"] = file_hash(self.path / "continue.pt")
        write_json(self.path / "results.json", results)
        for name in ("state.pt", "state-before.pt", "theta_0.safetensors"):
            (self.path / name).unlink(missing_ok=True)
        self.crew.say(*evaluate.words(results))
        if failed:
            self.crew.say(f"the gate fails ({'; '.join(failed)}): model.safetensors has the weights"
                          " before this update, model-refused.safetensors the new ones")
        elif self.c.gate:
            self.crew.say(f"the gate holds: {self.c.gate}")
        self.crew.say(f"{self.path}: results.json, log.jsonl, picture.png, model.safetensors"
                      f" ({self.seconds():.0f} s)")
        return results

    def _ship(self, stage, failed):
        """model.safetensors: the new weights, or those before where the gate fails; beside it the
        tokenizer's file, where `evaluate --weights` and others look for it."""
        model = stage.shown.model
        version = {"task": stage.task, "weights": fingerprint(model.state_dict()),
                   "theta_0": stage.results["theta_0_sha256"],
                   "parent": (self.run["continues"] or {}).get("weights")}  # fmt: skip
        stage.results["version"] = version
        name = "model-refused.safetensors" if failed else "model.safetensors"
        clip.save(model, self.path / name, fomo=json.dumps(version))
        if failed and self.c.continue_:
            shipped = Path(self.c.continue_) / "model.safetensors"
            shutil.copyfile(shipped, self.path / "model.safetensors")
        elif failed:
            model.load_state_dict(stage.timeline.base)
            clip.save(model, self.path / "model.safetensors")
        merges = stage.learner.merges
        if merges:
            endings = {".gz": "bpe_simple_vocab_16e6.txt.gz", ".json": "tokenizer.json"}
            shutil.copyfile(merges, self.path / endings.get(Path(merges).suffix, "merges.txt"))

    def _close(self):
        """Leave a finished run, or one that can go on, or nothing. Other people's files stay."""
        if self.log_file is None:
            return
        with contextlib.suppress(OSError):  # a full disk's, again: the row stays in the buffer
            self.log_file.close()
        kept = ("results.json", "state.pt", "state-before.pt")
        if any((self.path / name).exists() for name in kept):
            return
        for name in ("config.json", "config.json.part", "log.jsonl", "state.pt.part",
                     "theta_0.safetensors"):  # fmt: skip
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / "experts", ignore_errors=True)
        if self.new:
            with contextlib.suppress(OSError):  # not empty
                self.path.rmdir()


def recorded(folder):
    """What begin() wrote of a run into the folder's config.json, None where that is no run's."""
    try:
        run = json.loads((folder / "config.json").read_text(encoding="utf-8"))["run"]
        return {**run, "asked": {**run["asked"]}}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def in_words(name, old, new):
    """What has changed of inputs()."""
    if old is None or new is None:
        return f"{name} {'is new' if old is None else 'has gone'}"
    return f"{name} changed" if len(old) == 64 else f"{name} was {old}, is {new}"


@contextlib.contextmanager
def whole(path, before=None):
    """A file to write, which is on the disk before it takes its name. The file that is there keeps
    the name `before`, if one is given."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        if before and path.exists():
            os.replace(path, before)
        os.replace(part, path)
    except RuntimeError as e:  # torch's for a write that fails
        free = shutil.disk_usage(part.parent).free
        raise OSError(f"{part} cannot be written, is the disk full? ({free} bytes free)") from e
    finally:
        part.unlink(missing_ok=True)  # what a full disk has of it


def check_folder(path, flag):
    """ValueError where a folder cannot be, or be made: better before the work than after it."""
    there = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{there} is not a folder that can be written: name another with {flag}")


def check_file(path, inputs=()):
    """The same for a file, which must not be one of the inputs or hold what is not ours."""
    folder = os.path.dirname(os.path.abspath(path))
    can_be = os.path.isdir(folder) and os.access(folder, os.W_OK)
    if not path or os.path.isdir(path) or not can_be:
        raise ValueError(f"--out {path!r} cannot be written: name a file in a folder that can be")
    if any(os.path.realpath(p) == os.path.realpath(path) for p in inputs):
        raise ValueError(f"--out {path!r} is one of the inputs: give another name")
    if os.path.exists(path) and not is_ours(path):
        raise ValueError(f"--out {path!r} is there, and only pictures and scores that a command"
                         " wrote are written over: name another, or remove it")  # fmt: skip


def is_ours(path):
    """Whether an existing file is a picture, scores or a list of broken pictures that a command
    wrote. Not a run's results, nor a stream, which may be anybody's."""
    try:
        if str(path).endswith(".png"):
            with PIL.Image.open(path) as image:
                return image.format == "PNG" and image.info.get("Software") == "fomo"
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            return False
        if Path(path).name == "broken.json":
            return all(isinstance(faults, list) for faults in found.values())
        return "chance" in found and "config" not in found
    except (OSError, ValueError):
        return False


def write_json(path, value):
    with whole(path) as f:
        f.write(json.dumps(value, indent=1).encode())


def told_so_far(results):
    """The first lines of a run's table: its head and the rows that are there."""
    whole = results["theta_0"]
    lines = [evaluate.run_head(results), evaluate.run_row("theta_0", "", whole)]
    for before, row in zip(evaluate.rows_before(results), results["tasks"]):
        lines.append(evaluate.run_row(row["task"], row["steps"], row, before, whole))
        if results["before"] and row["task"] == results["parent"]["task"]:
            lines.append(evaluate.run_row("before", "", results["before"]))
    return "\n".join(lines)


# ----------------------------------------------------------------------------- sub-commands


def report_command(argv):
    parser = argparse.ArgumentParser("fomo.py report", description="Table and pictures of finished"
                                     " runs; those that differ in their seed alone are one line.")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=os.path.expanduser,
                        help="folders; unfinished runs are left out")  # fmt: skip
    parser.add_argument("-o", "--out", default="report.png", type=os.path.expanduser,
                        help="the pictures; beside it each alone (default report.png)")  # fmt: skip
    style = parser.add_mutually_exclusive_group()
    for name in ("markdown", "json"):
        style.add_argument(f"--{name}", dest="style", action="store_const", const=name)
    args = parser.parse_args(argv)
    runs, unfinished = evaluate.read_runs(args.runs)
    for folder in unfinished:
        print(f"{folder} has no results.json: left out", file=sys.stderr)
    check_file(args.out)
    for part in evaluate.report_files(args.out).values():
        check_file(str(part))
    free = FREE + MACHINE + ("seed",)
    table, files = evaluate.report(runs, args.out, args.style or "text", free)
    print(table)
    print(f"drawn in {', '.join(map(str, files))}", file=sys.stderr)


EVALUATE = ("weights", "model", "activation", "bpe", "data", "heldout", "template", "download",
            "out", "device", "precision", "threads", "workers", "cache")  # fmt: skip


def evaluate_command(argv):
    description = ("Scores of --weights on all test data of --data, the drawn world's without."
                   " --out is the file of scores (default scores.json).")  # fmt: skip
    extra = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    extra.add_argument("--templates", type=os.path.expanduser,
                       help="file of templates with {}, one a line, to average over")  # fmt: skip
    extra.add_argument("--per-class", action="store_true", help="the scores of each class too")
    extra.add_argument("--baseline", type=os.path.expanduser,
                       help="what to put beside: a scores.json, or a run or weights, which are"
                       " scored now")  # fmt: skip
    more, argv = extra.parse_known_args(argv)
    c = parse(argv, "fomo.py evaluate", description, EVALUATE, [extra])
    if c.weights is None:
        raise ValueError("evaluate scores --weights: name a checkpoint")
    out = c.out or "scores.json"
    inputs = (c.weights, *c.data, more.baseline, more.templates)
    check_file(out, [path for path in inputs if path])
    c, crew = resolve(c)
    world = load_world(c, crew)
    learner = load_learner(c, crew, world)
    templates = more.templates and evaluate.read_templates(more.templates)
    before = baseline(learner, more.baseline, templates) if more.baseline else {}
    numbers = score_now(learner, templates)
    scores = summary(world, {name: n["score"] for name, n in numbers.items()})
    datasets = world.adaptation + world.heldout
    if crew.leads:
        samples = sum(len(d.test) for d in datasets)
        write_json(out, {"weights": c.weights, **scores, "samples": samples, "numbers": numbers,
                         "chance": evaluate.chance(world.adaptation, world.heldout)})  # fmt: skip
    crew.say(evaluate.score_table(numbers, roles(world), before))
    for d in datasets:
        if more.per_class and numbers[d.name].get("per_class"):
            table = evaluate.class_table(numbers[d.name], d.classes, before.get(d.name))
            crew.say(f"\n{d.name}\n{table}")
    old = {}
    if before.keys() >= numbers.keys():
        old = summary(world, {name: before[name]["score"] for name in numbers})
    means = []
    for metric in ("ka", "zs", "gm"):
        if scores[metric] is not None:
            change = f" ({scores[metric] - old[metric]:+.1f})" if old else ""
            means.append(f"{metric.upper()} {scores[metric]:.1f}{change}")
    crew.say(f"{'  '.join(means)} (all of it in {out})")


def roles(world):
    return {d.name: "KA" for d in world.adaptation} | {d.name: "ZS" for d in world.heldout}


def score_now(learner, templates=None):
    """{dataset: its numbers} on all test data."""
    learner.model.to(learner.crew.device).eval()
    datasets = learner.world.adaptation + learner.world.heldout
    return {d.name: score(learner, d, range(len(d.test)), templates)
            for d in Lines(datasets, "scoring", len(datasets), 0, learner)}  # fmt: skip


def baseline(learner, path, templates):
    """The numbers of what --baseline names: a file of them, or a run or weights to score now."""
    if path.endswith(".json"):
        return evaluate.read_numbers(path)
    if os.path.exists(os.path.join(path, "results.json")):
        path = os.path.join(path, "model.safetensors")
    c = dataclasses.replace(learner.c, weights=path, model=None)
    return score_now(load_learner(c, learner.crew, learner.world), templates)


def merge_command(argv):
    p = argparse.ArgumentParser("fomo.py merge", argument_default=argparse.SUPPRESS,
                                description="Merge files of weights in any layout.")  # fmt: skip
    p.add_argument("base", help="theta_0; the result has its dtypes, metadata and names, or"
                   " OpenAI's names if it is a CLIP of two transformers")
    p.add_argument("experts", nargs="+", metavar="expert")
    p.add_argument("-o", "--out", required=True, help="safetensors file to write; must not exist")
    p.add_argument("--activation", default="auto", choices=ACTIVATIONS,
                   help="where no file says it (default auto)")  # fmt: skip
    p.add_argument("--technique", default="linear", choices=merge.TECHNIQUES,
                   help="(default linear)")  # fmt: skip
    p.add_argument("--weights", type=float, nargs="+",
                   help=f"one per expert; not for {', '.join(merge.UNWEIGHTED)}")  # fmt: skip
    for name, known in merge.OPTIONS.items():
        add_option(p, name, known.kind, of_technique(name))
    args = p.parse_args(argv)
    options = {name: value for name, value in vars(args).items() if name in merge.OPTIONS}
    if "lines" in options:
        options["lines"] = lines_of(options["lines"])
    out = os.path.expanduser(args.out)
    if os.path.exists(out):
        raise ValueError(f"{out} exists: choose another --out or remove it")
    if out.endswith((".pt", *clip.NOT_WRITTEN)):
        raise ValueError(f"{out}: what is written is safetensors, so name it .safetensors")
    check_file(out)
    paths = [clip.fetch(os.path.expanduser(path)) for path in (args.base, *args.experts)]
    known = clip.agree(paths, ACTIVATIONS[args.activation])  # what load needs to know of the result
    files = [clip.read_tensors(path, mapped=True) for path in paths]
    metadata = {"format": "pt"} | files[0].metadata | known
    metadata.pop("fomo", None)  # task and hash of the base's weights, not of these
    files = [clip.openai_names(f) for f in files]  # whatever their layouts
    began = time.time()
    readings = 3 if options.get("whole") else 2 if args.technique == "tall-mask" else 1
    total = len(files[0]) * len(args.experts) * readings
    with tqdm(desc=args.technique, total=total, unit=" tensors", leave=False, disable=None) as bar:
        for file, path in zip(files, paths):
            file.path = path  # merge names it where a tensor is not what it should be
            file.readers = {n: partial(reading, tensor, bar) for n, tensor in file.readers.items()}
        weights = getattr(args, "weights", None)
        merged = merge.merge(args.technique, files[0], files[1:], weights, **options)
    clip.write_tensors(merged, out, metadata)
    plural = "s" * (len(args.experts) > 1)
    print(f"{args.technique} of {len(args.experts)} expert{plural}: {len(merged)} tensors in {out}"
          f" ({time.time() - began:.1f} s)")  # fmt: skip


def reading(tensor, bar):
    """A tensor of a file, whose reading moves the bar."""
    bar.update()
    return tensor()


WORLD = ("data", "heldout", "pool", "captions", "prompts_too", "template", "validation", "download",
         "weights", "model", "activation", "bpe", "out", "seed", "device", "precision", "threads",
         "workers", "cache")  # fmt: skip


def stream_command(argv):
    description = "Writes all concepts of --data in an --order, in the published streams' format."
    c = parse(argv, "fomo.py stream", description, (*WORLD, "order", "reverse"))
    out = c.out or "stream.json"
    check_file(out, c.data)
    c, crew = resolve(c, trains=False)
    learner = load_learner(c, crew, load_world(c, crew))
    stream = load_stream(learner)
    data.write_stream(stream, out)
    names = {name for name, _ in stream}
    print(f"{len(stream)} concepts of {len(names)} datasets, {c.order} order: {out}")


def inspect_command(argv):
    description = ("Reads every picture of --data once, names those that are broken, and draws"
                   " sheets of pictures with captions into the folder --out (default inspect).")
    c = parse(argv, "fomo.py inspect", description, WORLD)
    if c.workers < 0:
        c.workers = os.cpu_count() or 1  # nothing else wants the cores
    out = Path(c.out or "inspect")
    check_folder(out, "--out")
    c, crew = resolve(c, trains=False)
    world = load_world(c, crew)
    splits = [(d.name, which, getattr(d, which)) for d in world.adaptation + world.heldout
              for which in ("train", "test")]  # fmt: skip
    splits += [("pool", "train", world.pool)] if world.pool is not None else []
    sheets = {(name, which): out / f"{name}-{which}.png" for name, which, _ in splits}
    out.mkdir(parents=True, exist_ok=True)
    for file in (*sheets.values(), out / "broken.json"):
        check_file(str(file))
    role = roles(world) | {"pool": "P"}
    rows = [["dataset", "role", "split", "samples", "concepts", "captions", "broken"]]
    faults = {}
    for name, which, split in splits:
        if not len(split):
            continue
        found = data.broken_pictures(split, c.workers)
        faults[f"{name} {which}"] = found
        captions = sum(1 if isinstance(one, str) else len(one) for one in split.captions)
        counts = (len(split), len(set(split.labels.tolist())), captions)
        rows.append([name, role[name], which, *(f"{n:,}" for n in counts), str(len(found))])
        evaluate.save_picture(data.contact_sheet(split, c.seed), sheets[name, which])
        for fault in found:
            print(fault)
    print(evaluate.aligned(rows))
    write_json(out / "broken.json", faults)
    print(f"contact sheets and broken.json in {out}")


def convert_command(argv):
    p = argparse.ArgumentParser("fomo.py convert", description="A checkpoint in another layout.")
    p.add_argument("weights", help="a file, a folder, hf:ORG/REPO, openai:ViT-B-32")
    p.add_argument("out", help="file, or for hf a folder; must not exist")
    p.add_argument("--layout", required=True, choices=["open_clip", "openai", "hf"])
    p.add_argument("--activation", default="auto", choices=ACTIVATIONS,
                   help="of weights that do not say it (default auto)")  # fmt: skip
    args = p.parse_args(argv)
    out = os.path.expanduser(args.out)
    if os.path.exists(out):
        raise ValueError(f"{out} exists: give another name, or remove it")
    model = load_clip(os.path.expanduser(args.weights), args.activation)
    clip.save(model, out, args.layout)
    print(f"{args.weights} in the layout of {args.layout}: {out}")


COMMANDS = {
    "report": report_command, "evaluate": evaluate_command,
    "budget": partial(budget.main, models=clip.CONFIGS, paper=PAPER, own=OWN),
    "merge": merge_command, "convert": convert_command, "stream": stream_command,
    "inspect": inspect_command,
}  # fmt: skip
FULL = "; free some space where --out or --cache lies and start the same command again"


def main(argv=None):
    """Runs a command. What a user can mend: a sentence, exit status 2. A gate that fails: 3."""
    refused = False
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # to be deterministic
    torch.use_deterministic_algorithms(True)  # not to warn only: attention would not follow
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time and finds nothing here
    try:
        if argv and argv[0] in COMMANDS:
            COMMANDS[argv[0]](argv[1:])
        elif argv and not argv[0].startswith("-"):
            raise ValueError(f"there is no command {argv[0]}; there are {', '.join(COMMANDS)}, and"
                             " without one, a run")
        else:
            results = run(parse(argv))
            refused = results and results.get("deployed") == "before"
        sys.stdout.flush()
        if dist.is_initialized():  # else a process that ends before the others aborts some of them
            dist.barrier()
            dist.destroy_process_group()
    except BrokenPipeError:  # who read our output has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, MemoryError, RuntimeError, EOFError) as e:
        sentence = explain(e)
        if sentence is None:
            raise
        print(f"fomo: {sentence}", file=sys.stderr)
        return 2
    except Stopped as e:
        kept = e.args[1] if len(e.args) > 1 else "nothing was lost"
        print(f"\nfomo: stopped by {signal.Signals(e.args[0]).name}; {kept}", file=sys.stderr)
        return 128 + e.args[0]
    except KeyboardInterrupt:
        print("\nfomo: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 3 if refused else 0


def explain(e):
    """One sentence for an error that a user can do something about. None for a fault of ours."""
    text = str(e)
    if isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return "the memory is full: take --micro-batch, a smaller --batch-size or --precision bf16"
    # torch raises these wherever this process is when one of its workers dies
    if "DataLoader worker" in text or isinstance(e, (ConnectionError, EOFError)):
        return f"a process that prepares batches died ({e}): memory full? take fewer --workers"
    if isinstance(e, OSError) and e.strerror:
        place = f"{e.filename}: " if e.filename else ""
        return f"{place}{e.strerror}{FULL if e.errno == errno.ENOSPC else ''}"
    if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = " ".join(text.split())[:150]
        return (f"--compile does not work here ({reason}): start again without it, in this folder"
                " with --accept-changes")  # fmt: skip
    if "deterministic" in text and isinstance(e, RuntimeError):
        return f"{text.splitlines()[0][:150]}; a run's --any-order does without"
    if dist.is_initialized() and isinstance(e, RuntimeError):
        return f"another process of this run has ended; it says why ({text.splitlines()[0][:120]})"
    return text if isinstance(e, (ValueError, OSError)) else None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.showwarning = lambda message, *_: print(f"fomo: {message}", file=sys.stderr)
    sys.exit(main())
