// A stand-in for the CUDA driver, as Triton and torch.compile call it. Modules load, kernels are counted and do nothing.
#include <stddef.h>
#include <string.h>
static long launches = 0;
long standin_triton_launches(int unused) { return launches; }
int cuInit(unsigned f) { return 0; }
int cuGetExportTable(const void **t, const void *id) { *t = 0; return 500; }  // NVRTC asks, and does without
int cuDriverGetVersion(int *v) { *v = 13020; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDevicePrimaryCtxGetState(int d, unsigned *f, int *a) { if (f)*f = 0; if (a)*a = 1; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = (void*)0x1234; return 0; }
int cuCtxGetCurrent(void **c) { *c = (void*)0x1234; return 0; }
int cuCtxGetDevice(int *d) { *d = 0; return 0; }
int cuGetErrorString(int e, const char **s) { *s = "stand-in"; return 0; }
int cuGetErrorName(int e, const char **s) { *s = "stand-in"; return 0; }
int cuGetProcAddress(const char *s, void **p, int v, unsigned long long f) { *p = 0; return 500; }
int cuGetProcAddress_v2(const char *s, void **p, int v, unsigned long long f, void *r) { *p = 0; return 500; }
int cuDeviceGetAttribute(int *v, int a, int d) {
    switch (a) {
        case 75:*v = 9;
        break;
        case 76:*v = 0;
        break;
        case 16:*v = 132;
        break;
        case 10:*v = 32;
        break;
        case 1:*v = 1024;
        break;
        case 97:*v = 232448;
        break;
        case 8:*v = 49152;
        break;
        case 81:*v = 233472;
        break;
        case 12:*v = 65536;
        break;
        case 82:*v = 65536;
        break;
        case 39:*v = 2048;
        break;
        case 13:*v = 1980000;
        break;
        case 36:*v = 3201000;
        break;
        case 37:*v = 6144;
        break;
        case 38:*v = 60<<20;
        break;
        default:*v = 1;
    }
    return 0;
}
int cuFuncGetAttribute(int *v, int a, void *f) { *v = a == 0?1024:a == 4?32:0; return 0; }
int cuModuleLoadData(void **m, const void *p) { *m = (void*)0x5678; return 0; }
int cuModuleLoadDataEx(void **m, const void *p, unsigned n, void *o, void *x) { *m = (void*)0x5678; return 0; }
int cuModuleGetFunction(void **f, void *m, const char *n) { *f = (void*)0x9abc; return 0; }
int cuLibraryLoadData(void **m, const void *p, void *a, void *b, unsigned c, void *d, void *e, unsigned g) {
    *m = (void*)0x5678;
    return 0;
}
int cuLibraryGetKernel(void **f, void *m, const char *n) { *f = (void*)0x9abc; return 0; }
int cuPointerGetAttribute(void *o, int a, unsigned long long p) {
    if (a == 3)*(unsigned long long*)o = p;
    else *(int*)o = a == 2?2:0;
    return 0;
}
int cuLaunchKernelEx(void *c, void *f, void **k, void **e) { launches++; return 0; }
int cuLaunchKernel(void) { launches++; return 0; }
int cuStreamIsCapturing(void *s, int *c) { *c = 0; return 0; }
int cuCtxGetLimit(size_t *v, int l) { *v = 1024; return 0; }
int cuOccupancyMaxActiveClusters(int *n, void *f, void *c) { *n = 8; return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, void *f, int b, size_t s) { *n = 4; return 0; }

