"""Few steps on a uniform grid against one finer near the data, on images: python .github/image_grids.py CKPT... prints the table of measurements.md from
checkpoints of train_image.py that had a teacher. Bits/dim of 64 test images against the teacher's ODE, as in the evaluation; mean (range)."""
import functools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_image
from table import mean, spread
from f2d2 import bits_per_dim, dequantize, log_likelihood, ode_log_likelihood, time_grid

IMAGES, ORACLE_STEPS, DEVICE = 64, 64, torch.device("cuda" if torch.cuda.is_available() else "cpu")
bits = lambda log_p, x: bits_per_dim(log_p.double().cpu(), x[0].numel())


@functools.cache
def images_and_oracle(teacher, dataset, size):
    test = train_image.load_data(dataset, Path(dataset), size)[1]
    some = torch.linspace(0, len(test) - 1, min(IMAGES, len(test))).long()
    noise = torch.stack([torch.rand(test[0].shape, generator=torch.Generator().manual_seed(i)) for i in some.tolist()])
    x, velocity = dequantize(test[some], noise).to(DEVICE), train_image.load_model(teacher, DEVICE, size).velocity
    torch.manual_seed(0)
    return x, bits(ode_log_likelihood(velocity, x, ORACLE_STEPS, "dct"), x)


@torch.no_grad()
def main(checkpoints):
    table = {}
    for checkpoint in checkpoints:
        config = train_image.load_checkpoint(checkpoint, "cpu")["config"]
        size = config["model"]["image_size"]
        flow, (x, oracle) = train_image.load_model(checkpoint, DEVICE, size), images_and_oracle(config["teacher"], config["dataset"], size)
        for steps in (8, 4, 2):
            for geometric in (False, True):
                fast = bits(log_likelihood(flow, x, time_grid(steps, x, geometric)), x)
                row = (fast - oracle).mean(), (fast - oracle).abs().mean(), torch.corrcoef(torch.stack([fast, oracle]))[0, 1]
                key = config["method"], f"{size}x{size}", steps, "finer near the data" if geometric else "uniform"
                table.setdefault(key, []).append([v.item() for v in row])
    print("| system | pixels | steps | grid | gap to the oracle | error per image | correlation |\n" + "| --- " * 7 + "|")
    for key, rows in table.items():
        print(f"| {' | '.join(map(str, key))} | " + " | ".join(f"{mean(v)} ({spread(v)})" for v in zip(*rows)) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
