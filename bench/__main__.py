"""`python -m bench NAME [args]`: runs bench/NAME.py's main(argv). Each prints JSON rows, the last line last."""

import importlib
import pkgutil
import sys
from pathlib import Path

if __name__ == "__main__":
    found = {module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])}
    names = sorted(found - {"__main__", "rows"})
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        print(f"usage: python -m bench {{{','.join(names)}}} [args]", file=sys.stderr)
        sys.exit(2)
    sys.exit(importlib.import_module(f"bench.{sys.argv[1]}").main(sys.argv[2:]))
