// Threads of the pool that torch has, and of no other.
//
// Python passes the address of `GOMP_parallel` of the OpenMP library that torch has loaded, so that
// there is one pool, which `torch.set_num_threads` sizes. Without it, work runs in the caller.
#include <stdint.h>

#include "call.h"

namespace ts {
namespace {

using Region = void (*)(void (*)(void*), void*, unsigned, unsigned);
Region open_region = nullptr;

struct Units {
  void (*work)(void*, int64_t);
  void* what;
  int64_t total;
  int64_t next;
};

// Every thread takes the next unit that nobody has. Which thread runs a unit never shows in a
// result: a unit writes to places of its own.
void take_units(void* data) {
  Units& units = *static_cast<Units*>(data);
  for (;;) {
    int64_t unit = __atomic_fetch_add(&units.next, 1, __ATOMIC_RELAXED);
    if (unit >= units.total) return;
    units.work(units.what, unit);
  }
}

}  // namespace

void use_region(void* region) { open_region = reinterpret_cast<Region>(region); }

void parallel(int64_t threads, int64_t units, void (*work)(void*, int64_t), void* what) {
  if (threads > units) threads = units;
  if (threads <= 1 || open_region == nullptr) {
    for (int64_t unit = 0; unit < units; ++unit) work(what, unit);
    return;
  }
  Units shared{work, what, units, 0};
  open_region(take_units, &shared, static_cast<unsigned>(threads), 0);
}

}  // namespace ts
