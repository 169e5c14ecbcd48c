"""What must stand in the environment before vLLM is imported, whoever does it: our generator, or Unsloth."""

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process, or nothing can be shared
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise the process is pinned to one core
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # none on sm_75
    "VLLM_NO_USAGE_STATS": "1",
}
