# SPDX-License-Identifier: MIT
"""F2D2 on images: train, go on, evaluate, sample; on one GPU, several, or a CPU.

python train_image.py --dataset cifar10 --method flow                   a teacher
python train_image.py --dataset cifar10 --method shortcut-distill --teacher CKPT
python train_image.py --dataset cifar10 --method meanflow               from data alone
python train_image.py --eval CKPT --dataset FOLDER                      log p of any images
python train_image.py --eval CKPT --sample 64                           images and their log p
torchrun --nproc-per-node 8 train_image.py ...                          training on eight GPUs

CKPT is the latest.pt of a run. It is saved after the first step, every 15 minutes and at the end,
and holds all that the run needs, its teacher too: the same command goes on from it.
"""

import argparse
import collections
import copy
import csv
import datetime
import json
import math
import os
import sys
import tempfile
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
    "method":      ("flow",   "shortcut",  "meanflow", "lsd"),
    "condition":   (None,     "semigroup", "eulerian", "lagrangian"),
    "optimizer":   ("RAdam",  "RAdam",     "Adam",     "RAdam"),
    "lr":          (1e-4,     1e-4,        6e-4,       1e-4),
    "batch_size":  (512,      512,         1024,       256),
    "steps":       (586_000,  645_000,     800_000,    800_000),  # [ours] lsd
    "warm_share":  (0.0,      10 / 11,     0.5,        0.5),  # of u alone. [ours] meanflow, lsd
    "dropout":     (0.13,     0.13,        0.2,        0.0),
    "flip":        (0.0,      0.0,         0.5,        0.5),  # [ours] lsd
    "diagonal":    (1.0,      0.5,         0.25,       0.5),  # share of a batch where s = t
    "clip":        (0.01,     0.01,        math.inf,   1.0),  # norm of the gradient
    "half_life":   (50e6,     50e6,        7.1e6,      1.8e6),  # images in the average
    "decay_after": (math.inf, math.inf,    math.inf,   35_000)   # steps, then 1/sqrt
}
# fmt: on
RECIPES = {}
for i, method in enumerate(TABLE["method"]):
    RECIPES[method] = {name: row[i] for name, row in TABLE.items()}
RECIPES["shortcut-distill"] = RECIPES["shortcut"]  # the same with a teacher, the paper's

SIZES = {"cifar10": 32, "imagenet64": 64, "celeba64": 64}
STEP_COUNTS = (8, 4, 2, 1)
ORACLE_STEPS = 64  # of the midpoint rule: 128 NFE
ORACLE_RUNS = 8  # averaged, because one probe a step is noise of 0.05 bits/dim on 12x12 pixels
FID_SAMPLES = 50_000
SAVE_SECONDS = 900
EVERY = slice(None)


# --------------------------------------------------------------------------- the options
def between(low, high):
    """For argparse: a number in [low, high], whole if low is."""

    def number(text):
        value = type(low)(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    return {"type": number}


COUNT = between(1, 10**7)
WHOLE = between(0, 10**7)
RATE = between(0.0, 1.0)
FLAG = {"action": "store_true"}
DEVICE = "cpu"
if torch.accelerator.is_available():
    DEVICE = torch.accelerator.current_accelerator().type

# Name: default (None: the method's, the checkpoint's or nothing), what it may be, help.
OPTIONS = {
    "dataset": ("cifar10", {}, "cifar10 (the default), imagenet64, celeba64 or a folder"),
    "method": ("meanflow", {"choices": RECIPES}, "default meanflow; flow: a teacher"),
    "teacher": (None, {}, "CKPT that gives v and div v, and the oracle; read when a run starts"),
    "init": (None, {}, "CKPT with weights to start from; default the teacher's"),
    "no_divergence": (False, FLAG, "sampling only, without a head"),
    "paper": (False, FLAG, "the paper's objective; mirrored log p but for lsd"),
    "seed": (0, WHOLE, "default 0, with --sample CKPT's"),
    "out": (None, {}, "default below runs/image/, or eval/ or sample/ beside CKPT"),
    "device": (DEVICE, {"choices": (DEVICE, "cpu")}, f"default here {DEVICE}"),
    "image_size": (None, between(4, 1024), "pixels a side, for a folder; default 32"),
    "colours": (3, {"type": int, "choices": (1, 3)}, "1 for grey images; default 3"),
    "channels": (128, COUNT, "of the U-Net; default 128"),
    "blocks": (4, COUNT, "residual blocks a level; default 4"),
    "dropout": (None, RATE, "probability; default the method's"),
    "steps": (None, COUNT, "default the method's; more go on, at a rate that had fallen to 0"),
    "warmup": (None, WHOLE, "steps of u alone; default the method's, 0 with --init"),
    "batch_size": (None, COUNT, "images a step, in all; default the method's"),
    "micro_batch": (128, COUNT, "images at a time in a process; default 128"),
    "lr": (None, RATE, "learning rate; default the method's"),
    "compile": (False, FLAG, "torch.compile the loss"),
    "eval": (None, {}, "CKPT: no training, log p of --dataset's test images"),
    "sample": (None, COUNT, "with --eval: so many images and their log p"),
    "guidance": (None, RATE, "with --eval: learning rate of self-guidance"),
    "oracle_images": (64, COUNT, "that the oracle measures; default 64"),
    "fid_network": (None, {}, "TorchScript, StyleGAN2-ADA's inception-2015-12-05.pt"),
}
USED = {  # what has an effect in which mode
    "train": set(OPTIONS) - {"sample", "guidance"},
    "eval": "eval dataset out device micro_batch guidance oracle_images fid_network".split(),
    "sample": "eval sample seed out device micro_batch guidance".split(),
}

PARSER = argparse.ArgumentParser(
    usage=argparse.SUPPRESS,
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    argument_default=argparse.SUPPRESS,
)
for name, (_, kind, text) in OPTIONS.items():
    PARSER.add_argument("--" + name.replace("_", "-"), help=text, **kind)

SHAPE = ("image_size", "colours", "channels", "blocks", "paper")  # a student's is its teacher's
NETWORK = (*SHAPE, "dropout")
RUN = (*NETWORK, "method", "head", "seed", "batch_size", "lr", "warmup")  # stays when it goes on


def require(right, sentence):
    """Ends the run, exit code 2, unless right. The sentence: what is wrong, what to type."""
    if not right:
        PARSER.error(sentence)


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


def zero(layer):
    """Every block starts as its skip."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    """x [B, c_in, H, H], embedding [B, c] -> [B, c, H', H'], a residual of two convolutions."""

    def __init__(self, c_in, c, dropout, attention, resize):
        super().__init__()
        self.resize = resize or nn.Identity()
        first = nn.Conv2d(c_in, c, 3, padding=1)
        self.before = nn.Sequential(GroupNorm(c_in), nn.SiLU(), self.resize, first, GroupNorm(c))
        self.modulate = nn.Linear(c, 2 * c)
        second = zero(nn.Conv2d(c, c, 3, padding=1))
        self.after = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), second)
        self.skip = nn.Identity()
        if c_in != c:
            self.skip = nn.Conv2d(c_in, c, 1)
        self.qkv = None
        if attention:
            self.qkv = nn.Sequential(GroupNorm(c), nn.Conv2d(c, 3 * c, 1))
            self.merge = zero(nn.Conv2d(c, c, 1))

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
    """x [B, colours, H, H], t and s [B] -> u like x, features [B, feature_dim].

    In the manner of DDPM++ (Song et al., "Score-Based Generative Modeling through Stochastic
    Differential Equations"): three sizes, H, H/2, H/4, with attention where an image is 16 wide."""

    def __init__(self, image_size, colours, channels, blocks, paper, dropout):
        super().__init__()
        self.paper = paper
        width = 2 * channels
        self.embed = nn.Sequential(
            nn.Linear(8 if paper else 10, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.stem = nn.Conv2d(colours, channels, 3, padding=1)

        def add(blocks, c_in, attention, resize=None):
            blocks.append(Block(c_in, width, dropout, attention, resize))

        self.down = nn.ModuleList()
        self.middle = nn.ModuleList()
        self.up = nn.ModuleList()
        skips = [channels]  # how many channels each has
        for level in (0, 1, 2):
            attention = image_size == 16 * 2**level
            if level > 0:
                add(self.down, width, attention, nn.AvgPool2d(2))
                skips.append(width)
            for _ in range(blocks):
                add(self.down, skips[-1], attention)
                skips.append(width)
        add(self.middle, width, True)
        add(self.middle, width, False)
        for level in (2, 1, 0):
            attention = image_size == 16 * 2**level
            if level < 2:
                add(self.up, width, attention, nn.Upsample(scale_factor=2))
            for _ in range(blocks + 1):
                add(self.up, width + skips.pop(), attention)
        self.norm = nn.Sequential(GroupNorm(width), nn.SiLU())
        self.out = nn.Conv2d(width, colours, 3, padding=1)
        self.feature_dim = 3 * width

    def forward(self, x, t, s):
        embedding = self.embed(f2d2.time_features(t, s, self.paper))
        skips = [self.stem(x)]
        for block in self.down:
            skips.append(block(skips[-1], embedding))

        h = skips[-1]
        for block in self.middle:
            h = block(h, embedding)
        bottleneck = h.mean((2, 3))

        for block in self.up:
            if not isinstance(block.resize, nn.Upsample):
                h = torch.cat([h, skips.pop()], 1)
            h = block(h, embedding)
        size = (h.square().mean((2, 3)) + 1e-4).log()  # log p hangs on it, and the norm forgets it
        h = self.norm(h)
        return self.out(h), torch.cat([bottleneck, h.mean((2, 3)), size], 1)


def build(config, device):
    """The untrained joint flow map of a config."""
    unet = UNet(**{key: config[key] for key in NETWORK})
    return f2d2.JointFlowMap(unet, unet.feature_dim, config["head"], config["paper"]).to(device)


# --------------------------------------------------------------------------- images
def to_bytes(x):
    """Inverts dequantize."""
    return ((x + 1) * 128).clamp(0, 255).to(torch.uint8)


def progress(what, items):
    """Gives the items one by one, and prints every half minute how far it is."""
    said = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - said > 30:
            said = time.monotonic()
            print(f"{what}: {done} of {len(items)}")


def to_square(image, size):
    """A PIL image -> uint8 [size, size, 3]: turned as its EXIF block says, cropped to its middle,
    on white. Raises whatever Pillow does, and ValueError."""
    if image.mode[0] in "IF":
        raise ValueError("more than 8 bits a colour: convert it first")
    image.draft(None, (2 * size, 2 * size))  # a large JPEG: no more pixels than are needed
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block, or pixels, which raise again below
        pass
    image = ImageOps.fit(image.convert("RGBA"), (size, size), Image.BICUBIC)
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


def files_below(folder, seen):
    """Every file that is not hidden, links followed, a folder once; and what cannot be entered."""
    if folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    for path in sorted(folder.glob("[!.]*")):
        if path.is_dir() and os.access(path, os.R_OK | os.X_OK):
            yield from files_below(path, seen)
        else:
            yield path


def read_folder(folder, size, share):
    """uint8 [N, H, H, 3] and paths of the images below a folder; prints what it left out."""
    paths = list(files_below(folder, set()))[share]
    images = {}
    notes = collections.defaultdict(list)
    for path in progress(f"images of {folder}", paths):
        try:
            with Image.open(path) as image:
                images[str(path)] = to_square(image, size)
                if min(image.size) < size:
                    notes["enlarged, so that their bits/dim are of interpolated pixels"] += [path]
                if getattr(image, "n_frames", 1) > 1:
                    notes["read in the first of several frames"] += [path]
        except Exception as error:  # whatever a file may raise
            notes[f"left out, {type(error).__name__}"] += [f"{path}: {error}"]

    print(f"{len(images)} images of {folder}")
    for note, files in notes.items():
        print(f"{len(files)} of {len(paths)} files {note}; the first is {files[0]}")
    require(images, f"{folder} holds no images that can be read.")
    return np.stack(list(images.values())), list(images)


def named_images(dataset, split, share):
    """uint8 [N, H, H, 3] of a published data set."""
    if dataset == "cifar10":
        return datasets.CIFAR10("data", split == "train", download=True).data[share]

    if dataset == "celeba64":
        faces = datasets.CelebA("data", split)
        box = (19, 39, 159, 179)  # the central 140 pixels
        return np.stack([to_square(faces[i][0].crop(box), 64) for i in range(len(faces))[share]])

    files = ["data/val_data.npz"]
    if split == "train":
        files = [f"data/train_data_batch_{i}.npz" for i in range(1, 11)]
    # One row an image, planes R, G, B. A copy of the share, so that the rest can go.
    rows = np.concatenate([np.load(f)["data"][share].copy() for f in files])
    return rows.reshape(len(rows), 3, 64, 64).transpose(0, 2, 3, 1)


def load_data(args, split, share=EVERY):
    """uint8 [N, colours, H, H] of the "train" or "test" images, and their names; of every file a
    share, for one of several processes. A folder has train/ and test/ in it; or, in an evaluation,
    every image below it is a test image."""
    if args.dataset in SIZES:
        try:
            images = named_images(args.dataset, split, share)
        except Exception as error:  # whatever half a download may raise
            PARSER.error(
                f"{args.dataset} is not in data/ ({error}): see cs.toronto.edu/~kriz, "
                "image-net.org or mmlab.ie.cuhk.edu.hk/projects/CelebA."
            )
        names = range(len(images))
    else:
        folder = Path(args.dataset, split)
        both = folder.is_dir() and folder.with_name("train").is_dir()
        if args.eval and split == "test" and not both:
            folder = Path(args.dataset)
        what = f"{', '.join(SIZES)} or, to train, a folder with train/ and test/, by these names"
        require(folder.is_dir(), f"{folder} is no folder: --dataset is {what}.")
        images, names = read_folder(folder, args.image_size, share)
    return torch.from_numpy(images).permute(0, 3, 1, 2)[:, : args.colours].contiguous(), names


# --------------------------------------------------------------------------- files
def save(path, content):
    """Makes of content a file of path's kind, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder, path.name)
        try:
            if path.suffix == ".pt":
                torch.save(content, part)
            elif path.suffix == ".png":  # uint8 [N, colours, H, H], eight in a row
                utils.save_image(content / 255, part)
            elif path.suffix == ".csv":
                with open(
                    part, "w", newline="", encoding="utf-8", errors="surrogateescape"
                ) as file:
                    csv.writer(file).writerows(content)
            else:  # JSON knows no NaN
                finite = json.loads(json.dumps(content), parse_constant=lambda constant: None)
                part.write_text(json.dumps(finite, indent=1))
        except RuntimeError as error:  # of torch.save
            raise OSError(f"{path} cannot be written, is the disk full? ({error})") from error
        part.replace(path)


def frozen(state, device):
    """The averaged network of a checkpoint, or of the teacher in it."""
    flow = build(state["config"], device).eval().requires_grad_(False)
    flow.load_state_dict(state["ema"])
    return flow


def load(path):
    """A checkpoint, on the CPU; never executes anything."""
    try:
        state = torch.load(path, "cpu", weights_only=True)
        frozen(state, "cpu")
        return state
    except Exception as error:  # whatever may be in that file
        PARSER.error(f"{path} is no checkpoint of this script ({error!r:.99}).")


# --------------------------------------------------------------------------- training
# To the options and the row of TABLE `parse` adds: first, steps that are done; pieces, of a batch
# in a process; rank and world, of processes; head; probe; mirror, of the likelihood.
def prepare(args, source):
    """What to train: as `source` left it if the run goes on, else from its averaged weights."""
    torch.manual_seed(args.seed)
    flow = build(vars(args), args.device)
    if source:
        flow.load_state_dict(source["ema"], strict=False)  # it may have no head
    ema = copy.deepcopy(flow).eval().requires_grad_(False)
    optimizer = getattr(torch.optim, args.optimizer)(flow.parameters(), args.lr)
    parts = {"flow": flow, "ema": ema, "optimizer": optimizer}
    if args.first:
        for name, part in parts.items():
            part.load_state_dict(source[name])
    return parts


def draw(images, args):
    """A piece of the batch: x1 [n, colours, H, H]; and t, s [n] where the loss has others."""
    n = args.batch_size // args.world // args.pieces
    batch = images[torch.randint(len(images), (n,))]
    flip = torch.rand(n) < args.flip
    batch[flip] = batch[flip].flip(3)
    batch = {"x1": f2d2.dequantize(batch.to(args.device))}
    if args.paper and args.method == "meanflow":  # 1 - t is logit-normal(-2, 2), so t is (2, 2)
        logits = 2 + 2 * torch.randn(2, n, device=args.device)
        batch["t"], batch["s"] = torch.sigmoid(logits).sort(0).values
    return batch


def update(args, step, flow, ema, optimizer):
    """One step of optimizer and average from the gradients of all processes, whose norm returns."""
    # Learning rate: up for a twentieth or 10,000 steps; lsd's falls; [ours] to 0 at the end.
    ramp = step / max(1, min(10_000, args.steps // 20))
    decay = (args.decay_after / step) ** 0.5
    end = math.inf if args.paper else 4 - 4 * (step - 1) / args.steps
    optimizer.param_groups[0]["lr"] = args.lr * min(1, ramp, decay, end)

    for p in flow.parameters():
        if args.world > 1 and p.grad is not None:
            p.grad /= args.world
            distributed.all_reduce(p.grad)
    norm = nn.utils.clip_grad_norm_(flow.parameters(), args.clip)
    optimizer.step()

    # The average remembers half_life images, or a twentieth of those seen, if that is less. [ours]
    # It starts again with the head, whose first weights would be a quarter of shortcut's average.
    seen = step - args.warmup * (step > args.warmup)
    half_life = min(args.half_life, 0.05 * seen * args.batch_size)
    new = 1 - 0.5 ** (args.batch_size / half_life)
    for average, p in zip(ema.parameters(), flow.parameters()):
        average.lerp_(p.detach(), new)
    return norm


def sound(flow, ema, optimizer):
    """Whether averages and moments are finite, and with them the weights; a loss can be without."""
    tensors = list(ema.parameters())
    for moments in optimizer.state.values():
        tensors += moments.values()
    return nn.utils.get_total_norm(tensors, math.inf).isfinite()


def train(args, source):
    """Trains to --steps, from where the run in --out is, and returns its last state. Writes it as
    latest.pt, and progress.png."""
    parts = prepare(args, source)
    flow = parts["flow"]
    teacher = None
    if args.first:
        teacher = source["teacher"]
    elif args.teacher:
        teacher = load(args.teacher)
        teacher = {"config": teacher["config"], "ema": teacher["ema"]}
    config = vars(args) | {"out": str(args.out)}
    print(config)

    images, _ = load_data(args, "train", slice(args.rank, None, args.world))
    loss = torch.compile(f2d2.f2d2_loss) if args.compile else f2d2.f2d2_loss
    headless = f2d2.JointFlowMap(flow.backbone, flow.feature_dim, False)  # same weights
    velocity = teacher and frozen(teacher, args.device).velocity
    how = {key: vars(args)[key] for key in ("condition", "diagonal", "probe", "paper")}

    state = source
    saved = -math.inf
    began = time.monotonic()
    for step in range(args.first + 1, args.steps + 1):
        # A function of (seed, step, process), so that a run that goes on sees the same.
        torch.manual_seed(hash((args.seed, step, args.rank)))
        flow.zero_grad()
        for _ in range(args.pieces):
            f = flow if step > args.warmup else headless
            losses = loss(f, teacher=velocity, **draw(images, args), **how)
            (sum(losses.values()) / args.pieces).backward()
        norm = update(args, step, **parts)

        now = time.monotonic()
        due = args.rank == 0 and (step == args.steps or now - saved > SAVE_SECONDS)
        if due or step % 100 == 0:
            what = f"step {step} made weights that are no numbers: lower --lr, in another --out."
            require(sound(**parts), what)
            line = " ".join(f"{name} {value:.4g}" for name, value in losses.items())
            left = (args.steps - step) * (now - began) / (step - args.first)
            print(f"{step}/{args.steps}: {line} grad {norm:.4g} | {left:.0f} s left")
        if due:
            state = {"config": config, "step": step, "teacher": teacher}
            state |= {name: part.state_dict() for name, part in parts.items()}
            save(args.out / "latest.pt", state)
            save(args.out / "progress.png", sheet(args, parts["ema"]))
            saved = now
    return state


# --------------------------------------------------------------------------- evaluation
def few_steps(args, flow, x0, k):
    """Images, and their log p if there is a head, in k steps from x0, which --guidance moves."""
    if args.guidance:
        x0 = f2d2.self_guidance(flow, x0, args.guidance)
    if args.method == "flow":  # no few-step map: Euler steps
        return f2d2.ode_sample(flow.velocity, x0, k, euler=True), None
    return f2d2.sample(flow, x0, k)


def noise(args, n):
    """x0 [n, colours, H, H], on the CPU: the same for every device."""
    g = torch.Generator().manual_seed(args.seed)
    return torch.randn(n, args.colours, args.image_size, args.image_size, generator=g)


def sheet(args, flow):
    """Images of the same noise, a row for each number of steps."""
    x0 = noise(args, 8).to(args.device)
    return to_bytes(torch.cat([few_steps(args, flow, x0, k)[0] for k in STEP_COUNTS]))


def chunked(args, x, function, model, *options):
    """function(model, x, *options) in float64, --micro-batch images at a time."""
    results = []
    for part in progress(function.__name__, x.split(args.micro_batch)):
        results.append(function(model, part.to(args.device), *options).cpu())
    return torch.cat(results).double().numpy()


def x0_of(velocity, x1):
    """Where the oracle's path from x1 ends: the ODE and its grid with time reversed."""
    times = 1 - f2d2.time_grid(ORACLE_STEPS, x1, geometric=True)
    return f2d2.ode_sample(lambda x, t: -velocity(x, 1 - t), x1, times)


def frechet_distance(a, b):
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of features a, b [N, F]."""
    S_a, S_b = np.cov(a.T), np.cov(b.T)
    cross = np.sqrt(np.linalg.eigvals(S_a @ S_b).real.clip(0)).sum()
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(S_a + S_b) - 2 * cross


def fid(args, flow):
    """{steps: FID against the training images}."""
    try:
        inception = torch.jit.load(args.fid_network, args.device).eval()
    except RuntimeError as error:
        PARSER.error(f"{args.fid_network} is no TorchScript network ({error!r:.99}).")
    images, _ = load_data(args, "train")
    print(f"FID against {len(images)} images; fewer than 2,048 say little, and one nothing")

    def features(flow, x, k=None):
        if k:
            x = to_bytes(few_steps(args, flow, x, k)[0])
        return inception(x.expand(-1, 3, -1, -1), return_features=True)

    real = chunked(args, images, features, flow)
    x0 = noise(args, FID_SAMPLES)
    distances = {}
    for k in STEP_COUNTS:
        distances[k] = frechet_distance(real, chunked(args, x0, features, flow, k))
    return distances


def evaluate(args, source, data):
    """bits/dim of the test images at 8, 4, 2, 1 steps, errors against the oracle on some of them;
    FID. Writes log_p.csv, extremes.png (likeliest first), samples.png (a row a step count) and
    metrics.json, where bpd_oracle is of the oracle's images, and energy is |x_0|^2/d where the
    oracle's path ends: 1 is right."""
    images, names = data
    flow = frozen(source, args.device)
    velocity = frozen(source["teacher"] or source, args.device).velocity
    whose = "its teacher's ODE" if source["teacher"] else "its own ODE"
    distances = fid(args, flow) if args.fid_network else {}

    torch.manual_seed(0)  # of the probes; the bytes' noise depends on an image's row alone
    x = f2d2.dequantize(images, generator=torch.Generator().manual_seed(0))
    some = np.linspace(0, len(x) - 1, min(args.oracle_images, len(x)), dtype=int)

    d = x[0].numel()
    runs = x[some].repeat(ORACLE_RUNS, 1, 1, 1)
    oracle = chunked(args, runs, f2d2.ode_log_likelihood, velocity, ORACLE_STEPS, args.probe)
    oracle = f2d2.bits_per_dim(oracle.reshape(ORACLE_RUNS, -1).mean(0), d)
    energy = (chunked(args, x[some], x0_of, velocity) ** 2).mean()
    rows = {}
    columns = {"oracle": np.full(len(x), np.nan)}
    columns["oracle"][some] = oracle
    for k in STEP_COUNTS:
        rows[k] = {"fid": distances[k]} if distances else {}
        if args.head:
            bpd = f2d2.bits_per_dim(chunked(args, x, f2d2.log_likelihood, flow, k, args.mirror), d)
            columns[f"{k} steps"] = bpd
            error = bpd[some] - oracle
            rows[k] |= {
                "bpd": bpd.mean(),
                "bpd_oracle": bpd[some].mean(),
                "gap": error.mean(),
                "mae_oracle": np.abs(error).mean(),
                "corr": np.corrcoef(bpd[some], oracle)[0, 1],
            }

    if args.head:
        order = columns[f"{STEP_COUNTS[0]} steps"].argsort()
        save(args.out / "extremes.png", images[np.r_[order[:32], order[-32:]]])
    save(args.out / "samples.png", sheet(args, flow))
    save(args.out / "log_p.csv", [["image", *columns], *zip(names, *columns.values())])
    about = {
        "dataset": args.dataset,
        "guidance": args.guidance,
        "images": len(x),
        "oracle": {"of": whose, "images": len(some), "bpd": oracle.mean(), "energy": energy},
        "steps": rows,
        "step": source["step"],
        "config": source["config"],
    }
    save(args.out / "metrics.json", about)

    print(
        f"\n{args.dataset}: {len(x)} images, step {source['step']}, oracle: {whose}\n"
        f" oracle bpd {oracle.mean():.3f}  energy {energy:.3f}"
    )
    for k, row in rows.items():
        print(f"{k:>7}", *(f"{name} {value:.3f} " for name, value in row.items()))


def write_samples(args, flow):
    """--sample N: N images as PNG, and samples.csv with log p of each in nats."""
    k = STEP_COUNTS[0]
    rows = [["image", "log_likelihood", "sample"]]
    for x0 in progress("samples", noise(args, args.sample).split(args.micro_batch)):
        x1, own = few_steps(args, flow, x0.to(args.device), k)
        log_p = f2d2.log_likelihood(flow, x1, k, args.mirror)
        for image, *values in zip(to_bytes(x1), log_p.tolist(), own.tolist()):
            rows.append([f"{len(rows) - 1:05d}.png", *values])
            save(args.out / rows[-1][0], image)
    save(args.out / "samples.csv", rows)
    print(f"{args.sample} images in {k} steps, and samples.csv, are in {args.out}")


# --------------------------------------------------------------------------- the command line
def parse(argv):
    """All that a run is: as typed, else as in its checkpoint, else the method's, else the default.
    And the checkpoint that it evaluates, goes on from or starts from, or None."""
    typed = vars(PARSER.parse_args(argv))  # what was typed, and nothing else
    defaults = {name: row[0] for name, row in OPTIONS.items()}
    args = argparse.Namespace(**defaults | typed)
    mode = "train"
    run = f"{Path(args.dataset).resolve().name}-{args.method}{'-paper' * args.paper}-{args.seed}"
    out = Path("runs/image", run)
    if args.eval:
        mode = "sample" if args.sample else "eval"
        out = Path(args.eval).with_name(mode)
    for name in typed:
        option = name.replace("_", "-")
        require(name in USED[mode], f"--{option} has no effect here, to {mode}: drop it.")

    out = Path(args.out or out)
    path = args.eval or args.init or args.teacher
    goes_on = not args.eval and (out / "latest.pt").exists()
    if goes_on:
        path = out / "latest.pt"
    source = load(path) if path else None
    keys = (*RUN, "dataset") if args.eval or goes_on else SHAPE
    saved = {key: source["config"][key] for key in keys if source}

    args = argparse.Namespace(
        **defaults | RECIPES[saved.get("method", args.method)] | saved | typed
    )
    args.out = out
    args.first = source["step"] if goes_on else 0
    args.probe = "rademacher" if args.paper else "dct"
    args.image_size = args.image_size or SIZES.get(args.dataset, 32)
    args.mirror = args.paper and args.condition in (
        "semigroup",
        "eulerian",
    )  # maps that know t <= s alone
    if args.warmup is None:
        args.warmup = 0 if args.init else int(args.warm_share * args.steps)
    args.rank, args.world = 0, 1
    if distributed.is_torchelastic_launched():
        args.rank = int(os.environ["RANK"])
        args.world = int(os.environ["WORLD_SIZE"])
    args.pieces = math.ceil(args.batch_size / args.world / args.micro_batch)
    if not args.eval:
        args.head = args.method != "flow" and not args.no_divergence
        other = [key for key in RUN if saved.get(key, vars(args)[key]) != vars(args)[key]]
        what = f"{path} has other {', '.join(other)}"
        require(not other, f"{what}: type the same, or name another --out, --init or --teacher.")
    return args, source


def check(args):
    """Refuses what cannot work, before anything is read or written."""
    size = SIZES.get(args.dataset, args.image_size)
    fits = args.image_size == size and not size % 4
    require(fits, f"--image-size {args.image_size} is no multiple of 4, or not {args.dataset}'s.")
    fresh = not any(args.out.glob("*.[cjp]*"))  # csv, json, png or pt
    require(args.first or fresh, f"{args.out} holds files already: name another --out.")
    if args.eval:
        return

    unit = args.world * args.pieces  # processes times pieces
    require(args.batch_size % unit == 0, f"--batch-size must be a multiple of {unit} here.")
    require(args.warmup < args.steps, "--warmup must be below --steps.")
    taught = args.first or args.teacher or args.method != "shortcut-distill"
    require(taught, "shortcut-distill needs --teacher CKPT, a latest.pt of --method flow.")


def main(argv=None):
    args, source = parse(argv)
    check(args)
    try:
        run(args, source)
    except KeyboardInterrupt:
        PARSER.exit(130, f"stopped: training goes on from {args.out} by the same command.\n")
    except (OSError, ValueError) as error:
        PARSER.error(str(error).replace("\n", " "))
    except RuntimeError as error:
        if "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
        PARSER.error("out of memory: lower --micro-batch, --channels or --sample.")


def run(args, source):
    """Trains, but for --eval; the first of several processes evaluates or samples."""
    if args.rank > 0:
        sys.stdout = open(os.devnull, "w")
    elif not args.sample:
        data = load_data(args, "test")
    os.makedirs(args.out, exist_ok=True)
    if args.world > 1 and not args.eval:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group(timeout=datetime.timedelta(hours=4))
        distributed.barrier()  # until the first process has downloaded what there is to download
    if not args.eval:
        source = train(args, source)
    if args.sample and args.rank == 0:
        write_samples(args, frozen(source, args.device))
    elif args.rank == 0:
        evaluate(args, source, data)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # any file name
    main()
