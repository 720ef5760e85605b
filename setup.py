"""Let CMake build the compiled part; everything else about the package is in pyproject.toml.

``EFFKERNELS_CUDA`` and ``EFFKERNELS_CUDA_ARCHS`` in the environment become the CMake options of the same names.
The CMake tree is kept in ``build/cmake``, so a repeated build compiles only what changed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CMAKE_TREE = ROOT / "build" / "cmake"
LIBRARY_FILES = ("libeffkernels.so", "build_info.json")
OPTIONS = ("EFFKERNELS_CUDA", "EFFKERNELS_CUDA_ARCHS")


def tool(name: str) -> str:
    """Path of a build tool: the one beside this Python, which the dev extra pins, before any other on PATH."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        raise SystemExit(f"effkernels: {name} is needed to build and was not found; run: pip install {name}")
    return found


class CMakeBuild(build_ext):
    """Configures, builds and installs the one shared library into ``effkernels/lib``."""

    def run(self) -> None:
        sys.path.insert(0, str(ROOT / "csrc"))
        import build_cache

        name = build_cache.key(build_cache.sources(), self.facts())
        if build_cache.restore("library", name, LIBRARY_FILES, self.library_folder()):
            return
        configure = [
            tool("cmake"),
            *("-S", str(ROOT), "-B", str(CMAKE_TREE), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            # An option that is not set goes back to its default instead of the value of the last build.
            *(f"-D{name}={os.environ[name]}" if os.environ.get(name) else f"-U{name}" for name in OPTIONS),
        ]
        self.execute_step(configure)
        self.execute_step([tool("cmake"), "--build", str(CMAKE_TREE)])
        install = ["--install", str(CMAKE_TREE), "--component", "package", "--prefix", str(self.library_folder())]
        self.execute_step([tool("cmake"), *install])
        build_cache.keep("library", name, LIBRARY_FILES, self.library_folder())

    def facts(self) -> dict[str, str]:
        """Return what the library is made of beside its sources."""
        options = {name: os.environ.get(name, "") for name in OPTIONS}
        torch = next(
            iter(importlib.metadata.distributions(name="torch")), None
        )  # without one, CMake says what is missing
        return {**options, "torch": "" if torch is None else torch.version, "machine": platform.machine()}

    def execute_step(self, command: list[str]) -> None:
        self.announce(" ".join(command), level=2)
        sys.stdout.flush()
        if subprocess.call(command) != 0:
            raise SystemExit(f"effkernels: this step of the build failed, see the lines above: {' '.join(command)}")

    def library_folder(self) -> Path:
        """Return the source tree for an editable or in-place build, else the tree that the wheel is packed from."""
        in_place = self.inplace or getattr(self, "editable_mode", False)
        return (ROOT if in_place else Path(self.build_lib).resolve()) / "effkernels" / "lib"

    def get_outputs(self) -> list[str]:
        return [str(self.library_folder() / name) for name in LIBRARY_FILES]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """A wheel for every Python 3 of one platform: the library links neither Python nor one torch version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]

    def run(self) -> None:
        # setuptools never removes from build/lib what has left the source tree, and would pack it; and it stumbles over
        # what a build that was broken off has left in its other folder.
        for folder in (self.get_finalized_command("build").build_lib, self.bdist_dir):
            shutil.rmtree(folder, ignore_errors=True)
        super().run()


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    # The one entry makes setuptools call build_ext; CMakeLists.txt holds the real sources.
    ext_modules=[Extension("effkernels.lib.libeffkernels", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
    distclass=BinaryDistribution,
)
