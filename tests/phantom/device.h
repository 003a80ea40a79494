// What torch asks of a kind of device: memory, a guard, a random generator, hooks; and what is counted.
#pragma once
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <cstdlib>

using namespace at;

namespace {

// Counters

enum Event { KERNEL, WAIT, UPLOAD };
using Listener = void (*)(int event, const char* name);
Listener listener = nullptr;
std::atomic<int64_t> bytes_now{0}, bytes_peak{0}, kernels{0};
std::atomic<int> device_count{1};
thread_local c10::DeviceIndex current{0};

void tell(Event event, const char* name) {
  if (listener) listener(event, name);
}

void launch(const char* name) {
  ++kernels;
  tell(KERNEL, name);
}

void allocated(int64_t bytes) {
  int64_t now = bytes_now += bytes, peak = bytes_peak;
  while (now > peak && !bytes_peak.compare_exchange_weak(peak, now)) {
  }
}

// What torch asks of a kind of device

struct Block {
  void* data;
  int64_t bytes;
};

struct DeviceAllocator final : c10::Allocator {
  DataPtr allocate(size_t bytes) override {
    auto* block = new Block{bytes ? malloc(bytes) : nullptr, static_cast<int64_t>(bytes)};
    allocated(block->bytes);
    return {block->data, block, &release, Device(DeviceType::CUDA, current)};
  }
  DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { memcpy(to, from, bytes); }
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    free(block->data);
    allocated(-block->bytes);
    delete block;
  }
};
DeviceAllocator allocator;

struct DeviceGuard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device device) const override {
    Device before(DeviceType::CUDA, current);
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return Device(DeviceType::CUDA, current); }
  void setDevice(Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current = device.index();
  }
  Stream getStream(Device device) const override {
    return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, device.index() < 0 ? current : device.index()));
  }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getStream(device); }
  Stream getNewStream(Device device, int) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  DeviceIndex deviceCount() const noexcept override { return device_count; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override { tell(WAIT, "synchronize"); }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override { tell(WAIT, "synchronize"); }
};
DeviceGuard guard;

Generator& default_generator() {
  static Generator generator = make_generator<CPUGeneratorImpl>(67280421310721);
  return generator;
}

constexpr DeviceIndex ASKS_FOR_DEFAULT = 63;  // by a generator of this index Python gets hold of the default one

struct Hooks final : CUDAHooksInterface {
  explicit Hooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex deviceCount() const override { return device_count; }
  int getNumGPUs() const override { return device_count; }
  const Generator& getDefaultGenerator(DeviceIndex = -1) const override { return default_generator(); }
  Generator getNewGenerator(DeviceIndex index = -1) const override {
    return index == ASKS_FOR_DEFAULT ? default_generator() : make_generator<CPUGeneratorImpl>();
  }
  bool isPinnedPtr(const void*) const override { return false; }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(DeviceType::CPU); }
  Device getDeviceFromPtr(void*) const override { return Device(DeviceType::CUDA, current); }
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)

// Where torch has made its hooks before, those of a build without CUDA, they get these methods.
void replace_hooks() {
  static Hooks hooks{CUDAHooksArgs{}};
  static_assert(sizeof(Hooks) == sizeof(void*) && sizeof(CUDAHooksInterface) == sizeof(void*), "nothing but methods");
  auto& made = const_cast<CUDAHooksInterface&>(at::detail::getCUDAHooks());
  memcpy(static_cast<void*>(&made), static_cast<void*>(&hooks), sizeof(void*));
}

}  // namespace
