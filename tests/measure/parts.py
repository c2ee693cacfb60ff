"""Where a student's error of log p comes from: python tests/measure/parts.py FOLDER CKPT...

FOLDER: the images; CKPT: students of one teacher, which the first holds. On 64 test images, in
bits/dim, mean (mean absolute value) over images; positive: the part makes bits/dim too high.

  D, short pieces     D over the oracle's 64 steps, against exact divergences there
  D, long jumps       D over 8, 4, 2, 1 jumps from points of the oracle's path, against short pieces
  D, off the path     D from where the student's own jumps arrive, against the oracle's path
  x_0                 log N(x_0) where the student arrives, against the oracle's x_0
"""

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import f2d2
import train_image

N = 64


def path_of(flow, x, times):
    """The points where jumps along `times` end, x first, and the log p gained in all [N]."""
    points = [x]
    total = 0
    for pair in zip(times[:-1], times[1:]):
        x, gained = f2d2._travel(flow, x, torch.stack(pair))
        points.append(x)
        total = total + gained
    return points, total


def jumps(flow, points, times):
    """Sum of (s-t) D(x,t,s) from each of the points but the last, [N]."""
    total = 0
    for x, t, s in zip(points, times[:-1].split(1), times[1:].split(1)):
        total = total + (s - t) * flow(x, t.expand(len(x)), s.expand(len(x)))[1]
    return total


@torch.no_grad()
def main(folder, *paths):
    students = [train_image.load(path) for path in paths]
    velocity = train_image.frozen(students[0]["teacher"], "cpu").velocity
    config = argparse.Namespace(**students[0]["config"] | {"dataset": folder, "eval": True})
    images, _ = train_image.load_data(config, "test")
    x = f2d2.dequantize(images, generator=torch.Generator().manual_seed(0))
    x1 = x[torch.linspace(0, len(x) - 1, N).long()]

    def compare(log_p, reference):
        bits = (reference - log_p) / (x1[0].numel() * math.log(2))
        return f"{bits.mean():.3f} ({bits.abs().mean():.3f})"

    # The oracle's path, and the teacher's at the stops of 8, 4, 2, 1 jumps.
    times = f2d2.time_grid(train_image.ORACLE_STEPS, x1, True).flip(0)
    points, gained = path_of(f2d2._small_step(velocity, x1, False, "exact"), x1, times)
    oracle = f2d2.normal_log_density(points[-1]) - gained
    dct = f2d2.ode_log_likelihood(velocity, x1, train_image.ORACLE_STEPS, "dct")
    print(
        f"oracle's probes, one run against exact divergences: {compare(dct, oracle)}\n", flush=True
    )
    grids = {k: f2d2.time_grid(k, x1).flip(0) for k in train_image.STEP_COUNTS}
    stops = {}
    for k, grid in grids.items():
        stops[k] = [x1]
        for t, s in zip(grid[:-1], grid[1:]):  # finer near the data, as the oracle's grid
            share = torch.linspace(0, 1, 33)
            fine = 1.01 - (1.01 - t) ** (1 - share) * (1.01 - s) ** share
            small = f2d2._small_step(velocity, x1, False)
            stops[k].append(f2d2._travel(small, stops[k][-1], fine.clamp(0, 1))[0])

    titles = "student, steps", "D, short pieces", "D, long jumps", "D, off the path", "x_0", "all"
    print("|", " | ".join([*titles, "correlation"]), "|\n" + "| --- " * 7 + "|")
    for student in students:
        flow = train_image.frozen(student, "cpu")
        short = jumps(flow, points, times)
        for k, grid in grids.items():
            long = jumps(flow, stops[k], grid)
            x0, own = f2d2._travel(flow, x1, grid)
            log_p = f2d2.normal_log_density(x0) - own
            cells = [f"{student['config']['method']}, {k}", compare(-short, -gained)]
            cells += [compare(-long, -short), compare(-own, -long)]
            cells.append(compare(*map(f2d2.normal_log_density, (x0, points[-1]))))
            corr = torch.corrcoef(torch.stack([log_p, oracle]))[0, 1]
            print("|", " | ".join([*cells, compare(log_p, oracle), f"{corr:.3f}"]), "|", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
