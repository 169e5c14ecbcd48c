"""spinfast: low-rank SFT, self-play (SPIN), DPO and GRPO of small language models on one 16 GB GPU."""

__version__ = "0.1.0"
