"""Judge an encoder by its nearest neighbours: `python -m moco.knn run=DIR [field=value ...]`, or under torchrun."""

from moco.cli import run_command
from moco.config.knn import KnnConfig, check_knn


def knn(config: KnnConfig) -> None:
    """Weighted kNN on frozen features; k and temperature are chosen on the training split.

    Raises:
        ConfigError: for a configuration that cannot run.
        FileNotFoundError: for an encoder or a data set that is not there.
    """
    check_knn(config)
    # --help and a configuration that cannot run need no torch: it is imported once there is work to do.
    from moco.evaluation.knn import evaluate_knn

    evaluate_knn(config)


if __name__ == "__main__":
    run_command("knn", KnnConfig, knn)
