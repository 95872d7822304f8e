"""A stand-in for the NVIDIA driver's library, compiled where a C compiler is: device memory is host memory."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

_SOURCE = """
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
typedef unsigned long long ptr;
int cuInit(unsigned flags) { return INIT; }
int cuDriverGetVersion(int* v) { *v = CUDA; return 0; }
int cuDeviceGetCount(int* n) { *n = DEVICES; return 0; }
int cuDeviceGet(int* d, int i) { *d = i; return 0; }
int cuDeviceGetName(char* s, int n, int d) { snprintf(s, n, "%s", "NVIDIA L4"); return 0; }
int cuDeviceTotalMem_v2(size_t* n, int d) { *n = (size_t)24 << 30; return 0; }
int cuDeviceGetAttribute(int* v, int which, int d) { *v = which == 75 ? 8 : which == 76 ? 9 : -1; return 0; }
int cuGetErrorName(int e, const char** s) { *s = e == 100 ? "CUDA_ERROR_NO_DEVICE" : 0; return e == 100 ? 0 : 1; }
int cuDevicePrimaryCtxRetain(void** c, int d) { *c = (void*)1; return 0; }
int cuCtxSetCurrent(void* c) { return c ? 0 : 201; }
int cuStreamCreate(void** s, unsigned flags) { *s = (void*)7; return flags == 1 ? 0 : 1; }
int cuStreamSynchronize(void* s) { return s == (void*)7 ? 0 : 400; }
int cuMemAlloc_v2(ptr* p, size_t n) { *p = (ptr)malloc(n); return *p ? 0 : 2; }
int cuMemFree_v2(ptr p) { free((void*)p); return 0; }
int cuMemcpyHtoD_v2(ptr to, const void* from, size_t n) { memcpy((void*)to, from, n); return 0; }
int cuMemcpyDtoH_v2(void* to, ptr from, size_t n) { memcpy(to, (void*)from, n); return 0; }
"""


def compile_libcuda(folder: Path, *, init: int = 0, cuda: int = 13000, devices: int = 1) -> str:
    """Path of the library. `init`: what cuInit answers; `cuda`: as cuDriverGetVersion tells it. Skips without gcc."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler for a stand-in of the driver's library; install gcc")
    source, library = folder / "libcuda.c", folder / "libcuda.so.1"
    source.write_text(_SOURCE)
    defines = [f"-DINIT={init}", f"-DCUDA={cuda}", f"-DDEVICES={devices}"]
    subprocess.run([compiler, "-shared", "-fPIC", *defines, str(source), "-o", str(library)], check=True)
    return str(library)
