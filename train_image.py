"""F2D2 on images: train, go on, evaluate, sample; on one GPU, several, or a CPU.

python train_image.py --dataset cifar10 --method flow                   a teacher
python train_image.py --dataset cifar10 --method shortcut-distill --teacher CKPT
python train_image.py --dataset cifar10 --method meanflow               from data alone
python train_image.py --eval CKPT --dataset FOLDER                      log p of any images
python train_image.py --eval CKPT --sample 64                           images and their log p
torchrun --nproc-per-node 8 train_image.py ...                          the same on eight GPUs
"""

import argparse
import csv
import fcntl
import hashlib
import io
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torchvision
from PIL import Image, ImageOps
from torch import distributed, nn
from torchvision.transforms.v2 import functional as transforms

import f2d2

# fmt: off
RECIPE_KEYS = {  # shortcut(-distill)  meanflow     lsd           the method's own, but for:
    "condition":    ("semigroup",      "eulerian",  "lagrangian"),
    "optimizer":    ("RAdam",          "Adam",      "RAdam"),
    "lr":           (1e-4,             6e-4,        1e-4),
    "batch_size":   (512,              1024,        256),
    "steps":        (645_000,          800_000,     800_000),     # ours for lsd
    "warmup":       (10 / 11,          0.5,         0.5),         # ours for meanflow and lsd
    "dropout":      (0.13,             0.2,         0.0),
    "flip":         (0.0,              0.5,         0.5),         # ours for lsd
    "diagonal":     (0.5,              0.25,        0.5),
    "clip":         (0.01,             math.inf,    1.0),
    "half_life":    (50e6,             7.1e6,       1.8e6),       # images in the average
    "decay_after":  (math.inf,         math.inf,    35_000),      # then the rate falls as 1/sqrt
}
# fmt: on
DISTILL, MEANFLOW, LSD = ({k: row[i] for k, row in RECIPE_KEYS.items()} for i in range(3))
FLOW = DISTILL | {"condition": None, "steps": 586_000}
RECIPES = {"flow": FLOW, "shortcut": DISTILL, "shortcut-distill": DISTILL}
RECIPES |= {"meanflow": MEANFLOW, "lsd": LSD}

SIZES = {"cifar10": 32, "imagenet64": 64, "celeba64": 64}
SOURCES = {
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar.html",
    "imagenet64": "https://image-net.org",
    "celeba64": "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
}
NVLABS = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
INCEPTION = NVLABS + "inception-2015-12-05.pt"
CONFIG = (
    "dataset",
    "method",
    "paper",
    "seed",
    "batch_size",
    "lr",
    "warmup",
    "image_size",
    "channels",
)
CONFIG += ("blocks", "dropout", "head", "colours", "teacher", "teacher_path", "init")
STEP_COUNTS = (8, 4, 2, 1)
ORACLE_STEPS = 64  # of the midpoint rule: 128 NFE
FID_SAMPLES = 50_000
CHUNK = 250  # images at a time in an evaluation
SAVE_SECONDS = 15 * 60


class BadInput(Exception):
    """One sentence for the user, what is wrong and what to type instead: exit code 2."""


def require(right, sentence):
    if not right:
        raise BadInput(sentence)


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
        for last in (self.after[-1], self.merge):  # every block starts as its skip
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
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
    """x [B, colours, H, H], t and s [B] -> u like x, features [B, feature_dim]. DDPM++ of Song et
    al., "Score-Based Generative Modeling through Stochastic Differential Equations"."""

    def __init__(self, image_size=32, channels=128, blocks=4, dropout=0.0, colours=3, paper=False):
        super().__init__()
        if image_size % 4:
            raise ValueError(
                f"image size {image_size} cannot be halved twice: use a multiple of 4."
            )
        self.paper = paper
        width = 2 * channels
        times = nn.Linear(8 if paper else 10, width)
        self.embed = nn.Sequential(times, nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.stem = nn.Conv2d(colours, channels, 3, padding=1)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        skips = [channels]
        for level in (0, 1, 2):
            for resize in [nn.AvgPool2d(2)] * (level > 0) + [None] * blocks:
                attend = image_size >> level == 16
                self.down.append(Block(skips[-1], width, width, dropout, attend, resize))
                skips.append(width)
        self.middle = nn.ModuleList([Block(width, width, width, dropout, a) for a in (True, False)])
        for level in (2, 1, 0):
            for resize in [nn.Upsample(scale_factor=2)] * (level < 2) + [None] * (blocks + 1):
                attend = image_size >> level == 16
                c_in = width if resize else width + skips.pop()
                self.up.append(Block(c_in, width, width, dropout, attend, resize))
        self.norm = nn.Sequential(GroupNorm(width), nn.SiLU())
        self.out = nn.Conv2d(width, colours, 3, padding=1)
        self.feature_dim = 3 * width

    def forward(self, x, t, s):
        embedding = self.embed(f2d2.time_features(t, s, self.paper))
        h = self.stem(x)
        skips = [h]
        for block in self.down:
            h = block(h, embedding)
            skips.append(h)
        h = self.middle[1](self.middle[0](h, embedding), embedding)
        bottleneck = h.mean((2, 3))
        for block in self.up:
            doubling = isinstance(block.resize, nn.Upsample)
            h = block(h if doubling else torch.cat([h, skips.pop()], 1), embedding)
        size = (h.square().mean((2, 3)) + 1e-4).log()  # log p hangs on it, and the norm forgets it
        h = self.norm(h)
        return self.out(h), torch.cat([bottleneck, h.mean((2, 3)), size], 1)


def build(config, device):
    """The untrained joint flow map of a run's config, which every checkpoint holds."""
    keys = ("image_size", "channels", "blocks", "dropout", "colours", "paper")
    unet = UNet(*(config[k] for k in keys))
    return f2d2.JointFlowMap(unet, unet.feature_dim, config["head"], config["paper"]).to(device)


# --------------------------------------------------------------------------- images
def to_bytes(x):
    """Inverts dequantize."""
    return ((x + 1) * 128).floor().clamp(0, 255).to(torch.uint8)


def read_image(path, size, crop=None):
    """uint8 [H, H] of a grey image, [H, H, 3] of a coloured one, as a viewer shows it: turned, on
    white where transparent; cropped to a square and resized. ValueError for pixels of 32 bits."""
    image = ImageOps.exif_transpose(Image.open(path))
    grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        levels = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits, whose white is not known")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("L" if grey else "RGB")
    if crop:
        image = transforms.center_crop(image, crop)
    return np.asarray(ImageOps.fit(image, (size, size), Image.BICUBIC))


def read_folder(folder, size):
    """{path: image}: every file that is not hidden, once, links followed; says what it left out."""
    walk = os.walk(folder, followlinks=True)
    paths = sorted(Path(base) / name for base, _, names in walk for name in names)
    shown = [p for p in paths if not any(n[0] == "." for n in p.relative_to(folder).parts)]
    paths = {path.resolve(): path for path in shown}.values()
    images = {}
    left_out = {}
    for path in paths:
        try:
            images[str(path)] = read_image(path, size)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = str(error) if type(error) is ValueError else "no image that can be read"
            left_out.setdefault(reason, []).append(path)
    for reason, files in left_out.items():
        print(f"left out {len(files)} of {len(paths)} files ({reason}), the first is {files[0]}")
    return images


def folder_splits(root, size, held_out):
    """{"train": {path: image}, "test": ...}: the user's train/ with test/, val/ or valid/, in any
    case. Without these a seeded tenth is the test split; if not held_out, everything is."""
    folders = {p.name.lower(): p for p in sorted(root.iterdir()) if p.is_dir()}
    test = folders.get("test") or folders.get("val") or folders.get("valid")
    both = not held_out or ("train" in folders) == bool(test)
    require(both, f"{root} has only one of train/ and test/ (or val/): make both, or neither.")
    if test:
        print(f"train: {folders['train']}, test: {test}" if held_out else f"images: {test}")
        train = read_folder(folders["train"], size) if held_out else {}
        return {"train": train, "test": read_folder(test, size)}
    print(f"images: {root}, a seeded tenth held out" if held_out else f"images: {root}")
    images = read_folder(root, size)
    order = np.random.default_rng(0).permutation(sorted(images))
    cut = max(1, len(order) // 10) if held_out else len(order)
    parts = {"train": order[cut:], "test": order[:cut]}
    return {split: {name: images[name] for name in sorted(part)} for split, part in parts.items()}


def named_splits(dataset, root):
    """{"train": {index: image [H, H, 3]}, "test": ...} of a published data set."""
    try:
        if dataset == "cifar10":
            cifar10 = torchvision.datasets.CIFAR10
            splits = [cifar10(root, train, download=True).data for train in (True, False)]
        elif dataset == "celeba64":
            rows = (root / "celeba/list_eval_partition.txt").read_text().split()
            splits = [[], [], []]  # train, validation, test
            for name, part in zip(rows[::2], rows[1::2]):
                image = read_image(root / "celeba/img_align_celeba" / name, 64, crop=140)
                splits[int(part)].append(image)
        else:  # one row an image, planes R, G, B; numpy refuses pickles
            files = [[f"train_data_batch_{i}.npz" for i in range(1, 11)], ["val_data.npz"]]
            rows = [np.concatenate([np.load(root / f)["data"] for f in split]) for split in files]
            splits = [r.reshape(-1, 3, 64, 64).transpose(0, 2, 3, 1) for r in rows]
    except Exception as error:  # whatever half a download may raise
        raise BadInput(
            f"{dataset} is not in {root} ({error}): {SOURCES[dataset]} has it."
        ) from error
    return {"train": dict(enumerate(splits[0])), "test": dict(enumerate(splits[-1]))}


def load_data(dataset, root, size, colours=None, held_out=True):
    """{"train": (uint8 [N, colours, H, H], names), "test": ...}. One colour if every image is grey
    and no checkpoint wants three; held_out as in folder_splits."""
    named = dataset in SIZES
    require(
        size == SIZES.get(dataset, size), f"{dataset} is of side {SIZES.get(dataset)}, not {size}."
    )
    splits = named_splits(dataset, root) if named else folder_splits(Path(dataset), size, held_out)
    coloured = any(image.ndim == 3 for images in splits.values() for image in images.values())
    require(not coloured or colours != 1, f"{dataset} has colours, and the checkpoint knows grey.")
    shape = (size, size, colours or (3 if coloured else 1))
    data = {}
    for split, images in splits.items():
        needed = held_out or split == "test"
        require(images or not needed, f"{dataset} holds no {split} images that can be read.")
        array = np.zeros((len(images), *shape), np.uint8)
        for i, image in enumerate(images.values()):
            array[i] = image.reshape(size, size, -1)
        data[split] = torch.from_numpy(array).permute(0, 3, 1, 2).contiguous(), list(images)
    return data


# --------------------------------------------------------------------------- files
def save_whole(path, write):
    """write(file) beside path, then rename: what stands at path is whole, the new or the old."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise BadInput(f"{path} could not be written, and is as it was before: {error}.") from error


def save_json(path, content):
    finite = json.loads(json.dumps(content), parse_constant=lambda nan_or_infinity: None)
    save_whole(path, lambda file: file.write(json.dumps(finite, indent=1).encode()))


def save_csv(path, header, rows):
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    save_whole(path, lambda file: file.write(text.getvalue().encode()))


def save_picture(path, images, columns):
    """uint8 [N, colours, H, H], row by row."""
    grid = torchvision.utils.make_grid(images.cpu(), columns, 1 if columns > 1 else 0)
    image = Image.fromarray(grid.permute(1, 2, 0).numpy())
    save_whole(path, lambda file: image.save(file, "PNG"))


def load(path, device):
    """The averaged network of a checkpoint, frozen, and the checkpoint; never executes anything."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        state["sha256"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        flow = build(state["config"], device).eval().requires_grad_(False)
        require(set(CONFIG) <= set(state["config"]), "keys are missing in its config")
        for part in ("flow", "ema"):
            flow.load_state_dict(state[part])
            sound = all(
                w.dtype == torch.float32 and w.isfinite().all() for w in state[part].values()
            )
            require(sound, "its weights are not finite numbers of 32 bits")
        require(
            type(state["step"]) is int and "state" in state["optimizer"], "no step or optimizer"
        )
        return flow, state
    except Exception as error:  # whatever a broken file may raise
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadInput(
            f"{path} is no checkpoint of this script ({why}): name a latest.pt."
        ) from error


def open_folder(path):
    """Makes --out, proves that it can be written, and keeps a second process out while open."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except OSError as error:
        sentence = f"{path} cannot be written, or another process works there: use another --out"
        raise BadInput(f"{sentence} ({error}).") from error


# --------------------------------------------------------------------------- training
def draw(data, args, step, rank, world):
    """This rank's x1, x0, t, s, eps of the global batch: a function of (seed, step), so that a run
    that goes on, and any number of processes and pieces, sees the same."""
    recipe = RECIPES[args.method]
    seed, own = np.random.SeedSequence([args.seed, step]).generate_state(2)
    torch.manual_seed(int(own) + rank)  # of dropout
    g = torch.Generator(args.device).manual_seed(int(seed))
    n = {"size": (args.batch_size,), "device": args.device, "generator": g}
    images = data[torch.randint(len(data), **n).to(data.device)].to(args.device)
    flip = torch.rand(**n)[:, None, None, None] < recipe["flip"]
    x1 = f2d2.dequantize(torch.where(flip, images.flip(3), images), generator=g)
    x0 = torch.randn(x1.shape, device=args.device, generator=g)
    forward = args.paper and recipe["condition"] in ("semigroup", "eulerian")
    t, s = f2d2.sample_times(x1, 0.0 if args.paper else 0.5, forward, g)
    if args.paper and args.method == "meanflow":  # 1 - t is logit-normal(-2, 2)
        t, s = torch.sigmoid(2 + 2 * torch.stack([torch.randn(**n), torch.randn(**n)])).sort(0)[0]
    eps = f2d2.hutchinson_probe(x1, "rademacher" if args.paper else "dct", g)
    return [a[rank::world] for a in (x1, x0, t, s, eps)]


def accumulate(objective, batch, n, count):
    """Gradients and terms of the mean loss over the batch, in `count` pieces. Each has its share of
    the n rows of the tangent condition and of the others, and its terms count by that share."""
    first = zip(*(a[:n].tensor_split(count) for a in batch))
    rest = zip(*(a[n:].tensor_split(count) for a in batch))
    totals = dict.fromkeys(("vm", "u", "div", "D"), 0.0)
    for head, tail in zip(first, rest):
        piece = [torch.cat(pair) for pair in zip(head, tail)]
        losses = objective(*piece, diagonal=len(head[0]) / len(piece[0]))
        share = len(head[0]) / n
        share_rest = len(tail[0]) / max(1, len(batch[0]) - n)
        shares = {"vm": share, "div": share, "u": share_rest, "D": share_rest}
        losses = {name: shares[name] * loss for name, loss in losses.items()}
        sum(losses.values()).backward()
        totals = {name: totals[name] + loss.detach() for name, loss in losses.items()}
    return totals


def train(args, config, flow, teacher, data, rank, world):
    """Runs what is left of --steps; saves every quarter of an hour and at the end."""
    recipe = RECIPES[args.method]
    optimizer = getattr(torch.optim, recipe["optimizer"])(flow.parameters(), lr=args.lr)
    ema = torch.optim.swa_utils.AveragedModel(flow).requires_grad_(False)
    first = restore(args, flow, ema, optimizer)
    loss = torch.compile(f2d2.f2d2_loss) if args.compile else f2d2.f2d2_loss

    def objective(x1, x0, t, s, eps, diagonal):
        f = flow if step > args.warmup else lambda x, t, s: flow(x, t, s)[:1]
        velocity = teacher and teacher.velocity
        draws = {"x0": x0, "t": t, "s": s, "probe": eps, "diagonal": diagonal}
        return loss(f, x1, recipe["condition"], velocity, paper=args.paper, **draws)

    share = args.batch_size // world
    n = max(1, round(recipe["diagonal"] * share)) if recipe["condition"] else share
    most = max(1, min(n, share - n)) if recipe["condition"] else share  # rows of both kinds in each
    pieces = min(math.ceil(share / args.micro_batch), most)
    began = saved = time.time()
    step = first
    while step < args.steps:
        step += 1
        optimizer.param_groups[0]["lr"] = learning_rate(args, step)
        optimizer.zero_grad()
        try:
            losses = accumulate(objective, draw(data, args, step, rank, world), n, pieces)
        except torch.OutOfMemoryError:
            require(pieces < most, "out of memory at the smallest piece: lower --channels.")
            pieces = min(2 * pieces, most)
            print(f"out of memory: {math.ceil(share / pieces)} images at a time from here on")
            step -= 1
            continue
        norm = update(args, flow, ema, optimizer, step, world)

        due = step == args.steps or time.time() - saved > SAVE_SECONDS
        if due or step % max(1, min(100, args.steps // 50)) == 0:
            terms = {k: v.item() for k, v in losses.items()} | {"grad": norm.item()}
            finite = all(math.isfinite(value) for value in terms.values())
            require(finite, f"the loss is not finite at step {step}: lower --lr, in another --out.")
            rate = (step - first) * args.batch_size / (time.time() - began)
            line = " ".join(f"{k} {v:.4g}" for k, v in terms.items())
            left = (args.steps - step) * args.batch_size / rate
            if rank == 0:
                line += f" | {rate:.0f} images/s, {left:.0f} s left"
                print(f"{step}/{args.steps}: {line}", flush=True)
        if due and rank == 0:
            save(args, config, step, flow, ema, optimizer)
            saved = time.time()


def restore(args, flow, ema, optimizer):
    """The step of the run in --out, with its state, or 0."""
    path = args.out / "latest.pt"
    if not path.exists():
        return 0
    _, state = load(path, args.device)
    flow.load_state_dict(state["flow"])
    ema.module.load_state_dict(state["ema"])
    ema.n_averaged.fill_(state["step"])
    try:
        optimizer.load_state_dict(state["optimizer"])
    except (KeyError, ValueError) as error:
        raise BadInput(f"{path} has an optimizer of another kind ({error}).") from error
    return state["step"]


def learning_rate(args, step):
    """Up in the first twentieth; for LSD down as 1/sqrt; ours: to zero in the last quarter."""
    ramp = step / max(1, min(10_000, args.steps // 20))
    decay = (RECIPES[args.method]["decay_after"] / step) ** 0.5
    left = math.inf if args.paper else 4 - 4 * (step - 1) / args.steps
    return args.lr * min(1, ramp, decay, left)


def update(args, flow, ema, optimizer, step, world):
    """One step of optimizer and average from the gradients of all processes, whose norm returns."""
    recipe = RECIPES[args.method]
    gradients = [p.grad for p in flow.parameters() if p.grad is not None]
    if world > 1:
        mean = nn.utils.parameters_to_vector(gradients) / world
        distributed.all_reduce(mean)
        nn.utils.vector_to_parameters(mean, gradients)
    norm = nn.utils.clip_grad_norm_(flow.parameters(), recipe["clip"])
    optimizer.step()
    # The average remembers half_life images, or a twentieth of those seen if that is less.
    memory = min(recipe["half_life"], 0.05 * step * args.batch_size)
    new = 1 - 0.5 ** (args.batch_size / memory)
    ema.multi_avg_fn = lambda old, now, _: torch._foreach_lerp_(old, now, new)
    ema.update_parameters(flow)
    return norm


def save(args, config, step, flow, ema, optimizer):
    state = {"config": config, "step": step, "flow": flow.state_dict()}
    state |= {"ema": ema.module.state_dict(), "optimizer": optimizer.state_dict()}
    save_whole(args.out / "latest.pt", lambda file: torch.save(state, file))
    save_picture(args.out / "progress.png", sheet(ema.module.eval(), args, config), 8)


# --------------------------------------------------------------------------- evaluation
@torch.no_grad()
def few_steps(flow, x0, args, k):
    """Images in k steps from the noise x0, which --guidance moves first."""
    if args.guidance:
        x0 = f2d2.self_guidance(flow, x0, args.guidance)
    if args.method == "flow":  # no few-step map: Euler steps
        return to_bytes(f2d2.ode_sample(flow.velocity, x0, k, euler=True))
    return to_bytes(f2d2.sample(flow, x0, k)[0])


def noise(config, n, seed=0):
    shape = (n, config["colours"], config["image_size"], config["image_size"])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sheet(flow, args, config):
    """Images of the same noise, a row for each number of steps."""
    x0 = noise(config, 8).to(args.device)
    return torch.cat([few_steps(flow, x0, args, k) for k in STEP_COUNTS])


def chunked(function, x, args, what):
    """function(x), some images at a time; says every half a minute how long it will take."""
    began = said = time.time()
    results = []
    for i, part in enumerate(x.split(CHUNK)):
        results.append(function(part.to(args.device)).cpu())
        done = min(1, (i + 1) * CHUNK / len(x))
        if time.time() - said > 30:
            said = time.time()
            print(
                f"{what}: {done:.0%}, {(said - began) / done * (1 - done):.0f} s left", flush=True
            )
    return torch.cat(results).double()


def frechet_distance(a, b):
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of features a, b [N, F]."""
    S_a, S_b = a.T.cov(), b.T.cov()
    cross = np.trace(scipy.linalg.sqrtm((S_a @ S_b).numpy()).real)
    return ((a.mean(0) - b.mean(0)).square().sum() + S_a.trace() + S_b.trace() - 2 * cross).item()


def load_inception(path, device):
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except (ValueError, RuntimeError) as error:
        raise BadInput(f"{path} is no TorchScript network: get {INCEPTION}.") from error


def fid(args, flow, config, train):
    """{steps: FID against the train split, or all there is}; {} without --fid-network."""
    if not args.fid_network:
        return {}

    def features(images):
        return args.fid_network(images.expand(-1, 3, -1, -1), return_features=True)

    def made(k):
        x0 = noise(config, FID_SAMPLES)
        return chunked(lambda y: features(few_steps(flow, y, args, k)), x0, args, f"FID, {k} steps")

    real = chunked(features, train, args, "FID, train images")
    return {k: frechet_distance(real, made(k)) for k in STEP_COUNTS}


@torch.no_grad()
def evaluate(args, flow, state, teacher, data):
    """bits/dim of the test images at 8, 4, 2, 1 steps, errors against the oracle, FID. Writes
    metrics.json, log_p.csv, extremes.png (likeliest first) and samples.png (a row a step count)."""
    images, names = data["test"]
    config = state["config"]
    probe = "rademacher" if args.paper else "dct"
    torch.manual_seed(0)
    seeds = [torch.Generator().manual_seed(i) for i in range(len(images))]  # each image has its own
    u = torch.stack([torch.rand(images[0].shape, generator=generator) for generator in seeds])
    x = f2d2.dequantize(images, u)
    some = torch.linspace(0, len(x) - 1, min(args.oracle_images, len(x))).long()

    def bits(log_p, x, what):
        return f2d2.bits_per_dim(chunked(log_p, x, args, what), x[0].numel())

    def slow(y):
        return f2d2.ode_log_likelihood((teacher or flow).velocity, y, ORACLE_STEPS, probe)

    def mean(bpd):
        return {"bpd": bpd.mean().item(), "se": (bpd.std() / len(bpd) ** 0.5).item()}

    oracle = bits(slow, x[some], "oracle")
    train = data["train"][0]
    distances = fid(args, flow, config, train if len(train) else images)
    columns = {}
    rows = {}
    for k in STEP_COUNTS:
        rows[str(k)] = row = {"nfe_sample": k + 2 * bool(args.guidance), "fid": distances.get(k)}
        if config["head"]:
            fast = bits(
                lambda y, k=k: f2d2.log_likelihood(flow, y, k, args.mirror), x, f"{k} steps"
            )
            columns[f"{k} steps"] = fast.tolist()
            error = fast[some] - oracle
            row |= mean(fast) | {
                "gap": error.mean().item(),
                "mae_oracle": error.abs().mean().item(),
            }
            row["corr"] = torch.corrcoef(torch.stack([fast[some], oracle]))[0, 1].item()

    table = [[name, *values] for name, *values in zip(names, *columns.values())]
    for i, value in zip(some.tolist(), oracle.tolist()):
        table[i].append(value)
    save_csv(args.out / "log_p.csv", ["image", *columns, "oracle"], table)
    if columns:
        order = np.argsort(columns[f"{STEP_COUNTS[0]} steps"])
        save_picture(args.out / "extremes.png", images[np.r_[order[:32], order[-32:]]], 8)
    save_picture(args.out / "samples.png", sheet(flow, args, config), 8)
    oracle_of = f"the ODE of {args.teacher}" if teacher else "its own ODE"
    about = {"dataset": args.dataset, "images": len(x), "step": state["step"], "config": config}
    about |= {"mirror": args.mirror, "guidance": args.guidance, "sha256": state["sha256"]}
    about |= {
        "oracle": mean(oracle) | {"of": oracle_of, "nfe": 2 * ORACLE_STEPS, "images": len(some)}
    }
    save_json(args.out / "metrics.json", about | {"steps": rows})

    print(f"\n{args.dataset}: {len(x)} images, step {state['step']}; oracle: {oracle_of}")
    print("  steps bits/dim       se      gap |-oracle|     corr      FID")
    for k, row in {"oracle": mean(oracle), **rows}.items():
        cells = [row.get(key) for key in ("bpd", "se", "gap", "mae_oracle", "corr", "fid")]
        print(k.rjust(7) + "".join(f"{'-' if c is None else format(c, '.3f'):>9}" for c in cells))


@torch.no_grad()
def write_samples(args, flow, state):
    """--sample N: N images as PNG, and samples.csv with log p of each in nats."""
    k = STEP_COUNTS[0]
    rows = []
    for x0 in noise(state["config"], args.sample, args.seed).split(CHUNK):
        x0 = x0.to(args.device)
        if args.guidance:
            x0 = f2d2.self_guidance(flow, x0, args.guidance)
        x1, own = f2d2.sample(flow, x0, k)
        log_p = f2d2.log_likelihood(flow, x1, k, args.mirror)
        for image, *values in zip(to_bytes(x1), log_p.tolist(), own.tolist()):
            rows.append([f"{len(rows):05d}.png", *values])
            save_picture(args.out / rows[-1][0], image[None], 1)
    save_csv(args.out / "samples.csv", ["image", "log_likelihood", "sample"], rows)
    about = {"step": state["step"], "sha256": state["sha256"], "seed": args.seed, "steps": k}
    about |= {"guidance": args.guidance, "mirror": args.mirror, "nfe": k + 2 * bool(args.guidance)}
    save_json(args.out / "metrics.json", about)
    print(f"{len(rows)} images in {k} steps, and samples.csv, are in {args.out}")


# --------------------------------------------------------------------------- the command line
def between(low, high=math.inf):
    """An argparse type: a number in [low, high], whole if low is."""

    def number(text):
        value = type(low)(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    return number


def parse(argv):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.error = lambda message: parser.exit(2, f"train_image.py: {message}\n")
    devices = ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    devices = ["cuda"] * torch.cuda.is_available() + devices
    add = parser.add_argument
    add("--dataset", help="cifar10 (the default), imagenet64, celeba64 or a folder of images")
    add("--data", type=Path, default=Path("data"), help="where named data sets are or go")
    add("--method", choices=RECIPES, help="default meanflow; flow trains a teacher")
    add("--no-divergence", action="store_true", help="sampling-only baseline, without a head")
    add("--teacher", type=Path, metavar="CKPT", help="gives v and div v, and the oracle")
    add("--init", type=Path, metavar="CKPT", help="weights to start from; default: the teacher's")
    add("--paper", action="store_true", help="the paper's objective and mirrored likelihood")
    add("--image-size", type=between(4), help="pixels a side, for a folder; default 32")
    add("--channels", type=between(4), help="of the U-Net; default 128")
    add("--blocks", type=between(1), help="residual blocks a level; default 4")
    add("--dropout", type=between(0.0, 0.9), help="probability; default the method's")
    add("--steps", type=between(1), help="of training; default the method's")
    add("--warmup", type=between(0), help="first steps, that train u alone; default the method's")
    add("--batch-size", type=between(1), help="images a step, in all; default the method's")
    add("--micro-batch", type=between(1), help="images at a time in a process; default 128")
    add("--lr", type=between(1e-9, 1.0), help="learning rate; default the method's")
    add("--seed", type=between(0, 2**64 - 1), default=0, help="of everything random; default 0")
    add("--out", type=Path, help="default below runs/image/; a run that is there goes on")
    add("--device", choices=devices, default=devices[0], help=f"default here {devices[0]}")
    add("--compile", action="store_true", help="torch.compile the loss")
    add("--eval", type=Path, metavar="CKPT", help="no training: log p of --dataset's test images")
    add("--sample", type=between(1), metavar="N", help="with --eval: N images and their log p")
    add("--oracle-images", type=between(1), default=64, help="with an oracle; default 64")
    add("--guidance", type=between(1e-9, 10.0), help="learning rate of the samples' self-guidance")
    add("--fid-network", type=Path, help=f"TorchScript Inception, {INCEPTION}")
    args = parser.parse_args(argv)
    training = ["method", "init", "image_size", "channels", "blocks", "dropout", "steps", "warmup"]
    training += ["batch_size", "micro_batch", "lr", "no_divergence", "compile"]
    typed = [k for k in training if getattr(args, k) is not None and getattr(args, k) is not False]
    typed = [f"--{k.replace('_', '-')}" for k in typed]
    if args.eval and typed:
        parser.error(f"--eval does not train: drop {', '.join(typed)}.")
    return parser, args


def settle(args, config, world):
    """Fills in what follows from the method, or the checkpoint; refuses what cannot work."""
    args.method = config.get("method") or args.method or "meanflow"
    args.dataset = args.dataset or config.get("dataset") or "cifar10"
    args.paper = args.paper or config.get("paper", False)
    recipe = RECIPES[args.method]
    side = SIZES.get(args.dataset)
    args.dataset = args.dataset if side else str(Path(args.dataset).resolve())
    defaults = {k: recipe[k] for k in ("steps", "batch_size", "lr", "dropout")}
    defaults |= {"channels": 128, "blocks": 4, "image_size": side or 32}
    vars(args).update({k: v for k, v in defaults.items() if getattr(args, k) is None})
    args.mirror = args.paper and recipe["condition"] in ("semigroup", "eulerian")
    args.head = config.get("head", args.method != "flow" and not args.no_divergence)
    share, rest = divmod(args.batch_size, world)
    args.micro_batch = args.micro_batch or min(128, share)
    launched = world == 1 or {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= set(os.environ)
    taught = args.teacher or args.eval or args.method != "shortcut-distill"
    alone = args.eval or not args.teacher or args.method not in ("flow", "shortcut")
    folder = side or args.sample or Path(args.dataset).is_dir()
    require(launched, "WORLD_SIZE is set: start with torchrun, or unset it.")
    require(folder, f"{args.dataset} is no folder: name one, or {', '.join(SIZES)}.")
    require(taught, "shortcut-distill needs --teacher CKPT, a latest.pt of --method flow.")
    require(alone, f"--method {args.method} has no teacher: drop it, or use shortcut-distill.")
    require(args.eval or not args.sample, "--sample needs a checkpoint: add --eval CKPT.")
    require(args.head or not args.sample, "--sample needs a divergence head, for the log p.")
    require(args.head or not args.guidance, "--guidance needs a divergence head: drop it.")
    require(args.image_size % 4 == 0, "--image-size must be a multiple of 4.")
    require(args.eval or args.image_size == (side or args.image_size), "drop --image-size.")
    require(not rest, f"--batch-size {args.batch_size} is no multiple of {world} processes.")
    require(args.micro_batch <= share, f"--micro-batch is at most a process's share, {share}.")


def run_evaluation(args, flow, state):
    """--eval, with or without --sample: needs the checkpoint and, but for samples, the images."""
    config = state["config"]
    path = config["teacher_path"]
    if path and not args.teacher and Path(path).exists():
        same = load(path, "cpu")[1]["sha256"] == config["teacher"]
        args.teacher = path if same else None
    teacher, taught = load(args.teacher, args.device) if args.teacher else (None, state)
    same = all(taught["config"][k] == config[k] for k in ("image_size", "colours"))
    require(same, f"{args.teacher} is of another image size or number of colours.")
    name = f"samples-{args.seed}" if args.sample else f"eval-{Path(args.dataset).name}"
    name += "-paper" * args.paper + f"-guided-{args.guidance}" * bool(args.guidance)
    args.out = args.out or args.eval.parent / f"{name}-{state['step']}"
    lock = open_folder(args.out)
    new = not (args.out / "metrics.json").exists()
    require(new, f"{args.out} holds an evaluation already: name another --out.")
    if args.sample:
        write_samples(args, flow, state)
    else:
        held_out = args.dataset in (config["dataset"], *SIZES)
        size = config["image_size"]
        data = load_data(args.dataset, args.data, size, config["colours"], held_out)
        evaluate(args, flow, state, teacher, data)
    lock.close()


def configure(args, teacher, source, colours):
    """What a run is; that of a run in --out must be the same."""
    config = {k: getattr(args, k) for k in CONFIG if hasattr(args, k)}
    config |= {"colours": colours, "teacher": teacher and teacher["sha256"]}
    config |= {"teacher_path": teacher and str(args.teacher.resolve())}
    config |= {"init": source and source["sha256"]}
    if source:
        keys = ("image_size", "channels", "blocks", "colours", "paper")
        wrong = [k for k in keys if source["config"][k] != config[k]]
        require(
            not wrong, f"{args.init or args.teacher} has other {', '.join(wrong)}: use its options."
        )
    return config


def run_training(args, rank, world):
    args.out = args.out or Path(f"runs/image/{Path(args.dataset).name}-{args.method}-{args.seed}")
    lock = open_folder(args.out) if rank == 0 else None
    path = args.out / "latest.pt"
    found = load(path, "cpu")[1]["config"] if path.exists() else {}
    if args.warmup is None:
        share = 0 if args.init or not args.head else RECIPES[args.method]["warmup"]
        args.warmup = found.get("warmup", int(share * args.steps))
    if world > 1:
        cuda = args.device == "cuda"
        args.device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else args.device
        distributed.init_process_group("nccl" if cuda else "gloo")
    teacher, taught = load(args.teacher, args.device) if args.teacher else (None, None)
    source = load(args.init, args.device)[1] if args.init else taught
    for turn in (True, False) if world > 1 else (True,):  # one process downloads
        if turn == (rank == 0):
            data = load_data(
                args.dataset, args.data, args.image_size, source and source["config"]["colours"]
            )
        if world > 1:
            distributed.barrier()
    images = data["train"][0]
    config = configure(args, taught, source, images.shape[1])
    wrong = [k for k in found if found[k] != config[k] and k != "teacher_path"]
    require(not wrong, f"{args.out} holds a run of other {', '.join(wrong)}: choose another --out.")

    torch.manual_seed(args.seed)
    flow = build(config, args.device)
    if source:  # a student starts from its teacher's weights
        parts = ("backbone", "head") if source["config"]["head"] else ("backbone",)
        weights = {k: w for k, w in source["ema"].items() if k.split(".")[0] in parts}
        flow.load_state_dict(weights, strict=False)
    if rank == 0:
        counts = f"{len(images):,} train, {len(data['test'][0]):,} test images"
        size = sum(p.numel() for p in flow.parameters())
        print(f"{counts}; {size:,} parameters; {args.steps} steps; {config}", flush=True)
    images = images.to(args.device) if images.numel() < 2**32 else images
    train(args, config, flow, teacher, images, rank, world)
    if rank == 0:
        evaluate(args, *load(path, args.device), teacher, data)
        lock.close()


def main(argv=None):
    parser, args = parse(argv)
    world = int(os.environ.get("WORLD_SIZE", 1))
    try:
        flow, state = load(args.eval, args.device) if args.eval else (None, {"config": {}})
        settle(args, state["config"], world)
        args.fid_network = args.fid_network and load_inception(args.fid_network, args.device)
        if args.eval:
            run_evaluation(args, flow, state)
        else:
            run_training(args, int(os.environ.get("RANK", 0)), world)
    except BadInput as error:
        parser.exit(2, f"train_image.py: {error}\n")


if __name__ == "__main__":
    main()
