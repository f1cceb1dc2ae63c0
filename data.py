"""Data for continual pretraining: captioned pictures, streams of concepts, mixed batches.

Roth et al. 2024 (arXiv 2408.14471), sec. 3: FoMo-in-Flux's layout, its streams, the mixture of
update data D, buffer B and pretraining pool P; people's class folders, tables and shards; and a
small drawn world, in which all fits into minutes. This file stands alone:

    import data
    world = data.toy(seed=0)  # or data.open_world("my/folder")
    stream = data.order(data.concepts(world.adaptation), "random", seed=0)
    mixture = data.Mixture(world, data.tasks(stream, 8), batch_size=128)
    for images, captions in data.loader(world, mixture, task=0, steps=3, image_size=32):
        print(images.shape, captions[0])  # torch.Size([128, 3, 32, 32]) and a sentence
"""

import ast
import csv
import gc
import glob
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import re
import signal
import tarfile
import textwrap
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

# ------------------------------------------------------------------------------------------- splits

_nfc = partial(unicodedata.normalize, "NFC")  # an accent may be one character or two on disks


class Texts:
    """Texts or lists of texts, as one block of JSON and offsets, which processes share uncopied."""

    def __init__(self, items=(), block=None, spans=None):
        if block is None:
            dump = json.JSONEncoder(ensure_ascii=False).encode
            lines = [dump(item).encode("utf-8", "surrogatepass") for item in items]
            ends = np.cumsum([0, *map(len, lines)])
            block = np.frombuffer(b"".join(lines), np.uint8)
            spans = np.stack([ends[:-1], ends[1:]], axis=1)
        self.block = block  # uint8 [bytes]
        self.spans = spans  # int64 [N, 2]: item i is block[spans[i, 0] : spans[i, 1]]

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, i):
        start, end = self.spans[i].tolist()
        return json.loads(self.block[start:end].tobytes().decode("utf-8", "surrogatepass"))

    def __eq__(self, other):
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))


class Split:
    """Captioned pictures with a class each, as columns, which processes share without a copy.

    stores: where pictures lie: paths of folders and tars, pixels as uint8 [M, H, W, 3], datasets of
    torchvision's. where: int64 [N, 3], of each picture its store, its place there (offset in a tar,
    -1 in a folder, else its number) and its bytes in a tar (-1 of one stored with holes, whose
    place is its header's). captions: a str each, or a list of which training draws one."""

    def __init__(self, stores=(), where=(), labels=(), captions=(), paths=None):
        self.stores = list(stores)
        self.where = np.asarray(where, np.int64).reshape(-1, 3)
        self.labels = np.asarray(labels, np.int64)
        self.captions = captions if isinstance(captions, Texts) else Texts(captions)
        self.paths = paths if isinstance(paths, Texts) else Texts(paths or [""] * len(self.labels))

    def __len__(self):
        return len(self.labels)

    def image(self, i):
        """Picture i: a PIL image or uint8 [H, W, 3]; ValueError names a broken one."""
        number, at, size = self.where[i].tolist()
        store = self.stores[number]
        if isinstance(store, np.ndarray):
            return store[at]
        name = os.path.join(store if isinstance(store, str) else "", self.paths[i] or str(at))
        try:
            if not isinstance(store, str):
                return store[at][0]
            with open(name if at < 0 else store, "rb", buffering=0) as f:
                f.seek(max(at, 0))
                if at < 0 or size >= 0:
                    return decode(f.read(size if at >= 0 else -1))
                with tarfile.open(fileobj=f) as tar:  # it fills the holes
                    return decode(tar.extractfile(tar.next()).read())
        except Exception as e:  # decoders of torn files raise whatever they stumble over
            fault = str(e).partition(" <")[0]  # without the address of a buffer
            raise ValueError(f"{name} is no picture that decodes ({fault}): replace it") from e

    def take(self, ids):
        """The samples `ids`, as another split."""
        captions, paths = (Texts((), t.block, t.spans[ids]) for t in (self.captions, self.paths))
        return Split(self.stores, self.where[ids], self.labels[ids], captions, paths)

    def arrays(self):
        return {"where": self.where, "labels": self.labels, "captions": self.captions.block,
                "captions_at": self.captions.spans, "paths": self.paths.block,
                "paths_at": self.paths.spans}  # fmt: skip

    @classmethod
    def of(cls, stores, arrays):
        """The split that arrays() are of."""
        texts = (Texts((), arrays[name], arrays[f"{name}_at"]) for name in ("captions", "paths"))
        return cls(stores, arrays["where"], arrays["labels"], *texts)

    def stamps(self):
        """int64 [N, 2]: size and time of change of each file; of a tar's member its size and 0."""
        stamps = self.where[:, [2, 2]] * [1, 0]
        for i in np.flatnonzero(self.where[:, 1] < 0).tolist():
            stat = os.stat(os.path.join(self.stores[self.where[i, 0]], self.paths[i]))
            stamps[i] = stat.st_size, stat.st_mtime_ns
        return stamps

    def fingerprint(self):
        """Hash of labels, captions, paths, pixels in memory, and the files' sizes and times."""
        digest = hashlib.sha256()
        for part in (*self.arrays().values(), self.stamps(), *self.stores):
            if isinstance(part, np.ndarray):
                digest.update(hashlib.sha256(np.ascontiguousarray(part)).digest())
            elif isinstance(part, str) and os.path.isfile(part):  # a tar
                digest.update(f"{os.stat(part).st_size} {os.stat(part).st_mtime_ns}".encode())
        return digest.hexdigest()

    def keys(self, sized=True):
        """int64 [N] that tell samples apart, and stay theirs when others come or go: eight bytes of
        the hash of path and, if sized, size; without paths, the numbers."""
        if not len(self) or not self.paths[0]:
            return self.where[:, 1]
        texts = map("{} {}".format, map(_nfc, self.paths), (self.stamps()[:, 0] * sized).tolist())
        raws = (text.encode("utf-8", "surrogatepass") for text in texts)
        digests = (hashlib.blake2b(raw, digest_size=8).digest() for raw in raws)
        return np.frombuffer(b"".join(digests), "<i8")


def joined(splits):
    """Splits one after the other, as one."""
    splits = list(splits)
    if len(splits) == 1:
        return splits[0]
    columns = {name: [] for name in Split().arrays()}
    stores = []
    for split in splits:
        shift = {"where": [len(stores), 0, 0]}
        shift |= {f"{n}_at": sum(map(len, columns[n])) for n in ("captions", "paths")}
        for name, array in split.arrays().items():
            columns[name].append(array + np.int64(shift[name]) if name in shift else array)
        stores += split.stores
    return Split.of(stores, {name: np.concatenate(parts) for name, parts in columns.items()})


def numbered(store, labels, captions):
    """Split of all that a store holds: pixels, uint8 [N, H, W, 3], or a dataset of torchvision."""
    numbers = np.arange(len(labels))
    return Split([store], np.stack([0 * numbers, numbers, 0 * numbers], 1), labels, captions)


@dataclass
class Dataset:
    name: str
    kind: str  # "classification" (top-1 accuracy) or "retrieval" (R@5)
    classes: list[str]
    prompts: list[str]  # one a class: what the zero-shot classifier encodes
    train: Split
    test: Split
    account: dict = field(default_factory=dict)  # what was left out or is odd, see _mention


@dataclass
class World:
    adaptation: list[Dataset]  # the stream is made of these; KA is the mean over them
    heldout: list[Dataset]  # never trained on; ZS is the mean over them; may be empty
    pool: Split = None  # what theta_0 was trained on, for replay
    notes: list[str] = field(default_factory=list)  # the accounts of all sources, to print
    sources: list = ()  # what open_world opened

    @property
    def sets(self):
        return self.adaptation + self.heldout


# -------------------------------------------------------------- a small world, drawn on the spot
# FoMo-in-Flux in miniature: theta_0's pool holds all held-out classes, a quarter of the others.

COLOURS = {
    "red": (215, 40, 40), "green": (40, 160, 60), "blue": (45, 75, 215), "yellow": (235, 215, 50),
    "purple": (130, 45, 165), "orange": (240, 140, 30), "cyan": (60, 205, 215),
    "pink": (245, 130, 190), "white": (245, 245, 245), "black": (15, 15, 15),
}  # fmt: skip
*INKS, _, _ = COLOURS
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
HOURS = [*DIGITS[1:], "ten", "eleven", "twelve"]
CENTRES = [((k % 3) / 3 + 1 / 6, (k // 3) / 3 + 1 / 6) for k in range(9)]  # shares of the picture
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
WINDS = ["up", "up and right", "right", "down and right", "down", "down and left", "left",
         "up and left"]  # fmt: skip
SIZE = 32
CANVAS = 64  # drawn at twice the size, then averaged down
_font = lru_cache(ImageFont.load_default)  # of a size


def _arc(radius, start, stop, n=24):
    angles = np.linspace(start, stop, n) * math.pi / 180
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)


TURN = np.linspace(0, 2 * math.pi, 32)
SHAPES = {  # outlines in the unit circle, y downwards
    "circle": _arc(0.9, 0, 360),
    "square": _arc(1.0, 45, 405, 5)[:-1],
    "triangle": _arc(1.0, -90, 270, 4)[:-1],
    "star": _arc(1.0, -90, 270, 11)[:-1] * np.resize((1.0, 0.42), 10)[:, None],
    "cross": np.array([(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3),
                       (-1, 1), (-3, 1), (-3, -1), (-1, -1)]) / 3.1,
    "ring": np.concatenate([_arc(0.95, 0, 360), _arc(0.5, 360, 0)]),
    "heart": np.stack([16 * np.sin(TURN) ** 3, -(13 * np.cos(TURN) - 5 * np.cos(2 * TURN)
                       - 2 * np.cos(3 * TURN) - np.cos(4 * TURN))], axis=1) / 16,
    "moon": np.concatenate([_arc(0.95, 60, 300), _arc(0.8, 290, 70) + (0.45, 0)]),
    "diamond": np.array([(0, -1), (0.6, 0), (0, 1), (-0.6, 0)]),
    "arrow": np.array([(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3),
                       (-1, 0.3)]),
}  # fmt: skip


class Picture:
    """A drawing on a ground. Methods from glyph() on draw a class and return ways to name it."""

    def __init__(self, rng):
        self.rng = rng
        self.ground = self.choose(["white", "black"])
        self.canvas = Image.new("RGB", (CANVAS, CANVAS), self.rgb(self.ground))
        self.draw = ImageDraw.Draw(self.canvas)

    def choose(self, options, but=()):
        options = [o for o in options if o not in but]
        return options[self.rng.integers(len(options))]

    def ink(self, *but):
        return self.choose(INKS, but)

    def rgb(self, colour):
        drift = self.rng.integers(-14, 15, 3).tolist()
        return tuple(min(max(c + d, 0), 255) for c, d in zip(COLOURS[colour], drift))

    def shape(self, name, ink, x=0.5, y=0.5, radius=0.3, jitter=0.04, turn=0, outline=False):
        """x, y, radius as shares of the picture; turn in degrees, give or take 8."""
        angle = math.radians(turn + self.rng.uniform(-8, 8))
        x += self.rng.uniform(-jitter, jitter)
        y += self.rng.uniform(-jitter, jitter)
        cos = math.cos(angle)
        sin = math.sin(angle)
        turned = SHAPES[name] @ [[cos, sin], [-sin, cos]]
        points = turned * radius * self.rng.uniform(0.9, 1.1) + (x, y)
        points = (points * CANVAS).flatten().tolist()  # x, y, x, y, ...
        if outline:
            self.draw.line(points + points[:2], self.rgb(ink), width=4, joint="curve")
        else:
            self.draw.polygon(points, self.rgb(ink))

    def glyph(self, name):
        ink = self.ink()
        number = name in DIGITS
        text = str(DIGITS.index(name)) if number else name
        font = _font(int(self.rng.integers(44, 56)))
        x, y = (CANVAS * (0.5 + self.rng.uniform(-0.05, 0.05)) for _ in range(2))
        self.draw.text((x, y), text, self.rgb(ink), font, anchor="mm",
                       stroke_width=int(self.rng.integers(1, 3)),
                       stroke_fill=self.rgb(ink))  # fmt: skip
        what = "digit" if number else "letter"
        other = "the number" if number else "a capital"
        return f"the {what} {name}", f"{other} {name}", f"a {ink} {what} {name}"

    def texture(self, name):
        ink = self.ink()
        side = np.arange(CANVAS) + self.rng.integers(16)
        x, y = np.meshgrid(side, side)
        mask = TEXTURES[name](x, y, self.rng.integers(12, 19)) * np.uint8(255)
        self.canvas.paste(self.rgb(ink), mask=Image.fromarray(mask))
        return f"a pattern of {name}", f"a texture of {name}", f"{name} in {ink} and {self.ground}"

    def sketch(self, shape):
        ink = self.ink()
        self.shape(shape, ink, radius=0.36, outline=True)
        return f"a sketch of a {shape}", f"the outline of a {shape}", f"a {shape} in {ink} lines"

    def coloured(self, name):
        ink, shape = name.split()
        self.shape(shape, ink, radius=0.36)
        return f"a {name}", f"a {name} on {self.ground}", f"a {shape} that is {ink}"

    def beside(self, name):
        left, right = name.split(" left of a ")
        for x, thing in ((0.27, left), (0.73, right)):
            ink, shape = thing.split()
            self.shape(shape, ink, x=x, radius=0.23)
        return f"a {name}", f"a {right} right of a {left}", f"a {left} and a {right}"

    def counts(self, name):
        number, ink, _ = name.split()
        for cell in self.rng.permutation(9)[: DIGITS.index(number)]:
            self.shape("circle", ink, *CENTRES[cell], radius=0.15, jitter=0.02)
        return name, f"a group of {name}", f"{number} dots, all {ink}"

    def flags(self, name):
        left, right = name.split(" and ")
        edge = int(CANVAS * self.rng.uniform(0.4, 0.6))
        self.draw.rectangle((0, 0, edge, CANVAS), self.rgb(left))
        self.draw.rectangle((edge, 0, CANVAS, CANVAS), self.rgb(right))
        return f"a flag of {name}", f"a {left} and {right} flag", f"a flag, {left} then {right}"

    def places(self, name):
        dot, cell = name.split(" at the ")
        ink, _ = dot.split()
        k = CELLS.index(cell)
        self.shape("circle", ink, *CENTRES[k], radius=0.18, jitter=0.03)
        return f"a {name}", f"in the {cell} a {ink} dot", f"a {name} on {self.ground}"

    def clocks(self, hour):
        ink = self.ink()
        centre = CANVAS / 2
        angle = math.radians(30 * (HOURS.index(hour) + 1) - 90 + self.rng.uniform(-6, 6))
        self.draw.ellipse((4, 4, CANVAS - 4, CANVAS - 4), outline=self.rgb(ink), width=3)
        tip = (centre + 24 * math.cos(angle), centre + 24 * math.sin(angle))
        self.draw.line((centre, centre, *tip), self.rgb(ink), width=7)
        return f"a clock at {hour}", f"a {ink} clock at {hour}", f"{hour} o'clock"

    def frames(self, name):
        shape, frame = name.split(" in a ")
        colour = frame.split()[0]
        self.draw.rectangle((0, 0, CANVAS - 1, CANVAS - 1), outline=self.rgb(colour), width=9)
        ink = self.ink(colour)
        self.shape(shape, ink, radius=0.28)
        return f"a {name}", f"a {ink} {name}", f"a {frame} around a {shape}"

    def arrows(self, wind):
        ink = self.ink()
        self.shape("arrow", ink, radius=0.38, turn=45 * WINDS.index(wind) - 90)
        pointing = f"arrow pointing {wind}"
        return f"an {pointing}", f"a {ink} {pointing}", f"an arrow that points {wind}"

    def above(self, name):
        top, bottom = name.split(" above a ")
        high = f"{self.ink()} {top}"
        low = f"{self.ink()} {bottom}"
        self.shape(top, high.split()[0], y=0.26, radius=0.22)
        self.shape(bottom, low.split()[0], y=0.74, radius=0.22)
        return f"a {high} above a {low}", f"a {low} below a {high}", f"a {high} over a {low}"


def _pairs(first, second, pattern):
    return [pattern.format(a, b) for a in first for b in second if a != b]


_SIX = list(SHAPES)[:6]
_SCENES = _pairs([f"{c} {s}" for c, s in zip(INKS, SHAPES)],
                 [f"{c} {s}" for c, s in zip(INKS[::-1], SHAPES)], "{} left of a {}")  # fmt: skip
TOY = {  # name: classes, prompt, drawing
    "DIGITS": (DIGITS, "the digit {}.", Picture.glyph),
    "TEXTURES": (list(TEXTURES), "a pattern of {}.", Picture.texture),
    "SKETCHES": (list(SHAPES), "a sketch of a {}.", Picture.sketch),
    "SHAPES": ([f"{c} {s}" for c in INKS for s in SHAPES], "a {}.", Picture.coloured),
    "SCENES": (_SCENES, "a {}.", Picture.beside),
    "LETTERS": (list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), "the letter {}.", Picture.glyph),
    "COUNTS": ([f"{n} {c} dots" for n in DIGITS[2:7] for c in INKS[:6]], "{}.", Picture.counts),
    "FLAGS": (_pairs(INKS[:7], INKS[:7], "{} and {}"), "a flag of {}.", Picture.flags),
    "PLACES": (_pairs(INKS[:5], CELLS, "{} dot at the {}"), "a {}.", Picture.places),
    "CLOCKS": (HOURS, "a clock at {}.", Picture.clocks),
    "FRAMES": (_pairs(_SIX, INKS[:6], "{} in a {} frame"), "a {}.", Picture.frames),
    "ARROWS": (WINDS, "an arrow pointing {}.", Picture.arrows),
    "STACKS": (_pairs(_SIX, _SIX, "{} above a {}"), "a {}.", Picture.above),
}
TOY_RETRIEVAL = ("SCENES", "STACKS")  # the others are for classification
OPENINGS = ("", "", "", "here is ", "image of ", "picture: ")


def _draw(name, drawing, classes, n, seed, part):
    """n noisy pictures of the classes in turn -> uint8 [n, 32, 32, 3], labels, captions."""
    rng = np.random.default_rng((seed, zlib.crc32(f"{name} {part}".encode())))
    labels = np.arange(n) % len(classes)
    pixels = np.empty((n, SIZE, SIZE, 3), np.uint8)
    captions = []
    for i, label in enumerate(labels):
        p = Picture(rng)
        ways = drawing(p, classes[label])
        pixels[i] = np.asarray(p.canvas.reduce(CANVAS // SIZE))
        opening = "" if name in TOY_RETRIEVAL else p.choose(OPENINGS)
        captions.append((opening + p.choose((ways[0], *ways))).replace("a orange", "an orange"))
    noise = 8 * rng.standard_normal(pixels.shape, np.float32)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8), labels, captions


def toy(seed=0, train=300, test=250):
    """World of 8 + 5 drawn datasets of `train` and `test` pictures, a function of these alone."""
    sets = []
    pool = []
    for name, (classes, prompt, drawing) in TOY.items():
        kind = "retrieval" if name in TOY_RETRIEVAL else "classification"
        splits = [numbered(*_draw(name, drawing, classes, n, seed, part))
                  for n, part in ((train, "train"), (test, "test"))]  # fmt: skip
        prompts = [prompt.format(c).replace("a orange", "an orange") for c in classes]
        sets.append(Dataset(name, kind, classes, prompts, *splits))
        if len(sets) <= 5:  # held out
            pool.append(splits[0])
        else:  # other pictures of every fourth class
            shuffled = np.random.default_rng((seed, len(name), 1)).permutation(len(classes))
            known = shuffled[: len(classes) // 4]
            few = [classes[k] for k in known]
            pixels, labels, captions = _draw(name, drawing, few, train * 3 // 4, seed, "pool")
            pool.append(numbered(pixels, known[labels], captions))
    note = f"a drawn world, 8 + 5 datasets of {train:,} training and {test:,} test pictures"
    return World(sets[5:], sets[:5], joined(pool), [note])


# ------------------------------------------------------------------------------- pictures in files

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")  # none that runs programs
SUFFIXES = tuple(s for s, f in Image.registered_extensions().items() if f in FORMATS)
BESIDE = ("classnames.json", "classnames.txt", "metadata.csv", "metadata.jsonl")  # pictures, read


def decode(raw):
    """A picture file's bytes -> uint8 [H, W, 3]. A picture that is turned by its EXIF stays so."""
    image = Image.open(BytesIO(raw), formats=FORMATS)
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers, of no known range")
    if image.mode.startswith("I"):  # 16 bits: convert() would clip, not scale
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _is_hidden(name):  # a system's, not the user's
    return name.startswith(".") or name.lower() in ("@eadir", "__macosx", "thumbs.db")


def _is_picture(name):
    return name.lower().endswith(SUFFIXES) and not _is_hidden(name)


def _mention(account, what, examples):
    """Count what a user has to know: account[what] becomes how often, and the first three."""
    if len(examples):
        n, *first = account.get(what, [0])
        account[what] = [n + len(examples), *[*first, *examples][:3]]


def _pictures_below(folder, account):
    """Sorted paths of the pictures within a folder, each once, whatever links lead to it."""
    found = []
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        within = os.path.relpath(place, folder).removeprefix(".")
        if os.path.realpath(place) in seen:
            _mention(account, "folders read under another name", [within])
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders.sort(key=lambda name: (os.path.islink(os.path.join(place, name)), name))
        hidden = [name for name in (*folders, *files) if _is_hidden(name)]
        _mention(account, "hidden or system files and folders", hidden)
        folders[:] = [name for name in folders if name not in hidden]
        pictures = {name for name in files if _is_picture(name)}
        found += [os.path.join(within, name) for name in pictures]
        stems = {os.path.splitext(name)[0] for name in pictures}
        for name in sorted({*files} - {*pictures, *hidden, *BESIDE}):
            stem, ending = os.path.splitext(name)
            kind = f"{ending.lower()} files"
            if stem in stems and ending in (".txt", ".caption", ".json"):
                kind = "captions beside pictures, not read: name a table instead"
            elif not re.fullmatch(r"\.\w+", ending):
                kind = "names that do not end as a picture's"
            _mention(account, kind, [os.path.join(within, name)])
    return sorted(found)


def in_files(place, paths, labels, captions, members=None):
    """Split of files below a folder, or in a tar of these members. Unicode forms do not matter."""
    stem = f"{_nfc(Path(place).stem)}/"  # a tar holds this folder, what is in it, or a path to it
    longer = next((name for name in members or () if f"/{stem}" in name), "")
    heads = (longer.partition(f"/{stem}")[0] + f"/{stem}", stem, "")
    found = []
    missing = []
    for path in paths:
        forms = [path] if path.isascii() else [unicodedata.normalize("NFD", path), path, _nfc(path)]
        if members is None:
            name = next((form for form in forms if os.path.isfile(f"{place}/{form}")), None)
            found.append((name, -1, 0))
        else:
            name = next((head + forms[-1] for head in heads if head + forms[-1] in members), None)
            found.append((path, *members.get(name, ())))
        missing += [path] * (name is None)
    if missing:
        raise FileNotFoundError(f"{missing[0]!r} and {len(missing) - 1:,} more are not in {place}")
    where = [(0, at, size) for _, at, size in found]
    return Split([str(place)], where, labels, captions, [name for name, _, _ in found])


def tar_members(path):
    """Files of a plain tar: NFC name -> (offset, bytes), with holes (header's place, -1)."""
    found = {}
    links = {}
    try:
        with tarfile.open(path, "r:", ignore_zeros=True) as tar:  # several tars may be one file
            for member in iter(tar.next, None):
                tar.members.clear()  # it would keep them all
                name = _nfc(os.path.normpath(member.name).lstrip("/"))
                if member.isreg():
                    whole = member.offset_data, member.size
                    found[name] = (member.offset, -1) if member.issparse() else whole
                elif member.islnk() or member.issym():
                    folder = os.path.dirname(name) if member.issym() else ""
                    target = os.path.normpath(os.path.join(folder, member.linkname))
                    links[name] = _nfc(target.lstrip("/"))
        if not found:
            raise tarfile.ReadError("no file in it")
    except tarfile.TarError as e:
        raise ValueError(f"{path} is no uncompressed tar, or damaged: {e}; unpack it") from None
    for name, target in links.items():
        for _ in range(40):  # as many as the system follows
            target = links.get(target, target)
        if target in found:
            found[name] = found[target]
    return found


def _indexed(cache, key, files, make):
    """make() -> (JSON, splits), or what the folder `cache` has of it while the files stay so."""
    stamps = [[str(file), os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in files]
    hashes = [hashlib.sha256(json.dumps(x).encode()).hexdigest()[:16] for x in (key, [5, stamps])]
    path = Path(cache or "").expanduser() / f"index-{'-'.join(hashes)}.npz"
    if cache is None or not path.exists():
        gc.disable()  # it would go through millions of live objects again and again
        try:
            head, splits = make()
        finally:
            gc.enable()
        if cache is None:
            return head, splits
        arrays = {f"{k} {n}": a for k, s in enumerate(splits) for n, a in s.arrays().items()}
        head["stores"] = [split.stores for split in splits]
        path.parent.mkdir(parents=True, exist_ok=True)
        for outdated in path.parent.glob(f"index-{hashes[0]}-*.npz"):
            outdated.unlink(missing_ok=True)
        aside = path.with_name(f"{os.getpid()}.part.npz")
        np.savez(aside, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)
        os.replace(aside, path)
        del splits, arrays  # not in memory twice
    with np.load(path) as file:
        arrays = dict(file)
    head = json.loads(arrays.pop("head").tobytes())
    parts = [{n: arrays[f"{k} {n}"] for n in Split().arrays()} for k in range(len(head["stores"]))]
    return head, [Split.of(stores, part) for stores, part in zip(head["stores"], parts)]


# ------------------------------------------------------------------------ FoMo-in-Flux's layout

HELD_OUT = [  # the paper's 22
    "CALTECH101", "CALTECH256", "CARS196", "CIFAR10", "DOMAINNET_QUICKDRAW", "EuroSAT",
    "FashionMNIST", "FLICKR30K", "Food101", "GTSRB", "IMAGENET", "IMAGENET_A", "IMAGENET_D",
    "IMAGENET_R", "IMAGENET_S", "IMAGENET_V2", "MNIST", "MONKEYS10", "MSCOCO", "OXFORDPETS",
    "STL10", "SVHN",
]  # fmt: skip
SPLITS = {  # the first whose pictures are there: those at 224 pixels have the most captions
    "train": ("train_224", "train_mini_224", "train", "train_mini"),
    "test": ("test_224", "val_224", "test", "val"),
}
KINDS = ("default_caption", "synthetic_merged_caption", "synthetic_caption", "primer_caption")
CAPTIONS = dict(zip(("default", "merged", "synthetic", "prompt"), KINDS))  # asked for before KINDS


def read_json(path, kind):
    """What a file holds. ValueError, with its path, where that is not of this kind, as dict."""
    try:
        value = json.loads(Path(path).read_text("utf-8-sig"))
    except ValueError as e:
        raise ValueError(f"{path} is not valid JSON: {e}") from None
    if isinstance(value, kind):
        return value
    raise ValueError(f"{path} holds no JSON {kind.__name__}")


def _annotations(root):
    """What 00_info in a folder, or beside it, has of datasets there: name -> ending -> file."""
    form = re.compile(r"(.+?)_((?:train|train_mini|test|val)(?:_224)?|classnames)\.json")
    own = (root / "00_info").is_dir()
    files = {}
    for path in sorted((root if own else root.parent).glob("00_info/*.json")):
        match = form.fullmatch(_nfc(path.name))
        if match:
            files.setdefault(match[1], {})[match[2]] = path
    files = {name: found for name, found in files.items() if {*found} - {"classnames"}}
    there = {_nfc(path.name.removesuffix(".tar")) for path in root.iterdir()}
    return files if own or there & {*files} else {}


def _fomo_sets(root, options):
    """Datasets of <root>/<DATASET>[.tar], annotated in 00_info beside these or above."""
    files = _annotations(root)
    disk = {_nfc(path.name): path for path in sorted(root.iterdir())}
    sets = {}
    for name in tqdm(sorted(files), "reading", leave=False, disable=None):
        places = [disk.pop(n) for n in (name, f"{name}.tar") if n in disk]
        if places:
            key = [str(root), name, options.captions, options.prompts_too]
            make = partial(_read_fomo, places, files[name], options)
            head, splits = _indexed(options.cache, key, [*files[name].values(), *places], make)
            sets[name] = Dataset(name, *head["dataset"], *splits, head["account"])
    account = {}
    others = [n for n, p in disk.items() if n != "00_info" and (p.is_dir() or p.suffix == ".tar")]
    _mention(account, "datasets annotated but not there", sorted(files.keys() - sets.keys()))
    _mention(account, "folders and tars without annotations", others)
    return sets, [f"{root}: FoMo-in-Flux's layout, {len(sets)} datasets", *_told(account)]


def _read_fomo(places, files, options):
    """One annotated dataset, for the index -> [kind, classes, prompts] and account, splits."""
    classes = [*map(_nfc, read_json(files["classnames"], list))] if "classnames" in files else []
    account = {}
    members = {place: None if place.is_dir() else tar_members(place) for place in places}
    parts = [_read_part(which, files, members, len(classes), account, options) for which in SPLITS]
    (train, own), (test, others) = parts
    prompts = [(others | own).get(label, name) for label, name in enumerate(classes)]
    if options.prompts_too and classes:
        several = ([c] if isinstance(c, str) else c for c in train.captions)
        train.captions = Texts([[*c, prompts[k]] for c, k in zip(several, train.labels)])
    scored = others if len(test) else own  # own if --validation takes from the training split
    kind = "classification" if classes and scored else "retrieval"
    return {"dataset": [kind, classes, prompts], "account": account}, [train, test]


def _read_part(which, files, members, classes, account, options):
    """A split by the first of its annotations whose pictures are all there, {label: prompt}."""
    kinds = [CAPTIONS[options.captions] if which == "train" else KINDS[0], *KINDS]
    absent = None
    for file, place in [(files[s], p) for s in SPLITS[which] if s in files for p in members]:
        items = sorted(read_json(file, dict).items())  # neither the file's order nor the disk's
        try:
            found = [_caption(item, kinds) for _, item in items]
            labels = [int(item["target"]) for _, item in items]
            prompts = {item["target"]: item.get("primer_caption") for _, item in items}
            if labels and not 0 <= min(labels) <= max(labels) < (classes or math.inf):
                raise ValueError(f"targets {min(labels)} to {max(labels)} of {classes} classes")
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{file} does not describe pictures: {e!r}") from None
        paths = [path for path, _ in items]
        captions = [caption for caption, _ in found]
        try:
            split = in_files(place, paths, labels, captions, members[place])
        except FileNotFoundError as e:
            absent = FileNotFoundError(f"{file}: {e}")
            continue
        blank = [path for path, (_, passed) in zip(paths, found) if passed]
        _mention(account, "blank captions, for which the next kind stands in", blank)
        return split, {label: p for label, p in prompts.items() if not _is_blank(p)}
    if absent:
        raise absent
    return Split(), {}


def _is_blank(text):
    """Whether a caption says nothing: no text, white space, or the NaN that a table left."""
    return not isinstance(text, str) or text.strip() in ("", "nan", "NaN")


def _caption(item, kinds):
    """-> the first caption that says something, as str or list; whether one before does not."""
    for n, kind in enumerate(kinds):
        texts = _texts(item.get(kind))
        if texts:
            passed = [kind for kind in kinds[:n] if item.get(kind) is not None]
            return texts if len(texts) > 1 else texts[0], bool(passed)
    raise ValueError(f"the caption is blank in every kind: {item}")


# ------------------------------------------------------------------------- class folders, tables

TEMPLATE = "A photo of a {}."
TRAIN = ("train", "training")
TEST = ("test", "testing", "val", "valid", "validation")  # the first that is there
ALIASES = {"file_name": "filepath", "text": "caption", "label": "class"}  # of a table's columns


def _prompts(template, classes):
    """The template's one {} filled with each class name, underscores as blanks."""
    if template.count("{}") != 1 or template.count("{") != 1:
        raise ValueError(f"the template {template!r} takes one {{}}, as in {TEMPLATE!r}")
    return [template.replace("{}", name.replace("_", " ")) for name in classes]


def _subfolders(root):
    return sorted(p for p in root.iterdir() if p.is_dir() and not _is_hidden(p.name))


def _split_folders(root):
    """root's folders of training and test pictures, by split, where it has them."""
    there = {path.name.lower(): path for path in _subfolders(root)}
    found = {"train": [*filter(there.get, TRAIN)], "test": [*filter(there.get, TEST)]}
    return {which: there[names[0]] for which, names in found.items() if names}


def _folder_sets(root, options):
    """One dataset of root/{train,test}/<class>/* or root/<class>/*, or one of each such folder."""
    roots = []
    nested = any(map(_split_folders, _subfolders(root))) and not _split_folders(root)
    for path in [root, *_subfolders(root)][nested:]:
        names = [name for folder in _subfolders(path) for name in os.listdir(folder)]
        if root not in roots and (_split_folders(path) or any(map(_is_picture, names))):
            roots.append(path)
    if not roots:
        raise FileNotFoundError(f"{root} has no 00_info/, nor class folders, alone or in train/ "
                                "and test/, nor folders with these; or name a .csv, .tsv, .jsonl")
    account = {}
    others = {*_subfolders(root)} - {*roots} if root not in roots else ()
    _mention(account, "folders that hold no folders of pictures", sorted(p.name for p in others))
    note = f"{root}: class folders, {len(roots)} datasets"
    return {_nfc(p.name): _folder_set(p, options) for p in roots}, [note, *_told(account)]


def _folder_set(root, options):
    """Dataset of one folder, by its class folders."""
    account = {}
    rows = []
    titles = {}  # class folder -> class
    places = _split_folders(root) or {None: root}
    for which, place in places.items():
        titles |= {path.name: _nfc(path.name) for path in _subfolders(place)}
        paths = _pictures_below(place, account)
        within = "" if which is None else f"{place.name}/"
        own = [(which, within + p, titles[p.partition("/")[0]], []) for p in paths if "/" in p]
        if not own:
            raise ValueError(f"{place} has no class folders; if it is a class itself, rename it")
        rows += own
        _mention(account, "pictures in no class folder", [p for p in paths if "/" not in p])
    beside = {*_subfolders(root)} - {*places.values()} if None not in places else ()
    _mention(account, "folders beside train and test", sorted(path.name for path in beside))
    names = {}  # class -> another name for it
    folders = sorted({*titles.values()}, key=lambda name: name.zfill(9 * name.isdecimal()))
    for file in [place / name for place in (root, *places.values()) for name in BESIDE[:2]]:
        if file.exists() and file.suffix == ".json":
            names = {_nfc(key): _nfc(name) for key, name in read_json(file, dict).items()}
        elif file.exists():
            lines = _nfc(file.read_text("utf-8-sig")).strip().split("\n")
            fits = len(lines) == len(folders)
            names = dict(zip(folders if fits else lines, map(str.strip, lines)))
        if not names.keys() <= {*folders}:
            unknown = min(names.keys() - {*folders})
            raise ValueError(f"{file}: {len(names)} names, {len(folders)} folders, no {unknown!r}")
    return _dataset(root, rows, options, account, names)


def _dataset(root, rows, options, account, names):
    """Dataset of rows (split, path below root, class, captions); the prompt stands in for captions.
    Without classes it is for retrieval, without splits a fifth of each class is for testing."""
    folder = root if root.is_dir() else root.parent
    name = _nfc(root.name if root.is_dir() else root.stem)
    taught = {row[2] for row in rows if row[0] != "test"}
    untaught = sorted({row[2] for row in rows if taught} - taught)
    if untaught and name not in options.scored:
        _mention(account, "classes in test only, not scored", untaught)
        rows = [row for row in rows if row[2] in taught]
    found = sorted({row[2] for row in rows}, key=str)
    classes = [names.get(c, c or name) for c in found]
    prompts = _prompts(options.template, classes)
    number = {c: k for k, c in enumerate(found)}
    samples = {"train": {}, "test": {}}
    for which, path, c, texts in rows:
        label, captions = samples[which or "train"].setdefault(path, (number[c], []))
        if label != number[c] or all(path in own for own in samples.values()):
            raise ValueError(f"{root}: {path} is of two splits or classes, {found[label]!r}, {c!r}")
        captions += texts or [prompts[label]]
    splits = []
    for own in samples.values():
        captions = [texts[0] if len(texts) == 1 else texts for _, texts in own.values()]
        splits.append(in_files(folder, list(own), [label for label, _ in own.values()], captions))
    forms = Counter(c.lower() for c in classes)
    mute = "classes whose names say nothing to a text tower: give classnames.json or classnames.txt"
    _mention(account, mute, [c for c in classes if re.fullmatch(r"\d+|n\d{8}", c)])
    _mention(account, "classes alike but for case", [c for c in classes if forms[c.lower()] > 1])
    _mention(account, "combinations of labels, a class each", [c for c in classes if "|" in c])
    kind = "retrieval" if found == [None] else "classification"
    dataset = Dataset(name, kind, classes, prompts, *splits, account)
    if any(row[0] is None for row in rows):
        dataset = _validated(dataset, 0.2, options.held)
        _mention(account, "test pictures, about a fifth of each class", [*dataset.test.paths])
    return dataset


def _tables(root):
    """{table: split or None}: the path, or what lies beside pictures as Hugging Face has it."""
    if not root.is_dir():
        return {root: None} if root.suffix.lower() in (".csv", ".tsv", ".jsonl") else {}
    places = [(None, root), *_split_folders(root).items()]
    tables = {place / name: which for which, place in places for name in BESIDE[2:]}
    return {file: which for file, which in tables.items() if file.exists()}


def _table_sets(root, options):
    """One dataset from the tables of a path."""
    account = {}
    rows = []
    folder = root if root.is_dir() else root.parent
    for file, own in _tables(root).items():
        for row in _read_table(file):
            path = os.path.relpath(file.parent / str(row.get("filepath") or "").strip(), folder)
            which = own or (row.get("split") or "").strip().lower() or None
            if root.is_dir() and which is None and path.partition("/")[0].lower() in TRAIN + TEST:
                which = path.partition("/")[0].lower()
            name = None if "class" not in row else _nfc(f"{row['class']}").strip()
            if which not in (*TRAIN, *TEST, None) or name in ("", "None", "nan"):
                raise ValueError(f"{file}: {path} is of split {which!r} and class {name!r}")
            captions = [_texts(row[column]) for column in ("caption", "title") if column in row]
            if len(captions) > 1 and all(captions):
                _mention(account, "titles not read, since there is a caption", [path])
            if captions and not any(captions):
                _mention(account, "blank captions", [path])
            if any(captions) or name is not None:
                rows.append((which, path, name, next(filter(None, captions), [])))
    scored = next((split for split in TEST if split in {row[0] for row in rows}), None)
    for which in {*TEST} - {scored}:
        _mention(account, f"rows of the split {which}", [row[1] for row in rows if row[0] == which])
    if any(row[0] for row in rows):
        rows = [("test" if which in TEST else "train", *row) for which, *row in rows
                if which == scored or which not in TEST]  # fmt: skip
    dataset = _dataset(root, rows, options, account, {})
    return {dataset.name: dataset}, [f"{root}: a table, {len(rows):,} rows"]


def _read_table(file):
    """-> a table's rows: {column: cell}."""
    mark = {".tsv": "\t"}.get(file.suffix.lower(), ",")
    with open(file, encoding="utf-8-sig", newline="") as f:
        try:
            if file.suffix.lower() == ".jsonl":
                rows = [json.loads(line) for line in f if line.strip()]
            else:
                rows = [*csv.DictReader(f, delimiter=mark, strict=True, restkey="more")]
            rows = [{k.strip().lower(): cell for k, cell in row.items()} for row in rows]
        except (ValueError, AttributeError, csv.Error) as e:
            raise ValueError(f"{file} cannot be read as a table in UTF-8: {e}") from None
    rows = [{ALIASES.get(k, k): cell for k, cell in row.items()} for row in rows]
    columns = set().union(*rows) - {"more"}
    rows = [dict.fromkeys(columns) | row for row in rows]
    if "filepath" not in columns or not columns & {"caption", "title", "class"}:
        raise ValueError(f"{file} needs a column filepath, and caption or class; it has {columns}")
    for row in rows:
        if "more" in row:
            raise ValueError(f"{file}: {row['filepath']} has cells beyond the columns; quote texts")
    return rows


def _texts(cell):
    """The captions in a cell: a text, or those in a list, as JSON or Python writes it."""
    starts_a_list = isinstance(cell, str) and cell.lstrip()[:1] == "["
    for read in (json.loads, ast.literal_eval) if starts_a_list else ():
        try:
            cell = read(cell) if isinstance(cell, str) else cell
        except (ValueError, SyntaxError):
            continue  # a text that begins with a bracket
    return [t for t in (cell if isinstance(cell, list) else [cell]) if not _is_blank(t)]


# ------------------------------------------------------------------------ torchvision's formats

PROMPTS = {  # the paper's for torchvision's datasets; those of others are the template's
    "Country211": "A photo representing the country of {}.", "DTD": "A photo of a {} texture.",
    "FGVCAircraft": "A photo of a {}, a type of aircraft.", "SVHN": 'A photo of the number: "{}".',
    "Flowers102": "A photo of a {}, a type of flower.",
    "Food101": "A photo of a {}, a type of food.", "EuroSAT": "A centered satellite photo of a {}.",
    "FashionMNIST": "A black-and-white photo of a {}, a type of clothing.",
    "GTSRB": 'A centered photo of a "{}" traffic sign.',
    "MNIST": 'A black-and-white photo of the number: "{}".',
    "OxfordIIITPet": "A photo of a {}, a type of pet.",
}  # fmt: skip
LABELS = ("targets", "_labels", "labels", "y", "_samples")  # attributes, the first that is there
PARTS = {"Flowers102": ("test", "train"), "OxfordIIITPet": ("trainval", "test")}  # as in the paper
SIGNS = (  # noqa: SIM905 - names for GTSRB's classes, which have numbers alone
    "speed limit 20, speed limit 30, speed limit 50, speed limit 60, speed limit 70, speed limit "
    "80, end of speed limit 80, speed limit 100, speed limit 120, no passing, no passing for "
    "trucks, right of way at the next crossing, priority road, yield, stop, no vehicles, no "
    "trucks, no entry, danger, curve to the left, curve to the right, double curve, bumpy road, "
    "slippery road, road narrows on the right, road works, traffic lights, pedestrians, children "
    "crossing, bicycles crossing, ice or snow, wild animals, end of all limits, turn right ahead, "
    "turn left ahead, straight ahead, straight or right, straight or left, keep right, keep left, "
    "roundabout, end of no passing, end of no passing for trucks"
).split(", ")


def _torchvision_sets(spec, options):
    """Datasets of torchvision's, by its names, in its formats; what is missing is downloaded."""
    root, _, wanted = spec.removeprefix("torchvision:").rpartition("/")
    root = Path(root or Path(options.cache or "~/.cache/fomo") / "torchvision").expanduser()
    sets = {}
    for name in re.split(r"\s*,\s*", wanted):
        try:
            make = getattr(torchvision.datasets, name)
            known = inspect.signature(make).parameters
            parts = [{"train": True}, {"train": False}] if "train" in known else [{}]
            if "split" in known:
                parts = [{"split": split} for split in PARTS.get(name, ("train", "test"))]
            more = {"download": options.download} if "download" in known else {}
            found = [make(str(root), **part, **more) for part in parts]
            classes = getattr(found[0], "classes", None) or getattr(found[0], "categories", None)
            classes = classes or (SIGNS if name == "GTSRB" else "0123456789")
            classes = [re.sub(r"^\d+\.| - .*|-101$", "", c) for c in classes]  # 001.ak47, 0 - zero
            classes = [re.sub("[_/]", " ", c).strip() for c in classes]
            prompts = _prompts(PROMPTS.get(name, options.template), classes)
            splits = []
            for one in found:  # labels are attributes, so that no picture is opened
                labels = next(getattr(one, a) for a in LABELS if hasattr(one, a))
                labels = np.array([k[1] if isinstance(k, tuple) else int(k) for k in labels])
                split = numbered(one, labels, [prompts[k] for k in labels])
                files = [str(file) for file in getattr(one, "_image_files", ())]
                splits.append(split.take(np.argsort(files)) if files else split)
        except Exception as e:  # each of its datasets fails in its own way
            raise FileNotFoundError(f"torchvision's {name} cannot be had below {root}: {e}") from e
        paper = {"OXFORDIIITPET": "OXFORDPETS"} | {n.upper(): n for n in [*HELD_OUT, *TIMES]}
        name = paper.get(name.upper(), name)
        sets[name] = Dataset(name, "classification", classes, prompts, *[*splits, Split()][:2])
        if len(found) == 1:
            sets[name] = _validated(sets[name], 0.3)  # about as in the paper
    return sets, [f"{root}: torchvision's {', '.join(sets)}"]


# ---------------------------------------------------------------------------------------- shards


def _shard_files(pattern):
    """Files of a pattern with {000..331}, *, ? and [], in order."""
    brace = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if brace:
        numbers = (f"{k:0{len(brace[1])}}" for k in range(int(brace[1]), int(brace[2]) + 1))
        return [file for n in numbers for file in _shard_files(pattern.replace(brace[0], n, 1))]
    files = sorted(glob.glob(os.path.expanduser(pattern)))
    if not files:
        raise FileNotFoundError(f"there is no shard {pattern}")
    return [os.path.abspath(file) for file in files]


def _read_shards(files):
    """For the index -> {account}, [split]."""
    where = []
    captions = []
    paths = []
    account = {}
    for number, path in enumerate(tqdm(files, "indexing shards", leave=False, disable=None)):
        samples = {}  # key -> suffix -> place
        for name, place in tar_members(path).items():
            folder, base = os.path.split(name)
            key, _, suffix = base.partition(".")  # at the first dot, as WebDataset has it
            samples.setdefault(os.path.join(folder, key), {})[suffix.lower()] = place
        with open(path, "rb", buffering=0) as f:
            for key, parts in samples.items():
                caption = _shard_caption(f, key, parts, account)
                picture = next((s for s in parts if f".{s}" in SUFFIXES), None)
                for suffix in sorted(parts.keys() - {"txt", "json", picture if caption else None}):
                    what = f".{suffix} files"
                    if suffix == picture:
                        what = "pictures without a caption"
                    elif _is_picture(f"_.{suffix}"):
                        what = "pictures whose key, up to the first dot, another has"
                    _mention(account, what, [f"{key}.{suffix}"])
                if picture and caption:
                    where.append((number, *parts[picture]))
                    captions.append(caption)
                    paths.append(f"{key}.{picture}")
    return {"account": account}, [Split(files, where, np.zeros(len(where)), captions, paths)]


def _shard_caption(shard, key, parts, account):
    """The caption in key.txt or, if that is blank, in key.json; None if there is none."""
    for suffix in [s for s in ("txt", "json") if s in parts]:
        at, size = parts[suffix]
        try:
            said = os.pread(shard.fileno(), size, at).decode("utf-8-sig").strip()
            found = {"caption": said} if suffix == "txt" else dict(json.loads(said))
        except (ValueError, TypeError) as e:
            raise ValueError(f"{shard.name}: {key}.{suffix} holds no caption ({e})") from None
        texts = _texts(found.get("caption"))
        if texts:
            return texts if len(texts) > 1 else texts[0]
        if "caption" not in found:
            _mention(account, "without the key caption", [f"{key}.json has {', '.join(found)}"])
    return None


# ------------------------------------------------------------------------------------- any source


def _told(account):
    """The line of an account that says what was left out, or what else has to be known."""
    told = [f"{n:,} {what} ({', '.join(first) + ', ...' * (n > 3)})"
            for what, (n, *first) in account.items()]  # fmt: skip
    return [f"  {'; '.join(told)}"] if told else []


def _account(d, role):
    """What was taken of a dataset, and what was left out and why: one or two lines."""
    account = dict(d.account)
    train, test = ({*np.unique(split.labels).tolist()} for split in (d.train, d.test))
    if role == "adapted to" and d.kind == "classification" and train:
        for labels, what in ((train - test, "classes in train only, never scored"),
                             (test - train, "classes in test only, scored untaught")):
            _mention(account, what, [d.classes[k] for k in sorted(labels)])
    some = range(0, len(d.train) * bool(d.classes), len(d.train) // 100 + 1)
    if some and all(d.train.captions[i] == d.prompts[d.train.labels[i]] for i in some):
        account["captions that are class prompts"] = [len(d.train), d.prompts[0]]
    counts = f"{len(d.train):,} training and {len(d.test):,} test pictures"
    return [f"{d.name}: {role}, {d.kind}, {counts} in {len(d.classes):,} classes", *_told(account)]


def _validated(dataset, share, held=None):
    """The dataset scored on about this share of the training pictures that no earlier task held, at
    least one and never all of a class. A picture's path decides: others to come change nothing."""
    labels = dataset.train.labels
    hashes = dataset.train.keys(False).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # mixed
    free = fresh([dataset], held)[0]
    free = free[np.argsort(hashes[free], kind="stable")]
    chosen = []
    for label in np.unique(labels):
        own = free[labels[free] == label]
        n = np.clip((hashes[own] < share * 2.0**64).sum(), 1, (labels == label).sum() - 1)
        chosen += own[:n].tolist()
    train = dataset.train.take(np.setdiff1d(np.arange(len(labels)), chosen))
    return replace(dataset, train=train, test=dataset.train.take(np.sort(chosen)))


SOURCES = (  # what a source is -> what reads it; the first that fits counts
    (lambda source: str(source).startswith("torchvision:"), _torchvision_sets),
    (_tables, _table_sets),
    (lambda source: source.is_dir() and _annotations(source), _fomo_sets),
    (lambda source: source.is_dir(), _folder_sets))


def open_world(spec, heldout=None, pool=(), captions="default", prompts_too=False,
               template=TEMPLATE, validation=0.0, download=True, cache=None, held=None,
               before=()):  # fmt: skip
    """World of what --data names: a source or a list of them, each of which may be

    a folder in FoMo-in-Flux's layout; class folders, root/{train,test}/<class>/* or root/<class>/*,
    or a folder of such, with classnames.json or .txt where their names say nothing; a table, .csv,
    .tsv or .jsonl, of columns filepath, caption (a cell may list several) and where known class and
    split, or a folder with such a metadata.csv or .jsonl; or torchvision:NAME,NAME, its files below
    cache/torchvision, torchvision:FOLDER/NAME elsewhere.

    heldout: datasets never trained on, by default the paper's 22. pool: datasets whose training
    split is the pretraining pool, and patterns of WebDataset shards (folder/{000..331}.tar), of
    key.jpg (png, ...) and key.txt, or key.json with "caption". captions: a key of CAPTIONS.
    prompts_too: class prompts are captions, too. template: of prompts where the source has none.
    validation: share of the training splits to score on. cache: folder of the index. held: what
    Mixture.held() gave of a run from the sources `before`, opened too unless spec names one."""
    if captions not in CAPTIONS or not 0 <= validation < 1:
        raise ValueError(f"captions {captions!r}, not {[*CAPTIONS]}, or validation {validation}")
    sources = [str(s) for s in ([spec] if isinstance(spec, (str, os.PathLike)) else spec)]
    if not {*before} & {*sources}:
        there = [s for s in before if s.startswith("torchvision:") or Path(s).expanduser().exists()]
        sources = [*there, *sources]
    fixed = [*map(_nfc, HELD_OUT if heldout is None else heldout)]
    options = SimpleNamespace(captions=captions, prompts_too=prompts_too, template=template,
                              download=download, cache=cache, held=held,
                              scored=[*fixed, *(held["names"] if held else ())])  # fmt: skip
    sets = {}
    world = World([], [], sources=sources)
    for source in sources:
        if not source.startswith("torchvision:"):
            source = Path(source).expanduser().resolve()
        read = next((read for fits, read in SOURCES if fits(source)), None)
        if read is None:
            raise FileNotFoundError(f"{source} is no folder, .csv, .tsv, .jsonl, torchvision:NAME")
        found, notes = read(source, options)
        world.notes += notes
        for name in sets.keys() & found.keys():
            keys = [joined([d.train, d.test]).keys() for d in (sets[name], found[name])]
            if held is None or not np.isin(*keys).all():  # else a copy, perhaps with more pictures
                raise ValueError(f"{source} is the second source of {name}: rename or join them")
        sets |= found
    if validation:
        sets = {n: _validated(d, validation, held) if len(d.train) else d for n, d in sets.items()}
        world.notes.append(f"scores are on {validation:g} of each training split, not trained on")
    return _with_roles(world, sets, fixed, heldout or (), pool, cache)


def _with_roles(world, sets, fixed, asked, pool, cache):
    """Sort datasets into what is adapted to, held out and the pool, and account for them."""
    patterns = [p for p in pool if p.endswith(".tar") or {*p} & {*"*?{"}]
    names = [_nfc(p) for p in pool if p not in patterns]
    for name in [*names, *map(_nfc, asked)]:
        if name not in sets:
            raise FileNotFoundError(f"no dataset {name}, but {', '.join(sets)}; shards end on .tar")
    for name, d in sets.items():
        role = "held out" if name in fixed else "adapted to"
        if not len(d.test):
            role = "pool" if name in names else "left out, for it has no test pictures"
        elif d.kind == "classification" and len(d.classes) == 1:
            raise ValueError(f"{name} holds one class, {d.classes[0]!r}: scoring takes two or more")
        else:
            (world.heldout if name in fixed else world.adaptation).append(d)
        world.notes += _account(d, role)
    if not world.adaptation and not world.heldout:
        raise ValueError("\n".join(["no test pictures: score on --validation .2", *world.notes]))
    parts = [sets[name].train for name in names]
    for pattern in patterns:
        files = _shard_files(pattern)
        head, (split,) = _indexed(cache, files, files, lambda files=files: _read_shards(files))
        note = f"pool: {len(split):,} pictures of {pattern}, {len(files):,} shards"
        world.notes += [note, *_told(head["account"])]
        if not len(split):
            raise ValueError(f"no picture with a caption; {' '.join(world.notes[-2:])}")
        parts.append(split)
    return replace(world, pool=joined(parts) if parts else None)


fomo_in_flux = open_world  # by its most common layout

# --------------------------------------------------------------------------------------- streams

TIMES = {  # of the paper's datasets, oldest first: it says their order in time, not their years
    name: year for year, names in enumerate([
        "FLOWERS102", "CIFAR100", "SUN397", "CUB200", "FGVCAircraft", "BIRDSNAP DTD ZAPPOS50k",
        "MITSTATES PLANTVILLAGE", "AI2DIAGRAMS OPENIMAGES", "CLEVR DSPRITES FRU92 PLACES365 VEG200",
        "PATTERNNET SHAPES3D", ("DOMAINNET_CLIPART DOMAINNET_INFOGRAPH DOMAINNET_PAINTING "
        "DOMAINNET_SKETCH MVTECAD_Adapt MVTECAD_Eval OBJECTNET"), "CLRS ISICMELANOMA MTSD",
        "COUNTRY211 DF20MINI iNATURALIST2021 RESISC45", "ARTBENCH10 DOLLARSTREET SNAKECLEF FSCOCO",
        "OBSC_ANIMALS OBSC_THINGS QUILT SynthCLIP106",
    ]) for name in names.split()
}  # fmt: skip
ORDERS = ("random", "performance", "frequency", "similarity", "time", "dataset")


def fresh(datasets, held=None):
    """Of each dataset the ids of training samples that no earlier task held: see Mixture.held()."""
    origin, index = located(held, datasets)
    return [np.setdiff1d(np.arange(len(d.train)), index[(origin == k) & (index >= 0)])
            for k, d in enumerate(datasets)]  # fmt: skip


def located(held, datasets):
    """Where what earlier tasks held is: int16 [M] dataset, int64 [M] id in its training; or -1."""
    n = 0 if held is None else len(held["keys"])
    origin = np.full(n, -1, np.int16)
    index = np.full(n, -1, np.int64)
    for k, d in enumerate(datasets):
        if n and d.name in held["names"]:
            mine = held["origin"].numpy() == held["names"].index(d.name)
            place = {key: i for i, key in enumerate(d.train.keys().tolist())}
            origin[mine] = k
            index[mine] = [place.get(key, -1) for key in held["keys"].numpy()[mine].tolist()]
    return origin, index


def concepts(datasets, held=None):
    """(dataset, class) names that have a training sample that no earlier task held (sec. 3.3)."""
    found = []
    for d, ids in zip(datasets, fresh(datasets, held)):
        names = [d.classes[c] for c in np.unique(d.train.labels[ids])] if d.classes else []
        if len({*names}) < len(names) or (len(d.train) and not d.classes):
            twice = Counter(names).most_common(1)
            raise ValueError(f"{d.name}: classes without a name or of one {twice}; hold it out")
        found += [(d.name, name) for name in names]
    return found


def order(concepts, how="random", seed=0, key=None, reverse=False):
    """The concepts in an order (sec. 3.3), a pure function of its arguments; reverse: backwards.

    key: one a concept, for "performance" (loss of theta_0, ascending), "frequency" (occurrences in
    the pretraining captions, rarest first, equal class names together), "time" (years; those of one
    are shuffled) and "similarity" (feature vectors; the shortest of the greedy nearest-neighbour
    paths by cosine from all starts, of more than 2,000 from 64). "dataset" shuffles within each."""
    if how not in ORDERS or (key is None and how not in ("random", "dataset")):
        raise ValueError(f"no order {how!r}, or no key for it; orders are {', '.join(ORDERS)}")
    shuffled = np.random.default_rng((seed, 2)).permutation(len(concepts)).tolist()
    sets = list(dict.fromkeys(name for name, _ in concepts))
    names = [name.lower() for _, name in concepts]
    ranks = {
        "random": lambda: shuffled,
        "performance": lambda: np.argsort(np.asarray(key), kind="stable").tolist(),
        "frequency": lambda: sorted(range(len(key)), key=lambda i: (key[i], names[i])),
        "similarity": lambda: _path(torch.as_tensor(np.asarray(key, np.float32)), seed),
        "time": lambda: sorted(shuffled, key=lambda i: key[i]),
        "dataset": lambda: sorted(shuffled, key=lambda i: sets.index(concepts[i][0])),
    }[how]()
    return [concepts[i] for i in (ranks[::-1] if reverse else ranks)]


def _path(features, seed):
    """Greedy nearest-neighbour paths over features [N, D]; the ids along the shortest."""
    unit = torch.nn.functional.normalize(features, dim=1)
    near = unit @ unit.T  # [N, N] cosine: 18,381 concepts take 1.4 GB
    at = torch.arange(len(near))
    if len(at) > 2000:
        at = torch.as_tensor(np.random.default_rng((seed, 6)).permutation(len(near))[:64])
    seen = torch.zeros(len(at), len(near), dtype=torch.bool)
    paths = [at]
    length = torch.zeros(len(at), dtype=torch.float64)
    for _ in range(len(near) - 1):
        seen[torch.arange(len(at)), paths[-1]] = True
        closest, following = near[paths[-1]].masked_fill_(seen, -2).max(dim=1)
        length += 1 - closest.double()
        paths.append(following)
    return torch.stack(paths)[:, int(length.argmin())].tolist()


def occurrences(concepts, captions):
    """How often each concept's class name occurs in the captions, as whole words of any case."""
    names = [tuple(re.findall(r"\w+", name.lower())) for _, name in concepts]
    lengths = {}  # of a name's first word: how long the names are that begin with it
    for words in filter(None, names):
        lengths.setdefault(words[0], set()).add(len(words))
    counts = Counter()
    for caption in tqdm(captions, "counting names in captions", leave=False, disable=None):
        for text in [caption] if isinstance(caption, str) else caption:
            words = re.findall(r"\w+", _nfc(text).lower())
            for i, word in enumerate(words):
                for n in lengths.get(word, ()):
                    counts[tuple(words[i : i + n])] += i + n <= len(words)
    return [counts[words] for words in names]


def times(concepts):
    """When the dataset of each concept appeared, as TIMES has it: the key of the order "time"."""
    unknown = sorted({name for name, _ in concepts if name not in TIMES})
    if unknown:
        raise ValueError(f"the order 'time' knows the paper's datasets, not {', '.join(unknown)}")
    return [TIMES[name] for name, _ in concepts]


def trainable(stream, world):
    """-> the stream without the datasets that are held out or not there, and a note if some are."""
    names = {d.name for d in world.adaptation}
    kept = [concept for concept in stream if concept[0] in names]
    account = {}
    for name, c in stream:
        if name not in names:
            role = "held-out" if name in {d.name for d in world.heldout} else "absent"
            _mention(account, f"concepts of {role} datasets left out", [f"{name}+++{c}"])
    return kept, _told(account)


def tasks(concepts, n):
    """n contiguous chunks, the first len mod n of them one concept longer."""
    if not 1 <= n <= len(concepts):
        raise ValueError(f"{len(concepts)} concepts cannot make {n} tasks (--tasks, --heldout)")
    size, longer = divmod(len(concepts), n)
    ends = [i * size + min(i, longer) for i in range(n + 1)]
    return [concepts[a:b] for a, b in pairwise(ends)]


def read_stream(path):
    """JSON list of "DATASET+++class name" -> list of (dataset name, class name)."""
    entries = read_json(path, list)
    if not all(isinstance(entry, str) and "+++" in entry for entry in entries):
        raise ValueError(f"{path} is no list of DATASET+++class name")
    return [tuple(_nfc(entry).split("+++", 1)) for entry in entries]


def write_stream(concepts, path):
    text = json.dumps(["+++".join(c) for c in concepts], indent=1, ensure_ascii=False)
    Path(path).write_text(text, encoding="utf-8")


# --------------------------------------------------------------------------------------- mixture


def endless(places, n, *key):
    """What stands at `places` (int [N]) of an endless row of permutations of range(n), by the key:
    a Feistel network over a x b >= n, walked until it is below n (Black and Rogaway 2002)."""
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    keys = np.random.SeedSequence(key).generate_state(8, np.uint64)
    epoch, x = np.divmod(np.asarray(places, np.uint64), np.uint64(n))
    pending = np.arange(len(x))  # those not yet below n
    while len(pending):
        x[pending] = _feistel(x[pending], epoch[pending], np.uint64(a), np.uint64(b), keys)
        pending = pending[x[pending] >= n]
    return x.astype(np.int64)


def _feistel(x, tweak, a, b, keys):
    right, left = np.divmod(x, a)
    for k, key in enumerate(keys):
        z = right * np.uint64(0x9E3779B97F4A7C15) + tweak * np.uint64(0xD1B54A32D192ED03) + key
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # splitmix64's mixing
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = (left + (z ^ (z >> np.uint64(31))) % (b if k % 2 else a)) % (b if k % 2 else a)
        left = right
        right = mixed
    return right * a + left


def split_batch(batch_size, ratios):
    """Counts of P, D and B: floors of shares, the rest in turn; 512 at .33/.34/.33: 169/175/168."""
    counts = [math.floor(round(batch_size * r, 6)) for r in ratios]
    shares = [i for i in range(3) if ratios[i] > 0]
    for i in range(batch_size - sum(counts)):
        counts[shares[i % len(shares)]] += 1
    return counts


class Mixture:
    """S_t = lambda_P P + lambda_D D_t + lambda_B B (sec. 3.1), without state: a batch's ids are a
    pure function of (seed, task, step). Nothing of a source repeats before all of it was seen.

    chunks: T lists of (dataset name, class name). ratios: lambda of P, D, B; with nothing in B, D
    takes its share. replay: how many samples of the pool are at hand, drawn by the seed; 0 for all.
    held: what held() gave of an earlier run's tasks, which the chunks follow. Sample m in stream
    order is number index[m] of the training split of dataset origin[m]; task t owns those from
    ends[t] to ends[t + 1] - 1, B all before. gone: {dataset: held samples that are not there}."""

    def __init__(self, world, chunks, batch_size, ratios=(0.33, 0.34, 0.33), replay=0, seed=0,
                 held=None):  # fmt: skip
        if len(ratios) != 3 or min(ratios) < 0 or not abs(sum(ratios) - 1) <= 1e-6:
            raise ValueError(f"the mixture P/D/B is three shares that sum to 1, got {ratios}")
        self.batch_size = batch_size
        self.ratios = ratios
        self.seed = seed
        self.pool_size = len(world.pool) if world.pool is not None else 0
        self.at_hand = min(replay, self.pool_size) or self.pool_size
        if ratios[0] > 0 and self.pool_size == 0:
            raise ValueError("the mixture needs a pool: name --pool, or mix 0/D/B (--mixture)")
        self.datasets = world.adaptation
        self.names = [d.name for d in world.adaptation]
        self.before = held or {"names": [], "origin": torch.zeros(0, dtype=torch.int16),
                               "keys": torch.zeros(0, dtype=torch.int64), "ends": [0]}  # fmt: skip
        origin, index = located(self.before, world.adaptation)
        there = index >= 0
        lost = self.before["origin"][torch.from_numpy(~there)].tolist()
        self.gone = dict(sorted(Counter(self.before["names"][k] for k in lost).items()))
        self.ends = [int(there[:end].sum()) for end in self.before["ends"]]
        new = fresh(world.adaptation, held)
        origins = [origin[there]]
        indices = [index[there]]
        seen = set()
        for chunk in chunks:
            for name, c in chunk:
                k = self.names.index(name) if name in self.names else None
                if k is None or c not in self.datasets[k].classes or (name, c) in seen:
                    raise ValueError(f"the stream's {name}+++{c} is not there, or named before")
                seen.add((name, c))
                d = self.datasets[k]
                ids = new[k][d.train.labels[new[k]] == d.classes.index(c)]
                if not len(ids):
                    raise ValueError(f"the stream's {name}+++{c} has no new training sample")
                indices.append(ids)
                origins.append(np.full(len(ids), k, np.int16))
            self.ends.append(sum(map(len, indices)))
        self.index = np.concatenate(indices)
        self.origin = np.concatenate(origins)

    def counts(self, task):
        """Samples of P, D_t and B in a batch of this task."""
        p, d, b = self.ratios
        return split_batch(self.batch_size, (p, d, b) if self.ends[task] else (p, d + b, 0))

    def ids(self, task, step, skip=0):
        """-> batch_size pairs of "pool" or a dataset's name, and index in its training split; with
        skip of the samples so many later in their source's order."""
        first = self.ends[task]
        ranges = [(0, self.at_hand), (first, self.ends[task + 1]), (0, first)]
        batch = []
        for source, (n, (a, b)) in enumerate(zip(self.counts(task), ranges)):
            if n == 0:
                continue
            places = endless(np.arange(step * n, (step + 1) * n), b - a, self.seed, 4, source, task)
            places = a + (places + skip) % (b - a)
            if source == 0:
                drawn = endless(places, self.pool_size, self.seed, 3)
                batch += [("pool", i) for i in drawn.tolist()]
            else:
                names = [self.names[k] for k in self.origin[places].tolist()]
                batch += zip(names, self.index[places].tolist())
        return batch

    def few_captions(self):
        """Notes of tasks with fewer than half as many captions as pairs in a batch."""
        notes = []
        for task in range(len(self.before["ends"]) - 1, len(self.ends) - 1):
            n = self.counts(task)[1]
            captions = set()
            for k in range(self.ends[task], self.ends[task + 1]):
                caption = self.datasets[self.origin[k]].train.captions[self.index[k]]
                captions |= {caption} if isinstance(caption, str) else {*caption}
                if 2 * len(captions) >= n:
                    break
            if 2 * len(captions) < n:
                fits = f"--batch-size {2 * len(captions) * self.batch_size // n}"
                notes.append(f"task {task + 1}: {n} pairs a batch share {len(captions)} captions,"
                             f" so that many negatives are false; {fits} fits")
        return notes

    def held(self):
        """What a Mixture of later tasks has to know of these: a key of eight bytes a sample."""
        names = list(dict.fromkeys([*self.before["names"], *self.names]))
        first = self.ends[len(self.before["ends"]) - 1]
        origin = self.origin[first:].copy()
        keys = np.zeros(len(origin), np.int64)
        for k, d in enumerate(self.datasets):
            mine = self.origin[first:] == k
            keys[mine] = d.train.keys()[self.index[first:][mine]]
            origin[mine] = names.index(d.name)
        earlier = self.before["ends"]
        later = [earlier[-1] + end - first for end in self.ends[len(earlier) :]]
        return {"names": names, "ends": [*earlier, *later],
                "origin": torch.cat([self.before["origin"], torch.from_numpy(origin)]),
                "keys": torch.cat([self.before["keys"], torch.from_numpy(keys)])}  # fmt: skip


# --------------------------------------------------------------------------------------- batches

TRIES = 100  # broken pictures in a row after which it is no accident


def train_crop(image, size, interpolation="bicubic"):
    """A PIL image or uint8 [H, W, 3] -> uint8 [3, S, S]: RandomResizedCrop as in sec. 3.2."""
    pixels = _tensor(image)
    top, left, height, width = v2.RandomResizedCrop.get_params(pixels, (0.9, 1.0), (3 / 4, 4 / 3))
    box = pixels[None, :, top : top + height, left : left + width]
    return torch.nn.functional.interpolate(box, (size, size), mode=interpolation, antialias=True)[0]


def test_crop(image, size, resize="shortest", interpolation="bicubic"):
    """-> uint8 [3, S, S]. resize: "shortest" side, then its centre is cut out; or "squash" both."""
    edges = [size, size] if resize == "squash" else [size]
    mode = v2.InterpolationMode(interpolation)
    pixels = v2.functional.resize(_tensor(image), edges, mode, antialias=True)
    return v2.functional.center_crop(pixels, [size, size])


def _tensor(image):
    """uint8 [3, H, W] of a PIL image or array [H, W, 3]; torch has no read-only tensors."""
    image = image.convert("RGB") if isinstance(image, Image.Image) else image
    return torch.from_numpy(np.require(image, requirements="W")).permute(2, 0, 1)


def _batches(make, items, workers, broken):
    """Yields make(item, faults) of each item; broken, if there is one, is told the faults."""
    forks = workers and "fork" in multiprocessing.get_all_start_methods()  # `make` does not pickle
    how = {"num_workers": workers, "multiprocessing_context": "fork"} if forks else {}
    def attempt(item):
        faults = [] if broken else None
        try:
            return make(item, faults), faults
        except ValueError as e:  # as a value it arrives whole
            return e, None
    own = torch.Generator()  # else the loader draws from torch's global one
    gc.freeze()  # a collection in a worker would write to, and so copy, all that is shared with it
    results = iter(DataLoader(items, None, collate_fn=attempt, generator=own, **how))
    gc.unfreeze()
    processes = multiprocessing.active_children()
    try:
        for batch, faults in results:
            if isinstance(batch, ValueError):
                raise batch
            if faults:
                broken(faults)
            yield batch
    except RuntimeError as e:
        signals = [signal.Signals(-p.exitcode).name for p in processes if (p.exitcode or 0) < 0]
        if not signals:
            raise
        raise ChildProcessError(f"a process that prepares batches ended by {signals[0]}") from e


def _first_sound(candidates, faults):
    """-> (split, number, picture) of the first of the (split, number) that can be read."""
    for split, i in candidates:
        try:
            return split, i, split.image(i)
        except ValueError as e:
            if faults is None:
                raise
            faults.append(str(e))
    raise ValueError(f"{len(faults)} pictures in a row cannot be read, the last: {faults[-1]}")


def loader(world, mixture, task, steps, image_size, workers=0, start=0, part=(0, 1),
           resize="shortest", interpolation="bicubic", broken=None):  # fmt: skip
    """Batches of a task, steps start to steps - 1: images uint8 [B, 3, S, S], captions list[str].

    A slot's sample, crop and caption are a pure function of (seed, task, step, slot). part: (rank,
    processes); this process makes slots rank B // processes to (rank + 1) B // processes - 1 alone.
    broken: called here with sentences about pictures that cannot be read, each replaced by the next
    of its source; without it the first raises ValueError. resize: as in test_loader, unused."""
    splits = {d.name: d.train for d in world.adaptation} | {"pool": world.pool}
    rank, processes = part
    size = mixture.batch_size
    own = range(rank * size // processes, (rank + 1) * size // processes)
    def candidates(ids, step, slot):
        for skip in range(TRIES):
            source, i = mixture.ids(task, step, skip)[slot] if skip else ids[slot]
            yield splits[source], i
    def make(step, faults):
        images = [torch.empty(0, 3, image_size, image_size, dtype=torch.uint8)]
        captions = []
        ids = mixture.ids(task, step)
        rng = np.random.default_rng((mixture.seed, 5, task, step))
        chance = rng.integers(2**63, size=(size, 2)).tolist()  # of a slot: crop, caption
        with torch.random.fork_rng(devices=[]):
            for slot in own:
                split, i, image = _first_sound(candidates(ids, step, slot), faults)
                torch.default_generator.manual_seed(chance[slot][0])
                images.append(train_crop(image, image_size, interpolation)[None])
                several = split.captions[i]
                several = [several] if isinstance(several, str) else several
                captions.append(several[chance[slot][1] % len(several)])
        return torch.cat(images), captions
    return _batches(make, range(start, steps), workers, broken)


def test_loader(split, ids, image_size, batch_size=256, workers=0, resize="shortest",
                interpolation="bicubic", broken=None):  # fmt: skip
    """The test pictures `ids` of a split, in order: uint8 [B, 3, S, S]. broken: as in loader; the
    next of the same class stands in, and if there is none the next of all."""
    ids = list(map(int, ids))
    def candidates(i):
        yield split, i
        others = (i + np.arange(1, len(split))) % len(split)
        foreign = split.labels[others] != split.labels[i]
        for k in others[np.argsort(foreign, kind="stable")][: TRIES - 1].tolist():
            yield split, k
    def make(first, faults):
        chosen = ids[first : first + batch_size]
        images = (_first_sound(candidates(i), faults)[2] for i in chosen)
        return torch.stack([test_crop(x, image_size, resize, interpolation) for x in images])
    return _batches(make, range(0, len(ids), batch_size), workers, broken)


def broken_pictures(split, workers=0):
    """Reads every picture once -> a sentence about each that cannot be read, in order."""
    found = []
    def make(i, faults):
        try:
            split.image(i)
        except ValueError as e:
            faults.append(str(e))
    batches = _batches(make, range(len(split)), workers, found.extend)
    list(tqdm(batches, "reading", len(split), leave=False, disable=None))
    return found


def contact_sheet(split, seed=0, rows=4, columns=6, side=160):
    """An image of rows x columns pictures that the seed draws, each with a caption below it."""
    sheet = Image.new("RGB", (columns * side, rows * (side + 48)), "white")
    draw = ImageDraw.Draw(sheet)
    drawn = np.random.default_rng((seed, 8)).permutation(len(split))[: rows * columns].tolist()
    for k, i in enumerate(drawn):
        x = k % columns * side
        y = k // columns * (side + 48)  # of text
        caption = split.captions[i]
        lines = textwrap.wrap(caption if isinstance(caption, str) else caption[0], side // 6)[:3]
        draw.multiline_text((x + 4, y + side + 2), "\n".join(lines), "black", _font(11), spacing=2)
        try:
            pixels = test_crop(split.image(i), side - 8)
            sheet.paste(v2.functional.to_pil_image(pixels), (x + 4, y + 4))
        except ValueError:
            draw.text((x + 4, y + 4), "cannot be read", "red", _font(14))
    return sheet
