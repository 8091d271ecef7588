// One task: an interval of tokens, all KV heads of each, K and V.
#include "kvkernels/ops/read_kv.h"

#include "cpu/codec.h"
#include "cpu/entry.h"
#include "cpu/split.h"

KK_BEGIN

void read_kv_cpu(const ReadKvParams& p, const CpuExec& exec) {
  const int64_t row_bytes = p.D * (p.dtype == DType::f32 ? 4 : 2), token_bytes = p.Hkv * row_bytes;
  const PoolSide k_side(p.pool, Side::K, p.transform, p.dtype, p.page_size, p.D),
      v_side(p.pool, Side::V, p.transform, p.dtype, p.page_size, p.D);
#if defined(KK_DEBUG_ASSERT)
  for (int64_t i = 0; i < p.T; ++i)
    if (p.slots[i] >= p.pool.num_pages * p.page_size) fail("read_kv: slots holds a page past the end of the pool");
#endif
  const int64_t rows_per_thread = 512;  // about 20 us
  split(exec, p.T, (rows_per_thread + 2 * p.Hkv - 1) / (2 * p.Hkv), [&](int64_t begin, int64_t end) {
    Row k_rows[kRowBatch], v_rows[kRowBatch];
    int64_t n = 0;
    const auto flush = [&] {
      k_side.decode(k_rows, n);
      v_side.decode(v_rows, n);
      n = 0;
    };
    for (int64_t i = begin; i < end; ++i) {
      uint8_t* k = static_cast<uint8_t*>(p.k) + i * token_bytes;
      uint8_t* v = static_cast<uint8_t*>(p.v) + i * token_bytes;
      if (p.slots[i] < 0) {
        memset(k, 0, static_cast<size_t>(token_bytes));
        memset(v, 0, static_cast<size_t>(token_bytes));
        continue;
      }
      const int64_t page = p.slots[i] / p.page_size, token = p.slots[i] % p.page_size;
      for (int64_t h = 0; h < p.Hkv; ++h) {
        k_rows[n] = k_side.row(page, h, token, k + h * row_bytes);
        v_rows[n] = v_side.row(page, h, token, v + h * row_bytes);
        if (++n == kRowBatch) flush();
      }
    }
    flush();
  });
}

KK_END

KK_CPU_ENTRY(read_kv, ReadKvParams)
