"""What a training run's losses do to each other: recorded, drawn, and put into words.

* :class:`Monitor` records beside an optimizer, one of ours or any of torch's.
* :class:`History` is what was recorded: plain numbers on the host, in a file of JSON lines if wanted.
* :func:`diagnose` makes advice of it, :func:`plot` a picture.
"""

from distill_optim.monitor.advice import diagnose
from distill_optim.monitor.history import History
from distill_optim.monitor.picture import plot
from distill_optim.monitor.recorder import Monitor

__all__ = ["History", "Monitor", "diagnose", "plot"]
