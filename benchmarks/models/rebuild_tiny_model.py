"""Is the bundled model what its script builds?

    python benchmarks/models/rebuild_tiny_model.py     ten minutes on one core

Rebuilds `common/tiny_model/` elsewhere and compares. On the machine and versions named in the
report the weights are the same bit for bit; on others last bits may differ, and the report says by
how much. Writes `rebuild_tiny_model.md`; the exit code is 1 if a weight differs.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.helpers import reporting
from benchmarks.helpers.launcher import ROOT
from common.environment import describe_environment


@dataclass
class Args:
    output: Path = reporting.RESULTS
    """where rebuild_tiny_model.md goes"""


def main(args):
    kept = ROOT / "common" / "tiny_model"
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, ROOT / "common" / "build_tiny_model.py", "--output", directory]
        subprocess.run(command, check=True)  # which shows how far it is
        rebuilt = Path(directory)
        rows = []
        for path in sorted(kept.iterdir()):
            same = path.read_bytes() == (rebuilt / path.name).read_bytes()
            rows.append([f"`{path.name}`", "the same" if same else "different"])
        ours, theirs = (load_file(where / "model.safetensors") for where in (kept, rebuilt))
        difference = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    report = f"""# The bundled model, rebuilt

`python benchmarks/models/rebuild_tiny_model.py` built `common/tiny_model/` again and compared the
files.

{reporting.table(["file", "bytes"], rows)}

Largest difference between two weights: {difference:g}.
"""
    reporting.write_report(args.output / "rebuild_tiny_model.md", report, describe_environment())
    sys.exit(0 if difference == 0 else 1)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
