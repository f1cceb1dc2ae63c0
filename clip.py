"""CLIP from scratch: two transformers, the tokenizer, and every layout that its checkpoints come in.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020).
State-dict keys are OpenAI's, which open_clip kept. This file stands alone; copy it:

    import clip, torch
    model, tokenizer = clip.CLIP(clip.CONFIGS["tiny"]), clip.Tokenizer()
    images = clip.normalise(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    image, text, scale = model(images, tokenizer(["a red square", "two dots"], context_length=64))
    loss = clip.contrastive_loss(image, text, scale)

    model = clip.load("openai:ViT-B-32")  # or hf:ORG/REPO[/FILE], https://...#sha256=..., a file, a folder
    tokenizer = clip.Tokenizer(clip.find_bpe("openai:ViT-B-32"))
    clip.save(model, "ViT-B-32-hf", layout="hf")  # for transformers; "open_clip" and "openai" for theirs
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import html
import http.client
import itertools
import json
import math
import os
import pickle
import re
import unicodedata
import urllib.request
import zipfile
import zlib
from collections import OrderedDict
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

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's pixels
MAX_LOGIT_SCALE = math.log(100)  # sec. 2.5: larger temperatures were unstable; whoever trains clamps to it


# ---------------------------------------------------------------------------------------------------------- model


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
    quick_gelu: bool = False  # x * sigmoid(1.702 x) in place of GELU: a property of the weights, invisible in them

    def __post_init__(self):
        *sizes, quick_gelu = dataclasses.astuple(self)
        if any(type(n) is not int or n < 1 for n in sizes) or type(quick_gelu) is not bool:
            raise ValueError(f"sizes are whole numbers from 1 and quick_gelu is true or false: {self}")
        if self.vision_width % self.vision_heads or self.text_width % self.text_heads:
            raise ValueError(f"heads do not divide widths: {self}")


def _config(embed, image, patch, vision, text, context=77, vocab=49408):
    """vision = (width, layers, heads, mlp), text = (width, layers, heads), whose mlp is 4 x width."""
    return CLIPConfig(embed, image, patch, *vision, context, vocab, *text, 4 * text[0])


CONFIGS = {
    "tiny": _config(64, 32, 8, (96, 3, 3, 384), (64, 2, 2), context=64, vocab=258),
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
    """Multi-head self-attention with q, k and v fused in one in_proj, as nn.MultiheadAttention names them."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, causal):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # [B, N, 3W]
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x [B, H, N, W/H]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # [B, H, N, W/H]
        return self.out_proj(y.transpose(1, 2).flatten(2))  # [B, N, W]


class Block(nn.Module):
    def __init__(self, width, heads, mlp, quick_gelu):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        gelu = QuickGELU() if quick_gelu else nn.GELU()
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, mlp), gelu=gelu, c_proj=nn.Linear(mlp, width)))

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
        width, patches = c.vision_width, (c.image_size // c.patch_size) ** 2
        self.conv1 = nn.Conv2d(3, width, c.patch_size, c.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, c.vision_layers, c.vision_heads, c.vision_mlp, c.quick_gelu)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, c.embed_dim))

    def forward(self, images):  # [B, 3, S, S]
        x = self.conv1(images).flatten(2).transpose(1, 2)  # [B, patches, W]
        first = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([first, x], dim=1) + self.positional_embedding.to(x.dtype)  # [B, 1 + patches, W]
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj  # [B, D], read at the class token


class CLIP(nn.Module):
    """Two towers into one space. Weights start as in sec. 2.4 of the paper and OpenAI's code; float32 or float64."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.visual = VisionTransformer(c)
        self.transformer = Transformer(c.text_width, c.text_layers, c.text_heads, c.text_mlp, c.quick_gelu)
        self.token_embedding = nn.Embedding.from_pretrained(torch.empty(c.vocab_size, c.text_width), freeze=False)
        self.positional_embedding = nn.Parameter(torch.empty(c.context_length, c.text_width))
        self.ln_final = nn.LayerNorm(c.text_width)
        self.text_projection = nn.Parameter(torch.empty(c.text_width, c.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if not self.logit_scale.is_meta:  # load fills those; and normal_ there would import sympy, for 150 MB
            self._init()

    def _init(self):
        v, width = self.visual, self.config.vision_width**-0.5
        for p in (v.class_embedding, v.positional_embedding, v.proj):
            nn.init.normal_(p, std=width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.config.text_width**-0.5)
        for tower in (v.transformer, self.transformer):
            width, depth = len(tower.resblocks[0].ln_1.weight), len(tower.resblocks)
            for block in tower.resblocks:
                nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
                nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
                nn.init.zeros_(block.mlp.c_fc.bias)
                for linear in (block.attn.out_proj, block.mlp.c_proj):
                    nn.init.normal_(linear.weight, std=width**-0.5 * (2 * depth) ** -0.5)
                    nn.init.zeros_(linear.bias)

    def encode_image(self, images):
        """[B, 3, S, S] of normalised pixels -> [B, D], not normalised."""
        return self.visual(images)

    def encode_text(self, tokens):
        """[B, L] ids, L up to the context length -> [B, D], not normalised. The largest id is the end token; what
        follows it changes nothing (the mask is causal), so a batch may be cut at its longest text."""
        x = self.token_embedding(tokens)  # [B, L, W]
        x = x + self.positional_embedding[: tokens.shape[1]].to(x.dtype)
        x = self.ln_final(self.transformer(x, causal=True))
        return x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)] @ self.text_projection  # [B, D]

    def forward(self, images, tokens):
        """-> image [B, D] and text [B, D], both L2-normalised, and scale [] = exp(logit_scale) = 1 / tau."""
        image, text = self.encode_image(images), self.encode_text(tokens)
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1), self.logit_scale.exp()


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
            with torch.no_grad():
                others = [encode(inputs[i : i + piece]) for i in range(piece, n, piece)]
            mine = torch.cat([mine.detach(), *others])  # [n, D]
        leaf = gather_rows(mine.detach(), first, total).requires_grad_(trained)  # [total, D]
        towers.append((encode, inputs, mine, leaf))

    image, text = (leaf for *_, leaf in towers)
    loss = contrastive_loss(image, text, scale if first == 0 else scale.detach())
    (factor * loss).backward()

    for encode, inputs, mine, leaf in towers:
        if not leaf.requires_grad:  # a frozen tower
            continue
        gradient = leaf.grad[first : first + n]  # [n, D]
        for i in range(0, n, piece):
            again = mine if piece == n else encode(inputs[i : i + piece])  # [b, D]
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
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                      for p in parameters])  # fmt: skip
    torch.distributed.all_reduce(flat)
    for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = gradient.view_as(p)


def normalise(images):
    """uint8 [B, 3, S, S] -> float32, zero mean and unit variance over OpenAI's pixels, on the images' device."""
    channels = zip(images.unbind(1), MEAN, STD)  # by number, for tensors of them would be copied, and waited for
    return torch.stack([(x.float() / 255 - mean) / std for x, mean, std in channels], dim=1)


# ------------------------------------------------------------------------------------------------------ tokenizer
# A caption is repaired as OpenAI did with ftfy, here by the standard library: entities, quotes, ligatures, full-width
# forms, controls, terminal escapes, surrogates, NFC, and UTF-8 once read as Windows-1252 (the web's "â€™"): signs,
# Latin, Greek, Cyrillic, kana and emoji, whose lead bytes real text hardly has. It stops at other mojibake (Arabic,
# Chinese, other code pages, lost bytes) and at entities shouted in capitals (&EACUTE;) or nested more than 16 deep.

CP1252 = {i: bytes([i]).decode("cp1252", "ignore") or chr(i) for i in range(0x80, 0xA0)}  # how browsers read C1 bytes
BYTES = {char: byte for byte, char in CP1252.items()}
NEXT = f"[\x80-\xbf{''.join(BYTES)}]"  # a continuation byte of UTF-8, read as Latin-1 or Windows-1252
TWO = f"[ÂÃ]{NEXT}|[ÄÅÎÏÐÑ](?:(?![‘-”–—…]){NEXT}|{NEXT}(?=\\w))"  # Latin, Greek, Cyrillic; but Ñ” may end a word
MOJIBAKE = re.compile(f"{TWO}|[âã]{NEXT}{{2}}|ð{NEXT}{{3}}")  # signs and kana, emoji; other leads are real too often
ENTITY, ANSI = re.compile(r"&#?[0-9A-Za-z]{1,24};"), re.compile(r"\x1b\[[\d;]*[a-zA-Z]")
CONTROLS = [*range(9), 0xB, *range(0xE, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]
LIGATURES = {"Ĳ": "IJ", "ĳ": "ij", "ŉ": "'n", "Ǳ": "DZ", "ǲ": "Dz", "ǳ": "dz", "Ǆ": "DŽ", "ǅ": "Dž", "ǆ": "dž",
             "Ǉ": "LJ", "ǈ": "Lj", "ǉ": "lj", "Ǌ": "NJ", "ǋ": "Nj", "ǌ": "nj", "ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl",
             "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "ſt", "ﬆ": "st"}
REPAIR = CP1252 | dict.fromkeys(CONTROLS) | str.maketrans(LIGATURES)
REPAIR |= dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
REPAIR |= {i: unicodedata.normalize("NFKC", chr(i)) for i in [0x3000, *range(0xFF01, 0xFFF0)]}
PLAIN = re.compile(r"[\t\n\f\r -%'-~]*")  # ASCII without entities and controls: nothing to repair
# OpenAI's 's|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+; encode sets numbers like ² apart, which \d misses
WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\w\s]|_)+", re.IGNORECASE)


def _redecode(match):
    with contextlib.suppress(UnicodeDecodeError):
        return bytes(BYTES.get(c) or ord(c) for c in match[0]).decode()
    return match[0]


def clean(text):
    """A caption as CLIP's vocabulary saw it: repaired, entities resolved, white space collapsed, lower case."""
    entities = "<" not in text  # with "<" it is mark-up, whose entities are resolved twice, below
    for _ in range(16):
        if PLAIN.fullmatch(before := text):
            break
        text = ENTITY.sub(lambda m: html.unescape(m[0]), text) if entities else text
        while (decoded := MOJIBAKE.sub(_redecode, text)) != text:
            text = decoded
        text = ANSI.sub("", text).translate(REPAIR)
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")  # pairs join, halves become �
        text = unicodedata.normalize("NFC", text)
        if text == before:
            break
    return " ".join(html.unescape(html.unescape(text)).split()).lower()


class Tokenizer:
    """CLIP's byte-pair encoding. bpe: path of bpe_simple_vocab_16e6.txt.gz or of Hugging Face's merges.txt. Without it,
    byte-level: the 256 bytes of UTF-8, then start (256) and end (257), which is what "tiny" reads.

    start and end are ids; everything in a text is text, so no caption can inject a control token."""

    def __init__(self, bpe=None):
        self.merges, self.words, self.symbols = {}, {}, [bytes([b]) for b in range(256)]
        if bpe is not None:
            self._read(bpe)
        self.start, self.end, self.vocab_size = len(self.symbols), len(self.symbols) + 1, len(self.symbols) + 2

    def _read(self, bpe):
        raw, line = Path(bpe).read_bytes(), "(gzip)"
        order = sorted(range(256), key=lambda b: b == 32 or not chr(b).isprintable())  # ids 0-255: 188 printable first
        letters = [chr(b) if i < 188 else chr(256 + i - 188) for i, b in enumerate(order)]  # how the file spells bytes
        self.letters, ids = {b: i for i, b in enumerate(order)}, {s: i for i, s in enumerate(letters)}
        ids |= {f"{s}</w>": 256 + i for s, i in ids.items()}  # </w> ends a word, and decodes to a space
        self.symbols = [bytes([b]) for b in order] + [bytes([b, 32]) for b in order]
        try:
            lines = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode().rstrip("\n").split("\n")
            for line in lines[1:48_895]:  # after a header, 48,894 merges are used
                a, b = (ids[s] for s in line.split())
                self.merges[a, b] = ids.setdefault(line.replace(" ", ""), len(self.symbols))
                self.symbols.append(self.symbols[a] + self.symbols[b])
        except (OSError, EOFError, ValueError, KeyError, zlib.error) as e:
            raise ValueError(f"{bpe}: no merge of two earlier symbols: {line[:80]!r} ({type(e).__name__})") from e
        if not self.merges or len(ids) != len(self.symbols):
            raise ValueError(f"{bpe}: no merges, or some twice; CLIP's: bpe_simple_vocab_16e6.txt.gz or merges.txt")

    def _merge(self, word):
        """Join the pair learnt first, everywhere, until no known pair is left. Ids grow in the order of learning."""
        ids = [self.letters[b] for b in word.encode()]
        ids[-1] += 256  # the form that ends a word
        while best := min(filter(None, map(self.merges.get, itertools.pairwise(ids))), default=None):
            joined, i = [], 0
            while i < len(ids):
                hit = self.merges.get(tuple(ids[i : i + 2])) == best
                joined.append(best if hit else ids[i])
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
        ids = [i for i in itertools.takewhile(lambda i: i != self.end, map(int, ids)) if i != self.start]
        if strange := [i for i in ids if not 0 <= i < self.start]:
            raise ValueError(f"ids lie in 0..{self.end}, got {strange[0]}")
        text = b"".join(self.symbols[i] for i in ids).decode("utf-8", errors="replace")
        return text.removesuffix(" ") if self.merges else text

    def __call__(self, texts, context_length=77, truncate=True):
        """list of N strings -> int64 [N, context_length]: start, text, end, zeros. A text too long is cut and keeps its
        end token, or with truncate=False is a ValueError."""
        if context_length < 2:
            raise ValueError(f"a context holds at least start and end, got context_length={context_length}")
        texts = [texts] if isinstance(texts, str) else texts
        tokens = np.zeros((len(texts), context_length), np.int64)
        for row, text in zip(tokens, texts):
            ids = self.encode(text)
            if len(ids) > context_length - 2 and not truncate:
                raise ValueError(f"{text!r:.80} has {len(ids)} tokens; the context holds {context_length - 2}")
            ids = [self.start, *ids[: context_length - 2], self.end]
            row[: len(ids)] = ids
        return torch.from_numpy(tokens)


# --------------------------------------------------------------------------------------------------- tensor files
# safetensors: u64 little-endian header length, JSON {name: {dtype, shape, data_offsets}}, then the bytes of each tensor

DTYPES = {  # narrowest first
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
}
DTYPE_NAMES = {v: k for k, v in DTYPES.items()}
TORCH_NAMES = ("Bool", "Byte", "Char", "Short", "Half", "BFloat16", "Int", "Float", "Double", "Long")
STORAGES = dict(zip(TORCH_NAMES, DTYPES.values()))
WEIGHTS = ("open_clip_model.safetensors", "model.safetensors", "model.safetensors.index.json",  # best first
           "open_clip_pytorch_model.bin", "pytorch_model.bin", "pytorch_model.bin.index.json")


@contextlib.contextmanager
def _reading(path, fault):
    """What a malformed file does to the code that reads it becomes one sentence that names the file."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, EOFError, OSError,
            MemoryError, zlib.error, zipfile.BadZipFile, pickle.UnpicklingError) as e:  # fmt: skip
        named = type(e) is ValueError and str(e).startswith(os.path.join(os.path.dirname(path), "") or str(path))
        if named or getattr(e, "filename", None):
            raise  # it names the file, or the one beside it, already
        raise ValueError(f"{path}: {fault} ({type(e).__name__}: {e})") from e


class Tensors(Mapping):
    """name -> tensor, read when asked for, each time a private copy: nothing stays open or mapped, so that memory holds
    what the caller keeps (the pages of a memory map would count until the system takes them back)."""

    def __init__(self, readers, metadata=None):
        self.readers, self.metadata = dict(readers), metadata or {}

    def __getitem__(self, name):
        return self.readers[name]()

    def __iter__(self):
        return iter(self.readers)

    def __len__(self):
        return len(self.readers)

    def stored(self, name):
        """-> Stored, if this tensor lies in a file as it is; else None."""
        return self.readers[name] if isinstance(self.readers[name], Stored) else None


class Stored:
    """A tensor in a file, read when called. limit: bytes that are there. start: of its first, stride: in entries."""

    def __init__(self, path, dtype, shape, stride, start, limit):
        if any(type(n) is not int or not 0 <= n < 2**63 for n in (*shape, *stride, start)) or len(shape) != len(stride):
            raise ValueError(f"shape {shape}, stride {stride}, first byte {start}")
        self.path, self.dtype, self.shape, self.stride, self.start = path, dtype, tuple(shape), tuple(stride), start
        span = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, stride))  # entries, first to last
        self.span = span if span * dtype.itemsize <= limit else -1

    def __call__(self):
        flat = torch.empty(max(0, self.span), dtype=self.dtype, device="cpu")
        with open(self.path, "rb", buffering=0) as f:
            f.seek(self.start)
            self._fill(flat, f)
        return flat.as_strided(self.shape, self.stride).contiguous()

    def pieces(self, n):
        """Yields its entries in order, at most n at a time [<= n], all in the same memory: for who goes over many files
        once, since the small buffer stays in the processor's cache."""
        if self.span != math.prod(self.shape) or torch.empty(self.shape, device="meta").stride() != self.stride:
            yield from self().reshape(-1).split(n)
            return
        buffer = torch.empty(min(n, self.span), dtype=self.dtype, device="cpu")
        with open(self.path, "rb", buffering=0) as f:
            f.seek(self.start)
            for done in range(0, self.span, n):
                piece = buffer[: self.span - done]
                self._fill(piece, f)
                yield piece

    def _fill(self, flat, f):
        left = memoryview(flat.view(torch.uint8).numpy())
        while len(left) and (n := f.readinto(left)):  # one call reads 2 GiB at most
            left = left[n:]
        if len(left) or self.span < 0:
            raise ValueError(f"{self.path}: a tensor of shape {[*self.shape]} is not where the file puts it")


def _read_safetensors(path):
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):
            raise ValueError(f"{path}: neither a torch zip nor safetensors (header of {length} bytes, file of {size}); "
                             "what torch wrote before 1.6 has to be saved again by a newer one")
        head = f.read(length)
    with _reading(path, "broken safetensors header"):
        header, readers, end = json.loads(head.decode()), {}, 0
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(text, str) for text in (*metadata, *metadata.values())):
            raise ValueError(f"__metadata__ is {metadata}, no strings by name")
        for name, v in sorted(header.items(), key=lambda kv: kv[1]["data_offsets"]):
            dtype, shape, (a, b) = DTYPES[v["dtype"]], v["shape"], v["data_offsets"]
            if a != end or min(shape, default=0) < 0 or b - a != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"tensor {name}, {v['dtype']} {shape}, cannot fill bytes {a} to {b}, next is {end}")
            stride, end = [math.prod(shape[i + 1 :]) for i in range(len(shape))], b
            readers[name] = Stored(path, dtype, shape, stride, 8 + length + a, b - a)
    if 8 + length + end != size:
        raise ValueError(f"{path}: torn file, {size} bytes where its header says {8 + length + end}")
    return Tensors(readers, metadata)


class _Bag(dict):
    """Stands for every class and function that a pickle names: attributes become items, arguments are dropped."""

    __hash__ = object.__hash__

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, state):
        self.update(state if isinstance(state, dict) else {})


class _Unpickler(pickle.Unpickler):
    """For torch.save's zips and TorchScript archives. Imports and runs nothing that they name: a pickle reaches _Bag
    and the functions here, which note where a tensor lies. The code/ of an archive is never opened."""

    def find_class(self, module, name):
        if module == "torch" and name.endswith("Storage"):
            return STORAGES[name.removesuffix("Storage")]
        if name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return lambda tensor, *_: tensor
        if name.startswith("_rebuild") and name != "_rebuild_tensor_v2":
            raise pickle.UnpicklingError(f"a tensor made by {name}")  # not to be left out silently
        return self.tensor if name == "_rebuild_tensor_v2" else _Bag

    def persistent_load(self, pid):  # ("storage", dtype, name of the zip's member, device, elements)
        return pid[1], self.archive.getinfo(f"{self.root}data/{pid[2]}")

    def tensor(self, storage, offset, shape, stride, _, hooks, metadata=None):
        (dtype, info), skip = storage, offset * storage[0].itemsize
        if info.compress_type != zipfile.ZIP_STORED or skip < 0 or metadata:
            raise ValueError("compressed, before its storage, or a view by sign or conjugate: save a contiguous copy")
        head = np.fromfile(self.archive.filename, np.uint8, 30 + len(name := info.orig_filename.encode()),
                           offset=info.header_offset).tobytes()  # fmt: skip
        if head[:4] != b"PK\3\4" or head[26:28] != len(name).to_bytes(2, "little") or head[30:] != name:
            raise ValueError(f"no {info.filename} at byte {info.header_offset}")
        start = info.header_offset + len(head) + int.from_bytes(head[28:30], "little") + skip  # after the extra field
        return Stored(self.archive.filename, dtype, shape, stride, start, info.file_size - skip)


def _flat(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, Stored):
            yield f"{prefix}{key}", value


def _read_torch(path):
    fault = "not a torch file of plain tensors; save its state_dict() again with torch.save, or as safetensors"
    with _reading(path, fault), zipfile.ZipFile(path) as archive:
        pickled = min((n for n in archive.namelist() if n.endswith("data.pkl")), key=len)
        reader = _Unpickler(archive.open(pickled))
        reader.archive, reader.root = archive, pickled.removesuffix("data.pkl")
        tree = reader.load()
        return Tensors(_flat(tree.get("state_dict", tree)))


def _read_json(path):
    with _reading(path, "not JSON"):
        tree = json.loads(Path(path).read_text("utf-8"))
        if not isinstance(tree, dict):
            raise TypeError(f"a {type(tree).__name__}, where an object of names is meant")
        return tree


def _read_file(path):
    with open(path, "rb") as f:
        return (_read_torch if f.read(4) == b"PK\3\4" else _read_safetensors)(str(path))


def read_tensors(path):
    """Lazy mapping from name, as the file spells it, to tensor; .metadata holds a safetensors file's strings. path: a
    safetensors file, a torch.save zip, a TorchScript archive, an index of shards, or a folder that has one of them.
    ValueError names a malformed file and its fault."""
    path = Path(path)
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir())
        found = [n for n in WEIGHTS if n in names] or [n for n in names if n.endswith((".safetensors", ".bin", ".pt"))]
        if not found or found[0] not in WEIGHTS and len(found) > 1:
            raise ValueError(f"{path}: a folder with {len(found)} files of weights; name the file that is meant")
        path = path / found[0]
    if path.name.endswith(".index.json"):
        readers, where = {}, _read_json(path).get("weight_map")
        with _reading(path, "its weight_map is no list of shards by tensor"):
            shards = [path.with_name(os.path.basename(shard)) for shard in sorted(set(where.values()))]
        for shard in shards:
            readers |= _read_file(shard).readers
        if missing := where.keys() - readers.keys():
            raise ValueError(f"{path}: its shards lack {len(missing)} tensors, first {min(missing)}")
        return Tensors(readers)
    return _read_file(path)


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
    """Mapping from name to tensor -> safetensors file, byte for byte as the safetensors package writes it: widest dtype
    first, then by name, the data aligned to 8 bytes."""
    header, offset, order = {"__metadata__": metadata} if metadata else {}, 0, list(DTYPE_NAMES)
    kinds = {name: (t.dtype, list(t.shape), t.nbytes) for name, t in tensors.items()}
    if odd := [name for name, kind in kinds.items() if kind[0] not in order or name == "__metadata__"]:
        raise ValueError(f"{path}: safetensors here holds {', '.join(DTYPES)}, not {kinds[odd[0]][0]} of {odd[0]}")
    if not all(isinstance(text, str) for text in (*kinds, *(metadata or {}), *(metadata or {}).values())):
        raise ValueError(f"{path}: names and metadata must be strings, got {[*kinds][:3]} and {metadata}")
    names = sorted(kinds, key=lambda name: (-order.index(kinds[name][0]), name))
    for name in names:
        dtype, shape, size = kinds[name]
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    with _aside(path) as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for name in names:
            f.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


# -------------------------------------------------------------------------------------------------------- layouts

HF = (  # ours (OpenAI's, open_clip's) -> Hugging Face's, where q, k, v are split and both projections transposed
    ("visual.transformer.resblocks", "vision_model.encoder.layers"), ("visual.ln_pre", "vision_model.pre_layrnorm"),
    ("transformer.resblocks", "text_model.encoder.layers"), ("visual.ln_post", "vision_model.post_layernorm"),
    ("visual.conv1", "vision_model.embeddings.patch_embedding"), ("ln_final", "text_model.final_layer_norm"),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"), ("ln_1", "layer_norm1"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"), ("ln_2", "layer_norm2"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"), ("mlp.c_fc", "mlp.fc1"),
    ("token_embedding", "text_model.embeddings.token_embedding"), ("mlp.c_proj", "mlp.fc2"),
    ("visual.proj", "visual_projection.weight"), ("text_projection", "text_projection.weight"),
    ("attn.out_proj", "self_attn.out_proj"),
)
TURNED = ("visual.proj", "text_projection")
SCALARS = ("input_resolution", "context_length", "vocab_size")  # among the weights of OpenAI's archives


def openai_names(tensors):
    """A mapping of any layout, seen under OpenAI's names and as lazy as it was. Prefixes (module., _orig_mod.,
    open_clip's text.) and what is no weight (position_ids, OpenAI's scalars) go, Hugging Face's tensors are joined and
    turned, and unknown names stay, so that whoever loads can name them."""
    hf, sources = any(n.endswith("q_proj.bias") for n in tensors), {}
    for name in sorted(tensors, key=lambda n: n.replace("q_proj", "a_proj")):  # q, k, v
        ours = re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", "")).removeprefix("text.")
        if hf:
            ours = functools.reduce(lambda n, pair: n.replace(*pair[::-1]), HF, ours)
            ours = re.sub(r"self_attn\.[qkv]_proj\.", "attn.in_proj_", ours)
        if ours not in SCALARS and not ours.endswith("position_ids"):
            sources.setdefault(ours, []).append(name)

    def read(ours):
        parts = [tensors[name] for name in sources[ours]]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        tensor = tensor.T.contiguous() if hf and ours in TURNED else tensor
        return tensor.reshape(()) if ours == "logit_scale" else tensor  # [1] in some files

    return Tensors({ours: functools.partial(read, ours) for ours in sources}, getattr(tensors, "metadata", None))


def _described(path):
    """What shapes cannot say, from open_clip_config.json or Hugging Face's config.json in or beside path: vision width
    and heads, text width and heads, quick_gelu; None without such a file."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    for file in (Path(folder, "open_clip_config.json"), Path(folder, "config.json")):
        if file.is_file():
            with _reading(file, "not a config of CLIP's"):
                if said := _says(file, _read_json(file)):
                    return said
    return None


def _says(file, c):
    c = c.get("model_cfg", c)
    if "vision_cfg" in c:
        v, t = {"width": 768, "head_width": 64} | c["vision_cfg"], {"width": 512, "heads": 8} | c["text_cfg"]
        plain = {"width", "layers", "heads", "head_width", "mlp_ratio", "image_size", "patch_size", "vocab_size",
                 "context_length"}
        if odd := [k for k, value in (v | t).items() if value and k not in plain and "tokenizer" not in k]:
            raise ValueError(f"{file}: {', '.join(odd)} make it another architecture than plain CLIP")
        return v["width"], v["width"] // v["head_width"], t["width"], t["heads"], bool(c.get("quick_gelu"))
    if "vision_config" in c:  # what is missing has transformers' default; *_config_dict, of its first release, wins
        base = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
        v, t = (base | default | (c.get(f"{tower}_config") or {}) | (c.get(f"{tower}_config_dict") or {})
                for tower, default in (("vision", {"hidden_size": 768, "num_attention_heads": 12}),
                                       ("text", {"hidden_size": 512, "num_attention_heads": 8})))
        acts = {(x["hidden_act"], x["layer_norm_eps"]) for x in (v, t)}
        if acts not in ({("gelu", 1e-5)}, {("quick_gelu", 1e-5)}):
            raise ValueError(f"{file}: activation and LayerNorm eps {acts}, not gelu or quick_gelu, and 1e-5")
        return *(x[k] for x in (v, t) for k in ("hidden_size", "num_attention_heads")), "quick" in acts.pop()[0]
    return None


def _ours(path, raw):
    """The config that save() put into a file's metadata, or None."""
    if "config" not in raw.metadata:
        return None
    with _reading(path, "the config in its metadata is none of a CLIP; pass config="):
        return CLIPConfig(**json.loads(raw.metadata["config"]))


def _architecture(path, raw, state, quick_gelu):
    """Sizes from the shapes; heads and activation from the config inside the file, by OpenAI's rules for OpenAI's
    archives (64 wide, QuickGELU), from the config beside it, else heads by width from CONFIGS, and the activation from
    the caller."""
    if config := _ours(path, raw):
        return config
    (width, *_, patch), positions = state["visual.conv1.weight"].shape, len(state["visual.positional_embedding"])
    (vocab, text_width), embed = state["token_embedding.weight"].shape, state["text_projection"].shape[1]
    if "input_resolution" in raw:
        said = width, width // 64, text_width, text_width // 64, True
    elif (said := _described(path)) is None:
        vision, text = ({getattr(c, f"{t}_width"): getattr(c, f"{t}_heads") for c in CONFIGS.values()}
                        for t in ("vision", "text"))
        said = width, vision.get(width), text_width, text.get(text_width), quick_gelu
    if (said[0], said[2]) != (width, text_width) or not said[1] or not said[3]:
        raise ValueError(f"{path}: neither a config beside it nor clip.CONFIGS says how many heads widths {width} and "
                         f"{text_width} have (found: {said[:4]}); pass config=")
    if said[4] is None:
        raise ValueError(f"{path} does not say its activation, and a wrong one ruins the features silently; pass "
                         "quick_gelu=True (OpenAI, MetaCLIP, DFN, LAION-400M B/32) or False (LAION-2B, DataComp)")
    layers = [sum(n.startswith(t) and n.endswith("ln_1.bias") for n in state) for t in ("visual.", "transformer.")]
    mlps = [len(state[f"{t}transformer.resblocks.0.mlp.c_fc.bias"]) for t in ("visual.", "")]
    vision, text = (width, layers[0], said[1], mlps[0]), (text_width, layers[1], said[3], mlps[1])
    image, context = math.isqrt(positions - 1) * patch, len(state["positional_embedding"])
    return CLIPConfig(embed, image, patch, *vision, context, vocab, *text, said[4])


def _activation(path, raw):
    """What the file or a config beside it says of quick_gelu, or None."""
    with contextlib.suppress(ValueError):
        if config := _ours(path, raw):
            return config.quick_gelu
        if "input_resolution" not in raw:
            return (_described(path) or [None])[-1]
    return "input_resolution" in raw or None


def _resize(positions, grid):
    """[1 + old^2, W] -> [1 + grid^2, W]: bicubic, the class token's stays."""
    old = math.isqrt(len(positions) - 1)
    square = positions[1:].T.reshape(1, -1, old, old)  # [1, W, old, old]
    square = F.interpolate(square, (grid, grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions[:1], square[0].flatten(1).T])


def load(path_or_spec, config=None, quick_gelu=None, image_size=None, cache=None):
    """A checkpoint in any layout -> CLIP in float32, on CPU, in eval mode, at the cost of one model in memory.

    path_or_spec: what read_tensors or fetch take. config: instead of the inferred one. quick_gelu: overrules the file.
    image_size: pixels, resizes the position embeddings. ValueError if keys or shapes do not fit, or nothing says the
    heads or the activation."""
    path = fetch(path_or_spec, cache)
    with _reading(path, "its tensors make no CLIP"):
        return _load(path, config, quick_gelu, image_size)


def _load(path, config, quick_gelu, image_size):
    raw = read_tensors(path)
    named, grid = openai_names(raw), "visual.positional_embedding"
    if not {"visual.conv1.weight", grid, "text_projection", "token_embedding.weight"} <= set(named):
        raise ValueError(f"{path}: not a CLIP of two transformers; has {', '.join([*named][:5])} ({len(named)} in all)")
    state = {name: named[name].float() for name in named}
    if config and quick_gelu is None and _activation(path, raw) not in (None, config.quick_gelu):
        raise ValueError(f"{path} says quick_gelu={not config.quick_gelu}, the config says {config.quick_gelu}; pass "
                         "quick_gelu= as well, which overrules both")
    config = config or _architecture(path, raw, state, quick_gelu)
    config = config if quick_gelu is None else dataclasses.replace(config, quick_gelu=quick_gelu)
    if image_size is not None:
        if type(image_size) is not int or image_size < config.patch_size:
            raise ValueError(f"{path}: image_size is pixels, from a patch's {config.patch_size}, not {image_size!r}")
        config = dataclasses.replace(config, image_size=image_size)
        state[grid] = _resize(state[grid], image_size // config.patch_size)
    with torch.device("meta"):  # takes no memory: the tensors read above become the weights
        model = CLIP(config)
    expected = {k: v.shape for k, v in model.state_dict().items()}
    wrong = [f"{k} missing" for k in expected if k not in state]
    wrong += [f"{k} unexpected" for k in state if k not in expected]
    wrong = wrong or [f"{k} {[*state[k].shape]}, not {[*v]}" for k, v in expected.items() if v != state[k].shape]
    if wrong:
        raise ValueError(f"{path} does not fit the config: {', '.join(wrong[:8])} ({len(wrong)} in all)")
    model.load_state_dict(state, assign=True)
    return model.eval()


def save(model, path, layout="open_clip"):
    """Write the model. open_clip: a .safetensors file, or a folder for open_clip's local-dir:. hf: a folder for
    transformers. openai: a .pt file for OpenAI's clip.load, or safetensors with the same names. The config, with
    quick_gelu, is in every file's metadata but .pt's, which therefore holds only what OpenAI's rules imply."""
    c, state, path = model.config, model.state_dict(), os.fspath(path)
    if layout not in ("open_clip", "openai", "hf") or layout == "hf" and path.endswith((".safetensors", ".pt")):
        raise ValueError(f"{path}, layout {layout}: it is open_clip, openai, or hf, and for hf path is a folder")
    if layout == "openai":
        state |= dict(zip(SCALARS, map(torch.tensor, (c.image_size, c.context_length, c.vocab_size))))
        if path.endswith(".pt"):
            if not c.quick_gelu or (c.vision_heads * 64, c.text_heads * 64) != (c.vision_width, c.text_width):
                raise ValueError(f"{path}: OpenAI's code knows QuickGELU and heads 64 wide only; save as .safetensors")
            with _aside(path) as f:
                return torch.save(state, f)
    if layout == "hf":
        turned, state = {k: w.T if k in TURNED else w for k, w in state.items()}, {}
        for ours, w in turned.items():
            theirs = functools.reduce(lambda n, pair: n.replace(*pair), HF, ours)
            if "in_proj" in ours:
                state |= zip((theirs.replace("attn.in_proj_", f"self_attn.{x}_proj.") for x in "qkv"), w.chunk(3))
            else:
                state[theirs] = w
    metadata = {"format": "pt", "config": json.dumps(dataclasses.asdict(c))}
    if path.endswith(".safetensors"):
        return write_tensors(state, path, metadata)
    os.makedirs(path, exist_ok=True)
    weights, file, config = WEIGHTS[0], "open_clip_config.json", _open_clip_config(c)
    if layout == "hf":
        weights, file, config = "model.safetensors", "config.json", _hf_config(c)
    write_tensors(state, os.path.join(path, weights), metadata)
    with _aside(os.path.join(path, file)) as f:
        f.write(json.dumps(config, indent=2).encode())


def _open_clip_config(c):
    v = {"image_size": c.image_size, "patch_size": c.patch_size, "width": c.vision_width, "layers": c.vision_layers,
         "head_width": c.vision_width // c.vision_heads, "mlp_ratio": (c.vision_mlp + 0.01) / c.vision_width}
    t = {"context_length": c.context_length, "vocab_size": c.vocab_size, "width": c.text_width, "layers": c.text_layers,
         "heads": c.text_heads, "mlp_ratio": (c.text_mlp + 0.01) / c.text_width}  # open_clip rounds width * ratio down
    model = {"embed_dim": c.embed_dim, "quick_gelu": c.quick_gelu, "vision_cfg": v, "text_cfg": t}
    return {"model_cfg": model, "preprocess_cfg": {"mean": MEAN, "std": STD}}


def _hf_config(c):
    fields = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
              "mlp": "intermediate_size"}
    both = {"projection_dim": c.embed_dim, "hidden_act": "quick_gelu" if c.quick_gelu else "gelu"}
    v, t = (both | {theirs: getattr(c, f"{x}_{ours}") for ours, theirs in fields.items()} for x in ("vision", "text"))
    v |= {"image_size": c.image_size, "patch_size": c.patch_size}
    t |= {"max_position_embeddings": c.context_length, "vocab_size": c.vocab_size, "bos_token_id": c.vocab_size - 2,
          "eos_token_id": c.vocab_size - 1}
    return {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": c.embed_dim, "vision_config": v,
            "text_config": t}


# ------------------------------------------------------------------------------------------------------ downloads

MODEL_SERVER = "https://openaipublic.azureedge.net/clip/models"
BPE_SERVER = "https://raw.githubusercontent.com/openai/CLIP/main/clip"
OPENAI = {  # published files and their sha256
    "ViT-B-32": ("ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B-16": ("ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L-14": ("ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "ViT-L-14-336": ("ViT-L-14-336px.pt", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
    "bpe": ("bpe_simple_vocab_16e6.txt.gz", "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"),
}


def _open(url, **headers):
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers={"User-Agent": "fomo"} | headers), timeout=30)
    except urllib.error.HTTPError as e:
        raise OSError(f"{url}: the server answers {e.code} {e.reason}") from e
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise OSError(f"{url} cannot be reached ({getattr(e, 'reason', e)}); offline, give a local file's path") from e


@contextlib.contextmanager
def _alone(folder):
    """One process at a time, where folders can be locked: who wants the same file meanwhile waits, and finds it."""
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


def _download(url, path, sha256):
    """url -> path, which is there only when whole and verified. The part that an interrupted run left is continued if
    sha256 is known, for then pieces of two different files cannot pass as one."""
    if os.path.exists(path):
        return path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = Path(f"{path}.part")
    with _alone(os.path.dirname(path)):
        if os.path.exists(path):
            return path
        _fill(part, url, sha256)
        with open(part, "rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
        if sha256 not in (None, found):
            part.unlink()
            raise ValueError(f"{url}: its sha256 is {found}, not the expected {sha256}; the download was thrown away")
        os.replace(part, path)
    return path


def _fill(part, url, sha256):
    """Adds to the part what it lacks of url, or begins anew where that cannot be checked or the server cannot do it."""
    have = max(part.stat().st_size - 1, 0) if sha256 and part.exists() else 0  # -1: never ask for nothing, which fails
    try:
        answer = _open(url, Range=f"bytes={have}-")
    except OSError as e:
        raise OSError(f"{e}; to start anew, delete {part}" if have else str(e)) from e
    with answer, open(part, "ab") as f:
        have, broken = have if answer.status == 206 else 0, None
        f.truncate(have)
        length = answer.headers.get("Content-Length")  # a chunked answer has none, and ends with an empty chunk
        total = have + int(length) if length else None
        with tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True) as bar:
            try:
                while chunk := answer.read(1 << 20):
                    have += f.write(chunk)
                    bar.update(len(chunk))
            except (ConnectionError, TimeoutError, http.client.IncompleteRead) as e:
                broken = e
    if broken or have < (total or 0):
        goes_on = ", it continues there" if sha256 else ""
        raise OSError(f"{url} broke off after {have} of {total or 'unknown'} bytes; run again{goes_on}") from broken


def _fetch_hf(repo, wanted, cache):
    """The folder, or the wanted file. Configs, merges and shards come along; what stands for them all comes last."""
    folder, names = os.path.join(cache, "hf", repo.replace("/", "--")), [wanted] if wanted else WEIGHTS
    if not any(os.path.exists(os.path.join(folder, name)) for name in names):
        server = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        listing = f"{server}/api/models/{repo}?blobs=true"
        with _open(listing) as answer, _reading(listing, "the answer is no list of a repository's files"):
            files = {s["rfilename"]: (s.get("lfs") or {}).get("sha256") for s in json.load(answer)["siblings"]}
        main = [name for name in names if name in files][:1]
        if not main:
            raise ValueError(f"hf:{repo} has no {wanted or 'CLIP weights'}; it has {', '.join([*files][:20])}")
        shard = re.escape(main[0].split(".")[0]) + r"-\d+-of-\d+\.\w+"
        along = {"config.json", "open_clip_config.json", "merges.txt"}
        for name in [n for n in files if n in along or re.fullmatch(shard, n)] + main:
            _download(f"{server}/{repo}/resolve/main/{name}", os.path.join(folder, name), files[name])
    return os.path.join(folder, wanted)


def fetch(spec, cache=None):
    """hf:ORG/REPO[/FILE], openai:NAME or https://...[#sha256=...] -> path, downloaded once into cache (default
    ~/.cache/fomo), resumable and verified; anything else must be a path. HF_ENDPOINT and CLIP_MIRROR in the environment
    name other servers. OSError without a network or a file, ValueError for a spec or a checksum that is wrong."""
    spec, cache = os.fspath(spec), os.fspath(cache or os.path.expanduser("~/.cache/fomo"))
    scheme, _, rest = spec.partition(":")
    if scheme == "hf" and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w-][\w.-]*)*", rest):
        return _fetch_hf("/".join(rest.split("/")[:2]), "/".join(rest.split("/")[2:]), cache)
    if scheme == "openai" and rest in OPENAI:
        file, sha256 = OPENAI[rest]
        server = BPE_SERVER if rest == "bpe" else f"{MODEL_SERVER}/{sha256}"
        server = f"{os.environ['CLIP_MIRROR']}/{sha256}" if "CLIP_MIRROR" in os.environ else server
        return _download(f"{server}/{file}", os.path.join(cache, "openai", file), sha256)
    if scheme in ("https", "http"):
        match = re.fullmatch(r"((?:https://|http://127\.0\.0\.1[:/])[^#]+)(?:#sha256=([0-9a-f]{64}))?", spec)
        if not match:
            raise ValueError(f"{spec}: expected https://...#sha256= and 64 hexadecimal digits")
        key = hashlib.sha256(spec.encode()).hexdigest()[:16]
        name = os.path.basename(match[1].partition("?")[0]) or "file"
        return _download(match[1], os.path.join(cache, "web", key, name), match[2])
    if not os.path.exists(spec):
        raise FileNotFoundError(f"{spec}: no such file or folder, nor hf:ORG/REPO[/FILE], https://...[#sha256=...] or "
                                f"openai: with {', '.join(OPENAI)}")
    return spec


def find_bpe(path_or_spec, cache=None):
    """-> path of the merges for these weights: beside them, or OpenAI's, fetched as the weights were."""
    path = Path(fetch(path_or_spec, cache))
    for name in ("bpe_simple_vocab_16e6.txt.gz", "merges.txt"):
        file = (path if path.is_dir() else path.parent) / name
        if file.is_file():
            return str(file)
    if os.path.exists(path_or_spec):
        raise FileNotFoundError(f"{path}: neither bpe_simple_vocab_16e6.txt.gz nor merges.txt lies beside it; put one "
                                "there, or take clip.fetch('openai:bpe')")
    return fetch("openai:bpe", cache)
