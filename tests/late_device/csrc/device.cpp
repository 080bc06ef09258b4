// Makes torch's PrivateUse1 backend a device with streams and events.
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "device.h"
#include "memory.h"

namespace late {
namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::Stream;

constexpr auto kType = c10::DeviceType::PrivateUse1;

Stream stream_of(StreamId id) { return Stream(Stream::UNSAFE, Device(kType, 0), id); }

Event& event_at(void* event) { return *static_cast<Event*>(event); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  Device exchangeDevice(Device) const override { return {kType, 0}; }
  Device getDevice() const override { return {kType, 0}; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  DeviceIndex deviceCount() const noexcept override { return 1; }

  Stream getStream(Device) const override { return stream_of(current_stream()); }
  Stream getDefaultStream(Device) const override { return stream_of(kDefaultStream); }
  Stream getNewStream(Device, int) const override { return stream_of(new_stream()); }
  Stream getStreamFromGlobalPool(Device, bool) const override { return stream_of(new_stream()); }
  Stream exchangeStream(Stream stream) const override { return stream_of(exchange_stream(stream.id())); }
  bool queryStream(const Stream& stream) const override { return is_idle(stream.id()); }
  void synchronizeStream(const Stream& stream) const override { synchronize(stream.id()); }
  void synchronizeDevice(const DeviceIndex) const override { synchronize_device(); }

  void record(void** event, const Stream& stream, const DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event;
    event_at(*event) = late::record(stream.id());
  }
  void block(void* event, const Stream& stream) const override { wait(stream.id(), event_at(event)); }
  bool queryEvent(void* event) const override { return is_done(event_at(event)); }
  void synchronizeEvent(void* event) const override { synchronize(event_at(event)); }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* memory) const override { return is_pinned(memory); }
  at::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
};

}  // namespace

void register_device() {
  static auto* const hooks = new Hooks;
  c10::SetAllocator(kType, device_allocator());
  at::RegisterPrivateUse1HooksInterface(hooks);
}

}  // namespace late
