"""train_image.py: how images are read, measured and sampled, what is written, what is refused."""

import csv
import itertools
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torchvision
from exact import ExactGaussian
from PIL import Image, ImageOps
from test_train_image import (
    COUNTS,
    CPU,
    MODEL,
    QUICK,
    TINY,
    UNet,
    call,
    metrics_of,
    environment,
    no_loss,
    run,
    stand_ins,
    stopped,
    words,
    write_images,
    write_photos,
)
from torch import nn

import f2d2
import train_image
from train_image import build, frechet_distance, load_data, to_bytes, to_square


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with stand_ins():
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def trained(tiny, photos, tmp_path_factory):
    """A teacher/ and a student/ of it: copy them before writing there."""
    folder = tmp_path_factory.mktemp("trained")
    run(folder / "teacher", photos, "--method flow --lr 0.05")
    run(folder / "student", photos, f"--method lsd --teacher {folder}/teacher/latest.pt")
    return folder


@pytest.fixture
def student(trained, tmp_path):
    """latest.pt of the student, alone in its folder."""
    (tmp_path / "student").mkdir()
    return Path(shutil.copy(trained / "student/latest.pt", tmp_path / "student"))


def evaluated(path, dataset, out, *options):
    call(QUICK, f"--eval {path} --dataset {dataset} --out {out}", *options)
    return metrics_of(out)


def read_csv(path):
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    return header, rows


def flat(folder, levels):
    """Images of one level each."""
    folder.mkdir(parents=True, exist_ok=True)
    for level in levels:
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(folder / f"{level:03d}.png")
    return folder


def picture(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def read(path, size=8):
    with Image.open(path) as image:
        return to_square(image, size)


def files_in(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------- one image
def test_a_camera_s_picture_is_turned_as_a_viewer_turns_it(tmp_path):
    levels = np.repeat(np.repeat(np.array([[0, 80], [160, 240]], np.uint8), 16, 0), 16, 1)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held a quarter turn to the left
    Image.fromarray(levels).save(tmp_path / "turned.jpg", quality=100, exif=exif)
    found = read(tmp_path / "turned.jpg", 32).astype(int)
    assert np.abs(found - np.rot90(levels, -1)[..., None]).max() < 8


def test_a_broken_exif_block_leaves_a_picture_unturned(tmp_path):
    rgb = picture(8, 8, 3)
    Image.fromarray(rgb).save(tmp_path / "broken.png", exif=b"Exif\0\0no block at all")
    with pytest.raises(Exception), Image.open(tmp_path / "broken.png") as image:  # noqa: B017
        ImageOps.exif_transpose(image)
    assert np.array_equal(read(tmp_path / "broken.png"), rgb)


def test_transparent_is_white(tmp_path):
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:4] = 255
    rgb = picture(8, 8, 3)
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "rgba.png")
    grey = picture(8, 8)
    Image.fromarray(np.dstack([grey, alpha])).save(tmp_path / "la.png")
    paletted = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) // 32, "P")
    paletted.putpalette([10, 20, 30, 200, 0, 0])
    paletted.save(tmp_path / "p.png", transparency=1)
    for name, expected in (("rgba", rgb), ("la", grey[..., None]), ("p", [10, 20, 30])):
        found = read(tmp_path / f"{name}.png")
        assert (found[4:] == 255).all()
        assert np.array_equal(found[:4], np.broadcast_to(expected, (8, 8, 3))[:4])


def test_other_sorts_of_pixels_become_bytes(tmp_path):
    rgb = picture(8, 8, 3)
    Image.fromarray(rgb[..., 0] > 127).save(tmp_path / "bits.png")
    assert (read(tmp_path / "bits.png") == 255 * (rgb[..., :1] > 127)).all()
    Image.fromarray(np.full((8, 8, 4), [200, 0, 0, 0], np.uint8), "CMYK").save(tmp_path / "c.tif")
    assert (read(tmp_path / "c.tif") == [55, 255, 255]).all()


def test_a_wide_image_is_cropped_to_its_middle_and_made_smaller_by_the_bicubic_rule(tmp_path):
    wide = np.zeros((20, 30, 3), np.uint8)
    wide[:, 5:25] = 77
    Image.fromarray(wide).save(tmp_path / "wide.png")
    found = read(tmp_path / "wide.png").astype(int)
    assert found.shape == (8, 8, 3) and np.abs(found - 77).max() < 8
    image = Image.fromarray(picture(24, 24, 3))
    image.save(tmp_path / "large.png")
    expected = np.asarray(image.resize((8, 8), Image.BICUBIC))
    assert np.abs(read(tmp_path / "large.png").astype(int) - expected).max() <= 1


def test_of_a_large_photograph_no_more_is_decoded_than_is_needed(tmp_path):
    smooth = Image.fromarray(picture(4, 4, 3)).resize((1024, 768), Image.BICUBIC)
    smooth.save(tmp_path / "photo.jpg", quality=95)
    with Image.open(tmp_path / "photo.jpg") as image:
        found = to_square(image, 32).astype(int)
        assert image.size == (128, 96)
    expected = np.asarray(ImageOps.fit(smooth, (32, 32), Image.BICUBIC)).astype(int)
    assert np.abs(found - expected).max() < 12


# ------------------------------------------------------------------------------- folders
def folder_of(root, split="test", size=8, colours=3, evaluation=True):
    choices = dict(dataset=str(root), image_size=size, colours=colours, eval=evaluation)
    return load_data(train_image.argparse.Namespace(**choices), split)


def test_what_cannot_be_read_is_left_out_counted_and_named_with_the_true_reason(
    tmp_path, capsys, monkeypatch
):
    rgb = write_images(tmp_path, 3)
    deep = np.full((8, 8), 300, np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep).save(tmp_path / "deep.pgm")
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((8, 8), 2**20, np.int32)).save(tmp_path / "int.tif")
    (tmp_path / "cut.png").write_bytes((tmp_path / "000.png").read_bytes()[:90])
    (tmp_path / "notes.txt").write_text("no image at all")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "link.png").symlink_to("nowhere")
    (tmp_path / "secret").mkdir()
    write_images(tmp_path / "secret", 2)
    may = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: "secret" not in str(path) and may(path, mode)
    )
    images, names = folder_of(tmp_path)
    assert np.array_equal(images, rgb) and [Path(n).name for n in names] == sorted(
        f"{i:03d}.png" for i in range(3)
    )
    said = capsys.readouterr().out
    assert f"3 images of {tmp_path}" in said
    for count, words_of_pillow in (
        (4, "8 bits"),
        (2, "cannot identify image file"),
        (1, "secret"),
        (1, "No such file"),
    ):
        (line,) = [line for line in said.splitlines() if words_of_pillow in line]
        assert line.startswith(f"{count} of 12 files left out"), line


def test_hidden_files_are_no_images_and_every_folder_is_read_once(tmp_path, capsys):
    elsewhere = write_images(tmp_path / "elsewhere", 3)
    root = tmp_path / "root"
    write_images(root, 2, seed=1)
    (root / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    for name in ("loop", "loop2"):
        (root / name).symlink_to(".", target_is_directory=True)
    (root / ".DS_Store").write_bytes(b"Bud1")
    shutil.copy(root / "000.png", root / "._000.png")
    write_images(root / ".thumbnails", 4, seed=2)
    images, _ = folder_of(root)
    assert len(images) == 5
    found = {image.numpy().tobytes() for image in images}
    assert {image.tobytes() for image in elsewhere} <= found
    assert "left out" not in capsys.readouterr().out


def test_small_images_frames_and_the_time_that_it_takes_are_a_line(tmp_path, capsys, monkeypatch):
    write_images(tmp_path, 3)
    write_images(tmp_path / "small", 2, size=4)
    frames = [Image.fromarray(image) for image in picture(2, 8, 8)]
    frames[0].save(tmp_path / "frames.gif", save_all=True, append_images=frames[1:])
    monkeypatch.setattr(train_image.time, "monotonic", itertools.count(0, 16).__next__)
    assert len(folder_of(tmp_path)[0]) == 6
    said = capsys.readouterr().out
    assert "2 of 6 files enlarged" in said and "interpolated" in said
    assert "1 of 6 files read in the first of several frames" in said
    assert f"images of {tmp_path}: 4 of 6" in said


@pytest.mark.parametrize("colours", [1, 3])
def test_grey_images_have_the_colours_that_are_asked_for(tmp_path, colours):
    grey = picture(4, 8, 8)
    for i, (image, mode) in enumerate(zip(grey, ("L", "RGB", "RGBA", "LA"))):
        Image.fromarray(image).convert(mode).save(tmp_path / f"{i}.png")
    images, _ = folder_of(tmp_path, colours=colours)
    assert images.shape == (4, colours, 8, 8)
    assert np.array_equal(images.numpy(), np.stack(colours * [grey], 1))


def test_train_and_test_are_folders_of_these_names(tmp_path, capsys):
    for layout in ([], ["train"], ["test"], ["train", "val"], ["Train", "Test"]):
        root = tmp_path / ("-".join(layout) or "none")
        for name in layout or ["."]:
            write_images(root / name, 3)
        assert len(folder_of(root)[0]) == 3 * max(1, len(layout))  # all of it, in an evaluation
        message = stopped(capsys, 2, TINY, f"--dataset {root} --out {tmp_path}/out")
        assert "train/ and test/" in message
    photos = write_photos(tmp_path / "photos")
    write_images(photos / "test/deeper", 2)
    assert len(folder_of(photos)[0]) == 7  # of its test/ alone
    assert len(folder_of(photos, "train", evaluation=False)[0]) == 12
    shutil.rmtree(photos / "test")
    (photos / "test").mkdir()
    message = stopped(capsys, 2, TINY, f"--dataset {photos} --out {tmp_path}/out")
    assert "holds no images" in message and not list((tmp_path / "out").glob("*"))


def test_any_letters_can_be_printed(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(train_image, "UNet", UNet)
    run(tmp_path / "run", photos, "--method lsd", steps=1)
    out = tmp_path / "фото"
    options = f"--eval {tmp_path}/run/latest.pt --sample 1 {CPU} --out {out}"
    command = [sys.executable, train_image.__file__, *words(options)]
    ascii_only = environment(PYTHONIOENCODING="ascii")
    done = subprocess.run(command, env=ascii_only, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (out / "samples.csv").exists() and "\\u0444" in done.stdout


# ------------------------------------------------------------------------------- named data sets
@pytest.fixture
def data(tmp_path, monkeypatch):
    """Stand-ins for the named data sets in data/; only tests write CIFAR-10's pickles."""
    root = tmp_path / "data"
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)

    def entry(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return [name, torchvision.datasets.utils.calculate_md5(base / name)]

    def batch(seed):
        rows = np.random.default_rng(seed).integers(0, 256, (4, 3072), dtype=np.uint8)
        return {"data": rows, "labels": [0] * 4}

    kind = torchvision.datasets.CIFAR10
    train = [entry(f"data_batch_{i}", batch(i)) for i in range(1, 6)]
    monkeypatch.setattr(kind, "train_list", train)
    monkeypatch.setattr(kind, "test_list", [entry("test_batch", batch(6))])
    name, md5 = entry("batches.meta", {"label_names": ["x"] * 10})
    monkeypatch.setattr(kind, "meta", {"filename": name, "key": "label_names", "md5": md5})

    for i, name in enumerate([f"train_data_batch_{i}" for i in range(1, 11)] + ["val_data"]):
        rows = np.random.default_rng(i).integers(0, 256, (3, 12288), dtype=np.uint8)
        np.savez(root / f"{name}.npz", data=rows, labels=np.arange(1, 4))

    def faces(root, split):
        """Of 218 x 178 pixels, bright where they are read."""
        if not Path(root).exists():
            raise RuntimeError("Dataset not found")
        pixels = np.zeros((218, 178, 3), np.uint8)
        pixels[39:179, 19:159] = 40 if split == "train" else 80
        return 3 * [(Image.fromarray(pixels), None)]

    monkeypatch.setattr(torchvision.datasets, "CelebA", faces)
    monkeypatch.chdir(tmp_path)
    return root


def named(dataset, split):
    return load_data(train_image.argparse.Namespace(dataset=dataset, colours=3), split)[0].numpy()


def test_the_named_data_sets_are_read_as_their_authors_split_them(data, tmp_path):
    rows = pickle.loads((data / "cifar-10-batches-py/data_batch_1").read_bytes())["data"]
    assert np.array_equal(named("cifar10", "train")[1].ravel(), rows[1])
    second = np.load(data / "train_data_batch_2.npz")["data"]
    assert np.array_equal(named("imagenet64", "train")[4].ravel(), second[1])
    held_out = np.load(data / "val_data.npz")["data"]
    assert np.array_equal(named("imagenet64", "test").reshape(3, -1), held_out)
    for split, level in (("train", 40), ("test", 80)):
        assert (named("celeba64", split) == np.full((3, 3, 64, 64), level)).all()

    call(QUICK, "--channels 4 --blocks 1 --batch-size 4 --steps 1 --out run")
    metrics = metrics_of(Path("run"))
    assert metrics["dataset"] == "cifar10" and metrics["images"] == 4
    assert [row[0] for row in read_csv("run/log_p.csv")[1]] == ["0", "1", "2", "3"]


def gone(root):
    shutil.rmtree(root)


def of_32_pixels(root):
    np.savez(root / "val_data.npz", data=np.zeros((8, 3072), np.uint8))


def of_floats(root):
    np.savez(root / "val_data.npz", data=np.zeros((8, 12288)))


def cut(root):
    (root / "val_data.npz").write_bytes(b"PK\x03\x04 cut")


@pytest.mark.parametrize(
    "dataset, fault, word",
    [
        ("cifar10", gone, "cifar10"),
        ("imagenet64", gone, "val_data.npz"),
        ("celeba64", gone, "celeba64"),
        ("imagenet64", of_32_pixels, "24576"),
        ("imagenet64", of_floats, "uint8"),
        ("imagenet64", cut, "imagenet64"),
    ],
)
def test_a_data_set_that_is_not_there_is_one_sentence(
    data, tmp_path, monkeypatch, capsys, dataset, fault, word
):
    def no_internet(self):
        raise OSError("no internet")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", no_internet)
    fault(data)
    options = "--channels 4 --blocks 1 --batch-size 4 --steps 1"
    command = f"{QUICK} --dataset {dataset} --out {tmp_path}/out"
    assert word in stopped(capsys, 2, command, options)
    assert not (tmp_path / "out/metrics.json").exists()


# ------------------------------------------------------------------------------- evaluation
class Still(nn.Module):
    """Nothing moves: log p(x) = log N(x; 0, I) as long as the head's D is 0, as at the start."""

    feature_dim = 2

    def __init__(self, image_size, colours, channels, blocks, paper, dropout):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, t, s):
        return self.weight * x, self.weight * x.flatten(1)[:, :2]


@pytest.fixture
def still(tmp_path, monkeypatch, photos):
    monkeypatch.setattr(train_image, "UNet", Still)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f2d2, "f2d2_loss", no_loss)
        run(tmp_path / "still", photos, "--method lsd --paper", steps=1)
    return tmp_path / "still/latest.pt"


def bytes_of(level):
    """x at bytes of that level with their uniform noise."""
    return (level + (torch.arange(1000).double() + 0.5) / 1000) / 128 - 1


def bits_of_a_normal(level):
    """Bits/dim of N(0, I) there, on average."""
    x = bytes_of(level)
    return (7 + 0.5 * (x.square() + math.log(2 * math.pi)).mean() / math.log(2)).item()


def test_bits_per_dim_and_energy_of_a_known_density_image_by_image(still, tmp_path, capsys):
    levels = [250, 3, 140, 60, 200]
    other = flat(tmp_path / "other", levels)
    metrics = evaluated(still, other, tmp_path / "out")
    header, rows = read_csv(tmp_path / "out/log_p.csv")
    expected = {str(other / f"{level:03d}.png"): bits_of_a_normal(level) for level in levels}
    assert header == ["image", "oracle", *(f"{k} steps" for k in COUNTS)]
    assert [row[0] for row in rows] == sorted(expected)
    for name, *values in rows:
        bits = [float(value) for value in values if value != "nan"]
        assert bits == pytest.approx([expected[name]] * len(bits), abs=0.02)
    assert [row[1] != "nan" for row in rows] == [True, False, True, False, True]
    energy = torch.stack([bytes_of(level) for level in (3, 140, 250)]).square().mean().item()
    assert metrics["oracle"]["energy"] == pytest.approx(energy, abs=0.01)
    assert metrics["dataset"] == str(other) and metrics["images"] == 5
    said = capsys.readouterr().out
    assert f"{other}: 5 images" in said and f"energy {energy:.2f}"[:11] in said


def test_the_oracle_s_path_ends_where_the_exact_one_does(monkeypatch):
    """Data N(0, 0.5^2 I): x_0 = x_1 / 0.5."""
    monkeypatch.setattr(train_image, "ORACLE_STEPS", 64)
    x1 = 0.5 * torch.randn(5, 7, dtype=torch.float64)
    found = train_image.x0_of(ExactGaussian(0.0, 0.5).velocity, x1)
    torch.testing.assert_close(found, 2 * x1, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "method, paper", [("shortcut", True), ("meanflow", True), ("lsd", True), ("lsd", False)]
)
def test_the_oracle_s_images_steps_and_probes_and_the_mirror_are_as_asked(
    photos, tmp_path, monkeypatch, method, paper
):
    slow_calls = []
    fast_calls = []
    slow = f2d2.ode_log_likelihood
    fast = f2d2.log_likelihood

    def slowly(velocity, x1, steps, probe):
        slow_calls.append((len(x1), steps, probe, slow(velocity, x1, steps, probe)))
        return slow_calls[-1][-1]

    def fastly(flow, x1, steps, mirror=False, **options):
        fast_calls.append((steps, mirror))
        return fast(flow, x1, steps, mirror, **options)

    with monkeypatch.context() as patch:
        patch.setattr(f2d2, "ode_log_likelihood", slowly)
        patch.setattr(f2d2, "log_likelihood", fastly)
        options = f"--method {method} {'--paper' * paper} --oracle-images 2"
        run(tmp_path, photos, options, steps=1)
    mirrored = paper and method != "lsd"
    assert [call for call in fast_calls if isinstance(call[0], int)] == [
        (k, mirrored) for k in (8, 4, 2, 1)
    ]
    ((n, steps, probe, log_p),) = slow_calls
    assert (n, steps) == (2 * train_image.ORACLE_RUNS, train_image.ORACLE_STEPS)
    assert probe == ("rademacher" if paper else "dct")

    # Their mean, and no two had the same probes.
    runs = f2d2.bits_per_dim(log_p.double(), 3 * 8 * 8).reshape(-1, 2)
    assert not torch.equal(runs[0], runs[1])
    written = [float(row[1]) for row in read_csv(tmp_path / "log_p.csv")[1] if row[1] != "nan"]
    assert written == pytest.approx(runs.mean(0).tolist())


def test_a_picture_shows_the_likeliest_and_the_unlikeliest_in_order(still, tmp_path):
    """N(0, I) likes grey best."""
    levels = range(0, 132, 2)
    evaluated(still, flat(tmp_path / "other", levels), tmp_path / "out")
    grid = np.asarray(Image.open(tmp_path / "out/extremes.png").convert("L"))
    order = sorted(levels, key=lambda level: abs(level - 127.5))
    assert grid[6::10, 6::10].flatten().tolist() == order[:32] + order[-32:]


def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


def test_one_image_is_valid_json(student, tmp_path):
    evaluated(student, flat(tmp_path / "one", [100]), tmp_path / "out")
    text = (tmp_path / "out/metrics.json").read_text()
    metrics = json.loads(text, parse_constant=no_constant)
    assert metrics["images"] == 1 and metrics["steps"]["1"]["corr"] is None
    assert metrics["steps"]["1"]["bpd"] > 0


def test_a_map_without_a_head_has_samples_and_its_oracle(tmp_path, photos, capsys):
    run(tmp_path / "run", photos, "--method meanflow --no-divergence", steps=1)
    header, _ = read_csv(tmp_path / "run/log_p.csv")
    assert header == ["image", "oracle"]
    path = tmp_path / "run/latest.pt"
    for options in ("--sample 2", f"--guidance 0.1 --dataset {photos}"):
        assert "head" in stopped(capsys, 2, CPU, f"--eval {path} --out {tmp_path}/out", options)


def test_a_file_name_that_is_no_utf_8_is_written_as_it_is(student, tmp_path):
    write_images(tmp_path / "in", 1)
    (tmp_path / "in/000.png").rename(os.fsdecode(os.fsencode(tmp_path / "in") + b"/caf\xe9.png"))
    evaluated(student, tmp_path / "in", tmp_path / "out")
    assert b"caf\xe9.png" in (tmp_path / "out/log_p.csv").read_bytes()


@pytest.mark.parametrize("out", ["--out {}/out", ""])
def test_no_evaluation_overwrites_one_with_other_options(student, photos, tmp_path, capsys, out):
    command = f"{CPU} --eval {student} --dataset {photos} {out.format(student.parent)}"
    call(command)
    before = files_in(student.parent)
    assert any(path.name == "metrics.json" for path in before)
    for options in ("--guidance 0.1", "--oracle-images 2"):
        assert "--out" in stopped(capsys, 2, command, options)
    folder = student.parent / ("out" if out else "eval")
    assert "--out" in stopped(capsys, 2, TINY, f"--dataset {photos} --out {folder}")
    assert files_in(student.parent) == before


def test_guidance_moves_the_samples_at_its_rate_and_no_log_p(
    student, photos, tmp_path, monkeypatch
):
    rates = []
    guide = f2d2.self_guidance

    def record(flow, x0, lr):
        rates.append(lr)
        return guide(flow, x0, lr)

    monkeypatch.setattr(f2d2, "self_guidance", record)
    plain = evaluated(student, photos, tmp_path / "plain")
    guided = evaluated(student, photos, tmp_path / "guided", "--guidance 0.5")
    pictures = [(tmp_path / name / "samples.png").read_bytes() for name in ("plain", "guided")]
    assert pictures[0] != pictures[1] and rates == [0.5] * 4
    assert plain["guidance"] is None and guided["guidance"] == 0.5
    assert guided["steps"] == plain["steps"]


def test_a_teacher_s_samples_take_k_euler_steps(trained, photos, tmp_path, monkeypatch):
    asked = []
    slow = f2d2.ode_sample

    def record(velocity, x0, steps, euler=False):
        asked.append((steps, euler))
        return slow(velocity, x0, steps, euler)

    monkeypatch.setattr(f2d2, "ode_sample", record)
    evaluated(trained / "teacher/latest.pt", photos, tmp_path / "out")
    assert asked[-4:] == [(k, True) for k in (8, 4, 2, 1)]


# ------------------------------------------------------------------------------- FID
def expected_distance(a, b):
    S_a, S_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = np.trace(scipy.linalg.sqrtm(S_a @ S_b).real)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(S_a) + np.trace(S_b) - 2 * cross


def test_frechet_distance_is_scipy_s():
    g = np.random.default_rng(0)
    a = g.normal(size=(500, 6))
    b = (g.normal(size=(400, 6)) * np.arange(1, 7) + 2) @ g.normal(size=(6, 6))
    assert frechet_distance(a, b) == pytest.approx(expected_distance(a, b), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


class Features(nn.Module):
    def forward(self, x, return_features: bool = False):
        assert return_features and x.dtype == torch.uint8 and x.shape[1] == 3
        return nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)[:, :5]


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "net.pt"
    torch.jit.script(Features()).save(str(path))
    return path


@pytest.mark.parametrize("guidance", ["", "--guidance 0.5"])
def test_fid_against_the_train_images(
    student, photos, inception, tmp_path, monkeypatch, capsys, guidance
):
    made = {}
    sample = f2d2.sample

    def recorded(flow, x0, steps, *context):
        x1, log_p = sample(flow, x0, steps, *context)
        if len(x0) == 16 and not x0.requires_grad:
            made[str(steps)] = to_bytes(x1)
        return x1, log_p

    monkeypatch.setattr(f2d2, "sample", recorded)
    options = f"--fid-network {inception} {guidance}"
    metrics = evaluated(student, photos, tmp_path / "out", options)
    real = torch.from_numpy(write_images(tmp_path / "again", 12))
    real = Features()(real, return_features=True).double().numpy()
    assert sorted(made) == sorted(COUNTS)
    for k, images in made.items():
        features = Features()(images, return_features=True).double().numpy()
        expected = expected_distance(real, features)
        assert metrics["steps"][k]["fid"] == pytest.approx(expected, rel=1e-3)
    assert "12 images; fewer than 2,048" in capsys.readouterr().out


def test_fid_needs_the_training_images_and_its_network_first(
    student, photos, inception, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(f2d2, "ode_log_likelihood", None)  # nothing is measured before
    flat(tmp_path / "other", [1, 2])
    for folder in ("train", "test"):
        flat(tmp_path / "single" / folder, [7])
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for word, folder, network in (
        ("train", tmp_path / "other", inception),
        ("", tmp_path / "single", inception),
        ("none.pt", photos, "none.pt"),
        ("junk.pt", photos, tmp_path / "junk.pt"),
    ):
        options = f"--eval {student} --dataset {folder} --fid-network {network}"
        assert word in stopped(capsys, 2, QUICK, f"--out {tmp_path}/out", options)


# ------------------------------------------------------------------------------- samples
def sampled(path, out, *options):
    call(CPU, f"--eval {path} --sample 3 --out {out}", *options)
    names = sorted(p.name for p in out.glob("*.png"))
    return names, torch.stack([torch.tensor(read(out / name)) for name in names])


def test_samples_need_the_checkpoint_alone_and_come_with_their_log_p(
    student, tmp_path, monkeypatch
):
    calls = []
    sample = f2d2.sample

    def recorded(flow, x0, steps):
        calls.append((x0, steps, *sample(flow, x0, steps)))
        return calls[-1][2:]

    monkeypatch.setattr(f2d2, "sample", recorded)
    names, images = sampled(student, tmp_path / "out")
    ((x0, steps, x1, own),) = calls
    assert steps == 8 and x0.shape == (3, 3, 8, 8) and x0.std() == pytest.approx(1, abs=0.15)
    assert torch.equal(images.permute(0, 3, 1, 2), to_bytes(x1))
    flow = build(MODEL | {"head": True}, "cpu").eval()
    flow.load_state_dict(torch.load(student, weights_only=True)["ema"])
    header, rows = read_csv(tmp_path / "out/samples.csv")
    assert header == ["image", "log_likelihood", "sample"]
    assert [row[0] for row in rows] == names
    values = torch.tensor([[float(value) for value in row[1:]] for row in rows])
    expected = torch.stack([f2d2.log_likelihood(flow, x1, 8), own], 1)
    torch.testing.assert_close(values, expected)
    assert (expected[:, 0] - expected[:, 1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["00000.png", "samples.csv"])
def test_samples_overwrite_nobody_s_files(student, tmp_path, capsys, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("mine")
    assert "--out" in stopped(capsys, 2, f"--eval {student} --sample 2 --out {tmp_path}/mine")
    assert files_in(tmp_path / "mine") == {Path(name): b"mine"}


def test_files_are_no_links_nor_anybody_s_and_have_the_modes_of_other_files(
    photos, tmp_path, monkeypatch
):
    (tmp_path / "out").mkdir()
    (tmp_path / "mine").write_text("mine")
    for name in ("latest.tmp", "latest"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "mine")
    mask = os.umask(0o027)
    run(tmp_path / "out", photos, "--method flow", steps=1)
    os.umask(mask)
    assert (tmp_path / "mine").read_text() == "mine"
    written = [path for path in (tmp_path / "out").iterdir() if not path.is_symlink()]
    assert {path.name for path in written} == {
        "latest.pt",
        "progress.png",
        "samples.png",
        "log_p.csv",
        "metrics.json",
    }
    assert {path.stat().st_mode & 0o777 for path in written} == {0o640}


# ------------------------------------------------------------------------------- bad options
VALUES = """
    steps=0 steps=-1 steps=1.5 steps=x steps=nan warmup=-5 warmup=0.5 warmup=3 batch-size=0
    micro-batch=0 lr=-1 lr=nan lr=inf lr=2 dropout=-0.1 dropout=2 channels=0 blocks=0 colours=2
    image-size=0 image-size=10 image-size=-4 image-size=1028 seed=-1 seed=0.5 oracle-images=0
    method=f2d2 device=tpu amp=bf16 guidance=0.1 sample=3
""".split()
TRAINING = """
    method=lsd no-divergence paper init=x teacher=x image-size=8 colours=3 channels=4 blocks=1
    dropout=0 steps=3 warmup=0 batch-size=4 lr=0.1 compile
""".split()


@pytest.mark.parametrize("option", VALUES)
def test_a_value_that_cannot_be_is_one_line_before_anything_is_made(
    photos, tmp_path, capsys, option
):
    command = f"{TINY} --dataset {photos} --method lsd --steps 3 --out {tmp_path}/out"
    assert f"--{option.split('=')[0]}" in stopped(capsys, 2, command, f"--{option}")
    assert not (tmp_path / "out").exists()


def test_an_option_without_effect_is_refused_by_name(student, capsys):
    for mode, options in (
        ("--dataset nowhere", [*TRAINING, "seed=1"]),
        ("--sample 2", [*TRAINING, "dataset=x", "oracle-images=2", "fid-network=x"]),
    ):
        for option in options:
            message = stopped(capsys, 2, f"--eval {student} {mode} --{option}")
            assert f"--{option.split('=')[0]} has no effect" in message


def test_what_does_not_go_together_is_one_sentence(
    trained, student, data, photos, tmp_path, capsys
):
    teacher = trained / "teacher/latest.pt"
    (tmp_path / "file").write_text("")
    here = f"{TINY} --dataset {photos} --out {tmp_path}/out --steps 3"
    look = f"{QUICK} --eval {student} --out {tmp_path}/out --dataset"
    for word, command in (
        ("nowhere", f"{here} --dataset nowhere"),
        ("nowhere", f"{look} nowhere"),
        ("--image-size", f"{here} --dataset cifar10"),
        ("--image-size", f"{look} imagenet64"),
        ("--teacher", f"{here} --method shortcut-distill"),
        ("channels", f"{here} --channels 8 --method lsd --teacher {teacher}"),
        ("paper", f"{here} --paper --method lsd --init {teacher}"),
        ("--batch-size", f"{here} --batch-size 7 --micro-batch 4"),
        ("file/out", f"{here} --out {tmp_path}/file/out"),
        ("file/out", f"{look} {photos} --out {tmp_path}/file/out"),
    ):
        assert word in stopped(capsys, 2, command), command
        assert not (tmp_path / "out").exists(), command


# ------------------------------------------------------------------------------- bad checkpoints
class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_what_is_no_checkpoint_is_one_sentence_left_alone_and_never_executed(
    student, photos, tmp_path, capsys
):
    whole = torch.load(student, weights_only=True)
    content = Path(student).read_bytes()
    files = {
        "junk": b"junk",
        "cut": content[: len(content) // 2],
        "evil": whole | {"config": whole["config"] | {"seed": Evil(tmp_path / "owned")}},
        "weights": whole["ema"],
        "misfit": whole | {"config": whole["config"] | {"channels": 8}},
    }
    for name, broken in files.items():
        out = tmp_path / name
        out.mkdir()
        path = out / "latest.pt"
        if isinstance(broken, bytes):
            path.write_bytes(broken)
        else:
            torch.save(broken, path)
        before = path.read_bytes()
        training = f"{TINY} --dataset {photos} --method lsd --out"
        doors = [
            f"{training} {out}",  # as a run that would go on
            f"{QUICK} --eval {path} --dataset {photos}",
            f"{CPU} --eval {path} --sample 2",
            f"{training} {tmp_path}/out --teacher {path}",
            f"{training} {tmp_path}/out --init {path}",
        ]
        for command in doors if name == "evil" else doors[:2]:
            assert str(path) in stopped(capsys, 2, command), command
        assert path.read_bytes() == before and [path] == list(out.iterdir())
        assert not (tmp_path / "out").exists()
    assert not (tmp_path / "owned").exists()
