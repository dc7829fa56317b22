"""Train a flow over MNIST's images: it draws digits, and knows how probable an image is.

    python examples/mnist_flow.py                                # a small U-Net: hours on a CPU
    python examples/mnist_flow.py --dataset digits               # 8 × 8 digits, under two minutes
    python examples/mnist_flow.py --dataset fashion --device cuda
    python examples/mnist_flow.py --resume --out runs/mnist-flow # after Ctrl-C; or the report anew
    python examples/mnist_flow.py --help                         # every parameter

It is `cnf mnist generate`: a folder in runs/ with weights, figures and pictures.  From Python:

    flow = cnf.ImageFlow((1, 28, 28), classes=10).fit(images, labels, seconds=3600)
    flow.sample(64, classes=7)
    flow.bits_per_dim(test_images)
"""

from __future__ import annotations

import sys

from cnf.cli import main

if __name__ == "__main__":
    sys.exit(main(["mnist", "generate", *sys.argv[1:]]))
