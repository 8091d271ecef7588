// n = M * p with p = 2^k: butterflies within each of the M parts, then H_M across the parts. Stages up to 256 channels
// run in registers and shuffles while x is loaded. What is left goes through shared memory, a block taking one long row
// or several short ones.
#include "kvkernels/ops/fwht.h"

#include "cuda/rows.cuh"
#include "kvkernels/core/hadamard.h"

namespace kk::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kInWarp = 32 * kPerLane;  // channels

template <typename Real>
struct Unit;  // 16 bytes
template <>
struct Unit<float> {
  using type = float4;
};
template <>
struct Unit<double> {
  using type = double2;
};
template <typename Real>
constexpr int kUnit = 16 / sizeof(Real);

// Where element e of the tile is in shared memory. The eight units of a 128-byte line are permuted by the number of the
// line: eight lanes whose units are 1, 2, 4 or 8 apart meet no bank twice.
template <typename Real>
__device__ __forceinline__ int place(int e) {
  const int unit = e / kUnit<Real>;
  return (unit ^ (unit / 8 % 8)) * kUnit<Real> + e % kUnit<Real>;
}

template <typename Real>
__device__ __forceinline__ Real get(const FwhtParams& p, int64_t i) {
  if constexpr (sizeof(Real) == 8) return static_cast<const double*>(p.x)[i];
  if (p.dtype == DType::f32) return static_cast<const float*>(p.x)[i];
  const uint16_t h = static_cast<const uint16_t*>(p.x)[i];
  return p.dtype == DType::f16 ? f16_to_float(h) : bf16_to_float(h);
}
template <typename Real>
__device__ __forceinline__ void put(Real x, const FwhtParams& p, int64_t i) {
  if constexpr (sizeof(Real) == 8) {
    static_cast<double*>(p.y)[i] = x;
  } else if (p.dtype == DType::f32) {
    static_cast<float*>(p.y)[i] = x;
  } else {
    static_cast<uint16_t*>(p.y)[i] = p.dtype == DType::f16 ? float_to_f16(x) : float_to_bf16(x);
  }
}

// Scaled, into y, which is contiguous, from number i on and before number `end`.
template <typename Real>
__device__ __forceinline__ void put8(const Real (&x)[8], Real scale, const FwhtParams& p, int64_t i, int64_t end,
                                     bool vector) {
  if (i >= end) return;
  Real scaled[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) scaled[j] = x[j] * scale;
  if constexpr (sizeof(Real) == 4) {
    if (vector) return store8(p.dtype, scaled, true, static_cast<uint8_t*>(p.y) + i * (p.dtype == DType::f32 ? 4 : 2));
  }
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (i + j < end) put(scaled[j], p, i + j);
}

// Stages h, 2 h .. (Radix / 2) h of the whole tile, each thread on its own 16-byte columns.
template <int Radix, typename Real>
__device__ __forceinline__ void columns(Real* work, int count, int h) {
  using V = typename Unit<Real>::type;
  for (int i = threadIdx.x * kUnit<Real>; i < count / Radix; i += blockDim.x * kUnit<Real>) {
    const int c = i & (h - 1), first = (i - c) * Radix + c;
    Real x[Radix][kUnit<Real>];
#pragma unroll
    for (int j = 0; j < Radix; ++j) {
      const V v = *reinterpret_cast<const V*>(work + place<Real>(first + j * h));
      memcpy(x[j], &v, sizeof(V));
    }
#pragma unroll
    for (int s = 1; s < Radix; s *= 2)
#pragma unroll
      for (int j = 0; j < Radix; ++j)
        if (!(j & s)) {
#pragma unroll
          for (int w = 0; w < kUnit<Real>; ++w) {
            const Real a = x[j][w], b = x[j + s][w];
            x[j][w] = a + b;
            x[j + s][w] = a - b;
          }
        }
#pragma unroll
    for (int j = 0; j < Radix; ++j) {
      V v;
      memcpy(&v, x[j], sizeof(V));
      *reinterpret_cast<V*>(work + place<Real>(first + j * h)) = v;
    }
  }
}

// This lane's 8 numbers, the first of which is number i of all [rows][n], and zeros past number `end`.
template <typename Real, typename RowOf>
__device__ __forceinline__ void get8(Real (&x)[8], const FwhtParams& p, int64_t i, int64_t end, bool vector,
                                     RowOf row_of) {
  const auto source = [&](int64_t j) {
    const int64_t row = row_of(j);
    return row * p.x_stride + (j - row * p.n);
  };
#pragma unroll
  for (int j = 0; j < 8; ++j) x[j] = 0;
  if (i >= end) return;
  if constexpr (sizeof(Real) == 4) {
    if (vector)
      return load8(p.dtype, static_cast<const uint8_t*>(p.x) + source(i) * (p.dtype == DType::f32 ? 4 : 2), true, x);
  }
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (i + j < end) x[j] = get<Real>(p, source(i + j));
}

// n = 2^log_n <= 256. Bound by one read of x and one write of y: 4 bytes and log_n additions per 16-bit number.
template <typename Real>
__global__ __launch_bounds__(kThreads) void fwht_warp_kernel(FwhtParams p, int log_n, bool vector) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kPerLane, end = p.rows * p.n;
  Real x[8];
  get8(x, p, i, end, vector, [&](int64_t j) { return j >> log_n; });
  hadamard(x, 1 << log_n);
  put8(x, static_cast<Real>(p.scale), p, i, end, vector);
}

// Bound as above, with M - 1 more additions per number; shared memory moves 16 to 32 bytes per number besides, at about
// ten times the speed.
template <typename Real, int M>
__global__ __launch_bounds__(kThreads) void fwht_tile_kernel(FwhtParams p, int part, int rows_per_block, bool vector) {
  KK_DYN_SMEM(Real, work);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * rows_per_block, base = first_row * p.n;
  const int n = static_cast<int>(p.n), rows = static_cast<int>(min(p.rows - first_row, int64_t{rows_per_block}));
  const int count = rows * n;
  const Real scale = static_cast<Real>(p.scale);

  for (int warp = threadIdx.x / 32 * 32; warp * kPerLane < count; warp += blockDim.x) {
    const int e = (warp + static_cast<int>(threadIdx.x % 32)) * kPerLane;
    Real x[8];
    get8(x, p, base + e, base + count, vector,
         [&](int64_t j) { return first_row + (rows == 1 ? 0 : static_cast<int>(j - base) / n); });
    hadamard(x, part);
    if (e < count) {
#pragma unroll
      for (int i = 0; i < 8; i += kUnit<Real>) {
        typename Unit<Real>::type v;
        memcpy(&v, x + i, sizeof(v));
        *reinterpret_cast<decltype(v)*>(work + place<Real>(e + i)) = v;
      }
    }
  }
  __syncthreads();

  for (int h = kInWarp; h < part;) {
    const int radix = min(part / h, 8);
    if (radix == 2) columns<2>(work, count, h);
    if (radix == 4) columns<4>(work, count, h);
    if (radix == 8) columns<8>(work, count, h);
    h *= radix;
    __syncthreads();
  }

  if constexpr (M == 1) {
    for (int e = threadIdx.x * kPerLane; e < count; e += blockDim.x * kPerLane) {
      Real x[8];
#pragma unroll
      for (int i = 0; i < 8; i += kUnit<Real>) {
        const auto v = *reinterpret_cast<const typename Unit<Real>::type*>(work + place<Real>(e + i));
        memcpy(x + i, &v, sizeof(v));
      }
      put8(x, scale, p, base + e, base + count, vector);
    }
  } else {
    constexpr HadamardRows<M> signs = hadamard_rows<M>();
    for (int i = threadIdx.x; i < count / M; i += blockDim.x) {
      const int c = i & (part - 1), first = (i - c) * M + c;
      Real x[M];
#pragma unroll
      for (int j = 0; j < M; ++j) x[j] = work[place<Real>(first + j * part)];
#pragma unroll
      for (int r = 0; r < M; ++r) {
        Real sum = signs.row[r] & 1u ? -x[0] : x[0];
#pragma unroll
        for (int j = 1; j < M; ++j) sum = signs.row[r] >> j & 1u ? sum - x[j] : sum + x[j];
        put(sum * scale, p, base + first + r * part);
      }
    }
  }
}

}  // namespace

void fwht(const FwhtParams& p, const CudaExec& exec) {
  int64_t part = 1;
  while (p.n % (2 * part) == 0) part *= 2;
  // The odd factor is 3, 5 or 7, and H_12 = 3 * 4 takes two of the twos.
  const int64_t m = part == p.n ? 1 : p.n / part * 4;
  if (m > 1) part /= 4;

  const bool wide = p.dtype == DType::f64;
  const int64_t element = element_bytes(p.dtype);
  const bool vector = !wide && p.n % kPerLane == 0 && aligned16(p.x, p.x_stride * element) && aligned16(p.y);
  const auto blocks = [&](int64_t items, int64_t per_block) {
    const int64_t n = (items + per_block - 1) / per_block;
    if (n >> 31) fail("fwht: too many rows for one launch on CUDA");
    return dim3(static_cast<unsigned>(n));
  };
  if (m == 1 && part <= kInWarp) {
    int log_n = 0;
    while (1 << log_n < p.n) ++log_n;
    const auto run = [&](auto kernel) {
      launch(kernel, blocks(p.rows * p.n, kThreads * kPerLane), dim3(kThreads), 0, exec.stream, p, log_n, vector);
    };
    return wide ? run(fwht_warp_kernel<double>) : run(fwht_warp_kernel<float>);
  }

  int64_t rows_per_block = kThreads * kPerLane / p.n;
  if (rows_per_block > p.rows) rows_per_block = p.rows;
  if (rows_per_block < 1) rows_per_block = 1;
  const int64_t octets = (rows_per_block * p.n + kPerLane - 1) / kPerLane;
  const int64_t bytes = (octets * kPerLane * (wide ? 8 : 4) + 127) / 128 * 128;
  const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, exec.device);
  if (bytes > limit)
    fail(("fwht: on CUDA a row must fit in shared memory: n = " + std::to_string(p.n) + " takes " +
          std::to_string(bytes) + " bytes, and device " + std::to_string(exec.device) + " has " + std::to_string(limit))
             .c_str());
  const int64_t threads = octets < kThreads ? (octets + 31) / 32 * 32 : kThreads;
  const auto run = [&](auto kernel) {
    launch(kernel, blocks(p.rows, rows_per_block), dim3(static_cast<unsigned>(threads)), static_cast<size_t>(bytes),
           exec.stream, p, static_cast<int>(part), static_cast<int>(rows_per_block), vector);
  };
  one_of<1, 12, 20, 28>("fwht: m, with n = m * 2^k,", m, [&](auto M) {
    wide ? run(fwht_tile_kernel<double, M.value>) : run(fwht_tile_kernel<float, M.value>);
  });
}

}  // namespace kk::cuda
