// update reads a chunk once; gradient reads and writes it once.
//
// A row is processed in blocks. The logits of a block are written to a buffer, and those on the
// support S are removed before the others are added to the online logsumexp of the tail (Milakov
// and Gimelshein, arXiv 1805.02867). A tail far below the best logits keeps its precision in this
// way.

#include "epilogue.h"

#include "online_sum.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

namespace opd {
namespace {

template <typename T>
struct Candidate {
  T value;
  int64_t id;
};

// Of two equal logits, the one with the lower id is better, as in a stable sort.
template <typename T>
bool better(const Candidate<T>& a, const Candidate<T>& b) {
  return a.value > b.value || (a.value == b.value && a.id < b.id);
}

// The best K logits so far, as a heap with the worst of them on top.
template <typename T>
class TopK {
 public:
  void load(const T* values, const int64_t* ids, int64_t k) {
    heap_.resize(k);
    changed_ = false;
    // The state is sorted from best to worst, so its reverse is a heap.
    for (int64_t i = 0; i < k; ++i) heap_[k - 1 - i] = {values[i], ids[i]};
  }

  // Writes the best K logits, from best to worst, over the K that were loaded. Those of the loaded
  // ones that are still among the best are their first ones, in order, so only the logits of this
  // chunk, whose ids begin at first_id, are sorted, and then merged from the end. Sorting all K in
  // each of many chunks took three times as long as the rest at K = 4,096.
  void store(T* values, int64_t* ids, int64_t first_id) {
    if (!changed_) return;
    const auto is_loaded = [first_id](const Candidate<T>& c) { return c.id < first_id; };
    const auto fresh = std::partition(heap_.begin(), heap_.end(), is_loaded);
    // NaN comes last. Without a strict order std::sort may access memory outside of its range.
    std::sort(fresh, heap_.end(), [](const Candidate<T>& a, const Candidate<T>& b) {
      return better(a, b) || (b.value != b.value && a.value == a.value);
    });
    int64_t loaded = fresh - heap_.begin();
    int64_t slot = heap_.size();
    for (auto next = heap_.end(); next != fresh;) {
      Candidate<T> worst = next[-1];
      if (loaded > 0 && better(worst, {values[loaded - 1], ids[loaded - 1]})) {
        --loaded;
        worst = {values[loaded], ids[loaded]};
      } else {
        --next;
      }
      --slot;
      values[slot] = worst.value;
      ids[slot] = worst.id;
    }
  }

  T threshold() const { return heap_.front().value; }

  // Replaces the worst candidate by a better one and returns the logit of the worst.
  T replace_worst(Candidate<T> candidate) {
    const T evicted = threshold();
    const int64_t size = heap_.size();
    int64_t hole = 0;
    for (int64_t child = 1; child < size; child = 2 * hole + 1) {
      if (child + 1 < size && better(heap_[child], heap_[child + 1])) ++child;
      if (!better(candidate, heap_[child])) break;
      heap_[hole] = heap_[child];
      hole = child;
    }
    heap_[hole] = candidate;
    changed_ = true;
    return evicted;
  }

 private:
  std::vector<Candidate<T>> heap_;
  bool changed_ = false;
};

// The column of an id in the chunk, or -1 if the id is -1 (an empty slot) or in another chunk.
template <typename T>
int64_t column_of(int64_t id, const Chunk<T>& chunk) {
  return id >= chunk.first_id && id - chunk.first_id < chunk.columns ? id - chunk.first_id : -1;
}

// A column of S and its slot in ids.
struct Target {
  int64_t column, slot;
};

// Collects the columns of S in this chunk in ascending order; of repeated columns, the first slot.
template <typename T>
void load_targets(const int64_t* ids, int64_t k, const Chunk<T>& chunk,
                  std::vector<Target>& targets) {
  targets.clear();
  for (int64_t slot = 0; slot < k; ++slot) {
    const int64_t column = column_of(ids[slot], chunk);
    if (column >= 0) targets.push_back({column, slot});
  }
  std::sort(targets.begin(), targets.end(), [](const Target& a, const Target& b) {
    return a.column < b.column || (a.column == b.column && a.slot < b.slot);
  });
  const auto is_repeated = [](const Target& a, const Target& b) { return a.column == b.column; };
  targets.erase(std::unique(targets.begin(), targets.end(), is_repeated), targets.end());
}

// Adds a block of logits to the sum and, if with_moment, to its first moment for the entropy.
template <typename T>
void absorb(OnlineSum<T>& sum, const T* z, int64_t count, T peak, bool with_moment) {
  if (peak == -kInfinity<T>) return;
  sum.raise(peak);
  const Vec<T> shift(sum.max);
  Vec<T> total(0), products(0);
  for (int64_t i = 0; i < padded<T>(count); i += Vec<T>::size()) {
    const auto gap = Vec<T>::loadu(z + i) - shift;
    const auto weight = exp(gap);
    total = total + weight;
    if (with_moment) {
      const Vec<T> finite(std::numeric_limits<T>::lowest());
      products = at::vec::fmadd(weight, at::vec::maximum(gap, finite), products);
    }
  }
  sum.total += sum_of(total);
  if (with_moment) sum.weighted += sum_of(products);
}

// Moves every logit of the block that beats the worst of the running top-K into the top-K. The
// evicted logit takes its place in the block, and is later added to the tail.
template <typename T>
void select(T* z, int64_t count, int64_t first_id, TopK<T>& best) {
  constexpr int none = (1 << Vec<T>::size()) - 1;
  for (int64_t i = 0; i < padded<T>(count); i += Vec<T>::size()) {
    if ((Vec<T>::loadu(z + i) > Vec<T>(best.threshold())).zero_mask() == none) continue;
    for (int64_t j = i; j < i + Vec<T>::size(); ++j)
      if (z[j] > best.threshold()) z[j] = best.replace_worst({z[j], first_id + j});
  }
}

template <typename T>
void update_row(const T* raw, const Chunk<T>& chunk, const Head<T>& head, const State<T>& state,
                int64_t row, TopK<T>& best, std::vector<Target>& targets) {
  T* values = state.values + row * state.k;
  int64_t* ids = state.ids + row * state.k;
  if (state.selects)
    best.load(values, ids, state.k);
  else
    load_targets(ids, state.k, chunk, targets);
  OnlineSum<T> tail{state.max[row], state.sum[row], state.moment ? state.moment[row] : T(0)};
  auto target = targets.begin();
  alignas(64) T z[kBlock];
  for (int64_t first = 0; first < chunk.columns; first += kBlock) {
    const int64_t count = std::min(kBlock, chunk.columns - first);
    T peak = head.logits(raw, first, count, z);
    bool is_changed = false;  // then the block has another maximum
    if (state.selects) {
      is_changed = peak > best.threshold() || peak != peak;
      if (is_changed) select(z, count, chunk.first_id + first, best);
    } else {
      for (; target != targets.end() && target->column < first + count; ++target) {
        values[target->slot] = z[target->column - first];
        z[target->column - first] = -kInfinity<T>;
        is_changed = true;
      }
    }
    absorb(tail, z, count, is_changed ? max_of(z, count) : peak, state.moment != nullptr);
  }
  if (state.selects) best.store(values, ids, chunk.first_id);
  state.max[row] = tail.max;
  state.sum[row] = tail.total;
  if (state.moment) state.moment[row] = tail.weighted;
}

template <typename T>
void gradient_row(T* raw, const Chunk<T>& chunk, const Head<T>& head, const int64_t* ids,
                  const T* dvalues, int64_t k, T tail, T dtail, std::vector<T>& on_support) {
  on_support.resize(k);
  for (int64_t slot = 0; slot < k; ++slot) {
    const int64_t column = column_of(ids[slot], chunk);
    if (column >= 0) on_support[slot] = dvalues[slot] * head.derivative_at(raw, column);
  }
  // A row whose tail is -inf has no probability outside of S, and -inf - -inf would be NaN.
  const Vec<T> shift(tail == -kInfinity<T> ? kInfinity<T> : tail);
  for (int64_t i = 0; i < chunk.columns; i += Vec<T>::size()) {
    const int64_t count = std::min<int64_t>(Vec<T>::size(), chunk.columns - i);
    const auto score = head.score(raw, i, count);
    const auto softmax = exp(head.logit(score) - shift);
    (softmax * Vec<T>(dtail) * head.derivative(score)).store(raw + i, count);
  }
  for (int64_t slot = 0; slot < k; ++slot) {
    const int64_t column = column_of(ids[slot], chunk);
    if (column >= 0) raw[column] = on_support[slot];
  }
}

// The logits on S are set to inf, above every threshold. A NaN threshold keeps every column, so
// that the gradient of a NaN row stays NaN.
template <typename T>
T filter_row(const T* raw, const Chunk<T>& chunk, const Head<T>& head, const T* dvalues, T tail,
             T dtail, T threshold, const std::vector<Target>& targets,
             std::vector<Entry<T>>& entries) {
  double kept = 0;
  auto target = targets.begin();
  alignas(64) T z[kBlock];
  for (int64_t first = 0; first < chunk.columns; first += kBlock) {
    const int64_t count = std::min(kBlock, chunk.columns - first);
    const T peak = head.logits(raw, first, count, z);
    const bool has_target = target != targets.end() && target->column < first + count;
    if (peak < threshold && !has_target) continue;
    for (auto t = target; t != targets.end() && t->column < first + count; ++t)
      z[t->column - first] = kInfinity<T>;
    for (int64_t i = 0; i < padded<T>(count); i += Vec<T>::size()) {
      if ((Vec<T>::loadu(z + i) < Vec<T>(threshold)).zero_mask() == 0) continue;
      for (int64_t j = i; j < std::min(i + Vec<T>::size(), count); ++j) {
        const int64_t column = first + j;
        if (target != targets.end() && target->column == column) {
          entries.push_back({column, dvalues[target++->slot] * head.derivative_at(raw, column)});
        } else if (!(z[j] < threshold) && z[j] != -kInfinity<T>) {
          const T softmax = std::exp(z[j] - tail);
          kept += softmax;
          entries.push_back({column, softmax * dtail * head.derivative_at(raw, column)});
        }
      }
    }
  }
  return kept;
}

// The fewest rows that are worth another thread: at least 32,768 elements.
int64_t grain(int64_t columns) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, columns));
}

}  // namespace

template <typename T>
void update(const Chunk<T>& chunk, const Head<T>& head, const State<T>& state) {
  at::parallel_for(0, chunk.rows, grain(chunk.columns), [&](int64_t begin, int64_t end) {
    TopK<T> best;
    std::vector<Target> targets;
    for (int64_t row = begin; row < end; ++row)
      update_row<T>(chunk.data + row * chunk.stride, chunk, head, state, row, best, targets);
  });
}

template <typename T>
void gradient(const Chunk<T>& chunk, const Head<T>& head, const int64_t* ids, const T* dvalues,
              int64_t k, const T* tail, const T* dtail) {
  at::parallel_for(0, chunk.rows, grain(chunk.columns), [&](int64_t begin, int64_t end) {
    std::vector<T> on_support;
    for (int64_t row = begin; row < end; ++row)
      gradient_row(chunk.data + row * chunk.stride, chunk, head, ids + row * k, dvalues + row * k,
                   k, tail[row], dtail[row], on_support);
  });
}

template <typename T>
std::vector<std::vector<Entry<T>>> filtered_gradient(const Chunk<T>& chunk, const Head<T>& head,
                                                     const int64_t* ids, const T* dvalues,
                                                     int64_t k, const T* tail, const T* dtail,
                                                     const T* threshold, T* kept) {
  std::vector<std::vector<Entry<T>>> entries(chunk.rows);
  at::parallel_for(0, chunk.rows, grain(chunk.columns), [&](int64_t begin, int64_t end) {
    std::vector<Target> targets;
    for (int64_t row = begin; row < end; ++row) {
      load_targets(ids + row * k, k, chunk, targets);
      kept[row] = filter_row<T>(chunk.data + row * chunk.stride, chunk, head, dvalues + row * k,
                                tail[row], dtail[row], threshold[row], targets, entries[row]);
    }
  });
  return entries;
}

template void update(const Chunk<float>&, const Head<float>&, const State<float>&);
template void update(const Chunk<double>&, const Head<double>&, const State<double>&);
template void gradient(const Chunk<float>&, const Head<float>&, const int64_t*, const float*,
                       int64_t, const float*, const float*);
template void gradient(const Chunk<double>&, const Head<double>&, const int64_t*, const double*,
                       int64_t, const double*, const double*);
template std::vector<std::vector<Entry<float>>> filtered_gradient(
    const Chunk<float>&, const Head<float>&, const int64_t*, const float*, int64_t, const float*,
    const float*, const float*, float*);
template std::vector<std::vector<Entry<double>>> filtered_gradient(
    const Chunk<double>&, const Head<double>&, const int64_t*, const double*, int64_t,
    const double*, const double*, const double*, double*);

}  // namespace opd
