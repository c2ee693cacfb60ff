"""The mathematics of f2d2.py: exact solutions, directions, densities, estimators, gradients."""

import math

import pytest
import torch
from exact import (
    EightGaussians,
    ExactGaussian,
    TinyBackbone,
    field,
    times,
    wide,
)
from scipy.fft import idctn
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import f2d2
from f2d2 import (
    JointFlowMap,
    divergence,
    f2d2_loss,
    log_likelihood,
    normal_log_density,
    ode_log_likelihood,
    ode_sample,
    sample,
    self_guidance,
    time_grid,
)

CONDITIONS = ["semigroup", "eulerian", "lagrangian"]
SHAPES = [(7, 1), (7, 2), (5, 3, 4, 5)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def small_flow(shape=(2,), head=True, paper=False):
    """A random flow map, its last layers included, on x [B, *shape]."""
    flow = JointFlowMap(TinyBackbone(math.prod(shape), 16, paper), 16, head, paper).double()
    for p in flow.parameters():
        nn.init.normal_(p, std=0.3)
    return flow


def draws():
    """x0, x1 and eps [6, 3], t and s [6] with both ends of time and with s = t."""
    x0, x1, eps = normal(3, 6, 3)
    t = torch.tensor([0.0, 0.4, 0.99, 0.2, 1.0, 0.7], dtype=torch.float64)
    s = torch.tensor([0.5, 0.9, 0.1, 0.8, 0.0, 0.7], dtype=torch.float64)
    return x0, x1, eps.sign(), t, s


def teach(x, t):
    """A velocity in closed form that is nobody's exact solution, with a full Jacobian."""
    return wide(1 - t / 2, x) * torch.sin(x + x.roll(1, 1) / 2)


def solve(condition, f, g, x, t, s, **options):
    """(prediction, target) of one of the four conditions."""
    if condition == "tangent":
        return f2d2.tangent(f, g, x, t)
    if condition == "semigroup":
        return f2d2.semigroup(f, x, t, s)
    return getattr(f2d2, condition)(f, g, x, t, s, **options)


def gradients(losses, flow):
    weights = list(flow.parameters())
    loss = sum(losses.values())
    return torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)


# ------------------------------------------------------------------------------- exact solutions
@pytest.mark.parametrize("head", [True, False], ids=["head", "no head"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("condition", ["tangent", *CONDITIONS])
def test_the_exact_solution_has_no_residual(condition, shape, head):
    exact = ExactGaussian(mean=0.7, std=0.5)
    x = normal(*shape)
    t, s = times(shape[0])

    def flow(x, t, s):
        return exact(x, t, s) if head else exact(x, t, s)[:1]

    g = field(exact.velocity, "exact" if head else None)
    prediction, target = solve(condition, flow, g, x, t, s)
    assert len(prediction) == len(target) == 1 + head
    for p, q, expected in zip(prediction, target, (shape, shape[:1])):
        assert p.shape == q.shape == expected
        assert (p - q).abs().max() < 1e-8


@pytest.mark.parametrize("condition", ["tangent", *CONDITIONS])
def test_any_other_map_has_a_residual(condition):
    """The check above can fail: a map with the wrong spread, or with another D, is no solution."""
    x = normal(7, 2)
    t, s = times(7)
    right = ExactGaussian(std=0.5)
    wrong = ExactGaussian(std=0.6)

    def wrong_u(x, t, s):
        u, D = wrong(x, t, s)
        return u * wide(1 + s, x), D

    def wrong_D(x, t, s):
        u, D = right(x, t, s)
        return u, D * (1.5 + t - s)

    for part, flow in enumerate((wrong_u, wrong_D)):
        prediction, target = solve(condition, flow, field(right.velocity), x, t, s)
        assert (prediction[part] - target[part]).abs().max() > 1e-2


@pytest.mark.parametrize("condition", [None, *CONDITIONS])
def test_every_loss_vanishes_at_the_exact_solution(condition):
    flow = ExactGaussian(mean=-0.3, std=0.8)
    losses = f2d2_loss(flow, normal(12, 3), condition, flow.velocity)
    assert list(losses) == ["vm", "u", "div", "D"]
    assert all(v.shape == () and v < 1e-16 for v in losses.values())


@pytest.mark.parametrize("steps", [1, 2, 8, torch.tensor([0.0, 0.3, 0.9, 1.0])])
@pytest.mark.parametrize("shape", SHAPES)
def test_likelihood_of_an_exact_map_is_exact_and_agrees_with_sampling(steps, shape):
    flow = ExactGaussian(mean=0.7, std=0.5)
    x0 = normal(*shape)
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


# ------------------------------------------------------------------------------- the joint flow map


@pytest.mark.parametrize("std", [0.002, 4.0])
def test_one_weight_alone_makes_D_exact_for_data_of_that_spread(std):
    """Sign, scale and direction of the baseline, with no formula of f2d2.py in the test."""
    flow = JointFlowMap(TinyBackbone(6, 8), 8).double()
    last = flow.head[-1]
    last.bias.data[1 if std < 1 else -1] = 1e3
    x = normal(9, 2, 3)
    t, s = times(9)
    expected = ExactGaussian(std=std)(x, t, s)[1]
    torch.testing.assert_close(flow(x, t, s)[1], expected, rtol=1e-5, atol=1e-5)


def test_the_head_starts_from_spreads_around_one_and_without_x():
    flow = JointFlowMap(TinyBackbone(2, 8), 8).double()
    last = flow.head[-1]
    assert (last.weight == 0).all() and last.bias[0] == 0
    log_std = torch.linspace(math.log(0.002), math.log(4), 12, dtype=torch.float64)
    torch.testing.assert_close(last.bias[1:], -(log_std**2) / 8, rtol=1e-5, atol=1e-6)
    t, s = times(5)
    D = flow(normal(5, 2), t, s)[1]
    assert torch.equal(D, flow(normal(5, 2), t, s)[1])


def test_the_paper_s_head_is_two_layers_and_no_baseline():
    flow = small_flow(paper=True)
    first, last = flow.head[0], flow.head[-1]
    assert (first.in_features, last.out_features) == (16 + 8, 1)
    x = normal(6, 2)
    t, s = times(6)
    _, features = flow.backbone(x, t, s)
    hidden = first(torch.cat([features, f2d2.time_features(t, s, paper=True)], 1))
    torch.testing.assert_close(flow(x, t, s)[1], 2 * last(hidden * hidden.sigmoid())[:, 0])


def test_a_jump_moves_x_and_log_p_by_the_average_rates():
    flow = small_flow()
    x = normal(6, 2)
    z = normal(6)
    t, s = times(6)
    u, D = flow(x, t, s)
    x_s, z_s = f2d2.phi((x, z), s - t, flow(x, t, s))
    torch.testing.assert_close(x_s, x + (s - t)[:, None] * u)
    torch.testing.assert_close(z_s, z + (s - t) * D)
    torch.testing.assert_close(flow.velocity(x, t), flow(x, t, t)[0])
    assert len(f2d2.phi((x, z), s - t, small_flow(head=False)(x, t, s))) == 1


def test_time_features_are_the_ten_of_the_docstring():
    t, s = times(4)
    s[0] = 1.4  # of the mirrored likelihood
    found = f2d2.time_features(t, s)
    for row, a, b in zip(found.tolist(), t.tolist(), s.tolist()):
        angles = [math.pi * a, 2 * math.pi * a, math.pi * (b - a)]
        logs = [1 + math.log(abs(1 - r) + 0.003) / 3 for r in (a, b)]
        expected = [a, b - a, *map(math.sin, angles), *map(math.cos, angles), *logs]
        assert row == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(f2d2.time_features(t, s, paper=True), found[:, :8])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gaussian_rates_are_the_exact_ones_also_near_s_equal_t(dtype):
    std = torch.tensor([0.002, 0.3, 1.0, 4.0], dtype=dtype)
    t, s = times(200, dtype=dtype)
    starts = torch.cat([t, t, t.new_tensor([0, 1])])
    ends = torch.cat([s, t + 1e-4 * (s - t), t.new_tensor([1, 0])])
    rates = f2d2.gaussian_rates(starts, ends, std**2).double()
    zero = torch.zeros(len(starts), 1).double()
    for k, sigma in enumerate(std.double()):
        expected = ExactGaussian(std=sigma)(zero, starts.double(), ends.double())[1]
        rtol = 1e-7 if dtype is torch.float64 else 2e-3
        torch.testing.assert_close(rates[:, k], expected, rtol=rtol, atol=1e-4)
    here = f2d2.gaussian_rates(t, t, std**2)  # smooth through s = t, where it is -sigma' / sigma
    t, std = t[:, None], std[None]
    expected = (1 - t - t * std**2) / ((1 - t) ** 2 + (t * std) ** 2)
    torch.testing.assert_close(here, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- the divergence
@pytest.mark.parametrize("shape", [(2,), (3, 4, 5)])
def test_exact_divergence_is_the_trace_of_the_jacobian(shape):
    flow = small_flow(shape)
    x = normal(3, *shape)
    t = times(3)[0]
    v, div = divergence(flow.velocity, x, t, "exact")
    torch.testing.assert_close(v, flow.velocity(x, t))
    d = math.prod(shape)
    for i in range(3):
        rows = slice(i, i + 1)

        def one(y, rows=rows):
            return flow.velocity(y, t[rows])

        jacobian = torch.autograd.functional.jacobian(one, x[rows])
        torch.testing.assert_close(div[i], jacobian.reshape(d, d).trace())


def test_a_given_probe_is_used_as_it_is():
    x = normal(5, 3)
    eps = normal(5, 3)
    matrix = normal(3, 3)
    div = divergence(lambda x, t: x @ matrix.T, x, times(5)[0], eps)[1]
    torch.testing.assert_close(div, torch.einsum("bi,ij,bj->b", eps, matrix, eps))


@pytest.mark.parametrize("probe", ["rademacher", "dct"])
def test_probes_are_white_and_of_length_d(probe):
    """E eps eps^T = I: the estimator is unbiased. And |eps|^2 = d, as random signs have it."""
    n = 20000
    eps = f2d2.hutchinson_probe(normal(n, 3, 2, 2), probe).flatten(1)
    torch.testing.assert_close(eps.T @ eps / n, torch.eye(12).double(), atol=0.05, rtol=0)
    torch.testing.assert_close(eps.square().sum(1), torch.full((n,), 12.0).double())


def test_rademacher_is_signs():
    eps = f2d2.hutchinson_probe(normal(100, 2, 2))
    torch.testing.assert_close(eps.abs(), torch.ones_like(eps))


@pytest.mark.parametrize("shape", [(6,), (3, 4, 5)])
def test_the_dct_probe_is_random_signs_in_scipy_s_basis_colours_included(shape):
    x = normal(4, *shape)
    signs, eps = [
        f2d2.hutchinson_probe(x, probe, torch.Generator().manual_seed(3))
        for probe in ("rademacher", "dct")
    ]
    expected = idctn(signs.numpy(), axes=range(1, signs.dim()), norm="ortho")
    torch.testing.assert_close(eps, torch.from_numpy(expected))


def test_the_residual_s_denominator_is_bounded_at_the_data():
    v = normal(5, 2)
    difference = normal(5, 2)
    found = f2d2.residual_divergence(v, difference, torch.ones(5).double())
    torch.testing.assert_close(found, (2 - (difference - v).square().sum(1)) * 1000)


# ------------------------------------------------------------------------------- the conditions
def test_eulerian_and_lagrangian_targets_against_central_differences():
    flow = small_flow()
    g = field(small_flow().velocity)
    x = normal(6, 2)
    t, s = times(6) * 0.9 + 0.05
    e = 1e-5

    v, minus_div = g(x, t)
    plus = flow(x + e * v, t + e, s)
    minus = flow(x - e * v, t - e, s)
    du_dt, dD_dt = [(a - b) / (2 * e) for a, b in zip(plus, minus)]
    _, (u, D) = f2d2.eulerian(flow, g, x, t, s)
    torch.testing.assert_close(u, v + wide(s - t, x) * du_dt, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(D, minus_div + (s - t) * dD_dt, atol=1e-7, rtol=1e-6)

    du_ds, dD_ds = [(a - b) / (2 * e) for a, b in zip(flow(x, t, s + e), flow(x, t, s - e))]
    x_s = x + wide(s - t, x) * flow(x, t, s)[0]
    for paper in (True, False):  # in this order
        if not paper:
            x_s = torch.where(wide(s < t, x), log_jumps(flow, x, t, s), x_s)
        v, minus_div = g(x_s, s)
        _, (u, D) = f2d2.lagrangian(flow, g, x, t, s, paper=paper)
        torch.testing.assert_close(u, v - wide(s - t, x) * du_ds, atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(D, minus_div - (s - t) * dD_ds, atol=1e-7, rtol=1e-6)
    assert (s < t).any() and (s > t).any()


def log_jumps(flow, x, t, s, count=4):
    """Where jumps of equal length in ln(1 - time + 0.003) arrive, at which LSD takes g if s < t."""
    for k in range(1, count + 1):
        log_r = (1 - k / count) * (1.003 - t).log() + k / count * (1.003 - s).log()
        r = 1.003 - log_r.exp()
        if k == 1:
            here = t
        x = x + wide(r - here, x) * flow(x, here, r)[0]
        here = r
    return x


def test_the_conditional_velocity_moves_u_s_target_and_the_paper_s_tangent():
    """v alone moves the target of u one to one; paper=True makes it the tangent of d/dt as well."""
    flow = small_flow()
    g = field(flow.velocity)
    x = normal(6, 2)
    v = normal(6, 2)
    t, s = times(6)
    own = flow.velocity(x, t)
    prediction, target = f2d2.tangent(flow, g, x, t, v)
    torch.testing.assert_close(prediction, flow(x, t, t))
    torch.testing.assert_close(target, (v, g(x, t)[1]))
    _, base = f2d2.eulerian(flow, g, x, t, s)
    _, with_v = f2d2.eulerian(flow, g, x, t, s, v=v)
    torch.testing.assert_close(with_v[0] - base[0], v - own)
    torch.testing.assert_close(with_v[1], base[1])
    _, paper = f2d2.eulerian(flow, g, x, t, s, v=v, paper=True)
    e = 1e-6
    plus = flow(x + e * v, t, s)
    minus = flow(x + e * own, t, s)
    for k, a in enumerate(with_v):
        gap = (plus[k] - minus[k]) / e
        torch.testing.assert_close(paper[k] - a, wide(s - t, a) * gap, atol=1e-4, rtol=1e-4)
    _, paper = f2d2.eulerian(flow, g, x, t, s, paper=True)  # with a teacher there is no other v
    torch.testing.assert_close(paper, base)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_targets_carry_no_gradient_except_through_d_ds(condition):
    flow = small_flow()
    g = field(flow.velocity)
    x = normal(6, 2)
    t, s = times(6)
    prediction, (u, D) = solve(condition, flow, g, x, t, s)
    assert all(f.requires_grad for f in prediction)
    assert u.requires_grad == D.requires_grad == (condition == "lagrangian")
    if condition != "semigroup":
        _, (u, D) = solve(condition, flow, g, x, t, s, paper=True)
        assert u.requires_grad == (condition == "lagrangian") and not D.requires_grad


def test_the_lagrangian_gradient_runs_through_d_ds_alone():
    """u = (a + b s) x: the target's gradient by b is -(s-t) x, by a, which moves x_s, nothing."""
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def flow(x, t, s):
        return wide(a + b * s, x) * x, (a + b * s) * x.sum(1)

    def g(x, t):  # with a graph by x, so that x_s itself must be stop-gradient
        return x.sin(), x.cos().sum(1)

    x = normal(6, 2)
    t, s = times(6)
    for part, expected in enumerate((wide(s - t, x) * x, (s - t) * x.sum(1))):
        target = f2d2.lagrangian(flow, g, x, t, s)[1][part]
        by_a, by_b = torch.autograd.grad(target.sum(), (a, b), allow_unused=True)
        assert by_a is None or by_a == 0
        torch.testing.assert_close(by_b, -expected.sum())


def test_both_passes_of_the_eulerian_drop_the_same_units_and_one_keeps_a_graph():
    flow = small_flow()
    seen = []
    graph = []

    def noisy(x, t, s):
        seen.append(torch.rand(5))
        graph.append(torch.is_grad_enabled())
        return flow(x, t, s)

    t, s = times(3)
    f2d2.eulerian(noisy, field(flow.velocity), normal(3, 2), t, s)
    assert len(seen) == 2 and torch.equal(*seen)
    assert graph == [False, True]  # a graph through the jvp would take the memory of two


# ------------------------------------------------------------------------------- the loss
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("teacher", [False, True], ids=["no teacher", "teacher"])
def test_gradients_reach_both_heads_and_stop_at_the_teacher(condition, teacher):
    flow = small_flow()
    other = small_flow(head=False)
    losses = f2d2_loss(flow, normal(16, 2), condition, other.velocity if teacher else None)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in flow.parameters())
    assert all(p.grad is None for p in other.parameters())


@pytest.mark.parametrize("condition", [None, *CONDITIONS])
@pytest.mark.parametrize("teacher", [None, teach], ids=["no teacher", "teacher"])
@pytest.mark.parametrize("paper", [False, True], ids=["ours", "paper"])
def test_the_warm_start_trains_the_velocity_alone_and_as_with_a_head(condition, teacher, paper):
    x0, x1, eps, t, s = draws()
    options = dict(x0=x0, t=t, s=s, probe=eps, paper=paper)
    flow = small_flow((3,), paper=paper)
    joint = f2d2_loss(flow, x1, condition, teacher, **options)
    without_head = JointFlowMap(flow.backbone, flow.feature_dim, False, paper)
    for warm in (without_head, lambda *xts: flow(*xts)[:1]):
        losses = f2d2_loss(warm, x1, condition, teacher, **options)
        torch.testing.assert_close(losses, joint | {"div": 0 * x1.sum(), "D": 0 * x1.sum()})
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in flow.head.parameters())


def squares(prediction, target, d=2):
    """Squared residuals [B] of u, a mean over dimensions, and of D per dimension."""
    return (prediction[0] - target[0]).square().mean(1), ((prediction[1] - target[1]) / d).square()


def interpolants(n):
    """x0, x1 [n, 2], t, s [n] and x_t = (1-t) x0 + t x1."""
    x0, x1 = normal(2, n, 2)
    t, s = times(n)
    return x0, x1, t, s, wide(1 - t, x0) * x0 + wide(t, x0) * x1


def residuals(flow, condition, teacher, x, v, t, s, n, paper=False):
    """Squared residuals [B] of the four losses, put together here from the conditions."""
    g = field(teacher or flow.velocity)
    here = g(x[:n], t[:n])
    if not teacher:
        here = (v[:n], here[1])
    vm, div = squares(flow(x[:n], t[:n], t[:n]), here)
    options = {} if condition == "semigroup" else {"paper": paper}
    if condition == "eulerian" and not teacher:
        options["v"] = v[n:]
    u, D = squares(*solve(condition, flow, g, x[n:], t[n:], s[n:], **options))
    return dict(vm=vm, u=u, div=div, D=D)


def meanflow_weighted(residual):
    return (residual * (residual.detach() + 1e-3) ** -0.75).mean()


def natural_weight_of_D(condition, t, s):
    """The table: D grows as 1/scale to the data, its derivatives by 1/(1-t), 1/(1-s) besides."""
    scale = 1 - torch.minimum(t, s) + 0.003
    return {
        "tangent": (1 - t + 0.003) ** 2,
        "semigroup": scale**2,
        "eulerian": (1 - t + 0.003) * scale,
        "lagrangian": (1 - s + 0.003) ** 2,
    }[condition]


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("teacher", [None, teach], ids=["no teacher", "teacher"])
def test_the_four_losses_are_naturally_weighted_squares_of_the_given_draws(condition, teacher):
    flow = small_flow()
    x0, x1, t, s, x = interpolants(8)
    n = 2  # a quarter
    r = residuals(flow, condition, teacher, x, x1 - x0, t, s, n)

    expected = {
        "vm": r["vm"].mean(),
        "u": r["u"].mean(),
        "div": (natural_weight_of_D("tangent", t, s)[:n] * r["div"]).mean(),
        "D": (natural_weight_of_D(condition, t, s)[n:] * r["D"]).mean(),
    }
    scale = 1 - torch.minimum(t, s) + 0.003
    if condition == "eulerian" and teacher:
        expected["u"] = (((1 - t + 0.003) / scale)[n:] * r["u"]).mean()
    elif condition == "eulerian":  # MeanFlow's own, stop-gradient
        expected["vm"] = meanflow_weighted(r["vm"])
        expected["u"] = meanflow_weighted(r["u"])
    elif condition == "lagrangian" and teacher:
        expected["u"] = (((1 - s + 0.003) / scale).sqrt()[n:] * r["u"]).mean()
    options = dict(x0=x0, t=t, s=s, diagonal=0.25, probe="exact")
    found = f2d2_loss(flow, x1, condition, teacher, **options)
    torch.testing.assert_close(found, expected)
    for name in found:  # the weights are stop-gradient as well
        a, b = gradients({name: found[name]}, flow), gradients({name: expected[name]}, flow)
        assert [p is None for p in a] == [p is None for p in b]
        for p, q in zip(a, b):
            assert p is None or torch.allclose(p, q, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("teacher", [None, teach], ids=["no teacher", "teacher"])
def test_the_paper_s_losses_have_meanflow_s_weight_or_none(condition, teacher):
    flow = small_flow(paper=True)
    x0, x1, t, s, x = interpolants(8)
    options = dict(x0=x0, t=t, s=s, probe="exact", paper=True)
    found = f2d2_loss(flow, x1, condition, teacher, **options)
    r = residuals(flow, condition, teacher, x, x1 - x0, t, s, 4, paper=True)
    expected = {name: residual.mean() for name, residual in r.items()}
    if condition == "eulerian":
        expected["vm"] = meanflow_weighted(r["vm"])
        expected["u"] = meanflow_weighted(r["u"])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_robust_is_torch_s_huber_loss_of_the_weighted_residual_of_D(condition):
    exact = ExactGaussian()

    def flow(x, t, s):
        u, D = exact(x, t, s)
        return u, D + x.sum(1) / 5

    x0, x1, t, s, x = interpolants(64)
    r = residuals(flow, condition, exact.velocity, x, x1 - x0, t, s, 32)
    tangent = natural_weight_of_D("tangent", t, s)[:32]
    weight = torch.cat([tangent, natural_weight_of_D(condition, t, s)[32:]])
    weighted = (weight * torch.cat([r["div"], r["D"]])).sqrt()
    assert (weighted < 0.06).any() and (weighted > 0.06).any()
    huber = 8 * nn.functional.huber_loss(
        weighted, torch.zeros_like(weighted), reduction="none", delta=0.06
    )
    options = dict(x0=x0, t=t, s=s, probe="exact")
    found = f2d2_loss(flow, x1, condition, exact.velocity, robust=True, **options)
    plain = f2d2_loss(flow, x1, condition, exact.velocity, **options)
    torch.testing.assert_close(found["div"], huber[:32].mean())
    torch.testing.assert_close(found["D"], huber[32:].mean())
    assert found["vm"] == plain["vm"] and found["u"] == plain["u"]


@pytest.mark.parametrize(
    "size, diagonal, first, second",
    [
        (8, 0.5, range(4), range(4, 8)),
        (8, 0.25, range(2), range(2, 8)),
        (8, 0, range(1), range(1, 8)),
        (8, 1, range(8), range(7, 8)),
        (7, 0.75, range(5), range(5, 7)),
        (3, 2 / 3, range(2), range(2, 3)),
        (10, 0.57, range(6), range(6, 10)),
        (1, 0.5, range(1), range(1)),
    ],
)
def test_a_share_of_the_batch_goes_to_the_tangent_condition_the_rest_to_the_other(
    size, diagonal, first, second
):
    rows = torch.arange(size, dtype=torch.float64)
    seen = {"tangent": set(), "other": set()}

    def flow(x, t, s):
        seen["tangent" if torch.equal(t, s) else "other"].add(tuple(x[:, 0].round().tolist()))
        return 0 * x, 0 * t

    x = rows[:, None] + torch.zeros(size, 2).double()
    t = torch.zeros_like(rows)
    f2d2_loss(flow, x, "semigroup", teach, x0=x, t=t, s=t + 1, diagonal=diagonal)
    assert seen == {"tangent": {tuple(first)}, "other": {tuple(second)}}
    seen["tangent"].clear()
    f2d2_loss(flow, x, None, teach, x0=x, t=t, s=t + 1, diagonal=diagonal)
    assert seen["tangent"] == {tuple(range(size))}


@pytest.mark.parametrize("condition", [None, *CONDITIONS])
def test_a_batch_of_one_serves_both_parts_and_a_generator_fixes_every_draw(condition):
    flow = small_flow()

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return f2d2_loss(flow, torch.ones(1, 2).double(), condition, generator=generator)

    torch.manual_seed(1)
    first = draw(5)
    torch.manual_seed(2)
    assert draw(5) == first and draw(6) != first
    assert all(v.isfinite() for v in first.values())
    assert (first["D"] > 0) == (first["u"] > 0) == (condition is not None)


def test_times_are_uniform_and_half_of_the_pairs_log_uniform_towards_the_data():
    x = torch.zeros(20000, 1)
    t, s = f2d2.sample_times(x, 0.0)
    assert abs((t < s).double().mean() - 0.5) < 0.02
    assert abs(t.mean() - 0.5) < 0.01 and abs(s.mean() - 0.5) < 0.01
    assert abs(torch.stack([t, s]).corrcoef()[0, 1]) < 0.03
    t, s = f2d2.sample_times(x, 1.0)
    for time in (t, s):  # log-uniform: the logarithm of 1 - t + 0.003 is uniform on what it covers
        share = (1 - time.double() + 0.003).log().sub(math.log(0.003)) / math.log(1.003 / 0.003)
        assert torch.histc(share, 10, 0, 1).div(len(x)).sub(0.1).abs().max() < 0.01
        assert 0 <= time.min() < 0.01 and 0.99999 < time.max() <= 1
    beyond = f2d2.log_time(torch.tensor([-1e-6, 1 + 1e-6]), 0, 1)  # as rounding might have it
    assert beyond.tolist() == [0, 1]
    assert abs(torch.stack([t, s]).corrcoef()[0, 1]) < 0.03
    t, s = f2d2.sample_times(x)  # both times of a pair or neither
    log_share = math.log(0.103 / 0.003) / math.log(1.003 / 0.003)  # of them later than 0.9
    late = (0.1 + log_share) / 2
    both_late = (0.01 + log_share**2) / 2
    assert (t > 0.9).double().mean().item() == pytest.approx(late, abs=0.015)
    assert ((t > 0.9) & (s > 0.9)).double().mean().item() == pytest.approx(both_late, abs=0.015)
    t, s = f2d2.sample_times(x, forward=True)
    assert (t <= s).all() and t.min() >= 0 and s.max() <= 1 and (t > 0.5).any() and (s < 0.5).any()


@pytest.mark.parametrize("condition", [None, *CONDITIONS])
@pytest.mark.parametrize("paper", [False, True], ids=["ours", "paper"])
def test_the_loss_draws_forward_times_only_where_the_paper_does(condition, paper):
    starts = []
    ends = []

    def flow(x, t, s):
        starts.append(t)
        ends.append(s)
        return x.mean(1, keepdim=True) + 0 * x, 0 * t

    f2d2_loss(flow, torch.zeros(4000, 2), condition, lambda x, t: 0 * x, paper=paper)
    t = torch.cat(starts)
    s = torch.cat(ends)
    log_uniform = (t > 0.99).float().mean()  # 0.01, or with half of the pairs log-uniform 0.17
    assert (log_uniform > 0.1) != paper
    if condition is not None:
        assert (t > s).any() != (paper and condition != "lagrangian")


# ------------------------------------------------------------------------------- context
def shuffled(flow):
    """The flow that takes its labels from its neighbour in the batch."""
    return lambda x, t, s, label: flow(x, t, s, label.roll(1))


def label_field(x, label):
    """Zero, with its derivatives, where x is its label."""
    return (x - wide(label, x)) ** 2


@pytest.mark.parametrize("condition", [None, *CONDITIONS])
@pytest.mark.parametrize("teacher", [False, True], ids=["no teacher", "teacher"])
@pytest.mark.parametrize("head", [True, False], ids=["head", "no head"])
def test_every_part_of_the_batch_sees_its_own_labels(condition, teacher, head):
    """Data that stay at their label: all losses are zero, and a single wrong label shows in any."""

    def flow(x, t, s, label):
        u = label_field(x, label)
        return (u, u.sum(1)) if head else (u,)

    def velocity(x, t, label):
        return label_field(x, label)

    label = torch.arange(8, dtype=torch.float64)
    x = wide(label, normal(8, 3)).expand(8, 3)
    t, s = times(8)
    options = dict(x0=x, t=t, s=s, probe="exact", diagonal=0.375)
    velocity = velocity if teacher else None
    right = f2d2_loss(flow, x, condition, velocity, context=label, **options)
    assert all(loss == 0 for loss in right.values())
    wrong = f2d2_loss(shuffled(flow), x, condition, velocity, context=label, **options)
    names = {"vm"} | ({"u"} if condition else set())
    if head:
        names |= {"div"} | ({"D"} if condition else set())
    assert {name for name, loss in wrong.items() if loss > 0} == names


# ------------------------------------------------------------------------------- self-guidance
def test_self_guidance_raises_its_objective_through_the_head():
    flow = small_flow()
    x0 = normal(32, 2)
    zero = torch.zeros(32).double()

    def objective(x):
        return normal_log_density(x) + flow(x, zero, zero + 1)[1]

    guided = [self_guidance(flow, x0, 0.02, k) for k in (0, 1, 5)]
    values = [objective(x).mean() for x in guided]
    assert torch.equal(guided[0], x0) and values[0] < values[1] < values[2]
    assert all(p.grad is None for p in flow.parameters())
    assert not guided[2].requires_grad and not x0.requires_grad
    # Adam's first step is lr times the sign of the gradient, and part of that is the head's
    x = x0.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(x).sum(), x)
    torch.testing.assert_close(guided[1] - x0, 0.02 * gradient.sign(), atol=1e-5, rtol=0)
    assert (gradient + x0).abs().max() > 1e-3
    step = (self_guidance(flow, x0) - x0).abs().max()  # the default: one step of 0.005
    assert step.item() == pytest.approx(0.005, rel=1e-3)


# ------------------------------------------------------------------------------- the slow oracle
def test_the_oracle_is_the_closed_form_of_a_mixture():
    target = EightGaussians()
    x = target.sample(64)
    log_p = ode_log_likelihood(target.velocity, x, 400)
    torch.testing.assert_close(log_p, target.log_prob(x), atol=2e-3, rtol=0)


@pytest.mark.parametrize("euler", [False, True])
def test_the_oracle_s_samples_are_the_exact_ones(euler):
    x0 = normal(64, 2)
    x1 = ode_sample(ExactGaussian(mean=0.7, std=0.5).velocity, x0, 400, euler=euler)
    torch.testing.assert_close(x1, 0.7 + 0.5 * x0, atol=1e-2 if euler else 1e-4, rtol=0)


def oracle_error(steps, std=0.3, **options):
    torch.manual_seed(1)
    target = EightGaussians(std)
    x = target.sample(16)
    log_p = ode_log_likelihood(target.velocity, x, steps, **options)
    return (log_p - target.log_prob(x)).abs().mean().item()


def test_the_oracle_converges_at_second_and_euler_at_first_order():
    assert math.log2(oracle_error(64) / oracle_error(128)) == pytest.approx(2, abs=0.3)
    assert oracle_error(128) < 2e-3
    order = math.log2(oracle_error(512, euler=True) / oracle_error(1024, euler=True))
    assert order == pytest.approx(1, abs=0.25)


def test_64_midpoint_steps_on_the_geometric_grid_beat_1024_uniform_euler_steps():
    """Where it matters: on fine structure. (At std 0.3 Euler's grid is fine enough.)"""
    assert oracle_error(64, std=0.03) < 0.5 * oracle_error(1024, std=0.03, euler=True)


def test_time_grids_are_uniform_or_geometric_in_what_is_left():
    x = torch.zeros(1, 1, dtype=torch.float64)
    grid = time_grid(32, x, geometric=True)
    assert grid[0] == 0 and grid[-1] == 1
    gaps = (1 - grid + 0.01).log().diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(32))
    assert gaps[0] < 0
    torch.testing.assert_close(time_grid(4, x), torch.linspace(0, 1, 5).double())
    assert time_grid(3, x.float()).dtype == torch.float32
    given = torch.tensor([1, 0.2, 0])
    torch.testing.assert_close(time_grid(given, x), given.flip(0).double())


@pytest.mark.parametrize("euler", [False, True])
def test_the_oracle_asks_for_the_velocity_at_the_rule_s_times(euler):
    """Euler: the uniform grid. The midpoint rule: the geometric one, and half way between."""
    asked = []

    def velocity(x, t):
        assert (t == t[0]).all()
        asked.append(t[0].item())
        return x

    x = normal(2, 1)
    grid = time_grid(4, x, geometric=not euler)
    half = (grid[:-1] + grid[1:]) / 2
    ode_sample(velocity, x, 4, euler=euler)
    expected = grid[:-1] if euler else torch.stack([grid[:-1], half], 1).flatten()
    assert asked == pytest.approx(expected.tolist())
    asked.clear()
    ode_log_likelihood(velocity, x, 4, euler=euler)
    backwards = torch.stack([grid[1:], half], 1).flip(0).flatten()
    expected = grid[1:].flip(0) if euler else backwards
    assert asked == pytest.approx(expected.tolist())


def test_the_oracle_steps_from_the_start_with_the_rate_half_way():
    """dx/dt = t x, one step of each rule, by hand."""
    x = torch.ones(1, 3).double()

    def velocity(x, t):
        return wide(t, x) * x

    assert ode_sample(velocity, x, 1, euler=True).tolist() == [[1, 1, 1]]
    assert ode_sample(velocity, x, 1).tolist() == [[1.5, 1.5, 1.5]]
    # backwards, Euler: v = 1 and div v = 3 at t = 1, so x_0 = 0
    expected = 3 * -0.5 * math.log(2 * math.pi) - 3
    assert ode_log_likelihood(velocity, x, 1, euler=True).item() == pytest.approx(expected)
    # midpoint: at t = 1/2 x = 1/2, v = 1/4 and div v = 3/2, so x_0 = 3/4
    expected = 3 * -0.5 * (0.75**2 + math.log(2 * math.pi)) - 1.5
    assert ode_log_likelihood(velocity, x, 1).item() == pytest.approx(expected)


def test_the_oracle_draws_a_fresh_probe_at_each_step_from_its_generator():
    matrix = normal(4, 4) / 4
    x = normal(6, 4)

    def log_p(probe, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return ode_log_likelihood(lambda x, t: x @ matrix, x, 40, probe, generator=generator)

    assert torch.equal(log_p("dct"), log_p("dct")) and not torch.equal(
        log_p("dct"), log_p("dct", 1)
    )
    exact = log_p("exact")
    many = torch.stack([log_p("rademacher", seed) for seed in range(30)]) - exact
    one = torch.stack([log_p(torch.sign(normal(6, 4))) for _ in range(30)]) - exact
    assert abs(many.mean()) < 5 * many.std() / 180**0.5
    assert many.std() < 0.3 * one.std()  # 40 draws average out, one does not


# ------------------------------------------------------------------------------- bits and bytes
def test_bits_per_dim_of_uniform_noise_is_eight():
    d = 48
    log_p = torch.full((3,), -d * math.log(2.0))  # uniform on [-1, 1): density 1/2 per dimension
    assert f2d2.bits_per_dim(log_p, d).tolist() == [8.0, 8.0, 8.0]
    one_bit_less = log_p + d * math.log(2.0)
    assert f2d2.bits_per_dim(one_bit_less, d).tolist() == [7.0, 7.0, 7.0]


def test_dequantized_bytes_stay_in_range_and_come_back():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(4, 3, 16, 16)
    for noise in (None, torch.zeros(images.shape), torch.full(images.shape, 1 - 2**-24)):
        x = f2d2.dequantize(images, noise)
        assert x.shape == images.shape and x.min() >= -1 and x.max() < 1
        assert torch.equal(((x + 1) * 128).floor().to(torch.uint8), images)
    first = f2d2.dequantize(images, generator=torch.Generator().manual_seed(1))
    again = f2d2.dequantize(images, generator=torch.Generator().manual_seed(1))
    other = f2d2.dequantize(images, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    half = torch.full(images.shape, 1 - 2**-11, dtype=torch.half)
    x = f2d2.dequantize(images, half)
    assert x.max() < 1 and torch.equal(((x + 1) * 128).floor().to(torch.uint8), images)
    fraction = (first + 1) * 128 - images
    assert len(fraction.unique()) > 2_500  # of 3,072 draws on 65,536 levels
    assert fraction.mean().item() == pytest.approx(0.5, abs=0.02)
    assert fraction.var().item() == pytest.approx(1 / 12, abs=0.01)


# ------------------------------------------------------------------------------- where it runs
@pytest.mark.parametrize("shape", [(4, 1), (4, 2), (4, 3, 2, 2)])
@pytest.mark.parametrize("condition", [None, *CONDITIONS])
def test_every_trailing_shape_on_meta_and_in_float64(condition, shape):
    with torch.device("meta"):
        flow = JointFlowMap(TinyBackbone(math.prod(shape[1:]), 16), 16)
        x = torch.empty(shape)
    for probe in ("exact", "rademacher", "dct"):
        for teacher in (None, flow.velocity):
            losses = f2d2_loss(flow, x, condition, teacher, probe=probe)
            sum(losses.values()).backward()
            assert all(v.device.type == "meta" and v.shape == () for v in losses.values())
    found = [
        *sample(flow, x, 2),
        log_likelihood(flow, x, 2),
        self_guidance(flow, x),
        ode_log_likelihood(flow.velocity, x, 2),
        ode_sample(flow.velocity, x, 2, euler=True),
    ]
    assert all(out.device.type == "meta" for out in found)
    flow = small_flow(shape[1:])
    x = normal(*shape)
    losses = f2d2_loss(flow, x, condition, robust=True)
    found = [*losses.values(), *sample(flow, x, 2), log_likelihood(flow, x, 2)]
    found += [self_guidance(flow, x), ode_log_likelihood(flow.velocity, x, 2)]
    assert all(out.dtype == torch.float64 for out in found)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("condition", [None, *CONDITIONS])
def test_a_step_compiles_to_one_graph_with_the_eager_gradients(condition):
    x0, x1, eps, t, s = draws()
    flow = small_flow((3,))
    teacher = None if condition == "semigroup" else teach

    def step(x1, x0, t, s, eps):
        return f2d2_loss(flow, x1, condition, teacher, x0=x0, t=t, s=s, probe=eps)

    found = compiled(step)(x1, x0, t, s, eps)
    expected = step(x1, x0, t, s, eps)
    torch.testing.assert_close(found, expected)
    for p, q in zip(gradients(found, flow), gradients(expected, flow)):
        assert (p is None) == (q is None)
        assert p is None or torch.allclose(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_joint_step_compiles_after_a_warm_start(condition):
    x0, x1, eps, t, s = draws()
    flow = small_flow((3,))
    warm = JointFlowMap(flow.backbone, flow.feature_dim, divergence_head=False)
    loss = compiled(f2d2_loss)
    for f in (warm, flow):
        found = loss(f, x1, condition, x0=x0, t=t, s=s, probe=eps)
        torch.testing.assert_close(found, f2d2_loss(f, x1, condition, x0=x0, t=t, s=s, probe=eps))


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors held at once, counted on "meta"."""

    def __init__(self):
        super().__init__()
        self.sizes = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        self.sizes = {ref: size for ref, size in self.sizes.items() if not ref.expired()}
        self.most = max(self.most, sum(self.sizes.values()))
        return out


def live_bytes(condition):
    """Of a step of a deep network whose activations outweigh its weights."""
    with torch.device("meta"):
        layers = [nn.Sequential(nn.Linear(64, 64), nn.SiLU()) for _ in range(12)]
        backbone = TinyBackbone(64, 64)
        backbone.second = nn.Sequential(*layers)
        flow = JointFlowMap(backbone, 64)
        x1 = torch.empty(4096, 64)
        with LiveBytes() as live:
            sum(f2d2_loss(flow, x1, condition).values()).backward()
    return live.most


def test_the_lagrangian_frees_its_second_pull_back_before_g():
    """1.83 times the bytes of the tangent condition alone; where it stays alive, 2.10 times."""
    assert live_bytes("lagrangian") < 1.95 * live_bytes(None)


@pytest.mark.skipif(torch.__version__ < "2.14", reason="2.6 takes the batch for a constant")
def test_a_map_is_exported_for_any_batch():
    flow = small_flow()
    t, s = times(5)
    any_batch = {0: torch.export.Dim("batch")}
    shapes = (any_batch, any_batch, any_batch)
    inputs = (normal(5, 2), t, s)
    exported = torch.export.export(flow, inputs, dynamic_shapes=shapes, strict=False)
    x = normal(9, 2)
    t, s = times(9)
    torch.testing.assert_close(exported.module()(x, t, s), flow(x, t, s))


def test_a_likelihood_runs_under_vmap():
    flow = small_flow()
    x = normal(3, 5, 2)
    found = torch.func.vmap(lambda x: log_likelihood(flow, x, 3))(x)
    expected = torch.stack([log_likelihood(flow, a, 3) for a in x])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_inference_gives_the_same_numbers_without_gradients(mode):
    x0, x1, eps, t, s = draws()
    flow = small_flow((3,))

    def everything():
        return [
            *sample(flow, x0, 3),
            log_likelihood(flow, x1, 3),
            self_guidance(flow, x0, 0.1, 2),
            ode_sample(flow.velocity, x0, 3),
            ode_log_likelihood(flow.velocity, x1, 3),
            ode_log_likelihood(flow.velocity, x1, 3, eps),
            *f2d2_loss(flow, x1, None, x0=x0, t=t, s=s).values(),
        ]

    expected = everything()
    with mode():
        found = everything()
        assert not any(a.requires_grad for a in found)
        inside = x0.clone() + 0  # made inside: under inference_mode an inference tensor
        guided = self_guidance(flow, inside, 0.1, 2)
    torch.testing.assert_close([a.detach() for a in expected[:-4]], found[:-4])
    torch.testing.assert_close(guided, expected[3])
