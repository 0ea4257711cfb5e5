"""What an install leaves behind: a wheel made from the sdist, seen from an empty directory."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

OBJECTS = Path("build", "objects")
JAX = importlib.util.find_spec("jaxlib") is not None

pytestmark = pytest.mark.slow


def run(*command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A command's result; ``env`` is added to ours."""
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )


ISOLATED = """
import importlib.util, sys, tempfile
from pathlib import Path
wanted = {"setuptools", "_distutils_hack", "pkg_resources", "wheel", "packaging", "pybind11"}
overlay = tempfile.TemporaryDirectory()
sites = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
for path in sites:
    for found in Path(path).iterdir():
        link = Path(overlay.name, found.name)
        if found.stem.split("-")[0] in wanted and not link.exists():
            link.symlink_to(found)
sys.path[:] = [overlay.name, *(path for path in sys.path if path not in sites)]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
assert importlib.util.find_spec("jaxlib") is None
assert importlib.util.find_spec("torch") is None
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""
"""What pip's isolation leaves: of what is installed, the build's requirements alone."""


def backend(hook: str, source: Path, out: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Call a hook of the build backend that pyproject.toml names, isolated."""
    call = (sys.executable, "-c", ISOLATED, hook, str(out))
    return run(*call, cwd=source, **{"DELTAOPS_CUDA": "0", **env})


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist of the files that git knows: nothing built before gets into it."""
    folder = tmp_path_factory.mktemp("sdist")
    checkout = folder / "checkout"
    names = run("git", "ls-files", "-z", cwd=ROOT)
    if names.returncode != 0:
        pytest.skip(f"git does not list the sources here: {names.stderr.strip()}")
    for name in filter(None, names.stdout.split("\0")):
        if (ROOT / name).exists():  # a deletion that is not committed yet
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            (checkout / name).write_bytes((ROOT / name).read_bytes())
    made = backend("build_sdist", checkout, folder)
    assert made.returncode == 0, made.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    # A minute of compiling less where the checkout is built. Objects are named by the hash of all
    # that goes into them: a source or header that the sdist lacks still fails to compile.
    if (ROOT / OBJECTS).is_dir():
        shutil.copytree(ROOT / OBJECTS, unpacked / OBJECTS)
    return unpacked


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    made = backend("build_wheel", sdist, out, DELTAOPS_JAX="1" if JAX else "0")
    assert made.returncode == 0, made.stdout + made.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel is installed into, alone."""
    folder = tmp_path_factory.mktemp("site")
    done = run(
        *(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index"),
        *("--target", str(folder), str(wheel)),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_wheel_holds_what_users_need_and_no_more(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"deltaops"}
    for wanted in ("py.typed", "libdeltaops.so", "kernels/__init__.py", "include/deltaops.h"):
        assert f"deltaops/{wanted}" in names
    for wanted in ("cmake/deltaopsConfig.cmake", "pkgconfig/deltaops.pc"):
        assert f"deltaops/{wanted}" in names
    assert [name for name in names if re.fullmatch(r"deltaops/_cpu\..*\.so", name)]
    assert not [name for name in names if "_cuda." in name and name.endswith(".so")]
    assert bool([name for name in names if re.fullmatch(r"deltaops/_xla\..*\.so", name)]) == JAX


def test_installed_package_runs_its_own_native_core(site: Path, tmp_path: Path) -> None:
    code = (
        # ahead of the checkout's own (editable) install, whose finder stands on sys.meta_path
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "import importlib.util, deltaops, torch\n"
        "print(deltaops.__file__)\n"
        "print(importlib.util.find_spec('deltaops.kernels').origin)\n"
        "from deltaops.ops import Branch, delta_linear\n"
        "x, w = torch.randn(3, 5), torch.randn(4, 5)\n"
        "b = (Branch(torch.randn(2, 5), torch.zeros(4, 2)),)\n"
        "y = delta_linear(x, w, None, b, backend='cpu')\n"
        "torch.testing.assert_close(y, x @ w.T)\n"
    )
    if JAX:
        code += (
            "import numpy as np, deltaops.jax as dj\n"
            "np.testing.assert_allclose(dj.gated(x.numpy(), x.numpy(), activation='identity'),\n"
            "                           x.numpy() ** 2, rtol=1e-6)\n"
        )
    done = run(sys.executable, "-P", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(site / "deltaops" / "__init__.py"),
        str(site / "deltaops" / "kernels" / "__init__.py"),
    ]


def test_kernels_does_not_install_under_hugging_faces_name(site: Path) -> None:
    assert not (site / "kernels").exists()
    assert not (site / "tests").exists()


def test_objects_are_named_by_all_that_goes_into_them(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from buildtools.objects import Unit\n"
        "def key(folder, header='int a;', flag='-O1', version='g++ 1'):\n"
        "    folder.mkdir(exist_ok=True)\n"
        "    (folder / 'x.cpp').write_text('#include \"x.h\"')\n"
        "    (folder / 'x.h').write_text(header)\n"
        "    command = 'g++', flag, f'-I{folder}'\n"
        "    return Unit(folder / 'x.cpp', command, (folder,), version).key()\n"
        "one, two = Path(sys.argv[1], 'one'), Path(sys.argv[1], 'two')\n"
        "print(key(one), key(two), key(one, header='int b;'), key(one, flag='-O2'),\n"
        "      key(one, version='g++ 2'))\n"
    )
    done = run(sys.executable, "-c", code, str(tmp_path), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    one, two, *others = done.stdout.split()
    assert one == two
    assert len({one, *others}) == 4


def test_no_compiler_says_what_to_install(sdist: Path, tmp_path: Path) -> None:
    failed = backend("build_wheel", sdist, tmp_path, CXX="no-such-compiler")
    assert failed.returncode != 0
    assert "needs a C++17 compiler" in failed.stderr
    assert "apt install g++" in failed.stderr


def test_cuda_asked_for_without_nvcc_stops(sdist: Path, tmp_path: Path) -> None:
    code = (
        "from buildtools import toolchain\n"
        "toolchain._find_nvcc = lambda: None\n"
        "try:\n    toolchain.find_cuda()\n"
        "except toolchain.BuildFailure as failure:\n    print(failure)\n"
    )
    said = run(sys.executable, "-c", code, cwd=sdist, DELTAOPS_CUDA="1").stdout
    assert "DELTAOPS_CUDA=1 asks for the CUDA module, and nvcc was not found" in said
    assert "DELTAOPS_CUDA=0" in said


def test_jax_asked_for_without_jaxlib_stops(tmp_path: Path) -> None:
    code = (
        "from buildtools import toolchain\n"
        "toolchain.sysconfig.get_path = lambda kind: '/nowhere'\n"
        "toolchain.importlib.util.find_spec = lambda name: None\n"
        "try:\n    print(toolchain.find_jax())\n"
        "except toolchain.BuildFailure as failure:\n    print(failure)\n"
    )
    for wish, said in (
        ("1", "DELTAOPS_JAX=1 asks for the JAX module, and jaxlib was not found"),
        ("auto", "jaxlib was not found (looked in /nowhere)"),
        ("0", "DELTAOPS_JAX=0"),
        ("yes", "DELTAOPS_JAX must be auto, 0 or 1, got 'yes'."),
    ):
        done = run(sys.executable, "-c", code, cwd=ROOT, DELTAOPS_JAX=wish)
        assert done.stdout.startswith(said), done.stdout + done.stderr


def test_jobs_that_are_no_number_stop_the_build() -> None:
    code = (
        "from buildtools import recipe, toolchain\n"
        "try:\n    print(recipe.jobs())\n"
        "except toolchain.BuildFailure as failure:\n    print(failure)\n"
    )
    for wish, said in (
        ("3", "3\n"),
        ("0", "DELTAOPS_JOBS must be a whole number from 1 on, got '0'."),
        ("many", "DELTAOPS_JOBS must be a whole number from 1 on, got 'many'."),
    ):
        done = run(sys.executable, "-c", code, cwd=ROOT, DELTAOPS_JOBS=wish)
        assert done.stdout.startswith(said), done.stdout + done.stderr
