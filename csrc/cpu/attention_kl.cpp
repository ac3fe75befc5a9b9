// fastdistil::attention_kl_fwd and fastdistil::attention_kl_bwd on the CPU; the mathematics is in attention_kl_tiles.h.
#include "attention.h"

#include <cstring>

namespace fastdistil {
namespace {

// One head of one sequence, or a part of its queries.
struct Task {
  int64_t b, h, first, last;  // of the sequence's queries
};

std::vector<Task> make_tasks(const AttentionInputs& in, const CountedTokens& counted) {
  std::vector<Task> tasks;
  for (int64_t b = 0; b < in.B; ++b) {
    const int64_t queries = static_cast<int64_t>(counted.queries(b).size());
    const int64_t segments = segments_of(in.B * in.H, queries);
    for (int64_t h = 0; h < in.H; ++h) {
      for (int64_t part = 0; part < segments; ++part) {
        tasks.push_back({b, h, queries * part / segments, queries * (part + 1) / segments});
      }
    }
  }
  return tasks;
}

AttentionKlHead head_of(const AttentionInputs& in, const CountedTokens& counted, const Task& task,
                        double student_scale, double teacher_scale) {
  AttentionKlHead head{};
  head.student_q = in.student_q.at(task.b, task.h);
  head.student_k = in.student_k.at(task.b, task.h);
  head.teacher_q = in.teacher_q.at(task.b, task.h);
  head.teacher_k = in.teacher_k.at(task.b, task.h);
  head.student_scale = student_scale;
  head.teacher_scale = teacher_scale;
  head.queries = counted.queries(task.b).data() + task.first;
  head.num_queries = task.last - task.first;
  head.keys = counted.keys(task.b).data();
  head.num_keys = static_cast<int64_t>(counted.keys(task.b).size());
  head.pairs = counted.pairs(task.b);
  head.L = in.L;
  return head;
}

// The maxima and the sums of the rows from this one on.
SoftmaxRows softmax_rows(const Tensor& softmax, int64_t row) {
  return {element_of(softmax, row), element_of(softmax, softmax.numel() / 2 + row)};
}

void check_softmax(const Tensor& softmax, const AttentionInputs& in, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(softmax.scalar_type() == dtype && softmax.dim() == 4 && softmax.size(0) == 2 &&
                      softmax.size(1) == in.B && softmax.size(2) == in.H && softmax.size(3) == in.L &&
                      softmax.is_contiguous(),
                  name, " must be (2, B, H, L), contiguous and of the accumulation dtype");
}

int64_t scratch_bytes(const AttentionInputs& in, size_t acc_size) {
  return attention_kl_scratch(in.L, in.student_q.d, in.teacher_q.d) * static_cast<int64_t>(acc_size);
}

// A task takes long enough to be taken alone.
template <class Work>
void for_each_task(const std::vector<Task>& tasks, int64_t bytes, const Work& work) {
  for_each_row(static_cast<int64_t>(tasks.size()), INT64_MAX, bytes,
               [&](int64_t index, void* scratch) { work(index, tasks[static_cast<size_t>(index)], scratch); });
}

std::tuple<Tensor, Tensor, Tensor> attention_kl_fwd(const Tensor& student_q,            // (B, H, L, ds)
                                                    const Tensor& student_k,            // (B, H, L, ds)
                                                    const Tensor& teacher_q,            // (B, H, L, dt)
                                                    const Tensor& teacher_k,            // (B, H, L, dt)
                                                    const std::optional<Tensor>& mask,  // (B, L) or (B, L, L) bool
                                                    double student_scale, double teacher_scale) {
  const AttentionInputs in(student_q, student_k, teacher_q, teacher_k);
  const CountedTokens counted(mask, in.B, in.L);
  const ScalarType acc = accumulation_type(student_q);
  Tensor kl = empty({in.B, in.H, in.L}, acc);
  Tensor student_softmax = empty({2, in.B, in.H, in.L}, acc);
  Tensor teacher_softmax = empty({2, in.B, in.H, in.L}, acc);
  if (mask.has_value()) {
    for (Tensor* rows : {&kl, &student_softmax, &teacher_softmax}) torch::stable::zero_(*rows);
  }
  const bool is_double = acc == ScalarType::Double;
  const auto forward = is_double ? kernels().attention_kl_forward_double : kernels().attention_kl_forward_float;
  for_each_task(make_tasks(in, counted), scratch_bytes(in, kl.element_size()),
                [&](int64_t, const Task& task, void* scratch) {
                  const int64_t row = (task.b * in.H + task.h) * in.L;
                  forward(head_of(in, counted, task, student_scale, teacher_scale),
                          {element_of(kl, row), softmax_rows(student_softmax, row), softmax_rows(teacher_softmax, row)},
                          scratch);
                });
  return {kl, student_softmax, teacher_softmax};
}

// Adds up the parts of one head's grad_k in their order, and writes it in the gradient's dtype.
template <class Acc>
void write_grad_k(const std::vector<std::vector<char>>& parts, size_t first, size_t count, const int64_t* keys,
                  int64_t num_keys, const MutableTokens& target,
                  void (*convert)(const Acc*, int64_t, Dtype, void*)) {
  const int64_t width = pad_to(target.d, kPad);
  std::vector<Acc> sum(static_cast<size_t>(target.d));
  for (int64_t key = 0; key < num_keys; ++key) {
    for (int64_t i = 0; i < target.d; ++i) {
      sum[i] = 0;
      for (size_t part = first; part < first + count; ++part) {
        sum[i] += reinterpret_cast<const Acc*>(parts[part].data())[key * width + i];
      }
    }
    convert(sum.data(), target.d, target.dtype, target.data + keys[key] * target.pitch);
  }
}

std::tuple<Tensor, Tensor> attention_kl_bwd(const Tensor& weight,                // (B, H, L)
                                            const Tensor& student_q,             // (B, H, L, ds)
                                            const Tensor& student_k,             // (B, H, L, ds)
                                            const Tensor& teacher_q,             // (B, H, L, dt)
                                            const Tensor& teacher_k,             // (B, H, L, dt)
                                            const std::optional<Tensor>& mask,   // (B, L) or (B, L, L) bool
                                            const Tensor& student_softmax,       // (2, B, H, L)
                                            const Tensor& teacher_softmax,       // (2, B, H, L)
                                            double student_scale, double teacher_scale) {
  const AttentionInputs in(student_q, student_k, teacher_q, teacher_k);
  const CountedTokens counted(mask, in.B, in.L);
  const ScalarType acc = accumulation_type(student_q);
  check_rows(weight, in, acc, "weight");
  check_softmax(student_softmax, in, acc, "student_softmax");
  check_softmax(teacher_softmax, in, acc, "teacher_softmax");
  Tensor grad_q = torch::stable::empty_like(student_q);
  Tensor grad_k = torch::stable::empty_like(student_k);
  if (mask.has_value()) {
    torch::stable::zero_(grad_q);
    torch::stable::zero_(grad_k);
  }
  const Heads grads_q(grad_q, "grad_q"), grads_k(grad_k, "grad_k");
  const bool is_double = acc == ScalarType::Double;
  const auto backward = is_double ? kernels().attention_kl_backward_double : kernels().attention_kl_backward_float;
  const int64_t acc_size = static_cast<int64_t>(weight.element_size());
  const int64_t width = pad_to(in.student_q.d, kPad);

  const std::vector<Task> tasks = make_tasks(in, counted);
  const bool whole_heads = tasks.size() == static_cast<size_t>(in.B * in.H);
  std::vector<std::vector<char>> parts(tasks.size());
  const auto write = [&](size_t first, size_t count, const Task& task) {
    const std::vector<int64_t>& keys = counted.keys(task.b);
    const MutableTokens target = grads_k.mutable_at(task.b, task.h);
    const int64_t n = static_cast<int64_t>(keys.size());
    if (is_double) {
      write_grad_k<double>(parts, first, count, keys.data(), n, target, kernels().convert_from_double);
    } else {
      write_grad_k<float>(parts, first, count, keys.data(), n, target, kernels().convert_from_float);
    }
  };
  for_each_task(tasks, scratch_bytes(in, weight.element_size()), [&](int64_t index, const Task& task, void* scratch) {
    const int64_t row = (task.b * in.H + task.h) * in.L;
    std::vector<char>& part = parts[static_cast<size_t>(index)];
    part.resize(counted.keys(task.b).size() * static_cast<size_t>(width * acc_size));
    AttentionKlGrads grads{};
    grads.weight = element_of(weight, row);
    grads.student = softmax_rows(student_softmax, row);
    grads.teacher = softmax_rows(teacher_softmax, row);
    grads.grad_q = grads_q.mutable_at(task.b, task.h);
    grads.grad_k = part.data();
    backward(head_of(in, counted, task, student_scale, teacher_scale), grads, scratch);
    if (whole_heads) {
      write(static_cast<size_t>(index), 1, task);
      std::vector<char>().swap(part);
    }
  });
  for (size_t first = 0; !whole_heads && first < tasks.size();) {
    size_t count = 1;
    while (first + count < tasks.size() && tasks[first + count].first > 0) ++count;
    write(first, count, tasks[first]);
    first += count;
  }
  return {grad_q, grad_k};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdistil, CPU, m) {
  m.impl("attention_kl_fwd", TORCH_BOX(&attention_kl_fwd));
  m.impl("attention_kl_bwd", TORCH_BOX(&attention_kl_bwd));
}

}  // namespace fastdistil
