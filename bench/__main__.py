"""`python -m bench NAME [args]`: runs what COMMANDS names; each prints JSON rows, the last one last."""

import importlib
import sys

COMMANDS = {  # name -> module of bench, function of its arguments
    "compile": ("compile", "main"),
    "compose": ("compose", "main"),
    "end_to_end": ("peers.end_to_end", "main"),
    "export": ("export", "main"),
    "generation": ("generation", "main"),
    "iteration": ("iteration", "main"),
    "kernels": ("kernels", "main"),
    "limits": ("scaling", "limits"),
    "memory": ("memory", "main"),
    "merging": ("merging", "main"),
    "peers": ("peers.compare", "main"),
    "profile": ("profile", "main"),
    "rehearse": ("rehearse", "main"),
    "results": ("results_page", "main"),
    "roofline": ("roofline", "main"),
    "scale": ("scale", "main"),
    "scaling": ("scaling", "main"),
    "studies": ("studies", "main"),
    "wheels": ("wheels", "main"),
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        print(f"usage: python -m bench {{{','.join(COMMANDS)}}} [args]", file=sys.stderr)
        return 2
    from spinfast.errors import UserError
    from spinfast.run import refuse_remote_code

    refuse_remote_code()
    module, function = COMMANDS[argv[0]]
    try:
        return getattr(importlib.import_module(f"bench.{module}"), function)(argv[1:])
    except UserError as error:
        print(f"bench {argv[0]}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
