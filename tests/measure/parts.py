"""Where a student's error of log p comes from: python tests/measure/parts.py CKPT FOLDER

CKPT: a student whose teacher is where it was; FOLDER: its images. On 64 test images, in bits/dim,
mean and mean absolute value over images; positive: the part makes bits/dim too high.

  oracle's probes     one run with DCT probes against exact divergences
  D, short pieces     sum of D over the oracle's 64 steps, against div v there
  D, long jumps       D over 8, 4, 2, 1 jumps from points of the oracle's path, against short pieces
  x, D elsewhere      D where the student's own jumps arrive, against the oracle's path
  x_0                 log N(x_0) where the student arrives, against the oracle's x_0
"""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import f2d2
import train_image

N = 64


def path_of(velocity, x, times, probe=None):
    """Points of the midpoint rule along `times`, and the log p gained on each piece."""
    rates = f2d2._small_step(velocity, False, probe)
    points = [x]
    gained = []
    for t, s in zip(times[:-1].split(1), times[1:].split(1)):
        u, *D = rates(points[-1], t.expand(len(x)), s.expand(len(x)))
        points.append(points[-1] + (s - t) * u)
        gained += [(s - t) * D[0]] if D else []
    return points, gained


def jumps(flow, points, times):
    """Sum of (s-t) D(x,t,s) from each of the points but the last, [N]."""
    total = 0
    for x, t, s in zip(points, times[:-1].split(1), times[1:].split(1)):
        total = total + (s - t) * flow(x, t.expand(len(x)), s.expand(len(x)))[1]
    return total


@torch.no_grad()
def main(path, folder):
    state = train_image.load(path)
    flow = state["network"]
    velocity = train_image.load(state["config"]["teacher"])["network"].velocity
    size, colours = state["config"]["image_size"], state["config"]["colours"]
    images = train_image.load_data(folder, Path("data"), size, colours, False)["test"][0]
    x = f2d2.dequantize(images, generator=torch.Generator().manual_seed(0))
    x1 = x[torch.linspace(0, len(x) - 1, N).long()]
    nats_per_bit = x1[0].numel() * math.log(2)

    def show(name, log_p, reference):
        bits = (reference - log_p) / nats_per_bit
        print(f"| {name} | {bits.mean():.3f} | {bits.abs().mean():.3f} |", flush=True)

    print("| part | mean | mean absolute value |\n| --- | --- | --- |")
    times = f2d2.time_grid(train_image.ORACLE_STEPS, x1, True).flip(0)
    points, gained = path_of(velocity, x1, times, "exact")
    oracle = f2d2.normal_log_density(points[-1]) - sum(gained)
    dct = f2d2.ode_log_likelihood(velocity, x1, train_image.ORACLE_STEPS, "dct")
    show("oracle's probes", dct, oracle)
    short = jumps(flow, points, times)
    show("D, short pieces", -short, -sum(gained))

    for k in train_image.STEP_COUNTS:
        grid = f2d2.time_grid(k, x1).flip(0)
        stops = [x1]
        for t, s in zip(grid[:-1], grid[1:]):  # finer near the data, as the oracle's grid
            fine = 1.01 - torch.logspace(0, 1, 33, base=((1.01 - s) / (1.01 - t)).item()) * (
                1.01 - t
            )
            stops.append(path_of(velocity, stops[-1], fine.clamp(0, 1))[0][-1])
        long = jumps(flow, stops, grid)
        x0, own = f2d2._travel(flow, x1, grid)
        show(f"{k} steps: D, long jumps", -long, -short)
        show(f"{k} steps: D, off the oracle's path", -own, -long)
        show(f"{k} steps: x_0", *map(f2d2.normal_log_density, (x0, points[-1])))
        log_p = f2d2.log_likelihood(flow, x1, k)
        show(f"{k} steps: all", log_p, oracle)
        corr = torch.corrcoef(torch.stack([log_p, oracle]))[0, 1]
        print(f"| {k} steps: correlation | {corr:.4f} | |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
