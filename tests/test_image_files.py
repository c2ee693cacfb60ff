"""train_image.py: how images are read, measured and sampled, what is written, what is refused."""

import csv
import fcntl
import itertools
import json
import math
import os
import pickle
import shutil

import numpy as np
import pytest
import scipy.linalg
import torch
import torchvision
from PIL import Image
from test_train_image import (
    MODEL,
    QUICK,
    TINY,
    checkpoint,
    edit,
    no_loss,
    refused,
    run,
    stand_ins,
    words,
    write_images,
    write_photos,
)
from torch import nn

import f2d2
import train_image
from train_image import BadInput, build, frechet_distance, load_data, main, read_image, to_bytes

COUNTS = ["8", "4", "2", "1"]


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
    run(folder / "teacher", photos, "--method", "flow", "--lr", 0.05)
    teacher = ["--teacher", folder / "teacher/latest.pt"]
    run(folder / "student", photos, "--method", "lsd", *teacher)
    return folder


@pytest.fixture
def student(trained, tmp_path):
    """latest.pt of the student, alone in its folder."""
    (tmp_path / "student").mkdir()
    return shutil.copy(trained / "student/latest.pt", tmp_path / "student")


def evaluated(path, dataset, out, *options):
    main([*QUICK, *words("--eval", path, "--dataset", dataset, "--out", out, *options)])
    return json.loads((out / "metrics.json").read_text())


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


def files_in(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------- one image
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_of_grey_are_the_8_bits_they_came_from(tmp_path, suffix):
    grey = picture(8, 8)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / f"deep.{suffix}")
    assert np.array_equal(read_image(tmp_path / f"deep.{suffix}", 8), np.dstack(3 * [grey]))


def test_a_camera_s_picture_is_turned_as_a_viewer_turns_it(tmp_path):
    levels = np.repeat(np.repeat(np.array([[0, 80], [160, 240]], np.uint8), 16, 0), 16, 1)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held a quarter turn to the left
    Image.fromarray(levels).save(tmp_path / "turned.jpg", quality=100, exif=exif)
    found = read_image(tmp_path / "turned.jpg", 32).astype(int)
    assert np.abs(found - np.rot90(levels, -1)[..., None]).max() < 8


def test_transparent_is_white(tmp_path):
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:4] = 255
    rgb = picture(8, 8, 3)
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "rgba.png")
    found = read_image(tmp_path / "rgba.png", 8)
    assert np.array_equal(found[:4], rgb[:4]) and (found[4:] == 255).all()
    grey = picture(8, 8)
    Image.fromarray(np.dstack([grey, alpha])).save(tmp_path / "la.png")
    found = read_image(tmp_path / "la.png", 8)
    assert (found[:4] == grey[:4, :, None]).all() and (found[4:] == 255).all()
    paletted = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) // 32, "P")
    paletted.putpalette([10, 20, 30, 200, 0, 0])
    paletted.save(tmp_path / "p.png", transparency=1)
    found = read_image(tmp_path / "p.png", 8)
    assert (found[:4] == [10, 20, 30]).all() and (found[4:] == 255).all()


def test_other_sorts_of_pixels_become_bytes(tmp_path):
    rgb = picture(8, 8, 3)
    palette = Image.fromarray(rgb).convert("P")
    palette.save(tmp_path / "palette.png")
    expected = np.asarray(palette.convert("RGB"))
    assert np.array_equal(read_image(tmp_path / "palette.png", 8), expected)
    Image.fromarray(rgb[..., 0] > 127).save(tmp_path / "bits.png")
    assert (read_image(tmp_path / "bits.png", 8) == 255 * (rgb[..., :1] > 127)).all()
    cyan = np.full((8, 8, 4), [200, 0, 0, 0], np.uint8)
    Image.fromarray(cyan, "CMYK").save(tmp_path / "print.jpg", quality=100)
    found = read_image(tmp_path / "print.jpg", 8).astype(int)
    assert found.shape == (8, 8, 3) and np.abs(found - [55, 255, 255]).max() < 8


def test_a_wide_image_is_cropped_to_its_middle(tmp_path):
    wide = np.zeros((20, 30, 3), np.uint8)
    wide[:, 5:25] = 77
    Image.fromarray(wide).save(tmp_path / "wide.png")
    found = read_image(tmp_path / "wide.png", 8).astype(int)
    assert found.shape == (8, 8, 3) and np.abs(found - 77).max() < 8


def test_celeba_takes_the_central_140_pixels(tmp_path):
    face = np.zeros((218, 178, 3), np.uint8)
    face[39:179, 19:159] = 200
    Image.fromarray(face).save(tmp_path / "face.png")
    assert np.unique(read_image(tmp_path / "face.png", 64, train_image.CELEBA_BOX)).tolist() == [
        200
    ]


# ------------------------------------------------------------------------------- folders
def folder_of(root, **options):
    return load_data(str(root), root, 8, **options)


def everything(root, **options):
    data = folder_of(root, **options)
    return torch.cat([data[split][0] for split in ("train", "test")])


def test_what_cannot_be_read_is_left_out_by_name_and_counted(tmp_path, capsys):
    rgb = write_images(tmp_path, 3)
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((8, 8), 2**20, np.int32)).save(tmp_path / "deep.tif")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "000.png").read_bytes()[:90])
    (tmp_path / "notes.txt").write_text("no image at all")
    (tmp_path / "empty.jpg").write_bytes(b"")
    images = everything(tmp_path)
    found = {image.numpy().tobytes() for image in images}
    assert found == {image.tobytes() for image in rgb} and len(images) == 3
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(lines) == 2
    (deep,) = [line for line in lines if "32 bits" in line]
    assert "left out 2 of 9" in deep and ("float.tif" in deep or "deep.tif" in deep)
    (other,) = [line for line in lines if "32 bits" not in line]
    assert "left out 4 of 9" in other


def test_hidden_files_are_no_images_and_links_are_followed_once(tmp_path, capsys):
    elsewhere = write_images(tmp_path / "elsewhere", 3)
    root = tmp_path / "root"
    write_images(root, 2, seed=1)
    (root / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "again.png").symlink_to(root / "000.png")
    (root / ".DS_Store").write_bytes(b"Bud1")
    shutil.copy(root / "000.png", root / "._000.png")
    write_images(root / ".thumbnails", 4, seed=2)
    images = everything(root)
    assert len(images) == 5
    found = {image.numpy().tobytes() for image in images}
    assert {image.tobytes() for image in elsewhere} <= found
    assert "left out" not in capsys.readouterr().out


def test_grey_images_are_one_channel_unless_one_of_them_has_colour(tmp_path):
    grey = picture(6, 8, 8)
    for i, image in enumerate(grey):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    images = everything(tmp_path)
    assert images.shape == (6, 1, 8, 8)
    assert {image.numpy().tobytes() for image in images} == {image.tobytes() for image in grey}
    for images in (everything(tmp_path, colours=3), everything(tmp_path)):
        assert (images == images[:, :1]).all() and len(images) == 6
        write_images(tmp_path / "more", 1)
        if images.shape[1] == 3:
            (tmp_path / "more/000.png").unlink()
    write_images(tmp_path / "more", 1)
    assert everything(tmp_path).shape == (7, 3, 8, 8)
    with pytest.raises(BadInput, match="grey"):
        everything(tmp_path, colours=1)


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA", "LA"])
def test_grey_pixels_are_one_channel_however_they_are_stored(tmp_path, mode):
    grey = picture(2, 8, 8)
    for i, image in enumerate(grey):
        Image.fromarray(image).convert(mode).save(tmp_path / f"{i}.png")
    images = everything(tmp_path)
    assert images.shape == (2, 1, 8, 8)
    assert {image.numpy().tobytes() for image in images} == {image.tobytes() for image in grey}


@pytest.mark.parametrize(
    "train, test", [("train", "test"), ("Train", "VAL"), ("TRAIN", "Valid"), ("train", "val")]
)
def test_a_split_that_the_user_made_is_kept(tmp_path, capsys, train, test):
    images = write_images(tmp_path / train, 10)
    held_out = write_images(tmp_path / test / "deeper", 10, seed=1)
    data = folder_of(tmp_path)
    for split, expected in (("train", images), ("test", held_out)):
        found, names = data[split]
        assert np.array_equal(found.numpy(), expected)
        assert [os.path.basename(name) for name in names] == [f"{i:03d}.png" for i in range(10)]
    said = capsys.readouterr().out
    assert str(tmp_path / train) in said and str(tmp_path / test) in said
    alone = folder_of(tmp_path, held_out=False)
    assert np.array_equal(alone["test"][0].numpy(), held_out) and "train" not in alone


@pytest.mark.parametrize("only", ["train", "test", "val"])
def test_half_a_split_is_refused(tmp_path, only):
    write_images(tmp_path / only, 4)
    with pytest.raises(BadInput, match="train/"):
        folder_of(tmp_path)
    everything_there = folder_of(tmp_path, held_out=False)
    assert len(everything_there["test"][0]) == 4


def test_without_a_split_about_a_tenth_is_held_out_by_name(tmp_path):
    write_images(tmp_path, 200)
    first = folder_of(tmp_path)
    names = first["train"][1], first["test"][1]
    assert len(names[0]) == 180 and len(names[1]) == 20
    assert not set(names[0]) & set(names[1])
    assert sorted(names[1]) != sorted(names[0] + names[1])[: len(names[1])]  # not just the first
    again = folder_of(tmp_path)
    assert (again["train"][1], again["test"][1]) == names
    assert len(folder_of(tmp_path, held_out=False)["test"][0]) == 200

    # Twice the files: what was trained on is not held out now, nor the other way round.
    for path in sorted(tmp_path.glob("*.png")):
        shutil.copy(path, path.with_stem(f"{path.stem}-again"))
    more = folder_of(tmp_path)
    assert set(names[0]) < set(more["train"][1]) and set(names[1]) < set(more["test"][1])


def test_of_few_files_one_is_held_out(tmp_path):
    write_images(tmp_path, 3)
    few = folder_of(tmp_path)
    assert len(few["train"][1]) == 2 and len(few["test"][1]) == 1


def test_folders_without_images_are_one_sentence(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "single", 1)
    for name in ("empty", "single"):
        options = [*TINY, "--dataset", tmp_path / name, "--out", tmp_path / "out"]
        assert name in refused(capsys, *options)


@pytest.mark.parametrize("out", [".", "run", "train/run"])
def test_a_run_among_its_own_images_is_refused(tmp_path, photos, monkeypatch, capsys, out):
    """Else the same command would train on its pictures the next time."""
    folder = shutil.copytree(photos, tmp_path / "photos")
    monkeypatch.chdir(folder)
    before = files_in(folder)
    for root in (".", folder):
        options = [*TINY, "--dataset", root, "--out", folder / out, "--steps", 1]
        assert "--out" in refused(capsys, *options)
    assert files_in(folder) == before


def test_nothing_is_written_where_the_data_are(tmp_path):
    photos = write_photos(tmp_path / "photos")
    before = files_in(photos)
    folders = [photos, photos / "train", photos / "test"]
    for folder in folders:
        folder.chmod(0o555)
    run(tmp_path / "out", photos, "--method", "flow", steps=1)
    for folder in folders:
        folder.chmod(0o755)
    assert files_in(photos) == before


# ------------------------------------------------------------------------------- named data sets
@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """torchvision's own class, checksums included; only tests write these pickles."""
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()

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
    return tmp_path


def test_the_cifar_stand_in_trains_at_full_size(cifar, tmp_path):
    data = load_data("cifar10", cifar, 32)
    rows = pickle.loads((cifar / "cifar-10-batches-py/data_batch_1").read_bytes())["data"]
    assert data["train"][0].shape == (20, 3, 32, 32) and data["test"][0].shape == (4, 3, 32, 32)
    assert np.array_equal(data["train"][0][1].numpy().ravel(), rows[1])
    assert list(data["test"][1]) == [0, 1, 2, 3]
    options = [*QUICK, "--channels", 4, "--blocks", 1, "--batch-size", 4, "--steps", 1]
    main(words(*options, "--data", cifar, "--out", tmp_path / "out"))
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["dataset"] == "cifar10" and metrics["images"] == 4
    assert [row[0] for row in read_csv(tmp_path / "out/log_p.csv")[1]] == ["0", "1", "2", "3"]


def test_processes_take_turns_where_the_first_downloads(cifar, photos, tmp_path, monkeypatch):
    free = []

    def turn(*arguments):
        with open(tmp_path / "out/.turn", "w") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free.append(True)
            except BlockingIOError:
                free.append(False)
        raise BadInput("enough")

    monkeypatch.setattr(train_image, "load_data", turn)
    for dataset in ("cifar10", photos):
        with pytest.raises(SystemExit):
            main(words("--dataset", dataset, "--out", tmp_path / "out"))
    assert free == [False, True]


def imagenet(root, rows=3):
    for i, name in enumerate([f"train_data_batch_{i}" for i in range(1, 11)] + ["val_data"]):
        data = np.random.default_rng(i).integers(0, 256, (rows, 12288), dtype=np.uint8)
        np.savez(root / f"{name}.npz", data=data, labels=np.arange(1, rows + 1))


def test_the_imagenet_stand_in(tmp_path):
    imagenet(tmp_path)
    data = load_data("imagenet64", tmp_path, 64)
    second = np.load(tmp_path / "train_data_batch_2.npz")["data"]
    held_out = np.load(tmp_path / "val_data.npz")["data"]
    assert data["train"][0].shape == (30, 3, 64, 64)
    assert np.array_equal(data["train"][0][4].numpy().ravel(), second[1])
    assert np.array_equal(data["test"][0].numpy().reshape(3, -1), held_out)


def celeba(root):
    folder = root / "celeba/img_align_celeba"
    folder.mkdir(parents=True)
    parts = {"000001.jpg": 0, "000002.jpg": 1, "000003.jpg": 2, "000004.jpg": 0}
    for i, name in enumerate(parts):
        face = np.full((218, 178, 3), 40 * i, np.uint8)
        Image.fromarray(face).save(folder / name, quality=100)
    lines = [f"{name} {part}\n" for name, part in parts.items()]
    (root / "celeba/list_eval_partition.txt").write_text("".join(lines))


def test_the_celeba_stand_in(tmp_path):
    celeba(tmp_path)
    data = load_data("celeba64", tmp_path, 64)
    train, test = data["train"][0], data["test"][0]
    assert train.dtype == torch.uint8 and train.shape == (2, 3, 64, 64)
    assert test.shape == (1, 3, 64, 64)
    assert train[1].unique().tolist() == [120] and test.unique().tolist() == [80]


@pytest.mark.parametrize(
    "dataset, hint", [("cifar10", "kriz"), ("imagenet64", "image-net"), ("celeba64", "mmlab")]
)
def test_a_missing_data_set_is_one_sentence_that_says_where_it_is(
    tmp_path, monkeypatch, capsys, dataset, hint
):
    def no_internet(self):
        raise OSError("no internet")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", no_internet)
    options = ["--dataset", dataset, "--data", tmp_path, *QUICK, "--channels", 4, "--blocks", 1]
    message = refused(capsys, *options, "--out", tmp_path / "out")
    assert dataset in message and hint in message and str(tmp_path) in message


def test_half_a_download_is_one_sentence(tmp_path):
    imagenet(tmp_path)
    np.savez(tmp_path / "train_data_batch_3.npz", data=np.zeros((1, 100), np.uint8))
    with pytest.raises(BadInput, match="imagenet64"):
        load_data("imagenet64", tmp_path, 64)
    (tmp_path / "train_data_batch_3.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(BadInput, match="imagenet64"):
        load_data("imagenet64", tmp_path, 64)
    celeba(tmp_path)
    (tmp_path / "celeba/img_align_celeba/000002.jpg").unlink()
    with pytest.raises(BadInput, match="000002.jpg"):
        load_data("celeba64", tmp_path, 64)


# ------------------------------------------------------------------------------- evaluation
class Still(nn.Module):
    """Nothing moves: log p(x) = log N(x; 0, I) as long as the head's D is 0, as at the start."""

    feature_dim = 2

    def __init__(self, image_size, channels, blocks, dropout, colours, paper):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, t, s):
        return self.weight * x, self.weight * x.flatten(1)[:, :2]


@pytest.fixture
def still(tmp_path, monkeypatch):
    """A checkpoint of Still; its training images are gone."""
    monkeypatch.setattr(train_image, "UNet", Still)
    photos = write_photos(tmp_path / "gone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f2d2, "f2d2_loss", no_loss)
        run(tmp_path / "still", photos, "--method", "lsd", "--paper", steps=1)
    shutil.rmtree(photos)
    return tmp_path / "still/latest.pt"


def bits_of_a_normal(level):
    """Bits/dim of N(0, I) at bytes of that level with their uniform noise, on average."""
    x = (level + (torch.arange(1000).double() + 0.5) / 1000) / 128 - 1
    return (7 + 0.5 * (x.square() + math.log(2 * math.pi)).mean() / math.log(2)).item()


def test_bits_per_dim_of_a_known_density_image_by_image(still, tmp_path, capsys):
    levels = [250, 3, 140, 60, 200]
    other = flat(tmp_path / "other", levels)
    metrics = evaluated(still, other, tmp_path / "out")
    header, rows = read_csv(tmp_path / "out/log_p.csv")
    expected = {str(other / f"{level:03d}.png"): bits_of_a_normal(level) for level in levels}
    assert [row[0] for row in rows] == sorted(expected)
    assert [column.split()[0] for column in header[1:5]] == COUNTS
    for name, *values in rows:
        bits = [float(value) for value in values if value]
        assert bits == pytest.approx([expected[name]] * len(bits), abs=0.02)
    assert sum(len(row) == 6 and row[5] != "" for row in rows) == 3  # the oracle's images
    assert list(metrics["steps"]) == COUNTS
    for row in metrics["steps"].values():
        assert row["bpd"] == pytest.approx(sum(expected.values()) / 5, abs=0.01)
        assert row["gap"] == pytest.approx(0, abs=1e-5)
        assert row["mae_oracle"] == pytest.approx(0, abs=1e-5)
        assert row["corr"] == pytest.approx(1)
    assert metrics["dataset"] == str(other) and metrics["images"] == 5
    assert f"{other}: 5 images" in capsys.readouterr().out


def test_the_table_is_that_of_log_p_csv(student, photos, tmp_path):
    """Means, standard errors, and errors against the oracle at the images where it was computed."""
    metrics = evaluated(student, photos, tmp_path / "out")
    _, rows = read_csv(tmp_path / "out/log_p.csv")
    values = np.array(
        [[float(v) if v else math.nan for v in row[1:6]] for row in rows if len(row) == 6]
    )
    fast = np.array([[float(v) for v in row[1:5]] for row in rows])
    oracle = values[:, 4]
    oracle = oracle[~np.isnan(oracle)]
    paired = values[~np.isnan(values[:, 4])]
    assert len(fast) == 5 and len(oracle) == 3
    assert metrics["oracle"]["bpd"] == pytest.approx(oracle.mean())
    assert metrics["oracle"]["se"] == pytest.approx(oracle.std(ddof=1) / 3**0.5)
    for i, row in enumerate(metrics["steps"].values()):
        error = paired[:, i] - oracle
        assert row["bpd"] == pytest.approx(fast[:, i].mean())
        assert row["se"] == pytest.approx(fast[:, i].std(ddof=1) / 5**0.5)
        assert row["gap"] == pytest.approx(error.mean())
        assert row["mae_oracle"] == pytest.approx(np.abs(error).mean())
        assert row["corr"] == pytest.approx(np.corrcoef(paired[:, i], oracle)[0, 1])


def test_the_oracle_s_images_and_steps_are_as_asked(student, photos, tmp_path, monkeypatch):
    asked = []
    answers = []
    slow = f2d2.ode_log_likelihood

    def recorded(velocity, x1, steps, *args, **options):
        asked.append((len(x1), steps))
        answers.append(slow(velocity, x1, steps, *args, **options))
        return answers[-1]

    monkeypatch.setattr(f2d2, "ode_log_likelihood", recorded)
    metrics = evaluated(student, photos, tmp_path / "out", "--oracle-images", 2)
    assert asked == [(2, train_image.ORACLE_STEPS)] * train_image.ORACLE_RUNS
    assert metrics["oracle"]["nfe"] == 2 * train_image.ORACLE_STEPS * train_image.ORACLE_RUNS

    # Their mean, and no two had the same probes.
    assert not torch.equal(answers[0], answers[1])
    expected = f2d2.bits_per_dim(torch.stack(answers).mean(0), 3 * 8 * 8)
    written = [float(row[5]) for row in read_csv(tmp_path / "out/log_p.csv")[1] if row[5]]
    assert written == pytest.approx(expected.tolist())


@pytest.mark.parametrize("method, mirror", [("shortcut", True), ("meanflow", True), ("lsd", False)])
def test_the_paper_s_likelihood_is_mirrored_but_for_lsd(
    photos, tmp_path, monkeypatch, method, mirror
):
    asked = []
    fast = f2d2.log_likelihood

    def recorded(flow, x1, steps, mirror=False):
        if isinstance(steps, int):  # the oracle asks for its own grid
            asked.append((steps, mirror))
        return fast(flow, x1, steps, mirror)

    monkeypatch.setattr(f2d2, "log_likelihood", recorded)
    metrics = run(tmp_path / "paper", photos, "--method", method, "--paper", steps=1)
    assert asked == [(k, mirror) for k in (8, 4, 2, 1)] and metrics["mirror"] == mirror
    asked.clear()
    metrics = run(tmp_path / "ours", photos, "--method", method, steps=1)
    assert asked == [(k, False) for k in (8, 4, 2, 1)] and not metrics["mirror"]


def test_an_evaluation_says_how_long_it_will_take(student, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_image, "CHUNK", 2)
    ticks = itertools.count(0, 31)  # seconds
    with monkeypatch.context() as patch:
        patch.setattr(train_image.time, "time", ticks.__next__)
        evaluated(student, photos, tmp_path / "out")
    lines = [line for line in capsys.readouterr().out.splitlines() if "s left" in line]
    assert len(lines) > 5 and all("%" in line for line in lines)


def test_a_picture_shows_the_likeliest_and_the_unlikeliest_in_order(still, tmp_path):
    """N(0, I) likes grey best."""
    evaluated(still, flat(tmp_path / "other", [250, 3, 140, 60, 200]), tmp_path / "out")
    grid = np.asarray(Image.open(tmp_path / "out/extremes.png").convert("L"))
    cells = [grid[r + 4, c + 4] for r in range(1, len(grid), 9) for c in range(1, len(grid[0]), 9)]
    shown = [int(level) for level in cells if level > 0]
    assert shown[:5] == [140, 60, 200, 250, 3] and shown[-1] == 3


def test_other_images_after_the_training_folder_is_gone(tmp_path, capsys):
    photos = write_photos(tmp_path / "photos")
    trained = run(tmp_path / "run", photos, "--method", "lsd")
    photos.rename(tmp_path / "moved")
    other = tmp_path / "black"
    write_images(other, 4)
    for path in other.iterdir():
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    capsys.readouterr()
    metrics = evaluated(tmp_path / "run/latest.pt", other, tmp_path / "out")
    assert metrics["images"] == 4 and metrics["dataset"] == str(other)
    assert abs(metrics["steps"]["1"]["bpd"] - trained["steps"]["1"]["bpd"]) > 0.05
    table = capsys.readouterr().out
    assert str(other) in table and str(photos) not in table
    again = evaluated(tmp_path / "run/latest.pt", tmp_path / "moved", tmp_path / "again")
    assert again["steps"] == trained["steps"]
    message = refused(capsys, *QUICK, "--eval", tmp_path / "run/latest.pt", "--out", tmp_path / "x")
    assert str(photos) in message


def test_the_training_folder_by_another_name_is_no_other_folder(tmp_path, monkeypatch):
    """Its held-out tenth is measured, however its path is written."""
    write_images(tmp_path / "photos", 20)
    monkeypatch.chdir(tmp_path)
    trained = run(tmp_path / "run", "photos", "--method", "lsd", steps=1)
    assert trained["images"] == 4
    for i, name in enumerate(("./photos/", tmp_path / "photos", "run/../photos")):
        metrics = evaluated("run/latest.pt", name, tmp_path / str(i))
        assert metrics["images"] == trained["images"], name
        assert metrics["steps"] == trained["steps"], name


def test_an_image_s_figure_does_not_hang_on_those_after_it(student, tmp_path):
    """The noise of its bytes is its own, so two folders that begin alike can be compared."""
    flat(tmp_path / "a", [10, 20, 30])
    flat(tmp_path / "b", [10, 20])
    found = []
    for name in "ab":
        evaluated(student, tmp_path / name, tmp_path / f"out-{name}")
        found.append(read_csv(tmp_path / f"out-{name}/log_p.csv")[1])
    for row, other in zip(*found):
        assert [float(v) for v in row[1:5]] == pytest.approx([float(v) for v in other[1:5]])


def test_a_teacher_is_found_again_by_path_and_content(trained, photos, tmp_path, monkeypatch):
    teacher = shutil.copytree(trained / "teacher", tmp_path / "teacher") / "latest.pt"
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)  # and from anywhere else
        run(tmp_path / "student", photos, "--method", "lsd", "--teacher", "teacher/latest.pt")
    path = tmp_path / "student/latest.pt"
    state = teacher.read_bytes()
    found = {}
    for name in ("there", "changed", "broken", "gone"):
        if name == "changed":
            edit(teacher, step=4)
        if name == "broken":
            teacher.write_bytes(b"no checkpoint")
        if name == "gone":
            teacher.unlink()
        found[name] = evaluated(path, photos, tmp_path / name)
    teacher.write_bytes(state)
    found["named"] = evaluated(path, photos, tmp_path / "named", "--teacher", teacher)
    for name in ("there", "named"):
        assert f"the ODE of {teacher}" in json.dumps(found[name])
    for name in ("changed", "broken", "gone"):
        assert "its own ODE" in json.dumps(found[name])
    assert found["there"]["oracle"]["bpd"] == found["named"]["oracle"]["bpd"]
    assert found["changed"]["oracle"]["bpd"] == found["gone"]["oracle"]["bpd"]
    assert found["there"]["oracle"]["bpd"] != found["gone"]["oracle"]["bpd"]


@pytest.mark.parametrize(
    "options",
    [["--guidance", 0.1], ["--paper"], ["--oracle-images", 2], ["--teacher", "T"], ["--seed", 1]],
    ids=str,
)
@pytest.mark.parametrize("out", [True, False], ids=["--out", "default"])
def test_no_evaluation_overwrites_one_with_other_options(
    student, trained, photos, tmp_path, options, out
):
    options = [trained / "teacher/latest.pt" if option == "T" else option for option in options]
    command = [*QUICK, "--eval", student, "--dataset", photos]
    command += ["--out", tmp_path / "student/out"] if out else []
    main(words(*command))
    before = files_in(tmp_path / "student")
    assert any(path.name == "metrics.json" for path in before)
    try:
        main(words(*command, *options))
    except SystemExit as stop:
        assert stop.code == 2
    after = files_in(tmp_path / "student")
    assert {path: after[path] for path in before} == before


def test_a_run_does_not_overwrite_an_evaluation(student, photos, tmp_path, capsys):
    evaluated(student, photos, tmp_path / "out")
    before = files_in(tmp_path / "out")
    command = [*TINY, "--dataset", photos, "--steps", 1, "--out", tmp_path / "out"]
    assert "--out" in refused(capsys, *command)
    assert files_in(tmp_path / "out") == before


def test_guidance_changes_the_samples_and_is_counted(student, photos, tmp_path):
    plain = evaluated(student, photos, tmp_path / "plain")
    guided = evaluated(student, photos, tmp_path / "guided", "--guidance", 0.5)
    pictures = [(tmp_path / name / "samples.png").read_bytes() for name in ("plain", "guided")]
    assert pictures[0] != pictures[1]
    assert plain["guidance"] is None and guided["guidance"] == 0.5
    for k in COUNTS:
        assert guided["steps"][k]["bpd"] == plain["steps"][k]["bpd"]
        assert plain["steps"][k]["nfe_sample"] == int(k)
        assert guided["steps"][k]["nfe_sample"] == int(k) + 2


def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


def test_one_image_is_valid_json(student, tmp_path):
    evaluated(student, flat(tmp_path / "one", [100]), tmp_path / "out")
    text = (tmp_path / "out/metrics.json").read_text()
    metrics = json.loads(text, parse_constant=no_constant)
    assert metrics["images"] == 1 and metrics["steps"]["1"]["se"] is None
    assert metrics["steps"]["1"]["corr"] is None and metrics["steps"]["1"]["bpd"] > 0


def test_a_map_without_a_head_has_samples_and_its_oracle(tmp_path, photos, capsys):
    run(tmp_path / "run", photos, "--method", "meanflow", "--no-divergence", steps=1)
    header, rows = read_csv(tmp_path / "run/log_p.csv")
    assert len(header) == 2 and sum(row[1] != "" for row in rows) == 3
    path = tmp_path / "run/latest.pt"
    for options in (["--sample", 2], ["--guidance", 0.1, "--dataset", photos]):
        command = [*QUICK, "--eval", path, *options, "--out", tmp_path / "out"]
        assert "head" in refused(capsys, *command)
        assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def grey(tiny, tmp_path_factory):
    """A run on grey images, and their folder."""
    folder = tmp_path_factory.mktemp("grey")
    (folder / "images").mkdir()
    for i, image in enumerate(picture(12, 8, 8)):
        Image.fromarray(image).save(folder / f"images/{i:02d}.png")
    run(folder / "run", folder / "images", "--method", "lsd")
    return folder


def test_a_grey_checkpoint_knows_grey_images_only(grey, photos, tmp_path, capsys):
    metrics = json.loads((grey / "run/metrics.json").read_text())
    assert metrics["images"] == 2
    assert checkpoint(grey / "run")["flow"]["backbone.first.weight"].shape == (4, 64 + 10)
    options = [*QUICK, "--eval", grey / "run/latest.pt", "--dataset", photos]
    assert "grey" in refused(capsys, *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out/metrics.json").exists()


def test_samples_of_grey_images_are_read_as_grey_ones(grey, tmp_path):
    sampled(grey / "run/latest.pt", tmp_path / "samples")
    metrics = evaluated(grey / "run/latest.pt", tmp_path / "samples", tmp_path / "out")
    assert metrics["images"] == 3


def test_a_file_name_that_is_no_utf_8_is_written_as_it_is(student, tmp_path):
    write_images(tmp_path / "in", 1)
    (tmp_path / "in/000.png").rename(os.fsdecode(os.fsencode(tmp_path / "in") + b"/caf\xe9.png"))
    evaluated(student, tmp_path / "in", tmp_path / "out")
    assert b"caf\xe9.png" in (tmp_path / "out/log_p.csv").read_bytes()


def test_a_checkpoint_of_colours_reads_grey_as_three(grey, student, tmp_path):
    metrics = evaluated(student, grey / "images", tmp_path / "out")
    assert metrics["images"] == 12 and metrics["steps"]["1"]["bpd"] > 0


def test_a_teacher_of_other_colours_is_one_sentence(grey, student, photos, tmp_path, capsys):
    teacher = ["--teacher", grey / "run/latest.pt"]
    commands = (
        ["--eval", student, "--dataset", photos, *QUICK],
        ["--dataset", photos, "--method", "lsd", *TINY],
    )
    for i, command in enumerate(commands):
        refused(capsys, *command, *teacher, "--out", tmp_path / str(i))
        assert not (tmp_path / str(i) / "metrics.json").exists()


def test_a_named_data_set_of_another_size_is_one_sentence(student, tmp_path, capsys):
    imagenet(tmp_path, rows=1)
    options = [*QUICK, "--eval", student, "--dataset", "imagenet64", "--data", tmp_path]
    message = refused(capsys, *options, "--out", tmp_path / "out")
    assert "64" in message and "8" in message


# ------------------------------------------------------------------------------- FID
def expected_distance(a, b):
    S_a, S_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = np.trace(scipy.linalg.sqrtm(S_a @ S_b).real)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(S_a) + np.trace(S_b) - 2 * cross


def test_frechet_distance_against_the_closed_form_and_scipy():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(500, 6, generator=g, dtype=torch.float64)
    b = torch.randn(400, 6, generator=g, dtype=torch.float64) * torch.arange(1, 7) + 2
    b = b @ torch.randn(6, 6, generator=g, dtype=torch.float64)
    assert frechet_distance(a, b) == pytest.approx(
        expected_distance(a.numpy(), b.numpy()), rel=1e-6
    )
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    whole = 3 * a + 1  # the same data, three times as wide, and moved
    mean, covariance = a.mean(0), a.T.cov()
    exact = (2 * mean + 1).square().sum() + (3 - 1) ** 2 * covariance.trace()
    assert frechet_distance(a, whole) == pytest.approx(exact.item(), rel=1e-6)


class Features(nn.Module):
    def forward(self, x, return_features: bool = False):
        assert return_features and x.dtype == torch.uint8 and x.shape[1] == 3
        return nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)[:, :5]


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "net.pt"
    torch.jit.script(Features()).save(str(path))
    return path


@pytest.mark.parametrize("guidance", [[], ["--guidance", 0.5]], ids=["plain", "guided"])
def test_fid_against_the_train_images(student, photos, inception, tmp_path, monkeypatch, guidance):
    made = {}
    sample = f2d2.sample

    def recorded(flow, x0, steps):
        x1, log_p = sample(flow, x0, steps)
        if len(x0) == 16 and not x0.requires_grad:
            made[str(steps)] = to_bytes(x1)
        return x1, log_p

    monkeypatch.setattr(f2d2, "sample", recorded)
    options = ["--fid-network", inception, *guidance]
    metrics = evaluated(student, photos, tmp_path / "out", *options)
    real = torch.from_numpy(write_images(tmp_path / "again", 12))
    real = Features()(real, return_features=True).double().numpy()
    assert sorted(made) == sorted(COUNTS)
    for k, images in made.items():
        features = Features()(images, return_features=True).double().numpy()
        assert metrics["steps"][k]["fid"] == pytest.approx(
            expected_distance(real, features), rel=1e-3
        )


def test_fid_with_other_images_is_computed_or_refused(student, inception, tmp_path):
    other = tmp_path / "other"
    write_images(other, 12, seed=2)
    try:
        options = ["--fid-network", inception]
        metrics = evaluated(student, other, tmp_path / "out", *options)
        assert all(row["fid"] is not None for row in metrics["steps"].values())
    except SystemExit as stop:
        assert stop.code == 2


def test_grey_images_reach_the_fid_network_as_three(grey, inception, tmp_path):
    options = ["--fid-network", inception]
    metrics = evaluated(grey / "run/latest.pt", grey / "images", tmp_path / "out", *options)
    assert all(row["fid"] > 0 for row in metrics["steps"].values())


def test_a_bad_fid_network_is_one_sentence(student, photos, tmp_path, capsys):
    (tmp_path / "junk.pt").write_bytes(b"junk")
    shutil.copy(student, tmp_path / "student.pt")
    for name in ("none.pt", "junk.pt", "student.pt"):
        options = [*QUICK, "--eval", student, "--dataset", photos, "--out", tmp_path / "out"]
        assert name in refused(capsys, *options, "--fid-network", tmp_path / name)


# ------------------------------------------------------------------------------- samples
def sampled(path, out, *options):
    main([*QUICK, *words("--eval", path, "--sample", 3, "--out", out, *options)])
    names = sorted(p.name for p in out.glob("*.png"))
    return names, torch.stack([torch.tensor(read_image(out / name, 8)) for name in names])


def test_samples_need_the_checkpoint_alone_and_come_with_their_log_p(tmp_path, monkeypatch):
    photos = write_photos(tmp_path / "photos")
    run(tmp_path / "teacher", photos, "--method", "flow")
    teacher = ["--teacher", tmp_path / "teacher/latest.pt"]
    run(tmp_path / "run", photos, "--method", "lsd", *teacher)
    path = shutil.copy(tmp_path / "run/latest.pt", tmp_path / "alone.pt")
    for folder in ("photos", "teacher", "run"):
        shutil.rmtree(tmp_path / folder)
    calls = []
    sample = f2d2.sample

    def recorded(flow, x0, steps):
        calls.append((x0, steps, *sample(flow, x0, steps)))
        return calls[-1][2:]

    monkeypatch.setattr(f2d2, "sample", recorded)
    names, images = sampled(path, tmp_path / "out")
    ((x0, steps, x1, own),) = calls
    assert steps == 8 and x0.shape == (3, 3, 8, 8) and x0.std() == pytest.approx(1, abs=0.15)
    assert torch.equal(images.permute(0, 3, 1, 2), to_bytes(x1))
    flow = build(MODEL, "cpu").eval()
    flow.load_state_dict(torch.load(path, weights_only=True)["ema"])
    header, rows = read_csv(tmp_path / "out/samples.csv")
    column = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    assert column.pop(header[0]) == names
    log_p = f2d2.log_likelihood(flow, x1, 8).tolist()
    assert [float(v) for v in column["log_likelihood"]] == pytest.approx(log_p, rel=1e-5)
    assert [float(v) for v in column["sample"]] == pytest.approx(own.tolist(), rel=1e-5)
    assert log_p != pytest.approx(own.tolist(), rel=1e-5)


@pytest.mark.parametrize("option", ["--dataset", "--teacher", "--fid-network"])
def test_options_that_samples_have_no_use_for_are_refused(
    student, trained, photos, inception, tmp_path, capsys, option
):
    values = {"--dataset": photos, "--fid-network": inception}
    value = values.get(option, trained / "teacher/latest.pt")
    command = [*QUICK, "--eval", student, "--sample", 2, "--out", tmp_path / "out"]
    assert option in refused(capsys, *command, option, value)


def test_samples_are_seeded_and_guided(student, tmp_path):
    found = {}
    for name, options in (
        ("first", []),
        ("again", []),
        ("other", ["--seed", 2**64 - 1]),
        ("guided", ["--guidance", 0.5]),
    ):
        found[name] = sampled(student, tmp_path / name, *options)[1]
    assert torch.equal(found["first"], found["again"])
    assert not torch.equal(found["first"], found["other"])
    assert not torch.equal(found["first"], found["guided"])
    metrics = json.loads((tmp_path / "guided/metrics.json").read_text())
    assert metrics["guidance"] == 0.5 and metrics["nfe"] == 10


def test_more_samples_than_a_chunk(student, tmp_path, monkeypatch):
    together = sampled(student, tmp_path / "together")[1]
    monkeypatch.setattr(train_image, "CHUNK", 2)
    assert torch.equal(sampled(student, tmp_path / "apart")[1], together)


def test_evaluation_in_chunks_gives_the_same_figures(student, photos, tmp_path, monkeypatch):
    together = evaluated(student, photos, tmp_path / "together")
    monkeypatch.setattr(train_image, "CHUNK", 2)
    apart = evaluated(student, photos, tmp_path / "apart")
    for k in COUNTS:
        assert apart["steps"][k]["bpd"] == pytest.approx(together["steps"][k]["bpd"], rel=1e-6)


# ------------------------------------------------------------------------------- bad options
TRAINING = [
    ("--method", "lsd"),
    ("--no-divergence",),
    ("--init", "x.pt"),
    ("--image-size", "8"),
    ("--channels", "4"),
    ("--blocks", "1"),
    ("--dropout", "0.1"),
    ("--dropout", "0"),
    ("--steps", "3"),
    ("--warmup", "1"),
    ("--warmup", "0"),
    ("--batch-size", "4"),
    ("--micro-batch", "4"),
    ("--lr", "0.1"),
    ("--compile",),
]


@pytest.mark.parametrize("option", TRAINING, ids=" ".join)
def test_an_option_of_training_is_refused_by_name_in_an_evaluation(
    student, photos, tmp_path, capsys, option
):
    command = [*QUICK, "--eval", student, "--dataset", photos, "--out", tmp_path / "out"]
    assert option[0] in refused(capsys, *command, *option)
    assert not (tmp_path / "out").exists()


OUT_OF_RANGE = [
    ("--steps", ["0", "-1", "1.5", "x", "nan"]),
    ("--warmup", ["-5", "0.5"]),
    ("--batch-size", ["0"]),
    ("--micro-batch", ["0", "5"]),
    ("--lr", ["0", "-1", "nan", "inf", "2"]),
    ("--dropout", ["-0.1", "1", "2", "nan"]),
    ("--channels", ["0", "-4"]),
    ("--blocks", ["0"]),
    ("--image-size", ["0", "10", "-4"]),
    ("--seed", ["-1", str(2**64), "0.5"]),
    ("--oracle-images", ["0"]),
    ("--guidance", ["0", "-1", "nan"]),
    ("--sample", ["0"]),
    ("--method", ["f2d2"]),
    ("--device", ["tpu"]),
    ("--amp", ["bf16"]),
]


@pytest.mark.parametrize(
    "option, value", [(option, value) for option, values in OUT_OF_RANGE for value in values]
)
def test_an_option_out_of_range_is_one_line_before_anything_is_made(
    photos, tmp_path, capsys, option, value
):
    command = [*TINY, "--dataset", photos, "--method", "lsd", "--out", tmp_path / "out"]
    assert option in refused(capsys, *command, f"{option}={value}")
    assert not (tmp_path / "out").exists()


def test_options_that_do_not_go_together_are_one_sentence(
    trained, photos, tmp_path, monkeypatch, capsys
):
    teacher = trained / "teacher/latest.pt"
    here = [*TINY, "--dataset", photos, "--out", tmp_path / "out"]
    for word, options in (
        ("--teacher", [*here, "--method", "shortcut-distill"]),
        ("teacher", [*here, "--method", "flow", "--teacher", teacher]),
        ("teacher", [*here, "--method", "shortcut", "--teacher", teacher]),
        ("--eval", [*here, "--guidance", 0.1]),
        ("--eval", [*here, "--sample", 3]),
        ("nowhere", [*TINY, "--dataset", tmp_path / "nowhere", "--out", tmp_path / "out"]),
        ("--image-size", [*TINY, "--dataset", "cifar10", "--out", tmp_path / "out"]),
    ):
        assert word in refused(capsys, *options), options
        assert not (tmp_path / "out").exists(), options
    other = [*here, "--channels", 8, "--method", "lsd", "--teacher", teacher]
    assert "channels" in refused(capsys, *other)
    assert not (tmp_path / "out/latest.pt").exists()


def test_out_below_a_file_is_one_sentence(student, photos, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = ["--out", tmp_path / "file/out"]
    assert "file/out" in refused(capsys, *TINY, "--dataset", photos, *out)
    assert "file/out" in refused(capsys, *QUICK, "--eval", student, "--dataset", photos, *out)
    assert "file/out" in refused(capsys, *QUICK, "--eval", student, "--sample", 2, *out)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_out_is_one_sentence(photos, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o555)
    assert "out" in refused(capsys, *TINY, "--dataset", photos, "--out", tmp_path / "out")


def test_an_out_that_cannot_be_written_is_found_before_training(
    photos, tmp_path, monkeypatch, capsys
):
    def read_only(file, mode="r", *args, **options):
        if set(mode) & set("wax+") and str(file).startswith(str(tmp_path)):
            raise OSError(30, "Read-only file system")
        return open(file, mode, *args, **options)

    def trained(*args, **options):
        raise AssertionError("it trained first")

    monkeypatch.setattr(train_image, "open", read_only, raising=False)
    monkeypatch.setattr(f2d2, "f2d2_loss", trained)
    command = [*TINY, "--dataset", photos, "--method", "lsd", "--out", tmp_path / "out"]
    assert "Read-only" in refused(capsys, *command)


def test_a_full_disk_in_an_evaluation_is_one_sentence(
    student, photos, tmp_path, monkeypatch, capsys
):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    command = [*QUICK, "--eval", student, "--dataset", photos, "--out", tmp_path / "out"]
    assert "No space left" in refused(capsys, *command)
    assert not list((tmp_path / "out").glob("*.part"))
    assert not (tmp_path / "out/metrics.json").exists()


def test_an_evaluation_out_of_memory_is_one_sentence(
    student, photos, tmp_path, monkeypatch, capsys
):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(f2d2, "ode_log_likelihood", full)
    command = [*QUICK, "--eval", student, "--dataset", photos, "--out", tmp_path / "out"]
    assert "--oracle-images" in refused(capsys, *command)


def test_half_a_metrics_json_blocks_nothing_or_is_one_sentence(student, photos, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/metrics.json").write_text('{"data')
    command = [*QUICK, "--eval", student, "--dataset", photos, "--out", tmp_path / "out"]
    try:
        main(words(*command))
    except SystemExit as stop:
        assert stop.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


# ------------------------------------------------------------------------------- bad checkpoints
WEIGHT = "backbone.first.weight"


def with_first_weight(part, value):
    def fault(state):
        state[part][WEIGHT][0, 0] = value
        return state

    return fault


def with_averages(change):
    def fault(state):
        return state | {"ema": change(state["ema"])}

    return fault


def without(key):
    def fault(state):
        return {k: v for k, v in state.items() if k != key}

    return fault


FAULTS = {
    "NaN": with_first_weight("ema", math.nan),
    "infinity": with_first_weight("flow", math.inf),
    "half precision": with_averages(lambda ema: {k: w.half() for k, w in ema.items()}),
    "double precision": with_averages(lambda ema: {k: w.double() for k, w in ema.items()}),
    "another shape": with_averages(lambda ema: ema | {WEIGHT: ema[WEIGHT][:, 1:]}),
    "a weight too many": with_averages(lambda ema: ema | {"backbone.third": torch.zeros(1)}),
    "a missing weight": with_averages(without(WEIGHT)),
    "no weights": with_averages(lambda ema: 3),
    "no averages": without("ema"),
    "no network": without("flow"),
    "no configuration": without("config"),
    "no step": without("step"),
    "a step that is no number": lambda state: state | {"step": "three"},
    "a list": lambda state: [state],
    "the bare weights": lambda state: state["ema"],
}


def doors(path, photos, out):
    """Every way in for a checkpoint: command lines."""
    training = [*TINY, "--dataset", photos, "--method", "lsd", "--out", out]
    return [
        [*QUICK, "--eval", path, "--dataset", photos, "--out", out],
        [*QUICK, "--eval", path, "--sample", 2, "--out", out],
        [*training, "--teacher", path],
        [*training, "--init", path],
    ]


def refused_at_every_door(capsys, path, photos, tmp_path, every=True):
    before = path.read_bytes() if path.is_file() else None
    for i, command in enumerate(doors(path, photos, tmp_path / "out")[: 4 if every else 1]):
        assert str(path) in refused(capsys, *command), i
    assert (path.read_bytes() if path.is_file() else None) == before
    assert not (tmp_path / "out/metrics.json").exists()


@pytest.mark.parametrize("kind", FAULTS)
def test_a_broken_checkpoint_is_one_sentence_and_left_alone(
    student, photos, tmp_path, capsys, kind
):
    path = tmp_path / "broken.pt"
    torch.save(FAULTS[kind](torch.load(student, weights_only=True)), path)
    refused_at_every_door(capsys, path, photos, tmp_path, every=kind == "NaN")


def test_what_is_no_checkpoint_at_all_is_one_sentence(student, photos, tmp_path, capsys):
    whole = (tmp_path / "student/latest.pt").read_bytes()
    (tmp_path / "junk.pt").write_bytes(b"junk")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "folder.pt").mkdir()
    for name in ("none.pt", "junk.pt"):
        refused_at_every_door(capsys, tmp_path / name, photos, tmp_path)
    for name in ("empty.pt", "cut.pt", "folder.pt"):
        refused_at_every_door(capsys, tmp_path / name, photos, tmp_path, every=False)


def test_every_key_of_the_configuration_is_needed_or_has_no_effect(
    student, photos, tmp_path, capsys
):
    """A checkpoint without one of them is refused in one sentence, or read right."""
    expected = evaluated(student, photos, tmp_path / "whole")["steps"]
    tracebacks = []
    for key in torch.load(student, weights_only=True)["config"]:
        config = without(key)(torch.load(student, weights_only=True)["config"])
        shutil.copy(student, tmp_path / "broken.pt")
        edit(tmp_path / "broken.pt", config=config)
        out = tmp_path / f"out-{key}"
        try:
            found = evaluated(tmp_path / "broken.pt", photos, out)
            assert found["steps"] == expected, key
        except SystemExit as stop:
            assert stop.code == 2
        except KeyError:
            tracebacks.append(key)
    assert tracebacks == []


def test_a_configuration_that_does_not_fit_its_weights_is_one_sentence(
    student, photos, tmp_path, capsys
):
    for key, value in (("channels", 8), ("colours", 1), ("image_size", 12), ("paper", True)):
        state = torch.load(student, weights_only=True)
        where = state["config"] if key in state["config"] else state["config"]["model"]
        where[key] = value
        torch.save(state, tmp_path / "misfit.pt")
        refused_at_every_door(capsys, tmp_path / "misfit.pt", photos, tmp_path, every=False)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_cannot_execute_code(student, photos, tmp_path, capsys):
    state = torch.load(student, weights_only=True)
    state["config"]["seed"] = Evil(tmp_path / "owned")
    torch.save(state, tmp_path / "evil.pt")
    refused_at_every_door(capsys, tmp_path / "evil.pt", photos, tmp_path)
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(tmp_path / "evil.pt", out / "latest.pt")
    command = [*TINY, "--dataset", photos, "--method", "lsd", "--out", out]
    assert "latest.pt" in refused(capsys, *command)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("kind", ["cut", "NaN", "optimizer", "no moments"])
def test_a_run_does_not_go_on_from_a_broken_state(photos, tmp_path, capsys, kind):
    out = tmp_path / "out"
    run(out, photos, "--method", "lsd", steps=1)
    path = out / "latest.pt"
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "NaN":
        torch.save(FAULTS["NaN"](checkpoint(out)), path)
    elif kind == "optimizer":
        edit(path, optimizer={"state": {}, "param_groups": []})
    else:
        edit(path, optimizer=without("param_groups")(checkpoint(out)["optimizer"]))
    before = path.read_bytes()
    command = [*TINY, "--dataset", photos, "--method", "lsd", "--steps", 2, "--out", out]
    assert "latest.pt" in refused(capsys, *command)
    assert path.read_bytes() == before
