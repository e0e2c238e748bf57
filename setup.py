"""Builds gptdist, and its C++ library gptdist/_C.so where a compiler is.

A failed build never fails the install: its cause goes to stderr and to gptdist/_build_error.txt in one line, and the
package runs on its PyTorch reference ops. GPTDIST_REQUIRE_EXT=1 makes it fail. MAX_JOBS limits parallel compilation.

    pip install --no-build-isolation -e .
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from setuptools import find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)

REQUIRES = [
    "torch>=2.11",
    "numpy>=1.26",
    "tiktoken>=0.7",
    "tokenizers>=0.19",
    "safetensors>=0.4.3",
    "jsonargparse>=4.35",
    "pyyaml",
    "rich>=13",
    "tensorboard>=2.14",
    "matplotlib>=3.8",
    "ninja",
    "pybind11",
]
EXTRAS = {
    "deepspeed": ["deepspeed>=0.16"],
    "serve": ["fastapi", "uvicorn"],
    "data": ["pyarrow"],
    "convert": ["gguf>=0.17"],
    "test": ["pytest", "hypothesis", "transformers>=4.45", "peft>=0.13", "gguf>=0.17", "ruff"],
}

TARGET_VERSION = "0x020b000000000000"  # torch 2.11: the oldest whose stable ABI the library may use


def c_library() -> CppExtension:
    """The C++ library: plain shared object, free of Python, loaded by torch.ops.load_library."""
    return CppExtension(
        "gptdist._C",
        ["csrc/ops.cpp", "csrc/cpu/bias_gelu.cpp"],
        include_dirs=[str(ROOT / "csrc")],
        depends=["csrc/cpu/bias_gelu.h"],
        define_macros=[("TORCH_TARGET_VERSION", TARGET_VERSION)],
        # Without these two a compiler may not turn the kernels' selects into vector code.
        extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"],
        py_limited_api=True,  # links no libtorch_python
    )


@contextmanager
def captured_output(text: list[str]):
    """Collect what the compilers write to file descriptor 1 in `text`, and pass it on."""
    sys.stdout.flush()
    saved = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(saved, 1)
            os.close(saved)
            file.seek(0)
            output = file.read()
            os.write(1, output)
            text.append(output.decode(errors="replace"))


def compiler_problem() -> str:
    """Why the C++ compiler cannot be used, or the empty string."""
    command = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(command[0]) is None:
        return f"no C++ compiler: {command[0]} is not found (install g++ or clang++, or set CXX)"
    result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        return f"no C++ compiler: '{shlex.join(command)} --version' exits with {result.returncode} (see CXX)"
    return ""


def cause(error: BaseException, output: str) -> str:
    """One line: the first compiler or linker error, else the exception."""
    first = re.search(r"^.*(?:\berror\b|undefined reference|cannot find).*$", output, re.MULTILINE | re.IGNORECASE)
    line = first.group(0) if first else (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"the build failed: {line.strip()}"


class OptionalBuild(BuildExtension):
    """BuildExtension that may fail, and that keeps its objects between builds."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, no_python_abi_suffix=True, **kwargs)

    def initialize_options(self):
        super().initialize_options()
        self.editable_mode = False

    def finalize_options(self):
        super().finalize_options()
        # An editable install hands over a new temporary directory each time; ninja needs the old objects.
        self.build_temp = str(ROOT / "build" / f"temp-{sys.implementation.cache_tag}")

    def run(self):
        problem, output = compiler_problem(), []
        in_place = self.inplace or self.editable_mode  # read now: a failing super().run() leaves inplace changed
        package = ROOT / "gptdist" if in_place else Path(self.build_lib) / "gptdist"
        if not problem:
            try:
                with captured_output(output):
                    super().run()
            except (Exception, SystemExit) as error:
                problem = cause(error, "".join(output))
        self._report(problem, package)

    def _report(self, problem: str, package: Path):
        note = package / "_build_error.txt"
        note.unlink(missing_ok=True)
        if not problem:
            return
        if os.environ.get("GPTDIST_REQUIRE_EXT") == "1":
            raise SystemExit(f"gptdist: {problem} (GPTDIST_REQUIRE_EXT=1)")
        print(f"gptdist: {problem}; going on with the PyTorch reference ops", file=sys.stderr)
        package.mkdir(parents=True, exist_ok=True)
        note.write_text(problem + "\n")
        (package / "_C.so").unlink(missing_ok=True)  # a library of older sources would not match them
        self.extensions = self.distribution.ext_modules = []


def version() -> str:
    text = (ROOT / "gptdist" / "__init__.py").read_text()
    match = re.search(r'__version__ = "([^"]+)"', text)
    return match.group(1) if match else "0.0.0"


setup(
    name="gptdist",
    version=version(),
    description="Train, fine-tune and serve GPT models, from a laptop's CPU to a cluster",
    python_requires=">=3.11",
    packages=find_packages(include=["gptdist", "gptdist.*"]),
    package_data={"gptdist": ["_build_error.txt"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["gptdist = gptdist.cli:main"]},
    ext_modules=[c_library()],
    cmdclass={"build_ext": OptionalBuild},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
