"""`python -m bench peers`, see compare.py. Nothing is imported here: Unsloth's process must import Unsloth first."""


def main(argv: list[str]) -> int:
    from bench.peers.compare import main

    return main(argv)
