// update reads a chunk once; gradient reads and writes it once.
//
// In update one warp processes a row, with four rows to a block, or all warps of a block process
// one row and take its tiles in turn. The logits on the support S are removed from a tile before
// the others are added to the online logsumexp of the tail, so that a tail far below the best
// logits keeps its precision. Every sum has a fixed order, so that two runs are bitwise equal.

#include "candidates.cuh"
#include "head.cuh"
#include "row.cuh"

namespace opd {
namespace {

constexpr int kRowsPerBlock = 4;  // if one warp processes a row
constexpr int kGradientThreads = 256;
constexpr int kSpan = 8192;  // columns of a row for a block of gradient_kernel

template <typename A>
struct State {
  A* values;     // [n, k]
  int64_t* ids;  // [n, k]
  int k;
  A *maxima, *sums, *moments;  // [n], moments may be null

  explicit State(const OpdState& state)
      : values(static_cast<A*>(state.values)), ids(state.ids), k(int(state.k)),
        maxima(static_cast<A*>(state.maxima)), sums(static_cast<A*>(state.sums)),
        moments(static_cast<A*>(state.moments)) {}

  __device__ void add_to_tail(int64_t row, const OnlineSum<A>& tail) const {
    OnlineSum<A> sum{maxima[row], sums[row], moments ? moments[row] : A(0)};
    sum.merge(tail);
    maxima[row] = sum.max;
    sums[row] = sum.total;
    if (moments) moments[row] = sum.moment;
  }
};

template <typename T>
struct Chunk {
  T* data;
  int64_t rows, stride;
  int columns, first_id;

  Chunk(const OpdMatrix& chunk, int64_t first_id)
      : data(static_cast<T*>(chunk.data)), rows(chunk.rows), stride(chunk.stride),
        columns(int(chunk.columns)), first_id(int(first_id)) {}

  __device__ Row<T> row(int64_t index) const { return {data + index * stride, columns}; }

  // The column of an id, or -1 if the id is -1 (an empty slot) or in another chunk.
  __device__ __forceinline__ int column_of(int64_t id) const {
    return id >= first_id && id - first_id < columns ? int(id - first_id) : -1;
  }
};

// The row that a warp processes, and the warp's index among the warps of this row.
template <int kWarps>
struct Place {
  static constexpr int kThreads = (kWarps == 1 ? kRowsPerBlock : kWarps) * kWarp;
  static constexpr int kRows = kWarps == 1 ? kRowsPerBlock : 1;

  int warp = threadIdx.x / kWarp;  // in the block
  int share = kWarps == 1 ? 0 : warp;  // among the warps of the row
  int64_t row = kWarps == 1 ? int64_t(blockIdx.x) * kRowsPerBlock + warp : blockIdx.x;
};

// Adds the tails of a row's warps to the state, in the order of the warps.
template <int kWarps, typename A>
__device__ void merge_tails(OnlineSum<A> tail, const State<A>& state, const Place<kWarps>& place) {
  tail.merge_warp();
  if constexpr (kWarps > 1) {
    __shared__ A maxima[kWarps], totals[kWarps], moments[kWarps];
    if (lane_id() == 0) {
      maxima[place.warp] = tail.max;
      totals[place.warp] = tail.total;
      moments[place.warp] = tail.moment;
    }
    __syncthreads();
    if (threadIdx.x == 0)
      for (int w = 1; w < kWarps; ++w) tail.merge({maxima[w], totals[w], moments[w]});
  }
  if (place.share == 0 && lane_id() == 0) state.add_to_tail(place.row, tail);
}

// The number of entries of a sorted list that are better than an entry of another list.
template <typename A>
__device__ int count_better(const A* values, const int* ids, int count, A value, int id) {
  int low = 0;
  for (int high = count; low < high;) {
    const int middle = (low + high) / 2;
    if (better(values[middle], ids[middle], value, id))
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

template <typename T, int kWarps, int kCapacity>
__global__ void __launch_bounds__(Place<kWarps>::kThreads,
                                  kResidentThreads<T> / Place<kWarps>::kThreads)
    select_kernel(Chunk<T> chunk, Head<Accumulator<T>> head, State<Accumulator<T>> state) {
  using A = Accumulator<T>;
  constexpr int kLists = Place<kWarps>::kThreads / kWarp;
  __shared__ A values[kLists][kCapacity];
  __shared__ int ids[kLists][kCapacity];
  const Place<kWarps> place;
  if (place.row >= chunk.rows) return;
  A* row_values = state.values + place.row * state.k;
  int64_t* row_ids = state.ids + place.row * state.k;

  int known = 0;
  for (int first = 0; first < state.k; first += kWarp) {
    const int slot = first + lane_id();
    const bool is_live = slot < state.k && row_ids[slot] >= 0;
    if (is_live && place.share == 0) {
      values[place.warp][slot] = row_values[slot];
      ids[place.warp][slot] = int(row_ids[slot]);
    }
    known += __popc(__ballot_sync(kWholeWarp, is_live));
  }
  const A threshold = known == state.k ? row_values[state.k - 1] : -kInfinity<A>;
  Candidates<A, kCapacity> best(values[place.warp], ids[place.warp], state.k,
                                place.share == 0 ? known : 0, threshold);
  OnlineSum<A> tail;
  const Row<T> row = chunk.row(place.row);
  for (int index = place.share; index < Tile<T>::count(row); index += kWarps) {
    Tile<T> tile(row, head, index);
    if (__any_sync(kWholeWarp, best.admits(tile.peak())))
      best.take(tile.z, [&](int i) { return chunk.first_id + tile.column(i); }, tail);
    tail.absorb(tile.z, state.moments != nullptr);
  }
  best.settle(tail);

  if constexpr (kWarps == 1) {
    for (int slot = lane_id(); slot < best.count(); slot += kWarp) {
      row_values[slot] = values[place.warp][slot];
      row_ids[slot] = ids[place.warp][slot];
    }
  } else {
    __shared__ int counts[kWarps];
    if (lane_id() == 0) counts[place.warp] = best.count();
    __syncthreads();
    for (int list = 0; list < kWarps; ++list) {
      for (int i = threadIdx.x; i < counts[list]; i += Place<kWarps>::kThreads) {
        const A value = values[list][i];
        const int id = ids[list][i];
        int rank = i;
        for (int other = 0; other < kWarps; ++other)
          if (other != list)
            rank += count_better(values[other], ids[other], counts[other], value, id);
        if (rank < state.k) {
          row_values[rank] = value;
          row_ids[rank] = id;
        } else {
          const A evicted[1] = {value};
          tail.absorb(evicted, true);
        }
      }
    }
  }
  merge_tails(tail, state, place);
}

template <typename T, int kWarps, int kCapacity>
__global__ void __launch_bounds__(Place<kWarps>::kThreads,
                                  kResidentThreads<T> / Place<kWarps>::kThreads)
    gather_kernel(Chunk<T> chunk, Head<Accumulator<T>> head, State<Accumulator<T>> state) {
  using A = Accumulator<T>;
  // The columns of S in ascending order, each with its slot, which a float32 holds exactly.
  __shared__ A slots[Place<kWarps>::kRows][kCapacity];
  __shared__ int columns[Place<kWarps>::kRows][kCapacity];
  __shared__ int counts[Place<kWarps>::kRows];
  const Place<kWarps> place;
  if (place.row >= chunk.rows) return;
  const int list = kWarps == 1 ? place.warp : 0;
  if (place.share == 0) {
    const int64_t* row_ids = state.ids + place.row * state.k;
    int count = 0;
    for (int first = 0; first < state.k; first += kWarp) {
      const int slot = first + lane_id();
      const int column = slot < state.k ? chunk.column_of(row_ids[slot]) : -1;
      const unsigned here = __ballot_sync(kWholeWarp, column >= 0);
      if (column >= 0) {
        const int next = count + __popc(here & ((1u << lane_id()) - 1));
        columns[list][next] = column;
        slots[list][next] = A(slot);
      }
      count += __popc(here);
    }
    sort<false>(slots[list], columns[list], count);
    if (lane_id() == 0) counts[list] = count;
  }
  if constexpr (kWarps == 1)
    __syncwarp();
  else
    __syncthreads();

  OnlineSum<A> tail;
  int next = 0;
  const Row<T> row = chunk.row(place.row);
  for (int index = place.share; index < Tile<T>::count(row); index += kWarps) {
    Tile<T> tile(row, head, index);
    for (; next < counts[list] && columns[list][next] < tile.end(); ++next) {
      const int column = columns[list][next];
      if (column < tile.begin()) continue;  // another warp processes its tile
#pragma unroll
      for (int i = 0; i < Tile<T>::kElements; ++i) {
        if (tile.column(i) == column) {
          state.values[place.row * state.k + int(slots[list][next])] = tile.z[i];
          tile.z[i] = -kInfinity<A>;
        }
      }
    }
    tail.absorb(tile.z, state.moments != nullptr);
  }
  merge_tails(tail, state, place);
}

template <typename A>
struct Support {
  const int64_t* ids;          // [n, k]
  const A* dvalues;            // [n, k]
  int k;
  const A *tails, *dtails;     // [n]
};

// A block processes a span of one row's columns. The derivative of a softcap needs the raw
// products, which `out` may overwrite. So the gradients on S are computed before the span is
// overwritten, and written after it.
template <typename T, typename O>
__global__ void __launch_bounds__(kGradientThreads, kResidentThreads<T> / kGradientThreads)
    gradient_kernel(Chunk<T> chunk, Head<Accumulator<T>> head, Support<Accumulator<T>> support,
                    O* out, int64_t out_stride) {
  using A = Accumulator<T>;
  constexpr int kCount = kGroup<T, O>;
  __shared__ A on_support[OPD_MAX_GIVEN];
  const int64_t row = blockIdx.x;
  const T* raw = chunk.data + row * chunk.stride;
  // Groups start at sixteen-byte vectors of both dtypes, if the rows of both are aligned alike.
  const int begin = int(blockIdx.y) * kSpan - misalignment(raw, kCount);
  const int end = begin + kSpan;
  const int64_t* ids = support.ids + row * support.k;
  out += row * out_stride;

  for (int slot = threadIdx.x; slot < support.k; slot += kGradientThreads) {
    const int column = chunk.column_of(ids[slot]);
    if (column >= begin && column < end && column >= 0)
      on_support[slot] = support.dvalues[row * support.k + slot] *
                         head.derivative(head.score(widened(raw[column]), column));
  }
  __syncthreads();

  // A row whose tail is -inf has no probability outside of S, and -inf - -inf would be NaN.
  const A tail = support.tails[row], dtail = support.dtails[row];
  const A origin = tail == -kInfinity<A> ? kInfinity<A> : tail;
  const int last = min(end, chunk.columns);
  for (int first = begin + int(threadIdx.x) * kCount; first < last;
       first += kGradientThreads * kCount) {
    A values[kCount];
    read_columns<kCount>(raw, first, chunk.columns, values);
    if (head.is_plain()) {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        values[i] = exp(values[i] * head.outer - origin) * dtail * head.outer;
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const A score = head.score(values[i], min(max(first + i, 0), chunk.columns - 1));
        values[i] = exp(head.logit(score) - origin) * dtail * head.derivative(score);
      }
    }
    write_columns<kCount>(values, first, chunk.columns, out);
  }
  __syncthreads();

  for (int slot = threadIdx.x; slot < support.k; slot += kGradientThreads) {
    const int column = chunk.column_of(ids[slot]);
    if (column >= begin && column < end && column >= 0) out[column] = rounded<O>(on_support[slot]);
  }
}

template <typename T, int kWarps>
int update(const OpdMatrix& chunk, int64_t first_id, const OpdHead& head, const OpdState& state,
           void* stream) {
  using Rows = Place<kWarps>;
  auto kernel = select_kernel<T, kWarps, 128>;
  if (state.selects)
    kernel = state.k <= 64 ? select_kernel<T, kWarps, 128> : select_kernel<T, kWarps, 512>;
  else
    kernel = state.k <= 128 ? gather_kernel<T, kWarps, 128> : gather_kernel<T, kWarps, 512>;
  const dim3 grid(unsigned((chunk.rows + Rows::kRows - 1) / Rows::kRows));
  return launch(kernel, grid, Rows::kThreads, stream, Chunk<T>(chunk, first_id), head, state);
}

}  // namespace
}  // namespace opd

int opd_update(OpdMatrix chunk, int64_t first_id, OpdHead head, OpdState state, int block_per_row,
               void* stream) {
  if (state.k < state.selects || state.k > (state.selects ? OPD_MAX_SELECTED : OPD_MAX_GIVEN))
    return cudaErrorInvalidValue;
  return opd::for_dtype(chunk.dtype, [&](auto zero) {
    using T = decltype(zero);
    // float64 lists of 512 entries for eight warps exceed the static shared memory of a block.
    constexpr int kBlockWarps = sizeof(T) == 8 ? 4 : 8;
    return block_per_row ? opd::update<T, kBlockWarps>(chunk, first_id, head, state, stream)
                         : opd::update<T, 1>(chunk, first_id, head, state, stream);
  });
}

int opd_gradient(OpdMatrix chunk, int64_t first_id, OpdHead head, const int64_t* ids,
                 const void* dvalues, int64_t k, const void* tails, const void* dtails,
                 OpdMatrix out, void* stream) {
  if (k < 0 || k > OPD_MAX_GIVEN) return cudaErrorInvalidValue;
  return opd::for_dtypes(chunk.dtype, out.dtype, [&](auto zero, auto out_zero) {
    using T = decltype(zero);
    using O = decltype(out_zero);
    using A = opd::Accumulator<T>;
    const opd::Support<A> support{ids, static_cast<const A*>(dvalues), int(k),
                                  static_cast<const A*>(tails), static_cast<const A*>(dtails)};
    // A row that begins inside a group takes one more group.
    const int64_t spans = (chunk.columns + opd::kGroup<T, O> - 2) / opd::kSpan + 1;
    const dim3 grid(unsigned(chunk.rows), unsigned(spans));
    return opd::launch(opd::gradient_kernel<T, O>, grid, opd::kGradientThreads, stream,
                       opd::Chunk<T>(chunk, first_id), opd::Head<A>(head), support,
                       static_cast<O*>(out.data), out.stride);
  });
}

const char* opd_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
