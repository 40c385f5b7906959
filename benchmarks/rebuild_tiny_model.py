"""Is the embedded model what its script builds? `python benchmarks/rebuild_tiny_model.py` rebuilds it and compares.

On the machine and versions named in `results/rebuild_tiny_model.md` the weights come out bit for bit the same; on
others last bits may differ, and the report says by how much. Takes as long as the build, some ten minutes on one core.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.runlog import describe_environment


def main():
    kept = ROOT / "common" / "tiny_model"
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run([sys.executable, ROOT / "common" / "build_tiny_model.py", "--output", directory], check=True)
        rebuilt = Path(directory)
        files = sorted(path.name for path in kept.iterdir())
        same = {name: (kept / name).read_bytes() == (rebuilt / name).read_bytes() for name in files}
        ours, theirs = load_file(kept / "model.safetensors"), load_file(rebuilt / "model.safetensors")
        difference = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    lines = [f"| `{name}` | {'the same' if same[name] else 'different'} |" for name in files]
    report = f"""# The embedded model, rebuilt

`python benchmarks/rebuild_tiny_model.py` built `common/tiny_model/` anew and compared the files.

| file | bytes |
|---|---|
{chr(10).join(lines)}

Largest difference between two weights: {difference:g}.

```
{describe_environment().strip()}
```
"""
    output = ROOT / "benchmarks" / "results"
    output.mkdir(parents=True, exist_ok=True)
    (output / "rebuild_tiny_model.md").write_text(report)
    print(report)
    sys.exit(0 if difference == 0 else 1)


if __name__ == "__main__":
    main()
