# SPDX-License-Identifier: MIT
"""F2D2 in one file: samples *and* log-likelihoods of a flow-based model in 1-8 network evaluations.

Ai, He, Gu, Salakhutdinov, Kolter, Boffi, Simchowitz, "Joint Distillation for Fast Likelihood
Evaluation and Sampling in Flow-based Models", ICLR 2026, arXiv 2512.02636. Read before it "Flow
Matching for Generative Modeling", "FFJORD" (log p), "One Step Diffusion via Shortcut Models", "Mean
Flows for One-step Generative Modeling", "How to build a consistency model" (flow maps, LSD).

One network jumps along two coupled ODEs at once, y = (x, z) with z the change of log p:

  dx/dt = v(x,t),  dz/dt = -div v(x,t)       is solved by       Phi_Y(y,t,s) = y + (s-t) f(x,t,s)

In short, with a network of your own, backbone(x, t, s) -> (u, features):

  flow = JointFlowMap(backbone, feature_dim)
  loss = sum(f2d2_loss(flow, x1, "eulerian").values())  # or a teacher's velocity, 4th argument
  x1, log_p = sample(flow, x0, steps=2)
  log_p = log_likelihood(flow, x1, steps=2)

Conventions, a silent clash of which is the most repeated bug of flow code:

  code                shape         paper     meaning
  x                   [B, ...]      x_t       state at time t: t = 0 noise N(0, I), t = 1 data,
                                              x_t = (1-t) x_0 + t x_1
  t, s                [B]           t, s      current, target time in [0, 1]; s < t runs backwards
  u                   [B, ...]      u(x,t,s)  average velocity over [t, s]
  D                   [B]           D(x,t,s)  average rate of change of log p along the trajectory,
                                              nats per unit time: MINUS the average divergence.
                                              The sign is the paper's. Its project page adds (s-t) D
                                              too, yet trains D on +div; both published codes train
                                              +div and subtract it
  f = flow(x, t, s)   (u, D)        f         average rates of the joint map; (u,) without a head
  v = velocity(x, t)  [B, ...]      v(x,t)    instantaneous velocity, E[x_1 - x_0 | x_t = x]; as an
                                              argument v the sample x_1 - x_0, whose mean that is
  g(x, t)             (v, -div v)             rates of the coupled ODEs; (v,) without a head
  (v, *here[1:])      (v, -div v)             the same with that sample in the velocity's place
  log_p               [B]                     nats per example (bits_per_dim converts)

Arguments come in the order (x, t, s), then `context` [B, ...], what the network is conditioned on:
labels, observations. A `flow` is any callable (x, t, s) -> (u, D) or (u,). [ours] marks what is not
in the paper. paper=True of JointFlowMap and f2d2_loss switches it off, or an option of its own:
probe, robust, euler, lr. Shapes are checked everywhere; values, such as NaN, on the CPU alone.
"""

import math
from contextlib import suppress
from itertools import pairwise
from numbers import Integral

import torch  # tested from 2.6 on
from torch import nn
from torch.func import jvp, vjp


# --------------------------------------------------------------------------- the joint flow map
class JointFlowMap(nn.Module):
    """Phi_Y(y,t,s) = y + (s-t) f(x,t,s): y = (x, z), z the change of log p; its x part is Phi_X.

    backbone(x, t, s, *context) -> u [B, ...], features [B, feature_dim], each example by itself.
    features: what the head reads, say the last hidden layer, a mean over pixels. The Eulerian and
    the Lagrangian condition differentiate the backbone by torch.func's jvp and vjp.

    The head makes D of the features, d being the size of x:
      h = head(features, t, s)
      D = d h_0                               if paper
      D = d (h_0 + sum_k w_k r_k)             [ours] w = softmax(h_1 .. h_12),
                                              r_k = D/d of data N(0, var_k I)
    """

    def __init__(self, backbone, feature_dim, divergence_head=True, paper=False):
        super().__init__()
        self.backbone = backbone
        self.feature_dim = feature_dim
        self.paper = paper
        self.head = None
        if divergence_head:
            std = torch.logspace(math.log10(0.002), math.log10(4), 12)
            self.register_buffer("variances", std**2)
            hidden = nn.Linear(feature_dim + (8 if paper else 10), feature_dim)  # + time_features
            out = nn.Linear(feature_dim, 1 if paper else 13)
            for p in out.parameters():
                nn.init.zeros_(p)
            if not paper:
                out.bias.data[1:] = -(std.log() ** 2) / 8  # w is largest around std 1
            self.head = nn.Sequential(hidden, nn.SiLU(), out)

    def forward(self, x, t, s=None, *context):
        """x [B, ...], t and s [B] -> (u [B, ...], D [B] in nats per unit time); (u,) if no head.

        ValueError for inputs, or outputs of the backbone, that do not fit."""
        _require(s is not None, "a flow map takes two times: as a velocity, pass its .velocity.")
        _check(x)
        _check_times(t, x)
        _check_times(s, x, latest=2)  # beyond 1 only in the paper's mirrored likelihood
        u, features = self._run(x, t, s, context)
        if self.head is None:
            return (u,)

        h = self.head(torch.cat([features, time_features(t, s, self.paper)], 1)).to(x)
        rate = h[:, 0]
        if not self.paper:
            rate = rate + _dot(h[:, 1:].softmax(1), gaussian_rates(t, s, self.variances))
        return u, math.prod(x.shape[1:]) * rate

    def velocity(self, x, t, *context):
        """v(x,t) = u(x,t,t) [B, ...]; the head does not run.

        t is [B] or, as ODE solvers call it, []; a solver's t may lie beyond [0, 1] too."""
        _check(x)
        if torch.is_tensor(t) and t.dim() == 0:
            t = t.expand(x.shape[0])
        _check_like(t, x, "a time", x.shape[0])
        _check_finite(t, "a time")
        return self._run(x, t, t, context)[0]

    def _run(self, x, t, s, context):
        """What the backbone returns, checked, in x's dtype: it may use autocast."""
        outputs = self.backbone(x, t, s, *context)
        pair = not torch.is_tensor(outputs) and len(outputs) == 2
        _require(pair, "the backbone must return (u, features).")
        u, features = [output.to(x) for output in outputs]
        _check_like(u, x, "the backbone's u")
        _check_like(features, x, "the backbone's features", x.shape[0], self.feature_dim)
        return u, features


def phi(y, h, rates):
    """y + h rates, part by part, h [B]: Phi_Y(y,t,s) for y = (x, z), h = s-t, rates = f(x,t,s).

    The conditions add g and h df/dt with it. Both tuples may have one part alone. ValueError where
    two parts differ in shape."""
    moved = []
    for a, rate, name in zip(y, rates, "uD"):
        _check_like(rate, a, name)
        moved.append(a + _wide(h, a) * rate)
    return tuple(moved)


# --------------------------------------------------------------------------- the divergence
def divergence(velocity, x, t, probe="rademacher", generator=None):
    """v(x,t) [B, ...] and div v = tr dv/dx = E eps^T (dv/dx) eps [B], for any velocity(x, t).

    probe: "exact"       over the d unit vectors
           "rademacher"  eps of random signs (FFJORD)
           "dct"         [ours] random signs in a DCT basis, in which dv/dx of photographs is nearly
                         diagonal: 3-8 times less variance there, as measured, but 3.6 times more
                         near t = 1 on Fashion-MNIST, where black pixels make dv/dx diagonal
           eps           itself, like x
    ValueError for another probe or a velocity of another shape than x, and under autocast. A
    velocity with torch.no_grad inside has the divergence 0."""
    _check(x)
    _check_times(t, x)
    _check_probe(probe, x)
    _check_autocast(x)

    # pull_back(eps) = eps^T dv/dx. Clones, because older versions of PyTorch differentiate what was
    # made under inference_mode to nothing.
    v, pull_back = vjp(lambda x: velocity(x, t.clone()), x.clone())
    _check_like(v, x, "the velocity")

    if probe == "exact":
        unit_vectors = x.new_ones(x[0].numel()).diag().reshape(-1, *x.shape[1:])
        return v, sum(_dot(pull_back(e.expand_as(x))[0], e) for e in unit_vectors)

    if not torch.is_tensor(probe):
        probe = hutchinson_probe(x, probe, generator)
    return v, _dot(pull_back(probe)[0], probe)


def hutchinson_probe(x, probe="rademacher", generator=None):
    """eps like x [B, ...] with E eps eps^T = I: "rademacher" or "dct" as in divergence."""
    eps = 2 * torch.empty_like(x).bernoulli_(generator=generator) - 1
    if probe == "rademacher":
        return eps

    _require(probe == "dct", f'unknown probe {probe}: use "rademacher" or "dct".')
    for axis in range(1, x.dim()):  # the colour axis too
        n = x.shape[axis]
        k = torch.arange(n, device=x.device, dtype=x.dtype)
        basis = torch.cos(math.pi / n * k[:, None] * (k + 0.5))  # [frequency, position]
        basis = nn.functional.normalize(basis)  # orthonormal
        eps = (eps.movedim(axis, -1) @ basis).movedim(-1, axis)
    return eps


def residual_divergence(v, difference, t):
    """[ours] An estimate of -div v [B] without any derivative, from difference = x_1 - x_0 alone:

    -div v(x,t) = E[ (d - t |x_1 - x_0 - v|^2) / (1-t) | x_t = x ]    if v = E[x_1 - x_0 | x_t = x]

    So the residual of L_VM is a target for L_div, as x_1 - x_0 is one for v. It is right only where
    v is: an error e of v lowers D by t |e|^2 / (1-t), so that bits/dim are an upper estimate, not
    the ODE's. 1-t is at least 0.001 here."""
    residual = difference - v
    d = v[0].numel()
    return (d - t * _dot(residual, residual)) / (1 - t).clamp(min=1e-3)


@torch.inference_mode(False)  # in it older versions of PyTorch differentiate to nothing
@torch.no_grad()  # cuts the graph outside; torch.func differentiates inside all the same
def coupled_field(velocity, x, t, probe, generator=None, difference=None):
    """g(x,t) = (v, -div v), stop-gradient: dx/dt and dz/dt. (v,) if probe is None.

    probe: as in divergence, or "residual" with difference = x_1 - x_0: residual_divergence."""
    if probe is None:
        return (velocity(x, t),)
    if probe == "residual":
        v = velocity(x, t)
        return v, residual_divergence(v, difference, t)
    v, div = divergence(velocity, x, t, probe, generator)
    return v, -div


# --------------------------------------------------------------------------- the conditions
# f(x,t,t) = g(x,t) and any one of the three identities after it make Phi_Y the flow map of the
# coupled ODEs. An identity is the same line for u beside v as for D beside -div v. Each function
# returns (prediction, target), both tuples like f(x, t, s): (u, D) or (u,). Targets are
# stop-gradient, but for d/ds f in LSD.
def tangent(f, g, x, t, v=None, residual=False):
    """Over no time at all the average rates are the rates (flow matching):

    f(x,t,t) = g(x,t)

    A given v = x_1 - x_0 takes the place of g's velocity in u's target: noisy, with the right mean.
    residual: -div v is residual_divergence's of that v and the predicted u, and g is not asked."""
    prediction = f(x, t, t)
    if v is None:
        return prediction, g(x, t)
    if len(prediction) == 1:
        return prediction, (v,)
    if residual:
        return prediction, (v, residual_divergence(prediction[0].detach(), v, t))
    return prediction, (v, *g(x, t)[1:])


def semigroup(f, x, t, s):
    """Two half jumps make the whole (Shortcut models). With r = (t+s)/2 and x_r = Phi_X(x,t,r):

    f(x,t,s) = 1/2 [f(x,t,r) + f(x_r,r,s)]
    """
    with torch.no_grad():
        r = (t + s) / 2
        first = f(x, t, r)
        x_r = x + _wide(r - t, x) * first[0]
        second = f(x_r, r, s)
        target = tuple((a + b) / 2 for a, b in zip(first, second))
    return f(x, t, s), target


def eulerian(f, g, x, t, s, v=None, paper=False):
    """Moving the start along the trajectory leaves the end where it is (MeanFlow):

    f(x,t,s) = g(x,t) + (s-t) d/dt f(x_t,t,s),   d/dt = jvp on (x,t) with tangents (v, 1)

    A given v = x_1 - x_0 takes the place of g's velocity in u's target, as in `tangent`.
    If paper it is the jvp's tangent too, where its variance swamps D's target; [ours] there is g's
    velocity, as "improved MeanFlow" (arXiv 2512.02012) has it for u."""
    _check_autocast(x)
    here = g(x, t)
    dx_dt = v if paper and v is not None else here[0]
    if v is not None:
        here = (v, *here[1:])
    prediction, df_dt = _value_and_rate(lambda x, t: f(x, t, s), x, t, dx_dt)
    return prediction, phi(here, s - t, df_dt)


def _value_and_rate(f, x, t, dx_dt):
    """f(x,t) with a graph, and its derivative along (dx_dt, 1) without one."""
    tangents = (dx_dt, torch.ones_like(t))
    if torch.compiler.is_compiling() or x.is_mps:  # no fork_rng there: one pass, more memory
        value, rate = jvp(f, (x, t), tangents)
        return value, [r.detach() for r in rate]

    # A second pass needs no more memory than a plain step; forked: the same dropout in both.
    with torch.random.fork_rng([x.device] if x.is_cuda else []), torch.no_grad():
        _, rate = jvp(f, (x, t), tangents)
    return f(x, t), rate


def lagrangian(f, g, x, t, s, paper=False):
    """Moving the end follows the field there (LSD). With x_s = Phi_X(x,t,s), stop-gradient:

    f(x,t,s) = g(x_s,s) - (s-t) d/ds f(x,t,s)

    The gradient runs through d/ds u, as in the published LSD code, and [ours] through d/ds D.
    [ours] x_s by four jumps in place of one towards the noise. A single long jump predicts a mean,
    which has too little noise, and g at so clean a point teaches it to predict even less."""
    prediction, df_ds = _value_and_end_rate(lambda s: f(x, t, s), s)
    x_s = (x + _wide(s - t, x) * prediction[0]).detach()
    if paper:
        df_ds = (df_ds[0], *[dD_ds.detach() for dD_ds in df_ds[1:]])
    else:
        with torch.no_grad():
            times = log_time(time_grid(4, x)[:, None], t, s)
            x_s = torch.where(_wide(s < t, x), _travel(f, x, times)[0], x_s)  # s < t: to noise
    return prediction, phi(g(x_s, s), t - s, df_ds)


def _value_and_end_rate(f, s):
    """f(s) and df/ds, both with a graph.

    d/ds in reverse mode, because its own gradient costs less time and memory than a jvp's:
    pull_back(w) = w^T df/ds is linear in w, so pulling 1 back through it gives df/ds."""
    value, pull_back = vjp(f, s)
    _, pull_back_again = vjp(lambda w: pull_back(w)[0], value)
    return value, pull_back_again(torch.ones_like(s))[0]


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

      L_VM = E |u(x,t,t) - v|^2    L_div = E |D(x,t,t) + div v|^2    on a share of x1, the tangent's
      L_u = E |u - u_target|^2     L_D = E |D - D_target|^2          on the rest, by `condition`

    |.|^2 is a mean over dimensions, D stands for D/d, and each square has its weight of
    natural_weights. Without a head "div" and "D" are 0.

    flow       the joint map, or any callable (x, t, s) -> (u, D) or (u,). For the warm start of u
               alone JointFlowMap(flow.backbone, flow.feature_dim, divergence_head=False)
    x1         data [B, ...]
    condition  "semigroup", "eulerian", "lagrangian"; None: L_VM and L_div alone, on all of x1
    teacher    velocity(x, t), whose v and div v are taught; in eval(), frozen by
               requires_grad_(False) and not by torch.no_grad inside. None: v is x_1 - x_0 in L_VM
               and in MeanFlow's L_u, elsewhere the flow's own u(x,t,t), stop-gradient
    x0, t, s   noise like x1, times [B], t and s or neither. None: drawn, the times by sample_times
    context    [B, ...], goes to flow(x, t, s, context) and teacher(x, t, context). None: to neither
    diagonal   the share of x1 for the tangent condition, one example at least for either
    probe      a name or a tensor as in divergence; or [ours] "residual" for residual_divergence,
               but not with the Lagrangian condition, which asks for div v at x_s
    robust     [ours] Huber's loss of D, for targets without noise
    paper      uniform times, t <= s but for LSD; the conditions' paper=True; no natural_weights.
               MeanFlow's own weight on L_VM and L_u: whenever there is no teacher, or paper
    generator  of all draws. None: PyTorch's own

    ValueError for what does not fit, and under autocast. With the residual probe and the semigroup
    condition or None nothing but the loss is differentiated, and autocast may be around it."""
    known = ("semigroup", "eulerian", "lagrangian", None)
    _require(condition in known, f"unknown condition {condition}: use one of {known}.")
    _require(0 <= diagonal <= 1, f"diagonal is a share of the batch, from 0 to 1, not {diagonal}.")
    _check(x1)
    _as_arguments(context, x1)
    if probe != "residual":
        _check_probe(probe, x1)
        _check_autocast(x1)
    elif condition == "lagrangian":
        raise ValueError("LSD asks for div v at x_s, where no residual is: use another probe.")

    # x_t = (1-t) x_0 + t x_1
    if t is None and s is None:
        forward = paper and condition in ("semigroup", "eulerian")
        t, s = sample_times(x1, 0.0 if paper else 0.5, forward, generator)
    if x0 is None:
        x0 = torch.empty_like(x1).normal_(generator=generator)
    _check_times(t, x1)
    _check_times(s, x1)
    _check_like(x0, x1, "x0")
    x = _wide(1 - t, x1) * x0 + _wide(t, x1) * x1
    _check_finite(x, "x0 or x1")
    batch = (x, t, s, x1 - x0, context, probe)
    adaptive = condition == "eulerian" and (teacher is None or paper)  # MeanFlow's own weight
    losses = dict.fromkeys(("vm", "u", "div", "D"), x.new_zeros(()))

    # The tangent condition, on the first n rows.
    n = len(x) if condition is None else max(1, round(diagonal * len(x)))
    rows = slice(0, n)
    prediction, target, weights = _solve("tangent", rows, batch, flow, teacher, paper, generator)
    _check_finite(target[0], "the velocity to be taught")
    losses["vm"] = _velocity_loss(prediction, target, weights, adaptive)
    losses["div"] = _divergence_loss(prediction, target, weights, robust)
    if condition is None:
        return losses

    # The flow map condition, on the rest; at diagonal = 1 the last row serves both.
    rows = slice(min(n, len(x) - 1), None)
    prediction, target, weights = _solve(condition, rows, batch, flow, teacher, paper, generator)
    losses["u"] = _velocity_loss(prediction, target, weights, adaptive)
    losses["D"] = _divergence_loss(prediction, target, weights, robust)
    return losses


def _solve(condition, rows, batch, flow, teacher, paper, generator):
    """prediction, target and natural weights of a condition, on some rows of the batch."""
    # Clones, because torch.compile has no jvp at a view.
    x, t, s, difference, context, probe = [
        a[rows].clone() if torch.is_tensor(a) else a for a in batch
    ]
    context = _as_arguments(context, x)
    v = difference if teacher is None else None
    if isinstance(flow, JointFlowMap) and flow.head is None:
        probe = None  # nothing needs a divergence

    def f(x, t, s):
        return flow(x, t, s, *context)

    def velocity(x, t):
        return f(x, t, t)[0] if teacher is None else teacher(x, t, *context)

    def g(x, t):
        return coupled_field(velocity, x, t, probe, generator, difference)

    if condition == "tangent":
        solved = tangent(f, g, x, t, v, probe == "residual")
    elif condition == "semigroup":
        solved = semigroup(f, x, t, s)
    elif condition == "lagrangian":
        solved = lagrangian(f, g, x, t, s, paper)
    else:
        solved = eulerian(f, g, x, t, s, v, paper)
    for prediction, target in zip(*solved):
        _check_like(target, prediction, "a target")
    return *solved, natural_weights(condition, t, s, teacher, paper)


def _velocity_loss(prediction, target, weights, adaptive):
    """E weight |u - u_target|^2, a mean over dimensions too.

    adaptive: MeanFlow's weight of each example, here of the mean over dimensions."""
    residual = prediction[0] - target[0]
    square = _dot(residual, residual) / residual[0].numel()
    if adaptive:
        square = square * (square.detach() + 1e-3) ** -0.75
    return (weights[0] * square).mean()


def _divergence_loss(prediction, target, weights, robust):
    """E weight ((D - D_target) / d)^2; 0 without a head.

    robust: 4 r^2 for weighted residuals r up to 0.06 (tuned), linear beyond."""
    if len(prediction) == 1:
        return prediction[0].new_zeros(())
    residual = weights[1] ** 0.5 * (prediction[1] - target[1]) / prediction[0][0].numel()
    if robust:
        return 8 * nn.functional.huber_loss(residual, 0 * residual, delta=0.06)
    return residual.square().mean()


# --------------------------------------------------------------------------- sampling, likelihood
def sample(flow, x0, steps, context=None):
    """x0 ~ N(0, I) [B, ...] -> x1 = Phi_X(x0,0,1), and log p [B] in nats, None without a head:

    log N(x0; 0, I) + sum_k (t_{k+1} - t_k) D(x_{t_k},t_k,t_{k+1})

    That is log p where the ODE from x0 ends, which a few-step x1 misses by a little: for log p of
    x1 itself log_likelihood(flow, x1, steps) errs less. steps: how many (NFE), or the times."""
    y = _travel(flow, x0, time_grid(steps, x0), context)
    log_p = normal_log_density(x0) + y[1] if len(y) == 2 else None
    return y[0], log_p


def log_likelihood(flow, x1, steps, mirror=False, context=None):
    """x1 [B, ...] -> log p_1(x1) [B] in nats, in K = `steps` jumps over 1 = t_0 > ... > t_K = 0:

    log p_1(x1) = log N(x_{t_K}; 0, I) + sum_k (t_k - t_{k+1}) D(x_{t_k},t_k,t_{k+1})

    mirror: the paper's approximation for maps trained forward only, u(x,t,t-h) ~ u(x,t,t+h) and D
    alike (target time 2t - s): biased even for exact maps. steps: how many, or the times. Raises
    ValueError without a head."""
    y = _travel(flow, x1, time_grid(steps, x1).flip(0), context, mirror)
    _require(len(y) == 2, NO_HEAD)
    return normal_log_density(y[0]) - y[1]


def _travel(flow, x, times, context=None, mirror=False):
    """(x, z), or (x,) without a head: after jumps along times [K] or [K, B], z the log p gained."""
    context = _as_arguments(context, x)
    times = times.reshape(len(times), -1).expand(-1, x.shape[0])
    y = x, torch.zeros_like(times[0])
    for t, s in pairwise(times):
        end = 2 * t - s if mirror else s
        y = phi(y, s - t, flow(y[0], t, end, *context))
    return y


def self_guidance(flow, x0, lr=0.005, iterations=1, context=None):
    """Moves x0 [B, ...] to a likelier start by Adam on -log N(x0; 0, I) - D(x0,0,1). One step in
    the paper, which moves every coordinate by lr; lr is [ours]. ValueError without a head."""
    _check(x0)
    with torch.inference_mode(False), torch.enable_grad():
        x0 = x0.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([x0], lr=lr)
        for _ in range(iterations):
            _, log_p = sample(flow, x0, 1, context)
            _require(log_p is not None, NO_HEAD)
            x0.grad = torch.autograd.grad(-log_p.sum(), x0)[0]
            optimizer.step()
    return x0.detach()


# --------------------------------------------------------------------------- the slow oracle
@torch.no_grad()
def ode_sample(velocity, x0, steps, euler=False, context=None):
    """x0 [B, ...] at t = 0 -> x1 [B, ...], the solution of dx/dt = v(x,t) at t = 1.

    [ours] Midpoint rule on a grid geometric in 1.01 - t, because div v grows as 1/(1-t): twice as
    many evaluations as steps. euler=True: the paper's Euler rule on a uniform grid."""
    times = time_grid(steps, x0, not euler)
    return sample(_small_step(velocity, x0, euler), x0, times, context)[0]


@torch.no_grad()
def ode_log_likelihood(
    velocity, x1, steps, probe="exact", euler=False, generator=None, context=None
):
    """x1 [B, ...] -> log p_1(x1) = log N(x_0; 0, I) - int_0^1 div v(x_t,t) dt, nats [B].

    Rule and grid as in ode_sample, from t = 1 to 0; a named probe is drawn at each step."""
    times = time_grid(steps, x1, not euler)
    _check_probe(probe, x1)
    rates = _small_step(velocity, x1, euler, probe, generator)
    return log_likelihood(rates, x1, times, context=context)


def _small_step(velocity, x, euler, probe=None, generator=None):
    """The ODEs' joint map (x, t, s) -> (u, D) or (u,) for s near t: g at t, or half way to s."""
    functional = torch._C._functorch.is_gradtrackingtensor(x)
    _require(not functional, "the oracle has no gradient: call it outside of torch.func.grad.")

    def rates(x, t, s, *context):
        def v(x, t):
            return velocity(x, t, *context)

        if not euler:
            x = x + _wide((s - t) / 2, x) * v(x, t)
            t = (t + s) / 2
        return coupled_field(v, x, t, probe, generator)

    return rates


def time_grid(steps, x, geometric=False):
    """Times from 0 to 1 [steps + 1], like x: uniform, or [ours] geometric in 1.01 - t. Or
    `steps` is the times: sorted and checked. Raises ValueError for anything else."""
    _check(x)
    _check_finite(x, "x")
    if torch.is_tensor(steps) and steps.dim() == 1:
        times = steps.to(x).sort().values
        if not times.is_meta:
            whole = len(times) and times[0] == 0 and times[-1] == 1 and times.diff().min() > 0
            _require(whole, "a tensor of times must go from 0 to 1, or from 1 to 0.")
        return times

    number = isinstance(steps, Integral) and steps is not True and steps >= 1
    _require(number, f"steps must be a whole number from 1 or a tensor of times, not {steps!r}.")
    times = torch.linspace(0, 1, int(steps) + 1, device=x.device, dtype=x.dtype)
    if geometric:
        left = 101 ** (1 - times)  # 1.01 - t in hundredths, from 101 to 1
        times = (left[0] - left) / (left[0] - left[-1])
    return times


# --------------------------------------------------------------------------- [ours]
DELTA = 0.003  # added to 1 - t; noise over a grey level, 2/256 wide, has std 0.0023


def sample_times(x, log_share=0.5, forward=False, generator=None):
    """t, s [B] like x, uniform; forward: t <= s, the paper's for Shortcut and MeanFlow. [ours] Both
    directions, because a likelihood runs from t = 1 to 0. And in a share of the pairs 1 - t + DELTA
    and 1 - s + DELTA are log-uniform, because most of an image's likelihood is near the data."""
    r = x.new_empty(3, len(x)).uniform_(generator=generator)
    times = torch.where(r[2] < log_share, log_time(r[:2], 1, 0), r[:2])
    if forward:
        times = times.sort(0).values
    return tuple(times)


def log_time(share, t, s):
    """The time at a share of the way from t to s in ln(1 - time + DELTA)."""
    left = (1 - t + DELTA) ** (1 - share) * (1 - s + DELTA) ** share
    return (1 + DELTA - left).clamp(0, 1)


def time_features(t, s, paper=False):
    """t, s [B] -> [B, 10], smooth through s = t; [B, 8], without the logs [ours], if paper:

    t, s-t, sin and cos of (pi t, 2 pi t, pi (s-t)), 1 + ln(1-t + DELTA)/3, 1 + ln(1-s + DELTA)/3"""
    angles = math.pi * torch.stack([t, 2 * t, s - t], 1)
    left = (1 - torch.stack([t, s], 1)).abs() + DELTA  # the mirrored likelihood asks for s > 1
    logs = 1 + left.log() / 3
    features = torch.cat([torch.stack([t, s - t], 1), angles.sin(), angles.cos(), logs], 1)
    return features[:, :8] if paper else features


def gaussian_rates(t, s, variances):
    """D / d [B, K] for data N(0, var I), var in variances [K], sigma_t^2 = (1-t)^2 + t^2 var:

    -ln(sigma_s / sigma_t) / (s-t) = atanh((s-t) k) / (s-t)
    k = (sigma_t^2 - sigma_s^2) / (sigma_t^2 + sigma_s^2) / (s-t), in which s-t cancels"""
    t, s = t[:, None], s[:, None]
    h = s - t
    var_t, var_s = [(1 - r) ** 2 + r**2 * variances for r in (t, s)]
    k = (2 - t - s - (t + s) * variances) / (var_t + var_s)
    near = h.abs() < 2e-4  # there, the series of atanh
    far = (var_t / var_s).log() / torch.where(near, 1.0, 2 * h)
    return torch.where(near, k * (1 + (h * k).square() / 3), far)


def natural_weights(condition, t, s, teacher, paper=False):
    """[ours] Weights [B] of the squared residuals of u and of D/d. 1 if paper; 1 for u without a
    teacher.

    About 1/target^2: towards the data D/d grows as 1/scale, and a derivative as 1/near besides. Or
    a lower power of near/scale where that did as well; the root, for LSD's u, is measured."""
    if paper:
        return 1.0, 1.0
    near_t = 1 - t + DELTA
    near_s = 1 - s + DELTA
    scale = torch.maximum(near_t, near_s)
    weight_u, weight_D = {
        "tangent": (1.0, near_t**2),  # whatever s is
        "semigroup": (1.0, scale**2),
        "eulerian": (near_t / scale, near_t * scale),
        "lagrangian": ((near_s / scale) ** 0.5, near_s**2),
    }[condition]
    return (1.0 if teacher is None else weight_u), weight_D


# --------------------------------------------------------------------------- units
def dequantize(x_uint8, noise=None, generator=None):
    """uint8, or ValueError -> (x + U) / 128 - 1 in [-1, 1), float32. U: uniform on [0, 1) in steps
    of 1/65536, or `noise`, like x and in [0, 1)."""
    _require(getattr(x_uint8, "dtype", None) == torch.uint8, "dequantize takes uint8 images.")
    if noise is None:
        noise = torch.rand(x_uint8.shape, device=x_uint8.device, generator=generator)
    # 8 + 16 bits fit a float32: 255 + U never becomes 256.
    noise = (noise.float() * 65536).floor() / 65536
    return (x_uint8 + noise) / 128 - 1


def bits_per_dim(log_p, data_dim):
    """log p in nats, of data in [-1, 1) -> bits per dimension, -log2 P / d; P ~ p (2/256)^d."""
    return 7 - log_p / (data_dim * math.log(2))


def normal_log_density(x):
    """log N(x; 0, I) in nats, x [B, ...] -> [B]."""
    return -0.5 * (_dot(x, x) + x[0].numel() * math.log(2 * math.pi))


def _dot(a, b):
    """The inner product of each example's a and b [B, ...]: [B]."""
    return (a * b).reshape(a.shape[0], -1).sum(1)


def _wide(t, x):
    """t [B] -> [B, 1, ...], to multiply x [B, ...]."""
    return t.reshape(-1, *[1] * (x.dim() - 1))


# --------------------------------------------------------------------------- input checks
NO_HEAD = "this flow map has no divergence head: train one with it."


def _require(true, sentence):
    if not true:
        raise ValueError(sentence)


def _check(x):
    """x [B, ...] floating point with an example at least."""
    _require(torch.is_tensor(x) and x.is_floating_point(), "x must be a float tensor.")
    _require(x.dim() and x.shape[0], f"x has shape {x.shape}: pass at least one example.")


def _check_times(t, x, latest=1):
    """t [B] like x, in [0, latest]."""
    _check_like(t, x, "a time", x.shape[0])
    _require_all((t >= 0) & (t <= latest), f"times must lie in [0, {latest}].")


def _check_finite(x, what):
    _require_all(x.isfinite(), f"{what} holds NaN or infinity.")


def _require_all(true, sentence):
    """_require of a tensor where looking at values costs nothing: on the CPU, but not compiling."""
    if true.is_cpu and not torch.compiler.is_compiling():
        with suppress(RuntimeError):  # of vmap and fake tensors
            _require(true.all(), sentence)


def _check_like(a, x, what, *shape):
    """[B] beside [B, 1] would broadcast to [B, B] and pull every D to the batch mean: raise."""
    expected = shape or x.shape
    found = getattr(a, "shape", None)
    _require(found == expected, f"{what} has shape {found}, expected {expected}.")
    _require(a.dtype == x.dtype and a.device == x.device, f"{what} needs x's dtype and device.")


def _as_arguments(context, x):
    """context, a tensor with a row for each of x's, as a list of arguments; none for None."""
    if context is None:
        return []
    rows = getattr(context, "shape", ())[:1]
    _require(rows == x.shape[:1], "context must be one tensor, with one row per example.")
    return [context]


def _check_probe(probe, x):
    if torch.is_tensor(probe):
        _check_like(probe, x, "the probe")
    else:
        known = probe in ("exact", "rademacher", "dct")
        _require(known, f'unknown probe {probe}: "exact", "rademacher", "dct" or a tensor like x.')


def _check_autocast(x):
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    _require(not autocast, "derivatives would lose their digits: call this outside of autocast.")
