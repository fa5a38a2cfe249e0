// Reads calls from standard input until it ends, runs each in the emulation, and writes the results to standard output: a Header and the
// bytes of x's rows, of weight and of bias in, a Chosen and the bytes of y and stats out (emulator.py is the other side).
//
// Every buffer begins exactly where the caller wants it relative to 16-byte alignment, and AddressSanitizer guards both its ends.
// A call runs under two schedules; the results must agree to the last bit.
#include "driver.h"

#include <cstdio>
#include <map>
#include <utility>
#include <vector>

#include "buffers.h"
#include "emulation.h"

namespace {

struct Header {
  int64_t dtype, param_dtype, rms, cast, need_stats, has_weight, has_bias, weight_grouped, bias_grouped;
  int64_t groups, rows, n, x_row_stride, compute_capability, shared_limit, largest_cluster;
  int64_t x_offset, y_offset, weight_offset, bias_offset;  // bytes past a 256-byte boundary
  double eps;
};

std::map<std::pair<int, int>, Run>& registry() {
  static std::map<std::pair<int, int>, Run> runs;
  return runs;
}

void serve(const Header& h) {
  const size_t size = bytes_of(h.dtype), param_size = bytes_of(h.param_dtype), acc_size = size == 8 ? 8 : 4;
  const auto param_bytes = [&](bool grouped) { return static_cast<size_t>(grouped ? h.groups * h.n : h.n) * param_size; };
  const size_t stats_rows = h.need_stats ? (h.rms ? 1 : 2) : 0;
  const size_t x_bytes = static_cast<size_t>((h.rows - 1) * h.x_row_stride + h.n) * size;
  const bool sparse = x_bytes > (size_t(1) << 30);
  const Buffer dense_x(sparse ? 0 : x_bytes, h.x_offset);
  const SparseBuffer sparse_x(sparse ? x_bytes : 1);
  char* const x = static_cast<char*>(sparse ? sparse_x.data() : dense_x.data());
  Buffer weight(h.has_weight ? param_bytes(h.weight_grouped) : 0, h.weight_offset), bias(h.has_bias ? param_bytes(h.bias_grouped) : 0, h.bias_offset);
  for (int64_t r = 0; r < h.rows; ++r) read_bytes(x + r * h.x_row_stride * size, h.n * size);
  weight.read();
  bias.read();

  const auto found = registry().find({h.dtype, h.param_dtype});
  if (found == registry().end()) emulation::fail("this executable was built without these types");
  const ForwardDevice device{static_cast<int>(h.compute_capability), static_cast<size_t>(h.shared_limit), static_cast<int>(h.largest_cluster)};
  std::vector<char> first;
  for (const bool ascending : {true, false}) {
    Buffer y(static_cast<size_t>(h.rows * h.n) * size, h.y_offset), stats(stats_rows * h.rows * acc_size, 0);
    fused_norm::NormForward args{};
    args.x = x;
    args.weight = h.has_weight ? weight.data() : nullptr;
    args.bias = h.has_bias ? bias.data() : nullptr;
    args.y = y.data();
    args.stats = h.need_stats ? stats.data() : nullptr;
    args.rows = h.rows;
    args.n = h.n;
    args.x_row_stride = h.x_row_stride;
    args.groups = h.groups;
    args.weight_grouped = h.weight_grouped;
    args.bias_grouped = h.bias_grouped;
    args.dtype = static_cast<fused_norm::DType>(h.dtype);
    args.param_dtype = static_cast<fused_norm::DType>(h.param_dtype);
    args.eps = h.eps;
    args.rms = h.rms;
    args.cast = h.cast;
    const Chosen chosen = found->second(args, device, ascending);
    std::vector<char> result(static_cast<char*>(y.data()), static_cast<char*>(y.data()) + y.bytes());
    result.insert(result.end(), static_cast<char*>(stats.data()), static_cast<char*>(stats.data()) + stats.bytes());
    if (ascending) {
      first = std::move(result);
    } else if (first != result) {
      emulation::fail("the result depends on the order in which warps run or copies arrive");
    } else {
      fwrite(&chosen, sizeof chosen, 1, stdout);
      y.write();
      stats.write();
    }
  }
}

}  // namespace

bool register_types(int dtype, int param_dtype, Run run) {
  registry()[{dtype, param_dtype}] = run;
  return true;
}

int main() {
  Header header;
  while (fread(&header, sizeof header, 1, stdin) == 1) serve(header);
  return 0;
}
