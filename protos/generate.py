"""Generate `carousel_protos.v1` from the .proto files: `make protos`, or `--check` to fail when it is stale.

protoc derives Python import paths from the .proto's own path (`carousel.v1`), which would claim the import name
`carousel`; the generated imports are rewritten to where the package really is.
"""

import argparse
import re
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from google.rpc import status_pb2
from grpc_tools import protoc

ROOT = Path(__file__).parent
PACKAGE = ROOT / "carousel_protos" / "v1"


def generate(into: Path) -> dict[str, str]:
    sources = sorted(ROOT.glob("carousel/v1/*.proto"))
    googleapis = Path(status_pb2.__file__).parents[2]
    mypy_plugins = [
        f"--plugin={Path(sys.executable).parent / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
    ]
    arguments = ["protoc", *mypy_plugins, f"-I{ROOT}", f"-I{googleapis}", f"-I{files('grpc_tools') / '_proto'}"]
    arguments += [f"--{kind}={into}" for kind in ("python_out", "grpc_python_out")]
    arguments += [f"--{kind}=quiet:{into}" for kind in ("mypy_out", "mypy_grpc_out")]
    if protoc.main([*arguments, *map(str, sources)]) != 0:
        sys.exit("protoc failed: its message is above")
    generated = {}
    for path in sorted(into.glob("carousel/v1/*_pb2*.py*")):
        if "_pb2_grpc" in path.name and not path.name.startswith("carousel_pb2_grpc"):  # the one file with a service
            continue
        text = path.read_text().replace("from carousel.v1 import", "from carousel_protos.v1 import")
        text = text.replace("import carousel.v1.", "import carousel_protos.v1.")
        generated[path.name] = re.sub(r" carousel\.v1\.(\w+_pb2)", r" carousel_protos.v1.\1", text)
    return generated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the generated code is stale")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        wanted = generate(Path(scratch))
    present = {path.name: path.read_text() for path in PACKAGE.glob("*_pb2*.py*")}
    if check:
        if stale := sorted(name for name in wanted | present if wanted.get(name) != present.get(name)):
            sys.exit(f"stale generated code: {', '.join(stale)}; run `make protos` and commit")
        return
    for name in present.keys() - wanted.keys():
        (PACKAGE / name).unlink()
    for name, text in wanted.items():
        (PACKAGE / name).write_text(text)


if __name__ == "__main__":
    main()
