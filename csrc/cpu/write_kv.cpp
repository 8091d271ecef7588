// One task: an interval of tokens, all KV heads of each, K and V.
#include "kvkernels/ops/write_kv.h"

#include "cpu/codec.h"
#include "cpu/entry.h"
#include "cpu/split.h"

KK_BEGIN

void write_kv_cpu(const WriteKvParams& p, const CpuExec& exec) {
  const int64_t element = p.dtype == DType::f32 ? 4 : 2;
  const Rows k_rows = side_rows(p.pool, Side::K, p.transform, p.Hkv, p.k_head * element, p.D, p.page_size);
  const Rows v_rows = side_rows(p.pool, Side::V, p.transform, p.Hkv, p.v_head * element, p.D, p.page_size);
  EncodeRows encode_k = nullptr, encode_v = nullptr;
  with_dtype(p.dtype, [&](auto type) {
    encode_k = encode_rows<type.value>(p.pool.k_format, Side::K, p.D);
    encode_v = encode_rows<type.value>(p.pool.v_format, Side::V, p.D);
  });
#if defined(KK_DEBUG_ASSERT)
  for (int64_t i = 0; i < p.T; ++i)
    if (p.slots[i] >= p.pool.num_pages * p.page_size) fail("write_kv: slots holds a page past the end of the pool");
#endif
  const uint8_t* k = static_cast<const uint8_t*>(p.k);
  const uint8_t* v = static_cast<const uint8_t*>(p.v);
  const int64_t rows_per_thread = 256;  // about 20 us
  split(exec, p.T, (rows_per_thread + 2 * p.Hkv - 1) / (2 * p.Hkv), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (p.slots[i] < 0) continue;
      const int64_t page = p.slots[i] / p.page_size, token = p.slots[i] % p.page_size;
      encode_k(k + i * p.k_token * element, p.pool.k + page * p.pool.k_page, token, k_rows);
      encode_v(v + i * p.v_token * element, p.pool.v + page * p.pool.v_page, token, v_rows);
    }
  });
}

KK_END

KK_CPU_ENTRY(write_kv, WriteKvParams)
