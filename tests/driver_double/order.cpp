#include "driver_double/order.h"

#include <algorithm>
#include <iterator>
#include <sstream>

namespace driver_double {
namespace {

constexpr size_t kRacesInWords = 8;

void join(std::vector<uint64_t>& clock, const std::vector<uint64_t>& other) {
  if (clock.size() < other.size()) clock.resize(other.size());
  for (size_t i = 0; i < other.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

const char* word_of(Use use) {
  switch (use) {
    case Use::kRead: return "reads";
    case Use::kWrite: return "writes";
    case Use::kAllocate: return "allocates";
    default: return "frees";
  }
}

bool is_over(size_t actor, uint64_t time, const std::vector<uint64_t>& over) {
  return time == 0 || (actor < over.size() && over[actor] >= time);
}

}  // namespace

void Order::set_on(bool on) {
  forget();
  on_ = on;
}

void Order::forget() {
  ++run_;
  actors_.clear();
  names_ = {"the host"};
  clocks_.assign(1, {});
  pieces_.clear();
  freed_.assign(1, {});
  texts_.clear();
  race_count_ = 0;
  races_.clear();
}

size_t Order::actor_of(uintptr_t stream) {
  const auto [found, is_new] = actors_.try_emplace(stream, clocks_.size());
  if (is_new) {
    clocks_.emplace_back();
    freed_.emplace_back();
    std::ostringstream name;
    name << (stream == kDefault ? "the default stream" : "stream ");
    if (stream != kDefault) name << std::hex << stream;
    names_.push_back(name.str());
  }
  return found->second;
}

bool Order::operate(uintptr_t stream, const std::string& what, const std::vector<Span>& spans,
                    const std::vector<uintptr_t>& used_on) {
  if (!on_) return false;
  const size_t actor = actor_of(stream);
  std::vector<uint64_t>& clock = clocks_[actor];
  join(clock, clocks_[kHost]);
  if (clock.size() <= actor) clock.resize(actor + 1);
  const uint64_t time = ++clock[actor];
  std::vector<uint64_t> over = clock;
  for (const uintptr_t other : used_on) join(over, position(other).over);
  const std::string* const kept = &*texts_.insert(what).first;
  const size_t known = race_count_;
  bool is_unordered = false;
  for (const Span& span : spans) {
    if (span.use == Use::kAllocate) reuse(actor);
    if (span.bytes > 0) {
      is_unordered |= apply({actor, time, kept, span.begin, span.bytes, span.use}, over);
    }
  }
  return is_unordered || race_count_ > known;
}

Position Order::position(uintptr_t stream) {
  if (!on_) return {};
  std::vector<uint64_t> over = clocks_[actor_of(stream)];
  join(over, clocks_[kHost]);
  return {std::move(over), run_};
}

void Order::wait(uintptr_t stream, const Position& position) {
  if (on_ && position.run == run_) join(clocks_[actor_of(stream)], position.over);
}

void Order::host_waits(const Position& position) {
  if (on_ && position.run == run_) join(clocks_[kHost], position.over);
}

void Order::host_waits_for_all() {
  for (size_t actor = 1; actor < clocks_.size(); ++actor) join(clocks_[kHost], clocks_[actor]);
}

void Order::forget(uintptr_t begin, size_t bytes) {
  split_at(begin);
  split_at(begin + bytes);
  pieces_.erase(pieces_.lower_bound(begin), pieces_.lower_bound(begin + bytes));
}

void Order::split_at(uintptr_t address) {
  auto after = pieces_.lower_bound(address);
  if (after == pieces_.begin()) return;
  auto& [begin, piece] = *std::prev(after);
  if (piece.end <= address) return;
  Piece rest = piece;
  piece.end = address;
  pieces_.emplace_hint(after, address, std::move(rest));
}

void Order::reuse(size_t actor) {
  for (const Freed& freed : freed_[actor]) {
    const auto is_left = [&](const Access& use) { return !is_over(use.actor, use.time, clocks_[actor]); };
    const auto use = std::ranges::find_if(freed.uses, is_left);
    if (use != freed.uses.end()) report(*use, freed.by);
  }
  freed_[actor].clear();
}

bool Order::apply(const Access& access, const std::vector<uint64_t>& over) {
  const uintptr_t begin = access.begin, end = begin + access.bytes;
  split_at(begin);
  split_at(end);
  const auto first = pieces_.lower_bound(begin), last = pieces_.lower_bound(end);
  const bool reads = access.use == Use::kRead;
  std::vector<Access> unordered;
  const auto compare = [&](const Access& earlier) {
    const bool is_others = earlier.use == Use::kFree && access.use == Use::kAllocate;
    if (!is_others && !is_over(earlier.actor, earlier.time, over)) unordered.push_back(earlier);
  };
  for (auto piece = first; piece != last; ++piece) {
    compare(piece->second.write);
    if (!reads) std::ranges::for_each(piece->second.reads, compare);
  }
  if (!unordered.empty() && access.use == Use::kFree) {
    freed_[access.actor].push_back({access, unordered});
  } else if (!unordered.empty()) {
    report(unordered.front(), access);  // once an access, however many pieces
  }
  if (!reads) {
    pieces_.erase(first, last);
    pieces_.emplace(begin, Piece{end, access, {}});  // what is freed too: who uses it later is found
    return !unordered.empty();
  }
  uintptr_t at = begin;
  for (auto piece = first; at < end;) {
    if (piece != last && piece->first == at) {
      std::erase_if(piece->second.reads, [&](const Access& read) { return read.actor == access.actor; });
      piece->second.reads.push_back(access);
      at = piece->second.end;
      ++piece;
    } else {
      const uintptr_t until = piece != last ? piece->first : end;
      pieces_.emplace_hint(piece, at, Piece{until, {}, {access}});
      at = until;
    }
  }
  return !unordered.empty();
}

void Order::report(const Access& earlier, const Access& later) {
  if (race_count_++ < kRacesInWords) races_ += text(later) + " while " + text(earlier) + "\n";
}

std::string Order::text(const Access& access) const {
  std::ostringstream text;
  text << *access.what << " on " << names_[access.actor] << " " << word_of(access.use) << " " << access.bytes
       << " bytes at " << std::hex << access.begin;
  return text.str();
}

}  // namespace driver_double
