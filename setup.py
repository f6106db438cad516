"""Builds vtok_fast with CMake. Everything static is in pyproject.toml; here is what must be computed.

VTOK_FAST_CUDA_ARCHS, else TORCH_CUDA_ARCH_LIST, else the GPUs of this machine choose what to build for
(csrc/cuda/archs.cmake), and name the wheel: 0.1.0+cu130.sm80.sm90a. MAX_JOBS bounds how many compilers run at
once; ccache is used where
    it is installed.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
WISH = f"-DVTOK_FAST_CUDA_ARCHS={os.environ.get('VTOK_FAST_CUDA_ARCHS', '')}"


@functools.cache
def local_tag() -> str:
    """``cu130.sm80.sm90a``: the CUDA toolkit and the GPUs of the list; empty for a CPU-only build."""
    result = subprocess.run(
        ["cmake", WISH, "-P", str(ROOT / "csrc" / "cuda" / "archs.cmake")], capture_output=True, text=True
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


class CMakeBuild(build_ext):
    """Runs CMake, which knows the sources and their instruction sets, and puts the module where setuptools
    wants it."""

    def build_extension(self, extension: Extension) -> None:
        import pybind11

        start = time.perf_counter()
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        # Kept between builds, outside setuptools' temporary folder, so that a rebuild compiles only what
        # changed.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{local_tag() or 'cpu'}"
        build.mkdir(parents=True, exist_ok=True)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        ccache = [
            f"-DCMAKE_{language}_COMPILER_LAUNCHER=ccache"
            for language in ("CXX", "CUDA")
            if shutil.which("ccache")
        ]
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            *generator,
            *ccache,
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DCMAKE_BUILD_TYPE=Release",
            WISH,
        ]
        cache = build / "CMakeCache.txt"
        try:
            subprocess.run(configure, check=True)
        except subprocess.CalledProcessError:
            if not cache.exists():
                raise
            cache.unlink()  # configured earlier by an isolated build environment that is gone by now
            shutil.rmtree(build / "CMakeFiles", ignore_errors=True)
            subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
        built = next(build.glob("_C*.so"))
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as temporary:
            temporary.write(built.read_bytes())
        os.chmod(temporary.name, 0o755)
        os.replace(temporary.name, target)
        print(
            f"vtok-fast: {target.name} for {local_tag() or 'CPUs'}: {target.stat().st_size / 1e6:.1f} MB in "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )


setup(
    version=version(),
    packages=[*find_packages(include=["vtok_fast", "vtok_fast.*"]), "vtok_fast.kernels"],
    package_dir={"vtok_fast.kernels": "kernels"},
    ext_modules=[Extension("vtok_fast._C", [])],
    cmdclass={"build_ext": CMakeBuild},
)
