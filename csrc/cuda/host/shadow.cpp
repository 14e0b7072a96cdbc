#include "host/shadow.h"

#include <algorithm>

namespace nabla_fast::host {
namespace {

const char* anchor() { return reinterpret_cast<const char*>(&record); }

}  // namespace

Place place_of(const Access& access) { return anchor() + access.place; }

Access access_at(uint32_t instant, Place place) {
  return {instant, static_cast<int32_t>(static_cast<const char*>(place) - anchor())};
}

int Instants::distance(uint32_t a, uint32_t b) const {
  const Instant &x = (*this)[a], &y = (*this)[b];
  if (x.block / blocks_per_cluster_ != y.block / blocks_per_cluster_) return kGrid + 1;
  if (x.block != y.block) return kCluster + 1;
  if (x.thread / kWarpThreads != y.thread / kWarpThreads) return kBlock + 1;
  return x.thread != y.thread ? kWarp + 1 : 0;
}

void Instants::wait(unsigned block, unsigned thread, unsigned source, unsigned arrivals) {
  const size_t number = size_t{block} * threads_ + thread;
  if (waited_.size() <= number) waited_.resize(number + 1);
  std::vector<unsigned>& waited = waited_[number];
  if (waited.size() <= source) waited.resize(source + 1);
  waited[source] = std::max(waited[source], arrivals);
}

bool Instants::has_waited(const Instant& thread, const Instant& arrival) const {
  if (thread.block != arrival.block) return false;
  if (arrival.source == kOwnCopies && thread.thread != arrival.thread) return false;
  const size_t number = size_t{thread.block} * threads_ + thread.thread;
  return number < waited_.size() && arrival.source < waited_[number].size() &&
         waited_[number][arrival.source] >= arrival.arrivals;
}

bool Instants::ordered(uint32_t before, uint32_t now) const {
  if (before < base_) return true;
  if ((*this)[before].source != 0) return has_waited((*this)[now], (*this)[before]);
  // The innermost level that both share is the number of levels that they do not.
  const int apart = distance(before, now);
  if (apart == 0) return true;
  const Instant &x = (*this)[before], &y = (*this)[now];
  for (int level = apart - 1; level < kLevels; ++level)
    if (x.passed[level] != y.passed[level]) return true;
  return false;
}

Conflict record(const Instants& instants, ShadowByte& byte, const Access& access, bool writes) {
  Conflict conflict;
  const auto open = [&](const Access& other) {
    return other.instant != 0 && !instants.ordered(other.instant, access.instant);
  };
  if (open(byte.writer)) conflict = {Conflict::kWritten, byte.writer};
  if (writes) {
    for (const Access& reader : byte.readers)
      if (open(reader)) conflict = {Conflict::kRead, reader};
    byte = {access, {}};
    return conflict;
  }
  Access &first = byte.readers[0], &second = byte.readers[1];
  if (first.instant == access.instant || second.instant == access.instant) return conflict;
  // Whoever comes after this access comes after those that are ordered before it.
  if (!open(first)) first = {};
  if (!open(second)) second = {};
  if (first.instant == 0) {
    first = access;
  } else if (second.instant == 0) {
    second = access;
  } else {
    const int here = instants.distance(first.instant, second.instant);
    const int with_first = instants.distance(first.instant, access.instant);
    const int with_second = instants.distance(second.instant, access.instant);
    if (with_first > here && with_first >= with_second)
      second = access;
    else if (with_second > here)
      first = access;
  }
  return conflict;
}

}  // namespace nabla_fast::host
