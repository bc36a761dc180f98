// The divergence between student and teacher over whole rows, and its gradient.
//
// A block processes one row. The first pass computes both logsumexps and the expectation of a KL. A
// JSD needs a second pass for its sums. The last pass writes the gradient. Each pass reads the rows
// from HBM, since the rows of all running blocks do not fit into the cache.

#include "head.cuh"
#include "online_sum.cuh"

namespace opd {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

template <typename A>
constexpr A kTiny = std::numeric_limits<A>::min();

// The sums of exponentials of z and y, relative to their largest logits so far, and expected = sum
// exp(z - max) * ((z - max) - (y - other_max)). They give KL(softmax(z) || softmax(y)).
template <typename A>
struct PairSum {
  A max, total, expected, other_max, other_total;

  __device__ __forceinline__ void raise(A peak, A other_peak) {
    if (peak > max) {
      const A gap = max - peak, decay = exp(gap);
      expected = decay == 0 ? A(0) : decay * (expected + total * gap);
      total *= decay;
      max = peak;
    }
    if (other_peak > other_max) {
      const A gap = other_max - other_peak;
      if (total != 0) expected -= total * gap;
      other_total *= exp(gap);
      other_max = other_peak;
    }
  }

  template <int kCount>
  __device__ __forceinline__ void absorb(const A (&z)[kCount], const A (&y)[kCount]) {
    A peak = z[0], other_peak = y[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) {
      peak = fmax(peak, z[i]);
      other_peak = fmax(other_peak, y[i]);
    }
    raise(peak, other_peak);
    const A shift = max == -kInfinity<A> ? A(0) : max;
    const A other_shift = other_max == -kInfinity<A> ? A(0) : other_max;
    A sum = 0, terms = 0, other_sum = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const A z_gap = z[i] - shift, y_gap = y[i] - other_shift, weight = exp(z_gap);
      sum += weight;
      terms += weight == 0 ? A(0) : weight * (z_gap - y_gap);
      other_sum += exp(y_gap);
    }
    total += sum;
    expected += terms;
    other_total += other_sum;
  }

  __device__ __forceinline__ void merge(PairSum other) {
    other.raise(max, other_max);
    raise(other.max, other.other_max);
    total += other.total;
    expected += other.expected;
    other_total += other.other_total;
  }
};

// A row of one model, student or teacher.
template <typename T>
struct Side {
  using A = Accumulator<T>;
  const T* raw;
  Head<A> head;

  // The final logits of columns [first, first + kCount), -inf outside of [0, columns).
  template <int kCount>
  __device__ __forceinline__ void logits(int first, int columns, A (&z)[kCount]) const {
    read_columns<kCount>(raw, first, columns, z);
    if (head.is_plain()) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) z[i] *= head.outer;
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        z[i] = head.logit(head.score(z[i], min(max(first + i, 0), columns - 1)));
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (unsigned(first + i) >= unsigned(columns)) z[i] = -kInfinity<A>;
  }
};

// Returns the sum over a block to every thread, added in a fixed order. Another barrier must
// precede the next call with the same parts.
template <typename A>
__device__ A block_sum(A value, A* parts) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value += __shfl_down_sync(kWholeWarp, value, distance);
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  A sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += parts[w];
  return sum;
}

template <typename A>
__device__ PairSum<A> block_merge(PairSum<A> sum, PairSum<A>* parts) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    sum.merge({__shfl_down_sync(kWholeWarp, sum.max, distance),
               __shfl_down_sync(kWholeWarp, sum.total, distance),
               __shfl_down_sync(kWholeWarp, sum.expected, distance),
               __shfl_down_sync(kWholeWarp, sum.other_max, distance),
               __shfl_down_sync(kWholeWarp, sum.other_total, distance)});
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = sum;
  __syncthreads();
  sum = parts[0];
  for (int w = 1; w < kWarps; ++w) sum.merge(parts[w]);
  return sum;
}

// log((1 - beta) p + beta q), finite even if p and q have underflowed to 0.
template <typename A>
__device__ __forceinline__ A log_mixture(A p, A q, A beta) {
  return log(fmax((1 - beta) * p + beta * q, kTiny<A>));
}

template <typename T>
struct Pair {
  const T *student, *teacher;  // [n, V]
  int64_t stride, teacher_stride;
  int columns;
};

template <typename T, typename O>
__global__ void __launch_bounds__(kThreads, kResidentThreads<T> / kThreads)
    divergence_kernel(Pair<T> pair, Head<Accumulator<T>> head, Head<Accumulator<T>> teacher_head,
                      double beta_, const Accumulator<T>* upstream, Accumulator<T>* losses, O* out,
                      int64_t out_stride) {
  using A = Accumulator<T>;
  constexpr int kCount = kGroup<T, O>;
  __shared__ PairSum<A> parts[kWarps];
  __shared__ A means[kWarps], rests[kWarps];
  const A beta = A(beta_);
  const bool is_forward = beta == 0, is_jsd = !is_forward && beta != 1;
  const int64_t row = blockIdx.x;
  const Side<T> student{pair.student + row * pair.stride, head};
  const Side<T> teacher{pair.teacher + row * pair.teacher_stride, teacher_head};
  // The first column of this thread. It may be negative, since the row may begin inside a vector.
  const int begin = int(threadIdx.x) * kCount - misalignment(student.raw, kCount);

  PairSum<A> sum{-kInfinity<A>, 0, 0, -kInfinity<A>, 0};
  for (int first = begin; first < pair.columns; first += kThreads * kCount) {
    A z[kCount], y[kCount];
    student.logits(first, pair.columns, z);
    teacher.logits(first, pair.columns, y);
    if (is_forward)
      sum.absorb(y, z);
    else
      sum.absorb(z, y);
  }
  sum = block_merge(sum, parts);
  const A log_total = log(sum.total), other_log_total = log(sum.other_total);
  A loss = sum.expected / sum.total - (log_total - other_log_total);
  // Subtracting max and log_total one after the other is more exact than subtracting their rounded
  // sum.
  const A peak = is_forward ? sum.other_max : sum.max;
  const A log_z = is_forward ? other_log_total : log_total;
  const A teacher_peak = is_forward ? sum.max : sum.other_max;
  const A teacher_log_z = is_forward ? log_total : other_log_total;

  // The gradient of a reverse KL or a JSD is p (w - E[w]); for a reverse KL, E[w] is the loss.
  A mean = loss;
  if (is_jsd) {
    A rest = 0;
    mean = 0;
    for (int first = begin; first < pair.columns; first += kThreads * kCount) {
      A z[kCount], y[kCount];
      student.logits(first, pair.columns, z);
      teacher.logits(first, pair.columns, y);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const A log_p = z[i] - peak - log_z, log_q = y[i] - teacher_peak - teacher_log_z;
        const A p = exp(log_p), q = exp(log_q), log_m = log_mixture(p, q, beta);
        mean += p == 0 ? A(0) : p * (1 - beta) * (log_p - log_m);
        rest += q == 0 ? A(0) : q * beta * (log_q - log_m);
      }
    }
    mean = block_sum(mean, means);
    loss = mean + block_sum(rest, rests);
  }
  if (threadIdx.x == 0) losses[row] = loss;
  if (!upstream) return;

  const A scale = upstream[row];
  for (int first = begin; first < pair.columns; first += kThreads * kCount) {
    A scores[kCount], y[kCount];
    read_columns<kCount>(student.raw, first, pair.columns, scores);
    teacher.logits(first, pair.columns, y);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int column = min(max(first + i, 0), pair.columns - 1);
      const A score = head.score(scores[i], column);
      const A log_p = head.logit(score) - peak - log_z;
      const A log_q = y[i] - teacher_peak - teacher_log_z;
      const A p = exp(log_p), q = exp(log_q);
      const A w = is_jsd ? (1 - beta) * (log_p - log_mixture(p, q, beta)) : log_p - log_q;
      const A slope = is_forward ? p - q : (p == 0 ? A(0) : p * (w - mean));
      scores[i] = scale == 0 ? A(0) : slope * scale * head.derivative(score);
    }
    write_columns<kCount>(scores, first, pair.columns, out + row * out_stride);
  }
}

}  // namespace
}  // namespace opd

int opd_divergence(OpdMatrix student, OpdHead head, OpdMatrix teacher, OpdHead teacher_head,
                   double beta, const void* upstream, void* losses, OpdMatrix out, void* stream) {
  if (student.dtype != teacher.dtype) return cudaErrorInvalidValue;
  return opd::for_dtypes(student.dtype, out.dtype, [&](auto zero, auto out_zero) {
    using T = decltype(zero);
    using O = decltype(out_zero);
    using A = opd::Accumulator<T>;
    const opd::Pair<T> pair{static_cast<const T*>(student.data),
                            static_cast<const T*>(teacher.data), student.stride, teacher.stride,
                            int(student.columns)};
    return opd::launch(opd::divergence_kernel<T, O>, dim3(unsigned(student.rows)), opd::kThreads,
                       stream, pair, opd::Head<A>(head), opd::Head<A>(teacher_head), beta,
                       static_cast<const A*>(upstream), static_cast<A*>(losses),
                       static_cast<O*>(out.data), out.stride);
  });
}
