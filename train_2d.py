"""F2D2 in two dimensions: train, print the table, draw the figure. Minutes on a laptop.

python train_2d.py                                    LSD-F2D2 on the checkerboard, flow-matching teacher first
python train_2d.py --target gaussians                 a target whose density and velocity are known in closed form
python train_2d.py --method meanflow --no-teacher     any method, from data alone
python train_2d.py --method lsd --no-divergence       its sampling-only baseline
python train_2d.py --method shortcut-distill --paper  the paper's own recipe
"""
import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from f2d2 import MLP, JointFlowMap, f2d2_loss, log_likelihood, ode_log_likelihood, ode_sample, sample

CONDITION = {"flow": None, "shortcut": "semigroup", "shortcut-distill": "semigroup", "meanflow": "eulerian", "lsd": "lagrangian"}
STEP_COUNTS = (8, 4, 2, 1)
ORACLE_STEPS = 64  # midpoint steps, 128 NFE: doubling them moves log p by under 0.01 nats on average


# ---------------------------------------------------------------------------------- targets
class Checkerboard:
    """Uniform on the eight black squares, of side 2, of a 4 x 4 board on [-4, 4]^2: log p = -ln 32 on them."""

    def sample(self, n, generator, device):
        cell = torch.randint(0, 8, (n,), generator=generator, device=device)
        column, row = cell % 4, cell // 4 * 2 + cell % 2
        return torch.rand(n, 2, generator=generator, device=device) * 2 - 4 + 2 * torch.stack([column, row], 1)

    def log_prob(self, x):
        on = (((x + 4) // 2).sum(1) % 2 == 0) & (x.abs() < 4).all(1)
        return torch.where(on, -math.log(32), -math.inf)

    def cell_probabilities(self, edges):
        mid = (edges[1:] + edges[:-1]) / 2
        return self.log_prob(torch.cartesian_prod(mid, mid)).exp() * (edges[1] - edges[0]) ** 2


class Gaussians:
    """Eight Gaussians of standard deviation 0.3 on a circle of radius 3. At time t each is N(t c, ((1-t)^2 + 0.09 t^2) I)."""

    std = 0.3

    def centres(self, x):
        angle = torch.arange(8, dtype=x.dtype, device=x.device) * (math.pi / 4)
        return 3 * torch.stack([angle.cos(), angle.sin()], 1)  # [8, 2]

    def _components(self, x, t):
        """Offsets from the centres [B, 8, 2], their log weights times density [B, 8], and variance [B, 1] at time t."""
        var = ((1 - t) ** 2 + (self.std * t) ** 2)[:, None]
        offset = x[:, None] - t[:, None, None] * self.centres(x)
        return offset, -0.5 * offset.square().sum(2) / var - (2 * math.pi * var).log() - math.log(8), var

    def sample(self, n, generator, device):
        noise = torch.randn(n, 2, generator=generator, device=device)
        return self.centres(noise)[torch.randint(0, 8, (n,), generator=generator, device=device)] + self.std * noise

    def log_prob(self, x, t=1.0):
        return self._components(x, x.new_full((len(x),), t))[1].logsumexp(1)

    def velocity(self, x, t):
        """The exact v(x,t) = E[x_1 - x_0 | x_t = x]: centre + (sigma_t' / sigma_t) offset, averaged over components."""
        offset, log_weight, var = self._components(x, t)
        slope = (self.std**2 * t - (1 - t))[:, None] / var
        return (log_weight.softmax(1)[..., None] * (self.centres(x) + slope[..., None] * offset)).sum(1)

    def cell_probabilities(self, edges):
        cdf = torch.special.ndtr((edges[:, None, None] - self.centres(edges)) / self.std)  # [edge, centre, axis]
        p = cdf.diff(dim=0)
        return torch.einsum("ik,jk->ij", p[..., 0], p[..., 1]).flatten() / 8


TARGETS = {"checkerboard": Checkerboard, "gaussians": Gaussians}


# ---------------------------------------------------------------------------------- evaluation
def chunked(f, x, size=20000):
    return torch.cat([f(part) for part in x.split(size)])


def histogram(x, bins=40, limit=4):
    """Counts of x [N, 2] on [-limit, limit]^2, flattened; what falls outside is missing mass."""
    inside = x[(x.abs() < limit).all(1)]
    index = ((inside + limit) * (bins / (2 * limit))).long().clamp(max=bins - 1)
    return torch.bincount(index[:, 0] * bins + index[:, 1], minlength=bins**2)


def sample_kl(target, x, bins=40):
    """KL(true || samples) over the cells of a 40 x 40 histogram on [-4, 4]^2, half a count added to each cell."""
    p = target.cell_probabilities(torch.linspace(-4, 4, bins + 1, device=x.device, dtype=torch.float64))
    q = (histogram(x, bins) + 0.5).double() / (len(x) + 0.5 * bins**2)
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum().item()


def grid(n, limit, device):
    """Cell centres of an n x n grid on [-limit, limit]^2: [n*n, 2]."""
    mid = (torch.arange(n, device=device) + 0.5) * (2 * limit / n) - limit
    return torch.cartesian_prod(mid, mid)


@torch.no_grad()
def evaluate(target, flow, velocity, mirror=False, device="cpu", n_test=10000, n_samples=200_000, n_grid=200):
    """The table, and the pictures for the figure: {"truth" | "oracle" | steps: (samples, density on the grid)}."""
    generator = torch.Generator(device).manual_seed(12345)
    x = target.sample(n_test, generator, device)
    x0 = torch.randn(n_samples, 2, generator=generator, device=device)
    points, area = grid(n_grid, 5, device), (10 / n_grid) ** 2
    truth = target.log_prob(x)
    slow = lambda y: chunked(lambda y: ode_log_likelihood(velocity, y, ORACLE_STEPS), y)
    oracle, drawn = slow(x), chunked(lambda y: ode_sample(velocity, y, ORACLE_STEPS), x0)
    mae = lambda a, b: (a - b).abs().mean().item()
    metrics = {"oracle": {"nll": -oracle.mean().item(), "mae_truth": mae(oracle, truth), "sample_kl": sample_kl(target, drawn)},
               "steps": {}}
    pictures = {"truth": (target.sample(n_samples, generator, device), target.log_prob(points)), "oracle": (drawn, slow(points))}
    for k in STEP_COUNTS:
        row = dict.fromkeys(["nll", "mae_oracle", "mae_truth", "mass"])
        few = lambda y: chunked(lambda y: log_likelihood(flow, y, k, mirror), y)
        density = None
        if flow.head is not None:
            log_p, density = few(x), few(points)
            row.update(nll=-log_p.mean().item(), mae_oracle=mae(log_p, oracle), mae_truth=mae(log_p, truth),
                       mass=density.exp().sum().item() * area)
        drawn = chunked(lambda y: sample(flow, y, k)[0], x0)
        euler = ode_log_likelihood(flow.velocity, x, k, euler=True)
        metrics["steps"][str(k)] = row | {"sample_kl": sample_kl(target, drawn), "euler_nll": -euler.mean().item()}
        pictures[str(k)] = (drawn, density)
    return metrics, pictures
