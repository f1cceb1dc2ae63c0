"""Data for continual pretraining: captioned pictures, streams of concepts, mixed batches.

Roth et al. 2024 (arXiv 2408.14471), sec. 3: FoMo-in-Flux's layout on disk, its streams, the mixture
of update data D, buffer B and pretraining pool P; people's own class folders, tables and shards;
and a small world, drawn on the spot, in which all fits into minutes. This file stands alone:

    import data
    world = data.toy(seed=0)  # or data.open_world("my/folder")
    stream = data.order(data.concepts(world.adaptation), "random", seed=0)
    mixture = data.Mixture(world, data.tasks(stream, 8), batch_size=128)
    for images, captions in data.loader(world, mixture, task=0, steps=3, image_size=32):
        print(images.shape, captions[0])  # torch.Size([128, 3, 32, 32]) and a sentence
"""

import csv
import gc
import glob
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import posixpath
import re
import string
import tarfile
import textwrap
import unicodedata
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from io import BytesIO
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2
from tqdm import tqdm

# ------------------------------------------------------------------------------------------- splits


class Split:
    """Captioned pictures with a class each. Subclasses set labels and captions and say the rest."""

    labels: np.ndarray  # int [N]
    captions: Sequence  # N times a str, or a list of str of which training draws one

    def __len__(self):
        return len(self.labels)

    def image(self, i):
        """Picture i: a PIL image or uint8 [H, W, 3]; ValueError or OSError names a broken one."""
        raise NotImplementedError

    def raw(self, i):
        """Picture i as bytes: those of its file, or its pixels."""
        raise NotImplementedError

    def state(self):
        """Bytes that change whenever a picture does, without reading the pictures."""
        raise NotImplementedError

    def keys(self):
        """int64 [N] that tell the samples apart, and stay theirs when others come or go."""
        return np.arange(len(self))

    def fingerprint(self):
        """Hash of labels, captions and state(): equal only if nothing changed in between."""
        return _hash(self.labels, self.captions, self.state())

    def content(self):
        """Hash of labels, captions and every picture's bytes, wherever these lie.

        It reads the whole split: a million pictures of 100 kB are 100 GB, ten minutes at 170 MB/s.
        """
        pictures = hashlib.sha256()
        for i in tqdm(range(len(self)), "hashing the pictures", leave=False, disable=None):
            pictures.update(hashlib.sha256(self.raw(i)).digest())
        return _hash(self.labels, self.captions, pictures.digest())


def _hash(labels, captions, pictures):
    digest = hashlib.sha256(np.asarray(labels, np.int64).tobytes())
    for array in Texts.pack(captions).arrays():
        digest.update(hashlib.sha256(array.tobytes()).digest())
    digest.update(pictures)
    return digest.hexdigest()


def _key(text):
    """The first eight bytes of a text's hash, as an int64."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class Lazy(Sequence):
    """A sequence of n items that at(i) makes when they are asked for. It compares with lists."""

    def __init__(self, n, at):
        self.n = n
        self.at = at

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self.at(k) for k in range(*i.indices(len(self)))]
        return self.at(range(len(self))[i])

    def __eq__(self, other):
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None


class Texts(Lazy):
    """Items that are a str or a list of str each, as one block of UTF-8 and offsets into it.

    Millions of them cost their bytes and little more, and processes share them without a copy.
    """

    def __init__(self, block, starts, first, is_list):
        super().__init__(len(is_list), self.text)
        self.block = block  # uint8 [bytes]
        self.starts = starts  # int64 [texts + 1]: text k is block[starts[k] : starts[k + 1]]
        self.first = first  # int64 [items + 1]: item i has the texts first[i] to first[i + 1] - 1
        self.is_list = is_list  # bool [items]

    @classmethod
    def pack(cls, items):
        if isinstance(items, cls):
            return items
        is_list = np.fromiter((not isinstance(item, str) for item in items), bool, len(items))
        counts = [len(item) if several else 1 for item, several in zip(items, is_list)]
        texts = chain.from_iterable([i] if isinstance(i, str) else i for i in items)
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]  # of file names, too
        block = np.frombuffer(b"".join(encoded), np.uint8)
        return cls(block, _ends(map(len, encoded)), _ends(counts), is_list)

    def arrays(self):
        return self.block, self.starts, self.first, self.is_list

    def text(self, i):
        texts = []
        for k in range(self.first[i], self.first[i + 1]):
            text = self.block[self.starts[k] : self.starts[k + 1]].tobytes()
            texts.append(text.decode("utf-8", "surrogatepass"))
        return texts if self.is_list[i] else texts[0]


def _ends(lengths):
    """Running sums of the lengths, from 0."""
    return np.concatenate([[0], np.cumsum(np.fromiter(lengths, np.int64))]).astype(np.int64)


@dataclass
class Dataset:
    name: str
    kind: str  # "classification" (top-1 accuracy) or "retrieval" (R@5)
    classes: list[str]
    prompts: list[str]  # one a class: what the zero-shot classifier encodes
    train: Split
    test: Split


@dataclass
class World:
    adaptation: list[Dataset]  # the stream is made of these; KA is the mean over them
    heldout: list[Dataset]  # never trained on; ZS is the mean over them; may be empty
    pool: Split = None  # what theta_0 was trained on, for replay
    notes: list[str] = field(default_factory=list)  # what was found and what was left out, to print
    sources: list = ()  # what open_world opened


@dataclass
class Pictures(Split):
    """A split held in memory."""

    pixels: np.ndarray  # uint8 [N, H, W, 3]
    labels: np.ndarray  # int [N]
    captions: list = field(repr=False)

    def image(self, i):
        return self.pixels[i]

    def raw(self, i):
        return self.pixels[i].tobytes()

    def state(self):
        return hashlib.sha256(np.ascontiguousarray(self.pixels)).digest()


class Concat(Split):
    """Splits one after the other, as one split. Its labels are the parts' own."""

    def __init__(self, splits):
        self.splits = list(splits)
        self.ends = np.cumsum([len(s) for s in self.splits])
        self.labels = np.concatenate([s.labels for s in self.splits])
        self.captions = Lazy(len(self.labels), self.caption)

    def place(self, i):
        """-> the split of sample i, its number there."""
        part = int(np.searchsorted(self.ends, i, side="right"))
        split = self.splits[part]
        return split, int(i - self.ends[part] + len(split))

    def caption(self, i):
        split, within = self.place(i)
        return split.captions[within]

    def image(self, i):
        split, within = self.place(i)
        return split.image(within)

    def raw(self, i):
        split, within = self.place(i)
        return split.raw(within)

    def keys(self):
        """A sample whose key an earlier part has already gets another."""
        keys = np.zeros(0, np.int64)
        for number, split in enumerate(self.splits):
            own = split.keys()
            mark = _key(f"part {number}")
            twice = np.isin(own, keys)
            while twice.any():  # again where a part is itself of parts
                own = np.where(twice, own * 3 ^ mark, own)
                twice = np.isin(own, keys)
            keys = np.concatenate([keys, own])
        return keys

    def fingerprint(self):
        return hashlib.sha256("".join(s.fingerprint() for s in self.splits).encode()).hexdigest()

    def content(self):
        return hashlib.sha256("".join(s.content() for s in self.splits).encode()).hexdigest()


class Subset(Split):
    """The samples `ids` of another split. labels: theirs, where they are others than there."""

    def __init__(self, split, ids, labels=None):
        self.split = split
        self.ids = np.asarray(ids, np.int64)
        self.labels = split.labels[self.ids] if labels is None else labels
        self.captions = Lazy(len(self.ids), lambda i: split.captions[int(self.ids[i])])

    def image(self, i):
        return self.split.image(int(self.ids[i]))

    def raw(self, i):
        return self.split.raw(int(self.ids[i]))

    def keys(self):
        return self.split.keys()[self.ids]

    def fingerprint(self):
        chosen = self.ids.tobytes() + self.labels.tobytes()
        return hashlib.sha256(self.split.fingerprint().encode() + chosen).hexdigest()


# -------------------------------------------------------------- a small world, drawn on the spot
# FoMo-in-Flux in miniature: 8 sets to adapt to, 5 held out, 32 px. theta_0's pool holds all
# held-out classes and a quarter of the others, so that it starts about where the paper's does:
# strong on ZS, half-way on KA.

COLOURS = {
    "red": (215, 40, 40), "green": (40, 160, 60), "blue": (45, 75, 215),
    "yellow": (235, 215, 50), "purple": (130, 45, 165), "orange": (240, 140, 30),
    "cyan": (60, 205, 215), "pink": (245, 130, 190), "white": (245, 245, 245),
    "black": (15, 15, 15),
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
WINDS = ["up", "up and right", "right", "down and right", "down", "down and left", "left",
         "up and left"]  # fmt: skip
SIZE = 32
CANVAS = 64  # drawn at twice the size, then averaged down


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
    "cross": np.array([(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3),
                       (-1, 1), (-3, 1), (-3, -1), (-1, -1)]) / 3.1,
    "ring": np.concatenate([_arc(0.95, 0, 360), _arc(0.5, 360, 0)]),
    "heart": _heart(),
    "moon": np.concatenate([_arc(0.95, 60, 300), _arc(0.8, 290, 70) + (0.45, 0)]),
    "diamond": np.array([(0, -1), (0.6, 0), (0, 1), (-0.6, 0)]),
    "arrow": np.array([(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3),
                       (-1, 0.3)]),
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

    def glyph(self, text, ink):
        font = _font(int(self.rng.integers(44, 56)))
        x, y = (CANVAS * (0.5 + self.rng.uniform(-0.05, 0.05)) for _ in range(2))
        self.draw.text((x, y), text, self.rgb(ink), font, anchor="mm",
                       stroke_width=int(self.rng.integers(1, 3)),
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
    ink = p.ink()
    side = np.arange(CANVAS) + p.rng.integers(16)
    x, y = np.meshgrid(side, side)
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


def _cell(k):
    """Centre of the k-th of nine cells, as shares of the picture."""
    return (k % 3) / 3 + 1 / 6, (k // 3) / 3 + 1 / 6


def _counts(p, name):
    number, ink, _ = name.split()
    for cell in p.rng.permutation(9)[: DIGITS.index(number)]:
        p.shape("circle", ink, *_cell(cell), radius=0.15, jitter=0.02)
    return name, f"a group of {name}", f"{number} dots, all {ink}"


def _flags(p, name):
    left, right = name.split(" and ")
    edge = int(CANVAS * p.rng.uniform(0.4, 0.6))
    p.draw.rectangle((0, 0, edge, CANVAS), p.rgb(left))
    p.draw.rectangle((edge, 0, CANVAS, CANVAS), p.rgb(right))
    return f"a flag of {name}", f"a {left} and {right} flag", f"a flag, {left} then {right}"


def _places(p, name):
    dot, cell = name.split(" at the ")
    ink, _ = dot.split()
    k = CELLS.index(cell)
    p.shape("circle", ink, *_cell(k), radius=0.18, jitter=0.03)
    return f"a {name}", f"in the {cell} a {ink} dot", f"a {name} on {p.ground}"


def _clocks(p, hour):
    ink = p.ink()
    centre = CANVAS / 2
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
    pointing = f"arrow pointing {wind}"
    return f"an {pointing}", f"a {ink} {pointing}", f"an arrow that points {wind}"


def _above(p, name):
    top, bottom = name.split(" above a ")
    high = f"{p.ink()} {top}"
    low = f"{p.ink()} {bottom}"
    p.shape(top, high.split()[0], y=0.26, radius=0.22)
    p.shape(bottom, low.split()[0], y=0.74, radius=0.22)
    return f"a {high} above a {low}", f"a {low} below a {high}", f"a {high} over a {low}"


def _pairs(first, second, pattern):
    return [pattern.format(a, b) for a in first for b in second if a != b]


_SIX = list(SHAPES)[:6]
_SCENES = _pairs([f"{c} {s}" for c, s in zip(INKS, SHAPES)],
                 [f"{c} {s}" for c, s in zip(INKS[::-1], SHAPES)], "{} left of a {}")  # fmt: skip
_COUNTS = [f"{n} {c} dots" for n in DIGITS[2:7] for c in INKS[:6]]
_SHAPES = [f"{c} {s}" for c in INKS for s in SHAPES]
# name: (classes, prompt, drawing); the drawing returns ways to say what it drew
TOY_HELD_OUT = {
    "DIGITS": (DIGITS, "the digit {}.", _digits),
    "TEXTURES": (list(TEXTURES), "a pattern of {}.", _texture),
    "SKETCHES": (list(SHAPES), "a sketch of a {}.", _sketch),
    "SHAPES": (_SHAPES, "a {}.", _coloured),
    "SCENES": (_SCENES, "a {}.", _beside),
}
TOY_ADAPTATION = {
    "LETTERS": (list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), "the letter {}.", _letters),
    "COUNTS": (_COUNTS, "{}.", _counts),
    "FLAGS": (_pairs(INKS[:7], INKS[:7], "{} and {}"), "a flag of {}.", _flags),
    "PLACES": (_pairs(INKS[:5], CELLS, "{} dot at the {}"), "a {}.", _places),
    "CLOCKS": (HOURS, "a clock at {}.", _clocks),
    "FRAMES": (_pairs(_SIX, INKS[:6], "{} in a {} frame"), "a {}.", _frames),
    "ARROWS": (WINDS, "an arrow pointing {}.", _arrows),
    "STACKS": (_pairs(_SIX, _SIX, "{} above a {}"), "a {}.", _above),
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
        pixels[i] = p.pixels()
        opening = "" if name in TOY_RETRIEVAL else p.choose(OPENINGS)
        captions.append(_an(opening + p.choose((ways[0], *ways))))
    noise = 8 * rng.standard_normal(pixels.shape, np.float32)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8), labels, captions


def _an(text):
    return text.replace("a orange", "an orange")


def toy(seed=0, train=1000, test=250):
    """World of 8 + 5 drawn datasets of `train` and `test` pictures, a function of these alone."""
    sets = []
    pool = []
    for name, (classes, prompt, drawing) in (TOY_HELD_OUT | TOY_ADAPTATION).items():
        kind = "retrieval" if name in TOY_RETRIEVAL else "classification"
        splits = [Pictures(*_draw(name, drawing, classes, n, seed, part))
                  for n, part in ((train, "train"), (test, "test"))]  # fmt: skip
        prompts = [_an(prompt.format(c)) for c in classes]
        sets.append(Dataset(name, kind, classes, prompts, *splits))
        if name in TOY_HELD_OUT:
            pool.append(splits[0])
        else:  # other pictures of every fourth class
            shuffled = np.random.default_rng((seed, len(name), 1)).permutation(len(classes))
            known = shuffled[: len(classes) // 4]
            few = [classes[k] for k in known]
            pixels, labels, captions = _draw(name, drawing, few, train * 3 // 4, seed, "pool")
            pool.append(Pictures(pixels, known[labels], captions))
    heldout = sets[: len(TOY_HELD_OUT)]
    return World(sets[len(TOY_HELD_OUT) :], heldout, Concat(pool))


# ------------------------------------------------------------------------------- words and names


def _count(n, thing):
    return f"{n:,} {thing}{'s' * (n != 1)}"


def _twice(names):
    return Counter(names).most_common(1)[0][0]


def _same_form(text):
    """File systems and people spell an accent as one character or as two."""
    return unicodedata.normalize("NFC", text)


def _spelt(names, known):
    """The names, as those of them that are known are spelt there."""
    forms = {_same_form(name): name for name in known}
    return [forms.get(_same_form(name), name) for name in names]


# ------------------------------------------------------------------------------- pictures in files

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")  # none that runs programs
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif",
            ".ppm", ".pgm", ".pbm")  # fmt: skip
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # where Pillow, too, refuses: half a gigabyte of pixels


class Changed(OSError):
    """A file is no longer what the index was made from: going on would give other pictures."""


class TooLarge(ValueError):
    """A picture may be sound, and has more pixels than are decoded here."""


@dataclass
class Members:
    """Where the pictures of a split lie in uncompressed tars."""

    tars: list  # [path, what _stamp said of it]
    places: np.ndarray  # int64 [N, 3]: which of the tars, offset in it, bytes
    holes: dict  # number of a picture stored with holes -> [place in it, offset in the tar, bytes]

    def read(self, i):
        tar, offset, size = self.places[i].tolist()
        path, stamp = self.tars[tar]
        with open(path, "rb", buffering=0) as f:
            if _stamped(os.fstat(f.fileno())) != stamp:
                raise Changed(f"{path} has changed since it was opened: start the command again")
            if i not in self.holes:
                return os.pread(f.fileno(), size, offset)
            picture = bytearray(size)
            for place, at, length in self.holes[i]:
                picture[place : place + length] = os.pread(f.fileno(), length, at)
            return bytes(picture)


class Files(Split):
    """A split on disk: pictures as files below a folder, or read in place as members of tars."""

    def __init__(self, folder, members, paths, labels, captions):
        self.folder = str(folder)
        self.members = members  # None: the paths are files
        self.paths = Texts.pack(paths)  # below the folder, or names in the tar
        self.labels = np.asarray(labels, np.int64)
        self.captions = Texts.pack(captions)

    def place(self, i):
        if self.members is None:
            return os.path.join(self.folder, self.paths[i])
        return f"{self.members.tars[self.members.places[i, 0]][0]}: {self.paths[i]}"

    def raw(self, i):
        if self.members is not None:
            return self.members.read(i)
        with open(os.path.join(self.folder, self.paths[i]), "rb") as f:
            return f.read()

    def image(self, i):
        try:
            return decode(self.raw(i))
        except Changed:
            raise
        except TooLarge as e:
            raise ValueError(f"{self.place(i)} {e}") from None
        except Exception as e:  # decoders of torn files raise whatever they stumble over
            raise ValueError(f"{self.place(i)} does not decode as an image ({e}); "
                             "replace it or leave it out") from e  # fmt: skip

    def keys(self):
        """Hashes of path and size: another picture in a file of the same name is another sample."""
        if self.members is None:
            sizes = _sizes_and_times(self.folder, self.paths)[:, 0]
        else:
            sizes = self.members.places[:, 2]
        keys = (_key(f"{_same_form(p)} {size}") for p, size in zip(self.paths, sizes.tolist()))
        return np.fromiter(keys, np.int64, len(self.paths))

    def state(self):
        digest = hashlib.sha256()
        if self.members is None:
            arrays = [*self.paths.arrays(), _sizes_and_times(self.folder, self.paths)]
        else:
            tars = [[os.path.basename(path), _stamped(os.stat(path))[1:]]
                    for path, _ in self.members.tars]  # fmt: skip
            digest.update(json.dumps(tars).encode())
            arrays = [*self.paths.arrays(), self.members.places]
        for array in arrays:
            digest.update(hashlib.sha256(np.ascontiguousarray(array)).digest())
        return digest.digest()


def decode(raw):
    """A picture file's bytes -> uint8 [H, W, 3]. A picture that is turned by its EXIF stays so."""
    png = raw[:8] == b"\x89PNG\r\n\x1a\n"
    if png:  # Pillow would refuse one with long texts, and keep 8 of 16 bits
        width, height = (int.from_bytes(raw[at : at + 4], "big") for at in (16, 20))
        kind = "PNG"
    else:
        image = _open(raw)
        width, height = image.size
        kind = image.format
    if width * height > MAX_PIXELS:
        raise TooLarge(f"has {width * height:,} pixels, above the limit of {MAX_PIXELS:,}")
    if kind not in ("PNG", "JPEG", "MPO"):
        return np.asarray(_rgb(image))
    deep = png and raw[24:25] == b"\x10"
    mode = ImageReadMode.UNCHANGED if deep else ImageReadMode.RGB
    try:  # equal to Pillow's pixels
        pixels = decode_image(torch.frombuffer(bytearray(raw), dtype=torch.uint8), mode)
    except RuntimeError:
        return np.asarray(_rgb(_open(raw)))
    if deep:  # scaled, not cut; the alpha channel goes
        scaled = torch.from_numpy((pixels.numpy() // 257).astype(np.uint8))
        pixels = scaled[:3] if len(scaled) > 2 else scaled[:1].expand(3, -1, -1)
    return pixels.permute(1, 2, 0).numpy()


def _open(raw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
        try:
            return Image.open(BytesIO(raw), formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"it is none of {', '.join(FORMATS)}, or torn") from None
        except Image.DecompressionBombError as e:
            raise TooLarge(f"has more pixels than the limit of {MAX_PIXELS:,} ({e})") from None


def _rgb(image):
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers, of no known range")
    if image.mode.startswith("I"):  # 16 bits: convert() would clip, not scale
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def _stamped(found):
    """What tells one version of a file or folder from another."""
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def _stamp(path):
    try:
        return _stamped(os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _sizes_and_times(folder, paths):
    """Size and time of change of each file -> int64 [N, 2]; -1 if it is not there."""
    found = np.full((len(paths), 2), -1, np.int64)
    for i, path in enumerate(paths):
        stamp = _stamp(os.path.join(folder, path))
        if stamp:
            found[i] = stamp[1:]
    return found


class Folder:
    """Finds files below a folder, whichever way Unicode spells their names; reads each once."""

    def __init__(self, path):
        self.path = str(path)
        self.listings = {}  # folder below -> name -> whether it is a file
        self.forms = {}  # folder below, whether of files -> NFC form of a name -> the name

    def listing(self, head):
        if head not in self.listings:
            self.listings[head] = {}
            place = os.path.join(self.path, head)
            if os.path.isdir(place):
                with os.scandir(place) as entries:
                    self.listings[head] = {e.name: e.is_file() for e in entries}
        return self.listings[head]

    def find(self, path, file=True):
        """-> the path of the file (or folder) as it is spelt on disk, or None."""
        head, slash, name = path.rpartition("/")
        head = head or slash  # of "/name", too
        if self.listing(head).get(name) is file:
            return path
        if path.isascii():
            return None
        if head.strip("/"):
            head = self.find(head, False)
        if head is None:
            return None
        if (head, file) not in self.forms:
            names = [n for n, is_file in self.listing(head).items() if is_file is file]
            self.forms[head, file] = {_same_form(n): n for n in names}
        spelt = self.forms[head, file].get(_same_form(name))
        return spelt and posixpath.join(head, spelt)

    def folders(self):
        return {os.path.join(self.path, head) for head in self.listings}

    def split(self, items, found, captions):
        """-> Files of annotated items that find() found."""
        return Files(self.path, None, found, items.labels, captions)


# -------------------------------------------------------------------------------------------- tars
# The headers are read here, since the standard library takes 15 times as long for them: of two
# million members that is minutes. What is rare there, members with holes, is left to it.

BLOCK = 512
NOTHING = bytes(BLOCK)
HARD = b"1"  # kinds of links
SYMBOLIC = b"2"


class Sparse(Exception):
    """This tar has members with holes."""


class Tar:
    """The files in an uncompressed tar: name -> (offset, bytes, pieces if it has holes, else None).

    Links are followed within the tar and nowhere else. ValueError or OSError if it is no tar, or
    ends too early.
    """

    def __init__(self, path):
        self.path = str(path)
        with open(path, "rb", buffering=0) as f:
            self.stamp = _stamped(os.fstat(f.fileno()))
            try:
                self._take(self._members(f.fileno(), self.stamp[1]))
            except Sparse:
                self._take(self._members_slowly())
        for name in self.links:
            place = self.follow(name)
            if place:
                self.files[name] = place

    def _take(self, members):
        """members: kind, name, what a link points to, place of what is no link."""
        self.files = {}
        self.links = {}  # symbolic: name -> what it points to
        for kind, name, target, place in members:
            self.files.pop(name, None)  # a later one of the same name counts
            self.links.pop(name, None)
            if kind == SYMBOLIC:
                self.links[name] = target
            elif kind == HARD:
                place = self.files.get(_cleaned(target))
            if place:
                self.files[name] = place

    def _members(self, file, length):
        at = 0
        said = {}  # what the headers before a member say of it
        header = None
        while at < length:
            header = os.pread(file, BLOCK, at)
            at += BLOCK
            if header == NOTHING:  # the end, or that of one of several put together
                continue
            if len(header) < BLOCK:
                break
            kind = header[156:157]
            size = self._size(header)
            if kind in b"123456":  # links, folders and devices
                size = 0
            elif kind in b"0\x007":
                size = int(said.get("size", size))
            if not 0 <= size <= length - at:
                raise self._truncated(self._name(header, said))
            if kind in b"LKxg":
                self._heed(kind, os.pread(file, size, at), said)
            elif kind == b"S":
                raise Sparse
            elif kind in b"12":
                target = said.get("linkpath", _decoded(header[157:257].split(b"\0", 1)[0]))
                yield kind, self._name(header, said), target, None
            elif kind in b"0\x007":
                yield kind, self._name(header, said), None, (at, size, None)
            at += -(-size // BLOCK) * BLOCK
            if kind not in b"LKxg":
                said = {}
        if header != NOTHING:
            raise ValueError(f"{self.path} lacks the end mark of a tar: it is truncated, or no "
                             "uncompressed tar; unpack it, or download it again")  # fmt: skip

    def _size(self, header):
        """Of what follows a header: octal digits or, of large files, in binary."""
        text = header[124:136]
        try:
            if header[257:262] != b"ustar" and not _checked(header):
                raise ValueError("a header's check sum is wrong")
            if text[0] & 128:
                return int.from_bytes(text[1:], "big")
            return int(text.strip(b" \0") or b"0", 8)
        except ValueError as e:
            raise ValueError(f"{self.path} is not an uncompressed tar, or damaged ({e}); unpack it,"
                             " or copy or download it again") from None  # fmt: skip

    def _heed(self, kind, text, said):
        """A long name, a long link or a pax header, which are about the next member."""
        if kind in b"LK":
            said["path" if kind == b"L" else "linkpath"] = _decoded(text.split(b"\0", 1)[0])
            return
        while text.strip(b"\0"):
            length, _, _ = text.partition(b" ")
            if not length.isdigit() or not 0 < int(length) <= len(text):
                raise ValueError(f"{self.path} has a torn pax header: copy or download it again")
            key, _, value = text[len(length) + 1 : int(length) - 1].partition(b"=")
            text = text[int(length) :]
            if key.startswith(b"GNU.sparse"):
                raise Sparse
            if kind == b"x":  # those of the whole archive name no file
                said[_decoded(key)] = _decoded(value)

    def _name(self, header, said):
        name = said.get("path")
        if name is None:
            name = _decoded(header[:100].split(b"\0", 1)[0])
            if header[257:263] == b"ustar\0" and header[345]:
                name = f"{_decoded(header[345:500].split(bytes(1), 1)[0])}/{name}"
        return _cleaned(name)

    def _members_slowly(self):
        try:
            with tarfile.open(self.path, "r:", ignore_zeros=True) as tar:
                for member in tar:
                    place = None
                    if member.isreg():
                        pieces = _pieces(member) if member.issparse() else None
                        place = member.offset_data, member.size, pieces
                        stored = sum(n for _, _, n in pieces) if pieces else member.size
                        if member.offset_data + stored > self.stamp[1]:
                            raise self._truncated(member.name)
                    yield member.type, _cleaned(member.name), member.linkname, place
        except tarfile.TarError as e:
            raise ValueError(f"{self.path} cannot be read as a tar ({e}); unpack it") from None

    def _truncated(self, name):
        return ValueError(f"{self.path} ends within {name!r}: it is truncated; copy or download it "
                          "again")  # fmt: skip

    def follow(self, name):
        """What the name stands for when links are followed: a place, or None."""
        for _ in range(40):  # as many as the system follows
            if name in self.files or not self.links:
                break
            parts = name.split("/")
            heads = ["/".join(parts[:k]) for k in range(len(parts), 0, -1)]
            head = next((h for h in heads if h in self.links), None)
            if head is None:
                break
            rest = name[len(head) + 1 :]
            name = posixpath.join(posixpath.dirname(head), self.links[head], rest)
            name = posixpath.normpath(name).lstrip("/")
        return self.files.get(name)

    @cached_property
    def roots(self):
        """What a dataset's paths may begin with: its folder is called as the tar is, and the tar
        holds it, what is in it, or it at the end of a longer path."""
        stem = Path(self.path).stem
        longer = next((n for n in self.files if f"/{stem}/" in n), None)
        roots = [f"{stem}/", ""]
        if longer is not None:
            roots.insert(0, longer[: longer.index(f"/{stem}/") + len(stem) + 2])
        return roots

    @cached_property
    def forms(self):
        return {_same_form(name): name for name in self.files}

    def find(self, path):
        """-> where a path within the dataset's folder lies, or None."""
        for root in self.roots:
            place = self.follow(root + path)
            if place is None and not path.isascii():
                place = self.files.get(self.forms.get(_same_form(root + path)))
            if place:
                return place
        return None

    def split(self, items, found, captions):
        """-> Files of annotated items that find() found."""
        members = _members([[self.path, self.stamp]], [0] * len(found), found)
        return Files(self.path, members, items.keys, items.labels, captions)


def _checked(header):
    """Whether the sum of a header's bytes, its own field as blanks, is what the field says."""
    total = sum(header[:148]) + 8 * 32 + sum(header[156:])
    said = re.match(rb" *([0-7]+)", header[148:156])
    return said is not None and int(said[1], 8) == total


def _decoded(name):
    return name.decode("utf-8", "surrogateescape")


def _cleaned(name):
    """A member's name without what means nothing within a tar: a slash or dots in front."""
    if name[:1] in "./" or "//" in name or "/." in name:
        name = posixpath.normpath(name).lstrip("/")
    return name


def _pieces(member):
    """Of a file with holes: [place in the file, offset in the tar, bytes] of each stored piece."""
    pieces = []
    at = member.offset_data
    for place, length in member.sparse:
        pieces.append([place, at, length])
        at += length
    return [p for p in pieces if p[2]]


# ------------------------------------------------------------------------------------- the index
# What an annotation file says is kept in one file of arrays, which the next opening reads as it
# is. It holds for as long as every file and folder that it was made from stays as it was.

INDEX = 3  # of the format: what is kept by another is made anew


def _keep(path, head, arrays):
    """Write a head, which is JSON, and named arrays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.part")
    try:
        with open(aside, "wb") as f:
            np.savez(f, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _kept(path):
    """-> head and arrays as _keep wrote them; None if there are none or they are torn."""
    try:
        with np.load(path) as kept:
            arrays = dict(kept)
        return json.loads(arrays.pop("head").tobytes()), arrays
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _indexed(cache, key, make):
    """make() -> (head, arrays, paths it was made from), or what was kept of it under the key.

    cache: the folder for it, None for none. The head's notes say if nothing can be kept there.
    """
    name = hashlib.sha256(json.dumps([INDEX, *key]).encode()).hexdigest()[:24]
    path = cache and Path(cache).expanduser() / f"index-{name}.npz"
    kept = _kept(path) if path else None
    if kept and all(_stamp(p) == stamp for p, stamp in kept[0]["from"]):
        return kept
    collecting = gc.isenabled()
    gc.disable()  # it would go through millions of live objects again and again: twice the time
    try:
        head, arrays, paths = make()
    finally:
        if collecting:
            gc.enable()
    head["from"] = [[str(p), _stamp(p)] for p in paths]
    if path:
        try:
            _keep(path, head, arrays)
        except OSError as e:
            head["notes"].append(f"no index can be kept in {path.parent} ({e.strerror}): "
                                 "the next opening takes as long as this one")  # fmt: skip
            return head, arrays
        return _kept(path) or (head, arrays)  # not in memory twice
    return head, arrays


def _packed(files, prefix):
    """A Files as a head and arrays, for the index."""
    arrays = {"labels": files.labels}
    for name, texts in (("paths", files.paths), ("captions", files.captions)):
        for k, array in enumerate(texts.arrays()):
            arrays[f"{name}{k}"] = array
    head = {"folder": files.folder}
    if files.members is not None:
        arrays["places"] = files.members.places
        head |= {"tars": files.members.tars, "holes": list(files.members.holes.items())}
    return head, {prefix + name: array for name, array in arrays.items()}


def _unpacked(head, arrays, prefix):
    texts = [Texts(*(arrays[f"{prefix}{name}{k}"] for k in range(4)))
             for name in ("paths", "captions")]  # fmt: skip
    members = None
    if "tars" in head:
        members = Members(head["tars"], arrays[f"{prefix}places"], dict(head["holes"]))
    return Files(head["folder"], members, texts[0], arrays[f"{prefix}labels"], texts[1])


# ------------------------------------------------------------------------ FoMo-in-Flux's layout
# <root>/<DATASET>/<path> or <root>/<DATASET>.tar; annotations in 00_info beside these or above.

HELD_OUT = [  # the paper's 22
    "CALTECH101", "CALTECH256", "CARS196", "CIFAR10", "DOMAINNET_QUICKDRAW", "EuroSAT",
    "FashionMNIST", "FLICKR30K", "Food101", "GTSRB", "IMAGENET", "IMAGENET_A", "IMAGENET_D",
    "IMAGENET_R", "IMAGENET_S", "IMAGENET_V2", "MNIST", "MONKEYS10", "MSCOCO", "OXFORDPETS",
    "STL10", "SVHN",
]  # fmt: skip
SPLITS = {  # the first whose pictures are there counts. The copies at 224 pixels have captions
    # where the other annotations of AI2DIAGRAMS, DOLLARSTREET and IMAGENET_D have none
    "train": ("train_224", "train_mini_224", "train", "train_mini"),
    "test": ("test_224", "val_224", "test", "val"),
}
KINDS = ("default_caption", "synthetic_merged_caption", "synthetic_caption", "primer_caption")
CAPTIONS = {  # --captions: which kind an item is asked for first, then KINDS in turn
    "default": "default_caption",  # FoMo's own rule
    "merged": "synthetic_merged_caption",
    "synthetic": "synthetic_caption",
    "prompt": "primer_caption",
}


def _read_json(path, kind):
    try:
        value = json.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there") from None
    except OSError as e:
        raise OSError(f"{path} cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(value, kind):
        found = type(value).__name__
        raise ValueError(f"{path} holds a JSON {found}, expected a {kind.__name__}")  # noqa: TRY004
    return value


def _is_blank(text):
    """Whether a caption says nothing: white space, or the NaN that a table left."""
    if isinstance(text, str):
        return text.strip() in ("", "nan", "NaN")
    return text is None or (isinstance(text, float) and math.isnan(text))


def _said(file, key, value):
    """The texts in a caption that say something: a str, a list of str, or None."""
    if isinstance(value, str):
        return None if _is_blank(value) else value
    several = value if isinstance(value, list) else [value]
    texts = [text for text in several if not _is_blank(text)]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{file}: the caption of {key} is {value!r:.80}, expected text or a list "
                         "of texts")  # fmt: skip
    return texts or None


class Items:
    """What an annotation file says of a split, in the order of its paths."""

    def __init__(self, file, kinds):
        said = _read_json(file, dict)
        self.file = file
        self.keys = sorted(said)  # neither the file's order nor the disk's
        self.labels = []
        self.captions = []
        self.prompts = {}  # of a label
        self.blank = 0  # items whose caption was looked for in another kind, for it was blank
        self.bare = 0  # items that have no caption but the class prompt
        for key in self.keys:
            if key.startswith("/") or ".." in key.split("/"):
                raise ValueError(f"{file} lists {key}, which is outside the dataset's folder")
            item = said[key]
            target = item.get("target") if isinstance(item, dict) else None
            if type(target) is not int or not 0 <= target < 2**31:
                raise ValueError(f"{file}: the target of {key} is {target!r:.80}, "
                                 "expected a class's number")  # fmt: skip
            self.labels.append(target)
            self.captions.append(self._caption(key, item, kinds))
            prompt = item.get("primer_caption")
            if isinstance(prompt, str) and not _is_blank(prompt):
                self.prompts[target] = prompt

    def _caption(self, key, item, kinds):
        """The first that says something. One of several that are blank in part is counted, too."""
        passed = False
        for kind in kinds:
            value = item.get(kind)
            if value is None:
                continue
            caption = _said(self.file, key, value)
            if caption is None or (isinstance(value, list) and len(caption) < len(value)):
                passed = True
            if caption is not None:
                self.blank += passed
                self.bare += kind == "primer_caption"
                return caption
        raise ValueError(f"{self.file}: the caption of {key} is blank in every kind that it has, "
                         "expected text or a list of texts")  # fmt: skip


def _members(tars, which, found):
    """Members of what Tar found of each, in the tars of these numbers."""
    places = [(tar, offset, size) for tar, (offset, size, _) in zip(which, found)]
    holes = {i: pieces for i, (_, _, pieces) in enumerate(found) if pieces}
    return Members(tars, np.array(places, np.int64).reshape(-1, 3), holes)


def _find_split(info, name, places, split, kinds):
    """-> Items, the Folder or Tar of their pictures, what it finds of each; None: not annotated.

    places: functions that return a Folder or Tar, since reading a tar takes time.
    """
    absent = None
    for suffix in SPLITS[split]:
        file = info / f"{name}_{suffix}.json"
        if not file.exists():
            continue
        items = Items(file, kinds)
        for open_place in places:
            place = open_place()
            found = [place.find(key) for key in items.keys]
            missing = [key for key, at in zip(items.keys, found) if at is None]
            if not missing:
                return items, place, found
            absent = FileNotFoundError(
                f"{file} lists {missing[0]}, which is not in {place.path} "
                f"({len(missing)} of {len(found)} are missing)"
            )
            if len(missing) < len(found):  # some are there, so these are meant
                raise absent
    if absent:
        raise absent
    return None


def _class_names(file, splits):
    """-> class names and the prompt of each, of the annotations."""
    classes = _read_json(file, list) if file.exists() else []
    odd = [c for c in classes if not isinstance(c, str)]
    if odd:
        raise ValueError(f"{file}: class names must be texts, got {odd[0]!r:.80}")
    prompts = list(classes)
    for items, _, _ in splits:
        if not classes:
            continue
        worst = max(range(len(items.labels)), key=items.labels.__getitem__, default=None)
        if worst is not None and items.labels[worst] >= len(classes):
            raise ValueError(f"{items.file}: target {items.labels[worst]} of {items.keys[worst]} "
                             f"is outside the {len(classes)} classes of {file}")  # fmt: skip
        for label, prompt in items.prompts.items():
            prompts[label] = prompt
    return classes, prompts


def _with_prompts(items, classes, prompts):
    """The captions, the class prompt one of several."""
    captions = []
    for caption, label in zip(items.captions, items.labels):
        several = [caption] if isinstance(caption, str) else caption
        captions.append([*several, prompts[label]] if classes else several)
    return captions


def _remarks(info, name, items, captions):
    """What a reader of the run has to know of a training split's captions."""
    notes = []
    if items.blank:
        notes.append(f"{name}: {items.blank} of {len(items.keys)} training captions are blank or "
                     "NaN, wholly or in part; the next kind was taken")  # fmt: skip
    if items.keys and items.bare == len(items.keys) and captions != "prompt":
        notes.append(f"{name}: its {len(items.keys)} training pictures have no captions but class "
                     "prompts")  # fmt: skip
        better = [info / f"{name}_{s}.json" for s in SPLITS["train"] if s.endswith("_224")]
        better = [file.name for file in better if file.exists() and file != items.file]
        if better:
            notes[-1] += f"; {better[0]} has captions, but the pictures it lists are not there"
    return notes


def _read_dataset(root, info, name, captions, prompts_too):
    """One annotated dataset, for the index: head, arrays, and what they were made from."""
    disk = Folder(root)
    folder_name = disk.find(name, False)
    tar_name = disk.find(f"{name}.tar")
    folder = Folder(root / (folder_name or name))
    places = [lambda: folder] if folder_name else []
    places += [lru_cache(lambda: Tar(root / tar_name))] if tar_name else []
    kinds = {"train": dict.fromkeys([CAPTIONS[captions], *KINDS]), "test": KINDS}
    splits = {s: _find_split(info, name, places, s, kinds[s]) for s in SPLITS}
    splits = {s: found for s, found in splits.items() if found}
    file = info / f"{name}_classnames.json"
    classes, prompts = _class_names(file, reversed(splits.values()))
    head = {"classes": classes, "prompts": prompts, "notes": [], "splits": {}}
    filled = {split: items for split, (items, _, _) in splits.items() if items.keys}
    scored = filled.get("test") or filled.get("train")  # train if --validation takes from it
    head["retrieval"] = not classes or scored is None or not scored.prompts
    arrays = {}
    for split, (items, place, found) in splits.items():
        texts = items.captions
        if split == "train":
            head["notes"] += _remarks(info, name, items, captions)
            texts = _with_prompts(items, classes, prompts) if prompts_too else texts
        said, packed = _packed(place.split(items, found, texts), f"{split}-")
        head["splits"][split] = said
        arrays |= packed
    annotations = [info / f"{name}_{s}.json" for s in (*SPLITS["train"], *SPLITS["test"])]
    made_from = {*annotations, file, folder.path, root / (tar_name or f"{name}.tar")}
    return head, arrays, sorted(map(str, made_from | folder.folders()))


def _is_dataset(path):
    """Whether it may be one: a tar, or a folder and not of JSON alone, as those of streams are."""
    if not path.is_dir():
        return path.suffix == ".tar"
    names = os.listdir(path)
    return not names or not all(name.endswith(".json") for name in names)


def _annotated(info):
    """Names of the datasets that 00_info describes."""
    form = re.compile(r"(.+?)_(train|train_mini|test|val)(_224)?")
    matches = [form.fullmatch(path.stem) for path in info.glob("*.json")]
    return {match[1] for match in matches if match}


def _fomo_sets(root, names=None, also=(), captions="default", prompts_too=False, cache=None):
    """-> datasets by name and notes, of FoMo-in-Flux's layout."""
    root = Path(root).resolve()
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder, of <DATASET>/ or <DATASET>.tar")
    if captions not in CAPTIONS:
        raise ValueError(f"unknown captions {captions!r}; there are: {', '.join(CAPTIONS)}")
    info = next((p for p in (root / "00_info", root.parent / "00_info") if p.is_dir()), None)
    if info is None:
        raise FileNotFoundError(f"{root / '00_info'} is not there: the annotations, "
                                "<DATASET>_train.json and so on")  # fmt: skip
    annotated = _annotated(info)
    disk = {_same_form(p.name.removesuffix(".tar")) for p in root.iterdir() if _is_dataset(p)}
    there = sorted(n for n in annotated if _same_form(n) in disk)
    notes = []
    absent = sorted(annotated - set(there))
    if absent and names is None:
        notes.append(f"annotated in {info} but not in {root}, so left out: {', '.join(absent)}")
    foreign = sorted(disk - {_same_form(n) for n in annotated})
    if foreign and names is None:
        notes.append(f"in {root} but not annotated in {info}, so left out: {', '.join(foreign)}")
    wanted = dict.fromkeys(_spelt([*(there if names is None else names), *also], there))
    for name in wanted:
        if name not in there:
            raise FileNotFoundError(f"no dataset {name} in {root}; "
                                    f"there are: {', '.join(there) or 'none'}")  # fmt: skip
    sets = {}
    for name in tqdm(wanted, "reading", leave=False, disable=None):
        key = [str(root), str(info), name, captions, prompts_too]
        head, arrays = _indexed(
            cache, key, lambda name=name: _read_dataset(root, info, name, captions, prompts_too)
        )
        parts = [_unpacked(head["splits"][s], arrays, f"{s}-") if s in head["splits"]
                 else Files(root / name, None, [], [], []) for s in SPLITS]  # fmt: skip
        kind = "retrieval" if head["retrieval"] else "classification"
        sets[name] = Dataset(name, kind, head["classes"], head["prompts"], *parts)
        notes += [note for note in head["notes"] if note not in notes]
    return sets, notes


def fomo_in_flux(root, names=None, heldout=None, pool=(), prompts_too=False, captions="default",
                 cache=None):  # fmt: skip
    """World from FoMo-in-Flux's layout.

    names: the datasets, by default all that are both annotated and there. heldout: those never
    trained on, by default the paper's 22. pool: those whose training split is the pretraining pool.
    captions: a key of CAPTIONS. prompts_too: a training picture's class prompt is one of its
    captions, for captions that name no class. cache: folder of the index, for a fast next time.
    FileNotFoundError or ValueError in a sentence if anything is missing, torn or not text.
    """
    also = [*pool, *(heldout or ())]
    sets, notes = _fomo_sets(root, names, also, captions, prompts_too, cache)
    return _world(sets, notes, heldout, pool, names)


def _world(sets, notes, heldout=None, pool=(), names=None):
    """World of datasets by name; roles as in fomo_in_flux. names: those adapted to or scored."""
    pool = _spelt(pool, sets)
    held = _spelt(HELD_OUT if heldout is None else heldout, sets)
    asked = [*_spelt(names or (), sets), *(held if heldout is not None else ())]
    for name in [*pool, *asked]:
        if name not in sets:
            shards = "; shards are named as in 'folder/*.tar'" if name in pool else ""
            there = ", ".join(sets) or "none"
            role = " to hold out" if name in held else ""
            raise FileNotFoundError(f"there is no dataset {name}{role}; there are: {there}{shards}")
    world = World([], [], notes=list(notes))
    for name in dict.fromkeys(asked if names is not None else [*sets, *asked]):
        d = sets[name]
        if len(d.test):
            (world.heldout if name in held else world.adaptation).append(d)
        elif name in asked:
            raise FileNotFoundError(f"{name} has no test pictures to be scored on: leave it out, "
                                    "or score on training pictures: --validation .2")  # fmt: skip
        elif name not in pool:
            world.notes.append(f"{name} has no test pictures to be scored on, so it is left out")
    for d in world.adaptation + world.heldout:
        if d.kind == "classification" and len(d.classes) == 1:
            raise ValueError(f"{d.name} holds one class, {d.classes[0]!r}: scoring takes two or "
                             "more, each in a folder of its own")  # fmt: skip
    if not world.adaptation and not world.heldout:
        raise ValueError("no dataset has test pictures; "
                         "--validation .2 scores on training pictures")  # fmt: skip
    if pool:
        world.pool = Concat(sets[n].train for n in dict.fromkeys(pool))
        if not len(world.pool):
            raise ValueError(f"the pool, {', '.join(pool)}, has no training sample")
    return world


# --------------------------------------------------------------------------------- class folders

TEMPLATE = "A photo of a {}."
TRAIN = ("train", "training")
TEST = ("test", "testing", "val", "valid", "validation")  # the first that is there


def _prompts(template, classes):
    """The template's one {} filled with each class name, underscores as blanks."""
    try:
        fields = [f for _, f, _, _ in string.Formatter().parse(template) if f is not None]
        named = next((f for f in fields if f), None)
        fault = f"has the unknown field {{{named}}}" if named else f"has {len(fields)} times {{}}"
        if fields == [""]:
            return [template.format(name.replace("_", " ")) for name in classes]
    except ValueError as e:
        fault = f"cannot be read ({e})"
    raise ValueError(f"the template {template!r} {fault}: it takes one {{}}, where the class name "
                     f"stands, as in {TEMPLATE!r}")  # fmt: skip


def _pictures_below(folder):
    """Pictures in a folder and those within it, as sorted relative paths."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        inside = os.path.relpath(place, folder)
        kept = [f for f in files if f.lower().endswith(SUFFIXES) and not f.startswith(".")]
        found += [posixpath.normpath(posixpath.join(inside, f)) for f in sorted(kept)]
    return found


def _subfolders(folder):
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _split_folders(root):
    """-> the names of root's folders for training and testing, None where there is none, and of
    those that are for testing, too, and not the first."""
    there = {name.lower(): name for name in _subfolders(root)}
    train = next((there[n] for n in TRAIN if n in there), None)
    tests = [there[n] for n in TEST if n in there] or [None]
    return [train, tests[0]], tests[1:]


def _name_of(folder):
    """Of a dataset or class: the folder's name as text, whatever bytes and form the disk has."""
    return _same_form(os.fsencode(folder).decode("utf-8", "replace"))


def _folder_set(name, root, template):
    """One dataset of root/{train,test}/<class>/*."""
    places = [place and root / place for place in _split_folders(root)[0]]
    below = [_subfolders(place) if place else [] for place in places]
    classes = sorted({_name_of(folder) for folder in chain(*below)})
    if not classes:
        raise ValueError(f"{root} has no folders of classes below train/ and test/")
    prompts = _prompts(template, classes)
    splits = []
    for place, found in zip(places, below):
        paths = []
        labels = []
        for folder in found:
            within = [f"{folder}/{path}" for path in _pictures_below(place / folder)]
            paths += within
            labels += [classes.index(_name_of(folder))] * len(within)
        if place and not paths:
            raise ValueError(f"{place} holds no picture in a folder of its class "
                             f"({', '.join(SUFFIXES)})")  # fmt: skip
        splits.append(Files(place or root, None, paths, labels, [prompts[k] for k in labels]))
    return Dataset(name, "classification", classes, prompts, *splits)


def _folder_sets(root, template=TEMPLATE):
    root = Path(root).resolve()
    candidates = {root.name: root}
    if not any(_split_folders(root)[0]):
        candidates = {name: root / name for name in _subfolders(root)}
    sets = {}
    others = []
    notes = []
    for name, folder in candidates.items():
        found, unused = _split_folders(folder)
        if any(found):
            sets[_name_of(name)] = _folder_set(_name_of(name), folder, template)
        else:
            others.append(name)
        if unused:
            notes.append(f"{folder}: {found[1]} is for testing, {', '.join(unused)} left out")
    if not sets:
        raise FileNotFoundError(f"{root} holds neither train/<class>/ and test/<class>/ nor "
                                "folders <DATASET> that do")  # fmt: skip
    if others:
        notes.append(f"in {root} but without train/ or test/, so left out: {', '.join(others)}")
    what = f"class folders, {_count(len(sets), 'dataset')}; captions are prompts, {template!r}"
    return sets, [f"{root}: {what}", *notes]


def folders(root, template=TEMPLATE, heldout=None, pool=()):
    """World from root/<DATASET>/{train,test}/<class>/* or root/{train,test}/<class>/*.

    test may be called val. Captions and prompts are the template's.
    """
    return _world(*_folder_sets(root, template), heldout, pool)


# ---------------------------------------------------------------------------------------- tables


def _table_rows(path):
    """-> a table's column names, in small letters, and its rows: line, cells by column."""
    mark = "\t" if path.suffix.lower() == ".tsv" else ","
    named = "tabs" if mark == "\t" else "commas"
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            reader = csv.reader(f, delimiter=mark, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            cells = [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there") from None
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} cannot be read as a table in UTF-8: {e}") from None
    except csv.Error as e:
        raise ValueError(f"{path}, line {reader.line_num}: {e}; a text that holds quotes stands in "
                         "quotes, its own doubled") from None  # fmt: skip
    if "filepath" not in header:
        found = ", ".join(header) or "none at all"
        raise ValueError(f"{path} has no column filepath, but {found}; its first line should name "
                         f"the columns, divided by {named}")  # fmt: skip
    if not {"title", "caption"} & set(header):
        raise ValueError(f"{path} has no column title or caption, but {', '.join(header)}: add one "
                         "with the captions")  # fmt: skip
    if not cells:
        raise ValueError(f"{path} has no rows below its header")
    for line, row in cells:
        if any(row[len(header) :]):
            raise ValueError(f"{path}, line {line} has {len(row)} cells for {len(header)} columns: "
                             f"a text that holds {named} stands in quotes")  # fmt: skip
    return header, [(line, dict(zip(header, row))) for line, row in cells]


def _table_splits(path, rows):
    """-> of each row "train", "test", or the name of a further split."""
    said = [(row.get("split") or "train").strip().lower() for _, row in rows]
    for (line, _), name in zip(rows, said):
        if name not in TRAIN + TEST:
            raise ValueError(f"{path}, line {line}: its split is {name!r}, not train or test")
    test = next((name for name in TEST if name in said), None)
    return ["train" if name in TRAIN else "test" if name == test else name for name in said]


def _table_classes(path, header, rows):
    """-> of each row its class's name, None where there is no column class."""
    if "class" not in header:
        return [None] * len(rows)
    nameless = [line for line, row in rows if _is_blank(row.get("class"))]
    if nameless:
        raise ValueError(f"{path}, line {nameless[0]}: its class is blank ({len(nameless)} in all)")
    return [_same_form(row["class"].strip()) for _, row in rows]


def _table_sets(path, template=TEMPLATE, held=None):
    path = Path(path).resolve()
    header, rows = _table_rows(path)
    notes = [f"{path}: a table of {_count(len(rows), 'row')}"]
    splits = _table_splits(path, rows)
    for name, n in Counter(splits).items():
        if name not in ("train", "test"):
            notes.append(f"{path}: test is for testing, {_count(n, 'row')} of {name} left out")
    named = _table_classes(path, header, rows)
    classed = "class" in header
    classes = sorted(set(named)) if classed else [path.stem]
    prompts = _prompts(template, classes)
    number = {name: k for k, name in enumerate(classes)}
    columns = [name for name in ("caption", "title") if name in header]
    samples = {"train": {}, "test": {}}  # file -> label, captions
    blank = 0
    for (line, row), split, name in zip(rows, splits, named):
        if split not in samples:
            continue
        file = (row["filepath"] or "").strip()
        label = number[name] if classed else 0
        texts = [row[c] for c in columns if not _is_blank(row.get(c))]
        blank += _is_blank(row.get(columns[0]))
        if classed:
            texts.append(prompts[label])
        known, captions = samples[split].setdefault(file, (label, []))
        if known != label:
            raise ValueError(f"{path}, line {line}: {file} is of two classes, {classes[known]} and "
                             f"{classes[label]}")  # fmt: skip
        captions += texts[:1]
    if blank:
        instead = [f"the {name}" for name in [*columns[1:], *(["class prompt"] if classed else [])]]
        instead = f"{' or '.join(instead)} stands in" if instead else "these are left out"
        notes.append(f"{path}: {blank} of {len(rows)} captions are blank or NaN; {instead}")
    found = [_table_split(path, samples[split]) for split in samples]
    kind = "classification" if classed else "retrieval"
    dataset = Dataset(path.stem, kind, classes, prompts, *found)
    if not classed:
        notes.append(f"{path} has no column class: it is one concept, for one task (--tasks 1)")
    if "split" not in header:
        notes.append(f"{path} has no column split: up to a fifth of each class is for testing")
        dataset = _validated(dataset, 0.2, held)
    return {path.stem: dataset}, notes


def _table_split(path, samples):
    chosen = {file: sample for file, sample in samples.items() if sample[1]}
    disk = Folder(path.parent)
    found = [disk.find(file) for file in chosen]
    missing = [file for file, at in zip(chosen, found) if at is None]
    if missing:
        number = f"{len(missing)} of {len(chosen)} are missing"
        raise FileNotFoundError(f"{path} lists {missing[0]!r}, which is not there seen from "
                                f"{path.parent} ({number})")  # fmt: skip
    labels = [label for label, _ in chosen.values()]
    captions = [texts[0] if len(texts) == 1 else texts for _, texts in chosen.values()]
    return Files(path.parent, None, found, labels, captions)


def table(path, template=TEMPLATE, heldout=None, pool=()):
    """World of one dataset from a .csv or .tsv with a header: filepath, title or caption, and where
    known class and split (train, test). Paths are seen from the table's folder. A picture in
    several rows has several captions. Without a column class it is one concept, for retrieval."""
    return _world(*_table_sets(path, template), heldout, pool)


# ------------------------------------------------------------------------ torchvision's formats

# name in torchvision -> name in the paper, template, the arguments of its training and test split;
# where there is one split only, three tenths of each class are for testing, about as in the paper
TORCHVISION = {
    "CIFAR100": ("CIFAR100", "A photo of a {}.", {"train": True}, {"train": False}),
    "Country211": ("COUNTRY211", "A photo representing the country of {}.", {"split": "train"},
                   {"split": "test"}),
    "DTD": ("DTD", "A photo of a {} texture.", {"split": "train"}, {"split": "test"}),
    "FGVCAircraft": ("FGVCAircraft", "A photo of a {}, a type of aircraft.", {"split": "train"},
                     {"split": "test"}),
    "Flowers102": ("FLOWERS102", "A photo of a {}, a type of flower.", {"split": "test"},
                   {"split": "train"}),  # the paper, too, trains on the larger
    "SUN397": ("SUN397", "A photo of a {}.", {}),
    "Caltech101": ("CALTECH101", "A photo of a {}.", {}),
    "Caltech256": ("CALTECH256", "A photo of a {}.", {}),
    "CIFAR10": ("CIFAR10", "A photo of a {}.", {"train": True}, {"train": False}),
    "EuroSAT": ("EuroSAT", "A centered satellite photo of a {}.", {}),
    "FashionMNIST": ("FashionMNIST", "A black-and-white photo of a {}, a type of clothing.",
                     {"train": True}, {"train": False}),
    "Food101": ("Food101", "A photo of a {}, a type of food.", {"split": "train"},
                {"split": "test"}),
    "GTSRB": ("GTSRB", 'A centered photo of a "{}" traffic sign.', {"split": "train"},
              {"split": "test"}),
    "MNIST": ("MNIST", 'A black-and-white photo of the number: "{}".', {"train": True},
              {"train": False}),
    "OxfordIIITPet": ("OXFORDPETS", "A photo of a {}, a type of pet.", {"split": "trainval"},
                      {"split": "test"}),
    "STL10": ("STL10", "A photo of a {}.", {"split": "train"}, {"split": "test"}),
    "SVHN": ("SVHN", 'A photo of the number: "{}".', {"split": "train"}, {"split": "test"}),
}  # fmt: skip
SIGNS = [  # GTSRB's classes have numbers alone
    "speed limit 20", "speed limit 30", "speed limit 50", "speed limit 60", "speed limit 70",
    "speed limit 80", "end of speed limit 80", "speed limit 100", "speed limit 120", "no passing",
    "no passing for trucks", "right of way at the next crossing", "priority road", "yield", "stop",
    "no vehicles", "no trucks", "no entry", "danger", "curve to the left", "curve to the right",
    "double curve", "bumpy road", "slippery road", "road narrows on the right", "road works",
    "traffic lights", "pedestrians", "children crossing", "bicycles crossing", "ice or snow",
    "wild animals", "end of all limits", "turn right ahead", "turn left ahead", "straight ahead",
    "straight or right", "straight or left", "keep right", "keep left", "roundabout",
    "end of no passing", "end of no passing for trucks",
]  # fmt: skip


class _Plain(pickle.Unpickler):
    """Reads CIFAR's pickles, of arrays and lists, and runs nothing else that a file names."""

    NAMES = ("_reconstruct", "ndarray", "dtype", "encode", "scalar", "_frombuffer")

    def find_class(self, module, name):
        if module.partition(".")[0] in ("numpy", "_codecs") and name in self.NAMES:
            return super().find_class(module, name)
        raise ValueError(f"it asks for {module}.{name}, which is not data")


class _Cifar:
    """CIFAR10's and 100's own format, as torchvision's classes hold it once they are read."""

    def __init__(self, root, name, train):
        folder, files, labels, meta, names = {
            "CIFAR10": ("cifar-10-batches-py", "data_batch_*" if train else "test_batch", "labels",
                        "batches.meta", "label_names"),
            "CIFAR100": ("cifar-100-python", "train" if train else "test", "fine_labels", "meta",
                         "fine_label_names"),
        }[name]  # fmt: skip
        batches = [self._read(file) for file in sorted((Path(root) / folder).glob(files))]
        if not batches:
            raise FileNotFoundError(f"{Path(root) / folder / files} is not there")
        self.data = np.concatenate([b["data"] for b in batches]).reshape(-1, 3, 32, 32)
        self.targets = [label for b in batches for label in b[labels]]
        self.classes = self._read(Path(root) / folder / meta)[names]

    def _read(self, file):
        with open(file, "rb") as f:
            try:
                return _Plain(f, encoding="latin1").load()
            except (pickle.UnpicklingError, ValueError, EOFError) as e:
                raise OSError(f"{file} is not one of CIFAR's pickles: {e}") from None


def _torchvision_set(root, name, options, download):
    make = getattr(torchvision.datasets, name)
    if name.startswith("CIFAR"):
        if download:  # checks the sums, too
            make(str(root), download=True, **options)
        return _Cifar(root, name, **options)
    if not download:  # people's own data in this format have other check sums
        make = type(name, (make,), {"_check_integrity": lambda self: True})
    return make(str(root), download=download, **options)


def _torchvision_split(root, name, dataset, prompts):
    """Pictures, or Files in the order of their paths."""
    labels = next(getattr(dataset, a) for a in ("targets", "_labels", "labels", "y", "_samples")
                  if hasattr(dataset, a))  # fmt: skip
    labels = np.asarray([k[1] if isinstance(k, tuple) else k for k in labels], np.int64)
    captions = [prompts[k] for k in labels]
    if hasattr(dataset, "data"):
        pixels = np.asarray(dataset.data)
        if pixels.ndim == 3:  # grey
            pixels = np.repeat(pixels[..., None], 3, axis=3)
        elif pixels.shape[3] != 3:
            pixels = pixels.transpose(0, 2, 3, 1)
        return Pictures(pixels, labels, captions)
    if name.startswith("Caltech"):
        number = name.removeprefix("Caltech")
        place = Path(dataset.root) / f"{number}_ObjectCategories"
        start = "image" if number == "101" else None
        paths = [place / dataset.categories[y] / f"{start or f'{y + 1:03}'}_{k:04}.jpg"
                 for y, k in zip(dataset.y, dataset.index)]  # fmt: skip
    else:
        paths = next(getattr(dataset, a) for a in ("_image_files", "_images", "samples", "_samples")
                     if hasattr(dataset, a))  # fmt: skip
        paths = [p[0] if isinstance(p, tuple) else p for p in paths]
    paths = [os.path.relpath(path, root) for path in paths]
    ranks = sorted(range(len(paths)), key=paths.__getitem__)  # SUN397's come in the disk's order
    return Files(root, None, [paths[i] for i in ranks], labels[ranks], [captions[i] for i in ranks])


def _torchvision_classes(name, dataset):
    if name == "GTSRB":
        return list(SIGNS)
    if name == "SVHN":
        return list("0123456789")
    classes = getattr(dataset, "classes", None) or dataset.categories
    if name == "Caltech256":
        classes = [c.partition(".")[2].removesuffix("-101") for c in classes]  # "001.ak47"
    if name == "MNIST":
        classes = [c.partition(" ")[0] for c in classes]  # "0 - zero"
    return [c.replace("_", " ").replace("/", " ").strip() for c in classes]


def _torchvision_dataset(root, name, download):
    folder, template, *parts = TORCHVISION[name]
    found = [_torchvision_set(root, name, options, download) for options in parts]
    classes = _torchvision_classes(name, found[0])
    prompts = _prompts(template, classes)
    splits = [_torchvision_split(root, name, one, prompts) for one in found]
    kind = "classification"
    if len(splits) == 2:
        return Dataset(folder, kind, classes, prompts, *splits)
    return _validated(Dataset(folder, kind, classes, prompts, *splits, Subset(splits[0], [])), 0.3)


def _torchvision_sets(root, names, download=False):
    if len(set(names)) < len(names):
        raise ValueError(f"torchvision:{','.join(names)} names two datasets {_twice(names)}")
    sets = []
    for name in names:
        if name not in TORCHVISION:
            raise ValueError(f"torchvision:{name} is unknown; there are: {', '.join(TORCHVISION)}")
        try:
            sets.append(_torchvision_dataset(root, name, download))
        except ImportError as e:
            raise ValueError(f"torchvision's {name} needs the package {e.name}") from None
        except (RuntimeError, OSError, ValueError, LookupError, TypeError) as e:
            fault = str(e).partition("\n")[0] or type(e).__name__
            advice = "is the network there?" if download else "--download fetches it"
            raise FileNotFoundError(f"torchvision's {name} cannot be read below {root} ({fault}); "
                                    f"{advice}") from None  # fmt: skip
    notes = [f"torchvision's {', '.join(names)} below {root}; captions are prompts"]
    return {dataset.name: dataset for dataset in sets}, notes


def torchvision_sets(root, names, download=False, heldout=None, pool=()):
    """World from datasets of torchvision's, by its names, in its formats below root."""
    return _world(*_torchvision_sets(root, names, download), heldout, pool)


# ---------------------------------------------------------------------------------------- shards


def _shard_files(pattern):
    """Files of a pattern with {000..331} or {a,b}, *, ? and [], in order."""
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if brace:
        numbers = re.fullmatch(r"(\d+)\.\.(\d+)", brace[1])
        choices = brace[1].split(",")
        if numbers:
            width = len(numbers[1]) if numbers[1].startswith("0") else 0
            choices = [f"{k:0{width}}" for k in range(int(numbers[1]), int(numbers[2]) + 1)]
        patterns = [pattern[: brace.start()] + c + pattern[brace.end() :] for c in choices]
        return [file for p in patterns for file in _shard_files(p)]
    path = os.path.expanduser(pattern)
    files = [path] if os.path.exists(path) else sorted(glob.glob(path))
    if not files:
        raise FileNotFoundError(f"there is no shard {pattern}")
    return files


def _shard_caption(path, key, texts):
    """The caption in key.txt or, if that is blank, in key.json; "" if all are blank."""
    with open(path, "rb", buffering=0) as f:
        for suffix in ("txt", "json"):
            if suffix not in texts:
                continue
            offset, size, _ = texts[suffix]
            text = os.pread(f.fileno(), size, offset)
            try:
                said = text.decode("utf-8-sig").strip()
                if suffix == "json":
                    said = json.loads(said).get("caption")
            except (ValueError, AttributeError) as e:
                raise ValueError(f"{path}: {key}.{suffix} holds no caption ({e})") from None
            caption = _said(path, key, said)
            if caption:
                return caption
    return ""


def _read_shards(files):
    """For the index: head, arrays and what they were made from."""
    tars = []
    names = []
    captions = []
    which = []
    places = []
    blank = 0
    for number, path in enumerate(tqdm(files, "indexing shards", leave=False, disable=None)):
        tar = Tar(path)
        tars.append([str(path), tar.stamp])
        samples = {}  # key -> suffix -> place
        for name, place in tar.files.items():
            folder, base = posixpath.split(name)
            stem, _, suffix = base.partition(".")
            if not base.startswith("."):  # as what macOS adds
                samples.setdefault(posixpath.join(folder, stem), {})[suffix.lower()] = place
        for key, parts in samples.items():
            picture = next((s for s in parts if f".{s}" in SUFFIXES), None)
            if picture is None:
                continue
            if not {"txt", "json"} & set(parts):
                raise ValueError(f"{path} holds {key}.{picture} and no {key}.txt or {key}.json "
                                 "with its caption")  # fmt: skip
            caption = _shard_caption(path, key, parts)
            if not caption:
                blank += 1
                continue
            names.append(f"{key}.{picture}")
            captions.append(caption)
            which.append(number)
            places.append(parts[picture])
    files_split = Files("", _members(tars, which, places), names, [0] * len(names), captions)
    head, arrays = _packed(files_split, "")
    notes = []
    if blank:
        notes.append(f"{blank} pictures of {files[0]} and so on have a blank caption: left out")
    return {"split": head, "notes": notes}, arrays, files


def _shards(pattern, cache=None):
    files = [os.path.abspath(f) for f in _shard_files(str(pattern))]
    if not files:
        raise FileNotFoundError(f"the pattern {pattern} stands for no shard")
    head, arrays = _indexed(cache, ["shards", *files], lambda: _read_shards(files))
    split = _unpacked(head["split"], arrays, "")
    if not len(split):
        raise ValueError(f"the shards {pattern} hold no picture with a caption")
    return split, head["notes"]


def shards(pattern, cache=None):
    """Split from WebDataset tars of key.jpg (png, ...) and key.txt, or key.json with "caption".

    pattern: '{00000..00331}.tar', a glob, or one file. cache: folder of the index.
    """
    return _shards(pattern, cache)[0]


# ------------------------------------------------------------------------------------- any source


def _validated(dataset, share, held=None):
    """The dataset scored on a share of each class's training pictures, at least one of a class that
    has two, not trained on these, nor on any that an earlier task held."""
    rng = np.random.default_rng((7, zlib.crc32(dataset.name.encode())))
    labels = dataset.train.labels
    shuffled = rng.permutation(len(labels))
    known = np.isin(shuffled, located(held, [dataset])[1])
    by_class = np.lexsort((known, labels[shuffled]))  # each shuffled, what was held last
    shuffled = shuffled[by_class]
    _, starts, counts = np.unique(labels[shuffled], return_index=True, return_counts=True)
    places = np.arange(len(labels)) - np.repeat(starts, counts)  # of each within its class
    wanted = np.maximum(np.floor(counts * share), counts > 1)
    chosen = (places < np.repeat(wanted, counts)) & ~known[by_class]
    if not chosen.any():
        unheld = " that no earlier task held" if known.any() else ""
        raise ValueError(f"{dataset.name} has no class of two training pictures{unheld}, so that "
                         "none can be kept to score on")  # fmt: skip
    train = Subset(dataset.train, np.sort(shuffled[~chosen]))
    test = Subset(dataset.train, np.sort(shuffled[chosen]))
    return Dataset(dataset.name, dataset.kind, dataset.classes, dataset.prompts, train, test)


def _sets_of(spec, options):
    """-> datasets by name and notes, of one thing that --data may say."""
    template = options["template"]
    if spec.startswith("torchvision:"):
        root, _, wanted = spec.removeprefix("torchvision:").rpartition("/")
        root = Path(root or Path(options["cache"] or "~/.cache/fomo") / "torchvision").expanduser()
        return _torchvision_sets(root, re.split(r"\s*,\s*", wanted), options["download"])
    path = Path(spec).expanduser()
    if path.suffix.lower() in (".csv", ".tsv"):
        return _table_sets(path, template, options["held"])
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder and no .csv or .tsv; --data takes those, or "
                                "torchvision:NAME,NAME, and --pool shards")  # fmt: skip
    path = path.resolve()
    above = {_same_form(name) for name in _annotated(path.parent / "00_info")}
    disk = {_same_form(name.removesuffix(".tar")) for name in os.listdir(path)}
    if (path / "00_info").is_dir() or disk & above:
        fomo = options["captions"], options["prompts_too"], options["cache"]
        sets, notes = _fomo_sets(path, None, (), *fomo)
        return sets, [f"{path}: FoMo-in-Flux's layout, {_count(len(sets), 'dataset')}", *notes]
    try:
        return _folder_sets(path, template)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is no data known here. There should be 00_info/ with <DATASET>_test.json "
            "beside <DATASET>/ or <DATASET>.tar; or train/<class>/ and test/<class>/, or folders "
            "<DATASET>/ with those; or name a table, .csv or .tsv"
        ) from None


def _all_sets(sources, options, grows):
    """-> datasets by name and notes, of all sources."""
    sets = {}
    notes = []
    for source in sources:
        found, said = _sets_of(str(source), options)
        notes += said
        for name, d in found.items():
            if name in sets and not grows:
                raise ValueError(f"{source} holds a dataset {name}, and so does another source of "
                                 "--data: rename one, or leave one out")  # fmt: skip
            sets[name] = _grown(sets[name], d) if name in sets else d
    return sets, notes


def _grown(one, other):
    """A dataset and what another of its name adds: classes, and samples that the first lacks."""
    if one.kind != other.kind:
        raise ValueError(f"there are two datasets {one.name}, one for {one.kind} and one for "
                         f"{other.kind}: rename one")  # fmt: skip
    new = [k for k, name in enumerate(other.classes) if name not in one.classes]
    classes = one.classes + [other.classes[k] for k in new]
    prompts = one.prompts + [other.prompts[k] for k in new]
    alike = one.classes == other.classes  # names may repeat in them
    number = None if alike else np.array([classes.index(name) for name in other.classes], np.int64)
    splits = []
    for old, more in ((one.train, other.train), (one.test, other.test)):
        known = {key: i for i, key in enumerate(old.keys().tolist())}
        same = [known.get(key) for key in more.keys().tolist()]
        ids = [i for i, k in enumerate(same) if k is None or old.raw(k) != more.raw(i)]
        labels = None if alike else number[more.labels[ids]]
        splits.append(Concat([old, Subset(more, ids, labels)]) if ids else old)
    return Dataset(one.name, one.kind, classes, prompts, *splits)


def _are_copies(sets, old, held):
    """Whether some of the held pictures of `old` are in `sets` too, their bytes the same: those are
    the old data in another place, and not only files called alike."""
    for name in sets.keys() & old.keys():
        _, now = located(held, [sets[name]])
        _, then = located(held, [old[name]])
        both = np.flatnonzero((now >= 0) & (then >= 0)).tolist()
        for k in both[:: max(1, len(both) // 100)]:
            if sets[name].train.raw(int(now[k])) == old[name].train.raw(int(then[k])):
                return True
    return False


def open_world(spec, heldout=None, pool=(), captions="default", prompts_too=False,
               template=TEMPLATE, validation=0.0, download=False, cache=None, held=None,
               before=()):  # fmt: skip
    """World of what --data names: a source or a list of them, each of which may be

    a folder in FoMo-in-Flux's layout; class folders (see folders); a .csv or .tsv (see table); or
    torchvision:NAME,NAME, its files below cache/torchvision, torchvision:FOLDER/NAME elsewhere.

    heldout: datasets never trained on; by default those of the paper's 22 that are there. pool:
    datasets whose training split is the pretraining pool, and patterns of shards (*.tar). captions,
    prompts_too, cache: as in fomo_in_flux. template: of prompts that the source does not have.
    validation: score on this share of each training split, which is then not trained on; a dataset
    without one is scored on its test split. Datasets of one name in two sources are refused. notes
    of the World say what was found and what was left out.

    held: what Mixture.held() gave of an earlier run, whose sources were `before`. Then datasets of
    one name are one, and a source adds to those named before it what they lack. Where spec names
    none of these sources and holds none of their samples, those that are still there are opened
    too; World.sources are the open ones.
    """
    if not 0 <= validation < 1:
        raise ValueError(f"the share for validation is 0 or more and below 1, got {validation:g}")
    options = {"captions": captions, "prompts_too": prompts_too, "template": template,
               "download": download, "cache": cache, "held": held}  # fmt: skip
    sources = [spec] if isinstance(spec, (str, os.PathLike)) else list(spec)
    sets, notes = _all_sets(sources, options, held is not None)
    if held is not None and not set(before) & set(map(str, sources)):
        there = [s for s in before if s.startswith("torchvision:") or Path(s).expanduser().exists()]
        old, _ = _all_sets(there, options, True)
        if there and not _are_copies(sets, old, held):
            sources = [*there, *sources]
            sets, notes = _all_sets(sources, options, True)
            notes.append("nothing there was held by an earlier task, so these tasks' own data are "
                         f"opened too: {', '.join(there)}")  # fmt: skip
    if validation:
        bare = [name for name, d in sets.items() if not len(d.train)]
        sets |= {n: _validated(d, validation, held) for n, d in sets.items() if len(d.train)}
        notes.append(f"scores are on {validation:g} of each training split, not trained on")
        if bare:
            notes[-1] += f"; without one, on their test split: {', '.join(bare)}"
    patterns = [p for p in pool if p.endswith(".tar") or set(p) & set("*?{")]
    world = _world(sets, notes, heldout, [p for p in pool if p not in patterns])
    world.sources = sources
    for pattern in patterns:
        split, said = _shards(pattern, cache)
        world.pool = split if world.pool is None else Concat([world.pool, split])
        world.notes += [f"pool: {len(split)} pictures of {pattern}", *said]
    return world


# --------------------------------------------------------------------------------------- streams

TIMES = {  # of the paper's datasets, oldest first. It says their order in time, not their years
    "FLOWERS102": 0, "CIFAR100": 1, "SUN397": 2, "CUB200": 3, "FGVCAircraft": 4, "BIRDSNAP": 5,
    "DTD": 5, "ZAPPOS50k": 5, "MITSTATES": 6, "PLANTVILLAGE": 6, "AI2DIAGRAMS": 7, "OPENIMAGES": 7,
    "CLEVR": 8, "DSPRITES": 8, "FRU92": 8, "PLACES365": 8, "VEG200": 8, "PATTERNNET": 9,
    "SHAPES3D": 9, "DOMAINNET_CLIPART": 10, "DOMAINNET_INFOGRAPH": 10, "DOMAINNET_PAINTING": 10,
    "DOMAINNET_SKETCH": 10, "MVTECAD_Adapt": 10, "MVTECAD_Eval": 10, "OBJECTNET": 10, "CLRS": 11,
    "ISICMELANOMA": 11, "MTSD": 11, "COUNTRY211": 12, "DF20MINI": 12, "iNATURALIST2021": 12,
    "RESISC45": 12, "ARTBENCH10": 13, "DOLLARSTREET": 13, "SNAKECLEF": 13, "FSCOCO": 13,
    "OBSC_ANIMALS": 14, "OBSC_THINGS": 14, "QUILT": 14, "SynthCLIP106": 14,
}  # fmt: skip
ORDERS = {  # how -> what its key is, one a concept
    "random": None,
    "performance": "the loss of theta_0, ascending",
    "frequency": "occurrences in the pretraining captions, rarest first",
    "similarity": "a feature vector, for a path from neighbour to neighbour",
    "time": "the year of its dataset, oldest first",
    "dataset": None,
}


def fresh(datasets, held=None):
    """For each dataset the ids of its training samples that no earlier task held, see
    Mixture.held()."""
    origin, index = located(held, datasets)
    return [np.setdiff1d(np.arange(len(d.train)), index[(origin == k) & (index >= 0)])
            for k, d in enumerate(datasets)]  # fmt: skip


def located(held, datasets):
    """Where the samples that earlier tasks held are now: int16 [M], number of the dataset, -1 if it
    is not among these; int64 [M], id in its training split, -1 if it has gone."""
    if held is None:
        return np.zeros(0, np.int16), np.zeros(0, np.int64)
    origin = np.full(len(held["keys"]), -1, np.int16)
    index = np.full(len(held["keys"]), -1, np.int64)
    for k, d in enumerate(datasets):
        name = _same_form(d.name)
        if name not in held["names"]:
            continue
        mine = held["origin"].numpy() == held["names"].index(name)
        origin[mine] = k
        keys = d.train.keys()
        by_key = np.argsort(keys)
        places = np.searchsorted(keys[by_key], held["keys"].numpy()[mine])
        ids = by_key[np.minimum(places, len(keys) - 1)] if len(keys) else places
        same = keys[ids] == held["keys"].numpy()[mine] if len(keys) else False
        index[mine] = np.where(same, ids, -1)
    return origin, index


def concepts(datasets, held=None):
    """All (dataset name, class name) that have a training sample, the unit of a stream (sec. 3.3).
    held: that have one that no earlier task held, see Mixture.held().

    Within a dataset a stream tells classes apart by their names, so that these must be unique.
    """
    found = []
    for d, ids in zip(datasets, fresh(datasets, held)):
        labels = np.unique(d.train.labels[ids])
        if len(labels) and not d.classes:
            raise ValueError(f"{d.name} has no class names, so a stream cannot name its concepts: "
                             "hold it out, or leave it out")  # fmt: skip
        names = [d.classes[c] for c in labels]
        if len(set(map(_same_form, names))) < len(names):
            twice = _twice(map(_same_form, names))
            raise ValueError(f"{d.name} names {twice!r} more than once, and a stream cannot tell "
                             "them apart: rename one, or hold the dataset out")  # fmt: skip
        found += [(d.name, name) for name in names]
    return found


def order(concepts, how="random", seed=0, key=None, reverse=False):
    """The concepts in an order (sec. 3.3), a pure function of its arguments.

    key: one a concept, as ORDERS says. "frequency" keeps equal class names together; "similarity"
    is the shortest of the greedy nearest-neighbour paths by cosine from every start (of more than
    2,000 concepts, from 64 starts drawn by the seed); "time" pools the datasets of a year and
    shuffles; "dataset" shuffles within each, the datasets in the order of their first concept.
    reverse: the same, backwards.
    """
    if how not in ORDERS:
        raise ValueError(f"unknown order {how!r}; there are: {', '.join(ORDERS)}")
    if ORDERS[how] and (key is None or len(key) != len(concepts)):
        raise ValueError(f"the order {how!r} needs a key for each concept: {ORDERS[how]}")
    shuffled = np.random.default_rng((seed, 2)).permutation(len(concepts)).tolist()
    if how == "random":
        ranks = shuffled
    elif how == "performance":
        ranks = np.argsort(np.asarray(key), kind="stable").tolist()
    elif how == "frequency":
        names = [_same_form(name).lower() for _, name in concepts]
        ranks = sorted(range(len(concepts)), key=lambda i: (key[i], names[i], i))
    elif how == "similarity":
        ranks = _path(np.asarray(key, np.float32), seed)
    elif how == "time":
        ranks = sorted(shuffled, key=lambda i: key[i])
    else:
        names = list(dict.fromkeys(name for name, _ in concepts))
        ranks = sorted(shuffled, key=lambda i: names.index(concepts[i][0]))
    ordered = [concepts[i] for i in ranks]
    return ordered[::-1] if reverse else ordered


def _path(features, seed, most=2000, starts=64):
    """Greedy nearest-neighbour paths over features [N, D]; the ids along the shortest."""
    n = len(features)
    if n == 0:
        return []
    unit = torch.nn.functional.normalize(torch.as_tensor(features), dim=1)
    near = unit @ unit.T  # [N, N] cosine: 18,381 concepts take 1.4 GB
    first = torch.arange(n)
    if n > most:
        first = torch.as_tensor(np.random.default_rng((seed, 6)).permutation(n)[:starts])
    best = None
    for at in first.split(starts):
        rows = torch.arange(len(at))
        seen = torch.zeros(len(at), n, dtype=torch.bool)
        paths = [at]
        length = torch.zeros(len(at), dtype=torch.float64)
        for _ in range(n - 1):
            seen[rows, paths[-1]] = True
            closest, following = near[paths[-1]].masked_fill_(seen, -2).max(dim=1)
            length += 1 - closest.double()
            paths.append(following)
        k = int(length.argmin())
        if best is None or length[k] < best[0]:
            best = length[k], torch.stack(paths)[:, k]
    return best[1].tolist()


def occurrences(concepts, captions):
    """How often each concept's class name occurs in the captions, as whole words of any case."""
    names = [tuple(re.findall(r"\w+", _same_form(name).lower())) for _, name in concepts]
    lengths = {}  # of a name's first word: how long the names are that begin with it
    for words in names:
        if words:
            lengths.setdefault(words[0], set()).add(len(words))
    counts = Counter()
    for caption in tqdm(captions, "counting names in captions", leave=False, disable=None):
        for text in [caption] if isinstance(caption, str) else caption:
            words = re.findall(r"\w+", _same_form(text).lower())
            for i, word in enumerate(words):
                for n in lengths.get(word, ()):
                    counts[tuple(words[i : i + n])] += i + n <= len(words)
    return [counts[words] for words in names]


def times(concepts):
    """When the dataset of each concept appeared, as TIMES has it: the key of the order "time"."""
    unknown = sorted({name for name, _ in concepts if name not in TIMES})
    if unknown:
        raise ValueError(f"the order 'time' is known of the paper's datasets alone, not of "
                         f"{', '.join(unknown)}: take another order, or a --stream")  # fmt: skip
    return [TIMES[name] for name, _ in concepts]


def trainable(stream, world):
    """-> the stream, spelt as the world's names are, without what nobody may or can train on; notes
    of what went."""
    stream = [(_same_form(name), _same_form(c)) for name, c in stream]
    names = {_same_form(d.name) for d in world.adaptation}
    held = {_same_form(d.name) for d in world.heldout}
    own = {(_same_form(d.name), _same_form(c)): (d.name, c)
           for d in world.adaptation for c in d.classes}  # fmt: skip
    kept = [own.get(concept, concept) for concept in stream if concept[0] in names]
    heldout = sum(name in held for name, _ in stream)
    absent = sorted({name for name, _ in stream} - names - held)
    notes = []
    if heldout:
        notes.append(f"{heldout} of the stream's {len(stream)} concepts are of held-out datasets: "
                     "left out")  # fmt: skip
    if absent:
        gone = len(stream) - len(kept) - heldout
        notes.append(f"{gone} of the stream's {len(stream)} concepts are of datasets that are not "
                     f"there: left out, with {', '.join(absent)}")  # fmt: skip
    return kept, notes


def tasks(concepts, n):
    """n contiguous chunks, the first len mod n of them one concept longer."""
    if not concepts:
        raise ValueError("the stream is empty: no concept of a dataset to adapt to has a sample "
                         "(--heldout says which are not, by default the paper's)")  # fmt: skip
    if not 1 <= n <= len(concepts):
        raise ValueError(f"{_count(len(concepts), 'concept')} cannot make {_count(n, 'task')}: "
                         f"take {len(concepts):,} at most (--tasks)")  # fmt: skip
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
    text = json.dumps(["+++".join(c) for c in concepts], indent=1, ensure_ascii=False)
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


# --------------------------------------------------------------------------------------- mixture


def endless(places, n, *key):
    """What stands at `places` (int [N]) of an endless row of permutations of range(n) -> int [N].

    The key picks the row. A Feistel network over a x b >= n, walked until it falls below n (Black
    and Rogaway 2002, "Ciphers with arbitrary finite domains"), so that a pool of 400 M samples
    needs no table of its permutation, in no worker.
    """
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
    """How many of a batch come from P, D and B: the floor of each share, then the rest in turn.

    Only those that have a share take part. 512 at .33/.34/.33 is 169/175/168.
    """
    counts = [math.floor(round(batch_size * r, 6)) for r in ratios]
    shares = [i for i in range(3) if ratios[i] > 0]
    for i in range(batch_size - sum(counts)):
        counts[shares[i % len(shares)]] += 1
    return counts


class Mixture:
    """S_t = lambda_P P + lambda_D D_t + lambda_B B (sec. 3.1), without state.

    A batch's ids are a pure function of (seed, task, step). Each source is passed through in
    permutations, so that nothing repeats before all was seen.

    chunks: T lists of (dataset name, class name); ratios: lambda of P, D, B; replay: how many
    samples of the pool are at hand, drawn once by the seed, 0 for all. B is no copy: in stream
    order the samples of all tasks before t are one range. With nothing in B, D takes its share;
    with ratios[0] = 0 no pool is needed.

    samples: (dataset name, index in its training split) in stream order, of which task t owns
    samples[ends[t] : ends[t + 1]]. held: what held() gave of an earlier run's tasks, which the
    chunks follow; gone: {dataset name: how many of these samples are no longer there}.
    """

    def __init__(self, world, chunks, batch_size, ratios=(0.33, 0.34, 0.33), replay=0, seed=0,
                 held=None):  # fmt: skip
        if len(ratios) != 3 or min(ratios) < 0 or not abs(sum(ratios) - 1) <= 1e-6:
            shares = "/".join(map(str, ratios))
            raise ValueError(f"the mixture P/D/B is three shares that sum to 1, got {shares}")
        self.batch_size = batch_size
        self.ratios = ratios
        self.seed = seed
        self.pool_size = len(world.pool) if world.pool is not None else 0
        self.at_hand = min(replay, self.pool_size) or self.pool_size
        if ratios[0] > 0 and self.pool_size == 0:
            raise ValueError("the mixture asks for pretraining data, and there is no pool: name it "
                             "(--pool), or mix 0/D/B (--mixture)")  # fmt: skip
        self.datasets = world.adaptation
        self.names = [d.name for d in world.adaptation]
        self.before = held or {"names": [], "origin": torch.zeros(0, dtype=torch.int16),
                               "keys": torch.zeros(0, dtype=torch.int64), "ends": [0]}  # fmt: skip
        groups = _groups(world.adaptation, held)
        stream = [(name, _same_form(c)) for chunk in chunks for name, c in chunk]
        _check_stream(stream, groups, self.names, held is not None)
        origin, index = located(self.before, world.adaptation)
        there = index >= 0
        lost = self.before["origin"][torch.from_numpy(~there)].tolist()
        self.gone = dict(sorted(Counter(self.before["names"][k] for k in lost).items()))
        ends = [int(there[:end].sum()) for end in self.before["ends"]]
        sizes = [sum(len(groups[name, _same_form(c)][0]) for name, c in chunk) for chunk in chunks]
        self.ends = [*ends, *(ends[-1] + np.cumsum(sizes, dtype=int)).tolist()]
        number = {name: k for k, name in enumerate(self.names)}
        new = [groups[concept][0] for concept in stream]
        sets = [np.full(len(i), number[name], np.int16) for i, (name, _) in zip(new, stream)]
        self.index = np.concatenate([index[there], *new])  # [M], in stream order
        self.origin = np.concatenate([origin[there], *sets])  # [M], number of the dataset
        self.samples = Lazy(self.ends[-1], lambda k: self._stream_ids([k])[0])

    def counts(self, task):
        """Samples of P, D_t and B in a batch of this task."""
        p, d, b = self.ratios
        nothing = self.ends[task] == 0  # in B
        return split_batch(self.batch_size, (p, d + b, 0) if nothing else (p, d, b))

    def ids(self, task, step, skip=0):
        """-> batch_size pairs (source, index): "pool" or a dataset's name, index in its training
        split. skip: instead of each sample the one so many further on in its source's own order."""
        first = self.ends[task]
        last = self.ends[task + 1]
        ranges = [(0, self.at_hand), (first, last), (0, first)]
        batch = []
        for source, (n, (a, b)) in enumerate(zip(self.counts(task), ranges)):
            if n == 0:
                continue
            places = endless(np.arange(step * n, (step + 1) * n), b - a, self.seed, 4, source, task)
            places = a + (places + skip) % (b - a)
            batch += self._pool_ids(places) if source == 0 else self._stream_ids(places)
        return batch

    def held(self):
        """What a Mixture of the next tasks has to know of these and all before: texts and tensors,
        a key of eight bytes a sample."""
        names = list(self.before["names"])
        first = self.ends[len(self.before["ends"]) - 1]
        keys = np.zeros(len(self.index) - first, np.int64)
        origin = np.zeros(len(keys), np.int16)
        for k, d in enumerate(self.datasets):
            mine = self.origin[first:] == k
            if not mine.any():
                continue
            name = _same_form(d.name)
            names += [name] * (name not in names)
            keys[mine] = d.train.keys()[self.index[first:][mine]]
            origin[mine] = names.index(name)
        earlier = self.before["ends"]
        later = [earlier[-1] + end - first for end in self.ends[len(earlier) :]]
        return {"names": names, "ends": [*earlier, *later],
                "origin": torch.cat([self.before["origin"], torch.from_numpy(origin)]),
                "keys": torch.cat([self.before["keys"], torch.from_numpy(keys)])}  # fmt: skip

    def _pool_ids(self, places):
        drawn = endless(places, self.pool_size, self.seed, 3)
        return [("pool", i) for i in drawn.tolist()]

    def _stream_ids(self, places):
        names = [self.names[k] for k in self.origin[places].tolist()]
        return list(zip(names, self.index[places].tolist()))


def _groups(datasets, held=None):
    """(dataset, class name in NFC) -> ids of its training samples that no earlier task held, number
    of classes so called."""
    groups = {}
    for d, ids in zip(datasets, fresh(datasets, held)):
        by_class = ids[np.argsort(d.train.labels[ids], kind="stable")]
        found, starts = np.unique(d.train.labels[by_class], return_index=True)
        for c, ids in zip(found, np.split(by_class, starts[1:])):
            if d.classes:
                concept = d.name, _same_form(d.classes[c])
                _, before = groups.get(concept, (None, 0))
                groups[concept] = ids, before + 1
    return groups


def _check_stream(stream, groups, names, again):
    if len(set(stream)) < len(stream):
        raise ValueError(f"the stream names {'+++'.join(_twice(stream))} more than once; "
                         "tasks must be disjoint")  # fmt: skip
    for concept in stream:
        name = "+++".join(concept)
        if concept[0] not in names:
            raise ValueError(f"the stream names the dataset {concept[0]}; those to adapt to: "
                             f"{', '.join(sorted(names))}")  # fmt: skip
        if concept not in groups:
            raise ValueError(f"the stream names {name}, and {concept[0]} has no {'new ' * again}"
                             "training sample of it")  # fmt: skip
        if groups[concept][1] > 1:
            raise ValueError(f"the stream names {name}, and {concept[0]} has {groups[concept][1]} "
                             "classes of this name: rename one, or hold the set out")  # fmt: skip


# --------------------------------------------------------------------------------------- batches

TRIES = 100  # broken pictures in a row after which it is no accident


def train_crop(image, size, interpolation="bicubic"):
    """RandomResizedCrop as in sec. 3.2 and R, without flip -> uint8 [3, S, S].

    image: PIL or uint8 [H, W, 3]. Drawn from torch's generator. The box is cut out before it is
    resized.
    """
    pixels = _tensor(image)
    top, left, height, width = v2.RandomResizedCrop.get_params(pixels, (0.9, 1.0), (3 / 4, 4 / 3))
    return _resized(pixels[:, top : top + height, left : left + width], (size, size), interpolation)


def test_crop(image, size, resize="shortest", interpolation="bicubic"):
    """A test picture -> uint8 [3, S, S], within a level on average of what Pillow makes of it.

    resize: "shortest" resizes the short side, then cuts out the centre; "squash" both sides.
    """
    pixels = _tensor(image)
    _, height, width = pixels.shape
    if resize == "squash":
        return _resized(pixels, (size, size), interpolation)
    if resize != "shortest":
        raise ValueError(f"unknown way to resize {resize!r}; there are: shortest, squash")
    short, long = sorted((height, width))
    rows, columns = (max(size, int(size * side / short)) if side > short else size
                     for side in (height, width))  # fmt: skip
    top = round((rows - size) / 2)
    left = round((columns - size) / 2)
    if long <= 4 * short:
        whole = _resized(pixels, (rows, columns), interpolation)
        return whole[:, top : top + size, left : left + size]
    # of a long strip only the centre is resized
    box = (left * width / columns, top * height / rows,
           (left + size) * width / columns, (top + size) * height / rows)  # fmt: skip
    crop = _pil(image).resize((size, size), Image.Resampling[interpolation.upper()], box=box)
    return _tensor(crop)


def _pil(image):
    return _rgb(image if isinstance(image, Image.Image) else Image.fromarray(image))


def _tensor(image):
    """uint8 [3, H, W] of a PIL image or array [H, W, 3]."""
    if isinstance(image, Image.Image):
        image = np.array(_rgb(image))
    if not image.flags.writeable:  # torch has no read-only tensors
        image = image.copy()
    return torch.from_numpy(image).permute(2, 0, 1)


def _resized(pixels, size, interpolation):
    if tuple(pixels.shape[1:]) == tuple(size):
        return pixels
    resize = torch.nn.functional.interpolate
    return resize(pixels[None], size, mode=interpolation, antialias=True)[0]


class _Lazily(torch.utils.data.Dataset):
    """make(item) of each item, in a worker. An error travels as a value, so it arrives whole."""

    def __init__(self, make, items):
        self.make = make
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        try:
            return self.make(self.items[i])
        except (ValueError, OSError) as e:
            return e


def _batches(make, items, workers, broken):
    """Yields the batch of each (batch, faults) that make returns; the faults go to broken()."""
    own = torch.Generator()  # else it draws from torch's global one
    forks = workers and "fork" in multiprocessing.get_all_start_methods()  # `make` does not pickle
    how = {"num_workers": workers, "multiprocessing_context": "fork"} if forks else {}
    gc.freeze()  # a collection in a worker would write to, and so copy, all that is shared with it
    results = iter(DataLoader(_Lazily(make, items), batch_size=None, generator=own, **how))
    gc.unfreeze()
    for result in results:
        if isinstance(result, Exception):
            raise result
        batch, faults = result
        if faults:
            broken(faults)
        yield batch


def _first_sound(candidates, faults, forgiving):
    """-> (split, number, picture) of the first of the (split, number) that can be read."""
    for split, i in candidates:
        try:
            return split, i, split.image(i)
        except Changed:
            raise
        except (ValueError, OSError) as e:
            if not forgiving:
                raise
            faults.append(str(e))
    raise ValueError(f"{len(faults)} pictures in a row cannot be read, the last: {faults[-1]}")


def loader(world, mixture, task, steps, image_size, workers=0, start=0, part=(0, 1),
           resize="shortest", interpolation="bicubic", broken=None):  # fmt: skip
    """Batches of a task, steps start to steps - 1: images uint8 [B, 3, S, S], captions list[str].

    A slot's sample, crop and caption are a pure function of (seed, task, step, slot), whatever the
    workers and the part. part: (rank, processes); this process makes the slots from
    rank B // processes to (rank + 1) B // processes alone.

    broken: called in this process with sentences about pictures that cannot be read; each is
    replaced by the next of its source that can. Without it the first raises ValueError or OSError.
    resize: as in test_loader, so that both take a checkpoint's geometry; it changes nothing here.
    """
    splits = {d.name: d.train for d in world.adaptation} | {"pool": world.pool}
    rank, processes = part
    size = mixture.batch_size
    own = range(rank * size // processes, (rank + 1) * size // processes)

    def candidates(ids, step, slot):
        for skip in range(TRIES):
            source, i = mixture.ids(task, step, skip)[slot] if skip else ids[slot]
            yield splits[source], i

    def make(step):
        images = []
        captions = []
        faults = []
        ids = mixture.ids(task, step)
        rng = np.random.default_rng((mixture.seed, 5, task, step))
        chance = rng.integers(2**63, size=(size, 2)).tolist()  # of a slot: crop, caption
        with torch.random.fork_rng(devices=[]):
            for slot in own:
                choice = candidates(ids, step, slot)
                split, i, image = _first_sound(choice, faults, broken is not None)
                torch.default_generator.manual_seed(chance[slot][0])
                images.append(train_crop(image, image_size, interpolation))
                several = split.captions[i]
                several = [several] if isinstance(several, str) else several
                captions.append(several[chance[slot][1] % len(several)])
        empty = torch.empty(0, 3, image_size, image_size, dtype=torch.uint8)
        return (torch.stack(images) if images else empty, captions), faults

    return _batches(make, range(start, steps), workers, broken)


def test_loader(split, ids, image_size, batch_size=256, workers=0, resize="shortest",
                interpolation="bicubic", broken=None):  # fmt: skip
    """The test pictures `ids` of a split, in order: uint8 [B, 3, S, S].

    broken: as in loader; the next of the same class stands in, if there is none the next of all.
    """
    ids = [int(i) for i in ids]

    def candidates(i):
        yield split, i
        others = (i + np.arange(1, len(split))) % len(split)
        same = np.asarray(split.labels)[others] == split.labels[i]
        for j in np.concatenate([others[same], others[~same]])[: TRIES - 1].tolist():
            yield split, j

    def make(first):
        images = []
        faults = []
        for i in ids[first : first + batch_size]:
            _, _, image = _first_sound(candidates(i), faults, broken is not None)
            images.append(test_crop(image, image_size, resize, interpolation))
        return torch.stack(images), faults

    return _batches(make, range(0, len(ids), batch_size), workers, broken)


# ------------------------------------------------------------------------------- looking at it all


def broken_pictures(split, workers=0, chunk=64):
    """Reads every picture once -> a sentence about each that cannot be read, in order."""

    def make(first):
        faults = []
        for i in range(first, min(first + chunk, len(split))):
            try:
                split.image(i)
            except Changed:
                raise
            except (ValueError, OSError) as e:
                faults.append(str(e))
        return faults, None

    firsts = range(0, len(split), chunk)
    batches = _batches(make, firsts, workers, None)
    bar = tqdm(batches, "reading", len(firsts), leave=False, disable=None)
    return [fault for faults in bar for fault in faults]


def contact_sheet(split, seed=0, rows=4, columns=6, side=160):
    """An image of rows x columns pictures that the seed draws, each with a caption below it."""
    text = 3 * 14 + 6
    sheet = Image.new("RGB", (columns * side, rows * (side + text)), "white")
    draw = ImageDraw.Draw(sheet)
    drawn = np.random.default_rng((seed, 8)).permutation(len(split))[: rows * columns].tolist()
    for k, i in enumerate(drawn):
        x = k % columns * side
        y = k // columns * (side + text)
        caption = split.captions[i]
        caption = caption if isinstance(caption, str) else caption[0]
        lines = textwrap.wrap(caption, side // 6)[:3]
        draw.multiline_text((x + 4, y + side + 2), "\n".join(lines), "black", _font(11), spacing=2)
        try:
            picture = _pil(split.image(i))
        except (ValueError, OSError):
            draw.text((x + 4, y + 4), "cannot be read", "red", _font(14))
            continue
        picture.thumbnail((side - 8, side - 8))
        factor = (side - 8) // max(picture.size)  # of a small one each pixel becomes a square
        picture = picture.resize([n * factor for n in picture.size], Image.Resampling.NEAREST)
        sheet.paste(picture, (x + (side - picture.width) // 2, y + (side - picture.height) // 2))
    return sheet
