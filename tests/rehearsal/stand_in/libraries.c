// Stand-ins for cuDNN and cuBLAS: plans are made, and products and convolutions are counted. build.py adds a function
// that returns 0 for every other name that torch needs. Counters: 1 convolutions, 2 batch normalization, 3 products.
#include <stdlib.h>
#include <string.h>
#include <stdint.h>
static long c[4];
long standin_libs(int i) { return c[i]; }
void standin_libs_reset(void) { memset(c, 0, sizeof c); }
typedef struct{
    int algo, status;
    float time;
    size_t memory;
    int det, math, res[3];
}
Perf;
static long nextp = 1<<20;
static int mk(void **p) { *p = (void*)(nextp += 64); return 0; }
size_t cudnnGetVersion(void) { return 92600; }
size_t cudnnGetCudartVersion(void) { return 13020; }
size_t cublasLtGetVersion(void) { return 130401; }
const char *cudnnGetErrorString(int e) { return e?"err":"ok"; }
void cudnnGetLastErrorString(char *s, size_t n) { *s = 0; }
int cudnnGetConvolutionForwardAlgorithm_v7(void *h, void *x, void *w, void *cv, void *y, int req, int *ret, Perf *p) {
    *ret = 1;
    memset(p, 0, sizeof*p);
    p->algo = 1;
    return 0;
}
int cudnnGetConvolutionBackwardDataAlgorithm_v7(void *h, void *x, void *w, void *cv, void *y, int req, int *ret, Perf *p) {
    *ret = 1;
    memset(p, 0, sizeof*p);
    p->algo = 1;
    return 0;
}
int cudnnGetConvolutionBackwardFilterAlgorithm_v7(void *h, void *x, void *w, void *cv, void *y, int req, int *ret, Perf *p) {
    *ret = 1;
    memset(p, 0, sizeof*p);
    p->algo = 1;
    return 0;
}
int cudnnGetConvolutionForwardWorkspaceSize(void *h, void *a, void *b, void *d, void *e, int g, size_t *s) {
    *s = 0;
    return 0;
}
int cudnnGetConvolutionBackwardDataWorkspaceSize(void *h, void *a, void *b, void *d, void *e, int g, size_t *s) {
    *s = 0;
    return 0;
}
int cudnnGetConvolutionBackwardFilterWorkspaceSize(void *h, void *a, void *b, void *d, void *e, int g, size_t *s) {
    *s = 0;
    return 0;
}
int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void *h, int m, int o, void *a, void *b, void *d, void *e, void *f, size_t *s) {
    *s = 0;
    return 0;
}
int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void *h, int m, int o, void *a, void *b, void *d, void *e, void *f, void *g, void *i, size_t *s) {
    *s = 0;
    return 0;
}
int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void *h, int m, int o, void *a, void *b, size_t *s) {
    *s = 0;
    return 0;
}
int cudnnGetStream(void *h, void **s) { *s = 0; return 0; }
int cublasGetPointerMode_v2(void *h, int *m) { *m = 0; return 0; }
int cublasGetMathMode(void *h, int *m) { *m = 0; return 0; }
int cublasLtMatmulAlgoGetHeuristic(void *h, void *o, void *a, void *b, void *cc, void *d, void *p, int req, char *res, int *ret) {
    memset(res, 0, 96);
    *ret = 1;
    return 0;
}
int cudnnBackendGetAttribute(void *d, int name, int type, int64_t req, int64_t *n, void *a) {
    if (n)*n = 1;
    if (a && req>0 && type != 15)memset(a, 0, type == 3?8:4);
    return 0;
}
int cudnnBackendExecute(void *h, void *p, void *v) { c[1]++; return 0; }
int cudnnBackendCreateDescriptor(int t, void **p) { return mk(p); }

