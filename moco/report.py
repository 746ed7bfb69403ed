"""Write an HTML page about one or several runs: `python -m moco.report run=DIR`."""

from moco.cli import Command
from moco.config.report import ReportConfig, check_report

report = Command("report", ReportConfig, check_report, "moco.reporting.report:report")

if __name__ == "__main__":
    report.main()
