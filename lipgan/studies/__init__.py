"""Studies: claims of the lectures on GANs, seen to happen (or not) on this machine.

study.py      what a study is: claims, units of work, analysis, figure
registry.py   the studies by name; each is a module of that name
runner.py     units of work: resumed, on one process, several, or several machines
rows.py       units and results: made, chosen, laid side by side
critics.py    how the studies train critics alone
trainers.py   how they train generators, and judge samples
networks.py   networks of chosen depth, width, nonlinearity and norm
figures.py    what figures have in common
page.py       the page of a study
report.py     the folder of a study
"""

from lipgan.studies.registry import get, names
from lipgan.studies.report import contribute, run_study
from lipgan.studies.study import Analysis, Claim, Finding, Finished, Study, Table

__all__ = ["Analysis", "Claim", "Finding", "Finished", "Study", "Table", "contribute", "get", "names", "run_study"]
