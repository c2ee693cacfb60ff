"""Few steps on a uniform grid against one finer near the data, on images: python .github/image_grids.py CKPT... prints the README's table from
checkpoints of train_image.py that had a teacher. Bits/dim of 64 test images against the teacher's ODE; the noise is that of the evaluation."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_image
from table import mean, spread
from f2d2 import bits_per_dim, dequantize, log_likelihood, ode_log_likelihood, time_grid

IMAGES, ORACLE_STEPS = 64, 64


def measure(checkpoint, device, oracles={}):
    """The method of a checkpoint and {(steps, grid): (gap, error per image, correlation)}."""
    config = train_image.load_checkpoint(checkpoint, "cpu")["config"]
    size, torch_device = config["model"]["image_size"], torch.device(device)
    flow, teacher = (train_image.load_model(path, torch_device, size) for path in (checkpoint, config["teacher"]))
    test = train_image.load_data(config["dataset"], Path(config["dataset"]), size)[1]
    some = torch.linspace(0, len(test) - 1, min(IMAGES, len(test))).long()
    noise = torch.stack([torch.rand(test[0].shape, generator=torch.Generator().manual_seed(int(i))) for i in some])
    x = dequantize(test[some], noise).to(device)
    bpd, key = lambda log_p: bits_per_dim(log_p.double(), x[0].numel()), (config["teacher"], len(x))
    if key not in oracles:
        torch.manual_seed(0)
        oracles[key] = bpd(ode_log_likelihood(teacher.velocity, x, ORACLE_STEPS, "dct"))
    rows = {}
    for steps in (8, 4, 2):
        for geometric in (False, True):
            fast = bpd(log_likelihood(flow, x, time_grid(steps, x, geometric)))
            error = fast - oracles[key]
            rows[steps, "finer near the data" if geometric else "uniform"] = (
                error.mean().item(), error.abs().mean().item(), torch.corrcoef(torch.stack([fast, oracles[key]]))[0, 1].item())
    return f"{config['method']}, {size}x{size}", rows


@torch.no_grad()
def main(checkpoints):
    table = {}
    for checkpoint in checkpoints:
        name, rows = measure(checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
        for key, row in rows.items():
            table.setdefault((name, *key), []).append(row)
    print("| system | steps | grid | gap to the oracle | error per image | correlation |\n" + "| --- " * 6 + "|")
    for key, rows in table.items():
        print(f"| {' | '.join(map(str, key))} | " + " | ".join(f"{mean(v)} ({spread(v)})" for v in zip(*rows)) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
