// One task: an interval of tokens, all KV heads of each, K and V.
#include "kvkernels/ops/write_kv.h"

#include "cpu/codec.h"
#include "cpu/entry.h"
#include "cpu/split.h"

KK_BEGIN

void write_kv_cpu(const WriteKvParams& p, const CpuExec& exec) {
  const int64_t element = p.dtype == DType::f32 ? 4 : 2;
  const PoolSide k_side(p.pool, Side::K, p.transform, p.dtype, p.page_size, p.D),
      v_side(p.pool, Side::V, p.transform, p.dtype, p.page_size, p.D);
  if (!k_side.codec.encode) fail("kivi2 codes the keys of a page at once: use pack_pages");
#if defined(KK_DEBUG_ASSERT)
  for (int64_t i = 0; i < p.T; ++i)
    if (p.slots[i] >= p.pool.num_pages * p.page_size) fail("write_kv: slots holds a page past the end of the pool");
#endif
  uint8_t* k = static_cast<uint8_t*>(const_cast<void*>(p.k));
  uint8_t* v = static_cast<uint8_t*>(const_cast<void*>(p.v));
  const int64_t rows_per_thread = 512;  // about 20 us
  split(exec, p.T, (rows_per_thread + 2 * p.Hkv - 1) / (2 * p.Hkv), [&](int64_t begin, int64_t end) {
    Row k_rows[2 * kRowBatch], v_rows[2 * kRowBatch];
    int64_t named = 0;
    const auto encode = [&](int64_t n) {
      k_side.encode(k_rows, n, named);
      v_side.encode(v_rows, n, named);
      named -= n;
      memmove(k_rows, k_rows + n, static_cast<size_t>(named) * sizeof(Row));
      memmove(v_rows, v_rows + n, static_cast<size_t>(named) * sizeof(Row));
    };
    for (int64_t i = begin; i < end; ++i) {
      if (p.slots[i] < 0) continue;
      const int64_t page = p.slots[i] / p.page_size, token = p.slots[i] % p.page_size;
      for (int64_t h = 0; h < p.Hkv; ++h) {
        k_rows[named] = k_side.row(page, h, token, k + (i * p.k_token + h * p.k_head) * element);
        v_rows[named] = v_side.row(page, h, token, v + (i * p.v_token + h * p.v_head) * element);
        if (++named == 2 * kRowBatch) encode(kRowBatch);
      }
    }
    encode(named);
  });
}

KK_END

KK_CPU_ENTRY(write_kv, WriteKvParams)
