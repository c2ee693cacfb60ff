"""The same numbers on an accelerator as on the CPU, and the scripts there: CUDA where there is a
device, else Apple's GPU, which has float32 only; skipped where there is neither."""

import argparse
import copy
import json
import math

import pytest
import torch
from exact import TinyBackbone, field, times
from PIL import Image

import f2d2
import train_2d
import train_image
from f2d2 import JointFlowMap, f2d2_loss, log_likelihood, ode_log_likelihood, ode_sample, sample
from train_2d import MLP
from train_image import UNet


def accelerator():
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else None


DEVICE = accelerator()
DTYPE = torch.float32 if DEVICE == "mps" else torch.float64
CLOSE = dict(rtol=1e-3, atol=1e-4) if DEVICE == "mps" else dict(rtol=1e-8, atol=1e-8)
CONDITIONS = [None, "semigroup", "eulerian", "lagrangian"]
BACKBONES = ["mlp", "unet"]

pytestmark = pytest.mark.skipif(DEVICE is None, reason="needs CUDA or Apple's GPU")


def pair(backbone, dtype=DTYPE, **options):
    """One network with random weights, on the CPU and on the accelerator."""
    torch.manual_seed(0)
    if backbone == "unet":
        net = UNet(16, 8, blocks=1, **options)
    else:
        net = MLP(2, 16, 2)
    flow = JointFlowMap(net, net.feature_dim).to(dtype)
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return flow, copy.deepcopy(flow).to(DEVICE)


def points(backbone, seed=1, dtype=DTYPE):
    shape = (3, 16, 16) if backbone == "unet" else (2,)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, *shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("teacher", [True, False], ids=["teacher", "no teacher"])
def test_losses_and_gradients_are_the_cpu_s(condition, backbone, teacher):
    x1, x0, probe = (points(backbone, seed) for seed in (1, 2, 3))
    t, s = times(6, dtype=DTYPE)
    found = []
    for flow in pair(backbone):
        like = next(flow.parameters())
        draws = dict(x0=x0.to(like), t=t.to(like), s=s.to(like), probe=probe.to(like))
        velocity = copy.deepcopy(flow).velocity if teacher else None
        losses = f2d2_loss(flow, x1.to(like), condition, velocity, **draws)
        assert all(v.device == like.device for v in losses.values())
        sum(losses.values()).backward()
        gradients = [p.grad for p in flow.parameters() if p.grad is not None]
        found.append([v.detach().cpu() for v in (*losses.values(), *gradients)])
    torch.testing.assert_close(found[1], found[0], **CLOSE)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_samples_and_likelihoods_are_the_cpu_s(backbone):
    found = []
    for flow in pair(backbone):
        x = points(backbone).to(next(flow.parameters()))
        results = [
            *sample(flow, x, 4),
            log_likelihood(flow, x, 4),
            log_likelihood(flow, x, 2, mirror=True),
            log_likelihood(flow, x, f2d2.time_grid(3, x, geometric=True)),
            f2d2.self_guidance(flow, x),
            ode_sample(flow.velocity, x, 3),
            ode_log_likelihood(flow.velocity, x, 2, x if backbone == "unet" else "exact"),
        ]
        found.append([v.detach().cpu() for v in results])
    torch.testing.assert_close(found[1], found[0], **CLOSE)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("probe", ["rademacher", "dct"])
def test_every_draw_is_made_on_the_device_and_repeats(condition, probe):
    _, flow = pair("unet", torch.float32, dropout=0.3)
    x1 = points("unet", dtype=torch.float32).to(DEVICE)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        generator = torch.Generator(DEVICE).manual_seed(3)
        runs.append(f2d2_loss(flow, x1, condition, probe=probe, generator=generator))
    assert all(v.device.type == DEVICE and v.isfinite() for v in runs[0].values())
    torch.testing.assert_close(runs[1], runs[0])


def test_both_passes_of_the_eulerian_drop_the_same_units():
    flow = JointFlowMap(TinyBackbone(2, 8), 8).to(DEVICE, DTYPE)
    seen = []

    def noisy(x, t, s):
        seen.append(torch.rand(5, device=DEVICE))
        return flow(x, t, s)

    t, s = times(6, dtype=DTYPE)
    x = points("mlp").to(DEVICE)
    f2d2.eulerian(noisy, field(flow.velocity), x, t.to(DEVICE), s.to(DEVICE))
    assert len(seen) == 2 and torch.equal(*seen)


# ------------------------------------------------------------------------------- train_2d.py
@pytest.mark.parametrize(
    "options",
    [
        ["--method", "lsd"],
        ["--method", "meanflow", "--no-teacher"],
        ["--method", "shortcut-distill"],
    ],
    ids=" ".join,
)
def test_train_2d_runs_and_measures_the_same_again(tmp_path, monkeypatch, options):
    small = dict(WIDTH=32, DEPTH=2, BATCH=64, N_TEST=64, N_SAMPLES=500, N_GRID=10, ORACLE_STEPS=4)
    for name, value in small.items():
        monkeypatch.setattr(train_2d, name, value)
    results = tmp_path / "metrics.json"
    measured = []
    for _ in range(2):
        train_2d.main([*options, "--device", DEVICE, "--steps", "12", "--out", str(tmp_path)])
        measured.append(json.loads(results.read_text())["steps"])
        results.unlink()  # as if stopped before the table: it is measured again
    assert all(math.isfinite(row["mae_oracle"]) for row in measured[0].values())
    assert measured[1]["1"]["nll"] == pytest.approx(measured[0]["1"]["nll"], rel=1e-4)


# ------------------------------------------------------------------------------- train_image.py
SMALL = "--image-size 8 --channels 8 --blocks 1 --batch-size 4 --warmup 1 --oracle-images 4".split()


@pytest.fixture
def photos(tmp_path):
    """Forty images of 8x8 pixels."""
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 8, 8, 3), generator=generator, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image.numpy()).save(folder / f"{i}.png")
    return folder


def image_command(photos, out, *options):
    command = ["--dataset", str(photos), "--device", DEVICE, "--out", str(out), *SMALL]
    return [*command, *options]


@pytest.mark.parametrize("method", ["shortcut", "meanflow", "lsd"])
def test_train_image_trains_and_measures(tmp_path, photos, method):
    out = tmp_path / "run"
    train_image.main(image_command(photos, out, "--method", method, "--steps", "3"))
    metrics = json.loads((out / "metrics.json").read_text())
    assert all(math.isfinite(row["bpd"]) for row in metrics["steps"].values())


def test_train_image_goes_on_from_its_checkpoint(tmp_path, photos):
    out = tmp_path / "run"
    for steps in ("3", "4"):
        train_image.main(image_command(photos, out, "--method", "lsd", "--steps", steps))
    assert json.loads((out / "metrics.json").read_text())["step"] == 4


def test_an_image_batch_is_a_function_of_seed_and_step_on_the_device():
    data = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)

    def draw(seed, step):
        config = dict(seed=seed, batch_size=8, device=DEVICE, paper=False)
        args = argparse.Namespace(**train_image.RECIPES["lsd"] | config)
        return train_image.draw(data, args, step, 0, 1)

    first = draw(0, 1)
    assert all(a.device.type == DEVICE for a in first)
    torch.rand(5, device=DEVICE)
    assert all(torch.equal(a, b) for a, b in zip(draw(0, 1), first))
    for other in (draw(0, 2), draw(1, 1)):
        assert not any(torch.equal(a, b) for a, b in zip(other, first))
