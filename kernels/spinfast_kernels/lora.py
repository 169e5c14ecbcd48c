"""The decoder layer's functions with Triton between the GEMMs: blocks.py over the kernels' element-wise table."""

from __future__ import annotations

from spinfast_kernels import rms_norm as rms
from spinfast_kernels import rope as rotary
from spinfast_kernels import swiglu as glu
from spinfast_kernels.blocks import Elementwise, LayerOps

_layer = LayerOps(Elementwise(rms.forward, rms.backward, rms.apply, glu.forward, glu.backward, rotary.rotate))
lora_linear, lora_qkv, lora_mlp = _layer.lora_linear, _layer.lora_qkv, _layer.lora_mlp
rms_norm, swiglu, rope = _layer.rms_norm, _layer.swiglu, _layer.rope
