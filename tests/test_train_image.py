"""train_image.py: its network, its recipes and its training, on tiny stand-ins."""

import contextlib
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from exact import TinyBackbone, times
from PIL import Image
from torch import nn

import f2d2
import train_image
from f2d2 import JointFlowMap, f2d2_loss
from train_image import OPTIONS, RECIPES, Block, UNet, main, to_bytes

ROOT = Path(train_image.__file__).parent
CPU = "--device cpu"
QUICK = f"--oracle-images 3 {CPU}"
NETWORK = "--image-size 8 --channels 4 --blocks 1 --dropout 0"
TINY = f"{NETWORK} {QUICK} --batch-size 4 --lr 1e-3"
MODEL = dict(image_size=8, channels=4, blocks=1, dropout=0.0, colours=3, paper=False)
TERMS = ("vm", "u", "div", "D")
COUNTS = ["8", "4", "2", "1"]
CONSTANTS = {  # what the stand-ins make smaller
    name: getattr(train_image, name) for name in ("ORACLE_STEPS", "ORACLE_RUNS", "FID_SAMPLES")
}


# ------------------------------------------------------------------------------- stand-ins
class Small(TinyBackbone):
    """Behind the U-Net's door, for the tests in which the network does not matter."""

    def __init__(self, image_size, colours, channels, blocks, paper, dropout):
        super().__init__(colours * image_size**2, channels, paper)
        self.feature_dim = channels
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, t, s):
        return super().forward(self.dropout(x), t, s)


@contextlib.contextmanager
def stand_ins():
    """A small network, a short oracle, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_image, "UNet", Small)
        patch.setattr(train_image, "ORACLE_STEPS", 2)
        patch.setattr(train_image, "ORACLE_RUNS", 2)
        patch.setattr(train_image, "FID_SAMPLES", 16)
        yield
    torch.set_num_threads(threads)


def write_images(folder, n, size=8, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return images.transpose(0, 3, 1, 2)


def write_photos(folder):
    """train/ with 12 images, test/ with 5."""
    write_images(folder / "train", 12)
    write_images(folder / "test", 5, seed=1)
    return folder


def words(*options):
    """A command line."""
    return " ".join(options).split()


def call(*options):
    main(words(*options))


def metrics_of(out):
    return json.loads((out / "metrics.json").read_text())


def run(out, photos, *options, steps=3):
    call(TINY, f"--dataset {photos} --steps {steps} --out {out}", *options)
    return metrics_of(out)


def stopped(capsys, code, *options):
    """What the script says, in one line, when it stops with this exit code."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*options)
    assert stop.value.code == code
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1, message
    return message


def checkpoint(out):
    return torch.load(out / "latest.pt", weights_only=True)


def edit(path, **changes):
    torch.save(torch.load(path, weights_only=True) | changes, path)


def spy(monkeypatch, change=None):
    """Records the arguments of every call of the loss by name; change(losses, arguments) if any."""
    calls = []

    def loss(*args, **options):
        bound = inspect.signature(f2d2_loss).bind(*args, **options)
        bound.apply_defaults()
        calls.append(bound.arguments)
        losses = f2d2_loss(*args, **options)
        return change(losses, bound.arguments) if change else losses

    monkeypatch.setattr(f2d2, "f2d2_loss", loss)
    return calls


def no_loss(flow, x1, *args, **options):
    """Costs nothing, teaches nothing."""
    return dict.fromkeys(TERMS, x1.new_zeros((), requires_grad=True))


def assert_same_weights(a, b, **tolerance):
    for part in ("flow", "ema"):
        assert a[part].keys() == b[part].keys()
        for name, weight in a[part].items():
            torch.testing.assert_close(weight, b[part][name], **tolerance)


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with stand_ins():
        yield


@pytest.fixture
def real_network(monkeypatch):
    monkeypatch.setattr(train_image, "UNet", UNet)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def teacher(tiny, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    run(out, photos, "--method flow --lr 0.05")
    return out / "latest.pt"


# ------------------------------------------------------------------------------- the network
def unet(size=8, colours=3, dropout=0.0):
    torch.manual_seed(0)
    backbone = UNet(size, colours, 4, 1, False, dropout)
    flow = JointFlowMap(backbone, backbone.feature_dim).double()
    for p in flow.parameters():
        nn.init.normal_(p, std=0.2)
    return flow


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_default_unet_has_50_to_60_million_parameters_and_a_small_head():
    with torch.device("meta"):
        backbone = UNet(32, 3, OPTIONS["channels"][0], OPTIONS["blocks"][0], False, 0.0)
        flow = JointFlowMap(backbone, backbone.feature_dim)
        x = torch.empty(2, 3, 32, 32)
        t = torch.empty(2)
        u, D = flow(x, t, t)
    size = sum(p.numel() for p in flow.parameters())
    head = sum(p.numel() for p in flow.head.parameters())
    assert u.shape == x.shape and D.shape == t.shape
    assert 50e6 < size < 60e6 and head < 0.02 * size


@pytest.mark.parametrize("size", [16, 32, 64])
def test_attention_stands_in_the_middle_and_where_an_image_is_16_wide(size):
    with torch.device("meta"):
        backbone = UNet(size, 3, 4, 2, False, 0.0)
        t = torch.empty(2)
        widths = []
        for block in (*backbone.down, *backbone.up):
            block.register_forward_hook(
                lambda block, x, y: widths.append((y.shape[-1], block.qkv is not None))
            )
        backbone(torch.empty(2, 3, size, size), t, t)
    assert [block.qkv is not None for block in backbone.middle] == [True, False]
    assert all(attends == (width == 16) for width, attends in widths)
    assert sum(attends for _, attends in widths) >= 5


def test_unet_derivatives_attention_included_against_central_differences():
    flow = unet(size=16)
    assert sum(isinstance(m, Block) and m.qkv is not None for m in flow.modules()) > 1
    t, s = times(2)
    x = noise(2, 3, 16, 16)
    directions = (x.flip(0), torch.ones_like(t), 2 * torch.ones_like(t))
    _, found = torch.func.jvp(flow, (x, t, s), directions)
    e = 1e-5
    plus = flow(*(a + e * da for a, da in zip((x, t, s), directions)))
    minus = flow(*(a - e * da for a, da in zip((x, t, s), directions)))
    for derivative, p, m in zip(found, plus, minus):
        torch.testing.assert_close(derivative, (p - m) / (2 * e), rtol=1e-5, atol=1e-6)


def random_block(attention):
    torch.manual_seed(0)
    block = Block(4, 4, 0.0, attention, None).double()
    for p in block.parameters():
        nn.init.normal_(p, std=0.5)
    return block


def test_attention_is_torch_s():
    block = random_block(True)
    plain = random_block(False)
    plain.load_state_dict(block.state_dict(), strict=False)
    x = noise(2, 4, 3, 3)
    embedding = noise(2, 4)
    h = plain(x, embedding)
    q, k, v = (a.transpose(1, 2) for a in block.qkv(h).flatten(2).chunk(3, 1))
    out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape)
    torch.testing.assert_close(block(x, embedding), h + block.merge(out))


def test_dropout_is_in_every_block():
    backbone = unet(dropout=0.3).backbone
    shares = [m.p for m in backbone.modules() if isinstance(m, nn.Dropout)]
    assert shares == [0.3] * sum(isinstance(m, Block) for m in backbone.modules())


# ------------------------------------------------------------------------------- the recipes
ROWS = (
    "condition optimizer lr batch_size steps warm_share dropout flip diagonal clip half_life "
    "decay_after"
).split()
SHORTCUT = ("semigroup", "RAdam", 1e-4, 512, 645e3, 10 / 11, 0.13, 0, 0.5, 0.01, 50e6, math.inf)
PUBLISHED = {
    "flow": (None, "RAdam", 1e-4, 512, 586e3, 0, 0.13, 0, 1, 0.01, 50e6, math.inf),
    "shortcut": SHORTCUT,
    "shortcut-distill": SHORTCUT,
    "meanflow": (
        "eulerian",
        "Adam",
        6e-4,
        1024,
        8e5,
        0.5,
        0.2,
        0.5,
        0.25,
        math.inf,
        7.1e6,
        math.inf,
    ),
    "lsd": ("lagrangian", "RAdam", 1e-4, 256, 8e5, 0.5, 0, 0.5, 0.5, 1.0, 1.8e6, 35e3),
}


def test_the_published_recipes_and_every_constant():
    for method, row in PUBLISHED.items():
        assert tuple(RECIPES[method][name] for name in ROWS) == row, method
        assert set(RECIPES[method]) == {"method", *ROWS}
    assert CONSTANTS == dict(ORACLE_STEPS=64, ORACLE_RUNS=8, FID_SAMPLES=50_000)
    assert train_image.SAVE_SECONDS == 15 * 60 and train_image.STEP_COUNTS == (8, 4, 2, 1)
    assert train_image.SIZES == dict(cifar10=32, imagenet64=64, celeba64=64)
    args, source = train_image.parse(words("--dataset nowhere --out nowhere"))
    expected = dict(method="meanflow", image_size=32, colours=3, channels=128, blocks=4)
    expected |= dict(micro_batch=128, oracle_images=64, seed=0, batch_size=1024, warmup=400_000)
    expected |= dict(head=True, paper=False, compile=False, pieces=8, lr=6e-4, dropout=0.2)
    assert {name: vars(args)[name] for name in expected} == expected and source is None
    assert train_image.parse(["--dataset", "imagenet64"])[0].image_size == 64
    assert train_image.parse([])[0].dataset == "cifar10"


def rates(call):
    """How many rates the network of a call of the loss returns: 2 with a head."""
    return len(call["flow"](call["x1"], *torch.rand(2, len(call["x1"]))))


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("method", ["flow", "shortcut", "meanflow", "lsd"])
def test_the_recipe_reaches_the_loss(tmp_path, photos, monkeypatch, method, paper):
    calls = spy(monkeypatch)
    options = f"--method {method} --dropout 0.25 {'--paper' * paper}"
    run(tmp_path, photos, options, steps=11)
    warm = {"flow": 11, "shortcut": 10, "meanflow": 5, "lsd": 5}[method]
    assert [rates(call) for call in calls] == [1] * warm + [2] * (11 - warm)
    for call in calls:
        assert call["condition"] == PUBLISHED[method][0]
        assert call["diagonal"] == PUBLISHED[method][8]
        assert call["probe"] == ("rademacher" if paper else "dct")
        assert call["paper"] == paper and call["teacher"] is None
        assert call["flow"].backbone.dropout.p == 0.25


@pytest.mark.parametrize("method", ["shortcut-distill", "meanflow", "lsd"])
def test_the_teacher_reaches_the_loss(tmp_path, photos, teacher, monkeypatch, method):
    calls = spy(monkeypatch)
    run(tmp_path, photos, f"--method {method} --teacher {teacher} --warmup 1", steps=2)
    frozen = train_image.build(MODEL | {"head": False}, "cpu").eval()
    frozen.load_state_dict(checkpoint(teacher.parent)["ema"])
    t = torch.rand(4)
    for call, heads in zip(calls, (1, 2)):
        assert rates(call) == heads
        x1 = call["x1"]
        assert torch.equal(call["teacher"](x1, t), frozen.velocity(x1, t))


class Stop(Exception):
    pass


def record_steps(monkeypatch, read, stop=False):
    """read(optimizer) at every step of the optimizer, which then stops if asked to."""
    records = []
    for kind in (torch.optim.RAdam, torch.optim.Adam):

        def step(self, *args, step=kind.step):
            records.append(read(self))
            if stop:
                raise Stop
            return step(self, *args)

        monkeypatch.setattr(kind, "step", step)
    return records


def rate(optimizer):
    return optimizer.param_groups[0]["lr"]


def test_the_learning_rate_rises_and_in_the_last_quarter_falls_to_zero(
    tmp_path, photos, monkeypatch
):
    monkeypatch.setattr(f2d2, "f2d2_loss", no_loss)
    records = record_steps(monkeypatch, rate)
    run(tmp_path / "ours", photos, "--method shortcut", steps=40)
    assert records[:30] == pytest.approx([0.5e-3] + 29 * [1e-3])
    assert records[30:] == pytest.approx([1e-3 * k / 10 for k in range(10, 0, -1)])
    records.clear()
    run(tmp_path / "paper", photos, "--method shortcut --paper", steps=40)
    assert records == pytest.approx([0.5e-3] + 39 * [1e-3])


@pytest.mark.parametrize(
    "method, done, share",
    [
        ("lsd", 139_999, 0.5),
        ("meanflow", 139_999, 1),
        ("shortcut", 139_999, 1),
        ("lsd", 4_999, 0.5),
    ],
)
def test_the_learning_rate_of_lsd_falls_as_the_root_and_all_rise_for_10_000_steps(
    tmp_path, photos, monkeypatch, method, done, share
):
    run(tmp_path, photos, f"--method {method}", steps=1)
    edit(tmp_path / "latest.pt", step=done)
    records = record_steps(monkeypatch, rate, stop=True)
    with pytest.raises(Stop):
        run(tmp_path, photos, f"--method {method}", steps=1_000_000)
    assert records == pytest.approx([1e-3 * share])


@pytest.mark.parametrize("method, clip", [("shortcut", 0.01), ("lsd", 1.0), ("meanflow", None)])
def test_gradients_are_clipped_as_published(tmp_path, photos, monkeypatch, method, clip):
    def length(optimizer):
        gradients = [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]
        return torch.stack([g.square().sum() for g in gradients]).sum().sqrt().item()

    def a_thousand_times(losses, arguments):
        return {name: 1000 * loss for name, loss in losses.items()}

    spy(monkeypatch, a_thousand_times)
    lengths = record_steps(monkeypatch, length)
    run(tmp_path, photos, f"--method {method}", steps=2)
    assert lengths == pytest.approx([clip] * 2, rel=1e-3) if clip else min(lengths) > 10


@pytest.mark.parametrize(
    "method, images", [("flow", 50e6), ("shortcut", 50e6), ("meanflow", 7.1e6), ("lsd", 1.8e6)]
)
@pytest.mark.parametrize("done", [39, 9_999_998])
def test_averaged_weights_remember_a_twentieth_of_the_images_seen_up_to_the_published_number(
    tmp_path, photos, method, images, done
):
    options = f"--method {method} --batch-size 128"
    run(tmp_path, photos, options, steps=1)
    state = checkpoint(tmp_path)
    assert_same_weights(state, {"flow": state["ema"], "ema": state["flow"]})
    nothing = {k: torch.zeros_like(w) for k, w in state["ema"].items()}
    edit(tmp_path / "latest.pt", step=done, ema=nothing)
    run(tmp_path, photos, options, steps=done + 1)
    newest = 1 - 0.5 ** (128 / min(images, 0.05 * (done + 1) * 128))
    state = checkpoint(tmp_path)
    assert state["step"] == done + 1
    for name, weight in state["flow"].items():
        if "variances" not in name:  # a constant
            torch.testing.assert_close(state["ema"][name], newest * weight, rtol=1e-3, atol=0)


def test_the_average_starts_again_with_the_head(tmp_path, photos):
    run(tmp_path, photos, "--method shortcut --warmup 1", steps=2)
    nothing = {k: torch.zeros_like(w) for k, w in checkpoint(tmp_path)["ema"].items()}
    edit(tmp_path / "latest.pt", step=1, ema=nothing)
    run(tmp_path, photos, "--method shortcut --warmup 1", steps=2)
    state = checkpoint(tmp_path)
    for name, weight in state["flow"].items():
        if "variances" not in name:
            torch.testing.assert_close(state["ema"][name], weight, rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------- batches
def batch_of(method, images, paper=False):
    choices = dict(batch_size=1000, world=1, pieces=1, device="cpu", paper=paper)
    args = train_image.argparse.Namespace(**RECIPES[method] | choices)
    torch.manual_seed(0)
    return train_image.draw(images, args)


@pytest.mark.parametrize("method", ["flow", "shortcut", "meanflow", "lsd"])
def test_a_batch_is_drawn_from_all_images_and_flipped_by_the_recipe(method):
    images = torch.arange(240, dtype=torch.uint8).reshape(5, 3, 4, 4)
    (x1,) = batch_of(method, images).values()
    drawn = to_bytes(x1)
    assert 128 * (x1 + 1) - drawn == pytest.approx(0.5, abs=0.5)  # dequantized
    straight = (drawn[:, None] == images).flatten(2).all(2)
    mirrored = (drawn[:, None] == images.flip(3)).flatten(2).all(2)
    assert (straight | mirrored).sum(0).min() > 150 and (straight | mirrored).any(1).all()
    assert mirrored.double().sum(1).mean().item() == pytest.approx(
        RECIPES[method]["flip"], abs=0.05
    )


def test_the_paper_s_meanflow_has_times_of_its_own():
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    batch = batch_of("meanflow", images, paper=True)
    assert (batch["t"] <= batch["s"]).all()
    logits = torch.logit(1 - batch["t"].double())  # the larger of two: mean -2 + 2 / sqrt(pi)
    assert logits.mean() == pytest.approx(-2 + 2 / math.pi**0.5, abs=0.2)
    assert set(batch_of("lsd", images, paper=True)) == {"x1"}


def as_process(monkeypatch, rank, world):
    """As torchrun starts it; the gradients of the others are its own."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # comes back
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    fakes = dict(is_torchelastic_launched=lambda: True, init_process_group=lambda **options: None)
    fakes |= dict(barrier=lambda: None, all_reduce=lambda gradient: gradient.mul_(world))
    for name, fake in fakes.items():
        monkeypatch.setattr(train_image.distributed, name, fake)


def test_a_step_s_draws_are_a_function_of_seed_step_and_process(tmp_path, photos, monkeypatch):
    seen = {}

    def record(losses, arguments):
        seen.setdefault(name, []).append(torch.rand(3).tolist())  # after the images and the noise
        return losses

    for name, seed, rank in (("first", 0, 0), ("again", 0, 0), ("other", 1, 0), ("rank", 0, 1)):
        with monkeypatch.context() as patch:
            if rank:
                as_process(patch, rank, 2)
            spy(patch, record)
            options = f"--method lsd --steps 2 --seed {seed} --batch-size {4 + 4 * rank}"
            call(TINY, f"--dataset {photos} --out {tmp_path / name}", options)
    assert seen["first"] == seen["again"]
    different = seen["first"] + seen["other"] + seen["rank"]
    assert len(set(map(tuple, different))) == 6
    first, other = (checkpoint(tmp_path / name)["flow"] for name in ("first", "other"))
    assert (first["head.0.weight"] - other["head.0.weight"]).abs().max() > 0.01  # from the start


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_reads_its_share_and_the_first_one_the_test_images(
    tmp_path, photos, monkeypatch, capsys, rank
):
    as_process(monkeypatch, rank, 2)
    calls = spy(monkeypatch)
    opened = []
    whole = Image.open

    def record(path):
        opened.append(Path(path).relative_to(photos).as_posix())
        return whole(path)

    monkeypatch.setattr(Image, "open", record)
    options = "--method flow --batch-size 16 --steps 2"
    call(TINY, f"--dataset {photos} --out {tmp_path}/out", options)
    test = [f"test/{i:03d}.png" for i in range(5)]
    assert opened == test * (rank == 0) + [f"train/{i:03d}.png" for i in range(rank, 12, 2)]
    images = write_images(tmp_path / "again", 12)[rank::2]
    drawn = {image.numpy().tobytes() for call in calls for image in to_bytes(call["x1"])}
    assert drawn <= {image.tobytes() for image in images} and len(drawn) > 3
    assert {len(call["x1"]) for call in calls} == {8}
    assert (capsys.readouterr().out == "") == (rank == 1)
    assert (tmp_path / "out/latest.pt").exists() == (rank == 0)


def test_gradients_are_averaged_over_the_processes(monkeypatch):
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[1.0, 5.0]])
    other = torch.tensor([[3.0, -3.0]])
    reduced = lambda gradient: gradient.add_(other / 2)  # noqa: E731
    monkeypatch.setattr(train_image.distributed, "all_reduce", reduced)
    args = dict(world=2, steps=40, lr=1.0, paper=False, batch_size=4, warmup=0)
    args = train_image.argparse.Namespace(**RECIPES["meanflow"] | args)
    optimizer = torch.optim.SGD(layer.parameters())
    ema = nn.Linear(2, 1, bias=False).requires_grad_(False)
    norm = train_image.update(args, 10, layer, ema, optimizer)
    assert norm == pytest.approx(5**0.5) and layer.weight.grad.tolist() == [[2, 1]]


# ------------------------------------------------------------------------------- pieces
def test_pieces_end_with_the_weights_of_the_whole(tmp_path, photos, monkeypatch, capsys):
    """Of the same draws, which otherwise each piece makes for itself."""
    x1, x0 = noise(2, 8, 3, 8, 8).float()
    t, s = times(8, dtype=torch.float32)

    def draw(images, args):
        n = 8 // args.pieces
        start = n * (len(calls) % args.pieces)
        rows = slice(start, start + n)
        return dict(x1=x1[rows] / 2, x0=x0[rows], t=t[rows], s=s[rows])

    monkeypatch.setattr(train_image, "draw", draw)
    for size in (128, 2):
        calls = spy(monkeypatch)
        options = f"--method flow --batch-size 8 --micro-batch {size}"
        run(tmp_path / str(size), photos, options, steps=2)
        assert [len(call["x1"]) for call in calls] == 16 // min(size, 8) * [min(size, 8)]
    norms = [float(norm) for norm in re.findall(r"grad (\S+)", capsys.readouterr().out)]
    assert norms[:2] == pytest.approx(norms[2:], rel=1e-3)  # before they are clipped
    whole, cut = checkpoint(tmp_path / "128"), checkpoint(tmp_path / "2")
    assert_same_weights(whole, cut, rtol=1e-5, atol=1e-6)


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("MPS backend out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
]


@pytest.mark.parametrize("error", MEMORY, ids=str)
def test_out_of_memory_is_one_sentence(tmp_path, photos, teacher, monkeypatch, capsys, error):
    def full(*args, **options):
        raise error

    monkeypatch.setattr(f2d2, "f2d2_loss", full)
    monkeypatch.setattr(f2d2, "ode_log_likelihood", full)
    for options in (TINY, f"--eval {teacher} {QUICK}"):
        command = f"{options} --dataset {photos} --out {tmp_path}/out"
        assert "--micro-batch" in stopped(capsys, 2, command)
    error.args = ("CUDA error: an illegal memory access",)
    with pytest.raises(type(error), match="illegal"):
        call(command)


# ------------------------------------------------------------------------------- training
RUNS = [
    "flow",
    "shortcut",
    "meanflow",
    "lsd",
    "shortcut-distill --teacher T",
    "meanflow --teacher T",
    "lsd --teacher T",
    "meanflow --no-divergence",
    "lsd --no-divergence --teacher T",
    "shortcut --paper",
    "meanflow --paper",
    "lsd --paper",
]


@pytest.mark.parametrize("options", RUNS)
def test_every_method_trains_and_goes_on(tmp_path, photos, teacher, monkeypatch, options):
    options = f"--method {options}".replace("T", str(teacher))
    run(tmp_path, photos, options, steps=2)
    calls = spy(monkeypatch)
    metrics = run(tmp_path, f"{photos}/", options, steps=4)
    run(tmp_path, photos, options, steps=4)
    assert len(calls) == 2 and metrics["step"] == 4 == checkpoint(tmp_path)["step"]
    head = "--no-divergence" not in options and "--method flow" not in options
    assert ("head.0.weight" in checkpoint(tmp_path)["ema"]) == head
    assert metrics["images"] == 5 and metrics["oracle"]["images"] == 3
    assert math.isfinite(metrics["oracle"]["bpd"]) and metrics["oracle"]["energy"] > 0
    for k in COUNTS:
        expected = {"bpd", "bpd_oracle", "gap", "mae_oracle", "corr"} if head else set()
        assert set(metrics["steps"][k]) == expected
    for picture in ("samples.png", "progress.png"):
        width, height = Image.open(tmp_path / picture).size
        assert width > height  # eight images in each of four rows


def test_saves_go_by_a_clock_that_nobody_sets_and_seconds_left_are_said(
    tmp_path, photos, monkeypatch, capsys
):
    """Ten minutes a step: a save at the first, at every second one, and at the last."""
    now = [1000.0]
    saved = []
    whole = torch.save

    def later(losses, arguments):
        now[0] += 600
        return losses

    def record(state, *args, **options):
        saved.append(state["step"])
        return whole(state, *args, **options)

    spy(monkeypatch, later)
    monkeypatch.setattr(torch, "save", record)
    monkeypatch.setattr(train_image.time, "monotonic", lambda: now[0])
    run(tmp_path, photos, "--method flow", steps=6)
    assert saved == [1, 3, 5, 6]
    said = dict(re.findall(r"^(\d)/6: vm .* grad .* (\d+) s left", capsys.readouterr().out, re.M))
    assert said == {"1": "3000", "3": "1800", "5": "600", "6": "0"}


def test_out_is_below_runs_by_default(tmp_path, photos, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for paper in ("", "--paper"):
        call(TINY, f"--dataset {photos} --method shortcut --steps 1 --seed 7", paper)
    folders = sorted(path.parent.name for path in tmp_path.glob("runs/image/*/metrics.json"))
    assert folders == [f"{photos.name}-shortcut-7", f"{photos.name}-shortcut-paper-7"]


def test_a_student_starts_from_its_teacher_or_from_init(tmp_path, photos, teacher, monkeypatch):
    other = tmp_path / "other"
    run(other, photos, "--method meanflow --seed 3", steps=2)
    calls = spy(monkeypatch, lambda losses, arguments: no_loss(None, arguments["x1"]))
    distill = f"--method shortcut-distill --teacher {teacher}"
    init = f"--init {other}/latest.pt"
    for name, options, source in (
        ("student", distill, teacher.parent),
        ("init", f"{distill} {init}", other),
        ("plain", f"--method meanflow {init}", other),
    ):
        run(tmp_path / name, photos, options, steps=4)
        found = checkpoint(tmp_path / name)["flow"]
        expected = checkpoint(source)["ema"]
        assert set(expected) <= set(found)
        for key, weight in expected.items():
            assert torch.equal(found[key], weight), key
    assert [rates(call) for call in calls] == [1, 1, 1, 2] + 8 * [2]  # --init: no warm start


def test_averaged_weights_are_evaluated(tmp_path, photos):
    trained = run(tmp_path, photos, "--method lsd")
    state = checkpoint(tmp_path)
    found = {}
    for part in ("flow", "ema"):
        weights = {k: w + 0.1 for k, w in state[part].items()}
        torch.save(state | {part: weights}, tmp_path / "other.pt")
        call(QUICK, f"--eval {tmp_path}/other.pt --dataset {photos} --out {tmp_path / part}")
        found[part] = metrics_of(tmp_path / part)["steps"]
    assert found["flow"] == trained["steps"]
    assert found["ema"]["1"]["bpd"] != pytest.approx(trained["steps"]["1"]["bpd"], abs=1e-4)


def test_the_teacher_in_the_checkpoint_is_the_oracle_wherever_it_is_taken(
    tmp_path, photos, teacher, monkeypatch
):
    at_the_teacher = metrics_of(teacher.parent)["oracle"]
    student = run(tmp_path / "a", photos, f"--method lsd --teacher {teacher}")
    alone = run(tmp_path / "b", photos, "--method lsd")["oracle"]
    assert student["oracle"] == at_the_teacher | {"of": "its teacher's ODE"}
    assert alone["of"] == "its own ODE" == at_the_teacher["of"]
    assert alone["bpd"] != at_the_teacher["bpd"]

    empty = tmp_path / "empty"
    shutil.copytree(photos / "test", empty / "pictures")
    shutil.move(tmp_path / "a/latest.pt", empty)
    monkeypatch.chdir(empty)
    call(QUICK, "--eval latest.pt --dataset pictures")
    found = metrics_of(Path("eval"))
    for key in ("oracle", "steps", "images", "step"):
        assert found[key] == student[key]


def test_the_image_table_is_read_from_the_runs(tmp_path, photos, teacher):
    options = f"--method lsd --teacher {teacher}"
    runs = [run(tmp_path / seed, photos, options, f"--seed {seed}") for seed in "01"]
    table = Path(__file__).parent / "measure/table.py"
    command = [sys.executable, table, tmp_path]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    titles, row = ([cell.strip() for cell in printed.splitlines()[i].split("|")] for i in (0, 2))
    row = dict(zip(titles, row))
    assert row["(seeds)"] == "lsd, teacher (2)"
    assert row["energy"] == f"{runs[0]['oracle']['energy']:.3f}"
    means = [sum(metrics["steps"][k]["gap"] for metrics in runs) / 2 for k in COUNTS]
    assert row["gap to the oracle"].startswith(" / ".join(f"{mean:.3f}" for mean in means))


# ------------------------------------------------------------------------------- going on
def interrupt_at(step):
    """For spy: Ctrl-C in a step."""

    def change(losses, arguments, calls=[]):  # noqa: B006
        calls.append(arguments)
        if len(calls) == step:
            raise KeyboardInterrupt
        return losses

    return change


def test_stopped_and_gone_on_is_bit_for_bit_one_run_without_teacher_and_init(
    tmp_path, photos, teacher, monkeypatch, capsys
):
    """Ctrl-C in the fourth of six steps; the files that it started from are deleted meanwhile."""
    run(tmp_path / "init", photos, "--method shortcut")
    shutil.copytree(teacher.parent, tmp_path / "teacher")
    source = f"--teacher {tmp_path}/teacher/latest.pt --init {tmp_path}/init/latest.pt"
    options = f"--method lsd {source} --warmup 2 --steps 6 --dropout 0.3"
    command = f"{TINY} --dataset {photos} {options} --out {tmp_path}"
    call(f"{command}/whole")
    monkeypatch.setattr(train_image, "SAVE_SECONDS", -1)
    with monkeypatch.context() as patch:
        spy(patch, interrupt_at(4))
        message = stopped(capsys, 130, f"{command}/parts")
    assert str(tmp_path / "parts") in message and "same command" in message
    assert checkpoint(tmp_path / "parts")["step"] == 3
    shutil.rmtree(tmp_path / "init")
    shutil.rmtree(tmp_path / "teacher")
    call(f"{command}/parts")
    assert_same_weights(
        *(checkpoint(tmp_path / name) for name in ("whole", "parts")), rtol=0, atol=0
    )
    found = [metrics_of(tmp_path / name) for name in ("whole", "parts")]
    assert found[0]["steps"] == found[1]["steps"] and found[0]["oracle"] == found[1]["oracle"]


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
import train_image
from test_train_image import Small

train_image.UNet = Small
train_image.ORACLE_STEPS = 2
train_image.ORACLE_RUNS = 2
train_image.SAVE_SECONDS = -1
out = Path(sys.argv[1])
torch.optim.RAdam([torch.zeros(1)])  # the first optimizer imports much: once for all children

def files():
    if out.exists():
        return out.parent.stat().st_mtime_ns, out.stat().st_mtime_ns, out.stat().st_size

def wait_for_a_write():
    before = files()
    limit = time.time() + 60
    while files() == before and time.time() < limit:
        pass

for kill in range(10):
    child = os.fork()  # before torch has started a thread
    if child == 0:
        train_image.main([*sys.argv[2:], "--out", str(out.parent)])
        os._exit(0)
    if kill < 9:
        wait_for_a_write()
        time.sleep(random.uniform(0, 0.1))
        if kill % 2:
            wait_for_a_write()  # and kill in the middle of it
        os.kill(child, signal.SIGKILL)
    ended = os.waitpid(child, 0)[1]
    assert ended == (signal.SIGKILL if kill < 9 else 0), "the run was over before it was killed"
"""


def environment(**more):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | more


def test_sigkill_at_any_moment_ends_bit_for_bit_equal(tmp_path, photos):
    options = "--method lsd --dropout 0.1 --warmup 20"
    whole = run(tmp_path / "whole", photos, options, steps=150)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed/latest.pt")]
    command += words(TINY, f"--dataset {photos} --steps 150", options)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    killed = metrics_of(tmp_path / "killed")
    assert killed["steps"] == whole["steps"] and killed["step"] == 150
    states = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "killed")
    assert_same_weights(*states, rtol=0, atol=0)


PROCESS = """
import os, signal, sys
from pathlib import Path
import f2d2, train_image
from test_train_image import Small

train_image.UNet = Small
train_image.ORACLE_STEPS = 2
train_image.SAVE_SECONDS = -1
loss = f2d2.f2d2_loss
steps = []

def killed(*args, **options):
    steps.append(args)
    if "KILL" in os.environ and os.environ["RANK"] == "1" and len(steps) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(*args, **options)

f2d2.f2d2_loss = killed
train_image.main()
"""


def test_of_two_processes_one_is_killed_and_the_same_command_goes_on(tmp_path, photos):
    (tmp_path / "process.py").write_text(PROCESS)
    command = f"-m torch.distributed.run --standalone --nproc-per-node 2 {tmp_path}/process.py"
    options = f"--dataset {photos} --method lsd --warmup 1 --steps 6 --out {tmp_path}/out"
    command = [sys.executable, *words(command, TINY, options)]
    began = time.monotonic()
    done = subprocess.run(command, env=environment(KILL="1"), capture_output=True, text=True)
    assert done.returncode and time.monotonic() - began < 60
    assert "SIGKILL" in done.stderr
    assert 2 <= checkpoint(tmp_path / "out")["step"] <= 3
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = metrics_of(tmp_path / "out")
    assert metrics["step"] == 6 and metrics["images"] == 5
    assert done.stdout.count("6/6: ") == 1


# ------------------------------------------------------------------------------- faults
def not_a_number(losses, arguments):
    return losses | {"vm": losses["vm"] * math.nan}


def no_slope(losses, arguments):
    """A finite loss whose gradient is NaN, as of a root at zero."""
    u = arguments["flow"](arguments["x1"], *torch.rand(2, 4))[0]
    return losses | {"vm": losses["vm"] + (0 * u).sqrt().sum()}


@pytest.mark.parametrize("change", [not_a_number, no_slope])
@pytest.mark.parametrize("before", [0, 2])
def test_weights_that_are_not_finite_are_never_saved(
    tmp_path, photos, monkeypatch, capsys, change, before
):
    path = tmp_path / "out/latest.pt"
    if before:
        run(path.parent, photos, "--method lsd", steps=before)
    saved = path.read_bytes() if before else None
    spy(monkeypatch, change)
    command = f"{TINY} --dataset {photos} --method lsd --steps 4 --out {path.parent}"
    assert f"step {before + 1}" in stopped(capsys, 2, command)
    assert (path.read_bytes() if path.exists() else None) == saved


@pytest.mark.parametrize("part, value", [("exp_avg", math.nan), ("exp_avg_sq", math.inf)])
def test_a_checkpoint_with_a_bad_number_is_not_replaced_by_a_worse_one(
    tmp_path, photos, capsys, part, value
):
    """One moment: the loss, the gradient or even the weights of the next step are finite."""
    run(tmp_path, photos, "--method lsd", steps=2)
    state = checkpoint(tmp_path)
    state["optimizer"]["state"][0][part][0, 0] = value
    torch.save(state, tmp_path / "latest.pt")
    before = (tmp_path / "latest.pt").read_bytes()
    command = f"{TINY} --dataset {photos} --method lsd --steps 4 --out {tmp_path}"
    assert "step 3" in stopped(capsys, 2, command)
    assert (tmp_path / "latest.pt").read_bytes() == before


def no_space(*args, **options):
    raise OSError(28, "No space left on device")


def unexpected(state, path, *args, **options):
    """What torch.save makes of a disk on which nothing fits."""
    Path(path).write_bytes(b"half a checkpoint")
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\n more")


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize(
    "module, name, full",
    [
        (torch, "save", no_space),
        (torch, "save", unexpected),
        (train_image.utils, "save_image", no_space),
        (train_image.csv, "writer", no_space),
        (train_image.json, "dumps", no_space),
    ],
)
def test_a_full_disk_leaves_the_state_before_it(
    tmp_path, photos, monkeypatch, capsys, before, module, name, full
):
    path = tmp_path / "out/latest.pt"
    command = f"{TINY} --dataset {photos} --method lsd --out {path.parent} --steps 3"
    if before:
        run(path.parent, photos, "--method lsd", steps=before)
    saved = path.read_bytes() if before else None
    with monkeypatch.context() as patch:
        patch.setattr(module, name, full)
        message = stopped(capsys, 2, command)
    assert "space left" in message or "disk" in message
    if name == "save":
        assert (path.read_bytes() if path.exists() else None) == saved
    assert not list(path.parent.glob("tmp*"))
    call(command)
    assert checkpoint(path.parent)["step"] == 3


def test_another_run_in_out_is_refused_and_left_alone(tmp_path, photos, teacher, capsys):
    out = tmp_path / "out"
    run(out, photos, "--method lsd", steps=1)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    command = f"{TINY} --dataset {photos} --steps 1 --out {out} --method lsd"
    for name, other in (
        ("method", "--method meanflow"),
        ("seed", "--seed 1"),
        ("lr", "--lr 1e-2"),
        ("batch_size", "--batch-size 8"),
        ("dropout", "--dropout 0.1"),
        ("paper", "--paper"),
        ("head", "--no-divergence"),
        ("channels", "--channels 8"),
    ):
        message = stopped(capsys, 2, command, other)
        assert name in message and "--out" in message
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


# ------------------------------------------------------------------------------- torch.compile
@pytest.mark.usefixtures("real_network")
def test_a_compiled_loss_trains_to_the_same_weights(tmp_path, photos, monkeypatch):
    """aot_eager traces as the compiler does, and needs no compiler. In the condition with a jvp,
    for which GroupNorm is in two steps."""
    options = "--method meanflow --warmup 0 --batch-size 6"
    run(tmp_path / "eager", photos, options, steps=1)
    compiled = []
    compiler = torch.compile

    def traced(function, **options):
        compiled.append(function)
        torch._dynamo.reset()
        return compiler(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", traced)
    run(tmp_path / "compiled", photos, options, "--compile", steps=1)
    assert len(compiled) == 1
    assert checkpoint(tmp_path / "eager")["flow"]["backbone.stem.weight"].shape == (4, 3, 3, 3)
    states = [checkpoint(tmp_path / name) for name in ("eager", "compiled")]
    assert_same_weights(*states, rtol=1e-4, atol=1e-5)
