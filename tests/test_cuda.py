"""The same numbers on an accelerator as on the CPU, and the scripts there: CUDA where there is a
device, else Apple's GPU, which has float32 only; skipped where there is neither."""

import copy
import json
import math

import pytest
import torch
from exact import times
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


def pair(backbone, dtype=DTYPE, dropout=0.0):
    """One network with random weights, on the CPU and on the accelerator."""
    torch.manual_seed(0)
    if backbone == "unet":
        net = UNet(16, 3, 8, 1, False, dropout)
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
    seen = []

    def noisy(x, t, s):
        seen.append(torch.rand(5, device=DEVICE))
        return x * t[:, None], s

    t, s = times(6, dtype=DTYPE).to(DEVICE)
    f2d2.eulerian(noisy, lambda x, t: (x, t), points("mlp").to(DEVICE), t, s)
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
SMALL = "--image-size 8 --channels 8 --blocks 1 --batch-size 4 --warmup 1 --oracle-images 4"


@pytest.mark.parametrize("options", ["shortcut", "meanflow", "lsd"])
def test_train_image_trains_goes_on_measures_and_samples(tmp_path, options):
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        pixels = torch.randint(0, 256, (20, 8, 8, 3), generator=generator, dtype=torch.uint8)
        for i, image in enumerate(pixels):
            Image.fromarray(image.numpy()).save(tmp_path / split / f"{i}.png")

    out = tmp_path / "run"
    command = f"{SMALL} --dataset {tmp_path} --device {DEVICE} --out {out} --method {options}"
    for steps in "34":
        train_image.main([*command.split(), "--steps", steps])
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["step"] == 4 and math.isfinite(metrics["oracle"]["energy"])
    assert all(math.isfinite(row["bpd"]) for row in metrics["steps"].values())
    train_image.main(f"--eval {out}/latest.pt --sample 2 --device {DEVICE}".split())
    assert (out / "sample/samples.csv").exists()
