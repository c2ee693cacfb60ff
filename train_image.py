"""F2D2 on images: train, resume, evaluate; on one GPU, several, or a CPU.
python train_image.py --dataset cifar10 --method flow                   a teacher
python train_image.py --dataset cifar10 --method shortcut-distill --teacher runs/image/cifar10-flow-0/latest.pt
python train_image.py --dataset cifar10 --method meanflow               from data alone; --teacher CKPT is optional
python train_image.py --eval runs/image/cifar10-meanflow-0/latest.pt    the paper's table of a checkpoint
torchrun --nproc-per-node 8 train_image.py ...                          the same on eight GPUs
"""
import argparse
import hashlib
import json
import math
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import nn

from f2d2 import (JointFlowMap, UNet, bits_per_dim, dequantize, f2d2_loss, log_likelihood, ode_log_likelihood, ode_sample, sample,
                  sample_times, self_guidance)

# Published hyperparameters; `flow` and `shortcut` take those of Shortcut-Distill. `warmup`, the share of the steps that trains the
# velocity part alone, is ours for meanflow and lsd, so are lsd's steps; `weight`: of the velocity residuals.
DISTILL = dict(condition="semigroup", optimizer="RAdam", lr=1e-4, batch_size=512, steps=645_000, warmup=10 / 11, dropout=0.13,
               ema=0.9999, diagonal=0.5, weight="none", clip=math.inf, decay_after=math.inf)
RECIPES = {
    "flow": DISTILL | dict(condition=None, steps=586_000),
    "shortcut": DISTILL, "shortcut-distill": DISTILL,
    "meanflow": DISTILL | dict(condition="eulerian", optimizer="Adam", lr=6e-4, batch_size=1024, steps=800_000, warmup=0.5, dropout=0.2,
                               diagonal=0.25, weight="adaptive"),
    "lsd": DISTILL | dict(condition="lagrangian", batch_size=256, steps=800_000, warmup=0.5, dropout=0.0, clip=1.0, decay_after=35_000),
}
STEP_COUNTS, CHUNK, LARGE = (8, 4, 2, 1), 250, 2**28  # bytes above which a folder is cached in a file
to_bytes = lambda x: ((x + 1) * 128).floor().clamp(0, 255).to(torch.uint8)  # inverts dequantize
few_steps = lambda flow, x0, k, few_step_map: sample(flow, x0, k)[0] if few_step_map else ode_sample(flow.velocity, x0, k, euler=True)
SIZES = {"cifar10": 32, "imagenet64": 64, "celeba64": 64}
INCEPTION = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"


class BadInput(Exception):
    """One sentence for the user, what is wrong and what to type instead: exit code 2."""


# ---------------------------------------------------------------------------------- data: uint8 [N, 3, H, H]
def folder_blocks(paths, size, celeba=False):
    """One image each: centre crop, antialiased resize, *rounded to bytes*, so that bits/dim is that of an 8-bit image."""
    skipped = []
    for path in paths:
        try:
            image = Image.open(path).convert("RGB")
        except Exception:
            if celeba:
                raise BadInput(f"{path} is missing or broken: unpack img_align_celeba again.")
            skipped.append(path)
            continue
        image = torchvision.transforms.functional.center_crop(image, 140) if celeba else image
        yield np.asarray(ImageOps.fit(image, (size, size), Image.BICUBIC)).transpose(2, 0, 1)[None]
    if skipped:
        print(f"skipped {len(skipped)} of {len(paths)} files that are no readable images, the first is {skipped[0]}")


def npz_blocks(files):
    """The official ImageNet-64 batches: one row an image, planes R, G, B. numpy refuses pickles."""
    for file in files:
        try:
            yield np.load(file)["data"].reshape(-1, 3, 64, 64)
        except Exception as error:
            raise BadInput(f"{file} is missing or no ImageNet-64 batch ({type(error).__name__}): download train_data_batch_1.npz to _10.npz "
                           f"and val_data.npz from https://image-net.org (it wants an account) and unpack them into {file.parent}.")


def stack(blocks, size, cache=None):
    """Blocks -> one array: in memory, or written to the file `cache` once, whole or not at all, and memory-mapped."""
    if cache is None:
        return np.concatenate([np.zeros((0, 3, size, size), np.uint8), *blocks])
    if not cache.exists():
        print(f"writing {cache}, once", flush=True)
        with open(cache.with_suffix(".part"), "wb") as file:
            [file.write(np.ascontiguousarray(block, np.uint8)) for block in blocks]
        os.replace(cache.with_suffix(".part"), cache)
    return np.memmap(cache, np.uint8, "c").reshape(-1, 3, size, size)


def find_files(dataset, root):
    """{"train": files, "test": files}. A folder: its subfolders of these names, else a seeded 90/10 split."""
    if dataset == "imagenet64":
        return {"train": [root / f"train_data_batch_{i}.npz" for i in range(1, 11)], "test": [root / "val_data.npz"]}
    if dataset == "celeba64":
        images, listing = root / "celeba/img_align_celeba", root / "celeba/list_eval_partition.txt"
        if not images.is_dir() or not listing.exists():
            raise BadInput(f"{images}/ or {listing} is missing: download both from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html.")
        rows = [line.split() for line in listing.read_text().splitlines() if line]
        return {split: [images / name for name, part in rows if part == code] for split, code in (("train", "0"), ("test", "2"))}
    find = lambda folder: np.array(sorted(p for p in folder.rglob("*") if p.suffix.lower() in Image.registered_extensions()), object)
    train, test, every = find(root / "train"), find(root / "test"), find(root)
    order, cut = np.random.default_rng(0).permutation(len(every)), max(1, len(every) // 10)
    return {"train": train, "test": test} if len(train) and len(test) else {"train": every[order[cut:]], "test": every[order[:cut]]}


def load_data(dataset, root, size):
    """[train, test], uint8 [N, 3, H, H] each."""
    arrays = []
    if dataset == "cifar10":
        try:
            arrays = [torchvision.datasets.CIFAR10(root, train=train, download=True).data.transpose(0, 3, 1, 2) for train in (True, False)]
        except Exception as error:
            raise BadInput(f"CIFAR-10 is not in {root} and could not be downloaded ({error}): put cifar-10-python.tar.gz from "
                           "https://www.cs.toronto.edu/~kriz/cifar.html there.")
    for split, files in find_files(dataset, root).items() if dataset != "cifar10" else ():
        key = hashlib.sha256(repr([(f.name, f.exists() and f.stat().st_size) for f in files]).encode()).hexdigest()[:12]
        cache = root / f".f2d2-{split}-{size}-{key}.u8" if dataset in SIZES or len(files) * 3 * size**2 > LARGE else None
        arrays.append(stack(npz_blocks(files) if dataset == "imagenet64" else folder_blocks(files, size, dataset == "celeba64"), size, cache))
        if not len(arrays[-1]):
            raise BadInput(f"{root} holds no {split} images that can be read: name a folder with at least two.")
    return [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]


def draw(data, args, step, rank, world, device):
    """This rank's share of the global batch: x1, x0, t, s. A function of (seed, step) alone, so that a resumed run and any number of
    processes see the same batches; then the rank's own random stream, for probes and dropout."""
    torch.manual_seed((args.seed << 40) + (step << 12))
    n, own = args.batch_size, lambda x: x[rank::world].to(device)
    images = data[own(torch.randint(len(data), (n,))).to(data.device)].to(device)
    flip, noise, x0 = own(torch.rand(n, 1, 1, 1)), own(torch.rand(n, *data.shape[1:])), own(torch.randn(n, *data.shape[1:]))
    t, s = sample_times(torch.zeros(n), **args.times)
    if args.paper and args.method == "meanflow":
        t, s = torch.sigmoid(2 + 2 * torch.randn(2, n)).sort(0).values  # 1 - t is logit-normal(-2, 2), as in MeanFlow
    torch.manual_seed((args.seed << 40) + (step << 12) + 1 + rank)
    return dequantize(torch.where(flip < 0.5, images.flip(3), images), noise), x0, own(t), own(s)


# ---------------------------------------------------------------------------------- models, checkpoints, pictures
def build(model, device):
    """model = {"image_size", "channels", "blocks", "dropout", "head", "ours"}, which every checkpoint holds."""
    backbone = UNet(model["image_size"], model["channels"], blocks=model["blocks"], dropout=model["dropout"], log_time=model["ours"])
    return JointFlowMap(backbone, backbone.feature_dim, model["head"], model["ours"], model["ours"]).to(device)


def load_checkpoint(path, device):
    """A checkpoint of this script, never executing code; BadInput for anything else."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        state["config"]["model"], state["flow"], state["ema"], state["step"]
        return state
    except Exception as error:
        raise BadInput(f"{path} is no checkpoint of this script ({type(error).__name__}): name a latest.pt that it wrote (--method flow trains a teacher).")


def load_model(path, device, size):
    """The averaged network of a checkpoint, frozen, with the checkpoint's `config` and `step`."""
    model = (state := load_checkpoint(path, device))["config"]["model"]
    if model["image_size"] != size:
        raise BadInput(f"{path} was trained on images of side {model['image_size']} and the data have {size}: use one of this size.")
    flow = build(model, device).eval().requires_grad_(False)
    flow.load_state_dict(state["ema"])
    flow.config, flow.step = state["config"], state["step"]
    return flow


class Objective(nn.Module):
    """The loss as a module: DistributedDataParallel wraps *this*. Around the flow itself, a jvp leaves gradients unsynchronised."""

    def __init__(self, flow, condition, velocity=None, **options):
        super().__init__()
        self.flow, self.condition, self.velocity, self.options = flow, condition, velocity, options

    def forward(self, x1, x0, t, s, joint=True):
        record = {}
        losses = f2d2_loss(self.flow, x1, self.condition, self.velocity, x0=x0, t=t, s=s, joint=joint, record=record, **self.options)
        return sum(losses.values()), record


@torch.no_grad()
def picture(flow, x0, path, few_step_map):
    """Samples from the same noise at every step count, one labelled row each."""
    draws = to_bytes(torch.cat([few_steps(flow, x0, k, few_step_map) for k in STEP_COUNTS])).cpu()
    sheet = Image.fromarray(torchvision.utils.make_grid(draws, len(x0), 1).permute(1, 2, 0).numpy())
    sheet = sheet.resize([side * max(1, 64 // x0.shape[-1]) for side in sheet.size], Image.NEAREST)
    image = Image.new("RGB", (70 + sheet.width, sheet.height), "white")
    image.paste(sheet, (70, 0))
    for i, k in enumerate(STEP_COUNTS):
        ImageDraw.Draw(image).text((8, (i + 0.5) * image.height / len(STEP_COUNTS)), f"{k} step{'s' * (k > 1)}", fill="black", anchor="lm", font_size=14)
    image.save(path)


# ---------------------------------------------------------------------------------- training
def train(args, config, flow, teacher, data, rank, world, device):
    """Runs what is left of --steps; saves, whole or not at all, twenty times, at the end, and on SIGTERM or Ctrl-C."""
    recipe, path = RECIPES[args.method], args.out / "latest.pt"
    optimizer = getattr(torch.optim, recipe["optimizer"])(flow.parameters(), lr=args.lr)
    average = lambda ema, now, n: torch._foreach_lerp_(ema, now, max(1 - recipe["ema"], 9 / (10 + int(n))))  # a short memory early on
    ema = torch.optim.swa_utils.AveragedModel(flow, multi_avg_fn=average).requires_grad_(False)
    state = load_checkpoint(path, device) if path.exists() else {"step": 0}
    if state["step"]:
        flow.load_state_dict(state["flow"]), ema.module.load_state_dict(state["ema"]), optimizer.load_state_dict(state["optimizer"])
        ema.n_averaged.fill_(state["step"])
    objective = Objective(flow, recipe["condition"], teacher and teacher.velocity, **args.loss)
    if args.compile:
        objective.compile()
    parallel = nn.parallel.DistributedDataParallel(objective, find_unused_parameters=args.warmup > 0) if world > 1 else objective
    first, stop, began, cool = state["step"], [], time.time(), math.inf if args.paper else 4

    def save(step):
        part = path.with_suffix(".part")
        try:
            torch.save(dict(config=config, step=step, flow=flow.state_dict(), ema=ema.module.state_dict(), optimizer=optimizer.state_dict()), part)
            os.replace(part, path)
        except (OSError, RuntimeError) as error:
            part.unlink(missing_ok=True)
            raise BadInput(f"{path} could not be written ({error}): the one before it is intact; make room and type the same command.")
        noise = torch.randn(8, *data.shape[1:], generator=torch.Generator().manual_seed(0)).to(device)
        picture(ema.module.eval(), noise, args.out / "progress.png", args.method != "flow")

    handlers = {number: signal.signal(number, lambda number, frame: stop.append(number)) for number in (signal.SIGTERM, signal.SIGINT)}
    for step in range(first + 1, args.steps + 1):
        for group in optimizer.param_groups:  # up at the start; ours, a small gain: down to zero in the last quarter
            ramp, left = step / max(1, min(10_000, args.steps // 20)), 1 - (step - 1) / args.steps
            group["lr"] = args.lr * min(1, ramp, (recipe["decay_after"] / step) ** 0.5, cool * left)
        batch = draw(data, args, step, rank, world, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bool(args.amp)):
            loss, record = parallel(*batch, joint=step > args.warmup)
        optimizer.zero_grad(), loss.backward()
        norm = nn.utils.clip_grad_norm_([p for p in flow.parameters() if p.grad is not None], recipe["clip"]).item()
        if not math.isfinite(norm):
            raise BadInput(f"the loss is not finite at step {step}: {path} holds the last good state; try --init {path} --lr {args.lr / 3:g}.")
        optimizer.step()
        ema.update_parameters(flow)
        if rank == 0 and (step % max(1, min(100, args.steps // 50)) == 0 or step == args.steps):
            took = time.time() - began
            raw = {k: record[k].mean().item() for k in ("vm", "u", "div", "D") if k in record}
            loss, tenth = record.get("u", record["vm"]), (record["t"] * 10).long().clamp(max=9)
            by_t = [loss[part].mean().item() if part.any() else None for part in (tenth[-len(loss) :] == i for i in range(10))]
            line = dict(step=step, **raw, grad_norm=norm, images_per_second=(step - first) * args.batch_size / took)
            with open(args.out / "log.jsonl", "a") as file:
                file.write(json.dumps(line | {"by_tenths_of_t": by_t}) + "\n")
            print(f"{step}/{args.steps}: {' '.join(f'{k} {raw[k]:.4g}' for k in raw)} | grad {norm:.3g} | {line['images_per_second']:.0f} "
                  f"images/s | {took:.0f} s, {took / (step - first) * (args.steps - step):.0f} s left", flush=True)
        if rank == 0 and (stop or step % max(1, args.steps // 20) == 0 or step == args.steps):
            save(step)
        if stop:
            print(f"stopped and saved at step {step}: the same command goes on from there")
            raise SystemExit(128 + stop[0])
    [signal.signal(number, handler) for number, handler in handlers.items()]


# ---------------------------------------------------------------------------------- evaluation
def statistics(network, batches):
    """Mean [F] and covariance [F, F] of the network's features, float64."""
    n, first, second = 0, 0.0, 0.0
    for images in batches:
        f = network(images, return_features=True).double()
        n, first, second = n + len(f), first + f.sum(0), second + f.T @ f
    return (first / n).cpu(), ((second - first[:, None] * first / n) / (n - 1)).cpu()


def frechet_distance(mean_a, S_a, mean_b, S_b):
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)); S_a S_b has the eigenvalues of S_a^(1/2) S_b S_a^(1/2)."""
    values, vectors = torch.linalg.eigh(S_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    return ((mean_a - mean_b).square().sum() + (S_a + S_b).trace() - 2 * torch.linalg.eigvalsh(root @ S_b @ root).clamp(min=0).sqrt().sum()).item()


def fid_setup(args, train, device):
    """The TorchScript Inception and the train split's statistics, cached beside the data; or the reason why not."""
    path = args.fid_network or args.data / INCEPTION.rsplit("/", 1)[1]
    try:
        if not path.exists() and not args.fid_network:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION, str(path), progress=False)
        network = torch.jit.load(str(path), map_location=device).eval()
    except Exception as error:
        return None, None, f"{path} could not be had ({type(error).__name__}): get {INCEPTION} and pass --fid-network PATH"
    key = hashlib.sha256(path.read_bytes() + train[:: max(1, len(train) // 1000)].cpu().numpy().tobytes()).hexdigest()[:12]
    cache = args.data_folder / f".f2d2-fid-{key}.npz"
    if not cache.exists():
        np.savez(cache, *[a.numpy() for a in statistics(network, (part.to(device) for part in train.split(CHUNK)))])
    return network, [torch.from_numpy(a) for a in np.load(cache).values()], None


@torch.no_grad()
def evaluate(args, flow, teacher, train, test, device):
    """The paper's table, bits/dim on the test split; errors per image against the converged oracle; FID. Writes metrics.json."""
    few_step_map, head, probe = flow.config["method"] != "flow", flow.head is not None, "rademacher" if args.paper else "dct"
    bpd = lambda f, x: bits_per_dim(torch.cat([f(y.to(device)).cpu().double() for y in x.split(CHUNK)]), x[0].numel())
    slow = lambda velocity, steps, euler: lambda y: ode_log_likelihood(velocity, y, steps, probe, euler)
    torch.manual_seed(0)
    noise = [torch.rand(test[0].shape, generator=torch.Generator().manual_seed(i)) for i in range(len(test))]  # each image has its own
    x, some = dequantize(test, torch.stack(noise)), torch.linspace(0, len(test) - 1, min(args.oracle_images, len(test))).long()
    oracle = bpd(slow((teacher or flow).velocity, args.oracle_steps, False), x[some])
    about = {"images": len(some), "steps": args.oracle_steps, "bpd": oracle.mean().item(), "se": (oracle.std() / len(oracle) ** 0.5).item()}
    if args.oracle_euler:
        about["euler_1024_bpd"] = bpd(slow((teacher or flow).velocity, 1024, True), x[some]).mean().item()
    network, real, why_not = fid_setup(args, train, device)
    noise, rows, guide = torch.randn(args.num_fid_samples if network else 8, *test.shape[1:]), {}, args.guidance and head
    guided = [self_guidance(flow, y.to(device), args.guidance, args.guidance_iterations).cpu() if guide else y for y in noise.split(CHUNK)]
    for k in STEP_COUNTS:
        row = rows[str(k)] = dict.fromkeys(("bpd", "se", "gap", "mae_oracle", "corr", "euler_bpd", "fid"))
        if head:
            fast = bpd(lambda y: log_likelihood(flow, y, k, args.mirror), x)
            row["bpd"], row["se"], error = fast.mean().item(), (fast.std() / len(fast) ** 0.5).item(), fast[some] - oracle
            row["gap"], row["mae_oracle"] = error.mean().item(), error.abs().mean().item()
            row["corr"] = torch.corrcoef(torch.stack([fast[some], oracle]))[0, 1].item()
        row["euler_bpd"] = bpd(slow(flow.velocity, k, True), x[some]).mean().item()
        if network:
            row["fid"] = frechet_distance(*real, *statistics(network, (to_bytes(few_steps(flow, y.to(device), k, few_step_map)) for y in guided)))
    metrics = {**{k: flow.config[k] for k in ("dataset", "method", "seed", "paper")}, "divergence_head": head, "step": flow.step,
               "test_images": len(x), "mirror": args.mirror, "oracle": about, "steps": rows, "fid_not_run": why_not}
    args.out.mkdir(parents=True, exist_ok=True)
    picture(flow, guided[0][:8].to(device), args.out / "samples.png", few_step_map)
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    return metrics


def print_table(metrics):
    oracle, cell = metrics["oracle"], lambda value, width: ("-" if value is None else f"{value:.3f}").rjust(width)
    print("\n{dataset}, {method}, step {step}: bits/dim of {test_images} test images; the oracle's, errors per image and Euler's on "
          "{images} of them\n  steps  bits/dim      se     gap  |-oracle|   corr   Euler      FID".format(**metrics, images=oracle["images"]))
    euler = f"   with 1024 uniform Euler steps {oracle['euler_1024_bpd']:.3f}" if "euler_1024_bpd" in oracle else ""
    print(f" oracle{cell(oracle['bpd'], 10)}{cell(oracle['se'], 8)}{euler}")
    for k, row in metrics["steps"].items():
        print(k.rjust(7) + "".join(map(cell, row.values(), (10, 8, 8, 11, 7, 8, 9))))
    if metrics["fid_not_run"]:
        print(f"FID: not run. {metrics['fid_not_run']}")


# ---------------------------------------------------------------------------------- the command line
def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = lambda name, kind, default, help, **kw: parser.add_argument(name, type=kind, default=default, help=help + (
        f"; default {default or 'that of the method'}" if kind in (int, float, str) else ""), **kw)
    switch = lambda name, help: parser.add_argument(name, action="store_true", help=help)
    add("--dataset", str, "cifar10", "cifar10, imagenet64, celeba64 or a folder of images, with train/ and test/ or without")
    add("--method", str, "meanflow", "flow trains a teacher", choices=RECIPES)
    switch("--no-divergence", "the sampling-only baseline: no divergence head")
    add("--teacher", Path, None, "its v and div v replace the noisy targets, and it is the oracle", metavar="CKPT")
    add("--init", Path, None, "start from these weights (default: the teacher's); a missing head is added", metavar="CKPT")
    switch("--paper", "the paper's recipe in training and evaluation: everything marked ours in f2d2.py is off")
    add("--data", Path, Path("data"), "where the named datasets and the FID network are or go, default data/")
    add("--image-size", int, 32, "side in pixels, for a folder")
    add("--steps", int, None, "training steps")
    add("--warmup", int, None, "steps at the start that train the velocity part alone")
    add("--batch-size", int, None, "images a step, over all processes")
    add("--lr", float, None, "learning rate")
    add("--dropout", float, None, "probability")
    add("--channels", int, 128, "of the U-Net")
    add("--blocks", int, 4, "residual blocks a level")
    add("--seed", int, 0, "of everything random")
    add("--out", Path, None, "default runs/image/<dataset>-<method>-<seed>; a run that is there goes on")
    add("--device", str, "cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu", choices=["cuda", "cpu"])
    add("--amp", str, None, "bfloat16 autocast where no derivative is taken: flow, and shortcut with --no-divergence", choices=["bf16"])
    switch("--compile", "torch.compile the objective")
    add("--eval", Path, None, "no training: the table of this checkpoint", metavar="CKPT")
    add("--oracle-images", int, 64, "for the errors per image")
    add("--oracle-steps", int, 64, "midpoint steps on the geometric grid")
    switch("--oracle-euler", "the paper's oracle beside it: 1024 uniform Euler steps")
    switch("--mirror", "the paper's forward-only likelihood")
    add("--guidance", float, 0.0, "self-guidance of the samples with this learning rate", metavar="LR")
    add("--guidance-iterations", int, 1, "its Adam steps")
    add("--num-fid-samples", int, 50_000, "samples for FID")
    add("--fid-network", Path, None, "TorchScript, called as net(uint8 [N, 3, H, H], return_features=True)")
    return parser, parser.parse_args(argv)


def settle(args, world):
    """Fills in the method's recipe and refuses what cannot work, before anything is read or written. Returns the run's config."""
    recipe, root = RECIPES[args.method], args.data if args.dataset in SIZES else Path(args.dataset)
    for name in ("steps", "batch_size", "lr", "dropout"):
        setattr(args, name, recipe[name] if getattr(args, name) is None else getattr(args, name))
    for wrong, sentence in (
        (args.device == "cuda" and not torch.cuda.is_available(), "there is no CUDA device on this machine: use --device cpu."),
        (args.dataset not in SIZES and not root.is_dir(), f"no dataset or folder {root}: use {', '.join(SIZES)} or the path of a folder of images."),
        (min(args.steps, args.batch_size, args.channels, args.blocks, args.image_size, args.oracle_images) < 1,
         "--steps, --batch-size, --channels, --blocks, --image-size and --oracle-images must be at least 1."),
        (args.image_size % 4, f"--image-size {args.image_size} cannot be halved twice: use a multiple of 4."),
        (args.batch_size % world, f"--batch-size {args.batch_size} is not divisible by the {world} processes: use a multiple of {world}."),
        (args.method == "shortcut-distill" and not args.teacher and not args.eval, "shortcut-distill needs --teacher CKPT: make one with "
         f"python train_image.py --dataset {args.dataset} --method flow and pass its latest.pt, or use --method shortcut."),
        (args.teacher and args.method in ("flow", "shortcut") and not args.eval,
         f"--method {args.method} learns from data alone: drop --teacher, or use --method shortcut-distill."),
        (args.amp and args.method != "flow" and not (args.no_divergence and recipe["condition"] == "semigroup"),
         "--amp bf16 is for --method flow, and for shortcut methods with --no-divergence: derivatives need float32, so drop it."),
    ):
        if wrong:
            raise BadInput(sentence)
    forward = args.paper and recipe["condition"] in ("semigroup", "eulerian")  # the published maps run from noise to data only
    if args.warmup is None:
        args.warmup = 0 if args.init or args.method == "flow" or args.no_divergence else int(recipe["warmup"] * args.steps)
    args.mirror, args.data_folder, args.image_size = args.mirror or forward, root, SIZES.get(args.dataset, args.image_size)
    args.out = args.out or (args.eval.parent if args.eval else Path(f"runs/image/{Path(args.dataset).name}-{args.method}-{args.seed}"))
    args.loss = dict(velocity_weight="natural" if args.teacher and not args.paper else recipe["weight"],  # "adaptive" shrinks u there
                     divergence_weight="none" if args.paper else "natural", diagonal=recipe["diagonal"], own_tangent=not args.paper,
                     through_dD=not args.paper, probe="rademacher" if args.paper else "dct")
    args.times = dict(direction="forward" if forward else "both", log_time=0.0 if args.paper else 0.5)
    model = dict(image_size=args.image_size, channels=args.channels, blocks=args.blocks, dropout=args.dropout,
                 head=not args.no_divergence and args.method != "flow", ours=not args.paper)
    return {**{k: getattr(args, k) for k in ("dataset", "method", "paper", "seed", "batch_size", "lr", "warmup", "amp")},
            "model": model, **{k: getattr(args, k) and str(getattr(args, k)) for k in ("teacher", "init")}}


def run(args):
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if args.eval:  # the checkpoint says what it is
        found = load_checkpoint(args.eval, "cpu")["config"]
        args.image_size, args.paper = found["model"]["image_size"], args.paper or found["paper"]
        args.dataset, args.method, args.seed = (found[k] for k in ("dataset", "method", "seed"))
    config = settle(args, world)
    if not args.eval and (args.out / "latest.pt").exists():  # more --steps are welcome, anything else is another run
        found = load_checkpoint(args.out / "latest.pt", "cpu")["config"]
        wrong = [f"{k} is {found.get(k)} and not {config[k]}" for k in config if found.get(k) != config[k]]
        if wrong:
            raise BadInput(f"{args.out} holds another run, whose {', '.join(wrong)}: choose another --out.")
    if world > 1:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" else args.device
        torch.distributed.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    device, _ = torch.device(args.device), torch.manual_seed(args.seed)
    load = lambda path: path and load_model(path, device, args.image_size)
    teacher, source, flow = load(args.teacher), load(args.init), load(args.eval) or build(config["model"], device)
    source = None if args.eval else source or teacher  # a student starts from its teacher's weights
    if source:
        wrong = [k for k in ("channels", "blocks", "ours") if source.config["model"][k] != config["model"][k]]
        if wrong:
            raise BadInput(f"{args.init or args.teacher} has other {' and '.join(wrong)}, {source.config['model']}: use its options.")
        flow.backbone.load_state_dict(source.backbone.state_dict())
        if source.head and flow.head:
            flow.head.load_state_dict(source.head.state_dict())
    if rank > 0:  # one process downloads and writes the caches
        torch.distributed.barrier()
    train_data, test_data = load_data(args.dataset, args.data_folder, args.image_size)
    if world > 1 and rank == 0:
        torch.distributed.barrier()
    if not args.eval:
        args.out.mkdir(parents=True, exist_ok=True)
        size, head = (sum(p.numel() for p in net.parameters()) if net else 0 for net in (flow, flow.head))
        if rank == 0:
            print(f"{len(train_data):,} train, {len(test_data):,} test images; {size:,} parameters, {head:,} in the head; {args.steps} steps; {config}")
        resident = train_data.to(device) if train_data.numel() < 2**32 else train_data
        train(args, config, flow, teacher, resident, rank, world, device)
        flow = load(args.out / "latest.pt")
    if rank == 0:
        print_table(evaluate(args, flow, teacher, train_data, test_data, device))
    if world > 1:
        torch.distributed.destroy_process_group()


def main(argv=None):
    parser, args = parse(argv)
    try:
        run(args)
    except BadInput as error:
        parser.exit(2, f"train_image.py: {error}\n")


if __name__ == "__main__":
    main()
