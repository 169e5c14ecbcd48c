"""The checks of a GPU's version set on a machine without a GPU (docs/without-a-gpu.md): make check-t4, check-cuda13.

Collected only where torch is built for CUDA, no card is there, and Triton compiles instead of interpreting.
"""

import ctypes
import os
import shutil
import subprocess

import pytest
import torch

if torch.version.cuda is None or torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "0":
    collect_ignore_glob = ["*"]
else:
    import card

DRIVER = """cuPointerGetAttribute cuTensorMapEncodeTiled cuCtxGetCurrent cuCtxSetCurrent cuDeviceGetAttribute
cuDevicePrimaryCtxRetain cuGetErrorString cuGetErrorName cuMemAddressFree cuMemAddressReserve cuMemCreate
cuMemGetAllocationGranularity cuMemMap cuMemRelease cuMemSetAccess cuMemUnmap cuMemGetAddressRange_v2
cuMemExportToShareableHandle cuMemImportFromShareableHandle cuGetProcAddress_v2 cuCtxSynchronize cuModuleLoadData
cuModuleGetFunction cuLaunchKernel cuFuncSetAttribute cuDeviceGet cuMemcpyDtoH_v2 cuMemcpyHtoD_v2 cuStreamSynchronize"""


@pytest.fixture
def t4():
    """torch says that there is a T4; nothing can be put on it."""
    with card.present():
        yield


@pytest.fixture
def t4_in_use():
    """(host, compiled kernels): tensors on the T4 have shapes and no values."""
    with card.in_use() as found:
        yield found


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """The path of a loaded libcuda.so.1 that refuses every call, so that vLLM's real extensions load."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is needed to make a driver that refuses every call")
    path = tmp_path_factory.mktemp("driver")
    (path / "driver.c").write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in DRIVER.split()))
    library = path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", library, path / "driver.c"], check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return library


@pytest.fixture
def vllm_on_t4(driver, t4, monkeypatch):
    """vLLM takes the machine for one with a T4."""
    import vllm.platforms
    from vllm.utils.platform_utils import is_pin_memory_available

    monkeypatch.setattr(vllm.platforms, "_current_platform", card.vllm_platform())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)  # the driver pins
    monkeypatch.setattr(torch, "tensor", card.unpinned)
    yield vllm
    is_pin_memory_available.cache_clear()
