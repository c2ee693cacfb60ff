"""F2D2 on images: train, resume, evaluate; one GPU, several, or a CPU.
python train_image.py --dataset cifar10 --method flow                   a teacher
python train_image.py --dataset cifar10 --method shortcut-distill --teacher runs/image/cifar10-flow-0/latest.pt
python train_image.py --dataset cifar10 --method meanflow               from data alone; --teacher CKPT is optional
python train_image.py --eval runs/image/cifar10-meanflow-0/latest.pt    the paper's table of a checkpoint
torchrun --nproc-per-node 8 train_image.py --dataset cifar10 --method meanflow
"""
import argparse
import hashlib
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from f2d2 import (JointFlowMap, UNet, bits_per_dim, dequantize, f2d2_loss, log_likelihood, ode_log_likelihood, ode_sample, sample,
                  sample_times, self_guidance)

# Published hyperparameters. `flow` takes those of Shortcut-Distill, whose teacher it is; so does `shortcut`. Epochs are in images.
# warmup: the share of the steps that trains the velocity part alone. times "logit-normal": MeanFlow's, used by --paper.
_distill = dict(condition="semigroup", optimizer="RAdam", lr=1e-4, batch_size=512, steps=645_000, warmup=10 / 11, dropout=0.13, ema=0.9999,
                diagonal=0.5, weight=("none", "natural"), clip=math.inf)
RECIPES = {
    "flow": _distill | dict(condition=None, steps=586_000, warmup=0),
    "shortcut": _distill,
    "shortcut-distill": _distill,
    "meanflow": _distill | dict(condition="eulerian", optimizer="Adam", lr=6e-4, batch_size=1024, steps=800_000, warmup=0.5, dropout=0.2,
                                diagonal=0.25, weight=("adaptive", "adaptive")),
    "lsd": _distill | dict(condition="lagrangian", batch_size=256, steps=800_000, warmup=0.5, dropout=0.0, clip=1.0),
}
STEP_COUNTS, EVAL_BATCH = (8, 4, 2, 1), 250
INCEPTION = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"


class BadInput(Exception):
    """One sentence for the user: what is wrong and what to type instead. Exit code 2."""


# ---------------------------------------------------------------------------------- data: uint8 [N, 3, H, H]
def folder_blocks(paths, size, crop=None):
    """[1, 3, size, size] each: centre crop, antialiased resize, *rounded to bytes*, so that bits/dim is that of an 8-bit image."""
    skipped = []
    for path in paths:
        try:
            image = Image.open(path).convert("RGB")
        except Exception:
            skipped.append(path)
            continue
        image = torchvision.transforms.functional.center_crop(image, crop) if crop else image
        yield np.asarray(ImageOps.fit(image, (size, size), Image.BICUBIC)).transpose(2, 0, 1)[None]
    if skipped:
        print(f"skipped {len(skipped)} of {len(paths)} files that are no readable images, the first is {skipped[0]}")


def npz_blocks(files):
    for file in files:
        try:
            yield np.load(file)["data"].reshape(-1, 3, 64, 64)  # planes R, G, B; numpy refuses pickles
        except Exception as error:
            raise BadInput(f"{file} is not an ImageNet-64 batch ({error}): download the npz files again.")


def stack(blocks, cache=None):
    """Blocks -> one array, in memory, or streamed into `cache` once (whole or not at all) and memory-mapped from there."""
    if cache is None:
        blocks = list(blocks)
        return np.concatenate(blocks) if blocks else np.zeros((0, 3, 1, 1), np.uint8)
    if not cache.exists():
        print(f"writing {cache}, once")
        part = cache.with_suffix(f".part{os.getpid()}")
        try:
            with open(part, "wb") as file:
                for block in blocks:
                    file.write(np.ascontiguousarray(block, np.uint8).tobytes())
            os.replace(part, cache)
        finally:
            part.unlink(missing_ok=True)
    size = int(cache.stem.split("-")[-1])
    return np.memmap(cache, np.uint8, "c").reshape(-1, 3, size, size)


def load_data(args):
    """The train and the test split of --dataset, uint8 [N, 3, H, H]."""
    root, splits = args.data, {}
    if args.dataset == "cifar10":
        for split in ("train", "test"):
            try:
                images = torchvision.datasets.CIFAR10(root, train=split == "train", download=True).data
            except Exception as error:
                raise BadInput(f"CIFAR-10 is not in {root} and could not be downloaded ({error}): put cifar-10-python.tar.gz from "
                               "https://www.cs.toronto.edu/~kriz/cifar.html there and run again.")
            splits[split] = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    elif args.dataset == "imagenet64":
        for split, files in (("train", [root / f"train_data_batch_{i}.npz" for i in range(1, 11)]), ("test", [root / "val_data.npz"])):
            cache, missing = root / f".f2d2-imagenet-{split}-64.u8", [f.name for f in files if not f.exists()]
            if missing and not cache.exists():
                raise BadInput(f"{root} lacks {', '.join(missing)}: download the ImageNet 64x64 npz files from https://image-net.org "
                               "(an account is needed), unpack them there, and run again.")
            splits[split] = stack(npz_blocks(files), cache)
    elif args.dataset == "celeba64":
        base = root / "celeba"
        if not (base / "img_align_celeba").is_dir() or not (base / "list_eval_partition.txt").exists():
            raise BadInput(f"{base} must hold img_align_celeba/ (unpacked) and list_eval_partition.txt: download both from "
                           "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and run again.")
        rows = [line.split() for line in (base / "list_eval_partition.txt").read_text().splitlines() if line]
        for split, code in (("train", "0"), ("test", "2")):
            paths = [base / "img_align_celeba" / name for name, part in rows if part == code]
            missing = [p.name for p in paths if not p.exists()]
            if missing:
                raise BadInput(f"{base / 'img_align_celeba'} lacks {len(missing)} images, the first is {missing[0]}: unpack it again.")
            splits[split] = stack(folder_blocks(paths, 64, crop=140), base / f".f2d2-celeba-{split}-64.u8")
    else:
        folder, kinds = Path(args.dataset), Image.registered_extensions()
        find = lambda folder: sorted(p for p in folder.rglob("*") if p.suffix.lower() in kinds)
        paths = {split: find(folder / split) for split in ("train", "test")}
        if not all(paths.values()):
            every = find(folder)
            order = np.random.default_rng(0).permutation(len(every))
            test = set(order[: max(1, len(every) // 10)].tolist())
            paths = {"train": [p for i, p in enumerate(every) if i not in test], "test": [p for i, p in enumerate(every) if i in test]}
        for split, files in paths.items():
            large = len(files) * 3 * args.image_size**2 > 2**28
            key = hashlib.sha256(repr([(str(f), f.stat().st_size) for f in files]).encode()).hexdigest()[:12]
            splits[split] = stack(folder_blocks(files, args.image_size), folder / f".f2d2-{split}-{key}-{args.image_size}.u8" if large else None)
            if not len(splits[split]):
                raise BadInput(f"{folder} holds no {split} images that can be read: name a folder with at least two images.")
    return [torch.from_numpy(splits[split]) for split in ("train", "test")]


def noisy(images, indices):
    """Test images as real numbers: each with its own noise, seeded by its index, whatever the batches."""
    noise = [torch.rand(images[0].shape, generator=torch.Generator().manual_seed(int(i))) for i in indices]
    return dequantize(images[indices], torch.stack(noise))


def to_bytes(x):
    return ((x + 1) * 128).floor().clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------------------------- models and checkpoints
def build(model, device):
    """model: {"image_size", "channels", "blocks", "dropout", "head", "ours"}, stored in every checkpoint."""
    backbone = UNet(model["image_size"], model["channels"], blocks=model["blocks"], dropout=model["dropout"], log_time=model["ours"])
    return JointFlowMap(backbone, backbone.feature_dim, model["head"], model["ours"], model["ours"]).to(device)


def load_checkpoint(path, device):
    """A checkpoint of this script; never executes code. Raises BadInput for anything else."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        state["config"]["model"], state["flow"], state["ema"], state["step"]
        return state
    except FileNotFoundError:
        raise BadInput(f"there is no {path}: make one with python train_image.py --dataset ... --method flow (it is called latest.pt).")
    except Exception as error:
        raise BadInput(f"{path} is no checkpoint of this script ({type(error).__name__}): name a latest.pt that it wrote.")


def load_model(path, device):
    """The EMA network of a checkpoint, frozen, with the checkpoint's `config` and `step`."""
    state = load_checkpoint(path, device)
    flow = build(state["config"]["model"], device).eval().requires_grad_(False)
    flow.load_state_dict(state["ema"])
    flow.config, flow.step = state["config"], state["step"]
    return flow


class Objective(nn.Module):
    """The loss as a module: DistributedDataParallel wraps *this*. Around the flow itself, a jvp would leave gradients unsynchronised."""

    def __init__(self, flow, condition, velocity=None, **options):
        super().__init__()
        self.flow, self.condition, self.velocity, self.options = flow, condition, velocity, options

    def forward(self, x1, x0, t, s, joint=True):
        record = {}
        losses = f2d2_loss(self.flow, x1, self.condition, self.velocity, x0=x0, t=t, s=s, joint=joint, record=record, **self.options)
        return sum(losses.values()), record


# ---------------------------------------------------------------------------------- training
def draw(data, args, step, rank, world, device):
    """This rank's share of the global batch: x1, x0, t, s. A function of (seed, step) alone, so that a resumed run and any number
    of processes see the same batches; then the rank's own stream, for probes and dropout."""
    torch.manual_seed((args.seed << 40) + (step << 12))
    n, own = args.batch_size, lambda x: x[rank::world].to(device)
    images = data[own(torch.randint(len(data), (n,))).to(data.device)].to(device)
    flip, noise, x0 = own(torch.rand(n, 1, 1, 1)), own(torch.rand(n, *data.shape[1:])), own(torch.randn(n, *data.shape[1:]))
    if args.paper and args.method == "meanflow":
        t, s = torch.sigmoid(2 + 2 * torch.randn(2, n)).sort(0).values  # 1 - t is logit-normal(-2, 2)
    else:
        t, s = sample_times(torch.zeros(n), **args.times)
    torch.manual_seed((args.seed << 40) + (step << 12) + 1 + rank)
    return dequantize(torch.where(flip < 0.5, images.flip(3), images), noise), x0, own(t), own(s)


def log_record(record, step, norm, rate):
    """One JSON line: unweighted mean squared residuals, and the first that is there by tenths of t."""
    line = {k: record[k].mean().item() for k in ("vm", "u", "div", "D") if k in record}
    term = "u" if "u" in record else "vm"
    tenth = (record["t"][-len(record[term]) :] * 10).long().clamp(max=9)
    count = torch.bincount(tenth, minlength=10)
    by_t = (torch.bincount(tenth, record[term].float(), minlength=10) / count).tolist()
    return dict(step=step, **line, grad_norm=norm, images_per_second=rate, **{term + "_by_t": [x if x == x else None for x in by_t]})


def picture(rows, path):
    """{label: bytes [N, 3, H, H]}: one labelled row of images each."""
    strips = [torchvision.utils.make_grid(images.cpu(), nrow=len(images), padding=1) for images in rows.values()]
    sheet = torch.cat(strips, 1).permute(1, 2, 0).numpy()
    zoom = max(1, 32 // rows[next(iter(rows))].shape[-1])
    image = Image.new("RGB", (70 + sheet.shape[1] * zoom, sheet.shape[0] * zoom), "white")
    image.paste(Image.fromarray(sheet).resize((sheet.shape[1] * zoom, image.height), Image.NEAREST), (70, 0))
    for i, label in enumerate(rows):
        ImageDraw.Draw(image).text((35, (i + 0.5) * image.height / len(rows)), label, fill="black", anchor="mm")
    image.save(path)


def few_step_rows(flow, x0):
    return {f"{k} step{'s' * (k > 1)}": to_bytes(sample(flow, x0, k)[0]) for k in STEP_COUNTS}


def train(args, config, flow, ema, teacher, data, rank, world, device):
    """Runs what is left of --steps. Saves, atomically, twenty times, before leaving on SIGTERM or Ctrl-C, and at the end."""
    recipe, path, began = RECIPES[args.method], args.out / "latest.pt", time.time()
    optimizer = getattr(torch.optim, recipe["optimizer"])(flow.parameters(), lr=args.lr)
    objective = Objective(flow, recipe["condition"], teacher and teacher.velocity, **args.loss)
    parallel = objective.compile() or objective if args.compile else objective
    if world > 1:
        parallel = DistributedDataParallel(objective, find_unused_parameters=args.warmup > 0)
    state = load_checkpoint(path, device) if path.exists() else {"step": 0, "seconds": 0.0}
    if state["step"]:
        flow.load_state_dict(state["flow"]), ema.module.load_state_dict(state["ema"]), optimizer.load_state_dict(state["optimizer"])
        ema.n_averaged.fill_(state["step"])
    first, stop, done = state["step"], [], 0

    def save(step):
        part = path.with_suffix(f".part{os.getpid()}")
        try:
            torch.save(dict(config=config, step=step, seconds=state["seconds"] + time.time() - began, flow=flow.state_dict(),
                            ema=ema.module.state_dict(), optimizer=optimizer.state_dict()), part)
            os.replace(part, path)
        except (OSError, RuntimeError) as error:
            raise BadInput(f"could not write {path} ({error}): the checkpoint before it is intact; make room and type the same command.")
        finally:
            part.unlink(missing_ok=True)

    handlers = {number: signal.signal(number, lambda number, frame: stop.append(number)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for step in range(first + 1, args.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1, step / args.lr_warmup) * (min(1, (35_000 / step) ** 0.5) if args.method == "lsd" else 1)
            batch = draw(data, args, step, rank, world, device)
            with torch.autocast(device.type, torch.bfloat16) if args.amp == "bf16" else nullcontext():
                loss, record = parallel(*batch, joint=step > args.warmup)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_([p for p in flow.parameters() if p.grad is not None], recipe["clip"]).item()
            if not math.isfinite(norm):
                raise BadInput(f"the loss is not finite at step {step}: {path} is intact; go on with a lower --lr and another --out, --init {path}.")
            optimizer.step()
            ema.update_parameters(flow)
            if rank == 0 and (step % max(1, min(100, args.steps // 50)) == 0 or step == args.steps):
                took, n = time.time() - began, step - first
                line = log_record(record, step, norm, n * args.batch_size / took)
                with open(args.out / "log.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
                terms = " ".join(f"{k} {line[k]:.4g}" for k in ("vm", "u", "div", "D") if k in line)
                print(f"{step}/{args.steps}: {terms} | grad {norm:.3g} | {line['images_per_second']:.0f} images/s, "
                      f"{took:.0f} s, {took / n * (args.steps - step):.0f} s left", flush=True)
            if rank == 0 and (stop or step % max(1, args.steps // 20) == 0 or step == args.steps):
                save(step)
                if args.method != "flow":
                    torch.manual_seed(0)
                    with torch.no_grad():
                        picture(few_step_rows(ema.module.eval(), torch.randn(8, *data.shape[1:]).to(device)), args.out / "progress.png")
            if stop:
                print(f"stopped and saved at step {step}: the same command goes on from there")
                sys.exit(128 + stop[0])
    finally:
        [signal.signal(number, handler) for number, handler in handlers.items()]


# ---------------------------------------------------------------------------------- evaluation
def chunks(f, x):
    return torch.cat([f(part).detach().cpu() for part in x.split(EVAL_BATCH)])


def statistics(network, batches):
    """Mean [F] and covariance [F, F] of the network's features, float64."""
    n, first, second = 0, 0.0, 0.0
    for images in batches:
        f = network(images, return_features=True).double()
        n, first, second = n + len(f), first + f.sum(0), second + f.T @ f
    mean = first / n
    return mean.cpu(), ((second - n * mean[:, None] * mean) / (n - 1)).cpu()


def frechet_distance(a, b):
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)): the eigenvalues of S_a S_b are those of S_a^(1/2) S_b S_a^(1/2)."""
    (m_a, S_a), (m_b, S_b) = a, b
    values, vectors = torch.linalg.eigh(S_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ S_b @ root).clamp(min=0).sqrt().sum()
    return ((m_a - m_b).square().sum() + S_a.trace() + S_b.trace() - 2 * trace).item()


def fid_network(args, device):
    """The TorchScript Inception, and None; or None, and the reason."""
    path = args.fid_network or args.data / INCEPTION.rsplit("/", 1)[1]
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION, str(path), progress=False)
        return torch.jit.load(str(path), map_location=device).eval(), None
    except Exception as error:
        return None, f"no FID network: {INCEPTION} could not be had ({type(error).__name__}); pass --fid-network PATH"


def fid_reference(args, network, train, folder):
    """Statistics of the train split, cached beside the data under the network's and the data's fingerprint."""
    key = hashlib.sha256(repr([tuple(train.shape), train[:: max(1, len(train) // 1000)].sum().item()]).encode()).hexdigest()[:8]
    weights = hashlib.sha256(Path(args.fid_network or args.data / INCEPTION.rsplit("/", 1)[1]).read_bytes()).hexdigest()[:8]
    cache = folder / f".f2d2-fid-{key}-{weights}.npz"
    if not cache.exists():
        mean, covariance = statistics(network, (part.to(args.device) for part in train.split(EVAL_BATCH)))
        np.savez(cache, mean=mean.numpy(), covariance=covariance.numpy())
    saved = np.load(cache)
    return torch.from_numpy(saved["mean"]), torch.from_numpy(saved["covariance"])


def evaluate(args, flow, teacher, train, test):
    """The paper's table: bits/dim on the test split, errors per image against the converged oracle, FID."""
    device, d, head = torch.device(args.device), test[0].numel(), flow.head is not None
    velocity, few_step_map = (teacher or flow).velocity, flow.config["method"] != "flow"
    some = lambda n: torch.linspace(0, len(test) - 1, min(n, len(test))).long().unique()
    bpd = lambda f, x: bits_per_dim(chunks(lambda y: f(y.to(device)), x).double(), d)
    mean = lambda b: [b.mean().item(), (b.std() / len(b) ** 0.5).item()]
    probe = "rademacher" if args.paper else "dct"
    torch.manual_seed(0)
    x, x_oracle = noisy(test, some(args.test_images)), noisy(test, some(args.oracle_images))
    slow = lambda steps, euler, v: lambda y: ode_log_likelihood(v, y, steps, probe, euler=euler)
    oracle = bpd(slow(args.oracle_steps, False, velocity), x_oracle)
    about = {"images": len(x_oracle), "steps": args.oracle_steps, "bpd": oracle.mean().item(), "se": mean(oracle)[1]}
    if args.oracle_euler:
        about["euler_1024_bpd"] = bpd(slow(1024, True, velocity), x_oracle).mean().item()
    network, why_not = fid_network(args, device)
    real = network and fid_reference(args, network, train, args.data_folder)
    guided = lambda y: self_guidance(flow, y, args.guidance, args.guidance_iterations) if args.guidance and head else y
    start, rows, images = torch.randn(args.num_fid_samples if network else 8, *test.shape[1:]), {}, {}
    for k in STEP_COUNTS:
        row = dict.fromkeys(("bpd", "se", "gap", "mae_oracle", "corr", "fid"))
        if few_step_map and head:
            row["bpd"], row["se"] = mean(bpd(lambda y: log_likelihood(flow, y, k, args.mirror), x))
            fast = bpd(lambda y: log_likelihood(flow, y, k, args.mirror), x_oracle)
            row |= {"gap": (fast - oracle).mean().item(), "mae_oracle": (fast - oracle).abs().mean().item(),
                    "corr": torch.corrcoef(torch.stack([fast, oracle]))[0, 1].item()}
        row["euler_bpd"] = bpd(slow(k, True, flow.velocity), x_oracle).mean().item()
        draw_few = lambda y: to_bytes(sample(flow, guided(y.to(device)), k)[0] if few_step_map
                                      else ode_sample(flow.velocity, y.to(device), k, euler=True))
        images[f"{k} step{'s' * (k > 1)}"] = draw_few(start[:8])
        if network:
            row["fid"] = frechet_distance(real, statistics(network, map(draw_few, start.split(EVAL_BATCH))))
        rows[str(k)] = row
    metrics = dict({k: flow.config[k] for k in ("dataset", "method", "seed")}, divergence_head=head, step=flow.step,
                   test_images=len(x), mirror=args.mirror, oracle=about, steps=rows, fid_not_run=why_not)
    args.out.mkdir(parents=True, exist_ok=True)
    picture(images, args.out / "samples.png")
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    return metrics


def print_table(metrics):
    o, cell = metrics["oracle"], lambda v, w: ("-" if v is None else f"{v:.3f}").rjust(w)
    print(f"\n{metrics['dataset']}, {metrics['method']}, step {metrics['step']}; bits/dim on {metrics['test_images']} test images, errors per image "
          f"against the oracle on {o['images']}\n  steps  bits/dim      se     gap  |-oracle|   corr  Euler bits/dim      FID")
    print(f" oracle{cell(o['bpd'], 10)}{cell(o['se'], 8)}" + (f"   (Euler, 1024 steps: {o['euler_1024_bpd']:.3f})" if "euler_1024_bpd" in o else ""))
    for k, row in metrics["steps"].items():
        names = (("bpd", 10), ("se", 8), ("gap", 8), ("mae_oracle", 11), ("corr", 7), ("euler_bpd", 16))
        print(k.rjust(7) + "".join(cell(row[n], w) for n, w in names) + (cell(row["fid"], 9) if not metrics["fid_not_run"] else "  not run"))
    if metrics["fid_not_run"]:
        print(f"FID not run: {metrics['fid_not_run']}")


# ---------------------------------------------------------------------------------- the command line
def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="cifar10", help="cifar10 (default), imagenet64, celeba64 or a folder of images, with train/ and test/ or without")
    add("--data", type=Path, default=Path("data"), help="where the named datasets and the FID network are or go; default data/")
    add("--image-size", type=int, default=32, help="side in pixels, for a folder; default 32")
    add("--method", choices=RECIPES, default="meanflow", help="flow trains a teacher; default meanflow")
    add("--no-divergence", action="store_true", help="the sampling-only baseline: no divergence head")
    add("--teacher", type=Path, metavar="CKPT", help="its v and div v replace the noisy targets; with --eval, it is the oracle")
    add("--init", type=Path, metavar="CKPT", help="start from these weights (default: the teacher's); a missing head is added")
    add("--paper", action="store_true", help="the paper's recipe in training and evaluation: everything marked ours in f2d2.py is off")
    for name in ("steps", "batch-size", "warmup"):
        add(f"--{name}", type=int, help={"steps": "training steps", "batch-size": "images a step, over all processes",
            "warmup": "steps at the start that train the velocity part alone; 0 with --init"}[name] + " (default: the method's recipe)")
    for name in ("lr", "ema", "dropout"):
        add(f"--{name}", type=float, help="default: the method's recipe")
    add("--channels", type=int, default=128, help="of the U-Net; default 128")
    add("--blocks", type=int, default=4, help="residual blocks a level; default 4")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="default runs/image/<dataset>-<method>-<seed>; a run that is there goes on")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default cuda if there is one")
    add("--amp", choices=["bf16"], help="bfloat16 autocast, where nothing is differentiated twice: flow, and shortcut* --no-divergence")
    add("--compile", action="store_true", help="torch.compile the objective")
    add("--eval", type=Path, metavar="CKPT", help="no training: the table of this checkpoint")
    add("--test-images", type=int, default=10_000, help="for bits/dim, at most; default 10000")
    add("--oracle-images", type=int, default=64, help="for the errors per image; default 64")
    add("--oracle-steps", type=int, default=64, help="midpoint steps on the geometric grid; default 64")
    add("--oracle-euler", action="store_true", help="print the paper's oracle beside it: 1024 uniform Euler steps")
    add("--mirror", action="store_true", help="the paper's forward-only likelihood")
    add("--guidance", type=float, default=0.0, metavar="LR", help="self-guidance of the samples with this learning rate")
    add("--guidance-iterations", type=int, default=1)
    add("--num-fid-samples", type=int, default=50_000)
    add("--fid-network", type=Path, help="TorchScript, called as net(uint8 [N, 3, H, H], return_features=True)")
    return parser, parser.parse_args(argv)


def settle(args, world):
    """Fills in the recipe's defaults, and refuses what cannot work, before anything is read or written."""
    recipe, named = RECIPES[args.method], {"cifar10": 32, "imagenet64": 64, "celeba64": 64}
    for name in ("steps", "batch_size", "lr", "ema", "dropout"):
        setattr(args, name, recipe[name] if getattr(args, name) is None else getattr(args, name))
    try:
        torch.zeros(1, device=args.device)
    except Exception:
        raise BadInput(f"no device {args.device} on this machine: use --device cpu.")
    for wrong, sentence in (
        (args.dataset not in named and not Path(args.dataset).is_dir(),
         f"no dataset or folder {args.dataset}: use {', '.join(named)} or the path of a folder of images."),
        (min(args.steps, args.batch_size, args.channels, args.blocks, args.image_size) < 1,
         "--steps, --batch-size, --channels, --blocks and --image-size must be at least 1."),
        (args.batch_size % world, f"--batch-size {args.batch_size} is not divisible by the {world} processes: use a multiple of {world}."),
        (args.method == "shortcut-distill" and not args.teacher and not args.eval, "shortcut-distill needs --teacher CKPT: make one with "
         f"python train_image.py --dataset {args.dataset} --method flow and pass its latest.pt, or use --method shortcut."),
        (args.teacher and args.method in ("flow", "shortcut") and not args.eval,
         f"--method {args.method} learns from data alone: drop --teacher, or use --method shortcut-distill."),
        (args.amp and not (args.method == "flow" or args.no_divergence and recipe["condition"] == "semigroup"),
         "--amp bf16 is for --method flow and for shortcut methods with --no-divergence: derivatives need float32, so drop it."),
    ):
        if wrong:
            raise BadInput(sentence)
    forward = args.paper and recipe["condition"] in ("semigroup", "eulerian")
    args.no_divergence |= args.method == "flow"
    args.mirror |= forward
    args.image_size = named.get(args.dataset, args.image_size)
    args.data_folder = args.data if args.dataset in named else Path(args.dataset)
    if args.warmup is None:
        args.warmup = 0 if args.init or args.no_divergence else round(recipe["warmup"] * args.steps)
    args.lr_warmup = max(1, min(10_000, args.steps // 20))
    args.out = args.out or (args.eval.parent if args.eval else Path("runs/image") / f"{Path(args.dataset).name}-{args.method}-{args.seed}")
    velocity_weight, divergence_weight = recipe["weight"]
    args.loss = dict(velocity_weight=velocity_weight, divergence_weight="none" if args.paper else divergence_weight,
                     diagonal=recipe["diagonal"], own_tangent=not args.paper, probe="rademacher" if args.paper else "dct")
    args.times = dict(direction="forward" if forward else "both", **(dict(log_time=0.0, dyadic=0.0) if args.paper else {}))


def run(args):
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if args.eval:  # the checkpoint says what it is
        found = load_checkpoint(args.eval, "cpu")["config"]
        args.dataset, args.method, args.image_size = found["dataset"], found["method"], found["model"]["image_size"]
        args.paper, args.seed = args.paper or found["paper"], found["seed"]
    settle(args, world)
    model = dict(image_size=args.image_size, channels=args.channels, blocks=args.blocks, dropout=args.dropout,
                 head=not args.no_divergence, ours=not args.paper)
    config = {k: getattr(args, k) for k in ("dataset", "method", "paper", "seed", "batch_size", "lr", "warmup", "ema", "amp")}
    config |= dict(model=model, teacher=args.teacher and str(args.teacher), init=args.init and str(args.init))
    if not args.eval and (args.out / "latest.pt").exists():  # more --steps are welcome, anything else is another run
        found = load_checkpoint(args.out / "latest.pt", "cpu")["config"]
        if found != config:
            wrong = ", ".join(f"{k} is {found.get(k)} and not {config[k]}" for k in config if found.get(k) != config[k])
            raise BadInput(f"{args.out} holds another run, whose {wrong}: choose another --out.")
    if world > 1:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" else args.device
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    device = torch.device(args.device)
    teacher, start = (path and load_model(path, device) for path in (args.teacher, args.init))
    for path, net in ((args.teacher, teacher), (args.init, start)):
        if net and net.config["model"]["image_size"] != args.image_size:
            raise BadInput(f"{path} has another image size ({net.config['model']['image_size']}) than the data ({args.image_size}).")
    if rank > 0:  # one process downloads and writes the caches
        dist.barrier()
    train_data, test_data = load_data(args)
    if world > 1 and rank == 0:
        dist.barrier()

    if args.eval:
        flow = load_model(args.eval, device)
        return print_table(evaluate(args, flow, teacher, train_data, test_data))
    torch.manual_seed(args.seed)
    try:
        flow, start = build(model, device), start or teacher
        if start:
            flow.backbone.load_state_dict(start.backbone.state_dict())
            if start.head and flow.head:
                flow.head.load_state_dict(start.head.state_dict())
    except (ValueError, RuntimeError) as error:
        raise BadInput(f"this network cannot be made: {str(error).splitlines()[0]} Use the --channels, --blocks and --paper of {args.init or args.teacher}.")
    average = lambda ema, now, n: torch._foreach_lerp_(ema, now, max(1 - args.ema, 9 / (10 + int(n))))  # a short memory early on
    ema = AveragedModel(flow, multi_avg_fn=average).requires_grad_(False)
    args.out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        count = lambda net: f"{sum(p.numel() for p in net.parameters()):,}"
        print(f"{args.out}: {len(train_data):,} train and {len(test_data):,} test images of {args.image_size}x{args.image_size}; {count(flow)} "
              f"parameters{f', {count(flow.head)} in the head' if flow.head else ''}; {config | dict(steps=args.steps)}", flush=True)
    if train_data.numel() < 2**32:  # small data live on the device
        train_data = train_data.to(device)
    train(args, config, flow, ema, teacher, train_data, rank, world, device)
    if rank == 0:
        done = args.out / "metrics.json"
        stale = not done.exists() or json.loads(done.read_text())["step"] != args.steps
        print_table(evaluate(args, load_model(args.out / "latest.pt", device), teacher, train_data, test_data) if stale else json.loads(done.read_text()))
    if world > 1:
        dist.destroy_process_group()


def main(argv=None):
    parser, args = parse(argv)
    try:
        run(args)
    except BadInput as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
