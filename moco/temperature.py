"""Study the effect of the temperature: `python -m moco.temperature`, or `mode=explain` without training."""

from moco.cli import Command
from moco.config.temperature import TemperatureConfig, check_temperature

temperature = Command("temperature", TemperatureConfig, check_temperature, "moco.analysis.studies.temperature:study")

if __name__ == "__main__":
    temperature.main()
