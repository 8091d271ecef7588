// One task: an interval of tokens, all KV heads of each, K and V.
#include "kvkernels/ops/read_kv.h"

#include "cpu/codec.h"
#include "cpu/entry.h"
#include "cpu/split.h"

KK_BEGIN

void read_kv_cpu(const ReadKvParams& p, const CpuExec& exec) {
  const int64_t row_bytes = p.D * (p.dtype == DType::f32 ? 4 : 2), token_bytes = p.Hkv * row_bytes;
  const Rows k_rows = side_rows(p.pool, Side::K, p.transform, p.Hkv, row_bytes, p.D, p.page_size);
  const Rows v_rows = side_rows(p.pool, Side::V, p.transform, p.Hkv, row_bytes, p.D, p.page_size);
  DecodeRows decode_k = nullptr, decode_v = nullptr;
  with_dtype(p.dtype, [&](auto type) {
    decode_k = decode_rows<type.value>(p.pool.k_format, Side::K, p.D);
    decode_v = decode_rows<type.value>(p.pool.v_format, Side::V, p.D);
  });
#if defined(KK_DEBUG_ASSERT)
  for (int64_t i = 0; i < p.T; ++i)
    if (p.slots[i] >= p.pool.num_pages * p.page_size) fail("read_kv: slots holds a page past the end of the pool");
#endif
  const int64_t rows_per_thread = 512;  // about 20 us
  split(exec, p.T, (rows_per_thread + 2 * p.Hkv - 1) / (2 * p.Hkv), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      uint8_t* k = static_cast<uint8_t*>(p.k) + i * token_bytes;
      uint8_t* v = static_cast<uint8_t*>(p.v) + i * token_bytes;
      if (p.slots[i] < 0) {
        memset(k, 0, static_cast<size_t>(token_bytes));
        memset(v, 0, static_cast<size_t>(token_bytes));
        continue;
      }
      const int64_t page = p.slots[i] / p.page_size, token = p.slots[i] % p.page_size;
      decode_k(p.pool.k + page * p.pool.k_page, token, k, k_rows);
      decode_v(p.pool.v + page * p.pool.v_page, token, v, v_rows);
    }
  });
}

KK_END

KK_CPU_ENTRY(read_kv, ReadKvParams)
