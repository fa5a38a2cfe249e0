// As driver.cpp, for the ticks loss: a Header, the rows of z and of target, weight, and for backward stats, grad and grad_lse in; a
// TicksChosen, and loss and stats or dz and dtarget out (emulator.py is the other side).
//
// A row that is ignored may not be read: its memory is poisoned. Between rows that are written in place nothing may change.
#include "ticks_driver.h"

#include <algorithm>
#include <map>
#include <vector>

#include "buffers.h"

namespace {

constexpr int64_t kNone = -1;  // as a dtype: there is no such operand; of target: int64 indices

struct Header {
  int64_t backward, dtype, target_dtype, weight_dtype, rows, classes, z_row_stride, target_row_stride, ignore_index;
  int64_t has_grad_lse, grad_stride, grad_lse_stride, need_dz, need_dtarget, in_place;
  int64_t z_offset, target_offset, weight_offset, dz_offset, dtarget_offset;  // bytes past a 256-byte boundary
  double smoothing, ce, ticks, softcap;
};

std::map<int64_t, TicksRuns>& registry() {
  static std::map<int64_t, TicksRuns> runs;
  return runs;
}

// `rows` rows of `row_bytes`, `stride` bytes apart, to be filled from standard input once and put back as they were before each run.
class Rows {
 public:
  Rows(int64_t rows, int64_t row_bytes, int64_t stride, int64_t offset)
      : rows_(rows), row_bytes_(row_bytes), stride_(stride), bytes_((rows - 1) * stride + row_bytes), sparse_(bytes_ > (size_t(1) << 30)),
        dense_buffer_(sparse_ ? 0 : bytes_, offset), sparse_buffer_(sparse_ ? bytes_ : 1), content_(rows * row_bytes) {
    read_bytes(content_.data(), content_.size());
  }
  char* row(int64_t r) const { return static_cast<char*>(sparse_ ? sparse_buffer_.data() : dense_buffer_.data()) + r * stride_; }
  void restore() {
    for (int64_t r = 0; r < rows_ && row_bytes_ > 0; ++r) memcpy(row(r), content_.data() + r * row_bytes_, row_bytes_);
  }
  void expect_untouched_between_rows() const {
    for (int64_t r = 0; !sparse_ && r + 1 < rows_; ++r) {
      for (char* p = row(r) + row_bytes_; p < row(r + 1); ++p) {
        if (static_cast<unsigned char>(*p) != 0xff) emulation::fail("a write between two rows");
      }
    }
  }
  size_t row_bytes() const { return row_bytes_; }

 private:
  int64_t rows_, row_bytes_, stride_;
  size_t bytes_;
  bool sparse_;
  Buffer dense_buffer_;
  SparseBuffer sparse_buffer_;
  std::vector<char> content_;
};

void append(std::vector<char>& all, const void* p, size_t bytes) {
  all.insert(all.end(), static_cast<const char*>(p), static_cast<const char*>(p) + bytes);
}

void serve(const Header& h) {
  const int64_t size = bytes_of(h.dtype), acc = size == 8 ? 8 : 4;
  const bool soft = h.target_dtype != kNone, weighted = h.weight_dtype != kNone;
  const int64_t target_size = soft ? bytes_of(h.target_dtype) : 8;
  Rows z(h.rows, h.classes * size, h.z_row_stride * size, h.z_offset);
  Rows target(soft ? h.rows : 1, (soft ? h.classes : h.rows) * target_size, h.target_row_stride * target_size, h.target_offset);
  Rows weight(1, weighted ? h.classes * bytes_of(h.weight_dtype) : 0, 0, h.weight_offset);
  target.restore();
  weight.restore();

  fused_norm::Ticks ticks{};
  ticks.z = z.row(0);
  ticks.target = target.row(0);
  ticks.weight = weighted ? weight.row(0) : nullptr;
  ticks.rows = h.rows;
  ticks.classes = h.classes;
  ticks.z_row_stride = h.z_row_stride;
  ticks.target_row_stride = soft ? h.target_row_stride : 0;
  ticks.ignore_index = h.ignore_index;
  ticks.soft = soft;
  ticks.dtype = static_cast<fused_norm::DType>(h.dtype);
  ticks.target_dtype = static_cast<fused_norm::DType>(soft ? h.target_dtype : h.dtype);
  ticks.weight_dtype = static_cast<fused_norm::DType>(weighted ? h.weight_dtype : h.dtype);
  ticks.smoothing = h.smoothing;
  ticks.ce = h.ce;
  ticks.ticks = h.ticks;
  ticks.softcap = h.softcap;

  const int64_t kept = fused_norm::is_plain(ticks) ? 3 : 4;
  Rows stats_in(1, h.backward ? kept * h.rows * acc : 0, 0, 0);
  Rows grad(h.backward && h.grad_stride ? h.rows : 1, h.backward ? acc : 0, h.grad_stride * acc, 0);
  Rows grad_lse(h.has_grad_lse && h.grad_lse_stride ? h.rows : 1, h.has_grad_lse ? acc : 0, h.grad_lse_stride * acc, 0);
  stats_in.restore();
  grad.restore();
  grad_lse.restore();

  const auto is_ignored = [&](int64_t r) { return !soft && reinterpret_cast<const int64_t*>(target.row(0))[r] == h.ignore_index; };
  const auto found = registry().find(h.dtype);
  if (found == registry().end()) emulation::fail("this executable was built without this type");
  std::vector<char> first;
  for (const bool ascending : {true, false}) {
    z.restore();
    for (int64_t r = 0; r < h.rows && !h.in_place; ++r) {
      if (is_ignored(r)) ASAN_POISON_MEMORY_REGION(z.row(r), z.row_bytes());
    }
    TicksChosen chosen;
    std::vector<char> result;
    if (!h.backward) {
      Buffer loss(h.rows * acc, 0), stats(kept * h.rows * acc, 0);
      chosen = found->second.forward({ticks, loss.data(), stats.data()}, ascending);
      append(result, loss.data(), loss.bytes());
      append(result, stats.data(), stats.bytes());
    } else {
      Buffer dz(h.need_dz && !h.in_place ? h.rows * h.classes * size : 0, h.dz_offset);
      Buffer dtarget(h.need_dtarget ? h.rows * h.classes * target_size : 0, h.dtarget_offset);
      fused_norm::TicksBackward args{};
      args.ticks = ticks;
      args.stats = stats_in.row(0);
      args.grad = grad.row(0);
      args.grad_lse = h.has_grad_lse ? grad_lse.row(0) : nullptr;
      args.grad_stride = h.grad_stride;
      args.grad_lse_stride = h.grad_lse_stride;
      args.dz = h.in_place ? z.row(0) : h.need_dz ? dz.data() : nullptr;
      args.dtarget = h.need_dtarget ? dtarget.data() : nullptr;
      args.dz_row_stride = h.in_place ? h.z_row_stride : h.classes;
      chosen = found->second.backward(args, ascending);
      for (int64_t r = 0; r < h.rows && h.in_place; ++r) append(result, z.row(r), z.row_bytes());
      if (h.in_place) z.expect_untouched_between_rows();
      append(result, dz.data(), dz.bytes());
      append(result, dtarget.data(), dtarget.bytes());
    }
    for (int64_t r = 0; r < h.rows; ++r) ASAN_UNPOISON_MEMORY_REGION(z.row(r), z.row_bytes());
    if (ascending) {
      first = std::move(result);
    } else if (first != result) {
      emulation::fail("the result depends on the order in which warps run");
    } else {
      fwrite(&chosen, sizeof chosen, 1, stdout);
      fwrite(result.data(), 1, result.size(), stdout);
    }
  }
}

}  // namespace

bool register_ticks(int dtype, TicksRuns runs) {
  registry()[dtype] = runs;
  return true;
}

int main() {
  Header header;
  while (fread(&header, sizeof header, 1, stdin) == 1) serve(header);
  return 0;
}
