"""All tests, a chapter a file. Oracles: closed forms, other libraries, published figures.

python -m pytest -q test_fomo.py
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads spin beside a busy process
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as fomo.main, before torch looks

import argparse
import ast
import collections
import copy
import csv
import dataclasses
import functools
import glob
import gzip
import hashlib
import http.server
import io
import itertools
import json
import math
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
import unicodedata
import warnings
import weakref
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

import budget
import clip
import data
import evaluate
import fomo
import merge
import methods

# ---------------------------------------------------------------------------------------- clip.py

CLIP_PARITY = clip.CLIPConfig(16, 32, 16, 128, 2, 2, 512, 8, 100, 64, 2, 2, 256)
# OpenAI's heads 64 wide and MLPs 4 times as wide; heads 80 wide, as ViT-H's, and other MLPs
CLIP_SMALL = clip.CLIPConfig(24, 32, 8, 128, 2, 2, 512, 10, 40, 64, 3, 1, 256, quick_gelu=True)
CLIP_PIXELS = clip.Preprocess((0.5, 0.4, 0.6), (0.5, 0.25, 0.3), "squash", "bilinear", 32)
CLIP_PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 14, 3), np.uint8))
CLIP_WIDE = clip.CLIPConfig(64, 56, 14, 160, 2, 2, 320, 16, 300, 128, 2, 2, 512)


def clip_random(config, seed=0):
    torch.manual_seed(seed)
    model = clip.CLIP(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)  # biases and norms, too: no swap is unseen
    return model


def clip_same(model, other):
    a, b = (m.state_dict() for m in (model, other))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def clip_inputs(config, batch=2, dtype=torch.float32):
    torch.manual_seed(1)
    images = torch.randn(batch, 3, config.image_size, config.image_size).to(dtype)
    tokens = torch.randint(1, config.vocab_size - 1, (batch, config.context_length))
    tokens[:, -3] = config.vocab_size - 1
    return images, tokens


def clip_oracle(config):
    sizes = clip._open_clip_config(config)["model_cfg"]
    return pytest.importorskip("open_clip").CLIP(**sizes)


def clip_bare(folder, name="model.safetensors"):
    clip.write_tensors(dict(clip.read_tensors(folder / name)), folder / name)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-H-like"])
def test_features_and_loss_equal_open_clips(name, monkeypatch):
    loss = pytest.importorskip("open_clip").ClipLoss()
    config = dataclasses.replace(clip.CONFIGS.get(name, CLIP_WIDE), vocab_size=1000)
    if name == "ViT-B-16":  # its widths, heads and 197 tokens; at full depth it takes minutes
        config = dataclasses.replace(config, vision_layers=3, text_layers=3)
    for init in ("normal_", "uniform_", "kaiming_uniform_", "xavier_uniform_"):  # take seconds
        monkeypatch.setattr(torch.nn.init, init, lambda tensor, *_, **__: tensor)
    state = {}
    g = torch.Generator().manual_seed(0)
    for key, value in clip.CLIP(config).state_dict().items():
        scale = max(value.shape) ** -0.5 if value.ndim > 1 else 0.1
        state[key] = torch.randn(value.shape, generator=g) * scale + 1.0 * (value.ndim < 2)
    precisions = ((torch.float32, 1e-5), (torch.float64, 1e-9))
    for quick_gelu, (dtype, tolerance) in itertools.product((False, True), precisions):
        state = {k: v.to(dtype) for k, v in state.items()}
        config = dataclasses.replace(config, quick_gelu=quick_gelu)
        models = [clip.CLIP(config).eval(), clip_oracle(config).eval()]
        for model in models:
            model.load_state_dict(state, strict=True, assign=True)
        with torch.no_grad():
            ours, want = (model(*clip_inputs(config, dtype=dtype)) for model in models)
        for x, y in zip(ours[:2], want):
            assert (x - y).abs().max() < tolerance
        near = pytest.approx(loss(*want).item(), abs=tolerance, rel=tolerance)
        assert clip.contrastive_loss(*ours).item() == near


def test_parity_model_gives_the_published_numbers():
    model = clip.CLIP(CLIP_PARITY).double()
    with torch.no_grad():
        for k, (name, p) in enumerate(sorted(model.state_dict().items())):
            flat = 0.05 * torch.sin(1.7 * torch.arange(p.numel(), dtype=torch.float64) + k)
            p.copy_(flat.view(p.shape) + ("ln_" in name and name.endswith("weight")))
        model.logit_scale.fill_(math.log(1 / 0.07))
    assert sum(p.numel() for p in model.parameters()) == 606_209
    images = torch.sin(0.37 * torch.arange(2 * 3 * 32 * 32, dtype=torch.float64)).view(2, 3, 32, 32)
    tokens = torch.tensor([[98, 5, 7, 99, 0, 0, 0, 0], [98, 11, 12, 13, 14, 99, 0, 0]])
    image, text, scale = model(images, tokens)
    loss = clip.contrastive_loss(image, text, scale)
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    near = functools.partial(pytest.approx, abs=1e-8)  # the published digits
    features = [model.encode_image(images)[0, :3], model.encode_text(tokens)[1, :3]]
    assert features[0].tolist() == near([-0.01867604, -0.13052885, 0.05231189])
    assert features[1].tolist() == near([0.30361015, -0.12295130, -0.27192695])
    logits = (scale * image @ text.T).flatten().tolist()
    assert logits == near([-5.72081325, 1.34909602, -5.72034751, 1.34960202])
    assert loss.item() == pytest.approx(2.1144708560, abs=1e-9)
    assert norm == pytest.approx(341.44592808, abs=1e-6)


def test_every_config_has_open_clips_parameters_and_published_counts():
    open_clip = pytest.importorskip("open_clip")
    millions = {"ViT-B-32": 151.28, "ViT-B-16": 149.62, "ViT-L-14": 427.62, "ViT-H-14": 986.11,
                "ViT-g-14": 1366.68, "ViT-bigG-14": 2539.57}  # fmt: skip # open_clip's own table
    with torch.device("meta"):
        for name in (name for name in clip.CONFIGS if name.startswith("ViT")):
            config = clip.CONFIGS[name]
            ours = {k: v.shape for k, v in clip.CLIP(config).state_dict().items()}
            theirs = open_clip.CLIP(**open_clip.get_model_config(name))
            assert ours == {k: v.shape for k, v in theirs.state_dict().items()}, name
            for tower, heads in ((theirs.visual, config.vision_heads), (theirs, config.text_heads)):
                assert tower.transformer.resblocks[0].attn.num_heads == heads
            if name in millions:
                assert round(sum(map(math.prod, ours.values())) / 1e6, 2) == millions[name]


def test_the_file_alone_runs_its_docstrings_examples_and_loads_at_the_cost_of_one_model(tmp_path):
    """From a picture's file to features; the loss; the step from pieces, which leaves the gradient
    of the whole batch's loss. VmHWM is the peak of all that is resident, mapped pages too."""
    shutil.copy(clip.__file__, tmp_path)
    picture, _, loss = map(textwrap.dedent, clip.__doc__.split("\n\n")[2:5])
    step = textwrap.dedent(clip.backward.__doc__.split("\n\n")[-1])
    assert len(picture.strip().splitlines()) == 6 and "piece=64" in step
    sizes = dataclasses.replace(CLIP_SMALL, vocab_size=49_408, context_length=77)
    clip.save(clip_random(sizes), tmp_path / "weights")
    clip.save(clip_random(clip.CONFIGS["ViT-S-32"]), tmp_path / "large")
    CLIP_PICTURE.save(tmp_path / "cat.jpg")
    code = f"""
import os, sys; sys.path[0] = "."
import torch, torch.nn.functional as F
{picture.replace("openai:ViT-B-32", "weights")}
assert image.shape == (1, 24) and text.shape == (2, 24)
if os.path.exists("/proc/self/status"):
    kib = lambda field: int(open("/proc/self/status").read().split(field + ":")[1].split()[0])
    before = kib("VmRSS")
    size = sum(p.nbytes for p in clip.load("large").parameters())
    assert (kib("VmHWM") - before) * 1024 < 1.2 * size
{loss}
assert clip.load("tiny-hf").config == clip.CONFIGS["tiny"] == model.config
loss.backward()
whole = {{name: p.grad for name, p in model.named_parameters()}}
model.zero_grad()
optimizer = torch.optim.SGD(model.parameters())
{step.replace("piece=64", "piece=1")}
for name, p in model.named_parameters():
    torch.testing.assert_close(p.grad, whole[name], atol=1e-5, rtol=1e-3)  # float32, other order
"""
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)


def test_a_new_model_has_the_same_bits_each_time_and_leaves_the_callers_numbers(tmp_path):
    for name in ("tiny", "small"):
        torch.manual_seed(0)
        want = clip.CLIP(clip.CONFIGS[name])
        before = torch.manual_seed(3).get_state()
        model = clip.load(f"new:{name}")
        assert torch.equal(torch.get_rng_state(), before) and not model.training
        assert clip_same(model, want) and model.config == clip.CONFIGS[name]
    assert clip.load("new:tiny", quick_gelu=True).config.quick_gelu
    clip.save(model, tmp_path / "w.safetensors", metadata={"made": "by --mixture 1/0/0"})
    assert clip.read_tensors(tmp_path / "w.safetensors").metadata["made"] == "by --mixture 1/0/0"


@pytest.mark.parametrize("resize", ["squash", "shortest"])
@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
def test_pictures_are_prepared_as_open_clip_and_the_loader_prepare_them(tmp_path, resize, how):
    open_clip = pytest.importorskip("open_clip")
    model = clip_random(CLIP_SMALL)
    model.preprocess = dataclasses.replace(CLIP_PIXELS, resize=resize, interpolation=how)
    clip.save(model, tmp_path)
    p = clip.load(tmp_path).preprocess
    assert p == model.preprocess
    _, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    for size in ((70, 50), (50, 70), (33, 97), (32, 32)):
        picture = CLIP_PICTURE.resize(size)
        levels = (p(picture) - prepare(picture)).abs() * 255 * torch.tensor(p.std)[:, None, None]
        # Pillow rounds after each of two passes, torch once
        assert p(picture).shape == (3, 32, 32) and levels.mean() < 0.5 and levels.max() < 3
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        crop = data.test_crop(picture, 32, resize, how)
        assert torch.equal(p(picture), p(pixels)) and torch.equal(p(picture), p(crop))
        assert torch.equal(p(pixels[None, None]), p(picture)[None, None])
        assert torch.equal(p(crop), clip.normalise(crop[None], p.mean, p.std)[0])
    deep = Image.fromarray(np.full((40, 40), 40_000, np.uint16))
    assert p.crop(deep).unique().tolist() == [40_000 // 257]
    for wrong in (pixels.float() / 255, pixels[:1]):
        with pytest.raises(ValueError, match="uint8"):
            p(wrong)


def test_round_trips_through_all_layouts_are_bitwise(tmp_path):
    model = clip_random(CLIP_SMALL)
    source = model
    for name, layout in (("a.pt", "openai"), ("hf", "hf"), ("b.pt", "openai"),
                         ("folder", "open_clip"), ("c.safetensors", "openai")):  # fmt: skip
        clip.save(source, tmp_path / name, layout)
        source = clip.load(tmp_path / name)
        assert clip_same(source, model) and source.config == model.config, name
        assert not source.training and source.logit_scale.requires_grad
        named = clip.openai_names(clip.read_tensors(tmp_path / name))
        assert named.keys() == model.state_dict().keys()
    source.preprocess = CLIP_PIXELS
    clip.save(source, tmp_path / "d.safetensors", "openai")
    assert clip.load(tmp_path / "d.safetensors").preprocess == CLIP_PIXELS


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("config", [CLIP_SMALL, clip.CONFIGS["tiny"], CLIP_WIDE])
def test_transformers_loads_our_hf_folder_and_we_load_its(tmp_path, config, quick_gelu):
    transformers = pytest.importorskip("transformers")
    model = clip_random(dataclasses.replace(config, quick_gelu=quick_gelu))
    clip.save(model, tmp_path, "hf")
    theirs, info = transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    images, tokens = clip_inputs(model.config)
    with torch.no_grad():
        out = theirs.eval()(input_ids=tokens, pixel_values=images)
        image, text, scale = model(images, tokens)
    assert torch.allclose(out.logits_per_image, scale * image @ text.T, atol=1e-4)  # 14 times more
    theirs.save_pretrained(tmp_path / "theirs")
    model.preprocess = dataclasses.replace(CLIP_PIXELS, size=config.image_size)
    clip.save(model, tmp_path, "hf")
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path)
    want = processor(CLIP_PICTURE, return_tensors="pt")["pixel_values"][0]
    assert ((model.preprocess(CLIP_PICTURE) - want).abs() * 255 * 0.3).mean() < 0.5  # of a level
    processor.save_pretrained(tmp_path / "theirs")  # as transformers spells it
    loaded = clip.load(tmp_path / "theirs")
    assert loaded.config == model.config and loaded.preprocess == model.preprocess
    assert clip_same(loaded, model)
    torch.save(theirs, tmp_path / "module.pt")  # whole, as torch advises against
    assert clip_same(clip.load(tmp_path / "module.pt", config=model.config), model)


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_open_clip_loads_our_folder_and_file_and_we_load_its(tmp_path, quick_gelu):
    open_clip = pytest.importorskip("open_clip")
    model = clip_random(dataclasses.replace(CLIP_WIDE, quick_gelu=quick_gelu))
    clip.save(model, tmp_path / "folder")
    theirs = open_clip.create_model(f"local-dir:{tmp_path}/folder").eval()  # strict
    images, tokens = clip_inputs(model.config)
    with torch.no_grad():
        assert torch.allclose(theirs.encode_image(images), model.encode_image(images), atol=1e-5)
        assert torch.allclose(theirs.encode_text(tokens), model.encode_text(tokens), atol=1e-5)
    again = clip_oracle(model.config)
    open_clip.load_checkpoint(again, f"{tmp_path}/folder/{clip.WEIGHTS[0]}")
    optimizer = {"state": {i: {"exp_avg": p} for i, p in enumerate(again.parameters())}}
    state = {f"module.{k}": v for k, v in again.state_dict().items()}
    tree = {"epoch": 3, "name": "x", "state_dict": state, "optimizer": optimizer}
    torch.save(tree, tmp_path / "epoch_3.pt")
    with pytest.warns(UserWarning, match=r"left out: .*optimizer \(\d+\)"):
        assert clip_same(clip.load(tmp_path / "epoch_3.pt", config=model.config), again)
    clip_bare(tmp_path / "folder", clip.WEIGHTS[0])
    assert clip.load(tmp_path / "folder").config == model.config


def clip_trees(state):
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}}
    prefixes = ("model.", "clip.", "module.model.", "module.", "net.x.", "module._orig_mod.")
    under = {prefix: {prefix + k: v for k, v in state.items()} for prefix in prefixes}
    yield from under.values()
    yield {"epoch": 1, "model_state_dict": state, "optimizer_state_dict": optimizer}
    yield {"state_dict": under["module."], "args": argparse.Namespace(lr=1), "acc": np.float64(0.3)}
    yield {"state_dict": under["model."], "optimizer_states": [optimizer], "loss": torch.ones(1)}
    noise = torch.zeros(3, dtype=torch.complex64)
    # to walk each path would take 2^40 steps
    maze = functools.reduce(lambda inner, _: {"x": inner, "y": inner}, range(40), {"z": noise})
    yield {"model": state, "losses": collections.deque([1.0, 2.0]), "net": maze}
    yield {n.replace(".0.", ".0._checkpoint_wrapped_module."): t for n, t in state.items()}
    odd = {"attn_mask": noise, "visual_head.q_proj.bias": noise, "transformer.x": noise}
    yield under["clip."] | odd | {"clip.logit_scale": state["logit_scale"][None]}
    text = ("transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection")
    yield {"state_dict": {f"{'text.' * n.startswith(text)}{n}": t for n, t in state.items()}}


def test_checkpoints_of_training_scripts_load(tmp_path):
    model = clip_random(CLIP_SMALL)
    for tree in clip_trees(model.state_dict()):
        torch.save(tree, tmp_path / "w.pt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert clip_same(clip.load(tmp_path / "w.pt", config=CLIP_SMALL), model), [*tree][:4]
    half = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    clip.write_tensors(half, tmp_path / "half")
    loaded = clip.load(tmp_path / "half", config=CLIP_SMALL)
    assert torch.equal(loaded.visual.proj, half["visual.proj"].float())
    clip.save(model, tmp_path / "hf", "hf")
    tensors = dict(clip.read_tensors(tmp_path / "hf"), **{"text_model.position_ids": torch.ones(9)})
    index = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(tensors)}
    for file in set(index.values()):
        torch.save({n: t for n, t in tensors.items() if index[n] == file}, tmp_path / "hf" / file)
    (tmp_path / "hf/model.safetensors").unlink()
    (tmp_path / "hf/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert clip_same(clip.load(tmp_path / "hf"), model)


def test_activation_and_heads_come_from_where_they_are_said_or_are_asked_for(tmp_path):
    config = dataclasses.replace(clip.CONFIGS["ViT-H-14"], vision_layers=1, text_layers=1,
                                 vocab_size=50, image_size=28)  # fmt: skip
    path = tmp_path / "w.safetensors"
    clip.write_tensors(clip_random(config).state_dict(), path)
    said = {  # of first releases; hidden_act left at its default
        '{"vision_config": null, "vision_config_dict": {"num_attention_heads": 16}, '
        '"text_config_dict": {"num_attention_heads": 16}}': True,
        '{"vision_cfg": {"width": 1280, "head_width": 80}, "text_cfg": {"heads": 16}}': False,
    }
    for text, quick in said.items():
        (tmp_path / "config.json").write_text(text, "utf-8-sig")  # Windows' editors put a mark
        assert clip.load(path).config == dataclasses.replace(config, quick_gelu=quick)
        assert clip.load(path, quick_gelu=not quick).config.quick_gelu != quick  # the last word
    for other in ('{"lr": 1}', '{"vision_cfg": "vit.yaml"}', '{"vision_config": "ViT-B-32"}'):
        (tmp_path / "config.json").write_text(other)  # another program's
        assert clip.load(path, quick_gelu=False).config == config
        with pytest.raises(ValueError, match="quick_gelu="):
            clip.load(path)
    for name, text in zip(("config.json", "open_clip_config.json"), said):  # the latter holds
        (tmp_path / name).write_text(text)
    assert not clip.load(path).config.quick_gelu


def test_files_that_agree_give_what_load_needs_and_others_are_named(tmp_path):
    quick = clip_random(CLIP_SMALL)
    clip.save(quick, tmp_path / "openai.pt", "openai")
    clip.save(quick, tmp_path / "hf", "hf")
    clip.save(quick, tmp_path / "quick.safetensors")
    quick.preprocess = CLIP_PIXELS
    clip.save(quick, tmp_path / "wide.safetensors")
    plain = clip_random(dataclasses.replace(CLIP_SMALL, quick_gelu=False))
    clip.save(plain, tmp_path / "plain.safetensors")
    clip.write_tensors(quick.state_dict(), tmp_path / "bare.safetensors")
    for paths in (["openai.pt", "quick.safetensors"], ["bare.safetensors", "hf"]):
        metadata = clip.agree([tmp_path / path for path in paths])
        clip.write_tensors(quick.state_dict(), tmp_path / "merged", metadata)
        assert clip.load(tmp_path / "merged").config == CLIP_SMALL
    assert clip.agree([tmp_path / "bare.safetensors"]) == {}
    for other, word in (("plain", "quick_gelu"), ("wide", "preprocess")):
        files = [tmp_path / path for path in ("bare.safetensors", "hf", f"{other}.safetensors")]
        with pytest.raises(ValueError, match=f"hf.*{other}.safetensors.*{word}"):
            clip.agree(files)
    assert clip.agree(files[:2], quick_gelu=False) != clip.agree(files[:2])


def test_an_adapter_that_is_not_merged_is_no_clip_and_a_merged_one_is(tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    clip.save(clip_random(CLIP_SMALL), tmp_path / "hf", "hf")
    model = transformers.CLIPModel.from_pretrained(tmp_path / "hf")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "fc1"]))
    adapted.save_pretrained(tmp_path / "adapter")
    torch.save(adapted.state_dict(), tmp_path / "whole.pt")
    for path, base in (("adapter", "hf"), ("whole.pt", "another model")):
        with pytest.raises(ValueError, match=f"adapter of .*{base}: merge.*merge_and_unload"):
            clip.load(tmp_path / path)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert clip_same(clip.load(tmp_path / "merged"), clip.load(tmp_path / "hf"))


def clip_edit(file, *keys, **change):
    tree = json.loads(file.read_text())
    functools.reduce(lambda node, key: node[key], keys, tree).update(change)
    file.write_text(json.dumps(tree))


def clip_make(folder, what, *keys, **change):
    """what: bytes; places of safetensors; tensors beside a CLIP's; a tensor's name; a config."""
    if isinstance(what, bytes):
        (folder / "m").write_bytes(what)
    elif isinstance(what, list):
        entry = {"dtype": "F32", "shape": [2]}
        head = json.dumps({i: entry | {"data_offsets": at} for i, at in enumerate(what)}).encode()
        (folder / "m").write_bytes(len(head).to_bytes(8, "little") + head + b"\0" * 20)
    elif isinstance(what, dict):
        torch.save(clip_random(CLIP_SMALL).state_dict() | what, folder / "m")
    elif not what.endswith(".json"):
        clip.write_tensors({what: torch.ones(3)}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "ORG/BASE"}')
    else:
        layout = "open_clip" if what.startswith("open_clip") else "hf"
        clip.save(clip_random(CLIP_SMALL), folder / "m", layout)
        clip_bare(folder / "m", clip.WEIGHTS[layout == "hf"])
        clip_edit(folder / "m" / what, *keys, **change)


CLIP_OPEN = "open_clip_config.json"
CLIP_HF = "preprocessor_config.json"
CLIP_BAD = [  # how the file or folder m is made, what the sentence must name
    (b"GGUF\3\0\0\0", "GGUF"), (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
    (b"<!DOCTYPE html>", "web page"), (b"", "m: "), (b"PK\3\4" + b"\0" * 40, "m: "),
    # overlap, hole, torn, longer than the header says
    ([[0, 8], [4, 20]], "m: "), ([[0, 8], [12, 20]], "m: "), ([[0, 8], [8, 16], [16, 24]], "m: "),
    ([[0, 8]], "m: "), ("linear.weight", "linear.weight"), ("vision_model.head.probe", "SigLIP"),
    ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "kohya"),
    ("base_model.model.text_model.encoder.q_proj.lora_A.weight", "ORG/BASE.*merge_and_unload"),
    ("visual.layer1.0.conv1.weight", "ResNet"), ("visual.trunk.blocks.0.norm1.weight", "timm"),
    ("vision_model.embeddings.class_embedding", "vision tower alone"),
    ("embeddings.patch_embedding.weight", "vision tower alone"),  # as transformers 5 saves it
    ("text_model.embeddings.token_embedding.weight", "text tower alone"),
    ("text_model.encoder.layers.0.mlp.fc1.SCB", "quantised"),
    ("optimizer_state_dict.base_optimizer_state.state.0.exp_avg", "optimizer.*zero_to_fp32"),
    ({"positional_embedding_res": torch.zeros(3)}, "positional_embedding_res"),  # Long-CLIP's
    ({"visual.ls_1.gamma": torch.zeros(3)}, "ls_1"), ({"text.cls_emb": torch.zeros(3)}, "cls_emb"),
    ({"odd": torch.eye(2).to_sparse()}, "sparse"),
    ({"ema.visual.conv1.weight": torch.zeros(3)}, "2 CLIPs.*ema"),
    ((CLIP_OPEN, "model_cfg", "vision_cfg", {"pool_type": "avg"}), "pool_type"),
    ((CLIP_OPEN, "model_cfg", "text_cfg", {"hf_tokenizer_name": "facebook/xlm"}), "facebook/xlm"),
    ((CLIP_OPEN, "preprocess_cfg", {"resize_mode": "longest"}), "longest"),
    (("config.json", {"model_type": "metaclip_2"}), "metaclip_2"),
    (("config.json", "text_config", {"hidden_act": "gelu"}), "activation"),
    ((CLIP_HF, {"do_normalize": False}), "do_norm"), ((CLIP_HF, {"resample": 0}), CLIP_HF),
    ((CLIP_HF, {"do_center_crop": False}), "do_center_crop"),
    ((CLIP_HF, {"rescale_factor": 1 / 127.5}), "rescale_factor"),
    ((CLIP_HF, {"size": {"shortest_edge": 40}}), "shortest_edge"),
]  # fmt: skip


@pytest.mark.parametrize("what, name", CLIP_BAD)
def test_what_cannot_be_loaded_is_named(tmp_path, what, name):
    *what, change = what if isinstance(what, tuple) else (what, {})
    clip_make(tmp_path, *what, **change)
    path = tmp_path / "m" if (tmp_path / "m").exists() else tmp_path
    for config in (None, CLIP_SMALL):
        with pytest.raises(ValueError, match=name):
            clip.load(path, config, quick_gelu=True)


@pytest.mark.parametrize("spec, name", [
    ("nowhere.pt", "nowhere.pt"), ("out", "checkpoint-500.*checkpoint-1000"),
    ("hf:org", "hf:ORG/REPO"), ("hf:org/../../etc/passwd", "passwd"), ("openai:RN50", "ViT-B-32"),
    ("new:huge", "small"), ("https://x.org/w#sha256=12", "sha256"),
])  # fmt: skip
def test_a_name_without_weights_says_what_there_is(tmp_path, monkeypatch, spec, name):
    monkeypatch.chdir(tmp_path)
    for step in (500, 1000):
        os.makedirs(f"out/checkpoint-{step}")
        clip.write_tensors({}, f"out/checkpoint-{step}/model.safetensors")
    torch.save({}, "out/training_args.bin")
    with pytest.raises((ValueError, OSError), match=name):
        clip.load(spec)


def test_what_would_be_silently_wrong_is_refused(tmp_path):
    for k, x in (("quick_gelu", False), ("vision_heads", 4), ("text_mlp", 64), ("vision_mlp", 256)):
        model = clip_random(dataclasses.replace(CLIP_SMALL, **{k: x}))
        with pytest.raises(ValueError, match=".safetensors"):
            clip.save(model, tmp_path / "m.pt", "openai")
    for name, layout in (("m.pth", "openai"), ("m.pt", "open_clip"), ("m.safetensors", "hf")):
        with pytest.raises(ValueError, match=name):
            clip.save(model, tmp_path / name, layout)
    clip.save(model, tmp_path / "w.safetensors")
    other = dataclasses.replace(model.config, quick_gelu=False)
    with pytest.raises(ValueError, match="quick_gelu"):
        clip.load(tmp_path / "w.safetensors", other)
    assert clip.load(tmp_path / "w.safetensors", other, quick_gelu=False).config == other


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_archives_and_pickles_are_read_without_running_what_they_name(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    model = clip_random(CLIP_SMALL)
    for name, value in zip(clip.SCALARS, (32, 10, 40)):
        model.register_buffer(name, torch.tensor(value))
    torch.jit.trace(model, clip_inputs(CLIP_SMALL), check_trace=False).save(tmp_path / "ViT.pt")
    loaded = clip.load(tmp_path / "ViT.pt")
    assert loaded.config == CLIP_SMALL  # QuickGELU and 64-wide heads, by OpenAI's rule
    assert clip_same(loaded, clip_random(CLIP_SMALL))
    torch.save({"state_dict": {"a": torch.arange(3.0)}, "args": Evil()}, tmp_path / "evil.pt")
    assert clip.read_tensors(tmp_path / "evil.pt")["state_dict.a"].tolist() == [0, 1, 2]
    assert not (tmp_path / "ran").exists()


def test_torch_zips_give_views_and_dtypes_back(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tagged = torch.nn.Parameter(base.double())
    tagged.tag = 1  # torch then saves it with another function
    tensors = {
        "turned": base.T, "part": base[1:3, 2:5], "half": base.half(), "brain": base.bfloat16(),
        "none": torch.zeros(0, 3), "flag": torch.tensor([True, False]), "count": torch.tensor(7),
        "wide": torch.ones(1, 3).expand(5, 3), "weight": torch.nn.Parameter(base), "tagged": tagged,
        "negative": torch._neg_view(base), "turned twice": base.T.contiguous().T,
    }  # fmt: skip
    torch.save(tensors, tmp_path / "a.pt")
    read = clip.read_tensors(tmp_path / "a.pt")
    assert [*read] == [*tensors]
    for k, v in tensors.items():
        assert read[k].dtype == v.dtype and torch.equal(read[k], v.detach()), k
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for member in old.namelist():
            new.writestr(member, old.read(member), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="b.pt.*compressed"):
        clip.read_tensors(tmp_path / "b.pt")


def test_safetensors_are_written_byte_for_byte_as_the_package_does(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {f"{i}.é": torch.randn(i, 3).to(d) for i, d in enumerate(clip.DTYPES.values())}
    for metadata in ({}, {"format": "pt"}):
        clip.write_tensors(tensors, tmp_path / "ours", metadata)
        safetensors.save_file(tensors, tmp_path / "theirs", metadata or None)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
        read = clip.read_tensors(tmp_path / "theirs")
        assert read.metadata == metadata
        assert all(torch.equal(read[k], v) for k, v in tensors.items())


def test_a_tensor_that_was_read_is_the_callers_own_wherever_the_data_begin(tmp_path):
    values = np.arange(3, dtype=np.float32).tobytes()
    entry = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
    for padding, mapped in itertools.product(range(8), (False, True)):
        head = json.dumps({"a": entry}).encode() + b" " * padding
        (tmp_path / "w").write_bytes(len(head).to_bytes(8, "little") + head + values)
        tensors = clip.read_tensors(tmp_path / "w", mapped)
        assert tensors["a"].add_(1).tolist() == [1, 2, 3] and tensors["a"].tolist() == [0, 1, 2]


class ClipServer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    close_connection = True
    kind = "whole"  # or "cut", "chunked" without the end, "unsaid" length

    def do_GET(self):
        self.seen.append(self.path)
        body = self.files.get(self.path)
        if body is None:
            return self.send_error(404)
        self.send_response(200)
        if self.kind in ("whole", "cut"):
            self.send_header("Content-Length", str(len(body)))
        if self.kind == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%b\r\n" % (len(body), body)
        self.end_headers()
        return self.wfile.write(body[: -1 if self.kind == "cut" else None])


@pytest.fixture
def clip_server(monkeypatch):
    handler = type("Handler", (ClipServer,), {"files": {}, "seen": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        handler.url = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(clip, "HUB_SERVER", handler.url)
        monkeypatch.setattr(clip, "MODEL_SERVER", handler.url)
        yield handler
        server.shutdown()


def test_a_download_is_complete_and_verified_or_gone(clip_server, tmp_path):
    body = random.Random(0).randbytes(3_000_000)
    sha = hashlib.sha256(body).hexdigest()
    clip_server.files["/w.pt"] = body
    clip_server.files[f"/{clip.OPENAI['ViT-B-32'][1]}/ViT-B-32.pt"] = b"an impostor"
    for clip_server.kind, check in itertools.product(("cut", "chunked", "unsaid"), ("", sha)):
        with pytest.raises(OSError, match="w.pt"):
            clip.fetch(f"{clip_server.url}/w.pt{check and '#sha256='}{check}", tmp_path)
    clip_server.kind = "whole"
    for spec in (f"{clip_server.url}/w.pt#sha256={'0' * 64}", "openai:ViT-B-32"):
        with pytest.raises(ValueError, match="sha256"):
            clip.load(spec, cache=tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    for spec in (f"{clip_server.url}/w.pt", f"{clip_server.url}/w.pt#sha256={sha}"):
        clip_server.seen.clear()
        paths = {clip.fetch(spec, tmp_path) for _ in range(2)}
        assert Path(*paths).read_bytes() == body and len(clip_server.seen) == 1


@pytest.mark.parametrize("url", ["http://a.org", "http://127.0.0.1:80@a.org", "ftp://a.org"])
def test_nothing_is_asked_for_in_plain_http(monkeypatch, tmp_path, url):
    monkeypatch.setattr("socket.create_connection", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.setattr(clip, "HUB_SERVER", url)
    for spec in ("hf:org/repo", f"{url}/w.pt"):
        with pytest.raises(OSError, match=url):
            clip.load(spec, cache=tmp_path)


def test_hub_repositories_come_with_configs_and_merges_and_are_then_offline(clip_server, tmp_path):
    model = clip_random(CLIP_SMALL)
    clip.save(model, tmp_path / "hf", "hf")
    clip_bare(tmp_path / "hf")
    (tmp_path / "hf/merges.txt").write_text("#version: 0.2")
    listing = [{"rfilename": "README.md"}]
    for file in (tmp_path / "hf").iterdir():
        sha = hashlib.sha256(file.read_bytes()).hexdigest()
        listing.append({"rfilename": file.name, "lfs": {"sha256": sha}})
        clip_server.files[f"/org/repo/resolve/main/{file.name}"] = file.read_bytes()
    listing = json.dumps({"siblings": listing}).encode()
    clip_server.files["/api/models/org/repo?blobs=true"] = listing
    for spec in ("hf:org/repo", "hf:org/repo/model.safetensors", "hf:org/repo"):
        loaded = clip.load(spec, cache=tmp_path / spec.replace("/", "_"))
        assert clip_same(loaded, model) and loaded.config == CLIP_SMALL
    assert clip.find_bpe("hf:org/repo", tmp_path / "hf:org_repo").endswith("merges.txt")
    assert len(clip_server.seen) == 2 * 5
    damaged = "/org/repo/resolve/main/model.safetensors"
    clip_server.files[damaged] = clip_server.files[damaged][:-1] + b"?"
    with pytest.raises(ValueError, match="sha256"):
        clip.load("hf:org/repo", cache=tmp_path / "y")


@pytest.fixture(scope="module")
def clip_bpe():
    return Path(pytest.importorskip("open_clip").__file__).parent / "bpe_simple_vocab_16e6.txt.gz"


@pytest.fixture(scope="module")
def clip_tokenizer(clip_bpe):
    return clip.Tokenizer(clip_bpe)


CLIP_IDS = {
    "a photo of a cat": "320 1125 539 320 2368", "  Hello   WORLD!! ": "3306 1002 748",
    "it's 2024": "585 568 273 271 273 275", "café naïve": "15304 1097 35689 563",
    "&lt;b&gt; &amp;amp; fish": "283 321 285 261 2759", "x²": "343 41175",
    "__init__.py": "3838 42670 2355 269 7504", "don’t": "847 713",
}  # fmt: skip


def clip_corpus():
    rng = random.Random(0)
    words = "a photo the Dog's CATS don't we're I'll 12 3.5 café x_y __init__ (big) \"quote\""
    words = [*words.split(), "re-do", "@home", "#tag", "50%", "C++", "O'Neil"]
    yield from (" ".join(rng.choice(words) for _ in range(rng.randint(1, 12))) for _ in range(1500))
    every = map(chr, range(0x110000))
    chars = [c for c in every if unicodedata.category(c) not in ("Cn", "Co", "Cs")]
    for i in range(0, len(chars), 128):  # every block that this Python's Unicode knows
        block = chars[i : i + 128]
        for _ in range(2):
            yield f"{''.join(rng.choices(block, k=6))} {rng.choice(words)}{rng.choice(block)}"
    yield from (f"x&#{i};y&#x{i:x}; &amp;#{i};" for i in range(400))
    yield from (f"a{chr(i)}b{chr(i)}{chr(i)} '{chr(i)}" for i in range(0x500))
    yield from (
        "❤️ 👩\u200d👩\u200d👧 🏴\U000e0067\U000e0062\U000e007f 😀😀", "ＬＯＵＤ　ﾊﾝｶｸ", "ﬁne ﬂuﬀ",
        "“it’s” „so“ «CAFÉ»", "\x1b[31mred\x1b[0m", "a\u200bb\ufeffc", "line\r\nbreak\x0c\x0bx",
        "\ud83d\ude00 \ud83d x", "e\u0301 n\u0303", "Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "1½ Ⅷ ٣ 二 x²y",
        "itâ€™s cafÃ© Â©2020 â€œokâ€\x9d ðŸ˜€", "&eacute;&amp;amp;lt; &nbsp;x", "NESCAFÉ® „Spaß“",
        "<b>&amp;amp;lt;</b>", "İstanbul ſt K Å", "&notit; &amp &copy2020", "a" * 300, "_'s_'S 'Re",
    )  # fmt: skip


def test_tokenizer_equals_open_clips_on_published_ids_and_a_corpus(clip_tokenizer):
    """What may differ: mojibake, at which ftfy guesses, and U+0345, to regex a letter."""
    oracle = pytest.importorskip("open_clip.tokenizer").SimpleTokenizer()
    ftfy = pytest.importorskip("ftfy")
    for text, ids in CLIP_IDS.items():
        assert clip_tokenizer.encode(text) == [int(i) for i in ids.split()]
    corpus = list(clip_corpus())
    different = [s for s in corpus if clip_tokenizer.encode(s) != oracle.encode(s)]
    plain = {s: ftfy.fixes.unescape_html(s) for s in different}
    unguessed = [s for s in different if ftfy.fix_encoding(plain[s]) == plain[s]]
    assert len(corpus) >= 5000 and len(different) <= 10 and all("\u0345" in s for s in unguessed)
    plain = [s for s in corpus if s.isascii()][:200]  # cut, the end token kept
    assert torch.equal(clip_tokenizer(plain, 12), oracle(plain, 12))


def test_every_file_of_merges_gives_the_same_ids(clip_tokenizer, clip_bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    lines = gzip.decompress(clip_bpe.read_bytes()).decode().split("\n")[1:48_895]
    for ending, header in (("\n", ["#version: 0.2"]), ("\r\n", ["#version: 0.2"]), ("\n", [])):
        (tmp_path / "merges.txt").write_bytes((ending.join(header + lines) + ending).encode())
        other = clip.Tokenizer(tmp_path / "merges.txt")
        assert other.merges == clip_tokenizer.merges and other.end == 49_407
    encoder = pytest.importorskip("open_clip.tokenizer").SimpleTokenizer().encoder
    vocab = dict(zip([*encoder][:-2] + ["<|startoftext|>", "<|endoftext|>"], encoder.values()))
    theirs = transformers.CLIPTokenizer(vocab, [(*line.split(),) for line in lines])
    clip.save(clip_random(CLIP_SMALL), tmp_path / "hf", "hf")
    theirs.save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf/tokenizer.json"
    assert clip.find_bpe(tmp_path / "hf") == str(path)
    texts = ["a photo of a cat", "Hello   WORLD!! it's 2024", "café naïve", "__init__.py x²"]
    for merges in ([line.split() for line in lines], lines):  # by version
        clip_edit(path, "model", merges=merges)
        ours = clip.Tokenizer(path)
        ids = [[ours.start, *ours.encode(text), ours.end] for text in texts]
        assert ids == theirs(texts)["input_ids"] and ours.merges == clip_tokenizer.merges
    clip_edit(path, "model", "vocab", **{"a</w>": 7, "(": 320})
    (tmp_path / "gpt2.txt").write_text("#version: 0.2\na b\nab c\n")
    for other in ("hf/tokenizer.json", "gpt2.txt"):
        with pytest.raises(ValueError, match=other):
            clip.Tokenizer(tmp_path / other)
    clip.check_tokenizer(clip.load("new:tiny"), clip.Tokenizer(), "w.pt")
    with pytest.raises(ValueError, match="w.pt.* 258 .* 49408"):
        clip.check_tokenizer(clip.load("new:tiny"), clip_tokenizer, "w.pt")


def test_decode_inverts_encode_and_no_caption_holds_a_control_token(clip_tokenizer):
    for text in ("a photo of a cat", "café 😀 naïve", "x ² y"):
        assert clip_tokenizer.decode(clip_tokenizer.encode(text)) == text
        assert clip_tokenizer.decode(clip_tokenizer([text])[0]) == text
    for text in ("Any  bytes\n\0 stay é😀 ", ""):
        assert clip.Tokenizer().decode(clip.Tokenizer()([text])[0]) == text
    for text in ("<start_of_text> a cat <end_of_text>", "<|startoftext|>x<|endoftext|>"):
        assert max(clip_tokenizer.encode(text)) < clip_tokenizer.start
    for tokenizer in (clip_tokenizer, clip.Tokenizer()):
        assert torch.equal(tokenizer("a cat"), tokenizer(["a cat"]))
        row = tokenizer(["cat dog " * 50], context_length=10)[0].tolist()
        assert row[0] == tokenizer.start and row.index(tokenizer.end) == 9
        with pytest.raises(ValueError, match="cat dog"):
            tokenizer(["cat dog " * 50], 10, truncate=False)


# ---------------------------------------------------------------------------------------- data.py

DATA_CONCEPTS = [(d, name) for d in "QRS" for name in ("ant", "Bee", "cat", "dog")]


@pytest.fixture(scope="module")
def data_world():
    return data.toy(0, train=90, test=80)


def data_mixture(world, tasks=5, **options):
    chunks = data.tasks(data.order(data.concepts(world.adaptation)), tasks)
    return data.Mixture(world, chunks, **{"batch_size": 100} | options), chunks


def data_pictures(folder, names):
    """Pictures of one grey each, 10 times their number."""
    for k, name in enumerate(names):
        file = Path(folder) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 10 * k % 256, np.uint8)).save(file)
    return Path(folder)


def data_flux(root, name="SET", n=12, classes=("a", "b"), splits=("train", "test"), **captions):
    """A dataset in FoMo-in-Flux's layout."""
    info = root / "00_info"
    info.mkdir(parents=True, exist_ok=True)
    (info / f"{name}_classnames.json").write_text(json.dumps(classes))
    for split in splits:
        items = {f"{split}/{i}.png": {"target": i % len(classes), "primer_caption": "x",
                 "default_caption": f"{name} {split} {i}"} | captions for i in range(n)}
        (info / f"{name}_{split}.json").write_text(json.dumps(items))
        data_pictures(root / name, items)
    return root


def data_class_folders(root, splits=("train/", "test/"), classes=("cat", "dog"), n=6):
    names = [f"{s}{c}/{i}.png" for s in splits for c in classes for i in range(n)]
    return data_pictures(root, names)


def data_table(root, rows, name="t.csv"):
    root.mkdir(exist_ok=True)
    with open(root / name, "w", newline="", encoding="utf-8") as f:
        csv.writer(f, delimiter="\t" if name.endswith("tsv") else ",").writerows(rows)
    return root / name


def data_tar(path, files, links=(), **options):
    """A tar of {name: bytes} and of links (name, type, target)."""
    with tarfile.open(path, "w", **options) as archive:
        for name, content, kind in [*((*f, None) for f in files.items()), *links]:
            member = tarfile.TarInfo(name)
            if kind:
                member.type, member.linkname = kind, content
            member.size = 0 if kind else len(content)
            archive.addfile(member, None if kind else io.BytesIO(content))
    return path


def data_tar_of(root, name="SET"):
    with tarfile.open(root / f"{name}.tar", "w") as archive:
        archive.add(root / name, f"./{name}")
    shutil.rmtree(root / name)


def data_png(grey=0):
    raw = io.BytesIO()
    Image.new("RGB", (4, 4), (grey, grey, grey)).save(raw, "PNG")
    return raw.getvalue()


def test_the_drawn_world_is_a_function_of_its_seed_and_has_an_account(data_world):
    worlds = [data_world, data.toy(0, train=90, test=80), data.toy(1, train=90, test=80)]
    prints = [[s.fingerprint() for d in w.adaptation + w.heldout for s in (d.train, d.test, w.pool)]
              for w in worlds]  # fmt: skip
    assert prints[0] == prints[1] and not set(prints[0]) & set(prints[2])
    assert (len(data_world.adaptation), len(data_world.heldout)) == (8, 5)
    assert all(len(d.train) == 90 and len(d.test) == 80 for d in data_world.adaptation)
    assert len(data_world.pool) == 5 * 90 + 8 * 67 and "90" in data_world.notes[0]


def test_performance_frequency_time_and_dataset_order_by_their_keys():
    loss = np.random.default_rng(0).permutation(12)
    ordered = data.order(DATA_CONCEPTS, "performance", key=loss)
    assert [loss[DATA_CONCEPTS.index(c)] for c in ordered] == list(range(12))
    counts = [{"ant": 7, "Bee": 0, "cat": 7, "dog": 2}[name] for _, name in DATA_CONCEPTS]
    names = [name for _, name in data.order(DATA_CONCEPTS, "frequency", key=counts)]
    assert names == 3 * ["Bee"] + 3 * ["dog"] + 3 * ["ant"] + 3 * ["cat"]
    shuffled = data.order(DATA_CONCEPTS, "random", 3)
    assert shuffled[::-1] == data.order(DATA_CONCEPTS, seed=3, reverse=True) != DATA_CONCEPTS
    years = [{"Q": 2013, "R": 2009, "S": 2013}[d] for d, _ in DATA_CONCEPTS]
    for seed in range(3):
        sets = [d for d, _ in data.order(DATA_CONCEPTS, "time", seed, years)]
        assert sets[:4] == 4 * ["R"] and sorted(sets[4:]) == [*"QQQQSSSS"] != sets[4:]
        ordered = data.order(DATA_CONCEPTS, "dataset", seed)
        assert [d for d, _ in ordered] == [*"QQQQRRRRSSSS"] and ordered != DATA_CONCEPTS
    assert len(data.TIMES) == 41 and not set(data.TIMES) & set(data.HELD_OUT)
    assert data.times([("FLOWERS102", "x"), ("CLRS", "x"), ("QUILT", "y")]) == [0, 11, 14]


@pytest.mark.parametrize("n", [12, 90])  # more than 64 starts, too
def test_similarity_is_the_shortest_greedy_path_of_all_starts(n):
    unit = torch.as_tensor(np.random.default_rng(n).normal(size=(n, 4)), dtype=torch.float32)
    unit = torch.nn.functional.normalize(unit)
    distance = (1 - unit @ unit.T).tolist()
    found = []
    for start in range(n):
        path = [start]
        while len(path) < n:
            path.append(min(set(range(n)) - set(path), key=distance[path[-1]].__getitem__))
        found.append((sum(distance[a][b] for a, b in itertools.pairwise(path)), path))
    ordered = data.order([("A", str(i)) for i in range(n)], "similarity", key=unit.numpy())
    assert [int(i) for _, i in ordered] == min(found)[1]


def test_occurrences_are_counted_as_whole_words_of_any_case():
    concepts = [("A", n) for n in ("cat", "Sea Lion", "C-130", "café", "?!")]
    captions = ["A cat, a CAT and a category", ["sea lions", "a sea\nlion; cats"],
                "sea lion sea lion", "c 130 or C130",
                unicodedata.normalize("NFD", "Café")]  # fmt: skip
    assert data.occurrences(concepts, captions) == [2, 3, 1, 1, 0]


def test_tasks_are_chunked_as_published_and_streams_survive_a_file(data_world, tmp_path):
    chunks = data.tasks(list(range(18_381)), 20)
    assert [len(c) for c in chunks] == [920] + 19 * [919] and chunks[1][0] == 920
    stream = [("LETTERS", "A"), ("DIGITS", "one"), ("GONE", unicodedata.normalize("NFD", "é"))]
    data.write_stream(stream, tmp_path / "s.json")
    read = data.read_stream(tmp_path / "s.json")
    kept, notes = data.trainable(read, data_world)
    assert read == [*stream[:2], ("GONE", "é")] and kept == stream[:1]
    assert "DIGITS+++one" in notes[0] and "GONE+++é" in notes[0]


def test_a_batch_is_split_by_floors_then_the_rest_in_turn():
    assert data.split_batch(512, (0.33, 0.34, 0.33)) == [169, 175, 168]  # the paper's code
    assert data.split_batch(512, (0.33, 0.67, 0)) == [169, 343, 0]
    assert data.split_batch(100, (0.1, 0.2, 0.7)) == [10, 20, 70]  # the float is below 70
    assert data.split_batch(7, (0, 0.5, 0.5)) == [0, 4, 3]


def test_batches_hold_samples_of_update_buffer_and_pool(data_world):
    mixture, chunks = data_mixture(data_world)
    splits = {d.name: d for d in data_world.adaptation}
    for task in range(5):
        now = set(chunks[task])
        before = {c for chunk in chunks[:task] for c in chunk}
        ids = mixture.ids(task, 2)
        drawn = [(n, splits[n].classes[splits[n].train.labels[i]]) for n, i in ids if n != "pool"]
        p, d, b = mixture.counts(task)
        assert len(ids) - len(drawn) == p
        assert sum(c in now for c in drawn) == d and sum(c in before for c in drawn) == b
    assert mixture.counts(0) == [33, 67, 0]
    alone, _ = data_mixture(dataclasses.replace(data_world, pool=None), ratios=(0, 0.5, 0.5))
    assert alone.counts(0) == [0, 100, 0] and alone.counts(1) == [0, 50, 50]


def test_the_pool_alone_can_be_trained_on_as_one_task(data_world):
    mixture, _ = data_mixture(data_world, tasks=1, ratios=(1, 0, 0))
    n = len(data_world.pool)
    seen = [pair for step in range(-(-n // 100)) for pair in mixture.ids(0, step)]
    assert {source for source, _ in seen} == {"pool"} and len({i for _, i in seen[:n]}) == n
    bare = data.Mixture(data.World([], [], data_world.pool), [[]], 100, (1, 0, 0))
    assert bare.ids(0, 3) == mixture.ids(0, 3) and mixture.few_captions() == []
    [(images, captions)] = data.loader(data_world, mixture, 0, 1, 32)
    assert images.shape == (100, 3, 32, 32) and len(captions) == 100


def test_a_source_is_seen_whole_before_anything_of_it_repeats(data_world):
    mixture, _ = data_mixture(data_world, ratios=(0, 1, 0))
    n = mixture.ends[1]
    seen = [i for step in range(3 * n // 100 + 1) for i in mixture.ids(0, step)]
    assert len(set(seen[:n])) == len(set(seen[n : 2 * n])) == n and seen[:n] != seen[n : 2 * n]
    replay, _ = data_mixture(data_world, replay=20)
    drawn = {i for s in range(30) for source, i in replay.ids(1, s) if source == "pool"}
    assert len(drawn) == 20 and max(drawn) > 100


@pytest.mark.parametrize("n", [1, 2, 3, 10, 97, 4096])
def test_an_endless_row_is_one_new_permutation_after_the_other(n):
    rows = data.endless(np.arange(3 * n), n, 5, 1).reshape(3, n)
    assert all(np.array_equal(np.sort(row), np.arange(n)) for row in rows)
    if n > 9:
        assert not np.array_equal(rows[0], rows[1]) and not np.array_equal(rows[0], rows[2])
        assert not np.array_equal(rows[0], data.endless(np.arange(n), n, 5, 2))
    assert np.array_equal(data.endless([n, 0], n, 5, 1), [rows[1, 0], rows[0, 0]])


def test_batches_are_the_same_for_any_workers_processes_and_start(data_world):
    mixture, _ = data_mixture(data_world, batch_size=13)
    before = torch.get_rng_state()
    whole = list(data.loader(data_world, mixture, 1, 4, 32))
    for workers in (0, 2):
        shares = [list(data.loader(data_world, mixture, 1, 4, 32, workers, 2, (rank, 3)))
                  for rank in range(3)]  # fmt: skip
        for step, (images, captions) in enumerate(whole[2:]):
            assert torch.equal(torch.cat([share[step][0] for share in shares]), images)
            assert [c for share in shares for c in share[step][1]] == captions
    assert torch.equal(torch.get_rng_state(), before)
    again, _ = data_mixture(data_world, batch_size=13, seed=1)
    assert again.ids(1, 0) != mixture.ids(1, 0)


def test_few_different_captions_in_a_batch_are_said_with_a_size_that_fits(tmp_path):
    world = data.open_world(data_class_folders(tmp_path / "two", n=8))
    chunks = [[("two", "cat"), ("two", "dog")]]
    [note] = data.Mixture(world, chunks, 5, (0, 1, 0)).few_captions()
    assert "--batch-size 4" in note and "2 captions" in note
    assert data.Mixture(world, chunks, 4, (0, 1, 0)).few_captions() == []


def test_training_crops_match_torchvisions_of_the_same_box():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
    crop = v2.RandomResizedCrop(32, (0.9, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    for seed in range(5):
        torch.manual_seed(seed)
        theirs = v2.PILToTensor()(crop(image))
        torch.manual_seed(seed)
        ours = data.train_crop(np.array(image), 32)
        assert (ours.int() - theirs.int()).abs().max() <= 1  # they round between the two passes


@pytest.mark.parametrize("shape", [(375, 500), (40, 30), (224, 224), (20, 95), (700, 60)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_test_crops_are_pillows_to_a_level_on_average(shape, interpolation):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8))
    image = small.resize(shape[::-1], Image.BICUBIC)
    mode = v2.InterpolationMode(interpolation)
    oracle = v2.Compose([v2.Resize(64, mode), v2.CenterCrop(64), v2.PILToTensor()])(image)
    ours = data.test_crop(np.array(image), 64, interpolation=interpolation)
    assert (ours.int() - oracle.int()).abs().float().mean() < 1
    assert torch.equal(ours, data.test_crop(image, 64, interpolation=interpolation))
    oracle = v2.PILToTensor()(image.resize((64, 64), Image.Resampling[interpolation.upper()])).int()
    squashed = data.test_crop(image, 64, "squash", interpolation)
    assert (squashed.int() - oracle).abs().float().mean() < 1


def test_every_format_decodes_to_pillows_pixels_turned_by_no_exif(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (21, 34, 3), np.uint8))
    clear = image.copy()
    clear.putalpha(Image.fromarray(np.full((21, 34), 128, np.uint8)))
    turned = Image.Exif()
    turned[0x112] = 6
    saved = [(image, "jpg", {"exif": turned}), (image.convert("L"), "jfif", {}), (clear, "png", {}),
             (image.convert("CMYK"), "jpe", {}), (image.convert("1"), "png", {}),
             (image.convert("P"), "png", {"transparency": 3}), (image, "ppm", {}),
             *((image, suffix, {}) for suffix in ("png", "webp", "gif", "bmp", "tif"))]  # fmt: skip
    for k, (picture, suffix, options) in enumerate(saved):
        file = tmp_path / f"{k}.{suffix}"
        picture.save(file, **options)
        theirs = np.asarray(Image.open(file).convert("RGB"))
        assert np.array_equal(data.decode(file.read_bytes()), theirs), file
        assert file.suffix in data.SUFFIXES


@pytest.mark.parametrize("name", ["16.png", "16.tiff"])
def test_sixteen_bits_become_eight_by_scale(tmp_path, name):
    ramp = np.random.default_rng(0).integers(0, 65536, (1, 256)).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / name)
    pixels = data.decode((tmp_path / name).read_bytes())
    assert np.array_equal(pixels, np.repeat(ramp[..., None] // 257, 3, axis=2))


@pytest.mark.parametrize("raw", [
    b"", b"\x89PN", data_png()[:40], data_png()[:44], b"%!PS-Adobe-3.0 EPSF-3.0\n%%EOF\n",
    data_png().replace(b"\0\0\0\4\0\0\0\4", b"\0\0\xff\xff\0\0\xff\xff"),  # 4 billion pixels
])  # fmt: skip
def test_a_torn_huge_or_executable_picture_is_named(tmp_path, raw):
    data_pictures(tmp_path, ["x.png"])
    split = data.in_files(tmp_path, ["x.png"], [0], ["x"])
    (tmp_path / "x.png").write_bytes(raw)
    with pytest.raises(ValueError, match=r"x\.png"):
        split.image(0)
    assert len(data.broken_pictures(split)) == 1 and data.contact_sheet(split).size[0] > 100


def test_broken_pictures_are_replaced_within_their_source_or_class(tmp_path):
    world = data.open_world(data_flux(tmp_path / "d", n=40), pool=["SET"])
    [d] = world.adaptation
    mixture, _ = data_mixture(world, tasks=2, batch_size=30)
    sound = list(data.loader(world, mixture, 1, 2, 32))
    [whole] = data.test_loader(d.test, range(40), 32)
    for path in [d.train.paths[i] for i in (0, 1, 2, 7)]:
        (tmp_path / "d/SET" / path).write_bytes(b"x")
    (tmp_path / "d/SET" / d.test.paths[3]).write_bytes(b"x")
    said = [[], []]
    first, second = (list(data.loader(world, mixture, 1, 2, 32, workers, broken=told.extend))
                     for workers, told in zip((0, 2), said))  # fmt: skip
    assert said[0] == said[1] and len(said[0]) >= 1
    for step in (0, 1):
        assert torch.equal(first[step][0], second[step][0]) and first[step][1] == second[step][1]
        for slot, (_, i) in enumerate(mixture.ids(1, step)):
            skip = 0
            while i in (0, 1, 2, 7):
                skip += 1
                i = mixture.ids(1, step, skip)[slot][1]
            assert first[step][1][slot] == d.train.captions[i]
            assert skip or torch.equal(first[step][0][slot], sound[step][0][slot])
    [got] = data.test_loader(d.test, range(40), 32, broken=said.append)
    same = [j for j in (*range(4, 40), *range(3)) if d.test.labels[j] == d.test.labels[3]]
    assert torch.equal(got[3], whole[same[0]]) and torch.equal(got[4:], whole[4:])


def test_a_worker_that_dies_is_reported_with_its_signal(data_world):
    def make(item, faults):
        if item == 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        return item

    with pytest.raises((ChildProcessError, RuntimeError), match=r"SIGSEGV|Segmentation"):
        list(data._batches(make, range(8), 1, None))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_format_are_indexed_with_their_links(tmp_path, form):
    rng = np.random.default_rng(form)
    names = ["a.png", "x/" + 60 * "n" + ".jpg", "y/" + "d/" * 40 + "z.jpg", "sp ace/ü.png"]
    if form != tarfile.USTAR_FORMAT:
        names += ["long/" + 300 * "n" + ".png", 120 * "e/" + "猫.png"]
    files = {name: rng.bytes(int(rng.integers(0, 3000))) for name in names}
    links = [("hard", "a.png", tarfile.LNKTYPE)] + [(name, to, tarfile.SYMTYPE) for name, to in (
        ("sp ace/soft", "../a.png"), ("twice", "hard"), ("out", "/etc/passwd"),
        ("round", "and"), ("and", "round"))]  # fmt: skip
    path = data_tar(tmp_path / "a.tar", files, links, format=form)
    raw = path.read_bytes()
    found = {n: raw[at : at + size] for n, (at, size) in data.tar_members(path).items()}
    linked = {name: files["a.png"] for name in ("hard", "sp ace/soft", "twice")}
    assert found == {unicodedata.normalize("NFC", n): b for n, b in files.items()} | linked


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("tar", [False, True])
def test_names_are_found_in_either_unicode_form(tmp_path, on_disk, tar):
    other = {"NFC": "NFD", "NFD": "NFC"}[on_disk]
    name = unicodedata.normalize(on_disk, "SÉT")
    root = data_flux(tmp_path, name, classes=(unicodedata.normalize(other, "Å"), "b"))
    (root / name / "test").rename(root / name / unicodedata.normalize(on_disk, "é"))
    for file in list((root / "00_info").iterdir()):
        text = file.read_text().replace("test/", unicodedata.normalize(other, "é/"))
        file.unlink()
        (root / "00_info" / unicodedata.normalize(other, file.name)).write_text(text)
    keys = data.open_world(root).adaptation[0].test.keys()
    if tar:
        data_tar_of(root, name)
    [d] = data.open_world(root).adaptation
    assert np.array_equal(d.test.keys(), keys) and len({*keys.tolist()}) == 12
    assert d.name == "SÉT" and d.classes == ["Å", "b"] and d.test.image(3).shape == (8, 8, 3)


@pytest.mark.parametrize("change", ["picture", "label", "caption", "tar", "nothing"])
def test_a_fingerprint_changes_with_all_that_a_split_holds(tmp_path, change, monkeypatch):
    root = data_flux(tmp_path / "a")
    if change == "tar":
        data_tar_of(root)

    def prints():
        return data.open_world(root, cache=tmp_path / "cache").adaptation[0].train.fingerprint()

    first = prints()
    info = root / "00_info/SET_train.json"
    if change == "picture":  # another of the same size, in place
        raw = bytearray((root / "SET/train/3.png").read_bytes())
        raw[-20] ^= 1
        (root / "SET/train/3.png").write_bytes(raw)
    elif change == "tar":
        os.utime(root / "SET.tar", ns=(1, 1))
    elif change != "nothing":
        old, new = {"label": ('"target": 1', '"target": 0'), "caption": ("n 3", "n 33")}[change]
        info.write_text(info.read_text().replace(old, new, 1))
    else:  # the index serves
        monkeypatch.setattr(data, "in_files", None)
    assert (prints() == first) is (change == "nothing")


def test_fomos_annotations_are_read_by_split_kind_and_prompt(tmp_path):
    kinds = {"synthetic_merged_caption": ["m", " ", "n"], "synthetic_caption": ["s"]}
    root = data_flux(tmp_path, splits=("train", "test", "train_224"), **kinds)
    data_flux(root, "TEXTS", primer_caption=None)
    [d, texts] = data.open_world(root).adaptation
    assert d.train.captions[0] == "SET train_224 0" and d.test.captions[0] == "SET test 0"
    assert (d.kind, texts.kind) == ("classification", "retrieval") and d.prompts == ["x", "x"]
    shutil.rmtree(root / "SET/train_224")
    expected = {"default": "SET train 0", "merged": ["m", "n"], "synthetic": "s", "prompt": "x"}
    for captions, caption in expected.items():
        d = data.open_world(root, captions=captions).adaptation[0]
        assert d.train.captions[0] == caption and d.test.captions[0] == "SET test 0"
    d = data.open_world(root, captions="merged", prompts_too=True).adaptation[0]
    assert d.train.captions[0] == ["m", "n", "x"] and d.test.captions[0] == "SET test 0"


def data_case(root, kind):
    """Sources as people have them."""
    if kind in ("endings", "splits"):
        data_class_folders(root)
    if kind == "endings":
        data_pictures(root, ["extra/1.png", "train/loose.png", "train/cat/z.jfif"])
        for name in ("a.heic", "b.jpg?w=300", "c", "0.txt", "@eaDir/x.png", ".thumbnails/y.png"):
            (root / "train/cat" / name).parent.mkdir(exist_ok=True)
            (root / "train/cat" / name).write_bytes(b"")
    elif kind == "splits":
        data_pictures(root, ["train/tent/0.png", "train/Cat/1.png", "test/unknown/2.png"])
    elif kind == "linked":
        data_class_folders(root, ("",))
        (root / "also").symlink_to(root / "cat")
        (root / "cat/loop").symlink_to(root)
    elif kind == "mute":
        data_class_folders(root, ("",), ("1", "n01440764"))
    elif kind == "table":
        data_pictures(root, [f"{i}.png" for i in range(9)])
        rows = [[f"{i}.png", json.dumps([f"a {i}", "b"]), f"t {i}", "A|B" if i % 2 else "A",
                 ("train", "test", "val")[i % 3]] for i in range(8)]  # fmt: skip
        head = ["filepath", "caption", "title", "class", "split"]
        return data_table(root, [head, *rows, ["8.png", " ", "nan", "A", "train"]])
    elif kind == "metadata":
        data_pictures(root, [f"{s}/{i}.png" for s in ("train", "test") for i in range(4)])
        for s in ("train", "test"):
            lines = [json.dumps({"file_name": f"{i}.png", "text": f"{s} {i}"}) for i in range(4)]
            (root / s / "metadata.jsonl").write_text("\n".join(lines))
    elif kind == "fomo":
        data_flux(data_flux(root), "AWAY")
        (root / "AWAY").rename(root / "OTHER")
    return root


@pytest.mark.parametrize("kind, sizes, told", [
    ("endings", (13, 12), [".heic", "b.jpg?w=300", "0.txt", "@eaDir", ".thumbnails", "extra",
                           "loose.png", "A photo of a cat."]),
    ("splits", (14, 12), ["unknown", "tent", "Cat"]),
    ("linked", 12, ["also", "loop"]), ("mute", 12, ["1", "n01440764", "classnames.json"]),
    ("table", (4, 3), ["title", "A|B", "val", "8.png"]),
    ("metadata", (4, 4), ["retrieval"]),
    ("fomo", (12, 12), ["AWAY", "OTHER"]),
])  # fmt: skip
def test_every_source_accounts_for_what_it_took_and_left(tmp_path, kind, sizes, told):
    world = data.open_world(data_case(tmp_path / "photos", kind))
    [d] = world.adaptation
    account = "\n".join(world.notes)
    found = (len(d.train), len(d.test))
    assert sizes in (found, sum(found)) and str(found[0]) in account
    assert [name for name in told if name not in account] == [] and len(world.notes) <= 4
    if kind == "splits":  # a class without training is scored where the set is held out
        assert d.classes == ["Cat", "cat", "dog", "tent"]
        [d] = data.open_world(tmp_path / "photos", heldout=["photos"]).heldout
        assert d.classes == ["Cat", "cat", "dog", "tent", "unknown"] and len(d.test) == 13


def test_a_picture_is_for_testing_or_for_training_whatever_comes_later(tmp_path):
    """About a fifth of a class, one at least and never all."""
    root = data_class_folders(tmp_path / "pets", ("",), n=200)
    data_pictures(root, ["one/0.png", *[f"two/{i}.png" for i in range(2)]])
    [first] = data.open_world(root).adaptation
    assert np.bincount(first.test.labels)[2:].tolist() == [0, 1]  # of one and of two
    assert all(25 <= n <= 55 for n in np.bincount(first.test.labels)[:2])  # 40, four deviations
    data_pictures(root, [f"{c}/new-{i}.png" for c in ("cat", "emu") for i in range(60)])
    [second] = data.open_world(root).adaptation
    for old, new in ((first.train, second.train), (first.test, second.test)):
        assert {*old.paths} < {*new.paths}
    for path in root.rglob("*.png"):
        Image.new("RGB", (50, 50), "red").save(path)  # as a tool that resizes does
    assert data.open_world(root).adaptation[0].test.paths == second.test.paths


def test_numbered_folders_have_their_names_in_the_order_of_the_numbers(tmp_path):
    root = data_class_folders(tmp_path / "f", classes=[str(i) for i in range(12)], n=1)
    (root / "classnames.txt").write_text("\n".join(f"name {i}" for i in range(12)))
    [d] = data.open_world(root).adaptation
    names = {path.split("/")[1]: d.classes[k] for path, k in zip(d.train.paths, d.train.labels)}
    assert names == {str(i): f"name {i}" for i in range(12)}


def test_datasets_stay_datasets_and_tables_know_test_folders_by_any_case(tmp_path):
    for name in ("cars", "pets"):
        data_class_folders(tmp_path / "all" / name)
    data_pictures(tmp_path / "all", ["pets/preview.png"])
    sets = data.open_world(tmp_path / "all").adaptation
    assert {d.name: len(d.train) for d in sets} == {"cars": 12, "pets": 12}
    assert [len(d.test) for d in sets] == [12, 12]
    names = [f"{split}/{i}.png" for split in ("Train", "Test") for i in range(6)]
    data_pictures(tmp_path / "t", names)
    rows = [["filepath", "class"], *([name, f"c{i % 2}"] for i, name in enumerate(names))]
    data_table(tmp_path / "t", rows, "metadata.csv")
    [d] = data.open_world(tmp_path / "t").adaptation
    assert sorted(d.train.paths) == names[:6] and sorted(d.test.paths) == names[6:]


@pytest.mark.parametrize("name", ["classnames.json", "train/classnames.txt"])
def test_names_of_classes_can_lie_beside_their_folders(tmp_path, name):
    root = data_class_folders(tmp_path / "f", classes=("10", "9"))
    text = json.dumps({"10": "orchid", "9": "red_rose"})
    (root / name).write_text(text if name.endswith("json") else "red_rose\norchid\n")
    [d] = data.open_world(root).adaptation
    assert d.classes == ["orchid", "red_rose"] and d.prompts[1] == "A photo of a red rose."


def test_class_folders_split_themselves_the_same_in_any_order_of_the_disk(tmp_path):
    one = data_class_folders(tmp_path / "a/pets", ("",), n=10)
    (tmp_path / "b/pets").mkdir(parents=True)
    for path in sorted(one.rglob("*.png"), reverse=True):
        (tmp_path / "b/pets" / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "b/pets" / path.parent.name)
    sets = [data.open_world(tmp_path / x / "pets").adaptation[0] for x in "ab"]
    assert sets[0].test.paths == sets[1].test.paths
    assert sorted([*sets[0].train.paths, *sets[0].test.paths]) == [
        f"{c}/{i}.png" for c in ("cat", "dog") for i in range(10)]  # fmt: skip
    assert all(1 <= n < 10 for n in np.bincount(sets[0].test.labels))


@pytest.mark.parametrize("cell, captions", [
    ("a dog", "a dog"), ('["a dog", "one"]', ["a dog", "one"]), ("['a', \"b's\"]", ["a", "b's"]),
    ("[1] a dog", "[1] a dog"), ('["a"]', "a")])  # fmt: skip
def test_a_cell_may_hold_a_list_of_captions(tmp_path, cell, captions):
    data_pictures(tmp_path, ["0.png", "1.png"])
    rows = [["filepath", "caption", "split"], ["0.png", cell, "train"], ["1.png", "x", "test"]]
    for name in ("t.csv", "t.tsv"):
        [d] = data.open_world(data_table(tmp_path, rows, name)).adaptation
        assert d.train.captions[0] == captions and d.kind == "retrieval"


def test_shards_are_webdatasets_and_account_for_the_rest(tmp_path):
    png = [data_png(10 * k) for k in range(9)]
    data_tar(tmp_path / "00.tar", {"a.x.png": png[0], "a.x.txt": b"a", "b.png": png[1],
             "b.txt": b"one", "c.jpg.png": png[2], "d.png": png[3],
             "d.json": b'{"caption": "two"}'})  # fmt: skip
    data_tar(tmp_path / "01.tar", {"x/e.PNG": png[4], "x/e.txt": b" three ", "x/e.cls": b"1",
             "f.png": png[5], "f.json": b'{"text": "no"}', "g.png": png[6]})  # fmt: skip
    for pattern in ("{00..01}.tar", "*.tar"):
        flux = data_flux(tmp_path / "d")
        world = data.open_world(flux, pool=[str(tmp_path / pattern)], cache=tmp_path / "cache")
        assert list(world.pool.captions) == ["one", "two", "three"]
        assert [world.pool.image(i)[0, 0, 0] for i in range(3)] == [10, 30, 40]
    told = str(world.notes)
    assert all(name in told for name in ("a.x.png", "c.jpg.png", "f.png", "g.png", "text", ".cls"))
    assert [os.path.splitext(path)[0] for path in world.pool.paths] == ["b", "d", "x/e"]


def test_torchvisions_datasets_are_read_by_their_own_classes(tmp_path):
    for c in ("AnnualCrop", "River"):
        data_pictures(tmp_path / "eurosat/2750" / c, [f"{c}_{i}.jpg" for i in range(10)])
    [eurosat] = data.open_world(f"torchvision:{tmp_path}/EuroSAT").heldout
    assert eurosat.prompts[0] == "A centered satellite photo of a AnnualCrop."
    counts = np.bincount(eurosat.test.labels)  # about .3 of ten
    assert len(eurosat.train) == 20 - counts.sum() and all(1 <= n < 8 for n in counts)
    theirs = torchvision.datasets.EuroSAT(str(tmp_path))
    for i, label in enumerate(eurosat.test.labels.tolist()):
        path, target = theirs.samples[eurosat.test.where[i, 1]]
        assert target == label and eurosat.classes[label].replace(" ", "") in path
        assert np.array_equal(np.asarray(eurosat.test.image(i)), np.asarray(Image.open(path)))


def test_a_later_run_knows_what_earlier_tasks_held(tmp_path):
    root = data_class_folders(tmp_path / "pets")
    first = data.open_world(root)
    one = data.Mixture(first, data.tasks(data.concepts(first.adaptation), 2), 8, (0, 0.5, 0.5))
    held = one.held()
    data_pictures(root, [f"train/tent/{i}.png" for i in range(5)] + ["train/cat/new.png"])
    (root / "train/dog/0.png").unlink()
    world = data.open_world(root, held=held, before=first.sources)
    concepts = data.concepts(world.adaptation, held)
    assert concepts == [("pets", "cat"), ("pets", "tent")]
    two = data.Mixture(world, [concepts], 8, (0, 0.5, 0.5), held=held)
    assert two.ends == [0, 6, 11, 17] and two.gone == {"pets": 1}
    other = data.open_world(data_class_folders(tmp_path / "tools"), held=held, before=[str(root)])
    assert {d.name for d in other.adaptation} == {"pets", "tools"}
    assert two.held()["ends"] == [0, 6, 12, 18]


def data_bad_rows(*rows):
    return lambda p: data_table(p / "f", rows, "t.csv")


@pytest.mark.parametrize("make, where, name", [
    (lambda p: p, "no", "no"),
    (lambda p: (p / "x.zip").write_bytes(b""), "x.zip", "x.zip"),
    (lambda p: (p / "f").mkdir(), "f", "00_info"),
    (lambda p: data_pictures(p, ["f/train/1.png", "f/car/2.png"]), "f", "train"),
    (lambda p: data_class_folders(p / "f", classes=("a",)), "f", "'a'"),
    (lambda p: (data_class_folders(p / "f") / "classnames.json").write_text('{"u": ""}'), "f", "u"),
    (lambda p: (data_class_folders(p / "f") / "classnames.txt").write_text("one"), "f", ".txt"),
    (lambda p: [data_class_folders(p / f) for f in ("f", "g/f")], "f g/f", "f"),
    (lambda p: (data_flux(p / "f") / "SET/train/3.png").unlink(), "f", "train/3.png"),
    (lambda p: data_flux(p / "f", target=5), "f", "SET_train.json"),
    (lambda p: (data_flux(p / "f") / "00_info/SET_test.json").write_text("{"), "f", "SET_test"),
    (lambda p: data_flux(p / "f", default_caption=None, primer_caption=" "), "f", "SET_train"),
    (data_bad_rows(["path", "caption"], ["a", "b"]), "f/t.csv", "path"),
    (data_bad_rows(["filepath", "caption"], ["a.png", "b"]), "f/t.csv", "a.png"),
    (data_bad_rows(["filepath", "caption"], ["a.png", "b", "c"]), "f/t.csv", "a.png"),
    (data_bad_rows(["filepath", "caption", "split"], ["a.png", "b", "dev"]), "f/t.csv", "dev"),
    (data_bad_rows(["filepath", "class", "split"], ["a.png", "b", "train"], ["a.png", "b", "test"]),
     "f/t.csv", "a.png"),
    (lambda p: (p / "t.jsonl").write_text('{"filepath": "a.png", "class": "b", "caption": "c"}\n'
                                          '{"filepath": "d.png", "caption": "c"}'),
     "t.jsonl", "d.png"),
    (lambda p: p, "torchvision:Nonesuch", "Nonesuch"),
])  # fmt: skip
def test_a_source_that_cannot_be_used_is_named(tmp_path, make, where, name):
    make(tmp_path)
    places = [w if ":" in w else tmp_path / w for w in where.split()]
    with pytest.raises((ValueError, OSError)) as error:
        data.open_world(places)
    assert name in str(error.value).replace(str(tmp_path), "")


@pytest.mark.parametrize("call, name", [
    (lambda p: data.open_world(p / "f", heldout=["g"]), "g"),
    (lambda p: data.open_world(p / "f", template="a"), "'a'"),
    (lambda p: data.open_world(p / "f", pool=["z{0..3}.tar"]), "z0"),
    (lambda p: data.open_world(p / "f", pool=[f"{p}/*.tar"]), "a.png"),
    (lambda p: data.tar_members(p / "f/train/cat/0.png"), "0.png"),
    (lambda p: data.read_stream(p / "s.json"), "s.json"),
    (lambda p: data.times([("MINE", "x")]), "MINE"),
    (lambda p: data.order(DATA_CONCEPTS, "time"), "time"),
    (lambda p: data.Mixture(data.toy(0, 9, 9), [[("LETTERS", "?")]], 8), "LETTERS"),
    (lambda p: data.Mixture(data.World([], []), [[]], 8), "--pool"),
])  # fmt: skip
def test_what_is_asked_of_data_in_vain_is_named(tmp_path, call, name):
    data_class_folders(tmp_path / "f")
    data_tar(tmp_path / "s.tar", {"a.png": data_png()})
    (tmp_path / "s.json").write_text('["a"]')
    with pytest.raises((ValueError, OSError)) as error:
        call(tmp_path)
    assert name in str(error.value).replace(str(tmp_path), "")


# --------------------------------------------------------------------------------------- merge.py

MERGE_AB = [[1, -2, 0.1, 3, 0, -0.5], [2, 1, -0.2, -1, 0.4, -0.6]]
MERGE_CELLS = list(itertools.product(merge.SOURCES, merge.SOURCES[1:]))


def merge_one(technique, base, experts, weights=None, **options):
    return merge.merge(technique, {"w": base}, [{"w": e} for e in experts], weights, **options)["w"]


def merge_close(x, y, tolerance=1e-6):
    y = torch.as_tensor(y, dtype=torch.float64)
    torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


def merge_random(k=3, n=400, dtype=torch.float64, seed=0):
    """A base [n], and k experts [k, n] whose task vectors point away from each other."""
    g = torch.Generator().manual_seed(seed)
    tau = torch.randn(k, n, generator=g, dtype=torch.float64)
    base = torch.randn(n, generator=g, dtype=torch.float64)
    return base.to(dtype), (base + tau - 0.3 * tau.mean(0)).to(dtype)


def merge_definition(technique, base, experts, weights=None, **options):
    """What the indented lines of the technique's docstring say, on all experts at once."""
    k, n = experts.shape
    each = weights or [1 / k if technique in merge.AVERAGES else 1.0] * k
    names = merge.OPTIONS[technique] | options
    names |= {"torch": torch, "base": base, "experts": experts, "tau": experts - base, "k": k,
              "n": n, "weights": torch.tensor(each, dtype=torch.float64)[:, None],
              "generator": merge._generator(names.get("seed"), "w")}
    lines = merge.TECHNIQUES[technique].__doc__.split("\n")
    exec("\n".join(x[8:] for x in lines if x.startswith(" " * 8)), names)  # noqa: S102 - our own
    return names["theta"] if technique in merge.MEMBERS else base + names["scale"] * names["tau"]


MERGE_BY_HAND = [  # experts, or task vectors over a base of zeros; options; what comes out
    ("slerp", [[1, 0], [0, 2]], {}, [0.5**0.5, 2**0.5]),
    ("slerp", [[0, 0], [2, 4]], {}, [1, 2]),  # no angle to zero: linear
    ("slerp", [[1, 0], [0, 1], [-1, 0]], {}, [0, 1]),  # folded: to 45 degrees, then a third of 135
    ("task-arithmetic", MERGE_AB, {"weights": [2, -1], "scale": 0.5}, [0, -2.5, .2, 3.5, -.2, -.2]),
    ("ties", MERGE_AB, {"density": 0.5}, [1.5, -2, 0, 3, 0, 0]),  # A keeps 1 -2 3, B 2 1 -1
    ("ties", MERGE_AB, {"density": 0.6}, [1.5, -2, 0, 3, 0, -0.55]),  # 3.6, rounded; official: .5
    ("ties", MERGE_AB, {"density": 0.5, "weights": [1, 3], "scale": 2}, [7, 6, 0, 6, 0, 0]),
    ("ties", MERGE_AB, {"density": 0.01}, [2, 0, 0, 3, 0, 0]),  # at least one
    ("ties", [[1, -2], [-1, 2]], {"density": 1}, [1, 2]),  # a sum of zero elects plus
    ("dare", MERGE_AB, {"drop": 0, "elect": True}, [1.5, -2, -0.2, 3, 0.4, -0.55]),
    ("breadcrumbs", MERGE_AB[:1], {"top": 1 / 6, "bottom": 1 / 3}, [1, -2, 0, 0, 0, -0.5]),
    ("breadcrumbs", [[1, 2, 3, 4]], {"top": 0, "bottom": 0.9}, [0, 0, 0, 4]),  # at least one
    ("breadcrumbs", MERGE_AB, {"top": 0, "bottom": 0.5, "elect": True}, [1.5, -2, 0, 3, 0, 0]),
    ("magmax", MERGE_AB, {}, [2, -2, -0.2, 3, 0.4, -0.6]),
    ("magmax", [[1, -2], [-1, 2]], {}, [-1, 2]),  # of equals the later
    ("model-stock", [[1, 0], [1, 1]], {}, [0.82842712, 0.41421356]),
    ("model-stock", [[1, 0], [-1, 1]], {}, [0, 0]),  # a negative cosine counts as 0
    ("model-stock", [[1, 0], [0, 0], [1, 0]], {}, [0.4, 0]),  # c = 1/3: a zero is orthogonal
    ("tall-mask", MERGE_AB, {}, [3, -1, -0.1, 0, 0, -1.1]),
    ("tall-mask", MERGE_AB, {"strictness": 0.2, "weights": [0.5, 1]}, [2.5, 0, -.15, .5, 0, -.85]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("technique, experts, options, expected", MERGE_BY_HAND)
def test_merge_by_hand(technique, experts, options, expected, dtype):
    experts = torch.tensor(experts, dtype=dtype)
    merge_close(merge_one(technique, 0 * experts[0], experts, **options), expected)
    if "whole" in merge.OPTIONS[technique]:  # the same cut, over two tensors of the same entries
        base, *parts = [{"a": x[:2], "b": x[2:]} for x in (0 * experts[0], *experts)]
        merged = merge.merge(technique, base, parts, whole=True, **options)
        merge_close(torch.cat([merged["a"], merged["b"]]), expected)


@pytest.mark.parametrize("technique", merge.TECHNIQUES)
def test_merge_computes_what_its_docstring_defines(technique):
    for k, dtype, tolerance in ((2, torch.float64, 1e-12), (4, torch.float32, 1e-5)):
        k = 2 if technique == "slerp" else k
        base, experts = merge_random(k, dtype=dtype)
        weights = [(i + 1) / (k * (k + 1) / 2) for i in range(k)]
        for w in (None,) if technique in merge.UNWEIGHTED else (None, weights):
            merged = merge_one(technique, base, experts, w)
            assert merged.dtype == dtype
            expected = merge_definition(technique, base.double(), experts.double(), w)
            merge_close(merged, expected, tolerance)


@pytest.mark.filterwarnings("ignore:The density 1 is greater:UserWarning")
@pytest.mark.parametrize("density", [0.1, 0.5, 1])
def test_merge_ties_agrees_with_peft(density):
    """Unweighted: peft elects before it weights, we and mergekit after."""
    ties = pytest.importorskip("peft.utils.merge_utils").ties
    base, experts = merge_random()
    theirs = base + ties(list(experts - base), torch.ones(3), density)
    merge_close(merge_one("ties", base, experts, density=density), theirs)


def test_merge_masks_drop_and_choose_with_their_probabilities():
    n = 100_000
    zero, ones = torch.zeros(n), torch.ones(n)
    merged = merge_one("dare", zero, [ones, 10 * ones], drop=0.75)  # 4 and 40 with a quarter each
    chosen = merge_one("random", zero, [i * ones for i in (1, 2, 3, 4)], [0.5, 0.0, 0.2, 0.3])
    timeline = merge.Timeline({"w": zero}, technique="random", weight=0.5)
    elected = merge.Timeline({"w": zero}, "zero-shot", "all", "dare", elect=True)
    for line, i in itertools.product((timeline, elected), (1, 2)):
        line.add({"w": i * ones})  # the same draw would leave theta_1 nothing, or its half whole
    assert elected.deploy()["w"].mean() == pytest.approx(1.5, abs=0.08)  # the mean stays
    shares = [(merged, {0: 9, 4: 3, 40: 3, 44: 1}, 16), (chosen, {1: 5, 3: 2, 4: 3}, 10),
              (timeline.deploy()["w"], {0: 1, 1: 1, 2: 2}, 4)]
    for found, counts, whole in shares:
        assert set(found.tolist()) == {*counts}
        for value, count in counts.items():  # five standard errors
            p = count / whole
            assert abs((found == value).float().mean() - p) < 5 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("technique", ["dare", "random"])
def test_merge_masks_depend_on_seed_and_name_alone(technique):
    experts = merge_random(dtype=torch.float32)[1]
    zero = torch.zeros(400)
    merged = merge_one(technique, zero, experts)
    more = [{n: x for n in "cbw"} for x in (zero, *experts)]
    more = merge.merge(technique, more[0], more[1:])
    assert torch.equal(merged, more["w"]) and not torch.equal(merged, more["b"])
    assert not torch.equal(merged, merge_one(technique, zero, experts, seed=1))
    merge_close(merged, merge_one(technique, zero.double(), experts))  # whatever the dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["gauss", "grid", "tiny and huge", "zeros"])
def test_merge_ties_and_breadcrumbs_keep_the_stable_top_k(kind, dtype):
    """Of each tensor, and of two together: of equal entries the larger tensor's, then the first."""
    tau = torch.randn(5000, dtype=torch.float64)
    tau = {"gauss": tau, "grid": tau.round(), "zeros": 0 * tau,
           "tiny and huge": tau * 10.0 ** torch.randint(-44, 38, (5000,))}[kind].to(dtype)
    order = torch.sort(tau.abs(), descending=True, stable=True).indices
    base = {"small": 0 * tau[:1000].reshape(40, 25), "large": 0 * tau[1000:]}
    expert = {"small": tau[4000:].reshape(40, 25), "large": tau[:4000]}
    for k, few in ((1, 0), (2, 1), (999, 0), (1000, 500), (4999, 4000), (5000, 0)):
        kept = torch.zeros_like(tau).index_copy(0, order[few:k], tau[order[few:k]])
        technique = "breadcrumbs" if few else "ties"
        shares = {"top": few / 5000, "bottom": 1 - k / 5000} if few else {"density": k / 5000}
        assert torch.equal(merge_one(technique, 0 * tau, [tau], **shares), kept)
        whole = merge.merge(technique, base, [expert], whole=True, **shares)
        assert torch.equal(torch.cat([whole["large"], whole["small"].flatten()]), kept)
    base = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(2)}  # mixed precision
    expert = {"a": base["a"] + 1 + 1e-12 * torch.arange(2), "b": base["b"] + 1}
    merged = merge.merge("ties", base, [expert], density=1 / 4, whole=True)
    assert merged["a"].tolist() == [0, 1 + 1e-12] and not merged["b"].any()


@pytest.mark.parametrize("technique", ["slerp", "model-stock"])
def test_merge_measures_angles_of_a_token_embedding(technique):
    """A float32 sum over 25 million squares is wrong by .3 %: a cosine above 1."""
    one, two = torch.randn(2, 49408 * 512, generator=torch.Generator().manual_seed(0))
    two = one + 0.1 * two
    dots = [sum(float((x * y).double().sum()) for x, y in zip(a.split(2**16), b.split(2**16)))
            for a, b in ((one, two), (one, one), (two, two))]
    cosine = dots[0] / math.sqrt(dots[1] * dots[2])  # .995
    factor = 2 * cosine / (1 + cosine)
    if technique == "slerp":
        factor = 1 / math.cos(math.acos(cosine) / 2)
    merged = merge_one(technique, 0 * one, [one, two])
    merge_close(merged[:999], factor * (one + two)[:999].double() / 2, 1e-5)


@pytest.mark.parametrize("technique", merge.TECHNIQUES)
def test_merge_keeps_dtypes_and_shapes_and_leaves_its_inputs_alone(technique):
    g = torch.Generator().manual_seed(0)
    models = [{"w": torch.randn(5, 8, generator=g).T, "scale": torch.randn((), generator=g),
               "ids": torch.arange(6) + i, "half": torch.randn(9, generator=g).bfloat16(),
               "empty": torch.zeros(0, 3)} for i in range(4)]
    before = copy.deepcopy(models)
    merged = merge.merge(technique, models[0], models[1:])
    assert list(merged) == list(models[0]) and torch.equal(merged["ids"], torch.arange(6))
    for name, tensor in merged.items():
        assert (tensor.dtype, tensor.shape) == (models[0][name].dtype, models[0][name].shape)
        tensor.fill_(7)
    for model, old in zip(models, before):
        assert all(torch.equal(model[n], old[n]) for n in old)


@pytest.mark.parametrize("technique", merge.TECHNIQUES)
def test_merge_moves_a_scalar_by_the_weighted_mean_of_the_changes(technique):
    models = [{"logit_scale": torch.tensor(x), "bias": torch.tensor([x])} for x in (1.0, 4.0, 6.0)]
    added = technique == "task-arithmetic"
    cases = [(None, 1 + 3 + 5 if added else 5)]
    if technique not in merge.UNWEIGHTED:
        cases.append(([0.25, 0.75], 5.5))
    if technique not in (*merge.AVERAGES, *merge.UNWEIGHTED):
        cases += [([0.0, 0.0], 1), ([-1.0, -1.0], 1 - 3 - 5 if added else 1 - (3 + 5) / 2)]
    for weights, expected in cases:
        merged = merge.merge(technique, models[0], models[1:], weights)
        assert merged["logit_scale"].item() == merged["bias"].item() == pytest.approx(expected)
    if technique not in merge.MEMBERS:
        assert merge.merge(technique, models[0], models[1:], scale=0.0)["logit_scale"] == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("technique", merge.TECHNIQUES)
def test_merge_refuses_by_name_what_is_not_finite(technique, value):
    class File(dict):
        path = "some/expert.safetensors"
    for name, place in itertools.product(("w", "logit_scale"), (0, 2)):
        models = [File(w=torch.arange(8.0), logit_scale=torch.tensor(4.0)) for _ in range(3)]
        models[place][name].view(-1)[-1] = value
        who = "expert 1, some/expert.safetensors" if place else "the base"
        with pytest.raises(ValueError, match=f"tensor {name} .* not finite in {who}$"):
            merge.merge(technique, models[0], models[1:])


def test_merge_and_timeline_of_large_and_of_16_bit_numbers():
    big = {"w": torch.full((9,), 3e38)}  # finite although their sum is not
    assert torch.equal(merge.merge("linear", big, [big])["w"], big["w"])
    half = torch.zeros(4, dtype=torch.float16)
    with pytest.raises(ValueError, match="tensor w .* not finite in the result"):
        merge_one("task-arithmetic", half, [half + 6e4, half + 6e4])
    small = torch.full((3,), 1 + 2**-7, dtype=torch.bfloat16)  # summed in 16 bits 2^-7 were lost
    assert torch.equal(merge_one("linear", 0 * small, [small] * 20), small)
    for technique in ("linear", "slerp", "ties"):  # a hundred steps of 2^-10 / 10 each, likewise
        timeline = merge.Timeline({"w": 0 * small + 1}, "zero-shot", "ema", technique)
        for _ in range(100):
            timeline.add({"w": small + 2**-7})
        assert timeline.deploy()["w"][0] == 1 + 2**-6


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
def test_merge_takes_little_more_memory_than_its_result():
    """Three experts of 38 MB; above the interpreter, each technique in a process of its own."""
    program = """if True:
        import merge, os, torch
        def kib(field):
            return next(int(x.split()[1]) for x in open("/proc/self/status") if field in x)
        shapes = {"tokens": (8000, 192)} | {str(i): (1000, 400) for i in range(20)}
        models = [{n: torch.randn(s) for n, s in shapes.items()} for _ in range(4)]
        merge.merge("ties", models[0], models[1:2], whole=True)  # libraries load on first use
        for name, *more in [*zip(merge.TECHNIQUES), ("ties", "whole"), ("dare", "elect")]:
            if os.fork() == 0:
                before = kib("VmRSS")
                merged = merge.merge(name, models[0], models[1:], **dict.fromkeys(more, True))
                print((kib("VmHWM") - before) / 37250, flush=True)
                os._exit(0)
            os.wait()"""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    output = subprocess.check_output([sys.executable, "-c", program], text=True, env=env,
                                     cwd=os.path.dirname(merge.__file__))
    linear, *others = map(float, output.split())
    assert len(others) == 11 and 0.9 < min(linear, *others)  # the result alone is 1
    assert linear < 1.4 and max(others) < 2.8, (linear, others)  # 10 MB are not the tensors'


def test_merge_lines_scale_each_towers_blocks_by_their_depth():
    names = [*(f"visual.transformer.resblocks.{i}.mlp.c_fc.weight" for i in range(3)),
             *(f"transformer.resblocks.{i}.ln_1.bias" for i in range(5)), "one.0.w", "conv1.weight",
             "0.w", "1.w"]
    scales = list(merge.layer_scales(names, 0.5, 0.5).values())
    assert scales == [0.5, 0.75, 1, 0.5, 0.625, 0.75, 0.875, 1, 0.5, 0.5, 0.5, 1]
    assert list(merge.layer_scales(names[:3], 1, 2).values()) == [1, 2, 3]
    base, *experts = [dict(zip(names, x.split(10))) for x in torch.randn(3, 30).double()]
    for technique in set(merge.TECHNIQUES) - set(merge.MEMBERS):
        plain = merge.merge(technique, base, experts)
        scaled = merge.merge(technique, base, experts, lines=(0.5, 0.5), scale=2.0)
        for name, factor in zip(base, (1.0, 1.5, 2.0)):
            merge_close(scaled[name], base[name] + factor * (plain[name] - base[name]), 1e-12)


MERGE_W = {"w": torch.zeros(3)}


@pytest.mark.parametrize("name, call", [
    *[(name, partial(merge.merge, technique, MERGE_W, [MERGE_W], **{name: value}))
      for technique, name, value in [
          ("ties", "density", 0), ("ties", "density", 1.5), ("ties", "density", "some"),
          ("ties", "whole", "false"), ("ties", "scale", math.inf), ("ties", "lines", (1, math.nan)),
          ("tall-mask", "strictness", -1), ("tall-mask", "agree", 1.5), ("dare", "drop", 1),
          ("dare", "whole", True), ("linear", "density", 0.5), ("breadcrumbs", "top", 0.2)]],
    *[(name, partial(merge.merge, technique, MERGE_W, experts, *weights))
      for name, technique, experts, *weights in [
          ("tise", "tise", [MERGE_W]), ("ties", "ties", []), ("w .*base", "linear", [{}]),
          ("experts", "linear", MERGE_W), ("w .*64", "linear", [{"w": torch.arange(3)}]),
          ("model-stock", "model-stock", [MERGE_W]), ("magmax", "magmax", [MERGE_W], [1]),
          ("b .*expert 1", "linear", [MERGE_W, MERGE_W | {"b": torch.zeros(3)}]),
          (r"w .*\[2\] .*expert 0", "linear", [{"w": torch.zeros(2)}]),
          ("weights .*1.1", "linear", [MERGE_W] * 2, [0.5, 0.6]),
          ("weights .*1 .*2", "ties", [MERGE_W] * 2, [1]),
          ("weights .*nan", "random", [MERGE_W], [math.nan]),
          ("slerp", "slerp", [MERGE_W] * 2, [1.5, -0.5])]],
    *[(name, partial(merge.Timeline, MERGE_W, **{name: value}))
      for name, value in [
          ("init", "zero"), ("deploy", "zero-shot"), ("weight", 1.1), ("reverse", "false"),
          ("anchored", 2), ("include_base", "no"), ("expert_weights", "square"), ("density", 0.5)]],
    ("magmax", partial(merge.Timeline, MERGE_W, technique="magmax", expert_weights="sqrt")),
    *[(name, partial(merge.Timeline(MERGE_W).add, theta))
      for name, theta in [("w .*base", {}), (r"w .*\[4\]", {"w": torch.zeros(4)}),
                          ("w .*new expert", {"w": torch.zeros(3) / 0})]],
    *[(name, partial(merge.Timeline(MERGE_W, "all", "all").load_state, {"task": 2, "keeps": keeps,
                     "running": {}, "latest": {}, "experts": []}))
      for name, keeps in [("ema", ["ema"])]],
    (r"i .*\[1\]", partial(merge.merge, "ties", {"i": torch.arange(3)}, [{"i": torch.arange(1)}]))])
def test_merge_names_what_is_wrong(name, call):
    with pytest.raises(ValueError, match=name):
        call()


def merge_files(folder):
    """A Timeline's write and read: an expert, a file."""
    folder.mkdir(exist_ok=True)
    return {
        "write": lambda i, weights: clip.write_tensors(weights, folder / f"{i}.safetensors"),
        "read": lambda i: clip.read_tensors(folder / f"{i}.safetensors"),
    }


def merge_walk(steps, base=0.0, **options):
    """Each task adds its step to what it starts from -> values deployed after each."""
    theta_0 = torch.full((2,), base, dtype=torch.float64)
    timeline = merge.Timeline({"w": theta_0}, **options)
    theta_0.fill_(99)
    assert timeline.deploy()["w"][0] == base
    deployed = []
    for step in steps:
        timeline.add({"w": timeline.start()["w"] + step})
        deployed.append(float(timeline.deploy()["w"][0]))
    return deployed


@pytest.mark.parametrize("expected, base, steps, options", [
    ([1, 3, 7], 0, [1, 2, 4], merge.TIMELINES["finetune"]),
    ([0.1, 0.29, 0.661], 0, [1, 2, 4], merge.TIMELINES["zs-merge"]),  # published
    ([1, 1.5, 7 / 3], 0, [1, 2, 4], merge.TIMELINES["offline-merge"]),
    ([0.1, 0.3, 0.7], 0, [1, 2, 4], merge.TIMELINES["ema-merge"]),  # .9 m + .1 (m + step)
    ([11, 11.25], 10, [4, 4], {**merge.TIMELINES["ft-merge"], "weight": 0.75}),
    ([11, 12], 10, [4, 4], {**merge.TIMELINES["wise-ft"], "weight": 0.75}),  # theta_t: 14, 18
    *[(expected, 6, [6, 12], merge.TIMELINES["offline-merge"] | {"expert_weights": "linear"} | more)
      for expected, more in [([12, 16], {}), ([12, 14], {"reverse": True}),  # of 12 and 18
                             ([10, 14], {"include_base": True})]],
    # starts: zero-shot 0 0 0, latest 0 8 24, ema 0 4 12, all 0 8 16
    *[(expected, 0, [8, 16, 32], {"init": init, "deploy": deploy, "weight": 0.5})
      for (init, deploy), expected in zip(MERGE_CELLS, [
          [8, 16, 32], [4, 10, 21], [8, 12, 56 / 3], [8, 24, 56], [4, 14, 35], [8, 16, 88 / 3],
          [8, 20, 44], [4, 12, 28], [8, 14, 24], [8, 24, 48], [4, 14, 31], [8, 16, 80 / 3]])]])
def test_timeline_by_hand(expected, base, steps, options):
    assert merge_walk(steps, float(base), **options) == pytest.approx(expected)


@pytest.mark.parametrize("how, raw", [
    ("uniform", [1, 1, 1]), ("linear", [1, 2, 3]), ("sqrt", [1, 2**0.5, 3**0.5]),
    ("quadratic", [1, 4, 9]), ("cubic", [1, 8, 27]), ("fifth", [1, 32, 243]),
    ("tenth", [1, 1024, 59049]), ("exponential", [2, 4, 8]), ("logarithmic", [1, 1.5849625, 2])])
def test_timeline_weights_of_experts_grow(how, raw):
    expected = [x / sum(raw) for x in raw]
    assert merge.expert_weights(3, how) == pytest.approx(expected)
    assert merge.expert_weights(3, how, reverse=True) == pytest.approx(expected[::-1])


@pytest.mark.parametrize("technique, options", [
    ("task-arithmetic", {}), ("task-arithmetic", {"scale": 2.0}), ("dare", {"drop": 0}),
    ("dare", {"drop": 0, "elect": True}), ("breadcrumbs", {"top": 0, "bottom": 0, "scale": 0.5}),
    ("breadcrumbs", {"top": 0, "bottom": 0, "elect": True}), ("ties", {"density": 1}),
    ("tall-mask", {"agree": 1, "scale": 0.5})])
def test_timeline_weighs_task_vectors_as_linear_weighs_experts(technique, options):
    """Where nothing is masked and signs agree; scale multiplies the change that linear makes."""
    cells = [{"deploy": "all"}, {"deploy": "all", "expert_weights": "linear"}]
    if technique in merge.RUNNING_AVERAGES:
        cells += [{"deploy": "ema", "weight": 0.7}, {"deploy": "ema", "anchored": True}]
    elif technique != "ties":
        cells.append({"deploy": "all", "include_base": True})  # its tau has no sign to elect
    for cell in cells:
        means = merge_walk([6, 12, 3], 6.0, init="zero-shot", **cell)
        walk = merge_walk([6, 12, 3], 6.0, init="zero-shot", technique=technique, **cell, **options)
        assert walk == pytest.approx([6 + options.get("scale", 1) * (x - 6) for x in means])


@pytest.mark.parametrize("technique", set(merge.TECHNIQUES) - {"linear", "random", "dare"})
def test_timeline_of_another_technique_chains_it(technique):
    base, thetas = merge_random()
    timeline = merge.Timeline({"w": base}, "zero-shot", "ema", technique, weight=0.7)
    running = base
    for t, theta in enumerate(thetas):
        timeline.add({"w": theta})
        if technique == "slerp":
            running = merge_one(technique, base, [running, theta], [0.7, 0.3])
        elif technique in merge.RUNNING_AVERAGES:
            running = 0.7 * running + 0.3 * merge_one(technique, base, [theta])
        elif t == 0:
            running = theta if technique == "model-stock" else merge_one(technique, base, [theta])
        else:
            half = {"scale": 0.5} if technique == "tall-mask" else {}
            running = merge_one(technique, base, [running, theta], **half)
        merge_close(timeline.deploy()["w"], running, 1e-12)


@pytest.mark.parametrize("technique", merge.TECHNIQUES)
@pytest.mark.parametrize("init, deploy", MERGE_CELLS)
def test_timeline_goes_on_from_its_state_and_shares_no_tensor(init, deploy, technique, tmp_path):
    """Five tasks; and two and three, which write at once over all that goes in and comes out."""
    shapes = {"w": (50,), "v": (4, 10), "s": ()}
    base, *noise = [{n: 1 + torch.randn(s) for n, s in shapes.items()} for _ in range(5)]
    in_files = technique in ("linear", "ties", "random")
    base |= {"w": base["w"].bfloat16(), "ids": torch.arange(3)}

    def timeline(name):
        files = merge_files(tmp_path / name) if in_files else {}
        return merge.Timeline(base, init, deploy, technique, **files)

    whole, cut = timeline("whole"), timeline("cut")
    for task, change in enumerate(noise):
        for line in (whole, cut):
            theta = {n: (t + change.get(n, 0)).to(t.dtype) for n, t in line.start().items()}
            line.add(theta)
            if line is cut:
                state = line.state()
                kept = state["running"], state["latest"], *state["experts"]
                for tensors in (theta, line.start(), line.deploy(), *kept):
                    for tensor in tensors.values():
                        tensor.fill_(99)
        if task == 1:
            torch.save(cut.state(), tmp_path / "state.pt")
            cut.add(theta)  # killed before the next state was saved
            cut = timeline("cut")
            cut.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    for a, b in ((whole.start(), cut.start()), (whole.deploy(), cut.deploy())):
        assert all(torch.equal(a[n], b[n]) and a[n].dtype == base[n].dtype for n in base)
    assert not torch.equal(whole.deploy()["v"], base["v"])


@pytest.mark.parametrize("technique", ["linear", "slerp", "ties", "dare", "magmax", "tall-mask"])
@pytest.mark.parametrize("init, deploy", MERGE_CELLS)
def test_timeline_uses_the_options_that_change_it(init, deploy, technique):
    base, thetas = merge_random()
    values = {"weight": 0.5, "expert_weights": "linear", "reverse": True, "include_base": True,
              "anchored": True, "density": 0.7, "elect": True, "strictness": 2.0, "scale": 0.5}
    used = merge.timeline_used(init, deploy, technique)

    def end(**options):
        if technique in merge.UNWEIGHTED:
            options.pop("expert_weights", None)
        timeline = merge.Timeline({"w": base}, init, deploy, technique, **options)
        for theta in thetas:
            timeline.add({"w": timeline.start()["w"] + theta})
        return torch.cat([timeline.start()["w"], timeline.deploy()["w"]])

    of_others = set().union(*merge.OPTIONS.values()) - set(merge.OPTIONS[technique])
    assert not of_others & set(used)
    for name in values.keys() - of_others:
        if name != "include_base" or technique in merge.MEMBERS:  # a tau of zeros moves no sum
            growth = {"expert_weights": "linear"} if name == "reverse" else {}
            changed = not torch.equal(end(**{**growth, name: values[name]}), end(**growth))
            assert changed == (name in used), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("technique", merge.TECHNIQUES)
def test_timeline_on_a_gpu_is_that_on_the_cpu(technique):
    base, thetas = merge_random(dtype=torch.float32)
    lines = [merge.Timeline({"w": base.to(d)}, "all", "ema", technique) for d in ("cpu", "cuda")]
    for theta, line in itertools.product(thetas, lines):
        line.add({"w": theta.to(line.base["w"].device)})
    for cpu, gpu in ([x.start()["w"] for x in lines], [x.deploy()["w"] for x in lines]):
        assert gpu.is_cuda
        merge_close(cpu, gpu.cpu(), 1e-5)


# ------------------------------------------------------------------------------------- methods.py

METHODS_ADAPTERS = ("lora", "dora", "vera")


def methods_model(seed=0):
    torch.manual_seed(seed)
    return clip.CLIP(clip.CONFIGS["tiny"])


def methods_batch(seed):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 256, (8, 12), generator=g)
    tokens[:, -1] = 257
    return torch.randn(8, 3, 32, 32, generator=g), tokens


def methods_loss(model, batch):
    return clip.contrastive_loss(*model(*batch))


def methods_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def methods_mse(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def methods_regression(seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(8, 4, generator=g).double(), torch.randn(8, 3, generator=g).double()


def methods_ready(name, model, **options):
    method = methods.METHODS[name](**options)
    method.prepare(model)
    return method


def methods_train(method, model, task, batches, loss=methods_loss, lr=1e-3):
    """A task as fomo.py takes it, and a look back on its batches; -> each step's gradients."""
    optimizer = method.optimizer(model, lr=lr)
    method.before_task(model, task)
    gradients = []
    for batch in batches:
        (loss(model, batch) + method.penalty(model)).backward()
        torch.nn.utils.clip_grad_norm_(method.trained.values(), 1.0)
        method.after_backward(model, lr)
        gradients.append([p.grad.clone() for p in method.trained.values()])
        optimizer.step()
        optimizer.zero_grad()
    method.after_task(model, [(b, 8) for b in batches], lambda m, b: loss(m, b).backward())
    return gradients


def methods_distance(a, b):
    return math.sqrt(sum((a[k].double() - b[k].double()).square().sum().item() for k in a))


def methods_expected(name, model):
    """Which parameters a method changes, by module type and not by the name patterns under test."""
    names = {n for n, _ in model.named_parameters()}
    norms = [m for m, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    image = {n for n in names if n.split(".")[0] == "visual"}
    adapted = {n for n in names if n.endswith(("attn.in_proj_weight", "mlp.c_proj.weight"))}
    return {
        "locked-text": image, "locked-image": names - image,
        "lnfit": {f"{m}.{leaf}" for m in norms for leaf in ("weight", "bias")},
        "bitfit": {n for n in names if n.split(".")[-1] in ("bias", "in_proj_bias")},
        **dict.fromkeys(METHODS_ADAPTERS, adapted),
    }.get(name, names)  # fmt: skip


@pytest.mark.parametrize("name", methods.METHODS)
def test_methods_change_exactly_the_intended_parameters_and_keep_what_they_learnt(name):
    """The authors' EWC and SI restart every task from the first weights."""
    model = methods_model()
    first = methods_batch(1)
    expected = methods_expected(name, model)
    start = copy.deepcopy(model.state_dict())
    features = model(*first)
    loss = methods_loss(model, first).item()
    method = methods_ready(name, model)
    assert methods_distance(start, method.plain(model)) == 0
    assert all(torch.equal(a, b) for a, b in zip(features, model(*first)))
    assert method.penalty(model) == 0
    fresh = {n: p.detach().clone() for n, p in method.trained.items()}
    groups = method.optimizer(model, weight_decay=0.3).param_groups
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in method.trained.values()}
    for g in groups:
        assert all(g["weight_decay"] == (0.3 if p.ndim >= 2 else 0) for p in g["params"])
        assert g["betas"] == (0.9, 0.999) and g["eps"] == 1e-8 and g["lr"] == 1e-5
    methods_train(method, model, 0, [first] * 12, lr=3e-3)
    taught = method.plain(model)
    assert list(taught) == list(start)
    assert {n for n in start if not torch.equal(start[n], taught[n])} == expected
    # measured: lower by 0.13 (vera) to 2.34 (galore)
    assert methods_loss(model, first).item() < loss - 0.05
    with torch.autocast("cpu", torch.bfloat16):
        assert methods_distance(taught, method.plain(model)) == 0
    merged = methods_model(1)
    merged.load_state_dict(taught)
    for a, b in zip(model(*first), merged(*first)):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)
    methods_train(method, model, 1, [methods_batch(2)] * 2, lr=0.0)
    assert methods_distance(taught, method.plain(model)) == 0
    methods_train(method, model, 2, [methods_batch(2)], lr=1e-6)
    after = method.plain(model)
    assert 0 < methods_distance(after, taught) < 0.05 * methods_distance(taught, start)
    again = methods_model(2)
    other = methods_ready(name, again, **({"seed": 9} if name in METHODS_ADAPTERS else {}))
    again.load_state_dict(model.state_dict())
    other.load_state(method.state())
    assert methods_distance(after, other.plain(again)) == 0
    for key, tensors in method.state().items():
        copies = other.state()[key]
        assert tensors and methods_distance(tensors, copies) == 0
        assert all(t.data_ptr() != copies[n].data_ptr() for n, t in tensors.items())
    method.load(model, start)  # adapters start afresh
    assert methods_distance(start, method.plain(model)) == 0
    assert methods_distance(fresh, method.trained) == 0
    methods_train(method, model, 3, [first])
    assert methods_distance(start, methods_model().state_dict()) == 0  # not aliased


@pytest.mark.parametrize("name", methods.METHODS)
def test_methods_options_are_a_table_of_defaults_and_reach_the_method(name):
    options = methods.OPTIONS[name]
    other = {option: value + 1 for option, value in options.items()}
    for given in (other, {}):
        method = methods.METHODS[name](**given)
        assert {option: getattr(method, option) for option in options} == options | given
    wrong = [("gap" if name != "galore" else "seed", 4), ("rank", 0)]
    wrong += itertools.product(options, (-1, True, "4", math.nan, math.inf))
    wrong += [(option, 1.5) for option, value in options.items() if isinstance(value, int)]
    for option, value in wrong:
        with pytest.raises(ValueError, match=option):
            methods.METHODS[name](**{option: value})
    with pytest.raises(ValueError, match=", ".join(options) or "no options"):
        methods.METHODS[name](gamma=4)


def methods_on_linear(name, linear, pieces=1, **options):
    """A method that adapts the weight of one linear layer: patterns are class attributes."""
    kind = type("OnLinear", (methods.METHODS[name],), {"adapt": {"weight": pieces}})
    method = kind(**options)
    method.prepare(linear)
    return method, linear.parametrizations.weight[0]


@pytest.mark.parametrize("call, name", [
    (lambda: methods_ready("lora", nn.Linear(2, 2)), "attn.in_proj_weight"),
    (lambda: methods_ready("lnfit", nn.Linear(2, 2)), "ln_"),
    (lambda: methods_ready("locked-image", nn.Linear(2, 2)), "visual"),
    (lambda: methods_on_linear("lora", nn.Linear(4, 5), pieces=3), "weight [5, 4]"),
    (lambda: methods_ready("ewc", methods_net()).load(None, {}), "0.bias"),
    (lambda: methods._top_singular_vectors(torch.full((2, 2), math.nan), 1), "finite"),
    (lambda: methods.learning_rate(0, 9, 0, schedule="cosine", meta="continued"), "continued"),
    (lambda: methods.learning_rate(9, 9, 0), "step 9"),
    (lambda: methods.learning_rate(0, 9, -1), "task -1"),
    (lambda: methods.learning_rate(0, 9, 0, lr=-1), "lr -1"),
    *[(lambda n=n: methods.learning_rate(0, 9, 0, **{n: 1.1}), n) for n in ("warmup", "floor")],
])  # fmt: skip
def test_methods_name_what_is_wrong(call, name):
    with pytest.raises(ValueError) as error:
        call()
    assert name in str(error.value)


def methods_shake(adapter):
    """Adapters somewhere off their start, where every gradient is non-zero."""
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p += 0.3 * torch.sin(torch.arange(p.numel(), dtype=p.dtype) + i).view(p.shape)


@pytest.mark.parametrize("name", METHODS_ADAPTERS)
def test_adapters_are_one_for_each_of_q_k_v_with_the_gradients_of_the_formula(name):
    linear = nn.Linear(4, 6, bias=False).double()
    weight = linear.weight.detach().clone()
    _, a = methods_on_linear(name, linear, pieces=3, rank=2, scale=0.7)
    methods_shake(a)
    expected = []
    for i in range(3):
        rows = slice(2 * i, 2 * i + 2)
        if name == "vera":
            delta = torch.diag(a.b[rows]) @ a.B @ torch.diag(a.d[rows]) @ a.A
        else:
            delta = a.B[i] @ a.A[i]
        v = weight[rows] + 0.7 * delta
        expected.append(torch.diag(a.m[rows] / v.detach().norm(dim=1)) @ v if name == "dora" else v)
    expected = torch.cat(expected)
    assert torch.allclose(linear.weight, expected, rtol=0, atol=1e-14)
    weights = torch.sin(torch.arange(24.0).double()).view(6, 4)
    ours, theirs = ((w * weights).sum() for w in (linear.weight, expected))
    for p in a.parameters():
        (g,), (h,) = (torch.autograd.grad(x, p, retain_graph=True) for x in (ours, theirs))
        assert g.any() and torch.allclose(g, h, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", METHODS_ADAPTERS)
def test_adapters_agree_with_peft(name):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    linear = nn.Linear(6, 5)
    x = torch.randn(7, 6)
    config = peft.LoraConfig(r=3, lora_alpha=1.5, target_modules=["0"], use_dora=name == "dora")
    if name == "vera":
        config = peft.VeraConfig(r=3, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(linear)), config)
    layer = theirs.base_model.model[0]
    _, a = methods_on_linear(name, linear, rank=3, scale=0.5)
    methods_shake(a)
    if name == "vera":
        layer.vera_A["default"] = a.A.clone()
        layer.vera_B["default"] = 0.5 * a.B
        pairs = [(layer.vera_lambda_d["default"], a.d), (layer.vera_lambda_b["default"], a.b)]
    else:
        pairs = [(layer.lora_A["default"].weight, a.A), (layer.lora_B["default"].weight, a.B)]
    if name == "dora":
        pairs.append((layer.lora_magnitude_vector["default"].weight, a.m))
    for their, our in pairs:
        their.data.copy_(our.data.view(their.shape))
    outputs = linear(x), theirs(x)
    assert torch.allclose(*outputs, rtol=0, atol=1e-6)
    sum(output.square().mean() for output in outputs).backward()
    for their, our in pairs:
        assert our.grad.abs().max() > 1e-3
        assert torch.allclose(their.grad, our.grad.view(their.shape), rtol=0, atol=1e-6)


def test_random_matrices_of_adapters_are_kaiming_uniform_of_their_seed():
    # bound^2 = 6 / ((1 + a^2) fan_in), with a = sqrt(r) for LoRA and 0 for VeRA
    for name, leaf, square in [("lora", "A", 1 / 600), ("vera", "A", 6 / 400), ("vera", "B", 0.75)]:
        _, adapter = methods_on_linear(name, nn.Linear(400, 300), rank=8)
        numbers = getattr(adapter, leaf)
        assert 0.99 * square**0.5 < numbers.abs().max() <= square**0.5
        assert numbers.std().item() == pytest.approx((square / 3) ** 0.5, rel=0.05)
    assert (adapter.d == 0.1).all()
    for name in METHODS_ADAPTERS:
        a, b, c = (methods_on_linear(name, nn.Linear(9, 6), seed=seed)[1].A for seed in (1, 1, 2))
        assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("size", [0, 1e-45, 1e-40, 1e-30, 1e-25, 1e-20, 1.0, 1e15, 1e25])
def test_dora_of_rows_of_any_size_is_float64s(size):
    """Squares of entries below about 1e-22 are 0 in float32, above 1e19 infinite."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 4, bias=False)
    linear.weight.data[1] *= size
    weight = linear.weight.detach().clone()
    _, adapter = methods_on_linear("dora", linear, rank=2)
    assert torch.equal(linear.weight, weight)
    assert torch.allclose(adapter.m.double(), weight.double().norm(dim=1), rtol=1e-6, atol=1e-45)
    adapter.B.data[0, ::2] += 0.3  # rows 0 and 2 learn, 1 stays at its size
    adapter.m.data *= 1.5
    v = (weight + (adapter.B @ adapter.A)[0]).double()
    expected = adapter.m.double()[:, None] * v / v.norm(dim=1, keepdim=True)
    if size > 1e-38:  # below, a number of float32 has few bits
        assert torch.allclose(linear.weight.double(), expected, rtol=1e-5, atol=0)
    linear.weight.square().sum().sqrt().backward()
    assert all(p.grad.isfinite().all() for p in adapter.parameters())


@pytest.mark.parametrize("name, options, weight", [
    ("ewc", {"ewc_lambda": 2.5, "ewc_gamma": 0.5}, 2.5), ("si", {"si_c": 0.8, "si_xi": 0.1}, 1.6),
])  # fmt: skip
def test_penalties_and_their_gradients_equal_the_formulas_over_three_tasks(name, options, weight):
    model = methods_net()
    method = methods_ready(name, model, **options)
    parameters = list(model.parameters())
    importance = [0.0] * 4
    for task in range(3):
        start = [p.detach().clone() for p in parameters]
        data = [methods_regression(10 * task + i) for i in range(3)]
        seen = methods_train(method, model, task, data, methods_mse, lr=1e-2)
        fisher = [torch.autograd.grad(methods_mse(model, batch), parameters) for batch in data]
        for i, (p, s) in enumerate(zip(parameters, start)):
            if name == "ewc":
                importance[i] = 0.5 * importance[i] + sum(g[i] ** 2 for g in fisher) / 3
            else:
                path = sum(1e-2 * g[i] ** 2 for g in seen)
                importance[i] = importance[i] + path / ((p.detach() - s) ** 2 + 0.1)
        method.before_task(model, task + 1)
        away = [p.detach().cos() for p in parameters]  # theta - anchor
        for p, d in zip(parameters, away):
            p.data += d
        value = method.penalty(model)
        (3 * value).backward()
        expected = weight / 2 * sum((f * d**2).sum() for f, d in zip(importance, away))
        assert value.item() == pytest.approx(expected.item(), rel=1e-12) and value > 0
        for p, f, d in zip(parameters, importance, away):
            assert torch.allclose(p.grad, 3 * weight * f * d, rtol=1e-12, atol=0)
        model.zero_grad()


@pytest.mark.parametrize("samples, used", [(24, 3), (31, 3), (5, 1), (1000, 6)])
def test_ewc_reads_gradients_whoever_left_them_up_to_its_number_of_samples(samples, used):
    """The first batch has no finite gradient and does not count; a layer is never reached."""
    model = methods_net().append(nn.Linear(3, 1).double())
    method = methods_ready("ewc", model, fisher_samples=samples)
    alive = []

    def halves(model, seed):  # as clip.backward leaves gradients of pieces
        assert not any(ref() is not None for ref in alive)  # the gradients of one batch alone
        loss = methods_mse(model[:3], methods_regression(seed))
        (0.25 * loss).backward(retain_graph=True)
        ((0.75 if seed else math.inf) * loss).backward()
        alive.extend(weakref.ref(p.grad) for p in model[:3].parameters())

    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    method.after_task(model, ((seed, 8) for seed in range(7)), halves)
    assert all(p.grad is None for p in model.parameters())
    losses = [methods_mse(model[:3], methods_regression(1 + i)) for i in range(used)]
    squares = [torch.autograd.grad(loss, model[:3].parameters()) for loss in losses]
    for i, mine in enumerate(list(method.fisher.values())[:4]):
        assert torch.allclose(mine, sum(g[i] ** 2 for g in squares) / used, rtol=1e-12, atol=0)
    assert not method.fisher["3.weight"].any()
    with pytest.raises(ValueError, match=".grad"):  # nobody ran a backward
        method.after_task(model, [(0, 8)], lambda model, batch: None)


def methods_apply(optimizer, parameters, gradients):
    for step in gradients:
        for p, g in zip(parameters, step):
            p.grad = g.clone()
        optimizer.step()


@pytest.mark.parametrize("rank", [2, 1000])
def test_galore_equals_the_published_rule_and_adamw_on_what_is_no_matrix(rank):
    torch.manual_seed(0)
    shapes = [(7, 4), (4, 7), (5, 5), (6,), (2, 3, 2)]
    *gradients, weights = [[torch.randn(s, dtype=torch.float64) for s in shapes] for _ in range(12)]
    got = nn.ParameterList([nn.Parameter(w.clone()) for w in weights])
    optimizer = methods_ready("galore", got, rank=rank, gap=4, scale=0.7).optimizer(got, lr=1e-2)
    methods_apply(optimizer, got, gradients)
    for i in range(3):
        w = weights[i]
        m = v = 0.0
        for t, g in enumerate(step[i] for step in gradients):
            tall = g.shape[0] >= g.shape[1]
            if t % 4 == 0:
                left, _, right = torch.linalg.svd(g, full_matrices=False)
                basis = right[:rank].T if tall else left[:, :rank]
                basis = basis * torch.stack([c[c.abs().argmax()].sign() for c in basis.T])
            low = g @ basis if tall else basis.T @ g
            m = 0.9 * m + 0.1 * low
            v = 0.999 * v + 0.001 * low**2
            n = (m / (1 - 0.9 ** (t + 1))) / ((v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
            update = n @ basis.T if tall else basis @ n
            w = (1 - 1e-2 * 0.2) * w - 1e-2 * 0.7 * update
        assert torch.allclose(got[i], w, rtol=0, atol=1e-10)  # Gram matrix against SVD, in float64
        assert optimizer.state[got[i]]["exp_avg_sq"].shape == low.shape
    small, large = (methods._top_singular_vectors(scale * g.float(), 3) for scale in (1e-25, 1))
    torch.testing.assert_close(small, large)
    theirs = [nn.Parameter(w.clone()) for w in weights[3:]]
    groups = [{"params": theirs[:1], "weight_decay": 0.0}, {"params": theirs[1:]}]
    adamw = torch.optim.AdamW(groups, 1e-2, weight_decay=0.2)
    methods_apply(adamw, theirs, [step[3:] for step in gradients])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-14) for a, b in zip([*got][3:], theirs))


def test_learning_rates_are_the_published_ones():
    for schedule, meta, task, values in [
        ("cosine", "none", 0, (0.1, 1, 0.99970, 0.57002, 0.03112, 0.02545, 0.00100)),
        ("rsqrt", "none", 0, (0.1, 1, 1, 0.44777, 0.33587, 0.30060, 0)),
        ("rsqrt", "autoregressive", 1, (0.0427, 0.42698, 0.42698, 0.1915, 0.14379, 0.12869, 0)),
        ("cosine", "autoregressive", 1, (.04918, .49178, .49163, .28054, .0158, .01301, .001)),
    ]:
        steps = (0, 9, 10, 50, 89, 90, 99)
        rates = [methods.learning_rate(n, 100, task, 1.0, schedule, meta) for n in steps]
        assert rates == pytest.approx(values, abs=6e-6), (schedule, meta)
    rate = functools.partial(methods.learning_rate, 9_999, 100_000, lr=1.0, floor=0.0)
    for schedule, meta, peaks in [  # of tasks 0, 1, ...; published for the limit of many steps
        ("cosine", "autoregressive", (1, 0.50, 0.25, 0.146, 0.095, 0.067)),
        ("rsqrt", "autoregressive", (1, 0.426, 0.378, 0.359, 0.349)),
        ("rsqrt", "continued", (1, 0.333, 0.243, 0.2, 0.174)),
        ("rsqrt", "recovered", (1, 0.333, 0.243, 0.2, 0.174)),
        ("cosine", "dynamic", (1, 0.50, 0.25, 0.146, 0.095, 0.067)),
    ]:
        rates = [rate(task, schedule=schedule, meta=meta) for task in range(len(peaks))]
        assert rates == pytest.approx(peaks, abs=6e-4), (schedule, meta)


@pytest.mark.parametrize("w, c, m", [(10, 10, 1e-3), (25, 5, 0.1)])
def test_meta_schedules_follow_the_curves_that_define_them(w, c, m):
    rate = functools.partial(methods.learning_rate, warmup=w / 100, cooldown=c / 100, floor=m)
    for task, n in itertools.product(range(4), range(w, 100 - c)):
        share = (task * 100 + n - w * (task + 1) + 1) / ((100 - w) * (task + 1))
        curve = m + (1 - m) * (1 + math.cos(math.pi * share)) / 2
        assert rate(n, 100, task, 1.0, "cosine", "dynamic") == pytest.approx(curve, abs=1e-12)
        curve = m + math.sqrt(w / (n + task * (100 - c - w))) * (1 - m)
        assert rate(n, 100, task, 1.0, "rsqrt", "recovered") == pytest.approx(curve, abs=1e-12)
        peak = m + math.sqrt(w / (task * (100 - c) - (task - 1) * w)) * (1 - m) if task else 1.0
        curve = m + math.sqrt(w / n) * (peak - m)
        assert rate(n, 100, task, 1.0, "rsqrt", "continued") == pytest.approx(curve, abs=1e-12)


def test_rates_never_leave_zero_to_peak_and_never_rest_a_whole_task():
    shares = (0.0, 0.1, 0.35, 1.0)
    for schedule, metas in methods.SCHEDULES.items():
        for meta, *three in itertools.product(metas, shares, shares, (0.0, 1e-3, 0.1)):
            for steps, task in itertools.product((1, 2, 3, 10, 11, 37), (0, 1, 2, 19)):
                settings = (steps, task, 0.02, schedule, meta, *three)
                rates = [methods.learning_rate(n, *settings) for n in range(steps)]
                assert 0 <= min(rates) and 2e-6 < max(rates) <= 0.02, settings


def test_warm_ups_are_whole_steps():
    rate = functools.partial(methods.learning_rate, task=0, lr=1.0)
    assert rate(0, 1) == 1  # a task of one step trains
    assert [rate(n, 4, warmup=1.0) for n in range(4)] == [0.25, 0.5, 0.75, 1]
    assert rate(6, 100, warmup=0.07) == 1  # .07 * 100 = 7.000000000000001 is 7 steps
    assert rate(0, 5, schedule="rsqrt") == 1  # a warm-up of one step is at the peak


# -------------------------------------------------------------------------------------- budget.py

BUDGET_TINY = clip.CONFIGS["tiny"]
BUDGET_B16 = clip.CONFIGS["ViT-B-16"]
BUDGET_SHALLOW = dataclasses.replace(BUDGET_B16, vision_layers=2, text_layers=3)
BUDGET_WIDE = dataclasses.replace(clip.CONFIGS["ViT-H-14"], vision_layers=1, text_layers=2)


class BudgetLive(TorchDispatchMode):
    """Bytes of all storages alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.sizes = {}
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if torch.is_tensor(t)]
        for storage in [t.untyped_storage() for t in tensors if t.dtype != torch.uint64]:
            if storage._cdata not in self.sizes:  # (of uint64: flash attention's random state)
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return out

    def free(self, key):
        self.now -= self.sizes.pop(key)


class BudgetRun:
    """Real steps of a method on a real CLIP, as fomo.py takes them, in its second task."""

    def __init__(self, config, size, name, micro_batch, half, device="cpu"):
        with torch.device(device):
            self.model = clip.CLIP(config)
            self.images = torch.zeros(size, 3, config.image_size, config.image_size)
            self.tokens = torch.zeros(size, config.context_length, dtype=torch.long)
        self.micro_batch = micro_batch
        self.cast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=half)
        self.method = methods.METHODS[name]()
        self.method.prepare(self.model)
        for key in self.method.state_names:
            zeros = {n: torch.zeros_like(p) for n, p in self.method.trained.items()}
            setattr(self.method, key, zeros)
        self.optimizer = self.method.optimizer(self.model)
        share = 1 - (micro_batch or size) / size  # of samples that fomo.py leaves on the CPU
        self.waiting = max(0, share) * (self.images.nbytes + self.tokens.nbytes)

    def encode_image(self, images):
        with self.cast():
            return F.normalize(self.model.encode_image(images), dim=-1).float()

    def encode_text(self, tokens):
        with self.cast():
            return F.normalize(self.model.encode_text(tokens), dim=-1).float()

    def step(self):
        scale = self.model.logit_scale.exp()
        towers = (self.encode_image, self.encode_text)
        with self.cast():
            clip.backward(*towers, self.images, self.tokens, scale, self.micro_batch)
        penalty = self.method.penalty(self.model)
        if torch.is_tensor(penalty):
            penalty.backward()
        self.method.after_backward(self.model, 1e-5)
        self.optimizer.step()
        self.optimizer.zero_grad()


def budget_flash(q, k, v, is_causal):
    """The kernel that CUDA picks; without a GPU, F.scaled_dot_product_attention would not."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]


def budget_measured(config, size, name, precision, micro_batch=None):
    """-> FLOPs of a step, bytes that outlive it, that the towers' forward saves, and the step's
    peak; no number is computed. CUDA's autocast keeps LayerNorms in fp32, the CPU's does not: here
    they get what they would there."""
    norm = F.layer_norm
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(), BudgetLive() as live:
        patch.setattr(F, "scaled_dot_product_attention", budget_flash)
        if precision == "bf16":
            patch.setattr(F, "layer_norm", lambda x, *rest: norm(x.float(), *rest))
        run = BudgetRun(config, size, name, micro_batch, precision == "bf16")
        with FlopCounterMode(display=False) as counter:
            run.step()
        batch = run.images.nbytes + run.tokens.nbytes
        live.peak = live.now
        permanent = live.peak - batch - 4 * len(run.method.trained)  # AdamW counts steps
        run.step()
        peak = live.peak - run.waiting
        before = live.now
        features = [run.encode_image(run.images), run.encode_text(run.tokens)]
        saved = live.now - before - sum(t.nbytes for t in features)
    return counter.get_total_flops(), permanent, saved, peak


BUDGET_REAL = [m for m in methods.METHODS if m != "galore"]  # eigenvectors need numbers
BUDGET_CASES = [
    *[(m, BUDGET_SHALLOW, 64, None, "bf16", 0.01) for m in BUDGET_REAL],
    *[(m, BUDGET_WIDE, 3, None, "fp32", 0.05) for m in ("finetune", "lnfit", "vera")],
    # with few pairs the gradients of the blocks done so far matter, and a penalty's
    *[(m, BUDGET_SHALLOW, 8, None, "fp32", 0.05) for m in ("locked-text", "dora")],
    *[(m, BUDGET_SHALLOW, 2, None, "fp32", 0.1) for m in ("ewc", "si")],
    ("finetune", dataclasses.replace(BUDGET_TINY, quick_gelu=True), 4, None, "fp32", 0.05),
    # pieces
    ("finetune", BUDGET_SHALLOW, 64, 32, "fp32", 0.015),
    ("lora", BUDGET_SHALLOW, 64, 32, "bf16", 0.015),
    ("si", BUDGET_SHALLOW, 200, 100, "fp32", 0.01),
    ("locked-image", BUDGET_SHALLOW, 24, 8, "bf16", 0.03),
    ("lora", BUDGET_TINY, 32000, 16000, "fp32", 0.01),  # the logits are what is large
]


@pytest.mark.parametrize("method, config, size, micro_batch, precision, tolerance", BUDGET_CASES)
def test_budget_is_what_a_real_step_takes(method, config, size, micro_batch, precision, tolerance):
    flops, permanent, saved, peak = budget_measured(config, size, method, precision, micro_batch)
    recipe, rank, *towers = budget.setup(config, method)
    number = budget.PRECISIONS[precision]
    assert budget.step_flops(config, size, method, micro_batch=micro_batch) == flops
    assert budget.permanent_bytes(config, method, rank) == permanent
    ours = sum(budget.saved_bytes(config, tower, size, method, rank, number) for tower in towers)
    if precision == "bf16":  # the CPU's norms of the features are 16-bit, the GPU's are not
        ours -= 4 * size * (bool(recipe.vision) + bool(recipe.text))
    assert ours == saved
    ours = budget.peak_memory(config, size, method, precision, micro_batch=micro_batch)
    assert ours == pytest.approx(peak, rel=tolerance)
    assert not recipe.penalty or size > 2 or peak <= ours


def test_budget_equals_flop_counter_on_galore_s_projections_and_the_bytes_of_its_moments():
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        matrices = [p.detach() for p in clip.CLIP(BUDGET_WIDE).parameters() if p.ndim == 2]
        for g in matrices:
            g = g if g.shape[0] >= g.shape[1] else g.T
            torch.mm(g.T, g)  # the Gram matrix
            basis = g.new_empty(g.shape[1], 16)
            torch.mm(torch.mm(g, basis), basis.T)
    eigenvectors = sum(9 * min(g.shape) ** 3 for g in matrices)  # the counter does not count eigh
    ours = budget.step_flops(BUDGET_WIDE, 1, "galore", gap=1) - budget.step_flops(BUDGET_WIDE, 1)
    assert ours == counter.get_total_flops() + eigenvectors
    full, low = (budget.permanent_bytes(BUDGET_WIDE, m, 16) for m in ("finetune", "galore"))
    moments = sum(4 * 16 * (2 * max(g.shape) + min(g.shape)) - 8 * g.numel() for g in matrices)
    assert low - full == moments


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures the memory of a GPU")
@pytest.mark.parametrize("size, micro_batch", [(64, None), (256, None), (256, 64)])
@pytest.mark.parametrize("method", ["finetune", "locked-text", "lnfit", "lora", "ewc", "si"])
def test_budget_peak_memory_is_what_a_gpu_allocates(method, size, micro_batch):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    run = BudgetRun(BUDGET_B16, size, method, micro_batch, True, "cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        run.step()
    measured = torch.cuda.max_memory_allocated() - before - run.waiting
    ours = budget.peak_memory(BUDGET_B16, size, method, "bf16", micro_batch=micro_batch)
    assert ours == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("method, rank", budget.PAPER)
def test_budget_equals_the_published_row_in_gflops_and_steps_and_nearly_in_memory(method, rank):
    published, gib, at_20 = budget.PAPER[method, rank]
    memory_ratio = gib / budget.PAPER["finetune", 0][1]
    ours = budget.step_flops(BUDGET_B16, 512, method, rank) / 1e9
    steps = budget.steps(BUDGET_B16, 512, method, 20, rank=rank, memory_ratio=memory_ratio)
    blocks = 12 * ([(512, 512)] * 3 + [(512, 2048)] + [(768, 768)] * 3 + [(768, 3072)])
    product = sum(2 * rank * o * i for o, i in blocks) / 1e9  # B @ A of every adapted weight
    tolerance = 1.01e-4  # their last digit is cut, not rounded
    if method == "ewc":  # ours: 98 batches once a task; theirs: in every step
        assert steps == 1303
        ours += budget.task_flops(BUDGET_B16, 512, "ewc") / 1e9
        steps = budget.steps_per_task(1.8e9, 20, ours * memory_ratio)
        tolerance = 99 * 5e-5  # 99 times a rounded count
    if method == "dora":
        ours += product  # B @ A once more, for the norm
    if method == "vera":  # ((diag(b) B) diag(d)) A in full, with the gradients that it needs
        full = [o * o * rank + 1.5 * o * rank * rank + o * rank * i for o, i in blocks]
        ours += sum(4 * n for n in full) / 1e9 - 3 * product
    assert ours == pytest.approx(published, abs=tolerance)
    # of locked-image the published GFLOPs and GiB give 12982.75 steps, and they print 12982
    assert steps == at_20 + (method == "locked-image")
    for precision in ("bf16", "fp32"):  # nvidia-smi counts a CUDA context and a reserve too
        multiplier = budget.memory_multiplier(BUDGET_B16, 512, method, rank, precision)
        near = 0.15 if method == "locked-image" else 0.08
        assert multiplier == pytest.approx(memory_ratio, rel=near)


@pytest.mark.parametrize("name, parameters, image, text", [
    ("ViT-S-16", 62_257_537, 9_197_291_520, 3_379_562_496),
    ("ViT-B-32", 151_277_313, 8_817_623_040, 5_959_540_736),
    ("ViT-B-16", 149_620_737, 35_126_906_880, 5_959_540_736),
    ("ViT-L-14", 427_616_513, 162_025_537_536, 13_299_683_328),
    ("ViT-g-14", 1_366_678_273, 534_063_050_752, 47_091_384_320),
])  # fmt: skip
def test_budget_knows_the_sizes_of_the_models_and_their_budgets(name, parameters, image, text):
    config = clip.CONFIGS[name]
    assert budget.trained_parameters(config) == parameters
    assert budget.forward_flops(config) == (image, text)
    total = 5.7e8 if name == "ViT-B-32" else 1.8e9 * (image + text) / 41_086_447_616
    assert budget.default_budget(config) == pytest.approx(total, rel=1e-12)


def budget_plan(method, tasks, samples, **options):
    names = ("rank", "gap", "fisher_samples", "steps", "budget")
    options = {"batch_size": 64, "tasks": 8, **dict.fromkeys(names), **options}
    return budget.plan(BUDGET_TINY, argparse.Namespace(method=method, **options), tasks, samples)


def test_budget_knows_every_run_of_fomo_and_plans_spend_the_budget_of_each():
    assert {*budget.METHODS} == {*methods.METHODS, *merge.TIMELINES, "merge", "wise-ft", "joint"}
    for method, recipe in budget.METHODS.items():
        assert recipe.rank == methods.OPTIONS.get(method, {}).get("rank", 0)
        steps, costs = budget_plan(method, 8, 8 * 150, budget=6000.0, rank=2, gap=50)
        maf = costs["maf_gflops_per_step"]
        assert maf == budget.mafs(BUDGET_TINY, 64, method, rank=2, gap=50)
        assert method in methods.METHODS or maf == budget.mafs(BUDGET_TINY, 64)
        fisher = 2 * maf if method == "ewc" else 0  # two full batches of each task's 150 samples
        assert costs["gflops_spent"] == pytest.approx(8 * (steps * maf + fisher))
        assert costs["gflops"] == 6000 and abs(costs["gflops_spent"] - 6000) <= 8 * maf / 2
    assert budget.GAP == methods.OPTIONS["galore"]["gap"]
    assert budget.FISHER_SAMPLES == methods.OPTIONS["ewc"]["fisher_samples"]
    ewc = [budget_plan("ewc", 8, n, budget=6e3, fisher_samples=128)[0] for n in (80, 8 * 999)]
    assert ewc[0] == ewc[1] + 1
    assert [budget_plan(m, 8, 9, steps=7)[0] for m in ("joint", "lora")] == [56, 7]
    assert budget_plan("zero-shot", 0, 0)[1]["gflops_spent"] == 0


def test_budget_command_prints_the_papers_table_and_the_memory_of_micro_batches(capsys):
    own = {"tiny": {"batch_size": 64, "tasks": 8, "budget": 6000.0}}
    paper = {"batch_size": 512, "tasks": 20, "budget": None}
    command = functools.partial(budget.main, models=clip.CONFIGS, paper=paper, own=own)
    command(["--model", "ViT-B-16"])
    first, last = capsys.readouterr().out.split("--micro-batch")
    for (method, rank), (gflops, _, steps) in budget.PAPER.items():
        name = method if rank in (0, 4) else f"{method} r{rank}"
        row = first.split(f"\n{name:14}")[1].splitlines()[1].split()
        assert row[:2] == ["(paper)", f"{gflops:.4f}"] and row[5] == str(steps)
    sizes = ["16", "32", "64", "128", "256", "512"]
    assert last.split()[:8] == [*sizes, "finetune", "3.26"] and last.split()[12] == "43.1"
    command(["--model", "tiny"])
    row = capsys.readouterr().out.splitlines()[2].split()
    assert row[-1] == str(budget.steps(BUDGET_TINY, 64, "finetune", 8, 6000.0))
    command(["--model", "tiny", "--batch-size", "100"])
    assert f"{64:8}{100:8}\n" in capsys.readouterr().out
    steps = budget.table(BUDGET_B16, 512, total_gflops=1e6)[0]["steps"]
    assert steps == {20: 1, 50: None, 100: None, 200: None}


@pytest.mark.parametrize("call, name", [
    (lambda: budget.step_flops(BUDGET_B16, 0), "batch size 0"),
    (lambda: budget.peak_memory(BUDGET_B16, 8, micro_batch=-1), "micro-batch -1"),
    (lambda: budget.step_flops(BUDGET_B16, 1, "fintune"), "fintune"),
    (lambda: budget.peak_memory(BUDGET_B16, 1, "lora", rank=513), "513"),
    (lambda: budget.step_flops(BUDGET_B16, 1, "galore", -4), "-4"),
    (lambda: budget.steps_per_task(1e5, 20, 63394.7), "20 tasks"),
    (lambda: budget.table(BUDGET_B16, 512, total_gflops=0), "0 GFLOPs"),
    (lambda: budget.table(BUDGET_B16, 512, tasks=[8, 0]), "[8, 0]"),
])  # fmt: skip
def test_budget_names_what_is_wrong(call, name):
    with pytest.raises(ValueError) as error:
        call()
    assert name in str(error.value)


def test_budget_example_runs_alone_without_torch_and_takes_under_50_ms():
    lines = [line[4:] for line in budget.__doc__.splitlines() if line.startswith("    ")]
    calls = [line.split("  # ") for line in lines[6:9]]
    program = [*lines[:6], "import time, sys; start = time.process_time()"]
    program += [f"print({call})" for call, _ in calls]
    program += ["[budget.peak_memory(b16, 512, m) for m in budget.METHODS]"]
    program += ["print(time.process_time() - start, 'torch' in sys.modules)"]
    command = [sys.executable, "-c", "\n".join(program)]
    folder = os.path.dirname(os.path.abspath(budget.__file__))
    *numbers, seconds, torch_too = subprocess.check_output(command, text=True, cwd=folder).split()
    assert torch_too == "False" and float(seconds) < 0.05
    for number, (_, comment) in zip(numbers, calls):
        assert float(comment.split()[0]) == pytest.approx(float(number), abs=0.006)


# ------------------------------------------------------------------------------------ evaluate.py

# The README's zero-shot list of the paper's code for ViT-B/32: 41 sets to adapt to, 22 held out.
EVALUATE_ADAPTATION = """72.7 15.0 46.7 75.8 4.7 59.7 14.6 64.1 2.1 5.5 78.7 50.9 71.9 68.9 11.8
    54.5 23.9 68.0 50.3 8.1 5.4 14.2 25.6 20.2 80.2 16.8 32.1 58.9 54.0 49.4 63.6 41.8 28.3 0.2 62.5
    16.8 0.3 68.2 41.0 32.5 17.5"""
EVALUATE_HELDOUT = """90.7 88.5 85.9 93.7 19.1 49.2 77.0 92.3 82.5 48.6 65.5 23.1 40.7 73.9 52.3
    57.6 69.2 82.7 72.0 90.7 96.4 42.8"""


def evaluate_normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_ka_zs_gm_forgetting_earlier_and_the_height_above_the_line_are_what_the_papers_say():
    adaptation = {str(i): float(v) for i, v in enumerate(EVALUATE_ADAPTATION.split())}
    heldout = {f"h{i}": float(v) for i, v in enumerate(EVALUATE_HELDOUT.split())}
    scores = evaluate.summary({**adaptation, **heldout}, adaptation, heldout)
    assert [round(scores[metric], 2) for metric in ("ka", "zs", "gm")] == [38.47, 67.93, 51.12]
    sets = [SimpleNamespace(name=n, kind=k, classes="abcd", test=range(50))
            for n, k in (("A", "classification"), ("B", "retrieval"), ("C", "classification"))]
    guess = evaluate.chance(sets[:2], sets[2:])
    assert guess["datasets"] == {"A": 25, "B": 10, "C": 25} and guess["ka"] == 17.5
    assert [*evaluate.chance(sets, []).values()][:3] == [20, None, None]  # without ZS
    history = [{"a": 10, "b": 60}, {"a": 50, "b": 40}, {"a": 40, "b": 50}]
    assert evaluate.forgetting(history) == 10 and evaluate.forgetting(history[:1]) == 0
    per_class = {"a": {"x": 10, "y": 20, "z": 60}, "b": {"x": 100, "y": None}, "h": {"x": 1}}
    concepts = [("a", "x"), ("a", "y"), ("a", "x"), ["b", "x"], ("b", "y"), ("c", "x")]
    assert evaluate.over_concepts(per_class, concepts) == (15 + 100) / 2
    assert evaluate.over_concepts(per_class, [("b", "y"), ("a", "gone")]) is None
    line = ((70.4, 38.9), (65.4, 59.5))  # theta_0, joint; beyond an end: over that end
    for point, above in {(68.0, 53.9): 53.9 - (38.9 + 20.6 * 2.4 / 5), line[0]: 0, line[1]: 0,
                         (72.0, 40.0): 1.1, (60.0, 50.0): -9.5}.items():  # fmt: skip
        assert evaluate.above_line(point, *line) == pytest.approx(above)
    ends = ((70, 40), (70, 60))  # a line straight up
    assert [evaluate.above_line((zs, 50), *ends) for zs in (70, 69)] == [-10, 10]


def test_subsets_are_class_balanced_of_the_papers_size_and_a_function_of_the_seed():
    labels = np.repeat([0, 1, 2, 3], [2000, 30, 500, 3])
    ids, again, other = (evaluate.balanced_subset(labels, seed) for seed in (0, 0, 1))
    counts = np.bincount(labels[ids])
    assert len(ids) == len({*ids}) == 300 and (np.diff(ids) > 0).all()
    assert counts[[1, 3]].tolist() == [30, 3] and abs(counts[0] - counts[2]) <= 1
    assert np.array_equal(ids, again) and not np.array_equal(ids, other)
    for n, c, size in ((100, 10, 100), (1000, 200, 400), (9000, 3, 900)):  # all; 2 a class; a tenth
        assert len(evaluate.balanced_subset(np.arange(n) % c, 0)) == size


def test_perfect_and_rounded_features_score_100_and_nearly_the_same():
    weights = F.normalize(evaluate_normal(10, 64), dim=-1)
    labels = np.random.default_rng(0).choice(10, 5000, p=[0.55, *[0.05] * 9])
    for ids in (np.arange(5000), *(evaluate.balanced_subset(labels, seed) for seed in range(3))):
        numbers = evaluate.classification(7 * weights[labels[ids]], weights, labels[ids])
        assert numbers["top1"] == numbers["top5"] == numbers["mean_per_class"] == 100
        assert numbers["per_class"] == [100] * 10
    numbers = evaluate.classification(torch.eye(3)[[0, 0, 0, 1]], torch.eye(3), [0, 0, 0, 2])
    assert numbers["per_class"] == [100, None, 0]
    assert (numbers["score"], numbers["mean_per_class"]) == (75, 50)  # classes weigh the same
    weights = F.normalize(evaluate_normal(50, 256), dim=-1)
    labels = np.arange(20000) % 50
    image = weights[labels] * 3 + evaluate_normal(20000, 256, seed=2)
    exact, rounded = (evaluate.accuracy(x, weights, labels) for x in (image, image.bfloat16()))
    assert 60 < exact < 99 and abs(exact - rounded) < 0.1


def test_templates_and_top_5_equal_open_clips_zero_shot_code():
    open_clip = pytest.importorskip("open_clip")
    names = ["cat", "{curly}", "dog", "a {} b", "x", "bird", "fish", "fern"]
    projection = evaluate_normal(20, 16, dtype=torch.float64)

    def encode(ids, normalize=False):  # features of different lengths, which must weigh the same
        return F.normalize(ids @ projection, dim=-1) if normalize else ids @ projection

    def tokens(texts):
        return torch.tensor([[*text.encode().ljust(20)[:20]] for text in texts]).double()

    templates = ["{}", "a photo of {}", "no {}."]
    functions = [lambda c, t=t: t.replace("{}", c) for t in templates]  # format() reads {curly}
    model = SimpleNamespace(encode_text=encode)
    theirs = open_clip.build_zero_shot_classifier(model, tokens, names, functions).T
    ours = evaluate.classifier(lambda texts: encode(tokens(texts)), names, templates)
    one = evaluate.classifier(lambda texts: encode(tokens(texts)), names)
    assert torch.allclose(one, encode(tokens(names), True))
    assert (ours - theirs).abs().max() < 1e-12
    images = evaluate_normal(400, 16, dtype=torch.float64)
    numbers = evaluate.classification(images, ours, np.arange(400) % 8)
    found = ((images @ theirs.T).topk(5).indices == torch.arange(400)[:, None] % 8).double()
    assert numbers["top1"] == pytest.approx(100 * found[:, 0].mean().item())
    assert numbers["top5"] == pytest.approx(100 * found.sum(1).mean().item())


def test_template_files_are_lines_or_lists(tmp_path):
    for text in ("a photo of a {}.\n\n  the {}, drawn\n", '["a photo of a {}.",\n "the {}, drawn"]',
                 "\ufeff'a photo of a {}.',\n\"the {}, drawn\"\n"):  # fmt: skip
        (tmp_path / "t").write_text(text, encoding="utf-8")
        assert evaluate.read_templates(tmp_path / "t") == ["a photo of a {}.", "the {}, drawn"]


@pytest.mark.parametrize("part", [2**22, 70_000])  # 70,000: several parts, the last not full
def test_recall_equals_a_full_ranking_with_several_texts_a_picture(part, monkeypatch):
    monkeypatch.setattr(evaluate, "PART", part)
    image = evaluate_normal(330, 4, dtype=torch.float64)
    owner = np.random.default_rng(0).permutation(np.r_[np.arange(330), np.arange(371) % 90])
    text = evaluate_normal(701, 4, seed=1, dtype=torch.float64) + 0.7 * image[owner]
    numbers = evaluate.retrieval(image, text, owner)
    similarity = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    for k in (1, 5, 10):
        right = [(similarity.T.topk(k).indices.numpy() == owner[:, None]).any(1),
                 (owner[similarity.topk(k).indices.numpy()] == np.arange(330)[:, None]).any(1)]
        expected = [100 * found.mean() for found in right]  # fmt: skip
        assert evaluate.recall_at_k(image, text, owner, k) == pytest.approx(expected)
        assert [numbers[way][f"R@{k}"] for way in ("t2i", "i2t")] == pytest.approx(expected)
    assert numbers["score"] == (numbers["t2i"]["R@5"] + numbers["i2t"]["R@5"]) / 2


def test_recall_by_class_is_the_recall_of_its_pictures_and_those_without_text_are_not_found():
    image = evaluate_normal(40, 8)
    text = evaluate_normal(80, 8, seed=1)
    owner = np.arange(80) % 40
    scores = evaluate.retrieval(image, text, owner, np.arange(40) % 4, 5)
    assert scores["per_class"][4] is None and len({*scores["per_class"][:4]}) > 1
    assert np.mean(scores["per_class"][:4]) == pytest.approx(scores["score"])  # classes of ten
    text[::4] = image[owner[::4]]  # those of class 0 are found
    found, *others = evaluate.retrieval(image, text, owner, np.arange(40) % 4, 4)["per_class"]
    assert found == 100 > max(others)
    assert evaluate.recall_at_k(image[:2], image[:1], [0], 2) == (100, 50)


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_constant_features_score_what_guessing_scores(constant):
    features = constant * (1 + 1e-7 * evaluate_normal(60, 8, dtype=torch.float64))  # nearly
    numbers = evaluate.classification(features, torch.ones(20, 8).double(), [3] * 60)
    assert [numbers["top1"], numbers["top5"], numbers["chance"]] == pytest.approx([5, 25, 5])
    numbers = evaluate.retrieval(features[:30], features, np.arange(60) % 30)
    missed = math.comb(58, 5) / math.comb(60, 5)  # five drawn texts, none of them of the two
    expected = [100 * 5 / 30, 100 * (1 - missed)]
    assert [numbers[way]["R@5"] for way in ("t2i", "i2t")] == pytest.approx(expected)
    assert numbers["score"] == pytest.approx(numbers["chance"])


def test_scores_are_the_same_bits_for_any_order_and_batch_size(monkeypatch):
    image = evaluate_normal(240, 12, dtype=torch.float64)
    image[100:140] = image[60:100]
    image[3] = image[5]
    owner = np.arange(480) % 240
    text = image[owner] + evaluate_normal(480, 12, seed=1, dtype=torch.float64)
    text[300:360] = text[30:90]
    text[400:420] = text[160:180] = text[30:50]  # two texts of one picture are equal, too
    projection = evaluate_normal(12, 16, seed=9, dtype=torch.float64)
    scores = []
    for seed, batch, part in ((0, 240, 2**24), (1, 1, 2**24), (2, 7, 5000), (3, 100, 1)):
        monkeypatch.setattr(evaluate, "PART", part)
        a, b = (np.random.default_rng(seed).permutation(n) for n in (240, 480))
        images, texts, classes = (torch.cat([x @ projection for x in samples.split(batch)])
                                  for samples in (image[a], text[b], image[:7]))  # fmt: skip
        scores.append((evaluate.classification(images, F.normalize(classes, dim=-1), a % 7),
                       evaluate.retrieval(images, texts, np.argsort(a)[owner[b]], a % 7, 7)))
    assert scores[0] == scores[1] == scores[2] == scores[3]


def evaluate_run(method="merge", seed=0, moves=((1, 10), (2, 20)), zs=True, **options):
    """Results of a run whose ZS falls and KA rises by moves from 80 and 30, over 3 sets each."""

    def row(task, down, up):
        scores = {f"A{i}": 29.0 + up + i for i in range(3)}
        scores |= {f"H{i}": 80.0 - down for i in range(3) if zs}
        taught = {key: 50.0 + up if task > 1 else None for key in evaluate.TAUGHT}
        taught |= {f"{key}_before": score and score - 5 for key, score in taught.items()}
        means = evaluate.summary(scores, ["A0", "A1", "A2"], ["H0", "H1", "H2"] if zs else [])
        return {**means, **taught, "task": task, "steps": 5, "concepts": 2}

    rows = [row(t + 1, *move) for t, move in enumerate(moves)]
    classes = [{"A0": dict(zip(("mug", "cup", "jar", "new"), of))}
               for of in ((93.3, 5.0, 50.0, None), (10.0, 90.0, 49.0, 3.0))]  # fmt: skip
    hashes = dict.fromkeys(("theta_0_sha256", "test_sha256", "train_sha256", "weights_sha256"), "0")
    return {
        "theta_0": row(0, 0, 0), "before": None, "tasks": rows, "final": rows[-1], "parent": None,
        "per_class": {"theta_0": classes[0], "before": None, "final": classes[1]}, **hashes,
        "chance": {"ka": 1.5, "zs": 2.0 if zs else None}, "gate_failed": [], "gflops_spent": 3000.0,
        "heldout": ["H0", "H1", "H2"] if zs else [], "trained_parameters": 1234, "seconds": 7.0,
        "config": {"method": method, "seed": seed, "out": f"{seed}", **options},
    }  # fmt: skip


def test_a_gate_says_what_was_lost_and_holds_for_nothing_that_is_not_scored():
    run = evaluate_run()
    before, after = run["tasks"]
    after |= {"earlier": 8.2, "earlier_before": 7.2, "new": None, "zs": 79.0}
    after["datasets"]["A0"] = before["datasets"]["A0"] - 4

    def failures(gate, about=None, ends=(("theta_0", 5.0), ("final", 1.0))):
        classes = [run["per_class"][key] | {"H1": {"x": x}} for key, x in ends]
        return evaluate.gate_failures(gate, before, after, *classes, about)

    assert failures("ZS >= 0, zs <= 0, earlier >= 1, KA > 9, A1 < 10.1") == failures(None) == []
    said = failures("zs > 0,zs < 0,ka>=10.5,gm >= 99,earlier > 1.0, new >= -99")
    assert [sentence.split()[0] for sentence in said] == ["zs", "zs", "ka", "gm", "earlier", "new"]
    assert "mug of A0 93.3 -> 10.0, x of H1 5.0 -> 1.0, jar" in said[2]
    said = failures("earlier >= 2, H1 > 3, A0 >= -3", {"earlier": [("A0", "mug"), ("A0", "new")]})
    assert [re.findall(r"(\w+) of", line) for line in said] == [["mug"], ["x"], ["mug", "jar"]]
    assert said[2].startswith("A0 -4.0, not >= -3")
    evaluate.check_gate("zs >= -1, A0>=-3 , Earlier > 0", ["A0", "H0"], ["H0"])


def test_runs_that_differ_in_their_seed_alone_are_one_line_of_text_markdown_and_json():
    runs = {f"r/merge-{s}": evaluate_run("merge", s, [(1, (9, 10, 14)[s])]) for s in range(3)}
    runs |= {"r/other": evaluate_run(moves=[(1, 5)], lr=1), "r/joint": evaluate_run(lr=2)}
    runs |= {"r/../r/other": runs["r/other"], "s/other": evaluate_run(moves=[(1, 9)])}
    runs |= {"x": evaluate_run("joint"), "l/0": evaluate_run("ewc"), "l/1": evaluate_run("ewc", 1)}
    runs |= {"d": evaluate_run(seed=7, moves=[(1, 9)]) | {"train_sha256": "1"}}
    numbers = evaluate.summarise(evaluate.compare(runs.items()))["lines"]
    assert [(line["name"], line["seeds"]) for line in numbers] == [
        ("merge", [0, 1, 2]), ("other", [0]), ("r/joint", [0]), ("s/other", [0]), ("joint", [0]),
        ("ewc", [0, 1]), ("d", [7])]  # fmt: skip  # a seed given twice is one
    expected = {"mean": 41, "std": np.std([9, 10, 14], ddof=1), "n": 3}
    assert numbers[0]["ka"] == pytest.approx(expected)
    assert numbers[0]["ka_change"]["mean"] == pytest.approx(11) and numbers[1]["ka"]["std"] is None
    runs = [(f"merge-{s}", evaluate_run(seed=s, moves=[(1, 5), (1, 10 + s)])) for s in range(2)]
    runs += [("j", evaluate_run("joint", moves=[(4, 16)])), ("b", evaluate_run(lr=1))]
    runs[3][1]["gate_failed"] = ["ka fell"]
    text = evaluate.report(runs)
    head, theta_0, row = (re.split(r"  +", line) for line in text.splitlines()[:3])
    assert theta_0 == ["theta_0", "30.0", "80.0", "49.0"]
    expected = {"run": "merge", "KA": "40.5 +- 0.7", "KA change": "+10.5 +- 0.7", "tasks": "2",
                "above line": "+6.5 +- 0.7", "earlier": "60.5 +- 0.7", "parameters": "1,234",
                "steps": "10", "forgetting": "0.5 +- 0.0"}  # fmt: skip
    assert expected.items() <= dict(zip(head, row)).items()
    assert re.search("b has the best GM; one seed says .*\nb ships its old weights: ka fell", text)
    markdown = evaluate.report(runs, style="markdown").splitlines()[:6]
    assert {line.count("|") for line in markdown} == {len(head) + 1}
    assert json.loads(evaluate.report(runs, style="json"))["lines"][2]["above_line"]["n"] == 1
    runs[2:] = [(f"c-{s}", evaluate_run(seed=s, moves=[(0, 8)], lr=5)) for s in range(2)]
    assert re.search("merge has the best GM, c the next .* in 2 of 2 seeds", evaluate.report(runs))


def test_a_run_that_another_continues_is_in_that_ones_rows_and_logs_tell_of_tasks(tmp_path):
    first = evaluate_run()
    second = evaluate_run(moves=[(1, 10), (2, 20), (3, 22)])
    second |= {"parent": {"folder": "x", "weights_sha256": "0"}, "weights_sha256": "1"}
    anew = evaluate_run(moves=[(1, 10), (3, 22)], lr=2)
    anew |= {"parent": second["parent"], "weights_sha256": "2"}
    anew |= {"before": first["theta_0"] | {"ka": 31.0, "task": 1}, "tasks": anew["tasks"][1:]}
    anew["before"]["datasets"] = anew["theta_0"]["datasets"] | {"A0": 32.0}
    log = [{"event": "step", "task": 1}, {"event": "within", "task": 2, "step": 2, "ka": 5}]
    for name, results in (("x", first), ("y", second), ("z", anew)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    (tmp_path / "x" / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    runs = [(tmp_path / name, evaluate.read_results(tmp_path / name)) for name in "xyz"]
    assert runs[0][1]["within"] == [{**log[1], "task": 1.4}]
    lines = {line.name: line.track("task")[0].tolist() for line in evaluate.compare(runs)}
    assert lines == {"y": [[0, 30], [1, 40], [2, 50], [3, 52]], "z": [[0, 30], [1, 31], [2, 52]]}
    runs = [("x", first), ("z", anew | {"test_sha256": "1"})]
    assert "z: rows up to task 1 are on other test data" in evaluate.report(runs)
    with pytest.raises(ValueError, match="x, y"):
        evaluate.compare([("x", first), ("y", evaluate_run() | {"test_sha256": "1"})])


def test_what_runs_and_evaluate_print_names_scores_changes_and_classes():
    run = evaluate_run(moves=[(2, 10), (78, -26)])
    row = evaluate.run_row(2, 5, run["tasks"][1], run["tasks"][0])
    guess, head, *earlier_rows = evaluate.run_head(run).splitlines()
    assert [line.split()[0] for line in earlier_rows] == ["theta_0", "1", "2"]
    assert row.split()[2:6] == ["4.0", "(-36.0)", "2.0", "(-76.0)"]
    assert row.endswith("earlier 19.0 -> 24.0, new 19.0 -> 24.0") and "KA 1.5, ZS 2.0," in guess
    assert row.index("4.0") + 3 == head.index("KA") + 2  # numbers end below their heads
    assert evaluate.run_row(1, 5, evaluate_run(zs=False)["tasks"][0]).split() == ["1", "5", "40.0"]
    words = evaluate.words(run)
    assert words[0].startswith("against theta_0: KA -26.0, ZS -78.0, GM")
    assert words[2] == ("classes gained most: cup of A0 5.0 -> 90.0; lost most: mug of A0 93.3 ->"
                        " 10.0, jar of A0 50.0 -> 49.0")  # fmt: skip
    assert len(words) == 4 and words[3].startswith("ZS")  # below twice chance; KA is not
    run |= {"before": run["final"], "per_class": {"before": {}, "final": {}}}
    assert [line.count("none") for line in evaluate.words(run)[1:3]] == [2, 2]
    weights = F.normalize(evaluate_normal(6, 8), dim=-1)
    labels = np.arange(60) % 6
    scores = {"A": evaluate.classification(weights[labels], weights, labels),
              "B": evaluate.retrieval(weights, weights, range(6))}  # fmt: skip
    guessed = evaluate.classification(torch.ones(60, 8), 0 * weights, labels)
    rows = evaluate.score_table(scores, {"A": "KA", "B": "ZS"}, {"A": guessed}).splitlines()
    assert re.findall(r"\S\d+\.\d", rows[1]) == ["100.0", "16.7", "100.0", "100.0", "16.7", "+83.3"]
    assert rows[2].split() == ["B", "ZS", "R@5", "100.0", "83.3"]
    assert "change" not in evaluate.score_table(scores, {"A": "KA", "B": "ZS"})
    scores["A"]["per_class"][2:4] = [50.0, None]
    rows = evaluate.class_table(scores["A"], list("aabcde"), guessed).splitlines()
    assert rows[1].split() == ["b", "50.0", "16.7", "+33.3"] and len(rows) == 6


@pytest.mark.parametrize(("call", "name"), [
    *((lambda n, bad=bad: evaluate.recall_at_k(bad * torch.eye(4), torch.eye(4), range(4)), "fini")
      for bad in (math.nan, math.inf)),
    *((lambda n, labels=labels: evaluate.accuracy(torch.ones(3, 4), torch.eye(4), labels), "label")
      for labels in ([0] * 2, [0, 0, 4], [0, 0, -1], [])),
    *((lambda n, text=text: evaluate.read_templates(n(text)), name)
      for text, name in (("a {}\n# photo", "# photo"), ('["a {}", 3]', "'3'"), ("", "json"))),
    (lambda n: evaluate.check_gate("zs >= -1", ["A"], []), "zs"),
    (lambda n: evaluate.check_gate("B >= -1", ["A"], ["A"]), "B"),
    (lambda n: evaluate.check_gate("earlier >= -1", ["A"], ["A"], False), "earlier"),
    *((lambda n, gate=gate: evaluate.conditions(gate), gate)
      for gate in ("zs", "zs >= x", ">= 3", "zs >= -1,", "zs = 1", "zs >= 1 2")),
    *((lambda n, text=text: evaluate.read_results(n(text).parent), "results.json")
      for text in ("", "[]", "{", '{"theta_0": 1}', "null", '{"tasks": []}')),
    (lambda n: evaluate.read_results("nowhere"), "nowhere"),
    *((lambda n, more=more: evaluate.report([("a", evaluate_run()), ("b", evaluate_run() | more)]),
       "a, b") for more in ({"theta_0_sha256": "1"}, {"test_sha256": "1"}, {"heldout": ["H0"]},
                            {"config": {"method": "merge", "seed": 0, "score_subset": True}})),
    (lambda n: evaluate.report([]), "none"),
    *((lambda n, points=points: evaluate.plot(points, "no.png"), "nothing")
      for points in ({}, {"a": [(1.0, 1.0), (1.0, math.nan)]}, {"a": [(1.0, math.inf)]})),
])  # fmt: skip
def test_what_evaluate_cannot_use_is_named(call, name, tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(ValueError, match=re.escape(name)):
        call(lambda text: path.write_text(text) * 0 or path)


def evaluate_solid(pixels, colour, size=5):
    """[n, 2] (x, y) of squares of a colour: the inside of marks, not lines."""
    mask = (abs(pixels.astype(int) - np.array(bytearray.fromhex(colour[1:]))) < 8).all(-1)
    windows = np.lib.stride_tricks.sliding_window_view(mask, (size, size))
    return np.argwhere(windows.all((-1, -2)))[:, ::-1] + size // 2


def test_the_plane_has_each_mark_where_the_numbers_put_it(tmp_path):
    ends = {"a": (70, 50), "b": (66, 45), "c": (75, 41), "d": (68, 38.5)}  # ZS, KA
    runs = {name: [[(72, 40), (zs, ka + d)] for d in (-1, 0, 1)] for name, (zs, ka) in ends.items()}
    evaluate.plot({**runs, "joint": [(72, 40), (65, 60)]}, tmp_path / "p.png")
    pixels = np.asarray(Image.open(tmp_path / "p.png"))[:, :690]
    black = evaluate_solid(pixels, "#000000").mean(0)
    across, up = (evaluate_solid(pixels, evaluate.GOLD).mean(0) - black) / (-7, 20)  # of a point
    assert across == pytest.approx(-up, rel=0.02) and across > 10
    for (name, (zs, ka)), colour in zip(ends.items(), evaluate.COLOURS):
        x, y = black + ((zs - 72) * across, (ka - 40) * up)
        assert evaluate_solid(pixels, colour).mean(0) == pytest.approx((x, y), abs=1.5), name
        bar = evaluate_solid(pixels[:, round(x) - 1 : round(x) + 2], colour, 1)[:, 1]
        assert bar.min() == pytest.approx(y + up, abs=2)  # one standard deviation above


def test_curves_and_datasets_are_drawn_to_scale_and_without_zs_there_is_no_plane(tmp_path):
    run = evaluate_run(moves=[(0, 10), (0, 20)], zs=False)
    run["tasks"][-1]["datasets"] |= {"A0": 50.0, "A1": 0.0, "A2": 41.0}  # +21, -30, +10
    heights = []
    for ka in (40.0, 10.0):
        run["within"] = [{"task": 1.5, "ka": ka}, {"task": 2, "ka": 40.0}]
        evaluate.report([("a", run)], tmp_path / "p.png")
        pixels = np.asarray(Image.open(tmp_path / "p.png"))
        blue = evaluate_solid(pixels, evaluate.COLOURS[0], 3)
        x, y = blue[blue[:, 0] > 895].T  # marks of the three datasets
        rows = [x[(low <= y) & (y < low + 180)].mean() for low in (110, 290, 470)]
        assert (rows[0] - rows[1]) / (rows[2] - rows[1]) == pytest.approx(51 / 40, abs=0.02)
        end = blue[(blue[:, 0] < 380) & (blue[:, 0] > 360)][:, 1].min()
        heights.append(evaluate_solid(pixels[:345, :400], "#000000", 7).mean(0)[1] - end)
    assert np.ptp(evaluate_solid(pixels[420:690, :400], evaluate.COLOURS[0], 2)[:, 0]) > 250
    assert pixels.shape[1] < 1300 and heights[1] < 0.6 * heights[0]  # the range goes down to 10


@pytest.mark.parametrize(("lines", "seeds", "tasks"), [(1, 1, 1), (3, 3, 8), (12, 1, 20)])
def test_no_two_words_of_a_picture_overlap(lines, seeds, tasks, tmp_path, monkeypatch):
    written = []
    text = ImageDraw.ImageDraw.text

    def recorded(pen, place, words, fill, font, anchor, **options):
        written.append((words, pen.textbbox(place, words, font, anchor), pen.im.size))
        text(pen, place, words, fill, font, anchor, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", recorded)
    steps = np.random.default_rng(0).normal(size=(lines, seeds, tasks, 2)) + (-0.3, 1)
    tracks = np.concatenate([np.zeros((lines, seeds, 1, 2)), steps.cumsum(2)], 2) + (75, 40)
    name = "a name as long as those of folders that say every option/lr=1e-5,mixture=0-.5-.5 "
    evaluate.plot({f"{name}{i}": track for i, track in enumerate(tracks)}, tmp_path / "p.png")
    names, boxes, sizes = zip(*written)
    assert sum(name.startswith("a name as l") for name in names) == lines
    low, high = np.array(boxes).reshape(-1, 2, 2).swapaxes(0, 1)
    assert low.min() >= 0 and (high <= sizes[0]).all()
    together = (low[:, None] < high) & (low < high[:, None])
    assert together.all(-1).sum() == (low < high).all(-1).sum()  # each with itself


def test_colours_differ_for_every_kind_of_colour_blindness():
    """Machado et al. 2009's matrices for dichromats, distances in CIELAB; 2.3 is just visible."""
    sight = """1 0 0 0 1 0 0 0 1
        0.152286 1.052583 -0.204868 0.114503 0.786281 0.099216 -0.003882 -0.048116 1.051998
        0.367322 0.860646 -0.227968 0.280085 0.672501 0.047413 -0.011820 0.042940 0.968881
        1.255528 -0.076749 -0.178779 -0.078411 0.930809 0.147602 0.004733 0.691367 0.303900
        0.4124564 0.3575761 0.1804375 0.2126729 0.7151522 0.0721750 0.0193339 0.1191920 0.9503041"""
    *sight, to_xyz = np.array(sight.split(), float).reshape(5, 3, 3)
    encoded = np.array([[*bytes.fromhex(colour[1:])] for colour in evaluate.COLOURS]) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    for matrix in sight:  # all cones, protanopia, deuteranopia, tritanopia
        xyz = np.clip(linear @ matrix.T, 0, 1) @ to_xyz.T
        x, y, z = np.cbrt(xyz / (0.95047, 1, 1.08883)).T
        lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)
        assert (np.linalg.norm(lab[:, None] - lab, axis=-1) + 1e9 * np.eye(len(lab))).min() > 14


# ---------------------------------------------------------------------------------------- fomo.py

HERE = Path(fomo.__file__).parent
FOMO_CLIP = clip.CLIPConfig(16, 32, 16, 32, 1, 2, 64, 24, 258, 32, 1, 2, 64)  # reads bytes, as tiny
FOMO_SETS = {"CARS": ["bus", "cab", "car", "van"], "HELD": ["one", "six", "two"],
             "PETS": ["cat", "dog", "emu", "fox"]}  # fmt: skip
FOMO_STREAM = [(d, FOMO_SETS[d][k]) for k in range(4) for d in ("CARS", "PETS")]
FOMO_STEPS = "--weights w.safetensors --cache cache --batch-size 8 --lr 1e-2 --workers 0 --steps 3"
FOMO_RUN = f"--data flux --heldout HELD --pool HELD --tasks 2 {FOMO_STEPS}"
FOMO_WHOLE = f"{FOMO_RUN} --method offline-merge --stream stream.json"
FOMO_MONTH = f"--data pics --heldout HELD --mixture 0/.5/.5 --tasks 2 {FOMO_STEPS}"


def fomo_pictures(root, dataset, classes, numbers=range(4), splits=("train", "test")):
    """Class folders of noisy pictures <number>.png, a colour a class, each of its own size."""
    for name, split, n in itertools.product(classes, splits, numbers):
        file = Path(root, dataset, split, name, f"{n}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        colour = np.random.default_rng([*name.encode()]).integers(0, 256, 3)
        noise = np.random.default_rng((n, len(split))).integers(-90, 90, (8 + n, 9, 3))
        Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8)).save(file)


def fomo_annotate(root):
    """00_info, which makes class folders FoMo-in-Flux's layout; HELD becomes a tar."""
    (root / "00_info").mkdir()
    for (dataset, classes), split in itertools.product(FOMO_SETS.items(), ("train", "test")):
        items = {f"{split}/{c}/{n}.png": {"target": k, "primer_caption": f"a {c}.",
                                          "synthetic_merged_caption": [f"{c} number {n}"]}
                 for k, c in enumerate(classes) for n in range(4)}  # fmt: skip
        (root / f"00_info/{dataset}_{split}.json").write_text(json.dumps(items))
        (root / f"00_info/{dataset}_classnames.json").write_text(json.dumps(classes))
    shutil.make_archive(root / "HELD", "tar", root, "HELD")
    shutil.rmtree(root / "HELD")


def fomo_model(path, seed=0):
    torch.manual_seed(seed)
    clip.save(clip.CLIP(FOMO_CLIP), path)


def fomo_main(command):
    """-> exit status."""
    try:
        return fomo.main(shlex.split(command))
    except SystemExit as end:
        return end.code


def fomo_run(out, options="", base=FOMO_RUN, code=0):
    """-> what the run wrote in results.json, if it came to its end."""
    assert fomo_main(f"{base} {options} --out {out}") == code
    return fomo_json(f"{out}/results.json") if code in (0, 3) else None


def fomo_json(path):
    return json.loads(Path(path).read_text())


def fomo_rows(out, event="step"):
    rows = map(json.loads, Path(out, "log.jsonl").read_text().splitlines())
    return [{**row, "seconds": 0} for row in rows if row["event"] == event]


def fomo_weights(path):
    tensors = clip.read_tensors(f"{path}.safetensors")
    return {key: tensors[key] for key in tensors}


def fomo_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def fomo_same(*runs):
    """Two runs with the same scores and, to the bit, the same weights."""
    results = [fomo_json(f"{out}/results.json") for out in runs]
    scores = [[r[k] for k in ("theta_0", "tasks", "final")] for r in results]
    return scores[0] == scores[1] and fomo_equal(*(fomo_weights(f"{out}/model") for out in runs))


def fomo_spy(patch, owner, name, note):
    """note(*arguments) is called before each call of the function."""
    function = getattr(owner, name)
    both = lambda *args, **options: [note(*args), function(*args, **options)][1]
    patch.setattr(owner, name, both)


def fomo_at_step(patch, n, action):
    """action() is called when the run takes its n-th step, from 1."""
    calls = itertools.count(1)
    fomo_spy(patch, clip, "backward", lambda *_: action() if next(calls) == n else None)


def fomo_stop(n, out, options="", base=FOMO_RUN, number=signal.SIGTERM):
    """The run is stopped by a signal in its n-th step."""
    with pytest.MonkeyPatch.context() as patch:
        fomo_at_step(patch, n, lambda: os.kill(os.getpid(), number))
        fomo_run(out, options, base, 128 + number)


def fomo_refused(capsys, command, name):
    """The command ends with a sentence that holds the name."""
    capsys.readouterr()
    assert fomo_main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fomo") and name in error, error


@pytest.fixture(scope="module")
def fomo_template(tmp_path_factory):
    """Data in two layouts, a model, a run that ended, one that was stopped, and a first month's."""
    folder = tmp_path_factory.mktemp("fomo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fomo_model("w.safetensors")
        data.write_stream(FOMO_STREAM, "stream.json")
        for root, (dataset, classes) in itertools.product(("flux", "pics"), FOMO_SETS.items()):
            fomo_pictures(root, dataset, classes)
        shutil.rmtree("pics/CARS")
        fomo_annotate(Path("flux"))
        fomo_run("whole", base=FOMO_WHOLE)
        fomo_stop(5, "cut", base=FOMO_WHOLE)
        fomo_run("m1", "--method offline-merge", FOMO_MONTH)
    return folder


@pytest.fixture
def home(fomo_template, tmp_path, monkeypatch):
    """A copy of the template as the current folder. Runs draw no picture, a third of their time."""
    shutil.copytree(fomo_template, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setattr(evaluate, "plot", lambda runs, path, *_: Path(path).touch())
    return tmp_path / "home"


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """The drawn world of few pictures, and an empty current folder."""
    world = data.toy(train=24, test=16)
    monkeypatch.setattr(data, "toy", lambda *_: world)
    monkeypatch.chdir(tmp_path)
    return world


def test_a_run_writes_rows_that_follow_from_the_scores_of_its_classes(home):
    results = fomo_json("whole/results.json")
    assert {*os.listdir("whole")} == {"config.json", "log.jsonl", "results.json", "picture.png",
                                      "model.safetensors", "state.pt", "experts"}  # fmt: skip
    steps = [(row["task"], row["step"]) for row in fomo_rows("whole")]
    assert steps == [*itertools.product((1, 2), range(3))]
    logged = fomo_rows("whole", "evaluation")
    for row, log in zip([results["theta_0"], *results["tasks"]], logged, strict=True):
        scores = row["datasets"]
        assert row["ka"] == pytest.approx((scores["PETS"] + scores["CARS"]) / 2)
        assert row["zs"] == scores["HELD"]
        assert row["gm"] == pytest.approx(math.sqrt(row["ka"] * row["zs"]))
        for name, per_class in log["per_class"].items():  # four pictures a class
            assert np.mean([*per_class.values()]) == pytest.approx(scores[name])
    assert results["tasks"][0]["earlier"] is results["tasks"][0]["new"] is None
    for key, chunk in zip(("earlier", "new"), data.tasks(FOMO_STREAM, 2)):
        for name, log in ((key, logged[2]), (f"{key}_before", logged[1])):
            means = [np.mean([log["per_class"][d][c] for e, c in chunk if e == d])
                     for d in ("PETS", "CARS")]  # fmt: skip
            assert results["tasks"][1][name] == pytest.approx(np.mean(means))
    assert len({row["ka"] for row in logged}) > 1  # else nothing was compared
    assert results["chance"]["ka"] == 25 and results["chance"]["zs"] == pytest.approx(100 / 3)
    assert np.asarray(Image.open("whole/picture.png")).std() > 1
    command = "evaluate --data flux --heldout HELD --workers 0 --weights whole/model.safetensors"
    assert fomo_main(f"{command} --out s.json") == 0
    final = results["final"]
    assert all(fomo_json("s.json")[key] == final[key] for key in ("ka", "zs", "gm", "datasets"))


def test_scores_are_those_of_the_checkpoint_computed_plainly(drawn, capsys):
    """Top-1 with templates, and R@5 both ways, from clip.py's forward."""
    Path("t.txt").write_text('"a photo of {}.",\nsome {}\n')
    command = f"evaluate --weights {fomo.THETA_0} --workers 0"
    assert fomo_main(f"{command} --out plain.json") == 0
    more = "--templates t.txt --baseline plain.json --per-class --out s.json"
    assert fomo_main(f"{command} {more}") == 0
    scores = fomo_json("s.json")["datasets"]
    model = clip.load(fomo.THETA_0).requires_grad_(False)

    def texts(strings):
        tokens = clip.Tokenizer()([*strings], model.config.context_length)
        return F.normalize(model.encode_text(tokens), dim=-1)

    mean, std = (torch.tensor(v)[:, None, None] for v in (clip.MEAN, clip.STD))
    for d in drawn.adaptation + drawn.heldout:
        x = torch.from_numpy(np.stack([d.test.image(i) for i in range(16)])).permute(0, 3, 1, 2)
        image = F.normalize(model.encode_image((x / 255 - mean) / std), dim=-1)
        if d.kind == "classification":
            text = sum(texts(t.format(c) for c in d.classes) for t in ("a photo of {}.", "some {}"))
            hits = (image @ F.normalize(text, dim=-1).T).argmax(1).numpy() == d.test.labels
        else:
            similar = image @ texts(d.test.captions).T
            hits = np.array([k in row.topk(5).indices for way in (similar, similar.T)
                             for k, row in enumerate(way)])  # fmt: skip
        assert scores[d.name] == pytest.approx(100 * hits.mean(), abs=1e-9), d.name
    old = fomo_json("plain.json")["datasets"]["SKETCHES"]
    said = capsys.readouterr().out
    assert re.search(rf"\nSKETCHES .* {scores['SKETCHES']:.1f} .* {old:.1f} ", said)
    assert "\nred circle " in said  # a class


def test_scores_on_other_pictures_or_classes_are_not_compared(home, capsys):
    fomo_pictures("pics", "BIRDS", ["owl", "tit"])
    fomo_pictures("pics", "FISH", ["cod", "eel"])
    command = "evaluate --weights w.safetensors --workers 0 --data pics --per-class"
    assert fomo_main(f"{command} --out old.json") == 0
    fomo_pictures("pics", "BIRDS", ["hen"])
    Path("pics/FISH/test/cod/3.png").rename("pics/FISH/test/cod/4.png")
    capsys.readouterr()
    assert fomo_main(f"{command} --baseline old.json --out new.json") == 0
    said = capsys.readouterr().out
    assert all(f"{name}: not compared, old.json" in said for name in ("BIRDS", "FISH"))
    changes = re.findall(r"^(\w+) +KA +top-1.*?(\+0\.0)?$", said, re.MULTILINE)
    assert changes == [("BIRDS", ""), ("FISH", ""), ("HELD", "+0.0"), ("PETS", "+0.0")]


def test_the_loop_calls_every_hook_in_its_place_with_what_the_options_say(home, monkeypatch):
    """The penalty outweighs the loss, is in the clipped gradient, and once, not once a piece."""
    calls = []

    class Recorder(methods.Method):
        def optimizer(self, model, **options):
            calls.append("optimizer")
            self.made = super().optimizer(model, **options)
            return self.made

        def load(self, model, weights):
            calls.append("load")
            super().load(model, weights)

        def before_task(self, model, task):
            calls.append(f"before {task}")

        def penalty(self, model):
            calls.append("penalty" if model.training else "penalty while scoring")
            return 1e6 * model.logit_scale

        def after_backward(self, model, lr):
            norm = math.sqrt(sum(p.grad.square().sum().item() for p in self.trained.values()))
            assert [norm, model.logit_scale.grad.item()] == pytest.approx([1, 1])  # clipped
            task, step = divmod(calls.count("step"), 3)
            rate = methods.learning_rate(step, 3, task, 2e-3, "rsqrt", "autoregressive")
            assert {lr, *(group["lr"] for group in self.made.param_groups)} == {rate}
            assert {group["weight_decay"] for group in self.made.param_groups} == {0.3, 0.0}
            calls.append("step")

        def after_task(self, model, batches, loss):
            own = {name for _, name in FOMO_STREAM[4 * calls.count("after") :][:4]}
            calls.append("after")
            for batch, n in batches:
                model.zero_grad()
                assert n == 8 and torch.isfinite(loss(model, batch))
                assert all(p.grad is not None for p in self.trained.values())
                assert {caption.split()[0] for caption in batch[1]} <= own

    monkeypatch.setitem(methods.METHODS, "finetune", Recorder)
    options = "--method finetune --stream stream.json --weight-decay .3 --lr 2e-3 --micro-batch 3"
    fomo_run("run", f"{options} --schedule rsqrt --meta autoregressive")
    task = ["optimizer", *["penalty", "step"] * 3, "after"]
    assert calls == ["load", "before 0", *task, "before 1", *task]  # it goes on where it is
    assert fomo_rows("run")[0]["grad_norm"] == pytest.approx(1e6, rel=1e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_batches_are_those_of_the_mixture_that_the_options_name(home, monkeypatch, seed):
    batches = []
    fomo_spy(monkeypatch, clip, "backward", lambda *args: batches.append(args[3]))
    options = "--method finetune --mixture .25/.5/.25 --replay 5 --order dataset"
    fomo_run("run", f"{options} --seed {seed}")
    world = data.open_world("flux", heldout=["HELD"], pool=["HELD"])
    chunks = data.tasks(data.order(data.concepts(world.adaptation), "dataset", seed), 2)
    mixture = data.Mixture(world, chunks, 8, (0.25, 0.5, 0.25), 5, seed)
    splits = {d.name: d.train for d in world.adaptation} | {"pool": world.pool}
    expected = [[splits[name].captions[i] for name, i in mixture.ids(task, step)]
                for task in range(2) for step in range(3)]  # fmt: skip
    assert batches == [[*np.ravel(captions)] for captions in expected] and len({*batches[5]}) > 4


def test_merge_is_the_moving_average_of_what_the_tasks_end_with(home, monkeypatch):
    starts = []
    ends = []
    fomo_spy(monkeypatch, methods.Method, "load", lambda self, model, start: starts.append(start))
    fomo_spy(monkeypatch, merge.Timeline, "add", lambda self, end: ends.append(end))
    fomo_run("run", "--tasks 3 --merge-weight .8")
    mean = {name: value.double() for name, value in fomo_weights("w").items()}
    for end, merged in zip(ends, [*starts[1:], fomo_weights("run/model")], strict=True):
        mean = {name: 0.8 * value + 0.2 * end[name].double() for name, value in mean.items()}
        for name, value in mean.items():  # a task starts from the merge, in float32
            torch.testing.assert_close(merged[name].double(), value, rtol=1e-6, atol=1e-7)


def test_fp16_clips_the_true_gradient_and_a_step_that_overflows_leaves_no_trace(home, monkeypatch):
    """And the temperature is clamped, after a step that was taken."""
    model = clip.load("w.safetensors")
    model.logit_scale.data.fill_(clip.MAX_LOGIT_SCALE + 1)
    clip.save(model, "hot.safetensors")
    scaler = torch.amp.GradScaler
    for name, precision, scale in (("a", "fp32", 1), ("b", "fp16", 256), ("c", "fp16", 2.0**60)):
        scaled = lambda *args, s=scale, **more: scaler(*args, init_scale=s, **more)
        monkeypatch.setattr(torch.amp, "GradScaler", scaled)
        fomo_run(name, f"--method si --weights hot.safetensors --precision {precision}")
    a, b, c = (fomo_rows(name) for name in "abc")
    assert b[0]["grad_norm"] == pytest.approx(a[0]["grad_norm"], rel=0.02)  # half has 3 digits
    assert {row["logit_scale"] for row in c} == {a[0]["logit_scale"]}  # float32's ln 100
    assert max(row["logit_scale"] for row in a) <= clip.MAX_LOGIT_SCALE + 1e-6
    omega = [torch.load(f"{name}/state.pt")["method"]["omega"].values() for name in "ac"]
    assert [any(t.any() for t in one) for one in omega] == [True, False]  # no step of six was taken
    weights = fomo_weights("c/model") | {"logit_scale": model.logit_scale}
    assert fomo_equal(weights, model.state_dict())


def test_joint_trains_once_on_everything_and_zero_shot_never(home, capsys):
    joint = fomo_run("joint", "--method joint")
    zero = fomo_run("zero", "--method zero-shot")
    assert [(row["steps"], row["concepts"]) for row in joint["tasks"]] == [(6, 8)]
    assert zero["tasks"] == [] and zero["theta_0"] == joint["theta_0"]
    assert fomo_equal(fomo_weights("zero/model"), fomo_weights("w"))
    assert fomo_main("report joint zero whole cut -o r.png") == 0
    for method in ("joint", "zero"):
        fomo_refused(capsys, f"--continue {method}", method)


def test_rows_are_on_the_same_samples_and_scoring_within_a_task_changes_nothing(home, monkeypatch):
    seen = []
    fomo_spy(monkeypatch, evaluate, "classification", lambda image, *_: seen.append(len(image)))
    monkeypatch.setattr(evaluate, "balanced_subset", lambda labels, seed: np.arange(7 + seed))
    fomo_run("plain", "--method zs-merge")
    fomo_run("some", "--method zs-merge --seed 2 --score-subset")
    assert seen == [16, 16, 12] * 3 + [9] * 9
    fomo_run("within", "--method zs-merge --eval-every 2")
    assert fomo_same("within", "plain") and fomo_rows("within", "within")[-1]["step"] == 2


def test_the_budget_buys_what_it_says(home):
    """Steps, and EWC's pass of a task, times what they cost: the stream's GFLOPs, rounded."""
    results = fomo_run("run", base=FOMO_RUN.replace("--steps 3", "--budget .4 --method ewc"))
    memory = budget.memory_multiplier(FOMO_CLIP, 8, "ewc") / 1e9
    step = budget.step_flops(FOMO_CLIP, 8, "ewc") * memory
    spent = len(fomo_rows("run")) * step + 2 * budget.task_flops(FOMO_CLIP, 8, "ewc", 16) * memory
    assert results["gflops_spent"] == pytest.approx(spent) and abs(spent - 0.4) <= step


# --------------------------------------------------------------------------------- stop and go on


class Killed(BaseException):
    """Nobody handles it: as a SIGKILL, it leaves a log beyond the state."""


FOMO_KINDS = {  # each kind of state, and all of TIME's grid: options, tasks of each of the runs
    **{f"{init}/{deploy}": ((f"--method finetune --merge-init {init} --merge-deploy {deploy}"
                             " --merge-technique ties --merge-options density=.5"), (2, 1))
       for init, deploy in itertools.product(merge.SOURCES, merge.SOURCES[1:])
       if {init, deploy} & {"ema", "all"}},
    "zero-shot/latest": ("--method finetune --merge-init zero-shot", (2, 1)),
    "finetune": ("--method finetune --schedule rsqrt --meta autoregressive", (5, 3)),
    "merge": ("--method merge --meta dynamic", (2, 1, 1)),
    "wise-ft": ("--method wise-ft", (2, 1, 1)),
    "growing": ("--method offline-merge --merge-options expert_weights=sqrt", (2, 1)),
    "lora": ("--method lora --schedule rsqrt --meta continued", (2, 1, 1)),
    "ewc": ("--method ewc", (2, 1, 1)),
    "si": ("--method si --schedule rsqrt --meta recovered", (2, 1)),
    "galore": ("--method galore --method-options gap=2 rank=4", (2, 1)),
    "fp16": ("--method locked-text --precision fp16", (1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["ema/ema", "all/all", *[*FOMO_KINDS][-5:], "wise-ft"])
def test_a_run_stopped_and_killed_anywhere_ends_as_one_that_was_not(kind, home, monkeypatch):
    """At moments drawn at random, while it trains, scores, merges and writes, again and again: the
    same weights and scores to the bit, and not one step lost or repeated."""
    run = f"{FOMO_RUN} {FOMO_KINDS[kind][0]} --eval-every 2"
    fomo_run("once", base=run)
    monkeypatch.setattr(fomo, "SAVE_EVERY", 0)
    rng = random.Random(kind)
    left = lives = 0

    def interrupt(*_):
        nonlocal left
        left -= 1
        if left == 0 and (lives % 3 == 2 or signal.getsignal(signal.SIGTERM) == signal.SIG_DFL):
            raise Killed
        if left == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    for owner, name in ((clip, "backward"), (evaluate, "classification"), (torch, "save"),
                        (merge.Timeline, "add"), (os, "replace"), (os, "fsync")):  # fmt: skip
        fomo_spy(monkeypatch, owner, name, interrupt)
    while not Path("often/results.json").exists():
        left = rng.randint(5, 16)
        lives += 1
        try:
            assert fomo_main(f"{run} --out often") in (0, 143)
        except Killed:
            Path("often/state.pt.part").write_bytes(b"half")
    assert lives > 3 and fomo_same("often", "once")
    for event in ("step", "within", "evaluation"):
        assert fomo_rows("often", event) == fomo_rows("once", event)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143),
                                          (signal.SIGHUP, 129)])  # fmt: skip
def test_a_signal_stops_a_run_and_the_same_command_goes_on(home, monkeypatch, capsys, number, code):
    """Meanwhile another process is refused the folder."""
    old = signal.getsignal(number)
    fomo_at_step(monkeypatch, 2, lambda: fomo_refused(capsys, f"{FOMO_WHOLE} --out run", "run"))
    fomo_stop(3, "run", base=FOMO_WHOLE, number=number)
    assert 128 + number == code and number.name in "".join(capsys.readouterr())
    assert len(fomo_rows("run")) == 3 and signal.getsignal(number) == old
    os.truncate("run/log.jsonl", 0)  # as a power cut may leave it
    fomo_run("run", base=FOMO_WHOLE)
    assert len(fomo_rows("run")) == 3 and evaluate.read_results("run")
    assert fomo_same("run", "whole") and fomo_rows("run") == fomo_rows("whole")[3:]


def test_nohup_holds_and_a_stream_and_new_names_tell_what_they_leave_out(home, capsys):
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    data.write_stream(FOMO_STREAM[:6], "short.json")
    with pytest.MonkeyPatch.context() as patch:
        fomo_at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGHUP))
        fomo_run("run", "--stream short.json")
    signal.signal(signal.SIGHUP, old)
    assert "short.json leaves out 2 concepts" in capsys.readouterr().out
    fomo_pictures("pics", "PETS", ["yak"], range(4))
    Path("pics/PETS/classnames.json").write_text('{"cat": "tabby"}')
    fomo_run("m2", base="--continue m1 --gate 'earlier >= -99'")
    assert "cat of PETS was taught and is no longer scored" in capsys.readouterr().out


def fomo_edit(name, change):
    path = Path(f"flux/00_info/{name}.json")
    tree = fomo_json(path)
    change(tree)
    path.write_text(json.dumps(tree))


def fomo_item(**change):
    return lambda: fomo_edit("PETS_train", lambda tree: tree["train/cat/3.png"].update(change))


def fomo_flip(path):
    *whole, last = Path(path).read_bytes()
    Path(path).write_bytes(bytes([*whole, last ^ 1]))


FOMO_CAT = "flux/PETS/train/cat/0.png"
FOMO_EXPERT = "cut/experts/expert-001.safetensors"
FOMO_CHANGES = {  # what is done between a stop and the next start, options, the name that is told
    "a picture": (lambda: os.utime(FOMO_CAT, (1, 1)), "", "training data"),
    "a test picture": (lambda: os.utime("flux/PETS/test/cat/0.png", (1, 1)), "", "test data"),
    "a label": (fomo_item(target=1), "", "training data"),
    "a caption": (fomo_item(synthetic_merged_caption=["x"]), "", "training data"),
    "a prompt": (fomo_item(primer_caption="x"), "", "test data"),
    "a class's name": (lambda: fomo_edit("CARS_classnames", list.reverse), "", "test data"),
    "a tar": (lambda: os.utime("flux/HELD.tar", (1, 1)), "", "test data"),
    "the stream": (lambda: data.write_stream(FOMO_STREAM[::-1], "stream.json"), "", "stream"),
    "the weights": (lambda: fomo_model("w.safetensors", 1), "", "weights"),
    "an option": (lambda: None, "--lr 1e-4", "--lr was 0.01, is 0.0001"),
    "threads": (lambda: torch.set_num_threads(2), "", "threads"),
    "an expert": (lambda: fomo_flip(FOMO_EXPERT), "", FOMO_EXPERT),
    "half an expert": (lambda: os.truncate(FOMO_EXPERT, 2000), "", FOMO_EXPERT),
    "no expert": (lambda: os.unlink(FOMO_EXPERT), "", FOMO_EXPERT),
    "half a state": (lambda: os.truncate("cut/state.pt", 2000), "", "cut/state.pt"),
}


@pytest.mark.parametrize("how", FOMO_CHANGES)
def test_no_change_of_input_after_a_stop_passes_silently(how, home, capsys):
    change, options, name = FOMO_CHANGES[how]
    change()
    before = {path: path.read_bytes() for path in Path("cut").glob("*.*")}
    fomo_refused(capsys, f"{FOMO_WHOLE} --out cut {options}", name)
    torch.set_num_threads(1)
    assert before == {path: path.read_bytes() for path in before} and len(before) == 3


@pytest.mark.parametrize("out, files", [
    ("mine", {"log.jsonl": "mine"}), ("mine", {"config.json": '{"model_type": "clip"}'}),
    ("mine", {"thesis.txt": "all of it"}), ("whole", {})])  # fmt: skip
def test_a_folder_that_is_no_unfinished_run_stays_as_it_was(home, capsys, out, files):
    Path(out).mkdir(exist_ok=True)
    for name, text in files.items():
        Path(out, name).write_text(text)
    before = {path: path.read_bytes() for path in Path(out).rglob("*.*")}
    fomo_refused(capsys, f"{FOMO_WHOLE} --out {out}", out)
    assert {path: path.read_bytes() for path in Path(out).rglob("*.*")} == before


@pytest.mark.parametrize("owner, name, error", [  # of the system, and what torch makes of it
    (os, "fsync", OSError(28, "No space left on device")),
    (torch, "save", RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 46"))])
def test_a_full_disk_is_named_and_loses_nothing(home, monkeypatch, capsys, owner, name, error):
    """In each life a later write fails."""
    writes = itertools.count(1)
    life = 0

    def full(*_):
        if next(writes) == life:
            raise error

    fomo_spy(monkeypatch, owner, name, full)
    while not Path("run/results.json").exists():
        life += 1
        writes = itertools.count(1)
        if fomo_main(f"{FOMO_WHOLE} --out run"):
            assert re.match("fomo: .*(disk|space)", capsys.readouterr().err.splitlines()[-1])
            assert not [*Path("run").rglob("*.part")]
    assert life > 2 and fomo_same("run", "whole") and fomo_rows("run") == fomo_rows("whole")


def test_broken_pictures_are_replaced_and_named_once_and_too_many_end_the_run(home, capsys):
    fomo_pictures("many", "A", ["cat", "dog"], range(110))
    fomo_pictures("many", "HELD", ["one", "two"], range(2))
    bad = sorted(Path("many/A/train").rglob("*.png"))[::2]
    for file in bad:
        os.truncate(file, 60)
    base = FOMO_MONTH.replace("pics", "many") + " --method finetune --tasks 1 --batch-size 55"
    fomo_run("run", base=base)
    faults = [row["fault"] for row in fomo_rows("run", "broken picture")]
    assert len(faults) == len({*faults}) and 70 < len(faults) < 101
    assert all(any(str(file) in fault for file in bad) for fault in faults)
    fomo_stop(2, "more", "--steps 4", base)  # those of before the stop count, too
    fomo_refused(capsys, f"{base} --steps 4 --out more", "many/A/train")
    faults = [row["fault"] for row in fomo_rows("more", "broken picture")]
    assert len(faults) == len({*faults}) > 100 and Path("more/state.pt").exists()


def test_a_loss_that_is_not_finite_ends_the_run(home, capsys):
    fomo_refused(capsys, f"{FOMO_RUN} --lr 1e30 --out run", "--lr")
    assert not math.isfinite(fomo_rows("run")[-1]["loss"]) and Path("run/state.pt").exists()


# -------------------------------------------------------------------------------- the next update

@pytest.mark.parametrize("name", FOMO_KINDS)
def test_tasks_at_once_and_in_several_runs_end_the_same(name, home):
    """Weights, scores and all rows, to the bit; some are stopped in their last run's midst."""
    options, parts = FOMO_KINDS[name]
    chunks = data.tasks(FOMO_STREAM, sum(parts))
    fomo_run("once", f"{options} --steps 2 --stream stream.json --tasks {sum(parts)}")
    for k, n in enumerate(parts):
        data.write_stream(itertools.chain(*chunks[:n]), f"{k}.json")
        del chunks[:n]
        base = f"--continue u{k - 1}" if k else f"{FOMO_RUN} {options} --steps 2"
        before = {path: path.read_bytes() for path in Path(".").glob("u*/*.*")}
        if not chunks and "/" not in name:
            fomo_stop(2, f"u{k}", f"--stream {k}.json --tasks {n}", base)
        fomo_run(f"u{k}", f"--stream {k}.json --tasks {n}", base)
        assert before == {path: path.read_bytes() for path in before}  # they are only read
    assert fomo_same("once", f"u{k}")
    assert not fomo_equal(fomo_weights("u0/model"), fomo_weights("once/model"))


def fomo_seen(out):
    """Samples of each task of a run and those before it."""
    return np.diff(torch.load(f"{out}/state.pt")["seen_samples"]["ends"]).tolist()


def fomo_yak():
    fomo_pictures("pics", "PETS", ["yak"], range(4))


def test_months_of_class_folders(home, monkeypatch, capsys):
    """New pictures, then a new class and a new dataset, and then an old one goes."""
    fomo_pictures("pics", "PETS", ["cat"], range(20, 30), ["train"])
    first = fomo_json("m1/results.json")
    batches = []
    fomo_spy(monkeypatch, clip, "backward", lambda *args: batches.append([*args[3]]))
    second = fomo_run("m2", base="--continue m1")
    assert {caption for batch in batches for caption in batch[:4]} == {"A photo of a cat."}
    assert len({caption for batch in batches for caption in batch[4:]}) == 4  # the buffer's
    assert fomo_seen("m1") == [8, 8] and fomo_seen("m2") == [8, 8, 10]
    assert second["theta_0"] == first["theta_0"] and second["tasks"][:2] == first["tasks"]
    row = second["tasks"][2]  # the test data are the same: one table
    assert (row["task"], row["concepts"], row["steps"]) == (3, 1, 3) and second["before"] is None
    old, now = (results["per_class"]["final"]["PETS"] for results in (first, second))
    assert row["earlier_before"] == pytest.approx(np.mean([*old.values()]))
    assert row["earlier"] == pytest.approx(np.mean([*now.values()]))
    assert (row["new_before"], row["new"]) == (old["cat"], now["cat"])
    assert second["parent"]["weights_sha256"] == first["weights_sha256"]
    assert Path(second["parent"]["folder"]) == home / "m1"
    fomo_yak()
    fomo_pictures("pics", "CARS", ["bus", "van"], range(4))
    third = fomo_run("m3", base="--continue m2")
    assert fomo_seen("m3") == [8, 8, 10, 12]
    rows = [third["theta_0"], third["before"], *third["tasks"]]  # others: the table begins here
    assert [{*row["datasets"]} for row in rows] == [{"PETS", "CARS", "HELD"}] * 3
    assert [row["task"] for row in third["tasks"]] == [4]
    assert {*third["per_class"]["before"]["PETS"]} == {*FOMO_SETS["PETS"], "yak"}
    assert fomo_main("report m1 m2 m3 -o report.png") == 0
    assert "m3: rows up to task 3 are on other test data" in capsys.readouterr().out
    shutil.copytree("pics", "copy")  # stands for the old folder, which is opened too
    fomo_pictures("copy", "PETS", ["gnu"], range(2))
    fomo_run("m4", "--data copy", "--continue m3")
    assert fomo_seen("m4") == [8, 8, 10, 12, 2] and "gone: none" in capsys.readouterr().out
    shutil.rmtree("pics/CARS")
    fomo_pictures("pics", "PETS", ["ant"], range(5))
    monkeypatch.chdir("m3")  # beside which it is written, by default
    assert fomo_main("--continue . --data ../pics --method offline-merge") == 0
    fourth = fomo_json("../m3-t5/results.json")
    assert {*fourth["final"]["datasets"]} == {"PETS", "HELD"} and fomo_seen("../m3-t5")[-1] == 5
    assert re.search(r"gone: CARS 8\b", capsys.readouterr().out)


FOMO_REFUSED = [  # what is done, options, the name that is told
    (lambda: Path("m1/results.json").unlink(), "", "m1"),
    (lambda: shutil.rmtree("m1"), "", "m1"),
    (lambda: Path("m1/state.pt").unlink(), "", "m1/state.pt"),
    (lambda: fomo_flip("m1/state.pt"), "", "m1/state.pt"),
    (lambda: None, "", "m1"),  # nothing is new
    (lambda: shutil.rmtree("pics/HELD"), "", "HELD"),
    (lambda: [fomo_yak(), fomo_flip("m1/experts/expert-001.safetensors")], "", "expert-001"),
    (lambda: [fomo_yak(), os.unlink("m1/experts/expert-001.safetensors")], "", "expert-001"),
    (fomo_yak, "--weights x.safetensors", "--weights"), (fomo_yak, "--method lora", "--method"),
    (fomo_yak, "--merge-deploy ema", "--merge-deploy"), (fomo_yak, "--tasks 9", "9"),
    (fomo_yak, "--merge-init latest", "--merge-init"), (fomo_yak, "--heldout PETS", "PETS"),
    (fomo_yak, "--method-options rank=3", "options"), (fomo_yak, "--gate 'kb > 1'", "kb"),
    (fomo_yak, "--gate 'ka up'", "ka up"), (fomo_yak, "--out whole", "whole"),
    (lambda: fomo_pictures("new", "PETS", ["cat"], range(9)), "--data new", "PETS"),  # not all
]  # fmt: skip


@pytest.mark.parametrize("change, options, name", FOMO_REFUSED)
def test_what_cannot_be_continued_is_named(change, options, name, home, capsys):
    change()
    fomo_refused(capsys, f"--continue m1 --out m2 {options}", name)
    assert not [*Path().glob("m2/*")]


def test_a_gate_ships_new_weights_or_keeps_the_old(home, capsys):
    """It compares with the weights before, on the same classes, and names those that lost most."""
    fomo_run("old", "--method finetune --steps 30", FOMO_MONTH)
    fomo_yak()
    base = "--continue old --steps 9 --mixture 0/1/0"
    good = fomo_run("good", "--gate 'zs >= -100, EARLIER > -101, PETS >= -100'", base)
    capsys.readouterr()
    bad = fomo_run("bad", "--gate 'earlier >= 200, zs > -101, new >= 200'", base, 3)
    said = "".join(capsys.readouterr())
    failed = bad["gate_failed"]
    assert good["gate_failed"] == [] and len(failed) == 2
    assert fomo_equal(fomo_weights("bad/model"), fomo_weights("old/model"))
    assert fomo_equal(fomo_weights("bad/model-refused"), fomo_weights("good/model"))
    assert not fomo_equal(fomo_weights("good/model"), fomo_weights("old/model"))
    row = good["tasks"][-1]  # the update is one task, so that the gate's numbers are its row's
    for sentence, key in zip(failed, ("earlier", "new")):
        assert f"{key} {row[key] - row[f'{key}_before']:+.1f}" in sentence and sentence in said
    old, now = (good["per_class"][k]["PETS"] for k in ("before", "final"))
    lost = sorted((now[c] - old[c], c) for c in FOMO_SETS["PETS"] if now[c] < old[c])[:3]
    assert lost and all(f"{c} of PETS" in failed[0] for _, c in lost)
    assert any(line.startswith("classes") and lost[0][1] in line for line in said.splitlines())
    fomo_refused(capsys, "--continue bad", "bad")
    first = fomo_run("first", "--gate 'ka >= 200'", FOMO_MONTH, 3)  # then theta_0 is shipped
    assert fomo_equal(fomo_weights("first/model"), fomo_weights("w")) and first["gate_failed"]


def test_a_finished_wise_ft_is_deployed_at_another_weight_without_training(home):
    for w in (".3", ".7"):
        fomo_run(w, f"--method wise-ft --merge-weight {w}")
    latest = fomo_weights(".3/latest")
    assert fomo_equal(latest, fomo_weights(".7/latest"))
    command = "merge w.safetensors .3/latest.safetensors --weights .7 .3 -o m.safetensors"
    assert fomo_main(command) == 0
    for name, tensor in fomo_weights("w").items():
        mean = (0.7 * tensor.double() + 0.3 * latest[name].double()).float()
        for file in ("m", ".7/model"):
            torch.testing.assert_close(fomo_weights(file)[name], mean, rtol=1e-6, atol=1e-7)


# -------------------------------------------------------------------- theta_0, options, commands


def test_theta_0_of_the_drawn_world_ships_and_pretraining_is_on_its_pool_alone(drawn, monkeypatch):
    results = fomo_run("run", "--method zero-shot", "--workers 0")
    assert fomo_equal(fomo_weights("run/model"), fomo_weights(fomo.THETA_0.with_suffix("")))
    assert len(results["theta_0"]["datasets"]) == 13 and fomo.THETA_0.stat().st_size < 2.1e6
    assert all(results["theta_0"][key] > 2 * results["chance"][key] for key in ("ka", "zs"))
    captions = set()
    fomo_spy(monkeypatch, clip, "backward", lambda *args: captions.update(args[3]))
    options = "--method joint --mixture 1/0/0 --tasks 2 --steps 9 --batch-size 8 --workers 0"
    fomo_run("new", options, "--weights new:tiny")
    assert captions <= {*drawn.pool.captions} and len(captions) > 50


def test_a_plan_says_how_long_a_run_takes_and_writes_nothing(home, capsys):
    for out in ("new", "whole", "cut", "flux"):
        before = sorted(Path().glob(f"{out}/*"))
        assert fomo_main(f"{FOMO_RUN} --plan --out {out}") == 0
        assert re.search(r"2 x 3 steps[^!]*a step takes \d+\.\d+ s", capsys.readouterr().out)
        assert sorted(Path().glob(f"{out}/*")) == before


def test_the_default_folder_names_data_method_and_seed():
    assert fomo.parse([]).out == "runs/merge-0"
    assert fomo.parse(["--data", "a/b-c.csv", "d", "--seed", "3"]).out == "runs/b-c-merge-3"


FOMO_WRONG = [  # options of a run, or a command, and the name that its sentence holds
    ("--data nowhere", "nowhere"), ("--data", "--data"), ("--tasks 99", "99"), ("--pool", "--pool"),
    ("--tasks 2.5", "--tasks"), ("--steps 0", "--steps"), ("--batch-size 0", "--batch-size"),
    ("--lr nan", "--lr"), ("--lr fast", "--lr"), ("--method magic", "magic"),
    ("--metod x", "--metod"), ("--mixture a/b", "--mixture"), ("--mixture .5/.5/.5", "0.5"),
    ("--method-options rank=8", "rank"), ("--method lora --method-options rank", "rank"),
    ("--method lora --method-options rank=0", "rank"),
    ("--method lora --method-options rank=99", "99"), ("--merge-options density=.2", "density"),
    ("--merge-technique ties --merge-options density=2", "density"), ("--merge-weight 2", "weight"),
    ("--meta continued", "continued"), ("--stream gone.json", "gone.json"),
    ("--stream broken.json", "broken.json"), ("--stream held.json", "0 concepts"),
    ("--method joint --stream held.json", "0 concepts"), ("--heldout NOPE", "NOPE"),
    ("--heldout HELD PETS CARS", "0 concepts"), ("--mixture nan/nan/nan", "nan"),
    ("--order frequency --pool --mixture 0/.5/.5", "--pool"), ("--gate 'FOO >= 1'", "FOO"),
    ("--weights gone.safetensors", "gone.safetensors"), ("--out stream.json", "stream.json"),
    ("--weights mute.safetensors", "--activation"), ("--out stream.json/run", "stream.json"),
    ("sing", "sing"), ("evaluate", "--weights"), ("convert gone x --layout hf", "gone"),
    ("merge w.safetensors -o m.safetensors", "two"),
    ("merge w.safetensors gone -o m.safetensors", "gone"),
    ("merge w.safetensors w.safetensors -o m.pt", ".safetensors"),
    ("merge w.safetensors w.safetensors --options density=.2 -o m.safetensors", "density"),
    ("evaluate --weights w.safetensors --data nowhere", "nowhere"),
    ("evaluate --weights w.safetensors --data flux --templates t.txt", "t.txt"),
    ("evaluate --weights w.safetensors --data flux --baseline t.txt", "t.txt"),
    ("evaluate --weights w.safetensors --baseline whole/config.json", "whole/config.json"),
    ("stream --data flux --order similarity -o s.json", "--weights"),
    ("--method finetune --merge-weight .5", "--merge-weight"),
    ("--method lora --merge-technique slerp", "--merge-technique"),
    ("--method offline-merge --merge-weight .5", "--merge-weight"),
]  # fmt: skip


@pytest.mark.parametrize("options, name", FOMO_WRONG)
def test_wrong_options_are_one_sentence_and_no_folder(options, name, home, capsys):
    Path("broken.json").write_text('["A+++x"')
    Path("held.json").write_text('["HELD+++one"]')
    clip.write_tensors(clip.load("w.safetensors").state_dict(), "mute.safetensors")
    Path("t.txt").write_text("a photo")
    run = f"{FOMO_RUN} --out run " if options.startswith("--") else ""
    fomo_refused(capsys, run + options, name)
    assert not Path("run").exists() and not Path("stream.json").is_dir()


FOMO_WRITERS = {  # commands that write, without --out
    "evaluate": "--data flux --heldout HELD --weights w.safetensors --workers 0 --out {}",
    "stream": "--data flux --heldout HELD --out {}",
    "inspect": "--data flux --heldout HELD --out {}",
    "merge": "w.safetensors w.safetensors --out {}",
    "convert": "w.safetensors {} --layout openai",
    "report": "whole -o {}",
}


@pytest.mark.parametrize("name", FOMO_WRITERS)
def test_a_command_writes_over_nothing_and_helps_with_what_is_true_for_it(name, home, capsys):
    assert fomo_main(f"{name} --help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"fomo.py {name}" in said and "must not exist" in said
    assert ("--weights" in said) == (name in ("evaluate", "stream", "merge"))
    assert "--method" not in said and "runs/" not in said  # a run's
    command = f"{name} {FOMO_WRITERS[name]}"
    for old in ("whole/results.json", "w.safetensors", "flux", "nowhere/x.safetensors"):
        before = Path(old).read_bytes() if Path(old).is_file() else b""
        fomo_refused(capsys, command.format(old), old)
        assert not before or Path(old).read_bytes() == before
    assert fomo_main(command.format("new.safetensors")) == 0
    assert Path("new.safetensors").exists()


def test_inspect_draws_sheets_and_names_broken_pictures(home, capsys):
    os.truncate(FOMO_CAT, 60)
    assert fomo_main("inspect --data flux --heldout HELD --pool HELD") == 0
    said = capsys.readouterr().out
    faults = fomo_json("inspect/broken.json")
    assert len(faults) == 7 and [name for name in faults if faults[name]] == ["PETS-train"]
    assert FOMO_CAT in faults["PETS-train"][0] and faults["PETS-train"][0] in said
    assert all(line in said for line in data.open_world("flux", ["HELD"]).notes)
    assert all(np.asarray(Image.open(f"inspect/{name}.png")).std() > 1 for name in faults)


def test_orders_by_a_model_are_made_with_that_model(drawn):
    concepts = data.concepts(drawn.adaptation)
    sets = {d.name: d for d in drawn.adaptation}
    prompts = [sets[name].prompts[sets[name].classes.index(c)] for name, c in concepts]
    model = clip.load(fomo.THETA_0).requires_grad_(False)
    tokens = clip.Tokenizer()(prompts, model.config.context_length)
    text = F.normalize(model.encode_text(tokens), dim=-1)
    for how in ("similarity", "performance", "performance --reverse"):
        assert fomo_main(f"stream --order {how} --out {how.split(' --')[-1]}.json") == 0
    path = data.order(concepts, "similarity", 0, text.numpy())
    assert data.read_stream("similarity.json") == path
    order = data.read_stream("performance.json")
    assert data.read_stream("reverse.json") == order[::-1] and sorted(order) == sorted(concepts)


# -------------------------------------------------------------------------- pieces and processes


FOMO_SHARED = """
import os, signal, sys
import torch, torch.distributed as dist, torch.nn.functional as F
sys.path.insert(0, {here!r})
import clip, fomo, methods
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, count = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
images = torch.randn(13, 3, 32, 32).double()
tokens = clip.Tokenizer()([f"picture {{i}}" for i in range(13)], 20)
a, b = 13 * rank // count, 13 * (rank + 1) // count
for name in ("finetune", "locked-image", "lora"):
    model = clip.load(fomo.THETA_0).double()
    method = methods.METHODS[name]()
    method.prepare(model)
    trained = list(method.trained.values())
    clip.contrastive_loss(*model(images, tokens)).backward()
    whole = torch.cat([p.grad.flatten() for p in trained])
    model.zero_grad()
    encoders = model.encode_image, model.encode_text
    towers = [lambda x, f=f: F.normalize(f(x), dim=-1) for f in encoders]
    clip.backward(*towers, images[a:b], tokens[a:b], model.logit_scale.exp(), 3, (a, 13))
    clip.sum_gradients(trained)
    ours = torch.cat([p.grad.flatten() for p in trained])
    assert (ours - whole).norm() <= 1e-12 * whole.norm(), name
    assert torch.equal(ours, clip.gather_rows(ours[None], rank, count)[0]), "not the same bits"
steps = []
backward = clip.backward
def stopped(*args):
    steps.append(0)
    if len(steps) == 5 and rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return backward(*args)
clip.backward = stopped
argv = {argv!r}.split()
try:
    fomo.main(argv)
except SystemExit as end:
    assert end.code == 143 and len(steps) == 5
assert fomo.main(argv) == 0
"""


def test_two_processes_share_a_batch_stop_together_and_end_as_one(home):
    """The gradient from unequal shares and pieces of them; a signal to the second alone stops both;
    then the run's end against that of one process. Only the first process prints."""
    run = f"{FOMO_RUN} --method ewc --method-options ewc_lambda=1e3 --batch-size 7"
    argv = f"{run} --out two --micro-batch 3"
    Path("two.py").write_text(FOMO_SHARED.format(here=str(HERE), argv=argv))
    port = random.randrange(2**15, 2**16)
    command = f"-m torch.distributed.run --nproc-per-node 2 --master-port {port} two.py"
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True,
                          check=False, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("guessing would score") == 2  # once a start
    fomo_run("one", base=run)
    one, two = ([row[k] for row in fomo_rows(out) for k in ("loss", "grad_norm")]
                for out in ("one", "two"))  # fmt: skip
    assert two == pytest.approx(one, rel=1e-4) and len(two) == 12  # float32, six steps of AdamW
    ka = [fomo_json(f"{out}/results.json")["final"]["ka"] for out in ("one", "two")]
    assert ka[1] == pytest.approx(ka[0], abs=100 / 16)  # a picture


# ------------------------------------------------------------------------------- kills, training


def bench_kills(argv):
    """SIGKILLs at random moments of runs on the drawn world: the same weights to the bit?"""
    parser = argparse.ArgumentParser("test_fomo.py kills", description=bench_kills.__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of each run")
    parser.add_argument("--runs", nargs="+", default=["merge", "ewc", "lora", "offline-merge"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    program = "import fomo, sys; fomo.SAVE_EVERY = .2; sys.exit(fomo.main(sys.argv[1:]))"
    for method in args.runs:
        command = f"--method {method} --tasks 3 --steps 20 --workers 0 --out"
        row = {"run": method, "kills": 0, "states": 0}

        def life(out, seconds=None, command=command):
            """-> whether the run came to its end, before it was killed after so many seconds."""
            argv = [sys.executable, "-c", program, *command.split(), str(out)]
            with subprocess.Popen(argv, cwd=HERE, stdout=subprocess.DEVNULL) as process:
                try:
                    return process.wait(seconds) == 0
                except subprocess.TimeoutExpired:
                    process.kill()
            return (out / "results.json").exists()  # killed when all was written

        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            assert life(Path(folder, "once"))
            row["seconds"] = time.monotonic() - began
            while row["kills"] < args.kills:
                out = Path(folder, f"from-{row['kills']}")
                while not life(out, rng.uniform(1, 0.7 * row["seconds"])):
                    row["kills"] += 1
                    row["states"] += (out / "state.pt").exists()
                assert fomo_same(out, f"{folder}/once"), f"{row}: another end"
        print(json.dumps(row | {"bit_identical": True}), flush=True)


def train_case(args):
    """Seconds of a step on a batch of noise, and its peak of memory beyond what was held before."""
    # VmRSS is now, VmHWM the peak; getrusage's would include the parent's
    kib = lambda name: int(Path("/proc/self/status").read_text().split(name)[1].split()[0])
    idle = kib("VmRSS:")
    config = clip.CONFIGS[args.model]
    n = args.batch_size
    images = torch.randint(0, 256, (n, 3, config.image_size, config.image_size), dtype=torch.uint8)
    tokens = torch.randint(1, config.vocab_size - 2, (n, config.context_length))
    tokens[:, -1] = config.vocab_size - 1
    theirs = args.case == "open_clip"
    c = fomo.Config(device=args.device, precision=args.precision, batch_size=n, workers=0,
                    micro_batch=args.micro_batch[0] if args.micro_batch else None,
                    compile=args.case == "compiled", any_order=args.case == "any order" or theirs)
    model = clip.CLIP(config)
    if theirs:
        import open_clip

        model = open_clip.CLIP(**clip._open_clip_config(config)["model_cfg"], output_dict=False)
    learner = fomo.Learner(model, lambda texts, _: tokens[list(texts)], c, fomo.Processes(c))
    method = methods.METHODS["finetune"]()
    learner.prepare(method)
    optimizer = method.optimizer(model)
    scaler = torch.amp.GradScaler(args.device, enabled=False)
    cuda = args.device == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    times = [clock()]
    for _ in range(3 + args.rounds):  # the first three make AdamW's moments, and compile
        if theirs:
            with learner.autocast():
                features = model(clip.normalise(images.to(args.device)), tokens.to(args.device))
                loss = open_clip.ClipLoss()(*features)
            loss.backward()
        else:
            learner.backward((images, range(n)), scaler)
        torch.nn.utils.clip_grad_norm_(method.trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        times.append(clock())
    seconds = float(np.median(np.diff(times)[3:]))
    peak = torch.cuda.max_memory_allocated() >> 20 if cuda else (kib("VmHWM:") - idle) >> 10
    return {"seconds": seconds, "samples_a_second": n / seconds, "peak_mib": peak}


def bench_train(argv):
    """A training step: samples a second and peak memory, whole and in pieces, and open_clip's. On a
    CPU one thread's CPU time counts; each case runs in a process of its own."""
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser("test_fomo.py train", description=bench_train.__doc__)
    p.add_argument("--model", choices=clip.CONFIGS, default="ViT-B-32")
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--micro-batch", type=int, nargs="*", default=[8])
    p.add_argument("--device", default="cuda" if cuda else "cpu")
    p.add_argument("--precision", default="bf16" if cuda else "fp32")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--case", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.case:
        print(json.dumps(train_case(args)))
        return
    whole = ["ours", *["any order", "compiled"] * (args.device == "cuda"), "open_clip"]
    for case, piece in [*((c, []) for c in whole), *(("pieces", [n]) for n in args.micro_batch)]:
        command = [__file__, "train", *argv, "--case", case, "--micro-batch", *map(str, piece)]
        command = [sys.executable, *command]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        row = json.loads(done.stdout) if done.returncode == 0 else {"failed": done.stderr[-300:]}
        print(json.dumps({"case": case, "piece": piece, **row}), flush=True)


# ------------------------------------------------------------------------------- the house itself

HOUSE = Path(fomo.__file__).parent
HOUSE_README = HOUSE / "README.md"
HOUSE_LINES = {"fomo.py": 1250, "data.py": 1590, "clip.py": 1130, "evaluate.py": 730,
               "merge.py": 770, "methods.py": 610, "budget.py": 520, "study/study.py": 200,
               "test_fomo.py": 4400, "README.md": 300}  # fmt: skip
HOUSE_ALONE = ["budget", "clip", "data", "evaluate", "merge", "methods"]


def house_imports(path):
    """Top-level names of the modules that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        yield from (name.split(".")[0] for name in names)


def test_files_have_the_lines_they_may_have_of_at_most_100_columns():
    for name, most in HOUSE_LINES.items():
        lines = (HOUSE / name).read_text("utf-8").splitlines()
        assert len(lines) <= most, f"{name} has {len(lines)} lines"
        assert max(map(len, lines)) <= 100, f"{name}: {max(lines, key=len)}"


def test_each_module_imports_alone_in_an_empty_folder(tmp_path):
    for name in HOUSE_ALONE:
        (tmp_path / name).mkdir()
        shutil.copy(HOUSE / f"{name}.py", tmp_path / name)
    code = f"""
import importlib, sys
for name in {HOUSE_ALONE}:
    sys.path.insert(0, {str(tmp_path)!r} + "/" + name)
    importlib.import_module(name)
    del sys.path[0], sys.modules[name]  # the next one must not find it
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_nothing_but_the_promised_packages_is_imported():
    allowed = {"torch", "torchvision", "PIL", "numpy", "tqdm", *sys.stdlib_module_names}
    own = {*HOUSE_ALONE, "fomo"}
    for name in [*HOUSE_ALONE, "fomo", "study/study"]:
        outer = {*house_imports(HOUSE / f"{name}.py")} - allowed
        assert outer <= (set() if name in HOUSE_ALONE else own), f"{name}: {outer}"


def test_the_readmes_pictures_are_there():
    for page in (HOUSE_README, HOUSE / "study/README.md"):
        for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text("utf-8")):
            with Image.open(page.parent / name) as picture:
                assert np.asarray(picture).std() > 1, name


# ------------------------------------------------------------------------- the README's commands
# Each runs as it stands, one after the other, in one folder. What it reads and none before it has
# written is a stand-in. A run is cut short; the drawn world has few pictures.

HOUSE_SHORT = ["--steps", "2", "--tasks", "2", "--batch-size", "8", "--workers", "0"]
HOUSE_FAR = re.compile(r"hf:|openai:|torchvision:|http|.*([{$]|\.pt$)")  # a network, a shell
HOUSE_READ = ("--data", "--weights", "--templates", "--continue", "--stream", "files", "runs")
HOUSE_FILES = {"merge": "files", "convert": "files", "report": "runs"}  # without an option's name


def house_commands(text):
    """-> the command lines in a page's blocks of code, joined where they end in a backslash."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = re.sub(r"\\\n\s*", " ", "\n".join(blocks)).splitlines()
    lines = [line.strip().removeprefix("$ ") for line in lines]
    return [line for line in lines if re.match("(python|torchrun|mv) ", line)]


def house_pictures(folder):
    """Class folders, whose pictures no other folder has."""
    for k, name in enumerate(("cat", "dog", "emu")):
        for split, n in (("train", 8), ("test", 3)):
            Path(folder, split, name).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                noise = np.random.default_rng((i, k, n)).integers(0, 255, (9 + i, 9, 3), np.uint8)
                name_of_folder = "-".join(Path(folder).parts)
                Image.fromarray(noise).save(Path(folder, split, name, f"{name_of_folder}-{i}.png"))


def house_make(option, word):
    """What `word`, an argument of an option, names."""
    path = Path(word)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".csv", ".tsv"):
        house_pictures(path.parent / "pictures")
        rows = [f"{file.relative_to(path.parent)},{file.parent.name},a {file.parent.name}"
                for file in sorted(path.parent.glob("pictures/*/*/*.png"))]  # fmt: skip
        path.write_text("\n".join(["filepath,class,caption", *rows]))
    elif path.suffix == ".safetensors":
        model = clip.load(fomo.THETA_0)
        model.visual.proj.data *= 1 + 0.01 * len(word)
        clip.save(model, path)
    elif option == "--data":
        house_pictures(path / path.name)
    elif option == "--templates":
        path.write_text("a photo of a {}.\na picture of a {}.\n")
    elif option in ("--continue", "runs"):
        assert fomo.main([*HOUSE_SHORT, "--out", word]) == 0
    elif option == "--stream":
        data.write_stream(data.concepts(data.toy().adaptation), word)


def house_prepare(command, words):
    """What the command reads is there, and what it writes is not. words: those after its name."""
    option = HOUSE_FILES.get(command)
    options = {}
    for word in words:
        option = word if re.match("-[-a-z]", word) else option
        options.setdefault(option, []).extend([word] * (word != option))
    if command == "merge":
        del options["--weights"]  # numbers
    for option in HOUSE_READ:
        for word in options.get(option, ())[: 1 if command == "convert" else None]:
            if not Path(word).exists() and not word.startswith("new:"):
                house_make(option, word)
    for name in [*options.get("--heldout", ()), *options.get("--pool", ())]:
        if "--data" in options and not Path(options["--data"][0], name).exists():
            house_pictures(Path(options["--data"][0], name))
    for word in [*options.get("-o", ()), *options.get("--out", ())]:
        Path(word).parent.mkdir(parents=True, exist_ok=True)


def test_the_readmes_commands_do_what_they_say(tmp_path, monkeypatch):
    commands = house_commands(HOUSE_README.read_text("utf-8"))
    assert "python fomo.py --method merge" in commands and len(commands) > 10
    world = data.toy(train=16, test=12)
    monkeypatch.setattr(data, "toy", lambda *_, **__: world)
    shutil.copytree(HOUSE / "study", tmp_path / "study")
    monkeypatch.chdir(tmp_path)
    script = HOUSE_README.read_text("utf-8").partition("<<'END'\n")[2].partition("\nEND")[0]
    path = {**os.environ, "PYTHONPATH": str(HOUSE)}
    subprocess.run([sys.executable, "-c", script], env=path, check=True)  # pictures, for the others
    done = 0
    for line in commands:
        words = shlex.split(line.partition(" <<")[0], comments=True)
        if words[0] == "mv":
            shutil.move(*words[1:])
            continue
        if "fomo.py" not in words:  # the tests, a benchmark, the study
            files = [word for word in words if word.endswith(".py")]
            assert all((HOUSE / file).exists() for file in files), line
            continue
        words = words[words.index("fomo.py") + 1 :]
        command = words.pop(0) if words and not words[0].startswith("-") else ""
        if command == "report":
            words = [path for word in words for path in sorted(glob.glob(word)) or [word]]
        if any(map(HOUSE_FAR.match, words)):
            continue
        house_prepare(command, words)
        argv = [command, *words] if command else [*words, *HOUSE_SHORT]
        assert fomo.main(argv) in (0, 3), line
        done += 1
    assert done > len(commands) / 2


# ------------------------------------------------------------------------------------------ study


def test_the_studys_rows_are_of_commands_that_parse_and_of_one_theta_0():
    rows = [json.loads(line) for line in (HOUSE / "study/runs.jsonl").read_text().splitlines()]
    assert len(rows) > 20
    for row in rows:
        fomo.parse(shlex.split(row["options"]))
        for ka, zs, gm in row["scores"]:
            assert 0 < min(ka, zs) < 100 and gm == pytest.approx((ka * zs) ** 0.5, abs=0.01)
    origins = {("small" in row["options"], *row["scores"][0]) for row in rows}
    assert len(origins) == len({small for small, *_ in origins})


def test_the_tables_of_both_pages_are_those_of_the_studys_rows(tmp_path):
    shutil.copytree(HOUSE, tmp_path / "copy", ignore=shutil.ignore_patterns(".*", "runs", "mine"))
    pages = [tmp_path / "copy" / name for name in ("README.md", "study/README.md")]
    before = [page.read_text("utf-8") for page in pages]
    command = [sys.executable, "study/study.py", "--tables"]
    subprocess.run(command, cwd=tmp_path / "copy", check=True)
    assert [page.read_text("utf-8") for page in pages] == before


if __name__ == "__main__":
    {"train": bench_train, "kills": bench_kills}[sys.argv[1]](sys.argv[2:])
