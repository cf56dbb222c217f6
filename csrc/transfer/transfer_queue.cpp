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

Ticket TransferQueue::submit(Direction direction, std::span<const CopySpan> copies, uintptr_t compute_stream,
                             const Ticket& after) {
  Lane& target = lane(direction);
  std::lock_guard lock(target.mutex);
  device_->wait_compute(stream_of(target), compute_stream);
  return submit_locked(target, direction, copies, after);
}

Ticket TransferQueue::submit(Direction direction, void* destination, const void* source, size_t bytes,
                             uintptr_t compute_stream, const Ticket& after) {
  const CopySpan copy{destination, source, bytes};
  return submit(direction, {&copy, 1}, compute_stream, after);
}

Ticket TransferQueue::submit_after(Direction direction, std::span<const CopySpan> copies,
                                   const Ticket& after) {
  Lane& target = lane(direction);
  std::lock_guard lock(target.mutex);
  return submit_locked(target, direction, copies, after);
}

TransferQueue::Lane& TransferQueue::lane(Direction direction) {
  owner_.require_owner(
      "this TransferQueue");  // before the lock, which a thread of the parent may hold for good
  return direction == Direction::kToHost ? to_host_ : to_device_;
}

Stream& TransferQueue::stream_of(Lane& target) {
  if (target.stream) return *target.stream;
  throw Error(ErrorKind::kState, "the transfer queue has ended: its copies were given up, with the engine");
}

Ticket TransferQueue::submit_locked(Lane& target, Direction direction, std::span<const CopySpan> copies,
                                    const Ticket& after) {
  size_t total_bytes = 0;
  // Before the wait: a copy that is refused must not leave its wait to the next one.
  for (const auto& [destination, source, bytes] : copies) {
    if (bytes > 0 && (destination == nullptr || source == nullptr)) {
      throw Error(ErrorKind::kInvalidArgument, "a copy of " + std::to_string(bytes) + " bytes got a null " +
                                                   (source == nullptr ? "source" : "destination") +
                                                   "; pass the address of live memory");
    }
    total_bytes += bytes;
  }
  Stream& stream = stream_of(target);
  device_->wait_ticket(stream, after);
  Ticket ticket = device_->submit_copies(stream, direction, copies);
  target.bytes.fetch_add(total_bytes, std::memory_order_relaxed);
  target.count.fetch_add(copies.size(), std::memory_order_relaxed);
  return ticket;
}

void TransferQueue::wait_compute(Direction direction, uintptr_t compute_stream) {
  Lane& target = lane(direction);
  std::lock_guard lock(target.mutex);
  device_->wait_compute(stream_of(target), compute_stream);
}

bool TransferQueue::wait_on_stream(uintptr_t compute_stream, const Ticket& ticket, int64_t timeout_ns) {
  return device_->compute_wait(compute_stream, ticket, timeout_ns);
}

void TransferQueue::end() {
  if (owner_.forked()) return;  // no lane has a thread there, and a thread of the parent may hold its lock
  for (Lane* target : {&to_host_, &to_device_}) {
    std::unique_ptr<Stream> stream;
    {
      std::lock_guard lock(target->mutex);
      stream = std::move(target->stream);
    }
    stream.reset();  // without the lock: who hears of a copy's end may submit
  }
}

TransferStats TransferQueue::stats() const noexcept {
  return {.to_host_bytes = to_host_.bytes.load(std::memory_order_relaxed),
          .to_device_bytes = to_device_.bytes.load(std::memory_order_relaxed),
          .to_host_count = to_host_.count.load(std::memory_order_relaxed),
          .to_device_count = to_device_.count.load(std::memory_order_relaxed)};
}

}  // namespace offload
