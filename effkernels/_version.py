"""The one place of the version: pyproject.toml, CMakeLists.txt and ``effkernels.__version__`` read it from here."""

__version__ = "0.1.0"
