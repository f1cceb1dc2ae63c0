"""Continual pretraining of CLIP: one model, many small updates, a compute budget.

    python fomo.py --method merge                 all of it on a drawn world: no files, no network
    python fomo.py report runs/*                  table and picture of finished runs
    python fomo.py --method merge --weights W --data D --stream S.json --heldout NAME --pool NAME
    torchrun --nproc-per-node 2 fomo.py --method merge     the same on two GPUs or CPU processes
    python fomo.py --continue runs/merge-0 --data D NEW    the next update of a finished run
    python fomo.py evaluate --weights W --data D  scores of one checkpoint
    python fomo.py inspect --data D               what the data are, and what is broken in them
    python fomo.py stream --data D --order time   an order of concepts, as a file
    python fomo.py convert IN OUT --layout hf     a checkpoint in another layout
    python fomo.py budget --model ViT-B-16        the compute of every method, counted
    python fomo.py merge OLD NEW -o OUT           an average of weights, or another merge

Roth et al. 2024, "A Practitioner's Guide to Continual Multimodal Pretraining" (arXiv 2408.14471).
Read the options, train(), run(), then what run() calls, in that order.
"""

import argparse
import ast
import contextlib
import copy
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

# Threads that only spin while they wait are 20 times slower beside other work. Torch reads this.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import budget
import clip
import data
import evaluate
import merge
import methods

THETA_0 = Path(__file__).with_name("study") / "theta_0.safetensors"  # of the drawn world
TIMELINES = {"merge": merge.TIMELINES["ema-merge"], **merge.TIMELINES}
RUNS = [*methods.METHODS, *(t for t in TIMELINES if t not in methods.METHODS), "joint", "zero-shot"]
ACTIVATION = "activation, for checkpoints that do not record it"
METAS = sorted(set().union(*methods.SCHEDULES.values()))
ACTIVATIONS = {"auto": None, "gelu": False, "quick_gelu": True}  # what clip.load calls quick_gelu
SAVE_EVERY = 300  # seconds between two states, or 50 times what saving one takes
MOST_BROKEN = 100  # pictures that cannot be read; one more ends the run

# What the paper uses (sec. 3 and 4), and what makes the same picture in a minute on a CPU.
PAPER = {"batch_size": 512, "lr": 1e-5, "tasks": 20, "merge_weight": 0.9, "budget": None}
TINY = {"batch_size": 64, "lr": 3e-4, "tasks": 8, "merge_weight": 0.77, "budget": 4000.0}
OWN = {"tiny": TINY, "small": TINY | {"budget": 16230.0}}


def option(default, text, choices=None, least=None):
    """A field of Config. least: the smallest value."""
    return field(default=default, metadata={"help": text, "choices": choices, "least": least})


@dataclass
class Config:
    """One run. load_learner() fills in the numbers that are None here: they depend on the model."""

    method: str = option("merge", "merge is ema-merge, joint the upper bound", RUNS)
    tasks: int = option(None, "T, number of updates in the stream (sec. 4)", least=1)
    budget: float = option(None, "memory-adjusted GFLOPs of a stream; default sec. 3.2's", least=0)
    steps: int = option(None, "steps a task, in place of --budget", least=1)
    batch_size: int = option(None, "image-text pairs a step", least=1)
    seed: int = option(0, "seed of the order of concepts and samples", least=0)
    score_subset: bool = option(False, "score class-balanced subsets, as the paper, not all data")
    eval_every: int = option(None, "steps between two scorings of what is trained", least=1)
    out: str = option(None, "folder of the run; default runs/[DATA-]METHOD-SEED")
    continue_: str = option(None, "folder of a finished run, to train its next --tasks (default 1)")
    gate: str = option(None, 'what ships new weights, against the old: "zs >= -1, earlier >= -2"')
    plan: bool = option(False, "say what the run would do, time one step, and stop")

    weights: str = option(None, "theta_0: file or folder in any CLIP layout, URL, hf:ORG/REPO,"
                          " openai:ViT-B-32, new:tiny; the drawn world has its own")
    activation: str = option("auto", ACTIVATION, ACTIVATIONS)
    bpe: str = option(None, "tokenizer's file, or openai:bpe; default the one beside the weights")

    stream: str = option(None, "JSON list of DATASET+++class, in place of --order")
    order: str = option("random", "order of the concepts (sec. 3.3)", data.ORDERS)
    reverse: bool = option(False, "the order backwards")
    mixture: str = option("0.33/0.34/0.33", "P/D/B, shares of a batch (sec. 3.1)")
    replay: int = option(0, "samples of the pool to draw P from, 0 for all", least=0)
    captions: str = option("default", "which of FoMo-in-Flux's captions", data.CAPTIONS)
    prompts_too: bool = option(False, "class prompts are captions too, where none names the class")
    template: str = option(data.TEMPLATE, "prompt of a class, for sources without prompts")
    validation: float = option(0.0, "share of the training data to score on instead", least=0)
    data: tuple = option((), "folders, tables, torchvision:NAME,...; default the drawn world")
    heldout: tuple = option(None, "datasets that no update teaches, for ZS; default the paper's 22")
    pool: tuple = option((), "pretraining data P: names of datasets, or shards ('{000..331}.tar')")

    lr: float = option(None, "peak learning rate (sec. 4)", least=0)
    schedule: str = option("cosine", "within a task (sec. 6.1)", methods.SCHEDULES)
    meta: str = option("none", "meta-schedule over tasks (sec. 6.1)", METAS)
    weight_decay: float = option(0.2, "of AdamW, whose betas are .9 and .999", least=0)
    method_options: tuple = option((), "options of the method, as rank=64")

    merge_weight: float = option(None, "w of m_t = w m_(t-1) + (1-w) theta_t; in wise-ft .5")
    merge_init: str = option(None, "weights that a task starts from (TIME, sec. 3)", merge.SOURCES)
    merge_deploy: str = option(None, "weights to score and ship, likewise", merge.SOURCES[1:])
    merge_technique: str = option("linear", "how weights are merged", merge.TECHNIQUES)
    merge_options: tuple = option((), "of the technique and of merge.Timeline, as density=.2")

    device: str = option("auto", "auto takes a GPU where there is one", ["auto", "cpu", "cuda"])
    precision: str = option("auto", "auto: bf16 if a GPU has it", ["auto", "fp32", "bf16", "fp16"])
    micro_batch: int = option(None, "pairs in memory at a time, same gradient", least=1)
    compile: bool = option(False, "torch.compile of the blocks: faster steps of a large model")
    any_order: bool = option(False, "faster sums on a GPU; the same command gives other bits")
    workers: int = option(-1, "processes that prepare batches; -1: what cores are left", least=-1)
    cache: str = option(os.path.expanduser("~/.cache/fomo"), "folder of downloads and indices")

    def ratios(self):
        """Shares of P, D and B in a batch; joint training has no buffer, its D is everything."""
        try:
            p, d, b = map(float, self.mixture.split("/"))
        except ValueError:
            raise ValueError(f"--mixture is P/D/B, as 0.3/0.4/0.3, not {self.mixture}") from None
        return (p, 1 - p, 0) if self.method == "joint" else (p, d, b)

    def of_method(self):
        """Options of the method, defaults included."""
        known = methods.OPTIONS.get(self.method, {})
        return known | named_options(self.method_options, known, f"--method {self.method}")

    def make_method(self):
        """What trains: merges and joint runs finetune."""
        return methods.METHODS.get(self.method, methods.Method)(**self.of_method())

    def of_timeline(self):
        """Arguments of merge.Timeline: as the method says, and the command line otherwise."""
        options = dict(TIMELINES.get(self.method, TIMELINES["finetune"]))
        given = {"init": self.merge_init, "deploy": self.merge_deploy, "weight": self.merge_weight}
        options |= {name: value for name, value in given.items() if value is not None}
        options["technique"] = self.merge_technique
        used = merge.timeline_used(options["init"], options["deploy"], self.merge_technique)
        known = [name for name in used if name not in ("technique", "weight")]
        return options | named_options(self.merge_options, known, f"merging in {self.method}")


GROUPS = {"method": "run", "weights": "theta_0", "stream": "data", "lr": "training",
          "merge_weight": "merging", "device": "machine"}  # first field -> title, for --help
FREE = ("out", "cache", "workers", "plan", "gate")  # options that do not change what is trained


# ---------------------------------------------------------------------------------------- the loop


def train(training):
    """The loop: each task starts from what the timeline says, trains, is merged and scored."""
    learner = training.learner
    method = training.method
    timeline = training.timeline
    model = learner.model
    c = learner.c
    rate_of = partial(methods.learning_rate, lr=c.lr, schedule=c.schedule, meta=c.meta)
    for task in range(training.task, len(training.task_concepts)):
        if training.step == 0 and not training.stopped:
            if task == 0 or timeline.init != "latest":  # else the model is where it was left
                method.load(model, timeline.start())
            method.before_task(model, task)
        model.train()
        optimizer, scaler = training.start_optimizer()
        batches = learner.batches(training.mixture, task, training.steps, training.step)  # P, D, B
        title = f"task {task + 1}/{len(training.task_concepts)}"
        for batch in progress(batches, title, training.steps, learner.processes, training.step):
            score_within(training)  # --eval-every
            rate = rate_of(training.step, training.steps, task)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = learner.backward(batch, scaler)
            penalty = method.penalty(model)
            if torch.is_tensor(penalty):  # once, whatever the number of pieces and processes
                scaler.scale(penalty).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(method.trained.values(), 1.0)
            if c.precision != "fp16" or norm.isfinite():  # else the scaler leaves this step out
                method.after_backward(model, rate)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if model.logit_scale.requires_grad:
                model.logit_scale.data.clamp_(max=clip.MAX_LOGIT_SCALE)
            training.log_step(rate, loss, norm)
            training.step += 1
            training.pause()  # saves the state if it is time to, and stops if a signal asks to
        training.optimizer = training.scaler = optimizer = scaler = None  # frees their memory
        method.after_task(model, batches_of_task(training), learner.gradient)
        timeline.add({n: t.detach().cpu() for n, t in method.plain(model).items()})
        training.task = task + 1
        training.step = 0
        training.save()
        score_missing_rows(training)  # of timeline.deploy()


def run(config):
    """The main job. Returns the results, as in results.json; None with --plan."""
    c = replace(config)
    processes = Processes(c)
    check_out(c)
    parent = read_parent(c.continue_) if c.continue_ else {}
    learner = load_learner(c, processes)
    world = learner.world = load_world(c, processes, parent)
    new_tasks = []
    if c.method != "zero-shot":
        new_tasks = data.tasks(load_stream(learner, parent), 1 if c.method == "joint" else c.tasks)
    mixture = data.Mixture(world, new_tasks, c.batch_size, c.ratios(), c.replay, c.seed,
                           parent.get("seen_samples"))
    old_tasks = parent.get("task_concepts", [])
    first = len(old_tasks)
    samples = mixture.ends[-1] - mixture.ends[first]
    options = argparse.Namespace(**(c.of_method() | vars(c)))
    steps, costs = budget.plan(learner.model.config, options, len(new_tasks), samples)
    announce(learner, mixture, first, steps, costs)
    if c.plan:
        return time_one_step(learner, mixture, first, steps) if new_tasks else None
    input_hashes = hash_inputs(learner, new_tasks, steps, parent)

    learner.model.load_state_dict(parent.get("theta_0", learner.model.state_dict()))
    training = Training(learner, mixture, old_tasks + new_tasks, first, steps, costs, input_hashes)
    with training.locked():
        if parent:
            training.restore(parent, c.continue_)
            training.join_results(parent["results"])
        training.resume()
        processes.say(evaluate.run_head(training.results))
        score_missing_rows(training)
        train(training)
        return training.finish()


# ------------------------------------------------------------------------------------ the options

PATHS = ("stream", "bpe", "out", "cache", "weights", "continue_", "data", "pool")  # ~ is home there


def flag(name):
    return "--" + name.rstrip("_").replace("_", "-")


def command_parser(name, description, options=()):
    """The parser of a command, with these fields of Config as options."""
    usage = "fomo.py [options]" if name == "fomo.py" else None  # all of them take a page
    p = argparse.ArgumentParser(name, usage, description, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        if f.name in GROUPS:
            group = p.add_argument_group(GROUPS[f.name])
        text = f.metadata["help"]
        if PAPER.get(f.name):
            text += f" (default {PAPER[f.name]}; tiny and small {TINY[f.name]})"
        elif f.default:
            text += f" (default {f.default})"
        choices = f.metadata["choices"]
        kind = os.path.expanduser if f.name in PATHS else str if f.type is tuple else f.type
        how = {"choices": choices, "metavar": None if choices else f.name.rstrip("_").upper(),
               "type": kind, "nargs": "*" if f.type is tuple else None}
        if f.type is bool:
            how = {"action": "store_true"}
        if f.name in options:
            group.add_argument(flag(f.name), dest=f.name, default=argparse.SUPPRESS,
                               help=text.replace("%", "%%"), **how)
    return p


def parse(argv):
    """Config of a run, from its arguments. ValueError where options do not go together."""
    parser = command_parser("fomo.py", __doc__, [f.name for f in fields(Config)])
    given = vars(parser.parse_args(argv))
    c = continued_config(given) if "continue_" in given else Config(**given)
    if not c.out:
        name = re.sub(r"\W+", "-", Path(c.data[0]).stem).strip("-") + "-" if c.data else ""
        c.out = f"runs/{name}{c.method}-{c.seed}"
    for f in fields(c):
        value = getattr(c, f.name)
        least = f.metadata["least"]
        if least is not None and value is not None and not least <= value < math.inf:
            raise ValueError(f"{flag(f.name)} must be a number of at least {least}, got {value}")
    if not c.data and {"heldout", "pool", "captions", "template", "validation"} & set(given):
        raise ValueError("the drawn world has datasets of its own: such options need --data")
    timeline = c.of_timeline()
    used = merge.timeline_used(timeline["init"], timeline["deploy"], c.merge_technique)
    for name in {"weight", "technique"} - {*used}:
        if f"merge_{name}" in given:
            raise ValueError(f"{c.method} uses no --merge-{name}: leave it out, or merge otherwise")
    methods.learning_rate(0, 1, 0, schedule=c.schedule, meta=c.meta)  # says what is wrong with it,
    merge.Timeline({}, **timeline)  # with merging, the method's options and the mixture
    c.make_method()
    c.ratios()
    return c


def named_options(words, known, owner):
    """("rank=8",) -> {"rank": 8}. ValueError for a name that is not among `known`."""
    options = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in known:
            raise ValueError(f"{owner} has no option {name}, but {[*known]}, as NAME=VALUE")
        options[name] = value
        with contextlib.suppress(ValueError, SyntaxError):  # a text
            options[name] = ast.literal_eval(value)
    return options


# --------------------------------------------------------------------------- processes and progress


class Processes:
    """The processes of torchrun, or this one alone. Settles the device, precision and workers."""

    def __init__(self, c):
        self.rank = int(os.environ.get("RANK", "0"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.leads = self.rank == 0  # the first process alone writes and prints
        if c.device == "auto":
            c.device = "cuda" if torch.cuda.is_available() else "cpu"
        gpu = c.device == "cuda"
        if gpu and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no GPU; --device auto takes what there is")
        torch.use_deterministic_algorithms(not c.any_order)  # not warn_only: attention ignores it
        self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if gpu else "cpu")
        if c.precision == "auto":
            c.precision = "bf16" if gpu and torch.cuda.is_bf16_supported(False) else "fp32"
        if c.workers < 0:
            cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            c.workers = min(16, max(0, cores - (1 if gpu else torch.get_num_threads())))
        if self.count > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")

    def say(self, *lines):
        for line in lines if self.leads else ():
            (tqdm.write if sys.stderr.isatty() else print)(line)  # above the bars

    def share(self, n):
        """-> (first, end) of this process's part of n things."""
        return n * self.rank // self.count, n * (self.rank + 1) // self.count

    def gathered(self, value=None):
        """-> every process's value, once all processes have come here."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values


def progress(iterable, title, total, processes, start=0):
    """The iterable, with a bar on a terminal; elsewhere, as in a log file, one every 30 s."""
    wait = 0.1 if sys.stderr.isatty() else 30
    return tqdm(iterable, title, total, leave=False, initial=start, mininterval=wait,
                delay=wait, disable=not processes.leads)


# ---------------------------------------------------------------------- model, batches and stream


@dataclass
class Learner:
    """A model with all that turns pictures and captions into features and gradients."""

    model: clip.CLIP
    tokenizer: clip.Tokenizer
    c: Config
    processes: Processes
    bpe: str = None  # path of the tokenizer's file
    world: data.World = None
    broken: "callable" = None  # takes sentences about pictures that cannot be read; None: an error

    def prepare(self, method):
        """Puts the model on the device as the method trains it."""
        model = self.model.to(self.processes.device)
        method.prepare(model)
        if self.c.compile:
            torch._dynamo.config.cache_size_limit = 64  # beyond it torch leaves blocks uncompiled
            # texts differ in length: a kernel for all, so that none depends on which came first
            for tower, dynamic in ((model.visual.transformer, False), (model.transformer, True)):
                for block in tower.resblocks:
                    block.compile(dynamic=dynamic)

    def autocast(self):
        low = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.c.precision]
        return torch.autocast(self.processes.device.type, dtype=low, enabled=low is not None)

    def scaler(self, **options):
        device = self.processes.device.type
        return torch.amp.GradScaler(device, enabled=self.c.precision == "fp16", **options)

    def encode_image(self, images):
        """uint8 [b, 3, S, S] -> [b, D], normalised, in float32 whatever the tower runs in."""
        images = images.to(self.processes.device, non_blocking=True)
        with self.autocast():
            features = self.model.encode_image(self.model.preprocess(images))
        return F.normalize(features.float(), dim=-1)

    def encode_text(self, captions):
        """list of b texts -> [b, D], likewise. A text that repeats is encoded once."""
        texts = list(dict.fromkeys(captions))
        tokens = self.tokenizer(texts, self.model.config.context_length)
        longest = int(tokens.argmax(dim=1).max()) + 1  # what follows the end token changes nothing
        tokens = tokens[:, :longest].to(self.processes.device, non_blocking=True)
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
        factor = scaler.scale(torch.ones((), device=self.processes.device))
        first, _ = self.processes.share(self.c.batch_size)
        rows = (first, self.c.batch_size) if self.processes.count > 1 else None
        with self.autocast():  # around all pieces, for which the weights are cast once
            loss = clip.backward(self.encode_image, self.encode_text, images, captions,
                                 self.model.logit_scale.exp(), self.c.micro_batch, rows, factor)
        if self.processes.count > 1:
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

    def loading(self, workers):
        """How pictures are read, whatever they are for."""
        how = self.model.preprocess
        return {"image_size": how.size, "resize": how.resize, "interpolation": how.interpolation,
                "broken": self.broken, "workers": workers}

    def batches(self, mixture, task, steps, start=0):
        """This process's part of the batches of a task: (images, captions)."""
        part = (self.processes.rank, self.processes.count)
        how = self.loading(self.c.workers)
        return data.loader(self.world, mixture, task, steps, start=start, part=part, **how)

    @torch.no_grad()
    def image_features(self, split, ids):
        """The pictures `ids` -> [N, D]. The processes share them out."""
        first, end = self.processes.share(len(ids))
        how = self.loading(self.c.workers if end - first > 2048 else 0)
        batches = data.test_loader(split, ids[first:end], **how)
        return self.gather(map(self.encode_image, batches), first, len(ids))

    @torch.no_grad()
    def text_features(self, texts):
        """list of N texts -> [N, D], likewise."""
        first, end = self.processes.share(len(texts))
        batches = [texts[i : min(i + 512, end)] for i in range(first, end, 512)]
        return self.gather(map(self.encode_text, batches), first, len(texts))

    def gather(self, mine, first, total):
        nothing = torch.zeros(0, self.model.config.embed_dim, device=self.processes.device)
        return clip.gather_rows(torch.cat([nothing, *mine]), first, total)


def load_learner(c, processes):
    """The checkpoint --weights, or what the run that --continue names has shipped. On the CPU."""
    if not (c.weights or c.continue_) and c.data:
        raise ValueError("data of your own need a model: name its --weights, or new:tiny")
    weights = f"{c.continue_}/model.safetensors" if c.continue_ else c.weights or str(THETA_0)
    quick_gelu = None if c.continue_ else ACTIVATIONS[c.activation]
    model = clip.load(weights, quick_gelu=quick_gelu, cache=c.cache)
    bpe = None
    if model.config.vocab_size != clip.CONFIGS["tiny"].vocab_size:  # whose tokens are bytes
        beside = not c.bpe or c.continue_
        bpe = clip.find_bpe(weights, c.cache) if beside else clip.fetch(c.bpe, c.cache)
    tokenizer = clip.Tokenizer(bpe)
    clip.check_tokenizer(model, tokenizer, weights)
    plain = replace(model.config, quick_gelu=False)
    name = next((name for name, known in clip.CONFIGS.items() if known == plain), None)
    wise = {"merge_weight": 0.5} if c.method == "wise-ft" else {}  # as its paper advises
    for option_name, default in (OWN.get(name, PAPER) | wise).items():
        if getattr(c, option_name) is None:
            setattr(c, option_name, default)
    return Learner(model, tokenizer, c, processes, bpe)


def load_world(c, processes, parent):
    """The datasets of --data, or the drawn world. parent: state of a continued run, or {}."""
    if not c.data:
        return data.toy()
    seen_samples = parent.get("seen_samples")
    old_sources = parent["config"]["data"] if parent else ()
    world = data.open_world(c.data, c.heldout, c.pool, c.captions, c.prompts_too, c.template,
                            c.validation, True, c.cache, seen_samples, old_sources)
    c.data = world.sources
    if parent:
        taught = {tuple(concept) for task in parent["task_concepts"] for concept in task}
        learnt = sorted({name for name, _ in taught} & {d.name for d in world.heldout})
        world.notes += [f"{name} of {of} was taught and is no longer scored" for of, name in
                        sorted(taught - {(d.name, name) for d in world.sets for name in d.classes})]
        if learnt:
            raise ValueError(f"{', '.join(learnt)} cannot be held out: an earlier task learnt it")
    processes.say(*world.notes)
    return world


def load_stream(learner, parent):
    """-> the concepts in order: of --stream, or in --order those with samples not seen before."""
    c = learner.c
    seen_samples = parent.get("seen_samples")
    concepts = data.concepts(learner.world.adaptation, seen_samples)
    if c.stream is not None:
        stream, notes = data.trainable(data.read_stream(c.stream), learner.world)
        left = len({*concepts} - {*stream})
        learner.processes.say(*notes, f"{c.stream} leaves out {left:,} concepts that are new")
        return stream
    if seen_samples is not None and not concepts:
        raise ValueError(f"nothing is new for {c.continue_}: it has seen all samples; add --data")
    return data.order(concepts, c.order, c.seed, order_key(learner, concepts), c.reverse)


@torch.no_grad()
def order_key(learner, concepts):
    """What --order sorts the concepts by (sec. 3.3), None where it needs no key."""
    how = learner.c.order
    world = learner.world
    if how == "frequency":
        if world.pool is None:
            raise ValueError("--order frequency counts names in captions of a --pool: name one")
        return data.occurrences(concepts, world.pool.captions)
    if how not in ("performance", "similarity"):
        return data.times(concepts) if how == "time" else None
    learner.model.to(learner.processes.device).eval()
    prompt = {(d.name, name): prompt for d in world.adaptation
              for name, prompt in zip(d.classes, d.prompts)}
    texts = learner.text_features([prompt[concept] for concept in concepts])
    if how == "similarity":
        return texts.cpu().numpy()
    pool = world.pool if world.pool is not None else world.adaptation[0].train
    chosen = numpy.random.default_rng((learner.c.seed, 9)).permutation(len(pool))[:256]
    others = learner.image_features(pool, chosen)
    losses = []  # mean contrastive loss of a concept's first samples, among pictures of the pool
    for (dataset, name), text in zip(concepts, texts):
        d = next(d for d in world.adaptation if d.name == dataset)
        own = (d.train.labels == d.classes.index(name)).nonzero()[0][:32]
        image = learner.image_features(d.train, own)
        wrong = (others @ text).expand(len(image), -1)  # [n, 256]
        logits = torch.cat([(image @ text)[:, None], wrong], 1) * learner.model.logit_scale.exp()
        losses.append(float(F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=int))))
    return losses


# ------------------------------------------------------------- before the first step, and scoring


def announce(learner, mixture, first, steps, costs):
    """The first lines of a run: what it will do, how often it sees a sample, what that costs."""
    c = learner.c
    say = learner.processes.say
    count = learner.processes.count
    sets = learner.world.adaptation + learner.world.heldout
    evaluate.check_gate(c.gate, [d.name for d in sets], learner.world.heldout, first > 0)
    tasks = len(mixture.ends) - 1 - first
    samples = mixture.ends[-1] - mixture.ends[first]
    passes = steps * sum(mixture.counts(first + t)[1] for t in range(tasks)) / max(1, samples)
    peak = budget.peak_memory(learner.model.config, -(-c.batch_size // count),
                              c.method.replace("zero-shot", "finetune"), c.precision,
                              c.of_method().get("rank", 0), c.micro_batch)
    if c.continue_:
        gone = ", ".join(f"{name} {n:,}" for name, n in mixture.gone.items()) or "none"
        say(f"{c.continue_} saw {mixture.ends[first]:,} samples that are there; gone: {gone}")
    say(*mixture.few_captions())
    say(f"{c.method}: {tasks} x {steps:,} steps of {c.batch_size} pairs, processes {count};"
        f" {samples:,} new samples, each {passes:,.1f} times in D; {costs['gflops_spent']:,.0f}"
        f" memory-adjusted GFLOPs; {peak / 2**20:,.0f} MiB a step;"
        f" {sum(len(ids_to_score(d, c)) for d in sets):,} test pictures a row")


def time_one_step(learner, mixture, first, steps):
    """--plan: a step on weights that nobody keeps, after one that warms up."""
    learner.prepare(learner.c.make_method())
    for batch in learner.batches(mixture, first, 2):
        began = time.perf_counter()
        float(learner.backward(batch, learner.scaler()))
        seconds = time.perf_counter() - began
    minutes = seconds * steps * (len(mixture.ends) - 1 - first) / 60
    learner.processes.say(f"a step takes {seconds:.3f} s, all {minutes:.1f} min, without scoring")


def hash_inputs(learner, new_tasks, steps, parent):
    """All that decides the result, {name: words or hash}: a stopped run goes on with it alone."""
    world = learner.world
    model = learner.model
    test_data = [[d.name, d.kind, d.classes, d.prompts, d.test.fingerprint()] for d in world.sets]
    train_splits = [d.train for d in world.sets] + ([] if world.pool is None else [world.pool])
    device = learner.processes.device
    return {flag(name): str(value) for name, value in vars(learner.c).items()
            if name not in FREE} | {
        "stream": digest([new_tasks, steps]),
        "test data": digest([test_data, learner.c.score_subset and learner.c.seed]),
        "training data": digest([split.fingerprint() for split in train_splits]),
        "weights": digest([hash_weights(model.state_dict()), f"{model.config} {model.preprocess}"]),
        "tokenizer": hash_file(learner.bpe) if learner.bpe else "bytes",
        "the run that is continued": parent["results"]["weights_sha256"] if parent else "",
        **{name: version(name) for name in ("torch", "torchvision", "pillow", "numpy")},
        "processes, threads": f"{learner.processes.count}, {torch.get_num_threads()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def hash_file(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hash_weights(weights):
    """SHA-256 of names and bytes of a state dict."""
    sha256 = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        sha256.update(name.encode())
        sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def batches_of_task(training):
    """Yields (batch, samples in it) of D_t alone, in full batches, for method.after_task()."""
    alone = copy.copy(training.mixture)
    alone.ratios = (0, 1, 0)
    samples = alone.ends[training.task + 1] - alone.ends[training.task]
    steps = max(1, samples // alone.batch_size)
    for batch in training.learner.batches(alone, training.task, steps):
        yield batch, alone.batch_size


def ids_to_score(dataset, c):
    """The test samples that every row of a run is on."""
    if c.score_subset:
        return evaluate.balanced_subset(dataset.test.labels, c.seed)
    return numpy.arange(len(dataset.test))


def score(learner, title, templates=None, training=None):
    """{dataset: its numbers, as evaluate.py has them}."""
    learner.model.to(learner.processes.device).eval()
    datasets = learner.world.sets
    numbers = {}
    for d in progress(datasets, title, len(datasets), learner.processes):
        ids = ids_to_score(d, learner.c)
        labels = d.test.labels[ids]
        image = learner.image_features(d.test, ids)
        if d.kind == "classification":
            texts = d.classes if templates else d.prompts
            classifier = evaluate.classifier(learner.text_features, texts, templates)
            numbers[d.name] = evaluate.classification(image, classifier, labels)
        else:
            captions = [[t] if isinstance(t, str) else t for t in (d.test.captions[i] for i in ids)]
            owner = [i for i, several in enumerate(captions) for _ in several]
            text = learner.text_features([one for several in captions for one in several])
            numbers[d.name] = evaluate.retrieval(image, text, owner, labels, len(d.classes))
        if training:
            training.pause(save=False)  # a row that is half done is made again
    learner.model.cpu()
    return numbers


def summary(world, numbers):
    """-> the scores of a row, and {dataset: {class: percent or None}}."""
    names = [[d.name for d in sets] for sets in (world.adaptation, world.heldout)]
    row = evaluate.summary({name: n["score"] for name, n in numbers.items()}, *names)
    scores = {d.name: numbers[d.name].get("per_class") or () for d in world.sets}
    return row, {d.name: dict(zip(d.classes, scores[d.name])) for d in world.sets}


def earlier_and_new(tasks, first, before, after):
    """A row's scores of classes that tasks before `first` taught, and that the others taught."""
    row = {}
    for name, part in (("earlier", tasks[:first]), ("new", tasks[first:] if first else [])):
        concepts = [concept for task in part for concept in task]
        row[name] = evaluate.over_concepts(after, concepts)
        row[f"{name}_before"] = evaluate.over_concepts(before, concepts)
    return row


def score_missing_rows(training):
    """theta_0; on other test data than before, what a continued run shipped; the last task."""
    results = training.results
    if results["theta_0"] is None:
        score_row(training, "theta_0", training.timeline.base)
    if training.first and results["before"] is None and not results["tasks"]:
        score_row(training, "before", training.timeline.deploy())
    scored = results["tasks"][-1]["task"] if results["tasks"] else training.first
    if scored < training.task:
        score_row(training, training.task, training.timeline.deploy())


def score_row(training, name, weights):
    """A row: logged, printed and saved. name: "theta_0", "before" or the number of a task."""
    deployed = training.deployed
    results = training.results
    per_class = results["per_class"]
    above = evaluate.rows(results)[-1] if results["theta_0"] else None
    deployed.model.load_state_dict(weights)
    numbers = score(deployed, f"scoring {name}", training=training)
    row, now = summary(deployed.world, numbers)
    number = 0 if isinstance(name, str) else name
    taught = training.task_concepts[:number]
    row |= earlier_and_new(taught, number - 1, per_class.get("final", now), now)
    row["task"] = training.task
    if number:
        row |= {"steps": training.steps, "concepts": len(taught[-1])}
        results["tasks"].append(row)
    else:
        results[name] = row
        per_class[name] = now
    per_class["final"] = now
    training.log("evaluation", of=name, **row, per_class=now)
    deployed.processes.say(evaluate.run_row(name, row.get("steps", ""), row, above))
    training.save()


def score_within(training):
    """--eval-every: the weights in training as they stand, a row of log.jsonl."""
    every = training.c.eval_every
    if every and training.step and training.step % every == 0:
        deployed = training.deployed
        deployed.model.load_state_dict(training.method.plain(training.learner.model))
        row, _ = summary(deployed.world, score(deployed, f"scoring step {training.step}"))
        training.log("within", task=training.task + 1, step=training.step, **row)


# -------------------------------------------------------------------------- a run and its folder


class Training:
    """All that training changes, how far it is, and the folder that keeps it: state.pt, log.jsonl,
    config.json, experts/; at the end model, picture, results. Only the first process writes."""

    def __init__(self, learner, mixture, task_concepts, first, steps, costs, input_hashes):
        """task_concepts: (dataset, class) pairs of all tasks, of which the `first` came before."""
        self.c = learner.c
        self.processes = learner.processes
        self.path = Path(self.c.out)
        self.learner = learner
        self.deployed = replace(learner, model=copy.deepcopy(learner.model))  # scores what ships
        learner.broken = self.deployed.broken = self.log_broken_pictures
        self.mixture = mixture
        self.task_concepts = task_concepts
        self.first = first
        self.steps = steps
        self.input_hashes = input_hashes
        theta_0 = learner.model.state_dict()  # on the CPU, until prepare()
        self.timeline = merge.Timeline(theta_0, write=self.write_expert, read=self.read_expert,
                                       **self.c.of_timeline())
        self.experts = []  # [path from the folder, hash], where a merge is of all of them
        self.method = self.c.make_method()
        learner.prepare(self.method)
        self.results = costs | {
            "theta_0": None, "before": None, "tasks": [], "per_class": {}, "parent": None,
            "trained_parameters": sum(p.numel() for p in self.method.trained.values()),
            "steps_per_task": steps, "heldout": [d.name for d in learner.world.heldout],
            "chance": evaluate.chance(learner.world.adaptation, learner.world.heldout),
            "theta_0_sha256": hash_weights(theta_0), "test_sha256": input_hashes["test data"],
            "train_sha256": input_hashes["training data"],
        }
        self.task = self.step = 0  # how many are done
        self.optimizer = self.scaler = self.log_file = None
        self.stopped = None  # states of optimizer and scaler, after a stop within the task
        self.signal = 0  # number of the signal that asks the run to stop
        self.broken = []  # sentences about pictures
        self.began = time.monotonic()  # less the seconds of the processes before this one
        self.due = self.began + SAVE_EVERY

    @contextlib.contextmanager
    def locked(self):
        """The folder is this process's alone, and the first signal waits for pause()."""
        with contextlib.ExitStack() as stack:
            if self.processes.leads:
                self.path.mkdir(parents=True, exist_ok=True)
                folder = os.open(self.path, os.O_RDONLY)
                stack.callback(os.close, folder)
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise ValueError(f"another process is running in {self.path}") from None
            self.processes.gathered()  # the others read when the folder is locked
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                    stack.callback(signal.signal, number, signal.signal(number, self.ask_to_stop))
            yield

    def ask_to_stop(self, number, _):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)  # the second time it stops where it is

    def resume(self):
        """Goes on where a stopped run saved its state, or saves the first, if the folder is new."""
        state = {"log_bytes": 0}
        if (self.path / "state.pt").exists():
            state = read_state(self.path / "state.pt")
            old = state["input_hashes"]
            changes = [f"{name} was {old.get(name)}, is {new}"
                       for name, new in self.input_hashes.items() if old.get(name) != new]
            if changes:
                raise ValueError(f"{self.path} was begun with other input ({'; '.join(changes)}):"
                                 " put it back, or name another --out")
            self.restore(state, self.path)
            self.results = state["results"]
            self.broken = state["broken"]
            self.began -= state["seconds"]
            self.processes.say(f"{self.path}: going on after {self.task} tasks, {self.step} steps")
        else:
            self.save()
        if self.processes.leads:
            write_json(self.path / "config.json", asdict(self.c))
            self.log_file = open(self.path / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115
            self.log_file.truncate(min(state["log_bytes"], self.log_file.tell()))  # later rows go

    def restore(self, state, owner):
        """Stands where it was when save() made the state in the folder `owner`."""
        self.experts = [[os.path.relpath(os.path.join(owner, name), self.path), sha]
                        for name, sha in state["experts"]]
        for i, (name, sha) in enumerate(self.experts):
            if not (self.path / name).exists() or hash_weights(self.read_expert(i)) != sha:
                raise ValueError(f"{self.path / name} is missing or not as a task wrote it")
        self.learner.model.load_state_dict(state["model"])
        self.method.load_state(state["method"])
        self.timeline.load_state(state["timeline"])
        self.task = state["task"]
        self.step = state["step"]
        self.stopped = state["stopped"]

    def join_results(self, old):
        """The rows of the run that is continued, if they are on the same test data."""
        folder = os.path.abspath(self.c.continue_)
        self.results["parent"] = {"folder": folder, "weights_sha256": old["weights_sha256"]}
        self.results["gflops_spent"] += old["gflops_spent"]
        if old["test_sha256"] == self.results["test_sha256"]:
            self.results |= {name: old[name] for name in ("theta_0", "before", "tasks")}
            self.results["per_class"] = {**old["per_class"], "before": old["per_class"]["final"]}

    def write_expert(self, i, weights):
        name = f"experts/expert-{i + 1:03}.safetensors"
        if self.processes.leads:
            (self.path / "experts").mkdir(exist_ok=True)
            clip.write_tensors(weights, self.path / name)
        self.experts[i:] = [[name, hash_weights(weights)]]
        self.processes.gathered()  # all wait for the file

    def read_expert(self, i):
        return clip.read_tensors(self.path / self.experts[i][0], mapped=True)

    def start_optimizer(self):
        """A new optimizer for a task, or that of a task that was stopped in its midst."""
        self.optimizer = self.method.optimizer(self.learner.model, lr=self.c.lr, betas=(0.9, 0.999),
                                               weight_decay=self.c.weight_decay)
        self.scaler = self.learner.scaler()
        if self.stopped:
            self.optimizer.load_state_dict(self.stopped["optimizer"])
            self.scaler.load_state_dict(self.stopped["scaler"])
            self.stopped = None
        return self.optimizer, self.scaler

    def log(self, event, **row):
        if self.processes.leads:
            row = {"event": event, **row, "seconds": time.monotonic() - self.began}
            print(json.dumps(row), file=self.log_file, flush=True)

    def log_step(self, rate, loss, norm):
        """ValueError where loss or gradient is not finite; fp16's scaler leaves the latter out."""
        row = {"task": self.task + 1, "step": self.step, "lr": rate, "loss": float(loss),
               "grad_norm": float(norm), "logit_scale": self.learner.model.logit_scale.item()}
        self.log("step", **row)
        checked = ["loss"] if self.c.precision == "fp16" else ["loss", "grad_norm"]
        if not all(math.isfinite(row[name]) for name in checked):
            raise ValueError(f"{row} is not finite: lower --lr, or take --precision fp32")

    def log_broken_pictures(self, faults):
        """Pictures that cannot be read, and were replaced: logged once; too many end the run."""
        for fault in set(faults) - set(self.broken):
            self.log("broken picture", fault=fault)
            print(f"another picture stands in: {fault}", file=sys.stderr)  # in any process
            self.broken.append(fault)
        if len(self.broken) > MOST_BROKEN:
            raise ValueError(f"over {MOST_BROKEN} pictures cannot be read: {faults[-1]}")

    def pause(self, save=True):
        """Called where nothing is half done: saves if it is time to, and stops if a signal came."""
        number = max(self.processes.gathered(self.signal))
        if save and (number or any(self.processes.gathered(time.monotonic() >= self.due))):
            self.save()
        if number:
            name = signal.Signals(number).name
            self.processes.say(f"stopped by {name}; the same command goes on")
            raise SystemExit(128 + number)

    def save(self, **more):
        """The whole state: what restore() reads, after a stop or in a run that continues this."""
        began = time.monotonic()
        model = self.learner.model.state_dict()
        if len(set(self.processes.gathered(self.processes.count > 1 and hash_weights(model)))) > 1:
            raise ValueError("the processes do not hold the same weights")
        stopped = self.stopped
        if self.optimizer:
            stopped = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        if self.processes.leads:
            state = {
                "input_hashes": self.input_hashes, "config": asdict(self.c), "broken": self.broken,
                "task": self.task, "step": self.step, "stopped": stopped, "model": model,
                "results": self.results, "theta_0": self.timeline.base, "experts": self.experts,
                "task_concepts": self.task_concepts, "method": self.method.state(),
                "timeline": self.timeline.state(), "seconds": time.monotonic() - self.began,
                "log_bytes": self.log_file.tell() if self.log_file else 0, **more,
            }
            with whole(self.path / "state.pt") as f:
                torch.save(state, f)
        now = time.monotonic()
        self.due = now + max(SAVE_EVERY, 50 * (now - began))  # at most 2 % of the time

    def failed_conditions(self):
        """What of --gate does not hold for the new weights, over all tasks of this run."""
        tasks = self.task_concepts
        rows = evaluate.rows(self.results)
        per_class = self.results["per_class"]
        scores = per_class.get("before", per_class["theta_0"]), per_class["final"]
        new = rows[-1] | earlier_and_new(tasks, self.first, *scores)
        parts = {"earlier": tasks[: self.first], "new": tasks[self.first :]}
        about = {name: [one for task in part for one in task] for name, part in parts.items()}
        about["zs"] = [(d.name, one) for d in self.learner.world.heldout for one in d.classes]
        old = rows[self.first - self.task - 1]
        return evaluate.gate_failures(self.c.gate, old, new, *scores, about)

    def finish(self):
        """What was deployed last becomes the run's model; results.json, the last, ends the run."""
        results = self.results
        c = self.c
        deployed = self.timeline.deploy()
        failed = self.failed_conditions() if c.gate else []
        results["final"] = evaluate.rows(results)[-1]
        results |= {"gate_failed": failed, "weights_sha256": hash_weights(deployed),
                    "seconds": time.monotonic() - self.began, "config": asdict(c)}
        self.save(seen_samples=self.mixture.held())
        if not self.processes.leads:
            return results
        results["state_sha256"] = hash_file(self.path / "state.pt")
        weights = {"model-refused" if failed else "model": deployed}
        if failed:
            old = f"{c.continue_}/model.safetensors"
            weights["model"] = clip.load(old).state_dict() if c.continue_ else self.timeline.base
        if c.method == "wise-ft":  # to deploy them at another w: fomo.py merge THETA_0 latest
            weights["latest"] = self.method.plain(self.learner.model)
        made_by = {f.name: getattr(c, f.name) for f in fields(c)
                   if f.name not in FREE and getattr(c, f.name) != f.default}
        made_by |= {"theta_0_sha256": results["theta_0_sha256"], "task": self.task}
        for name, tensors in weights.items():
            self.deployed.model.load_state_dict(tensors)
            clip.save(self.deployed.model, self.path / f"{name}.safetensors",
                      metadata={"fomo": json.dumps(made_by)})
        if self.learner.bpe:  # the tokenizer's file, where `evaluate --weights` looks for it
            name = {".gz": "bpe_simple_vocab_16e6.txt.gz", ".json": "tokenizer.json"}.get(
                Path(self.learner.bpe).suffix, "merges.txt")
            shutil.copyfile(self.learner.bpe, self.path / name)
        write_json(self.path / "results.json", results)
        runs = [(str(self.path), evaluate.read_results(self.path))]
        evaluate.report(runs, self.path / "picture.png")
        gate = f"fails: {'; '.join(failed)}; see model-refused.safetensors" if failed else "holds"
        self.processes.say(*evaluate.words(results), *[f"the gate {gate}"] * bool(c.gate),
                           f"{self.path}: done, with picture.png ({results['seconds']:.0f} s)")
        return results


def check_out(c):
    """ValueError unless --out is new, empty, or holds an unfinished run."""
    names = os.listdir(c.out) if os.path.isdir(c.out) else [c.out] * os.path.lexists(c.out)
    if "results.json" in names and not c.plan:
        raise ValueError(f"{c.out} holds a finished run: name another --out, or --continue it")
    if set(names) - {"state.pt.part"} and "state.pt" not in names and not c.plan:
        raise ValueError(f"{c.out} is there and is no run of fomo.py: name another --out")


def read_state(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever a torn file makes of torch
        raise ValueError(f"{path} is no state of a run ({type(e).__name__}): delete it") from e


@contextlib.contextmanager
def whole(path):
    """A file to write, which is on the disk before it takes its name."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except RuntimeError as e:  # torch's for a write that fails
        raise OSError(errno.ENOSPC, "cannot be written, the disk is full", str(part)) from e
    finally:
        part.unlink(missing_ok=True)  # what a full disk has of it


def write_json(path, value):
    with whole(path) as f:
        f.write(json.dumps(value, indent=1).encode())


def read_parent(folder):
    """The last state of a finished run, which its next update starts from, and its results."""
    results = evaluate.read_results(folder)
    path = os.path.join(folder, "state.pt")
    if results["gate_failed"] or results["config"]["method"] in ("joint", "zero-shot"):
        raise ValueError(f"{folder} has no next update: joint, zero-shot, or its gate failed")
    if not os.path.exists(path) or hash_file(path) != results["state_sha256"]:
        raise ValueError(f"{path} is not what the run wrote: put it back, or start a new run")
    return read_state(path) | {"results": results}


def continued_config(given):
    """Config of the next update of the run given["continue_"]: its own, but for what is given."""
    folder = given["continue_"]
    results = read_parent(folder)["results"]
    old = Config(**results["config"])
    anew = {"tasks": 1, "budget": None, "out": None, "stream": None, "plan": False}
    anew["steps"] = None if {"steps", "budget"} & set(given) else results["steps_per_task"]
    c = replace(old, **{**anew, **given})
    for name in ("method", "weights", "activation", "bpe", "method_options", "merge_init",
                 "merge_deploy"):
        if list(getattr(c, name) or ()) != list(getattr(old, name) or ()):  # JSON has no tuples
            raise ValueError(f"{flag(name)} was {getattr(old, name)} in {folder}: leave it out")
    there = Path(folder).resolve()
    name = re.sub(r"-t\d+$", "", there.name) + f"-t{results['final']['task'] + c.tasks}"
    c.out = c.out or os.path.relpath(there.with_name(name))
    return c


# ------------------------------------------------------------------------------- sub-commands

MODEL = ("activation", "bpe", "device", "precision", "workers")
DATA = ("data", "heldout", "template", "cache")
WORLD = (*DATA, "pool", "captions", "prompts_too", "validation", "seed")
STREAM = (*WORLD, *MODEL, "weights", "order", "reverse")


def arguments(p, argv, out, default=None):
    """-> (arguments, Config of those that are a run's options). out: what --out is."""
    p.add_argument("-o", "--out", required=not default, default=default, type=os.path.expanduser,
                   help=f"{out}, which must not exist" + f" (default {default})" * bool(default))
    args = p.parse_args(argv)
    own = {f.name for f in fields(Config)} & set(vars(args)) - {"out"}
    if os.path.lexists(args.out):
        raise ValueError(f"{args.out} exists, and may be somebody's: name another, or remove it")
    if not os.access(os.path.dirname(os.path.abspath(args.out)), os.W_OK):
        raise ValueError(f"{args.out} cannot be written: name a file in a folder that can be")
    return args, Config(**{name: getattr(args, name) for name in own})


def report_command(argv):
    """Table and picture of finished runs; those that differ in their seed alone are one line."""
    p = command_parser("fomo.py report", report_command.__doc__)
    p.add_argument("runs", nargs="+", metavar="RUN", help="folders")
    p.add_argument("--style", default="text", choices=["text", "markdown", "json"])
    args, _ = arguments(p, argv, "the picture", "report.png")
    finished = [run for run in args.runs if os.path.exists(os.path.join(run, "results.json"))]
    for folder in sorted({*args.runs} - {*finished}):
        print(f"{folder} has no results.json: left out", file=sys.stderr)
    runs = [(folder, evaluate.read_results(folder)) for folder in finished]
    print(evaluate.report(runs, args.out, args.style))
    print(f"drawn in {args.out}", file=sys.stderr)


def evaluate_command(argv):
    """Scores of --weights on all test data of --data, the drawn world's without."""
    p = command_parser("fomo.py evaluate", evaluate_command.__doc__, (*MODEL, *DATA))
    p.add_argument("--weights", required=True, help="checkpoint, as for a run")
    p.add_argument("--templates", help="file of templates with {}, to average over")
    p.add_argument("--per-class", action="store_true", help="print the score of each class, too")
    p.add_argument("--baseline", help="scores.json of other weights, to put beside")
    args, c = arguments(p, argv, "file of scores", "scores.json")
    templates = args.templates and evaluate.read_templates(args.templates)
    processes = Processes(c)
    learner = load_learner(c, processes)
    world = learner.world = load_world(c, processes, {})
    old = data.read_json(args.baseline, dict) if args.baseline else {"tests": {}}
    if "tests" not in old:
        raise ValueError(f"{args.baseline} holds no scores that `fomo.py evaluate` wrote")
    numbers = score(learner, "scoring", templates)
    row, per_class = summary(world, numbers)
    tests = row["tests"] = {d.name: digest([d.classes, d.test.keys().tolist()]) for d in world.sets}
    before = {name: old["numbers"][name] for name in tests if old["tests"].get(name) == tests[name]}
    for name in sorted(numbers.keys() - before.keys()) if args.baseline else ():
        processes.say(f"{name}: not compared, {args.baseline} has other classes or pictures of it")
    roles = {d.name: "KA" for d in world.adaptation} | {d.name: "ZS" for d in world.heldout}
    if processes.leads:
        more = {"per_class": per_class, "chance": evaluate.chance(world.adaptation, world.heldout)}
        write_json(args.out, {"weights": c.weights, **row, "numbers": numbers, **more})
    processes.say(evaluate.score_table(numbers, roles, before))
    for d in world.sets:
        if args.per_class and numbers[d.name].get("per_class"):
            table = evaluate.class_table(numbers[d.name], d.classes, before.get(d.name))
            processes.say(f"\n{d.name}\n{table}")
    means = [f"{m.upper()} {row[m]:.1f}" for m in evaluate.METRICS if row[m] is not None]
    processes.say(f"{'  '.join(means)} (all of it in {args.out})")


def merge_command(argv):
    """Merges files of weights in any layout: linear and slerp average all files; for the other
    techniques the first file is theta_0, the base of the others."""
    p = command_parser("fomo.py merge", merge_command.__doc__)
    p.add_argument("files", nargs="+", metavar="FILE", help="two or more; the result has the dtypes"
                   " and names of the first, or OpenAI's names if it is a CLIP")
    p.add_argument("--activation", default="auto", choices=ACTIVATIONS, help=ACTIVATION)
    p.add_argument("--technique", default="linear", choices=merge.TECHNIQUES)
    p.add_argument("--weights", type=float, nargs="+", help="one a file to average, or an expert")
    p.add_argument("--options", nargs="*", default=(), help="NAME=VALUE of the technique")
    args, _ = arguments(p, argv, "safetensors file")
    options = named_options(args.options, merge.OPTIONS[args.technique], args.technique)
    if not args.out.endswith(".safetensors") or len(args.files) < 2:
        raise ValueError("merge reads two files or more and writes one that ends in .safetensors")
    paths = [clip.fetch(os.path.expanduser(path)) for path in args.files]
    known = clip.agree(paths, ACTIVATIONS[args.activation])  # what load needs to know of the result
    files = [clip.read_tensors(path, mapped=True) for path in paths]
    metadata = {"format": "pt"} | files[0].metadata | known | {"fomo": " ".join(["merge", *argv])}
    files = [clip.openai_names(f) for f in files]  # whatever their layouts
    for file, path in zip(files, paths):
        file.path = path  # merge names it where a tensor is not what it should be
    experts = files if args.technique in merge.MEMBERS else files[1:]
    merged = merge.merge(args.technique, files[0], experts, args.weights, **options)
    clip.write_tensors(merged, args.out, metadata)
    print(f"{args.technique} of {len(files)} files: {len(merged)} tensors in {args.out}")


def stream_command(argv):
    """Writes all concepts of --data in an --order, as the published streams are."""
    p = command_parser("fomo.py stream", stream_command.__doc__, STREAM)
    args, c = arguments(p, argv, "JSON file", "stream.json")
    processes = Processes(c)
    learner = Learner(None, None, c, processes)
    if c.order in ("performance", "similarity"):
        learner = load_learner(c, processes)
    learner.world = load_world(c, processes, {})
    stream = load_stream(learner, {})
    data.write_stream(stream, args.out)
    print(f"{len(stream)} concepts in {c.order} order: {args.out}")


def inspect_command(argv):
    """Says what --data hold and what is left out, names broken pictures, draws sheets."""
    p = command_parser("fomo.py inspect", inspect_command.__doc__, WORLD)
    args, c = arguments(p, argv, "folder of sheets and broken.json", "inspect")
    world = load_world(c, Processes(c), {})
    splits = {f"{d.name}-{part}": split for d in world.sets
              for part, split in (("train", d.train), ("test", d.test))} | {"pool": world.pool}
    os.mkdir(args.out)
    faults = {}
    for name, split in splits.items():
        if split is not None and len(split):
            faults[name] = data.broken_pictures(split, os.cpu_count())
            data.contact_sheet(split, c.seed).save(os.path.join(args.out, f"{name}.png"))
            print(f"{name}: {len(split):,} samples", *faults[name], sep="\n  broken: ")
    write_json(os.path.join(args.out, "broken.json"), faults)


def convert_command(argv):
    """Writes a checkpoint in another layout."""
    p = command_parser("fomo.py convert", convert_command.__doc__)
    p.add_argument("weights", help="a file, a folder, hf:ORG/REPO, openai:ViT-B-32")
    p.add_argument("out", help="a file, or for hf a folder, which must not exist")
    p.add_argument("--layout", required=True, choices=["open_clip", "openai", "hf"])
    p.add_argument("--activation", default="auto", choices=ACTIVATIONS, help=ACTIVATION)
    args = p.parse_args(argv)
    if os.path.lexists(args.out):
        raise ValueError(f"{args.out} exists: name another, or remove it")
    model = clip.load(os.path.expanduser(args.weights), quick_gelu=ACTIVATIONS[args.activation])
    clip.save(model, args.out, args.layout)
    print(f"{args.weights} in the layout of {args.layout}: {args.out}")


COMMANDS = {"report": report_command, "evaluate": evaluate_command, "merge": merge_command,
            "convert": convert_command, "stream": stream_command, "inspect": inspect_command,
            "budget": partial(budget.main, models=clip.CONFIGS, paper=PAPER, own=OWN)}


def main(argv=None):
    """Runs a command. What a user can mend: a sentence, exit status 2. A gate that fails: 3."""
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # to be deterministic
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time and finds nothing here
    try:
        command = COMMANDS.get(argv[0]) if argv else None
        results = command(argv[1:]) if command else run(parse(argv))
        sys.stdout.flush()
        if dist.is_initialized():  # else a process that ends before the others aborts some of them
            dist.barrier()
            dist.destroy_process_group()
    except BrokenPipeError:  # who read our output has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("\nfomo: interrupted; nothing was written", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError, RuntimeError) as e:
        sentence = explain(e)
        if sentence is None:
            raise
        (tqdm.write if sys.stderr.isatty() else print)(f"fomo: {sentence}", file=sys.stderr)
        return 2
    return 3 if results and results["gate_failed"] else 0


def explain(e):
    """One sentence for an error that a user can do something about. None for a fault of ours."""
    text = str(e)
    if isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return "the memory is full: take --micro-batch, a smaller --batch-size or --precision bf16"
    if isinstance(e, OSError) and e.strerror:
        full = "; free some space and start the same command again" * (e.errno == errno.ENOSPC)
        return f"{f'{e.filename}: ' if e.filename else ''}{e.strerror}{full}"
    if isinstance(e, RuntimeError) and (dist.is_initialized() or "DataLoader worker" in text):
        return f"another process of this run has ended: {text[:150]}"
    hint = "; on the command line: --activation" * ("quick_gelu=" in text)
    return text + hint if isinstance(e, (ValueError, OSError)) else None


if __name__ == "__main__":
    warnings.showwarning = lambda message, *_: print(f"fomo: {message}", file=sys.stderr)
    sys.exit(main())
