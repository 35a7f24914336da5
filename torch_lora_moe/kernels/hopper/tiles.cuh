// The tiles of an expert product and where all of a program stands in its shared memory; product.cu says what a tile is.

constexpr int STAGES = 4, DEPTH = 64;
// rows of a part of the weight, of which a tile has two: gate and up, or one behind the other; pairs of a tile
constexpr int TALL = 128, MOST = 144;
constexpr int PART_BYTES = TALL * DEPTH * 2, WEIGHT_BYTES = 2 * PART_BYTES, TOKEN_BYTES = MOST * DEPTH * 2;
constexpr int STAGE_BYTES = WEIGHT_BYTES + TOKEN_BYTES;
constexpr int SLICES = IS_GATED ? 2 : 1;
// columns of the result of a tile
constexpr int WIDE = IS_GATED ? TALL : 2 * TALL;
constexpr int COLUMN_TILES = (OUT + WIDE - 1) / WIDE;
constexpr int STEPS = (IN + DEPTH - 1) / DEPTH;
static_assert(STEPS > 1, "what is known of a tile is looked up during the first two steps of the one before");
// runs of one stage of LoRA, bytes of a row of it, stages for all ranks
constexpr int RUNS = RANK ? 64 / (RANKS * SLICES) : 1, PITCH = RANKS * 2, RANK_PARTS = (RANK + RANKS - 1) / RANKS;
// what is known of so many tiles is kept; a tile has two stages at least, so no more are under way
constexpr int KEPT_TILES = 4;

// Shared memory: the stages, 64 columns by 32 pairs of results turned around (two for each group), ...
constexpr int TURNED_BYTES = 32 * 128, TURNED = STAGES * STAGE_BYTES;
// ... the pairs of the kept tiles and their router weights, the notes of each stage, ...
constexpr int PAIRS = TURNED + 2 * 2 * TURNED_BYTES, SCALES = PAIRS + KEPT_TILES * MOST * 4;
constexpr int NOTES = SCALES + KEPT_TILES * MOST * 4, NOTE_BYTES = 32;
// ... the barriers of full and of empty stages, and where pairs and tiles of each expert start.
constexpr int BARRIERS = NOTES + STAGES * NOTE_BYTES, TABLES = BARRIERS + 2 * STAGES * 8;
static_assert(TABLES + 2 * (NUM_EXPERTS + 1) * 4 == SHARED_BYTES, "as the host has it");

constexpr int PRODUCERS = 3;  // number of their group; 1 and 2: those that multiply

struct Arguments {
  const char* tokens;
  u16* out;
  const char* shrunk;
  const void* bias;
  const void* topk_weights;
  const int* schedule;
  int num_pairs;
  float alpha, limit;

  // rows of the schedule, see `routing.py`
  __device__ __forceinline__ const int* row(int number) const { return schedule + number * (num_pairs + 1); }
};

struct Memory {
  char* memory;
  u32 base;

  __device__ __forceinline__ u32 stage(int slot) const { return base + slot * STAGE_BYTES; }
  __device__ __forceinline__ u32 full(int slot) const { return base + BARRIERS + slot * 8; }
  __device__ __forceinline__ u32 empty(int slot) const { return full(slot) + STAGES * 8; }
  // of the first stage of a tile: start, count, expert, column, number of the kept tile, is_alone; of the last one of
  // the base product, and of a stage of LoRA: width of the next one
  __device__ __forceinline__ int* note(int slot) const { return (int*)(memory + NOTES + slot * NOTE_BYTES); }
  __device__ __forceinline__ int* pairs(int kept) const { return (int*)(memory + PAIRS) + kept * MOST; }
  __device__ __forceinline__ float* scales(int kept) const { return (float*)(memory + SCALES) + kept * MOST; }
  __device__ __forceinline__ int* starts() const { return (int*)(memory + TABLES); }
  __device__ __forceinline__ int* tiles() const { return starts() + NUM_EXPERTS + 1; }
};

struct Stage {
  int slot, parity;

  __device__ __forceinline__ void next() {
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    parity ^= slot == 0;
  }
};

// KIND: 0 fp32, 1 bf16, 2 fp16
template <int KIND>
__device__ __forceinline__ float load(const void* values, u64 index) {
  if (KIND == 0) return ((const float*)values)[index];
  const u16 value = ((const u16*)values)[index];
  return KIND == 1 ? from_bits((u32)value << 16) : from_f16(value);
}

// where 16 bytes of a row stand as the copy engine swizzles rows of `BYTES` bytes
template <int BYTES>
__device__ __forceinline__ u32 swizzled(int row, int chunk) {
  constexpr int shift = BYTES == 128 ? 0 : BYTES == 64 ? 1 : 2;
  return row * BYTES + ((chunk ^ ((row >> shift) & (BYTES / 16 - 1))) << 4);
}

__device__ __forceinline__ int tiles_of(int pairs) { return (pairs + MOST - 1) / MOST; }

// Where the pairs and the tiles of each expert start, from the schedule's own tiles of one height; by all threads.
__device__ __forceinline__ void make_tables(const Arguments& call, int* starts, int* tiles) {
  const int *ids = call.row(2), *firsts = call.row(3), *rows = call.row(4), used = ids[call.num_pairs];
  for (int e = threadIdx.x; e < NUM_EXPERTS; e += blockDim.x) starts[e] = tiles[e] = 0;
  __syncthreads();
  // first and last of an expert's tiles: its first pair, and the one behind its last
  for (int i = threadIdx.x; i < used; i += blockDim.x) {
    const int id = ids[i];
    if (i == 0 || ids[i - 1] != id) starts[id] = firsts[i];
    if (i + 1 == used || ids[i + 1] != id) tiles[id] = firsts[i] + rows[i];
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    constexpr int EACH = (NUM_EXPERTS + 31) / 32;
    const int first = threadIdx.x * EACH, end = min(first + EACH, NUM_EXPERTS);
    int pairs_here = 0, tiles_here = 0;
    for (int e = first; e < end; ++e) {
      pairs_here += tiles[e] - starts[e];
      tiles_here += tiles_of(tiles[e] - starts[e]);
    }
    int pair = pairs_here, tile = tiles_here;
    for (int d = 1; d < 32; d *= 2) {
      const int pairs_before = of_lane_before(pair, d), tiles_before = of_lane_before(tile, d);
      if (threadIdx.x >= d) pair += pairs_before, tile += tiles_before;
    }
    if (threadIdx.x == 31) starts[NUM_EXPERTS] = pair, tiles[NUM_EXPERTS] = tile;
    pair -= pairs_here, tile -= tiles_here;
    for (int e = first; e < end; ++e) {
      const int count = tiles[e] - starts[e];
      starts[e] = pair, tiles[e] = tile;
      pair += count, tile += tiles_of(count);
    }
  }
  __syncthreads();
}

// `width` is `count`, at least one, in eights; `is_alone`: it has all pairs of its expert
struct Tile {
  int expert, start, count, width, column;
  bool is_alone;
};

// Tiles go expert by expert, those of the same weights next to each other; an expert's pairs are spread evenly.
__device__ __forceinline__ Tile find_tile(const int* starts, const int* tiles, int number) {
  int expert = 0, beyond = NUM_EXPERTS;
  while (beyond - expert > 1) {
    const int middle = (expert + beyond) >> 1;
    if (tiles[middle] * COLUMN_TILES <= number) expert = middle; else beyond = middle;
  }
  const int inside = number - tiles[expert] * COLUMN_TILES, along = tiles[expert + 1] - tiles[expert];
  const int total = starts[expert + 1] - starts[expert], each = ((total + along - 1) / along + 7) & ~7;
  Tile tile;
  tile.expert = expert;
  tile.column = inside / along;
  tile.is_alone = along == 1;
  const int skipped = (inside - tile.column * along) * each;
  // the last of many small ones can have none
  tile.count = max(0, min(each, total - skipped));
  tile.start = starts[expert] + min(skipped, total - 1);
  tile.width = max(8, (tile.count + 7) & ~7);
  return tile;
}

// widths that LoRA's products come in
__device__ __forceinline__ int lora_width(int pairs) { return pairs <= 40 ? 40 : pairs <= 72 ? 72 : pairs <= 104 ? 104 : MOST; }

// What those who bring know of a tile: its pairs, two to a thread, and 32 of its runs, one to a lane.
struct Known {
  Tile tile;
  int pairs[2], first_run, last_run, matrix, begin, end;
  float scales[2];

  __device__ __forceinline__ void find(const Arguments& call, const Memory& memory, int number, int thread) {
    tile = find_tile(memory.starts(), memory.tiles(), number);
#pragma unroll
    for (int j = 0; j < 2; ++j) pairs[j] = call.schedule[tile.start + max(0, min(thread + j * 128, tile.count - 1))];
  }

  // its first and last run
  __device__ __forceinline__ void find_runs(const Arguments& call) {
    first_run = 0, last_run = -1;
    if (tile.count == 0) return;
    const int last = tile.start + tile.count - 1;
    const int first_there = call.row(8)[tile.start], last_there = call.row(8)[last];
    // pairs without LoRA come first: if the last one is such, all are
    if (call.row(1)[last] >= 0) first_run = first_there, last_run = last_there;
  }

  // once `find` is through
  __device__ __forceinline__ void look_up(const Arguments& call, int* kept_pairs, int thread) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (thread + j * 128 < MOST) kept_pairs[thread + j * 128] = pairs[j];
      if (IS_DOWN) scales[j] = load<WEIGHTS_KIND>(call.topk_weights, pairs[j]);
    }
  }

  __device__ __forceinline__ void load_runs(const Arguments& call, int first, int lane) {
    matrix = begin = end = 0;
    if (first + lane <= last_run) {
      matrix = call.row(5)[first + lane];
      begin = call.row(6)[first + lane] - tile.start;
      end = min(begin + call.row(7)[first + lane], tile.count);
      begin = max(begin, 0);
    }
  }

  // pairs that the stage of LoRA which begins with `run` reaches to, 0 behind the last one
  __device__ __forceinline__ int reach(int run) const {
    const int pairs = of_lane(end, (min(run + RUNS - 1, last_run) - first_run) & 31);
    return run > last_run ? 0 : pairs;
  }
};
