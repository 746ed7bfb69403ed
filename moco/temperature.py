"""What the temperature does: `python -m moco.temperature`, or `mode=explain` for three logits and no training."""

from moco.cli import run_command
from moco.config.temperature import TemperatureConfig, check_temperature


def temperature(config: TemperatureConfig) -> None:
    """Trains at each temperature, measures, and draws the figures; or explains without training.

    Raises:
        ConfigError: for a configuration that cannot run, or an output that holds another study.
        ValueError: if runs failed; the others are measured and drawn all the same.
    """
    check_temperature(config)
    # --help and a configuration that cannot run need no torch: it is imported once there is work to do.
    from moco.analysis.studies.temperature import explain, sweep

    (explain if config.mode == "explain" else sweep)(config)


if __name__ == "__main__":
    run_command("temperature", TemperatureConfig, temperature)
