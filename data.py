"""Data for continual pretraining: datasets of captioned pictures, streams of concepts, and batches mixed from them.

Roth et al. 2024 (arXiv 2408.14471), sec. 3: FoMo-in-Flux's layout on disk, its streams, the mixture of update data D,
buffer B and pretraining pool P; and a small world, drawn on the spot, in which all of it fits into minutes. This file
stands alone; copy it:

    import data
    world = data.toy(seed=0)
    stream = data.order(data.concepts(world.adaptation), "random", seed=0)
    mixture = data.Mixture(world, data.tasks(stream, 8), batch_size=128)
    for images, captions in data.loader(world, mixture, task=0, steps=3, image_size=32):
        print(images.shape, captions[0])  # torch.Size([128, 3, 32, 32]) and a sentence
"""

import hashlib
import json
import math
import multiprocessing
import os
import re
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

# A Split is anything with len(), labels (int array [N]), captions (list of str or list[str]) and image(i) -> PIL image
# or uint8 array [H, W, 3].


@dataclass
class Dataset:
    name: str
    kind: str  # "classification" (top-1 accuracy) or "retrieval" (R@5)
    classes: list[str]
    prompts: list[str]  # one a class: what the zero-shot classifier encodes
    train: object  # Split
    test: object  # Split


@dataclass
class World:
    adaptation: list[Dataset]  # the stream is made of these; KA is the mean over them
    heldout: list[Dataset]  # never trained on; ZS is the mean over them
    pool: object = None  # Split: what theta_0 was trained on, for replay


@dataclass
class Pictures:
    """A split held in memory."""

    pixels: np.ndarray  # uint8 [N, H, W, 3]
    labels: np.ndarray  # int [N]
    captions: list = field(repr=False)

    def __len__(self):
        return len(self.labels)

    def image(self, i):
        return self.pixels[i]


class Concat:
    """Splits one after the other, as one split. Its labels are the parts' own."""

    def __init__(self, splits):
        self.splits = list(splits)
        self.ends = np.cumsum([len(s) for s in self.splits])
        self.labels = np.concatenate([s.labels for s in self.splits])
        self.captions = [c for s in self.splits for c in s.captions]

    def __len__(self):
        return len(self.labels)

    def image(self, i):
        part = int(np.searchsorted(self.ends, i, side="right"))
        return self.splits[part].image(i - self.ends[part] + len(self.splits[part]))


# ------------------------------------------------------------------------------------- a small world, drawn on the spot
# FoMo-in-Flux in miniature: 8 sets to adapt to, 5 held out, 32 px. theta_0's pool holds all held-out classes and
# a quarter of the others, so that it starts about where the paper's does: strong on ZS, half-way on KA.

COLOURS = {
    "red": (215, 40, 40), "green": (40, 160, 60), "blue": (45, 75, 215), "yellow": (235, 215, 50),
    "purple": (130, 45, 165), "orange": (240, 140, 30), "cyan": (60, 205, 215), "pink": (245, 130, 190),
    "white": (245, 245, 245), "black": (15, 15, 15),
}  # fmt: skip
*INKS, _, _ = COLOURS
GROUNDS = ["white", "black"]
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
HOURS = [*DIGITS[1:], "ten", "eleven", "twelve"]
CELLS = [f"{v} {h}" for v in ("top", "middle", "bottom") for h in ("left", "centre", "right")]
TEXTURES = {  # where there is ink, of columns x, rows y and the period s, in pixels
    "horizontal stripes": lambda x, y, s: y % s < s / 2,
    "vertical stripes": lambda x, y, s: x % s < s / 2,
    "diagonal stripes": lambda x, y, s: (x + y) % s < s / 2,
    "zigzags": lambda x, y, s: (y + abs(x % s - s / 2)) % s < s / 3,
    "a checkerboard": lambda x, y, s: (x // s + y // s) % 2 > 0,
    "polka dots": lambda x, y, s: (x % s - s / 2) ** 2 + (y % s - s / 2) ** 2 < s * s / 10,
    "a grid": lambda x, y, s: np.minimum(x % s, y % s) < 3,
    "bricks": lambda x, y, s: np.minimum((x + y // s * (s // 2)) % s, y % s) < 3,
    "rings": lambda x, y, s: np.hypot(x - CANVAS / 2, y - CANVAS / 2) % s < s / 2,
    "fans": lambda x, y, s: np.arctan2(y, x) * 40 % s < s / 2,
}
WINDS = ["up", "up and right", "right", "down and right", "down", "down and left", "left", "up and left"]
SIZE, CANVAS = 32, 64  # drawn at twice the size, then averaged down


def _arc(radius, start, stop, n=24):
    angles = np.linspace(start, stop, n) * math.pi / 180
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _star(radii, points):
    corners = _arc(1.0, -90, 270, points * len(radii) + 1)[:-1]
    return corners * np.resize(radii, len(corners))[:, None]


def _heart():
    t = np.linspace(0, 2 * math.pi, 32)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], axis=1) / 16


SHAPES = {  # outlines in the unit circle, y downwards
    "circle": _arc(0.9, 0, 360),
    "square": _arc(1.0, 45, 405, 5)[:-1],
    "triangle": _arc(1.0, -90, 270, 4)[:-1],
    "star": _star((1.0, 0.42), 5),
    "cross": np.array([(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1),
                       (-3, -1), (-1, -1)]) / 3.1,
    "ring": np.concatenate([_arc(0.95, 0, 360), _arc(0.5, 360, 0)]),
    "heart": _heart(),
    "moon": np.concatenate([_arc(0.95, 60, 300), _arc(0.8, 290, 70) + (0.45, 0)]),
    "diamond": np.array([(0, -1), (0.6, 0), (0, 1), (-0.6, 0)]),
    "arrow": np.array([(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)]),
}  # fmt: skip


class Picture:
    """One drawing: a background, things on it, and the words for what chance decided."""

    def __init__(self, rng):
        self.rng = rng
        self.ground = self.choose(GROUNDS)
        self.canvas = Image.new("RGB", (CANVAS, CANVAS), self.rgb(self.ground))
        self.draw = ImageDraw.Draw(self.canvas)

    def choose(self, options, but=()):
        options = [o for o in options if o not in but]
        return options[self.rng.integers(len(options))]

    def ink(self, *but):
        return self.choose(INKS, but)

    def rgb(self, colour):
        return tuple(min(max(c + d, 0), 255) for c, d in zip(COLOURS[colour], self.rng.integers(-14, 15, 3).tolist()))

    def shape(self, name, ink, x=0.5, y=0.5, radius=0.3, jitter=0.04, turn=0, outline=False):
        """x, y, radius as shares of the picture; turn in degrees, give or take 8."""
        angle = math.radians(turn + self.rng.uniform(-8, 8))
        x, y = x + self.rng.uniform(-jitter, jitter), y + self.rng.uniform(-jitter, jitter)
        turned = SHAPES[name] @ [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
        points = turned * radius * self.rng.uniform(0.9, 1.1) + (x, y)
        points = (points * CANVAS).flatten().tolist()  # x, y, x, y, ...
        if outline:
            self.draw.line(points + points[:2], self.rgb(ink), width=4, joint="curve")
        else:
            self.draw.polygon(points, self.rgb(ink))

    def glyph(self, text, ink):
        font = _font(int(self.rng.integers(44, 56)))
        x, y = (CANVAS * (0.5 + self.rng.uniform(-0.05, 0.05)) for _ in range(2))
        self.draw.text((x, y), text, self.rgb(ink), font, anchor="mm", stroke_width=int(self.rng.integers(1, 3)),
                       stroke_fill=self.rgb(ink))  # fmt: skip

    def pixels(self):
        return np.asarray(self.canvas.reduce(CANVAS // SIZE))


@lru_cache
def _font(size):
    return ImageFont.load_default(size)


def _digits(p, digit):
    ink = p.ink()
    p.glyph(str(DIGITS.index(digit)), ink)
    return f"the digit {digit}", f"the number {digit}", f"a {ink} digit {digit}"


def _letters(p, letter):
    ink = p.ink()
    p.glyph(letter, ink)
    return f"the letter {letter}", f"a capital {letter}", f"a {ink} letter {letter}"


def _texture(p, name):
    ink, x, y = p.ink(), *np.meshgrid(*2 * [np.arange(CANVAS) + p.rng.integers(16)])
    mask = TEXTURES[name](x, y, p.rng.integers(12, 19)) * np.uint8(255)
    p.canvas.paste(p.rgb(ink), mask=Image.fromarray(mask))
    return f"a pattern of {name}", f"a texture of {name}", f"{name} in {ink} and {p.ground}"


def _sketch(p, shape):
    ink = p.ink()
    p.shape(shape, ink, radius=0.36, outline=True)
    return f"a sketch of a {shape}", f"the outline of a {shape}", f"a {shape} in {ink} lines"


def _coloured(p, name):
    ink, shape = name.split()
    p.shape(shape, ink, radius=0.36)
    return f"a {name}", f"a {name} on {p.ground}", f"a {shape} that is {ink}"


def _beside(p, name):
    left, right = name.split(" left of a ")
    for x, thing in ((0.27, left), (0.73, right)):
        ink, shape = thing.split()
        p.shape(shape, ink, x=x, radius=0.23)
    return f"a {name}", f"a {right} right of a {left}", f"a {left} and a {right}"


def _counts(p, name):
    number, ink, _ = name.split()
    for cell in p.rng.permutation(9)[: DIGITS.index(number)]:
        p.shape("circle", ink, x=(cell % 3) / 3 + 1 / 6, y=(cell // 3) / 3 + 1 / 6, radius=0.15, jitter=0.02)
    return name, f"a group of {name}", f"{number} dots, all {ink}"


def _flags(p, name):
    left, right = name.split(" and ")
    edge = int(CANVAS * p.rng.uniform(0.4, 0.6))
    p.draw.rectangle((0, 0, edge, CANVAS), p.rgb(left))
    p.draw.rectangle((edge, 0, CANVAS, CANVAS), p.rgb(right))
    return f"a flag of {name}", f"a {left} and {right} flag", f"a flag, {left} then {right}"


def _places(p, name):
    (ink, _), cell = name.split(" at the ")[0].split(), name.split(" at the ")[1]
    k = CELLS.index(cell)
    p.shape("circle", ink, x=(k % 3) / 3 + 1 / 6, y=(k // 3) / 3 + 1 / 6, radius=0.18, jitter=0.03)
    return f"a {name}", f"in the {cell} a {ink} dot", f"a {name} on {p.ground}"


def _clocks(p, hour):
    ink, centre = p.ink(), CANVAS / 2
    angle = math.radians(30 * (HOURS.index(hour) + 1) - 90 + p.rng.uniform(-6, 6))
    p.draw.ellipse((4, 4, CANVAS - 4, CANVAS - 4), outline=p.rgb(ink), width=3)
    tip = (centre + 24 * math.cos(angle), centre + 24 * math.sin(angle))
    p.draw.line((centre, centre, *tip), p.rgb(ink), width=7)
    return f"a clock at {hour}", f"a {ink} clock at {hour}", f"{hour} o'clock"


def _frames(p, name):
    shape, frame = name.split(" in a ")
    p.draw.rectangle((0, 0, CANVAS - 1, CANVAS - 1), outline=p.rgb(frame.split()[0]), width=9)
    ink = p.ink(frame.split()[0])
    p.shape(shape, ink, radius=0.28)
    return f"a {name}", f"a {ink} {name}", f"a {frame} around a {shape}"


def _arrows(p, wind):
    ink = p.ink()
    p.shape("arrow", ink, radius=0.38, turn=45 * WINDS.index(wind) - 90)
    return f"an arrow pointing {wind}", f"a {ink} arrow pointing {wind}", f"an arrow that points {wind}"


def _above(p, name):
    top, bottom = name.split(" above a ")
    a, b = p.ink(), p.ink()
    p.shape(top, a, y=0.26, radius=0.22)
    p.shape(bottom, b, y=0.74, radius=0.22)
    return f"a {a} {top} above a {b} {bottom}", f"a {b} {bottom} below a {a} {top}", f"a {a} {top} over a {b} {bottom}"


def _pairs(first, second, pattern):
    return [pattern.format(a, b) for a in first for b in second if a != b]


_SIX = list(SHAPES)[:6]
_SCENES = _pairs([f"{c} {s}" for c, s in zip(INKS, SHAPES)], [f"{c} {s}" for c, s in zip(INKS[::-1], SHAPES)],
                 "{} left of a {}")  # fmt: skip
TOY = {  # name: (role, kind, classes, prompt, drawing); the drawing returns ways to say what it drew
    "DIGITS": ("heldout", "classification", DIGITS, "the digit {}.", _digits),
    "TEXTURES": ("heldout", "classification", list(TEXTURES), "a pattern of {}.", _texture),
    "SKETCHES": ("heldout", "classification", list(SHAPES), "a sketch of a {}.", _sketch),
    "SHAPES": ("heldout", "classification", [f"{c} {s}" for c in INKS for s in SHAPES], "a {}.", _coloured),
    "SCENES": ("heldout", "retrieval", _SCENES, "a {}.", _beside),
    "LETTERS": ("adaptation", "classification", list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), "the letter {}.", _letters),
    "COUNTS": ("adaptation", "classification", [f"{n} {c} dots" for n in DIGITS[2:7] for c in INKS[:6]], "{}.",
               _counts),
    "FLAGS": ("adaptation", "classification", _pairs(INKS[:7], INKS[:7], "{} and {}"), "a flag of {}.", _flags),
    "PLACES": ("adaptation", "classification", _pairs(INKS[:5], CELLS, "{} dot at the {}"), "a {}.", _places),
    "CLOCKS": ("adaptation", "classification", HOURS, "a clock at {}.", _clocks),
    "FRAMES": ("adaptation", "classification", _pairs(_SIX, INKS[:6], "{} in a {} frame"), "a {}.", _frames),
    "ARROWS": ("adaptation", "classification", WINDS, "an arrow pointing {}.", _arrows),
    "STACKS": ("adaptation", "retrieval", _pairs(_SIX, _SIX, "{} above a {}"), "a {}.", _above),
}  # fmt: skip
OPENINGS = ("", "", "", "here is ", "image of ", "picture: ")


def _draw(name, classes, n, seed, part):
    """n pictures of the classes in turn, as uint8 [n, 32, 32, 3] with pixel noise, and a caption each."""
    rng = np.random.default_rng((seed, zlib.crc32(f"{name} {part}".encode())))
    labels = np.arange(n) % len(classes)
    pixels, captions = np.empty((n, SIZE, SIZE, 3), np.uint8), []
    for i, label in enumerate(labels):
        p = Picture(rng)
        ways = TOY[name][4](p, classes[label])
        pixels[i] = p.pixels()
        opening = p.choose(OPENINGS) if TOY[name][1] == "classification" else ""
        captions.append((opening + p.choose((ways[0], *ways))).replace("a orange", "an orange"))
    noise = 8 * rng.standard_normal(pixels.shape, np.float32)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8), labels, captions


def toy(seed=0, train=1000, test=250):
    """World of 8 + 5 drawn datasets of `train` and `test` pictures each. A pure function of its arguments."""
    world, pool = World([], []), []
    for name, (role, kind, classes, prompt, _) in TOY.items():
        splits = [Pictures(*_draw(name, classes, n, seed, part)) for n, part in ((train, "train"), (test, "test"))]
        prompts = [prompt.format(c).replace("a orange", "an orange") for c in classes]
        dataset = Dataset(name, kind, classes, prompts, *splits)
        getattr(world, role).append(dataset)
        if role == "heldout":
            pool.append(dataset.train)
        else:  # other pictures of every fourth class
            known = np.random.default_rng((seed, len(name), 1)).permutation(len(classes))[: len(classes) // 4]
            pixels, labels, captions = _draw(name, [classes[k] for k in known], train * 3 // 4, seed, "pool")
            pool.append(Pictures(pixels, known[labels], captions))
    world.pool = Concat(pool)
    return world


# ------------------------------------------------------------------------------------------- FoMo-in-Flux on disk
# <root>/<DATASET>/<path> or <root>/<DATASET>.tar with members <DATASET>/<path>; annotations in 00_info beside or above.

HELD_OUT = [  # the paper's 22
    "CALTECH101", "CALTECH256", "CARS196", "CIFAR10", "DOMAINNET_QUICKDRAW", "EuroSAT", "FashionMNIST", "FLICKR30K",
    "Food101", "GTSRB", "IMAGENET", "IMAGENET_A", "IMAGENET_D", "IMAGENET_R", "IMAGENET_S", "IMAGENET_V2", "MNIST",
    "MONKEYS10", "MSCOCO", "OXFORDPETS", "STL10", "SVHN",
]  # fmt: skip
SPLITS = {"train": ("train", "train_mini", "train_224", "train_mini_224"),
          "test": ("test", "val", "test_224", "val_224")}  # fmt: skip


class Files:
    """A split on disk: pictures as files of a folder, or as members of an uncompressed tar, read in place."""

    def __init__(self, folder, members, paths, labels, captions):
        self.folder, self.members, self.paths = folder, members, paths  # members: None, or path -> (offset, bytes)
        self.labels, self.captions = np.asarray(labels, dtype=int), captions

    def __len__(self):
        return len(self.paths)

    def size(self, i):
        """Bytes of the picture's file."""
        return os.path.getsize(self.folder / self.paths[i]) if self.members is None else self.members[self.paths[i]][1]

    def image(self, i):
        path = self.paths[i]
        try:
            if self.members is None:
                return _rgb(Image.open(self.folder / path))
            offset, size = self.members[path]
            with open(f"{self.folder}.tar", "rb") as f:
                f.seek(offset)
                return _rgb(Image.open(BytesIO(f.read(size))))
        except (OSError, ValueError, RuntimeError, SyntaxError, Image.DecompressionBombError) as e:
            place = self.folder / path if self.members is None else f"{self.folder}.tar: {path}"
            raise ValueError(f"{place} does not decode as an image ({e}); replace it, or take it out of 00_info") from e


def _rgb(image):
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers, of no known range")
    if image.mode.startswith("I"):  # 16 bits: convert() would clip, not scale
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def _read_json(path, kind):
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there") from None
    except OSError as e:
        raise OSError(f"{path} cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected a {kind.__name__}")  # noqa: TRY004
    return value


def _tar_index(path):
    """path inside the dataset's folder -> (offset, size) of every file in a tar."""
    try:
        with tarfile.open(path, "r:") as tar:
            bar = tqdm(tar, path.name, leave=False, disable=None)
            members = {m.name.removeprefix("./"): (m.offset_data, m.size) for m in bar if m.isfile()}
    except tarfile.TarError as e:
        raise ValueError(f"{path} is not an uncompressed tar ({e}); unpack it, or download it again") from e
    return {name.removeprefix(f"{path.stem}/"): place for name, place in members.items()}


def _captions(path, key, item):
    """FoMo's rule: default_caption if present, else synthetic_merged_caption; the class prompt where neither is."""
    caption = item.get("default_caption") or item.get("synthetic_merged_caption") or item.get("primer_caption")
    several = [caption] if isinstance(caption, str) else caption
    if not isinstance(several, list) or not several or not all(isinstance(c, str) and c.strip() for c in several):
        raise ValueError(f"{path}: the caption of {key} is {caption!r:.80}, expected text or a list of texts")
    if not isinstance(prompt := item.get("primer_caption") or "", str):
        raise ValueError(f"{path}: the primer_caption of {key} is {prompt!r:.80}, not text")  # noqa: TRY004
    return caption


def _target(path, key, item):
    target = item.get("target") if isinstance(item, dict) else None
    if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < 2**31:
        raise ValueError(f"{path}: the target of {key} is {target!r:.80}, expected a class's number")
    return target


def _read_split(root, info, name, split):
    """-> (Files, annotation path, the items), or None where 00_info has no such split."""
    path = next((p for s in SPLITS[split] if (p := info / f"{name}_{s}.json").exists()), None)
    if path is None:
        return None
    items, folder, tar = _read_json(path, dict), root / name, root / f"{name}.tar"
    members = None if folder.is_dir() else _tar_index(tar)
    if outside := [k for k in items if os.path.isabs(k) or ".." in Path(k).parts]:
        raise ValueError(f"{path} lists {outside[0]}, which is outside the dataset's folder")
    missing = [k for k in items if (k not in members if members is not None else not (folder / k).is_file())]
    if missing:
        raise FileNotFoundError(f"{path} lists {missing[0]}, which is not in {folder if members is None else tar} "
                                f"({len(missing)} of {len(items)} are missing)")  # fmt: skip
    paths = sorted(items)  # not the file's or the disk's order
    labels = [_target(path, k, items[k]) for k in paths]
    return Files(folder, members, paths, labels, [_captions(path, k, items[k]) for k in paths]), path, items


def _read_dataset(root, info, name, prompts_too):
    test, train = (_read_split(root, info, name, s) for s in ("test", "train"))
    if test is None or not test[2]:
        raise FileNotFoundError(f"{info} has no {name}_test.json with samples, so {name} cannot be scored")
    file = info / f"{name}_classnames.json"
    classes = _read_json(file, list) if file.exists() else []
    if odd := [c for c in classes if not isinstance(c, str)]:
        raise ValueError(f"{file}: class names must be texts, got {odd[0]!r:.80}")
    if len(set(classes)) < len(classes):
        raise ValueError(f"{file} names {Counter(classes).most_common(1)[0][0]!r} more than once")
    prompts = dict(zip(classes, classes))
    for files, path, items in filter(None, (train, test)):
        for k, label in zip(files.paths, files.labels):
            if classes and not 0 <= label < len(classes):
                raise ValueError(f"{path}: target {label} of {k} is outside the {len(classes)} classes of {file}")
            if classes and items[k].get("primer_caption"):
                prompts[classes[label]] = items[k]["primer_caption"]
    if prompts_too and train:  # as one caption more, of which the loader draws
        for i, (caption, label) in enumerate(zip(train[0].captions, train[0].labels)):
            several = [caption] if isinstance(caption, str) else caption
            train[0].captions[i] = [*several, prompts[classes[label]]] if classes else several
    retrieval = not classes or not any(v.get("primer_caption") for v in test[2].values())
    empty = Files(root / name, None, [], [], [])
    return Dataset(name, "retrieval" if retrieval else "classification", classes, [prompts[c] for c in classes],
                   train[0] if train else empty, test[0])  # fmt: skip


def fomo_in_flux(root, names=None, heldout=None, pool=(), prompts_too=False):
    """World from FoMo-in-Flux's layout. names: the datasets, by default all that are both annotated and there.
    heldout: those never trained on, by default the paper's 22. pool: those whose training split is the pretraining
    pool. prompts_too: a training picture's class prompt is one of its captions, for captions that name no class.
    FileNotFoundError or ValueError in a sentence if anything is missing, torn or not text."""
    root = Path(root).resolve()
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: --data names the one that holds <DATASET>/ or <DATASET>.tar")
    info = next((p for p in (root / "00_info", root.parent / "00_info") if p.is_dir()), None)
    if info is None:
        raise FileNotFoundError(f"{root / '00_info'} is not there: the annotations, <DATASET>_train.json and so on")
    annotated = {m[1] for p in info.glob("*.json") if (m := re.fullmatch(r"(.+)_(?:test|val)(?:_224)?", p.stem))}
    there = sorted(n for n in annotated if n and (root / n).is_dir() or (root / f"{n}.tar").is_file())
    names, heldout = list(names or there), HELD_OUT if heldout is None else heldout
    for name in [*names, *pool, *(heldout if heldout is not HELD_OUT else ())]:
        if name not in there:
            raise FileNotFoundError(f"no dataset {name} in {root}; there are: {', '.join(there) or 'none'}")
    wanted = tqdm(sorted({*names, *pool}), "reading", leave=False, disable=None)
    sets = {name: _read_dataset(root, info, name, prompts_too) for name in wanted}
    world = World([sets[n] for n in names if n not in heldout], [sets[n] for n in names if n in heldout])
    if pool:
        world.pool = Concat(sets[n].train for n in dict.fromkeys(pool))
        if not len(world.pool):
            raise ValueError(f"the pool, {', '.join(pool)}, has no training sample")
    for d in world.adaptation:
        if len(d.train) and not d.classes:
            raise ValueError(f"{info} has no class names for {d.name}, so a stream cannot name its concepts")
    for role, group in (("to adapt to", world.adaptation), ("held out", world.heldout)):
        if not group:
            raise ValueError(f"no dataset of {root} is {role}; --heldout names those held out of: {', '.join(names)}")
    return world


def fingerprint(split):
    """Hash of what a split holds: captions, and pixels in memory or paths and sizes of files on disk."""
    digest = hashlib.sha256(json.dumps(split.captions).encode())
    for part in getattr(split, "splits", [split]):
        files = None if isinstance(part, Pictures) else [part.paths, [part.size(i) for i in range(len(part))]]
        digest.update(part.pixels.tobytes() if files is None else json.dumps(files).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------- streams


def concepts(datasets):
    """All (dataset name, class name) that have a training sample, the unit of a stream (sec. 3.3)."""
    return [(d.name, d.classes[c]) for d in datasets for c in np.unique(d.train.labels)]


def order(concepts, how="random", seed=0):
    """The concepts in an order; "random" is a pure function of the seed."""
    if how != "random":
        raise ValueError(f"unknown order {how!r}; there is: random")
    return [concepts[i] for i in np.random.default_rng((seed, 2)).permutation(len(concepts))]


def tasks(concepts, n):
    """n contiguous chunks, the first len mod n of them one concept longer."""
    if not concepts:
        raise ValueError("the stream is empty: no concept of a dataset to adapt to has a training sample")
    if not 1 <= n <= len(concepts):
        raise ValueError(f"{len(concepts)} concepts cannot make {n} tasks; take 1 to {len(concepts)} (--tasks)")
    size, longer = divmod(len(concepts), n)
    ends = [i * size + min(i, longer) for i in range(n + 1)]
    return [concepts[a:b] for a, b in pairwise(ends)]


def read_stream(path):
    """JSON list of "DATASET+++class name" -> list of (dataset name, class name)."""
    stream = []
    for entry in _read_json(path, list):
        if not isinstance(entry, str) or "+++" not in entry:
            raise ValueError(f"{path}: {entry!r:.80} is not of the form DATASET+++class name")
        stream.append(tuple(entry.split("+++", 1)))
    return stream


def write_stream(concepts, path):
    aside = Path(f"{path}.part")
    aside.write_text(json.dumps(["+++".join(c) for c in concepts], indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(aside, path)


# ---------------------------------------------------------------------------------------------------------- mixture


@lru_cache(8)  # saves time, holds no state: the same key is always the same permutation
def _permutation(n, *key):
    return np.random.default_rng(key).permutation(n)


def split_batch(batch_size, ratios):
    """How many of a batch come from P, D and B: the floor of each share, the rest dealt out in that order among those
    that have one. 512 at .33/.34/.33 is 169/175/168."""
    counts = [math.floor(round(batch_size * r, 6)) for r in ratios]
    shares = [i for i in range(3) if ratios[i] > 0]
    for i in range(batch_size - sum(counts)):
        counts[shares[i % len(shares)]] += 1
    return counts


class Mixture:
    """S_t = lambda_P P + lambda_D D_t + lambda_B B (sec. 3.1), stateless: a batch's ids are a pure function of
    (seed, task, step). Each source is passed through in permutations, so nothing repeats before all was seen.

    chunks: T lists of (dataset name, class name); ratios: lambda of P, D, B; replay: how many samples of the pool are
    at hand, drawn once by the seed, 0 for all. B is no copy: in stream order the samples of all tasks before t are one
    range. With nothing in B, D takes its share; with ratios[0] = 0 no pool is needed."""

    def __init__(self, world, chunks, batch_size, ratios=(0.33, 0.34, 0.33), replay=0, seed=0):
        if len(ratios) != 3 or min(ratios) < 0 or not abs(sum(ratios) - 1) <= 1e-6:
            raise ValueError(f"the mixture P/D/B is three shares that sum to 1, got {'/'.join(map(str, ratios))}")
        self.batch_size, self.ratios, self.seed = batch_size, ratios, seed
        groups = {}
        for d in world.adaptation:
            by_class = np.argsort(d.train.labels, kind="stable")
            found, starts = np.unique(d.train.labels[by_class], return_index=True)
            for c, ids in zip(found, np.split(by_class, starts[1:])):
                groups[d.name, d.classes[c]] = ids
        self.samples, self.ends = [], [0]  # in stream order; task t owns samples[ends[t] : ends[t + 1]]
        stream = [c for chunk in chunks for c in chunk]
        if len(set(stream)) < len(stream):
            twice = Counter(stream).most_common(1)[0][0]
            raise ValueError(f"the stream names {'+++'.join(twice)} more than once; tasks must be disjoint")
        names = sorted(d.name for d in world.adaptation)
        for concept in stream:
            if concept[0] not in names:
                raise ValueError(f"the stream names the dataset {concept[0]}; those to adapt to: {', '.join(names)}")
            if concept not in groups:
                raise ValueError(f"stream names {'+++'.join(concept)}, and {concept[0]} has no training sample of it")
        for chunk in chunks:
            self.samples += [(name, int(i)) for name, c in chunk for i in groups[name, c]]
            self.ends.append(len(self.samples))
        size = len(world.pool) if world.pool is not None else 0
        self.pool = _permutation(size, seed, 3)[: replay or size]
        if ratios[0] > 0 and size == 0:
            raise ValueError("the mixture asks for pretraining data, and there is no pool: name it, or mix 0/D/B")

    def counts(self, task):
        """Samples of P, D_t and B in a batch of this task."""
        p, d, b = self.ratios
        return split_batch(self.batch_size, (p, d, b) if task > 0 else (p, d + b, 0))

    def ids(self, task, step):
        """-> batch_size pairs (source, index): "pool" or a dataset's name, and the index in its training split."""
        first, last = self.ends[task], self.ends[task + 1]
        ranges = [(0, len(self.pool)), (first, last), (0, first)]
        batch = []
        for source, (n, (a, b)) in enumerate(zip(self.counts(task), ranges)):
            for place in range(step * n, (step + 1) * n):
                i = a + int(_permutation(b - a, self.seed, 4, source, task, place // (b - a))[place % (b - a)])
                batch.append(("pool", int(self.pool[i])) if source == 0 else self.samples[i])
        return batch


# ---------------------------------------------------------------------------------------------------------- batches


def train_crop(image, size):
    """RandomResizedCrop as in sec. 3.2 and R, without flip, drawn from torch's generator -> uint8 [3, S, S]. In
    functional form, since the transform's own bookkeeping costs more than the crop of a small picture."""
    box = v2.RandomResizedCrop.get_params(image, (0.9, 1.0), (3 / 4, 4 / 3))
    crop = v2.functional.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
    return v2.functional.pil_to_tensor(crop)


def test_crop(image, size):
    """Resize of the short side, then the centre -> uint8 [3, S, S]."""
    image = v2.functional.resize(image, [size], InterpolationMode.BICUBIC, antialias=True)
    return v2.functional.pil_to_tensor(v2.functional.center_crop(image, [size, size]))


def _pil(image):
    return image if isinstance(image, Image.Image) else Image.fromarray(image)


class _Lazily(torch.utils.data.Dataset):
    """make(item) for each of items, in a worker. An error travels as a value, so that it arrives in one piece."""

    def __init__(self, make, items):
        self.make, self.items = make, items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        try:
            return self.make(self.items[i])
        except (ValueError, OSError) as e:
            return e


def _batches(make, items, workers):
    own = torch.Generator()  # else it draws from torch's global one
    fork = "fork" if workers and "fork" in multiprocessing.get_all_start_methods() else None  # `make` does not pickle
    workers = workers if fork else 0
    for batch in DataLoader(_Lazily(make, items), batch_size=None, num_workers=workers, generator=own,
                            multiprocessing_context=fork):  # fmt: skip
        if isinstance(batch, Exception):
            raise batch
        yield batch


def loader(world, mixture, task, steps, image_size, workers=0, start=0, part=(0, 1)):
    """Training batches of one task, steps start to steps - 1: (images uint8 [B, 3, S, S], captions list[str]).
    A sample's crop and caption are a pure function of (seed, task, step, slot), whatever the number of workers."""
    splits = {d.name: d.train for d in world.adaptation} | {"pool": world.pool}

    def make(step):
        images, captions = [], []
        with torch.random.fork_rng(devices=[]):
            chance = np.random.default_rng((mixture.seed, 5, task, step)).integers(2**63, size=(mixture.batch_size, 2))
            mine = slice(*(mixture.batch_size * rank // part[1] for rank in (part[0], part[0] + 1)))
            slots = list(zip(mixture.ids(task, step), chance.tolist()))[mine]
            for (source, i), (crop_seed, which) in slots:
                torch.default_generator.manual_seed(crop_seed)
                images.append(train_crop(_pil(splits[source].image(i)), image_size))
                caption = splits[source].captions[i]
                captions.append(caption if isinstance(caption, str) else caption[which % len(caption)])
        return torch.stack(images), captions

    return _batches(make, range(start, steps), workers)


def test_loader(split, ids, image_size, batch_size=256, workers=0):
    """The test pictures `ids` of a split, in order: uint8 [B, 3, S, S]."""
    ids = list(ids)

    def make(a):
        return torch.stack([test_crop(_pil(split.image(i)), image_size) for i in ids[a : a + batch_size]])

    return _batches(make, range(0, len(ids), batch_size), workers)
