"""Every Triton function of the package under one name each, the counterpart of `reference`."""

from spinfast_kernels.linear_logps import linear_logps
from spinfast_kernels.lora import lora_linear, lora_mlp, lora_qkv, rms_norm, rope, swiglu
from spinfast_kernels.pairwise import pairwise_loss

__all__ = ["linear_logps", "lora_linear", "lora_mlp", "lora_qkv", "pairwise_loss", "rms_norm", "rope", "swiglu"]
