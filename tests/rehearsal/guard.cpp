// Preloaded before torch, which refuses gradients of tensors that say that they are on a GPU where
// there is none: autograd asks for the device's guard, and whether there is an accelerator.
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

// Preferred: a torch that is built with CUDA registers its own afterwards.
C10_REGISTER_TYPED_CLASS_WITH_PRIORITY(
    CUDAHooksRegistry, "CUDAHooks", c10::REGISTRY_PREFERRED, PresentGpu)

using Guard = c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>;
const c10::impl::DeviceGuardImplRegistrar registered(c10::DeviceType::CUDA, new Guard());

}  // namespace
}  // namespace at
