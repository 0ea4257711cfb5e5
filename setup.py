"""Builds the native code of deltaops; everything else about the package is in pyproject.toml.

Environment: CXX (compiler), DELTAOPS_CUDA=auto|0|1, DELTAOPS_CUDA_ARCHS="80;90a;100",
NVCC or CUDA_HOME, DELTAOPS_JAX=auto|0|1, DELTAOPS_JOBS (compilers at once).
"""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # pip runs this file without its folder on the path

from buildtools import recipe  # noqa: E402
from buildtools.toolchain import (  # noqa: E402
    BuildFailure,
    CudaToolkit,
    find_compiler,
    find_cuda,
    find_jax,
)

CPU, CUDA, XLA = "deltaops._cpu", "deltaops._cuda", "deltaops._xla"
XLA_CUDA = "deltaops._xla_cuda"
# For C programs: csrc/include installs as deltaops/include, and so on.
C_FOLDERS = ("deltaops.include", "deltaops.cmake", "deltaops.pkgconfig")
LIBRARIES = {CPU: recipe.CPU_LIBRARY, CUDA: recipe.CUDA_LIBRARY}


class CleanBuild(build):
    """``build`` that starts with an empty build_lib, so that no deleted file gets into a wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildNative(build_ext):
    """Builds each extension as its recipe says, and the C library beside it."""

    def run(self) -> None:
        try:
            self.compiler_found = find_compiler()
            self.cuda, self.jax = find_cuda(), find_jax()
            for name, what, found in ((CUDA, "CUDA", self.cuda), (XLA, "JAX", self.jax)):
                if isinstance(found, str):
                    self.announce(f"deltaops: no {what} module: {found}", level=logging.WARNING)
                    without = (name, XLA_CUDA)  # which needs both
                    self.extensions = [ext for ext in self.extensions if ext.name not in without]
            super().run()
        except BuildFailure as failure:
            raise SystemExit(f"\n{failure}\n") from None

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        plan = recipe.Build(
            # not build_temp, which is new for each editable install
            objects=ROOT / "build" / "objects",
            package=module.parent,
            jobs=recipe.jobs(),
            say=lambda text: self.announce(text, level=logging.INFO),
        )
        if ext.name == CPU:
            recipe.build_cpu(plan, self.compiler_found, module)
        elif ext.name == XLA:
            assert isinstance(self.jax, Path)  # as below
            recipe.build_xla(plan, self.compiler_found, self.jax, module)
        elif ext.name == XLA_CUDA:
            assert isinstance(self.jax, Path)  # so too
            recipe.build_xla_cuda(plan, self.compiler_found, self.jax, module)
        else:
            assert isinstance(self.cuda, CudaToolkit)  # run() left the extension out otherwise
            recipe.build_cuda(plan, self.compiler_found, self.cuda, module)

    # The C libraries go where their modules go: into wheels, or beside the sources (editable).

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), *self._libraries(self.build_lib)]

    def get_output_mapping(self) -> dict[str, str]:
        mapping = dict(super().get_output_mapping())
        if self.inplace:
            mapping.update(zip(self._libraries(self.build_lib), self._libraries(ROOT), strict=True))
        return mapping

    def copy_extensions_to_source(self) -> None:
        built = [ext.name for ext in self.extensions]
        for name in (CPU, CUDA, XLA, XLA_CUDA):
            if name not in built:  # an earlier build's module must not outlive a build without it
                for stale in (ROOT / "deltaops").glob(f"{name.rpartition('.')[2]}.*.so"):
                    stale.unlink()
                if name in LIBRARIES:
                    (ROOT / "deltaops" / LIBRARIES[name]).unlink(missing_ok=True)
        super().copy_extensions_to_source()
        sources, targets = self._libraries(self.build_lib), self._libraries(ROOT)
        for source, target in zip(sources, targets, strict=True):
            fresh = Path(target + ".tmp")
            shutil.copy2(source, fresh)
            fresh.replace(target)  # a running process keeps the file it has mapped

    def _libraries(self, root: str | Path) -> list[str]:
        names = [LIBRARIES[ext.name] for ext in self.extensions if ext.name in LIBRARIES]
        return [str(Path(root, "deltaops", name)) for name in names]


def sources(device: str) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in recipe.binding_sources(device)]


setup(
    # kernels/ installs as deltaops.kernels: the name "kernels" belongs to Hugging Face's package.
    packages=[
        *find_packages(include=["deltaops", "deltaops.*"]),
        "deltaops.kernels",
        *C_FOLDERS,
    ],
    package_dir={
        "deltaops": "deltaops",
        "deltaops.kernels": "kernels",
        **{name: f"csrc/{name.rpartition('.')[2]}" for name in C_FOLDERS},
    },
    package_data={
        "deltaops": ["py.typed"],
        "deltaops.include": ["*.h"],
        "deltaops.cmake": ["*.cmake"],
        "deltaops.pkgconfig": ["*.pc"],
        "deltaops.backends.triton": ["timings/*"],
    },
    ext_modules=[
        Extension(CPU, sources("cpu"), language="c++"),
        Extension(CUDA, sources("cuda"), language="c++"),
        # after CPU and CUDA, on whose libraries they stand
        Extension(XLA, sources("xla"), language="c++"),
        Extension(XLA_CUDA, sources("cudaxla"), language="c++"),
    ],
    cmdclass={"build": CleanBuild, "build_ext": BuildNative},
    zip_safe=False,
)
