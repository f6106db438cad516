"""vtok-fast as a kernel repository: ops for video tokenizers, and layers for `kernelize`."""

import importlib.util
import sys

# A loader may import a folder under a name of its own, and one folder under two names, while torch knows an
# op's name once per process. So the code lives under its id, and any other name is a view of that.
ID = "@ID@"
if __name__ != ID and ID not in sys.modules:
    spec = importlib.util.spec_from_file_location(ID, __file__)
    sys.modules[ID] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[ID])
    except BaseException:
        del sys.modules[ID]
        raise
if __name__ == ID:
    from . import api as home
else:
    home = sys.modules[ID]
__all__ = home.__all__
globals().update({name: getattr(home, name) for name in __all__})
