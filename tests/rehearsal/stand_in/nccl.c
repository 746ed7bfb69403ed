// A stand-in NCCL: communicators over a file in /dev/shm; every call does its work at once, on the host memory that the
// stand-in runtime calls device memory. Refuses what NCCL refuses (unknown types).
#define _GNU_SOURCE
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#include <stdint.h>
#include <fcntl.h>
#include <unistd.h>
#include <time.h>
#include <sched.h>
#include <sys/mman.h>
#include <pthread.h>
typedef struct Comm *ncclComm_t;
typedef void* cudaStream_t;
typedef struct{ char b[128]; }ncclUniqueId;
#define CH (4ul<<20)
#define MAXR 16
struct Head{ volatile int ready, gen, arrived, dead; volatile long len[MAXR][MAXR], want[MAXR][MAXR]; };
struct Comm{
    struct Head *h;
    char *slots;
    int n, r;
    unsigned long long seen;
};
static int NUL(void) { static int v = -1; if (v<0)v = getenv("STANDIN_NULL") != 0; return v; }
static long calls[16];
void standin_nccl_reset(void) { memset(calls, 0, sizeof calls); }
long standin_nccl(int i) { return calls[i]; }
static __thread int depth = 0;
struct P{
    int send;
    char *buf;
    size_t n;
    int peer;
    struct Comm *c;
};
static __thread struct P q[4096];
static __thread int nq = 0;
static void barrier(struct Comm *c) {
    struct Head *h = c->h;
    int g = __atomic_load_n(&h->gen, __ATOMIC_SEQ_CST);
    if (__atomic_add_fetch(&h->arrived, 1, __ATOMIC_SEQ_CST) == c->n) {
        __atomic_store_n(&h->arrived, 0, __ATOMIC_SEQ_CST);
        __atomic_add_fetch(&h->gen, 1, __ATOMIC_SEQ_CST);
    }  else while (__atomic_load_n(&h->gen, __ATOMIC_SEQ_CST) == g) {
        if (h->dead)return;
        struct timespec t={
            0, 50000
        };
        nanosleep(&t, 0);
    }
}
static size_t width(int t) { static const int w[]={ 1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1 }; return w[t]; }
int ncclGetVersion(int *v) { *v = 22307; return 0; }
int ncclGetUniqueId(ncclUniqueId *u) {
    memset(u, 0, sizeof*u);
    int f = open("/dev/urandom", 0);
    read(f, u->b, 16);
    close(f);
    return 0;
}
int ncclCommGetUniqueId(void *c, ncclUniqueId *u) { return ncclGetUniqueId(u); }
static int join(ncclComm_t *out, int n, ncclUniqueId id, int r) {
    char name[128];
    snprintf(name, 128, "/dev/shm/standin_nccl_%016lx%016lx", *(long*)id.b, *(long*)(id.b+8));
    if (NUL()) {
        struct Comm *c = calloc(1, sizeof*c);
        c->n = n;
        c->r = r;
        c->h = calloc(1, sizeof(struct Head));
        *out = c;
        return 0;
    }
    size_t size = sizeof(struct Head)+(size_t)n*n*CH;
    int f = open(name, O_RDWR|O_CREAT, 0600);
    ftruncate(f, size);
    struct Comm *c = calloc(1, sizeof*c);
    c->h = mmap(0, size, PROT_READ|PROT_WRITE, MAP_SHARED, f, 0);
    close(f);
    c->slots = (char*)(c->h+1);
    c->n = n;
    c->r = r;
    barrier(c);
    if (r == 0)unlink(name);
    barrier(c);
    *out = c;
    calls[0]++;
    return 0;
}
int ncclCommInitRankConfig(ncclComm_t *c, int n, ncclUniqueId id, int r, void *cfg) { return join(c, n, id, r); }
int ncclCommInitRank(ncclComm_t *c, int n, ncclUniqueId id, int r) { return join(c, n, id, r); }
int ncclCommInitRankScalable(ncclComm_t *c, int n, int r, int ni, ncclUniqueId *id, void *cfg) {
    return join(c, n, id[0], r);
}
int ncclCommDestroy(ncclComm_t c) { return 0; }
int ncclCommFinalize(ncclComm_t c) { return 0; }
int ncclCommAbort(ncclComm_t c) { c->h->dead = 1; return 0; }
int ncclCommGetAsyncError(ncclComm_t c, int *e) { *e = 0; return 0; }
int ncclCommCount(ncclComm_t c, int *n) { *n = c->n; return 0; }
int ncclCommUserRank(ncclComm_t c, int *n) { *n = c->r; return 0; }
int ncclCommRegister(ncclComm_t c, void *p, size_t n, void **h) { *h = 0; return 0; }
int ncclCommDeregister(ncclComm_t c, void *h) { return 0; }
int ncclMemAlloc(void **p, size_t n) { return 1; }
const char *ncclGetErrorString(int e) { return e?"stand-in error":"no error"; }
const char *ncclGetLastError(ncclComm_t c) { return ""; }
int ncclRedOpCreatePreMulSum(int *op, void *s, int t, int res, ncclComm_t c) { return 3; }
int ncclRedOpDestroy(int op, ncclComm_t c) { return 0; }
static float bf(uint16_t x) {
    uint32_t u = (uint32_t)x<<16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static uint16_t tobf(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    u += 0x7fff+((u>>16)&1);
    return u>>16;
}
static float hf(uint16_t x) { _Float16 h; memcpy(&h, &x, 2); return h; }
static uint16_t tohf(float f) {
    _Float16 h = f;
    uint16_t x;
    memcpy(&x, &h, 2);
    return x;
}
#define RED(T) {T*o=out;for(size_t i=0;i<n;i++){T a=((T*)c->slots)[i];for(int r=1;r<c->n;r++){T b=((T*)(c->slots+(size_t)r*c->n*CH))[i];a=op==0||op==4?a+b:op==1?a*b:op==2?(a>b?a:b):(a<b?a:b);}o[i]=op==4?a/c->n:a;}break;}
#define REDH(F,G) {uint16_t*o=out;for(size_t i=0;i<n;i++){float a=F(((uint16_t*)c->slots)[i]);for(int r=1;r<c->n;r++){float b=F(((uint16_t*)(c->slots+(size_t)r*c->n*CH))[i]);a=op==0||op==4?a+b:op==1?a*b:op==2?(a>b?a:b):(a<b?a:b);}o[i]=G(op==4?a/c->n:a);}break;}
static void reduce(struct Comm *c, void *out, size_t n, int t, int op) {
    switch (t) {
        case 0:RED(int8_t)case 1:RED(uint8_t)case 2:RED(int32_t)case 3:RED(uint32_t)case 4:RED(int64_t)case 5:RED(uint64_t)case 6:REDH(hf, tohf)case 7:RED(float)case 8:RED(double)case 9:REDH(bf, tobf)
    }
}
static char *mine(struct Comm *c) { return c->slots+(size_t)c->r*c->n*CH; }
static char *of(struct Comm *c, int r) { return c->slots+(size_t)r*c->n*CH; }
int ncclAllReduce(const void *s, void *d, size_t n, int t, int op, ncclComm_t c, cudaStream_t st) {
    calls[1]++;
    if (NUL())return 0;
    size_t w = width(t);
    for (size_t at = 0; at<n; at += CH/w) {
        size_t k = n-at<CH/w?n-at:CH/w;
        memcpy(mine(c), (char*)s+at*w, k*w);
        barrier(c);
        reduce(c, (char*)d+at*w, k, t, op);
        barrier(c);
    }
    return 0;
}
int ncclAllGather(const void *s, void *d, size_t n, int t, ncclComm_t c, cudaStream_t st) {
    calls[2]++;
    if (NUL())return 0;
    size_t w = width(t), b = n*w;
    for (size_t at = 0; at<b; at += CH) {
        size_t k = b-at<CH?b-at:CH;
        memcpy(mine(c), (char*)s+at, k);
        barrier(c);
        for (int r = 0; r<c->n; r++)memcpy((char*)d+r*b+at, of(c, r), k);
        barrier(c);
    }
    return 0;
}
int ncclBroadcast(const void *s, void *d, size_t n, int t, int root, ncclComm_t c, cudaStream_t st) {
    calls[3]++;
    if (NUL())return 0;
    size_t b = n*width(t);
    for (size_t at = 0; at<b; at += CH) {
        size_t k = b-at<CH?b-at:CH;
        if (c->r == root)memcpy(mine(c), (char*)s+at, k);
        barrier(c);
        memmove((char*)d+at, of(c, root), k);
        barrier(c);
    }
    return 0;
}
int ncclBcast(void *d, size_t n, int t, int root, ncclComm_t c, cudaStream_t st) {
    return ncclBroadcast(d, d, n, t, root, c, st);
}
int ncclReduce(const void *s, void *d, size_t n, int t, int op, int root, ncclComm_t c, cudaStream_t st) {
    char *tmp = malloc(n*width(t)+1);
    ncclAllReduce(s, tmp, n, t, op, c, st);
    if (c->r == root)memcpy(d, tmp, n*width(t));
    free(tmp);
    return 0;
}
int ncclReduceScatter(const void *s, void *d, size_t n, int t, int op, ncclComm_t c, cudaStream_t st) {
    char *tmp = malloc(n*c->n*width(t)+1);
    ncclAllReduce(s, tmp, n*c->n, t, op, c, st);
    memcpy(d, tmp+c->r*n*width(t), n*width(t));
    free(tmp);
    return 0;
}
// Bytes go from a to b: h->len[a][b] by a's calls, h->want[a][b] by b's. NCCL would hang if they differ.
static int exchange(void) {
    if (!nq)return 0;
    struct Comm *c = q[0].c;
    struct Head *h = c->h;
    for (int r = 0; r<c->n; r++)h->len[c->r][r] = h->want[r][c->r] = 0;
    for (int i = 0; i<nq; i++) {
        if (q[i].send)h->len[c->r][q[i].peer] += q[i].n;
        else h->want[q[i].peer][c->r] += q[i].n;
    }
    barrier(c);
    int unequal = 0;
    for (int a = 0; a<c->n; a++)for (int b = 0; b<c->n; b++)unequal |= h->len[a][b] != h->want[a][b];
    if (unequal) {
        barrier(c);
        nq = 0;
        return 4;
    }
    long most = 0;
    for (int a = 0; a<c->n; a++)for (int b = 0; b<c->n; b++)if (h->len[a][b]>most)most = h->len[a][b];
    for (long at = 0; at<most; at += CH) {
        for (int i = 0; i<nq; i++)if (q[i].send && at<(long)q[i].n) {
            size_t k = q[i].n-at<CH?q[i].n-at:CH;
            memcpy(mine(c)+q[i].peer*CH, q[i].buf+at, k);
        }
        barrier(c);
        for (int i = 0; i<nq; i++)if (!q[i].send && at<(long)q[i].n) {
            size_t k = q[i].n-at<CH?q[i].n-at:CH;
            memcpy(q[i].buf+at, of(c, q[i].peer)+c->r*CH, k);
        }
        barrier(c);
    }
    if (!most)barrier(c);
    nq = 0;
    return 0;
}
int ncclGroupStart(void) { depth++; return 0; }
static int flush(void) {
    if (!NUL())return exchange();
    nq = 0;
    return 0;
}
int ncclGroupEnd(void) { return --depth?0:flush(); }
int ncclGroupSimulateEnd(void *x) { return ncclGroupEnd(); }
static int p2p(int s, void *b, size_t n, int t, int peer, ncclComm_t c) {
    calls[4]++;
    q[nq++] = (struct P) {
        s, b, n*width(t), peer, c
    };
    return depth?0:flush();
}
int ncclSend(const void *b, size_t n, int t, int peer, ncclComm_t c, cudaStream_t st) {
    return p2p(1, (void*)b, n, t, peer, c);
}
int ncclRecv(void *b, size_t n, int t, int peer, ncclComm_t c, cudaStream_t st) { return p2p(0, b, n, t, peer, c); }
int ncclAlltoAll(const void *s, void *d, size_t n, int t, ncclComm_t c, cudaStream_t st) {
    size_t b = n*width(t);
    depth++;
    for (int r = 0; r<c->n; r++) {
        p2p(1, (char*)s+r*b, n, t, r, c);
        p2p(0, (char*)d+r*b, n, t, r, c);
    }
    return ncclGroupEnd();
}
int ncclCommMemStats(ncclComm_t c, int s, uint64_t *v) { *v = 0; return 0; }
int ncclCommSplit(ncclComm_t c, int color, int key, ncclComm_t *n, void *cfg) { *n = c; return 0; }
int ncclCommResume(ncclComm_t c) { return 0; }
int ncclCommSuspend(ncclComm_t c, int f) { return 0; }

