"""Builds vtok_fast with CMake. Everything static is in pyproject.toml; here is what must be computed.

VTOK_FAST_CUDA_ARCHS, else TORCH_CUDA_ARCH_LIST, else the GPUs of this machine choose what to build for
(csrc/cuda/archs.cmake), and name the wheel: 0.1.0+cu130.sm80.sm90a. MAX_JOBS bounds how many compilers run at
once; ccache is used where it is installed. CMAKE_ARGS is handed on to CMake. Where _PYTHON_HOST_PLATFORM
names another machine (scripts/aarch64.py), the module is built for that one, and not loaded here.
"""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
FETCHED = "An ordinary `pip install .` fetches it by itself; with --no-build-isolation it must be there:"
WISH = f"-DVTOK_FAST_CUDA_ARCHS={os.environ.get('VTOK_FAST_CUDA_ARCHS', '')}"


# What Python would do with the module, apart from its own package: that imports torch.
LOADS = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("vtok_fast._C", sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


def tool(name: str) -> str | None:
    """A program on PATH, or beside this Python, where pip puts it in an environment that is not activated."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def cmake() -> str:
    found = tool("cmake")
    if found is None:
        sys.exit(f"vtok-fast: the build needs cmake, which is not on PATH. {FETCHED} pip install cmake")
    return found


def generator() -> list[str]:
    """Ninja, else make, of which one must be there."""
    if found := tool("ninja"):
        return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={found}"]
    if shutil.which("make") is None:
        sys.exit(
            f"vtok-fast: the build needs ninja or make, and neither is on PATH. {FETCHED} pip install ninja"
        )
    return []


def pybind11() -> ModuleType:
    try:
        import pybind11
    except ImportError:
        sys.exit(f"vtok-fast: the build needs pybind11. {FETCHED} pip install pybind11")
    return pybind11


def other_machine() -> str:
    """``linux-aarch64``, where the module is built for another machine than this; else empty."""
    return os.environ.get("_PYTHON_HOST_PLATFORM", "")


def check_loads(module: Path) -> None:
    """A shared library may be linked with names that nothing defines, such as a kernel that nvcc left out
    with a mere warning: what Python would say at import is an error of the build."""
    done = subprocess.run([sys.executable, "-c", LOADS, str(module)], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or f"Python ended with status {done.returncode}").splitlines()[-1]
        missing = " (something is declared that no source file defines)" if "undefined symbol" in said else ""
        sys.exit(f"vtok-fast: {module.name} was built and cannot be loaded: {said}{missing}")


@functools.cache
def local_tag() -> str:
    """``cu130.sm80.sm90a``: the CUDA toolkit and the GPUs of the list; empty for a CPU-only build."""
    result = subprocess.run(
        [cmake(), WISH, "-P", str(ROOT / "csrc" / "cuda" / "archs.cmake")], capture_output=True, text=True
    )
    found = re.search(r"cuda=(\d*) archs=([\w;]*)", result.stdout)
    if found is None:
        sys.exit(result.stderr or result.stdout)
    cuda, archs = found.groups()
    return ".".join([f"cu{cuda}", *(f"sm{arch}" for arch in archs.split(";"))]) if archs else ""


def version() -> str:
    """That of the package, with what it is built for; a source distribution is built for nothing yet."""
    plain = re.search(r'__version__ = "(.+)"', (ROOT / "vtok_fast" / "__init__.py").read_text())[1]
    return plain if "sdist" in sys.argv or not local_tag() else f"{plain}+{local_tag()}"


def long_description(readme: str, project: str) -> str:
    """The README for those who have no clone: relative links lead to the address that pyproject.toml names as
    Source under project.urls, at this version's tag; where it names none, their words stay, and where the
    files are is said once. Code is left as it is."""
    found = re.search(r'^Source = "(.+?)/?"$', project, re.MULTILINE)
    tag = re.search(r'__version__ = "(.+)"', (ROOT / "vtok_fast" / "__init__.py").read_text())[1]

    def link(match: re.Match[str]) -> str:
        picture, words, path = match.groups()
        if found is None:
            return "" if picture else words
        return f"{picture}[{words}]({found[1]}/{'raw' if picture else 'blob'}/v{tag}/{path})"

    parts = re.split(r"(^```.*?^```)", readme, flags=re.DOTALL | re.MULTILINE)
    relative = r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)\s]+)\)"
    parts[::2] = [re.sub(relative, link, part) for part in parts[::2]]
    where = "" if found else "\nThe files that are named here are in the source distribution.\n"
    return "".join(parts) + where


class CMakeBuild(build_ext):
    """Runs CMake, which knows the sources and their instruction sets, and puts the module where setuptools
    wants it."""

    def build_extension(self, extension: Extension) -> None:
        start = time.perf_counter()
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        # Kept between builds, outside setuptools' temporary folder, so that a rebuild compiles only what
        # changed.
        build = (
            ROOT
            / "build"
            / "-".join(
                filter(None, ["cmake", sys.implementation.cache_tag, local_tag() or "cpu", other_machine()])
            )
        )
        build.mkdir(parents=True, exist_ok=True)
        ccache = [
            f"-DCMAKE_{language}_COMPILER_LAUNCHER=ccache"
            for language in ("CXX", "CUDA")
            if shutil.which("ccache")
        ]
        configure = [
            cmake(),
            "-S",
            str(ROOT),
            "-B",
            str(build),
            *generator(),
            *ccache,
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11().get_cmake_dir()}",
            "-DCMAKE_BUILD_TYPE=Release",
            WISH,
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        cache = build / "CMakeCache.txt"
        failed = subprocess.run(configure).returncode
        if failed and cache.exists():
            cache.unlink()  # configured earlier by an isolated build environment that is gone by now
            shutil.rmtree(build / "CMakeFiles", ignore_errors=True)
            failed = subprocess.run(configure).returncode
        if failed:
            sys.exit(
                "vtok-fast: cmake could not configure the build (needs g++ and Python.h): its reason is above"
            )
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        if subprocess.run([cmake(), "--build", str(build), "--parallel", jobs]).returncode:
            sys.exit("vtok-fast: the native module could not be built: what the compiler said is above")
        built = build / target.name  # the folder may hold that of a Python with another suffix
        if not other_machine():
            check_loads(built)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as temporary:
            temporary.write(built.read_bytes())
        os.chmod(temporary.name, 0o755)
        os.replace(temporary.name, target)
        print(
            f"vtok-fast: {target.name} for {local_tag() or 'CPUs'}: {target.stat().st_size / 1e6:.1f} MB in "
            f"{time.perf_counter() - start:.0f} s\nvtok-fast: with pybind11 {pybind11().__version__}",
            flush=True,
        )


setup(
    version=version(),
    long_description=long_description(
        *((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "pyproject.toml"))
    ),
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["vtok_fast", "vtok_fast.*"]), "vtok_fast.kernels"],
    package_dir={"vtok_fast.kernels": "kernels"},
    ext_modules=[Extension("vtok_fast._C", [])],
    cmdclass={"build_ext": CMakeBuild},
)
