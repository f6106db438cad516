"""``accelerate(model)``: the ops swapped into an existing model, checked, reported, and given back.

``accelerate.py`` walks the model and checks; ``patch.py`` is how one swap is put in and taken out; ``report.py`` says what was
done; every other file is the adapter of one library.
"""

from vtok_fast.swap.accelerate import accelerate, accelerated
from vtok_fast.swap.report import Report

__all__ = ["Report", "accelerate", "accelerated"]
