# A variant's name says nothing of Python, so kernels loads one without a module for this Python as well.
import pathlib
import sys
import warnings

from .dispatch import native

if native.lib() is None:
    found = sorted(path.name for path in pathlib.Path(__file__).parent.glob("_C*.so"))
    warnings.warn(
        f"vtok-fast: none of this build's native modules loads in {sys.implementation.cache_tag}: "
        f"{', '.join(found) or 'it has none'}; the ops run on Triton and PyTorch",
        RuntimeWarning,
        stacklevel=2,
    )
