// Force-included before binding.cpp where it binds kernels that run on the host (emulation.h): what
// it asks of a device, answered for the CPU.
#pragma once

#define aoti_torch_create_device_guard host_create_device_guard
#define aoti_torch_delete_device_guard host_delete_device_guard
#define aoti_torch_get_current_cuda_stream host_get_current_stream
#define BLIP3O_NAMESPACE blip3o_fast_host
#define BLIP3O_DISPATCH_KEY CPU
