#include "grouped.h"

#include <algorithm>

namespace lora_moe {
namespace {

// Output columns of one task: enough to be worth its hand-over, few enough to share a matrix among threads.
constexpr int64_t kTaskColumns = 64;

std::vector<Group> lora_groups(const Routing& routing, bool shared, const std::vector<int32_t>& pairs) {
  return groups_of(pairs, [&](int32_t pair) {
    const int64_t id = routing.virtual_expert(pair);
    return shared ? id / routing.num_experts : id;
  });
}

}  // namespace

Stack Stack::columns(int64_t begin, int64_t count) const {
  Stack part = *this;
  part.data = static_cast<const char*>(data) + begin * stride_k * size_of(type);
  part.k = count;
  return part;
}

Stack Stack::rows(int64_t begin, int64_t count) const {
  Stack part = *this;
  part.data = static_cast<const char*>(data) + begin * stride_n * size_of(type);
  part.n = count;
  return part;
}

Stack base_stack(const char* name, const Tensor& weights) {
  check_shape(name, weights, {-1, -1, -1});
  const Floats floats(name, weights);
  if (floats.strides[2] != 1 && floats.strides[1] != 1) {
    fail(name, "other strides", "a contiguous last dimension, or a transposed view of one");
  }
  return {floats.data, floats.type, floats.strides[0], weights.size(1), weights.size(2), floats.strides[1],
          floats.strides[2]};
}

Stack lora_stack(const char* name, const Tensor& weights) {
  check_shape(name, weights, {-1, -1, -1, -1});
  check_contiguous(name, weights);
  const int64_t n = weights.size(2), k = weights.size(3);
  return {weights.data_ptr(), float_type(name, weights), n * k, n, k, k, 1};
}

std::vector<float*> Rows::pointers(int64_t column) {
  std::vector<float*> all(size_ ? values_.size() / size_ : 0);
  for (size_t i = 0; i < all.size(); ++i) all[i] = values_.data() + i * size_ + column;
  return all;
}

InputRows::InputRows(const char* name, const Tensor& tensor) {
  check_shape(name, tensor, {-1, -1});
  const Floats floats(name, tensor);
  const int64_t count = tensor.size(0), size = tensor.size(1);
  if (size > 1 && floats.strides[1] != 1) fail(name, "other strides", "a contiguous last dimension");
  pointers_.resize(count);
  if (floats.type == Float::f32) {
    for (int64_t i = 0; i < count; ++i) pointers_[i] = static_cast<const float*>(floats.data) + i * floats.strides[0];
    return;
  }
  values_.resize(count * size);
  for (int64_t i = 0; i < count; ++i) {
    to_float(floats.data, floats.type, i * floats.strides[0], size, values_.data() + i * size);
    pointers_[i] = values_.data() + i * size;
  }
}

void multiply_groups(const Stack& stack, const std::vector<Group>& groups, const std::vector<const float*>& x,
                     const std::vector<float*>& out) {
  const int64_t blocks = (stack.n + kTaskColumns - 1) / kTaskColumns, count = groups.size();
  const int64_t work = static_cast<int64_t>(x.size()) * stack.n * stack.k;
  run_tasks(count * blocks, work, [&](int64_t task) {
    const Group& group = groups[task / blocks];
    const int64_t begin = task % blocks * kTaskColumns, end = std::min(stack.n, begin + kTaskColumns);
    const int64_t first = group.begin, rows = group.end - first;
    multiply(stack.at(group.weight), begin, end, x.data() + first, out.data() + first, rows);
  });
}

LoraPair lora_pair(const char* name_a, const Tensor& a, const char* name_b, const Tensor& b, int64_t in_features,
                   int64_t out_features, int64_t num_slices, int64_t num_experts) {
  check_shape(name_a, a, {-1, -1, -1, in_features});
  check_shape(name_b, b, {a.size(0), -1, out_features, -1});
  LoraPair pair{lora_stack(name_a, a), lora_stack(name_b, b), a.size(1) == 1, b.size(1) == 1, num_slices};
  if (num_slices < 1 || out_features % num_slices) {
    fail("num_slices", std::to_string(num_slices), "a divisor of the output columns");
  }
  if (pair.a.n != num_slices * pair.b.k) fail(name_a, std::to_string(pair.a.n) + " rows", "num_slices * rank");
  for (const auto& [name, tensor] : {std::pair(name_a, &a), std::pair(name_b, &b)}) {
    const int64_t experts = tensor->size(1);
    if (experts != 1 && experts != num_experts) {
      fail(name, std::to_string(experts) + " experts", std::to_string(num_experts) + " or 1");
    }
  }
  return pair;
}

Rows shrink(const Stack& a, bool shared, const Routing& routing, const std::vector<int32_t>& pairs,
            const std::vector<const float*>& x) {
  Rows s(pairs.size(), a.n);
  multiply_groups(a, lora_groups(routing, shared, pairs), x, s.pointers());
  return s;
}

Rows expand(const Stack& b, bool shared, int64_t num_slices, const Routing& routing, const std::vector<int32_t>& pairs,
            Rows& s) {
  Rows delta(pairs.size(), b.n);
  const auto groups = lora_groups(routing, shared, pairs);
  const int64_t width = b.n / num_slices;
  for (int64_t slice = 0; slice < num_slices; ++slice) {
    const auto ranks = s.pointers(slice * b.k);
    multiply_groups(b.rows(slice * width, width), groups, {ranks.begin(), ranks.end()}, delta.pointers(slice * width));
  }
  return delta;
}

}  // namespace lora_moe
