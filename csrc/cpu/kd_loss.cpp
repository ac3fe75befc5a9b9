// fastdistil::kd_loss_fwd and fastdistil::kd_loss_fwd_ on the CPU; the mathematics is in kd_loss_rows.h.
#include "../common.h"

#include <cstring>

namespace fastdistil {
namespace {

struct Arguments {
  const Tensor& student;                       // (N, V)
  const Tensor& teacher;                       // (N, V)
  const std::optional<Tensor>& student_bias;   // (V,)
  const std::optional<Tensor>& teacher_bias;   // (V,)
  const std::optional<Tensor>& labels;         // (N,) int64
  const std::optional<Tensor>& kd_mask;        // (N,) bool
  const Tensor& kd_scale;                      // () or (N,)
  const Tensor& ce_scale;                      // () or (N,)
  double temperature;
  int64_t divergence;
  double jsd_beta;
  int64_t ignore_index;
  double label_smoothing;
};

// (V,) of any dtype as the accumulation type: one conversion a call, not one a row.
std::vector<char> convert_bias(const std::optional<Tensor>& bias, int64_t V, bool is_double, const char* name) {
  if (!bias.has_value()) return {};
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == V && (bias->stride(0) == 1 || V == 1), name,
                  " must be contiguous and have one element a vocabulary entry");
  std::vector<char> converted(static_cast<size_t>(V) * (is_double ? sizeof(double) : sizeof(float)));
  const Dtype dtype = dtype_of(*bias, name);
  if (is_double) {
    kernels().convert_to_double(bias->const_data_ptr(), dtype, V, reinterpret_cast<double*>(converted.data()));
  } else {
    kernels().convert_to_float(bias->const_data_ptr(), dtype, V, reinterpret_cast<float*>(converted.data()));
  }
  return converted;
}

// Writes kd and ce (N,), the gradient where there is one, and each row's weighted loss.
std::vector<double> run(const Arguments& args, const Tensor* grad, const Tensor& kd, const Tensor& ce) {
  const int64_t N = args.student.size(0);
  const int64_t V = args.student.size(1);
  const Rows student(args.student, "student");
  const Rows teacher(args.teacher, "teacher");
  STD_TORCH_CHECK(args.teacher.size(0) == N && args.teacher.size(1) == V, "student and teacher differ in shape");
  STD_TORCH_CHECK(args.divergence >= 0 && args.divergence <= 2, "divergence must be 0, 1 or 2, got ", args.divergence);
  const PerRow kd_scale(args.kd_scale, N, "kd_scale");
  const PerRow ce_scale(args.ce_scale, N, "ce_scale");
  const OptionalPerRow<int64_t> labels(args.labels, ScalarType::Long, N, "labels");
  const OptionalPerRow<bool> kd_mask(args.kd_mask, ScalarType::Bool, N, "kd_mask");
  for (int64_t row = 0; labels.has_value() && row < N; ++row) {
    STD_TORCH_CHECK(labels[row] == args.ignore_index || (labels[row] >= 0 && labels[row] < V),
                    "labels must be in [0, ", V, "), got ", labels[row], " in row ", row);
  }

  const bool is_double = student.dtype == Dtype::float64;
  const std::vector<char> student_bias = convert_bias(args.student_bias, V, is_double, "student_bias");
  const std::vector<char> teacher_bias = convert_bias(args.teacher_bias, V, is_double, "teacher_bias");
  const std::optional<Rows> grads = grad == nullptr ? std::nullopt : std::optional<Rows>(Rows(*grad, "grad"));

  KdLossProblem problem{};
  problem.V = V;
  problem.student_dtype = student.dtype;
  problem.teacher_dtype = teacher.dtype;
  problem.grad_dtype = grads.has_value() ? grads->dtype : student.dtype;
  problem.student_bias = student_bias.empty() ? nullptr : student_bias.data();
  problem.teacher_bias = teacher_bias.empty() ? nullptr : teacher_bias.data();
  problem.divergence = static_cast<Divergence>(args.divergence);
  problem.temperature = args.temperature;
  problem.jsd_beta = args.jsd_beta;
  problem.label_smoothing = args.label_smoothing;

  const auto kd_loss_row = is_double ? kernels().kd_loss_row_double : kernels().kd_loss_row_float;
  const int64_t acc_size = is_double ? sizeof(double) : sizeof(float);
  std::vector<double> losses(static_cast<size_t>(N));
  for_each_row(N, V, kd_loss_scratch(V) * acc_size, [&](int64_t index, void* scratch) {
    KdLossRow row{};
    row.student = student[index];
    row.teacher = teacher[index];
    row.grad = grads.has_value() ? (*grads)[index] : nullptr;
    row.has_kd = !kd_mask.has_value() || kd_mask[index];
    row.has_ce = labels.has_value() && labels[index] != args.ignore_index;
    row.label = row.has_ce ? labels[index] : 0;
    row.kd_scale = kd_scale[index];
    row.ce_scale = ce_scale[index];
    if (row.has_kd || row.has_ce) {
      kd_loss_row(problem, row, scratch);
      losses[index] = (row.has_kd ? row.kd_scale * row.kd : 0.0) + (row.has_ce ? row.ce_scale * row.ce : 0.0);
    } else if (row.grad != nullptr) {
      std::memset(row.grad, 0, static_cast<size_t>(V) * grad->element_size());
    }
    store_scalar(kd, index, row.kd);
    store_scalar(ce, index, row.ce);
  });
  return losses;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kd_loss_fwd(
    const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& labels,
    const std::optional<Tensor>& kd_mask, const Tensor& kd_scale, const Tensor& ce_scale, double temperature,
    int64_t divergence, double jsd_beta, int64_t ignore_index, double label_smoothing, bool reduce, bool with_grad) {
  const int64_t N = student.size(0);
  const ScalarType acc = accumulation_type(student);
  const std::optional<Tensor> no_bias;
  Tensor kd = empty({N}, acc);
  Tensor ce = empty({N}, acc);
  Tensor grad = with_grad ? empty({N, student.size(1)}, grad_type(student)) : empty({0}, grad_type(student));
  const Arguments args{student,  teacher,     no_bias,    no_bias,  labels,       kd_mask,        kd_scale,
                       ce_scale, temperature, divergence, jsd_beta, ignore_index, label_smoothing};
  const std::vector<double> losses = run(args, with_grad ? &grad : nullptr, kd, ce);
  return {row_losses(losses, reduce, acc), kd, ce, grad};
}

// The student's logits are overwritten by the gradient in their own dtype.
std::tuple<Tensor, Tensor> kd_loss_fwd_(
    const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& student_bias,
    const std::optional<Tensor>& teacher_bias, const std::optional<Tensor>& labels,
    const std::optional<Tensor>& kd_mask, const Tensor& kd_scale, const Tensor& ce_scale, double temperature,
    int64_t divergence, double jsd_beta, int64_t ignore_index, double label_smoothing, bool with_grad) {
  const int64_t N = student.size(0);
  const ScalarType acc = accumulation_type(student);
  Tensor kd = empty({N}, acc);
  Tensor ce = empty({N}, acc);
  const Arguments args{student,  teacher,     student_bias, teacher_bias, labels,       kd_mask,        kd_scale,
                       ce_scale, temperature, divergence,   jsd_beta,     ignore_index, label_smoothing};
  run(args, with_grad ? &student : nullptr, kd, ce);
  return {kd, ce};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdistil, CPU, m) {
  m.impl("kd_loss_fwd", TORCH_BOX(&kd_loss_fwd));
  m.impl("kd_loss_fwd_", TORCH_BOX(&kd_loss_fwd_));
}

}  // namespace fastdistil
