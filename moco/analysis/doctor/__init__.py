"""The training doctor: alarms over the recorded metrics and the settings of a run, each with evidence and a remedy."""

from moco.analysis.doctor.doctor import ALARMS, Doctor, Recorded, diagnose, facts_of, recorded
from moco.analysis.doctor.series import Alarm, Facts, Series

__all__ = ["ALARMS", "Alarm", "Doctor", "Facts", "Recorded", "Series", "diagnose", "facts_of", "recorded"]
