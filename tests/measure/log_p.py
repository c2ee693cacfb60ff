"""1,000 log p in 2-D by f2d2.py and by flow_matching's ODE solver, from the same velocity:

python tests/measure/log_p.py runs/2d/checkerboard-lsd-0/checkpoint.pt

A run of train_2d.py with its default method. Seconds: medians of REPETITIONS in turn, one thread;
the ratios say more, because they are of one run.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from flow_matching.solver import ODESolver

sys.path.insert(0, str(Path(__file__).parents[2]))
import f2d2
import train_2d

REPETITIONS = 7


def load(path):
    """flow, its teacher's velocity."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    args = train_2d.PARSER.parse_args([])
    flow = train_2d.build(args, True)
    teacher = train_2d.build(args, False)
    flow.load_state_dict(state["flow"])
    teacher.load_state_dict(state["teacher"])
    flow.eval().requires_grad_(False)
    return flow, teacher.eval().requires_grad_(False).velocity


def main(path):
    torch.set_num_threads(1)
    flow, velocity = load(path)
    target = train_2d.Checkerboard()
    torch.manual_seed(0)
    x = target.sample(1000)
    solver = ODESolver(velocity)

    def adaptive():
        choices = dict(method="dopri5", step_size=None, exact_divergence=True)
        return solver.compute_likelihood(x, f2d2.normal_log_density, **choices)[1]

    systems = {
        "f2d2, 1 step": lambda: f2d2.log_likelihood(flow, x, 1),
        "f2d2, 8 steps": lambda: f2d2.log_likelihood(flow, x, 8),
        "f2d2, oracle": lambda: f2d2.ode_log_likelihood(velocity, x, train_2d.ORACLE_STEPS),
        "flow_matching, dopri5": adaptive,
    }
    seconds = {name: [] for name in systems}
    log_p = {}
    for _ in range(1 + REPETITIONS):  # the first warms up
        for name, function in systems.items():
            began = time.perf_counter()
            log_p[name] = function()
            seconds[name].append(time.perf_counter() - began)

    print("| 1,000 log p | seconds | over one step | difference from dopri5 | error |")
    print("| --- " * 5 + "|")
    medians = {name: statistics.median(found[1:]) for name, found in seconds.items()}
    for name in systems:
        ratio = medians[name] / medians["f2d2, 1 step"]
        difference = (log_p[name] - log_p["flow_matching, dopri5"]).abs().mean()
        error = (log_p[name] - target.log_prob(x)).abs().mean()
        print(f"| {name} | {medians[name]:.3g} | {ratio:.0f} | {difference:.3f} | {error:.3f} |")


if __name__ == "__main__":
    main(sys.argv[1])
