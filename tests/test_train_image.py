"""train_image.py: its network, its recipes and its training, on tiny stand-ins."""

import argparse
import contextlib
import functools
import gc
import inspect
import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exact import ExactGaussian, TinyBackbone, fix_weights, times, wide
from measure.costs import Flops
from PIL import Image
from test_method import CONDITIONS, HostCopies, HostTensors
from torch import nn

import f2d2
import train_image
from f2d2 import JointFlowMap, f2d2_loss
from train_image import RECIPES, Block, UNet, accumulate, build, draw, main, to_bytes

ROOT = Path(train_image.__file__).parent
NETWORK = ["--image-size", "8", "--channels", "4", "--blocks", "1", "--dropout", "0"]
QUICK = ["--oracle-images", "3", "--device", "cpu"]
TINY = [*NETWORK, *QUICK, "--batch-size", "4", "--lr", "1e-3"]
MODEL = dict(image_size=8, channels=4, blocks=1, dropout=0.0, colours=3, paper=False, head=True)
TERMS = ("vm", "u", "div", "D")


# ------------------------------------------------------------------------------- stand-ins
class Small(TinyBackbone):
    """Behind the U-Net's door, for the tests in which the network does not matter."""

    def __init__(self, image_size=8, channels=4, blocks=1, dropout=0.0, colours=3, paper=False):
        super().__init__(colours * image_size**2, channels, paper)
        self.feature_dim = channels
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, t, s):
        return super().forward(self.dropout(x), t, s)


class OneBlock(nn.Module):
    """One block of the U-Net with attention, behind its door: where tracing it all takes long."""

    feature_dim = 4

    def __init__(self, image_size, channels, blocks, dropout, colours, paper):
        super().__init__()
        self.embed = nn.Linear(10, 6)
        self.block = Block(colours, 4, 6, dropout, attention=True)
        self.out = nn.Conv2d(4, colours, 3, padding=1)

    def forward(self, x, t, s):
        h = self.block(x, self.embed(f2d2.time_features(t, s)))
        return self.out(h), h.mean((2, 3))


@contextlib.contextmanager
def stand_ins():
    """A small network, a short oracle, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_image, "UNet", Small)
        patch.setattr(train_image, "ORACLE_STEPS", 2)
        patch.setattr(train_image, "ORACLE_RUNS", 2)
        patch.setattr(train_image, "FID_SAMPLES", 16)
        yield
    torch.set_num_threads(threads)


def write_images(folder, n, size=8, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return images.transpose(0, 3, 1, 2)


def write_photos(folder):
    """train/ with 12 images, test/ with 5."""
    write_images(folder / "train", 12)
    write_images(folder / "test", 5, seed=1)
    return folder


def words(*options):
    return [str(option) for option in options]


def run(out, photos, *options, steps=3):
    main([*TINY, *words("--dataset", photos, "--steps", steps, "--out", out, *options)])
    return json.loads((out / "metrics.json").read_text())


def refused(capsys, *options):
    """What the script says, in one line, when it will not do it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(words(*options))
    assert stop.value.code == 2
    del stop
    gc.collect()  # or the dead run's frames hold on to its folder
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1, message
    return message


def checkpoint(out):
    return torch.load(out / "latest.pt", weights_only=True)


def edit(path, **changes):
    torch.save(torch.load(path, weights_only=True) | changes, path)


def spy(monkeypatch, change=None):
    """Records the arguments of every call of the loss by name; change(losses, arguments) if any."""
    calls = []

    def loss(*args, **options):
        bound = inspect.signature(f2d2_loss).bind(*args, **options)
        bound.apply_defaults()
        calls.append(bound.arguments)
        losses = f2d2_loss(*args, **options)
        return change(losses, bound.arguments) if change else losses

    monkeypatch.setattr(f2d2, "f2d2_loss", loss)
    return calls


def no_loss(flow, x1, *args, **options):
    """Costs nothing, teaches nothing."""
    return dict.fromkeys(TERMS, x1.new_zeros((), requires_grad=True))


def assert_same_weights(a, b, **tolerance):
    for part in ("flow", "ema"):
        assert a[part].keys() == b[part].keys()
        for name, weight in a[part].items():
            torch.testing.assert_close(weight, b[part][name], **tolerance)


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with stand_ins():
        yield


@pytest.fixture
def real_network(monkeypatch):
    monkeypatch.setattr(train_image, "UNet", UNet)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def teacher(tiny, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    run(out, photos, "--method", "flow", "--lr", 0.05)
    return out / "latest.pt"


# ------------------------------------------------------------------------------- the network
def unet(dtype=torch.float64, size=8, **options):
    torch.manual_seed(0)
    backbone = UNet(size, 4, 1, **options)
    flow = JointFlowMap(backbone, backbone.feature_dim).to(dtype)
    for p in flow.parameters():
        nn.init.normal_(p, std=0.2)
    return flow


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_default_unet_has_50_to_60_million_parameters_and_a_small_head():
    with torch.device("meta"):
        backbone = UNet()
        flow = JointFlowMap(backbone, backbone.feature_dim)
        x = torch.empty(2, 3, 32, 32)
        t = torch.empty(2)
        u, D = flow(x, t, t)
    size = sum(p.numel() for p in flow.parameters())
    head = sum(p.numel() for p in flow.head.parameters())
    assert u.shape == x.shape and D.shape == t.shape
    assert 50e6 < size < 60e6 and head < 0.02 * size
    with pytest.raises(ValueError, match="multiple of 4"):
        UNet(image_size=30)


def test_the_unet_takes_the_colours_of_the_data():
    flow = unet(colours=1)
    t, s = times(2)
    u, D = flow(noise(2, 1, 8, 8), t, s)
    assert u.shape == (2, 1, 8, 8) and D.shape == (2,)


@pytest.mark.parametrize("diagonal", [True, False])
def test_unet_derivatives_attention_included_against_central_differences(diagonal):
    flow = unet(size=16)
    assert sum(isinstance(m, Block) and m.qkv is not None for m in flow.modules()) > 1
    t, s = times(2)
    s = t if diagonal else s
    x = noise(2, 3, 16, 16)
    directions = (x.flip(0), torch.ones_like(t), 2 * torch.ones_like(t))
    _, found = torch.func.jvp(flow, (x, t, s), directions)
    e = 1e-5
    plus = flow(*(a + e * da for a, da in zip((x, t, s), directions)))
    minus = flow(*(a - e * da for a, da in zip((x, t, s), directions)))
    for derivative, p, m in zip(found, plus, minus):
        torch.testing.assert_close(derivative, (p - m) / (2 * e), rtol=1e-5, atol=1e-6)


def random_block(*sizes, **options):
    torch.manual_seed(0)
    block = Block(*sizes, **options).double()
    for p in block.parameters():
        nn.init.normal_(p, std=0.5)
    return block


def test_attention_is_torch_s():
    block = random_block(4, 4, 8, attention=True)
    plain = Block(4, 4, 8).double()
    plain.load_state_dict(block.state_dict(), strict=False)
    x = noise(2, 4, 3, 3)
    embedding = noise(2, 8)
    h = plain(x, embedding)
    q, k, v = (a.transpose(1, 2) for a in block.qkv(h).flatten(2).chunk(3, 1))
    out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape)
    torch.testing.assert_close(block(x, embedding), h + block.merge(out))


@pytest.mark.parametrize("resize", [None, nn.AvgPool2d(2), nn.Upsample(scale_factor=2)])
def test_the_times_scale_and_shift_the_middle_of_a_block(resize):
    block = random_block(4, 8, 6, resize=resize)
    x = noise(2, 4, 4, 4)
    embedding = noise(2, 6)
    scale, shift = block.modulate(embedding).chunk(2, 1)
    h = block.before(x) * (1 + wide(scale.flatten(), scale)).reshape(2, 8, 1, 1)
    h = h + shift.reshape(2, 8, 1, 1)
    smaller = x if resize is None else resize(x)
    torch.testing.assert_close(block(x, embedding), block.skip(smaller) + block.after(h))


def test_features_hear_the_bottleneck_and_the_last_layer_and_its_size():
    flow = unet()
    t, s = times(2)
    features = flow.backbone(noise(2, 3, 8, 8), t, s)[1]
    for part, hears_the_end in zip(features.chunk(3, 1), (False, True, True)):
        weights = [
            flow.backbone.middle[1].modulate.weight,
            flow.backbone.up[-1].modulate.weight,
        ]
        slopes = torch.autograd.grad(part.sum(), weights, allow_unused=True, retain_graph=True)
        assert slopes[0].abs().max() > 0
        assert (slopes[1] is not None and slopes[1].abs().max() > 0) == hears_the_end


def test_the_head_sees_how_large_an_image_is():
    """A fresh U-Net is its skips, linear in x: ten times the image, ln 100 more in its size."""
    torch.manual_seed(0)
    backbone = UNet(8, 16, blocks=1)
    x = 100 * torch.randn(2, 3, 8, 8)
    t = torch.rand(2)
    size = backbone(x, t, t)[1][:, -32:]
    larger = backbone(10 * x, t, t)[1][:, -32:]
    torch.testing.assert_close(larger - size, torch.full((2, 32), math.log(100)), atol=0.1, rtol=0)
    norms = [m for m in backbone.modules() if isinstance(m, nn.GroupNorm)]
    assert all(m.num_channels // m.num_groups >= 4 for m in norms)


def test_dropout_is_in_every_block_and_active_only_in_training():
    backbone = unet(dropout=0.3).backbone
    blocks = [m for m in backbone.modules() if isinstance(m, Block)]
    shares = [m.p for m in backbone.modules() if isinstance(m, nn.Dropout)]
    assert shares == [0.3] * len(blocks)
    x = noise(2, 3, 8, 8)
    t, s = times(2)
    for training in (True, False):
        backbone.train(training)
        assert torch.equal(backbone(x, t, s)[0], backbone(x, t, s)[0]) != training


# ------------------------------------------------------------------------------- the cost of a step
@functools.cache
def flops_of_a_step(method):
    with torch.device("meta"):
        backbone = UNet(blocks=1)  # four give the same ratios, and take longer
        flow = JointFlowMap(backbone, backbone.feature_dim, method != "flow")
        x1 = torch.empty(4, 3, 32, 32)
    recipe = RECIPES[method]
    with Flops() as flops:
        losses = f2d2_loss(flow, x1, recipe["condition"], diagonal=recipe["diagonal"])
        sum(losses.values()).backward()
    return flops.total


@pytest.mark.parametrize("method, most", [("shortcut", 1.67), ("meanflow", 2.42), ("lsd", 2.50)])
def test_flops_of_a_step_over_a_flow_step(method, most):
    ratio = flops_of_a_step(method) / flops_of_a_step("flow")
    assert most - 0.3 < ratio < most + 0.005


@pytest.mark.parametrize(
    "network, condition",
    [(UNet, None), (UNet, "eulerian"), (OneBlock, "semigroup"), (OneBlock, "lagrangian")],
)
def test_a_step_makes_no_tensor_on_the_host(network, condition):
    """The U-Net takes its time: half of the conditions see one of its blocks."""
    with torch.device("meta"):
        backbone = network(16, 4, 1, 0.1, 3, False)
        flow = JointFlowMap(backbone, backbone.feature_dim)
        x1 = torch.empty(4, 3, 16, 16)
    names = set()
    with HostTensors(names), HostCopies(names):
        sum(f2d2_loss(flow, x1, condition, probe="dct").values()).backward()
    assert names == set()


def test_the_unet_compiles_in_the_condition_with_a_jvp():
    """For which its GroupNorm is in two steps: one step fails here, if not in a single block."""
    unet = UNet(8, 4, 1)
    flow = fix_weights(JointFlowMap(unet, unet.feature_dim))
    x1, x0, eps = noise(3, 6, 3, 8, 8)
    t, s = times(6)
    gradients = []
    for loss in (f2d2_loss, torch.compile(f2d2_loss, backend="aot_eager")):
        flow.zero_grad()
        sum(loss(flow, x1, "eulerian", x0=x0, t=t, s=s, probe=eps).values()).backward()
        gradients.append([p.grad.clone() for p in flow.parameters()])
    for eager, compiled in zip(*gradients):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-9)


# ------------------------------------------------------------------------------- the recipes
@pytest.mark.parametrize(
    "method, optimizer, lr, batch, dropout, flip, diagonal, clip",
    [
        ("flow", "RAdam", 1e-4, 512, 0.13, 0, None, 0.01),
        ("shortcut", "RAdam", 1e-4, 512, 0.13, 0, 0.5, 0.01),
        ("shortcut-distill", "RAdam", 1e-4, 512, 0.13, 0, 0.5, 0.01),
        ("meanflow", "Adam", 6e-4, 1024, 0.2, 0.5, 0.25, math.inf),
        ("lsd", "RAdam", 1e-4, 256, 0, 0.5, 0.5, 1.0),
    ],
)
def test_the_published_recipes(method, optimizer, lr, batch, dropout, flip, diagonal, clip):
    recipe = RECIPES[method]
    expected = dict(optimizer=optimizer, lr=lr, batch_size=batch, dropout=dropout, flip=flip)
    expected |= {"clip": clip} | ({"diagonal": diagonal} if diagonal else {})
    assert {k: recipe[k] for k in expected} == expected


@pytest.mark.parametrize(
    "method, rows", [("flow", 8), ("shortcut", 4), ("meanflow", 2), ("lsd", 4)]
)
def test_each_recipe_s_condition_and_diagonal_reach_the_loss(
    tmp_path, photos, monkeypatch, method, rows
):
    calls = spy(monkeypatch)
    run(tmp_path, photos, "--method", method, "--batch-size", 8, steps=1)
    (call,) = calls
    conditions = dict(flow=None, shortcut="semigroup", meanflow="eulerian", lsd="lagrangian")
    assert call["condition"] == conditions[method]
    assert len(call["x1"]) == 8
    if method != "flow":
        assert round(8 * call["diagonal"]) == rows


@pytest.mark.parametrize("paper", [True, False])
@pytest.mark.parametrize("method", ["meanflow", "lsd"])
def test_the_teacher_paper_and_the_warm_start_reach_the_loss(
    tmp_path, photos, teacher, monkeypatch, method, paper
):
    calls = spy(monkeypatch)
    options = ["--paper"] if paper else ["--teacher", teacher]
    run(tmp_path, photos, "--method", method, "--warmup", 2, *options, steps=3)
    for call, rates in zip(calls, (1, 1, 2)):
        assert call["paper"] == paper
        assert len(call["flow"](call["x1"], call["t"], call["s"])) == rates
        assert (call["teacher"] is None) == paper
    if not paper:
        frozen = build(MODEL | {"head": False}, "cpu").eval()
        frozen.load_state_dict(checkpoint(teacher.parent)["ema"])
        v = frozen.velocity(calls[0]["x1"], calls[0]["t"])
        assert torch.equal(calls[0]["teacher"](calls[0]["x1"], calls[0]["t"]), v)


@pytest.mark.parametrize("method, share", [("shortcut", 10 / 11), ("meanflow", 0.5), ("lsd", 0.5)])
def test_the_warm_start_is_a_share_of_the_steps(tmp_path, photos, monkeypatch, method, share):
    rates = []
    calls = spy(monkeypatch)
    run(tmp_path, photos, "--method", method, steps=11)
    for call in calls:
        rates.append(len(call["flow"](call["x1"], call["t"], call["s"])))
    warm = int(share * 11)
    assert rates == [1] * warm + [2] * (11 - warm)


class Stop(Exception):
    pass


def record_steps(monkeypatch, read, stop=False):
    """read(optimizer) at every step of the optimizer, which then stops if asked to."""
    records = []
    for kind in (torch.optim.RAdam, torch.optim.Adam):

        def step(self, *args, step=kind.step):
            records.append(read(self))
            if stop:
                raise Stop
            return step(self, *args)

        monkeypatch.setattr(kind, "step", step)
    return records


def rate(optimizer):
    return optimizer.param_groups[0]["lr"]


def test_the_learning_rate_rises_and_in_the_last_quarter_falls_to_zero(
    tmp_path, photos, monkeypatch
):
    monkeypatch.setattr(f2d2, "f2d2_loss", no_loss)
    rates = record_steps(monkeypatch, rate)
    run(tmp_path / "ours", photos, "--method", "shortcut", steps=40)
    assert rates[:30] == pytest.approx([0.5e-3] + 29 * [1e-3])
    assert rates[30:] == pytest.approx([1e-3 * k / 10 for k in range(10, 0, -1)])
    rates.clear()
    run(tmp_path / "paper", photos, "--method", "shortcut", "--paper", steps=40)
    assert rates == pytest.approx([0.5e-3] + 39 * [1e-3])


@pytest.mark.parametrize(
    "method, done, share",
    [
        ("lsd", 139_999, 0.5),
        ("meanflow", 139_999, 1),
        ("shortcut", 139_999, 1),
        ("lsd", 4_999, 0.5),
    ],
)
def test_the_learning_rate_of_lsd_falls_as_the_root_and_all_rise_for_10_000_steps(
    tmp_path, photos, monkeypatch, method, done, share
):
    run(tmp_path, photos, "--method", method, steps=1)
    edit(tmp_path / "latest.pt", step=done)
    rates = record_steps(monkeypatch, rate, stop=True)
    with pytest.raises(Stop):
        run(tmp_path, photos, "--method", method, steps=1_000_000)
    assert rates == pytest.approx([1e-3 * share])


@pytest.mark.parametrize("method, clip", [("shortcut", 0.01), ("lsd", 1.0), ("meanflow", None)])
def test_gradients_are_clipped_as_published(tmp_path, photos, monkeypatch, method, clip):
    def length(optimizer):
        gradients = [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]
        return torch.stack([g.square().sum() for g in gradients]).sum().sqrt().item()

    def a_thousand_times(losses, arguments):
        return {name: 1000 * loss for name, loss in losses.items()}

    spy(monkeypatch, a_thousand_times)
    lengths = record_steps(monkeypatch, length)
    run(tmp_path, photos, "--method", method, steps=2)
    assert lengths == pytest.approx([clip] * 2, rel=1e-3) if clip else min(lengths) > 10


@pytest.mark.parametrize(
    "method, images", [("shortcut", 50e6), ("meanflow", 7.1e6), ("lsd", 1.8e6)]
)
@pytest.mark.parametrize("done", [39, 10**9])
def test_averaged_weights_remember_a_twentieth_of_the_images_seen_up_to_the_published_number(
    tmp_path, photos, method, images, done
):
    run(tmp_path, photos, "--method", method, steps=1)
    state = checkpoint(tmp_path)
    assert_same_weights(state, {"flow": state["ema"], "ema": state["flow"]})
    nothing = {k: torch.zeros_like(w) for k, w in state["ema"].items()}
    edit(tmp_path / "latest.pt", step=done, ema=nothing)
    run(tmp_path, photos, "--method", method, steps=done + 1)
    newest = 1 - 0.5 ** (4 / min(images, 0.05 * (done + 1) * 4))
    state = checkpoint(tmp_path)
    assert state["step"] == done + 1
    for name, weight in state["flow"].items():
        if "variances" not in name:  # a constant
            torch.testing.assert_close(state["ema"][name], newest * weight, rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------- batches
def batch_of(method, batch_size=1000, data=None, step=1, rank=0, world=1, seed=0, paper=False):
    if data is None:
        generator = torch.Generator().manual_seed(0)
        data = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8, generator=generator)
    config = dict(seed=seed, batch_size=batch_size, device="cpu", paper=paper)
    args = argparse.Namespace(**RECIPES[method] | config)
    return draw(data, args, step, rank, world)


@pytest.mark.parametrize(
    "method, share", [("flow", 0), ("shortcut", 0), ("meanflow", 0.5), ("lsd", 0.5)]
)
def test_images_are_flipped_with_the_recipe_s_probability(method, share):
    image = torch.arange(48, dtype=torch.uint8).reshape(1, 3, 4, 4)
    drawn = to_bytes(batch_of(method, data=image)[0])
    flipped = (drawn == image.flip(3)).flatten(1).all(1)
    as_it_is = (drawn == image).flatten(1).all(1)
    assert (flipped | as_it_is).all()
    assert flipped.double().mean().item() == pytest.approx(share, abs=0.05)


def test_a_batch_is_drawn_from_all_images_with_fresh_noise():
    data = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 3, 4, 4)
    x1, x0, *_ = batch_of("lsd", data=data)
    counts = to_bytes(x1)[:, 0, 0, 0].bincount(minlength=5)
    assert counts.min() > 150
    assert 128 * (x1 + 1) - to_bytes(x1) == pytest.approx(0.5, abs=0.5)  # dequantized
    assert x0.mean().abs() < 0.02 and x0.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    "method, paper, forward",
    [
        ("meanflow", False, False),
        ("shortcut", False, False),
        ("lsd", False, False),
        ("lsd", True, False),
        ("shortcut", True, True),
        ("shortcut-distill", True, True),
        ("meanflow", True, True),
    ],
)
def test_times_are_the_recipe_s(method, paper, forward):
    _, _, t, s, _ = batch_of(method, paper=paper)
    share = (t <= s).double().mean().item()
    assert share == 1 if forward else share == pytest.approx(0.5, abs=0.05)
    late = (1 - torch.cat([t, s]) < 0.03).double().mean().item()
    if not paper:  # half of the pairs with 1 - t + 0.003 log-uniform
        log_share = math.log(0.033 / 0.003) / math.log(1.003 / 0.003)
        assert late == pytest.approx((0.03 + log_share) / 2, abs=0.04)
    elif method == "meanflow":
        logits = torch.logit(1 - torch.cat([t, s]).double())
        assert logits.mean() == pytest.approx(-2, abs=0.2)
        assert logits.std() == pytest.approx(2, abs=0.2)
    else:
        assert late == pytest.approx(0.03, abs=0.02)


def test_probes_are_the_paper_s_signs_or_white_in_a_dct_basis():
    signs = batch_of("lsd", paper=True)[4]
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    eps = batch_of("lsd")[4]
    assert eps.unique().numel() > 10
    torch.testing.assert_close(eps.square().flatten(1).sum(1), torch.full((1000,), 48.0))


def test_a_batch_is_a_function_of_seed_and_step():
    first = batch_of("lsd", 8)
    torch.rand(3)
    for a, b in zip(first, batch_of("lsd", 8)):
        assert torch.equal(a, b)
    for other in (dict(step=2), dict(seed=1), dict(seed=2**32), dict(seed=2**64 - 1)):
        for a, b in zip(first, batch_of("lsd", 8, **other)):
            assert not torch.equal(a, b), other


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("paper", [True, False])
def test_ranks_share_one_global_batch_whatever_their_number(world, paper):
    whole = batch_of("meanflow", 8, paper=paper)
    parts = [batch_of("meanflow", 8, rank=r, world=world, paper=paper) for r in range(world)]
    for all_of_it, *pieces in zip(whole, *parts):
        rows = torch.cat(pieces).flatten(1) if all_of_it.dim() > 1 else torch.cat(pieces)[:, None]
        expected = all_of_it.reshape(8, -1)
        assert sorted(rows.tolist()) == sorted(expected.tolist())
        assert all(len(piece) == 8 // world for piece in pieces)


def test_dropout_masks_differ_between_ranks_and_steps_and_come_back():
    seen = []
    for options in (dict(), dict(rank=1, world=2), dict(step=2), dict()):
        batch_of("lsd", 8, **options)
        seen.append(torch.rand(5))
    assert torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


# ------------------------------------------------------------------------------- micro-batches
def gradients_of(flow, accumulated):
    flow.zero_grad()
    losses = accumulated()
    return losses, [None if p.grad is None else p.grad.clone() for p in flow.parameters()]


@pytest.mark.parametrize("paper", [True, False])
@pytest.mark.parametrize("with_teacher", [True, False])
@pytest.mark.parametrize("condition", [None, *CONDITIONS])
def test_pieces_give_the_gradients_of_the_whole(condition, with_teacher, paper):
    flow = fix_weights(build(MODEL | {"paper": paper}, "cpu"))
    velocity = ExactGaussian().velocity if with_teacher else None
    x1, x0, eps = noise(3, 17, 3, 8, 8)
    batch = (x1 / 2, x0, *times(17), eps)

    def objective(x1, x0, t, s, eps, diagonal):
        draws = dict(x0=x0, t=t, s=s, probe=eps, diagonal=diagonal)
        return f2d2_loss(flow, x1, condition, velocity, paper=paper, **draws)

    for n in (17,) if condition is None else (5, 12):

        def whole(n=n):
            losses = objective(*batch, diagonal=n / 17)
            sum(losses.values()).backward()
            return losses

        expected, gradients = gradients_of(flow, whole)
        for count in (3, 4):
            cut = functools.partial(accumulate, objective, batch, n, count)
            found, others = gradients_of(flow, cut)
            for name in TERMS:
                torch.testing.assert_close(found[name], expected[name].detach(), msg=name)
            for g, other in zip(gradients, others):
                assert (g is None) == (other is None)
                if g is not None:
                    torch.testing.assert_close(other, g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("condition", [None, *CONDITIONS])
def test_a_batch_of_one_image_trains_both_heads(condition):
    """Its one row serves the tangent condition and the other one."""
    flow = fix_weights(build(MODEL | {"paper": False}, "cpu"))
    x1, x0, eps = noise(3, 1, 3, 8, 8)
    batch = (x1 / 2, x0, *times(1), eps)

    def objective(x1, x0, t, s, eps, diagonal=1.0):
        draws = dict(x0=x0, t=t, s=s, probe=eps, diagonal=diagonal)
        return f2d2_loss(flow, x1, condition, ExactGaussian().velocity, **draws)

    losses = accumulate(objective, batch, 1, 1)
    for name, expected in objective(*batch).items():
        torch.testing.assert_close(losses[name], expected.detach())
        assert (expected > 0) == (condition is not None or name in ("vm", "div"))


@pytest.mark.parametrize("method", ["flow", "shortcut", "lsd"])
@pytest.mark.parametrize("piece", [1, 3, 4])
def test_micro_batches_end_with_the_weights_of_the_whole(
    tmp_path, photos, monkeypatch, method, piece
):
    sizes = []
    for pieces in (7, piece):
        calls = spy(monkeypatch)
        options = [
            "--method",
            method,
            "--batch-size",
            7,
            "--warmup",
            1,
            "--micro-batch",
            pieces,
        ]
        run(tmp_path / str(pieces), photos, *options, steps=2)
        sizes.append([len(call["x1"]) for call in calls])
    assert sizes[0] == [7, 7]
    assert sum(sizes[1]) == 14 and len(sizes[1]) > 2
    assert max(sizes[1]) <= (piece if method == "flow" else max(piece, 3))  # of both kinds
    whole, cut = checkpoint(tmp_path / "7"), checkpoint(tmp_path / str(piece))
    assert_same_weights(whole, cut, rtol=1e-5, atol=1e-6)


def out_of_memory_above(most, error):
    def change(losses, arguments):
        if len(arguments["x1"]) > most:
            raise error
        return losses

    return change


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("MPS backend out of memory")],
)
def test_out_of_memory_leads_to_half_the_piece_and_the_same_weights(
    tmp_path, photos, monkeypatch, capsys, error
):
    options = ["--method", "lsd", "--batch-size", 8, "--warmup", 1]
    run(tmp_path / "plenty", photos, *options)
    capsys.readouterr()
    calls = spy(monkeypatch, out_of_memory_above(4, error))
    run(tmp_path / "scarce", photos, *options)
    assert [len(call["x1"]) for call in calls] == [8] + 6 * [4]
    lines = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert len(lines) == 1 and "4 images" in lines[0]
    plenty, scarce = checkpoint(tmp_path / "plenty"), checkpoint(tmp_path / "scarce")
    assert_same_weights(plenty, scarce, rtol=1e-5, atol=1e-6)


def test_another_error_of_a_step_is_not_taken_for_it(tmp_path, photos, monkeypatch):
    spy(monkeypatch, out_of_memory_above(4, RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="do not fit"):
        run(tmp_path, photos, "--method", "lsd", "--batch-size", 8)


def test_out_of_memory_at_the_smallest_piece_names_the_channels(
    tmp_path, photos, monkeypatch, capsys
):
    calls = spy(monkeypatch, out_of_memory_above(0, torch.OutOfMemoryError("CUDA out of memory")))
    out = tmp_path / "out"
    for method in ("flow", "lsd"):
        options = [
            *TINY,
            "--dataset",
            photos,
            "--method",
            method,
            "--out",
            out / method,
        ]
        assert "--channels" in refused(capsys, *options)
    assert len(calls[-1]["x1"]) == 2  # one of each kind
    assert not list(out.glob("*/latest.pt"))


# ------------------------------------------------------------------------------- training
OPTIONS = [
    ["--method", "flow"],
    ["--method", "shortcut"],
    ["--method", "meanflow"],
    ["--method", "lsd"],
    ["--method", "shortcut-distill", "T"],
    ["--method", "meanflow", "T"],
    ["--method", "lsd", "T"],
    ["--method", "meanflow", "--no-divergence"],
    ["--method", "lsd", "--no-divergence", "T"],
    ["--method", "shortcut", "--paper"],
    ["--method", "meanflow", "--paper"],
    ["--method", "lsd", "--paper"],
]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_every_method(tmp_path, photos, teacher, options, capsys):
    options = [*options[:-1], "--teacher", teacher] if options[-1] == "T" else options
    metrics = run(tmp_path, photos, *options, "--dropout", 0.1, steps=4)
    head = "--no-divergence" not in options and "flow" not in options
    assert ("head.0.weight" in checkpoint(tmp_path)["ema"]) == head
    assert metrics["step"] == 4 and metrics["images"] == 5
    assert metrics["mirror"] == ("--paper" in options and "lsd" not in options)
    assert list(metrics["steps"]) == ["8", "4", "2", "1"]
    assert math.isfinite(metrics["oracle"]["bpd"])
    for row in metrics["steps"].values():
        assert row.get("fid") is None
        for key in ("bpd", "se", "gap", "mae_oracle", "corr"):
            assert (row.get(key) is not None) == head
    out = capsys.readouterr().out
    assert "12 train, 5 test images" in out and "parameters" in out
    lines = [line for line in out.splitlines() if "images/s" in line]
    assert [line.split("/")[0] for line in lines] == ["1", "2", "3", "4"]
    assert all("s left" in line for line in lines)
    for picture in ("samples.png", "progress.png"):
        width, height = Image.open(tmp_path / picture).size
        assert width > height  # eight images in each of four rows


@pytest.mark.usefixtures("real_network")
@pytest.mark.parametrize("method", ["meanflow", "lsd"])
def test_the_unet_is_what_is_trained(tmp_path, photos, method):
    metrics = run(tmp_path, photos, "--method", method, "--dropout", 0.1, "--warmup", 1, steps=2)
    state = checkpoint(tmp_path)
    assert metrics["step"] == 2 and math.isfinite(metrics["oracle"]["bpd"])
    assert state["flow"]["backbone.stem.weight"].shape == (4, 3, 3, 3)
    fresh = UNet(8, 4, 1).state_dict()
    assert {k[9:] for k in state["flow"] if k.startswith("backbone.")} == set(fresh)


@pytest.mark.parametrize("seconds, saves", [(0, 3), (3600, 1)])
def test_saves_go_by_the_clock(tmp_path, photos, monkeypatch, seconds, saves):
    steps = []
    whole = torch.save

    def recorded(state, *args, **options):
        steps.append(state["step"])
        return whole(state, *args, **options)

    monkeypatch.setattr(train_image, "SAVE_SECONDS", seconds)
    monkeypatch.setattr(torch, "save", recorded)
    run(tmp_path, photos, "--method", "flow", steps=3)
    assert steps == [1, 2, 3][-saves:]


def test_out_is_below_runs_by_default(tmp_path, photos, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = words("--dataset", photos, "--method", "flow", "--steps", 1, "--seed", 7)
    main([*TINY, *options])
    (metrics,) = tmp_path.glob("runs/image/*/metrics.json")
    for word in (photos.name, "flow", "7"):
        assert word in metrics.parent.name


def test_dropout_reaches_the_network(tmp_path, photos):
    for share in ("0", "0.5"):
        run(tmp_path / share, photos, "--method", "flow", "--dropout", share, steps=1)
    with_dropout, without = checkpoint(tmp_path / "0.5"), checkpoint(tmp_path / "0")
    assert not torch.equal(
        with_dropout["flow"]["backbone.first.weight"],
        without["flow"]["backbone.first.weight"],
    )


def test_the_train_split_is_trained_on(tmp_path, photos, monkeypatch):
    calls = spy(monkeypatch)
    run(tmp_path, photos, "--method", "lsd", "--batch-size", 64, steps=2)
    drawn = {image.numpy().tobytes() for call in calls for image in to_bytes(call["x1"])}
    images = torch.from_numpy(write_images(tmp_path / "again", 12))
    train = {image.numpy().tobytes() for image in torch.cat([images, images.flip(3)])}
    assert len(drawn) > 12 and drawn <= train


def test_a_student_starts_from_its_teacher_or_from_init(tmp_path, photos, teacher, monkeypatch):
    other = tmp_path / "other"
    run(other, photos, "--method", "meanflow", "--seed", 3, steps=2)
    monkeypatch.setattr(f2d2, "f2d2_loss", no_loss)
    distill = ["--method", "shortcut-distill", "--teacher", teacher]
    for name, options, source in (
        ("student", distill, teacher.parent),
        ("init", [*distill, "--init", other / "latest.pt"], other),
        ("plain", ["--method", "meanflow", "--init", other / "latest.pt"], other),
    ):
        run(tmp_path / name, photos, *options, steps=1)
        found = checkpoint(tmp_path / name)["flow"]
        expected = checkpoint(source)["ema"]
        assert set(expected) <= set(found)
        for key, weight in expected.items():
            assert torch.equal(found[key], weight), key


def test_a_sampling_only_checkpoint_gains_a_head_without_a_warm_start(
    tmp_path, photos, monkeypatch
):
    run(tmp_path / "plain", photos, "--method", "meanflow", "--no-divergence")
    calls = spy(monkeypatch)
    options = ["--method", "meanflow", "--init", tmp_path / "plain/latest.pt"]
    metrics = run(tmp_path / "more", photos, *options, steps=2)
    assert metrics["steps"]["1"]["bpd"] is not None
    assert all(len(c["flow"](c["x1"], c["t"], c["s"])) == 2 for c in calls)


def test_averaged_weights_are_evaluated(tmp_path, photos):
    trained = run(tmp_path, photos, "--method", "lsd")
    state = checkpoint(tmp_path)
    command = [
        *QUICK,
        *words("--eval", tmp_path / "latest.pt", "--dataset", photos, "--out"),
    ]
    found = {}
    for part in (None, "flow", "ema"):
        if part:
            weights = {k: w + 0.1 for k, w in state[part].items()}
            torch.save(state | {part: weights}, tmp_path / "latest.pt")
        out = tmp_path / str(part)
        main([*command, str(out)])
        found[part] = json.loads((out / "metrics.json").read_text())["steps"]
    assert found[None] == trained["steps"]
    assert found["flow"] == trained["steps"]
    assert found["ema"]["1"]["bpd"] != pytest.approx(trained["steps"]["1"]["bpd"], abs=1e-4)


def test_the_teacher_is_the_oracle(tmp_path, photos, teacher):
    at_the_teacher = json.loads((teacher.parent / "metrics.json").read_text())
    student = run(tmp_path / "a", photos, "--method", "lsd", "--teacher", teacher)
    alone = run(tmp_path / "b", photos, "--method", "lsd")
    expected = at_the_teacher["oracle"]["bpd"]
    assert student["oracle"]["bpd"] == expected
    assert student["oracle"]["se"] == at_the_teacher["oracle"]["se"]
    assert alone["oracle"]["bpd"] != expected
    assert str(teacher) in json.dumps(student)
    assert "its own ODE" in json.dumps(alone) and str(teacher) not in json.dumps(alone)


def test_the_image_table_is_read_from_the_runs(tmp_path, photos, teacher):
    options = ["--method", "lsd", "--teacher", teacher]
    runs = [run(tmp_path / seed, photos, *options, "--seed", seed) for seed in "01"]
    table = Path(__file__).parent / "measure/table.py"
    command = [sys.executable, table, tmp_path / "0", tmp_path / "1"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    titles, row = ([cell.strip() for cell in printed.splitlines()[i].split("|")] for i in (0, 2))
    row = dict(zip(titles, row))
    assert row["(seeds)"] == "lsd, teacher (2)"
    assert row["oracle"] == f"{sum(metrics['oracle']['bpd'] for metrics in runs) / 2:.3f}"
    for title, key in {
        "bits/dim": "bpd",
        "gap to the oracle": "gap",
        "error per image": "mae_oracle",
        "correlation": "corr",
    }.items():
        values = [[metrics["steps"][k][key] for metrics in runs] for k in ("8", "4", "2", "1")]
        means = " / ".join(f"{sum(pair) / 2:.3f}" for pair in values)
        low, high = min(map(min, values)), max(map(max, values))
        assert row[title] == f"{means} ({low:.3f} to {high:.3f})"


def test_every_checkpoint_is_read_once(tmp_path, photos, teacher, monkeypatch):
    read = []
    whole = torch.load

    def recorded(path, **options):
        read.append(str(path))
        return whole(path, **options)

    monkeypatch.setattr(torch, "load", recorded)
    run(tmp_path / "out", photos, "--method", "lsd", "--teacher", teacher, steps=1)
    latest = tmp_path / "out/latest.pt"
    assert read == [str(teacher), str(latest)]
    read.clear()
    main([*QUICK, *words("--eval", latest, "--dataset", photos)])
    assert sorted(read) == sorted([str(teacher), str(latest)])


# ------------------------------------------------------------------------------- going on
@pytest.mark.parametrize("method", ["flow", "shortcut", "shortcut-distill", "meanflow", "lsd"])
def test_more_steps_go_on_whatever_the_method(tmp_path, photos, teacher, monkeypatch, method):
    options = ["--method", method]
    if method == "shortcut-distill":
        options += ["--teacher", teacher]
    run(tmp_path, photos, *options, steps=4)
    calls = spy(monkeypatch)
    metrics = run(tmp_path, str(photos) + "/", *options, steps=6)
    assert len(calls) == 2 and metrics["step"] == 6 == checkpoint(tmp_path)["step"]
    metrics = run(tmp_path, photos, *options, steps=6)
    assert len(calls) == 2 and metrics["step"] == 6


def test_a_run_in_two_parts_sees_the_batches_of_one(tmp_path, photos, monkeypatch):
    """The rate falls at the end of a run: without it, two parts and the whole are one run."""
    options = ["--method", "meanflow", "--warmup", 2, "--dropout", 0.3, "--paper"]
    run(tmp_path / "whole", photos, *options, steps=6)
    run(tmp_path / "parts", photos, *options, steps=3)
    run(tmp_path / "parts", photos, *options, steps=6)
    whole, parts = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    assert_same_weights(whole, parts, rtol=0, atol=0)


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
import train_image
from test_train_image import Small

train_image.UNet = Small
train_image.ORACLE_STEPS = 2
train_image.ORACLE_RUNS = 2
train_image.SAVE_SECONDS = 0
out = Path(sys.argv[1])
torch.optim.RAdam([torch.zeros(1)])  # the first optimizer imports much: once for all children

def files():
    if out.exists():
        return out.parent.stat().st_mtime_ns, out.stat().st_mtime_ns, out.stat().st_size

def wait_for_a_write():
    before = files()
    limit = time.time() + 60
    while files() == before and time.time() < limit:
        pass

for kill in range(5):
    child = os.fork()  # before torch has started a thread
    if child == 0:
        train_image.main([*sys.argv[2:], "--out", str(out.parent)])
        os._exit(0)
    if kill < 4:
        wait_for_a_write()
        time.sleep(random.uniform(0, 0.1))
        if kill % 2:
            wait_for_a_write()  # and kill in the middle of it
        os.kill(child, signal.SIGKILL)
    ended = os.waitpid(child, 0)[1]
    assert ended == (signal.SIGKILL if kill < 4 else 0), "the run was over before it was killed"
"""


def test_sigkill_at_any_moment_ends_bit_for_bit_equal(tmp_path, photos):
    options = ["--method", "lsd", "--dropout", 0.1, "--warmup", 20]
    whole = run(tmp_path / "whole", photos, *options, steps=60)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed/latest.pt")]
    command += [*TINY, *words("--dataset", photos, "--steps", 60, *options)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    killed = json.loads((tmp_path / "killed/metrics.json").read_text())
    assert killed["steps"] == whole["steps"] and killed["step"] == 60
    states = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "killed")
    assert_same_weights(*states, rtol=0, atol=0)
    assert not list(tmp_path.glob("*/*.part"))


# ------------------------------------------------------------------------------- two processes
def gradient_norms(output):
    return [float(norm) for norm in re.findall(r"grad (\S+)", output)]


@pytest.mark.usefixtures("real_network")
def test_two_processes_end_with_the_weights_of_one(tmp_path, photos, capsys):
    options = ["--method", "lsd", "--warmup", 1, "--batch-size", 8]
    one = run(tmp_path / "one", photos, *options)
    norms = gradient_norms(capsys.readouterr().out)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", train_image.__file__, *TINY]
    command += words("--dataset", photos, "--steps", 3, "--out", tmp_path / "two", *options)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(norms) == 3 and gradient_norms(done.stdout) == pytest.approx(norms, rel=1e-3)
    states = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    assert_same_weights(*states, rtol=1e-5, atol=1e-5)
    two = json.loads((tmp_path / "two/metrics.json").read_text())
    assert two["steps"]["1"]["bpd"] == pytest.approx(one["steps"]["1"]["bpd"], abs=1e-4)


TERMINATED = """
import os, signal, sys, time
from pathlib import Path
import torch
import train_image
from test_train_image import Small

train_image.UNet = Small
train_image.SAVE_SECONDS = 0
out = Path(sys.argv[1])
torch.optim.RAdam([torch.zeros(1)])
children = []
for rank in ("0", "1"):
    children.append(os.fork())
    if children[-1] == 0:
        os.environ.update(RANK=rank, LOCAL_RANK=rank)
        train_image.main([*sys.argv[2:], "--out", str(out.parent)])
        os._exit(0)
while not out.exists():
    time.sleep(0.001)
os.kill(children[1], signal.SIGTERM)
assert os.waitpid(children[1], 0)[1] == signal.SIGTERM
time.sleep(0.1)
os.kill(children[0], signal.SIGTERM)  # as torchrun does when it misses one
"""


def test_sigterm_of_one_of_two_processes_leaves_the_last_save(tmp_path, photos):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--method", "lsd", "--warmup", 1]
    command = [sys.executable, "-c", TERMINATED, str(tmp_path / "out/latest.pt")]
    command += [*TINY, *words("--dataset", photos, "--steps", 100_000, *options)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    step = checkpoint(tmp_path / "out")["step"]
    assert f"{step}/100000" in done.stdout and "saved" not in done.stdout.lower()
    assert run(tmp_path / "out", photos, *options, steps=step + 1)["step"] == step + 1


def test_a_world_without_torchrun_is_one_sentence(tmp_path, photos, monkeypatch, capsys):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = refused(capsys, *TINY, "--dataset", photos, "--out", tmp_path / "out")
    assert "torchrun" in message and not (tmp_path / "out").exists()


def test_an_evaluation_under_torchrun_is_one_sentence(
    tmp_path, photos, teacher, monkeypatch, capsys
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "0")
    options = [*QUICK, "--eval", teacher, "--out", tmp_path / "out"]
    for data in (["--dataset", photos], ["--sample", 2]):
        assert "torchrun" in refused(capsys, *options, *data)
        assert not (tmp_path / "out").exists()


def test_a_batch_that_the_processes_cannot_share_is_one_sentence(
    tmp_path, photos, monkeypatch, capsys
):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "0")
    assert "3 processes" in refused(capsys, *TINY, "--dataset", photos, "--out", tmp_path)


# ------------------------------------------------------------------------------- faults
def not_a_number(losses, arguments):
    return losses | {"vm": losses["vm"] * math.nan}


def no_slope(losses, arguments):
    """A finite loss whose gradient is NaN, as of a root at zero."""
    u = arguments["flow"](arguments["x1"], arguments["t"], arguments["s"])[0]
    return losses | {"vm": losses["vm"] + (0 * u).sqrt().sum()}


@pytest.mark.parametrize("change", [not_a_number, no_slope])
@pytest.mark.parametrize("before", [0, 2])
def test_a_loss_that_is_not_finite_ends_in_one_true_sentence(
    tmp_path, photos, monkeypatch, capsys, change, before
):
    path = tmp_path / "out/latest.pt"
    options = ["--dataset", photos, "--method", "lsd", "--out", path.parent]
    if before:
        run(path.parent, photos, "--method", "lsd", steps=before)
    saved = path.read_bytes() if before else None
    spy(monkeypatch, change)
    message = refused(capsys, *TINY, *options, "--steps", 4)
    assert f"not finite at step {before + 1}" in message
    assert (path.read_bytes() if path.exists() else None) == saved
    assert before or str(path) not in message  # there is nothing to go back to


def full_disk(content, file, *args, **options):
    file.write(b"half a checkpoint")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("before", [0, 2])
def test_a_full_disk_leaves_the_state_before_it(tmp_path, photos, monkeypatch, capsys, before):
    path = tmp_path / "out/latest.pt"
    options = ["--dataset", photos, "--method", "lsd", "--out", path.parent]
    if before:
        run(path.parent, photos, "--method", "lsd", steps=before)
    saved = path.read_bytes() if before else None
    monkeypatch.setattr(torch, "save", full_disk)
    message = refused(capsys, *TINY, *options, "--steps", 4)
    assert "No space left" in message
    assert (path.read_bytes() if path.exists() else None) == saved
    assert not list(path.parent.glob("*.part"))
    if before:
        monkeypatch.undo()
        monkeypatch.setattr(train_image, "UNet", Small)
        assert run(path.parent, photos, "--method", "lsd", steps=4)["step"] == 4


def test_the_same_out_twice_at_once_is_refused_the_second_time(
    tmp_path, photos, monkeypatch, capsys
):
    options = [
        "--dataset",
        photos,
        "--method",
        "flow",
        "--steps",
        1,
        "--out",
        tmp_path / "out",
    ]
    messages = []

    def meanwhile(losses, arguments):
        messages.append(refused(capsys, *TINY, *options))
        return losses

    spy(monkeypatch, meanwhile)
    main([*TINY, *words(*options)])
    assert len(messages) == 1 and "another process" in messages[0]
    assert checkpoint(tmp_path / "out")["step"] == 1
    main([*TINY, *words(*options)])  # afterwards it may


def test_another_run_in_out_is_refused_and_left_alone(tmp_path, photos, teacher, capsys):
    out = tmp_path / "out"
    run(out, photos, "--method", "lsd", steps=1)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    command = [
        *TINY,
        "--dataset",
        photos,
        "--method",
        "lsd",
        "--steps",
        1,
        "--out",
        out,
    ]
    for name, other in (
        ("method", ["--method", "meanflow"]),
        ("seed", ["--seed", 1]),
        ("lr", ["--lr", 1e-2]),
        ("paper", ["--paper"]),
        ("channels", ["--channels", 8]),
        ("teacher", ["--teacher", teacher]),
        ("dataset", ["--dataset", photos / "train"]),
    ):
        message = refused(capsys, *command, *other)
        assert name in message and "--out" in message
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


# ------------------------------------------------------------------------------- torch.compile
def test_a_compiled_loss_trains_to_the_same_weights(tmp_path, photos, monkeypatch):
    """aot_eager traces as the compiler does, and needs no compiler."""
    monkeypatch.setattr(train_image, "UNet", OneBlock)
    options = ["--method", "meanflow", "--warmup", 0, "--batch-size", 6]
    run(tmp_path / "eager", photos, *options, steps=1)
    compiled = []
    compiler = torch.compile

    def traced(function, **options):
        compiled.append(function)
        torch._dynamo.reset()
        return compiler(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", traced)
    run(tmp_path / "compiled", photos, *options, "--compile", steps=1)
    assert len(compiled) == 1
    eager, traced_too = (
        checkpoint(tmp_path / "eager"),
        checkpoint(tmp_path / "compiled"),
    )
    assert_same_weights(eager, traced_too, rtol=1e-4, atol=1e-5)
