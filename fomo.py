"""Continual pretraining of CLIP: one model, many small updates, a compute budget.

    python fomo.py --method merge                         the whole of it on an embedded world: no files, no network
    python fomo.py --method finetune                      any other method; runs/ keeps them apart
    python fomo.py --method joint                         the upper bound: all data at once
    python fomo.py report runs/*                          their table, and one picture of them all
    python fomo.py --method merge --weights W --data D --stream S.json --heldout NAME --pool NAME --out O
    python fomo.py evaluate --weights W --data D --heldout NAME       scores of one checkpoint
    python fomo.py budget --model ViT-B-16                the compute of every method, counted
    python fomo.py merge BASE EXPERT... --technique ties -o OUT       merge files of weights
    python fomo.py bench merge | bench methods            how long merging, and a step of each method, takes

After Roth et al. 2024, "A Practitioner's Guide to Continual Multimodal Pretraining" (arXiv 2408.14471).
"""

import argparse
import contextlib
import copy
import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import budget
import clip
import data
import evaluate
import merge
import methods

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None

TIMELINES = {"merge": merge.TIMELINES["ema-merge"], **merge.TIMELINES}
RUNS = [*methods.METHODS, *(t for t in TIMELINES if t not in methods.METHODS), "joint", "zero-shot"]

# What the paper uses (sec. 3 and 4), and what makes the same picture out of the tiny model in minutes. See --help.
PAPER = {"batch_size": 512, "lr": 1e-5, "tasks": 20, "merge_weight": 0.9, "replay": 0, "budget": None}
TINY = {"batch_size": 64, "lr": 5e-4, "tasks": 8, "merge_weight": 0.6, "replay": 2000, "budget": 3000.0}


progress = partial(tqdm, leave=False, disable=None)  # a bar, where there is a terminal


def option(default, text, choices=None):
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass
class Config:
    """One run. None is filled from PAPER or TINY, by the model, before anything starts."""

    method: str = option("merge", "merge is ema-merge; joint the upper bound; zero-shot only evaluates", RUNS)
    model: str = option(None, "architecture; tiny without --weights, else what the weights are", list(clip.CONFIGS))
    weights: str = option(None, "theta_0: a file or folder in any CLIP layout, hf:ORG/REPO, openai:ViT-B-32, or a URL;"
                                " without, theta_0 is trained on the pool first, once, and cached")
    activation: str = option("auto", "of --weights that do not say it", ["auto", "gelu", "quick_gelu"])
    bpe: str = option(None, "tokenizer merges: bpe_simple_vocab_16e6.txt.gz or merges.txt; by default beside them")
    data: str = option(None, "folder in FoMo-in-Flux's layout; without, the drawn toy world")
    stream: str = option(None, "JSON list of DATASET+++class; without, all concepts in random order (sec. 3.3)")
    heldout: tuple[str, ...] = option(None, "datasets never trained on: ZS; default the paper's 22")
    pool: tuple[str, ...] = option((), "datasets whose training split stands for the pretraining data P")
    prompts_too: bool = option(False, "a training picture's class prompt is one of its captions, where these name none")
    out: str = option(None, "folder of the run; default runs/<method>-<seed>")
    cache: str = option("~/.cache/fomo", "folder for theta_0 and downloads")
    seed: int = option(0, "of the order of concepts and samples; theta_0 and the toy world stay the same")

    tasks: int = option(None, "T, updates in the stream (sec. 4)")
    budget: float = option(None, "GFLOPs of the whole stream, memory-adjusted (sec. 3.2); default the paper's, scaled")
    steps: int = option(None, "steps per task, whatever they cost, in place of --budget")
    mixture: str = option("0.33/0.34/0.33", "P/D/B, shares of pool, update and buffer in a batch (sec. 3.1)")
    replay: int = option(None, "samples of the pool at hand for P, 0 for all; the paper replays 2 M of 2 B")
    batch_size: int = option(None, "image-text pairs a step")

    lr: float = option(None, "peak learning rate (sec. 4)")
    warmup: float = option(0.1, "share of a task's steps (sec. 4)")
    floor: float = option(1e-3, "share of the peak that a decay ends at")
    weight_decay: float = option(0.2, "of AdamW, betas .9 and .999")
    clip_norm: float = option(1.0, "gradient norm")
    schedule: str = option("cosine", "within a task (sec. 6.1)", list(methods.SCHEDULES))
    meta: str = option("none", "meta-schedule over tasks (sec. 6.1)", sorted(set().union(*methods.SCHEDULES.values())))
    cooldown: float = option(0.1, "share of a task's steps, rsqrt only")

    rank: int = option(None, "of lora, dora, vera (default 4) and galore (16)")
    scale: float = option(None, "s of lora, dora and vera (default 1) and galore (2)")
    gap: int = option(None, "galore: steps between projections (default 200)")
    ewc_lambda: float = option(None, "weight of EWC's penalty (default 1)")
    ewc_gamma: float = option(None, "what a task leaves of the Fisher before it (default 1)")
    fisher_samples: int = option(None, "ewc: at most so many of a task enter its Fisher (default 50,000)")
    si_c: float = option(None, "weight of SI's penalty (default .5)")
    si_xi: float = option(None, "SI's damping (default 1)")

    merge_weight: float = option(None, "w of m_t = w m_(t-1) + (1-w) theta_t: it weighs the old weights")
    merge_init: str = option(None, "what a task starts from if not as the method says (TIME, 3)", list(merge.SOURCES))
    merge_deploy: str = option(None, "what is evaluated and shipped, likewise", list(merge.SOURCES[1:]))
    merge_technique: str = option("linear", "how weights are merged", list(merge.TECHNIQUES))
    merge_options: tuple[str, ...] = option((), "of the technique, as density=0.2 scale=0.5 (see fomo.py merge --help)")
    merge_growth: str = option("uniform", "how the experts' weights grow with time, for 'all'", list(merge.GROWTHS))
    merge_reverse: bool = option(False, "they shrink instead")
    merge_base: bool = option(False, "theta_0 counts as the first expert, for 'all'")

    pretrain_steps: int = option(1800, "of theta_0 on the pool, where --weights is absent; batches as above")
    pretrain_lr: float = option(1.5e-3, "its peak learning rate")
    score_all: bool = option(False, "score all test data after every task; the paper, between the first and the last, a"
                                    " class-balanced subset")  # fmt: skip
    device: str = option("auto", "auto is cuda where there is one, else cpu")
    precision: str = option("auto", "of the forward pass; auto is bf16 on a GPU that has it, else fp32",
                            ["auto", "fp32", "bf16", "fp16"])  # fmt: skip
    workers: int = option(-1, "processes that prepare batches; -1 is two fewer than there are cores, at most 16")


FREE = ("out", "cache", "workers")  # change nothing in the scores, so that a resumed run may change them


# ------------------------------------------------------------------------------------------------------- command line


def parse(argv, program="fomo.py", description=__doc__):
    """Config from arguments: one option a field, its type the field's."""
    parser = argparse.ArgumentParser(program, allow_abbrev=False, description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    for f in fields(Config):
        text, name = f.metadata["help"], "--" + f.name.replace("_", "-")
        if f.type is bool:
            parser.add_argument(name, action="store_true", help=text)
            continue
        many = f.type == tuple[str, ...]
        if f.name in PAPER:
            text += f" (default {'' if PAPER[f.name] is None else f'{PAPER[f.name]}; '}tiny {TINY[f.name]})"
        elif f.default not in (None, ()):
            text += f" (default {f.default})"
        parser.add_argument(name, type=str if many else f.type, default=f.default,
                            nargs="*" if many else None, choices=f.metadata["choices"], help=text.replace("%", "%%"),
                            metavar=f.name.upper() if not f.metadata["choices"] else None)  # fmt: skip
    return Config(**vars(parser.parse_args(argv)))


def resolve(c):
    """Fill what was left open; ValueError in a sentence where the options do not go together."""
    c = dataclasses.replace(c)
    if c.model is None and c.weights is None and c.data is None:
        c.model = "tiny"
    if c.model is None and c.weights is None:
        raise ValueError("data of your own needs a model: --weights CHECKPOINT, or --model tiny to train one on --pool")
    if c.weights is None and c.model != "tiny":
        raise ValueError(f"{c.model} is not trained from nothing here: give its --weights, or --model tiny")
    if c.weights is None and c.data is not None and not c.pool:
        raise ValueError("without --weights theta_0 is trained on a pool: --pool names the datasets that are it")
    if c.data is None and (c.heldout is not None or c.pool):
        raise ValueError("--heldout and --pool name datasets of --data; the toy world has its own")
    for name, value in (TINY if c.model == "tiny" else PAPER).items():
        if getattr(c, name) is None:
            setattr(c, name, value)
    for name in ("tasks", "batch_size", "pretrain_steps", "steps"):
        if getattr(c, name) is not None and getattr(c, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(c, name)}")
    for name in ("lr", "pretrain_lr", "clip_norm", "budget"):
        if getattr(c, name) is not None and not 0 < getattr(c, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be positive and finite, got {getattr(c, name)}")
    for f in fields(c):
        if f.type is int and (getattr(c, f.name) or 0) > 2**31:
            raise ValueError(f"--{f.name.replace('_', '-')} must be below 2^31, got {getattr(c, f.name)}")
    if c.seed < 0 or c.replay < 0 or not 0 <= c.weight_decay < math.inf:
        raise ValueError(f"--seed, --replay, --weight-decay are 0 or more, got {c.seed}, {c.replay}, {c.weight_decay}")
    if c.meta not in methods.SCHEDULES[c.schedule]:
        raise ValueError(f"--schedule {c.schedule} has --meta {', '.join(methods.SCHEDULES[c.schedule])}, not {c.meta}")
    rates(c, 1, 0)(0)  # says what is wrong with --warmup, --cooldown and --floor
    c.out = c.out or f"runs/{c.method}-{c.seed}"
    c.cache = os.path.expanduser(c.cache)
    if c.device == "auto":
        c.device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(c.device)
    if c.precision == "auto":
        c.precision = "bf16" if c.device.startswith("cuda") and torch.cuda.is_bf16_supported(False) else "fp32"
    merge.Timeline({}, **merge_options(c))  # these two say what is wrong before anything long begins
    make_method(c)
    if c.workers < 0:
        c.workers = min(16, max(0, (os.cpu_count() or 1) - 2))
    return c


def check_device(device):
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as e:
        sentence = f"--device {device} cannot be used here ({str(e).splitlines()[0]}); left out, it is what there is"
        raise ValueError(sentence) from None


def merge_options(c):
    """Timeline's arguments: the method's place in TIME's grid, and what the command line says otherwise."""
    place = dict(TIMELINES.get(c.method, TIMELINES["finetune"]))
    place |= {k: v for k, v in (("init", c.merge_init), ("deploy", c.merge_deploy)) if v is not None}
    options = {}
    for text in c.merge_options:
        name, _, value = text.partition("=")
        if name in ("init", "deploy", "technique", "weight", "anchored", "reverse", "include_base", "expert_weights",
                    "base", "store", "self"):  # fmt: skip
            raise ValueError(f"--merge-options {text}: {name} is no option of a technique; see --help for the others")
        options[name] = value  # a word, as in function=max, if none of these reads it
        for read in (float, lambda text: json.loads(text.lower())):  # .5 is no JSON, True no number
            with contextlib.suppress(ValueError):
                options[name] = read(value)
    return place | {"technique": c.merge_technique, "weight": c.merge_weight, "expert_weights": c.merge_growth,
                    "reverse": c.merge_reverse, "include_base": c.merge_base, **options}  # fmt: skip


def rates(c, steps, task):
    """step -> learning rate in this task."""
    return partial(methods.learning_rate, steps=steps, task=task, lr=c.lr, schedule=c.schedule, meta=c.meta,
                   warmup=c.warmup, cooldown=c.cooldown, floor=c.floor)  # fmt: skip


def ratios(c):
    try:
        p, d, b = map(float, c.mixture.split("/"))
    except ValueError:
        raise ValueError(f"--mixture is P/D/B, as in 0.33/0.34/0.33, got {c.mixture!r}") from None
    return (p, 1 - p, 0) if c.method == "joint" else (p, d, b)  # joint has no buffer: everything is in D


# ----------------------------------------------------------------------------------------------- model, loss and scores


class Learner:
    """The model with all that turns pictures and captions into a loss or into features, on its device."""

    def __init__(self, model, tokenizer, c, merges=None):
        self.device, self.merges = torch.device(c.device), merges
        self.model, self.tokenizer, self.c = model.to(self.device), tokenizer, c
        self.size, self.context = model.config.image_size, model.config.context_length
        low = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[c.precision]
        self.autocast = partial(torch.autocast, self.device.type, dtype=low, enabled=low is not None)

    def tokens(self, texts):
        tokens = self.tokenizer(texts, self.context)
        longest = int(tokens.argmax(dim=1).max()) + 1  # what follows the end token changes nothing
        return tokens[:, :longest].to(self.device, non_blocking=True)

    def images(self, images):
        return clip.normalise(images.to(self.device, non_blocking=True))

    def loss(self, model, batch):
        """Scalar, in float32 whatever the towers ran in."""
        images, captions = batch
        with self.autocast():
            image, text, scale = model(self.images(images), self.tokens(captions))
        return clip.contrastive_loss(image.float(), text.float(), scale)

    @torch.no_grad()
    def encode_text(self, texts):
        with self.autocast():
            parts = [self.model.encode_text(self.tokens(texts[i : i + 512])).float() for i in range(0, len(texts), 512)]
        return torch.cat(parts)

    @torch.no_grad()
    def encode_images(self, split, ids):
        workers = self.c.workers if len(ids) > 2048 else 0
        with self.autocast():
            batches = data.test_loader(split, ids, self.size, workers=workers)
            return torch.cat([self.model.encode_image(self.images(batch)).float() for batch in batches])

    def score(self, dataset, ids):
        """Percent on the test samples `ids`: top-1 accuracy or R@5."""
        image = self.encode_images(dataset.test, ids)
        if dataset.kind == "classification":
            weights = evaluate.classifier(self.encode_text, dataset.prompts)
            return evaluate.accuracy(image, weights, dataset.test.labels[ids])
        captions = [[c] if isinstance(c, str) else c for c in (dataset.test.captions[i] for i in ids)]
        owner = [i for i, several in enumerate(captions) for _ in several]
        text = self.encode_text([c for several in captions for c in several])
        return sum(evaluate.recall_at_k(image, text, owner)) / 2

    def score_all(self, world, everything, seed, title):
        """-> {"ka", "zs", "gm", "datasets": {name: percent}, "samples"} of the model's present weights."""
        self.model.eval()
        datasets, scores, samples = world.adaptation + world.heldout, {}, 0
        for d in progress(datasets, title):
            ids = range(len(d.test)) if everything else evaluate.balanced_subset(d.test.labels, seed)
            scores[d.name], samples = self.score(d, ids), samples + len(ids)
        return {**summary(world, scores), "samples": samples}


def summary(world, scores):
    ka = evaluate.knowledge_accumulation({d.name: scores[d.name] for d in world.adaptation})
    zs = evaluate.zero_shot_retention({d.name: scores[d.name] for d in world.heldout})
    return {"ka": ka, "zs": zs, "gm": evaluate.geometric_mean(ka, zs), "datasets": scores}


def chance(world):
    """Scores of guessing: 1 / C, and about 5 / N for R@5."""
    guess = {d.name: 100 / len(d.classes) if d.kind == "classification" else 100 * min(1, 5 / len(d.test))
             for d in world.adaptation + world.heldout}  # fmt: skip
    return summary(world, guess)


def train(learner, method, batches, steps, rate, title, log=lambda **row: None, betas=(0.9, 0.999)):
    """The inner loop: `steps` batches, AdamW, the method's hooks. rate(step) -> learning rate."""
    model, c = learner.model.train(), learner.c
    optimizer = method.optimizer(model, lr=c.lr, betas=betas, weight_decay=c.weight_decay)
    scaler = torch.amp.GradScaler(learner.device.type, enabled=c.precision == "fp16")
    pending = []  # rows whose numbers are still on the device: asking for each at once would stall a GPU
    for step, batch in enumerate(bar := progress(batches, title, total=steps)):
        lr = rate(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = learner.loss(model, batch)
        scaler.scale(loss + method.penalty(model)).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(method.trained.values(), c.clip_norm)
        if c.precision != "fp16" or norm.isfinite():  # else the scaler leaves this step out
            method.after_backward(model, lr)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if model.logit_scale.requires_grad:
            with torch.no_grad():
                model.logit_scale.clamp_(max=clip.MAX_LOGIT_SCALE)
        pending.append((step, lr, loss.detach(), norm, model.logit_scale.detach().clone()))
        if len(pending) == 20 or step == steps - 1:
            for n, r, *numbers in pending:
                loss, norm, logit_scale = (float(v) for v in numbers)
                if not math.isfinite(loss):
                    raise ValueError(f"the loss of {title} is {loss} at step {n}: lower --lr, or --precision fp32")
                log(step=n, lr=r, loss=loss, grad_norm=norm, logit_scale=logit_scale)
            bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}")
            pending = []


# ------------------------------------------------------------------------------------------------------------- theta_0


def load_world(c):
    if c.data is None:
        return data.toy()
    return data.fomo_in_flux(c.data, heldout=c.heldout, pool=c.pool, prompts_too=c.prompts_too)


def load_learner(c):
    """The checkpoint --weights, or weights as they are before any training."""
    if c.weights is None:
        torch.manual_seed(0)
        return Learner(clip.CLIP(clip.CONFIGS[c.model]), clip.Tokenizer(), c)
    quick_gelu = {"auto": None, "gelu": False, "quick_gelu": True}[c.activation]
    try:
        model = clip.load(c.weights, None, quick_gelu, cache=c.cache)
    except ValueError as e:
        hint = "; on the command line: --activation" if "quick_gelu=" in str(e) else ""
        raise ValueError(f"{e}{hint}") from None
    if c.model and clip.CONFIGS[c.model] != dataclasses.replace(model.config, quick_gelu=False):
        raise ValueError(f"{c.weights} is no {c.model}: leave --model out, and it is what the weights are")
    bytewise = model.config.vocab_size == clip.CONFIGS["tiny"].vocab_size
    merges = None if bytewise else clip.fetch(c.bpe, c.cache) if c.bpe else clip.find_bpe(c.weights, c.cache)
    if not is_finite(model):
        raise ValueError(f"{c.weights} holds numbers that are not finite: take other weights")
    return Learner(model, clip.Tokenizer(merges), c, merges)


def is_finite(model):
    return all(tensor.isfinite().all() for tensor in model.state_dict().values())


def pretrain(learner, world):
    """theta_0 where no checkpoint was given: trained on the pool, or read from the cache if that was done before."""
    c = dataclasses.replace(learner.c, lr=learner.c.pretrain_lr)
    made_of = [dataclasses.asdict(learner.model.config), c.pretrain_steps, c.lr, c.batch_size, c.warmup, c.floor,
               c.weight_decay, c.clip_norm, c.precision, c.device, world.pool.content(), torch.__version__]
    path = Path(c.cache) / f"theta_0-{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]}.safetensors"
    if path.exists():
        try:
            learner.model.load_state_dict((found := clip.load(path)).state_dict())
            if not is_finite(found):
                raise ValueError("it holds numbers that are not finite")
        except (ValueError, RuntimeError) as e:
            raise ValueError(f"{path} is no theta_0 of this run ({e}): delete it, and it is trained again") from None
        return
    check_folder(path.parent, "--cache")
    path.parent.mkdir(parents=True, exist_ok=True)
    probe = path.with_name(f"probe-{os.getpid()}.safetensors")
    clip.save(learner.model, probe)  # tells now, not after the training, if the disk is full
    probe.unlink()
    tqdm.write(f"training theta_0 on the pool, once: {c.pretrain_steps} steps, kept as {path}")
    method = methods.METHODS["finetune"]()
    method.prepare(learner.model)
    mixture = data.Mixture(world, [[]], c.batch_size, ratios=(1, 0, 0))
    batches = data.loader(world, mixture, 0, c.pretrain_steps, learner.size, c.workers)
    rate = partial(methods.learning_rate, steps=c.pretrain_steps, task=0, lr=c.lr, warmup=c.warmup, floor=c.floor)
    train(Learner(learner.model, learner.tokenizer, c), method, batches, c.pretrain_steps, rate, "theta_0",
          betas=(0.9, 0.98))  # CLIP's for a ViT (arXiv 2103.00020, tab. 19)  # fmt: skip
    clip.save(learner.model, path)


# --------------------------------------------------------------------------------------------------- a run's folder


class ExpertFiles:
    """The store of a merge.Timeline that merges all experts so far: a file each."""

    def __init__(self, folder):
        self.folder = folder

    def path(self, i):
        return self.folder / f"expert-{i + 1:03}.safetensors"

    def __len__(self):
        return len(list(self.folder.glob("expert-*.safetensors")))

    def __getitem__(self, i):
        return clip.read_tensors(self.path(i))

    def append(self, weights):
        self.folder.mkdir(exist_ok=True)
        clip.write_tensors(weights, self.path(len(self)))

    def pop(self):
        self.path(len(self) - 1).unlink()


class Folder:
    """Where a run writes: config.json, log.jsonl, state.pt; at its end model, picture, results.json."""

    def __init__(self, c):
        self.path, self.config = Path(c.out), json.loads(json.dumps(dataclasses.asdict(c)))
        self.state, self.log_file, self.found = None, None, self._written()
        if (self.path / "results.json").exists():
            raise ValueError(f"{self.path} holds a finished run: name another folder with --out, or delete it")
        check_folder(self.path, "--out")
        names = {p.name for p in self.path.iterdir()} if self.path.exists() else set()
        if "config.json" in names:
            self._continue(self.path / "config.json")
        elif names - {"log.jsonl", "config.json.part"}:  # which a run that was killed as it began may leave
            raise ValueError(f"{self.path} is there and is no run of fomo.py: name another folder with --out")

    def _continue(self, found):
        try:
            before = dict(json.loads(found.read_text()))
        except (ValueError, TypeError, RecursionError) as e:
            raise ValueError(f"{found} is no run's configuration ({e}): name another --out") from None
        other = [k for k in self.config if k not in FREE and before.get(k) != self.config[k]]
        if other:
            changes = ", ".join(f"--{k.replace('_', '-')} was {before.get(k)}, is {self.config[k]}" for k in other)
            raise ValueError(f"{self.path} holds an unfinished run of other options ({changes}): name another --out")
        if (self.path / "state.pt").exists():
            with self.reading_state():
                self.state = torch.load(self.path / "state.pt", map_location="cpu", weights_only=True)
                done, kept = self.state["results"], self.state["timeline"]
                if not {"theta_0", "chance", "seconds"} <= set(done) or self.state["log_bytes"] < 0 \
                        or not kept["task"] == len(done["tasks"]) <= self.config["tasks"]:
                    raise ValueError("it does not fit together")

    @contextlib.contextmanager
    def reading_state(self):
        try:
            yield
        except Exception as e:  # whatever a torn or foreign file makes of torch's reader, and of those who restore
            sentence = f"{self.path}/state.pt is no state of this run ({type(e).__name__}): delete {self.path}"
            raise ValueError(sentence) from e

    def open(self):
        """Called when all input has proved good: before, nothing is written."""
        self.new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        self.log_file = (self.path / "log.jsonl").open("a", encoding="utf-8")
        try:
            if fcntl:
                fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the file is closed
        except BlockingIOError:
            self.log_file.close()
            self.log_file = None
            raise ValueError(f"another process is running in {self.path}: wait for it, or name another --out") from None
        except OSError:  # a file system without locks
            pass
        if self._written() != self.found:
            self.log_file.close()
            self.log_file = None
            raise ValueError(f"another process wrote in {self.path} meanwhile: start again, or name another --out")
        write_json(self.path / "config.json", self.config)
        size = os.path.getsize(self.path / "log.jsonl")
        self.log_file.truncate(min(size, self.state["log_bytes"]) if self.state else 0)  # rows of an unfinished task go

    def _written(self):
        """When the files that say how far this run is were written."""
        files = (self.path / name for name in ("state.pt", "results.json"))
        return [f.stat().st_mtime_ns if f.exists() else None for f in files]

    def log(self, event, **row):
        self.log_file.write(json.dumps({"event": event, **row}) + "\n")
        self.log_file.flush()

    def save_state(self, **state):
        state["log_bytes"] = os.path.getsize(self.path / "log.jsonl")
        aside = self.path / "state.pt.part"
        try:
            torch.save(state, aside)
        except RuntimeError as e:  # torch's for a write that fails
            aside.unlink(missing_ok=True)
            free = shutil.disk_usage(self.path).free
            raise OSError(f"{aside} cannot be written, is the disk full? ({free} bytes are free)") from e
        os.replace(aside, self.path / "state.pt")
        self.state = state

    def close(self, finished):
        """Leave a finished run, or one that can go on; no half-written folder. Other people's files stay."""
        if self.log_file is None:
            return
        with contextlib.suppress(OSError):  # a full disk's, again: the row stays in the buffer
            self.log_file.close()
        for torn in self.path.glob("model.safetensors.*.part"):  # of a process that was killed
            torn.unlink()
        if finished:
            (self.path / "state.pt").unlink(missing_ok=True)
        elif self.state is None:
            own = ("config.json", "config.json.part", "log.jsonl", "state.pt.part", "experts/expert-001.safetensors")
            for name in own:
                (self.path / name).unlink(missing_ok=True)
            for folder in [self.path / "experts", *([self.path] if self.new else [])]:
                with contextlib.suppress(OSError):  # not there, or not empty
                    folder.rmdir()


def check_folder(path, option):
    """ValueError where a folder cannot be, or be made: better said before the work than after it."""
    there = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{path} cannot be written, for {there} is no folder that can: name another with {option}")


def check_file(path):
    """The same for a file, whose folder has to be there."""
    folder = os.path.dirname(os.path.abspath(path))
    if not path or os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ValueError(f"--out {path!r} cannot be written: give a file's name in a folder that is there and can be")


def write_json(path, value):
    aside = Path(f"{path}.part")
    aside.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(aside, path)


# -------------------------------------------------------------------------------------------------- the continual loop


def load_stream(c, world):
    """-> the concepts in order; those of held-out datasets are left out, since nobody may train on them."""
    if c.stream is None:
        return data.order(data.concepts(world.adaptation), "random", c.seed)
    stream, held = data.read_stream(c.stream), {d.name for d in world.heldout}
    kept = [concept for concept in stream if concept[0] not in held]
    if len(kept) < len(stream):
        print(f"{len(stream) - len(kept)} of the stream's {len(stream)} concepts are of held-out datasets: left out")
    return kept


def make_method(c):
    """What trains: merges and joint runs finetune."""
    return methods.METHODS.get(c.method, methods.Method)(**{name: getattr(c, name) for name in methods.LEAST})


def plan(c, model_config, samples):
    """-> number of tasks, steps of each, and what they cost. samples: of the whole stream."""
    tasks = {"joint": 1, "zero-shot": 0}.get(c.method, c.tasks)
    method = c.method if c.method in budget.METHODS else "finetune"
    rank, gap = c.rank or 0, c.gap or budget.GAP  # rank 0 is the paper's
    maf = budget.mafs(model_config, c.batch_size, method, rank, gap=gap)
    at_most = max(1, (c.fisher_samples or methods.Method.fisher_samples) // c.batch_size)
    batches = min(max(1, samples // max(1, tasks) // c.batch_size), at_most)  # that EWC looks back on
    once = maf * (budget.task_flops(model_config, c.batch_size, method, batches * c.batch_size)
                  / budget.step_flops(model_config, c.batch_size, method, rank, gap))  # fmt: skip
    total = None if c.steps else c.budget or budget.default_budget(model_config)
    if c.steps:
        steps = c.steps * (c.tasks if c.method == "joint" else 1)
    else:
        steps = budget.steps_per_task(total, max(1, tasks), maf, once)
    if steps > 2**31:
        raise ValueError(f"{steps:g} steps a task are more than anybody takes: lower --budget or --steps")
    return tasks, steps, {"gflops": total, "gflops_spent": tasks * (steps * maf + once), "maf_gflops_per_step": maf}


def run(c):
    """The main job: theta_0, then T times start, train, merge, score. Returns the results, as in results.json."""
    c = resolve(c)
    folder, world = Folder(c), load_world(c)
    stream = load_stream(c, world)
    chunks = data.tasks(stream, 1 if c.method == "joint" else c.tasks)
    mixture = data.Mixture(world, chunks, c.batch_size, ratios(c), c.replay, c.seed)
    learner = load_learner(c)
    tasks, steps, costs = plan(c, learner.model.config, mixture.ends[-1])
    if c.weights is None:
        pretrain(learner, world)
    theta_0 = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    timeline = merge.Timeline(theta_0, store=ExpertFiles(folder.path / "experts"), **merge_options(c))
    shown = Learner(copy.deepcopy(learner.model), learner.tokenizer, c)  # plain; holds what is deployed
    model, method = learner.model, make_method(c)
    method.prepare(model)
    identity, began = fingerprint(theta_0), time.time()
    if folder.state:
        if folder.state["theta_0"] != identity:
            raise ValueError(f"{c.out} began from another theta_0: delete it, or give the weights that it began from")
        with folder.reading_state():
            model.load_state_dict(folder.state["model"])
            method.load_state(folder.state["method"])
            timeline.load_state(folder.state["timeline"])
            results = folder.state["results"]
            began -= results["seconds"]
        print(f"{c.out}: going on after task {len(results['tasks'])} of {tasks}")
    else:
        scores = shown.score_all(world, True, c.seed, "scoring theta_0")
        results = {"theta_0": scores, "tasks": [], "chance": chance(world), "theta_0_sha256": identity,
                   "trained_parameters": sum(p.numel() for p in method.trained.values()) if tasks else 0, **costs}
    print_head(results)
    try:
        folder.open()
        if not folder.state:
            folder.log("evaluation", task=0, **results["theta_0"])
        for task in range(len(results["tasks"]), tasks):
            title = f"task {task + 1}/{tasks}"
            if task == 0 or timeline.init != "latest":
                method.load(model, timeline.start())
            method.before_task(model, task)
            batches = data.loader(world, mixture, task, steps, learner.size, c.workers)
            log = partial(folder.log, "step", task=task + 1)
            train(learner, method, batches, steps, rates(c, steps, task), title, log)
            method.after_task(model, look_back(c, world, mixture, task, learner.size), learner.loss)
            timeline.add(method.plain(model))
            shown.model.load_state_dict(timeline.deploy())
            scores = shown.score_all(world, c.score_all or task == tasks - 1, c.seed, f"scoring {title}")
            results["tasks"].append({"task": task + 1, "steps": steps, **scores})
            results["seconds"] = time.time() - began
            folder.log("evaluation", **results["tasks"][-1], seconds=results["seconds"])
            folder.save_state(model=model.state_dict(), method=method.state(), timeline=timeline.state(),
                              theta_0=identity, results=results)  # fmt: skip
            print_row(task + 1, steps, scores, results["theta_0"])
        if results["tasks"]:  # which this process need not have trained
            shown.model.load_state_dict(timeline.deploy())
        last = (results["tasks"] or [results["theta_0"]])[-1]
        results["final"] = {k: last[k] for k in ("ka", "zs", "gm", "datasets", "samples")}
        results.update(seconds=time.time() - began, config=folder.config)
        clip.save(shown.model, folder.path / "model.safetensors")
        if learner.merges:  # where `evaluate --weights` and others look for them
            name = "bpe_simple_vocab_16e6.txt.gz" if learner.merges.endswith(".gz") else "merges.txt"
            shutil.copyfile(learner.merges, folder.path / name)
        beside = joint_beside(folder.path, identity) if c.method != "joint" else []
        draw(named([(folder.path, results), *beside]), folder.path / "picture.png")
        write_json(folder.path / "results.json", results)
    except BaseException:
        folder.close(finished=False)
        raise
    folder.close(finished=True)
    print(f"{c.out}: results.json, log.jsonl, picture.png, model.safetensors ({results['seconds']:.0f} s)")
    return results


def look_back(c, world, mixture, task, size):
    """Yields (batch, samples in it) of D_t alone, each sample at most once in full batches (if there are enough for
    one), for what a method measures after a task."""
    alone = copy.copy(mixture)
    alone.ratios = (0, 1, 0)
    steps = max(1, (mixture.ends[task + 1] - mixture.ends[task]) // c.batch_size)
    for batch in data.loader(world, alone, task, steps, size, c.workers):
        yield batch, len(batch[1])


def fingerprint(weights):
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------------- reports

ROW = "{:>9} {:>7} {:>7} {:>7} {:>7}"


def print_head(results):
    chance = results["chance"]
    print(f"guessing would score KA {chance['ka']:.1f}, ZS {chance['zs']:.1f}; all scores in percent")
    print(ROW.format("task", "steps", "KA", "ZS", "GM"))
    print_row("theta_0", "", results["theta_0"])
    for row in results["tasks"]:
        print_row(row["task"], row["steps"], row, results["theta_0"])


def print_row(task, steps, scores, whole=None):
    """whole: scores on all test data."""
    row = ROW.format(task, steps, *(f"{scores[k]:.1f}" for k in ("ka", "zs", "gm")))
    if whole and scores["samples"] < whole["samples"]:
        row += f"   on a class-balanced {scores['samples']:,} of {whole['samples']:,} test samples"
    tqdm.write(row)


def named(runs):
    """(folder, results) pairs -> {unique, short name: results}. The first joint run is "joint", the golden star."""
    names, lines = Counter(Path(folder).name for folder, _ in runs), {}
    for folder, results in runs:
        method, folder = results["config"]["method"], Path(folder)
        name = folder.name if names[folder.name] == 1 and folder.name != "joint" else str(folder)
        lines[method if method in ("joint", "zero-shot") and method not in lines else name] = results
    return lines


def draw(runs, path):
    """runs: name -> results, from one theta_0."""
    evaluate.plot({name: [(p["zs"], p["ka"]) for p in (r["theta_0"], *r["tasks"])] for name, r in runs.items()}, path)


def read_results(folder):
    try:
        r = json.loads((folder / "results.json").read_text())
        numbers = [p[k] for p in (r["theta_0"], r["final"], *r["tasks"]) for k in ("ka", "zs", "gm")]
        numbers += [r["seconds"], r["trained_parameters"], *(p["steps"] for p in r["tasks"])]
        if not all(0 <= n < 1e12 for n in numbers) or not isinstance(r["config"]["method"], str):
            raise ValueError("numbers out of range")
        return r | {"theta_0_sha256": str(r["theta_0_sha256"])}
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as e:
        raise ValueError(f"{folder}/results.json is no run's results ({type(e).__name__}: {e})") from None


def joint_beside(folder, identity):
    """The finished joint run in the same folder of runs that began from the same theta_0, if there is one."""
    for path in sorted(folder.parent.glob("*/results.json")):
        with contextlib.suppress(ValueError):  # somebody else's file must not stop this run
            results = read_results(path.parent)
            if results["config"]["method"] == "joint" and results["theta_0_sha256"] == identity:
                return [(path.parent, results)]
    return []


def report_command(argv):
    parser = argparse.ArgumentParser("fomo.py report", description="Table and picture of several finished runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs; unfinished ones are passed over")
    parser.add_argument("-o", "--out", default="report.png", help="the picture (default report.png)")
    args = parser.parse_args(argv)
    runs = []
    for folder in map(Path, args.runs):
        if (folder / "results.json").exists():
            runs.append((folder, read_results(folder)))
        else:
            print(f"{folder} has no results.json: passed over", file=sys.stderr)
    if not runs:
        raise ValueError("none of these folders holds a finished run")
    groups = {}
    for folder, results in runs:
        groups.setdefault(results["theta_0_sha256"], []).append(str(folder))
    if len(groups) > 1:
        raise ValueError("runs from different theta_0 do not compare, give those of one: "
                         + "; or ".join(" ".join(group) for group in groups.values()))  # fmt: skip
    check_file(args.out)
    head = ("run", "KA", "ZS", "GM", "parameters", "steps", "seconds")
    print("{:24} {:>6} {:>6} {:>6} {:>10} {:>6} {:>8}".format(*head))
    base = runs[0][1]["theta_0"]
    print(f"{'theta_0':24} {base['ka']:6.1f} {base['zs']:6.1f} {base['gm']:6.1f}")
    for name, r in named(runs).items():
        steps = sum(row["steps"] for row in r["tasks"])
        print(f"{name:24} {r['final']['ka']:6.1f} {r['final']['zs']:6.1f} {r['final']['gm']:6.1f} "
              f"{r['trained_parameters']:10,} {steps:6} {r['seconds']:8.0f}")  # fmt: skip
    draw(named(runs), args.out)
    print(f"drawn in {args.out}")


def evaluate_command(argv):
    c = parse(argv, "fomo.py evaluate", "Scores of --weights on all test data of --data. Takes the options of a run;"
              " those of training do nothing. --out is the file of scores (default scores.json).")  # fmt: skip
    out, c = c.out or "scores.json", resolve(c)
    check_file(out)
    world, learner = load_world(c), load_learner(c)
    if c.weights is None:
        pretrain(learner, world)
    scores, guess = learner.score_all(world, True, c.seed, "scoring"), chance(world)
    for d in world.adaptation + world.heldout:
        role, metric = ("KA", "ZS")[d in world.heldout], "R@5" if d.kind == "retrieval" else "top-1"
        score, by_chance = scores["datasets"][d.name], guess["datasets"][d.name]
        print(f"{d.name:24} {role} {metric:5} {score:6.1f}  (chance {by_chance:.1f})")
    write_json(out, {"weights": c.weights, **scores, "chance": guess})
    print("KA {ka:.1f}  ZS {zs:.1f}  GM {gm:.1f}".format(**scores), f"(all of it in {out})")


def budget_command(argv):
    parser = argparse.ArgumentParser("fomo.py budget", description="What a step of each method costs and how many"
                                     " steps a budget buys, beside the paper's Table 4.")  # fmt: skip
    parser.add_argument("--model", default="ViT-B-16", choices=sorted(clip.CONFIGS), help="(default ViT-B-16)")
    parser.add_argument("--batch-size", type=int, help="pairs of image and text a step (default 512; tiny 64)")
    parser.add_argument("--precision", default="bf16", choices=list(budget.PRECISIONS), help="(default bf16)")
    parser.add_argument("--rank", type=int, default=0, help="of lora, dora, vera and galore; 0: the paper's")
    parser.add_argument("--budget", type=float, help="GFLOPs of the whole stream, times memory (default the paper's,"
                                                     " in proportion to a pair's; tiny 3000)")  # fmt: skip
    parser.add_argument("--tasks", type=int, nargs="+", help="lengths of stream (default 20 50 100 200; tiny 8)")
    parser.add_argument("--explain", choices=budget.METHODS, help="where the FLOPs and bytes of one step go")
    parser.add_argument("--json", action="store_true", help="the same numbers for programs")
    args = parser.parse_args(argv)
    config, defaults = clip.CONFIGS[args.model], TINY if args.model == "tiny" else PAPER
    size = defaults["batch_size"] if args.batch_size is None else args.batch_size
    total = (defaults["budget"] or budget.default_budget(config)) if args.budget is None else args.budget
    lengths = args.tasks or ([TINY["tasks"]] if args.model == "tiny" else budget.TASKS)
    if args.explain:
        rows = budget.flops(config, size, args.explain, args.rank)
        parts = budget.memory(config, size, args.explain, args.precision, args.rank)
        once = budget.task_flops(config, size, args.explain)
        report = {"flops": rows, "bytes": parts, "once_a_task": once}
        print(json.dumps(report) if args.json else budget.explain_text(rows, parts, once))
        return
    rows = budget.table(config, size, args.rank, args.precision, total, lengths)
    head = f"{args.model}, batch {size}, {args.precision}, {total:g} GFLOPs in all, memory-adjusted"
    print(json.dumps(rows) if args.json else f"{head}\n{budget.table_text(rows)}")


def merge_command(argv):
    p = argparse.ArgumentParser("fomo.py merge", description="Merge files of weights in any layout that clip.py reads.",
                                argument_default=argparse.SUPPRESS)  # fmt: skip
    p.add_argument("base", help="theta_0; the result has its names, dtypes and metadata")
    p.add_argument("experts", nargs="+", metavar="expert")
    p.add_argument("-o", "--out", required=True, help="safetensors file to write; must not exist")
    p.add_argument("--technique", default="linear", choices=merge.TECHNIQUES, help="(default linear)")
    p.add_argument("--weights", type=float, nargs="+", help=f"one per expert; not for {', '.join(merge.UNWEIGHTED)}")
    p.add_argument("--scale", type=float, help="all but linear, slerp: factor on the merged task vector (default 1)")
    p.add_argument("--lines", nargs=3, metavar=("ALPHA", "BETA", "HOW"),
                   help="LiNeS, all but linear, slerp; HOW: linear, quadratic or sqrt")  # fmt: skip
    p.add_argument("--density", type=float, help="ties: share of each task vector kept (default .2)")
    p.add_argument("--whole", action="store_true", help="ties: trim over all tensors together, not within each")
    p.add_argument("--function", choices=("mean", "sum", "max"), help="ties, dare --elect (default mean)")
    p.add_argument("--drop", type=float, help="dare: probability of dropping an entry (default .9)")
    p.add_argument("--elect", action="store_true", help="dare: elect signs as ties does")
    p.add_argument("--top", type=float, help="breadcrumbs: share of largest entries dropped (default .01)")
    p.add_argument("--bottom", type=float, help="breadcrumbs: share of smallest entries dropped (default .85)")
    p.add_argument("--strictness", type=float, help="tall-mask: lambda (default .4)")
    p.add_argument("--agree", type=int, help="tall-mask: experts that must need an entry (default 2)")
    p.add_argument("--seed", type=int, help="dare, random (default 0)")
    options = vars(p.parse_args(argv))
    base, experts, out, technique = (options.pop(k) for k in ("base", "experts", "out", "technique"))
    weights = options.pop("weights", None)
    if "lines" in options:
        try:
            options["lines"] = (*map(float, options["lines"][:2]), options["lines"][2])
        except ValueError:
            raise ValueError(f"--lines takes two numbers and a word, got {' '.join(options['lines'])}") from None
    if os.path.exists(out):
        raise ValueError(f"{out} exists: choose another --out or remove it")
    check_file(out)
    files = [clip.read_tensors(path) for path in (base, *experts)]
    if any(set(f) != set(files[0]) for f in files):  # different layouts, or different models, which merge() then names
        files = [clip.openai_names(f) for f in files]
    began, readings = time.time(), {"ties": 3 if "whole" in options else 1, "tall-mask": 2}.get(technique, 1)
    with progress(desc=technique, total=len(files[0]) * len(experts) * readings, unit=" tensors") as bar:
        merged = merge.merge(technique, files[0], [Watched(f, bar) for f in files[1:]], weights, **options)
    clip.write_tensors(merged, out, files[0].metadata)
    plural = "s" * (len(experts) > 1)
    print(f"{technique} of {len(experts)} expert{plural}: {len(merged)} tensors in {out} ({time.time() - began:.1f} s)")


class Watched(clip.Tensors):
    """Tensors that move a bar when they are read."""

    def __init__(self, tensors, bar):
        super().__init__(tensors.readers, tensors.metadata)
        self.bar = bar

    def __getitem__(self, name):
        self.bar.update()
        return super().__getitem__(name)

    def stored(self, name):
        stored = super().stored(name)
        self.bar.update(stored is not None)
        return stored


# ----------------------------------------------------------------------------------------------------------- benchmarks

MERGES = {name: (name, {}) for name in merge.TECHNIQUES}
MERGES |= {"ties, whole vector": ("ties", {"whole": True}), "dare, election": ("dare", {"elect": True})}
CASES = ["read", *MERGES, "ties, stacked", "ema copy", "ema update"]


def bench_command(argv):
    """Each measurement is a ratio within one run; a machine's other work disturbs ratios least."""
    p = argparse.ArgumentParser("fomo.py bench", description="merge: seconds and peak memory of merging files, one"
                                " thread. methods: a step of each method in units of a finetuning step.")  # fmt: skip
    p.add_argument("what", choices=["merge", "methods"])
    p.add_argument("--model", choices=clip.CONFIGS, help="default ViT-B-16 for merge, tiny for methods")
    p.add_argument("--experts", type=int, default=20, help="merge: random files, written to --folder first")
    p.add_argument("--folder", help="merge: where they are written, then removed; default the system's tmp")
    p.add_argument("--case", choices=CASES, metavar="CASE", help="merge: this one alone, on what is in --folder")
    p.add_argument("--batch-size", type=int, default=128, help="methods: image-text pairs")
    p.add_argument("--rounds", type=int, default=20, help="methods: timed pairs of steps, after two untimed")
    p.add_argument("--methods", nargs="+", choices=methods.METHODS, default=[*methods.METHODS])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="methods: where")
    args = p.parse_args(argv)
    if min(args.experts, args.batch_size, args.rounds - 1) < 1 or (args.case and not args.folder):
        raise ValueError("--experts and --batch-size are at least 1, --rounds 2; --case measures files in a --folder")
    check_device(args.device)
    if args.what == "methods":
        bench_methods(args)
    elif args.case:
        print(json.dumps(bench_merge_case(args.folder, args.case)))
    else:
        bench_merge(args)


def bench_merge(args):
    """Every case in a process of its own, so that its peak of memory is its own."""
    name, rows = args.model or "ViT-B-16", {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        template = clip.CLIP(clip.CONFIGS[name]).state_dict()
        size = sum(t.nbytes for t in template.values())
        for i in progress(range(args.experts + 1), "writing"):
            noise = {n: t + 1e-3 * (i > 0) * torch.randn(t.shape) for n, t in template.items()}
            clip.write_tensors(noise, os.path.join(folder, f"{i:03}.safetensors"))
        del template, noise
        print(f"{args.experts} experts of {name}, {size / 1e6:.0f} MB each, float32, one thread")
        for case in progress([*CASES, "read"], "measuring"):  # read twice, the first fills the system's cache
            command = [sys.executable, __file__, "bench", "merge", "--folder", folder, "--case", case]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            row = json.loads(done.stdout) if done.returncode == 0 else {"failed": done.stderr.strip()[-200:]}
            rows[case] = row
    for case, row in rows.items():
        print(f"{case:20}" + (row.get("failed") or "{:9.2f} s {:9.2f} s on the CPU, peak {:6.2f} x the model".format(
            row["seconds"], row["cpu_seconds"], row["peak_bytes"] / size)))  # fmt: skip
    print(json.dumps({"model": name, "experts": args.experts, "bytes": size, "cases": rows}))


def bench_merge_case(folder, case):
    """-> seconds, those on the CPU, and the peak of memory above the interpreter, in bytes (Linux)."""
    base, *experts = [clip.read_tensors(path) for path in sorted(Path(folder).glob("*.safetensors"))]
    torch.set_num_threads(1)
    if case in MERGES:
        technique, options = MERGES[case]
        work = partial(merge.merge, technique, base, experts, **options)
    elif case == "read":
        work = partial(_read_all, base, experts)
    elif case == "ties, stacked":
        work = partial(_stacked_ties, base, experts)
    else:
        theta = {name: experts[0][name] for name in base}
        timeline, copies = merge.Timeline(base), {name: tensor.clone() for name, tensor in theta.items()}
        work = {"ema update": partial(timeline.add, theta), "ema copy": partial(_copy_all, copies, theta)}[case]
    before, runs = _status("VmRSS"), []
    while len(runs) < 7 and sum(seconds for seconds, _ in runs) < 20:  # what is short is repeated; the best counts
        began = time.perf_counter(), time.process_time()
        work()
        runs.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    seconds, on_cpu = min(runs)
    return {"seconds": seconds, "cpu_seconds": on_cpu, "peak_bytes": _status("VmHWM") - before}


def _status(field):
    """VmRSS is now, VmHWM the peak. (getrusage's peak would include the parent's, inherited through fork.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _read_all(base, experts):
    for name in base:
        for expert in experts:
            expert[name]


def _copy_all(copies, theta):
    for name, tensor in theta.items():
        copies[name].copy_(tensor)


def _stacked_ties(base, experts, density=0.2):
    """TIES as it is usually written down, all experts of a tensor at once: what merge.py is measured against."""
    merged = {}
    for name in base:
        theta_0, taus = base[name], []
        for expert in experts:
            tau = (expert[name] - theta_0).reshape(-1)
            keep = max(1, round(density * len(tau)))
            taus.append(torch.where(tau.abs() >= tau.abs().kthvalue(len(tau) - keep + 1).values, tau, 0))
        taus = torch.stack(taus)  # [k, n]
        taus *= (taus > 0) == (taus.sum(0) >= 0)
        merged[name] = theta_0 + (taus.sum(0) / (taus != 0).sum(0).clamp(min=1)).view_as(theta_0)
    return merged


def bench_methods(args):
    """The method and finetuning alternate; on a CPU its time is counted, not the clock's. Penalties are on (task 2)."""
    config, n = clip.CONFIGS[args.model or "tiny"], args.batch_size
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    print(f"{args.model or 'tiny'}, batch {n}, {where}, median of {args.rounds} alternating rounds (ratio's quartiles)")
    print(f"{'method':12} {'ms a step':>9} {'finetune':>9} {'ratio':>6}")
    torch.manual_seed(0)
    images = torch.randn(n, 3, config.image_size, config.image_size, device=args.device)
    tokens = torch.randint(1, config.vocab_size - 1, (n, config.context_length), device=args.device)
    tokens[:, -1] = config.vocab_size - 1  # the end token: texts of full length, the costliest
    model = clip.CLIP(config).to(args.device)
    for name in args.methods:
        pair = [_timed_step(key, copy.deepcopy(model), (images, tokens)) for key in (name, "finetune")]
        rounds = [[step() for step in pair] for _ in progress(range(args.rounds + 2), name)][2:]
        mine, plain = (statistics.median(times) for times in zip(*rounds))
        low, ratio, high = statistics.quantiles([a / b for a, b in rounds], n=4)
        print(f"{name:12} {1e3 * mine:9.1f} {1e3 * plain:9.1f} {ratio:6.3f} ({low:.3f} to {high:.3f})", flush=True)


def _timed_step(name, model, batch):
    """-> function that takes one step in the method's second task and returns its seconds."""
    method, cuda = methods.METHODS[name](), batch[0].is_cuda
    method.prepare(model)
    clock = time.perf_counter if cuda else time.process_time

    def loss(model, batch):
        return clip.contrastive_loss(*model(*batch))

    def step():
        began = clock()
        (loss(model, batch) + method.penalty(model)).backward()
        torch.nn.utils.clip_grad_norm_(method.trained.values(), 1.0)
        method.after_backward(model, 1e-5)
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        return clock() - began

    for task in range(2):
        optimizer = method.optimizer(model)
        method.before_task(model, task)
        if task == 0:
            step()
            method.after_task(model, [(batch, len(batch[0]))], loss)
    return step


COMMANDS = {"report": report_command, "evaluate": evaluate_command, "budget": budget_command, "merge": merge_command,
            "bench": bench_command}  # fmt: skip


FULL = ": free some space where --out or --cache lies and start the same command again; what was finished is kept"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch needs to be deterministic on a GPU
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time and finds nothing here
    try:
        if argv and argv[0] in COMMANDS:
            COMMANDS[argv[0]](argv[1:])
        elif argv and not argv[0].startswith("-"):
            raise ValueError(f"there is no command {argv[0]}; there are {', '.join(COMMANDS)}, and without one, a run")
        else:
            run(parse(argv))
        sys.stdout.flush()
    except BrokenPipeError:  # who read our output has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as e:
        system = isinstance(e, OSError) and e.strerror
        print(f"fomo: {f'{e.filename}: ' if system and e.filename else ''}{e.strerror if system else e}"
              f"{FULL if system and e.errno == errno.ENOSPC else ''}", file=sys.stderr)  # fmt: skip
        return 2
    except (torch.OutOfMemoryError, MemoryError):
        print("fomo: the memory is full: take a smaller --batch-size or --precision bf16", file=sys.stderr)
        return 2
    except RuntimeError as e:  # which torch raises wherever this process is when one of its workers dies
        if "DataLoader worker" not in str(e):
            raise
        print(f"fomo: a process that prepares batches died ({e}): memory full? take fewer --workers", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfomo: interrupted; the same command goes on after the last finished task, if any", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
