// What the ops read of their tensor arguments, checked: names, what came and what was expected are in every error.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "linear.h"

namespace lora_moe {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Rows of a schedule, see torch_lora_moe/routing.py.
constexpr int64_t kScheduleRows = 9;

[[noreturn]] void fail(const std::string& name, const std::string& got, const std::string& expected);

// Raises unless the tensor is on the CPU, has this many dimensions and, where sizes are not -1, these sizes.
void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& sizes);
void check_contiguous(const char* name, const Tensor& tensor);

// The element type of a tensor of floats.
Float float_type(const char* name, const Tensor& tensor);

// Data of a float tensor of any strides, for reading and writing single values and rows.
struct Floats {
  Floats(const char* name, const Tensor& tensor);
  void* data;
  Float type;
  std::vector<int64_t> strides;
};

// Which adapter slot and which expert each pair has: -1 where it has none.
struct Routing {
  Routing(const Tensor& topk_ids, const Optional& mapping, const Optional& enabled, int64_t num_experts, int64_t slots);
  int64_t num_tokens, top_k, num_pairs, num_experts, max_loras;
  std::vector<int32_t> experts;  // by pair
  std::vector<int32_t> slots;    // by token

  int64_t slot_of(int64_t pair) const { return slots[pair / top_k]; }
  // slot * num_experts + expert, -1 where LoRA skips the pair
  int64_t virtual_expert(int64_t pair) const {
    const int64_t slot = slot_of(pair), expert = experts[pair];
    return slot < 0 || expert < 0 ? -1 : slot * num_experts + expert;
  }
  // Pairs of known experts by (expert, slot), equal ones in their own order.
  std::vector<int32_t> order() const;
};

// Neighbours in a list of pairs that meet the same matrix.
struct Group {
  int64_t weight, begin, end;
};

// Groups of a sorted list of pairs by `key(pair)`.
template <class Key>
std::vector<Group> groups_of(const std::vector<int32_t>& pairs, const Key& key) {
  std::vector<Group> groups;
  for (size_t i = 0; i < pairs.size(); ++i) {
    const int64_t weight = key(pairs[i]), row = static_cast<int64_t>(i);
    if (groups.empty() || groups.back().weight != weight) groups.push_back({weight, row, row});
    groups.back().end = row + 1;
  }
  return groups;
}

}  // namespace lora_moe
