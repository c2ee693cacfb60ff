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


# ---------------------------------------------------------------------------------- figure and table
def colours(density, top):
    """Densities [n*n] on grid(n, ...) -> an RGB image, y upwards, the same scale for every panel: 0 dark, `top` bright."""
    n = math.isqrt(len(density))
    level = (density.cpu().numpy().reshape(n, n).T[::-1] / top).clip(0, 1)
    anchors = np.array([[13, 8, 50], [84, 20, 110], [187, 55, 84], [249, 142, 9], [252, 255, 164]])
    rgb = np.stack([np.interp(level, np.linspace(0, 1, 5), anchors[:, c]) for c in range(3)], 2)
    return Image.fromarray(rgb.round().astype(np.uint8))


def draw_figure(pictures, metrics, path, panel=200, margin=26, left=110):
    top = 1.3 * pictures["truth"][1].exp().max().item()
    image = Image.new("RGB", (left + len(pictures) * (panel + 4), 2 * (panel + 4) + 2 * margin), "white")
    draw = ImageDraw.Draw(image)
    for row, text in enumerate(("samples", "exp(log p)")):
        draw.text((8, margin + (row + 0.5) * panel), text, fill="black", font_size=17, anchor="lm")
    for column, (name, (samples, log_p)) in enumerate(pictures.items()):
        x = left + column * (panel + 4)
        title = name if not name.isdigit() else f"{name} step{'s' * (name != '1')}"
        draw.text((x + panel / 2, margin / 2), title, fill="black", font_size=17, anchor="mm")
        density = histogram(samples, 100, 5) / len(samples) * 100
        for row, values in enumerate((density, log_p.exp())):
            image.paste(colours(values, top).resize((panel, panel), Image.BOX), (x, margin + row * (panel + 4)))
        mass = metrics["steps"].get(name, {}).get("mass")
        if mass is not None:
            draw.text((x + panel / 2, 2 * panel + margin * 1.5 + 6), f"mass {mass:.3f}", fill="black", font_size=15, anchor="mm")
    image.save(path)


def print_table(metrics):
    text = lambda value, places=3: "-" if value is None else f"{value:.{places}f}"
    o = metrics["oracle"]
    print(f"\n{metrics['target']}, {metrics['method']}, seed {metrics['seed']}, {metrics['seconds']:.0f} s in all; log p in nats")
    print(f"{'steps':>7}{'NLL':>9}{'|-oracle|':>11}{'|-truth|':>10}{'mass':>8}{'sample KL':>11}{'Euler NLL':>11}")
    print(f"{'oracle':>7}{text(o['nll']):>9}{'':>11}{text(o['mae_truth']):>10}{'':>8}{text(o['sample_kl']):>11}")
    for k, r in metrics["steps"].items():
        print(f"{k:>7}{text(r['nll']):>9}{text(r['mae_oracle']):>11}{text(r['mae_truth']):>10}{text(r['mass']):>8}"
              f"{text(r['sample_kl']):>11}{text(r['euler_nll'], 2):>11}")


# ---------------------------------------------------------------------------------- training
def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=CONDITION, default="lsd", help="flow is the teacher alone; default lsd")
    parser.add_argument("--target", choices=TARGETS, default="checkerboard")
    parser.add_argument("--no-divergence", action="store_true", help="the sampling-only baseline: no divergence head")
    parser.add_argument("--no-teacher", action="store_true", help="from data alone: v = x_1 - x_0 and the network's own div v")
    parser.add_argument("--paper", action="store_true", help="the paper's recipe: everything marked ours in f2d2.py is off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=JOINT_STEPS, help="optimiser steps of the joint stage; the others scale with it")
    parser.add_argument("--out", type=Path, help="default runs/2d/<target>-<method>-<seed>")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}.")
    if args.method == "shortcut-distill" and args.no_teacher:
        parser.error("shortcut-distill distils a teacher: drop --no-teacher, or use --method shortcut.")
    try:
        torch.zeros(1, device=args.device)
    except Exception:
        parser.error(f"no device {args.device} on this machine: use --device cpu.")
    args.out = args.out or Path("runs/2d") / f"{args.target}-{args.method}-{args.seed}"
    args.no_divergence |= args.method == "flow"
    args.no_teacher |= args.method in ("flow", "shortcut")  # they have none
    config = {k: getattr(args, k) for k in ("target", "method", "no_divergence", "no_teacher", "paper", "seed", "steps")}
    return parser, args, config


def load_checkpoint(parser, args, config):
    """The run in --out if it is this one, None if there is none; anything else there is refused and left alone."""
    path = args.out / "checkpoint.pt"
    if not path.exists():
        if (args.out / "metrics.json").exists() or args.out.is_file():
            parser.error(f"{args.out} holds something else and no checkpoint of this script: choose another --out.")
        return None
    try:
        state = torch.load(path, map_location=args.device, weights_only=True)
        found = dict(state["config"])
    except Exception as error:
        parser.error(f"{path} is no checkpoint of this script ({type(error).__name__}): move it away or choose another --out.")
    if found != config:
        parser.error(f"{args.out} holds another experiment, {found}, and you asked for {config}: choose another --out.")
    return state


def stages(args, config):
    """[(name, network, steps, loss arguments)]: the teacher, the warm start of the velocity part, all four losses."""
    condition = CONDITION[args.method]
    ours = dict(probe="exact")
    if args.method == "meanflow":
        ours.update(velocity_weight="adaptive", divergence_weight="adaptive")
    if args.paper:
        ours = dict(log_time=0.0, divergence_weight="none", probe="rademacher", own_tangent=False)
        ours["velocity_weight"] = "adaptive" if args.method == "meanflow" else "none"
        ours["direction"] = "both" if args.method == "lsd" else "forward"
    plan = [("teacher", TEACHER_STEPS, None, {})] if not args.no_teacher or condition is None else []
    if condition:
        plan += [("warm start", WARM_STEPS, condition, ours | {"joint": False}), ("joint", JOINT_STEPS, condition, ours)]
    return [(name, max(1, round(steps * args.steps / JOINT_STEPS)), c, kw) for name, steps, c, kw in plan]


def train(args, plan, teacher, flow, target, generator, state, save):
    """Runs what is left of the plan, saving 50 times a stage; each stage ends with the average (EMA) of its weights."""
    for stage, (name, steps, condition, kw) in list(enumerate(plan))[state["stage"]:]:
        net = teacher if name == "teacher" else flow
        if state["step"] == 0 and name == "warm start" and not args.no_teacher:
            flow.backbone.load_state_dict(teacher.backbone.state_dict())
        optimizer = torch.optim.Adam(net.parameters(), lr=LR)
        ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.999))
        if state["step"]:
            optimizer.load_state_dict(state["optimizer"]), ema.load_state_dict(state["ema"])
        velocity = None if args.no_teacher or net is teacher else teacher.velocity
        start, first = time.time(), state["step"]
        for step in range(first, steps):
            for group in optimizer.param_groups:
                group["lr"] = LR * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
            record = {}
            losses = f2d2_loss(net, target.sample(BATCH, generator, args.device), condition, velocity,
                               generator=generator, record=record, **kw)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            ema.update_parameters(net)
            if (step + 1) % max(1, steps // 50) == 0 and step + 1 < steps:
                terms = " ".join(f"{k} {record[k].mean():.4f}" for k in losses if k in record)
                left = (time.time() - start) / (step + 1 - first) * (steps - step - 1)
                print(f"{name} {step + 1}/{steps}: {terms} | grad {norm:.2f} | {time.time() - start:.0f} s, {left:.0f} s left")
                save(stage=stage, step=step + 1, optimizer=optimizer.state_dict(), ema=ema.state_dict())
        net.load_state_dict(ema.module.state_dict())
        state["step"] = 0
        save(stage=stage + 1, step=0, optimizer=None, ema=None)


def main(argv=None):
    parser, args, config = parse(argv)
    state = load_checkpoint(parser, args, config)
    path, begin, spent = args.out / "checkpoint.pt", time.time(), state["seconds"] if state else 0.0
    torch.manual_seed(args.seed)
    target, generator = TARGETS[args.target](), torch.Generator(args.device).manual_seed(args.seed)
    build = lambda head: JointFlowMap(MLP(2, WIDTH, DEPTH, not args.paper), WIDTH, head, not args.paper, not args.paper).to(args.device)
    teacher, flow = build(False), build(not args.no_divergence)
    plan = stages(args, config)
    if state:
        teacher.load_state_dict(state["teacher"]), flow.load_state_dict(state["flow"]), generator.set_state(state["generator"].cpu())
    teacher.requires_grad_(True)
    print(f"{args.out}: {sum(p.numel() for p in flow.parameters()):,} parameters, {BATCH:,} samples per step, "
          f"{' + '.join(f'{steps} {name}' for name, steps, *_ in plan)} steps; NFE per log p: {', '.join(map(str, STEP_COUNTS))} "
          f"(oracle: {2 * ORACLE_STEPS}, half of them with an exact divergence)")

    def save(**progress):
        args.out.mkdir(parents=True, exist_ok=True)
        torch.save(dict(config=config, seconds=spent + time.time() - begin, teacher=teacher.state_dict(), flow=flow.state_dict(),
                        generator=generator.get_state(), **progress), path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    train(args, plan, teacher, flow, target, generator, state or {"stage": 0, "step": 0}, save)
    metrics_path = args.out / "metrics.json"
    if not metrics_path.exists():
        velocity = flow.velocity if args.no_teacher else teacher.velocity
        metrics, pictures = evaluate(target, flow, velocity, args.paper and args.method != "lsd", args.device)
        head = {k: config[k] for k in ("target", "method", "seed")} | {"divergence_head": flow.head is not None}
        metrics = head | {"seconds": spent + time.time() - begin} | metrics
        draw_figure(pictures, metrics, args.out / "figure.png")
        metrics_path.write_text(json.dumps(metrics, indent=1))
    print_table(json.loads(metrics_path.read_text()))


if __name__ == "__main__":
    main()
