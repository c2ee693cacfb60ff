"""How noisy one Hutchinson probe is: python .github/probes.py CKPT FOLDER prints the README's table for a checkpoint of train_image.py.
Standard deviation over 64 probes of the estimate of div v(x_t,t), in nats, root mean square over 32 test images, per probe and t."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_image
from f2d2 import dequantize, divergence

TIMES, IMAGES, PROBES = (0.1, 0.5, 0.9, 0.99, 0.995), 32, 64


def main(checkpoint, folder):
    size = train_image.load_checkpoint(checkpoint, "cpu")["config"]["model"]["image_size"]
    flow = train_image.load_model(checkpoint, "cpu", size)
    test = train_image.load_data(folder, Path(folder), size)[1][:IMAGES]
    generator = torch.Generator().manual_seed(0)
    x1, x0 = dequantize(test, generator=generator), torch.randn(test.shape, generator=generator)
    print("| t | " + " | ".join(map(str, TIMES)) + " |\n" + "| --- " * (1 + len(TIMES)) + "|")
    for probe in ("gaussian", "rademacher", "dct"):
        cells = []
        for t in TIMES:
            x, times = (1 - t) * x0 + t * x1, torch.full((len(x1),), t)
            draw = lambda: torch.randn(x.shape, generator=generator) if probe == "gaussian" else probe
            estimates = torch.stack([divergence(flow.velocity, x, times, draw(), generator)[1] for _ in range(PROBES)])
            cells.append(f"{estimates.var(0).mean().sqrt().item():.1f}")
        print(f"| {probe} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
