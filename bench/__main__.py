"""`python -m bench NAME [args]`: runs bench/NAME.py's main(argv). Each prints JSON rows, the last line last."""

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    names = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in ("__init__", "__main__", "rows"))
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        print(f"usage: python -m bench {{{','.join(names)}}} [args]", file=sys.stderr)
        sys.exit(2)
    sys.exit(importlib.import_module(f"bench.{sys.argv[1]}").main(sys.argv[2:]))
