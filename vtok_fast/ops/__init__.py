"""The ops: argument checks, choice of backend, torch.library registration, gradients. A folder per op.

Importing this needs no torch; importing an op's folder registers the op and its backends.
"""

from pathlib import Path

FOLDERS = tuple(sorted(file.parent.name for file in Path(__file__).parent.glob("*/__init__.py")))
