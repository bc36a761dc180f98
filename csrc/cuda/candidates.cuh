// The running top-K of one warp: a list in shared memory. Logits that beat the K-th best are
// appended until the list is full; then the list is sorted, its K best are kept and the others are
// added to the tail. A logit below the K-th best costs one comparison and a share of a ballot.
#pragma once

#include <climits>

#include "row.cuh"

namespace opd {

// Of two equal logits, the one with the lower id is better, as in a stable sort.
template <typename A>
__device__ __forceinline__ bool better(A value, int id, A other, int other_id) {
  return value > other || (value == other && id < other_id);
}

// A bitonic sort by one warp: best first, or in ascending order of ids if kByValue is false. It
// overwrites the entries from `count` up to the next power of two.
template <bool kByValue, typename A>
__device__ void sort(A* values, int* ids, int count) {
  int length = 2;
  while (length < count) length *= 2;
  for (int i = count + lane_id(); i < length; i += kWarp) {
    values[i] = -kInfinity<A>;
    ids[i] = INT_MAX;
  }
  __syncwarp();
  for (int run = 2; run <= length; run *= 2) {
    for (int distance = run / 2; distance > 0; distance /= 2) {
#pragma unroll 1
      for (int pair = lane_id(); pair < length / 2; pair += kWarp) {
        const int i = 2 * pair - (pair & (distance - 1)), j = i + distance;
        const A a = values[i], b = values[j];
        const int a_id = ids[i], b_id = ids[j];
        const bool in_order = kByValue ? better(a, a_id, b, b_id) : a_id < b_id;
        if (in_order != ((i & run) == 0)) {
          values[i] = b, values[j] = a;
          ids[i] = b_id, ids[j] = a_id;
        }
      }
      __syncwarp();
    }
  }
}

template <typename A, int kCapacity>
class Candidates {
 public:
  // values and ids are lists of kCapacity in shared memory. Their first `count` entries are the
  // best so far, sorted. Logits up to `threshold` cannot be among the K best of the row: this
  // warp's list or the state already holds K better ones.
  __device__ Candidates(A* values, int* ids, int k, int count, A threshold)
      : values_(values), ids_(ids), k_(k), count_(count), threshold_(threshold) {}

  // Whether a logit may be one of the K best so far, if its id is higher than all before.
  __device__ __forceinline__ bool admits(A z) const { return z > threshold_; }

  // Moves the logits of a tile that are among the K best to the list and sets them to -inf.
  // id_of(i) is the id of this lane's i-th logit.
  template <int kCount, typename IdOf>
  __device__ __forceinline__ void take(A (&z)[kCount], const IdOf& id_of, OnlineSum<A>& tail) {
    for (bool is_full = true; is_full;) {
      is_full = false;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const bool is_taker = beats_threshold(z[i], id_of(i));
        const unsigned takers = __ballot_sync(kWholeWarp, is_taker);
        const int count = count_ + __popc(takers);
        if (count > kCapacity) {
          is_full = true;  // the next round has room for them
          continue;
        }
        if (is_taker) {
          const int place = count_ + __popc(takers & ((1u << lane_id()) - 1));
          values_[place] = z[i];
          ids_[place] = id_of(i);
          z[i] = -kInfinity<A>;
        }
        count_ = count;
      }
      if (is_full) settle(tail);
    }
  }

  // Sorts the list, keeps its K best and adds the others to the tail.
  __device__ void settle(OnlineSum<A>& tail) {
    __syncwarp();
    sort<true>(values_, ids_, count_);
    for (int i = k_ + lane_id(); i < count_; i += kWarp) {
      const A evicted[1] = {values_[i]};
      tail.absorb(evicted, true);
    }
    if (count_ >= k_) {
      count_ = k_;
      threshold_ = values_[k_ - 1];
      threshold_id_ = ids_[k_ - 1];
    }
    __syncwarp();
  }

  __device__ int count() const { return count_; }

 private:
  static_assert(kCapacity >= 64 && (kCapacity & (kCapacity - 1)) == 0, "a sort's power of two");

  // The logits of a tile do not arrive in the order of their ids, so a later one may win a tie.
  __device__ __forceinline__ bool beats_threshold(A z, int id) const {
    return z > threshold_ || (z == threshold_ && id < threshold_id_);
  }

  A* values_;
  int* ids_;
  int k_, count_;
  A threshold_;
  int threshold_id_ = INT_MIN;  // below every id, and every column before the row's first
};

}  // namespace opd
