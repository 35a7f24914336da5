// lora_moe::route: the schedule, laid out as torch_lora_moe/routing.py says.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "kernels.h"

namespace lora_moe {
namespace {

constexpr int64_t kRunRows = 256, kUnsortedPairs = 1024;

int64_t expert_tile_rows(int64_t num_pairs, int64_t num_experts) {
  int64_t rows = 16;
  while (rows < 128 && 2 * num_pairs > (rows == 16 ? 23 : rows == 32 ? 56 : 120) * num_experts) rows *= 2;
  return rows;
}

bool cuts_runs(int64_t num_pairs, int64_t num_virtual_experts) {
  const bool many = num_pairs > kUnsortedPairs || num_pairs >= std::max<int64_t>(64, num_virtual_experts);
  return num_virtual_experts > 0 && many;
}

// Three rows of the schedule (id, start, rows) that are filled entry by entry.
struct Table {
  int32_t* rows;
  int64_t width, used = 0;

  void add(int64_t id, int64_t start, int64_t count) {
    rows[used] = static_cast<int32_t>(id);
    rows[width + used] = static_cast<int32_t>(start);
    rows[2 * width + used] = static_cast<int32_t>(count);
    ++used;
  }
  void finish() {
    for (int64_t row = 0; row < 3; ++row) rows[row * width + width - 1] = static_cast<int32_t>(used);
  }
};

}  // namespace

Tensor route(Tensor topk_ids, Optional mapping, Optional enabled, int64_t num_experts, int64_t max_loras) {
  const Routing routing(topk_ids, mapping, enabled, num_experts, max_loras);
  const int64_t width = routing.num_pairs + 1;
  Tensor schedule = torch::stable::new_empty(topk_ids, {kScheduleRows, width}, torch::headeronly::ScalarType::Int);
  auto* data = static_cast<int32_t*>(schedule.data_ptr());
  std::fill_n(data, kScheduleRows * width, -1);

  const auto pairs = routing.order();
  for (size_t i = 0; i < pairs.size(); ++i) {
    data[i] = pairs[i];
    data[width + i] = static_cast<int32_t>(routing.virtual_expert(pairs[i]));
  }
  data[width - 1] = data[2 * width - 1] = static_cast<int32_t>(pairs.size());

  Table tiles{data + 2 * width, width}, runs{data + 5 * width, width};
  const int64_t height = expert_tile_rows(routing.num_pairs, num_experts);
  for (const Group& group : groups_of(pairs, [&](int32_t pair) { return routing.experts[pair]; })) {
    for (int64_t row = group.begin; row < group.end; row += height) {
      tiles.add(group.weight, row, std::min(height, group.end - row));
    }
  }
  int32_t* run_ids = data + 8 * width;
  run_ids[width - 1] = 0;
  if (cuts_runs(routing.num_pairs, num_experts * max_loras)) {
    run_ids[width - 1] = static_cast<int32_t>(pairs.size());
    for (const Group& group : groups_of(pairs, [&](int32_t pair) { return routing.virtual_expert(pair); })) {
      if (group.weight < 0) std::fill(run_ids + group.begin, run_ids + group.end, static_cast<int32_t>(runs.used));
      for (int64_t row = group.begin; group.weight >= 0 && row < group.end;) {
        const int64_t stop = std::min(group.end, (row / kRunRows + 1) * kRunRows);
        std::fill(run_ids + row, run_ids + stop, static_cast<int32_t>(runs.used));
        runs.add(group.weight, row, stop - row);
        row = stop;
      }
    }
  }
  tiles.finish();
  runs.finish();
  return schedule;
}

}  // namespace lora_moe
