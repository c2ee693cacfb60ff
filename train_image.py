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
import torch
import torchvision
from PIL import Image, ImageOps
from torch import distributed, nn

import f2d2

# fmt: off
RECIPE_KEYS = {  # shortcut(-distill)  meanflow     lsd           published with the method, but for:
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
    "half_life":    (50e6,             7.1e6,       1.8e6),       # of the averaged weights, in images
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
STEP_COUNTS = (8, 4, 2, 1)
ORACLE_STEPS = 64  # of the midpoint rule: 128 NFE
FID_SAMPLES = 50_000
CHUNK = 250  # images at a time in an evaluation
SAVE_SECONDS = 15 * 60


class BadInput(Exception):
    """One sentence for the user, what is wrong and what to type instead: exit code 2."""


# --------------------------------------------------------------------------- the network
def group_norm(channels):
    """Groups of four channels at least: groups of one would forget every channel's size."""
    return nn.GroupNorm(math.gcd(channels, channels // 4, 32), channels)


class Block(nn.Module):
    """x [B, c_in, H, H], embedding [B, E] -> [B, c_out, H', H'], a residual of two convolutions."""

    def __init__(self, c_in, c_out, embedding, dropout=0.0, attention=False, resize=None):
        super().__init__()
        self.resize = resize or nn.Identity()
        self.before = nn.Sequential(group_norm(c_in), nn.SiLU(), self.resize)
        self.before.extend([nn.Conv2d(c_in, c_out, 3, padding=1), group_norm(c_out)])
        self.modulate = nn.Linear(embedding, 2 * c_out)
        self.after = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(c_out, c_out, 3, 1, 1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.qkv = nn.Sequential(group_norm(c_out), nn.Conv2d(c_out, 3 * c_out, 1))
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
    """x [B, colours, H, H], t and s [B] -> u like x, features [B, feature_dim]. DDPM++ of "Score-
    Based Generative Modeling through Stochastic Differential Equations": three levels, one width."""

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
        self.norm = nn.Sequential(group_norm(width), nn.SiLU())
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


def build(model, device):
    """model: image_size, channels, blocks, dropout, colours, paper, head; checkpoints hold it."""
    unet = UNet(**{k: v for k, v in model.items() if k != "head"})
    return f2d2.JointFlowMap(unet, unet.feature_dim, model["head"], model["paper"]).to(device)


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
        image = torchvision.transforms.v2.functional.center_crop(image, crop)
    return np.asarray(ImageOps.fit(image, (size, size), Image.BICUBIC))


def read_folder(folder, size):
    """{path: image} of every file that is not hidden, once, links followed; says what it left out."""
    walk = os.walk(folder, followlinks=True)
    paths = sorted(Path(base) / name for base, _, names in walk for name in names)
    paths = {p.resolve(): p for p in paths if not p.name.startswith(".")}.values()
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
    if held_out and ("train" in folders) != bool(test):
        raise BadInput(f"{root} has only one of train/ and test/ (or val/): make both, or neither.")
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
            sets = [torchvision.datasets.CIFAR10(root, train, download=True) for train in (1, 0)]
            splits = [s.data for s in sets]
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
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise BadInput(
            f"{dataset} is not in {root} ({error}): {SOURCES[dataset]} has it."
        ) from error
    return {"train": dict(enumerate(splits[0])), "test": dict(enumerate(splits[-1]))}


def load_data(dataset, root, size, colours=None, held_out=True):
    """{"train": (uint8 [N, colours, H, H], names), "test": ...}. One colour if every image is grey
    and no checkpoint wants three; held_out as in folder_splits."""
    named = dataset in SIZES
    splits = named_splits(dataset, root) if named else folder_splits(Path(dataset), size, held_out)
    coloured = any(image.ndim == 3 for images in splits.values() for image in images.values())
    if colours == 1 and coloured:
        raise BadInput(f"{dataset} holds coloured images, and the checkpoint knows grey ones only.")
    shape = (size, size, colours or (3 if coloured else 1))
    data = {}
    for split, images in splits.items():
        if not images and (held_out or split == "test"):
            raise BadInput(f"{dataset} holds no {split} images that can be read: add some.")
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


def read_checkpoint(path, device):
    """A checkpoint of this script with all its keys and sound weights; never executes anything."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        with torch.device("meta"):
            network = build(state["config"]["model"], "meta")
        for weights in (state["flow"], state["ema"]):
            network.load_state_dict(weights, assign=True)
            if not all(w.dtype == torch.float32 and w.isfinite().all() for w in weights.values()):
                raise ValueError("its weights are not finite numbers of 32 bits")
        state["optimizer"]["state"], int(state["step"])
        return state
    except Exception as error:  # whatever a broken file may raise
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadInput(
            f"{path} is no checkpoint of this script ({why}): name a latest.pt."
        ) from error


def load_model(path, device):
    """The averaged network of a checkpoint, frozen, and the checkpoint; None, None without a path."""
    if path is None:
        return None, None
    state = read_checkpoint(path, device)
    flow = build(state["config"]["model"], device).eval().requires_grad_(False)
    flow.load_state_dict(state["ema"])
    return flow, state


def content(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


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
    path = args.out / "latest.pt"
    optimizer = getattr(torch.optim, recipe["optimizer"])(flow.parameters(), lr=args.lr)
    ema = torch.optim.swa_utils.AveragedModel(flow).requires_grad_(False)
    first = 0
    if path.exists():
        state = read_checkpoint(path, args.device)
        first = state["step"]
        flow.load_state_dict(state["flow"])
        ema.module.load_state_dict(state["ema"])
        ema.n_averaged.fill_(first)
        optimizer.load_state_dict(state["optimizer"])
    loss = torch.compile(f2d2.f2d2_loss) if args.compile else f2d2.f2d2_loss
    velocity = teacher and teacher.velocity

    def objective(x1, x0, t, s, eps, diagonal):
        f = flow if step > args.warmup else lambda x, t, s: flow(x, t, s)[:1]
        draws = {"x0": x0, "t": t, "s": s, "probe": eps, "diagonal": diagonal}
        return loss(f, x1, recipe["condition"], velocity, paper=args.paper, **draws)

    share = args.batch_size // world
    n = max(1, round(recipe["diagonal"] * share)) if recipe["condition"] else share
    most = max(1, min(n, share - n)) if recipe["condition"] else share  # pieces: a row of each kind
    pieces = min(math.ceil(share / args.micro_batch), most)
    began = saved = time.time()
    for step in range(first + 1, args.steps + 1):
        ramp = step / max(1, min(10_000, args.steps // 20))
        decay = (recipe["decay_after"] / step) ** 0.5
        left = math.inf if args.paper else 4 - 4 * (step - 1) / args.steps  # ours: down to zero
        optimizer.param_groups[0]["lr"] = args.lr * min(1, ramp, decay, left)

        losses = None
        while losses is None:
            optimizer.zero_grad()
            try:
                losses = accumulate(objective, draw(data, args, step, rank, world), n, pieces)
            except torch.OutOfMemoryError as error:
                if pieces == most:
                    raise BadInput(
                        "out of memory at the smallest piece: lower --channels."
                    ) from error
                pieces = min(2 * pieces, most)
                print(f"out of memory: {math.ceil(share / pieces)} images at a time from here on")

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
        ema.multi_avg_fn = lambda old, now, _, new=new: torch._foreach_lerp_(old, now, new)
        ema.update_parameters(flow)

        due = step == args.steps or time.time() - saved > SAVE_SECONDS
        if due or step % max(1, min(100, args.steps // 50)) == 0:
            terms = {k: v.item() for k, v in losses.items()} | {"grad": norm.item()}
            if not all(math.isfinite(value) for value in terms.values()):
                kept = f"{path} is of an earlier step" if path.exists() else "nothing was saved"
                raise BadInput(
                    f"the loss is not finite at step {step} ({kept}): lower --lr, new --out."
                )
            rate = (step - first) * args.batch_size / (time.time() - began)
            rest = (args.steps - step) * args.batch_size / rate
            line = " ".join(f"{k} {v:.4g}" for k, v in terms.items())
            if rank == 0:
                print(
                    f"{step}/{args.steps}: {line} | {rate:.0f} images/s, {rest:.0f} s left",
                    flush=True,
                )
        if due and rank == 0:
            state = {"config": config, "step": step, "flow": flow.state_dict()}
            state |= {"ema": ema.module.state_dict(), "optimizer": optimizer.state_dict()}
            save_whole(path, lambda file, state=state: torch.save(state, file))
            x0 = torch.randn(8, *data.shape[1:], generator=torch.Generator().manual_seed(0))
            rows = [few_steps(ema.module.eval(), x0.to(args.device), args, k) for k in STEP_COUNTS]
            save_picture(args.out / "progress.png", torch.cat(rows), 8)
            saved = time.time()


# --------------------------------------------------------------------------- evaluation
@torch.no_grad()
def few_steps(flow, x0, args, k):
    """Images in k steps from the noise x0, which --guidance moves first."""
    if args.guidance:
        x0 = f2d2.self_guidance(flow, x0, args.guidance)
    if args.method == "flow":  # no few-step map: Euler steps
        return to_bytes(f2d2.ode_sample(flow.velocity, x0, k, euler=True))
    return to_bytes(f2d2.sample(flow, x0, k)[0])


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
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of features a, b [N, F]; S_a S_b has the
    eigenvalues of S_a^(1/2) S_b S_a^(1/2)."""
    S_a, S_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(S_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ S_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + S_a.trace() + S_b.trace() - 2 * cross).item()


@torch.no_grad()
def evaluate(args, flow, teacher, data, about):
    """bits/dim of the test images at 8, 4, 2, 1 steps, errors against the oracle, FID. Writes
    metrics.json, log_p.csv, extremes.png (likeliest first) and samples.png (a row a step count)."""
    images, names = data["test"]
    probe = "rademacher" if args.paper else "dct"
    torch.manual_seed(0)
    seeds = [torch.Generator().manual_seed(i) for i in range(len(images))]  # each image has its own
    x = f2d2.dequantize(
        images, torch.stack([torch.rand(images[0].shape, generator=g) for g in seeds])
    )
    some = torch.linspace(0, len(x) - 1, min(args.oracle_images, len(x))).long()

    def bits(log_p, x, what):
        return f2d2.bits_per_dim(chunked(log_p, x, args, what), x[0].numel())

    def oracle_log_p(y):
        return f2d2.ode_log_likelihood((teacher or flow).velocity, y, ORACLE_STEPS, probe)

    oracle = bits(oracle_log_p, x[some], "oracle")
    columns = {}
    rows = {}
    for k in STEP_COUNTS if flow.head else ():
        fast = bits(lambda y, k=k: f2d2.log_likelihood(flow, y, k, args.mirror), x, f"{k} steps")
        columns[f"{k} steps"] = fast.tolist()
        error = fast[some] - oracle
        rows[str(k)] = {"bpd": fast.mean().item(), "se": (fast.std() / len(fast) ** 0.5).item()}
        rows[str(k)] |= {"gap": error.mean().item(), "mae_oracle": error.abs().mean().item()}
        rows[str(k)]["corr"] = torch.corrcoef(torch.stack([fast[some], oracle]))[0, 1].item()

    if args.fid_network and len(data["train"][0]):
        network = torch.jit.load(str(args.fid_network), map_location=args.device).eval()
        x0 = torch.randn(FID_SAMPLES, *images.shape[1:])

        def features(images):
            return network(images.expand(-1, 3, -1, -1), return_features=True)

        real = chunked(features, data["train"][0], args, "FID, train images")
        for k in STEP_COUNTS:
            made = chunked(
                lambda y, k=k: features(few_steps(flow, y, args, k)), x0, args, f"FID, {k}"
            )
            rows.setdefault(str(k), {})["fid"] = frechet_distance(real, made)
            rows[str(k)]["fid_nfe"] = k + 2 * bool(args.guidance)  # + a forward and a backward pass

    mean = {"bpd": oracle.mean().item(), "se": (oracle.std() / len(oracle) ** 0.5).item()}
    metrics = about | {"images": len(x), "oracle_images": len(some), "oracle": mean, "steps": rows}
    table = [[name, *values] for name, *values in zip(names, *columns.values())]
    for i, value in zip(some.tolist(), oracle.tolist()):
        table[i].append(value)
    save_csv(args.out / "log_p.csv", ["image", *columns, "oracle (bits/dim)"], table)
    if columns:
        order = np.argsort(next(iter(columns.values())))
        save_picture(args.out / "extremes.png", images[np.r_[order[:32], order[-32:]]], 8)
    x0 = torch.randn(8, *images.shape[1:], generator=torch.Generator().manual_seed(0)).to(
        args.device
    )
    rows = torch.cat([few_steps(flow, x0, args, k) for k in STEP_COUNTS])
    save_picture(args.out / "samples.png", rows, 8)
    save_json(args.out / "metrics.json", metrics)
    return metrics


def print_table(metrics):
    keys = ("bpd", "se", "gap", "mae_oracle", "corr", "fid")
    print("\n{dataset}, step {step}, {images} images; oracle: {oracle_of}".format(**metrics))
    print("  steps bits/dim       se      gap |-oracle|     corr      FID")
    for k, row in {"oracle": metrics["oracle"], **metrics["steps"]}.items():
        cells = ["-" if row.get(key) is None else f"{row[key]:.3f}" for key in keys]
        print(k.rjust(7) + "".join(cell.rjust(9) for cell in cells))


@torch.no_grad()
def write_samples(args, flow, about):
    """--sample N: N images as PNG, and samples.csv with log p of each in nats."""
    model = about["model"]
    shape = (args.sample, model["colours"], model["image_size"], model["image_size"])
    x0 = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed))
    k = STEP_COUNTS[0]
    rows = []
    for part in x0.split(CHUNK):
        part = part.to(args.device)
        if args.guidance:
            part = f2d2.self_guidance(flow, part, args.guidance)
        x1, own = f2d2.sample(flow, part, k)
        log_p = f2d2.log_likelihood(flow, x1, k, args.mirror)
        for image, *values in zip(to_bytes(x1), log_p.tolist(), own.tolist()):
            rows.append([f"{len(rows):05d}.png", *values])
            save_picture(args.out / rows[-1][0], image[None], 1)
    save_csv(args.out / "samples.csv", ["image", "log p", "log p from its noise (nats)"], rows)
    save_json(
        args.out / "metrics.json", about | {"images": len(rows), "nfe": k + 2 * bool(args.guidance)}
    )
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"train_image.py: {message}\n")
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
    add("--device", choices=["cuda", "cpu", "mps"], help="default cuda if there is one, or cpu")
    add("--compile", action="store_true", help="torch.compile the loss")
    add("--eval", type=Path, metavar="CKPT", help="no training: log p of --dataset's test images")
    add("--sample", type=between(1), metavar="N", help="with --eval: N images and their log p")
    add("--oracle-images", type=between(1), default=64, help="with an oracle; default 64")
    add("--guidance", type=between(1e-9, 10.0), help="learning rate of the samples' self-guidance")
    add("--fid-network", type=Path, help=f"TorchScript Inception, of {INCEPTION}")
    return parser, parser.parse_args(argv)


TRAINING = ("method", "init", "image_size", "channels", "blocks", "dropout", "steps", "warmup")
TRAINING += ("batch_size", "micro_batch", "lr", "no_divergence", "compile")


def settle(args, world):
    """Fills in what follows from the method or stands in the checkpoint; refuses what cannot be."""
    typed = [f"--{k.replace('_', '-')}" for k in TRAINING if getattr(args, k)]
    found = read_checkpoint(args.eval, "cpu")["config"] if args.eval else {}
    args.trained_on = found.get("dataset")
    args.method = found.get("method") or args.method or "meanflow"
    args.dataset = args.dataset or args.trained_on or "cifar10"
    args.dataset = args.dataset if args.dataset in SIZES else str(Path(args.dataset))
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.paper = args.paper or found.get("paper", False)
    recipe = RECIPES[args.method]
    args.mirror = args.paper and recipe["condition"] in ("semigroup", "eulerian")
    side = SIZES.get(args.dataset)
    defaults = {k: recipe[k] for k in ("steps", "batch_size", "lr", "dropout")}
    defaults |= {"channels": 128, "blocks": 4, "image_size": side or 32}
    defaults |= {
        "micro_batch": min(128, max(1, (args.batch_size or recipe["batch_size"]) // world))
    }
    vars(args).update({k: v for k, v in defaults.items() if getattr(args, k) is None})
    head = found["model"]["head"] if found else not args.no_divergence and args.method != "flow"
    args.head = head
    share = args.batch_size // world
    launched = {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= set(os.environ)
    if args.warmup is None and (args.init or not head):
        args.warmup = 0
    for wrong, sentence in (
        (world > 1 and not launched, "WORLD_SIZE is set: start with torchrun, or unset it"),
        (args.device == "cuda" and not torch.cuda.is_available(), "no CUDA here: use --device cpu"),
        (args.eval and typed, f"--eval does not train: drop {' '.join(typed)}"),
        (args.sample and not args.eval, "--sample needs a checkpoint: add --eval CKPT"),
        (
            not args.sample and not side and not Path(args.dataset).is_dir(),
            f"{args.dataset} is no folder: name one, or one of {', '.join(SIZES)}",
        ),
        (args.image_size % 4, f"--image-size {args.image_size} is no multiple of 4: use one"),
        (
            side and args.image_size != side and not args.eval,
            f"{args.dataset} is of side {side}: drop --image-size",
        ),
        (
            args.batch_size % world,
            f"--batch-size {args.batch_size} is no multiple of {world} processes",
        ),
        (args.micro_batch > share, f"--micro-batch is more than a process has: {share} at most"),
        (
            args.method == "shortcut-distill" and not args.teacher and not args.eval,
            "shortcut-distill needs --teacher CKPT, the latest.pt of a run with --method flow",
        ),
        (
            args.method in ("flow", "shortcut") and args.teacher and not args.eval,
            f"--method {args.method} has no teacher: drop --teacher, or use shortcut-distill",
        ),
        (args.guidance and not head, "--guidance needs a divergence head: drop it"),
        (args.sample and not head, "--sample needs a divergence head, for the log p"),
    ):
        if wrong:
            raise BadInput(f"{sentence}.")
    return found


def open_folder(args):
    """Makes --out, proves that it can be written, and keeps a second process out of it."""
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        args.lock = open(args.out / ".lock", "w")
        fcntl.flock(args.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BadInput(
            f"another process works in {args.out}: wait, or choose another --out."
        ) from error
    except OSError as error:
        raise BadInput(f"{args.out} cannot be written ({error}): choose another --out.") from error


def evaluate_only(args, config):
    """--eval, with or without --sample: needs the checkpoint and, but for samples, images."""
    flow, state = load_model(args.eval, args.device)
    source, known = config["teacher"] or (None, None)
    if not args.teacher and source and Path(source).exists() and content(source) == known:
        args.teacher = Path(source)
    teacher, _ = load_model(args.teacher, args.device)
    name = f"samples-{args.seed}" if args.sample else f"eval-{Path(args.dataset).name}"
    name += "-paper" * args.paper + (f"-guided-{args.guidance:g}" if args.guidance else "")
    args.out = args.out or args.eval.parent / name
    open_folder(args)
    about = describe(args, config, state["step"], content(args.eval))
    if (args.out / "metrics.json").exists():
        old = json.loads((args.out / "metrics.json").read_text())
        other = [k for k, v in about.items() if old.get(k) != v]
        if other:
            raise BadInput(
                f"{args.out} holds figures of other {', '.join(other)}: name another --out."
            )
    if args.sample:
        return write_samples(args, flow, about)
    model = config["model"]
    held_out = args.dataset in (args.trained_on, *SIZES)
    data = load_data(args.dataset, args.data, model["image_size"], model["colours"], held_out)
    print_table(evaluate(args, flow, teacher, data, about))


def describe(args, config, step, sha256):
    """What the figures of an evaluation are of."""
    about = {k: getattr(args, k) for k in ("dataset", "method", "mirror", "guidance", "seed")}
    oracle = f"the ODE of {args.teacher}" if args.teacher else "its own ODE"
    about |= {"oracle_of": oracle, "oracle_steps": ORACLE_STEPS, "model": config["model"]}
    return about | {"step": step, "sha256": sha256}


def train_and_evaluate(args, rank, world):
    path = args.out / "latest.pt"
    found = read_checkpoint(path, "cpu")["config"] if path.exists() else {}
    if args.warmup is None:
        args.warmup = found.get("warmup", int(RECIPES[args.method]["warmup"] * args.steps))
    keys = ("dataset", "method", "paper", "seed", "batch_size", "lr", "warmup")
    config = {k: getattr(args, k) for k in keys}
    for k in ("teacher", "init"):
        config[k] = getattr(args, k) and [
            str(getattr(args, k).resolve()),
            content(getattr(args, k)),
        ]
    model = {k: getattr(args, k) for k in ("image_size", "channels", "blocks", "dropout", "paper")}
    config["model"] = model | {"head": args.head}
    wrong = [k for k in config if k != "model" and found and found[k] != config[k]]
    wrong += [k for k, v in config["model"].items() if found and found["model"][k] != v]
    if wrong:
        raise BadInput(f"{args.out} holds a run of other {', '.join(wrong)}: choose another --out.")

    torch.manual_seed(args.seed)
    teacher, teacher_state = load_model(args.teacher, args.device)
    _, source = load_model(args.init, args.device) if args.init else (None, teacher_state)
    if world > 1 and rank > 0:  # one process downloads
        distributed.barrier()
    colours = source["config"]["model"]["colours"] if source else None
    data = load_data(args.dataset, args.data, args.image_size, colours)
    if world > 1 and rank == 0:
        distributed.barrier()
    config["model"]["colours"] = data["train"][0].shape[1]
    flow = build(config["model"], args.device)
    if source:  # a student starts from its teacher's weights
        other = source["config"]["model"]
        wrong = [
            k for k, v in config["model"].items() if other[k] != v and k not in ("head", "dropout")
        ]
        if wrong:
            raise BadInput(
                f"{args.init or args.teacher} has other {', '.join(wrong)}: use its options."
            )
        weights = (
            source["ema"]
            if other["head"] and args.head
            else {k: v for k, v in source["ema"].items() if k.startswith("backbone.")}
        )
        flow.load_state_dict(weights, strict=False)
    size = sum(p.numel() for p in flow.parameters())
    if rank == 0:
        print(
            f"{len(data['train'][0]):,} train, {len(data['test'][0]):,} test images; {size:,} parameters; {args.steps} steps; {config}"
        )
    images = data["train"][0]
    resident = images.to(args.device) if images.numel() < 2**32 else images
    train(args, config, flow, teacher, resident, rank, world)
    if rank == 0:
        flow, state = load_model(path, args.device)
        about = describe(args, config, state["step"], content(path))
        print_table(evaluate(args, flow, teacher, data, about))


def main(argv=None):
    parser, args = parse(argv)
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    try:
        config = settle(args, world)
        if args.eval:
            return evaluate_only(args, config)
        args.out = args.out or Path(
            f"runs/image/{Path(args.dataset).name}-{args.method}-{args.seed}"
        )
        if rank == 0:
            open_folder(args)
        if world > 1:
            cuda = args.device == "cuda"
            args.device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else args.device
            distributed.init_process_group("nccl" if cuda else "gloo")
        train_and_evaluate(args, rank, world)
    except BadInput as error:
        parser.exit(2, f"train_image.py: {error}\n")


if __name__ == "__main__":
    main()
