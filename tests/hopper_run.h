// Behind the kernel: its launch, program by program.

static Barrier& barrier_at(u32 address) {
  if (address < BARRIERS || address % 8) fail("no barrier there");
  return barriers[(address - BARRIERS) / 8];
}
// an empty stage is poison, so that nobody can still read what it held
static void given_back(u32 address) {
  const int number = (address - BARRIERS) / 8;
  if (number >= STAGES) std::memset(shared + (number - STAGES) * STAGE_BYTES, 0xFF, STAGE_BYTES);
}

static void run_thread();
static Work kernel;
static void run_thread() {
  kernel();
  self().ended = true;
  pause();
}

// some of the copies that are under way land
static void land(std::deque<Work>& copies) {
  for (u64 most = random_numbers() % 24; most && !copies.empty(); --most) {
    copies.front()();
    copies.pop_front();
  }
}

static void run_program() {
  std::memset(shared, 0xFF, sizeof shared);
  for (Meeting& meeting : group_meetings) meeting = {};
  for (Meeting& meeting : warp_meetings) meeting = {};
  all_threads = {};
  threads.assign(THREADS, {});
  stacks.resize(THREADS, std::vector<char>(64 * 1024));
  for (int i = 0; i < THREADS; ++i) {
    getcontext(&threads[i].context);
    threads[i].context.uc_stack.ss_sp = stacks[i].data();
    threads[i].context.uc_stack.ss_size = stacks[i].size();
    makecontext(&threads[i].context, run_thread, 0);
  }
  was_waited = false;
  for (int ended = 0; ended < THREADS;) {
    // whole rounds from a random thread on, so that none is left behind for long
    const u32 first = random_numbers() % THREADS;
    for (u32 i = 0; i < THREADS; ++i) {
      threadIdx.x = (first + i) % THREADS;
      if (!self().ended) {
        swapcontext(&scheduler, &self().context);
        ended += self().ended;
      }
      if (random_numbers() % 4 == 0) land(self().copies);
    }
    land(engine);
  }
  for (Thread& thread : threads)
    if (!thread.groups.empty() || !thread.copies.empty()) fail("ended with work under way");
  if (!was_waited) fail("ended before the kernel before it");
}

// `late` is copied over `early` when the kernel waits for the one before it, and poison before.
extern "C" void emulate(
    const TensorMap* maps, char* tokens, u16* out, char* shrunk, void* bias, void* topk_weights, int* schedule,
    int num_pairs, float alpha, float limit, int programs, unsigned seed, char* early, const char* late, u64 late_bytes) {
  random_numbers.seed(seed);
  left_first.clear(), left_last.clear(), weight = maps;
  gridDim.x = programs, blockDim.x = THREADS;
  for (blockIdx.x = 0; (int)blockIdx.x < programs; ++blockIdx.x) {
    std::memset(early, 0xFF, late_bytes);
    when_waited = [=] { std::memcpy(early, late, late_bytes); };
    kernel = [=] {
      expert_product(maps[0], maps[1], maps[2], tokens, out, shrunk, bias, topk_weights, schedule, num_pairs, alpha, limit);
    };
    run_program();
  }
}

// of the last launch
extern "C" bool leaves_last(const void* result) { return left_last.count(result); }
