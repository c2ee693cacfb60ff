"""Few steps on a uniform grid against one finer near the data: python .github/grids.py RUN... prints the README's table from folders
of train_2d.py (lsd or shortcut-distill). The finer grid is that of the oracle, geometric in 1 - t + 0.01. Means over the runs."""
import sys

import torch

from guidance import load
from table import mean, spread
from f2d2 import log_likelihood, ode_log_likelihood, sample, time_grid
from train_2d import N_GRID, ORACLE_STEPS, grid, sample_kl

N_TEST, N_SAMPLES = 5_000, 100_000


@torch.no_grad()
def main(folders):
    table = {}
    for folder in folders:
        name, target, flow, teacher = load(folder)
        generator = torch.Generator().manual_seed(7)
        x, x0 = target.sample(N_TEST, generator, "cpu"), torch.randn(N_SAMPLES, 2, generator=generator)
        oracle = ode_log_likelihood(teacher.velocity, x, ORACLE_STEPS)
        for steps in (8, 4, 2):
            for geometric in (False, True):
                times = time_grid(steps, x, geometric)
                mass = log_likelihood(flow, grid(N_GRID, 5, "cpu"), times).exp().sum() * (10 / N_GRID) ** 2
                drawn = torch.cat([sample(flow, part, times)[0] for part in x0.split(20_000)])
                row = (log_likelihood(flow, x, times) - oracle).abs().mean(), mass, sample_kl(target, drawn)
                table.setdefault((name, steps, "finer near the data" if geometric else "uniform"), []).append([float(v) for v in row])
    print("| target | steps | grid | error against the oracle | mass | sample KL |\n" + "| --- " * 6 + "|")
    for key, rows in table.items():
        print(f"| {' | '.join(map(str, key))} | " + " | ".join(f"{mean(v)} ({spread(v)})" for v in zip(*rows)) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
