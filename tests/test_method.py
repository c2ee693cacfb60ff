"""The mathematics of f2d2.py: exact solutions, directions, densities, estimators, gradients."""
import contextlib
import math

import pytest
import torch
from exact import ExactGaussian, times, wide
from torch import nn

import f2d2
from f2d2 import (MLP, JointFlowMap, divergence, f2d2_loss, log_likelihood, ode_log_likelihood, ode_sample, sample,
                  self_guidance)
from train_2d import Gaussians

CONDITIONS = ["semigroup", "eulerian", "lagrangian"]
SHAPES = [(7, 1), (7, 2), (5, 3, 4, 5)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small_flow(shape=(2,), head=True, dtype=torch.float64, **kw):
    """A random flow map, its last layers included, on x [B, *shape]."""
    flow = JointFlowMap(MLP(math.prod(shape), 32, 2), 32, head, **kw).to(dtype)
    for p in flow.parameters():
        nn.init.normal_(p, std=0.3)
    return flow


# ------------------------------------------------------------------------------- exact solutions
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("teacher", [False, True])
def test_exact_solution_has_no_residual(condition, shape, teacher):
    flow = ExactGaussian(mean=0.7, std=0.5)
    x, (t, s) = torch.randn(shape, dtype=torch.float64), times(shape[0])
    velocity = flow.velocity if teacher else None
    prediction, target = f2d2.CONDITIONS[condition](flow, x, t, s, velocity)
    for p, q, expected in zip(prediction, target, (shape, shape[:1])):
        assert p.shape == q.shape == expected
        assert (p - q).abs().max() < 1e-8


@pytest.mark.parametrize("condition", CONDITIONS)
def test_any_other_map_has_a_residual(condition):
    """The check above can fail: a map with the wrong spread, or with D's sign flipped, is not a solution."""
    x, (t, s) = torch.randn(7, 2, dtype=torch.float64), times(7)
    right, wrong = ExactGaussian(std=0.5), ExactGaussian(std=0.6)
    flipped = lambda x, t, s: (right(x, t, s)[0], right(x, t, s)[1] * (1 + t - s))
    for flow, part in ((lambda x, t, s: (wrong(x, t, s)[0] * wide(1 + s, x), wrong(x, t, s)[1]), 0), (flipped, 1)):
        prediction, target = f2d2.CONDITIONS[condition](flow, x, t, s, right.velocity)
        assert (prediction[part] - target[part]).abs().max() > 1e-2


@pytest.mark.parametrize("condition", [None, *CONDITIONS])
def test_loss_vanishes_at_the_exact_solution(condition):
    flow = ExactGaussian(mean=-0.3, std=0.8)
    losses = f2d2_loss(flow, torch.randn(12, 3, dtype=torch.float64), condition, flow.velocity)
    assert sorted(losses) == ["D", "div", "u", "vm"]
    assert all(v.shape == () and v < 1e-16 for v in losses.values())


@pytest.mark.parametrize("steps", [1, 2, 8, torch.tensor([0.0, 0.3, 0.9, 1.0])])
@pytest.mark.parametrize("shape", SHAPES)
def test_likelihood_of_an_exact_map_is_exact_and_agrees_with_sampling(steps, shape):
    flow = ExactGaussian(mean=0.7, std=0.5)
    x0 = torch.randn(shape, dtype=torch.float64)
    x1, log_p = sample(flow, x0, steps)
    torch.testing.assert_close(log_p, flow.log_prob(x1))
    torch.testing.assert_close(log_likelihood(flow, x1, steps), log_p)
    torch.testing.assert_close(x1, 0.7 + 0.5 * x0)


def test_mirrored_likelihood_reproduces_the_known_bias():
    x = torch.full((1, 1), 0.3, dtype=torch.float64)
    flow = ExactGaussian(std=0.5)
    assert log_likelihood(flow, x, 1).item() == pytest.approx(-0.406, abs=5e-4)
    mirrored = [log_likelihood(flow, x, k, mirror=True).item() for k in (1, 2, 4, 8)]
    assert mirrored == pytest.approx([-1.990, -1.399, -0.832, -0.582], abs=5e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gaussian_baseline_is_the_exact_rate_of_a_gaussian(dtype):
    std = torch.tensor([0.002, 0.3, 1.0, 4.0], dtype=dtype)
    t, s = times(200, dtype=dtype)
    t, s = torch.cat([t, t, t.new_tensor([0, 1])]), torch.cat([s, t + 1e-4 * (s - t), t.new_tensor([1, 0])])
    rates = f2d2.gaussian_rates(t, s, std**2)
    for k, sigma in enumerate(std.double()):
        expected = ExactGaussian(std=sigma)(torch.zeros(len(t), 1).double(), t.double(), s.double())[1]
        torch.testing.assert_close(rates[:, k].double(), expected, rtol=1e-7 if dtype is torch.float64 else 2e-3, atol=1e-4)
    here = f2d2.gaussian_rates(t, t, std**2)  # smooth through s = t, where it is -sigma'/sigma
    torch.testing.assert_close(here, (1 - t - t * std[:, None] ** 2).T / ((1 - t) ** 2 + (t * std[:, None]) ** 2).T, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- the oracle
def test_oracle_matches_the_closed_form_of_a_mixture():
    target = Gaussians()
    x = target.sample(64, torch.Generator().manual_seed(1), "cpu").double()
    log_p = ode_log_likelihood(target.velocity, x, 400)
    torch.testing.assert_close(log_p, target.log_prob(x), atol=2e-3, rtol=0)


@pytest.mark.parametrize("euler", [False, True])
def test_oracle_samples(euler):
    x0 = torch.randn(64, 2, dtype=torch.float64)
    x1 = ode_sample(ExactGaussian(mean=0.7, std=0.5).velocity, x0, 400, euler=euler)
    torch.testing.assert_close(x1, 0.7 + 0.5 * x0, atol=1e-2 if euler else 1e-4, rtol=0)


def oracle_error(steps, std=0.3, **kw):
    target = Gaussians()
    target.std = std
    x = target.sample(16, torch.Generator().manual_seed(1), "cpu").double()
    return (ode_log_likelihood(target.velocity, x, steps, **kw) - target.log_prob(x)).abs().mean().item()


def test_oracle_converges_at_second_and_first_order():
    assert math.log2(oracle_error(64) / oracle_error(128)) == pytest.approx(2, abs=0.25)
    assert oracle_error(128) < 2e-3
    assert math.log2(oracle_error(512, euler=True) / oracle_error(1024, euler=True)) == pytest.approx(1, abs=0.25)


def test_64_midpoint_steps_on_the_geometric_grid_beat_1024_uniform_euler_steps():
    """Where it matters: on a mixture with fine structure. (At std 0.3 the Euler grid is fine enough: 0.003 against 0.005.)"""
    assert oracle_error(64, std=0.03) < 0.5 * oracle_error(1024, std=0.03, euler=True)


def test_time_grids():
    x = torch.zeros(1, 1, dtype=torch.float64)
    grid = f2d2.time_grid(32, x, geometric=True)
    assert grid[0] == 0 and grid[-1] == 1
    gaps = (1 - grid + 0.01).log().diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(32))
    torch.testing.assert_close(f2d2.time_grid(4, x), torch.linspace(0, 1, 5).double())


# ------------------------------------------------------------------------------- derivatives and divergences
def test_eulerian_and_lagrangian_targets_against_central_differences():
    flow, velocity = small_flow(), small_flow().velocity
    x, (t, s), e = torch.randn(6, 2).double(), times(6) * 0.9 + 0.05, 1e-5
    v, div = divergence(velocity, x, t, "exact")
    along = lambda sign: flow(x + sign * e * v, t + sign * e, s)
    d_dt = [(a - b) / (2 * e) for a, b in zip(along(1), along(-1))]
    _, (u, D) = f2d2.eulerian(flow, x, t, s, velocity, probe="exact")
    torch.testing.assert_close(u, v + wide(s - t, x) * d_dt[0], atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(D, -div + (s - t) * d_dt[1], atol=1e-7, rtol=1e-6)

    d_ds = [(a - b) / (2 * e) for a, b in zip(flow(x, t, s + e), flow(x, t, s - e))]
    v, div = divergence(velocity, x + wide(s - t, x) * flow(x, t, s)[0], s, "exact")
    _, (u, D) = f2d2.lagrangian(flow, x, t, s, velocity, probe="exact")
    torch.testing.assert_close(u, v - wide(s - t, x) * d_ds[0], atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(D, -div - (s - t) * d_ds[1], atol=1e-7, rtol=1e-6)


def test_semigroup_target_is_two_half_jumps():
    flow = small_flow()
    x, (t, s) = torch.randn(6, 2).double(), times(6)
    _, (u, D) = f2d2.semigroup(flow, x, t, s)
    r, z = (t + s) / 2, torch.zeros(6).double()
    x_s, z_s = flow.jump(*flow.jump(x, z, t, r), r, s)
    torch.testing.assert_close(x_s, x + wide(s - t, x) * u)
    torch.testing.assert_close(z_s, z + (s - t) * D)


def test_eulerian_tangent_and_conditional_velocity():
    """v alone moves the target of u one to one; own_tangent=False makes it the tangent of d/dt as well."""
    flow = small_flow()
    x, (t, s), v = torch.randn(6, 2).double(), times(6), torch.randn(6, 2).double()
    own = flow.velocity(x, t)
    base = f2d2.eulerian(flow, x, t, s, probe="exact")[1]
    with_v = f2d2.eulerian(flow, x, t, s, v=v, probe="exact")[1]
    torch.testing.assert_close(with_v[0] - base[0], v - own)
    torch.testing.assert_close(with_v[1], base[1])
    paper = f2d2.eulerian(flow, x, t, s, v=v, probe="exact", own_tangent=False)[1]
    e = 1e-6
    gap = (flow(x + e * v, t, s)[1] - flow(x + e * own, t, s)[1]) / e
    torch.testing.assert_close(paper[1] - base[1], (s - t) * gap, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(2,), (3, 4, 5)])
def test_exact_divergence_is_the_trace_of_the_jacobian(shape):
    flow = small_flow(shape)
    x, t = torch.randn(3, *shape).double(), times(3)[0]
    v, div = divergence(flow.velocity, x, t, "exact")
    torch.testing.assert_close(v, flow.velocity(x, t))
    d = math.prod(shape)
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda y: flow.velocity(y, t[i : i + 1]), x[i : i + 1])
        torch.testing.assert_close(div[i], jacobian.reshape(d, d).trace())


@pytest.mark.parametrize("probe", ["rademacher", "dct"])
def test_probes_are_unbiased_and_white(probe):
    """eps is recovered from div of v(x) = (a . x) a: (a . eps)^2. Over a basis of a and of a_i + a_j that is eps eps^T."""
    n, shape = 20000, (3, 2, 2)
    seen = []
    x, t = torch.zeros(n, *shape).double(), torch.zeros(n).double()
    for i in range(12):
        a = torch.zeros(12).double()
        a[i] = 1
        linear = lambda x, t: (x.flatten(1) @ a)[:, None].mul(a).reshape(x.shape)
        seen.append(divergence(linear, x, t, probe, torch.Generator().manual_seed(3))[1])
        both = a + (torch.arange(12) == (i + 1) % 12)
        pair = lambda x, t: (x.flatten(1) @ both)[:, None].mul(both).reshape(x.shape)
        assert divergence(pair, x, t, probe)[1].mean().item() == pytest.approx(2, abs=0.15)
    torch.testing.assert_close(torch.stack(seen).mean(1), torch.ones(12).double(), atol=0.05, rtol=0)
    if probe == "dct":  # an orthonormal basis: one probe has length d exactly, as random signs have
        torch.testing.assert_close(torch.stack(seen).sum(0), torch.full((n,), 12.0).double())


def test_dct_probe_has_less_variance_where_the_jacobian_is_smooth():
    """The velocity of a stationary Gaussian field: the Jacobian is a smooth convolution, nearly diagonal in frequency."""
    n = 16
    distance = (torch.arange(n)[:, None] - torch.arange(n)).abs().double()
    blur = torch.exp(-((distance / 3) ** 2))
    field = lambda x, t: blur @ x @ blur
    x, t = torch.zeros(2000, 3, n, n).double(), torch.zeros(2000).double()
    true = 3 * blur.trace() ** 2
    std = {}
    for probe in ("rademacher", "dct"):
        div = divergence(field, x, t, probe)[1]
        std[probe] = div.std().item()
        assert div.mean().item() == pytest.approx(true.item(), abs=4 * std[probe] / 2000**0.5)
    assert std["dct"] < 0.5 * std["rademacher"]


# ------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("teacher", [False, True])
def test_gradients_reach_both_heads_and_stop_at_teacher_and_target(condition, teacher):
    flow, other = small_flow(), small_flow(head=False)
    losses = f2d2_loss(flow, torch.randn(16, 2).double(), condition, other.velocity if teacher else None, probe="exact")
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in flow.parameters())
    assert all(p.grad is None for p in other.parameters())


@pytest.mark.parametrize("condition", CONDITIONS)
def test_targets_carry_no_gradient_except_through_d_ds(condition):
    flow = small_flow()
    x, (t, s) = torch.randn(6, 2).double(), times(6)
    _, (u, D) = f2d2.CONDITIONS[condition](flow, x, t, s, probe="exact")
    assert u.requires_grad == D.requires_grad == (condition == "lagrangian")
    _, (u, D) = f2d2.CONDITIONS[condition](flow, x, t, s, probe="exact", through_dD=False)
    assert u.requires_grad == (condition == "lagrangian") and not D.requires_grad


def test_lagrangian_gradient_runs_through_d_ds_alone():
    """u = (a + b s) x has d/ds u = b x: the target's gradient is -(s-t) x by b, and none by a, which moves the end point."""
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, 0.4))
    flow = lambda x, t, s: (wide(a + b * s, x) * x, (a + b * s) * x.sum(1))
    x, (t, s) = torch.randn(6, 2).double(), times(6)
    _, (u, _) = f2d2.lagrangian(flow, x, t, s, probe="exact")
    by_a, by_b = torch.autograd.grad(u.sum(), (a, b), allow_unused=True)
    assert by_a is None or by_a == 0
    torch.testing.assert_close(by_b, -(wide(s - t, x) * x).sum())
    _, (_, D) = f2d2.lagrangian(flow, x, t, s, probe="exact")  # D = (a + b s) sum(x): likewise
    by_a, by_b = torch.autograd.grad(D.sum(), (a, b), allow_unused=True)
    assert by_a is None or by_a == 0
    torch.testing.assert_close(by_b, -((s - t) * x.sum(1)).sum())


@pytest.mark.parametrize("condition", [None, *CONDITIONS])
def test_without_the_head(condition):
    flow = small_flow(head=False)
    x1 = torch.randn(8, 2).double()
    losses = f2d2_loss(flow, x1, condition)
    sum(losses.values()).backward()
    assert losses["div"] == losses["D"] == 0
    assert flow(x1, *times(8))[1] is None and sample(flow, x1, 2)[1] is None
    with pytest.raises(ValueError, match="no divergence head"):
        log_likelihood(flow, x1, 2)
    with pytest.raises(ValueError, match="no divergence head"):
        self_guidance(flow, x1, 0.1)


def test_warm_start_trains_the_velocity_alone():
    flow = small_flow()
    losses = f2d2_loss(flow, torch.randn(8, 2).double(), "eulerian", joint=False)
    sum(losses.values()).backward()
    assert losses["D"] == losses["div"] == 0 and losses["u"] > 0
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in flow.head.parameters())


def test_given_draws_are_used_and_the_loss_is_the_mean_of_its_record():
    flow, record = small_flow(), {}
    x1, x0, (t, s) = torch.randn(8, 2).double(), torch.randn(8, 2).double(), times(8)
    kw = dict(x0=x0, t=t, s=s, probe="exact", divergence_weight="none", record=record)
    a = f2d2_loss(flow, x1, "semigroup", diagonal=0.25, **kw)
    assert [len(record[k]) for k in ("vm", "div", "u", "D")] == [2, 2, 6, 6]
    for k in a:
        torch.testing.assert_close(a[k], record[k].mean())
    x = wide(1 - t, x0) * x0 + wide(t, x0) * x1
    torch.testing.assert_close(a["vm"], (flow.velocity(x, t) - (x1 - x0))[:2].square().mean())
    D, div = flow(x, t, t)[1], divergence(flow.velocity, x, t, "exact")[1]
    torch.testing.assert_close(a["div"], ((D + div) / 2)[:2].square().mean())
    (_, D), (_, target) = f2d2.semigroup(flow, x, t, s)
    torch.testing.assert_close(a["D"], ((D - target) / 2)[2:].square().mean())


@pytest.mark.parametrize("condition", CONDITIONS)
def test_natural_and_adaptive_weights(condition):
    flow, record = small_flow(), {}
    t, s = times(8)
    kw = dict(x0=torch.randn(8, 2).double(), t=t, s=s, probe="exact", record=record)
    x1 = torch.randn(8, 2).double()
    natural = f2d2_loss(flow, x1, condition, velocity_weight="natural", divergence_weight="natural", **kw)
    scale = torch.maximum(1 - t, 1 - s) + f2d2.DELTA
    weight = {"semigroup": scale**2, "eulerian": scale * (1 - t + f2d2.DELTA), "lagrangian": (1 - s + f2d2.DELTA) ** 2}[condition][4:]
    torch.testing.assert_close(natural["D"], (record["D"] * weight).mean())
    torch.testing.assert_close(natural["div"], (record["div"] * (1 - t[:4] + f2d2.DELTA) ** 2).mean())
    torch.testing.assert_close(natural["vm"], record["vm"].mean())
    torch.testing.assert_close(natural["u"], (record["u"] * weight / scale[4:] ** 2).mean())
    huber = f2d2_loss(flow, x1, condition, divergence_weight="huber", **kw)
    torch.testing.assert_close(huber["D"], (4 * weight * record["D"] / (1 + 300 * weight * record["D"]).sqrt()).mean())
    adaptive = f2d2_loss(flow, x1, condition, velocity_weight="adaptive", divergence_weight="adaptive", **kw)
    for k in ("vm", "u", "div", "D"):
        torch.testing.assert_close(adaptive[k], (record[k] / (record[k] + 1e-3) ** 0.75).mean())


def test_sampled_times():
    x = torch.zeros(20000, 1)
    t, s = f2d2.sample_times(x, log_time=0.0)
    assert abs((t < s).double().mean() - 0.5) < 0.02 and abs(t.mean() - 0.5) < 0.01
    t, s = f2d2.sample_times(x, direction="forward")
    assert (t <= s).all() and t.min() >= 0 and s.max() <= 1
    t, s = f2d2.sample_times(x, log_time=1.0)  # 1 - t log-uniform in [0.001, 1]: its median is 0.0316
    assert (1 - t).median().log10().item() == pytest.approx(-1.5, abs=0.03) and (1 - t).min() > 0.00099
    t, s = f2d2.sample_times(x)  # half of the pairs, both times of a pair or neither
    late = t > 0.9, s > 0.9
    assert late[0].double().mean().item() == pytest.approx(0.5 * 0.1 + 0.5 * 2 / 3, abs=0.015)
    assert (late[0] & late[1]).double().mean().item() == pytest.approx(0.5 * 0.01 + 0.5 * 4 / 9, abs=0.015)


# ------------------------------------------------------------------------------- bits, bytes, guidance, devices
def test_bits_per_dim_of_uniform_noise_is_eight():
    d = 48
    log_p = torch.full((3,), -d * math.log(2.0))  # uniform on [-1, 1): density 1/2 per dimension
    assert f2d2.bits_per_dim(log_p, d).tolist() == [8.0, 8.0, 8.0]


def test_dequantized_bytes_stay_in_range_and_come_back():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(4, 3, 16, 16)
    for noise in (None, torch.zeros(images.shape), torch.full(images.shape, 1 - 2**-24)):
        x = f2d2.dequantize(images, noise)
        assert x.min() >= -1 and x.max() < 1
        assert torch.equal(((x + 1) * 128).floor().to(torch.uint8), images)
    x = f2d2.dequantize(images)
    assert x.mean().item() == pytest.approx(0, abs=1e-3)


def test_self_guidance_raises_its_objective_through_the_head():
    flow = small_flow()
    x0, zero = torch.randn(32, 2).double(), torch.zeros(32).double()
    objective = lambda x: (f2d2.normal_log_density(x) + flow(x, zero, zero + 1)[1]).mean().item()
    with torch.no_grad():
        guided = [self_guidance(flow, x0, 0.02, k) for k in (0, 1, 5)]
    values = [objective(x) for x in guided]
    assert torch.equal(guided[0], x0) and values[0] < values[1] < values[2]
    assert all(p.grad is None for p in flow.parameters())
    # Adam's first step is lr times the sign of the gradient, and half of that gradient is the head's
    x = x0.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((f2d2.normal_log_density(x) + flow(x, zero, zero + 1)[1]).sum(), x)
    torch.testing.assert_close(guided[1] - x0, 0.02 * gradient.sign(), atol=1e-5, rtol=0)
    assert (gradient + x0).abs().max() > 1e-3
    assert (self_guidance(flow, x0) - x0).abs().max().item() == pytest.approx(0.005, rel=1e-3)  # the default: one step of Adam at 0.005


@pytest.mark.parametrize("shape", [(4, 1), (4, 2), (4, 3, 4, 5)])
@pytest.mark.parametrize("condition", [None, *CONDITIONS])
def test_every_loss_runs_on_meta_and_in_float64(condition, shape):
    with torch.device("meta"):
        flow = JointFlowMap(MLP(math.prod(shape[1:]), 16, 2), 16)
    for probe in ("exact", "rademacher", "dct"):
        for teacher in (None, flow.velocity):
            losses = f2d2_loss(flow, torch.empty(shape, device="meta"), condition, teacher, probe=probe)
            sum(losses.values()).backward()
            assert all(v.device.type == "meta" and v.shape == () for v in losses.values())
    x = torch.empty(shape, device="meta")
    for out in (*sample(flow, x, 2), log_likelihood(flow, x, 2), ode_log_likelihood(flow.velocity, x, 2)):
        assert out.device.type == "meta"
    assert ode_sample(flow.velocity, x, 2, euler=True).device.type == "meta"
    flow = small_flow(shape[1:])
    losses = f2d2_loss(flow, torch.randn(shape, dtype=torch.float64), condition)
    assert all(v.dtype == torch.float64 for v in losses.values())


@pytest.mark.parametrize("condition", [None, *CONDITIONS])
def test_a_batch_of_one_and_fixed_generators(condition):
    flow = small_flow()
    draw = lambda: f2d2_loss(flow, torch.ones(1, 2).double(), condition, generator=torch.Generator().manual_seed(5))
    first, second = draw(), draw()
    assert all(torch.isfinite(first[k]) and first[k] == second[k] for k in first)


# ------------------------------------------------------------------------------- bad input
class Bad(nn.Module):
    def __init__(self, u, features):
        super().__init__()
        self.shapes = u, features

    def forward(self, x, t, s):
        return torch.zeros(self.shapes[0]), torch.zeros(self.shapes[1])


def test_bad_input_is_refused_in_one_sentence():
    flow = small_flow(dtype=torch.float32)
    x, t, s = torch.randn(4, 2), torch.rand(4), torch.rand(4)
    cases = [
        ("shape", lambda: flow(x, t[:, None], s)),
        ("shape", lambda: flow(x, t, s[:2])),
        ("must lie in", lambda: flow(x, t + 1, s)),
        ("must lie in", lambda: flow.jump(x, t, t, s - 1)),
        ("must lie in", lambda: f2d2.lagrangian(flow, x, t, s + 1)),
        ("must lie in", lambda: f2d2_loss(flow, x, "eulerian", t=t, s=s * float("nan"))),
        ("floating point", lambda: flow(x.long(), t, s)),
        ("floating point", lambda: f2d2_loss(flow, torch.zeros(4, 2, dtype=torch.uint8), "semigroup")),
        ("use t.to", lambda: flow(x, t.double(), s)),
        ("use t.to", lambda: flow(x, t.to("meta"), s)),
        ("unknown condition", lambda: f2d2_loss(flow, x, "euler")),
        ("unknown weight", lambda: f2d2_loss(flow, x, "semigroup", velocity_weight="big")),
        ("unknown direction", lambda: f2d2_loss(flow, x, "semigroup", direction="backward")),
        ("unknown probe", lambda: divergence(flow.velocity, x, t, "gauss")),
        ("probe has shape", lambda: divergence(flow.velocity, x, t, x[:1])),
        ("whole number", lambda: sample(flow, x, 0)),
        ("whole number", lambda: log_likelihood(flow, x, 2.5)),
        ("tensor of times", lambda: sample(flow, x, torch.tensor([0.0, 0.5]))),
        ("uint8", lambda: f2d2.dequantize(x)),
        ("backbone's u", lambda: JointFlowMap(Bad((4, 1), (4, 8)), 8)(x, t, s)),
        ("features", lambda: JointFlowMap(Bad((4, 2), (4, 9)), 8)(x, t, s)),
    ]
    for match, call in cases:
        with pytest.raises(ValueError, match=match):
            call()


def test_a_column_of_D_is_refused_not_broadcast():
    """The slip of the published semigroup divergence loss: [B] against [B, 1]."""
    flow = small_flow()
    slip = lambda x, t, s: (flow(x, t, s)[0], flow(x, t, s)[1][:, None])
    with pytest.raises((ValueError, RuntimeError)):
        f2d2_loss(slip, torch.randn(6, 2).double(), "semigroup", probe="exact")


# ------------------------------------------------------------------------------- the backbones
def test_the_mlp_sees_x_and_waves_of_x_and_2x():
    net, x, (t, s), seen = f2d2.MLP(3, 16, 1).double(), torch.randn(5, 3).double(), times(5), []
    net.body.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net(x, t, s)
    torch.testing.assert_close(seen[0][:, :15], torch.cat([x] + [wave(k * x) for k in (1, 2) for wave in (torch.sin, torch.cos)], 1))
    torch.testing.assert_close(seen[0][:, 15:], f2d2.time_features(t, s))


def small_unet(dtype=torch.float64, **kw):
    backbone = f2d2.UNet(**dict(dict(image_size=8, channels=4, multipliers=(1, 2), blocks=1, attention=(4,)) | kw))
    flow = JointFlowMap(backbone, backbone.feature_dim).to(dtype)
    for p in flow.parameters():
        nn.init.normal_(p, std=0.2)
    return flow


def test_the_default_unet_has_50_to_60_million_parameters_and_a_small_head():
    with torch.device("meta"):
        backbone = f2d2.UNet()
        flow = JointFlowMap(backbone, backbone.feature_dim)
        x, t = torch.empty(2, 3, 32, 32), torch.empty(2)
        u, D = flow(x, t, t)
    size, head = (sum(p.numel() for p in net.parameters()) for net in (flow, flow.head))
    assert u.shape == x.shape and D.shape == t.shape
    assert 50e6 < size < 60e6 and head < 0.02 * size
    with pytest.raises(ValueError, match="multiple of 4"):
        f2d2.UNet(image_size=30)


def test_the_head_sees_how_large_an_image_is():
    """A fresh U-Net is its skips, linear in x: ten times the image is ln 100 more in the features of size."""
    backbone = f2d2.UNet(8, 16, blocks=1)
    x, t = 100 * torch.randn(2, 3, 8, 8), torch.rand(2)
    size, larger = (backbone(scale * x, t, t)[1][:, -16:] for scale in (1, 10))
    torch.testing.assert_close(larger - size, torch.full((2, 16), math.log(100)), atol=0.1, rtol=0)
    assert torch.autograd.grad(size.sum(), backbone.stem.weight)[0].abs().min() > 0
    assert all(m.num_channels // m.num_groups >= 4 for m in backbone.modules() if isinstance(m, nn.GroupNorm))


def test_unet_derivatives_attention_included_against_central_differences_also_at_s_equal_t():
    flow, e = small_unet(), 1e-5
    x, dx, (t, _) = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(2, 3, 8, 8, dtype=torch.float64), times(2)
    for s in (t, 1 - t):
        _, got = torch.func.jvp(lambda x, t, s: flow(x, t, s), (x, t, s), (dx, torch.ones_like(t), 2 * torch.ones_like(t)))
        plus, minus = (flow(x + h * dx, t + h, s + 2 * h) for h in (e, -e))
        for g, p, m in zip(got, plus, minus):
            torch.testing.assert_close(g, (p - m) / (2 * e), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", ["middle", "up"])
def test_features_hear_the_bottleneck_and_the_last_layer(part):
    flow = small_unet()
    x, (t, s) = torch.randn(2, 3, 8, 8, dtype=torch.float64), times(2)
    before = flow.backbone(x, t, s)[1]
    with torch.no_grad():
        flow.backbone.middle[1].after[-1].weight.add_(1.0) if part == "middle" else flow.backbone.out[0].weight.add_(1.0)
    changed = (flow.backbone(x, t, s)[1] - before).abs().sum(0) > 1e-9
    half = len(changed) - 8  # the last 8 are the decoder's: means and sizes
    assert changed[:half].any() == (part == "middle") and changed[half:].any()


@pytest.mark.parametrize("condition", [None, *CONDITIONS])
@pytest.mark.parametrize("where", ["meta", "fake"])
def test_a_whole_unet_step_without_a_stray_cpu_tensor(condition, where):
    from torch._subclasses.fake_tensor import FakeTensorMode
    with torch.device("meta"):
        flow, teacher = (small_unet(torch.float32, dropout=0.1) for _ in range(2))
    with FakeTensorMode(allow_non_fake_inputs=True) if where == "fake" else contextlib.nullcontext():
        x1 = torch.empty(4, 3, 8, 8, device="meta")
        for probe in ("rademacher", "dct"):
            sum(f2d2_loss(flow, x1, condition, teacher.velocity, probe=probe).values()).backward()
        assert all(p.grad.device.type == "meta" for p in flow.parameters())


def test_both_passes_of_the_eulerian_drop_the_same_units():
    flow, seen, (t, s) = small_flow(), [], times(3)

    def noisy(x, t, s):
        seen.append(torch.rand(5))
        return flow(x, t, s)
    f2d2.eulerian(noisy, torch.randn(3, 2).double(), t, s, velocity=flow.velocity)
    assert len(seen) == 2 and torch.equal(*seen)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_step_with_dropout_is_repeatable(condition):
    flow = small_unet(dropout=0.5)
    x, (t, s) = torch.randn(3, 3, 8, 8, dtype=torch.float64), times(3)
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(f2d2.CONDITIONS[condition](flow, x, t, s, v=x, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(a, b) for f, g in zip(*runs) for a, b in zip(f, g))


def test_attention_is_torch_s_own():
    block = f2d2.Block(4, 4, 8, attention=True).double()
    [nn.init.normal_(p, std=0.5) for p in block.parameters()]
    plain = f2d2.Block(4, 4, 8).double()
    plain.load_state_dict(block.state_dict(), strict=False)
    x, e = torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    h = plain(x, e)
    q, k, v = (part.transpose(1, 2) for part in block.qkv(h).flatten(2).chunk(3, 1))  # [B, positions, channels]
    out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape)
    torch.testing.assert_close(block(x, e), h + block.merge(out))
