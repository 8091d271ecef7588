// What this machine can do: read and copy bandwidth, FMA, bf16 and int8 dot rate, on a given number of threads.
// Each call takes milliseconds, so that the bench can measure a limit between any two runs of what it limits.
#include <pybind11/pybind11.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace py = pybind11;

namespace {

// Seconds from the moment all threads stand ready to the moment the last one is done; thread creation is outside.
template <typename F>
double timed(int threads, const F& work) {
  if (threads < 1 || threads > 1024)
    throw std::invalid_argument("threads must be 1..1024, got " + std::to_string(threads));
  using Clock = std::chrono::steady_clock;
  std::atomic<int> ready{0};
  std::vector<Clock::time_point> begin(threads), end(threads);
  auto run = [&](int id) {
    ready.fetch_add(1);
    while (ready.load() < threads) std::this_thread::yield();
    begin[id] = Clock::now();
    work(id);
    end[id] = Clock::now();
  };
  std::vector<std::thread> others;
  for (int id = 1; id < threads; ++id) others.emplace_back(run, id);
  run(0);
  for (auto& t : others) t.join();
  Clock::time_point first = begin[0], last = end[0];
  for (int id = 1; id < threads; ++id) {
    first = begin[id] < first ? begin[id] : first;
    last = end[id] > last ? end[id] : last;
  }
  return std::chrono::duration<double>(last - first).count();
}

// Touched on construction; huge pages, because a limit must not be held down by the TLB.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_((bytes + kHuge - 1) / kHuge * kHuge) {
    map_ = mmap(nullptr, bytes_ + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map_ == MAP_FAILED) throw std::runtime_error("no memory for a buffer of " + std::to_string(bytes_) + " bytes");
    data_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(map_) + kHuge - 1) / kHuge * kHuge);
    madvise(data_, bytes_, MADV_HUGEPAGE);
    memset(data_, 1, bytes_);
  }
  ~Buffer() { munmap(map_, bytes_ + kHuge); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  static constexpr size_t kHuge = 2u << 20;
  size_t bytes_;
  void* map_;
  char* data_;
};

template <typename T, int Bytes>
struct VecOf {
  typedef T type __attribute__((vector_size(Bytes)));
};
template <typename T, int Bytes>
using Vec = typename VecOf<T, Bytes>::type;

template <typename V>
void keep(V& v) {
#if defined(__x86_64__)
  asm volatile("" : "+v"(v));
#else
  asm volatile("" : "+m"(v));
#endif
}

#if defined(__AVX512F__)
constexpr int kWidest = 64;
#elif defined(__AVX2__)
constexpr int kWidest = 32;
#else
constexpr int kWidest = 16;
#endif

// One forward stream per part; several parts at once keep more hardware prefetchers busy.
template <int Parts, int Ahead>
void read_slice(const char* p, size_t bytes) {
  using V = Vec<uint64_t, kWidest>;
  const size_t part = bytes / Parts / 256 * 256;
  V sum[Parts][2] = {};
  for (size_t i = 0; i < part; i += 256)
    for (int s = 0; s < Parts; ++s) {
      const char* at = p + s * part + i;
      for (int line = 0; line < 256; line += 64) {
        if (Ahead) __builtin_prefetch(at + line + Ahead, 0, 3);
        for (int j = 0; j < 64; j += kWidest) sum[s][line / 64 % 2] ^= *reinterpret_cast<const V*>(at + line + j);
      }
    }
  for (auto& s : sum)
    for (auto& v : s) keep(v);
}

// Blocks anywhere in memory, one after the other; what comes is asked for Ahead bytes before, past the end of a block too.
template <int Ahead>
void read_blocks(const char* const* block, size_t blocks, size_t bytes) {
  using V = Vec<uint64_t, kWidest>;
  V sum[2] = {};
  for (size_t b = 0; b < blocks; ++b) {
    const char *at = block[b], *next = block[b + 1 < blocks ? b + 1 : b];
    for (size_t i = 0; i < bytes; i += 64) {
      if (Ahead) __builtin_prefetch(i + Ahead < bytes ? at + i + Ahead : next + (i + Ahead - bytes), 0, 3);
      for (int j = 0; j < 64; j += kWidest) sum[i / 64 % 2] ^= *reinterpret_cast<const V*>(at + i + j);
    }
  }
  for (auto& v : sum) keep(v);
}

class Limits {
 public:
  explicit Limits(size_t bytes) : source_(bytes), target_(bytes) {}

  // Bytes per second over the whole buffer, the best way of reading it that was found for this number of threads.
  double read(int threads) {
    if (static_cast<size_t>(threads) >= way_.size()) way_.resize(threads + 1, -1);
    if (way_[threads] < 0) {
      double best = 0;
      for (int repeat = 0; repeat < 3; ++repeat)
        for (int way = 0; way < kWays; ++way) {
          const double rate = read_once(threads, way);
          if (rate > best) best = rate, way_[threads] = way;
        }
    }
    return read_once(threads, way_[threads]);
  }

  // The same of blocks in random order, as pages of a cache lie; the best way of this call.
  double read_scattered(int threads, size_t block) const {
    if (block < 16384 || block > source_.bytes() / threads)
      throw std::invalid_argument("blocks must be of 16384 bytes at least and one for each thread");
    std::vector<const char*> blocks;
    for (size_t at = 0; at + block <= source_.bytes(); at += block) blocks.push_back(source_.data() + at);
    std::shuffle(blocks.begin(), blocks.end(), std::mt19937(1));
    const size_t each = blocks.size() / threads;
    double best = 0;
    for (const auto read : {read_blocks<0>, read_blocks<4096>, read_blocks<8192>, read_blocks<16384>}) {
      const double s = timed(threads, [&](int id) { read(blocks.data() + id * each, each, block); });
      best = std::max(best, each * threads * block / s);
    }
    return best;
  }

  // Bytes copied per second (each of them is read once and written once), `bytes` of them. The place moves on with every
  // call, so that source and target are cold; a target smaller than the cache need not reach memory, as in what is measured.
  double copy(int threads, size_t bytes) {
    bytes = bytes < source_.bytes() ? bytes : source_.bytes();
    const size_t slice = (bytes / threads + 4095) / 4096 * 4096, total = slice * threads;
    if (total > source_.bytes()) throw std::invalid_argument("too few bytes to share out");
    if (next_ + total > source_.bytes()) next_ = 0;
    char *to = target_.data() + next_, *from = source_.data() + next_;
    next_ += total;
    const double s = timed(threads, [&](int id) { memcpy(to + id * slice, from + id * slice, slice); });
    return total / s;
  }

  size_t bytes() const { return source_.bytes(); }

 private:
  static constexpr int kWays = 6;
  double read_once(int threads, int way) const {
    static constexpr void (*kRead[kWays])(const char*, size_t) = {read_slice<1, 0>,    read_slice<2, 0>,
                                                                  read_slice<4, 0>,    read_slice<1, 1024>,
                                                                  read_slice<2, 2048>, read_slice<4, 4096>};
    const size_t slice = source_.bytes() / threads / 4096 * 4096;
    const double s = timed(threads, [&](int id) { kRead[way](source_.data() + id * slice, slice); });
    return slice * threads / s;
  }

  Buffer source_, target_;
  std::vector<int> way_;
  size_t next_ = 0;
};

// Independent accumulators: a latency of 4 to 6 cycles times two per cycle, and GCC 12 leaves no more in registers.
constexpr int chains_of(int bits) { return bits == 512 ? 14 : 12; }
constexpr int kSteps = 25000;  // under a millisecond

// x <- step(x) on every chain, in registers. (A loop over them is unrolled too late for GCC to take them out of memory.)
template <typename V, typename F, size_t... I>
void chains(const F& step, std::index_sequence<I...>) {
  V acc[sizeof...(I)] = {};
  (keep(acc[I]), ...);  // chains known to be equal would become one
  for (int i = 0; i < kSteps; ++i) ((acc[I] = step(acc[I])), ...);
  (keep(acc[I]), ...);
}
template <typename V, typename F>
void chains(const F& step) {
  chains<V>(step, std::make_index_sequence<chains_of(8 * sizeof(V))>{});
}

// Two operations per multiply-add.
template <int Bytes>
double fma(int threads) {
  using V = Vec<float, Bytes>;
  const double s = timed(threads, [](int) {
    V a = V{} + 0.999f, b = V{} + 1e-3f;
    keep(a), keep(b);
    chains<V>([&](V x) { return x * a + b; });
  });
  return 2.0 * (Bytes / 4) * chains_of(8 * Bytes) * kSteps * threads / s;
}

double fma_rate(int threads, int bits) {
  if (bits > kWidest * 8)
    throw std::invalid_argument(std::to_string(bits) + "-bit vectors: this machine has " + std::to_string(kWidest * 8));
  switch (bits) {
    case 128:
      return fma<16>(threads);
#if defined(__AVX2__)
    case 256:
      return fma<32>(threads);
#endif
#if defined(__AVX512F__)
    case 512:
      return fma<64>(threads);
#endif
    default:
      throw std::invalid_argument("vector width must be 128, 256 or 512 bits, got " + std::to_string(bits));
  }
}

// Products of bf16 pairs summed in fp32, vdpbf16ps. 0 where the machine has none.
double bf16_rate(int threads, int bits) {
#if defined(__AVX512BF16__)
  if (bits == 512) {
    const double s = timed(threads, [](int) {
      __m512i a = _mm512_set1_epi16(0x3f80), b = _mm512_set1_epi16(0x3a83);
      keep(a), keep(b);
      chains<__m512>([&](__m512 x) { return _mm512_dpbf16_ps(x, (__m512bh)a, (__m512bh)b); });
    });
    return 2.0 * (bits / 16) * chains_of(bits) * kSteps * threads / s;
  }
#endif
  (void)threads, (void)bits;
  return 0;
}

// u8 x s8 products: vpdpbusd with VNNI, else vpmaddubsw + vpaddw. 0 where the machine has neither.
double int8_rate(int threads, int bits, bool vnni) {
  double s = 0;
#if defined(__AVX512VNNI__)
  if (bits == 512 && vnni)
    s = timed(threads, [](int) {
      __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-5);
      keep(a), keep(b);
      chains<__m512i>([&](__m512i x) { return _mm512_dpbusd_epi32(x, a, b); });
    });
#endif
#if defined(__AVX512BW__)
  if (bits == 512 && !vnni)
    s = timed(threads, [](int) {
      __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-5);
      keep(b);
      chains<__m512i>([&](__m512i x) {
        keep(a);  // else the product is computed once
        return _mm512_add_epi16(x, _mm512_maddubs_epi16(a, b));
      });
    });
#endif
#if defined(__AVX2__)
  if (bits == 256 && !vnni)
    s = timed(threads, [](int) {
      __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-5);
      keep(b);
      chains<__m256i>([&](__m256i x) {
        keep(a);
        return _mm256_add_epi16(x, _mm256_maddubs_epi16(a, b));
      });
    });
#endif
  return s > 0 ? 2.0 * (bits / 8) * chains_of(bits) * kSteps * threads / s : 0;
}

}  // namespace

PYBIND11_MODULE(kvkernels_limits, m) {
  m.doc() = "Rates of this machine in bytes and operations per second.";
  m.attr("widest_bits") = kWidest * 8;
  const auto free = py::call_guard<py::gil_scoped_release>();
  py::class_<Limits>(m, "Limits")
      .def(py::init<size_t>(), py::arg("bytes"))
      .def("read", &Limits::read, py::arg("threads"), free)
      .def("read_scattered", &Limits::read_scattered, py::arg("threads"), py::arg("block"), free)
      .def("copy", &Limits::copy, py::arg("threads"), py::arg("bytes"), free)
      .def_property_readonly("bytes", &Limits::bytes);
  m.def("fma", &fma_rate, py::arg("threads"), py::arg("bits"), free);
  m.def("bf16", &bf16_rate, py::arg("threads"), py::arg("bits"), free);
  m.def("int8", &int8_rate, py::arg("threads"), py::arg("bits"), py::arg("vnni"), free);
}
