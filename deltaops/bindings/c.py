"""Where a C or C++ program finds deltaops: the header, the library, pkg-config's and CMake's files.

    PKG_CONFIG_PATH=$(python -c "import deltaops; print(deltaops.get_pkgconfig_dir())") \\
        cc lora.c $(pkg-config --cflags --libs deltaops)

All of them may be copied or moved together with the package: none holds an absolute path. Examples
are in csrc/examples of the sources.
"""

from __future__ import annotations

from pathlib import Path

from deltaops.errors import BuildError

_PACKAGE = Path(__file__).resolve().parents[1]


def get_include() -> str:
    """The folder of ``deltaops.h``, which documents the C ABI."""
    return _folder("include", "deltaops.h")


def get_library() -> str:
    """The path of ``libdeltaops.so``: the CPU core, without a symbol of Python's or torch's.

    Raises: BuildError where it was not built.
    """
    library = _PACKAGE / "libdeltaops.so"
    if not library.exists():
        raise BuildError(
            f"deltaops: {library} must be there, and is not. Build it: `python setup.py build_ext "
            "--inplace` in a checkout, elsewhere reinstall deltaops with a C++ compiler at hand."
        )
    return str(library)


def get_cmake_dir() -> str:
    """For CMAKE_PREFIX_PATH or ``deltaops_DIR``; the target is ``deltaops::deltaops``."""
    return _folder("cmake", "deltaopsConfig.cmake")


def get_pkgconfig_dir() -> str:
    """For PKG_CONFIG_PATH; the module is ``deltaops``."""
    return _folder("pkgconfig", "deltaops.pc")


def _folder(name: str, file: str) -> str:
    """As installed, or as it lies in a checkout."""
    candidates = (_PACKAGE / name, _PACKAGE.parent / "csrc" / name)
    for folder in candidates:
        if (folder / file).exists():
            return str(folder)
    raise BuildError(
        f"deltaops: {file} must be in {candidates[0]} or in {candidates[1]}, and is in neither. "
        "Reinstall deltaops."
    )
