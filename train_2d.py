"""F2D2 in two dimensions: train, print the table, draw the figure. Minutes on a laptop.

python train_2d.py                                 LSD-F2D2 on the checkerboard, teacher first
python train_2d.py --method meanflow --no-teacher  any method, from data alone

The same command prints the table of a finished run again. --paper is the paper's objective in this
trainer: times forward (but for lsd) and uniform, unweighted residuals, one Rademacher probe, the
mirrored likelihood. Against its published runs, Muon, the sines of x and no averaged weights stay,
D weighs 50 times more, and lsd's teacher off the diagonal is the teacher, not the student itself.
"""

import argparse
import contextlib
import io
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

import f2d2

WIDTH, DEPTH, BATCH = 192, 4, 768
TEACHER_STEPS, JOINT_STEPS = 3000, 9000
N_TEST, N_SAMPLES, N_GRID = 10_000, 200_000, 100
STEP_COUNTS = (8, 4, 2, 1)
ORACLE_STEPS = 64  # midpoint steps: doubling them moves log p by 0.004 nats on average


class MLP(nn.Module):
    """Backbone for vectors: x [B, data_dim], t and s [B] -> u [B, data_dim], features [B, width].

    Sines and cosines of x and 2x, because densities have edges (Tancik et al., "Fourier Features").
    """

    def __init__(self, data_dim=2, width=256, depth=4, paper=False):
        super().__init__()
        self.feature_dim = width
        self.paper = paper
        sizes = [5 * data_dim + (8 if paper else 10)] + [width] * depth
        layers = [(nn.Linear(a, b), nn.SiLU()) for a, b in zip(sizes, sizes[1:])]
        self.body = nn.Sequential(*sum(layers, ()))
        self.out = nn.Linear(width, data_dim)

    def forward(self, x, t, s):
        waves = x.sin(), x.cos(), (2 * x).sin(), (2 * x).cos()
        features = self.body(torch.cat([x, *waves, f2d2.time_features(t, s, self.paper)], 1))
        return self.out(features), features


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al.): orthogonal momentum, Adam's loss in a third of the steps.

    torch.optim.Muon multiplies in bfloat16, 20 times slower on many CPUs.
    """

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for p in (p for p in group["params"] if p.grad is not None):
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.05)
            x = nn.functional.normalize(p.grad.lerp(momentum, 0.95), dim=(0, 1))
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
    """Eight N(c, 0.3^2 I), c on a circle of radius 3; at time t N(t c, var I)."""

    def centres(self, x):
        angle = torch.arange(8, dtype=x.dtype, device=x.device) * (math.pi / 4)
        return 3 * torch.stack([angle.cos(), angle.sin()], 1)  # [8, 2]

    def sample(self, n, generator, device):
        noise = torch.randn(n, 2, generator=generator, device=device)
        which = torch.randint(0, 8, (n,), generator=generator, device=device)
        return self.centres(noise)[which] + 0.3 * noise

    def parts(self, x, t):
        """x - t c [B, 8, 2], log of each component's share of p_t(x) [B, 8], var [B, 1]."""
        var = ((1 - t) ** 2 + 0.09 * t**2)[:, None]
        offset = x[:, None] - t[:, None, None] * self.centres(x)
        return offset, -0.5 * offset.square().sum(2) / var - (16 * math.pi * var).log(), var

    def log_prob(self, x, t=1.0):
        return self.parts(x, x.new_full((len(x),), t))[1].logsumexp(1)

    def velocity(self, x, t):
        """v(x,t) = E[x_1 - x_0 | x_t = x] = sum_k P(k | x) [c_k + (sigma'/sigma) (x - t c_k)]."""
        offset, log_share, var = self.parts(x, t)
        slope = (0.09 * t - (1 - t))[:, None] / var
        v = self.centres(x) + slope[..., None] * offset
        return (log_share.softmax(1)[..., None] * v).sum(1)


TARGETS = {"checkerboard": Checkerboard, "gaussians": Gaussians}

# Without Muon's weight decay, a network that is its own target blew up; with log times, d/dt of
# ln(1-t) blew up MeanFlow's jumps from t = 1.
RECIPES = {
    "flow": dict(condition=None, teacher=False, weight_decay=0.0, log_times=True),
    "shortcut": dict(condition="semigroup", teacher=False, weight_decay=0.1, log_times=True),
    "shortcut-distill": dict(condition="semigroup", teacher=True, weight_decay=0.1, log_times=True),
    "meanflow": dict(condition="eulerian", teacher=True, weight_decay=0.0, log_times=False),
    "lsd": dict(condition="lagrangian", teacher=True, weight_decay=0.0, log_times=True),
}
OURS = dict(diagonal=0.25, probe="exact", robust=True)
PAPER = dict(diagonal=0.5, probe="rademacher", paper=True)


def refuse(sentence):
    print(f"train_2d.py: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def save_whole(path, write):
    """What write(file) writes becomes `path`, whole or not at all."""
    content = io.BytesIO()
    write(content)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content.getbuffer())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        refuse(f"cannot write {path}: {error.strerror}.")


def read_checkpoint(path, config, networks):
    """Loads a finished run into `networks` and returns its seconds; refuses any other file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["config"] != config:
            refuse(f"{path} is of another experiment, {state['config']}, you ask for {config}.")
        for name, network in networks.items():
            network.load_state_dict(state[name])
            for key, weight in state[name].items():
                if weight.dtype != torch.float32 or not weight.isfinite().all():
                    raise ValueError(f"{key} is not float32 and finite")
        return float(state["seconds"])
    except Exception as error:  # whatever may be in that file
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        refuse(f"{path} is no checkpoint of this script ({reason}): choose another --out.")


def train(name, net, args, target, generator, teacher=None):
    """All steps of RECIPES[name]."""
    recipe = RECIPES[name]
    steps = TEACHER_STEPS if name == "flow" else JOINT_STEPS
    steps = max(1, round(steps * args.steps / JOINT_STEPS))
    matrices = {p for p in net.parameters() if p.dim() == 2 and min(p.shape) >= WIDTH}
    muon = Muon(matrices, dict(lr=0.0, weight_decay=recipe["weight_decay"]))
    adam = torch.optim.Adam(p for p in net.parameters() if p not in matrices)

    for step in range(1, steps + 1):
        # Learning rates: 100 steps up, then half a cosine down to zero.
        rate = min(1, step / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        muon.param_groups[0]["lr"] = 0.02 * rate
        adam.param_groups[0]["lr"] = 3e-3 * rate

        # Data. A teacher teaches off them too, and the mass there counts: noise of a standard
        # deviation log-uniform between 0.05 and 0.4.
        x1 = target.sample(BATCH, generator, args.device)
        std = 0.05 * 8 ** torch.rand(BATCH, 1, generator=generator, device=x1.device)
        noise = std * torch.randn(x1.shape, generator=generator, device=x1.device)
        if teacher and not args.paper:
            x1 = x1 + noise

        # L_F2D2 = L_VM + L_u + L_div + L_D, and a step down.
        options = dict(PAPER if args.paper else OURS, generator=generator)
        if not (args.paper or recipe["log_times"]):
            options["t"], options["s"] = f2d2.sample_times(x1, 0.0, False, generator)
        losses = f2d2.f2d2_loss(net, x1, recipe["condition"], teacher, **options)
        loss = sum(losses.values())
        if not loss.isfinite():
            refuse(f"{name}: the loss is {loss.item()} at step {step}, nothing is saved.")
        net.zero_grad()
        loss.backward()
        muon.step()
        adam.step()
        if step % max(1, steps // 50) == 0:
            terms = " ".join(f"{key} {value:.4f}" for key, value in losses.items())
            print(f"{name} {step}/{steps}: {terms}", flush=True)


def grid(n, limit, device="cpu"):
    """Centres of the cells of an n x n grid on [-limit, limit]^2: [n*n, 2]."""
    middle = (torch.arange(n, device=device) + 0.5) * (2 * limit / n) - limit
    return torch.cartesian_prod(middle, middle)


def histogram(x, n, limit):
    """How many x [N, 2] fall into each cell of such a grid: [n, n] float64."""
    return np.histogram2d(*x.T.cpu().numpy(), n, [[-limit, limit]] * 2)[0]


def sample_kl(target, x):
    """KL(true || samples), nats, over 40 x 40 cells of [-4, 4]^2, half a count added to each."""
    p = target.log_prob(grid(400, 4)).exp().double().reshape(40, 10, 40, 10).mean((1, 3)) * 0.2**2
    q = (torch.from_numpy(histogram(x, 40, 4)) + 0.5) / (len(x) + 0.5 * 1600)
    return torch.xlogy(p, p / q).sum()


@torch.no_grad()
def evaluate(target, flow, velocity, mirror=False, device="cpu"):
    """The table, and pictures {name: (samples [N, 2], log p on the grid)}.

    flow(x, t, s) -> (u, D), or (u,): then Euler's log p is in the pictures and none in the table.
    velocity(x, t) is the oracle's. What is NaN or infinite becomes None.
    """
    generator = torch.Generator(device).manual_seed(12345)
    x = target.sample(N_TEST, generator, device)
    x0 = torch.randn(N_SAMPLES, 2, generator=generator, device=device)
    points = grid(N_GRID, 5, device)
    truth = target.log_prob(x)
    head = len(flow(x, truth * 0, truth * 0)) == 2
    pictures = {"truth": (target.sample(N_SAMPLES, generator, device), target.log_prob(points))}

    def euler(x, k):
        return f2d2.ode_log_likelihood(lambda x, t: flow(x, t, t)[0], x, k, euler=True)

    def log_p(x, k):
        if k == "oracle":
            return f2d2.ode_log_likelihood(velocity, x, ORACLE_STEPS)
        return f2d2.log_likelihood(flow, x, k, mirror) if head else euler(x, k)

    def draw(x0, k):
        if k == "oracle":
            return f2d2.ode_sample(velocity, x0, ORACLE_STEPS // 2)
        return f2d2.sample(flow, x0, k)[0]

    def error(log_p, reference):
        return (log_p - reference).abs().mean().item()

    rows = {}
    for k in ("oracle", *STEP_COUNTS):
        drawn = torch.cat([draw(part, k) for part in x0.split(20_000)])
        density = log_p(points, k)
        pictures[str(k)] = drawn, density
        began = time.perf_counter()
        found = log_p(x, k)
        row = {
            "nll": -found.mean().item(),  # .item() waits for a GPU
            "seconds": (time.perf_counter() - began) * 10_000 / len(x),
            "mae_truth": error(found, truth),
            "mass": density.exp().sum().item() * (10 / N_GRID) ** 2,
        }
        if k == "oracle":
            oracle = found
        elif head:
            x1, log_p_x1 = f2d2.sample(flow, x0[:1000], k)
            row["mae_oracle"] = error(found, oracle)
            row["mae_sample"] = error(log_p_x1, log_p(x1, "oracle"))
        else:
            row = {}
        row["sample_kl"] = sample_kl(target, drawn).item()
        if k != "oracle":
            row["euler_nll"] = -euler(x, k).mean().item()
        rows[str(k)] = {
            key: row[key] if math.isfinite(row.get(key, math.nan)) else None for key in COLUMNS
        }
    return {"oracle": rows.pop("oracle"), "steps": rows}, pictures


def draw_figure(pictures, metrics, file):
    """Columns: truth, oracle, few steps. Rows: density of the samples, exp(log p), y upwards."""
    colours = np.array([[13, 8, 50], [84, 20, 110], [187, 55, 84], [249, 142, 9], [252, 255, 164]])
    levels = np.linspace(0, 1.3 * pictures["truth"][1].exp().max().item(), 5)
    image = Image.new("RGB", (204 * len(pictures), 456), "white")
    write = ImageDraw.Draw(image).text
    for i, (name, (samples, log_p)) in enumerate(pictures.items()):
        mass = metrics["steps"].get(name, {}).get("mass")
        write((204 * i + 100, 12), name, "black", font_size=17, anchor="mm")
        write(
            (204 * i + 100, 444),
            f"mass {mass:.3f}" if mass else "",
            "black",
            font_size=17,
            anchor="mm",
        )
        share = histogram(samples, 100, 5) / len(samples) * 10**2
        density = log_p.exp().cpu().numpy().reshape(N_GRID, N_GRID)
        for y, p in ((26, share), (230, density)):
            rgb = np.stack([np.interp(p.T[::-1], levels, channel) for channel in colours.T], 2)
            panel = Image.fromarray(rgb.astype(np.uint8)).resize((200, 200), Image.BOX)
            image.paste(panel, (204 * i, y))
    image.save(file, "PNG")


COLUMNS = "nll mae_oracle mae_truth mass sample_kl euler_nll mae_sample seconds".split()


def table(metrics):
    lines = ["{target}, {method}, seed {seed}, {seconds:.0f} s in all".format(**metrics)]
    lines.append(" ".join(key.rjust(10) for key in ["steps", *COLUMNS]))
    for k, row in {"oracle": metrics["oracle"], **metrics["steps"]}.items():
        cells = ["-" if row[key] is None else f"{row[key]:.4g}" for key in COLUMNS]
        lines.append(" ".join(cell.rjust(10) for cell in [k, *cells]))
    return "\n".join(lines)


def whole_number(lowest):
    def parse(text):
        if text.isdecimal() and lowest <= int(text) < 2**64:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text} is no whole number from {lowest} to 2^64 - 1")

    return parse


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    devices = (
        ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    )
    add = parser.add_argument
    add("--method", choices=RECIPES, default="lsd", help="flow is plain flow matching; default lsd")
    add("--target", choices=TARGETS, default="checkerboard", help="default checkerboard")
    add("--no-divergence", action="store_true", help="sampling-only baseline")
    add("--no-teacher", action="store_true", help="from data alone: v = x_1 - x_0")
    add("--paper", action="store_true", help="the paper's objective, see above")
    add("--seed", type=whole_number(0), default=0, help="default 0")
    add("--steps", type=whole_number(1), default=JOINT_STEPS, help="")
    add("--out", type=Path, help="default runs/2d/<target>-<method>-<seed>")
    add("--device", choices=devices, default="cpu", help="cpu (default), cuda or mps")
    args = parser.parse_args(argv)
    if args.method == "shortcut-distill" and args.no_teacher:
        parser.error(
            "shortcut-distill distils a teacher: drop --no-teacher, or use --method shortcut."
        )
    args.out = args.out or Path("runs/2d") / f"{args.target}-{args.method}-{args.seed}"
    args.no_divergence = args.no_divergence or args.method == "flow"
    args.no_teacher = args.no_teacher or not RECIPES[args.method]["teacher"]
    return args


def main(argv=None):
    args = parse(argv)
    config = {key: value for key, value in vars(args).items() if key not in ("out", "device")}
    config |= dict(width=WIDTH, depth=DEPTH, batch=BATCH)
    checkpoint = args.out / "checkpoint.pt"
    results = args.out / "metrics.json"
    target = TARGETS[args.target]()
    generator = torch.Generator(args.device).manual_seed(args.seed)
    torch.manual_seed(args.seed)

    def network(head):
        plain = args.paper or not RECIPES[args.method]["log_times"]
        backbone = MLP(2, WIDTH, DEPTH, plain)
        return f2d2.JointFlowMap(backbone, WIDTH, head, plain).to(args.device)

    flow = network(not args.no_divergence)
    teacher = flow if args.no_teacher else network(False)
    networks = {"flow": flow, "teacher": teacher}

    if checkpoint.exists():
        seconds = read_checkpoint(checkpoint, config, networks)
        with contextlib.suppress(Exception):  # half-written: measured again
            print(table(json.loads(results.read_text())))
            return
    elif results.exists():
        refuse(f"{args.out} holds results without a checkpoint: choose another --out.")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.out) as file:
            file.write(bytes(2**20))
    except OSError as error:
        refuse(f"cannot write to {args.out}: {error.strerror}.")

    if not checkpoint.exists():
        began = time.time()
        velocity = None
        if teacher is not flow:
            train("flow", teacher, args, target, generator)
            flow.backbone.load_state_dict(teacher.backbone.state_dict())
            velocity = teacher.velocity
        train(args.method, flow, args, target, generator, velocity)
        seconds = time.time() - began
        state = {name: network.state_dict() for name, network in networks.items()}
        state |= {"config": config, "seconds": seconds}
        save_whole(checkpoint, lambda file: torch.save(state, file))

    began = time.time()
    few_steps = flow

    def euler_steps(x, t, s):
        return (flow.velocity(x, t),)

    if args.method == "flow":
        few_steps = euler_steps
    mirror = args.paper and args.method != "lsd"
    measured, pictures = evaluate(target, few_steps, teacher.velocity, mirror, args.device)
    metrics = {
        "target": args.target,
        "method": args.method,
        "divergence_head": not args.no_divergence,
        "seed": args.seed,
        "seconds": seconds + time.time() - began,
        **measured,
    }
    save_whole(args.out / "figure.png", lambda file: draw_figure(pictures, metrics, file))
    save_whole(results, lambda file: file.write(json.dumps(metrics, indent=1).encode()))
    print(table(metrics))


if __name__ == "__main__":
    main()
