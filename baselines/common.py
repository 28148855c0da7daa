"""What `python baselines/orpo.py` imports: Python looks beside the file, not in the root."""

import sys
from pathlib import Path

script = Path(sys.argv[0]).stem
print(f"error: from the root of the repository: python -m baselines.{script}", file=sys.stderr)
raise SystemExit(2)
