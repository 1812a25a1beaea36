// What the library exports: C functions, called through ctypes.
#include <stddef.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(TS_HAS_amx)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "call.h"

namespace ts {
void use_region(void* region);
}

#define TS_DECLARE(path) \
  namespace path {       \
  int64_t run_path(const ts::Call& c, bool measures); \
  bool has_tiles();                                   \
  }
TS_DECLARE(baseline)
TS_DECLARE(avx2)
TS_DECLARE(avx512)
TS_DECLARE(amx)

namespace {

struct Path {
  const char* name;
  int64_t (*run)(const ts::Call&, bool);
  bool (*has_tiles)();
  bool (*runs_here)();
};

#if defined(TS_HAS_avx2) || defined(TS_HAS_avx512) || defined(TS_HAS_amx)
// clang++ 14 does not know this feature by name.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

#if defined(TS_HAS_avx512) || defined(TS_HAS_amx)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}
#endif

#if defined(TS_HAS_amx)
// A process has to ask Linux for the state of tiles.
bool has_amx() {
  constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24;
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & BF16) && (d & TILE) &&
         syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

// From the narrowest to the widest. What a path is compiled for is what it is tested for here:
// each feature by itself, and none by the processor's generation.
const Path PATHS[] = {
#if defined(TS_HAS_baseline)
    {"baseline", baseline::run_path, baseline::has_tiles, [] { return true; }},
#endif
#if defined(TS_HAS_avx2)
    {"avx2", avx2::run_path, avx2::has_tiles,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
     }},
#endif
#if defined(TS_HAS_avx512)
    {"avx512", avx512::run_path, avx512::has_tiles, has_avx512},
#endif
#if defined(TS_HAS_amx)
    {"amx", amx::run_path, amx::has_tiles, [] { return has_avx512() && has_amx(); }},
#endif
};
constexpr int64_t N_PATHS = sizeof PATHS / sizeof *PATHS;

}  // namespace

#define TS_EXPORT extern "C" __attribute__((visibility("default")))

// The names of a call's fields, in their order.
TS_EXPORT const char* ts_fields() {
#define X(type, name) #name " "
  return TS_FIELDS(X);
#undef X
}

// The name of a path; null behind the last. `runs_here` says whether this machine has its features.
TS_EXPORT const char* ts_path(int64_t path, int64_t* runs_here) {
  if (path < 0 || path >= N_PATHS) return nullptr;
  *runs_here = PATHS[path].runs_here();
  return PATHS[path].name;
}

// Whether a path takes calls that are to be attended `in_tiles`.
TS_EXPORT int64_t ts_has_tiles(int64_t path) { return PATHS[path].has_tiles(); }

TS_EXPORT void ts_use_region(void* region) { ts::use_region(region); }

// Run a call's stages and return 0; or, if they need more scratch than there is, run nothing and
// return how many bytes they need.
TS_EXPORT int64_t ts_run(const ts::Call* call) {
  int64_t needed = PATHS[call->path].run(*call, true);
  if (needed > call->scratch_bytes) return needed;
  PATHS[call->path].run(*call, false);
  return 0;
}

#define X(type, name) static_assert(sizeof(ts::Call::name) == 8, "eight bytes each");
TS_FIELDS(X)
#undef X
