// Stands in for the CUDA runtime and torch's CUDA shims, so that the launchers of csrc/ run where there
// is no GPU: a launch is written down instead of done. Used by predict_cuda.py.
#include <cuda_runtime_api.h>

#include <map>
#include <sstream>
#include <string>

namespace {

/// Of kernels, as the machine code spells them; libraries register theirs before globals exist.
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> found;
  return found;
}

std::ostringstream launches;
std::string taken;
int current = 0, multiprocessors = 1;

}  // namespace

extern "C" {

/// Makes a device with so many multiprocessors the current one.
__attribute__((visibility("default"))) void blip3o_set_device(int device, int of_device) {
  current = device;
  multiprocessors = of_device;
}

/// "kernel blocks threads.x threads.y shared bytes", a line for each launch since the last call.
__attribute__((visibility("default"))) const char* blip3o_take_launches() {
  taken = launches.str();
  launches.str("");
  return taken.c_str();
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  launches << names().at(kernel) << ' ' << config->gridDim.x << ' ' << config->blockDim.x << ' '
           << config->blockDim.y << ' ' << config->dynamicSmemBytes << '\n';
  return cudaSuccess;
}

void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  names()[kernel] = name;
}

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorNotSupported;
}
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorNotSupported;
}

/// Each architecture is a device of its own, since launchers remember what they asked.
cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? multiprocessors : 0;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "error"; }
const char* cudaGetErrorString(cudaError_t) { return "of a recorded launch"; }

int aoti_torch_create_device_guard(int, void** guard) {
  *guard = nullptr;
  return 0;
}

int aoti_torch_delete_device_guard(void*) { return 0; }

int aoti_torch_get_current_cuda_stream(int, void** stream) {
  *stream = nullptr;
  return 0;
}

}  // extern "C"
