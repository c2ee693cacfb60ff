"""The same numbers on a CUDA device as on the CPU, and the scripts there; all of it is skipped where there is none."""
import copy
import json
import math

import pytest
import torch

import f2d2
import train_2d
import train_image
from exact import times
from f2d2 import CONDITIONS, MLP, JointFlowMap, UNet, f2d2_loss, log_likelihood, ode_log_likelihood, ode_sample, sample, self_guidance
from test_train_2d import small  # noqa: F401  a fixture: every test's train_2d is a small one
from test_train_image import TINY, photos  # noqa: F401

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def pair(backbone, dtype=torch.float64, **kw):
    """One network with random weights, on the CPU and on the GPU."""
    torch.manual_seed(0)
    net = UNet(8, 8, blocks=1, attention=(4,), **kw) if backbone == "unet" else MLP(2, 16, 2)
    flow = JointFlowMap(net, net.feature_dim).to(dtype)
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return flow, copy.deepcopy(flow).cuda()


def points(backbone, seed=1, dtype=torch.float64):
    return torch.randn(6, *((3, 8, 8) if backbone == "unet" else (2,)), generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("backbone", ["unet", "mlp"])
@pytest.mark.parametrize("condition", [None, *CONDITIONS])
@pytest.mark.parametrize("teach", [True, False], ids=["teacher", "no teacher"])
def test_losses_and_gradients(condition, backbone, teach):
    found, (x1, x0, probe), (t, s) = [], (points(backbone, seed) for seed in (1, 2, 3)), times(6)
    for flow in pair(backbone):
        to, teacher = next(flow.parameters()), copy.deepcopy(flow).velocity if teach else None
        losses = f2d2_loss(flow, x1.to(to), condition, teacher, x0=x0.to(to), t=t.to(to), s=s.to(to),
                           probe=probe[: 6 if condition is None else 3].to(to))  # one probe for each half of the batch
        sum(losses.values()).backward()
        found.append([*losses.values(), *(p.grad for p in flow.parameters() if p.grad is not None)])
        assert all(v.device == to.device for v in losses.values())
    torch.testing.assert_close([v.cpu() for v in found[1]], found[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("backbone", ["unet", "mlp"])
def test_samples_and_likelihoods(backbone):
    found = []
    for flow in pair(backbone):
        x = points(backbone).to(next(flow.parameters()))
        found.append([*sample(flow, x, 4), log_likelihood(flow, x, 4), log_likelihood(flow, x, 2, mirror=True), self_guidance(flow, x),
                      log_likelihood(flow, x, f2d2.time_grid(3, x, geometric=True)), ode_sample(flow.velocity, x, 3),
                      ode_log_likelihood(flow.velocity, x, 2, "exact")])
    torch.testing.assert_close([v.cpu() for v in found[1]], found[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("condition", [None, *CONDITIONS])
@pytest.mark.parametrize("probe", ["rademacher", "dct"])
def test_every_draw_is_made_on_the_gpu_and_repeats(condition, probe):
    _, flow = pair("unet", torch.float32, dropout=0.3)
    draw = lambda: f2d2_loss(flow, points("unet", dtype=torch.float32).cuda(), condition, probe=probe,
                             generator=torch.Generator("cuda").manual_seed(3))
    first = (torch.manual_seed(0), draw())[1]
    again = (torch.manual_seed(0), draw())[1]
    assert all(v.is_cuda and torch.isfinite(v) for v in first.values())
    torch.testing.assert_close(again, first)


def test_both_passes_of_the_eulerian_drop_the_same_units():
    _, flow = pair("mlp")
    seen, (t, s) = [], times(6)

    def noisy(x, t, s):
        seen.append(torch.rand(5, device="cuda"))
        return flow(x, t, s)
    f2d2.eulerian(noisy, points("mlp").cuda(), t.cuda(), s.cuda(), velocity=flow.velocity)
    assert len(seen) == 2 and torch.equal(*seen)


@pytest.mark.parametrize("options", [["--method", "lsd"], ["--method", "meanflow", "--no-teacher"], ["--method", "shortcut-distill"]], ids=" ".join)
def test_train_2d(tmp_path, options):
    measured = []
    for _ in range(2):
        train_2d.main([*options, "--device", "cuda", "--steps", "12", "--out", str(tmp_path)])
        measured.append(json.loads((tmp_path / "metrics.json").read_text())["steps"])
        (tmp_path / "metrics.json").unlink()  # as if stopped before the table: the run goes on from its checkpoint
    assert all(math.isfinite(row["mae_oracle"]) for row in measured[0].values())
    assert measured[1]["1"]["nll"] == pytest.approx(measured[0]["1"]["nll"], rel=1e-4)


ON_GPU = [*TINY[:-1], "cuda", "--fid-network", "none"]  # no download


@pytest.mark.parametrize("options", [
    ["--method", "flow", "--amp", "bf16"], ["--method", "shortcut"], ["--method", "meanflow"], ["--method", "lsd"], ["--method", "lsd", "--paper"],
    ["--method", "meanflow", "--compile"]], ids=" ".join)
def test_train_image(tmp_path, photos, options):
    for steps in ("3", "4"):  # the second goes on from the first
        train_image.main([*ON_GPU, "--dataset", str(photos), "--data", str(photos), "--steps", steps, "--warmup", str(int("flow" not in options)),
                          "--out", str(tmp_path), *options])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    values = [row["euler_bpd" if "flow" in options else "bpd"] for row in metrics["steps"].values()]
    assert metrics["step"] == 4 and all(map(math.isfinite, values))


def test_every_device_sees_the_same_batches(photos):
    _, args = train_image.parse([*ON_GPU, "--dataset", str(photos), "--steps", "4"])
    train_image.settle(args, 1)
    data = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
    here, there = (train_image.draw(data.to(device), args, 1, 0, 1, torch.device(device)) for device in ("cpu", "cuda"))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there))
