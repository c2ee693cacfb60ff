"""Closed-form flows that the tests hold the code against."""
import math

import torch


def wide(t, x):
    return t.reshape(-1, *[1] * (x.dim() - 1))


class ExactGaussian:
    """The joint flow map of data N(mean, std^2 I): Phi_X = mu_s + (sigma_s/sigma_t)(x - mu_t), D = -d ln(sigma_s/sigma_t)/(s-t)."""

    def __init__(self, mean=0.0, std=0.5):
        self.mean, self.std = mean, std

    def sigma(self, t):
        return ((1 - t) ** 2 + (self.std * t) ** 2).sqrt()

    def __call__(self, x, t, s):
        sigma_t, sigma_s = self.sigma(t), self.sigma(s)
        # (sigma_s/sigma_t - 1) / (s-t) without the pole
        k = (self.std**2 * (t + s) - (2 - t - s)) / (sigma_t * (sigma_s + sigma_t))
        h = s - t
        log = torch.where(h.abs() < 1e-12, k, torch.log1p(h * k) / torch.where(h.abs() < 1e-12, 1.0, h))
        return self.mean + wide(k, x) * (x - wide(t, x) * self.mean), -x[0].numel() * log

    def velocity(self, x, t):
        return self(x, t, t)[0]

    def log_prob(self, x):
        z = (x - self.mean) / self.std
        return (-0.5 * z.square() - 0.5 * math.log(2 * math.pi) - math.log(self.std)).flatten(1).sum(1)


def times(n, seed=0, dtype=torch.float64):
    """t, s [n] in both orders."""
    return torch.rand(2, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)
