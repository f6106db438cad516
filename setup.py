"""Builds vtok_fast with CMake. Everything static is in pyproject.toml; here is what must be computed."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """Runs CMake, which knows the sources and their instruction sets, and puts the module where setuptools wants it."""

    def build_extension(self, extension: Extension) -> None:
        import pybind11

        root = Path(__file__).resolve().parent
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        # Kept between builds, outside setuptools' temporary folder, so that a rebuild compiles only what changed.
        build = root / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        configure = ["cmake", "-S", str(root), "-B", str(build), *generator, f"-DPython_EXECUTABLE={sys.executable}",
                     f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DCMAKE_BUILD_TYPE=Release",
                     f"-DVTOK_FAST_CUDA_ARCHS={os.environ.get('VTOK_FAST_CUDA_ARCHS', '')}"]  # see csrc/cuda/archs.cmake
        cache = build / "CMakeCache.txt"
        try:
            subprocess.run(configure, check=True)
        except subprocess.CalledProcessError:
            if not cache.exists():
                raise
            cache.unlink()  # configured earlier by an isolated build environment that is gone by now
            shutil.rmtree(build / "CMakeFiles", ignore_errors=True)
            subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)
        built = next(build.glob("_C*.so"))
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as temporary:
            temporary.write(built.read_bytes())
        os.chmod(temporary.name, 0o755)
        os.replace(temporary.name, target)


setup(
    packages=["vtok_fast", "vtok_fast.reference", "vtok_fast.ops", "vtok_fast.nn", "vtok_fast.models", "vtok_fast.swap",
              "vtok_fast.bench", "vtok_fast.kernels"],
    package_dir={"vtok_fast.kernels": "kernels"},
    ext_modules=[Extension("vtok_fast._C", [])],
    cmdclass={"build_ext": CMakeBuild},
)
