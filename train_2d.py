# SPDX-License-Identifier: MIT
"""F2D2 in two dimensions: train, print the table, draw the figure. Minutes on a laptop.

python train_2d.py                                 LSD-F2D2 on the checkerboard, teacher first
python train_2d.py --method meanflow --no-teacher  from data alone

The same command prints the table of a finished run again. Nothing is kept of a run that is stopped
before its networks are trained; after that, the same command goes on with the table.

--paper is the paper's objective: nothing marked [ours] but the oracle; uniform times, a Rademacher
probe; forward, mirrored but for lsd. Its published runs: no Muon, no sines of x, an EMA, D weighs
50 times less, lsd teaches itself u and D.
"""

import argparse
import json
import math
import tempfile
import time
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import nn

import f2d2

WIDTH = 192
DEPTH = 4
BATCH = 768
N_TEST = 10_000  # points whose log p the table is about
N_SAMPLES = 200_000  # for the sample KL
N_GRID = 100  # mass and figure: 100 x 100 cells of [-5, 5]^2
STEP_COUNTS = (8, 4, 2, 1)
ORACLE_STEPS = 64  # midpoint steps: doubling them moves log p by 0.004 nats on average
COLUMNS = "nll mae_oracle mae_truth mass sample_kl euler_nll mae_sample seconds".split()

# Method: condition, whether there is a teacher, Muon's weight decay: without it maps that teach
# themselves blew up.
RECIPES = {
    "flow": (None, False, 0.0),
    "shortcut": ("semigroup", False, 0.1),
    "shortcut-distill": ("semigroup", True, 0.1),
    "meanflow": ("eulerian", True, 0.0),
    "lsd": ("lagrangian", True, 0.0),
}
OURS = dict(diagonal=0.25, probe="exact", robust=True)
PAPER = dict(diagonal=0.5, probe="rademacher", paper=True)


# --------------------------------------------------------------------------- arguments
DEVICES = [d for d in ("cpu", "cuda", "mps") if torch.get_device_module(d).is_available()]
PARSER = argparse.ArgumentParser(description=__doc__)
PARSER.formatter_class = argparse.RawDescriptionHelpFormatter
option = PARSER.add_argument
option("--method", choices=RECIPES, default="lsd", help="default lsd; flow is the teacher alone")
option("--target", choices=("checkerboard", "gaussians"), default="checkerboard")
option("--no-divergence", action="store_true", help="no head: the sampling-only baseline")
option("--no-teacher", action="store_true", help="from data alone: v = x_1 - x_0, own div v")
option("--paper", action="store_true", help="the paper's objective, see above")
option("--seed", type=int, default=0, help="default 0")
option("--steps", type=int, default=9000, help="default 9000; a third more for the teacher")
option("--out", type=Path, help="default runs/2d/<target>-<method>-<seed>")
option("--device", choices=DEVICES, default="cpu", help="default cpu")


# --------------------------------------------------------------------------- data
class Checkerboard:
    """Uniform on eight squares of side 2 of a 4 x 4 board on [-4, 4]^2: log p = -ln 32 there."""

    def sample(self, n):
        cell = torch.randint(8, (n,))
        corner = torch.stack([cell % 4, cell // 4 * 2 + cell % 2], 1) * 2 - 4
        return torch.rand(n, 2) * 2 + corner

    def log_prob(self, x):
        black = ((x + 4) // 2).sum(1) % 2 == 0
        return torch.where(black & (x.abs() < 4).all(1), -math.log(32), -math.inf)


class Gaussians:
    """Eight Gaussians of standard deviation 0.3 on a circle of radius 3."""

    angles = torch.arange(8) * (math.pi / 4)
    centres = 3 * torch.stack([angles.cos(), angles.sin()], 1)

    def sample(self, n):
        noise = torch.randn(n, 2)
        which = torch.randint(8, (n,))
        return self.centres[which] + 0.3 * noise

    def log_prob(self, x):
        z = (x[:, None] - self.centres.to(x)) / 0.3
        return (-0.5 * z.square().sum(2)).logsumexp(1) - math.log(8 * 2 * math.pi * 0.3**2)


# --------------------------------------------------------------------------- network, optimizer
class MLP(nn.Module):
    """x [B, data_dim], t, s [B] -> u, features [B, width]. Sines, because densities have edges."""

    def __init__(self, data_dim, width, depth, paper=False):
        super().__init__()
        self.feature_dim = width
        self.paper = paper
        self.body = nn.Sequential()
        inputs = 5 * data_dim + (8 if paper else 10)  # x and its waves, time_features
        for _ in range(depth):
            self.body.extend([nn.Linear(inputs, width), nn.SiLU()])
            inputs = width
        self.out = nn.Linear(width, data_dim)

    def forward(self, x, t, s):
        waves = x.sin(), x.cos(), (2 * x).sin(), (2 * x).cos()
        features = self.body(torch.cat([x, *waves, f2d2.time_features(t, s, self.paper)], 1))
        return self.out(features), features


@torch.no_grad()
def muon_step(matrices, momenta, rate, weight_decay):
    """Muon (Jordan et al.) in float32: torch.optim.Muon's bfloat16 is slow on many CPUs."""
    for p, momentum in zip(matrices, momenta):
        momentum.lerp_(p.grad, 0.05)
        x = nn.functional.normalize(p.grad.lerp(momentum, 0.95), dim=(0, 1))
        for _ in range(5):  # Newton-Schulz: every singular value of x to about one
            gram = x @ x.T
            x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
        p.mul_(1 - rate * weight_decay).sub_(rate * x)


# --------------------------------------------------------------------------- training
def train(name, net, args, target, teacher=None):
    """All steps of RECIPES[name] for `net`, on the velocity teacher(x, t) if there is one.

    Every draw, also f2d2_loss's, is the global generator's: torch.manual_seed decides them all."""
    condition, _, weight_decay = RECIPES[name]
    options = dict(PAPER if args.paper else OURS)
    blur = 0.05 if teacher and not args.paper else 0.0
    steps = max(1, args.steps // 3) if name == "flow" else args.steps

    # Muon for the matrices of full width, Adam for the rest.
    matrices = [p for p in net.parameters() if p.numel() >= WIDTH**2]
    momenta = [torch.zeros_like(p) for p in matrices]
    adam = torch.optim.Adam(set(net.parameters()) - set(matrices))
    began = time.perf_counter()

    for step in range(1, steps + 1):
        # Data, with noise of std blur to 8 blur: a teacher teaches there too, and its mass counts.
        x1 = target.sample(BATCH)
        std = blur * 8 ** torch.rand(BATCH, 1)
        x1 = (x1 + std * torch.randn(BATCH, 2)).to(args.device)

        # L_F2D2 = L_VM + L_u + L_div + L_D. MeanFlow does better without log times.
        if name == "meanflow" and not args.paper:
            options["t"], options["s"] = f2d2.sample_times(x1, 0.0)
        losses = f2d2.f2d2_loss(net, x1, condition, teacher, **options)
        loss = sum(losses.values())
        if not loss.isfinite():
            PARSER.error(f"{name} diverged at step {step}, loss {loss.item()}: nothing was saved.")

        # A step down. Rates: 100 steps up, then half a cosine down to zero.
        net.zero_grad()
        loss.backward()
        rate = min(1, step / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        adam.param_groups[0]["lr"] = 3e-3 * rate
        adam.step()
        muon_step(matrices, momenta, 0.02 * rate, weight_decay)

        if step % 100 == 0:
            terms = " ".join(f"{key} {value:.4f}" for key, value in losses.items())
            left = (time.perf_counter() - began) / step * (steps - step)
            print(f"{name} {step}/{steps}: {terms}, {left:.0f} s left for {name}", flush=True)


# --------------------------------------------------------------------------- evaluation
def grid(n, limit):
    """Centres of the cells of an n x n grid on [-limit, limit]^2: [n*n, 2]."""
    middle = (torch.arange(n) + 0.5) * (2 * limit / n) - limit
    return torch.cartesian_prod(middle, middle)


def histogram(x, n, limit):
    """How many of x [N, 2] lie in each cell of that grid: [n, n]."""
    return torch.histogramdd(x.cpu().double(), [n, n], range=[-limit, limit] * 2).hist


def sample_kl(target, x):
    """KL(true || samples), nats, over 40 x 40 cells of [-4, 4]^2, half a count added to each."""
    p = target.log_prob(grid(400, 4)).exp().double()
    p = p.reshape(40, 10, 40, 10).mean((1, 3)) * 0.2**2  # 10 x 10 points a cell of side 0.2
    q = (histogram(x, 40, 4) + 0.5) / (len(x) + 800)
    return torch.xlogy(p, p / q).sum().item()


def mean(x):
    """None for NaN and infinity, which JSON does not have."""
    value = x.mean().item()
    return value if math.isfinite(value) else None


def likelihood(target, x, log_likelihood, field, *options):
    """For log p = log_likelihood(field, x, *options): what can be said of it without the oracle,
    log p of x [N], log p on the grid [N_GRID * N_GRID]."""
    row = {}
    log_p_grid = log_likelihood(field, grid(N_GRID, 5).to(x), *options)
    row["mass"] = mean(log_p_grid.exp() * 10**2)  # on a square of side 10; waits for a GPU
    began = time.perf_counter()
    log_p = log_likelihood(field, x, *options)
    row["nll"] = mean(-log_p)  # and so does this
    row["seconds"] = (time.perf_counter() - began) * 10_000 / len(x)
    row["mae_truth"] = mean((log_p - target.log_prob(x)).abs())
    return row, log_p, log_p_grid


@torch.no_grad()
def evaluate(target, flow, own, velocity, mirror, device):
    """The table, and the figure's columns {title: (samples [N, 2], log p on the grid)}.

    flow(x, t, s) -> (u, D), or (u,): then the figure has Euler's log p. own(x, t): the network's
    velocity, for Euler's rule. velocity(x, t): the oracle's.
    """
    torch.manual_seed(12345)
    x = target.sample(N_TEST).to(device)
    x0 = torch.randn(N_SAMPLES, 2).to(device)
    parts = x0.split(2_000)  # twice as fast as in one piece
    pictures = {"data": (target.sample(N_SAMPLES), target.log_prob(grid(N_GRID, 5)))}
    ode = f2d2.ode_log_likelihood

    # The oracle: midpoint steps of the ODE.
    oracle, slow, log_p_grid = likelihood(target, x, ode, velocity, ORACLE_STEPS)
    samples = torch.cat([f2d2.ode_sample(velocity, part, ORACLE_STEPS // 2) for part in parts])
    oracle["sample_kl"] = sample_kl(target, samples)
    pictures[f"ODE, {ORACLE_STEPS}-{2 * ORACLE_STEPS} NFE"] = samples, log_p_grid

    # Few steps: of Euler's rule, and of the flow map.
    rows = {}
    for k in STEP_COUNTS:
        row = {}
        euler, _, log_p_grid = likelihood(target, x, ode, own, k, "exact", True)
        x1, log_p_x1 = f2d2.sample(flow, x0[:1000], k)
        if log_p_x1 is not None:  # there is a head
            row, log_p, log_p_grid = likelihood(target, x, f2d2.log_likelihood, flow, k, mirror)
            row["mae_oracle"] = mean((log_p - slow).abs())
            slow_x1 = ode(velocity, x1.nan_to_num(), ORACLE_STEPS)
            row["mae_sample"] = mean((log_p_x1 - slow_x1).abs())
        row["euler_nll"] = euler["nll"]
        samples = torch.cat([f2d2.sample(flow, part, k)[0] for part in parts])
        row["sample_kl"] = sample_kl(target, samples)
        rows[str(k)] = row
        pictures[f"{k} NFE"] = samples, log_p_grid
    return {"oracle": oracle, "steps": rows}, pictures


def draw_figure(pictures):
    """A column for each picture, with its title. Rows: samples, exp(log p); y upwards."""
    columns = []
    for samples, log_p in pictures.values():
        density = log_p.exp().cpu().reshape(N_GRID, N_GRID)
        share = histogram(samples, N_GRID, 5) / len(samples)
        columns.append(torch.cat([density, share * (N_GRID / 10) ** 2], 1))
    p = torch.cat(columns).T.flip(0) / (1.3 * columns[0][:, :N_GRID].max())
    grey = Image.fromarray((255 * p.clip(0, 1)).byte().numpy())
    figure = ImageOps.colorize(grey, "#0d0832", "#fcffa4", "#bb3754")

    draw = ImageDraw.Draw(figure)
    for column, title in enumerate(pictures):
        draw.text((N_GRID * column + 2, -1), title)
        draw.text((N_GRID * column + 2, N_GRID - 1), "exp(log p)")
    return ImageOps.scale(figure, 2)


def print_table(metrics):
    print("{target}, {method}, seed {seed}, trained in {seconds:.0f} s".format(**metrics))
    print("     steps", *(key.rjust(10) for key in COLUMNS))
    for k, row in {"oracle": metrics["oracle"], **metrics["steps"]}.items():
        line = k.rjust(10)
        for key in COLUMNS:
            value = row.get(key)
            line += "          -" if value is None else f"{value:11.4g}"
        print(line)


# --------------------------------------------------------------------------- files
def save(path, content):
    """The bytes become `path`, whole or not at all. Until then they lie in a folder of their own,
    so that no file or link of the user's is in the way."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder, path.name)
        temporary.write_bytes(content)
        temporary.replace(path)


def read_checkpoint(path, config, flow, teacher):
    """Loads a finished run into the networks and returns its seconds; refuses any other file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["config"] != config:
            raise ValueError(f"it holds {state['config']}, you asked for {config}")
        flow.load_state_dict(state["flow"])
        teacher.load_state_dict(state["teacher"])
        return state["seconds"]
    except Exception as error:  # whatever may be in that file
        PARSER.error(f"{path} is not this run's: {error!r:.499}. Choose another --out.")


def build(args, head):
    """An untrained joint flow map; (u,) without a head."""
    plain = args.paper or args.method == "meanflow"  # with ln(1-t) features MeanFlow blew up
    return f2d2.JointFlowMap(MLP(2, WIDTH, DEPTH, plain), WIDTH, head, plain).to(args.device)


def run(args, config, out):
    """Trains unless there is a checkpoint; measures unless there are a table and a figure."""
    checkpoint = out / "checkpoint.pt"
    results = out / "metrics.json"
    figure = out / "figure.png"

    torch.manual_seed(args.seed)
    head = not args.no_divergence and args.method != "flow"
    flow = build(args, head)
    teacher = build(args, False)
    velocity = teacher.velocity if RECIPES[args.method][1] and not args.no_teacher else None
    target = Checkerboard() if args.target == "checkerboard" else Gaussians()

    if checkpoint.exists() or results.exists() or figure.exists():
        seconds = read_checkpoint(checkpoint, config, flow, teacher)
        with suppress(Exception):  # no table, half of one, another run's: measured again
            metrics = json.loads(results.read_text())
            if figure.exists() and metrics["seconds"] == seconds:
                return print_table(metrics)
    else:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # or an error before the work
        began = time.perf_counter()
        torch.manual_seed(args.seed)
        if velocity:
            train("flow", teacher, args, target)
            flow.backbone.load_state_dict(teacher.backbone.state_dict())
        train(args.method, flow, args, target, velocity)
        seconds = time.perf_counter() - began
        weights = dict(flow=flow.state_dict(), teacher=teacher.state_dict())
        buffer = BytesIO()
        torch.save(dict(weights, config=config, seconds=seconds), buffer)
        save(checkpoint, buffer.getvalue())

    print("trained; the table and the figure take a minute or two")
    few_steps = flow if args.method != "flow" else lambda x, t, s: flow(x, t, t)
    oracle = velocity or flow.velocity
    mirror = args.paper and args.method != "lsd"
    measured, pictures = evaluate(target, few_steps, flow.velocity, oracle, mirror, args.device)
    buffer = BytesIO()
    draw_figure(pictures).save(buffer, "PNG")
    save(figure, buffer.getvalue())
    metrics = dict(config, divergence_head=head, seconds=seconds, **measured)
    save(results, json.dumps(metrics, indent=1).encode())
    print_table(metrics)


def main(argv=None):
    args = PARSER.parse_args(argv)
    if not 0 <= args.seed < 2**64 or args.steps < 1:
        PARSER.error("--seed goes from 0 to 2^64 - 1, --steps from 1.")
    if args.method == "shortcut-distill" and args.no_teacher:
        PARSER.error("shortcut-distill has a teacher: drop --no-teacher or use --method shortcut.")
    config = dict(vars(args), width=WIDTH, depth=DEPTH, batch=BATCH)
    del config["out"], config["device"]
    out = args.out or Path("runs/2d") / f"{args.target}-{args.method}-{args.seed}"
    try:
        run(args, config, out)
    except OSError as error:
        PARSER.error(f"cannot write to {out}: {error}.")
    except KeyboardInterrupt:
        kept = "nothing is kept, the same command starts again"
        if (out / "checkpoint.pt").exists():
            kept = "the trained networks are kept, the same command goes on with the table"
        PARSER.exit(130, f"stopped: {kept}.\n")


if __name__ == "__main__":
    main()
