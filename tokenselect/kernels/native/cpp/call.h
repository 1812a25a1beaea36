// One call, as Python hands it over: numbers, factors and pointers, eight bytes each.
//
// The fields are listed once, here: the library tells their names in order (`ts_fields`), by which
// Python packs them. Strides of tensors are in elements.
#pragma once

#include <stdint.h>

#define TS_FIELDS(X)                                                                             \
  X(int64_t, stages) X(int64_t, path) X(int64_t, threads) X(int64_t, is_static)                  \
  X(int64_t, B) X(int64_t, Hq) X(int64_t, Hkv) X(int64_t, Lq) X(int64_t, D) X(int64_t, Dv)       \
  X(int64_t, Lk) X(int64_t, S) X(int64_t, K) X(int64_t, columns) X(int64_t, dtype)               \
  X(const char*, q) X(int64_t, q_request) X(int64_t, q_head) X(int64_t, q_token)                 \
  X(int64_t, q_dim)                                                                              \
  X(const char*, k) X(int64_t, k_outer) X(int64_t, k_head) X(int64_t, k_token) X(int64_t, k_dim) \
  X(const char*, v) X(int64_t, v_outer) X(int64_t, v_head) X(int64_t, v_token) X(int64_t, v_dim) \
  X(const int32_t*, table) X(int64_t, table_request) X(int64_t, table_page)                      \
  X(int64_t, n_pages) X(int64_t, page_size)                                                      \
  X(const int32_t*, lengths) X(const float*, sinks)                                              \
  X(double, select_scale) X(double, scale) X(double, softcap)                                    \
  X(int64_t, millionths) X(int64_t, least) X(int64_t, most) X(int64_t, fixed_millionths)         \
  X(int64_t, n_sink) X(int64_t, n_local)                                                         \
  X(int64_t, vote) X(int64_t, over_candidates) X(int64_t, pool) X(int64_t, runs)                 \
  X(int64_t, score_at) X(int64_t, contiguous)                                                    \
  X(const double*, cos_sin_table) X(int64_t, n_high) X(const double*, inv_freq)                  \
  X(int64_t, half) X(int64_t, interleaved) X(int64_t, is_raw) X(double, rope_scaling)            \
  X(float*, votes) X(float*, dense_lse)                                                          \
  X(int32_t*, positions) X(int32_t*, count)                                                      \
  X(char*, out) X(float*, out_lse)                                                               \
  X(float*, key_rows) X(float*, value_rows) X(int64_t, request)                                  \
  X(float*, logits) X(int64_t, logits_pitch) X(float*, factors)                                  \
  X(int64_t, group) X(int64_t, first_query) X(int64_t, n_queries)                                \
  X(int64_t, in_tiles)                                                                           \
  X(int64_t, has_theta) X(double, theta) X(int64_t, max_reuse)                                   \
  X(float*, stored_query) X(int32_t*, stored) X(int64_t, stored_columns)                         \
  X(int32_t*, stored_count) X(int32_t*, stored_length) X(int64_t*, hits) X(int64_t*, misses)     \
  X(uint8_t*, reused) X(int32_t*, open_lengths) X(float*, mean_query)                            \
  X(char*, scratch) X(int64_t, scratch_bytes)

namespace ts {

struct Call {
#define X(type, name) type name;
  TS_FIELDS(X)
#undef X
};

// Stages, to be added up. DECIDE and UPDATE are the Selection Cache's; GATHER and WEIGH are for
// attention by matrix products.
enum : int64_t {
  SCORE = 1,
  SELECT = 2,
  ATTEND = 4,
  GATHER = 8,
  DECIDE = 16,
  UPDATE = 32,
  WEIGH = 64
};
enum : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum : int64_t { SOFT = 0, LOGIT = 1, HARD = 2 };
enum : int64_t { AT_TRUE = 0, AT_FIXED = 1, AT_BOTH = 2 };

// Head dims, and query heads per KV head, up to these: such rows lie on the stack.
constexpr int MAX_DIM = 256, MAX_GROUP = 32;

// `cos_sin_table` is of multiples: of 0 to LOW - 1 positions, then of 0, LOW, 2 * LOW, ...
constexpr int LOW = 512;

// Runs `work(what, unit)` for every unit from 0 on, on at most so many threads.
void parallel(int64_t threads, int64_t units, void (*work)(void*, int64_t), void* what);

template <class Work>
void parallel(int64_t threads, int64_t units, Work&& work) {
  auto each = [](void* what, int64_t unit) { (*static_cast<Work*>(what))(unit); };
  parallel(threads, units, static_cast<void (*)(void*, int64_t)>(each), &work);
}

}  // namespace ts
