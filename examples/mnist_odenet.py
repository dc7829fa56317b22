"""Train a neural ODE on MNIST, change its parameters, and see what they do.

    python examples/mnist_odenet.py                                # minutes on a CPU
    python examples/mnist_odenet.py --dataset digits               # 8 × 8 digits, no download
    python examples/mnist_odenet.py --method dopri5 --rtol 1e-3 --gradient adjoint
    python examples/mnist_odenet.py --net resnet                   # what it is compared with
    python examples/mnist_odenet.py --preset paper --device cuda   # Chen et al. 2018, 160 epochs
    python examples/mnist_odenet.py --help                         # every parameter

It is `cnf mnist classify`: accuracy and evaluations of the field while it trains, and a folder in
runs/ with weights, figures and pictures.  `docs/odenet.md` builds the same net from its parts.
"""

from __future__ import annotations

import sys

from cnf.cli import main

if __name__ == "__main__":
    sys.exit(main(["mnist", "classify", *sys.argv[1:]]))
