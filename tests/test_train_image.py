"""train_image.py end to end on tiny stand-ins: data, training, resuming, several processes, evaluation, what it refuses."""

import importlib
import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torchvision
from PIL import Image

import train_image
from f2d2 import JointFlowMap, f2d2_loss
from train_image import (
    Objective,
    build,
    draw,
    folder_blocks,
    frechet_distance,
    load_data,
    main,
    parse,
    settle,
    statistics,
)

TINY = [
    "--image-size",
    "8",
    "--channels",
    "4",
    "--blocks",
    "1",
    "--batch-size",
    "4",
    "--dropout",
    "0.1",
    "--lr",
    "1e-3",
    "--oracle-images",
    "3",
    "--oracle-steps",
    "2",
    "--device",
    "cpu",
]


def write_images(folder, n, size=8, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return images.transpose(0, 3, 1, 2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder / "train", 12)
    write_images(folder / "test", 5, seed=1)
    return folder


def run(out, photos, *options, steps=4):
    main(
        [
            *TINY,
            "--dataset",
            str(photos),
            "--data",
            str(photos),
            "--steps",
            str(steps),
            "--out",
            str(out),
            *map(str, options),
        ]
    )
    return json.loads((out / "metrics.json").read_text())


def refused(capsys, *options, code=2):
    with pytest.raises(SystemExit) as stop:
        main([*map(str, options)])
    assert stop.value.code == code
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def teacher(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    run(out, photos, "--method", "flow")
    return out / "latest.pt"


# ------------------------------------------------------------------------------- training
@pytest.mark.parametrize(
    "options",
    [
        ["--method", "flow"],
        ["--method", "shortcut"],
        ["--method", "meanflow"],
        ["--method", "lsd"],
        ["--method", "shortcut-distill", "T"],
        ["--method", "meanflow", "T"],
        ["--method", "lsd", "T"],
        ["--method", "meanflow", "--no-divergence"],
        ["--method", "lsd", "--no-divergence", "T"],
        ["--method", "shortcut", "--paper"],
        ["--method", "meanflow", "--paper"],
        ["--method", "lsd", "--paper"],
        ["--method", "meanflow", "--compile"],
    ],
    ids=" ".join,
)
def test_every_method(tmp_path, photos, teacher, options, capsys, monkeypatch):
    if "--compile" in options:  # the switch, not the compiler
        monkeypatch.setattr(
            torch.nn.Module, "compile", lambda self: setattr(self, "compiled", True)
        )
    options = [
        o for option in options for o in (("--teacher", teacher) if option == "T" else (option,))
    ]
    metrics = run(tmp_path, photos, *options)
    head = "--no-divergence" not in options and "flow" not in options
    assert (
        metrics["divergence_head"] == head and metrics["step"] == 4 and metrics["test_images"] == 5
    )
    assert metrics["mirror"] == ("--paper" in options and "lsd" not in options)
    assert list(metrics["steps"]) == ["8", "4", "2", "1"] and math.isfinite(
        metrics["oracle"]["bpd"]
    )
    for row in metrics["steps"].values():
        assert set(row) == {"bpd", "se", "gap", "mae_oracle", "corr", "euler_bpd", "fid"}
        assert (
            all((row[k] is not None) == head for k in ("bpd", "se", "gap", "mae_oracle", "corr"))
            and row["fid"] is None
        )
        assert math.isfinite(row["euler_bpd"]) and (not head or math.isfinite(row["bpd"]))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and len(
        lines[0]["by_tenths_of_t"]
    ) == 10
    assert ("D" in lines[-1]) == head and lines[-1]["grad_norm"] > 0
    assert Image.open(tmp_path / "samples.png").width > Image.open(tmp_path / "samples.png").height
    assert (tmp_path / "progress.png").exists()
    out = capsys.readouterr().out
    assert "parameters" in out and "images/s" in out and "s left" in out and "FID: not run" in out


def test_defaults_are_the_published_recipes():
    _, args = parse([])
    config = settle(args, 1)
    assert (args.dataset, args.method, args.image_size) == ("cifar10", "meanflow", 32)
    assert (args.lr, args.batch_size, args.dropout, args.steps) == (6e-4, 1024, 0.2, 800_000)
    assert config["model"] == dict(
        image_size=32, channels=128, blocks=4, dropout=0.2, head=True, ours=True
    )
    assert args.loss == dict(
        velocity_weight="adaptive",
        divergence_weight="natural",
        diagonal=0.25,
        own_tangent=True,
        through_dD=True,
        probe="dct",
    )
    assert args.times == dict(direction="both", log_time=0.5)
    _, args = parse(["--teacher", "latest.pt"])
    settle(args, 1)
    assert args.loss["velocity_weight"] == "natural"
    _, args = parse(["--paper", "--teacher", "latest.pt"])
    settle(args, 1)
    assert args.loss["velocity_weight"] == "adaptive"
    assert args.times == dict(direction="forward", log_time=0.0) and args.mirror
    assert [args.loss[k] for k in ("divergence_weight", "own_tangent", "through_dD", "probe")] == [
        "none",
        False,
        False,
        "rademacher",
    ]


def test_a_stopped_run_resumes_bit_identically_and_may_be_extended(
    tmp_path, photos, monkeypatch, capsys
):
    method = ["--method", "meanflow", "--warmup", 2]
    whole = run(tmp_path / "whole", photos, *method, steps=6)
    calls = []

    def stopping(*args, **kw):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return f2d2_loss(*args, **kw)

    monkeypatch.setattr(train_image, "f2d2_loss", stopping)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "parts", photos, *method, steps=6)
    assert stop.value.code == 128 + signal.SIGTERM and "the same command" in capsys.readouterr().out
    assert torch.load(tmp_path / "parts/latest.pt", weights_only=True)["step"] == 3
    parts = run(tmp_path / "parts", photos, *method, steps=6)
    assert parts["steps"] == whole["steps"]
    a, b = (torch.load(tmp_path / p / "latest.pt", weights_only=True) for p in ("whole", "parts"))
    for part in ("flow", "ema"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    assert len(calls) == 6
    run(tmp_path / "parts", photos, *method, steps=7)
    assert (
        len(calls) == 7 and torch.load(tmp_path / "parts/latest.pt", weights_only=True)["step"] == 7
    )


def test_ctrl_c_saves_and_the_handlers_come_back(tmp_path, photos, monkeypatch):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run(tmp_path, photos, "--method", "flow", steps=1)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    monkeypatch.setattr(
        train_image,
        "f2d2_loss",
        lambda *a, **k: os.kill(os.getpid(), signal.SIGINT) or f2d2_loss(*a, **k),
    )
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, photos, "--method", "flow", steps=9)
    assert (
        stop.value.code == 130
        and torch.load(tmp_path / "latest.pt", weights_only=True)["step"] == 2
    )
    [signal.signal(n, h) for n, h in zip((signal.SIGINT, signal.SIGTERM), before)]


@pytest.mark.parametrize("failure", ["disk", "nan"])
def test_full_disk_and_nan_leave_the_last_checkpoint(
    tmp_path, photos, monkeypatch, capsys, failure
):
    run(tmp_path, photos, "--method", "flow", steps=2)
    before = (tmp_path / "latest.pt").read_bytes()
    if failure == "disk":

        def full(state, path):
            path.write_bytes(b"half a check")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", full)
    else:
        monkeypatch.setattr(
            train_image, "f2d2_loss", lambda *a, **k: {"vm": f2d2_loss(*a, **k)["vm"] * math.nan}
        )
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, photos, "--method", "flow", steps=4)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1
    assert ("No space left" if failure == "disk" else "not finite at step 3") in err
    assert (tmp_path / "latest.pt").read_bytes() == before and not list(tmp_path.glob("*.part"))


def test_a_sampling_only_checkpoint_gains_a_head(tmp_path, photos, monkeypatch):
    run(tmp_path / "plain", photos, "--method", "meanflow", "--no-divergence")
    seen = []
    monkeypatch.setattr(
        train_image,
        "train",
        lambda args, config, flow, *rest: (
            seen.append((args, flow)) or (_ for _ in ()).throw(SystemExit)
        ),
    )
    with pytest.raises(SystemExit):
        run(
            tmp_path / "more",
            photos,
            "--method",
            "meanflow",
            "--init",
            tmp_path / "plain/latest.pt",
        )
    (args, flow), state = (
        seen[0],
        torch.load(tmp_path / "plain/latest.pt", weights_only=True)["ema"],
    )
    assert args.warmup == 0 and flow.head is not None
    assert all(
        torch.equal(p, state["backbone." + k]) for k, p in flow.backbone.state_dict().items()
    )


def test_the_learning_rate_rises_and_in_the_last_quarter_falls_to_zero(
    tmp_path, photos, monkeypatch
):
    rates, step = [], torch.optim.RAdam.step
    monkeypatch.setattr(
        torch.optim.RAdam,
        "step",
        lambda self, *a: (rates.append(self.param_groups[0]["lr"]), step(self, *a))[1],
    )
    run(tmp_path / "ours", photos, "--method", "shortcut", steps=40)
    assert rates[:30] == pytest.approx([0.5e-3] + 29 * [1e-3])
    assert rates[30:] == pytest.approx([1e-3 * k / 10 for k in range(10, 0, -1)])
    rates.clear()
    run(tmp_path / "paper", photos, "--method", "shortcut", "--paper", steps=40)
    assert rates[1:] == pytest.approx(39 * [1e-3])


def test_averaged_weights_have_a_short_memory_early_on(tmp_path, photos):
    states = []
    for steps in (1, 2):
        run(tmp_path, photos, "--method", "flow", steps=steps)
        states.append(torch.load(tmp_path / "latest.pt", weights_only=True))
    first, second = states
    moved = [k for k in first["flow"] if not torch.equal(first["flow"][k], second["flow"][k])]
    assert moved and all(torch.equal(first["flow"][k], first["ema"][k]) for k in first["flow"])
    for k in moved:  # the weight of the newest is max(1 - 0.9999, 9 / (10 + 1))
        torch.testing.assert_close(
            second["ema"][k], first["ema"][k].lerp(second["flow"][k], 9 / 11), rtol=1e-6, atol=1e-9
        )


def test_bf16_changes_the_loss_of_a_flow_by_little():
    flow = build(
        dict(image_size=8, channels=8, blocks=1, dropout=0.0, head=False, ours=True), "cpu"
    )
    objective, losses = Objective(flow, None), []
    batch = torch.randn(64, 3, 8, 8), torch.randn(64, 3, 8, 8), *torch.rand(2, 64)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(objective(*batch)[0].item())
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.01)


# ------------------------------------------------------------------------------- several processes
def test_ranks_share_one_global_batch_whatever_their_number(photos):
    _, args = parse(["--dataset", str(photos), *TINY])
    settle(args, 2)
    data = load_data(args.dataset, photos, 8)[0]
    whole = draw(data, args, 7, 0, 1, "cpu")
    halves = [draw(data, args, 7, rank, 2, "cpu") for rank in (0, 1)]
    for all_of_it, *parts in zip(whole, *halves):
        assert torch.equal(all_of_it, torch.stack(parts, 1).flatten(0, 1))
    assert not torch.equal(whole[0], draw(data, args, 8, 0, 1, "cpu")[0])


@pytest.mark.parametrize(
    "options, forward",
    [
        ("--method meanflow", False),
        ("--method lsd --teacher latest.pt", False),
        ("--method lsd --paper", False),
        ("--method shortcut --paper", True),
        ("--method meanflow --paper", True),
    ],
)
def test_a_batch_is_images_of_the_data_noise_and_the_times_of_the_recipe(options, forward, photos):
    _, args = parse(["--dataset", str(photos), *TINY, "--batch-size", "1000", *options.split()])
    settle(args, 1)
    data = torch.randint(
        0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    x1, x0, t, s = draw(data, args, 1, 0, 1, "cpu")
    images = lambda x: {image.numpy().tobytes() for image in x}
    assert images(train_image.to_bytes(x1)) == images(torch.cat([data, data.flip(3)]))
    assert x0.mean().abs() < 0.02 and x0.std() == pytest.approx(1, abs=0.02)
    share = (t < s).double().mean().item()
    assert share == 1 if forward else share == pytest.approx(0.5, abs=0.05)
    if args.paper and args.method == "meanflow":  # 1 - t is logit-normal(-2, 2)
        logits = torch.logit(torch.cat([1 - t, 1 - s]))
        assert logits.mean() == pytest.approx(-2, abs=0.2) and logits.std() == pytest.approx(
            2, abs=0.2
        )


def _objective():
    torch.manual_seed(0)
    flow = build(
        dict(image_size=8, channels=4, blocks=1, dropout=0.0, head=True, ours=True), "cpu"
    ).double()
    [torch.nn.init.normal_(p, std=0.1) for p in flow.parameters()]
    return Objective(flow, "eulerian", ExactVelocity(), probe="dct", diagonal=0.25)


class ExactVelocity:
    """The velocity of data N(0, I/4), picklable."""

    def __call__(self, x, t):
        t = t.reshape(-1, 1, 1, 1)
        return x * (t / 4 - (1 - t)) / ((1 - t) ** 2 + t**2 / 4)


def _batch():
    g = torch.Generator().manual_seed(1)
    return *torch.randn(2, 8, 3, 8, 8, generator=g, dtype=torch.float64), *torch.rand(
        2, 8, generator=g, dtype=torch.float64
    )


def _worker(rank, port, path):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2"
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    objective = _objective()
    parallel = torch.nn.parallel.DistributedDataParallel(objective)
    for _ in range(
        2
    ):  # around the flow itself, a jvp crashes or goes unsynchronised at the second step
        objective.zero_grad()
        torch.manual_seed(rank)
        parallel(*(x[rank::2] for x in _batch()))[0].backward()
    torch.save([p.grad for p in objective.parameters()], f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_gloo_processes_give_the_gradients_of_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.start_processes(
        _worker, (port, str(tmp_path)), nprocs=2, start_method="spawn"
    )
    objective, total = _objective(), 0.0
    for rank in (0, 1):
        torch.manual_seed(rank)
        total = total + objective(*(x[rank::2] for x in _batch()))[0] / 2
    total.backward()
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for p, x, y in zip(objective.parameters(), a, b):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, p.grad, rtol=1e-9, atol=1e-12)


def test_torchrun_takes_the_steps_of_one_process(tmp_path, photos):
    options = [
        "--method",
        "meanflow",
        "--warmup",
        "2",
        "--dropout",
        "0",
        "--batch-size",
        "8",
    ]  # two steps without probes, whose noise is each rank's own
    run(tmp_path / "one", photos, *options, steps=3)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        train_image.__file__,
    ]
    command = [
        *torchrun,
        *TINY,
        "--dataset",
        photos,
        "--data",
        photos,
        "--steps",
        "3",
        "--out",
        tmp_path / "two",
        *options,
    ]
    subprocess.run([*map(str, command)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [line["step"] for line in two] == [1, 2, 3] and "D" in two[2]
    assert [line["grad_norm"] for line in two[:2]] == pytest.approx(
        [line["grad_norm"] for line in one[:2]], rel=1e-4
    )
    assert json.loads((tmp_path / "two/metrics.json").read_text())["step"] == 3


# ------------------------------------------------------------------------------- data
def test_folders_of_all_sorts_of_images(tmp_path, capsys):
    rgb = write_images(tmp_path, 3)
    Image.fromarray(rgb[0, 0]).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([rgb[0].transpose(1, 2, 0), rgb[0, 0]])).save(tmp_path / "rgba.png")
    Image.fromarray(rgb[0].transpose(1, 2, 0)).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(np.full((20, 30, 3), 77, np.uint8)).save(tmp_path / "wide.jpg", quality=100)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")
    (tmp_path / "notes.txt").write_text("not an image at all")
    train, test = load_data(str(tmp_path), tmp_path, 8)
    assert (
        train.dtype == torch.uint8
        and train.shape[1:] == test.shape[1:] == (3, 8, 8)
        and len(train) + len(test) == 7
    )
    assert "skipped 1 of" in capsys.readouterr().out
    images = torch.cat([train, test])
    assert all(
        (images == torch.from_numpy(np.ascontiguousarray(image))).flatten(1).all(1).any()
        for image in rgb
    )
    assert (
        ((images.int() - 77).abs() <= 1).flatten(1).all(1).any()
    )  # cropped to a square, resized, still bytes


def test_a_large_folder_is_memory_mapped_from_a_cache_and_read_once(tmp_path, monkeypatch):
    expected = write_images(tmp_path / "train", 4), write_images(tmp_path / "test", 2, seed=1)
    monkeypatch.setattr(train_image, "LARGE", 0)
    for _ in range(2):
        for got, want in zip(load_data(str(tmp_path), tmp_path, 8), expected):
            assert np.array_equal(got.numpy(), want)
        monkeypatch.setattr(train_image, "folder_blocks", lambda *args: iter(()))
    assert len(list(tmp_path.glob(".f2d2-*.u8"))) == 2


def test_the_cifar_stand_in_trains_at_full_size(tmp_path, monkeypatch, capsys):
    """torchvision's own class, its checksums included, on files of the same format; tests only write the pickles."""
    base, rng = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    base.mkdir()

    def entry(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return [name, torchvision.datasets.utils.calculate_md5(base / name)]

    batch = lambda: {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0] * 4}
    monkeypatch.setattr(
        torchvision.datasets.CIFAR10,
        "train_list",
        [entry(f"data_batch_{i}", batch()) for i in range(1, 6)],
    )
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", [entry("test_batch", batch())])
    name, md5 = entry("batches.meta", {"label_names": ["x"] * 10})
    monkeypatch.setattr(
        torchvision.datasets.CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5}
    )
    train, test = load_data("cifar10", tmp_path, 32)
    rows = pickle.loads((base / "data_batch_1").read_bytes())["data"]
    assert train.shape == (20, 3, 32, 32) and test.shape == (4, 3, 32, 32)
    assert np.array_equal(train[1].numpy().ravel(), rows[1])
    main(
        [
            *TINY[2:],
            "--dataset",
            "cifar10",
            "--data",
            str(tmp_path),
            "--steps",
            "1",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert json.loads((tmp_path / "out/metrics.json").read_text())["method"] == "meanflow"


def test_imagenet_and_celeba_stand_ins(tmp_path):
    rng = np.random.default_rng(0)
    rows = {
        name: rng.integers(0, 256, (3, 64 * 64 * 3), dtype=np.uint8)
        for name in [f"train_data_batch_{i}" for i in range(1, 11)] + ["val_data"]
    }
    for name, data in rows.items():
        np.savez(tmp_path / f"{name}.npz", data=data, labels=np.arange(1, 4))
    train, test = load_data("imagenet64", tmp_path, 64)
    assert train.shape == (30, 3, 64, 64) and np.array_equal(
        train[4].numpy().ravel(), rows["train_data_batch_2"][1]
    )
    assert np.array_equal(test.numpy().reshape(3, -1), rows["val_data"])

    base = tmp_path / "celeba"
    (base / "img_align_celeba").mkdir(parents=True)
    parts = {"000001.jpg": 0, "000002.jpg": 1, "000003.jpg": 2, "000004.jpg": 0}
    for i, name in enumerate(parts):
        Image.fromarray(np.full((218, 178, 3), 40 * i, np.uint8)).save(
            base / "img_align_celeba" / name, quality=100
        )
    (base / "list_eval_partition.txt").write_text(
        "".join(f"{name} {part}\n" for name, part in parts.items())
    )
    train, test = load_data("celeba64", tmp_path, 64)
    assert (
        train.dtype == torch.uint8
        and train.shape == (2, 3, 64, 64)
        and test.shape == (1, 3, 64, 64)
    )
    assert train[1].unique().tolist() == [120] and test.unique().tolist() == [80]


def test_celeba_takes_the_central_140_pixels(tmp_path):
    picture = np.zeros((218, 178, 3), np.uint8)
    picture[39:179, 19:159] = 200
    Image.fromarray(picture).save(tmp_path / "face.png")
    assert np.unique(next(folder_blocks([tmp_path / "face.png"], 64, celeba=True))).tolist() == [
        200
    ]


# ------------------------------------------------------------------------------- evaluation
def test_frechet_distance_against_the_closed_form_and_scipy():
    g = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(500, 6, generator=g, dtype=torch.float64),
        torch.randn(400, 6, generator=g, dtype=torch.float64)
        @ torch.diag(torch.arange(1.0, 7, dtype=torch.float64))
        + 2,
    )
    network = lambda x, return_features: x
    stats = statistics(network, a.split(77)), statistics(network, b.split(400))
    assert np.allclose(stats[0][0], a.mean(0)) and np.allclose(
        stats[0][1], np.cov(a.numpy(), rowvar=False)
    )
    root = scipy.linalg.sqrtm((stats[0][1] @ stats[1][1]).numpy()).real
    expected = (
        (stats[0][0] - stats[1][0]).square().sum()
        + stats[0][1].trace()
        + stats[1][1].trace()
        - 2 * np.trace(root)
    )
    assert frechet_distance(*stats[0], *stats[1]) == pytest.approx(expected.item(), rel=1e-8)
    eye = torch.eye(3, dtype=torch.float64)
    assert frechet_distance(torch.zeros(3), 4 * eye, torch.ones(3), 9 * eye) == pytest.approx(
        3 + 3 * (3 - 2) ** 2
    )
    assert frechet_distance(*stats[0], *stats[0]) == pytest.approx(0, abs=1e-9)


class Features(torch.nn.Module):
    def forward(self, x, return_features: bool = False):
        assert return_features and x.dtype == torch.uint8
        return torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, 2).flatten(1)


def test_fid_with_a_torchscript_network_and_guidance(tmp_path, photos, capsys):
    torch.jit.script(Features()).save(str(tmp_path / "net.pt"))
    options = [
        "--method",
        "meanflow",
        "--fid-network",
        tmp_path / "net.pt",
        "--num-fid-samples",
        16,
        "--oracle-euler",
    ]
    metrics = run(
        tmp_path / "run", photos, *options, "--guidance", 0.1, "--guidance-iterations", 2, steps=2
    )
    assert (
        all(row["fid"] > 0 for row in metrics["steps"].values()) and metrics["fid_not_run"] is None
    )
    assert len(list(photos.glob(".f2d2-fid-*.npz"))) == 1 and math.isfinite(
        metrics["oracle"]["euler_1024_bpd"]
    )
    capsys.readouterr()
    main(
        [
            "--eval",
            str(tmp_path / "run/latest.pt"),
            "--data",
            str(photos),
            "--oracle-images",
            "3",
            "--oracle-steps",
            "2",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "again"),
        ]
    )
    again = json.loads((tmp_path / "again/metrics.json").read_text())
    assert [row["bpd"] for row in again["steps"].values()] == [
        row["bpd"] for row in metrics["steps"].values()
    ]
    assert "FID: not run" in capsys.readouterr().out


def test_bits_per_dim_of_a_known_density(tmp_path, photos):
    """A flow map that is the identity has log p = log N(x; 0, I): the table's numbers follow from the bytes alone."""

    class Identity(torch.nn.Module):
        head, config, step = object(), dict(dataset="d", method="lsd", seed=0, paper=False), 0

        def forward(self, x, t, s):
            return torch.zeros_like(x), x.new_zeros(len(x))

        def velocity(self, x, t):
            return 0.0 * x

    _, args = parse(
        ["--dataset", str(photos), "--data", str(photos), "--out", str(tmp_path), *TINY]
    )
    settle(args, 1)
    train, test = load_data(str(photos), photos, 8)
    metrics = train_image.evaluate(args, Identity(), None, train, test, torch.device("cpu"))
    x = (test.double() + 0.5) / 128 - 1
    expected = (7 + (0.5 * x.square() + 0.5 * math.log(2 * math.pi)).mean() / math.log(2)).item()
    for row in metrics["steps"].values():
        assert row["bpd"] == pytest.approx(expected, abs=1e-3) and row[
            "mae_oracle"
        ] == pytest.approx(0, abs=1e-6)
        assert row["corr"] == pytest.approx(1) and row["gap"] == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------- bad input
def test_bad_input_is_refused_in_one_sentence(tmp_path, photos, teacher, capsys, monkeypatch):
    here = ["--dataset", photos, "--data", photos, *TINY, "--out", tmp_path / "new"]
    empty = tmp_path / "empty"
    empty.mkdir()
    big = tmp_path / "big"
    write_images(big, 4, size=16)
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for words, options in {
        "cifar10": ["--dataset", tmp_path / "nowhere", "--device", "cpu"],
        "no train images": ["--dataset", empty, *TINY, "--out", tmp_path / "new"],
        "needs --teacher": [*here, "--method", "shortcut-distill"],
        "is no checkpoint": [*here, "--teacher", tmp_path / "none.pt"],
        "junk.pt is no checkpoint": [*here, "--teacher", tmp_path / "junk.pt"],
        "learns from data alone": [*here, "--method", "flow", "--teacher", teacher],
        "use its options": [*here, "--init", teacher, "--channels", "8"],
        "side 8 and the data have 16": [
            "--dataset",
            big,
            *TINY,
            "--image-size",
            "16",
            "--teacher",
            teacher,
            "--out",
            tmp_path / "new",
        ],
        "multiple of 4": [*here, "--image-size", "10"],
        "at least 1": [*here, "--steps", "0"],
        "drop it": [*here, "--amp", "bf16"],
        "CUDA": [*here, "--device", "cuda"]
        if not torch.cuda.is_available()
        else [*here, "--steps", "0"],
        "CIFAR-10 is not in": [
            "--dataset",
            "cifar10",
            "--data",
            empty,
            *TINY[2:],
            "--out",
            tmp_path / "new",
        ],
        "train_data_batch_1.npz": [
            "--dataset",
            "imagenet64",
            "--data",
            empty,
            *TINY[2:],
            "--out",
            tmp_path / "new",
        ],
        "mmlab": ["--dataset", "celeba64", "--data", empty, *TINY[2:], "--out", tmp_path / "new"],
    }.items():
        if words == "CIFAR-10 is not in":
            monkeypatch.setattr(
                torchvision.datasets.CIFAR10,
                "download",
                lambda self: (_ for _ in ()).throw(OSError("no internet")),
            )
        err = refused(capsys, *options)
        assert (words in err or words == "CUDA") and len(err.splitlines()) == 1, (words, err)
        assert not (tmp_path / "new").exists(), words
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "not divisible by the 3 processes" in refused(capsys, *here)


def test_another_run_in_out_is_refused_and_left_alone(tmp_path, photos, capsys):
    run(tmp_path, photos, "--method", "flow", steps=1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    err = refused(
        capsys, "--dataset", photos, "--data", photos, *TINY, "--method", "lsd", "--out", tmp_path
    )
    assert "method is flow and not lsd" in err and "choose another --out" in err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_checkpoint_cannot_execute_code(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"config": Evil()}, tmp_path / "evil.pt")
    assert "is no checkpoint" in refused(capsys, "--eval", tmp_path / "evil.pt", "--device", "cpu")
    assert not (tmp_path / "owned").exists()


def test_a_partial_download_of_imagenet_and_celeba(tmp_path, capsys):
    with pytest.raises(train_image.BadInput, match="train_data_batch_3"):
        for i in range(1, 11):
            np.savez(
                tmp_path / f"train_data_batch_{i}.npz",
                data=np.zeros((1, 12288 if i != 3 else 100), np.uint8),
            )
        load_data("imagenet64", tmp_path, 64)
    (tmp_path / "celeba/img_align_celeba").mkdir(parents=True)
    (tmp_path / "celeba/list_eval_partition.txt").write_text("000001.jpg 0\n")
    with pytest.raises(train_image.BadInput, match="000001.jpg"):
        load_data("celeba64", tmp_path, 64)
    assert not list(tmp_path.glob("*.u8"))


def test_the_noise_of_a_probe_is_measured_on_a_checkpoint(teacher, photos, monkeypatch, capsys):
    """With v = A x and S = (A + A^T) / 2 the variance is 2 sum_ij S_ij^2 for a Gaussian probe, 2 sum_{i!=j} S_ij^2 for signs."""
    monkeypatch.syspath_prepend(str(Path(train_image.__file__).parent / ".github"))
    probes = importlib.import_module("probes")
    A = torch.randn(192, 192, generator=torch.Generator().manual_seed(0)) + 30 * torch.eye(192)
    monkeypatch.setattr(probes, "IMAGES", 3)
    monkeypatch.setattr(probes, "PROBES", 400)
    monkeypatch.setattr(
        JointFlowMap, "velocity", lambda self, x, t: (x.flatten(1) @ A.T).reshape(x.shape)
    )
    probes.main(teacher, photos)
    rows = {
        line.split("|")[1].strip(): [float(c) for c in line.split("|")[2:-1]]
        for line in capsys.readouterr().out.splitlines()
        if line[2] in "grd"
    }
    symmetric = (A + A.T) / 2
    off = 2 * (symmetric - symmetric.diag().diag()).square().sum()
    for probe, variance in (("gaussian", 2 * symmetric.square().sum()), ("rademacher", off)):
        assert rows[probe] == pytest.approx([variance.item() ** 0.5] * len(probes.TIMES), rel=0.12)
    assert len(rows["dct"]) == len(probes.TIMES)


def test_grids_of_few_steps_are_measured_as_the_evaluation_does(
    tmp_path, teacher, photos, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(str(Path(train_image.__file__).parent / ".github"))
    grids = importlib.import_module("image_grids")
    (
        monkeypatch.setattr(grids, "IMAGES", 3),
        monkeypatch.setattr(grids, "ORACLE_STEPS", 2),
        monkeypatch.setattr(grids, "DEVICE", torch.device("cpu")),
    )
    metrics = run(tmp_path, photos, "--method", "lsd", "--teacher", teacher)
    capsys.readouterr()
    grids.main([tmp_path / "latest.pt"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    uniform = {
        row[2].strip(): [float(cell.split("(")[0]) for cell in row[4:]]
        for row in rows
        if "uniform" in row[3]
    }
    assert len(rows) == 6 and list(uniform) == ["8", "4", "2"]
    for steps, found in uniform.items():
        assert found == pytest.approx(
            [metrics["steps"][steps][k] for k in ("gap", "mae_oracle", "corr")], abs=1e-3
        )


def test_what_a_step_costs_is_measured(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(train_image.__file__).parent / ".github"))
    costs = importlib.import_module("costs")
    monkeypatch.setattr(costs, "REPETITIONS", 1)
    costs.main([*TINY])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip() for row in rows[:2]] == ["flow", "shortcut"] and len(rows) == 7
    assert float(rows[0][2]) == 1 and all(float(row[1]) > 0 and float(row[2]) > 0 for row in rows)
