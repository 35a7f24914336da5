// Products of a weight matrix in fp32, bf16 or fp16 with fp32 rows, and the loops they are made of.
#pragma once

#include <cstdint>
#include <functional>

namespace lora_moe {

enum class Float { f32, bf16, f16, f64 };

// One matrix [n, k] of a stack; strides in elements, one of them 1.
struct Matrix {
  const void* data;
  Float type;
  int64_t n, k, stride_n, stride_k;
};

int64_t size_of(Float type);

// Elements [begin, begin + count) of a tensor as fp32.
void to_float(const void* data, Float type, int64_t begin, int64_t count, float* out);

// The value at one index.
float load(const void* data, Float type, int64_t index);

// Stores a value rounded to the type.
void store(void* data, Float type, int64_t index, float value);

// out[r][n] = sum over k of w[n, k] * x[r][k] for rows r and columns n in [begin, end).
void multiply(const Matrix& w, int64_t begin, int64_t end, const float* const* x, float* const* out, int64_t rows);

// Runs task(0) to task(count - 1) on PyTorch's threads, each free thread taking the next; `work` is the number of
// multiplications in all: little work stays on this thread.
void run_tasks(int64_t count, int64_t work, const std::function<void(int64_t)>& task);

}  // namespace lora_moe
