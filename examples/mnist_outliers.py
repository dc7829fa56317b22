"""Tell MNIST's test digits from what they are not, by a flow over images.

    python examples/mnist_outliers.py                                # the flow that comes with cnf
    python examples/mnist_outliers.py --run runs/mnist-flow
    python examples/mnist_outliers.py --run runs/digits-flow --images 100

Outliers: uniform noise, and test digits rotated by a quarter turn, blurred and inverted.  Three
scores, each with its area under the ROC curve (1: told apart, 0.5: not at all, below: the outliers
look better than the data):

    log p        a low density is strange.  It fails where outliers have the data's strokes and
                 grey levels, as digits on their side have, or hold little that could go wrong.
    typicality   a density unlike those of training images is strange, too high or too low.
    complexity   −log p less what a general compressor needs: how much better than zlib the flow is.

Draws the curves and prints the areas.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from cnf.cli.mnist.image_run import ImageRun, image_run
from cnf.cli.mnist.pixels import pixels_of
from cnf.flow.outlier import Roc, complexity, roc, typicality
from cnf.plot import roc_figure, save_figure

BLUR = 1 / 20  # deviation of the blur, as a share of the image's side


def outliers_of(images: Tensor, peak: int, seed: int = 0) -> dict[str, Tensor]:
    """Images that are none of the data, made of test images (n, 1, h, w)."""
    draw = torch.Generator().manual_seed(seed)
    sigma = BLUR * images.shape[-1]
    blurred = gaussian_filter(images.numpy().astype(float), sigma, axes=(2, 3)).round()
    return {
        "noise": torch.randint(peak + 1, images.shape, generator=draw, dtype=torch.uint8),
        "rotated": torch.rot90(images, 1, (2, 3)),
        "blurred": torch.from_numpy(blurred).to(torch.uint8),
        "inverted": peak - images,
    }


def scores_of(found: ImageRun, images: Tensor, reference: Tensor, probes: int) -> dict[str, Tensor]:
    """Scores of images, higher for stranger ones; reference: log-densities of training images."""
    with torch.no_grad():
        log_prob = found.flow.log_prob(images, probes=probes).double().cpu()
    return {
        "log p": -log_prob,
        "typicality": typicality(log_prob, reference),
        "complexity": -(log_prob + complexity(images)),
    }


def curves_of(
    found: ImageRun, test: Tensor, train: Tensor, probes: int
) -> dict[str, dict[str, Roc]]:
    """The ROC curve of every score for every kind of outliers."""
    with torch.no_grad():
        reference = found.flow.log_prob(train, probes=probes).double().cpu()
    data = scores_of(found, test, reference, probes)
    curves = {}
    for name, images in outliers_of(test, found.flow.levels - 1).items():
        strange = scores_of(found, images, reference, probes)
        curves[name] = {score: roc(data[score], strange[score]) for score in data}
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description="Tell digits from outliers by a flow's density.")
    parser.add_argument("--run", dest="run_folder", help="a run folder of `cnf mnist generate`")
    parser.add_argument("--images", type=int, default=500, help="test images, and outliers of each")
    parser.add_argument("--probes", type=int, default=4, help="of the trace")
    parser.add_argument("--data", help="the folder that holds the IDX files")
    parser.add_argument("--no-download", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="outliers.png", help="where to draw")
    arguments = parser.parse_args()
    arguments.pretrained, arguments.task = arguments.run_folder is None, "sample"

    found = image_run(arguments, torch.device(arguments.device))
    data = pixels_of(found.dataset, arguments, found.validation, found.seed)
    test = data.test.first(arguments.images).pixels
    train = data.train.first(arguments.images).pixels
    curves = curves_of(found, test, train, arguments.probes)

    scores = list(next(iter(curves.values())))
    print(f"{'area under the curve':<24}" + "".join(f"{score:<20}" for score in scores))
    for name, by_score in curves.items():
        areas = (f"{one.area:.3f} ± {one.error:.3f}" for one in by_score.values())
        print(f"{name:<24}" + "".join(f"{area:<20}" for area in areas))
    drawn = {
        name: {score: (one.false.numpy(), one.true.numpy(), one.area) for score, one in row.items()}
        for name, row in curves.items()
    }
    title = f"{data.name}: {len(test)} test images and as many outliers"
    print(f"drawn in {save_figure(roc_figure(drawn, title), Path(arguments.out))}")


if __name__ == "__main__":
    main()
