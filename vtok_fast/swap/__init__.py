"""``accelerate(model)``: the ops swapped into an existing model, checked, reported, and given back.

``accelerate.py`` walks the model and checks; ``patch.py`` is how one swap is put in and taken out;
``report.py`` says what was done; ``streams.py`` carries a video through a model chunk by chunk;
``pad_conv.py`` is the general rule, and every other file with a ``propose`` the adapter of one library.
"""

from vtok_fast.swap.accelerate import accelerate, accelerated
from vtok_fast.swap.report import Report
from vtok_fast.swap.streams import stream

__all__ = ["Report", "accelerate", "accelerated", "stream"]
