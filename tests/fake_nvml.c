// A stand-in for the driver's management library: three GPUs and one MIG instance.
//
// FAKE_NVML_GPUS: how many of the three there are (default 3).
// FAKE_NVML_FAIL: names of functions, separated by spaces, that answer with an error.
// FAKE_NVML_CUDA, FAKE_NVML_DRIVER: what the driver says of itself.

#include <stdlib.h>
#include <string.h>

typedef struct {
  const char* name;
  const char* uuid;
  int major, minor;
  unsigned long long total;
} Device;

static const Device devices[] = {
    {"NVIDIA A100", "GPU-aaaa1111-0000", 8, 0, 40ull << 30},
    {"NVIDIA H200", "GPU-aaaa2222-0000", 9, 0, 141ull << 30},
    {"Tesla T4", "GPU-bbbb3333-0000", 7, 5, 16ull << 30},
    {"NVIDIA H200 MIG 1g.18gb", "MIG-cccc4444-0000", 9, 0, 18ull << 30},
};

static int started = 0;

int fake_started(void) { return started; }

static int fails(const char* name) {
  const char* list = getenv("FAKE_NVML_FAIL");
  if (list == NULL) return 0;
  const size_t length = strlen(name);
  for (const char* at = strstr(list, name); at != NULL; at = strstr(at + 1, name)) {
    if ((at == list || at[-1] == ' ') && (at[length] == '\0' || at[length] == ' ')) return 1;
  }
  return 0;
}

#define ANSWER(name)               \
  if (started <= 0) return 1;      \
  if (fails(name)) return 999

static int text(const char* value, char* out, unsigned size) {
  if (strlen(value) + 1 > size) return 7;
  strcpy(out, value);
  return 0;
}

static unsigned count(void) {
  const char* number = getenv("FAKE_NVML_GPUS");
  return number == NULL ? 3 : (unsigned)strtoul(number, NULL, 10);
}

int nvmlInit_v2(void) {
  if (fails("nvmlInit_v2")) return 9;  // NVML_ERROR_DRIVER_NOT_LOADED
  ++started;
  return 0;
}

int nvmlShutdown(void) {
  --started;
  return 0;
}

int nvmlDeviceGetCount_v2(unsigned* number) {
  ANSWER("nvmlDeviceGetCount_v2");
  *number = count();
  return 0;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, const Device** device) {
  ANSWER("nvmlDeviceGetHandleByIndex_v2");
  if (index >= count() || index >= 3) return 2;
  *device = &devices[index];
  return 0;
}

int nvmlDeviceGetHandleByUUID(const char* uuid, const Device** device) {
  ANSWER("nvmlDeviceGetHandleByUUID");
  for (int index = 0; index < 4; ++index) {
    if (strcmp(devices[index].uuid, uuid) == 0) {
      *device = &devices[index];
      return 0;
    }
  }
  return 6;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(const Device* instance, const Device** parent) {
  ANSWER("nvmlDeviceGetDeviceHandleFromMigDeviceHandle");
  if (instance != &devices[3]) return 2;
  *parent = &devices[1];
  return 0;
}

int nvmlDeviceGetName(const Device* device, char* out, unsigned size) {
  ANSWER("nvmlDeviceGetName");
  return text(device->name, out, size);
}

int nvmlDeviceGetUUID(const Device* device, char* out, unsigned size) {
  ANSWER("nvmlDeviceGetUUID");
  return text(device->uuid, out, size);
}

int nvmlDeviceGetCudaComputeCapability(const Device* device, int* major, int* minor) {
  ANSWER("nvmlDeviceGetCudaComputeCapability");
  if (device == &devices[3]) return 3;  // an instance has no answer of its own
  *major = device->major;
  *minor = device->minor;
  return 0;
}

int nvmlDeviceGetMemoryInfo(const Device* device, unsigned long long* memory) {
  ANSWER("nvmlDeviceGetMemoryInfo");
  memory[0] = device->total;
  memory[1] = memory[2] = device->total / 2;
  return 0;
}

int nvmlSystemGetDriverVersion(char* out, unsigned size) {
  ANSWER("nvmlSystemGetDriverVersion");
  const char* version = getenv("FAKE_NVML_DRIVER");
  return text(version == NULL ? "580.65.06" : version, out, size);
}

int nvmlSystemGetCudaDriverVersion_v2(int* version) {
  ANSWER("nvmlSystemGetCudaDriverVersion_v2");
  const char* number = getenv("FAKE_NVML_CUDA");
  *version = number == NULL ? 13000 : atoi(number);
  return 0;
}
