// The running top-K of one warp: a list in shared memory, in which better logits pile up behind the
// K best until it is full. Only then it is sorted, and what falls out of the K joins the tail. A
// logit below the K-th best costs one comparison and a share of a ballot.
#pragma once

#include <climits>

#include "row.cuh"

namespace opd {

// Of two equal logits the lower id is the better, as in a stable sort.
template <typename A>
__device__ __forceinline__ bool better(A value, int id, A other, int other_id) {
  return value > other || (value == other && id < other_id);
}

// A bitonic sort by one warp, the best first, or by ids alone in ascending order. What lies behind
// `count`, up to a power of two, is overwritten.
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
  // Lists of kCapacity in shared memory. The first `count` hold the best so far, sorted, and no
  // logit up to `threshold` can be among the K best, whoever found the ones that are.
  __device__ Candidates(A* values, int* ids, int k, int count, A threshold)
      : values_(values), ids_(ids), k_(k), count_(count), threshold_(threshold) {}

  // Whether a logit of a higher id than all before is one of the K best so far.
  __device__ __forceinline__ bool admits(A z) const { return z > threshold_; }

  // Takes those logits of a tile out that are among the K best; the ids of a lane's own follow from
  // id_of(i).
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
          is_full = true;  // there is room for them in the next round
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

  // Sorts the list and leaves the K best of it.
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

  // A block of columns is not taken in the order of its ids, so a tie may be won.
  __device__ __forceinline__ bool beats_threshold(A z, int id) const {
    return z > threshold_ || (z == threshold_ && id < threshold_id_);
  }

  A* values_;
  int* ids_;
  int k_, count_;
  A threshold_;
  int threshold_id_ = INT_MIN;  // no id is below it, nor a column before the row's first
};

}  // namespace opd
