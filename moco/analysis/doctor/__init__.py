"""The training doctor: alarms over the recorded metrics and the settings of a run, each with evidence and a remedy."""

from moco.analysis.doctor.alarms import ALARMS
from moco.analysis.doctor.doctor import Doctor, diagnose, facts_of
from moco.analysis.doctor.series import Alarm, Facts, Series

__all__ = ["ALARMS", "Alarm", "Doctor", "Facts", "Series", "diagnose", "facts_of"]
