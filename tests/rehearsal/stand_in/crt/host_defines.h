// The compiler's part of CUDA's headers, which pip's packages lack: for a C compiler its words mean nothing.
#pragma once
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define CUDART_CB
#define CUDA_DEPRECATED
#define __host__
#define __device__
#define __device_builtin__
#define __cudart_builtin__
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define __cuda_builtin_vector_align8(tag, members) \
    struct __attribute__((aligned(8))) tag { members }
#define __specialization_static static
