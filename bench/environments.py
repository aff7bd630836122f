"""An environment of its own for each peer that Carousel is compared with, made once, under a git-ignored folder."""

import json
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(".peers")
# What each peer runs the graph with, so that the servers are compared and not the kernels.
_KERNEL = "onnxruntime==1.31.1"


@dataclass(frozen=True)
class Environment:
    """A virtual environment with `packages` in it.

    With `torch`, the project's own torch can be imported there too, behind what is installed.
    """

    name: str
    packages: tuple[str, ...]
    torch: bool = False

    @property
    def python(self) -> Path:
        return (_ROOT / self.name / "bin" / "python").absolute()

    @property
    def python_version(self) -> str:
        return f"{sys.version_info.major}.{sys.version_info.minor}"

    @property
    def site_packages(self) -> Path:
        return (_ROOT / self.name / "lib" / f"python{self.python_version}" / "site-packages").absolute()

    def ready(self) -> str:
        """Make it where it is not there; empty, or why it cannot be had, in one line."""
        wanted = json.dumps([*self.packages, _KERNEL, self.torch])
        note = _ROOT / self.name / "installed.json"
        if note.exists() and note.read_text(encoding="utf-8") == wanted:
            return ""
        print(f"setting up {_ROOT / self.name}", flush=True)
        venv.create(_ROOT / self.name, with_pip=True, clear=True)
        pip = [str(self.python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        done = subprocess.run([*pip, *self.packages, _KERNEL], capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            return (errors or done.stderr.splitlines() or ["pip failed"])[-1][:200]
        if self.torch:
            (self.site_packages / "project.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
        note.write_text(wanted, encoding="utf-8")
        return ""


TRITON = Environment("pytriton", ("nvidia-pytriton==0.7.0",))
RAY_SERVE = Environment("ray_serve", ("ray[serve]==2.60.0",))
MLSERVER = Environment("mlserver", ("mlserver==1.7.1",))
TORCHSERVE = Environment("torchserve", ("torchserve==0.12.0", "pyyaml"), torch=True)
BENTOML = Environment("bentoml", ("bentoml==1.4.39",))
LITSERVE = Environment("litserve", ("litserve==0.2.19",))
