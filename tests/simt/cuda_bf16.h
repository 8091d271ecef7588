// As cuda_fp16.h here.
#pragma once
#include "cuda_fp16.h"
#if defined(__SANITIZE_THREAD__)
#define unused always_inline
#endif
#include_next <cuda_bf16.h>
#undef unused
