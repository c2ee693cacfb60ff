"""What a training step and a log p cost:

python tests/measure/costs.py [options]

For every method and micro-batch: images a second, time of a step over a flow-matching step, peak
memory of a step (CUDA) and the share of the device's peak that the counted FLOPs make (--peak, in
TFLOP/s); then seconds for one log p at 8, 4, 2, 1 steps and by the oracle, per 1,000 images.
Medians of REPETITIONS alternating repetitions. On a GPU: python tests/measure/costs.py --peak 67
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).parents[2]))
import f2d2
import train_image

SYSTEMS = {
    "flow": ("flow", False),
    "shortcut": ("shortcut", False),
    "shortcut-distill": ("shortcut-distill", True),
    "meanflow": ("meanflow", False),
    "meanflow, teacher": ("meanflow", True),
    "lsd": ("lsd", False),
    "lsd, teacher": ("lsd", True),
}
REPETITIONS = 5


class Flops(TorchDispatchMode):
    """Counts FLOPs below torch.func, where FlopCounterMode's module hooks fail."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def network(options, head):
    keys = ("image_size", "channels", "blocks")
    config = {k: getattr(options, k) for k in keys} | {"dropout": 0.0, "colours": 3}
    return train_image.build(config | {"paper": False, "head": head}, options.device)


def training_step(options, method, taught, batch):
    """A function that makes the gradients of one piece of a batch, and takes a step."""
    recipe = train_image.RECIPES[method]
    flow = network(options, method != "flow")
    teacher = network(options, False).requires_grad_(False).velocity if taught else None
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-5)
    loss = torch.compile(f2d2.f2d2_loss) if options.compile else f2d2.f2d2_loss
    shape = (batch, 3, options.image_size, options.image_size)
    x1 = torch.randn(shape, device=options.device)
    choices = {"diagonal": recipe["diagonal"], "probe": f2d2.hutchinson_probe(x1, "dct")}

    def step():
        optimizer.zero_grad()
        sum(loss(flow, x1, recipe["condition"], teacher, **choices).values()).backward()
        optimizer.step()

    return step


def measure(function, device):
    """Seconds, and bytes above what was allocated before (CUDA)."""
    cuda = device == "cuda"
    before = 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    began = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return seconds, torch.cuda.max_memory_allocated() - before if cuda else 0


def medians(functions, device):
    """{name: (seconds, bytes)}, the functions in turn; what runs out of memory is left out."""
    found = {name: [] for name in functions}
    for _ in range(1 + REPETITIONS):  # the first makes the optimizer's state, compiles
        for name in list(found):
            try:
                found[name].append(measure(functions[name], device))
            except torch.OutOfMemoryError:
                print(f"{name}: out of memory", flush=True)
                del found[name]
    return {name: [statistics.median(c) for c in zip(*rows[1:])] for name, rows in found.items()}


def flops(options, method, taught):
    """Of one image, counted on "meta"."""
    meta = argparse.Namespace(**vars(options) | {"device": "meta", "compile": False})
    step = training_step(meta, method, taught, 8)
    with Flops() as counter:
        step()
    return counter.total / 8


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peak", type=float, help="the device's TFLOP/s in float32 or TF32")
    options = parser.parse_args(argv)

    print("| micro-batch, method | images/s | time | FLOPs | peak memory | utilisation |")
    print("| --- " * 6 + "|")
    counted = {name: flops(options, *system) for name, system in SYSTEMS.items()}
    for batch in options.batches:
        steps = {k: training_step(options, *v, batch) for k, v in SYSTEMS.items()}
        found = medians(steps, options.device)
        for name, (seconds, memory) in found.items():
            rate = batch / seconds
            cells = [f"{batch}, {name}", f"{rate:.0f}", f"{seconds / found['flow'][0]:.2f}"]
            cells.append(f"{counted[name] / counted['flow']:.2f}")
            cells.append(f"{memory / 2**30:.1f} GiB" if memory else "")
            used = options.peak and rate * counted[name] / options.peak / 1e12
            cells.append(f"{used:.0%}" if used else "")
            print(f"| {' | '.join(cells)} |", flush=True)

    flow = network(options, True).requires_grad_(False)
    x = torch.randn(options.batches[0], 3, options.image_size, options.image_size)
    x = x.to(options.device)
    functions = {f"{k}": lambda k=k: f2d2.log_likelihood(flow, x, k) for k in (8, 4, 2, 1)}
    functions["oracle"] = lambda: f2d2.ode_log_likelihood(flow.velocity, x, 64, "dct")
    print("\n| steps | seconds for 1,000 log p |\n| --- | --- |")
    with torch.no_grad():
        for name, (seconds, _) in medians(functions, options.device).items():
            print(f"| {name} | {seconds / len(x) * 1000:.3g} |", flush=True)


if __name__ == "__main__":
    main()
