// As driver.cpp, for the norms' backward: a Header, the rows of dy and x, stats and the weight in; a BackwardChosen and the bytes of dx, dw and db
// out (emulator.py is the other side).
#include "backward_driver.h"

#include <map>
#include <vector>

#include "buffers.h"

namespace {

struct Header {
  int64_t dtype, param_dtype, rms, has_weight, weight_grouped, need_dx, need_dw, need_db;
  int64_t groups, rows, n, dy_row_stride, x_row_stride, shared_limit, largest_cluster;
  int64_t dy_offset, x_offset, weight_offset, dx_offset, dw_offset, db_offset;  // bytes past a 256-byte boundary
};

std::map<int, BackwardRuns>& registry() {
  static std::map<int, BackwardRuns> runs;
  return runs;
}

// Rows of `row_bytes`, `stride` bytes apart, read from standard input.
class Rows {
 public:
  Rows(int64_t rows, int64_t row_bytes, int64_t stride, int64_t offset)
      : bytes_((rows - 1) * stride + row_bytes), sparse_(bytes_ > (size_t(1) << 30)), dense_buffer_(sparse_ ? 0 : bytes_, offset),
        sparse_buffer_(sparse_ ? bytes_ : 1) {
    for (int64_t r = 0; r < rows; ++r) read_bytes(data() + r * stride, row_bytes);
  }
  char* data() const { return static_cast<char*>(sparse_ ? sparse_buffer_.data() : dense_buffer_.data()); }

 private:
  size_t bytes_;
  bool sparse_;
  Buffer dense_buffer_;
  SparseBuffer sparse_buffer_;
};

void serve(const Header& h) {
  const int64_t size = bytes_of(h.dtype), param_size = bytes_of(h.param_dtype), acc = size == 8 ? 8 : 4;
  const int64_t weights = h.has_weight ? (h.weight_grouped ? h.groups : 1) * h.n * param_size : 0;
  const Rows dy(h.rows, h.n * size, h.dy_row_stride * size, h.dy_offset), x(h.rows, h.n * size, h.x_row_stride * size, h.x_offset);
  const Rows stats(h.rms ? 1 : 2, h.rows * acc, h.rows * acc, 0), weight(1, weights, 0, h.weight_offset);

  const auto found = registry().find(static_cast<int>(h.dtype));
  if (found == registry().end()) emulation::fail("this executable was built without this type");
  const BackwardDevice device{static_cast<size_t>(h.shared_limit), static_cast<int>(h.largest_cluster)};
  std::vector<char> first;
  for (const bool ascending : {true, false}) {
    Buffer dx(h.need_dx ? h.rows * h.n * size : 0, h.dx_offset);
    Buffer dw(h.need_dw ? h.groups * h.n * param_size : 0, h.dw_offset), db(h.need_db ? h.groups * h.n * param_size : 0, h.db_offset);
    fused_norm::NormBackward args{};
    args.dy = dy.data();
    args.x = x.data();
    args.stats = stats.data();
    args.weight = h.has_weight ? weight.data() : nullptr;
    args.dx = h.need_dx ? dx.data() : nullptr;
    args.dw = h.need_dw ? dw.data() : nullptr;
    args.db = h.need_db ? db.data() : nullptr;
    args.rows = h.rows;
    args.n = h.n;
    args.dy_row_stride = h.dy_row_stride;
    args.x_row_stride = h.x_row_stride;
    args.groups = h.groups;
    args.weight_grouped = h.weight_grouped;
    args.dtype = static_cast<fused_norm::DType>(h.dtype);
    args.param_dtype = static_cast<fused_norm::DType>(h.param_dtype);
    args.rms = h.rms;
    Buffer scratch(found->second.scratch_bytes(args, device), 0);
    args.scratch = scratch.data();
    const BackwardChosen chosen = found->second.backward(args, device, ascending);
    std::vector<char> result;
    for (const Buffer* buffer : {&dx, &dw, &db}) {
      const char* const data = static_cast<const char*>(buffer->data());
      result.insert(result.end(), data, data + buffer->bytes());
    }
    if (ascending) {
      first = std::move(result);
    } else if (first != result) {
      emulation::fail("the result depends on the order in which warps run or copies arrive");
    } else {
      fwrite(&chosen, sizeof chosen, 1, stdout);
      fwrite(result.data(), 1, result.size(), stdout);
    }
  }
}

}  // namespace

bool register_backward(int dtype, BackwardRuns runs) {
  registry()[dtype] = runs;
  return true;
}

int main() {
  Header header;
  while (fread(&header, sizeof header, 1, stdin) == 1) serve(header);
  return 0;
}
