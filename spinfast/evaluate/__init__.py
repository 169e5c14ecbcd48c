"""Did it help? Verdicts, statistics and the game's diagnostics, all pure; heldout.py and benchmark.py use a model."""
