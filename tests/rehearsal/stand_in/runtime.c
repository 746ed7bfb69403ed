// A stand-in for the CUDA runtime: one or more devices like an H200. Their memory is memory of the host, and their kernels
// do nothing. It is preloaded in front of libcudart, so that torch's own allocator, streams, events and autograd run as on a
// machine with a GPU. `told` is called with the number of a counter whenever the host would wait for the device.
#define _GNU_SOURCE
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#include <pthread.h>
#include <execinfo.h>
#include "cuda_runtime_api.h"
#undef cudaGetDeviceProperties
#define OK cudaSuccess
static int null_device(void) { static int v = -1; if (v<0)v = getenv("STANDIN_NULL") != 0; return v; }
static __thread int device = 0;
static int count(void) { const char *s = getenv("STANDIN_GPUS"); return s?atoi(s):1; }
static long waits[8];
// stream sync, event sync, device sync, memcpy sync, launches, memcpy async, malloc, hostalloc
static void(*told)(int) = 0;
void standin_callback(void(*f)(int)) { told = f; }
#define WAIT(i) (waits[i]++,told?told(i):(void)0)
long standin_counter(int i) { return waits[i]; }
void standin_reset(void) { memset(waits, 0, sizeof waits); }
cudaError_t cudaGetDeviceCount(int *n) { *n = count(); return OK; }
cudaError_t cudaGetDevice(int *d) { *d = device; return OK; }
cudaError_t cudaSetDevice(int d) { device = d; return OK; }
cudaError_t cudaDriverGetVersion(int *v) { *v = 13020; return OK; }
cudaError_t cudaRuntimeGetVersion(int *v) { *v = 13020; return OK; }
cudaError_t cudaGetLastError(void) { return OK; }
cudaError_t cudaPeekAtLastError(void) { return OK; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *l, int *g) { *l = 0; *g = -5; return OK; }
cudaError_t cudaDeviceCanAccessPeer(int *c, int a, int b) { *c = 1; return OK; }
cudaError_t cudaDeviceEnablePeerAccess(int p, unsigned f) { return OK; }
cudaError_t cudaDeviceSynchronize(void) { WAIT(2); return OK; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "NVIDIA H200 (stand-in)");
    p->totalGlobalMem = 141ul<<30;
    p->major = 9;
    p->minor = 0;
    p->multiProcessorCount = 132;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472;
    p->regsPerBlock = 65536;
    p->regsPerMultiprocessor = 65536;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = 65535;
    p->maxGridSize[2] = 65535;
    p->maxThreadsDim[0] = 1024;
    p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->l2CacheSize = 60<<20;
    p->memoryBusWidth = 6144;
    p->concurrentKernels = 1;
    p->unifiedAddressing = 1;
    p->maxBlocksPerMultiProcessor = 32;
    p->textureAlignment = 512;
    return OK;
}
cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d) {
    switch ((int)a) {
        case cudaDevAttrComputeCapabilityMajor:*v = 9;
        break;
        case cudaDevAttrComputeCapabilityMinor:*v = 0;
        break;
        case cudaDevAttrMultiProcessorCount:*v = 132;
        break;
        case cudaDevAttrWarpSize:*v = 32;
        break;
        case cudaDevAttrMaxThreadsPerBlock:*v = 1024;
        break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:*v = 232448;
        break;
        case cudaDevAttrMaxSharedMemoryPerBlock:*v = 49152;
        break;
        default:*v = 1;
    }
    return OK;
}
cudaError_t cudaDeviceGetPCIBusId(char *s, int n, int d) { snprintf(s, n, "0000:%02x:00.0", d+1); return OK; }
cudaError_t cudaMemGetInfo(size_t *f, size_t *t) { *f = 140ul<<30; *t = 141ul<<30; return OK; }
#include <sys/mman.h>
// Device and pinned memory lie in address ranges of their own, so that a pointer says what it is; pages come when touched.
#define DEV 0x100000000000ul
#define PIN 0x200000000000ul
static unsigned long top[2]={ DEV, PIN };
static struct{ void *p; size_t n; }*blocks;
static long nblocks, cap;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t used = 0;
size_t standin_used(void) { return used; }
static cudaError_t take(int kind, void **p, size_t n) {
    size_t r = (n+(2ul<<20)-1)&~((2ul<<20)-1);
    unsigned long at = __sync_fetch_and_add(&top[kind], r+(2ul<<20));
    void *q = mmap((void*)at, r, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS|MAP_NORESERVE|MAP_FIXED_NOREPLACE, -1, 0);
    if (q == MAP_FAILED)return cudaErrorMemoryAllocation;
    pthread_mutex_lock(&lock);
    if (kind == 0) {
        if (used+r>(139ul<<30)) {
            pthread_mutex_unlock(&lock);
            munmap(q, r);
            return cudaErrorMemoryAllocation;
        }
        used += r;
    }
    if (nblocks == cap) {
        cap = cap?2*cap:256;
        blocks = realloc(blocks, cap*sizeof*blocks);
    }
    blocks[nblocks].p = q;
    blocks[nblocks++].n = r;
    pthread_mutex_unlock(&lock);
    *p = q;
    return OK;
}
static void give(void *p) {
    if (!p)return;
    pthread_mutex_lock(&lock);
    for (long i = 0; i<nblocks; i++)if (blocks[i].p == p) {
        if ((unsigned long)p<PIN)used -= blocks[i].n;
        munmap(p, blocks[i].n);
        blocks[i] = blocks[--nblocks];
        break;
    }
    pthread_mutex_unlock(&lock);
}
cudaError_t cudaMalloc(void **p, size_t n) { waits[6]++; return take(0, p, n); }
cudaError_t cudaMallocAsync(void **p, size_t n, cudaStream_t s) { return take(0, p, n); }
cudaError_t cudaMallocManaged(void **p, size_t n, unsigned f) { return take(0, p, n); }
cudaError_t cudaFree(void *p) { give(p); return OK; }
cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { give(p); return OK; }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned f) { waits[7]++; return take(1, p, n); }
cudaError_t cudaMallocHost(void **p, size_t n) { waits[7]++; return take(1, p, n); }
cudaError_t cudaFreeHost(void *p) { give(p); return OK; }
cudaError_t cudaHostRegister(void *p, size_t n, unsigned f) { return OK; }
cudaError_t cudaHostUnregister(void *p) { return OK; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    memset(a, 0, sizeof*a);
    unsigned long v = (unsigned long)p;
    a->type = v >= PIN && v<2*PIN?cudaMemoryTypeHost:v >= DEV && v<PIN?cudaMemoryTypeDevice:cudaMemoryTypeUnregistered;
    a->devicePointer = a->hostPointer = (void*)p;
    return OK;
}
cudaError_t cudaMemcpy(void *d, const void *s, size_t n, enum cudaMemcpyKind k) {
    WAIT(3);
    memcpy(d, s, n);
    return OK;
}
cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, enum cudaMemcpyKind k, cudaStream_t q) {
    waits[5]++;
    if (null_device() && n>4096)return OK;
    memmove(d, s, n);
    return OK;
}
cudaError_t cudaMemcpyPeerAsync(void *d, int a, const void *s, int b, size_t n, cudaStream_t q) {
    memmove(d, s, n);
    return OK;
}
cudaError_t cudaMemcpyToSymbol(const void *y, const void *s, size_t n, size_t o, enum cudaMemcpyKind k) {
    return OK;
}
cudaError_t cudaMemset(void *d, int v, size_t n) { memset(d, v, n); return OK; }
cudaError_t cudaMemsetAsync(void *d, int v, size_t n, cudaStream_t q) {
    if (null_device() && n>4096)return OK;
    memset(d, v, n);
    return OK;
}
static long next = 16;
static cudaError_t handle(void **h) { *h = (void*)(__sync_add_and_fetch(&next, 16)); return OK; }
cudaError_t cudaStreamCreate(cudaStream_t *s) { return handle((void**)s); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) { return handle((void**)s); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int p) { return handle((void**)s); }
cudaError_t cudaStreamDestroy(cudaStream_t s) { return OK; }
cudaError_t cudaStreamQuery(cudaStream_t s) { return OK; }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { WAIT(0); return OK; }
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned f) { return OK; }
// One capture at a time. A graph holds nothing: its launch is counted, and `SoftDevice` repeats the operations.
static cudaStream_t captured;
static unsigned long long captures;
static enum cudaStreamCaptureStatus status(cudaStream_t s) {
    return captured && s == captured?cudaStreamCaptureStatusActive:cudaStreamCaptureStatusNone;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode m) { captured = s; captures++; return OK; }
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g) { captured = 0; return handle((void**)g); }
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long f) { return handle((void**)e); }
cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t *nodes, size_t *n) { *n = 1; return OK; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t s) { waits[4]++; return OK; }
cudaError_t cudaGraphDestroy(cudaGraph_t g) { return OK; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e) { return OK; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus*c) {
    *c = status(s);
    return OK;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus*c, unsigned long long *i, cudaGraph_t *g, const cudaGraphNode_t**d, const cudaGraphEdgeData**e, size_t *n) {
    *c = status(s);
    if (i)*i = captures;
    return OK;
}
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void *u, unsigned x) {
    f(s, OK, u);
    return OK;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode*m) { return OK; }
cudaError_t cudaEventCreate(cudaEvent_t *e) { return handle((void**)e); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) { return handle((void**)e); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return OK; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return OK; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned f) { return OK; }
cudaError_t cudaEventQuery(cudaEvent_t e) { return OK; }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { WAIT(1); return OK; }
cudaError_t cudaEventElapsedTime(float *t, cudaEvent_t a, cudaEvent_t b) { *t = 1; return OK; }
cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t s, cudaStream_t q) {
    waits[4]++;
    return OK;
}
cudaError_t __cudaLaunchKernel(void *f, dim3 g, dim3 b, void **a, size_t s, cudaStream_t q) {
    waits[4]++;
    return OK;
}
cudaError_t __cudaGetKernel(void **k, const void *f) { *k = (void*)f; return OK; }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*c, const void *f, void **a) { waits[4]++; return OK; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
    memset(a, 0, sizeof*a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->binaryVersion = 90;
    a->ptxVersion = 90;
    return OK;
}
cudaError_t cudaFuncSetAttribute(const void *f, enum cudaFuncAttribute a, int v) { return OK; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int b, size_t s) {
    *n = 2;
    return OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t s, unsigned x) {
    *n = 2;
    return OK;
}
cudaError_t cudaProfilerStart(void) { return OK; }
cudaError_t cudaProfilerStop(void) { return OK; }
static int generic(void) { return 0; }
static int primary(int d, unsigned *f, int *active) { if (f)*f = 0; if (active)*active = 1; return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *s, void **f, unsigned v, unsigned long long fl, enum cudaDriverEntryPointQueryResult*r) {
    *f = !strcmp(s, "cuDevicePrimaryCtxGetState")?(void*)primary:(void*)generic;
    if (r)*r = cudaDriverEntryPointSuccess;
    return OK;
}

