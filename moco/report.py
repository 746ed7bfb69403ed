"""A page about a run, or about several side by side: `python -m moco.report run=DIR`."""

from moco.cli import run_command
from moco.config.report import ReportConfig, check_report


def report(config: ReportConfig) -> None:
    """Writes one HTML file, and the embedding for TensorBoard's projector.

    Raises:
        ConfigError: for a configuration that cannot run, or a directory that holds no run.
        FileNotFoundError: for data that is not there.
    """
    check_report(config)
    # --help and a configuration that cannot run need no torch: it is imported once there is work to do.
    from moco.reporting.report import report as run

    run(config)


if __name__ == "__main__":
    run_command("report", ReportConfig, report)
