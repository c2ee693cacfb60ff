"""F2D2 in one file: samples *and* log-likelihoods of a flow-based model in 1-8 network evaluations.

Method: Ai, He, Gu, Salakhutdinov, Kolter, Boffi, Simchowitz, "Joint Distillation for Fast Likelihood Evaluation and
Sampling in Flow-based Models", ICLR 2026, arXiv 2512.02636. Read first, in this order:
  Lipman et al., "Flow Matching for Generative Modeling"                        the velocity v and its ODE
  Boffi, Albergo, Vanden-Eijnden, "Flow Map Matching" and "How to build a consistency model: Learning flow maps via
    self-distillation"                                                          the flow map; the Lagrangian condition (LSD)
  Frans et al., "One Step Diffusion via Shortcut Models"                        the semigroup condition
  Geng et al., "Mean Flows for One-step Generative Modeling"                    the Eulerian condition
  Grathwohl et al., "FFJORD"                                                    log p by Hutchinson's estimator

Conventions (a silent clash of these is the most repeated bug of this family)
  code                  shape      paper         meaning
  x                     [B, ...]   x_t           state at time t; t = 0 is noise N(0, I), t = 1 is data; x_t = (1-t) x_0 + t x_1
  t, s                  [B]        t, s          current time, target time, in [0, 1], in either order (s < t runs backwards)
  u                     [B, ...]   u(x,t,s)      average velocity over [t, s]
  D                     [B]        D(x,t,s)      average rate of change of log p along the trajectory, nats per unit time
                                                 = minus the average divergence, so D(x,t,t) = -div v(x,t)
  flow(x, t, s)         -> (u, D)                the joint flow map's average rates; D is None without a divergence head
  flow.jump(x, z, t, s) -> (x_s, z_s)  Phi_Y     x_s = x + (s-t) u,  z_s = z + (s-t) D
  v, velocity(x, t)     [B, ...]   v(x,t)        instantaneous velocity; the conditional one is x_1 - x_0
  eps                   [B, ...]                 Hutchinson probe, E eps eps^T = I
  log_p                 [B]                      nats per example (bits_per_dim converts)
Arguments always come in the order (x, t, s). A `flow` may be any callable (x, t, s) -> (u, D). What is not in the paper is
marked "ours, because ..." and can be switched off by the argument beside the mark.
"""
import math

import torch
from torch import nn
from torch.func import jvp, vjp

DELTA = 0.003  # ours, because 8-bit data are smooth only below the grey-level step: the shortest 1 - t that matters


# ---------------------------------------------------------------------------------- inputs: shapes, units, errors
def _wide(t, x):
    """t [B] -> [B, 1, ...], to multiply x [B, ...]."""
    return t.reshape(-1, *[1] * (x.dim() - 1))


def _check(x, *times, upper=1.0):
    """Raises ValueError unless x is floating point [B, ...] and every time is [B], of x's dtype and device, in [0, upper]."""
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: pass floating point data (for 8-bit images, dequantize(x)).")
    for t in times:
        if t.shape != x.shape[:1]:
            raise ValueError(f"a time has shape {list(t.shape)}: pass one per example, shape {list(x.shape[:1])}.")
        if t.dtype != x.dtype or t.device != x.device:
            raise ValueError(f"a time is {t.dtype} on {t.device} but x is {x.dtype} on {x.device}: use t.to(x).")
        if t.device.type == "cpu" and type(t) is torch.Tensor and not torch.compiler.is_compiling():  # free only here
            if not ((t >= 0) & (t <= upper)).all():
                raise ValueError(f"times must lie in [0, {upper:g}], got {t.min().item():g} to {t.max().item():g}.")


def _same_shape(a, b, what):
    """A [B] beside a [B, 1] would broadcast to [B, B] and pull every D to the batch mean: raise instead."""
    if a.shape != b.shape:
        raise ValueError(f"{what} has shape {list(a.shape)}, expected {list(b.shape)}.")


def normal_log_density(x):
    """log N(x; 0, I) in nats, x [B, ...] -> [B]."""
    return -0.5 * (x.square() + math.log(2 * math.pi)).flatten(1).sum(1)


def dequantize(x_uint8, noise=None, generator=None):
    """Bytes to reals, (x + U) / 128 - 1 with U uniform on [0, 1): shape kept, values in [-1, 1), floor((x+1) 128) inverts it.

    Raises ValueError if x_uint8 is not uint8. `noise` in [0, 1) replaces U.
    """
    if x_uint8.dtype != torch.uint8:
        raise ValueError(f"dequantize takes uint8 images with values 0..255, got {x_uint8.dtype}.")
    if noise is None:
        noise = torch.rand(x_uint8.shape, device=x_uint8.device, generator=generator)
    noise = (noise * 65536).floor() / 65536  # 8 + 16 bits fit a float32 exactly: 255 + U never rounds up to 256
    return (x_uint8 + noise) / 128 - 1


def bits_per_dim(log_p, data_dim):
    """log p (nats, of data in [-1, 1)) -> bits per dimension of the 256-level data: 7 - log_p / (d ln 2).

    A grey level is 2/256 wide, so P(byte) ~ p(x) (1/128)^d and -log2 P / d = log2 128 - log_p / (d ln 2).
    """
    return 7 - log_p / (data_dim * math.log(2))


# ---------------------------------------------------------------------------------- the joint flow map: u and D
def time_features(t, s, log_time=True):
    """(t, s) [B] -> [B, 10], bounded, smooth through s = t. The last two are ours, because most of an image's likelihood
    lies at 1 - t between 1 and 0.004, which a network that sees t linearly cannot resolve (log_time=False drops them)."""
    pi = math.pi  # columns:   t, s-t;  sin of pi t, 2 pi t, pi (s-t);  cos of them;  log of 1-t, 1-s
    weight = torch.tensor([[1, -1, pi, 2 * pi, -pi, pi, 2 * pi, -pi, -1, 0], [0, 1, 0, 0, pi, 0, 0, pi, 0, -1]], dtype=t.dtype)
    bias = torch.tensor([0, 0, 0, 0, 0, pi / 2, pi / 2, pi / 2, 1, 1], dtype=t.dtype)
    z = torch.addmm(bias.to(t.device), torch.stack([t, s], 1), weight.to(t.device))
    logs = [(z[:, 8:].abs() + DELTA).log() / 3 + 1] if log_time else []  # abs: the mirrored likelihood asks for s > 1
    return torch.cat([z[:, :2], z[:, 2:8].sin(), *logs], 1)


def gaussian_rates(t, s, variances):
    """Average rate of log p per dimension for data N(0, var I), each var in `variances` [K] -> [B, K]:
    -1/2 [ln sigma^2(s) - ln sigma^2(t)] / (s-t), with sigma^2(t) = (1-t)^2 + t^2 var.

    Near s = t the series k (1 + (s-t)^2 k^2 / 3 + ...), k = [sigma^2(t) - sigma^2(s)] / [sigma^2(t) + sigma^2(s)] / (s-t).
    """
    h, one = (s - t)[:, None], torch.ones_like(variances)
    near, at_t, at_s = h.abs() < 2e-4, torch.stack([1 - t, t], 1), torch.stack([1 - s, s], 1)
    var_t, var_s = (w.square() @ torch.stack([one, variances]) for w in (at_t, at_s))
    k = (at_t + at_s) @ torch.stack([one, -variances]) / (var_t + var_s)  # s-t is divided out: no pole
    series = k * (1 + (h * k).square() / 3)
    return torch.where(near, series, (var_t / var_s).log() / torch.where(near, 1.0, 2 * h))


class JointFlowMap(nn.Module):
    """Phi_Y(y,t,s) = y + (s-t) f(x,t,s), with y = (x, z) and f = (u, D): section "joint distillation" of the paper.

    backbone(x, t, s) -> (u [B, ...], features [B, feature_dim]); the head maps features and times to D, per dimension:
      D = d (head + sum_k w_k rate_k),   w = softmax(head)
    The sum is ours, because it is the exact D of a Gaussian with that spectrum and leaves the head what depends on x
    (baseline=False drops it); so is log time (log_time=False drops it from the head's inputs).
    Raises ValueError for integer x, times of the wrong shape, dtype, device or range, and a backbone of the wrong shape.
    """

    def __init__(self, backbone, feature_dim, divergence_head=True, baseline=True, log_time=True):
        super().__init__()
        self.backbone, self.feature_dim, self.log_time, self.head = backbone, feature_dim, log_time, None
        std = torch.logspace(math.log10(0.002), math.log10(4), 12)  # from the noise inside a grey level to a few
        self.register_buffer("variances", std**2 if baseline else None)
        if divergence_head:
            inputs, outputs = feature_dim + 8 + 2 * log_time, 1 + 12 * baseline
            self.head = nn.Sequential(nn.Linear(inputs, feature_dim), nn.SiLU(), nn.Linear(feature_dim, outputs))
            nn.init.zeros_(self.head[-1].weight)
            with torch.no_grad():  # the mixture starts around std 1, where D is small, yet the grey levels stay in reach
                self.head[-1].bias.copy_(torch.cat([torch.zeros(1), -(std.log() ** 2) / 8])[:outputs])

    def forward(self, x, t, s):
        """x [B, ...], t and s [B] -> u [B, ...], D [B] in nats per unit time (None without the head)."""
        _check(x, t)
        _check(x, s, upper=2)  # 2 only for the paper's mirrored likelihood
        u, features = self.backbone(x, t, s)
        _same_shape(u, x, "the backbone's u")
        if features.shape != (len(x), self.feature_dim):
            raise ValueError(f"the backbone's features have shape {list(features.shape)}, expected {[len(x), self.feature_dim]}.")
        if self.head is None:
            return u, None
        out = self.head(torch.cat([features, time_features(t, s, self.log_time)], 1))
        rate = out[:, 0]
        if self.variances is not None:
            rate = rate + (out[:, 1:].softmax(1) * gaussian_rates(t, s, self.variances)).sum(1)
        return u, x.numel() // len(x) * rate

    def jump(self, x, z, t, s):
        """Phi_Y: x [B, ...] and z [B] (nats) at time t -> the pair at time s. z stays None without the head."""
        _check(x, t, s)
        u, D = self(x, t, s)
        return x + _wide(s - t, x) * u, None if D is None else z + (s - t) * D

    def velocity(self, x, t):
        """The tangent condition read backwards: v(x,t) = u(x,t,t), [B, ...]."""
        _check(x, t)
        return self.backbone(x, t, t)[0]


# ---------------------------------------------------------------------------------- divergence: exact or one probe
def _dct(x):
    """Orthonormal inverse DCT-II along every axis but the first. On a colour axis of three it is luma and two chromas."""
    for axis in range(1, x.dim()):
        n = x.shape[axis]
        k = torch.arange(n, device=x.device, dtype=x.dtype)
        basis = torch.cos(math.pi / n * (k[None] + 0.5) * k[:, None]) * math.sqrt(2 / n)  # [frequency, position]
        basis = torch.where(k[:, None] == 0, math.sqrt(1 / n), basis)
        x = (x.movedim(axis, -1) @ basis).movedim(-1, axis)
    return x


def divergence(velocity, x, t, probe="rademacher", generator=None):
    """v(x,t) [B, ...] and div v = tr dv/dx [B], from any callable velocity(x, t).

    probe = "exact": all d unit vectors; "rademacher": eps^T (dv/dx) eps with random signs (FFJORD); "dct": random signs
    in a DCT basis, ours, because natural images are nearly diagonal there (3-8 times less variance); or eps itself, shaped
    as x. Unbiased because E eps eps^T = I. Raises ValueError for another probe.
    """
    v, pull_back = vjp(lambda x: velocity(x, t), x)  # pull_back(eps) = eps^T dv/dx
    if isinstance(probe, str) and probe == "exact":
        basis = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).reshape(-1, *x.shape[1:])
        return v, sum((pull_back(e.expand_as(x))[0] * e).flatten(1).sum(1) for e in basis)
    if isinstance(probe, str):
        if probe not in ("rademacher", "dct"):
            raise ValueError(f'unknown probe "{probe}": use "exact", "rademacher", "dct" or a tensor shaped as x.')
        signs = torch.randint(0, 2, x.shape, device=x.device, generator=generator).to(x.dtype) * 2 - 1
        probe = _dct(signs) if probe == "dct" else signs
    _same_shape(probe, x, "the probe")
    return v, (pull_back(probe)[0] * probe).flatten(1).sum(1)


# ---------------------------------------------------------------------------------- three conditions, one joint map each
# If f obeys the tangent condition f(x,t,t) = (v, -div v) and any one of these identities, Phi_Y is the flow map of the
# coupled ODEs dx/dt = v, dz/dt = -div v. Each function returns the prediction f and the stop-gradient target of it.
# `velocity(x, t)` gives v and div v: a teacher's, or (None) the network's own u(x,t,t), stop-gradient.
def _v_and_divergence(flow, velocity, x, t, probe, generator):
    """v and div v, without a graph; div is None if probe is."""
    velocity = velocity or getattr(flow, "velocity", lambda x, t: flow(x, t, t)[0])
    with torch.no_grad():
        return (velocity(x, t), None) if probe is None else divergence(velocity, x, t, probe, generator)


def _without_none(flow):
    """flow as a function with tensor outputs only, (u, D) or (u,): what jvp can differentiate."""
    return lambda x, t, s: tuple(f for f in flow(x, t, s) if f is not None)


def tangent(flow, x, t, velocity=None, v=None, probe="rademacher", generator=None):
    """Where every map starts: u(x,t,t) = v, D(x,t,t) = -div v. (The project page has the other sign: D(x,t,t) = div u.)

    x [B, ...], t [B] -> (u, D), (u_target, D_target) at (x, t, t), shaped as in semigroup. `v` replaces the velocity in u's.
    """
    _check(x, t)
    u, D = flow(x, t, t)
    own = div = None
    if v is None or D is not None:
        own, div = _v_and_divergence(flow, velocity, x, t, None if D is None else probe, generator)
    return (u, D), (own if v is None else v, None if D is None else -div)


def semigroup(flow, x, t, s, velocity=None, v=None, probe="rademacher", own_tangent=True, generator=None, through_dD=True):
    """Two half jumps make the whole (Shortcut models). With r = (t+s)/2 and x_r = Phi_X(x,t,r):
    u = 1/2 [u(x,t,r) + u(x_r,r,s)],  D = 1/2 [D(x,t,r) + D(x_r,r,s)].

    x [B, ...], t and s [B] -> (u, D), (u_target, D_target), shaped [B, ...] and [B]; D None without the head. The velocity
    enters through the tangent condition alone, so the arguments from `velocity` on are not used.
    """
    _check(x, t, s)
    u, D = flow(x, t, s)
    with torch.no_grad():
        r = (t + s) / 2
        u1, D1 = flow(x, t, r)
        u2, D2 = flow(x + _wide(r - t, x) * u1, r, s)
    return (u, D), ((u1 + u2) / 2, None if D is None else (D1 + D2) / 2)


def eulerian(flow, x, t, s, velocity=None, v=None, probe="rademacher", own_tangent=True, generator=None, through_dD=True):
    """Moving the start along the trajectory leaves the end where it is (MeanFlow). With d/dt the derivative along (v, 1):
    u = v + (s-t) d/dt u(x_t,t,s),  D = -div v(x_t,t) + (s-t) d/dt D(x_t,t,s).

    Shapes as in semigroup. `v` [B, ...] replaces the velocity in the target of u: x_1 - x_0, which is unbiased there because
    the identity is linear in v. As the tangent of d/dt its noise wrecks the D target: ours is u(x,t,t), which the divergence
    pass computes anyway (own_tangent=False: x_1 - x_0, as in MeanFlow). `through_dD` is not used."""
    _check(x, t, s)
    own, div = _v_and_divergence(flow, velocity, x, t, probe, generator)
    v = own if v is None else v
    with torch.random.fork_rng([x.device] if x.is_cuda else []), torch.no_grad():  # forked: both passes drop the same units
        _, (du, *dD) = jvp(lambda x, t: _without_none(flow)(x, t, s), (x, t), (own if own_tangent else v, torch.ones_like(t)))
    u, D = flow(x, t, s)  # a second pass instead of a graph through the jvp: the memory of a plain training step
    return (u, D), (v + _wide(s - t, x) * du, None if D is None else -div + (s - t) * dD[0])


def lagrangian(flow, x, t, s, velocity=None, v=None, probe="rademacher", own_tangent=True, generator=None, through_dD=True):
    """Moving the end follows the velocity there (LSD). With x_s = Phi_X(x,t,s), stop-gradient:
    u = v(x_s,s) - (s-t) d/ds u(x,t,s),  D = -div v(x_s,s) - (s-t) d/ds D(x,t,s).

    Shapes as in semigroup. The gradient runs through d/ds u and not through x_s, as in the published LSD code (better on the checkerboard),
    and through d/ds D, ours, because D errs less then (through_dD=False: as published). `v`, `own_tangent` are not used: no x_1 - x_0 at x_s."""
    _check(x, t, s)
    (u, *D), pull_back = vjp(lambda s: _without_none(flow)(x, t, s), s)  # w -> w^T df/ds is linear: pulling 1 back through it, at
    (du, *dD), = vjp(lambda w: pull_back(w)[0], (u, *D))[1](torch.ones_like(s))  # any w, is df/ds, for less than a jvp with a graph
    x_s = x + _wide(s - t, x) * u.detach()
    v, div = _v_and_divergence(flow, velocity, x_s, s, probe, generator)
    return (u, D[0] if D else None), (v - _wide(s - t, x) * du, -div - (s - t) * (dD[0] if through_dD else dD[0].detach()) if D else None)


CONDITIONS = {"semigroup": semigroup, "eulerian": eulerian, "lagrangian": lagrangian}


# ---------------------------------------------------------------------------------- L_F2D2 = L_VM + L_u + L_div + L_D
def sample_times(x, direction="both", log_time=0.5, generator=None):
    """t, s [len(x)] on x's device: uniform on the unit square, or ("forward", as in the paper) on its half t <= s.

    Both directions are ours, because a likelihood runs from t = 1 to 0: a map trained for s < t is exact there, the mirrored
    approximation is not. A share `log_time` of the pairs has 1 - t and 1 - s log-uniform in [0.001, 1], ours, see time_features."""
    if direction not in ("both", "forward"):
        raise ValueError(f'unknown direction "{direction}": use "both" or "forward".')
    r = torch.rand(3, len(x), device=x.device, dtype=x.dtype, generator=generator)
    times = torch.where(r[2] < log_time, 1 - 0.001 ** r[:2], r[:2])
    return times.sort(0).values if direction == "forward" else times


def _term(prediction, target, weight, natural):
    """One loss: its scalar and, for logs, the unweighted squared residuals [B] (means over dimensions). Weights:
    "natural", ours, because all varies in ln(1-t) and D grows as 1/scale towards data, scale = 1 - min(t,s) + delta: for u 1 if the residual
    is of u itself (L_VM, semigroup), (1-t+delta)/scale or ((1-s+delta)/scale)^2 if it is a derivative in t or s; for D scale^2 times that.
    "huber", ours: natural, but linear in weighted residuals beyond 0.06; its factor 4, against L_u, is measured in 2-D. "adaptive": MeanFlow's,
    for velocities. "huber" wants noiseless targets, a teacher's and probe="exact", and so does "adaptive" on D: skewed noise biases them."""
    _same_shape(target, prediction, "a target")
    residual = (prediction - target).square().flatten(1).mean(1) if prediction.dim() > 1 else (prediction - target).square()
    weights = {"none": 1.0, "natural": natural, "huber": 4 * natural * (1 + 300 * natural * residual.detach()) ** -0.5,
               "adaptive": (residual.detach() + 1e-3) ** -0.75}
    if weight not in weights:
        raise ValueError(f'unknown weight "{weight}": use {", ".join(weights)}.')
    return (weights[weight] * residual).mean(), residual.detach()


def f2d2_loss(flow, x1, condition, teacher=None, *, x0=None, t=None, s=None, generator=None, joint=True, diagonal=0.5,
              direction="both", log_time=0.5, velocity_weight="none", divergence_weight="natural", probe="rademacher",
              own_tangent=True, through_dD=True, record=None):
    """L_F2D2 = L_VM + L_u + L_div + L_D as {"vm", "u", "div", "D"}: scalars, whose sum is the objective.

    L_VM = E |u(x,t,t) - v|^2,  L_div = E |D(x,t,t) + div v|^2: the tangent condition, on a share `diagonal` of the batch
    L_u = E |u - u_target|^2,   L_D = E |D - D_target|^2: `condition` ("semigroup", "eulerian", "lagrangian"), on the rest
    Means over dimensions; D is compared per dimension, D/d, so that one learning rate serves 2 and 12,288 dimensions.

    x1 [B, ...] data; condition None is the tangent condition alone (flow matching); joint=False the warm start, L_VM + L_u.
    teacher(x, t) -> v, else v = x_1 - x_0 and the network's own div u(x,t,t). Without a head "div" and "D" are zero. x0, t, s may be given.
    See sample_times for direction, log_time; _term for both weights; divergence for probe; a condition for own_tangent, through_dD. The
    dict `record` receives "t", "s" and unweighted squared residuals [B]. Raises ValueError for an unknown option, and as JointFlowMap does."""
    if condition not in (None, *CONDITIONS):
        raise ValueError(f'unknown condition "{condition}": use {", ".join(CONDITIONS)} or None.')
    _check(x1)
    t, s = sample_times(x1, direction, log_time, generator) if t is None else (t, s)
    _check(x1, t, s)
    x0 = torch.randn(x1.shape, dtype=x1.dtype, device=x1.device, generator=generator) if x0 is None else x0
    x, v = _wide(1 - t, x1) * x0 + _wide(t, x1) * x1, x1 - x0
    f = flow if joint else lambda x, t, s: (flow(x, t, s)[0], None)  # the warm start
    n = len(x) if condition is None else max(1, round(diagonal * len(x)))
    m = min(n, len(x) - 1)  # a batch of one serves both parts
    tangents = tangent(f, x[:n], t[:n], teacher, None if teacher else v[:n], probe, generator)
    parts, head = [("vm", "div", 1.0, 1 - t[:n] + DELTA, *tangents)], tangents[0][1] is not None
    if condition is not None:
        f_and_target = CONDITIONS[condition](f, x[m:], t[m:], s[m:], teacher, None if teacher else v[m:], probe if head else None,
                                             own_tangent, generator, through_dD)
        scale = 1 - torch.minimum(t, s) + DELTA  # D varies as 1 / scale; near: the natural weight of u, see _term
        near = {"semigroup": torch.ones_like(scale), "eulerian": (1 - t + DELTA) / scale, "lagrangian": ((1 - s + DELTA) / scale) ** 2}[condition]
        parts.append(("u", "D", near[m:], scale[m:], *f_and_target))
    losses, raw, d = {k: x.new_zeros(()) for k in ("vm", "u", "div", "D")}, {"t": t, "s": s}, x[0].numel()
    for name_u, name_D, near, scale, (u, D), (u_target, D_target) in parts:
        losses[name_u], raw[name_u] = _term(u, u_target, velocity_weight, near)
        if head:
            losses[name_D], raw[name_D] = _term(D / d, D_target / d, divergence_weight, near * scale**2)
    if record is not None:
        record.update(raw)
    return losses


# ---------------------------------------------------------------------------------- sampling and likelihood, few steps
def time_grid(steps, x, geometric=False):
    """A number of steps -> rising times [steps + 1] from 0 to 1, uniform, or geometric in 1 - t + 0.01; a tensor of times
    from 0 to 1, rising or falling, is taken as it is. On x's device. Raises ValueError for anything else."""
    if isinstance(steps, torch.Tensor) and steps.dim():
        times = steps.to(x).sort().values
        if len(times) < 2 or times[0] != 0 or times[-1] != 1 or (times.diff() <= 0).any():
            raise ValueError("a tensor of times must hold at least 0 and 1, all different and none outside [0, 1].")
        return times
    if isinstance(steps, bool) or int(steps) != steps or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1 or a tensor of times, got {steps}.")
    times = torch.linspace(0, 1, int(steps) + 1, device=x.device, dtype=x.dtype)
    return (1 - 0.01 * (101 ** (1 - times) - 1)).clamp(0, 1) if geometric else times


def _travel(flow, x, times, mirror=False):
    """The state after jumping along `times` and the log p gained: sum of (s-t) D [B], None without the head."""
    gained = 0.0
    for t, s in zip(times[:-1], times[1:]):
        t, s = t.expand(len(x)), s.expand(len(x))
        u, D = flow(x, t, 2 * t - s if mirror else s)
        x = x + _wide(s - t, x) * u
        gained = None if D is None else gained + (s - t) * D
    return x, gained


def sample(flow, x0, steps):
    """x0 ~ N(0, I) [B, ...] -> x1 = Phi_X(x0, 0, 1) in `steps` jumps, and its own log-likelihood, for free:
    log p_1(x1) = log N(x0; 0, I) + sum_k (t_{k+1} - t_k) D(x_k, t_k, t_{k+1}), nats [B]; None without the head.

    `steps`: a number (uniform grid, as in the paper) or a tensor of times. NFE = steps.
    """
    _check(x0)
    x1, gained = _travel(flow, x0, time_grid(steps, x0))
    return x1, None if gained is None else normal_log_density(x0) + gained


def log_likelihood(flow, x1, steps, mirror=False):
    """log p_1(x1) = log N(x_0; 0, I) + sum_k (t_k - t_{k+1}) D(x_k, t_k, t_{k+1}) over 1 = t_0 > ... > t_K = 0, nats [B].

    mirror=True is the paper's approximation for maps trained forward only, u(x,t,t-h) ~ u(x,t,t+h) and D likewise (target
    time 2t - s): biased, and what it returns need not integrate to one. Raises ValueError without a divergence head.
    """
    _check(x1)
    x0, gained = _travel(flow, x1, time_grid(steps, x1).flip(0), mirror)
    if gained is None:
        raise ValueError("this flow map has no divergence head: train one with divergence_head=True.")
    return normal_log_density(x0) - gained


def self_guidance(flow, x0, lr=0.005, iterations=1):
    """Moves x0 [B, ...] to a likelier start: Adam on -log N(x0; 0, I) - D(x0, 0, 1), summed over the batch, D unscaled.

    The paper takes one step and publishes no lr: 0.005 is ours, because 0.01 cost 2-D samples their spread. Raises ValueError without a head.
    """
    _check(x0)
    x0 = x0.detach().clone().requires_grad_()
    optimizer, zero = torch.optim.Adam([x0], lr=lr), x0.new_zeros(len(x0))
    for _ in range(iterations):
        with torch.enable_grad():
            D = flow(x0, zero, zero + 1)[1]
            if D is None:
                raise ValueError("this flow map has no divergence head: self-guidance needs one.")
            x0.grad = torch.autograd.grad(-(normal_log_density(x0) + D).sum(), x0)[0]
        optimizer.step()
    return x0.detach()


# ---------------------------------------------------------------------------------- the slow oracle: the coupled ODEs
@torch.no_grad()
def _integrate(velocity, x, times, euler, probe=None, generator=None):
    """x after dx/dt = v along `times`, and the integral of div v [B] (0 without a probe). Midpoint rule or Euler."""
    integral = 0.0
    for t, s in zip(times[:-1], times[1:]):
        h, y = s - t, x
        if not euler:
            y, t = x + h / 2 * velocity(x, t.expand(len(x))), t + h / 2
        t = t.expand(len(x))
        v, div = (velocity(y, t), 0.0) if probe is None else divergence(velocity, y, t, probe, generator)
        x, integral = x + h * v, integral + h * div
    return x, integral


def ode_sample(velocity, x0, steps, euler=False):
    """Solves dx/dt = v(x,t) from x0 [B, ...] at t = 0 to t = 1. Midpoint rule (2 NFE a step) on a grid geometric in 1 - t,
    ours, because div v grows like 1/(1-t); euler=True on the uniform grid is the paper's."""
    _check(x0)
    return _integrate(velocity, x0, time_grid(steps, x0, geometric=not euler), euler)[0]


def ode_log_likelihood(velocity, x1, steps, probe="exact", euler=False, generator=None):
    """log p_1(x1) = log N(x_0; 0, I) - int_0^1 div v(x_t,t) dt along dx/dt = v, solved from t = 1 to t = 0, nats [B].
    Rule and grid as in ode_sample; `probe` as in divergence, drawn afresh at each step."""
    _check(x1)
    x0, integral = _integrate(velocity, x1, time_grid(steps, x1, geometric=not euler).flip(0), euler, probe, generator)
    return normal_log_density(x0) + integral


# ---------------------------------------------------------------------------------- backbones: nothing F2D2-specific
_norm = lambda c: nn.GroupNorm(math.gcd(c, c // 4, 32), c)  # groups of four at least: of one, they forget every channel's size
class MLP(nn.Module):
    """Backbone for vectors: x [B, data_dim], t and s [B] -> u [B, data_dim], features [B, width]. Sines and cosines of x and 2x, because
    densities have edges (Tancik et al., "Fourier Features Let Networks Learn High Frequency Functions in Low Dimensional Domains")."""

    def __init__(self, data_dim=2, width=256, depth=4, log_time=True):
        super().__init__()
        self.log_time, self.feature_dim = log_time, width
        sizes = [5 * data_dim + 8 + 2 * log_time] + [width] * depth
        self.body = nn.Sequential(*(m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.SiLU())))
        self.out = nn.Linear(width, data_dim)

    def forward(self, x, t, s):
        y = x.flatten(1)
        features = self.body(torch.cat([y, y.sin(), y.cos(), (2 * y).sin(), (2 * y).cos(), time_features(t, s, self.log_time)], 1))
        return self.out(features).reshape(x.shape), features


class Block(nn.Module):
    """GroupNorm, SiLU, convolution, twice, around a residual; the embedded times scale and shift in between; then attention."""

    def __init__(self, c_in, c_out, embedding, dropout=0.0, attention=False, resize=None):
        super().__init__()
        self.resize = {None: nn.Identity(), "half": nn.AvgPool2d(2), "double": nn.Upsample(scale_factor=2)}[resize]
        self.before = nn.Sequential(_norm(c_in), nn.SiLU(), self.resize, nn.Conv2d(c_in, c_out, 3, padding=1), _norm(c_out))
        self.modulate = nn.Linear(embedding, 2 * c_out)
        self.after = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.qkv = nn.Sequential(_norm(c_out), nn.Conv2d(c_out, 3 * c_out, 1)) if attention else None
        self.merge = nn.Conv2d(c_out, c_out, 1) if attention else None
        for last in filter(None, (self.after[-1], self.merge)):  # every block starts as its skip
            nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)

    def forward(self, x, embedding):
        scale, shift = self.modulate(embedding)[..., None, None].chunk(2, 1)
        x = self.skip(self.resize(x)) + self.after(self.before(x) * (1 + scale) + shift)
        if self.qkv is None:
            return x
        q, k, v = self.qkv(x).flatten(2).chunk(3, 1)  # written out: the fused attention has no forward-mode derivative
        weights = (q.transpose(1, 2) @ k / math.sqrt(q.shape[1])).softmax(2)
        return x + self.merge((v @ weights.transpose(1, 2)).reshape(x.shape))


class UNet(nn.Module):
    """Backbone for square images, after DDPM++ (Song et al., "Score-Based Generative Modeling through SDEs"): x [B, 3, H, H] -> u
    [B, 3, H, H], features [B, feature_dim] pooled from the bottleneck and the last layer. Raises ValueError for an odd size."""

    def __init__(self, image_size=32, channels=128, multipliers=(2, 2, 2), blocks=4, attention=(16,), dropout=0.0, log_time=True):
        super().__init__()
        if image_size % 2 ** (len(multipliers) - 1):
            raise ValueError(f"image size {image_size} is no multiple of {2 ** (len(multipliers) - 1)}: use one, or fewer multipliers.")
        widths, e, c, skips = [channels * m for m in multipliers], 2 * channels, channels, [channels]
        self.log_time, self.feature_dim = log_time, widths[-1] + 2 * widths[0]
        self.embed = nn.Sequential(nn.Linear(8 + 2 * log_time, e), nn.SiLU(), nn.Linear(e, e), nn.SiLU())
        self.stem, self.down, self.up = nn.Conv2d(3, c, 3, padding=1), nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            for resize in ["half"] * (level > 0) + [None] * blocks:
                self.down.append(Block(c, width, e, dropout, image_size >> level in attention, resize))
                skips.append(c := width)
        self.middle = nn.ModuleList([Block(c, c, e, dropout, attention=True), Block(c, c, e, dropout)])
        for level, width in reversed(list(enumerate(widths))):
            for resize in ["double"] * (level < len(widths) - 1) + [None] * (blocks + 1):
                self.up.append(Block(c + (0 if resize else skips.pop()), width, e, dropout, image_size >> level in attention, resize))
                c = width
        self.out = nn.Sequential(_norm(c), nn.SiLU(), nn.Conv2d(c, 3, 3, padding=1))

    def forward(self, x, t, s):
        e, h = self.embed(time_features(t, s, self.log_time)), self.stem(x)
        skips = [h] + [h := block(h, e) for block in self.down]
        h = self.middle[1](self.middle[0](h, e), e)
        bottleneck = h.mean((2, 3))
        for block in self.up:
            h = block(h if isinstance(block.resize, nn.Upsample) else torch.cat([h, skips.pop()], 1), e)
        h, size = self.out[:2](h), (h.square().mean((2, 3)) + 1e-4).log()  # log p hangs on the size, which the norm forgets
        return self.out[2](h), torch.cat([bottleneck, h.mean((2, 3)), size], 1)
