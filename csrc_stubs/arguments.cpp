#include "arguments.h"

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace lora_moe {
namespace {

using torch::headeronly::ScalarType;

std::string text(const std::vector<int64_t>& sizes) {
  std::string out = "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    out += (i ? ", " : "") + (sizes[i] < 0 ? std::string("any") : std::to_string(sizes[i]));
  }
  return out + "]";
}

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  std::vector<int64_t> sizes(tensor.dim());
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes[i] = tensor.size(i);
  return sizes;
}

// Ids of type int32 or int64 that lie in [0, limit); -1 for the others.
std::vector<int32_t> ids_below(const char* name, const Tensor& tensor, int64_t limit) {
  check_contiguous(name, tensor);
  const auto type = tensor.scalar_type();
  if (type != ScalarType::Int && type != ScalarType::Long) fail(name, "another dtype", "int32 or int64");
  std::vector<int32_t> ids(tensor.numel());
  const void* data = tensor.data_ptr();
  for (size_t i = 0; i < ids.size(); ++i) {
    const int64_t id =
        type == ScalarType::Int ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
    ids[i] = id >= 0 && id < limit ? static_cast<int32_t>(id) : -1;
  }
  return ids;
}

}  // namespace

void fail(const std::string& name, const std::string& got, const std::string& expected) {
  throw std::runtime_error(name + ": got " + got + ", expected " + expected);
}

void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& sizes) {
  if (!tensor.is_cpu()) fail(name, "a tensor on another device", "one on the CPU");
  const auto actual = sizes_of(tensor);
  bool fits = actual.size() == sizes.size();
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = sizes[i] < 0 || sizes[i] == actual[i];
  if (!fits) fail(name, "shape " + text(actual), text(sizes));
}

void check_contiguous(const char* name, const Tensor& tensor) {
  if (!tensor.is_contiguous()) fail(name, "a tensor that is not contiguous", "a contiguous one");
}

Float float_type(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Float::f32;
    case ScalarType::BFloat16:
      return Float::bf16;
    case ScalarType::Half:
      return Float::f16;
    case ScalarType::Double:
      return Float::f64;
    default:
      fail(name, "another dtype", "fp32, bf16 or fp16");
  }
}

Floats::Floats(const char* name, const Tensor& tensor) : data(tensor.data_ptr()), type(float_type(name, tensor)) {
  for (int64_t i = 0; i < tensor.dim(); ++i) strides.push_back(tensor.stride(i));
}

Routing::Routing(
    const Tensor& topk_ids, const Optional& mapping, const Optional& enabled, int64_t num_experts, int64_t slots_)
    : num_experts(num_experts), max_loras(slots_) {
  check_shape("topk_ids", topk_ids, {-1, -1});
  if (topk_ids.size(1) < 1) fail("topk_ids", "top_k 0", "at least 1");
  if (num_experts < 1) fail("num_experts", std::to_string(num_experts), "at least 1");
  if (max_loras < 0) fail("max_loras", std::to_string(max_loras), "at least 0");
  num_tokens = topk_ids.size(0), top_k = topk_ids.size(1), num_pairs = num_tokens * top_k;
  experts = ids_below("topk_ids", topk_ids, num_experts);
  if (!mapping || max_loras == 0) {
    slots.assign(num_tokens, -1);
    return;
  }
  check_shape("token_lora_mapping", *mapping, {num_tokens});
  slots = ids_below("token_lora_mapping", *mapping, max_loras);
  if (!enabled) return;
  check_shape("adapter_enabled", *enabled, {max_loras});
  check_contiguous("adapter_enabled", *enabled);
  const bool wide = enabled->scalar_type() == ScalarType::Int;
  if (!wide && enabled->scalar_type() != ScalarType::Bool) fail("adapter_enabled", "another dtype", "bool or int32");
  const void* flags = enabled->data_ptr();
  for (auto& slot : slots) {
    if (slot < 0) continue;
    const bool on = wide ? static_cast<const int32_t*>(flags)[slot] != 0 : static_cast<const bool*>(flags)[slot];
    if (!on) slot = -1;
  }
}

std::vector<int32_t> Routing::order() const {
  std::vector<int32_t> pairs(num_pairs);
  std::iota(pairs.begin(), pairs.end(), 0);
  pairs.erase(
      std::remove_if(pairs.begin(), pairs.end(), [&](int32_t pair) { return experts[pair] < 0; }), pairs.end());
  std::stable_sort(pairs.begin(), pairs.end(), [&](int32_t a, int32_t b) {
    return experts[a] != experts[b] ? experts[a] < experts[b] : slot_of(a) < slot_of(b);
  });
  return pairs;
}

}  // namespace lora_moe
