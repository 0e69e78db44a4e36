// Preloaded before torch. A torch without CUDA refuses gradients of tensors that say that they are on
// a GPU: autograd asks for the device's guard, and whether there is an accelerator. This answers both.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

namespace at {
namespace {

struct PresentGpu : CUDAHooksInterface {
  explicit PresentGpu(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};

C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", PresentGpu)

using Guard = c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>;
const c10::impl::DeviceGuardImplRegistrar registered(c10::DeviceType::CUDA, new Guard());

}  // namespace
}  // namespace at
