// The product of few rows with bfloat16 weights, for kernels that contain it.
#pragma once
#include "common.h"
#include "vec.h"

void LS(linear)(const bf16 *inputs, const bf16 *weight, const bf16 *bias, bf16 *output, int64_t rows, int64_t in, int64_t out,
                int64_t threads);
