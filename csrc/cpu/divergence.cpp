// Two or three passes over a pair of rows; all but the first read the rows from the cache.

#include "divergence.h"

#include "online_sum.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>

namespace opd {
namespace {

// value where weight is not 0, else 0. A term of probability 0 is then 0 even if it is infinite.
template <typename T>
Vec<T> where_positive(Vec<T> weight, Vec<T> value) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>)
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(weight, _mm512_setzero_ps(), _CMP_NEQ_UQ), value);
#endif
  return Vec<T>::blendv(value, Vec<T>(0), weight == Vec<T>(0));
}

template <typename T>
struct Mixture {
  Vec<T> student, teacher;  // weights 1 - beta and beta

  explicit Mixture(double beta) : student(T(1 - beta)), teacher(T(beta)) {}

  Vec<T> log(Vec<T> p, Vec<T> q) const {
    const Vec<T> tiny(std::numeric_limits<T>::min());
    return at::vec::maximum(student * p + teacher * q, tiny).log();
  }
};

// A row of student logits, the row of teacher logits, and their normalisers.
template <typename T>
class Pair {
 public:
  Pair(T* raw, const Head<T>& head, const T* teacher_raw, const Head<T>& teacher_head,
       int64_t columns)
      : raw_(raw), head_(head), teacher_raw_(teacher_raw), teacher_head_(teacher_head),
        columns_(columns) {}

  // Computes both normalisers and the KL, from both sums of exponentials and E[z - y] under
  // softmax(z). z is the student and y the teacher for the reverse KL, and the other way round for
  // the forward KL.
  T kl(bool reverse) {
    OnlineSum<T> sum, other_sum;
    alignas(64) T student_z[kBlock], teacher_z[kBlock];
    for (int64_t first = 0; first < columns_; first += kBlock) {
      const int64_t count = std::min(kBlock, columns_ - first);
      const T peak = head_.logits(raw_, first, count, student_z);
      const T other_peak = teacher_head_.logits(teacher_raw_, first, count, teacher_z);
      T* weighted = reverse ? student_z : teacher_z;
      T* other = reverse ? teacher_z : student_z;
      sum.raise(reverse ? peak : other_peak);
      const double other_origin = other_sum.origin();
      other_sum.raise(reverse ? other_peak : peak);
      sum.weighted -= sum.total * (other_origin - other_sum.origin());
      const Vec<T> shift(sum.origin()), other_shift(other_sum.origin());
      Vec<T> total(0), terms(0), other_total(0);
      for (int64_t i = 0; i < padded<T>(count); i += Vec<T>::size()) {
        const auto z = Vec<T>::loadu(weighted + i) - shift;
        const auto y = Vec<T>::loadu(other + i) - other_shift;
        const auto weight = exp(z);
        total = total + weight;
        terms = terms + where_positive(weight, weight * (z - y));
        other_total = other_total + exp(y);
      }
      sum.total += sum_of(total);
      sum.weighted += sum_of(terms);
      other_sum.total += sum_of(other_total);
    }
    student_ = Normaliser(reverse ? sum : other_sum);
    teacher_ = Normaliser(reverse ? other_sum : sum);
    kl_ = sum.weighted / sum.total - std::log(sum.total) + std::log(other_sum.total);
    return kl_;
  }

  T jsd(double beta) {
    kl(false);
    const Mixture<T> mixture(beta);
    double loss = 0, slope = 0;
    alignas(64) T student_z[kBlock], teacher_z[kBlock];
    for (int64_t first = 0; first < columns_; first += kBlock) {
      const int64_t count = std::min(kBlock, columns_ - first);
      head_.logits(raw_, first, count, student_z);
      teacher_head_.logits(teacher_raw_, first, count, teacher_z);
      Vec<T> losses(0), slopes(0);
      for (int64_t i = 0; i < padded<T>(count); i += Vec<T>::size()) {
        const auto log_p = student_.log_probs(Vec<T>::loadu(student_z + i));
        const auto log_q = teacher_.log_probs(Vec<T>::loadu(teacher_z + i));
        const auto p = exp(log_p), q = exp(log_q);
        const auto log_m = mixture.log(p, q);
        const auto from_student = where_positive(p, p * mixture.student * (log_p - log_m));
        slopes = slopes + from_student;
        losses = losses + from_student;
        losses = losses + where_positive(q, q * mixture.teacher * (log_q - log_m));
      }
      loss += sum_of(losses);
      slope += sum_of(slopes);
    }
    slope_ = slope;
    return loss;
  }

  void reverse_kl_gradient(T upstream) {
    overwrite(upstream, [&](Vec<T> log_p, Vec<T> log_q) {
      const auto p = exp(log_p);
      return where_positive(p, p * (log_p - log_q - Vec<T>(kl_)));
    });
  }

  void forward_kl_gradient(T upstream) {
    overwrite(upstream, [&](Vec<T> log_p, Vec<T> log_q) { return exp(log_p) - exp(log_q); });
  }

  void jsd_gradient(T upstream, double beta) {
    const Mixture<T> mixture(beta);
    overwrite(upstream, [&](Vec<T> log_p, Vec<T> log_q) {
      const auto p = exp(log_p), q = exp(log_q);
      const auto w = mixture.student * (log_p - mixture.log(p, q));
      return where_positive(p, p * (w - Vec<T>(slope_)));
    });
  }

 private:
  // log p = (z - max) - log(sum). Subtracting the rounded max + log(sum) would be less exact.
  struct Normaliser {
    T max = 0, log_sum = 0;

    Normaliser() = default;
    explicit Normaliser(const OnlineSum<T>& sum)
        : max(sum.origin()), log_sum(std::log(sum.total)) {}

    Vec<T> log_probs(Vec<T> z) const { return z - Vec<T>(max) - Vec<T>(log_sum); }
  };

  template <typename Gradient>
  void overwrite(T upstream, const Gradient& gradient) {
    for (int64_t i = 0; i < columns_; i += Vec<T>::size()) {
      const int64_t count = std::min<int64_t>(Vec<T>::size(), columns_ - i);
      const auto score = head_.score(raw_, i, count);
      const auto z = head_.logit(score);
      const auto y = teacher_head_.logit(teacher_head_.score(teacher_raw_, i, count));
      const auto dz = gradient(student_.log_probs(z), teacher_.log_probs(y));
      (dz * Vec<T>(upstream) * head_.derivative(score)).store(raw_ + i, count);
    }
  }

  T* raw_;
  const Head<T>& head_;
  const T* teacher_raw_;
  const Head<T>& teacher_head_;
  int64_t columns_;
  Normaliser student_, teacher_;
  T kl_ = 0, slope_ = 0;
};

}  // namespace

template <typename T>
void divergence(const Chunk<T>& student, const Head<T>& head, const Chunk<T>& teacher,
                const Head<T>& teacher_head, double beta, const T* upstream, T* loss) {
  at::parallel_for(0, student.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* raw = student.data + row * student.stride;
      Pair<T> pair(raw, head, teacher.data + row * teacher.stride, teacher_head, student.columns);
      const bool is_kl = beta == 0 || beta == 1;
      loss[row] = is_kl ? pair.kl(beta == 1) : pair.jsd(beta);
      if (!upstream) continue;
      if (upstream[row] == 0)
        std::fill(raw, raw + student.columns, T(0));  // 0 * inf would be NaN
      else if (beta == 1)
        pair.reverse_kl_gradient(upstream[row]);
      else if (beta == 0)
        pair.forward_kl_gradient(upstream[row]);
      else
        pair.jsd_gradient(upstream[row], beta);
    }
  });
}

template void divergence(const Chunk<float>&, const Head<float>&, const Chunk<float>&,
                         const Head<float>&, double, const float*, float*);
template void divergence(const Chunk<double>&, const Head<double>&, const Chunk<double>&,
                         const Head<double>&, double, const double*, double*);

}  // namespace opd
