"""Closed-form flows that the tests hold the code against, and a small network for what has none."""

import math

import torch
from torch import nn

from f2d2 import divergence, time_features


def wide(t, x):
    return t.reshape(-1, *[1] * (x.dim() - 1))


def times(n, seed=0, dtype=torch.float64):
    """t, s [n] in both orders."""
    return torch.rand(2, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def field(velocity, probe="exact"):
    """g(x,t) = (v, -div v), what eulerian and lagrangian take; (v,) if probe is None."""

    @torch.no_grad()
    def g(x, t):
        if probe is None:
            return (velocity(x, t),)
        v, div = divergence(velocity, x, t, probe)
        return v, -div

    return g


class ExactGaussian:
    """The joint flow map of data N(mean, std^2 I), where x_t is N(mu_t, sigma_t^2 I):

    Phi_X(x,t,s) = mu_s + (sigma_s / sigma_t) (x - mu_t),   D = -d ln(sigma_s / sigma_t) / (s-t)
    """

    def __init__(self, mean=0.0, std=0.5):
        self.mean = mean  # a number or a tensor like x
        self.std = std  # a number or a tensor [B]

    def sigma(self, t):
        return ((1 - t) ** 2 + (self.std * t) ** 2).sqrt()

    def __call__(self, x, t, s):
        sigma_t = self.sigma(t)
        sigma_s = self.sigma(s)
        # k = (sigma_s / sigma_t - 1) / (s-t) without the pole
        k = (self.std**2 * (t + s) - (2 - t - s)) / (sigma_t * (sigma_s + sigma_t))
        h = s - t
        near = h.abs() < 1e-12
        rate = torch.where(near, k, torch.log1p(h * k) / torch.where(near, 1.0, h))
        return self.mean + wide(k, x) * (x - wide(t, x) * self.mean), -x[0].numel() * rate

    def velocity(self, x, t):
        return self(x, t, t)[0]

    def log_prob(self, x):
        z = (x - self.mean) / self.std
        return (
            (-0.5 * z.square() - 0.5 * math.log(2 * math.pi) - math.log(self.std)).flatten(1).sum(1)
        )


class ConditionalGaussian:
    """Data N(mean[label], std[label]^2 I): the map above, one for each label [B]."""

    means = torch.tensor([-2.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    stds = torch.tensor([0.3, 0.6, 1.2, 2.0], dtype=torch.float64)

    def __call__(self, x, t, s, label):
        return ExactGaussian(wide(self.means[label], x), self.stds[label])(x, t, s)

    def velocity(self, x, t, label):
        return self(x, t, t, label)[0]


class EightGaussians:
    """Eight Gaussians on a circle of radius 3: v and log p in closed form, no flow map."""

    def __init__(self, std=0.3):
        self.std = std
        angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
        self.centres = 3 * torch.stack([angle.cos(), angle.sin()], 1)  # [8, 2]

    def _components(self, x, t):
        """At time t each is N(t c, var I): offsets [B, 8, 2], weighted log densities, var."""
        var = ((1 - t) ** 2 + (self.std * t) ** 2)[:, None]
        offset = x[:, None] - t[:, None, None] * self.centres
        log_density = -0.5 * offset.square().sum(2) / var - (2 * math.pi * var).log() - math.log(8)
        return offset, log_density, var

    def sample(self, n):
        return self.centres[torch.arange(n) % 8] + self.std * torch.randn(n, 2, dtype=torch.float64)

    def log_prob(self, x):
        return self._components(x, torch.ones_like(x[:, 0]))[1].logsumexp(1)

    def velocity(self, x, t):
        """E[x_1 - x_0 | x_t = x]: c + (sigma_t' / sigma_t) offset, averaged over components."""
        offset, log_density, var = self._components(x, t)
        slope = (self.std**2 * t - (1 - t))[:, None] / var
        v = self.centres + slope[..., None] * offset
        return (log_density.softmax(1)[..., None] * v).sum(1)


class TinyBackbone(nn.Module):
    """x [B, ...] of data_dim numbers -> u [B, ...], features [B, width]: smooth, no dropout."""

    def __init__(self, data_dim, width, paper=False):
        super().__init__()
        self.paper = paper
        self.first = nn.Linear(data_dim + (8 if paper else 10), width)
        self.second = nn.Linear(width, width)
        self.out = nn.Linear(width, data_dim)

    def forward(self, x, t, s):
        h = torch.cat([x.flatten(1), time_features(t, s, self.paper)], 1)
        features = self.second(self.first(h).tanh()).tanh()
        return self.out(features).reshape(x.shape), features
