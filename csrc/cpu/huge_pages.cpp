// fastdistil::advise_huge_pages_ on the CPU, for buffers that Python allocates.
#include "../common.h"

namespace fastdistil {
namespace {

void advise(const Tensor& buffer) {
  advise_huge_pages(buffer.data_ptr(), buffer.numel() * static_cast<int64_t>(buffer.element_size()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdistil, CPU, m) { m.impl("advise_huge_pages_", TORCH_BOX(&advise)); }

}  // namespace fastdistil
