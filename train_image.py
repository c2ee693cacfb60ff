"""F2D2 on images: train, go on, evaluate, sample; on one GPU, several, or a CPU.

python train_image.py --dataset cifar10 --method flow                   a teacher
python train_image.py --dataset cifar10 --method shortcut-distill --teacher CKPT
python train_image.py --dataset cifar10 --method meanflow               from data alone
python train_image.py --eval CKPT --dataset FOLDER                      log p of any images
python train_image.py --eval CKPT --sample 64                           images and their log p
torchrun --nproc-per-node 8 train_image.py ...                          training on eight GPUs
"""

import argparse
import codecs
import copy
import csv
import fcntl
import glob
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import distributed, nn
from torchvision import datasets, utils

import f2d2

# fmt: off
TABLE = {                # the method's own code, but for what is marked [ours]
    "method":      ("flow", "shortcut", "shortcut-distill", "meanflow", "lsd"),
    "condition":   (None,     "semigroup", "semigroup", "eulerian", "lagrangian"),
    "forward":     (False,    True,        True,        True,       False),  # times of --paper
    "optimizer":   ("RAdam",  "RAdam",     "RAdam",     "Adam",     "RAdam"),
    "lr":          (1e-4,     1e-4,        1e-4,        6e-4,       1e-4),
    "batch_size":  (512,      512,         512,         1024,       256),
    "steps":       (586_000,  645_000,     645_000,     800_000,    800_000),  # [ours] lsd
    "warm_share":  (0.0,      10 / 11,     10 / 11,     0.5,        0.5),  # [ours] meanflow, lsd
    "dropout":     (0.13,     0.13,        0.13,        0.2,        0.0),
    "flip":        (0.0,      0.0,         0.0,         0.5,        0.5),  # [ours] lsd
    "head":        (False,    True,        True,        True,       True),
    "diagonal":    (1.0,      0.5,         0.5,         0.25,       0.5),
    "clip":        (0.01,     0.01,        0.01,        math.inf,   1.0),
    "half_life":   (50e6,     50e6,        50e6,        7.1e6,      1.8e6),  # images in the average
    "decay_after": (math.inf, math.inf,    math.inf,    math.inf,   35_000),  # steps, then 1/sqrt
}
# fmt: on
RECIPES = {name: {k: TABLE[k][i] for k in TABLE} for i, name in enumerate(TABLE["method"])}

SIZES = {"cifar10": 32, "imagenet64": 64, "celeba64": 64}
CELEBA_BOX = (19, 39, 159, 179)  # the central 140 pixels
SOURCES = "www.cs.toronto.edu/~kriz, image-net.org or mmlab.ie.cuhk.edu.hk/projects/CelebA"
STEP_COUNTS = (8, 4, 2, 1)
ORACLE_STEPS = 64  # of the midpoint rule: 128 NFE
ORACLE_RUNS = 8  # averaged, because one probe a step is noise of 0.05 bits/dim on 12x12 pixels
FID_SAMPLES = 50_000
CHUNK = 250  # images at a time in an evaluation
SAVE_SECONDS = 15 * 60


# --------------------------------------------------------------------------- the options
BadInput = argparse.ArgumentTypeError  # one sentence: what is wrong, what to type; exit code 2


def require(right, sentence):
    if not right:
        raise BadInput(sentence)


def between(low, high=math.inf):
    """An argparse type: a number in [low, high], whole if low is."""

    def number(text):
        value = type(low)(text)
        require(low <= value <= high, f"{text} is not between {low} and {high}")
        return value

    return number


DEVICES = [d for d in ("cuda", "mps", "cpu") if torch.get_device_module(d).is_available()]

# Options of an evaluation too. What is not typed is the checkpoint's, the method's or the default.
EVALUATION = argparse.ArgumentParser(add_help=False)
option = EVALUATION.add_argument
option("--dataset", help="cifar10 (the default), imagenet64, celeba64 or a folder of images")
option("--data", type=Path, default="data", help="where named data sets are or go; default data/")
option("--teacher", metavar="CKPT", help="gives v and div v, and the oracle")
option("--paper", action="store_true", help="the paper's objective; mirrored log p but for lsd")
option("--seed", type=between(0, 2**64 - 1), default=0, help="default 0, with --eval CKPT's")
option("--out", type=Path, help="default below runs/image/ or beside CKPT; a run there goes on")
option("--device", choices=DEVICES, default=DEVICES[0], help=f"default here {DEVICES[0]}")
option("--eval", type=Path, metavar="CKPT", help="no training: log p of --dataset's test images")
option("--sample", type=between(1), metavar="N", help="with --eval: N images and their log p")
option("--oracle-images", type=between(1), default=64, help="that the oracle measures; default 64")
option("--guidance", type=between(1e-9, 10.0), help="with --eval: learning rate of self-guidance")
option("--fid-network", type=Path, help="TorchScript, StyleGAN2-ADA's inception-2015-12-05.pt")

PARSER = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__, parents=[EVALUATION])
PARSER.formatter_class = argparse.RawDescriptionHelpFormatter
option = PARSER.add_argument
option("--method", choices=RECIPES, default="meanflow", help="default meanflow; flow: a teacher")
option("--no-divergence", dest="head", action="store_false", help="sampling only, without a head")
option("--init", type=Path, metavar="CKPT", help="weights to start from; default the teacher's")
option("--image-size", type=between(4), help="pixels a side, for a folder; default 32")
option("--channels", type=between(4), default=128, help="of the U-Net; default 128")
option("--blocks", type=between(1), default=4, help="residual blocks a level; default 4")
option("--dropout", type=between(0.0, 0.9), help="probability; default the method's")
option("--steps", type=between(1), help="of training; default the method's")
option("--warmup", type=between(0), help="steps of u alone; default the method's, 0 with --init")
option("--batch-size", type=between(1), help="images a step, in all; default the method's")
option("--micro-batch", type=between(1), help="how many at a time in a process; default 128")
option("--lr", type=between(1e-9, 1.0), help="learning rate; default the method's")
option("--compile", action="store_true", help="torch.compile the loss")

SHAPE = ("image_size", "colours", "channels", "blocks")  # a student's is its teacher's
NETWORK = (*SHAPE, "paper", "dropout")
CONFIG = (*NETWORK, "method", "head", "dataset", "seed", "batch_size", "lr", "warmup")
CONFIG += ("teacher", "teacher_sha256", "init_sha256")  # the config of a checkpoint


# --------------------------------------------------------------------------- the network
class GroupNorm(nn.GroupNorm):
    """Groups of four channels at least: groups of one would forget every channel's size."""

    def __init__(self, channels):
        super().__init__(math.gcd(channels, channels // 4, 32), channels)

    def forward(self, x):
        if not torch.compiler.is_compiling():
            return super().forward(x)
        # In two steps, because torch.compile knows no jvp of both in one.
        normed = nn.functional.group_norm(x, self.num_groups)
        return normed * self.weight[:, None, None] + self.bias[:, None, None]


class Block(nn.Module):
    """x [B, c_in, H, H], embedding [B, E] -> [B, c_out, H', H'], a residual of two convolutions."""

    def __init__(self, c_in, c_out, embedding, dropout=0.0, attention=False, resize=None):
        super().__init__()
        self.resize = resize or nn.Identity()
        self.before = nn.Sequential(GroupNorm(c_in), nn.SiLU(), self.resize)
        self.before.extend([nn.Conv2d(c_in, c_out, 3, padding=1), GroupNorm(c_out)])
        self.modulate = nn.Linear(embedding, 2 * c_out)
        self.after = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(c_out, c_out, 3, 1, 1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.qkv = nn.Sequential(GroupNorm(c_out), nn.Conv2d(c_out, 3 * c_out, 1))
        self.merge = nn.Conv2d(c_out, c_out, 1)
        for last in (*self.after[-1].parameters(), *self.merge.parameters()):
            nn.init.zeros_(last)  # every block starts as its skip
        if not attention:
            self.qkv = self.merge = None

    def forward(self, x, embedding):
        scale, shift = self.modulate(embedding)[..., None, None].chunk(2, 1)
        x = self.skip(self.resize(x)) + self.after(self.before(x) * (1 + scale) + shift)
        if self.qkv is None:
            return x
        q, k, v = self.qkv(x).flatten(2).chunk(3, 1)  # [B, C, positions]
        # Written out, because torch's fused attention has no forward-mode derivative.
        weights = (q.transpose(1, 2) @ k / math.sqrt(q.shape[1])).softmax(2)
        return x + self.merge((v @ weights.transpose(1, 2)).reshape(x.shape))


class UNet(nn.Module):
    """x [B, colours, H, H], t and s [B] -> u like x, features [B, feature_dim]; DDPM++ of Song
    et al., "Score-Based Generative Modeling through Stochastic Differential Equations"."""

    def __init__(self, image_size=32, channels=128, blocks=4, dropout=0.0, colours=3, paper=False):
        super().__init__()
        if image_size % 4:
            raise ValueError(f"image_size {image_size} is no multiple of 4.")
        self.paper = paper
        width = 2 * channels
        times = nn.Linear(8 if paper else 10, width)
        self.embed = nn.Sequential(times, nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.stem = nn.Conv2d(colours, channels, 3, padding=1)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        skips = [channels]
        attend = [image_size >> level == 16 for level in (0, 1, 2)]
        for level in (0, 1, 2):
            for resize in [nn.AvgPool2d(2)] * (level > 0) + [None] * blocks:
                self.down.append(Block(skips[-1], width, width, dropout, attend[level], resize))
                skips.append(width)
        self.middle = nn.ModuleList([Block(width, width, width, dropout, a) for a in (True, False)])
        for level in (2, 1, 0):
            for resize in [nn.Upsample(scale_factor=2)] * (level < 2) + [None] * (blocks + 1):
                c_in = width if resize else width + skips.pop()
                self.up.append(Block(c_in, width, width, dropout, attend[level], resize))
        self.norm = nn.Sequential(GroupNorm(width), nn.SiLU())
        self.out = nn.Conv2d(width, colours, 3, padding=1)
        self.feature_dim = 3 * width

    def forward(self, x, t, s):
        embedding = self.embed(f2d2.time_features(t, s, self.paper))
        skips = [self.stem(x)]
        for block in self.down:
            skips.append(block(skips[-1], embedding))
        h = self.middle[1](self.middle[0](skips[-1], embedding), embedding)
        bottleneck = h.mean((2, 3))
        for block in self.up:
            doubling = isinstance(block.resize, nn.Upsample)
            h = block(h if doubling else torch.cat([h, skips.pop()], 1), embedding)
        size = (h.square().mean((2, 3)) + 1e-4).log()  # log p hangs on it, and the norm forgets it
        h = self.norm(h)
        return self.out(h), torch.cat([bottleneck, h.mean((2, 3)), size], 1)


def build(config, device):
    """The untrained joint flow map of a config."""
    unet = UNet(**{k: config[k] for k in NETWORK})
    return f2d2.JointFlowMap(unet, unet.feature_dim, config["head"], config["paper"]).to(device)


# --------------------------------------------------------------------------- images
def to_bytes(x):
    """Inverts dequantize."""
    return ((x + 1) * 128).floor().clamp(0, 255).to(torch.uint8)


def read_image(path, size, box=None):
    """uint8 [H, H, 3], turned, on white, cropped to box and square. BadInput: pixels of 32 bits."""
    image = ImageOps.exif_transpose(Image.open(path)).crop(box)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    require(image.mode not in ("I", "F"), "pixels of 32 bits, whose white is not known")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return np.asarray(ImageOps.fit(image, (size, size), Image.BICUBIC))


def read_folder(folder, size):
    """{path: image}: every file that is not hidden, once, links followed; says what it left out."""
    paths = [folder / name for name in sorted(glob.glob("**/*", root_dir=folder, recursive=True))]
    paths = {path.resolve(): path for path in paths if path.is_file()}.values()
    images = {}
    left_out = {}
    for path in paths:
        try:
            images[str(path)] = read_image(path, size)
        except Exception as error:  # whatever a file may raise
            reason = str(error) if isinstance(error, BadInput) else "no image that can be read"
            left_out.setdefault(reason, []).append(path)
    print(f"images: {folder}")
    for reason, files in left_out.items():
        print(f"left out {len(files)} of {len(paths)} files ({reason}), the first is {files[0]}")
    return images


def folder_splits(root, size, held_out):
    """train and test {path: image}: the user's train/ with test/, val/ or valid/, in any case, or
    about a tenth, by name, as the test split; without held_out test alone, the user's or all."""
    folders = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    test = folders.get("test") or folders.get("val") or folders.get("valid")
    if not held_out:
        return {"test": read_folder(test or root, size)}
    both = ("train" in folders) == bool(test)
    require(both, f"{root} has only one of train/ and test/ (or val/): make both, or neither.")
    if test:
        return {"train": read_folder(folders["train"], size), "test": read_folder(test, size)}
    print(f"about a tenth of {root}, chosen by name, is held out as test images")
    train = read_folder(root, size)
    digests = {path: hashlib.md5(os.fsencode(Path(path).name)).digest() for path in train}
    last = max(bytes([25]), min(digests.values(), default=b""))  # 25 of 256
    test = {path: train.pop(path) for path, digest in digests.items() if digest <= last}
    return {"train": train, "test": test}


def named_splits(dataset, root):
    """train and test {index: image [H, H, 3]} of a published data set."""
    try:
        if dataset == "cifar10":
            splits = [datasets.CIFAR10(root, train, download=True).data for train in (True, False)]
        elif dataset == "celeba64":
            splits = [[], [], []]  # train, validation, test
            for name, part in np.loadtxt(root / "celeba/list_eval_partition.txt", str):
                image = read_image(root / "celeba/img_align_celeba" / name, 64, CELEBA_BOX)
                splits[int(part)].append(image)
        else:  # one row an image, planes R, G, B; numpy refuses pickles
            files = [[f"train_data_batch_{i}.npz" for i in range(1, 11)], ["val_data.npz"]]
            rows = [np.concatenate([np.load(root / f)["data"] for f in split]) for split in files]
            splits = [r.reshape(-1, 3, 64, 64).transpose(0, 2, 3, 1) for r in rows]
    except Exception as error:  # whatever half a download may raise
        raise BadInput(f"{dataset} is not in {root} ({error}): see {SOURCES}.") from error
    return {"train": dict(enumerate(splits[0])), "test": dict(enumerate(splits[-1]))}


def load_data(dataset, root, size, colours=None, held_out=True):
    """{"train": (uint8 [N, colours, H, H], names), "test": ...}. One colour if all in a folder are
    grey and no checkpoint wants three; held_out as in folder_splits."""
    named = dataset in SIZES
    splits = named_splits(dataset, root) if named else folder_splits(Path(dataset), size, held_out)
    coloured = named or any(np.ptp(i, 2).any() for part in splits.values() for i in part.values())
    require(not coloured or colours != 1, f"{dataset} has colours, and the checkpoint knows grey.")
    colours = colours or (3 if coloured else 1)
    data = {}
    for split, images in splits.items():
        require(images, f"{dataset} holds no {split} images that can be read.")
        array = torch.from_numpy(np.stack(list(images.values()))[..., :colours])
        data[split] = array.permute(0, 3, 1, 2).contiguous(), list(images)
    print(", ".join(f"{len(i)} {split}" for split, i in splits.items()), "images", flush=True)
    return data


# --------------------------------------------------------------------------- files
def save(path, content):
    """Makes of content a file of path's kind, whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            if path.suffix == ".pt":
                torch.save(content, file)
            elif path.suffix == ".png":  # uint8 [N, colours, H, H], eight in a row
                utils.save_image(content / 255, file, "png", padding=1)
            elif path.suffix == ".csv":
                csv.writer(codecs.getwriter("utf-8")(file, "surrogateescape")).writerows(content)
            else:
                finite = json.loads(json.dumps(content), parse_constant=lambda nan: None)
                file.write(json.dumps(finite, indent=1).encode())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def load(path):
    """A checkpoint and its averaged "network", frozen, on the CPU; never executes anything."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["sha256"] = sha256(path)
        require(set(CONFIG) <= set(state["config"]), "its config is not whole")
        state["network"] = build(state["config"], "cpu").eval().requires_grad_(False)
        for part in ("flow", "ema"):  # the average, loaded last, stays
            state["network"].load_state_dict(state[part])
            sound = [w.dtype == torch.float32 and w.isfinite().all() for w in state[part].values()]
            require(all(sound), "its weights are not finite numbers of 32 bits")
        whole = type(state["step"]) is int and state["optimizer"]["param_groups"][0]["params"]
        require(whole, "it has no step or no optimizer")
        return state
    except Exception as error:  # whatever may be in that file
        raise BadInput(f"{path} is no checkpoint of this script ({error!r:.99}).") from error


# --------------------------------------------------------------------------- training
def draw(data, args, step, rank, world):
    """This rank's x1, x0, t, s, eps of the global batch: a function of (seed, step), so that a run
    that goes on, and any number of processes and pieces, sees the same."""
    seed, dropout_seed = np.random.SeedSequence([args.seed, step]).generate_state(2)
    torch.manual_seed(int(dropout_seed) + rank)
    g = torch.Generator(args.device).manual_seed(int(seed))
    size = {"size": (args.batch_size,), "device": args.device, "generator": g}
    images = data[torch.randint(len(data), **size).to(data.device)].to(args.device)
    flip = torch.rand(**size)[:, None, None, None] < args.flip
    x1 = f2d2.dequantize(torch.where(flip, images.flip(3), images), generator=g)
    x0 = torch.randn(x1.shape, device=args.device, generator=g)
    t, s = f2d2.sample_times(x1, 0.0 if args.paper else 0.5, args.paper and args.forward, g)
    if args.paper and args.method == "meanflow":  # 1 - t is logit-normal(-2, 2)
        logits = torch.stack([torch.randn(**size), torch.randn(**size)])
        t, s = torch.sigmoid(2 + 2 * logits).sort(0)[0]
    eps = f2d2.hutchinson_probe(x1, "rademacher" if args.paper else "dct", g)
    return [a[rank::world] for a in (x1, x0, t, s, eps)]


def accumulate(objective, batch, n, count):
    """Gradients and terms of the mean loss over the batch, in `count` pieces. The tangent condition
    has the first n rows. A piece is every count-th row; a term counts by its share of the rows."""
    totals = dict.fromkeys(("vm", "u", "div", "D"), 0.0)
    for i in range(count):
        piece = [a[i::count] for a in batch]
        first = len(range(i, n, count))
        losses = objective(*piece, diagonal=first / len(piece[0]))
        rest = (len(piece[0]) - first) / (len(batch[0]) - n) if n < len(batch[0]) else 1.0
        shares = {"vm": first / n, "div": first / n, "u": rest, "D": rest}
        losses = {name: shares[name] * loss for name, loss in losses.items()}
        sum(losses.values()).backward()
        totals = {name: totals[name] + loss.detach() for name, loss in losses.items()}
    return totals


@torch.no_grad()
def update(args, step, flow, ema, optimizer):
    """One step of optimizer and average from the gradients of all processes, whose norm returns."""
    # Learning rate: up for a twentieth or 10,000 steps; lsd's falls; [ours] to 0 at the end.
    ramp = step / max(1, min(10_000, args.steps // 20))
    decay = (args.decay_after / step) ** 0.5
    end = math.inf if args.paper else 4 - 4 * (step - 1) / args.steps
    optimizer.param_groups[0]["lr"] = args.lr * min(1, ramp, decay, end)
    if args.world > 1:
        gradients = [p.grad for p in flow.parameters() if p.grad is not None]
        mean = nn.utils.parameters_to_vector(gradients) / args.world
        distributed.all_reduce(mean)
        nn.utils.vector_to_parameters(mean, gradients)
    norm = nn.utils.clip_grad_norm_(flow.parameters(), args.clip)
    optimizer.step()
    half_life = min(args.half_life, 0.05 * step * args.batch_size)  # in images
    new = 1 - 0.5 ** (args.batch_size / half_life)
    torch._foreach_lerp_(list(ema.parameters()), list(flow.parameters()), new)
    return norm


def prepare(args, source):
    """What to train, and its step: of --out's run, else of `source`; settles args.warmup."""
    path = args.out / "latest.pt"
    state = load(path) if path.exists() else None
    if args.warmup is None:
        share = 0 if args.init else args.warm_share
        args.warmup = state["config"]["warmup"] if state else int(share * args.steps)
    torch.manual_seed(args.seed)
    flow = build(vars(args), args.device)
    if source:
        flow.load_state_dict(source["ema"], strict=False)  # it may have no head
    parts = {"flow": flow, "ema": copy.deepcopy(flow).eval().requires_grad_(False)}
    parts["optimizer"] = getattr(torch.optim, args.optimizer)(flow.parameters(), args.lr)
    if state:
        other = [k for k in CONFIG if state["config"][k] != vars(args)[k] and k != "teacher"]
        require(not other, f"{args.out} holds a run of other {', '.join(other)}: change --out.")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    return parts, state["step"] if state else 0


def train(args, source, velocity, images):
    """Trains to --steps, from where the run in --out is; saves by the clock and at the end."""
    parts, first = prepare(args, source)
    flow = parts["flow"]
    print(f"{sum(p.numel() for p in flow.parameters()):,} parameters; {vars(args)}", flush=True)
    images = images.to(args.device) if images.numel() < 2**32 else images
    loss = torch.compile(f2d2.f2d2_loss) if args.compile else f2d2.f2d2_loss
    headless = f2d2.JointFlowMap(flow.backbone, flow.feature_dim, divergence_head=False)

    def objective(x1, x0, t, s, eps, diagonal):
        f = flow if step > args.warmup else headless
        draws = {"x0": x0, "t": t, "s": s, "probe": eps, "diagonal": diagonal}
        return loss(f, x1, args.condition, velocity, paper=args.paper, **draws)

    # Every piece has rows of the tangent condition, n in all, and of the others.
    share = args.batch_size // args.world
    n = max(1, round(args.diagonal * share))
    most = min(n, share - n) or share  # flow has no others
    pieces = min(math.ceil(share / args.micro_batch), most)
    began = saved = time.time()
    step = first + 1
    while step <= args.steps:
        flow.zero_grad()
        try:
            batch = draw(images, args, step, args.rank, args.world)
            losses = accumulate(objective, batch, n, pieces)
        except RuntimeError as error:
            if "out of memory" not in str(error):  # Apple's GPU raises no OutOfMemoryError
                raise
            require(pieces < most, "out of memory at the smallest piece: lower --channels.")
            pieces = min(2 * pieces, most)
            print(f"out of memory: {math.ceil(share / pieces)} images at a time from here on")
            continue
        losses["grad"] = update(args, step, **parts)

        due = args.rank == 0 and (step == args.steps or time.time() - saved > SAVE_SECONDS)
        if due or step % max(1, min(100, args.steps // 50)) == 0:
            finite = torch.stack(list(losses.values())).isfinite().all()
            require(finite, f"the loss is not finite at step {step}: lower --lr, in another --out.")
            terms = " ".join(f"{name} {value:.4g}" for name, value in losses.items())
            speed = (step - first) / (time.time() - began)
            line = f"{step}/{args.steps}: {terms} | {args.batch_size * speed:.0f} images/s"
            print(f"{line}, {(args.steps - step) / speed:.0f} s left", flush=True)
        if due:
            state = {"config": {k: vars(args)[k] for k in CONFIG}, "step": step}
            state |= {name: part.state_dict() for name, part in parts.items()}
            save(args.out / "latest.pt", state)
            save(args.out / "progress.png", sheet(args, parts["ema"]))
            saved = time.time()
        step += 1


# --------------------------------------------------------------------------- evaluation
def few_steps(args, flow, x0, k):
    """Images, and their log p if there is a head, in k steps from x0, which --guidance moves."""
    if args.guidance:
        x0 = torch.cat([f2d2.self_guidance(flow, a, args.guidance) for a in x0.split(32)])
    if args.method == "flow":  # no few-step map: Euler steps
        return f2d2.ode_sample(flow.velocity, x0, k, euler=True), None
    return f2d2.sample(flow, x0, k)


def noise(args, n, seed=0):
    shape = (n, args.colours, args.image_size, args.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sheet(args, flow):
    """Images of the same noise, a row for each number of steps."""
    x0 = noise(args, 8).to(args.device)
    return to_bytes(torch.cat([few_steps(args, flow, x0, k)[0] for k in STEP_COUNTS]))


def chunked(args, what, x, function, first, *options):
    """function(first, x, *options), some images at a time; says at times how long it will take."""
    began = said = time.time()
    results = []
    for part in x.split(CHUNK):
        results.append(function(first, part.to(args.device), *options).cpu())
        if time.time() - said > 30:
            said = time.time()
            done = len(results) / math.ceil(len(x) / CHUNK)
            print(f"{what}: {done:.0%}, {(said - began) * (1 / done - 1):.0f} s left", flush=True)
    return torch.cat(results).double()


def frechet_distance(a, b):
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of features a, b [N, F]."""
    S_a, S_b = a.T.cov(), b.T.cov()
    cross = torch.linalg.eigvals(S_a @ S_b).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + S_a.trace() + S_b.trace() - 2 * cross).item()


def fid(args, flow, images):
    """{steps: FID against these images}."""
    inception = torch.jit.load(str(args.fid_network), args.device).eval()

    def features(k, x):
        made = to_bytes(few_steps(args, flow, x, k)[0]) if k else x
        return inception(made.expand(-1, 3, -1, -1), return_features=True)

    real = chunked(args, "FID, train images", images, features, None)
    x0 = noise(args, FID_SAMPLES)
    made = {k: chunked(args, f"FID, {k} steps", x0, features, k) for k in STEP_COUNTS}
    return {k: frechet_distance(real, made[k]) for k in STEP_COUNTS}


@torch.no_grad()
def evaluate(args, flow, velocity, data, about):
    """bits/dim of the test images at 8, 4, 2, 1 steps, errors against the oracle, FID. Writes
    metrics.json, log_p.csv, extremes.png (likeliest first) and samples.png (a row a step count)."""
    images, names = data["test"]
    torch.manual_seed(0)  # of the probes; the bytes' noise depends on an image's row alone
    x = f2d2.dequantize(images, generator=torch.Generator().manual_seed(0))
    some = torch.linspace(0, len(x) - 1, min(args.oracle_images, len(x))).long()

    def mean(bpd):
        return {"bpd": bpd.mean().item(), "se": (bpd.std() / len(bpd) ** 0.5).item()}

    ode = (f2d2.ode_log_likelihood, velocity, ORACLE_STEPS, "rademacher" if args.paper else "dct")
    runs = [chunked(args, f"oracle {i}", x[some], *ode) for i in range(1, ORACLE_RUNS + 1)]
    oracle = f2d2.bits_per_dim(torch.stack(runs).mean(0), x[0].numel())
    distances = fid(args, flow, data["train"][0]) if args.fid_network else {}
    columns = {}
    rows = {}
    for k in STEP_COUNTS:
        rows[k] = {"nfe_sample": k + 2 * bool(args.guidance), "fid": distances.get(k)}
        if args.head:
            log_p = chunked(args, f"{k} steps", x, f2d2.log_likelihood, flow, k, args.mirror)
            bpd = f2d2.bits_per_dim(log_p, x[0].numel())
            columns[f"{k} steps"] = bpd.tolist()
            error = bpd[some] - oracle
            corr = torch.corrcoef(torch.stack([bpd[some], oracle]))[0, 1]
            rows[k] |= mean(bpd) | {"gap": error.mean().item(), "corr": corr.item()}
            rows[k]["mae_oracle"] = error.abs().mean().item()

    known = dict(zip(some.tolist(), oracle.tolist()))
    columns["oracle"] = [known.get(i, "") for i in range(len(x))]
    save(args.out / "log_p.csv", [["image", *columns], *zip(names, *columns.values())])
    if args.head:
        order = np.argsort(columns[f"{STEP_COUNTS[0]} steps"])
        save(args.out / "extremes.png", images[np.r_[order[:32], order[-32:]]])
    save(args.out / "samples.png", sheet(args, flow))
    whose = f"the ODE of {args.teacher}" if args.teacher else "its own ODE"
    slow = mean(oracle) | {"of": whose, "nfe": 2 * ORACLE_STEPS * ORACLE_RUNS, "images": len(some)}
    save(args.out / "metrics.json", about | {"images": len(x), "steps": rows, "oracle": slow})

    print(f"\n{args.dataset}: {len(x)} images, step {about['step']}; oracle: {whose}")
    print("  steps bits/dim       se      gap |-oracle|     corr      FID")
    for k, row in {"oracle": slow, **rows}.items():
        cells = [row.get(key) for key in ("bpd", "se", "gap", "mae_oracle", "corr", "fid")]
        print(f"{k:>7}", *("-".rjust(8) if c is None else f"{c:8.3f}" for c in cells))


def write_samples(args, flow, about):
    """--sample N: N images as PNG, and samples.csv with log p of each in nats."""
    k = STEP_COUNTS[0]
    rows = [["image", "log_likelihood", "sample"]]
    for x0 in noise(args, args.sample, args.seed).split(CHUNK):
        x1, own = few_steps(args, flow, x0.to(args.device), k)
        log_p = f2d2.log_likelihood(flow, x1, k, args.mirror)
        for image, *values in zip(to_bytes(x1), log_p.tolist(), own.tolist()):
            rows.append([f"{len(rows) - 1:05d}.png", *values])
            save(args.out / rows[-1][0], image[None])
    save(args.out / "samples.csv", rows)
    save(args.out / "metrics.json", about | {"steps": k, "nfe": k + 2 * bool(args.guidance)})
    print(f"{args.sample} images in {k} steps, and samples.csv, are in {args.out}")


# --------------------------------------------------------------------------- the command line
def parse(argv):
    """All that a run is: as typed, else as in its checkpoint, else the method's, else the default;
    and the checkpoints, each read once: what it evaluates or starts from, and the teacher."""
    typed = PARSER.parse_args(argv)
    training = EVALUATION.parse_known_args(argv)[1]  # what an evaluation does not know
    require(not (typed.eval and training), f"of no use with --eval: {' '.join(training)}.")
    require(typed.eval or not (typed.sample or typed.guidance), "--sample, --guidance need --eval.")
    others = typed.dataset or typed.teacher or typed.fid_network
    require(not (typed.sample and others), "--sample has no --dataset, --teacher, --fid-network.")
    teacher = load(typed.teacher) if typed.teacher else None
    path = typed.eval or typed.init
    source = load(path) if path else teacher
    keys = CONFIG if typed.eval else SHAPE
    config = {k: source["config"][k] for k in keys if source}
    if typed.eval and not (typed.sample or teacher) and os.path.isfile(config["teacher"] or ""):
        same = sha256(config["teacher"]) == config["teacher_sha256"]
        teacher = load(config["teacher"]) if same else None

    known = {"dataset": "cifar10", "colours": None} | RECIPES[config.get("method", typed.method)]
    # argparse sets its defaults only where the namespace has nothing yet; what is typed wins.
    args = PARSER.parse_args(argv, argparse.Namespace(**known | config))
    args.teacher = teacher and str(Path(args.teacher).resolve())
    args.teacher_sha256 = teacher and teacher["sha256"]
    args.init_sha256 = source and source["sha256"]
    args.image_size = args.image_size or SIZES.get(args.dataset, 32)
    args.mirror = args.paper and args.forward
    args.rank = int(os.environ.get("RANK", 0))
    args.world = int(os.environ.get("WORLD_SIZE", 1))
    args.micro_batch = args.micro_batch or min(128, args.batch_size // args.world)
    args.dataset = args.dataset if args.dataset in SIZES else str(Path(args.dataset).resolve())
    args.held_out = not args.eval or args.dataset in (*SIZES, config["dataset"])
    name = "samples" if args.sample else Path(args.dataset).name
    trained = Path("runs/image", f"{name}-{args.method}-{args.seed}")
    default = args.eval.parent / f"eval-{name}-{source['step']}" if args.eval else trained
    args.out = args.out or default
    return args, source, teacher


def check(args, source, teacher):
    """Refuses what cannot work, before anything is written."""
    started = args.world == 1 or ("RANK" in os.environ and not args.eval)
    require(started, "WORLD_SIZE is set: train with torchrun, evaluate without it, or unset it.")
    if args.dataset not in SIZES and not args.sample:
        found = Path(args.dataset).is_dir()
        require(found, f"{args.dataset} is no folder: name one, or {', '.join(SIZES)}.")
        inside = args.out.resolve().is_relative_to(args.dataset)
        require(not inside, f"{args.out} is inside --dataset, to be read: name another --out.")
    side = SIZES.get(args.dataset, args.image_size)
    require(side == args.image_size, f"--image-size {args.image_size}: {args.dataset} has {side}.")
    require(side % 4 == 0, "--image-size must be a multiple of 4.")
    share, rest = divmod(args.batch_size, args.world)
    require(not rest, f"--batch-size {args.batch_size} is no multiple of {args.world} processes.")
    require(args.micro_batch <= share, f"--micro-batch is at most a process's share, {share}.")
    require(args.head or not (args.sample or args.guidance), "--sample and --guidance need a head.")
    network = not args.fid_network or b"/code/" in args.fid_network.read_bytes()
    require(network, f"{args.fid_network} is no TorchScript network.")
    require(args.held_out or not args.fid_network, "--fid-network needs the training data set.")
    goes_on = not args.eval and (args.out / "latest.pt").exists()
    done = (args.out / "metrics.json").exists() and not goes_on
    require(not done, f"{args.out} holds an evaluation already: name another --out.")
    other = [k for k in SHAPE[:2] if teacher and teacher["config"][k] != vars(args)[k]]
    require(not other, f"{args.teacher} has other {', '.join(other)}.")
    if args.eval:
        return
    taught = args.teacher or args.method != "shortcut-distill"
    require(taught, "shortcut-distill needs --teacher CKPT, a latest.pt of --method flow.")
    alone = not args.teacher or args.method not in ("flow", "shortcut")
    require(alone, f"--method {args.method} has no teacher: drop it, or use shortcut-distill.")
    other = [k for k in (*SHAPE, "paper") if source and source["config"][k] != vars(args)[k]]
    require(not other, f"{args.init or args.teacher} has other {', '.join(other)}.")


def run(args, source, teacher):
    """Trains, but for --eval, and evaluates or samples."""
    velocity = teacher and teacher["network"].to(args.device).velocity
    if not args.sample:
        with open(args.out / ".turn", "w") as turn:
            if args.dataset == "cifar10":  # the first of several processes downloads
                fcntl.flock(turn, fcntl.LOCK_EX)
            data = load_data(args.dataset, args.data, args.image_size, args.colours, args.held_out)
        args.colours = data["test"][0].shape[1]
    if not args.eval:
        train(args, source, velocity, data["train"][0])
    if args.rank == 0:
        state = source if args.eval else load(args.out / "latest.pt")
        flow = state["network"].to(args.device)
        about = {k: vars(args)[k] for k in ("dataset", "seed", "mirror", "guidance")}
        about |= {k: state[k] for k in ("step", "sha256", "config")}
        if args.sample:
            write_samples(args, flow, about)
        else:
            evaluate(args, flow, velocity or flow.velocity, data, about)


def main(argv=None):
    try:
        args, source, teacher = parse(argv)
        check(args, source, teacher)
        args.out.mkdir(parents=True, exist_ok=True)
        if args.world > 1:
            if args.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
        if args.rank > 0:
            sys.stdout = open(os.devnull, "w")
        with open(args.out / f".lock-{args.rank}", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            run(args, source, teacher)
    except BlockingIOError:
        PARSER.error(f"another process works in {args.out}: use another --out.")
    except torch.OutOfMemoryError:
        PARSER.error("out of memory: lower --oracle-images in an evaluation, else --channels.")
    except (BadInput, OSError) as error:
        PARSER.error(" ".join(str(error).splitlines()))


if __name__ == "__main__":
    main()
