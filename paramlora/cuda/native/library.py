"""The compiled `steps.cpp` and `launch.h`: where they lie, how they are built, and loading them.

No step waits for a compiler: `build` is called by whoever wants it, once for each torch and Python.
"""

import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch

from paramlora.cuda.native import driver
from paramlora.cuda.operands import OFF
from paramlora.errors import ParamloraError, warn

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("steps.cpp", "launch.h"))
_NAME = "paramlora_steps"


def place() -> Path:
    """Where the library of this source, torch and Python lies once it is built: in torch's folder
    of extensions, ``TORCH_EXTENSIONS_DIR`` or that of the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache) / "torch_extensions"
    # a library fits the one torch and Python it was compiled against: others would crash in it
    about = f"{torch.__version__} {torch.version.cuda} {sys.version} {' '.join(_options())}"
    sources = b"".join(source.read_bytes() for source in _SOURCES)
    told = hashlib.sha256(sources + about.encode()).hexdigest()[:16]
    return Path(root) / _NAME / f"{told}{sysconfig.get_config_var('EXT_SUFFIX')}"


def _options() -> list[str]:
    return [
        *("-O2", "-std=c++20", "-shared", "-fPIC", f"-DTORCH_EXTENSION_NAME={_NAME}"),
        # as torch itself was built, or std::string is of another layout
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]


def build() -> Path:
    """Compile the library, which takes about half a minute, unless it is there.

    Returns:
        The file.

    Raises:
        ParamloraError: the compiler, ``CXX`` or ``c++``, is not there or failed; what it says goes
            to stderr.
    """
    target = place()
    if target.is_file():
        return target
    own = Path(torch.__file__).parent
    folders = (own / "include", own / "include/torch/csrc/api/include", _cuda())
    headers = [f"-I{path}" for path in (*folders, sysconfig.get_paths()["include"])]
    libraries = [f"-L{own / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    target.parent.mkdir(parents=True, exist_ok=True)
    # in the same folder, as a rename is atomic only inside of one file system
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        command = [*compiler, *_options(), *headers, str(_SOURCES[0]), "-o", str(made), *libraries]
        try:
            code = subprocess.run(command).returncode
        except OSError as reason:
            raise ParamloraError(
                f"no C++ compiler: {compiler[0]}: {reason.strerror}. Install g++ or clang++, or "
                "name one by the environment variable CXX"
            ) from reason
        if code:
            raise ParamloraError(
                f"{compiler[0]} ended with {code} on {_SOURCES[0]}: what it said stands above. "
                "Install one that knows C++20, with Python's headers, or name it by the "
                "environment variable CXX"
            )
        made.replace(target)  # whole or not at all
    return target


def _cuda() -> Path:
    """The headers of CUDA's driver, which come with Triton."""
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        raise ParamloraError("the library launches Triton's kernels: pip install triton")
    return Path(triton.origin).parent / "backends/nvidia/include"


@functools.cache
def loaded() -> Any:
    """The library, or None where it was not built, ``PARAMLORA_NATIVE=0`` turns it off, or it
    cannot be loaded, which a warning says. What the first call finds holds for the process."""
    if os.environ.get("PARAMLORA_NATIVE", "1").lower() in OFF:
        return None
    target = place()
    if not target.is_file():
        return None
    try:
        loader = importlib.machinery.ExtensionFileLoader(_NAME, str(target))
        spec = importlib.util.spec_from_file_location(_NAME, target, loader=loader)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        loader.exec_module(module)
        module.call_driver(**driver.addresses())
        return module
    except (ImportError, OSError) as reason:
        warn(
            f"{target} cannot be loaded ({reason}), so layers take the host longer. The "
            "numbers are the same. Delete it, then run `paramlora build`"
        )
        return None
