"""Training: the `Trainer`, its checkpoints, and the folder that a run from the command line fills.

trainer.py     what a step is
random.py      the random numbers of a run, apart from the user's own
checkpoint.py  files that are whole or absent, and read without unpickling code
style.py       the style of all figures
pictures.py    sample grids and curves as PNG bytes
showing.py     what a generator makes, as such a picture
report.py      the page of a run
run.py         the folder of results; the only one that knows about progress bars and signals
"""

from lipgan.training.checkpoint import CheckpointError
from lipgan.training.sampling import load_generator
from lipgan.training.trainer import Trainer, TrainingDiverged

__all__ = ["CheckpointError", "Trainer", "TrainingDiverged", "load_generator"]
