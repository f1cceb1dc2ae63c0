"""CLIP from scratch: two transformers, the tokenizer, every layout that its checkpoints come in.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision"
(arXiv 2103.00020).
State-dict keys are OpenAI's, which open_clip kept. This file stands alone; copy it:

    import clip, torch
    model, tokenizer = clip.CLIP(clip.CONFIGS["tiny"]), clip.Tokenizer()
    images = clip.normalise(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    image, text, scale = model(images, tokenizer(["a red square", "two dots"], context_length=64))
    loss = clip.contrastive_loss(image, text, scale)

    model = clip.load("openai:ViT-B-32")  # or hf:ORG/REPO[/FILE], https://...#sha256=..., a path
    tokenizer = clip.Tokenizer(clip.find_bpe("openai:ViT-B-32"))
    clip.save(model, "ViT-B-32-hf", layout="hf")  # transformers'; or "open_clip", "openai"
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import html
import http.client
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import re
import reprlib
import unicodedata
import urllib.request
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # not POSIX: nobody is waited for
    fcntl = None

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's pixels, from 0 to 1
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_LOGIT_SCALE = math.log(100)  # sec. 2.5: larger ones were unstable; whoever trains clamps to it


# -------------------------------------------------------------------------------------------- model


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    embed_dim: int
    image_size: int  # pixels, square
    patch_size: int  # pixels, square
    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    context_length: int  # tokens, start and end included
    vocab_size: int
    text_width: int
    text_layers: int
    text_heads: int
    text_mlp: int
    # x * sigmoid(1.702 x) in place of GELU: a property of the weights, invisible in them
    quick_gelu: bool = False

    def __post_init__(self):
        if self.vision_width % self.vision_heads or self.text_width % self.text_heads:
            raise ValueError(f"heads do not divide widths: {self}")
        if self.image_size < self.patch_size:
            raise ValueError(f"a patch of {self.patch_size}, an image of {self.image_size} pixels")


def _config(embed, image, patch, vision, text, context=77, vocab=49408):
    """vision = (width, layers, heads, mlp), text = (width, layers, heads); its mlp is 4 x width."""
    return CLIPConfig(embed, image, patch, *vision, context, vocab, *text, 4 * text[0])


CONFIGS = {
    "tiny": _config(64, 32, 8, (96, 3, 3, 384), (64, 2, 2), context=64, vocab=258),
    "small": _config(96, 32, 8, (192, 4, 6, 768), (96, 3, 3), context=64, vocab=258),
    "ViT-S-32": _config(384, 224, 32, (384, 12, 6, 1536), (384, 12, 6)),
    "ViT-S-16": _config(384, 224, 16, (384, 12, 6, 1536), (384, 12, 6)),
    "ViT-B-32": _config(512, 224, 32, (768, 12, 12, 3072), (512, 12, 8)),
    "ViT-B-16": _config(512, 224, 16, (768, 12, 12, 3072), (512, 12, 8)),
    "ViT-L-14": _config(768, 224, 14, (1024, 24, 16, 4096), (768, 12, 12)),
    "ViT-L-14-336": _config(768, 336, 14, (1024, 24, 16, 4096), (768, 12, 12)),
    "ViT-H-14": _config(1024, 224, 14, (1280, 32, 16, 5120), (1024, 24, 16)),
    "ViT-g-14": _config(1024, 224, 14, (1408, 40, 16, 6144), (1024, 24, 16)),
    "ViT-bigG-14": _config(1280, 224, 14, (1664, 48, 16, 8192), (1280, 32, 20)),
}


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """What was done to the pictures that a model's weights have learnt from."""

    mean: tuple = MEAN  # of the three channels, from 0 to 1
    std: tuple = STD
    resize: str = "shortest"  # side to size, then the centre is cut out; or "squash": both sides
    interpolation: str = "bicubic"  # or "bilinear"; antialiased
    size: int = 224  # pixels, square

    def __post_init__(self):
        for name in ("mean", "std"):
            value = getattr(self, name)
            channels = value if isinstance(value, (list, tuple)) else [value] * 3
            object.__setattr__(self, name, tuple(map(float, channels)))
        possible = {
            "mean": len(self.mean) == 3 and all(map(math.isfinite, self.mean)),
            "std": len(self.std) == 3 and all(0 < x < math.inf for x in self.std),
            "resize": self.resize in ("shortest", "squash"),
            "interpolation": self.interpolation in ("bicubic", "bilinear"),
            "size": type(self.size) is int and self.size > 0,
        }
        for name, fine in possible.items():
            if not fine:
                raise ValueError(f"{name} {getattr(self, name)} of pictures cannot be done here")


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention with q, k and v fused in one in_proj, as nn.MultiheadAttention
    names them."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, causal):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # [B, N, 3W]
        # three views, whose gradients are put together by one copy
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # [B, H, N, W/H]
        return self.out_proj(y.transpose(1, 2).flatten(2))  # [B, N, W]


class Block(nn.Module):
    def __init__(self, width, heads, mlp, quick_gelu):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        gelu = QuickGELU() if quick_gelu else nn.GELU()
        layers = OrderedDict(c_fc=nn.Linear(width, mlp), gelu=gelu, c_proj=nn.Linear(mlp, width))
        self.mlp = nn.Sequential(layers)

    def forward(self, x, causal):
        x = x + self.attn(self.ln_1(x), causal)  # [B, N, W]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, mlp, quick_gelu):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, mlp, quick_gelu) for _ in range(layers))

    def forward(self, x, causal=False):
        for block in self.resblocks:
            x = block(x, causal)
        return x


class VisionTransformer(nn.Module):
    def __init__(self, c):
        super().__init__()
        width = c.vision_width
        patches = (c.image_size // c.patch_size) ** 2
        self.conv1 = nn.Conv2d(3, width, c.patch_size, c.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        sizes = (width, c.vision_layers, c.vision_heads, c.vision_mlp)
        self.transformer = Transformer(*sizes, c.quick_gelu)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, c.embed_dim))

    def forward(self, images):  # [B, 3, S, S]
        x = self.conv1(images).flatten(2).transpose(1, 2)  # [B, patches, W]
        first = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([first, x], dim=1)  # [B, 1 + patches, W]
        x = x + self.positional_embedding.to(x.dtype)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj  # [B, D], read at the class token


class CLIP(nn.Module):
    """Two towers into one space. Weights start as in sec. 2.4 of the paper and OpenAI's code.

    preprocess: what is done to pictures before encode_image. tokenizer: what makes its tokens
    others than CLIP's, as open_clip or Hugging Face say it; {} for CLIP's own."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.preprocess = Preprocess(size=c.image_size)
        self.tokenizer = {}
        self.visual = VisionTransformer(c)
        sizes = (c.text_width, c.text_layers, c.text_heads, c.text_mlp)
        self.transformer = Transformer(*sizes, c.quick_gelu)
        words = torch.empty(c.vocab_size, c.text_width)
        self.token_embedding = nn.Embedding.from_pretrained(words, freeze=False)
        self.positional_embedding = nn.Parameter(torch.empty(c.context_length, c.text_width))
        self.ln_final = nn.LayerNorm(c.text_width)
        self.text_projection = nn.Parameter(torch.empty(c.text_width, c.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if not self.logit_scale.is_meta:  # load fills those; normal_ there imports sympy, 150 MB
            self._init()

    def _init(self):
        v = self.visual
        for p in (v.class_embedding, v.positional_embedding, v.proj):
            nn.init.normal_(p, std=self.config.vision_width**-0.5)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.config.text_width**-0.5)
        for tower in (v.transformer, self.transformer):
            width = len(tower.resblocks[0].ln_1.weight)
            output = width**-0.5 * (2 * len(tower.resblocks)) ** -0.5
            stds = {
                "attn.in_proj_weight": width**-0.5, "mlp.c_fc.weight": (2 * width) ** -0.5,
                "attn.out_proj.weight": output, "mlp.c_proj.weight": output,
            }  # fmt: skip
            for block in tower.resblocks:
                for name, std in stds.items():
                    nn.init.normal_(block.get_parameter(name), std=std)
                for linear in (block.mlp.c_fc, block.attn.out_proj, block.mlp.c_proj):
                    nn.init.zeros_(linear.bias)

    def encode_image(self, images):
        """[B, 3, S, S] of normalised pixels -> [B, D], not normalised."""
        return self.visual(images)

    def encode_text(self, tokens):
        """[B, L] ids, L up to the context length -> [B, D], not normalised. The largest id is the
        end token; what follows it changes nothing (the mask is causal), so a batch may be cut at
        its longest text."""
        x = self.token_embedding(tokens)  # [B, L, W]
        x = x + self.positional_embedding[: tokens.shape[1]].to(x.dtype)
        x = self.ln_final(self.transformer(x, causal=True))
        rows = torch.arange(len(x), device=x.device)
        return x[rows, tokens.argmax(dim=-1)] @ self.text_projection  # [B, D]

    def forward(self, images, tokens):
        """-> image [B, D] and text [B, D], both L2-normalised, and scale [] = exp(logit_scale) = 1
        / tau."""
        image = F.normalize(self.encode_image(images), dim=-1)
        text = F.normalize(self.encode_text(tokens), dim=-1)
        return image, text, self.logit_scale.exp()


def contrastive_loss(image, text, scale):
    """Symmetric InfoNCE (CLIP, fig. 3). image [B, D] and text [B, D] are normalised, row i of one
    belongs to row i of the other; scale = 1 / tau. Returns a scalar."""
    logits = scale * (image @ text.T)  # [B, B]
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def backward(encode_image, encode_text, images, texts, scale, piece=None, rows=None, factor=1.0):
    """Adds to .grad the exact gradient of contrastive_loss over a batch that is too large for one
    graph or one process. Returns the loss of the whole batch, detached.

    Plain accumulation over small batches is another loss, since every sample is contrasted with
    all others of its batch. Exact is the chain rule: all features first, without a graph; the loss
    and its gradient at the features; then the towers again, a piece at a time, each with its rows
    of that gradient (Gao et al. 2021, "GradCache", arXiv 2101.06983; BASIC, arXiv 2111.10050).

    encode_image, encode_text: slice of images, of texts -> [b, D], normalised, in float32; any two
    towers whose output is a function of the sample alone (no dropout, no batch statistics).
    images, texts: of one length, anything that slices. scale: 1 / tau, a scalar tensor.
    piece: samples in a graph; all by default, and then each tower runs once.
    rows: (first, total), where torch.distributed runs: these are rows first, first + 1, ... of a
    batch of `total`. Each process then holds its own samples' part of the gradient (the first one
    the scale's): sum .grad over the processes (sum_gradients) before using it.
    factor: multiplies the gradient, for float16's sake.
    Hold torch.autocast open around the call: then weights are cast once, not for every piece. The
    loss and the gradients are computed outside of it.

        loss = clip.backward(
            lambda x: F.normalize(model.encode_image(x), dim=-1),
            lambda x: F.normalize(model.encode_text(x), dim=-1),
            images, tokens, model.logit_scale.exp(), piece=64)
        optimizer.step()
    """
    n = len(images)
    piece = min(piece or n, n)
    first, total = rows or (0, n)
    towers = []
    for encode, inputs in ((encode_image, images), (encode_text, texts)):
        mine = encode(inputs[:piece])  # [b, D]; with one piece its graph is kept for the end
        trained = mine.requires_grad
        if piece < n:
            mine = mine.detach()  # its graph goes before the others' features are computed
            with torch.no_grad():
                others = [encode(inputs[i : i + piece]) for i in range(piece, n, piece)]
            mine = torch.cat([mine, *others])  # [n, D]
        leaf = gather_rows(mine.detach(), first, total).requires_grad_(trained)  # [total, D]
        towers.append((encode, inputs, mine, leaf))

    image, text = (leaf for *_, leaf in towers)
    full_precision = contextlib.nullcontext()
    if torch.amp.is_autocast_available(scale.device.type):
        full_precision = torch.autocast(scale.device.type, enabled=False)
    with full_precision:
        loss = contrastive_loss(image, text, scale if first == 0 else scale.detach())
        (factor * loss).backward()

    for encode, inputs, mine, leaf in towers:
        if not leaf.requires_grad:  # a frozen tower
            continue
        gradient = leaf.grad[first : first + n]  # [n, D]
        for i in range(0, n, piece):
            again = mine if piece == n else encode(inputs[i : i + piece])  # [b, D]
            with full_precision:
                again.backward(gradient[i : i + piece])
    return loss.detach()


def gather_rows(mine, first, total):
    """[n, D] of each process of torch.distributed -> [total, D] of all: these are rows first, first
    + 1, ... Shares may differ in size, so each process fills in zeros, and all add up."""
    if len(mine) == total:
        return mine
    everything = mine.new_zeros(total, mine.shape[1])
    everything[first : first + len(mine)] = mine
    torch.distributed.all_reduce(everything)
    return everything


def sum_gradients(parameters):
    """Sums .grad over the processes of torch.distributed, in one flat all-reduce: afterwards all
    hold the same bits."""
    parameters = list(parameters)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = gradient.view_as(p)


def normalise(images, mean=MEAN, std=STD):
    """uint8 [B, 3, S, S] -> float32, on the images' device: zero mean and unit variance over the
    pictures that the model learnt from (model.preprocess)."""
    channels = zip(images.unbind(1), mean, std)  # by number: tensors of them would be copied
    return torch.stack([(x.float() / 255 - m) / s for x, m, s in channels], dim=1)


# ---------------------------------------------------------------------------------------- tokenizer
# A caption is repaired as OpenAI did with ftfy, here by the standard library: entities, quotes,
# ligatures, full-width forms, controls, terminal escapes, surrogates, NFC, and UTF-8 once read as
# Windows-1252 (the web's "â€™"): signs, Latin, Greek, Cyrillic, kana and emoji, whose lead bytes
# real text hardly has. It stops at other mojibake (Arabic, Chinese, other code pages, lost bytes)
# and at entities shouted in capitals (&EACUTE;) or nested more than 16 deep.

# how browsers read the bytes 0x80-0x9f
CP1252 = {i: bytes([i]).decode("cp1252", "ignore") or chr(i) for i in range(0x80, 0xA0)}
BYTES = {char: byte for byte, char in CP1252.items()}
# a continuation byte of UTF-8, read as Latin-1 or Windows-1252
NEXT = f"[\x80-\xbf{''.join(BYTES)}]"
TWO = f"[ÂÃ]{NEXT}|[ÄÅÎÏÐÑ](?:(?![‘-”–—…]){NEXT}|{NEXT}(?=\\w))"  # Ñ” may end a word
# signs and kana, emoji; other leads are real too often
MOJIBAKE = re.compile(f"{TWO}|[âã]{NEXT}{{2}}|ð{NEXT}{{3}}")
ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")
# colours of a terminal, then controls
JUNK = re.compile(
    r"\x1b\[[\d;]*[a-zA-Z]|[\0-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]"
)
FORMS = [*map(ord, "ĲĳŉǱǲǳǄǅǆǇǈǉǊǋǌﬀﬁﬂﬃﬄﬆ"), 0x3000, *range(0xFF01, 0xFFF0)]
REPAIR = CP1252 | {i: unicodedata.normalize("NFKC", chr(i)) for i in FORMS} | {ord("ﬅ"): "ſt"}
REPAIR |= dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'")
REPAIR |= dict.fromkeys(range(0x201C, 0x2020), '"')
PLAIN = re.compile(r"[\t\n\f\r -%'-~]*")  # ASCII without entities and controls: nothing to repair
# OpenAI's 's|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+; encode sets numbers like ² apart,
# which \d misses
WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\w\s]|_)+", re.IGNORECASE)


def _redecode(match):
    with contextlib.suppress(UnicodeDecodeError):
        return bytes(BYTES.get(c) or ord(c) for c in match[0]).decode()
    return match[0]


def clean(text):
    """A caption as CLIP's vocabulary saw it: repaired, entities resolved, white space collapsed,
    lower case."""
    entities = "<" not in text  # with "<" it is mark-up, whose entities are resolved twice, below
    for _ in range(16):
        before = text
        if PLAIN.fullmatch(text):
            break
        if entities:
            text = ENTITY.sub(lambda match: html.unescape(match[0]), text)
        decoded = MOJIBAKE.sub(_redecode, text)
        while decoded != text:
            text = decoded
            decoded = MOJIBAKE.sub(_redecode, text)
        text = JUNK.sub("", text).translate(REPAIR)
        pairs = text.encode("utf-16-le", "surrogatepass")
        text = pairs.decode("utf-16-le", "replace")  # pairs of surrogates join, halves become �
        text = unicodedata.normalize("NFC", text)
        if text == before:
            break
    return " ".join(html.unescape(html.unescape(text)).split()).lower()


def _merges(bpe):
    """-> lines of two symbols each, and the vocabulary {symbol: id} where the file has one."""
    with open(bpe, "rb") as f:
        packed = f.read(2) == b"\x1f\x8b"
    with (gzip.open if packed else open)(bpe, "rb") as f:
        text = f.read(2**26).decode()  # CLIP's have 3 million bytes; a hostile gzip, billions
    if not text.startswith("{"):
        lines = text.replace("\r\n", "\n").rstrip("\n").split("\n", 50_000)
        header = "#version" in lines[0] or len(lines[0].split()) != 2
        if len(lines) > 48_894 and not any(line.endswith("</w>") for line in lines):
            raise ValueError("GPT-2's, say: none of its merges ends a word")
        return lines[header : header + 48_894], None  # OpenAI's file has more, which are not used
    tree = json.loads(text)
    model = tree["model"]
    lower = "Lowercase" in json.dumps(tree.get("normalizer"))
    if (model["type"], model["end_of_word_suffix"], lower) != ("BPE", "</w>", True):
        raise ValueError("not the tokenizer of a CLIP")
    added = {token["content"]: token["id"] for token in tree.get("added_tokens", ())}
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return lines, model["vocab"] | added


class Tokenizer:
    """CLIP's byte-pair encoding. bpe: path of bpe_simple_vocab_16e6.txt.gz, or of Hugging Face's
    merges.txt or tokenizer.json. Without it, byte-level: the 256 bytes of UTF-8, then start (256)
    and end (257), which is what "tiny" reads.

    start and end are ids; everything in a text is text, so no caption can inject a control
    token."""

    def __init__(self, bpe=None):
        self.merges = {}  # pair of ids -> id
        self.words = {}  # those met before -> ids
        self.symbols = [bytes([b]) for b in range(256)]
        if bpe is not None:
            with _reading(bpe, "no merges of a CLIP (gzip, text or JSON)"):
                self._read(*_merges(bpe))
        self.start = len(self.symbols)
        self.end = self.start + 1
        self.vocab_size = self.start + 2

    def _read(self, lines, vocabulary):
        # ids 0-255 are the bytes: 188 printable ones first, then the others, spelt from chr(256)
        order = sorted(range(256), key=lambda b: b == 32 or not chr(b).isprintable())
        letters = [chr(b) if i < 188 else chr(256 + i - 188) for i, b in enumerate(order)]
        self.letters = {b: i for i, b in enumerate(order)}
        ids = {letter: i for i, letter in enumerate(letters)}
        ids |= {f"{s}</w>": 256 + i for s, i in ids.items()}  # </w> ends a word, decodes to a space
        self.symbols = [bytes([b]) for b in order] + [bytes([b, 32]) for b in order]
        if not lines:
            raise ValueError("it is empty")
        for line in lines:
            pair = line.split()
            joined = "".join(pair)
            if len(pair) != 2 or not ids.keys() >= {*pair} or joined in ids:
                raise ValueError(f"{line[:80]!r} joins no two earlier symbols to a new one")
            a, b = (ids[symbol] for symbol in pair)
            self.merges[a, b] = ids[joined] = len(ids)
            self.symbols.append(self.symbols[a] + self.symbols[b])
        ids |= {"<|startoftext|>": len(ids), "<|endoftext|>": len(ids) + 1}
        if vocabulary not in (None, ids):
            raise ValueError(f"a vocabulary of {len(vocabulary)} that is not in CLIP's order")

    def _merge(self, word):
        """Join the pair learnt first, everywhere, until no known pair is left. Ids grow in the
        order of learning."""
        ids = [self.letters[b] for b in word.encode()]
        ids[-1] += 256  # the form that ends a word
        while True:
            pairs = [self.merges.get(pair, math.inf) for pair in itertools.pairwise(ids)]
            first = min(pairs, default=math.inf)
            if first == math.inf:
                break
            joined = []
            i = 0
            while i < len(ids):
                hit = i < len(pairs) and pairs[i] == first
                joined.append(first if hit else ids[i])
                i += 1 + hit
            ids = joined
        if len(self.words) > 500_000:  # bounds the memory; captions repeat far fewer words
            self.words.clear()
        self.words[word] = ids
        return ids

    def encode(self, text):
        """-> list of ids, without start and end."""
        if not isinstance(text, str):
            raise TypeError(f"a caption must be a string, got {type(text).__name__}: {text!r:.80}")
        if not self.merges:
            return list(text.encode("utf-8", errors="replace"))
        text = clean(text)
        if not text.isascii():
            text = "".join(f" {c} " if c.isnumeric() and not c.isalpha() else c for c in text)
        return [i for word in WORD.findall(text) for i in self.words.get(word) or self._merge(word)]

    def decode(self, ids):
        """ids, up to the first end token -> text, as cleaned, with a space between words."""
        symbols = []
        for i in map(int, ids):
            if i == self.end:
                break
            if not 0 <= i <= self.start:
                raise ValueError(f"ids lie in 0..{self.end}, got {i}")
            symbols += self.symbols[i : i + 1]  # start has none
        text = b"".join(symbols).decode("utf-8", errors="replace")
        return text.removesuffix(" ") if self.merges else text

    def __call__(self, texts, context_length=77, truncate=True):
        """list of N strings -> int64 [N, context_length]: start, text, end, zeros. A text too long
        is cut and keeps its end token, or with truncate=False is a ValueError."""
        texts = [texts] if isinstance(texts, str) else texts
        tokens = np.zeros((len(texts), context_length), np.int64)
        for row, text in zip(tokens, texts):
            ids = self.encode(text)
            if len(ids) > context_length - 2 and not truncate:
                raise ValueError(
                    f"{text!r:.80} has {len(ids)} tokens; the context holds {context_length - 2}"
                )
            ids = [self.start, *ids[: context_length - 2], self.end]
            row[: len(ids)] = ids
        return torch.from_numpy(tokens)


def check_tokenizer(model, tokenizer, path):
    """ValueError unless the weights in path have learnt from the tokens that tokenizer gives."""
    if model.tokenizer:
        raise ValueError(
            f"{path}: its texts were tokenised otherwise than CLIP's ({model.tokenizer}), "
            "and no tokenizer here does that"
        )
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{path} has learnt {model.config.vocab_size} tokens, and the tokenizer has "
            f"{tokenizer.vocab_size}: --bpe takes the merges that belong to it"
        )


# ------------------------------------------------------------------------------------- tensor files
# safetensors: u64 little-endian header length, JSON {name: {dtype, shape, data_offsets}}, then the
# bytes of each tensor

DTYPES = {  # narrowest first
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32,
    "F64": torch.float64, "I64": torch.int64,
}  # fmt: skip
TORCH_NAMES = "Bool Byte Char Short Half BFloat16 Int Float Double Long"  # in the same order
STORAGES = dict(zip(TORCH_NAMES.split(), DTYPES.values()))
NOT_WRITTEN = (".pth", ".bin", ".ckpt", ".pkl")  # endings of formats that save does not write
WEIGHTS = (  # best first
    "open_clip_model.safetensors", "model.safetensors", "model.safetensors.index.json",
    "open_clip_pytorch_model.bin", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip


@contextlib.contextmanager
def _reading(path, fault):
    """Whatever a malformed file does to the code that reads it becomes one sentence that names the
    file."""
    try:
        yield
    except Exception as e:
        folder = os.path.dirname(path)
        named = isinstance(e, ValueError) and str(e).startswith((str(path), f"{folder}{os.sep}"))
        if named or getattr(e, "filename", None):
            raise  # it names the file, or the one beside it, already
        words = " ".join(str(e).split())[:800]
        raise ValueError(f"{path}: {fault} ({type(e).__name__}: {words})") from e


class Tensors(Mapping):
    """name -> tensor, read anew each time that it is asked for, so that memory holds what the
    caller keeps."""

    def __init__(self, readers, metadata=None, left_out=()):
        self.readers = readers
        self.metadata = metadata or {}
        self.left_out = left_out  # names of tensors in the file that are none of these

    def __getitem__(self, name):
        return self.readers[name]()

    def __iter__(self):
        return iter(self.readers)

    def __len__(self):
        return len(self.readers)


class Unreadable:
    """A tensor that no CLIP has (packed, complex, 8-bit floats): an error for who asks for it."""

    def __init__(self, path, why, nbytes=0):
        self.path = path
        self.why = why
        self.nbytes = nbytes

    def __call__(self):
        raise ValueError(f"{self.path}: a tensor {self.why} cannot be read here")


class Stored:
    """A tensor in a file. Called, it is mapped into memory: a page is read when it is touched, and
    all go with the tensor; what is written to it does not reach the file. limit: bytes that are
    there. start: of its first, stride: in entries."""

    def __init__(self, path, dtype, shape, stride, start, limit):
        numbers = all(type(n) is int and 0 <= n < 2**63 for n in (*shape, *stride, start))
        if not numbers or not len(shape) == len(stride) <= 16:
            raise ValueError(f"shape {reprlib.repr(shape)}, at {start}, is none of a tensor")
        entries = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, stride))
        if entries * dtype.itemsize > limit:
            raise ValueError(f"shape {shape} does not fit into {limit} bytes")
        self.path = path
        self.dtype = dtype
        self.shape = shape
        self.stride = stride
        self.start = start
        self.end = start + entries * dtype.itemsize
        self.nbytes = math.prod(shape) * dtype.itemsize

    def __call__(self):
        if self.end == self.start:
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        with _reading(self.path, "cannot be mapped, has it changed?"):
            # the map begins with the file, which takes addresses and no memory
            flat = torch.from_file(self.path, False, self.end, dtype=torch.uint8, device="cpu")
        flat = flat[self.start :]
        if self.start % self.dtype.itemsize:
            flat = flat.clone()
        return flat.view(self.dtype).as_strided(self.shape, self.stride).contiguous()


def _read_safetensors(path):
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):
            raise ValueError(
                f"{path}: neither a torch zip nor safetensors (header of {length} bytes of {size})"
                "; what torch wrote before 1.6 has to be saved again by a newer one"
            )
        head = f.read(length)
    with _reading(path, "broken safetensors header"):
        header = json.loads(head.decode())
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError(f"__metadata__ is {metadata}, no strings by name")
        readers = {}
        end = 0
        for name, v in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            with _reading(path, f"broken safetensors header, tensor {name}"):
                shape = v["shape"]
                a, b = v["data_offsets"]
                stride = [math.prod(shape[i + 1 :]) for i in range(len(shape[:17]))]
                if v["dtype"] in DTYPES:
                    kind = DTYPES[v["dtype"]]
                    tensor = Stored(path, kind, shape, stride, 8 + length + a, b - a)
                else:
                    tensor = Unreadable(path, f"{name} of dtype {v['dtype']}", b - a)
                if not 0 <= a <= b or a != end or tensor.nbytes != b - a:
                    raise ValueError(f"{tensor.nbytes} bytes at {a}..{b}, where {end} is next")
            readers[name] = tensor
            end = b
    if 8 + length + end != size:
        raise ValueError(
            f"{path}: torn file, {size} bytes where its header says {8 + length + end}"
        )
    return Tensors(readers, metadata)


class _Bag(dict):
    """Stands for every class and function that a pickle names: attributes become items, arguments
    are dropped."""

    __hash__ = object.__hash__

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, state):
        self.update(state if isinstance(state, dict) else {})

    def append(self, _):  # to a deque of losses, say
        pass

    extend = append


class _Row(tuple):
    """A pickle's tuple, hashed and shown without what is in it: for (x, x) nested 60 deep either
    would take 2^60 steps."""

    __hash__ = object.__hash__
    __repr__ = object.__repr__


def _rows(load):
    def load_row(unpickler):
        load(unpickler)
        unpickler.stack[-1] = _Row(unpickler.stack[-1])

    return load_row


class _Unpickler(pickle._Unpickler):
    """For torch.save's zips and TorchScript archives. Imports and runs nothing that they name: a
    pickle reaches _Bag and the functions here, which note where a tensor lies. The code/ of an
    archive is never opened. In Python, since C's reserves whatever memory a pickle asks for."""

    dispatch = pickle._Unpickler.dispatch | {
        code: _rows(pickle._Unpickler.dispatch[code]) for code in b"t\x85\x86\x87"  # make tuples
    }
    del dispatch[pickle.BYTEARRAY8[0]]

    def find_class(self, module, name):
        if module == "torch" and name.endswith("Storage"):
            return STORAGES.get(name.removesuffix("Storage"))
        if name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return lambda tensor, *_: tensor
        if name.startswith("_rebuild") and name != "_rebuild_tensor_v2":
            return lambda *_: Unreadable(self.archive.filename, f"made by {name}")
        return self.tensor if name == "_rebuild_tensor_v2" else _Bag

    def persistent_load(self, pid):
        _, dtype, member, *_ = pid  # "storage", dtype, name in the zip, device, entries
        return dtype, self.archive.getinfo(self.root + "data/" + member)

    def tensor(self, storage, offset, shape, stride, _, hooks, metadata=None):
        dtype, info = storage
        if dtype is None:
            return Unreadable(self.archive.filename, "of complex or packed numbers")
        skip = offset * dtype.itemsize
        if info.compress_type != zipfile.ZIP_STORED or skip < 0 or metadata:
            raise ValueError(
                "compressed, before its storage, or a view by sign or conjugate: save a "
                "contiguous copy"
            )
        with self.archive.open(info):  # compares the member's own header with the zip's directory,
            start = self.archive.fp.tell() + skip  # and stops behind it
        limit = min(info.file_size - skip, os.path.getsize(self.archive.filename) - start)
        return Stored(self.archive.filename, dtype, shape, stride, start, limit)


def _flat(tree, prefix, seen):
    """Each dict once: a pickle can name one in a thousand places."""
    seen.add(id(tree))
    for key, value in tree.items():
        if isinstance(value, dict) and id(value) not in seen:
            yield from _flat(value, f"{prefix}{key}.", seen)
        elif isinstance(value, (Stored, Unreadable)):
            yield f"{prefix}{key}", value


def _read_torch(path):
    fault = "not a torch file of plain tensors; save its state_dict() again with torch.save"
    with _reading(path, fault), zipfile.ZipFile(path) as archive:
        pickled = min((n for n in archive.namelist() if n.endswith("data.pkl")), key=len)
        info = archive.getinfo(pickled)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > 2**24:
            raise ValueError(f"its pickle is compressed, or has {info.file_size} bytes")
        reader = _Unpickler(io.BytesIO(archive.read(info)))
        reader.archive = archive
        reader.root = pickled.removesuffix("data.pkl")
        tree = dict(_flat(reader.load(), "", set()))
        total = sum(tensor.nbytes for tensor in tree.values())
        if total > 16 * os.path.getsize(path):
            raise ValueError(f"views that repeat their storages, to {total} bytes: save copies")
    try:
        where = _prefix(map(plain_name, tree))
    except ValueError:  # several CLIPs, which load names
        return Tensors(tree)
    for key in ("state_dict.", "model_state_dict.", "model."):
        inner = {name.removeprefix(key): x for name, x in tree.items() if name.startswith(key)}
        if inner and (where is None or where.startswith(key)):
            return Tensors(inner, left_out=[name for name in tree if not name.startswith(key)])
    return Tensors(tree)


def _read_json(path):
    with _reading(path, "not a JSON object"):
        return dict(json.loads(Path(path).read_text("utf-8-sig")))


def _read_file(path):
    with open(path, "rb") as f:
        start = f.read(20)
    if not start or start.startswith(b"version https://git-"):
        what = "a git-lfs pointer, whose file was not fetched" if start else "empty"
        raise ValueError(f"{path} is {what}: download it again")
    return (_read_torch if start.startswith(b"PK\3\4") else _read_safetensors)(str(path))


def read_tensors(path, mapped=False):
    """Lazy mapping from name, as the file spells it, to tensor; .metadata holds a safetensors
    file's strings. path: a safetensors file, a torch.save zip, a TorchScript archive, an index of
    shards, or a folder that has one of them. mapped: tensors are the file itself, mapped into
    memory, for who goes over them once; whoever then shortens the file kills the process that reads
    it. ValueError names a malformed file and its fault."""
    tensors = _read(Path(path))
    if not mapped:
        tensors.readers = {n: lambda r=r: r().clone() for n, r in tensors.readers.items()}
    return tensors


def _read(path):
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir())
        others = [n for n in names if n.endswith((".safetensors", ".bin", ".pt"))]
        found = [n for n in WEIGHTS if n in names][:1] or others
        if len(found) != 1:
            raise ValueError(
                f"{path}: a folder with {len(found)} files of weights; name the file that is meant"
            )
        path = path / found[0]
    if not path.name.endswith(".index.json"):
        return _read_file(path)
    readers = {}
    with _reading(path, "no list of shards by tensor"):
        where = _read_json(path)["weight_map"]
        for shard in sorted({os.path.basename(shard) for shard in where.values()}):
            readers |= _read_file(path.with_name(shard)).readers
    return Tensors(readers)


@contextlib.contextmanager
def _aside(path):
    """A file to write that takes its place at path when whole, or leaves nothing."""
    part = f"{os.fspath(path)}.{os.getpid()}.part"
    try:
        with open(part, "wb") as f:
            yield f
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def _write_json(tree, path):
    with _aside(path) as f:
        f.write(json.dumps(tree, indent=2).encode())


def write_tensors(tensors, path, metadata=None):
    """Mapping from name to tensor -> safetensors file, byte for byte as the safetensors package
    writes it: widest dtype first, then by name, the data aligned to 8 bytes."""
    header = {"__metadata__": metadata} if metadata else {}
    kinds = list(DTYPES)
    ranks = list(DTYPES.values())
    places = sorted((-ranks.index(t.dtype), n, [*t.shape], t.nbytes) for n, t in tensors.items())
    offset = 0
    for rank, name, shape, size in places:
        end = offset + size
        header[name] = {"dtype": kinds[-rank], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    with _aside(path) as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for _, name, *_ in places:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            f.write(flat.view(torch.uint8).numpy().data)


# ------------------------------------------------------------------------------------------ layouts

HF = (  # ours (OpenAI's, open_clip's) -> Hugging Face's, with split q, k, v, turned projections
    ("visual.transformer.resblocks", "vision_model.encoder.layers"),
    ("transformer.resblocks", "text_model.encoder.layers"),
    ("visual.ln_pre", "vision_model.pre_layrnorm"),
    ("visual.ln_post", "vision_model.post_layernorm"),
    ("visual.conv1", "vision_model.embeddings.patch_embedding"),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("token_embedding", "text_model.embeddings.token_embedding"),
    ("ln_final", "text_model.final_layer_norm"),
    ("visual.proj", "visual_projection.weight"),
    ("text_projection", "text_projection.weight"),
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
    ("attn.out_proj", "self_attn.out_proj"),
)
TURNED = ("visual.proj", "text_projection")
SCALARS = ("input_resolution", "context_length", "vocab_size")  # OpenAI's archives hold these
NOISE = (*SCALARS, "attn_mask", "position_ids")  # constants that some save with the weights
CORE = {
    "visual.conv1.weight", "visual.positional_embedding", "positional_embedding",
    "token_embedding.weight", "text_projection",
}  # fmt: skip
FIRST = ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight")
WRAPPERS = re.compile(
    r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_modules|_parameters|_buffers)\."
)
COPY = re.compile(r"(^|[._])(ema|teacher|momentum|average|shadow)", re.IGNORECASE)
# Long-CLIP's positional_embedding_res is of the tower, too; a visual_head is not
TOWERS = re.compile(
    r"(visual|vision_model|transformer|text_model|ln_final)(\b|\d)|visual_projection"
    r"|text_projection|token_embedding|positional_embedding|logit_scale"
)


def plain_name(name):
    return WRAPPERS.sub("", name)


def _prefix(names):
    """What stands before all names of a CLIP: "", module., model.clip., ...; None if there is no
    CLIP. Of several, the one that is no average of another."""
    names = list(names)
    found = {name.removesuffix(first) for first in FIRST for name in names if name.endswith(first)}
    found = {prefix for prefix in found if not prefix or prefix.endswith(".")}
    if len(found) > 1:
        found = {prefix for prefix in found if not COPY.search(prefix)} or found
    if len(found) > 1:
        raise ValueError(
            f"it holds {len(found)} CLIPs, at {', '.join(map(repr, sorted(found)))}: "
            "save the one that is meant by itself"
        )
    return found.pop() if found else None


def openai_names(tensors):
    """A mapping of any layout, seen under OpenAI's names and as lazy as it was.

    Prefixes and what is no weight (position_ids, OpenAI's scalars) go, Hugging Face's tensors are
    joined and turned. What lies outside the two towers (a head, an optimizer, an average) is left
    out, and a warning names it; an unknown name inside them stays, so that load refuses it. Tensors
    that hold no CLIP keep their names. ValueError if there are several CLIPs."""
    plain = {name: plain_name(name) for name in tensors}
    prefix = _prefix(plain.values())
    if prefix is None:
        return tensors
    hf = prefix + FIRST[1] in plain.values()
    sources = {}  # our name -> theirs, three for q, k and v
    left_out = list(getattr(tensors, "left_out", ()))
    for name in sorted(tensors, key=lambda n: n.replace("q_proj", "a_proj")):  # q, k, v
        ours = plain[name].removeprefix(prefix)
        inside = ours.startswith("text.")  # as open_clip's custom models call the text tower
        ours = ours.removeprefix("text.")
        if hf:
            ours = functools.reduce(lambda n, pair: n.replace(*pair[::-1]), HF, ours)
            ours = re.sub(r"self_attn\.[qkv]_proj\.", "attn.in_proj_", ours)
        if ours.endswith(NOISE):
            continue
        if plain[name].startswith(prefix) and (inside or TOWERS.match(ours)):
            sources.setdefault(ours, []).append(name)
        else:
            left_out.append(plain[name].removeprefix(prefix))
    if not sources.keys() >= CORE:  # a ResNet, SigLIP, ...
        return tensors
    if left_out:
        groups = Counter(name.partition(".")[0] for name in left_out)
        words = ", ".join(f"{name} ({n})" for name, n in groups.most_common(8))
        warnings.warn(f"no part of the CLIP, and left out: the tensors of {words}", stacklevel=1)

    def read(ours):
        parts = [tensors[name] for name in sources[ours]]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if hf and ours in TURNED:
            return tensor.T.contiguous()
        if ours == "logit_scale" and tensor.numel() == 1:
            return tensor.reshape(())  # [1] in some files
        return tensor

    readers = {ours: functools.partial(read, ours) for ours in sources}
    return Tensors(readers, getattr(tensors, "metadata", None))


# ------------------------------------------------------------------------------------------ configs
# What a checkpoint says of itself travels as a dict: fields of CLIPConfig, "preprocess" (such an
# object), "tokenizer" (what makes its tokens another than CLIP's; {} for CLIP's own)

OPEN_CLIP_VISION = {
    "image_size": "image_size", "patch_size": "patch_size", "vision_width": "width",
    "vision_layers": "layers",
}  # fmt: skip
OPEN_CLIP_TEXT = {
    "context_length": "context_length", "vocab_size": "vocab_size", "text_width": "width",
    "text_layers": "layers", "text_heads": "heads",
}  # fmt: skip
HF_VISION = {
    "image_size": "image_size", "patch_size": "patch_size", "vision_width": "hidden_size",
    "vision_layers": "num_hidden_layers", "vision_heads": "num_attention_heads",
    "vision_mlp": "intermediate_size",
}  # fmt: skip
HF_TEXT = {
    "context_length": "max_position_embeddings", "vocab_size": "vocab_size",
    "text_width": "hidden_size", "text_layers": "num_hidden_layers",
    "text_heads": "num_attention_heads", "text_mlp": "intermediate_size",
}  # fmt: skip
HF_PIXELS = {  # a CLIPImageProcessor's defaults
    "do_resize": True, "size": {"shortest_edge": 224}, "resample": 3, "do_center_crop": True,
    "crop_size": 224, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": MEAN, "image_std": STD, "do_convert_rgb": True,
}  # fmt: skip
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
USUAL = {  # what open_clip's other fields may say
    "pool_type": ("tok", "argmax"), "proj_type": ["linear"], "pos_embed_type": ["learnable"],
    "eos_id": [2], "tokenizer_kwargs": [{"clean": "lower"}],
}  # fmt: skip


def _edge(size):
    """The one number of a square that may be said by two."""
    return size[0] if isinstance(size, list) and len({*size}) == 1 else size


def _ours(fields, theirs):
    """What their config says, by our names."""
    return {our: _edge(theirs[their]) for our, their in fields.items() if their in theirs}


def _theirs(fields, config):
    return {their: getattr(config, our) for our, their in fields.items()}


def _says_ours(metadata):
    config = CLIPConfig(**json.loads(metadata["config"]))
    pixels = {"size": config.image_size} | json.loads(metadata.get("preprocess", "{}"))
    tokenizer = json.loads(metadata.get("tokenizer", "{}"))
    return vars(config) | {"preprocess": Preprocess(**pixels), "tokenizer": tokenizer}


def _says_open_clip(c):
    model = c.get("model_cfg", c)
    if not isinstance(model, dict) or not isinstance(model.get("vision_cfg"), dict):
        return {}
    v = {"width": 768, "head_width": 64} | model["vision_cfg"]
    t = {"width": 512, "heads": 8} | model["text_cfg"]
    plain = {*OPEN_CLIP_VISION.values(), *OPEN_CLIP_TEXT.values(), "head_width", "mlp_ratio",
             "patch_dropout"}  # fmt: skip
    fields = (v | t).items()
    others = {k: x for k, x in fields if x and k not in plain and x not in USUAL.get(k, ())}
    tokenizer = {k: others.pop(k) for k in [*others] if "tokenizer" in k}
    if others:
        raise ValueError(f"{others} make it another architecture than plain CLIP")
    if str(tokenizer.get("hf_tokenizer_name")).startswith("openai/clip-vit"):
        del tokenizer["hf_tokenizer_name"]
    said = _ours(OPEN_CLIP_VISION, v) | _ours(OPEN_CLIP_TEXT, t)
    said |= {"vision_heads": v["width"] // v["head_width"], "tokenizer": tokenizer}
    said["quick_gelu"] = bool(model.get("quick_gelu"))
    pixels = {k: x for k, x in (c.get("preprocess_cfg") or {}).items() if x is not None}
    if pixels:
        if pixels.pop("mode", "RGB") != "RGB":
            raise ValueError("mode of its pictures is not RGB")
        pixels.pop("fill_color", None)  # for a resize that leaves a margin
        pixels["resize"] = pixels.pop("resize_mode", "shortest")
        pixels["size"] = _edge(pixels.get("size", v.get("image_size", 224)))
        said["preprocess"] = Preprocess(**pixels)
    return said


def _says_hf(c):
    """What is missing has transformers' default; *_config_dict, of its first release, wins."""
    if not isinstance(c.get("vision_config", ""), (dict, type(None))):
        return {}
    said = {"embed_dim": c["projection_dim"]} if "projection_dim" in c else {}
    kinds = {c.get("model_type", "clip")}
    blocks = set()
    for tower, fields, width, heads in (("vision", HF_VISION, 768, 12), ("text", HF_TEXT, 512, 8)):
        x = {"hidden_size": width, "num_attention_heads": heads, "hidden_act": "quick_gelu"}
        x |= (c.get(f"{tower}_config") or {}) | (c.get(f"{tower}_config_dict") or {})
        said |= _ours(fields, x)
        kinds.add(x.get("model_type", "clip").removesuffix(f"_{tower}_model"))
        blocks.add((x["hidden_act"], x.get("layer_norm_eps", 1e-5)))
    if kinds != {"clip"}:
        raise ValueError(f"it is of model_type {', '.join(kinds - {'clip'})}, not clip")
    if blocks not in ({("gelu", 1e-5)}, {("quick_gelu", 1e-5)}):
        raise ValueError(f"activation and LayerNorm eps {blocks}, not gelu or quick_gelu, and 1e-5")
    said["quick_gelu"] = ("quick_gelu", 1e-5) in blocks
    end = x.get("eos_token_id")
    end = 49407 if end is None else _edge(end)
    vocabulary = x.get("vocab_size", 49408)
    usual = end in (2, vocabulary - 1)  # 2: transformers then takes the largest id, as CLIP does
    if not usual and end < vocabulary:
        raise ValueError(f"eos_token_id {end} of {vocabulary} ids; a CLIP's text ends at the last")
    return said | {"tokenizer": {} if usual else {"eos_token_id": end}}


def _says_hf_pixels(c):
    kind = str(c.get("image_processor_type") or c.get("feature_extractor_type") or "CLIP")
    said = {k: x for k, x in c.items() if x is not None or k.startswith("do_")}
    c = HF_PIXELS | said if kind.startswith("CLIP") else said  # defaults of others vary
    size = c["size"]
    if isinstance(size, int):
        square = {"height": size, "width": size} if kind.startswith("ViT") else {}
        size = {"shortest_edge": size} if kind.startswith("CLIP") else square
    squash = size.keys() == {"height", "width"}
    crop = c["crop_size"] if c.get("do_center_crop") else size
    edges = {*size.values(), *(crop.values() if isinstance(crop, dict) else [crop])}
    possible = {k: bool(x) == (k in HF_PIXELS) for k, x in c.items() if k.startswith("do_")}
    possible |= {
        "size": squash or size.keys() == {"shortest_edge"},
        "crop_size": len(edges) == 1,
        "do_center_crop": squash or c.get("do_center_crop"),
        "rescale_factor": abs(c.get("rescale_factor", 1 / 255) * 255 - 1) < 1e-3,
        "do_convert_rgb": True,
        "use_square_size": not c.get("use_square_size"),
        "crop_pct": not c.get("crop_pct"),
    }
    wrong = [f"{k} {c.get(k)}" for k, fine in possible.items() if not fine]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} cannot be done here")
    resize = "squash" if squash else "shortest"
    how = RESAMPLE.get(c["resample"], c["resample"])
    return {"preprocess": Preprocess(c["image_mean"], c["image_std"], resize, how, edges.pop())}


BESIDE = (  # file, what it tells, its reader
    ("open_clip_config.json", "quick_gelu", _says_open_clip),
    ("config.json", "quick_gelu", lambda c: _says_open_clip(c) or _says_hf(c)),
    ("preprocessor_config.json", "preprocess", _says_hf_pixels),
    ("processor_config.json", "preprocess",  # of transformers 5
     lambda c: _says_hf_pixels(c["image_processor"]) if "image_processor" in c else {}),
)  # fmt: skip


def _said(path, raw, width, text_width):
    """What the file itself says, or the archive by OpenAI's rules, or the configs in or beside
    path, those of the file's own layout first."""
    if raw.metadata.get("config", "").startswith("{"):  # else it is another program's
        with _reading(path, "the config in its metadata is none of a CLIP; pass config="):
            return _says_ours(raw.metadata)
    if "input_resolution" in raw:
        pixels = Preprocess(size=int(raw["input_resolution"]))
        heads = {"vision_heads": width // 64, "text_heads": text_width // 64}
        return {"quick_gelu": True, "preprocess": pixels, "tokenizer": {}} | heads
    said = {}
    folder = Path(path if os.path.isdir(path) else os.path.dirname(path))
    hf = any(plain_name(name).endswith(FIRST[1]) for name in raw)
    for name, told, reader in BESIDE[1:] + BESIDE[:1] if hf else BESIDE:
        file = folder / name
        if told not in said and file.is_file():
            with _reading(file, "not a config of a CLIP that can be used here"):
                said = reader(_read_json(file)) | said
    return said


def _describe(path, raw, tensors, resized=False):
    """-> what a checkpoint and the configs beside it say, without reading its weights: fields of
    CLIPConfig, "preprocess", "tokenizer". What nothing says is not in it. ValueError if what is
    said does not fit the tensors or cannot be done here."""
    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    grid = math.isqrt(len(tensors["visual.positional_embedding"]) - 1)
    context, text_width = tensors["positional_embedding"].shape
    sizes = {
        "embed_dim": tensors["text_projection"].shape[1],
        "image_size": grid * patch,
        "patch_size": patch,
        "vision_width": width,
        "context_length": context,
        "vocab_size": len(tensors["token_embedding.weight"]),
        "text_width": text_width,
    }
    for tower, start in (("vision", "visual."), ("text", "")):
        blocks = f"{start}transformer.resblocks."
        ends = [name for name in tensors if name.startswith(blocks) and name.endswith("ln_1.bias")]
        sizes[f"{tower}_layers"] = len(ends)
        sizes[f"{tower}_mlp"] = len(tensors[f"{blocks}0.mlp.c_fc.bias"])
    said = _said(path, raw, width, text_width)
    pixels = said.get("preprocess")
    if resized:
        said.pop("image_size", None)
    elif said.get("image_size", 0) // patch == grid:
        sizes["image_size"] = said["image_size"]  # pixels that fill no patch leave no trace
    wrong = [f"{k} {said[k]}, not {size}" for k, size in sizes.items() if said.get(k, size) != size]
    if not resized and pixels and pixels.size != sizes["image_size"]:
        wrong.append(f"image_size {pixels.size} for its pictures, not {sizes['image_size']}")
    if wrong:
        hint = "; image_size= resizes its positions" if wrong[0].startswith("image_size") else ""
        raise ValueError(
            f"{path}: its tensors, of widths {width} and {text_width}, are others than "
            f"is said of them: {', '.join(wrong)}{hint}"
        )
    return sizes | said


def agree(paths, quick_gelu=None):
    """-> metadata by which load knows a file that is made from all these; {} if none of them says
    the heads or the activation. quick_gelu overrules them. ValueError if two of them differ."""
    common = {}
    source = {}
    for path in paths:
        with _reading(path, "its tensors make no CLIP"):
            raw = read_tensors(path, mapped=True)
            tensors = openai_names(raw)
            said = _describe(path, raw, tensors) if tensors.keys() >= CORE else {}
        if quick_gelu is not None:
            said["quick_gelu"] = quick_gelu
        for key, value in said.items():
            if common.setdefault(key, value) != value:
                raise ValueError(
                    f"{source[key]} and {path} differ in {key}: {common[key]} and "
                    f"{value}; what is made of both would be neither"
                )
            source.setdefault(key, path)
    try:
        with _reading(path, "its config is none of a CLIP"):
            return _metadata(_complete(path, common), common)
    except ValueError:
        return {}


def _metadata(config, said):
    parts = {"config": config} | {k: said[k] for k in ("preprocess", "tokenizer") if k in said}
    texts = {name: json.dumps(part, default=vars) for name, part in parts.items()}
    return {"format": "pt"} | texts


def _complete(path, said):
    """-> CLIPConfig, with heads by width from CONFIGS where nothing says them."""
    fields = {f.name: said[f.name] for f in dataclasses.fields(CLIPConfig) if f.name in said}
    v = said["vision_width"]
    t = said["text_width"]
    for known in CONFIGS.values():
        if known.vision_width == v:
            fields.setdefault("vision_heads", known.vision_heads)
        if known.text_width == t:
            fields.setdefault("text_heads", known.text_heads)
    if not {"vision_heads", "text_heads"} <= fields.keys():
        raise ValueError(
            f"{path}: nothing says how many heads widths {v} and {t} have; write it into "
            f'open_clip_config.json beside it: {{"quick_gelu": ..., "vision_cfg": {{"width": {v}, '
            f'"head_width": ...}}, "text_cfg": {{"width": {t}, "heads": ...}}}}'
        )
    if "quick_gelu" not in fields:
        raise ValueError(
            f"{path} does not say its activation, and a wrong one ruins features silently; pass "
            "quick_gelu=True (OpenAI, MetaCLIP, DFN, LAION-400M B/32) or False (LAION-2B, DataComp)"
        )
    return CLIPConfig(**fields)


def _resize(positions, grid):
    """[1 + old^2, W] -> [1 + grid^2, W]: bicubic, the class token's stays."""
    old = math.isqrt(len(positions) - 1)
    square = positions[1:].T.reshape(1, -1, old, old)  # [1, W, old, old]
    size = (grid, grid)
    square = F.interpolate(square, size, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions[:1], square[0].flatten(1).T])


def load(path_or_spec, config=None, quick_gelu=None, image_size=None, cache=None):
    """A checkpoint in any layout -> CLIP in float32, on CPU, in eval mode, at the cost of one model
    in memory. Its .preprocess and .tokenizer are what the checkpoint says.

    path_or_spec: what read_tensors or fetch take. config: instead of the inferred one. quick_gelu:
    overrules the file. image_size: pixels, resizes the position embeddings. ValueError if keys or
    shapes do not fit, what is said cannot be done here, or nothing says the heads or the
    activation."""
    path = fetch(path_or_spec, cache)
    with _reading(path, "its tensors make no CLIP"):
        raw = read_tensors(path, mapped=True)
        tensors = openai_names(raw)
        if not tensors.keys() >= CORE:
            names = f"{', '.join([*raw][:8])} ({len(raw)} in all)"
            raise ValueError(f"{path}: not a CLIP of two transformers; it has {names}")
        said = _describe(path, raw, tensors, resized=image_size is not None)
        activation = said.get("quick_gelu")
        if config and quick_gelu is None and activation not in (None, config.quick_gelu):
            raise ValueError(
                f"{path} says quick_gelu={activation}, the config says {config.quick_gelu}; "
                "pass quick_gelu= as well, which overrules both"
            )
        if quick_gelu is not None:
            said["quick_gelu"] = quick_gelu
        config = config or _complete(path, said)
        config = dataclasses.replace(config, quick_gelu=said.get("quick_gelu", config.quick_gelu))
        if image_size is not None:
            config = dataclasses.replace(config, image_size=image_size)
        with torch.device("meta"):  # takes no memory: the tensors of the file become the weights
            model = CLIP(config)
        state = {}
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise ValueError(f"{name} is {tensor.dtype}, which are no plain weights")
            state[name] = tensor.to(torch.float32, copy=True)
        if image_size is not None:
            grid = "visual.positional_embedding"
            state[grid] = _resize(state[grid], image_size // config.patch_size)
        model.load_state_dict(state, assign=True)  # compares names and shapes
        pixels = said.get("preprocess", model.preprocess)
        model.preprocess = dataclasses.replace(pixels, size=config.image_size)
        model.tokenizer = said.get("tokenizer", {})
        return model.eval()


def save(model, path, layout="open_clip", **more):
    """Write the model. open_clip: a .safetensors file, or a folder for open_clip's local-dir:. hf:
    a folder for transformers. openai: a .pt file for OpenAI's clip.load, or safetensors with the
    same names. Config, preprocessing and tokenizer are in every file's metadata but .pt's, which
    therefore holds only what OpenAI's rules imply. more: texts for the metadata."""
    c = model.config
    state = model.state_dict()
    path = os.fspath(path)
    is_file = path.endswith((".safetensors", ".pt"))
    pickled = path.endswith(".pt")
    if layout not in ("open_clip", "openai", "hf") or layout == "hf" and is_file:
        raise ValueError(f"{path}, layout {layout}: it is open_clip, openai, or for a folder hf")
    if path.endswith(NOT_WRITTEN):
        raise ValueError(f"{path}: name a file .safetensors, OpenAI's .pt, or a folder")
    weights = WEIGHTS[0]
    beside = {"open_clip_config.json": _open_clip_config(c, model.preprocess, model.tokenizer)}
    if layout == "openai":
        values = (c.image_size, c.context_length, c.vocab_size)
        state |= {name: torch.tensor(value) for name, value in zip(SCALARS, values)}
    elif layout == "hf":
        state = _hf_state(state)
        weights = "model.safetensors"
        pixels = _hf_pixels(model.preprocess)
        beside = {"config.json": _hf_config(c), "preprocessor_config.json": pixels}
    if pickled:
        heads = (c.vision_heads * 64, c.text_heads * 64)
        usual = c.quick_gelu and heads == (c.vision_width, c.text_width) and not model.tokenizer
        usual &= (c.vision_mlp, c.text_mlp) == (4 * c.vision_width, 4 * c.text_width)
        usual &= c.image_size % c.patch_size == 0
        if layout != "openai" or not usual or model.preprocess != Preprocess(size=c.image_size):
            raise ValueError(
                f"{path}: OpenAI's code, which reads .pt, knows QuickGELU, heads 64 wide, MLPs 4 "
                "times as wide, whole patches, its own tokens and its own preprocessing only; save "
                "as .safetensors"
            )
        with _aside(path) as f:
            return torch.save(state, f)
    metadata = _metadata(c, vars(model)) | more
    if is_file:
        return write_tensors(state, path, metadata)
    os.makedirs(path, exist_ok=True)
    write_tensors(state, os.path.join(path, weights), metadata)
    for name, config in beside.items():
        _write_json(config, os.path.join(path, name))


def _hf_state(state):
    theirs = {}
    for ours, tensor in state.items():
        name = functools.reduce(lambda n, pair: n.replace(*pair), HF, ours)
        if "in_proj" in ours:
            for x, part in zip("qkv", tensor.chunk(3)):
                theirs[name.replace("attn.in_proj_", f"self_attn.{x}_proj.")] = part
        else:
            theirs[name] = tensor.T if ours in TURNED else tensor
    return theirs


def _open_clip_config(c, preprocess=None, tokenizer=None):
    v = _theirs(OPEN_CLIP_VISION, c)
    t = _theirs(OPEN_CLIP_TEXT, c)
    v["head_width"] = c.vision_width // c.vision_heads
    v["mlp_ratio"] = (c.vision_mlp + 0.01) / c.vision_width  # open_clip rounds width * ratio down
    t["mlp_ratio"] = (c.text_mlp + 0.01) / c.text_width
    t |= {name: value for name, value in (tokenizer or {}).items() if "tokenizer" in name}
    sizes = {"embed_dim": c.embed_dim, "quick_gelu": c.quick_gelu, "vision_cfg": v, "text_cfg": t}
    pixels = dict(vars(preprocess or Preprocess(size=c.image_size)))
    pixels["resize_mode"] = pixels.pop("resize")
    return {"model_cfg": sizes, "preprocess_cfg": pixels}


def _hf_config(c):
    both = {"projection_dim": c.embed_dim, "hidden_act": "quick_gelu" if c.quick_gelu else "gelu"}
    v = both | _theirs(HF_VISION, c)
    t = both | _theirs(HF_TEXT, c)
    t |= {"bos_token_id": c.vocab_size - 2, "eos_token_id": c.vocab_size - 1}
    kind = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": c.embed_dim}
    return kind | {"vision_config": v, "text_config": t}


def _hf_pixels(p):
    square = {"height": p.size, "width": p.size}
    return HF_PIXELS | {
        "image_processor_type": "CLIPImageProcessor",
        "size": square if p.resize == "squash" else {"shortest_edge": p.size},
        "crop_size": square,
        "resample": next(n for n, name in RESAMPLE.items() if name == p.interpolation),
        "image_mean": p.mean,
        "image_std": p.std,
    }


# ---------------------------------------------------------------------------------------- downloads

MODEL_SERVER = "https://openaipublic.azureedge.net/clip/models"
BPE_SERVER = "https://raw.githubusercontent.com/openai/CLIP/main/clip"
OPENAI = {  # published files and their sha256
    "ViT-B-32": ("ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B-16": ("ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L-14": ("ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "ViT-L-14-336": ("ViT-L-14-336px.pt",
                     "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
    "bpe": ("bpe_simple_vocab_16e6.txt.gz",
            "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"),
}  # fmt: skip


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, *answer):
        new = super().redirect_request(request, *answer)
        if not _safe(new.full_url) or (request.type, new.type) == ("https", "http"):
            raise OSError(f"it redirects to {new.full_url}, which is not encrypted")
        if (new.type, new.host) == (request.type, request.host):  # the token goes nowhere else
            new.unredirected_hdrs |= request.unredirected_hdrs
        return new


def _safe(url):
    parts = urllib.parse.urlsplit(url)
    local = parts.hostname in ("127.0.0.1", "::1", "localhost")
    return parts.scheme == "https" or parts.scheme == "http" and local


def _hub():
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _open(url, **headers):
    try:
        if not _safe(url):
            raise ValueError("expected https://, or http:// on this machine")
        request = urllib.request.Request(url, headers={"User-Agent": "fomo"} | headers)
        if url.startswith(f"{_hub()}/") and "HF_TOKEN" in os.environ:
            request.add_unredirected_header("Authorization", f"Bearer {os.environ['HF_TOKEN']}")
        return urllib.request.build_opener(_Redirects).open(request, timeout=30)
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise OSError(f"{url} cannot be reached ({e}); offline, give a local file's path") from e


@contextlib.contextmanager
def _alone(folder):
    """One process at a time, where folders can be locked: who wants the same file meanwhile waits,
    and finds it."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _is_there(path, sha256):
    if not os.path.exists(path):
        return False
    whole = sha256 in (None, _sha256(path))
    if not whole:
        warnings.warn(f"{path} is damaged, its sha256 is not {sha256}: fetched again", stacklevel=1)
    return whole


def _download(url, path, sha256):
    """url -> path, which is there only when whole and verified. The part that an interrupted run
    left is continued if sha256 is known, for then pieces of two files cannot pass as one."""
    if _is_there(path, sha256):
        return path
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    with _alone(folder):
        if _is_there(path, sha256):
            return path
        part = Path(folder, f"{name}.part")
        _fill(part, url, sha256)
        found = _sha256(part)
        if sha256 not in (None, found):
            part.unlink()
            raise ValueError(f"{url}: its sha256 is {found}, not the expected {sha256}")
        os.replace(part, path)
    return path


def _fill(part, url, sha256):
    """Adds to the part what it lacks of url, or begins anew where that cannot be checked or the
    server cannot do it."""
    have = 0
    if sha256 and part.exists():
        have = max(part.stat().st_size - 1, 0)  # -1: never ask for nothing, which fails
    with _open(url, Range=f"bytes={have}-") as answer, open(part, "ab") as f:
        have = have if answer.status == 206 else 0
        f.truncate(have)
        length = answer.headers.get("Content-Length")  # none if chunked, up to an empty chunk
        total = have + int(length) if length else None
        with tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True) as bar:
            try:
                for chunk in iter(lambda: answer.read(1 << 20), b""):
                    have += f.write(chunk)
                    bar.update(len(chunk))
                if length and have < total:
                    raise ConnectionError("the end is missing")
            except (ConnectionError, TimeoutError, http.client.IncompleteRead) as e:
                some = f"{have} of {total or 'unknown'} bytes"
                goes_on = ", it continues there" if sha256 else ""
                raise OSError(f"{url} broke off after {some}; run again{goes_on}") from e


ALONG = (
    "config.json", "open_clip_config.json", "preprocessor_config.json", "processor_config.json",
    "merges.txt", "tokenizer.json",
)  # fmt: skip


def _fetch_hf(repo, wanted, cache):
    """The folder, or the wanted file. Configs, merges and shards come along. sha256.json keeps what
    the hub says of each, to verify them when offline."""
    folder = Path(cache, "hf", repo.replace("/", "--"))
    note = folder / "sha256.json"
    known = _read_json(note) if note.exists() else {}
    names = [wanted] if wanted else WEIGHTS
    if not known.keys() & names:
        listing = f"{_hub()}/api/models/{repo}?blobs=true"
        fault = "the answer is no list of a repository's files"
        with _open(listing) as answer, _reading(listing, fault):
            siblings = json.load(answer)["siblings"]
            files = {s["rfilename"]: (s.get("lfs") or {}).get("sha256") for s in siblings}
        main = [name for name in names if name in files][:1]
        if not main:
            some = ", ".join([*files][:20])
            raise ValueError(f"hf:{repo} has no {wanted or 'CLIP weights'}; it has {some}")
        shard = re.escape(main[0].split(".")[0]) + r"-\d+-of-\d+\.\w+"
        weights = [name for name in files if re.fullmatch(shard, name)] + main
        unknown = [name for name in weights if files[name] is None and ".index." not in name]
        if unknown:
            which = ", ".join(unknown)
            warnings.warn(f"hf:{repo}: no sha256 of {which} to verify it by", stacklevel=1)
        known |= {name: files[name] for name in (*ALONG, *weights) if name in files}
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(known, note)
    for name, sha256 in known.items():
        _download(f"{_hub()}/{repo}/resolve/main/{name}", os.path.join(folder, name), sha256)
    return os.path.join(folder, wanted)


HUB = re.compile(r"hf:([\w-][\w.-]*/[\w-][\w.-]*)((?:/[\w-][\w.-]*)*)")
WEB = re.compile(r"(https?://[^#]+)(?:#sha256=([0-9a-f]{64}))?")


def fetch(spec, cache=None):
    """hf:ORG/REPO[/FILE], openai:NAME or https://...[#sha256=...] -> path, downloaded once into
    cache (default ~/.cache/fomo), resumable and verified; anything else must be a path. HF_ENDPOINT
    and CLIP_MIRROR in the environment name other servers. OSError without a network or a file,
    ValueError for a checksum that is wrong."""
    spec = os.fspath(spec)
    cache = os.fspath(cache or os.path.expanduser("~/.cache/fomo"))
    hub = HUB.fullmatch(spec)
    if hub:
        repo, wanted = hub.groups()
        return _fetch_hf(repo, wanted.removeprefix("/"), cache)
    name = spec.removeprefix("openai:")
    if name in OPENAI and name != spec:
        file, sha256 = OPENAI[name]
        server = BPE_SERVER if name == "bpe" else f"{MODEL_SERVER}/{sha256}"
        if "CLIP_MIRROR" in os.environ:
            server = f"{os.environ['CLIP_MIRROR']}/{sha256}"
        return _download(f"{server}/{file}", os.path.join(cache, "openai", file), sha256)
    web = WEB.fullmatch(spec)
    if web:
        url, sha256 = web.groups()
        key = hashlib.sha256(spec.encode()).hexdigest()[:16]
        name = os.path.basename(url.partition("?")[0]) or "file"
        return _download(url, os.path.join(cache, "web", key, name), sha256)
    if not os.path.exists(spec):
        raise FileNotFoundError(
            f"{spec}: no such file or folder, nor hf:ORG/REPO[/FILE], https://...[#sha256=64 "
            f"hexadecimal digits] or openai: with {', '.join(OPENAI)}"
        )
    return spec


def find_bpe(path_or_spec, cache=None):
    """-> path of the merges for these weights: beside them, else those of an installed open_clip or
    of transformers' cache, else for weights that were downloaded OpenAI's, downloaded too."""
    path = Path(fetch(path_or_spec, cache))
    folders = [path if path.is_dir() else path.parent]
    package = importlib.util.find_spec("open_clip")
    folders += map(Path, package.submodule_search_locations) if package else []
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"
    folders += sorted(hub.glob("models--openai--clip-vit-*/snapshots/*"))
    for folder in folders:
        for name in ("bpe_simple_vocab_16e6.txt.gz", "merges.txt", "tokenizer.json"):
            if (folder / name).is_file():
                return str(folder / name)
    if os.path.exists(path_or_spec):
        raise FileNotFoundError(
            f"{path}: no bpe_simple_vocab_16e6.txt.gz, merges.txt or tokenizer.json beside it, and "
            "no open_clip is installed: pass such a file as --bpe, or --bpe openai:bpe, a download"
        )
    return fetch("openai:bpe", cache)
