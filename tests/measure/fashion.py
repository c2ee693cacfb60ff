"""Fashion-MNIST as a folder of PNGs: python tests/measure/fashion.py FOLDER [DATA [TESTS]]

DATA: where torchvision's copy is or goes (default data). 60,000 grey images of 28x28 for train/,
the first TESTS of the 10,000 of the test split for test/ (default 2,000); train_image.py resizes
them.
"""

import sys
from pathlib import Path

from torchvision.datasets import FashionMNIST


def main(folder, data="data", tests=2_000):
    for split, train, count in (("train", True, 60_000), ("test", False, int(tests))):
        target = Path(folder) / split
        target.mkdir(parents=True, exist_ok=True)
        images = FashionMNIST(data, train, download=True)
        for i in range(count):
            images[i][0].save(target / f"{i:05d}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
