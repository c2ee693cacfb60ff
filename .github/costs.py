"""What a training step costs beside a plain flow-matching step of the same U-Net and batch: python .github/costs.py [options of train_image.py]
prints the README's table for --device, --channels, --blocks, --image-size, --batch-size, --dropout and --compile. Medians of 7 alternating
repetitions; memory is the peak of a step, above what weights and optimizer take (CUDA only)."""
import copy
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_image

SYSTEMS = ["flow", "shortcut", "shortcut-distill --teacher own", "meanflow", "meanflow --teacher own", "lsd", "lsd --teacher own"]
REPETITIONS = 7


def system(name, options):
    """A function that takes one training step of the method, with its own recipe; the teacher is a copy of the network."""
    _, args = train_image.parse([*options, "--dataset", ".", "--method", *name.split()])
    config, device = train_image.settle(args, 1), torch.device(args.device)
    flow = train_image.build(config["model"], device)
    frozen = copy.deepcopy(flow).eval().requires_grad_(False).velocity if args.teacher else None
    objective = train_image.Objective(flow, train_image.RECIPES[args.method]["condition"], frozen, **args.loss)
    if args.compile:
        objective.compile()
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-5)
    data = torch.randint(0, 256, (args.batch_size, 3, args.image_size, args.image_size), dtype=torch.uint8).to(device)
    batch = train_image.draw(data, args, 1, 0, 1, device)

    def step():
        loss, _ = objective(*batch)
        optimizer.zero_grad(), loss.backward()
        optimizer.step()
    return step, args


def measure(step, device):
    """Seconds, and bytes above what was allocated before."""
    cuda = device == "cuda"
    if cuda:
        torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats()
    before, began = torch.cuda.memory_allocated() if cuda else 0, time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began, torch.cuda.max_memory_allocated() - before if cuda else 0


def main(options):
    steps = {}
    for name in SYSTEMS:
        step, args = system(name, options)
        try:
            step(), step()  # the first makes the optimizer's state
            steps[name] = step
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory", flush=True)
    rows = {name: [] for name in steps}
    for _ in range(REPETITIONS):
        for name, step in steps.items():
            rows[name].append(measure(step, args.device))
    medians = {name: [statistics.median(column) for column in zip(*found)] for name, found in rows.items()}
    seconds, memory = medians["flow"]
    print(f"| {args.batch_size} images of {args.image_size}x{args.image_size} | images a second | time of a step | peak memory of a step |\n" + "| --- " * 4 + "|")
    for name, (s, m) in medians.items():
        print(f"| {name} | {args.batch_size / s:.0f} | {s / seconds:.2f} | {f'{m / 2**30:.1f} GB, {m / memory:.2f}' if m else ''} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
