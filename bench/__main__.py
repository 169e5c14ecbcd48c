"""`python -m bench NAME [args]`: runs main(argv) of the module named here; each prints JSON rows, the last one last."""

import importlib
import sys

COMMANDS = {"results": "results_page"} | {
    name: name
    for name in (
        "compile", "decode", "generation", "iteration", "kernels", "memory", "packing", "peers", "profile", "rehearse",
        "roofline", "scaling",
    )
}  # fmt: skip

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"usage: python -m bench {{{','.join(COMMANDS)}}} [args]", file=sys.stderr)
        sys.exit(2)
    sys.exit(importlib.import_module(f"bench.{COMMANDS[sys.argv[1]]}").main(sys.argv[2:]))
