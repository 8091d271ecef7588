// The SIMD row functions and the ops built on them against the scalar definitions in include/, bit for bit. Torch-free;
// built once per ISA (CMake: KVKERNELS_TESTS). Prints the first differences and exits 1 if there are any.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/codec.h"
#include "kvkernels/core/hadamard.h"
#include "kvkernels/ops/fwht.h"
#include "kvkernels/ops/merge_states.h"
#include "kvkernels/ops/pack_pages.h"
#include "kvkernels/ops/read_kv.h"
#include "kvkernels/ops/write_kv.h"

KK_BEGIN

void write_kv_cpu(const WriteKvParams&, const CpuExec&);
void read_kv_cpu(const ReadKvParams&, const CpuExec&);
void pack_pages_cpu(const PackPagesParams&, const CpuExec&);
void merge_states_cpu(const MergeStatesParams&, const CpuExec&);
void fwht_cpu(const FwhtParams&, const CpuExec&);

namespace {

int failures = 0;

void check(bool ok, const std::string& what) {
  if (ok) return;
  if (++failures <= 20) std::printf("FAIL %s\n", what.c_str());
}

std::mt19937 rng(1);

float uniform_bits() { return bits_float(static_cast<uint32_t>(rng())); }
float normal() { return std::normal_distribution<float>()(rng); }

const CpuExec one_thread{1, [](int, void (*)(void*, int), void*) { std::abort(); }};
const CpuExec three_threads{3, [](int n, void (*task)(void*, int), void* arg) {
                              std::vector<std::thread> pool;
                              for (int i = 0; i < n; ++i) pool.emplace_back(task, arg, i);
                              for (auto& t : pool) t.join();
                            }};

// ---- halves

void test_halves() {
  alignas(64) uint16_t in[F::W], out[F::W];
  alignas(64) float x[F::W];
  for (uint32_t h = 0; h < 65536; h += F::W) {
    for (int i = 0; i < F::W; ++i) in[i] = static_cast<uint16_t>(h + i);
    F::load_f16(in).store(x);
    for (int i = 0; i < F::W; ++i) {
      const float want = f16_to_float(in[i]);  // F16C quiets signalling NaNs
      check(want != want ? x[i] != x[i] : float_bits(x[i]) == float_bits(want),
            "f16 -> float of " + std::to_string(in[i]));
    }
    F::load_bf16(in).store(x);
    for (int i = 0; i < F::W; ++i)
      check(float_bits(x[i]) == float_bits(bf16_to_float(in[i])), "bf16 -> float of " + std::to_string(in[i]));
  }
  for (int n = 0; n < 1 << 20; n += F::W) {
    // any bits at all; then every half and the floats next to the middle of it and the next one
    for (int i = 0; i < F::W; ++i) {
      const uint32_t u =
          n < 1 << 19 ? static_cast<uint32_t>(rng()) : float_bits(f16_to_float(static_cast<uint16_t>(n + i)));
      x[i] = bits_float(n < 1 << 19 ? u : u + (n >> 16 & 1 ? 0x1000u : 0u) + (n >> 17 & 1) - (n >> 18 & 1));
    }
    F::load(x).store_f16(out);
    for (int i = 0; i < F::W; ++i)
      check(out[i] == float_to_f16(x[i]), "float -> f16 of " + std::to_string(float_bits(x[i])));
    F::load(x).store_bf16(out);
    for (int i = 0; i < F::W; ++i)
      check(out[i] == float_to_bf16(x[i]), "float -> bf16 of " + std::to_string(float_bits(x[i])));
  }
}

// ---- rows

constexpr const char* kKinds[] = {"normal", "outliers",  "constant", "zero",    "minus zero", "tiny",  "subnormal",
                                  "huge",   "past fp16", "one NaN",  "one Inf", "any bits",   "halves"};
constexpr int kNumKinds = sizeof(kKinds) / sizeof(kKinds[0]);

void fill_row(int kind, float* x, int64_t D) {
  const float level = normal();
  for (int64_t i = 0; i < D; ++i) {
    const float g = normal();
    const float values[] = {g,
                            i % 37 == 5 ? 40.0f * g : g,
                            level,
                            0.0f,
                            -0.0f,
                            g * 1e-7f,
                            g * 1e-40f,
                            g * 1e30f,
                            g * 1e6f,
                            i == 11 ? NAN : g,
                            i == 60 ? -INFINITY : g,
                            uniform_bits(),
                            static_cast<float>(static_cast<int>(rng() % 9) - 4) * 0.5f};
    x[i] = values[kind];
  }
}

struct Row16 {
  std::vector<uint8_t> bytes;
  std::vector<float> x;  // what the bytes say
};
Row16 as_dtype(const std::vector<float>& x, DType t) {
  Row16 r;
  r.x = x;
  r.bytes.resize(x.size() * (t == DType::f32 ? 4 : 2));
  for (size_t i = 0; i < x.size(); ++i) {
    if (t == DType::f32) {
      memcpy(&r.bytes[i * 4], &x[i], 4);
      continue;
    }
    const uint16_t h = t == DType::f16 ? float_to_f16(x[i]) : float_to_bf16(x[i]);
    memcpy(&r.bytes[i * 2], &h, 2);
    r.x[i] = t == DType::f16 ? f16_to_float(h) : bf16_to_float(h);
  }
  return r;
}

// Of a format of `parts`; a transform without the vectors it does not use.
void to_stored(float* x, int64_t D, int64_t parts, const KeyTransform& t) {
  std::vector<float> y(x, x + D);
  for (int64_t i = 0; i < D; ++i) {
    if (t.centre) y[i] = y[i] - t.centre[i];
    if (t.balance) y[i] = y[i] * t.balance[i];
  }
  for (int64_t i = 0; i < D; ++i) x[i] = y[parts == 2 && t.order ? t.order[i] : i];
  for (int64_t p = 0; p < parts; ++p) fwht(x + p * D / parts, D / parts);
  for (int64_t i = 0; i < D; ++i) x[i] *= fwht_scale(D / parts);
}
void from_stored(float* x, int64_t D, int64_t parts, const KeyTransform& t) {
  for (int64_t p = 0; p < parts; ++p) fwht(x + p * D / parts, D / parts);
  std::vector<float> y(x, x + D);
  for (int64_t i = 0; i < D; ++i) x[parts == 2 && t.order ? t.order[i] : i] = y[i] * fwht_scale(D / parts);
  for (int64_t i = 0; i < D; ++i) {
    if (t.balance) x[i] = x[i] / t.balance[i];
    if (t.centre) x[i] = x[i] + t.centre[i];
  }
}

// A random key transform of `heads` heads.
struct Transforms {
  int64_t D;
  std::vector<float> centre, balance;
  std::vector<int32_t> order;

  Transforms(int64_t heads, int64_t head_dim) : D(head_dim), centre(heads * D), balance(heads * D), order(heads * D) {
    for (auto& c : centre) c = normal();
    for (auto& b : balance) b = std::exp(normal());
    for (int64_t i = 0; i < heads * D; ++i) order[i] = static_cast<int32_t>(i % D);
    for (int64_t h = 0; h < heads; ++h) std::shuffle(&order[h * D], &order[h * D] + D, rng);
  }
  KeyTransform of(int64_t head) const { return {&centre[head * D], &balance[head * D], &order[head * D]}; }
};

bool same_number(const uint8_t* a, const uint8_t* b, DType t) {
  if (t == DType::f32) {
    float x, y;
    memcpy(&x, a, 4);
    memcpy(&y, b, 4);
    return float_bits(x) == float_bits(y) || (x != x && y != y);
  }
  const uint16_t x = load_u16(a), y = load_u16(b), inf = t == DType::f16 ? 0x7c00 : 0x7f80;
  return x == y || ((x & 0x7fff) > inf && (y & 0x7fff) > inf);
}

// How the two sides of a pool can be `format`, with f16 in the place of one that it cannot code by itself.
Format key_format(Format format) { return format == Format::kivi2 ? Format::f16 : format; }
Format value_format(Format format) {
  bool keys_only = false;
  with_format(format, [&](auto tag) { keys_only = decltype(tag)::keys_only; });
  return keys_only ? Format::f16 : format;
}

// One pool, every row by itself: bytes written and numbers read, K and V, all kinds of rows.
void test_rows(Format format, DType dtype, int64_t D, bool transform) {
  const int64_t Hkv = 3, page_size = 32, T = page_size, element = dtype == DType::f32 ? 4 : 2;
  const std::string name = "format " + std::to_string(static_cast<int>(format)) + " dtype " +
                           std::to_string(static_cast<int>(dtype)) + " D " + std::to_string(D) +
                           (transform ? " transform" : "");
  const Transforms transforms(Hkv, D);
  std::vector<float> k(T * Hkv * D), v(T * Hkv * D);
  for (int64_t r = 0; r < T * Hkv; ++r) {
    fill_row(static_cast<int>(r % kNumKinds), &k[r * D], D);
    fill_row(static_cast<int>((r + 5) % kNumKinds), &v[r * D], D);
  }
  const Row16 kd = as_dtype(k, dtype), vd = as_dtype(v, dtype);

  const Format k_format = key_format(format), v_format = value_format(format);
  const int64_t k_bytes = side_bytes(k_format, Side::K, page_size, D),
                bytes = page_bytes(k_format, v_format, page_size, D);
  std::vector<uint8_t> pool(2 * Hkv * bytes, 0xcd), want = pool;
  Pool p{};
  p.k = pool.data();
  p.v = pool.data() + k_bytes;
  p.k_page = p.v_page = Hkv * bytes;
  p.k_head = p.v_head = bytes;
  p.k_token = p.v_token = D * 2;
  p.num_pages = 2;
  p.k_format = k_format;
  p.v_format = v_format;

  std::vector<int64_t> slots(T);
  for (int64_t i = 0; i < T; ++i) slots[i] = i == 7 ? -1 : page_size + (i * 5) % page_size;
  WriteKvParams w{};
  w.k = kd.bytes.data();
  w.v = vd.bytes.data();
  w.k_token = w.v_token = Hkv * D;
  w.k_head = w.v_head = D;
  w.dtype = dtype;
  w.slots = slots.data();
  w.T = T;
  w.Hkv = Hkv;
  w.D = D;
  w.page_size = page_size;
  w.pool = p;
  if (transform) w.transform = transforms.of(0);
  write_kv_cpu(w, one_thread);

  ReadKvParams r{};
  std::vector<uint8_t> k_read(T * Hkv * D * element, 0xee), v_read = k_read;
  r.k = k_read.data();
  r.v = v_read.data();
  r.dtype = dtype;
  r.slots = slots.data();
  r.T = T;
  r.Hkv = Hkv;
  r.D = D;
  r.page_size = page_size;
  r.pool = p;
  r.transform = w.transform;
  read_kv_cpu(r, one_thread);

  for (int64_t i = 0; i < T; ++i)
    for (int64_t h = 0; h < Hkv; ++h)
      for (int s = 0; s < 2; ++s) {
        const Side side = s ? Side::V : Side::K;
        const float* x = (s ? vd : kd).x.data() + (i * Hkv + h) * D;
        const uint8_t* read = (s ? v_read : k_read).data() + (i * Hkv + h) * D * element;
        std::vector<float> y(x, x + D);
        if (slots[i] < 0) {
          for (int64_t j = 0; j < D * element; ++j) check(read[j] == 0, name + ": skipped slot reads as zero");
          continue;
        }
        const KeyTransform t = transform && side == Side::K ? transforms.of(h) : KeyTransform{};
        with_format(side == Side::K ? k_format : v_format, [&](auto tag) {
          using Fmt = decltype(tag);
          uint8_t* page = want.data() + (Hkv + h) * bytes + (side == Side::K ? 0 : k_bytes);
          const int64_t token = slots[i] - page_size;
          if constexpr (Fmt::rotated) to_stored(y.data(), D, Fmt::parts, t);
          Fmt::encode(side, y.data(), token, 1, page, page_size, D);
          Fmt::decode(side, page, token, 1, y.data(), page_size, D);
          if constexpr (Fmt::rotated) from_stored(y.data(), D, Fmt::parts, t);
        });
        const Row16 back = as_dtype(y, dtype);
        bool same = true;
        for (int64_t j = 0; j < D; ++j) same &= same_number(read + j * element, &back.bytes[j * element], dtype);
        check(same, name + ": read_kv, " + (s ? "V" : "K") + " row of kind " + std::to_string(i * Hkv + h));
      }
  check(pool == want, name + ": write_kv bytes");

  std::vector<uint8_t> k_again(k_read.size(), 0xee), v_again = k_again;
  r.k = k_again.data();
  r.v = v_again.data();
  read_kv_cpu(r, three_threads);
  check(k_again == k_read && v_again == v_read, name + ": read_kv on three threads");
}

// Random pages of one format -> another, against decode, transform, encode in scalar code.
void test_pack(Format from, Format to, int64_t D) {
  const int64_t Hkv = 2, page_size = 16, pages = 3;
  const std::string name =
      "pack_pages " + std::to_string(static_cast<int>(from)) + " -> " + std::to_string(static_cast<int>(to));
  const Transforms transforms(Hkv, D);
  const auto make = [&](Format k_format, Format v_format, std::vector<uint8_t>& data) {
    const int64_t bytes = page_bytes(k_format, v_format, page_size, D);
    data.resize(pages * Hkv * bytes);
    for (auto& b : data) b = static_cast<uint8_t>(rng());
    Pool p{};
    p.k = data.data();
    p.v = p.k + side_bytes(k_format, Side::K, page_size, D);
    p.k_page = p.v_page = Hkv * bytes;
    p.k_head = p.v_head = bytes;
    p.k_token = p.v_token = D * 2;
    p.num_pages = pages;
    p.k_format = k_format;
    p.v_format = v_format;
    return p;
  };
  std::vector<uint8_t> src, dst;
  const int32_t pairs[] = {2, 0, -1, 1, 0, 2};
  PackPagesParams p{};
  p.src = make(from, value_format(from), src);
  // Numbers, not random bits: of those a third of all halves' neighbours are NaN and every group would be.
  for (int64_t page = 0; page < pages * Hkv; ++page)
    for (Side side : {Side::K, Side::V})
      with_format(side == Side::K ? p.src.k_format : p.src.v_format, [&](auto tag) {
        std::vector<float> x(page_size * D);
        for (int64_t t = 0; t < page_size; ++t) fill_row(page == 5 ? static_cast<int>(t) % kNumKinds : 0, &x[t * D], D);
        uint8_t* first = side == Side::K ? p.src.k : p.src.v;
        decltype(tag)::encode(side, x.data(), 0, page_size, first + page * p.src.k_head, page_size, D);
      });
  p.dst = make(to, value_format(to), dst);
  p.pairs = pairs;
  p.N = 3;
  p.Hkv = Hkv;
  p.D = D;
  p.page_size = page_size;
  p.transform = transforms.of(0);
  std::vector<uint8_t> want = dst;
  for (int i = 0; i < 3; ++i)
    for (int64_t h = 0; h < Hkv && pairs[2 * i] >= 0; ++h)
      for (Side side : {Side::K, Side::V}) {
        const bool keys = side == Side::K;
        const KeyTransform t = keys ? transforms.of(h) : KeyTransform{};
        const uint8_t* a = (keys ? p.src.k : p.src.v) + pairs[2 * i] * p.src.k_page + h * p.src.k_head;
        uint8_t* b = want.data() + ((keys ? p.dst.k : p.dst.v) - dst.data()) + pairs[2 * i + 1] * p.dst.k_page +
                     h * p.dst.k_head;
        std::vector<float> x(page_size * D);
        with_format(keys ? p.src.k_format : p.src.v_format, [&](auto tag) {
          using Fmt = decltype(tag);
          Fmt::decode(side, a, 0, page_size, x.data(), page_size, D);
          if constexpr (Fmt::rotated)
            for (int64_t r = 0; r < page_size; ++r) from_stored(&x[r * D], D, Fmt::parts, t);
        });
        with_format(keys ? p.dst.k_format : p.dst.v_format, [&](auto tag) {
          using Fmt = decltype(tag);
          if constexpr (Fmt::rotated)
            for (int64_t r = 0; r < page_size; ++r) to_stored(&x[r * D], D, Fmt::parts, t);
          Fmt::encode(side, x.data(), 0, page_size, b, page_size, D);
        });
      }
  pack_pages_cpu(p, three_threads);
  check(dst == want, name + " D " + std::to_string(D));
}

// ---- fwht

int64_t order_m(int64_t n) {
  while (n % 2 == 0 && n > 28) n /= 2;
  for (int64_t m : {12, 20, 28})
    if (n % (m / 4) == 0) return m;
  return 1;
}

double hadamard_entry(int64_t m, int64_t p, int64_t i, int64_t j) {
  const int64_t a = i / p, b = j / p;
  bool minus = __builtin_parityll(static_cast<uint64_t>((i % p) & (j % p)));
  if (m == 12) minus ^= kHadamard<12>.row[a] >> b & 1u;
  if (m == 20) minus ^= kHadamard<20>.row[a] >> b & 1u;
  if (m == 28) minus ^= kHadamard<28>.row[a] >> b & 1u;
  return minus ? -1.0 : 1.0;
}

void test_fwht(int64_t n, DType dtype) {
  const int64_t rows = 3, stride = n + 3, element = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
  const int64_t m = order_m(n), p = n / m;
  const std::string name = "fwht of " + std::to_string(n) + " dtype " + std::to_string(static_cast<int>(dtype));
  std::vector<float> x(rows * stride);
  for (auto& v : x) v = normal();
  Row16 in = as_dtype(x, dtype == DType::f64 ? DType::f32 : dtype);
  std::vector<double> wide(in.x.begin(), in.x.end());
  std::vector<uint8_t> y(rows * n * element);
  FwhtParams q{};
  q.x = dtype == DType::f64 ? static_cast<const void*>(wide.data()) : in.bytes.data();
  q.y = y.data();
  q.rows = rows;
  q.n = n;
  q.x_stride = stride;
  q.dtype = dtype;
  q.scale = 0.37f;
  fwht_cpu(q, three_threads);
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<float> plain(in.x.begin() + r * stride, in.x.begin() + r * stride + n);
    fwht(plain.data(), m == 1 ? n : 1);
    for (auto& v : plain) v *= static_cast<float>(q.scale);
    const Row16 exact = as_dtype(plain, dtype == DType::f64 ? DType::f32 : dtype);
    for (int64_t i = 0; i < n; ++i) {
      const uint8_t* got = &y[(r * n + i) * element];
      if (m == 1 && dtype != DType::f64) check(!memcmp(got, &exact.bytes[i * element], element), name + ": bits");
      if (n > 2048) continue;
      double want = 0.0, value;
      for (int64_t j = 0; j < n; ++j) want += hadamard_entry(m, p, i, j) * wide[r * stride + j];
      if (dtype == DType::f64) memcpy(&value, got, 8);
      if (dtype == DType::f32)
        value = bits_float(static_cast<uint32_t>(load_u16(got)) | static_cast<uint32_t>(load_u16(got + 2)) << 16);
      if (dtype == DType::f16) value = f16_to_float(load_u16(got));
      if (dtype == DType::bf16) value = bf16_to_float(load_u16(got));
      const double eps = dtype == DType::f64 ? 1e-14 : dtype == DType::f32 ? 1e-6 : dtype == DType::f16 ? 1e-3 : 8e-3;
      check(std::fabs(value - want * q.scale) <= eps * std::sqrt(n) * 2, name + ": value");
    }
  }
}

// ---- merge_states

// apart: an array per state, not one of all.
void test_merge(DType dtype, int64_t D, bool apart) {
  const int64_t S = 4, N = 5, element = dtype == DType::f32 ? 4 : 2;
  std::vector<float> outs(S * N * D), lses(S * N), lse(N);
  for (auto& v : outs) v = normal();
  for (auto& v : lses) v = 3.0f * normal();
  for (int64_t s = 0; s < S; ++s) lses[s * N + 2] = -INFINITY;  // row 2: all empty; row 3: state 1 empty and NaN
  lses[N + 3] = -INFINITY;
  for (int64_t i = 0; i < D; ++i) outs[(N + 3) * D + i] = NAN;
  const Row16 in = as_dtype(outs, dtype);
  std::vector<uint8_t> out(N * D * element, 0xff);
  MergeStatesParams p{};
  p.num_parts = apart ? S : 0;
  for (int64_t s = 0; s < (apart ? S : 1); ++s) {
    p.outs[s] = in.bytes.data() + s * N * D * element;
    p.lses[s] = lses.data() + s * N;
  }
  p.out = out.data();
  p.lse = lse.data();
  p.S = S;
  p.N = N;
  p.D = D;
  p.dtype = dtype;
  merge_states_cpu(p, one_thread);
  for (int64_t r = 0; r < N; ++r) {
    double sum = 0.0;
    for (int64_t s = 0; s < S; ++s) sum += std::exp(static_cast<double>(lses[s * N + r]));
    check(r == 2 ? lse[r] == -INFINITY : std::fabs(lse[r] - std::log(sum)) < 1e-5, "merge_states: lse");
    for (int64_t i = 0; i < D; ++i) {
      double want = 0.0;
      for (int64_t s = 0; s < S; ++s)
        if (lses[s * N + r] > -INFINITY)
          want += std::exp(static_cast<double>(lses[s * N + r])) / sum * in.x[(s * N + r) * D + i];
      float got;
      if (dtype == DType::f32) memcpy(&got, &out[(r * D + i) * 4], 4);
      if (dtype == DType::f16) got = f16_to_float(load_u16(&out[(r * D + i) * 2]));
      if (dtype == DType::bf16) got = bf16_to_float(load_u16(&out[(r * D + i) * 2]));
      const double eps = dtype == DType::f32 ? 2e-6 : dtype == DType::f16 ? 2e-3 : 2e-2;
      check(std::fabs(got - (r == 2 ? 0.0 : want)) < eps, "merge_states: out");
    }
  }
}

int run() {
  test_halves();
  const Format formats[] = {
#define KK_FORMAT(name, number) Format::name,
#include "kvkernels/formats.def"
#undef KK_FORMAT
  };
  const DType dtypes[] = {DType::f32, DType::f16, DType::bf16};
  for (Format f : formats)
    for (DType t : dtypes)
      for (int64_t D : {64, 128, 256})
        for (bool transform : {false, true}) test_rows(f, t, D, transform);
  for (Format f : {Format::bf16, Format::f16})
    for (int64_t D : {80, 96, 112, 192}) test_rows(f, DType::f32, D, false);
  for (Format a : formats) {
    for (Format b : formats) test_pack(a, b, 64);
    for (int64_t D : {128, 256}) {
      test_pack(a, Format::bf16, D);
      test_pack(Format::bf16, a, D);
    }
  }
  for (DType t : {DType::f32, DType::f16, DType::bf16, DType::f64}) {
    for (int64_t n = 1; n <= 32768; n *= 2) test_fwht(n, t);
    for (int64_t m : {12, 20, 28, 40})
      for (int64_t p : {1, 2, 4, 16, 64}) test_fwht(m * p, t);
  }
  for (DType t : dtypes)
    for (int64_t D : {1, 17, 64, 128, 300})
      for (bool apart : {false, true}) test_merge(t, D, apart);
  std::printf("%d failures\n", failures);
  return failures != 0;
}

}  // namespace
KK_END

int main() { return kk::run(); }
