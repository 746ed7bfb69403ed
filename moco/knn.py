"""Evaluate an encoder with a kNN classifier: `python -m moco.knn run=DIR [field=value ...]`, or under torchrun."""

from moco.cli import Command
from moco.config.knn import KnnConfig, check_knn

knn = Command("knn", KnnConfig, check_knn, "moco.evaluation.knn:evaluate_knn")

if __name__ == "__main__":
    knn.main()
