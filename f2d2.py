"""F2D2 in one file: samples *and* log-likelihoods of a flow-based model in 1-8 network evaluations.

Ai, He, Gu, Salakhutdinov, Kolter, Boffi, Simchowitz, "Joint Distillation for Fast Likelihood
Evaluation and Sampling in Flow-based Models", ICLR 2026, arXiv 2512.02636. Read before it "Flow
Matching for Generative Modeling", "FFJORD" (log p), "One Step Diffusion via Shortcut Models", "Mean
Flows for One-step Generative Modeling", "How to build a consistency model" (flow maps, LSD).

Conventions: a silent clash of these is the most repeated bug of this family.

  code                shape         paper     meaning
  x                   [B, ...]      x_t       state at time t: t = 0 noise N(0, I), t = 1 data,
                                              x_t = (1-t) x_0 + t x_1
  t, s                [B]           t, s      current, target time in [0, 1]; s < t runs backwards
  u                   [B, ...]      u(x,t,s)  average velocity over [t, s]
  D                   [B]           D(x,t,s)  average rate of change of log p along the trajectory,
                                              nats per unit time: MINUS the average divergence
  f = flow(x, t, s)   (u, D)        f         average rates of the joint map; (u,) without a head
  v = velocity(x, t)  [B, ...]      v(x,t)    instantaneous velocity, E[x_1 - x_0 | x_t = x]
  g(x, t)             (v, -div v)             rates of the coupled ODEs; (v,) without a head
  log_p               [B]                     nats per example (bits_per_dim converts)

Arguments come in the order (x, t, s). A `flow` is any callable (x, t, s) -> (u, D) or (u,); for
labels y sample with lambda x, t, s: flow(x, t, s, y). [ours] marks what is not in the paper:
paper=True undoes it in JointFlowMap and f2d2_loss, but for robust and probe; euler=True in ode_*.
"""

import math
from numbers import Integral

import torch  # tested from 2.6 on
from torch import nn
from torch.func import jvp, vjp


# --------------------------------------------------------------------------- the joint flow map
class JointFlowMap(nn.Module):
    """Phi_Y(y,t,s) = y + (s-t) f(x,t,s): y = (x, z), z the change of log p; its x part is Phi_X.

    backbone(x, t, s, *context) -> u [B, ...], features [B, feature_dim], each example by itself.
    The head: features, t, s -> h; D = d h_0, d the size of x; [ours] D = d (h_0 + sum_k w_k r_k), w
    = softmax(h_1..h_12), r_k = D/d of data N(0, var_k I). ValueError for what does not fit."""

    def __init__(self, backbone, feature_dim, divergence_head=True, paper=False):
        super().__init__()
        self.backbone = backbone
        self.feature_dim = feature_dim
        self.paper = paper
        self.head = None
        if divergence_head:
            std = torch.logspace(math.log10(0.002), math.log10(4), 0 if paper else 12)
            self.register_buffer("variances", std**2)
            hidden = nn.Linear(feature_dim + (8 if paper else 10), feature_dim)  # + time_features
            out = nn.Linear(feature_dim, 1 + len(std))
            nn.init.zeros_(out.weight)
            out.bias.data = torch.cat([torch.zeros(1), -(std.log() ** 2) / 8])  # w around std 1
            self.head = nn.Sequential(hidden, nn.SiLU(), out)

    def forward(self, x, t, s, *context):
        """x [B, ...], t and s [B] -> (u [B, ...], D [B] in nats per unit time); (u,) if no head."""
        _check(x, t)
        _check(x, s, latest=2)  # beyond 1 only in the paper's mirrored likelihood
        u, features = self.backbone(x, t, s, *context)
        _check_shape(u, x.shape, "the backbone's u")
        _check_shape(features, (len(x), self.feature_dim), "the backbone's features")
        if self.head is None:
            return (u,)
        h = self.head(torch.cat([features, time_features(t, s, self.paper)], 1))
        w = h[:, 1:].softmax(1)
        rate = h[:, 0] + (w * gaussian_rates(t, s, self.variances)).sum(1)
        return u, math.prod(x.shape[1:]) * rate

    def jump(self, x, z, t, s, *context):
        """(x [B, ...], z [B]) at time t -> (x_s, z_s) = Phi_Y at time s; z_s = z without a head."""
        _check(x, t, s)
        u, *D = self(x, t, s, *context)
        return x + _wide(s - t, x) * u, z + (s - t) * D[0] if D else z

    def velocity(self, x, t, *context):
        """v(x,t) = u(x,t,t) [B, ...], the average over no time at all; the head does not run."""
        _check(x, t)
        return self.backbone(x, t, t, *context)[0]


# --------------------------------------------------------------------------- the divergence
def divergence(velocity, x, t, probe="rademacher", generator=None):
    """v(x,t) [B, ...] and div v = tr dv/dx = E eps^T (dv/dx) eps [B], for any velocity(x, t).

    probe: "exact", over d unit vectors; "rademacher", random signs (FFJORD); [ours] "dct", random
    signs in a DCT basis, where dv/dx of images is nearly diagonal (measured: 3-8 times less
    variance); or eps, shaped as x. Raises ValueError for another probe, and under autocast."""
    _check(x, t)
    _check_probe(probe, x)
    v, pull_back = vjp(lambda x: velocity(x, t.clone()), x.clone())  # pull_back(eps) = eps^T dv/dx
    _check_shape(v, x.shape, "the velocity")

    if isinstance(probe, str) and probe == "exact":
        basis = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).reshape(-1, *x.shape[1:])
        return v, sum((pull_back(e.expand_as(x))[0] * e).flatten(1).sum(1) for e in basis)
    eps = hutchinson_probe(x, probe, generator) if isinstance(probe, str) else probe
    return v, (pull_back(eps)[0] * eps).flatten(1).sum(1)


def hutchinson_probe(x, probe="rademacher", generator=None):
    """eps shaped as x [B, ...], "rademacher" or "dct" as in divergence."""
    eps = torch.randint(0, 2, x.shape, device=x.device, generator=generator).to(x.dtype) * 2 - 1
    for axis in range(1, x.dim()) if probe == "dct" else ():  # the colour axis too
        n = x.shape[axis]
        k = torch.arange(n, device=x.device, dtype=x.dtype)
        basis = torch.cos(math.pi / n * k[:, None] * (k + 0.5)) * math.sqrt(2 / n)
        basis = torch.where(k[:, None] == 0, math.sqrt(1 / n), basis)  # [frequency, position]
        eps = (eps.movedim(axis, -1) @ basis).movedim(-1, axis)
    return eps


@torch.inference_mode(False)  # in it older versions of PyTorch differentiate to nothing
@torch.no_grad()  # cuts the graph outside; torch.func differentiates inside all the same
def coupled_field(velocity, x, t, probe="rademacher", generator=None):
    """g(x,t) = (v, -div v), stop-gradient: dx/dt and dz/dt. (v,) if probe is None."""
    if probe is None:
        return (velocity(x, t),)
    v, div = divergence(velocity, x, t, probe, generator)
    return v, -div


# --------------------------------------------------------------------------- the conditions
# f(x,t,t) = g(x,t) and any one of three identities make Phi_Y the flow map of the coupled ODEs. An
# identity holds for u and v, and for D and -div v. Each returns (prediction, target), both tuples
# like f(x, t, s): (u, D) or (u,). Targets are stop-gradient, but for LSD's d/ds f.
def semigroup(f, x, t, s):
    """Two half jumps make the whole (Shortcut models). With r = (t+s)/2 and x_r = Phi_X(x,t,r):

    f(x,t,s) = 1/2 [f(x,t,r) + f(x_r,r,s)]"""
    with torch.no_grad():
        r = (t + s) / 2
        first = f(x, t, r)
        second = f(x + _wide(r - t, x) * first[0], r, s)
        target = tuple((a + b) / 2 for a, b in zip(first, second))
    return f(x, t, s), target


def eulerian(f, g, x, t, s, v=None, paper=False):
    """Moving the start along the trajectory leaves the end where it is (MeanFlow):

    f(x,t,s) = g(x,t) + (s-t) d/dt f(x_t,t,s),   d/dt = jvp on (x,t) with tangents (v, 1)

    A given v = x_1 - x_0 replaces g's velocity in u's target, whose mean stays, because E[v|x] is
    the velocity; if paper, as the tangent too, where its variance swamps D's target. [ours]: g's
    velocity is the tangent, as in "improved MeanFlow" (arXiv 2512.02012) for u."""
    here = g(x, t)
    tangents = (v if paper and v is not None else here[0], torch.ones_like(t))
    if torch.compiler.is_compiling() or x.is_mps:  # no fork_rng there: one pass, more memory
        prediction, df_dt = jvp(lambda x, t: f(x, t, s), (x, t), tangents)
    else:  # a second pass needs no more memory than a plain step; forked: the same dropout in both
        with torch.random.fork_rng([x.device] if x.is_cuda else []), torch.no_grad():
            _, df_dt = jvp(lambda x, t: f(x, t, s), (x, t), tangents)
        prediction = f(x, t, s)
    here = here if v is None else (v, *here[1:])
    target = tuple(a + _wide(s - t, a) * da.detach() for a, da in zip(here, df_dt))
    return prediction, target


def lagrangian(f, g, x, t, s, paper=False):
    """Moving the end follows the field there (LSD). With x_s = Phi_X(x,t,s), stop-gradient:

    f(x,t,s) = g(x_s,s) - (s-t) d/ds f(x,t,s)

    The gradient runs through d/ds u, as in the published LSD code, and [ours] through d/ds D."""
    # pull_back(w) = w^T df/ds is linear in w: its vjp at 1 is df/ds. Cheaper to train than a jvp.
    prediction, pull_back = vjp(lambda s: f(x, t, s), s)
    _, pull_back_again = vjp(lambda w: pull_back(w)[0], prediction)
    df_ds = pull_back_again(torch.ones_like(s))[0]
    if paper:
        df_ds = (df_ds[0], *(dD_ds.detach() for dD_ds in df_ds[1:]))
    x_s = (x + _wide(s - t, x) * prediction[0]).detach()
    target = tuple(a - _wide(s - t, a) * da for a, da in zip(g(x_s, s), df_ds))
    return prediction, target


# --------------------------------------------------------------------------- the loss
def f2d2_loss(
    flow,
    x1,
    condition,
    teacher=None,
    *,
    x0=None,
    t=None,
    s=None,
    context=None,
    diagonal=0.5,
    probe="rademacher",
    robust=False,
    paper=False,
    generator=None,
):
    """L_F2D2 = L_VM + L_u + L_div + L_D, as {"vm", "u", "div", "D"}: scalars to be added up.

      L_VM = E |u(x,t,t) - v|^2    L_div = E |D(x,t,t) + div v|^2    on a share `diagonal` of x1
      L_u = E |u - u_target|^2     L_D = E |D - D_target|^2          by `condition`, on the rest

    |.|^2 is a mean over dimensions, D stands for D/d. Weights: _weights [ours], but MeanFlow's own
    on L_VM and L_u of "eulerian" if paper or no teacher. The sign is the paper's; its page and both
    published codes train +div and subtract it. v and div v are teacher(x, t)'s; without one
    x_1 - x_0 in L_VM and MeanFlow's u_target, u(x,t,t) elsewhere. condition None: L_VM + L_div.
    context [B, ...], say labels: flow(x, t, s, context), teacher(x, t, context). "div" and "D" of
    a flow -> (u,) are 0, as of the paper's warm start, lambda *a: flow(*a)[:1]. x0, t, s: drawn if
    None. robust [ours]: 4 times Huber's loss of D, for targets without noise. paper: as in the
    conditions, no _weights, uniform times, t <= s but for LSD. ValueError, also under autocast."""
    _check_loss(x1, condition, x0, t, s, context, diagonal, probe)
    if t is None:
        forward = paper and condition in ("semigroup", "eulerian")
        t, s = sample_times(x1, 0.0 if paper else 0.5, forward, generator)
    if x0 is None:
        x0 = torch.randn(x1.shape, dtype=x1.dtype, device=x1.device, generator=generator)
    x = _wide(1 - t, x1) * x0 + _wide(t, x1) * x1
    d = math.prod(x.shape[1:])
    losses = {name: x.new_zeros(()) for name in ("vm", "u", "div", "D")}
    adaptive = condition == "eulerian" and (teacher is None or paper)  # MeanFlow's own weight
    velocity = teacher or (lambda x, t, *context: flow(x, t, t, *context)[0])

    # The tangent condition f(x,t,t) = g(x,t): u = v and D = -div v.
    n = len(x) if condition is None else max(1, round(diagonal * len(x)))
    f, _ = _fields(flow, velocity, context, None, generator, slice(0, n))
    u, *D = f(x[:n], t[:n], t[:n])
    probe = probe if D else None  # no head, no divergence from here on
    _, g = _fields(flow, velocity, context, probe, generator, slice(0, n))
    v_target, *D_target = g(x[:n], t[:n]) if teacher or D else (None,)
    v_target = v_target if teacher else (x1 - x0)[:n]
    weight_u, weight_D = _weights("tangent", t[:n], t[:n], teacher, paper)
    losses["vm"] = _mean_square(u, v_target, weight_u, adaptive)
    if D:
        losses["div"] = _mean_square(D[0] / d, D_target[0] / d, weight_D, robust=robust)
    if condition is None:
        return losses

    # The flow map condition, on the rest.
    n = min(n, len(x) - 1)  # each part has a row at least: at diagonal = 1 the last serves both
    f, g = _fields(flow, velocity, context, probe, generator, slice(n, None))
    x, t, s = x[n:], t[n:].clone(), s[n:]  # torch.compile has no jvp at this view of t
    if condition == "semigroup":
        (u, *D), (u_target, *D_target) = semigroup(f, x, t, s)
    elif condition == "eulerian":
        v = None if teacher else (x1 - x0)[n:]
        (u, *D), (u_target, *D_target) = eulerian(f, g, x, t, s, v, paper)
    else:
        (u, *D), (u_target, *D_target) = lagrangian(f, g, x, t, s, paper)
    weight_u, weight_D = _weights(condition, t, s, teacher, paper)
    losses["u"] = _mean_square(u, u_target, weight_u, adaptive)
    if D:
        losses["D"] = _mean_square(D[0] / d, D_target[0] / d, weight_D, robust=robust)
    return losses


def _fields(flow, velocity, context, probe, generator, rows):
    """f(x, t, s) and g(x, t) for some rows of the batch, with their context and their probe."""
    own = () if context is None else (context[rows],)
    eps = probe[rows] if isinstance(probe, torch.Tensor) else probe
    return (
        lambda x, t, s: flow(x, t, s, *own),
        lambda x, t: coupled_field(lambda x, t: velocity(x, t, *own), x, t, eps, generator),
    )


def _mean_square(prediction, target, weight=1.0, adaptive=False, robust=False):
    """E weight |prediction - target|^2, a mean over dimensions too; weight [B]."""
    _check_shape(target, prediction.shape, "a target")
    square = (prediction - target).square().reshape(len(target), -1).mean(1)
    if adaptive:  # MeanFlow's, for each example, here of the mean over dimensions
        weight = weight * (square.detach() + 1e-3) ** -0.75
    if robust:  # of D: 4 r^2 for weighted residuals r up to 0.06, linear beyond; both tuned
        root = weight**0.5
        return 8 * nn.functional.huber_loss(root * prediction, root * target, delta=0.06)
    return (weight * square).mean()


# --------------------------------------------------------------------------- sampling, likelihood
def sample(flow, x0, steps):
    """x0 ~ N(0, I) [B, ...] -> x1 = Phi_X(x0,0,1), and log p [B] in nats, None without a head:

    log N(x0; 0, I) + sum_k (t_{k+1} - t_k) D(x_{t_k},t_k,t_{k+1})

    That is log p where the ODE from x0 ends, which a few-step x1 misses by a little: for log p of
    x1 itself log_likelihood(flow, x1, steps) errs less. steps: how many (NFE), or the times."""
    x1, gained = _travel(flow, x0, time_grid(steps, x0))
    return x1, None if gained is None else normal_log_density(x0) + gained


def log_likelihood(flow, x1, steps, mirror=False):
    """x1 [B, ...] -> log p_1(x1) [B] in nats, in K = `steps` jumps over 1 = t_0 > ... > t_K = 0:

    log p_1(x1) = log N(x_{t_K}; 0, I) + sum_k (t_k - t_{k+1}) D(x_{t_k},t_k,t_{k+1})

    mirror: the paper's approximation for maps trained forward only, u(x,t,t-h) ~ u(x,t,t+h) and D
    alike (target time 2t - s): biased even for exact maps. Raises ValueError without a head."""
    x0, gained = _travel(flow, x1, time_grid(steps, x1).flip(0), mirror)
    _require(gained is not None, "this flow map has no divergence head: train one with it.")
    return normal_log_density(x0) - gained


def _travel(flow, x, times, mirror=False):
    """The state after jumping along `times`, and the log p gained, sum of (s-t) D [B], or None."""
    gained = 0.0
    for t, s in zip(times[:-1], times[1:]):
        t, s = t.expand(len(x)), s.expand(len(x))
        u, *D = flow(x, t, 2 * t - s if mirror else s)
        _check_shape(u, x.shape, "the flow's u")
        _check_shape(D[0] if D else t, t.shape, "the flow's D")
        x = x + _wide(s - t, x) * u
        gained = gained + (s - t) * D[0] if D else None
    return x, gained


def self_guidance(flow, x0, lr=0.005, iterations=1):
    """Moves x0 [B, ...] to a likelier start by Adam on -log N(x0; 0, I) - D(x0,0,1). One step in
    the paper; lr is [ours]. Raises ValueError without a head."""
    _check(x0, finite=True)
    with torch.inference_mode(False), torch.enable_grad():
        x0 = x0.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([x0], lr=lr)
        for _ in range(iterations):
            _, log_p = sample(flow, x0, 1)
            _require(log_p is not None, "this flow map has no divergence head: train one with it.")
            x0.grad = torch.autograd.grad(-log_p.sum(), x0)[0]
            optimizer.step()
    return x0.detach()


# --------------------------------------------------------------------------- the slow oracle
@torch.no_grad()
def ode_sample(velocity, x0, steps, euler=False):
    """x0 [B, ...] at t = 0 -> x1 [B, ...], the solution of dx/dt = v(x,t) at t = 1.
    [ours] Midpoint rule (NFE = 2 steps) on a grid geometric in 1.01 - t, because div v grows as
    1/(1-t); euler=True is the paper's Euler rule on a uniform grid (NFE = steps)."""
    return sample(_small_step(velocity, euler), x0, time_grid(steps, x0, not euler))[0]


@torch.no_grad()
def ode_log_likelihood(velocity, x1, steps, probe="exact", euler=False, generator=None):
    """x1 [B, ...] -> log p_1(x1) = log N(x_0; 0, I) - int_0^1 div v(x_t,t) dt, nats [B].

    Rule and grid as in ode_sample, from t = 1 to 0; a named probe is drawn at each step."""
    times = time_grid(steps, x1, not euler)
    _check_probe(probe, x1)
    return log_likelihood(_small_step(velocity, euler, probe, generator), x1, times)


def _small_step(velocity, euler, probe=None, generator=None):
    """The ODEs' joint map (x, t, s) -> (u, D) or (u,) for s near t: g at t, or half way to s."""

    def rates(x, t, s):
        if not euler:
            x = x + _wide((s - t) / 2, x) * velocity(x, t)
            t = (t + s) / 2
        return coupled_field(velocity, x, t, probe, generator)

    return rates


def time_grid(steps, x, geometric=False):
    """Times from 0 to 1 [steps + 1], like x: uniform, or [ours] geometric in 1.01 - t. Or
    `steps` is the times: sorted and checked. Raises ValueError for anything else."""
    _check(x, finite=True)
    if isinstance(steps, torch.Tensor) and steps.dim() == 1:
        times = steps.to(x).sort().values
        if times.device.type != "meta":
            whole = len(times) > 1 and times[0] == 0 and times[-1] == 1 and times.diff().min() > 0
            _require(whole, "a tensor of times must go from 0 to 1, or from 1 to 0.")
        return times
    number = isinstance(steps, Integral) and not isinstance(steps, bool) and steps >= 1
    _require(number, f"steps must be a whole number from 1 or a tensor of times, not {steps!r}.")
    times = torch.linspace(0, 1, int(steps) + 1, device=x.device, dtype=x.dtype)
    return 1 - (101 ** (1 - times) - 1) / (101 ** times[-1:] - 1) if geometric else times


# --------------------------------------------------------------------------- [ours]
DELTA = 0.003  # added to 1 - t: the noise in a grey level, 2/256 wide, has std 0.0023


def sample_times(x, log_share=0.5, forward=False, generator=None):
    """t, s [B] like x, uniform; forward: t <= s, the paper's for Shortcut and MeanFlow. [ours] Both
    directions, because a likelihood runs from t = 1 to 0, and a share of pairs with 1 - t + DELTA
    and 1 - s + DELTA log-uniform, because most of an image's likelihood is near the data."""
    r = torch.rand(3, len(x), device=x.device, dtype=x.dtype, generator=generator)
    near_data = (1 - DELTA * ((1 + 1 / DELTA) ** r[:2] - 1)).clamp(0, 1)
    times = torch.where(r[2] < log_share, near_data, r[:2])
    return tuple(times.sort(0).values if forward else times)


def time_features(t, s, paper=False):
    """t, s [B] -> [B, 10], smooth through s = t; [B, 8], without the logs [ours], if paper:

    t, s-t, sin and cos of (pi t, 2 pi t, pi (s-t)), 1 + ln(1-t + DELTA)/3, 1 + ln(1-s + DELTA)/3"""
    angles = math.pi * torch.stack([t, 2 * t, s - t], 1)
    features = [torch.stack([t, s - t], 1), angles.sin(), angles.cos()]
    if not paper:
        left = (1 - torch.stack([t, s], 1)).abs()  # the mirrored likelihood asks for s > 1
        features.append(1 + (left + DELTA).log() / 3)
    return torch.cat(features, 1)


def gaussian_rates(t, s, variances):
    """D / d [B, K] for data N(0, var I), var in variances [K], sigma_t^2 = (1-t)^2 + t^2 var:

    -ln(sigma_s / sigma_t) / (s-t) = atanh((s-t) k) / (s-t)
    k = (sigma_t^2 - sigma_s^2) / (sigma_t^2 + sigma_s^2) / (s-t), in which s-t cancels"""
    t, s, h = t[:, None], s[:, None], (s - t)[:, None]
    var_t = (1 - t) ** 2 + t**2 * variances
    var_s = (1 - s) ** 2 + s**2 * variances
    k = (2 - t - s - (t + s) * variances) / (var_t + var_s)
    near = h.abs() < 2e-4  # there, the series of atanh
    far = (var_t / var_s).log() / torch.where(near, 1.0, 2 * h)
    return torch.where(near, k * (1 + (h * k).square() / 3), far)


def _weights(part, t, s, teacher, paper):
    """[ours] Natural weights [B] of (residual of u)^2 and (residual of D/d)^2: about 1/target^2, if
    D/d grows as 1/scale and a derivative as 1/near, or else a lower power of near/scale."""
    if paper:
        return 1.0, 1.0
    near_t = 1 - t + DELTA
    near_s = 1 - s + DELTA
    scale = torch.maximum(near_t, near_s)
    if part == "eulerian":
        return near_t / scale if teacher else 1.0, near_t * scale
    if part == "lagrangian":
        return (near_s / scale) ** 0.5 if teacher else 1.0, near_s**2  # the root: measured
    return 1.0, scale**2


# --------------------------------------------------------------------------- units
def dequantize(x_uint8, noise=None, generator=None):
    """Bytes (or ValueError) -> (x + U) / 128 - 1 in [-1, 1), U uniform on [0, 1) or `noise`."""
    _require(getattr(x_uint8, "dtype", None) == torch.uint8, "dequantize takes uint8 images.")
    if noise is None:
        noise = torch.rand(x_uint8.shape, device=x_uint8.device, generator=generator)
    noise = (noise * 65536).floor() / 65536  # 8 + 16 bits fit a float32: 255 + U never becomes 256
    return (x_uint8 + noise) / 128 - 1


def bits_per_dim(log_p, data_dim):
    """log p in nats, of data in [-1, 1) -> bits per dimension, -log2 P / d; P ~ p (2/256)^d."""
    return 7 - log_p / (data_dim * math.log(2))


def normal_log_density(x):
    """log N(x; 0, I) in nats, x [B, ...] -> [B]."""
    return -0.5 * (x.square() + math.log(2 * math.pi)).flatten(1).sum(1)


def _wide(t, x):
    """t [B] -> [B, 1, ...], to multiply x [B, ...]."""
    return t.reshape(-1, *[1] * (x.dim() - 1))


# --------------------------------------------------------------------------- input checks
def _require(true, sentence):
    if not true:
        raise ValueError(sentence)


def _check(x, *times, latest=1, finite=False):
    """x [B, ...] floating point; times [B] like x, in [0, latest]. Values: checked on the CPU."""
    _require(isinstance(x, torch.Tensor) and x.is_floating_point(), "x must be a float tensor.")
    _require(x.dim() and len(x), f"x has shape {list(x.shape)}: pass at least one example.")
    free = x.device.type == "cpu" and type(x) is torch.Tensor and not torch.compiler.is_compiling()
    _require(not (finite and free) or x.isfinite().all(), "x holds NaN or infinity.")
    for t in times:
        _require(isinstance(t, torch.Tensor), f"a time is a {type(t).__name__}: pass a tensor [B].")
        _check_shape(t, x.shape[:1], "a time")
        like_x = t.dtype == x.dtype and t.device == x.device
        _require(like_x, "times must have x's dtype and device: use t.to(x).")
        _require(not free or ((t >= 0) & (t <= latest)).all(), f"times must lie in [0, {latest}].")


def _check_shape(a, shape, what):
    """[B] beside [B, 1] would broadcast to [B, B] and pull every D to the batch mean: raise."""
    found = list(getattr(a, "shape", [type(a).__name__]))
    _require(found == list(shape), f"{what} has shape {found}, expected {list(shape)}.")


def _check_probe(probe, x):
    given = isinstance(probe, torch.Tensor)
    _check_shape(probe if given else x, x.shape, "the probe")
    known = given or probe in ("exact", "rademacher", "dct")
    _require(known, f'unknown probe {probe}: "exact", "rademacher", "dct" or a tensor like x.')
    autocast = x.device.type in ("cpu", "cuda", "mps") and torch.is_autocast_enabled(x.device.type)
    _require(not autocast, "derivatives need float32: call this outside of torch.autocast.")


def _check_loss(x1, condition, x0, t, s, context, diagonal, probe):
    _check(x1, finite=True)
    _check_probe(probe, x1)
    known = ("semigroup", "eulerian", "lagrangian", None)
    _require(condition in known, f"unknown condition {condition}: use one of {known}.")
    if t is not None or s is not None:
        _check(x1, t, s)
    _check(x1 if x0 is None else x0)
    _check_shape(x1 if x0 is None else x0, x1.shape, "x0")
    _require(context is None or len(context) == len(x1), "context must have one row per example.")
    _require(0 <= diagonal <= 1, f"diagonal is a share of the batch, from 0 to 1, not {diagonal}.")
