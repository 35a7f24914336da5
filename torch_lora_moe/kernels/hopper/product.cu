// One expert product over the sorted pairs of a large batch, with LoRA: of gate_up with its activation, or of down.
//
// The weight is the left side of the tensor cores' product and the pairs are the right one, whose width comes in steps
// of eight. A tile is 256 rows of an expert's weight by up to 144 of its pairs, and as wide as they are: no product of
// rows that are not there. A program stays for many tiles; four of its warps bring what the eight others multiply, stage
// by stage. Behind the stages of the base product of a tile come those of LoRA: B of a run (the pairs of one adapter
// slot) or of a few, and their rank vectors, zero for the pairs of other runs.
//
// Where a tile has all pairs of its expert, nobody reads its weights again: L2 lets go of them first and of down's
// results last, which the sum over experts reads in the end.
//
// In front of it stand the constants of a launch (`hopper.py`), primitives.cuh, `multiply` for all widths, and tiles.cuh:
//   IN, OUT       summed columns; columns of the result
//   IS_GATED      gate_up with gate and up; IS_DOWN: down, which reads sorted rows and stores weighted ones by pair
//   STRIDE_X      of the rows of x, which are those of tokens (TOP_K pairs each)
//   RANK, RANKS   of LoRA, 0 for none; ranks of one stage. SHARED: one B for all experts
//   EARLY         the kernel before makes the rank vectors, and all else is complete from the start

__device__ __forceinline__ float activated(float x) {
  if (ACTIVATION == SILU) return x * sigmoid(x);
  if (ACTIVATION == GELU) return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
  // 0.5 (1 + tanh(z)) = sigmoid(2 z)
  if (ACTIVATION == GELU_TANH) return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
  const float positive = fmaxf(x, 0.0f);
  return positive * positive;
}

__device__ __forceinline__ float activated(float gate, float up, float alpha, float limit) {
  if (ACTIVATION != SWIGLUOAI) return activated(gate) * up;
  gate = fminf(gate, limit);
  up = fminf(fmaxf(up, -limit), limit);
  return (up + 1.0f) * gate * sigmoid(alpha * gate);
}

struct Maps {
  const TensorMap *w, *b, *tokens;
};

// first of the 128 rows of a part of the weight, or of B, and its slice
__device__ __forceinline__ int part_row(const Tile& tile, int part) { return tile.column * WIDE + (IS_GATED ? 0 : part * TALL); }
__device__ __forceinline__ int part_slice(int part) { return IS_GATED ? part : 0; }

#if RANK
// The stages of LoRA of a tile: of each B's rows as the weight's, and the rank vectors of the runs' pairs.
__device__ __forceinline__ void bring_lora(
    const Arguments& call, const Maps& maps, const Memory& memory, Known& known, const int* pairs, Stage& stage, int thread) {
  // a thread has 16 bytes of some rank vectors, the same ones in each run
  constexpr int CHUNKS = RANKS / 8, EACH = SLICES * CHUNKS, APART = 128 / EACH, OWN = (MOST + APART - 1) / APART;
  const Tile& tile = known.tile;
  const u64 priority = tile.is_alone && !SHARED ? goes_first() : goes_in_turn();
  const int slice = thread % EACH / CHUNKS, rank = thread % CHUNKS * 8, own_row = thread / EACH;
  const char* vectors[OWN];
#pragma unroll
  for (int q = 0; q < OWN; ++q) {
    const u32 pair = pairs[min(own_row + q * APART, tile.width - 1)];
    vectors[q] = call.shrunk + (u64)pair * (SLICES * RANK * 2) + (slice * RANK + rank) * 2;
  }
  const u32 offset = WEIGHT_BYTES + slice * (MOST * PITCH) + swizzled<PITCH>(own_row, rank / 8);
  int reach = known.reach(known.first_run);
#pragma unroll 1
  for (int run = known.first_run; run <= known.last_run;) {
    int matrices[RUNS], begins[RUNS], ends[RUNS];
    const int runs = min(RUNS, known.last_run + 1 - run);
#pragma unroll
    for (int i = 0; i < RUNS; ++i) {
      const int lane = (run + i - known.first_run) & 31;
      matrices[i] = of_lane(known.matrix, lane) / (SHARED ? NUM_EXPERTS : 1);
      // behind the last run there are none
      begins[i] = of_lane(known.begin, lane), ends[i] = of_lane(known.end, lane);
    }
    run += RUNS;
    if (((run - known.first_run) & 31) == 0) known.load_runs(call, run, thread & 31);
    const int width = lora_width(reach), next_reach = known.reach(run);
#pragma unroll 1
    for (int part = 0; part < RANK_PARTS; ++part) {
      const u32 full = memory.full(stage.slot), data = memory.stage(stage.slot);
      barrier_wait(memory.empty(stage.slot), stage.parity);
      if (thread == 0) {
        memory.note(stage.slot)[0] = part + 1 < RANK_PARTS ? reach : next_reach;
        barrier_announce(full, runs * 2 * TALL * PITCH);
#pragma unroll
        for (int i = 0; i < 2 * RUNS; ++i)
          if (i / 2 < runs)
            copy_box(data + i * TALL * PITCH, maps.b, full, part * RANKS, part_row(tile, i & 1), part_slice(i & 1),
                     matrices[i / 2], priority);
      }
      const bool is_rank = RANK % RANKS == 0 || part * RANKS + rank < RANK;
#pragma unroll
      for (int i = 0; i < RUNS; ++i)
#pragma unroll
        for (int q = 0; q < OWN; ++q)
          if (q * APART < width && ((q + 1) * APART <= MOST || own_row + q * APART < MOST)) {
            const bool is_own = (u32)(own_row + q * APART - begins[i]) < (u32)(ends[i] - begins[i]) && is_rank;
            const u32 target = data + offset + i * (SLICES * MOST * PITCH) + q * (APART * PITCH);
            copy16(target, vectors[q] + part * (RANKS * 2), is_own ? 16 : 0);
          }
      copies_arrive(full);
      stage.next();
    }
    reach = next_reach;
  }
}
#endif

// The part of the warps that bring: all stages of all tiles of this program.
__device__ __forceinline__ void bring(const Arguments& call, const Maps& maps, const Memory& memory) {
  const int thread = threadIdx.x, all_tiles = memory.tiles()[NUM_EXPERTS] * COLUMN_TILES;
  Stage stage = {0, 1};
  bool waited = !EARLY;
  int kept = 0;
  // a thread has 16 bytes of every sixteenth row of x
  const int chunk = thread & 7, own_row = thread >> 3;
  const u32 offset = WEIGHT_BYTES + swizzled<128>(own_row, chunk);
  Known next;
  if ((int)blockIdx.x < all_tiles) {
    next.find(call, memory, blockIdx.x, thread);
    next.look_up(call, memory.pairs(0), thread);
  }
  for (int number = blockIdx.x; number < all_tiles; number += gridDim.x, kept = (kept + 1) % KEPT_TILES) {
    Known known = next;
    const Tile& tile = known.tile;
    const u64 priority = tile.is_alone ? goes_first() : goes_in_turn();
    const int *pairs = memory.pairs(kept), number_after = number + gridDim.x;
#pragma unroll
    for (int j = 0; j < 2; ++j)
      if (IS_DOWN && thread + j * 128 < MOST) memory.scales(kept)[thread + j * 128] = known.scales[j];
    group_sync(PRODUCERS);
    const char* rows[MOST / 16];
#pragma unroll
    for (int q = 0; q < MOST / 16; ++q) {
      const u32 token = IS_DOWN ? 0 : pairs[min(own_row + 16 * q, tile.width - 1)] / TOP_K;
      rows[q] = call.tokens + (u64)token * (STRIDE_X * 2) + chunk * 16;
    }
#pragma unroll 4
    for (int step = 0; step < STEPS; ++step) {
#if RANK
      // looked up while stages are waited for: before the tile its first ones would wait for it
      if (step == STEPS - 2) known.find_runs(call);
      if (step == STEPS - 1) known.load_runs(call, known.first_run, thread & 31);
#endif
      const u32 full = memory.full(stage.slot), data = memory.stage(stage.slot);
      barrier_wait(memory.empty(stage.slot), stage.parity);
      const int reach = RANK && step == STEPS - 1 ? known.reach(known.first_run) : 0;
      if (thread == 0) {
        int* note = memory.note(stage.slot);
        if (step == 0) {
          note[0] = tile.start, note[1] = tile.count, note[2] = tile.expert, note[3] = tile.column;
          note[4] = kept, note[5] = tile.is_alone;
        } else if (step == STEPS - 1) {
          note[0] = reach;
        }
        barrier_announce(full, WEIGHT_BYTES + (IS_DOWN ? TOKEN_BYTES : 0));
#pragma unroll
        for (int part = 0; part < 2; ++part)
          copy_box(data + part * PART_BYTES, maps.w, full, step * DEPTH, part_row(tile, part), part_slice(part),
                   tile.expert, priority);
        // rows behind those of the tile are others', whose products are never stored
        if (IS_DOWN) copy_rows(data + WEIGHT_BYTES, maps.tokens, full, step * DEPTH, tile.start);
      }
      if (!IS_DOWN) {
        const u32 bytes = IN % DEPTH == 0 || step * DEPTH + chunk * 8 < IN ? 16 : 0;
        if (tile.width > MOST - 16) {
#pragma unroll
          for (int q = 0; q < MOST / 16; ++q) copy16(data + offset + q * 2048, rows[q] + step * (DEPTH * 2), bytes);
        } else {
#pragma unroll
          for (int q = 0; q < MOST / 16 - 1; ++q)
            if (16 * q < tile.width) copy16(data + offset + q * 2048, rows[q] + step * (DEPTH * 2), bytes);
        }
      }
      copies_arrive(full);
      stage.next();
      // of the tile after this one, so that nothing waits for it then
      if (step == 0 && number_after < all_tiles) next.find(call, memory, number_after, thread);
      if (step == 1 && number_after < all_tiles) next.look_up(call, memory.pairs((kept + 1) % KEPT_TILES), thread);
    }
#if RANK
    if (!waited) wait_for_producer();
    waited = true;
    bring_lora(call, maps, memory, known, pairs, stage, thread);
#endif
  }
  // the end of this kernel means the end of the one before
  if (!waited) wait_for_producer();
}

// What a group multiplies: its sums of both parts, the stage it is at, and the stage whose products are under way.
struct Group {
  Memory memory;
  int number, thread;
  Stage stage;
  u32 under_way;

  // ends the products of a stage; those of the stage before are done then, and its memory is free
  __device__ __forceinline__ void end_stage() {
    products_end();
    if (under_way) {
      products_wait<1>();
      if (thread % 32 == 0) barrier_arrive(under_way);
    }
    under_way = memory.empty(stage.slot);
    stage.next();
  }

  __device__ __forceinline__ void finish() {
    products_wait<0>();
    if (thread % 32 == 0) barrier_arrive(under_way);
    under_way = 0;
  }
};

// `sums` of the first `WIDTH` pairs of the tile, whose first stage is there; returns the reach of LoRA's first stage
template <int WIDTH>
__device__ __forceinline__ int base_product(float (&sums)[2][MOST / 2], Group& group) {
  int reach = 0;
  // unrolled it would be many times the code, once for each width
#pragma unroll 1
  for (int step = 0; step < STEPS; ++step) {
    if (step > 0) barrier_wait(group.memory.full(group.stage.slot), group.stage.parity);
    writes_are_there();
    products_start();
    const u32 data = group.memory.stage(group.stage.slot);
    const u64 left = matrix_descriptor<128>(data + (group.number - 1) * (64 * 128));
    const u64 right = matrix_descriptor<128>(data + WEIGHT_BYTES);
#pragma unroll
    for (int k = 0; k < DEPTH / 16; ++k) {
      multiply<WIDTH>(sums[0], left + 2 * k, right + 2 * k, step + k > 0);
      multiply<WIDTH>(sums[1], left + PART_BYTES / 16 + 2 * k, right + 2 * k, step + k > 0);
    }
    if (RANK) reach = group.memory.note(group.stage.slot)[0];
    group.end_stage();
  }
  return reach;
}

#if RANK
// NaN and infinities of B become the largest numbers: the zeros of other runs' pairs meet them, and 0 * NaN is NaN.
__device__ __forceinline__ void make_finite(const Group& group, u32 data) {
  constexpr int LINES = 2 * RUNS * (PITCH / 32);
  const u32 own = data + (group.number - 1) * (64 * PITCH) + group.thread * 16;
  u32 sum = 0;
#pragma unroll
  for (int i = 0; i < LINES; ++i) {
    const uint4 line = load_line(own + i / (PITCH / 32) * (TALL * PITCH) + i % (PITCH / 32) * 2048);
    sum = add_zero_times(line.x, add_zero_times(line.y, add_zero_times(line.z, add_zero_times(line.w, sum))));
  }
  if (any_of_group(group.number, (sum & 0x7FFF7FFF) != 0)) {
#pragma unroll 1
    for (int i = 0; i < LINES; ++i) {
      const u32 at = own + i / (PITCH / 32) * (TALL * PITCH) + i % (PITCH / 32) * 2048;
      const uint4 line = load_line(at);
      store_line(at, {finite(line.x), finite(line.y), finite(line.z), finite(line.w)});
    }
    writes_are_there();
    group_sync(group.number);
  }
}

// Adds LoRA in stages of one width; returns the reach of the next stage, 0 behind the last one.
template <int WIDTH>
__device__ __forceinline__ int lora_product(float (&sums)[2][MOST / 2], Group& group) {
  int reach;
#pragma unroll 1
  do {
    const u32 data = group.memory.stage(group.stage.slot);
    barrier_wait(group.memory.full(group.stage.slot), group.stage.parity);
    reach = group.memory.note(group.stage.slot)[0];
    make_finite(group, data);
    writes_are_there();
    products_start();
    const u64 left = matrix_descriptor<PITCH>(data + (group.number - 1) * (64 * PITCH));
    const u64 right = matrix_descriptor<PITCH>(data + WEIGHT_BYTES);
#pragma unroll
    for (int i = 0; i < RUNS; ++i)
#pragma unroll
      for (int k = 0; k < RANKS / 16; ++k)
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          const u64 b = left + (i * 2 + part) * (TALL * PITCH / 16) + 2 * k;
          const u64 vectors = right + (i * SLICES + part_slice(part)) * (MOST * PITCH / 16) + 2 * k;
          multiply<WIDTH>(sums[part], b, vectors, true);
        }
    group.end_stage();
  } while (reach && lora_width(reach) == WIDTH);
  return reach;
}
#endif

// Stores a tile: activation or router weight, and the sums turned around, so that a pair's columns are neighbours.
__device__ __forceinline__ void store_tile(
    const Arguments& call, const float (&sums)[2][MOST / 2], const Group& group, const int* note, u32& turned) {
  const int start = note[0], count = note[1], expert = note[2], column = note[3], kept = note[4];
  const int thread = group.thread, warp = thread >> 5, lane = thread & 31;
  const int* pairs = group.memory.pairs(kept);
  const float* scales = group.memory.scales(kept);
  const u64 priority = IS_DOWN && note[5] ? goes_last() : goes_in_turn();
  const u32 patches = group.memory.base + TURNED + (group.number - 1) * (2 * TURNED_BYTES);
#pragma unroll
  for (int part = 0; part < 3 - SLICES; ++part) {
    const int first_column = column * WIDE + part * TALL + (group.number - 1) * 64;
    float bias[2][2] = {};
#pragma unroll
    for (int i = 0; i < (HAS_BIAS ? 2 * SLICES : 0); ++i) {
      const int slice = i / 2, c = first_column + warp * 16 + (lane >> 2) + i % 2 * 8;
      const int at = INTERLEAVED ? 2 * c + slice : slice * OUT + c;
      if (c < OUT) bias[slice][i % 2] = load<BIAS_KIND>(call.bias, (u64)expert * (SLICES * OUT) + at);
    }
    // the eight results of a thread for 32 pairs, two to a register
    auto results = [&](int turn, u32 (&packed)[8]) {
#pragma unroll
      for (int block = turn * 4; block < min(turn * 4 + 4, MOST / 8); ++block) {
        float values[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float sum = sums[part][block * 4 + j];
          if (HAS_BIAS) sum += bias[0][j / 2];
          if (IS_DOWN) {
            values[j] = sum * scales[block * 8 + 2 * (lane & 3) + j % 2];
          } else if (IS_GATED) {
            float up = sums[1][block * 4 + j];
            if (HAS_BIAS) up += bias[1][j / 2];
            values[j] = activated(sum, up, call.alpha, call.limit);
          } else {
            values[j] = activated(sum);
          }
        }
        packed[(block - turn * 4) * 2] = pack(values[0], values[1]);
        packed[(block - turn * 4) * 2 + 1] = pack(values[2], values[3]);
      }
    };
    u32 packed[8], next[8];
    results(0, packed);
#pragma unroll
    for (int turn = 0; turn < (MOST + 31) / 32; ++turn) {
      if (turn * 32 >= count) break;
      // two take turns, so that one can be read while the other is written
      const u32 patch = patches + turned;
      turned ^= TURNED_BYTES;
#pragma unroll
      for (int half = 0; half < min(2, MOST / 16 - turn * 2); ++half) {
        const int row = half * 16 + (lane >> 4) * 8 + (lane & 7), chunk = warp * 2 + ((lane >> 3) & 1);
        store_turned(patch + swizzled<128>(row, chunk), packed + half * 4);
      }
      if ((turn + 1) * 32 < MOST) results(turn + 1, next);
      group_sync(group.number);
      uint4 lines[2];
      u64 targets[2];
      const int chunk = thread & 7, at = first_column + chunk * 8;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = half * 16 + (thread >> 3), own = turn * 32 + row;
        lines[half] = load_line(patch + swizzled<128>(row, chunk));
        targets[half] = (u64)(u32)(IS_DOWN ? pairs[own] : start + own) * OUT + at;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (turn * 32 + half * 16 + (thread >> 3) < count && (OUT % WIDE == 0 || at < OUT))
          store_global(call.out + targets[half], lines[half], priority);
#pragma unroll
      for (int i = 0; i < 8; ++i) packed[i] = next[i];
    }
  }
}

// The part of the warps that multiply: 64 rows of each part of the weight of all tiles of this program.
__device__ __forceinline__ void multiply_tiles(const Arguments& call, const Memory& memory) {
  const int all_tiles = memory.tiles()[NUM_EXPERTS] * COLUMN_TILES;
  Group group = {memory, (int)threadIdx.x / 128, (int)threadIdx.x % 128, {0, 0}, 0};
  float sums[2][MOST / 2];
  u32 turned = 0;
  for (int number = blockIdx.x; number < all_tiles; number += gridDim.x) {
    barrier_wait(memory.full(group.stage.slot), group.stage.parity);
    const int* first = memory.note(group.stage.slot);
    const int note[6] = {first[0], first[1], first[2], first[3], first[4], first[5]};
    int reach;
#define WIDTH(BLOCKS) case BLOCKS: reach = base_product<BLOCKS * 8>(sums, group); break;
    switch (max(note[1] + 7, 8) >> 3) {
      WIDTH(1) WIDTH(2) WIDTH(3) WIDTH(4) WIDTH(5) WIDTH(6) WIDTH(7) WIDTH(8) WIDTH(9)
      WIDTH(10) WIDTH(11) WIDTH(12) WIDTH(13) WIDTH(14) WIDTH(15) WIDTH(16) WIDTH(17) WIDTH(18)
      default: __builtin_unreachable();
    }
#undef WIDTH
#if RANK
    while (reach) {
      const int width = lora_width(reach);
      if (width == 40) reach = lora_product<40>(sums, group);
      else if (width == 72) reach = lora_product<72>(sums, group);
      else if (width == 104) reach = lora_product<104>(sums, group);
      else reach = lora_product<MOST>(sums, group);
    }
#endif
    group.finish();
    store_tile(call, sums, group, note, turned);
  }
}

extern "C" __global__ __launch_bounds__(384, 1) void expert_product(
    const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap b_map,
    const __grid_constant__ TensorMap token_map, const char* tokens, u16* out, const char* shrunk, const void* bias,
    const void* topk_weights, const int* schedule, int num_pairs, float alpha, float limit) {
  extern __shared__ __align__(1024) char shared[];
  const Memory memory = {shared, shared_address(shared)};
  const Arguments call = {tokens, out, shrunk, bias, topk_weights, schedule, num_pairs, alpha, limit};
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < STAGES; ++slot) {
      barrier_init(memory.full(slot), 129);  // 128 threads' copies, and those of the copy engine
      barrier_init(memory.empty(slot), 8);   // warps that multiply
    }
    barriers_are_made();
  }
  if (!EARLY) wait_for_producer();
  release_consumer();
  make_tables(call, memory.starts(), memory.tiles());
  if (threadIdx.x < 128) {
    give_registers();
    bring(call, {&w_map, &b_map, &token_map}, memory);
  } else {
    take_registers();
    multiply_tiles(call, memory);
  }
}
