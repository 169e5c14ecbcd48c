"""Every CPU function of the package under one name each, the counterpart of `reference` and `triton_ops`."""

from spinfast_kernels.cpu_head import linear_logps
from spinfast_kernels.cpu_layer import lora_linear, lora_mlp, lora_qkv, rms_norm, rope, swiglu
from spinfast_kernels.reference import pairwise_loss

__all__ = ["linear_logps", "lora_linear", "lora_mlp", "lora_qkv", "pairwise_loss", "rms_norm", "rope", "swiglu"]
