"""spinfast: low-rank self-play fine-tuning (SPIN) of small language models on one 16 GB GPU."""

__version__ = "0.1.0"
