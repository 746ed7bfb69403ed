// Lets tensors on the device "mps" exist in a torch without MPS: a device without streams, which is no accelerator.
// Preloaded in front of torch's libraries. Python computes all operations, see tests/rehearsal/mps.py.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {
using Guard = NoOpDeviceGuardImpl<DeviceType::MPS>;
C10_REGISTER_GUARD_IMPL(MPS, Guard)
}  // namespace c10::impl

namespace at::accelerator {
// Replaces torch's function: autograd would ask an accelerator for its streams.
__attribute__((visibility("default"))) bool isAccelerator(c10::DeviceType) { return false; }
}  // namespace at::accelerator
