"""Write ``fedsim/pb`` from ``federation.proto``.

Run it with the oldest generator that is supported, in an environment of its own (grpcio-tools 1.70.0):
generated code refuses a runtime that is older than its generator.
"""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "fedsim" / "pb"


def main() -> int:
    """Generate; the exit status of the compiler."""
    PACKAGE.mkdir(exist_ok=True)
    (PACKAGE / "__init__.py").write_text('"""Generated from proto/federation.proto; do not edit."""\n')
    words = [
        "protoc",
        f"--proto_path={files('grpc_tools') / '_proto'}",
        f"--proto_path={HERE}",
        f"--python_out={PACKAGE}",
        f"--pyi_out={PACKAGE}",
        f"--grpc_python_out={PACKAGE}",
        "federation.proto",
    ]
    status = int(protoc.main(words))
    grpc_file = PACKAGE / "federation_pb2_grpc.py"
    text = grpc_file.read_text()
    # The compiler writes a top-level import; the module lives in a package.
    grpc_file.write_text(text.replace("import federation_pb2 as", "from fedsim.pb import federation_pb2 as"))
    return status


if __name__ == "__main__":
    sys.exit(main())
