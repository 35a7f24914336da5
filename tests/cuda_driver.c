// Stands for libcuda.so.1 where there is none: writes down each launch it is told, byte for byte.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct {
  void *function;
  int count;
  size_t sizes[128];
} Kernel;

static Kernel kernels[256];
static int num_kernels;
static unsigned char told[1 << 20];
static size_t length;

static void note(const void *bytes, size_t size) {
  memcpy(told + length, bytes, size);
  length += size;
}

static Kernel *find(void *function) {
  for (int k = 0; k < num_kernels; k++)
    if (kernels[k].function == function) return &kernels[k];
  kernels[num_kernels].function = function;
  return &kernels[num_kernels++];
}

// The parameters of a kernel, one after the other.
void stub_add_parameter(void *function, size_t size) {
  Kernel *kernel = find(function);
  kernel->sizes[kernel->count++] = size;
}

// All launches since the last call of this one.
size_t stub_take(unsigned char *out) {
  size_t taken = length;
  memcpy(out, told, taken);
  length = 0;
  return taken;
}

int cuFuncGetParamInfo(void *function, size_t index, size_t *offset, size_t *size) {
  Kernel *kernel = find(function);
  if (index >= (size_t)kernel->count) return 1;
  *size = kernel->sizes[index];
  return 0;
}

int cuLaunchKernelEx(const unsigned char *config, void *function, void **parameters, void **extra) {
  // grid, block and shared memory; the stream; how many attributes; the first one's number and value
  uint32_t count;
  memcpy(&count, config + 48, 4);
  note(&function, sizeof function);
  note(config, 28);
  note(config + 32, 8);
  note(&count, 4);
  if (count) {
    unsigned char *attribute;
    memcpy(&attribute, config + 40, 8);
    note(attribute, 4);
    note(attribute + 8, 4);
  }
  Kernel *kernel = find(function);
  for (int i = 0; i < kernel->count; i++) note(parameters[i], kernel->sizes[i]);
  return 0;
}

// A map of its arguments.
int cuTensorMapEncodeTiled(unsigned char *map, int type, unsigned rank, void *address, const uint64_t *sizes,
                           const uint64_t *strides, const unsigned *box, const unsigned *steps, int interleave,
                           int swizzle, int promotion, int fill) {
  int how[] = {type, (int)rank, interleave, swizzle, promotion, fill};
  memset(map, 0, 128);
  memcpy(map, &address, 8);
  memcpy(map + 8, how, sizeof how);
  memcpy(map + 32, sizes, 8 * rank);
  memcpy(map + 56, strides, 8 * (rank - 1));
  memcpy(map + 72, box, 4 * rank);
  memcpy(map + 84, steps, 4 * rank);
  return 0;
}

int cuCtxGetCurrent(void **context) {
  *context = (void *)1;
  return 0;
}

int cuPointerGetAttribute(uint64_t *value, int attribute, uint64_t pointer) {
  *value = pointer;
  return 0;
}

// What Triton's launcher is linked with and does not call here.
#define UNUSED(name) \
  int name(void) { return 0; }
UNUSED(cuCtxGetDevice)
UNUSED(cuCtxGetLimit)
UNUSED(cuCtxSetCurrent)
UNUSED(cuCtxSetLimit)
UNUSED(cuDeviceGet)
UNUSED(cuDeviceGetAttribute)
UNUSED(cuDevicePrimaryCtxRetain)
UNUSED(cuDriverGetVersion)
UNUSED(cuFuncGetAttribute)
UNUSED(cuFuncSetAttribute)
UNUSED(cuFuncSetCacheConfig)
UNUSED(cuGetErrorName)
UNUSED(cuGetErrorString)
UNUSED(cuModuleGetFunction)
UNUSED(cuModuleLoadData)
UNUSED(cuModuleUnload)
UNUSED(cuOccupancyMaxActiveClusters)
UNUSED(cuPointerGetAttributes)
UNUSED(cuStreamIsCapturing)
