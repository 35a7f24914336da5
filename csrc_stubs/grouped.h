// Products of sorted rows with the matrices of their groups: what every stage of the layer is made of.
#pragma once

#include <vector>

#include "arguments.h"

namespace lora_moe {

// A stack of matrices of one shape.
struct Stack {
  const void* data;
  Float type;
  int64_t stride, n, k, stride_n, stride_k;

  Matrix at(int64_t index) const {
    return {static_cast<const char*>(data) + index * stride * size_of(type), type, n, k, stride_n, stride_k};
  }
  // The same matrices, columns [begin, begin + count) of the summed dimension only.
  Stack columns(int64_t begin, int64_t count) const;
  // Rows [begin, begin + count) only.
  Stack rows(int64_t begin, int64_t count) const;
};

// Base weights [E, n, k], of which the last or the middle dimension is contiguous.
Stack base_stack(const char* name, const Tensor& weights);
// LoRA weights [L, E or 1, n, k], contiguous.
Stack lora_stack(const char* name, const Tensor& weights);

// fp32 rows of equal length, one behind the other.
class Rows {
 public:
  Rows(int64_t count, int64_t size) : size_(size), values_(count * size) {}
  float* operator[](int64_t row) { return values_.data() + row * size_; }
  int64_t size() const { return size_; }
  // Addresses of all rows, from a column on.
  std::vector<float*> pointers(int64_t column = 0);

 private:
  int64_t size_;
  std::vector<float> values_;
};

// The rows of a tensor [rows, size] as fp32: its own memory where it is fp32, else converted.
class InputRows {
 public:
  InputRows(const char* name, const Tensor& tensor);
  const float* operator[](int64_t row) const { return pointers_[row]; }

 private:
  std::vector<float> values_;
  std::vector<const float*> pointers_;
};

// out[row] = matrix of the row's group * x[row].
void multiply_groups(const Stack& stack, const std::vector<Group>& groups, const std::vector<const float*>& x,
                     const std::vector<float*>& out);

// delta[row] += B * (A * x[row]) for rows given as (pair, x, delta), all of pairs that have an adapter.
struct LoraPair {
  Stack a, b;
  bool shared_a, shared_b;
  int64_t num_slices;
};

// Checks A [L, E or 1, slices * R, in] against B [L, E or 1, out, R].
LoraPair lora_pair(const char* name_a, const Tensor& a, const char* name_b, const Tensor& b, int64_t in_features,
                   int64_t out_features, int64_t num_slices, int64_t num_experts);

// B * s for the pairs of `pairs`, all adapted and sorted; `s` holds their rank vectors.
Rows expand(const Stack& b, bool shared, int64_t num_slices, const Routing& routing, const std::vector<int32_t>& pairs,
            Rows& s);

// A * x likewise, x by position in `pairs`.
Rows shrink(const Stack& a, bool shared, const Routing& routing, const std::vector<int32_t>& pairs,
            const std::vector<const float*>& x);

}  // namespace lora_moe
