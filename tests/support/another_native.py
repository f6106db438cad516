"""A pytest plugin: the tests run on another build of the native module, which VTOK_FAST_NATIVE_UNDER_TEST
names.

`make sanitize` runs the CPU kernels' own tests on a build with ASan and UBSan this way, beside the build that
is installed.
"""

import importlib.util
import os
import sys

if path := os.environ.get("VTOK_FAST_NATIVE_UNDER_TEST"):
    spec = importlib.util.spec_from_file_location("vtok_fast._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["vtok_fast._C"] = module


def pytest_report_header() -> str:
    return f"native module: {sys.modules['vtok_fast._C'].__file__ if path else 'the installed one'}"
