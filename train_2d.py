"""F2D2 in two dimensions: train, print the table, draw the figure. Minutes on a laptop.
python train_2d.py                                 LSD-F2D2 on the checkerboard, flow-matching teacher first
python train_2d.py --method meanflow --no-teacher  any method, from data alone; --paper for the paper's own recipe"""
import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from f2d2 import MLP, JointFlowMap, f2d2_loss, log_likelihood, ode_log_likelihood, ode_sample, sample

CONDITION = {"flow": None, "shortcut": "semigroup", "shortcut-distill": "semigroup", "meanflow": "eulerian", "lsd": "lagrangian"}
TEACHER_STEPS, WARM_STEPS, JOINT_STEPS = 3000, 500, 9000
WIDTH, DEPTH, BATCH, N_TEST, N_SAMPLES, N_GRID = 192, 4, 768, 10_000, 200_000, 100
STEP_COUNTS, ORACLE_STEPS = (8, 4, 2, 1), 64  # midpoint steps: doubling them moves log p by 0.004 nats on average


class Checkerboard:
    """Uniform on the eight black squares, of side 2, of a 4 x 4 board on [-4, 4]^2: log p = -ln 32 on them."""

    def sample(self, n, generator, device):
        cell = torch.randint(0, 8, (n,), generator=generator, device=device)
        column, row = cell % 4, cell // 4 * 2 + cell % 2
        return torch.rand(n, 2, generator=generator, device=device) * 2 - 4 + 2 * torch.stack([column, row], 1)

    def log_prob(self, x):
        on = (((x + 4) // 2).sum(1) % 2 == 0) & (x.abs() < 4).all(1)
        return torch.where(on, -math.log(32), -math.inf)


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


TARGETS = {"checkerboard": Checkerboard, "gaussians": Gaussians}


def grid(n, limit, device):
    """Cell centres of an n x n grid on [-limit, limit]^2: [n*n, 2]."""
    mid = (torch.arange(n, device=device) + 0.5) * (2 * limit / n) - limit
    return torch.cartesian_prod(mid, mid)


def histogram(x, bins, limit):
    """Shares of x [N, 2] in the cells of grid(bins, limit): [bins*bins]. What falls outside is missing."""
    index = ((x[(x.abs() < limit).all(1)] + limit) * (bins / (2 * limit))).long().clamp(max=bins - 1)
    return torch.bincount(index[:, 0] * bins + index[:, 1], minlength=bins**2) / len(x)


def sample_kl(target, x):
    """KL(true || samples) over the 40 x 40 cells of [-4, 4]^2, half a count added to each, in nats."""
    p = target.log_prob(grid(400, 4, x.device)).exp().double().reshape(40, 10, 40, 10).mean((1, 3)).flatten() * 0.2**2
    q = (histogram(x, 40, 4).double() * len(x) + 0.5) / (len(x) + 0.5 * 1600)
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum().item()


@torch.no_grad()
def evaluate(target, flow, velocity, few_step_map=True, mirror=False, device="cpu"):
    """The table, and pictures {name: (samples, log p on the grid)}, by Euler steps where there is no few-step map or head."""
    chunked = lambda f, x: torch.cat([f(part) for part in x.split(20_000)])
    mae = lambda a, b: (a - b).abs().mean().item()
    generator = torch.Generator(device).manual_seed(12345)
    x, x0 = target.sample(N_TEST, generator, device), torch.randn(N_SAMPLES, 2, generator=generator, device=device)
    points, truth, rows = grid(N_GRID, 5, device), target.log_prob(x), {}
    slow = lambda y: chunked(lambda y: ode_log_likelihood(velocity, y, ORACLE_STEPS), y)
    oracle, drawn = slow(x), chunked(lambda y: ode_sample(velocity, y, ORACLE_STEPS // 2), x0)
    pictures = {"truth": (target.sample(N_SAMPLES, generator, device), target.log_prob(points)), "oracle": (drawn, slow(points))}
    for k in STEP_COUNTS:
        draw = (lambda y: sample(flow, y, k)[0]) if few_step_map else (lambda y: ode_sample(velocity, y, k, euler=True))
        euler = lambda y: ode_log_likelihood(flow.velocity, y, k, euler=True)
        few = (lambda y: log_likelihood(flow, y, k, mirror)) if flow.head else euler
        drawn, density, log_p = chunked(draw, x0), chunked(few, points), few(x)
        row = dict(nll=-log_p.mean().item(), mae_oracle=mae(log_p, oracle), mae_truth=mae(log_p, truth),
                   mass=density.exp().sum().item() * (10 / N_GRID) ** 2)
        rows[str(k)] = (row if flow.head else dict.fromkeys(row)) | {"sample_kl": sample_kl(target, drawn), "euler_nll": -euler(x).mean().item()}
        pictures[str(k)] = (drawn, density)
    about = dict(nll=-oracle.mean().item(), mae_truth=mae(oracle, truth), sample_kl=sample_kl(target, pictures["oracle"][0]))
    return {"oracle": about, "steps": rows}, pictures


def draw_figure(pictures, metrics, path, panel=200, margin=26, left=110):
    """Columns: truth, oracle, few steps. Rows: density of samples, exp(log p). One colour scale, 0 dark to 1.3 max p bright."""
    anchors = np.array([[13, 8, 50], [84, 20, 110], [187, 55, 84], [249, 142, 9], [252, 255, 164]])
    levels = np.linspace(0, 1.3 * pictures["truth"][1].exp().max().item(), 5)
    image = Image.new("RGB", (left + len(pictures) * (panel + 4), 2 * (panel + 4) + 2 * margin), "white")
    write = lambda x, y, text: ImageDraw.Draw(image).text((x, y), text, fill="black", font_size=17, anchor="mm")
    write(left / 2, margin + panel / 2, "samples"), write(left / 2, margin + panel * 1.5, "exp(log p)")
    for x, (name, (samples, log_p)) in zip(range(left, image.width, panel + 4), pictures.items()):
        for y, density in ((margin, histogram(samples, 100, 5) * 100), (margin + panel + 4, log_p.exp())):
            density = density.cpu().reshape(math.isqrt(len(density)), -1).T.flip(0).numpy()  # y upwards
            rgb = np.stack([np.interp(density, levels, channel) for channel in anchors.T], 2).round().astype(np.uint8)
            image.paste(Image.fromarray(rgb).resize((panel, panel), Image.BOX), (x, y))
        write(x + panel / 2, margin / 2, f"{name} step{'s' * (name != '1')}" if name.isdigit() else name)
        if metrics["steps"].get(name, {}).get("mass") is not None:
            write(x + panel / 2, image.height - margin / 2, f"mass {metrics['steps'][name]['mass']:.3f}")
    image.save(path)


def print_table(metrics):
    print("\n{target}, {method}, seed {seed}, {seconds:.0f} s in all; log p in nats, errors per sample\n"
          "  steps      NLL  |-oracle|  |-truth|    mass  sample KL  Euler NLL".format(**metrics))
    for k, row in ({"oracle": metrics["oracle"]} | metrics["steps"]).items():
        cells, widths = map(row.get, ("nll", "mae_oracle", "mae_truth", "mass", "sample_kl", "euler_nll")), (9, 11, 10, 8, 11, 11)
        print(k.rjust(7) + "".join("-".rjust(w) if c is None else f"{c:{w}.{'3f' if abs(c) < 1000 else '0e'}}" for c, w in zip(cells, widths)))


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=CONDITION, default="lsd", help="flow is plain flow matching; default lsd")
    parser.add_argument("--target", choices=TARGETS, default="checkerboard", help="default checkerboard")
    parser.add_argument("--no-divergence", action="store_true", help="the sampling-only baseline: no divergence head")
    parser.add_argument("--no-teacher", action="store_true", help="from data alone: v = x_1 - x_0 and the network's own div v")
    parser.add_argument("--paper", action="store_true", help="the paper's recipe: everything marked ours in f2d2.py is off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=JOINT_STEPS, help=f"joint steps, {JOINT_STEPS}; other stages scale along")
    parser.add_argument("--out", type=Path, help="default runs/2d/<target>-<method>-<seed>")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default cpu")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}.")
    if args.method == "shortcut-distill" and args.no_teacher:
        parser.error("shortcut-distill distils a teacher: drop --no-teacher, or use --method shortcut.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device on this machine: use --device cpu.")
    args.out = args.out or Path("runs/2d") / f"{args.target}-{args.method}-{args.seed}"
    args.no_divergence, args.no_teacher = args.no_divergence or args.method == "flow", args.no_teacher or args.method in ("flow", "shortcut")
    return parser, args, {k: v for k, v in vars(args).items() if k not in ("out", "device")} | dict(width=WIDTH, depth=DEPTH, batch=BATCH)


def load_checkpoint(parser, args, config):
    """The run in --out if it is this one, a fresh state if there is none; anything else is refused and left alone."""
    path = args.out / "checkpoint.pt"
    if not path.exists() and not (args.out / "metrics.json").exists():
        return {"stage": 0, "step": 0, "seconds": 0.0}
    try:
        found = (state := torch.load(path, map_location=args.device, weights_only=True))["config"]
    except Exception as error:
        parser.error(f"{path} is no checkpoint of this script ({type(error).__name__}): move away what is there or choose another --out.")
    if found != config:
        parser.error(f"{args.out} holds another experiment, {found}, and you asked for {config}: choose another --out.")
    return state


def stages(args):
    """[(name, steps, condition, loss options)]: the teacher, the warm start of the velocity part, all four losses."""
    condition, weight, lsd = CONDITION[args.method], "adaptive" if args.method == "meanflow" else "none", args.method == "lsd"
    kw = dict(probe="exact", diagonal=0.25, divergence_weight="huber", log_time=0.0 if args.method == "meanflow" else 0.5,
              velocity_weight=weight if args.no_teacher or lsd else "huber")
    if args.paper:
        kw = dict(log_time=0.0, velocity_weight=weight, divergence_weight="none", own_tangent=False, through_dD=False,
                  direction="both" if lsd else "forward")
    plan = [] if args.no_teacher and condition else [("teacher", TEACHER_STEPS, None, {"log_time": 0.0 if args.paper else 0.5})]
    plan += [("warm start", WARM_STEPS, condition, kw | {"joint": False}), ("joint", JOINT_STEPS, condition, kw)] if condition else []
    return [(name, max(1, round(n * args.steps / JOINT_STEPS)), condition, kw) for name, n, condition, kw in plan]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al.): Adam's loss in a third of the steps. torch.optim.Muon multiplies in bfloat16, 20 times slower on many CPUs."""
    @torch.no_grad()
    def step(self):
        for group, p in ((g, p) for g in self.param_groups for p in g["params"] if p.grad is not None):
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.05)
            x = torch.nn.functional.normalize(p.grad.lerp(momentum, 0.95), dim=(0, 1))
            for _ in range(5):  # Newton-Schulz: every singular value of x to about one
                gram = x @ x.T
                x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * x)


def train(args, plan, teacher, flow, target, generator, state, save):
    """Runs what is left of the plan; saves 50 times a stage, between two steps, so that a stopped run goes on bit by bit."""
    for stage, (name, steps, condition, kw) in list(enumerate(plan))[state["stage"] :]:
        net, done, begin = teacher if name == "teacher" else flow, state.pop("step", 0), time.time()
        velocity = None if args.no_teacher or net is teacher else teacher.velocity
        blur = 0.05 if velocity and not args.paper else 0.0  # ours: a teacher teaches off the data too, and the mass there counts
        matrices, rest = ([p for p in net.parameters() if (p.dim() == 2 and min(p.shape) >= WIDTH) == which] for which in (True, False))
        both = Muon(matrices, {"weight_decay": 0.1 * (condition == "semigroup")}), torch.optim.Adam(rest)  # without decay it blew up
        if done:
            [o.load_state_dict(saved) for o, saved in zip(both, state["optimizers"])]
        elif name == "warm start" and velocity:
            flow.backbone.load_state_dict(teacher.backbone.state_dict())
        for step in range(done + 1, steps + 1):
            for optimizer, peak in zip(both, (0.02, 3e-3)):  # 100 steps up, then half a cosine down to zero
                optimizer.param_groups[0]["lr"] = peak * min(1, step / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
            record, x1 = {}, target.sample(BATCH, generator, args.device)
            std = blur * 8 ** torch.rand(BATCH, 1, generator=generator, device=x1.device)  # log-uniform, 0.05 to 0.4
            x1 = x1 + std * torch.randn(x1.shape, generator=generator, device=x1.device)
            losses = f2d2_loss(net, x1, condition, velocity, generator=generator, record=record, **kw)
            net.zero_grad(), sum(losses.values()).backward()
            both[0].step(), both[1].step()
            if step % max(1, steps // 50) == 0:
                terms = " ".join(f"{k} {record[k].mean():.4f}" for k in losses if k in record)
                norm, left = torch.nn.utils.clip_grad_norm_(net.parameters(), math.inf), (time.time() - begin) * (steps - step) / (step - done)
                print(f"{name} {step}/{steps}: {terms} | grad {norm:.3f} | {left:.0f} s left", flush=True)
                save(stage=stage, step=step, optimizers=[o.state_dict() for o in both])
        save(stage=stage + 1, step=0)


def main(argv=None):
    parser, args, config = parse(argv)
    state, began = load_checkpoint(parser, args, config), time.time()
    seconds = lambda: state["seconds"] + time.time() - began
    path, metrics_path, ours = args.out / "checkpoint.pt", args.out / "metrics.json", not args.paper
    torch.manual_seed(args.seed)
    target, generator = TARGETS[args.target](), torch.Generator(args.device).manual_seed(args.seed)
    logs = ours and args.method != "meanflow"  # its d/dt of ln(1-t), up to 1/DELTA, blew up the jumps from t = 1
    build = lambda head: JointFlowMap(MLP(2, WIDTH, DEPTH, logs), WIDTH, head, ours, logs).to(args.device)
    flow = build(not args.no_divergence)
    teacher, plan = flow if args.method == "flow" else build(False), stages(args)
    print(f"{args.out}: {sum(p.numel() for p in flow.parameters()):,} parameters; {BATCH:,} samples a step; steps: "
          f"{', '.join(f'{n} {name}' for name, n, *_ in plan)}; NFE per log p: {STEP_COUNTS}, oracle {2 * ORACLE_STEPS}")
    if "flow" in state:
        teacher.load_state_dict(state["teacher"]), flow.load_state_dict(state["flow"]), generator.set_state(state["generator"].cpu())

    def save(**progress):
        args.out.mkdir(parents=True, exist_ok=True)
        torch.save(dict(config=config, seconds=seconds(), teacher=teacher.state_dict(), flow=flow.state_dict(),
                        generator=generator.get_state(), **progress), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    train(args, plan, teacher, flow, target, generator, state, save)
    if not metrics_path.exists():
        measured, pictures = evaluate(target, flow, (flow if args.no_teacher else teacher).velocity, args.method != "flow",
                                      args.paper and args.method != "lsd", args.device)
        metrics = dict(target=args.target, method=args.method, divergence_head=flow.head is not None, seed=args.seed, seconds=seconds(), **measured)
        draw_figure(pictures, metrics, args.out / "figure.png")
        metrics_path.write_text(json.dumps(metrics, indent=1))
    print_table(json.loads(metrics_path.read_text()))


if __name__ == "__main__":
    main()
