"""C and C++ programs find the library by pkg-config and by CMake, wherever the package lies."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import deltaops

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "csrc" / "examples"


def run(*command: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def needs(*programs: str) -> None:
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not on the PATH: {', '.join(missing)}")


@pytest.fixture
def here() -> dict[str, Path]:
    """The folders of this checkout or install."""
    return {
        "include": Path(deltaops.get_include()),
        "cmake": Path(deltaops.get_cmake_dir()),
        "pkgconfig": Path(deltaops.get_pkgconfig_dir()),
    }


@pytest.fixture
def moved(here: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """The same as a wheel has them, in a folder that no build knew."""
    package = tmp_path / "somewhere else" / "deltaops"
    for name, folder in here.items():
        shutil.copytree(folder, package / name)
    shutil.copy2(deltaops.get_library(), package)
    return {name: package / name for name in here}


@pytest.mark.parametrize("layout", ["here", "moved"])
def test_c_example_by_pkg_config(
    layout: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    needs("cc", "pkg-config")
    places = request.getfixturevalue(layout)
    env = {"PKG_CONFIG_PATH": str(places["pkgconfig"])}
    build = 'eval cc -std=c99 -Wall -Wextra -Wpedantic -Werror "$0" ' \
        "$(pkg-config --cflags --libs deltaops) -lm -o lora"  # fmt: skip
    run("sh", "-c", build, str(EXAMPLES / "lora.c"), cwd=tmp_path, **env)
    said = run("./lora", cwd=tmp_path)
    assert re.findall(r"^\w+", said, re.MULTILINE) == [
        "C", "y", "grad_x", "grad_bias", "grad_a", "grad_b",
    ]  # fmt: skip


def test_examples_by_cmake(moved: dict[str, Path], tmp_path: Path) -> None:
    needs("cmake", "cc", "c++")
    run(
        *("cmake", "-S", str(EXAMPLES), "-B", "build", "-DCMAKE_BUILD_TYPE=Release"),
        f"-DCMAKE_PREFIX_PATH={moved['cmake']}",
        cwd=tmp_path,
    )
    run("cmake", "--build", "build", cwd=tmp_path)
    assert "grad_b" in run("build/lora_c", cwd=tmp_path)
    first, last = map(float, re.findall(r"\d\.\d+e[+-]\d+", run("build/lora_cpp", cwd=tmp_path)))
    assert last < first / 10


def test_c_example_fails_when_a_result_is_off(tmp_path: Path) -> None:
    needs("cc", "pkg-config")
    source = (EXAMPLES / "lora.c").read_text(encoding="utf-8")
    wrong = source.replace("branch.scaling = scaling;", "branch.scaling = 1.001f * scaling;")
    assert wrong != source
    (tmp_path / "lora.c").write_text(wrong, encoding="utf-8")
    env = {"PKG_CONFIG_PATH": deltaops.get_pkgconfig_dir()}
    run("sh", "-c", "cc lora.c $(pkg-config --cflags --libs deltaops) -lm -o lora",
        cwd=tmp_path, **env)  # fmt: skip
    assert subprocess.run(["./lora"], cwd=tmp_path, capture_output=True).returncode == 1


def test_every_file_names_the_version_of_the_package() -> None:
    pc = Path(deltaops.get_pkgconfig_dir(), "deltaops.pc").read_text(encoding="utf-8")
    version = Path(deltaops.get_cmake_dir(), "deltaopsConfigVersion.cmake").read_text("utf-8")
    assert f"Version: {deltaops.__version__}\n" in pc
    assert f'set(PACKAGE_VERSION "{deltaops.__version__}")' in version
