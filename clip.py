"""CLIP from scratch: two transformers, the tokenizer, every layout that its checkpoints come in.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision"
(arXiv 2103.00020). State-dict keys are OpenAI's. This file stands alone; copy it. From a picture
file to features:

    import clip, torch
    from PIL import Image
    model = clip.load("openai:ViT-B-32")  # or hf:ORG/REPO[/FILE], https://...#sha256=..., a path
    tokenizer = clip.Tokenizer(clip.find_bpe("openai:ViT-B-32"))
    image = model.encode_image(model.preprocess(Image.open("cat.jpg"))[None])  # [1, D]
    text = model.encode_text(tokenizer(["a cat", "a dog"]))  # [2, D]

The loss of a batch, by a model before any training:

    model = clip.load("new:tiny")
    images = model.preprocess(torch.zeros(2, 3, 32, 48, dtype=torch.uint8))  # [2, 3, 32, 32]
    tokens = clip.Tokenizer()(["a red square", "two dots"], context_length=64)
    loss = clip.contrastive_loss(*model(images, tokens))
    clip.save(model, "tiny-hf", layout="hf")  # transformers'; or "open_clip", "openai"
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import html
import http.client
import importlib.util
import itertools
import json
import math
import os
import pickle
import re
import unicodedata
import urllib.request
import warnings
import zipfile
from collections import Counter, OrderedDict, UserDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import InterpolationMode, functional
from tqdm import tqdm

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


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Self-attention with q, k and v in one in_proj, under nn.MultiheadAttention's names."""

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
    preprocess: what is done to pictures before encode_image."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.preprocess = Preprocess(size=c.image_size)
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


# ----------------------------------------------------------------------------------------- pictures

RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """What was done to the pictures that a model's weights have learnt from. Called, it does so:
    PIL image -> float32 [3, S, S]; uint8 [..., 3, H, W] -> float32 [..., 3, S, S], on its device.
    What has S x S pixels is only normalised, so others may crop. ValueError if it is not uint8."""

    mean: tuple = MEAN  # of the three channels, from 0 to 1
    std: tuple = STD
    resize: str = "shortest"  # side to size, then the centre is cut out; or "squash": both sides
    interpolation: str = "bicubic"  # or "bilinear"; antialiased
    size: int = 224  # pixels, square

    def __post_init__(self):
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        if self.resize not in ("shortest", "squash") or self.interpolation not in RESAMPLE.values():
            raise ValueError(f"{self} of pictures cannot be done here")

    def __call__(self, picture):
        return normalise(self.crop(picture), self.mean, self.std)

    def crop(self, picture):
        """PIL image or uint8 [..., 3, H, W] -> uint8 [..., 3, S, S]."""
        if isinstance(picture, Image.Image):
            if picture.mode.startswith("I"):  # 16 bits: convert() would clip, not scale
                picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
            picture = functional.pil_to_tensor(picture.convert("RGB"))
        if picture.dtype != torch.uint8 or picture.shape[-3] != 3:
            raise ValueError(f"not uint8 [..., 3, H, W]: {picture.dtype} {[*picture.shape]}")
        edges = [self.size] * (2 if self.resize == "squash" else 1)
        how = InterpolationMode(self.interpolation)
        pixels = functional.resize(picture, edges, interpolation=how, antialias=True)
        return functional.center_crop(pixels, [self.size, self.size])


def normalise(images, mean=MEAN, std=STD):
    """uint8 [..., 3, S, S] -> float32, on its device: mean 0, variance 1 over what was learnt."""
    channels = zip(images.unbind(-3), mean, std)  # by number: tensors of them would be copied
    return torch.stack([(x.float() / 255 - m) / s for x, m, s in channels], dim=-3)


# ---------------------------------------------------------------------------------------- tokenizer
# Captions are repaired as OpenAI did with ftfy, here by the standard library: entities, quotes,
# ligatures, full-width forms, controls, surrogates. Text once read in a wrong encoding stays.

CP1252 = {i: bytes([i]).decode("cp1252", "ignore") or chr(i) for i in range(0x80, 0xA0)}
JUNK = re.compile(  # colours of a terminal, then controls
    r"\x1b\[[\d;]*[a-zA-Z]|[\0-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]"
)
FORMS = [*map(ord, "ĲĳŉǱǲǳǄǅǆǇǈǉǊǋǌﬀﬁﬂﬃﬄﬆ"), 0x3000, *range(0xFF01, 0xFFF0)]
REPAIR = CP1252 | {i: unicodedata.normalize("NFKC", chr(i)) for i in FORMS} | {ord("ﬅ"): "ſt"}
REPAIR |= dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'")
REPAIR |= dict.fromkeys(range(0x201C, 0x2020), '"')
# OpenAI's 's|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+; \d lacks ², so encode sets it off
WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\w\s]|_)+", re.IGNORECASE)


def clean(text):
    """A caption as CLIP's vocabulary saw it: repaired, white space collapsed, lower case."""
    markup = "<" in text  # its entities are resolved twice, at the end
    for _ in range(16):  # what is resolved may hide more
        before = text
        if not markup:
            text = re.sub(r"&#?\w{1,24};", lambda match: html.unescape(match[0]), text)
        pairs = JUNK.sub("", text).translate(REPAIR).encode("utf-16-le", "surrogatepass")
        text = pairs.decode("utf-16-le", "replace")  # pairs of surrogates join, halves become �
        text = unicodedata.normalize("NFC", text)
        if text == before:
            break
    return " ".join(html.unescape(html.unescape(text)).split()).lower()


class Tokenizer:
    """CLIP's byte-pair encoding. bpe: path of bpe_simple_vocab_16e6.txt.gz, or of Hugging Face's
    merges.txt or tokenizer.json; ValueError if these are another model's. Without it, the 256 bytes
    of UTF-8, start (256) and end (257), as "tiny" reads. No caption can inject a control token."""

    def __init__(self, bpe=None):
        self.merges = {}  # pair of ids -> id
        self.words = {}  # those met before -> ids
        self.symbols = [bytes([b]) for b in range(256)]
        if bpe is not None:
            with _reading(bpe, "no merges of a CLIP"):
                self._read(bpe)
        self.start = len(self.symbols)
        self.end = self.start + 1
        self.vocab_size = self.start + 2

    def _read(self, bpe):
        with (gzip.open if str(bpe).endswith(".gz") else open)(bpe, "rb") as f:
            text = f.read(2**26).decode()
        model = json.loads(text)["model"] if text.startswith("{") else {}
        lines = text.splitlines()
        lines = lines["#version" in lines[0] :][:48_894]  # OpenAI's has more, which are not used
        pairs = [x.split() if isinstance(x, str) else x for x in model.get("merges", lines)]
        if not any(second.endswith("</w>") for _, second in pairs):
            raise ValueError("none of its merges ends a word")  # GPT-2's
        # ids 0-255 are the bytes: 188 printable ones first, then the others, spelt from chr(256)
        order = sorted(range(256), key=lambda b: b == 32 or not chr(b).isprintable())
        letters = [chr(b) if i < 188 else chr(256 + i - 188) for i, b in enumerate(order)]
        self.letters = {b: i for i, b in enumerate(order)}
        ids = {letter: i for i, letter in enumerate([*letters, *(f"{s}</w>" for s in letters)])}
        self.symbols = [bytes([b]) for b in order] + [bytes([b, 32]) for b in order]
        for first, second in pairs:
            pair = ids[first], ids[second]
            self.merges[pair] = ids[first + second] = len(self.symbols)
            self.symbols.append(self.symbols[pair[0]] + self.symbols[pair[1]])
        ids |= {"<|startoftext|>": len(self.symbols), "<|endoftext|>": len(self.symbols) + 1}
        if any(ids.get(symbol) != i for symbol, i in model.get("vocab", {}).items()):
            raise ValueError("its vocabulary is not in CLIP's order")

    def _merge(self, word):
        """Joins the pair learnt first, of the smallest id, until no known pair is left."""
        ids = [self.letters[b] for b in word.encode()]
        ids[-1] += 256  # the form that ends a word
        while True:
            known = [self.merges[pair] for pair in itertools.pairwise(ids) if pair in self.merges]
            if not known:
                break
            joined = ids[:1]
            for i in ids[1:]:
                if self.merges.get((joined[-1], i)) == min(known):
                    joined[-1] = min(known)
                else:
                    joined.append(i)
            ids = joined
        self.words[word] = ids
        return ids

    def encode(self, text):
        """-> list of ids, without start and end."""
        if not self.merges:
            return list(text.encode("utf-8", errors="replace"))
        text = clean(text)
        if not text.isascii():
            text = "".join(f" {c} " if c.isnumeric() and not c.isalpha() else c for c in text)
        return [i for word in WORD.findall(text) for i in self.words.get(word) or self._merge(word)]

    def decode(self, ids):
        """ids, up to the first end token -> text, as cleaned, with a space between words."""
        ids = itertools.takewhile(lambda i: i != self.end, map(int, ids))
        text = b"".join(self.symbols[i] for i in ids if i != self.start).decode("utf-8", "replace")
        return text.removesuffix(" ") if self.merges else text

    def __call__(self, texts, context_length=77, truncate=True):
        """list of N strings -> int64 [N, context_length]: start, text, end, zeros. A text too long
        is cut and keeps its end token, or with truncate=False is a ValueError. A string is one."""
        texts = [texts] if isinstance(texts, str) else texts
        tokens = np.zeros((len(texts), context_length), np.int64)
        for row, text in zip(tokens, texts):
            ids = self.encode(text)
            if len(ids) > context_length - 2 and not truncate:
                raise ValueError(f"{text[:80]!r} has {len(ids)} tokens: more than fit in")
            ids = [self.start, *ids[: context_length - 2], self.end]
            row[: len(ids)] = ids
        return torch.from_numpy(tokens)


def check_tokenizer(model, tokenizer, path):
    """ValueError unless the weights in path have learnt as many tokens as the tokenizer has."""
    learnt = model.config.vocab_size
    if tokenizer.vocab_size != learnt:
        raise ValueError(f"{path} has learnt {learnt} tokens and the tokenizer has "
                         f"{tokenizer.vocab_size}: merges of its own belong beside it")  # fmt: skip


# ------------------------------------------------------------------------------------- tensor files
# safetensors: u64 little-endian header length, JSON {name: {dtype, shape, data_offsets}}, then the
# bytes of each tensor

DTYPES = {  # narrowest first
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32,
    "F64": torch.float64, "I64": torch.int64}  # fmt: skip
WEIGHTS = (  # best first
    "open_clip_model.safetensors", "model.safetensors", "model.safetensors.index.json",
    "open_clip_pytorch_model.bin", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "adapter_model.safetensors")  # fmt: skip
ENDINGS = (".safetensors", ".bin", ".pt")
NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.\w+")
OTHER_FORMATS = {  # first bytes -> what to say
    b"version https://git-": "a git-lfs pointer, whose file was not fetched: git lfs pull",
    b"GGUF": "GGUF, quantised for llama.cpp: take the safetensors that it was made from",
    b"<!DOCTYPE": "a web page, of a login perhaps: download the file itself"}  # fmt: skip


@contextlib.contextmanager
def _reading(path, fault):
    """Whatever a malformed file does to the code that reads it becomes a sentence that names it."""
    try:
        yield
    except Exception as e:
        if isinstance(e, OSError) or str(e).startswith(os.path.dirname(path) or str(path)):
            raise  # it names the file, or the one beside it, already
        raise ValueError(f"{path}: {fault} ({type(e).__name__}: {str(e)[:500]})") from e


def _folder(path):
    return Path(path if os.path.isdir(path) else os.path.dirname(path))


class Tensors(UserDict):
    """name -> tensor, read anew when asked for, and kept by the caller alone. metadata: strings."""

    def __init__(self, readers, metadata=None):
        super().__init__(readers)
        self.metadata = metadata or {}

    def __getitem__(self, name):
        return self.data[name]()


def _read_safetensors(path):
    flat = torch.from_file(path, size=os.path.getsize(path), dtype=torch.uint8)  # not in memory
    start = 8 + int.from_bytes(flat[:8].numpy().tobytes(), "little")
    header = json.loads(flat[8 : min(start, 10**8)].numpy().tobytes())
    metadata = header.pop("__metadata__", None)
    places = sorted(entry["data_offsets"] for entry in header.values())
    if [0, *(b for _, b in places)] != [*(a for a, _ in places), len(flat) - start]:
        raise ValueError(f"torn: its tensors do not fill its {len(flat)} bytes")

    def read(dtype, shape, data_offsets):
        a, b = (start + offset for offset in data_offsets)
        part = torch.from_file(path, size=b, dtype=torch.uint8)[a:]  # its pages go with it
        part = part.clone() if a % DTYPES[dtype].itemsize else part
        return part.view(DTYPES[dtype]).reshape(shape)

    return Tensors({n: functools.partial(read, **v) for n, v in header.items()}, metadata)


class _Bag(dict):
    """Stands for whatever else a pickle names: keeps its attributes, drops its arguments."""

    __hash__ = object.__hash__

    def __init__(self, *_, **__):
        pass

    append = extend = __init__  # to a deque of losses, say

    def __setstate__(self, state):
        self.update(state if isinstance(state, dict) else {})


REBUILD = {  # functions that a pickle names to make tensors -> what is called in their place
    "_rebuild_tensor_v2": lambda *x: torch._utils._rebuild_tensor_v2(*x[:4], False, {}, *x[6:]),
    "_rebuild_parameter": lambda tensor, *_: tensor,
    "_rebuild_parameter_with_state": lambda tensor, *_: tensor}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Of torch.save's zips and TorchScript archives. It imports and runs nothing that these name;
    torch.load refuses the archives, whose own code torch.jit.load would run."""

    def __init__(self, path, archive, pickled):
        super().__init__(archive.open(pickled))
        self.archive = archive
        self.root = pickled.removesuffix("data.pkl")
        flat = torch.from_file(path, size=os.path.getsize(path), dtype=torch.uint8)
        self.flat = flat.untyped_storage()

    def find_class(self, module, name):
        if module == "torch" and name.endswith("Storage"):
            return torch.storage._get_dtype_from_pickle_storage_type(name)
        return REBUILD[name] if name.startswith("_rebuild") else _Bag  # no sparse, packed ... ones

    def persistent_load(self, pid):
        _, dtype, member, *_ = pid
        info = self.archive.getinfo(f"{self.root}data/{member}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError("its tensors are compressed")
        with self.archive.open(info):  # compares its header with the directory, stops behind it
            start = self.archive.fp.tell()
        storage = self.flat[start : start + info.file_size]
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


def _flat(tree, prefix, seen):
    """Each dict and list once: a pickle can name one in a thousand places."""
    seen.add(id(tree))
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            yield from _flat(value, f"{prefix}{key}.", seen)


def _read_torch(path):
    with zipfile.ZipFile(path) as archive:
        pickled = min((n for n in archive.namelist() if n.endswith("data.pkl")), key=len)
        tree = _Unpickler(path, archive, pickled).load()
    return Tensors({name: lambda t=t: t for name, t in _flat(tree, "", set())})


def read_tensors(path, mapped=False):
    """Tensors by name, as the file spells it. path: a safetensors file, a torch.save zip, a
    TorchScript archive, an index of shards, or a folder that has one of them; ValueError if it is
    none. mapped: tensors are the file itself, mapped into memory, for who goes over them once."""
    path = Path(path)
    if path.is_dir():
        names = sorted(os.listdir(path))
        best = [name for name in WEIGHTS if name in names]
        others = [n for n in names if n.endswith(ENDINGS) and not NOT_WEIGHTS.fullmatch(n)]
        if not best and len(others) != 1:
            inner = {p.parent.name for p in path.glob("*/*") if p.name.endswith(ENDINGS)}
            choice = others or sorted(inner, key=lambda name: (len(name), name))  # step-5, step-10
            raise ValueError(f"{path}: {len(others)} files of weights in it; name one of {choice}")
        path = path / (best + others)[0]
    if path.name.endswith(".index.json"):
        with _reading(path, "no list of shards by tensor"):
            files = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        shards = [read_tensors(path.with_name(file), mapped) for file in files]
        return Tensors({name: r for shard in shards for name, r in shard.data.items()})
    with open(path, "rb") as f:
        start = f.read(20)
    for magic, what in OTHER_FORMATS.items():
        if start.startswith(magic):
            raise ValueError(f"{path} is {what}")
    with _reading(path, "neither plain tensors of torch.save nor safetensors"):
        tensors = (_read_torch if start.startswith(b"PK") else _read_safetensors)(str(path))
    if not mapped:
        tensors.data = {n: lambda r=r: r().clone() for n, r in tensors.data.items()}
    return tensors


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


def write_tensors(tensors, path, metadata=None):
    """Mapping from name to tensor -> safetensors file, byte for byte as the safetensors package
    writes it: widest dtype first, then by name, the data aligned to 8 bytes."""
    header = {"__metadata__": metadata} if metadata else {}
    kinds = {dtype: (-rank, kind) for rank, (kind, dtype) in enumerate(DTYPES.items())}
    places = sorted((kinds[t.dtype], n, [*t.shape], t.nbytes) for n, t in tensors.items())
    end = 0
    for (_, kind), name, shape, size in places:
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
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
    ("attn.out_proj", "self_attn.out_proj"),
    ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
)  # fmt: skip
TURNED = ("visual.proj", "text_projection")
SCALARS = ("input_resolution", "context_length", "vocab_size")  # OpenAI's archives hold these
NOISE = (*SCALARS, "attn_mask", "position_ids")  # constants that some save with the weights
CORE = {"visual.conv1.weight", "visual.positional_embedding", "positional_embedding",
        "token_embedding.weight", "text_projection"}  # fmt: skip
FIRST = re.compile(r"(|.*\.)(visual\.conv1|vision_model\.embeddings\.patch_embedding)\.weight")
WRAPPERS = re.compile(r"_(orig_mod|[a-z]+_wrapped_module|modules|parameters|buffers)\.")
# Long-CLIP's positional_embedding_res is of the tower, too; a visual_head is not
TOWERS = re.compile(
    r"(visual|vision_model|transformer|text_model|ln_final)(\b|\d)|visual_projection"
    r"|text_projection|token_embedding|positional_embedding|logit_scale"
)
NOT_CLIP = {  # what in all names, a line each, tells that it is no CLIP to use -> what it is
    r"lora_(unet|te\d?)_": "kohya's LoRA for Stable Diffusion, whose parts are no CLIP",
    r"[._](lora|ia3|lokr|vera)_": "an adapter of {base}: merge it first, peft's merge_and_unload",
    r"\.(SCB|absmax|qweight|weight_scale)\b": "quantised: take the weights that it was made from",
    r"logit_bias|head\.probe|attn_pool\.latent": "a SigLIP, of other towers than CLIP's",
    r"visual\.(layer1|attnpool|trunk)\.": "a CLIP that sees by a ResNet or a tower of timm's",
    r"\A(?!(?s:.*)(text|token|word))(?s:.*)(visual\.|vision_model|patch_embed|conv_proj|^conv1\.)":
        "a vision tower alone, where a CLIP has a text tower, too",
    r"\A(?!(?s:.*)(vision|visual|patch_embed))(?s:.*)(text_model|token_embedding)":
        "a text tower alone, where a CLIP has a vision tower, too",
    r"exp_avg|momentum_buffer|fp32_flat_groups|single_partition_of_fp32":
        "an optimizer's state, whose weights lie elsewhere; ZeRO's zero_to_fp32.py collects them",
}  # fmt: skip


def _check_kind(path, names):
    """ValueError says what the tensors of these names are, if they are no CLIP to use."""
    for telling, what in NOT_CLIP.items():
        if re.search(telling, "\n".join(names), re.MULTILINE):
            note = _folder(path) / "adapter_config.json"
            base = json.loads(note.read_text())["base_model_name_or_path"] if note.is_file() else ""
            raise ValueError(f"{path} is {what.format(base=base or 'another model')}")
    if not names >= CORE:
        raise ValueError(f"{path}: not a CLIP of two transformers; it has {[*names][:8]}")


def openai_names(tensors):
    """A mapping of any layout, seen under OpenAI's names and as lazy as it was.

    Prefixes go, Hugging Face's tensors are joined and turned. What lies outside the two towers (a
    head, an optimizer) is left out, and a warning names it; an unknown name inside them stays, so
    load refuses it. What holds no CLIP keeps its names. ValueError if there are several CLIPs."""
    plain = {name: WRAPPERS.sub("", name) for name in tensors}
    first = [match for match in map(FIRST.fullmatch, plain.values()) if match]
    if len(first) > 1:
        which = ", ".join(match[1] or "no prefix" for match in first)
        raise ValueError(f"it holds {len(first)} CLIPs ({which}): save one by itself")
    if not first:
        return tensors
    prefix, start = first[0].groups()
    hf = start != "visual.conv1"
    sources = {}  # our name -> theirs, three for q, k and v
    left_out = Counter()
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
            left_out[plain[name].removeprefix(prefix).partition(".")[0]] += 1
    if not sources.keys() >= CORE:  # a ResNet, SigLIP, ...
        return tensors
    if left_out:
        words = ", ".join(f"{name} ({n})" for name, n in left_out.most_common(8))
        warnings.warn(f"no part of the CLIP, and left out: the tensors of {words}", stacklevel=1)

    def read(ours):
        parts = [tensors[name] for name in sources[ours]]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if hf and ours in TURNED:
            return tensor.T.contiguous()
        return tensor.reshape(()) if ours == "logit_scale" else tensor  # [1] in some files

    readers = {ours: functools.partial(read, ours) for ours in sources}
    return Tensors(readers, getattr(tensors, "metadata", None))


# ------------------------------------------------------------------------------------------ configs
# What no tensor shows - heads, activation, what was done to the pictures - is said by the file's
# metadata, by OpenAI's rules, or by the configs beside the weights

USUAL = {  # fields of open_clip that leave a plain CLIP: whatever they say, or if they say this
    **dict.fromkeys(("image_size", "patch_size", "width", "layers", "heads", "head_width", "eos_id",
                     "mlp_ratio", "patch_dropout", "context_length", "vocab_size")),
    "pool_type": ["tok", "argmax"], "proj_type": ["linear"], "pos_embed_type": ["learnable"],
    "tokenizer_kwargs": [{"clean": "lower"}], "hf_tokenizer_name": ["openai/clip-vit-base-patch32"]
}  # fmt: skip


def _says_open_clip(c):
    model = c.get("model_cfg", c)
    if not isinstance(model, dict) or not isinstance(model.get("vision_cfg"), dict):
        return {}  # another program's
    v = {"width": 768, "head_width": 64} | model["vision_cfg"]
    t = {"heads": 8} | model["text_cfg"]
    odd = {k: x for k, x in (v | t).items() if x and x not in (USUAL.get(k, []) or [x])}
    if odd:
        raise ValueError(f"{odd} make it another architecture, or other tokens, than plain CLIP's")
    p = {k: x for k, x in (c.get("preprocess_cfg") or {}).items() if x is not None}
    resize = p.get("resize_mode", "shortest")
    how = p.get("interpolation", "bicubic")
    return {"quick_gelu": bool(model.get("quick_gelu")), "text_heads": t["heads"],
            "vision_heads": v["width"] // v["head_width"],
            "preprocess": Preprocess(p.get("mean", MEAN), p.get("std", STD), resize, how)
            }  # fmt: skip


def _says_hf(c):
    """What is missing has transformers' default; *_config_dict, of its first release, wins."""
    if not isinstance(c.get("vision_config") or c.get("vision_config_dict"), dict):
        return _says_open_clip(c)
    said = {}
    kinds = set()
    for tower, heads in (("vision", 12), ("text", 8)):
        own = (c.get(f"{tower}_config") or {}) | (c.get(f"{tower}_config_dict") or {})
        said[f"{tower}_heads"] = own.get("num_attention_heads", heads)
        kinds.add((c.get("model_type", "clip"), own.get("hidden_act", "quick_gelu")))
    if kinds not in ({("clip", "gelu")}, {("clip", "quick_gelu")}):
        raise ValueError(f"model_type and activation {kinds}: no plain CLIP")
    return said | {"quick_gelu": ("clip", "quick_gelu") in kinds}


def _says_hf_pixels(c):
    c = c.get("image_processor", c)  # of transformers 5
    size = c.get("size", 224)
    squash = isinstance(size, dict) and "height" in size
    edges = [e.values() if isinstance(e, dict) else [e] for e in (size, c.get("crop_size") or size)]
    kind = c.get("image_processor_type") or c.get("feature_extractor_type") or "CLIP"
    done = all(c.get(k, True) for k in ("do_resize", "do_rescale", "do_normalize"))
    done &= squash or c.get("do_center_crop", True) and kind.startswith("CLIP")
    done &= abs(c.get("rescale_factor", 1 / 255) * 255 - 1) < 1e-3
    if not done or len({*itertools.chain(*edges)}) > 1:
        raise ValueError(f"{c}: pictures can be made one square, from 0 to 1, normalised; no else")
    how = ("squash" if squash else "shortest", RESAMPLE.get(c.get("resample", 3)))
    return {"preprocess": Preprocess(c.get("image_mean", MEAN), c.get("image_std", STD), *how)}


BESIDE = {  # file -> its reader; what an earlier one says holds
    "open_clip_config.json": _says_open_clip, "config.json": _says_hf,
    "preprocessor_config.json": _says_hf_pixels, "processor_config.json": _says_hf_pixels,
}  # fmt: skip


def _describe(path, strict=False):
    """-> tensors under OpenAI's names; fields of CLIPConfig, and "preprocess": what the tensors'
    shapes show, and what is said of them. What nothing says is not in it."""
    raw = read_tensors(path, mapped=True)
    tensors = openai_names(raw)
    if not strict and not tensors.keys() >= CORE:
        return tensors, {}
    _check_kind(path, tensors.keys())
    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    context, text_width = tensors["positional_embedding"].shape
    side = math.isqrt(len(tensors["visual.positional_embedding"]) - 1)  # patches
    fields = {"embed_dim": tensors["text_projection"].shape[1], "image_size": side * patch,
              "patch_size": patch, "vision_width": width, "text_width": text_width,
              "context_length": context, "vocab_size": len(tensors["token_embedding.weight"])
              }  # fmt: skip
    for tower, start in (("vision", "visual."), ("text", "")):
        blocks = f"{start}transformer.resblocks."
        ends = [name for name in tensors if name.startswith(blocks) and name.endswith("ln_1.bias")]
        fields[f"{tower}_layers"] = len(ends)
        fields[f"{tower}_mlp"] = len(tensors[f"{blocks}0.mlp.c_fc.bias"])
    said = {}
    if "quick_gelu" in raw.metadata.get("config", ""):  # else it is another program's
        said = json.loads(raw.metadata["config"])
        said["preprocess"] = Preprocess(**json.loads(raw.metadata.get("preprocess", "{}")))
    elif "input_resolution" in raw:  # OpenAI's
        heads = {"vision_heads": width // 64, "text_heads": text_width // 64}
        said = {"quick_gelu": True, "preprocess": Preprocess()} | heads
    else:
        for file, reader in ((_folder(path) / name, reader) for name, reader in BESIDE.items()):
            if file.is_file():
                with _reading(file, "not a config of a CLIP that can be used here"):
                    said = reader(json.loads(file.read_text("utf-8-sig"))) | said
    fields |= said
    if said.get("preprocess"):
        fields["preprocess"] = dataclasses.replace(said["preprocess"], size=fields["image_size"])
    return tensors, fields


def _metadata(fields):
    config = {k: x for k, x in fields.items() if k != "preprocess"}
    pixels = vars(fields.get("preprocess") or Preprocess(size=fields["image_size"]))
    return {"format": "pt", "config": json.dumps(config), "preprocess": json.dumps(pixels)}


def agree(paths, quick_gelu=None):
    """-> metadata by which load knows a file that is made from all these; {} if none of them says
    the activation. quick_gelu overrules them. ValueError if two of them differ."""
    common = {}
    for path in paths:
        with _reading(path, "its tensors make no CLIP"):
            _, fields = _describe(path)
        if fields and quick_gelu is not None:
            fields["quick_gelu"] = quick_gelu
        for key, value in fields.items():
            if common.setdefault(key, value) != value:
                raise ValueError(f"{[*map(str, paths)]} differ in {key}: {common[key]} and {value}")
    return _metadata(common) if "quick_gelu" in common else {}


def load(path_or_spec, config=None, quick_gelu=None, cache=None):
    """A checkpoint in any layout -> CLIP in float32, on CPU, in eval mode, at the cost of one model
    in memory. path_or_spec: what read_tensors or fetch take; or new:NAME, one of CONFIGS before any
    training, from seed 0. config: instead of the inferred one. quick_gelu: overrules the file.
    ValueError if it is no CLIP, keys or shapes do not fit, or nothing says the activation."""
    name = os.fspath(path_or_spec).removeprefix("new:")
    if name in CONFIGS and name != os.fspath(path_or_spec):
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as they would
            torch.default_generator.manual_seed(0)
            return CLIP(dataclasses.replace(CONFIGS[name], quick_gelu=bool(quick_gelu))).eval()
    path = fetch(path_or_spec, cache)
    with _reading(path, "its tensors make no CLIP"):
        tensors, fields = _describe(path, strict=True)
        pixels = fields.pop("preprocess", Preprocess())
        if quick_gelu is not None:
            fields["quick_gelu"] = quick_gelu
        if config is None and "quick_gelu" not in fields:
            raise ValueError("nothing says its activation, and a wrong one ruins features: quick_"
                             "gelu=True (OpenAI, MetaCLIP, DFN), False (LAION-2B)")  # fmt: skip
        for tower in ("vision", "text"):  # heads that nothing says: as of CONFIGS, or 64 wide
            width = fields[f"{tower}_width"]
            known = {vars(c)[f"{tower}_width"]: vars(c)[f"{tower}_heads"] for c in CONFIGS.values()}
            fields.setdefault(f"{tower}_heads", known.get(width, width // 64))
        config = config or CLIPConfig(**fields)
        if config.quick_gelu != fields.get("quick_gelu", config.quick_gelu):
            raise ValueError(f"config's quick_gelu is {config.quick_gelu}, the file's is not")
        with torch.device("meta"):  # takes no memory: the tensors of the file become the weights
            model = CLIP(config)
        state = {name: t.to(torch.float32, copy=True) for name, t in tensors.items()}
        model.load_state_dict(state, assign=True)  # compares names and shapes
    model.preprocess = dataclasses.replace(pixels, size=config.image_size)
    return model.eval()


def save(model, path, layout="open_clip", metadata=None):
    """Write the model. open_clip: a .safetensors file, or a folder for open_clip's local-dir:. hf:
    a folder for transformers. openai: a .pt file for OpenAI's clip.load, or safetensors with the
    same names. Config, preprocessing and the texts of metadata {name: text} are in every file but
    .pt's, which therefore holds only what OpenAI's rules imply."""
    c = model.config
    state = model.state_dict()
    path = os.fspath(path)
    ending = os.path.splitext(path)[1]
    if layout not in {".pt": ("openai",), ".safetensors": ("openai", "open_clip"), ".pth": (),
                      ".bin": (), ".ckpt": ()}.get(ending, ("openai", "open_clip", "hf")):
        raise ValueError(f"{path}, layout {layout}: open_clip takes a .safetensors file or a "
                         "folder, openai a .pt, too, hf a folder")  # fmt: skip
    beside = {"open_clip_config.json": _open_clip_config(c, model.preprocess)}
    if layout == "openai":
        values = (c.image_size, c.context_length, c.vocab_size)
        state |= {name: torch.tensor(value) for name, value in zip(SCALARS, values)}
    elif layout == "hf":
        state = {}
        for ours, tensor in model.state_dict().items():
            name = functools.reduce(lambda n, pair: n.replace(*pair), HF, ours)
            tensor = tensor.T if ours in TURNED else tensor
            for x, part in zip("qkv", tensor.chunk(3) if "in_proj" in ours else [tensor]):
                state[name.replace("attn.in_proj_", f"self_attn.{x}_proj.")] = part
        beside = _hf_configs(c, model.preprocess)
    if ending == ".pt":
        implied = {"quick_gelu": True, "vision_heads": c.vision_width // 64,
                   "text_heads": c.text_width // 64, "vision_mlp": 4 * c.vision_width,
                   "text_mlp": 4 * c.text_width}  # fmt: skip
        if vars(c) | implied != vars(c) or model.preprocess != Preprocess(size=c.image_size):
            raise ValueError(f"{path}: OpenAI's code, which reads .pt, knows other heads, MLPs, "
                             "activation or preprocessing; save as .safetensors")  # fmt: skip
        with _aside(path) as f:
            return torch.save(state, f)
    texts = _metadata(vars(c) | {"preprocess": model.preprocess}) | (metadata or {})
    if ending == ".safetensors":
        return write_tensors(state, path, texts)
    os.makedirs(path, exist_ok=True)
    write_tensors(state, os.path.join(path, WEIGHTS[layout == "hf"]), texts)
    for name, tree in beside.items():
        Path(path, name).write_text(json.dumps(tree, indent=2))


def _open_clip_config(c, preprocess=None):
    # open_clip rounds width * ratio down
    v = {"image_size": c.image_size, "patch_size": c.patch_size, "width": c.vision_width,
         "layers": c.vision_layers, "head_width": c.vision_width // c.vision_heads,
         "mlp_ratio": (c.vision_mlp + 0.01) / c.vision_width}  # fmt: skip
    t = {"context_length": c.context_length, "vocab_size": c.vocab_size, "width": c.text_width,
         "layers": c.text_layers, "heads": c.text_heads,
         "mlp_ratio": (c.text_mlp + 0.01) / c.text_width}  # fmt: skip
    pixels = dict(vars(preprocess or Preprocess(size=c.image_size)))
    pixels["resize_mode"] = pixels.pop("resize")
    sizes = {"embed_dim": c.embed_dim, "quick_gelu": c.quick_gelu, "vision_cfg": v, "text_cfg": t}
    return {"model_cfg": sizes, "preprocess_cfg": pixels}


def _hf_configs(c, p):
    both = {"projection_dim": c.embed_dim, "hidden_act": "quick_gelu" if c.quick_gelu else "gelu"}
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    v = dict(zip(names, (c.vision_width, c.vision_layers, c.vision_heads, c.vision_mlp)))
    v |= both | {"image_size": c.image_size, "patch_size": c.patch_size}
    t = dict(zip(names, (c.text_width, c.text_layers, c.text_heads, c.text_mlp)))
    t |= both | {"vocab_size": c.vocab_size, "max_position_embeddings": c.context_length,
                 "bos_token_id": c.vocab_size - 2, "eos_token_id": c.vocab_size - 1}  # fmt: skip
    square = {"height": p.size, "width": p.size}
    return {"config.json": {
        "model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": c.embed_dim,
        "vision_config": v, "text_config": t,
    }, "preprocessor_config.json": {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": square if p.resize == "squash" else {"shortest_edge": p.size},
        "resample": next(n for n, name in RESAMPLE.items() if name == p.interpolation),
        "do_center_crop": True, "crop_size": square, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": p.mean, "image_std": p.std,
    }}  # fmt: skip


# ---------------------------------------------------------------------------------------- downloads

HUB_SERVER = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
MODEL_SERVER = "https://openaipublic.azureedge.net/clip/models"
BPE = "https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz"
OPENAI = {  # published files and their sha256
    "ViT-B-32": ("ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B-16": ("ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L-14": ("ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "ViT-L-14-336": ("ViT-L-14-336px.pt",
                     "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
    "bpe": ("bpe_simple_vocab_16e6.txt.gz",
            "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"),
}  # fmt: skip
MERGES = ("bpe_simple_vocab_16e6.txt.gz", "merges.txt", "tokenizer.json")
HUB = re.compile(r"hf:([\w-][\w.-]*/[\w-][\w.-]*)((?:/[\w-][\w.-]*)*)")
WEB = re.compile(r"(https?://[^#?]+/([^/#?]+)[^#]*)(?:#sha256=([0-9a-f]{64}))?")
LOCAL = re.compile(r"http://(127\.0\.0\.1|localhost)(:\d+)?/")


@contextlib.contextmanager
def _open(url):
    """The answer of a server, read to its end: urllib takes a broken connection for the end."""
    opener = urllib.request.build_opener()
    if not LOCAL.match(url):
        del opener.handle_open["http"]  # so no redirect leaves the encryption, either
    try:
        with opener.open(url, timeout=30) as answer:
            yield answer
            if not answer.chunked and answer.length != 0:
                raise OSError(f"broke off, {answer.length or 'perhaps some'} bytes are missing")
    except (OSError, http.client.HTTPException) as e:
        raise OSError(f"{url} cannot be reached by https ({e}); offline, give a local path") from e


def _download(url, path, sha256=None):
    """url -> path, which is there only when whole and, where sha256 is known, verified."""
    if os.path.exists(path):
        return path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    digest = hashlib.sha256()
    with _aside(path) as f:
        with _open(url) as answer:
            chunks = iter(lambda: answer.read(1 << 20), b"")
            for chunk in tqdm(chunks, os.path.basename(path), unit="MiB"):
                f.write(chunk)
                digest.update(chunk)
        if sha256 not in (None, digest.hexdigest()):
            raise ValueError(f"{url}: its sha256 is {digest.hexdigest()}, not {sha256}")
    return path


def _fetch_hf(repo, wanted, cache):
    """-> the folder, or the wanted file. Configs, merges and shards come along."""
    folder = Path(cache, "hf", repo.replace("/", "--"))
    names = [wanted] if wanted else WEIGHTS
    if not any((folder / name).exists() for name in names):  # they come last
        listing = f"{HUB_SERVER}/api/models/{repo}?blobs=true"
        with _open(listing) as answer, _reading(listing, "no list of a repository's files"):
            files = {s["rfilename"]: s.get("lfs") or {} for s in json.load(answer)["siblings"]}
        main = next((name for name in names if name in files), None)
        if main is None:
            raise ValueError(f"hf:{repo} has no {wanted or 'CLIP weights'}; it has {[*files][:20]}")
        shard = re.escape(main.split(".")[0]) + r"-\d+-of-\d+\.\w+"
        shards = [name for name in files if re.fullmatch(shard, name)]
        along = [name for name in (*BESIDE, *MERGES, "adapter_config.json") if name in files]
        for name in (*along, *shards, main):
            url = f"{HUB_SERVER}/{repo}/resolve/main/{name}"
            _download(url, str(folder / name), files[name].get("sha256"))
    return str(folder / wanted)


def fetch(spec, cache=None):
    """hf:ORG/REPO[/FILE], openai:NAME or https://...[#sha256=...] -> path, downloaded once into
    cache (default ~/.cache/fomo) and verified; anything else must be a path. OSError without a
    network or a file, ValueError for a checksum that is wrong."""
    spec = os.fspath(spec)
    cache = os.path.expanduser(cache or "~/.cache/fomo")
    hub = HUB.fullmatch(spec)
    if hub:
        return _fetch_hf(hub[1], hub[2].removeprefix("/"), cache)
    name = spec.removeprefix("openai:")
    if name in OPENAI and name != spec:
        file, sha256 = OPENAI[name]
        url = BPE if name == "bpe" else f"{MODEL_SERVER}/{sha256}/{file}"
        return _download(url, os.path.join(cache, "openai", file), sha256)
    web = WEB.fullmatch(spec)
    if web:
        key = hashlib.sha256(spec.encode()).hexdigest()[:16]
        return _download(web[1], os.path.join(cache, "web", key, web[2]), web[3])
    if not os.path.exists(spec):
        raise FileNotFoundError(f"{spec}: no such file or folder, nor hf:ORG/REPO[/FILE], openai: "
                                f"{', '.join(OPENAI)}, new: {', '.join(CONFIGS)} or "
                                "https://...[#sha256=64 digits]")  # fmt: skip
    return spec


def find_bpe(path_or_spec, cache=None):
    """-> path of the merges for these weights: beside them, else those of an installed open_clip,
    else OpenAI's, downloaded."""
    folders = [] if str(path_or_spec).startswith("new:") else [_folder(fetch(path_or_spec, cache))]
    package = importlib.util.find_spec("open_clip")
    folders += map(Path, package.submodule_search_locations) if package else []
    files = [folder / name for folder in folders for name in MERGES]
    found = [str(file) for file in files if file.is_file()]
    return found[0] if found else fetch("openai:bpe", cache)
