// The memory that a driver gives to the kernels: each buffer begins exactly where the caller wants it relative to 16-byte alignment, and
// AddressSanitizer guards both its ends.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "emulation.h"
#include "layout.h"

inline void read_bytes(void* p, size_t bytes) {
  if (fread(p, 1, bytes, stdin) != bytes) emulation::fail("the input ends early");
}

class Buffer {
 public:
  Buffer(size_t bytes, size_t offset) : bytes_(bytes), offset_(offset) {
    if (posix_memalign(&base_, 256, offset + bytes) != 0) emulation::fail("no memory for %zu bytes", bytes);
    memset(base_, 0xff, offset + bytes);  // NaN in every type
    ASAN_POISON_MEMORY_REGION(base_, offset);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    ASAN_UNPOISON_MEMORY_REGION(base_, offset_);
    for (size_t i = 0; i < offset_; ++i) {
      if (static_cast<unsigned char*>(base_)[i] != 0xff) emulation::fail("a write before the start of a buffer");
    }
    free(base_);
  }
  void* data() const { return static_cast<char*>(base_) + offset_; }
  size_t bytes() const { return bytes_; }
  void read() { read_bytes(data(), bytes_); }
  void write() const { fwrite(data(), 1, bytes_, stdout); }

 private:
  void* base_ = nullptr;
  size_t bytes_, offset_;
};

// An input whose rows may lie so far apart that only the pages in use should exist.
class SparseBuffer {
 public:
  explicit SparseBuffer(size_t bytes) : bytes_(bytes) {
    base_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base_ == MAP_FAILED) emulation::fail("no address space for %zu bytes", bytes);
  }
  SparseBuffer(const SparseBuffer&) = delete;
  ~SparseBuffer() { munmap(base_, bytes_); }
  void* data() const { return base_; }

 private:
  void* base_;
  size_t bytes_;
};

inline size_t bytes_of(int64_t dtype) { return fused_norm::size_of(static_cast<fused_norm::DType>(dtype)); }
