#include "transfer/transfer_queue.h"

#include <string>
#include <utility>

#include "base/error.h"

namespace offload {

TransferQueue::TransferQueue(std::shared_ptr<Device> device) : device_(std::move(device)) {
  if (!device_) throw Error(ErrorKind::kInvalidArgument, "TransferQueue needs a device, got null");
  to_host_.stream = device_->create_stream("to_host");
  to_device_.stream = device_->create_stream("to_device");
}

Ticket TransferQueue::submit(Direction direction, void* destination, const void* source, size_t bytes,
                             uintptr_t compute_stream, const Ticket& after) {
  Lane& target = lane(direction);
  std::lock_guard lock(target.mutex);
  device_->wait_compute(*target.stream, compute_stream);
  return submit_locked(target, direction, destination, source, bytes, after);
}

Ticket TransferQueue::submit_after(Direction direction, void* destination, const void* source, size_t bytes,
                                   const Ticket& after) {
  Lane& target = lane(direction);
  std::lock_guard lock(target.mutex);
  return submit_locked(target, direction, destination, source, bytes, after);
}

Ticket TransferQueue::submit_locked(Lane& target, Direction direction, void* destination, const void* source,
                                    size_t bytes, const Ticket& after) {
  // Before the wait: a copy that is refused must not leave its wait to the next one.
  if (bytes > 0 && (destination == nullptr || source == nullptr)) {
    throw Error(ErrorKind::kInvalidArgument, "a copy of " + std::to_string(bytes) + " bytes got a null " +
                                                 (source == nullptr ? "source" : "destination") +
                                                 "; pass the address of live memory");
  }
  device_->wait_ticket(*target.stream, after);
  Ticket ticket = device_->submit_copy(*target.stream, direction, destination, source, bytes);
  target.bytes.fetch_add(bytes, std::memory_order_relaxed);
  target.count.fetch_add(1, std::memory_order_relaxed);
  return ticket;
}

void TransferQueue::wait_compute(Direction direction, uintptr_t compute_stream) {
  Lane& target = lane(direction);
  std::lock_guard lock(target.mutex);
  device_->wait_compute(*target.stream, compute_stream);
}

bool TransferQueue::wait_on_stream(uintptr_t compute_stream, const Ticket& ticket, int64_t timeout_ns) {
  return device_->compute_wait(compute_stream, ticket, timeout_ns);
}

TransferStats TransferQueue::stats() const noexcept {
  return {.to_host_bytes = to_host_.bytes.load(std::memory_order_relaxed),
          .to_device_bytes = to_device_.bytes.load(std::memory_order_relaxed),
          .to_host_count = to_host_.count.load(std::memory_order_relaxed),
          .to_device_count = to_device_.count.load(std::memory_order_relaxed)};
}

}  // namespace offload
