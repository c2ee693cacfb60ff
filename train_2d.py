"""F2D2 in two dimensions: train, print the table, draw the figure. Minutes on a laptop.

python train_2d.py                                 LSD-F2D2 on the checkerboard, teacher first
python train_2d.py --method meanflow --no-teacher  from data alone

The same command prints the table of a finished run again. --paper is the paper's objective: nothing
marked [ours] but the oracle; uniform times, a Rademacher probe; forward, mirrored but for lsd. Its
published runs: no Muon, no sines of x, an EMA, D weighs 50 times less, lsd teaches itself u and D.
"""

import argparse
import json
import math
import time
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

import f2d2

WIDTH, DEPTH, BATCH, STEPS = 192, 4, 768, 9000
N_TEST, N_SAMPLES, N_GRID = 10_000, 200_000, 100
STEP_COUNTS = (8, 4, 2, 1)
ORACLE_STEPS = 64  # midpoint steps: doubling them moves log p by 0.004 nats on average
COLUMNS = "nll mae_oracle mae_truth mass sample_kl euler_nll mae_sample seconds".split()


class MLP(torch.nn.Module):
    """x [B, data_dim], t, s [B] -> u, features [B, width]. Sines, because densities have edges."""

    def __init__(self, data_dim=2, width=256, depth=4, paper=False):
        super().__init__()
        self.feature_dim = width
        self.paper = paper
        sizes = [5 * data_dim + (8 if paper else 10)] + [width] * depth
        layers = [(torch.nn.Linear(a, b), torch.nn.SiLU()) for a, b in zip(sizes, sizes[1:])]
        self.body = torch.nn.Sequential(*sum(layers, ()))
        self.out = torch.nn.Linear(width, data_dim)

    def forward(self, x, t, s):
        waves = x.sin(), x.cos(), (2 * x).sin(), (2 * x).cos()
        features = self.body(torch.cat([x, *waves, f2d2.time_features(t, s, self.paper)], 1))
        return self.out(features), features


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al.) in float32: torch.optim.Muon's bfloat16 is slow on many CPUs."""

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for p in [p for p in group["params"] if p.grad is not None]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.05)
            x = torch.nn.functional.normalize(p.grad.lerp(momentum, 0.95), dim=(0, 1))
            for _ in range(5):  # Newton-Schulz: every singular value of x to about one
                gram = x @ x.T
                x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * x)


class Checkerboard:
    """Uniform on eight squares of side 2 of a 4 x 4 board on [-4, 4]^2: log p = -ln 32 there."""

    def sample(self, n, generator, device):
        cell = torch.randint(0, 8, (n,), generator=generator, device=device)
        corner = torch.stack([cell % 4, cell // 4 * 2 + cell % 2], 1) * 2 - 4
        return torch.rand(n, 2, generator=generator, device=device) * 2 + corner

    def log_prob(self, x):
        black = ((x + 4) // 2).sum(1) % 2 == 0
        return torch.where(black & (x.abs() < 4).all(1), -math.log(32), -math.inf)


class Gaussians:
    """Eight Gaussians of standard deviation 0.3 on a circle of radius 3."""

    angles = torch.arange(8) * (math.pi / 4)
    centres = 3 * torch.stack([angles.cos(), angles.sin()], 1)

    def sample(self, n, generator, device):
        noise = torch.randn(n, 2, generator=generator, device=device)
        which = torch.randint(0, 8, (n,), generator=generator, device=device)
        return self.centres.to(noise)[which] + 0.3 * noise

    def log_prob(self, x):
        z = (x[:, None] - self.centres.to(x)) / 0.3
        return (-0.5 * z.square().sum(2)).logsumexp(1) - math.log(8 * 2 * math.pi * 0.3**2)


TARGETS = {"checkerboard": Checkerboard, "gaussians": Gaussians}

# Without weight decay maps that teach themselves blew up; so did MeanFlow with ln(1-t) features.
RECIPES = {
    "flow": dict(condition=None, teacher=False, weight_decay=0.0, log_times=True),
    "shortcut": dict(condition="semigroup", teacher=False, weight_decay=0.1, log_times=True),
    "shortcut-distill": dict(condition="semigroup", teacher=True, weight_decay=0.1, log_times=True),
    "meanflow": dict(condition="eulerian", teacher=True, weight_decay=0.0, log_times=False),
    "lsd": dict(condition="lagrangian", teacher=True, weight_decay=0.0, log_times=True),
}
OURS = dict(diagonal=0.25, probe="exact", robust=True)
PAPER = dict(diagonal=0.5, probe="rademacher", paper=True)


def save_whole(path, write):
    """What write(file) writes becomes `path`, whole or not at all."""
    content = BytesIO()
    write(content)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content.getbuffer())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        PARSER.error(f"cannot write {path}: {error.strerror}.")


def read_checkpoint(path, config, **networks):
    """Loads a finished run into `networks` and returns its seconds; refuses any other file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["config"] != config:
            PARSER.error(f"{path} holds {state['config']}, you asked for {config}.")
        for name, network in networks.items():
            network.load_state_dict(state[name])
            fit = [w.isfinite().all() and w.dtype == torch.float32 for w in state[name].values()]
            if not all(fit):
                raise ValueError("its weights are not finite and float32")
        return float(state["seconds"])
    except Exception as error:  # whatever may be in that file
        PARSER.error(f"{path} is no run of this script ({error!r:.99}): choose another --out.")


def train(name, net, args, target, generator, teacher=None):
    """All steps of RECIPES[name] for `net`, on the velocity teacher(x, t) if there is one."""
    recipe = RECIPES[name]
    steps = max(1, args.steps // 3) if name == "flow" else args.steps
    matrices = {p for p in net.parameters() if p.dim() == 2 and min(p.shape) >= WIDTH}
    muon = Muon(matrices, dict(lr=0.0, weight_decay=recipe["weight_decay"]))
    adam = torch.optim.Adam(p for p in net.parameters() if p not in matrices)
    blur = 0.05 if teacher and not args.paper else 0.0

    for step in range(1, steps + 1):
        # Learning rates: 100 steps up, then half a cosine down to zero.
        rate = min(1, step / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        muon.param_groups[0]["lr"] = 0.02 * rate
        adam.param_groups[0]["lr"] = 3e-3 * rate

        # Data, with noise of std blur to 8 blur: a teacher teaches there too, and its mass counts.
        x1 = target.sample(BATCH, generator, args.device)
        std = blur * 8 ** torch.rand(BATCH, 1, generator=generator, device=x1.device)
        x1 = x1 + std * torch.randn(x1.shape, generator=generator, device=x1.device)

        # L_F2D2 = L_VM + L_u + L_div + L_D, and a step down.
        options = dict(PAPER if args.paper else OURS, generator=generator)
        if not (args.paper or recipe["log_times"]):
            options["t"], options["s"] = f2d2.sample_times(x1, 0.0, False, generator)
        losses = f2d2.f2d2_loss(net, x1, recipe["condition"], teacher, **options)
        loss = sum(losses.values())
        net.zero_grad()
        loss.backward()
        muon.step()
        adam.step()
        if not torch.stack([a.isfinite().all() for a in (loss, *net.parameters())]).all():
            PARSER.error(f"{name} diverged at step {step}, loss {loss.item()}: nothing was saved.")

        if step % max(1, steps // 50) == 0:
            terms = " ".join(f"{key} {value:.4f}" for key, value in losses.items())
            print(f"{name} {step}/{steps}: {terms}", flush=True)


def grid(n, limit, device="cpu"):
    """Centres of the cells of an n x n grid on [-limit, limit]^2: [n*n, 2]."""
    middle = (torch.arange(n, device=device) + 0.5) * (2 * limit / n) - limit
    return torch.cartesian_prod(middle, middle)


def sample_kl(target, x):
    """KL(true || samples), nats, over 40 x 40 cells of [-4, 4]^2, half a count added to each."""
    p = target.log_prob(grid(400, 4)).exp().double().reshape(40, 10, 40, 10).mean((1, 3)) * 0.2**2
    counts = np.histogram2d(*x.T.cpu().numpy(), 40, [[-4, 4]] * 2)[0]
    q = (torch.from_numpy(counts) + 0.5) / (len(x) + 0.5 * 1600)
    return torch.xlogy(p, p / q).sum().item()


def chunked(x, function, field, *options):
    """function(field, x, *options), 2,000 examples at a time: twice as fast as in one piece."""
    return torch.cat([function(field, part, *options) for part in x.split(2_000)])


@torch.no_grad()
def evaluate(target, flow, velocity, mirror=False, device="cpu"):
    """The table, with None for NaN and infinity, and {name: (samples [N, 2], log p on a grid)}.

    flow(x, t, s) -> (u, D), or (u,): then the picture has Euler's log p. velocity: the oracle's.
    """
    generator = torch.Generator(device).manual_seed(12345)
    x = target.sample(N_TEST, generator, device)
    x0 = torch.randn(N_SAMPLES, 2, generator=generator, device=device)
    points = grid(N_GRID, 5, device)
    pictures = {"truth": (target.sample(N_SAMPLES, generator, device), target.log_prob(points))}
    references = {"mae_truth": target.log_prob(x)}
    head = len(flow(x, x[:, 0] * 0, x[:, 0] * 0)) == 2
    oracle = f2d2.ode_log_likelihood, velocity, ORACLE_STEPS
    rows = {}

    for k in ("oracle", *STEP_COUNTS):
        euler = f2d2.ode_log_likelihood, lambda x, t: flow(x, t, t)[0], k, "exact", True
        log_p = (f2d2.log_likelihood, flow, k, mirror) if head else euler
        if k == "oracle":
            drawn = chunked(x0, f2d2.ode_sample, velocity, ORACLE_STEPS // 2)
            log_p = oracle
        else:
            drawn = torch.cat([f2d2.sample(flow, part, k)[0] for part in x0.split(2_000)])

        density = chunked(points, *log_p)
        row = {"mass": density.exp().sum().item() * (10 / N_GRID) ** 2}  # waits for a GPU
        began = time.perf_counter()
        found = chunked(x, *log_p)
        row["nll"] = -found.mean().item()  # and so does this
        row["seconds"] = (time.perf_counter() - began) * 10_000 / len(x)
        for key, reference in references.items():
            row[key] = (found - reference).abs().mean().item()

        references.setdefault("mae_oracle", found)  # the first one, the oracle's
        if k != "oracle":
            row = row if head else {}
            row["euler_nll"] = -chunked(x, *euler).mean().item()
        if k != "oracle" and head:
            x1, log_p_x1 = f2d2.sample(flow, x0[:1000], k)
            row["mae_sample"] = (log_p_x1 - chunked(x1.nan_to_num(), *oracle)).abs().mean().item()
        row["sample_kl"] = sample_kl(target, drawn)
        rows[str(k)] = dict.fromkeys(COLUMNS) | row
        pictures[str(k)] = drawn, density
    metrics = {"oracle": rows.pop("oracle"), "steps": rows}
    return json.loads(json.dumps(metrics), parse_constant=lambda name: None), pictures


def draw_figure(pictures, file):
    """Columns: truth, oracle, few steps. Rows: density of the samples, exp(log p), y upwards."""
    columns = []
    for samples, log_p in pictures.values():
        counts = np.histogram2d(*samples.T.cpu().numpy(), N_GRID, [[-5, 5]] * 2)[0]
        density = log_p.exp().cpu().numpy().reshape(N_GRID, N_GRID)
        columns.append(np.hstack([density, counts / len(samples) * (N_GRID / 10) ** 2]))
    p = np.vstack(columns).T[::-1] / (1.3 * columns[0][:, :N_GRID].max())
    grey = Image.fromarray((255 * p.clip(0, 1)).astype(np.uint8))
    image = ImageOps.colorize(grey, "#0d0832", "#fcffa4", "#bb3754")
    image.resize((2 * image.width, 2 * image.height)).save(file, "PNG")


def print_table(metrics):
    print("{target}, {method}, seed {seed}, {seconds:.0f} s in all".format(**metrics))
    print(*(title.rjust(10) for title in ["steps", *COLUMNS]))
    for k, row in {"oracle": metrics["oracle"], **metrics["steps"]}.items():
        cells = ["-" if row.get(key) is None else f"{row[key]:.4g}" for key in COLUMNS]
        print(*(cell.rjust(10) for cell in [k, *cells]))


DEVICES = [d for d in ("cpu", "cuda", "mps") if torch.get_device_module(d).is_available()]
PARSER = argparse.ArgumentParser("train_2d.py", description=__doc__)
PARSER.formatter_class = argparse.RawDescriptionHelpFormatter
option = PARSER.add_argument
option("--method", choices=RECIPES, default="lsd", help="default lsd; flow is the teacher alone")
option("--target", choices=TARGETS, default="checkerboard", help="default checkerboard")
option("--no-divergence", action="store_true", help="no head: the sampling-only baseline")
option("--no-teacher", action="store_true", help="from data alone: v = x_1 - x_0, own div v")
option("--paper", action="store_true", help="the paper's objective, see above")
option("--seed", type=int, default=0, help="default 0")
option("--steps", type=int, default=STEPS, help="default 9000; a third more for the teacher")
option("--out", type=Path, help="default runs/2d/<target>-<method>-<seed>")
option("--device", choices=DEVICES, default="cpu", help="default cpu")


def main(argv=None):
    args = PARSER.parse_args(argv)
    if not 0 <= args.seed < 2**64 or args.steps < 1:
        PARSER.error("--seed goes from 0 to 2^64 - 1, --steps from 1.")
    if args.method == "shortcut-distill" and args.no_teacher:
        PARSER.error("shortcut-distill has a teacher: drop --no-teacher or use --method shortcut.")
    config = {key: value for key, value in vars(args).items() if key not in ("out", "device")}
    config |= dict(width=WIDTH, depth=DEPTH, batch=BATCH)
    out = args.out or Path("runs/2d") / f"{args.target}-{args.method}-{args.seed}"
    checkpoint = out / "checkpoint.pt"
    results = out / "metrics.json"

    torch.manual_seed(args.seed)
    recipe = RECIPES[args.method]
    head = not args.no_divergence and args.method != "flow"
    plain = args.paper or not recipe["log_times"]
    flow = f2d2.JointFlowMap(MLP(2, WIDTH, DEPTH, plain), WIDTH, head, plain).to(args.device)
    teacher = f2d2.JointFlowMap(MLP(2, WIDTH, DEPTH, plain), WIDTH, False, plain).to(args.device)
    velocity = teacher.velocity if recipe["teacher"] and not args.no_teacher else None
    target = TARGETS[args.target]()
    began = time.time()

    if checkpoint.exists() or results.exists():
        began -= read_checkpoint(checkpoint, config, flow=flow, teacher=teacher)
        with suppress(Exception):  # half-written: measured again
            return print_table(json.loads(results.read_text()))
    save_whole(out / "trial", lambda file: file.write(bytes(2**20)))
    (out / "trial").unlink()

    if not checkpoint.exists():
        generator = torch.Generator(args.device).manual_seed(args.seed)
        if velocity:
            train("flow", teacher, args, target, generator)
            flow.backbone.load_state_dict(teacher.backbone.state_dict())
        train(args.method, flow, args, target, generator, velocity)
        state = dict(config=config, flow=flow.state_dict(), teacher=teacher.state_dict())
        state["seconds"] = time.time() - began
        save_whole(checkpoint, lambda file: torch.save(state, file))

    mirror = args.paper and args.method != "lsd"
    few_steps = flow if args.method != "flow" else lambda x, t, s: (flow.velocity(x, t),)
    measured, pictures = evaluate(target, few_steps, velocity or flow.velocity, mirror, args.device)
    metrics = {**config, "divergence_head": head, **measured}
    metrics["seconds"] = time.time() - began
    save_whole(out / "figure.png", lambda file: draw_figure(pictures, file))
    save_whole(results, lambda file: file.write(json.dumps(metrics, indent=1).encode()))
    print_table(metrics)


if __name__ == "__main__":
    main()
